"""A room for each of Hopper's kernels: its configuration, what it supports, how it is chosen, shared memory, grid and order. Called by
``plan/hopper.py`` and, for what a launch repeats of it, by ``launch/hopper*.py``. Pure.
"""
