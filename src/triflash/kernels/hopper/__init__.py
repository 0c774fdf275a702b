"""Gluon kernels for NVIDIA Hopper (sm90): TMA loads, WGMMA, warp specialisation. Launched by ``launch/hopper*.py``."""
