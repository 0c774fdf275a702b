"""The whole of ``triflash tune``: compile, judge, time, choose, write, show."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, Protocol

import torch
from rich.console import Console

from ... import __version__
from ...errors import bad_value
from ...plan import overlay
from ...plan.configs import Problem, TileConfig
from ...plan.device import KNOWN_DEVICES, DeviceFacts, facts_of, interpreting, triton_problem, triton_version
from ..terminal import table_console
from . import report
from .candidates import Built, Job, candidates, compiler, shares
from .cases import Case
from .choose import finalists, ranking
from .measure import Bench, Measured
from .options import Options

__all__ = ["Builder", "run", "tune"]

_SHARED_CHECKS = 3  # of the fastest, how many are compiled for the other problems that an entry serves
_FINAL = 4  # times the budget


class Builder(Protocol):
    """What compiles jobs: :class:`~triflash.cli.pool.Compiler`, or a test's stand-in."""

    def build_all(self, jobs: Any, done: Callable[[], None] = ...) -> dict[Job, Built]: ...


def run(options: Options) -> int:
    """Carry the command out. Raises ValueError where this machine cannot do it."""
    if problem := triton_problem():
        raise bad_value("triflash tune", "Triton", problem)
    if interpreting():
        raise bad_value("TRITON_INTERPRET", "0: tuning compiles kernels", "1")
    console = table_console()
    with compiler(options.workers) as workers:
        if options.device is not None:
            return compile_only(options, KNOWN_DEVICES[options.device], workers, console)
        if not torch.cuda.is_available():
            raise bad_value("triflash tune", "a GPU", "a machine without one", "--compile-only sm90 lists what is feasible there")
        return tune(options, facts_of(torch.device("cuda", torch.cuda.current_device())), workers, Bench, console)


def compile_only(options: Options, device: DeviceFacts, compiler: Builder, console: Console) -> int:
    """List the candidates and what the compiler makes of them."""
    jobs = _jobs(options, device)
    with report.progress(console) as bar:
        task = bar.add_task("compiling", total=len(jobs))
        built = compiler.build_all(jobs, lambda: bar.advance(task))
    tried = [report.Tried(job.kernel, job.case, job.config, built[job], None) for job in jobs]
    report.show_built(console, tried, {item: item.built.refused(device, options.spills) for item in tried})
    if options.log is not None:
        report.write_log(options.log, _about(device), tried)
    return 0


def tune(options: Options, device: DeviceFacts, compiler: Builder, bench: Callable[..., Any], console: Console) -> int:
    """Measure every case and write the best configurations. What was found is written as it is found."""
    if options.out.exists():
        overlay.load(options.out, "--out")  # better now than after the work
    jobs = _jobs(options, device)
    tried: list[report.Tried] = []
    results: list[report.Result] = []
    with report.progress(console) as bar:
        task = bar.add_task("compiling", total=len(jobs))
        built = compiler.build_all(jobs, lambda: bar.advance(task))
        # The default is always run: it is what everything is measured against.
        ready = [job for job in jobs if built[job].refused(device, None if _is_default(job) else options.spills) is None]
        task = bar.add_task("measuring", total=len(ready))
        try:
            for cases in _groups(options.cases, device):
                own = [job for job in ready if job.case in cases]
                rounds = _measure(own, cases, device, bench, options.budget, lambda: bar.advance(task))
                tried += [
                    report.Tried(job.kernel, job.case, job.config, built[job], _last(rounds.get((job.kernel, job.case)), job.config))
                    for job in jobs
                    if job.case in cases
                ]
                chosen = _choose(rounds, cases, device, compiler, options.margin)
                entries = [_entry(kernel, config, cases, rounds, device) for kernel, config in chosen.items()]
                if entries:
                    overlay.write(options.out, entries)
                results += _results(chosen, cases, rounds, jobs, device)
        finally:
            bar.stop()
            report.show(console, results, tried)
            if options.log is not None:
                report.write_log(options.log, _about(device), tried)
    if not results:
        console.print("nothing was measured: none of the kernels asked for runs in these problems")
        return 1
    console.print(f"written to {options.out}; use it with TRIFLASH_TUNED={options.out} or with triflash.tuned(...)", highlight=False)
    return 0


Rounds = dict[tuple[str, Case], list[dict[TileConfig, Measured]]]


def _jobs(options: Options, device: DeviceFacts) -> list[Job]:
    return [
        Job(case, kernel, config, device)
        for case in options.cases
        for kernel in case.kernels(device)
        if kernel in options.kernels
        for config in candidates(case.problem(kernel, device), device, case.default(kernel, device))
    ]


def _is_default(job: Job) -> bool:
    return job.config == job.case.default(job.kernel, job.device)


def _groups(cases: tuple[Case, ...], device: DeviceFacts) -> list[list[Case]]:
    """Cases that share their entries: the same head dim, element size, bias or not, causal or not."""
    groups: dict[Problem, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.problem("forward", device), []).append(case)
    return list(groups.values())


def _measure(
    jobs: list[Job], cases: list[Case], device: DeviceFacts, bench: Callable[..., Any], budget: float, done: Callable[[], None]
) -> Rounds:
    """Two rounds in each case: all configurations, then the fastest few and the default for longer."""
    rounds: Rounds = {}
    for case in cases:
        kernels = list(dict.fromkeys(job.kernel for job in jobs if job.case == case))
        if not kernels:
            continue
        on = bench(case, device, torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"))
        for kernel in kernels:
            configs = [job.config for job in jobs if (job.case, job.kernel) == (case, kernel)]
            first = on.measure(kernel, configs, budget, done)
            last = [config for config in finalists(first, case.default(kernel, device)) if config in first and not first[config].problem]
            rounds[kernel, case] = [first, on.measure(kernel, last, _FINAL * budget)]
        del on
    return rounds


def _choose(rounds: Rounds, cases: list[Case], device: DeviceFacts, compiler: Builder, margin: float) -> dict[str, TileConfig]:
    """For each kernel the fastest configuration that also fits wherever else its entry would be used; the default if none beats it."""
    ranked: dict[str, dict[TileConfig, float]] = {}
    first: dict[str, Case] = {}
    for kernel in dict.fromkeys(kernel for kernel, _ in rounds):
        own = [case for case in cases if (kernel, case) in rounds]
        default = own[0].default(kernel, device)
        first[kernel] = own[0]
        ranked[kernel] = ranking([rounds[kernel, case] for case in own], default)
    checks = {
        (kernel, config): shares(Job(first[kernel], kernel, config, device))
        for kernel, order in ranked.items()
        for config in list(order)[:_SHARED_CHECKS]
    }
    built = compiler.build_all([job for jobs in checks.values() for job in jobs])
    chosen = {}
    for kernel, order in ranked.items():
        if not order:
            continue  # the default itself was wrong or did not run: the report says so
        default = first[kernel].default(kernel, device)
        good = [
            config
            for config in list(order)[:_SHARED_CHECKS]
            if order[config] < 1 - margin and all(built[job].refused(device, None) is None for job in checks[kernel, config])
        ]
        chosen[kernel] = good[0] if good else default
    return chosen


def _entry(kernel: str, config: TileConfig, cases: list[Case], rounds: Rounds, device: DeviceFacts) -> overlay.Entry:
    measured = {
        "cases": {
            str(case): {"ms": _ms(rounds[kernel, case], config), "default_ms": _ms(rounds[kernel, case], case.default(kernel, device))}
            for case in cases
            if (kernel, case) in rounds
        },
        "default": str(cases[0].default(kernel, device)),
        "date": datetime.date.today().isoformat(),
        "triflash": __version__,
    }
    return overlay.Entry(
        device.name, device.arch, triton_version(), overlay.kernel_source(), cases[0].problem(kernel, device), config, measured
    )


def _results(chosen: dict[str, TileConfig], cases: list[Case], rounds: Rounds, jobs: list[Job], device: DeviceFacts) -> list[report.Result]:
    found = []
    for kernel, config in chosen.items():
        for case in cases:
            if (kernel, case) in rounds:
                default, own = case.default(kernel, device), rounds[kernel, case]
                tried = sum((job.case, job.kernel) == (case, kernel) for job in jobs)
                ran = sum(not each.problem for each in own[0].values())
                found.append(report.Result(kernel, case, default, _ms(own, default), config, _ms(own, config), tried, ran))
    return found


def _last(rounds: list[dict[TileConfig, Measured]] | None, config: TileConfig) -> Measured | None:
    return next((each[config] for each in reversed(rounds or []) if config in each), None)


def _ms(rounds: list[dict[TileConfig, Measured]], config: TileConfig) -> float:
    """The median of the last round that a configuration was in."""
    found = _last(rounds, config)
    return float("nan") if found is None else found.median


def _about(device: DeviceFacts) -> dict[str, Any]:
    return {
        "gpu": device.name,
        "arch": device.arch,
        "triton": triton_version(),
        "kernels": overlay.kernel_source(),
        "torch": torch.__version__,
        "triflash": __version__,
    }
