"""What the backward kernels for Hopper share that own keys: sᵀ = k qᵀ, a key a row and a query a column. Called by ``dkdv*.py``."""

from ..triton.prims import LOG2E, offset, segments
from .compat import gl, gluon, record
from .extent import mask_range, place_in_bias, stored_keys, whole_range
from .features import (
    add_alibi,
    line,
    line_of_keys,
    one_sided,
    opaque,
    p_and_ds_factor,
    rounded,
    scaled,
    select_le,
    softcapped,
    tanh,
    widened,
)
from .layouts import accumulator
from .schedule import Listed, Pairs, Uniform

LSE = gl.constexpr(0)  # rows of the table of statistics
DELTA = gl.constexpr(1)
REST = gl.constexpr(2)


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
def grid_of(p):
    """A program's tiles of keys: of key heads, or of the parts that they are split into."""
    heads = key_heads(p.heads, p.group, p.splits)
    if p.packed is not None:
        return Listed(p.packed[0], gl.load(p.packed[1]), heads, 0)
    elif p.C.dq_blocks > 0:
        return Pairs(p.tiles_n, p.batch, heads, p.C.block_n, p.BATCH_FASTEST)
    else:
        return Uniform(p.tiles_n, p.tiles, p.batch, heads, p.l2_group, p.serpentine, p.C.block_n, p.LONGEST, p.BATCH_FASTEST)


@gluon.jit
def visible_blocks(p, x, n0, kv_head):
    """``segments`` of query blocks that see a tile's keys, the first of which is n0, less what the mask hides on either side. Queries past
    the end hide themselves (their lse is +inf), keys past it do not: of a tile that reaches over the end, no block counts as whole.
    kv_head: as of ``query_heads``.
    """
    BM: gl.constexpr = p.C.block_m
    BN: gl.constexpr = p.C.block_n
    low = -x.hi if x.hi is not None else None  # the band as keys see queries
    high = -x.lo if x.lo is not None else None
    begin, a, b, end = segments(n0, min(n0 + BN, x.keys) - 1, (x.queries + BM - 1) // BM * BM, low, high, BM)
    end = gl.where(n0 < x.keys, end, begin)
    if p.bounds is not None:
        own_head, _first, _count = query_heads(kv_head, p.group, p.splits)
        first_seen, end_seen = mask_range(p, x, own_head, n0, BN // 64)
        begin = min(max(begin, first_seen // BM), end)
        end = max(min(end, (end_seen + BM - 1) // BM), begin)
        a = max(a, begin)
        b = max(b, begin)
    over = n0 + BN > x.keys
    return begin, gl.where(over, end, min(a, end)), gl.where(over, end, min(b, end)), end


@record
class Bare:
    """Blocks ``begin … end`` of a tile, of which a mask hides nothing: they are visited without it, behind the others that are whole."""

    begin: object
    end: object


@gluon.jit
def bare_blocks(p, x, n0, kv_head, whole, part):
    """``Bare`` of a tile, of whose blocks ``whole … part`` no band hides anything; none, at the end, if all are visited with the mask."""
    if p.SKIPS:
        own_head, _first, _count = query_heads(kv_head, p.group, p.splits)
        first_whole, end_whole = whole_range(p, x, own_head, n0, p.C.block_n // 64)
        begin = min(max((first_whole + p.C.block_m - 1) // p.C.block_m, whole), part)
        return Bare(begin, max(min(end_whole // p.C.block_m, part), begin))
    else:
        return Bare(part, part)


@record
class Blocks:
    """The places ``start … stop`` of a tile's query blocks, in the order of ``turned``. Where a mask has tiles for some blocks alone: a
    block from ``gap`` on lies ``gap_size`` further on than its place says, and its tile has a number ``masks`` larger than its own. Else 0.
    """

    start: object
    stop: object
    gap: object
    gap_size: object
    masks: object


@gluon.jit
def hiding_and_bare(whole, part, bare, before):
    """``Blocks`` of a tile that no band cuts, in the places ``whole … part``: those of which a mask hides something, and the others."""
    count = bare.end - bare.begin
    return Blocks(whole, part - count, bare.begin, count, before), Blocks(part - count, part, part - count, bare.begin - (part - count), 0)


@gluon.jit
def in_turn(block, whole, part, n0, BM: gl.constexpr):
    """The block that is visited in the place of ``block``. Whole blocks are visited in turn from a start that differs from tile to tile;
    else CTAs that work on one head would all add to the same rows of dq at a time.
    """
    count = max(part - whole, 1)
    later = block + n0 // BM % count
    later = gl.where(later >= part, later - count, later)
    return gl.where((block >= whole) & (block < part), later, block)


@gluon.jit
def turned(p, step, steps, begin, whole, part, bare, n0, BM: gl.constexpr):
    """The query block of a tile's step."""
    if not p.SKIPS:
        return in_turn(begin + step % steps, whole, part, n0, BM)
    else:
        first = part - (bare.end - bare.begin)  # the place of the first bare one: each kind is visited in turn
        place = in_turn(in_turn(begin + step % steps, whole, first, n0, BM), first, part, n0, BM)
        moved = gl.where(place >= first, place + (bare.begin - first), moved_over(place, bare.begin, bare.end - bare.begin))
        return gl.where((place >= whole) & (place < part), moved, place)


@gluon.jit
def tile_of_mask(p, masks, step, steps, bare, block, part):
    """The number of a block's tile of the mask, of a program whose earlier tiles had ``masks``; bare blocks of each member before, and in
    this one of those that a band cuts behind them, have none. Consumers have it of ``Blocks.masks``.
    """
    count = bare.end - bare.begin
    at = masks + step - step // steps * count
    if p.lo is not None:
        at -= gl.where(block >= part, count, 0)
    return at


@gluon.jit
def block_in(p, blocks, place, n0, BM: gl.constexpr):
    """The query block in a place of ``blocks``, which no band cuts."""
    block = in_turn(place, blocks.start, blocks.stop, n0, BM)
    if p.SKIPS:
        block = moved_over(block, blocks.gap, blocks.gap_size)
    return block


@gluon.jit
def moved_over(place, begin, count):
    """The block in a place, of those in a row but for ``count`` from ``begin`` on."""
    return place + gl.where(place >= begin, count, 0)


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
def of_keys(p, numbers, strides, x, head, j, MASK: gl.constexpr):
    """The numbers of the keys j, one each, of a bias or (MASK) mask that varies over keys alone."""
    row = numbers + offset(x.b // p.batch_inner, strides[0]) + offset(x.b % p.batch_inner, strides[1])
    row += offset(head, strides[2])
    _row, column = place_in_bias(p, x, 0, j, MASK)
    return gl.load(row + column.to(gl.int64) * strides[4], mask=j < stored_keys(p, x), other=0)


@gluon.jit
def store_dbias(p, db, b, head, j):
    """Write the gradient of a bias that varies over keys alone, of the keys j."""
    target = p.dbias + offset(b // p.batch_inner, p.dbias_strides[0]) + offset(b % p.batch_inner, p.dbias_strides[1])
    target += offset(head, p.dbias_strides[2])
    if p.dropout is not None:
        db = db * p.dropout[2]
    gl.store(target + j.to(gl.int64) * p.dbias_strides[3], db.to(p.dbias.dtype.element_ty), mask=j < p.N)


@gluon.jit
def _exponents(p, t, s, bias, mask, lse, rest, m0, n0):
    """Scores in base 2, less lse and rest. s: q k, or what ``tanh`` makes of it. ``t.SMALL_LSE``: in the cheapest order and without rest,
    else rounded as in the forward kernel.
    """
    KEYS: gl.constexpr = s.shape[0]
    BM: gl.constexpr = s.shape[1]
    S: gl.constexpr = accumulator(BM)
    KEY_BIASED: gl.constexpr = p.bias is not None and t.key_bias is not None
    PLAIN: gl.constexpr = bias is None and mask is None and t.key_mask is None and not KEY_BIASED and not p.ALIBI
    EARLY: gl.constexpr = t.SMALL_LSE or (PLAIN and (p.cap is not None or rest is None))
    LINE: gl.constexpr = one_sided(p.ALIBI) and p.cap is None and not EARLY  # as the forward kernel rounds it
    if one_sided(p.ALIBI) and not LINE:  # the other way round: the line over columns, which are queries here, goes along with their lse
        first = (n0 - m0 - t.x.diagonal).to(gl.float32)
        lse = lse - gl.expand_dims(line(opaque(t.slope * first), -t.slope, BM, gl.SliceLayout(0, S)), 0)
    if p.cap is not None:
        if EARLY:
            x = s * (2.0 * p.cap[1]) + (p.cap[1] - lse)
        else:
            x = softcapped(s, p.cap)
    elif EARLY:
        x = s * t.scale_log2 - lse
    elif LINE:
        j = n0 + gl.arange(0, KEYS, gl.SliceLayout(1, S))
        x = scaled(s, t.scale_log2, gl.expand_dims(line_of_keys(t.slope, j, m0, t.x.diagonal, p.ALIBI), 1))
    else:
        x = rounded(s, t.scale_log2)
    if bias is not None:
        if p.IS_MASK:
            x = gl.where(bias != 0, x, float("-inf"))
        else:
            x = gl.fma(widened(bias), gl.full([KEYS, BM], LOG2E, gl.float32, S), x)
    if KEY_BIASED:
        row, x = gl.broadcast(gl.expand_dims(t.key_bias, 1), x)
        if p.IS_MASK:
            x = gl.where(row != 0, x, float("-inf"))
        else:
            x = gl.fma(row, gl.full([KEYS, BM], LOG2E, gl.float32, S), x)
    if mask is not None:
        x = gl.where(mask != 0, x, float("-inf"))
    if t.key_mask is not None:
        mask_column, x = gl.broadcast(gl.expand_dims(t.key_mask, 1), x)
        x = gl.where(mask_column != 0, x, float("-inf"))
    if LINE:
        x = x + gl.expand_dims(line(0.0, -t.slope, BM, gl.SliceLayout(0, S)), 0)
    elif one_sided(p.ALIBI):
        x = x + gl.expand_dims(line(0.0, t.slope, KEYS, gl.SliceLayout(1, S)), 1)
    elif p.ALIBI:
        x = add_alibi(x, t.slope, n0 - m0 - t.x.diagonal, -1, p.ALIBI)
    if not EARLY:
        x = x - lse
    if rest is not None and not t.SMALL_LSE:
        x = x - rest
        if PLAIN or p.ALIBI:  # nobody waits for this
            x = gl.minimum(x, 0.0)
    elif (bias is not None or KEY_BIASED) and not (
        p.IS_MASK or t.SMALL_LSE
    ):  # nobody kept it, and a bias may be huge: p is at least kept to 1
        x = gl.minimum(x, 0.0)
    return x


@gluon.jit
def probabilities(p, t, s, bias, mask, lse, rest, m0, n0, MASKED: gl.constexpr, DT: gl.constexpr):
    """``(pᵀ, weight)`` of the keys from ``n0`` on and the queries from ``m0`` on: pᵀ in DT, and in float32 times the derivative of
    the scores by ``scale * s``, which is 1 without a soft cap.

    s: q k. bias, mask: a tile. lse, rest: a number a query, as a row. p: the program. t: the tile, with a number a key of what varies over
    keys alone, and SMALL_LSE (``preprocess.py``). None: absent.
    """
    KEYS: gl.constexpr = s.shape[0]
    BM: gl.constexpr = s.shape[1]
    S: gl.constexpr = accumulator(BM)
    i = gl.expand_dims(m0 + gl.arange(0, BM, gl.SliceLayout(0, S)), 0)
    j = gl.expand_dims(n0 + gl.arange(0, KEYS, gl.SliceLayout(1, S)), 1)
    u = s
    if p.cap is not None:
        u = tanh(s, p.cap)
    x = _exponents(p, t, u, bias, mask, lse, rest, m0, n0)
    weight = x
    if p.cap is None:
        weight = gl.exp2(x)
    if MASKED:
        MASKED_VALUE: gl.constexpr = "0f00000000" if p.cap is None else "0fFF800000"  # 0, or -inf
        if p.hi is not None:  # one comparison a score: the first query that sees the key, none if there is no such key
            weight = select_le(weight, gl.where(j < t.x.keys, j - t.x.hi, 0x7FFFFFFF), i, MASKED_VALUE)
        else:
            weight = select_le(weight, j, j * 0 + (t.x.keys - 1), MASKED_VALUE)
        if p.lo is not None:
            weight = select_le(weight, i, j - t.x.lo, MASKED_VALUE)
    if p.packed is not None and bias is not None:  # past a sequence's end it may be anything
        weight = select_le(weight, i, j * 0 + (t.x.queries - 1), "0f00000000" if p.cap is None else "0fFF800000")
    if p.cap is not None:
        return p_and_ds_factor(weight, u, DT)
    else:
        return weight.to(DT), weight
