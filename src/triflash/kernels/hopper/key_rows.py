"""A bias over keys alone beside one of tiles, by the tensor cores: the row that is added, and the row of sums that is its gradient.

Called by ``dkdv.py``, ``dkdv_step.py`` and ``dbias.py``. Elsewhere each is an instruction a score. What is added becomes one more step of
the product of q and k: of ones, and of a key's number over the scale, as three numbers of bfloat16 that add up to it, to float32's last bit
but one. It enters the float32 sum of a score in another order, which only the loops for small lse allow.
"""

from .compat import fence_async_shared, gl, gluon, mma_v2, thread_barrier

STEP = gl.constexpr(16)  # columns of a WGMMA of 16-bit numbers
LEAST = gl.constexpr(-3.38e38)  # what bfloat16 does not round to -inf, of which no pieces could be taken
PIECES = gl.constexpr(gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0]))  # HALF columns of a row a thread
HALF = gl.constexpr(8)  # of which those behind the pieces are 0
SUMS = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))


@gluon.jit
def operand(COUNT: gl.constexpr, ROWS: gl.constexpr, VALUE: gl.constexpr):
    """COUNT buffers of ROWS rows of a step's columns, all VALUE. A fence has to follow."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, STEP], gl.bfloat16)
    buffers = gl.allocate_shared_memory(gl.bfloat16, [COUNT, ROWS, STEP], LAYOUT)
    for n in gl.static_range(COUNT):
        buffers.index(n).store(gl.full([ROWS, STEP], VALUE, gl.bfloat16, PIECES))
    return buffers


@gluon.jit
def store_row(buffer, row, unscale):
    """Store a row, a number a key in ``SliceLayout(1, PIECES)``, to a buffer of zeros of ``operand``, for products issued behind this."""
    KEYS: gl.constexpr = buffer.shape[0]
    row = gl.maximum(row.to(gl.float32) * unscale, LEAST)
    high = row.to(gl.bfloat16)
    rest = row - high.to(gl.float32)
    middle = rest.to(gl.bfloat16)
    low = (rest - middle.to(gl.float32)).to(gl.bfloat16)
    column = gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(0, PIECES)), 0)
    pieces = gl.zeros([KEYS, HALF], gl.bfloat16, PIECES)
    pieces = gl.where(column == 0, gl.expand_dims(high, 1), pieces)
    pieces = gl.where(column == 1, gl.expand_dims(middle, 1), pieces)
    pieces = gl.where(column == 2, gl.expand_dims(low, 1), pieces)
    buffer.slice(0, HALF, 1).store(pieces)
    fence_async_shared()
    thread_barrier()


@gluon.jit
def no_sums(ROWS: gl.constexpr):
    """Sums to begin with: ``add_columns``."""
    return gl.zeros([ROWS, HALF], gl.float32, SUMS)


@gluon.jit
def add_columns(sums, x):
    """Add all columns of a tile of 16-bit numbers, as they lie in an accumulator, to each of eight equal columns of sums."""
    ones = gl.full([x.shape[1], HALF], 1.0, x.dtype, gl.DotOperandLayout(1, SUMS, 2))
    return mma_v2(gl.convert_layout(x, gl.DotOperandLayout(0, SUMS, 2)), ones, sums)


@gluon.jit
def total(sums, LAYOUT: gl.constexpr):
    """What sums have come to, a number a row."""
    return gl.convert_layout(gl.sum(sums, 1) * 0.125, LAYOUT)
