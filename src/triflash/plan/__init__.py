"""Planning: what will run, decided from plain numbers. Called by ``bound/``. Imports neither triton nor anything that starts kernels."""
