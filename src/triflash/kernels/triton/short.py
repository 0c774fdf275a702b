"""The kernels for short rows: a program has all keys of a (batch, head) pair at once, so that it needs no loop over blocks of keys.

Below some hundred keys a pass is as long as its tiles take to come and go, not as its products. So there is one launch, nothing is
computed twice, nothing goes by way of memory but results, and many small programs share an SM: one waits for its tiles while others
compute.

Forward, the softmax is taken of whole rows: no running maximum, no output to rescale. Backward, one program has all keys of a key head and
walks the queries that see them, so that it owns all gradients of the pair, and adds nothing atomically:
    delta = rowsum(out * dout) - dlse;   dv += pᵀ dout;   dsᵀ = pᵀ * (v doutᵀ - delta);   dk += scale dsᵀ q;   dqᵀ = scale kᵀ dsᵀ
Tiles of scores are transposed, as in ``backward.dkdv``, and dq too, so none is transposed in registers. Launched by ``launch/short.py``.
"""

import triton
import triton.language as tl

from .features import Program, Span, at_head, bias_tile, drop, mask_tile, rescaled, scored, through_cap, visible_keys
from .prims import (
    LN2,
    LOG2E,
    in_band,
    load_lse_log2,
    load_rows,
    load_vector,
    lse_rest,
    offset,
    probabilities,
    split_rest,
    store_rows,
    store_tile,
    stride_in_tile,
)
from .records import record


@triton.jit
def _zero(round):
    """0, of which the compiler does not know that it is the same in every round of a loop, but that 16 divides it.

    Added to the strides of rows, it keeps their offsets from being worked out before the loop: those of ten tensors are more than a
    thread's registers hold.
    """
    return tl.minimum(round, 0) * 16


@record
class Keys:
    """All keys of a head: k and v, tiles, of which ``visible`` are shown."""

    k: object
    v: object
    visible: object


@record
class Piece:
    """The keys of a head from n0 on: k, a tile of BN keys, and v, another, or LATE where the values of the head lie, to be loaded into the
    place of k when they are wanted. ``visible`` keys of the head are shown. HIDES: not all of BN may be; MASKED: a query may not see all.
    None for k: there are none. at: ``features.at_head``.
    """

    k: object
    v: object
    v_row: object
    n0: object
    visible: object
    at: object
    BN: tl.constexpr
    LATE: tl.constexpr
    HIDES: tl.constexpr
    MASKED: tl.constexpr


@record
class Rows:
    """Where queries of a head lie, and what is computed of them; pointers lead to the head, rows are strides. sink: in base 2."""

    q: object
    out: object
    lse: object
    rest: object
    q_row: object
    out_row: object
    sink: object


@triton.jit
def _piece(kv, n0, visible, at, p, BN: tl.constexpr, LATE: tl.constexpr, HIDES: tl.constexpr, BANDED: tl.constexpr):
    """The BN keys from n0 on. kv: where keys and values of the head lie, and how far apart their rows."""
    k, v, k_row, v_row = kv
    if BN > 0:
        k_tile = load_rows(k, k_row, n0, visible, BN, p.D, p.BD, HIDES, p.WIDE)  # [BN, BD]
        v_tile = v
        if not LATE:
            v_tile = load_rows(v, v_row, n0, visible, BN, p.DV, p.BDV, HIDES, p.WIDE)  # [BN, BDV]
        return Piece(k_tile, v_tile, v_row, n0, visible, at, BN, LATE, HIDES, HIDES or BANDED)
    else:
        return Piece(None, None, v_row, n0, visible, at, BN, LATE, HIDES, False)


@triton.jit
def _sees(p, t, m0):
    """Whether a tile of queries sees any key of a piece, by the band."""
    sees = t.n0 < t.visible
    if p.hi is not None:
        sees = sees & (t.n0 <= m0 + p.BM - 1 + p.hi)
    if p.lo is not None:
        sees = sees & (t.n0 + t.BN - 1 >= m0 + p.lo)
    return sees


@triton.jit
def _scores(q_tile, p, t, f, m0):
    """Scores of a tile of queries on a piece."""
    i = tl.arange(0, p.BM)[:, None]
    j = tl.arange(0, t.BN)[None, :]
    seen = mask_tile(f, t.at, m0, t.n0, i, j, p.M, t.visible, not p.EVEN_M, t.MASKED, p.WIDE)
    bias = bias_tile(f, t.at, m0, t.n0, i, j, Span(None, p.M), Span(None, t.visible), not p.EVEN_M, t.MASKED, p.WIDE)
    s = tl.dot(q_tile, tl.trans(t.k), input_precision=p.PRECISION)  # [BM, BN]
    s, _ = scored(p, f, t.at, s, bias, seen, m0, t.n0, i, j, True)
    if t.MASKED:
        s = tl.where(in_band(m0 + i, t.n0 + j, t.visible, p.lo, p.hi), s, float("-inf"))
    return s


@triton.jit
def _score(m, q_tile, p, t, f, m0):
    """Scores of a tile of queries on a piece, and what becomes of the rows' maximum m."""
    if t.k is None:
        return m, m
    else:
        if p.hi is not None or p.lo is not None:
            s = tl.full([p.BM, t.BN], float("-inf"), tl.float32)
            if _sees(p, t, m0):
                s = _scores(q_tile, p, t, f, m0)
        else:
            s = _scores(q_tile, p, t, f, m0)
        return tl.maximum(m, tl.max(s, 1)), s


@triton.jit
def _weighted(acc, l, s, m_safe, p, t, f, m0):
    """acc and l with what a piece adds to them."""
    weights = tl.exp2(s - m_safe[:, None])
    l += tl.sum(weights, 1)
    weights = drop(f, t.at, weights, m0, t.n0, p.BM, t.BN, False)
    v_tile = t.v
    if t.LATE:
        v_tile = load_rows(t.v, t.v_row, t.n0, t.visible, t.BN, p.DV, p.BDV, t.HIDES, p.WIDE)  # [BN, BDV]
    return tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision=p.PRECISION), l


@triton.jit
def _weigh(acc, l, s, m_safe, p, t, f, m0):
    """Add a piece's weighted values to acc, and its weights to l, if there is a piece, and any of it is seen."""
    if t.k is not None:
        if p.hi is not None or p.lo is not None:
            if _sees(p, t, m0):
                acc, l = _weighted(acc, l, s, m_safe, p, t, f, m0)
        else:
            acc, l = _weighted(acc, l, s, m_safe, p, t, f, m0)
    return acc, l


@triton.jit
def _attend(p, pieces, r, f, m0):
    """Attend from the BM queries from m0 on to all keys, in three pieces at most, and store what comes of it."""
    a, b, c = pieces
    q_tile = load_rows(r.q, r.q_row, m0, p.M, p.BM, p.D, p.BD, not p.EVEN_M, p.WIDE)  # [BM, BD]
    m = tl.full([p.BM], float("-inf"), tl.float32)
    l = tl.zeros([p.BM], tl.float32)
    if f.sink is not None:
        m = tl.zeros([p.BM], tl.float32) + r.sink
    m, s_a = _score(m, q_tile, p, a, f, m0)
    m, s_b = _score(m, q_tile, p, b, f, m0)
    m, s_c = _score(m, q_tile, p, c, f, m0)
    m_safe = tl.where(m == float("-inf"), 0.0, m)  # a row that sees no key: 2^(-inf - 0) = 0, never NaN
    if f.sink is not None:
        l += tl.exp2(r.sink - m_safe)
    acc = tl.zeros([p.BM, p.BDV], tl.float32)
    acc, l = _weigh(acc, l, s_a, m_safe, p, a, f, m0)
    acc, l = _weigh(acc, l, s_b, m_safe, p, b, f, m0)
    acc, l = _weigh(acc, l, s_c, m_safe, p, c, f, m0)
    unseen = l == 0.0
    l = tl.where(unseen, 1.0, l)
    acc = rescaled(f, acc / l[:, None])
    store_rows(r.out, r.out_row, m0, p.M, acc, p.BM, p.DV, p.BDV, not p.EVEN_M, p.WIDE)
    row_lse = tl.where(unseen, float("-inf"), (m + tl.log2(l)) * LN2)
    rows = m0 + tl.arange(0, p.BM)
    tl.store(r.lse + rows, row_lse, mask=rows < p.M)
    if r.rest is not None:
        tl.store(r.rest + rows, lse_rest(m, l, row_lse), mask=rows < p.M)


@triton.jit
def short_forward(
    q, k, v, f, out, lse, rest, q_strides, k_strides, v_strides, out_strides, lse_strides,
    parts, rounds, heads, groups, batch_inner, M, N, lo, hi, scale,
    BM: tl.constexpr, BN: tl.constexpr, BN2: tl.constexpr, BN3: tl.constexpr, LATE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program owns ``rounds`` tiles of BM queries of one head, one after the other, and has all keys of that head; a head's tiles are
    those of ``parts`` programs. rounds: None for one. The keys are BN, BN2 and BN3 (0: none), of which only the last may not all be there.
    LATE: values are loaded when the scores are there.

    out = softmax(s) v,  lse = ln 2 (m + log2 l) with the maximum m and the sum l of a row; strides, f, groups, rest as in ``forward``.
    """
    pid = tl.program_id(0)
    part = pid % parts
    head = pid // parts % heads
    b = pid // parts // heads
    k += offset(b, k_strides[0]) + offset(head // groups, k_strides[2])
    v += offset(b, v_strides[0]) + offset(head // groups, v_strides[2])
    at = at_head(f, b, head, heads, batch_inner, 0, 0)
    visible = visible_keys(f, b, N)
    HIDES: tl.constexpr = f.lengths is not None
    BANDED: tl.constexpr = lo is not None or hi is not None
    p = Program(M, N, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_M, EVEN_N, PRECISION, WIDE, None, None, None)
    kv = (k, v, k_strides[1], v_strides[1])
    pieces = (
        _piece(kv, 0, visible, at, p, BN, LATE, HIDES or (BN2 == 0 and not EVEN_N), BANDED),
        _piece(kv, BN, visible, at, p, BN2, LATE, HIDES or (BN3 == 0 and not EVEN_N), BANDED),
        _piece(kv, BN + BN2, visible, at, p, BN3, LATE, HIDES or not EVEN_N, BANDED),
    )
    rest_at = rest
    if rest is not None:
        rest_at = rest + offset(b * heads + head, M)
    sink = 0.0
    if f.sink is not None:
        sink = tl.load(f.sink + head * f.sink_stride).to(tl.float32) * LOG2E
    q += offset(b, q_strides[0]) + offset(head, q_strides[2])
    out += offset(b, out_strides[0]) + offset(head, out_strides[2])
    lse += offset(b, lse_strides[0]) + offset(head, lse_strides[1])
    if rounds is None:
        r = Rows(q, out, lse, rest_at, q_strides[1], out_strides[1], sink)
        _attend(p, pieces, r, f, part * BM)
    else:
        first = part * rounds
        for tile in tl.range(first, tl.minimum(first + rounds, tl.cdiv(M, BM))):
            zero = _zero(tile)
            r = Rows(q, out, lse, rest_at, q_strides[1] + zero, out_strides[1] + zero, sink)
            p = Program(M + zero, N, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_M, EVEN_N, PRECISION, WIDE, None, None, None)
            _attend(p, pieces, r, f, tile * BM)


@record
class Tensors:
    """What a program of the backward pass reads and writes, its strides, and what there is to compute. A pointer that is None: nothing of
    that; see ``short_backward``.
    """

    q: object
    k: object
    v: object
    out: object
    dout: object
    lse: object
    rest: object
    dlse: object
    delta: object
    dq: object
    dk: object
    dv: object
    dbias: object
    dbias_keys: object
    q_strides: object
    k_strides: object
    v_strides: object
    out_strides: object
    dout_strides: object
    lse_strides: object
    dlse_strides: object
    dq_strides: object
    dk_strides: object
    dv_strides: object
    dbias_strides: object
    dbias_keys_strides: object
    heads: object
    groups: object
    batch_inner: object
    NEED_SUM: tl.constexpr
    HIDES: tl.constexpr
    MASKED: tl.constexpr
    ALONE: tl.constexpr


@triton.jit
def _load_delta(p, w, b, head, m0, do_tile, zero):
    """``delta = rowsum(out * dout) - dlse`` of BM queries of a head, which is also written where a later kernel reads it."""
    rows = m0 + tl.arange(0, p.BM)
    o_at = w.out + offset(b, w.out_strides[0]) + offset(head, w.out_strides[2])
    o_tile = load_rows(o_at, w.out_strides[1] + zero, m0, p.M, p.BM, p.DV, p.BDV, not p.EVEN_M, p.WIDE)
    row = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    if w.dlse is not None:
        dlse = w.dlse + offset(b, w.dlse_strides[0]) + offset(head, w.dlse_strides[1])
        row -= tl.load(dlse + rows * w.dlse_strides[2], mask=rows < p.M, other=0.0)
    if w.delta is not None:
        tl.store(w.delta + offset(b * w.heads + head, p.M) + rows, row, mask=rows < p.M)
    return row


@triton.jit
def _store_dq(p, w, b, head, m0, x, zero):
    """Write ``x [BD, BM]``, which is dqᵀ, to the rows of dq from m0 on."""
    i = tl.arange(0, p.BM)[None, :]
    d = tl.arange(0, p.BD)[:, None]
    row_stride = stride_in_tile(w.dq_strides[1] + zero, p.WIDE)
    pointers = w.dq + offset(b, w.dq_strides[0]) + offset(head, w.dq_strides[2]) + offset(m0, w.dq_strides[1]) + (i * row_stride + d)
    x = x.to(w.dq.dtype.element_ty)
    if p.EVEN_M:
        if p.D == p.BD:
            tl.store(pointers, x)
        else:
            tl.store(pointers, x, mask=d < p.D)
    else:
        if p.D == p.BD:
            tl.store(pointers, x, mask=m0 + i < p.M)
        else:
            tl.store(pointers, x, mask=(m0 + i < p.M) & (d < p.D))


@triton.jit
def _transposed_keys(p, t, w, b, head, zero):
    """kᵀ ``[BD, BN]``, of which WGMMA reads 64 rows and more from shared memory. Fewer are kept in registers, by every warp all of them:
    they are read once more when they are wanted. The hint keeps the compiler from taking that load for the first one.
    """
    if p.BD >= 64:
        return tl.trans(t.k)
    else:
        at = w.k + offset(b, w.k_strides[0]) + offset(head // w.groups, w.k_strides[2])
        j = tl.arange(0, p.BN)[None, :]
        d = tl.arange(0, p.BD)[:, None]
        pointers = at + (j * stride_in_tile(w.k_strides[1] + zero, p.WIDE) + d)
        return tl.load(pointers, mask=(j < t.visible) & (d < p.D), other=0.0, eviction_policy="evict_first")


@triton.jit
def _fold(sums, p, t, w, f, b, head, m0, zero):
    """Fold the BM queries from m0 on of a head into sums, (dk, dv, db), of which those nobody wants stay, and write their dq and dbias."""
    dk, dv, db = sums
    i = tl.arange(0, p.BM)[None, :]
    j = tl.arange(0, p.BN)[:, None]
    ADDS: tl.constexpr = f.bias is not None or f.slopes is not None
    at = at_head(f, b, head, w.heads, w.batch_inner, 0, 0)
    q_at = w.q + offset(b, w.q_strides[0]) + offset(head, w.q_strides[2])
    do_at = w.dout + offset(b, w.dout_strides[0]) + offset(head, w.dout_strides[2])
    lse_at = w.lse + offset(b, w.lse_strides[0]) + offset(head, w.lse_strides[1])
    q_tile = load_rows(q_at, w.q_strides[1] + zero, m0, p.M, p.BM, p.D, p.BD, not p.EVEN_M, p.WIDE)  # [BM, BD]
    do_tile = load_rows(do_at, w.dout_strides[1] + zero, m0, p.M, p.BM, p.DV, p.BDV, not p.EVEN_M, p.WIDE)  # [BM, BDV]
    row = _load_delta(p, w, b, head, m0, do_tile, zero)
    lse_log2 = load_lse_log2(lse_at, m0, p.M, p.BM, not p.EVEN_M)
    seen = mask_tile(f, at, m0, 0, i, j, p.M, t.visible, not p.EVEN_M, w.MASKED, p.WIDE)
    bias = bias_tile(f, at, m0, 0, i, j, Span(None, p.M), Span(None, t.visible), not p.EVEN_M, w.MASKED, p.WIDE)
    st = tl.dot(t.k, tl.trans(q_tile), input_precision=p.PRECISION)  # [BN, BM]
    st, slope = scored(p, f, at, st, bias, seen, m0, 0, i, j, w.rest is not None)
    if w.MASKED:
        st = tl.where(in_band(m0 + i, j, t.visible, p.lo, p.hi), st, float("-inf"))
    if w.rest is not None:
        rest = load_vector(w.rest + offset(b * w.heads + head, p.M), m0, p.M, p.BM, not p.EVEN_M)
        lse_log2, rest = split_rest(lse_log2, rest)
        pt = probabilities(st, lse_log2[None, :], rest[None, :], True, not ADDS)
    else:
        pt = probabilities(st, lse_log2[None, :], 0.0, False, ADDS)
    if w.dv is not None:
        kept = drop(f, at, pt, m0, 0, p.BM, p.BN, True)
        dv = tl.dot(kept.to(do_tile.dtype), do_tile, dv, input_precision=p.PRECISION)
    if w.dq is not None or w.dk is not None or w.dbias is not None or w.dbias_keys is not None or w.NEED_SUM:
        dpt = tl.dot(t.v, tl.trans(do_tile), input_precision=p.PRECISION)  # [BN, BM]
        dpt = rescaled(f, drop(f, at, dpt, m0, 0, p.BM, p.BN, True))
        dst = pt * (dpt - row[None, :])
        if w.dbias_keys is not None:
            db += tl.sum(dst, 1)
        if w.NEED_SUM:
            db += dst
        if w.dbias is not None:
            own = w.dbias + offset(b // w.batch_inner, w.dbias_strides[0]) + offset(b % w.batch_inner, w.dbias_strides[1])
            own += offset(head, w.dbias_strides[2])
            store_tile(own, w.dbias_strides[3], w.dbias_strides[4], m0, 0, i, j, p.M, p.N, dst, not p.EVEN_M, not p.EVEN_N)
        ds = through_cap(f, dst, slope).to(q_tile.dtype)
        if w.dk is not None:
            dk = tl.dot(ds, q_tile, dk, input_precision=p.PRECISION)
        if w.dq is not None:
            dqt = tl.dot(_transposed_keys(p, t, w, b, head, zero), ds, input_precision=p.PRECISION)  # [BD, BM]
            _store_dq(p, w, b, head, m0, dqt * p.scale, zero)
    return dk, dv, db


@triton.jit
def _differentiate(db, p, w, f, b, kv_head, zero):
    """Write dq, dk and dv of a pair, and a bias's gradient but for a sum over pairs, which db is."""
    visible = visible_keys(f, b, p.N)
    k_at = w.k + offset(b, w.k_strides[0]) + offset(kv_head, w.k_strides[2])
    v_at = w.v + offset(b, w.v_strides[0]) + offset(kv_head, w.v_strides[2])
    k_tile = load_rows(k_at, w.k_strides[1] + zero, 0, visible, p.BN, p.D, p.BD, w.HIDES, p.WIDE)  # [BN, BD]
    v_tile = load_rows(v_at, w.v_strides[1] + zero, 0, visible, p.BN, p.DV, p.BDV, w.HIDES, p.WIDE)  # [BN, BDV]
    t = Keys(k_tile, v_tile, visible)
    dk = tl.zeros([p.BN, p.BD], tl.float32)
    dv = tl.zeros([p.BN, p.BDV], tl.float32)
    if not w.NEED_SUM:
        db = tl.zeros([p.BN], tl.float32)
    if w.ALONE:
        dk, dv, db = _fold((dk, dv, db), p, t, w, f, b, kv_head, 0, zero)
    else:
        tiles = tl.cdiv(p.M, p.BM)
        for step in tl.range(0, tiles * w.groups):
            dk, dv, db = _fold((dk, dv, db), p, t, w, f, b, kv_head * w.groups + step // tiles, step % tiles * p.BM, _zero(step))
    # Rows of hidden keys are 0: they were read as zeros, and so are their p and ds.
    if w.dv is not None:
        own = w.dv + offset(b, w.dv_strides[0]) + offset(kv_head, w.dv_strides[2])
        store_rows(own, w.dv_strides[1] + zero, 0, p.N, rescaled(f, dv), p.BN, p.DV, p.BDV, not p.EVEN_N, p.WIDE)
    if w.dk is not None:
        own = w.dk + offset(b, w.dk_strides[0]) + offset(kv_head, w.dk_strides[2])
        store_rows(own, w.dk_strides[1] + zero, 0, p.N, dk * p.scale, p.BN, p.D, p.BD, not p.EVEN_N, p.WIDE)
    if w.dbias_keys is not None:
        cols = tl.arange(0, p.BN)
        own = w.dbias_keys + offset(b // w.batch_inner, w.dbias_keys_strides[0]) + offset(b % w.batch_inner, w.dbias_keys_strides[1])
        own += offset(kv_head, w.dbias_keys_strides[2]) + offset(cols, w.dbias_keys_strides[3])
        tl.store(own, db.to(w.dbias_keys.dtype.element_ty), mask=cols < p.N)
    return db


@triton.jit
def short_backward(
    q, k, v, f, out, dout, lse, rest, dlse, delta, dq, dk, dv, dbias, dbias_keys, dbias_parts,
    q_strides, k_strides, v_strides, out_strides, dout_strides, lse_strides, dlse_strides, dq_strides, dk_strides, dv_strides,
    dbias_strides, dbias_keys_strides, dbias_parts_strides,
    heads, groups, batch_outer, batch_inner, M, N, lo, hi, scale, splits,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    VARIES_B0: tl.constexpr, VARIES_B1: tl.constexpr, VARIES_H: tl.constexpr, ALONE: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program owns (batch, key head) pairs, one after the other, and of each all keys (BN at least): it gives dq, dk and dv.

    A result that is None is not computed. delta: where it is written for what comes after, contiguous (batch, head, query).
    dbias: of a bias as large as the scores, strides (outer batch, inner batch, head, row, column). dbias_keys: of one that varies over keys
    alone, a row for each pair, strides (outer batch, inner batch, head, column). dbias_parts: of one that broadcasts over pairs; strides
    (part, outer batch, inner batch, head, row, column). VARIES_…: along which dims that one varies, which say which pairs a program's are;
    the others are looped over, in ``splits`` equal parts, the part being the slowest index of the grid. Without it a program's pairs are
    any, and without splits it has one. ALONE: a pair has one tile of queries. Other strides, f and groups as in ``forward``.
    """
    HIDES: tl.constexpr = not EVEN_N or f.lengths is not None
    MASKED: tl.constexpr = HIDES or lo is not None or hi is not None
    NEED_SUM: tl.constexpr = dbias_parts is not None
    p = Program(M, N, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_M, EVEN_N, PRECISION, WIDE, None, None, None)
    w = Tensors(
        q, k, v, out, dout, lse, rest, dlse, delta, dq, dk, dv, dbias, dbias_keys,
        q_strides, k_strides, v_strides, out_strides, dout_strides, lse_strides, dlse_strides, dq_strides, dk_strides, dv_strides,
        dbias_strides, dbias_keys_strides, heads, groups, batch_inner, NEED_SUM, HIDES, MASKED, ALONE,
    )  # fmt: skip
    pid = tl.program_id(0)
    kv_heads = heads // groups
    if splits is None:
        _differentiate(0.0, p, w, f, pid // kv_heads, pid % kv_heads, 0)
    else:
        own_head = 0
        own_b1 = 0
        own_b0 = 0
        pairs = 1
        if VARIES_H:
            own_head = pid % kv_heads
            pid = pid // kv_heads
        else:
            pairs = pairs * kv_heads
        if VARIES_B1:
            own_b1 = pid % batch_inner
            pid = pid // batch_inner
        else:
            pairs = pairs * batch_inner
        if VARIES_B0:
            own_b0 = pid % batch_outer
            pid = pid // batch_outer
        else:
            pairs = pairs * batch_outer
        first = tl.cast(tl.cast(pairs, tl.int64) * pid // splits, tl.int32)
        last = tl.cast(tl.cast(pairs, tl.int64) * (pid + 1) // splits, tl.int32)
        if NEED_SUM:
            db = tl.zeros([BN, BM], tl.float32)
        else:
            db = tl.zeros([BN], tl.float32)
        for pair in tl.range(first, last):
            kv_head = own_head
            b1 = own_b1
            b0 = own_b0
            left = pair
            if not VARIES_H:
                kv_head = left % kv_heads
                left = left // kv_heads
            if not VARIES_B1:
                b1 = left % batch_inner
                left = left // batch_inner
            if not VARIES_B0:
                b0 = left
            zero = _zero(pair)
            p = Program(M + zero, N + zero, lo, hi, scale, BM, BN, D, DV, BD, BDV, EVEN_M, EVEN_N, PRECISION, WIDE, None, None, None)
            db = _differentiate(db, p, w, f, b0 * batch_inner + b1, kv_head, zero)
        if NEED_SUM:
            i = tl.arange(0, BM)[None, :]
            j = tl.arange(0, BN)[:, None]
            own = dbias_parts + offset(pid, dbias_parts_strides[0]) + offset(own_b0, dbias_parts_strides[1])
            own += offset(own_b1, dbias_parts_strides[2]) + offset(own_head, dbias_parts_strides[3])
            store_tile(own, dbias_parts_strides[4], dbias_parts_strides[5], 0, 0, i, j, M, N, db, not EVEN_M, not EVEN_N)
