"""``flash_attn_with_kvcache`` of ``triflash.compat.flash_attn`` against the formula in float64, as flash_attn 2.8 documents it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from triflash.compat.flash_attn import flash_attn_with_kvcache

B, N, H, HK, D = 2, 24, 4, 2, 16
LENGTHS = (5, 13)
DEFAULTS = {
    "k": None, "v": None, "rotary_cos": None, "rotary_sin": None, "cache_seqlens": None, "cache_batch_idx": None, "cache_leftpad": None,
    "block_table": None, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True,
    "alibi_slopes": None, "num_splits": 0, "return_softmax_lse": False,
}  # fmt: skip


def test_signature() -> None:
    parameters = inspect.signature(flash_attn_with_kvcache).parameters
    assert list(parameters) == ["q", "k_cache", "v_cache", *DEFAULTS]
    assert {name: p.default for name, p in parameters.items() if name in DEFAULTS} == DEFAULTS


def turned(x: Tensor, cos: Tensor, sin: Tensor, at: list[int], interleaved: bool) -> Tensor:
    """x (M, H, D) with row i rotated at position at[i], dim by dim."""
    y, half = x.clone(), cos.shape[1]
    for i, position in enumerate(at):
        for n in range(half):
            a, b = (2 * n, 2 * n + 1) if interleaved else (n, n + half)
            c, s = cos[position, n], sin[position, n]
            y[i, :, a], y[i, :, b] = x[i, :, a] * c - x[i, :, b] * s, x[i, :, a] * s + x[i, :, b] * c
    return y


def formula(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(out, lse) of each batch entry by itself, without touching the caches."""
    g = {**DEFAULTS, **given}
    q, M = g["q"], g["q"].shape[1]
    local = g["causal"] or g["window_size"] != (-1, -1)
    outs, lses = [], []
    for b in range(q.shape[0]):
        seqlens = g["cache_seqlens"]
        length = N if seqlens is None else seqlens if isinstance(seqlens, int) else int(seqlens[b])
        if g["block_table"] is not None:
            cached = [torch.cat([x[page] for page in g["block_table"][b].tolist()]) for x in (g["k_cache"], g["v_cache"])]
        else:
            entry = b if g["cache_batch_idx"] is None else int(g["cache_batch_idx"][b])
            cached = [g["k_cache"][entry], g["v_cache"][entry]]
        own, k, v = q[b], cached[0][:length], cached[1][:length]
        if g["k"] is not None:
            new = g["k"][b]
            if g["rotary_cos"] is not None:
                tables = g["rotary_cos"], g["rotary_sin"]
                style = g["rotary_interleaved"]
                new = turned(new, *tables, [length + i for i in range(len(new))], style)
                own = turned(own, *tables, [length + i * local for i in range(M)], style)
            k, v = torch.cat([k, new]), torch.cat([v, g["v"][b]])
        pad = 0 if g["cache_leftpad"] is None else int(g["cache_leftpad"][b])
        k, v = (x[pad:].transpose(0, 1).repeat_interleave(H // HK, 0) for x in (k, v))
        s = own.transpose(0, 1) @ k.mT * (D**-0.5 if g["softmax_scale"] is None else g["softmax_scale"])
        if g["softcap"] > 0:
            s = g["softcap"] * torch.tanh(s / g["softcap"])
        n = k.shape[1]
        at, j = torch.arange(M)[:, None] + n - M, torch.arange(n)[None]
        if g["alibi_slopes"] is not None:
            slopes = g["alibi_slopes"].double()
            s = s - (slopes if slopes.dim() == 1 else slopes[b])[:, None, None] * (at - j).abs()
        left, right = g["window_size"]
        right = 0 if g["causal"] else right
        hidden = ((j < at - left) & (left >= 0)) | ((j > at + right) & (right >= 0))
        s = s.masked_fill(hidden, -torch.inf)
        lses.append(s.logsumexp(-1))
        outs.append((s.softmax(-1) @ v).transpose(0, 1))
    return torch.stack(outs), torch.stack(lses)


def base(M: int = 2, new: bool = False, **more: Any) -> dict[str, Any]:
    made = {"q": torch.randn(B, M, H, D), "k_cache": torch.randn(B, N, HK, D), "v_cache": torch.randn(B, N, HK, D)}
    if new:
        made |= {"k": torch.randn(B, M, HK, D), "v": torch.randn(B, M, HK, D), "cache_seqlens": torch.tensor(LENGTHS, dtype=torch.int32)}
    return {name: x.double() if x.is_floating_point() else x for name, x in made.items()} | more


def tables(length: int = N, dims: int = D) -> dict[str, Tensor]:
    angles = torch.arange(length).double()[:, None] * 10000.0 ** (-torch.arange(dims // 2).double() / (dims // 2))
    return {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "a length for all": ({}, {"cache_seqlens": 7, "causal": True}),
    "new keys": ({"new": True, "M": 3}, {"causal": True}),
    "parts of no number": ({}, {"num_splits": -1}),
    "window": ({"new": True, "M": 3}, {"window_size": (4, 0), "softmax_scale": 0.3}),
    "soft cap and ALiBi": ({"new": True, "M": 3}, {"softcap": 1.5, "alibi_slopes": torch.rand(B, H), "causal": True}),
    "left padding": ({"new": True}, {"cache_leftpad": torch.tensor([2, 6], dtype=torch.int32), "causal": True, "num_splits": 2}),
    "entries": ({"new": True}, {"cache_batch_idx": torch.tensor([3, 0], dtype=torch.int32), "entries": 4, "causal": True}),
    "blocks": ({"new": True, "M": 3}, {"block_table": torch.tensor([[3, 0, 5], [1, 4, 2]], dtype=torch.int32), "causal": True}),
    "rotary, interleaved": ({"new": True, "M": 3}, {**tables(), "causal": True}),
    "rotary, halves": ({"new": True, "M": 3}, {**tables(), "causal": True, "rotary_interleaved": False}),
    "rotary of some dims": ({"new": True, "M": 3}, {**tables(dims=8), "window_size": (5, 2), "rotary_interleaved": False}),
    "rotary, not causal": ({"new": True, "M": 3}, tables()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_against_the_formula(name: str) -> None:
    sizes, more = CASES[name]
    given = base(**sizes) | {key: x for key, x in more.items() if key != "entries"}
    if "entries" in more:
        given |= {key: torch.randn(more["entries"], N, HK, D).double() for key in ("k_cache", "v_cache")}
    if "block_table" in more:
        given |= {key: torch.randn(6, 8, HK, D).double() for key in ("k_cache", "v_cache")}
    expected, expected_lse = formula(given)
    before = {key: given[key].clone() for key in ("k_cache", "v_cache")}
    out, lse = flash_attn_with_kvcache(**given, return_softmax_lse=True)
    # Angles are float32, as everything rotary is.
    limits = {"rtol": 1e-5, "atol": 1e-5} if "rotary" in name else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(out, expected, **limits)
    torch.testing.assert_close(lse, expected_lse, **limits)
    changed = sum(int((given[key] != before[key]).any(-1).any(-1).sum()) for key in before)
    assert changed == (2 * B * given["q"].shape[1] if sizes.get("new") else 0)
    again = flash_attn_with_kvcache(**given)
    assert torch.equal(again, out)


def test_argument_order_by_position() -> None:
    given = base(new=True, M=2)
    more = (
        given["k"], given["v"], *tables().values(), given["cache_seqlens"], torch.tensor([1, 0], dtype=torch.int32),
        torch.tensor([1, 2], dtype=torch.int32), None, 0.4, True, (6, 0), 2.0, False, torch.tensor([0.5, 0.1, 0.2, 0.3]), 3, True,
    )  # fmt: skip
    named = dict(zip(DEFAULTS, more, strict=True))
    expected, expected_lse = formula(given | named)
    out, lse = flash_attn_with_kvcache(given["q"], given["k_cache"], given["v_cache"], *more)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "more, error, message",
    [
        ({"k": torch.zeros(B, 1, HK, D), "v": torch.zeros(B, 1, HK, D)}, ValueError, "cache_seqlens: "),
        (tables(), ValueError, "k: wanted a tensor beside rotary_cos"),
        ({"rotary_cos": torch.zeros(4, 4)}, ValueError, "rotary_sin: "),
        ({"cache_seqlens": torch.tensor([1.0, 2.0])}, TypeError, "cache_seqlens: "),
        ({"cache_batch_idx": torch.tensor([1])}, ValueError, "cache_batch_idx: "),
        ({"cache_leftpad": torch.tensor([1])}, ValueError, "cache_leftpad: "),
        ({"block_table": torch.zeros(B, 2)}, TypeError, "block_table: "),
        ({"window_size": 3}, TypeError, "window_size: "),
        ({"softmax_scale": torch.nan}, ValueError, "softmax_scale: "),
        ({"k": torch.zeros(B, 1, HK, D).double(), "cache_seqlens": 3}, ValueError, "v: wanted a tensor beside k, got None"),
        ({"v": torch.zeros(1, HK, D), "cache_seqlens": 3}, ValueError, "v: wanted 4 dims .batch, seqlen_new, nheads_k, headdim., got 3"),
        ({"k": 1, "cache_seqlens": 3}, TypeError, "k: wanted a tensor, got int"),
        (
            {"cache_batch_idx": torch.tensor([0, 1]), "block_table": torch.zeros(B, 2, dtype=torch.int32)},
            ValueError,
            r"cache_batch_idx: wanted None beside a block_table, got a tensor; reorder the table's rows: block_table\[cache_batch_idx\]",
        ),
        ({"block_table": torch.zeros(B, 2).long()}, TypeError, r"block_table: .*; block_table\.int\(\) makes one"),
        ({"softmax_scale": torch.tensor(1.0)}, TypeError, r"softmax_scale: .*float\(softmax_scale\)"),
        ({"causal": 1}, TypeError, "causal: "),
    ],
)
def test_bad_input(more: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        flash_attn_with_kvcache(**base(), **more)


def test_rotary_dims() -> None:
    with pytest.raises(ValueError, match="rotary_cos: .*rotary_dim up to 16"):
        flash_attn_with_kvcache(**base(new=True), **tables(dims=18))


def test_gradients_are_refused() -> None:
    given = base(new=True, causal=True)
    given["k"].requires_grad_()
    with pytest.raises(triflash.UnsupportedError, match=r"triflash\.attention"):
        flash_attn_with_kvcache(**given)


@pytest.mark.parametrize(("name", "wrong", "words"), [
    ("k", torch.zeros(2, 3, 8), r"k: wanted 4 dims \(batch, seqlen_new, nheads_k, headdim\), got 3 dims"),
    ("k", torch.zeros(3, 1, 2, 16), r"k: wanted \(batch=2, seqlen_new, nheads_k, headdim=16\)"),
    ("k", [1], "k: wanted a tensor, got list"),
    ("window_size", 3, "window_size: wanted a pair"),
    ("cache_seqlens", 2**70, "cache_seqlens: wanted a number of keys"),
])  # fmt: skip
def test_words_beside_rotary_tables(name: str, wrong: Any, words: str) -> None:
    q, cache, new = torch.zeros(2, 1, 2, 16), torch.zeros(2, 8, 2, 16), torch.zeros(2, 1, 2, 16)
    given = {"k": new, "v": new, "rotary_cos": torch.zeros(8, 8), "rotary_sin": torch.zeros(8, 8), "cache_seqlens": 2} | {name: wrong}
    with pytest.raises((ValueError, TypeError), match=words):
        flash_attn_with_kvcache(q, cache, cache.clone(), **given)
