"""The kernel that looks between which blocks a mask shows anything (``kernels/hopper/mask_bounds.py``), so that Hopper's kernels do not
visit what lies outside: when it runs, its configuration, tables and grid.

Called by ``plan/hopper.py`` and ``launch/mask_bounds.py``. Pure. It has no tiles of scores and no buffers in shared memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import bad_value
from ...spec import AttentionSpec, BiasSpec
from ..configs import TileConfig, chosen
from ..steps import Step, ceil_div
from .shared import ROWS

__all__ = ["CONFIG", "MaskBoundsConfig", "entries", "mask_of", "members", "steps"]

LEAST_SCORES = 2**26  # of a pass, some 40 us on an H200, beside which one launch more is little
LEAST_KEYS = 256  # of two blocks that kernels walk


@dataclass(frozen=True)
class MaskBoundsConfig(TileConfig):
    """``block_m`` rows of a tile, those of which kernels' tiles are made, and ``block_n`` keys or queries that are looked at in one go."""

    SOURCE = "a rule of plan/kernels/mask_bounds.py, by the size of the problem"

    def __post_init__(self) -> None:
        for name, allowed in (("block_m", (ROWS,)), ("block_n", (16, 32, 64, 128, 256, 512, 1024)), ("num_warps", (1, 2, 4, 8, 16))):
            if getattr(self, name) not in allowed:
                raise bad_value(name, f"one of {allowed}", getattr(self, name))


CONFIG = MaskBoundsConfig(ROWS, 512, 8, 1)


def mask_of(spec: AttentionSpec) -> BiasSpec | None:
    """The mask: beside a bias, or in the place of one."""
    if spec.bias is not None and spec.bias.is_mask:
        return spec.bias
    return spec.mask


def entries(spec: AttentionSpec, name: str) -> tuple[int, int, int, int]:
    """Those of the table for tiles of "queries" or "keys", by (outer batch, inner batch, head, tile): 1 where the mask does not vary. Tiles
    of keys are those of a key head.
    """
    mask = mask_of(spec)
    assert mask is not None
    rows, varies, heads = (spec.queries, mask.varies[3], spec.heads) if name == "queries" else (spec.keys, mask.varies[4], spec.kv_heads)
    sizes = (spec.batch_outer, spec.batch_inner, heads)
    outer, inner, heads = (size if on else 1 for size, on in zip(sizes, mask.varies, strict=False))
    return outer, inner, heads, ceil_div(rows, ROWS) if varies else 1


def members(spec: AttentionSpec, name: str) -> int:
    """How many of the mask's heads share an entry."""
    mask = mask_of(spec)
    return spec.groups if name == "keys" and mask is not None and mask.varies[2] else 1


def steps(spec: AttentionSpec, by_hand: Mapping[str, object], gives: tuple[str, ...]) -> tuple[Step, ...]:
    """The kernel, with tables for tiles of "queries" and of "keys"; none where there is no mask, or too little to be saved."""
    config = chosen(by_hand, "mask_bounds", MaskBoundsConfig)
    if not gives or spec.packed is not None or mask_of(spec) is None:
        return ()
    enough = spec.keys >= LEAST_KEYS and spec.batch * spec.heads * spec.queries * spec.keys >= LEAST_SCORES
    if config is None and not enough:
        return ()
    programs = sum(2 * math.prod(entries(spec, name)) for name in gives)
    return (Step("mask_bounds", config or CONFIG, programs, gives=gives),)
