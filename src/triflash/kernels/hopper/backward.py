"""The backward kernel for Hopper that owns keys: dk, dv and, added up in global memory, dq.

A program owns tiles of 128 keys of one key head, 64 for each of its two consumer warpgroups, and walks the queries that see them. With p
and delta as in ``kernels/triton/backward.py``, a consumer computes its part of sᵀ and dpᵀ, keeps pᵀ and dsᵀ in registers as operands of

    dv += pᵀ dout;   dk += scale dsᵀ q

and puts dsᵀ into shared memory, where the two parts meet as the operand of ``dq += ds k``; each consumer computes half of its columns
(FlashAttention-3, Shah et al. 2024), or a third warpgroup all (APART). That sum runs over all key tiles, so it is formed in memory, by TMA
or straight from registers, float32 numbers in no fixed order; where results must be the same bits on every run, ``dq.py`` computes dq and
this kernel runs without.

A producer warp loads q, dout, lse, delta and bias tiles as far ahead as there are buffers (``keys_loads.py``); dq's product and sum are in
``keys_dq.py``. Barriers as in ``forward.py``, but for buffers that consumers give back, which are told of at barriers of the processor.
"""

from ..triton.prims import LOG2E, offset
from .columns import in_turn, probabilities, visible_blocks
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
from .dropout import drawn, dropped, of_scores, signed, stream_of
from .features import clear_hidden, slope_of, visible_keys
from .grid import accumulator, barriers, locate, meet, share, signal, stacked
from .keys_dq import add_to_sum, add_up, add_up_apart, dq_hand_over, dq_product, first_block
from .keys_loads import (
    BIAS_FREE,
    BIAS_FULL,
    DQ_EMPTY,
    DS_EMPTY,
    DS_HERE,
    KV_EMPTY,
    KV_FULL,
    O_FREE,
    O_FULL,
    Q_FREE,
    Q_FULL,
    TOGETHER,
    produce,
)


@gluon.jit
def _score(k, q_s, lse_s, bars, at, BM: gl.constexpr):
    """Start ``sᵀ = k qᵀ`` of block ``at`` when its queries are there: ``(product, lse as a row)``."""
    S: gl.constexpr = accumulator(BM)
    STAGES: gl.constexpr = q_s.shape[0]
    KEYS: gl.constexpr = k.shape[0]
    BD: gl.constexpr = k.shape[1]
    stage = at % STAGES
    mbarrier.wait(bars[Q_FULL].index(stage), (at // STAGES) & 1)
    q = q_s.index(stage).reshape([BM, BD]).permute((1, 0))
    pending = warpgroup_mma(k, q, gl.zeros([KEYS, BM], gl.float32, S), use_acc=False, is_async=True)
    return pending, gl.expand_dims(lse_s.index(stage).reshape([BM]).load(gl.SliceLayout(0, S)), 0)


# Each number for either of a thread's rows by an instruction of its own: of one that is used twice the compiler makes a copy behind the
# fence of the product, and then ptxas lets the product before it end first.
_NEGATED = gl.constexpr("neg.f32 $0, $4; neg.f32 $1, $5; xor.b32 $2, $6, 0x80000000; xor.b32 $3, $7, 0x80000000;")


@gluon.jit
def _weigh(v, o_s, delta_s, bars, at, nothing, BM: gl.constexpr, NEED_DS: gl.constexpr, LESS_DELTA: gl.constexpr):
    """Wait for dout of block ``at``, and start ``dpᵀ = v doutᵀ``, with LESS_DELTA ``v doutᵀ - delta``; if that is not needed, return
    ``nothing``.
    """
    S: gl.constexpr = accumulator(BM)
    STAGES: gl.constexpr = o_s.shape[0]
    KEYS: gl.constexpr = v.shape[0]
    BDV: gl.constexpr = v.shape[1]
    stage = at % STAGES
    mbarrier.wait(bars[O_FULL].index(stage), (at // STAGES) & 1)
    if NEED_DS:
        o = o_s.index(stage).reshape([BM, BDV]).permute((1, 0))
        start = gl.zeros([KEYS, BM], gl.float32, S)
        if LESS_DELTA:
            delta = delta_s.index(stage).reshape([BM]).load(gl.SliceLayout(0, S))
            delta, start = gl.broadcast(gl.expand_dims(delta, 0), start)
            start = gl.inline_asm_elementwise(_NEGATED, "=f,=f,=f,=f,f,f,f,f", [delta], gl.float32, False, 4)
        return warpgroup_mma(v, o, start, use_acc=LESS_DELTA, is_async=True)
    else:
        return nothing


@gluon.jit
def _tell_of_ds(at, bias_slot, TILES: gl.constexpr):
    """Where dq is computed apart: ds of block ``at`` is there, and its tiles of a bias and a mask have been read."""
    fence_async_shared()
    signal(DS_HERE + (at & 1), 384)
    if TILES:
        signal(BIAS_FREE + bias_slot, 160)


@gluon.jit
def _block(
    s_pending, dp_pending, lse, dk, dv, db, place, k, v, k_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum,
    bars, key_bias, key_mask, slope, stream, cap, done, base, sum_base, block, start, stop, n0, ahead, N, lo, hi, scale_log2,
    WG: gl.constexpr, BM: gl.constexpr, HALF: gl.constexpr, BIAS_STAGES: gl.constexpr,
    IS_MASK: gl.constexpr, KEY_BIASED: gl.constexpr, NEED_DK: gl.constexpr, NEED_DV: gl.constexpr, NEED_DB: gl.constexpr,
    APART: gl.constexpr, ALIBI: gl.constexpr, MASKED: gl.constexpr, MORE: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """Fold one query block, whose s and dp are under way, into (dk, dv, db). MORE: start those of the next, s as soon as the last product
    of this one has been. place: where in the sum the block before lies, if dq is added to it straight from registers.
    """
    BD: gl.constexpr = q_s.shape[4]
    BDV: gl.constexpr = o_s.shape[4]
    DT: gl.constexpr = q_s.dtype
    S: gl.constexpr = accumulator(BM)
    COLS: gl.constexpr = gl.SliceLayout(0, S)
    P: gl.constexpr = gl.DotOperandLayout(0, accumulator(BDV), 2)
    DS: gl.constexpr = gl.DotOperandLayout(0, accumulator(BD), 2)
    Q_STAGES: gl.constexpr = q_s.shape[0]
    O_STAGES: gl.constexpr = o_s.shape[0]
    NEED_DQ: gl.constexpr = ds_s is not None and not APART
    DIRECT: gl.constexpr = dq_sum is not None
    NEED_DS: gl.constexpr = ds_s is not None or NEED_DK or NEED_DB
    AFTER: gl.constexpr = 1 if NEED_DK else 0  # products of dk started after those of dv and dq
    NEXT: gl.constexpr = 0 if not MORE else 2 if APART and NEED_DS else 1  # products of the next block
    SOON: gl.constexpr = APART and NEED_DV and bias_s is None  # dv's product before ds is there
    LESS_DELTA: gl.constexpr = stream is None and not APART  # registers for it are short there; else it costs more than it saves
    FENCED: gl.constexpr = SOON or BIAS_STAGES == 1  # before the next block, which is not loaded whole while a single bias buffer is in use
    at = base + block
    q_stage = at % Q_STAGES
    o_stage = at % O_STAGES
    bias_slot = at % BIAS_STAGES * 2 + WG
    go = at > done
    m0 = block * BM
    if (ALIBI or stream is not None or DIRECT) and not MASKED:  # nothing else asks where a whole block lies
        m0 = in_turn(block, start, stop, n0, BM) * BM
    if stream is not None:  # under the products
        marks = drawn(stream, m0, n0 + WG * HALF, HALF, BM, True)
    s = warpgroup_mma_wait(1 if NEED_DS else 0, [s_pending])
    bias = None
    mask = None
    if bias_s is not None or mask_s is not None:
        mbarrier.wait(bars[BIAS_FULL].index(bias_slot), (at // BIAS_STAGES) & 1)
    if mask_s is not None:
        mask = mask_s.index(bias_slot).reshape([BM, HALF]).permute((1, 0)).load(S)
    if bias_s is not None:
        bias = bias_s.index(bias_slot).reshape([BM, HALF]).permute((1, 0)).load(S)
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
    if SOON:
        dv_pending = warpgroup_mma(p16, o_s.index(o_stage).reshape([BM, BDV]), dv, is_async=True)
    if NEED_DS:
        delta = None
        if not LESS_DELTA:
            delta = gl.expand_dims(delta_s.index(o_stage).reshape([BM]).load(COLS), 0)
        # A wait is where a basic block ends: it keeps the assembler from moving the next wait for a product up, before the exponentials
        # that are to run under it. Where ds needs none it is one for a phase that is over: of a barrier that nothing else touches, for a
        # second look at any other makes the partition's warps meet. DIRECT lets them: then they need not before ds is stored.
        if APART:
            mbarrier.wait(bars[DS_EMPTY].index(at & 1), ((at >> 1) & 1) ^ 1)
        elif DIRECT:
            mbarrier.wait(bars[O_FULL].index(o_stage), (at // O_STAGES) & 1)
        else:
            mbarrier.wait(bars[DS_EMPTY].index(0), 1)
        dp = warpgroup_mma_wait(1 if SOON else 0, [dp_pending])
        ds = of_scores(weight, dp, delta, stream is not None)
        if NEED_DB and cap is not None:  # the bias is added behind the cap
            db += gl.sum(of_scores(undropped.to(gl.float32), dp, delta, stream is not None), 1)
        elif NEED_DB:
            db += gl.sum(ds, 1)
        ds16 = ds.to(DT)
        if NEED_DQ:
            if go:
                meet(DS_HERE + 8 * WG + ((at - 1) & 1), 256)
        if ds_s is not None:
            ds_s.index((at & 1) * 2 + WG).permute((1, 0)).store(ds16)
    if NEED_DV and not SOON:
        dv_pending = warpgroup_mma(p16, o_s.index(o_stage).reshape([BM, BDV]), dv, is_async=True)
    if NEED_DV and not NEED_DS:  # here, because the assembler of Triton 3.6 (12.8) dies of a wait further down
        dv = warpgroup_mma_wait(0, [dv_pending])
    # The fence stands before a buffer that was read by plain loads goes back to TMA, and before others are told of ds. It waits for ds to
    # be stored: where no product here needs that, behind all that can be started.
    if not APART:
        fence_async_shared()
        if bias_s is not None or mask_s is not None:
            signal(BIAS_FREE + bias_slot, 160)
        if NEED_DQ:
            dq_pending = dq_product(at - 1, ds_s, k_s, kv, WG)
    if NEED_DK:
        dk_pending = warpgroup_mma(gl.convert_layout(ds16, DS), q_s.index(q_stage).reshape([BM, BD]), dk, is_async=True)
    if APART and FENCED:
        _tell_of_ds(at, bias_slot, bias_s is not None or mask_s is not None)
    if MORE:
        s_pending, lse = _score(k, q_s, lse_s, bars, at + 1, BM)
        if APART:
            dp_pending = _weigh(v, o_s, delta_s, bars, at + 1, s_pending, BM, NEED_DS, LESS_DELTA)
    if APART and not FENCED:
        _tell_of_ds(at, bias_slot, bias_s is not None or mask_s is not None)
    if NEED_DQ:
        if not DIRECT:
            mbarrier.wait(bars[DQ_EMPTY].index(WG), ((at - go.to(gl.int32)) & 1) ^ 1)
        dq = warpgroup_mma_wait(AFTER + NEXT, [dq_pending])
        signal(DS_HERE + 8 * (1 - WG) + (at & 1), 256)
        if DIRECT:
            # What the assembler makes of a branch is 2 % faster than with predicates, but 3 % slower where a band takes registers.
            if lo is None and hi is None:
                if go:
                    add_to_sum(dq_sum, place, dq, None, WG * (BD // 2), ROW)
            else:
                add_to_sum(dq_sum, place, dq, go, WG * (BD // 2), ROW)
            place = sum_base + m0 // BM
        else:
            dq_hand_over(dq, go, dq_s, WG)
    if NEED_DV and NEED_DS:
        dv = warpgroup_mma_wait(AFTER + NEXT, [dv_pending])
    signal(O_FREE + o_stage, 288)
    if NEED_DK:
        dk = warpgroup_mma_wait(NEXT, [dk_pending])
    signal(Q_FREE + q_stage, 288)
    if MORE and not APART:
        dp_pending = _weigh(v, o_s, delta_s, bars, at + 1, s_pending, BM, NEED_DS, LESS_DELTA)
    return s_pending, dp_pending, lse, dk, dv, db, place


@gluon.jit
def _walk(
    dk, dv, db, place, k_s, v_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum, bars, key_bias, key_mask, slope,
    stream, cap, done, base, sum_base, first, last, start, stop, n0, ahead, N, lo, hi, scale_log2,
    WG: gl.constexpr, BM: gl.constexpr, HALF: gl.constexpr, BIAS_STAGES: gl.constexpr,
    IS_MASK: gl.constexpr, KEY_BIASED: gl.constexpr, NEED_DK: gl.constexpr, NEED_DV: gl.constexpr, NEED_DB: gl.constexpr,
    APART: gl.constexpr, ALIBI: gl.constexpr, MASKED: gl.constexpr, UNROLL: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """Fold the query blocks ``first … last`` (of ``start … stop``, in the order of ``turned``), a multiple of UNROLL, into (dk, dv, db).
    The tile's first is number ``done`` of the program, the t-th of a head ``base + t``.

    Unless it is computed APART, dq of a block is computed in the step of the next one, so that the consumers need not wait for each other's
    ds. In the first step of a tile there is none yet; what is computed then is nothing that anybody reads. The last one is left to the
    caller.

    Of UNROLL blocks, the scores of one are started before the products of the one before are waited for, so that the matrix units do not
    run dry. From one step of the loop to the next that cannot be: ptxas would make every product wait for the one before.
    """
    BD: gl.constexpr = k_s.shape[4]
    BDV: gl.constexpr = v_s.shape[4]
    NEED_DS: gl.constexpr = ds_s is not None or NEED_DK or NEED_DB
    LESS_DELTA: gl.constexpr = stream is None and not APART
    k = k_s.index(kv * 2 + WG).reshape([HALF, BD])  # in registers they would save a fifth of what is read, but see docs/tuning.md
    v = v_s.index(kv * 2 + WG).reshape([HALF, BDV])
    for group in range(first, last, UNROLL):
        s, lse = _score(k, q_s, lse_s, bars, base + group, BM)
        dp = _weigh(v, o_s, delta_s, bars, base + group, s, BM, NEED_DS, LESS_DELTA)
        for u in gl.static_range(UNROLL):
            s, dp, lse, dk, dv, db, place = _block(
                s, dp, lse, dk, dv, db, place, k, v, k_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum, bars,
                key_bias, key_mask, slope, stream, cap, done, base, sum_base, group + u, start, stop, n0, ahead, N, lo, hi, scale_log2, WG,
                BM, HALF, BIAS_STAGES, IS_MASK, KEY_BIASED, NEED_DK, NEED_DV, NEED_DB, APART, ALIBI, MASKED, u + 1 < UNROLL, ROW,
            )  # fmt: skip
    return dk, dv, db, place


@gluon.jit
def _walk_all(
    dk, dv, db, place, k_s, v_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum, bars, key_bias, key_mask, slope,
    stream, cap, done, base, sum_base, first, last, n0, ahead, N, lo, hi, scale_log2,
    WG: gl.constexpr, BM: gl.constexpr, HALF: gl.constexpr, BIAS_STAGES: gl.constexpr,
    IS_MASK: gl.constexpr, KEY_BIASED: gl.constexpr, NEED_DK: gl.constexpr, NEED_DV: gl.constexpr, NEED_DB: gl.constexpr,
    APART: gl.constexpr, ALIBI: gl.constexpr, MASKED: gl.constexpr, UNROLL: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """``_walk``, UNROLL blocks a step as long as there are so many, and then one by one."""
    alone = first
    if UNROLL > 1:
        alone = first + max(last - first, 0) // UNROLL * UNROLL
        dk, dv, db, place = _walk(
            dk, dv, db, place, k_s, v_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum, bars, key_bias, key_mask,
            slope, stream, cap, done, base, sum_base, first, alone, first, last, n0, ahead, N, lo, hi, scale_log2, WG, BM, HALF,
            BIAS_STAGES, IS_MASK, KEY_BIASED, NEED_DK, NEED_DV, NEED_DB, APART, ALIBI, MASKED, UNROLL, ROW,
        )  # fmt: skip
    return _walk(
        dk, dv, db, place, k_s, v_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum, bars, key_bias, key_mask,
        slope, stream, cap, done, base, sum_base, alone, last, first, last, n0, ahead, N, lo, hi, scale_log2, WG, BM, HALF, BIAS_STAGES,
        IS_MASK, KEY_BIASED, NEED_DK, NEED_DV, NEED_DB, APART, ALIBI, MASKED, 1, ROW,
    )  # fmt: skip


@gluon.jit
def _consume(
    dk_desc, dv_desc, dbias, bias, lengths, slopes, q_s, k_s, v_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum, bars,
    bias_strides, dbias_strides, slope_strides, cap, dropout, mask, mask_strides, batch, heads, group, batch_inner, M, N, lo, hi, scale,
    tiles_n, tiles, section, snake, WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr,
    BIAS_STAGES: gl.constexpr, KV_STAGES: gl.constexpr,
    BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr, IS_MASK: gl.constexpr, EVEN_N: gl.constexpr, ALIBI: gl.constexpr,
    APART: gl.constexpr, UNROLL: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 keys of every tile of the program."""
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
        mbarrier.wait(bars[KV_FULL].index(kv), (wave // KV_STAGES) & 1)
        if lengths is not None:
            # The own half; the other consumer meets it in dq, after it has got ds from here.
            rows = n_keys - (n0 + WG * HALF)
            if (steps > 0) & (rows < HALF) & (n_keys < N):
                clear_hidden(k_s.index(kv * 2 + WG).reshape([HALF, BD]), rows)
                clear_hidden(v_s.index(kv * 2 + WG).reshape([HALF, BDV]), rows)
        place = 0
        for member in range(group):
            head = kv_head * group + member
            sum_base = 0
            if dq_sum is not None:
                sum_base = first_block(b * heads + head, M, BM)
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
                dk, dv, db, place = _walk_all(
                    dk, dv, db, place, k_s, v_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum, bars, key_bias,
                    key_mask, slope, stream, cap, done, base, sum_base, begin,
                    whole,
                    n0, N - M, n_keys, lo, hi, scale_log2, WG, BM, HALF, BIAS_STAGES, IS_MASK, KEY_BIASED,
                    NEED_DK, NEED_DV, NEED_DB, APART, ALIBI, True, 1, ROW,
                )  # fmt: skip
            dk, dv, db, place = _walk_all(
                dk, dv, db, place, k_s, v_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum, bars, key_bias,
                key_mask, slope, stream, cap, done, base, sum_base, whole,
                part, n0, N - M, n_keys, lo, hi, scale_log2, WG, BM, HALF, BIAS_STAGES, IS_MASK, KEY_BIASED,
                NEED_DK, NEED_DV, NEED_DB, APART, ALIBI, False, UNROLL, ROW,
            )  # fmt: skip
            if lo is not None:
                dk, dv, db, place = _walk_all(
                    dk, dv, db, place, k_s, v_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum, bars, key_bias,
                    key_mask, slope, stream, cap, done, base, sum_base, part,
                    end,
                    n0, N - M, n_keys, lo, hi, scale_log2, WG, BM, HALF, BIAS_STAGES, IS_MASK, KEY_BIASED,
                    NEED_DK, NEED_DV, NEED_DB, APART, ALIBI, True, 1, ROW,
                )  # fmt: skip
            if NEED_DB:
                target = dbias + offset(b // batch_inner, dbias_strides[0]) + offset(b % batch_inner, dbias_strides[1])
                target += offset(head, dbias_strides[2])
                if dropout is not None:
                    db = db * dropout[2]
                gl.store(target + j.to(gl.int64) * dbias_strides[3], db.to(dbias.dtype.element_ty), mask=j < N)
        done += steps * group
        if APART:
            if steps > 0:  # these keys are still read for dq
                mbarrier.wait(bars[DS_EMPTY].index((done - 1) & 1), ((done - 1) >> 1) & 1)
        elif ds_s is not None:
            if steps > 0:
                if dq_sum is None:
                    mbarrier.wait(bars[DQ_EMPTY].index(WG), ((done - 1) & 1) ^ 1)
                meet(DS_HERE + 8 * WG + ((done - 1) & 1), 256)
                dq = warpgroup_mma_wait(0, [dq_product(done - 1, ds_s, k_s, kv, WG)])
                if dq_sum is None:
                    dq_hand_over(dq, True, dq_s, WG)
                else:
                    add_to_sum(dq_sum, place, dq, None, WG * (BD // 2), ROW)
            # The other consumer may still be reading these keys for its half of dq.
            mbarrier.arrive(bars[TOGETHER].index(0))
            mbarrier.wait(bars[TOGETHER].index(0), wave & 1)
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
        mbarrier.arrive(bars[KV_EMPTY].index(kv))


COUNTS = ["batch", "heads", "group", "batch_inner", "M", "N", "lo", "hi", "tiles_n", "tiles", "section", "snake"]


@gluon.jit(do_not_specialize=COUNTS)
def keys_backward(
    q_desc, k_desc, v_desc, o_desc, stats_desc, bias_desc, dk_desc, dv_desc, dq_desc, dq_sum, bias, lengths, slopes, dbias,
    bias_strides, dbias_strides, slope_strides, bias_on, cap, dropout, mask_desc, mask, mask_strides, mask_on,
    batch, heads, group, batch_inner, M, N, lo, hi, scale, tiles_n, tiles, section, snake,
    BM: gl.constexpr, BN: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr, KV_STAGES: gl.constexpr,
    HAS_REST: gl.constexpr, IS_MASK: gl.constexpr, EVEN_N: gl.constexpr, ALIBI: gl.constexpr, APART: gl.constexpr, UNROLL: gl.constexpr,
    ROW: gl.constexpr, BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr,
):  # fmt: skip
    """Tiles of BN = 128 keys of a key head; ``tiles`` of them, ``tiles_n`` a (batch, key head) pair, dealt out as ``locate`` says.

    Descriptors of q, k, v, dout (``o_desc``), dk and dv are over (batch, length, head, dim); that of the table ``stats`` over (batch and
    head, LSE | DELTA | REST, query), written by ``prepare``. The float32 sum of dq is a descriptor over (batch, head, query, dim) or, to be
    added to straight from registers, a pointer dq_sum, with rows of ROW columns (``keys_dq.py``). A bias tile comes by a
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
    if dq_desc is not None or dq_sum is not None:
        SWIZZLED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BN // 2], DT)
        ds_s = gl.allocate_shared_memory(DT, [4, BM, BN // 2], SWIZZLED)
    else:
        ds_s = None
    if dq_desc is not None:
        dq_s = gl.allocate_shared_memory(gl.float32, stacked(4 if APART else 2, dq_desc.block_shape), dq_desc.layout)
    else:
        dq_s = None
    kv_full = barriers(KV_STAGES, 1)
    kv_empty = barriers(KV_STAGES, 2)
    q_full = barriers(Q_STAGES, 1)
    o_full = barriers(O_STAGES, 1)
    bias_full = barriers(2 * BIAS_STAGES, 1)
    ds_empty = barriers(2, 1)
    dq_empty = barriers(2, 1)
    together = barriers(1, 2)
    bars = (kv_full, kv_empty, q_full, o_full, bias_full, ds_empty, dq_empty, together)
    fence_async_shared()

    # Tuples of arguments are written out: bound to a name, their compile-time constants would become tensors.
    if APART:
        gl.warp_specialize([
            (_consume, (optional(dk_desc), optional(dv_desc), optional(dbias), optional(bias), optional(lengths), optional(slopes), q_s,
                        k_s, v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), optional(ds_s), optional(dq_s), optional(dq_sum),
                        bars, optional(bias_strides),
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(dropout), optional(mask),
                        optional(mask_strides), batch,
                        heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_n, tiles, section, snake, 0, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST,
                        IS_MASK, EVEN_N, ALIBI, APART, UNROLL, ROW)),
            (_consume, (optional(dk_desc), optional(dv_desc), optional(dbias), optional(bias), optional(lengths), optional(slopes), q_s,
                        k_s, v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), optional(ds_s), optional(dq_s), optional(dq_sum),
                        bars, optional(bias_strides),
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(dropout), optional(mask),
                        optional(mask_strides), batch,
                        heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_n, tiles, section, snake, 1, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST,
                        IS_MASK, EVEN_N, ALIBI, APART, UNROLL, ROW)),
            (add_up_apart, (dq_desc, optional(lengths), k_s, ds_s, dq_s, bars, batch, heads, group, M, N, optional(lo), optional(hi),
                             tiles_n, tiles, section, snake, BM, BN, KV_STAGES, BATCH_FASTEST, LONGEST)),
            (produce, (q_desc, k_desc, v_desc, o_desc, stats_desc, optional(bias_desc), optional(mask_desc), optional(lengths), q_s, k_s,
                        v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), bars, batch, heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), optional(bias_on), optional(mask_on), tiles_n, tiles, section, snake, BM, BN, Q_STAGES, O_STAGES,
                        BIAS_STAGES, KV_STAGES, BATCH_FASTEST,
                        LONGEST)),
        ], [4, 4, 1], [208, 72, 24])  # fmt: skip
    elif dq_desc is not None:
        gl.warp_specialize([
            (_consume, (optional(dk_desc), optional(dv_desc), optional(dbias), optional(bias), optional(lengths), optional(slopes), q_s,
                        k_s, v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), optional(ds_s), optional(dq_s), optional(dq_sum),
                        bars, optional(bias_strides),
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(dropout), optional(mask),
                        optional(mask_strides), batch,
                        heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_n, tiles, section, snake, 0, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST,
                        IS_MASK, EVEN_N, ALIBI, APART, UNROLL, ROW)),
            (_consume, (optional(dk_desc), optional(dv_desc), optional(dbias), optional(bias), optional(lengths), optional(slopes), q_s,
                        k_s, v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), optional(ds_s), optional(dq_s), optional(dq_sum),
                        bars, optional(bias_strides),
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(dropout), optional(mask),
                        optional(mask_strides), batch,
                        heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_n, tiles, section, snake, 1, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST,
                        IS_MASK, EVEN_N, ALIBI, APART, UNROLL, ROW)),
            (produce, (q_desc, k_desc, v_desc, o_desc, stats_desc, optional(bias_desc), optional(mask_desc), optional(lengths), q_s, k_s,
                        v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), bars, batch, heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), optional(bias_on), optional(mask_on), tiles_n, tiles, section, snake, BM, BN, Q_STAGES, O_STAGES,
                        BIAS_STAGES, KV_STAGES, BATCH_FASTEST,
                        LONGEST)),
            (add_up, (dq_desc, optional(lengths), dq_s, bars, batch, heads, group, M, N, optional(lo), optional(hi), tiles_n, tiles,
                       section, snake, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST)),
        ], [4, 1, 1], [240, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (optional(dk_desc), optional(dv_desc), optional(dbias), optional(bias), optional(lengths), optional(slopes), q_s,
                        k_s, v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), optional(ds_s), optional(dq_s), optional(dq_sum),
                        bars, optional(bias_strides),
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(dropout), optional(mask),
                        optional(mask_strides), batch,
                        heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_n, tiles, section, snake, 0, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST,
                        IS_MASK, EVEN_N, ALIBI, APART, UNROLL, ROW)),
            (_consume, (optional(dk_desc), optional(dv_desc), optional(dbias), optional(bias), optional(lengths), optional(slopes), q_s,
                        k_s, v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), optional(ds_s), optional(dq_s), optional(dq_sum),
                        bars, optional(bias_strides),
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(dropout), optional(mask),
                        optional(mask_strides), batch,
                        heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_n, tiles, section, snake, 1, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST,
                        IS_MASK, EVEN_N, ALIBI, APART, UNROLL, ROW)),
            (produce, (q_desc, k_desc, v_desc, o_desc, stats_desc, optional(bias_desc), optional(mask_desc), optional(lengths), q_s, k_s,
                        v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), bars, batch, heads, group, batch_inner, M, N, optional(lo),
                        optional(hi), optional(bias_on), optional(mask_on), tiles_n, tiles, section, snake, BM, BN, Q_STAGES, O_STAGES,
                        BIAS_STAGES, KV_STAGES, BATCH_FASTEST,
                        LONGEST)),
        ], [4, 1], [240, 24])  # fmt: skip
