"""``triflash bench``, strung together: compile ahead, measure every cell, save after each, show. Called by the command line."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from ..terminal import line_on_stderr, steps_on_stderr, table_console
from . import compare as comparison
from . import machine, plots, report
from .measure import DeviceLostError, Settings, compile_only, measure, pieces
from .options import Options
from .providers import one_line, provider
from .record import Cell, Run

__all__ = ["compare", "plot", "run"]

FINE, FAILED = 0, 1


def run(options: Options) -> int:
    """Measure, show and save. Returns 0, or 1 if triflash was wrong somewhere or the device was lost.

    Raises OSError if ``out`` fails, and KeyboardInterrupt once it has shown what there was.
    """
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    settings = Settings(tuple(options.passes), device, options.budget, options.min_samples, options.seed, options.breakdown)
    if options.part is not None:
        return _prepare_part(options, settings)
    console = table_console()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.prepare and device.type == "cuda":
        _prepare(options, settings)
    kept = {name: getattr(options, name) for name in ("note", "budget", "min_samples", "seed", "passes", "sweep", "all")}
    kept["words"] = _without_out(options.words)
    found = Run(machine.facts(device), kept)
    lost = ""
    stopped: KeyboardInterrupt | None = None
    started = time.monotonic()
    try:
        crews = [[provider(name) for name in job.providers] for job in options.jobs]
        total = sum(pieces(crew, job.passes, options.breakdown) for job, crew in zip(options.jobs, crews, strict=True))
        with steps_on_stderr(total + 1) as tell:
            tell("ceilings")
            found.ceilings = machine.ceilings(device, dict.fromkeys(w.dtype for w in options.workloads))
            for job, crew in zip(options.jobs, crews, strict=True):
                rows = measure(job.workload, crew, replace(settings, passes=job.passes), tell)
                found.cells.append(Cell.of(job.workload, job.passes))
                found.rows += rows
                report.save_samples(found, options.out)
        found.complete = True
    except DeviceLostError as error:
        lost = str(error)
    except KeyboardInterrupt as error:
        stopped = error
    finally:  # an interrupted run leaves what it has
        found.machine["seconds"] = round(time.monotonic() - started, 1)
        with contextlib.suppress(RuntimeError):  # of a device that was lost
            found.machine["clocks_after"] = machine.clocks(device)
        written = [*report.save(found, options.out), *plots.draw(found, options.out)]
    report.show(found, console)
    console.print("\nWritten: " + ", ".join(map(str, written)), highlight=False, soft_wrap=True, markup=False)
    if lost:
        console.print(f"[red]Stopped:[/red] {lost}", highlight=False)
    if stopped is not None:
        raise stopped
    wrong = any(row.status == "WRONG" and row.provider.startswith("triflash") for row in found.rows)
    return FAILED if lost or wrong else FINE


def compare(before: Path, after: Path, effect: float, alpha: float, everything: bool) -> int:
    """``triflash bench compare``; effect in percent. Raises ValueError or OSError for files that are no runs."""
    a, b = Run.load(before), Run.load(after)
    comparison.show(a, b, comparison.compare(a, b, effect / 100, alpha), table_console(), everything)
    return FINE


def plot(path: Path, folder: Path | None, picture: Path | None = None) -> int:
    """``triflash bench plot``: tables and pictures again from the samples, or the one picture alone. Raises ValueError or OSError."""
    found = Run.load(path)
    if picture is not None:
        table_console().print(f"Written: {plots.draw_picture(found, picture)}", highlight=False, soft_wrap=True, markup=False)
        return FINE
    folder = path.parent if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    console = table_console()
    report.show(found, console)
    written = [*report.save(found, folder), *plots.draw(found, folder)]
    console.print("\nWritten: " + ", ".join(map(str, written)), highlight=False, soft_wrap=True, markup=False)
    return FINE


def _without_out(words: tuple[str, ...]) -> list[str]:
    """The command line for the record: where its files went is nobody's business."""
    kept = [word for at, word in enumerate(words) if word != "--out" and (at == 0 or words[at - 1] != "--out")]
    return [word for word in kept if not word.startswith("--out=")]


def _prepare(options: Options, settings: Settings) -> None:
    """Start the workers and wait for them. What fails in one fails again, with its reason, in the run itself."""
    work = _compilations(options, settings)
    count = min(options.prepare, len(work))
    if not count:
        return
    line_on_stderr(f"Compiling {len(work)} times in {count} processes …")
    started = time.monotonic()
    # Inductor's own pool of compilers would be one more pool in each worker.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    errors = [tempfile.TemporaryFile("w+") for _ in range(count)]  # noqa: SIM115 (closed below)
    workers = []
    try:
        for at in range(count):
            command = [sys.executable, "-m", "triflash", *options.words, "--prepare-part", f"{at}/{count}"]
            workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors[at]))
        for at, worker in enumerate(workers):
            if worker.wait():
                errors[at].seek(0)
                last = (errors[at].read().strip().splitlines() or ["no message"])[-1]
                line_on_stderr(f"A compiling process stopped with status {worker.returncode}: {last}")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        for file in errors:
            file.close()
    line_on_stderr(f"Compiled in {time.monotonic() - started:.0f} s.")


def _compilations(options: Options, settings: Settings) -> list[tuple[int, str]]:
    """(index of a job, provider) of everything that has something to compile, providers in their order."""
    found = [
        (at, name)
        for at, job in enumerate(options.jobs)
        for name in job.providers
        if provider(name).compiles and provider(name).why_not(job.workload, settings.device) is None
    ]
    order = list(dict.fromkeys(name for _, name in found))
    return sorted(found, key=lambda item: order.index(item[1]))


def _prepare_part(options: Options, settings: Settings) -> int:
    assert options.part is not None
    part, parts = options.part
    for at, name in _compilations(options, settings)[part::parts]:
        job = options.jobs[at]
        try:
            compile_only(job.workload, provider(name), replace(settings, passes=job.passes))
        except Exception as error:  # noqa: BLE001 (the run itself will say so in its table)
            sys.stderr.write(f"{job.workload.name}, {name}: {one_line(error)}\n")
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
    return FINE
