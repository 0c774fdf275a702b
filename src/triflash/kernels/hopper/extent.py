"""Which queries and keys a tile's sequence has, and where its rows lie. Called by every Hopper kernel that owns tiles, once a tile.

Of packed sequences the host knows neither a length nor how many tiles there are: ``listed.py`` makes a table of the tiles on the device. A
tensor of rows is then addressed by a descriptor of five dims whose coordinates tell where a sequence ends, so that the hardware fills what
is loaded past its end with zeros, and drops what is stored there (``triton/tools/ragged_tma.py``; ``launch/hopper.ragged``).
"""

from ..triton.prims import offset
from .compat import gl, gluon, record
from .features import visible_keys

ENTRY = gl.constexpr(8)  # numbers of a table's entry, in the order of Extent's fields behind the tile's first row
BEYOND = gl.constexpr(2**29)  # the first row of a tile that there is not: past every sequence's end
BILLION = gl.constexpr(2**30)  # where a ragged descriptor's dim of rows ends
PADDING = gl.constexpr(128)  # rows that statistics of a sequence begin at a multiple of, and its row of a bias over keys


@record
class Extent:
    """A sequence: a batch entry, or one of those packed into one.

    b: its number. queries: it has; keys: visible ones. diagonal: the key at distance 0 from query 0, in ALiBi. lo, hi: its band, of
    ``j - i``. first_query, first_key: where it begins among packed rows; first_padded: where its statistics do, which begin at multiples of
    PADDING so that tiles read no neighbour's. None: nothing is packed.
    """

    b: object
    queries: object
    keys: object
    diagonal: object
    lo: object
    hi: object
    first_query: object
    first_key: object
    first_padded: object


@gluon.jit
def extent_of(p, b):
    """The extent of batch entry b, or with packed sequences of the tile b of the table."""
    if p.packed is not None:
        at = p.packed[0] + b * ENTRY
        queries = gl.load(at + 3)
        diagonal = gl.load(at + 6) * p.packed[2]
        lo = p.lo
        hi = p.hi
        if p.lo is not None:
            lo = p.lo + diagonal
        if p.hi is not None:
            hi = p.hi + diagonal
        return Extent(gl.load(at + 1), queries, gl.load(at + 5), diagonal, lo, hi, gl.load(at + 2), gl.load(at + 4), gl.load(at + 7))
    else:
        return Extent(b, p.M, visible_keys(p.lengths, b, p.N), p.N - p.M, p.lo, p.hi, None, None, None)


@gluon.jit
def extent_of_sequence(p, b):
    """The extent of batch entry b, of which ``keys`` are all, or of packed sequence b: ``p.packed`` begins with extents and diagonals, as
    ``packed.extents`` makes them, and 1 or 0 whether bands meet the last query and key of a sequence.
    """
    if p.packed is not None:
        at = p.packed[0] + b * 4
        first_query = gl.load(at)
        diagonal = gl.load(p.packed[1] + b) * p.packed[2]
        lo = p.lo
        hi = p.hi
        if p.lo is not None:
            lo = p.lo + diagonal
        if p.hi is not None:
            hi = p.hi + diagonal
        first_padded = (first_query + b * PADDING) // PADDING * PADDING
        return Extent(b, gl.load(at + 1), gl.load(at + 3), diagonal, lo, hi, first_query, gl.load(at + 2), first_padded)
    else:
        return Extent(b, p.M, p.N, p.N - p.M, p.lo, p.hi, None, None, None)


@gluon.jit
def place_of(x, first, length, row):
    """Where a block of the sequence's queries or keys lies, from ``row`` on: two numbers for ``rows``. first, length: of which."""
    if first is not None:
        return first + length, BILLION - length + row
    else:
        return x.b, row


@gluon.jit
def query_place(x, row):
    """Where a block of queries lies."""
    return place_of(x, x.first_query, x.queries, row)


@gluon.jit
def key_place(x, row):
    """Where a block of keys lies."""
    return place_of(x, x.first_key, x.keys, row)


@gluon.jit
def rows(p, place, head, column=0):
    """A place's coordinates for TMA, of a head, from a column on."""
    if p.packed is not None:
        return [BILLION, place[0], place[1], head, column]
    else:
        return [place[0], place[1], head, column]


@gluon.jit
def query_rows(p, x, row, head):
    """Coordinates of a block of queries."""
    return rows(p, query_place(x, row), head)


@gluon.jit
def key_rows(p, x, row, head):
    """Coordinates of a block of keys."""
    return rows(p, key_place(x, row), head)


@gluon.jit
def lse_row(p, x, head):
    """Where lse of a head begins, contiguous by batch entry, head and query."""
    if x.first_query is not None:
        return offset(head, p.M) + x.first_query
    else:
        return offset(x.b * p.heads + head, p.M)


@gluon.jit
def pair_of(p, x, head):
    """The row of a (batch, head) pair in the table of statistics and in the sum of dq: all packed sequences share that of the head."""
    if x.first_padded is not None:
        return head
    else:
        return x.b * p.heads + head


@gluon.jit
def padded_row(x, row):
    """Where a query's statistics, and its part of the sum of dq, lie in that row."""
    if x.first_padded is not None:
        return x.first_padded + row
    else:
        return row


@gluon.jit
def padded_length(p):
    """How long that row is in the table of statistics: queries up to a multiple of PADDING, or those of each packed sequence."""
    if p.packed is not None:
        return ((p.M + (PADDING - 1)) // PADDING + p.batch) * PADDING
    else:
        return (p.M + (PADDING - 1)) // PADDING * PADDING


@gluon.jit
def rows_of_sum(p, x, row, head, column):
    """Coordinates of a block of the float32 sum of dq."""
    if p.packed is not None:
        return [0, head, x.first_padded + row, column]
    else:
        return [x.b, head, row, column]


@gluon.jit
def stored_keys(p, x):
    """How many keys of the sequence have numbers in memory, of a bias or mask over keys."""
    if p.packed is not None:
        return x.keys
    else:
        return p.N


@gluon.jit
def place_in_bias(p, x, row, column, MASK: gl.constexpr):
    """Where the sequence's row and column lie in a bias, or (MASK) in the mask beside it, which may be packed along queries or keys: the
    latter as ``listed.spread`` lays it out.
    """
    if p.packed is not None:
        first = (x.first_key + x.b * PADDING) // PADDING * PADDING
        return row + x.first_query * p.packed[3 + 2 * MASK], column + first * p.packed[4 + 2 * MASK]
    else:
        return row, column


@gluon.jit
def mask_range(p, x, head, row, TILES: gl.constexpr):
    """Between which keys the mask shows anything to TILES times 64 queries from ``row`` on, or which queries to so many keys: the first one
    and one more than the last, by the table of ``mask_bounds.py``. head: of the rows.
    """
    at = _entries(p, x, head)
    first = gl.load(at + min(row // 64, p.bounds[4]) * 4)
    end = gl.load(at + min(row // 64, p.bounds[4]) * 4 + 1)
    for n in gl.static_range(1, TILES):
        first = min(first, gl.load(at + min(row // 64 + n, p.bounds[4]) * 4))
        end = max(end, gl.load(at + min(row // 64 + n, p.bounds[4]) * 4 + 1))
    return first, end


@gluon.jit
def whole_range(p, x, head, row, TILES: gl.constexpr):
    """Between which keys, or queries, the mask shows everything to those of ``mask_range``: the first one and one more than the last, which
    may be less.
    """
    at = _entries(p, x, head)
    first = gl.load(at + min(row // 64, p.bounds[4]) * 4 + 2)
    end = gl.load(at + min(row // 64, p.bounds[4]) * 4 + 3)
    for n in gl.static_range(1, TILES):
        first = max(first, gl.load(at + min(row // 64 + n, p.bounds[4]) * 4 + 2))
        end = min(end, gl.load(at + min(row // 64 + n, p.bounds[4]) * 4 + 3))
    return first, end


@gluon.jit
def _entries(p, x, head):
    """Where the table of a batch entry and a head begins."""
    return p.bounds[0] + (x.b // p.batch_inner * p.bounds[1] + x.b % p.batch_inner * p.bounds[2] + head * p.bounds[3])


@gluon.jit
def outer_at(b, batch_inner, head, on):
    """Where a bias or mask lies along (outer batch, inner batch, head); ``on`` is 0 for those that it broadcasts over."""
    return b // batch_inner * on[0], b % batch_inner * on[1], head * on[2]
