"""Hopper's kernels that go over rows (``kernels/hopper/preprocess.py``, ``postprocess.py``), before and after those with tiles of scores.

Called by ``plan/hopper.py``, ``plan/hopper_packed.py`` and ``launch/hopper_backward.py``. Pure. Their configuration and grids; they have no
buffers in shared memory, and run wherever Hopper's backward kernels do.
"""

from __future__ import annotations

from ...spec import AttentionSpec
from ..configs import TileConfig
from ..steps import Step, ceil_div
from .packed import most_tiles, packed_of
from .shared import ROWS, stats_length

__all__ = ["CONFIG", "FLAGS", "delta_step", "dkdv_sum_step", "postprocess_step", "preprocess_step"]

CONFIG = TileConfig(ROWS, 16, 4, 1)  # a program has 64 rows of a head
FLAGS = 512  # which preprocess sets if lse is small: kernels/hopper/preprocess.py says so


def preprocess_step(spec: AttentionSpec, block_m: int = ROWS) -> Step:
    """The table of statistics. block_m: queries of a tile, of packed sequences, each of which it takes in parts of 64."""
    rows = stats_length(spec) // CONFIG.block_m if spec.packed is None else _parts(spec, block_m)
    return Step("preprocess", CONFIG, spec.batch * spec.heads * rows)


def postprocess_step(spec: AttentionSpec, block_m: int = ROWS) -> Step:
    """dq from its float32 sum."""
    rows = ceil_div(spec.queries, CONFIG.block_m) if spec.packed is None else _parts(spec, block_m)
    return Step("postprocess", CONFIG, spec.batch * spec.heads * rows, gives=("dq",))


def _parts(spec: AttentionSpec, block_m: int) -> int:
    """Of all tiles that sequences may have, of a head."""
    return max(most_tiles(spec.queries, packed_of(spec).sequences, block_m), 1) * (block_m // ROWS)


def delta_step(spec: AttentionSpec, dsink: bool) -> Step:
    """delta by row, of packed sequences, for what reads it so: the gradient of a sink, and portable kernels."""
    return Step("delta", CONFIG, ceil_div(spec.queries, ROWS) * spec.heads, gives=("dsink",) * dsink)


def dkdv_sum_step(spec: AttentionSpec, splits: int, gives: tuple[str, ...]) -> Step:
    """dk and dv from the sums of so many parts of the query heads."""
    return Step("dkdv_sum", CONFIG, spec.batch * spec.kv_heads * ceil_div(spec.keys, CONFIG.block_m), splits=splits, gives=gives)
