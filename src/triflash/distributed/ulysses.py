"""Ulysses: two all-to-alls turn a rank's rows of all heads into all rows of some heads, and back (Jacobs et al. 2023).

Called by ``attention.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import unsupported
from . import tiles
from .call import Call, Gradients, Saved, computed
from .chunks import natural, pieces, share, shares
from .group import all_reduce, all_to_all, wait
from .merging import Result, wide
from .tiles import Extras, Sums, once

__all__ = ["Ulysses", "repeats_of"]


class Ulysses:
    """Between the exchanges the problem is whole, and its heads are this rank's. What was exchanged is kept for the backward pass."""

    @staticmethod
    def forward(call: Call, q: Tensor, k: Tensor, v: Tensor, x: Extras) -> tuple[Result, Saved]:
        problem, repeats = call.problem, repeats_of(call.heads, call.key_heads, call.group.size)
        k, v = (y if repeats == 1 else y.repeat_interleave(repeats, 2) for y in (k, v))
        sent = [_to_heads(call, y, length) for y, length in ((q, problem.queries), (k, problem.keys), (v, problem.keys))]
        some = _extras(call, x)
        q, k, v = (each.whole() for each in sent)
        with call.at_work(False):
            result = computed(problem, call.all_tiles(some), call.all_rows, q, k, v, some)
        back = [_to_rows(call, y, problem.queries) for y in (result.out, _as_rows(result.lse))]
        out, lse = (each.whole() for each in back)
        return Result(out, lse.squeeze(-1).transpose(1, 2), None), Saved(q, k, v, some, result)

    @staticmethod
    def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None, needs: Sequence[bool]) -> Gradients:
        q, k, v, x, result = saved
        problem, repeats = call.problem, repeats_of(call.heads, call.key_heads, call.group.size)
        sent = [_to_heads(call, y, problem.queries) for y in ([dout] if dlse is None else [dout, _as_rows(dlse)])]
        dout, *more = (each.whole() for each in sent)
        dlse = more[0].squeeze(-1).transpose(1, 2) if more else None
        by_heads = all(own or y is None for own, y in zip(call.by_heads, (x.bias, x.second), strict=True))
        todo = call.all_tiles(x)
        sums = Sums(x, needs, by_heads, todo)
        dq = q.new_empty(q.shape, dtype=q.dtype if once(todo) else wide(q.dtype)) if needs[0] else None
        dk, dv = (y.new_empty(y.shape, dtype=wide(y.dtype)) if need else None for need, y in ((needs[1], k), (needs[2], v)))
        with call.at_work(False):
            tiles.backward(problem, todo, q, k, v, x, result, dout, dlse, sums, dq, dk, dv)
        tiles.sink_gradient(sums, x, result, dout, dlse)
        dq = None if dq is None else dq.to(q.dtype)
        if repeats == 1:  # whole: nothing is added on the way
            dk, dv = (None if y is None else y.to(q.dtype) for y in (dk, dv))
        lengths = (problem.queries, problem.keys, problem.keys)
        back = [None if y is None else _to_rows(call, y, length) for y, length in zip((dq, dk, dv), lengths, strict=True)]
        dq, dk, dv = (None if each is None else each.whole() for each in back)
        if repeats > 1:
            dk, dv = (None if y is None else y.unflatten(2, (-1, repeats)).sum(3).to(q.dtype) for y in (dk, dv))
        dbias, dsecond = (None if y is None else _bias_gradient(call, n, y) for n, y in enumerate((sums.dbias, sums.dsecond)))
        dsink = None if sums.dsink is None else _spread(call, sums.dsink, 0)
        return Gradients(dq, dk, dv, dbias, dsecond, dsink)


def repeats_of(heads: int, key_heads: int, size: int) -> int:
    """How often a key head is repeated, so that every rank gets as many. Raises UnsupportedError where query heads cannot be dealt out."""
    if heads % size:
        raise unsupported(
            f"method='ulysses' with {heads} query heads on {size} ranks, which do not divide them", "auto",
            "method='allgather' and method='ring' take any number of heads",
        )  # fmt: skip
    return math.lcm(key_heads, size) // key_heads if key_heads else 1


def _as_rows(lse: Tensor) -> Tensor:
    return lse.transpose(1, 2).unsqueeze(-1)


class _ToHeads(NamedTuple):
    call: Call
    moving: Tensor
    length: int

    def whole(self) -> Tensor:
        """``(B, length, heads / size, W)`` in natural order."""
        group = self.call.group
        rows = self.moving if group.size == 1 else wait(self.moving, group)
        begins = [0]
        for held in shares(self.length, group.size, self.call.order):
            begins.append(begins[-1] + held)
        found = [rows[begins[rank] + p.at :][: p.stop - p.start] for rank, p in natural(self.length, group.size, self.call.order)]
        return (torch.cat(found) if len(found) > 1 else rows).transpose(0, 1)


def _to_heads(call: Call, x: Tensor, length: int) -> _ToHeads:
    """Of this rank's rows ``(B, m, heads, W)``: send each rank its heads."""
    size = call.group.size
    batch, held, heads, width = x.shape
    parts = x.unflatten(2, (size, heads // size)).permute(2, 1, 0, 3, 4).reshape(size * held, batch, heads // size, width)
    if size > 1:
        parts = all_to_all(parts, [held] * size, shares(length, size, call.order), call.group)
    return _ToHeads(call, parts, length)


class _ToRows(NamedTuple):
    call: Call
    moving: Tensor
    held: int

    def whole(self) -> Tensor:
        """``(B, m, heads, W)``: this rank's rows of all heads."""
        group = self.call.group
        rows = self.moving if group.size == 1 else wait(self.moving, group)
        return rows.reshape(group.size, self.held, *rows.shape[1:]).permute(2, 1, 0, 3, 4).flatten(2, 3)


def _to_rows(call: Call, x: Tensor, length: int) -> _ToRows:
    """Of all rows ``(B, length, heads / size, W)`` of this rank's heads: send each rank its rows."""
    size, rank = call.group.size, call.group.rank
    found = [x[:, p.start : p.stop] for r in range(size) for p in pieces(length, size, r, call.order)]
    rows = (torch.cat(found, 1) if len(found) > 1 else x).transpose(0, 1)
    held = share(length, size, rank, call.order)
    if size > 1:
        rows = all_to_all(rows, shares(length, size, call.order), [held] * size, call.group)
    return _ToRows(call, rows, held)


def _own_heads(call: Call, count: int) -> slice:
    each = count // call.group.size
    return slice(call.group.rank * each, (call.group.rank + 1) * each)


def _extras(call: Call, x: Extras) -> Extras:
    """What is beside q, k and v, of all rows and this rank's heads."""
    own = _own_heads(call, call.heads)
    moved: list[Tensor | None] = []
    for n, y in enumerate((x.bias, x.second, x.mask)):
        if y is None:
            moved.append(None)
            continue
        by_rows, by_heads = (call.problem.by_rows[n], call.by_heads[n]) if n < 2 else (call.mask_by_rows, y.shape[2] > 1)
        if by_heads and not by_rows:
            y = y[:, :, own]
        moved.append(_bias_to_heads(call, y, by_heads) if by_rows else y)
    rest = Extras(sink=x.sink, slopes=x.slopes, seed=x.seed).heads(own)
    own_heads = {name: getattr(rest, name) for name in ("sink", "slopes", "seed")}
    return x._replace(bias=moved[0], second=moved[1], mask=moved[2], **own_heads)


def _bias_to_heads(call: Call, y: Tensor, by_heads: bool) -> Tensor:
    """A bias of five dims, of this rank's rows and all heads, as one of all rows and this rank's heads."""
    if not by_heads:  # every rank gets the one there is
        y = y.expand(-1, -1, call.group.size, -1, -1)
    rows = y.flatten(0, 1).transpose(1, 2)
    return _to_heads(call, rows, call.problem.queries).whole().transpose(1, 2).unflatten(0, y.shape[:2])


def _bias_gradient(call: Call, n: int, grad: Tensor) -> Tensor:
    """The gradient as this rank's bias has it, from that of all rows and this rank's heads."""
    if not call.problem.by_rows[n]:
        return _spread(call, grad, 2) if call.by_heads[n] else all_reduce(grad, call.group, call.in_order)
    rows = _to_rows(call, grad.flatten(0, 1).transpose(1, 2), call.problem.queries).whole()
    if not call.by_heads[n]:
        rows = rows.sum(2, keepdim=True)
    return rows.transpose(1, 2).unflatten(0, grad.shape[:2])


def _spread(call: Call, grad: Tensor, dim: int) -> Tensor:
    """The gradient of all heads, on every rank, from each rank's own; of replicated inputs, in which nothing is left to add."""
    shape = list(grad.shape)
    shape[dim] *= call.group.size
    whole = grad.new_zeros(shape)
    whole.narrow(dim, call.group.rank * grad.shape[dim], grad.shape[dim]).copy_(grad)
    return all_reduce(whole, call.group, False)
