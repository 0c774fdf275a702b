"""Scores of any magnitude, by products alone: what a float32 lse has no room for is kept, and gradients are right from 10⁻⁶ to 10³⁸. Every
backend; Hopper's kernels where there is no such GPU on the CPU (``gluon_twin.py``)."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from here import EVERY_BACKEND
from running import small_tiles
from test_dtypes import on
from triflash import attention
from triflash.rest import join_rest, rest_of, split_rest

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ON_GPU = torch.cuda.is_available()


def run(backend: str, tensors: list[Tensor], dout: Tensor, **options: Any) -> list[Tensor]:
    with on(backend) if backend == "hopper" else small_tiles((16, 32)):
        out = attention(*tensors, **options, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, tensors, dout)]


def takes(backend: str, dtype: torch.dtype) -> None:
    if (backend == "hopper" and dtype == F32) or (backend == "triton" and dtype == BF16 and not ON_GPU):
        pytest.skip(f"{dtype} is not for {backend} here")


def full(shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, value, dtype=dtype, device=device, requires_grad=True)


@pytest.mark.parametrize("backend", ["oracle", *EVERY_BACKEND])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e3, 2.0**13, 2.0**17, 2.0**40, 2.0**60])  # of which any sum of products is exact
def test_equal_keys_share_alike(size: float, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Of N keys that are one key N times each takes 1/N: p of the backward pass as well as of the forward pass."""
    if size > torch.finfo(dtype).max:
        pytest.skip("beyond the dtype")
    takes(backend, dtype)
    for N, D, scale in ((2, 1, 1.0), (1, 5, None), (96, 64, None), (150, 40, 0.3)):
        q, k = full((1, 3, 1, D), size, dtype, device), full((1, N, 1, D), size, dtype, device)
        v = torch.randn(1, N, 1, D, device=device).to(dtype).requires_grad_()
        dout = torch.ones_like(q)
        for deterministic in (True, False):
            out, dq, dk, dv = run(backend, [q, k, v], dout, scale=scale, deterministic=deterministic)
            rtol = 2e-2 if dtype != F32 else 1e-4
            torch.testing.assert_close(out.double(), v.detach().double().mean(1, keepdim=True).expand(out.shape), rtol=rtol, atol=1e-2)
            torch.testing.assert_close(dv.double(), torch.full_like(dv, 3 / N, dtype=F64), rtol=rtol, atol=0.0)
            # ds of a query sum up to 0, but each is off by the rounding of out and its own, and multiplied by what is huge.
            dp = v.detach().double().sum(-1, keepdim=True)
            off = 8 * D * v.detach().double().abs().max() * torch.finfo(dtype).eps * size * (scale or D**-0.5)
            assert (dq.double().abs() <= off).all()
            ds = (dp - dp.mean(1, keepdim=True)) / N
            assert ((dk.double() - 3 * ds * size * (scale or D**-0.5)).abs() <= 3 * off).all()


@pytest.mark.parametrize("exponent", range(-20, 126, 2))
def test_what_lse_lost_is_found_again(exponent: int) -> None:
    """``2^(m - lse - rest)`` is 1 / l at every maximum, the ends of its octave among them; from float64, too, where that holds the sum."""
    generator = torch.Generator().manual_seed(exponent)
    ends = torch.cat((1 + torch.arange(50) * 2.0**-23, 1 - torch.arange(1, 51) * 2.0**-24, 1 + torch.rand(4000, generator=generator)))
    m = ends * 2.0**exponent * (2 * torch.randint(2, ends.shape, generator=generator) - 1)
    log2_sum = 31 * torch.rand(ends.shape, generator=generator) * torch.randint(2, ends.shape, generator=generator)
    again = (m + log2_sum) * math.log(2.0) * math.log2(math.e)
    found = [join_rest(m - again, log2_sum)]
    if exponent < 40:
        found.append(rest_of(m.double() + log2_sum.double(), again))
    for rest in found:
        off, log2 = split_rest(rest)
        torch.testing.assert_close((m - (again + off)) - log2, -log2_sum, rtol=0.0, atol=2.0**-14)


@pytest.mark.parametrize("bias", [False, True], ids=["products", "bias"])
@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("M, N", [(3, 40), (70, 50), (40, 150)])
def test_equal_keys_at_any_maximum(M: int, N: int, backend: str, bias: bool, device: torch.device) -> None:
    """Of one maximum in six, lse read again misses it by the distance of two float32s, beside which there is no room for log2 of a sum."""
    dtype = BF16 if backend == "hopper" or (backend == "triton" and ON_GPU) else F32
    magnitudes = (2.0 ** torch.arange(20, 120, 3)).repeat(M)[:M]
    sizes = torch.randint(128, 256, (M,), generator=torch.Generator().manual_seed(M)) / 256 * magnitudes
    q = torch.zeros(1, M, 1, 16, device=device, dtype=dtype)
    q[..., 0] = sizes.to(device, dtype)[None, :, None]
    k, v = full((1, N, 1, 16), 1.0, dtype, device), full((1, N, 1, 16), 1.0, dtype, device)
    more = (0.37 * sizes.to(device))[:, None].expand(M, N).contiguous() if bias else None
    _, _, dk, dv = run(backend, [q.requires_grad_(), k, v], torch.ones_like(q), bias=more, scale=0.7)
    torch.testing.assert_close(dv.double(), torch.full_like(dv, M / N, dtype=F64), rtol=1e-2 if dtype == BF16 else 1e-4, atol=0.0)
    assert dk.isfinite().all()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_a_sink_as_large_as_any_maximum(backend: str, device: torch.device) -> None:
    """It is one more of N equal keys, and so is its gradient."""
    dtype = BF16 if backend == "hopper" or (backend == "triton" and ON_GPU) else F32
    H, M, N, D = 30, 9, 40, 16
    sizes = (torch.randint(128, 256, (H,), generator=torch.Generator().manual_seed(7)) / 256 * 2.0 ** torch.arange(8, 98, 3)).to(device)
    q = torch.zeros(1, M, H, D, device=device, dtype=dtype)
    q[..., 0] = sizes.to(dtype)[None, None]
    k, v = full((1, N, H, D), 1.0, dtype, device), full((1, N, H, D), 1.0, dtype, device)
    sink = sizes.clone().requires_grad_()
    with on(backend) if backend == "hopper" else small_tiles((64, 64)):
        out = attention(q.requires_grad_(), k, v, sink=sink, scale=1.0, backend=backend)
        (found,) = torch.autograd.grad(out, sink, torch.ones_like(out))
    torch.testing.assert_close(
        found.double(), torch.full_like(found, -M * D * N / (N + 1) ** 2, dtype=F64), rtol=2e-2 if dtype == BF16 else 1e-3, atol=0.0
    )


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("size, D", [(2.0**15, 16), (2.0**15, 64), (2.0**14, 136)])
def test_slopes_beside_equal_keys(size: float, D: int, backend: str, deterministic: bool, device: torch.device) -> None:
    """Distances are lost in such scores, whichever of a tile's corners they are counted from: all keys that a query sees share alike."""
    dtype = F16 if backend == "hopper" or (backend == "triton" and not ON_GPU) else BF16
    for causal, M, N in ((True, 150, 260), (False, 70, 130)):
        q, k = full((1, M, 2, D), size, dtype, device), full((1, N, 2, D), size, dtype, device)
        v = torch.randn(1, N, 2, D, device=device).to(dtype).requires_grad_()
        slopes = torch.tensor([0.25, 0.003], device=device)
        with on(backend) if backend == "hopper" else small_tiles((64, 64)):
            out = attention(q, k, v, causal=causal, alibi_slopes=slopes, deterministic=deterministic, backend=backend)
            dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.full_like(out, 2.0**-10))
        seen = torch.ones(M, N, device=device, dtype=F64)
        seen = (seen.tril(N - M) if causal else seen) / (seen.tril(N - M) if causal else seen).sum(1, keepdim=True)
        torch.testing.assert_close(out.double(), torch.einsum("mn,bnhd->bmhd", seen, v.detach().double()), rtol=2e-2, atol=2e-2)
        wanted = 2.0**-10 * seen.sum(0)[None, :, None, None]
        torch.testing.assert_close(dv.double(), wanted.expand(dv.shape), rtol=2e-2, atol=1e-6)
        assert dq.isfinite().all() and dk.isfinite().all()


def draw(random_: random.Random, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """Products that float32 holds, and that either differ by much more than they are rounded by, or not at all; rows of very different
    magnitudes among them.
    """
    M, N = (random_.choice((1, 3, 40, 130)) for _ in range(2))
    B, H, D = random_.choice((1, 2)), random_.choice((1, 2)), random_.choice((1, 5, 16, 64))
    Dv = random_.choice((D, 8))
    generator = torch.Generator().manual_seed(random_.randrange(2**31))
    most = 14.0 if dtype == F16 else 62.0
    least = -most if dtype != F16 else -10.0

    def integers(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=generator).double()

    def powers(*shape: int) -> Tensor:
        return 2.0 ** torch.randint(0, 30, shape, generator=generator).double()

    a, b = random_.uniform(least, most), random_.uniform(least, most)
    q, k = integers(B, M, H, D) * 2.0 ** int(a), integers(B, N, H, D) * 2.0 ** int(b)
    if random_.random() < 0.5:  # rows of many magnitudes
        q = q / powers(B, M, 1, 1)
    v, dout = (torch.randn(shape, generator=generator) for shape in ((B, N, H, Dv), (B, M, H, Dv)))
    scale = random_.choice((1.0, 0.125, -0.5, 2.0**-20))
    # Up to 2.3e38 in base 2; and no key or query so small that it is none in that dtype.
    while (q.abs().max() * k.abs().max() * D * abs(scale) * 1.5) > 1e38:
        q = q / 16
    options: dict[str, Any] = {"scale": scale, "deterministic": random_.random() < 0.5, "causal": random_.choice((False, "top_left"))}
    if random_.random() < 0.3:
        options["mask"] = (torch.rand(B, 1, M, N, generator=generator) < 0.7).to(device)
    if random_.random() < 0.3:
        options["key_lengths"] = torch.tensor([N // 2, N][:B], device=device)
    if random_.random() < 0.2:
        options["sink"] = torch.randn(H, generator=generator).to(device)
    tensors = [x.to(device).to(dtype).requires_grad_() for x in (q, k, v)]
    return tensors, dout.to(device).to(dtype), options


def reference(tensors: list[Tensor], dout: Tensor, options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients in float64, and what each can be off by for the rounding of the operands of its products and of out."""
    options = {name: x for name, x in options.items() if name != "deterministic"}
    causal = options.pop("causal")
    if "mask" in options:
        options["mask"] = options["mask"][:, None]
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    out, _lse = triflash.oracle.attention(*leaves, **options, hi=0 if causal else None)
    grads = torch.autograd.grad(out, leaves, dout.double())
    q, k, v = (x.detach().abs() for x in leaves)
    per_score = dout.double().abs().amax() * v.amax() * v.shape[3] * abs(options["scale"])
    bounds = [
        v.amax(),
        per_score * k.amax((1, 3), keepdim=True).amax(2, keepdim=True),
        per_score * q.amax((1, 3), keepdim=True).amax(2, keepdim=True) * q.shape[1],
        dout.double().abs().amax() * q.shape[1] ** 0.5,
    ]
    return [out.detach(), *grads], [torch.as_tensor(b) for b in bounds]


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("seed", range(200 if ON_GPU else 6))
def test_any_magnitude(seed: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    takes(backend, dtype)
    random_ = random.Random(f"{seed} {dtype}")
    tensors, dout, options = draw(random_, dtype, device)
    got = run(backend, tensors, dout, **options)
    wanted, bounds = reference(tensors, dout, options)
    tolerance = 4 * torch.finfo(dtype).eps + 2e-3
    for name, x, ref, bound in zip(("out", "dq", "dk", "dv"), got, wanted, bounds, strict=True):
        room = torch.finfo(dtype).max
        beyond = (bound * tolerance + ref.abs()) > room
        assert (x.isfinite() | beyond).all(), f"{name}: {int((~x.isfinite() & ~beyond).sum())} elements that are no numbers; {options}"
        off = torch.where(beyond, 0.0, (x.double() - ref).abs()) / (bound * tolerance + torch.finfo(dtype).smallest_normal)
        assert off.max() <= 1, f"{name}: off by {float(off.max()):.3g} times what it may be; {options}"


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_random_products(backend: str, device: torch.device) -> None:
    """Of 10⁵ in q and k: one key takes all, and p of both passes is 0 or 1, so dv is a sum of whole rows of dout."""
    dtype = F32 if backend in ("tiled", "triton") else BF16
    q, k, v = (
        (torch.randn(1, length, 2, 64, device=device) * size).to(dtype).requires_grad_()
        for length, size in ((70, 1e5), (150, 1e5), (150, 1.0))
    )
    dout = torch.ones_like(q)
    for deterministic in (True, False):
        out, dq, dk, dv = run(backend, [q, k, v], dout, deterministic=deterministic)
        assert all(x.isfinite().all() for x in (out, dq, dk, dv))
        if ON_GPU or backend != "triton":  # the interpreter's products depend on the shapes of their tiles
            assert torch.equal(dv, dv.round()) and (dv.sum(1) == 70).all()


@pytest.mark.parametrize("backend", EVERY_BACKEND[:1])
def test_float64(backend: str, device: torch.device) -> None:
    for size in (1.0, 1e5, 1e12):
        q, k = full((1, 2, 1, 4), size, F64, device), full((1, 5, 1, 4), size, F64, device)
        v = torch.randn(1, 5, 1, 4, dtype=F64, device=device, requires_grad=True)
        _out, dq, dk, dv = run(backend, [q, k, v], torch.ones_like(q))
        torch.testing.assert_close(dv, torch.full_like(dv, 0.4), rtol=1e-6, atol=0.0)
        assert math.isfinite(float(dq.sum() + dk.sum()))


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_what_was_reported(backend: str, device: torch.device) -> None:
    """Two equal keys share dout alike; a single one takes it whole; so do 96 all in all."""
    if backend != "hopper":
        q, k = full((1, 1, 1, 1), 1e4, F32, device), full((1, 2, 1, 1), 1e4, F32, device)
        v = torch.tensor([0.0, 1.0], device=device).view(1, 2, 1, 1).requires_grad_()
        _out, _dq, _dk, dv = run(backend, [q, k, v], torch.ones_like(q), scale=1.0)
        torch.testing.assert_close(dv.flatten().tolist(), [0.5, 0.5])
        q, k, v = (full((1, 1, 1, 5), size, F32, device) for size in (1e5, 1e5, 1.0))
        _out, dq, _dk, dv = run(backend, [q, k, v], torch.ones_like(q))
        assert (dv == 1).all() and (dq == 0).all()
    for dtype in (BF16, F16):
        if dtype == BF16 and backend == "triton" and not ON_GPU:
            continue
        for size in (1e3, 1e4) if ON_GPU else (1e3,):  # a library may round sums of 10⁸ by where they stand
            q, k, v = (full((1, 96, 1, 64), x, dtype, device) for x in (size, size, 1.0))
            _out, _dq, _dk, dv = run(backend, [q, k, v], torch.ones_like(q))
            torch.testing.assert_close(dv.float(), torch.ones_like(dv, dtype=F32), rtol=1e-2, atol=0.0)
