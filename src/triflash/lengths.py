"""Key lengths and the like, which are integers of any dtype, for the backends in PyTorch, which call it. Torch only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FARTHEST", "Places", "comparable"]

FARTHEST = 2**29  # diagonal that a batch entry may have: kernels add it to positions in 32 bits


class Places(NamedTuple):
    """Which queries and keys of each batch entry there are, and where queries stand, each ``(B,)`` of any integers.

    Queries before query_starts and from query_lengths on are no rows, keys before key_starts are hidden. diagonal: the key at distance 0
    from query 0; shift: the same for all, as a number. None: 0, all, 0 and ``N - M``.
    """

    query_starts: Tensor | None = None
    query_lengths: Tensor | None = None
    key_starts: Tensor | None = None
    diagonal: Tensor | None = None
    shift: int | None = None

    def rows(self, i: Tensor) -> Tensor | None:
        """Which of queries i are rows, ``(B, len(i))``; None: all."""
        seen = None
        if self.query_starts is not None:
            seen = i >= comparable(self.query_starts)[:, None]
        if self.query_lengths is not None:
            below = i < comparable(self.query_lengths)[:, None]
            seen = below if seen is None else seen & below
        return seen

    def offsets(self, distance: Tensor) -> Tensor:
        """``j - i - diagonal`` as ``(B, 1, len(i), len(j))``, where a diagonal was given as a tensor; else ``j - i``, as it is."""
        if self.diagonal is None:
            return distance
        return distance - comparable(self.diagonal).clamp(-FARTHEST, FARTHEST)[:, None, None, None]

    def from_diagonal(self, distance: Tensor, queries: int, keys: int) -> Tensor:
        """The same of ``distance = j - i``, wherever the diagonal is: what ALiBi counts."""
        if self.diagonal is not None:
            return self.offsets(distance)
        return distance - (keys - queries if self.shift is None else self.shift)


def comparable(lengths: Tensor) -> Tensor:
    """The lengths as int64, which PyTorch compares positions with; what an int64 has no room for is the largest that there is."""
    x = lengths.to(torch.int64)
    return torch.where(x < 0, torch.iinfo(torch.int64).max, x) if lengths.dtype == torch.uint64 else x
