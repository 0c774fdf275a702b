"""Between which keys, or queries, a mask shows anything to each 64 rows: plain Triton, before the kernels that walk these. Launched by
``launch/mask_bounds.py``; ``extent.mask_range`` reads what it leaves.
"""

import triton
import triton.language as tl

from ..triton.prims import offset

NOWHERE = tl.constexpr(2**30)  # the first that is seen where none is, and the end where there is no bound


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
def _bound(number, mask, strides, inner, of, M, N, OF_KEYS: tl.constexpr, COLUMN: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):
    """One of the two numbers of an entry of the table ``of``."""
    table, tiles, heads, members = of
    entry = number // 2
    last = number % 2
    first = entry % tiles * TILE
    head = entry // tiles % heads
    batch = entry // tiles // heads
    mask += offset(batch // inner, strides[0]) + offset(batch % inner, strides[1])
    best = NOWHERE + last * 0
    for member in range(members):
        of_head = mask + offset(head * members + member, strides[2])
        if COLUMN:
            rows = first + tl.arange(0, TILE)
            seen = tl.load(of_head + rows.to(tl.int64) * strides[3], mask=rows < M, other=0)
            best = tl.minimum(best, tl.min(tl.where(seen != 0, 0, NOWHERE), 0))
        else:
            best = _nearest(of_head, strides[3], first, M, N, last, best, OF_KEYS, TILE, STEP)
    unbounded = M == 1 if OF_KEYS else COLUMN
    if last == 1:
        best = tl.where(best == NOWHERE, 0, tl.where(unbounded, NOWHERE, 1 - best))
    tl.store(table + number, best)


@triton.jit(do_not_specialize=["inner", "programs", "of_queries", "of_keys", "M", "N"])
def mask_bounds(
    mask, strides, inner, programs, of_queries, of_keys, M, N, ROW: tl.constexpr, COLUMN: tl.constexpr, TILE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Fills tables with two numbers an entry: the first key (of_keys: query) that the mask shows to one of TILE queries (keys), and one
    more than the last; NOWHERE and 0 where there is none. Of an axis that the mask does not vary over all are seen: 0 and NOWHERE.

    mask: bytes of M rows and N columns, 1 where it does not vary, with strides (outer batch, inner batch, head, row), which but of a
    COLUMN, one number a query, are those of what TMA reads. Tables are ``(numbers, tiles, heads, members)``, by (outer, inner, head,
    tile), where the mask's ``members`` heads in a row share an entry: query heads of a key head. None: not wanted. Two programs an entry,
    one for each number; ``programs``: of the first table. A ROW, one number a key, is looked at in fewer and longer steps.
    """
    ROWS: tl.constexpr = 1 if ROW else TILE
    COLUMNS: tl.constexpr = 8 * STEP if ROW else STEP
    if of_queries is not None:
        if tl.program_id(0) < programs:
            _bound(tl.program_id(0), mask, strides, inner, of_queries, M, N, False, COLUMN, ROWS, COLUMNS)
    if of_keys is not None:
        if tl.program_id(0) >= programs:
            _bound(tl.program_id(0) - programs, mask, strides, inner, of_keys, M, N, True, COLUMN, TILE, STEP)
