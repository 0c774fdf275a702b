"""What ``dkdv.py`` makes of one block of queries: s, dp and their parts of dk and dv, and the float32 sum of dq.

The sum of dq lies in global memory, in blocks of 64 queries of a (batch, head) pair. TMA adds to it from shared memory, row by row. With
RED_DQ the consumers add to it from registers, four numbers of a thread at a time, so a block lies in memory as in registers: groups of 8
columns; in a group 16 queries a warp; in those eight times four threads, each with two neighbours of a row and the two of the row eight
further down. ``preprocess.py`` clears the sum and ``postprocess.py`` reads it.
"""

from ..triton.prims import offset
from .compat import fence_async_shared, gl, gluon, mbarrier, tma_add, tma_store_wait, warpgroup_mma, warpgroup_mma_wait
from .dropout import drop, ds_of, keep_bits, sign_dropped
from .extent import extent_of, padded_length, pair_of, rows_of_sum
from .key_rows import add_columns
from .layouts import accumulator
from .products import groups, into_columns, left_operand, over_columns, pieces, waited
from .rings import bar_arrive, bar_sync
from .scores_kq import bare_blocks, block_in, grid_of, probabilities, query_heads, turned, visible_blocks

# Named barriers, two a name, one a buffer; BIAS_FREE two a buffer; DQ_HERE one, when both halves of dq are there. DS_HERE: a buffer of ds
# is full; without DQ_WARPGROUP, the other consumer says so to consumer WG at DS_HERE + 8 WG.
DS_HERE, Q_FREE, O_FREE, BIAS_FREE, DQ_HERE = map(gl.constexpr, (5, 7, 9, 11, 15))


_ADD_FOUR = gl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p, $12, 0; @p red.relaxed.gpu.global.add.v4.f32 [$4], {$8, $9, $10, $11}; }"
    " mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;"
)

_ADD_OPERANDS = gl.constexpr("=r,=r,=r,=r,l,l,l,l,f,f,f,f,r,r,r,r")


@gluon.jit
def first_block(p, x, head, BM: gl.constexpr):
    """The number of a head's first query block in the sum."""
    if p.packed is not None:
        return head * (padded_length(p) // BM) + x.first_padded // BM
    else:
        return pair_of(p, x, head) * ((p.M + BM - 1) // BM)


@gluon.jit
def red_add_dq(dq_sum, block, dq, go, FIRST: gl.constexpr, ROW: gl.constexpr):
    """Add dq, columns from FIRST on of a block of queries, to their sum by red.global; rows of the sum have ROW columns. ``go``: a scalar
    predicate, or None.
    """
    LAYOUT: gl.constexpr = dq.type.layout
    ROWS: gl.constexpr = dq.shape[0]
    if FIRST < ROW:
        row = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)), 1)
        column = gl.expand_dims(FIRST + gl.arange(0, dq.shape[1], gl.SliceLayout(0, LAYOUT)), 0)
        place = row // 16 * 128 + row % 8 * 16 + column // 8 * (8 * ROWS) + column % 8 // 2 * 4
        kept = (column < ROW).to(gl.int32)
        if go is not None:
            kept = kept & go.to(gl.int32)
        kept, place = gl.broadcast(kept, place)
        at = dq_sum + offset(block, ROWS * ROW) + place
        gl.inline_asm_elementwise(_ADD_FOUR, _ADD_OPERANDS, [at.to(gl.int64), dq, kept], gl.int32, False, 4)


@gluon.jit
def add_dq_by_tma(p, dq_desc):
    """The warp that adds ``dq_s``, half of the columns from each consumer, to dq in global memory."""
    BM: gl.constexpr = p.C.block_m
    COLUMNS: gl.constexpr = p.dq_s.shape[4]
    grid = grid_of(p)
    for wave in range(grid.waves()):
        n0, kv_head, b = grid.locate(wave)
        x = extent_of(p, b)
        begin, whole, part, end = visible_blocks(p, x, n0, kv_head)
        bare = bare_blocks(p, x, n0, kv_head, whole, part)
        steps = end - begin
        _own, first_head, members = query_heads(kv_head, p.group, p.splits)
        for step in range(steps * members):
            head = first_head + step // steps
            m0 = turned(p, step, steps, begin, whole, part, bare, n0, BM) * BM
            bar_sync(DQ_HERE, 288)
            for w in gl.static_range(2):
                tma_add(dq_desc, rows_of_sum(p, x, m0, head, w * COLUMNS), p.dq_s.index(w))
            tma_store_wait(1)
            mbarrier.arrive(p.dq_empty.index(0))
            tma_store_wait(0)
            mbarrier.arrive(p.dq_empty.index(1))


@gluon.jit
def run_dq_warpgroup(p, dq_desc):
    """The warpgroup that computes ``ds k`` of every block and adds it to dq in global memory by TMA."""
    BM: gl.constexpr = p.C.block_m
    BD: gl.constexpr = p.k_s.shape[-1]
    HALF: gl.constexpr = p.C.block_n // 2
    COLUMNS: gl.constexpr = p.dq_s.shape[4]
    grid = grid_of(p)
    nothing = gl.zeros([BM, BD], gl.float32, accumulator(BD))
    done = 0
    for wave in range(grid.waves()):
        n0, kv_head, b = grid.locate(wave)
        x = extent_of(p, b)
        begin, whole, part, end = visible_blocks(p, x, n0, kv_head)
        bare = bare_blocks(p, x, n0, kv_head, whole, part)
        steps = end - begin
        _own, first_head, members = query_heads(kv_head, p.group, p.splits)
        kv = p.kv.slot(wave, 0)
        k0 = p.k_s.index(kv * 2).reshape([HALF, BD])
        k1 = p.k_s.index(kv * 2 + 1).reshape([HALF, BD])
        if steps > 0:  # else nobody waits for this partition, and it might find them full of another tile
            p.kv.wait(wave, 0)
        for step in range(steps * members):
            head = first_head + step // steps
            m0 = turned(p, step, steps, begin, whole, part, bare, n0, BM) * BM
            at = done + step
            slot = at & 1
            bar_sync(DS_HERE + slot, 384)
            pending = warpgroup_mma(p.ds_s.index(slot * 2), k0, nothing, use_acc=False, is_async=True)
            pending = warpgroup_mma(p.ds_s.index(slot * 2 + 1), k1, pending, is_async=True)
            dq = warpgroup_mma_wait(0, [pending])
            mbarrier.arrive(p.ds_empty.index(slot))
            left, right = gl.split(dq.reshape([BM, 2, COLUMNS]).permute((0, 2, 1)))
            tma_store_wait(2)  # what these two of four buffers held
            p.dq_s.index(slot * 2).reshape([BM, COLUMNS]).store(gl.convert_layout(left, accumulator(COLUMNS)))
            p.dq_s.index(slot * 2 + 1).reshape([BM, COLUMNS]).store(gl.convert_layout(right, accumulator(COLUMNS)))
            fence_async_shared()
            tma_add(dq_desc, rows_of_sum(p, x, m0, head, 0), p.dq_s.index(slot * 2))
            tma_add(dq_desc, rows_of_sum(p, x, m0, head, COLUMNS), p.dq_s.index(slot * 2 + 1))
        done += steps * members
    tma_store_wait(0)


@gluon.jit
def dq_mma(p, number, kv, WG: gl.constexpr):
    """Issue ``ds k`` of block ``number``, half of the columns, less those that only pad."""
    BM: gl.constexpr = p.C.block_m
    HALF: gl.constexpr = p.C.block_n // 2
    BD: gl.constexpr = p.k_s.shape[-1]
    HALF_BD: gl.constexpr = BD // 2
    PART: gl.constexpr = min(HALF_BD, p.QK - WG * HALF_BD)
    slot = number & 1
    nothing = gl.zeros([BM, PART], gl.float32, accumulator(PART))
    k0 = p.k_s.index(kv * 2).reshape([HALF, BD]).slice(WG * HALF_BD, PART, 1)
    k1 = p.k_s.index(kv * 2 + 1).reshape([HALF, BD]).slice(WG * HALF_BD, PART, 1)
    pending = warpgroup_mma(p.ds_s.index(slot * 2), k0, nothing, use_acc=False, is_async=True)
    return warpgroup_mma(p.ds_s.index(slot * 2 + 1), k1, pending, is_async=True)


@gluon.jit
def hand_dq_to_tma(p, dq, go, WG: gl.constexpr):
    """Store half of a block's dq for the warp that adds it. Without ``go`` the warp is not told."""
    target = p.dq_s.index(WG).reshape([p.dq_s.shape[3], p.dq_s.shape[4]])
    if dq.shape[1] == target.shape[1]:
        target.store(dq)
    else:  # dq in memory does not have the other columns
        target.slice(0, dq.shape[1], 1).store(dq)
    fence_async_shared()
    if go:
        bar_arrive(DQ_HERE, 288)


@gluon.constexpr_function
def less_delta(drop, dq_warpgroup):
    """Whether the accumulator of dp starts from -delta: where registers are short. Beside a third warpgroup they are not, and the consumers
    lose more than they save. Under dropout delta is not subtracted from dp itself.
    """
    return not drop and not dq_warpgroup


@gluon.jit
def score(p, span, at):
    """Wait for Q of block ``at`` and issue ``sᵀ = k qᵀ``: ``(MMA, lse as a row)``."""
    BM: gl.constexpr = p.C.block_m
    S: gl.constexpr = accumulator(BM)
    STAGES: gl.constexpr = p.C.q_stages
    KEYS: gl.constexpr = span.k.shape[0]
    BD: gl.constexpr = span.k.shape[1]
    stage = at % STAGES
    mbarrier.wait(p.q_full.index(stage), (at // STAGES) & 1)
    q = p.q_s.index(stage).reshape([BM, BD])
    pending = over_columns(span.k, q, gl.zeros([KEYS, BM], gl.float32, S), 0, p.QK, False)
    if span.row is not None:
        pending = warpgroup_mma(span.row, p.ones_s.index(0).permute((1, 0)), pending, is_async=True)
    return pending, gl.expand_dims(p.lse_s.index(stage).reshape([BM]).load(gl.SliceLayout(0, S)), 0)


# Each number for either of a thread's rows by an instruction of its own: of one that is used twice the compiler makes a copy behind the
# fence of the MMA, and then ptxas ends the MMA before it first.
_NEGATED = gl.constexpr("neg.f32 $0, $4; neg.f32 $1, $5; xor.b32 $2, $6, 0x80000000; xor.b32 $3, $7, 0x80000000;")


@gluon.jit
def weigh(p, t, span, at, nothing):
    """Wait for dO of block ``at`` and issue ``dpᵀ = v doutᵀ``, less delta if ``less_delta``; return ``nothing`` if dp is not needed."""
    BM: gl.constexpr = p.C.block_m
    S: gl.constexpr = accumulator(BM)
    STAGES: gl.constexpr = p.C.o_stages
    KEYS: gl.constexpr = span.v.shape[0]
    BDV: gl.constexpr = span.v.shape[1]
    LESS_DELTA: gl.constexpr = less_delta(t.philox is not None, p.DQ_WARPGROUP)
    stage = at % STAGES
    mbarrier.wait(p.o_full.index(stage), (at // STAGES) & 1)
    if p.NEED_DS:
        o = p.o_s.index(stage).reshape([BM, BDV])
        start = gl.zeros([KEYS, BM], gl.float32, S)
        if LESS_DELTA:
            delta = p.delta_s.index(stage).reshape([BM]).load(gl.SliceLayout(0, S))
            delta, start = gl.broadcast(gl.expand_dims(delta, 0), start)
            start = gl.inline_asm_elementwise(_NEGATED, "=f,=f,=f,=f,f,f,f,f", [delta], gl.float32, False, 4)
        return over_columns(span.v, o, start, 0, p.OV, LESS_DELTA)
    else:
        return nothing


@gluon.jit
def _tell_of_ds(at, bias_slot, TILES: gl.constexpr):
    """With DQ_WARPGROUP: announce ds of block ``at``, and give back its bias and mask tiles."""
    fence_async_shared()
    bar_arrive(DS_HERE + (at & 1), 384)
    if TILES:
        bar_arrive(BIAS_FREE + bias_slot, 160)


@gluon.jit
def fold(p, t, span, block, s_pending, dp_pending, lse, dk, dv, db, place, MORE: gl.constexpr):
    """Fold one query block of ``span``, whose s and dp are under way, into (dk, dv, db).

    MORE: issue s and dp of the next block, s right behind the last MMA of this one. place: of the block before in the sum of dq, with
    red.global.
    """
    WG: gl.constexpr = t.WG
    BM: gl.constexpr = p.C.block_m
    HALF: gl.constexpr = p.C.block_n // 2
    BD: gl.constexpr = p.q_s.shape[-1]
    BDV: gl.constexpr = p.o_s.shape[-1]
    DT: gl.constexpr = p.q_s.dtype
    S: gl.constexpr = accumulator(BM)
    COLS: gl.constexpr = gl.SliceLayout(0, S)
    P: gl.constexpr = left_operand(p.OV, BDV)
    DS: gl.constexpr = left_operand(p.QK, BD)
    Q_STAGES: gl.constexpr = p.C.q_stages
    O_STAGES: gl.constexpr = p.C.o_stages
    BIAS_STAGES: gl.constexpr = p.C.bias_stages
    DQ_WARPGROUP: gl.constexpr = p.DQ_WARPGROUP
    NEED_DQ: gl.constexpr = p.ds_s is not None and not DQ_WARPGROUP
    RED_DQ: gl.constexpr = p.dq_sum is not None
    BIASED: gl.constexpr = p.bias_s is not None and not span.BARE
    TILES: gl.constexpr = BIASED or p.mask_s is not None
    DROPPED: gl.constexpr = t.philox is not None
    ASKS: gl.constexpr = p.packed is not None and p.bias_s is not None
    ALONE: gl.constexpr = p.NEED_DV and not p.NEED_DK and p.ds_s is None  # no other MMA follows
    AFTER: gl.constexpr = pieces(p.QK, BD) if p.NEED_DK else 0  # MMAs of dk issued after those of dv and dq
    DP: gl.constexpr = groups(p.OV) if p.NEED_DS else 0  # MMAs of dp
    NEXT: gl.constexpr = 0 if not MORE else groups(p.QK) + (DP if DQ_WARPGROUP else 0)  # MMAs of the next block
    SOON: gl.constexpr = DQ_WARPGROUP and p.NEED_DV and not BIASED  # dv's MMA before ds is there
    LESS_DELTA: gl.constexpr = less_delta(DROPPED, DQ_WARPGROUP)
    FENCED: gl.constexpr = SOON or BIAS_STAGES == 1  # before the next block, which is not loaded whole while a single bias buffer is in use
    at = t.base + block
    q_stage = at % Q_STAGES
    o_stage = at % O_STAGES
    bias_at = at
    if p.SKIPS:
        bias_at += span.blocks.masks
    bias_slot = bias_at % BIAS_STAGES * 2 + WG
    go = at > t.done
    m0 = block * BM
    if (p.ALIBI or DROPPED or RED_DQ or ASKS) and not span.MASKED:  # nothing else asks where a whole block lies
        m0 = block_in(p, span.blocks, block, t.n0, BM) * BM
    if DROPPED:  # under the MMAs
        bits = keep_bits(t.philox, m0, t.n0 + WG * HALF, HALF, BM, True)
    s = warpgroup_mma_wait(DP, [s_pending])
    bias = None
    mask = None
    if TILES:
        mbarrier.wait(p.bias_full.index(bias_slot), (bias_at // BIAS_STAGES) & 1)
    if p.mask_s is not None:
        mask = p.mask_s.index(bias_slot).reshape([BM, HALF]).permute((1, 0)).load(S)
    if BIASED:
        bias = p.bias_s.index(bias_slot).reshape([BM, HALF]).permute((1, 0)).load(S)
    rest = None
    if p.rest_s is not None:
        rest = gl.expand_dims(p.rest_s.index(q_stage).reshape([BM]).load(COLS), 0)
    p16, weight = probabilities(p, t, s, bias, mask, lse, rest, m0, t.n0 + WG * HALF, span.MASKED, p.q_s.dtype)
    undropped = p16
    if DROPPED:
        if p.NEED_DB and p.cap is not None:
            undropped = sign_dropped(p16.to(gl.float32), bits)
        if p.NEED_DS:
            weight = sign_dropped(weight, bits)
        if p.NEED_DV:
            p16 = drop(p16, bits)
    if p.NEED_DV:
        operand = gl.convert_layout(p16, P)
    if SOON:
        dv_pending = into_columns(operand, p.o_s.index(o_stage).reshape([BM, BDV]), dv)
    if p.NEED_DS:
        delta = None
        if not LESS_DELTA:
            delta = gl.expand_dims(p.delta_s.index(o_stage).reshape([BM]).load(COLS), 0)
        # A wait ends a basic block: ptxas cannot move the next wait for an MMA up past it, before the exponentials
        # that are to run under it. Where ds needs none it is one for a phase that is over: of a barrier that nothing else touches, for a
        # second look at any other syncs the partition's warps. RED_DQ lets it: then they need no sync before ds is stored.
        if DQ_WARPGROUP:
            mbarrier.wait(p.ds_empty.index(at & 1), ((at >> 1) & 1) ^ 1)
        elif RED_DQ:
            mbarrier.wait(p.o_full.index(o_stage), (at // O_STAGES) & 1)
        else:
            mbarrier.wait(p.ds_empty.index(0), 1)
        dp = warpgroup_mma_wait(pieces(p.OV, BDV) if SOON else 0, [dp_pending])
        ds = ds_of(weight, dp, delta, DROPPED)
        if p.NEED_DB and p.cap is not None:  # the bias is added behind the cap
            db += gl.sum(ds_of(undropped.to(gl.float32), dp, delta, DROPPED), 1)
        elif p.NEED_DB and not p.SUM_BY_MMA:
            db += gl.sum(ds, 1)
        ds16 = ds.to(DT)
        if p.NEED_DB and p.SUM_BY_MMA:
            db = add_columns(db, ds16)
        if NEED_DQ:
            if go:
                bar_sync(DS_HERE + 8 * WG + ((at - 1) & 1), 256)
        if p.ds_s is not None:
            p.ds_s.index((at & 1) * 2 + WG).permute((1, 0)).store(ds16)
    if p.NEED_DV and not SOON:
        dv_pending = into_columns(operand, p.o_s.index(o_stage).reshape([BM, BDV]), dv)
    if ALONE:  # here, because ptxas 12.8 (Triton 3.6) crashes on a wait further down
        dv = waited(0, dv_pending)
    # The fence stands before a buffer that was read by plain loads goes back to TMA, and before others are told of ds. It waits for ds to
    # be stored: where no MMA here needs that, behind all that can be started.
    if not DQ_WARPGROUP:
        fence_async_shared()
        if TILES:
            bar_arrive(BIAS_FREE + bias_slot, 160)
        if NEED_DQ:
            dq_pending = dq_mma(p, at - 1, t.kv, WG)
    if p.NEED_DK:
        dk_pending = into_columns(gl.convert_layout(ds16, DS), p.q_s.index(q_stage).reshape([BM, BD]), dk)
    if DQ_WARPGROUP and FENCED:
        _tell_of_ds(at, bias_slot, TILES)
    if MORE:
        s_pending, lse = score(p, span, at + 1)
        if DQ_WARPGROUP:
            dp_pending = weigh(p, t, span, at + 1, s_pending)
    if DQ_WARPGROUP and not FENCED:
        _tell_of_ds(at, bias_slot, TILES)
    if NEED_DQ:
        if not RED_DQ:
            mbarrier.wait(p.dq_empty.index(WG), ((at - go.to(gl.int32)) & 1) ^ 1)
        dq = warpgroup_mma_wait(AFTER + NEXT, [dq_pending])
        bar_arrive(DS_HERE + 8 * (1 - WG) + (at & 1), 256)
        if RED_DQ:
            # A branch is 2 % faster than predicates, but 3 % slower where a band takes registers.
            if p.lo is None and p.hi is None:
                if go:
                    red_add_dq(p.dq_sum, place, dq, None, WG * (BD // 2), p.ROW)
            else:
                red_add_dq(p.dq_sum, place, dq, go, WG * (BD // 2), p.ROW)
            place = t.sum_base + m0 // BM
        else:
            hand_dq_to_tma(p, dq, go, WG)
    if p.NEED_DV and not ALONE:
        dv = waited(AFTER + NEXT, dv_pending)
    bar_arrive(O_FREE + o_stage, 288)
    if p.NEED_DK:
        dk = waited(NEXT, dk_pending)
    bar_arrive(Q_FREE + q_stage, 288)
    if MORE and not DQ_WARPGROUP:
        dp_pending = weigh(p, t, span, at + 1, s_pending)
    return s_pending, dp_pending, lse, dk, dv, db, place
