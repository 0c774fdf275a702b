"""Attention as one dense formula with everything that a workload may ask for: the gate's reference, and the provider ``dense``.

It is :func:`triflash.oracle.attention` in pieces: the gate needs scores and probabilities of parts, and the derivative of the soft cap. A
test holds the two to the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import oracle

__all__ = ["Options", "attention", "dense_bias", "grouped", "hidden", "listed", "probabilities", "scores"]


@dataclass(frozen=True)
class Options:
    """What attention is asked for beyond its tensors.

    Queries q ``(B, M, Hq, D)``, keys ``(B, N, Hk, D)``, values ``(B, N, Hk, Dv)``, bias ``(B0|1, B1|1, Hq|1, M|1, N|1)`` with
    ``B0 * B1 = B`` and ``B1 = batch_inner``. Query head h reads key head ``h // (Hq / Hk)``.

    lo, hi: key j is visible to query i when ``lo <= j - i <= hi``; None leaves a side open.
    softcap: ``s -> softcap * tanh(s / softcap)`` on the scaled products, before the bias; None is no cap.
    sinks: ``(Hq,)``: a score that takes part in each row's softmax and has no value; None is none.
    slopes: ``(Hq,)``, ALiBi's: ``slope * |i + shift - j|`` is subtracted from scores; None is none.
    kept: ``(B, Hq, M, N)``: what dropout multiplies probabilities by; None is no dropout.
    """

    scale: float
    batch_inner: int = 1
    lo: int | None = None
    hi: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    shift: int = 0
    kept: Tensor | None = None


def grouped(x: Tensor, heads: int) -> Tensor:
    """k or v with each head repeated for the query heads that read it."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def listed(bias: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """The biases there are: none, one, or two that are added."""
    return () if bias is None else (bias,) if isinstance(bias, Tensor) else tuple(bias)


def dense_bias(bias: Tensor, batch: int, batch_inner: int) -> Tensor:
    """A five-dim bias as ``(B|1, Hq|1, M|1, N|1)``: a view, or a copy if it varies over one batch level of two."""
    if bias.shape[0] == bias.shape[1] == 1:
        return bias.squeeze(1)  # a view whose backward is one too
    return bias.expand(batch // batch_inner, batch_inner, -1, -1, -1).flatten(0, 1)


def hidden(queries: int, keys: int, options: Options, device: torch.device) -> Tensor | None:
    """``(M, N)`` bool, True where the band hides a key; None without a band."""
    if options.lo is None and options.hi is None:
        return None
    return ~oracle.visible(queries, keys, options.lo, options.hi, device)


def scores(
    q: Tensor, k: Tensor, bias: Tensor | Sequence[Tensor] | None, options: Options, banned: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """``(B, Hq, M, N)`` scores in q's dtype, -inf where hidden, and the derivative of the soft cap (None without one).

    ``bias`` is ``(B|1, Hq|1, M|1, N|1)``, or two such, k has as many heads as q; ``banned`` is what :func:`hidden` gives, where it is at
    hand already.
    """
    s = torch.einsum("bmhd,bnhd->bhmn", q, k) * options.scale
    slope = None
    if options.softcap is not None:
        tanh = torch.tanh(s / options.softcap)
        s, slope = options.softcap * tanh, 1 - tanh * tanh
    for each in listed(bias):
        if each.dtype == torch.bool:
            s = s.masked_fill(~each, -torch.inf)
        else:
            s = s + each.to(s.dtype).masked_fill(each.double() < oracle.LEAST_BIAS, -torch.inf)
    if options.slopes is not None:
        i, j = (torch.arange(size, device=s.device) for size in s.shape[2:])
        s = s - options.slopes.to(s.dtype)[:, None, None] * (i[:, None] + options.shift - j).abs().to(s.dtype)
    if banned is None:
        banned = hidden(s.shape[2], s.shape[3], options, s.device)
    if banned is not None:
        s = s.masked_fill(banned, -torch.inf)
    return s, slope


def probabilities(s: Tensor, sinks: Tensor | None) -> Tensor:
    """The softmax of every row, its sink taking part; rows that see no key are 0."""
    top = s.detach().amax(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.to(s.dtype)[:, None, None]
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == -torch.inf, 0.0)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - top)
    return e / total.masked_fill(total == 0, 1.0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | Sequence[Tensor] | None,
    options: Options,
    softmax_dtype: torch.dtype | None = None,
    banned: Tensor | None = None,
) -> Tensor:
    """``softmax(softcap(scale q kᵀ) + bias) v``, ``(B, M, Hq, Dv)``; scores in q's dtype, softmax in ``softmax_dtype`` (default q's).

    Every score is an element of ``(B, Hq, M, N)``, several times over. ``banned`` is as for :func:`scores`.
    """
    heads = q.shape[2]
    biases = [dense_bias(each, q.shape[0], options.batch_inner) for each in listed(bias)]
    s, _ = scores(q, grouped(k, heads), biases, options, banned)
    p = probabilities(s if softmax_dtype is None else s.to(softmax_dtype), options.sinks)
    if options.kept is not None:
        p = p * options.kept
    return torch.einsum("bhmn,bnhd->bmhd", p.to(q.dtype), grouped(v, heads))
