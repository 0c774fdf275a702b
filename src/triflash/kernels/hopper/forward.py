"""The forward kernel for Hopper.

A program is one producer warp and WGS consumer warpgroups. The producer fetches tiles of q, k, v and of the bias by TMA into shared
memory, as far ahead as there are buffers; each consumer owns 64 queries and folds key blocks into its registers. They meet at barriers in
shared memory: for every buffer one that says "full" and one that says "empty". A program works through several tiles (a persistent grid),
so that the loads of one tile run under the arithmetic of the one before.

Within a consumer the products of two neighbouring blocks overlap: q kᵀ of block j is issued together with p v of block j - 1, and the
softmax of block j runs while the latter is still under way (FlashAttention-3, Shah et al. 2024). With TURNS, consumers issue their products
in turn, so that the softmax of one runs under the products of another.

Blocks are visited from the last that a tile sees to its first. Recurrence and conventions as in ``kernels/triton/forward.py``. A variable
that changes inside a loop is recomputed from loop-carried scalars where that is cheap: Triton 3.6 has been seen not to carry one that is
reassigned only under a condition.
"""

from ..triton.prims import LN2, LOG2E, offset
from .compat import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    optional,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .dropout import drawn, dropped, stream_of
from .features import ONE_SIDED, add_alibi, capped, clear_hidden, hide, hide_by, line, opaque, slope_of, squashed, visible_keys, widened
from .grid import accumulator, locate, share, stacked
from .loads import (
    BIAS_EMPTY,
    BIAS_FULL,
    K_EMPTY,
    K_FULL,
    Q_EMPTY,
    Q_FULL,
    TURN,
    V_EMPTY,
    V_FULL,
    all_barriers,
    produce,
    visible_blocks,
)
from .rows import column_of, hide_unseen


@gluon.jit
def _softmax(
    s, m, bias_s, mask_s, bars, row_bias, slope, cap, at, m0, ahead, block, N, lo, hi, scale_log2,
    WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr,
    IS_MASK: gl.constexpr, VARIES_M: gl.constexpr, POSITIVE_SCALE: gl.constexpr, MASKED: gl.constexpr, ROW_BIASED: gl.constexpr,
    ALIBI: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """From the product of one block to ``(p, new maximum, what sums so far shrink by)``, for 64 queries. CUT: a length may end in it."""
    S: gl.constexpr = accumulator(BN)
    COLS: gl.constexpr = gl.SliceLayout(0, S)
    BIASED: gl.constexpr = (bias_s is not None) or ROW_BIASED or ALIBI
    # Scores are scaled as they go into the power, in one instruction, unless something is added to them that may be huge: then the maximum
    # must be one of them to the last bit.
    ADDED: gl.constexpr = ALIBI or ((bias_s is not None or ROW_BIASED) and not IS_MASK)
    LATE_SCALE: gl.constexpr = (POSITIVE_SCALE or cap is not None) and not ADDED
    if cap is not None:
        if CUT:  # what a hidden key holds may make NaN of its score, and ``squashed`` of those beside it
            s = hide_unseen(s, m0, block * BN, N, None, None, BM, BN, "0f00000000")
        s = squashed(s, cap)
        if not LATE_SCALE:
            s = capped(s, cap)
    elif not LATE_SCALE:
        s = s * scale_log2
    if bias_s is not None:
        slot = at % BIAS_STAGES * WGS + WG
        mbarrier.wait(bars[BIAS_FULL].index(slot), (at // BIAS_STAGES) & 1)
        if VARIES_M:
            bias = bias_s.index(slot).reshape([BM, BN]).load(S)
        else:
            WIDE: gl.constexpr = bias_s.shape[5]  # at least 128 bytes, which is what a buffer of TMA must be aligned to
            bias = gl.expand_dims(bias_s.index(slot).reshape([WIDE]).slice(0, BN).load(COLS), 0)
        if IS_MASK:
            s = hide(s, bias)
        else:
            bias, s = gl.broadcast(widened(bias), s)
            s = gl.fma(bias, gl.full([BM, BN], LOG2E, gl.float32, S), s)
    if mask_s is not None:
        s = hide_by(s, mask_s.index(slot), BM, BN)
    if ROW_BIASED:
        row, s = gl.broadcast(gl.expand_dims(row_bias, 1), s)
        if IS_MASK:
            s = gl.where(row != 0, s, float("-inf"))
        else:
            s = gl.fma(row, gl.full([BM, BN], LOG2E, gl.float32, S), s)
    if ALIBI:
        s = add_alibi(s, slope, block * BN - m0 - ahead, 1, ALIBI)
    if MASKED:
        s = hide_unseen(s, m0, block * BN, N, lo, hi, BM, BN, "0fFF800000")
    top = gl.max(s, 1)
    if LATE_SCALE:
        if cap is not None:
            top = top * (2.0 * cap[1]) + cap[1]
        else:
            top = top * scale_log2
    if ALIBI == ONE_SIDED:
        shift = line(0.0, -slope, BM, gl.SliceLayout(1, S))
        top = top + shift
    m_new = gl.maximum(m, top)
    m_safe = m_new
    if MASKED or BIASED:
        m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key yet: 2^(-inf - 0) = 0, never NaN
    if LATE_SCALE and cap is not None:
        p = gl.exp2(s * (2.0 * cap[1]) + gl.expand_dims(cap[1] - m_safe, 1))
    elif LATE_SCALE:
        p = gl.exp2(s * scale_log2 - gl.expand_dims(m_safe, 1))
    elif ALIBI == ONE_SIDED:
        p = gl.exp2(s - gl.expand_dims(m_safe - shift, 1))
    else:
        p = gl.exp2(s - gl.expand_dims(m_safe, 1))
    if bias_s is not None:
        # The fence is not for show. A load from shared memory can wait long behind the operands of products, also after its thread has
        # passed a barrier, and TMA, which writes by another way, would put the next tile under it. Where this stands does not matter: the
        # assembler moves fence and release up to the loads.
        fence_async_shared()
        mbarrier.arrive(bars[BIAS_EMPTY].index(at % BIAS_STAGES * WGS + WG))
    return p, m_new, gl.exp2(m - m_safe)


@gluon.jit
def _finish(
    o, l, m, out_desc, lse, rest, sink, sink_stride, dropout, target, m0, head, b, heads, M,
    BM: gl.constexpr, BN: gl.constexpr, BDV: gl.constexpr, DT: gl.constexpr,
):  # fmt: skip
    """Divide by the sum and write out (by way of the shared buffer ``target``), lse and rest of 64 queries."""
    O: gl.constexpr = accumulator(BDV)
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BN))
    weight = gl.full([BM], 1.0, gl.float32, ROWS)
    if sink is not None:  # a key more, whose value is 0
        z = gl.load(sink + offset(head, sink_stride)).to(gl.float32) * LOG2E
        top = gl.maximum(m, z)
        top_safe = gl.where(top == float("-inf"), 0.0, top)
        weight = gl.exp2(m - top_safe)
        l = l * weight + gl.exp2(z - top_safe)
        m = top
    if dropout is not None:  # what was kept, for all
        weight = weight * dropout[2]
    unseen = l == 0.0
    l = gl.where(unseen, 1.0, l)
    o = (o * gl.expand_dims(gl.convert_layout(weight / l, gl.SliceLayout(1, O)), 1)).to(DT)
    tma_store_wait(0)  # what this buffer held before must have left it
    target.reshape([BM, BDV]).store(o)
    fence_async_shared()
    tma_store(out_desc, [b, m0, head, 0], target)
    i = m0 + gl.arange(0, BM, ROWS)
    row_lse = gl.where(unseen, float("-inf"), (m + gl.log2(l)) * LN2)
    at_row = offset(b * heads + head, M) + i
    gl.store(lse + at_row, row_lse, mask=i < M)
    if rest is not None:  # see lse_rest of the portable kernels
        again = gl.where(unseen, 0.0, row_lse * LOG2E)
        gl.store(rest + at_row, gl.where(unseen, 0.0, (m - again) + gl.log2(l)), mask=i < M)


@gluon.jit
def _walk(
    o, l, m, p, q_s, q_slot, k_s, v_s, bias_s, mask_s, bars, row_bias, slope, stream, cap, done, m0, ahead, first, last, steps, end, N,
    lo, hi, scale_log2, WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr, IS_MASK: gl.constexpr, VARIES_M: gl.constexpr, POSITIVE_SCALE: gl.constexpr,
    TURNS: gl.constexpr, MASKED: gl.constexpr, ROW_BIASED: gl.constexpr, Q_EARLY: gl.constexpr,
    ALIBI: gl.constexpr,
):  # fmt: skip
    """Steps ``first … last`` of a tile's ``steps``: q kᵀ of a block, and p v of the block before under its softmax."""
    BD: gl.constexpr = k_s.shape[4]
    BDV: gl.constexpr = v_s.shape[4]
    S: gl.constexpr = accumulator(BN)
    O: gl.constexpr = accumulator(BDV)
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    nothing = gl.zeros([BM, BN], gl.float32, S)
    if q_s.shape[0] > WGS:
        # ptxas 12.8 takes two of these loops to share their queries' descriptors and works them out where only the first needs them, which
        # may have no steps at all.
        q_slot = opaque(q_slot)
    q = q_s.index(q_slot).reshape([BM, BD])
    for step in range(first, last):
        at = done + step
        stage = at % K_STAGES
        before = (at - 1) % V_STAGES
        mbarrier.wait(bars[K_FULL].index(stage), (at // K_STAGES) & 1)
        if TURNS:
            mbarrier.wait(bars[TURN + WG].index(0), at & 1)
        s_pending = warpgroup_mma(q, k_s.index(stage).reshape([BN, BD]).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(bars[V_FULL].index(before), ((at - 1) // V_STAGES) & 1)
        o_pending = warpgroup_mma(p, v_s.index(before).reshape([BN, BDV]), o, is_async=True)
        if TURNS:
            mbarrier.arrive(bars[TURN + (WG + 1) % WGS].index(0))
        s = warpgroup_mma_wait(1, [s_pending])
        mbarrier.arrive(bars[K_EMPTY].index(stage))
        if Q_EARLY:
            if step == steps - 1:  # no more products with this q: the next can be fetched while the softmax runs
                mbarrier.arrive(bars[Q_EMPTY].index(q_slot))
        p32, m, shrink = _softmax(
            s, m, bias_s, mask_s, bars, row_bias, slope, cap, at, m0, ahead, end - 1 - step, N, lo, hi, scale_log2,
            WG, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES, IS_MASK, VARIES_M, POSITIVE_SCALE, MASKED, ROW_BIASED, ALIBI,
            False,
        )  # fmt: skip
        l = l * shrink + gl.sum(p32, 1)
        if stream is not None:  # under the product; drawn any earlier, marks take registers that the softmax needs
            p16 = dropped(p32.to(q.dtype), drawn(stream, m0, (end - 1 - step) * BN, BM, BN, False))
        o = warpgroup_mma_wait(0, [o_pending])
        mbarrier.arrive(bars[V_EMPTY].index(before))
        if stream is None:
            p16 = p32.to(q.dtype)
        p = gl.convert_layout(p16, P)
        o = o * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, O)), 1)
    return o, l, m, p


@gluon.jit
def _consume(
    out_desc, bias, lengths, slopes, sink, lse, rest, q_s, k_s, v_s, out_s, bias_s, mask_s, bars,
    bias_strides, slope_strides, sink_stride, cap, dropout, batch, heads, batch_inner, M, N, lo, hi, scale_log2, tiles_m, tiles, section,
    snake, WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr, BATCH_FASTEST: gl.constexpr, IS_MASK: gl.constexpr, VARIES_M: gl.constexpr,
    POSITIVE_SCALE: gl.constexpr, EVEN_N: gl.constexpr, ALIBI: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 queries of every tile of the program.

    With a buffer for the output, the first step of a tile also issues the last p v of the tile before, which is finished under it.
    """
    BD: gl.constexpr = q_s.shape[4]
    BDV: gl.constexpr = v_s.shape[4]
    S: gl.constexpr = accumulator(BN)
    O: gl.constexpr = accumulator(BDV)
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, S)
    MASKED: gl.constexpr = (lo is not None) or (hi is not None) or (not EVEN_N)
    ROW_BIASED: gl.constexpr = bias is not None
    OVERLAP: gl.constexpr = out_s is not None
    DT: gl.constexpr = q_s.dtype
    nothing = gl.zeros([BM, BN], gl.float32, S)
    LONGEST: gl.constexpr = "last" if hi is not None else "none"
    Q_STAGES: gl.constexpr = q_s.shape[0] // WGS
    waves = share(tiles, snake)
    done = 0  # blocks of earlier tiles

    m0, head, b = locate(0, tiles_m, batch, heads, section, snake, BATCH_FASTEST, BM * WGS, LONGEST)
    first_keys = visible_keys(lengths, b, N)
    _begin, _full_begin, _full_end, first_end = visible_blocks(m0, BM * WGS, M, first_keys, lo, hi, BN)
    m0 += WG * BM
    row_bias = column_of(bias, bias_strides, m0, head, b, batch_inner, M, BM, BN)
    mbarrier.wait(bars[Q_FULL].index(WG), 0)
    mbarrier.wait(bars[K_FULL].index(0), 0)
    if TURNS:
        mbarrier.wait(bars[TURN + WG].index(0), 0)
    q = q_s.index(WG).reshape([BM, BD])
    s_pending = warpgroup_mma(q, k_s.index(0).reshape([BN, BD]).permute((1, 0)), nothing, use_acc=False, is_async=True)
    if TURNS:
        mbarrier.arrive(bars[TURN + (WG + 1) % WGS].index(0))
    s = warpgroup_mma_wait(0, [s_pending])
    mbarrier.arrive(bars[K_EMPTY].index(0))
    p32, m, _shrink = _softmax(
        s, gl.full([BM], float("-inf"), gl.float32, ROWS), bias_s, mask_s, bars, row_bias,
        slope_of(slopes, slope_strides, b, head), cap, 0, m0, N - M, first_end - 1, first_keys, lo, hi, scale_log2,
        WG, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES, IS_MASK, VARIES_M, POSITIVE_SCALE, MASKED, ROW_BIASED, ALIBI,
        lengths is not None,
    )  # fmt: skip
    l = gl.sum(p32, 1)
    p16 = p32.to(DT)
    if dropout is not None:
        p16 = dropped(p16, drawn(stream_of(dropout, b, head, heads), m0, (first_end - 1) * BN, BM, BN, False))
    p = gl.convert_layout(p16, P)
    o = gl.zeros([BM, BDV], gl.float32, O)
    for wave in range(waves):
        q_slot = wave % Q_STAGES * WGS + WG
        # The first block of this tile has been scored. What is left: partly visible on the right, whole, partly visible on the left.
        n_keys = visible_keys(lengths, b, N)
        slope = slope_of(slopes, slope_strides, b, head)
        stream = None
        if dropout is not None:
            stream = stream_of(dropout, b, head, heads)
        begin, full_begin, full_end, end = visible_blocks(m0 - WG * BM, BM * WGS, M, n_keys, lo, hi, BN)
        steps = end - begin
        if lengths is not None:
            if (end * BN > n_keys) & (n_keys < N):  # no other block of a tile is cut by a length
                cut = done % V_STAGES
                mbarrier.wait(bars[V_FULL].index(cut), (done // V_STAGES) & 1)
                clear_hidden(v_s.index(cut).reshape([BN, BDV]), n_keys - (end - 1) * BN)
        if OVERLAP:
            if steps == 1:
                mbarrier.arrive(bars[Q_EMPTY].index(q_slot))
        if hi is not None:
            o, l, m, p = _walk(
                o, l, m, p, q_s, q_slot, k_s, v_s, bias_s, mask_s, bars, row_bias, slope, stream, cap, done, m0, N - M, 1, end - full_end,
                steps, end, n_keys, lo, hi, scale_log2,
                WG, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES, IS_MASK, VARIES_M, POSITIVE_SCALE, TURNS, True, ROW_BIASED, OVERLAP,
                ALIBI,
            )  # fmt: skip
        whole = max(1, end - full_end)
        o, l, m, p = _walk(
            o, l, m, p, q_s, q_slot, k_s, v_s, bias_s, mask_s, bars, row_bias, slope, stream, cap, done, m0, N - M, whole,
            end - full_begin, steps, end, n_keys, lo, hi,
            scale_log2,
            WG, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES, IS_MASK, VARIES_M, POSITIVE_SCALE, TURNS, False, ROW_BIASED, OVERLAP, ALIBI,
        )  # fmt: skip
        if lo is not None:
            left = max(1, end - full_begin)
            o, l, m, p = _walk(
                o, l, m, p, q_s, q_slot, k_s, v_s, bias_s, mask_s, bars, row_bias, slope, stream, cap, done, m0, N - M, left, steps,
                steps, end, n_keys, lo, hi, scale_log2,
                WG, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES, IS_MASK, VARIES_M, POSITIVE_SCALE, TURNS, True, ROW_BIASED, OVERLAP,
                ALIBI,
            )  # fmt: skip
        done += steps
        before = (done - 1) % V_STAGES
        if not OVERLAP:  # the output leaves through q's buffer, so nothing of the next tile can begin before it has
            mbarrier.wait(bars[V_FULL].index(before), ((done - 1) // V_STAGES) & 1)
            o = warpgroup_mma_wait(0, [warpgroup_mma(p, v_s.index(before).reshape([BN, BDV]), o, is_async=True)])
            mbarrier.arrive(bars[V_EMPTY].index(before))
            _finish(o, l, m, out_desc, lse, rest, sink, sink_stride, dropout, q_s.index(WG), m0, head, b, heads, M, BM, BN, BDV, DT)
            tma_store_wait(0)
            mbarrier.arrive(bars[Q_EMPTY].index(WG))
        if wave + 1 < waves:  # the first block of the next tile, and under it the last product of this one
            old_m0 = m0
            old_head = head
            old_b = b
            stage = done % K_STAGES
            next_slot = (wave + 1) % Q_STAGES * WGS + WG
            mbarrier.wait(bars[Q_FULL].index(next_slot), ((wave + 1) // Q_STAGES) & 1)
            mbarrier.wait(bars[K_FULL].index(stage), (done // K_STAGES) & 1)
            if TURNS:
                mbarrier.wait(bars[TURN + WG].index(0), done & 1)
            next_q = q_s.index(next_slot).reshape([BM, BD])
            next_pending = warpgroup_mma(next_q, k_s.index(stage).reshape([BN, BD]).permute((1, 0)), nothing, use_acc=False, is_async=True)
            if OVERLAP:
                mbarrier.wait(bars[V_FULL].index(before), ((done - 1) // V_STAGES) & 1)
                o_pending = warpgroup_mma(p, v_s.index(before).reshape([BN, BDV]), o, is_async=True)
            if TURNS:
                mbarrier.arrive(bars[TURN + (WG + 1) % WGS].index(0))
            # Where the next tile lies takes some divisions, for which its first product leaves time.
            m0, head, b = locate(wave + 1, tiles_m, batch, heads, section, snake, BATCH_FASTEST, BM * WGS, LONGEST)
            next_keys = visible_keys(lengths, b, N)
            _begin, _full_begin, _full_end, next_end = visible_blocks(m0, BM * WGS, M, next_keys, lo, hi, BN)
            m0 += WG * BM
            row_bias = column_of(bias, bias_strides, m0, head, b, batch_inner, M, BM, BN)
            if OVERLAP:
                next_s = warpgroup_mma_wait(1, [next_pending])
            else:
                next_s = warpgroup_mma_wait(0, [next_pending])
            mbarrier.arrive(bars[K_EMPTY].index(stage))
            next_p, new_m, _shrink = _softmax(
                next_s, gl.full([BM], float("-inf"), gl.float32, ROWS), bias_s, mask_s, bars, row_bias,
                slope_of(slopes, slope_strides, b, head), cap, done, m0, N - M, next_end - 1, next_keys, lo, hi, scale_log2,
                WG, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES, IS_MASK, VARIES_M, POSITIVE_SCALE, MASKED, ROW_BIASED, ALIBI,
                lengths is not None,
            )  # fmt: skip
            if OVERLAP:
                o = warpgroup_mma_wait(0, [o_pending])
                mbarrier.arrive(bars[V_EMPTY].index(before))
            next_p16 = next_p.to(DT)
            if dropout is not None:
                next_p16 = dropped(next_p16, drawn(stream_of(dropout, b, head, heads), m0, (next_end - 1) * BN, BM, BN, False))
            p = gl.convert_layout(next_p16, P)
            if OVERLAP:
                _finish(
                    o, l, m, out_desc, lse, rest, sink, sink_stride, dropout, out_s.index(WG), old_m0, old_head, old_b, heads, M,
                    BM, BN, BDV, DT,
                )  # fmt: skip
            m = new_m
            l = gl.sum(next_p, 1)
            o = gl.zeros([BM, BDV], gl.float32, O)
    if OVERLAP:
        before = (done - 1) % V_STAGES
        mbarrier.wait(bars[V_FULL].index(before), ((done - 1) // V_STAGES) & 1)
        o = warpgroup_mma_wait(0, [warpgroup_mma(p, v_s.index(before).reshape([BN, BDV]), o, is_async=True)])
        mbarrier.arrive(bars[V_EMPTY].index(before))
        _finish(o, l, m, out_desc, lse, rest, sink, sink_stride, dropout, out_s.index(WG), m0, head, b, heads, M, BM, BN, BDV, DT)
        tma_store_wait(0)


# Not specialised: nothing is gained from knowing that a count is 1 or a multiple of 16, and every combination would be compiled anew.
COUNTS = ["batch", "heads", "group", "batch_inner", "M", "N", "lo", "hi", "tiles_m", "tiles", "section", "snake"]


@gluon.jit(do_not_specialize=COUNTS)
def forward(
    q_desc, k_desc, v_desc, out_desc, bias_desc, bias, lengths, slopes, sink, lse, rest, bias_strides, bias_on, slope_strides, sink_stride,
    cap, dropout, mask_desc, mask_on,
    batch, heads, group, batch_inner, M, N, lo, hi, scale, tiles_m, tiles, section, snake,
    BN: gl.constexpr, WGS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr,
    BATCH_FASTEST: gl.constexpr,
    IS_MASK: gl.constexpr, VARIES_M: gl.constexpr, POSITIVE_SCALE: gl.constexpr, EVEN_N: gl.constexpr, ALIBI: gl.constexpr,
    TURNS: gl.constexpr,
    OWN_OUT: gl.constexpr, REGISTERS: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    """Tiles of 64 * WGS queries; ``tiles`` of them, ``tiles_m`` a (batch, head) pair, dealt out as ``locate`` says.

    Descriptors of q, k, v, out are over (batch, length, head, dim) with blocks [1, rows, 1, dims]; that of the bias over its five dims,
    whose broadcast ones have size 1 and are switched off by a 0 in ``bias_on``. A bias without a dim of keys comes as a pointer and
    strides (outer batch, inner batch, head, query) instead. lse and rest are contiguous (batch, head, query). ``group`` query heads share a
    key head. lengths: visible keys by batch; slopes: of ALiBi, by strides (batch,
    head); sink: by head; cap: see ``squashed``; dropout: see ``stream_of``; mask: beside the bias, a tile
    or a row with every tile of it. None:
    absent.

    OWN_OUT: the output leaves through a buffer of its own, so that the next tile can begin before it has left; else through q's.
    """
    BM: gl.constexpr = 64
    DT: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(DT, stacked(Q_STAGES * WGS, q_desc.block_shape), q_desc.layout)
    k_s = gl.allocate_shared_memory(DT, stacked(K_STAGES, k_desc.block_shape), k_desc.layout)
    v_s = gl.allocate_shared_memory(DT, stacked(V_STAGES, v_desc.block_shape), v_desc.layout)
    if OWN_OUT:
        out_s = gl.allocate_shared_memory(DT, stacked(WGS, out_desc.block_shape), out_desc.layout)
    else:
        out_s = None
    if bias_desc is not None:
        bias_s = gl.allocate_shared_memory(bias_desc.dtype, stacked(BIAS_STAGES * WGS, bias_desc.block_shape), bias_desc.layout)
    else:
        bias_s = None
    if mask_desc is not None:
        mask_s = gl.allocate_shared_memory(mask_desc.dtype, stacked(BIAS_STAGES * WGS, mask_desc.block_shape), mask_desc.layout)
    else:
        mask_s = None
    bars = all_barriers(WGS, Q_STAGES, K_STAGES, V_STAGES, BIAS_STAGES)
    if TURNS:
        mbarrier.arrive(bars[TURN].index(0))
    scale_log2 = scale * LOG2E

    # Tuples of arguments are written out: bound to a name, their compile-time constants would become tensors.
    if WGS == 1:
        gl.warp_specialize([
            (_consume, (out_desc, optional(bias), optional(lengths), optional(slopes), optional(sink), lse, optional(rest), q_s, k_s, v_s,
                        optional(out_s), optional(bias_s), optional(mask_s), bars,
                        optional(bias_strides), optional(slope_strides), optional(sink_stride), optional(cap), optional(dropout), batch,
                        heads, batch_inner, M, N, optional(lo), optional(hi), scale_log2,
                        tiles_m, tiles, section, snake, 0, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES,
                        BATCH_FASTEST, IS_MASK, VARIES_M, POSITIVE_SCALE, EVEN_N, ALIBI, TURNS)),
            (produce, (q_desc, k_desc, v_desc, optional(bias_desc), optional(mask_desc), optional(lengths), q_s, k_s, v_s,
                        optional(bias_s), optional(mask_s), bars, batch, heads, group, batch_inner, M, N, optional(lo), optional(hi),
                        optional(bias_on), optional(mask_on), tiles_m, tiles, section, snake, BM, BN, WGS, K_STAGES, V_STAGES,
                        BIAS_STAGES, BATCH_FASTEST, VARIES_M)),
        ], [1], [24])  # fmt: skip
    elif WGS == 2:
        gl.warp_specialize([
            (_consume, (out_desc, optional(bias), optional(lengths), optional(slopes), optional(sink), lse, optional(rest), q_s, k_s, v_s,
                        optional(out_s), optional(bias_s), optional(mask_s), bars,
                        optional(bias_strides), optional(slope_strides), optional(sink_stride), optional(cap), optional(dropout), batch,
                        heads, batch_inner, M, N, optional(lo), optional(hi), scale_log2,
                        tiles_m, tiles, section, snake, 0, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES,
                        BATCH_FASTEST, IS_MASK, VARIES_M, POSITIVE_SCALE, EVEN_N, ALIBI, TURNS)),
            (_consume, (out_desc, optional(bias), optional(lengths), optional(slopes), optional(sink), lse, optional(rest), q_s, k_s, v_s,
                        optional(out_s), optional(bias_s), optional(mask_s), bars,
                        optional(bias_strides), optional(slope_strides), optional(sink_stride), optional(cap), optional(dropout), batch,
                        heads, batch_inner, M, N, optional(lo), optional(hi), scale_log2,
                        tiles_m, tiles, section, snake, 1, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES,
                        BATCH_FASTEST, IS_MASK, VARIES_M, POSITIVE_SCALE, EVEN_N, ALIBI, TURNS)),
            (produce, (q_desc, k_desc, v_desc, optional(bias_desc), optional(mask_desc), optional(lengths), q_s, k_s, v_s,
                        optional(bias_s), optional(mask_s), bars, batch, heads, group, batch_inner, M, N, optional(lo), optional(hi),
                        optional(bias_on), optional(mask_on), tiles_m, tiles, section, snake, BM, BN, WGS, K_STAGES, V_STAGES,
                        BIAS_STAGES, BATCH_FASTEST, VARIES_M)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (out_desc, optional(bias), optional(lengths), optional(slopes), optional(sink), lse, optional(rest), q_s, k_s, v_s,
                        optional(out_s), optional(bias_s), optional(mask_s), bars,
                        optional(bias_strides), optional(slope_strides), optional(sink_stride), optional(cap), optional(dropout), batch,
                        heads, batch_inner, M, N, optional(lo), optional(hi), scale_log2,
                        tiles_m, tiles, section, snake, 0, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES,
                        BATCH_FASTEST, IS_MASK, VARIES_M, POSITIVE_SCALE, EVEN_N, ALIBI, TURNS)),
            (_consume, (out_desc, optional(bias), optional(lengths), optional(slopes), optional(sink), lse, optional(rest), q_s, k_s, v_s,
                        optional(out_s), optional(bias_s), optional(mask_s), bars,
                        optional(bias_strides), optional(slope_strides), optional(sink_stride), optional(cap), optional(dropout), batch,
                        heads, batch_inner, M, N, optional(lo), optional(hi), scale_log2,
                        tiles_m, tiles, section, snake, 1, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES,
                        BATCH_FASTEST, IS_MASK, VARIES_M, POSITIVE_SCALE, EVEN_N, ALIBI, TURNS)),
            (_consume, (out_desc, optional(bias), optional(lengths), optional(slopes), optional(sink), lse, optional(rest), q_s, k_s, v_s,
                        optional(out_s), optional(bias_s), optional(mask_s), bars,
                        optional(bias_strides), optional(slope_strides), optional(sink_stride), optional(cap), optional(dropout), batch,
                        heads, batch_inner, M, N, optional(lo), optional(hi), scale_log2,
                        tiles_m, tiles, section, snake, 2, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES,
                        BATCH_FASTEST, IS_MASK, VARIES_M, POSITIVE_SCALE, EVEN_N, ALIBI, TURNS)),
            (produce, (q_desc, k_desc, v_desc, optional(bias_desc), optional(mask_desc), optional(lengths), q_s, k_s, v_s,
                        optional(bias_s), optional(mask_s), bars, batch, heads, group, batch_inner, M, N, optional(lo), optional(hi),
                        optional(bias_on), optional(mask_on), tiles_m, tiles, section, snake, BM, BN, WGS, K_STAGES, V_STAGES,
                        BIAS_STAGES, BATCH_FASTEST, VARIES_M)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
