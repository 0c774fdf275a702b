"""Steps of decoding in the bench: their sizes, their traffic, and that every provider computes them rightly."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from triflash.cli.bench import caches, options, report
from triflash.cli.bench.measure import Settings, measure
from triflash.cli.bench.models import named
from triflash.cli.bench.providers import provider
from triflash.cli.bench.record import Cell, Row, Run
from triflash.cli.bench.workloads import DECODE


def test_decoding_is_told_by_name() -> None:
    assert len(DECODE) == 3 * 8 + 4 + 2 + 2 and {w.name for w in named("decode")} == set(DECODE)
    assert {w.queries for w in named("decode-speculative")} == {1, 2, 4, 8}
    assert not any(w.cache for w in named("all")) and len({w.key for w in DECODE.values()}) == len(DECODE)
    long = DECODE["decode-llama3-8b-b64-128k"]
    assert (long.batch, long.heads, long.kv_heads, long.keys, long.queries, long.head_dim) == (64, 32, 8, 131072, 1, 128)
    assert long.bytes("fwd") == 2 * (2 * 64 * 131072 * 8 * 128 + 2 * 64 * 32 * 128)
    ragged = DECODE["decode-ragged-one-long"]
    assert ragged.lengths == [131072] + [8192] * 15
    assert ragged.bytes("fwd") == 2 * (2 * sum(ragged.lengths) * 8 * 128 + 2 * 16 * 32 * 128)
    with pytest.raises(ValueError, match="--workload decode-llama9: wanted decode or one of decode-llama3"):
        named("decode-llama9")


@pytest.mark.parametrize(
    "name", ["decode-llama3-8b-b8-1k", "decode-speculative-m4", "decode-ragged", "decode-ragged-one-long", "decode-t5-xl-512"]
)
def test_decoding_is_right_by_every_provider(name: str) -> None:
    """On the cache function for triflash; in GB/s."""
    w = replace(DECODE[name].shrunk(), dtype="fp32")
    settings = Settings(("fwd",), torch.device("cpu"), 0.01, 2, 0)
    rows = measure(w, [provider(n) for n in ("triflash", "sdpa", "sdpa-cudnn", "flex", "dense")], settings, lambda _: None)
    found = {row.provider: row for row in rows}
    assert {n: row.status for n, row in found.items()} == {
        "triflash": "ok", "sdpa": "ok", "dense": "ok", "sdpa-cudnn": "dash", "flex": "dash",
    }, [row.reason for row in rows]  # fmt: skip
    assert found["triflash"].ran == ["tiled: forward"]
    run = Run({"device": "cpu"}, {}, {"copy": {"bytes_per_second": 1e9}}, [Cell.of(w, ("fwd",))], rows)
    assert "GB/s" in report._rate_cell(run, run.cells[0], found["triflash"], 1e9)


STORED = {"pages": {"page": 16}, "8 bits": {"fp8": True}, "both": {"page": 16, "fp8": True}}


@pytest.mark.parametrize("how", STORED)
def test_caches_in_pages_and_in_8_bits(how: str) -> None:
    """Right, ragged or not; peers are not asked; bytes are those of the cache."""
    for name in ("decode-llama3-8b-b8-1k", "decode-speculative-m4", "decode-ragged"):
        w = replace(DECODE[name].shrunk(), dtype="fp16", **STORED[how])  # type: ignore[arg-type]
        asked = [provider(n) for n in ("triflash", "triflash-tiled", "sdpa", "dense", "flex")]
        rows = measure(w, asked, Settings(("fwd",), torch.device("cpu"), 0.01, 2, 0), lambda _: None)
        assert [row.status for row in rows] == ["ok", "ok", "dash", "dash", "dash"], [row.reason for row in rows]
        assert rows[3].reason == ("no pages" if w.page else "no cache in 8 bits")
    whole = DECODE["decode-llama3-8b-b8-1k"]
    w = replace(whole, **STORED[how])  # type: ignore[arg-type]
    assert whole.bytes("fwd") - w.bytes("fwd") == (2 * 8 * 1024 * 8 * 128 if w.fp8 else 0) and w.key != whole.key
    held = replace(DECODE["decode-ragged"], **STORED[how])  # type: ignore[arg-type]
    assert DECODE["decode-ragged"].bytes("fwd") - held.bytes("fwd") == (2 * sum(held.lengths or ()) * 8 * 128 if w.fp8 else 0)


def test_pages_are_out_of_order() -> None:
    k, v = torch.randn(3, 32, 2, 4, dtype=torch.float16).to(caches.E4M3), torch.randn(3, 32, 2, 5)
    pages_k, pages_v, table = caches.paged(k, v, 8)
    assert pages_k.shape == (12, 8, 2, 4) and table.dtype == torch.int32 and sorted(table.flatten().tolist()) == list(range(12))
    assert table.flatten().tolist() != list(range(12)) and pages_k.dtype == caches.E4M3
    for pages, cache in ((pages_k.float(), k.float()), (pages_v, v)):
        assert torch.equal(pages[table.long()].flatten(1, 2), cache)


def test_what_8_bits_hold_is_exact_in_16() -> None:
    x = torch.randn(1000, dtype=torch.float32).to(torch.bfloat16)
    assert torch.equal(caches.stored(caches.rounded(x), True).to(torch.bfloat16), caches.rounded(x)) and caches.stored(x, False) is x
    problem = replace(DECODE["decode-llama3-8b-b1-1k"].shrunk(), fp8=True).build(torch.device("cpu"))
    assert torch.equal(problem.k, caches.rounded(problem.k)) and not torch.equal(problem.q, caches.rounded(problem.q))


def test_one_query_of_several() -> None:
    w = DECODE["decode-speculative-m8"]
    assert w.one_query() == replace(w, queries=1, hi=None) and w.one_query().one_query() == w.one_query()
    own = replace(w.shrunk(), dtype="fp32")
    settings = Settings(("fwd",), torch.device("cpu"), 0.01, 2, 0)
    rows = measure(own, [provider("triflash"), provider("triflash-onequery")], settings, lambda _: None)
    assert [(row.status, row.flops) for row in rows] == [("ok", None), ("ok", own.one_query().flops("fwd"))]


def test_one_long_request_among_short_ones() -> None:
    w = replace(DECODE["decode-ragged-one-long"], batch=64, bias_values="one-longest+padding")
    assert w.lengths == [131072] + [1024] * 63


def test_listed() -> None:
    assert "decode-llama3-8b-b64-128k" in options.listing() and "T5 1.1 XL" in options.listing()


def test_a_cache_has_no_backward_pass(tmp_path: Path) -> None:
    """From the command line, and drawn."""
    words = [
        "bench",
        "--workload",
        "decode-t5-xl-512",
        "--tiny",
        "--pass",
        "step,host-nograd",
        "--providers",
        "triflash",
        "--dtype",
        "fp32",
    ]
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    chosen = options.Options.of(parser.parse_args([*words[1:], "--budget", "0.01", "--out", str(tmp_path)]), False, words)
    assert [job.passes for job in chosen.jobs] == [("host-nograd",)]
    assert options._of_caches(["bwd"]) == ["fwd"]


def test_drawn_over_the_length_of_the_cache(tmp_path: Path) -> None:
    """A panel for each number of requests; not where only one length was measured."""
    pytest.importorskip("matplotlib")
    from triflash.cli.bench import plots

    steps = [DECODE[f"decode-llama3-8b-b{b}-{n}k"] for b in (1, 8) for n in (1, 4, 128)] + [DECODE["decode-ragged"]]
    cells = [Cell.of(w, ("fwd",)) for w in steps]
    rows = [Row(c.key, name, "fwd", "ok", samples_ms=[0.1, 0.2]) for c in cells for name in ("triflash", "sdpa-cudnn")]
    made = Run({"device": "cuda", "name": "none"}, {}, {"copy": {"bytes_per_second": 4e12}}, cells, rows)
    found = plots._steps(cells)
    assert [len(own) for own in found.values()] == [3, 3] and "b 8, h 32 on 8, d 128, bf16" in found
    assert (tmp_path / "decode-fwd.png") in plots.draw(made, tmp_path)
    figure = plots._decoding(made, "fwd", found)
    assert figure.axes[0].get_ylabel() == "GB/s" and len(figure.axes[0].lines) == 3
