"""The forward kernel for Hopper.

A program is one producer warp and WGS consumer warpgroups. The producer fetches tiles of q, k, v and of the bias by TMA into shared memory, as
far ahead as there are buffers; each consumer owns 64 queries and folds key blocks into its registers. They meet at barriers in shared memory:
for every buffer one that says "full" and one that says "empty". A program works through several tiles (a persistent grid), so that the loads
of one tile run under the arithmetic of the one before.

Within a consumer the products of two neighbouring blocks overlap: q kᵀ of block j is issued together with p v of block j - 1, and the softmax of
block j runs while the latter is still under way (FlashAttention-3, Shah et al. 2024). With TURNS, consumers issue their products in turn, so
that the softmax of one runs under the products of another.

Blocks are visited from the last that a tile sees to its first. Recurrence and conventions as in ``kernels/triton/forward.py``.
"""

from ..triton.prims import LN2, LOG2E, offset, segments
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


@gluon.constexpr_function
def barrier_at(name, WGS, STAGES, BIAS_STAGES):
    """Where the barriers of that name begin among all of a program's; "count" is the number of all."""
    sizes = {
        "q_full": WGS, "q_empty": WGS, "k_full": STAGES, "k_empty": STAGES, "v_full": STAGES, "v_empty": STAGES,
        "turn": WGS, "bias_full": WGS * BIAS_STAGES, "bias_empty": WGS * BIAS_STAGES, "count": 0,
    }  # fmt: skip
    names = list(sizes)
    return sum(sizes[n] for n in names[: names.index(name)])


@gluon.constexpr_function
def accumulator(columns):
    """How a warpgroup holds the result of a product: 64 rows, 16 a warp."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def stacked(count, shape):
    """The shape of ``count`` blocks."""
    return [count, *shape]


@gluon.jit
def locate(index, tiles_m, batch, heads, section, BATCH_FASTEST: gl.constexpr, REVERSED: gl.constexpr):
    """(query tile, head, batch) of a tile's index.

    Pairs of batch and head are cut into sections whose keys and values fit in the L2 cache. Within a section all pairs do one query tile
    before any does the next, and with REVERSED the last query tiles, which see most keys under a causal mask, come first. BATCH_FASTEST:
    neighbours differ in the batch, not the head, and so share a bias that broadcasts over the batch.
    """
    first = index // (section * tiles_m) * section
    rest = index % (section * tiles_m)
    size = min(section, batch * heads - first)
    tile = rest // size
    pair = first + rest % size
    if REVERSED:
        tile = tiles_m - 1 - tile
    if BATCH_FASTEST:
        head = pair // batch
        b = pair % batch
    else:
        head = pair % heads
        b = pair // heads
    return tile, head, b


@gluon.jit
def visible_blocks(m0, rows, M, N, lo, hi, BN: gl.constexpr):
    """``segments`` of the queries ``m0 … m0 + rows``, but never empty: queries that see no key get one block to hide altogether."""
    begin, full_begin, full_end, end = segments(m0, min(m0 + rows, M) - 1, N, lo, hi, BN)
    return begin, full_begin, full_end, max(end, begin + 1)


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, bias_desc, q_s, k_s, v_s, bias_s, bars,
    batch, heads, batch_inner, M, N, lo, hi, bias_on, tiles_m, tiles, section,
    BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr, BATCH_FASTEST: gl.constexpr,
    VARIES_M: gl.constexpr,
):  # fmt: skip
    """The producer: every load of the program, in the order in which the consumers need them."""
    Q_FULL: gl.constexpr = barrier_at("q_full", WGS, STAGES, BIAS_STAGES)
    Q_EMPTY: gl.constexpr = barrier_at("q_empty", WGS, STAGES, BIAS_STAGES)
    K_FULL: gl.constexpr = barrier_at("k_full", WGS, STAGES, BIAS_STAGES)
    K_EMPTY: gl.constexpr = barrier_at("k_empty", WGS, STAGES, BIAS_STAGES)
    V_FULL: gl.constexpr = barrier_at("v_full", WGS, STAGES, BIAS_STAGES)
    V_EMPTY: gl.constexpr = barrier_at("v_empty", WGS, STAGES, BIAS_STAGES)
    BIAS_FULL: gl.constexpr = barrier_at("bias_full", WGS, STAGES, BIAS_STAGES)
    BIAS_EMPTY: gl.constexpr = barrier_at("bias_empty", WGS, STAGES, BIAS_STAGES)
    done = 0  # blocks of earlier tiles: buffers and phases go on counting across tiles
    round = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile, head, b = locate(index, tiles_m, batch, heads, section, BATCH_FASTEST, hi is not None)
        m0 = tile * (BM * WGS)
        begin, _a, _b, end = visible_blocks(m0, BM * WGS, M, N, lo, hi, BN)
        for w in gl.static_range(WGS):
            mbarrier.wait(bars.index(Q_EMPTY + w), (round & 1) ^ 1)
            mbarrier.expect(bars.index(Q_FULL + w), q_desc.block_type.nbytes)
            tma_load(q_desc, [b, m0 + w * BM, head, 0], bars.index(Q_FULL + w), q_s.index(w))
        for j in range(end - begin):
            n0 = (end - 1 - j) * BN
            at = done + j
            stage = at % STAGES
            phase = (at // STAGES) & 1
            mbarrier.wait(bars.index(K_EMPTY + stage), phase ^ 1)
            mbarrier.expect(bars.index(K_FULL + stage), k_desc.block_type.nbytes)
            tma_load(k_desc, [b, n0, head, 0], bars.index(K_FULL + stage), k_s.index(stage))
            if bias_desc is not None:
                bias_phase = (at // BIAS_STAGES) & 1
                for w in gl.static_range(WGS):
                    slot = at % BIAS_STAGES * WGS + w
                    mbarrier.wait(bars.index(BIAS_EMPTY + slot), bias_phase ^ 1)
                    mbarrier.expect(bars.index(BIAS_FULL + slot), bias_desc.block_type.nbytes)
                    row = 0
                    if VARIES_M:
                        row = m0 + w * BM
                    tma_load(
                        bias_desc,
                        [b // batch_inner * bias_on[0], b % batch_inner * bias_on[1], head * bias_on[2], row, n0],
                        bars.index(BIAS_FULL + slot),
                        bias_s.index(slot),
                    )
            mbarrier.wait(bars.index(V_EMPTY + stage), phase ^ 1)
            mbarrier.expect(bars.index(V_FULL + stage), v_desc.block_type.nbytes)
            tma_load(v_desc, [b, n0, head, 0], bars.index(V_FULL + stage), v_s.index(stage))
        done += end - begin
        round += 1


@gluon.jit
def _softmax(
    s, m, bias_s, bars, row_bias, at, i, n0, N, lo, hi, scale_log2,
    WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr,
    IS_MASK: gl.constexpr, VARIES_M: gl.constexpr, POSITIVE_SCALE: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """From the product of one block to ``(p, new maximum, what m-based sums shrink by)``, for 64 queries."""
    S: gl.constexpr = accumulator(BN)
    COLS: gl.constexpr = gl.SliceLayout(0, S)
    BIAS_FULL: gl.constexpr = barrier_at("bias_full", WGS, STAGES, BIAS_STAGES)
    BIAS_EMPTY: gl.constexpr = barrier_at("bias_empty", WGS, STAGES, BIAS_STAGES)
    BIASED: gl.constexpr = (bias_s is not None) or (row_bias is not None)
    LATE_SCALE: gl.constexpr = POSITIVE_SCALE and not BIASED
    if not LATE_SCALE:
        s = s * scale_log2
    if bias_s is not None:
        slot = at % BIAS_STAGES * WGS + WG
        mbarrier.wait(bars.index(BIAS_FULL + slot), (at // BIAS_STAGES) & 1)
        if VARIES_M:
            bias = bias_s.index(slot).reshape([BM, BN]).load(S)
        else:
            bias = gl.expand_dims(bias_s.index(slot).reshape([BN]).load(COLS), 0)
        mbarrier.arrive(bars.index(BIAS_EMPTY + slot))
        if IS_MASK:
            s = gl.where(bias != 0, s, float("-inf"))
        else:
            bias, s = gl.broadcast(bias.to(gl.float32), s)
            s = gl.fma(bias, gl.full([BM, BN], LOG2E, gl.float32, S), s)
    if row_bias is not None:
        row, s = gl.broadcast(gl.expand_dims(row_bias, 1), s)
        if IS_MASK:
            s = gl.where(row != 0, s, float("-inf"))
        else:
            s = gl.fma(row, gl.full([BM, BN], LOG2E, gl.float32, S), s)
    if MASKED:
        j = n0 + gl.arange(0, BN, COLS)
        seen = gl.expand_dims(j < N, 0)
        away = gl.expand_dims(j, 0) - gl.expand_dims(i, 1)
        if lo is not None:
            seen = seen & (away >= lo)
        if hi is not None:
            seen = seen & (away <= hi)
        s = gl.where(seen, s, float("-inf"))
    top = gl.max(s, 1)
    if LATE_SCALE:
        top = top * scale_log2
    m_new = gl.maximum(m, top)
    m_safe = m_new
    if MASKED or BIASED:
        m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key yet: 2^(-inf - 0) = 0, never NaN
    if LATE_SCALE:
        p = gl.exp2(s * scale_log2 - gl.expand_dims(m_safe, 1))
    else:
        p = gl.exp2(s - gl.expand_dims(m_safe, 1))
    return p, m_new, gl.exp2(m - m_safe)


@gluon.jit
def _walk(
    o, l, m, p, q, k_s, v_s, bias_s, bars, row_bias, done, first, last, end, i, N, lo, hi, scale_log2,
    WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BDV: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr,
    BIAS_STAGES: gl.constexpr, IS_MASK: gl.constexpr, VARIES_M: gl.constexpr, POSITIVE_SCALE: gl.constexpr, TURNS: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Blocks ``first … last`` of a tile: the product of each, then p v of the one before under its softmax."""
    S: gl.constexpr = accumulator(BN)
    O: gl.constexpr = accumulator(BDV)
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    K_FULL: gl.constexpr = barrier_at("k_full", WGS, STAGES, BIAS_STAGES)
    K_EMPTY: gl.constexpr = barrier_at("k_empty", WGS, STAGES, BIAS_STAGES)
    V_FULL: gl.constexpr = barrier_at("v_full", WGS, STAGES, BIAS_STAGES)
    V_EMPTY: gl.constexpr = barrier_at("v_empty", WGS, STAGES, BIAS_STAGES)
    TURN: gl.constexpr = barrier_at("turn", WGS, STAGES, BIAS_STAGES)
    nothing = gl.zeros([BM, BN], gl.float32, S)
    for j in range(first, last):
        at = done + j
        stage = at % STAGES
        before = (at - 1) % STAGES
        mbarrier.wait(bars.index(K_FULL + stage), (at // STAGES) & 1)
        if TURNS:
            mbarrier.wait(bars.index(TURN + WG), at & 1)
        s_pending = warpgroup_mma(q, k_s.index(stage).reshape([BN, k_s.shape[4]]).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(bars.index(V_FULL + before), ((at - 1) // STAGES) & 1)
        o_pending = warpgroup_mma(p, v_s.index(before).reshape([BN, BDV]), o, is_async=True)
        if TURNS:
            mbarrier.arrive(bars.index(TURN + (WG + 1) % WGS))
        s = warpgroup_mma_wait(1, [s_pending])
        mbarrier.arrive(bars.index(K_EMPTY + stage))
        p32, m, shrink = _softmax(
            s, m, bias_s, bars, row_bias, at, i, (end - 1 - j) * BN, N, lo, hi, scale_log2,
            WG, BM, BN, WGS, STAGES, BIAS_STAGES, IS_MASK, VARIES_M, POSITIVE_SCALE, MASKED,
        )  # fmt: skip
        l = l * shrink + gl.sum(p32, 1)
        o = warpgroup_mma_wait(0, [o_pending])
        mbarrier.arrive(bars.index(V_EMPTY + before))
        p = gl.convert_layout(p32.to(q.dtype), P)
        o = o * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, O)), 1)
    return o, l, m, p


@gluon.jit
def _consume(
    out_desc, bias, lse, rest, q_s, k_s, v_s, out_s, bias_s, bars,
    bias_strides, batch, heads, batch_inner, M, N, lo, hi, scale_log2, tiles_m, tiles, section,
    WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr,
    BATCH_FASTEST: gl.constexpr, IS_MASK: gl.constexpr, VARIES_M: gl.constexpr, POSITIVE_SCALE: gl.constexpr, EVEN_N: gl.constexpr,
    TURNS: gl.constexpr, OWN_OUT: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 queries of every tile of the program."""
    BD: gl.constexpr = q_s.shape[4]
    BDV: gl.constexpr = v_s.shape[4]
    S: gl.constexpr = accumulator(BN)
    O: gl.constexpr = accumulator(BDV)
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, S)
    Q_FULL: gl.constexpr = barrier_at("q_full", WGS, STAGES, BIAS_STAGES)
    Q_EMPTY: gl.constexpr = barrier_at("q_empty", WGS, STAGES, BIAS_STAGES)
    K_FULL: gl.constexpr = barrier_at("k_full", WGS, STAGES, BIAS_STAGES)
    K_EMPTY: gl.constexpr = barrier_at("k_empty", WGS, STAGES, BIAS_STAGES)
    V_FULL: gl.constexpr = barrier_at("v_full", WGS, STAGES, BIAS_STAGES)
    V_EMPTY: gl.constexpr = barrier_at("v_empty", WGS, STAGES, BIAS_STAGES)
    TURN: gl.constexpr = barrier_at("turn", WGS, STAGES, BIAS_STAGES)
    MASKED: gl.constexpr = (lo is not None) or (hi is not None) or (not EVEN_N)
    q = q_s.index(WG).reshape([BM, BD])
    nothing = gl.zeros([BM, BN], gl.float32, S)
    done = 0
    round = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile, head, b = locate(index, tiles_m, batch, heads, section, BATCH_FASTEST, hi is not None)
        m0 = tile * (BM * WGS)
        begin, full_begin, full_end, end = visible_blocks(m0, BM * WGS, M, N, lo, hi, BN)
        i = m0 + WG * BM + gl.arange(0, BM, ROWS)
        if bias is not None:  # no dim of keys: one number per query
            at_bias = bias + offset(b // batch_inner, bias_strides[0]) + offset(b % batch_inner, bias_strides[1])
            at_bias += offset(head, bias_strides[2])
            row_bias = gl.load(at_bias + i.to(gl.int64) * bias_strides[3], mask=i < M, other=0).to(gl.float32)
        else:
            row_bias = None
        m = gl.full([BM], float("-inf"), gl.float32, ROWS)

        mbarrier.wait(bars.index(Q_FULL + WG), round & 1)
        stage = done % STAGES
        mbarrier.wait(bars.index(K_FULL + stage), (done // STAGES) & 1)
        if TURNS:
            mbarrier.wait(bars.index(TURN + WG), done & 1)
        s_pending = warpgroup_mma(q, k_s.index(stage).reshape([BN, BD]).permute((1, 0)), nothing, use_acc=False, is_async=True)
        if TURNS:
            mbarrier.arrive(bars.index(TURN + (WG + 1) % WGS))
        s = warpgroup_mma_wait(0, [s_pending])
        mbarrier.arrive(bars.index(K_EMPTY + stage))
        p32, m, _shrink = _softmax(
            s, m, bias_s, bars, row_bias, done, i, (end - 1) * BN, N, lo, hi, scale_log2,
            WG, BM, BN, WGS, STAGES, BIAS_STAGES, IS_MASK, VARIES_M, POSITIVE_SCALE, MASKED,
        )  # fmt: skip
        l = gl.sum(p32, 1)
        p = gl.convert_layout(p32.to(q.dtype), P)
        o = gl.zeros([BM, BDV], gl.float32, O)

        # The first block was any kind's; what is left: partly visible on the right, whole, partly visible on the left.
        if hi is not None:
            o, l, m, p = _walk(
                o, l, m, p, q, k_s, v_s, bias_s, bars, row_bias, done, 1, end - full_end, end, i, N, lo, hi, scale_log2,
                WG, BM, BN, BDV, WGS, STAGES, BIAS_STAGES, IS_MASK, VARIES_M, POSITIVE_SCALE, TURNS, True,
            )  # fmt: skip
        o, l, m, p = _walk(
            o, l, m, p, q, k_s, v_s, bias_s, bars, row_bias, done, max(1, end - full_end), end - full_begin, end, i, N, lo, hi, scale_log2,
            WG, BM, BN, BDV, WGS, STAGES, BIAS_STAGES, IS_MASK, VARIES_M, POSITIVE_SCALE, TURNS, False,
        )  # fmt: skip
        if lo is not None:
            o, l, m, p = _walk(
                o, l, m, p, q, k_s, v_s, bias_s, bars, row_bias, done, max(1, end - full_begin), end - begin, end, i, N, lo, hi, scale_log2,
                WG, BM, BN, BDV, WGS, STAGES, BIAS_STAGES, IS_MASK, VARIES_M, POSITIVE_SCALE, TURNS, True,
            )  # fmt: skip
        if OWN_OUT:
            mbarrier.arrive(bars.index(Q_EMPTY + WG))
        last = done + end - begin - 1
        mbarrier.wait(bars.index(V_FULL + last % STAGES), (last // STAGES) & 1)
        o = warpgroup_mma_wait(0, [warpgroup_mma(p, v_s.index(last % STAGES).reshape([BN, BDV]), o, is_async=True)])
        mbarrier.arrive(bars.index(V_EMPTY + last % STAGES))

        unseen = l == 0.0
        l = gl.where(unseen, 1.0, l)
        o = o * gl.expand_dims(gl.convert_layout(1.0 / l, gl.SliceLayout(1, O)), 1)
        if OWN_OUT:
            tma_store_wait(0)  # the tile before must have left the buffer
            target = out_s.index(WG)
        else:
            target = q_s.index(WG)  # every product with q is done
        target.reshape([BM, BDV]).store(o.to(q.dtype))
        fence_async_shared()
        tma_store(out_desc, [b, m0 + WG * BM, head, 0], target)
        row_lse = gl.where(unseen, float("-inf"), (m + gl.log2(l)) * LN2)
        at_row = offset(b * heads + head, M) + i
        gl.store(lse + at_row, row_lse, mask=i < M)
        if rest is not None:  # see lse_rest of the portable kernels
            again = gl.where(unseen, 0.0, row_lse * LOG2E)
            gl.store(rest + at_row, gl.where(unseen, 0.0, (m - again) + gl.log2(l)), mask=i < M)
        if not OWN_OUT:
            tma_store_wait(0)
            mbarrier.arrive(bars.index(Q_EMPTY + WG))
        done += end - begin
        round += 1
    if OWN_OUT:
        tma_store_wait(0)


@gluon.jit
def forward(
    q_desc, k_desc, v_desc, out_desc, bias_desc, bias, lse, rest, bias_strides, bias_on,
    batch, heads, batch_inner, M, N, lo, hi, scale, tiles_m, tiles, section,
    BN: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr, BATCH_FASTEST: gl.constexpr,
    IS_MASK: gl.constexpr, VARIES_M: gl.constexpr, POSITIVE_SCALE: gl.constexpr, EVEN_N: gl.constexpr, TURNS: gl.constexpr,
    OWN_OUT: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Tiles of 64 * WGS queries; ``tiles`` of them, ``tiles_m`` a (batch, head) pair, dealt out as ``locate`` says.

    Descriptors of q, k, v, out are over (batch, length, head, dim) with blocks [1, rows, 1, dims]; that of the bias over its five dims, whose
    broadcast ones have size 1 and are switched off by a 0 in ``bias_on``. A bias without a dim of keys comes as a pointer and strides
    (outer batch, inner batch, head, query) instead. lse and rest are contiguous (batch, head, query). None: absent.

    OWN_OUT: the output leaves through a buffer of its own rather than q's, so that the next q can be fetched before it has left.
    """
    BM: gl.constexpr = 64
    DT: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(DT, stacked(WGS, q_desc.block_shape), q_desc.layout)
    k_s = gl.allocate_shared_memory(DT, stacked(STAGES, k_desc.block_shape), k_desc.layout)
    v_s = gl.allocate_shared_memory(DT, stacked(STAGES, v_desc.block_shape), v_desc.layout)
    if OWN_OUT:
        out_s = gl.allocate_shared_memory(DT, stacked(WGS, out_desc.block_shape), out_desc.layout)
    else:
        out_s = None
    if bias_desc is not None:
        bias_s = gl.allocate_shared_memory(bias_desc.dtype, stacked(BIAS_STAGES * WGS, bias_desc.block_shape), bias_desc.layout)
    else:
        bias_s = None
    COUNT: gl.constexpr = barrier_at("count", WGS, STAGES, BIAS_STAGES)
    K_EMPTY: gl.constexpr = barrier_at("k_empty", WGS, STAGES, BIAS_STAGES)
    V_FULL: gl.constexpr = barrier_at("v_full", WGS, STAGES, BIAS_STAGES)
    V_EMPTY: gl.constexpr = barrier_at("v_empty", WGS, STAGES, BIAS_STAGES)
    TURN: gl.constexpr = barrier_at("turn", WGS, STAGES, BIAS_STAGES)
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(COUNT):
        if (n >= K_EMPTY and n < V_FULL) or (n >= V_EMPTY and n < TURN):
            mbarrier.init(bars.index(n), count=WGS)  # every consumer reads every key block
        else:
            mbarrier.init(bars.index(n), count=1)
    fence_async_shared()
    if TURNS:
        mbarrier.arrive(bars.index(TURN))
    scale_log2 = scale * LOG2E

    # Tuples of arguments are written out: bound to a name, their compile-time constants would become tensors.
    if WGS == 1:
        gl.warp_specialize([
            (_consume, (out_desc, optional(bias), lse, optional(rest), q_s, k_s, v_s, optional(out_s), optional(bias_s), bars,
                        optional(bias_strides), batch, heads, batch_inner, M, N, optional(lo), optional(hi), scale_log2, tiles_m, tiles, section,
                        0, BM, BN, WGS, STAGES, BIAS_STAGES, BATCH_FASTEST, IS_MASK, VARIES_M,
                        POSITIVE_SCALE, EVEN_N, TURNS, OWN_OUT)),
            (_produce, (q_desc, k_desc, v_desc, optional(bias_desc), q_s, k_s, v_s, optional(bias_s), bars, batch, heads, batch_inner, M, N,
                        optional(lo), optional(hi), optional(bias_on), tiles_m, tiles, section, BM, BN, WGS, STAGES, BIAS_STAGES, BATCH_FASTEST, VARIES_M)),
        ], [1], [24])  # fmt: skip
    elif WGS == 2:
        gl.warp_specialize([
            (_consume, (out_desc, optional(bias), lse, optional(rest), q_s, k_s, v_s, optional(out_s), optional(bias_s), bars,
                        optional(bias_strides), batch, heads, batch_inner, M, N, optional(lo), optional(hi), scale_log2, tiles_m, tiles, section,
                        0, BM, BN, WGS, STAGES, BIAS_STAGES, BATCH_FASTEST, IS_MASK, VARIES_M,
                        POSITIVE_SCALE, EVEN_N, TURNS, OWN_OUT)),
            (_consume, (out_desc, optional(bias), lse, optional(rest), q_s, k_s, v_s, optional(out_s), optional(bias_s), bars,
                        optional(bias_strides), batch, heads, batch_inner, M, N, optional(lo), optional(hi), scale_log2, tiles_m, tiles, section,
                        1, BM, BN, WGS, STAGES, BIAS_STAGES, BATCH_FASTEST, IS_MASK, VARIES_M,
                        POSITIVE_SCALE, EVEN_N, TURNS, OWN_OUT)),
            (_produce, (q_desc, k_desc, v_desc, optional(bias_desc), q_s, k_s, v_s, optional(bias_s), bars, batch, heads, batch_inner, M, N,
                        optional(lo), optional(hi), optional(bias_on), tiles_m, tiles, section, BM, BN, WGS, STAGES, BIAS_STAGES, BATCH_FASTEST, VARIES_M)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (out_desc, optional(bias), lse, optional(rest), q_s, k_s, v_s, optional(out_s), optional(bias_s), bars,
                        optional(bias_strides), batch, heads, batch_inner, M, N, optional(lo), optional(hi), scale_log2, tiles_m, tiles, section,
                        0, BM, BN, WGS, STAGES, BIAS_STAGES, BATCH_FASTEST, IS_MASK, VARIES_M,
                        POSITIVE_SCALE, EVEN_N, TURNS, OWN_OUT)),
            (_consume, (out_desc, optional(bias), lse, optional(rest), q_s, k_s, v_s, optional(out_s), optional(bias_s), bars,
                        optional(bias_strides), batch, heads, batch_inner, M, N, optional(lo), optional(hi), scale_log2, tiles_m, tiles, section,
                        1, BM, BN, WGS, STAGES, BIAS_STAGES, BATCH_FASTEST, IS_MASK, VARIES_M,
                        POSITIVE_SCALE, EVEN_N, TURNS, OWN_OUT)),
            (_consume, (out_desc, optional(bias), lse, optional(rest), q_s, k_s, v_s, optional(out_s), optional(bias_s), bars,
                        optional(bias_strides), batch, heads, batch_inner, M, N, optional(lo), optional(hi), scale_log2, tiles_m, tiles, section,
                        2, BM, BN, WGS, STAGES, BIAS_STAGES, BATCH_FASTEST, IS_MASK, VARIES_M,
                        POSITIVE_SCALE, EVEN_N, TURNS, OWN_OUT)),
            (_produce, (q_desc, k_desc, v_desc, optional(bias_desc), q_s, k_s, v_s, optional(bias_s), bars, batch, heads, batch_inner, M, N,
                        optional(lo), optional(hi), optional(bias_on), tiles_m, tiles, section, BM, BN, WGS, STAGES, BIAS_STAGES, BATCH_FASTEST, VARIES_M)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
