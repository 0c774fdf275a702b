"""Interleaving, budgets and failures of the clock; the GPU's side on a mocked CUDA."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from triflash.cli.bench import machine, timing
from triflash.cli.bench.timing import Samples, measure_interleaved, quantiles

CPU = torch.device("cpu")


class Clock:
    """Time that passes only where a test says so, and a device that does its work after the host has gone on."""

    def __init__(self) -> None:
        self.now = self.device_done = 0.0
        self.log: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def call(self, host: float, device: float = 0.0) -> Callable[[], None]:
        """What takes the host and the device so many seconds."""

        def take() -> None:
            self.log.append("call")
            self.now += host
            self.device_done = max(self.device_done, self.now) + device

        return take

    def synchronize(self, _: Any = None) -> None:
        self.log.append("wait")
        self.now = max(self.now, self.device_done)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_calls_take_turns_and_slow_ones_are_spread(clock: Clock) -> None:
    order: list[str] = []
    found = measure_interleaved({"quick": clock.call(2**-10), "slow": clock.call(2**-6)}, device=CPU, budget=0.5, after=order.append)
    assert len(found["quick"].ms) == 512 and len(found["slow"].ms) == 32  # what fits the budget
    assert set(found["quick"].ms) == {1000 * 2**-10} and set(found["slow"].ms) == {1000 * 2**-6}
    at = [i / len(order) for i, name in enumerate(order) if name == "slow"]
    assert min(at) < 0.25 and max(at) > 0.75 and all(b - a < 0.25 for a, b in itertools.pairwise(at))


def test_fewest_and_most_samples(clock: Clock) -> None:
    found = measure_interleaved({"a": clock.call(0.002)}, device=CPU, budget=0.0, min_samples=4)
    assert len(found["a"].ms) == 4
    found = measure_interleaved({"a": lambda: None}, device=CPU, budget=1.0, max_samples=7)
    assert len(found["a"].ms) == 7


def test_a_failing_call_leaves_the_others_alone() -> None:
    count = [0]

    def breaks() -> None:
        count[0] += 1
        if count[0] > 8:
            raise RuntimeError("later")

    def never() -> None:
        raise ValueError("at once")

    found = measure_interleaved({"breaks": breaks, "never": never, "fine": lambda: None}, device=CPU, max_samples=20)
    assert str(found["breaks"].error) == "later" and len(found["breaks"].ms) == 4  # after three warm-up calls and a probe
    assert str(found["never"].error) == "at once" and found["never"].ms == []
    assert found["fine"].error is None and len(found["fine"].ms) == 20


@pytest.mark.parametrize(
    "which, host, device, wanted",
    [
        ("host", 0.25, 1.0, 0.25),
        ("host", 1.0, 0.25, 1.0),
        ("eager", 1.0, 0.25, 1.0 + 0.25 / 24),  # the host's, and the last call's on the device
        ("eager", 0.25, 1.0, 1.0 + 0.25 / 24),  # the device's, and the first call's on the host
    ],
)
def test_the_host_alone_and_the_eager_program(which: str, host: float, device: float, wanted: float, clock: Clock) -> None:
    """Milliseconds. A batch of the host is 16 calls, one of the eager program here 24."""
    with mock.patch.object(torch.cuda, "synchronize", clock.synchronize):
        calls = {"a": clock.call(host / 1e3, device / 1e3)}
        found = measure_interleaved(calls, device=torch.device("cuda"), max_samples=5, clock=which)["a"]
    assert found.ms == pytest.approx([wanted] * 5)
    batch = ["wait", *["call"] * 16] if which == "host" else ["wait", *["call"] * 24, "wait"]
    assert clock.log[-len(batch) :] == batch


def test_what_is_entered_is_entered_around_each_sample_and_not_timed() -> None:
    log: list[str] = []

    @contextmanager
    def around() -> Any:
        log.append("enter")
        yield
        log.append("leave")

    measure_interleaved({"a": lambda: log.append("call")}, device=CPU, max_samples=3, clock="host", around={"a": around})
    assert log == ["enter", *["call"] * 4, "leave", *["enter", *["call"] * 16, "leave"] * 3]
    with pytest.raises(ValueError, match="^clock: wanted one of device, host, eager, got 'wall'"):
        measure_interleaved({}, device=CPU, clock="wall")


def test_quantiles() -> None:
    assert quantiles([5.0]) == dict.fromkeys(("p10", "p25", "p50", "p75", "p90"), 5.0)
    assert quantiles([float(x) for x in range(100, -1, -1)]) == {"p10": 10.0, "p25": 25.0, "p50": 50.0, "p75": 75.0, "p90": 90.0}


class Event:
    """Remembers when it was recorded, in the order of a stream."""

    log: list[str]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = len(self.log)
        self.log.append("event")

    def elapsed_time(self, other: Any) -> float:
        assert self.log[self.at : other.at + 1] == ["event", "call", "event"], "events go around the call only"
        return 2.0


@pytest.mark.parametrize("flush, clean", [(True, False), (True, True), (False, False), (False, True)])
def test_on_a_gpu_events_go_around_the_call_after_sleep_and_flush(flush: bool, clean: bool) -> None:
    log: list[str] = []
    Event.log = log
    sizes = []

    class Scratch:
        def zero_(self) -> None:
            log.append("flush")

        def amax(self) -> None:
            log.append("read")

    def empty(size: int, dtype: torch.dtype, **_: Any) -> Scratch:
        sizes.append(size * dtype.itemsize)
        return Scratch()

    properties = mock.Mock(L2_cache_size=50 * 2**20)
    with (
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(torch.cuda, "get_device_properties", lambda _: properties),
        mock.patch.object(torch.cuda, "Event", Event),
        mock.patch.object(torch.cuda, "_sleep", lambda cycles: log.append("sleep")),
        mock.patch.object(timing.torch, "empty", empty),
    ):
        found = measure_interleaved(
            {"a": lambda: log.append("call")}, device=torch.device("cuda"), max_samples=40, flush=flush, clean=clean
        )["a"]
    assert found.error is None and found.ms == [2.0] * 40
    assert sizes == [100 * 2**20] * (flush + (flush and clean))
    once = ["sleep", *["flush"] * flush, *["read"] * (flush and clean), "event", "call", "event"]
    assert log[4:] == once * 40


@pytest.mark.parametrize("copy, kernel", [(2.0, 1.0), (1.0, 2.0)])
def test_a_copys_bandwidth_is_that_of_the_faster_way(copy: float, kernel: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(calls: dict[str, Callable[[], object]], **_: object) -> dict[str, Samples]:
        for call in calls.values():
            call()
        return {name: Samples([{"copy": copy, "by a kernel": kernel}[name]] * 3) for name in calls}

    monkeypatch.setattr(machine, "measure_interleaved", measured)
    found = machine.ceilings(torch.device("cpu"), ())
    assert list(found) == ["copy"] and found["copy"]["bytes_per_second"] == pytest.approx(2 * 2**26 / 1e-3)
