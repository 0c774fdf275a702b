"""The producer of the forward kernel for Hopper, and what it shares with consumers: where barriers lie, which blocks a tile sees."""

from ..triton.prims import segments
from .compat import gl, gluon, mbarrier, tma_load
from .features import visible_keys
from .grid import locate, share


@gluon.constexpr_function
def barrier_at(name, WGS, K_STAGES, V_STAGES, BIAS_STAGES):
    """Where the barriers of that name begin among all of a program's; "count" is the number of all. Two each for q, used or not."""
    sizes = {
        "q_full": 2 * WGS, "q_empty": 2 * WGS, "k_full": K_STAGES, "k_empty": K_STAGES, "v_full": V_STAGES, "v_empty": V_STAGES,
        "turn": WGS, "bias_full": WGS * BIAS_STAGES, "bias_empty": WGS * BIAS_STAGES, "count": 0,
    }  # fmt: skip
    names = list(sizes)
    return sum(sizes[n] for n in names[: names.index(name)])


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
        slot = wave % Q_STAGES * WGS + w
        mbarrier.wait(bars.index(Q_EMPTY + slot), ((wave // Q_STAGES) & 1) ^ 1)
        mbarrier.expect(bars.index(Q_FULL + slot), q_desc.block_type.nbytes)
        tma_load(q_desc, [b, m0 + w * BM, head, 0], bars.index(Q_FULL + slot), q_s.index(slot))


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, bias_desc, mask_desc, lengths, q_s, k_s, v_s, bias_s, mask_s, bars,
    batch, heads, group, batch_inner, M, N, lo, hi, bias_on, mask_on, tiles_m, tiles, section, snake,
    BM: gl.constexpr, BN: gl.constexpr, WGS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr,
    BATCH_FASTEST: gl.constexpr,
    VARIES_M: gl.constexpr,
):  # fmt: skip
    """The producer: every load of the program, in the order in which the consumers need them."""
    Q_FULL: gl.constexpr = barrier_at("q_full", WGS, K_STAGES, V_STAGES, BIAS_STAGES)
    Q_EMPTY: gl.constexpr = barrier_at("q_empty", WGS, K_STAGES, V_STAGES, BIAS_STAGES)
    K_FULL: gl.constexpr = barrier_at("k_full", WGS, K_STAGES, V_STAGES, BIAS_STAGES)
    K_EMPTY: gl.constexpr = barrier_at("k_empty", WGS, K_STAGES, V_STAGES, BIAS_STAGES)
    V_FULL: gl.constexpr = barrier_at("v_full", WGS, K_STAGES, V_STAGES, BIAS_STAGES)
    V_EMPTY: gl.constexpr = barrier_at("v_empty", WGS, K_STAGES, V_STAGES, BIAS_STAGES)
    BIAS_FULL: gl.constexpr = barrier_at("bias_full", WGS, K_STAGES, V_STAGES, BIAS_STAGES)
    BIAS_EMPTY: gl.constexpr = barrier_at("bias_empty", WGS, K_STAGES, V_STAGES, BIAS_STAGES)
    Q_STAGES: gl.constexpr = q_s.shape[0] // WGS
    LONGEST: gl.constexpr = "last" if hi is not None else "none"
    BIAS_BYTES: gl.constexpr = bias_desc.block_type.nbytes if bias_desc is not None else 0
    MASK_BYTES: gl.constexpr = mask_desc.block_type.nbytes if mask_desc is not None else 0
    done = 0  # blocks of earlier tiles: buffers and phases go on counting across tiles
    for wave in range(share(tiles, snake)):
        m0, head, b = locate(wave, tiles_m, batch, heads, section, snake, BATCH_FASTEST, BM * WGS, LONGEST)
        begin, _a, _b, end = visible_blocks(m0, BM * WGS, M, visible_keys(lengths, b, N), lo, hi, BN)
        for j in range(end - begin):
            n0 = (end - 1 - j) * BN
            at = done + j
            if Q_STAGES == 2:  # before the first keys, whose buffer may not be free for long yet
                if j == 0:
                    _fetch_queries(q_desc, q_s, bars, wave, b, m0, head, BM, WGS, Q_STAGES, Q_FULL, Q_EMPTY)
            stage = at % K_STAGES
            mbarrier.wait(bars.index(K_EMPTY + stage), ((at // K_STAGES) & 1) ^ 1)
            mbarrier.expect(bars.index(K_FULL + stage), k_desc.block_type.nbytes)
            tma_load(k_desc, [b, n0, head // group, 0], bars.index(K_FULL + stage), k_s.index(stage))
            if Q_STAGES == 1:
                if j == 0:
                    _fetch_queries(q_desc, q_s, bars, wave, b, m0, head, BM, WGS, Q_STAGES, Q_FULL, Q_EMPTY)
            if bias_desc is not None:
                bias_phase = (at // BIAS_STAGES) & 1
                for w in gl.static_range(WGS):
                    slot = at % BIAS_STAGES * WGS + w
                    mbarrier.wait(bars.index(BIAS_EMPTY + slot), bias_phase ^ 1)
                    mbarrier.expect(bars.index(BIAS_FULL + slot), BIAS_BYTES + MASK_BYTES)
                    row = 0
                    if VARIES_M:
                        row = m0 + w * BM
                    tma_load(
                        bias_desc,
                        [b // batch_inner * bias_on[0], b % batch_inner * bias_on[1], head * bias_on[2], row, n0],
                        bars.index(BIAS_FULL + slot),
                        bias_s.index(slot),
                    )
                    if mask_desc is not None:
                        mask_row = 0
                        if mask_s.shape[4] > 1:
                            mask_row = m0 + w * BM
                        at_mask = [b // batch_inner * mask_on[0], b % batch_inner * mask_on[1], head * mask_on[2], mask_row, n0]
                        tma_load(mask_desc, at_mask, bars.index(BIAS_FULL + slot), mask_s.index(slot))
            stage = at % V_STAGES
            mbarrier.wait(bars.index(V_EMPTY + stage), ((at // V_STAGES) & 1) ^ 1)
            mbarrier.expect(bars.index(V_FULL + stage), v_desc.block_type.nbytes)
            tma_load(v_desc, [b, n0, head // group, 0], bars.index(V_FULL + stage), v_s.index(stage))
        done += end - begin
