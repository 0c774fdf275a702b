"""Providers that compute a workload without something, to tell what it costs: what they compute, count and are judged by."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from triflash.cli.bench.contest import Contest, Settings, Side
from triflash.cli.bench.measure import compile_only, measure
from triflash.cli.bench.providers import PROVIDERS, Triflash, provider
from triflash.cli.bench.record import Cell, Run
from triflash.cli.bench.simpler import SIMPLER, is_simpler
from triflash.cli.bench.versus import beside_best_peer
from triflash.cli.bench.workloads import NAMED, Workload

CPU = torch.device("cpu")
QUICK = Settings(("fwd", "bwd"), CPU, 0.001, 2, 0)
TWO = replace(NAMED["evoformer-triangle"].shrunk(), dtype="fp32")


def simpler(workload: Workload, name: str) -> Workload:
    """What triflash computes under that name, judged as what it is and timed in turns with the whole."""
    rows = measure(workload, [provider("triflash"), provider(f"triflash-{name}")], QUICK, lambda _: None)
    assert [row.status for row in rows] == ["ok"] * 4, [row.reason for row in rows]
    own = provider(f"triflash-{name}").own(workload)
    run = Run({"device": "cpu"}, {}, cells=[Cell.of(workload, QUICK.passes)], rows=rows)
    for row in rows:
        whole = workload if row.provider == "triflash" else own
        assert run.cells[0].flops_of(row) == whole.flops(row.which) and run.cells[0].bytes_of(row) == whole.bytes(row.which)
        assert run.rate(run.cells[0], row) == 1e3 * whole.flops(row.which) / row.median_ms
    return own


def test_one_bias_of_two() -> None:
    assert simpler(TWO, "onebias") == replace(TWO, second=None)
    assert simpler(TWO, "nobias") == replace(TWO, bias=None, second=None, dbias=False)


@pytest.mark.parametrize("name", SIMPLER)
def test_nothing_to_leave_out(name: str) -> None:
    plain = Workload("x", 2, 2, 24, 24, 8, dtype="fp32")
    (row,) = measure(plain, [provider(f"triflash-{name}")], replace(QUICK, passes=("fwd",)), lambda _: None)
    assert (row.status, row.reason) == ("dash", SIMPLER[name].absent)


def test_they_are_nobodys_peers() -> None:
    assert [name for name in PROVIDERS if is_simpler(name)] == ["sdpa-nobias", *(f"triflash-{name}" for name in SIMPLER)]
    run = Run({"device": "cpu"}, {}, cells=[Cell.of(TWO, ("fwd",))])
    run.rows = measure(TWO, [provider(n) for n in ("triflash-onebias", "sdpa-nobias")], replace(QUICK, passes=("fwd",)), lambda _: None)
    assert [row.status for row in run.rows] == ["ok", "ok"] and beside_best_peer(run, run.cells[0], "fwd") is None


def test_a_wrong_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the results of the simpler problem, which the whole problem's would not fit."""
    real = Triflash.attend

    def off(self: Triflash, workload: Workload, problem: object) -> object:
        entry = real(self, workload, problem)  # type: ignore[arg-type]
        return replace(entry, call=lambda *x: entry.call(*x) * 1.5) if workload.second is None else entry

    monkeypatch.setattr(Triflash, "attend", off)
    rows = measure(TWO, [provider("triflash"), provider("triflash-onebias")], QUICK, lambda _: None)
    assert [row.status for row in rows] == ["ok", "ok", "WRONG", "WRONG"] and not rows[2].samples_ms


def test_what_is_compiled_ahead_is_the_simpler_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Workload] = []
    real = Triflash.attend

    def noted(self: Triflash, workload: Workload, problem: object) -> object:
        seen.append(workload)
        return real(self, workload, problem)  # type: ignore[arg-type]

    monkeypatch.setattr(Triflash, "attend", noted)
    compile_only(TWO, provider("triflash-onebias"), QUICK)
    assert seen == [replace(TWO, second=None)]
    assert Side(Contest(seen[0], QUICK), provider("triflash")).step()[3].shape == TWO.bias_shape
