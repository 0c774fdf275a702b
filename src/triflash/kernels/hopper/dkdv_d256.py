"""The backward kernel for Hopper that owns keys, for head dims above 128: dk and dv. Launched by ``launch/hopper_backward.py``.

dk and dv of 64 keys with 256 dims fill a consumer's registers each, so the two consumers split the work by MMA, not by key as in
``dkdv.py``: one computes sᵀ, pᵀ and ``dv += pᵀ dout``, the other dpᵀ, dsᵀ and ``dk += scale dsᵀ q``. pᵀ goes from the first to the second
through shared memory in q's dtype, in which it is the operand of dv anyway. The second MMA of a block runs under the first of the next. dq
comes from ``dq.py``. dv leaves through the buffer of k, which only its consumer reads, and dk through that of v; where they are not of the
same width (``SWAPPED``), through those of v and k, once the consumers have met.
"""

from ..triton.prims import LOG2E
from .blocks import (
    as_rows,
    block_at,
    buffer_of,
    buffers_of,
    clear_masked_block,
    held_block,
    into_blocks,
    leave_block,
    over_blocks,
    over_held_block,
    store_block,
)
from .compat import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    record,
    tma_store_wait,
    warpgroup_mma_wait,
)
from .dkdv_d256_loads import Feed, produce
from .dropout import drop, ds_of, keep_bits, philox_of, sign_dropped
from .extent import Extent, extent_of, key_place
from .features import all_lse_small, slope_of
from .layouts import accumulator, stacked
from .products import Pieces, left_operand, pieces, times, waited, zeros_of
from .rings import Ring, bar_sync, ring
from .scores_kq import (
    Blocks,
    bare_blocks,
    block_in,
    grid_of,
    hiding_and_bare,
    of_keys,
    probabilities,
    store_dbias,
    visible_blocks,
)

TILE_DONE = gl.constexpr(5)  # the named barrier at which both consumers meet, once neither reads a tile's keys and values any more


@record
class Program:
    """What all partitions of a CTA share. C: the configuration (``plan/kernels/dkdv.DkdvConfig``); the rest as of ``dkdv.dkdv``."""

    small_lse: object
    dk: object
    dv: object
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
    p_s: object
    kv: Ring
    queries: Ring
    douts: Ring
    weights: Ring
    biases: Ring
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
    NEED_DS: gl.constexpr
    IS_MASK: gl.constexpr
    EVEN_N: gl.constexpr
    ALIBI: gl.constexpr
    BATCH_FASTEST: gl.constexpr
    LONGEST: gl.constexpr
    LOOPS: gl.constexpr
    QK: gl.constexpr
    OV: gl.constexpr
    SKIPS: gl.constexpr


@record
class Keys:
    """The 64 keys of a tile, from n0 on, and what they have for one query head. Numbers of blocks as in ``dkdv.Keys``."""

    x: Extent
    n0: object
    key_bias: object
    key_mask: object
    slope: object
    philox: object
    scale_log2: object
    done: object
    base: object
    SMALL_LSE: gl.constexpr


@gluon.jit
def _weights(p, at):
    """``(slot, phase)`` of the buffer of pᵀ of block ``at``."""
    if p.C.p_stages == 2:
        return at & 1, (at >> 1) & 1
    else:
        return 0, at & 1


@gluon.jit
def _walk_values(p, t, k, dv, operand, blocks, MASKED: gl.constexpr, BARE: gl.constexpr):
    """Score the query blocks ``blocks``, MASKED by a band or not, or BARE of the mask that others have tiles of; ``dv += pᵀ dout`` of each
    one is started in the step of the next, from ``operand``.
    """
    BM: gl.constexpr = p.C.block_m
    BN: gl.constexpr = p.C.block_n
    BDV: gl.constexpr = p.v_s.first.shape[-1]
    S: gl.constexpr = accumulator(BM)
    COLS: gl.constexpr = gl.SliceLayout(0, S)
    P: gl.constexpr = left_operand(p.OV, BDV)
    NEED_DV: gl.constexpr = p.dv.first is not None
    DROPPED: gl.constexpr = t.philox is not None
    ASKS: gl.constexpr = p.packed is not None and p.bias_s is not None
    UNDROPPED: gl.constexpr = p.p_s.shape[0] == 2 * p.C.p_stages  # the other consumer asks for these too
    BIASED: gl.constexpr = p.bias_s is not None and not BARE
    nothing = gl.zeros([BN, BM], gl.float32, S)
    for block in range(blocks.start, blocks.stop):
        at = t.base + block
        stage = p.queries.slot(at, 0)
        phase = p.queries.phase(at)
        go = at > t.done
        mbarrier.wait(p.queries.full.index(stage), phase)
        q = block_at(p.q_s, stage, BM)
        if p.C.hold_k:
            s_pending = over_held_block(k, q, nothing)
        else:
            s_pending = over_blocks(k, q, nothing, p.QK)
        lse = gl.expand_dims(p.lse_s.index(stage).reshape([BM]).load(COLS), 0)
        m0 = block * BM
        if (p.ALIBI or DROPPED or ASKS) and not MASKED:
            m0 = block_in(p, blocks, block, t.n0, BM) * BM
        before = at - go.to(gl.int32)  # a tile's first step has p = 0 for the block before, and takes dout of its own
        if NEED_DV:
            p.douts.wait(before, 0)
            dv_pending = into_blocks(operand, block_at(p.o_s, p.douts.slot(before, 0), BM), dv)
        if DROPPED:  # under the MMAs
            bits = keep_bits(t.philox, m0, t.n0, BN, BM, True)
        if NEED_DV:
            s = warpgroup_mma_wait(pieces(p.OV, BDV), [s_pending])
        else:
            s = warpgroup_mma_wait(0, [s_pending])
        bias = None
        mask = None
        bias_at = at
        if p.SKIPS:
            bias_at += blocks.masks
        if BIASED or p.mask_s is not None:
            p.biases.wait(bias_at, 0)
        if p.mask_s is not None:
            mask = p.mask_s.reshape([BM, BN]).permute((1, 0)).load(S)
        if BIASED:
            bias = p.bias_s.reshape([BM, BN]).permute((1, 0)).load(S)
        rest = None
        if p.rest_s is not None:
            rest = gl.expand_dims(p.rest_s.index(stage).reshape([BM]).load(COLS), 0)
        p16, weight = probabilities(p, t, s, bias, mask, lse, rest, m0, t.n0, MASKED, p.q_s.first.dtype)
        undropped = p16
        if DROPPED:
            if p.NEED_DS and UNDROPPED:
                undropped = sign_dropped(p16.to(gl.float32), bits).to(p.k_s.first.dtype)
            if p.NEED_DS:
                weight = sign_dropped(weight, bits)
            if NEED_DV:
                p16 = drop(p16, bits)
        if p.NEED_DS:
            slot, filled = _weights(p, at)
            mbarrier.wait(p.weights.empty.index(slot), filled ^ 1)
            p.p_s.index(slot).permute((1, 0)).store(weight.to(p.k_s.first.dtype))
            if UNDROPPED:
                p.p_s.index(p.C.p_stages + slot).permute((1, 0)).store(undropped)
        fence_async_shared()  # before buffers that were read by plain loads go back to TMA
        p.queries.release(at, 0)
        if BIASED or p.mask_s is not None:
            p.biases.release(bias_at, 0)
        if p.NEED_DS:
            slot, _filled = _weights(p, at)
            mbarrier.arrive(p.weights.full.index(slot))
        if NEED_DV:
            dv = waited(0, dv_pending)
            if go:
                p.douts.release(before, 0)
        operand = gl.convert_layout(p16, P)
    return dv, operand


@gluon.jit
def _values(p, SMALL_LSE: gl.constexpr):
    """The consumer of scores: pᵀ for itself and for the other one, and dv."""
    BM: gl.constexpr = p.C.block_m
    BN: gl.constexpr = p.C.block_n
    BDV: gl.constexpr = p.v_s.first.shape[-1]
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BM))
    P: gl.constexpr = left_operand(p.OV, BDV)
    DT: gl.constexpr = p.k_s.first.dtype
    SWAPPED: gl.constexpr = p.C.own_widths and p.QK != p.OV
    if SWAPPED:
        target = p.v_s
    else:
        target = p.k_s  # nobody else reads these keys
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
        dv = zeros_of(BN, p.OV, BDV)
        operand = gl.zeros([BN, BM], DT, P)
        p.kv.wait(wave, 0)
        if p.lengths is not None:
            if (steps > 0) & (x.keys < min(n0 + BN, p.N)):
                clear_masked_block(as_rows(p.k_s, BN), x.keys - n0)
        k = as_rows(p.k_s, BN)
        if p.C.hold_k:
            k = held_block(k, p.QK, BM)
        for member in range(p.group):
            slope = slope_of(p.slopes, p.slope_strides, x.b, kv_head * p.group + member)
            philox = None
            if p.dropout is not None:
                philox = philox_of(p.dropout, x.b, kv_head * p.group + member, p.heads)
            j = n0 + gl.arange(0, BN, ROWS)
            key_bias = gl.zeros([BN], gl.float32, ROWS)
            if p.bias is not None:
                key_bias = of_keys(p, p.bias, p.bias_strides, x, kv_head * p.group + member, j, 0).to(gl.float32)
            key_mask = None
            if p.mask is not None:
                key_mask = of_keys(p, p.mask, p.mask_strides, x, kv_head * p.group + member, j, 1)
            t = Keys(x, n0, key_bias, key_mask, slope, philox, scale_log2, done, done + member * steps - begin, SMALL_LSE)
            # Both masked walks are there whenever there is any bound, one of them perhaps without a block: with one of them missing, the
            # assembler of Triton 3.6 (12.8) serialises the MMAs (C7513).
            count = 0
            before = 0
            if p.SKIPS:
                count = bare.end - bare.begin
                before = masks - done - member * count
            if (p.hi is not None) or (p.lo is not None) or (not p.EVEN_N):
                dv, operand = _walk_values(p, t, k, dv, operand, Blocks(begin, whole, 0, 0, before), True, False)
            if p.SKIPS:  # first those of which the mask hides something
                hiding, others = hiding_and_bare(whole, part, bare, before)
                dv, operand = _walk_values(p, t, k, dv, operand, hiding, False, False)
                dv, operand = _walk_values(p, t, k, dv, operand, others, False, True)
            else:
                dv, operand = _walk_values(p, t, k, dv, operand, Blocks(whole, part, 0, 0, 0), False, False)
            if (p.lo is not None) or (p.hi is not None):
                dv, operand = _walk_values(p, t, k, dv, operand, Blocks(part, end, 0, 0, before - count), True, False)
        done += steps * p.group
        if p.SKIPS:
            masks += (steps - (bare.end - bare.begin)) * p.group
        if p.dv.first is not None:
            if steps > 0:
                p.douts.wait(done - 1, 0)
                dv = waited(0, into_blocks(operand, block_at(p.o_s, p.douts.slot(done - 1, 0), BM), dv))
                p.douts.release(done - 1, 0)
            if p.dropout is not None:
                dv = times(dv, p.dropout[2])
        if SWAPPED and p.NEED_DS:
            bar_sync(TILE_DONE, 256)
        if p.dv.first is not None:
            store_block(as_rows(target, BN), dv)
            fence_async_shared()
            leave_block(p, p.dv, key_place(x, n0), kv_head, target)
            tma_store_wait(0)
        p.kv.release(wave, 0)


@gluon.jit
def _values_either(p):
    """``_values`` with the faster loop if every lse is small (``preprocess.py``), or with the only one of LOOPS."""
    if p.LOOPS != "both":
        _values(p, p.LOOPS == "small")
    elif (p.small_lse is not None) and (all_lse_small(p.small_lse) != 0):
        _values(p, True)
    else:
        _values(p, False)


@gluon.jit
def _walk_keys(p, t, v, dk, db, ds16, first, last):
    """dsᵀ of the query blocks ``first … last``; ``dk += dsᵀ q`` of each one is started in the step of the next, from ``ds16``."""
    BM: gl.constexpr = p.C.block_m
    BN: gl.constexpr = p.C.block_n
    BD: gl.constexpr = p.k_s.first.shape[-1]
    S: gl.constexpr = accumulator(BM)
    COLS: gl.constexpr = gl.SliceLayout(0, S)
    P: gl.constexpr = left_operand(p.QK, BD)
    NEED_DK: gl.constexpr = p.dk.first is not None
    DROPPED: gl.constexpr = p.dropout is not None
    nothing = gl.zeros([BN, BM], gl.float32, S)
    for block in range(first, last):
        at = t.base + block
        stage = p.douts.slot(at, 0)
        go = at > t.done
        p.douts.wait(at, 0)
        o = block_at(p.o_s, stage, BM)
        if p.C.hold_v:
            dp_pending = over_held_block(v, o, nothing)
        else:
            dp_pending = over_blocks(v, o, nothing, p.OV)
        before = at - go.to(gl.int32)  # a tile's first step has ds = 0 for the block before, and takes q of its own
        if NEED_DK:
            p.queries.wait(before, 0)
            dk_pending = into_blocks(ds16, block_at(p.q_s, p.queries.slot(before, 0), BM), dk)
        delta = gl.expand_dims(p.delta_s.index(stage).reshape([BM]).load(COLS), 0)
        slot, filled = _weights(p, at)
        mbarrier.wait(p.weights.full.index(slot), filled)
        weight = p.p_s.index(slot).permute((1, 0)).load(S)
        dp = warpgroup_mma_wait(pieces(p.QK, BD) if NEED_DK else 0, [dp_pending])
        ds = ds_of(weight.to(gl.float32), dp, delta, DROPPED)
        if p.dbias is not None and p.p_s.shape[0] == 2 * p.C.p_stages:
            own = p.p_s.index(p.C.p_stages + slot).permute((1, 0)).load(S).to(gl.float32)
            db += gl.sum(ds_of(own, dp, delta, DROPPED), 1)
        elif p.dbias is not None:
            db += gl.sum(ds, 1)
        fence_async_shared()  # before buffers that were read by plain loads go back
        p.douts.release(at, 0)
        mbarrier.arrive(p.weights.empty.index(slot))
        if NEED_DK:
            dk = waited(0, dk_pending)
            if go:
                p.queries.release(before, 0)
            ds16 = gl.convert_layout(ds.to(p.v_s.first.dtype), P)
        else:
            p.queries.wait(at, 0)
            p.queries.release(at, 0)
    return dk, db, ds16


@gluon.jit
def _keys(p):
    """The consumer of dout: dsᵀ, dk, and the gradient of a bias that varies over keys alone."""
    BM: gl.constexpr = p.C.block_m
    BN: gl.constexpr = p.C.block_n
    BD: gl.constexpr = p.k_s.first.shape[-1]
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BM))
    P: gl.constexpr = left_operand(p.QK, BD)
    DT: gl.constexpr = p.v_s.first.dtype
    SWAPPED: gl.constexpr = p.C.own_widths and p.QK != p.OV
    if SWAPPED:
        target = p.k_s
    else:
        target = p.v_s  # nobody else reads these values
    grid = grid_of(p)
    done = 0
    for wave in range(grid.waves()):
        n0, kv_head, b = grid.locate(wave)
        x = extent_of(p, b)
        begin, _whole, _part, end = visible_blocks(p, x, n0, kv_head)
        steps = end - begin
        dk = zeros_of(BN, p.QK, BD)
        ds16 = gl.zeros([BN, BM], DT, P)
        p.kv.wait(wave, 0)
        if p.lengths is not None:
            if (steps > 0) & (x.keys < min(n0 + BN, p.N)):
                clear_masked_block(as_rows(p.v_s, BN), x.keys - n0)
        v = as_rows(p.v_s, BN)
        if p.C.hold_v:
            v = held_block(v, p.OV, BM)
        for member in range(p.group):
            db = gl.zeros([BN], gl.float32, ROWS)
            t = Keys(x, n0, None, None, None, None, None, done, done + member * steps - begin, False)
            dk, db, ds16 = _walk_keys(p, t, v, dk, db, ds16, begin, end)
            if p.dbias is not None:
                j = n0 + gl.arange(0, BN, ROWS)
                store_dbias(p, db, b, kv_head * p.group + member, j)
        done += steps * p.group
        if p.dk.first is not None:
            if steps > 0:
                p.queries.wait(done - 1, 0)
                dk = waited(0, into_blocks(ds16, block_at(p.q_s, p.queries.slot(done - 1, 0), BM), dk))
                p.queries.release(done - 1, 0)
            if p.dropout is not None:
                dk = times(dk, p.dropout[2])
        if SWAPPED:
            bar_sync(TILE_DONE, 256)
        if p.dk.first is not None:
            store_block(as_rows(target, BN), times(dk, p.scale))
            fence_async_shared()
            leave_block(p, p.dk, key_place(x, n0), kv_head, target)
            tma_store_wait(0)
        p.kv.release(wave, 0)


COUNTS = ["bounds", "batch", "heads", "group", "batch_inner", "M", "N", "lo", "hi", "tiles_n", "tiles", "l2_group", "serpentine"]


@gluon.jit(do_not_specialize=COUNTS)
def dkdv_d256(
    q_desc, k_desc, v_desc, o_desc, stats_desc, small_lse, bias_desc, dk_desc, dv_desc, bias, lengths, packed, bounds, slopes, dbias,
    bias_strides, dbias_strides, slope_strides, bias_on, cap, dropout, mask_desc, mask, mask_strides, mask_on, q_tail, k_tail, v_tail,
    o_tail, dk_tail, dv_tail,
    batch, heads, group, batch_inner, M, N, lo, hi, scale, tiles_n, tiles, l2_group, serpentine,
    C: gl.constexpr, HAS_REST: gl.constexpr, IS_MASK: gl.constexpr, EVEN_N: gl.constexpr, ALIBI: gl.constexpr,
    BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr, LOOPS: gl.constexpr, QK: gl.constexpr, OV: gl.constexpr, SKIPS: gl.constexpr,
):  # fmt: skip
    """Tiles of 64 keys of a key head. Arguments as of ``dkdv.dkdv``; tails: descriptors of columns behind the first ones."""
    if LOOPS != "both":
        if (all_lse_small(small_lse) != 0) != (LOOPS == "small"):
            return
    DT: gl.constexpr = q_desc.dtype
    STAGES: gl.constexpr = C.q_stages
    NEED_DS: gl.constexpr = (dk_desc is not None) or (dbias is not None)
    NEED_DV: gl.constexpr = dv_desc is not None
    q, k, v, o = Pieces(q_desc, q_tail), Pieces(k_desc, k_tail), Pieces(v_desc, v_tail), Pieces(o_desc, o_tail)
    dk, dv = Pieces(dk_desc, dk_tail), Pieces(dv_desc, dv_tail)
    q_s = buffers_of(STAGES, q)
    o_s = buffers_of(STAGES, o)
    k_s = buffer_of(k)
    v_s = buffer_of(v)
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
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C.block_m, C.block_n], DT)
    # Under a soft cap it is pᵀ times the derivative of the scores; the gradient of a bias, which is added behind it, asks for pᵀ itself.
    P_TILES: gl.constexpr = C.p_stages * (2 if cap is not None and dbias is not None else 1)
    p_s = gl.allocate_shared_memory(DT, [P_TILES, C.block_m, C.block_n], SWIZZLED)
    # Both consumers read keys and queries, if both are there, and dout.
    SHARED: gl.constexpr = 2 if NEED_DS else 1
    kv = ring(1, 1, SHARED, True)
    queries = ring(STAGES, 1, SHARED, True)
    douts = ring(STAGES, 1, 2 if NEED_DS and NEED_DV else 1, True)
    weights = ring(C.p_stages, 1, 1, True)
    biases = ring(1, 1, 1, True)
    fence_async_shared()

    p = Program(
        small_lse, dk, dv, dbias, bias, lengths, packed, bounds, slopes, q_s, k_s, v_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, p_s,
        kv, queries, douts, weights, biases, bias_strides, dbias_strides, slope_strides, cap, dropout, mask, mask_strides, batch, heads,
        group, None, batch_inner, M, N, lo, hi, scale, tiles_n, tiles, l2_group, serpentine, C, NEED_DS, IS_MASK, EVEN_N, ALIBI,
        BATCH_FASTEST, LONGEST, LOOPS, QK, OV, SKIPS,
    )  # fmt: skip
    f = Feed(q, k, v, o, stats_desc, bias_desc, bias_on, mask_desc, mask_on)
    if NEED_DS:
        gl.warp_specialize([(_values_either, (p,)), (_keys, (p,)), (produce, (p, f))], [4, 1], [240, 24])
    else:
        gl.warp_specialize([(_values_either, (p,)), (produce, (p, f))], [1], [24])
