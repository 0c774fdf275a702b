"""The forward kernel for Hopper. Launched by ``launch/hopper.py``.

A CTA is one producer warp and one to three consumer warpgroups. The producer loads Q, K, V and bias tiles by TMA into rings of buffers
(``forward_loads.py``). Each consumer owns 64 queries and folds K and V blocks into registers. Every buffer has two mbarriers, full and
empty. The grid is persistent: a CTA works through several tiles, so the loads of a tile run under the arithmetic of the one before.

A step of a consumer issues q kᵀ of block j and p v of block j - 1; the softmax of block j runs under the latter (FlashAttention-3, Shah et
al. 2024). K of block j and V of block j - 1 share one barrier, which saves a wait and an arrive per step. With ``ping_pong`` the consumers
issue their MMAs in turn, so that the softmax of one runs under the MMAs of another.

Blocks run from the last that a tile sees to its first; ``softmax.py`` has the recurrence. A variable that changes inside a loop is
recomputed from loop-carried scalars where that is cheap: Triton 3.6 failed to carry one that is reassigned only under a condition.
"""

from ..triton.prims import LN2, LOG2E, offset
from .blocks import (
    as_rows,
    block_at,
    buffers_of,
    clear_masked_block,
    into_blocks,
    leave_block,
    one_of,
    over_blocks,
    store_block,
)
from .compat import fence_async_shared, gl, gluon, mbarrier, record, tma_store_wait, warpgroup_mma_wait
from .dropout import drop, keep_bits, philox_of
from .extent import Extent, extent_of, lse_row, query_place
from .features import opaque, slope_of
from .forward_loads import Feed, produce
from .layouts import accumulator, stacked
from .products import Pieces, left_operand, pieces, times_rows, waited, zeros_of
from .rings import Ring, barriers, ring
from .scores_qk import BM, bare_blocks, block_of, column_of, grid_of, row_in, visible_blocks
from .softmax import by_row, rescaled, rescaled_accumulator, softmax


@record
class Program:
    """What all partitions of a CTA share. C: the configuration (``plan/kernels/forward.ForwardConfig``); the rest as of ``forward``."""

    out: object
    bias: object
    lengths: object
    packed: object
    bounds: object
    slopes: object
    sink: object
    lse: object
    rest: object
    q_s: object
    k_s: object
    v_s: object
    out_s: object
    bias_s: object
    second_s: object
    mask_s: object
    queries: Ring
    kv: Ring
    biases: Ring
    ping_pong: object
    bias_strides: object
    slope_strides: object
    sink_stride: object
    cap: object
    dropout: object
    batch: object
    heads: object
    batch_inner: object
    M: object
    N: object
    lo: object
    hi: object
    scale_log2: object
    tiles_m: object
    tiles: object
    l2_group: object
    serpentine: object
    C: gl.constexpr
    BATCH_FASTEST: gl.constexpr
    IS_MASK: gl.constexpr
    VARIES_M: gl.constexpr
    POSITIVE_SCALE: gl.constexpr
    EVEN_N: gl.constexpr
    ALIBI: gl.constexpr
    FUSING: gl.constexpr
    QK: gl.constexpr
    OV: gl.constexpr
    SKIPS: gl.constexpr


@record
class Rows:
    """A consumer's 64 queries of a tile, from m0 on. row_bias: a number each; slope: of ALiBi; philox: of dropout."""

    x: Extent
    m0: object
    row_bias: object
    slope: object
    philox: object


@record
class Walk:
    """A tile's ``steps`` blocks of keys, the last of which ends at block ``end``; done: blocks of the program's earlier tiles. bare: those
    without tiles of the mask, of which the earlier tiles had ``masks``.
    """

    q_slot: object
    done: object
    steps: object
    end: object
    bare: object
    masks: object


@gluon.jit
def _rows(p, x, m0, row_bias, slope, philox):
    if p.bias is not None:
        return Rows(x, m0, row_bias, slope, philox)
    else:
        return Rows(x, m0, None, slope, philox)


@gluon.jit
def _bias_of(p, at, WG: gl.constexpr):
    """A consumer's tile of the bias, of block ``at``, or a row of it for all queries."""
    BN: gl.constexpr = p.C.block_n
    S: gl.constexpr = accumulator(BN)
    p.biases.wait(at, WG)
    tile = p.bias_s.index(p.biases.slot(at, WG))
    if p.VARIES_M:
        return tile.reshape([BM, BN]).load(S)
    else:
        WIDE: gl.constexpr = p.bias_s.shape[-1]  # at least 128 bytes, which is what a buffer of TMA must be aligned to
        return gl.expand_dims(tile.reshape([WIDE]).slice(0, BN).load(gl.SliceLayout(0, S)), 0)


@gluon.jit
def _second_of(p, at, WG: gl.constexpr):
    """A row of the second bias, which comes with the first one's tile."""
    return row_in(p.second_s.index(p.biases.slot(at, WG)), p.C.block_n)


@gluon.jit
def _release_bias(p, at, WG: gl.constexpr):
    """Give a bias buffer back, and those of the second bias and the mask beside it.

    The fence is needed: a load from shared memory can wait behind WGMMA operands, even after its thread has passed a barrier, and TMA would
    overwrite the tile before it is read.
    """
    fence_async_shared()
    p.biases.release(at, WG)


@gluon.jit
def _finish(p, o, l, m, target, x, m0, head):
    """Divide O by the row sums, and write O (through the shared block ``target``), lse and rest of 64 queries."""
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(p.C.block_n))
    l, m = by_row(l, m, ROWS)
    weight = gl.full([BM], 1.0, gl.float32, ROWS)
    if p.sink is not None:  # one more key, with value 0
        z = gl.load(p.sink + offset(head, p.sink_stride)).to(gl.float32) * LOG2E
        top = gl.maximum(m, z)
        weight = gl.exp2(m - top)
        l = l * weight + gl.exp2(z - top)
        m = top
    if p.dropout is not None:  # the factor of kept probabilities
        weight = weight * p.dropout[2]
    unseen = l == 0.0
    l = gl.where(unseen, 1.0, l)
    o = times_rows(o, weight / l)
    tma_store_wait(0)  # what this buffer held before must have left it
    if p.out.second is not None:
        store_block(as_rows(target, BM), o)
    else:  # where O leaves through Q's buffers, it may take the first of two
        store_block(as_rows(Pieces(target.first, None), BM), o)
    fence_async_shared()
    leave_block(p, p.out, query_place(x, m0), head, target)
    i = m0 + gl.arange(0, BM, ROWS)
    row_lse = gl.where(unseen, float("-inf"), (m + gl.log2(l)) * LN2)
    at_row = lse_row(p, x, head) + i
    gl.store(p.lse + at_row, row_lse, mask=i < x.queries)
    if p.rest is not None:  # as lse_rest and join_rest of the portable kernels have it
        again = gl.where(unseen, 0.0, row_lse * LOG2E)
        off = m - again
        log2_sum = gl.log2(l)
        far = ((off > 256.0) | (off < -256.0)) & (log2_sum >= 0.0) & (log2_sum < 64.0)
        lost = gl.where(far, off * (1.0 + log2_sum * (1 / 128)), off + log2_sum)
        gl.store(p.rest + at_row, gl.where(unseen, 0.0, lost), mask=i < x.queries)


@gluon.jit
def _rescaled(o, factor):
    """``rescaled_accumulator`` of each piece."""
    if o.second is None:
        return Pieces(rescaled_accumulator(o.first, factor), None)
    else:
        return Pieces(rescaled_accumulator(o.first, factor), rescaled_accumulator(o.second, factor))


@gluon.jit
def _walk(p, t, w, o, l, m, weights, first, last, WG: gl.constexpr, MASKED: gl.constexpr, BARE: gl.constexpr):
    """Steps ``first … last`` of a tile: q kᵀ of a block, and p v of the block before, of which ``weights`` are p, under its softmax.
    MASKED: a band may hide some of it. BARE: a mask hides nothing of it.
    """
    BN: gl.constexpr = p.C.block_n
    BDV: gl.constexpr = p.v_s.first.shape[-1]
    P: gl.constexpr = left_operand(p.OV, BDV)
    EARLY: gl.constexpr = p.bias_s is not None and p.mask_s is None and not p.IS_MASK  # mask bytes take many instructions
    TILES: gl.constexpr = p.bias_s is not None and not BARE
    nothing = gl.zeros([BM, BN], gl.float32, accumulator(BN))
    q_slot = w.q_slot
    if p.C.q_stages > 1:
        # ptxas 12.8 shares the Q descriptors of two such loops and computes them in the first, which may have no steps.
        q_slot = opaque(q_slot)
    q = block_at(p.q_s, q_slot, BM)
    for step in range(first, last):
        at = w.done + step
        block, bias_at = block_of(p, w, step, MASKED, BARE)
        n0 = block * BN
        stage = p.kv.slot(at, 0)
        bias = None
        second = None
        if EARLY:  # before the MMAs, behind whose operands it would wait
            bias = _bias_of(p, at, WG)
            if p.second_s is not None:
                second = _second_of(p, at, WG)
        p.kv.wait(at, 0)
        if p.C.ping_pong:
            mbarrier.wait(p.ping_pong[WG].index(0), at & 1)
        k = block_at(p.k_s, stage, BN)
        s_pending = over_blocks(q, k, nothing, p.QK)
        if EARLY:
            _release_bias(p, at, WG)
        o_pending = into_blocks(weights, block_at(p.v_s, stage, BN), o)
        if p.C.ping_pong:
            mbarrier.arrive(p.ping_pong[(WG + 1) % p.C.consumers].index(0))
        s = warpgroup_mma_wait(pieces(p.OV, BDV), [s_pending])
        if p.C.separate_o:
            if step == w.steps - 1:  # no more MMAs with this q: the next can be fetched while the softmax runs
                mbarrier.arrive(p.queries.empty.index(q_slot))
        mask_tile = None
        if p.mask_s is not None:
            mask_tile = p.mask_s.index(p.biases.slot(at, WG))
        if TILES and not EARLY:
            bias = _bias_of(p, bias_at, WG)
            if p.second_s is not None:
                second = _second_of(p, at, WG)
        s, p16, more, m = softmax(p, t, s, bias, second, mask_tile, m, n0, MASKED, False)
        if TILES and not EARLY:
            _release_bias(p, bias_at, WG)
        o = waited(0, o_pending)
        p.kv.release(at, 0)
        p16, more, m, factor = rescaled(p, t, s, p16, more, m, bias)
        l = l * factor + more
        if t.philox is not None:  # earlier, the bits would take registers that the softmax needs
            p16 = drop(p16, keep_bits(t.philox, t.m0, n0, BM, BN, False))
        weights = gl.convert_layout(p16, P)
        o = _rescaled(o, factor)
    return o, l, m, weights


@gluon.jit
def _consume(p, WG: gl.constexpr):
    """One consumer: 64 queries of every tile of the program.

    With a buffer for the output, the first step of a tile also issues the last p v of the tile before, which is finished under it.
    """
    BN: gl.constexpr = p.C.block_n
    BDV: gl.constexpr = p.v_s.first.shape[-1]
    P: gl.constexpr = left_operand(p.OV, BDV)
    MASKED: gl.constexpr = (p.lo is not None) or (p.hi is not None) or (not p.EVEN_N)
    OVERLAP: gl.constexpr = p.C.separate_o
    CUT: gl.constexpr = p.lengths is not None
    nothing = gl.zeros([BM, BN], gl.float32, accumulator(BN))
    grid = grid_of(p, 1)
    waves = grid.waves()
    done = 0  # blocks of earlier tiles
    masks = 0  # and tiles of the mask

    m0, head, b = grid.locate(0)
    first_x = extent_of(p, b)
    _begin, _full_begin, _full_end, first_end = visible_blocks(p, first_x, m0, head)
    m0 += WG * BM
    row_bias = column_of(p, first_x, m0, head, BM, BN)
    p.queries.wait(0, WG)
    p.kv.wait(0, 0)
    if p.C.ping_pong:
        mbarrier.wait(p.ping_pong[WG].index(0), 0)
    q = block_at(p.q_s, WG, BM)
    s_pending = over_blocks(q, block_at(p.k_s, 0, BN), nothing, p.QK)
    if p.C.ping_pong:
        mbarrier.arrive(p.ping_pong[(WG + 1) % p.C.consumers].index(0))
    s = warpgroup_mma_wait(0, [s_pending])
    p.kv.release(0, 0)
    first_bias = None
    first_second = None
    first_mask = None
    if p.bias_s is not None:
        first_bias = _bias_of(p, 0, WG)
    if p.second_s is not None:
        first_second = _second_of(p, 0, WG)
    if p.mask_s is not None:
        first_mask = p.mask_s.index(WG)
    first_slope = slope_of(p.slopes, p.slope_strides, first_x.b, head)
    first_n0 = (first_end - 1) * BN
    first_t = _rows(p, first_x, m0, row_bias, first_slope, None)
    _scores, p16, l, m = softmax(p, first_t, s, first_bias, first_second, first_mask, None, first_n0, MASKED, CUT)
    if p.bias_s is not None:
        _release_bias(p, 0, WG)
    if p.dropout is not None:
        p16 = drop(p16, keep_bits(philox_of(p.dropout, first_x.b, head, p.heads), m0, first_n0, BM, BN, False))
    weights = gl.convert_layout(p16, P)
    o = zeros_of(BM, p.OV, BDV)
    for wave in range(waves):
        q_slot = p.queries.slot(wave, WG)
        # The first block of this tile has been scored. What is left: partly visible on the right, whole, partly visible on the left.
        x = extent_of(p, b)
        slope = slope_of(p.slopes, p.slope_strides, x.b, head)
        philox = None
        if p.dropout is not None:
            philox = philox_of(p.dropout, x.b, head, p.heads)
        begin, full_begin, full_end, end = visible_blocks(p, x, m0 - WG * BM, head)
        steps = end - begin
        if p.lengths is not None:
            if (end * BN > x.keys) & (x.keys < p.N):  # no other block of a tile is cut by a length
                p.kv.wait(done + 1, 0)
                clear_masked_block(block_at(p.v_s, p.kv.slot(done + 1, 0), BN), x.keys - (end - 1) * BN)
        if OVERLAP:
            if steps == 1:
                mbarrier.arrive(p.queries.empty.index(q_slot))
        t = _rows(p, x, m0, row_bias, slope, philox)
        bare = bare_blocks(p, x, m0 - WG * BM, head, full_begin, full_end, end)
        w = Walk(q_slot, done, steps, end, bare, masks)
        if (p.hi is not None) or (p.packed is not None):
            o, l, m, weights = _walk(p, t, w, o, l, m, weights, 1, end - full_end, WG, True, False)
        whole = max(1, end - full_end)
        if p.SKIPS:  # first those of which the mask hides something
            first_bare = end - full_begin - (bare.end - bare.begin)
            o, l, m, weights = _walk(p, t, w, o, l, m, weights, whole, first_bare, WG, False, False)
            o, l, m, weights = _walk(p, t, w, o, l, m, weights, first_bare, end - full_begin, WG, False, True)
            masks += steps - (bare.end - bare.begin)
        else:
            o, l, m, weights = _walk(p, t, w, o, l, m, weights, whole, end - full_begin, WG, False, False)
        if p.lo is not None:
            left = max(1, end - full_begin)
            o, l, m, weights = _walk(p, t, w, o, l, m, weights, left, steps, WG, True, False)
        done += steps
        stage = p.kv.slot(done, 0)
        if not OVERLAP:  # O leaves through Q's buffer, so the next tile begins when it has left
            p.kv.wait(done, 0)
            o = waited(0, into_blocks(weights, block_at(p.v_s, stage, BN), o))
            _finish(p, o, l, m, one_of(p.q_s, WG), x, m0, head)
            tma_store_wait(0)
            mbarrier.arrive(p.queries.empty.index(WG))
        if wave + 1 < waves:  # the first block of the next tile, and under it the last MMA of this one
            old_m0 = m0
            old_head = head
            p.queries.wait(wave + 1, WG)
            p.kv.wait(done, 0)
            if p.C.ping_pong:
                mbarrier.wait(p.ping_pong[WG].index(0), done & 1)
            next_q = block_at(p.q_s, p.queries.slot(wave + 1, WG), BM)
            k = block_at(p.k_s, stage, BN)
            next_pending = over_blocks(next_q, k, nothing, p.QK)
            if OVERLAP:
                o_pending = into_blocks(weights, block_at(p.v_s, stage, BN), o)
            if p.C.ping_pong:
                mbarrier.arrive(p.ping_pong[(WG + 1) % p.C.consumers].index(0))
            # Where the next tile lies takes some divisions, which run under its first MMA.
            m0, head, b = grid.locate(wave + 1)
            next_x = extent_of(p, b)
            _begin, _full_begin, _full_end, next_end = visible_blocks(p, next_x, m0, head)
            m0 += WG * BM
            row_bias = column_of(p, next_x, m0, head, BM, BN)
            if OVERLAP:
                next_s = warpgroup_mma_wait(pieces(p.OV, BDV), [next_pending])
            else:
                next_s = warpgroup_mma_wait(0, [next_pending])
                p.kv.release(done, 0)
            next_bias = None
            next_second = None
            next_mask = None
            bias_at = done
            if p.SKIPS:
                bias_at = masks
            if p.bias_s is not None:
                next_bias = _bias_of(p, bias_at, WG)
            if p.second_s is not None:
                next_second = _second_of(p, done, WG)
            if p.mask_s is not None:
                next_mask = p.mask_s.index(p.biases.slot(done, WG))
            next_slope = slope_of(p.slopes, p.slope_strides, next_x.b, head)
            next_n0 = (next_end - 1) * BN
            next_t = _rows(p, next_x, m0, row_bias, next_slope, None)
            _scores, next_p16, new_l, new_m = softmax(p, next_t, next_s, next_bias, next_second, next_mask, None, next_n0, MASKED, CUT)
            if p.bias_s is not None:
                _release_bias(p, bias_at, WG)
            if OVERLAP:
                o = waited(0, o_pending)
                p.kv.release(done, 0)
            if p.dropout is not None:
                next_p16 = drop(next_p16, keep_bits(philox_of(p.dropout, next_x.b, head, p.heads), m0, next_n0, BM, BN, False))
            weights = gl.convert_layout(next_p16, P)
            if OVERLAP:
                _finish(p, o, l, m, one_of(p.out_s, WG), x, old_m0, old_head)
            m = new_m
            l = new_l
            o = zeros_of(BM, p.OV, BDV)
    if OVERLAP:
        p.kv.wait(done, 0)
        v = block_at(p.v_s, p.kv.slot(done, 0), BN)
        o = waited(0, into_blocks(weights, v, o))
        _finish(p, o, l, m, one_of(p.out_s, WG), extent_of(p, b), m0, head)
        tma_store_wait(0)


# Not specialised: nothing is gained from knowing that a count is 1 or a multiple of 16, and every combination would be compiled anew.
COUNTS = ["bounds", "batch", "heads", "group", "batch_inner", "M", "N", "lo", "hi", "tiles_m", "tiles", "l2_group", "serpentine"]


@gluon.jit(do_not_specialize=COUNTS)
def forward(
    q_desc, k_desc, v_desc, out_desc, bias_desc, bias, lengths, packed, bounds, slopes, sink, lse, rest, bias_strides, bias_on,
    slope_strides, sink_stride, cap, dropout, second_desc, second_on, mask_desc, mask_on, q_tail, k_tail, v_tail, out_tail,
    batch, heads, group, batch_inner, M, N, lo, hi, scale, tiles_m, tiles, l2_group, serpentine,
    C: gl.constexpr, BATCH_FASTEST: gl.constexpr, IS_MASK: gl.constexpr, VARIES_M: gl.constexpr, POSITIVE_SCALE: gl.constexpr,
    EVEN_N: gl.constexpr, ALIBI: gl.constexpr, FUSING: gl.constexpr, QK: gl.constexpr, OV: gl.constexpr, SKIPS: gl.constexpr,
):  # fmt: skip
    """Tiles of 64 queries a consumer: ``tiles`` of them, ``tiles_m`` a (batch, head) pair, dealt out by ``schedule.Uniform``.

    Descriptors of q, k, v, out are over (batch, length, head, dim) with blocks [1, rows, 1, dims], or of the first of these dims, and the
    tails of those behind them (``Pieces``); that of the bias over its five dims, whose broadcast ones have size 1 and are switched off by a
    0 in ``bias_on``. A bias without a dim of keys comes as a pointer and strides (outer batch, inner batch, head, query) instead. A second
    bias, which varies over keys alone, comes as the first does, a row with every tile of it. lse and rest are contiguous (batch, head,
    query). ``group`` query heads share a key head. lengths: visible keys by batch; slopes: of ALiBi, by strides (batch, head); sink: by
    head; cap: see ``features.tanh``; dropout: see ``philox_of``; mask: beside the bias, a tile or a row with every tile of it; bounds:
    between which keys a mask, beside a bias or not, shows anything (``extent.mask_range``), and perhaps everything, whose blocks are then
    visited without it. None: absent.

    C: the configuration. Without its ``separate_o``, O leaves through Q's buffer, and the next tile begins when it has left. FUSING: see
    ``softmax``. QK, OV: columns of q and k, of v and O that are multiplied.
    """
    WGS: gl.constexpr = C.consumers
    STAGES: gl.constexpr = C.kv_stages
    BIASES: gl.constexpr = C.bias_stages * WGS
    q, k, v, out = Pieces(q_desc, q_tail), Pieces(k_desc, k_tail), Pieces(v_desc, v_tail), Pieces(out_desc, out_tail)
    q_s = buffers_of(C.q_stages * WGS, q)
    k_s = buffers_of(STAGES, k)
    v_s = buffers_of(STAGES, v)
    if C.separate_o:
        out_s = buffers_of(WGS, out)
    else:
        out_s = None
    if bias_desc is not None:
        bias_s = gl.allocate_shared_memory(bias_desc.dtype, stacked(BIASES, bias_desc.block_shape), bias_desc.layout)
    else:
        bias_s = None
    if second_desc is not None:
        second_s = gl.allocate_shared_memory(second_desc.dtype, stacked(BIASES, second_desc.block_shape), second_desc.layout)
    else:
        second_s = None
    if mask_desc is not None:
        mask_s = gl.allocate_shared_memory(mask_desc.dtype, stacked(BIASES, mask_desc.block_shape), mask_desc.layout)
    else:
        mask_s = None
    queries = ring(C.q_stages, WGS, 1, False)
    kv = ring(STAGES, 1, WGS, False)
    biases = ring(C.bias_stages, WGS, 1, False)
    ping_pong = (barriers(1, 1), barriers(1, 1), barriers(1, 1))
    fence_async_shared()
    if C.ping_pong:
        mbarrier.arrive(ping_pong[0].index(0))

    p = Program(
        out, bias, lengths, packed, bounds, slopes, sink, lse, rest, q_s, k_s, v_s, out_s, bias_s, second_s, mask_s, queries, kv, biases,
        ping_pong,
        bias_strides, slope_strides, sink_stride, cap, dropout, batch, heads, batch_inner, M, N, lo, hi, scale * LOG2E, tiles_m,
        tiles, l2_group, serpentine, C, BATCH_FASTEST, IS_MASK, VARIES_M, POSITIVE_SCALE, EVEN_N, ALIBI, FUSING, QK, OV, SKIPS,
    )  # fmt: skip
    f = Feed(q, k, v, bias_desc, bias_on, second_desc, second_on, mask_desc, mask_on, group)
    if WGS == 1:
        gl.warp_specialize([(_consume, (p, 0)), (produce, (p, f))], [1], [24])
    elif WGS == 2:
        gl.warp_specialize([(_consume, (p, 0)), (_consume, (p, 1)), (produce, (p, f))], [4, 1], [C.registers, 24])
    else:
        gl.warp_specialize(
            [(_consume, (p, 0)), (_consume, (p, 1)), (_consume, (p, 2)), (produce, (p, f))], [4, 4, 1], [C.registers, C.registers, 24]
        )
