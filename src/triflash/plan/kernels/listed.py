"""The kernels that list the tiles of packed sequences for Hopper's fixed grids (``kernels/hopper/listed.py``): configuration and grids.

Called by ``plan/hopper_packed.py`` and ``launch/hopper_packed.py``. Pure. They have no buffers in shared memory, and run wherever Hopper's
kernels take packed sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...spec import AttentionSpec
from ..configs import TileConfig
from ..steps import Step, ceil_div
from .packed import ROWS_A_PROGRAM, most_tiles, packed_of
from .shared import L2_GROUP_BYTES, STATS_MULTIPLE

__all__ = ["TableConfig", "cached_rows", "prepared_step", "rows_of", "spread_length", "spread_steps", "table_steps"]

LISTED_AT_ONCE = 1024  # tiles of a table that one program makes, and sequences, as kernels/hopper/listed.py has it


@dataclass(frozen=True)
class TableConfig(TileConfig):
    """``block_m`` queries and ``block_n`` keys of the tiles that are listed, of other kernels: these may have any number."""

    def __post_init__(self) -> None:
        pass


def table_steps(spec: AttentionSpec, block_m: int | None, block_n: int | None) -> list[Step]:
    """A table of the sequences, and tables of their tiles of so many queries, of so many keys; None: of none."""
    config = TableConfig(block_m or 16, block_n or 16, 4, 1)
    steps = [Step("extents", config)]
    names = [name for name, block in (("queries", block_m), ("keys", block_n)) if block is not None]
    for kernel in ("listed", "ordered"):
        steps += [Step(kernel, config, ceil_div(rows_of(config, spec, name)[1], ROWS_A_PROGRAM), gives=(name,)) for name in names]
    return steps


def prepared_step(spec: AttentionSpec, block_m: int | None, block_n: int | None, gives: tuple[str, ...]) -> Step | None:
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


def rows_of(config: TileConfig, spec: AttentionSpec, name: str) -> tuple[int, int]:
    """(rows of a tile, most tiles but 1 at least) of a table."""
    rows, block = (spec.queries, config.block_m) if name == "queries" else (spec.keys, config.block_n)
    return block, max(most_tiles(rows, packed_of(spec).sequences, block), 1)


def spread_steps(spec: AttentionSpec) -> list[Step]:
    """A bias and a mask over packed keys, each laid out so that TMA can load a sequence's part."""
    if spec.packed is None:
        return []
    steps = []
    for name, own, layout in (("bias", spec.bias, spec.packed.bias_layout), ("mask", spec.mask, spec.packed.mask_layout)):
        if own is not None and own.varies[4] and layout == "keys":
            programs = ceil_div(spec.keys, ROWS_A_PROGRAM) * (spec.heads if own.varies[2] else 1)
            steps.append(Step("spread", TileConfig(ROWS_A_PROGRAM, 16, 4, 1), programs, gives=(name,)))
    return steps


def spread_length(spec: AttentionSpec) -> int:
    """How long a head's bias over packed keys is where each sequence's begins at a multiple of that of statistics."""
    return (ceil_div(spec.keys, STATS_MULTIPLE) + packed_of(spec).sequences) * STATS_MULTIPLE


def cached_rows(spec: AttentionSpec, name: str) -> int:
    """How many rows of what tiles of queries, or of keys, read may share the L2 cache, of a head: keys and values, or queries and dout."""
    width = spec.head_dim + spec.value_dim if name == "queries" else spec.groups * (spec.head_dim + spec.value_dim)
    return max(1, L2_GROUP_BYTES // (2 * width))
