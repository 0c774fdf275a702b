"""Measured configurations: the rows that beat the analytic default, and where they did. Read by ``select.py``.

A row says on what it was measured and against what. Anything without a row gets ``configs.default_config``.
"""

from __future__ import annotations

from dataclasses import dataclass

from .configs import Problem, TileConfig

__all__ = ["ROWS", "Row", "lookup"]


@dataclass(frozen=True)
class Row:
    """``config`` is the best measured for ``problem`` on ``arch``; ``spills`` is the most registers the compiler may spill for it."""

    arch: str
    problem: Problem
    config: TileConfig
    spills: int = 0


ROWS: tuple[Row, ...] = ()

_BY_KEY = {(row.arch, row.problem): row for row in ROWS}


def lookup(arch: str, problem: Problem) -> Row | None:
    """The measured row for this architecture and problem, or None."""
    return _BY_KEY.get((arch, problem))
