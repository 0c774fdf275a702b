"""Which configuration wins: the one with the least time relative to the default's, over all cases that share an entry. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ...plan.configs import TileConfig
from .measure import Measured

__all__ = ["FINALISTS", "finalists", "ranking"]

FINALISTS = 5

Round = Mapping[TileConfig, Measured]


def finalists(measured: Round, default: TileConfig) -> list[TileConfig]:
    """The fastest few of a first round, and the default, to be timed again: the fastest of many noisy times is fast by luck."""
    timed = sorted((config for config in measured if not measured[config].problem), key=lambda config: measured[config].median)
    return list(dict.fromkeys([default, *timed[:FINALISTS]]))


def ranking(cases: Sequence[Sequence[Round]], default: TileConfig) -> dict[TileConfig, float]:
    """Time relative to the default's (below 1: faster), the best first, of the configurations that were right in every case.

    ``cases`` has the rounds of each case in order; a configuration counts by its last round, against the default in the same round, and
    several cases by their geometric mean. Without a default that runs nothing can be compared, and nothing is ranked.
    """
    ratios: dict[TileConfig, list[float]] = {}
    for rounds in cases:
        latest: dict[TileConfig, float] = {}
        for measured in rounds:
            base = measured[default].median if default in measured else math.nan
            latest |= {config: each.median / base for config, each in measured.items()}
        for config, ratio in latest.items():
            ratios.setdefault(config, []).append(ratio)
    means = {
        config: math.exp(sum(map(math.log, each)) / len(each))
        for config, each in ratios.items()
        if len(each) == len(cases) and all(ratio > 0 for ratio in each)  # NaN is not
    }
    return dict(sorted(means.items(), key=lambda item: item[1]))
