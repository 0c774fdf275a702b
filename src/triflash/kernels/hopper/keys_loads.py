"""What ``backward.py`` is fed by: the producer of the backward kernel that owns keys, and the numbers of that kernel's barriers of the
processor.
"""

from .columns import DELTA, LSE, REST, grid_of, query_heads, turned, visible_blocks
from .compat import gl, gluon, mbarrier, record, tma_load
from .extent import extent_of, outer_at
from .rings import meet

# Two a name, a buffer each, but for BIAS_FREE with two a buffer, and DQ_HERE: both halves of dq are to be added. DS_HERE: a buffer of ds is
# full; where dq is not computed apart, consumer WG is told so by the other one at DS_HERE + 8 WG.
DS_HERE, Q_FREE, O_FREE, BIAS_FREE, DQ_HERE = map(gl.constexpr, (5, 7, 9, 11, 15))


@record
class Feed:
    """What the producer alone needs: descriptors of what it loads, and along which outer dims the bias and the mask vary."""

    q_desc: object
    k_desc: object
    v_desc: object
    o_desc: object
    stats_desc: object
    bias_desc: object
    bias_on: object
    mask_desc: object
    mask_on: object


@gluon.jit
def produce(p, f):
    """The producer: every load of the program, in the order in which the consumers need them."""
    BM: gl.constexpr = p.C.block_m
    HALF: gl.constexpr = p.C.block_n // 2
    STATS: gl.constexpr = BM * 4
    Q_STAGES: gl.constexpr = p.C.q_stages
    O_STAGES: gl.constexpr = p.C.o_stages
    BIAS_STAGES: gl.constexpr = p.C.bias_stages
    BIAS_BYTES: gl.constexpr = f.bias_desc.block_type.nbytes if f.bias_desc is not None else 0
    MASK_BYTES: gl.constexpr = f.mask_desc.block_type.nbytes if f.mask_desc is not None else 0
    grid = grid_of(p)
    done = 0  # blocks of earlier tiles: buffers and phases go on counting across tiles
    for wave in range(grid.waves()):
        n0, kv_head, b = grid.locate(wave)
        begin, whole, part, end = visible_blocks(p, extent_of(b, p.M, p.N, p.lengths), n0)
        own_head, first_head, members = query_heads(kv_head, p.group, p.splits)
        kv = p.kv.slot(wave, 0)
        kv_full = p.kv.full.index(kv)
        p.kv.acquire(wave, 0)
        mbarrier.expect(kv_full, 2 * (f.k_desc.block_type.nbytes + f.v_desc.block_type.nbytes))
        for w in gl.static_range(2):
            tma_load(f.k_desc, [b, n0 + w * HALF, own_head, 0], kv_full, p.k_s.index(kv * 2 + w))
            tma_load(f.v_desc, [b, n0 + w * HALF, own_head, 0], kv_full, p.v_s.index(kv * 2 + w))
        steps = end - begin
        for step in range(steps * members):
            head = first_head + step // steps
            m0 = turned(step, steps, begin, whole, part, n0, BM) * BM
            row = b * p.heads + head
            at = done + step
            stage = at % Q_STAGES
            if at >= Q_STAGES:
                meet(Q_FREE + stage, 288)
            q_full = p.q_full.index(stage)
            if p.rest_s is not None:
                mbarrier.expect(q_full, f.q_desc.block_type.nbytes + 2 * STATS)
                tma_load(f.stats_desc, [row, REST, m0], q_full, p.rest_s.index(stage))
            else:
                mbarrier.expect(q_full, f.q_desc.block_type.nbytes + STATS)
            tma_load(f.stats_desc, [row, LSE, m0], q_full, p.lse_s.index(stage))
            tma_load(f.q_desc, [b, m0, head, 0], q_full, p.q_s.index(stage))
            if f.bias_desc is not None or f.mask_desc is not None:
                for w in gl.static_range(2):
                    slot = at % BIAS_STAGES * 2 + w
                    if at >= BIAS_STAGES:
                        meet(BIAS_FREE + slot, 160)
                    bias_full = p.bias_full.index(slot)
                    mbarrier.expect(bias_full, BIAS_BYTES + MASK_BYTES)
                    if f.bias_desc is not None:
                        outer, inner, bias_head = outer_at(b, p.batch_inner, head, f.bias_on)
                        tma_load(f.bias_desc, [outer, inner, bias_head, m0, n0 + w * HALF], bias_full, p.bias_s.index(slot))
                    if f.mask_desc is not None:
                        mask_outer, mask_inner, mask_head = outer_at(b, p.batch_inner, head, f.mask_on)
                        tma_load(f.mask_desc, [mask_outer, mask_inner, mask_head, m0, n0 + w * HALF], bias_full, p.mask_s.index(slot))
            o_stage = at % O_STAGES
            if at >= O_STAGES:
                meet(O_FREE + o_stage, 288)
            o_full = p.o_full.index(o_stage)
            mbarrier.expect(o_full, f.o_desc.block_type.nbytes + STATS)
            tma_load(f.stats_desc, [row, DELTA, m0], o_full, p.delta_s.index(o_stage))
            tma_load(f.o_desc, [b, m0, head, 0], o_full, p.o_s.index(o_stage))
        done += steps * members
