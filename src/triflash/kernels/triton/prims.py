"""What all portable kernels share: which tiles a tile sees, which program does what, and how a tile is loaded and scored.

Conventions: ``i`` is a query, ``j`` a key. A tile's first row and column are scalars, positions inside it are small tensors, so that
offsets stay 32-bit inside a tile while every tile's base address is 64-bit. ``None`` stands for an absent feature and compiles its
branch away. Scores are in base 2: ``s_log2 = log2(e) * (scale * q kᵀ + bias)``. Called by the other files here.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Up to here scores in base 2 may be summed up and scaled in any order: their rounding makes 2^-13 of a probability.
SMALL_MAXIMUM: tl.constexpr = tl.constexpr(1024.0)
SMALL_LSE_LIMIT: tl.constexpr = tl.constexpr(700.0)  # the same for lse
SCANNED: tl.constexpr = tl.constexpr(4096)  # of lse at a time
MINUS_128: tl.constexpr = tl.constexpr(2**32 - (261 << 23))  # plus the bits of a power of two, as an int32: minus those of 128 over it


@triton.jit
def segments(first, last, length, lo, hi, BLOCK: tl.constexpr, start=None):
    """Blocks of the other axis (``length`` long) that rows ``first … last`` see, where row r sees column c if ``lo <= c - r <= hi``, and
    none before ``start``.

    Returns block indices ``begin <= a <= b <= end``: blocks of ``[begin, a)`` and ``[b, end)`` are partly visible and need the mask,
    those of ``[a, b)`` are whole and visible to every row. Without ``lo`` and ``start``, ``begin == a``. In blocks, not elements, because a
    product with BLOCK tells the compiler how offsets are aligned. Plain integer arithmetic that never divides a negative number, so that it
    also runs (and is tested) as Python.
    """
    begin = 0
    full_begin = 0
    if lo is not None:
        begin = max(first + lo, 0) // BLOCK
        full_begin = (max(last + lo, 0) + BLOCK - 1) // BLOCK
    if start is not None:
        begin = max(begin, start // BLOCK)
        full_begin = max(full_begin, (start + BLOCK - 1) // BLOCK)
    end = length
    full_end = length // BLOCK
    if hi is not None:
        end = max(min(last + hi + 1, length), 0)
        full_end = max(min(first + hi + 1, length), 0) // BLOCK
    end = (end + BLOCK - 1) // BLOCK
    begin = min(begin, end)
    a = min(max(full_begin, begin), end)
    return begin, a, max(full_end, a), end


@triton.jit
def locate(tiles, heads, batch, ORDER: tl.constexpr, REVERSED: tl.constexpr):
    """(tile, head, batch) of this program.

    ORDER names what varies fastest: "tile" keeps the keys of one head in cache, "batch" and "head" let tiles that share a broadcast
    bias block run back to back, "heavy" makes the tile slowest, so that the longest rows of a triangle start first. A number is "heavy" in
    sections of so many programs, or one head's, one after the other: the longest rows of a few heads, which a cache holds, then their
    others. REVERSED counts tiles from the last.
    """
    pid = tl.program_id(0)
    if ORDER == "tile":
        tile = pid % tiles
        head = pid // tiles % heads
        b = pid // tiles // heads
    elif ORDER == "batch":
        b = pid % batch
        tile = pid // batch % tiles
        head = pid // batch // tiles
    elif ORDER == "head":
        head = pid % heads
        tile = pid // heads % tiles
        b = pid // heads // tiles
    elif ORDER == "heavy":
        head = pid % heads
        b = pid // heads % batch
        tile = pid // heads // batch
    else:
        most = max(ORDER // tiles, 1)
        first = pid // (most * tiles) * most
        pairs = min(most, heads * batch - first)  # the last section may have fewer
        within = pid - first * tiles
        tile = within // pairs
        pair = first + within % pairs
        head = pair % heads
        b = pair // heads
    if REVERSED:
        tile = tiles - 1 - tile
    return tile, head, b


@triton.jit
def gdc_launch_dependents():
    """The next kernel, if it is a programmatic dependent launch (PDL), may start once all programs of this one are here. sm90 and later."""
    tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], tl.int32, False, 1)


@triton.jit
def gdc_wait():
    """Wait for the end of the kernel before, and for its stores: of a programmatic dependent launch (PDL), else no wait. sm90 and later."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], tl.int32, False, 1)


@triton.jit
def offset(index, stride):
    """``index * stride`` in 64 bits, for the address of a tile."""
    return tl.cast(index, tl.int64) * stride


@triton.jit
def clamped(x, N):
    """x, an integer of any dtype, from 0 to N, as an int32."""
    if x.dtype.is_int_unsigned():
        return tl.minimum(x.to(tl.uint64), tl.cast(N, tl.uint64)).to(tl.int32)
    elif x.dtype.primitive_bitwidth == 64:
        return tl.minimum(tl.maximum(x, 0), tl.cast(N, tl.int64)).to(tl.int32)
    else:
        return tl.minimum(tl.maximum(x.to(tl.int32), 0), N)


@triton.jit
def near(x, LIMIT: tl.constexpr):
    """x, an integer of any dtype, from -LIMIT to LIMIT, as an int32."""
    if x.dtype.is_int_unsigned():
        return tl.minimum(x.to(tl.uint64), tl.cast(LIMIT, tl.uint64)).to(tl.int32)
    elif x.dtype.primitive_bitwidth == 64:
        return tl.minimum(tl.maximum(x, -LIMIT), LIMIT).to(tl.int32)
    else:
        return tl.minimum(tl.maximum(x.to(tl.int32), -LIMIT), LIMIT)


@triton.jit
def between(x, length, least):
    """Whether x is of ``least … length - 1``; None: there is no least."""
    if least is None:
        return x < length
    else:
        return (x >= least) & (x < length)


@triton.jit
def stride_in_tile(stride, WIDE: tl.constexpr):
    """The stride as used inside a tile: 32-bit unless a tile spans more than 2^31 elements."""
    if WIDE:
        return tl.cast(stride, tl.int64)
    else:
        return stride


@triton.jit
def load_seen(pointers, seen, d, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """A tile, zero in rows that are not ``seen`` (None: all are) and in columns d from ``DIM`` on."""
    if seen is not None:
        if DIM == BLOCK_DIM:
            return tl.load(pointers, mask=seen, other=0.0)
        else:
            return tl.load(pointers, mask=seen & (d < DIM), other=0.0)
    else:
        if DIM == BLOCK_DIM:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=d < DIM, other=0.0)


@triton.jit
def load_rows(
    base,
    row_stride,
    start,
    length,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    least=None,
):
    """Rows ``start … start + BLOCK`` of a ``(length, DIM)`` matrix as ``[BLOCK, BLOCK_DIM]``, zero outside it and (MASKED) before its row
    ``least``.
    """
    r = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_DIM)[None, :]
    pointers = base + offset(start, row_stride) + (r * stride_in_tile(row_stride, WIDE) + d)
    seen = None
    if MASKED:
        seen = between(start + r, length, least)
    return load_seen(pointers, seen, d, DIM, BLOCK_DIM)


@triton.jit
def store_rows(
    base,
    row_stride,
    start,
    length,
    x,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write ``x [BLOCK, BLOCK_DIM]`` to rows ``start …`` of a ``(length, DIM)`` matrix, in the matrix's dtype; nothing outside it."""
    r = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_DIM)[None, :]
    pointers = base + offset(start, row_stride) + (r * stride_in_tile(row_stride, WIDE) + d)
    x = x.to(base.dtype.element_ty)
    if MASKED:
        if DIM == BLOCK_DIM:
            tl.store(pointers, x, mask=start + r < length)
        else:
            tl.store(pointers, x, mask=(start + r < length) & (d < DIM))
    else:
        if DIM == BLOCK_DIM:
            tl.store(pointers, x)
        else:
            tl.store(pointers, x, mask=d < DIM)


@triton.jit
def store_tile(base, row_stride, col_stride, m0, n0, i, j, M, N, x, MASK_M: tl.constexpr, MASK_N: tl.constexpr):
    """Write ``x [BM, BN]`` to the tile at ``(m0, n0)`` of an ``(M, N)`` matrix of any strides, in its dtype. ``i [BM, 1], j [1, BN]``."""
    pointers = base + offset(m0, row_stride) + offset(n0, col_stride)
    pointers += i * tl.cast(row_stride, tl.int64) + j * tl.cast(col_stride, tl.int64)
    x = x.to(base.dtype.element_ty)
    if MASK_M and MASK_N:
        tl.store(pointers, x, mask=(m0 + i < M) & (n0 + j < N))
    elif MASK_M:
        tl.store(pointers, x, mask=m0 + i < M)
    elif MASK_N:
        tl.store(pointers, x, mask=n0 + j < N)
    else:
        tl.store(pointers, x)


@triton.jit
def add_bias(s_log2, bias):
    """Add a bias to scores in base 2."""
    # An explicit fma, so that forward and backward passes round a huge score alike: see `probabilities`.
    return tl.fma(bias.to(tl.float32), LOG2E, s_log2)


@triton.jit
def in_band(i, j, N, lo, hi, least=None):
    """Whether key j is one of ``least … N - 1`` and query i sees it."""
    seen = between(j, N, least)
    if lo is not None:
        seen = seen & (j - i >= lo)
    if hi is not None:
        seen = seen & (j - i <= hi)
    return seen


@triton.jit
def load_lse_log2(base, start, length, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """lse of ``BLOCK`` queries in base 2. A query that saw no key, or does not exist, gets +inf: ``2^(s - lse)`` is 0, never NaN."""
    r = tl.arange(0, BLOCK)
    if MASKED:
        lse = tl.load(base + start + r, mask=start + r < length, other=float("-inf"))
    else:
        lse = tl.load(base + start + r)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def lse_rest(m, l, lse):
    """What is lost of ``m + log2 l`` when it is stored as ``lse`` and read again by ``load_lse_log2``; 0 for a row that saw no key.

    Nothing to speak of, unless the maximum m is so huge (a finite bias of -1e9 on all keys) that a float32 has no room for log2 l.
    """
    again = tl.where(lse == float("-inf"), 0.0, lse * LOG2E)  # the select keeps the product from melting into the difference below
    return tl.where(lse == float("-inf"), 0.0, join_rest(m - again, tl.log2(l)))


@triton.jit
def join_rest(off, log2_sum):
    """By how much lse misses m, and log2 l, in one float32. Where there is no room for their sum, off is the distance of two float32s, a
    power of two, and is multiplied by ``1 + log2 l / 128``.
    """
    far = (tl.abs(off) > 256.0) & (log2_sum >= 0.0) & (log2_sum < 64.0)
    return tl.where(far, off * (1.0 + log2_sum * (1 / 128)), off + log2_sum)


@triton.jit
def split_rest(lse_log2, rest):
    """(m, log2 l) of lse in base 2 and its rest; where rest is a sum, which loses nothing to speak of, these two themselves."""
    far = tl.abs(rest) >= 512.0
    small = rest * 2.0**-30  # so that nothing overflows
    beside = small * 2.0**23
    off = ((small + beside) - beside) * 2.0**30  # rounded to one bit: the nearest power of two
    inverse = tl.cast(-(tl.cast(off, tl.int32, bitcast=True) + MINUS_128), tl.float32, bitcast=True)  # 128 / off, by its exponent
    return lse_log2 + tl.where(far, off, 0.0), tl.where(far, (rest - off) * inverse, rest)


@triton.jit
def is_small(x, LIMIT: tl.constexpr):
    """Whether all of these lse, or maxima, are at most LIMIT, not counting -inf."""
    return tl.max(tl.where(tl.abs(x) == float("inf"), 0.0, tl.abs(x)), 0) <= LIMIT


@triton.jit
def all_lse_small(lse, head_stride, first_head, heads, start, end):
    """Whether the lse of queries ``start … end`` of so many heads are."""
    largest = tl.zeros([SCANNED], tl.float32)
    for head in range(first_head, first_head + heads):
        for at in range(start, end, SCANNED):
            rows = at + tl.arange(0, SCANNED)
            some = tl.abs(tl.load(lse + offset(head, head_stride) + rows, mask=rows < end, other=0.0))
            largest = tl.maximum(largest, tl.where(some == float("inf"), 0.0, some))
    return tl.max(largest, 0) <= SMALL_LSE_LIMIT


@triton.jit
def probabilities(s_log2, lse_log2, rest, HAS_REST: tl.constexpr, CLAMPED: tl.constexpr):
    """``2^(s - lse)``. ``rest`` is what lse lost (``lse_rest``). CLAMPED: p is at least kept to 1."""
    x = s_log2 - lse_log2
    if HAS_REST:
        x = x - rest
    if CLAMPED:
        x = tl.minimum(x, 0.0)
    return tl.exp2(x)


@triton.jit
def load_vector(base, start, length, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """``BLOCK`` elements of a contiguous float32 vector, zero outside it."""
    r = tl.arange(0, BLOCK)
    if MASKED:
        return tl.load(base + start + r, mask=start + r < length, other=0.0)
    else:
        return tl.load(base + start + r)


@triton.jit
def last_at_most(keys, stride, x, count, rounds):
    """The last of ``count`` keys, in ascending order ``stride`` apart, that is at most x; 0 if none is. rounds: the bits of count."""
    low = tl.zeros_like(x)
    high = low + tl.maximum(count - 1, 0)
    for _ in range(rounds):
        middle = (low + high + 1) // 2
        below = tl.load(keys + stride * middle, mask=middle < count, other=0) <= x
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle - 1)
        high = tl.maximum(high, low)
    return low
