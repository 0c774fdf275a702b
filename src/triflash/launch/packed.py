"""Arguments and launches of the portable Triton kernels for packed sequences. Called by ``launch/triton.py``; imports triton."""

from __future__ import annotations

from collections.abc import Sequence
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
from .common import config_of, constants_of, is_wide
from .portable import Rows, dbias_sum_call, delta_call, dkdv_call, dq_call, forward_call, input_strides
from .room import Room

__all__ = [
    "OF_BIAS", "PackedTables", "backward_calls", "dbias_call", "extents_call", "forward_calls", "in_line", "packed_features",
    "row_and_head", "sink_of", "table_call", "tables", "unowned_call",
]  # fmt: skip

OF_BIAS = ("cleared", "packed_dbias", "dbias_sum")  # kernels for the gradient of a bias alone
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
    given = {"offsets_q": "cu_seqlens_q", "offsets_k": "cu_seqlens_k", "used_q": "seqused_q", "used_k": "seqused_k"}
    copies = {}
    for field, name in given.items():
        numbers = getattr(x, field)
        if numbers is not None and not numbers.is_contiguous():
            target = room.new(name, numbers.shape, numbers.dtype)
            copies[field] = room.copied(name, numbers, target, "its numbers do not lie one behind the other")
    return x._replace(**copies) if copies else x


def table_call(step: Step, spec: AttentionSpec, x: Operands, t: PackedTables) -> Call:
    """A launch that fills one of them: of ``extents`` or ``tiles``."""
    config, count = config_of(step), _sequences(spec)
    if step.kernel == "extents":
        return extents_call(step, spec, x, t.extents, (t.first_q, t.first_k))
    of_queries = step.gives == ("tiles of queries",)
    first, tiles, bound = (t.first_q, t.tiles_q, t.bound_q) if of_queries else (t.first_k, t.tiles_k, t.bound_k)
    args = (first, tiles, count, bound, count.bit_length())
    return Call(packed_kernels.tiles, args, {"BLOCK": ROWS_A_PROGRAM}, config, step.programs)


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
    calls = []
    t = tables(room, plan.steps, spec) if plan.steps else None
    for step in plan.steps:
        assert t is not None
        if step.kernel == "forward":
            calls.append(forward_call(step, spec, x, f, saved, rows_of(spec, t, of_keys=False)))
        elif step.kernel == "unowned":
            calls.append(unowned_call(step, spec, x, {"out": saved.out}, saved))
        else:
            calls.append(table_call(step, spec, x, t))
    return calls


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
    out, lse, rest = saved
    dq, dk, dv, *_ = grads
    t = tables(room, plan.steps, spec)
    inputs = (x.q, x.k, x.v, f, dout, lse, rest, delta)
    wide = is_wide((x.q, x.k, x.v, out, dout, x.bias, x.mask, dq, dk, dv, x.second_bias))
    given = {"dq": dq, "dk": dk, "dv": dv}
    biases = {"dbias": grads.dbias, "dsecond": grads.dsecond}
    sums: dict[str, Tensor | None] = {}
    calls = []
    for step in plan.steps:
        name = next((each for each in step.gives if each in biases), "")
        target = biases.get(name)
        if step.kernel == "delta":
            calls.append(delta_call(step, spec, out, dout, dlse, delta, Features(), wide))
        elif step.kernel == "dkdv":
            calls.append(dkdv_call(step, spec, inputs, rows_of(spec, t, of_keys=True), (dk, dv, target), _key_strides(target), wide))
        elif step.kernel == "dq":
            calls.append(dq_call(step, spec, inputs, rows_of(spec, t, of_keys=False), (dq, target), row_strides(dq), wide))
        elif step.kernel == "unowned":
            calls.append(unowned_call(step, spec, x, given))
        elif step.kernel in OF_BIAS:
            assert target is not None
            calls.append(dbias_call(room, step, spec, t, inputs, target, sums, wide))
        else:
            calls.append(table_call(step, spec, x, t))
    return calls


def _key_strides(dbias: Tensor | None) -> tuple[int, int, int, int] | None:
    """Of the gradient of a bias of keys, by (sequence, nothing, head, key)."""
    if dbias is None:
        return None
    sequence, _, head, _, key = bias_strides(dbias)  # type: ignore[misc]
    return sequence, 0, head, key


def dbias_call(
    room: Room,
    step: Step,
    spec: AttentionSpec,
    t: PackedTables,
    inputs: tuple[Any, ...],
    target: Tensor,
    sums: dict[str, Tensor | None],
    wide: bool,
) -> Call:
    """A launch of :data:`OF_BIAS`, for the gradient of a bias that no other kernel gives, into ``target``, which is contiguous. inputs: q,
    k, v, features, dout, lse, rest, delta. sums: by name, where the gradient comes in parts.
    """
    config = config_of(step)
    (name,) = step.gives
    if step.kernel == "cleared":
        return Call(packed_kernels.cleared, (target, target.numel()), {"BLOCK": SUM_BLOCK}, config, step.programs)
    if step.kernel == "dbias_sum":
        return dbias_sum_call(step, sums[name], target)
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
    return Call(packed_kernels.packed_dbias, args, constants, step.config, step.programs)  # type: ignore[arg-type]
