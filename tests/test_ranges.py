"""Which tiles a tile sees: plain integer arithmetic, so every small problem is tried and compared with the definition."""

from __future__ import annotations

import itertools

import pytest

from here import triton_only
from triflash.tiled import _visible_slices, slices

BOUNDS = (None, -9, -4, -1, 0, 1, 3, 8)


def sees(row: int, length: int, lo: int | None, hi: int | None) -> set[int]:
    """The definition: columns c of ``0 … length`` with ``lo <= c - row <= hi``."""
    return {c for c in range(length) if (lo is None or c - row >= lo) and (hi is None or c - row <= hi)}


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("lo", BOUNDS, ids=lambda x: f"lo={x}")
def test_tiled_visible_slices(block: int, lo: int | None) -> None:
    """Every visible column lies in exactly one slice; slices are aligned, inside the axis, and not all of them are always there."""
    for hi, first, count, length in itertools.product(BOUNDS, range(7), (1, 3, 4), range(10)):
        rows = range(first, first + count)
        slices = list(_visible_slices(slice(rows.start, rows.stop), length, lo, hi, block))
        covered = [c for s in slices for c in range(s.start, s.stop)]
        assert len(covered) == len(set(covered)) and set(covered) <= set(range(length))
        assert all(s.start % block == 0 and 0 < s.stop - s.start <= block for s in slices)
        wanted = set().union(*(sees(r, length, lo, hi) for r in rows))
        assert wanted <= set(covered)
        if wanted:  # no slice before the first or after the last that is needed
            assert slices[0].stop > min(wanted) and slices[-1].start <= max(wanted)


def test_slices() -> None:
    assert list(slices(0, 5, 2)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert list(slices(3, 3, 2)) == list(slices(4, 3, 2)) == []


@triton_only
@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("lo", BOUNDS, ids=lambda x: f"lo={x}")
def test_kernel_segments(block: int, lo: int | None) -> None:
    """Masked and unmasked segments of a kernel cover what is visible once; unmasked blocks are whole, inside the axis, and seen by all rows."""
    from triflash.kernels.triton import prims

    segments = prims.segments.fn
    for hi, first, count, length in itertools.product(BOUNDS, range(9), (1, 3, 4), range(10)):
        rows = range(first, first + count)
        begin, full_begin, full_end, end = segments(rows.start, rows.stop - 1, length, lo, hi, block)
        problem = (rows, length, lo, hi, (begin, full_begin, full_end, end))
        assert 0 <= begin <= full_begin <= full_end and end * block < length + block, problem
        # The loops of a kernel: masked, unmasked, masked; the first is compiled only with lo, the last only with hi or an uneven length.
        head = range(begin, full_begin)
        body = range(full_begin, full_end)
        tail = range(full_end, end)
        assert not head or lo is not None, problem
        assert not tail or hi is not None or length % block, problem
        blocks = [*head, *body, *tail]
        assert blocks == sorted(set(blocks)), problem
        covered = {c for at in blocks for c in range(at * block, (at + 1) * block)}
        wanted = set().union(*(sees(r, length, lo, hi) for r in rows))
        assert wanted <= covered, problem
        for at in body:
            whole = set(range(at * block, (at + 1) * block))
            assert all(whole <= sees(r, length, lo, hi) for r in rows), problem


@triton_only
def test_kernel_segments_leave_little_to_the_mask() -> None:
    """A masked block must be one that not all rows see in full: otherwise the fast path would be missed without any wrong result."""
    from triflash.kernels.triton import prims

    for lo, hi, first, length in itertools.product(BOUNDS, BOUNDS, range(0, 24, 4), range(4, 30)):
        if lo is not None and hi is not None and hi < lo:
            continue
        rows = range(first, first + 4)
        begin, full_begin, full_end, end = prims.segments.fn(rows.start, rows.stop - 1, length, lo, hi, 4)
        for at in [*range(begin, full_begin), *range(full_end, end)]:
            whole = set(range(at * 4, at * 4 + 4))
            assert not all(whole <= sees(r, length, lo, hi) for r in rows), (rows, length, lo, hi, at)
