"""What the driver gets of a bound pass is what it gets of ``kernel[grid]``: functions, grids, numbers, addresses, tensor maps, what lies there."""

from __future__ import annotations

import pytest
from problems import Problem, many, step_of
from ways import check_both_ways, nothing_compiled

import triflash

PROBLEMS = [*many("hopper"), *many("triton")]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_both_ways_hand_over_the_same(problem: Problem) -> None:
    check_both_ways(step_of(problem), problem.backend)


def test_the_table_reaches_every_kernel() -> None:
    reached = set()
    for problem in PROBLEMS:
        with triflash.record_launches() as recorded, nothing_compiled():
            step_of(problem).run()
        reached |= {" ".join(line.split()[:2]) for line in recorded}
    hopper = ("forward", "preprocess", "dkdv", "dqdkdv", "dq", "postprocess", "dbias", "dbias_sum", "dkdv_sum")
    assert reached == {f"hopper: {name}" for name in hopper} | {
        f"triton: {name}" for name in ("forward", "delta", "dkdv", "dq", "dbias", "dbias_sum")
    }
