"""What the driver gets of a bound pass is what it gets of ``kernel[grid]``: functions, grids, numbers, addresses, tensor maps, what lies there."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import triton
from problems import Problem, many, step_of
from triton.runtime.jit import compute_cache_key
from ways import OURS, binding, check_both_ways, nothing_compiled

import triflash
from expected import once
from running import loops_apart
from triflash.bound.cache import Recent
from triflash.bound.call import BoundCall
from triflash.bound.signature import CALLS
from triflash.launch import compiling, native

PROBLEMS = [*many("hopper"), *many("triton")]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_both_ways_hand_over_the_same(problem: Problem) -> None:
    """And every kernel is one whose parameters the driver takes as they lie."""
    CALLS.clear()
    check_both_ways(step_of(problem), problem.backend)
    assert all((each.numbers is not None) is OURS for each in launches_of(CALLS))


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


@pytest.mark.parametrize("name", ["plain", "many features", "added up", "heads in parts", "wide", "bias 1hqk", "bias 1h1k", "dq alone"])
def test_kernels_launched_for_each_loop(name: str) -> None:
    """They get the same, and what is added up or comes in parts is in the same memory."""
    (problem,) = [each for each in many("hopper") if each.name == name]
    with loops_apart():
        ran = check_both_ways(step_of(problem), "hopper")
    assert any(line.endswith(" for any lse") for line in ran) and len(once(ran)) < len(ran)


def launches_of(calls: Recent[BoundCall]) -> list[native.Launch]:
    passes = [each for call in calls._entries.values() for each in (call.forward, *call._backward._entries.values())]
    return [launch for each in passes if each._steps is not None for launch in each._steps._launches.launches]


def test_the_table_reaches_every_kernel() -> None:
    reached = set()
    for problem in PROBLEMS:
        with triflash.record_launches() as recorded, nothing_compiled():
            step_of(problem).run()
        reached |= {" ".join(line.split()[:2]) for line in recorded}
    hopper = ("forward", "preprocess", "dkdv", "dqdkdv", "dq", "postprocess", "dbias", "dbias_sum", "dkdv_sum", "mask_bounds")
    assert reached == {f"hopper: {name}" for name in hopper} | {
        f"triton: {name}" for name in ("forward", "delta", "dkdv", "dq", "dbias", "dbias_sum", "short_forward", "short_backward")
    }


@pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="other releases of Triton are asked")
def test_launches_that_are_told_alike_take_one_kernel() -> None:
    """What is found by :func:`~triflash.launch.compiling._told` is what Triton's own key finds, at lengths that it specialises on."""
    of_key: dict[tuple[int, Any], str] = {}
    keys: dict[int, set[str]] = {}
    for problem in PROBLEMS:
        plain = problem.bias is None and problem.mask is None
        for more, apart in ((0, False), (0, True), *[(more, problem.apart) for more in (24, 25, 120) if plain]):
            longer = replace(problem, M=problem.M + more, N=problem.N + more, apart=apart)
            step = step_of(longer)
            if apart and "sink" in step.given:  # nothing but its address differs
                sink = step.given["sink"]
                step.given["sink"] = sink.new_zeros(sink.numel() + 1)[1:].requires_grad_(sink.requires_grad)
            with nothing_compiled(), binding() as made:
                step.run()
            passes = [each for call in made for each in (call.kept, call.alone, *call._backward._entries.values())]
            for launch in [launch for each in passes for launch in each.calls or ()]:
                kernel = launch.kernel
                noted = compiling._Noted(kernel, "", [], [], [], {}, {})
                told = compiling._told(noted, launch, ())
                *_, binder = kernel.device_caches[0]
                _, specialization, options = binder(*launch.args, **launch.options, debug=False, instrumentation_mode="")
                key = compute_cache_key({}, specialization, options)
                assert told is not None, f"{kernel.__name__} of {longer}"
                assert of_key.setdefault((id(kernel), told), key) == key, f"{kernel.__name__} of {longer}: another kernel is told alike"
                keys.setdefault(id(kernel), set()).add(key)
    assert len(of_key) <= 2 * sum(map(len, keys.values())), "what is told apart is one kernel"
    assert any(len(own) > 8 for own in keys.values()), "lengths make a difference"
