"""Products of heads that are padded to a power of 2, without the columns that only pad. Called by every Hopper kernel that has scores.

Where a product sums over them, it is issued in pieces (``over_columns``). Where they are the columns of its result, the accumulator is a
record of one or two pieces (``Pieces``), each a power of 2 of columns. Blocks in shared memory may lie in such pieces, too (``blocks.py``).
"""

from ..triton.prims import offset
from .compat import gl, gluon, record, warpgroup_mma, warpgroup_mma_wait
from .layouts import accumulator


@gluon.constexpr_function
def _largest(columns):
    """The largest power of 2 up to so many."""
    return 1 << (columns.bit_length() - 1)


@gluon.constexpr_function
def groups(columns):
    """How many MMAs ``over_columns`` issues, each of which counts where one waits for what was issued before it."""
    return columns.bit_count()


@gluon.jit
def over_columns(a, b, acc, FIRST: gl.constexpr, COLUMNS: gl.constexpr, ADDS: gl.constexpr):
    """a bᵀ over the columns from FIRST up to COLUMNS of both, issued; ADDS: added to acc, which is else what the MMA is told
    instead of zeros.

    The other columns only pad. A piece is a power of 2 of columns and begins at a multiple of that.
    """
    SIZE: gl.constexpr = _largest(COLUMNS - FIRST)
    if SIZE == b.shape[1]:
        return warpgroup_mma(a, b.permute((1, 0)), acc, use_acc=ADDS, is_async=True)
    else:
        acc = warpgroup_mma(a.slice(FIRST, SIZE, 1), b.slice(FIRST, SIZE, 1).permute((1, 0)), acc, use_acc=ADDS, is_async=True)
        if FIRST + SIZE < COLUMNS:
            acc = over_columns(a, b, acc, FIRST + SIZE, COLUMNS, True)
        return acc


@record
class Pieces:
    """What has a head's columns: an accumulator, an operand in registers, blocks in shared memory, TMA descriptors of them. second: what is
    behind the first piece, None if that is all.
    """

    first: object
    second: object


@gluon.constexpr_function
def piece(columns, width, number):
    """How many columns the first (0) and second (1) piece of so many columns have; all of a block of ``width`` where three were needed."""
    first = _largest(columns)
    second = columns - first
    if second & (second - 1):
        return width if number == 0 else 0
    return second if number else first


@gluon.constexpr_function
def pieces(columns, width):
    """In how many pieces so many columns are accumulated: 1 or 2. Each counts where one waits for what was issued before it."""
    return 1 if piece(columns, width, 1) == 0 else 2


@gluon.jit
def zeros_of(ROWS: gl.constexpr, COLUMNS: gl.constexpr, WIDTH: gl.constexpr):
    """An accumulator of zeros, of COLUMNS that lie in blocks of WIDTH."""
    FIRST: gl.constexpr = piece(COLUMNS, WIDTH, 0)
    SECOND: gl.constexpr = piece(COLUMNS, WIDTH, 1)
    first = gl.zeros([ROWS, FIRST], gl.float32, accumulator(FIRST))
    if SECOND > 0:
        return Pieces(first, gl.zeros([ROWS, SECOND], gl.float32, accumulator(SECOND)))
    else:
        return Pieces(first, None)


@gluon.constexpr_function
def left_operand(columns, width):
    """The layout of a left operand in registers, as ``into_columns`` takes it."""
    return gl.DotOperandLayout(0, accumulator(piece(columns, width, 0)), 2)


@gluon.jit
def into_columns(a, b, acc):
    """acc + a b, issued: of a in registers (``left_operand``) and the columns of b, in shared memory, that acc has."""
    FIRST: gl.constexpr = acc.first.shape[1]
    if FIRST == b.shape[1]:
        return Pieces(warpgroup_mma(a, b, acc.first, is_async=True), None)
    elif acc.second is None:
        return Pieces(warpgroup_mma(a, b.slice(0, FIRST, 1), acc.first, is_async=True), None)
    else:
        SECOND: gl.constexpr = acc.second.shape[1]
        return into_both(a, b.slice(0, FIRST, 1), b.slice(FIRST, SECOND, 1), acc)


@gluon.jit
def into_both(a, first, second, acc):
    """acc + a b of both pieces of b's columns, issued."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, accumulator(acc.second.shape[1]), 2)
    done = warpgroup_mma(a, first, acc.first, is_async=True)
    again = gl.convert_layout(a, OPERAND, assert_trivial=True)
    return Pieces(done, warpgroup_mma(again, second, acc.second, is_async=True))


@gluon.jit
def waited(PENDING: gl.constexpr, acc):
    """The accumulator, once at most PENDING of the MMAs issued are under way."""
    if acc.second is None:
        return Pieces(warpgroup_mma_wait(PENDING, [acc.first]), None)
    else:
        first, second = warpgroup_mma_wait(PENDING, [acc.first, acc.second])
        return Pieces(first, second)


@gluon.jit
def times(acc, factor):
    """The accumulator times a number."""
    if acc.second is None:
        return Pieces(acc.first * factor, None)
    else:
        return Pieces(acc.first * factor, acc.second * factor)


@gluon.jit
def times_rows(acc, factor):
    """The accumulator times a number a row, of any layout of rows."""
    if acc.second is None:
        return Pieces(_times_rows(acc.first, factor), None)
    else:
        return Pieces(_times_rows(acc.first, factor), _times_rows(acc.second, factor))


@gluon.jit
def _times_rows(x, factor):
    return x * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, accumulator(x.shape[1]))), 1)


@gluon.jit
def store_columns(target, acc):
    """Store the accumulator to its columns of a block in shared memory, in that block's dtype."""
    FIRST: gl.constexpr = acc.first.shape[1]
    if FIRST == target.shape[1]:
        target.store(acc.first.to(target.dtype))
    else:
        target.slice(0, FIRST, 1).store(acc.first.to(target.dtype))
        if acc.second is not None:
            target.slice(FIRST, acc.second.shape[1], 1).store(acc.second.to(target.dtype))


@gluon.jit
def keep(parts, row, acc, WIDTH: gl.constexpr):
    """Store an accumulator to rows of a contiguous float32 array (…, WIDTH), from ``row`` on; the array has whole tiles."""
    _keep_piece(parts, row, acc.first, 0, WIDTH)
    if acc.second is not None:
        _keep_piece(parts, row, acc.second, acc.first.shape[1], WIDTH)


@gluon.jit
def _keep_piece(parts, row, x, FIRST: gl.constexpr, WIDTH: gl.constexpr):
    """x, columns from FIRST on."""
    L: gl.constexpr = x.type.layout
    i = gl.expand_dims(gl.arange(0, x.shape[0], gl.SliceLayout(1, L)), 1)
    c = gl.expand_dims(FIRST + gl.arange(0, x.shape[1], gl.SliceLayout(0, L)), 0)
    i, c = gl.broadcast(i, c)
    gl.store(parts + (offset(row, WIDTH) + (i * WIDTH + c)), x)


@gluon.jit
def held(block, COLUMNS: gl.constexpr, RESULT: gl.constexpr):
    """A block's COLUMNS in registers, in pieces, as a left operand of products with RESULT columns."""
    FIRST: gl.constexpr = piece(COLUMNS, 0, 0)
    SECOND: gl.constexpr = piece(COLUMNS, 0, 1)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, accumulator(RESULT), 2)
    first = block.slice(0, FIRST, 1).load(OPERAND)
    if SECOND > 0:
        return Pieces(first, block.slice(FIRST, SECOND, 1).load(OPERAND))
    else:
        return Pieces(first, None)


@gluon.jit
def over_held(a, b, acc):
    """a bᵀ over the columns of a, in registers (``held``); acc is what the MMA is told instead of zeros."""
    FIRST: gl.constexpr = a.first.shape[1]
    acc = warpgroup_mma(a.first, b.slice(0, FIRST, 1).permute((1, 0)), acc, use_acc=False, is_async=True)
    if a.second is not None:
        acc = warpgroup_mma(a.second, b.slice(FIRST, a.second.shape[1], 1).permute((1, 0)), acc, is_async=True)
    return acc
