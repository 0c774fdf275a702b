"""Products of heads that are padded to a power of 2, without the columns that only pad. Called by every Hopper kernel that has scores."""

from .compat import gl, gluon, warpgroup_mma


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
