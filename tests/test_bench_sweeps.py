"""The sweeps that hold claims to bars: which problems they have, and that a command runs them. What bars say is in test_bench_bars.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from triflash import oracle
from triflash.__main__ import main
from triflash.cli.bench.options import listing
from triflash.cli.bench.providers import PROVIDERS
from triflash.cli.bench.record import Cell, Run
from triflash.cli.bench.sweeps import SWEEPS, _visited
from triflash.cli.bench.workloads import Workload

ROOT = Path(__file__).parents[1]
QUICK = ["--tiny", "--device", "cpu", "--dtype", "fp32", "--budget", "0.002", "--min-samples", "2"]


def bounds(name: str) -> dict[str, tuple[str, float | None, float | None]]:
    """Bar -> kind, bound, bound on the mean."""
    return {bar.name: (bar.kind, bar.bound, bar.mean) for bar in SWEEPS[name].bars}


def swept(name: str, cases: tuple[str, ...], tmp_path: Path, *more: str, status: int = 0) -> dict[tuple[str, str], tuple[bool | None, str]]:
    """Some cases of a sweep, shrunk: (bar, case) -> (met or not or neither, why not judged)."""
    jobs = tuple(job for job in SWEEPS[name].jobs if job.workload.name in cases)
    assert len(jobs) == len(cases)
    with mock.patch.dict(SWEEPS, {name: replace(SWEEPS[name], jobs=jobs)}):
        assert main(["bench", "--sweep", name, *QUICK, *more, "--out", str(tmp_path)]) == status
    facts = json.loads((tmp_path / "bars.json").read_text())
    assert [fact["bar"] for fact in facts if "case" not in fact] == [bar.name for bar in SWEEPS[name].bars]
    return {(fact["bar"], fact["case"].removesuffix(" (tiny)")): (fact["met"], fact["reason"]) for fact in facts if "case" in fact}


def test_listed_and_documented() -> None:
    page = (ROOT / "docs" / "bench.md").read_text()
    for name, sweep in SWEEPS.items():
        assert f"{name}  {sweep.about}" in listing() and f": `--sweep {name}`\n" in page, name
        assert all(provider in PROVIDERS for job in sweep.jobs for provider in job.providers)


def test_features(tmp_path: Path) -> None:
    wanted = {"soft cap": 1.25, "dropout": 1.35, "ALiBi": 1.08, "mask of keys": 1.05, "windows, a visited block": 1.15}
    wanted |= {"padding mask, a pair": 1.25, "documents mask, a pair": 1.25}
    found = {name: bound for name, (kind, bound, _) in bounds("features").items() if kind == "time" and bound is not None}
    assert found == {f"{name}, {which}": bound for name, bound in wanted.items() for which in ("forward", "backward")}
    assert bounds("features")["dropout, beside cuDNN's, backward"][:2] == ("speed", 1.0)
    sweep = SWEEPS["features"]
    for job in sweep.jobs:
        cell = Cell.of(job.workload, job.passes)
        assert job.workload.plain() != job.workload and any(bar.of(cell) for bar in sweep.bars), cell.name
    cases = (
        "d64 soft cap 50",
        "d64 dropout 0.1",
        "d128 ALiBi",
        "d64 documents mask",
        "d128 window 512",
        "d64 deterministic",
        "d128 one key head",
    )
    told = swept("features", cases, tmp_path)
    for bar, case in (("soft cap", 0), ("dropout", 1), ("ALiBi", 2), ("documents mask, a pair", 3), ("windows, a visited block", 4)):
        assert told[f"{bar}, forward", cases[case]][0] is not None and told[f"{bar}, backward", cases[case]][0] is not None
    assert told["dropout, beside cuDNN's, backward", cases[1]] == (None, "sdpa-cudnn: needs a GPU")
    assert all(told["others, forward", case] == (None, "") for case in cases[5:]) and len(told) == 2 * 8


@pytest.mark.parametrize(
    "queries, lo, hi, blocks",
    [
        (512, None, 0, 10),
        (512, None, None, 16),
        (512, -127, 0, 7),
        (512, -128, 0, 7),
        (512, -129, 0, 9),
        (500, -511, 0, 10),
        (512, 0, 0, 4),
    ],
)
def test_visited_blocks(queries: int, lo: int | None, hi: int | None, blocks: int) -> None:
    """As counted over the scores themselves."""
    w = Workload("x", 1, 1, queries, queries, 8, lo=lo, hi=hi)
    seen = torch.nn.functional.pad(oracle.visible(queries, queries, lo, hi), (0, 512 - queries, 0, 512 - queries))
    assert _visited(w) == blocks == seen.unflatten(0, (4, 128)).unflatten(2, (4, 128)).any(3).any(1).sum()


def test_folding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {name: (bound[:2]) for name, bound in bounds("folding").items()} == {
        "beside FlexAttention, forward": ("speed", 1.25), "beside FlexAttention, backward": ("speed", 1.4),
        "beside memory-efficient SDPA, forward": ("speed", 2.5), "beside memory-efficient SDPA, backward": ("speed", 2.5),
        "two biases, to one, forward": ("time", 1.15), "two biases, to one, backward": ("time", 1.15),
    }  # fmt: skip
    layers = [job.workload for job in SWEEPS["folding"].jobs]
    assert {w.name for w in layers if w.second} == {"evoformer-msa-row", "evoformer-triangle"} and len(layers) == 9
    found = swept("folding", ("af3-triangle", "evoformer-triangle"), tmp_path)
    assert found["beside FlexAttention, forward", "af3-triangle"] == (None, "flex: needs a GPU")
    assert found["two biases, to one, backward", "evoformer-triangle"][0] in (True, False)
    assert ("two biases, to one, backward", "af3-triangle") not in found and len(found) == 2 * 4 + 2
    assert "beside FlexAttention, forward: not judged in any of 2" in capsys.readouterr().out


def test_portable(tmp_path: Path) -> None:
    assert {name: bound[1] for name, bound in bounds("portable").items()} == {
        "d 64 and 128, forward": 1.2, "d 64 and 128, backward": 1.1, "d 256, forward": None, "d 256, backward": 1.0,
    }  # fmt: skip
    sizes = {(w.head_dim, w.queries, w.mask) for w in (job.workload for job in SWEEPS["portable"].jobs)}
    assert {(d, s, mask) for d in (64, 128) for s in (512, 1024, 2048, 4096, 8192) for mask in ("causal", "full")} < sizes
    found = swept("portable", ("d64 s512 causal", "d256 s2k full"), tmp_path)
    assert set(found) == {
        (f"d {d}, {p}", c) for d, c in (("64 and 128", "d64 s512 causal"), ("256", "d256 s2k full")) for p in ("forward", "backward")
    }
    judged = {key: (met, why) for key, (met, why) in found.items() if key[0] != "d 256, forward"}
    assert all((met is None) == why.startswith("triflash-triton: ") for met, why in judged.values())  # it runs in the interpreter alone
    assert found["d 256, forward", "d256 s2k full"][0] is None


def test_decode(tmp_path: Path) -> None:
    found = bounds("decode")
    assert {name: bound[1:] for name, bound in found.items() if "b1 " not in name} == {
        "caches from 256 MB on": (0.9, None), "caches of 64 MB": (0.8, None), "ragged": (0.85, None), "beside cuDNN": (1.0, 1.1),
        "beside FlexDecoding": (1.0, 1.1), "bias bh1k, to none": (1.1, None), "8 queries, to one": (1.15, None),
        "attention of few queries, beside cuDNN, forward": (1.0, None), "attention of few queries, beside cuDNN, backward": (1.0, None),
        "host, to SDPA's": (1.3, None),
    }  # fmt: skip
    assert found["b1 64k beside FlashAttention-4"][1] == 3.0
    assert [round(1e3 * (found[f"b1 {n}k, 4 key heads"][1] or 0), 1) for n in (1, 2, 4, 8, 16)] == [12.3, 14.2, 15.9, 18.8, 25.1]
    sweep = SWEEPS["decode"]
    (large, small) = ([job.workload for job in sweep.jobs if bar.of(Cell.of(job.workload, job.passes))] for bar in sweep.bars[:2])
    sizes = [w.batch * w.keys * 8 * 128 * 2 * (1 if w.fp8 else 2) for w in large]
    assert min(sizes) == 2**28 and len(large) == 10 and sum(w.page > 0 for w in large) == 4 and sum(w.fp8 for w in large) == 3
    assert [w.batch * w.keys * 8 * 128 * 4 for w in small] == [2**26] * 2
    assert all(job.passes == ("fwd", "bwd") or job.workload.cache for job in sweep.jobs)
    cases = (
        "decode-llama3-8b-b1-1k",
        "b8 8k pages of 16",
        "one of 128k, 63 of 1k",
        "b8 8k, bias bh1k",
        "decode-speculative-m8",
        "attention 2 x 64 on 8k",
    )
    told = swept("decode", cases, tmp_path)
    for bar, case in (("host, to SDPA's", 0), ("ragged", 2), ("bias bh1k, to none", 3), ("8 queries, to one", 4)):
        assert told[bar, cases[case]][0] is not None
    assert told["attention of few queries, beside cuDNN, backward", cases[5]] == (None, "sdpa-cudnn: needs a GPU")
    run = Run.load(tmp_path / "bench.json")
    assert all(row.status == "ok" for row in run.rows if row.provider.startswith("triflash")) and len(run.cells) == len(cases)


def test_packed(tmp_path: Path) -> None:
    found = bounds("packed")
    assert {name: bound[1:] for name, bound in found.items()} == {
        "nine, beside FlashAttention-4, forward": (0.97, 1.08), "nine, beside FlashAttention-4, backward": (0.93, 1.0),
        "8,192 of 34, beside FlashAttention-4, forward": (1.2, None), "8,192 of 34, beside FlashAttention-4, backward": (1.2, None),
        "beside PyTorch's varlen, forward": (1.6, None), "beside PyTorch's varlen, backward": (1.5, None),
        "with a bias, beside FlexAttention, forward": (1.6, None), "with a bias, beside FlexAttention, backward": (1.7, None),
        "equal lengths, beside our batch, forward": (0.96, None), "equal lengths, beside our batch, backward": (0.94, None),
        "equal lengths with a bias, to our batch, forward": (1.05, None), "equal lengths with a bias, to our batch, backward": (1.05, None),
        "host, a step, to our batch's": (1.3, None),
    }  # fmt: skip
    sweep = SWEEPS["packed"]
    counts = [sum(bar.of(Cell.of(job.workload, job.passes)) for job in sweep.jobs) for bar in sweep.bars if bar.which == "fwd"]
    assert counts == [9, 2, 16, 4, 4, 2] and all(
        len(set(job.workload.sequences)) == 1 for job in sweep.jobs if "triflash-dense" in job.providers
    )
    cases = ("equal 2k d64 t32k causal", "equal 2k d64 t32k causal 1hqk+db", "uniform d64 t32k full", "tiny d128 t272k causal")
    told = swept("packed", cases, tmp_path)
    for bar, case in (("equal lengths, beside our batch", 0), ("equal lengths with a bias, to our batch", 1)):
        assert told[f"{bar}, forward", cases[case]][0] is not None and told[f"{bar}, backward", cases[case]][0] is not None
    assert told["host, a step, to our batch's", cases[0]][0] is not None
    assert told["beside PyTorch's varlen, backward", cases[2]] == (None, "torch-varlen: needs a GPU")
    assert told["nine, beside FlashAttention-4, forward", cases[2]][1].startswith("fa4: ")
    run = Run.load(tmp_path / "bench.json")
    assert all(row.status == "ok" for row in run.rows if row.provider.startswith("triflash")) and len(run.cells) == len(cases)


def test_the_published_grid(tmp_path: Path) -> None:
    """Its cells are those of the published file, so that ``compare`` finds them."""
    published = Run.load(ROOT / "docs" / "results" / "2026-11-26-h200" / "no-bias.json")
    jobs = SWEEPS["published"].jobs
    assert {job.workload.key for job in jobs} == {cell.key for cell in published.cells} and len(jobs) == len(published.cells)
    found = swept("published", ("d64 s512 full",), tmp_path)
    met, why = found["beside the faster of both, forward", "d64 s512 full"]
    assert met is None and why.startswith("sdpa-cudnn: needs a GPU; fa4: ")


def test_a_wrong_result_fails_and_is_not_judged(tmp_path: Path) -> None:
    from triflash.cli.bench.providers import Triflash

    real = Triflash.attend

    def off(self: Triflash, workload: Workload, problem: object) -> object:
        entry = real(self, workload, problem)  # type: ignore[arg-type]
        return replace(entry, call=lambda *x: entry.call(*x) * 1.5) if workload.second else entry

    with mock.patch.object(Triflash, "attend", off):
        found = swept("folding", ("evoformer-triangle",), tmp_path, "--providers", "triflash,triflash-onebias", status=1)
    assert len(found) == 6 and all(met is None and why.startswith("triflash: WRONG: out") for met, why in found.values())
    assert [cell.name for cell in Run.load(tmp_path / "bench.json").cells] == ["evoformer-triangle (tiny)"]
