"""Modules that make what attention takes, and layers around it. Imported where ``triflash.nn`` is named first."""

from .folding import PairBiasAttention, TriangleAttention
from .relative_bias import RelativeBias

__all__ = ["PairBiasAttention", "RelativeBias", "TriangleAttention"]
