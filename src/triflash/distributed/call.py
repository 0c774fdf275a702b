"""What the methods share: one call's group, order and cuts, what they keep for a backward pass, and what that gives.

Called by ``attention.py`` and the methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..plan.device import limited
from . import tiles
from .chunks import Piece, pieces
from .group import Group, all_reduce
from .merging import Merged, Result
from .tiles import Extras, Problem, Sums, Tile, once, tiles_of

__all__ = ["Call", "Gradients", "Saved", "apart", "computed", "joined", "over_group", "parts_of"]


@dataclass(frozen=True)
class Call:
    """One call: the problem, the group, the order of rows, and how its work is cut.

    programs: the SMs that a grid may use; None: all, but 8 while a collective is in flight. by_heads: whether bias and second bias vary
    over heads. plans: the tiles, by what keys are at hand: calls of one signature share them.
    """

    problem: Problem
    group: Group
    order: str
    heads: int
    key_heads: int
    head_chunks: int
    programs: int | None
    by_heads: tuple[bool, bool] = (False, False)
    mask_by_rows: bool = False
    plans: dict[Any, list[Tile]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rows(self) -> tuple[Piece, ...]:
        return pieces(self.problem.queries, self.group.size, self.group.rank, self.order)

    def keys_of(self, rank: int) -> tuple[Piece, ...]:
        return pieces(self.problem.keys, self.group.size, rank, self.order)

    @property
    def all_rows(self) -> tuple[Piece, ...]:
        return (Piece(0, self.problem.queries, 0),) if self.problem.queries else ()

    @property
    def all_keys(self) -> tuple[Piece, ...]:
        return (Piece(0, self.problem.keys, 0),) if self.problem.keys else ()

    def tiles(self, x: Extras, source: int | None = None) -> list[Tile]:
        """The tiles of this rank's rows and a rank's keys; None: all keys."""
        return self._planned(source, x, lambda: (self.rows, self.all_keys if source is None else self.keys_of(source)))

    def all_tiles(self, x: Extras) -> list[Tile]:
        """The tiles of all rows and all keys."""
        return self._planned("all", x, lambda: (self.all_rows, self.all_keys))

    def _planned(self, name: Any, x: Extras, of: Callable[[], tuple[Sequence[Piece], Sequence[Piece]]]) -> list[Tile]:
        if torch.compiler.is_compiling():
            return tiles_of(self.problem, *of(), x)
        found = self.plans.get(name)
        if found is None:
            found = self.plans[name] = tiles_of(self.problem, *of(), x)
        return found

    @property
    def in_order(self) -> bool:
        return self.problem.deterministic

    def at_work(self, talking: bool) -> limited:
        """The SMs that kernels may use; ``talking``: a collective is in flight."""
        return limited(self.programs, 8 if talking and self.programs is None else 0)


class Saved(NamedTuple):
    """What a backward pass needs: q, k, v as the kernels saw them or as this rank holds them, and the result on the same rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    extras: Extras
    result: Result


class Gradients(NamedTuple):
    """In the shapes and dtypes of this rank's inputs; biases and the sink in float32 where they are summed. None: not wanted."""

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dbias: Tensor | None
    dsecond: Tensor | None
    dsink: Tensor | None


def joined(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values in one tensor, which travels as one message."""
    return torch.cat((k, v), -1)


def apart(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`joined`, for keys of so many dims; views."""
    return x[..., :width], x[..., width:]


def parts_of(grads: Tensor | None, needs: Sequence[bool], width: int) -> tuple[Tensor | None, Tensor | None]:
    """dk and dv of what holds those that are wanted."""
    if grads is None:
        return None, None
    if needs[1] and needs[2]:
        return apart(grads, width)
    return (grads, None) if needs[1] else (None, grads)


def over_group(call: Call, sums: Sums, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> Gradients:
    """The gradients, those of replicated inputs summed over the group."""
    dbias, dsecond = (
        x if x is None or own else all_reduce(x, call.group, call.in_order)
        for x, own in zip((sums.dbias, sums.dsecond), call.problem.by_rows, strict=True)
    )
    dsink = None if sums.dsink is None else all_reduce(sums.dsink, call.group, call.in_order)
    return Gradients(dq, dk, dv, dbias, dsecond, dsink)


def computed(problem: Problem, todo: list[Tile], rows: Sequence[Piece], q: Tensor, k: Tensor, v: Tensor, x: Extras) -> Result:
    """The result of a rank's rows, all of whose keys are at hand."""
    if once(todo):
        result = tiles.forward(problem, todo, rows, q, k, v, x)
        assert result is not None
        return result
    merged = Merged(q, v.shape[3])
    tiles.forward(problem, todo, rows, q, k, v, x, merged)
    tiles.sunk(merged, x, rows)
    return merged.result(tiles.keeps(problem, x))
