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
from .columns import grid_of, of_keys, query_heads, store_dbias, visible_blocks
from .compat import fence_async_shared, gl, gluon, mbarrier, record, tma_store, tma_store_wait, warpgroup_mma_wait
from .dropout import stream_of
from .extent import Extent, extent_of
from .features import clear_hidden, mildest, slope_of
from .keys_block import fold, score, weigh
from .keys_dq import add_to_sum, add_up, add_up_apart, dq_hand_over, dq_product, first_block
from .keys_loads import DS_HERE, Feed, produce
from .layouts import accumulator, stacked
from .rings import Ring, barriers, meet, ring


@record
class Program:
    """What all partitions of a program work with. C: the configuration (``plan/hopper_backward.KeysConfig``); the rest as
    ``keys_backward`` says.
    """

    mild: object
    dk_desc: object
    dv_desc: object
    dk_parts: object
    dv_parts: object
    dbias: object
    bias: object
    lengths: object
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
    kv: Ring
    q_full: object
    o_full: object
    bias_full: object
    ds_empty: object
    dq_empty: object
    together: object
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
    section: object
    snake: object
    C: gl.constexpr
    NEED_DK: gl.constexpr
    NEED_DV: gl.constexpr
    NEED_DB: gl.constexpr
    NEED_DS: gl.constexpr
    APART: gl.constexpr
    ROW: gl.constexpr
    IS_MASK: gl.constexpr
    EVEN_N: gl.constexpr
    ALIBI: gl.constexpr
    BATCH_FASTEST: gl.constexpr
    LONGEST: gl.constexpr


@record
class Keys:
    """A consumer's 64 keys of a tile, whose first is n0, in buffer kv, and what they have for one query head.

    The tile's first block of queries is number ``done`` of the program, the t-th of the head ``base + t``, and in the sum of dq
    ``sum_base + t``.
    """

    x: Extent
    diagonal: object
    n0: object
    kv: object
    key_bias: object
    key_mask: object
    slope: object
    stream: object
    scale_log2: object
    done: object
    base: object
    sum_base: object
    WG: gl.constexpr
    MILD: gl.constexpr


@record
class Span:
    """The query blocks ``start … stop`` of a tile, MASKED or not, in the order of ``turned``, and its keys and values as operands."""

    start: object
    stop: object
    k: object
    v: object
    MASKED: gl.constexpr


@gluon.jit
def _walk(p, t, start, stop, dk, dv, db, place, first, last, MASKED: gl.constexpr, UNROLL: gl.constexpr):
    """Fold the query blocks ``first … last`` of ``start … stop``, a multiple of UNROLL, into (dk, dv, db).

    Unless it is computed APART, dq of a block is computed in the step of the next one, so that the consumers need not wait for each other's
    ds. In the first step of a tile there is none yet; what is computed then is nothing that anybody reads. The last one is left to the
    caller.

    Of UNROLL blocks, the scores of one are started before the products of the one before are waited for, so that the matrix units do not
    run dry. From one step of the loop to the next that cannot be: ptxas would make every product wait for the one before.
    """
    HALF: gl.constexpr = p.C.block_n // 2
    BD: gl.constexpr = p.k_s.shape[4]
    BDV: gl.constexpr = p.v_s.shape[4]
    k = p.k_s.index(t.kv * 2 + t.WG).reshape([HALF, BD])  # in registers they would save a fifth of what is read, but see docs/tuning.md
    v = p.v_s.index(t.kv * 2 + t.WG).reshape([HALF, BDV])
    span = Span(start, stop, k, v, MASKED)
    for number in range(first, last, UNROLL):
        s, lse = score(p, span, t.base + number)
        dp = weigh(p, t, span, t.base + number, s)
        for u in gl.static_range(UNROLL):
            s, dp, lse, dk, dv, db, place = fold(p, t, span, number + u, s, dp, lse, dk, dv, db, place, u + 1 < UNROLL)
    return dk, dv, db, place


@gluon.jit
def _walk_all(p, t, start, stop, dk, dv, db, place, MASKED: gl.constexpr, UNROLL: gl.constexpr):
    """``_walk`` through all blocks ``start … stop``, UNROLL a step as long as there are so many, and then one by one."""
    alone = start
    if UNROLL > 1:
        alone = start + max(stop - start, 0) // UNROLL * UNROLL
        dk, dv, db, place = _walk(p, t, start, stop, dk, dv, db, place, start, alone, MASKED, UNROLL)
    return _walk(p, t, start, stop, dk, dv, db, place, alone, stop, MASKED, 1)


@gluon.jit
def _keep(parts, row, x):
    """x to float32 rows of its length, from ``row`` on, past the end of no array."""
    L: gl.constexpr = x.type.layout
    i = gl.expand_dims(gl.arange(0, x.shape[0], gl.SliceLayout(1, L)), 1)
    c = gl.expand_dims(gl.arange(0, x.shape[1], gl.SliceLayout(0, L)), 0)
    i, c = gl.broadcast(i, c)
    gl.store(parts + (offset(row, x.shape[1]) + (i * x.shape[1] + c)), x)


@gluon.jit
def _consume(p, WG: gl.constexpr, MILD: gl.constexpr):
    """One consumer: 64 keys of every tile of the program."""
    BM: gl.constexpr = p.C.block_m
    BN: gl.constexpr = p.C.block_n
    HALF: gl.constexpr = BN // 2
    UNROLL: gl.constexpr = p.C.unroll
    BD: gl.constexpr = p.k_s.shape[4]
    BDV: gl.constexpr = p.v_s.shape[4]
    DT: gl.constexpr = p.k_s.dtype
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BM))
    grid = grid_of(p)
    scale_log2 = p.scale * LOG2E
    done = 0
    for wave in range(grid.waves()):
        n0, kv_head, b = grid.locate(wave)
        x = extent_of(b, p.M, p.N, p.lengths)
        begin, whole, part, end = visible_blocks(p, x, n0)
        steps = end - begin
        dk = gl.zeros([HALF, BD], gl.float32, accumulator(BD))
        dv = gl.zeros([HALF, BDV], gl.float32, accumulator(BDV))
        j = n0 + WG * HALF + gl.arange(0, HALF, ROWS)
        kv = p.kv.slot(wave, 0)
        p.kv.wait(wave, 0)
        if p.lengths is not None:
            # The own half; the other consumer meets it in dq, after it has got ds from here.
            rows = x.keys - (n0 + WG * HALF)
            if (steps > 0) & (rows < HALF) & (x.keys < p.N):
                clear_hidden(p.k_s.index(kv * 2 + WG).reshape([HALF, BD]), rows)
                clear_hidden(p.v_s.index(kv * 2 + WG).reshape([HALF, BDV]), rows)
        place = 0
        own_head, first_head, members = query_heads(kv_head, p.group, p.splits)
        for member in range(members):
            head = first_head + member
            sum_base = 0
            if p.dq_sum is not None:
                sum_base = first_block(b * p.heads + head, p.M, BM)
            slope = slope_of(p.slopes, p.slope_strides, b, head)
            stream = None
            if p.dropout is not None:
                stream = stream_of(p.dropout, b, head, p.heads)
            key_bias = gl.zeros([HALF], gl.float32, ROWS)
            if p.bias is not None:
                key_bias = of_keys(p, p.bias, p.bias_strides, b, head, j).to(gl.float32)
            key_mask = None
            if p.mask is not None:
                key_mask = of_keys(p, p.mask, p.mask_strides, b, head, j)
            db = gl.zeros([HALF], gl.float32, ROWS)
            base = done + member * steps - begin
            t = Keys(x, x.diagonal(), n0, kv, key_bias, key_mask, slope, stream, scale_log2, done, base, sum_base, WG, MILD)
            if (p.hi is not None) or (not p.EVEN_N):
                dk, dv, db, place = _walk_all(p, t, begin, whole, dk, dv, db, place, True, 1)
            dk, dv, db, place = _walk_all(p, t, whole, part, dk, dv, db, place, False, UNROLL)
            if p.lo is not None:
                dk, dv, db, place = _walk_all(p, t, part, end, dk, dv, db, place, True, 1)
            if p.NEED_DB:
                store_dbias(p, db, b, head, j)
        done += steps * members
        if p.APART:
            if steps > 0:  # these keys are still read for dq
                mbarrier.wait(p.ds_empty.index((done - 1) & 1), ((done - 1) >> 1) & 1)
        elif p.ds_s is not None:
            if steps > 0:
                if p.dq_sum is None:
                    mbarrier.wait(p.dq_empty.index(WG), ((done - 1) & 1) ^ 1)
                meet(DS_HERE + 8 * WG + ((done - 1) & 1), 256)
                dq = warpgroup_mma_wait(0, [dq_product(p, done - 1, kv, WG)])
                if p.dq_sum is None:
                    dq_hand_over(p, dq, True, WG)
                else:
                    add_to_sum(p.dq_sum, place, dq, None, WG * (BD // 2), p.ROW)
            # The other consumer may still be reading these keys for its half of dq.
            mbarrier.arrive(p.together.index(0))
            mbarrier.wait(p.together.index(0), wave & 1)
        if p.dropout is not None:
            dk = dk * p.dropout[2]
            dv = dv * p.dropout[2]
        row_of_parts = (b * grid.heads + kv_head) * p.tiles_n * BN + n0 + WG * HALF
        if p.dk_parts is not None:
            _keep(p.dk_parts, row_of_parts, dk * p.scale)
        elif p.NEED_DK:
            p.k_s.index(kv * 2 + WG).reshape([HALF, BD]).store((dk * p.scale).to(DT))
        if p.dv_parts is not None:
            _keep(p.dv_parts, row_of_parts, dv)
        elif p.NEED_DV:
            p.v_s.index(kv * 2 + WG).reshape([HALF, BDV]).store(dv.to(DT))
        fence_async_shared()
        if p.dk_desc is not None:
            tma_store(p.dk_desc, [b, n0 + WG * HALF, own_head, 0], p.k_s.index(kv * 2 + WG))
        if p.dv_desc is not None:
            tma_store(p.dv_desc, [b, n0 + WG * HALF, own_head, 0], p.v_s.index(kv * 2 + WG))
        tma_store_wait(0)
        p.kv.release(wave, 0)


@gluon.jit
def _consume_either(p, WG: gl.constexpr):
    """One consumer: ``_consume`` in the faster way if all statistics are mild (``edges.py``)."""
    if (p.mild is not None) and (mildest(p.mild) != 0):
        _consume(p, WG, True)
    else:
        _consume(p, WG, False)


COUNTS = ["batch", "heads", "group", "splits", "batch_inner", "M", "N", "lo", "hi", "tiles_n", "tiles", "section", "snake"]


@gluon.jit(do_not_specialize=COUNTS)
def keys_backward(
    q_desc, k_desc, v_desc, o_desc, stats_desc, mild, bias_desc, dk_desc, dv_desc, dk_parts, dv_parts, dq_desc, dq_sum, bias, lengths,
    slopes, dbias, bias_strides, dbias_strides, slope_strides, bias_on, cap, dropout, mask_desc, mask, mask_strides, mask_on,
    batch, heads, group, splits, batch_inner, M, N, lo, hi, scale, tiles_n, tiles, section, snake,
    C: gl.constexpr, HAS_REST: gl.constexpr, IS_MASK: gl.constexpr, EVEN_N: gl.constexpr, ALIBI: gl.constexpr, ROW: gl.constexpr,
    BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr,
):  # fmt: skip
    """Tiles of 128 keys of a key head; ``tiles`` of them, ``tiles_n`` a (batch, key head) pair, dealt out as ``schedule.Uniform`` says.

    Descriptors of q, k, v, dout (``o_desc``), dk and dv are over (batch, length, head, dim); that of the table ``stats`` over (batch and
    head, LSE | DELTA | REST, query), written by ``prepare``. The float32 sum of dq is a descriptor over (batch, head, query, dim) or, to be
    added to straight from registers, a pointer dq_sum, with rows of ROW columns (``keys_dq.py``). A bias tile comes by a descriptor over
    its five dims, switched off by ``bias_on`` where it broadcasts; a bias that varies over keys alone as a pointer and strides, and its
    gradient goes to ``dbias`` with strides (outer batch, inner batch, head, key). A mask beside the bias comes in the same two ways.
    ``group`` query heads share a key head. With ``splits``, they are dealt out in so many parts, which then count as key heads above, and
    what each sums up to for dk and dv goes to dk_parts and dv_parts, float32 and contiguous (batch, part, whole tiles of keys, dim as the
    kernel pads it). cap: see ``features.squashed``; dropout: see ``stream_of``. None: absent, or not wanted.
    """
    DT: gl.constexpr = q_desc.dtype
    BM: gl.constexpr = C.block_m
    KEYS: gl.constexpr = 2 * C.kv_stages
    BIASES: gl.constexpr = 2 * C.bias_stages
    APART: gl.constexpr = C.apart and dq_desc is not None
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
    if dq_desc is not None:
        dq_s = gl.allocate_shared_memory(gl.float32, stacked(4 if APART else 2, dq_desc.block_shape), dq_desc.layout)
    else:
        dq_s = None
    kv = ring(C.kv_stages, 1, 2, True)
    q_full = barriers(C.q_stages, 1)
    o_full = barriers(C.o_stages, 1)
    bias_full = barriers(BIASES, 1)
    ds_empty = barriers(2, 1)
    dq_empty = barriers(2, 1)
    together = barriers(1, 2)
    fence_async_shared()

    p = Program(
        mild, dk_desc, dv_desc, dk_parts, dv_parts, dbias, bias, lengths, slopes, q_s, k_s, v_s, o_s, lse_s, delta_s, rest_s,
        bias_s, mask_s, ds_s, dq_s, dq_sum, kv, q_full, o_full, bias_full, ds_empty, dq_empty, together, bias_strides,
        dbias_strides, slope_strides, cap, dropout, mask, mask_strides, batch, heads, group, splits, batch_inner, M, N, lo, hi,
        scale, tiles_n, tiles, section, snake, C, NEED_DK, NEED_DV, NEED_DB, NEED_DS, APART, ROW, IS_MASK, EVEN_N, ALIBI,
        BATCH_FASTEST, LONGEST,
    )  # fmt: skip
    f = Feed(q_desc, k_desc, v_desc, o_desc, stats_desc, bias_desc, bias_on, mask_desc, mask_on)
    if APART:
        gl.warp_specialize(
            [(_consume_either, (p, 0)), (_consume_either, (p, 1)), (add_up_apart, (p, dq_desc)), (produce, (p, f))],
            [4, 4, 1], [208, 72, 24],
        )  # fmt: skip
    elif dq_desc is not None:
        gl.warp_specialize(
            [(_consume_either, (p, 0)), (_consume_either, (p, 1)), (produce, (p, f)), (add_up, (p, dq_desc))], [4, 1, 1], [240, 24, 24]
        )
    else:
        gl.warp_specialize([(_consume_either, (p, 0)), (_consume_either, (p, 1)), (produce, (p, f))], [4, 1], [240, 24])
