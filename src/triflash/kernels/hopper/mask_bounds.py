"""Between which keys, or queries, a mask shows anything to each 64 rows, and between which everything: plain Triton, before the kernels
that walk these. Launched by ``launch/mask_bounds.py``; ``extent.mask_range`` and ``extent.whole_range`` read what it leaves.
"""

import triton
import triton.language as tl

from ..triton.prims import offset

NOWHERE = tl.constexpr(2**30)  # the first that is seen where none is, and the end where there is no bound
UNIT = tl.constexpr(64)  # keys or queries: what shows everything is made up of so many


@triton.jit
def _words(mask, rows, words, row_stride, M, N, whole):
    """Rows of a mask, four columns in a word, of which a byte is 1 or 0, and that where there is no row or column: of a block that is
    ``whole`` 16 bytes in a load. A word that a row ends in is read, as TMA reads it; what is behind the end may be anything.
    """
    at = mask.to(tl.pointer_type(tl.int32), bitcast=True) + rows[:, None].to(tl.int64) * (row_stride // 4) + words[None, :]
    if whole:
        x = tl.load(at)
    else:
        left = tl.minimum(tl.maximum(N - 4 * words, 0), 4)  # bytes of a word that belong to the row
        kept = tl.where(left == 4, -1, (1 << (8 * (left % 4))) - 1)
        x = tl.load(at, mask=(rows < M)[:, None] & (left > 0)[None, :], other=0) & kept[None, :]
    x |= x >> 4  # a byte that is not 0 counts as 1: its lowest bit gets the others
    x |= x >> 2
    return (x | (x >> 1)) & 0x01010101


@triton.jit
def _outermost(seen, word, last):
    """The least number of a column whose byte of ``seen``, of the words numbered, is not 0; with ``last`` = 1 the greatest, negative."""
    first = 4 * word
    end = first
    for n in tl.static_range(4):
        there = ((seen >> (8 * n)) & 255) != 0
        end = tl.where(there, first + n, end)
    for n in tl.static_range(3, -1, -1):
        there = ((seen >> (8 * n)) & 255) != 0
        first = tl.where(there, 4 * word + n, first)
    return tl.min(tl.where(seen != 0, first + last * (-end - first), NOWHERE), 0)


@triton.jit
def _nearest(mask, row_stride, first, M, N, last, best, OF_KEYS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):
    """The first key, or (OF_KEYS) query, that a mask shows to any of the TILE queries (keys) from ``first`` on; with ``last`` = 1 the last
    one, its number negative. ``best`` if that is less.

    From one end, STEP at a time, as far as the first block that shows something: what is read is what the kernels behind need not multiply.
    """
    walked = M if OF_KEYS else N
    own = N if OF_KEYS else M
    blocks = tl.cdiv(walked, STEP)
    block = 0
    searching = blocks > 0
    while searching:
        number = block + last * (blocks - 1 - 2 * block)
        whole = (first + TILE <= own) & ((number + 1) * STEP <= walked)
        if OF_KEYS:
            rows = number * STEP + tl.arange(0, STEP)
            x = _words(mask, rows, first // 4 + tl.arange(0, TILE // 4), row_stride, M, N, whole)
            seen = tl.sum(x, 1)  # no byte of it runs over
            found = tl.min(tl.where(seen != 0, (1 - 2 * last) * rows, NOWHERE), 0)
        else:
            words = number * (STEP // 4) + tl.arange(0, STEP // 4)
            x = _words(mask, first + tl.arange(0, TILE), words, row_stride, M, N, whole)
            found = _outermost(tl.sum(x, 0), words, last)
        best = tl.minimum(best, found)
        block += 1
        left = block * STEP + last * (1 - blocks * STEP)  # the least that the blocks behind can give
        searching = (block < blocks) & (left < best)
    return best


@triton.jit
def _place(entry, strides, inner, of):
    """``(first row of the entry's tile / TILE, head, where its batch entry's mask begins)`` of an entry of the table ``of``."""
    _table, tiles, heads, _members = of
    batch = entry // tiles // heads
    return entry % tiles, entry // tiles % heads, offset(batch // inner, strides[0]) + offset(batch % inner, strides[1])


@triton.jit
def _bound(number, mask, strides, inner, of, M, N, OF_KEYS: tl.constexpr, COLUMN: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):
    """One of the first two numbers of an entry of the table ``of``."""
    table, _tiles, _heads, members = of
    last = number % 2
    tile, head, start = _place(number // 2, strides, inner, of)
    first = tile * TILE
    best = NOWHERE + last * 0
    for member in range(members):
        of_head = mask + start + offset(head * members + member, strides[2])
        if COLUMN:
            rows = first + tl.arange(0, TILE)
            seen = tl.load(of_head + rows.to(tl.int64) * strides[3], mask=rows < M, other=0)
            best = tl.minimum(best, tl.min(tl.where(seen != 0, 0, NOWHERE), 0))
        else:
            best = _nearest(of_head, strides[3], first, M, N, last, best, OF_KEYS, TILE, STEP)
    unbounded = M == 1 if OF_KEYS else COLUMN
    if last == 1:
        best = tl.where(best == NOWHERE, 0, tl.where(unbounded, NOWHERE, 1 - best))
    tl.store(table + number // 2 * 4 + last, best)


@triton.jit
def _counts(mask, row_stride, first, number, M, N, OF_KEYS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):
    """To how many of the TILE queries from ``first`` on a mask shows each key of block ``number``, of STEP keys; OF_KEYS: how many of TILE
    keys it shows to each query.
    """
    whole = (first + TILE <= (N if OF_KEYS else M)) & ((number + 1) * STEP <= (M if OF_KEYS else N))
    if OF_KEYS:
        rows = number * STEP + tl.arange(0, STEP)
        x = tl.sum(_words(mask, rows, first // 4 + tl.arange(0, TILE // 4), row_stride, M, N, whole), 1)  # no byte of it runs over
        return (x & 255) + ((x >> 8) & 255) + ((x >> 16) & 255) + (x >> 24)
    else:
        words = number * (STEP // 4) + tl.arange(0, STEP // 4)
        x = tl.sum(_words(mask, first + tl.arange(0, TILE), words, row_stride, M, N, whole), 0)
        return tl.reshape((x[:, None] >> (8 * tl.arange(0, 4))[None, :]) & 255, (STEP,))


@triton.jit
def _ranges(entry, mask, strides, inner, of, M, N, OF_KEYS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):
    """All four numbers of an entry of the table ``of``: the whole of its rows is read."""
    table, _tiles, _heads, members = of
    tile, head, start = _place(entry, strides, inner, of)
    first = tile * TILE
    walked = M if OF_KEYS else N
    most = tl.minimum(TILE, (N if OF_KEYS else M) - first) * members  # what shows everything is shown to so many
    seen_first = NOWHERE + entry * 0
    seen_end = entry * 0
    run = entry * 0  # where the units that show everything begin, up to the one that was looked at
    best_first = entry * 0
    best_end = entry * 0
    for block in range(tl.cdiv(walked, STEP)):
        count = _counts(mask + start + offset(head * members, strides[2]), strides[3], first, block, M, N, OF_KEYS, TILE, STEP)
        for member in range(1, members):
            of_head = mask + start + offset(head * members + member, strides[2])
            count += _counts(of_head, strides[3], first, block, M, N, OF_KEYS, TILE, STEP)
        at = block * STEP + tl.arange(0, STEP)
        seen_first = tl.minimum(seen_first, tl.min(tl.where(count > 0, at, NOWHERE), 0))
        seen_end = tl.maximum(seen_end, tl.max(tl.where(count > 0, at + 1, 0), 0))
        hiding = tl.max(tl.reshape(((count < most) & (at < walked)).to(tl.int64), (STEP // UNIT, UNIT)), 1)
        bits = tl.sum(hiding << tl.arange(0, STEP // UNIT), 0)  # of each unit, if it hides anything
        for unit in range(tl.cdiv(tl.minimum(walked - block * STEP, STEP), UNIT)):
            end = block * STEP + (unit + 1) * UNIT
            run = tl.where(((bits >> unit) & 1) != 0, end, run)
            longer = end - run > best_end - best_first
            best_first = tl.where(longer, run, best_first)
            best_end = tl.where(longer, end, best_end)
    to = table + entry * 4
    tl.store(to, seen_first)
    tl.store(to + 1, seen_end)
    tl.store(to + 2, best_first)
    tl.store(to + 3, best_end)


@triton.jit
def _entry(
    number, mask, strides, inner, of, M, N, OF_KEYS: tl.constexpr, WHOLE: tl.constexpr, COLUMN: tl.constexpr, TILE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """What program ``number`` of the table ``of`` fills in."""
    if WHOLE:
        _ranges(number, mask, strides, inner, of, M, N, OF_KEYS, TILE, STEP)
    else:
        _bound(number, mask, strides, inner, of, M, N, OF_KEYS, COLUMN, TILE, STEP)


@triton.jit(do_not_specialize=["inner", "programs", "of_queries", "of_keys", "M", "N"])
def mask_bounds(
    mask, strides, inner, programs, of_queries, of_keys, M, N, ROW: tl.constexpr, COLUMN: tl.constexpr, WHOLE_QUERIES: tl.constexpr,
    WHOLE_KEYS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Fills tables with numbers of keys (of_keys: queries), four an entry: the first one that the mask shows to one of TILE queries (keys),
    and one more than the last; NOWHERE and 0 where there is none. Of an axis that the mask does not vary over all are seen: 0 and NOWHERE.
    Then the first of the most in a row that it shows to all of those that exist, and one more than their last: multiples of UNIT, the
    latter perhaps past the end; the same number twice where there are none. These two are not written without WHOLE_QUERIES (WHOLE_KEYS),
    where no more is looked at than what is not seen.

    mask: bytes of M rows and N columns, 1 where it does not vary, with strides (outer batch, inner batch, head, row), which but of a
    COLUMN, one number a query, are those of what TMA reads. Tables are ``(numbers, tiles, heads, members)``, by (outer, inner, head,
    tile), where the mask's ``members`` heads in a row share an entry: query heads of a key head. None: no table. A program an entry where
    all four numbers are wanted, which asks for a mask that varies over what is walked; else two, one for each number; ``programs``: of the
    first table. A ROW, one number a key, is looked at in fewer and longer steps.
    """
    ROWS: tl.constexpr = 1 if ROW else TILE
    COLUMNS: tl.constexpr = min(8 * STEP, 64 * UNIT) if ROW else STEP  # a bit for each unit
    if of_queries is not None:
        if tl.program_id(0) < programs:
            _entry(tl.program_id(0), mask, strides, inner, of_queries, M, N, False, WHOLE_QUERIES, COLUMN, ROWS, COLUMNS)
    if of_keys is not None:
        if tl.program_id(0) >= programs:
            _entry(tl.program_id(0) - programs, mask, strides, inner, of_keys, M, N, True, WHOLE_KEYS, COLUMN, TILE, STEP)
