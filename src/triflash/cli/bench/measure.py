"""One workload, all providers: judge each, then time and weigh those that were right."""

from __future__ import annotations

import functools
import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

import triflash

from .breakdown import breakdown
from .compiling import forget
from .contest import FORWARD_ONLY, Contest, Settings, Side
from .flops import HOST_PASSES
from .gate import verdict
from .memory import peak_bytes
from .providers import Provider, one_line
from .record import Row
from .timing import MAX_SAMPLES, Call, measure_interleaved
from .workloads import Workload

__all__ = ["DeviceLostError", "Settings", "compile_only", "measure", "pieces"]

FIRST_LENGTHS = 20  # that the pass ``first`` measures, at least


class DeviceLostError(RuntimeError):
    """The GPU's context is beyond repair: nothing else can run in this process."""


def measure(workload: Workload, providers: Sequence[Provider], settings: Settings, tell: Callable[[str], None]) -> list[Row]:
    """The rows of every provider and pass; ``tell`` hears of each piece of work as it starts: :func:`pieces` of them.

    Whatever a provider raises becomes a dash with its reason. Raises :class:`DeviceLostError` where the GPU cannot go on.
    """
    rows = {(p.name, which): Row(workload.key, p.name, which) for p in providers for which in settings.passes}
    try:
        _measure(workload, providers, settings, tell, rows)
    except DeviceLostError:
        raise
    except Exception as error:  # noqa: BLE001 (the inputs or the reference did not fit, say: the next cell may)
        _check_alive(settings.device, error)
        for row in rows.values():
            if not row.samples_ms and not row.reason:
                row.status, row.reason = "dash", one_line(error)
    gc.collect()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    return list(rows.values())


def pieces(providers: Sequence[Provider], passes: Sequence[str], breakdown: bool = False) -> int:
    """How often :func:`measure` tells of work: for each provider and each pass, and for each breakdown."""
    return len(providers) + len(passes) + (sum(p.is_ours for p in providers) if breakdown else 0)


def _measure(
    workload: Workload,
    providers: Sequence[Provider],
    settings: Settings,
    tell: Callable[[str], None],
    rows: dict[tuple[str, str], Row],
) -> None:
    forget()
    contests: dict[tuple[Workload, str], Contest] = {}
    sides: dict[str, Side] = {}
    for provider in providers:
        tell(f"{workload.name}: judging {provider.name}")
        mine = [rows[provider.name, which] for which in settings.passes]
        why = provider.why_not(workload, settings.device)
        if why is not None:
            for row in mine:
                row.reason = why
            continue
        own = provider.own(workload)
        if own != workload:
            for row in mine:
                row.flops, row.bytes = own.flops(row.which), own.bytes(row.which)
        key = own, provider.name if own.dropout else ""  # whoever draws is judged by his own marks
        try:
            contests[key] = contest = contests.get(key) or Contest(own, settings, True, provider)
        except Exception as error:
            if not own.dropout:
                raise
            for row in mine:
                _fail(row, error, settings.device)
            continue
        side = _judge(contest, provider, mine)
        if side is not None:
            sides[provider.name] = side
    for which in settings.passes:
        tell(f"{workload.name}: timing {which}")
        ready = {name: side for name, side in sides.items() if rows[name, which].status == "ok"}
        own_rows = {name: rows[name, which] for name in ready}
        if which == "first":
            _time_first(workload, [p for p in providers if p.name in ready], own_rows, settings)
        else:
            _time(ready, which, own_rows, settings, workload.cache)
    for provider in providers if settings.breakdown else ():
        if provider.is_ours:
            tell(f"{workload.name}: where the time of {provider.name} goes")
            step = rows.get((provider.name, "host-step"))
            if step is not None and step.status == "ok":
                _break_down(sides[provider.name], step, settings)


def compile_only(workload: Workload, provider: Provider, settings: Settings) -> None:
    """Run every pass of one provider once, so that compilers' caches on disk have what it needs. Raises what it raises."""
    forget()
    side = Side(Contest(provider.own(workload), settings), provider)
    for which in ("fwd", "step") if side.contest.backward else ("fwd",):
        with side.around(which):
            side.call(which)()


def _judge(contest: Contest, provider: Provider, rows: list[Row]) -> Side | None:
    """Fill status and reason of a provider's rows; what to time unless nothing is to be timed."""
    ran: list[str] = []
    wrong: str | None = None
    side: Side | None = None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        todo = rows
        try:
            side = Side(contest, provider)
            with triflash.record_launches() as ran:
                wrong = verdict(contest.parts, side.results("fwd"))
            for row in rows:
                row.status = "ok" if row.which in FORWARD_ONLY else "dash"
            todo = [row for row in rows if row.which not in FORWARD_ONLY]
            if todo and wrong is None:
                with triflash.record_launches() as ran:
                    found = side.results("step")
                wrong = verdict(contest.parts, found)
                for row in todo:
                    row.status = "ok"
        except Exception as error:  # noqa: BLE001
            _check_alive(contest.settings.device, error)
            for row in todo:
                row.status, row.reason = "dash", one_line(error, warned)
    for row in rows:
        if wrong is not None:
            row.status, row.reason = "WRONG", wrong
        elif row.which == "first" and provider.compiles_lengths and row.status == "ok":
            row.status, row.reason = "dash", "compiles anew for every length"
        if provider.is_ours and not row.reason:
            row.ran = [line for line in ran if row.which not in FORWARD_ONLY or "forward" in line]
    return side if any(row.status == "ok" for row in rows) else None


def _time(sides: dict[str, Side], which: str, rows: dict[str, Row], settings: Settings, clean: bool) -> None:
    """Fill samples and peak memory of one pass. clean: as of ``measure_interleaved``."""
    calls: dict[str, Call] = {}
    for name, side in sides.items():
        try:
            calls[name] = side.call(which)
        except Exception as error:  # noqa: BLE001
            _fail(rows[name], error, settings.device)
    found = measure_interleaved(
        calls,
        device=settings.device,
        budget=settings.budget,
        min_samples=settings.min_samples,
        max_samples=max(MAX_SAMPLES, settings.min_samples),
        clean=clean,
        clock="host" if which in HOST_PASSES else "eager" if which == "eager" else "device",
        around={name: functools.partial(sides[name].around, which) for name in calls},
    )
    for name, samples in found.items():
        row = rows[name]
        if samples.error is not None:
            _fail(row, samples.error, settings.device)
            continue
        row.samples_ms = samples.ms
        if which not in ("fwd", "bwd", "step"):
            continue
        try:
            with sides[name].around(which):
                row.peak_bytes = peak_bytes(sides[name].step_with_output if which == "step" else calls[name], settings.device)
        except Exception as error:  # noqa: BLE001
            _fail(row, error, settings.device)


def _time_first(workload: Workload, providers: Sequence[Provider], rows: dict[str, Row], settings: Settings) -> None:
    """Fill samples of the pass ``first``: the host's time of a step at a length for the first time, after steps at lengths round it.

    Lengths are 16 apart, so that all are divisible alike: what a compiler tells apart was compiled for the lengths on either side.
    """

    def step_at(n: int, provider: Provider) -> float:
        longer = replace(workload, queries=workload.queries + 16 * n, keys=workload.keys + 16 * n)
        side = Side(Contest(provider.own(longer), settings), provider)
        with side.around("first"):
            _wait(settings.device)
            start = time.perf_counter()
            found = side.step()
            seconds = time.perf_counter() - start
            _wait(settings.device)
        del found
        return seconds

    count = 2 * max(FIRST_LENGTHS, settings.min_samples)
    order = [n for n in range(count + 1) if n % 2 == 0] + [n for n in range(count + 1) if n % 2]
    for n in order:
        for provider in providers:
            row = rows[provider.name]
            if row.status == "ok":
                try:
                    seconds = step_at(n, provider)
                    if n % 2:
                        row.samples_ms.append(1e3 * seconds)
                except Exception as error:  # noqa: BLE001
                    _fail(row, error, settings.device)


def _break_down(side: Side, row: Row, settings: Settings) -> None:
    """Fill a row's breakdown; a failure leaves it empty, and says so in its place."""
    try:
        with side.around("host-step"):
            row.breakdown = breakdown(side, settings.device, settings.budget)
    except Exception as error:  # noqa: BLE001
        _check_alive(settings.device, error)
        row.breakdown = {"failed": one_line(error)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fail(row: Row, error: Exception, device: torch.device) -> None:
    _check_alive(device, error)
    row.status, row.reason, row.samples_ms = "dash", one_line(error), []


def _check_alive(device: torch.device, error: Exception) -> None:
    """Raise DeviceLostError if an error took the GPU's context with it."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.zeros(1, device=device).item()
        except Exception:  # noqa: BLE001
            raise DeviceLostError(f"the GPU cannot go on after {one_line(error)}") from error
