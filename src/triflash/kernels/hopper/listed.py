"""The table of the tiles of packed sequences, which the Hopper kernels work through (``schedule.Listed``): in plain Triton, on the device.
Launched by ``launch/hopper_packed.py``: ``prepared`` alone, or where tiles are many the other two behind ``kernels/triton/packed.extents``.

Tiles differ in length, and each program of a persistent grid takes one of each wave: the longest come first, so that all get about the
same. They are sorted by counting: ``listed`` numbers the tiles of about the same length, within CHUNKS of the packed rows whose operands
stay in the L2 cache together, and ``ordered`` puts them where they belong. Which of two such tiles comes first is left to chance.

``spread`` has to do with no tiles: it lays out a bias or mask over packed keys so that TMA can load it.
"""

import triton
import triton.language as tl

from ..triton.packed import extents as extents_of_sequences
from ..triton.packed import unowned
from ..triton.prims import last_at_most

BUCKETS = tl.constexpr(128)  # of tiles of about the same length: eight an octave of blocks
CHUNKS = tl.constexpr(4)
COLUMNS = tl.constexpr(8)  # extent.ENTRY
AT_ONCE = tl.constexpr(1024)  # tiles of a table, and sequences, that one program lists


@triton.jit
def _length(row, rows, others, lo, hi, diagonal, TILE: tl.constexpr, OF_KEYS: tl.constexpr):
    """How many blocks of 64 a tile walks through, of the other axis, ``others`` long."""
    begin = tl.zeros_like(row)
    end = others
    last = tl.minimum(row + TILE, rows) - 1
    if OF_KEYS:
        if lo is not None:
            end = tl.minimum(end, tl.maximum(last - (lo + diagonal) + 1, 0))
        if hi is not None:
            begin = tl.minimum(end, tl.maximum(row - (hi + diagonal), 0))
    else:
        if hi is not None:
            end = tl.minimum(end, tl.maximum(last + (hi + diagonal) + 1, 0))
        if lo is not None:
            begin = tl.minimum(end, tl.maximum(row + (lo + diagonal), 0))
    return (end - begin + 63) // 64


@triton.jit
def listed(
    extents, first, diagonals, entries, places, counters, count, sequences, bound, rounds, bottom_right, lo, hi, chunk,
    BLOCK: tl.constexpr, TILE: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """One program fills BLOCK of the ``bound`` entries of a table of tiles of TILE queries or (OF_KEYS) keys: first row of the tile, and
    the fields of ``extent.Extent``; zeros where there is no tile left. places: for each the group of tiles of about its length, and its
    number in that group, of which ``counters`` has how many there are; -1 where there is no tile. count: of tiles.

    extents, first, diagonals: as ``packed.extents`` makes them; rounds: the bits of ``sequences``; bottom_right: 1, or 0 if lo and hi
    count from the first query and key; chunk: rows of the other axis that CHUNKS are made of.
    """
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.minimum(tl.load(first + sequences), bound)
    if tl.program_id(0) == 0:
        tl.store(count, total)
    b = last_at_most(first, 1, entry, sequences, rounds)
    exists = entry < total
    inside = entry < bound
    row = tl.where(exists, (entry - tl.load(first + b, mask=exists, other=0)) * TILE, 0)
    at = extents + 4 * b
    first_query = tl.load(at, mask=exists, other=0)
    queries = tl.load(at + 1, mask=exists, other=0)
    first_key = tl.load(at + 2, mask=exists, other=0)
    keys = tl.load(at + 3, mask=exists, other=0)
    diagonal = tl.load(diagonals + b, mask=exists, other=0)
    band = diagonal * bottom_right
    if OF_KEYS:
        length = _length(row, keys, queries, lo, hi, band, TILE, OF_KEYS)
        number = tl.minimum(first_query // chunk, CHUNKS - 1)
    else:
        length = _length(row, queries, keys, lo, hi, band, TILE, OF_KEYS)
        number = tl.minimum(first_key // chunk, CHUNKS - 1)
    # The exponent of a float32 and the first three bits behind it tell lengths apart that differ by an eighth.
    octave = (length + 1).to(tl.float32).to(tl.int32, bitcast=True) // 2**20 - 127 * 8
    group = number * BUCKETS + (BUCKETS - 1) - tl.minimum(octave, BUCKETS - 1)
    rank = tl.atomic_add(counters + group, 1, mask=exists, sem="relaxed")
    tl.store(places + 2 * entry, tl.where(exists, group, -1), mask=inside)
    tl.store(places + 2 * entry + 1, rank, mask=inside)
    own = entries + COLUMNS * entry
    tl.store(own, row, mask=inside)
    tl.store(own + 1, tl.where(exists, b, 0), mask=inside)
    tl.store(own + 2, first_query, mask=inside)
    tl.store(own + 3, queries, mask=inside)
    tl.store(own + 4, first_key, mask=inside)
    tl.store(own + 5, keys, mask=inside)
    tl.store(own + 6, diagonal, mask=inside)
    tl.store(own + 7, tl.where(exists, (first_query + b * 128) // 128 * 128, 0), mask=inside)  # extent.PADDING


@triton.jit
def ordered(entries, places, counters, table, bound, BLOCK: tl.constexpr):
    """One program moves BLOCK of the ``bound`` entries to where they belong in the table; those of no tile stay where they are."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < bound
    groups = tl.arange(0, CHUNKS * BUCKETS)
    count = tl.load(counters + groups)
    before = tl.cumsum(count, 0) - count
    group = tl.load(places + 2 * entry, mask=inside, other=-1)
    rank = tl.load(places + 2 * entry + 1, mask=inside, other=0)
    to = tl.where(group < 0, entry, rank + tl.gather(before, tl.maximum(group, 0), 0))
    column = tl.arange(0, COLUMNS)
    x = tl.load(entries + COLUMNS * entry[:, None] + column[None, :], mask=inside[:, None], other=0)
    tl.store(table + COLUMNS * to[:, None] + column[None, :], x, mask=inside[:, None])


@triton.jit
def spread(extents, x, target, x_head, x_key, target_head, sequences, T, blocks, rounds, BLOCK: tl.constexpr):
    """One program moves BLOCK numbers of a head's bias or mask over packed keys to where Hopper's kernels look for them: each sequence's
    from a multiple of 128 on (extent.PADDING), as TMA takes no block that begins off a multiple of 16 bytes. Nothing is written between.

    extents: the columns of ``packed.extents`` that are about keys; x_head, x_key, target_head: strides; blocks: of a head.
    """
    head = tl.program_id(0) // blocks
    key = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    b = last_at_most(extents, 4, key, sequences, rounds)
    first = tl.load(extents + 4 * b)
    at = key - first
    owned = (at >= 0) & (at < tl.load(extents + 4 * b + 1)) & (key < T)
    number = tl.load(x + head.to(tl.int64) * x_head + key.to(tl.int64) * x_key, mask=owned, other=0)
    tl.store(target + head.to(tl.int64) * target_head + (first + b * 128) // 128 * 128 + at, number, mask=owned)


@triton.jit
def prepared(
    offsets_q, offsets_k, used_q, used_k, extents, diagonals, counters, queries, keys, most, lo, hi, sizes, sink, x, lse, rest, dk, dv,
    x_strides, lse_stride, dk_strides, dv_strides,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, DX: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """All kernels around those that multiply, in one launch. The first program does what ``extents``, ``listed`` and ``ordered`` do, with
    barriers between; the others clear what no sequence has (``packed.unowned``), of x, lse and rest, and behind that of dk and dv.

    queries, keys: of a table ``(first, entries, places, table, count, bound, chunk)``, bound AT_ONCE at most. x: out or dq. sizes:
    ``(sequences, their bits, bottom_right, T_q, T_k, heads, key heads)``, AT_ONCE sequences at most. most: most_q and most_k
    of ``extents``. None: not wanted.
    """
    sequences, rounds, bottom_right, T_q, T_k, heads, kv_heads = sizes
    most_q, most_k = most
    programs_q = 0
    if x is not None:
        programs_q = tl.cdiv(T_q, BLOCK)
    if tl.program_id(0) == 0:
        first_q = None
        first_k = None
        if queries is not None:
            first_q, entries_q, places_q, table_q, count_q, bound_q, chunk_q = queries
        if keys is not None:
            first_k, entries_k, places_k, table_k, count_k, bound_k, chunk_k = keys
        counters_k = counters + CHUNKS * BUCKETS
        extents_of_sequences(
            offsets_q, offsets_k, used_q, used_k, extents, first_q, first_k, diagonals, counters, sequences, T_q, T_k, most_q, most_k,
            BM, BN, AT_ONCE, 2 * CHUNKS * BUCKETS,
        )  # fmt: skip
        tl.debug_barrier()
        if queries is not None:
            listed(
                extents, first_q, diagonals, entries_q, places_q, counters, count_q, sequences, bound_q, rounds, bottom_right, lo, hi,
                chunk_q, AT_ONCE, BM, False,
            )  # fmt: skip
        if keys is not None:
            listed(
                extents, first_k, diagonals, entries_k, places_k, counters_k, count_k, sequences, bound_k, rounds, bottom_right, lo, hi,
                chunk_k, AT_ONCE, BN, True,
            )  # fmt: skip
        tl.debug_barrier()
        if queries is not None:
            ordered(entries_q, places_q, counters, table_q, bound_q, AT_ONCE)
        if keys is not None:
            ordered(entries_k, places_k, counters_k, table_k, bound_k, AT_ONCE)
    elif tl.program_id(0) <= programs_q:
        unowned(
            offsets_q, used_q, most_q, sink, x, None, lse, rest, x_strides, None, lse_stride, sequences, T_q, heads, rounds, 1,
            DX, 0, BLOCK, BLOCK_DIM,
        )  # fmt: skip
    else:
        unowned(
            offsets_k, used_k, most_k, None, dk, dv, None, None, dk_strides, dv_strides, None, sequences, T_k, kv_heads, rounds,
            1 + programs_q, DK, DV, BLOCK, BLOCK_DIM,
        )  # fmt: skip
