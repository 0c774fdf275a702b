"""Packed sequences in the bench: lengths, FLOPs, who computes them, the gate, and the command line."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from triflash import oracle
from triflash.cli.bench import flexible, formula
from triflash.cli.bench.contest import Contest
from triflash.cli.bench.gate import Problem, verdict
from triflash.cli.bench.gate_packed import packed_reference
from triflash.cli.bench.packed import KINDS, TOKENS, lengths, offsets, places
from triflash.cli.bench.providers import provider
from triflash.cli.bench.workloads import Workload

CPU = torch.device("cpu")
PACKED = Workload("x", 1, 4, 60, 60, 8, kv_heads=2, dtype="fp32", packed="uniform", packed_seed=3)
SEQUENCES = (7, 20, 3, 20, 10)
BIASES: dict[str, str | None] = {"none": None, "shared": "1hqk", "of each": "b1qk", "of keys": "111k", "of queries": "bhq1"}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences short enough for tests."""
    monkeypatch.setattr("triflash.cli.bench.workloads.lengths", lambda *_: SEQUENCES)


def test_lengths() -> None:
    for kind in KINDS:
        for tokens in (1, 35, 4096, TOKENS[kind]):
            found = lengths(kind, tokens, 2048, 7)
            assert sum(found) == tokens and min(found) >= 1 and found == lengths(kind, tokens, 2048, 7)
    assert lengths("equal", 6144, 2048) == (2048,) * 3
    assert lengths("tiny", 100) == (34, 34, 32) and len(lengths("tiny", TOKENS["tiny"])) == 8192
    assert sorted(lengths("one-long", 32768)) == [*[128] * 128, 16384] and lengths("one-long", 32768)[64] == 16384
    assert lengths("documents", 32768, 0, 0) != lengths("documents", 32768, 0, 1)


def test_distributions() -> None:
    """What the page says of them."""
    documents = lengths("documents", 2**24)[:-1]
    assert statistics.median(documents) == pytest.approx(600, rel=0.05) and max(documents) == 8192
    assert statistics.stdev(map(math.log, documents)) == pytest.approx(1.1, rel=0.05)
    uniform = lengths("uniform", 2**24)[:-1]
    assert min(uniform) == 1 and max(uniform) == 2048 and statistics.mean(uniform) == pytest.approx(1024.5, rel=0.05)


def test_places() -> None:
    assert offsets((2, 3, 1), CPU).tolist() == [0, 2, 5, 6] and offsets((2,), CPU).dtype == torch.int32
    number, place = places((2, 3, 1), CPU)
    assert number.tolist() == [0, 0, 1, 1, 1, 2] and place.tolist() == [0, 1, 0, 1, 2, 0]


@pytest.mark.parametrize("band", [{}, {"hi": 0}, {"lo": -4, "hi": 1}])
def test_flops_count_visible_pairs(band: dict[str, int], few: None) -> None:
    w = replace(PACKED, **band)  # type: ignore[arg-type]
    seen = sum(int(oracle.visible(n, n, w.lo, w.hi, CPU).expand(n, n).sum()) for n in SEQUENCES)
    assert w.pairs == 4 * seen and w.flops("fwd") == w.pairs * 2 * 16
    assert "uniform" in w.key and w.key != replace(w, packed_seed=4).key and "uniform" not in replace(w, packed="").key


def right(x: Problem) -> tuple[list[str], dict[str, Tensor]]:
    """By autograd through the dense formula in float64, a sequence at a time."""
    leaves = [t.double().requires_grad_() for t in (x.q, x.k, x.v, *([] if x.bias is None else [x.bias]))]
    outs, begin = [], 0
    for b, n in enumerate(x.sequences):
        own = [t[:, begin : begin + n] for t in leaves[:3]]
        bias = None
        if x.bias is not None:
            bias = leaves[3][b : b + 1] if x.bias.shape[0] > 1 else leaves[3]
            bias = bias[..., : n if bias.shape[3] > 1 else 1, : n if bias.shape[4] > 1 else 1]
        outs.append(formula.attention(own[0], own[1], own[2], bias, x.options))
        begin += n
    out = torch.cat(outs, 1)
    names = ["out", "dq", "dk", "dv", "dbias"][: len(leaves) + 1]
    grads = torch.autograd.grad(out, leaves, x.dout.double())
    return names, dict(zip(names, (t.detach().to(x.q.dtype) for t in (out, *grads)), strict=True))


def tensors(name: str) -> tuple[Workload, Problem]:
    w = replace(PACKED, bias=BIASES[name], dbias=BIASES[name] is not None, hi=0, dtype="bf16")
    return w, w.build(CPU)


@pytest.mark.parametrize("limit", [10**9, 1600, 300], ids=["whole", "some", "one"])
@pytest.mark.parametrize("name", BIASES)
def test_the_gate(name: str, limit: int, few: None) -> None:
    """Right results pass. One that is wrong in a judged place does not: the last sequence, and of a bias the last heads, always are."""
    _, x = tensors(name)
    names, results = right(x)
    parts = packed_reference(x, names, limit)
    assert {part.name for part in parts} == set(names)
    assert verdict(parts, results) is None
    for name, value in results.items():
        spoilt = value.clone()
        if name == "dbias":
            spoilt[-1, -1, -1, 0, 0] += 0.5
        else:
            spoilt[0, -1, -1, -1] += 0.5
        wrong = verdict(parts, results | {name: spoilt})
        assert wrong is not None and wrong.startswith(name), name
        nan = value.clone()
        nan[0, 0, 0, 0] = math.nan
        assert verdict(parts, results | {name: nan}) is not None


def test_the_gate_judges_all_that_fits(few: None) -> None:
    _, x = tensors("shared")
    names, results = right(x)
    for name in ("out", "dq", "dk", "dv"):
        for row in (0, 7, 27, 30, 50):  # the first of each sequence
            spoilt = results[name].clone()
            spoilt[0, row, 0, 0] += 0.5
            assert verdict(packed_reference(x, names), results | {name: spoilt}) is not None
    # Its sum over the sequences, not the part of one.
    spoilt = results["dbias"].clone()
    spoilt[0, 0, 0, 19, 19] += 0.5
    assert verdict(packed_reference(x, names), results | {"dbias": spoilt}) is not None


def judged(w: Workload, name: str) -> str | None:
    """The gate's verdict on a provider."""
    from triflash.cli.bench.contest import Settings, Side

    contest = Contest(w, Settings(("fwd", "bwd"), CPU, 0.0, 1, 0), judged=True)
    assert contest.problem.sequences and contest.parts
    side = Side(contest, provider(name))
    results = side.results("step")
    assert results["out"].shape == contest.problem.dout.shape
    return verdict(contest.parts, results)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", ["triflash", "triflash-tiled", "dense"])
def test_providers_compute_it(name: str, bias: str, few: None) -> None:
    for band in ({}, {"hi": 0}, {"lo": -5, "hi": 2}):
        w = replace(PACKED, bias=BIASES[bias], dbias=BIASES[bias] is not None, **band)  # type: ignore[arg-type]
        assert provider(name).why_not(w, CPU) is None
        assert judged(w, name) is None, band


@pytest.mark.parametrize("bias", ["none", "shared", "of each"])
def test_equal_lengths_are_a_dense_batch(bias: str) -> None:
    w = replace(PACKED, packed="equal", length=20, bias=BIASES[bias], dbias=BIASES[bias] is not None, hi=0)
    dense = provider("triflash-dense")
    assert dense.why_not(w, CPU) is None and judged(w, "triflash-dense") is None and judged(w, "triflash") is None
    assert dense.why_not(replace(w, length=50), CPU) == "sequences differ in length"
    assert dense.why_not(replace(w, packed=""), CPU) == "is for packed sequences"
    assert judged(replace(w, packed="tiny", queries=34, keys=34), "triflash-dense") is None  # one alone


@pytest.mark.parametrize("bias", BIASES)
def test_flex_means_the_same(bias: str, few: None) -> None:
    """By FlexAttention's own dense emulation, forward."""
    for band in ({}, {"hi": 0}):
        w = replace(PACKED, bias=BIASES[bias], **band)  # type: ignore[arg-type]
        x = w.build(CPU)
        with torch.no_grad():
            out = flexible.attend(w, x, dense=True)(x.q, x.k, x.v, x.bias)
        torch.testing.assert_close(out, right(x)[1]["out"], rtol=1e-4, atol=1e-5)


def test_reasons() -> None:
    gpu, biased = torch.device("cuda"), replace(PACKED, bias="1hqk")
    assert provider("torch-varlen").why_not(PACKED, CPU) == "needs a GPU"
    assert provider("torch-varlen").why_not(PACKED, gpu) is None
    assert provider("torch-varlen").why_not(biased, gpu) == "takes no bias"
    assert provider("torch-varlen").why_not(replace(PACKED, packed=""), gpu) == "is for packed sequences"
    assert provider("sdpa").why_not(PACKED, CPU) == "takes no packed sequences"


def test_torch_varlen_is_called_as_it_is(monkeypatch: pytest.MonkeyPatch, few: None) -> None:
    """Which window says what, in the place of PyTorch's own, which needs a GPU."""
    from triflash.compat.torch_varlen import varlen_attn

    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", lambda *x, **more: varlen_attn(*x, enable_gqa=True, **more))
    for band in ({}, {"hi": 0}, {"lo": -5, "hi": 2}):
        assert judged(replace(PACKED, **band), "torch-varlen") is None  # type: ignore[arg-type]


def test_fa4_is_called_as_it_is(monkeypatch: pytest.MonkeyPatch, few: None) -> None:
    import sys
    import types

    import triflash

    def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> tuple[Tensor, None]:
        window = more.pop("window_size", None)
        return triflash.attention_varlen(q, k, v, scale=more.pop("softmax_scale"), window=window, **more), None

    package, cute = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")
    package.cute, cute.flash_attn_varlen_func, cute.flash_attn_func = cute, flash_attn_varlen_func, None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    for band in ({}, {"hi": 0}, {"lo": -5, "hi": 2}):
        assert judged(replace(PACKED, **band), "fa4") is None  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from triflash.__main__ import main

    out = tmp_path_factory.mktemp("packed")
    words = [
        "--packed",
        "equal,tiny,one-long",
        "--tokens",
        "320",
        "--s",
        "32",
        "--d",
        "8",
        "--h",
        "2",
        "--bias",
        "none,1hqk",
        "--dbias",
        "on",
    ]
    few = ["--device", "cpu", "--budget", "0.002", "--min-samples", "2", "--causal", "yes", "--seed", "5", "--pass", "fwd,bwd,host-step"]
    assert main(["bench", *few, *words, "--providers", "triflash,triflash-dense,torch-varlen,dense,sdpa-nobias", "--out", str(out)]) == 0
    return out


def test_end_to_end(finished: Path) -> None:
    from triflash.cli.bench.record import Run

    found = Run.load(finished / "bench.json")
    assert found.complete and len(found.cells) == 6
    assert found.cells[0].name == "equal 32 d8 t320 causal" and found.cells[-1].name == "one-long d8 t320 causal 1hqk+db"
    assert found.cells[0].workload["packed"] == "equal" and found.cells[0].workload["packed_seed"] == 5
    for row in found.rows:
        dash = row.provider in ("torch-varlen", "sdpa-nobias") or (row.provider == "triflash-dense" and not row.cell.startswith("equal"))
        assert row.status == ("dash" if dash else "ok"), row
    reasons = {row.reason for row in found.rows if row.reason}
    assert {"needs a GPU", "takes no packed sequences", "sequences differ in length"} <= reasons
    assert found.cells[0].flops["fwd"] == 10 * 2 * (32 * 33 // 2) * 2 * 16
    page = (finished / "bench.md").read_text()
    assert "tiny d8 t320 causal 1hqk+db" in page and (finished / "speed-fwd.png").exists() and (finished / "bench.csv").exists()


@pytest.mark.parametrize("words, message", [
    (["--packed", "webpages"], "--packed webpages: wanted some of equal, documents"),
    (["--packed", "equal", "--b", "2"], "--b: packed sequences are as many as --tokens has room for"),
    (["--packed", "tiny", "--s", "64"], "--s: --packed tiny has lengths of its own"),
    (["--packed", "equal", "--s", "64x32", "--tokens", "128"], "--s 64x32: packed sequences have as many queries as keys"),
    (["--packed", "equal", "--s", "100", "--tokens", "128"], "--tokens: wanted a multiple of every --s"),
    (["--packed", "tiny", "--pass", "first"], "--pass first: packed sequences"),
    (["--packed", "tiny", "--workload", "vit-l"], "--packed: a named workload has its own shape"),
    (["--packed", "tiny", "--sweep", "host"], "--packed: a sweep has its own problems"),
    (["--packed", "tiny", "--bias", "b1hqk"], "--bias b1hqk: packed sequences have one batch level"),
    (["--packed", "tiny", "--tiny"], "--tiny: is for named workloads"),
])  # fmt: skip
def test_wrong_use(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    from triflash.__main__ import main

    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--device", "cpu", *words])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_listing_tells_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    from triflash.__main__ import main

    assert main(["bench", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(about in text for about in KINDS.values()) and "torch-varlen" in text


def test_defaults_of_a_gpu() -> None:
    pytest.importorskip("rich")
    import argparse

    from triflash.cli.bench.options import Options, add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["--packed", "equal,documents,uniform,tiny,one-long", "--bias", "none"]
    options = Options.of(parser.parse_args(words), True, words)
    assert options.jobs[0].providers == ("triflash", "triflash-dense", "torch-varlen", "flex", "fa4")
    assert {(w.packed, w.queries) for w in options.workloads} == set(TOKENS.items())
    assert len(options.workloads) == 2 * 2 * (2 + 4)  # d, causal; two lengths of equal ones
