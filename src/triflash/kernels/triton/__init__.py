"""Portable Triton kernels: NVIDIA from sm80 and AMD CDNA. Launched by ``launch/``."""
