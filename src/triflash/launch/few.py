"""Arguments and launches of the kernel for few queries. Called by ``launch/triton.py``, and for KV caches; imports triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.triton import combine as combine_kernels
from ..kernels.triton import few as few_kernels
from ..kernels.triton.features import Features
from ..kernels.triton.few_keys import Cache
from ..plan import layout
from ..plan.configs import TileConfig, padded
from ..plan.kernels.few import FewConfig, least_blocks, least_cache_blocks
from ..plan.steps import Plan, Step, broadcast_rows, dbias_source
from ..spec import AttentionSpec, BiasSpec, Gradients, Operands, Saved
from ..spec_cache import FP8, CacheOperands, CacheSpec
from .calls import Call, address_of, bias_strides, slope_strides
from .common import is_wide, tile_constants
from .room import Room

__all__ = ["backward_call", "cache_calls", "combine_call", "forward_calls", "partial_sums", "row_strides", "sum_rows_call"]

_NO_CACHE = Cache()
MOST_PARTS = 32  # that a program adds at a time


def forward_calls(room: Room, plan: Plan, spec: AttentionSpec, x: Operands, f: Features, saved: Saved) -> list[Call]:
    """The launches of a forward pass on a dense batch."""
    step = plan.steps[0]
    config = step.config
    assert isinstance(config, FewConfig)
    q, k, v = x.q, x.k, x.v
    if step.splits > 1:
        parts = new_parts(room, step.splits, *saved.out.shape)
        out, lse, rest = parts
        out_strides, rest_strides = out.stride()[:4], rest.stride()[:3]  # type: ignore[union-attr]
        lse_strides = rest_strides
    else:
        out, lse, rest = saved
        out_strides, lse_strides = (0, *out.stride()[:3]), (0, *lse.stride()[:2])
        rest_strides = (0, 0, 0) if rest is None else (0, *rest.stride()[:2])
    tiles = -(-spec.queries * spec.groups // config.block_m)
    args = (
        *(q, k, v, f, _NO_CACHE, out, lse, rest, q.stride()[:3], k.stride()[:3], v.stride()[:3], out_strides, lse_strides, rest_strides),
        *(tiles, spec.heads, spec.groups, spec.batch_inner, spec.queries, spec.keys, spec.lo, spec.hi, spec.scale),
        *(step.splits, least_blocks(config)),
    )
    wide = is_wide((q, k, v, saved.out, x.bias, x.mask, x.second_bias))
    constants = few_constants(spec, config, wide, step.precision) | {"EVEN_N": spec.keys % config.block_n == 0}
    constants |= {"PAGE": 0, "PTX": step.ptx, "PDL": _combines_by_pdl(plan)}
    calls = [Call(few_kernels.few_forward, args, constants, config, step.programs)]
    if step.splits > 1:
        calls.append(combine_call(plan, parts, saved))
    return calls


def few_constants(spec: AttentionSpec | CacheSpec, config: FewConfig, wide: bool, precision: str) -> dict[str, Any]:
    """The compile-time constants that both passes have."""
    return tile_constants(spec.head_dim, spec.value_dim, config, wide, precision) | {"BN": config.block_n}


def new_parts(room: Room, splits: int, batch: int, queries: int, heads: int, value_dim: int) -> Saved:
    """Memory for out, lse and rest of each part, in float32."""
    out = room.new("partial outputs", (splits, batch, queries, heads, value_dim), torch.float32)
    lse, rest = (room.new(f"partial {name}", (splits, batch, heads, queries), torch.float32) for name in ("lse", "rest of lse"))
    return Saved(out, lse, rest)


def backward_call(
    room: Room, step: Step, spec: AttentionSpec, x: Operands, inputs: tuple[Any, ...], grads: Gradients, sums: dict[str, Tensor | None]
) -> Call:
    """The launch that fills dq, dk, dv and such gradients of a bias as fall out of the same pass: full ones, and of keys alone. Parts of
    these and of dq go to ``sums``. inputs: q, k, v, features, dout, lse, rest and delta.
    """
    assert isinstance(step.config, FewConfig)
    q, k, v, _, dout, lse, *_ = inputs
    dq, dk, dv = (grad if name in step.gives else None for name, grad in zip(("dq", "dk", "dv"), grads, strict=False))
    full: Tensor | None = None
    column: Tensor | None = None
    column_strides = None
    for name, grad, bias in (("dbias", grads.dbias, spec.bias), ("dsecond", grads.dsecond, spec.second)):
        if name in step.gives:
            assert grad is not None and bias is not None
            if dbias_source(spec, bias) == "dq":
                full = grad
            else:
                column = sums[name] = partial_sums(room, name, broadcast_rows(spec, bias), grad)
                column_strides = row_strides(spec, column)
    dq_strides: tuple[int, ...] | None = None
    parts = dq
    if dq is not None:
        dq_strides = (0, *dq.stride()[:3])
        if step.splits > 1:
            parts, (*others, split) = dq_parts(room, step.splits, dq)
            sums["dq"] = parts
            dq_strides = (split, *others)
    strides = [each.stride()[:3] for each in (q, k, v, dout)]
    args = (
        *(*inputs, parts, dk, dv, full, column, *strides, lse.stride()[:2], dq_strides),
        *(None if grad is None else grad.stride()[:3] for grad in (dk, dv)),
        *(bias_strides(full), column_strides, spec.heads, spec.groups, spec.batch_inner, spec.queries, spec.keys),
        *(spec.lo, spec.hi, spec.scale, step.splits),
    )
    constants = few_constants(spec, step.config, is_wide((q, k, v, dout, x.bias, x.mask, x.second_bias)), step.precision)
    constants = constants | {"EVEN_N": spec.keys % step.config.block_n == 0}
    return Call(few_kernels.few_backward, args, constants, step.config, step.programs)


def dq_parts(room: Room, splits: int, dq: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Memory for parts of dq, in float32, and its strides: (batch, row, head, part)."""
    parts = room.new("partial sums of dq", (splits, *dq.shape), torch.float32)
    part, batch, row, head, _ = parts.stride()
    return parts, (batch, row, head, part)


def sum_rows_call(step: Step, spec: AttentionSpec, parts: Tensor | None, dq: Tensor | None) -> Call:
    """Parts of dq, added up."""
    assert dq is not None and isinstance(step.config, TileConfig)
    args = (parts, dq, dq.stride()[:3], spec.heads, spec.queries, step.splits)
    constants = {"D": spec.head_dim, "BD": padded(spec.head_dim), "PARTS": _parts_at_a_time(step.splits)}
    return Call(combine_kernels.sum_rows, args, constants, step.config, step.programs)


def partial_sums(room: Room, name: str, splits: int, dbias: Tensor) -> Tensor:
    """Where a kernel writes the gradient of a bias: ``(splits, *dbias.shape)``, scratch if there are several parts, else dbias itself."""
    return dbias.unsqueeze(0) if splits == 1 else room.new(f"partial sums of {name}", (splits, *dbias.shape), torch.float32)


def row_strides(spec: AttentionSpec, parts: Tensor) -> tuple[int, int, int, int]:
    """Strides of ``parts (splits, B0|1, B1|1, H|1, 1, N)`` by (outer batch, inner batch, head, key): a broadcast dim counts parts."""
    strides, part = [0, 0, 0], parts.stride(0)
    for dim, size in ((2, spec.heads), (1, spec.batch_inner), (0, spec.batch_outer)):
        if parts.shape[1 + dim] == size:
            strides[dim] = parts.stride(1 + dim) if size > 1 else 0
        else:
            strides[dim] = part
            part *= size
    return strides[0], strides[1], strides[2], parts.stride(5) if parts.shape[5] > 1 else 0


def cache_calls(room: Room, plan: Plan, spec: CacheSpec, x: CacheOperands, out: Tensor, lse: Tensor) -> list[Call]:
    """The launches that fill out and lse with what queries see of a KV cache that holds the new keys already, on real tensors or meta
    tensors, in the shapes of :class:`~triflash.spec_cache.CacheOperands`. lse is contiguous along queries.
    """
    if 0 in out.shape[:-1]:
        return []
    q = x.q
    if layout.copies_rows(q.size(-1), q.stride(-1)):
        q = room.copied("q", q, room.new("q", q.shape, q.dtype), "its last dim is not contiguous")
    if layout.copies_rows(out.size(-1), out.stride(-1)):
        out = room.target("out", out.shape, out.dtype, out, "its last dim is not contiguous")
    if x.offsets_q is not None:  # one batch entry, of which requests own rows
        q, out, lse = q[None], out[None], lse[None]
    forward, combine = plan.step("few_forward"), plan.step("combine")
    splits = 1 if combine is None else combine.splits
    result = Saved(out, lse, None)
    parts = result if combine is None else new_parts(room, splits, *out.shape)
    calls = []
    if forward is not None:
        config = forward.config
        assert isinstance(config, FewConfig)
        out_strides: tuple[int, ...] = (0, *out.stride()[:3]) if combine is None else parts.out.stride()[:4]
        lse_strides = (0, *lse.stride()[:2]) if combine is None else parts.lse.stride()[:3]
        wide = is_wide((q, x.k_cache, x.v_cache, out)) or max(_last_strides(x.bias) + _last_strides(x.mask)) >= 2**22
        k, v = x.k_cache, x.v_cache
        if _reads_as_int16(k) and _reads_as_int16(v):
            k, v = k.view(torch.int16), v.view(torch.int16)
        args = (
            *(q, k, v, _cache_features(spec, x), _cache_of(spec, x), *parts),
            *(q.stride()[:3], k.stride()[:3], v.stride()[:3], out_strides, lse_strides),
            lse_strides if combine is not None else (0, 0, 0),
            *(-(-spec.queries * spec.groups // config.block_m), spec.heads, spec.groups, 1, q.shape[1], spec.capacity),
            *(None if spec.left is None else -spec.left, spec.right, spec.scale, splits, least_cache_blocks(spec, config)),
        )
        constants = few_constants(spec, config, wide, forward.precision)
        constants |= {"EVEN_N": False, "PAGE": spec.page_size or 0, "PTX": forward.ptx, "PDL": _combines_by_pdl(plan)}
        calls.append(Call(few_kernels.few_forward, args, constants, config, forward.programs))
    if combine is not None:
        calls.append(combine_call(plan, parts, result, x.offsets_q, spec.split_size is not None))
    return calls


def _reads_as_int16(cache: Tensor) -> bool:
    """Whether a cache is of e4m3 and its rows are whole int16 numbers, of which an MMA can take half the columns (16 at least)."""
    *strides, last = cache.stride()
    even = not any(n % 2 for n in (*strides, cache.shape[-1], address_of(cache), cache.storage_offset()))  # view() asks for the last
    return cache.dtype == FP8 and even and last == 1 and cache.shape[-1] > 16


def _last_strides(x: Tensor | None) -> tuple[int, ...]:
    return (0,) if x is None else x.stride()[2:]


def _number_stride(x: Tensor | None) -> int | None:
    """Between the numbers of two requests. Of a single one it is 1, so that no kernel is compiled for another."""
    return None if x is None else x.stride(0) if x.shape[0] > 1 else 1


def _cache_of(spec: CacheSpec, x: CacheOperands) -> Cache:
    scales = [None if own is None else tuple(0 if n == 1 else s for n, s in zip(own.shape, own.stride(), strict=True)) for own in x[-2:]]
    return Cache(
        lengths=x.cache_lengths,
        lengths_stride=_number_stride(x.cache_lengths),
        starts=x.key_starts,
        starts_stride=_number_stride(x.key_starts),
        table=x.page_table,
        table_strides=None if x.page_table is None else x.page_table.stride(),
        index=x.cache_index,
        index_stride=_number_stride(x.cache_index),
        offsets_q=x.offsets_q,
        offsets_q_stride=_number_stride(x.offsets_q),
        new=spec.new,
        offsets_new=x.offsets_new,
        offsets_new_stride=_number_stride(x.offsets_new),
        k_scale=x.k_scale,
        k_scale_strides=scales[0],
        v_scale=x.v_scale,
        v_scale_strides=scales[1],
        pages=x.k_cache.shape[0],
    )


def _cache_features(spec: CacheSpec, x: CacheOperands) -> Features:
    """What scores go through. Beyond what bias or mask have, nothing is visible; those of size 1 are shared by all."""
    extras = [own for own in (x.bias, x.mask) if own is not None]
    most_keys = min((own.shape[3] for own in extras if own.shape[3] != 1), default=None)
    most_queries = min((own.shape[2] for own in extras if own.shape[2] != 1), default=None) if spec.packed_queries else None
    return Features(
        bias=x.bias,
        bias_strides=_request_strides(x.bias, spec.bias),
        mask=None if x.mask is None else x.mask.view(torch.uint8),
        mask_strides=_request_strides(x.mask, spec.mask),
        most_queries=most_queries,
        most_keys=most_keys,
        slopes=x.alibi_slopes,
        slope_strides=slope_strides(x.alibi_slopes),
        sink=x.sink,
        sink_stride=None if x.sink is None else x.sink.stride(0),
        softcap=spec.softcap or None,
    )


def _request_strides(bias: Tensor | None, spec: BiasSpec | None) -> tuple[int | None, ...] | None:
    """Strides of a bias or mask (B|1, Hq|1, Mq|1, N|1) as ``Features`` has them."""
    strides = bias_strides(bias)
    if strides is None or spec is None:
        return None
    request, head, query, key = strides
    return request, 0, head, query if spec.varies[3] else None, key if spec.varies[4] else None


def combine_call(plan: Plan, parts: Saved, saved: Saved, offsets: Tensor | None = None, fixed: bool = False) -> Call:
    """Parts of every row, put together. fixed: a row's bits do not depend on how many parts others have."""
    step = plan.step("combine")
    assert step is not None
    out, lse, rest = saved
    args = (
        *(parts.out, parts.lse, parts.rest, out, lse, rest, offsets, _number_stride(offsets), out.stride()[:3], lse.stride()[:2]),
        *((0, 0) if rest is None else rest.stride()[:2], out.shape[2], out.shape[1], step.splits),
        0 if offsets is None else offsets.shape[0] - 1,
    )
    at_a_time = MOST_PARTS if fixed else _parts_at_a_time(step.splits)
    constants = {"DV": out.shape[3], "BDV": padded(out.shape[3]), "PARTS": at_a_time, "PDL": step.pdl}
    assert isinstance(step.config, TileConfig)
    return Call(combine_kernels.combine, args, constants, step.config, out.shape[0] * out.shape[1] * out.shape[2], step.pdl)


def _parts_at_a_time(splits: int) -> int:
    """A power of two: a tile of 32 parts of which most are masked took up to a third of a call's time beside many rows."""
    return min(MOST_PARTS, 1 << max(1, (splits - 1).bit_length()))


def _combines_by_pdl(plan: Plan) -> bool:
    """Whether ``combine`` follows, by a programmatic dependent launch."""
    step = plan.step("combine")
    return step is not None and step.pdl
