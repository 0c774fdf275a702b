"""The backward kernel for Hopper that gives dq, and with it the gradient of a bias of full shape.

Built like the forward kernel: a producer warp that loads by TMA, one or two consumers of 64 queries, a persistent grid whose tiles
``grid.locate`` deals out. A consumer keeps q and dout of its queries in shared memory and walks the key blocks that they see, from the
last to the first:

    s = scale q kᵀ (+ bias);   dp = dout vᵀ;   ds = 2^(s - lse) * (dp - delta);   dq += ds k

Every tile of ds exists once, in registers, where it is the left operand of the third product. Nothing is added atomically. With AHEAD the
product ds k of a block is issued behind s and dp of the next, and runs under that block's softmax.

The gradient of a full-shape bias leaves through the buffer that its block of the bias came in. Blocks that no query of a tile sees are
filled with zeros by the producer, from a block of zeros in shared memory.
"""

from ..triton.prims import LOG2E
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
from .features import (
    ONE_SIDED,
    add_alibi,
    capped,
    clear_hidden,
    hide_by,
    line,
    rounded,
    slope_at,
    slope_of,
    squashed,
    visible_keys,
    weighed,
)
from .grid import accumulator, locate, mildest, share, stacked
from .loads import BIAS_EMPTY, BIAS_FULL, K_EMPTY, K_FULL, Q_EMPTY, Q_FULL, TURN, V_EMPTY, V_FULL, all_barriers, visible_blocks
from .rows import add_bias, column_of, exponents, hide_unseen, statistics


@gluon.jit
def _produce(
    q_desc, dout_desc, k_desc, v_desc, bias_desc, mask_desc, dbias_desc, lengths, q_s, dout_s, k_s, v_s, bias_s, mask_s, zeros_s, bars,
    batch, heads, group, batch_inner, M, N, lo, hi, bias_on, mask_on, tiles_m, tiles, section, snake,
    BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr,
    BATCH_FASTEST: gl.constexpr, VARIES_M: gl.constexpr,
):  # fmt: skip
    """The producer: every load of the program, in the order in which the consumers need them."""
    BIAS_BYTES: gl.constexpr = bias_desc.block_type.nbytes if bias_desc is not None else 0
    MASK_BYTES: gl.constexpr = mask_desc.block_type.nbytes if mask_desc is not None else 0
    done = 0  # blocks of earlier tiles: buffers and phases go on counting across tiles
    LONGEST: gl.constexpr = "last" if hi is not None else "none"
    for wave in range(share(tiles, snake)):
        m0, head, b = locate(wave, tiles_m, batch, heads, section, snake, BATCH_FASTEST, BM * WGS, LONGEST)
        begin, _a, _b, end = visible_blocks(m0, BM * WGS, M, visible_keys(lengths, b, N), lo, hi, BN)
        outer = b // batch_inner
        inner = b % batch_inner
        key_head = head // group
        for j in range(end - begin):
            n0 = (end - 1 - j) * BN
            at = done + j
            stage = at % K_STAGES
            mbarrier.wait(bars[K_EMPTY].index(stage), ((at // K_STAGES) & 1) ^ 1)
            mbarrier.expect(bars[K_FULL].index(stage), k_desc.block_type.nbytes)
            tma_load(k_desc, [b, n0, key_head, 0], bars[K_FULL].index(stage), k_s.index(stage))
            if j == 0:
                for w in gl.static_range(WGS):
                    mbarrier.wait(bars[Q_EMPTY].index(w), (wave & 1) ^ 1)
                    mbarrier.expect(bars[Q_FULL].index(w), q_desc.block_type.nbytes + dout_desc.block_type.nbytes)
                    tma_load(q_desc, [b, m0 + w * BM, head, 0], bars[Q_FULL].index(w), q_s.index(w))
                    tma_load(dout_desc, [b, m0 + w * BM, head, 0], bars[Q_FULL].index(w), dout_s.index(w))
            stage = at % V_STAGES
            mbarrier.wait(bars[V_EMPTY].index(stage), ((at // V_STAGES) & 1) ^ 1)
            mbarrier.expect(bars[V_FULL].index(stage), v_desc.block_type.nbytes)
            tma_load(v_desc, [b, n0, key_head, 0], bars[V_FULL].index(stage), v_s.index(stage))
            if bias_desc is not None:
                for w in gl.static_range(WGS):
                    slot = at % BIAS_STAGES * WGS + w
                    mbarrier.wait(bars[BIAS_EMPTY].index(slot), ((at // BIAS_STAGES) & 1) ^ 1)
                    mbarrier.expect(bars[BIAS_FULL].index(slot), BIAS_BYTES + MASK_BYTES)
                    row = 0
                    if VARIES_M:
                        row = m0 + w * BM
                    tma_load(
                        bias_desc,
                        [outer * bias_on[0], inner * bias_on[1], head * bias_on[2], row, n0],
                        bars[BIAS_FULL].index(slot),
                        bias_s.index(slot),
                    )
                    if mask_desc is not None:
                        mask_row = 0
                        if mask_s.shape[4] > 1:
                            mask_row = m0 + w * BM
                        at_mask = [outer * mask_on[0], inner * mask_on[1], head * mask_on[2], mask_row, n0]
                        tma_load(mask_desc, at_mask, bars[BIAS_FULL].index(slot), mask_s.index(slot))
        done += end - begin
        if zeros_s is not None:
            for w in gl.static_range(WGS):
                for block in range(begin):
                    tma_store(dbias_desc, [outer, inner, head, m0 + w * BM, block * BN], zeros_s)
                for block in range(end, (N + BN - 1) // BN):
                    tma_store(dbias_desc, [outer, inner, head, m0 + w * BM, block * BN], zeros_s)
    if zeros_s is not None:
        tma_store_wait(0)


@gluon.jit
def _step(
    dq, ds, q, dout, lse, delta, rest, column, slope, stream, cap, k_s, v_s, bias_s, mask_s, dbias_desc, bars, at, m0, n0, head, outer,
    inner,
    ahead, N, lo, hi, scale_log2,
    WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    BIAS_STAGES: gl.constexpr, IS_MASK: gl.constexpr, VARIES_M: gl.constexpr, COLUMN: gl.constexpr, HAS_REST: gl.constexpr,
    AHEAD: gl.constexpr, TURNS: gl.constexpr, ALIBI: gl.constexpr, MILD: gl.constexpr, FIRST: gl.constexpr, MASKED: gl.constexpr,
    CUT: gl.constexpr,
):  # fmt: skip
    """One key block: ``(dq, ds)`` with the block before in dq (AHEAD), or the block itself. MILD: see ``edges.py``. CUT: a length may end
    in it.
    """
    BD: gl.constexpr = k_s.shape[4]
    BDV: gl.constexpr = v_s.shape[4]
    S: gl.constexpr = accumulator(BN)
    DS: gl.constexpr = gl.DotOperandLayout(0, accumulator(BD), 2)
    BIASED: gl.constexpr = (bias_s is not None or COLUMN) and not IS_MASK
    nothing = gl.zeros([BM, BN], gl.float32, S)
    k_stage = at % K_STAGES
    v_stage = at % V_STAGES
    before = (at + K_STAGES - 1) % K_STAGES
    v_phase = (at // V_STAGES) & 1
    k = k_s.index(k_stage).reshape([BN, BD])
    mbarrier.wait(bars[K_FULL].index(k_stage), (at // K_STAGES) & 1)
    if TURNS:
        mbarrier.wait(bars[TURN + WG].index(0), at & 1)
    s_pending = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
    mbarrier.wait(bars[V_FULL].index(v_stage), v_phase)
    dp_pending = warpgroup_mma(dout, v_s.index(v_stage).reshape([BN, BDV]).permute((1, 0)), nothing, use_acc=False, is_async=True)
    if AHEAD and not FIRST:
        dq_pending = warpgroup_mma(ds, k_s.index(before).reshape([BN, BD]), dq, is_async=True)
    if TURNS:
        mbarrier.arrive(bars[TURN + (WG + 1) % WGS].index(0))
    if stream is not None:  # under the products
        marks = drawn(stream, m0, n0, BM, BN, False)
    if AHEAD and not FIRST:
        s = warpgroup_mma_wait(2, [s_pending])
    else:
        s = warpgroup_mma_wait(1, [s_pending])

    if cap is not None:
        u = squashed(s, cap)
        s = capped(u, cap)
    elif MILD or BIASED or ALIBI or not HAS_REST:
        s = s * scale_log2
    else:
        s = rounded(s, scale_log2)
    if bias_s is not None:
        slot = at % BIAS_STAGES * WGS + WG
        mbarrier.wait(bars[BIAS_FULL].index(slot), (at // BIAS_STAGES) & 1)
        if VARIES_M:
            bias = bias_s.index(slot).reshape([BM, BN]).load(S)
        else:
            WIDE: gl.constexpr = bias_s.shape[5]  # at least 128 bytes, which is what a buffer of TMA must be aligned to
            bias = gl.expand_dims(bias_s.index(slot).reshape([WIDE]).slice(0, BN).load(gl.SliceLayout(0, S)), 0)
        s = add_bias(s, bias, IS_MASK)
        if mask_s is not None:
            s = hide_by(s, mask_s.index(slot), BM, BN)
        if dbias_desc is None:
            fence_async_shared()  # a load may wait behind the operands of products, and TMA overtake it: see the forward kernel
            mbarrier.arrive(bars[BIAS_EMPTY].index(slot))
    if COLUMN:
        s = add_bias(s, gl.expand_dims(column, 1), IS_MASK)
    if ALIBI:
        s = add_alibi(s, slope, n0 - m0 - ahead, 1, ALIBI)
    if ALIBI == ONE_SIDED:
        lse = lse - line(0.0, -slope, BM, gl.SliceLayout(1, S))
    if MASKED:
        s = hide_unseen(s, m0, n0, N, lo, hi, BM, BN, "0fFF800000")
    x = exponents(s, lse, rest, HAS_REST and not MILD, BIASED)
    if cap is not None and dbias_desc is None:
        _, p = weighed(x, u, q.dtype)
    else:
        p = gl.exp2(x)
    if stream is not None:
        p = signed(p, marks)

    mbarrier.wait(bars[V_FULL].index(v_stage), v_phase)  # long since full: ptxas does not move the wait below up past it
    if AHEAD and not FIRST:
        dp = warpgroup_mma_wait(1, [dp_pending])
    else:
        dp = warpgroup_mma_wait(0, [dp_pending])
    mbarrier.arrive(bars[V_EMPTY].index(v_stage))
    if CUT:  # values that are hidden may be anything; keys have been cleared
        dp = hide_unseen(dp, m0, n0, N, None, None, BM, BN, "0f00000000")
    ds32 = of_scores(p, dp, gl.expand_dims(delta, 1), stream is not None)
    if AHEAD and not FIRST:  # before anything is rounded: the product under way reads the registers that the rounded ds will take
        dq = warpgroup_mma_wait(0, [dq_pending])
        mbarrier.arrive(bars[K_EMPTY].index(before))
    if dbias_desc is not None:
        own = at % BIAS_STAGES * WGS + WG
        dbias = ds32
        if stream is not None:
            dbias = ds32 * stream[3]
        bias_s.index(own).reshape([BM, BN]).store(dbias.to(dbias_desc.dtype))
        fence_async_shared()
        tma_store(dbias_desc, [outer, inner, head, m0, n0], bias_s.index(own))
        if BIAS_STAGES == 1:
            tma_store_wait(0)
            mbarrier.arrive(bars[BIAS_EMPTY].index(own))
        else:  # what the step before stored has had this one's time to leave its buffer
            tma_store_wait(1)
            if at > 0:
                mbarrier.arrive(bars[BIAS_EMPTY].index((at - 1) % BIAS_STAGES * WGS + WG))
        if cap is not None:  # the bias is added behind it
            ds32 = ds32 * slope_at(u)
    ds16 = gl.convert_layout(ds32.to(q.dtype), DS)
    if not AHEAD:
        dq = warpgroup_mma_wait(0, [warpgroup_mma(ds16, k, dq, is_async=True)])
        mbarrier.arrive(bars[K_EMPTY].index(k_stage))
    return dq, ds16


@gluon.jit
def _walk(
    dq, ds, q, dout, lse, delta, rest, column, slope, stream, cap, k_s, v_s, bias_s, mask_s, dbias_desc, bars, done, first, last, steps,
    end,
    m0, head, outer, inner, ahead, N, lo, hi, scale_log2,
    WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    BIAS_STAGES: gl.constexpr, IS_MASK: gl.constexpr, VARIES_M: gl.constexpr, COLUMN: gl.constexpr, HAS_REST: gl.constexpr,
    AHEAD: gl.constexpr, TURNS: gl.constexpr, ALIBI: gl.constexpr, MILD: gl.constexpr, MASKED: gl.constexpr, Q_EARLY: gl.constexpr,
):  # fmt: skip
    """Steps ``first … last`` of a tile's ``steps``."""
    for step in range(first, last):
        dq, ds = _step(
            dq, ds, q, dout, lse, delta, rest, column, slope, stream, cap, k_s, v_s, bias_s, mask_s, dbias_desc, bars, done + step, m0,
            (end - 1 - step) * BN,
            head, outer, inner, ahead, N, lo, hi, scale_log2, WG, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES, IS_MASK, VARIES_M, COLUMN,
            HAS_REST, AHEAD, TURNS, ALIBI, MILD, False, MASKED, False,
        )  # fmt: skip
        if Q_EARLY:
            if step == steps - 1:  # no more products with this q and dout: the next can be fetched
                mbarrier.arrive(bars[Q_EMPTY].index(WG))
    return dq, ds


@gluon.jit
def _consume(
    dq_desc, dbias_desc, bias, lengths, slopes, stats, q_s, dout_s, k_s, v_s, out_s, bias_s, mask_s, bars,
    bias_strides, slope_strides, cap, dropout, batch, heads, batch_inner, M, N, lo, hi, scale, tiles_m, tiles, section, snake,
    WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    BIAS_STAGES: gl.constexpr, BATCH_FASTEST: gl.constexpr, IS_MASK: gl.constexpr, VARIES_M: gl.constexpr, HAS_REST: gl.constexpr,
    EVEN_N: gl.constexpr, ALIBI: gl.constexpr, AHEAD: gl.constexpr, TURNS: gl.constexpr, MILD: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 queries of every tile of the program."""
    BD: gl.constexpr = q_s.shape[4]
    BDV: gl.constexpr = v_s.shape[4]
    DQ: gl.constexpr = accumulator(BD)
    MASKED: gl.constexpr = (lo is not None) or (hi is not None) or (not EVEN_N)
    COLUMN: gl.constexpr = bias is not None
    Q_EARLY: gl.constexpr = out_s is not None
    scale_log2 = scale * LOG2E
    q = q_s.index(WG).reshape([BM, BD])
    dout = dout_s.index(WG).reshape([BM, BDV])
    if Q_EARLY:
        target = out_s.index(WG)
    else:
        target = q_s.index(WG)
    done = 0  # blocks of earlier tiles
    LONGEST: gl.constexpr = "last" if hi is not None else "none"
    for wave in range(share(tiles, snake)):
        m0, head, b = locate(wave, tiles_m, batch, heads, section, snake, BATCH_FASTEST, BM * WGS, LONGEST)
        n_keys = visible_keys(lengths, b, N)
        slope = slope_of(slopes, slope_strides, b, head)
        stream = None
        if dropout is not None:
            stream = stream_of(dropout, b, head, heads)
        begin, full_begin, full_end, end = visible_blocks(m0, BM * WGS, M, n_keys, lo, hi, BN)
        steps = end - begin
        m0 += WG * BM
        outer = b // batch_inner
        inner = b % batch_inner
        lse, delta, rest = statistics(stats, b * heads + head, m0, M, HAS_REST, BM, BN)
        column = column_of(bias, bias_strides, m0, head, b, batch_inner, M, BM, BN)
        dq = gl.zeros([BM, BD], gl.float32, DQ)
        mbarrier.wait(bars[Q_FULL].index(WG), wave & 1)
        if lengths is not None:
            if (end * BN > n_keys) & (n_keys < N):  # no other block of a tile is cut by a length
                cut = done % K_STAGES
                mbarrier.wait(bars[K_FULL].index(cut), (done // K_STAGES) & 1)
                clear_hidden(k_s.index(cut).reshape([BN, BD]), n_keys - (end - 1) * BN)
        dq, ds = _step(
            dq, dq, q, dout, lse, delta, rest, column, slope, stream, cap, k_s, v_s, bias_s, mask_s, dbias_desc, bars, done, m0,
            (end - 1) * BN,
            head, outer, inner, N - M, n_keys, lo, hi, scale_log2, WG, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES, IS_MASK, VARIES_M,
            COLUMN, HAS_REST, AHEAD, TURNS, ALIBI, MILD, True, MASKED, lengths is not None,
        )  # fmt: skip
        if Q_EARLY:
            if steps == 1:
                mbarrier.arrive(bars[Q_EMPTY].index(WG))
        # What is left: partly visible on the right, whole, partly visible on the left.
        if hi is not None:
            dq, ds = _walk(
                dq, ds, q, dout, lse, delta, rest, column, slope, stream, cap, k_s, v_s, bias_s, mask_s, dbias_desc, bars, done, 1,
                end - full_end, steps, end,
                m0, head, outer, inner, N - M, n_keys, lo, hi, scale_log2, WG, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES, IS_MASK,
                VARIES_M, COLUMN, HAS_REST, AHEAD, TURNS, ALIBI, MILD, True, Q_EARLY,
            )  # fmt: skip
        whole = max(1, end - full_end)
        dq, ds = _walk(
            dq, ds, q, dout, lse, delta, rest, column, slope, stream, cap, k_s, v_s, bias_s, mask_s, dbias_desc, bars, done, whole,
            end - full_begin, steps, end,
            m0, head, outer, inner, N - M, n_keys, lo, hi, scale_log2, WG, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES, IS_MASK, VARIES_M,
            COLUMN, HAS_REST, AHEAD, TURNS, ALIBI, MILD, False, Q_EARLY,
        )  # fmt: skip
        if lo is not None:
            left = max(1, end - full_begin)
            dq, ds = _walk(
                dq, ds, q, dout, lse, delta, rest, column, slope, stream, cap, k_s, v_s, bias_s, mask_s, dbias_desc, bars, done, left,
                steps,
                steps, end, m0, head, outer, inner, N - M, n_keys, lo, hi, scale_log2, WG, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES,
                IS_MASK, VARIES_M, COLUMN, HAS_REST, AHEAD, TURNS, ALIBI, MILD, True, Q_EARLY,
            )  # fmt: skip
        done += steps
        if AHEAD:
            stage = (done - 1) % K_STAGES
            dq = warpgroup_mma_wait(0, [warpgroup_mma(ds, k_s.index(stage).reshape([BN, BD]), dq, is_async=True)])
            mbarrier.arrive(bars[K_EMPTY].index(stage))
        tma_store_wait(0)  # what the target held before must have left it
        if dropout is not None:
            dq = dq * dropout[2]
        target.reshape([BM, BD]).store((dq * scale).to(q.dtype))
        fence_async_shared()
        tma_store(dq_desc, [b, m0, head, 0], target)
        if not Q_EARLY:
            tma_store_wait(0)
            mbarrier.arrive(bars[Q_EMPTY].index(WG))
    tma_store_wait(0)


@gluon.jit
def _consume_either(
    mild, dq_desc, dbias_desc, bias, lengths, slopes, stats, q_s, dout_s, k_s, v_s, out_s, bias_s, mask_s, bars,
    bias_strides, slope_strides, cap, dropout, batch, heads, batch_inner, M, N, lo, hi, scale, tiles_m, tiles, section, snake,
    WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    BIAS_STAGES: gl.constexpr, BATCH_FASTEST: gl.constexpr, IS_MASK: gl.constexpr, VARIES_M: gl.constexpr, HAS_REST: gl.constexpr,
    EVEN_N: gl.constexpr, ALIBI: gl.constexpr, AHEAD: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """One consumer: ``_consume`` in the faster way if all statistics are mild (``edges.py``)."""
    if (mild is not None) and (mildest(mild) != 0):
        _consume(
            dq_desc, dbias_desc, bias, lengths, slopes, stats, q_s, dout_s, k_s, v_s, out_s, bias_s, mask_s, bars,
            bias_strides, slope_strides, cap, dropout, batch, heads, batch_inner, M, N, lo, hi, scale, tiles_m, tiles, section, snake,
            WG, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES, BATCH_FASTEST, IS_MASK, VARIES_M, HAS_REST, EVEN_N, ALIBI, AHEAD, TURNS,
            True,
        )  # fmt: skip
    else:
        _consume(
            dq_desc, dbias_desc, bias, lengths, slopes, stats, q_s, dout_s, k_s, v_s, out_s, bias_s, mask_s, bars,
            bias_strides, slope_strides, cap, dropout, batch, heads, batch_inner, M, N, lo, hi, scale, tiles_m, tiles, section, snake,
            WG, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES, BATCH_FASTEST, IS_MASK, VARIES_M, HAS_REST, EVEN_N, ALIBI, AHEAD, TURNS,
            False,
        )  # fmt: skip


# Not specialised: nothing is gained from knowing that a count is 1 or a multiple of 16, and every combination would be compiled anew.
COUNTS = ["batch", "heads", "group", "batch_inner", "M", "N", "lo", "hi", "tiles_m", "tiles", "section", "snake"]


@gluon.jit(do_not_specialize=COUNTS)
def dq(
    q_desc, dout_desc, k_desc, v_desc, dq_desc, bias_desc, dbias_desc, bias, lengths, slopes, stats, mild, bias_strides, slope_strides,
    bias_on, cap, dropout, mask_desc, mask_on,
    batch, heads, group, batch_inner, M, N, lo, hi, scale, tiles_m, tiles, section, snake,
    BN: gl.constexpr, WGS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr,
    BATCH_FASTEST: gl.constexpr, IS_MASK: gl.constexpr, VARIES_M: gl.constexpr, HAS_REST: gl.constexpr, EVEN_N: gl.constexpr,
    ALIBI: gl.constexpr,
    OWN_OUT: gl.constexpr, AHEAD: gl.constexpr, TURNS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Tiles of 64 * WGS queries; ``tiles`` of them, ``tiles_m`` a (batch, head) pair, dealt out as ``grid.locate`` says.

    Descriptors, bias and its strides as in the forward kernel; dbias_desc is over a bias of full shape, in blocks like the bias's. stats:
    see ``rows.py``; mild: ``prepare``'s flags, or None. cap: see ``features.squashed``; dropout: see ``stream_of``; mask: beside the bias,
    a tile or a row with every tile of it. Query head h reads key head ``h // group``. None: absent.

    OWN_OUT: dq leaves through a buffer of its own, so that the next tile can begin before it has left; else through q's.
    """
    BM: gl.constexpr = 64
    DT: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(DT, stacked(WGS, q_desc.block_shape), q_desc.layout)
    dout_s = gl.allocate_shared_memory(DT, stacked(WGS, dout_desc.block_shape), dout_desc.layout)
    k_s = gl.allocate_shared_memory(DT, stacked(K_STAGES, k_desc.block_shape), k_desc.layout)
    v_s = gl.allocate_shared_memory(DT, stacked(V_STAGES, v_desc.block_shape), v_desc.layout)
    if OWN_OUT:
        out_s = gl.allocate_shared_memory(DT, stacked(WGS, dq_desc.block_shape), dq_desc.layout)
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
    if dbias_desc is not None and (lo is not None or hi is not None or lengths is not None):
        zeros_s = gl.allocate_shared_memory(dbias_desc.dtype, dbias_desc.block_shape, dbias_desc.layout)
        zeros_s.reshape([BM, BN]).store(gl.zeros([BM, BN], dbias_desc.dtype, accumulator(BN)))
    else:
        zeros_s = None
    bars = all_barriers(WGS, 1, K_STAGES, V_STAGES, BIAS_STAGES)
    if TURNS:
        mbarrier.arrive(bars[TURN].index(0))

    # Tuples of arguments are written out: bound to a name, their compile-time constants would become tensors.
    if WGS == 1:
        gl.warp_specialize([
            (_consume_either, (optional(mild), dq_desc, optional(dbias_desc), optional(bias), optional(lengths), optional(slopes), stats,
                        q_s, dout_s, k_s, v_s, optional(out_s), optional(bias_s), optional(mask_s),
                        bars, optional(bias_strides), optional(slope_strides), optional(cap), optional(dropout), batch, heads,
                        batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_m, tiles, section, snake, 0, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES,
                        BATCH_FASTEST, IS_MASK, VARIES_M, HAS_REST, EVEN_N, ALIBI, AHEAD, TURNS)),
            (_produce, (q_desc, dout_desc, k_desc, v_desc, optional(bias_desc), optional(mask_desc), optional(dbias_desc),
                        optional(lengths), q_s, dout_s, k_s, v_s,
                        optional(bias_s), optional(mask_s), optional(zeros_s), bars, batch, heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), optional(bias_on), optional(mask_on), tiles_m, tiles, section, snake, BM, BN, WGS, K_STAGES,
                        V_STAGES, BIAS_STAGES, BATCH_FASTEST, VARIES_M)),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume_either, (optional(mild), dq_desc, optional(dbias_desc), optional(bias), optional(lengths), optional(slopes), stats,
                        q_s, dout_s, k_s, v_s, optional(out_s), optional(bias_s), optional(mask_s),
                        bars, optional(bias_strides), optional(slope_strides), optional(cap), optional(dropout), batch, heads,
                        batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_m, tiles, section, snake, 0, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES,
                        BATCH_FASTEST, IS_MASK, VARIES_M, HAS_REST, EVEN_N, ALIBI, AHEAD, TURNS)),
            (_consume_either, (optional(mild), dq_desc, optional(dbias_desc), optional(bias), optional(lengths), optional(slopes), stats,
                        q_s, dout_s, k_s, v_s, optional(out_s), optional(bias_s), optional(mask_s),
                        bars, optional(bias_strides), optional(slope_strides), optional(cap), optional(dropout), batch, heads,
                        batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_m, tiles, section, snake, 1, BM, BN, WGS, K_STAGES, V_STAGES, BIAS_STAGES,
                        BATCH_FASTEST, IS_MASK, VARIES_M, HAS_REST, EVEN_N, ALIBI, AHEAD, TURNS)),
            (_produce, (q_desc, dout_desc, k_desc, v_desc, optional(bias_desc), optional(mask_desc), optional(dbias_desc),
                        optional(lengths), q_s, dout_s, k_s, v_s,
                        optional(bias_s), optional(mask_s), optional(zeros_s), bars, batch, heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), optional(bias_on), optional(mask_on), tiles_m, tiles, section, snake, BM, BN, WGS, K_STAGES,
                        V_STAGES, BIAS_STAGES, BATCH_FASTEST, VARIES_M)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
