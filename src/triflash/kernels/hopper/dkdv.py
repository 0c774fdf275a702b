"""The backward kernel for Hopper that owns keys: dk, dv and, summed up, dq. Launched by ``launch/hopper_backward.py``.

A CTA owns tiles of 128 keys of one key head, 64 for each of its two consumer warpgroups, and walks the queries that see them. With p and
delta as in ``kernels/triton/backward.py``, a consumer computes its part of sᵀ and dpᵀ and keeps pᵀ and dsᵀ in registers as operands of

    dv += pᵀ dout;   dk += scale dsᵀ q

dsᵀ also goes to shared memory, as the operand of ``dq += ds k``. Each consumer computes half of dq's columns (FlashAttention-3, Shah et al.
2024), or a third warpgroup computes all (``dq_warpgroup``). The sum over key tiles is formed in global memory, in float32 and in no fixed
order, by TMA or by red.global. Where results must be the same bits on every run, ``dq.py`` computes dq and this kernel does not. With few
queries a CTA has all key tiles of a (batch, head) pair instead, and sums dq up in shared memory, in order (``dq_of_pairs.py``).

``dkdv_step.py`` has one block of queries and the sum of dq. mbarriers as in ``forward.py``, but buffers that consumers give back are
announced at named barriers (``rings.bar_arrive``).
"""

from ..triton.prims import LOG2E
from .compat import fence_async_shared, gl, gluon, mbarrier, record, tma_load, tma_store, tma_store_wait, warpgroup_mma_wait
from .dkdv_step import (
    BIAS_FREE,
    DS_HERE,
    O_FREE,
    Q_FREE,
    add_dq_by_tma,
    dq_mma,
    first_block,
    fold,
    hand_dq_to_tma,
    red_add_dq,
    run_dq_warpgroup,
    score,
    weigh,
)
from .dq_of_pairs import run_dq_of_pairs
from .dropout import philox_of
from .extent import Extent, extent_of, key_rows, outer_at, padded_row, pair_of, place_in_bias, query_rows
from .features import all_lse_small, clear_masked, slope_of
from .key_rows import PIECES, no_sums, operand, store_row, total
from .layouts import accumulator, stacked
from .products import keep, store_columns, times, zeros_of
from .rings import Ring, bar_sync, barriers, ring
from .scores_kq import (
    DELTA,
    LSE,
    REST,
    Blocks,
    Feed,
    bare_blocks,
    grid_of,
    hiding_and_bare,
    of_keys,
    query_heads,
    store_dbias,
    tile_of_mask,
    turned,
    visible_blocks,
)


@record
class Program:
    """What all partitions of a CTA share. C: the configuration (``plan/kernels/dkdv.DkdvConfig``); the rest as of ``dkdv``."""

    small_lse: object
    dk_desc: object
    dv_desc: object
    dk_parts: object
    dv_parts: object
    dbias: object
    bias: object
    lengths: object
    packed: object
    bounds: object
    slopes: object
    q_s: object
    k_s: object
    v_s: object
    o_s: object
    lse_s: object
    delta_s: object
    rest_s: object
    bias_s: object
    mask_s: object
    ds_s: object
    dq_s: object
    dq_sum: object
    row_s: object
    ones_s: object
    kv: Ring
    q_full: object
    o_full: object
    bias_full: object
    ds_empty: object
    dq_empty: object
    consumers_done: object
    bias_strides: object
    dbias_strides: object
    slope_strides: object
    cap: object
    dropout: object
    mask: object
    mask_strides: object
    batch: object
    heads: object
    group: object
    splits: object
    batch_inner: object
    M: object
    N: object
    lo: object
    hi: object
    scale: object
    tiles_n: object
    tiles: object
    l2_group: object
    serpentine: object
    C: gl.constexpr
    NEED_DK: gl.constexpr
    NEED_DV: gl.constexpr
    NEED_DB: gl.constexpr
    NEED_DS: gl.constexpr
    DQ_WARPGROUP: gl.constexpr
    ROW: gl.constexpr
    IS_MASK: gl.constexpr
    EVEN_N: gl.constexpr
    ALIBI: gl.constexpr
    BATCH_FASTEST: gl.constexpr
    LONGEST: gl.constexpr
    SUM_BY_MMA: gl.constexpr
    LOOPS: gl.constexpr
    QK: gl.constexpr
    OV: gl.constexpr
    SKIPS: gl.constexpr


@record
class Keys:
    """A consumer's 64 keys of a tile, whose first is n0, in buffer kv, and what they have for one query head.

    The tile's first block of queries is number ``done`` of the program, the t-th of the head ``base + t``, and in the sum of dq
    ``sum_base + t``.
    """

    x: Extent
    n0: object
    kv: object
    key_bias: object
    key_mask: object
    slope: object
    philox: object
    scale_log2: object
    done: object
    base: object
    sum_base: object
    WG: gl.constexpr
    SMALL_LSE: gl.constexpr


@record
class Span:
    """Query blocks of a tile, MASKED or not, or BARE of the mask that others have tiles of, and as operands its keys and values and the
    keys' row of a bias (``key_rows.py``; None: added otherwise).
    """

    blocks: Blocks
    k: object
    v: object
    row: object
    MASKED: gl.constexpr
    BARE: gl.constexpr


@gluon.jit
def _fetch_bias(p, f, at, x, head, m0, n0):
    """For each consumer its tiles of the bias and of the mask beside it, tiles number ``at`` of the program."""
    HALF: gl.constexpr = p.C.block_n // 2
    BIAS_STAGES: gl.constexpr = p.C.bias_stages
    BIAS_BYTES: gl.constexpr = f.bias_desc.block_type.nbytes if f.bias_desc is not None else 0
    MASK_BYTES: gl.constexpr = f.mask_desc.block_type.nbytes if f.mask_desc is not None else 0
    for w in gl.static_range(2):
        slot = at % BIAS_STAGES * 2 + w
        if at >= BIAS_STAGES:
            bar_sync(BIAS_FREE + slot, 160)
        full = p.bias_full.index(slot)
        mbarrier.expect(full, BIAS_BYTES + MASK_BYTES)
        if f.bias_desc is not None:
            outer, inner, bias_head = outer_at(x.b, p.batch_inner, head, f.bias_on)
            row, column = place_in_bias(p, x, m0, n0 + w * HALF, 0)
            tma_load(f.bias_desc, [outer, inner, bias_head, row, column], full, p.bias_s.index(slot))
        if f.mask_desc is not None:
            mask_outer, mask_inner, mask_head = outer_at(x.b, p.batch_inner, head, f.mask_on)
            mask_row, mask_column = place_in_bias(p, x, m0, n0 + w * HALF, 1)
            tma_load(f.mask_desc, [mask_outer, mask_inner, mask_head, mask_row, mask_column], full, p.mask_s.index(slot))


@gluon.jit
def _produce(p, f):
    """The producer: every load of the program, in the order in which the consumers need them."""
    BM: gl.constexpr = p.C.block_m
    HALF: gl.constexpr = p.C.block_n // 2
    STATS: gl.constexpr = BM * 4
    Q_STAGES: gl.constexpr = p.C.q_stages
    O_STAGES: gl.constexpr = p.C.o_stages
    grid = grid_of(p)
    done = 0  # blocks of earlier tiles: buffers and phases go on counting across tiles
    masks = 0  # likewise their tiles of a mask, where some blocks have none
    for wave in range(grid.waves()):
        n0, kv_head, b = grid.locate(wave)
        x = extent_of(p, b)
        begin, whole, part, end = visible_blocks(p, x, n0, kv_head)
        bare = bare_blocks(p, x, n0, kv_head, whole, part)
        own_head, first_head, members = query_heads(kv_head, p.group, p.splits)
        kv = p.kv.slot(wave, 0)
        kv_full = p.kv.full.index(kv)
        p.kv.acquire(wave, 0)
        mbarrier.expect(kv_full, 2 * (f.k_desc.block_type.nbytes + f.v_desc.block_type.nbytes))
        for w in gl.static_range(2):
            tma_load(f.k_desc, key_rows(p, x, n0 + w * HALF, own_head), kv_full, p.k_s.index(kv * 2 + w))
            tma_load(f.v_desc, key_rows(p, x, n0 + w * HALF, own_head), kv_full, p.v_s.index(kv * 2 + w))
        steps = end - begin
        for step in range(steps * members):
            head = first_head + step // steps
            block = turned(p, step, steps, begin, whole, part, bare, n0, BM)
            m0 = block * BM
            row = pair_of(p, x, head)
            padded = padded_row(x, m0)
            at = done + step
            stage = at % Q_STAGES
            if at >= Q_STAGES:
                bar_sync(Q_FREE + stage, 288)
            q_full = p.q_full.index(stage)
            if p.rest_s is not None:
                mbarrier.expect(q_full, f.q_desc.block_type.nbytes + 2 * STATS)
                tma_load(f.stats_desc, [row, REST, padded], q_full, p.rest_s.index(stage))
            else:
                mbarrier.expect(q_full, f.q_desc.block_type.nbytes + STATS)
            tma_load(f.stats_desc, [row, LSE, padded], q_full, p.lse_s.index(stage))
            tma_load(f.q_desc, query_rows(p, x, m0, head), q_full, p.q_s.index(stage))
            if p.SKIPS:
                if (block < bare.begin) | (block >= bare.end):
                    _fetch_bias(p, f, tile_of_mask(p, masks, step, steps, bare, block, part), x, head, m0, n0)
            elif f.bias_desc is not None or f.mask_desc is not None:
                _fetch_bias(p, f, at, x, head, m0, n0)
            o_stage = at % O_STAGES
            if at >= O_STAGES:
                bar_sync(O_FREE + o_stage, 288)
            o_full = p.o_full.index(o_stage)
            mbarrier.expect(o_full, f.o_desc.block_type.nbytes + STATS)
            tma_load(f.stats_desc, [row, DELTA, padded], o_full, p.delta_s.index(o_stage))
            tma_load(f.o_desc, query_rows(p, x, m0, head), o_full, p.o_s.index(o_stage))
        done += steps * members
        if p.SKIPS:
            masks += (steps - (bare.end - bare.begin)) * members


@gluon.jit
def _walk(p, t, blocks, dk, dv, db, place, first, last, MASKED: gl.constexpr, BARE: gl.constexpr, UNROLL: gl.constexpr):
    """Fold the query blocks ``first … last`` of ``blocks``, a multiple of UNROLL, into (dk, dv, db).

    Without DQ_WARPGROUP, dq of a block is computed in the step of the next, so that consumers do not wait for each other's ds. In the first
    step of a tile there is none: what is computed then is not read. The last block is left to the caller.

    Within UNROLL blocks, the scores of one start before the MMAs of the one before have ended, which keeps the tensor cores busy. Across
    steps of the loop ptxas would serialise the MMAs.
    """
    HALF: gl.constexpr = p.C.block_n // 2
    BD: gl.constexpr = p.k_s.shape[-1]
    BDV: gl.constexpr = p.v_s.shape[-1]
    k = p.k_s.index(t.kv * 2 + t.WG).reshape([HALF, BD])  # in registers they would save a fifth of what is read, but see docs/tuning.md
    v = p.v_s.index(t.kv * 2 + t.WG).reshape([HALF, BDV])
    row = None
    if p.row_s is not None and t.SMALL_LSE:
        row = p.row_s.index(t.WG)
    span = Span(blocks, k, v, row, MASKED, BARE)
    for number in range(first, last, UNROLL):
        s, lse = score(p, span, t.base + number)
        dp = weigh(p, t, span, t.base + number, s)
        for u in gl.static_range(UNROLL):
            s, dp, lse, dk, dv, db, place = fold(p, t, span, number + u, s, dp, lse, dk, dv, db, place, u + 1 < UNROLL)
    return dk, dv, db, place


@gluon.jit
def _walk_all(p, t, blocks, dk, dv, db, place, MASKED: gl.constexpr, BARE: gl.constexpr, UNROLL: gl.constexpr):
    """``_walk`` through all of ``blocks``, UNROLL a step as long as there are so many, and then one by one."""
    start = blocks.start
    stop = blocks.stop
    alone = start
    if UNROLL > 1:
        alone = start + max(stop - start, 0) // UNROLL * UNROLL
        dk, dv, db, place = _walk(p, t, blocks, dk, dv, db, place, start, alone, MASKED, BARE, UNROLL)
    return _walk(p, t, blocks, dk, dv, db, place, alone, stop, MASKED, BARE, 1)


@gluon.jit
def _consume(p, WG: gl.constexpr, SMALL_LSE: gl.constexpr):
    """One consumer: 64 keys of every tile of the program."""
    BM: gl.constexpr = p.C.block_m
    BN: gl.constexpr = p.C.block_n
    HALF: gl.constexpr = BN // 2
    UNROLL: gl.constexpr = p.C.unroll
    BD: gl.constexpr = p.k_s.shape[-1]
    BDV: gl.constexpr = p.v_s.shape[-1]
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BM))
    grid = grid_of(p)
    scale_log2 = p.scale * LOG2E
    done = 0
    masks = 0  # tiles of a mask that earlier tiles of the program had, where some blocks have none
    for wave in range(grid.waves()):
        n0, kv_head, b = grid.locate(wave)
        x = extent_of(p, b)
        begin, whole, part, end = visible_blocks(p, x, n0, kv_head)
        bare = bare_blocks(p, x, n0, kv_head, whole, part)
        steps = end - begin
        dk = zeros_of(HALF, p.QK, BD)
        dv = zeros_of(HALF, p.OV, BDV)
        j = n0 + WG * HALF + gl.arange(0, HALF, ROWS)
        kv = p.kv.slot(wave, 0)
        p.kv.wait(wave, 0)
        if p.lengths is not None:
            # The own half; the other consumer meets it in dq, after it has got ds from here.
            rows = x.keys - (n0 + WG * HALF)
            if (steps > 0) & (rows < HALF) & (x.keys < p.N):
                clear_masked(p.k_s.index(kv * 2 + WG).reshape([HALF, BD]), rows)
                clear_masked(p.v_s.index(kv * 2 + WG).reshape([HALF, BDV]), rows)
        place = 0
        own_head, first_head, members = query_heads(kv_head, p.group, p.splits)
        for member in range(members):
            head = first_head + member
            sum_base = 0
            if p.dq_sum is not None:
                sum_base = first_block(p, x, head, BM)
            slope = slope_of(p.slopes, p.slope_strides, x.b, head)
            philox = None
            if p.dropout is not None:
                philox = philox_of(p.dropout, x.b, head, p.heads)
            key_bias = gl.zeros([HALF], gl.float32, ROWS)
            if p.row_s is not None and SMALL_LSE:
                key_bias = None
                its = n0 + WG * HALF + gl.arange(0, HALF, gl.SliceLayout(1, PIECES))
                store_row(p.row_s.index(WG), of_keys(p, p.bias, p.bias_strides, x, head, its, 0), 1.0 / p.scale)
            elif p.bias is not None:
                key_bias = of_keys(p, p.bias, p.bias_strides, x, head, j, 0).to(gl.float32)
            key_mask = None
            if p.mask is not None:
                key_mask = of_keys(p, p.mask, p.mask_strides, x, head, j, 1)
            if p.SUM_BY_MMA:
                db = no_sums(HALF)
            else:
                db = gl.zeros([HALF], gl.float32, ROWS)
            base = done + member * steps - begin
            t = Keys(x, n0, kv, key_bias, key_mask, slope, philox, scale_log2, done, base, sum_base, WG, SMALL_LSE)
            count = 0
            before = 0
            if p.SKIPS:
                count = bare.end - bare.begin
                before = masks - done - member * count
            if (p.hi is not None) or (not p.EVEN_N):
                dk, dv, db, place = _walk_all(p, t, Blocks(begin, whole, 0, 0, before), dk, dv, db, place, True, False, 1)
            if p.SKIPS:  # first those of which the mask hides something
                hiding, others = hiding_and_bare(whole, part, bare, before)
                dk, dv, db, place = _walk_all(p, t, hiding, dk, dv, db, place, False, False, UNROLL)
                dk, dv, db, place = _walk_all(p, t, others, dk, dv, db, place, False, True, UNROLL)
            else:
                dk, dv, db, place = _walk_all(p, t, Blocks(whole, part, 0, 0, 0), dk, dv, db, place, False, False, UNROLL)
            if p.lo is not None:
                dk, dv, db, place = _walk_all(p, t, Blocks(part, end, 0, 0, before - count), dk, dv, db, place, True, False, 1)
            if p.NEED_DB:
                if p.SUM_BY_MMA:
                    store_dbias(p, total(db, ROWS), b, head, j)
                else:
                    store_dbias(p, db, b, head, j)
        done += steps * members
        if p.SKIPS:
            masks += (steps - (bare.end - bare.begin)) * members
        if p.DQ_WARPGROUP:
            if steps > 0:  # these keys are still read for dq
                mbarrier.wait(p.ds_empty.index((done - 1) & 1), ((done - 1) >> 1) & 1)
        elif p.ds_s is not None:
            if steps > 0:
                if p.dq_sum is None:
                    mbarrier.wait(p.dq_empty.index(WG), ((done - 1) & 1) ^ 1)
                bar_sync(DS_HERE + 8 * WG + ((done - 1) & 1), 256)
                dq = warpgroup_mma_wait(0, [dq_mma(p, done - 1, kv, WG)])
                if p.dq_sum is None:
                    hand_dq_to_tma(p, dq, True, WG)
                else:
                    red_add_dq(p.dq_sum, place, dq, None, WG * (BD // 2), p.ROW)
            # The other consumer may still be reading these keys for its half of dq.
            mbarrier.arrive(p.consumers_done.index(0))
            mbarrier.wait(p.consumers_done.index(0), wave & 1)
        if p.dropout is not None:
            dk = times(dk, p.dropout[2])
            dv = times(dv, p.dropout[2])
        row_of_parts = (b * grid.heads + kv_head) * p.tiles_n * BN + n0 + WG * HALF
        if p.dk_parts is not None:
            keep(p.dk_parts, row_of_parts, times(dk, p.scale), BD)
        elif p.NEED_DK:
            store_columns(p.k_s.index(kv * 2 + WG).reshape([HALF, BD]), times(dk, p.scale))
        if p.dv_parts is not None:
            keep(p.dv_parts, row_of_parts, dv, BDV)
        elif p.NEED_DV:
            store_columns(p.v_s.index(kv * 2 + WG).reshape([HALF, BDV]), dv)
        fence_async_shared()
        if p.dk_desc is not None:
            tma_store(p.dk_desc, key_rows(p, x, n0 + WG * HALF, own_head), p.k_s.index(kv * 2 + WG))
        if p.dv_desc is not None:
            tma_store(p.dv_desc, key_rows(p, x, n0 + WG * HALF, own_head), p.v_s.index(kv * 2 + WG))
        tma_store_wait(0)
        p.kv.release(wave, 0)


@gluon.jit
def _consume_either(p, WG: gl.constexpr):
    """One consumer: ``_consume`` with the faster loop if every lse is small (``preprocess.py``), or with the only one of LOOPS."""
    if p.LOOPS != "both":
        _consume(p, WG, p.LOOPS == "small")
    elif (p.small_lse is not None) and (all_lse_small(p.small_lse) != 0):
        _consume(p, WG, True)
    else:
        _consume(p, WG, False)


COUNTS = ["bounds", "batch", "heads", "group", "splits", "batch_inner", "M", "N", "lo", "hi", "tiles_n", "tiles", "l2_group", "serpentine"]


@gluon.jit(do_not_specialize=COUNTS)
def dkdv(
    q_desc, k_desc, v_desc, o_desc, stats_desc, small_lse, bias_desc, dk_desc, dv_desc, dk_parts, dv_parts, dq_desc, dq_sum, bias, lengths,
    packed, bounds, slopes, dbias, bias_strides, dbias_strides, slope_strides, bias_on, cap, dropout, mask_desc, mask, mask_strides,
    mask_on,
    batch, heads, group, splits, batch_inner, M, N, lo, hi, scale, tiles_n, tiles, l2_group, serpentine,
    C: gl.constexpr, HAS_REST: gl.constexpr, IS_MASK: gl.constexpr, EVEN_N: gl.constexpr, ALIBI: gl.constexpr, ROW: gl.constexpr,
    BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr, ROW_BY_MMA: gl.constexpr, SUM_BY_MMA: gl.constexpr, LOOPS: gl.constexpr,
    QK: gl.constexpr, OV: gl.constexpr, SKIPS: gl.constexpr,
):  # fmt: skip
    """Tiles of 128 keys of a key head: ``tiles`` of them, ``tiles_n`` a (batch, key head) pair, dealt out by ``schedule.Uniform``.

    Descriptors of q, k, v, dout (``o_desc``), dk and dv are over (batch, length, head, dim); that of the table ``stats`` over (batch and
    head, LSE | DELTA | REST, query), which ``preprocess`` fills. The float32 sum of dq is a descriptor over (batch, head, query, dim) or,
    for red.global, a pointer dq_sum with rows of ROW columns (``dkdv_step.py``); with ``dq_blocks`` of C, dq_desc is dq's, like q's. A bias
    tile comes by a descriptor over its five dims, switched off by ``bias_on`` where it broadcasts. A bias over keys alone, which may stand
    beside one of tiles, comes as a pointer and strides; its gradient goes to ``dbias`` with strides (outer batch, inner batch, head, key).
    A mask beside them comes in the same two ways. ``group`` query heads share a key head. With ``splits`` they are dealt out in so many
    parts, which count as key heads above; each part's sums of dk and dv go to dk_parts and dv_parts, float32 and contiguous (batch, part,
    whole tiles of keys, padded dim). cap: see ``features.tanh``; dropout: see ``philox_of``; bounds: as of the forward kernel, between
    which queries. None: absent, or not wanted. QK, OV: columns of q and k, of dout and v that are multiplied.

    LOOPS: "both" for a kernel that chooses by ``small_lse``, the flags of ``preprocess``, or has no use for them. Long problems launch two
    kernels instead, "small" and "any", each of which has one loop and leaves at once where the flags say that the other one works.
    """
    if LOOPS != "both":
        if (all_lse_small(small_lse) != 0) != (LOOPS == "small"):
            return
    DT: gl.constexpr = q_desc.dtype
    BM: gl.constexpr = C.block_m
    KEYS: gl.constexpr = 2 * C.kv_stages
    BIASES: gl.constexpr = 2 * C.bias_stages
    DQ_WARPGROUP: gl.constexpr = C.dq_warpgroup and dq_desc is not None
    NEED_DK: gl.constexpr = dk_desc is not None or dk_parts is not None
    NEED_DV: gl.constexpr = dv_desc is not None or dv_parts is not None
    NEED_DB: gl.constexpr = dbias is not None
    NEED_DS: gl.constexpr = dq_desc is not None or dq_sum is not None or NEED_DK or NEED_DB
    q_s = gl.allocate_shared_memory(DT, stacked(C.q_stages, q_desc.block_shape), q_desc.layout)
    o_s = gl.allocate_shared_memory(DT, stacked(C.o_stages, o_desc.block_shape), o_desc.layout)
    k_s = gl.allocate_shared_memory(DT, stacked(KEYS, k_desc.block_shape), k_desc.layout)
    v_s = gl.allocate_shared_memory(DT, stacked(KEYS, v_desc.block_shape), v_desc.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, stacked(C.q_stages, stats_desc.block_shape), stats_desc.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, stacked(C.o_stages, stats_desc.block_shape), stats_desc.layout)
    if HAS_REST:
        rest_s = gl.allocate_shared_memory(gl.float32, stacked(C.q_stages, stats_desc.block_shape), stats_desc.layout)
    else:
        rest_s = None
    if bias_desc is not None:
        bias_s = gl.allocate_shared_memory(bias_desc.dtype, stacked(BIASES, bias_desc.block_shape), bias_desc.layout)
    else:
        bias_s = None
    if mask_desc is not None:
        mask_s = gl.allocate_shared_memory(mask_desc.dtype, stacked(BIASES, mask_desc.block_shape), mask_desc.layout)
    else:
        mask_s = None
    if dq_desc is not None or dq_sum is not None:
        SWIZZLED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, C.block_n // 2], DT)
        ds_s = gl.allocate_shared_memory(DT, [4, BM, C.block_n // 2], SWIZZLED)
    else:
        ds_s = None
    if C.dq_blocks > 0 and dq_desc is not None:
        SUMS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, q_desc.block_shape[3]], gl.float32)
        dq_s = gl.allocate_shared_memory(gl.float32, [C.dq_blocks, BM, q_desc.block_shape[3]], SUMS)
    elif dq_desc is not None:
        dq_s = gl.allocate_shared_memory(gl.float32, stacked(4 if DQ_WARPGROUP else 2, dq_desc.block_shape), dq_desc.layout)
    else:
        dq_s = None
    row_s = None
    ones_s = None
    if ROW_BY_MMA:
        row_s = operand(2, C.block_n // 2, 0.0)
        ones_s = operand(1, BM, 1.0)
    kv = ring(C.kv_stages, 1, 2, True)
    q_full = barriers(C.q_stages, 1)
    o_full = barriers(C.o_stages, 1)
    bias_full = barriers(BIASES, 1)
    ds_empty = barriers(2, 1)
    dq_empty = barriers(2, 1)
    consumers_done = barriers(1, 2)
    fence_async_shared()

    p = Program(
        small_lse, dk_desc, dv_desc, dk_parts, dv_parts, dbias, bias, lengths, packed, bounds, slopes, q_s, k_s, v_s, o_s, lse_s, delta_s,
        rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum, row_s, ones_s, kv, q_full, o_full, bias_full, ds_empty, dq_empty,
        consumers_done, bias_strides, dbias_strides, slope_strides, cap, dropout, mask, mask_strides, batch, heads, group, splits,
        batch_inner, M, N, lo, hi, scale, tiles_n, tiles, l2_group, serpentine, C, NEED_DK, NEED_DV, NEED_DB, NEED_DS, DQ_WARPGROUP, ROW,
        IS_MASK, EVEN_N, ALIBI, BATCH_FASTEST, LONGEST, SUM_BY_MMA, LOOPS, QK, OV, SKIPS,
    )  # fmt: skip
    f = Feed(q_desc, k_desc, v_desc, o_desc, stats_desc, bias_desc, bias_on, mask_desc, mask_on)
    if DQ_WARPGROUP and C.dq_blocks > 0:
        gl.warp_specialize(
            [(_consume_either, (p, 0)), (_consume_either, (p, 1)), (run_dq_of_pairs, (p, dq_desc)), (_produce, (p, f))],
            [4, 4, 1], [208, 72, 24],
        )  # fmt: skip
    elif DQ_WARPGROUP:
        gl.warp_specialize(
            [(_consume_either, (p, 0)), (_consume_either, (p, 1)), (run_dq_warpgroup, (p, dq_desc)), (_produce, (p, f))],
            [4, 4, 1], [208, 72, 24],
        )  # fmt: skip
    elif dq_desc is not None:
        gl.warp_specialize(
            [(_consume_either, (p, 0)), (_consume_either, (p, 1)), (_produce, (p, f)), (add_dq_by_tma, (p, dq_desc))],
            [4, 1, 1],
            [240, 24, 24],
        )
    else:
        gl.warp_specialize([(_consume_either, (p, 0)), (_consume_either, (p, 1)), (_produce, (p, f))], [4, 1], [240, 24])
