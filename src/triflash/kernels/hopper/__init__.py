"""Kernels for NVIDIA Hopper (sm90) in Gluon: tiles by TMA, products by warpgroup instructions, loads and products on warps of their own."""
