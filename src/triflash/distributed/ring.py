"""Ring: keys and values go from rank to rank, and partial results are merged in float32 as they come (Liu et al. 2023).

Zigzag shares, as in Megatron-LM and ring-flash-attention, give every rank as many visible pairs in every step of a causal problem. In the
backward pass the gradients of keys and values travel behind them, in float32, and end where they belong. Called by ``attention.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..errors import unsupported
from . import tiles
from .call import Call, Gradients, Saved, apart, joined, over_group, parts_of
from .chunks import share
from .group import all_there, shift, wait
from .merging import Merged, Result, wide
from .tiles import Extras, Sums

__all__ = ["Ring"]


class Ring:
    """Memory beyond a rank's own rows: two more shares of keys and values, and the float32 sums."""

    @staticmethod
    def forward(call: Call, q: Tensor, k: Tensor, v: Tensor, x: Extras) -> tuple[Result, Saved]:
        _refuse_oracle(call)
        problem, size = call.problem, call.group.size
        merged = Merged(q, v.shape[3])
        both = joined(k, v)
        for step in range(size):
            source = (call.group.rank - step) % size
            coming = _sent(call, both, source) if step + 1 < size else None
            all_k, all_v = apart(both, k.shape[3])
            with call.at_work(coming is not None):
                tiles.forward(problem, call.tiles(x, source), call.rows, q, all_k, all_v, x, merged)
            if coming is not None:
                both = _received(call, coming, both, source)
        tiles.sunk(merged, x, call.rows)
        result = merged.result(tiles.keeps(problem, x))
        all_there(call.group, q)
        return result, Saved(q, k, v, x, result)

    @staticmethod
    def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None, needs: Sequence[bool]) -> Gradients:
        q, k, v, x, result = saved
        problem, size = call.problem, call.group.size
        sums = Sums(x, needs, heads_whole=True)
        dq = q.new_empty(q.shape, dtype=wide(q.dtype)) if needs[0] else None
        both, width = joined(k, v), k.shape[3]
        wanted = [w for w, need in ((k.shape[3], needs[1]), (v.shape[3], needs[2])) if need]
        grads: Tensor | None = None  # of the keys at hand, by the ranks that they have seen
        moving: Tensor | None = None
        for step in range(size):
            source = (call.group.rank - step) % size
            coming = _sent(call, both, source) if step + 1 < size else None
            all_k, all_v = apart(both, width)
            own = both.new_empty((*both.shape[:3], sum(wanted)), dtype=wide(q.dtype)) if wanted else None
            dk, dv = parts_of(own, needs, width)
            with call.at_work(coming is not None or moving is not None):
                todo = call.tiles(x, source)
                tiles.backward(problem, todo, q, all_k, all_v, x, result, dout, dlse, sums, dq, dk, dv, more_rows=step > 0)
            if own is not None:
                if moving is not None:
                    own += wait(moving, call.group).view(own.shape)
                moving = shift(own, _numbers(call, own, source - 1), call.group) if size > 1 else None
                grads = own
            if coming is not None:
                both = _received(call, coming, both, source)
        if moving is not None and grads is not None:
            grads = wait(moving, call.group).view(*k.shape[:3], sum(wanted))
        dk, dv = parts_of(grads, needs, width)
        all_there(call.group, q)
        tiles.sink_gradient(sums, x, result, dout, dlse)
        dq, dk, dv = (None if y is None else y.to(q.dtype) for y in (dq, dk, dv))
        return over_group(call, sums, dq, dk, dv)


def _refuse_oracle(call: Call) -> None:
    if call.problem.backend == "oracle":
        raise unsupported(
            "method='ring', whose backward pass needs an lse from outside", "oracle", "method='allgather' does it, and so does 'tiled'"
        )


def _numbers(call: Call, like: Tensor, source: int) -> int:
    """How many numbers a rank's share of such keys has."""
    held = share(call.problem.keys, call.group.size, source % call.group.size, call.order)
    return like.shape[0] * held * like.shape[2] * like.shape[3]


def _sent(call: Call, both: Tensor, source: int) -> Tensor:
    """Send on the keys at hand, which are ``source``'s; those of the rank before are coming."""
    return shift(both, _numbers(call, both, source - 1), call.group)


def _received(call: Call, coming: Tensor, both: Tensor, source: int) -> Tensor:
    rows = share(call.problem.keys, call.group.size, (source - 1) % call.group.size, call.order)
    return wait(coming, call.group).view(both.shape[0], rows, *both.shape[2:])
