"""The backward kernel for Hopper that gives dq, and with it the gradient of a full-shape bias. Launched by ``launch/hopper_dq.py``.

Built like the forward kernel: a producer warp that loads by TMA, one or two consumers of 64 queries, a persistent grid. A consumer keeps q
and dout of its queries in shared memory and walks the K and V blocks that they see, from the last to the first:

    s = scale q kᵀ (+ bias);   dp = dout vᵀ;   ds = 2^(s - lse) * (dp - delta);   dq += ds k

Each tile of ds exists once, in registers, as the left operand of the third MMA. There are no atomics. With ``deferred`` the MMA ds k of a
block is issued behind s and dp of the next, and runs under that block's softmax.

The gradient of a full-shape bias leaves through the buffer that its bias block came in. The producer fills blocks that no query of a tile
sees with zeros, from a block of zeros in shared memory.
"""

from ..triton.prims import LOG2E
from .blocks import (
    as_rows,
    block_at,
    buffers_of,
    clear_masked_block,
    held_block,
    into_blocks,
    leave_block,
    load_block,
    one_of,
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
    tma_store,
    tma_store_wait,
    warpgroup_mma_wait,
)
from .dropout import ds_of, keep_bits, philox_of, sign_dropped
from .extent import Extent, extent_of, padded_length, padded_row, pair_of, place_of, query_place
from .features import (
    add_alibi,
    all_lse_small,
    line,
    line_of_keys,
    mask_by_tile,
    one_sided,
    p_and_ds_factor,
    rounded,
    scaled,
    slope_of,
    softcapped,
    tanh,
    tanh_slope,
)
from .forward_loads import fetch_bias
from .layouts import accumulator, stacked
from .products import Pieces, groups, left_operand, pieces, times, waited, zeros_of
from .rings import Ring, barriers, ring
from .scores_qk import (
    BM,
    add_bias,
    bare_blocks,
    block_of,
    column_of,
    exponents,
    grid_of,
    in_order,
    mask_band,
    row_in,
    statistics,
    tile_of_mask,
    visible_blocks,
)


@record
class Program:
    """What all partitions of a CTA share. C: the configuration (``plan/kernels/dq.DqConfig``); the rest as of ``dq``."""

    small_lse: object
    dq: object
    dbias_desc: object
    bias: object
    lengths: object
    packed: object
    bounds: object
    slopes: object
    stats: object
    q_s: object
    dout_s: object
    k_s: object
    v_s: object
    out_s: object
    bias_s: object
    second_s: object
    mask_s: object
    queries: Ring
    keys: Ring
    values: Ring
    biases: Ring
    ping_pong: object
    bias_strides: object
    slope_strides: object
    cap: object
    dropout: object
    batch: object
    heads: object
    batch_inner: object
    M: object
    N: object
    lo: object
    hi: object
    scale: object
    tiles_m: object
    tiles: object
    l2_group: object
    serpentine: object
    C: gl.constexpr
    BATCH_FASTEST: gl.constexpr
    IS_MASK: gl.constexpr
    VARIES_M: gl.constexpr
    HAS_REST: gl.constexpr
    EVEN_N: gl.constexpr
    ALIBI: gl.constexpr
    LOOPS: gl.constexpr
    QK: gl.constexpr
    OV: gl.constexpr
    SKIPS: gl.constexpr


@record
class Feed:
    """What the producer alone needs: descriptors of what it loads, along which outer dims the biases and the mask vary, how many query
    heads share a key head, and a block of zeros for what nobody sees of dbias.
    """

    q: object
    dout: object
    k: object
    v: object
    bias_desc: object
    bias_on: object
    second_desc: object
    second_on: object
    mask_desc: object
    mask_on: object
    group: object
    zeros_s: object


@record
class Rows:
    """A consumer's 64 queries of a tile, from m0 on, of which q and dout are operands: their statistics and what else belongs to them."""

    x: Extent
    m0: object
    head: object
    outer: object
    inner: object
    q: object
    dout: object
    lse: object
    delta: object
    rest: object
    column: object
    slope: object
    philox: object
    scale_log2: object


@record
class Walk:
    """As of the forward kernel."""

    done: object
    steps: object
    end: object
    bare: object
    masks: object


@gluon.jit
def _produce(p, f):
    """The producer: every load of the program, in the order in which the consumers need them."""
    BN: gl.constexpr = p.C.block_n
    WGS: gl.constexpr = p.C.consumers
    Q_BYTES: gl.constexpr = f.q.first.block_type.nbytes + (f.q.second.block_type.nbytes if f.q.second is not None else 0)
    DOUT_BYTES: gl.constexpr = f.dout.first.block_type.nbytes + (f.dout.second.block_type.nbytes if f.dout.second is not None else 0)
    K_BYTES: gl.constexpr = f.k.first.block_type.nbytes + (f.k.second.block_type.nbytes if f.k.second is not None else 0)
    V_BYTES: gl.constexpr = f.v.first.block_type.nbytes + (f.v.second.block_type.nbytes if f.v.second is not None else 0)
    grid = grid_of(p, 0)
    done = 0  # blocks of earlier tiles: buffers and phases go on counting across tiles
    masks = 0  # likewise their tiles of a mask, where some blocks have none
    for wave in range(grid.waves()):
        m0, head, b = grid.locate(wave)
        x = extent_of(p, b)
        begin, full_begin, full_end, end = visible_blocks(p, x, m0, head)
        bare = bare_blocks(p, x, m0, head, full_begin, full_end, end)
        outer = x.b // p.batch_inner
        inner = x.b % p.batch_inner
        key_head = head // f.group
        for j in range(end - begin):
            block = in_order(p, bare, end - 1 - j)
            n0 = block * BN
            at = done + j
            place = place_of(x, x.first_key, x.keys, n0)
            k_full = p.keys.acquire(at, 0)
            mbarrier.expect(k_full, K_BYTES)
            load_block(p, f.k, place, key_head, k_full, one_of(p.k_s, p.keys.slot(at, 0)))
            if j == 0:
                for w in gl.static_range(WGS):
                    q_full = p.queries.acquire(wave, w)
                    mbarrier.expect(q_full, Q_BYTES + DOUT_BYTES)
                    of_queries = query_place(x, m0 + w * BM)
                    load_block(p, f.q, of_queries, head, q_full, one_of(p.q_s, w))
                    load_block(p, f.dout, of_queries, head, q_full, one_of(p.dout_s, w))
            v_full = p.values.acquire(at, 0)
            mbarrier.expect(v_full, V_BYTES)
            load_block(p, f.v, place, key_head, v_full, one_of(p.v_s, p.values.slot(at, 0)))
            if p.SKIPS:
                if (block < bare.begin) | (block >= bare.end):
                    fetch_bias(p, f, tile_of_mask(p, masks, j, bare, block), x, head, m0, n0)
            elif f.bias_desc is not None:
                fetch_bias(p, f, at, x, head, m0, n0)
        done += end - begin
        if p.SKIPS:
            masks += end - begin - (bare.end - bare.begin)
        if f.zeros_s is not None:
            for w in gl.static_range(WGS):
                for block in range(begin):
                    tma_store(p.dbias_desc, [outer, inner, head, m0 + w * BM, block * BN], f.zeros_s)
                for block in range(end, (p.N + BN - 1) // BN):
                    tma_store(p.dbias_desc, [outer, inner, head, m0 + w * BM, block * BN], f.zeros_s)
    if f.zeros_s is not None:
        tma_store_wait(0)


@gluon.jit
def _step(p, t, dq, ds, at, bias_at, n0, WG: gl.constexpr, SMALL_LSE: gl.constexpr, PLACE: gl.constexpr, MASKED: gl.constexpr):
    """One key block: ``(dq, ds)`` with the block before in dq (``p.C.deferred``), or the block itself.

    SMALL_LSE: see ``preprocess.py``. bias_at: the number of its tile of a bias or mask. PLACE: "first", where a length may end in the
    block, "bare", where a mask hides nothing of it, or "".
    """
    BN: gl.constexpr = p.C.block_n
    BD: gl.constexpr = p.k_s.first.shape[-1]
    S: gl.constexpr = accumulator(BN)
    DS: gl.constexpr = left_operand(p.QK, BD)
    DQ: gl.constexpr = pieces(p.QK, BD)  # MMAs of dq
    BIASED: gl.constexpr = (p.bias_s is not None or p.bias is not None) and not p.IS_MASK
    LINE: gl.constexpr = one_sided(p.ALIBI) and p.cap is None and not SMALL_LSE  # as the forward kernel rounds it
    FIRST: gl.constexpr = PLACE == "first"
    CUT: gl.constexpr = FIRST and p.lengths is not None
    LAGGING: gl.constexpr = p.C.deferred and not FIRST  # the block before is folded into dq here
    nothing = gl.zeros([BM, BN], gl.float32, S)
    k_slot = p.keys.slot(at, 0)
    v_slot = p.values.slot(at, 0)
    before = (at + p.C.k_stages - 1) % p.C.k_stages
    v_phase = p.values.phase(at)
    k = block_at(p.k_s, k_slot, BN)
    p.keys.wait(at, 0)
    if p.C.ping_pong:
        mbarrier.wait(p.ping_pong[WG].index(0), at & 1)
    if p.C.hold_q:
        s_pending = over_held_block(t.q, k, nothing)
    else:
        s_pending = over_blocks(t.q, k, nothing, p.QK)
    mbarrier.wait(p.values.full.index(v_slot), v_phase)
    v = block_at(p.v_s, v_slot, BN)
    if p.C.hold_dout:
        dp_pending = over_held_block(t.dout, v, nothing)
    else:
        dp_pending = over_blocks(t.dout, v, nothing, p.OV)
    if LAGGING:
        dq_pending = into_blocks(ds, block_at(p.k_s, before, BN), dq)
    if p.C.ping_pong:
        mbarrier.arrive(p.ping_pong[(WG + 1) % p.C.consumers].index(0))
    if t.philox is not None:  # under the MMAs
        bits = keep_bits(t.philox, t.m0, n0, BM, BN, False)
    if LAGGING:
        s = warpgroup_mma_wait(groups(p.OV) + DQ, [s_pending])
    else:
        s = warpgroup_mma_wait(groups(p.OV), [s_pending])

    if p.cap is not None:
        u = tanh(s, p.cap)
        s = softcapped(u, p.cap)
    elif LINE:
        j = n0 + gl.arange(0, BN, gl.SliceLayout(0, S))
        s = scaled(s, t.scale_log2, gl.expand_dims(line_of_keys(t.slope, j, t.m0, t.x.diagonal, p.ALIBI), 0))
    elif SMALL_LSE or BIASED or not p.HAS_REST:
        s = s * t.scale_log2
    else:
        s = rounded(s, t.scale_log2)
    if p.bias_s is not None and PLACE != "bare":
        slot = p.biases.slot(bias_at, WG)
        p.biases.wait(bias_at, WG)
        if p.VARIES_M:
            bias = p.bias_s.index(slot).reshape([BM, BN]).load(S)
        else:
            WIDE: gl.constexpr = p.bias_s.shape[5]  # at least 128 bytes, which is what a buffer of TMA must be aligned to
            bias = gl.expand_dims(p.bias_s.index(slot).reshape([WIDE]).slice(0, BN).load(gl.SliceLayout(0, S)), 0)
        s = add_bias(s, bias, p.IS_MASK)
        if p.second_s is not None:
            s = add_bias(s, row_in(p.second_s.index(slot), BN), False)
        if p.mask_s is not None:
            s = mask_by_tile(s, p.mask_s.index(slot), BM, BN)
        if p.dbias_desc is None:
            fence_async_shared()  # a load may wait behind WGMMA operands, and TMA overtake it: see the forward kernel
            p.biases.release(bias_at, WG)
    if p.bias is not None:
        s = add_bias(s, gl.expand_dims(t.column, 1), p.IS_MASK)
    if LINE:
        s = s + gl.expand_dims(line(0.0, -t.slope, BM, gl.SliceLayout(1, S)), 1)
    elif p.ALIBI:
        s = add_alibi(s, t.slope, n0 - t.m0 - t.x.diagonal, 1, p.ALIBI)
    lse = t.lse
    if one_sided(p.ALIBI) and not LINE:
        lse = lse - line(0.0, -t.slope, BM, gl.SliceLayout(1, S))
    if MASKED:
        s = mask_band(s, t.m0, n0, t.x.keys, t.x.lo, t.x.hi, BM, BN, "0fFF800000")
    x = exponents(s, lse, t.rest, p.HAS_REST and not SMALL_LSE, BIASED)
    if p.cap is not None and p.dbias_desc is None:
        _, weight = p_and_ds_factor(x, u, p.q_s.first.dtype)
    else:
        weight = gl.exp2(x)
    if t.philox is not None:
        weight = sign_dropped(weight, bits)

    mbarrier.wait(p.values.full.index(v_slot), v_phase)  # long since full: ptxas does not move the wait below up past it
    if LAGGING:
        dp = warpgroup_mma_wait(DQ, [dp_pending])
    else:
        dp = warpgroup_mma_wait(0, [dp_pending])
    p.values.release(at, 0)
    if CUT:  # hidden values may be NaN; hidden keys have been cleared
        dp = mask_band(dp, t.m0, n0, t.x.keys, None, None, BM, BN, "0f00000000")
    ds32 = ds_of(weight, dp, gl.expand_dims(t.delta, 1), t.philox is not None)
    if LAGGING:  # before anything is rounded: the MMA under way reads the registers that the rounded ds will take
        dq = waited(0, dq_pending)
        mbarrier.arrive(p.keys.empty.index(before))
    if p.dbias_desc is not None:
        own = p.biases.slot(at, WG)
        dbias = ds32
        if t.philox is not None:
            dbias = ds32 * t.philox[3]
        p.bias_s.index(own).reshape([BM, BN]).store(dbias.to(p.dbias_desc.dtype))
        fence_async_shared()
        tma_store(p.dbias_desc, [t.outer, t.inner, t.head, t.m0, n0], p.bias_s.index(own))
        if p.C.bias_stages == 1:
            tma_store_wait(0)
            p.biases.release(at, WG)
        else:  # the store of the step before has had this step to finish
            tma_store_wait(1)
            if at > 0:
                p.biases.release(at - 1, WG)
        if p.cap is not None:  # the bias is added behind it
            ds32 = ds32 * tanh_slope(u)
    ds16 = gl.convert_layout(ds32.to(p.q_s.first.dtype), DS)
    if not p.C.deferred:
        dq = waited(0, into_blocks(ds16, k, dq))
        p.keys.release(at, 0)
    return dq, ds16


@gluon.jit
def _walk(p, t, w, dq, ds, first, last, WG: gl.constexpr, SMALL_LSE: gl.constexpr, MASKED: gl.constexpr, BARE: gl.constexpr):
    """Steps ``first … last`` of a tile."""
    for step in range(first, last):
        block, bias_at = block_of(p, w, step, MASKED, BARE)
        PLACE: gl.constexpr = "bare" if BARE else ""
        dq, ds = _step(p, t, dq, ds, w.done + step, bias_at, block * p.C.block_n, WG, SMALL_LSE, PLACE, MASKED)
        if p.C.separate_dq:
            if step == w.steps - 1:  # no more MMAs with this q and dout: the next can be fetched
                mbarrier.arrive(p.queries.empty.index(WG))
    return dq, ds


@gluon.jit
def _consume(p, WG: gl.constexpr, SMALL_LSE: gl.constexpr):
    """One consumer: 64 queries of every tile of the program."""
    BN: gl.constexpr = p.C.block_n
    BD: gl.constexpr = p.q_s.first.shape[-1]
    MASKED: gl.constexpr = (p.lo is not None) or (p.hi is not None) or (not p.EVEN_N)
    scale_log2 = p.scale * LOG2E
    if p.C.separate_dq:
        target = one_of(p.out_s, WG)
    else:
        target = one_of(p.q_s, WG)
    grid = grid_of(p, 0)
    done = 0  # blocks of earlier tiles
    masks = 0  # and tiles of the mask
    for wave in range(grid.waves()):
        m0, head, b = grid.locate(wave)
        x = extent_of(p, b)
        slope = slope_of(p.slopes, p.slope_strides, x.b, head)
        philox = None
        if p.dropout is not None:
            philox = philox_of(p.dropout, x.b, head, p.heads)
        begin, full_begin, full_end, end = visible_blocks(p, x, m0, head)
        steps = end - begin
        m0 += WG * BM
        outer = x.b // p.batch_inner
        inner = x.b % p.batch_inner
        lse, delta, rest = statistics(p.stats, pair_of(p, x, head), padded_row(x, m0), padded_length(p), p.HAS_REST, BM, BN)
        column = column_of(p, x, m0, head, BM, BN)
        dq = zeros_of(BM, p.QK, BD)
        p.queries.wait(wave, WG)
        q = block_at(p.q_s, WG, BM)
        dout = block_at(p.dout_s, WG, BM)
        if p.C.hold_q:
            q = held_block(q, p.QK, BN)
        if p.C.hold_dout:
            dout = held_block(dout, p.OV, BN)
        if p.C.hold_q or p.C.hold_dout:
            fence_async_shared()  # a load may wait behind WGMMA operands, and TMA overtake it: see the forward kernel
        if p.lengths is not None:
            if (end * BN > x.keys) & (x.keys < p.N):  # no other block of a tile is cut by a length
                p.keys.wait(done, 0)
                clear_masked_block(block_at(p.k_s, p.keys.slot(done, 0), BN), x.keys - (end - 1) * BN)
        t = Rows(x, m0, head, outer, inner, q, dout, lse, delta, rest, column, slope, philox, scale_log2)
        bias_at = done
        bare = bare_blocks(p, x, m0 - WG * BM, head, full_begin, full_end, end)
        w = Walk(done, steps, end, bare, masks)
        if p.SKIPS:
            bias_at = masks
        dq, ds = _step(p, t, dq, dq, done, bias_at, (end - 1) * BN, WG, SMALL_LSE, "first", MASKED)
        if p.C.separate_dq:
            if steps == 1:
                mbarrier.arrive(p.queries.empty.index(WG))
        # What is left: partly visible on the right, whole, partly visible on the left.
        if p.hi is not None:
            dq, ds = _walk(p, t, w, dq, ds, 1, end - full_end, WG, SMALL_LSE, True, False)
        whole = max(1, end - full_end)
        if p.SKIPS:  # first those of which the mask hides something
            first_bare = end - full_begin - (bare.end - bare.begin)
            dq, ds = _walk(p, t, w, dq, ds, whole, first_bare, WG, SMALL_LSE, False, False)
            dq, ds = _walk(p, t, w, dq, ds, first_bare, end - full_begin, WG, SMALL_LSE, False, True)
            masks += steps - (bare.end - bare.begin)
        else:
            dq, ds = _walk(p, t, w, dq, ds, whole, end - full_begin, WG, SMALL_LSE, False, False)
        if p.lo is not None:
            left = max(1, end - full_begin)
            dq, ds = _walk(p, t, w, dq, ds, left, steps, WG, SMALL_LSE, True, False)
        done += steps
        if p.C.deferred:
            dq = waited(0, into_blocks(ds, block_at(p.k_s, p.keys.slot(done - 1, 0), BN), dq))
            p.keys.release(done - 1, 0)
        tma_store_wait(0)  # what the target held before must have left it
        if p.dropout is not None:
            dq = times(dq, p.dropout[2])
        store_block(as_rows(target, BM), times(dq, p.scale))
        fence_async_shared()
        leave_block(p, p.dq, query_place(x, m0), head, target)
        if not p.C.separate_dq:
            tma_store_wait(0)
            mbarrier.arrive(p.queries.empty.index(WG))
    tma_store_wait(0)


@gluon.jit
def _consume_either(p, WG: gl.constexpr):
    """One consumer: ``_consume`` with the faster loop if every lse is small (``preprocess.py``), or with the only one of LOOPS."""
    if p.LOOPS != "both":
        _consume(p, WG, p.LOOPS == "small")
    elif (p.small_lse is not None) and (all_lse_small(p.small_lse) != 0):
        _consume(p, WG, True)
    else:
        _consume(p, WG, False)


# Not specialised: nothing is gained from knowing that a count is 1 or a multiple of 16, and every combination would be compiled anew.
COUNTS = ["bounds", "batch", "heads", "group", "batch_inner", "M", "N", "lo", "hi", "tiles_m", "tiles", "l2_group", "serpentine"]


@gluon.jit(do_not_specialize=COUNTS)
def dq(
    q_desc, dout_desc, k_desc, v_desc, dq_desc, bias_desc, dbias_desc, bias, lengths, packed, bounds, slopes, stats, small_lse,
    bias_strides, slope_strides, bias_on, cap, dropout, second_desc, second_on, mask_desc, mask_on, q_tail, dout_tail, k_tail, v_tail,
    dq_tail,
    batch, heads, group, batch_inner, M, N, lo, hi, scale, tiles_m, tiles, l2_group, serpentine,
    C: gl.constexpr, BATCH_FASTEST: gl.constexpr, IS_MASK: gl.constexpr, VARIES_M: gl.constexpr, HAS_REST: gl.constexpr,
    EVEN_N: gl.constexpr, ALIBI: gl.constexpr, LOOPS: gl.constexpr, QK: gl.constexpr, OV: gl.constexpr, SKIPS: gl.constexpr,
):  # fmt: skip
    """Tiles of 64 queries a consumer: ``tiles`` of them, ``tiles_m`` a (batch, head) pair, dealt out by ``schedule.Uniform``.

    Descriptors, biases and strides as of the forward kernel; dbias_desc is over a full-shape bias, in blocks like the bias's. stats: see
    ``scores_qk.py``; small_lse: the flags of ``preprocess``, or None; bounds: as of the forward kernel, not with dbias_desc, which gets
    a number for every key; cap: see ``features.tanh``; dropout: see ``philox_of``; mask: beside the bias, a tile or a row with every tile
    of it. Query head h reads key head ``h // group``. None: absent. LOOPS, QK, OV: as of ``dkdv.dkdv``.

    C: the configuration. Without its ``separate_dq``, dq leaves through Q's buffer, and the next tile begins when it has left.
    """
    if LOOPS != "both":
        if (all_lse_small(small_lse) != 0) != (LOOPS == "small"):
            return
    WGS: gl.constexpr = C.consumers
    BN: gl.constexpr = C.block_n
    BIASES: gl.constexpr = C.bias_stages * WGS
    q, dout, grad = Pieces(q_desc, q_tail), Pieces(dout_desc, dout_tail), Pieces(dq_desc, dq_tail)
    k, v = Pieces(k_desc, k_tail), Pieces(v_desc, v_tail)
    q_s = buffers_of(WGS, q)
    dout_s = buffers_of(WGS, dout)
    k_s = buffers_of(C.k_stages, k)
    v_s = buffers_of(C.v_stages, v)
    if C.separate_dq:
        out_s = buffers_of(WGS, grad)
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
    if dbias_desc is not None and (lo is not None or hi is not None or lengths is not None):
        zeros_s = gl.allocate_shared_memory(dbias_desc.dtype, dbias_desc.block_shape, dbias_desc.layout)
        zeros_s.reshape([BM, BN]).store(gl.zeros([BM, BN], dbias_desc.dtype, accumulator(BN)))
    else:
        zeros_s = None
    queries = ring(1, WGS, 1, True)
    keys = ring(C.k_stages, 1, WGS, True)
    values = ring(C.v_stages, 1, WGS, True)
    biases = ring(C.bias_stages, WGS, 1, True)
    ping_pong = (barriers(1, 1), barriers(1, 1), barriers(1, 1))
    fence_async_shared()
    if C.ping_pong:
        mbarrier.arrive(ping_pong[0].index(0))

    p = Program(
        small_lse, grad, dbias_desc, bias, lengths, packed, bounds, slopes, stats, q_s, dout_s, k_s, v_s, out_s, bias_s, second_s, mask_s,
        queries, keys, values, biases, ping_pong, bias_strides, slope_strides, cap, dropout, batch, heads, batch_inner, M, N, lo, hi,
        scale, tiles_m, tiles, l2_group, serpentine, C, BATCH_FASTEST, IS_MASK, VARIES_M, HAS_REST, EVEN_N, ALIBI, LOOPS, QK,
        OV, SKIPS,
    )  # fmt: skip
    f = Feed(q, dout, k, v, bias_desc, bias_on, second_desc, second_on, mask_desc, mask_on, group, zeros_s)
    if WGS == 1:
        gl.warp_specialize([(_consume_either, (p, 0)), (_produce, (p, f))], [1], [24])
    else:
        gl.warp_specialize([(_consume_either, (p, 0)), (_consume_either, (p, 1)), (_produce, (p, f))], [4, 1], [C.registers, 24])
