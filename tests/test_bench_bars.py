"""What a sweep's bars say of times, of peers that are missing and of results that are wrong. All times are made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from triflash.cli.bench import report
from triflash.cli.bench.bars import Bar, Mean, means, verdicts, worst_first
from triflash.cli.bench.record import Cell, Row, Run
from triflash.cli.bench.sweeps import SWEEPS, Sweep
from triflash.cli.bench.workloads import Workload

PLAIN = Workload("plain", 2, 2, 24, 24, 8, hi=0, dtype="fp32")
SPEED = Bar("speed", "triflash", "fwd", "speed", 1.2, ("a", "b"))
TIME = Bar("time", "triflash", "fwd", "time", 1.5, ("a", "b"))


def run_of(times: dict[str, dict[str, float | str]], **more: object) -> Run:
    """A complete one. times: case -> provider -> milliseconds, or a status."""
    options = {"sweep": "made up", "words": ["bench"], "note": "", **more}
    run = Run({"device": "cuda"}, options, {"copy": {"bytes_per_second": 1e9}}, complete=True)
    for name, found in times.items():
        cell = Cell.of(replace(PLAIN, name=name), ("fwd",))
        run.cells.append(cell)
        for who, ms in found.items():
            if isinstance(ms, float):
                run.rows.append(Row(cell.key, who, "fwd", "ok", samples_ms=[ms, ms, 9 * ms][:2]))
            else:
                run.rows.append(Row(cell.key, who, "fwd", ms, "out: off" if ms == "WRONG" else "is not installed"))
    return run


def test_the_fastest_peer_that_is_right_counts() -> None:
    run = run_of(
        {"x": {"triflash": 2.0, "a": 3.0, "b": 4.0}, "y": {"triflash": 2.0, "a": 3.0, "b": "WRONG"}, "z": {"triflash": 4.0, "b": 4.0}}
    )
    found = verdicts(run, (SPEED, TIME))
    assert [(v.bar.name, v.cell.name, v.peer, v.value, v.met) for v in found] == [
        ("speed", "x", "a", 1.5, True), ("speed", "y", "a", 1.5, True), ("speed", "z", "b", 1.0, False),
        ("time", "x", "a", 2 / 3, True), ("time", "y", "a", 2 / 3, True), ("time", "z", "b", 1.0, True),
    ]  # fmt: skip
    assert [v.share for v in found] == pytest.approx([0.8, 0.8, 1.2, 4 / 9, 4 / 9, 2 / 3])


@pytest.mark.parametrize(
    "cell, why",
    [
        ({"triflash": 1.0, "a": "dash", "b": "WRONG"}, "a: is not installed; b: WRONG: out: off"),
        ({"triflash": 1.0, "a": "dash"}, "a: is not installed; b: was not asked for"),
        ({"triflash": "WRONG", "a": 100.0, "b": 100.0}, "triflash: WRONG: out: off"),
        ({"triflash": "dash", "a": 100.0, "b": 100.0}, "triflash: is not installed"),
    ],
)
def test_what_is_missing_is_not_judged(cell: dict[str, float | str], why: str) -> None:
    """Never met, however fast the rest is, nor missed; and no mean is met over the cells that are left."""
    run = run_of({"good": {"triflash": 1.0, "a": 2.0}, "bad": cell})
    bars = tuple(replace(bar, mean=bar.bound) for bar in (SPEED, TIME))
    for good, bad in zip(*[iter(verdicts(run, bars))] * 2, strict=True):
        assert good.met is True and (bad.met, bad.value, bad.share, bad.why) == (None, None, None, why)
        assert bad.facts["met"] is None and bad.facts["reason"] == why
    for mean in means(verdicts(run, bars), bars):
        assert (mean.cells, mean.judged, mean.met, mean.mean_met, mean.facts["met"]) == (2, 1, 1, None, None)


def test_a_bar_may_want_every_peer() -> None:
    """The faster of two is not known where one of them is missing."""
    run = run_of({"x": {"triflash": 1.0, "a": 2.0, "b": 3.0}, "y": {"triflash": 1.0, "a": 2.0, "b": "dash"}})
    found = verdicts(run, (replace(SPEED, every=True),))
    assert [(v.value, v.met, v.why) for v in found] == [(2.0, True, ""), (None, None, "b: is not installed")]


def test_who_was_not_asked_for_has_no_cell() -> None:
    run = run_of({"x": {"a": 1.0, "b": 2.0}, "y": {"triflash": 1.0, "a": 1.0}})
    elsewhere = replace(SPEED, of=lambda cell: cell.name == "x")
    assert [v.cell.name for v in verdicts(run, (SPEED,))] == ["y"] and verdicts(run, (elsewhere,)) == []
    (mean,) = means([], (SPEED,))
    assert mean == Mean(SPEED, 0, 0, 0, None, None) and mean.mean_met is None


def test_times_and_bandwidths_without_a_peer() -> None:
    run = run_of({"x": {"triflash": 2.0}, "y": {"triflash": "dash"}})
    moved = run.cells[0].bytes["fwd"] / 2e-3 / 1e9
    bars = (
        Bar("ms", "triflash", "fwd", "ms", 1.9),
        Bar("copy", "triflash", "fwd", "copy", moved * 0.99),
        Bar("free", "triflash", "fwd", "ms", None),
    )
    found = verdicts(run, bars)
    assert [(v.value, v.met) for v in found] == [(2.0, False), (None, None), (moved, True), (None, None), (2.0, None), (None, None)]
    run.ceilings.clear()
    assert next((v.value, v.why) for v in verdicts(run, bars[1:2])) == (None, "no copy was measured")


def test_a_bar_of_one_device() -> None:
    """Elsewhere its value is for information."""
    bars = (Bar("ms", "triflash", "fwd", "ms", 1.5, mean=1.5, on="H100"),)
    run = run_of({"x": {"triflash": 2.0}})
    for name, met in (("NVIDIA H100 80GB HBM3", False), ("NVIDIA H200", None)):
        run.machine["name"] = name
        (found,) = verdicts(run, bars)
        (mean,) = means([found], bars)
        assert (found.value, found.met, found.facts["bound"]) == (2.0, met, None if met is None else 1.5)
        assert (mean.met, mean.mean_met, mean.value) == (None if met is None else 0, met, pytest.approx(2.0))


def test_a_share_of_the_peers_work() -> None:
    """Half the pairs in 0.6 of the time is 1.2 times as long for each."""
    (found,) = verdicts(run_of({"x": {"triflash": 0.6, "a": 1.0}}), (replace(TIME, per=lambda cell: 0.5),))
    assert found.value == pytest.approx(1.2) and found.met is True


def test_geometric_means_and_the_worst() -> None:
    run = run_of({"x": {"triflash": 1.0, "a": 2.0}, "y": {"triflash": 4.0, "a": 2.0}})
    bars = (SPEED, replace(SPEED, name="more"), TIME, replace(TIME, name="told", bound=None))
    bars = tuple(replace(bar, mean=mean) for bar, mean in zip(bars, (0.99, 1.01, 1.01, None), strict=True))
    found = means(verdicts(run, bars), bars)
    assert [m.value for m in found] == pytest.approx([1.0] * 4)
    assert [m.mean_met for m in found] == [True, False, True, None] and [m.met for m in found] == [1, 1, 1, None]
    assert all(m.worst is not None and m.worst.cell.name == "y" for m in found)


def test_a_mean_of_an_interrupted_run_is_not_judged() -> None:
    run, bars = run_of({"x": {"triflash": 1.0, "a": 2.0}}), (replace(SPEED, mean=1.1),)
    whole, part = (means(verdicts(run, bars), bars, complete)[0].facts for complete in (True, False))
    assert whole["met"] is True and part["met"] is None
    assert {**whole, "met": None} == part and (part["geometric_mean"], part["worst"], part["worst_case"]) == (pytest.approx(2.0), 2.0, "x")


def test_worst_first() -> None:
    run = run_of({
        "met": {"triflash": 1.0, "a": 2.0}, "missed": {"triflash": 1.0, "a": 1.1}, "by far": {"triflash": 1.0, "a": 0.1},
        "nobody": {"triflash": 1.0, "a": "dash"}, "just": {"triflash": 1.0, "a": 1.2},
    })  # fmt: skip
    found = verdicts(run, (SPEED, replace(SPEED, bound=None)))
    assert [v.cell.name for v in worst_first(found)][:7] == ["by far", "missed", "nobody", "nobody", "just", "met", "met"]


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On the terminal it stands alone; in the files with the rest."""
    bars = (
        replace(SPEED, mean=1.1),
        Bar("of a copy", "triflash", "fwd", "copy", 0.9),
        Bar("told", "triflash", "fwd", "time", None, ("a",)),
    )
    monkeypatch.setitem(SWEEPS, "made up", Sweep("made up", (), bars))
    run = run_of({"x": {"triflash": 1.0, "a": 1.5}, "y": {"triflash": 2.0, "a": 1.0}, "z": {"triflash": 1.0, "a": "dash"}})
    run.machine |= {"name": "none", "date": "2026-12-01", "seconds": 1.0}
    report.show(run, report.Console(width=220))
    said = capsys.readouterr().out
    lines = [[part.strip() for part in line.split("│")[1:-1]] for line in said.splitlines() if "│" in line]
    assert ["speed", "y", "2000", "a", "1000", "0.50x", "≥ 1.2x", "240.0% MISSED"] in lines
    assert ["speed", "x", "1000", "a", "1500", "1.50x", "≥ 1.2x", "80.0%"] in lines
    assert ["speed", "z", "1000", "", "", "", "≥ 1.2x", "not judged [1]"] in lines and "a: is not installed; b: was not asked for" in said
    assert ["told", "x", "1000", "a", "1500", "0.67x", "", ""] in lines and len(lines) == 9 and lines[-1][0] == "told"
    closing = "speed: met in 1 of 2, not judged in 1, geometric mean 0.87x (wanted ≥ 1.1x: not judged, for want of cells), worst 0.50x (y)"
    assert closing in said and "told: not judged in 1, geometric mean 1.15x, worst 2.00x (y)" in said and "TFLOP/s" not in said
    report.save(run, tmp_path)
    page = (tmp_path / "bench.md").read_text()
    assert closing in page and "TFLOP/s at the median" in page
    facts = json.loads((tmp_path / "bars.json").read_text())
    assert [fact["met"] for fact in facts] == [True, False, None, *[False] * 3, None, None, None, None, None, None]


def test_cases_that_lack_the_same_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(SWEEPS, "made up", Sweep("made up", (), (SPEED, replace(SPEED, name="other"))))
    cells: dict[str, dict[str, float | str]] = {name: {"triflash": 1.0, "a": "dash"} for name in "xyz"}
    report.show(run_of(cells | {"u": {"triflash": "WRONG", "a": 1.0}}), report.Console(width=220))
    said = capsys.readouterr().out
    lines = [[part.strip() for part in line.split("│")[1:-1]] for line in said.splitlines() if "│" in line]
    assert [line[:3] + line[7:] for line in lines] == [
        ["speed", "3 cases", "", "not judged [1]"], ["speed", "u", "", "not judged [2]"],
        ["other", "3 cases", "", "not judged [1]"], ["other", "u", "", "not judged [2]"],
    ]  # fmt: skip
    assert "speed: not judged in any of 4" in said and "WRONG: out: off" in said


def test_every_sweep_can_be_judged() -> None:
    """Each bar has cells, in which its provider and its peers are asked for the pass."""
    for name, sweep in SWEEPS.items():
        cells = [(job, Cell.of(job.workload, job.passes)) for job in sweep.jobs]
        assert len({job.workload.key for job in sweep.jobs}) == len(sweep.jobs), name
        assert len({bar.name for bar in sweep.bars}) == len(sweep.bars), name
        for bar in sweep.bars:
            mine = [job for job, cell in cells if bar.of(cell) and bar.which in job.passes and bar.ours in job.providers]
            assert mine, (name, bar.name)
            for peer in bar.peers:
                assert any(peer in job.providers for job in mine), (name, bar.name, peer)
            assert all(0 < bar.per(cell) <= 1 for job, cell in cells if job in mine), (name, bar.name)
