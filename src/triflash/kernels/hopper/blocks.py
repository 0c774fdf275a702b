"""Blocks of a head's rows in shared memory: in one buffer of a power of 2 of columns, or in two of the multiplied columns alone, each with
a TMA descriptor of its own. Called by ``forward.py``, ``forward_loads.py`` and ``dq.py``.

Buffers, their blocks and the descriptors are ``Pieces``. In two buffers, columns that only pad a head are neither kept nor written by TMA,
so that there is room for larger tiles.
"""

from .compat import gl, gluon, tma_load, tma_store, warpgroup_mma
from .extent import rows
from .features import clear_masked
from .layouts import accumulator, stacked
from .products import Pieces, held, into_both, into_columns, over_columns, over_held, store_columns


@gluon.jit
def buffers_of(COUNT: gl.constexpr, descs):
    """Buffers for so many blocks, of which ``descs`` are the TMA descriptors."""
    first = gl.allocate_shared_memory(descs.first.dtype, stacked(COUNT, descs.first.block_shape), descs.first.layout)
    if descs.second is not None:
        shape: gl.constexpr = stacked(COUNT, descs.second.block_shape)
        return Pieces(first, gl.allocate_shared_memory(descs.second.dtype, shape, descs.second.layout))
    else:
        return Pieces(first, None)


@gluon.jit
def buffer_of(descs):
    """Buffers for one block."""
    first = gl.allocate_shared_memory(descs.first.dtype, descs.first.block_shape, descs.first.layout)
    if descs.second is not None:
        return Pieces(first, gl.allocate_shared_memory(descs.second.dtype, descs.second.block_shape, descs.second.layout))
    else:
        return Pieces(first, None)


@gluon.jit
def one_of(buffers, at):
    """Block ``at``, as TMA has it."""
    if buffers.second is not None:
        return Pieces(buffers.first.index(at), buffers.second.index(at))
    else:
        return Pieces(buffers.first.index(at), None)


@gluon.jit
def as_rows(block, ROWS: gl.constexpr):
    """A block as rows and columns."""
    FIRST: gl.constexpr = block.first.shape[-1]
    first = block.first.reshape([ROWS, FIRST])
    if block.second is not None:
        SECOND: gl.constexpr = block.second.shape[-1]
        return Pieces(first, block.second.reshape([ROWS, SECOND]))
    else:
        return Pieces(first, None)


@gluon.jit
def block_at(buffers, at, ROWS: gl.constexpr):
    """Block ``at``, as rows and columns."""
    return as_rows(one_of(buffers, at), ROWS)


@gluon.jit
def over_blocks(a, b, acc, COLUMNS: gl.constexpr):
    """``over_columns`` of blocks, up to COLUMNS; acc is what the MMA is told instead of zeros."""
    if b.second is not None:
        acc = warpgroup_mma(a.first, b.first.permute((1, 0)), acc, use_acc=False, is_async=True)
        return warpgroup_mma(a.second, b.second.permute((1, 0)), acc, is_async=True)
    else:
        return over_columns(a.first, b.first, acc, 0, COLUMNS, False)


@gluon.jit
def into_blocks(a, b, acc):
    """``into_columns`` of a block."""
    if b.second is not None:
        return into_both(a, b.first, b.second, acc)
    else:
        return into_columns(a, b.first, acc)


@gluon.jit
def held_block(block, COLUMNS: gl.constexpr, RESULT: gl.constexpr):
    """``held`` of a block."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, accumulator(RESULT), 2)
    if block.second is not None:
        return Pieces(block.first.load(OPERAND), block.second.load(OPERAND))
    else:
        return held(block.first, COLUMNS, RESULT)


@gluon.jit
def over_held_block(a, b, acc):
    """``over_held`` of a block b."""
    if b.second is not None:
        acc = warpgroup_mma(a.first, b.first.permute((1, 0)), acc, use_acc=False, is_async=True)
        return warpgroup_mma(a.second, b.second.permute((1, 0)), acc, is_async=True)
    else:
        return over_held(a, b.first, acc)


@gluon.jit
def store_block(target, acc):
    """``store_columns`` to a block."""
    if target.second is not None:
        target.first.store(acc.first.to(target.first.dtype))
        target.second.store(acc.second.to(target.second.dtype))
    else:
        store_columns(target.first, acc)


@gluon.jit
def load_block(p, descs, place, head, full, block):
    """Fetch a block of a head's rows, from a ``place`` on (``extent.place_of``), and tell the barrier ``full``."""
    tma_load(descs.first, rows(p, place, head), full, block.first)
    if descs.second is not None:
        tma_load(descs.second, rows(p, place, head, block.first.shape[-1]), full, block.second)


@gluon.jit
def leave_block(p, descs, place, head, block):
    """Send a block of rows that has been stored and fenced to where it belongs. It may lie in the first of two buffers."""
    tma_store(descs.first, rows(p, place, head), block.first)
    if descs.second is not None:
        tma_store(descs.second, rows(p, place, head, block.first.shape[-1]), block.second)


@gluon.jit
def clear_masked_block(block, visible):
    """``clear_masked`` of a block."""
    clear_masked(block.first, visible)
    if block.second is not None:
        clear_masked(block.second, visible)
