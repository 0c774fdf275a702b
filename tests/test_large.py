"""Offsets beyond 32 bits: views with huge strides, and tensors of more than 2^31 elements.

A view with huge strides must give the bits that a compact copy of it gives; no reference is needed. The memory between the rows is never
touched, so on Linux CPUs it costs address space only.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import triflash
from here import BACKENDS, hopper_only, triton_only
from running import small_tiles
from triflash import ops, oracle

pytestmark = pytest.mark.unpoisoned
F16 = torch.float16
FAR = 2**31 + 64


def spread(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x with other strides, in memory of its own; skips the test where there is not that much."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    if x.is_cuda and torch.cuda.mem_get_info()[0] < span * x.element_size() + 2**30:
        pytest.skip(f"needs {span * x.element_size() / 2**30:.0f} GiB of free GPU memory")
    try:
        base = torch.empty(span, dtype=x.dtype, device=x.device)
    except (RuntimeError, MemoryError):
        pytest.skip(f"needs {span * x.element_size() / 2**30:.0f} GiB of address space")
    view = base.as_strided(x.shape, strides)
    view.copy_(x)
    return view


@dataclass(frozen=True)
class Far:
    """Which argument is spread out, and its strides (batch, row, head, column; of a bias the five canonical ones)."""

    name: str
    argument: str
    strides: tuple[int, ...]

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


B, M, N, H, D = 2, 34, 35, 2, 16
FARS = [
    Far("q batch", "q", (FAR, 32, 16, 1)),
    Far("q heads", "q", (544, 16, FAR, 1)),
    Far("q rows", "q", (32, 2**27 + 64, 16, 1)),
    Far("k rows", "k", (32, 2**27 + 64, 16, 1)),
    Far("v rows", "v", (32, 2**27 + 64, 16, 1)),
    Far("v heads", "v", (560, 16, FAR, 1)),
    Far("dout rows", "dout", (32, 2**27 + 64, 16, 1)),
    Far("bias heads", "bias", (4096, 4096, FAR, 35, 1)),
    Far("bias rows", "bias", (40, 40, 70, 2**27 + 64, 1)),
    Far("bias columns", "bias", (40, 40, 70, 1, 2**27 + 64)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("far", FARS, ids=str)
def test_huge_strides(far: Far, backend: str, device: torch.device) -> None:
    shapes = {"q": (B, M, H, D), "k": (B, N, H, D), "v": (B, N, H, D), "dout": (B, M, H, D), "bias": (1, 1, H, M, N)}
    inputs = {name: torch.randn(shape, device=device).to(F16) for name, shape in shapes.items()}
    options = (1, None, 3, 0.3, "", backend)

    def results(x: dict[str, Tensor]) -> list[Tensor]:
        tensors = (x["q"], x["k"], x["v"], x["bias"])
        with small_tiles((32, 32)):
            out, lse, rest = ops.attention_forward(*tensors, *options)
            return [out, lse, *ops.attention_backward(x["dout"], None, *tensors, out, lse, rest, *options, [True] * 4)[:4]]

    wanted = results(inputs)
    got = results({**inputs, far.argument: spread(inputs[far.argument], far.strides)})
    # PyTorch's products may choose another algorithm for other strides, and Triton another order of a row's sum for another bias layout.
    tolerance = 0.0 if backend == "triton" and far.argument != "bias" else 2e-3
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dbias"), got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("far", [far for far in FARS if far.argument != "dout"], ids=str)
def test_huge_strides_forward_on_hopper(far: Far, device: torch.device) -> None:
    """Also of a bias: what its tiles cannot be fetched from is copied, values unchanged."""
    shapes = {"q": (B, M, H, D), "k": (B, N, H, D), "v": (B, N, H, D), "bias": (1, 1, H, M, N)}
    inputs = {name: torch.randn(shape, device=device).to(F16) for name, shape in shapes.items()}
    spread_out = {**inputs, far.argument: spread(inputs[far.argument], far.strides)}
    with small_tiles((32, 32), "hopper"):
        wanted, got = (ops.attention_forward(*x.values(), 1, None, 3, 0.3, "", "hopper") for x in (inputs, spread_out))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@triton_only
@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
def test_gradients_into_huge_strides(name: str, device: torch.device) -> None:
    q, k, v, dout = (torch.randn(B, length, H, D, device=device).to(F16) for length in (M, N, N, M))
    options = (1, None, None, 0.3, "", "triton")
    with small_tiles((32, 32)):
        out, lse, rest = ops.attention_forward(q, k, v, None, *options)
        wanted = dict(
            zip(
                ("dq", "dk", "dv"),
                ops.attention_backward(dout, None, q, k, v, None, out, lse, rest, *options, [True] * 3 + [False]),
                strict=False,
            )
        )
        given = {n: torch.zeros_like(x) for n, x in wanted.items() if n in ("dq", "dk", "dv")}
        given[name] = spread(given[name], (32, 2**27 + 64, 16, 1))
        ops.attention_backward_(dout, None, q, k, v, None, out, lse, rest, *options, *given.values(), None)
    for n, x in given.items():
        assert torch.equal(x, wanted[n]), n


def needs_gib(gib: float) -> None:
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", pytest.param("auto", marks=hopper_only)])
def test_more_than_2_31_elements(backend: str, device: torch.device) -> None:
    """q, k, v, out and their gradients of 2^31 + elements each: the last batch entries are as if they were alone."""
    needs_gib(60)
    shape = (2**17 + 3, 16, 16, 64)
    q = torch.randn(shape, device=device, dtype=F16)
    tail = q[-3:].clone().requires_grad_()
    q.requires_grad_()
    with triflash.backend(backend):
        out = triflash.flash_attn_func(q, q, q, None, True)
        alone = triflash.flash_attn_func(tail, tail, tail, None, True)
        assert torch.equal(out[-3:], alone)
        out.backward(q.detach())
        alone.backward(tail.detach())
    assert q.grad is not None and tail.grad is not None
    assert torch.equal(q.grad[-3:], tail.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", pytest.param("auto", marks=hopper_only)])
def test_bias_of_more_than_2_31_elements(backend: str, device: torch.device) -> None:
    """A bias and its gradient of 46 400 x 46 400, in float16; the last rows against the oracle."""
    needs_gib(30)
    n, rows = 46_400, 40
    q, k, v, dout = (torch.randn(1, n, 1, 16, device=device, dtype=F16) for _ in range(4))
    bias = torch.randn(n, n, device=device, dtype=F16).requires_grad_()
    with triflash.backend(backend):
        out = triflash.flash_attn_func(q, k, v, bias)
        (dbias,) = torch.autograd.grad(out, bias, dout)
    last = bias[-rows:].detach().double().requires_grad_()
    wanted = oracle.attention(q[:, -rows:], k, v, last)[0]
    torch.testing.assert_close(out[:, -rows:].double(), wanted, rtol=2e-3, atol=2e-4)
    (exact,) = torch.autograd.grad(wanted, last, dout[:, -rows:].double())
    assert ((dbias[-rows:].double() - exact).norm() / exact.norm()).item() < 2e-2
