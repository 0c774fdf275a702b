"""Features together: every two settings of every two axes meet in some case, seeded, on every backend."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from cases import Case
from here import BACKENDS, NEAREST
from pairwise import pairs_of, pairwise
from running import run_case

ON_GPU = torch.cuda.is_available()

AXES: dict[str, list[Any]] = {
    "lengths": [(1, 33), (17, 16), (31, 50), (48, 48), (50, 15), (33, 1)],
    "heads": [1, 3],
    "batch": [(1, 1), (2, 1), (2, 2), (1, 3)],  # outer, inner
    "dims": [(8, 8), (24, 24), (16, 40), (64, 7)],
    "dtype": [torch.float16, torch.float32, *([torch.bfloat16] if ON_GPU else [])],
    "bias": [None, "bihqk", "b1hqk", "1i11k", "11h1k", "111q1", "b11qk", "11111"],
    "bias_dtype": [None, torch.float32, torch.float16, torch.bool],
    "bias_layout": ["plain", "sliced", "transposed", "step"],
    "bias_values": ["normal", "rows"],
    "band": [(None, None), (None, 0), (-6, 9), (3, None), (None, -20)],
    "scale": [None, -0.4, 1.5],
    "mask": [None, "bhqk", "b1hqk", "1i11k", "11q1"],
    "key_heads": ["all", 1],
    "lengths_shown": [None, (0, 17, 29), (16, 1)],
    "alibi": [None, "h", "bh"],
    "sink": [False, True],
    "softcap": [0.0, 1.5],
    "dropout": [0.0, 0.3],
    "grads": ["qkvbs", "b", "qv", "kbs"],
    "dlse": [False, True],
    "layout": ["plain", "transposed", "sliced", "step", "mixed"],
    "dout_layout": ["plain", "expanded", "transposed"],
    "tiles": [(16, 16), (32, 16), (16, 32)],
}
ROWS = pairwise(AXES, seed=2026)


def case_of(number: int, row: dict[str, Any]) -> Case:
    (M, N), (outer, inner), (D, Dv), (lo, hi) = row["lengths"], row["batch"], row["dims"], row["band"]
    own = ("lengths", "heads", "batch", "dims", "band", "mask", "key_heads", "lengths_shown")
    plain = {name: row[name] for name in AXES if name not in own}
    if row["bias_dtype"] == torch.bool and row["bias"] is not None:
        row = {**row, "mask": None}  # one mask at a time
    features = {"mask": row["mask"], "Hk": None if row["key_heads"] == "all" else 1, "lengths": row["lengths_shown"]}
    sizes = dict(B=outer * inner, M=M, N=N, H=row["heads"], D=D, Dv=Dv, lo=lo, hi=hi, batch_inner=inner)
    return Case(f"pairwise {number}", seed=number, **sizes, **features, **plain)


@pytest.mark.parametrize("backend", [*BACKENDS, NEAREST])
@pytest.mark.parametrize("number", range(len(ROWS)))
def test_pairwise(number: int, backend: str, device: torch.device) -> None:
    run_case(case_of(number, ROWS[number]), backend, device)


def test_generator_covers_every_pair_with_few_rows() -> None:
    covered = set().union(*map(pairs_of, ROWS))
    for a, b in itertools.combinations(sorted(AXES), 2):
        for x, y in itertools.product(AXES[a], AXES[b]):
            assert (a, x, b, y) in covered
    largest = sorted(len(values) for values in AXES.values())[-2:]
    assert len(ROWS) <= 2 * largest[0] * largest[1]
    assert pairwise({"a": [1, 2], "b": [3]}) == pairwise({"a": [1, 2], "b": [3]})
