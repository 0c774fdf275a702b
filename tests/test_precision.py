"""The precision of float32 products is chosen, not left to Triton, whose own default is TF32."""

from __future__ import annotations

import pytest
import torch

from here import triton_only
from triflash import flash_attn_func, ops, oracle
from triflash.spec import resolve_precision

# Relative norm of the error. Triton's interpreter computes all of them in IEEE float32; on a GPU the bounds are tight enough to tell them apart.
LIMITS = {"ieee": 2e-6, "tf32x3": 2e-5, "tf32": 4e-3}


@triton_only
@pytest.mark.parametrize("precision", LIMITS)
def test_precision_of_products(precision: str, device: torch.device) -> None:
    q, k, v, dout = (torch.randn(2, 70, 2, 64, device=device) for _ in range(4))
    bias = torch.randn(1, 1, 2, 70, 70, device=device)
    options = (1, None, 0, 0.125, precision, "triton")
    out, lse, rest = ops.attention_forward(q, k, v, bias, *options)
    grads = ops.attention_backward(dout, None, q, k, v, bias, out, lse, rest, *options, [True] * 4)
    exact = [x.double().requires_grad_() for x in (q, k, v, bias)]
    wanted, _ = oracle.attention(*exact, hi=0)
    wanted_grads = torch.autograd.grad(wanted, exact, dout.double())
    for name, got, want in zip(("out", "dq", "dk", "dv", "dbias"), (out, *grads[:4]), (wanted, *wanted_grads), strict=True):
        error = ((got - want).norm() / want.norm()).item()
        assert error < LIMITS[precision], f"{name}: {error:.2e}"
        if device.type == "cuda" and precision == "tf32":
            assert error > LIMITS["tf32x3"], f"{name}: {error:.2e} is too good to be TF32"


@pytest.mark.gpu
def test_precision_follows_pytorchs_setting(device: torch.device) -> None:
    q, k, v = (torch.randn(1, 64, 2, 64, device=device) for _ in range(3))
    before = torch.get_float32_matmul_precision()
    try:
        errors = {}
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            out = flash_attn_func(q, k, v)
            torch.set_float32_matmul_precision("highest")
            errors[setting] = (out - oracle.attention(q, k, v)[0]).norm().item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["high"] > 20 * errors["highest"], errors


def test_every_way_to_set_pytorchs_precision_is_read() -> None:
    """The old switch and the new attribute, which refuse to be mixed, and whose getters raise where they disagree."""
    before = torch.get_float32_matmul_precision()
    q = torch.randn(1, 5, 1, 8)
    try:
        highest = "ieee" if hasattr(torch.backends.cuda.matmul, "fp32_precision") else "default"
        for setting, wanted in (("highest", highest), ("high", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert resolve_precision("") == wanted
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            for setting in ("tf32", "ieee"):
                torch.backends.cuda.matmul.fp32_precision = setting
                assert resolve_precision("") == setting
                flash_attn_func(q, q, q)
    finally:
        torch.set_float32_matmul_precision(before)
