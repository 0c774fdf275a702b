"""The seed's module, as its callers knew it: names, argument order, layouts, contracts of the underscored functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from expected import kernels
from here import BACKENDS
from running import small_tiles
from triflash import oracle
from triflash import triton_flash_attention as seed
from triflash.bound import call, signature
from triflash.plan.select import plan_backward

SIGNATURES = {
    "flash_attn_func": "q, k, v, bias=None, causal=False, softmax_scale=None",
    "flash_attn_kvpacked_func": "q, kv, bias=None, causal=False, softmax_scale=None",
    "flash_attn_qkvpacked_func": "qkv, bias=None, causal=False, softmax_scale=None",
    "_flash_attn_forward": "q, k, v, bias=None, causal=False, softmax_scale=None",
    "_flash_attn_backward": "do, q, k, v, o, lse, dq, dk, dv, bias=None, causal=False, softmax_scale=None",
    "FlashAttnFunc.forward": "ctx, q, k, v, bias=None, causal=False, softmax_scale=None",
    "FlashAttnKVPackedFunc.forward": "ctx, q, kv, bias=None, causal=False, softmax_scale=None",
    "FlashAttnQKVPackedFunc.forward": "ctx, qkv, bias=None, causal=False, softmax_scale=None",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    function: Any = seed
    for part in name.split("."):
        function = getattr(function, part)
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    assert ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters) == SIGNATURES[name]


def test_names() -> None:
    public = {name for name in SIGNATURES if not name.startswith("_") and "." not in name} | {
        "FlashAttnFunc",
        "FlashAttnKVPackedFunc",
        "FlashAttnQKVPackedFunc",
    }
    assert set(seed.__all__) == public
    assert {name for name in public if name.islower()} <= set(triflash.__all__)
    assert all(issubclass(getattr(seed, name), torch.autograd.Function) for name in public if not name.islower())


def tensors(device: torch.device, B: int = 2, M: int = 20, N: int = 36, H: int = 2, D: int = 16, dtype: torch.dtype = torch.float32) -> Any:
    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    return make(B, M, H, D), make(B, N, H, D), make(B, N, H, D), make(1, H, 1, N), torch.randn(B, M, H, D, device=device).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_every_way_to_call_gives_the_same_bits(causal: bool, backend: str, device: torch.device) -> None:
    """Positional, keyword, ``.apply``, packed and not: out and all gradients, packed gradients in the packed layout."""
    q, k, v, bias, dout = tensors(device, N=20)
    options = (causal, 0.3)

    def gradients(call: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
        leaves = tuple(x.detach().clone().requires_grad_() for x in (*leaves, bias))
        out = call(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, dout))

    packed = torch.stack([q, k, v], 2).detach()
    pair = packed[:, :, 1:]
    with triflash.backend(backend):
        out, dq, dk, dv, dbias = gradients(lambda *x: seed.flash_attn_func(*x, *options), q, k, v)
        keyword = gradients(lambda q, k, v, bias: seed.flash_attn_func(softmax_scale=0.3, causal=causal, bias=bias, v=v, k=k, q=q), q, k, v)
        applied = gradients(lambda *x: seed.FlashAttnFunc.apply(*x, *options), q, k, v)
        for other in (keyword, applied):
            assert all(torch.equal(a, b) for a, b in zip(other, (out, dq, dk, dv, dbias), strict=True))
        for call in (
            lambda *x: seed.flash_attn_kvpacked_func(*x, *options),
            lambda q, kv, bias: seed.flash_attn_kvpacked_func(q, kv=kv, bias=bias, causal=causal, softmax_scale=0.3),
            lambda *x: seed.FlashAttnKVPackedFunc.apply(*x, *options),
        ):
            wanted = (out, dq, torch.stack([dk, dv], 2), dbias)
            assert all(torch.equal(a, b) for a, b in zip(gradients(call, q, pair), wanted, strict=True))
        for call in (
            lambda *x: seed.flash_attn_qkvpacked_func(*x, *options),
            lambda qkv, bias: seed.flash_attn_qkvpacked_func(qkv=qkv, bias=bias, causal=causal, softmax_scale=0.3),
            lambda *x: seed.FlashAttnQKVPackedFunc.apply(*x, *options),
        ):
            wanted = (out, torch.stack([dq, dk, dv], 2), dbias)
            assert all(torch.equal(a, b) for a, b in zip(gradients(call, packed), wanted, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_views_of_larger_tensors(backend: str, device: torch.device) -> None:
    """Packed inputs with strides of their own; the gradient of the whole is zero outside the view and right inside."""
    whole = torch.randn(2, 24, 4, 3, 16, device=device).to(torch.float16).requires_grad_()
    qkv = whole[:, 2:22, 1:, :2].detach().clone()
    dout = torch.randn(2, 20, 2, 16, device=device).to(torch.float16)
    with triflash.backend(backend):
        seed.flash_attn_qkvpacked_func(whole[:, 2:22, 1:, :2]).backward(dout)
        leaf = qkv.requires_grad_()
        seed.flash_attn_qkvpacked_func(leaf).backward(dout)
    assert whole.grad is not None and leaf.grad is not None
    assert torch.equal(whole.grad[:, 2:22, 1:, :2], leaf.grad)
    assert whole.grad.abs().sum().item() == pytest.approx(leaf.grad.abs().sum().item(), rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_as_q_k_and_v(backend: str, device: torch.device) -> None:
    x = torch.randn(1, 20, 2, 16, device=device, requires_grad=True)
    dout = torch.randn_like(x)
    with triflash.backend(backend):
        (got,) = torch.autograd.grad(seed.flash_attn_func(x, x, x, None, True), x, dout)
        (by_class,) = torch.autograd.grad(seed.FlashAttnFunc.apply(x, x, x, None, True, None), x, dout)
    exact = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(oracle.attention(exact, exact, exact, hi=0)[0], exact, dout.double())
    for grad in (got, by_class):
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_is_top_left(backend: str, device: torch.device) -> None:
    """Key j is hidden from query i when j > i, whatever the lengths: the first query sees the first key only."""
    q, k, v, _, _ = tensors(device, M=5, N=9)
    with triflash.backend(backend):
        out = seed.flash_attn_func(q, k, v, None, True)
        torch.testing.assert_close(out[:, 0], v[:, 0])
        changed = v.detach().clone()
        changed[:, 5:] = 1e6  # no query sees these
        assert torch.equal(out, seed.flash_attn_func(q, k, changed, None, True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 20, 127, 128, 129])
def test_forward_contract(rows: int, backend: str, device: torch.device) -> None:
    q, k, v, bias, _ = tensors(device, B=1, M=rows, N=9, H=1)
    with triflash.backend(backend), small_tiles((64, 64)):
        o, lse, scale = seed._flash_attn_forward(q, k, v, bias, causal=False)
        assert torch.equal(o, seed.flash_attn_func(q, k, v, bias))
    padded = -(-rows // 128) * 128
    assert not o.requires_grad and not lse.requires_grad
    assert lse.shape == (1, 1, padded) and lse.dtype == torch.float32
    assert (lse[..., rows:] == -torch.inf).all()
    assert scale == 16**-0.5 and isinstance(scale, float)
    wanted = oracle.attention(q, k, v, bias)[1]
    torch.testing.assert_close(lse[..., :rows].double(), wanted, rtol=1e-6, atol=1e-5)


def test_forward_returns_the_scale_it_used(device: torch.device) -> None:
    q, k, v, _, _ = tensors(device)
    for given, used in ((None, 0.25), (0.0, 0.0), (-2, -2.0)):
        got = seed._flash_attn_forward(q, k, v, softmax_scale=given)[2]
        assert got == used and isinstance(got, float)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "step", "packed"])
def test_backward_fills_in_place(layout: str, backend: str, device: torch.device) -> None:
    """Outputs of any strides, full of NaN before; only their own elements are written; do, o and lse of any strides as well."""
    q, k, v, bias, dout = (x.detach() for x in tensors(device))

    def output(like: Tensor) -> tuple[Tensor, Tensor]:
        nan = float("nan")
        B, L, H, D = like.shape
        if layout == "transposed":
            base = torch.full((B, H, L, D), nan, device=device)
            return base, base.transpose(1, 2)
        if layout == "step":
            base = torch.full((B, L, H, 2 * D), nan, device=device)
            return base, base[..., ::2]
        if layout == "packed":
            base = torch.full((B, L, 3, H, D), nan, device=device)
            return base, base[:, :, 1]
        base = torch.full_like(like, nan)
        return base, base

    (dq_base, dq), (_, dk), (dv_base, dv) = output(q), output(k), output(v)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with triflash.backend(backend):
        wanted = torch.autograd.grad(seed.flash_attn_func(*leaves, bias, True), leaves, dout)
        o, lse, scale = seed._flash_attn_forward(q, k, v, bias, True)
        strided = torch.stack([dout, dout], -1)[..., 0]
        with triflash.record_launches() as ran:
            result: Any = seed._flash_attn_backward(strided, q, k, v, o, lse, dq, dk, dv, bias, True, scale)
    assert result is None
    assert "dbias" not in kernels(ran)
    for got, want in zip((dq, dk, dv), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # autograd also kept the bits that lse has no room for
    assert dq_base.isnan().sum() == dq_base.numel() - dq.numel()
    assert dv_base.isnan().sum() == dv_base.numel() - dv.numel()


def test_backward_takes_any_lse_with_enough_rows(device: torch.device) -> None:
    q, k, v, bias, dout = (x.detach() for x in tensors(device))
    o, lse, scale = seed._flash_attn_forward(q, k, v, bias)
    results = []
    for given in (
        lse,
        lse[..., :20],
        lse[..., :20].contiguous(),
        torch.cat([lse, lse], -1),
        lse.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        grads = [torch.empty_like(x) for x in (q, k, v)]
        seed._flash_attn_backward(dout, q, k, v, o, given, *grads, bias, False, scale)
        results.append(grads)
    for grads in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0], strict=True))


def test_gradients_are_contiguous_and_inputs_keep_their_values(device: torch.device) -> None:
    q, k, v, bias, dout = tensors(device)
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
    before = [x.detach().clone() for x in (q, k, v, bias, dout)]
    grads = torch.autograd.grad(seed.flash_attn_func(q, k, v, bias), (q, k, v, bias), dout)
    assert all(g.is_contiguous() and g.shape == x.shape for g, x in zip(grads, (q, k, v, bias), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v, bias, dout), strict=True))


@pytest.mark.parametrize("call", [seed.flash_attn_func, lambda *x: seed.FlashAttnFunc.apply(*x, None, False, None)], ids=["func", "apply"])
def test_double_backward_raises(call: Callable[..., Tensor], device: torch.device) -> None:
    """Second derivatives are not computed: asking for them is an error, not a zero."""
    q, k, v, _, _ = tensors(device)
    (dq,) = torch.autograd.grad(call(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dq.sum(), q)


def test_no_gradient_asked_nothing_saved(device: torch.device) -> None:
    q, k, v, _, _ = tensors(device)
    with torch.no_grad():
        assert seed.flash_attn_func(q, k, v).grad_fn is None
    assert seed.flash_attn_func(q.detach(), k.detach(), v.detach()).grad_fn is None


def test_gradients_accumulate(device: torch.device) -> None:
    q, k, v, bias, dout = tensors(device)
    seed.flash_attn_func(q, k, v, bias).backward(dout)
    once = bias.grad.clone()
    seed.flash_attn_func(q, k, v, bias).backward(dout)
    torch.testing.assert_close(bias.grad, 2 * once)


def test_alibi_with_padding_as_bloom_calls_it(device: torch.device) -> None:
    """The seed's known caller: bias = alibi + (-1e9 where padded), (b, h, 1, s), causal, in half precision."""
    q, k, v, _, _ = tensors(device, M=24, N=24, dtype=torch.float16)
    alibi = torch.arange(24, device=device) * torch.tensor([0.5, 0.25], device=device)[:, None]
    padded = torch.zeros(2, 1, 1, 24, device=device)
    padded[1, ..., 20:] = -1e9
    bias = alibi[None, :, None, :] + padded
    out = seed.flash_attn_func(q, k, v, bias, True)
    wanted = oracle.attention(q, k, v, bias, hi=0)[0]
    torch.testing.assert_close(out.double(), wanted, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("function", ["flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"])
@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_algorithms_are_asked_for_as_the_forward_pass_was(
    wanted: bool, function: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's switch reaches the plan of the backward pass, whatever it is by then."""
    seen: list[bool] = []

    def spying(spec: Any, *rest: Any) -> Any:
        seen.append(spec.deterministic)  # twice where the pass is compiled ahead
        return plan_backward(spec, *rest)

    monkeypatch.setattr(call, "plan_backward", spying)
    signature.CALLS.clear()
    q, kv, qkv = (torch.randn(1, 5, *count, 2, 8, device=device, requires_grad=True) for count in ((), (2,), (3,)))
    arguments = {"flash_attn_func": (q, q, q), "flash_attn_kvpacked_func": (q, kv), "flash_attn_qkvpacked_func": (qkv,)}[function]
    torch.use_deterministic_algorithms(wanted)
    out = getattr(seed, function)(*arguments)
    torch.use_deterministic_algorithms(not wanted)
    out.sum().backward()
    assert set(seen) == {wanted}
