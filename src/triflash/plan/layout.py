"""Memory layouts that the Triton kernels read as they are, and those that a launch copies first. Plain numbers, no tensors."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["BIAS_STRIDE", "copied_bias_elements", "copies_bias", "copies_rows"]

BIAS_STRIDE = 16  # elements: what Triton can prove about a stride is that it is a multiple of 16, or nothing
_ALIGNMENT = 16  # bytes of one wide load


def copies_rows(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether q, k, v, out or dout is copied: its last dim is not contiguous."""
    return strides[-1] != 1 and shape[-1] != 1


def copies_bias(shape: Sequence[int], strides: Sequence[int], address: int) -> bool:
    """Whether a canonical bias (5 dims) that starts at ``address`` is copied to padded rows.

    It is if it varies over queries and keys and neither its rows nor its columns can be loaded 16 bytes at a time: with an odd row length
    every load would be a scalar one, and the kernels up to six times slower.
    """
    if shape[3] == 1 or shape[4] == 1:
        return False
    row, col = strides[3], strides[4]
    wide = (col == 1 and row % BIAS_STRIDE == 0) or (row == 1 and col % BIAS_STRIDE == 0)
    return not wide or address % _ALIGNMENT != 0


def copied_bias_elements(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements of that copy: expanded dims once, rows padded to a multiple of 16."""
    elements = 1
    for size, stride in zip(shape, strides, strict=True):
        elements *= 1 if stride == 0 else size
    row = 1 if strides[4] == 0 else shape[4]
    return elements // row * (-(-row // BIAS_STRIDE) * BIAS_STRIDE) if elements else 0
