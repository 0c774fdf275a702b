"""What turns products into scores and hides some of them, for every kernel alike; a score's derivative stands beside it.

Scores are in base 2. ``None`` stands for an absent feature and compiles its branch away. A function that has nothing to return for one
returns a number that nobody reads. Called by the portable kernels.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .prims import LOG2E, add_bias, between, clamped, offset, stride_in_tile
from .records import record

ROUNDS: tl.constexpr = tl.constexpr(7)  # of Philox, and its constants below: as dropout.py


class Features(NamedTuple):
    """Everything beyond q, k, v and a band; a field is None where the feature is absent.

    Strides of biases and mask are (outer batch, inner batch, head, row, column); row and column are None where all rows or columns share
    one value. second: another bias, beside the first. bias_by_query and so on: by what a sequence's first query, or its first key, moves a
    bias or mask that is packed as these are; else None. most_queries, most_keys: of the sequence, behind which bias or mask have none, so
    that nothing is visible. A mask is bytes, nonzero = visible. lengths: keys that each batch entry shows, any integers. slopes: by
    (batch, head), and sink: by head, any floats. softcap: a float. seed: int64, (seed, offset) of dropout; threshold: of a 15-bit random
    number, below which a probability is drop; rescale: what the others are multiplied by. dropout_placed: behind the offset stand the first
    query, key and head, and the number of heads, of the larger problem that this is a part of.

    query_starts, query_lengths, key_starts: the first query, the queries up to the last one, and the first key of each batch entry, any
    integers; placed: 1 if there is one of them. diagonals: the key at distance 0 from query 0 of each batch entry, which bands count from,
    too; shift: the same for all, and for ALiBi alone. Without: N - M.
    """

    bias: Any = None
    bias_strides: Any = None
    bias_by_query: Any = None
    bias_by_key: Any = None
    second: Any = None
    second_strides: Any = None
    second_by_query: Any = None
    second_by_key: Any = None
    mask: Any = None
    mask_strides: Any = None
    mask_by_query: Any = None
    mask_by_key: Any = None
    most_queries: Any = None
    most_keys: Any = None
    lengths: Any = None
    lengths_stride: Any = None
    slopes: Any = None
    slope_strides: Any = None
    sink: Any = None
    sink_stride: Any = None
    softcap: Any = None
    seed: Any = None
    threshold: Any = None
    rescale: Any = None
    placed: Any = None
    query_starts: Any = None
    query_starts_stride: Any = None
    query_lengths: Any = None
    query_lengths_stride: Any = None
    key_starts: Any = None
    key_starts_stride: Any = None
    diagonals: Any = None
    diagonals_stride: Any = None
    shift: Any = None
    dropout_placed: Any = None


@triton.jit
def visible_keys(f, b, N):
    """How many keys batch entry b shows, of N."""
    if f.lengths is not None:
        return clamped(tl.load(f.lengths + offset(b, f.lengths_stride)), N)
    elif f.most_keys is not None:
        return tl.minimum(N, f.most_keys)
    else:
        return N


@triton.jit
def visible_queries(f, M):
    """Of M queries of a sequence those that see anything."""
    if f.most_queries is not None:
        return tl.minimum(M, f.most_queries)
    else:
        return M


@record
class Program:
    """What is the same for all blocks of a program: lengths, band and scale, and how tiles are made.

    first_query, first_key: before which there are none, and then M is how many queries there are up to the last one; diagonal: the key at
    distance 0 from query 0, to ALiBi. None: 0, 0 and N - M.
    """

    M: object
    N: object
    lo: object
    hi: object
    scale: object
    BM: tl.constexpr
    BN: tl.constexpr
    D: tl.constexpr
    DV: tl.constexpr
    BD: tl.constexpr
    BDV: tl.constexpr
    EVEN_M: tl.constexpr
    EVEN_N: tl.constexpr
    PRECISION: tl.constexpr
    WIDE: tl.constexpr
    first_query: object
    first_key: object
    diagonal: object


@record
class Head:
    """What the features are for one query head of one batch entry: where its biases and its mask begin, its slope in base 2, the key and
    twist of its random numbers, and the first query and key of a part.
    """

    bias: object
    second: object
    mask: object
    slope: object
    key: object
    twist: object
    query0: object
    key0: object


@triton.jit
def at_head(f, b, head, heads, batch_inner, first_query, first_key):
    """The record of a query head, for the functions below. first_query, first_key: of ``extent.Extent``."""
    bias = 0
    second = 0
    mask = 0
    slope = 0.0
    key = 0
    twist = 0
    query0 = 0
    key0 = 0
    b0 = b // batch_inner
    b1 = b % batch_inner
    if f.bias is not None:
        bias = f.bias + offset(b0, f.bias_strides[0]) + offset(b1, f.bias_strides[1]) + offset(head, f.bias_strides[2])
        if f.bias_by_query is not None:
            bias += offset(first_query, f.bias_by_query)
        if f.bias_by_key is not None:
            bias += offset(first_key, f.bias_by_key)
    if f.second is not None:
        second = f.second + offset(b0, f.second_strides[0]) + offset(b1, f.second_strides[1]) + offset(head, f.second_strides[2])
        if f.second_by_query is not None:
            second += offset(first_query, f.second_by_query)
        if f.second_by_key is not None:
            second += offset(first_key, f.second_by_key)
    if f.mask is not None:
        mask = f.mask + offset(b0, f.mask_strides[0]) + offset(b1, f.mask_strides[1]) + offset(head, f.mask_strides[2])
        if f.mask_by_query is not None:
            mask += offset(first_query, f.mask_by_query)
        if f.mask_by_key is not None:
            mask += offset(first_key, f.mask_by_key)
    if f.slopes is not None:
        slope = tl.load(f.slopes + offset(b, f.slope_strides[0]) + offset(head, f.slope_strides[1])).to(tl.float32) * LOG2E
    if f.seed is not None:
        seed = tl.load(f.seed)
        start = tl.load(f.seed + 1)
        if f.dropout_placed is not None:
            query0 = tl.load(f.seed + 2).to(tl.int32)
            key0 = tl.load(f.seed + 3).to(tl.int32)
            pair = tl.cast(b * tl.load(f.seed + 5) + tl.load(f.seed + 4) + head, tl.uint32)
        else:
            pair = tl.cast(b * heads + head, tl.uint32)
        key, twist, _c, _d = tl.philox_impl(
            pair,
            tl.zeros_like(pair),
            start.to(tl.uint32),
            (start >> 32).to(tl.uint32),
            seed.to(tl.uint32),
            (seed >> 32).to(tl.uint32),
            ROUNDS,
        )
    return Head(bias, second, mask, slope, key, twist, query0, key0)


@record
class Span:
    """Queries, or keys, that there are: those from first up to end; None: from 0."""

    first: object
    end: object


@triton.jit
def bias_tile(f, at, m0, n0, i, j, rows, cols, MASK_M: tl.constexpr, MASK_N: tl.constexpr, WIDE: tl.constexpr):
    """The bias of the tile at ``(m0, n0)``, or the sum of two, size 1 along dims that it broadcasts; 0 outside the spans of queries and
    keys.

    ``i``, ``j`` are positions in the tile, shaped to broadcast: ``[BM, 1], [1, BN]`` for a tile of scores, ``[1, BM], [BN, 1]`` for a
    transposed one.
    """
    if f.bias is not None:
        LEAST_M: tl.constexpr = MASK_M or f.most_queries is not None
        LEAST_N: tl.constexpr = MASK_N or f.most_keys is not None
        rows = Span(rows.first, visible_queries(f, rows.end))
        if f.most_keys is not None:
            cols = Span(cols.first, tl.minimum(cols.end, f.most_keys))
        bias = _tile(at.bias, f.bias_strides[3], f.bias_strides[4], m0, n0, i, j, rows, cols, LEAST_M, LEAST_N, WIDE)
        if f.second is not None:
            second = _tile(at.second, f.second_strides[3], f.second_strides[4], m0, n0, i, j, rows, cols, LEAST_M, LEAST_N, WIDE)
            bias = bias.to(tl.float32) + second.to(tl.float32)
        return bias
    else:
        return 0.0


@triton.jit
def mask_tile(f, at, m0, n0, i, j, M, N, MASK_M: tl.constexpr, MASK_N: tl.constexpr, WIDE: tl.constexpr):
    """The mask of the tile at ``(m0, n0)``, nonzero = visible, of the first M queries and N keys; as ``bias_tile``."""
    if f.mask is not None:
        LEAST_M: tl.constexpr = MASK_M or f.most_queries is not None
        LEAST_N: tl.constexpr = MASK_N or f.most_keys is not None
        M = visible_queries(f, M)
        if f.most_keys is not None:
            N = tl.minimum(N, f.most_keys)
        rows = Span(None, M)
        cols = Span(None, N)
        return _tile(at.mask, f.mask_strides[3], f.mask_strides[4], m0, n0, i, j, rows, cols, LEAST_M, LEAST_N, WIDE)
    else:
        return 1


@triton.jit
def _tile(base, row_stride, col_stride, m0, n0, i, j, rows, cols, MASK_M: tl.constexpr, MASK_N: tl.constexpr, WIDE: tl.constexpr):
    pointers = base
    VARIES_M: tl.constexpr = row_stride is not None
    VARIES_N: tl.constexpr = col_stride is not None
    if VARIES_M:
        pointers = pointers + offset(m0, row_stride) + i * stride_in_tile(row_stride, WIDE)
    if VARIES_N:
        pointers = pointers + offset(n0, col_stride) + j * stride_in_tile(col_stride, WIDE)
    if VARIES_M and MASK_M:
        if VARIES_N and MASK_N:
            there = between(m0 + i, rows.end, rows.first) & between(n0 + j, cols.end, cols.first)
            return tl.load(pointers, mask=there, other=0)
        else:
            return tl.load(pointers, mask=between(m0 + i, rows.end, rows.first), other=0)
    else:
        if VARIES_N and MASK_N:
            return tl.load(pointers, mask=between(n0 + j, cols.end, cols.first), other=0)
        else:
            return tl.load(pointers)


@triton.jit
def shows_anything(mask):
    """Whether a tile of a mask that varies over queries and keys shows any key to any query: if not, it is not worth its products."""
    return tl.max(mask.to(tl.int32)) > 0


@triton.jit
def tanh(x):
    """To a few units in the last place, near 0 too: a soft cap multiplies its error. Cephes' tanhf; rational in exp beyond 0.625."""
    z = x * x
    p = ((((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z - 3.33332819422e-1) * z
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(2.0 * LOG2E * size) + 1.0)
    return tl.where(size < 0.625, p * x + x, tl.where(x < 0, -far, far))


@triton.jit
def _multiplied(x, factor, ROUNDED: tl.constexpr):
    if ROUNDED:
        return tl.fma(x, factor, 0.0)
    else:
        return x * factor


@triton.jit
def scored(p, f, at, products, bias, mask, m0, n0, i, j, ROUNDED: tl.constexpr):
    """Of a tile of products q kᵀ: the scores that its bias and mask leave, and (soft cap) their derivative by ``scale * products``.

    ROUNDED: a subtraction behind them does not melt into one instruction with
    the last multiplication, so that forward and backward passes have the same scores, however huge. N is the number of keys that there are,
    to which ALiBi's diagonal is aligned, not that of the keys that are visible.
    """
    slope = products
    if f.softcap is not None:
        t = tanh(products * (p.scale / f.softcap))
        s = _multiplied(t, f.softcap * LOG2E, ROUNDED and f.bias is None and f.slopes is None)
        slope = 1.0 - t * t
    else:
        s = _multiplied(products, p.scale * LOG2E, ROUNDED and f.bias is None and f.slopes is None)
    # Explicit fused products, so that forward and backward passes round a huge score alike: see `prims.probabilities`.
    if f.bias is not None:
        s = add_bias(s, bias)
    if f.slopes is not None:
        if p.diagonal is not None:
            distance = tl.abs((m0 + p.diagonal - n0) + (i - j)).to(tl.float32)
        else:
            distance = tl.abs((m0 + p.N - p.M - n0) + (i - j)).to(tl.float32)
        s = tl.fma(distance, -at.slope, s)
    if f.mask is not None:
        s = tl.where(mask != 0, s, float("-inf"))
    if f.most_queries is not None:
        s = tl.where(m0 + i < f.most_queries, s, float("-inf"))
    return s, slope


@triton.jit
def through_cap(f, ds, slope):
    """The gradient of ``scale * products`` from that of the scores."""
    if f.softcap is not None:
        return ds * slope
    else:
        return ds


@triton.jit
def drop(f, at, x, m0, n0, BM: tl.constexpr, BN: tl.constexpr, TRANSPOSED: tl.constexpr):
    """What dropout leaves of a tile ``[BM, BN]`` (TRANSPOSED: ``[BN, BM]``), not rescaled.

    The keep-mask is a function of (seed, offset, batch entry, head, query, key), the same as ``triflash.dropout.keep_mask``.
    """
    if f.seed is not None:
        if f.dropout_placed is not None:
            n0 += at.key0
            m0 += at.query0
        keys = (n0 + tl.arange(0, BN)).to(tl.uint32)
        queries = (m0 + tl.arange(0, BM)).to(tl.uint32)
        if TRANSPOSED:
            keys, queries = keys[:, None], queries[None, :]
        else:
            keys, queries = keys[None, :], queries[:, None]
        return drop_at(f, at, x, queries, keys)
    else:
        return x


@triton.jit
def drop_at(f, at, x, queries, keys):
    """The same of scores of any queries and keys, unsigned numbers shaped to broadcast, whose heads may differ by row."""
    if f.seed is not None:
        key = at.key
        c0, c1 = tl.broadcast(keys & 0xFFFFFFF7, (queries & 0xFFFFFFF7) ^ at.twist)
        for _ in tl.static_range(ROUNDS):
            wide_product = c0.to(tl.uint64) * 0xD256D193
            c0, c1 = (wide_product >> 32).to(tl.uint32) ^ key ^ c1, wide_product.to(tl.uint32)
            key = tl.add(key, 0x9E3779B9, sanitize_overflow=False)  # which TRITON_DEBUG would stop at
        number = tl.where((queries & 8) == 0, c0, c1) << (17 - (keys & 8) * 2)  # its 15 bits uppermost; those below do not matter
        return tl.where(number >= (tl.cast(f.threshold, tl.uint32) << 17), x, 0.0)
    else:
        return x


@triton.jit
def rescaled(f, x):
    """``x`` times what dropout multiplies the probabilities by that it keeps."""
    if f.seed is not None:
        return x * f.rescale
    else:
        return x
