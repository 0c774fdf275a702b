"""What ``backward.py`` is fed by: the producer of the backward kernel that owns keys, and the names of that kernel's barriers."""

from .columns import DELTA, LSE, REST, key_heads, query_heads, turned, visible_blocks
from .compat import gl, gluon, mbarrier, tma_load
from .features import visible_keys
from .grid import locate, meet, share

# A program's barriers in shared memory are a tuple with an element a name, which holds one for every buffer.
KV_FULL, KV_EMPTY, Q_FULL, O_FULL, BIAS_FULL, DS_EMPTY, DQ_EMPTY, TOGETHER = map(gl.constexpr, range(8))
# Barriers of the processor, two a name, a buffer each, but for BIAS_FREE with two a buffer, and DQ_HERE: both halves of dq are to be added.
# DS_HERE: a buffer of ds is full; where dq is not computed apart, consumer WG is told so by the other one at DS_HERE + 8 WG.
DS_HERE, Q_FREE, O_FREE, BIAS_FREE, DQ_HERE = map(gl.constexpr, (5, 7, 9, 11, 15))


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, o_desc, stats_desc, bias_desc, mask_desc, lengths, q_s, k_s, v_s, o_s, lse_s, delta_s, rest_s, bias_s, mask_s,
    bars, batch, heads, group, splits, batch_inner, M, N, lo, hi, bias_on, mask_on, tiles_n, tiles, section, snake,
    BM: gl.constexpr, BN: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr, KV_STAGES: gl.constexpr,
    BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr,
):  # fmt: skip
    """The producer: every load of the program, in the order in which the consumers need them."""
    HALF: gl.constexpr = BN // 2
    STATS: gl.constexpr = BM * 4
    kv_heads = key_heads(heads, group, splits)
    BIAS_BYTES: gl.constexpr = bias_desc.block_type.nbytes if bias_desc is not None else 0
    MASK_BYTES: gl.constexpr = mask_desc.block_type.nbytes if mask_desc is not None else 0
    done = 0  # blocks of earlier tiles: buffers and phases go on counting across tiles
    for wave in range(share(tiles, snake)):
        n0, kv_head, b = locate(wave, tiles_n, batch, kv_heads, section, snake, BATCH_FASTEST, BN, LONGEST)
        begin, whole, part, end = visible_blocks(n0, M, visible_keys(lengths, b, N), lo, hi, BM, BN)
        own_head, first_head, members = query_heads(kv_head, group, splits)
        kv = wave % KV_STAGES
        full = bars[KV_FULL].index(kv)
        mbarrier.wait(bars[KV_EMPTY].index(kv), ((wave // KV_STAGES) & 1) ^ 1)
        mbarrier.expect(full, 2 * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
        for w in gl.static_range(2):
            tma_load(k_desc, [b, n0 + w * HALF, own_head, 0], full, k_s.index(kv * 2 + w))
            tma_load(v_desc, [b, n0 + w * HALF, own_head, 0], full, v_s.index(kv * 2 + w))
        steps = end - begin
        for step in range(steps * members):
            head = first_head + step // steps
            m0 = turned(step, steps, begin, whole, part, n0, BM) * BM
            row = b * heads + head
            at = done + step
            stage = at % Q_STAGES
            if at >= Q_STAGES:
                meet(Q_FREE + stage, 288)
            if rest_s is not None:
                mbarrier.expect(bars[Q_FULL].index(stage), q_desc.block_type.nbytes + 2 * STATS)
                tma_load(stats_desc, [row, REST, m0], bars[Q_FULL].index(stage), rest_s.index(stage))
            else:
                mbarrier.expect(bars[Q_FULL].index(stage), q_desc.block_type.nbytes + STATS)
            tma_load(stats_desc, [row, LSE, m0], bars[Q_FULL].index(stage), lse_s.index(stage))
            tma_load(q_desc, [b, m0, head, 0], bars[Q_FULL].index(stage), q_s.index(stage))
            if bias_desc is not None or mask_desc is not None:
                for w in gl.static_range(2):
                    slot = at % BIAS_STAGES * 2 + w
                    if at >= BIAS_STAGES:
                        meet(BIAS_FREE + slot, 160)
                    mbarrier.expect(bars[BIAS_FULL].index(slot), BIAS_BYTES + MASK_BYTES)
                    if bias_desc is not None:
                        at_bias = [b // batch_inner * bias_on[0], b % batch_inner * bias_on[1], head * bias_on[2], m0, n0 + w * HALF]
                        tma_load(bias_desc, at_bias, bars[BIAS_FULL].index(slot), bias_s.index(slot))
                    if mask_desc is not None:
                        at_mask = [b // batch_inner * mask_on[0], b % batch_inner * mask_on[1], head * mask_on[2], m0, n0 + w * HALF]
                        tma_load(mask_desc, at_mask, bars[BIAS_FULL].index(slot), mask_s.index(slot))
            stage = at % O_STAGES
            if at >= O_STAGES:
                meet(O_FREE + stage, 288)
            mbarrier.expect(bars[O_FULL].index(stage), o_desc.block_type.nbytes + STATS)
            tma_load(stats_desc, [row, DELTA, m0], bars[O_FULL].index(stage), delta_s.index(stage))
            tma_load(o_desc, [b, m0, head, 0], bars[O_FULL].index(stage), o_s.index(stage))
        done += steps * members
