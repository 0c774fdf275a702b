"""The producer of the forward kernel for Hopper, and what it shares with consumers: its barriers, which blocks a tile sees."""

from ..triton.prims import segments
from .compat import fence_async_shared, gl, gluon, mbarrier, tma_load
from .features import visible_keys
from .grid import barriers, locate, phase_of, share, slot_of

# A program's barriers are a tuple with an element a name, which holds one for every buffer.
Q_FULL, Q_EMPTY, K_FULL, K_EMPTY, V_FULL, V_EMPTY, BIAS_FULL, BIAS_EMPTY, TURN = map(gl.constexpr, range(9))  # of TURN one a consumer


@gluon.jit
def all_barriers(WGS: gl.constexpr, Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr):
    """The tuple, for WGS consumers that all read every key block, and each queries and a bias of its own. Without V_STAGES values come with
    keys, by the barriers of keys.
    """
    q_full = barriers(Q_STAGES * WGS, 1)
    q_empty = barriers(Q_STAGES * WGS, 1)
    k_full = barriers(K_STAGES, 1)
    k_empty = barriers(K_STAGES, WGS)
    v_full = k_full
    v_empty = k_empty
    if V_STAGES > 0:
        v_full = barriers(V_STAGES, 1)
        v_empty = barriers(V_STAGES, WGS)
    bias_full = barriers(BIAS_STAGES * WGS, 1)
    bias_empty = barriers(BIAS_STAGES * WGS, 1)
    turns = (barriers(1, 1), barriers(1, 1), barriers(1, 1))
    fence_async_shared()
    return q_full, q_empty, k_full, k_empty, v_full, v_empty, bias_full, bias_empty, turns[0], turns[1], turns[2]


@gluon.jit
def visible_blocks(m0, rows, M, N, lo, hi, BN: gl.constexpr):
    """``segments`` of the queries ``m0 … m0 + rows``, but never empty: queries that see no key get one block to hide altogether."""
    begin, full_begin, full_end, end = segments(m0, min(m0 + rows, M) - 1, N, lo, hi, BN)
    return begin, full_begin, full_end, max(end, begin + 1)


@gluon.jit
def _fetch_queries(
    q_desc, q_s, bars, wave, b, m0, head,
    BM: gl.constexpr, WGS: gl.constexpr, Q_STAGES: gl.constexpr, Q_FULL: gl.constexpr, Q_EMPTY: gl.constexpr,
):  # fmt: skip
    """The queries of a tile, for every consumer its own."""
    for w in gl.static_range(WGS):
        slot = slot_of(wave, Q_STAGES) * WGS + w
        mbarrier.wait(bars[Q_EMPTY].index(slot), phase_of(wave, Q_STAGES) ^ 1)
        mbarrier.expect(bars[Q_FULL].index(slot), q_desc.block_type.nbytes)
        tma_load(q_desc, [b, m0 + w * BM, head, 0], bars[Q_FULL].index(slot), q_s.index(slot))


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, bias_desc, mask_desc, lengths, q_s, k_s, v_s, bias_s, mask_s, bars,
    batch, heads, group, batch_inner, M, N, lo, hi, bias_on, mask_on, tiles_m, tiles, section, snake,
    BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr,
    BATCH_FASTEST: gl.constexpr, VARIES_M: gl.constexpr,
):  # fmt: skip
    """The producer: every load of the program, in the order in which the consumers need them.

    Keys of a block come with the values of the block before, also of another tile: that is what consumers multiply by in one step.
    """
    Q_STAGES: gl.constexpr = q_s.shape[0] // WGS
    LONGEST: gl.constexpr = "last" if hi is not None else "none"
    BIAS_BYTES: gl.constexpr = bias_desc.block_type.nbytes if bias_desc is not None else 0
    MASK_BYTES: gl.constexpr = mask_desc.block_type.nbytes if mask_desc is not None else 0
    K_BYTES: gl.constexpr = k_desc.block_type.nbytes
    V_BYTES: gl.constexpr = v_desc.block_type.nbytes
    done = 0  # blocks of earlier tiles: buffers and phases go on counting across tiles
    n_before = 0  # where the values of the block before lie
    head_before = 0
    b_before = 0
    for wave in range(share(tiles, snake)):
        m0, head, b = locate(wave, tiles_m, batch, heads, section, snake, BATCH_FASTEST, BM * WGS, LONGEST)
        begin, _a, _b, end = visible_blocks(m0, BM * WGS, M, visible_keys(lengths, b, N), lo, hi, BN)
        for j in range(end - begin):
            n0 = (end - 1 - j) * BN
            at = done + j
            if Q_STAGES == 2:  # before the first keys, whose buffer may not be free for long yet
                if j == 0:
                    _fetch_queries(q_desc, q_s, bars, wave, b, m0, head, BM, WGS, Q_STAGES, Q_FULL, Q_EMPTY)
            stage = slot_of(at, STAGES)
            full = bars[K_FULL].index(stage)
            mbarrier.wait(bars[K_EMPTY].index(stage), phase_of(at, STAGES) ^ 1)
            mbarrier.expect(full, K_BYTES + V_BYTES, pred=at > 0)
            mbarrier.expect(full, K_BYTES, pred=at == 0)
            tma_load(k_desc, [b, n0, head // group, 0], full, k_s.index(stage))
            if at > 0:
                tma_load(v_desc, [b_before, n_before, head_before, 0], full, v_s.index(stage))
            n_before = n0
            head_before = head // group
            b_before = b
            if Q_STAGES == 1:
                if j == 0:
                    _fetch_queries(q_desc, q_s, bars, wave, b, m0, head, BM, WGS, Q_STAGES, Q_FULL, Q_EMPTY)
            if bias_desc is not None:
                for w in gl.static_range(WGS):
                    slot = slot_of(at, BIAS_STAGES) * WGS + w
                    mbarrier.wait(bars[BIAS_EMPTY].index(slot), phase_of(at, BIAS_STAGES) ^ 1)
                    mbarrier.expect(bars[BIAS_FULL].index(slot), BIAS_BYTES + MASK_BYTES)
                    row = 0
                    if VARIES_M:
                        row = m0 + w * BM
                    tma_load(
                        bias_desc,
                        [b // batch_inner * bias_on[0], b % batch_inner * bias_on[1], head * bias_on[2], row, n0],
                        bars[BIAS_FULL].index(slot),
                        bias_s.index(slot),
                    )
                    if mask_desc is not None:
                        mask_row = 0
                        if mask_s.shape[4] > 1:
                            mask_row = m0 + w * BM
                        at_mask = [b // batch_inner * mask_on[0], b % batch_inner * mask_on[1], head * mask_on[2], mask_row, n0]
                        tma_load(mask_desc, at_mask, bars[BIAS_FULL].index(slot), mask_s.index(slot))
        done += end - begin
    stage = slot_of(done, STAGES)
    mbarrier.wait(bars[K_EMPTY].index(stage), phase_of(done, STAGES) ^ 1)
    mbarrier.expect(bars[K_FULL].index(stage), V_BYTES)
    tma_load(v_desc, [b_before, n_before, head_before, 0], bars[K_FULL].index(stage), v_s.index(stage))
