"""dq where a program has all key tiles of a (batch, head) pair, one after the other: summed up in shared memory. Called by ``dkdv.py``.

A warpgroup of its own computes ``ds k`` of a block of queries onto what earlier key tiles gave, in a fixed order, and writes dq when the
pair's last tile is done. There is no float32 sum in global memory to clear, add to and read again. As many queries fit as shared memory
has room for, 128 bytes each and 32 columns of a head.
"""

from .compat import fence_async_shared, gl, gluon, mbarrier, reinterpret, tma_store, tma_store_wait, warpgroup_mma, warpgroup_mma_wait
from .dkdv_step import DS_HERE
from .extent import extent_of, query_rows
from .layouts import accumulator
from .rings import bar_sync
from .scores_kq import bare_blocks, grid_of, turned, visible_blocks


@gluon.jit
def run_dq_of_pairs(p, dq_desc):
    """The warpgroup that sums dq up and writes it."""
    BM: gl.constexpr = p.C.block_m
    BD: gl.constexpr = p.k_s.shape[-1]
    HALF: gl.constexpr = p.C.block_n // 2
    S: gl.constexpr = accumulator(BD)
    grid = grid_of(p)
    nothing = gl.zeros([BM, BD], gl.float32, S)
    blocks = (p.M + BM - 1) // BM
    done = 0
    for wave in range(grid.waves()):
        n0, head, b = grid.locate(wave)
        x = extent_of(p, b)
        begin, whole, part, end = visible_blocks(p, x, n0, head)
        bare = bare_blocks(p, x, n0, head, whole, part)
        steps = end - begin
        if grid.begins_pair(wave):  # while consumers compute the first ds
            tma_store_wait(0)  # dq of the pair before
            for block in range(blocks):
                p.dq_s.index(block).store(nothing)
            fence_async_shared()
        kv = p.kv.slot(wave, 0)
        k0 = p.k_s.index(kv * 2).reshape([HALF, BD])
        k1 = p.k_s.index(kv * 2 + 1).reshape([HALF, BD])
        if steps > 0:  # else nobody waits for this partition, and it might find them full of another tile
            p.kv.wait(wave, 0)
        for step in range(steps):
            own = p.dq_s.index(turned(p, step, steps, begin, whole, part, bare, n0, BM))
            slot = (done + step) & 1
            dq = own.load(S)
            bar_sync(DS_HERE + slot, 384)
            pending = warpgroup_mma(p.ds_s.index(slot * 2), k0, dq, is_async=True)
            pending = warpgroup_mma(p.ds_s.index(slot * 2 + 1), k1, pending, is_async=True)
            dq = warpgroup_mma_wait(0, [pending])
            own.store(dq)
            fence_async_shared()  # nobody else reads sums, but what is read and stored is fenced before others are told of anything
            mbarrier.arrive(p.ds_empty.index(slot))
        done += steps
        if grid.ends_pair(wave):
            factor = p.scale
            if p.dropout is not None:
                factor = factor * p.dropout[2]
            for block in range(blocks):  # in 16 bits, in the first half of the room that they had
                own = p.dq_s.index(block)
                dq = (own.load(S) * factor).to(dq_desc.dtype)
                half = reinterpret(own, dq_desc.dtype, dq_desc.block_shape, dq_desc.layout)
                half.reshape([BM, BD]).store(dq)
                fence_async_shared()
                tma_store(dq_desc, query_rows(p, x, block * BM, head), half)
    tma_store_wait(0)
