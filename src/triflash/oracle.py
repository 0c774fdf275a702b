"""Exact attention, dense: the semantics page in code, and the judge of every test. Called by ``launch/``. Torch only.

It materialises every score, so it is meant for small problems; ``backend("oracle")`` runs it for anyone who wants to rule triflash out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import keep_mask, rescale
from .lengths import Places, comparable

__all__ = ["LEAST_BIAS", "attention", "visible"]

# A bias below this counts as -inf, so that the least finite number, which some models write for "hidden", hides. The Triton kernels work in
# base 2, where such a bias overflows to -inf by itself: this is the float32 range divided by log2(e).
LEAST_BIAS = -torch.finfo(torch.float32).max / 1.4426950408889634


def visible(queries: int, keys: int, lo: int | None, hi: int | None, device: torch.device | None = None) -> Tensor:
    """``(queries, keys)`` bool: True where ``lo <= j - i <= hi``; None leaves a side open."""
    offset = torch.arange(keys, device=device)[None, :] - torch.arange(queries, device=device)[:, None]
    seen = torch.ones_like(offset, dtype=torch.bool)
    if lo is not None:
        seen &= offset >= lo
    if hi is not None:
        seen &= offset <= hi
    return seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    batch_inner: int = 1,
    lo: int | None = None,
    hi: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    first_entry: int = 0,
    second_bias: Tensor | None = None,
    query_starts: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    diagonal: Tensor | None = None,
    shift: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q kᵀ + bias) v`` and its log-sum-exp, every step in ``dtype``, differentiable by autograd.

    Args:
        q, k, v: ``(B, M, Hq, D)``, ``(B, N, Hk, D)``, ``(B, N, Hk, Dv)``; query head h reads key head ``h // (Hq // Hk)``.
        bias: ``(B0|1, B1|1, Hq|1, M|1, N|1)`` with ``B1 = batch_inner`` and ``B0 B1 = B``, or up to 4 dims that broadcast to
            ``(B, Hq, M, N)``; added unscaled; below -2.35e38 it counts as -inf. A bool bias is a mask, True = visible.
        mask: bool, of such a shape, beside a bias.
        key_lengths: integers ``(B,)``; keys from that number on are hidden.
        alibi_slopes: ``(Hq,)`` or ``(B|1, Hq)``; ``slope * |i + N - M - j|`` is subtracted.
        sink: ``(Hq,)``; a score that takes part in the softmax without a value.
        dropout_seed: int64 ``(2,)``, seed and offset; probabilities are dropped with probability ``dropout_p``. See ``dropout.py``.
        lo, hi: key j is visible to query i when ``lo <= j - i <= hi``; None leaves a side open.
        scale: default ``1 / sqrt(D)``.
        first_entry: the number of the first batch entry, to dropout.
        second_bias: added too, of such a shape.
        query_starts, query_lengths, key_starts, diagonal, shift: see :class:`~triflash.lengths.Places`; lo and hi count from the diagonal
            if it is a tensor.
        softcap: if positive, scaled products become ``softcap * tanh(· / softcap)`` before anything is added.
        dtype: what everything is computed in; float64 makes this the reference, the inputs' own dtype the "plain PyTorch" yardstick.

    Returns:
        out ``(B, M, Hq, Dv)`` and lse ``(B, Hq, M)``, natural log, sink included, both in ``dtype``. A query that sees no key gets out 0,
        lse -inf (with a sink: the sink) and gives zero gradient to everything but the sink. One that is no row gets 0 and -inf, and gives
        none.
    """
    batch, M, H, D = q.shape
    N, group = k.shape[1], H // k.shape[2] if k.shape[2] else 1
    scale = D**-0.5 if scale is None else scale
    k, v = (x.to(dtype).repeat_interleave(group, 2) for x in (k, v))
    places = Places(query_starts, query_lengths, key_starts, diagonal, shift)
    i, j = torch.arange(M, device=q.device)[:, None], torch.arange(N, device=q.device)
    hidden = None
    if key_lengths is not None:
        hidden = j >= comparable(key_lengths)[:, None]
    if key_starts is not None:
        before = j < comparable(key_starts)[:, None]
        hidden = before if hidden is None else hidden | before
    if hidden is not None:  # what is hidden may hold anything, and 0 times that need not be 0
        k, v = k.masked_fill(hidden[..., None, None], 0.0), v.masked_fill(hidden[..., None, None], 0.0)
    q, rows = q.to(dtype), places.rows(i[:, 0])
    if rows is not None:
        q = q.masked_fill(~rows[..., None, None], 0.0)
    s = torch.einsum("bmhd,bnhd->bhmn", q, k) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    for extra in (bias, second_bias, mask):
        if extra is None:
            continue
        hides = extra.dtype == torch.bool
        if not hides:  # before it is expanded, so that its gradient is summed up in dtype
            extra = extra.to(dtype).masked_fill(extra.double() < LEAST_BIAS, -torch.inf)
        if extra.dim() == 5:
            extra = extra.expand(batch // batch_inner, batch_inner, H, M, N).reshape(batch, H, M, N)
        s = s.masked_fill(~extra, -torch.inf) if hides else s + extra
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(dtype)[..., None, None] * places.from_diagonal(j - i, M, N).abs().to(dtype)
    if diagonal is None:
        s = s.masked_fill(~visible(M, N, lo, hi, q.device), -torch.inf)
    else:
        offset = places.offsets(j - i)
        for side in (None if lo is None else offset < lo, None if hi is None else offset > hi):
            s = s if side is None else s.masked_fill(side, -torch.inf)
    if hidden is not None:
        s = s.masked_fill(hidden[:, None, None], -torch.inf)
    if rows is not None:
        s = s.masked_fill(~rows[:, None, :, None], -torch.inf)

    # Rows that see no key: the maximum is -inf and the sum 0; both are replaced before they can make a NaN.
    top = s.detach().amax(-1, keepdim=True) if N else s.new_full((batch, H, M, 1), -torch.inf)
    if sink is not None:
        sink = sink.to(dtype)[:, None, None]
        top = torch.maximum(top, sink.detach())
    finite = top.masked_fill(top == -torch.inf, 0.0)
    e = torch.exp(s - finite)
    total = e.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - finite)
    seen = total > 0
    safe = total.masked_fill(~seen, 1.0)
    p = e / safe
    if dropout_p:
        assert dropout_seed is not None
        p = p * keep_mask(dropout_seed, dropout_p, batch, H, slice(0, M), slice(0, N), first_entry) * rescale(dropout_p)
    out = torch.einsum("bhmn,bnhd->bmhd", p, v)
    lse = (finite + torch.log(safe)).masked_fill(~seen, -torch.inf).squeeze(-1)
    if rows is not None:
        out, lse = out.masked_fill(~rows[..., None, None], 0.0), lse.masked_fill(~rows[:, None], -torch.inf)
    return out, lse
