"""What a kernel writes goes into the elements of what it was given, and nowhere else: guard values round every view, of every width modulo what
the hardware stores at a time. Hopper's kernels run where there is no such GPU on the CPU (``gluon_twin.py``), whose TMA stores whole 16 bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from expected import kernels
from here import triton_only
from running import small_tiles
from test_dtypes import on
from triflash import launch, ops
from triflash.bound import signature
from triflash.plan.kernels.dkdv import DkdvConfig
from triflash.plan.override import override_configs
from triflash.plan.select import plan_forward
from triflash.spec import Operands, Saved, spec_of

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
GUARD = 7.0


def on_backends(values: Sequence[Any]) -> Any:
    """A value and a backend. Of the portable kernels, which store single elements, the ends alone where they run in Triton's interpreter."""
    ends = values if torch.cuda.is_available() else values[:1] + values[-1:]
    pairs = [(value, backend) for backend in ("tiled", "triton", "hopper") for value in (ends if backend == "triton" else values)]
    marks = {"tiled": (), "triton": triton_only, "hopper": triton_only}
    return [pytest.param(value, backend, marks=marks[backend], id=f"{value}-{backend}") for value, backend in pairs]


class Guarded:
    """Memory full of guard values, and a tensor somewhere in it: its rows begin at multiples of 16 bytes, however they end."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, more: int = 0) -> None:
        *outer, width = shape
        unit = 16 // torch.empty((), dtype=dtype).element_size()
        row = (-(-width // unit) + more) * unit
        strides, size = [1], row
        for n in reversed(outer):
            strides.append(size)
            size *= n
        self.memory = torch.full((size + 2 * unit,), GUARD, dtype=dtype, device=device)
        self.tensor = self.memory.as_strided(tuple(shape), tuple(reversed(strides)), unit)

    def check(self, wanted: Tensor, name: str) -> None:
        assert torch.equal(self.tensor, wanted), f"{name} itself"
        self.tensor.fill_(GUARD)
        touched = int((self.memory != GUARD).sum())
        assert not touched, f"{touched} elements beside {name}"


def backends(backend: str) -> Any:
    return on(backend) if backend == "hopper" else small_tiles((16, 64))


def check_backward(
    backend: str, device: torch.device, M: int, N: int, D: int, Dv: int, bias_shape: tuple[int, ...] | None, *, B: int = 1, H: int = 2,
    dtype: torch.dtype = F16, bias_dtype: torch.dtype = F16, more: int = 0, lo: int | None = None, hi: int | None = None,
) -> list[str]:  # fmt: skip
    """Gradients into guarded tensors, which are those that a backward pass allocates itself."""
    q, k, v, dout = (torch.randn(B, n, H, d, device=device).to(dtype) for n, d in ((M, D), (N, D), (N, Dv), (M, Dv)))
    bias = None if bias_shape is None else torch.randn(bias_shape, device=device).to(bias_dtype)
    options = (1, lo, hi, 0.3, "ieee", backend)
    deterministic = {"deterministic": True}
    with backends(backend), torch.no_grad(), triflash.record_launches() as ran:
        out, lse, rest = ops.attention_forward(q, k, v, bias, *options, **deterministic)
        saved = (dout, None, q, k, v, bias, out, lse, rest)
        wanted = ops.attention_backward(*saved, *options, [True, True, True, bias is not None], **deterministic)[:4]
        ran.clear()
        given = [None if x is None else Guarded(x.shape, x.dtype, device, more) for x in (q, k, v, bias)]
        ops.attention_backward_(*saved, *options, *(None if x is None else x.tensor for x in given), **deterministic)
    assert all(line.startswith(backend) for line in ran)
    for name, x, gradient in zip(("dq", "dk", "dv", "dbias"), given, wanted, strict=True):
        if x is not None:
            x.check(gradient, name)
    return kernels(ran)


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize(("D", "backend"), on_backends([17, 18, 19, 21, 22, 23, 24, 20]))
def test_rows_of_gradients(D: int, more: int, backend: str, device: torch.device) -> None:
    """D = 20 in rows of 24, and its like; dv of another width."""
    M, N = (40, 70) if backend != "triton" else (10, 20)
    check_backward(backend, device, M, N, D, 47 - D, None, more=more)


@pytest.mark.parametrize(("bias", "kernel"), [("bhqk", "dq"), ("1hqk", "dbias"), ("1h1k", "dkdv")])
@pytest.mark.parametrize(("width", "backend"), on_backends([129, 130, 131, 132, 133, 134, 135, 136]))
def test_rows_of_the_gradient_of_a_bias(width: int, bias: str, kernel: str, backend: str, device: torch.device) -> None:
    """522 columns in rows of 528, and their like, in 16 bits and (of four elements in 16 bytes) in 32; causal, so that zeros are written too."""
    B, H, M = 2, 2, 70 if backend != "triton" else 10
    b, h, m, n = (size if letter != "1" else 1 for letter, size in zip(bias, (B, H, M, width), strict=True))
    dtype = F32 if width % 8 in (1, 2, 3) else F16
    hi = 0 if width % 2 else None
    ran = check_backward(backend, device, M, width, 16, 16, (b, 1, h, m, n), B=B, H=H, bias_dtype=dtype, hi=hi)
    assert backend == "tiled" or kernel in ran


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("D", "backend"), on_backends([1, 7, 8, 12, 20]))
def test_a_single_row(D: int, bias: bool, backend: str, device: torch.device) -> None:
    """Of tensors without a second row no stride says where they end."""
    check_backward(backend, device, 1, 1, D, D, (1, 1, 1, 1, 1) if bias else None, H=1)
    check_backward(backend, device, 1, D, 8, 8, (1, 1, 1, 1, D) if bias else None, H=1)


@pytest.mark.parametrize(("D", "backend"), on_backends([129, 133, 136]))
def test_wide_heads(D: int, backend: str, device: torch.device) -> None:
    check_backward(backend, device, 40, 70, D, D + 1, None)


def test_dq_that_is_added_up(device: torch.device) -> None:
    """The kernels that add dq up in memory store dk and dv themselves, and dq by way of its sum."""
    for config in (DkdvConfig(2, 2), DkdvConfig(2, 2, dq_warpgroup=True), DkdvConfig(2, 2, red_dq=True)):
        q, k, v, dout = (torch.randn(1, n, 2, 20, device=device).to(F16) for n in (130, 140, 140, 130))
        options = (1, None, None, 0.3, "ieee", "hopper")
        with on("hopper"), override_configs(dqdkdv=config), torch.no_grad(), triflash.record_launches() as ran:
            saved = (dout, None, q, k, v, None, *ops.attention_forward(q, k, v, None, *options))
            wanted = ops.attention_backward(*saved, *options, [True, True, True, False])[:3]
            given = [Guarded(x.shape, x.dtype, device) for x in (q, k, v)]
            ops.attention_backward_(*saved, *options, *(x.tensor for x in given), None)
        assert "dqdkdv" in kernels(ran)
        for name, x, gradient in zip(("dq", "dk", "dv"), given, wanted, strict=True):
            torch.testing.assert_close(x.tensor, gradient, rtol=1e-2, atol=1e-3)  # added in no fixed order
            x.check(x.tensor.clone(), name)


@pytest.mark.parametrize("M", [1, 70])
@pytest.mark.parametrize(("Dv", "backend"), on_backends([17, 18, 19, 20, 21, 22, 23, 24, 132]))
def test_rows_of_the_output(Dv: int, M: int, backend: str, device: torch.device) -> None:
    q, k, v = (torch.randn(1, n, 1, d, device=device).to(F16) for n, d in ((M, 16), (80, 16), (80, Dv)))
    spec = spec_of(q, k, v, None, 1, None, None, 0.3, "ieee")
    wanted, lse = (torch.empty(1, M, 1, Dv, device=device, dtype=F16), torch.empty(1, 1, M, device=device))
    given = Guarded(wanted.shape, F16, device)
    with backends(backend):
        plan = plan_forward(spec, signature.facts_of(device), backend)
        for out in (wanted, given.tensor):
            launch.run_forward(plan, spec, Operands(q, k, v), Saved(out, lse, None))
    given.check(wanted, "out")


@pytest.mark.parametrize(("D", "backend"), on_backends([17, 20, 22, 24]))
def test_the_seeds_backward_function(D: int, backend: str, device: torch.device) -> None:
    from triflash.triton_flash_attention import _flash_attn_backward, _flash_attn_forward

    q, k, v, dout = (torch.randn(2, n, 2, D, device=device).to(F16) for n in (40, 70, 70, 40))
    with backends(backend), triflash.backend(backend):
        out, lse, scale = _flash_attn_forward(q, k, v)
        wanted = [torch.empty_like(x) for x in (q, k, v)]
        given = [Guarded(x.shape, F16, device) for x in (q, k, v)]
        for grads in (wanted, [x.tensor for x in given]):
            _flash_attn_backward(dout, q, k, v, out, lse, *grads, None, False, scale)
    for name, x, gradient in zip(("dq", "dk", "dv"), given, wanted, strict=True):
        x.check(gradient, name)
