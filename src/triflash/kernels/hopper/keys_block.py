"""One block of queries in the backward kernel that owns keys (``backward.py``): what a consumer makes of it for dk, dv and dq."""

from .columns import in_turn, probabilities
from .compat import fence_async_shared, gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from .dropout import drawn, dropped, of_scores, signed
from .keys_dq import add_to_sum, dq_hand_over, dq_product
from .keys_loads import BIAS_FREE, DS_HERE, O_FREE, Q_FREE
from .layouts import accumulator
from .rings import meet, signal


@gluon.constexpr_function
def less_delta(dropped, apart):
    """Whether dp's product starts from -delta: where registers are short, as they are not beside a third warpgroup, whose consumers lose
    more by it than they save. Under dropout delta is not subtracted from dp itself.
    """
    return not dropped and not apart


@gluon.jit
def score(p, span, at):
    """Start ``sᵀ = k qᵀ`` of block ``at`` when its queries are there: ``(product, lse as a row)``."""
    BM: gl.constexpr = p.C.block_m
    S: gl.constexpr = accumulator(BM)
    STAGES: gl.constexpr = p.C.q_stages
    KEYS: gl.constexpr = span.k.shape[0]
    BD: gl.constexpr = span.k.shape[1]
    stage = at % STAGES
    mbarrier.wait(p.q_full.index(stage), (at // STAGES) & 1)
    q = p.q_s.index(stage).reshape([BM, BD]).permute((1, 0))
    pending = warpgroup_mma(span.k, q, gl.zeros([KEYS, BM], gl.float32, S), use_acc=False, is_async=True)
    return pending, gl.expand_dims(p.lse_s.index(stage).reshape([BM]).load(gl.SliceLayout(0, S)), 0)


# Each number for either of a thread's rows by an instruction of its own: of one that is used twice the compiler makes a copy behind the
# fence of the product, and then ptxas lets the product before it end first.
_NEGATED = gl.constexpr("neg.f32 $0, $4; neg.f32 $1, $5; xor.b32 $2, $6, 0x80000000; xor.b32 $3, $7, 0x80000000;")


@gluon.jit
def weigh(p, t, span, at, nothing):
    """Wait for dout of block ``at``, and start ``dpᵀ = v doutᵀ``, less delta where ``less_delta`` says so; if that is not needed, return
    ``nothing``.
    """
    BM: gl.constexpr = p.C.block_m
    S: gl.constexpr = accumulator(BM)
    STAGES: gl.constexpr = p.C.o_stages
    KEYS: gl.constexpr = span.v.shape[0]
    BDV: gl.constexpr = span.v.shape[1]
    LESS_DELTA: gl.constexpr = less_delta(t.stream is not None, p.APART)
    stage = at % STAGES
    mbarrier.wait(p.o_full.index(stage), (at // STAGES) & 1)
    if p.NEED_DS:
        o = p.o_s.index(stage).reshape([BM, BDV]).permute((1, 0))
        start = gl.zeros([KEYS, BM], gl.float32, S)
        if LESS_DELTA:
            delta = p.delta_s.index(stage).reshape([BM]).load(gl.SliceLayout(0, S))
            delta, start = gl.broadcast(gl.expand_dims(delta, 0), start)
            start = gl.inline_asm_elementwise(_NEGATED, "=f,=f,=f,=f,f,f,f,f", [delta], gl.float32, False, 4)
        return warpgroup_mma(span.v, o, start, use_acc=LESS_DELTA, is_async=True)
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
def fold(p, t, span, block, s_pending, dp_pending, lse, dk, dv, db, place, MORE: gl.constexpr):
    """Fold one query block of ``span``, whose s and dp are under way, into (dk, dv, db). MORE: start those of the next, s as soon as the
    last product of this one has been. place: where in the sum the block before lies, if dq is added to it straight from registers.
    """
    WG: gl.constexpr = t.WG
    BM: gl.constexpr = p.C.block_m
    HALF: gl.constexpr = p.C.block_n // 2
    BD: gl.constexpr = p.q_s.shape[4]
    BDV: gl.constexpr = p.o_s.shape[4]
    DT: gl.constexpr = p.q_s.dtype
    S: gl.constexpr = accumulator(BM)
    COLS: gl.constexpr = gl.SliceLayout(0, S)
    P: gl.constexpr = gl.DotOperandLayout(0, accumulator(BDV), 2)
    DS: gl.constexpr = gl.DotOperandLayout(0, accumulator(BD), 2)
    Q_STAGES: gl.constexpr = p.C.q_stages
    O_STAGES: gl.constexpr = p.C.o_stages
    BIAS_STAGES: gl.constexpr = p.C.bias_stages
    APART: gl.constexpr = p.APART
    NEED_DQ: gl.constexpr = p.ds_s is not None and not APART
    DIRECT: gl.constexpr = p.dq_sum is not None
    TILES: gl.constexpr = p.bias_s is not None or p.mask_s is not None
    DROPPED: gl.constexpr = t.stream is not None
    ALONE: gl.constexpr = p.NEED_DV and not p.NEED_DK and p.ds_s is None  # no other product follows
    AFTER: gl.constexpr = 1 if p.NEED_DK else 0  # products of dk started after those of dv and dq
    NEXT: gl.constexpr = 0 if not MORE else 2 if APART and p.NEED_DS else 1  # products of the next block
    SOON: gl.constexpr = APART and p.NEED_DV and p.bias_s is None  # dv's product before ds is there
    LESS_DELTA: gl.constexpr = less_delta(DROPPED, APART)
    FENCED: gl.constexpr = SOON or BIAS_STAGES == 1  # before the next block, which is not loaded whole while a single bias buffer is in use
    at = t.base + block
    q_stage = at % Q_STAGES
    o_stage = at % O_STAGES
    bias_slot = at % BIAS_STAGES * 2 + WG
    go = at > t.done
    m0 = block * BM
    if (p.ALIBI or DROPPED or DIRECT) and not span.MASKED:  # nothing else asks where a whole block lies
        m0 = in_turn(block, span.start, span.stop, t.n0, BM) * BM
    if DROPPED:  # under the products
        marks = drawn(t.stream, m0, t.n0 + WG * HALF, HALF, BM, True)
    s = warpgroup_mma_wait(1 if p.NEED_DS else 0, [s_pending])
    bias = None
    mask = None
    if TILES:
        mbarrier.wait(p.bias_full.index(bias_slot), (at // BIAS_STAGES) & 1)
    if p.mask_s is not None:
        mask = p.mask_s.index(bias_slot).reshape([BM, HALF]).permute((1, 0)).load(S)
    if p.bias_s is not None:
        bias = p.bias_s.index(bias_slot).reshape([BM, HALF]).permute((1, 0)).load(S)
    rest = None
    if p.rest_s is not None:
        rest = gl.expand_dims(p.rest_s.index(q_stage).reshape([BM]).load(COLS), 0)
    p16, weight = probabilities(p, t, s, bias, mask, lse, rest, m0, t.n0 + WG * HALF, span.MASKED)
    undropped = p16
    if DROPPED:
        if p.NEED_DB and p.cap is not None:
            undropped = signed(p16.to(gl.float32), marks)
        if p.NEED_DS:
            weight = signed(weight, marks)
        if p.NEED_DV:
            p16 = dropped(p16, marks)
    if p.NEED_DV:
        operand = gl.convert_layout(p16, P)
    if SOON:
        dv_pending = warpgroup_mma(operand, p.o_s.index(o_stage).reshape([BM, BDV]), dv, is_async=True)
    if p.NEED_DS:
        delta = None
        if not LESS_DELTA:
            delta = gl.expand_dims(p.delta_s.index(o_stage).reshape([BM]).load(COLS), 0)
        # A wait is where a basic block ends: it keeps the assembler from moving the next wait for a product up, before the exponentials
        # that are to run under it. Where ds needs none it is one for a phase that is over: of a barrier that nothing else touches, for a
        # second look at any other makes the partition's warps meet. DIRECT lets them: then they need not before ds is stored.
        if APART:
            mbarrier.wait(p.ds_empty.index(at & 1), ((at >> 1) & 1) ^ 1)
        elif DIRECT:
            mbarrier.wait(p.o_full.index(o_stage), (at // O_STAGES) & 1)
        else:
            mbarrier.wait(p.ds_empty.index(0), 1)
        dp = warpgroup_mma_wait(1 if SOON else 0, [dp_pending])
        ds = of_scores(weight, dp, delta, DROPPED)
        if p.NEED_DB and p.cap is not None:  # the bias is added behind the cap
            db += gl.sum(of_scores(undropped.to(gl.float32), dp, delta, DROPPED), 1)
        elif p.NEED_DB:
            db += gl.sum(ds, 1)
        ds16 = ds.to(DT)
        if NEED_DQ:
            if go:
                meet(DS_HERE + 8 * WG + ((at - 1) & 1), 256)
        if p.ds_s is not None:
            p.ds_s.index((at & 1) * 2 + WG).permute((1, 0)).store(ds16)
    if p.NEED_DV and not SOON:
        dv_pending = warpgroup_mma(operand, p.o_s.index(o_stage).reshape([BM, BDV]), dv, is_async=True)
    if ALONE:  # here, because the assembler of Triton 3.6 (12.8) dies of a wait further down
        dv = warpgroup_mma_wait(0, [dv_pending])
    # The fence stands before a buffer that was read by plain loads goes back to TMA, and before others are told of ds. It waits for ds to
    # be stored: where no product here needs that, behind all that can be started.
    if not APART:
        fence_async_shared()
        if TILES:
            signal(BIAS_FREE + bias_slot, 160)
        if NEED_DQ:
            dq_pending = dq_product(p, at - 1, t.kv, WG)
    if p.NEED_DK:
        dk_pending = warpgroup_mma(gl.convert_layout(ds16, DS), p.q_s.index(q_stage).reshape([BM, BD]), dk, is_async=True)
    if APART and FENCED:
        _tell_of_ds(at, bias_slot, TILES)
    if MORE:
        s_pending, lse = score(p, span, at + 1)
        if APART:
            dp_pending = weigh(p, t, span, at + 1, s_pending)
    if APART and not FENCED:
        _tell_of_ds(at, bias_slot, TILES)
    if NEED_DQ:
        if not DIRECT:
            mbarrier.wait(p.dq_empty.index(WG), ((at - go.to(gl.int32)) & 1) ^ 1)
        dq = warpgroup_mma_wait(AFTER + NEXT, [dq_pending])
        signal(DS_HERE + 8 * (1 - WG) + (at & 1), 256)
        if DIRECT:
            # What the assembler makes of a branch is 2 % faster than with predicates, but 3 % slower where a band takes registers.
            if p.lo is None and p.hi is None:
                if go:
                    add_to_sum(p.dq_sum, place, dq, None, WG * (BD // 2), p.ROW)
            else:
                add_to_sum(p.dq_sum, place, dq, go, WG * (BD // 2), p.ROW)
            place = t.sum_base + m0 // BM
        else:
            dq_hand_over(p, dq, go, WG)
    if p.NEED_DV and not ALONE:
        dv = warpgroup_mma_wait(AFTER + NEXT, [dv_pending])
    signal(O_FREE + o_stage, 288)
    if p.NEED_DK:
        dk = warpgroup_mma_wait(NEXT, [dk_pending])
    signal(Q_FREE + q_stage, 288)
    if MORE and not APART:
        dp_pending = weigh(p, t, span, at + 1, s_pending)
    return s_pending, dp_pending, lse, dk, dv, db, place
