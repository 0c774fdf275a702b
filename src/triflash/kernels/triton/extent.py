"""Which rows of q, k and v are those of a program: of a batch entry, or of one of the sequences packed into one tensor.

Of packed sequences two tables are made on the device, before all other kernels of a pass (``packed.py``): ``tiles``, a pair (sequence,
tile) for each program of a head, and ``extents``, four numbers for each sequence. A kernel gets ``packed = (tiles, extents,
bottom_right)``; bottom_right: 1 if the diagonal meets the last query and the last key of a sequence, 0 if its first ones. None: there are
none. Called by the portable kernels.

Of a batch entry the queries and keys that there are, and its diagonal, are read where the features say so (``features.Features``); without,
there are all, and the diagonal is N - M.
"""

import triton
import triton.language as tl

from .prims import clamped, near, offset
from .records import record

FARTHEST: tl.constexpr = tl.constexpr(2**29)  # diagonal: sums of it, a side of a window and a position fit 32 bits; as lengths.py


@record
class Extent:
    """The rows of a program. tile: its number among those of its sequence. first_query, first_key: where its sequence begins, in batch
    entries or in rows: what ``strides[0]`` of a tensor counts. queries, keys: its length.
    """

    tile: object
    head: object
    sequence: object
    first_query: object
    queries: object
    first_key: object
    keys: object


@triton.jit
def of_sequence(extents, sequence, head, tile, exists):
    """The rows of a sequence; none unless it exists."""
    at = extents + 4 * sequence
    first_query = tl.load(at)
    first_key = tl.load(at + 2)
    queries = tl.where(exists, tl.load(at + 1), 0)
    keys = tl.where(exists, tl.load(at + 3), 0)
    return Extent(tile, head, sequence, first_query, queries, first_key, keys)


@triton.jit
def of_program(packed, bound, BLOCK: tl.constexpr, OF_KEYS: tl.constexpr, REVERSED: tl.constexpr):
    """The rows of this program, of which there are ``bound`` for each head; those behind the last tile have none. BLOCK: rows of a tile, of
    queries or (OF_KEYS) of keys. REVERSED counts tiles from the last.
    """
    pid = tl.program_id(0)
    entry = pid % bound
    head = pid // bound
    sequence = tl.load(packed[0] + 2 * entry)
    tile = tl.load(packed[0] + 2 * entry + 1)
    e = of_sequence(packed[1], tl.maximum(sequence, 0), head, tile, sequence >= 0)
    if REVERSED:
        length = e.keys if OF_KEYS else e.queries
        tile = tl.maximum(tl.cdiv(length, BLOCK) - 1 - tile, 0)
    return Extent(tile, e.head, e.sequence, e.first_query, e.queries, e.first_key, e.keys)


@triton.jit
def diagonal(packed, M, N):
    """By what a sequence's band is moved: the host knew neither length."""
    return (N - M) * packed[2]


@triton.jit
def statistics(base, b, head, heads, rows, first_query, PACKED: tl.constexpr):
    """Where a head's rest of lse, or delta, begins: contiguous by batch entry, head and query; ``rows``: of the whole tensor."""
    if PACKED:
        return base + offset(head, rows) + first_query
    else:
        return base + offset(b * heads + head, rows)


@triton.jit
def placed_queries(f, b, M):
    """First query of batch entry b, and how many there are up to its last one, of M."""
    first = 0
    end = M
    if f.query_starts is not None:
        first = clamped(tl.load(f.query_starts + offset(b, f.query_starts_stride)), M)
    if f.query_lengths is not None:
        end = clamped(tl.load(f.query_lengths + offset(b, f.query_lengths_stride)), M)
    return first, end


@triton.jit
def placed_keys(f, b, N):
    """First key of batch entry b, of N."""
    first = 0
    if f.key_starts is not None:
        first = clamped(tl.load(f.key_starts + offset(b, f.key_starts_stride)), N)
    return first


@triton.jit
def placed_diagonal(f, b, M, N):
    """The key at distance 0 from query 0 of batch entry b."""
    if f.diagonals is not None:
        return near(tl.load(f.diagonals + offset(b, f.diagonals_stride)), FARTHEST)
    elif f.shift is not None:
        return f.shift
    else:
        return N - M
