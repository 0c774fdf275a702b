"""Jagged NestedTensors in ``attention``, against the dense reference in float64 of each of their parts."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from triflash import attention, attention_varlen, door, oracle

GPU = torch.cuda.is_available()
BACKENDS = [
    "tiled",
    "oracle",
    pytest.param("triton", marks=pytest.mark.skipif(not (GPU or os.environ.get("TRITON_INTERPRET") == "1"), reason="Triton runs nothing")),
]
M, N = (5, 0, 17, 3), (7, 4, 17, 1)  # queries and keys of each sequence
H, HK, D, DV = 4, 2, 16, 8
SHAPES = {"q": (M, H, D), "k": (N, HK, D), "v": (N, HK, DV)}


def jagged(parts: list[Tensor], offsets: Tensor | None = None) -> Tensor:
    """A leaf of these parts."""
    lengths = torch.tensor([0, *(len(x) for x in parts)])
    offsets = lengths.cumsum(0).to(parts[0].device) if offsets is None else offsets
    return torch.nested.nested_tensor_from_jagged(torch.cat(parts), offsets).detach().requires_grad_()


def inputs(device: torch.device, dtype: torch.dtype = torch.float32, shapes: dict[str, Any] = SHAPES) -> dict[str, Tensor]:
    parts = {name: [torch.randn(n, *more, device=device, dtype=dtype) for n in own] for name, (own, *more) in shapes.items()}
    x = {name: jagged(own) for name, own in parts.items()}
    return x | {"v": jagged(parts["v"], x["k"].offsets())}


def part(x: Any, b: int, m: int, n: int) -> Any:
    """Of a padded bias or mask what a sequence sees."""
    if x is None:
        return None
    x = x[(None,) * (4 - x.dim())]
    x = x[b : b + 1] if x.shape[0] > 1 else x
    return x[:, :, : (m if x.shape[2] > 1 else 1), : (n if x.shape[3] > 1 else 1)]


def reference(x: dict[str, Tensor], causal: Any, window: Any, slopes: Any, bias: Any, mask: Any, **options: Any) -> Any:
    """Lists of out and lse, a part each."""
    found = []
    for b, (q, k, v) in enumerate(zip(*(x[name] for name in "qkv"), strict=True)):
        m, n = len(q), len(k)
        diagonal = 0 if causal == "top_left" else n - m
        left, right = window or (None, None)
        right = 0 if causal else right
        found.append(oracle.attention(
            q[None], k[None], v[None], part(bias, b, m, n), mask=part(mask, b, m, n),
            alibi_slopes=None if slopes is None else slopes if slopes.dim() == 1 else slopes[b],
            lo=None if left is None else diagonal - left, hi=None if right is None else diagonal + right, shift=diagonal, **options,
        ))  # fmt: skip
    return [out[0] for out, _ in found], [lse[0] for _, lse in found]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal, a bias of all, with its gradient": {"causal": True, "bias": (H, 17, 17)},
    "two biases, each with its gradient": {"bias": (H, 17, 17), "bias[1]": (4, 1, 1, 17), "causal": True},
    "a bias of each, top left": {"causal": "top_left", "bias": (4, 1, 17, 17)},
    "a bias of keys and a mask": {"bias": (4, H, 1, 17), "mask": (17, 17)},
    "a mask": {"mask": (4, 1, 17, 17)},
    "window, sink, cap": {"window": (3, 2), "sink": (H,), "softcap": 2.0, "scale": 0.3},
    "slopes of each": {"alibi_slopes": (4, H), "causal": True},
    "slopes, top left": {"alibi_slopes": (H,), "causal": "top_left"},
}


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_each_part_by_itself(name: str, backend: str, layout: str, device: torch.device) -> None:
    options = dict(CASES[name])
    x = inputs(device)
    leaves = dict(x)
    for key in ("bias", "bias[1]", "sink"):
        if key in options:
            leaves[key] = options[key] = torch.randn(options[key], device=device, requires_grad=True)
    if "mask" in options:
        options["mask"] = torch.rand(options["mask"], device=device) < 0.7
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.rand(options["alibi_slopes"], device=device)
    given = [y.transpose(1, 2) if layout == "bhsd" else y for y in x.values()]
    asked = {key: y for key, y in options.items() if key != "bias[1]"}
    if "bias[1]" in options:
        asked["bias"] = (options["bias"], options["bias[1]"])
    out, lse = attention(*given, **asked, layout=layout, backend=backend, return_lse=True)
    assert out.is_nested and out.offsets() is x["q"].offsets() and lse.offsets() is x["q"].offsets()
    out = out.transpose(1, 2) if layout == "bhsd" else out
    assert out.shape == (4, x["q"].shape[1], H, DV) and lse.shape == (4, H, x["q"].shape[1]) and lse.dtype == torch.float32

    wide = {key: [p.detach().double().cpu().requires_grad_() for p in y.unbind()] for key, y in x.items()}
    exact = {key: y.detach().double().cpu().requires_grad_() for key, y in leaves.items() if key in ("bias", "bias[1]", "sink")}
    names = ("causal", "window", "bias", "mask")
    more = {key: y for key, y in options.items() if key in ("softcap", "scale")}
    asked = {key: y.cpu() if isinstance(y, Tensor) else y for key, y in options.items()} | exact
    if "bias[1]" in asked:
        asked["bias"] = asked["bias"] + asked.pop("bias[1]")
    slopes = asked.get("alibi_slopes")
    outs, lses = reference(wide, slopes=slopes, sink=exact.get("sink"), **{key: asked.get(key) for key in names}, **more)
    for got, right in ((out.unbind(), outs), (lse.unbind(), lses)):
        for mine, theirs in zip(got, right, strict=True):
            torch.testing.assert_close(mine.detach().cpu().double(), theirs.detach(), rtol=1e-4, atol=1e-5)

    weights = torch.randn(sum(M), H, DV, device=device)
    finite = lse.values().isfinite()
    loss = (out.values() * weights).sum() + torch.where(finite, lse.values(), 0.0).sin().sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    total = torch.cat(lses, 1)
    loss = (torch.cat(outs) * weights.double().cpu()).sum() + torch.where(total.isfinite(), total, 0.0).sin().sum()
    right_grads = torch.autograd.grad(loss, [p for own in wide.values() for p in own] + list(exact.values()), allow_unused=True)
    theirs = iter(right_grads)
    for key, mine in zip(leaves, grads, strict=True):
        if key in wide:
            assert mine.is_nested and mine.offsets() is x[key].offsets()
            pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(wide[key], (next(theirs) for _ in M), strict=True)]
            mine, right = mine.values(), torch.cat(pieces)
        else:
            right = next(theirs)
        torch.testing.assert_close(mine.cpu().double(), right, rtol=1e-4, atol=1e-5)


def test_from_a_projection(device: torch.device) -> None:
    """As a model makes them: one linear layer, split, and the result added to what came in."""
    x = torch.nested.nested_tensor([torch.randn(n, 32, device=device) for n in (3, 9, 1)], layout=torch.jagged)
    layer = torch.nn.Linear(32, 96, device=device)
    q, k, v = (y.unflatten(-1, (2, 16)) for y in layer(x).chunk(3, -1))
    out = x + attention(q, k, v, causal=True).flatten(-2)
    out.values().square().sum().backward()
    got, layer.weight.grad = layer.weight.grad, None
    total: Any = 0.0
    for one in x.unbind():
        q, k, v = (y.unflatten(-1, (2, 16))[None] for y in layer(one).chunk(3, -1))
        total = total + (one + attention(q, k, v, causal=True)[0].flatten(-2)).square().sum()
    total.backward()
    torch.testing.assert_close(got, layer.weight.grad, rtol=1e-4, atol=1e-4)


def test_with_holes(device: torch.device) -> None:
    """What torch.nested.narrow makes: rows between the sequences, which may hold anything."""
    whole = torch.randn(3, 10, 2, 16, device=device)
    start, length = torch.tensor([0, 4, 2], device=device), torch.tensor([5, 6, 0], device=device)
    x = torch.nested.narrow(whole, 1, start, length, layout=torch.jagged)
    out = attention(x, x, x, causal=True)
    assert out.lengths() is x.lengths()
    for b, (got, s, n) in enumerate(zip(out.unbind(), (0, 4, 2), (5, 6, 0), strict=True)):
        own = whole[b : b + 1, s : s + n]
        torch.testing.assert_close(got, attention(own, own, own, causal=True)[0])
    hidden = torch.ones(3, 10, dtype=torch.bool, device=device)
    for b, (s, n) in enumerate(((0, 5), (4, 6), (2, 0))):
        hidden[b, s : s + n] = False
    dirty = torch.nested.narrow(whole.masked_fill(hidden[..., None, None], math.nan), 1, start, length, layout=torch.jagged)
    for got, right in zip(attention(dirty, dirty, dirty, causal=True).unbind(), out.unbind(), strict=True):
        assert torch.equal(got, right)


def test_holes_are_no_wrong_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIFLASH_CHECK", "1")
    whole = torch.randn(2, 10, 2, 16)
    x = torch.nested.narrow(whole, 1, torch.tensor([3, 0]), torch.tensor([7, 2]), layout=torch.jagged)
    torch.testing.assert_close(attention(x, x, x).unbind()[0], attention(*[whole[:1, 3:]] * 3)[0])
    x = torch.nested.nested_tensor_from_jagged(torch.randn(9, 2, 16), torch.tensor([0, 6, 4, 9]))
    with pytest.raises(ValueError, match="cu_seqlens_q: wanted offsets that do not decrease"):
        attention(x, x, x)


def test_dropout_of_packed_sequences(device: torch.device) -> None:
    x = inputs(device)
    options: dict[str, Any] = {"dropout_p": 0.4, "dropout_seed": 3, "causal": True}
    values = [y.values() for y in x.values()]
    assert torch.equal(
        attention(**x, **options).values(), attention_varlen(*values, x["q"].offsets(), x["k"].offsets(), **options)
    )  # fmt: skip


def test_nothing_is_read() -> None:
    """Offsets have no values here, and nobody asks for the longest sequence."""
    values, offsets = torch.empty(9, 2, 16, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    x = torch.nested.nested_tensor_from_jagged(values, offsets)
    out = attention(x, x, x, causal=True)
    assert out.shape == x.shape and not out._metadata_cache and not x._metadata_cache
    x = torch.nested.nested_tensor_from_jagged(torch.randn(9, 2, 16), torch.tensor([0, 4, 9]))
    assert not attention(x, x, x)._metadata_cache and not x._metadata_cache


@pytest.mark.skipif(not GPU, reason="a CPU waits for nobody")
def test_the_host_never_waits(device: torch.device) -> None:
    x = inputs(device)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = attention(**x, causal=True)
            torch.autograd.grad(out.values(), list(x.values()), torch.ones_like(out.values()))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compiled(device: torch.device) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out = attention(q * 1.0, k, v, causal=True, bias=bias)
        assert isinstance(out, Tensor)
        return out

    torch.compiler.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    bias = torch.randn(H, 17, 17, device=device, requires_grad=True)
    for lengths in ((M, N), ((9, 1), (9, 1)), ((2, 2, 6, 0, 17), (1, 1, 3, 4, 5))):
        shapes = {"q": (lengths[0], H, D), "k": (lengths[1], HK, D), "v": (lengths[1], HK, DV)}
        x = inputs(device, shapes=shapes)
        results = [f(*x.values(), bias) for f in (compiled, run)]
        assert results[0].is_nested and results[0].offsets() is x["q"].offsets()
        grads = [torch.autograd.grad(out.values().sin().sum(), [*x.values(), bias]) for out in results]
        torch.testing.assert_close(results[0].values(), results[1].values())
        for got, right in zip(*grads, strict=True):
            torch.testing.assert_close(*(y.values() if y.is_nested else y for y in (got, right)))


def test_compiled_with_a_bias_of_known_sizes(device: torch.device) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q * 1.0, k, v, bias=torch.ones(len(M), H, max(M), max(N), device=device))
        assert isinstance(out, Tensor)
        return out

    torch.compiler.reset()
    x = inputs(device)
    out = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)(*x.values())
    torch.testing.assert_close(out.values(), run(*x.values()).values())


def test_autocast(device: torch.device) -> None:
    x = inputs(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = attention(**x)
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.values().float().sum(), x["v"])
    assert grad.is_nested and grad.dtype == torch.float32


def test_plain_tensors_are_not_asked_twice(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The eager path of plain tensors does not know of jagged ones once a call is bound."""
    q = torch.randn(1, 11, 2, 16, device=device)
    right = attention(q, q, q)

    def never(*_: Any) -> bool:
        raise AssertionError

    monkeypatch.setattr(door, "is_nested", never)
    assert torch.equal(attention(q, q, q), right)


def bad(**change: Any) -> dict[str, Any]:
    return change


DENSE = torch.zeros(4, 17, HK, D)
BAD: list[tuple[dict[str, Any], str]] = [
    (bad(key_lengths=torch.ones(4, dtype=torch.int32)), "key_lengths: wanted None, as jagged tensors have lengths of their own"),
    (bad(k=DENSE), "k: wanted a jagged tensor, as others of q, k and v are, got Tensor"),
    (bad(q=DENSE), "q: wanted a jagged tensor"),
    (bad(layout="bhsd"), r"q: wanted dim 2 ragged, .* of layout 'bhsd', got dim 1 ragged; x.transpose.1, 2., or layout='bshd'"),
    (bad(layout="bsh"), "layout: wanted one of bshd, bhsd, got 'bsh'"),
    (bad(k=jagged([torch.zeros(2, HK, D)])), "k: wanted q's 4 sequences, got 1"),
    (bad(v=jagged([torch.zeros(n, HK, DV) for n in N])), "v: wanted k's sequences, by the same offsets, got others"),
    (bad(q=jagged([torch.zeros(n, D) for n in M])), "q: wanted 4 dims .B, length, heads, dim., got 3 dims"),
    (bad(bias=torch.zeros(4, H, 3, 3, 1)), "bias: wanted 2 to 4 dims that broadcast to .4, 4, longest of q, longest of k."),
    (bad(bias=torch.zeros(3, 1, 17, 17)), "bias: wanted 2 to 4 dims"),
    (bad(mask=torch.zeros(2, 17, 17, dtype=torch.bool)), "mask: wanted 2 to 4 dims"),
    (bad(bias=jagged([torch.zeros(n, 3) for n in M])), "bias: wanted a dense tensor, padded to the longest sequence, got a NestedTensor"),
    (bad(sink=torch.zeros(3)), "sink: wanted"),
    (bad(softcap=-1.0), "softcap: wanted"),
    (bad(causal=1), "causal: wanted"),
    (bad(backend="hopper"), "sm90"),
]


@pytest.mark.parametrize("change, words", BAD)
def test_bad_input_is_named(change: dict[str, Any], words: str) -> None:
    given = inputs(torch.device("cpu")) | change
    with pytest.raises((TypeError, ValueError, triflash.UnsupportedError), match=words):
        attention(**given)


def test_the_seeds_functions_take_none() -> None:
    x = jagged([torch.zeros(n, 2, 8) for n in (3, 5)])
    with pytest.raises(TypeError, match="q: wanted a dense .strided. tensor, got a NestedTensor; attention takes jagged"):
        triflash.flash_attn_func(x, x, x)
