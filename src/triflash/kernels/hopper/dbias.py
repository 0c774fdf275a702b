"""The kernel for Hopper that gives the gradient of a bias that varies over queries and keys and broadcasts over batch or heads.

    dbias = sum over broadcast dims of ds,   ds = 2^(s - lse) * (dout vᵀ - delta)

A program owns tiles of 64 * WGS queries by BN keys of the bias's own shape, and for each loops over the dims that the bias broadcasts,
one round a (batch, head) pair, recomputing s and dp; the sum stays in registers, and a tile's bias in shared memory. Both products of a
round run over a head dim, and the producer feeds them like a matrix product: chunks of CHUNK columns of the two operands, (q, k) and then
(dout, v), in a ring of SLOTS buffers that does not care for rounds or tiles. The softmax of one consumer runs under the products of the
other and under its own dp; TURNS as in the forward kernel. The sum leaves through the buffer of its tile's bias; a tile that nobody sees
goes the same way, with no rounds.

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
from .features import add_alibi, capped, slope_of, squashed, visible_keys
from .grid import accumulator, stacked
from .rows import add_bias, exponents, hide, statistics, visible


@gluon.constexpr_function
def barrier_at(name, WGS, SLOTS):
    """Where the barriers of that name begin among all of a program's; "count" is the number of all."""
    sizes = {"full": SLOTS, "bias_full": WGS, "bias_empty": WGS, "turn": WGS, "empty": SLOTS, "count": 0}
    names = list(sizes)
    return sum(sizes[n] for n in names[: names.index(name)])


@gluon.constexpr_function
def chunks_of(dim, CHUNK):
    """How many chunks a head dim has."""
    return -(-dim // CHUNK)


@gluon.jit
def _tile(
    index, batch_outer, batch_inner, heads, tiles_m, tiles_n, shuffle, M, N, lo, hi, splits,
    VARIES_B0: gl.constexpr, VARIES_B1: gl.constexpr, VARIES_H: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """(part, outer batch, inner batch, head, first query, first key, first round, last round) of a tile; no rounds where nobody sees it.

    The tiles of a head come in steps of ``shuffle``, which has no divisor in common with their number.
    """
    left = index // (tiles_m * tiles_n)
    within = (index - left * (tiles_m * tiles_n)) * shuffle % (tiles_m * tiles_n)
    tn = within % tiles_n
    m0 = within // tiles_n * ROWS
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
    if lo is not None or hi is not None:
        begin, _a, _b, end = segments(m0, min(m0 + ROWS, M) - 1, N, lo, hi, BN)
        rounds = gl.where((tn >= begin) & (tn < end), rounds, 0)
    first = (offset(rounds, left) // splits).to(gl.int32)
    last = (offset(rounds, left + 1) // splits).to(gl.int32)
    return left, b0, b1, head, m0, tn * BN, first, last


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
    left_desc, right_desc, left_s, right_s, bars, at, b, left_row, left_head, right_row, right_head, column,
    BM: gl.constexpr, WGS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """One chunk of the operands of a product into its slot."""
    FULL: gl.constexpr = barrier_at("full", WGS, SLOTS)
    EMPTY: gl.constexpr = barrier_at("empty", WGS, SLOTS)
    slot = at % SLOTS
    full = bars.index(FULL + slot)
    mbarrier.wait(bars.index(EMPTY + slot), ((at // SLOTS) & 1) ^ 1)
    mbarrier.expect(full, WGS * left_desc.block_type.nbytes + right_desc.block_type.nbytes)
    for w in gl.static_range(WGS):
        tma_load(left_desc, [b, left_row + w * BM, left_head, column], full, left_s.index(slot * WGS + w))
    tma_load(right_desc, [b, right_row, right_head, column], full, right_s.index(slot))


@gluon.jit
def _produce(
    q_desc, dout_desc, k_desc, v_desc, bias_desc, left_s, right_s, bias_s, bars,
    batch_outer, batch_inner, heads, group, M, N, lo, hi, splits, tiles_m, tiles_n, tiles, shuffle,
    BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, SLOTS: gl.constexpr, S_CHUNKS: gl.constexpr, DP_CHUNKS: gl.constexpr,
    VARIES_B0: gl.constexpr, VARIES_B1: gl.constexpr, VARIES_H: gl.constexpr,
):  # fmt: skip
    """The producer: every load of the program, in the order in which the consumers need them."""
    BIAS_FULL: gl.constexpr = barrier_at("bias_full", WGS, SLOTS)
    BIAS_EMPTY: gl.constexpr = barrier_at("bias_empty", WGS, SLOTS)
    CHUNK: gl.constexpr = right_s.shape[4]
    at = 0  # chunks so far
    wave = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        _part, b0, b1, own_head, m0, n0, first, last = _tile(
            index, batch_outer, batch_inner, heads, tiles_m, tiles_n, shuffle, M, N, lo, hi, splits, VARIES_B0, VARIES_B1, VARIES_H,
            BM * WGS, BN,
        )  # fmt: skip
        for r in range(first, last):
            b, head = _round(r, b0, b1, own_head, batch_outer, batch_inner, VARIES_B0, VARIES_B1, VARIES_H)
            key_head = head // group
            for c in gl.static_range(S_CHUNKS):
                _fetch(q_desc, k_desc, left_s, right_s, bars, at + c, b, m0, head, n0, key_head, c * CHUNK, BM, WGS, SLOTS)
            for c in gl.static_range(DP_CHUNKS):
                _fetch(
                    dout_desc, v_desc, left_s, right_s, bars, at + S_CHUNKS + c, b, m0, head, n0, key_head, c * CHUNK, BM, WGS, SLOTS
                )  # fmt: skip
            at += S_CHUNKS + DP_CHUNKS
            if r == first:  # behind a whole round, since its buffer is busy until the tile before has left it
                for w in gl.static_range(WGS):
                    mbarrier.wait(bars.index(BIAS_EMPTY + w), (wave & 1) ^ 1)
                    mbarrier.expect(bars.index(BIAS_FULL + w), bias_desc.block_type.nbytes)
                    tma_load(bias_desc, [b0, b1, own_head, m0 + w * BM, n0], bars.index(BIAS_FULL + w), bias_s.index(w))
        if first == last:
            for w in gl.static_range(WGS):
                mbarrier.wait(bars.index(BIAS_EMPTY + w), (wave & 1) ^ 1)
                mbarrier.arrive(bars.index(BIAS_FULL + w))
        wave += 1


@gluon.jit
def _multiply(acc, left_s, right_s, bars, at, WG: gl.constexpr, WGS: gl.constexpr, SLOTS: gl.constexpr, FIRST: gl.constexpr):
    """Issue the product of one chunk, as soon as it is there."""
    FULL: gl.constexpr = barrier_at("full", WGS, SLOTS)
    BM: gl.constexpr = left_s.shape[2]
    BN: gl.constexpr = right_s.shape[2]
    CHUNK: gl.constexpr = right_s.shape[4]
    slot = at % SLOTS
    mbarrier.wait(bars.index(FULL + slot), (at // SLOTS) & 1)
    left = left_s.index(slot * WGS + WG).reshape([BM, CHUNK])
    right = right_s.index(slot).reshape([BN, CHUNK]).permute((1, 0))
    return warpgroup_mma(left, right, acc, use_acc=not FIRST, is_async=True)


@gluon.jit
def _consume(
    dbias_desc, dbias, lengths, slopes, stats, left_s, right_s, bias_s, bars,
    dbias_strides, slope_strides, cap, mask, mask_strides, batch_outer, batch_inner, heads, M, N, lo, hi, scale, splits, tiles_m, tiles_n,
    tiles, shuffle, WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, SLOTS: gl.constexpr, S_CHUNKS: gl.constexpr,
    DP_CHUNKS: gl.constexpr, VARIES_B0: gl.constexpr, VARIES_B1: gl.constexpr, VARIES_H: gl.constexpr, HAS_REST: gl.constexpr,
    EVEN: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 queries of every tile of the program."""
    S: gl.constexpr = accumulator(BN)
    FULL: gl.constexpr = barrier_at("full", WGS, SLOTS)
    EMPTY: gl.constexpr = barrier_at("empty", WGS, SLOTS)
    BIAS_FULL: gl.constexpr = barrier_at("bias_full", WGS, SLOTS)
    BIAS_EMPTY: gl.constexpr = barrier_at("bias_empty", WGS, SLOTS)
    TURN: gl.constexpr = barrier_at("turn", WGS, SLOTS)
    CHUNKS: gl.constexpr = S_CHUNKS + DP_CHUNKS
    EARLY: gl.constexpr = 0 if CHUNKS <= SLOTS else S_CHUNKS - 1  # chunks of s whose slots must be free before all of dp fits
    scale_log2 = scale * LOG2E
    nothing = gl.zeros([BM, BN], gl.float32, S)
    at = 0
    wave = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        part, b0, b1, own_head, m0, n0, first, last = _tile(
            index, batch_outer, batch_inner, heads, tiles_m, tiles_n, shuffle, M, N, lo, hi, splits, VARIES_B0, VARIES_B1, VARIES_H,
            BM * WGS, BN,
        )  # fmt: skip
        m0 += WG * BM
        acc = gl.zeros([BM, BN], gl.float32, S)
        for r in range(first, last):
            b, head = _round(r, b0, b1, own_head, batch_outer, batch_inner, VARIES_B0, VARIES_B1, VARIES_H)
            lse, delta, rest = statistics(stats, b * heads + head, m0, M, HAS_REST, BM, BN)
            if mask is not None:
                j = n0 + gl.arange(0, BN, gl.SliceLayout(0, S))
                row = mask + offset(b // batch_inner, mask_strides[0]) + offset(b % batch_inner, mask_strides[1])
                row += offset(head, mask_strides[2])
                shown = gl.expand_dims(gl.load(row + j.to(gl.int64) * mask_strides[4], mask=j < N, other=0), 0)
            if TURNS:
                mbarrier.wait(bars.index(TURN + WG), (at // CHUNKS) & 1)
            s_pending = _multiply(nothing, left_s, right_s, bars, at, WG, WGS, SLOTS, True)
            for c in gl.static_range(1, S_CHUNKS):
                s_pending = _multiply(s_pending, left_s, right_s, bars, at + c, WG, WGS, SLOTS, False)
                if c <= EARLY:
                    s_pending = warpgroup_mma_wait(1, [s_pending])
                    mbarrier.arrive(bars.index(EMPTY + (at + c - 1) % SLOTS))
            dp_pending = _multiply(nothing, left_s, right_s, bars, at + S_CHUNKS, WG, WGS, SLOTS, True)
            for c in gl.static_range(1, DP_CHUNKS):
                dp_pending = _multiply(dp_pending, left_s, right_s, bars, at + S_CHUNKS + c, WG, WGS, SLOTS, False)
            if TURNS:
                mbarrier.arrive(bars.index(TURN + (WG + 1) % WGS))
            s = warpgroup_mma_wait(DP_CHUNKS, [s_pending])
            for c in gl.static_range(EARLY, S_CHUNKS):
                mbarrier.arrive(bars.index(EMPTY + (at + c) % SLOTS))

            mbarrier.wait(bars.index(BIAS_FULL + WG), wave & 1)
            bias = bias_s.index(WG).reshape([BM, BN]).load(S)
            if cap is not None:
                s = capped(squashed(s, cap), cap)
            else:
                s = s * scale_log2
            s = add_bias(s, bias, False)
            if slopes is not None:
                i = gl.expand_dims(m0 + (N - M) + gl.arange(0, BM, gl.SliceLayout(1, S)), 1)
                j = gl.expand_dims(n0 + gl.arange(0, BN, gl.SliceLayout(0, S)), 0)
                s = add_alibi(s, slope_of(slopes, slope_strides, b, head), i, j)
            if mask is not None:
                s = hide(s, shown != 0, float("-inf"))
            if lengths is not None:
                s = hide(s, visible(m0, n0, visible_keys(lengths, b, N), None, None, BM, BN), float("-inf"))
            p = gl.exp2(exponents(s, lse, rest, HAS_REST, True))

            done = at + CHUNKS - 1
            mbarrier.wait(bars.index(FULL + done % SLOTS), (done // SLOTS) & 1)  # long since full: keeps ptxas from moving the wait up
            dp = warpgroup_mma_wait(0, [dp_pending])
            for c in gl.static_range(S_CHUNKS, CHUNKS):
                mbarrier.arrive(bars.index(EMPTY + (at + c) % SLOTS))
            acc += p * (dp - gl.expand_dims(delta, 1))
            at += CHUNKS

        # Scores that nobody sees were summed like the others, and may have overflowed; queries that do not exist gave 0.
        if lo is not None or hi is not None:
            acc = hide(acc, visible(m0, n0, N, lo, hi, BM, BN), 0.0)
        mbarrier.wait(bars.index(BIAS_FULL + WG), wave & 1)  # the buffer is this tile's also if there was no round
        if dbias_desc is not None:
            bias_s.index(WG).reshape([BM, BN]).store(acc.to(dbias_desc.dtype))
            fence_async_shared()
            tma_store(dbias_desc, [b0, b1, own_head, m0, n0], bias_s.index(WG))
            tma_store_wait(0)
        else:
            base = dbias + offset(part, dbias_strides[0]) + offset(b0, dbias_strides[1]) + offset(b1, dbias_strides[2])
            base += offset(own_head, dbias_strides[3]) + offset(m0, dbias_strides[4]) + offset(n0, dbias_strides[5])
            i = gl.expand_dims(gl.arange(0, BM, gl.SliceLayout(1, S)), 1)
            j = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(0, S)), 0)
            pointers = base + i.to(gl.int64) * dbias_strides[4] + j.to(gl.int64) * dbias_strides[5]
            if EVEN:
                gl.store(pointers, acc.to(dbias.dtype.element_ty))
            else:
                gl.store(pointers, acc.to(dbias.dtype.element_ty), mask=(m0 + i < M) & (n0 + j < N))
            fence_async_shared()  # behind the loads of the bias: see the forward kernel
        mbarrier.arrive(bars.index(BIAS_EMPTY + WG))
        wave += 1


# Not specialised: nothing is gained from knowing that a count is 1 or a multiple of 16, and every combination would be compiled anew.
COUNTS = ["batch_outer", "batch_inner", "heads", "group", "M", "N", "lo", "hi", "splits", "tiles_m", "tiles_n", "tiles", "shuffle"]


@gluon.jit(do_not_specialize=COUNTS)
def dbias(
    q_desc, dout_desc, k_desc, v_desc, bias_desc, dbias_desc, dbias_out, lengths, slopes, stats, dbias_strides, slope_strides, cap, mask,
    mask_strides, batch_outer, batch_inner, heads, group, M, N, lo, hi, scale, splits, tiles_m, tiles_n, tiles, shuffle,
    D: gl.constexpr, DV: gl.constexpr, WGS: gl.constexpr, SLOTS: gl.constexpr,
    VARIES_B0: gl.constexpr, VARIES_B1: gl.constexpr, VARIES_H: gl.constexpr, HAS_REST: gl.constexpr, EVEN: gl.constexpr,
    TURNS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """``tiles`` tiles, ``tiles_m`` by ``tiles_n`` a head of the bias, times ``splits``; within a head as ``_tile`` says, the part slowest.

    Descriptors of q, dout, k, v are over (batch, length, head, dim) with blocks [1, rows, 1, chunk]; that of the bias over its five dims
    with blocks [1, 1, 1, 64, keys], and that of dbias, if it is one part in the bias's dtype. Else dbias_out is a pointer, with strides
    (part, outer batch, inner batch, head, query,
    key). stats: see ``rows.py``; cap: ``features.squashed``. Query head h reads key head ``h // group``.
    """
    BM: gl.constexpr = 64
    BN: gl.constexpr = k_desc.block_shape[1]
    CHUNK: gl.constexpr = k_desc.block_shape[3]
    S_CHUNKS: gl.constexpr = chunks_of(D, CHUNK)
    DP_CHUNKS: gl.constexpr = chunks_of(DV, CHUNK)
    DT: gl.constexpr = q_desc.dtype
    left_s = gl.allocate_shared_memory(DT, stacked(SLOTS * WGS, q_desc.block_shape), q_desc.layout)
    right_s = gl.allocate_shared_memory(DT, stacked(SLOTS, k_desc.block_shape), k_desc.layout)
    bias_s = gl.allocate_shared_memory(bias_desc.dtype, stacked(WGS, bias_desc.block_shape), bias_desc.layout)
    COUNT: gl.constexpr = barrier_at("count", WGS, SLOTS)
    EMPTY: gl.constexpr = barrier_at("empty", WGS, SLOTS)
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(COUNT):
        if n >= EMPTY:
            mbarrier.init(bars.index(n), count=WGS)  # every consumer reads every chunk
        else:
            mbarrier.init(bars.index(n), count=1)
    fence_async_shared()
    if TURNS:
        mbarrier.arrive(bars.index(barrier_at("turn", WGS, SLOTS)))

    # Tuples of arguments are written out: bound to a name, their compile-time constants would become tensors.
    if WGS == 1:
        gl.warp_specialize([
            (_consume, (optional(dbias_desc), optional(dbias_out), optional(lengths), optional(slopes), stats, left_s, right_s, bias_s,
                        bars,
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(mask), optional(mask_strides),
                        batch_outer, batch_inner, heads, M, N, optional(lo), optional(hi), scale, splits, tiles_m, tiles_n, tiles, shuffle,
                        0, BM, BN, WGS, SLOTS, S_CHUNKS, DP_CHUNKS, VARIES_B0, VARIES_B1, VARIES_H, HAS_REST, EVEN,
                        TURNS)),
            (_produce, (q_desc, dout_desc, k_desc, v_desc, bias_desc, left_s, right_s, bias_s, bars, batch_outer, batch_inner, heads,
                        group, M, N, optional(lo), optional(hi), splits, tiles_m, tiles_n, tiles, shuffle, BM, BN, WGS, SLOTS,
                        S_CHUNKS, DP_CHUNKS, VARIES_B0, VARIES_B1, VARIES_H)),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (optional(dbias_desc), optional(dbias_out), optional(lengths), optional(slopes), stats, left_s, right_s, bias_s,
                        bars,
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(mask), optional(mask_strides),
                        batch_outer, batch_inner, heads, M, N, optional(lo), optional(hi), scale, splits, tiles_m, tiles_n, tiles, shuffle,
                        0, BM, BN, WGS, SLOTS, S_CHUNKS, DP_CHUNKS, VARIES_B0, VARIES_B1, VARIES_H, HAS_REST, EVEN,
                        TURNS)),
            (_consume, (optional(dbias_desc), optional(dbias_out), optional(lengths), optional(slopes), stats, left_s, right_s, bias_s,
                        bars,
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(mask), optional(mask_strides),
                        batch_outer, batch_inner, heads, M, N, optional(lo), optional(hi), scale, splits, tiles_m, tiles_n, tiles, shuffle,
                        1, BM, BN, WGS, SLOTS, S_CHUNKS, DP_CHUNKS, VARIES_B0, VARIES_B1, VARIES_H, HAS_REST, EVEN,
                        TURNS)),
            (_produce, (q_desc, dout_desc, k_desc, v_desc, bias_desc, left_s, right_s, bias_s, bars, batch_outer, batch_inner, heads,
                        group, M, N, optional(lo), optional(hi), splits, tiles_m, tiles_n, tiles, shuffle, BM, BN, WGS, SLOTS,
                        S_CHUNKS, DP_CHUNKS, VARIES_B0, VARIES_B1, VARIES_H)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
