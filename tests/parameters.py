"""Where ptxas puts a kernel's parameters: for the stub of a driver (``stub/gpu.py``), and held against a cubin (``aot/test_hopper.py``)."""

from __future__ import annotations

from collections.abc import Sequence

FIRST = 0x210  # of the constant bank, for sm90


def parameter_offsets(sizes: Sequence[int]) -> list[int]:
    """From the first one's place on: each at an address that is a multiple of its size, or of 64, which the first one's own is not."""
    offsets, end = [], FIRST
    for size in sizes:
        unit = min(size, 64)
        begin = -(-end // unit) * unit
        offsets.append(begin - FIRST)
        end = begin + size
    return offsets
