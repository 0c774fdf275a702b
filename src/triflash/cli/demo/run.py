"""Run the two trainings one after the other, show their progress, compare them. Called by ``triflash demo``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from . import report
from .options import Options

__all__ = ["FAILED", "run"]

FAILED = 1  # exit status: the losses disagree, or a training stopped
MODELS = {"triflash": "triflash", "dense": "PyTorch dense"}


def run(options: Options) -> int:
    """The whole demo; returns the exit status. Raises OSError if the output folder cannot be written to."""
    console = Console()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"A byte-level transformer ({options.layers} layers, width {options.dim}, {options.heads} heads, context {options.seq_len}, "
        f"batch {options.batch}) on {options.device}, {options.dtype} products, fp32 weights.\n"
        "It knows position only from a learned relative-position bias, so nothing is learned without the bias's gradient.\n"
        "Two trainings from one seed on the same batches, each in its own process: attention by triflash, then dense in PyTorch.\n"
    )
    runs: dict[str, dict[str, Any]] = {}
    name_column, loss_column = TextColumn("{task.description:<14}"), TextColumn("{task.fields[loss]}")
    with Progress(name_column, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), loss_column, console=console) as progress:
        tasks = {name: progress.add_task(title, total=options.steps, start=False, loss="") for name, title in MODELS.items()}
        for name, title in MODELS.items():
            progress.start_task(tasks[name])
            try:
                runs[name] = _train(name, options, progress, tasks[name])
            except RuntimeError as error:
                progress.stop()
                Console(stderr=True).print(f"triflash demo: the {title} training failed: {error}", markup=False, highlight=False)
                return FAILED
            progress.stop_task(tasks[name])
    comparison = report.compare(options, runs)
    report.show(console, options, runs, comparison)
    paths = report.write(out, options, runs, comparison)
    console.print("\nWritten: " + ", ".join(map(str, paths)), highlight=False, soft_wrap=True)
    return 0 if comparison["agree"] else FAILED


def _train(name: str, options: Options, progress: Progress, task: TaskID) -> dict[str, Any]:
    """One training in a process of its own; its events, gathered. Raises RuntimeError saying why it stopped."""
    gathered: dict[str, Any] = {"losses": [], "checkpoints": []}
    error = ""
    # Idle OpenMP threads sleep instead of spinning: on cores shared with other programs, spinning costs a factor of ten.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    command = [sys.executable, "-m", "triflash.cli.demo.train", name, json.dumps(asdict(options))]
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        for line in process.stdout or ():
            event = json.loads(line)
            if "loss" in event:
                gathered["losses"].append(event["loss"])
                progress.update(task, completed=event["step"], loss=f"loss {event['loss']:.3f}")
            elif "at" in event:
                gathered["checkpoints"].append(event)
            else:
                gathered |= event.get("result", {})
                error = event.get("error", "")
        status = process.wait()
        if status:
            stderr.seek(0)
            raise RuntimeError(error or stderr.read().strip() or f"exit status {status}")
    return gathered
