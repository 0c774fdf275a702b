"""The backward kernel for Hopper that owns keys, for head dims above 128: dk and dv. dq comes from ``dq.py``.

dk and dv of 64 keys with 256 dims fill a consumer's registers each, so the two consumers share the work another way than in
``backward.py``: one computes sᵀ, pᵀ and ``dv += pᵀ dout``, the other dpᵀ, dsᵀ and ``dk += scale dsᵀ q``. pᵀ goes from the first to the
second through shared memory, in q's dtype, in which it is the operand of dv anyway. The second product of a block runs under the first of
the next.
"""

from ..triton.prims import LOG2E, offset
from .columns import DELTA, LSE, REST, in_turn, probabilities, turned, visible_blocks
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
from .dropout import drawn, dropped, of_scores, signed, stream_of
from .features import clear_hidden, slope_of, visible_keys
from .grid import accumulator, barriers, locate, mildest, share, stacked

# A program's barriers are a tuple with an element a name, which holds one for every buffer.
KV_FULL, KV_EMPTY, Q_FULL, Q_EMPTY, O_FULL, O_EMPTY, P_FULL, P_EMPTY, BIAS_FULL, BIAS_EMPTY = map(gl.constexpr, range(10))


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, o_desc, stats_desc, bias_desc, mask_desc, lengths, q_s, k_s, v_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s,
    bars, batch, heads, group, batch_inner, M, N, lo, hi, bias_on, mask_on, tiles_n, tiles, section, snake,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr,
):  # fmt: skip
    """The producer: every load of the program, in the order in which the consumers need them."""
    STATS: gl.constexpr = BM * 4
    kv_heads = heads // group
    BIAS_BYTES: gl.constexpr = bias_desc.block_type.nbytes if bias_desc is not None else 0
    MASK_BYTES: gl.constexpr = mask_desc.block_type.nbytes if mask_desc is not None else 0
    done = 0  # blocks of earlier tiles: buffers and phases go on counting across tiles
    for wave in range(share(tiles, snake)):
        n0, kv_head, b = locate(wave, tiles_n, batch, kv_heads, section, snake, BATCH_FASTEST, BN, LONGEST)
        begin, whole, part, end = visible_blocks(n0, M, visible_keys(lengths, b, N), lo, hi, BM, BN)
        mbarrier.wait(bars[KV_EMPTY].index(0), (wave & 1) ^ 1)
        mbarrier.expect(bars[KV_FULL].index(0), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        tma_load(k_desc, [b, n0, kv_head, 0], bars[KV_FULL].index(0), k_s)
        tma_load(v_desc, [b, n0, kv_head, 0], bars[KV_FULL].index(0), v_s)
        steps = end - begin
        for step in range(steps * group):
            head = kv_head * group + step // steps
            m0 = turned(step, steps, begin, whole, part, n0, BM) * BM
            row = b * heads + head
            at = done + step
            stage = at % STAGES
            phase = ((at // STAGES) & 1) ^ 1
            mbarrier.wait(bars[Q_EMPTY].index(stage), phase)
            if rest_s is not None:
                mbarrier.expect(bars[Q_FULL].index(stage), q_desc.block_type.nbytes + 2 * STATS)
                tma_load(stats_desc, [row, REST, m0], bars[Q_FULL].index(stage), rest_s.index(stage))
            else:
                mbarrier.expect(bars[Q_FULL].index(stage), q_desc.block_type.nbytes + STATS)
            tma_load(stats_desc, [row, LSE, m0], bars[Q_FULL].index(stage), lse_s.index(stage))
            tma_load(q_desc, [b, m0, head, 0], bars[Q_FULL].index(stage), q_s.index(stage))
            if bias_desc is not None or mask_desc is not None:
                mbarrier.wait(bars[BIAS_EMPTY].index(0), (at & 1) ^ 1)
                mbarrier.expect(bars[BIAS_FULL].index(0), BIAS_BYTES + MASK_BYTES)
                if bias_desc is not None:
                    at_bias = [b // batch_inner * bias_on[0], b % batch_inner * bias_on[1], head * bias_on[2], m0, n0]
                    tma_load(bias_desc, at_bias, bars[BIAS_FULL].index(0), bias_s)
                if mask_desc is not None:
                    at_mask = [b // batch_inner * mask_on[0], b % batch_inner * mask_on[1], head * mask_on[2], m0, n0]
                    tma_load(mask_desc, at_mask, bars[BIAS_FULL].index(0), mask_s)
            mbarrier.wait(bars[O_EMPTY].index(stage), phase)
            mbarrier.expect(bars[O_FULL].index(stage), o_desc.block_type.nbytes + STATS)
            tma_load(stats_desc, [row, DELTA, m0], bars[O_FULL].index(stage), delta_s.index(stage))
            tma_load(o_desc, [b, m0, head, 0], bars[O_FULL].index(stage), o_s.index(stage))
        done += steps * group


@gluon.jit
def _walk_values(
    dv, p16, k_s, q_s, o_s, lse_s, rest_s, bias_s, mask_s, p_s, bars, key_bias, key_mask, slope, stream, cap, done, base, first, last, n0,
    ahead, N, lo, hi, scale_log2, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, IS_MASK: gl.constexpr, KEY_BIASED: gl.constexpr,
    NEED_DV: gl.constexpr, NEED_DS: gl.constexpr, ALIBI: gl.constexpr, MASKED: gl.constexpr, MILD: gl.constexpr,
):  # fmt: skip
    """Score the query blocks ``first … last``; ``dv += pᵀ dout`` of each one is started in the step of the next. Numbers as in
    ``backward.py``.
    """
    W: gl.constexpr = k_s.shape[3]
    S: gl.constexpr = accumulator(BM)
    COLS: gl.constexpr = gl.SliceLayout(0, S)
    P: gl.constexpr = gl.DotOperandLayout(0, accumulator(W), 2)
    nothing = gl.zeros([BN, BM], gl.float32, S)
    k = k_s.reshape([BN, W])
    for block in range(first, last):
        at = base + block
        stage = at % STAGES
        phase = (at // STAGES) & 1
        go = at > done
        mbarrier.wait(bars[Q_FULL].index(stage), phase)
        s_pending = warpgroup_mma(k, q_s.index(stage).reshape([BM, W]).permute((1, 0)), nothing, use_acc=False, is_async=True)
        lse = gl.expand_dims(lse_s.index(stage).reshape([BM]).load(COLS), 0)
        m0 = block * BM
        if (ALIBI or stream is not None) and not MASKED:
            m0 = in_turn(block, first, last, n0, BM) * BM
        before = at - go.to(gl.int32)  # a tile's first step has p = 0 for the block before, and takes dout of its own
        if NEED_DV:
            mbarrier.wait(bars[O_FULL].index(before % STAGES), (before // STAGES) & 1)
            dv_pending = warpgroup_mma(p16, o_s.index(before % STAGES).reshape([BM, W]), dv, is_async=True)
        if stream is not None:  # under the products
            marks = drawn(stream, m0, n0, BN, BM, True)
        if NEED_DV:
            s = warpgroup_mma_wait(1, [s_pending])
        else:
            s = warpgroup_mma_wait(0, [s_pending])
        bias = None
        mask = None
        if bias_s is not None or mask_s is not None:
            mbarrier.wait(bars[BIAS_FULL].index(0), at & 1)
        if mask_s is not None:
            mask = mask_s.reshape([BM, BN]).permute((1, 0)).load(S)
        if bias_s is not None:
            bias = bias_s.reshape([BM, BN]).permute((1, 0)).load(S)
        rest = None
        if rest_s is not None:
            rest = gl.expand_dims(rest_s.index(stage).reshape([BM]).load(COLS), 0)
        p, weight = probabilities(
            s, bias, mask, key_bias, key_mask, slope, cap, lse, rest, m0, n0, ahead, N, lo, hi, scale_log2, BN, BM, IS_MASK, ALIBI,
            KEY_BIASED, MASKED, MILD, k_s.dtype,
        )  # fmt: skip
        undropped = p
        if stream is not None:
            if NEED_DS and p_s.shape[0] == 4:
                undropped = signed(p.to(gl.float32), marks).to(k_s.dtype)
            if NEED_DS:
                weight = signed(weight, marks)
            if NEED_DV:
                p = dropped(p, marks)
        if NEED_DS:
            mbarrier.wait(bars[P_EMPTY].index(at & 1), ((at >> 1) & 1) ^ 1)
            p_s.index(at & 1).permute((1, 0)).store(weight.to(k_s.dtype))
            if p_s.shape[0] == 4:
                p_s.index(2 + (at & 1)).permute((1, 0)).store(undropped)
        fence_async_shared()  # before buffers that were read by plain loads go back to TMA
        mbarrier.arrive(bars[Q_EMPTY].index(stage))
        if bias_s is not None or mask_s is not None:
            mbarrier.arrive(bars[BIAS_EMPTY].index(0))
        if NEED_DS:
            mbarrier.arrive(bars[P_FULL].index(at & 1))
        if NEED_DV:
            dv = warpgroup_mma_wait(0, [dv_pending])
            if go:
                mbarrier.arrive(bars[O_EMPTY].index(before % STAGES))
        p16 = gl.convert_layout(p, P)
    return dv, p16


@gluon.jit
def _values(
    dv_desc, bias, lengths, slopes, q_s, k_s, o_s, lse_s, rest_s, bias_s, mask_s, p_s, bars,
    bias_strides, slope_strides, cap, dropout, mask, mask_strides, batch, heads, group, batch_inner, M, N, lo, hi, scale, tiles_n, tiles,
    section, snake, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr,
    IS_MASK: gl.constexpr, EVEN_N: gl.constexpr, ALIBI: gl.constexpr, NEED_DS: gl.constexpr, MILD: gl.constexpr,
):  # fmt: skip
    """The consumer of scores: pᵀ for itself and for the other one, and dv."""
    W: gl.constexpr = k_s.shape[3]
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BM))
    P: gl.constexpr = gl.DotOperandLayout(0, accumulator(W), 2)
    DT: gl.constexpr = k_s.dtype
    NEED_DV: gl.constexpr = dv_desc is not None
    KEY_BIASED: gl.constexpr = bias is not None
    kv_heads = heads // group
    scale_log2 = scale * LOG2E
    done = 0
    for wave in range(share(tiles, snake)):
        n0, kv_head, b = locate(wave, tiles_n, batch, kv_heads, section, snake, BATCH_FASTEST, BN, LONGEST)
        begin, whole, part, end = visible_blocks(n0, M, visible_keys(lengths, b, N), lo, hi, BM, BN)
        n_keys = visible_keys(lengths, b, N)
        steps = end - begin
        dv = gl.zeros([BN, W], gl.float32, accumulator(W))
        p16 = gl.zeros([BN, BM], DT, P)
        mbarrier.wait(bars[KV_FULL].index(0), wave & 1)
        if lengths is not None:
            if (steps > 0) & (n_keys < min(n0 + BN, N)):
                clear_hidden(k_s.reshape([BN, W]), n_keys - n0)
        for member in range(group):
            slope = slope_of(slopes, slope_strides, b, kv_head * group + member)
            stream = None
            if dropout is not None:
                stream = stream_of(dropout, b, kv_head * group + member, heads)
            j = n0 + gl.arange(0, BN, ROWS)
            key_bias = gl.zeros([BN], gl.float32, ROWS)
            if KEY_BIASED:
                row = bias + offset(b // batch_inner, bias_strides[0]) + offset(b % batch_inner, bias_strides[1])
                row += offset(kv_head * group + member, bias_strides[2])
                key_bias = gl.load(row + j.to(gl.int64) * bias_strides[4], mask=j < N, other=0).to(gl.float32)
            key_mask = None
            if mask is not None:
                shown = mask + offset(b // batch_inner, mask_strides[0]) + offset(b % batch_inner, mask_strides[1])
                shown += offset(kv_head * group + member, mask_strides[2])
                key_mask = gl.load(shown + j.to(gl.int64) * mask_strides[4], mask=j < N, other=0)
            base = done + member * steps - begin
            # Both masked walks are there whenever there is any bound, one of them perhaps without a block: with one of them missing, the
            # assembler of Triton 3.6 (12.8) lets products wait for one another (C7513).
            if (hi is not None) or (lo is not None) or (not EVEN_N):
                dv, p16 = _walk_values(
                    dv, p16, k_s, q_s, o_s, lse_s, rest_s, bias_s, mask_s, p_s, bars, key_bias, key_mask, slope, stream, cap, done, base,
                    begin, whole, n0, N - M, n_keys, lo, hi,
                    scale_log2, BM, BN, STAGES, IS_MASK, KEY_BIASED, NEED_DV, NEED_DS, ALIBI, True, MILD,
                )  # fmt: skip
            dv, p16 = _walk_values(
                dv, p16, k_s, q_s, o_s, lse_s, rest_s, bias_s, mask_s, p_s, bars, key_bias, key_mask, slope, stream, cap, done, base,
                whole, part, n0, N - M, n_keys, lo,
                hi, scale_log2, BM, BN, STAGES, IS_MASK, KEY_BIASED, NEED_DV, NEED_DS, ALIBI, False, MILD,
            )  # fmt: skip
            if (lo is not None) or (hi is not None):
                dv, p16 = _walk_values(
                    dv, p16, k_s, q_s, o_s, lse_s, rest_s, bias_s, mask_s, p_s, bars, key_bias, key_mask, slope, stream, cap, done, base,
                    part, end, n0, N - M, n_keys, lo, hi,
                    scale_log2, BM, BN, STAGES, IS_MASK, KEY_BIASED, NEED_DV, NEED_DS, ALIBI, True, MILD,
                )  # fmt: skip
        done += steps * group
        if NEED_DV:
            if steps > 0:
                last = (done - 1) % STAGES
                mbarrier.wait(bars[O_FULL].index(last), ((done - 1) // STAGES) & 1)
                dv = warpgroup_mma_wait(0, [warpgroup_mma(p16, o_s.index(last).reshape([BM, W]), dv, is_async=True)])
                mbarrier.arrive(bars[O_EMPTY].index(last))
            if dropout is not None:
                dv = dv * dropout[2]
            k_s.reshape([BN, W]).store(dv.to(DT))  # nobody else reads these keys
            fence_async_shared()
            tma_store(dv_desc, [b, n0, kv_head, 0], k_s)
            tma_store_wait(0)
        mbarrier.arrive(bars[KV_EMPTY].index(0))


@gluon.jit
def _values_either(
    mild, dv_desc, bias, lengths, slopes, q_s, k_s, o_s, lse_s, rest_s, bias_s, mask_s, p_s, bars,
    bias_strides, slope_strides, cap, dropout, mask, mask_strides, batch, heads, group, batch_inner, M, N, lo, hi, scale, tiles_n, tiles,
    section, snake, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr,
    IS_MASK: gl.constexpr, EVEN_N: gl.constexpr, ALIBI: gl.constexpr, NEED_DS: gl.constexpr,
):  # fmt: skip
    """``_values`` in the faster way if all statistics are mild (``edges.py``)."""
    if (mild is not None) and (mildest(mild) != 0):
        _values(
            dv_desc, bias, lengths, slopes, q_s, k_s, o_s, lse_s, rest_s, bias_s, mask_s, p_s, bars,
            bias_strides, slope_strides, cap, dropout, mask, mask_strides, batch, heads, group, batch_inner, M, N, lo, hi, scale, tiles_n,
            tiles, section, snake, BM, BN, STAGES, BATCH_FASTEST, LONGEST, IS_MASK, EVEN_N, ALIBI, NEED_DS, True,
        )  # fmt: skip
    else:
        _values(
            dv_desc, bias, lengths, slopes, q_s, k_s, o_s, lse_s, rest_s, bias_s, mask_s, p_s, bars,
            bias_strides, slope_strides, cap, dropout, mask, mask_strides, batch, heads, group, batch_inner, M, N, lo, hi, scale, tiles_n,
            tiles, section, snake, BM, BN, STAGES, BATCH_FASTEST, LONGEST, IS_MASK, EVEN_N, ALIBI, NEED_DS, False,
        )  # fmt: skip


@gluon.jit
def _walk_keys(
    dk, db, ds16, v_s, q_s, o_s, delta_s, p_s, bars, done, base, first, last,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, NEED_DK: gl.constexpr, NEED_DB: gl.constexpr, DROPPED: gl.constexpr,
):  # fmt: skip
    """dsᵀ of the query blocks ``first … last``; ``dk += dsᵀ q`` of each one is started in the step of the next."""
    W: gl.constexpr = v_s.shape[3]
    S: gl.constexpr = accumulator(BM)
    COLS: gl.constexpr = gl.SliceLayout(0, S)
    P: gl.constexpr = gl.DotOperandLayout(0, accumulator(W), 2)
    nothing = gl.zeros([BN, BM], gl.float32, S)
    v = v_s.reshape([BN, W])
    for block in range(first, last):
        at = base + block
        stage = at % STAGES
        go = at > done
        mbarrier.wait(bars[O_FULL].index(stage), (at // STAGES) & 1)
        dp_pending = warpgroup_mma(v, o_s.index(stage).reshape([BM, W]).permute((1, 0)), nothing, use_acc=False, is_async=True)
        before = at - go.to(gl.int32)  # a tile's first step has ds = 0 for the block before, and takes q of its own
        if NEED_DK:
            mbarrier.wait(bars[Q_FULL].index(before % STAGES), (before // STAGES) & 1)
            dk_pending = warpgroup_mma(ds16, q_s.index(before % STAGES).reshape([BM, W]), dk, is_async=True)
        delta = gl.expand_dims(delta_s.index(stage).reshape([BM]).load(COLS), 0)
        mbarrier.wait(bars[P_FULL].index(at & 1), (at >> 1) & 1)
        p = p_s.index(at & 1).permute((1, 0)).load(S)
        dp = warpgroup_mma_wait(1 if NEED_DK else 0, [dp_pending])
        ds = of_scores(p.to(gl.float32), dp, delta, DROPPED)
        if NEED_DB and p_s.shape[0] == 4:
            own = p_s.index(2 + (at & 1)).permute((1, 0)).load(S).to(gl.float32)
            db += gl.sum(of_scores(own, dp, delta, DROPPED), 1)
        elif NEED_DB:
            db += gl.sum(ds, 1)
        fence_async_shared()  # before buffers that were read by plain loads go back
        mbarrier.arrive(bars[O_EMPTY].index(stage))
        mbarrier.arrive(bars[P_EMPTY].index(at & 1))
        if NEED_DK:
            dk = warpgroup_mma_wait(0, [dk_pending])
            if go:
                mbarrier.arrive(bars[Q_EMPTY].index(before % STAGES))
            ds16 = gl.convert_layout(ds.to(v_s.dtype), P)
        else:
            mbarrier.wait(bars[Q_FULL].index(stage), (at // STAGES) & 1)
            mbarrier.arrive(bars[Q_EMPTY].index(stage))
    return dk, db, ds16


@gluon.jit
def _keys(
    dk_desc, dbias, lengths, q_s, v_s, o_s, delta_s, p_s, bars,
    dbias_strides, dropout, batch, heads, group, batch_inner, M, N, lo, hi, scale, tiles_n, tiles, section, snake,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr,
):  # fmt: skip
    """The consumer of dout: dsᵀ, dk, and the gradient of a bias that varies over keys alone."""
    W: gl.constexpr = v_s.shape[3]
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BM))
    P: gl.constexpr = gl.DotOperandLayout(0, accumulator(W), 2)
    DT: gl.constexpr = v_s.dtype
    NEED_DK: gl.constexpr = dk_desc is not None
    NEED_DB: gl.constexpr = dbias is not None
    kv_heads = heads // group
    done = 0
    for wave in range(share(tiles, snake)):
        n0, kv_head, b = locate(wave, tiles_n, batch, kv_heads, section, snake, BATCH_FASTEST, BN, LONGEST)
        n_keys = visible_keys(lengths, b, N)
        begin, _whole, _part, end = visible_blocks(n0, M, n_keys, lo, hi, BM, BN)
        steps = end - begin
        dk = gl.zeros([BN, W], gl.float32, accumulator(W))
        ds16 = gl.zeros([BN, BM], DT, P)
        mbarrier.wait(bars[KV_FULL].index(0), wave & 1)
        if lengths is not None:
            if (steps > 0) & (n_keys < min(n0 + BN, N)):
                clear_hidden(v_s.reshape([BN, W]), n_keys - n0)
        for member in range(group):
            db = gl.zeros([BN], gl.float32, ROWS)
            dk, db, ds16 = _walk_keys(
                dk, db, ds16, v_s, q_s, o_s, delta_s, p_s, bars, done, done + member * steps - begin, begin, end,
                BM, BN, STAGES, NEED_DK, NEED_DB, dropout is not None,
            )  # fmt: skip
            if NEED_DB:
                j = n0 + gl.arange(0, BN, ROWS)
                target = dbias + offset(b // batch_inner, dbias_strides[0]) + offset(b % batch_inner, dbias_strides[1])
                target += offset(kv_head * group + member, dbias_strides[2])
                if dropout is not None:
                    db = db * dropout[2]
                gl.store(target + j.to(gl.int64) * dbias_strides[3], db.to(dbias.dtype.element_ty), mask=j < N)
        done += steps * group
        if NEED_DK:
            if steps > 0:
                last = (done - 1) % STAGES
                mbarrier.wait(bars[Q_FULL].index(last), ((done - 1) // STAGES) & 1)
                dk = warpgroup_mma_wait(0, [warpgroup_mma(ds16, q_s.index(last).reshape([BM, W]), dk, is_async=True)])
                mbarrier.arrive(bars[Q_EMPTY].index(last))
            if dropout is not None:
                dk = dk * dropout[2]
            v_s.reshape([BN, W]).store((dk * scale).to(DT))  # nobody else reads these values
            fence_async_shared()
            tma_store(dk_desc, [b, n0, kv_head, 0], v_s)
            tma_store_wait(0)
        mbarrier.arrive(bars[KV_EMPTY].index(0))


COUNTS = ["batch", "heads", "group", "batch_inner", "M", "N", "lo", "hi", "tiles_n", "tiles", "section", "snake"]


@gluon.jit(do_not_specialize=COUNTS)
def wide_keys_backward(
    q_desc, k_desc, v_desc, o_desc, stats_desc, mild, bias_desc, dk_desc, dv_desc, bias, lengths, slopes, dbias, bias_strides,
    dbias_strides, slope_strides, bias_on, cap, dropout, mask_desc, mask, mask_strides, mask_on,
    batch, heads, group, batch_inner, M, N, lo, hi, scale, tiles_n, tiles, section, snake,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, HAS_REST: gl.constexpr, IS_MASK: gl.constexpr, EVEN_N: gl.constexpr,
    ALIBI: gl.constexpr,
    BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr,
):  # fmt: skip
    """Tiles of BN = 64 keys of a key head. Arguments as of ``backward.keys_backward``, but all blocks have the same number of columns."""
    DT: gl.constexpr = q_desc.dtype
    NEED_DS: gl.constexpr = (dk_desc is not None) or (dbias is not None)
    NEED_DV: gl.constexpr = dv_desc is not None
    q_s = gl.allocate_shared_memory(DT, stacked(STAGES, q_desc.block_shape), q_desc.layout)
    o_s = gl.allocate_shared_memory(DT, stacked(STAGES, o_desc.block_shape), o_desc.layout)
    k_s = gl.allocate_shared_memory(DT, k_desc.block_shape, k_desc.layout)
    v_s = gl.allocate_shared_memory(DT, v_desc.block_shape, v_desc.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, stacked(STAGES, stats_desc.block_shape), stats_desc.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, stacked(STAGES, stats_desc.block_shape), stats_desc.layout)
    if HAS_REST:
        rest_s = gl.allocate_shared_memory(gl.float32, stacked(STAGES, stats_desc.block_shape), stats_desc.layout)
    else:
        rest_s = None
    if bias_desc is not None:
        bias_s = gl.allocate_shared_memory(bias_desc.dtype, bias_desc.block_shape, bias_desc.layout)
    else:
        bias_s = None
    if mask_desc is not None:
        mask_s = gl.allocate_shared_memory(mask_desc.dtype, mask_desc.block_shape, mask_desc.layout)
    else:
        mask_s = None
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BN], DT)
    # Under a soft cap it is pᵀ times the derivative of the scores; the gradient of a bias, which is added behind it, asks for pᵀ itself.
    P_TILES: gl.constexpr = 4 if cap is not None and dbias is not None else 2
    p_s = gl.allocate_shared_memory(DT, [P_TILES, BM, BN], SWIZZLED)
    # Both consumers read keys and queries, if both are there, and dout.
    SHARED: gl.constexpr = 2 if NEED_DS else 1
    kv_full = barriers(1, 1)
    kv_empty = barriers(1, SHARED)
    q_full = barriers(STAGES, 1)
    q_empty = barriers(STAGES, SHARED)
    o_full = barriers(STAGES, 1)
    o_empty = barriers(STAGES, 2 if NEED_DS and NEED_DV else 1)
    p_full = barriers(2, 1)
    p_empty = barriers(2, 1)
    bias_full = barriers(1, 1)
    bias_empty = barriers(1, 1)
    bars = (kv_full, kv_empty, q_full, q_empty, o_full, o_empty, p_full, p_empty, bias_full, bias_empty)
    fence_async_shared()

    # Tuples of arguments are written out: bound to a name, their compile-time constants would become tensors.
    if NEED_DS:
        gl.warp_specialize([
            (_values_either, (optional(mild), optional(dv_desc), optional(bias), optional(lengths), optional(slopes), q_s, k_s, o_s, lse_s,
                       optional(rest_s), optional(bias_s), optional(mask_s), p_s, bars,
                       optional(bias_strides), optional(slope_strides), optional(cap), optional(dropout), optional(mask),
                       optional(mask_strides), batch,
                       heads, group, batch_inner, M, N, optional(lo), optional(hi), scale,
                       tiles_n, tiles, section, snake, BM, BN, STAGES, BATCH_FASTEST, LONGEST, IS_MASK, EVEN_N, ALIBI, NEED_DS)),
            (_keys, (optional(dk_desc), optional(dbias), optional(lengths), q_s, v_s, o_s, delta_s, p_s, bars, optional(dbias_strides),
                     optional(dropout), batch, heads, group, batch_inner, M, N, optional(lo), optional(hi), scale, tiles_n, tiles,
                     section, snake, BM, BN, STAGES, BATCH_FASTEST, LONGEST)),
            (_produce, (q_desc, k_desc, v_desc, o_desc, stats_desc, optional(bias_desc), optional(mask_desc), optional(lengths), q_s, k_s,
                        v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), bars, batch, heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), optional(bias_on), optional(mask_on), tiles_n, tiles, section, snake, BM, BN, STAGES, BATCH_FASTEST,
                        LONGEST)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_values_either, (optional(mild), optional(dv_desc), optional(bias), optional(lengths), optional(slopes), q_s, k_s, o_s, lse_s,
                       optional(rest_s), optional(bias_s), optional(mask_s), p_s, bars,
                       optional(bias_strides), optional(slope_strides), optional(cap), optional(dropout), optional(mask),
                       optional(mask_strides), batch,
                       heads, group, batch_inner, M, N, optional(lo), optional(hi), scale,
                       tiles_n, tiles, section, snake, BM, BN, STAGES, BATCH_FASTEST, LONGEST, IS_MASK, EVEN_N, ALIBI, NEED_DS)),
            (_produce, (q_desc, k_desc, v_desc, o_desc, stats_desc, optional(bias_desc), optional(mask_desc), optional(lengths), q_s, k_s,
                        v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), bars, batch, heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), optional(bias_on), optional(mask_on), tiles_n, tiles, section, snake, BM, BN, STAGES, BATCH_FASTEST,
                        LONGEST)),
        ], [1], [24])  # fmt: skip
