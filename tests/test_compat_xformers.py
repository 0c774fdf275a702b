"""``triflash.compat.xformers`` against the code that xformers' documentation calls equivalent, in float64, and with xformers' own masks."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from triflash.compat.xformers import LowerTriangularMask, LowerTriangularMaskWithTensorBias, memory_efficient_attention


def equivalent(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Of (B, M, H, K), the bias dense."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return ((s if bias is None else s + bias).softmax(-1) @ v).transpose(1, 2)


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def compare(one: Tensor, other: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(one)
    grads = [torch.autograd.grad((x * weights).sum(), inputs, retain_graph=True) for x in (one, other)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def causal(M: int, N: int, diagonal: int = 0) -> Tensor:
    return torch.full((M, N), -torch.inf, dtype=torch.float64).triu(1 + diagonal)


@pytest.mark.parametrize("shape", [None, (2, 3, 5, 7), (1, 3, 5, 7), (2, 1, 1, 7), (5, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_bmhk(shape: tuple[int, ...] | None, masked: bool) -> None:
    q, k, v = inputs = drawn((2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 6))
    bias = None if shape is None else drawn(shape)[0]
    given: Any = bias
    if masked:
        given = LowerTriangularMask() if bias is None else LowerTriangularMask().add_bias(bias)
    dense = (0 if bias is None else bias) + (causal(5, 7) if masked else torch.zeros(5, 7, dtype=torch.float64))
    out = memory_efficient_attention(q, k, v, given, 0.0, 0.3)
    assert out.shape == (2, 5, 3, 6)
    compare(out, equivalent(q, k, v, dense, 0.3), inputs + ([] if bias is None else [bias]))


@pytest.mark.parametrize("shape", [None, (2, 5, 7), (1, 5, 7), (5, 7), (2, 1, 5, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_bmk(shape: tuple[int, ...] | None, masked: bool) -> None:
    q, k, v = inputs = drawn((2, 5, 4), (2, 7, 4), (2, 7, 6))
    bias = None if shape is None else drawn(shape)[0]
    given: Any = (
        LowerTriangularMaskWithTensorBias(bias)
        if masked and bias is not None
        else LowerTriangularMask(torch.device("cpu"))
        if masked
        else bias
    )
    dense = causal(5, 7) if masked else torch.zeros(5, 7, dtype=torch.float64)
    if bias is not None:
        dense = dense + (bias.unsqueeze(1) if bias.dim() == 3 else bias)
    out = memory_efficient_attention(q, k, v, given)
    assert out.shape == (2, 5, 6)
    compare(out, equivalent(*(x.unsqueeze(2) for x in (q, k, v)), dense).squeeze(2), inputs + ([] if bias is None else [bias]))


def test_groups_of_heads() -> None:
    q, k, v, bias = inputs = drawn((2, 5, 2, 3, 4), (2, 7, 2, 1, 4), (2, 7, 2, 1, 4), (1, 2, 3, 5, 7))
    wide = [x.expand(-1, -1, -1, 3, -1) for x in (k, v)]  # as xformers wants them
    out = memory_efficient_attention(q, *wide, bias)
    flat = equivalent(*(x.flatten(2, 3) for x in (q, *wide)), bias.flatten(1, 2))
    compare(out, flat.unflatten(2, (2, 3)), inputs)


def test_bool_bias_is_a_mask_and_rows_without_keys_are_zero() -> None:
    q, k, v = inputs = drawn((1, 3, 2, 4), (1, 5, 2, 4), (1, 5, 2, 4))
    mask = torch.rand(3, 5) > 0.3
    mask[:, 0] = True
    dense = torch.zeros(3, 5, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    compare(memory_efficient_attention(q, k, v, mask), equivalent(q, k, v, dense), inputs)
    mask[1] = False
    assert (memory_efficient_attention(q, k, v, mask)[:, 1] == 0).all()


def test_dropout_and_output_dtype() -> None:
    q, k, v = (torch.randn(2, 32, 4, 8) for _ in range(3))
    rows = memory_efficient_attention(q, k, torch.ones_like(v), None, 0.25, op=("their", "kernels"), output_dtype=torch.float64)
    assert rows.dtype == torch.float64 and abs(rows.mean() - 1) < 0.05 and rows.std() > 0.02


def masks_by_name() -> types.ModuleType:
    """A package that has xformers' names where that is not installed: what is recognised is the class's name and module."""
    module = types.ModuleType("xformers.ops.fmha.attn_bias")
    for name in (
        "LowerTriangularMask", "LowerTriangularMaskWithTensorBias", "LowerTriangularFromBottomRightMask",
        "LowerTriangularFromBottomRightLocalAttentionMask", "LocalAttentionFromBottomRightMask", "BlockDiagonalMask",
    ):  # fmt: skip
        setattr(module, name, type(name, (), {"__module__": module.__name__}))
    return module


def test_masks_of_xformers_by_name() -> None:
    M, N = 5, 7
    module = masks_by_name()
    q, k, v, bias = drawn((2, M, 3, 4), (2, N, 3, 4), (2, N, 3, 4), (M, N))
    made: dict[str, Any] = {name: getattr(module, name)() for name in vars(module) if "Mask" in name}
    made["LowerTriangularMaskWithTensorBias"]._bias = bias
    made["LowerTriangularFromBottomRightLocalAttentionMask"]._window_size = 3
    made["LocalAttentionFromBottomRightMask"].window_left, made["LocalAttentionFromBottomRightMask"].window_right = 2, 1
    far = torch.arange(N)[None, :] - torch.arange(M)[:, None] - (N - M)  # of key j from query i, both counted from their ends
    hidden = torch.zeros(M, N, dtype=torch.float64)
    dense = {
        "LowerTriangularMask": causal(M, N),
        "LowerTriangularMaskWithTensorBias": causal(M, N) + bias,
        "LowerTriangularFromBottomRightMask": causal(M, N, N - M),
        "LowerTriangularFromBottomRightLocalAttentionMask": hidden.masked_fill((far > 0) | (far <= -3), -torch.inf),
        "LocalAttentionFromBottomRightMask": hidden.masked_fill((far > 1) | (far < -2), -torch.inf),
    }
    for name, expected in dense.items():
        compare(memory_efficient_attention(q, k, v, made[name]), equivalent(q, k, v, expected), [q, k, v])
    with pytest.raises(triflash.UnsupportedError, match=r"BlockDiagonalMask: .*pad the batch and pass key_lengths="):
        memory_efficient_attention(q, k, v, made["BlockDiagonalMask"])
    assert "xformers" not in sys.modules or "xformers.ops" in sys.modules  # nothing here imports it


def test_masks_of_xformers_itself() -> None:
    theirs = pytest.importorskip("xformers.ops.fmha.attn_bias")
    M, N = 5, 7
    q, k, v, bias = drawn((2, M, 3, 4), (2, N, 3, 4), (2, N, 3, 4), (2, 3, M, N))
    for mask in (
        theirs.LowerTriangularMask(),
        theirs.LowerTriangularMask().add_bias(bias),
        theirs.LowerTriangularFromBottomRightMask(),
        theirs.LowerTriangularFromBottomRightMask().make_local_attention(2),
        theirs.LocalAttentionFromBottomRightMask(window_left=1, window_right=2),
    ):
        dense = mask.materialize((2, 3, M, N), dtype=torch.float64)
        compare(memory_efficient_attention(q, k, v, mask), equivalent(q, k, v, dense), [q, k, v])


@pytest.mark.parametrize("change, kind, message", [
    ({"query": None}, TypeError, "query: wanted a tensor, got NoneType"),
    ({"key": torch.zeros(2, 7, 4)}, ValueError, "key: wanted 3 dims .* as many as query has"),
    ({"key": torch.zeros(2, 7, 3, 5)}, ValueError, r"key: wanted shape \(B=2, N=7, Hk=3, D=4\)"),
    ({"attn_bias": torch.zeros(2, 3, 5, 6)}, ValueError, "attn_bias: wanted 2 to 4 dims that broadcast"),
    ({"attn_bias": "causal"}, TypeError, "attn_bias: wanted a tensor, a LowerTriangularMask or None, got str"),
    ({"p": 1.0}, ValueError, "p: wanted a number from 0 up to but not including 1"),
])  # fmt: skip
def test_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"query": torch.zeros(2, 5, 3, 4), "key": torch.zeros(2, 7, 3, 4), "value": torch.zeros(2, 7, 3, 4)}
    with pytest.raises(kind, match=message):
        memory_efficient_attention(**(given | change))


def test_they_are_there_when_named() -> None:
    """`import triflash` imports none of them; naming one does."""
    assert triflash.compat.xformers.memory_efficient_attention is memory_efficient_attention
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        triflash.compat.nothing  # noqa: B018
