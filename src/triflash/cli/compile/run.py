"""``triflash compile``, strung together: which kernels, compiled by whom, what they take, where they lie."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ... import __version__
from ...errors import bad_value
from ...plan.device import DeviceFacts, interpreting, triton_problem, triton_version
from ..pool import Compiler, in_a_line
from ..terminal import steps_on_stderr, table_console
from .problems import Launch, Problem

if TYPE_CHECKING:
    from ...launch.ahead import Resources

__all__ = ["Built", "Job", "build", "run"]

_FINE, _FAILED = 0, 1


@dataclass(frozen=True)
class Job:
    """A kernel to compile: the number of a launch of a problem."""

    problem: Problem
    number: int


@dataclass(frozen=True)
class Built:
    """What came of a job. seconds: that the kernel took; cached: Triton's cache had it. launcher: seconds of the C function that launches
    it, None if there is none to build. error: why there is no kernel, or nothing.
    """

    resources: Resources | None = None
    seconds: float = 0.0
    cached: bool = False
    launcher: float | None = None
    error: str = ""


def run(problems: Sequence[Problem], workers: int, cache: Path | None) -> int:
    """Fill the cache and show what is in it. Returns 0, or 1 if a kernel did not compile.

    Raises ValueError where this machine cannot do it, and what ``triflash.explain`` raises for a problem.
    """
    if problem := triton_problem():
        raise bad_value("triflash compile", "Triton", problem)
    if interpreting():
        raise bad_value("TRITON_INTERPRET", "0: the interpreter compiles nothing", "1")
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        os.environ["TRITON_CACHE_DIR"] = str(cache.absolute())  # of the workers as well
    console = table_console()
    launches: dict[str, tuple[Job, Launch]] = {}
    users: dict[str, list[str]] = {}
    for each in problems:
        device = _collect(each, launches, users, console)
    if not launches:
        return _FINE
    jobs = [job for job, _ in launches.values()]
    started = time.monotonic()
    with steps_on_stderr(len(jobs)) as tell, Compiler(min(workers, len(jobs)), build, _crashed) as compiler:
        built = compiler.build_all(jobs, lambda: tell("a kernel compiled"))
    seconds = time.monotonic() - started
    console.print(_table(launches, users, built))
    for job, launch in launches.values():
        if built[job].error:
            console.print(f"{launch.step}, for {job.problem.name}: {built[job].error}", style="red", markup=False, highlight=False)
    for line in _closing(list(built.values()), device, seconds, min(workers, len(jobs))):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return _FAILED if any(each.error for each in built.values()) else _FINE


def build(job: Job) -> Built:
    """Compile a kernel and its launcher, in a worker. Raises nothing."""
    from ...launch import ahead

    try:
        launches, device, _ = job.problem.launches()
        compiled, seconds, cached = ahead.timed(launches[job.number].call, device.arch)
        found = Built(ahead.resources(compiled), seconds, cached)
    except Exception as error:  # noqa: BLE001 (compilers fail in many ways, and each only costs this kernel)
        return Built(error=in_a_line(error))
    start = time.perf_counter()
    try:
        has_launcher = ahead.build_launcher(compiled)
        return replace(found, launcher=time.perf_counter() - start) if has_launcher else found
    except Exception as error:  # noqa: BLE001 (the kernel is there; the first launch builds what this could not)
        return replace(found, error=f"no launcher: {in_a_line(error)}")


def _crashed(reason: str) -> Built:
    return Built(error=reason)


def _collect(problem: Problem, into: dict[str, tuple[Job, Launch]], users: dict[str, list[str]], console: Console) -> DeviceFacts:
    """Add a problem's kernels to those that there are already. Launches that differ in sizes alone are mostly of one kernel."""
    launches, device, backends = problem.launches()
    if not launches:
        console.print(f"{problem.name}, {problem.which}: nothing to compile: {backends} runs it in PyTorch", markup=False, highlight=False)
        return device
    from ...launch import ahead

    for number, launch in enumerate(launches):
        key = ahead.identity(launch.call, device.arch)
        into.setdefault(key, (Job(problem, number), launch))
        users.setdefault(key, []).append(problem.name)
    return device


def _table(launches: dict[str, tuple[Job, Launch]], users: dict[str, list[str]], built: dict[Job, Built]) -> Table:
    table = Table(title="kernels", title_justify="left")
    for heading, justify in (("kernel", "left"), ("pass", "left"), ("for", "left"), *((x, "right") for x in _NUMBERS)):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for key, (job, launch) in launches.items():
        found, mine = built[job], list(dict.fromkeys(users[key]))
        whose = mine[0] + (f" and {len(mine) - 1} more" if len(mine) > 1 else "")
        numbers = ["failed", "", "", ""]
        if found.resources is not None:
            own = found.resources
            numbers = [
                "there" if found.cached else f"{found.seconds:.1f}",
                str(own.registers),
                str(own.spills),
                f"{own.shared_memory / 1024:.1f}",
            ]
        table.add_row(escape(launch.step), launch.which, escape(whose), *numbers)
    return table


_NUMBERS = ("seconds", "registers", "spilled words", "shared, KiB")


def _closing(built: list[Built], device: DeviceFacts, seconds: float, workers: int) -> list[str]:
    """What was done, where it lies, and who finds it there."""
    from ...launch.ahead import cache_folder

    new = [each for each in built if each.resources is not None and not each.cached]
    there = sum(each.cached for each in built)
    launchers = [each.launcher for each in built if each.launcher is not None]
    words = f"{len(new)} kernels compiled in {sum(each.seconds for each in new):.1f} s"
    words += f" and {len(launchers)} launchers built in {sum(launchers):.1f} s" if launchers else ""
    words += f", by {workers} processes in {seconds:.1f} s" + (f"; {there} were in the cache" if there else "")
    folder = cache_folder()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
    python = ".".join(platform.python_version_tuple()[:2])
    same = f"{device.arch}, Triton {triton_version()}, triflash {__version__}, Python {python}"
    return [
        words,
        f"The cache is {folder} ({size:.1f} MiB). To ship it, copy the folder and set TRITON_CACHE_DIR to it.",
        f"It serves {same}, with the same ptxas and Triton's settings in the environment: docs/compile.md",
    ]
