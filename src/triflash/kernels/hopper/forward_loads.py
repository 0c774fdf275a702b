"""The producer of the forward kernel for Hopper: every TMA load of a CTA. Called by ``forward.py``, and ``fetch_bias`` by ``dq.py``."""

from .blocks import load_block, one_of
from .compat import gl, gluon, mbarrier, record, tma_load
from .extent import extent_of, outer_at, place_in_bias, place_of, query_place
from .scores_qk import BM, bare_blocks, grid_of, in_order, tile_of_mask, visible_blocks


@record
class Feed:
    """What the producer alone needs: descriptors of what it loads, along which outer dims the biases and the mask vary, and how many
    query heads share a key head.
    """

    q: object
    k: object
    v: object
    bias_desc: object
    bias_on: object
    second_desc: object
    second_on: object
    mask_desc: object
    mask_on: object
    group: object


@gluon.jit
def fetch_bias(p, f, at, x, head, m0, n0):
    """For every consumer its tile of the bias, and of the second bias and the mask beside it, of block ``at``."""
    BIAS_BYTES: gl.constexpr = f.bias_desc.block_type.nbytes
    SECOND_BYTES: gl.constexpr = f.second_desc.block_type.nbytes if f.second_desc is not None else 0
    MASK_BYTES: gl.constexpr = f.mask_desc.block_type.nbytes if f.mask_desc is not None else 0
    WGS: gl.constexpr = p.C.consumers
    for w in gl.static_range(WGS):
        slot = p.biases.slot(at, w)
        full = p.biases.acquire(at, w)
        mbarrier.expect(full, BIAS_BYTES + SECOND_BYTES + MASK_BYTES)
        row = 0
        if p.VARIES_M:
            row = m0 + w * BM
        outer, inner, bias_head = outer_at(x.b, p.batch_inner, head, f.bias_on)
        row, column = place_in_bias(p, x, row, n0, 0)
        tma_load(f.bias_desc, [outer, inner, bias_head, row, column], full, p.bias_s.index(slot))
        if f.second_desc is not None:
            second_outer, second_inner, second_head = outer_at(x.b, p.batch_inner, head, f.second_on)
            tma_load(f.second_desc, [second_outer, second_inner, second_head, 0, n0], full, p.second_s.index(slot))
        if f.mask_desc is not None:
            mask_row = 0
            if p.mask_s.shape[4] > 1:
                mask_row = m0 + w * BM
            mask_outer, mask_inner, mask_head = outer_at(x.b, p.batch_inner, head, f.mask_on)
            mask_row, mask_column = place_in_bias(p, x, mask_row, n0, 1)
            tma_load(f.mask_desc, [mask_outer, mask_inner, mask_head, mask_row, mask_column], full, p.mask_s.index(slot))


@gluon.jit
def _fetch_queries(p, f, wave, x, m0, head):
    """The queries of a tile, for every consumer its own."""
    Q_BYTES: gl.constexpr = f.q.first.block_type.nbytes + (f.q.second.block_type.nbytes if f.q.second is not None else 0)
    WGS: gl.constexpr = p.C.consumers
    for w in gl.static_range(WGS):
        full = p.queries.acquire(wave, w)
        mbarrier.expect(full, Q_BYTES)
        load_block(p, f.q, query_place(x, m0 + w * BM), head, full, one_of(p.q_s, p.queries.slot(wave, w)))


@gluon.jit
def produce(p, f):
    """The producer: every load of the program, in the order in which the consumers need them.

    Keys of a block come with the values of the block before, also of another tile: that is what consumers multiply by in one step.
    """
    BN: gl.constexpr = p.C.block_n
    K_BYTES: gl.constexpr = f.k.first.block_type.nbytes + (f.k.second.block_type.nbytes if f.k.second is not None else 0)
    V_BYTES: gl.constexpr = f.v.first.block_type.nbytes + (f.v.second.block_type.nbytes if f.v.second is not None else 0)
    grid = grid_of(p, 1)
    done = 0  # blocks of earlier tiles: buffers and phases go on counting across tiles
    masks = 0  # likewise their tiles of a mask, where some blocks have none
    n_before = 0  # where the values of the block before lie: ``place_of``, and their head
    head_before = 0
    b_before = 0
    for wave in range(grid.waves()):
        m0, head, b = grid.locate(wave)
        x = extent_of(p, b)
        begin, full_begin, full_end, end = visible_blocks(p, x, m0, head)
        bare = bare_blocks(p, x, m0, head, full_begin, full_end, end)
        for j in range(end - begin):
            block = in_order(p, bare, end - 1 - j)
            n0 = block * BN
            at = done + j
            if p.C.q_stages == 2:  # before the first keys, whose buffer may not be free for long yet
                if j == 0:
                    _fetch_queries(p, f, wave, x, m0, head)
            stage = p.kv.slot(at, 0)
            full = p.kv.full.index(stage)
            p.kv.acquire(at, 0)
            mbarrier.expect(full, K_BYTES + V_BYTES, pred=at > 0)
            mbarrier.expect(full, K_BYTES, pred=at == 0)
            place = place_of(x, x.first_key, x.keys, n0)
            load_block(p, f.k, place, head // f.group, full, one_of(p.k_s, stage))
            if at > 0:
                load_block(p, f.v, (b_before, n_before), head_before, full, one_of(p.v_s, stage))
            n_before = place[1]
            head_before = head // f.group
            b_before = place[0]
            if p.C.q_stages == 1:
                if j == 0:
                    _fetch_queries(p, f, wave, x, m0, head)
            if p.SKIPS:
                if (block < bare.begin) | (block >= bare.end):
                    fetch_bias(p, f, tile_of_mask(p, masks, j, bare, block), x, head, m0, n0)
            elif f.bias_desc is not None:
                fetch_bias(p, f, at, x, head, m0, n0)
        done += end - begin
        if p.SKIPS:
            masks += end - begin - (bare.end - bare.begin)
    full = p.kv.acquire(done, 0)
    mbarrier.expect(full, V_BYTES)
    load_block(p, f.v, (b_before, n_before), head_before, full, one_of(p.v_s, p.kv.slot(done, 0)))
