"""What the Hopper kernels know beyond a band and one bias or mask. ``None`` stands for an absent feature and compiles its branch away."""

from ..triton.prims import LOG2E, offset
from .compat import gl, gluon


@gluon.jit
def visible_keys(lengths, b, N):
    """How many keys batch entry b shows, of N."""
    if lengths is not None:
        return min(max(gl.load(lengths + b), 0), N)
    else:
        return N


@gluon.jit
def slope_of(slopes, slope_strides, b, head):
    """The ALiBi slope of a query head, in base 2; nothing that anybody reads if there are none."""
    if slopes is not None:
        return gl.load(slopes + offset(b, slope_strides[0]) + offset(head, slope_strides[1])) * LOG2E
    else:
        return 0.0


@gluon.jit
def add_alibi(x, slope, i, j):
    """Scores in base 2 less ``slope * |i - j|``. i: queries, counted so that the last meets the last key; j: keys; as a column and a row or
    the other way round.
    """
    i, x = gl.broadcast(i.to(gl.float32), x)
    j, x = gl.broadcast(j.to(gl.float32), x)
    return x - slope * gl.abs(i - j)
