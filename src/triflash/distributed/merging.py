"""Results of parts of a row's keys, merged in float32 as they come, and lse in base 2 in float64 without what a float32 loses. Torch
only; called by all methods.

Merging: Rabe and Staats 2021.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..rest import rest_of, split_rest

__all__ = ["LOG2E", "Merged", "Result", "in_base_2", "split", "wide"]

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453


class Result(NamedTuple):
    """Of a rank's rows: out ``(B, M, H, Dv)`` in q's dtype, lse and, where it is kept, rest ``(B, H, M)``."""

    out: Tensor
    lse: Tensor
    rest: Tensor | None


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Merged:
    """Results of tiles as they come: float32 sums, and lse in base 2 in float64, which a huge one does not lose its digits in."""

    def __init__(self, q: Tensor, width: int) -> None:
        batch, queries, heads, _ = q.shape
        self.dtype = q.dtype
        self.out = q.new_zeros((batch, queries, heads, width), dtype=wide(q.dtype))
        self.lse = q.new_full((batch, heads, queries), -math.inf, dtype=torch.float64)
        self._begun: list[slice] = []

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """One tile's output and its lse in base 2, float64."""
        first = all(rows.stop <= each.start or each.stop <= rows.start for each in self._begun)
        self._begun.append(rows)
        if first:  # what merging with nothing gives
            self.out[:, rows] = out
            self.lse[:, :, rows] = lse
            return
        before = self.lse[:, :, rows]
        after = torch.logaddexp2(before, lse)
        base = _base(after)
        so_far = self.out[:, rows]
        so_far *= _weight(before, base, self.out.dtype)
        so_far += out * _weight(lse, base, self.out.dtype)
        self.lse[:, :, rows] = after

    def sunk(self, sink: Tensor, absent: Tensor | None) -> None:
        """Let a sink take its part: once, behind the last tile. absent: which rows are none, ``(B, rows)``."""
        before, after = self.lse, torch.logaddexp2(self.lse, (sink.double() * LOG2E)[:, None])
        if absent is not None:
            after = after.masked_fill(absent[:, None], -math.inf)
        self.out *= _weight(before, _base(after), self.out.dtype)
        self.lse = after

    def result(self, rest: bool) -> Result:
        unseen = self.lse == -math.inf
        lse = (self.lse * LN2).to(wide(self.dtype))
        lost = rest_of(self.lse.masked_fill(unseen, 0.0), (lse * LOG2E).masked_fill(unseen, 0.0)) if rest else None
        return Result(self.out.to(self.dtype), lse, lost)


def _base(whole: Tensor) -> Tensor:
    """What parts are weighed against: lse, and 0 where nothing was seen."""
    return whole.masked_fill(whole == -math.inf, 0.0)


def _weight(part: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
    """``2^(part - base)`` of each row, beside out."""
    return torch.exp2(part - base).to(dtype).transpose(1, 2).unsqueeze(-1)


def in_base_2(lse: Tensor, rest: Tensor | None) -> Tensor:
    """An operator's lse with what it lost, in float64."""
    x = (lse * LOG2E).double()
    if rest is None or rest.dim() == 1:
        return x
    off, log2_sum = split_rest(rest)
    return (x + off.double()) + log2_sum.double()


def split(lse: Tensor, dtype: torch.dtype, rest: bool) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`in_base_2`."""
    short = (lse * LN2).to(dtype)
    if not rest:
        return short, lse.new_empty(0, dtype=torch.float32)
    unseen = lse == -math.inf
    return short, rest_of(lse.masked_fill(unseen, 0.0), (short * LOG2E).masked_fill(unseen, 0.0))
