"""Steps of decoding in the bench: their sizes, their traffic, and that every provider computes them rightly."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from triflash.cli.bench import options, report
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
