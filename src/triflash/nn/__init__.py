"""Modules that make what attention takes. Imported where ``triflash.nn`` is named first."""

from .relative_bias import RelativeBias

__all__ = ["RelativeBias"]
