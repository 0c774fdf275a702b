"""A room for each kernel, or for kernels that share them: configuration, what it supports, how it is chosen, shared memory, grid and order.

Called by the passes (``plan/triton.py``, ``packed.py``, ``hopper.py``, ``hopper_packed.py``, ``cache.py``) and, for what a launch
repeats of it, by ``launch/``. Pure.
"""
