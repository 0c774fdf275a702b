"""Each cell of a run beside its best peer: who that is, how many times as fast triflash is, and what measures the cell alone."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .record import Cell, Row, Run
from .simpler import is_simpler

__all__ = ["Versus", "beside_best_peer", "command", "compared", "geometric_mean"]


@dataclass(frozen=True)
class Versus:
    """A pass of a cell. ours: triflash's row, whatever its status. peer: the fastest peer that was right, or None."""

    cell: Cell
    which: str
    ours: Row
    peer: Row | None

    @property
    def ratio(self) -> float | None:
        """Time of the peer over that of triflash: above 1 triflash is faster. None if either has none."""
        return None if self.peer is None or self.ours.status != "ok" else self.peer.median_ms / self.ours.median_ms

    @property
    def is_cliff(self) -> bool:
        """Whether somebody is faster, or triflash has no result, or a wrong one."""
        return self.ours.status != "ok" or (self.ratio is not None and self.ratio < 1)

    def facts(self, run: Run) -> dict[str, Any]:
        """As data; times in milliseconds, None where there is none."""
        ours = self.ours.median_ms if self.ours.status == "ok" else None
        peer = (None, None) if self.peer is None else (self.peer.provider, self.peer.median_ms)
        return {
            "case": self.cell.name,
            "about": self.cell.workload["about"],
            "dtype": self.cell.dtype,
            "pass": self.which,
            "provider": self.ours.provider,
            "status": self.ours.status,
            "reason": self.ours.reason,
            "ms": ours,
            "peer": peer[0],
            "peer_ms": peer[1],
            "ratio": self.ratio,
            "command": command(run, self),
        }


def beside_best_peer(run: Run, cell: Cell, which: str) -> Versus | None:
    """triflash (its own choice, else its fastest backend) and the fastest peer; None where triflash was not asked.

    Who computes something simpler is no peer, and compiled code is held to compiled code only where there is nothing else.
    """
    rows = [row for name in run.providers if (row := run.row(cell, name, which)) is not None and not is_simpler(name)]
    eager = [row for row in rows if not row.provider.endswith("-compiled")]
    rows = eager if any(row.status == "ok" for row in eager) else rows
    ours = [row for row in rows if row.provider.startswith("triflash")]
    if not ours:
        return None
    mine = next((row for row in ours if row.provider == "triflash"), None)
    if mine is None or mine.status != "ok":
        mine = _fastest(ours) or mine or ours[0]
    return Versus(cell, which, mine, _fastest(row for row in rows if not row.provider.startswith("triflash")))


def compared(run: Run) -> list[Versus]:
    """Every pass of every cell, pass by pass."""
    found = (beside_best_peer(run, cell, which) for which in run.passes for cell in run.cells if which in cell.flops)
    return [each for each in found if each is not None]


def geometric_mean(ratios: Iterable[float]) -> float | None:
    """Of none, None."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs)) if logs else None


_OF_THE_SWEEP = {"--sweep": 1, "--count": 1, "--pass": 1, "--providers": 1, "--dtype": 1, "--out": 1, "--note": 1, "--all": 0}


def command(run: Run, of: Versus) -> str:
    """What measures one pass of one cell alone, with the run's other options."""
    words = list(run.options["words"])[1:]
    kept = []
    while words:
        word, _, value = words.pop(0).partition("=")
        if word in _OF_THE_SWEEP:
            more = not value and _OF_THE_SWEEP[word] and words and not words[0].startswith("--")  # --sweep needs no name
            del words[: 1 if more else 0]
        else:
            kept.append(f"{word}={value}" if value else word)
    providers = ",".join([of.ours.provider, *([] if of.peer is None else [of.peer.provider])])
    name = of.cell.name.removesuffix(" (tiny)")
    own = ["--workload", name, "--pass", of.which, "--providers", providers, "--dtype", of.cell.dtype]
    return shlex.join(["triflash", "bench", *own, *kept])


def _fastest(rows: Iterable[Row]) -> Row | None:
    return min((row for row in rows if row.status == "ok"), key=lambda row: row.median_ms, default=None)
