"""The CPU backend: flash attention in plain PyTorch, one tile of scores at a time. Torch only; called by ``launch/``.

It runs on any device and in float64, and it is the executable specification of the Triton kernels: the same recurrences, tile by tile,
for all heads of a batch at once. Memory beyond inputs and outputs is O(M + N) per head (backward: a float32 accumulator each for dq
and dbias where they are narrower).

Method: FlashAttention (Dao et al. 2022), FlashAttention-2 (Dao 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .dropout import keep_mask, rescale
from .lengths import Places, comparable
from .rest import join_rest, split_rest

_LOG2E, _LN2 = 1.4426950408889634, 0.6931471805599453
_LEAST_BIAS = -torch.finfo(torch.float32).max / _LOG2E  # below it a bias counts as -inf: see oracle.py

__all__ = ["Scores", "backward", "by_key_head", "by_query_head", "delta_of", "forward", "slices", "tile_size"]

_EVERYWHERE = Places()
_TILE_BYTES = 16 * 2**20  # one tile of scores over all heads: large enough for efficient products, small enough to stay near the caches


def tile_size(batch_heads: int) -> int:
    """Rows and columns of a score tile: a power of two in [16, 512] that keeps ``batch_heads`` float32 tiles within a fixed budget."""
    size = 512
    while size > 16 and batch_heads * size * size * 4 > _TILE_BYTES:
        size //= 2
    return size


@dataclass(frozen=True)
class Scores:
    """What makes scores of products, and hides some: as the arguments of :func:`triflash.oracle.attention`, bias and mask with
    5 dims.
    """

    bias: Tensor | None = None
    mask: Tensor | None = None
    key_lengths: Tensor | None = None
    alibi_slopes: Tensor | None = None
    dropout_seed: Tensor | None = None
    batch_inner: int = 1
    lo: int | None = None
    hi: int | None = None
    scale: float = 1.0
    softcap: float = 0.0
    dropout_p: float = 0.0
    first_entry: int = 0
    second_bias: Tensor | None = None
    places: Places = _EVERYWHERE

    @property
    def band(self) -> tuple[int | None, int | None]:
        """``(lo, hi)``, or nothing where every batch entry has a diagonal of its own."""
        return (self.lo, self.hi) if self.places.diagonal is None else (None, None)

    def tile(self, products: Tensor, rows: slice, cols: slice, queries: int, keys: int) -> tuple[Tensor, Tensor | None]:
        """Of the products ``[B, H, BM, BN]`` of one tile: its scores in base 2, and their derivative by ``scale * products`` (None: 1).

        queries, keys: M and N, from which the diagonal follows to which ALiBi is aligned.
        """
        slope = None
        if self.softcap:
            t = torch.tanh(products * (self.scale / self.softcap))
            s, slope = t * (self.softcap * _LOG2E), 1 - t * t
        else:
            s = products.mul_(self.scale * _LOG2E)
        split = s.unflatten(0, (s.shape[0] // self.batch_inner, self.batch_inner))
        for extra in (self.bias, self.second_bias, self.mask):
            if extra is None:
                continue
            part = _part(extra, rows, cols)
            if extra.dtype == torch.bool:
                split.masked_fill_(~part, -torch.inf)
            else:
                part = part.to(s.dtype)
                split.add_(part.masked_fill(part < _LEAST_BIAS, -torch.inf), alpha=_LOG2E)
        j = torch.arange(cols.start, cols.stop, device=s.device)
        crosses_hi = self.hi is not None and cols.stop - 1 - rows.start > self.hi
        crosses_lo = self.lo is not None and cols.start - (rows.stop - 1) < self.lo
        i = torch.arange(rows.start, rows.stop, device=s.device)
        if crosses_hi or crosses_lo or self.alibi_slopes is not None or self.places.diagonal is not None:
            offset = self.places.offsets(j - i[:, None])
            if self.alibi_slopes is not None:
                slopes = self.alibi_slopes.to(s.dtype)[..., None, None] * _LOG2E
                s.sub_(slopes * self.places.from_diagonal(j - i[:, None], queries, keys).abs().to(s.dtype))
            if self.hi is not None:
                s.masked_fill_(offset > self.hi, -torch.inf)
            if self.lo is not None:
                s.masked_fill_(offset < self.lo, -torch.inf)
        hidden, there = self._hidden(j), self.places.rows(i)
        if hidden is not None:
            s.masked_fill_(hidden[:, None, None], -torch.inf)
        if there is not None:
            s.masked_fill_(~there[:, None, :, None], -torch.inf)
        return s, slope

    def _hidden(self, j: Tensor) -> Tensor | None:
        """Which keys no query sees, ``(B, len(j))``; None: there are none such."""
        hidden = None
        if self.key_lengths is not None:
            hidden = j >= comparable(self.key_lengths)[:, None]
        if self.places.key_starts is not None:
            before = j < comparable(self.places.key_starts)[:, None]
            hidden = before if hidden is None else hidden | before
        return hidden

    def there(self, x: Tensor, rows: slice, value: float = 0.0) -> Tensor:
        """A tile of queries ``[B, H, BM, …]``, ``value`` where there are no rows."""
        seen = self.places.rows(torch.arange(rows.start, rows.stop, device=x.device))
        return x if seen is None else x.masked_fill(~seen.view(seen.shape[0], 1, -1, *[1] * (x.dim() - 3)), value)

    def shown(self, x: Tensor, cols: slice) -> Tensor:
        """A tile of keys or values ``[B, Hk, BN, D]``, hidden keys as zeros: they may hold anything, and 0 times that need not be 0."""
        hidden = self._hidden(torch.arange(cols.start, cols.stop, device=x.device))
        return x if hidden is None else x.masked_fill(hidden[:, None, :, None], 0.0)

    def dropped(self, x: Tensor, rows: slice, cols: slice) -> Tensor:
        """What dropout leaves of a tile, unscaled."""
        if not self.dropout_p:
            return x
        assert self.dropout_seed is not None
        return x * keep_mask(self.dropout_seed, self.dropout_p, x.shape[0], x.shape[1], rows, cols, self.first_entry)

    @property
    def rescale(self) -> float:
        """By what dropout multiplies the probabilities that it keeps."""
        return rescale(self.dropout_p)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Scores,
    sink: Tensor | None = None,
    *,
    out: Tensor,
    lse: Tensor,
    rest: Tensor | None = None,
    tile: int | None = None,
) -> None:
    """Fill ``out (B, M, Hq, Dv)``, ``lse (B, Hq, M)`` and, if given, ``rest (B, Hq, M)``: what a float32 lse lost of a huge one.

    q, k, v, sink as of :func:`triflash.oracle.attention`. Owns ``tile`` query rows of every head at a time and walks the key tiles that
    they can see: ``m' = max(m, rowmax s); l' = l 2^(m-m') + rowsum 2^(s-m'); acc' = acc 2^(m-m') + 2^(s-m') v``, scores in base 2.
    A sink is where m and l begin: ``m = sink, l = 1``.
    """
    batch, M, H, _ = q.shape
    N, kv_heads = k.shape[1:3]
    math = _arithmetic(q)
    tile = tile or tile_size(batch * H)
    for rows in slices(0, M, tile):
        q_tile = by_key_head(scores.there(_heads_first(q, rows, math), rows), kv_heads)  # [B, Hk, G * BM, D]
        m = torch.full((batch, H, rows.stop - rows.start, 1), -torch.inf, dtype=math, device=q.device)
        l = torch.zeros_like(m)
        if sink is not None:
            m, l = m.copy_(sink.to(math)[:, None, None] * _LOG2E), torch.ones_like(m)
        acc = m.new_zeros(*m.shape[:3], v.shape[3])
        for cols in _visible_slices(rows, N, *scores.band, tile):
            k_tile, v_tile = (scores.shown(_heads_first(x, cols, math), cols) for x in (k, v))
            products = by_query_head(q_tile @ k_tile.transpose(2, 3), H, rows)
            s, _ = scores.tile(products, rows, cols, M, N)  # [B, H, BM, BN]
            m_new = torch.maximum(m, s.amax(-1, keepdim=True))
            m_safe = m_new.masked_fill(m_new == -torch.inf, 0.0)  # a row that has seen nothing yet: 2^(-inf - 0) = 0, never NaN
            p = torch.exp2(s.sub_(m_safe))
            shrink = torch.exp2(m - m_safe)
            l = l * shrink + p.sum(-1, keepdim=True)
            p = by_key_head(scores.dropped(p, rows, cols), kv_heads)
            acc = acc * shrink + by_query_head(p @ v_tile, H, rows)
            m = m_new
        unseen = l == 0
        l = l.masked_fill(unseen, 1.0)
        out[:, rows] = scores.there(acc * scores.rescale / l, rows).transpose(1, 2)
        row_lse = scores.there(((m + l.log2()) * _LN2).masked_fill(unseen, -torch.inf), rows, -torch.inf)
        lse[:, :, rows] = row_lse.squeeze(-1)
        if rest is not None:
            lost = join_rest(m - row_lse * _LOG2E, l.log2()).masked_fill(row_lse == -torch.inf, 0.0)
            rest[:, :, rows] = lost.squeeze(-1)


def backward(
    dout: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Scores,
    lse: Tensor,
    rest: Tensor | None = None,
    *,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dbias: Tensor | None,
    dsecond: Tensor | None = None,
    tile: int | None = None,
) -> None:
    """Fill those of ``dq, dk, dv, dbias, dsecond`` that are given; what is None is not computed. dbias and dsecond have the shapes of the
    canonical biases.

    With ``p = 2^(s - lse - rest)`` in base 2 and ``delta = rowsum(out * dout) - dlse`` (:func:`delta_of`):
    ``dv = pᵀ dout``, ``ds = p * (dout vᵀ - delta)``, ``dk = scale dsᵀ q``, ``dq = scale ds k``, ``dbias = ds`` summed over broadcast dims.
    Dropout multiplies p of dv, and dout vᵀ, by what it keeps over 1 - p; a soft cap multiplies ds, but for dbias, by its derivative.
    """
    batch, M, H, _ = q.shape
    N, kv_heads = k.shape[1:3]
    math = _arithmetic(q)
    tile = tile or tile_size(batch * H)
    need_ds = dq is not None or dk is not None or dbias is not None or dsecond is not None
    dq_sum, *biases = (
        None if x is None else x.zero_() if x.dtype == math else torch.zeros_like(x, dtype=math) for x in (dq, dbias, dsecond)
    )
    # p is 2^(s - lse): a row that saw no key gets +inf here, so that its p is 0 and its gradients vanish.
    lse_log2 = (lse * _LOG2E).masked_fill(lse == -torch.inf, torch.inf)
    if rest is not None:
        off, rest = split_rest(rest)
        lse_log2 = lse_log2 + off

    for cols in slices(0, N, tile):
        k_tile, v_tile = (scores.shown(_heads_first(x, cols, math), cols) for x in (k, v))
        dk_tile, dv_tile = torch.zeros_like(k_tile), torch.zeros_like(v_tile)
        for rows in _visible_slices(cols, M, _negated(scores.band[1]), _negated(scores.band[0]), tile):
            own = (scores.there(_heads_first(x, rows, math), rows) for x in (q, dout))
            q_tile, do_tile = (by_key_head(x, kv_heads) for x in own)  # [B, Hk, G * BM, D]
            s, slope = scores.tile(by_query_head(q_tile @ k_tile.transpose(2, 3), H, rows), rows, cols, M, N)
            s.sub_(lse_log2[:, :, rows, None])
            if rest is not None:
                s.sub_(rest[:, :, rows, None])
            p = torch.exp2(s.clamp_(max=0.0))  # [B, H, BM, BN]; at most 1 also where a huge lse was rounded and its rest not kept
            if dv is not None:
                dv_tile += by_key_head(scores.dropped(p, rows, cols), kv_heads).transpose(2, 3) @ do_tile
            if not need_ds:
                continue
            dp = scores.dropped(by_query_head(do_tile @ v_tile.transpose(2, 3), H, rows), rows, cols)
            ds = dp.mul_(scores.rescale).sub_(delta[:, :, rows, None]).mul_(p)
            for total in biases:
                if total is not None:
                    part = _part(total, rows, cols)
                    part += ds.unflatten(0, (batch // scores.batch_inner, scores.batch_inner)).sum_to_size(part.shape)
            ds = by_key_head(ds if slope is None else ds.mul_(slope), kv_heads)
            if dk is not None:
                dk_tile += ds.transpose(2, 3) @ q_tile
            if dq_sum is not None:
                dq_sum[:, rows] += by_query_head(ds @ k_tile, H, rows).transpose(1, 2)
        if dk is not None:
            dk[:, cols] = (dk_tile * scores.scale).transpose(1, 2)
        if dv is not None:
            dv[:, cols] = (dv_tile * scores.rescale).transpose(1, 2)
    if dq is not None and dq_sum is not None:
        dq.copy_(dq_sum.mul_(scores.scale))
    for grad, total in zip((dbias, dsecond), biases, strict=True):
        if grad is not None and total is not None and total is not grad:
            grad.copy_(total)


def delta_of(out: Tensor, dout: Tensor, dlse: Tensor | None, tile: int = 512, scores: Scores | None = None) -> Tensor:
    """``rowsum(out * dout) - dlse`` as ``(B, H, M)``, float32 or float64; 0 where ``scores`` have no rows."""
    math = _arithmetic(out)
    delta = torch.zeros((out.shape[0], out.shape[2], out.shape[1]), dtype=math, device=out.device)
    for rows in slices(0, out.shape[1], tile):
        delta[:, :, rows] = (_heads_first(out, rows, math) * _heads_first(dout, rows, math)).sum(-1)
    delta = delta if dlse is None else delta.sub_(dlse)
    return delta if scores is None else scores.there(delta, slice(0, out.shape[1]))


def _arithmetic(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _heads_first(x: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """``(B, L, H, D)`` -> the rows of it as ``[B, H, rows, D]`` in ``dtype``."""
    return x[:, rows].transpose(1, 2).to(dtype)


def by_key_head(x: Tensor, kv_heads: int) -> Tensor:
    """``[B, Hq, rows, cols]`` -> ``[B, Hk, G * rows, cols]``: the G query heads of a key head one below the other, so that a product with
    the key head's tile, or a sum over queries, takes them all.
    """
    batch, heads, rows, cols = x.shape
    return x if heads == kv_heads else x.reshape(batch, kv_heads, heads // kv_heads * rows, cols)


def by_query_head(x: Tensor, heads: int, rows: slice) -> Tensor:
    """The inverse of :func:`by_key_head`. rows: of the queries, which x does not tell where there are no heads."""
    return x if heads == x.shape[1] else x.reshape(x.shape[0], heads, rows.stop - rows.start, x.shape[3])


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """Parts of a range, ``size`` long but for the last."""
    for at in range(start, stop, size):
        yield slice(at, min(at + size, stop))


def _negated(bound: int | None) -> int | None:
    return None if bound is None else -bound


def _visible_slices(own: slice, length: int, lo: int | None, hi: int | None, size: int) -> Iterator[slice]:
    """Tiles of the other axis (``length`` long) of which something lies in the band ``lo <= other - own <= hi`` of the rows ``own``."""
    first = 0 if lo is None else max(0, own.start + lo) // size * size
    last = length if hi is None else max(0, own.stop + hi)
    # Whole tiles, so that forward and backward passes ask for the same products, which a library may add up in an order for each shape:
    # where they are huge, p of the backward pass would else be another one.
    return slices(first, min(length, -(-last // size) * size), size)


def _part(bias: Tensor, rows: slice, cols: slice) -> Tensor:
    """The part of a canonical 5-dim bias or mask that a tile of scores needs, broadcast dims left at size 1."""
    if bias.shape[3] > 1:
        bias = bias[:, :, :, rows]
    return bias[..., cols] if bias.shape[4] > 1 else bias
