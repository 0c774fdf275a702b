"""Packed sequences on Hopper: what of them its kernels take, with which tiles, and the kernels around them. Called by ``hopper.py``. Pure.

The host does not know the sequences, only how many there are and how many rows in all: configurations are those of a dense batch of
sequences of the mean length (``like``), and a grid is as large as the most tiles that there can be allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil

from ..spec import AttentionSpec, Needs
from .configs import padded
from .device import DeviceFacts
from .kernels import dbias, dkdv, dq, forward, rowwise
from .kernels.listed import prepared_step, spread_steps, table_steps
from .kernels.packed import most_tiles, packed_of, unowned_step
from .kernels.shared import ROWS, is_banded, is_light
from .steps import Step

__all__ = ["backward_steps", "forward_steps", "like", "why_not"]

TALL = 2 * ROWS  # queries of a tile in the table, where no kernel that owns them says otherwise
NARROW_STRETCH, FULL_STRETCH, WIDE_STRETCH = 0.8, 3.0, 4.5  # of mean lengths: see _forward_config
UNEVEN = 1.5  # times the mean, from which on the longest sequence says that lengths differ
MOST_ROWS = 2**29  # of a tensor: what the coordinates of ragged descriptors leave


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
    if max(spec.queries, spec.keys) > MOST_ROWS:
        return f"packed tensors of more than {MOST_ROWS} rows", "use backend('triton')"
    if spec.heads * most_tiles(max(spec.queries, spec.keys), packed.sequences, 64) >= 2**31:
        return "so many tiles of packed sequences", "use backend('triton')"
    return None


def _widest(spec: AttentionSpec) -> int:
    return padded(max(spec.head_dim, spec.value_dim))


def _is_tiny(spec: AttentionSpec) -> bool:
    """Whether most sequences are no longer than the smallest tile, and nothing but a band comes with them."""
    return like(spec).queries <= ROWS and _widest(spec) <= 128 and is_light(spec) and spec.bias is None


def _is_uneven(spec: AttentionSpec) -> bool:
    """Whether lengths may differ much: what the caller says of the longest does not tell that they do not."""
    packed = packed_of(spec)
    known = [(longest, rows) for longest, rows in ((packed.longest_q, spec.queries), (packed.longest_k, spec.keys)) if longest is not None]
    return not known or any(longest * packed.sequences > UNEVEN * rows for longest, rows in known)


def _forward_config(spec: AttentionSpec, device: DeviceFacts, by_hand: Mapping[str, object]) -> forward.ForwardConfig:
    """By hand, else by the rule for dense batches (H200, 2026-11-30; docs/tuning.md).

    Where lengths differ most of the work is that of the longest: at head dims above 64, where large tiles gain most, the rule is asked
    about several times the mean; below without a band, too, but not under one, where small tiles gain what the ends of sequences waste of
    large ones. Sequences that do not fill a tile of 64 take the smallest.
    """
    narrow = _widest(spec) <= 64
    if forward.by_hand_of(by_hand) is None and _is_tiny(spec):
        config = forward.ForwardConfig(1, 64, 2, q_stages=2, ctas_per_sm=3) if narrow else forward.ForwardConfig(1, 64, 2, ctas_per_sm=2)
        if config.fits(spec, device.shared_memory):
            return config
    stretch = WIDE_STRETCH if not narrow else NARROW_STRETCH if is_banded(spec) else FULL_STRETCH
    return forward.config_of(like(spec, stretch), device, by_hand)


def forward_steps(spec: AttentionSpec, device: DeviceFacts, by_hand: Mapping[str, object]) -> tuple[Step, ...]:
    """The kernels of a forward pass."""
    config = _forward_config(spec, device, by_hand)
    tiles = max(most_tiles(spec.queries, packed_of(spec).sequences, config.block_m), 1) * spec.heads
    own = forward.step_of(config, tiles, device)
    if prepared := prepared_step(spec, config.block_m, None, ("out", "lse")):
        return (prepared, *spread_steps(spec), own)
    tables = (*table_steps(spec, config.block_m, None), *spread_steps(spec))
    return (*tables, own, unowned_step(spec.queries, ("out", "lse")))


def backward_steps(spec: AttentionSpec, needs: Needs, device: DeviceFacts, by_hand: Mapping[str, object], adding: bool) -> tuple[Step, ...]:
    """The kernels of a backward pass, in order. adding: whether the kernel that owns keys sums dq up."""
    alike, sequences = like(spec), packed_of(spec).sequences
    keys: Step | None = None
    queries: Step | None = None
    if gives := tuple(name for name, need in (("dk", needs.dk), ("dv", needs.dv), ("dq", adding)) if need):
        own = dkdv.step(alike, device, by_hand, gives)
        assert isinstance(own.config, dkdv.DkdvConfig)
        config = replace(own.config, head_splits=1)
        if own.config.unroll == 2 and own.kernel not in by_hand and is_banded(spec) and spec.bias is None and _is_uneven(spec):
            config = replace(config, unroll=1)  # 0.97 of the time (H200; docs/tuning.md)
        tiles = max(most_tiles(spec.keys, sequences, config.block_n), 1) * spec.kv_heads
        keys = replace(own, config=config, programs=min(tiles, device.sms), order="tile")
    if needs.dq and not adding:
        own = dq.step(alike, device, by_hand, ("dq",))
        chosen = own.config
        assert isinstance(chosen, dq.DqConfig)
        if dq.by_hand_of(by_hand) is None and _is_tiny(spec):
            small = dq.DqConfig(1, 64, 2, 2, ctas_per_sm=3) if _widest(spec) <= 64 else dq.DqConfig(1, 64, 2, 1, ctas_per_sm=2)
            chosen = small if small.fits(spec, device.shared_memory, ("dq",)) else chosen
        tiles = max(most_tiles(spec.queries, sequences, chosen.block_m), 1) * spec.heads
        programs = min(tiles, device.sms * chosen.ctas_per_sm) if chosen.persistent else tiles
        queries = replace(own, config=chosen, programs=programs, order="tile")
    own_bias = needs.dbias and dbias.takes_packed(spec, device)
    block_m = TALL if queries is None else queries.config.block_m  # type: ignore[union-attr]
    if spec.alibi:
        forward_keys = _forward_config(spec, device, by_hand).block_n
        keys, queries = (None if step is None else replace(step, forward_keys=forward_keys) for step in (keys, queries))
    steps = []
    prepared: Step | None = None
    if keys is not None or queries is not None or own_bias:
        block_n = None if keys is None else keys.config.block_n  # type: ignore[union-attr]
        cleared = tuple(name for name, need in (("dq", needs.dq), ("dk", needs.dk), ("dv", needs.dv)) if need)
        prepared = prepared_step(spec, block_m, block_n, cleared)
        steps = table_steps(spec, block_m, block_n) if prepared is None else [prepared]
        steps += spread_steps(spec)
    if needs.dsink or (needs.dbias and not own_bias):  # by row, for those that read it so
        steps.append(rowwise.delta_step(spec, needs.dsink))
    if keys is not None or queries is not None or own_bias:
        steps.append(rowwise.preprocess_step(spec, block_m))
    if keys is not None:
        steps.append(keys)
        given = tuple(name for name in ("dk", "dv") if name in keys.gives)
        if given and prepared is None:
            steps.append(unowned_step(spec.keys, given))
    if queries is not None:
        steps.append(queries)
    if adding:
        steps.append(rowwise.postprocess_step(spec, block_m))
    if needs.dq and prepared is None:
        steps.append(unowned_step(spec.queries, ("dq",)))
    if own_bias:
        steps += dbias.steps(dbias.of_packed(spec), device, by_hand)
    return tuple(steps)
