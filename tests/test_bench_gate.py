"""The gate rejects what it should, on all of a small problem and on parts of a large one, and agrees with the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from triflash import oracle
from triflash.cli.bench import formula
from triflash.cli.bench.formula import Options
from triflash.cli.bench.gate import Problem, reference, verdict

RESULTS = ("out", "dq", "dk", "dv", "dbias")
ENOUGH = 0.2  # a bias of one column only shifts its rows: its gradient is 0, and its plain yardstick some 0.01
BIASES = {
    "1hqk": ((1, 1, 4, 40, 48), 1),
    "bhqk": ((4, 1, 4, 40, 48), 1),
    "1h1k": ((1, 1, 4, 1, 48), 1),
    "b11k": ((4, 1, 1, 1, 48), 1),
    "1hq1": ((1, 1, 4, 40, 1), 1),
    "11qk": ((1, 1, 1, 40, 48), 1),
    "b1hqk": ((2, 1, 4, 40, 48), 2),
    "1ihqk": ((1, 2, 4, 40, 48), 2),
    "1ih1k": ((1, 2, 4, 1, 48), 2),
    "b1h1k": ((2, 1, 4, 1, 48), 2),
    "bih1k": ((2, 2, 4, 1, 48), 2),
}
CASES = {
    **{kind: dict(bias=kind) for kind in BIASES},
    "causal": dict(bias="1hqk", hi=0),
    "window": dict(bias="1h1k", lo=-7, hi=0),
    "groups": dict(bias="1hqk", Hk=2),
    "groups, keys' bias": dict(bias="1h1k", Hk=2),
    "soft cap": dict(bias="1hqk", softcap=2.0, Hk=1),
    "sinks": dict(bias="1hqk", sinks=True, hi=0),
}


def problem(bias: str = "1hqk", Hk: int = 4, sinks: bool = False, dtype: torch.dtype = torch.float16, **options: object) -> Problem:
    shape, inner = BIASES[bias]
    q, dout = (torch.randn(4, 40, 4, 16).to(dtype) for _ in range(2))
    k, v = (torch.randn(4, 48, Hk, 16).to(dtype) for _ in range(2))
    sink = torch.randn(4) if sinks else None
    return Problem(q, k, v, torch.randn(shape).to(dtype), dout, Options(scale=0.3, batch_inner=inner, sinks=sink, **options))  # type: ignore[arg-type]


def results(x: Problem, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """By autograd through the dense formula, rounded to the inputs' dtype."""
    assert x.bias is not None
    leaves = [t.to(dtype).requires_grad_() for t in (x.q, x.k, x.v, x.bias)]
    out = formula.attention(*leaves, x.options)
    grads = torch.autograd.grad(out, leaves, x.dout.to(dtype))
    return dict(zip(RESULTS, (t.detach().to(x.q.dtype) for t in (out, *grads)), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_formula_is_the_oracle(name: str) -> None:
    x = problem(**CASES[name], dtype=torch.float64)  # type: ignore[arg-type]
    o = x.options
    more = dict(batch_inner=o.batch_inner, lo=o.lo, hi=o.hi, scale=o.scale, softcap=o.softcap or 0.0, sink=o.sinks)
    wanted, _ = oracle.attention(x.q, x.k, x.v, x.bias, **more)  # type: ignore[arg-type]
    torch.testing.assert_close(formula.attention(x.q, x.k, x.v, x.bias, x.options), wanted)


def test_a_sink_is_one_more_key_without_a_value() -> None:
    x = problem(sinks=True, dtype=torch.float64)
    assert x.bias is not None and x.options.sinks is not None
    k, v = (torch.cat([t, torch.zeros(4, 1, 4, 16, dtype=torch.float64)], 1) for t in (x.k, x.v))
    bias = torch.cat([x.bias[0], x.options.sinks.double()[None, :, None, None].expand(1, 4, 40, 1)], 3)
    torch.testing.assert_close(formula.attention(x.q, x.k, x.v, x.bias, x.options), oracle.attention(x.q, k, v, bias, scale=0.3)[0])


@pytest.mark.parametrize("limit", [10**9, 1500], ids=["whole", "sampled"])
@pytest.mark.parametrize("name", CASES)
def test_right_results_pass(name: str, limit: int) -> None:
    x = problem(**CASES[name])  # type: ignore[arg-type]
    parts = reference(x, RESULTS, limit)
    assert {part.name for part in parts} == set(RESULTS)
    assert verdict(parts, results(x)) is None


@pytest.mark.parametrize("name", CASES)
def test_an_error_anywhere_is_caught_where_nothing_is_sampled(name: str) -> None:
    """In any result: in the last tile only, in one head of one batch entry, an index that is not the first or last."""
    x = problem(**CASES[name])  # type: ignore[arg-type]
    parts, right = reference(x, RESULTS), results(x)
    for result in RESULTS:
        places = {
            "the last element": tuple(-1 for _ in right[result].shape),
            "the first": tuple(0 for _ in right[result].shape),
            "one in the middle": tuple(size // 2 for size in right[result].shape),
        }
        for where, at in places.items():
            wrong = right[result].clone()
            wrong[at] += 0.2 * right[result].abs().max() + ENOUGH
            said = verdict(parts, {**right, result: wrong})
            assert said is not None and said.startswith(f"{result}: "), (result, where)


def planted(result: str, x: Tensor) -> dict[str, tuple[object, ...]]:
    """Slices of a result that the sampled gate promises to see."""
    if result in ("out", "dq"):  # the ends of the sequence in each head; every position of the last one
        return {"first rows of one head": (1, slice(0, 8), 2), "last row": (2, -1, 1), "a row of the last head": (-1, 11, -1)}
    if result in ("dk", "dv"):
        return {"last keys of the last head": (-1, slice(-4, None), -1), "a key of the last head": (-1, 17, -1)}
    if x.shape[3] > 1:
        return {"last row": (-1, -1, 0, -1), "first row of a middle head": (0, 0, x.shape[2] // 2, 0)}
    return {"last keys of the last head": (-1, -1, -1, slice(None), slice(-1, None))}


@pytest.mark.parametrize("name", CASES)
def test_an_error_in_what_is_sampled_is_caught(name: str) -> None:
    x = problem(**CASES[name])  # type: ignore[arg-type]
    parts, right = reference(x, RESULTS, limit=2000), results(x)
    for result in RESULTS:
        for where, at in planted(result, right[result]).items():
            wrong = right[result].clone()
            wrong[at] = wrong[at] * 1.2 + 0.2 * right[result].abs().max() + ENOUGH
            said = verdict(parts, {**right, result: wrong})
            assert said is not None and said.startswith(f"{result}: "), (result, where)
    nan = right["dk"].clone()
    nan[1, 5, 0, 3] = torch.nan  # nowhere that is sampled
    assert "not finite" in (verdict(parts, {**right, "dk": nan}) or "")


@pytest.mark.parametrize("name", CASES)
def test_parts_are_the_whole_on_their_part(name: str) -> None:
    x = problem(**CASES[name])  # type: ignore[arg-type]
    whole = {part.name: part for part in reference(x, RESULTS)}
    exact = results(x, torch.float64)
    for part in reference(x, RESULTS, limit=1500):
        for field in ("reference", "plain", "slack"):
            all_of_it = getattr(whole[part.name].judgement, field)
            torch.testing.assert_close(
                getattr(part.judgement, field), all_of_it[part.index], rtol=2e-3, atol=1e-3 if field == "plain" else 1e-9
            )
        torch.testing.assert_close(part.judgement.reference.half(), exact[part.name][part.index], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    x = problem(hi=0, dtype=dtype)
    parts = reference(x, RESULTS)
    assert verdict(parts, results(x)) is None
    assert verdict(parts, {name: t * 1.03 for name, t in results(x).items()}) is not None


def test_boxes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A problem cut into many boxes, with the same parts as one in a single box."""
    from triflash.cli.bench import gate

    for case in CASES.values():
        x = problem(**case, dtype=torch.float64)  # type: ignore[arg-type]
        monkeypatch.setattr(gate, "BOX", 2**22)
        one = reference(x, RESULTS)
        monkeypatch.setattr(gate, "BOX", 700)
        for a, b in zip(one, reference(x, RESULTS), strict=True):
            torch.testing.assert_close(a.judgement.reference, b.judgement.reference)
            torch.testing.assert_close(a.judgement.plain, b.judgement.plain)
            torch.testing.assert_close(a.judgement.slack, b.judgement.slack)


def test_hidden_rows_and_masks() -> None:
    x = problem("1hqk")
    assert x.bias is not None
    x.bias[..., 3, :] = -torch.inf
    assert verdict(reference(x, RESULTS), results(x)) is None
    mask = Problem(x.q, x.k, x.v, torch.rand(x.bias.shape) < 0.7, x.dout, x.options)
    out = formula.attention(x.q, x.k, x.v, mask.bias, mask.options)
    assert verdict(reference(mask, ("out",)), {"out": out}) is None
    assert verdict(reference(mask, ("out",)), {"out": torch.zeros_like(out)}) is not None


@pytest.mark.parametrize("limit", [10**9, 1500], ids=["whole", "sampled"])
@pytest.mark.parametrize("kinds", [("b1hqk", "11h1k"), ("11h1k", "bi1q1"), ("b1h1k", "1ihqk")], ids="/".join)
def test_two_biases(kinds: tuple[str, str], limit: int) -> None:
    """Both are added, and both gradients judged, each by its own sums."""
    shapes = {**{kind: shape for kind, (shape, _) in BIASES.items()}, "11h1k": (1, 1, 4, 1, 48), "bi1q1": (2, 2, 1, 40, 1)}
    first, second = (torch.randn(shapes[kind]).half() for kind in kinds)
    x = replace(problem(), bias=first, second=second, options=Options(scale=0.3, batch_inner=2))
    names = (*RESULTS, "dsecond")
    leaves = [t.double().requires_grad_() for t in (x.q, x.k, x.v, first, second)]
    out = formula.attention(*leaves[:3], leaves[3:], x.options)
    wanted, _ = oracle.attention(*leaves[:4], second_bias=leaves[4], batch_inner=2, scale=0.3)
    torch.testing.assert_close(out, wanted)
    grads = torch.autograd.grad(out, leaves, x.dout.double())
    right = dict(zip(names, (t.detach().half() for t in (out, *grads)), strict=True))
    parts = reference(x, names, limit)
    assert {part.name for part in parts} == set(names) and verdict(parts, right) is None
    for result in ("dbias", "dsecond"):
        wrong = right[result].clone()
        wrong[-1, -1, -1, -1, :] += 0.2 * wrong.abs().max() + ENOUGH
        said = verdict(parts, {**right, result: wrong})
        assert said is not None and said.startswith(f"{result}: ")
