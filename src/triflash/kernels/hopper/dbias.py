"""The kernel for Hopper that gives the gradient of a bias that varies over queries and keys and broadcasts over batch or heads.

    dbias = sum over broadcast dims of ds,   ds = 2^(s - lse) * (dout vᵀ - delta)

A program owns tiles of 64 * WGS queries by BN keys of the bias's own shape, and for each loops over the dims that the bias broadcasts,
one round a (batch, head) pair, recomputing s and dp; the sum stays in registers, and a tile's bias in shared memory. Both products of a
round run over a head dim, and producers feed them like a matrix product: chunks of CHUNK columns in two rings that do not care for rounds
or tiles, on the left q and then dout, on the right k and then v. The softmax of one consumer runs under the products of the other and
under its own dp; TURNS as in the forward kernel.

The sum leaves through the buffer of its tile's bias. A producer of its own fills that again at once, so that the next tile's bias, which
may come from far, holds up no operand. No consumer meets a tile that nobody sees: a warp of its own writes their zeros.

The loop is cut into ``splits`` parts, each of which is written on its own, as the portable kernel does (``kernels/triton/dbias.py``).
"""

from ..triton.prims import LOG2E, offset, segments
from .compat import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    optional,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .dropout import drawn, of_scores, signed, stream_of
from .features import add_alibi, capped, slope_of, squashed, visible_keys
from .grid import accumulator, barriers, mildest, stacked
from .rows import add_bias, exponents, hide_unseen, statistics

# A program's barriers are a tuple with an element a name, which holds one for every buffer.
LEFT_FULL, LEFT_EMPTY, RIGHT_FULL, RIGHT_EMPTY, BIAS_FULL, BIAS_EMPTY, TURN = map(gl.constexpr, range(7))  # of TURN one a consumer


@gluon.constexpr_function
def chunks_of(dim, CHUNK):
    """How many chunks a head dim has."""
    return -(-dim // CHUNK)


@gluon.jit
def _entry(
    left, batch_outer, batch_inner, heads, VARIES_B0: gl.constexpr, VARIES_B1: gl.constexpr, VARIES_H: gl.constexpr,
):  # fmt: skip
    """(part, outer batch, inner batch, head, rounds) of a copy of the tiles of a head, the part slowest."""
    rounds = 1
    head = 0
    b1 = 0
    b0 = 0
    if VARIES_H:
        head = left % heads
        left = left // heads
    else:
        rounds = rounds * heads
    if VARIES_B1:
        b1 = left % batch_inner
        left = left // batch_inner
    else:
        rounds = rounds * batch_inner
    if VARIES_B0:
        b0 = left % batch_outer
        left = left // batch_outer
    else:
        rounds = rounds * batch_outer
    return left, b0, b1, head, rounds


@gluon.jit
def _seen(tm, M, N, lo, hi, ROWS: gl.constexpr, BN: gl.constexpr):
    """Which tiles of keys some query of a tile of queries sees: (first, end); none of a tile of queries before the first."""
    begin, _a, _b, end = segments(tm * ROWS, min(tm * ROWS + ROWS, M) - 1, N, lo, hi, BN)
    return begin, gl.where(tm < 0, 0, end)


@gluon.jit
def _tile(
    index, batch_outer, batch_inner, heads, tiles_m, places, fold, shuffle, M, N, lo, hi, splits,
    VARIES_B0: gl.constexpr, VARIES_B1: gl.constexpr, VARIES_H: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """(part, outer batch, inner batch, head, first query, first key, first round, last round) of a tile; no rounds where nobody sees it.

    The tiles of a head have ``places``, in rows of ``fold``, taken in steps of ``shuffle``, which has no divisor in common with their
    number. A triangle is folded: its last row of tiles lies turned round behind its first, and so on; of an odd number the last is alone.
    """
    left = index // places
    place = (index - left * places) * shuffle % places
    tm = place // fold
    tn = place - tm * fold
    if lo is None and hi is not None:
        opposite = tiles_m - 1 - tm
        tm -= tiles_m % 2
        _begin, own = _seen(tm, M, N, lo, hi, ROWS, BN)
        tm = gl.where(tn < own, tm, opposite)
        tn = gl.where(tn < own, tn, fold - 1 - tn)
    part, b0, b1, head, rounds = _entry(left, batch_outer, batch_inner, heads, VARIES_B0, VARIES_B1, VARIES_H)
    if lo is not None or hi is not None:
        begin, end = _seen(tm, M, N, lo, hi, ROWS, BN)
        rounds = gl.where((tn >= begin) & (tn < end), rounds, 0)
    first = 0
    last = rounds
    if splits > 1:  # two divisions of 64 bits
        first = (offset(rounds, part) // splits).to(gl.int32)
        last = (offset(rounds, part + 1) // splits).to(gl.int32)
    return part, b0, b1, head, tm * ROWS, tn * BN, first, last


@gluon.jit
def _round(
    r, b0, b1, head, batch_outer, batch_inner,
    VARIES_B0: gl.constexpr, VARIES_B1: gl.constexpr, VARIES_H: gl.constexpr,
):  # fmt: skip
    """(batch, head) of a round of a tile."""
    if not VARIES_B1:
        b1 = r % batch_inner
        r = r // batch_inner
    if not VARIES_B0:
        b0 = r % batch_outer
        r = r // batch_outer
    if not VARIES_H:
        head = r
    return b0 * batch_inner + b1, head


@gluon.jit
def _fetch(
    desc, ring, bars, at, b, row, head, column, FULL: gl.constexpr, EMPTY: gl.constexpr, SLOTS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """One chunk of an operand into its slot, in PARTS buffers of rows that follow one another."""
    slot = at % SLOTS
    full = bars[FULL].index(slot)
    mbarrier.wait(bars[EMPTY].index(slot), ((at // SLOTS) & 1) ^ 1)
    mbarrier.expect(full, PARTS * desc.block_type.nbytes)
    for w in gl.static_range(PARTS):
        tma_load(desc, [b, row + w * ring.shape[2], head, column], full, ring.index(slot * PARTS + w))


@gluon.jit
def _produce(
    s_desc, dp_desc, ring, bars, batch_outer, batch_inner, heads, group, M, N, lo, hi, splits, tiles_m, tiles, places, fold, shuffle,
    BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, FULL: gl.constexpr, EMPTY: gl.constexpr, S_CHUNKS: gl.constexpr,
    DP_CHUNKS: gl.constexpr, VARIES_B0: gl.constexpr, VARIES_B1: gl.constexpr, VARIES_H: gl.constexpr, OF_KEYS: gl.constexpr,
):  # fmt: skip
    """A producer: every load of one side of both products, in the order in which the consumers need them."""
    CHUNK: gl.constexpr = ring.shape[4]
    PARTS: gl.constexpr = 1 if OF_KEYS else WGS
    SLOTS: gl.constexpr = ring.shape[0] // PARTS
    at = 0  # chunks so far
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        _part, b0, b1, own_head, m0, n0, first, last = _tile(
            index, batch_outer, batch_inner, heads, tiles_m, places, fold, shuffle, M, N, lo, hi, splits, VARIES_B0, VARIES_B1, VARIES_H,
            BM * WGS, BN,
        )  # fmt: skip
        row = n0 if OF_KEYS else m0
        for r in range(first, last):
            b, head = _round(r, b0, b1, own_head, batch_outer, batch_inner, VARIES_B0, VARIES_B1, VARIES_H)
            if OF_KEYS:
                head = head // group
            for c in gl.static_range(S_CHUNKS):
                _fetch(s_desc, ring, bars, at + c, b, row, head, c * CHUNK, FULL, EMPTY, SLOTS, PARTS)
            for c in gl.static_range(DP_CHUNKS):
                _fetch(dp_desc, ring, bars, at + S_CHUNKS + c, b, row, head, c * CHUNK, FULL, EMPTY, SLOTS, PARTS)
            at += S_CHUNKS + DP_CHUNKS


@gluon.jit
def _supply(
    bias_desc, bias_s, bars, batch_outer, batch_inner, heads, M, N, lo, hi, splits, tiles_m, tiles, places, fold, shuffle,
    BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, BIAS_FULL: gl.constexpr, BIAS_EMPTY: gl.constexpr,
    VARIES_B0: gl.constexpr, VARIES_B1: gl.constexpr, VARIES_H: gl.constexpr,
):  # fmt: skip
    """The third producer: the bias of every tile that somebody sees, as soon as its buffer is free."""
    BIAS_STAGES: gl.constexpr = bias_s.shape[0] // WGS
    wave = 0  # tiles so far
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        _part, b0, b1, own_head, m0, n0, first, last = _tile(
            index, batch_outer, batch_inner, heads, tiles_m, places, fold, shuffle, M, N, lo, hi, splits, VARIES_B0, VARIES_B1, VARIES_H,
            BM * WGS, BN,
        )  # fmt: skip
        if first < last:
            for w in gl.static_range(WGS):
                buffer = wave % BIAS_STAGES * WGS + w
                full = bars[BIAS_FULL].index(buffer)
                mbarrier.wait(bars[BIAS_EMPTY].index(buffer), ((wave // BIAS_STAGES) & 1) ^ 1)
                mbarrier.expect(full, bias_desc.block_type.nbytes)
                tma_load(bias_desc, [b0, b1, own_head, m0 + w * BM, n0], full, bias_s.index(buffer))
            wave += 1


@gluon.jit
def _clear(
    dbias_desc, dbias, zeros_s, dbias_strides, batch_outer, batch_inner, heads, M, N, lo, hi, splits, tiles_m, tiles_n,
    BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, VARIES_B0: gl.constexpr, VARIES_B1: gl.constexpr, VARIES_H: gl.constexpr,
):  # fmt: skip
    """A warp for the tiles that nobody sees: zeros, which wait for nothing and which nobody waits for."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    if lo is not None or hi is not None:
        own = tiles_m * tiles_n
        tiles = own * splits
        tiles *= heads if VARIES_H else 1
        tiles *= batch_inner if VARIES_B1 else 1
        tiles *= batch_outer if VARIES_B0 else 1
        for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
            tm = index % own // tiles_n
            tn = index % tiles_n
            m0 = tm * (BM * WGS)
            n0 = tn * BN
            begin, end = _seen(tm, M, N, lo, hi, BM * WGS, BN)
            if (tn < begin) | (tn >= end):
                part, b0, b1, head, _rounds = _entry(index // own, batch_outer, batch_inner, heads, VARIES_B0, VARIES_B1, VARIES_H)
                if dbias_desc is not None:
                    for w in gl.static_range(WGS):
                        tma_store(dbias_desc, [b0, b1, head, m0 + w * BM, n0], zeros_s)
                else:
                    j = gl.arange(0, BN, LINE)
                    row = _own(dbias, dbias_strides, part, b0, b1, head, m0, n0) + j.to(gl.int64) * dbias_strides[5]
                    for i in range(min(BM * WGS, M - m0)):
                        gl.store(row + offset(i, dbias_strides[4]), gl.zeros([BN], dbias.dtype.element_ty, LINE), mask=n0 + j < N)
        if dbias_desc is not None:
            tma_store_wait(0)


@gluon.jit
def _own(dbias, strides, part, b0, b1, head, m0, n0):
    """Where a tile begins in a gradient of any strides."""
    base = dbias + offset(part, strides[0]) + offset(b0, strides[1]) + offset(b1, strides[2])
    return base + offset(head, strides[3]) + offset(m0, strides[4]) + offset(n0, strides[5])


@gluon.jit
def _multiply(
    acc, left_s, right_s, bars, at, WG: gl.constexpr, WGS: gl.constexpr, LEFT_FULL: gl.constexpr, RIGHT_FULL: gl.constexpr,
    FIRST: gl.constexpr,
):  # fmt: skip
    """Issue the product of one chunk, as soon as it is there."""
    LEFT: gl.constexpr = left_s.shape[0] // WGS
    RIGHT: gl.constexpr = right_s.shape[0]
    mbarrier.wait(bars[LEFT_FULL].index(at % LEFT), (at // LEFT) & 1)
    mbarrier.wait(bars[RIGHT_FULL].index(at % RIGHT), (at // RIGHT) & 1)
    left = left_s.index(at % LEFT * WGS + WG).reshape([left_s.shape[2], left_s.shape[4]])
    right = right_s.index(at % RIGHT).reshape([right_s.shape[2], right_s.shape[4]]).permute((1, 0))
    return warpgroup_mma(left, right, acc, use_acc=not FIRST, is_async=True)


@gluon.jit
def _release(bars, at, COUNT: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, LEFT_EMPTY: gl.constexpr, RIGHT_EMPTY: gl.constexpr):
    """COUNT chunks, of both sides, are no longer needed."""
    for c in gl.static_range(COUNT):
        mbarrier.arrive(bars[LEFT_EMPTY].index((at + c) % LEFT))
        mbarrier.arrive(bars[RIGHT_EMPTY].index((at + c) % RIGHT))


@gluon.jit
def _consume(
    dbias_desc, dbias, lengths, slopes, stats, left_s, right_s, bias_s, bars, dbias_strides, slope_strides, cap, dropout,
    mask, mask_strides, batch_outer, batch_inner, heads, M, N, lo, hi, scale, splits, tiles_m, tiles, places, fold, shuffle,
    WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, S_CHUNKS: gl.constexpr, DP_CHUNKS: gl.constexpr,
    VARIES_B0: gl.constexpr, VARIES_B1: gl.constexpr, VARIES_H: gl.constexpr, HAS_REST: gl.constexpr, EVEN: gl.constexpr,
    ALIBI: gl.constexpr,
    TURNS: gl.constexpr, MILD: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 queries of every tile of the program that somebody sees."""
    S: gl.constexpr = accumulator(BN)
    LEFT: gl.constexpr = left_s.shape[0] // WGS
    RIGHT: gl.constexpr = right_s.shape[0]
    BIASES: gl.constexpr = bias_s.shape[0]
    BIAS_STAGES: gl.constexpr = BIASES // WGS
    CHUNKS: gl.constexpr = S_CHUNKS + DP_CHUNKS
    EARLY: gl.constexpr = 0 if CHUNKS <= min(LEFT, RIGHT) else S_CHUNKS - 1  # chunks of s whose slots must be free before all of dp fits
    scale_log2 = scale * LOG2E
    nothing = gl.zeros([BM, BN], gl.float32, S)
    at = 0
    wave = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        part, b0, b1, own_head, m0, n0, first, last = _tile(
            index, batch_outer, batch_inner, heads, tiles_m, places, fold, shuffle, M, N, lo, hi, splits, VARIES_B0, VARIES_B1, VARIES_H,
            BM * WGS, BN,
        )  # fmt: skip
        m0 += WG * BM
        buffer = wave % BIAS_STAGES * WGS + WG
        acc = gl.zeros([BM, BN], gl.float32, S)
        for r in range(first, last):
            b, head = _round(r, b0, b1, own_head, batch_outer, batch_inner, VARIES_B0, VARIES_B1, VARIES_H)
            lse, delta, rest = statistics(stats, b * heads + head, m0, M, HAS_REST, BM, BN)
            n_keys = visible_keys(lengths, b, N)
            if mask is not None:
                j = n0 + gl.arange(0, BN, gl.SliceLayout(0, S))
                row = mask + offset(b // batch_inner, mask_strides[0]) + offset(b % batch_inner, mask_strides[1])
                row += offset(head, mask_strides[2])
                # A row that TMA could address: keys are neighbours, and it begins at an even address. Read by two, a byte past an odd end.
                if EVEN:
                    shown = gl.expand_dims(gl.load(row + j), 0)
                else:
                    shown = gl.expand_dims(gl.load(row + j, mask=j < (N + 1) // 2 * 2, other=0), 0)
            if TURNS:
                mbarrier.wait(bars[TURN + WG].index(0), (at // CHUNKS) & 1)
            s_pending = _multiply(nothing, left_s, right_s, bars, at, WG, WGS, LEFT_FULL, RIGHT_FULL, True)
            for c in gl.static_range(1, S_CHUNKS):
                s_pending = _multiply(s_pending, left_s, right_s, bars, at + c, WG, WGS, LEFT_FULL, RIGHT_FULL, False)
                if c <= EARLY:
                    s_pending = warpgroup_mma_wait(1, [s_pending])
                    _release(bars, at + c - 1, 1, LEFT, RIGHT, LEFT_EMPTY, RIGHT_EMPTY)
            dp_pending = _multiply(nothing, left_s, right_s, bars, at + S_CHUNKS, WG, WGS, LEFT_FULL, RIGHT_FULL, True)
            for c in gl.static_range(S_CHUNKS + 1, CHUNKS):
                dp_pending = _multiply(dp_pending, left_s, right_s, bars, at + c, WG, WGS, LEFT_FULL, RIGHT_FULL, False)
            if TURNS:
                mbarrier.arrive(bars[TURN + (WG + 1) % WGS].index(0))
            s = warpgroup_mma_wait(DP_CHUNKS, [s_pending])
            _release(bars, at + EARLY, S_CHUNKS - EARLY, LEFT, RIGHT, LEFT_EMPTY, RIGHT_EMPTY)

            mbarrier.wait(bars[BIAS_FULL].index(buffer), (wave // BIAS_STAGES) & 1)
            bias = bias_s.index(buffer).reshape([BM, BN]).load(S)
            if cap is not None:
                if lengths is not None:  # what a hidden key holds may make NaN of its score, and ``squashed`` of those beside it
                    s = hide_unseen(s, m0, n0, n_keys, None, None, BM, BN, "0f00000000")
                s = capped(squashed(s, cap), cap)
            else:
                s = s * scale_log2
            if MILD:
                s = s - gl.expand_dims(lse, 1)
            s = add_bias(s, bias, False)
            if ALIBI:
                slope = slope_of(slopes, slope_strides, b, head)
                s = add_alibi(s, slope, n0 - m0 - (N - M), 1, ALIBI)
            if mask is not None:
                s = add_bias(s, shown, True)
            if lengths is not None:
                s = hide_unseen(s, m0, n0, n_keys, None, None, BM, BN, "0fFF800000")
            if not MILD:
                s = exponents(s, lse, rest, HAS_REST, True)
            p = gl.exp2(s)
            if dropout is not None:
                p = signed(p, drawn(stream_of(dropout, b, head, heads), m0, n0, BM, BN, False))

            done = at + CHUNKS - 1  # long since full: waited for to keep ptxas from moving the wait for dp up
            mbarrier.wait(bars[RIGHT_FULL].index(done % RIGHT), (done // RIGHT) & 1)
            dp = warpgroup_mma_wait(0, [dp_pending])
            _release(bars, at + S_CHUNKS, DP_CHUNKS, LEFT, RIGHT, LEFT_EMPTY, RIGHT_EMPTY)
            if lengths is not None:  # values that are hidden may be anything
                dp = hide_unseen(dp, m0, n0, n_keys, None, None, BM, BN, "0f00000000")
            acc += of_scores(p, dp, gl.expand_dims(delta, 1), dropout is not None)
            at += CHUNKS

        if first < last:
            # Scores that nobody sees were summed like the others, and may have overflowed; queries that do not exist gave 0.
            if lo is not None or hi is not None:
                acc = hide_unseen(acc, m0, n0, N, lo, hi, BM, BN, "0f00000000")
            if dropout is not None:
                acc = acc * dropout[2]
            if dbias_desc is not None:
                bias_s.index(buffer).reshape([BM, BN]).store(acc.to(dbias_desc.dtype))
                fence_async_shared()
                tma_store(dbias_desc, [b0, b1, own_head, m0, n0], bias_s.index(buffer))
                tma_store_wait(0)
            else:
                base = _own(dbias, dbias_strides, part, b0, b1, own_head, m0, n0)
                i = gl.expand_dims(gl.arange(0, BM, gl.SliceLayout(1, S)), 1)
                j = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(0, S)), 0)
                pointers = base + i.to(gl.int64) * dbias_strides[4] + j.to(gl.int64) * dbias_strides[5]
                if EVEN:
                    gl.store(pointers, acc.to(dbias.dtype.element_ty))
                else:
                    gl.store(pointers, acc.to(dbias.dtype.element_ty), mask=(m0 + i < M) & (n0 + j < N))
                fence_async_shared()  # behind the loads of the bias: see the forward kernel
            mbarrier.arrive(bars[BIAS_EMPTY].index(buffer))
            wave += 1


@gluon.jit
def _consume_either(
    mild, dbias_desc, dbias, lengths, slopes, stats, left_s, right_s, bias_s, bars, dbias_strides, slope_strides, cap, dropout,
    mask, mask_strides, batch_outer, batch_inner, heads, M, N, lo, hi, scale, splits, tiles_m, tiles, places, fold, shuffle,
    WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, S_CHUNKS: gl.constexpr, DP_CHUNKS: gl.constexpr,
    VARIES_B0: gl.constexpr, VARIES_B1: gl.constexpr, VARIES_H: gl.constexpr, HAS_REST: gl.constexpr, EVEN: gl.constexpr,
    ALIBI: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    """One consumer: ``_consume`` in the faster way if all statistics are mild (``edges.py``)."""
    if (mild is not None) and (mildest(mild) != 0):
        _consume(
            dbias_desc, dbias, lengths, slopes, stats, left_s, right_s, bias_s, bars, dbias_strides, slope_strides, cap,
            dropout, mask, mask_strides, batch_outer, batch_inner, heads, M, N, lo, hi, scale, splits, tiles_m, tiles, places,
            fold, shuffle, WG, BM, BN, WGS, S_CHUNKS, DP_CHUNKS, VARIES_B0, VARIES_B1, VARIES_H, HAS_REST, EVEN, ALIBI, TURNS,
            True,
        )  # fmt: skip
    else:
        _consume(
            dbias_desc, dbias, lengths, slopes, stats, left_s, right_s, bias_s, bars, dbias_strides, slope_strides, cap,
            dropout, mask, mask_strides, batch_outer, batch_inner, heads, M, N, lo, hi, scale, splits, tiles_m, tiles, places,
            fold, shuffle, WG, BM, BN, WGS, S_CHUNKS, DP_CHUNKS, VARIES_B0, VARIES_B1, VARIES_H, HAS_REST, EVEN, ALIBI, TURNS,
            False,
        )  # fmt: skip


# Not specialised: nothing is gained from knowing that a count is 1 or a multiple of 16, and every combination would be compiled anew.
COUNTS = [
    "batch_outer", "batch_inner", "heads", "group", "M", "N", "lo", "hi", "splits", "tiles_m", "tiles_n", "tiles", "places", "fold",
    "shuffle",
]  # fmt: skip


@gluon.jit(do_not_specialize=COUNTS)
def dbias(
    q_desc, dout_desc, k_desc, v_desc, bias_desc, dbias_desc, dbias_out, lengths, slopes, stats, mild, dbias_strides, slope_strides, cap,
    dropout, mask, mask_strides, batch_outer, batch_inner, heads, group, M, N, lo, hi, scale, splits, tiles_m, tiles_n, tiles, places,
    fold, shuffle, D: gl.constexpr, DV: gl.constexpr, WGS: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, BIAS_STAGES: gl.constexpr,
    VARIES_B0: gl.constexpr, VARIES_B1: gl.constexpr, VARIES_H: gl.constexpr, HAS_REST: gl.constexpr, EVEN: gl.constexpr,
    ALIBI: gl.constexpr,
    TURNS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """``tiles_m`` by ``tiles_n`` tiles a head of the bias, which have ``places`` (``_tile``); ``tiles`` are the places of all heads of the
    bias, times ``splits``, the part slowest.

    Descriptors of q, dout, k, v are over (batch, length, head, dim) with blocks [1, rows, 1, chunk]; that of the bias over its five dims
    with blocks [1, 1, 1, 64, keys], and that of dbias, if it is one part in the bias's dtype. Else dbias_out is a pointer, with strides
    (part, outer batch, inner batch, head, query, key). stats: see ``rows.py``; cap: ``features.squashed``; dropout:
    ``dropout.stream_of``. Query head h reads key head
    ``h // group``.
    """
    BM: gl.constexpr = 64
    BN: gl.constexpr = k_desc.block_shape[1]
    CHUNK: gl.constexpr = k_desc.block_shape[3]
    S_CHUNKS: gl.constexpr = chunks_of(D, CHUNK)
    DP_CHUNKS: gl.constexpr = chunks_of(DV, CHUNK)
    BIASES: gl.constexpr = BIAS_STAGES * WGS
    DT: gl.constexpr = q_desc.dtype
    left_s = gl.allocate_shared_memory(DT, stacked(LEFT * WGS, q_desc.block_shape), q_desc.layout)
    right_s = gl.allocate_shared_memory(DT, stacked(RIGHT, k_desc.block_shape), k_desc.layout)
    bias_s = gl.allocate_shared_memory(bias_desc.dtype, stacked(BIASES, bias_desc.block_shape), bias_desc.layout)
    zeros_s = None
    if dbias_desc is not None and (lo is not None or hi is not None):
        zeros_s = gl.allocate_shared_memory(dbias_desc.dtype, dbias_desc.block_shape, dbias_desc.layout)
        zeros_s.reshape([BM, BN]).store(gl.zeros([BM, BN], dbias_desc.dtype, accumulator(BN)))
    left_full = barriers(LEFT, 1)  # every consumer reads every chunk
    left_empty = barriers(LEFT, WGS)
    right_full = barriers(RIGHT, 1)
    right_empty = barriers(RIGHT, WGS)
    bias_full = barriers(BIASES, 1)
    bias_empty = barriers(BIASES, 1)
    turns = (barriers(1, 1), barriers(1, 1))
    bars = (left_full, left_empty, right_full, right_empty, bias_full, bias_empty, turns[0], turns[1])
    fence_async_shared()
    if TURNS:
        mbarrier.arrive(bars[TURN].index(0))

    # Tuples of arguments are written out: bound to a name, their compile-time constants would become tensors.
    if WGS == 1:
        gl.warp_specialize([
            (_consume_either, (optional(mild), optional(dbias_desc), optional(dbias_out), optional(lengths), optional(slopes), stats,
                        left_s, right_s, bias_s, bars, optional(dbias_strides), optional(slope_strides), optional(cap),
                        optional(dropout), optional(mask), optional(mask_strides),
                        batch_outer, batch_inner, heads, M, N, optional(lo), optional(hi), scale, splits, tiles_m, tiles, places, fold,
                        shuffle, 0, BM, BN, WGS, S_CHUNKS, DP_CHUNKS, VARIES_B0, VARIES_B1, VARIES_H, HAS_REST, EVEN, ALIBI, TURNS)),
            (_produce, (q_desc, dout_desc, left_s, bars, batch_outer, batch_inner, heads, group, M, N, optional(lo), optional(hi),
                        splits, tiles_m, tiles, places, fold, shuffle, BM, BN, WGS, LEFT_FULL, LEFT_EMPTY, S_CHUNKS, DP_CHUNKS,
                        VARIES_B0, VARIES_B1, VARIES_H, False)),
            (_produce, (k_desc, v_desc, right_s, bars, batch_outer, batch_inner, heads, group, M, N, optional(lo), optional(hi),
                        splits, tiles_m, tiles, places, fold, shuffle, BM, BN, WGS, RIGHT_FULL, RIGHT_EMPTY, S_CHUNKS, DP_CHUNKS,
                        VARIES_B0, VARIES_B1, VARIES_H, True)),
            (_supply, (bias_desc, bias_s, bars, batch_outer, batch_inner, heads, M, N, optional(lo), optional(hi), splits, tiles_m, tiles,
                       places, fold, shuffle, BM, BN, WGS, BIAS_FULL, BIAS_EMPTY, VARIES_B0, VARIES_B1, VARIES_H)),
            (_clear, (optional(dbias_desc), optional(dbias_out), optional(zeros_s), optional(dbias_strides), batch_outer, batch_inner,
                      heads, M, N, optional(lo), optional(hi), splits, tiles_m, tiles_n, BM, BN, WGS, VARIES_B0, VARIES_B1, VARIES_H)),
        ], [1, 1, 1, 1], [32, 32, 32, 32])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume_either, (optional(mild), optional(dbias_desc), optional(dbias_out), optional(lengths), optional(slopes), stats,
                        left_s, right_s, bias_s, bars, optional(dbias_strides), optional(slope_strides), optional(cap),
                        optional(dropout), optional(mask), optional(mask_strides),
                        batch_outer, batch_inner, heads, M, N, optional(lo), optional(hi), scale, splits, tiles_m, tiles, places, fold,
                        shuffle, 0, BM, BN, WGS, S_CHUNKS, DP_CHUNKS, VARIES_B0, VARIES_B1, VARIES_H, HAS_REST, EVEN, ALIBI, TURNS)),
            (_consume_either, (optional(mild), optional(dbias_desc), optional(dbias_out), optional(lengths), optional(slopes), stats,
                        left_s, right_s, bias_s, bars, optional(dbias_strides), optional(slope_strides), optional(cap),
                        optional(dropout), optional(mask), optional(mask_strides),
                        batch_outer, batch_inner, heads, M, N, optional(lo), optional(hi), scale, splits, tiles_m, tiles, places, fold,
                        shuffle, 1, BM, BN, WGS, S_CHUNKS, DP_CHUNKS, VARIES_B0, VARIES_B1, VARIES_H, HAS_REST, EVEN, ALIBI, TURNS)),
            (_produce, (q_desc, dout_desc, left_s, bars, batch_outer, batch_inner, heads, group, M, N, optional(lo), optional(hi),
                        splits, tiles_m, tiles, places, fold, shuffle, BM, BN, WGS, LEFT_FULL, LEFT_EMPTY, S_CHUNKS, DP_CHUNKS,
                        VARIES_B0, VARIES_B1, VARIES_H, False)),
            (_produce, (k_desc, v_desc, right_s, bars, batch_outer, batch_inner, heads, group, M, N, optional(lo), optional(hi),
                        splits, tiles_m, tiles, places, fold, shuffle, BM, BN, WGS, RIGHT_FULL, RIGHT_EMPTY, S_CHUNKS, DP_CHUNKS,
                        VARIES_B0, VARIES_B1, VARIES_H, True)),
            (_supply, (bias_desc, bias_s, bars, batch_outer, batch_inner, heads, M, N, optional(lo), optional(hi), splits, tiles_m, tiles,
                       places, fold, shuffle, BM, BN, WGS, BIAS_FULL, BIAS_EMPTY, VARIES_B0, VARIES_B1, VARIES_H)),
            (_clear, (optional(dbias_desc), optional(dbias_out), optional(zeros_s), optional(dbias_strides), batch_outer, batch_inner,
                      heads, M, N, optional(lo), optional(hi), splits, tiles_m, tiles_n, BM, BN, WGS, VARIES_B0, VARIES_B1, VARIES_H)),
        ], [4, 1, 1, 1, 1], [REGISTERS, 32, 32, 32, 32])  # fmt: skip
