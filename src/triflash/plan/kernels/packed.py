"""The kernels around those of packed sequences (``kernels/triton/packed.py``): extents, tables of tiles, zeros. Configuration and grids.

Called by ``plan/packed.py``, ``plan/hopper_packed.py`` and ``launch/``. Pure. None of them has tiles of scores or buffers in shared memory,
and each runs wherever packed sequences do. The host does not know the sequences, only how many there are and how many rows in all.
"""

from __future__ import annotations

from ...spec import AttentionSpec, Packed
from ..configs import TileConfig
from ..steps import Step, ceil_div
from .parts import SUM_BLOCK

__all__ = ["ROWS_A_PROGRAM", "cleared_step", "most_tiles", "packed_of", "table_steps", "unowned_step"]

ROWS_A_PROGRAM = 128  # of the kernels that fill tables, and zeros where no sequence is
_CONFIG = TileConfig(ROWS_A_PROGRAM, 16, 4, 1)


def packed_of(spec: AttentionSpec) -> Packed:
    """What there is of sequences in a spec that has some."""
    assert spec.packed is not None
    return spec.packed


def most_tiles(rows: int, sequences: int, block: int) -> int:
    """How many tiles of so many rows sequences can have that share ``rows`` between them."""
    return rows // block + min(sequences, rows)


def table_steps(spec: AttentionSpec, block_m: int | None, block_n: int | None) -> list[Step]:
    """A table of the sequences, and one of their tiles of so many queries, of so many keys; None: of none."""
    steps = [Step("extents", TileConfig(block_m or 16, block_n or 16, 4, 1), 1)]
    for name, rows, block in (("queries", spec.queries, block_m), ("keys", spec.keys, block_n)):
        if block is not None:
            programs = ceil_div(most_tiles(rows, packed_of(spec).sequences, block), ROWS_A_PROGRAM)
            steps.append(Step("tiles", steps[0].config, programs, gives=(f"tiles of {name}",)))
    return steps


def unowned_step(length: int, gives: tuple[str, ...]) -> Step:
    """Zeros in the rows, of so many, that belong to no sequence."""
    return Step("unowned", _CONFIG, ceil_div(length, ROWS_A_PROGRAM), gives=gives)


def cleared_step(elements: int, name: str) -> Step:
    """Zeros in the gradient ``name`` of a bias of so many elements, some of which no sequence reaches."""
    return Step("cleared", _CONFIG, ceil_div(elements, SUM_BLOCK), gives=(name,))
