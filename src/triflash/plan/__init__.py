"""Planning: what will run, decided from plain numbers. Imports neither triton nor anything that starts kernels."""
