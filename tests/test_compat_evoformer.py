"""``triflash.compat.evoformer`` against dense float64 formulas, for the shapes that DeepSpeed4Science and cuEquivariance take."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from triflash.compat import evoformer
from triflash.compat.evoformer import DS4Sci_EvoformerAttention, triangle_attention

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INTERPRETED = not GPU and os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not (GPU or INTERPRETED), reason="Triton runs nothing here")


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, device=DEVICE).requires_grad_() for shape in shapes]


def compare(mine: Tensor, theirs: Tensor, inputs: list[Tensor], dtype: torch.dtype = torch.float64) -> None:
    rtol, atol = (1e-8, 1e-9) if dtype == torch.float64 else (1e-3, 1e-4)
    torch.testing.assert_close(mine.double(), theirs, rtol=rtol, atol=atol)
    weights = torch.randn_like(theirs)
    got, right = (torch.autograd.grad((x * weights).sum(), inputs) for x in (mine, theirs))
    for x, grad, wanted in zip(inputs, got, right, strict=True):
        assert grad.shape == x.shape
        torch.testing.assert_close(grad, wanted, rtol=rtol, atol=atol)


# DeepSpeed4Science.

B, N, L, H, D = 2, 3, 19, 2, 8
ROWS, PAIRS = (B, N, 1, 1, L), (B, 1, H, L, L)


def evoformer_dense(Q: Tensor, K: Tensor, V: Tensor, *biases: Tensor | None) -> Tensor:
    s = torch.einsum("bnihd,bnjhd->bnhij", Q, K) / Q.shape[-1] ** 0.5
    for bias in biases:
        s = s if bias is None else s + bias
    return torch.einsum("bnhij,bnjhd->bnihd", s.softmax(-1), V)


@pytest.mark.parametrize(
    "rows, pairs",
    [(ROWS, PAIRS), (ROWS, None), (None, PAIRS), (None, None), ((1, N, 1, 1, L), PAIRS), ((B, 1, 1, 1, L), (1, 1, H, L, L))],
)
def test_evoformer(rows: tuple[int, ...] | None, pairs: tuple[int, ...] | None) -> None:
    Q, K, V = inputs = drawn(*[(B, N, L, H, D)] * 3)
    biases = [None if shape is None else drawn(shape)[0] for shape in (rows, pairs)]
    given = list(biases)
    out = DS4Sci_EvoformerAttention(Q, K, V, given)
    assert out.shape == Q.shape and all(x is y for x, y in zip(given, biases, strict=True))
    compare(out, evoformer_dense(Q, K, V, *biases), inputs + [x for x in biases if x is not None])


def test_evoformer_takes_shorter_lists() -> None:
    Q, K, V, rows = drawn(*[(B, N, L, H, D)] * 3, ROWS)
    empty: list[Tensor | None] = []
    assert torch.equal(DS4Sci_EvoformerAttention(Q, K, V, empty), DS4Sci_EvoformerAttention(Q, K, V, [None, None])) and empty == []
    assert torch.equal(DS4Sci_EvoformerAttention(Q, K, V, [rows]), DS4Sci_EvoformerAttention(Q, K, V, (rows, None)))


@needs_triton
def test_evoformer_by_triton() -> None:
    """Both gradients in the biases' own dtypes, on the kernels that run there."""
    inputs = drawn(*[(B, N, L, H, D)] * 3, ROWS, PAIRS)
    Q, K, V, rows, pairs = (x.float() for x in inputs)
    with triflash.backend("triton"), triflash.record_launches() as ran:
        compare(DS4Sci_EvoformerAttention(Q, K, V, [rows, pairs]), evoformer_dense(*inputs), inputs, torch.float32)
    assert ran and all(name.startswith("triton") for name in ran)


def test_evoformer_masks() -> None:
    """OpenFold's −10⁹ and a bool row mean the same where a key is left; where none is, the mean of V and 0."""
    Q, K, V, pairs = inputs = drawn(*[(B, N, L, H, D)] * 3, PAIRS)
    shown = torch.rand(ROWS, device=DEVICE) < 0.7
    shown[..., 0] = True
    floats = 1e9 * (shown.double() - 1)
    compare(DS4Sci_EvoformerAttention(Q, K, V, [shown, pairs]), evoformer_dense(Q, K, V, floats, pairs), inputs)
    compare(DS4Sci_EvoformerAttention(Q, K, V, [floats, pairs]), evoformer_dense(Q, K, V, floats, pairs), inputs)
    shown[0, 1] = False
    assert (DS4Sci_EvoformerAttention(Q, K, V, [shown, pairs])[0, 1] == 0).all()
    floats = (1e9 * (shown.double() - 1)).float()
    out = DS4Sci_EvoformerAttention(Q.float(), K.float(), V.float(), [floats, None])
    torch.testing.assert_close(out[0, 1].double(), V[0, 1].mean(0).expand(L, H, D), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change, words", [
    (lambda x: x.update(Q=x["Q"][0]), r"Q: wanted 5 dims \(B, N, L, H, D\)"),
    (lambda x: x.update(K=x["K"][:, :, :-1]), r"K: wanted shape \(B=2, N=3, L=19"),
    (lambda x: x.update(V=x["V"].float()), "V: wanted Q's dtype"),
    (lambda x: x.update(biases=x["biases"][0]), "biases: wanted a list of up to two tensors or None, got Tensor"),
    (lambda x: x["biases"].append(None), "biases: wanted up to two, got 3"),
    (lambda x: x["biases"].reverse(), r"biases\[0\]: wanted shape \(B, N, 1, 1, L\) = \(2, 3, 1, 1, 19\)"),
    (lambda x: x["biases"].pop(0), r"biases\[0\]: wanted shape \(B, N, 1, 1, L\)"),
    (lambda x: x.update(biases=[None, x["biases"][1] > 0]), r"biases\[1\]: wanted numbers, got torch.bool; a mask of pairs is mask="),
    (lambda x: x.update(biases=[x["biases"][0].long(), None]), r"biases\[0\]: wanted float16"),
    (lambda x: x.update(biases=["no"]), r"biases\[0\]: wanted a tensor or None, got str"),
])  # fmt: skip
def test_evoformer_bad_input(change: Any, words: str) -> None:
    Q, K, V, rows, pairs = drawn(*[(B, N, L, H, D)] * 3, ROWS, PAIRS)
    x: dict[str, Any] = {"Q": Q, "K": K, "V": V, "biases": [rows, pairs]}
    change(x)
    with pytest.raises((ValueError, TypeError), match=words):
        DS4Sci_EvoformerAttention(**x)


# cuEquivariance.

M, S = 11, 19  # queries, keys


def triangle_dense(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, shown: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and max; what is hidden is −10⁹, as there."""
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    s = s if shown is None else s.masked_fill(~shown, -1e9)
    return s.softmax(-1) @ v, s.logsumexp(-1, keepdim=True), s.amax(-1, keepdim=True)


def triangle_inputs(B: int = B) -> list[Tensor]:
    return drawn((B, N, H, M, D), (B, N, H, S, D), (B, N, H, S, D), (B, 1, H, M, S))


def some_mask(B: int = B) -> Tensor:
    shown = torch.rand(B, N, 1, 1, S, device=DEVICE) < 0.6
    shown[..., 3] = True
    return shown


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("kind", ["none", "bool", "numbers", "halves", "shared by rows", "lengths"])
def test_triangle(kind: str, scale: float | None) -> None:
    q, k, v, bias = inputs = triangle_inputs()
    shown: Tensor | None = some_mask()
    options: dict[str, Any] = {}
    if kind == "lengths":
        lengths = torch.randint(1, S + 1, (B, N, 1, 1, 1), dtype=torch.int32, device=DEVICE)
        lengths[0, 0] = S + 7  # counts as S
        options, shown = {"kv_lengths": lengths}, torch.arange(S, device=DEVICE) < lengths
    elif kind == "none":
        shown = None
    else:
        shown = shown[:, :1] if kind == "shared by rows" else shown
        options["mask"] = shown.to({"bool": torch.bool, "numbers": torch.float32, "halves": torch.float16}.get(kind, torch.int64))
    right = triangle_dense(q, k, v, bias, shown, scale)
    out = triangle_attention(q, k, v, bias, scale=scale, **options)
    compare(out, right[0], inputs)
    again, lse, top = triangle_attention(q, k, v, bias, options.get("mask"), scale, True, kv_lengths=options.get("kv_lengths"))
    assert torch.equal(again, out)
    for got, wanted in ((lse, right[1]), (top, right[2])):
        assert got.shape == (B, N, H, M, 1) and got.dtype == torch.float32 and not got.requires_grad
        torch.testing.assert_close(got.double(), wanted.detach(), rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("masked", [False, True])
def test_triangle_by_triton(masked: bool) -> None:
    inputs = triangle_inputs()
    shown = some_mask() if masked else None
    q, k, v, bias = (x.float() for x in inputs)
    with triflash.backend("triton"):
        out, lse, top = triangle_attention(q, k, v, bias, shown, return_aux=True)
    right = triangle_dense(*inputs, shown)
    compare(out, right[0], inputs, torch.float32)
    for got, wanted in ((lse, right[1]), (top, right[2])):
        torch.testing.assert_close(got.double(), wanted.detach(), rtol=1e-4, atol=1e-4)


def test_triangle_of_four_dims() -> None:
    """They mean B = 1, and what comes back has five, as there."""
    q, k, v, bias = inputs = triangle_inputs(1)
    shown = some_mask(1)
    lengths = torch.tensor([4, S, 1], device=DEVICE).view(N, 1, 1, 1)
    given = [x[0] for x in inputs]
    right = triangle_attention(q, k, v, bias, shown, return_aux=True)
    for got, wanted in zip(triangle_attention(*given, shown[0], return_aux=True), right, strict=True):
        assert torch.equal(got, wanted)
    compare(
        triangle_attention(*given, kv_lengths=lengths), triangle_dense(*inputs, torch.arange(S, device=DEVICE) < lengths[None])[0], inputs
    )


@pytest.mark.parametrize("by", ["mask", "kv_lengths"])
def test_rows_without_keys(by: str) -> None:
    """0 here; cuEquivariance has the mean of v for a mask, and 0 for lengths. Nothing flows back from them."""
    q, k, v, bias = triangle_inputs()
    shown = torch.ones(B, N, 1, 1, S, dtype=torch.bool, device=DEVICE)
    shown[1, 2] = False
    options: dict[str, Any] = {"mask": shown} if by == "mask" else {"kv_lengths": shown.sum(-1, keepdim=True)}
    out, lse, top = triangle_attention(q, k, v, bias, return_aux=True, **options)
    assert (out[1, 2] == 0).all() and (lse[1, 2] == -torch.inf).all() and (top[1, 2] == -torch.inf).all()
    assert torch.isfinite(lse[0]).all() and torch.isfinite(top[:, :2]).all()
    grads = torch.autograd.grad(out[1, 2].sum(), (q, k, v, bias))
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("chunk", [1, 40, 300, 2000])
def test_the_maximum_holds_few_scores(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of any size the same, none of them larger than it may be."""
    q, k, v, bias = (x.detach().float() for x in triangle_inputs())
    shown = some_mask()
    whole = triangle_attention(q, k, v, bias, shown, return_aux=True)[2]
    monkeypatch.setattr(evoformer, "_CHUNK", chunk)
    sizes = []
    matmul = torch.matmul

    def recorded(*args: Any) -> Tensor:
        sizes.append((product := matmul(*args)).numel())
        return product

    monkeypatch.setattr(torch, "matmul", recorded)
    parts = evoformer._maxima(q, k, bias, ~shown, D**-0.5)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert max(sizes) <= max(chunk, H) and sum(sizes) == B * N * H * M * S


def test_empty() -> None:
    q, k, v, bias = triangle_inputs()
    out, lse, top = triangle_attention(q, k[..., :0, :], v[..., :0, :], bias[..., :0], return_aux=True)
    assert (out == 0).all() and (lse == -torch.inf).all() and (top == -torch.inf).all()
    assert triangle_attention(q[..., :0, :], k, v, bias[..., :0, :], return_aux=True)[2].shape == (B, N, H, 0, 1)


def test_meta_and_vmap() -> None:
    q, k, v, bias = (x.detach().float() for x in triangle_inputs())
    for x in triangle_attention(*(x.to("meta") for x in (q, k, v, bias)), return_aux=True):
        assert x.device.type == "meta" and x.shape[:4] == (B, N, H, M)
    several = torch.stack([bias, 2 * bias])
    mapped = torch.func.vmap(lambda bias: triangle_attention(q, k, v, bias, return_aux=True))(several)
    for at, each in enumerate(several):
        for got, right in zip(mapped, triangle_attention(q, k, v, each, return_aux=True), strict=True):
            torch.testing.assert_close(got[at], right)


def test_bfloat16_and_autocast() -> None:
    q, k, v, bias = (x.detach() for x in triangle_inputs())
    half = [x.bfloat16() for x in (q, k, v)]
    right = triangle_dense(*(x.double() for x in half), bias)[0]
    b = bias.float().requires_grad_()
    out = triangle_attention(*half, b)
    assert out.dtype == torch.bfloat16 and (out.double() - right).norm() <= 1e-2 * right.norm()
    assert torch.autograd.grad(out.float().sum(), b)[0].dtype == torch.float32
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = triangle_attention(q.float(), k.float(), v.float(), b, return_aux=True)
    torch.testing.assert_close(cast[0], out)
    assert cast[1].dtype == cast[2].dtype == torch.float32


def test_compiled() -> None:
    torch.compiler.reset()
    q, k, v, bias = triangle_inputs()
    shown = some_mask()

    leaves = [q.transpose(2, 3).contiguous().detach().requires_grad_(), k, v, bias]

    def whole(*x: Tensor) -> Tensor:
        q, k, v, bias = x
        out = DS4Sci_EvoformerAttention(q, q, q, [shown[..., :M].double(), bias[..., :M]])
        return out.sum() + triangle_attention(q.transpose(2, 3), k, v, bias, shown).square().sum()

    compiled = torch.compile(whole, backend="aot_eager", fullgraph=True)
    for got, right in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(whole(*leaves), leaves), strict=True):
        torch.testing.assert_close(got, right)


def test_compiled_with_symbolic_sizes_beside_known_ones() -> None:
    """What a compiled program makes itself has sizes that are numbers."""

    def both(q: Tensor) -> Tensor:
        rows = DS4Sci_EvoformerAttention(q, q, q, [torch.ones(1, 3, 1, 1, 5, device=DEVICE), torch.ones(1, 1, 2, 5, 5, device=DEVICE)])
        first = q.transpose(2, 3)
        return rows + triangle_attention(first, first, first, torch.ones(1, 1, 2, 5, 5, device=DEVICE)).transpose(2, 3)

    torch.compiler.reset()
    q = torch.randn(1, 3, 5, 2, 8, device=DEVICE)
    torch.testing.assert_close(torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)(q), both(q))


@pytest.mark.parametrize("change, words", [
    (lambda x: x.update(q=x["q"][0, 0]), r"q: wanted 5 dims \(B, N, H, Q, D\), or 4 \(N, H, Q, D\), got 3 dims"),
    (lambda x: x.update(q=None), "q: wanted a tensor, got NoneType"),
    (lambda x: x.update(k=x["k"][0]), r"k: wanted 5 dims \(B, N, H, K, D\)"),
    (lambda x: x.update(v=x["v"][..., 1:, :]), r"v: wanted shape \(B=2, N=3, H=2, K=19"),
    (lambda x: x.update(k=x["k"].float()), "k: wanted q's dtype"),
    (lambda x: x.update(bias=None), "bias: wanted a tensor, got NoneType"),
    (lambda x: x.update(bias=x["bias"].expand(B, N, H, M, S)), r"bias: wanted shape \(B, 1, H, Q, K\) = \(2, 1, 2, 11, 19\)"),
    (lambda x: x.update(bias=x["bias"] > 0), "bias: wanted numbers, got torch.bool; pass it as mask="),
    (lambda x: x.update(mask=torch.ones(B, N, S)), r"mask: wanted shape \(B, N, 1, 1, K\) = \(2, 3, 1, 1, 19\)"),
    (lambda x: x.update(mask=[1]), "mask: wanted a tensor"),
    (lambda x: x.update(mask=torch.ones(B, N, 1, 1, S), kv_lengths=torch.ones(B, N, 1, 1, 1).int()), "mask, kv_lengths: wanted one of them"),
    (lambda x: x.update(kv_lengths=torch.ones(B, N, 1, 1, 1)), "kv_lengths: wanted a tensor of integers, got torch.float32"),
    (lambda x: x.update(kv_lengths=torch.ones(B, N).int()), r"kv_lengths: wanted shape \(B, N, 1, 1, 1\) = \(2, 3, 1, 1, 1\)"),
    (lambda x: x.update(scale="1"), "scale: wanted a number or None"),
    (lambda x: x.update(return_aux=1), "return_aux: wanted True or False"),
])  # fmt: skip
def test_triangle_bad_input(change: Any, words: str) -> None:
    x: dict[str, Any] = dict(zip("qkv", (inputs := triangle_inputs())[:3], strict=True)) | {"bias": inputs[3]}
    change(x)
    x = {key: y.to(DEVICE) if isinstance(y, Tensor) else y for key, y in x.items()}
    with pytest.raises((ValueError, TypeError), match=words):
        triangle_attention(**x)


@pytest.mark.parametrize("two, masked, backend", [(False, False, "hopper"), (False, True, "hopper"), (True, False, "hopper")])
def test_which_backend(two: bool, masked: bool, backend: str) -> None:
    """What docs/folding.md says runs on an H100, both passes, without a copy."""
    q = torch.empty(1, 384, 4, 384, 32, device="meta", dtype=torch.bfloat16, requires_grad=True)
    pairs = torch.empty(1, 1, 4, 384, 384, device="meta", dtype=torch.bfloat16, requires_grad=True)
    rows = torch.empty(1, 384, 1, 1, 384, device="meta", dtype=torch.bfloat16, requires_grad=True)
    mask = torch.empty(1, 384, 1, 1, 384, device="meta", dtype=torch.bool) if masked else None
    explained = triflash.explain(q, q, q, (rows, pairs) if two else pairs, mask=mask, layout="bhsd", device="h100")
    assert explained.forward.backend == explained.backward.backend == backend and not explained.copies
