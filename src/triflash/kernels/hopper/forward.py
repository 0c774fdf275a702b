"""The forward kernel for Hopper.

A program is one producer warp and WGS consumer warpgroups. The producer fetches tiles of q, k, v and of the bias by TMA into shared
memory, as far ahead as there are buffers; each consumer owns 64 queries and folds key blocks into its registers. They meet at barriers in
shared memory: for every buffer one that says "full" and one that says "empty". A program works through several tiles (a persistent grid),
so that the loads of one tile run under the arithmetic of the one before.

Within a consumer the products of two neighbouring blocks overlap: q kᵀ of block j is issued together with p v of block j - 1, and the
softmax of block j runs while the latter is still under way (FlashAttention-3, Shah et al. 2024). So keys of a block and values of the one
before share barriers, of which every wait and every arrival makes a step longer. With TURNS, consumers issue their products in
turn, so that the softmax of one runs under the products of another.

Blocks are visited from the last that a tile sees to its first; ``softmax.py`` has the recurrence. A variable that changes inside a loop is
recomputed from loop-carried scalars where that is cheap: Triton 3.6 has been seen not to carry one that is reassigned only under a
condition.
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
from .features import clear_hidden, opaque, slope_of, visible_keys
from .grid import accumulator, locate, phase_of, share, slot_of, stacked
from .loads import (
    BIAS_EMPTY,
    BIAS_FULL,
    K_EMPTY,
    K_FULL,
    Q_EMPTY,
    Q_FULL,
    TURN,
    all_barriers,
    produce,
    visible_blocks,
)
from .rows import column_of
from .softmax import by_row, settled, shrunk, softmax


@gluon.jit
def _bias_of(
    bias_s, bars, at, WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, BIAS_STAGES: gl.constexpr,
    VARIES_M: gl.constexpr,
):  # fmt: skip
    """A consumer's tile of the bias, of block ``at``, or a row of it for all queries."""
    S: gl.constexpr = accumulator(BN)
    slot = slot_of(at, BIAS_STAGES) * WGS + WG
    mbarrier.wait(bars[BIAS_FULL].index(slot), phase_of(at, BIAS_STAGES))
    if VARIES_M:
        return bias_s.index(slot).reshape([BM, BN]).load(S)
    else:
        WIDE: gl.constexpr = bias_s.shape[5]  # at least 128 bytes, which is what a buffer of TMA must be aligned to
        return gl.expand_dims(bias_s.index(slot).reshape([WIDE]).slice(0, BN).load(gl.SliceLayout(0, S)), 0)


@gluon.jit
def _release_bias(bars, at, WG: gl.constexpr, WGS: gl.constexpr, BIAS_STAGES: gl.constexpr):
    """Give its buffer back, and that of the mask beside it.

    The fence is not for show. A load from shared memory can wait long behind the operands of products, also after its thread has passed a
    barrier, and TMA, which writes by another way, would put the next tile under it.
    """
    fence_async_shared()
    mbarrier.arrive(bars[BIAS_EMPTY].index(slot_of(at, BIAS_STAGES) * WGS + WG))


@gluon.jit
def _finish(
    o, l, m, out_desc, lse, rest, sink, sink_stride, dropout, target, m0, head, b, heads, M,
    BM: gl.constexpr, BN: gl.constexpr, BDV: gl.constexpr, DT: gl.constexpr,
):  # fmt: skip
    """Divide by the sum and write out (by way of the shared buffer ``target``), lse and rest of 64 queries."""
    O: gl.constexpr = accumulator(BDV)
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BN))
    l, m = by_row(l, m, ROWS)
    weight = gl.full([BM], 1.0, gl.float32, ROWS)
    if sink is not None:  # a key more, whose value is 0
        z = gl.load(sink + offset(head, sink_stride)).to(gl.float32) * LOG2E
        top = gl.maximum(m, z)
        weight = gl.exp2(m - top)
        l = l * weight + gl.exp2(z - top)
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
    lo, hi, scale_log2, WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr,
    BIAS_STAGES: gl.constexpr, IS_MASK: gl.constexpr, VARIES_M: gl.constexpr, POSITIVE_SCALE: gl.constexpr,
    TURNS: gl.constexpr, MASKED: gl.constexpr, ROW_BIASED: gl.constexpr, Q_EARLY: gl.constexpr,
    ALIBI: gl.constexpr, FUSING: gl.constexpr,
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
    EARLY: gl.constexpr = bias_s is not None and mask_s is None and not IS_MASK  # not a mask's bytes, which take many instructions
    rows = None
    if ROW_BIASED:
        rows = row_bias
    for step in range(first, last):
        at = done + step
        n0 = (end - 1 - step) * BN
        stage = slot_of(at, STAGES)
        bias = None
        if EARLY:  # before the products, behind whose operands it would have to wait
            bias = _bias_of(bias_s, bars, at, WG, BM, BN, WGS, BIAS_STAGES, VARIES_M)
        mbarrier.wait(bars[K_FULL].index(stage), phase_of(at, STAGES))
        if TURNS:
            mbarrier.wait(bars[TURN + WG].index(0), at & 1)
        s_pending = warpgroup_mma(q, k_s.index(stage).reshape([BN, BD]).permute((1, 0)), nothing, use_acc=False, is_async=True)
        if EARLY:
            _release_bias(bars, at, WG, WGS, BIAS_STAGES)
        o_pending = warpgroup_mma(p, v_s.index(stage).reshape([BN, BDV]), o, is_async=True)
        if TURNS:
            mbarrier.arrive(bars[TURN + (WG + 1) % WGS].index(0))
        s = warpgroup_mma_wait(1, [s_pending])
        if Q_EARLY:
            if step == steps - 1:  # no more products with this q: the next can be fetched while the softmax runs
                mbarrier.arrive(bars[Q_EMPTY].index(q_slot))
        shown = None
        if mask_s is not None:
            shown = mask_s.index(slot_of(at, BIAS_STAGES) * WGS + WG)
        if bias_s is not None and not EARLY:
            bias = _bias_of(bias_s, bars, at, WG, BM, BN, WGS, BIAS_STAGES, VARIES_M)
        s, p16, more, m = softmax(
            s, bias, shown, rows, slope, cap, m, m0, n0, ahead, N, lo, hi, scale_log2, q.dtype, IS_MASK, POSITIVE_SCALE, MASKED, ALIBI,
            False, FUSING,
        )  # fmt: skip
        if bias_s is not None and not EARLY:
            _release_bias(bars, at, WG, WGS, BIAS_STAGES)
        o = warpgroup_mma_wait(0, [o_pending])
        mbarrier.arrive(bars[K_EMPTY].index(stage))
        p16, more, m, factor = settled(s, p16, more, m, bias, rows, slope, cap, scale_log2, IS_MASK, POSITIVE_SCALE, ALIBI, FUSING)
        l = l * factor + more
        if stream is not None:  # drawn any earlier, marks take registers that the softmax needs
            p16 = dropped(p16, drawn(stream, m0, n0, BM, BN, False))
        p = gl.convert_layout(p16, P)
        o = shrunk(o, factor)
    return o, l, m, p


@gluon.jit
def _consume(
    out_desc, bias, lengths, slopes, sink, lse, rest, q_s, k_s, v_s, out_s, bias_s, mask_s, bars,
    bias_strides, slope_strides, sink_stride, cap, dropout, batch, heads, batch_inner, M, N, lo, hi, scale_log2, tiles_m, tiles, section,
    snake, WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr,
    BIAS_STAGES: gl.constexpr, BATCH_FASTEST: gl.constexpr, IS_MASK: gl.constexpr, VARIES_M: gl.constexpr,
    POSITIVE_SCALE: gl.constexpr, EVEN_N: gl.constexpr, ALIBI: gl.constexpr, TURNS: gl.constexpr, FUSING: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 queries of every tile of the program.

    With a buffer for the output, the first step of a tile also issues the last p v of the tile before, which is finished under it.
    """
    BD: gl.constexpr = q_s.shape[4]
    BDV: gl.constexpr = v_s.shape[4]
    S: gl.constexpr = accumulator(BN)
    O: gl.constexpr = accumulator(BDV)
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
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
    rows = None
    if ROW_BIASED:
        rows = row_bias
    s = warpgroup_mma_wait(0, [s_pending])
    mbarrier.arrive(bars[K_EMPTY].index(0))
    ready = None
    shown = None
    if bias_s is not None:
        ready = _bias_of(bias_s, bars, 0, WG, BM, BN, WGS, BIAS_STAGES, VARIES_M)
    if mask_s is not None:
        shown = mask_s.index(WG)
    _scores, p16, l, m = softmax(
        s, ready, shown, rows, slope_of(slopes, slope_strides, b, head), cap, None, m0, (first_end - 1) * BN, N - M, first_keys, lo, hi,
        scale_log2, DT, IS_MASK, POSITIVE_SCALE, MASKED, ALIBI, lengths is not None, False,
    )  # fmt: skip
    if bias_s is not None:
        _release_bias(bars, 0, WG, WGS, BIAS_STAGES)
    if dropout is not None:
        p16 = dropped(p16, drawn(stream_of(dropout, b, head, heads), m0, (first_end - 1) * BN, BM, BN, False))
    p = gl.convert_layout(p16, P)
    o = gl.zeros([BM, BDV], gl.float32, O)
    for wave in range(waves):
        q_slot = slot_of(wave, Q_STAGES) * WGS + WG
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
                cut = slot_of(done + 1, STAGES)
                mbarrier.wait(bars[K_FULL].index(cut), phase_of(done + 1, STAGES))
                clear_hidden(v_s.index(cut).reshape([BN, BDV]), n_keys - (end - 1) * BN)
        if OVERLAP:
            if steps == 1:
                mbarrier.arrive(bars[Q_EMPTY].index(q_slot))
        if hi is not None:
            o, l, m, p = _walk(
                o, l, m, p, q_s, q_slot, k_s, v_s, bias_s, mask_s, bars, row_bias, slope, stream, cap, done, m0, N - M, 1, end - full_end,
                steps, end, n_keys, lo, hi, scale_log2,
                WG, BM, BN, WGS, STAGES, BIAS_STAGES, IS_MASK, VARIES_M, POSITIVE_SCALE, TURNS, True, ROW_BIASED, OVERLAP, ALIBI,
                FUSING,
            )  # fmt: skip
        whole = max(1, end - full_end)
        o, l, m, p = _walk(
            o, l, m, p, q_s, q_slot, k_s, v_s, bias_s, mask_s, bars, row_bias, slope, stream, cap, done, m0, N - M, whole,
            end - full_begin, steps, end, n_keys, lo, hi,
            scale_log2,
            WG, BM, BN, WGS, STAGES, BIAS_STAGES, IS_MASK, VARIES_M, POSITIVE_SCALE, TURNS, False, ROW_BIASED, OVERLAP, ALIBI, FUSING,
        )  # fmt: skip
        if lo is not None:
            left = max(1, end - full_begin)
            o, l, m, p = _walk(
                o, l, m, p, q_s, q_slot, k_s, v_s, bias_s, mask_s, bars, row_bias, slope, stream, cap, done, m0, N - M, left, steps,
                steps, end, n_keys, lo, hi, scale_log2,
                WG, BM, BN, WGS, STAGES, BIAS_STAGES, IS_MASK, VARIES_M, POSITIVE_SCALE, TURNS, True, ROW_BIASED, OVERLAP, ALIBI,
                FUSING,
            )  # fmt: skip
        done += steps
        stage = slot_of(done, STAGES)
        if not OVERLAP:  # the output leaves through q's buffer, so nothing of the next tile can begin before it has
            mbarrier.wait(bars[K_FULL].index(stage), phase_of(done, STAGES))
            o = warpgroup_mma_wait(0, [warpgroup_mma(p, v_s.index(stage).reshape([BN, BDV]), o, is_async=True)])
            _finish(o, l, m, out_desc, lse, rest, sink, sink_stride, dropout, q_s.index(WG), m0, head, b, heads, M, BM, BN, BDV, DT)
            tma_store_wait(0)
            mbarrier.arrive(bars[Q_EMPTY].index(WG))
        if wave + 1 < waves:  # the first block of the next tile, and under it the last product of this one
            old_m0 = m0
            old_head = head
            old_b = b
            next_slot = slot_of(wave + 1, Q_STAGES) * WGS + WG
            mbarrier.wait(bars[Q_FULL].index(next_slot), phase_of(wave + 1, Q_STAGES))
            mbarrier.wait(bars[K_FULL].index(stage), phase_of(done, STAGES))
            if TURNS:
                mbarrier.wait(bars[TURN + WG].index(0), done & 1)
            next_q = q_s.index(next_slot).reshape([BM, BD])
            next_pending = warpgroup_mma(next_q, k_s.index(stage).reshape([BN, BD]).permute((1, 0)), nothing, use_acc=False, is_async=True)
            if OVERLAP:
                o_pending = warpgroup_mma(p, v_s.index(stage).reshape([BN, BDV]), o, is_async=True)
            if TURNS:
                mbarrier.arrive(bars[TURN + (WG + 1) % WGS].index(0))
            # Where the next tile lies takes some divisions, for which its first product leaves time.
            m0, head, b = locate(wave + 1, tiles_m, batch, heads, section, snake, BATCH_FASTEST, BM * WGS, LONGEST)
            next_keys = visible_keys(lengths, b, N)
            _begin, _full_begin, _full_end, next_end = visible_blocks(m0, BM * WGS, M, next_keys, lo, hi, BN)
            m0 += WG * BM
            row_bias = column_of(bias, bias_strides, m0, head, b, batch_inner, M, BM, BN)
            next_rows = None
            if ROW_BIASED:
                next_rows = row_bias
            if OVERLAP:
                next_s = warpgroup_mma_wait(1, [next_pending])
            else:
                next_s = warpgroup_mma_wait(0, [next_pending])
                mbarrier.arrive(bars[K_EMPTY].index(stage))
            next_bias = None
            next_shown = None
            if bias_s is not None:
                next_bias = _bias_of(bias_s, bars, done, WG, BM, BN, WGS, BIAS_STAGES, VARIES_M)
            if mask_s is not None:
                next_shown = mask_s.index(slot_of(done, BIAS_STAGES) * WGS + WG)
            _scores, next_p16, new_l, new_m = softmax(
                next_s, next_bias, next_shown, next_rows, slope_of(slopes, slope_strides, b, head), cap, None, m0, (next_end - 1) * BN,
                N - M, next_keys, lo, hi, scale_log2, DT, IS_MASK, POSITIVE_SCALE, MASKED, ALIBI, lengths is not None, False,
            )  # fmt: skip
            if bias_s is not None:
                _release_bias(bars, done, WG, WGS, BIAS_STAGES)
            if OVERLAP:
                o = warpgroup_mma_wait(0, [o_pending])
                mbarrier.arrive(bars[K_EMPTY].index(stage))
            if dropout is not None:
                next_p16 = dropped(next_p16, drawn(stream_of(dropout, b, head, heads), m0, (next_end - 1) * BN, BM, BN, False))
            p = gl.convert_layout(next_p16, P)
            if OVERLAP:
                _finish(
                    o, l, m, out_desc, lse, rest, sink, sink_stride, dropout, out_s.index(WG), old_m0, old_head, old_b, heads, M,
                    BM, BN, BDV, DT,
                )  # fmt: skip
            m = new_m
            l = new_l
            o = gl.zeros([BM, BDV], gl.float32, O)
    if OVERLAP:
        stage = slot_of(done, STAGES)
        mbarrier.wait(bars[K_FULL].index(stage), phase_of(done, STAGES))
        o = warpgroup_mma_wait(0, [warpgroup_mma(p, v_s.index(stage).reshape([BN, BDV]), o, is_async=True)])
        _finish(o, l, m, out_desc, lse, rest, sink, sink_stride, dropout, out_s.index(WG), m0, head, b, heads, M, BM, BN, BDV, DT)
        tma_store_wait(0)


# Not specialised: nothing is gained from knowing that a count is 1 or a multiple of 16, and every combination would be compiled anew.
COUNTS = ["batch", "heads", "group", "batch_inner", "M", "N", "lo", "hi", "tiles_m", "tiles", "section", "snake"]


@gluon.jit(do_not_specialize=COUNTS)
def forward(
    q_desc, k_desc, v_desc, out_desc, bias_desc, bias, lengths, slopes, sink, lse, rest, bias_strides, bias_on, slope_strides, sink_stride,
    cap, dropout, mask_desc, mask_on,
    batch, heads, group, batch_inner, M, N, lo, hi, scale, tiles_m, tiles, section, snake,
    BN: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr,
    BATCH_FASTEST: gl.constexpr,
    IS_MASK: gl.constexpr, VARIES_M: gl.constexpr, POSITIVE_SCALE: gl.constexpr, EVEN_N: gl.constexpr, ALIBI: gl.constexpr,
    TURNS: gl.constexpr,
    OWN_OUT: gl.constexpr, REGISTERS: gl.constexpr, Q_STAGES: gl.constexpr, FUSING: gl.constexpr,
):  # fmt: skip
    """Tiles of 64 * WGS queries; ``tiles`` of them, ``tiles_m`` a (batch, head) pair, dealt out as ``locate`` says.

    Descriptors of q, k, v, out are over (batch, length, head, dim) with blocks [1, rows, 1, dims]; that of the bias over its five dims,
    whose broadcast ones have size 1 and are switched off by a 0 in ``bias_on``. A bias without a dim of keys comes as a pointer and
    strides (outer batch, inner batch, head, query) instead. lse and rest are contiguous (batch, head, query). ``group`` query heads share a
    key head. lengths: visible keys by batch; slopes: of ALiBi, by strides (batch, head); sink: by head; cap: see ``squashed``; dropout: see
    ``stream_of``; mask: beside the bias, a tile or a row with every tile of it. None: absent.

    OWN_OUT: the output leaves through a buffer of its own, so that the next tile can begin before it has left; else through q's.
    FUSING: see ``softmax``.
    """
    BM: gl.constexpr = 64
    DT: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(DT, stacked(Q_STAGES * WGS, q_desc.block_shape), q_desc.layout)
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
    if mask_desc is not None:
        mask_s = gl.allocate_shared_memory(mask_desc.dtype, stacked(BIAS_STAGES * WGS, mask_desc.block_shape), mask_desc.layout)
    else:
        mask_s = None
    bars = all_barriers(WGS, Q_STAGES, STAGES, 0, BIAS_STAGES)
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
                        tiles_m, tiles, section, snake, 0, BM, BN, WGS, STAGES, BIAS_STAGES,
                        BATCH_FASTEST, IS_MASK, VARIES_M, POSITIVE_SCALE, EVEN_N, ALIBI, TURNS, FUSING)),
            (produce, (q_desc, k_desc, v_desc, optional(bias_desc), optional(mask_desc), optional(lengths), q_s, k_s, v_s,
                        optional(bias_s), optional(mask_s), bars, batch, heads, group, batch_inner, M, N, optional(lo), optional(hi),
                        optional(bias_on), optional(mask_on), tiles_m, tiles, section, snake, BM, BN, WGS, STAGES, BIAS_STAGES,
                        BATCH_FASTEST, VARIES_M)),
        ], [1], [24])  # fmt: skip
    elif WGS == 2:
        gl.warp_specialize([
            (_consume, (out_desc, optional(bias), optional(lengths), optional(slopes), optional(sink), lse, optional(rest), q_s, k_s, v_s,
                        optional(out_s), optional(bias_s), optional(mask_s), bars,
                        optional(bias_strides), optional(slope_strides), optional(sink_stride), optional(cap), optional(dropout), batch,
                        heads, batch_inner, M, N, optional(lo), optional(hi), scale_log2,
                        tiles_m, tiles, section, snake, 0, BM, BN, WGS, STAGES, BIAS_STAGES,
                        BATCH_FASTEST, IS_MASK, VARIES_M, POSITIVE_SCALE, EVEN_N, ALIBI, TURNS, FUSING)),
            (_consume, (out_desc, optional(bias), optional(lengths), optional(slopes), optional(sink), lse, optional(rest), q_s, k_s, v_s,
                        optional(out_s), optional(bias_s), optional(mask_s), bars,
                        optional(bias_strides), optional(slope_strides), optional(sink_stride), optional(cap), optional(dropout), batch,
                        heads, batch_inner, M, N, optional(lo), optional(hi), scale_log2,
                        tiles_m, tiles, section, snake, 1, BM, BN, WGS, STAGES, BIAS_STAGES,
                        BATCH_FASTEST, IS_MASK, VARIES_M, POSITIVE_SCALE, EVEN_N, ALIBI, TURNS, FUSING)),
            (produce, (q_desc, k_desc, v_desc, optional(bias_desc), optional(mask_desc), optional(lengths), q_s, k_s, v_s,
                        optional(bias_s), optional(mask_s), bars, batch, heads, group, batch_inner, M, N, optional(lo), optional(hi),
                        optional(bias_on), optional(mask_on), tiles_m, tiles, section, snake, BM, BN, WGS, STAGES, BIAS_STAGES,
                        BATCH_FASTEST, VARIES_M)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (out_desc, optional(bias), optional(lengths), optional(slopes), optional(sink), lse, optional(rest), q_s, k_s, v_s,
                        optional(out_s), optional(bias_s), optional(mask_s), bars,
                        optional(bias_strides), optional(slope_strides), optional(sink_stride), optional(cap), optional(dropout), batch,
                        heads, batch_inner, M, N, optional(lo), optional(hi), scale_log2,
                        tiles_m, tiles, section, snake, 0, BM, BN, WGS, STAGES, BIAS_STAGES,
                        BATCH_FASTEST, IS_MASK, VARIES_M, POSITIVE_SCALE, EVEN_N, ALIBI, TURNS, FUSING)),
            (_consume, (out_desc, optional(bias), optional(lengths), optional(slopes), optional(sink), lse, optional(rest), q_s, k_s, v_s,
                        optional(out_s), optional(bias_s), optional(mask_s), bars,
                        optional(bias_strides), optional(slope_strides), optional(sink_stride), optional(cap), optional(dropout), batch,
                        heads, batch_inner, M, N, optional(lo), optional(hi), scale_log2,
                        tiles_m, tiles, section, snake, 1, BM, BN, WGS, STAGES, BIAS_STAGES,
                        BATCH_FASTEST, IS_MASK, VARIES_M, POSITIVE_SCALE, EVEN_N, ALIBI, TURNS, FUSING)),
            (_consume, (out_desc, optional(bias), optional(lengths), optional(slopes), optional(sink), lse, optional(rest), q_s, k_s, v_s,
                        optional(out_s), optional(bias_s), optional(mask_s), bars,
                        optional(bias_strides), optional(slope_strides), optional(sink_stride), optional(cap), optional(dropout), batch,
                        heads, batch_inner, M, N, optional(lo), optional(hi), scale_log2,
                        tiles_m, tiles, section, snake, 2, BM, BN, WGS, STAGES, BIAS_STAGES,
                        BATCH_FASTEST, IS_MASK, VARIES_M, POSITIVE_SCALE, EVEN_N, ALIBI, TURNS, FUSING)),
            (produce, (q_desc, k_desc, v_desc, optional(bias_desc), optional(mask_desc), optional(lengths), q_s, k_s, v_s,
                        optional(bias_s), optional(mask_s), bars, batch, heads, group, batch_inner, M, N, optional(lo), optional(hi),
                        optional(bias_on), optional(mask_on), tiles_m, tiles, section, snake, BM, BN, WGS, STAGES, BIAS_STAGES,
                        BATCH_FASTEST, VARIES_M)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
