"""The oracle judges everything else, so it is held against other people's code: PyTorch's own attention, and a loop over scalars."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import triflash
from triflash import oracle


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 7, 3), (1, 2, 1, 9), (2, 1, 3, 8), (2, 2, 9, 4)], ids=str)
def test_against_pytorch(shape: tuple[int, int, int, int], causal: bool) -> None:
    B, H, M, N = shape
    q, k, v = (torch.randn(B, length, H, 6, dtype=torch.float64, requires_grad=True) for length in (M, N, N))
    bias = torch.randn(B, H, M, N, dtype=torch.float64, requires_grad=True)
    out, _ = oracle.attention(q, k, v, bias, hi=0 if causal else None)
    mask = bias.masked_fill(torch.ones(M, N, dtype=torch.bool).triu(1), -math.inf) if causal else bias
    wanted = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)
    torch.testing.assert_close(out, wanted)
    dout = torch.randn_like(out)
    grads = (torch.autograd.grad(o, (q, k, v, bias), dout) for o in (out, wanted))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("band", [(None, None), (None, 0), (-2, 1), (1, 2), (None, -4), (3, None), (9, 9), (2, 1)], ids=str)
def test_against_a_loop_over_scalars(band: tuple[int | None, int | None]) -> None:
    lo, hi = band
    M, N, D = 5, 6, 3
    q, k, v = torch.randn(1, M, 1, D), torch.randn(1, N, 1, D), torch.randn(1, N, 1, D)
    mask = torch.rand(M, N) < 0.7
    out, lse = oracle.attention(q, k, v, mask, lo=lo, hi=hi, scale=0.7)
    for i in range(M):
        weights = {
            j: math.exp(0.7 * sum(float(q[0, i, 0, d]) * float(k[0, j, 0, d]) for d in range(D)))
            for j in range(N)
            if mask[i, j] and (lo is None or j - i >= lo) and (hi is None or j - i <= hi)
        }
        total = sum(weights.values())
        assert math.isclose(lse[0, 0, i].item(), math.log(total) if weights else -math.inf, rel_tol=1e-12, abs_tol=1e-12)
        for d in range(D):
            wanted = sum(w * float(v[0, j, 0, d]) for j, w in weights.items()) / total if weights else 0.0
            assert math.isclose(out[0, i, 0, d].item(), wanted, rel_tol=1e-12, abs_tol=1e-12)


def test_rows_that_see_nothing_have_zero_gradient() -> None:
    q, k, v = (torch.randn(1, 4, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.zeros(4, 4, dtype=torch.float64)
    bias[1] = -torch.inf
    bias.requires_grad_()
    out, lse = oracle.attention(q, k, v, bias)
    assert (out[:, 1] == 0).all() and lse[0, 0, 1] == -torch.inf
    dq, dk, dv, dbias = torch.autograd.grad([out, lse], [q, k, v, bias], [torch.ones_like(out), torch.ones_like(lse)])
    assert (dq[:, 1] == 0).all() and (dbias[1] == 0).all()
    assert all(g.isfinite().all() for g in (dq, dk, dv, dbias))


def test_two_batch_levels_are_plain_broadcasting() -> None:
    q, k, v = (torch.randn(6, 4, 2, 3, dtype=torch.float64) for _ in range(3))
    for shape in [(2, 1, 2, 4, 4), (1, 3, 2, 4, 4), (2, 3, 1, 1, 4), (1, 1, 2, 4, 1)]:
        bias = torch.randn(shape, dtype=torch.float64)
        full = bias.expand(2, 3, 2, 4, 4).reshape(6, 2, 4, 4)
        for a, b in zip(oracle.attention(q, k, v, bias, batch_inner=3), oracle.attention(q, k, v, full), strict=True):
            assert torch.equal(a, b)


def test_oracle_is_a_backend() -> None:
    """Float64 inside, for any dtype outside, with gradients."""
    q = torch.randn(1, 5, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(2, 5, 5, requires_grad=True)
    with triflash.backend("oracle"), triflash.record_launches() as ran:
        out = triflash.flash_attn_func(q, q, q, bias, True)
    out.backward(torch.ones_like(out))
    assert ran == ["oracle: forward"] and out.dtype == torch.bfloat16
    wanted = scaled_dot_product_attention(
        *(q.double().transpose(1, 2) for _ in "qkv"), bias.double().masked_fill(~oracle.visible(5, 5, None, 0), -math.inf)
    )
    torch.testing.assert_close(out, wanted.transpose(1, 2).to(out.dtype))
    exact = torch.autograd.grad(wanted.sum(), (q, bias))
    assert q.grad is not None and bias.grad is not None
    torch.testing.assert_close(q.grad, exact[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(bias.grad, exact[1])
