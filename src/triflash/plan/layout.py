"""Memory layouts that the kernels read as they are, and those that a launch copies first. Plain numbers, no tensors.

Called by the launchers, who ask what to copy, and by ``explain``, which tells what they will.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

__all__ = [
    "BIAS_STRIDE",
    "copied_bias_shape",
    "copies_bias",
    "copies_rows",
    "tma_addressable",
    "tma_padded",
    "tma_writable",
]

BIAS_STRIDE = 16  # elements: what Triton can prove about a stride is that it is a multiple of 16, or nothing
_ALIGNMENT = 16  # bytes of one wide load, and what TMA wants of addresses and strides
_TMA_STRIDE_LIMIT = 2**40  # bytes


def copies_rows(size: int, stride: int) -> bool:
    """Whether the portable kernels get a copy of q, k, v, out or dout, whose last dim has that size and stride: it is not contiguous."""
    return stride != 1 and size != 1


def copies_bias(shape: Sequence[int], strides: Sequence[int], address: int) -> bool:
    """Whether the portable kernels get a copy, with padded rows, of a canonical bias (5 dims) that starts at ``address``.

    They do if it varies over queries and keys and neither its rows nor its columns can be loaded 16 bytes at a time: with an odd row
    length every load would be a scalar one, and the kernels up to six times slower.
    """
    if shape[3] == 1 or shape[4] == 1:
        return False
    row, col = strides[3], strides[4]
    vectorised = (col == 1 and row % BIAS_STRIDE == 0) or (row == 1 and col % BIAS_STRIDE == 0)
    return not vectorised or address % _ALIGNMENT != 0


def copied_bias_shape(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int, int, int, int]:
    """What that copy allocates: expanded dims once, rows padded to a multiple of 16 elements."""
    outer, inner, head, query, key = (1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True))
    return outer, inner, head, query, _padded(key, BIAS_STRIDE)


@functools.lru_cache(maxsize=256)  # the tensors of a problem lie alike
def tma_addressable(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, address: int) -> bool:
    """Whether TMA, by which the Hopper kernels load and store, can address a tensor of ``itemsize`` bytes an element as it lies.

    Its last dim is contiguous, its address and other strides are multiples of 16 bytes, and no other stride is 0.
    """
    if address % _ALIGNMENT or (strides[-1] != 1 and shape[-1] > 1):
        return False
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        if size != 1 and not (0 < stride * itemsize < _TMA_STRIDE_LIMIT and stride * itemsize % _ALIGNMENT == 0):
            return False
    return True


@functools.lru_cache(maxsize=256)
def tma_writable(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, address: int) -> bool:
    """Whether TMA can store such a tensor and touches nothing else: it writes rows in whole 16 bytes, past an end between two of them.

    In padding of our own (:func:`tma_padded`) that is well. In a caller's tensor the rest of those 16 bytes may be anybody's.
    """
    return tma_addressable(shape, strides, itemsize, address) and shape[-1] * itemsize % _ALIGNMENT == 0


def tma_padded(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """What a copy for TMA allocates: rows padded to a multiple of 16 bytes."""
    return (*shape[:-1], _padded(shape[-1], _ALIGNMENT // itemsize))


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
