"""All-gather: every rank gets all keys, head chunk by head chunk, and computes its rows. Called by ``attention.py``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import tiles
from .call import Call, Gradients, Saved, apart, computed, joined, over_group, parts_of
from .chunks import share, shares
from .group import added, all_gather, all_to_all, reduce_scatter, wait
from .merging import Result, wide
from .shares import arranged
from .tiles import Extras, Sums, once

__all__ = ["AllGather"]


class AllGather:
    """Keys and values of a chunk of heads are gathered while the chunk before computes; gathered again in the backward pass."""

    @staticmethod
    def forward(call: Call, q: Tensor, k: Tensor, v: Tensor, x: Extras) -> tuple[Result, Saved]:
        parts = _head_chunks(call, q, k)
        found: list[Result] = []
        coming = _gather(call, k, v, parts[0][1])
        for at, (heads, _) in enumerate(parts):
            all_k, all_v = coming.whole()
            more = at + 1 < len(parts)
            if more:
                coming = _gather(call, k, v, parts[at + 1][1])
            some = x.heads(heads) if len(parts) > 1 else x
            todo = call.tiles(some)
            with call.at_work(more and call.group.size > 1):
                found.append(computed(call.problem, todo, call.rows, _heads_of(q, heads), all_k, all_v, some))
        result = found[0]
        if len(found) > 1:
            rest = None if result.rest is None else torch.cat([r.rest for r in found if r.rest is not None], 1)
            result = Result(torch.cat([r.out for r in found], 2), torch.cat([r.lse for r in found], 1), rest)
        return result, Saved(q, k, v, x, result)

    @staticmethod
    def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None, needs: Sequence[bool]) -> Gradients:
        q, k, v, x, result = saved
        parts = _head_chunks(call, q, k)
        sums = Sums(x, needs, len(parts) == 1, call.tiles(x))
        widths = [width for width, need in ((k.shape[3], needs[1]), (v.shape[3], needs[2])) if need]
        dqs: list[Tensor] = []
        sent: list[_Scattered] = []
        coming = _gather(call, k, v, parts[0][1])
        for at, (heads, _own) in enumerate(parts):
            all_k, all_v = coming.whole()
            more = at + 1 < len(parts)
            if more:
                coming = _gather(call, k, v, parts[at + 1][1])
            some, part = x.heads(heads) if len(parts) > 1 else x, Result(*(y if y is None else _heads_of(y, heads) for y in result))  # type: ignore[arg-type]
            todo = call.tiles(some)
            q_part = _heads_of(q, heads)
            dq = q_part.new_empty(q_part.shape, dtype=q.dtype if once(todo) else wide(q.dtype)) if needs[0] else None
            own_grads = all_k.new_empty((*all_k.shape[:3], sum(widths)), dtype=wide(k.dtype)) if widths else None
            dk, dv = parts_of(own_grads, needs, k.shape[3])
            with call.at_work((more or at > 0) and call.group.size > 1):
                tiles.backward(
                    call.problem, todo, q_part, all_k, all_v, some, part, _heads_of(dout, heads),
                    None if dlse is None else _heads_of(dlse, heads), sums.heads(heads), dq, dk, dv,
                )  # fmt: skip
            del all_k, all_v
            if dq is not None:
                dqs.append(dq.to(q.dtype))
            if own_grads is not None:
                sent.append(_Scattered(call, own_grads))
        tiles.sink_gradient(sums, x, result, dout, dlse)
        dk = dv = None
        if sent:
            both = [each.own() for each in sent]
            whole = torch.cat(both, 2) if len(both) > 1 else both[0]
            dk, dv = parts_of(whole, needs, k.shape[3])
        dq = (torch.cat(dqs, 2) if len(dqs) > 1 else dqs[0]) if dqs else None
        return over_group(call, sums, dq, None if dk is None else dk.to(k.dtype), None if dv is None else dv.to(v.dtype))


def _heads_of(x: Tensor, heads: slice) -> Tensor:
    """Some heads of ``(B, rows, H, ·)`` or ``(B, H, rows)``."""
    at = 2 if x.dim() == 4 else 1
    return x if heads.stop - heads.start == x.shape[at] else x.narrow(at, heads.start, heads.stop - heads.start)


def _head_chunks(call: Call, q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
    """Query heads and their key heads."""
    count, group = k.shape[2], q.shape[2] // k.shape[2] if k.shape[2] else 1
    chunks = max(1, min(call.head_chunks, count))
    ends = [n * count // chunks for n in range(chunks + 1)]
    return [(slice(a * group, b * group), slice(a, b)) for a, b in itertools.pairwise(ends)]


class _Gathered(NamedTuple):
    call: Call
    moving: Tensor
    width: int

    def whole(self) -> tuple[Tensor, Tensor]:
        """All keys and values ``(B, N, heads, ·)`` in their natural order."""
        call = self.call
        if call.group.size == 1:
            return apart(self.moving, self.width)
        parts = wait(self.moving, call.group).unflatten(0, (call.group.size, -1))
        return apart(arranged(parts, 1, call.group, call.order, call.problem.keys), self.width)


def _gather(call: Call, k: Tensor, v: Tensor, heads: slice) -> _Gathered:
    both = joined(_heads_of(k, heads), _heads_of(v, heads))
    if call.group.size == 1:
        return _Gathered(call, both, k.shape[3])
    most = max(shares(call.problem.keys, call.group.size, call.order))
    if most > both.shape[1]:
        both = torch.nn.functional.pad(both, (0, 0, 0, 0, 0, most - both.shape[1]))
    return _Gathered(call, all_gather(both, call.group), k.shape[3])


class _Scattered:
    """This rank's part of gradients ``(B, N, heads, ·)`` of all keys, summed over the group."""

    def __init__(self, call: Call, grads: Tensor) -> None:
        group, keys = call.group, call.problem.keys
        self.call, self.held = call, share(keys, group.size, group.rank, call.order)
        if group.size == 1:
            self.moving = grads
            return
        held = shares(keys, group.size, call.order)
        if grads.shape[0] == 1 and min(held) == max(held):  # no padding: one copy
            own = [grads[:, p.start : p.stop] for rank in range(group.size) for p in call.keys_of(rank)]
            stacked = torch.cat(own, 1).view(group.size, 1, held[0], *grads.shape[2:]) if own else grads.new_empty(group.size, *grads.shape)
        else:
            stacked = grads.new_empty(group.size, grads.shape[0], max(held), *grads.shape[2:])
            for rank in range(group.size):
                for p in call.keys_of(rank):
                    stacked[rank, :, p.at : p.at + p.stop - p.start] = grads[:, p.start : p.stop]
                if held[rank] < max(held):
                    stacked[rank, :, held[rank] :] = 0
        if call.in_order:
            self.moving = all_to_all(stacked, [1] * group.size, [1] * group.size, group)
        else:
            self.moving = reduce_scatter(stacked, group)

    def own(self) -> Tensor:
        if self.call.group.size == 1:
            return self.moving
        whole = wait(self.moving, self.call.group)
        return (added(whole) if self.call.in_order else whole[0])[:, : self.held]
