"""What the driver gets of a bound pass is what it gets of ``kernel[grid]``: functions, grids, numbers, addresses, tensor maps, what lies there."""

from __future__ import annotations

import weakref
from unittest import mock

import pytest
from problems import Problem, many, step_of
from ways import check_both_ways, nothing_compiled

import triflash
from triflash.bound.cache import Recent
from triflash.bound.call import BoundCall
from triflash.bound.signature import CALLS
from triflash.launch import native

PROBLEMS = [*many("hopper"), *many("triton")]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_both_ways_hand_over_the_same(problem: Problem) -> None:
    check_both_ways(step_of(problem), problem.backend)


@pytest.mark.parametrize("name", ["plain", "copies", "many features", "bias 1hqk", "dropout, seed a tensor", "odd keys"])
@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_tritons_c_launcher_gets_the_same(backend: str, name: str) -> None:
    """Where parameters cannot be handed to the driver as they lie."""
    (problem,) = [each for each in many(backend) if each.name == name]
    CALLS.clear()
    with mock.patch.object(native, "_libcuda", lambda: None), mock.patch.object(native, "_forms", weakref.WeakKeyDictionary()):
        check_both_ways(step_of(problem), backend)
        assert not any(each.numbers for each in launches_of(CALLS))
    CALLS.clear()


def launches_of(calls: Recent[BoundCall]) -> list[native.Launch]:
    passes = [each for call in calls._entries.values() for each in (call.forward, *call._backward._entries.values())]
    return [launch for each in passes if each._steps is not None for launch in each._steps._launches.launches]


def test_the_table_reaches_every_kernel() -> None:
    reached = set()
    for problem in PROBLEMS:
        with triflash.record_launches() as recorded, nothing_compiled():
            step_of(problem).run()
        reached |= {" ".join(line.split()[:2]) for line in recorded}
    hopper = ("forward", "preprocess", "dkdv", "dqdkdv", "dq", "postprocess", "dbias", "dbias_sum", "dkdv_sum")
    assert reached == {f"hopper: {name}" for name in hopper} | {
        f"triton: {name}" for name in ("forward", "delta", "dkdv", "dq", "dbias", "dbias_sum", "short_forward", "short_backward")
    }
