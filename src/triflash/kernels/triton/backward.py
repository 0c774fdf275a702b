"""The backward kernels that give dq, dk and dv, and the gradient of a bias where it falls out of these passes.

With ``p = 2^(s - lse)`` and ``delta = rowsum(out * dout) - dlse``:
    dv = pᵀ dout;   ds = p * (dout vᵀ - delta);   dk = scale dsᵀ q;   dq = scale ds k
where dropout multiplies p of dv, and dout vᵀ, by its keep-mask over 1 - p, and a soft cap multiplies ds by its derivative, but for dbias.
Two passes, each of which owns its output tile, so nothing is added atomically and results are bitwise reproducible. The pass for dq has
every tile of ds once, so it writes the gradient of a bias of full shape; the pass for dk and dv sums ds over all queries on its way, which
is the gradient of a bias that varies over keys only, unless query heads share a key head: those it walks one after the other, so that dk
and dv take no buffer per query head. All other biases have a kernel of their own (``dbias.py``). sᵀ and dpᵀ come
straight from ``k qᵀ`` and ``v doutᵀ``: no tile is transposed in registers (Triton 3.4 to 3.7 has miscompiled that on Hopper).
"""

import triton
import triton.language as tl

from .features import at_head, bias_tile, dropped, mask_tile, rescaled, scored, shows_anything, through_cap, visible_keys
from .prims import (
    LOG2E,
    MILDEST,
    heads_are_mild,
    in_band,
    is_mild,
    load_lse_log2,
    load_rows,
    load_vector,
    locate,
    offset,
    probabilities,
    segments,
    store_rows,
    store_tile,
)


@triton.jit
def delta(
    out, dout, dlse, delta_out, out_strides, dout_strides, dlse_strides, heads, M,
    BM: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program owns BM queries of one head: ``delta = rowsum(out * dout) - dlse``, written as contiguous (batch, head, query)."""
    tile, head, b = locate(tl.cdiv(M, BM), heads, 1, "tile", False)
    m0 = tile * BM
    out += offset(b, out_strides[0]) + offset(head, out_strides[2])
    dout += offset(b, dout_strides[0]) + offset(head, dout_strides[2])
    o_tile = load_rows(out, out_strides[1], m0, M, BM, DV, BDV, True, WIDE).to(tl.float32)
    do_tile = load_rows(dout, dout_strides[1], m0, M, BM, DV, BDV, True, WIDE).to(tl.float32)
    row = tl.sum(o_tile * do_tile, 1)
    rows = m0 + tl.arange(0, BM)
    if dlse is not None:
        dlse += offset(b, dlse_strides[0]) + offset(head, dlse_strides[1])
        row -= tl.load(dlse + rows * dlse_strides[2], mask=rows < M, other=0.0)
    tl.store(delta_out + offset(b * heads + head, M) + rows, row, mask=rows < M)


@triton.jit
def _fold_queries(
    dk, dv, db, k, v, q, dout, lse, rest, delta_in, f, at, seen, q_row, dout_row, m0, n0, i, j, M, N, lo, hi, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    EVEN_N: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, NEED_DB: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold one query block into (dk, dv, db) of one key tile. ``seen`` is its tile of the mask. EXACT: also where scores are huge."""
    q_tile = load_rows(q, q_row, m0, M, BM, D, BD, MASKED, WIDE)  # [BM, BD]
    lse_log2 = load_lse_log2(lse, m0, M, BM, MASKED)
    st = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION)  # [BN, BM]
    bias = bias_tile(f, at, m0, n0, i, j, M, N, MASKED, not EVEN_N, WIDE)
    st, slope = scored(f, at, st, bias, seen, scale, m0, n0, i, j, M, N, EXACT)
    if MASKED:
        st = tl.where(in_band(m0 + i, n0 + j, N, lo, hi), st, float("-inf"))
    ADDS: tl.constexpr = f.bias is not None or f.slopes is not None
    if EXACT and rest is not None:
        pt = probabilities(st, lse_log2[None, :], load_vector(rest, m0, M, BM, MASKED)[None, :], True, not ADDS)
    else:
        pt = probabilities(st, lse_log2[None, :], 0.0, False, ADDS)
    do_tile = load_rows(dout, dout_row, m0, M, BM, DV, BDV, MASKED, WIDE)  # [BM, BDV]
    if NEED_DV:
        kept = dropped(f, at, pt, m0, n0, BM, BN, True)
        dv = tl.dot(kept.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
    if NEED_DK or NEED_DB:
        row = load_vector(delta_in, m0, M, BM, MASKED)
        dpt = tl.dot(v, tl.trans(do_tile), input_precision=PRECISION)  # [BN, BM]
        dpt = rescaled(f, dropped(f, at, dpt, m0, n0, BM, BN, True))
        dst = pt * (dpt - row[None, :])
        if NEED_DB:
            db += tl.sum(dst, 1)
        if NEED_DK:
            dst = through_cap(f, dst, slope)
            dk = tl.dot(dst.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv, db


@triton.jit
def _walk_queries(
    dk, dv, db, k, v, q, dout, lse, rest, delta_in, f, q_strides, dout_strides, lse_strides, b, kv_head,
    heads, groups, batch_inner, n0, begin, end, M, N, lo, hi, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    EVEN_N: tl.constexpr, GROUPED: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, NEED_DB: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold the query blocks ``[begin, end)`` of each query head of the key head into (dk, dv, db), on transposed tiles ``[BN, BM]``."""
    i = tl.arange(0, BM)[None, :]
    j = tl.arange(0, BN)[:, None]
    # One loop over heads and blocks, not one in the other: what the compiler hoists out of it need not outlive it, and it loads ahead
    # across heads.
    count = end - begin
    first = begin
    last = end
    if GROUPED:
        first = 0
        last = count * groups
    at = at_head(f, b, kv_head, heads, batch_inner)
    # A branch keeps the compiler from loading ahead: it is worth that only for a mask that hides blocks, of queries and keys.
    if f.mask is not None:
        SKIPS: tl.constexpr = f.mask_strides[3] is not None and f.mask_strides[4] is not None
    else:
        SKIPS: tl.constexpr = False
    for step in tl.range(first, last):
        if GROUPED:
            head = kv_head * groups + step // count
            block = begin + step % count
            here = at_head(f, b, head, heads, batch_inner)
        else:
            head = kv_head
            block = step
            here = at
        m0 = block * BM
        q_at = q + offset(head, q_strides[2])
        do_at = dout + offset(head, dout_strides[2])
        lse_at = lse + offset(head, lse_strides[1])
        delta_at = delta_in
        rest_at = rest
        if NEED_DK or NEED_DB:
            delta_at = delta_in + offset(b * heads + head, M)
        if rest is not None:
            rest_at = rest + offset(b * heads + head, M)
        seen = mask_tile(f, here, m0, n0, i, j, M, N, MASKED, not EVEN_N, WIDE)
        if SKIPS:
            if shows_anything(seen):
                dk, dv, db = _fold_queries(
                    dk, dv, db, k, v, q_at, do_at, lse_at, rest_at, delta_at, f, here, seen, q_strides[1], dout_strides[1],
                    m0, n0, i, j, M, N, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_N, NEED_DK, NEED_DV, NEED_DB, PRECISION, WIDE, EXACT,
                    MASKED,
                )  # fmt: skip
        else:
            dk, dv, db = _fold_queries(
                dk, dv, db, k, v, q_at, do_at, lse_at, rest_at, delta_at, f, here, seen, q_strides[1], dout_strides[1],
                m0, n0, i, j, M, N, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_N, NEED_DK, NEED_DV, NEED_DB, PRECISION, WIDE, EXACT,
                MASKED,
            )  # fmt: skip
    return dk, dv, db


@triton.jit
def dkdv(
    q, k, v, f, dout, lse, rest, delta_in, dk_out, dv_out, dbias_out,
    q_strides, k_strides, v_strides, dout_strides, lse_strides, dk_strides, dv_strides, dbias_strides,
    batch, heads, groups, batch_inner, M, N, lo, hi, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """One program owns BN keys of one key head and walks the queries of its ``groups`` query heads that see them:

        dk += scale dsᵀ q,  dv += pᵀ dout,  db += colsum ds

    An output that is None is not computed; GROUPED says that groups is not 1, and then dbias_out is None. It holds a row of keys per
    (outer batch, inner batch, head), which are three of its strides; the fourth is along keys. Other strides and f as in ``forward``.
    """
    tile, kv_head, b = locate(tl.cdiv(N, BN), heads // groups, batch, ORDER, lo is not None)
    n0 = tile * BN
    q += offset(b, q_strides[0])
    k += offset(b, k_strides[0]) + offset(kv_head, k_strides[2])
    v += offset(b, v_strides[0]) + offset(kv_head, v_strides[2])
    dout += offset(b, dout_strides[0])
    lse += offset(b, lse_strides[0])
    NEED_DK: tl.constexpr = dk_out is not None
    NEED_DV: tl.constexpr = dv_out is not None
    NEED_DB: tl.constexpr = dbias_out is not None
    HIDES: tl.constexpr = f.lengths is not None
    shown = visible_keys(f, b, N)
    queries = M
    if HIDES:
        queries = tl.where(n0 < shown, M, 0)  # nobody sees a tile that is hidden

    # Keys past the end load as zeros and their rows are never stored; queries past the end have lse +inf, so their p is 0.
    k_tile = load_rows(k, k_strides[1], n0, shown, BN, D, BD, not EVEN_N or HIDES, WIDE)  # [BN, BD]
    v_tile = load_rows(v, v_strides[1], n0, shown, BN, DV, BDV, not EVEN_N or HIDES, WIDE)  # [BN, BDV]
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BDV], tl.float32)
    db = tl.zeros([BN], tl.float32)
    low = -hi if hi is not None else None  # the band as keys see queries
    high = -lo if lo is not None else None
    begin, full_begin, full_end, end = segments(n0, min(n0 + BN, N) - 1, queries, low, high, BM)
    # Beside what is added, scores are always taken for huge. Else it is asked for once, and the loops that need not care are the faster.
    ADDS: tl.constexpr = f.bias is not None or f.slopes is not None
    ASKED: tl.constexpr = rest is not None and not ADDS
    first = begin
    last = end
    if ASKED:
        mild = heads_are_mild(lse, lse_strides[1], kv_head * groups, groups, begin * BM, min(end * BM, M))
        first = tl.where(mild, end, begin)  # of the blocks for the loop that cares
        full_begin = tl.where(mild, full_begin, begin)
        full_end = tl.where(mild, full_end, begin)
        last = tl.where(mild, end, begin)
    if hi is not None:
        dk, dv, db = _walk_queries(
            dk, dv, db, k_tile, v_tile, q, dout, lse, rest, delta_in, f, q_strides, dout_strides, lse_strides, b, kv_head,
            heads, groups, batch_inner, n0, begin, full_begin, M, N, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_N, GROUPED,
            NEED_DK, NEED_DV, NEED_DB, PRECISION, WIDE, ADDS, True,
        )  # fmt: skip
    dk, dv, db = _walk_queries(
        dk, dv, db, k_tile, v_tile, q, dout, lse, rest, delta_in, f, q_strides, dout_strides, lse_strides, b, kv_head,
        heads, groups, batch_inner, n0, full_begin, full_end, M, N, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_N, GROUPED,
        NEED_DK, NEED_DV, NEED_DB, PRECISION, WIDE, ADDS, False,
    )  # fmt: skip
    if lo is not None or not EVEN_M:
        dk, dv, db = _walk_queries(
            dk, dv, db, k_tile, v_tile, q, dout, lse, rest, delta_in, f, q_strides, dout_strides, lse_strides, b, kv_head,
            heads, groups, batch_inner, n0, full_end, last, M, N, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_N, GROUPED,
            NEED_DK, NEED_DV, NEED_DB, PRECISION, WIDE, ADDS, True,
        )  # fmt: skip
    if ASKED:
        dk, dv, db = _walk_queries(
            dk, dv, db, k_tile, v_tile, q, dout, lse, rest, delta_in, f, q_strides, dout_strides, lse_strides, b, kv_head,
            heads, groups, batch_inner, n0, first, end, M, N, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_N, GROUPED,
            NEED_DK, NEED_DV, NEED_DB, PRECISION, WIDE, True, True,
        )  # fmt: skip
    cols = n0 + tl.arange(0, BN)
    if HIDES:  # hidden keys of a tile that shows others: their rows hold what nobody masked
        dk = tl.where(cols[:, None] < shown, dk, 0.0)
        dv = tl.where(cols[:, None] < shown, dv, 0.0)
        db = tl.where(cols < shown, db, 0.0)
    if NEED_DK:
        dk_out += offset(b, dk_strides[0]) + offset(kv_head, dk_strides[2])
        store_rows(dk_out, dk_strides[1], n0, N, dk * scale, BN, D, BD, not EVEN_N, WIDE)
    if NEED_DV:
        dv_out += offset(b, dv_strides[0]) + offset(kv_head, dv_strides[2])
        store_rows(dv_out, dv_strides[1], n0, N, rescaled(f, dv), BN, DV, BDV, not EVEN_N, WIDE)
    if NEED_DB:
        dbias_out += offset(b // batch_inner, dbias_strides[0]) + offset(b % batch_inner, dbias_strides[1])
        dbias_out += offset(kv_head, dbias_strides[2])
        tl.store(dbias_out + offset(cols, dbias_strides[3]), db.to(dbias_out.dtype.element_ty), mask=cols < N)


@triton.jit
def _fold_keys(
    dq, q, dout, lse_log2, rest, row, k, v, f, at, seen, dbias, dbias_row, dbias_col, k_row, v_row,
    m0, n0, i, j, M, N, shown, lo, hi, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    EVEN_M: tl.constexpr, HAS_REST: tl.constexpr, NEED_DQ: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold one key block into dq of one query tile, and write its ds if ``dbias`` is given. ``seen`` is its tile of the mask."""
    k_tile = load_rows(k, k_row, n0, shown, BN, D, BD, MASKED, WIDE)  # [BN, BD]
    s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)  # [BM, BN]
    bias = bias_tile(f, at, m0, n0, i, j, M, shown, not EVEN_M, MASKED, WIDE)
    s, slope = scored(f, at, s, bias, seen, scale, m0, n0, i, j, M, N, HAS_REST)
    if MASKED:
        s = tl.where(in_band(m0 + i, n0 + j, shown, lo, hi), s, float("-inf"))
    ADDS: tl.constexpr = f.bias is not None or f.slopes is not None
    p = probabilities(s, lse_log2[:, None], rest[:, None], HAS_REST, HAS_REST != ADDS)
    v_tile = load_rows(v, v_row, n0, shown, BN, DV, BDV, MASKED, WIDE)  # [BN, BDV]
    dp = tl.dot(dout, tl.trans(v_tile), input_precision=PRECISION)  # [BM, BN]
    dp = rescaled(f, dropped(f, at, dp, m0, n0, BM, BN, False))
    ds = p * (dp - row[:, None])
    if dbias is not None:
        store_tile(dbias, dbias_row, dbias_col, m0, n0, i, j, M, N, ds, not EVEN_M, MASKED)
    if NEED_DQ:
        ds = through_cap(f, ds, slope)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _walk_keys(
    dq, q, dout, lse_log2, rest, row, k, v, f, at, dbias, dbias_row, dbias_col, k_row, v_row,
    m0, begin, end, M, N, shown, lo, hi, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    EVEN_M: tl.constexpr, HAS_REST: tl.constexpr, NEED_DQ: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold the key blocks ``[begin, end)`` into dq of one query tile, and write their ds if ``dbias`` is given."""
    i = tl.arange(0, BM)[:, None]
    j = tl.arange(0, BN)[None, :]
    # A branch keeps the compiler from loading ahead: it is worth that only for a mask that hides blocks, of queries and keys.
    if f.mask is not None:
        SKIPS: tl.constexpr = f.mask_strides[3] is not None and f.mask_strides[4] is not None
    else:
        SKIPS: tl.constexpr = False
    for block in tl.range(begin, end):
        n0 = block * BN
        seen = mask_tile(f, at, m0, n0, i, j, M, shown, not EVEN_M, MASKED, WIDE)
        if SKIPS:
            if shows_anything(seen):
                dq = _fold_keys(
                    dq, q, dout, lse_log2, rest, row, k, v, f, at, seen, dbias, dbias_row, dbias_col, k_row, v_row,
                    m0, n0, i, j, M, N, shown, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_M, HAS_REST, NEED_DQ, PRECISION, WIDE, MASKED,
                )  # fmt: skip
            elif dbias is not None:
                store_tile(dbias, dbias_row, dbias_col, m0, n0, i, j, M, N, tl.zeros([BM, BN], tl.float32), not EVEN_M, MASKED)
        else:
            dq = _fold_keys(
                dq, q, dout, lse_log2, rest, row, k, v, f, at, seen, dbias, dbias_row, dbias_col, k_row, v_row,
                m0, n0, i, j, M, N, shown, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_M, HAS_REST, NEED_DQ, PRECISION, WIDE, MASKED,
            )  # fmt: skip
    return dq


@triton.jit
def dq(
    q, k, v, f, dout, lse, rest, delta_in, dq_out, dbias_out,
    q_strides, k_strides, v_strides, dout_strides, lse_strides, dq_strides, dbias_strides,
    batch, heads, groups, batch_inner, M, N, lo, hi, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """One program owns BM queries of one head and walks the keys that they see: dq += scale ds k, and dbias = ds.

    An output that is None is not computed. dbias_out has the full shape, and zeros are written where nothing is visible; its strides are
    (outer batch, inner batch, head, row, column). Other strides, f and groups as in ``forward``.
    """
    tile, head, b = locate(tl.cdiv(M, BM), heads, batch, ORDER, hi is not None)
    m0 = tile * BM
    q += offset(b, q_strides[0]) + offset(head, q_strides[2])
    k += offset(b, k_strides[0]) + offset(head // groups, k_strides[2])
    v += offset(b, v_strides[0]) + offset(head // groups, v_strides[2])
    dout += offset(b, dout_strides[0]) + offset(head, dout_strides[2])
    NEED_DQ: tl.constexpr = dq_out is not None
    if NEED_DQ:
        dq_out += offset(b, dq_strides[0]) + offset(head, dq_strides[2])
    if dbias_out is not None:
        dbias_out += offset(b // batch_inner, dbias_strides[0]) + offset(b % batch_inner, dbias_strides[1])
        dbias_out += offset(head, dbias_strides[2])
        dbias_row = dbias_strides[3]
        dbias_col = dbias_strides[4]
    else:
        dbias_row = 0
        dbias_col = 0
    lse += offset(b, lse_strides[0]) + offset(head, lse_strides[1])
    delta_in += offset(b * heads + head, M)
    at = at_head(f, b, head, heads, batch_inner)
    shown = visible_keys(f, b, N)

    q_tile = load_rows(q, q_strides[1], m0, M, BM, D, BD, not EVEN_M, WIDE)  # [BM, BD]
    do_tile = load_rows(dout, dout_strides[1], m0, M, BM, DV, BDV, not EVEN_M, WIDE)  # [BM, BDV]
    lse_log2 = load_lse_log2(lse, m0, M, BM, not EVEN_M)
    rest_row = lse_log2
    if rest is not None:
        rest_row = load_vector(rest + offset(b * heads + head, M), m0, M, BM, not EVEN_M)
    row = load_vector(delta_in, m0, M, BM, not EVEN_M)
    acc = tl.zeros([BM, BD], tl.float32)
    begin, full_begin, full_end, end = segments(m0, min(m0 + BM, M) - 1, shown, lo, hi, BN)
    # As in dkdv: which blocks are for the loops that need not care if scores are huge.
    ADDS: tl.constexpr = rest is not None and (f.bias is not None or f.slopes is not None)
    ASKED: tl.constexpr = rest is not None and not ADDS
    first = begin
    last = end
    if ASKED:
        mild = is_mild(lse_log2, MILDEST * LOG2E)
        first = tl.where(mild, end, begin)
        full_begin = tl.where(mild, full_begin, begin)
        full_end = tl.where(mild, full_end, begin)
        last = tl.where(mild, end, begin)
    if lo is not None:
        acc = _walk_keys(
            acc, q_tile, do_tile, lse_log2, rest_row, row, k, v, f, at, dbias_out, dbias_row, dbias_col, k_strides[1], v_strides[1],
            m0, begin, full_begin, M, N, shown, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_M,
            ADDS, NEED_DQ, PRECISION, WIDE, True,
        )  # fmt: skip
    acc = _walk_keys(
        acc, q_tile, do_tile, lse_log2, rest_row, row, k, v, f, at, dbias_out, dbias_row, dbias_col, k_strides[1], v_strides[1],
        m0, full_begin, full_end, M, N, shown, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_M,
        ADDS, NEED_DQ, PRECISION, WIDE, False,
    )  # fmt: skip
    if hi is not None or not EVEN_N or f.lengths is not None:
        acc = _walk_keys(
            acc, q_tile, do_tile, lse_log2, rest_row, row, k, v, f, at, dbias_out, dbias_row, dbias_col, k_strides[1], v_strides[1],
            m0, full_end, last, M, N, shown, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_M,
            ADDS, NEED_DQ, PRECISION, WIDE, True,
        )  # fmt: skip
    if ASKED:
        acc = _walk_keys(
            acc, q_tile, do_tile, lse_log2, rest_row, row, k, v, f, at, dbias_out, dbias_row, dbias_col, k_strides[1], v_strides[1],
            m0, first, end, M, N, shown, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_M, True, NEED_DQ, PRECISION, WIDE, True,
        )  # fmt: skip
    if NEED_DQ:
        store_rows(dq_out, dq_strides[1], m0, M, acc * scale, BM, D, BD, not EVEN_M, WIDE)
    if dbias_out is not None and (lo is not None or hi is not None or f.lengths is not None):
        i = tl.arange(0, BM)[:, None]
        j = tl.arange(0, BN)[None, :]
        nothing = tl.zeros([BM, BN], tl.float32)
        for block in tl.range(0, begin):
            store_tile(dbias_out, dbias_row, dbias_col, m0, block * BN, i, j, M, N, nothing, not EVEN_M, not EVEN_N)
        for block in tl.range(end, tl.cdiv(N, BN)):
            store_tile(dbias_out, dbias_row, dbias_col, m0, block * BN, i, j, M, N, nothing, not EVEN_M, not EVEN_N)
