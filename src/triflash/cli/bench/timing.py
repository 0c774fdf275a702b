"""How long calls take: several of them measured in turns, so that whatever drifts hits all alike. Knows nothing of attention.

Three clocks:

``device``  On a GPU the time between two CUDA events around one call, with the L2 cache overwritten before the first. The host has a head
            start (the GPU sleeps while the call's kernels are queued), so that a call whose launches take longer than its kernels is not
            charged for them. On a CPU the wall time of the call.
``host``    How long the host is busy: the wall time of a few calls until the last has returned, over their number. The GPU has nothing to
            do when they start, and they are too few to fill its queue, so no call waits for it.
``eager``   What a program sees that calls one after the other: the wall time of many calls until the device has done the last, over their
            number. Nobody waits in between, so it is the slower of host and device, and what they do not overlap.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["CLOCKS", "Around", "Call", "Samples", "measure_interleaved", "quantiles"]

Call = Callable[[], Any]
Around = Callable[[], AbstractContextManager[object]]

CLOCKS = ("device", "host", "eager")

MIN_SAMPLES, MAX_SAMPLES, WARMUP = 10, 2000, 3
QUEUED = 16  # samples queued on a GPU before waiting for them: enough to keep it busy, few enough to see errors soon
LONGEST_SLEEP = 2e-3  # seconds of head start; a call that needs more of the host's time is bound by it anyway
FASTEST_CLOCK = 2.5e9  # Hz; sleeping is counted in cycles, and too long a sleep costs only time
FLUSH_AT_LEAST = 64 * 2**20
HOST_CALLS = 16  # of a sample of the host: a GPU takes some 1000 launches before it makes the host wait
EAGER_SECONDS, EAGER_MOST_CALLS = 0.03, 200  # of a sample of an eager program: long enough for its ends to weigh little


@dataclass
class Samples:
    """Times of one call in milliseconds, in the order in which they were taken.

    error: what the call raised, after which it was left out; None if nothing.
    """

    ms: list[float] = field(default_factory=list)
    error: Exception | None = None

    @property
    def median(self) -> float:
        """Milliseconds; NaN if there is no sample."""
        return statistics.median(self.ms) if self.ms else float("nan")


def quantiles(samples: list[float]) -> dict[str, float]:
    """The 10, 25, 50, 75 and 90 % quantiles, interpolated, as ``{"p10": …}``; a single sample is all of them."""
    ordered = sorted(samples)
    found = {}
    for percent in (10, 25, 50, 75, 90):
        at = percent / 100 * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        found[f"p{percent}"] = ordered[low] + (ordered[high] - ordered[low]) * (at - low)
    return found


def measure_interleaved(
    calls: Mapping[str, Call],
    *,
    device: torch.device,
    budget: float = 0.3,
    min_samples: int = MIN_SAMPLES,
    max_samples: int = MAX_SAMPLES,
    warmup: int = WARMUP,
    flush: bool = True,
    clean: bool = False,
    clock: str = "device",
    around: Mapping[str, Around] | None = None,
    after: Callable[[str], None] | None = None,
) -> dict[str, Samples]:
    """Measure every call, one sample of each in turn.

    Args:
        calls: name -> what to call, without arguments. What it returns is dropped.
        device: where the work runs; decides the clock.
        budget: seconds to spend on each call, its warm-up not counted. A call gets as many samples as fit, and no fewer than
            ``min_samples`` nor more than ``max_samples``; the samples of a call that gets fewer are spread over the whole time.
        warmup: calls before the first sample.
        flush: overwrite the L2 cache before each sample (GPUs only).
        clean: read as much behind that, so that the call need not wait while what was written leaves the cache.
        clock: ``device``, ``host`` or ``eager``: see the module.
        around: name -> what is entered around each sample of the call, outside the clock.
        after: called with the name after each sample, for a progress bar.

    Returns:
        :class:`Samples` of every name. A call that raised has ``error`` set, and the samples that it got before; the others go on.
        Raises nothing on the calls' behalf, but a device whose context is lost raises from here as well.
    """
    found = {name: Samples() for name in calls}
    taker = _Clock(device, flush, clean, clock)
    enter: dict[str, Around] = dict.fromkeys(calls, nullcontext) | dict(around or {})
    wanted: dict[str, int] = {}
    for name, call in calls.items():
        try:
            with enter[name]():
                wanted[name] = taker.prepare(name, call, warmup, budget, min_samples, max_samples)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is reported as this call's)
            found[name].error = error
    rounds = max(wanted.values(), default=0)
    for turn in range(rounds):
        for name, count in wanted.items():
            if found[name].error is None and turn * count // rounds != (turn + 1) * count // rounds:
                try:
                    with enter[name]():
                        taker.sample(name, calls[name], found[name])
                except Exception as error:  # noqa: BLE001
                    found[name].error = error
                if after is not None:
                    after(name)
    taker.collect()
    return found


class _Clock:
    """Takes samples on one device."""

    def __init__(self, device: torch.device, flush: bool, clean: bool, clock: str) -> None:
        if clock not in CLOCKS:
            raise ValueError(f"clock: wanted one of {', '.join(CLOCKS)}, got {clock!r}")
        self.device, self.on_gpu, self.clock = device, device.type == "cuda", clock
        self.head_start: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self.pending: list[tuple[Samples, Any, Any]] = []
        self.scratch: torch.Tensor | None = None
        self.unwritten: torch.Tensor | None = None
        if self.on_gpu and flush and clock == "device":
            size = max(FLUSH_AT_LEAST, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
            self.scratch = torch.empty(size, dtype=torch.int8, device=device)
            self.unwritten = torch.empty(size // 4, dtype=torch.int32, device=device) if clean else None

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def prepare(self, name: str, call: Call, warmup: int, budget: float, fewest: int, most: int) -> int:
        """Warm the call up and return how many samples of it fit the budget."""
        for _ in range(max(1, warmup)):
            call()
        self.wait()
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        self.wait()
        seconds = time.perf_counter() - start
        if self.clock == "device":
            self.calls[name] = 1
            self.head_start[name] = int(min(1.5 * host, LONGEST_SLEEP) * FASTEST_CLOCK)
            seconds += min(1.5 * host, LONGEST_SLEEP) if self.on_gpu else 0.0
        elif self.clock == "host":
            self.calls[name] = HOST_CALLS
        else:
            self.calls[name] = min(EAGER_MOST_CALLS, math.ceil(EAGER_SECONDS / max(seconds, 1e-6)))
        seconds *= self.calls[name]
        return min(most, max(fewest, int(budget / max(seconds, 1e-6))))

    def sample(self, name: str, call: Call, into: Samples) -> None:
        if self.clock != "device":
            self.wait()
            count = self.calls[name]
            start = time.perf_counter()
            for _ in range(count):
                call()
            if self.clock == "eager":
                self.wait()
            into.ms.append(1e3 * (time.perf_counter() - start) / count)
            return
        if not self.on_gpu:
            start = time.perf_counter()
            result = call()
            into.ms.append(1e3 * (time.perf_counter() - start))
            del result  # freeing it is not the call's work
            return
        torch.cuda._sleep(self.head_start[name])
        if self.scratch is not None:
            self.scratch.zero_()
        if self.unwritten is not None:
            self.unwritten.amax()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        self.pending.append((into, begin, end))
        if len(self.pending) >= QUEUED:
            self.collect()

    def collect(self) -> None:
        """Wait for the device and read the events."""
        if self.pending:
            self.wait()
            for into, begin, end in self.pending:
                into.ms.append(begin.elapsed_time(end))
            self.pending.clear()
