"""What Hopper's kernels share that own queries: s = q kᵀ, a query a row, 64 a consumer. Called by ``forward.py``, ``dq.py``, ``dbias.py``.

    p = 2^(s - lse);   ds = p * (dp - delta),   dp = dout vᵀ

lse (base 2), delta and ``rest`` come in one float32 table (batch * head, 2 or 3, queries up to a multiple of 128). Its lse is +inf for a
query that sees no key or does not exist: p is 0 there, and no mask of queries is needed.
"""

from ..triton.prims import LOG2E, offset, segments
from .compat import gl, gluon, record
from .extent import mask_range, place_in_bias, whole_range
from .features import mask_scores, select_le, widened
from .layouts import accumulator
from .schedule import Listed, Uniform

BM = gl.constexpr(64)  # queries of a consumer


@gluon.jit
def grid_of(p, LEAST: gl.constexpr):
    """A program's tiles of queries: 64 a consumer, LEAST tiles at least (``schedule.Listed``)."""
    TILE: gl.constexpr = BM * p.C.consumers
    LONGEST: gl.constexpr = "last" if p.hi is not None else "none"
    if p.packed is not None:
        return Listed(p.packed[0], gl.load(p.packed[1]), p.heads, LEAST)
    else:
        return Uniform(p.tiles_m, p.tiles, p.batch, p.heads, p.l2_group, p.serpentine, TILE, LONGEST, p.BATCH_FASTEST)


@gluon.jit
def visible_blocks(p, x, m0, head):
    """``segments`` of a tile's queries, of which m0 is the first, less what the mask hides on either side, but never empty: queries that
    see no key get one block to hide altogether.
    """
    last = min(m0 + BM * p.C.consumers, x.queries) - 1
    begin, full_begin, full_end, end = segments(m0, last, x.keys, x.lo, x.hi, p.C.block_n)
    if p.bounds is not None:
        first_seen, end_seen = mask_range(p, x, head, m0, p.C.consumers)
        first_block = max(begin, first_seen // p.C.block_n)
        end = max(min(end, (end_seen + p.C.block_n - 1) // p.C.block_n), begin + 1)
        begin = gl.where(first_block < end, first_block, begin)
        end = gl.where(first_block < end, end, begin + 1)
        full_begin = min(max(full_begin, begin), end)
        return begin, full_begin, min(max(full_end, full_begin), end), end
    else:
        return begin, full_begin, full_end, max(end, begin + 1)


@record
class Bare:
    """Where a mask hides nothing of a tile's blocks: in ``begin … end``, without the tile's last one, which is visited first. They come
    behind the others of ``first … last``, which no band cuts, so that these need one loop (``in_order``).
    """

    first: object
    last: object
    begin: object
    end: object


@gluon.jit
def bare_blocks(p, x, m0, head, full_begin, full_end, end):
    """``Bare`` of a tile, of which ``visible_blocks`` gives the rest; without ``p.SKIPS`` nobody asks for it."""
    last = min(full_end, end - 1)
    first = min(full_begin, last)
    if p.SKIPS:
        first_whole, end_whole = whole_range(p, x, head, m0, p.C.consumers)
        begin = min(max((first_whole + p.C.block_n - 1) // p.C.block_n, first), last)
        return Bare(first, last, begin, max(min(end_whole // p.C.block_n, last), begin))
    else:
        return Bare(first, last, last, last)


@gluon.jit
def in_order(p, bare, block):
    """The block that is visited in the place of ``block``, where blocks are visited from the last to the first."""
    if p.SKIPS:
        moved = block + (bare.begin - bare.first)
        moved = gl.where(moved >= bare.end, moved - (bare.end - bare.first), moved)
        return gl.where((block >= bare.first) & (block < bare.end), moved, block)
    else:
        return block


@gluon.jit
def block_of(p, w, step, MASKED: gl.constexpr, BARE: gl.constexpr):
    """The block that a consumer visits in a step behind the first of its walk w, and the number of the block's tile of a bias or mask, for
    those that have one. MASKED: a band may cut it; BARE: the mask hides nothing of it.
    """
    block = w.end - 1 - step
    at = w.done + step
    if p.SKIPS:
        if BARE:
            block += w.bare.begin - w.bare.first
        elif not MASKED:
            block -= gl.where(block < w.bare.end, w.bare.end - w.bare.begin, 0)
        at = w.masks + step
        if MASKED:
            at = tile_of_mask(p, w.masks, step, w.bare, block)
    return block, at


@gluon.jit
def tile_of_mask(p, masks, step, bare, block):
    """The number of a block's tile of the mask, of a program whose earlier tiles had ``masks``: that of the step, but behind the bare
    blocks, where a band cuts some on the left.
    """
    at = masks + step
    if p.lo is not None:
        at -= gl.where(block < bare.first, bare.end - bare.begin, 0)
    return at


@gluon.jit
def statistics(stats, pair, m0, row, HAS_REST: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """``(lse, delta, rest)`` of the BM queries from ``m0`` of a pair of batch and head, whose ``row`` is so long; without a rest, lse in
    its place.
    """
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BN))
    COUNT: gl.constexpr = 3 if HAS_REST else 2
    at = stats + offset(pair * COUNT, row) + (m0 + gl.arange(0, BM, ROWS))
    lse = gl.load(at)
    delta = gl.load(at + row)
    rest = lse
    if HAS_REST:
        rest = gl.load(at + 2 * row)
    return lse, delta, rest


@gluon.jit
def column_of(p, x, m0, head, BM: gl.constexpr, BN: gl.constexpr):
    """A bias without a dim of keys, one number a query, of BM queries; zeros where there is none."""
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BN))
    if p.bias is not None:
        i = m0 + gl.arange(0, BM, ROWS)
        strides = p.bias_strides
        at = p.bias + offset(x.b // p.batch_inner, strides[0]) + offset(x.b % p.batch_inner, strides[1]) + offset(head, strides[2])
        row, _column = place_in_bias(p, x, i, 0, 0)
        return gl.load(at + row.to(gl.int64) * strides[3], mask=i < x.queries, other=0).to(gl.float32)
    else:
        return gl.zeros([BM], gl.float32, ROWS)


@gluon.jit
def add_bias(s, bias, IS_MASK: gl.constexpr):
    """Scores in base 2 with a bias of 64 rows or one, of BN columns or one; rounded as in the forward kernel."""
    if IS_MASK:
        return mask_scores(s, bias)
    else:
        bias, s = gl.broadcast(widened(bias), s)
        return gl.fma(bias, gl.full(s.shape, LOG2E, gl.float32, s.type.layout), s)


@gluon.jit
def row_in(buffer, BN: gl.constexpr):
    """BN numbers, one a key, for all queries, from a buffer of at least 128 bytes, which is what a buffer of TMA must be aligned to."""
    return gl.expand_dims(buffer.reshape([buffer.shape[4]]).slice(0, BN).load(gl.SliceLayout(0, accumulator(BN))), 0)


@gluon.jit
def mask_band(x, m0, n0, N, lo, hi, BM: gl.constexpr, BN: gl.constexpr, MASKED_VALUE: gl.constexpr):
    """x of BM queries from m0 and BN keys from n0 on where the key exists and the query sees it, else HIDDEN (``select_le``)."""
    S: gl.constexpr = accumulator(BN)
    j = gl.expand_dims(n0 + gl.arange(0, BN, gl.SliceLayout(0, S)), 0)
    i = m0 + gl.arange(0, BM, gl.SliceLayout(1, S))
    if hi is not None:  # one comparison a score: the last key that exists and that the query sees
        x = select_le(x, j, gl.expand_dims(gl.minimum(i + hi, N - 1), 1), MASKED_VALUE)
    else:
        x = select_le(x, j, j * 0 + (N - 1), MASKED_VALUE)
    if lo is not None:
        x = select_le(x, gl.expand_dims(i + lo, 1), j, MASKED_VALUE)
    return x


@gluon.jit
def exponents(s, lse, rest, HAS_REST: gl.constexpr, BIASED: gl.constexpr):
    """``s - lse``, less ``rest``, what a float32 lse loses of a huge one. Without a rest, and beside a bias that may be huge, p is kept to
    1. With one and without a bias it is, too: that case is for huge q k alone and need not be fast.
    """
    x = s - gl.expand_dims(lse, 1)
    if HAS_REST:
        x = x - gl.expand_dims(rest, 1)
        if not BIASED:
            x = gl.minimum(x, 0.0)
    elif BIASED:
        x = gl.minimum(x, 0.0)
    return x
