"""Tiles of the kernel for the gradient of a bias, their rounds, and what of them packed sequences reach. Called by ``dbias.py``."""

from ..triton.prims import offset, segments
from .compat import gl, gluon
from .features import select_le
from .layouts import accumulator
from .scores_qk import BM


@gluon.jit
def entry_of(p, left):
    """(part, outer batch, inner batch, head, rounds) of a copy of the tiles of a head, the part slowest."""
    rounds = 1
    head = 0
    b1 = 0
    b0 = 0
    if p.VARIES_H:
        head = left % p.heads
        left = left // p.heads
    else:
        rounds = rounds * p.heads
    if p.VARIES_B1:
        b1 = left % p.batch_inner
        left = left // p.batch_inner
    else:
        rounds = rounds * p.batch_inner
    if p.VARIES_B0:
        b0 = left % p.batch_outer
        left = left // p.batch_outer
    else:
        rounds = rounds * p.batch_outer
    return left, b0, b1, head, rounds


@gluon.jit
def seen(p, tm):
    """Which tiles of keys some query of a tile of queries sees, of packed sequences maybe: (first, end)."""
    if p.packed is not None:
        ROWS: gl.constexpr = BM * p.C.consumers
        queries, keys, least, most = p.reach
        lo = p.lo
        hi = p.hi
        if p.lo is not None:
            lo = p.lo + least
        if p.hi is not None:
            hi = p.hi + most
        begin, _a, _b, end = segments(tm * ROWS, min(tm * ROWS + ROWS, queries) - 1, keys, lo, hi, p.C.block_n)
        return begin, gl.where(tm * ROWS < queries, end, 0)
    else:
        return in_band(p, tm)


@gluon.jit
def in_band(p, tm):
    """``seen``, where the diagonal is that of a dense batch; none of a tile of queries before the first."""
    ROWS: gl.constexpr = BM * p.C.consumers
    begin, _a, _b, end = segments(tm * ROWS, min(tm * ROWS + ROWS, p.M) - 1, p.N, p.lo, p.hi, p.C.block_n)
    return begin, gl.where(tm < 0, 0, end)


@gluon.jit
def tile_of(p, index):
    """(part, outer batch, inner batch, head, first query, first key, first round, last round) of a tile; no rounds where nobody sees it.

    The tiles of a head have ``places``, in rows of ``fold``, taken in steps of ``shuffle``, which has no divisor in common with their
    number. A triangle is folded: its last row of tiles lies turned round behind its first, and so on; of an odd number the last is alone.
    Packed sequences whose diagonal is another may see tiles beside it: behind it all tiles have places, of which those of the triangle are
    passed over.
    """
    left = index // p.places
    place = (index - left * p.places) * p.shuffle % p.places
    tm = place // p.fold
    tn = place - tm * p.fold
    if p.lo is None and p.hi is not None:
        opposite = p.tiles_m - 1 - tm
        tm -= p.tiles_m % 2
        _begin, own = in_band(p, tm)
        tm = gl.where(tn < own, tm, opposite)
        tn = gl.where(tn < own, tn, p.fold - 1 - tn)
        if p.packed is not None:
            behind = place - (p.places - p.tiles_m * p.tiles_n)
            tm = gl.where(behind < 0, tm, behind // p.tiles_n)
            tn = gl.where(behind < 0, tn, behind % p.tiles_n)
    part, b0, b1, head, rounds = entry_of(p, left)
    if p.packed is not None or p.lo is not None or p.hi is not None:
        begin, end = seen(p, tm)
        rounds = gl.where((tn >= begin) & (tn < end), rounds, 0)
        if p.packed is not None and p.lo is None and p.hi is not None:
            _begin, own = in_band(p, tm)
            rounds = gl.where((tn < own) == (behind < 0), rounds, 0)
    first = 0
    last = rounds
    if p.splits > 1:  # two divisions of 64 bits
        first = (offset(rounds, part) // p.splits).to(gl.int32)
        last = (offset(rounds, part + 1) // p.splits).to(gl.int32)
    return part, b0, b1, head, tm * (BM * p.C.consumers), tn * p.C.block_n, first, last


@gluon.jit
def round_of(p, r, b0, b1, head):
    """(batch, head) of a round of a tile."""
    if not p.VARIES_B1:
        b1 = r % p.batch_inner
        r = r // p.batch_inner
    if not p.VARIES_B0:
        b0 = r % p.batch_outer
        r = r // p.batch_outer
    if not p.VARIES_H:
        head = r
    return b0 * p.batch_inner + b1, head


@gluon.jit
def reach_of(packed, sequences):
    """Of all packed sequences: the most queries and keys that one has, and the least and greatest diagonal, or 0."""
    AT_ONCE: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    queries = sequences * 0
    keys = sequences * 0
    least = sequences * 0
    most = sequences * 0
    for begin in range(0, sequences, 512):
        b = begin + gl.arange(0, 512, AT_ONCE)
        inside = b < sequences
        own_queries = gl.load(packed[0] + 4 * b + 1, mask=inside, other=0)
        own_keys = gl.load(packed[0] + 4 * b + 3, mask=inside, other=0)
        diagonal = gl.load(packed[1] + b, mask=inside, other=0) * packed[2]
        diagonal = gl.where((own_queries > 0) & (own_keys > 0), diagonal, 0)
        queries = gl.maximum(queries, gl.max(own_queries, 0))
        keys = gl.maximum(keys, gl.max(own_keys, 0))
        least = gl.minimum(least, gl.min(diagonal, 0))
        most = gl.maximum(most, gl.max(diagonal, 0))
    return queries, keys, least, most


@gluon.jit
def reaches(p, x, m0, n0):
    """Whether a packed sequence has a query in a tile that sees a key there."""
    some = (m0 < x.queries) & (n0 < x.keys)
    if x.hi is not None:
        some = some & (n0 <= min(m0 + BM * p.C.consumers, x.queries) - 1 + x.hi)
    if x.lo is not None:
        some = some & (min(n0 + p.C.block_n, x.keys) - 1 >= m0 + x.lo)
    return some


@gluon.jit
def is_whole(p, x, m0, n0):
    """Whether all queries of a consumer exist and see all keys of the tile."""
    BN: gl.constexpr = p.C.block_n
    whole = (m0 + BM <= x.queries) & (n0 + BN <= x.keys)
    if x.hi is not None:
        whole = whole & (n0 + BN - 1 <= m0 + x.hi)
    if x.lo is not None:
        whole = whole & (n0 >= m0 + BM - 1 + x.lo)
    return whole


@gluon.jit
def own_part(weight, x, m0, n0, BN: gl.constexpr):
    """p where a packed sequence has a query that sees a key, else 0."""
    S: gl.constexpr = accumulator(BN)
    j = gl.expand_dims(n0 + gl.arange(0, BN, gl.SliceLayout(0, S)), 0)
    i = m0 + gl.arange(0, BM, gl.SliceLayout(1, S))
    last = gl.where(i < x.queries, x.keys - 1, -1)
    if x.hi is not None:
        last = gl.minimum(last, i + x.hi)
    weight = select_le(weight, j, gl.expand_dims(last, 1), "0f00000000")
    if x.lo is not None:
        weight = select_le(weight, gl.expand_dims(i + x.lo, 1), j, "0f00000000")
    return weight
