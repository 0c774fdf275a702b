"""A call on a KV cache, carried out: new keys are written first, then queries attend. Called by ``bound/cached.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import oracle_cache, tiled_cache
from ..plan.steps import IN_PYTORCH, Plan
from ..slots import Keys, append, extents, keys_of
from ..spec_cache import CacheOperands, CacheSpec
from .calls import Call, start
from .room import Real, Room

__all__ = ["append_new", "cache_calls", "run_cache"]


def cache_calls(
    room: Room,
    plan: Plan,
    spec: CacheSpec,
    x: CacheOperands,
    new: tuple[Tensor | None, Tensor | None],
    results: tuple[Tensor, Tensor] | None,
) -> list[Call]:
    """The launches of a plan by kernels, on real tensors or meta tensors. new: keys and values to write. results: out and lse; None: nobody
    attends.
    """
    k_new, v_new = new
    calls: list[Call] = []
    if plan.step("append") is not None and k_new is not None and v_new is not None:
        from .append import append_calls

        calls += append_calls(spec, x, k_new, v_new)
    if results is not None:
        from .few import cache_calls as attend_calls

        calls += attend_calls(room, plan, spec, x, *results)
    return calls


def append_new(plan: Plan, spec: CacheSpec, x: CacheOperands, k_new: Tensor, v_new: Tensor) -> None:
    """Write new keys and values behind those in the cache."""
    if plan.backend in IN_PYTORCH:
        given = (x.k_cache, x.v_cache, k_new, v_new, x.cache_lengths, x.page_table, x.cache_index, x.offsets_new, x.k_scale, x.v_scale)
        append(*given)
    else:
        start(x.q.device, cache_calls(Real(x.q), plan, spec, x, (k_new, v_new), None))


def run_cache(plan: Plan, spec: CacheSpec, x: CacheOperands, out: Tensor, lse: Tensor) -> None:
    """Fill out and lse, in the shapes of :class:`CacheOperands`: ``(B, Mq, Hq, Dv)`` and ``(B, Hq, Mq)``, or ``(Tq, Hq, Dv)`` and
    ``(Hq, Tq)``. New keys are there already. Packed queries: the offsets are read.
    """
    if plan.backend not in IN_PYTORCH:
        room = Real(x.q)
        start(x.q.device, cache_calls(room, plan, spec, x, (None, None), (out, lse)))
        room.finish()
        return
    new: Tensor | int = spec.new or 0
    if x.offsets_new is not None:
        new = extents(x.offsets_new, spec.new or 0)[1]
    used = keys_of(x.cache_lengths, new, spec.capacity, spec.requests, x.q.device)
    keys = Keys(x.k_cache, x.v_cache, used, x.key_starts, x.page_table, x.cache_index, x.k_scale, x.v_scale)
    with torch.autocast(x.q.device.type, enabled=False), torch.no_grad():
        if x.offsets_q is None:
            _run(plan, spec, x, keys, x.q, out, lse, None)
            return
        out.zero_()
        lse.fill_(-torch.inf)
        starts, counts = extents(x.offsets_q, x.q.shape[0])
        for b, (first, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
            if count:
                rows = slice(first, first + count)
                _run(plan, spec, x, keys.of(b), x.q[None, rows], out[None, rows], lse[None, :, rows], b)


def _run(plan: Plan, spec: CacheSpec, x: CacheOperands, keys: Keys, q: Tensor, out: Tensor, lse: Tensor, request: int | None) -> None:
    scores = (x.bias, x.mask, x.alibi_slopes, x.sink)
    band = {"capacity": spec.capacity, "left": spec.left, "right": spec.right}
    options = {**band, "scale": spec.scale, "softcap": spec.softcap, "request": request}
    if plan.backend == "tiled":
        tiled_cache.forward(q, keys, *scores, out=out, lse=lse, **options)  # type: ignore[arg-type]
    else:
        exact, exact_lse = oracle_cache.attention(q, keys, *scores, **options)  # type: ignore[arg-type]
        out.copy_(exact)
        lse.copy_(exact_lse)
