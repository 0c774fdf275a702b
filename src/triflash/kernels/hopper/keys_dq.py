"""dq in the backward kernel that owns keys (``backward.py``): its product, by the consumers or by a warpgroup of its own, and its sum.

The sum is float32, in global memory, in blocks of 64 queries of a (batch, head) pair. TMA adds to it from shared memory, rows behind rows.
What is added straight from registers goes there four numbers of a thread at a time, and so a block is laid out as registers hold it: groups
of eight columns, in a group 16 queries a warp, in those eight times four threads, of which each has two neighbours in a row and those eight
rows further down. ``edges.py`` clears and reads it.
"""

from ..triton.prims import offset
from .columns import grid_of, query_heads, turned, visible_blocks
from .compat import fence_async_shared, gl, gluon, mbarrier, tma_add, tma_store_wait, warpgroup_mma, warpgroup_mma_wait
from .extent import extent_of
from .keys_loads import DQ_HERE, DS_HERE
from .layouts import accumulator
from .rings import meet, signal

_ADD_FOUR = gl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p, $12, 0; @p red.relaxed.gpu.global.add.v4.f32 [$4], {$8, $9, $10, $11}; }"
    " mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;"
)
_OPERANDS = gl.constexpr("=r,=r,=r,=r,l,l,l,l,f,f,f,f,r,r,r,r")


@gluon.jit
def first_block(pair, M, BM: gl.constexpr):
    """The number, in the sum, of the first block of queries of a pair of batch and head."""
    return pair * ((M + BM - 1) // BM)


@gluon.jit
def add_to_sum(dq_sum, block, dq, go, FIRST: gl.constexpr, ROW: gl.constexpr):
    """Add dq, the columns from FIRST on of a block of queries, to their sum, of whose rows ROW columns are kept, straight from registers.
    With ``go``, a scalar, only if that is true.
    """
    LAYOUT: gl.constexpr = dq.type.layout
    ROWS: gl.constexpr = dq.shape[0]
    if FIRST < ROW:
        row = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)), 1)
        column = gl.expand_dims(FIRST + gl.arange(0, dq.shape[1], gl.SliceLayout(0, LAYOUT)), 0)
        place = row // 16 * 128 + row % 8 * 16 + column // 8 * (8 * ROWS) + column % 8 // 2 * 4
        kept = (column < ROW).to(gl.int32)
        if go is not None:
            kept = kept & go.to(gl.int32)
        kept, place = gl.broadcast(kept, place)
        at = dq_sum + offset(block, ROWS * ROW) + place
        gl.inline_asm_elementwise(_ADD_FOUR, _OPERANDS, [at.to(gl.int64), dq, kept], gl.int32, False, 4)


@gluon.jit
def add_up(p, dq_desc):
    """The warp that adds what the consumers put into ``dq_s``, half of the columns each, to dq in global memory."""
    BM: gl.constexpr = p.C.block_m
    COLUMNS: gl.constexpr = p.dq_s.shape[4]
    grid = grid_of(p)
    for wave in range(grid.waves()):
        n0, kv_head, b = grid.locate(wave)
        begin, whole, part, end = visible_blocks(p, extent_of(b, p.M, p.N, p.lengths), n0)
        steps = end - begin
        _own, first_head, members = query_heads(kv_head, p.group, p.splits)
        for step in range(steps * members):
            head = first_head + step // steps
            m0 = turned(step, steps, begin, whole, part, n0, BM) * BM
            meet(DQ_HERE, 288)
            for w in gl.static_range(2):
                tma_add(dq_desc, [b, head, m0, w * COLUMNS], p.dq_s.index(w))
            tma_store_wait(1)
            mbarrier.arrive(p.dq_empty.index(0))
            tma_store_wait(0)
            mbarrier.arrive(p.dq_empty.index(1))


@gluon.jit
def add_up_apart(p, dq_desc):
    """The warpgroup that computes ``ds k`` of every block and adds it to dq in global memory."""
    BM: gl.constexpr = p.C.block_m
    BD: gl.constexpr = p.k_s.shape[4]
    HALF: gl.constexpr = p.C.block_n // 2
    COLUMNS: gl.constexpr = p.dq_s.shape[4]
    grid = grid_of(p)
    nothing = gl.zeros([BM, BD], gl.float32, accumulator(BD))
    done = 0
    for wave in range(grid.waves()):
        n0, kv_head, b = grid.locate(wave)
        begin, whole, part, end = visible_blocks(p, extent_of(b, p.M, p.N, p.lengths), n0)
        steps = end - begin
        _own, first_head, members = query_heads(kv_head, p.group, p.splits)
        kv = p.kv.slot(wave, 0)
        k0 = p.k_s.index(kv * 2).reshape([HALF, BD])
        k1 = p.k_s.index(kv * 2 + 1).reshape([HALF, BD])
        if steps > 0:  # else nobody waits for this partition, and it might find them full of another tile
            p.kv.wait(wave, 0)
        for step in range(steps * members):
            head = first_head + step // steps
            m0 = turned(step, steps, begin, whole, part, n0, BM) * BM
            at = done + step
            slot = at & 1
            meet(DS_HERE + slot, 384)
            pending = warpgroup_mma(p.ds_s.index(slot * 2), k0, nothing, use_acc=False, is_async=True)
            pending = warpgroup_mma(p.ds_s.index(slot * 2 + 1), k1, pending, is_async=True)
            dq = warpgroup_mma_wait(0, [pending])
            mbarrier.arrive(p.ds_empty.index(slot))
            left, right = gl.split(dq.reshape([BM, 2, COLUMNS]).permute((0, 2, 1)))
            tma_store_wait(2)  # what these two of four buffers held
            p.dq_s.index(slot * 2).reshape([BM, COLUMNS]).store(gl.convert_layout(left, accumulator(COLUMNS)))
            p.dq_s.index(slot * 2 + 1).reshape([BM, COLUMNS]).store(gl.convert_layout(right, accumulator(COLUMNS)))
            fence_async_shared()
            tma_add(dq_desc, [b, head, m0, 0], p.dq_s.index(slot * 2))
            tma_add(dq_desc, [b, head, m0, COLUMNS], p.dq_s.index(slot * 2 + 1))
        done += steps * members
    tma_store_wait(0)


@gluon.jit
def dq_product(p, number, kv, WG: gl.constexpr):
    """Start ``ds k`` of block ``number``, for half of the columns."""
    BM: gl.constexpr = p.C.block_m
    HALF: gl.constexpr = p.C.block_n // 2
    BD: gl.constexpr = p.k_s.shape[4]
    PART: gl.constexpr = BD // 2
    slot = number & 1
    nothing = gl.zeros([BM, PART], gl.float32, accumulator(PART))
    k0 = p.k_s.index(kv * 2).reshape([HALF, BD]).slice(WG * PART, PART, 1)
    k1 = p.k_s.index(kv * 2 + 1).reshape([HALF, BD]).slice(WG * PART, PART, 1)
    pending = warpgroup_mma(p.ds_s.index(slot * 2), k0, nothing, use_acc=False, is_async=True)
    return warpgroup_mma(p.ds_s.index(slot * 2 + 1), k1, pending, is_async=True)


@gluon.jit
def dq_hand_over(p, dq, go, WG: gl.constexpr):
    """Give what ``dq_product`` came to to the warp that adds it up. Without ``go`` nobody is told."""
    p.dq_s.index(WG).reshape(dq.shape).store(dq)
    fence_async_shared()
    if go:
        signal(DQ_HERE, 288)
