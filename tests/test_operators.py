"""The torch.library operators: opcheck, torch.compile forward and backward, and use from several threads."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from expected import kernels
from here import BACKENDS, HAVE_TRITON
from triflash import (
    attention,
    attention_varlen,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    ops,
    ops_varlen,
)  # fmt: skip

pytestmark = pytest.mark.unpoisoned
COMPILERS = ["aot_eager"]
if shutil.which("g++") or shutil.which("clang++") or torch.cuda.is_available():
    COMPILERS.append("inductor")

OPTIONS = (1, None, 0, 0.3, "", "tiled")


def tensors(device: torch.device, B: int = 1, M: int = 12, N: int = 12, H: int = 2, D: int = 8, grad: bool = True) -> list[Tensor]:
    shapes = ((B, M, H, D), (B, N, H, D), (B, N, H, D), (1, H, M, N))
    return [torch.randn(shape, device=device, requires_grad=grad) for shape in shapes]


def five(bias: Tensor) -> Tensor:
    return bias.detach()[:, None].requires_grad_(bias.requires_grad)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_opcheck_forward(dtype: torch.dtype, grad: bool, with_bias: bool, device: torch.device) -> None:
    q, k, v, bias = (x.detach().to(dtype).requires_grad_(grad) for x in tensors(device))
    torch.library.opcheck(ops.attention_forward, (q, k, v, five(bias) if with_bias else None, *OPTIONS))


@pytest.mark.parametrize("layout", ["transposed", "mask", "empty", "two batch levels"])
def test_opcheck_forward_of_unusual_inputs(layout: str, device: torch.device) -> None:
    q, k, v, bias = tensors(device)
    options = OPTIONS
    bias5: Tensor = five(bias)
    if layout == "transposed":
        q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
    if layout == "mask":
        bias5 = bias5.detach() > 0
    if layout == "empty":
        q, bias5 = q.detach()[:, :0].requires_grad_(), bias5.detach()[:, :, :, :0].requires_grad_()
    if layout == "two batch levels":
        q, k, v = (x.detach().expand(6, -1, -1, -1).clone().requires_grad_() for x in (q, k, v))
        options = (3, *OPTIONS[1:])
    torch.library.opcheck(ops.attention_forward, (q, k, v, bias5, *options))


@pytest.mark.parametrize("backend", [*BACKENDS, "oracle"])
@pytest.mark.parametrize("packed", [False, True])
def test_operators_by_themselves_have_gradients(packed: bool, backend: str, device: torch.device) -> None:
    """Called by name, as by ``torch.compile(backend="eager")``."""
    q, k, v, bias = tensors(device)
    if packed:
        cu = torch.tensor([0, 12], dtype=torch.int32, device=device)
        rest = (*[None] * 4, cu, cu, *[None] * 3, None, 0, True, 0.3, "", "padded", "padded", 0.0, 0.0, False, None, None, backend)
        out = ops_varlen.varlen_forward(q[0], k[0], v[0], bias, *rest)[0][None]
    else:
        out = ops.attention_forward(q, k, v, bias[:, None], *OPTIONS[:-1], backend)[0]
    wanted = attention(q, k, v, bias=bias, causal=True, scale=0.3, backend="tiled")
    for got, grad in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v, bias)) for x in (out, wanted)), strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-3, atol=1e-4)


def saved(device: torch.device) -> tuple[tuple[Any, ...], list[Tensor]]:
    q, k, v, bias = tensors(device, grad=False)
    out, lse, rest = ops.attention_forward(q, k, v, five(bias), *OPTIONS)
    return (torch.randn_like(out), torch.randn_like(lse), q, k, v, five(bias), out, lse, rest), [q, k, v, five(bias)]


@pytest.mark.parametrize("needs", [[True] * 4, [False, True, False, True], [True, False, False, False]], ids=str)
def test_opcheck_backward(needs: list[bool], device: torch.device) -> None:
    arguments, _ = saved(device)
    torch.library.opcheck(ops.attention_backward, (*arguments, *OPTIONS, needs))
    torch.library.opcheck(ops.attention_backward, (arguments[0], None, *arguments[2:], *OPTIONS, needs))


# (T, H, D) and a bias (H, T, T), each from one contiguous tensor.
PACKED_LAYOUTS: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
    "as operands lie": (lambda: torch.randn(12, 2, 8), lambda: torch.randn(2, 7, 7)),
    "heads first": (lambda: torch.randn(2, 12, 8).transpose(0, 1), lambda: torch.randn(2, 7, 7).mT),
    "part of more, heads first": (lambda: torch.randn(2, 12, 24).transpose(0, 1)[..., :8], lambda: torch.randn(2, 7, 9).mT[:, :7]),
    "last dim strided": (lambda: torch.randn(12, 8, 2).mT, lambda: torch.randn(7, 7, 2).permute(2, 0, 1)),  # as a table of biases gives it
}


@pytest.mark.parametrize("layout", PACKED_LAYOUTS)
def test_opcheck_packed_sequences_however_they_lie(layout: str, device: torch.device) -> None:
    """Inductor refuses a gradient that lies otherwise than the fake kernel said."""
    of_rows, of_bias = PACKED_LAYOUTS[layout]
    q, k, v = (of_rows().to(device).requires_grad_() for _ in range(3))
    bias = of_bias()[None].to(device).requires_grad_()
    cu = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)
    options = (None, 0, True, 8**-0.5, "ieee", "padded", "padded", 0.0, 0.0, False, None, None, "tiled")
    rest = (q, k, v, bias, *[None] * 4, cu, cu, *[None] * 3, *options)
    torch.library.opcheck(ops_varlen.varlen_forward, rest)
    rest = tuple(x.detach() if isinstance(x, Tensor) else x for x in rest)
    out, lse, lost = ops_varlen.varlen_forward(*rest)
    for needs in ([True] * 4 + [False] * 2, [False, True, False, True, False, False]):
        torch.library.opcheck(ops_varlen.varlen_backward, (torch.randn_like(out), None, out, lse, lost, needs, *rest))


@pytest.mark.parametrize("needs", [[True] * 4, [False, True, False, True]], ids=str)
def test_opcheck_backward_in_place(needs: list[bool], device: torch.device) -> None:
    arguments, inputs = saved(device)
    outputs = [torch.zeros_like(x) if need else None for x, need in zip(inputs, needs, strict=True)]
    torch.library.opcheck(ops.attention_backward_, (*arguments, *OPTIONS, *outputs))


@pytest.mark.parametrize("backend", [*BACKENDS, "oracle"])
def test_in_place_backward_equals_the_other_and_writes_any_strides(backend: str, device: torch.device) -> None:
    """dbias included, also where its reduction is split into parts."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(4, 20, 2, 8, device=device) for _ in range(3))
    bias = torch.randn(1, 1, 2, 20, 20, device=device)
    options = (*OPTIONS[:-1], backend)
    out, lse, rest = ops.attention_forward(q, k, v, bias, *options)
    arguments = (torch.randn_like(out), None, q, k, v, bias, out, lse, rest)
    with triflash.record_launches() as ran:
        wanted = ops.attention_backward(*arguments, *options, [True] * 4)
    assert ("dbias_sum" in kernels(ran)) == (backend == "triton")
    given = [torch.full_like(x.transpose(-1, -2).contiguous(), float("nan")).transpose(-1, -2) for x in (q, k, v, bias)]
    ops.attention_backward_(*arguments, *options, *given)
    swapped = [torch.full_like(x.transpose(1, 2).contiguous(), float("nan")).transpose(1, 2) for x in (q, k, v)]
    swapped.append(torch.full((1, 1, 20, 2, 20), float("nan"), device=device).transpose(2, 3))
    ops.attention_backward_(*arguments, *options, *swapped)
    assert wanted[4].numel() == 0  # no sink
    for name, a, b, c in zip(("dq", "dk", "dv", "dbias"), wanted[:4], given, swapped, strict=True):
        assert torch.equal(a, b), f"{name}, last dim strided"
        assert torch.equal(a, c), f"{name}, heads and rows swapped"


def functional(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return flash_attn_func(q * 2, k, v, bias + 1, causal=True).sin()


def packed_kv(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return flash_attn_kvpacked_func(q, torch.stack([k, v], 2), bias, softmax_scale=0.2)


def packed_qkv(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), bias)


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("function", [functional, packed_kv, packed_qkv], ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager(backend: str, function: Callable[..., Tensor], compiler: str, device: torch.device) -> None:
    """``fullgraph=True``: one graph, forward and backward, and the kernels really run in it."""
    torch._dynamo.reset()
    inputs = tensors(device)
    with triflash.backend(backend):
        wanted = results(function, inputs)
        compiled = torch.compile(function, backend=compiler, fullgraph=True)
        results(compiled, inputs)
        with triflash.record_launches() as ran:
            got = results(compiled, inputs)
    assert ran and all(line.startswith(f"{backend}: ") for line in ran)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [True, None], ids=str)
def test_compiled_with_a_computed_scale(dynamic: bool | None, device: torch.device) -> None:
    """A scale from a symbolic size, and one that changes from call to call and so becomes symbolic."""
    torch._dynamo.reset()
    q = torch.randn(2, 12, 3, 8, device=device)
    sized = torch.compile(
        lambda q: flash_attn_func(q, q, q, softmax_scale=q.shape[-1] ** -0.25), backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    torch.testing.assert_close(sized(q), flash_attn_func(q, q, q, softmax_scale=8**-0.25))
    scaled = torch.compile(
        lambda q, scale: flash_attn_func(q, q, q, softmax_scale=scale), backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    for scale in (0.1, 0.2, 0.3):
        torch.testing.assert_close(scaled(q, scale), flash_attn_func(q, q, q, softmax_scale=scale))


@pytest.mark.parametrize("compiler", COMPILERS[:1])
def test_compiled_with_dynamic_shapes(compiler: str, device: torch.device) -> None:
    """Several lengths, one graph with symbolic sizes, right for all of them."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(functional, backend=counter, fullgraph=True, dynamic=True)
    for B, M, N in ((3, 12, 14), (4, 7, 19), (5, 33, 6)):  # no two sizes of the first call are equal: dynamo would tie them
        inputs = tensors(device, B=B, M=M, N=N)
        for a, b in zip(results(compiled, inputs), results(functional, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_compiled_code_follows_the_backend(device: torch.device) -> None:
    """Leaving or changing the block is seen by compiled code, which would otherwise keep what it was traced with."""
    torch._dynamo.reset()
    q = torch.randn(1, 6, 2, 8, device=device)
    compiled = torch.compile(lambda q: flash_attn_func(q, q, q), backend="aot_eager", fullgraph=True)
    for name in ("tiled", "oracle", "tiled"):
        with triflash.backend(name), triflash.record_launches() as ran:
            compiled(q)
        assert ran == [f"{name}: forward"]


def test_compiled_function_may_choose_the_backend(device: torch.device) -> None:
    torch._dynamo.reset()

    def function(q: Tensor) -> Tensor:
        with triflash.backend("oracle"):
            return flash_attn_func(q, q, q)

    q = torch.randn(1, 6, 2, 8, device=device)
    with triflash.record_launches() as ran:
        torch.compile(function, backend="aot_eager")(q)
    assert ran == ["oracle: forward"]


def test_compiled_bad_input_still_raises(device: torch.device) -> None:
    torch._dynamo.reset()
    q, k, v, _ = tensors(device, grad=False)
    compiled = torch.compile(flash_attn_func, backend="aot_eager")
    with pytest.raises(Exception, match="k: wanted shape"):
        compiled(q, k[..., :4], v)


BAD: dict[str, tuple[type[Exception], str, Callable[[Tensor], Any]]] = {
    "shape": (ValueError, r"k: wanted shape \(B=2, N=12, Hk=3, D=8\), got \(2, 12, 3, 4\)", lambda q: attention(q, q[..., :4], q)),
    "dtype": (TypeError, "k: wanted q's dtype torch.float32, got torch.float64", lambda q: attention(q, q.double(), q)),
    "bias": (ValueError, r"bias: wanted 2 to 4 dims .*, got \(2, 12\)", lambda q: attention(q, q, q, bias=q[:, :, 0, 0])),
    "mask": (TypeError, "mask: wanted a bool tensor", lambda q: attention(q, q, q, mask=q[0, :, 0] @ q[0, :, 0].T)),
    "window": (ValueError, r"window: wanted integers from 0 up.*, got \(1, -7\)", lambda q: attention(q, q, q, window=(1, -7))),
    "number": (ValueError, "dropout_p: wanted a number from 0 .*, got 1.5", lambda q: attention(q, q, q, dropout_p=1.5)),
    "word": (ValueError, "layout: wanted one of bshd, bhsd, got 'x'", lambda q: attention(q, q, q, layout="x")),
    "no tensor": (TypeError, "q: wanted a tensor, got list", lambda q: attention([q], q, q)),  # type: ignore[call-overload]
    "no number": (TypeError, "scale: wanted a number or None, got str", lambda q: attention(q, q, q, scale="x")),  # type: ignore[call-overload]
    "no bool": (TypeError, "causal: wanted True, False or 'top_left', got 1", lambda q: attention(q, q, q, causal=1)),  # type: ignore[call-overload]
    "name": (TypeError, "is_causal: wanted an argument of attention", lambda q: attention(q, q, q, is_causal=True)),  # type: ignore[call-overload]
    "backend": (triflash.UnsupportedError, "not supported by backend 'hopper'", lambda q: attention(q, q, q, backend="hopper")),
}


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_compiled_errors_are_those_of_eager_calls(name: str, fullgraph: bool, device: torch.device) -> None:
    """Of the same class; where a graph may not be left, Dynamo's own error has the words, also where it knows sizes by names alone."""
    kind, words, call = BAD[name]
    if name == "backend" and device.type == "cuda":
        pytest.skip("there may be such a GPU")
    torch._dynamo.reset()
    with pytest.raises(Exception, match=words) as caught:
        torch.compile(call, backend="aot_eager", fullgraph=fullgraph, dynamic=True)(torch.randn(2, 12, 3, 8, device=device))
    if not fullgraph:
        assert caught.type is kind


def packed(q: Tensor, k: Tensor | None = None, **options: Any) -> Any:
    """A call on one packed tensor, two sequences of it; q: (2, 12, 3, 8)."""
    cu = torch.tensor([0, 5, 24], dtype=torch.int32, device=q.device)
    rows = q.flatten(0, 1)
    return attention_varlen(rows, rows if k is None else k, rows, options.pop("cu_seqlens_q", cu), **options)


BAD_PACKED: dict[str, tuple[type[Exception], str, Callable[[Tensor], Any]]] = {
    "shape": (ValueError, r"k: wanted shape \(Tk=24, Hk=3, D=8\), got \(24, 3, 4\)", lambda q: packed(q, q[..., :4].flatten(0, 1))),
    "dtype": (TypeError, "k: wanted q's dtype torch.float32, got torch.float64", lambda q: packed(q, q.double().flatten(0, 1))),
    "offsets": (TypeError, "cu_seqlens_q: wanted", lambda q: packed(q, cu_seqlens_q=q[0, :, 0, 0])),
    "bias": (ValueError, "bias: wanted", lambda q: packed(q, bias=q[0])),
    "layout": (ValueError, "bias_layout: wanted one of padded, rows, keys, got 'x'", lambda q: packed(q, bias_layout="x")),
    "window": (ValueError, r"window: wanted integers from 0 up.*, got \(1, -7\)", lambda q: packed(q, window=(1, -7))),
    "number": (ValueError, "dropout_p: wanted a number from 0 .*, got 1.5", lambda q: packed(q, dropout_p=1.5)),
    "hint": (TypeError, "max_seqlen_q: wanted an integer from 0 up, or None, got -1", lambda q: packed(q, max_seqlen_q=-1)),
    "no tensor": (TypeError, "q: wanted a tensor, got list", lambda q: attention_varlen([q], q, q, q)),  # type: ignore[call-overload]
    "no bool": (TypeError, "causal: wanted True, False or 'top_left', got 1", lambda q: packed(q, causal=1)),
    "name": (TypeError, "cu_seq_q: wanted an argument of attention_varlen", lambda q: packed(q, cu_seq_q=q)),
    "backend": (triflash.UnsupportedError, "not supported by backend 'hopper'", lambda q: packed(q, backend="hopper")),
}


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("name", BAD_PACKED)
def test_compiled_errors_of_packed_sequences_are_those_of_eager_calls(name: str, fullgraph: bool, device: torch.device) -> None:
    kind, words, call = BAD_PACKED[name]
    if name == "backend" and device.type == "cuda":
        pytest.skip("there may be such a GPU")
    q = torch.randn(2, 12, 3, 8, device=device)
    with pytest.raises(kind, match=words):
        call(q)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=words) as caught:
        torch.compile(call, backend="aot_eager", fullgraph=fullgraph, dynamic=True)(q)
    if not fullgraph:
        assert caught.type is kind


FEATURES: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "plain": lambda bias: {},
    "hints, lse": lambda bias: {"max_seqlen_q": 19, "max_seqlen_k": 19, "return_lse": True, "causal": "top_left"},
    "bias, window, soft cap": lambda bias: {"bias": bias, "window": (4, None), "softcap": 5, "scale": 0.3},
    "two biases, mask": lambda bias: {"bias": (bias, bias[:1, :1]), "mask": bias > -1, "mask_layout": "padded"},
    "a bias of keys, a sink, slopes": lambda bias: {"bias": bias[0, :, 0].repeat(1, 2)[:, :24], "bias_layout": "keys", "sink": bias[0, :, 0, 0],
                                                    "alibi_slopes": bias[0, :, 1, 1].detach().exp(), "causal": True},
    "used rows, dropout": lambda bias: {"seqused_q": torch.tensor([3, 19], device=bias.device), "dropout_p": 0.2,
                                        "dropout_seed": torch.tensor([3, 0], device=bias.device), "deterministic": True},
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("features", FEATURES)
def test_compiled_packed_sequences_equal_eager_ones(features: str, dynamic: bool, device: torch.device) -> None:
    """As one operator: the graph that Dynamo makes has no other of ours, and its gradients are the eager call's."""
    torch._dynamo.reset()
    targets: list[str] = []

    def seen(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes if "triflash" in str(node.target))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def call(q: Tensor, bias: Tensor) -> Any:
        found = packed(q, **FEATURES[features](bias))
        return found[0].sum() + found[1].sum() if isinstance(found, tuple) else found.square().sum()

    generator = torch.Generator(device).manual_seed(1)
    q = torch.randn(2, 12, 3, 8, device=device, generator=generator, requires_grad=True)
    bias = torch.randn(1, 3, 19, 19, device=device, generator=generator, requires_grad=True)
    results = []
    for function in (call, torch.compile(call, backend=seen, fullgraph=True, dynamic=dynamic)):
        out = function(q, bias)
        results.append([out, *torch.autograd.grad(out, (q, bias), allow_unused=True)])
    for x, y in zip(*results, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(y, x)
    assert targets == ["triflash.attention_varlen.default"]


@pytest.mark.parametrize("kind", ["plain", "bias", "packed", "packed bias"])
def test_a_compiled_call_compares_little(kind: str, device: torch.device) -> None:
    """What Dynamo reads while it traces our Python it compares in every call: 152 such guards took a fifth of a compiled forward pass."""
    torch._dynamo.reset()
    found: list[Any] = []

    def all_of(guards: Any) -> list[bool]:
        found.extend(guards)
        return [True] * len(guards)

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cu: Tensor) -> Tensor:
        if kind.startswith("packed"):
            return attention_varlen(q, k, v, cu, bias=bias, causal=True)
        return attention(q, k, v, bias=bias, causal=True)

    compiled = torch.compile(call, backend="eager", fullgraph=True, options={"guard_filter_fn": all_of})
    q, k, v, bias = tensors(device)
    if kind.startswith("packed"):
        q, k, v = (x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v))
        bias = torch.zeros(1, 1, 30, 30, device=device, requires_grad=True)
    cu = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
    compiled(q, k, v, bias if kind.endswith("bias") else None, cu)
    assert 0 < len(found) <= 36, [(each.guard_type, each.name) for each in found]


@pytest.mark.skipif("inductor" not in COMPILERS, reason="needs a C++ compiler")
def test_generated_code_names_no_defaults(device: torch.device) -> None:
    """Operators take any layout; Inductor names the default of each argument of one that does not: 14 of forward, 12 of backward."""
    from torch._inductor.utils import fresh_cache, run_and_get_code

    torch._dynamo.reset()
    q, k, v, _ = tensors(device)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, causal=True), fullgraph=True)
    with fresh_cache():
        _, code = run_and_get_code(results, compiled, [q, k, v])
    calls = [line for each in code for line in each.splitlines() if "torch.ops.triflash." in line and " = " in line]
    assert len(calls) == 2 and not any("softcap=" in line for line in calls), calls


@pytest.mark.parametrize("compiler", COMPILERS[:1])
def test_compiled_with_frozen_inputs_and_a_mask(compiler: str, device: torch.device) -> None:
    torch._dynamo.reset()
    q, k, v, bias = tensors(device)
    mask = bias.detach() > 0
    compiled = torch.compile(lambda q, k, v: flash_attn_func(q, k, v, mask), backend=compiler, fullgraph=True)
    (got,) = torch.autograd.grad(compiled(q, k.detach(), v.detach()).sum(), q)
    (wanted,) = torch.autograd.grad(flash_attn_func(q, k.detach(), v.detach(), mask).sum(), q)
    torch.testing.assert_close(got, wanted)


def test_lse_alone_is_differentiable(device: torch.device) -> None:
    q, k, v, _ = tensors(device)
    _, lse, _ = ops.attention_forward(q, k, v, None, *OPTIONS)
    with triflash.record_launches() as ran:
        dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    assert ran == ["tiled: backward"]
    assert dq.abs().sum() > 0 and dk.abs().sum() > 0 and (dv == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads(backend: str, device: torch.device) -> None:
    """Many threads at once, forward and backward: everyone gets what a single one gets."""
    inputs = tensors(device)
    with triflash.backend(backend):
        wanted = results(functional, inputs)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(3):
                with triflash.backend(backend):
                    got = results(functional, [x.detach().clone().requires_grad_() for x in inputs])
                for a, b in zip(got, wanted, strict=True):
                    assert torch.equal(a, b)
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            errors.append(error)

    if backend == "triton" and device.type == "cpu":
        pytest.skip("Triton's interpreter is not made for threads")
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@pytest.mark.skipif(not HAVE_TRITON or sys.platform != "linux", reason="needs Triton")
@pytest.mark.gpu
def test_cuda_graph(device: torch.device) -> None:
    """Forward and backward can be captured and replayed: nothing in them waits for the device."""
    q, k, v, bias = tensors(device, M=64, N=64)
    results(functional, [q, k, v, bias])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(functional, [q, k, v, bias])
    with torch.no_grad():
        q.copy_(torch.randn_like(q))
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, results(functional, [q, k, v, bias]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dynamic", [None, True, False, "marked"])
def test_every_keyword_under_dynamic_shapes(dynamic: bool | str | None, device: torch.device) -> None:
    """Sinks, slopes and all else with symbolic sizes: no graph break, the same results, and no more frames than sizes call for."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def function(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        fixed: dict[str, Any] = {"causal": True, "window": (5, 0), "softcap": 3.0, "dropout_p": 0.1, "dropout_seed": 3, "backend": "tiled"}
        out, lse = triflash.attention(q, k, v, **more, **fixed, return_lse=True)
        return out.square().mean() + lse.mean()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, dynamic=None if dynamic == "marked" else dynamic, fullgraph=True)
    for B, M in ((4, 7), (3, 9), (5, 12)):  # sizes that are equal at first are taken for the same
        q, k, v = (torch.randn(B, n, 2, 8, device=device, requires_grad=True) for n in (M, M + 3, M + 3))
        more = {
            "sink": torch.randn(2, device=device, requires_grad=True),
            "alibi_slopes": torch.rand(2, device=device),
            "key_lengths": torch.full((B,), M, device=device),
            "mask": torch.rand(M, M + 3, device=device) < 0.9,
            "bias": torch.randn(B, 2, M, M + 3, device=device, requires_grad=True),
        }
        if dynamic == "marked":
            for x in (q, k, v, more["bias"], more["key_lengths"]):
                torch._dynamo.mark_dynamic(x, 0)
        leaves = [q, k, v, more["sink"], more["bias"]]
        results = [(y, *torch.autograd.grad(y, leaves)) for y in (function(q, k, v, **more), compiled(q, k, v, **more))]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == {True: 1, None: 2, "marked": 2, False: 3}[dynamic]
