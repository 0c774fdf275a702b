"""Layouts of tiles in registers and of blocks in shared memory. Called by every Hopper kernel."""

from .compat import gl, gluon


@gluon.constexpr_function
def accumulator(columns):
    """The layout of a WGMMA accumulator: 64 rows, 16 a warp."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def stacked(count, shape):
    """The shape of ``count`` blocks."""
    return [count, *shape]
