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
from .columns import key_heads, query_heads, visible_blocks
from .compat import fence_async_shared, gl, gluon, mbarrier, optional, tma_store, tma_store_wait, warpgroup_mma_wait
from .dropout import stream_of
from .features import clear_hidden, slope_of, visible_keys
from .grid import accumulator, barriers, locate, meet, mildest, share, stacked
from .keys_block import fold, less_delta, score, weigh
from .keys_dq import add_to_sum, add_up, add_up_apart, dq_hand_over, dq_product, first_block
from .keys_loads import DQ_EMPTY, DS_EMPTY, DS_HERE, KV_EMPTY, KV_FULL, TOGETHER, produce


@gluon.jit
def _walk(
    dk, dv, db, place, k_s, v_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum, bars, key_bias, key_mask, slope,
    stream, cap, done, base, sum_base, first, last, start, stop, n0, ahead, N, lo, hi, scale_log2,
    WG: gl.constexpr, BM: gl.constexpr, HALF: gl.constexpr, BIAS_STAGES: gl.constexpr,
    IS_MASK: gl.constexpr, KEY_BIASED: gl.constexpr, NEED_DK: gl.constexpr, NEED_DV: gl.constexpr, NEED_DB: gl.constexpr,
    APART: gl.constexpr, ALIBI: gl.constexpr, MASKED: gl.constexpr, UNROLL: gl.constexpr, MILD: gl.constexpr, ROW: gl.constexpr,
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
    LESS_DELTA: gl.constexpr = less_delta(stream is not None, APART)
    k = k_s.index(kv * 2 + WG).reshape([HALF, BD])  # in registers they would save a fifth of what is read, but see docs/tuning.md
    v = v_s.index(kv * 2 + WG).reshape([HALF, BDV])
    for group in range(first, last, UNROLL):
        s, lse = score(k, q_s, lse_s, bars, base + group, BM)
        dp = weigh(v, o_s, delta_s, bars, base + group, s, BM, NEED_DS, LESS_DELTA)
        for u in gl.static_range(UNROLL):
            s, dp, lse, dk, dv, db, place = fold(
                s, dp, lse, dk, dv, db, place, k, v, k_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum, bars,
                key_bias, key_mask, slope, stream, cap, done, base, sum_base, group + u, start, stop, n0, ahead, N, lo, hi, scale_log2, WG,
                BM, HALF, BIAS_STAGES, IS_MASK, KEY_BIASED, NEED_DK, NEED_DV, NEED_DB, APART, ALIBI, MASKED, u + 1 < UNROLL, MILD, ROW,
            )  # fmt: skip
    return dk, dv, db, place


@gluon.jit
def _walk_all(
    dk, dv, db, place, k_s, v_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum, bars, key_bias, key_mask, slope,
    stream, cap, done, base, sum_base, first, last, n0, ahead, N, lo, hi, scale_log2,
    WG: gl.constexpr, BM: gl.constexpr, HALF: gl.constexpr, BIAS_STAGES: gl.constexpr,
    IS_MASK: gl.constexpr, KEY_BIASED: gl.constexpr, NEED_DK: gl.constexpr, NEED_DV: gl.constexpr, NEED_DB: gl.constexpr,
    APART: gl.constexpr, ALIBI: gl.constexpr, MASKED: gl.constexpr, UNROLL: gl.constexpr, MILD: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """``_walk``, UNROLL blocks a step as long as there are so many, and then one by one."""
    alone = first
    if UNROLL > 1:
        alone = first + max(last - first, 0) // UNROLL * UNROLL
        dk, dv, db, place = _walk(
            dk, dv, db, place, k_s, v_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum, bars, key_bias, key_mask,
            slope, stream, cap, done, base, sum_base, first, alone, first, last, n0, ahead, N, lo, hi, scale_log2, WG, BM, HALF,
            BIAS_STAGES, IS_MASK, KEY_BIASED, NEED_DK, NEED_DV, NEED_DB, APART, ALIBI, MASKED, UNROLL, MILD, ROW,
        )  # fmt: skip
    return _walk(
        dk, dv, db, place, k_s, v_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum, bars, key_bias, key_mask,
        slope, stream, cap, done, base, sum_base, alone, last, first, last, n0, ahead, N, lo, hi, scale_log2, WG, BM, HALF, BIAS_STAGES,
        IS_MASK, KEY_BIASED, NEED_DK, NEED_DV, NEED_DB, APART, ALIBI, MASKED, 1, MILD, ROW,
    )  # fmt: skip


@gluon.jit
def _keep(parts, row, x):
    """x to float32 rows of its length, from ``row`` on, past the end of no array."""
    L: gl.constexpr = x.type.layout
    i = gl.expand_dims(gl.arange(0, x.shape[0], gl.SliceLayout(1, L)), 1)
    c = gl.expand_dims(gl.arange(0, x.shape[1], gl.SliceLayout(0, L)), 0)
    i, c = gl.broadcast(i, c)
    gl.store(parts + (offset(row, x.shape[1]) + (i * x.shape[1] + c)), x)


@gluon.jit
def _consume(
    dk_desc, dv_desc, dk_parts, dv_parts, dbias, bias, lengths, slopes, q_s, k_s, v_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s,
    dq_s, dq_sum, bars, bias_strides, dbias_strides, slope_strides, cap, dropout, mask, mask_strides, batch, heads, group, splits,
    batch_inner, M, N, lo, hi, scale, tiles_n, tiles, section, snake, WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr, KV_STAGES: gl.constexpr,
    BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr, IS_MASK: gl.constexpr, EVEN_N: gl.constexpr, ALIBI: gl.constexpr,
    APART: gl.constexpr, UNROLL: gl.constexpr, MILD: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 keys of every tile of the program."""
    HALF: gl.constexpr = BN // 2
    BD: gl.constexpr = k_s.shape[4]
    BDV: gl.constexpr = v_s.shape[4]
    DT: gl.constexpr = k_s.dtype
    NEED_DK: gl.constexpr = dk_desc is not None or dk_parts is not None
    NEED_DV: gl.constexpr = dv_desc is not None or dv_parts is not None
    NEED_DB: gl.constexpr = dbias is not None
    KEY_BIASED: gl.constexpr = bias is not None
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BM))
    kv_heads = key_heads(heads, group, splits)
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
        own_head, first_head, members = query_heads(kv_head, group, splits)
        for member in range(members):
            head = first_head + member
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
                    NEED_DK, NEED_DV, NEED_DB, APART, ALIBI, True, 1, MILD, ROW,
                )  # fmt: skip
            dk, dv, db, place = _walk_all(
                dk, dv, db, place, k_s, v_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum, bars, key_bias,
                key_mask, slope, stream, cap, done, base, sum_base, whole,
                part, n0, N - M, n_keys, lo, hi, scale_log2, WG, BM, HALF, BIAS_STAGES, IS_MASK, KEY_BIASED,
                NEED_DK, NEED_DV, NEED_DB, APART, ALIBI, False, UNROLL, MILD, ROW,
            )  # fmt: skip
            if lo is not None:
                dk, dv, db, place = _walk_all(
                    dk, dv, db, place, k_s, v_s, kv, q_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s, ds_s, dq_s, dq_sum, bars, key_bias,
                    key_mask, slope, stream, cap, done, base, sum_base, part,
                    end,
                    n0, N - M, n_keys, lo, hi, scale_log2, WG, BM, HALF, BIAS_STAGES, IS_MASK, KEY_BIASED,
                    NEED_DK, NEED_DV, NEED_DB, APART, ALIBI, True, 1, MILD, ROW,
                )  # fmt: skip
            if NEED_DB:
                target = dbias + offset(b // batch_inner, dbias_strides[0]) + offset(b % batch_inner, dbias_strides[1])
                target += offset(head, dbias_strides[2])
                if dropout is not None:
                    db = db * dropout[2]
                gl.store(target + j.to(gl.int64) * dbias_strides[3], db.to(dbias.dtype.element_ty), mask=j < N)
        done += steps * members
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
        part = (b * kv_heads + kv_head) * tiles_n * BN + n0 + WG * HALF
        if dk_parts is not None:
            _keep(dk_parts, part, dk * scale)
        elif NEED_DK:
            k_s.index(kv * 2 + WG).reshape([HALF, BD]).store((dk * scale).to(DT))
        if dv_parts is not None:
            _keep(dv_parts, part, dv)
        elif NEED_DV:
            v_s.index(kv * 2 + WG).reshape([HALF, BDV]).store(dv.to(DT))
        fence_async_shared()
        if dk_desc is not None:
            tma_store(dk_desc, [b, n0 + WG * HALF, own_head, 0], k_s.index(kv * 2 + WG))
        if dv_desc is not None:
            tma_store(dv_desc, [b, n0 + WG * HALF, own_head, 0], v_s.index(kv * 2 + WG))
        tma_store_wait(0)
        mbarrier.arrive(bars[KV_EMPTY].index(kv))


@gluon.jit
def _consume_either(
    mild, dk_desc, dv_desc, dk_parts, dv_parts, dbias, bias, lengths, slopes, q_s, k_s, v_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s,
    ds_s, dq_s, dq_sum, bars, bias_strides, dbias_strides, slope_strides, cap, dropout, mask, mask_strides, batch, heads, group, splits,
    batch_inner, M, N, lo, hi, scale, tiles_n, tiles, section, snake, WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr, KV_STAGES: gl.constexpr,
    BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr, IS_MASK: gl.constexpr, EVEN_N: gl.constexpr, ALIBI: gl.constexpr,
    APART: gl.constexpr, UNROLL: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """One consumer: ``_consume`` in the faster way if all statistics are mild (``edges.py``)."""
    if (mild is not None) and (mildest(mild) != 0):
        _consume(
            dk_desc, dv_desc, dk_parts, dv_parts, dbias, bias, lengths, slopes, q_s, k_s, v_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s,
            ds_s, dq_s, dq_sum, bars, bias_strides, dbias_strides, slope_strides, cap, dropout, mask, mask_strides, batch, heads,
            group, splits, batch_inner, M, N, lo, hi, scale, tiles_n, tiles, section, snake, WG, BM, BN, Q_STAGES, O_STAGES,
            BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST, IS_MASK, EVEN_N, ALIBI, APART, UNROLL, True, ROW,
        )  # fmt: skip
    else:
        _consume(
            dk_desc, dv_desc, dk_parts, dv_parts, dbias, bias, lengths, slopes, q_s, k_s, v_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s,
            ds_s, dq_s, dq_sum, bars, bias_strides, dbias_strides, slope_strides, cap, dropout, mask, mask_strides, batch, heads,
            group, splits, batch_inner, M, N, lo, hi, scale, tiles_n, tiles, section, snake, WG, BM, BN, Q_STAGES, O_STAGES,
            BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST, IS_MASK, EVEN_N, ALIBI, APART, UNROLL, False, ROW,
        )  # fmt: skip


COUNTS = ["batch", "heads", "group", "splits", "batch_inner", "M", "N", "lo", "hi", "tiles_n", "tiles", "section", "snake"]


@gluon.jit(do_not_specialize=COUNTS)
def keys_backward(
    q_desc, k_desc, v_desc, o_desc, stats_desc, mild, bias_desc, dk_desc, dv_desc, dk_parts, dv_parts, dq_desc, dq_sum, bias, lengths,
    slopes, dbias, bias_strides, dbias_strides, slope_strides, bias_on, cap, dropout, mask_desc, mask, mask_strides, mask_on,
    batch, heads, group, splits, batch_inner, M, N, lo, hi, scale, tiles_n, tiles, section, snake,
    BM: gl.constexpr, BN: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr, KV_STAGES: gl.constexpr,
    HAS_REST: gl.constexpr, IS_MASK: gl.constexpr, EVEN_N: gl.constexpr, ALIBI: gl.constexpr, APART: gl.constexpr, UNROLL: gl.constexpr,
    ROW: gl.constexpr, BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr,
):  # fmt: skip
    """Tiles of BN = 128 keys of a key head; ``tiles`` of them, ``tiles_n`` a (batch, key head) pair, dealt out as ``locate`` says.

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
            (_consume_either, (optional(mild), optional(dk_desc), optional(dv_desc), optional(dk_parts), optional(dv_parts),
                        optional(dbias), optional(bias), optional(lengths), optional(slopes), q_s, k_s, v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), optional(ds_s), optional(dq_s), optional(dq_sum),
                        bars, optional(bias_strides),
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(dropout), optional(mask),
                        optional(mask_strides), batch,
                        heads, group, optional(splits), batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_n, tiles, section, snake, 0, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST,
                        IS_MASK, EVEN_N, ALIBI, APART, UNROLL, ROW)),
            (_consume_either, (optional(mild), optional(dk_desc), optional(dv_desc), optional(dk_parts), optional(dv_parts),
                        optional(dbias), optional(bias), optional(lengths), optional(slopes), q_s, k_s, v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), optional(ds_s), optional(dq_s), optional(dq_sum),
                        bars, optional(bias_strides),
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(dropout), optional(mask),
                        optional(mask_strides), batch,
                        heads, group, optional(splits), batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_n, tiles, section, snake, 1, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST,
                        IS_MASK, EVEN_N, ALIBI, APART, UNROLL, ROW)),
            (add_up_apart, (dq_desc, optional(lengths), k_s, ds_s, dq_s, bars, batch, heads, group, optional(splits), M, N, optional(lo),
                             optional(hi), tiles_n, tiles, section, snake, BM, BN, KV_STAGES, BATCH_FASTEST, LONGEST)),
            (produce, (q_desc, k_desc, v_desc, o_desc, stats_desc, optional(bias_desc), optional(mask_desc), optional(lengths), q_s, k_s,
                        v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), bars, batch, heads, group, optional(splits), batch_inner, M,
                        N, optional(lo), optional(hi), optional(bias_on), optional(mask_on), tiles_n, tiles, section, snake, BM, BN,
                        Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST)),
        ], [4, 4, 1], [208, 72, 24])  # fmt: skip
    elif dq_desc is not None:
        gl.warp_specialize([
            (_consume_either, (optional(mild), optional(dk_desc), optional(dv_desc), optional(dk_parts), optional(dv_parts),
                        optional(dbias), optional(bias), optional(lengths), optional(slopes), q_s, k_s, v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), optional(ds_s), optional(dq_s), optional(dq_sum),
                        bars, optional(bias_strides),
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(dropout), optional(mask),
                        optional(mask_strides), batch,
                        heads, group, optional(splits), batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_n, tiles, section, snake, 0, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST,
                        IS_MASK, EVEN_N, ALIBI, APART, UNROLL, ROW)),
            (_consume_either, (optional(mild), optional(dk_desc), optional(dv_desc), optional(dk_parts), optional(dv_parts),
                        optional(dbias), optional(bias), optional(lengths), optional(slopes), q_s, k_s, v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), optional(ds_s), optional(dq_s), optional(dq_sum),
                        bars, optional(bias_strides),
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(dropout), optional(mask),
                        optional(mask_strides), batch,
                        heads, group, optional(splits), batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_n, tiles, section, snake, 1, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST,
                        IS_MASK, EVEN_N, ALIBI, APART, UNROLL, ROW)),
            (produce, (q_desc, k_desc, v_desc, o_desc, stats_desc, optional(bias_desc), optional(mask_desc), optional(lengths), q_s, k_s,
                        v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), bars, batch, heads, group, optional(splits), batch_inner, M,
                        N, optional(lo), optional(hi), optional(bias_on), optional(mask_on), tiles_n, tiles, section, snake, BM, BN,
                        Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST)),
            (add_up, (dq_desc, optional(lengths), dq_s, bars, batch, heads, group, optional(splits), M, N, optional(lo), optional(hi),
                       tiles_n, tiles, section, snake, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST)),
        ], [4, 1, 1], [240, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume_either, (optional(mild), optional(dk_desc), optional(dv_desc), optional(dk_parts), optional(dv_parts),
                        optional(dbias), optional(bias), optional(lengths), optional(slopes), q_s, k_s, v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), optional(ds_s), optional(dq_s), optional(dq_sum),
                        bars, optional(bias_strides),
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(dropout), optional(mask),
                        optional(mask_strides), batch,
                        heads, group, optional(splits), batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_n, tiles, section, snake, 0, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST,
                        IS_MASK, EVEN_N, ALIBI, APART, UNROLL, ROW)),
            (_consume_either, (optional(mild), optional(dk_desc), optional(dv_desc), optional(dk_parts), optional(dv_parts),
                        optional(dbias), optional(bias), optional(lengths), optional(slopes), q_s, k_s, v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), optional(ds_s), optional(dq_s), optional(dq_sum),
                        bars, optional(bias_strides),
                        optional(dbias_strides), optional(slope_strides), optional(cap), optional(dropout), optional(mask),
                        optional(mask_strides), batch,
                        heads, group, optional(splits), batch_inner, M, N, optional(lo),
                        optional(hi), scale,
                        tiles_n, tiles, section, snake, 1, BM, BN, Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST,
                        IS_MASK, EVEN_N, ALIBI, APART, UNROLL, ROW)),
            (produce, (q_desc, k_desc, v_desc, o_desc, stats_desc, optional(bias_desc), optional(mask_desc), optional(lengths), q_s, k_s,
                        v_s, o_s, lse_s, delta_s,
                        optional(rest_s), optional(bias_s), optional(mask_s), bars, batch, heads, group, optional(splits), batch_inner, M,
                        N, optional(lo), optional(hi), optional(bias_on), optional(mask_on), tiles_n, tiles, section, snake, BM, BN,
                        Q_STAGES, O_STAGES, BIAS_STAGES, KV_STAGES, BATCH_FASTEST, LONGEST)),
        ], [4, 1], [240, 24])  # fmt: skip
