"""The backward kernels that give dq, dk and dv, and the gradient of a bias where it falls out of these passes.

With ``p = 2^(s - lse)`` and ``delta = rowsum(out * dout) - dlse``:
    dv = pᵀ dout;   ds = p * (dout vᵀ - delta);   dk = scale dsᵀ q;   dq = scale ds k
where dropout multiplies p of dv, and dout vᵀ, by its keep-mask over 1 - p, and a soft cap multiplies ds by its derivative, but for dbias.
Two passes, each of which owns its output tile, so nothing is added atomically and results are bitwise reproducible. The pass for dq has
every tile of ds once, so it writes the gradient of a bias of full shape; the pass for dk and dv sums ds over all queries on its way, which
is the gradient of a bias that varies over keys only, unless query heads share a key head: those it walks one after the other, so that dk
and dv take no buffer per query head. All other biases have a kernel of their own (``dbias.py``). Launched by ``launch/portable.py``. sᵀ and
dpᵀ come straight from ``k qᵀ`` and ``v doutᵀ``: no tile is transposed in registers (Triton 3.4 to 3.7 has miscompiled that on Hopper).
"""

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
    through_cap,
    visible_keys,
    visible_queries,
)
from .prims import (
    LOG2E,
    SMALL_LSE_LIMIT,
    all_lse_small,
    between,
    in_band,
    is_small,
    load_lse_log2,
    load_rows,
    load_vector,
    locate,
    offset,
    probabilities,
    segments,
    split_rest,
    store_rows,
    store_tile,
)
from .records import record


@triton.jit
def delta(
    out, dout, dlse, delta_out, out_strides, dout_strides, dlse_strides, heads, M, f,
    BM: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program owns BM queries of one head: ``delta = rowsum(out * dout) - dlse``, written as contiguous (batch, head, query).

    f: ``features.Features`` that tell which queries there are; delta of others is 0.
    """
    tile, head, b = locate(tl.cdiv(M, BM), heads, 1, "tile", False)
    m0 = tile * BM
    first_row = None
    end = M
    if f.placed is not None:
        first_row, end = placed_queries(f, b, M)
    out += offset(b, out_strides[0]) + offset(head, out_strides[2])
    dout += offset(b, dout_strides[0]) + offset(head, dout_strides[2])
    o_tile = load_rows(out, out_strides[1], m0, end, BM, DV, BDV, True, WIDE, first_row).to(tl.float32)
    do_tile = load_rows(dout, dout_strides[1], m0, end, BM, DV, BDV, True, WIDE, first_row).to(tl.float32)
    row = tl.sum(o_tile * do_tile, 1)
    rows = m0 + tl.arange(0, BM)
    if dlse is not None:
        dlse += offset(b, dlse_strides[0]) + offset(head, dlse_strides[1])
        row -= tl.load(dlse + rows * dlse_strides[2], mask=between(rows, end, first_row), other=0.0)
    tl.store(delta_out + offset(b * heads + head, M) + rows, row, mask=rows < M)


@record
class Keys:
    """BN keys of one key head of batch entry b, from n0 on: k and v, tiles, and where the rows of that entry's query heads begin."""

    k: object
    v: object
    n0: object
    b: object
    first_query: object
    first_key: object
    all_queries: object
    kv_head: object
    heads: object
    groups: object
    batch_inner: object
    q: object
    dout: object
    lse: object
    rest: object
    delta: object
    q_strides: object
    dout_strides: object
    lse_strides: object
    GROUPED: tl.constexpr
    NEED_DK: tl.constexpr
    NEED_DV: tl.constexpr
    NEED_DB: tl.constexpr
    PACKED: tl.constexpr


@record
class Rows:
    """Where the rows of one query head lie; at: ``features.at_head``."""

    q: object
    dout: object
    lse: object
    rest: object
    delta: object
    at: object


@triton.jit
def _fold_queries(sums, p, t, f, rows, seen, m0, i, j, EXACT: tl.constexpr, MASKED: tl.constexpr):
    """Fold one query block into sums, (dk, dv, db) of one key tile. ``seen`` is its tile of the mask. EXACT: also where scores are huge."""
    dk, dv, db = sums
    q_tile = load_rows(rows.q, t.q_strides[1], m0, p.M, p.BM, p.D, p.BD, MASKED, p.WIDE, p.first_query)  # [BM, BD]
    lse_log2 = load_lse_log2(rows.lse, m0, p.M, p.BM, MASKED)
    st = tl.dot(t.k, tl.trans(q_tile), input_precision=p.PRECISION)  # [BN, BM]
    bias = bias_tile(f, rows.at, m0, t.n0, i, j, Span(p.first_query, p.M), Span(None, p.N), MASKED, not p.EVEN_N, p.WIDE)
    st, slope = scored(p, f, rows.at, st, bias, seen, m0, t.n0, i, j, EXACT)
    if MASKED:
        st = tl.where(in_band(m0 + i, t.n0 + j, p.N, p.lo, p.hi), st, float("-inf"))
    ADDS: tl.constexpr = f.bias is not None or f.slopes is not None
    if EXACT and rows.rest is not None:
        top, rest = split_rest(lse_log2, load_vector(rows.rest, m0, p.M, p.BM, MASKED))
        pt = probabilities(st, top[None, :], rest[None, :], True, not ADDS)
    else:
        pt = probabilities(st, lse_log2[None, :], 0.0, False, ADDS)
    do_tile = load_rows(rows.dout, t.dout_strides[1], m0, p.M, p.BM, p.DV, p.BDV, MASKED, p.WIDE, p.first_query)  # [BM, BDV]
    if t.NEED_DV:
        kept = drop(f, rows.at, pt, m0, t.n0, p.BM, p.BN, True)
        dv = tl.dot(kept.to(do_tile.dtype), do_tile, dv, input_precision=p.PRECISION)
    if t.NEED_DK or t.NEED_DB:
        row = load_vector(rows.delta, m0, p.M, p.BM, MASKED)
        dpt = tl.dot(t.v, tl.trans(do_tile), input_precision=p.PRECISION)  # [BN, BM]
        dpt = rescaled(f, drop(f, rows.at, dpt, m0, t.n0, p.BM, p.BN, True))
        dst = pt * (dpt - row[None, :])
        if t.NEED_DB:
            db += tl.sum(dst, 1)
        if t.NEED_DK:
            dst = through_cap(f, dst, slope)
            dk = tl.dot(dst.to(q_tile.dtype), q_tile, dk, input_precision=p.PRECISION)
    return dk, dv, db


@triton.jit
def _walk_queries(dk, dv, db, p, t, f, begin, end, EXACT: tl.constexpr, MASKED: tl.constexpr):
    """Fold the query blocks ``[begin, end)`` of each query head of the key head into (dk, dv, db), on transposed tiles ``[BN, BM]``."""
    i = tl.arange(0, p.BM)[None, :]
    j = tl.arange(0, p.BN)[:, None]
    # One loop over heads and blocks, not one in the other: what the compiler hoists out of it need not outlive it, and it loads ahead
    # across heads.
    count = end - begin
    first = begin
    last = end
    if t.GROUPED:
        first = 0
        last = count * t.groups
    at = at_head(f, t.b, t.kv_head, t.heads, t.batch_inner, t.first_query, t.first_key)
    # A branch keeps the compiler from loading ahead: it is worth that only for a mask that hides blocks, of queries and keys.
    if f.mask is not None:
        SKIPS: tl.constexpr = f.mask_strides[3] is not None and f.mask_strides[4] is not None
    else:
        SKIPS: tl.constexpr = False
    for step in tl.range(first, last):
        if t.GROUPED:
            head = t.kv_head * t.groups + step // count
            block = begin + step % count
            here = at_head(f, t.b, head, t.heads, t.batch_inner, t.first_query, t.first_key)
        else:
            head = t.kv_head
            block = step
            here = at
        m0 = block * p.BM
        q_at = t.q + offset(head, t.q_strides[2])
        do_at = t.dout + offset(head, t.dout_strides[2])
        lse_at = t.lse + offset(head, t.lse_strides[1])
        delta_at = t.delta
        rest_at = t.rest
        if t.NEED_DK or t.NEED_DB:
            delta_at = statistics(t.delta, t.b, head, t.heads, t.all_queries, t.first_query, t.PACKED)
        if t.rest is not None:
            rest_at = statistics(t.rest, t.b, head, t.heads, t.all_queries, t.first_query, t.PACKED)
        rows = Rows(q_at, do_at, lse_at, rest_at, delta_at, here)
        seen = mask_tile(f, here, m0, t.n0, i, j, p.M, p.N, MASKED, not p.EVEN_N, p.WIDE)
        if SKIPS:
            if shows_anything(seen):
                dk, dv, db = _fold_queries((dk, dv, db), p, t, f, rows, seen, m0, i, j, EXACT, MASKED)
        else:
            dk, dv, db = _fold_queries((dk, dv, db), p, t, f, rows, seen, m0, i, j, EXACT, MASKED)
    return dk, dv, db


@triton.jit
def dkdv(
    q, k, v, f, dout, lse, rest, delta_in, dk_out, dv_out, dbias_out,
    q_strides, k_strides, v_strides, dout_strides, lse_strides, dk_strides, dv_strides, dbias_strides,
    batch, heads, groups, batch_inner, M, N, lo, hi, scale, packed,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """One program owns BN keys of one key head and walks the queries of its ``groups`` query heads that see them:

        dk += scale dsᵀ q,  dv += pᵀ dout,  db += colsum ds

    An output that is None is not computed; GROUPED says that groups is not 1, and then dbias_out is None. It holds a row of keys per
    (outer batch, inner batch, head), which are three of its strides; the fourth is along keys. Other strides and f as in ``forward``.
    """
    all_queries = M
    if packed is None:
        tile, kv_head, b = locate(tl.cdiv(N, BN), heads // groups, batch, ORDER, lo is not None)
        first_query = b
        first_key = b
    else:
        e = of_program(packed, batch, BN, True, lo is not None)
        tile, kv_head, b, first_query, M, first_key, N = e.tile, e.head, e.sequence, e.first_query, e.queries, e.first_key, e.keys
        if lo is not None:
            lo += diagonal(packed, M, N)
        if hi is not None:
            hi += diagonal(packed, M, N)
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
    n0 = tile * BN
    q += offset(first_query, q_strides[0])
    k += offset(first_key, k_strides[0]) + offset(kv_head, k_strides[2])
    v += offset(first_key, v_strides[0]) + offset(kv_head, v_strides[2])
    dout += offset(first_query, dout_strides[0])
    lse += offset(first_query, lse_strides[0])
    NEED_DK: tl.constexpr = dk_out is not None
    NEED_DV: tl.constexpr = dv_out is not None
    NEED_DB: tl.constexpr = dbias_out is not None
    HIDES: tl.constexpr = f.lengths is not None or f.most_keys is not None or f.placed is not None
    visible = visible_keys(f, b, N)
    queries = M
    if HIDES:
        queries = tl.where(n0 < visible, M, 0)  # nobody sees a tile that is hidden
    if f.placed is not None:
        queries = tl.where((n0 + BN > first_col) & (first_row < M), queries, 0)

    # Keys past the end load as zeros and their rows are never stored; queries past the end have lse +inf, so their p is 0.
    k_tile = load_rows(k, k_strides[1], n0, visible, BN, D, BD, not EVEN_N or HIDES, WIDE, first_col)  # [BN, BD]
    v_tile = load_rows(v, v_strides[1], n0, visible, BN, DV, BDV, not EVEN_N or HIDES, WIDE, first_col)  # [BN, BDV]
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BDV], tl.float32)
    db = tl.zeros([BN], tl.float32)
    low = -hi if hi is not None else None  # the band as keys see queries
    high = -lo if lo is not None else None
    first_of_tile = n0
    last_of_tile = min(n0 + BN, N) - 1
    if f.placed is not None:
        first_of_tile = max(n0, first_col)
        last_of_tile = min(n0 + BN, visible) - 1
    begin, full_begin, full_end, end = segments(first_of_tile, last_of_tile, queries, low, high, BM, first_row)
    p = Program(M, N, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_M, EVEN_N, PRECISION, WIDE, first_row, first_col, shift)
    t = Keys(
        k_tile, v_tile, n0, b, first_query, first_key, all_queries, kv_head, heads, groups, batch_inner, q, dout, lse, rest, delta_in,
        q_strides, dout_strides, lse_strides,
        GROUPED, NEED_DK, NEED_DV, NEED_DB, packed is not None,
    )  # fmt: skip
    # Beside what is added, scores are always taken for huge. Else it is asked for once, and the loops that need not care are the faster.
    ADDS: tl.constexpr = f.bias is not None or f.slopes is not None
    ASKED: tl.constexpr = rest is not None and not ADDS
    first = begin
    last = end
    if ASKED:
        small = all_lse_small(lse, lse_strides[1], kv_head * groups, groups, begin * BM, min(end * BM, M))
        first = tl.where(small, end, begin)  # of the blocks for the loop that cares
        full_begin = tl.where(small, full_begin, begin)
        full_end = tl.where(small, full_end, begin)
        last = tl.where(small, end, begin)
    if hi is not None or f.placed is not None:
        dk, dv, db = _walk_queries(dk, dv, db, p, t, f, begin, full_begin, ADDS, True)
    dk, dv, db = _walk_queries(dk, dv, db, p, t, f, full_begin, full_end, ADDS, False)
    if lo is not None or not EVEN_M:
        dk, dv, db = _walk_queries(dk, dv, db, p, t, f, full_end, last, ADDS, True)
    if ASKED:
        dk, dv, db = _walk_queries(dk, dv, db, p, t, f, first, end, True, True)
    cols = n0 + tl.arange(0, BN)
    if HIDES:  # hidden keys of a tile that shows others: their rows hold what nobody masked
        dk = tl.where(between(cols[:, None], visible, first_col), dk, 0.0)
        dv = tl.where(between(cols[:, None], visible, first_col), dv, 0.0)
        db = tl.where(between(cols, visible, first_col), db, 0.0)
    if NEED_DK:
        dk_out += offset(first_key, dk_strides[0]) + offset(kv_head, dk_strides[2])
        store_rows(dk_out, dk_strides[1], n0, N, dk * scale, BN, D, BD, not EVEN_N, WIDE)
    if NEED_DV:
        dv_out += offset(first_key, dv_strides[0]) + offset(kv_head, dv_strides[2])
        store_rows(dv_out, dv_strides[1], n0, N, rescaled(f, dv), BN, DV, BDV, not EVEN_N, WIDE)
    if NEED_DB:
        dbias_out += offset(b // batch_inner, dbias_strides[0]) + offset(b % batch_inner, dbias_strides[1])
        dbias_out += offset(kv_head, dbias_strides[2])
        if packed is not None:
            if f.bias_by_key is not None:
                dbias_out += offset(first_key, dbias_strides[3])
            N = visible
        tl.store(dbias_out + offset(cols, dbias_strides[3]), db.to(dbias_out.dtype.element_ty), mask=cols < N)


@record
class Queries:
    """BM queries of one head, from m0 on: q, dout and their statistics, tiles, and where keys, values and dbias lie; at:
    ``features.at_head``; here: queries of dbias.
    """

    q: object
    dout: object
    lse_log2: object
    rest: object
    delta: object
    k: object
    v: object
    k_row: object
    v_row: object
    dbias: object
    dbias_row: object
    dbias_col: object
    at: object
    m0: object
    here: object
    visible: object
    NEED_DQ: tl.constexpr
    CLEARED: tl.constexpr


@triton.jit
def _fold_keys(dq, p, t, f, seen, n0, i, j, HAS_REST: tl.constexpr, MASKED: tl.constexpr):
    """Fold one key block into dq of one query tile, and write its ds if dbias is wanted. ``seen`` is its tile of the mask."""
    k_tile = load_rows(t.k, t.k_row, n0, t.visible, p.BN, p.D, p.BD, MASKED, p.WIDE, p.first_key)  # [BN, BD]
    s = tl.dot(t.q, tl.trans(k_tile), input_precision=p.PRECISION)  # [BM, BN]
    rows = Span(p.first_query, p.M)
    cols = Span(p.first_key, t.visible)
    bias = bias_tile(f, t.at, t.m0, n0, i, j, rows, cols, not p.EVEN_M, MASKED, p.WIDE)
    s, slope = scored(p, f, t.at, s, bias, seen, t.m0, n0, i, j, HAS_REST)
    if MASKED:
        s = tl.where(in_band(t.m0 + i, n0 + j, t.visible, p.lo, p.hi, p.first_key), s, float("-inf"))
    ADDS: tl.constexpr = f.bias is not None or f.slopes is not None
    if HAS_REST:  # in each block anew, so that the loop for small lse has no more to keep
        top, rest = split_rest(t.lse_log2, t.rest)
    else:
        top, rest = t.lse_log2, t.rest
    weights = probabilities(s, top[:, None], rest[:, None], HAS_REST, HAS_REST != ADDS)
    v_tile = load_rows(t.v, t.v_row, n0, t.visible, p.BN, p.DV, p.BDV, MASKED, p.WIDE, p.first_key)  # [BN, BDV]
    dp = tl.dot(t.dout, tl.trans(v_tile), input_precision=p.PRECISION)  # [BM, BN]
    dp = rescaled(f, drop(f, t.at, dp, t.m0, n0, p.BM, p.BN, False))
    ds = weights * (dp - t.delta[:, None])
    if t.dbias is not None:
        M = visible_queries(f, t.here)
        N = p.N
        if f.most_keys is not None:
            N = t.visible
        store_tile(t.dbias, t.dbias_row, t.dbias_col, t.m0, n0, i, j, M, N, ds, not p.EVEN_M, MASKED)
    if t.NEED_DQ:
        ds = through_cap(f, ds, slope)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=p.PRECISION)
    return dq


@triton.jit
def _walk_keys(dq, p, t, f, begin, end, HAS_REST: tl.constexpr, MASKED: tl.constexpr):
    """Fold the key blocks ``[begin, end)`` into dq of one query tile, and write their ds if dbias is wanted."""
    i = tl.arange(0, p.BM)[:, None]
    j = tl.arange(0, p.BN)[None, :]
    # A branch keeps the compiler from loading ahead: it is worth that only for a mask that hides blocks, of queries and keys.
    if f.mask is not None:
        SKIPS: tl.constexpr = f.mask_strides[3] is not None and f.mask_strides[4] is not None
    else:
        SKIPS: tl.constexpr = False
    for block in tl.range(begin, end):
        n0 = block * p.BN
        seen = mask_tile(f, t.at, t.m0, n0, i, j, p.M, t.visible, not p.EVEN_M, MASKED, p.WIDE)
        if SKIPS:
            if shows_anything(seen):
                dq = _fold_keys(dq, p, t, f, seen, n0, i, j, HAS_REST, MASKED)
            elif t.dbias is not None and not t.CLEARED:
                nothing = tl.zeros([p.BM, p.BN], tl.float32)
                store_tile(t.dbias, t.dbias_row, t.dbias_col, t.m0, n0, i, j, t.here, p.N, nothing, not p.EVEN_M, MASKED)
        else:
            dq = _fold_keys(dq, p, t, f, seen, n0, i, j, HAS_REST, MASKED)
    return dq


@triton.jit
def dq(
    q, k, v, f, dout, lse, rest, delta_in, dq_out, dbias_out,
    q_strides, k_strides, v_strides, dout_strides, lse_strides, dq_strides, dbias_strides,
    batch, heads, groups, batch_inner, M, N, lo, hi, scale, packed, splits,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """One program owns BM queries of one head and walks the keys that they see: dq += scale ds k, and dbias = ds.

    An output that is None is not computed. dbias_out has the full shape, and zeros are written where nothing is visible; its strides are
    (outer batch, inner batch, head, row, column). Other strides, f and groups as in ``forward``.

    splits: parts that the keys of a tile are cut into, each with a program; then dq_out comes in float32 parts, the last of its strides,
    and ORDER is "tile". None: one program walks them all.
    """
    all_queries = M
    if packed is None:
        tile, head, b = locate(tl.cdiv(M, BM), heads, batch, ORDER, hi is not None)
        if splits is not None:
            split = b // batch
            b = b % batch
        first_query = b
        first_key = b
    else:
        e = of_program(packed, batch, BM, False, hi is not None)
        tile, head, b, first_query, M, first_key, N = e.tile, e.head, e.sequence, e.first_query, e.queries, e.first_key, e.keys
        if lo is not None:
            lo += diagonal(packed, M, N)
        if hi is not None:
            hi += diagonal(packed, M, N)
    here = M  # rows of dq and dbias
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
    dout += offset(first_query, dout_strides[0]) + offset(head, dout_strides[2])
    NEED_DQ: tl.constexpr = dq_out is not None
    if NEED_DQ:
        dq_out += offset(first_query, dq_strides[0]) + offset(head, dq_strides[2])
        if splits is not None:
            dq_out += offset(split, dq_strides[3])
    if dbias_out is not None:
        dbias_out += offset(b // batch_inner, dbias_strides[0]) + offset(b % batch_inner, dbias_strides[1])
        dbias_out += offset(head, dbias_strides[2])
        dbias_row = dbias_strides[3]
        dbias_col = dbias_strides[4]
        if f.bias_by_query is not None:
            dbias_out += offset(first_query, dbias_row)
    else:
        dbias_row = 0
        dbias_col = 0
    lse += offset(first_query, lse_strides[0]) + offset(head, lse_strides[1])
    delta_in = statistics(delta_in, b, head, heads, all_queries, first_query, packed is not None)
    at = at_head(f, b, head, heads, batch_inner, first_query, first_key)
    visible = visible_keys(f, b, N)

    q_tile = load_rows(q, q_strides[1], m0, M, BM, D, BD, not EVEN_M, WIDE, first_row)  # [BM, BD]
    do_tile = load_rows(dout, dout_strides[1], m0, M, BM, DV, BDV, not EVEN_M, WIDE, first_row)  # [BM, BDV]
    lse_log2 = load_lse_log2(lse, m0, M, BM, not EVEN_M)
    rest_row = lse_log2
    if rest is not None:
        rest_row = load_vector(statistics(rest, b, head, heads, all_queries, first_query, packed is not None), m0, M, BM, not EVEN_M)
    row = load_vector(delta_in, m0, M, BM, not EVEN_M)
    acc = tl.zeros([BM, BD], tl.float32)
    first_of_tile = m0
    seen = visible
    if f.placed is not None:
        first_of_tile = max(m0, first_row)
        seen = tl.where((first_of_tile < min(m0 + BM, M)) & (first_col < visible), visible, 0)
    begin, full_begin, full_end, end = segments(first_of_tile, min(m0 + BM, M) - 1, seen, lo, hi, BN, first_col)
    hidden_before = begin
    hidden_from = end
    if splits is not None:
        chunk = tl.cdiv(end - begin, splits)
        begin = tl.minimum(begin + split * chunk, end)
        end = tl.minimum(begin + chunk, end)
        full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
        full_end = tl.minimum(tl.maximum(full_end, begin), end)
        hidden_before = tl.where(split == 0, hidden_before, 0)
        hidden_from = tl.where(split == 0, hidden_from, tl.cdiv(N, BN))
    p = Program(M, N, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_M, EVEN_N, PRECISION, WIDE, first_row, first_col, shift)
    t = Queries(
        q_tile, do_tile, lse_log2, rest_row, row, k, v, k_strides[1], v_strides[1], dbias_out, dbias_row, dbias_col, at, m0, here, visible,
        NEED_DQ, packed is not None,
    )  # fmt: skip
    # As in dkdv: which blocks are for the loops that need not care if scores are huge.
    ADDS: tl.constexpr = rest is not None and (f.bias is not None or f.slopes is not None)
    ASKED: tl.constexpr = rest is not None and not ADDS
    first = begin
    last = end
    if ASKED:
        small = is_small(lse_log2, SMALL_LSE_LIMIT * LOG2E)
        first = tl.where(small, end, begin)
        full_begin = tl.where(small, full_begin, begin)
        full_end = tl.where(small, full_end, begin)
        last = tl.where(small, end, begin)
    if lo is not None or f.placed is not None:
        acc = _walk_keys(acc, p, t, f, begin, full_begin, ADDS, True)
    acc = _walk_keys(acc, p, t, f, full_begin, full_end, ADDS, False)
    if hi is not None or not EVEN_N or f.lengths is not None or f.most_keys is not None or f.placed is not None:
        acc = _walk_keys(acc, p, t, f, full_end, last, ADDS, True)
    if ASKED:
        acc = _walk_keys(acc, p, t, f, first, end, True, True)
    if NEED_DQ:
        store_rows(dq_out, dq_strides[1], m0, here, acc * scale, BM, D, BD, not EVEN_M, WIDE)
    if dbias_out is not None and packed is None and (lo is not None or hi is not None or f.lengths is not None or f.placed is not None):
        i = tl.arange(0, BM)[:, None]
        j = tl.arange(0, BN)[None, :]
        nothing = tl.zeros([BM, BN], tl.float32)
        for block in tl.range(0, hidden_before):
            store_tile(dbias_out, dbias_row, dbias_col, m0, block * BN, i, j, here, N, nothing, not EVEN_M, not EVEN_N)
        for block in tl.range(hidden_from, tl.cdiv(N, BN)):
            store_tile(dbias_out, dbias_row, dbias_col, m0, block * BN, i, j, here, N, nothing, not EVEN_M, not EVEN_N)
