"""The table of the tiles of packed sequences, which the Hopper kernels work through (``schedule.Listed``): in plain Triton, on the device.
Launched by ``launch/hopper_packed.py``: ``prepared`` alone, or where tiles are many the other two behind ``kernels/triton/packed.extents``.

Tiles differ in length, and each program of a persistent grid takes one of each wave: the longest come first, so that all get about the
same. They are sorted by counting: ``listed`` numbers the tiles of about the same length, within CHUNKS of the packed rows whose operands
stay in the L2 cache together, and ``ordered`` puts them where they belong. ``prepared`` does both in registers. Which of two such tiles
comes first is left to chance.

``spread`` has to do with no tiles: it lays out a bias or mask over packed keys so that TMA can load it.
"""

import triton
import triton.language as tl

from ..triton.packed import extents_of, unowned
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
def _group(row, first_query, queries, first_key, keys, lo, hi, diagonal, chunk, TILE: tl.constexpr, OF_KEYS: tl.constexpr):
    """The number of a tile's group: first by chunks, then by lengths, the longest first."""
    if OF_KEYS:
        length = _length(row, keys, queries, lo, hi, diagonal, TILE, OF_KEYS)
        number = tl.minimum(first_query // chunk, CHUNKS - 1)
    else:
        length = _length(row, queries, keys, lo, hi, diagonal, TILE, OF_KEYS)
        number = tl.minimum(first_key // chunk, CHUNKS - 1)
    # The exponent of a float32 and the first three bits behind it tell lengths apart that differ by an eighth.
    octave = (length + 1).to(tl.float32).to(tl.int32, bitcast=True) // 2**20 - 127 * 8
    return number * BUCKETS + (BUCKETS - 1) - tl.minimum(octave, BUCKETS - 1)


@triton.jit
def _write(table, entry, row, b, first_query, queries, first_key, keys, diagonal, exists, inside):
    """Entries of a table, of which those of no tile are all zeros but for b."""
    own = table + COLUMNS * entry
    tl.store(own, row, mask=inside)
    tl.store(own + 1, tl.where(exists, b, 0), mask=inside)
    tl.store(own + 2, first_query, mask=inside)
    tl.store(own + 3, queries, mask=inside)
    tl.store(own + 4, first_key, mask=inside)
    tl.store(own + 5, keys, mask=inside)
    tl.store(own + 6, diagonal, mask=inside)
    tl.store(own + 7, tl.where(exists, (first_query + b * 128) // 128 * 128, 0), mask=inside)  # extent.PADDING


@triton.jit
def _of(x, b, exists):
    """What sequences b have of a tensor over all; 0 where there is none."""
    return tl.where(exists, tl.gather(x, b, 0), 0)


@triton.jit
def _tiles(x, of, counters, sequences, rounds, lo, hi, bottom_right, TILE: tl.constexpr, OF_KEYS: tl.constexpr):
    """AT_ONCE tiles, as ``_write`` takes them, with their groups and their numbers there. x: what ``extents_of`` gives of AT_ONCE
    sequences; of: ``(table, count, bound, chunk)``.
    """
    _table, count, bound, chunk = of
    q0, M, k0, N, diagonals = x
    entry = tl.arange(0, AT_ONCE)
    rows = M
    if OF_KEYS:
        rows = N
    tiles = tl.where(entry < sequences, tl.minimum((rows + TILE - 1) // TILE, AT_ONCE), 0)
    upto = tl.cumsum(tiles, 0)
    first = upto - tiles
    total = tl.minimum(tl.sum(tiles, 0), bound)
    tl.store(count, total)
    exists = entry < total
    low = tl.zeros_like(entry)
    high = low + tl.maximum(sequences - 1, 0)
    for _ in range(rounds):  # as ``last_at_most``, of what lies in registers
        middle = (low + high + 1) // 2
        below = tl.gather(first, middle, 0) <= entry
        low = tl.where(below, middle, low)
        high = tl.maximum(tl.where(below, high, middle - 1), low)
    row = tl.where(exists, (entry - tl.gather(first, low, 0)) * TILE, 0)
    first_query, queries = _of(q0, low, exists), _of(M, low, exists)
    first_key, keys = _of(k0, low, exists), _of(N, low, exists)
    diagonal = _of(diagonals, low, exists)
    group = _group(row, first_query, queries, first_key, keys, lo, hi, diagonal * bottom_right, chunk, TILE, OF_KEYS)
    rank = tl.atomic_add(counters + group, 1, mask=exists, sem="relaxed")
    return row, low, first_query, queries, first_key, keys, diagonal, exists, group, rank


@triton.jit
def _put(tiles, of, counters):
    """The tiles into their table, those of a group behind all of the groups before it."""
    row, b, first_query, queries, first_key, keys, diagonal, exists, group, rank = tiles
    table, _count, bound, _chunk = of
    entry = tl.arange(0, AT_ONCE)
    sizes = tl.load(counters + tl.arange(0, CHUNKS * BUCKETS))
    to = tl.where(exists, rank + tl.gather(tl.cumsum(sizes, 0) - sizes, tl.where(exists, group, 0), 0), entry)
    _write(table, to, row, b, first_query, queries, first_key, keys, diagonal, exists, entry < bound)


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
    group = _group(row, first_query, queries, first_key, keys, lo, hi, band, chunk, TILE, OF_KEYS)
    rank = tl.atomic_add(counters + group, 1, mask=exists, sem="relaxed")
    tl.store(places + 2 * entry, tl.where(exists, group, -1), mask=inside)
    tl.store(places + 2 * entry + 1, rank, mask=inside)
    _write(entries, entry, row, b, first_query, queries, first_key, keys, diagonal, exists, inside)


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
    """All kernels around those that multiply, in one launch. The first program does what ``extents``, ``listed`` and ``ordered`` do, and
    keeps in registers what these hand on; the others clear what no sequence has (``packed.unowned``), of x, lse and rest, and behind that
    of dk and dv.

    counters: of both tables, BUCKETS times CHUNKS each. queries, keys: of a table ``(table, count, bound, chunk)``, bound AT_ONCE at most.
    x: out or dq. sizes: ``(sequences, their bits, bottom_right, T_q, T_k, heads, key heads)``, AT_ONCE sequences at most. most: most_q and
    most_k of ``extents``. None: not wanted.
    """
    sequences, rounds, bottom_right, T_q, T_k, heads, kv_heads = sizes
    most_q, most_k = most
    programs_q = 0
    if x is not None:
        programs_q = tl.cdiv(T_q, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(counters + tl.arange(0, 2 * CHUNKS * BUCKETS), tl.zeros([2 * CHUNKS * BUCKETS], tl.int32))
        b = tl.arange(0, AT_ONCE)
        own = extents_of(
            offsets_q, offsets_k, used_q, used_k, extents, diagonals, b, b < sequences, T_q, T_k, most_q, most_k
        )  # fmt: skip
        tl.debug_barrier()  # before others add to counters
        counters_k = counters + CHUNKS * BUCKETS
        if queries is not None:
            tiles_q = _tiles(own, queries, counters, sequences, rounds, lo, hi, bottom_right, BM, False)
        if keys is not None:
            tiles_k = _tiles(own, keys, counters_k, sequences, rounds, lo, hi, bottom_right, BN, True)
        tl.debug_barrier()  # behind all that add
        if queries is not None:
            _put(tiles_q, queries, counters)
        if keys is not None:
            _put(tiles_k, keys, counters_k)
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
