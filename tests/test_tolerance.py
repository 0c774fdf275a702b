"""Tests of the tests: the judge rejects what it should, and unwritten memory is seen."""

from __future__ import annotations

import pytest
import torch

from cases import Case, build
from judging import judge
from triflash import oracle
from triflash.cli.bench.tolerance import Judgement, assert_close, closed_backward, disagreement

CASE = Case("judge", B=2, M=24, N=20, bias="1h1k", dtype=torch.float16)


def judgements(dtype: torch.dtype) -> dict[str, Judgement]:
    case = Case("judge", B=2, M=24, N=20, bias="1h1k", dtype=dtype)
    return judge(case, build(case, torch.device("cpu")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("result", ["out", "dq", "dk", "dv", "db"])
def test_reference_itself_passes_and_wrong_results_fail(result: str, dtype: torch.dtype) -> None:
    judgement = judgements(dtype)[result]
    good = judgement.reference.to(dtype)
    assert disagreement(good, judgement) is None
    index = tuple(size // 2 for size in good.shape)

    def changed(value: float) -> torch.Tensor:
        bad = good.clone()
        bad[index] = value
        return bad

    wrong = {
        "3 % too large": good * 1.03,
        "one element off by a fifth of the largest": changed(good[index].item() + 0.2 * good.abs().max().item()),
        "one NaN": changed(float("nan")),
        "one infinity": changed(float("inf")),
        "unwritten memory": torch.full_like(good, float("nan")),
        "zeros": torch.zeros_like(good),
        "another shape": good[..., :-1],
        "columns shifted by one": good.roll(1, dims=-1),
    }
    for name, bad in wrong.items():
        assert disagreement(bad, judgement) is not None, f"accepted: {name}"
        with pytest.raises(AssertionError, match="^x: "):
            assert_close("x", bad, judgement)


def test_message_names_the_worst_coordinate() -> None:
    reference = torch.zeros(3, 4, dtype=torch.float64)
    got = torch.zeros(3, 4)
    got[2, 1] = 0.5
    assert "worst at (2, 1): got 0.5, wanted 0" in (disagreement(got, Judgement(reference, reference, 2.0, torch.float32)) or "")


def test_infinities_must_be_the_same_ones() -> None:
    reference = torch.tensor([-torch.inf, 1.0], dtype=torch.float64)
    judgement = Judgement(reference, reference, 2.0, torch.float32)
    assert disagreement(torch.tensor([-torch.inf, 1.0]), judgement) is None
    for bad in ([torch.inf, 1.0], [-1e30, 1.0], [float("nan"), 1.0], [-torch.inf, -torch.inf], [-torch.inf, float("nan")]):
        assert disagreement(torch.tensor(bad), judgement) is not None, bad


def test_a_yardstick_that_overflows_is_refused() -> None:
    judgement = Judgement(torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, torch.inf]), 2.0, torch.float16)
    assert "yardstick" in (disagreement(torch.zeros(2), judgement) or "")


def test_closed_backward_agrees_with_autograd() -> None:
    """Two derivations of the reference gradients: autograd through the oracle, and the formula on paper."""
    q, k, v, dout = (torch.randn(2, 7, 3, 5, dtype=torch.float64) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = oracle.attention(q, k, v, hi=0, scale=0.3)
    dlse = torch.randn_like(lse)
    wanted = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    s = (torch.einsum("bmhd,bnhd->bhmn", q, k) * 0.3).masked_fill(~oracle.visible(7, 7, None, 0), -torch.inf)
    with torch.no_grad():
        got = closed_backward(q, k, v, torch.exp(s - lse[..., None]), out, dout, dlse, 0.3)
    for a, b in zip(wanted, (got.dq, got.dk, got.dv), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_allocations_are_poisoned(dtype: torch.dtype, device: torch.device) -> None:
    like = torch.zeros(3, 5, dtype=dtype, device=device)
    fresh = {
        "empty": torch.empty(4, 4, dtype=dtype, device=device),
        "empty_like": torch.empty_like(like),
        "empty_like contiguous": torch.empty_like(like.t(), memory_format=torch.contiguous_format),
        "empty_strided": torch.empty_strided((3, 2), (1, 3), dtype=dtype, device=device),
        "new_empty": like.new_empty(7),
        "new_empty of another dtype": like.new_empty(7, dtype=torch.float32),
    }
    for name, tensor in fresh.items():
        assert tensor.isnan().all(), name


def test_an_unwritten_element_is_seen(device: torch.device) -> None:
    """What an unfinished kernel would do: write all rows but the last of an allocation."""
    reference = torch.ones(4, 8, dtype=torch.float64, device=device)
    got = torch.empty(4, 8, device=device)
    got[:3] = 1.0
    assert "8 of 32 elements are not finite" in (disagreement(got, Judgement(reference, reference, 2.0, torch.float32)) or "")
