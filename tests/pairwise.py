"""Pairwise combinations: a small set of rows in which every two values of every two axes meet. Used by ``test_pairwise.py``."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def pairs_of(row: Row) -> set[tuple[Any, ...]]:
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(sorted(row), 2)}


def pairwise(axes: Mapping[str, Sequence[Any]], seed: int = 0, attempts: int = 40) -> list[Row]:
    """Greedy: as long as a pair is missing, start from it and keep the best of some random completions. Values must be hashable."""
    chooser = random.Random(seed)
    missing = {
        (a, x, b, y) for a, b in itertools.combinations(sorted(axes), 2) for x, y in itertools.product(axes[a], axes[b])
    }  # fmt: skip
    rows = []
    while missing:
        a, x, b, y = min(missing, key=repr)
        candidates = [{name: chooser.choice(list(values)) for name, values in axes.items()} | {a: x, b: y} for _ in range(attempts)]
        best = max(candidates, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        rows.append(best)
    return rows
