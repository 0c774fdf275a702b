"""Packed sequences on Hopper: what of them its kernels take, with which tiles, and the kernels around them. Called by ``hopper.py``. Pure.

The host does not know the sequences, only how many there are and how many rows in all: configurations are those of a dense batch of
sequences of the mean length (``like``), and a grid is as large as the most tiles that there can be allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil

from ..spec import AttentionSpec, Needs, Packed
from .configs import TableConfig, TileConfig, padded
from .device import DeviceFacts
from .kernels import dkdv, dq, forward
from .kernels.shared import L2_GROUP_BYTES, ROWS, STATS_MULTIPLE, is_banded, is_light
from .packed import ROWS_A_PROGRAM, most_tiles
from .steps import Step, ceil_div

__all__ = [
    "ROWWISE", "backward_steps", "cached_rows", "forward_steps", "like", "packed_of", "rows_of", "spread_length", "spread_steps", "why_not",
]  # fmt: skip

ROWWISE = TileConfig(ROWS, 16, 4, 1)  # of preprocess, postprocess and dkdv_sum: 64 rows a program, no tiles of scores
TALL = 2 * ROWS  # queries of a tile in the table, where no kernel that owns them says otherwise
NARROW_STRETCH, WIDE_STRETCH = 0.8, 4.5  # of mean lengths: see _forward_config
LISTED_AT_ONCE = 1024  # tiles of a table that one program makes, and sequences, as kernels/hopper/listed.py has it
MOST_ROWS = 2**29  # of a tensor: what the coordinates of ragged descriptors leave


def packed_of(spec: AttentionSpec) -> Packed:
    """What there is of them in a spec that has some."""
    assert spec.packed is not None
    return spec.packed


def like(spec: AttentionSpec, stretch: float = 1.0) -> AttentionSpec:
    """A dense batch of sequences of ``stretch`` times the mean length, or of the longest that the caller knows of if that is shorter."""
    packed = packed_of(spec)
    count = max(packed.sequences, 1)
    queries, keys = (
        min(max(ceil(stretch * rows / count), 1), rows if longest is None else max(longest, 1))
        for rows, longest in ((spec.queries, packed.longest_q), (spec.keys, packed.longest_k))
    )
    diagonal = keys - queries if packed.bottom_right else 0
    lo, hi = (None if side is None else side + diagonal for side in (spec.lo, spec.hi))
    return replace(spec, packed=None, batch_outer=count, queries=queries, keys=keys, lo=lo, hi=hi, shift=None)


def why_not(spec: AttentionSpec) -> tuple[str, str] | None:
    """None if the kernels take such packed sequences, else (what they cannot do, the nearest thing that works)."""
    packed = packed_of(spec)
    if spec.second is not None:
        return "packed sequences with two biases", "use backend('triton')"
    if spec.sink and packed.most_queries is not None:
        return "packed sequences with a sink beside a bias of fewer rows than there are queries in all", "use backend('triton')"
    if max(spec.queries, spec.keys) > MOST_ROWS:
        return f"packed tensors of more than {MOST_ROWS} rows", "use backend('triton')"
    if spec.heads * most_tiles(max(spec.queries, spec.keys), packed.sequences, 64) >= 2**31:
        return "so many tiles of packed sequences", "use backend('triton')"
    return None


def table_steps(spec: AttentionSpec, block_m: int | None, block_n: int | None) -> list[Step]:
    """A table of the sequences, and tables of their tiles of so many queries, of so many keys; None: of none."""
    config = TableConfig(block_m or 16, block_n or 16, 4, 1)
    steps = [Step("extents", config)]
    names = [name for name, block in (("queries", block_m), ("keys", block_n)) if block is not None]
    for kernel in ("listed", "ordered"):
        steps += [Step(kernel, config, ceil_div(rows_of(config, spec, name)[1], ROWS_A_PROGRAM), gives=(name,)) for name in names]
    return steps


def spread_steps(spec: AttentionSpec) -> list[Step]:
    """A bias and a mask over packed keys, each laid out so that TMA can load a sequence's part."""
    if spec.packed is None:
        return []
    packed, steps = packed_of(spec), []
    for name, own, layout in (("bias", spec.bias, packed.bias_layout), ("mask", spec.mask, packed.mask_layout)):
        if own is not None and own.varies[4] and layout == "keys":
            programs = ceil_div(spec.keys, ROWS_A_PROGRAM) * (spec.heads if own.varies[2] else 1)
            steps.append(Step("spread", TileConfig(ROWS_A_PROGRAM, 16, 4, 1), programs, gives=(name,)))
    return steps


def spread_length(spec: AttentionSpec) -> int:
    """How long a head's bias over packed keys is where each sequence's begins at a multiple of that of statistics."""
    return (ceil_div(spec.keys, STATS_MULTIPLE) + packed_of(spec).sequences) * STATS_MULTIPLE


def rows_of(config: TileConfig, spec: AttentionSpec, name: str) -> tuple[int, int]:
    """(rows of a tile, most tiles but 1 at least) of a table."""
    rows, block = (spec.queries, config.block_m) if name == "queries" else (spec.keys, config.block_n)
    return block, max(most_tiles(rows, packed_of(spec).sequences, block), 1)


def _prepared_step(spec: AttentionSpec, block_m: int | None, block_n: int | None, gives: tuple[str, ...]) -> Step | None:
    """One kernel instead of ``table_steps`` and, where rows belong to no sequence, for the zeros in what it ``gives``; None: tiles are too
    many for one program.
    """
    config = TableConfig(block_m or 16, block_n or 16, 8, 1)
    names = tuple(name for name, block in (("queries", block_m), ("keys", block_n)) if block is not None)
    if packed_of(spec).sequences > LISTED_AT_ONCE or any(rows_of(config, spec, name)[1] > LISTED_AT_ONCE for name in names):
        return None
    of_queries, of_keys = {"out", "dq"} & {*gives}, {"dk", "dv"} & {*gives}
    clearing = sum(ceil_div(rows, ROWS_A_PROGRAM) for rows, some in ((spec.queries, of_queries), (spec.keys, of_keys)) if some)
    return Step("prepared", config, 1 + clearing, gives=(*names, *gives))


def cached_rows(spec: AttentionSpec, name: str) -> int:
    """How many rows of what tiles of queries, or of keys, read may share the L2 cache, of a head: keys and values, or queries and dout."""
    width = spec.head_dim + spec.value_dim if name == "queries" else spec.groups * (spec.head_dim + spec.value_dim)
    return max(1, L2_GROUP_BYTES // (2 * width))


def unowned_step(length: int, gives: tuple[str, ...]) -> Step:
    """Zeros in the rows that belong to no sequence."""
    return Step("unowned", TileConfig(ROWS_A_PROGRAM, 16, 4, 1), ceil_div(length, ROWS_A_PROGRAM), gives=gives)


def _widest(spec: AttentionSpec) -> int:
    return padded(max(spec.head_dim, spec.value_dim))


def _is_tiny(spec: AttentionSpec) -> bool:
    """Whether most sequences are no longer than the smallest tile, and nothing but a band comes with them."""
    return like(spec).queries <= ROWS and _widest(spec) <= 128 and is_light(spec) and spec.bias is None


def _forward_config(spec: AttentionSpec, device: DeviceFacts, by_hand: Mapping[str, object]) -> forward.ForwardConfig:
    """By hand, else by the rule for dense batches (H200, 2026-11-30; docs/tuning.md).

    Where lengths differ most of the work is that of the longest: at head dims above 64, where large tiles gain most, the rule is asked
    about several times the mean. Below, under a band, small tiles gain what the ends of sequences waste of large ones. Sequences that do
    not fill a tile of 64 take the smallest.
    """
    narrow = _widest(spec) <= 64
    if "forward" not in by_hand and _is_tiny(spec):
        config = forward.ForwardConfig(1, 64, 2, q_stages=2, ctas_per_sm=3) if narrow else forward.ForwardConfig(1, 64, 2, ctas_per_sm=2)
        if config.fits(spec, device.shared_memory):
            return config
    stretch = WIDE_STRETCH if not narrow else NARROW_STRETCH if is_banded(spec) else 1.0
    return forward.config_of(like(spec, stretch), device, by_hand)


def forward_steps(spec: AttentionSpec, device: DeviceFacts, by_hand: Mapping[str, object]) -> tuple[Step, ...]:
    """The kernels of a forward pass."""
    config = _forward_config(spec, device, by_hand)
    tiles = max(most_tiles(spec.queries, packed_of(spec).sequences, config.block_m), 1) * spec.heads
    programs = min(tiles, device.sms * config.ctas_per_sm) if config.persistent else tiles
    own = Step("forward", config, programs)
    if prepared := _prepared_step(spec, config.block_m, None, ("out", "lse")):
        return (prepared, *spread_steps(spec), own)
    steps = (*table_steps(spec, config.block_m, None), *spread_steps(spec))
    return (*steps, own, unowned_step(spec.queries, ("out", "lse")))


def backward_steps(spec: AttentionSpec, needs: Needs, device: DeviceFacts, by_hand: Mapping[str, object], adding: bool) -> tuple[Step, ...]:
    """The kernels of a backward pass, in order. adding: whether the kernel that owns keys sums dq up."""
    alike, sequences = like(spec), packed_of(spec).sequences
    keys: Step | None = None
    queries: Step | None = None
    if gives := tuple(name for name, need in (("dk", needs.dk), ("dv", needs.dv), ("dq", adding)) if need):
        own = dkdv.step(alike, device, by_hand, gives)
        assert isinstance(own.config, dkdv.DkdvConfig)
        config = replace(own.config, head_splits=1)
        tiles = max(most_tiles(spec.keys, sequences, config.block_n), 1) * spec.kv_heads
        keys = replace(own, config=config, programs=min(tiles, device.sms), order="tile")
    if needs.dq and not adding:
        own = dq.step(alike, device, by_hand, ("dq",))
        chosen = own.config
        assert isinstance(chosen, dq.DqConfig)
        if "dq" not in by_hand and _is_tiny(spec):
            small = dq.DqConfig(1, 64, 2, 2, ctas_per_sm=3) if _widest(spec) <= 64 else dq.DqConfig(1, 64, 2, 1, ctas_per_sm=2)
            chosen = small if small.fits(spec, device.shared_memory, ("dq",)) else chosen
        tiles = max(most_tiles(spec.queries, sequences, chosen.block_m), 1) * spec.heads
        programs = min(tiles, device.sms * chosen.ctas_per_sm) if chosen.persistent else tiles
        queries = replace(own, config=chosen, programs=programs, order="tile")
    block_m = TALL if queries is None else queries.config.block_m  # type: ignore[union-attr]
    parts = max(most_tiles(spec.queries, sequences, block_m), 1) * (block_m // ROWS) * spec.heads
    if spec.alibi:
        forward_keys = _forward_config(spec, device, by_hand).block_n
        keys, queries = (None if step is None else replace(step, forward_keys=forward_keys) for step in (keys, queries))
    steps = []
    prepared: Step | None = None
    if keys is not None or queries is not None:
        block_n = None if keys is None else keys.config.block_n  # type: ignore[union-attr]
        cleared = tuple(name for name, need in (("dq", needs.dq), ("dk", needs.dk), ("dv", needs.dv)) if need)
        prepared = _prepared_step(spec, block_m, block_n, cleared)
        steps = table_steps(spec, block_m, block_n) if prepared is None else [prepared]
        steps += spread_steps(spec)
    if needs.dsink or needs.dbias:  # by row, for those that read it so
        steps.append(Step("delta", ROWWISE, ceil_div(spec.queries, ROWS) * spec.heads, gives=("dsink",) * needs.dsink))
    if keys is not None or queries is not None:
        steps.append(Step("preprocess", ROWWISE, parts))
    if keys is not None:
        steps.append(keys)
        given = tuple(name for name in ("dk", "dv") if name in keys.gives)
        if given and prepared is None:
            steps.append(unowned_step(spec.keys, given))
    if queries is not None:
        steps.append(queries)
    if adding:
        steps.append(Step("postprocess", ROWWISE, parts, gives=("dq",)))
    if needs.dq and prepared is None:
        steps.append(unowned_step(spec.queries, ("dq",)))
    return tuple(steps)
