"""Arguments and launches of the portable Triton kernels for packed sequences. Called by ``launch/triton.py``; imports triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.triton import packed as packed_kernels
from ..kernels.triton.features import Features
from ..plan.configs import padded
from ..plan.kernels.packed import ROWS_A_PROGRAM, most_tiles
from ..plan.kernels.parts import SUM_BLOCK
from ..plan.steps import Plan, Step
from ..spec import AttentionSpec, Gradients, Operands, Saved
from .calls import Call, bias_strides
from .common import bias_given, config_of, constants_of, is_wide
from .portable import BackwardPass, Rows, dbias_sum_call, delta_call, dkdv_call, dq_call, forward_call, input_strides
from .room import Room

__all__ = [
    "PackedTables", "backward_calls", "cleared_call", "dbias_call", "extents_call", "forward_calls", "in_line", "packed_features",
    "row_and_head", "sink_of", "tables", "tiles_call", "unowned_call",
]  # fmt: skip

SEQUENCES = 1024  # of one step of the kernel that tells their extents


class PackedTables(NamedTuple):
    """What the device works out first. extents: (sequences, 4); first_q, first_k: (sequences + 1,), the first tile of each; tiles_q,
    tiles_k: (most tiles, 2). None: not wanted.
    """

    extents: Tensor
    first_q: Tensor | None
    first_k: Tensor | None
    tiles_q: Tensor | None
    tiles_k: Tensor | None
    bound_q: int
    bound_k: int

    @property
    def first(self) -> tuple[Tensor | None, Tensor | None]:
        """The first tiles of queries and of keys."""
        return self.first_q, self.first_k


def _sequences(spec: AttentionSpec) -> int:
    assert spec.packed is not None
    return spec.packed.sequences


def tables(room: Room, steps: Sequence[Step], spec: AttentionSpec) -> PackedTables:
    """Room for the tables that these steps of a plan make, the first of which is ``extents``."""
    count = _sequences(spec)
    wanted = {step.gives for step in steps if step.kernel == "tiles"}
    config = config_of(steps[0])
    bound_q, bound_k = most_tiles(spec.queries, count, config.block_m), most_tiles(spec.keys, count, config.block_n)

    def new(name: str, *shape: int) -> Tensor:
        return room.new(name, shape, torch.int32)

    first, tiles = [], []
    for name, bound in (("queries", bound_q), ("keys", bound_k)):
        there = (f"tiles of {name}",) in wanted
        first.append(new(f"first tiles of {name}", count + 1) if there else None)
        tiles.append(new(f"tiles of {name}", max(bound, 1), 2) if there else None)
    extents = new("extents of sequences", max(count, 1), 4)
    return PackedTables(extents, first[0], first[1], tiles[0], tiles[1], bound_q, bound_k)


def in_line(room: Room, x: Operands) -> Operands:
    """The operands with offsets and used lengths one behind the other, as ``extents`` reads them: copies of those that lie otherwise."""
    if x.offsets_q is None:
        return x
    given = {"offsets_q": "cu_seqlens_q", "offsets_k": "cu_seqlens_k", "used_q": "seqused_q", "used_k": "seqused_k"}
    copies = {}
    for field, name in given.items():
        numbers = getattr(x, field)
        if numbers is not None and not numbers.is_contiguous():
            target = room.new(name, numbers.shape, numbers.dtype)
            copies[field] = room.copied(name, numbers, target, "its numbers do not lie one behind the other")
    return x._replace(**copies) if copies else x


def tiles_call(step: Step, spec: AttentionSpec, t: PackedTables) -> Call:
    """A launch that fills the table of tiles of queries or of keys."""
    count = _sequences(spec)
    of_queries = step.gives == ("tiles of queries",)
    first, tiles, bound = (t.first_q, t.tiles_q, t.bound_q) if of_queries else (t.first_k, t.tiles_k, t.bound_k)
    args = (first, tiles, count, bound, count.bit_length())
    return Call(packed_kernels.tiles, args, {"BLOCK": ROWS_A_PROGRAM}, config_of(step), step.programs)


def extents_call(
    step: Step, spec: AttentionSpec, x: Operands, extents: Tensor, first: tuple[Tensor | None, Tensor | None],
    diagonals: Tensor | None = None, counters: Tensor | None = None,
) -> Call:  # fmt: skip
    """Extents of the sequences, and the first tile of each, of queries and of keys. diagonals, counters: where kernels with a fixed grid
    follow, (sequences,), and what is to be set to 0.
    """
    packed, config = spec.packed, config_of(step)
    assert packed is not None
    most = (None, None) if diagonals is None else (packed.most_queries, packed.most_keys)
    offsets = (x.offsets_q, x.offsets_k, x.used_q, x.used_k)
    args = (*offsets, extents, *first, diagonals, counters, packed.sequences, spec.queries, spec.keys, *most)
    cleared = 1 if counters is None else counters.numel()
    constants = {"BM": config.block_m, "BN": config.block_n, "BLOCK": SEQUENCES, "COUNTERS": cleared}
    return Call(packed_kernels.extents, args, constants, config, step.programs)


def unowned_call(
    step: Step, spec: AttentionSpec, x: Operands, given: dict[str, Tensor | None], saved: Saved | None = None,
    most: tuple[int | None, int | None] = (None, None),
) -> Call:  # fmt: skip
    """Zeros in the rows of one or two tensors, and in ``saved``, that belong to no sequence. most: so many queries and keys of a sequence
    count as its own, and the others have a sink alone, if there is one; None: all.
    """
    tensors = [given[name] for name in step.gives if name != "lse"]
    first, second = [*tensors, None][:2]
    count = _sequences(spec)
    assert first is not None
    of_keys = step.gives[0] in ("dk", "dv")
    owned = (x.offsets_k, x.used_k, most[1]) if of_keys else (x.offsets_q, x.used_q, most[0])
    lse, rest = (None, None) if saved is None else (saved.lse, saved.rest)
    sink = sink_of(x, owned[2], lse)
    args = (
        *(*owned, sink, first, second, lse, rest, row_and_head(first), None if second is None else row_and_head(second)),
        *(None if lse is None else lse.stride(1), count, first.shape[1], first.shape[2], count.bit_length(), 0),
    )
    widest = max(first.shape[3], 0 if second is None else second.shape[3])
    constants = {"DX": first.shape[3], "DY": 0 if second is None else second.shape[3], "BLOCK": ROWS_A_PROGRAM, "BLOCK_DIM": padded(widest)}
    return Call(packed_kernels.unowned, args, constants, config_of(step), step.programs)


def sink_of(x: Operands, most: int | None, lse: Tensor | None) -> tuple[Tensor, int] | None:
    """The sink and its stride, where it is the lse of some rows that are no tile's: of a sequence's queries from ``most`` on."""
    return None if x.sink is None or most is None or lse is None else (x.sink, x.sink.stride(0))


def row_and_head(x: Tensor) -> tuple[int, int]:
    """The strides that kernels of rows of nobody take."""
    return x.stride(1), x.stride(2)


def row_strides(x: Tensor | None) -> tuple[int, int, int] | None:
    """(row, row, head): the kernels' stride of batch entries is by what a sequence's first row moves it."""
    return None if x is None else (x.stride(1), x.stride(1), x.stride(2))


def _packed(spec: AttentionSpec, t: PackedTables, tiles: Tensor | None) -> tuple[Tensor | None, Tensor, int]:
    assert spec.packed is not None
    return tiles, t.extents, int(spec.packed.bottom_right)


def _starts(layout: str, bias: Tensor | None) -> tuple[int | None, int | None]:
    """By what a sequence's first query, and its first key, move a packed bias or mask."""
    if bias is None or layout == "padded":
        return None, None
    return (bias.stride(3), None) if layout == "rows" else (None, bias.stride(4))


def packed_features(spec: AttentionSpec, x: Operands, f: Features) -> Features:
    """The features of a dense batch, of sequences: which of bias and mask is which, and where each sequence's begins."""
    packed = spec.packed
    assert packed is not None
    bias, layout, mask, mask_layout = x.bias, packed.bias_layout, x.mask, packed.mask_layout
    if spec.bias is not None and spec.bias.is_mask:
        bias, mask, mask_layout = None, bias, layout
    (bias_by_query, bias_by_key), (mask_by_query, mask_by_key) = _starts(layout, bias), _starts(mask_layout, mask)
    second_by_query, second_by_key = _starts(layout, x.second_bias)
    return f._replace(
        second_by_query=second_by_query,
        second_by_key=second_by_key,
        bias_by_query=bias_by_query,
        bias_by_key=bias_by_key,
        mask_by_query=mask_by_query,
        mask_by_key=mask_by_key,
        most_queries=packed.most_queries,
        most_keys=packed.most_keys,
    )


def rows_of(spec: AttentionSpec, t: PackedTables, of_keys: bool) -> Rows:
    """How rows of sequences are found, by kernels that own queries or keys."""
    tiles, bound = (t.tiles_k, t.bound_k) if of_keys else (t.tiles_q, t.bound_q)
    return Rows(row_strides, lambda lse: (1, lse.stride(1)), bound, 1, _packed(spec, t, tiles))


def forward_calls(room: Room, plan: Plan, spec: AttentionSpec, x: Operands, f: Features, saved: Saved) -> list[Call]:
    """The launches of a forward pass."""
    if not plan.steps:
        return []
    p = _Forward(spec, x, f, saved, tables(room, plan.steps, spec))
    return [_FORWARD[step.kernel](step, p) for step in plan.steps]


class _Forward(NamedTuple):
    """What the launches of a forward pass share."""

    spec: AttentionSpec
    x: Operands
    f: Features
    saved: Saved
    t: PackedTables


# How a forward pass launches each kernel of its plan.
_FORWARD: dict[str, Callable[[Step, _Forward], Call]] = {
    "extents": lambda step, p: extents_call(step, p.spec, p.x, p.t.extents, p.t.first),
    "tiles": lambda step, p: tiles_call(step, p.spec, p.t),
    "forward": lambda step, p: forward_call(step, p.spec, p.x, p.f, p.saved, rows_of(p.spec, p.t, of_keys=False)),
    "unowned": lambda step, p: unowned_call(step, p.spec, p.x, {"out": p.saved.out}, p.saved),
}


def backward_calls(
    room: Room,
    plan: Plan,
    spec: AttentionSpec,
    x: Operands,
    f: Features,
    saved: Saved,
    dout: Tensor,
    dlse: Tensor | None,
    delta: Tensor | None,
    grads: Gradients,
) -> list[Call]:
    """The launches of a backward pass."""
    dq, dk, dv, *_ = grads
    wide = is_wide((x.q, x.k, x.v, saved.out, dout, x.bias, x.mask, dq, dk, dv, x.second_bias))
    p = _Backward(room, spec, x, f, saved, dout, dlse, delta, grads, wide, {}, tables(room, plan.steps, spec))
    return [_BACKWARD[step.kernel](step, p) for step in plan.steps]


@dataclass(frozen=True)
class _Backward(BackwardPass):
    """Of packed sequences, with their tables."""

    t: PackedTables


def _dkdv(step: Step, p: _Backward) -> Call:
    _, target = bias_given(step, p.grads)
    results = (p.grads.dk, p.grads.dv, target)
    return dkdv_call(step, p.spec, p.inputs, rows_of(p.spec, p.t, of_keys=True), results, _key_strides(target), p.wide)


def _dq(step: Step, p: _Backward) -> Call:
    _, target = bias_given(step, p.grads)
    dq = p.grads.dq
    return dq_call(step, p.spec, p.inputs, rows_of(p.spec, p.t, of_keys=False), (dq, target), row_strides(dq), p.wide)


# How a backward pass launches each kernel of its plan.
_BACKWARD: dict[str, Callable[[Step, _Backward], Call]] = {
    "extents": lambda step, p: extents_call(step, p.spec, p.x, p.t.extents, p.t.first),
    "tiles": lambda step, p: tiles_call(step, p.spec, p.t),
    "delta": lambda step, p: delta_call(step, p.spec, p.saved.out, p.dout, p.dlse, p.delta, Features(), p.wide),
    "dkdv": _dkdv,
    "dq": _dq,
    "unowned": lambda step, p: unowned_call(step, p.spec, p.x, p.grads._asdict()),
    "cleared": lambda step, p: cleared_call(step, p.grads),
    "packed_dbias": lambda step, p: dbias_call(p.room, step, p.spec, p.t, p.inputs, p.grads, p.sums, p.wide),
    "dbias_sum": lambda step, p: dbias_sum_call(step, p.grads, p.sums),
}


def _key_strides(dbias: Tensor | None) -> tuple[int, int, int, int] | None:
    """Of the gradient of a bias of keys, by (sequence, nothing, head, key)."""
    if dbias is None:
        return None
    sequence, _, head, _, key = bias_strides(dbias)  # type: ignore[misc]
    return sequence, 0, head, key


def cleared_call(step: Step, grads: Gradients) -> Call:
    """Zeros in the gradient of a bias, which is contiguous."""
    _, target = bias_given(step, grads)
    assert target is not None
    return Call(packed_kernels.cleared, (target, target.numel()), {"BLOCK": SUM_BLOCK}, config_of(step), step.programs)


def dbias_call(
    room: Room,
    step: Step,
    spec: AttentionSpec,
    t: PackedTables,
    inputs: tuple[Any, ...],
    grads: Gradients,
    sums: dict[str, Tensor | None],
    wide: bool,
) -> Call:
    """The gradient of a bias that no other kernel gives, which is contiguous. inputs: q, k, v, features, dout, lse, rest, delta. sums: by
    name, where a gradient comes in parts.
    """
    config = config_of(step)
    name, target = bias_given(step, grads)
    assert target is not None
    constants = constants_of(spec, config, wide, step.precision)
    parts = target.unsqueeze(0)
    if step.splits > 1:
        parts = sums[name] = room.new(f"partial sums of {name}", (step.splits, *target.shape), torch.float32)
    packed, bias = spec.packed, spec.second if name == "dsecond" else spec.bias
    assert packed is not None and bias is not None
    listed = "" if packed.bias_layout == "padded" else packed.bias_layout
    tiles, bound = {"rows": (t.tiles_q, t.bound_q), "keys": (t.tiles_k, t.bound_k)}.get(listed, (t.extents, 1))
    sequence, _, head, row, col = bias_strides(parts[0])  # type: ignore[misc]
    varies = dict(zip(("VARIES_B", "VARIES_H", "VARIES_M", "VARIES_N"), (bias.varies[0], *bias.varies[2:]), strict=True))
    args = (
        *(*inputs, parts, _packed(spec, t, tiles), *input_strides(inputs, rows_of(spec, t, of_keys=False))),
        *((parts.stride(0), sequence, head, row, col), (row, col)),
        *(spec.heads, spec.groups, packed.sequences, spec.queries, bound),
        *(packed.second_sizes if name == "dsecond" else packed.bias_sizes),
        *(spec.lo, spec.hi, spec.scale, step.splits),
    )
    constants = constants | varies | {"LISTED": listed}
    return Call(packed_kernels.packed_dbias, args, constants, config, step.programs)
