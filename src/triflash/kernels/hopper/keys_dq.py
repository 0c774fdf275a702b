"""dq in the backward kernel that owns keys (``backward.py``): its product, by the consumers or by a warpgroup of its own, and its sum."""

from .columns import turned, visible_blocks
from .compat import fence_async_shared, gl, gluon, mbarrier, tma_add, tma_store_wait, warpgroup_mma, warpgroup_mma_wait
from .features import visible_keys
from .grid import accumulator, locate, meet, share, signal
from .keys_loads import DQ_EMPTY, DQ_HERE, DS_EMPTY, DS_HERE, KV_FULL


@gluon.jit
def add_up(
    dq_desc, lengths, dq_s, bars, batch, heads, group, M, N, lo, hi, tiles_n, tiles, section, snake,
    BM: gl.constexpr, BN: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr, KV_STAGES: gl.constexpr,
    BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr,
):  # fmt: skip
    """The warp that adds what the consumers put into ``dq_s``, half of the columns each, to dq in global memory."""
    COLUMNS: gl.constexpr = dq_s.shape[4]
    kv_heads = heads // group
    done = 0
    for wave in range(share(tiles, snake)):
        n0, kv_head, b = locate(wave, tiles_n, batch, kv_heads, section, snake, BATCH_FASTEST, BN, LONGEST)
        begin, whole, part, end = visible_blocks(n0, M, visible_keys(lengths, b, N), lo, hi, BM, BN)
        steps = end - begin
        for step in range(steps * group):
            head = kv_head * group + step // steps
            m0 = turned(step, steps, begin, whole, part, n0, BM) * BM
            meet(DQ_HERE, 288)
            for w in gl.static_range(2):
                tma_add(dq_desc, [b, head, m0, w * COLUMNS], dq_s.index(w))
            tma_store_wait(1)
            mbarrier.arrive(bars[DQ_EMPTY].index(0))
            tma_store_wait(0)
            mbarrier.arrive(bars[DQ_EMPTY].index(1))
        done += steps * group


@gluon.jit
def add_up_apart(
    dq_desc, lengths, k_s, ds_s, dq_s, bars, batch, heads, group, M, N, lo, hi, tiles_n, tiles, section, snake,
    BM: gl.constexpr, BN: gl.constexpr, KV_STAGES: gl.constexpr, BATCH_FASTEST: gl.constexpr, LONGEST: gl.constexpr,
):  # fmt: skip
    """The warpgroup that computes ``ds k`` of every block and adds it to dq in global memory."""
    BD: gl.constexpr = k_s.shape[4]
    HALF: gl.constexpr = BN // 2
    COLUMNS: gl.constexpr = dq_s.shape[4]
    kv_heads = heads // group
    nothing = gl.zeros([BM, BD], gl.float32, accumulator(BD))
    done = 0
    for wave in range(share(tiles, snake)):
        n0, kv_head, b = locate(wave, tiles_n, batch, kv_heads, section, snake, BATCH_FASTEST, BN, LONGEST)
        begin, whole, part, end = visible_blocks(n0, M, visible_keys(lengths, b, N), lo, hi, BM, BN)
        steps = end - begin
        kv = wave % KV_STAGES
        k0 = k_s.index(kv * 2).reshape([HALF, BD])
        k1 = k_s.index(kv * 2 + 1).reshape([HALF, BD])
        if steps > 0:  # else nobody waits for this partition, and it might find them full of another tile
            mbarrier.wait(bars[KV_FULL].index(kv), (wave // KV_STAGES) & 1)
        for step in range(steps * group):
            head = kv_head * group + step // steps
            m0 = turned(step, steps, begin, whole, part, n0, BM) * BM
            at = done + step
            slot = at & 1
            meet(DS_HERE + slot, 384)
            pending = warpgroup_mma(ds_s.index(slot * 2), k0, nothing, use_acc=False, is_async=True)
            pending = warpgroup_mma(ds_s.index(slot * 2 + 1), k1, pending, is_async=True)
            dq = warpgroup_mma_wait(0, [pending])
            mbarrier.arrive(bars[DS_EMPTY].index(slot))
            left, right = gl.split(dq.reshape([BM, 2, COLUMNS]).permute((0, 2, 1)))
            tma_store_wait(2)  # what these two of four buffers held
            dq_s.index(slot * 2).reshape([BM, COLUMNS]).store(gl.convert_layout(left, accumulator(COLUMNS)))
            dq_s.index(slot * 2 + 1).reshape([BM, COLUMNS]).store(gl.convert_layout(right, accumulator(COLUMNS)))
            fence_async_shared()
            tma_add(dq_desc, [b, head, m0, 0], dq_s.index(slot * 2))
            tma_add(dq_desc, [b, head, m0, COLUMNS], dq_s.index(slot * 2 + 1))
        done += steps * group
    tma_store_wait(0)


@gluon.jit
def dq_product(number, ds_s, k_s, kv, WG: gl.constexpr):
    """Start ``ds k`` of block ``number``, for half of the columns."""
    BM: gl.constexpr = ds_s.shape[1]
    HALF: gl.constexpr = ds_s.shape[2]
    BD: gl.constexpr = k_s.shape[4]
    PART: gl.constexpr = BD // 2
    slot = number & 1
    nothing = gl.zeros([BM, PART], gl.float32, accumulator(PART))
    k0 = k_s.index(kv * 2).reshape([HALF, BD]).slice(WG * PART, PART, 1)
    k1 = k_s.index(kv * 2 + 1).reshape([HALF, BD]).slice(WG * PART, PART, 1)
    pending = warpgroup_mma(ds_s.index(slot * 2), k0, nothing, use_acc=False, is_async=True)
    return warpgroup_mma(ds_s.index(slot * 2 + 1), k1, pending, is_async=True)


@gluon.jit
def dq_hand_over(dq, go, dq_s, WG: gl.constexpr):
    """Give what ``dq_product`` came to to the warp that adds it up. Without ``go`` nobody is told."""
    dq_s.index(WG).reshape(dq.shape).store(dq)
    fence_async_shared()
    if go:
        signal(DQ_HERE, 288)
