"""What the times of a run are held to: bars, their verdicts in each cell, and geometric means. Called by ``sweeps`` and ``report``.

Only what passed the gate has a time. Where triflash has none, or no peer has one, a bar is *not judged*, which is not met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from .record import Cell, Row, Run
from .versus import geometric_mean

__all__ = ["KINDS", "Bar", "Mean", "Verdict", "means", "verdicts", "worst_first"]

# What a bar measures -> whether more of it is better.
KINDS = {
    "time": False,  # our time over that of the fastest peer
    "speed": True,  # that of the fastest peer over ours
    "ms": False,  # our time
    "copy": True,  # our share of the bandwidth of a copy
}


def _any(cell: Cell) -> bool:
    return True


def _one(cell: Cell) -> float:
    return 1.0


@dataclass(frozen=True)
class Bar:
    """A limit on what a pass of ``ours`` takes, in each cell in which it was measured and of which ``of`` is true.

    kind: one of :data:`KINDS`. bound: at least, or at most; None is for information. peers: of which the fastest counts; of the kinds
    ``time`` and ``speed``. every: a cell in which one of them has no time is not judged. mean: a bound on the geometric mean over all
    cells, beside. on: a part of the device's name without which there is no bound. per: what the measure is divided by, in a cell: a
    share of the work that a peer does.
    """

    name: str
    ours: str
    which: str
    kind: str
    bound: float | None
    peers: tuple[str, ...] = ()
    every: bool = False
    mean: float | None = None
    on: str = ""
    of: Callable[[Cell], bool] = _any
    per: Callable[[Cell], float] = _one

    @property
    def more_is_better(self) -> bool:
        """Whether ``bound`` says at least."""
        return KINDS[self.kind]

    def share(self, value: float, bound: float) -> float:
        """Of what is allowed: up to 1 the bound is met."""
        return bound / value if self.more_is_better else value / bound


@dataclass(frozen=True)
class Verdict:
    """A bar in one cell. value: what it measures, None where it is not judged, of which ``why`` is the reason. peer: which one counted."""

    bar: Bar
    cell: Cell
    ours_ms: float | None = None
    peer: str = ""
    peer_ms: float | None = None
    value: float | None = None
    why: str = ""

    @property
    def share(self) -> float | None:
        """See :meth:`Bar.share`; None where there is no verdict."""
        return None if self.value is None or self.bar.bound is None else self.bar.share(self.value, self.bar.bound)

    @property
    def met(self) -> bool | None:
        """None where there is no verdict."""
        return None if self.share is None else self.share <= 1

    @property
    def facts(self) -> dict[str, Any]:
        """As data; times in milliseconds."""
        bar = self.bar
        mine = {"bar": bar.name, "case": self.cell.name, "dtype": self.cell.dtype, "provider": bar.ours, "pass": bar.which}
        times = {"ms": self.ours_ms, "peer": self.peer, "peer_ms": self.peer_ms}
        return {**mine, **times, "kind": bar.kind, "value": self.value, "bound": bar.bound, "met": self.met, "reason": self.why}


@dataclass(frozen=True)
class Mean:
    """What a bar comes to over its cells. judged: how many have a value, of ``cells``; met: how many met the bound, None without one.
    complete: False where the run was interrupted, so that cells may be missing.
    """

    bar: Bar
    cells: int
    judged: int
    met: int | None
    value: float | None
    worst: Verdict | None
    complete: bool = True

    @property
    def mean_met(self) -> bool | None:
        """Whether the bound on the mean is: None without one, where a cell is not judged, or where cells may be missing."""
        if self.bar.mean is None or self.value is None or self.judged < self.cells or not self.complete:
            return None
        return self.bar.share(self.value, self.bar.mean) <= 1

    @property
    def facts(self) -> dict[str, Any]:
        """As data, beside those of :class:`Verdict`."""
        bar, worst = self.bar, self.worst
        counts = {"cells": self.cells, "judged": self.judged, "cells_met": self.met}
        least = {"worst": None if worst is None else worst.value, "worst_case": None if worst is None else worst.cell.name}
        told = {"bar": bar.name, "kind": bar.kind, "geometric_mean": self.value, "bound": bar.mean, "met": self.mean_met}
        return {**told, **counts, **least}


def verdicts(run: Run, bars: Iterable[Bar]) -> list[Verdict]:
    """Every bar in every cell that its provider was asked for, bar by bar."""
    found = []
    for bar in bars:
        if bar.on not in str(run.machine.get("name", "")):
            bar = replace(bar, bound=None, mean=None)
        for cell in run.cells:
            row = run.row(cell, bar.ours, bar.which)
            if row is not None and bar.of(cell):
                found.append(_verdict(run, bar, cell, row))
    return found


def _verdict(run: Run, bar: Bar, cell: Cell, row: Row) -> Verdict:
    if row.status != "ok":
        return Verdict(bar, cell, why=f"{bar.ours}: {_reason(row)}")
    ours = row.median_ms
    if bar.kind == "ms":
        return Verdict(bar, cell, ours, value=ours)
    if bar.kind == "copy":
        share = run.of_ceiling(cell, row).get("copy")
        return Verdict(bar, cell, ours, value=share, why="" if share is not None else "no copy was measured")
    rows = {name: run.row(cell, name, bar.which) for name in bar.peers}
    times = {name: peer.median_ms for name, peer in rows.items() if peer is not None and peer.status == "ok"}
    if not times or (bar.every and len(times) < len(rows)):
        rows = {name: peer for name, peer in rows.items() if name not in times}
        return Verdict(bar, cell, ours, why="; ".join(f"{name}: {_reason(peer)}" for name, peer in rows.items()))
    fastest = min(times, key=times.__getitem__)
    ratio = times[fastest] / ours if bar.more_is_better else ours / times[fastest]
    return Verdict(bar, cell, ours, fastest, times[fastest], ratio / bar.per(cell))


def _reason(row: Row | None) -> str:
    return "was not asked for" if row is None else f"WRONG: {row.reason}" if row.status == "WRONG" else row.reason


def means(found: Iterable[Verdict], bars: Iterable[Bar], complete: bool = True) -> list[Mean]:
    """Of each bar what its verdicts come to. complete: whether the run is."""
    all_of_them, made = list(found), []
    for bar in bars:
        own = [each for each in all_of_them if each.bar.name == bar.name]
        bar = own[0].bar if own else bar
        values = [each for each in own if each.value is not None]
        mean = geometric_mean(each.value for each in values if each.value is not None)
        met = None if bar.bound is None else sum(each.met is True for each in own)
        made.append(Mean(bar, len(own), len(values), met, mean, min(values, key=_badness, default=None), complete))
    return made


def _badness(each: Verdict) -> float:
    """The smaller the worse, of verdicts that have a value."""
    value = each.value or 0.0
    return value if each.bar.more_is_better else -value


def worst_first(found: Iterable[Verdict]) -> list[Verdict]:
    """Missed by most, then not judged, then met by least, then for information alone."""

    def place(each: Verdict) -> tuple[int, float]:
        if each.value is None:
            return 1, 0.0
        if each.share is None:
            return 3, 0.0
        return (0 if each.share > 1 else 2), -each.share

    return sorted(found, key=place)
