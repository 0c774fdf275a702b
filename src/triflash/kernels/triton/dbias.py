"""The kernels that give the gradient of a bias that broadcasts, in the bias's own shape.

A bias of full shape, and one that varies over keys only, get theirs from the passes of ``backward.py``. Launched by ``launch/triton.py``.
"""

import triton
import triton.language as tl

from .extent import placed_diagonal, placed_keys, placed_queries
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
from .prims import between, in_band, load_lse_log2, load_rows, load_vector, offset, probabilities, segments, split_rest, store_tile
from .records import record


@record
class Round:
    """One (batch, head) pair: where its rows lie, how far apart, of which ``visible`` keys, and ``features.at_head``."""

    q: object
    k: object
    v: object
    dout: object
    q_row: object
    k_row: object
    v_row: object
    dout_row: object
    lse: object
    rest: object
    delta: object
    at: object
    visible: object


@triton.jit
def _ds(p, t, f, bias, seen, m0, n0, i, j, FIXED: tl.constexpr):
    """The gradient of one tile of scores; FIXED leaves it to the caller to mask it by the band. ``seen`` is its tile of the mask."""
    MASK_N: tl.constexpr = not p.EVEN_N or f.lengths is not None
    q_tile = load_rows(t.q, t.q_row, m0, p.M, p.BM, p.D, p.BD, not p.EVEN_M, p.WIDE, p.first_query)
    k_tile = load_rows(t.k, t.k_row, n0, t.visible, p.BN, p.D, p.BD, MASK_N, p.WIDE, p.first_key)
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision=p.PRECISION)  # [BM, BN]
    s, _ = scored(p, f, t.at, s, bias, seen, m0, n0, i, j, True)
    lse_log2 = load_lse_log2(t.lse, m0, p.M, p.BM, not p.EVEN_M)
    if t.rest is not None:
        top, rest = split_rest(lse_log2, load_vector(t.rest, m0, p.M, p.BM, not p.EVEN_M))
        weights = probabilities(s, top[:, None], rest[:, None], True, False)
    else:
        weights = probabilities(s, lse_log2[:, None], 0.0, False, True)
    do_tile = load_rows(t.dout, t.dout_row, m0, p.M, p.BM, p.DV, p.BDV, not p.EVEN_M, p.WIDE, p.first_query)
    v_tile = load_rows(t.v, t.v_row, n0, t.visible, p.BN, p.DV, p.BDV, MASK_N, p.WIDE, p.first_key)
    dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=p.PRECISION)  # [BM, BN]
    dp = rescaled(f, drop(f, t.at, dp, m0, n0, p.BM, p.BN, False))
    row = load_vector(t.delta, m0, p.M, p.BM, not p.EVEN_M)
    ds = weights * (dp - row[:, None])
    if not FIXED:
        ds = tl.where(in_band(m0 + i, n0 + j, t.visible, p.lo, p.hi), ds, 0.0)
    elif f.lengths is not None:
        ds = tl.where(n0 + j < t.visible, ds, 0.0)
    if p.first_key is not None:
        ds = tl.where(between(m0 + i, p.M, p.first_query) & between(n0 + j, t.visible, p.first_key), ds, 0.0)
    return ds


@triton.jit
def dbias(
    q, k, v, f, dout, lse, rest_in, delta_in, dbias_out,
    q_strides, k_strides, v_strides, dout_strides, lse_strides, dbias_strides,
    heads, groups, batch_outer, batch_inner, M, N, lo, hi, scale, splits,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    VARIES_B0: tl.constexpr, VARIES_B1: tl.constexpr, VARIES_H: tl.constexpr, VARIES_M: tl.constexpr, VARIES_N: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program owns one tile of the bias's own shape and loops over the dims that the bias broadcasts, recomputing s and dp:

        dbias = sum over broadcast dims of ds,   ds = p * (dout vᵀ - delta)

    A dim of queries or keys that broadcasts is looped over tile by tile and reduced at the end. The loop is cut into ``splits`` equal
    parts, the part being the slowest index of the grid; part t writes to ``dbias_out + t * dbias_strides[0]``. Strides, f and groups as in
    ``forward``, strides of dbias_out (part, outer batch, inner batch, head, row, column).
    """
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    tn = 0
    tm = 0
    own_head = 0
    own_b1 = 0
    own_b0 = 0
    if VARIES_N:
        tn = pid % tiles_n
        pid = pid // tiles_n
    if VARIES_M:
        tm = pid % tiles_m
        pid = pid // tiles_m
    if VARIES_H:
        own_head = pid % heads
        pid = pid // heads
    if VARIES_B1:
        own_b1 = pid % batch_inner
        pid = pid // batch_inner
    if VARIES_B0:
        own_b0 = pid % batch_outer
        pid = pid // batch_outer
    part = pid

    # A band that each batch entry moves by a diagonal of its own is asked for round by round.
    MOVES: tl.constexpr = f.diagonals is not None
    own_lo = lo
    own_hi = hi
    if MOVES:
        own_lo = None
        own_hi = None
    # Tiles to loop over along a broadcast axis: only those that the own tile of the other axis sees.
    begin_m = 0
    count_m = 1
    begin_n = 0
    count_n = 1
    if VARIES_M:
        begin, _a, _b, end = segments(tm * BM, min(tm * BM + BM, M) - 1, N, own_lo, own_hi, BN)
        if VARIES_N:
            count_n = tl.where((tn >= begin) & (tn < end), 1, 0)
        else:
            begin_n = begin
            count_n = end - begin
    elif VARIES_N:
        low = -own_hi if own_hi is not None else None  # the band as keys see queries
        high = -own_lo if own_lo is not None else None
        begin, _a, _b, end = segments(tn * BN, min(tn * BN + BN, N) - 1, M, low, high, BM)
        begin_m = begin
        count_m = end - begin
    else:
        count_m = tiles_m
        count_n = tiles_n
    rounds = count_m * count_n
    if not VARIES_H:
        rounds = rounds * heads
    if not VARIES_B1:
        rounds = rounds * batch_inner
    if not VARIES_B0:
        rounds = rounds * batch_outer
    first = tl.cast(tl.cast(rounds, tl.int64) * part // splits, tl.int32)
    last = tl.cast(tl.cast(rounds, tl.int64) * (part + 1) // splits, tl.int32)

    i = tl.arange(0, BM)[:, None]
    j = tl.arange(0, BN)[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    FIXED: tl.constexpr = VARIES_M and VARIES_N  # the same tile of scores every round: mask once, after the loop
    LOADED: tl.constexpr = FIXED and f.second is None  # and the same bias
    own_bias = 0.0
    if LOADED:
        own_at = at_head(f, own_b0 * batch_inner + own_b1, own_head, heads, batch_inner, 0, 0)
        BANDED: tl.constexpr = own_lo is not None or own_hi is not None
        rows = M
        if BANDED:
            rows = tl.where(first < last, M, 0)  # a tile that nobody sees only writes zeros: spare it the load of its bias
        own_bias = bias_tile(f, own_at, tm * BM, tn * BN, i, j, Span(None, rows), Span(None, N), BANDED or not EVEN_M, not EVEN_N, WIDE)
    HIDES: tl.constexpr = f.lengths is not None or f.placed is not None or MOVES
    if f.mask is not None:
        SKIPS: tl.constexpr = f.mask_strides[3] is not None and f.mask_strides[4] is not None
    else:
        SKIPS: tl.constexpr = False
    p = Program(M, N, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_M, EVEN_N, PRECISION, WIDE, None, None, None)
    for r in tl.range(first, last):
        head = own_head
        b1 = own_b1
        b0 = own_b0
        rest = r
        if not VARIES_N:
            tn = begin_n + rest % count_n
            rest = rest // count_n
        if not VARIES_M:
            tm = begin_m + rest % count_m
            rest = rest // count_m
        if not VARIES_B1:
            b1 = rest % batch_inner
            rest = rest // batch_inner
        if not VARIES_B0:
            b0 = rest % batch_outer
            rest = rest // batch_outer
        if not VARIES_H:
            head = rest
        m0 = tm * BM
        n0 = tn * BN
        b = b0 * batch_inner + b1
        at = at_head(f, b, head, heads, batch_inner, 0, 0)
        visible = visible_keys(f, b, N)
        entry = p
        queries = M
        first_row = None
        first_col = None
        below = lo
        above = hi
        if f.placed is not None:
            first_row, queries = placed_queries(f, b, M)
            first_col = placed_keys(f, b, N)
        if f.placed is not None or MOVES or f.shift is not None:
            shift = placed_diagonal(f, b, M, N)
            if MOVES:
                if lo is not None:
                    below = lo + shift
                if hi is not None:
                    above = hi + shift
            entry = Program(
                queries, N, below, above, scale, BM, BN, D, DV, BD, BDV, EVEN_M, EVEN_N, PRECISION, WIDE, first_row, first_col, shift
            )  # fmt: skip
        q_at = q + offset(b, q_strides[0]) + offset(head, q_strides[2])
        k_at = k + offset(b, k_strides[0]) + offset(head // groups, k_strides[2])
        v_at = v + offset(b, v_strides[0]) + offset(head // groups, v_strides[2])
        do_at = dout + offset(b, dout_strides[0]) + offset(head, dout_strides[2])
        lse_at = lse + offset(b, lse_strides[0]) + offset(head, lse_strides[1])
        delta_at = delta_in + offset(b * heads + head, M)
        rest_at = rest_in
        if rest_in is not None:
            rest_at = rest_in + offset(b * heads + head, M)
        if LOADED:
            tile = own_bias
        else:
            there = Span(first_row, queries)
            span = Span(first_col, visible)
            tile = bias_tile(f, at, m0, n0, i, j, there, span, not EVEN_M, not EVEN_N or HIDES, WIDE)
        seen = mask_tile(f, at, m0, n0, i, j, M, visible, not EVEN_M, not EVEN_N or HIDES, WIDE)
        t = Round(
            q_at, k_at, v_at, do_at, q_strides[1], k_strides[1], v_strides[1], dout_strides[1], lse_at, rest_at, delta_at, at, visible,
        )  # fmt: skip
        if SKIPS or HIDES:
            shows = n0 < visible
            if f.placed is not None:
                shows = shows & (n0 + BN > first_col) & (m0 < queries) & (m0 + BM > first_row)
            if MOVES and lo is not None:
                shows = shows & (n0 + BN - 1 - m0 >= below)
            if MOVES and hi is not None:
                shows = shows & (n0 - (m0 + BM - 1) <= above)
            if SKIPS:
                shows = shows & shows_anything(seen)
            if shows:
                acc += _ds(entry, t, f, tile, seen, m0, n0, i, j, FIXED and not MOVES)
        else:
            acc += _ds(entry, t, f, tile, seen, m0, n0, i, j, FIXED)

    own = dbias_out + offset(part, dbias_strides[0])
    own += offset(own_b0, dbias_strides[1]) + offset(own_b1, dbias_strides[2]) + offset(own_head, dbias_strides[3])
    if FIXED:
        acc = tl.where(in_band(tm * BM + i, tn * BN + j, N, own_lo, own_hi), acc, 0.0)
        store_tile(own, dbias_strides[4], dbias_strides[5], tm * BM, tn * BN, i, j, M, N, acc, not EVEN_M, not EVEN_N)
    elif VARIES_N:
        cols = tn * BN + tl.arange(0, BN)
        column = tl.sum(acc, 0)
        tl.store(own + offset(cols, dbias_strides[5]), column.to(dbias_out.dtype.element_ty), mask=cols < N)
    elif VARIES_M:
        rows = tm * BM + tl.arange(0, BM)
        column = tl.sum(acc, 1)
        tl.store(own + offset(rows, dbias_strides[4]), column.to(dbias_out.dtype.element_ty), mask=rows < M)
    else:
        tl.store(own, tl.sum(tl.sum(acc, 1), 0).to(dbias_out.dtype.element_ty))


@triton.jit
def dbias_sum(parts, total, elements, splits, BLOCK: tl.constexpr):
    """One program owns BLOCK elements of dbias and adds their ``splits`` partial sums in order, in float32."""
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    acc = tl.zeros([BLOCK], tl.float32)
    for part in range(splits):
        acc += tl.load(parts + offset(part, elements) + at, mask=inside, other=0.0)
    tl.store(total + at, acc.to(total.dtype.element_ty), mask=inside)
