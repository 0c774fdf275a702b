"""One block of queries in the backward kernel that owns keys (``backward.py``): what a consumer makes of it for dk, dv and dq."""

from .columns import in_turn, probabilities
from .compat import fence_async_shared, gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from .dropout import drawn, dropped, of_scores, signed
from .grid import accumulator, meet, signal
from .keys_dq import add_to_sum, dq_hand_over, dq_product
from .keys_loads import BIAS_FREE, BIAS_FULL, DQ_EMPTY, DS_EMPTY, DS_HERE, O_FREE, O_FULL, Q_FREE, Q_FULL


@gluon.constexpr_function
def less_delta(dropped, apart):
    """Whether dp's product starts from -delta: where registers are short, as they are not beside a third warpgroup, whose consumers lose
    more by it than they save. Under dropout delta is not subtracted from dp itself.
    """
    return not dropped and not apart


@gluon.jit
def score(k, q_s, lse_s, bars, at, BM: gl.constexpr):
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
def weigh(v, o_s, delta_s, bars, at, nothing, BM: gl.constexpr, NEED_DS: gl.constexpr, LESS_DELTA: gl.constexpr):
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
def fold(
    s_pending, dp_pending, lse, dk, dv, db, place, k, v, k_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum,
    bars, key_bias, key_mask, slope, stream, cap, done, base, sum_base, block, start, stop, n0, ahead, N, lo, hi, scale_log2,
    WG: gl.constexpr, BM: gl.constexpr, HALF: gl.constexpr, BIAS_STAGES: gl.constexpr,
    IS_MASK: gl.constexpr, KEY_BIASED: gl.constexpr, NEED_DK: gl.constexpr, NEED_DV: gl.constexpr, NEED_DB: gl.constexpr,
    APART: gl.constexpr, ALIBI: gl.constexpr, MASKED: gl.constexpr, MORE: gl.constexpr, MILD: gl.constexpr, ROW: gl.constexpr,
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
    ALONE: gl.constexpr = NEED_DV and not NEED_DK and ds_s is None  # no other product follows
    AFTER: gl.constexpr = 1 if NEED_DK else 0  # products of dk started after those of dv and dq
    NEXT: gl.constexpr = 0 if not MORE else 2 if APART and NEED_DS else 1  # products of the next block
    SOON: gl.constexpr = APART and NEED_DV and bias_s is None  # dv's product before ds is there
    LESS_DELTA: gl.constexpr = less_delta(stream is not None, APART)
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
        ALIBI, KEY_BIASED, MASKED, MILD, DT,
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
    if ALONE:  # here, because the assembler of Triton 3.6 (12.8) dies of a wait further down
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
        s_pending, lse = score(k, q_s, lse_s, bars, at + 1, BM)
        if APART:
            dp_pending = weigh(v, o_s, delta_s, bars, at + 1, s_pending, BM, NEED_DS, LESS_DELTA)
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
    if NEED_DV and not ALONE:
        dv = warpgroup_mma_wait(AFTER + NEXT, [dv_pending])
    signal(O_FREE + o_stage, 288)
    if NEED_DK:
        dk = warpgroup_mma_wait(NEXT, [dk_pending])
    signal(Q_FREE + q_stage, 288)
    if MORE and not APART:
        dp_pending = weigh(v, o_s, delta_s, bars, at + 1, s_pending, BM, NEED_DS, LESS_DELTA)
    return s_pending, dp_pending, lse, dk, dv, db, place
