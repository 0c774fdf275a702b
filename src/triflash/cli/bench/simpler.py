"""The same workload without something: what it is held to where the question is what that something costs. Called by ``providers``.

A provider ``triflash-plain`` is ``triflash`` on the plain workload, measured in turns with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .workloads import Workload

__all__ = ["SIMPLER", "Simpler", "is_simpler"]


@dataclass(frozen=True)
class Simpler:
    """of: a workload without it, or the same if it has none. absent: why there is nothing to measure then."""

    of: Callable[[Workload], Workload]
    absent: str


def _without_second(w: Workload) -> Workload:
    return replace(w, second=None)


SIMPLER = {
    "nobias": Simpler(Workload.without_bias, "there is no bias to leave out"),
    "plain": Simpler(Workload.plain, "it is the plain call already"),
    "onequery": Simpler(Workload.one_query, "there is one query alone, or no cache"),
    "onebias": Simpler(_without_second, "there is no second bias to leave out"),
}


def is_simpler(provider: str) -> bool:
    """Whether a provider of that name computes something simpler than the workload says: it is nobody's peer."""
    return provider.rpartition("-")[2] in SIMPLER
