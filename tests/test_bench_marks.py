"""Dropout, ALiBi and masks in the bench: who computes them, what is counted, and that the gate judges whoever draws by his own marks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from triflash import oracle
from triflash.cli.bench import exact, flexible, formula, marks
from triflash.cli.bench.contest import Contest, Settings, Side
from triflash.cli.bench.gate import reference, verdict
from triflash.cli.bench.measure import measure
from triflash.cli.bench.providers import Sdpa, provider
from triflash.cli.bench.workloads import Workload
from triflash.dropout import keep_mask, rescale

CPU = torch.device("cpu")
BOTH = Settings(("fwd", "bwd"), CPU, 0.001, 2, 0)
PLAIN = Workload("x", 2, 4, 40, 40, 8, kv_heads=2, hi=0, dtype="fp32")
DROPS = replace(PLAIN, dropout=0.25)
MASKS = {
    "all": dict(bias="b11k", bias_values="all mask"),
    "holes": dict(bias="111k", bias_values="holes mask", hi=None),
    "holes of tiles": dict(bias="1hqk", bias_values="holes mask"),
    "padding": dict(bias="b11k", bias_values="padding mask", hi=None),
    "documents": dict(bias="11qk", bias_values="documents mask", hi=None),
    "documents, causal": dict(bias="11qk", bias_values="documents mask"),
}


def masked(name: str) -> Workload:
    return replace(PLAIN, **MASKS[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [None, 1])
def test_marks_of_the_oracle(limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, and in parts and boxes, which draw the marks of their places."""
    monkeypatch.setattr("triflash.cli.bench.gate.BOX", 100)
    x = DROPS.build(CPU)
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
    seed = torch.tensor([marks.SEED, 0])
    out, _ = oracle.attention(*leaves, hi=0, dropout_seed=seed, dropout_p=0.25, dtype=torch.float64)
    results = dict(zip(("out", "dq", "dk", "dv"), (out.float().detach(), *torch.autograd.grad(out, leaves, x.dout.double())), strict=True))
    x = replace(x, marks=provider("triflash").marks(DROPS, x))
    assert verdict(reference(x, tuple(results), limit), results) is None
    kept = keep_mask(seed, 0.25, 2, 4, slice(0, 40), slice(0, 40)) * rescale(0.25)
    torch.testing.assert_close(formula.attention(x.q, x.k, x.v, None, replace(x.options, kept=kept)), results["out"], rtol=1e-4, atol=1e-5)
    other = replace(x, marks=replace(x.marks, factor=1.0))  # type: ignore[type-var]
    assert verdict(reference(other, tuple(results), limit), results) is not None


def test_whoever_draws_is_judged_by_his_own_marks() -> None:
    """triflash's and SDPA's differ, and both are right; timed in turns with the plain call."""
    names = ("triflash", "triflash-tiled", "sdpa", "triflash-plain", "dense")
    rows = measure(DROPS, [provider(name) for name in names], BOTH, lambda _: None)
    assert [(row.provider, row.status, row.reason) for row in rows if row.which == "bwd"] == [
        *((name, "ok", "") for name in names[:4]), ("dense", "dash", "no dropout"),
    ]  # fmt: skip
    x = DROPS.build(CPU)
    place = (range(2), range(4), range(40), slice(0, 40))
    ours, theirs = (provider(name).marks(DROPS, x) for name in ("triflash", "sdpa"))
    assert theirs.factor == pytest.approx(4 / 3) and ours.factor == pytest.approx(4 / 3, rel=1e-4)
    seen = oracle.visible(40, 40, None, 0).expand(2, 4, -1, -1)
    shares = [m.kept(*place)[seen].double().mean().item() for m in (ours, theirs)]
    assert shares == pytest.approx([0.75, 0.75], abs=0.03) and (ours.kept(*place) != theirs.kept(*place))[seen].double().mean() > 0.3
    assert torch.equal(theirs.kept(range(1, 2), range(2, 3), range(8, 20), slice(3, 9)), theirs.kept(*place)[1:2, 2:3, 8:20, 3:9])


def test_marks_of_some_places() -> None:
    """A part of the whole, every other entry, too."""
    w = replace(DROPS, batch=5)
    x = w.build(CPU)
    for name in ("triflash", "sdpa"):
        kept = provider(name).marks(w, x).kept
        whole = kept(range(5), range(4), range(40), slice(0, 40))
        assert torch.equal(kept(range(1, 5, 2), range(2, 4), range(8, 20), slice(3, 9)), whole[1:5:2, 2:4, 8:20, 3:9])


def test_marks_need_not_fit_the_columns() -> None:
    """More keys than values have columns, and no multiple; hidden keys are nobody's."""
    w = replace(DROPS, queries=13, keys=21, hi=None, value_dim=5)
    x = w.build(CPU)
    assert measure(w, [provider("sdpa")], BOTH, lambda _: None)[1].status == "ok"
    kept = provider("sdpa").marks(w, x).kept(range(2), range(4), range(13), slice(0, 21))
    assert kept.shape == (2, 4, 13, 21) and 0.6 < kept.double().mean() < 0.9


def test_wrong_dropout_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a peer that draws other marks than it was asked for; and of one that fails the others go on."""
    real = Sdpa.attend

    def off(self: Sdpa, w: Workload, problem: Any) -> Any:
        entry = real(self, w, problem)
        return replace(entry, call=lambda *x: (torch.rand(1), entry.call(*x))[1] if x[0].any() else entry.call(*x))

    monkeypatch.setattr(Sdpa, "attend", off)
    rows = measure(DROPS, [provider("sdpa"), provider("triflash")], BOTH, lambda _: None)
    assert [row.status for row in rows] == ["WRONG", "WRONG", "ok", "ok"] and rows[0].reason.startswith("out: ")

    def fails(self: Sdpa, w: Workload, problem: Any) -> Any:
        raise RuntimeError("no kernel here")

    monkeypatch.setattr(Sdpa, "attend", fails)
    rows = measure(DROPS, [provider("sdpa"), provider("triflash")], BOTH, lambda _: None)
    assert [(row.status, row.reason) for row in rows] == [("dash", "RuntimeError: no kernel here")] * 2 + [("ok", "")] * 2


def test_random_numbers_of_the_program_are_left_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    Side(Contest(DROPS, BOTH, True, provider("sdpa")), provider("sdpa")).results("step")
    assert torch.equal(torch.rand(4), wanted)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    """By everyone who takes them; FlexAttention by its own dense emulation."""
    w = masked(name)
    rows = measure(w, [provider(n) for n in ("triflash", "sdpa", "dense", "chunked", "triflash-plain")], BOTH, lambda _: None)
    assert [(row.status, row.reason) for row in rows] == [("ok", "")] * 10
    x = w.build(CPU)
    assert x.bias is not None and x.bias.dtype == torch.bool and x.bias.shape == w.bias_shape == w.described().bias.shape  # type: ignore[union-attr]
    assert w.described().bias.dtype == torch.bool  # type: ignore[union-attr]
    with torch.no_grad():
        out = flexible.attend(w, x, dense=True)(x.q, x.k, x.v, x.bias)
    torch.testing.assert_close(out, formula.attention(x.q, x.k, x.v, x.bias, x.options), rtol=1e-4, atol=1e-5)


def test_what_masks_show_is_counted() -> None:
    """Pairs exactly, but for holes, which are drawn; a byte a place."""
    for name, w in ((n, masked(n)) for n in MASKS if "holes" not in n):
        bias = w.build(CPU).bias
        assert bias is not None
        seen = bias.squeeze(1).expand(2, 4, 40, 40) & oracle.visible(40, 40, w.lo, w.hi)
        assert w.pairs == seen.sum(), name
    w = masked("holes of tiles")
    assert w.pairs == w.plain().pairs and w.bytes("fwd") == w.plain().bytes("fwd") - 2 * 2 * 40 * 2 * 8 * 4 + 4 * 40 * 40
    assert sum(replace(w, bias_values="documents mask", keys=43).documents) == 43
    assert replace(PLAIN, batch=4, batch_inner=2, bias="bi11k", bias_values="padding mask").build(CPU).bias.shape == (2, 2, 1, 1, 40)  # type: ignore[union-attr]


@pytest.mark.parametrize("band", [{}, {"hi": None}, {"lo": -7}], ids=str)
def test_slopes(band: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts and boxes, too, whose first query is not the first."""
    w = replace(PLAIN, slopes=True, **band)
    monkeypatch.setattr("triflash.cli.bench.gate.BOX", 300)
    rows = measure(w, [provider(n) for n in ("triflash", "dense", "chunked", "sdpa", "triflash-plain")], BOTH, lambda _: None)
    assert [row.status for row in rows] == ["ok"] * 6 + ["dash"] * 2 + ["ok"] * 2 and rows[6].reason == "takes no ALiBi slopes"
    x = w.build(CPU)
    wanted = oracle.attention(x.q, x.k, x.v, alibi_slopes=x.options.slopes, lo=w.lo, hi=w.hi)[0].float()
    torch.testing.assert_close(formula.attention(x.q, x.k, x.v, None, x.options), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(flexible.attend(w, x, dense=True)(x.q, x.k, x.v, None), wanted, rtol=1e-4, atol=1e-5)
    box = exact.Box(x, range(1), range(4), range(20, 30), backward=False)
    torch.testing.assert_close(box.exact["out"].float(), wanted[:1, 20:30], rtol=1e-4, atol=1e-5)


def test_who_lacks_what() -> None:
    gpu = torch.device("cuda")
    for field, lacking in (("dropout", 0.1), ("deterministic", True), ("slopes", True)):
        w = replace(PLAIN, **{field: lacking})
        able = {
            n
            for n in ("triflash", "triflash-triton", "sdpa", "sdpa-cudnn", "flex", "dense", "chunked", "triflash-compiled")
            if provider(n).why_not(w, gpu) is None
        }
        triflash = {"triflash", "triflash-triton"}
        assert able == {
            "dropout": {*triflash, "sdpa", "sdpa-cudnn"}, "deterministic": {*triflash, "triflash-compiled"},
            "slopes": {*triflash, "triflash-compiled", "flex", "dense", "chunked"},
        }[field], field  # fmt: skip


def test_keys_of_other_runs_are_what_they_were() -> None:
    assert PLAIN.key == "x | b2/1 h4/2 s40x40 d8x8 | None..0 | None | fp32"
    some = {w.key for w in (PLAIN, DROPS, replace(PLAIN, slopes=True), replace(PLAIN, deterministic=True), *map(masked, MASKS))}
    assert len(some) == 4 + len(MASKS)


def test_the_plain_call() -> None:
    w = replace(DROPS, lo=-7, softcap=5.0, sinks=True, slopes=True, deterministic=True, bias="b11k", bias_values="padding mask")
    assert w.plain() == replace(PLAIN, kv_heads=4) and replace(w, hi=3).plain() == replace(PLAIN, kv_heads=4, hi=None)
