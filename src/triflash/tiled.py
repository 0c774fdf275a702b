"""The CPU backend: flash attention in plain PyTorch, one tile of scores at a time. Torch only; called by ``launch/``.

It runs on any device and in float64, and it is the executable specification of the Triton kernels: the same recurrences, tile by tile,
for all heads of a batch at once. Memory beyond inputs and outputs is O(M + N) per head (backward: a float32 accumulator each for dq
and dbias where they are narrower).

Method: FlashAttention (Dao et al. 2022), FlashAttention-2 (Dao 2023).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_LOG2E, _LN2 = 1.4426950408889634, 0.6931471805599453
_LEAST_BIAS = -torch.finfo(torch.float32).max / _LOG2E  # below it a bias counts as -inf: see oracle.py

__all__ = ["backward", "forward", "tile_size"]

_TILE_BYTES = 16 * 2**20  # one tile of scores over all heads: large enough for efficient products, small enough to stay near the caches


def tile_size(batch_heads: int) -> int:
    """Rows and columns of a score tile: a power of two in [16, 512] that keeps ``batch_heads`` float32 tiles within a fixed budget."""
    size = 512
    while size > 16 and batch_heads * size * size * 4 > _TILE_BYTES:
        size //= 2
    return size


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *,
    batch_inner: int,
    lo: int | None,
    hi: int | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    rest: Tensor | None = None,
    tile: int | None = None,
) -> None:
    """Fill ``out (B, M, H, Dv)``, ``lse (B, H, M)`` and, if given, ``rest (B, H, M)``: what a float32 lse lost of a huge one.
    Arguments as in :func:`triflash.oracle.attention`, bias canonical (5 dims).

    Owns ``tile`` query rows of every head at a time and walks the key tiles that they can see:
    ``m' = max(m, rowmax s); l' = l 2^(m-m') + rowsum 2^(s-m'); acc' = acc 2^(m-m') + 2^(s-m') v``, scores in base 2.
    """
    batch, M, H, _ = q.shape
    N = k.shape[1]
    math = _arithmetic(q)
    tile = tile or tile_size(batch * H)
    for rows in _slices(0, M, tile):
        q_tile = _heads_first(q, rows, math)  # [B, H, BM, D]
        m = torch.full((*q_tile.shape[:3], 1), -torch.inf, dtype=math, device=q.device)
        l = torch.zeros_like(m)
        acc = q_tile.new_zeros(*q_tile.shape[:3], v.shape[3])
        for cols in _visible_slices(rows, N, lo, hi, tile):
            s = _scores(q_tile, _heads_first(k, cols, math), bias, batch_inner, rows, cols, lo, hi, scale)  # [B, H, BM, BN]
            m_new = torch.maximum(m, s.amax(-1, keepdim=True))
            m_safe = m_new.masked_fill(m_new == -torch.inf, 0.0)  # a row that has seen nothing yet: 2^(-inf - 0) = 0, never NaN
            p = torch.exp2(s.sub_(m_safe))
            shrink = torch.exp2(m - m_safe)
            l = l * shrink + p.sum(-1, keepdim=True)
            acc = acc * shrink + p @ _heads_first(v, cols, math)
            m = m_new
        unseen = l == 0
        l = l.masked_fill(unseen, 1.0)
        out[:, rows] = (acc / l).transpose(1, 2)
        row_lse = ((m + l.log2()) * _LN2).masked_fill(unseen, -torch.inf)
        lse[:, :, rows] = row_lse.squeeze(-1)
        if rest is not None:
            rest[:, :, rows] = ((m - row_lse * _LOG2E) + l.log2()).masked_fill(unseen, 0.0).squeeze(-1)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rest: Tensor | None = None,
    *,
    batch_inner: int,
    lo: int | None,
    hi: int | None,
    scale: float,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dbias: Tensor | None,
    tile: int | None = None,
) -> None:
    """Fill those of ``dq, dk, dv, dbias`` that are given; what is None is not computed. dbias has the canonical bias's own shape.

    With ``p = 2^(s - lse - rest)`` in base 2 and ``delta = rowsum(out * dout) - dlse``:
    ``dv = pᵀ dout``, ``ds = p * (dout vᵀ - delta)``, ``dk = scale dsᵀ q``, ``dq = scale ds k``, ``dbias = ds`` summed over broadcast dims.
    """
    batch, M, H, _ = q.shape
    N = k.shape[1]
    math = _arithmetic(q)
    tile = tile or tile_size(batch * H)
    need_ds = dq is not None or dk is not None or dbias is not None
    dq_sum, dbias_sum = (None if x is None else x.zero_() if x.dtype == math else torch.zeros_like(x, dtype=math) for x in (dq, dbias))
    delta = torch.zeros_like(lse)
    for rows in _slices(0, M, tile):
        delta[:, :, rows] = (_heads_first(out, rows, math) * _heads_first(dout, rows, math)).sum(-1)
    if dlse is not None:
        delta -= dlse
    # p is 2^(s - lse): a row that saw no key gets +inf here, so that its p is 0 and its gradients vanish.
    lse_log2 = (lse * _LOG2E).masked_fill(lse == -torch.inf, torch.inf)

    for cols in _slices(0, N, tile):
        k_tile, v_tile = _heads_first(k, cols, math), _heads_first(v, cols, math)
        dk_tile, dv_tile = torch.zeros_like(k_tile), torch.zeros_like(v_tile)
        for rows in _visible_slices(cols, M, _negated(hi), _negated(lo), tile):
            q_tile, do_tile = _heads_first(q, rows, math), _heads_first(dout, rows, math)
            s = _scores(q_tile, k_tile, bias, batch_inner, rows, cols, lo, hi, scale)
            s.sub_(lse_log2[:, :, rows, None])
            if rest is not None:
                s.sub_(rest[:, :, rows, None])
            p = torch.exp2(s.clamp_(max=0.0))  # [B, H, BM, BN]; at most 1 also where a huge lse was rounded and its rest not kept
            if dv is not None:
                dv_tile += p.transpose(2, 3) @ do_tile
            if not need_ds:
                continue
            ds = (do_tile @ v_tile.transpose(2, 3)).sub_(delta[:, :, rows, None]).mul_(p)
            if dk is not None:
                dk_tile += ds.transpose(2, 3) @ q_tile
            if dq_sum is not None:
                dq_sum[:, rows] += (ds @ k_tile).transpose(1, 2)
            if dbias_sum is not None:
                part = _bias_tile(dbias_sum, rows, cols)
                part += ds.unflatten(0, (batch // batch_inner, batch_inner)).sum_to_size(part.shape)
        if dk is not None:
            dk[:, cols] = (dk_tile * scale).transpose(1, 2)
        if dv is not None:
            dv[:, cols] = dv_tile.transpose(1, 2)
    if dq is not None and dq_sum is not None:
        dq.copy_(dq_sum.mul_(scale))
    if dbias is not None and dbias_sum is not None and dbias_sum is not dbias:
        dbias.copy_(dbias_sum)


def _arithmetic(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _heads_first(x: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """``(B, L, H, D)`` -> the rows of it as ``[B, H, rows, D]`` in ``dtype``."""
    return x[:, rows].transpose(1, 2).to(dtype)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for at in range(start, stop, size):
        yield slice(at, min(at + size, stop))


def _negated(bound: int | None) -> int | None:
    return None if bound is None else -bound


def _visible_slices(own: slice, length: int, lo: int | None, hi: int | None, size: int) -> Iterator[slice]:
    """Tiles of the other axis (``length`` long) of which something lies in the band ``lo <= other - own <= hi`` of the rows ``own``."""
    first = 0 if lo is None else max(0, own.start + lo) // size * size
    last = length if hi is None else min(length, own.stop + hi)
    return _slices(first, last, size)


def _bias_tile(bias: Tensor, rows: slice, cols: slice) -> Tensor:
    """The part of a canonical 5-dim bias that a tile of scores needs, broadcast dims left at size 1."""
    if bias.shape[3] > 1:
        bias = bias[:, :, :, rows]
    return bias[..., cols] if bias.shape[4] > 1 else bias


def _scores(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    batch_inner: int,
    rows: slice,
    cols: slice,
    lo: int | None,
    hi: int | None,
    scale: float,
) -> Tensor:
    """Scaled, biased, masked scores of one tile in base 2: ``[B, H, BM, BN]``."""
    s = (q @ k.transpose(2, 3)).mul_(scale * _LOG2E)
    if bias is not None:
        split = s.unflatten(0, (s.shape[0] // batch_inner, batch_inner))
        part = _bias_tile(bias, rows, cols)
        if bias.dtype == torch.bool:
            split.masked_fill_(~part, -torch.inf)
        else:
            part = part.to(s.dtype)
            split.add_(part.masked_fill(part < _LEAST_BIAS, -torch.inf), alpha=_LOG2E)
    crosses_hi = hi is not None and cols.stop - 1 - rows.start > hi
    crosses_lo = lo is not None and cols.start - (rows.stop - 1) < lo
    if crosses_hi or crosses_lo:
        i = torch.arange(rows.start, rows.stop, device=s.device)[:, None]
        offset = torch.arange(cols.start, cols.stop, device=s.device)[None, :] - i
        if hi is not None:
            s.masked_fill_(offset > hi, -torch.inf)
        if lo is not None:
            s.masked_fill_(offset < lo, -torch.inf)
    return s
