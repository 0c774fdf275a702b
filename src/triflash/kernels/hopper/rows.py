"""What the backward kernels for Hopper share that hold scores in rows, 64 queries a consumer: their statistics, and from s to ds.

    p = 2^(s - lse);   ds = p * (dp - delta),   dp = dout vᵀ

lse (in base 2), delta and ``rest`` come in one float32 tensor (batch * head, 2 or 3, queries up to a multiple of 128). Its lse is +inf for
a query that sees no key or does not exist, so that p is 0 there, and delta 0: no mask of queries is needed.
"""

from ..triton.prims import LOG2E, offset
from .compat import gl, gluon
from .features import hide, keep_up_to, widened
from .layouts import accumulator


@gluon.jit
def statistics(stats, pair, m0, M, HAS_REST: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """``(lse, delta, rest)`` of the BM queries from ``m0`` of a pair of batch and head; without a rest, lse in its place."""
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BN))
    COUNT: gl.constexpr = 3 if HAS_REST else 2
    row = (M + 127) // 128 * 128
    at = stats + offset(pair * COUNT, row) + (m0 + gl.arange(0, BM, ROWS))
    lse = gl.load(at)
    delta = gl.load(at + row)
    rest = lse
    if HAS_REST:
        rest = gl.load(at + 2 * row)
    return lse, delta, rest


@gluon.jit
def column_of(bias, strides, m0, head, b, batch_inner, M, BM: gl.constexpr, BN: gl.constexpr):
    """A bias without a dim of keys, one number a query, of BM queries; zeros where there is none."""
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BN))
    if bias is not None:
        i = m0 + gl.arange(0, BM, ROWS)
        at = bias + offset(b // batch_inner, strides[0]) + offset(b % batch_inner, strides[1]) + offset(head, strides[2])
        return gl.load(at + i.to(gl.int64) * strides[3], mask=i < M, other=0).to(gl.float32)
    else:
        return gl.zeros([BM], gl.float32, ROWS)


@gluon.jit
def add_bias(s, bias, IS_MASK: gl.constexpr):
    """Scores in base 2 with a bias of 64 rows or one, of BN columns or one; rounded as in the forward kernel."""
    if IS_MASK:
        return hide(s, bias)
    else:
        bias, s = gl.broadcast(widened(bias), s)
        return gl.fma(bias, gl.full(s.shape, LOG2E, gl.float32, s.type.layout), s)


@gluon.jit
def hide_unseen(x, m0, n0, N, lo, hi, BM: gl.constexpr, BN: gl.constexpr, HIDDEN: gl.constexpr):
    """x of BM queries from m0 and BN keys from n0 on where the key exists and the query sees it, else HIDDEN (``keep_up_to``)."""
    S: gl.constexpr = accumulator(BN)
    j = gl.expand_dims(n0 + gl.arange(0, BN, gl.SliceLayout(0, S)), 0)
    i = m0 + gl.arange(0, BM, gl.SliceLayout(1, S))
    if hi is not None:  # one comparison a score: the last key that exists and that the query sees
        x = keep_up_to(x, j, gl.expand_dims(gl.minimum(i + hi, N - 1), 1), HIDDEN)
    else:
        x = keep_up_to(x, j, j * 0 + (N - 1), HIDDEN)
    if lo is not None:
        x = keep_up_to(x, gl.expand_dims(i + lo, 1), j, HIDDEN)
    return x


@gluon.jit
def exponents(s, lse, rest, HAS_REST: gl.constexpr, BIASED: gl.constexpr):
    """``s - lse``; ``rest`` is what lse has no room for. Where nobody kept it, and a bias may be huge, p is at least kept to 1; so it is
    without a bias, where this is for huge products alone and need not be fast.
    """
    x = s - gl.expand_dims(lse, 1)
    if HAS_REST:
        x = x - gl.expand_dims(rest, 1)
        if not BIASED:
            x = gl.minimum(x, 0.0)
    elif BIASED:
        x = gl.minimum(x, 0.0)
    return x
