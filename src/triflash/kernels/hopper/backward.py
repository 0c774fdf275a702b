"""The backward kernel for Hopper that owns keys: dk, dv and, added up in global memory, dq.

A program owns tiles of 128 keys of one key head, 64 for each of its two consumer warpgroups, and walks the queries that see them. With p
and delta as in ``kernels/triton/backward.py``, a consumer computes its part of sᵀ and dpᵀ, keeps pᵀ and dsᵀ in registers as operands of

    dv += pᵀ dout;   dk += scale dsᵀ q

and puts dsᵀ into shared memory, where the two parts meet as the operand of ``dq += ds k``; each consumer computes half of its columns
(FlashAttention-3, Shah et al. 2024). That sum runs over all key tiles, so dq leaves by TMA's float32 addition in memory, in no fixed order;
where results must be the same bits on every run, ``dq.py`` computes it and this kernel runs without.

A producer warp loads q, dout, lse, delta and bias tiles as far ahead as there are buffers; another warp starts the additions. Barriers as
in ``forward.py``.
"""

from ..triton.prims import LOG2E, offset
from .columns import DELTA, LSE, REST, in_turn, probabilities, turned, visible_blocks
from .compat import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    optional,
    tma_add,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .dropout import drawn, dropped, of_scores, signed, stream_of
from .features import clear_hidden, slope_of, visible_keys
from .grid import accumulator, locate, share, stacked


@gluon.constexpr_function
def barrier_at(name, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES):
    """Where the barriers of that name begin among all of a program's; "count" is the number of all."""
    sizes = {
        "kv_full": KV_STAGES, "kv_empty": KV_STAGES, "q_full": Q_STAGES, "q_empty": Q_STAGES, "o_full": O_STAGES, "o_empty": O_STAGES,
        "ds_full": 2, "ds_empty": 2, "dq_full": 2, "dq_empty": 2, "bias_full": 2 * BIAS_STAGES, "bias_empty": 2 * BIAS_STAGES, "count": 0,
    }  # fmt: skip
    names = list(sizes)
    return sum(sizes[n] for n in names[: names.index(name)])


@gluon.jit
def _meet():
    """Wait for the other consumer: barrier 10 of the processor (Triton uses the lowest), 256 threads."""
    gl.inline_asm_elementwise("bar.sync 10, 256; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, o_desc, stats_desc, bias_desc, mask_desc, lengths, q_s, k_s, v_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s,
    bars, batch, heads, group, batch_inner, M, N, lo, hi, bias_on, mask_on, tiles_n, tiles, section, snake,
    BM: gl.constexpr, BN: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr, KV_STAGES: gl.constexpr,
    BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr,
):  # fmt: skip
    """The producer: every load of the program, in the order in which the consumers need them."""
    KV_FULL: gl.constexpr = barrier_at("kv_full", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    KV_EMPTY: gl.constexpr = barrier_at("kv_empty", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    Q_FULL: gl.constexpr = barrier_at("q_full", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    Q_EMPTY: gl.constexpr = barrier_at("q_empty", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    O_FULL: gl.constexpr = barrier_at("o_full", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    O_EMPTY: gl.constexpr = barrier_at("o_empty", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    BIAS_FULL: gl.constexpr = barrier_at("bias_full", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    BIAS_EMPTY: gl.constexpr = barrier_at("bias_empty", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    HALF: gl.constexpr = BN // 2
    STATS: gl.constexpr = BM * 4
    kv_heads = heads // group
    BIAS_BYTES: gl.constexpr = bias_desc.block_type.nbytes if bias_desc is not None else 0
    MASK_BYTES: gl.constexpr = mask_desc.block_type.nbytes if mask_desc is not None else 0
    done = 0  # blocks of earlier tiles: buffers and phases go on counting across tiles
    for wave in range(share(tiles, snake)):
        n0, kv_head, b = locate(wave, tiles_n, batch, kv_heads, section, snake, BATCH_FASTEST, BN, LONGEST)
        begin, whole, part, end = visible_blocks(n0, M, visible_keys(lengths, b, N), lo, hi, BM, BN)
        kv = wave % KV_STAGES
        full = bars.index(KV_FULL + kv)
        mbarrier.wait(bars.index(KV_EMPTY + kv), ((wave // KV_STAGES) & 1) ^ 1)
        mbarrier.expect(full, 2 * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
        for w in gl.static_range(2):
            tma_load(k_desc, [b, n0 + w * HALF, kv_head, 0], full, k_s.index(kv * 2 + w))
            tma_load(v_desc, [b, n0 + w * HALF, kv_head, 0], full, v_s.index(kv * 2 + w))
        steps = end - begin
        for step in range(steps * group):
            head = kv_head * group + step // steps
            m0 = turned(step, steps, begin, whole, part, n0, BM) * BM
            row = b * heads + head
            at = done + step
            stage = at % Q_STAGES
            mbarrier.wait(bars.index(Q_EMPTY + stage), ((at // Q_STAGES) & 1) ^ 1)
            if rest_s is not None:
                mbarrier.expect(bars.index(Q_FULL + stage), q_desc.block_type.nbytes + 2 * STATS)
                tma_load(stats_desc, [row, REST, m0], bars.index(Q_FULL + stage), rest_s.index(stage))
            else:
                mbarrier.expect(bars.index(Q_FULL + stage), q_desc.block_type.nbytes + STATS)
            tma_load(stats_desc, [row, LSE, m0], bars.index(Q_FULL + stage), lse_s.index(stage))
            tma_load(q_desc, [b, m0, head, 0], bars.index(Q_FULL + stage), q_s.index(stage))
            if bias_desc is not None or mask_desc is not None:
                for w in gl.static_range(2):
                    slot = at % BIAS_STAGES * 2 + w
                    mbarrier.wait(bars.index(BIAS_EMPTY + slot), ((at // BIAS_STAGES) & 1) ^ 1)
                    mbarrier.expect(bars.index(BIAS_FULL + slot), BIAS_BYTES + MASK_BYTES)
                    if bias_desc is not None:
                        at_bias = [b // batch_inner * bias_on[0], b % batch_inner * bias_on[1], head * bias_on[2], m0, n0 + w * HALF]
                        tma_load(bias_desc, at_bias, bars.index(BIAS_FULL + slot), bias_s.index(slot))
                    if mask_desc is not None:
                        at_mask = [b // batch_inner * mask_on[0], b % batch_inner * mask_on[1], head * mask_on[2], m0, n0 + w * HALF]
                        tma_load(mask_desc, at_mask, bars.index(BIAS_FULL + slot), mask_s.index(slot))
            stage = at % O_STAGES
            mbarrier.wait(bars.index(O_EMPTY + stage), ((at // O_STAGES) & 1) ^ 1)
            mbarrier.expect(bars.index(O_FULL + stage), o_desc.block_type.nbytes + STATS)
            tma_load(stats_desc, [row, DELTA, m0], bars.index(O_FULL + stage), delta_s.index(stage))
            tma_load(o_desc, [b, m0, head, 0], bars.index(O_FULL + stage), o_s.index(stage))
        done += steps * group


@gluon.jit
def _add_up(
    dq_desc, lengths, dq_s, bars, batch, heads, group, M, N, lo, hi, tiles_n, tiles, section, snake,
    BM: gl.constexpr, BN: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr, KV_STAGES: gl.constexpr,
    BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr,
):  # fmt: skip
    """The warp that adds what the consumers put into ``dq_s``, half of the columns each, to dq in global memory."""
    DQ_FULL: gl.constexpr = barrier_at("dq_full", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    DQ_EMPTY: gl.constexpr = barrier_at("dq_empty", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    COLUMNS: gl.constexpr = dq_s.shape[4]
    kv_heads = heads // group
    done = 0
    for wave in range(share(tiles, snake)):
        n0, kv_head, b = locate(wave, tiles_n, batch, kv_heads, section, snake, BATCH_FASTEST, BN, LONGEST)
        begin, whole, part, end = visible_blocks(n0, M, visible_keys(lengths, b, N), lo, hi, BM, BN)
        steps = end - begin
        for step in range(steps * group):
            head = kv_head * group + step // steps
            m0 = turned(step, steps, begin, whole, part, n0, BM) * BM
            for w in gl.static_range(2):
                mbarrier.wait(bars.index(DQ_FULL + w), (done + step) & 1)
                tma_add(dq_desc, [b, head, m0, w * COLUMNS], dq_s.index(w))
            tma_store_wait(1)
            mbarrier.arrive(bars.index(DQ_EMPTY))
            tma_store_wait(0)
            mbarrier.arrive(bars.index(DQ_EMPTY + 1))
        done += steps * group


@gluon.jit
def _dq_product(
    number, go, ds_s, k_s, kv, bars, WG: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr,
    KV_STAGES: gl.constexpr,
):  # fmt: skip
    """Start ``ds k`` of block ``number``, for half of the columns. Without ``go`` it is not waited for that ds is there."""
    DS_FULL: gl.constexpr = barrier_at("ds_full", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    BM: gl.constexpr = ds_s.shape[1]
    HALF: gl.constexpr = ds_s.shape[2]
    BD: gl.constexpr = k_s.shape[4]
    PART: gl.constexpr = BD // 2
    slot = number & 1
    mbarrier.wait(bars.index(DS_FULL + slot), (number >> 1) & 1, pred=go)
    nothing = gl.zeros([BM, PART], gl.float32, accumulator(PART))
    k0 = k_s.index(kv * 2).reshape([HALF, BD]).slice(WG * PART, PART, 1)
    k1 = k_s.index(kv * 2 + 1).reshape([HALF, BD]).slice(WG * PART, PART, 1)
    pending = warpgroup_mma(ds_s.index(slot * 2), k0, nothing, use_acc=False, is_async=True)
    return warpgroup_mma(ds_s.index(slot * 2 + 1), k1, pending, is_async=True)


@gluon.jit
def _dq_hand_over(
    dq, number, go, dq_s, bars, WG: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr,
    KV_STAGES: gl.constexpr,
):  # fmt: skip
    """Give what ``_dq_product`` came to to the warp that adds it up, and its ds back. Without ``go`` nobody is told."""
    DS_EMPTY: gl.constexpr = barrier_at("ds_empty", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    DQ_FULL: gl.constexpr = barrier_at("dq_full", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    dq_s.index(WG).reshape(dq.shape).store(dq)
    fence_async_shared()
    mbarrier.arrive(bars.index(DQ_FULL + WG), pred=go)
    mbarrier.arrive(bars.index(DS_EMPTY + (number & 1)), pred=go)


@gluon.jit
def _walk(
    dk, dv, db, k_s, v_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, bars, key_bias, key_mask, slope, stream, cap,
    done, base, first, last, n0, ahead,
    N, lo, hi, scale_log2,
    WG: gl.constexpr, BM: gl.constexpr, HALF: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr,
    KV_STAGES: gl.constexpr,
    IS_MASK: gl.constexpr, KEY_BIASED: gl.constexpr, NEED_DK: gl.constexpr, NEED_DV: gl.constexpr, NEED_DB: gl.constexpr,
    EARLY: gl.constexpr, ALIBI: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Fold the query blocks ``first … last`` (in the order of ``turned``) into (dk, dv, db); the tile's first is number ``done`` of the
    program, the t-th of a head ``base + t``.

    dq of a block is computed in the step of the next one, so that the consumers need not wait for each other's ds: with EARLY under the
    softmax, which takes more registers, else after it. In the first step of a tile there is none yet; what is computed then is nothing that
    anybody reads. The last one is left to the caller.
    """
    Q_FULL: gl.constexpr = barrier_at("q_full", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    Q_EMPTY: gl.constexpr = barrier_at("q_empty", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    O_FULL: gl.constexpr = barrier_at("o_full", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    O_EMPTY: gl.constexpr = barrier_at("o_empty", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    DS_FULL: gl.constexpr = barrier_at("ds_full", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    DS_EMPTY: gl.constexpr = barrier_at("ds_empty", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    DQ_EMPTY: gl.constexpr = barrier_at("dq_empty", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    BIAS_FULL: gl.constexpr = barrier_at("bias_full", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    BIAS_EMPTY: gl.constexpr = barrier_at("bias_empty", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    BD: gl.constexpr = k_s.shape[4]
    BDV: gl.constexpr = v_s.shape[4]
    DT: gl.constexpr = k_s.dtype
    S: gl.constexpr = accumulator(BM)
    COLS: gl.constexpr = gl.SliceLayout(0, S)
    P: gl.constexpr = gl.DotOperandLayout(0, accumulator(BDV), 2)
    DS: gl.constexpr = gl.DotOperandLayout(0, accumulator(BD), 2)
    NEED_DQ: gl.constexpr = dq_s is not None
    NEED_DS: gl.constexpr = NEED_DQ or NEED_DK or NEED_DB
    UNDER: gl.constexpr = 2 if NEED_DQ and EARLY else 0  # products of dq under way beside the softmax
    AFTER: gl.constexpr = 1 if NEED_DK else 0  # products of dk started after those of dv and dq
    nothing = gl.zeros([HALF, BM], gl.float32, S)
    k = k_s.index(kv * 2 + WG).reshape([HALF, BD])
    v = v_s.index(kv * 2 + WG).reshape([HALF, BDV])
    for block in range(first, last):
        at = base + block
        q_stage = at % Q_STAGES
        o_stage = at % O_STAGES
        q = q_s.index(q_stage).reshape([BM, BD])
        o = o_s.index(o_stage).reshape([BM, BDV])
        go = at > done
        mbarrier.wait(bars.index(Q_FULL + q_stage), (at // Q_STAGES) & 1)
        s_pending = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
        lse = gl.expand_dims(lse_s.index(q_stage).reshape([BM]).load(COLS), 0)
        mbarrier.wait(bars.index(O_FULL + o_stage), (at // O_STAGES) & 1)
        if NEED_DS:
            dp_pending = warpgroup_mma(v, o.permute((1, 0)), nothing, use_acc=False, is_async=True)
        if UNDER > 0:
            dq_pending = _dq_product(at - 1, go, ds_s, k_s, kv, bars, WG, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
        m0 = block * BM
        if (ALIBI or stream is not None) and not MASKED:  # nothing else asks where a whole block lies
            m0 = in_turn(block, first, last, n0, BM) * BM
        if stream is not None:  # under the products
            marks = drawn(stream, m0, n0 + WG * HALF, HALF, BM, True)
        s = warpgroup_mma_wait(UNDER + 1 if NEED_DS else 0, [s_pending])
        bias = None
        mask = None
        if bias_s is not None or mask_s is not None:
            mbarrier.wait(bars.index(BIAS_FULL + at % BIAS_STAGES * 2 + WG), (at // BIAS_STAGES) & 1)
        if mask_s is not None:
            mask = mask_s.index(at % BIAS_STAGES * 2 + WG).reshape([BM, HALF]).permute((1, 0)).load(S)
        if bias_s is not None:
            slot = at % BIAS_STAGES * 2 + WG
            bias = bias_s.index(slot).reshape([BM, HALF]).permute((1, 0)).load(S)
        rest = None
        if rest_s is not None:
            rest = gl.expand_dims(rest_s.index(q_stage).reshape([BM]).load(COLS), 0)
        p, weight = probabilities(
            s, bias, mask, key_bias, key_mask, slope, cap, lse, rest, m0, n0 + WG * HALF, ahead, N, lo, hi, scale_log2, HALF, BM, IS_MASK,
            ALIBI, KEY_BIASED, MASKED, DT,
        )  # fmt: skip
        undropped = p
        if stream is not None:
            if NEED_DB and cap is not None:
                undropped = signed(p.to(gl.float32), marks)
            if NEED_DS:
                weight = signed(weight, marks)
            if NEED_DV:
                p = dropped(p, marks)
        if NEED_DV:
            p16 = gl.convert_layout(p, P)
        if NEED_DS:
            delta = gl.expand_dims(delta_s.index(o_stage).reshape([BM]).load(COLS), 0)
            # A wait, even one for what has been waited for, is where a basic block ends: it keeps the assembler from moving the next wait
            # for a product up, before the exponentials that are to run under it.
            if NEED_DQ:
                mbarrier.wait(bars.index(DS_EMPTY + (at & 1)), ((at >> 1) & 1) ^ 1)
            else:
                mbarrier.wait(bars.index(O_FULL + o_stage), (at // O_STAGES) & 1)
            dp = warpgroup_mma_wait(UNDER, [dp_pending])
            ds = of_scores(weight, dp, delta, stream is not None)
            if NEED_DB and cap is not None:  # the bias is added behind the cap
                db += gl.sum(of_scores(undropped.to(gl.float32), dp, delta, stream is not None), 1)
            elif NEED_DB:
                db += gl.sum(ds, 1)
            ds16 = ds.to(DT)
            if NEED_DQ:
                ds_s.index((at & 1) * 2 + WG).permute((1, 0)).store(ds16)
        if NEED_DV:
            dv_pending = warpgroup_mma(p16, o, dv, is_async=True)
        # Before a buffer that was read by plain loads goes back to TMA, and before products read what was stored plainly.
        if NEED_DV and not NEED_DS:  # here, because the assembler of Triton 3.6 (12.8) dies of a wait further down
            dv = warpgroup_mma_wait(0, [dv_pending])
        fence_async_shared()
        if bias_s is not None or mask_s is not None:
            mbarrier.arrive(bars.index(BIAS_EMPTY + at % BIAS_STAGES * 2 + WG))
        if NEED_DQ:
            mbarrier.arrive(bars.index(DS_FULL + (at & 1)))
            if not EARLY:
                dq_pending = _dq_product(at - 1, go, ds_s, k_s, kv, bars, WG, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
        if NEED_DK:
            dk_pending = warpgroup_mma(gl.convert_layout(ds16, DS), q, dk, is_async=True)
        if NEED_DQ:
            LATER: gl.constexpr = AFTER + (1 if EARLY and NEED_DV else 0)  # started after dq's
            mbarrier.wait(bars.index(DQ_EMPTY + WG), ((at - go.to(gl.int32)) & 1) ^ 1)
            dq = warpgroup_mma_wait(LATER, [dq_pending])
            _dq_hand_over(dq, at - 1, go, dq_s, bars, WG, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
        if NEED_DV and NEED_DS:
            dv = warpgroup_mma_wait(AFTER, [dv_pending])
        mbarrier.arrive(bars.index(O_EMPTY + o_stage))
        if NEED_DK:
            dk = warpgroup_mma_wait(0, [dk_pending])
        mbarrier.arrive(bars.index(Q_EMPTY + q_stage))
    return dk, dv, db


@gluon.jit
def _consume(
    dk_desc, dv_desc, dbias, bias, lengths, slopes, q_s, k_s, v_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, bars,
    bias_strides, dbias_strides, slope_strides, cap, dropout, mask, mask_strides, batch, heads, group, batch_inner, M, N, lo, hi, scale,
    tiles_n, tiles, section, snake, WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr,
    BIAS_STAGES: gl.constexpr, KV_STAGES: gl.constexpr,
    BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr, IS_MASK: gl.constexpr, EVEN_N: gl.constexpr, ALIBI: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 keys of every tile of the program."""
    KV_FULL: gl.constexpr = barrier_at("kv_full", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    KV_EMPTY: gl.constexpr = barrier_at("kv_empty", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    DQ_EMPTY: gl.constexpr = barrier_at("dq_empty", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    HALF: gl.constexpr = BN // 2
    BD: gl.constexpr = k_s.shape[4]
    BDV: gl.constexpr = v_s.shape[4]
    DT: gl.constexpr = k_s.dtype
    NEED_DK: gl.constexpr = dk_desc is not None
    NEED_DV: gl.constexpr = dv_desc is not None
    NEED_DB: gl.constexpr = dbias is not None
    KEY_BIASED: gl.constexpr = bias is not None
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BM))
    kv_heads = heads // group
    scale_log2 = scale * LOG2E
    done = 0
    for wave in range(share(tiles, snake)):
        n0, kv_head, b = locate(wave, tiles_n, batch, kv_heads, section, snake, BATCH_FASTEST, BN, LONGEST)
        n_keys = visible_keys(lengths, b, N)
        begin, whole, part, end = visible_blocks(n0, M, n_keys, lo, hi, BM, BN)
        steps = end - begin
        dk = gl.zeros([HALF, BD], gl.float32, accumulator(BD))
        dv = gl.zeros([HALF, BDV], gl.float32, accumulator(BDV))
        j = n0 + WG * HALF + gl.arange(0, HALF, ROWS)
        kv = wave % KV_STAGES
        mbarrier.wait(bars.index(KV_FULL + kv), (wave // KV_STAGES) & 1)
        if lengths is not None:
            # The own half; the other consumer meets it in dq, after it has got ds from here.
            rows = n_keys - (n0 + WG * HALF)
            if (steps > 0) & (rows < HALF) & (n_keys < N):
                clear_hidden(k_s.index(kv * 2 + WG).reshape([HALF, BD]), rows)
                clear_hidden(v_s.index(kv * 2 + WG).reshape([HALF, BDV]), rows)
        for member in range(group):
            head = kv_head * group + member
            slope = slope_of(slopes, slope_strides, b, head)
            stream = None
            if dropout is not None:
                stream = stream_of(dropout, b, head, heads)
            key_bias = gl.zeros([HALF], gl.float32, ROWS)
            if KEY_BIASED:
                row = bias + offset(b // batch_inner, bias_strides[0]) + offset(b % batch_inner, bias_strides[1])
                row += offset(head, bias_strides[2])
                key_bias = gl.load(row + j.to(gl.int64) * bias_strides[4], mask=j < N, other=0).to(gl.float32)
            key_mask = None
            if mask is not None:
                shown = mask + offset(b // batch_inner, mask_strides[0]) + offset(b % batch_inner, mask_strides[1])
                shown += offset(head, mask_strides[2])
                key_mask = gl.load(shown + j.to(gl.int64) * mask_strides[4], mask=j < N, other=0)
            db = gl.zeros([HALF], gl.float32, ROWS)
            base = done + member * steps - begin
            if (hi is not None) or (not EVEN_N):
                dk, dv, db = _walk(
                    dk, dv, db, k_s, v_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, bars, key_bias, key_mask,
                    slope, stream, cap, done, base, begin,
                    whole,
                    n0, N - M, n_keys, lo, hi, scale_log2, WG, BM, HALF, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, IS_MASK, KEY_BIASED,
                    NEED_DK, NEED_DV, NEED_DB, EARLY, ALIBI, True,
                )  # fmt: skip
            dk, dv, db = _walk(
                dk, dv, db, k_s, v_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, bars, key_bias, key_mask, slope,
                stream, cap, done, base, whole,
                part, n0, N - M, n_keys, lo, hi, scale_log2, WG, BM, HALF, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, IS_MASK, KEY_BIASED,
                NEED_DK, NEED_DV, NEED_DB, EARLY, ALIBI, False,
            )  # fmt: skip
            if lo is not None:
                dk, dv, db = _walk(
                    dk, dv, db, k_s, v_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, bars, key_bias, key_mask,
                    slope, stream, cap, done, base, part,
                    end,
                    n0, N - M, n_keys, lo, hi, scale_log2, WG, BM, HALF, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, IS_MASK, KEY_BIASED,
                    NEED_DK, NEED_DV, NEED_DB, EARLY, ALIBI, True,
                )  # fmt: skip
            if NEED_DB:
                target = dbias + offset(b // batch_inner, dbias_strides[0]) + offset(b % batch_inner, dbias_strides[1])
                target += offset(head, dbias_strides[2])
                if dropout is not None:
                    db = db * dropout[2]
                gl.store(target + j.to(gl.int64) * dbias_strides[3], db.to(dbias.dtype.element_ty), mask=j < N)
        done += steps * group
        if dq_s is not None:
            if steps > 0:
                mbarrier.wait(bars.index(DQ_EMPTY + WG), ((done - 1) & 1) ^ 1)
                dq = warpgroup_mma_wait(
                    0, [_dq_product(done - 1, True, ds_s, k_s, kv, bars, WG, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)]
                )
                _dq_hand_over(dq, done - 1, True, dq_s, bars, WG, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
            _meet()  # the other consumer may still be reading these keys for its half of dq
        if dropout is not None:
            dk = dk * dropout[2]
            dv = dv * dropout[2]
        if NEED_DK:
            k_s.index(kv * 2 + WG).reshape([HALF, BD]).store((dk * scale).to(DT))
        if NEED_DV:
            v_s.index(kv * 2 + WG).reshape([HALF, BDV]).store(dv.to(DT))
        fence_async_shared()
        if NEED_DK:
            tma_store(dk_desc, [b, n0 + WG * HALF, kv_head, 0], k_s.index(kv * 2 + WG))
        if NEED_DV:
            tma_store(dv_desc, [b, n0 + WG * HALF, kv_head, 0], v_s.index(kv * 2 + WG))
        tma_store_wait(0)
        mbarrier.arrive(bars.index(KV_EMPTY + kv))


COUNTS = ["batch", "heads", "group", "batch_inner", "M", "N", "lo", "hi", "tiles_n", "tiles", "section", "snake"]


@gluon.jit(do_not_specialize=COUNTS)
def keys_backward(
    q_desc, k_desc, v_desc, o_desc, stats_desc, bias_desc, dk_desc, dv_desc, dq_desc, bias, lengths, slopes, dbias, bias_strides,
    dbias_strides, slope_strides, bias_on, cap, dropout, mask_desc, mask, mask_strides, mask_on,
    batch, heads, group, batch_inner, M, N, lo, hi, scale, tiles_n, tiles, section, snake,
    BM: gl.constexpr, BN: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr, KV_STAGES: gl.constexpr,
    HAS_REST: gl.constexpr, IS_MASK: gl.constexpr, EVEN_N: gl.constexpr, ALIBI: gl.constexpr, EARLY: gl.constexpr,
    BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr,
):  # fmt: skip
    """Tiles of BN = 128 keys of a key head; ``tiles`` of them, ``tiles_n`` a (batch, key head) pair, dealt out as ``locate`` says.

    Descriptors of q, k, v, dout (``o_desc``), dk and dv are over (batch, length, head, dim); that of the table ``stats`` over (batch and
    head, LSE | DELTA | REST, query), written by ``prepare``; that of the float32 dq over (batch, head, query, dim). A bias tile comes by a
    descriptor over its five dims, switched off by ``bias_on`` where it broadcasts; a bias that varies over keys alone as a pointer and
    strides, and its gradient goes to ``dbias`` with strides (outer batch, inner batch, head, key). ``group`` query heads share a key head.
    A mask beside the bias comes in the same two ways. cap: see ``features.squashed``; dropout: see
    ``stream_of``. None: absent, or not wanted.
    """
    DT: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(DT, stacked(Q_STAGES, q_desc.block_shape), q_desc.layout)
    o_s = gl.allocate_shared_memory(DT, stacked(O_STAGES, o_desc.block_shape), o_desc.layout)
    k_s = gl.allocate_shared_memory(DT, stacked(2 * KV_STAGES, k_desc.block_shape), k_desc.layout)
    v_s = gl.allocate_shared_memory(DT, stacked(2 * KV_STAGES, v_desc.block_shape), v_desc.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, stacked(Q_STAGES, stats_desc.block_shape), stats_desc.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, stacked(O_STAGES, stats_desc.block_shape), stats_desc.layout)
    if HAS_REST:
        rest_s = gl.allocate_shared_memory(gl.float32, stacked(Q_STAGES, stats_desc.block_shape), stats_desc.layout)
    else:
        rest_s = None
    if bias_desc is not None:
        bias_s = gl.allocate_shared_memory(bias_desc.dtype, stacked(2 * BIAS_STAGES, bias_desc.block_shape), bias_desc.layout)
    else:
        bias_s = None
    if mask_desc is not None:
        mask_s = gl.allocate_shared_memory(mask_desc.dtype, stacked(2 * BIAS_STAGES, mask_desc.block_shape), mask_desc.layout)
    else:
        mask_s = None
    if dq_desc is not None:
        SWIZZLED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BN // 2], DT)
        ds_s = gl.allocate_shared_memory(DT, [4, BM, BN // 2], SWIZZLED)
        dq_s = gl.allocate_shared_memory(gl.float32, stacked(2, dq_desc.block_shape), dq_desc.layout)
    else:
        ds_s = None
        dq_s = None
    COUNT: gl.constexpr = barrier_at("count", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    KV_EMPTY: gl.constexpr = barrier_at("kv_empty", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    Q_FULL: gl.constexpr = barrier_at("q_full", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    Q_EMPTY: gl.constexpr = barrier_at("q_empty", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    O_FULL: gl.constexpr = barrier_at("o_full", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    O_EMPTY: gl.constexpr = barrier_at("o_empty", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    DQ_FULL: gl.constexpr = barrier_at("dq_full", Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES)
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(COUNT):
        if (n >= KV_EMPTY and n < Q_FULL) or (n >= Q_EMPTY and n < O_FULL) or (n >= O_EMPTY and n < DQ_FULL):
            mbarrier.init(bars.index(n), count=2)  # both consumers read these
        else:
            mbarrier.init(bars.index(n), count=1)
    fence_async_shared()

    # Tuples of arguments are written out: bound to a name, their compile-time constants would become tensors.
    if dq_desc is not None:
        gl.warp_specialize([
            (_consume, (optional(dk_desc), optional(dv_desc), optional(dbias), optional(bias), optional(lengths), optional(slopes), q_s,
                        k_s, v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), optional(ds_s), optional(dq_s), bars, optional(bias_strides),
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(dropout), optional(mask),
                        optional(mask_strides), batch,
                        heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_n, tiles, section, snake, 0, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST,
                        IS_MASK, EVEN_N, ALIBI, EARLY)),
            (_consume, (optional(dk_desc), optional(dv_desc), optional(dbias), optional(bias), optional(lengths), optional(slopes), q_s,
                        k_s, v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), optional(ds_s), optional(dq_s), bars, optional(bias_strides),
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(dropout), optional(mask),
                        optional(mask_strides), batch,
                        heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_n, tiles, section, snake, 1, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST,
                        IS_MASK, EVEN_N, ALIBI, EARLY)),
            (_produce, (q_desc, k_desc, v_desc, o_desc, stats_desc, optional(bias_desc), optional(mask_desc), optional(lengths), q_s, k_s,
                        v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), bars, batch, heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), optional(bias_on), optional(mask_on), tiles_n, tiles, section, snake, BM, BN, Q_STAGES, O_STAGES,
                        BIAS_STAGES, KV_STAGES, BATCH_FASTEST,
                        LONGEST)),
            (_add_up, (dq_desc, optional(lengths), dq_s, bars, batch, heads, group, M, N, optional(lo), optional(hi), tiles_n, tiles,
                       section, snake, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST)),
        ], [4, 1, 1], [240, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (optional(dk_desc), optional(dv_desc), optional(dbias), optional(bias), optional(lengths), optional(slopes), q_s,
                        k_s, v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), optional(ds_s), optional(dq_s), bars, optional(bias_strides),
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(dropout), optional(mask),
                        optional(mask_strides), batch,
                        heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_n, tiles, section, snake, 0, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST,
                        IS_MASK, EVEN_N, ALIBI, EARLY)),
            (_consume, (optional(dk_desc), optional(dv_desc), optional(dbias), optional(bias), optional(lengths), optional(slopes), q_s,
                        k_s, v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), optional(ds_s), optional(dq_s), bars, optional(bias_strides),
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(dropout), optional(mask),
                        optional(mask_strides), batch,
                        heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_n, tiles, section, snake, 1, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST,
                        IS_MASK, EVEN_N, ALIBI, EARLY)),
            (_produce, (q_desc, k_desc, v_desc, o_desc, stats_desc, optional(bias_desc), optional(mask_desc), optional(lengths), q_s, k_s,
                        v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), bars, batch, heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), optional(bias_on), optional(mask_on), tiles_n, tiles, section, snake, BM, BN, Q_STAGES, O_STAGES,
                        BIAS_STAGES, KV_STAGES, BATCH_FASTEST,
                        LONGEST)),
        ], [4, 1], [240, 24])  # fmt: skip
