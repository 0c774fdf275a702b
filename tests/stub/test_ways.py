"""When launches step aside for Triton's own way, and that they go the bound way otherwise."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import gpu
import pytest
import torch
from torch import Tensor
from triton import knobs
from ways import OURS, bound_launches

from triflash import attention, launch
from triflash.bound.signature import CALLS
from triflash.launch import native

BACKENDS = ["triton", "hopper"]
Q = torch.zeros(1, 400, 2, 32, dtype=torch.bfloat16)  # beyond rows that have kernels of their own


@pytest.fixture(autouse=True)
def warm() -> None:
    """Both kinds of the kernel are bound before anything changes."""
    CALLS.clear()
    for backend in BACKENDS:
        assert ways(backend) == (1, 1)


def ways(backend: str, q: Tensor = Q) -> tuple[int, int]:
    """How many launches one call makes, and how many of them go the bound way."""
    before = gpu.launches()
    with bound_launches() as bound:
        attention(q, q, q, backend=backend)
    return gpu.launches() - before, len(bound)


def kernel_of(backend: str) -> tuple[Any, str]:
    """Where a forward kernel lies, and under which name."""
    from triflash.kernels.hopper import forward as hopper
    from triflash.kernels.triton import forward as triton

    return {"hopper": hopper, "triton": triton}[backend], "forward"


@contextmanager
def hooked(name: str, hook: Any) -> Iterator[None]:
    """One of Triton's launch hooks, as profilers set it."""
    chain = getattr(knobs.runtime, name)
    if hasattr(chain, "add"):
        chain.add(hook)
        try:
            yield
        finally:
            chain.remove(hook)
    else:
        with mock.patch.object(knobs.runtime, name, hook):
            yield


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_launch_hooks_see_every_launch(backend: str, name: str) -> None:
    seen: list[str] = []
    for _ in range(2):
        with hooked(name, lambda metadata: seen.append(metadata.get()["name"])):
            assert ways(backend) == (1, 0)
        assert ways(backend) == (1, 1)
    assert seen == ["forward"] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hook_that_is_there_from_the_first(backend: str) -> None:
    """What is bound under it goes the bound way once it is gone."""
    CALLS.clear()
    with hooked("launch_enter_hook", lambda _: None):
        assert ways(backend) == ways(backend) == (1, 0)
    assert ways(backend) == (1, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_environment_switches_it_off(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        monkeypatch.setenv("TRIFLASH_BIND", "0")
        assert ways(backend) == (1, 0)
        monkeypatch.setenv("TRIFLASH_BIND", "1")
        assert ways(backend) == (1, 1)
    monkeypatch.delenv("TRIFLASH_BIND")
    assert ways(backend) == (1, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_of_a_kernel(backend: str) -> None:
    module, name = kernel_of(backend)
    kernel, seen = getattr(module, name), []
    kernel.add_pre_run_hook(lambda *_, **__: seen.append(1))
    try:
        assert ways(backend) == (1, 0) and seen == [1]
        CALLS.clear()
        assert ways(backend) == (1, 0)
    finally:
        kernel.pre_run_hooks.clear()
    CALLS.clear()
    assert ways(backend) == (1, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kernel_that_somebody_replaced(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tools that trace kernels do: whatever stands under its name is what runs."""
    module, name = kernel_of(backend)
    kernel, grids = getattr(module, name), []

    class Wrapped:
        fn = kernel.fn

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return kernel[grid]

    for _ in range(2):
        with mock.patch.object(module, name, Wrapped()):
            assert ways(backend) == (1, 0)
            CALLS.clear()
            assert ways(backend) == (1, 0)  # bound, as far as that goes, to the stand-in
        CALLS.clear()
        assert ways(backend) == (1, 1)
    assert len(grids) == 4


def test_a_call_bound_to_a_stand_in_finds_the_kernel_again() -> None:
    module, name = kernel_of("triton")

    class Broken:
        fn = getattr(module, name).fn

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            raise KeyError(grid)

    CALLS.clear()
    with mock.patch.object(module, name, Broken()), pytest.raises(KeyError):
        attention(Q, Q, Q, backend="triton")
    attention(Q, Q, Q, backend="triton")
    CALLS.clear()
    assert ways("triton") == (1, 1)


def test_knobs_that_make_another_kernel() -> None:
    """Debug kernels check themselves: a call bound without steps aside, and is bound again when the knob is back."""
    before = knobs.runtime.debug
    for _ in range(2):
        knobs.runtime.debug = True
        try:
            with gpu.watching([Q]) as seen:
                assert ways("triton") == (1, 0)
        finally:
            knobs.runtime.debug = before
        with gpu.watching([Q]) as plain:
            assert ways("triton") == (1, 1)
        assert seen[0].function != plain[0].function, "another kernel"


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unknown_launcher_is_left_alone(backend: str) -> None:
    """A release of Triton that nobody here has seen."""
    CALLS.clear()
    with mock.patch.object(native, "_c_launcher", side_effect=native._Unknown), unknown_kernels():
        assert ways(backend) == ways(backend) == (1, 0)
    CALLS.clear()
    assert ways(backend) == (1, 1)


@contextmanager
def unknown_kernels() -> Iterator[None]:
    """As if no kernel had been bound before."""
    with mock.patch.object(native, "_forms", weakref.WeakKeyDictionary()):
        yield


def launched_by_c() -> AbstractContextManager[Any]:
    """The launches that go through Triton's C launcher, as its mock's calls."""
    return mock.patch.object(native.Launch, "__call__", autospec=True, side_effect=native.Launch.__call__)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_driver_that_takes_other_parameters(backend: str) -> None:
    """Or tells nothing of them, as before CUDA 12.4: Triton's C launcher gets the arguments."""
    for taking in ({"return_value": False}, None):
        CALLS.clear()
        driver = mock.patch.object(native._Libcuda, "takes", **taking) if taking else mock.patch.object(native, "_libcuda", lambda: None)
        with driver, unknown_kernels(), launched_by_c() as launched:
            assert ways(backend) == ways(backend) == (1, 1)
        assert launched.call_count == 2
    CALLS.clear()
    with launched_by_c() as launched:
        assert ways(backend) == (1, 1)
    assert launched.called is not OURS


@pytest.mark.skipif(not OURS, reason="every launch goes through Triton's launcher")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_launch_that_the_driver_refuses(backend: str) -> None:
    """As on a thread that has no context yet: Triton's launcher, which makes one, takes it and those behind it."""
    with launched_by_c() as launched:
        gpu.refuse(1)
        assert ways(backend) == (1, 1) and launched.call_count == 1
        assert ways(backend) == (1, 1) and launched.call_count == 1
    gpu.refuse(2)
    with pytest.raises(RuntimeError, match="Triton Error"):
        ways(backend)


def test_launches_are_kept_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are to be kept, the oldest of which go; what a launch hands over is that of its own addresses."""
    monkeypatch.setattr(native, "_PREPARED", 8)
    native._prepared.clear()
    given = [torch.zeros_like(Q) for _ in range(20)]
    for q in (*given, *reversed(given)):
        with gpu.watching([q], kernels=False) as seen:
            assert ways("hopper", q) == (1, 1)
        assert q.data_ptr() in {each.value for each in seen[0].arguments if each.kind in ("pointer", "map")}
        assert len(native._prepared) <= 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_stream_is_read_at_each_call(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with gpu.watching([Q]) as seen:
        for stream in (0, 0x70, 0, 0x90):
            monkeypatch.setitem(gpu.stream, "current", stream)
            assert ways(backend) == (1, 1)
    assert [each.stream for each in seen] == [0, 0x70, 0, 0x90]


def test_records_while_stepping_aside() -> None:
    for value in ("0", "1"):
        with mock.patch.dict(os.environ, TRIFLASH_BIND=value), launch.record_launches() as ran:
            attention(Q, Q, Q, backend="triton")
        assert [line.split()[:2] for line in ran] == [["triton:", "forward"]]


def test_the_profiler_sees_a_range() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        q: Tensor = Q.clone().requires_grad_()
        attention(q, q, q, backend="triton")
        assert ways("hopper") == (1, 1)
    ranges = {each.key: each.count for each in profile.key_averages()}
    assert ranges["triflash::attention"] == 2
