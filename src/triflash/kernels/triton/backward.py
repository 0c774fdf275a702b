"""The backward kernels that give dq, dk and dv, and the gradient of a bias where it falls out of these passes.

With ``p = 2^(s - lse)`` and ``delta = rowsum(out * dout) - dlse``:
    dv = pᵀ dout;   ds = p * (dout vᵀ - delta);   dk = scale dsᵀ q;   dq = scale ds k
Two passes, each of which owns its output tile, so nothing is added atomically and results are bitwise reproducible. The pass for dq has
every tile of ds once, so it writes the gradient of a bias of full shape; the pass for dk and dv sums ds over all queries on its way, which
is the gradient of a bias that varies over keys only. All other biases have a kernel of their own (``dbias.py``). sᵀ and dpᵀ come
straight from ``k qᵀ`` and ``v doutᵀ``: no tile is transposed in registers (Triton 3.4 to 3.7 has miscompiled that on Hopper).
"""

import triton
import triton.language as tl

from .prims import (
    LOG2E,
    add_bias,
    bias_tile,
    in_band,
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
def _walk_queries(
    dk, dv, db, k, v, q, dout, lse, rest, delta_in, bias, q_row, dout_row, bias_row, bias_col, n0, begin, end, M, N, lo, hi, scale_log2,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    IS_MASK: tl.constexpr, VARIES_M: tl.constexpr, VARIES_N: tl.constexpr, EVEN_N: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, NEED_DB: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold the query blocks ``[begin, end)`` into (dk, dv, db) of one key tile, on transposed tiles ``[BN, BM]``."""
    i = tl.arange(0, BM)[None, :]
    j = tl.arange(0, BN)[:, None]
    for block in tl.range(begin, end):
        m0 = block * BM
        q_tile = load_rows(q, q_row, m0, M, BM, D, BD, MASKED, WIDE)  # [BM, BD]
        lse_log2 = load_lse_log2(lse, m0, M, BM, MASKED)
        st = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION) * scale_log2  # [BN, BM]
        if bias is not None:
            b = bias_tile(bias, bias_row, bias_col, m0, n0, i, j, M, N, VARIES_M, VARIES_N, MASKED, not EVEN_N, WIDE)
            st = add_bias(st, b, IS_MASK)
        if MASKED:
            st = tl.where(in_band(m0 + i, n0 + j, N, lo, hi), st, float("-inf"))
        CLAMPED: tl.constexpr = bias is not None and not IS_MASK
        if rest is not None:
            pt = probabilities(st, lse_log2[None, :], load_vector(rest, m0, M, BM, MASKED)[None, :], True, CLAMPED)
        else:
            pt = probabilities(st, lse_log2[None, :], 0.0, False, CLAMPED)
        do_tile = load_rows(dout, dout_row, m0, M, BM, DV, BDV, MASKED, WIDE)  # [BM, BDV]
        if NEED_DV:
            dv = tl.dot(pt.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
        if NEED_DK or NEED_DB:
            row = load_vector(delta_in, m0, M, BM, MASKED)
            dpt = tl.dot(v, tl.trans(do_tile), input_precision=PRECISION)  # [BN, BM]
            dst = pt * (dpt - row[None, :])
            if NEED_DB:
                db += tl.sum(dst, 1)
            if NEED_DK:
                dk = tl.dot(dst.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv, db


@triton.jit
def dkdv(
    q, k, v, bias, dout, lse, rest, delta_in, dk_out, dv_out, dbias_out,
    q_strides, k_strides, v_strides, bias_strides, dout_strides, lse_strides, dk_strides, dv_strides, dbias_strides,
    batch, heads, batch_inner, M, N, lo, hi, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    IS_MASK: tl.constexpr, VARIES_M: tl.constexpr, VARIES_N: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """One program owns BN keys of one head and walks the queries that see them: dk += scale dsᵀ q, dv += pᵀ dout, db += colsum ds.

    An output that is None is not computed. dbias_out holds a row of keys per (outer batch, inner batch, head), which are three of its
    strides; the fourth is along keys. Other strides as in ``forward``.
    """
    tile, head, b = locate(tl.cdiv(N, BN), heads, batch, ORDER, lo is not None)
    n0 = tile * BN
    q += offset(b, q_strides[0]) + offset(head, q_strides[2])
    k += offset(b, k_strides[0]) + offset(head, k_strides[2])
    v += offset(b, v_strides[0]) + offset(head, v_strides[2])
    dout += offset(b, dout_strides[0]) + offset(head, dout_strides[2])
    lse += offset(b, lse_strides[0]) + offset(head, lse_strides[1])
    NEED_DK: tl.constexpr = dk_out is not None
    NEED_DV: tl.constexpr = dv_out is not None
    NEED_DB: tl.constexpr = dbias_out is not None
    if NEED_DK or NEED_DB:
        delta_in += offset(b * heads + head, M)
    if rest is not None:
        rest += offset(b * heads + head, M)
    if bias is not None:
        bias += offset(b // batch_inner, bias_strides[0]) + offset(b % batch_inner, bias_strides[1]) + offset(head, bias_strides[2])
        bias_row = bias_strides[3]
        bias_col = bias_strides[4]
    else:
        bias_row = 0
        bias_col = 0

    # Keys past the end load as zeros and their rows are never stored; queries past the end have lse +inf, so their p is 0.
    k_tile = load_rows(k, k_strides[1], n0, N, BN, D, BD, not EVEN_N, WIDE)  # [BN, BD]
    v_tile = load_rows(v, v_strides[1], n0, N, BN, DV, BDV, not EVEN_N, WIDE)  # [BN, BDV]
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BDV], tl.float32)
    db = tl.zeros([BN], tl.float32)
    scale_log2 = scale * LOG2E
    low = -hi if hi is not None else None  # the band as keys see queries
    high = -lo if lo is not None else None
    begin, full_begin, full_end, end = segments(n0, min(n0 + BN, N) - 1, M, low, high, BM)
    if hi is not None:
        dk, dv, db = _walk_queries(
            dk, dv, db, k_tile, v_tile, q, dout, lse, rest, delta_in, bias, q_strides[1], dout_strides[1], bias_row, bias_col,
            n0, begin, full_begin, M, N, lo, hi, scale_log2, BM, BN, D, DV, BD, BDV, IS_MASK, VARIES_M, VARIES_N, EVEN_N,
            NEED_DK, NEED_DV, NEED_DB, PRECISION, WIDE, True,
        )  # fmt: skip
    dk, dv, db = _walk_queries(
        dk, dv, db, k_tile, v_tile, q, dout, lse, rest, delta_in, bias, q_strides[1], dout_strides[1], bias_row, bias_col,
        n0, full_begin, full_end, M, N, lo, hi, scale_log2, BM, BN, D, DV, BD, BDV, IS_MASK, VARIES_M, VARIES_N, EVEN_N,
        NEED_DK, NEED_DV, NEED_DB, PRECISION, WIDE, False,
    )  # fmt: skip
    if lo is not None or not EVEN_M:
        dk, dv, db = _walk_queries(
            dk, dv, db, k_tile, v_tile, q, dout, lse, rest, delta_in, bias, q_strides[1], dout_strides[1], bias_row, bias_col,
            n0, full_end, end, M, N, lo, hi, scale_log2, BM, BN, D, DV, BD, BDV, IS_MASK, VARIES_M, VARIES_N, EVEN_N,
            NEED_DK, NEED_DV, NEED_DB, PRECISION, WIDE, True,
        )  # fmt: skip
    if NEED_DK:
        dk_out += offset(b, dk_strides[0]) + offset(head, dk_strides[2])
        store_rows(dk_out, dk_strides[1], n0, N, dk * scale, BN, D, BD, not EVEN_N, WIDE)
    if NEED_DV:
        dv_out += offset(b, dv_strides[0]) + offset(head, dv_strides[2])
        store_rows(dv_out, dv_strides[1], n0, N, dv, BN, DV, BDV, not EVEN_N, WIDE)
    if NEED_DB:
        dbias_out += offset(b // batch_inner, dbias_strides[0]) + offset(b % batch_inner, dbias_strides[1])
        dbias_out += offset(head, dbias_strides[2])
        cols = n0 + tl.arange(0, BN)
        tl.store(dbias_out + offset(cols, dbias_strides[3]), db.to(dbias_out.dtype.element_ty), mask=cols < N)


@triton.jit
def _walk_keys(
    dq, q, dout, lse_log2, rest, row, k, v, bias, dbias, k_row, v_row, bias_row, bias_col, dbias_row, dbias_col,
    m0, begin, end, M, N, lo, hi, scale_log2,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    IS_MASK: tl.constexpr, VARIES_M: tl.constexpr, VARIES_N: tl.constexpr, EVEN_M: tl.constexpr,
    HAS_REST: tl.constexpr, NEED_DQ: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold the key blocks ``[begin, end)`` into dq of one query tile, and write their ds if ``dbias`` is given."""
    i = tl.arange(0, BM)[:, None]
    j = tl.arange(0, BN)[None, :]
    for block in tl.range(begin, end):
        n0 = block * BN
        k_tile = load_rows(k, k_row, n0, N, BN, D, BD, MASKED, WIDE)  # [BN, BD]
        s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale_log2  # [BM, BN]
        if bias is not None:
            b = bias_tile(bias, bias_row, bias_col, m0, n0, i, j, M, N, VARIES_M, VARIES_N, not EVEN_M, MASKED, WIDE)
            s = add_bias(s, b, IS_MASK)
        if MASKED:
            s = tl.where(in_band(m0 + i, n0 + j, N, lo, hi), s, float("-inf"))
        p = probabilities(s, lse_log2[:, None], rest[:, None], HAS_REST, bias is not None and not IS_MASK)
        v_tile = load_rows(v, v_row, n0, N, BN, DV, BDV, MASKED, WIDE)  # [BN, BDV]
        dp = tl.dot(dout, tl.trans(v_tile), input_precision=PRECISION)  # [BM, BN]
        ds = p * (dp - row[:, None])
        if dbias is not None:
            store_tile(dbias, dbias_row, dbias_col, m0, n0, i, j, M, N, ds, not EVEN_M, MASKED)
        if NEED_DQ:
            dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq(
    q, k, v, bias, dout, lse, rest, delta_in, dq_out, dbias_out,
    q_strides, k_strides, v_strides, bias_strides, dout_strides, lse_strides, dq_strides, dbias_strides,
    batch, heads, batch_inner, M, N, lo, hi, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    IS_MASK: tl.constexpr, VARIES_M: tl.constexpr, VARIES_N: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """One program owns BM queries of one head and walks the keys that they see: dq += scale ds k, and dbias = ds.

    An output that is None is not computed. dbias_out has the full shape, and zeros are written where nothing is visible. Strides as in
    ``forward``, those of dbias_out like the bias's.
    """
    tile, head, b = locate(tl.cdiv(M, BM), heads, batch, ORDER, hi is not None)
    m0 = tile * BM
    q += offset(b, q_strides[0]) + offset(head, q_strides[2])
    k += offset(b, k_strides[0]) + offset(head, k_strides[2])
    v += offset(b, v_strides[0]) + offset(head, v_strides[2])
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
    if bias is not None:
        bias += offset(b // batch_inner, bias_strides[0]) + offset(b % batch_inner, bias_strides[1]) + offset(head, bias_strides[2])
        bias_row = bias_strides[3]
        bias_col = bias_strides[4]
    else:
        bias_row = 0
        bias_col = 0

    q_tile = load_rows(q, q_strides[1], m0, M, BM, D, BD, not EVEN_M, WIDE)  # [BM, BD]
    do_tile = load_rows(dout, dout_strides[1], m0, M, BM, DV, BDV, not EVEN_M, WIDE)  # [BM, BDV]
    lse_log2 = load_lse_log2(lse, m0, M, BM, not EVEN_M)
    HAS_REST: tl.constexpr = rest is not None
    rest_row = lse_log2
    if HAS_REST:
        rest_row = load_vector(rest + offset(b * heads + head, M), m0, M, BM, not EVEN_M)
    row = load_vector(delta_in, m0, M, BM, not EVEN_M)
    acc = tl.zeros([BM, BD], tl.float32)
    scale_log2 = scale * LOG2E
    begin, full_begin, full_end, end = segments(m0, min(m0 + BM, M) - 1, N, lo, hi, BN)
    if lo is not None:
        acc = _walk_keys(
            acc, q_tile, do_tile, lse_log2, rest_row, row, k, v, bias, dbias_out, k_strides[1], v_strides[1], bias_row, bias_col,
            dbias_row, dbias_col, m0, begin, full_begin, M, N, lo, hi, scale_log2, BM, BN, D, DV, BD, BDV, IS_MASK, VARIES_M,
            VARIES_N, EVEN_M,
            HAS_REST, NEED_DQ, PRECISION, WIDE, True,
        )  # fmt: skip
    acc = _walk_keys(
        acc, q_tile, do_tile, lse_log2, rest_row, row, k, v, bias, dbias_out, k_strides[1], v_strides[1], bias_row, bias_col,
        dbias_row, dbias_col, m0, full_begin, full_end, M, N, lo, hi, scale_log2, BM, BN, D, DV, BD, BDV, IS_MASK, VARIES_M,
        VARIES_N, EVEN_M,
        HAS_REST, NEED_DQ, PRECISION, WIDE, False,
    )  # fmt: skip
    if hi is not None or not EVEN_N:
        acc = _walk_keys(
            acc, q_tile, do_tile, lse_log2, rest_row, row, k, v, bias, dbias_out, k_strides[1], v_strides[1], bias_row, bias_col,
            dbias_row, dbias_col, m0, full_end, end, M, N, lo, hi, scale_log2, BM, BN, D, DV, BD, BDV, IS_MASK, VARIES_M, VARIES_N, EVEN_M,
            HAS_REST, NEED_DQ, PRECISION, WIDE, True,
        )  # fmt: skip
    if NEED_DQ:
        store_rows(dq_out, dq_strides[1], m0, M, acc * scale, BM, D, BD, not EVEN_M, WIDE)
    if dbias_out is not None and (lo is not None or hi is not None):
        i = tl.arange(0, BM)[:, None]
        j = tl.arange(0, BN)[None, :]
        nothing = tl.zeros([BM, BN], tl.float32)
        for block in tl.range(0, begin):
            store_tile(dbias_out, dbias_row, dbias_col, m0, block * BN, i, j, M, N, nothing, not EVEN_M, not EVEN_N)
        for block in tl.range(end, tl.cdiv(N, BN)):
            store_tile(dbias_out, dbias_row, dbias_col, m0, block * BN, i, j, M, N, nothing, not EVEN_M, not EVEN_N)
