"""What the launches of the Hopper kernels need for packed sequences: tables made on the device, and zeros where no sequence is.

Called by ``launch/hopper.py`` and ``launch/hopper_backward.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.hopper import listed as listed_kernels
from ..kernels.hopper.extent import ENTRY
from ..plan.configs import padded
from ..plan.kernels.listed import cached_rows, rows_of, spread_length, spread_steps
from ..plan.kernels.packed import ROWS_A_PROGRAM, packed_of
from ..plan.steps import Plan, Step
from ..spec import AttentionSpec, Operands, Saved
from .calls import Call
from .common import config_of
from .packed import extents_call, row_and_head, sink_of, unowned_call
from .room import Room

__all__ = ["AROUND", "Around", "Tables", "as_spread", "sequences_of", "spreads", "tables", "tiles_of"]

_GROUPS = listed_kernels.BUCKETS.value * listed_kernels.CHUNKS.value


class Table(NamedTuple):
    """Of tiles. table: (most tiles, ENTRY), in order. counters: of tiles of about the same length. total: how many there are, (1,). rows:
    of a tile. What several kernels hand on that make it, None if one does: first, the first tile of each sequence, (sequences + 1,);
    entries, (most tiles, ENTRY), as they come, with their places, (most tiles, 2).
    """

    table: Tensor
    counters: Tensor
    total: Tensor
    rows: int
    first: Tensor | None = None
    entries: Tensor | None = None
    places: Tensor | None = None


class Tables(NamedTuple):
    """What the device works out first. extents: (sequences, 4); diagonals: (sequences,); counters: of both tables; by name, those of
    "queries" and "keys" that are wanted. spread: room for a "bias" and a "mask" over packed keys, (1, 1, heads or 1, 1, keys), as they are
    read.
    """

    extents: Tensor
    diagonals: Tensor
    counters: Tensor
    of: dict[str, Table]
    spread: dict[str, Tensor]


def tables(room: Room, plan: Plan, spec: AttentionSpec, x: Operands) -> Tables | None:
    """Room for the tables that a plan makes; None: it has none, because nothing is packed."""
    if spec.packed is None:
        return None
    count = spec.packed.sequences

    def new(name: str, *shape: int) -> Tensor:
        return room.new(name, shape, torch.int32)

    counters = new("numbers of tiles by length", 2, _GROUPS)
    t = Tables(new("extents of sequences", max(count, 1), 4), new("diagonals of sequences", max(count, 1)), counters, {}, {})
    for step in plan.steps:
        for name in ("queries", "keys") if step.kernel in ("listed", "prepared") else ():
            if name not in step.gives:
                continue
            rows, most = rows_of(config_of(step), spec, name)
            own = Table(
                new(f"tiles of {name}", most, ENTRY.value), counters[int(name == "keys")], new(f"number of tiles of {name}", 1), rows
            )
            if step.kernel == "listed":
                own = own._replace(
                    first=new(f"first tiles of {name}", count + 1), entries=new(f"tiles of {name} as they come", most, ENTRY.value),
                    places=new(f"places of tiles of {name}", most, 2),
                )  # fmt: skip
            t.of[name] = own
        if step.kernel == "spread":
            (name,) = step.gives
            source = getattr(x, name)
            t.spread[name] = room.new(f"{name} of packed keys", (*source.shape[:-1], spread_length(spec)), source.dtype)
    return t


def spreads(spec: AttentionSpec, name: str) -> bool:
    """Whether ``spread`` lays out the "bias" or "mask"."""
    return any(step.gives == (name,) for step in spread_steps(spec))


def as_spread(t: Tables | None, x: Operands) -> Operands:
    """The operands with those in the place of others that ``spread`` lays out."""
    return x if t is None or not t.spread else x._replace(**t.spread)


def tiles_of(t: Tables | None, spec: AttentionSpec, name: str) -> tuple[Any, ...] | None:
    """What a kernel takes of a table: its entries, how many there are, and as 1 or 0 whether bands meet the last query and key of a
    sequence, else its first ones, and whether the bias is packed along queries, along keys, and the mask likewise; None: nothing is packed.
    """
    if t is None:
        return None
    packed = packed_of(spec)
    along = [int(layout == name) for layout in (packed.bias_layout, packed.mask_layout) for name in ("rows", "keys")]
    return (t.of[name].table, t.of[name].total, int(packed.bottom_right), *along)


def sequences_of(t: Tables | None, spec: AttentionSpec, stats: Tensor) -> tuple[Any, ...] | None:
    """What a kernel takes that finds sequences by their numbers: extents, diagonals, 1 or 0 as of ``tiles_of``, and how long the row of
    statistics of a head is; None: nothing is packed.
    """
    return None if t is None else (t.extents, t.diagonals, int(packed_of(spec).bottom_right), stats.shape[2])


class Around(NamedTuple):
    """What launches before and after the kernels that all batches have share. results: by name, those whose rows of nobody are cleared."""

    spec: AttentionSpec
    x: Operands
    t: Tables
    results: dict[str, Tensor | None]
    saved: Saved | None = None


def _extents(step: Step, a: Around) -> Call:
    first = [a.t.of[name].first if name in a.t.of else None for name in ("queries", "keys")]
    return extents_call(step, a.spec, a.x, a.t.extents, (first[0], first[1]), a.t.diagonals, a.t.counters)


def _listed(step: Step, a: Around) -> Call:
    (name,) = step.gives
    spec, t, own, packed = a.spec, a.t, a.t.of[name], packed_of(a.spec)
    args = (
        *(t.extents, own.first, t.diagonals, own.entries, own.places, own.counters, own.total, packed.sequences, own.table.shape[0]),
        *(packed.sequences.bit_length(), int(packed.bottom_right), spec.lo, spec.hi, cached_rows(spec, name)),
    )
    constants = {"BLOCK": ROWS_A_PROGRAM, "TILE": own.rows, "OF_KEYS": name == "keys"}
    return Call(listed_kernels.listed, args, constants, config_of(step), step.programs)


def _ordered(step: Step, a: Around) -> Call:
    (name,) = step.gives
    own = a.t.of[name]
    args = (own.entries, own.places, own.counters, own.table, own.table.shape[0])
    return Call(listed_kernels.ordered, args, {"BLOCK": ROWS_A_PROGRAM}, config_of(step), step.programs)


def _spread(step: Step, a: Around) -> Call:
    (name,) = step.gives
    source, target = (own.view(torch.uint8) if own.dtype == torch.bool else own for own in (getattr(a.x, name), a.t.spread[name]))
    sequences, blocks = packed_of(a.spec).sequences, step.programs // source.shape[2]
    args = (
        *(a.t.extents.view(-1)[2:], source, target, source.stride(2), source.stride(4), target.stride(2)),
        *(sequences, a.spec.keys, blocks, sequences.bit_length()),
    )
    return Call(listed_kernels.spread, args, {"BLOCK": ROWS_A_PROGRAM}, config_of(step), step.programs)


def _unowned(step: Step, a: Around) -> Call:
    packed = packed_of(a.spec)
    return unowned_call(step, a.spec, a.x, a.results, a.saved, (packed.most_queries, packed.most_keys))


def _prepared(step: Step, a: Around) -> Call:
    """All tables, and zeros in what no sequence has of the tensors that the step gives."""
    spec, x, t, results, saved = a
    packed, config = packed_of(spec), config_of(step)
    cleared = {name: results[name] for name in ("out", "dq", "dk", "dv") if name in step.gives}
    of_queries, dk, dv = cleared.get("out", cleared.get("dq")), cleared.get("dk"), cleared.get("dv")
    lse, rest = (None, None) if saved is None else (saved.lse, saved.rest)
    of = [
        None if (own := t.of.get(name)) is None else (own.table, own.total, own.table.shape[0], cached_rows(spec, name))
        for name in ("queries", "keys")
    ]
    strides = [None if each is None else row_and_head(each) for each in (of_queries, dk, dv)]
    count = packed.sequences
    args = (
        *(x.offsets_q, x.offsets_k, x.used_q, x.used_k, t.extents, t.diagonals, t.counters, *of),
        *((packed.most_queries, packed.most_keys), spec.lo, spec.hi),
        (count, count.bit_length(), int(packed.bottom_right), spec.queries, spec.keys, spec.heads, spec.kv_heads),
        *(sink_of(x, packed.most_queries, lse), of_queries, lse, rest, dk, dv),
        *(strides[0], None if lse is None else lse.stride(1), *strides[1:]),
    )
    sizes = {name: 0 if each is None else each.shape[3] for name, each in zip(("DX", "DK", "DV"), (of_queries, dk, dv), strict=True)}
    constants = {
        "BM": config.block_m,
        "BN": config.block_n,
        "BLOCK": ROWS_A_PROGRAM,
        **sizes,
        "BLOCK_DIM": padded(max(sizes.values())),
    }
    return Call(listed_kernels.prepared, args, constants, config, step.programs)


# How passes launch each of these kernels.
AROUND: dict[str, Callable[[Step, Around], Call]] = {
    "prepared": _prepared,
    "extents": _extents,
    "listed": _listed,
    "ordered": _ordered,
    "spread": _spread,
    "unowned": _unowned,
}
