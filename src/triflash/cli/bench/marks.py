"""Which probabilities dropout keeps, for the gate: a result that draws is held to the formula with the same marks.

triflash's marks are a function of seed and place. A peer's are asked for: with q and k of zeros every visible key weighs the same, and with
one value a column an output is 0 just where its key was dropped. Called by ``providers``; ``exact`` reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...dropout import keep_mask, rescale

__all__ = ["SEED", "Marks", "asked", "drawn"]

SEED = 7  # of whoever draws


@dataclass(frozen=True)
class Marks:
    """kept: (batch entries, query heads, queries, keys) -> bool of these four sizes; what no query sees may be anything. factor: what
    a probability that is kept is multiplied by.
    """

    kept: Callable[[range, range, range, slice], Tensor]
    factor: float


def drawn(p: float, heads: int, device: torch.device) -> Marks:
    """triflash's, of dropout_seed :data:`SEED`."""

    def kept(entries: range, own: range, queries: range, keys: slice) -> Tensor:
        place = torch.tensor([SEED, 0, 0, 0, own.start, heads], dtype=torch.int64, device=device)
        rows = slice(queries.start, queries.stop)
        return keep_mask(place, p, entries[-1] + 1 - entries.start, len(own), rows, keys, entries.start)[:: entries.step]

    return Marks(kept, rescale(p))


def asked(attend: Callable[[Tensor, Tensor, Tensor], Tensor], p: float, q: Tensor, k: Tensor, v: Tensor) -> Marks:
    """Those of a function ``(B, M, Hq, D), (B, N, Hk, D), (B, N, Hk, Dv)`` -> ``(B, M, Hq, Dv)`` that draws the same in every call."""
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    batch, keys, columns = q.shape[0], k.shape[1], v.shape[3]
    whole = torch.empty(batch, q.shape[2], q.shape[1], keys, dtype=torch.bool, device=q.device)
    with torch.no_grad():
        for first in range(0, keys, columns):
            at = torch.arange(min(columns, keys - first), device=q.device)
            own = torch.zeros_like(v)
            own[:, first + at, :, at] = 1.0
            whole[..., first + at] = (attend(q, k, own) != 0)[..., : len(at)].permute(0, 2, 1, 3)

    def kept(entries: range, heads: range, queries: range, keys: slice) -> Tensor:
        step = slice(entries.start, entries.stop, entries.step)
        return whole[step, heads.start : heads.stop, queries.start : queries.stop, keys]

    return Marks(kept, 1 / (1 - p))
