"""Device code. Imports triton and itself; started only by ``launch/``."""
