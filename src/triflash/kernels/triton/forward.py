"""The forward kernel. Launched by ``launch/triton.py`` and ``launch/packed.py``, through ``launch/portable.py``."""

import triton
import triton.language as tl

from .extent import diagonal, of_program, placed_diagonal, placed_keys, placed_queries, statistics
from .features import (
    Program,
    Span,
    at_head,
    bias_tile,
    drop,
    mask_tile,
    rescaled,
    scored,
    shows_anything,
    visible_keys,
)
from .prims import LN2, LOG2E, SMALL_MAXIMUM, in_band, is_small, load_rows, locate, lse_rest, offset, segments, store_rows
from .records import record


@record
class Tile:
    """BM queries of one head, from m0 on: q, a tile, and where its keys and values lie, ``visible`` of them; at: ``features.at_head``."""

    q: object
    k: object
    v: object
    k_row: object
    v_row: object
    at: object
    m0: object
    visible: object


@triton.jit
def _fold(acc, l, m, p, t, f, seen, n0, i, j, LATE: tl.constexpr, MASKED: tl.constexpr):
    """Fold one key block into the running (acc, l, m). ``seen`` is its tile of the mask.

    LATE: scores are scaled after their maximum was taken, which saves a product for each of them, but rounds otherwise than the backward
    kernels.
    """
    k_tile = load_rows(t.k, t.k_row, n0, t.visible, p.BN, p.D, p.BD, MASKED, p.WIDE, p.first_key)
    s = tl.dot(t.q, tl.trans(k_tile), input_precision=p.PRECISION)  # [BM, BN]
    if not LATE:
        rows = Span(p.first_query, p.M)
        cols = Span(p.first_key, t.visible)
        bias = bias_tile(f, t.at, t.m0, n0, i, j, rows, cols, not p.EVEN_M, MASKED, p.WIDE)
        s, _ = scored(p, f, t.at, s, bias, seen, t.m0, n0, i, j, True)
    if MASKED:
        s = tl.where(in_band(t.m0 + i, n0 + j, t.visible, p.lo, p.hi, p.first_key), s, float("-inf"))
    top = tl.max(s, 1)
    if LATE:
        top = top * (p.scale * LOG2E)
    m_new = tl.maximum(m, top)
    if MASKED or f.bias is not None or f.mask is not None:
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key yet: 2^(-inf - 0) = 0, never NaN
    else:
        m_safe = m_new
    if LATE:
        weights = tl.exp2(s * (p.scale * LOG2E) - m_safe[:, None])
    else:
        weights = tl.exp2(s - m_safe[:, None])
    shrink = tl.exp2(m - m_safe)
    l = l * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    v_tile = load_rows(t.v, t.v_row, n0, t.visible, p.BN, p.DV, p.BDV, MASKED, p.WIDE, p.first_key)
    weights = drop(f, t.at, weights, t.m0, n0, p.BM, p.BN, False)
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision=p.PRECISION)
    return acc, l, m_new


@triton.jit
def _walk(acc, l, m, p, t, f, begin, end, LATE: tl.constexpr, MASKED: tl.constexpr, RARE: tl.constexpr):
    """Fold the key blocks ``[begin, end)`` into the running (acc, l, m); ``MASKED`` where some query does not see some key. RARE: with
    as few registers as can be.
    """
    i = tl.arange(0, p.BM)[:, None]
    j = tl.arange(0, p.BN)[None, :]
    # A branch keeps the compiler from loading ahead: it is worth that only for a mask that hides blocks, of queries and keys.
    if f.mask is not None:
        SKIPS: tl.constexpr = f.mask_strides[3] is not None and f.mask_strides[4] is not None
    else:
        SKIPS: tl.constexpr = False
    for block in tl.range(begin, end, num_stages=1 if RARE else None):
        n0 = block * p.BN
        seen = mask_tile(f, t.at, t.m0, n0, i, j, p.M, t.visible, not p.EVEN_M, MASKED, p.WIDE)
        if SKIPS:
            if shows_anything(seen):
                acc, l, m = _fold(acc, l, m, p, t, f, seen, n0, i, j, LATE, MASKED)
        else:
            acc, l, m = _fold(acc, l, m, p, t, f, seen, n0, i, j, LATE, MASKED)
    return acc, l, m


@triton.jit
def forward(
    q, k, v, f, out, lse, rest, q_strides, k_strides, v_strides, out_strides, lse_strides,
    batch, heads, groups, batch_inner, M, N, lo, hi, scale, packed,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    POSITIVE_SCALE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """One program owns BM queries of one head and walks the keys that they can see.

    m, l, acc: running row maximum, row sum and unnormalised output, in base 2:
        m' = max(m, rowmax s);  l' = l 2^(m - m') + rowsum 2^(s - m');  acc' = acc 2^(m - m') + 2^(s - m') v
    and at the end out = acc / l, lse = (m + log2 l) ln 2, rest = what that float32 does not hold (``prims.lse_rest``). A sink is where m
    and l begin: m = sink, l = 1. Dropout takes from acc, not from l.

    Strides are (batch, row, head), of lse (batch, head); rest is contiguous. f: ``features.Features``. ``groups`` query heads read the same
    key head. None: no such bound, not wanted. EVEN_M, EVEN_N: the length is a whole number of tiles.

    packed: see ``extent.py``; then ``batch`` is the most tiles that a head can have, lo and hi count from a sequence's diagonal, and
    where a stride counts batch entries it counts rows.
    """
    all_queries = M
    if packed is None:
        tile, head, b = locate(tl.cdiv(M, BM), heads, batch, ORDER, hi is not None)
        first_query = b
        first_key = b
    else:
        e = of_program(packed, batch, BM, False, hi is not None)
        tile, head, b, first_query, M, first_key, N = e.tile, e.head, e.sequence, e.first_query, e.queries, e.first_key, e.keys
        if lo is not None:
            lo += diagonal(packed, M, N)
        if hi is not None:
            hi += diagonal(packed, M, N)
    here = M  # rows of out, lse and rest
    first_row = None
    first_col = None
    shift = None
    if f.placed is not None or f.diagonals is not None or f.shift is not None:
        shift = placed_diagonal(f, b, M, N)
    if f.diagonals is not None:
        if lo is not None:
            lo += shift
        if hi is not None:
            hi += shift
    if f.placed is not None:
        first_row, M = placed_queries(f, b, M)
        first_col = placed_keys(f, b, N)
    m0 = tile * BM
    q += offset(first_query, q_strides[0]) + offset(head, q_strides[2])
    k += offset(first_key, k_strides[0]) + offset(head // groups, k_strides[2])
    v += offset(first_key, v_strides[0]) + offset(head // groups, v_strides[2])
    out += offset(first_query, out_strides[0]) + offset(head, out_strides[2])
    lse += offset(first_query, lse_strides[0]) + offset(head, lse_strides[1])
    at = at_head(f, b, head, heads, batch_inner, first_query, first_key)
    visible = visible_keys(f, b, N)

    q_tile = load_rows(q, q_strides[1], m0, M, BM, D, BD, not EVEN_M, WIDE, first_row)  # [BM, BD]
    p = Program(M, N, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_M, EVEN_N, PRECISION, WIDE, first_row, first_col, shift)
    t = Tile(q_tile, k, v, k_strides[1], v_strides[1], at, m0, visible)
    if f.sink is not None:
        m = tl.zeros([BM], tl.float32) + tl.load(f.sink + head * f.sink_stride).to(tl.float32) * LOG2E
        l = tl.full([BM], 1.0, tl.float32)
    else:
        m = tl.full([BM], float("-inf"), tl.float32)
        l = tl.zeros([BM], tl.float32)
    start = m
    acc = tl.zeros([BM, BDV], tl.float32)
    # What is added or capped, or a scale that is not positive, must come before the maximum.
    LATE: tl.constexpr = POSITIVE_SCALE and f.bias is None and f.slopes is None and f.softcap is None and f.mask is None
    first = m0
    seen = visible
    if f.placed is not None:
        first = max(m0, first_row)
        seen = tl.where((first < min(m0 + BM, M)) & (first_col < visible), visible, 0)
    begin, full_begin, full_end, end = segments(first, min(m0 + BM, M) - 1, seen, lo, hi, BN, first_col)
    if lo is not None or f.placed is not None:
        acc, l, m = _walk(acc, l, m, p, t, f, begin, full_begin, LATE, True, False)
    acc, l, m = _walk(acc, l, m, p, t, f, full_begin, full_end, LATE, False, False)
    if hi is not None or not EVEN_N or f.lengths is not None or f.most_keys is not None or f.placed is not None:
        acc, l, m = _walk(acc, l, m, p, t, f, full_end, end, LATE, True, False)
    if LATE:  # once more where that was too coarse
        small = is_small(m, SMALL_MAXIMUM)
        acc = tl.where(small, acc, 0.0)
        l = tl.where(small, l, 0.0 if f.sink is None else 1.0)
        m = tl.where(small, m, start)
        acc, l, m = _walk(acc, l, m, p, t, f, begin, tl.where(small, begin, end), False, True, True)

    unseen = l == 0.0
    if f.placed is not None:
        i = m0 + tl.arange(0, BM)
        unseen = unseen | (i < first_row) | (i >= M)  # no rows, a sink or not
        acc = tl.where(unseen[:, None], 0.0, acc)
    l = tl.where(unseen, 1.0, l)
    acc = rescaled(f, acc / l[:, None])
    store_rows(out, out_strides[1], m0, here, acc, BM, DV, BDV, not EVEN_M, WIDE)
    row_lse = tl.where(unseen, float("-inf"), (m + tl.log2(l)) * LN2)
    rows = m0 + tl.arange(0, BM)
    tl.store(lse + rows, row_lse, mask=rows < here)
    if rest is not None:
        tl.store(
            statistics(rest, b, head, heads, all_queries, first_query, packed is not None) + rows, lse_rest(m, l, row_lse), mask=rows < here
        )
