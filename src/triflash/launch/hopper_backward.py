"""Arguments and launches of the backward kernels for Hopper. Called by ``launch/__init__.py`` when a plan needs it: it imports triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..dropout import rescale
from ..kernels.hopper import dkdv as dkdv_kernels
from ..kernels.hopper import dkdv_d256 as d256_kernels
from ..kernels.hopper import postprocess, preprocess
from ..kernels.hopper.compat import TensorDescriptor
from ..kernels.triton.features import Features
from ..plan import layout
from ..plan.configs import padded
from ..plan.hopper import flags_small_lse
from ..plan.kernels import rowwise
from ..plan.kernels.dbias import DbiasConfig
from ..plan.kernels.dkdv import DkdvConfig, dims, key_tiles, l2_order, sums_by_mma
from ..plan.kernels.dq import DqConfig
from ..plan.kernels.loops import reads_small_lse
from ..plan.kernels.shared import multiplied_columns, row_by_mma, stats_kinds, stats_length
from ..plan.steps import Plan, Step
from ..spec import AttentionSpec, BiasSpec, Gradients, Operands, Saved
from . import hopper_packed
from .calls import Call, alibi_of, bias_strides, cap_of, dropout_of, lengths_of, slope_strides
from .common import bias_given, is_wide
from .hopper import batch_of, blocks_of, descriptor, in_order, is_even, of_rows, ready, ready_operands, written
from .hopper_dbias import dbias_call as hopper_dbias_call
from .hopper_dq import dq_call
from .hopper_packed import AROUND, Around, Tables
from .mask_bounds import Bounds, bounds_call, bounds_of, new_bounds, skips
from .packed import PackedTables, cleared_call, extents_call, tiles_call
from .packed import dbias_call as packed_dbias_call
from .packed import tables as packed_tables
from .portable import dbias_sum_call, delta_call
from .room import Room
from .triton import contiguous, features_of, partial_sums, row_strides, rows

__all__ = [
    "backward",
    "backward_calls",
    "postprocess_call",
    "dkdv_call",
    "new_dq_sum",
    "new_head_parts",
    "new_stats",
    "preprocess_call",
    "targets",
]

HeadParts = tuple[Tensor | None, Tensor | None]  # partial sums of dk and dv

DELTA = 1  # row of the table of statistics: see kernels/hopper/scores_kq.py


def backward(
    room: Room, plan: Plan, spec: AttentionSpec, x: Operands, saved: Saved, dout: Tensor, dlse: Tensor | None, grads: Gradients
) -> list[Call]:
    """The launches that fill those of dq, dk, dv, dbias, dsink, dsecond that are given, of any strides."""
    out, lse, rest = saved
    rest = rest if rest is None or rest.is_contiguous() else contiguous(room, "rest", rest, "it is not contiguous")
    saved = Saved(rows(room, "out", out), lse, rest)
    written = targets(room, plan, grads)
    stats = new_stats(room, spec, rest is not None)
    delta = room.new("delta", saved.lse.shape, torch.float32) if plan.step("delta") is not None else None
    calls = backward_calls(room, plan, spec, ready_operands(room, spec, x), saved, ready(room, "dout", dout), dlse, stats, written, delta)
    if grads.dsink is not None and x.sink is not None and spec.packed is None:
        delta = stats[:, DELTA, : spec.queries].unflatten(0, (spec.batch, spec.heads))
        room.sum_sink(grads.dsink, x.sink, saved, delta, rescale(spec.dropout))
    elif grads.dsink is not None and x.sink is not None:
        assert delta is not None
        room.sum_sink(grads.dsink, x.sink, saved, delta, 1.0)
    return calls


def targets(room: Room, plan: Plan, grads: Gradients) -> Gradients:
    """Where kernels write the gradients: what TMA can write, and contiguous ones of biases; the rest is filled by way of these, copied."""
    dq, dk, dv = (None if grad is None else written(room, name, grad) for name, grad in zip(("dq", "dk", "dv"), grads, strict=False))
    biases = {"dbias": grads.dbias, "dsecond": grads.dsecond}
    for name, grad in biases.items():
        if grad is not None and any(step.kernel == "dq" and name in step.gives for step in plan.steps):
            biases[name] = written(room, name, grad)
        elif grad is not None and not grad.is_contiguous():
            biases[name] = room.target(name, grad.shape, grad.dtype, grad, "it is not contiguous")
    return Gradients(dq, dk, dv, biases["dbias"], grads.dsink, biases["dsecond"])


def backward_calls(
    room: Room,
    plan: Plan,
    spec: AttentionSpec,
    x: Operands,
    saved: Saved,
    dout: Tensor,
    dlse: Tensor | None,
    stats: Tensor,
    grads: Gradients,
    delta: Tensor | None = None,
) -> list[Call]:
    """The launches of a backward pass, of which the first fills ``stats`` (:func:`new_stats`). All tensors are addressable. delta: room for
    it by row, where packed sequences have a sink or a bias.
    """
    spec, given = in_order(spec, x)
    t = hopper_packed.tables(room, plan, spec, given)
    dq_sum = new_dq_sum(room, spec) if plan.step("postprocess") else None
    kept = stats.shape[1] == 3 or any(step.loops != "both" for step in plan.steps)
    looking = kept and flags_small_lse(spec, plan.steps)
    small_lse = room.new("whether lse is small", (preprocess.FLAGS.value,), torch.int32) if looking else None
    as_read = hopper_packed.as_spread(t, given)
    p = _Pass(room, plan, spec, given, as_read, saved, dout, dlse, delta, grads, stats, small_lse, dq_sum, t, new_bounds(room, plan, spec))
    return [_BACKWARD[step.kernel](step, p) for step in plan.steps]


@dataclass
class _Pass:
    """What the launches of a backward pass share.

    given, x: the operands as they come and as the kernels for Hopper read them. t: the tables of packed sequences; whole: those of the
    kernel for the gradient of their bias, once it is its turn. bounds: the tables of what a mask shows. head_parts, sums, unasked_dq: where
    gradients come in parts, those of biases by name, and dq where nobody asked for it; a kernel that is launched twice has them from its
    first launch.
    """

    room: Room
    plan: Plan
    spec: AttentionSpec
    given: Operands
    x: Operands
    saved: Saved
    dout: Tensor
    dlse: Tensor | None
    delta: Tensor | None
    grads: Gradients
    stats: Tensor
    small_lse: Tensor | None
    dq_sum: Tensor | None
    t: Tables | None
    bounds: Bounds
    whole: PackedTables | None = None
    unasked_dq: Tensor | None = None
    head_parts: HeadParts = (None, None)
    sums: dict[str, Tensor | None] = field(default_factory=dict)


def _around(step: Step, p: _Pass) -> Call:
    assert p.t is not None
    return AROUND[step.kernel](step, Around(p.spec, p.given, p.t, p.grads._asdict()))


def _extents(step: Step, p: _Pass) -> Call:
    if step.gives != ("dbias",):
        return _around(step, p)
    p.whole = packed_tables(p.room, p.plan.steps[p.plan.steps.index(step) :], p.spec)
    return extents_call(step, p.spec, p.given, p.whole.extents, p.whole.first)


def _tiles(step: Step, p: _Pass) -> Call:
    assert p.whole is not None
    return tiles_call(step, p.spec, p.whole)


def _packed_dbias(step: Step, p: _Pass) -> Call:
    assert p.whole is not None
    q, k, v, *_ = p.x
    inputs = (q, k, v, features_of(p.spec, p.given), p.dout, p.saved.lse, p.saved.rest, p.delta)
    offsets_of_64_bits = is_wide((q, k, v, p.dout, p.given.bias, p.given.mask))
    return packed_dbias_call(p.room, step, p.spec, p.whole, inputs, p.grads, p.sums, offsets_of_64_bits)


def _preprocess(step: Step, p: _Pass) -> Call:
    out, lse, rest = p.saved
    return preprocess_call(p.spec, step, out, p.dout, p.dlse, lse, rest, p.stats, p.small_lse, p.dq_sum, p.t)


def _dkdv(step: Step, p: _Pass) -> Call:
    parts = _sums(step, p)
    strides = row_strides(p.spec, parts) if parts is not None else None
    if _is_first(step):
        p.head_parts = new_head_parts(p.room, p.spec, step)
    assert isinstance(step.config, DkdvConfig)
    dq = p.grads.dq if step.config.dq_blocks else p.dq_sum
    results = (*_dk_and_dv(step, p), p.head_parts, dq, parts, strides)
    return dkdv_call(p.spec, step, p.x, p.dout, p.stats, p.small_lse, *results, p.t, p.bounds)


def _is_first(step: Step) -> bool:
    """Whether it is the first or the only launch of its kernel."""
    return step.loops != "any"


def _sums(step: Step, p: _Pass) -> Tensor | None:
    """Room for the partial sums of the gradient of a bias that the step gives."""
    name, target = bias_given(step, p.grads)
    if _is_first(step):
        p.sums[name] = partial_sums(p.room, step, target)
    return p.sums[name]


def _dk_and_dv(step: Step, p: _Pass) -> tuple[Tensor | None, Tensor | None]:
    """Those that the step gives."""
    return p.grads.dk if "dk" in step.gives else None, p.grads.dv if "dv" in step.gives else None


def _dq(step: Step, p: _Pass) -> Call:
    assert isinstance(step.config, DqConfig)
    q, k, v, bias, *_ = p.x
    dq = p.grads.dq
    if dq is None:  # it is the kernel's own result, and dbias beside it what was asked for
        if _is_first(step):
            shape = layout.tma_padded(q.shape, q.element_size())
            p.unasked_dq = p.room.new("dq, which nobody asked for", shape, q.dtype)[..., : q.shape[-1]]
        dq = p.unasked_dq
    assert dq is not None
    _, dbias = bias_given(step, p.grads)
    small_lse = p.small_lse if reads_small_lse(p.spec, step) else None
    features = (p.x.key_lengths, p.x.alibi_slopes, p.x.mask, p.x.dropout_seed, small_lse, p.x.second_bias)
    tables = (bounds_of(p.bounds, "queries"), skips(p.bounds, "queries"))
    how = (step.forward_keys, hopper_packed.tiles_of(p.t, p.spec, "queries"), step.loops, *tables)
    return dq_call(p.spec, step.config, step.programs, q, k, v, bias, p.dout, p.stats, dq, dbias, *features, *how)


def _postprocess(step: Step, p: _Pass) -> Call:
    assert p.dq_sum is not None and p.grads.dq is not None
    return postprocess_call(p.spec, step, p.dq_sum, p.grads.dq, adds_by_red(p.plan), p.t)


def _dbias(step: Step, p: _Pass) -> Call:
    parts = _sums(step, p)
    q, k, v, bias, *_ = p.x
    assert isinstance(step.config, DbiasConfig) and bias is not None and parts is not None
    features = (p.x.key_lengths, p.x.alibi_slopes, p.x.mask, p.x.dropout_seed, p.small_lse, p.x.second_bias)
    inputs = (q, k, v, bias, p.dout, p.stats, parts)
    packed = hopper_packed.sequences_of(p.t, p.spec, p.stats)
    return hopper_dbias_call(p.spec, step.config, step.programs, step.splits, *inputs, *features, step.loops, packed)


# How a backward pass launches each kernel of its plan.
_BACKWARD: dict[str, Callable[[Step, _Pass], Call]] = {
    **dict.fromkeys(AROUND, _around),
    "extents": _extents,
    "tiles": _tiles,
    "delta": lambda step, p: delta_call(step, p.spec, p.saved.out, p.dout, p.dlse, p.delta, Features(), True),
    "mask_bounds": lambda step, p: bounds_call(step, p.spec, p.x, p.bounds),
    "preprocess": _preprocess,
    "dqdkdv": _dkdv,
    "dkdv": _dkdv,
    "dkdv_sum": lambda step, p: dkdv_sum_call(p.spec, step, p.head_parts, *_dk_and_dv(step, p)),
    "dq": _dq,
    "postprocess": _postprocess,
    "cleared": lambda step, p: cleared_call(step, p.grads),
    "packed_dbias": _packed_dbias,
    "dbias": _dbias,
    "dbias_sum": lambda step, p: dbias_sum_call(step, p.grads, p.sums),
}


def new_stats(room: Room, spec: AttentionSpec, rest: bool) -> Tensor:
    """Room for the table of statistics, (batch and head, lse | delta | rest, query). The seed's backward function is given no rest."""
    kinds = stats_kinds(spec) if rest else 2
    return room.new("lse and delta for TMA", (spec.batch * spec.heads, kinds, stats_length(spec)), torch.float32)


def new_dq_sum(room: Room, spec: AttentionSpec) -> Tensor:
    """Room for the float32 sum of dq, (batch, head, query, dim): whole blocks of queries, whole groups of 8 columns."""
    length = stats_length(spec) if spec.packed is not None else -(-spec.queries // rowwise.CONFIG.block_m) * rowwise.CONFIG.block_m
    return room.new("float32 sum of dq", (spec.batch, spec.heads, length, -(-spec.head_dim // 8) * 8), torch.float32)


def preprocess_call(
    spec: AttentionSpec,
    step: Step,
    out: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    lse: Tensor,
    rest: Tensor | None,
    stats: Tensor,
    small_lse: Tensor | None,
    dq_sum: Tensor | None,
    t: Tables | None = None,
) -> Call:
    """Fills stats and small_lse, and dq_sum with zeros."""
    entries, parts = _parts_of(t)
    args = (
        *(out, dout, dlse, lse, rest if stats.shape[1] == 3 else None, stats, small_lse, dq_sum, entries),
        *(out.stride()[:3], dout.stride()[:3], None if dlse is None else dlse.stride(), lse.stride()),
        *(spec.heads, spec.queries, stats.shape[2], 1 / rescale(spec.dropout)),
    )
    row = 8 if dq_sum is None else dq_sum.shape[3]
    constants = {
        "BM": rowwise.CONFIG.block_m,
        "DV": spec.value_dim,
        "BDV": padded(spec.value_dim),
        "ROW": row,
        "BROW": padded(row),
        "KINDS": stats.shape[1],
        "WIDE": True,
        "PARTS": parts,
    }
    return Call(preprocess.preprocess, args, constants, rowwise.CONFIG, step.programs)


def _parts_of(t: Tables | None) -> tuple[Tensor | None, int]:
    """The table of tiles of packed queries, and of how many parts of rowwise.CONFIG a tile is."""
    if t is None:
        return None, 1
    return t.of["queries"].table, _queries_of_a_tile(t) // rowwise.CONFIG.block_m


def _queries_of_a_tile(t: Tables | None) -> int:
    """In the table of tiles of packed queries; of others a part."""
    return rowwise.CONFIG.block_m if t is None else t.of["queries"].rows


def new_head_parts(room: Room, spec: AttentionSpec, step: Step) -> HeadParts:
    """Room for float32 partial sums of dk and dv, (batch and part of a key head, whole tiles of keys, padded dim); None: not wanted."""
    assert isinstance(step.config, DkdvConfig)
    if step.config.head_splits == 1:
        return None, None
    tiles_n, tiles = key_tiles(spec, step.config)
    sizes = [(tiles // tiles_n, tiles_n * step.config.block_n, columns) for columns in dims(spec)]
    dk, dv = (
        room.new(f"partial sums of {name}", size, torch.float32) if name in step.gives else None
        for name, size in zip(("dk", "dv"), sizes, strict=True)
    )
    return dk, dv


def dkdv_sum_call(spec: AttentionSpec, step: Step, parts: HeadParts, dk: Tensor | None, dv: Tensor | None) -> Call:
    """dk and dv from their partial sums."""
    length = next(part.shape[1] for part in parts if part is not None)
    strides = (None if grad is None else grad.stride()[:3] for grad in (dk, dv))
    args = (*parts, dk, dv, *strides, spec.kv_heads, spec.keys, length, step.splits)
    head, value = dims(spec)
    constants = {"BM": rowwise.CONFIG.block_m, "D": spec.head_dim, "DV": spec.value_dim, "BD": head, "BDV": value, "WIDE": True}
    return Call(postprocess.dkdv_sum, args, constants, rowwise.CONFIG, step.programs)


def adds_by_red(plan: Plan) -> bool:
    """Whether dq is added to its sum straight from registers, which lays it out otherwise."""
    step = plan.step("dqdkdv")
    return step is not None and isinstance(step.config, DkdvConfig) and step.config.red_dq


def postprocess_call(spec: AttentionSpec, step: Step, dq_sum: Tensor, dq: Tensor, red_dq: bool, t: Tables | None = None) -> Call:
    """dq from its float32 sum; red_dq: as :func:`adds_by_red` says."""
    entries, parts = _parts_of(t)
    args = (dq_sum, dq, entries, dq.stride()[:3], spec.heads, spec.queries, spec.scale * rescale(spec.dropout), dq_sum.shape[2])
    dims = {"D": spec.head_dim, "BD": padded(spec.head_dim), "ROW": dq_sum.shape[3]}
    constants = {"BM": rowwise.CONFIG.block_m, **dims, "RED_DQ": red_dq, "WIDE": True, "PARTS": parts}
    return Call(postprocess.postprocess, args, constants, rowwise.CONFIG, step.programs)


def dkdv_call(
    spec: AttentionSpec,
    step: Step,
    x: Operands,
    dout: Tensor,
    stats: Tensor,
    small_lse: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    head_parts: HeadParts,
    dq: Tensor | None,
    dbias: Tensor | None,
    dbias_strides: tuple[int, int, int, int] | None,
    t: Tables | None = None,
    bounds: Bounds | None = None,
) -> Call:
    """dk, dv (or if there are any, their partial sums), dq or its float32 sum, and the gradient of a bias that varies over keys alone: what
    is None is not computed. bounds: of what a mask shows.
    """
    q, k, v, bias, mask, lengths, slopes, *_ = x
    config = step.config
    assert isinstance(config, DkdvConfig)
    splits = config.head_splits
    head, value = dims(spec, config.own_widths)
    heads, values = config.widths(spec.head_dim, head), config.widths(spec.value_dim, value)
    half, rows = 64, config.block_m  # keys of a buffer, queries of a block
    blocks = ((q, rows, heads), (k, half, heads), (v, half, values), (dout, rows, values))
    given = tuple(None if x is None or splits > 1 else x for x in (dk, dv))
    gradients = ((given[0], half, heads), (given[1], half, values))
    bias_desc, bias_on, key_bias = _bias_by_keys(spec.bias, bias, (rows, half))
    mask_desc, mask_on, key_mask = _bias_by_keys(spec.mask, mask, (rows, half))
    pointer = x.second_bias if key_bias is None else key_bias
    sums: tuple[Any, ...] = () if config.d256 else (None, None)
    if dq is not None:
        assert not config.d256
        if config.dq_blocks:
            sums = (of_rows(spec, dq, rows, heads[0]), None)
        else:
            sums = (None, dq) if config.red_dq else (descriptor(dq, (1, 1, rows, head // 2)), None)
    packed = hopper_packed.tiles_of(t, spec, "keys")
    schedule = (0, 0, 0, 0) if packed is not None else (*key_tiles(spec, config), *l2_order(spec, config, step.programs))
    args: tuple[Any, ...] = (
        *[of_rows(spec, x, rows, columns[0]) for x, rows, columns in blocks],
        descriptor(stats, (1, 1, rows)),
        small_lse if reads_small_lse(spec, step) else None,
        bias_desc,
        *[None if x is None else of_rows(spec, x, rows, columns[0]) for x, rows, columns in gradients],
        *(() if config.d256 else head_parts),
        *sums,
        *(
            pointer,
            lengths_of(lengths),
            packed,
            bounds_of(bounds, "keys"),
            slopes,
            dbias,
            bias_strides(pointer),
            dbias_strides,
            slope_strides(slopes),
            bias_on,
            cap_of(spec),
            dropout_of(spec, x.dropout_seed),
            mask_desc,
            key_mask,
            bias_strides(key_mask),
            mask_on,
        ),
        *(_tails(spec, (*blocks, *gradients)) if config.d256 else ()),
        *(batch_of(spec), spec.heads, spec.groups),
        *(() if config.d256 else (splits if splits > 1 else None,)),
        *(spec.batch_inner, spec.queries, spec.keys, spec.lo, spec.hi, spec.scale),
        *schedule,
    )
    constants: dict[str, Any] = {
        "C": config if splits == 1 else replace(config, head_splits=1),
        "HAS_REST": stats.shape[1] == 3 and step.loops != "small",  # which does not read it
        "IS_MASK": spec.bias is not None and spec.bias.is_mask,
        "EVEN_N": is_even(spec, config.block_n),
        "ALIBI": alibi_of(spec, step.forward_keys),
        "BATCH_FASTEST": step.order == "batch",
        "LONGEST": "first" if spec.hi is not None else "none" if spec.lo is None else "last",
        "LOOPS": step.loops,
        "QK": multiplied_columns(spec.head_dim, head),
        "OV": multiplied_columns(spec.value_dim, value),
        "SKIPS": skips(bounds, "keys"),
    }
    if config.d256:
        return Call(d256_kernels.dkdv_d256, args, constants, config, step.programs)
    constants |= {"ROW_BY_MMA": row_by_mma(spec), "SUM_BY_MMA": sums_by_mma(spec) and dbias is not None}
    constants["ROW"] = dq.shape[3] if dq is not None and config.red_dq else 0
    return Call(dkdv_kernels.dkdv, args, constants, config, step.programs)


def _tails(spec: AttentionSpec, blocks: Sequence[tuple[Tensor | None, int, tuple[int, ...]]]) -> tuple[TensorDescriptor | None, ...]:
    """Of blocks in two buffers, descriptors of what is in the second."""
    return tuple(None if x is None or len(columns) == 1 else of_rows(spec, x, rows, columns[1]) for x, rows, columns in blocks)


def _bias_by_keys(
    spec: BiasSpec | None, bias: Tensor | None, block: tuple[int, int]
) -> tuple[TensorDescriptor | None, tuple[int, ...] | None, Tensor | None]:
    """How kernels that own keys get a bias or a mask: as :func:`~.hopper.blocks_of`, or one over keys alone as a pointer."""
    if bias is None:
        return None, None, None
    assert spec is not None and spec.varies[4]
    if spec.varies[3]:
        return *blocks_of(bias, block), None
    return None, None, bias.view(torch.uint8) if bias.dtype == torch.bool else bias
