"""FlexAttention as a provider: bias, soft cap, band, groups and sinks in the terms of its score and mask functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import formula
from .compiling import compiled
from .entry import Biases, Entry, heads_first
from .gate import Problem
from .packed import places
from .workloads import Workload

__all__ = ["attend"]


def attend(workload: Workload, problem: Problem, dense: bool = False) -> Entry:
    """The function to be timed; the block mask is made here. ``dense`` runs FlexAttention's own dense emulation (tests)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex: Any = flex_attention if dense else compiled(flex_attention)
    w, sinks = workload, problem.options.sinks
    block_mask = None
    number = place = None
    if w.packed:
        number, place = places(problem.sequences, problem.q.device)
    mask = problem.bias if w.is_mask else None
    if w.is_banded or number is not None or mask is not None:
        shown = _band(w.lo, w.hi) if number is None else _documents(number, _band(w.lo, w.hi) if w.is_banded else None)
        entries = heads = None
        if mask is not None:
            shown = _masked(_read(mask, w.batch_inner), shown if w.is_banded else None)
            entries, heads = w.batch if mask.shape[0] * mask.shape[1] > 1 else None, w.heads if mask.shape[2] > 1 else None
        block_mask = create_block_mask(shown, entries, heads, w.queries, w.keys, device=problem.q.device)
    more: dict[str, Any] = {"block_mask": block_mask, "scale": w.softmax_scale}
    if w.kv_heads != w.heads:
        more["enable_gqa"] = True
    if sinks is not None:
        more |= _wants_lse()

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Biases) -> Tensor:
        if number is not None and place is not None:
            assert not isinstance(bias, tuple), "packed sequences have one bias here"
            score_mod = _by_place(bias, number, place, w.softcap)
        else:
            score_mod = _score_mod(() if mask is not None else formula.listed(bias), w.batch_inner, w.softcap, problem.options.slopes)
        found = flex(q, k, v, score_mod=score_mod, **more)
        if sinks is None:
            return found
        out, lse = found[0], getattr(found[1], "lse", found[1])
        weight = torch.sigmoid(lse - sinks[:, None])  # what the sink leaves to the keys: e^lse / (e^lse + e^sink)
        scaled: Tensor = out * weight[..., None].to(out.dtype)
        return scaled

    return Entry(run, lay=heads_first, unlay=heads_first)


def _wants_lse() -> dict[str, Any]:
    """The argument that asks for the log-sum-exp: PyTorch 2.9 renamed it."""
    try:
        from torch.nn.attention.flex_attention import AuxRequest
    except ImportError:
        return {"return_lse": True}
    return {"return_aux": AuxRequest(lse=True)}


def _documents(number: Tensor, shown: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """What a band (None: everything) shows within each of the packed sequences, as PyTorch's documentation writes a document mask."""
    if shown is None:
        return lambda b, h, i, j: number[i] == number[j]
    return lambda b, h, i, j: (number[i] == number[j]) & shown(b, h, i, j)


def _by_place(bias: Tensor | None, number: Tensor, place: Tensor, softcap: float | None) -> Callable[..., Tensor] | None:
    """:func:`_score_mod` of packed sequences: a bias by sequence and position."""
    if bias is None and softcap is None:
        return None
    x = None if bias is None else bias.squeeze(1)
    varies = () if x is None else tuple(size > 1 for size in x.shape)

    def score_mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if x is None:
            return s
        at = (number[i], h, place[i], place[j])
        return s + x[tuple(index if own else index * 0 for index, own in zip(at, varies, strict=True))]

    return score_mod


def _masked(seen: Callable[..., Tensor], shown: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """What a boolean mask shows of what a band (None: everything) does."""
    return seen if shown is None else lambda b, h, i, j: seen(b, h, i, j) & shown(b, h, i, j)


def _band(lo: int | None, hi: int | None) -> Callable[..., Tensor]:
    if lo is None:
        return lambda b, h, i, j: j - i <= hi
    if hi is None:
        return lambda b, h, i, j: j - i >= lo
    return lambda b, h, i, j: (j - i >= lo) & (j - i <= hi)


def _score_mod(biases: tuple[Tensor, ...], inner: int, softcap: float | None, slopes: Tensor | None = None) -> Callable[..., Tensor] | None:
    """Biases are captured, and read where they vary; dims of size 1 are read at 0."""
    if not biases and softcap is None and slopes is None:
        return None
    reads = [_read(bias, inner) for bias in biases]

    def score_mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        for read in reads:
            s = s + read(b, h, i, j)
        return s if slopes is None else s - slopes[h] * (i - j).abs()

    return score_mod


def _read(bias: Tensor, inner: int) -> Callable[..., Tensor]:
    outer_varies, inner_varies = bias.shape[0] > 1, bias.shape[1] > 1
    head_varies, query_varies, key_varies = (size > 1 for size in bias.shape[2:])
    if (outer_varies and inner_varies) or not (outer_varies or inner_varies):
        x = bias.flatten(0, 1)  # one batch dim, or none
    else:
        x = bias.squeeze(1) if outer_varies else bias.squeeze(0)

    def read(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if outer_varies:
            entry: Any = b if inner_varies else b // inner
        else:
            entry = b % inner if inner_varies else b * 0  # PyTorch 2.10 takes no constants among captured tensors' indices
        return x[entry, h if head_varies else h * 0, i if query_varies else i * 0, j if key_varies else j * 0]

    return read
