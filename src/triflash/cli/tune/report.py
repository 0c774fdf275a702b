"""What ``triflash tune`` prints, and its log of every configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...plan.configs import TileConfig
from .candidates import Built
from .cases import Case
from .measure import Measured

__all__ = ["Result", "Tried", "progress", "show", "show_built", "write_log"]

# Tile products of a kernel, of 2 d operations a score each.
_PRODUCTS = {"forward": 2, "dkdv": 4, "dk": 3, "dv": 2, "dq": 3, "dbias": 2}


@dataclass(frozen=True)
class Tried:
    """One configuration of a kernel in a case: what the compiler made of it, and what was measured (None if it was not run)."""

    kernel: str
    case: Case
    config: TileConfig
    built: Built
    measured: Measured | None


@dataclass(frozen=True)
class Result:
    """A kernel in a case: the default and the chosen configuration with their milliseconds, and how many were tried and could run."""

    kernel: str
    case: Case
    default: TileConfig
    default_ms: float
    best: TileConfig
    best_ms: float
    tried: int
    ran: int


def progress(console: Console) -> Progress:
    """A bar with counts."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True
    )


def show(console: Console, results: Iterable[Result], tried: Sequence[Tried]) -> None:
    """The table of default and best, and every configuration that gave a wrong result."""
    table = Table(title="The default configuration of each kernel, and the best that was found", title_justify="left")
    for heading in ("kernel", "problem", "default", "µs", "TFLOP/s", "best", "µs", "TFLOP/s", "faster", "ran of"):
        words = heading in ("kernel", "problem", "default", "best")
        table.add_column(heading, justify="left" if words else "right", overflow="fold")
    for each in results:
        same = each.best == each.default
        times = [(_micro(ms), _speed(each.kernel, each.case, ms)) for ms in (each.default_ms, each.best_ms)]
        faster = "–" if same else f"{100 * (each.default_ms / each.best_ms - 1):.1f} %"
        best = "the default" if same else str(each.best)
        table.add_row(each.kernel, str(each.case), str(each.default), *times[0], best, *times[1], faster, f"{each.ran} of {each.tried}")
    console.print(table)
    for item in tried:
        if item.measured is not None and item.measured.problem:
            console.print(
                f"{item.kernel} {item.config} on {item.case}: {item.measured.problem}", style="red", markup=False, highlight=False
            )


def show_built(console: Console, tried: Sequence[Tried], refused: dict[Tried, str | None]) -> None:
    """A table for each kernel of each case, of a run that only compiles."""
    for kernel, case in dict.fromkeys((item.kernel, item.case) for item in tried):
        table = Table(title=f"{kernel}: {case}", title_justify="left")
        for heading in ("configuration", "registers", "spills", "shared memory", "verdict"):
            table.add_column(heading, justify="left" if heading in ("configuration", "verdict") else "right", no_wrap=True)
        for item in tried:
            if (item.kernel, item.case) == (kernel, case):
                used = item.built.resources
                numbers = ("", "", "") if used is None else (str(used.registers), str(used.spills), str(used.shared_memory))
                table.add_row(str(item.config), *numbers, refused[item] or "feasible")
        console.print(table)


def write_log(path: Path, about: dict[str, Any], tried: Sequence[Tried]) -> None:
    """Every configuration: what it is for, its resources, and each sample in milliseconds or what was wrong."""
    rows = []
    for item in tried:
        used, measured = item.built.resources, item.measured
        rows.append(
            {
                "kernel": item.kernel,
                "case": str(item.case),
                "config": str(item.config),
                "registers": used and used.registers,
                "spills": used and used.spills,
                "shared_memory": used and used.shared_memory,
                "ms": list(measured.ms) if measured else [],
                "problem": (measured.problem if measured else item.built.error) or None,
            }
        )
    lines = ",\n".join(map(json.dumps, rows))
    path.write_text(f'{{"about": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n')


def visible_pairs(case: Case) -> int:
    """Scores of one head that the mask leaves: j <= i if causal."""
    if not case.causal:
        return case.queries * case.keys
    square = min(case.queries, case.keys)
    return square * (square + 1) // 2 + (case.queries - square) * case.keys


def _speed(kernel: str, case: Case, ms: float) -> str:
    flops = _PRODUCTS[kernel] * 2 * case.head_dim * visible_pairs(case) * case.batch * case.heads
    return "–" if math.isnan(ms) else f"{flops / ms * 1e-9:.0f}"


def _micro(ms: float) -> str:
    return "–" if math.isnan(ms) else f"{1e3 * ms:.1f}"
