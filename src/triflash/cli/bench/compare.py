"""Two runs beside each other: what moved by more than noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .record import Run

__all__ = ["Move", "compare", "mann_whitney", "show"]


@dataclass(frozen=True)
class Move:
    """One row that both runs have. ratio: median time after over before; p: of the two samples being from one distribution.

    moved: p is below the level, and the medians are at least the effect apart. change: what happened to the row's status, or nothing.
    """

    case: str
    provider: str
    which: str
    before_ms: float
    after_ms: float
    p: float
    moved: bool
    change: str = ""

    @property
    def ratio(self) -> float:
        """Above 1 is slower."""
        return self.after_ms / self.before_ms


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """The two-sided p of the Mann-Whitney U test that a and b come from one distribution; normal approximation, corrected for ties."""
    ordered = sorted([(x, 0) for x in a] + [(x, 1) for x in b])
    total, rank_sum, ties, at = len(ordered), 0.0, 0.0, 0
    while at < total:
        end = at
        while end < total and ordered[end][0] == ordered[at][0]:
            end += 1
        rank_sum += sum(1 for _, of in ordered[at:end] if of == 0) * (at + 1 + end) / 2
        ties += (end - at) ** 3 - (end - at)
        at = end
    n, m = len(a), len(b)
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
    if variance <= 0:
        return 1.0
    off = abs(rank_sum - n * (n + 1) / 2 - n * m / 2)
    return math.erfc(max(0.0, off - 0.5) / math.sqrt(2 * variance))


def compare(before: Run, after: Run, effect: float = 0.02, alpha: float = 0.01) -> list[Move]:
    """Every (workload, provider, pass) that both runs have, the largest change first.

    Args:
        before, after: the runs; rows are matched by all numbers of their workload.
        effect: how far apart the medians must be, relative, to have moved.
        alpha: chance that any row at all is reported by sampling alone: each is tested at ``alpha / rows`` (Bonferroni). What drifts
            between two runs (clocks, temperature, the host) is no sampling noise; the minimum effect is there for it.
    """
    names = {cell.key: cell.name for cell in before.cells}
    then = {(row.cell, row.provider, row.which): row for row in before.rows}
    pairs = [(then[key], row) for row in after.rows if (key := (row.cell, row.provider, row.which)) in then]
    level = alpha / max(1, sum(a.status == b.status == "ok" for a, b in pairs))
    moves = []
    for a, b in pairs:
        if a.status == b.status == "ok":
            p = mann_whitney(a.samples_ms, b.samples_ms)
            ratio = b.median_ms / a.median_ms
            moved = p < level and max(ratio, 1 / ratio) >= 1 + effect
            moves.append(Move(names[a.cell], a.provider, a.which, a.median_ms, b.median_ms, p, moved))
        elif a.status != b.status:
            words = f"{a.status} -> {b.status}" + (f": {b.reason or a.reason}" if b.reason or a.reason else "")
            moves.append(Move(names[a.cell], a.provider, a.which, math.nan, math.nan, 0.0, True, words))
    return sorted(moves, key=lambda move: -abs(math.log(move.ratio)) if not move.change else -math.inf)


def show(before: Run, after: Run, moves: list[Move], console: Console, everything: bool) -> None:
    """Print what moved, and what else differs between the two runs."""
    for name in ("name", "torch", "triton", "cuda", "triflash", "commit"):
        a, b = before.machine.get(name), after.machine.get(name)
        if a != b:
            console.print(f"{name}: {a} -> {b}", markup=False, highlight=False)
    for name in before.ceilings.keys() & after.ceilings.keys():
        ratio = after.ceilings[name]["p50"] / before.ceilings[name]["p50"]
        console.print(f"ceiling, {name}: {100 * (ratio - 1):+.1f} %", markup=False, highlight=False)
    shown = [move for move in moves if move.moved or everything]
    if shown:
        table = Table("case", "provider", "pass", "before, ms", "after, ms", "time", "p", title="\nWhat moved", title_justify="left")
        for move in shown:
            if move.change:
                table.add_row(escape(move.case), move.provider, move.which, "", "", escape(move.change), "")
                continue
            colour = "dim" if not move.moved else "red" if move.ratio > 1 else "green"
            times = (
                f"{move.before_ms:.4g}",
                f"{move.after_ms:.4g}",
                f"[{colour}]{100 * (move.ratio - 1):+.1f} %[/{colour}]",
                f"{move.p:.1g}",
            )
            table.add_row(escape(move.case), move.provider, move.which, *times)
        console.print(table)
    slower = sum(move.moved and not move.change and move.ratio > 1 for move in moves)
    faster = sum(move.moved and not move.change and move.ratio < 1 for move in moves)
    changed = sum(bool(move.change) for move in moves)
    timed = [move.ratio for move in moves if not move.change]
    middle = f"; median change of all {100 * (statistics.median(timed) - 1):+.1f} %" if timed else ""
    console.print(f"{len(moves)} rows in both: {faster} faster, {slower} slower, {changed} of another status{middle}.", highlight=False)
