"""The layers of models in the bench: their sizes, that everyone computes them rightly, and the sweep that looks for cliffs among them."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from triflash.__main__ import main
from triflash.cli.bench import flexible, formula, report
from triflash.cli.bench.measure import Settings, measure
from triflash.cli.bench.models import LAYERS, MODELS, named, sample
from triflash.cli.bench.providers import Dense, provider
from triflash.cli.bench.record import Cell, Row, Run
from triflash.cli.bench.versus import Versus, beside_best_peer, command, compared, geometric_mean
from triflash.cli.bench.workloads import DECODE, NAMED, Workload

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
QUICK = ["--tiny", "--device", "cpu", "--dtype", "fp32", "--budget", "0.002", "--min-samples", "2"]

# heads times head dim, as the configurations have it, of layers where it is the width of the model (or of its latents)
WIDTHS = {
    "qwen2.5-7b": 3584, "phi3-mini": 3072, "phi2": 2560, "gpt2-xl": 1600, "falcon-7b": 4544, "stablelm2-12b": 5120,
    "modernbert-large-local": 1024, "deberta-v3-large": 1024, "whisper-large-encoder": 1280, "wav2vec2-large": 1024, "clip-l-text": 768,
    "clip-bigg": 1664, "eva02-clip-e": 1792, "vit-l-384": 1024, "beit-l-512": 1024, "siglip-so400m": 1152, "sam-h-global": 1280,
    "detr-r50-cross": 256, "sd1.5-64": 320, "sd1.5-32": 640, "sd1.5-16": 1280, "sdxl-64-cross": 640, "dit-xl": 1152, "flux.1": 3072,
    "wan2.1-1.3b": 1536, "animatediff-temporal": 320, "esm2-3b": 2560, "graphormer-base": 768, "patchtst": 128,
}  # fmt: skip


def test_the_list() -> None:
    assert len(LAYERS) == 60 == sum(len(model.layers) for model in MODELS) and len(MODELS) >= 25
    assert len({w.key for w in LAYERS.values()}) == 60 and all(w.about for w in LAYERS.values())
    for name, width in WIDTHS.items():
        assert LAYERS[name].heads * LAYERS[name].head_dim == width, name
    dims = {(w.head_dim, w.value_dim) for w in LAYERS.values()}
    assert {(d, d) for d in (8, 24, 32, 40, 64, 72, 80, 96, 104, 112, 128, 160, 256)} | {(192, 128), (96, 64), (32, 160)} <= dims
    assert {16, 49, 52, 77, 196, 197, 257, 577, 781, 1025, 1500} <= {w.queries for w in LAYERS.values()}
    assert LAYERS["llama3-8b"] is NAMED["llama3-8b"] and LAYERS["decode-t5-xl-512"] is DECODE["decode-t5-xl-512"]


def test_every_model_is_cited() -> None:
    page = (ROOT / "docs" / "bench.md").read_text()
    for model in MODELS:
        assert f"| {model.name} |" in page and model.config.split(",")[0].split(":")[0] in page, model.name


def test_a_sample_is_the_seeds() -> None:
    assert sample(None, 0) == list(LAYERS.values()) == sample(60, 5)
    assert sample(7, 1) == sample(7, 1) != sample(7, 2)
    places = [list(LAYERS).index(w.name) for w in sample(20, 3)]
    assert places == sorted(places)
    with pytest.raises(ValueError, match="--count 61: wanted at most 60"):
        sample(61, 0)


def test_layers_by_name() -> None:
    assert named("phi2") == [LAYERS["phi2"]] and [w.name for w in named("sam-h")] == ["sam-h-global", "sam-h-window"]
    assert [w.name for w in named("vit-l")] == ["vit-l"] and [w.name for w in named("llama3-8b")] == ["llama3-8b"]
    assert len(named("all")) == len(NAMED)
    assert [w.name for w in named("decode-t5*")] == ["decode-t5-xl-512", "decode-t5-xl-4096"] and named("decode-*") == named("decode")
    assert [w.name for w in named("qwen*")] == ["qwen2.5-7b", "qwen2.5-7b-decode"]
    with pytest.raises(ValueError, match="no name matches; triflash bench --list"):
        named("gpt3*")


CHOSEN = (
    "llama3-8b-chunk", "deepseek-v3", "modernbert-large-local", "t5-xl-decoder", "t5-xl-cross", "perceiver-cross", "animatediff-temporal",
    "whisper-large-decode",
)  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
def test_layers_are_computed_rightly(name: str) -> None:
    """Those with a band, a bias or lengths that no older workload has; by their peers, too."""
    w = replace(LAYERS[name].shrunk(), dtype="fp32")
    passes = ("fwd",) if w.cache else ("fwd", "bwd")
    rows = measure(w, [provider(n) for n in ("triflash-tiled", "sdpa", "dense")], Settings(passes, CPU, 0.001, 2, 0), lambda _: None)
    assert len(rows) == 3 * len(passes) and all(row.status == "ok" for row in rows), [row.reason for row in rows]
    if not w.cache:
        x = w.build(CPU)
        with torch.no_grad():
            out = flexible.attend(w, x, dense=True)(x.q, x.k, x.v, x.bias)
        torch.testing.assert_close(out, formula.attention(x.q, x.k, x.v, x.bias, x.options), rtol=1e-4, atol=1e-5)


def test_shrunk_layers_keep_their_features() -> None:
    chunk = LAYERS["llama3-8b-chunk"].shrunk()
    assert (chunk.queries, chunk.keys, chunk.hi) == (48, 64, 16)
    window = LAYERS["modernbert-large-local"].shrunk()
    assert window.lo == -1 and window.hi == 1
    cross = LAYERS["t5-xl-cross"].shrunk()
    assert (cross.queries, cross.keys) == (48, 64) and cross.lengths is not None


def test_a_chunk_is_what_flash_attention_calls_causal() -> None:
    gpu, chunk = torch.device("cuda"), LAYERS["llama3-8b-chunk"]
    with mock.patch("importlib.util.find_spec", return_value=object()):
        assert provider("fa4").why_not(chunk, gpu) is None
        assert provider("fa4").why_not(replace(chunk, hi=5), gpu) == "aligns causal to the bottom right"


def run_of(times: dict[str, dict[str, float | str]], passes: tuple[str, ...] = ("fwd",), **options: object) -> Run:
    """times: case -> provider -> milliseconds, or a status."""
    words = ["bench", "--sweep", "models", "--count", "3", "--all", "--dtype=bf16", "--out=x", "--seed", "4", "--providers", "triflash,a,b"]
    run = Run({"device": "cuda"}, {"sweep": "models", "words": words, "note": "", **options})
    for name, found in times.items():
        cell = Cell.of(replace(NAMED["vit-l"], name=name), passes)
        run.cells.append(cell)
        for which in passes:
            for who, ms in found.items():
                ok = isinstance(ms, float)
                run.rows.append(
                    Row(cell.key, who, which, "ok" if ok else str(ms), "" if ok else "why", [ms] * 3 if isinstance(ms, float) else [])
                )
    return run


def test_beside_the_best_peer() -> None:
    run = run_of({
        "fast": {"triflash": 1.0, "a": 2.0, "b": 3.0},
        "slow": {"triflash": 4.0, "a": "WRONG", "b": 1.0},
        "wrong": {"triflash": "WRONG", "a": 2.0, "b": 3.0},
        "alone": {"triflash": 1.0, "a": "dash", "b": "dash"},
        "by hand": {"triflash-tiled": 3.0, "triflash-triton": 2.0, "a": 5.0, "a-nobias": 0.1, "b-compiled": 0.2},
    })  # fmt: skip
    found = {each.cell.name: each for each in compared(run)}
    assert {name: each.ratio for name, each in found.items()} == {"fast": 2.0, "slow": 0.25, "wrong": None, "alone": None, "by hand": 2.5}
    assert {name for name, each in found.items() if each.is_cliff} == {"slow", "wrong"}
    assert found["slow"].peer is not None and found["slow"].peer.provider == "b" and found["by hand"].ours.provider == "triflash-triton"
    assert beside_best_peer(run_of({"x": {"a": 1.0}}), run.cells[0], "fwd") is None
    wanted = "triflash bench --workload slow --pass fwd --providers triflash,b --dtype bf16 --seed 4"
    assert command(run, found["slow"]) == found["slow"].facts(run)["command"] == wanted
    assert geometric_mean([2.0, 0.5, 8.0]) == pytest.approx(2.0) and geometric_mean([]) is None


def test_compiled_code_is_held_to_compiled_code_where_there_is_nothing_else() -> None:
    run = run_of({"x": {"triflash-compiled": 1.0, "sdpa-compiled": 3.0, "sdpa-nobias": 0.5}})
    (found,) = compared(run)
    assert isinstance(found, Versus) and found.ratio == 3.0


def test_only_cliffs_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    times: dict[str, dict[str, float | str]] = {
        "fast": {"triflash": 1.0, "a": 2.0}, "slow": {"triflash": 4.0, "a": 1.0}, "wrong": {"triflash": "WRONG", "a": 2.0},
        "alone": {"triflash": 1.0, "a": "dash"},
    }  # fmt: skip
    console = report.Console(width=220)
    report.show(run_of(times), console)
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if "│" in line]
    assert [line.split()[1] for line in lines] == ["wrong", "slow"] and "WRONG [1]" in lines[0] and lines[1].split()[-2] == "0.25x"
    assert "fwd: geometric mean 0.71x of the best peer over 2 cells, 1 below 1.0, worst 0.25x (slow); no peer in 1" in said
    assert said.rstrip().splitlines()[-1].strip().startswith("The worst alone: triflash bench --workload wrong --pass fwd")
    report.show(run_of(times, all=True), console)
    assert len([line for line in capsys.readouterr().out.splitlines() if "│" in line]) == 4
    report.show(run_of({"fast": times["fast"]}), console)
    assert "The closest alone: triflash bench --workload fast" in capsys.readouterr().out
    report.show(run_of({"x": {"triflash": "dash", "a": "dash"}}), console)
    assert "fwd: no cell in which both triflash and a peer have a time" in capsys.readouterr().out


def test_the_sweep_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sample of layers, in all files; and the command that it ends with runs. Without a name it is the sweep of models."""
    words = ["bench", "--sweep", *QUICK, "--count", "3", "--seed", "11", "--providers", "triflash,dense", "--out", str(tmp_path)]
    assert main(words) == 0
    said = capsys.readouterr()
    names = [w.name for w in sample(3, 11)]
    assert [cell.name for cell in Run.load(tmp_path / "bench.json").cells] == [f"{name} (tiny)" for name in names]
    facts = json.loads((tmp_path / "cliffs.json").read_text())
    assert {fact["case"] for fact in facts} == {f"{name} (tiny)" for name in names} and not (tmp_path / "bars.json").exists()
    for fact in facts:
        assert fact["status"] == "ok" and fact["ratio"] == fact["peer_ms"] / fact["ms"]
        assert (f"{fact['ratio']:.2f}x" in said.out) or fact["ratio"] >= 1
    assert "bytes" not in said.out and "judging" in said.err  # nothing but the cliffs on standard output, progress beside it
    page = (tmp_path / "bench.md").read_text()
    assert page.count("every cell beside its best peer") == 1 and "GFLOP/s at the median" in page
    alone = next(line for line in said.out.splitlines() if " alone: " in line).split(" alone: ")[1]
    assert main([*shlex.split(alone)[1:], "--out", str(tmp_path / "alone")]) == 0
    assert len(Run.load(tmp_path / "alone" / "bench.json").rows) == 2


def test_a_cliff_that_is_wrong_fails(tmp_path: Path) -> None:
    real = Dense.attend

    def off(self: Dense, workload: Workload, problem: object) -> object:
        entry = real(self, workload, problem)  # type: ignore[arg-type]
        return replace(entry, call=lambda *x: entry.call(*x) * 1.5)

    with mock.patch("triflash.cli.bench.providers.Triflash.attend", off):
        words = ["bench", "--sweep", "models", *QUICK, "--count", "1", "--pass", "fwd", "--providers", "triflash,dense"]
        assert main([*words, "--out", str(tmp_path)]) == 1
    (fact,) = json.loads((tmp_path / "cliffs.json").read_text())
    assert fact["status"] == "WRONG" and fact["ms"] is None and fact["ratio"] is None and "out: " in fact["reason"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--count", "3"], "--count: is for --sweep models"),
        (["--all"], "--all: is for --sweep models"),
        (["--sweep", "host", "--count", "3"], "--count: is for --sweep models"),
        (["--sweep", "models", "--count", "61"], "--count 61: wanted at most 60, as many as there are layers"),
        (["--sweep", "models", "--count", "0"], "argument --count: size: wanted a positive whole number"),
        (["--sweep", "models", "--providers", "sdpa,dense"], "--providers sdpa,dense: wanted triflash and its peers"),
        (["--sweep", "models", "--providers", "triflash,triflash-tiled"], "wanted triflash and its peers"),
        (["--sweep", "models", "--pass", "first"], "--pass first: its lengths are not the models'"),
        (["--sweep", "models", "--d", "64"], "--d: a sweep has its own problems"),
        (["--workload", "gpt3"], "--workload gpt3: wanted all or one of llama3-8b"),
    ],
)
def test_bad_options(wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--device", "cpu", *wrong])
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
