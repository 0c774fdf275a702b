"""What the backward kernels for Hopper share that own keys, and so hold scores in columns: a query is a column of a tile, a key a row."""

from ..triton.prims import LOG2E, segments
from .compat import gl, gluon
from .features import ONE_SIDED, add_alibi, capped, line, opaque, rounded, squashed, weighed, widened
from .grid import accumulator, keep_up_to

LSE = gl.constexpr(0)  # rows of the table of statistics
DELTA = gl.constexpr(1)
REST = gl.constexpr(2)


@gluon.jit
def visible_blocks(n0, M, N, lo, hi, BM: gl.constexpr, BN: gl.constexpr):
    """``segments`` of query blocks that see the keys ``n0 … n0 + BN``. Queries past the end hide themselves (their lse is +inf), keys past
    it do not: of a tile that reaches over the end, no block counts as whole.
    """
    low = -hi if hi is not None else None  # the band as keys see queries
    high = -lo if lo is not None else None
    begin, a, b, end = segments(n0, min(n0 + BN, N) - 1, (M + BM - 1) // BM * BM, low, high, BM)
    end = gl.where(n0 < N, end, begin)
    over = n0 + BN > N
    return begin, gl.where(over, end, min(a, end)), gl.where(over, end, min(b, end)), end


@gluon.jit
def in_turn(block, whole, part, n0, BM: gl.constexpr):
    """Which block comes in the place of ``block``. Whole ones are visited in turn from a place that differs from tile to tile, else
    programs that work on one head would all add to the same rows of dq at one time.
    """
    count = max(part - whole, 1)
    later = block + n0 // BM % count
    later = gl.where(later >= part, later - count, later)
    return gl.where((block >= whole) & (block < part), later, block)


@gluon.jit
def turned(step, steps, begin, whole, part, n0, BM: gl.constexpr):
    """The query block of a tile's step."""
    return in_turn(begin + step % steps, whole, part, n0, BM)


@gluon.jit
def key_heads(heads, group, splits):
    """How many key heads there are, of ``group`` query heads each; of the parts that key heads are split into, if there are ``splits``."""
    if splits is None:
        return heads // group
    else:
        return heads // group * splits


@gluon.jit
def query_heads(kv_head, group, splits):
    """``(key head, its first query head, how many)``; with ``splits``, what is numbered is a part of a key head, and that part's heads."""
    if splits is None:
        return kv_head, kv_head * group, group
    else:
        own = kv_head // splits
        first = kv_head % splits * group // splits
        return own, own * group + first, (kv_head % splits + 1) * group // splits - first


@gluon.jit
def _exponents(
    s, bias, mask, key_bias, key_mask, slope, cap, lse, rest, m0, n0, ahead, scale_log2, KEYS: gl.constexpr, BM: gl.constexpr,
    IS_MASK: gl.constexpr, ALIBI: gl.constexpr, KEY_BIASED: gl.constexpr, MILD: gl.constexpr,
):  # fmt: skip
    """Scores in base 2, less lse and rest. s: products, or what ``squashed`` makes of them. MILD: in the order that takes least, without
    rest; else rounded as in the forward kernel.
    """
    S: gl.constexpr = accumulator(BM)
    PLAIN: gl.constexpr = bias is None and mask is None and key_mask is None and not KEY_BIASED and not ALIBI
    EARLY: gl.constexpr = MILD or (PLAIN and (cap is not None or rest is None))
    if ALIBI == ONE_SIDED:  # the other way round: the line over columns, which are queries here, goes along with their lse
        first = (n0 - m0 - ahead).to(gl.float32)
        lse = lse - gl.expand_dims(line(opaque(slope * first), -slope, BM, gl.SliceLayout(0, S)), 0)
    if cap is not None:
        if EARLY:
            x = s * (2.0 * cap[1]) + (cap[1] - lse)
        else:
            x = capped(s, cap)
    elif EARLY:
        x = s * scale_log2 - lse
    else:
        x = rounded(s, scale_log2)
    if bias is not None:
        if IS_MASK:
            x = gl.where(bias != 0, x, float("-inf"))
        else:
            x = gl.fma(widened(bias), gl.full([KEYS, BM], LOG2E, gl.float32, S), x)
    if KEY_BIASED:
        row, x = gl.broadcast(gl.expand_dims(key_bias, 1), x)
        if IS_MASK:
            x = gl.where(row != 0, x, float("-inf"))
        else:
            x = gl.fma(row, gl.full([KEYS, BM], LOG2E, gl.float32, S), x)
    if mask is not None:
        x = gl.where(mask != 0, x, float("-inf"))
    if key_mask is not None:
        shown, x = gl.broadcast(gl.expand_dims(key_mask, 1), x)
        x = gl.where(shown != 0, x, float("-inf"))
    if ALIBI == ONE_SIDED:
        x = x + gl.expand_dims(line(0.0, slope, KEYS, gl.SliceLayout(1, S)), 1)
    elif ALIBI:
        x = add_alibi(x, slope, n0 - m0 - ahead, -1, ALIBI)
    if not EARLY:
        x = x - lse
    if rest is not None and not MILD:
        x = x - rest
        if PLAIN:  # nobody waits for this
            x = gl.minimum(x, 0.0)
    elif (bias is not None or KEY_BIASED) and not (IS_MASK or MILD):  # nobody kept it, and a bias may be huge: p is at least kept to 1
        x = gl.minimum(x, 0.0)
    return x


@gluon.jit
def probabilities(
    s, bias, mask, key_bias, key_mask, slope, cap, lse, rest, m0, n0, ahead, N, lo, hi, scale_log2, KEYS: gl.constexpr, BM: gl.constexpr,
    IS_MASK: gl.constexpr, ALIBI: gl.constexpr, KEY_BIASED: gl.constexpr, MASKED: gl.constexpr, MILD: gl.constexpr, DT: gl.constexpr,
):  # fmt: skip
    """pᵀ of KEYS keys from ``n0`` on and BM queries from ``m0`` on, from their products s: in the 16-bit dtype DT, and in float32 times the
    derivative of their scores by ``scale * s``, which is 1 but for a soft cap. bias, mask: a tile of it; key_bias, key_mask: a number a
    key; lse, rest: a number a query, as a row. None: absent. MILD: see ``edges.py``.
    """
    S: gl.constexpr = accumulator(BM)
    i = gl.expand_dims(m0 + gl.arange(0, BM, gl.SliceLayout(0, S)), 0)
    j = gl.expand_dims(n0 + gl.arange(0, KEYS, gl.SliceLayout(1, S)), 1)
    u = s
    if cap is not None:
        u = squashed(s, cap)
    x = _exponents(
        u, bias, mask, key_bias, key_mask, slope, cap, lse, rest, m0, n0, ahead, scale_log2, KEYS, BM, IS_MASK, ALIBI, KEY_BIASED, MILD,
    )  # fmt: skip
    p = x
    if cap is None:
        p = gl.exp2(x)
    if MASKED:
        HIDDEN: gl.constexpr = "0f00000000" if cap is None else "0fFF800000"  # 0, or -inf
        if hi is not None:  # one comparison a score: the first query that sees the key, none if there is no such key
            p = keep_up_to(p, gl.where(j < N, j - hi, 0x7FFFFFFF), i, HIDDEN)
        else:
            p = keep_up_to(p, j, j * 0 + (N - 1), HIDDEN)
        if lo is not None:
            p = keep_up_to(p, i, j - lo, HIDDEN)
    if cap is not None:
        return weighed(p, u, DT)
    else:
        return p.to(DT), p
