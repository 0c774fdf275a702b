"""``triflash bench`` end to end on a CPU: files, dashes, WRONG, bad options, interruption."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from triflash.__main__ import main
from triflash.cli import terminal
from triflash.cli.bench import contest, measure, memory, options, plots, report, run, timing
from triflash.cli.bench.entry import Entry
from triflash.cli.bench.flops import PASSES
from triflash.cli.bench.measure import DeviceLostError, Settings
from triflash.cli.bench.providers import PROVIDERS, Dense, Provider
from triflash.cli.bench.record import Run
from triflash.cli.bench.workloads import Workload

TINY = ["--device", "cpu", "--budget", "0.002", "--min-samples", "2"]
GRID = ["--d", "8,16x8", "--s", "32,40x48", "--b", "1", "--h", "2", "--bias", "none,1h1k", "--dbias", "on"]
CPU = torch.device("cpu")
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one whole run."""
    out = tmp_path_factory.mktemp("bench") / "new" / "folder"
    names = "triflash,triflash-tiled,sdpa,sdpa-cudnn,sdpa-nobias,triflash-compiled,flex,fa4,dense"
    words = [
        "bench",
        *TINY,
        *GRID,
        "--causal",
        "yes",
        "--pass",
        "fwd,bwd,step,eager,host,first",
        "--providers",
        names,
        "--out",
        str(out),
        "--note",
        "a note",
    ]
    with mock.patch.object(measure, "FIRST_LENGTHS", 2), mock.patch.multiple(timing, EAGER_SECONDS=0.005, HOST_CALLS=4):
        assert main(words) == 0
    return out


def test_every_cell_has_every_row(finished: Path) -> None:
    found = Run.load(finished / "bench.json")
    assert found.complete
    assert len(found.cells) == 2 * 2 * 2
    assert len(found.rows) == 8 * 9 * len(PASSES)
    for row in found.rows:
        unbiased = row.provider == "sdpa-nobias" and "1h1k" not in row.cell
        dash = unbiased or row.provider in ("sdpa-cudnn", "triflash-compiled", "flex", "fa4")
        assert row.status == ("dash" if dash else "ok"), row
        assert (len(row.samples_ms) >= 2) == (row.status == "ok") == (row.reason == "")
        assert (row.peak_bytes is not None) == (row.status == "ok" and row.which in ("fwd", "bwd", "step"))
    ran = {row.which: row.ran for row in found.rows if row.provider == "triflash-tiled"}
    assert ran["fwd"] == ["tiled: forward"] and ran["bwd"] == ["tiled: forward", "tiled: backward"]
    assert {row.reason for row in found.rows if row.status == "dash"} == {
        "needs a GPU",
        "flash-attn-4 is not installed",
        "there is no bias to leave out",
    }


def test_what_is_recorded(finished: Path) -> None:
    text = (finished / "bench.json").read_text()
    found = json.loads(text)
    machine = found["machine"]
    assert found["schema"] == "triflash-bench/2" and machine["torch"] == torch.__version__ and machine["device"] == "cpu"
    assert {"commit", "dirty", "date", "python", "triton", "threads", "seconds"} <= set(machine)
    assert set(found["ceilings"]) == {"matmul fp32", "copy"} and all(len(c["samples_ms"]) >= 10 for c in found["ceilings"].values())
    assert found["options"]["note"] == "a note" and found["options"]["words"][:3] == ["bench", "--device", "cpu"]
    assert str(finished) not in text and os.uname().nodename not in text


def test_tables_and_pictures(finished: Path) -> None:
    samples = list(csv.DictReader((finished / "samples.csv").open()))
    found = Run.load(finished / "bench.json")
    assert len(samples) == sum(len(row.samples_ms) for row in found.rows)
    summary = list(csv.DictReader((finished / "bench.csv").open()))
    assert len(summary) == len(found.rows)
    line = next(x for x in summary if x["provider"] == "dense" and x["pass"] == "fwd")
    assert float(line["tflops_per_s"]) == pytest.approx(int(line["flops"]) / float(line["median_ms"]) / 1e9)
    assert 0 < float(line["of_matmul"]) < 2
    page = (finished / "bench.md").read_text()
    for expected in ("d16x8 s40x48 causal 1h1k+db", "flash-attn-4 is not installed", "needs a GPU", "to best peer", "a note", "GFLOP/s"):
        assert expected in page
    pictures = sorted(path.name for path in finished.glob("*.png"))
    assert pictures == [
        *(f"memory-{which}-1h1k-db-fp32.png" for which in ("bwd", "step")),
        "ratio.png",
        *(f"speed-{which}-{bias}-fp32.png" for which in ("bwd", "eager", "fwd", "step") for bias in ("1h1k-db", "none")),
    ]
    assert all((finished / name).read_bytes().startswith(PNG) for name in pictures)
    assert not list(finished.glob("*.part"))


def test_plot_draws_it_again(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "plot", str(finished / "bench.json"), "--out", str(tmp_path / "again")]) == 0
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in finished.iterdir()}
    assert (tmp_path / "again" / "bench.md").read_text() == (finished / "bench.md").read_text()
    assert "to best peer" in capsys.readouterr().out


def test_compare_with_itself(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(finished / "bench.json")
    assert main(["bench", "compare", path, path, "--all"]) == 0
    assert "0 faster, 0 slower, 0 of another status; median change of all +0.0 %" in capsys.readouterr().out


def test_named_workloads_and_bars(tmp_path: Path) -> None:
    words = ["--workload", "gemma2-9b,swin-b", "--tiny", "--providers", "triflash,dense", "--pass", "step", "--dtype", "fp32,bf16"]
    assert main(["bench", *TINY, *words, "--out", str(tmp_path)]) == 0
    found = Run.load(tmp_path / "bench.json")
    assert [cell.name for cell in found.cells] == ["gemma2-9b-local (tiny)", "gemma2-9b-global (tiny)", "swin-b (tiny)"] * 2
    reasons = {row.cell.split(" ")[0]: row.reason for row in found.rows if row.provider == "triflash"}
    assert reasons == {"gemma2-9b-local": "", "gemma2-9b-global": "", "swin-b": ""}
    assert all((tmp_path / f"{what}-step.png").read_bytes().startswith(PNG) for what in ("speed", "memory"))


def test_memory_is_drawn_beside_speed(finished: Path) -> None:
    """Each provider's line, and each bar, at the megabytes and FLOP/s that were measured."""
    found = Run.load(finished / "bench.json")
    cells = [cell for cell in found.cells if cell.bias == "1h1k+db"]
    lines = plots._memory_lines(found, "step", "fp32", "1h1k+db", cells)
    bars = plots._bars(found, "step", cells, memory=True)
    wanted = {
        (found.rate(cell, row) / 1e9, row.peak_bytes / 2**20)
        for cell in cells for row in found.rows if (row.cell, row.which, row.status) == (cell.key, "step", "ok")
    }  # fmt: skip
    assert len(wanted) >= 4
    drawn: list[set[float]] = [set(), set()]
    for at, panel in enumerate(lines.axes):
        drawn[at % 2] |= {y for line in panel.get_lines() for y in line.get_ydata()}
    assert drawn == [{speed for speed, _ in wanted}, {memory for _, memory in wanted}]
    widths = [{bar.get_width() for bar in panel.patches} for panel in bars.axes]
    assert widths == drawn


def test_one_picture(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Speed and peak memory over length, of one problem; a cross where memory ran out; no other file."""
    found = Run.load(finished / "bench.json")
    picture, drawing = tmp_path / "bias.png", tmp_path / "bias.svg"
    assert main(["bench", "plot", str(finished / "bench.json"), "--picture", str(picture)]) == 0
    assert main(["bench", "plot", str(finished / "bench.json"), "--picture", str(drawing)]) == 0
    assert picture.read_bytes().startswith(PNG) and b"<svg" in drawing.read_bytes()
    assert set(tmp_path.iterdir()) == {picture, drawing} and str(drawing) in capsys.readouterr().out
    cells = [cell for cell in found.cells if cell.bias == "1h1k+db" and cell.mask == found.cells[0].mask]
    lost = next(row for row in found.rows if (row.cell, row.provider, row.which) == (cells[-1].key, "dense", "bwd"))
    lost.status, lost.reason = "dash", "out of memory"
    speed, memory = plots._picture(found, "bwd", cells).axes
    for panel, value in ((speed, lambda row: found.rate(cells[-1], row) / 1e9), (memory, lambda row: row.peak_bytes / 2**20)):
        ours = next(row for row in found.rows if (row.cell, row.provider, row.which) == (cells[-1].key, "triflash", "bwd"))
        assert panel.get_lines()[0].get_ydata()[-1] == value(ours)
    crosses = [line for line in memory.get_lines() if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[cells[-1].workload["keys"]]]


def test_no_picture(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run without a bias's gradient, or a name that is no picture's."""
    found = Run.load(finished / "bench.json")
    found.cells = [cell for cell in found.cells if cell.bias == "none"]
    (tmp_path / "bench.json").write_text(found.dump())
    for name, words in (("bias.png", "--dbias on"), ("bias.jpg", "ends in .png or .svg")):
        with pytest.raises(SystemExit, match="2"):
            main(["bench", "plot", str(tmp_path / "bench.json"), "--picture", str(tmp_path / name)])
        assert words in capsys.readouterr().err
        assert not (tmp_path / name).exists()


class Wrong(Dense):
    """Dense attention with one element of one result spoilt."""

    def __init__(self, name: str, gradient: bool) -> None:
        super().__init__(name)
        self.gradient = gradient

    def attend(self, workload: Workload, problem: Any) -> Entry:
        attend = super().attend(workload, problem)

        class Spoil(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
                g = g.clone()
                g[-1, -1, -1, -1] += 3.0
                return g

        def run(q: Any, k: Any, v: Any, bias: Any) -> Any:
            if self.gradient:
                return attend(q, Spoil.apply(k), v, bias)
            out = attend(q, k, v, bias)
            out = out + 0
            out[0, 0, 0, 0] += 1.0
            return out

        return Entry(run)


class Broken(Dense):
    """Fails in the forward or only in the backward pass."""

    def __init__(self, name: str, backward: bool) -> None:
        super().__init__(name)
        self.backward = backward

    def attend(self, workload: Workload, problem: Any) -> Entry:
        attend = super().attend(workload, problem)

        def run(q: Any, k: Any, v: Any, bias: Any) -> Any:
            if not self.backward or q.requires_grad:
                raise NotImplementedError("no such kernel\nand a long story")
            return attend(q, k, v, bias)

        return Entry(run)


def rows(providers: list[Provider], passes: tuple[str, ...] = ("fwd", "bwd")) -> dict[tuple[str, str], Any]:
    workload = Workload("x", 2, 2, 24, 24, 8, hi=0, dtype="fp32")
    told: list[str] = []
    found = measure.measure(workload, providers, Settings(passes, CPU, 0.001, 2, 0), told.append)
    assert len(told) == len(providers) + len(passes)
    return {(row.provider, row.which): row for row in found}


def test_more_samples_than_the_usual_most_where_asked_for() -> None:
    workload = Workload("x", 1, 1, 4, 4, 8, dtype="fp32")
    with mock.patch.object(measure, "MAX_SAMPLES", 3):
        (row,) = measure.measure(workload, [PROVIDERS["dense"]], Settings(("fwd",), CPU, 1e-4, 5, 0), lambda _: None)
    assert len(row.samples_ms) == 5


def test_who_is_wrong_gets_no_time() -> None:
    found = rows([Wrong("output", False), Wrong("gradient", True), PROVIDERS["dense"]])
    for which in ("fwd", "bwd"):
        assert found["output", which].status == found["gradient", which].status == "WRONG"
        assert found["output", which].reason.startswith("out: ") and found["gradient", which].reason.startswith("dk: ")
        assert found["output", which].samples_ms == found["gradient", which].samples_ms == []
        assert found["dense", which].status == "ok" and found["dense", which].samples_ms


def test_who_fails_gets_a_dash_and_the_others_go_on() -> None:
    found = rows([Broken("forward", False), Broken("backward", True), PROVIDERS["dense"]])
    assert [found["forward", which].status for which in ("fwd", "bwd")] == ["dash", "dash"]
    assert [found["backward", which].status for which in ("fwd", "bwd")] == ["ok", "dash"]
    assert found["forward", "fwd"].reason == found["backward", "bwd"].reason == "NotImplementedError: no such kernel"
    assert found["dense", "bwd"].samples_ms


def test_a_reference_that_does_not_fit_is_a_dash_for_all() -> None:
    with mock.patch.object(contest, "reference", side_effect=torch.OutOfMemoryError("CUDA out of memory")):
        workload = Workload("x", 2, 2, 24, 24, 8, dtype="fp32")
        found = measure.measure(workload, [PROVIDERS["dense"]], Settings(("fwd",), CPU, 0.001, 2, 0), lambda _: None)
    assert [(row.status, row.reason) for row in found] == [("dash", "out of memory")]


@contextlib.contextmanager
def stopped_at_the_second(error: BaseException) -> Iterator[list[Workload]]:
    """Within it a run measures one workload, and ends with the error at the next; which it came to."""
    first = measure.measure
    calls: list[Workload] = []

    def stops(workload: Workload, *rest: Any) -> Any:
        calls.append(workload)
        if len(calls) == 2:
            raise error
        return first(workload, *rest)

    with mock.patch.object(run, "measure", stops):
        yield calls


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), 130), (DeviceLostError("the GPU cannot go on"), 1)])
def test_what_was_measured_is_kept(error: BaseException, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with stopped_at_the_second(error):
        assert main(["bench", *TINY, *GRID, "--providers", "dense", "--out", str(tmp_path)]) == status
    found = Run.load(tmp_path / "bench.json")
    assert not found.complete and len(found.cells) == 1 and len(found.rows) == 2
    assert "interrupted" in (tmp_path / "bench.md").read_text()
    said = capsys.readouterr()
    assert ("interrupted" in said.err) if status == 130 else ("the GPU cannot go on" in said.out)
    assert "Not complete: interrupted." in said.out and said.out.count("GFLOP/s at the median") == 2


def test_an_interrupted_sweep_shows_the_bars_of_what_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And says of no geometric mean that it met its bound, which is for all cells."""
    with stopped_at_the_second(KeyboardInterrupt()) as calls:
        words = ["--sweep", "published", "--tiny", "--device", "cpu", "--providers", "triflash,sdpa-cudnn", "--out", str(tmp_path)]
        assert main(["bench", *words]) == 130
    said = capsys.readouterr()
    lines = [[part.strip() for part in line.split("│")[1:-1]] for line in said.out.splitlines() if "│" in line]
    assert {line[1] for line in lines} == {calls[0].name} and "interrupted" in said.err
    assert said.out.index("Not complete: interrupted.") < said.out.index("worst first") < said.out.index("Written: ")


def test_interrupted_before_the_first_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(run, "measure", side_effect=KeyboardInterrupt):
        assert main(["bench", "--sweep", "features", "--tiny", "--device", "cpu", "--out", str(tmp_path)]) == 130
    assert "soft cap, forward: not measured" in capsys.readouterr().out
    facts = json.loads((tmp_path / "bars.json").read_text())
    assert facts and all(fact["cells"] == 0 and fact["geometric_mean"] is fact["worst"] is fact["met"] is None for fact in facts)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--d", "64,none"], "argument --d: size: wanted a positive whole number such as 512, 4k or 1.5k (k = 1024), got 'none'"),
        (["--s", "0"], "argument --s: size: wanted a positive whole number"),
        (["--b", "-1"], "argument --b: size: wanted a positive whole number"),
        (["--tokens", "1k", "--s", "300"], "--tokens: wanted a multiple of every --s, got 1024; --s 300 does not divide it"),
        (["--tokens", "1k", "--b", "2"], "--tokens, --b: give one of them"),
        (["--hd", "100", "--d", "64"], "--hd: wanted a multiple of every --d, got 100; --d 64 does not divide it"),
        (["--bias", "hqkb"], "argument --bias: bias: wanted none, or dims such as 1hqk"),
        (["--bias", "1hqk/none"], "argument --bias: bias: wanted one pattern, none, or two such as 1hqk/b11k"),
        (["--bias", "1hqk/b11k", "--packed", "uniform"], "--bias 1hqk/b11k: two biases are for a batch here, not for packed sequences"),
        (["--providers", "sdpa,fa5"], "--providers fa5: wanted some of triflash"),
        (["--dtype", "fp8"], "--dtype fp8: wanted some of bf16, fp16, fp32"),
        (["--pass", "sideways"], "--pass sideways: wanted some of fwd, bwd"),
        (["--sweep", "host", "--d", "64"], "--d: a sweep has its own problems; drop them, or drop --sweep"),
        (["--sweep", "host", "--workload", "vit-l"], "--workload: a sweep has its own problems"),
        (["--sweep", "host", "--providers", "flex"], "--providers, --pass: the sweep has none of these together"),
        (["--sweep", "hosts"], "invalid choice: 'hosts'"),
        (["--workload", "gpt5"], "--workload gpt5: wanted all or one of"),
        (["--workload", "vit-l", "--d", "64"], "--d: a named workload has its own shape"),
        (["--tiny"], "--tiny: is for named workloads"),
        (["--budget", "0"], "not a positive number of seconds"),
        (["--device", "tpu"], "'tpu' is not cpu, cuda or cuda:N"),
        (["--prepare", "-2"], "'-2' is not a number of processes"),
        (["--out", __file__], "File exists"),
        (["compare", "there-is-none.json", "nor-here.json"], "there-is-none.json"),
        (["plot", __file__], "wanted a file of triflash bench, got something else"),
        (["--providers", ","], "--providers: wanted at least one name, got none"),
        (["--pass", " , "], "--pass: wanted at least one name, got none"),
        (["--dtype", ","], "--dtype: wanted at least one name, got none"),
        (["--workload", ","], "--workload: wanted at least one name, got none"),
        (["--seed", "99999999999999999999"], "is not a whole number from 0 to 2^63 - 1"),
        (["compare", "a.json", "b.json", "--effect", "nan"], "'nan' is not a number of percent from 0 up"),
        (["compare", "a.json", "b.json", "--alpha", "7"], "'7' is not a probability between 0 and 1"),
    ],
)
def test_wrong_use(wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *wrong])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("rest", [{}, {"cells": [{}], "rows": []}, {"cells": [], "rows": [], "machine": {}, "options": {}, "more": 1}])
def test_a_file_of_which_parts_are_missing(rest: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"schema": "triflash-bench/1", **rest}))
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "plot", str(path)])
    assert stopped.value.code == 2
    assert "wanted a whole file of triflash bench" in capsys.readouterr().err


def test_no_gpu_here(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(torch.cuda, "is_available", lambda: False), pytest.raises(SystemExit):
        main(["bench", "--device", "cuda"])
    assert "--device cuda: PyTorch sees no GPU here" in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    shown = capsys.readouterr().out
    for expected in ("llama3-8b", "boltz-triangle", "sdpa-efficient", "triflash-tiled", "fa4", "host  what an eager call costs"):
        assert expected in shown


def test_compiling_ahead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A worker's part in this process, then the parent and a worker of its own. A worker that fails says so."""
    words = ["bench", *TINY, *GRID, "--providers", "triflash,sdpa,flex", "--out", str(tmp_path / "none")]
    assert main([*words, "--prepare-part", "1/2"]) == 0
    assert not (tmp_path / "none").exists()
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    chosen = options.Options.of(parser.parse_args([*words[1:], "--prepare", "1"]), False, words)
    settings = Settings(tuple(chosen.passes), CPU, 0.1, 2, 0)
    assert run._compilations(chosen, settings) == [(at, "triflash") for at in range(len(chosen.workloads))]
    run._prepare(chosen, settings)
    said = capsys.readouterr().err
    assert f"Compiling {len(chosen.workloads)} times in 1 processes" in said and "Compiled in" in said and "stopped" not in said
    run._prepare(dataclasses.replace(chosen, words=("bench", "--d", "none")), settings)
    assert "A compiling process stopped with status 2: triflash bench: error: argument --d: size: wanted" in capsys.readouterr().err


def test_progress_goes_to_standard_error_line_by_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--d", "8", "--s", "16", "--h", "1", "--causal", "no", "--bias", "none", "--pass", "fwd,host", "--breakdown"]
    assert main(["bench", *TINY, *words, "--providers", "triflash,dense", "--out", str(tmp_path)]) == 0
    said = capfd.readouterr()
    lines = said.err.splitlines()
    assert [line.split(" ")[0] for line in lines] == [f"[{n}/8" for n in range(1, 9)]
    assert [line.split("] ")[1] for line in lines] == [
        "ceilings",
        *(f"d8 s16 full: judging {name}" for name in ("triflash", "dense")),
        *(f"d8 s16 full: timing {which}" for which in ("fwd", "host-nograd", "host-fwd", "host-step")),
        "d8 s16 full: where the time of triflash goes",
    ]
    assert "judging" not in said.out and "host-step" in said.out


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(terminal.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with terminal.steps_on_stderr(2) as tell:
        tell("one")
        tell("two")
    said = capsys.readouterr()
    assert "two" in said.err and "1/2" in said.err and "[1/2" not in said.err and said.out == ""


def test_tokens_and_hd(tmp_path: Path) -> None:
    words = ["--tokens", "128", "--hd", "64", "--d", "16,32", "--s", "32,64", "--causal", "full", "--bias", "none", "--pass", "fwd"]
    assert main(["bench", *TINY, *words, "--providers", "dense", "--out", str(tmp_path)]) == 0
    sizes = [(c.workload["batch"], c.workload["heads"]) for c in Run.load(tmp_path / "bench.json").cells]
    assert sizes == [(4, 4), (2, 4), (4, 2), (2, 2)]


def test_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    hidden = ("triflash.cli.bench.run", "triflash.cli.terminal")
    for name in [name for name in sys.modules if name.split(".")[0] == "rich" or name in hidden]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.delattr("triflash.cli.bench.run", raising=False)
    monkeypatch.setattr("sys.meta_path", [_Without("rich"), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "rich")
    assert main(["bench", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "triflash bench needs rich: pip install '.[bench]'" in said


class _Without:
    """Hides a package from import."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".", maxsplit=1)[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_peak_memory_on_a_cpu() -> None:
    a = torch.randn(512, 512)
    assert memory.peak_bytes(lambda: (a @ a) @ a, CPU) == a.nbytes  # what comes between; the result is not counted
    assert memory.peak_bytes(lambda: a @ a, CPU) == 0


def test_nothing_half_written(tmp_path: Path) -> None:
    from triflash.cli.bench.record import write_whole

    path = tmp_path / "x.json"
    write_whole(path, "old")
    with mock.patch.object(os, "replace", side_effect=OSError("full")), pytest.raises(OSError, match="full"):
        write_whole(path, "new")
    assert path.read_text() == "old"


def test_ratio_takes_the_automatic_choice() -> None:
    workload = Workload("x", 1, 1, 8, 8, 8)
    found = Run({"device": "cpu"}, {})
    cell = measure_cell(found, workload, {"triflash": 2.0, "triflash-tiled": 1.0, "dense": 3.0, "sdpa": 4.0})
    assert report.best_peer_ratio(found, cell, "fwd") == 1.5
    cell = measure_cell(found, Workload("y", 1, 1, 8, 8, 8), {"triflash": 2.0})
    assert report.best_peer_ratio(found, cell, "fwd") is None


def measure_cell(found: Run, workload: Workload, times: dict[str, float]) -> Any:
    from triflash.cli.bench.record import Cell, Row

    cell = Cell.of(workload, ("fwd",))
    found.cells.append(cell)
    found.rows += [Row(cell.key, name, "fwd", "ok", samples_ms=[ms] * 3) for name, ms in times.items()]
    return cell
