"""The producer of the kernel for Hopper that owns keys of wide heads: every TMA load of a CTA. Called by ``dkdv_d256.py``."""

from .blocks import load_block, one_of
from .compat import gl, gluon, mbarrier, record, tma_load
from .extent import extent_of, key_place, outer_at, padded_row, pair_of, place_in_bias, query_place
from .scores_kq import DELTA, LSE, REST, bare_blocks, grid_of, tile_of_mask, turned, visible_blocks


@record
class Feed:
    """As of ``scores_kq``, of blocks in pieces."""

    q: object
    k: object
    v: object
    o: object
    stats_desc: object
    bias_desc: object
    bias_on: object
    mask_desc: object
    mask_on: object


@gluon.jit
def _fetch_bias(p, f, at, x, head, m0, n0):
    """The tiles of the bias and of the mask beside it, number ``at`` of the program."""
    BIAS_BYTES: gl.constexpr = f.bias_desc.block_type.nbytes if f.bias_desc is not None else 0
    MASK_BYTES: gl.constexpr = f.mask_desc.block_type.nbytes if f.mask_desc is not None else 0
    full = p.biases.acquire(at, 0)
    mbarrier.expect(full, BIAS_BYTES + MASK_BYTES)
    if f.bias_desc is not None:
        outer, inner, bias_head = outer_at(x.b, p.batch_inner, head, f.bias_on)
        row, column = place_in_bias(p, x, m0, n0, 0)
        tma_load(f.bias_desc, [outer, inner, bias_head, row, column], full, p.bias_s)
    if f.mask_desc is not None:
        mask_outer, mask_inner, mask_head = outer_at(x.b, p.batch_inner, head, f.mask_on)
        mask_row, mask_column = place_in_bias(p, x, m0, n0, 1)
        tma_load(f.mask_desc, [mask_outer, mask_inner, mask_head, mask_row, mask_column], full, p.mask_s)


@gluon.jit
def produce(p, f):
    """The producer: every load of the program, in the order in which the consumers need them."""
    BM: gl.constexpr = p.C.block_m
    STATS: gl.constexpr = BM * 4
    Q_BYTES: gl.constexpr = f.q.first.block_type.nbytes + (f.q.second.block_type.nbytes if f.q.second is not None else 0)
    K_BYTES: gl.constexpr = f.k.first.block_type.nbytes + (f.k.second.block_type.nbytes if f.k.second is not None else 0)
    V_BYTES: gl.constexpr = f.v.first.block_type.nbytes + (f.v.second.block_type.nbytes if f.v.second is not None else 0)
    O_BYTES: gl.constexpr = f.o.first.block_type.nbytes + (f.o.second.block_type.nbytes if f.o.second is not None else 0)
    grid = grid_of(p)
    done = 0  # blocks of earlier tiles: buffers and phases go on counting across tiles
    masks = 0  # likewise their tiles of a mask, where some blocks have none
    for wave in range(grid.waves()):
        n0, kv_head, b = grid.locate(wave)
        x = extent_of(p, b)
        begin, whole, part, end = visible_blocks(p, x, n0, kv_head)
        bare = bare_blocks(p, x, n0, kv_head, whole, part)
        kv_full = p.kv.acquire(wave, 0)
        mbarrier.expect(kv_full, K_BYTES + V_BYTES)
        load_block(p, f.k, key_place(x, n0), kv_head, kv_full, p.k_s)
        load_block(p, f.v, key_place(x, n0), kv_head, kv_full, p.v_s)
        steps = end - begin
        for step in range(steps * p.group):
            head = kv_head * p.group + step // steps
            block = turned(p, step, steps, begin, whole, part, bare, n0, BM)
            m0 = block * BM
            row = pair_of(p, x, head)
            padded = padded_row(x, m0)
            at = done + step
            stage = p.queries.slot(at, 0)
            phase = p.queries.phase(at) ^ 1
            mbarrier.wait(p.queries.empty.index(stage), phase)
            q_full = p.queries.full.index(stage)
            if p.rest_s is not None:
                mbarrier.expect(q_full, Q_BYTES + 2 * STATS)
                tma_load(f.stats_desc, [row, REST, padded], q_full, p.rest_s.index(stage))
            else:
                mbarrier.expect(q_full, Q_BYTES + STATS)
            tma_load(f.stats_desc, [row, LSE, padded], q_full, p.lse_s.index(stage))
            load_block(p, f.q, query_place(x, m0), head, q_full, one_of(p.q_s, stage))
            if p.SKIPS:
                if (block < bare.begin) | (block >= bare.end):
                    _fetch_bias(p, f, tile_of_mask(p, masks, step, steps, bare, block, part), x, head, m0, n0)
            elif f.bias_desc is not None or f.mask_desc is not None:
                _fetch_bias(p, f, at, x, head, m0, n0)
            mbarrier.wait(p.douts.empty.index(stage), phase)
            o_full = p.douts.full.index(stage)
            mbarrier.expect(o_full, O_BYTES + STATS)
            tma_load(f.stats_desc, [row, DELTA, padded], o_full, p.delta_s.index(stage))
            load_block(p, f.o, query_place(x, m0), head, o_full, one_of(p.o_s, stage))
        done += steps * p.group
        if p.SKIPS:
            masks += (steps - (bare.end - bare.begin)) * p.group
