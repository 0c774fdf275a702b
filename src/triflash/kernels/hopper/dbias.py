"""The kernel for Hopper that gives the gradient of a bias that varies over queries and keys and broadcasts over batch or heads.

    dbias = sum over broadcast dims of ds,   ds = 2^(s - lse) * (dout vᵀ - delta)

Launched by ``launch/hopper_dbias.py``. A CTA owns tiles of the bias's own shape, 64 queries a consumer by ``block_n`` keys. For each it
loops over the (batch, head) pairs that the bias broadcasts, one round a pair, recomputing s and dp. The sum stays in registers, a tile's
bias in shared memory. Both MMAs of a round run over a head dim, and producers feed them like a matrix product: chunks of ``chunk`` columns
in two rings that run on across rounds and tiles, one for q and then dout, one for k and then v. The softmax of a consumer runs under the
MMAs of the other and under its own dp; ``ping_pong`` as of the forward kernel.

The sum leaves through the buffer of its tile's bias. A producer of its own refills that at once, so the next tile's bias holds up no
operand. Tiles that no query sees are no work for the consumers: a warp writes their zeros.

The loop may be cut into ``splits`` parts, each written on its own, as in the portable kernel (``kernels/triton/dbias.py``).

Packed sequences are outer batch entries to a bias. A round is taken if its sequence reaches the tile, and p is 0 where the sequence has no
such query or key or its band hides it: only the device knows the diagonal of each, so that a band cannot be cut off the sum.
"""

from ..triton.prims import LOG2E, offset
from .compat import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    record,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .dbias_tiles import entry_of, is_whole, own_part, reach_of, reaches, round_of, seen, tile_of
from .dropout import ds_of, keep_bits, philox_of, sign_dropped
from .extent import extent_of_sequence, key_place, outer_at, query_place, rows
from .features import add_alibi, all_lse_small, opaque, slope_of, softcapped, tanh, visible_keys
from .key_rows import PIECES, operand, store_row
from .layouts import accumulator, stacked
from .products import over_columns
from .rings import Ring, barriers, ring
from .scores_qk import BM, add_bias, exponents, mask_band, row_in, statistics


@record
class Program:
    """What all partitions of a CTA share. C: the configuration (``plan/kernels/dbias.DbiasConfig``); the rest as of ``dbias``."""

    small_lse: object
    dbias_desc: object
    dbias: object
    lengths: object
    slopes: object
    stats: object
    left_s: object
    right_s: object
    bias_s: object
    left: Ring
    right: Ring
    biases: Ring
    ping_pong: object
    dbias_strides: object
    slope_strides: object
    cap: object
    dropout: object
    second_s: object
    row_s: object
    ones_s: object
    packed: object
    reach: object
    mask: object
    mask_strides: object
    batch_outer: object
    batch_inner: object
    heads: object
    M: object
    N: object
    lo: object
    hi: object
    scale: object
    splits: object
    tiles_m: object
    tiles: object
    places: object
    fold: object
    shuffle: object
    zeros_s: object
    tiles_n: object
    C: gl.constexpr
    S_CHUNKS: gl.constexpr
    DP_CHUNKS: gl.constexpr
    QK: gl.constexpr
    OV: gl.constexpr
    VARIES_B0: gl.constexpr
    VARIES_B1: gl.constexpr
    VARIES_H: gl.constexpr
    HAS_REST: gl.constexpr
    EVEN: gl.constexpr
    ALIBI: gl.constexpr
    LOOPS: gl.constexpr


@record
class Feed:
    """What a producer needs besides: descriptors of its operands of s and dp, their buffers and slots, query heads a key head, and for keys
    the descriptor of a second bias and along which outer dims that varies, or None.
    """

    s_desc: object
    dp_desc: object
    buffers: object
    slots: Ring
    group: object
    second_desc: object
    second_on: object


@record
class Round:
    """A round of a tile, of a consumer: its extent, batch entry and head, first query and key, and the bias's buffer and wave."""

    x: object
    b: object
    head: object
    m0: object
    n0: object
    buffer: object
    wave: object


@gluon.constexpr_function
def chunks_of(dim, CHUNK):
    """How many chunks a head dim has."""
    return -(-dim // CHUNK)


@gluon.jit
def _fetch(p, desc, buffers, slots, at, place, head, column, PARTS: gl.constexpr, MORE: gl.constexpr):
    """One chunk of an operand into its slot, in PARTS buffers of rows that follow one another; the caller adds MORE bytes to them."""
    slot = slots.slot(at, 0)
    full = slots.full.index(slot)
    slots.acquire(at, 0)
    mbarrier.expect(full, PARTS * desc.block_type.nbytes + MORE)
    for w in gl.static_range(PARTS):
        tma_load(desc, rows(p, (place[0], place[1] + w * buffers.shape[-3]), head, column), full, buffers.index(slot * PARTS + w))


@gluon.jit
def _produce(p, f, OF_KEYS: gl.constexpr):
    """A producer: every load of one operand of both MMAs, in the order in which the consumers need them."""
    CHUNKS: gl.constexpr = p.S_CHUNKS + p.DP_CHUNKS
    at = 0  # chunks so far
    for index in range(gl.program_id(0), p.tiles, gl.num_programs(0)):
        _part, b0, b1, own_head, m0, n0, first, last = tile_of(p, index)
        for r in range(first, last):
            b, head = round_of(p, r, b0, b1, own_head)
            x = extent_of_sequence(p, b)
            place = key_place(x, n0) if OF_KEYS else query_place(x, m0)
            if p.packed is not None:
                if reaches(p, x, m0, n0):
                    _feed(p, f, at, place, b, head, n0, OF_KEYS)
                    at += CHUNKS
            else:
                _feed(p, f, at, place, b, head, n0, OF_KEYS)
                at += CHUNKS


@gluon.jit
def _feed(p, f, at, place, b, query_head, n0, OF_KEYS: gl.constexpr):
    """The loads of a round: of rows that lie at ``place``, and a second bias's with the last chunk of keys."""
    CHUNK: gl.constexpr = f.buffers.shape[-1]
    PARTS: gl.constexpr = 1 if OF_KEYS else p.C.consumers
    ROW: gl.constexpr = f.second_desc.block_type.nbytes if f.second_desc is not None else 0
    head = query_head
    if OF_KEYS:
        head = head // f.group
    for c in gl.static_range(p.S_CHUNKS):
        _fetch(p, f.s_desc, f.buffers, f.slots, at + c, place, head, c * CHUNK, PARTS, ROW if c == p.S_CHUNKS - 1 else 0)
    if f.second_desc is not None:
        outer, inner, bias_head = outer_at(b, p.batch_inner, query_head, f.second_on)
        slot = f.slots.slot(at + p.S_CHUNKS - 1, 0)
        tma_load(f.second_desc, [outer, inner, bias_head, 0, n0], f.slots.full.index(slot), p.second_s.index(slot))
    for c in gl.static_range(p.DP_CHUNKS):
        _fetch(p, f.dp_desc, f.buffers, f.slots, at + p.S_CHUNKS + c, place, head, c * CHUNK, PARTS, 0)


@gluon.jit
def _supply(p, bias_desc):
    """The third producer: the bias of every tile that some query sees, as soon as its buffer is free."""
    WGS: gl.constexpr = p.C.consumers
    wave = 0  # tiles so far
    for index in range(gl.program_id(0), p.tiles, gl.num_programs(0)):
        _part, b0, b1, own_head, m0, n0, first, last = tile_of(p, index)
        if first < last:
            for w in gl.static_range(WGS):
                buffer = p.biases.slot(wave, w)
                full = p.biases.full.index(buffer)
                p.biases.acquire(wave, w)
                mbarrier.expect(full, bias_desc.block_type.nbytes)
                tma_load(bias_desc, [b0, b1, own_head, m0 + w * BM, n0], full, p.bias_s.index(buffer))
            wave += 1


@gluon.jit
def _clear(p):
    """A warp that writes zeros to the tiles that no query sees. It waits for nothing, and nothing waits for it."""
    BN: gl.constexpr = p.C.block_n
    WGS: gl.constexpr = p.C.consumers
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    if p.packed is not None or p.lo is not None or p.hi is not None:
        own = p.tiles_m * p.tiles_n
        tiles = own * p.splits
        tiles *= p.heads if p.VARIES_H else 1
        tiles *= p.batch_inner if p.VARIES_B1 else 1
        tiles *= p.batch_outer if p.VARIES_B0 else 1
        for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
            tm = index % own // p.tiles_n
            tn = index % p.tiles_n
            m0 = tm * (BM * WGS)
            n0 = tn * BN
            begin, end = seen(p, tm)
            if (tn < begin) | (tn >= end):
                part, b0, b1, head, _rounds = entry_of(p, index // own)
                if p.dbias_desc is not None:
                    for w in gl.static_range(WGS):
                        tma_store(p.dbias_desc, [b0, b1, head, m0 + w * BM, n0], p.zeros_s)
                else:
                    j = gl.arange(0, BN, LINE)
                    row = _own(p, part, b0, b1, head, m0, n0) + j.to(gl.int64) * p.dbias_strides[5]
                    for i in range(min(BM * WGS, p.M - m0)):
                        zeros = gl.zeros([BN], p.dbias.dtype.element_ty, LINE)
                        gl.store(row + offset(i, p.dbias_strides[4]), zeros, mask=n0 + j < p.N)
        if p.dbias_desc is not None:
            tma_store_wait(0)


@gluon.jit
def _own(p, part, b0, b1, head, m0, n0):
    """Where a tile begins in a gradient of any strides."""
    strides = p.dbias_strides
    base = p.dbias + offset(part, strides[0]) + offset(b0, strides[1]) + offset(b1, strides[2])
    return base + offset(head, strides[3]) + offset(m0, strides[4]) + offset(n0, strides[5])


@gluon.jit
def _multiply(p, acc, at, CHUNK: gl.constexpr, COLUMNS: gl.constexpr, WG: gl.constexpr):
    """Wait for chunk ``at`` of both operands, number CHUNK of a head of which so many columns are multiplied, and issue its MMA."""
    WGS: gl.constexpr = p.C.consumers
    p.left.wait(at, 0)
    p.right.wait(at, 0)
    left = p.left_s.index(p.left.slot(at, 0) * WGS + WG).reshape([p.left_s.shape[-3], p.left_s.shape[-1]])
    right = p.right_s.index(p.right.slot(at, 0)).reshape([p.right_s.shape[-3], p.right_s.shape[-1]])
    WIDTH: gl.constexpr = p.right_s.shape[-1]
    return over_columns(left, right, acc, 0, min(WIDTH, COLUMNS - CHUNK * WIDTH), CHUNK > 0)


@gluon.jit
def _release(p, at, COUNT: gl.constexpr):
    """Give back COUNT chunks of both operands."""
    for c in gl.static_range(COUNT):
        p.left.release(at + c, 0)
        p.right.release(at + c, 0)


@gluon.jit
def _add_round(p, acc, at, t, scale_log2, nothing, unscale, WG: gl.constexpr, SMALL_LSE: gl.constexpr):
    """The sum of a tile's ds and that of a round, of a consumer: ``at`` chunks came before."""
    BN: gl.constexpr = p.C.block_n
    S: gl.constexpr = accumulator(BN)
    S_CHUNKS: gl.constexpr = p.S_CHUNKS
    DP_CHUNKS: gl.constexpr = p.DP_CHUNKS
    CHUNKS: gl.constexpr = S_CHUNKS + DP_CHUNKS
    SLOTS: gl.constexpr = p.C.slots
    EARLY: gl.constexpr = 0 if CHUNKS <= SLOTS else S_CHUNKS - 1  # chunks of s whose slots must be free before all of dp fits
    BY_MMA: gl.constexpr = p.row_s is not None and SMALL_LSE
    ADDED: gl.constexpr = p.second_s is not None and not BY_MMA
    ROW_FIRST: gl.constexpr = ADDED and SMALL_LSE  # in whichever order registers suffice for
    if p.packed is not None:
        whole = is_whole(p, t.x, t.m0, t.n0)
        lse, delta, rest = statistics(p.stats, t.head, t.x.first_padded + t.m0, p.packed[3], p.HAS_REST, BM, BN)
        delta = gl.where(t.m0 + gl.arange(0, BM, gl.SliceLayout(1, S)) < t.x.queries, delta, 0.0)  # where there is no query, it may be NaN
    else:
        lse, delta, rest = statistics(p.stats, t.b * p.heads + t.head, t.m0, (p.M + 127) // 128 * 128, p.HAS_REST, BM, BN)
    n_keys = visible_keys(p.lengths, t.b, p.N)
    if p.mask is not None:
        j = t.n0 + gl.arange(0, BN, gl.SliceLayout(0, S))
        row = p.mask + offset(t.b // p.batch_inner, p.mask_strides[0]) + offset(t.b % p.batch_inner, p.mask_strides[1])
        row += offset(t.head, p.mask_strides[2])
        # A row that TMA could address: keys are neighbours, and it begins at an even address. Read by two, a byte past an odd end.
        if p.EVEN:
            mask_row = gl.expand_dims(gl.load(row + j), 0)
        else:
            mask_row = gl.expand_dims(gl.load(row + j, mask=j < (p.N + 1) // 2 * 2, other=0), 0)
    if p.C.ping_pong:
        mbarrier.wait(p.ping_pong[WG].index(0), (at // CHUNKS) & 1)
    s_pending = _multiply(p, nothing, at, 0, p.QK, WG)
    for c in gl.static_range(1, S_CHUNKS):
        s_pending = _multiply(p, s_pending, at + c, c, p.QK, WG)
        if c <= EARLY:
            s_pending = warpgroup_mma_wait(1, [s_pending])
            _release(p, at + c - 1, 1)
    if BY_MMA:
        row_at = p.second_s.index(p.right.slot(at + S_CHUNKS - 1, 0))
        row = row_at.reshape([row_at.shape[4]]).slice(0, BN).load(gl.SliceLayout(1, PIECES))
        store_row(p.row_s.index(WG), row, unscale)
        s_pending = warpgroup_mma(p.ones_s.index(0), p.row_s.index(WG).permute((1, 0)), s_pending, is_async=True)
    dp_pending = _multiply(p, nothing, at + S_CHUNKS, 0, p.OV, WG)
    for c in gl.static_range(1, DP_CHUNKS):
        dp_pending = _multiply(p, dp_pending, at + S_CHUNKS + c, c, p.OV, WG)
    if p.C.ping_pong:
        mbarrier.arrive(p.ping_pong[(WG + 1) % p.C.consumers].index(0))
    s = warpgroup_mma_wait(DP_CHUNKS, [s_pending])
    if ADDED:
        second = row_in(p.second_s.index(p.right.slot(at + S_CHUNKS - 1, 0)), BN)
        fence_async_shared()  # a load may wait behind WGMMA operands, and TMA overtake it: see the forward kernel
    _release(p, at + EARLY, S_CHUNKS - EARLY)

    if not ROW_FIRST:
        mbarrier.wait(p.biases.full.index(t.buffer), p.biases.phase(t.wave))
        bias = p.bias_s.index(t.buffer).reshape([BM, BN]).load(S)
    if p.cap is not None:
        if p.lengths is not None:  # a hidden key may be NaN, and ``tanh`` spreads NaN to the three scores that share its reciprocal
            s = mask_band(s, t.m0, t.n0, n_keys, None, None, BM, BN, "0f00000000")
        s = softcapped(tanh(s, p.cap), p.cap)
    else:
        s = s * scale_log2
    if SMALL_LSE:
        s = s - gl.expand_dims(lse, 1)
    if ROW_FIRST:
        s = add_bias(s, second, False)
        mbarrier.wait(p.biases.full.index(t.buffer), p.biases.phase(t.wave))
        bias = p.bias_s.index(t.buffer).reshape([BM, BN]).load(S)
    s = add_bias(s, bias, False)
    if ADDED and not ROW_FIRST:
        s = add_bias(s, second, False)
    if p.ALIBI:
        slope = slope_of(p.slopes, p.slope_strides, t.b, t.head)
        s = add_alibi(s, slope, t.n0 - t.m0 - t.x.diagonal, 1, p.ALIBI)
    if p.mask is not None:
        s = add_bias(s, mask_row, True)
    if p.lengths is not None:
        s = mask_band(s, t.m0, t.n0, n_keys, None, None, BM, BN, "0fFF800000")
    if not SMALL_LSE:
        s = exponents(s, lse, rest, p.HAS_REST, True)
    weight = gl.exp2(s)
    if p.packed is not None:
        if not whole:
            # Its extent once more: to keep all of it takes registers.
            weight = own_part(weight, extent_of_sequence(p, t.b), t.m0, t.n0, BN)
    if p.dropout is not None:
        weight = sign_dropped(weight, keep_bits(philox_of(p.dropout, t.b, t.head, p.heads), t.m0, t.n0, BM, BN, False))

    p.right.wait(at + CHUNKS - 1, 0)  # long since full: waited for to keep ptxas from moving the wait for dp up
    dp = warpgroup_mma_wait(0, [dp_pending])
    _release(p, at + S_CHUNKS, DP_CHUNKS)
    if p.lengths is not None:  # values that are hidden may be anything
        dp = mask_band(dp, t.m0, t.n0, n_keys, None, None, BM, BN, "0f00000000")
    return acc + ds_of(weight, dp, gl.expand_dims(delta, 1), p.dropout is not None)


@gluon.jit
def _consume(p, WG: gl.constexpr, SMALL_LSE: gl.constexpr):
    """One consumer: 64 queries of every tile of the CTA that some query sees."""
    BN: gl.constexpr = p.C.block_n
    S: gl.constexpr = accumulator(BN)
    CHUNKS: gl.constexpr = p.S_CHUNKS + p.DP_CHUNKS
    scale_log2 = p.scale * LOG2E
    nothing = gl.zeros([BM, BN], gl.float32, S)
    unscale = None
    if p.row_s is not None and SMALL_LSE:
        unscale = opaque(1.0 / p.scale)
    at = 0
    wave = 0
    for index in range(gl.program_id(0), p.tiles, gl.num_programs(0)):
        part, b0, b1, own_head, m0, n0, first, last = tile_of(p, index)
        m0 += WG * BM
        buffer = p.biases.slot(wave, WG)
        acc = gl.zeros([BM, BN], gl.float32, S)
        for r in range(first, last):
            b, head = round_of(p, r, b0, b1, own_head)
            x = extent_of_sequence(p, b)
            t = Round(x, b, head, m0, n0, buffer, wave)
            if p.packed is not None:
                if reaches(p, x, m0 - WG * BM, n0):
                    acc = _add_round(p, acc, at, t, scale_log2, nothing, unscale, WG, SMALL_LSE)
                    at += CHUNKS
            else:
                acc = _add_round(p, acc, at, t, scale_log2, nothing, unscale, WG, SMALL_LSE)
                at += CHUNKS

        if first < last:
            if p.packed is not None:  # no round may have waited for it
                mbarrier.wait(p.biases.full.index(buffer), p.biases.phase(wave))
            # Masked scores were summed like the others and may have overflowed; queries past the end gave 0.
            if p.packed is None and (p.lo is not None or p.hi is not None):
                acc = mask_band(acc, m0, n0, p.N, p.lo, p.hi, BM, BN, "0f00000000")
            if p.dropout is not None:
                acc = acc * p.dropout[2]
            if p.dbias_desc is not None:
                p.bias_s.index(buffer).reshape([BM, BN]).store(acc.to(p.dbias_desc.dtype))
                fence_async_shared()
                tma_store(p.dbias_desc, [b0, b1, own_head, m0, n0], p.bias_s.index(buffer))
                tma_store_wait(0)
            else:
                base = _own(p, part, b0, b1, own_head, m0, n0)
                i = gl.expand_dims(gl.arange(0, BM, gl.SliceLayout(1, S)), 1)
                j = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(0, S)), 0)
                pointers = base + i.to(gl.int64) * p.dbias_strides[4] + j.to(gl.int64) * p.dbias_strides[5]
                if p.EVEN:
                    gl.store(pointers, acc.to(p.dbias.dtype.element_ty))
                else:
                    gl.store(pointers, acc.to(p.dbias.dtype.element_ty), mask=(m0 + i < p.M) & (n0 + j < p.N))
                fence_async_shared()  # behind the loads of the bias: see the forward kernel
            mbarrier.arrive(p.biases.empty.index(buffer))
            wave += 1


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
COUNTS = [
    "batch_outer", "batch_inner", "heads", "group", "M", "N", "lo", "hi", "splits", "tiles_m", "tiles_n", "tiles", "places", "fold",
    "shuffle",
]  # fmt: skip


@gluon.jit(do_not_specialize=COUNTS)
def dbias(
    q_desc, dout_desc, k_desc, v_desc, bias_desc, dbias_desc, dbias_out, lengths, slopes, stats, small_lse, dbias_strides, slope_strides,
    cap, dropout, second_desc, second_on, packed, mask, mask_strides, batch_outer, batch_inner, heads, group, M, N, lo, hi, scale, splits,
    tiles_m, tiles_n, tiles, places, fold, shuffle, C: gl.constexpr, QK: gl.constexpr, OV: gl.constexpr, VARIES_B0: gl.constexpr,
    VARIES_B1: gl.constexpr, VARIES_H: gl.constexpr, HAS_REST: gl.constexpr, EVEN: gl.constexpr, ALIBI: gl.constexpr,
    ROW_BY_MMA: gl.constexpr, LOOPS: gl.constexpr,
):  # fmt: skip
    """``tiles_m`` by ``tiles_n`` tiles a head of the bias, which have ``places`` (``dbias_tiles.tile_of``); ``tiles`` are the places of all
    heads of the bias, times ``splits``, the part slowest.

    Descriptors of q, dout, k, v are over (batch, length, head, dim) with blocks [1, rows, 1, chunk]; that of the bias over its five dims
    with blocks [1, 1, 1, 64, keys], and that of dbias, if it is one part in the bias's dtype. Else dbias_out is a pointer, with strides
    (part, outer batch, inner batch, head, query, key). A second bias, over keys alone, comes as of the forward kernel, a row with the last
    chunk of keys of a round; mask as a pointer, with strides (outer batch, inner batch, head); its keys are neighbours. stats: see
    ``scores_qk.py``; cap: ``features.tanh``; dropout: ``dropout.philox_of``. Query head h reads key head ``h // group``.
    packed: None, or ``extent.extent_of_sequence``'s, and how long a head's row of statistics is; M and N are then the bias's own sizes, and
    descriptors of q, dout, k, v are ragged.
    LOOPS: as of ``dkdv.dkdv``.
    """
    if LOOPS != "both":
        if (all_lse_small(small_lse) != 0) != (LOOPS == "small"):
            return
    BN: gl.constexpr = C.block_n
    WGS: gl.constexpr = C.consumers
    DT: gl.constexpr = q_desc.dtype
    left_s = gl.allocate_shared_memory(DT, stacked(C.query_slots * WGS, q_desc.block_shape), q_desc.layout)
    right_s = gl.allocate_shared_memory(DT, stacked(C.key_slots, k_desc.block_shape), k_desc.layout)
    bias_s = gl.allocate_shared_memory(bias_desc.dtype, stacked(C.bias_stages * WGS, bias_desc.block_shape), bias_desc.layout)
    if second_desc is not None:
        second_s = gl.allocate_shared_memory(second_desc.dtype, stacked(C.key_slots, second_desc.block_shape), second_desc.layout)
    else:
        second_s = None
    row_s = None
    ones_s = None
    if ROW_BY_MMA:
        row_s = operand(WGS, BN, 0.0)
        ones_s = operand(1, BM, 1.0)
    zeros_s = None
    if dbias_desc is not None and (packed is not None or lo is not None or hi is not None):
        zeros_s = gl.allocate_shared_memory(dbias_desc.dtype, dbias_desc.block_shape, dbias_desc.layout)
        zeros_s.reshape([BM, BN]).store(gl.zeros([BM, BN], dbias_desc.dtype, accumulator(BN)))
    reach = None
    if packed is not None:
        reach = reach_of(packed, batch_outer)
    left = ring(C.query_slots, 1, WGS, True)  # every consumer reads every chunk
    right = ring(C.key_slots, 1, WGS, True)
    biases = ring(C.bias_stages, WGS, 1, True)
    ping_pong = (barriers(1, 1), barriers(1, 1))
    fence_async_shared()
    if C.ping_pong:
        mbarrier.arrive(ping_pong[0].index(0))

    p = Program(
        small_lse, dbias_desc, dbias_out, lengths, slopes, stats, left_s, right_s, bias_s, left, right, biases, ping_pong, dbias_strides,
        slope_strides, cap, dropout, second_s, row_s, ones_s, packed, reach, mask, mask_strides, batch_outer, batch_inner, heads, M, N, lo,
        hi, scale, splits, tiles_m, tiles, places, fold, shuffle, zeros_s, tiles_n, C, chunks_of(QK, C.chunk), chunks_of(OV, C.chunk), QK,
        OV, VARIES_B0, VARIES_B1, VARIES_H, HAS_REST, EVEN, ALIBI, LOOPS,
    )  # fmt: skip
    of_queries = Feed(q_desc, dout_desc, left_s, left, group, None, None)
    of_keys = Feed(k_desc, v_desc, right_s, right, group, second_desc, second_on)
    if WGS == 1:
        gl.warp_specialize([
            (_consume_either, (p, 0)), (_produce, (p, of_queries, False)),
            (_produce, (p, of_keys, True)), (_supply, (p, bias_desc)), (_clear, (p,)),
        ], [1, 1, 1, 1], [32, 32, 32, 32])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume_either, (p, 0)), (_consume_either, (p, 1)),
            (_produce, (p, of_queries, False)),
            (_produce, (p, of_keys, True)), (_supply, (p, bias_desc)), (_clear, (p,)),
        ], [4, 1, 1, 1, 1], [C.registers, 32, 32, 32, 32])  # fmt: skip
