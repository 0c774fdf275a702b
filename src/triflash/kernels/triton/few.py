"""The kernel for few queries on many keys: split-KV attention, also on a KV cache (contiguous or paged).

Where the forward kernel has a program for each tile of queries, of which there are fewer than SMs, this one has one for each tile of rows
and *chunk* of keys. Rows are queries times the query heads that share a key head, so that keys are read once for all of them. Chunks are
as long as the device's own lengths say: the host only says into how many parts a request is cut at most. What parts give is put together
by ``combine.py``, in the order of the keys. Launched by ``launch/few.py``.
"""

import triton
import triton.language as tl

from .features import Program, Span, at_head, bias_tile, drop_at, mask_tile, rescaled, scored, through_cap, visible_keys
from .few_keys import WEIGHT_SHIFT, Part, e4m3_columns, even_and_odd, load_keys, page_of, scaled_to_fp16
from .prims import LN2, LOG2E, clamped, gdc_launch_dependents, in_band, lse_rest, offset, probabilities, segments, split_rest
from .records import record


@record
class Rows:
    """BM rows, each a query of a head; those behind the last repeat it. query: [BM, 1], counted from m0. at: ``features.at_head``.

    odd: of an e4m3 cache, the odd columns of q, which holds the even ones; else None. q_scale: what a row's products are to be multiplied
    by, [BM, 1], or None.
    """

    q: object
    odd: object
    q_scale: object
    query: object
    at: object
    m0: object


@triton.jit
def _walk(acc, odd, l, m, p, t, f, c, kv, begin, end, MASKED: tl.constexpr):
    """Fold the key blocks ``[begin, end)`` into the running (acc, l, m) of ``forward.py``; ``MASKED`` where some row does not see some key.
    kv: where keys and values of the head lie, and their strides. odd: of an e4m3 cache, the odd columns of
    acc, which holds the even ones.
    """
    PAIRED: tl.constexpr = t.odd is not None
    SHARE: tl.constexpr = 2 if PAIRED else 1
    j = tl.arange(0, p.BN)[None, :]
    for block in tl.range(begin, end):
        n0 = block * p.BN
        page = page_of(c, n0, p.BN, MASKED)
        k_tile = load_keys(kv[0], kv[2], c, page, n0, p.BN, p.D // SHARE, p.BD // SHARE, MASKED, p.WIDE)
        if PAIRED:
            s = tl.dot(t.q, e4m3_columns(tl.trans(k_tile), False, c.PTX))  # [BM, BN]
            s = tl.dot(t.odd, e4m3_columns(tl.trans(k_tile), True, c.PTX), s)
            if t.q_scale is not None:
                s = s * t.q_scale
        else:
            s = tl.dot(t.q, tl.trans(k_tile.to(t.q.dtype)), input_precision=p.PRECISION)
        seen = mask_tile(f, t.at, t.m0, n0, t.query, j, p.M, c.last, False, MASKED, p.WIDE)
        bias = bias_tile(f, t.at, t.m0, n0, t.query, j, Span(None, p.M), Span(None, c.last), False, MASKED, p.WIDE)
        s, _ = scored(p, f, t.at, s, bias, seen, t.m0, n0, t.query, j, True)
        if MASKED:
            visible = in_band(t.m0 + t.query, n0 + j, c.last, p.lo, p.hi)
            if c.first is not None:
                visible = visible & (n0 + j >= c.first)
            s = tl.where(visible, s, float("-inf"))
        most = tl.max(s, 1)
        if PAIRED:
            most -= WEIGHT_SHIFT
        m_new = tl.maximum(m, most)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key yet: 2^(-inf - 0) = 0, never NaN
        weights = tl.exp2(s - m_safe[:, None])
        shrink = tl.exp2(m - m_safe)
        l = l * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        v_tile = load_keys(kv[1], kv[3], c, page, n0, p.BN, p.DV // SHARE, p.BDV // SHARE, MASKED, p.WIDE)
        weights = drop_at(f, t.at, weights, (t.m0 + t.query).to(tl.uint32), (n0 + j).to(tl.uint32)).to(t.q.dtype)
        if PAIRED:
            odd = odd * shrink[:, None]
            acc = tl.dot(weights, e4m3_columns(v_tile, False, c.PTX), acc)
            odd = tl.dot(weights, e4m3_columns(v_tile, True, c.PTX), odd)
        else:
            acc = tl.dot(weights, v_tile.to(t.q.dtype), acc, input_precision=p.PRECISION)
        m = m_new
    return acc, odd, l, m


@triton.jit
def _attend(p, f, c, kv, q, out, lse, rest, strides, tile, first_query, HIDES: tl.constexpr):
    """Attend from BM rows to a part of the keys and store what comes of it. first_query: of the request, in rows of packed queries; else 0.
    strides: of q (row, head), out (row, head) and of lse and rest along heads. HIDES: the last key shown may be any.

    Beside one long request, most parts of the others have no keys: these programs store lse and are done.
    """
    m0 = tile * p.BM // c.groups
    last_row = tl.minimum(tile * p.BM + p.BM, p.M * c.groups) - 1
    begin, full_begin, full_end, end = segments(m0, last_row // c.groups, c.last, p.lo, p.hi, p.BN)
    if c.first is not None:
        least = tl.minimum(c.first // p.BN, end)
        begin = tl.maximum(begin, least)
        full_begin = tl.maximum(full_begin, tl.minimum(tl.cdiv(c.first, p.BN), end))
        full_end = tl.maximum(full_end, full_begin)
    chunk = tl.maximum(tl.cdiv(end - begin, c.splits), c.least)
    own_begin = tl.minimum(begin + c.split * chunk, end)
    own_end = tl.minimum(own_begin + chunk, end)
    if (own_begin < own_end) | (c.split == 0):
        blocks = (own_begin, full_begin, full_end, own_end)
        _attend_to(p, f, c, kv, q, out, lse, rest, strides, (tile, first_query), blocks, HIDES)
    else:
        r = tile * p.BM + tl.arange(0, p.BM)
        at = offset(c.kv_head * c.groups + r % c.groups, strides[4]) + first_query + r // c.groups
        tl.store(lse + at, tl.full([p.BM], float("-inf"), tl.float32), mask=r < p.M * c.groups)


@triton.jit
def _attend_to(p, f, c, kv, q, out, lse, rest, strides, place, blocks, HIDES: tl.constexpr):
    """:func:`_attend` to the blocks ``[own_begin, own_end)``, of which all rows see those of ``[full_begin, full_end)`` whole."""
    tile, first_query = place
    own_begin, full_begin, full_end, own_end = blocks
    r = tl.minimum(tile * p.BM + tl.arange(0, p.BM), p.M * c.groups - 1)
    m0 = tile * p.BM // c.groups
    query = r // c.groups - m0
    head = c.kv_head * c.groups + r % c.groups
    d = tl.arange(0, p.BD)[None, :]
    rows = first_query + m0 + query
    pointers = q + (offset(rows, strides[0]) + offset(head, strides[1]))[:, None] + d
    q_tile = tl.load(pointers, mask=d < p.D, other=0.0)
    PAIRED: tl.constexpr = kv[0].dtype.element_ty == tl.int16
    odd_tile = None
    q_scale = None
    if PAIRED:
        if q_tile.dtype == tl.bfloat16:
            q_tile, q_scale = scaled_to_fp16(q_tile)
        q_tile, odd_tile = even_and_odd(q_tile, p.BM, p.BD)
    # Rows that repeat the last one read what it reads, so that no load of a row needs a mask.
    at = at_head(f, c.b, head[:, None], c.heads, c.batch_inner, 0, 0)
    t = Rows(q_tile, odd_tile, q_scale, query[:, None], at, m0)

    m = tl.full([p.BM], float("-inf"), tl.float32)
    l = tl.zeros([p.BM], tl.float32)
    sink = m
    if f.sink is not None:  # a key of the first part
        sink = tl.where(c.split == 0, tl.load(f.sink + offset(head, f.sink_stride)).to(tl.float32) * LOG2E, m)
        if not PAIRED:
            m = sink
            l = tl.where(c.split == 0, 1.0, l)
    acc = tl.zeros([p.BM, p.BDV // 2 if PAIRED else p.BDV], tl.float32)
    odd = acc  # read for e4m3 caches alone
    if p.lo is not None or c.first is not None:
        acc, odd, l, m = _walk(acc, odd, l, m, p, t, f, c, kv, own_begin, tl.minimum(full_begin, own_end), True)
    whole_begin = tl.maximum(full_begin, own_begin)
    acc, odd, l, m = _walk(acc, odd, l, m, p, t, f, c, kv, whole_begin, tl.minimum(full_end, own_end), False)
    if HIDES or p.hi is not None:
        acc, odd, l, m = _walk(acc, odd, l, m, p, t, f, c, kv, tl.maximum(full_end, own_begin), own_end, True)
    if PAIRED:
        acc = tl.reshape(tl.join(acc, odd), [p.BM, p.BDV])
        if f.sink is not None:  # the last key: float16 would hold no weights far below it
            top = tl.maximum(m, sink)
            safe = tl.where(top == float("-inf"), 0.0, top)
            shrink = tl.exp2(m - safe)
            l = l * shrink + tl.exp2(sink - safe)
            acc = acc * shrink[:, None]
            m = top

    unseen = l == 0.0
    l = tl.where(unseen, 1.0, l)
    acc = rescaled(f, acc / l[:, None])
    if c.v_scale is not None:
        acc = acc * c.v_scale
    there = tile * p.BM + tl.arange(0, p.BM) < p.M * c.groups
    d = tl.arange(0, p.BDV)[None, :]
    pointers = out + (offset(rows, strides[2]) + offset(head, strides[3]))[:, None] + d
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=there[:, None] & (d < p.DV))
    row_lse = tl.where(unseen, float("-inf"), (m + tl.log2(l)) * LN2)
    tl.store(lse + offset(head, strides[4]) + rows, row_lse, mask=there)
    if rest is not None:
        tl.store(rest + offset(head, strides[5]) + rows, lse_rest(m, l, row_lse), mask=there)


@triton.jit
def few_forward(
    q, k, v, f, cache, out, lse, rest, q_strides, k_strides, v_strides, out_strides, lse_strides, rest_strides,
    tiles, heads, groups, batch_inner, M, N, lo, hi, scale, splits, least,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    EVEN_N: tl.constexpr, PAGE: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program owns BM rows (queries times grouped heads) of one key head of one request, and one of ``splits`` parts of its keys.

    Strides are (batch, row, head) of q, k, v, (split, batch, row, head) of out and (split, batch, head) of lse and rest, whose last dim is
    rows. With one split these are the results, else parts of them in float32 (``combine.py``). f: ``features.Features``. A part has
    ``least`` blocks at least; what is left over sees no key: lse -inf.

    cache: ``Cache``, without pages if there is none. If there is, a key's stride 0 counts pages, or entries of the cache, N is what a
    request can hold, and lo and hi count from the diagonal that ends at the last query and the last key of the request. Packed queries have
    no stride 0; M is their sum. PAGE: keys of a page. e4m3 caches come as int16, with strides
    to match (``few_keys.py``), and with ``PTX`` their tiles are converted by PTX. PDL: ``combine`` is launched while this kernel runs.
    """
    if PDL:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    tile = pid % tiles
    kv_heads = heads // groups
    kv_head = pid // tiles % kv_heads
    split = pid // tiles // kv_heads % splits
    b = pid // tiles // kv_heads // splits
    out += offset(split, out_strides[0])
    lse += offset(split, lse_strides[0])
    if rest is not None:
        rest += offset(split, rest_strides[0])
    entry = b
    first = None
    table = None
    table_step = 0
    pages = 0
    v_scale = None
    first_query = 0
    CACHED: tl.constexpr = cache.pages is not None
    PACKED: tl.constexpr = cache.offsets_q is not None
    if not PACKED:
        q += offset(b, q_strides[0])
        out += offset(b, out_strides[1])
        lse += offset(b, lse_strides[1])
        if rest is not None:
            rest += offset(b, rest_strides[1])
    last = N
    if f.lengths is not None:
        last = clamped(tl.load(f.lengths + offset(b, f.lengths_stride)), N)
    if CACHED:
        pages = cache.pages
        if cache.lengths is not None:
            last = clamped(tl.load(cache.lengths + offset(b, cache.lengths_stride)), N)
        if cache.offsets_new is not None:
            new_begin = clamped(tl.load(cache.offsets_new + offset(b, cache.offsets_new_stride)), cache.new)
            new_end = clamped(tl.load(cache.offsets_new + offset(b + 1, cache.offsets_new_stride)), cache.new)
            last = tl.minimum(last + tl.maximum(new_end - new_begin, 0), N)
        elif cache.new is not None:
            last = tl.minimum(last + cache.new, N)
        if PACKED:
            first_query = clamped(tl.load(cache.offsets_q + offset(b, cache.offsets_q_stride)), M)
            M = tl.maximum(clamped(tl.load(cache.offsets_q + offset(b + 1, cache.offsets_q_stride)), M) - first_query, 0)
        N = last  # where ALiBi's diagonal and the band end; what is shown may end before
        if lo is not None:
            lo += N - M
        if hi is not None:
            hi += N - M
        if cache.starts is not None:
            first = clamped(tl.load(cache.starts + offset(b, cache.starts_stride)), N)
        if cache.index is not None:
            entry = clamped(tl.load(cache.index + offset(b, cache.index_stride)), cache.pages - 1)
        if cache.table is not None:
            table = cache.table + offset(b, cache.table_strides[0])
            table_step = cache.table_strides[1]
            entry = 0
        if cache.k_scale is not None:
            scale = scale * tl.load(cache.k_scale + b * cache.k_scale_strides[0] + kv_head * cache.k_scale_strides[1])
        if cache.v_scale is not None:
            v_scale = tl.load(cache.v_scale + b * cache.v_scale_strides[0] + kv_head * cache.v_scale_strides[1])
        if f.most_keys is not None:
            last = tl.minimum(last, f.most_keys)
    k += offset(entry, k_strides[0]) + offset(kv_head, k_strides[2])
    v += offset(entry, v_strides[0]) + offset(kv_head, v_strides[2])
    p = Program(M, N, lo, hi, scale, BM, BN, D, DV, BD, BDV, True, EVEN_N, PRECISION, WIDE, None, None, None)
    c = Part(b, kv_head, groups, heads, batch_inner, first, last, split, splits, least, table, table_step, pages, v_scale, PAGE, PTX)
    kv = (k, v, k_strides, v_strides)
    strides = (q_strides[1], q_strides[2], out_strides[2], out_strides[3], lse_strides[2], 0 if rest is None else rest_strides[2])
    HIDES: tl.constexpr = not EVEN_N or f.lengths is not None or CACHED
    if PACKED:
        for each in tl.range(tile, tl.cdiv(M * groups, BM), tiles):
            _attend(p, f, c, kv, q, out, lse, rest, strides, each, first_query, HIDES)
    else:
        _attend(p, f, c, kv, q, out, lse, rest, strides, tile, first_query, HIDES)


@record
class Sums:
    """What a program of ``few_backward`` writes: pointers to the request and the key head, or None, and strides."""

    dk: object
    dv: object
    dk_row: object
    dv_row: object
    dbias: object
    dbias_row: object
    dbias_col: object
    dbias_keys: object
    dbias_keys_step: object


@record
class RowsBack:
    """All rows of a request and key head, tiles with statistics by row; query, at as of ``Rows``, shaped ``[1, BM]``. there: of each,
    whether it is a row. dbias: where each row's part of a bias's gradient begins.
    """

    q: object
    dout: object
    lse_log2: object
    rest: object
    delta: object
    query: object
    at: object
    there: object
    dbias: object


@triton.jit
def _store_keys(base, row_stride, n0, N, x, BN: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    r = tl.arange(0, BN)[:, None]
    d = tl.arange(0, BD)[None, :]
    pointers = base + offset(n0, row_stride) + (r * tl.cast(row_stride, tl.int64) + d)
    mask = d < DIM
    if MASKED:
        mask = mask & (n0 + r < N)
    tl.store(pointers, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _store_block(s, t, p, n0, dk, dv, dst, NEED_DQ: tl.constexpr):
    """Write what a block of keys gets: each of its gradients has one owner, which meets all rows at once."""
    PARTIAL: tl.constexpr = not p.EVEN_N
    if s.dk is not None:
        _store_keys(s.dk, s.dk_row, n0, p.N, dk * p.scale, p.BN, p.D, p.BD, PARTIAL)
    if s.dv is not None:
        _store_keys(s.dv, s.dv_row, n0, p.N, dv, p.BN, p.DV, p.BDV, PARTIAL)
    n = n0 + tl.arange(0, p.BN)
    if s.dbias is not None:
        pointers = t.dbias + offset(n, s.dbias_col)[:, None]
        tl.store(pointers, dst.to(s.dbias.dtype.element_ty), mask=t.there & (n < p.N)[:, None])
    if s.dbias_keys is not None:
        tl.store(s.dbias_keys + offset(n, s.dbias_keys_step), tl.sum(dst, 1).to(s.dbias_keys.dtype.element_ty), mask=n < p.N)


@triton.jit
def _walk_back(dqt, p, t, f, c, kv, s, begin, end, NEED_DQ: tl.constexpr, MASKED: tl.constexpr):
    """Add the blocks ``[begin, end)`` to dqᵀ ``[BD, BM]`` and write what their keys get."""
    j = tl.arange(0, p.BN)[:, None]
    ADDS: tl.constexpr = f.bias is not None or f.slopes is not None
    HAS_REST: tl.constexpr = t.rest is not None
    NEED_DS: tl.constexpr = NEED_DQ or s.dk is not None or s.dbias is not None or s.dbias_keys is not None
    for block in tl.range(begin, end):
        n0 = block * p.BN
        k_tile = load_keys(kv[0], kv[2], c, 0, n0, p.BN, p.D, p.BD, MASKED, p.WIDE)
        st = tl.dot(k_tile, tl.trans(t.q), input_precision=p.PRECISION)  # [BN, BM]
        seen = mask_tile(f, t.at, 0, n0, t.query, j, p.M, c.last, False, MASKED, p.WIDE)
        bias = bias_tile(f, t.at, 0, n0, t.query, j, Span(None, p.M), Span(None, c.last), False, MASKED, p.WIDE)
        st, slope = scored(p, f, t.at, st, bias, seen, 0, n0, t.query, j, HAS_REST)
        if MASKED:
            st = tl.where(in_band(t.query, n0 + j, c.last, p.lo, p.hi), st, float("-inf"))
        if HAS_REST:
            pt = probabilities(st, t.lse_log2, t.rest, True, not ADDS)
        else:
            pt = probabilities(st, t.lse_log2, 0.0, False, ADDS)
        queries = t.query.to(tl.uint32)
        keys = (n0 + j).to(tl.uint32)
        dk = 0.0
        dv = 0.0
        dst = pt
        if s.dv is not None:
            kept = drop_at(f, t.at, pt, queries, keys)
            dv = rescaled(f, tl.dot(kept.to(t.dout.dtype), t.dout, input_precision=p.PRECISION))
        if NEED_DS:
            v_tile = load_keys(kv[1], kv[3], c, 0, n0, p.BN, p.DV, p.BDV, MASKED, p.WIDE)
            dpt = tl.dot(v_tile, tl.trans(t.dout), input_precision=p.PRECISION)
            dpt = rescaled(f, drop_at(f, t.at, dpt, queries, keys))
            dst = pt * (dpt - t.delta)
            through = through_cap(f, dst, slope).to(k_tile.dtype)
            if s.dk is not None:
                dk = tl.dot(through, t.q, input_precision=p.PRECISION)
            if NEED_DQ:
                dqt = tl.dot(tl.trans(k_tile), through, dqt, input_precision=p.PRECISION)
        _store_block(s, t, p, n0, dk, dv, dst, NEED_DQ)
    return dqt


@triton.jit
def _walk_hidden(p, t, s, begin, end):
    """Zeros for the keys of the blocks ``[begin, end)``, which no row sees."""
    for block in tl.range(begin, end):
        dk = tl.zeros([p.BN, p.BD], tl.float32)
        dv = tl.zeros([p.BN, p.BDV], tl.float32)
        dst = tl.zeros([p.BN, p.BM], tl.float32)
        _store_block(s, t, p, block * p.BN, dk, dv, dst, False)


@triton.jit
def few_backward(
    q, k, v, f, dout, lse, rest, delta, dq, dk, dv, dbias, dbias_keys,
    q_strides, k_strides, v_strides, dout_strides, lse_strides, dq_strides, dk_strides, dv_strides, dbias_strides, dbias_keys_strides,
    heads, groups, batch_inner, M, N, lo, hi, scale, splits,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    EVEN_N: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program owns one of ``splits`` parts of the keys of one key head, and has all rows (queries times grouped heads, BM at most):

        dk = scale dsᵀ q,  dv = pᵀ dout,  dqᵀ += scale kᵀ dsᵀ

    so that k and v are read once, a key's gradients are written once, and only dq comes in parts: dq (split, batch, row, head) is float32
    if there are several (``sum_rows``). dbias: as large as the scores, (outer batch, inner batch, head, row, column). dbias_keys: of a
    bias that varies over keys, (outer batch, inner batch, head, column), where groups is 1. None: not computed. Tiles are transposed, as in
    ``backward.dkdv``, and dq too, so that nothing is transposed in registers. Other strides and f as in ``forward``.
    """
    pid = tl.program_id(0)
    kv_heads = heads // groups
    kv_head = pid % kv_heads
    split = pid // kv_heads % splits
    b = pid // kv_heads // splits
    NEED_DQ: tl.constexpr = dq is not None
    r = tl.minimum(tl.arange(0, BM), M * groups - 1)
    exists = tl.arange(0, BM) < M * groups
    query = r // groups
    head = kv_head * groups + r % groups
    d = tl.arange(0, BD)[None, :]
    q_tile = tl.load(
        q + offset(b, q_strides[0]) + (offset(query, q_strides[1]) + offset(head, q_strides[2]))[:, None] + d,
        mask=exists[:, None] & (d < D), other=0.0,
    )  # fmt: skip
    d = tl.arange(0, BDV)[None, :]
    do_tile = tl.load(
        dout + offset(b, dout_strides[0]) + (offset(query, dout_strides[1]) + offset(head, dout_strides[2]))[:, None] + d,
        mask=exists[:, None] & (d < DV), other=0.0,
    )  # fmt: skip
    lse_row = tl.load(lse + offset(b, lse_strides[0]) + offset(head, lse_strides[1]) + query)
    # A row that saw no key, or is none, has +inf: its p is 0.
    lse_row = tl.where(exists & (lse_row != float("-inf")), lse_row * LOG2E, float("inf"))
    statistic = offset(b * heads + head, M) + query
    rest_row = None
    if rest is not None:
        lse_row, rest_row = split_rest(lse_row, tl.load(rest + statistic))
        rest_row = rest_row[None, :]
    delta_row = 0.0
    if delta is not None:
        delta_row = tl.load(delta + statistic)[None, :]
    b0 = b // batch_inner
    b1 = b % batch_inner
    dbias_row = 0
    dbias_col = 0
    dbias_at = 0
    if dbias is not None:
        dbias_row = dbias_strides[3]
        dbias_col = dbias_strides[4]
        dbias += offset(b0, dbias_strides[0]) + offset(b1, dbias_strides[1])
        dbias_at = dbias + (offset(head, dbias_strides[2]) + offset(query, dbias_row))[None, :]
    dbias_keys_step = 0
    if dbias_keys is not None:
        dbias_keys += offset(b0, dbias_keys_strides[0]) + offset(b1, dbias_keys_strides[1]) + offset(kv_head, dbias_keys_strides[2])
        dbias_keys_step = dbias_keys_strides[3]
    at = at_head(f, b, head[None, :], heads, batch_inner, 0, 0)
    t = RowsBack(q_tile, do_tile, lse_row[None, :], rest_row, delta_row, query[None, :], at, exists[None, :], dbias_at)
    dk_row = 0
    dv_row = 0
    if dk is not None:
        dk += offset(b, dk_strides[0]) + offset(kv_head, dk_strides[2])
        dk_row = dk_strides[1]
    if dv is not None:
        dv += offset(b, dv_strides[0]) + offset(kv_head, dv_strides[2])
        dv_row = dv_strides[1]
    s = Sums(dk, dv, dk_row, dv_row, dbias, dbias_row, dbias_col, dbias_keys, dbias_keys_step)
    k += offset(b, k_strides[0]) + offset(kv_head, k_strides[2])
    v += offset(b, v_strides[0]) + offset(kv_head, v_strides[2])
    kv = (k, v, k_strides, v_strides)

    last = visible_keys(f, b, N)
    p = Program(M, N, lo, hi, scale, BM, BN, D, DV, BD, BDV, True, EVEN_N, PRECISION, WIDE, None, None, None)
    c = Part(b, kv_head, groups, heads, batch_inner, None, last, split, splits, 1, None, 0, 0, None, 0, False)
    begin, full_begin, full_end, end = segments(0, M - 1, last, lo, hi, BN)
    blocks = tl.cdiv(N, BN)
    chunk = tl.cdiv(blocks, splits)
    own_begin = tl.minimum(split * chunk, blocks)
    own_end = tl.minimum(own_begin + chunk, blocks)
    dqt = tl.zeros([BD, BM], tl.float32)
    if lo is not None:
        _walk_hidden(p, t, s, own_begin, tl.minimum(begin, own_end))
        dqt = _walk_back(dqt, p, t, f, c, kv, s, tl.maximum(begin, own_begin), tl.minimum(full_begin, own_end), NEED_DQ, True)
    dqt = _walk_back(dqt, p, t, f, c, kv, s, tl.maximum(full_begin, own_begin), tl.minimum(full_end, own_end), NEED_DQ, False)
    if hi is not None or not EVEN_N or f.lengths is not None:
        dqt = _walk_back(dqt, p, t, f, c, kv, s, tl.maximum(full_end, own_begin), tl.minimum(end, own_end), NEED_DQ, True)
        _walk_hidden(p, t, s, tl.maximum(end, own_begin), own_end)
    if NEED_DQ:
        dq += offset(split, dq_strides[0]) + offset(b, dq_strides[1])
        d = tl.arange(0, BD)[:, None]
        pointers = dq + (offset(query, dq_strides[2]) + offset(head, dq_strides[3]))[None, :] + d
        tl.store(pointers, (dqt * scale).to(dq.dtype.element_ty), mask=exists[None, :] & (d < D))
