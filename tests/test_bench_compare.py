"""Comparing two runs: a shift of five percent is seen, noise is not."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest
from rich.console import Console

from triflash.cli.bench.compare import compare, mann_whitney, show
from triflash.cli.bench.record import Cell, Row, Run
from triflash.cli.bench.workloads import Workload

MACHINE = {"device": "cpu", "name": "A", "torch": "2.9", "commit": "1" * 40}


def make(seed: int, factor: float = 1.0, samples: int = 60, rows: int = 12) -> Run:
    """A run of one workload and many providers, with noise of three percent and the odd outlier; ``factor`` slows the last one."""
    generator = random.Random(seed)
    workload = Workload("d64 s512 full", 1, 4, 512, 512, 64)
    run = Run(dict(MACHINE), {"words": ["bench"], "note": ""}, {"copy": {"bytes_per_second": 1e9, "p50": 1e9, "samples_ms": [1.0]}})
    run.cells.append(Cell.of(workload, ("fwd",)))
    for at in range(rows):
        slow = factor if at == rows - 1 else 1.0
        times = [slow * generator.gauss(1.0, 0.03) * (3.0 if generator.random() < 0.02 else 1.0) for _ in range(samples)]
        run.rows.append(Row(workload.key, f"p{at}", "fwd", "ok", samples_ms=times))
    return run


def test_noise_is_no_move() -> None:
    assert not any(move.moved for seed in range(40) for move in compare(make(seed), make(1000 + seed)))


@pytest.mark.parametrize("factor", [1.05, 0.95])
def test_five_percent_is_a_move(factor: float) -> None:
    for seed in range(20):
        moves = compare(make(seed), make(1000 + seed, factor))
        assert [move.provider for move in moves if move.moved] == ["p11"]
        assert moves[0].ratio == pytest.approx(factor, abs=0.02)


def test_a_certain_but_tiny_change_is_no_move() -> None:
    a, b = make(1, samples=2000), make(2, 1.01, samples=2000)
    slowed = next(move for move in compare(a, b) if move.provider == "p11")
    assert slowed.p < 1e-6 and not slowed.moved
    assert next(move for move in compare(a, b, effect=0.005) if move.provider == "p11").moved


def test_a_change_of_status_is_a_move() -> None:
    a = make(1)
    b = copy.deepcopy(a)
    b.rows[3].status, b.rows[3].reason, b.rows[3].samples_ms = "WRONG", "dq: largest error 2", []
    moves = compare(a, b)
    assert moves[0].change == "ok -> WRONG: dq: largest error 2" and moves[0].moved
    assert sum(move.moved for move in moves) == 1


def test_what_only_one_run_has_is_left_out() -> None:
    a, b = make(1), make(2)
    del b.rows[5:]
    assert len(compare(a, b)) == 5


def test_mann_whitney() -> None:
    assert mann_whitney([1.0] * 9, [1.0] * 5) == 1.0
    assert mann_whitney([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(0.01219, abs=1e-4)  # R: wilcox.test(1:5, 6:10, exact=FALSE)
    assert mann_whitney([1, 2, 2, 3], [2, 2, 3, 5]) == pytest.approx(0.3524, abs=2e-3)
    assert mann_whitney([1, 2, 3], [1.5, 2.5, 0.5]) == mann_whitney([1.5, 2.5, 0.5], [1, 2, 3])


def test_shown(capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make(1), make(2, 1.05)
    b.machine["torch"] = "2.10"
    show(a, b, compare(a, b), Console(width=150), everything=False)
    shown = capsys.readouterr().out
    assert "torch: 2.9 -> 2.10" in shown and "p11" in shown and "p10" not in shown
    assert "12 rows in both: 0 faster, 1 slower, 0 of another status" in shown


def test_files_round_trip(tmp_path: Path) -> None:
    run = make(3)
    (tmp_path / "a.json").write_text(run.dump())
    assert Run.load(tmp_path / "a.json") == run
    (tmp_path / "b.json").write_text(run.dump().replace("triflash-bench/2", "triflash-bench/0"))
    with pytest.raises(ValueError, match="wanted schema triflash-bench/2, got triflash-bench/0"):
        Run.load(tmp_path / "b.json")
    for text in ("", "[]", "{}", "3", '"text"'):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ValueError, match="wanted a file of triflash bench"):
            Run.load(tmp_path / "c.json")


def test_an_older_file_has_its_passes_by_their_names_of_today(tmp_path: Path) -> None:
    run = make(4, rows=2)
    older = json.loads(run.dump())
    older["schema"] = "triflash-bench/1"
    for counts in (older["cells"][0]["flops"], older["cells"][0]["bytes"]):
        counts |= {"fwd+bwd": 7, "step": 8}
    for row, which in zip(older["rows"], ("fwd+bwd", "step"), strict=True):
        row.pop("breakdown")
        row |= {"which": which, "wall_ms": [2.0] * len(row["samples_ms"])}
    (tmp_path / "a.json").write_text(json.dumps(older))
    found = Run.load(tmp_path / "a.json")
    assert [row.which for row in found.rows] == ["step", "host-step"]
    assert (found.cells[0].flops["step"], found.cells[0].bytes["host-step"]) == (7, 8) and "fwd+bwd" not in found.cells[0].flops
    assert [row.samples_ms for row in found.rows] == [row.samples_ms for row in run.rows]
