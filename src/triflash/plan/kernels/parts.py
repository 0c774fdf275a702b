"""The kernels that put parts together (``kernels/triton/combine.py``, and ``dbias_sum`` of ``dbias.py``): configurations and grids.

Called by the rooms of kernels that work in parts, by ``plan/triton.py``, ``plan/hopper.py`` and ``launch/``. Pure. They have no tiles of
scores and no buffers in shared memory, and run wherever there are several parts, which they add in the order of their numbers.
"""

from __future__ import annotations

from ...spec import AttentionSpec, BiasSpec
from ..configs import TileConfig
from ..device import DeviceFacts
from ..steps import Step, ceil_div

__all__ = ["SUM_BLOCK", "combine_step", "dbias_sum_steps", "sum_rows_steps"]

SUM_BLOCK = 1024  # elements that a program of dbias_sum adds up
_OF_ROWS = TileConfig(16, 16, 4, 1)  # a program owns one row
_OF_ELEMENTS = TileConfig(64, 16, 4, 1)


def combine_step(rows: int, splits: int, programs: int, device: DeviceFacts) -> Step:
    """Results over parts of the keys, for so many rows of every head; programs: that give the parts.

    It starts meanwhile (PDL) where these leave half of the SMs to it: a call of some 7 us is half a microsecond shorter then, and one of
    more programs up to two longer (H200; docs/tuning.md).
    """
    pdl = device.arch.startswith("sm") and int(device.arch[2:]) >= 90 and 0 < 2 * programs <= device.sms
    return Step("combine", _OF_ROWS, rows, splits=splits, gives=("out", "lse"), pdl=pdl)


def sum_rows_steps(spec: AttentionSpec, splits: int) -> tuple[Step, ...]:
    """Parts of dq; none of a single one."""
    step = Step("sum_rows", _OF_ROWS, spec.batch * spec.heads * spec.queries, splits=splits, gives=("dq",))
    return (step,) if splits > 1 else ()


def dbias_sum_steps(
    spec: AttentionSpec, splits: int, bias: BiasSpec | None = None, name: str = "dbias", elements: int | None = None
) -> list[Step]:
    """Partial sums of the gradient ``name`` of a bias (None: the first); none of a single one. elements: of the bias, if it is packed."""
    bias = bias or spec.bias
    assert bias is not None
    if elements is None:
        elements = 1
        for size, varies in zip((spec.batch_outer, spec.batch_inner, spec.heads, spec.queries, spec.keys), bias.varies, strict=True):
            elements *= size if varies else 1
    return [Step("dbias_sum", _OF_ELEMENTS, ceil_div(elements, SUM_BLOCK), splits=splits, gives=(name,))] if splits > 1 else []
