"""The forward kernel."""

import triton
import triton.language as tl

from .prims import LN2, LOG2E, add_bias, bias_tile, in_band, load_rows, locate, lse_rest, offset, segments, store_rows


@triton.jit
def _walk(
    acc, l, m, q, k, v, bias, k_row, v_row, bias_row, bias_col, m0, begin, end, M, N, lo, hi, scale_log2,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    IS_MASK: tl.constexpr, VARIES_M: tl.constexpr, VARIES_N: tl.constexpr, EVEN_M: tl.constexpr,
    POSITIVE_SCALE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold the key blocks ``[begin, end)`` into the running (acc, l, m); ``MASKED`` where some query does not see some key."""
    i = tl.arange(0, BM)[:, None]
    j = tl.arange(0, BN)[None, :]
    for block in tl.range(begin, end):
        n0 = block * BN
        k_tile = load_rows(k, k_row, n0, N, BN, D, BD, MASKED, WIDE)
        s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)  # [BM, BN]
        # Scaling after the maximum saves a product per score; with a bias, or a scale that is not positive, it must come first.
        LATE_SCALE: tl.constexpr = POSITIVE_SCALE and bias is None
        if not LATE_SCALE:
            s = s * scale_log2
        if bias is not None:
            b = bias_tile(bias, bias_row, bias_col, m0, n0, i, j, M, N, VARIES_M, VARIES_N, not EVEN_M, MASKED, WIDE)
            s = add_bias(s, b, IS_MASK)
        if MASKED:
            s = tl.where(in_band(m0 + i, n0 + j, N, lo, hi), s, float("-inf"))
        top = tl.max(s, 1)
        if LATE_SCALE:
            top = top * scale_log2
        m_new = tl.maximum(m, top)
        if MASKED or bias is not None:
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key yet: 2^(-inf - 0) = 0, never NaN
        else:
            m_safe = m_new
        if LATE_SCALE:
            p = tl.exp2(s * scale_log2 - m_safe[:, None])
        else:
            p = tl.exp2(s - m_safe[:, None])
        shrink = tl.exp2(m - m_safe)
        l = l * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v_tile = load_rows(v, v_row, n0, N, BN, DV, BDV, MASKED, WIDE)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        m = m_new
    return acc, l, m


@triton.jit
def forward(
    q, k, v, bias, out, lse, rest, q_strides, k_strides, v_strides, bias_strides, out_strides, lse_strides,
    batch, heads, batch_inner, M, N, lo, hi, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    IS_MASK: tl.constexpr, VARIES_M: tl.constexpr, VARIES_N: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    POSITIVE_SCALE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """One program owns BM queries of one head and walks the keys that they can see.

    m, l, acc: running row maximum, row sum and unnormalised output, in base 2:
        m' = max(m, rowmax s);  l' = l 2^(m - m') + rowsum 2^(s - m');  acc' = acc 2^(m - m') + 2^(s - m') v
    and at the end out = acc / l, lse = (m + log2 l) ln 2, rest = what that float32 does not hold (``prims.lse_rest``).

    Strides are (batch, row, head), of the bias (outer batch, inner batch, head, row, column), of lse (batch, head); rest is
    contiguous. None: no bias, no such bound, not wanted. EVEN_M, EVEN_N: the length is a whole number of tiles.
    """
    tile, head, b = locate(tl.cdiv(M, BM), heads, batch, ORDER, hi is not None)
    m0 = tile * BM
    q += offset(b, q_strides[0]) + offset(head, q_strides[2])
    k += offset(b, k_strides[0]) + offset(head, k_strides[2])
    v += offset(b, v_strides[0]) + offset(head, v_strides[2])
    out += offset(b, out_strides[0]) + offset(head, out_strides[2])
    lse += offset(b, lse_strides[0]) + offset(head, lse_strides[1])
    if bias is not None:
        bias += offset(b // batch_inner, bias_strides[0]) + offset(b % batch_inner, bias_strides[1]) + offset(head, bias_strides[2])
        bias_row = bias_strides[3]
        bias_col = bias_strides[4]
    else:
        bias_row = 0
        bias_col = 0

    q_tile = load_rows(q, q_strides[1], m0, M, BM, D, BD, not EVEN_M, WIDE)  # [BM, BD]
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    scale_log2 = scale * LOG2E
    begin, full_begin, full_end, end = segments(m0, min(m0 + BM, M) - 1, N, lo, hi, BN)
    if lo is not None:
        acc, l, m = _walk(
            acc, l, m, q_tile, k, v, bias, k_strides[1], v_strides[1], bias_row, bias_col, m0, begin, full_begin, M, N, lo, hi, scale_log2,
            BM, BN, D, DV, BD, BDV, IS_MASK, VARIES_M, VARIES_N, EVEN_M, POSITIVE_SCALE, PRECISION, WIDE, True,
        )  # fmt: skip
    acc, l, m = _walk(
        acc, l, m, q_tile, k, v, bias, k_strides[1], v_strides[1], bias_row, bias_col, m0, full_begin, full_end, M, N, lo, hi, scale_log2,
        BM, BN, D, DV, BD, BDV, IS_MASK, VARIES_M, VARIES_N, EVEN_M, POSITIVE_SCALE, PRECISION, WIDE, False,
    )  # fmt: skip
    if hi is not None or not EVEN_N:
        acc, l, m = _walk(
            acc, l, m, q_tile, k, v, bias, k_strides[1], v_strides[1], bias_row, bias_col, m0, full_end, end, M, N, lo, hi, scale_log2,
            BM, BN, D, DV, BD, BDV, IS_MASK, VARIES_M, VARIES_N, EVEN_M, POSITIVE_SCALE, PRECISION, WIDE, True,
        )  # fmt: skip

    unseen = l == 0.0
    l = tl.where(unseen, 1.0, l)
    acc = acc / l[:, None]
    store_rows(out, out_strides[1], m0, M, acc, BM, DV, BDV, not EVEN_M, WIDE)
    row_lse = tl.where(unseen, float("-inf"), (m + tl.log2(l)) * LN2)
    rows = m0 + tl.arange(0, BM)
    tl.store(lse + rows, row_lse, mask=rows < M)
    if rest is not None:
        tl.store(rest + offset(b * heads + head, M) + rows, lse_rest(m, l, row_lse), mask=rows < M)
