"""The kernel that looks between which blocks a mask shows anything (``kernels/hopper/mask_bounds.py``), so that Hopper's kernels do not
visit what lies outside, nor load tiles of a mask that hides nothing there: when it runs, its configuration, tables and grid.

Called by ``plan/hopper.py`` and ``launch/mask_bounds.py``. Pure. It has no tiles of scores and no buffers in shared memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...errors import bad_value
from ...spec import AttentionSpec, BiasSpec
from ..configs import TileConfig, chosen
from ..steps import Step, ceil_div
from .shared import ROWS

__all__ = ["CONFIG", "MaskBoundsConfig", "entries", "finds_whole", "mask_of", "members", "programs", "steps"]

LEAST_SCORES = 2**26  # of a pass, some 40 us on an H200, beside which one launch more is little
LEAST_KEYS = 256  # of two blocks that kernels walk
LEAST_SHARING = 4  # scores that share a byte of the mask, which is read once more: at an H200's bandwidth a sixth of a score's time at d 64


@dataclass(frozen=True)
class MaskBoundsConfig(TileConfig):
    """``block_m`` rows of a tile, those of which kernels' tiles are made, and ``block_n`` keys or queries that are looked at in one go.
    whole: it also finds where a mask shows everything, for kernels that load tiles of it.
    """

    whole: bool = True

    SOURCE = "a rule of plan/kernels/mask_bounds.py, by the size of the problem"

    def __post_init__(self) -> None:
        for name, allowed in (("block_m", (ROWS,)), ("block_n", (64, 128, 256, 512, 1024)), ("num_warps", (1, 2, 4, 8, 16))):
            if getattr(self, name) not in allowed:
                raise bad_value(name, f"one of {allowed}", getattr(self, name))

    def __str__(self) -> str:
        return super().__str__() + " whole" * self.whole


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


def finds_whole(spec: AttentionSpec, name: str, config: MaskBoundsConfig) -> bool:
    """Whether the table for tiles of "queries" or "keys" says where the mask shows everything: to kernels that load tiles of it, or rows,
    and can do without. Beside a bias they load both.
    """
    mask = mask_of(spec)
    return config.whole and mask is not None and mask is spec.bias and mask.varies[4] and (name == "queries" or mask.varies[3])


def _is_shared(spec: AttentionSpec) -> bool:
    """Whether so many scores share a byte of the mask that it may be read once more."""
    mask = mask_of(spec)
    assert mask is not None
    sizes = (spec.batch_outer, spec.batch_inner, spec.heads, spec.queries)
    return math.prod(size for size, on in zip(sizes, mask.varies, strict=False) if not on) >= LEAST_SHARING


def steps(spec: AttentionSpec, by_hand: Mapping[str, object], gives: tuple[str, ...]) -> tuple[Step, ...]:
    """The kernel, with tables for tiles of "queries" and of "keys"; none where there is no mask, or too little to be saved."""
    config = chosen(by_hand, "mask_bounds", MaskBoundsConfig)
    if not gives or spec.packed is not None or mask_of(spec) is None:
        return ()
    enough = spec.keys >= LEAST_KEYS and spec.batch * spec.heads * spec.queries * spec.keys >= LEAST_SCORES
    if config is None and not enough:
        return ()
    own = config or replace(CONFIG, whole=_is_shared(spec))
    return (Step("mask_bounds", own, sum(programs(spec, name, own) for name in gives), gives=gives),)


def programs(spec: AttentionSpec, name: str, config: MaskBoundsConfig) -> int:
    """How many fill the table: one an entry that reads all of its rows, else one from either end."""
    return math.prod(entries(spec, name)) * (1 if finds_whole(spec, name, config) else 2)
