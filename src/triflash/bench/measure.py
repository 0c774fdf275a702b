"""One workload, all providers: judge each, then time and weigh those that were right."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import triflash

from . import flexible
from .gate import Part, Problem, reference, verdict
from .memory import peak_bytes
from .providers import Attend, Provider, one_line
from .record import Row
from .timing import MAX_SAMPLES, measure_interleaved
from .workloads import Workload

__all__ = ["DeviceLostError", "Settings", "compile_only", "measure"]

Call = Callable[[], Any]


class DeviceLostError(RuntimeError):
    """The GPU's context is beyond repair: nothing else can run in this process."""


@dataclass(frozen=True)
class Settings:
    """How to measure: which passes, where, seconds for each provider and pass, samples at least, seed of the inputs."""

    passes: tuple[str, ...]
    device: torch.device
    budget: float
    min_samples: int
    seed: int


class _Contest:
    """The tensors of a workload, and what a pass of a provider is."""

    def __init__(self, workload: Workload, settings: Settings) -> None:
        self.workload, self.settings = workload, settings
        self.problem: Problem = workload.build(settings.device, settings.seed)
        self.backward = any(which != "fwd" for which in settings.passes)
        x = self.problem
        self.leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
        bias = x.bias
        self.names = ["out", "dq", "dk", "dv"] if self.backward else ["out"]
        self.bias = bias
        if workload.dbias and bias is not None:
            self.bias = bias.detach().requires_grad_()
            self.leaves.append(self.bias)
            self.names += ["dbias"] if self.backward else []

    def forward(self, attend: Attend) -> Tensor:
        """Without autograd."""
        x = self.problem
        with torch.no_grad():
            return attend(x.q, x.k, x.v, x.bias)

    def train(self, attend: Attend) -> Tensor:
        """With autograd."""
        return attend(self.leaves[0], self.leaves[1], self.leaves[2], self.bias)

    def gradients(self, out: Tensor, retain_graph: bool) -> tuple[Tensor, ...]:
        """Of everything that asks for one."""
        return torch.autograd.grad(out, self.leaves, self.problem.dout, retain_graph=retain_graph)

    def step(self, attend: Attend) -> tuple[Tensor, ...]:
        """Forward and backward; the output comes along, so that it is alive at the peak as it is in training."""
        out = self.train(attend)
        return (out.detach(), *self.gradients(out, retain_graph=False))

    def call(self, attend: Attend, which: str) -> Call:
        """What is timed for a pass."""
        if which == "fwd":
            return lambda: self.forward(attend)
        if which == "bwd":
            out = self.train(attend)
            return lambda: self.gradients(out, retain_graph=True)
        return lambda: self.step(attend)


def measure(workload: Workload, providers: Sequence[Provider], settings: Settings, tell: Callable[[str], None]) -> list[Row]:
    """The rows of every provider and pass; ``tell`` hears of each piece of work as it starts: one for each provider and each pass.

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


def _measure(
    workload: Workload,
    providers: Sequence[Provider],
    settings: Settings,
    tell: Callable[[str], None],
    rows: dict[tuple[str, str], Row],
) -> None:
    flexible.forget()
    contest = _Contest(workload, settings)
    parts = reference(contest.problem, contest.names)
    runners: dict[str, Attend] = {}
    for provider in providers:
        tell(f"{workload.name}: judging {provider.name}")
        attend = _judge(contest, provider, parts, [rows[provider.name, which] for which in settings.passes])
        if attend is not None:
            runners[provider.name] = attend
    for which in settings.passes:
        tell(f"{workload.name}: timing {which}")
        _time(contest, runners, which, [rows[name, which] for name in runners if rows[name, which].status == "ok"])


def compile_only(workload: Workload, provider: Provider, settings: Settings) -> None:
    """Run every pass of one provider once, so that compilers' caches on disk have what it needs. Raises what it raises."""
    flexible.forget()
    contest = _Contest(workload, settings)
    attend = provider.attend(workload, contest.problem)
    contest.forward(attend)
    if contest.backward:
        contest.step(attend)


def _judge(contest: _Contest, provider: Provider, parts: list[Part], rows: list[Row]) -> Attend | None:
    """Fill status and reason of a provider's rows; the function to time unless nothing is to be timed."""
    why = provider.why_not(contest.workload, contest.settings.device)
    if why is not None:
        for row in rows:
            row.reason = why
        return None
    ran: list[str] = []
    wrong: str | None = None
    attend: Attend | None = None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        todo = rows
        try:
            attend = provider.attend(contest.workload, contest.problem)
            with triflash.record_launches() as ran:
                wrong = verdict(parts, {"out": contest.forward(attend)})
            for row in rows:
                row.status = "ok" if row.which == "fwd" else "dash"
            todo = [row for row in rows if row.which != "fwd"]
            if todo and wrong is None:
                with triflash.record_launches() as ran:
                    found = contest.step(attend)
                wrong = verdict(parts, dict(zip(contest.names, found, strict=True)))
                for row in todo:
                    row.status = "ok"
        except Exception as error:  # noqa: BLE001
            _check_alive(contest.settings.device, error)
            for row in todo:
                row.status, row.reason = "dash", one_line(error, warned)
    for row in rows:
        if wrong is not None:
            row.status, row.reason = "WRONG", wrong
        if provider.is_ours and not row.reason:
            row.ran = [line for line in ran if row.which != "fwd" or "forward" in line]
    return attend if any(row.status == "ok" for row in rows) else None


def _time(contest: _Contest, runners: dict[str, Attend], which: str, rows: list[Row]) -> None:
    settings = contest.settings
    calls: dict[str, Call] = {}
    by_name = {row.provider: row for row in rows}
    for name, row in by_name.items():
        try:
            calls[name] = contest.call(runners[name], which)
        except Exception as error:  # noqa: BLE001
            _fail(row, error, settings.device)
    found = measure_interleaved(
        calls,
        device=settings.device,
        budget=settings.budget,
        min_samples=settings.min_samples,
        max_samples=max(MAX_SAMPLES, settings.min_samples),
        wall=which == "step",
    )
    for name, samples in found.items():
        row = by_name[name]
        if samples.error is not None:
            _fail(row, samples.error, settings.device)
            continue
        row.samples_ms, row.wall_ms = samples.ms, samples.wall_ms
        try:
            row.peak_bytes = peak_bytes(calls[name], settings.device)
        except Exception as error:  # noqa: BLE001
            _fail(row, error, settings.device)


def _fail(row: Row, error: Exception, device: torch.device) -> None:
    _check_alive(device, error)
    row.status, row.reason, row.samples_ms, row.wall_ms = "dash", one_line(error), [], []


def _check_alive(device: torch.device, error: Exception) -> None:
    """Raise DeviceLostError if an error took the GPU's context with it."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.zeros(1, device=device).item()
        except Exception:  # noqa: BLE001
            raise DeviceLostError(f"the GPU cannot go on after {one_line(error)}") from error
