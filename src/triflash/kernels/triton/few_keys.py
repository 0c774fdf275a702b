"""How the kernels for few queries read keys and values: from tensors, contiguous caches and pages, in 16, 32 and 8 bits.

e4m3 caches are read as int16, two adjacent columns in one element. An MMA of 16-bit operands wants pairs of values along the keys, which
lie a row apart: int16 tiles come from shared memory by ldmatrix, transposed for values, where single bytes would be gathered one by one.
An MMA then takes the even columns and another one the odd columns, both in float16, which holds every e4m3 number; a bfloat16 q is scaled
into float16's range by a power of two per row. Called by ``few.py``.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .prims import between, load_seen, offset, stride_in_tile
from .records import record

# Beside e4m3 values, exp2(s - m) is up to 2^7 instead of 1 (2^8 where s is rounded to multiples of 16), so that float16 weights keep 2^-31.
WEIGHT_SHIFT: tl.constexpr = tl.constexpr(7.0)
# Of four bytes, 0 and 2 (even columns of two keys, or of four columns), or 1 and 3 (odd), converted by one instruction.
_EVEN_PTX: tl.constexpr = tl.constexpr(
    "{ .reg .b32 t; .reg .b16 a, b; prmt.b32 t, $1, 0, 0x4420; mov.b32 {a, b}, t; cvt.rn.f16x2.e4m3x2 $0, a; }"
)
_ODD_PTX: tl.constexpr = tl.constexpr(
    "{ .reg .b32 t; .reg .b16 a, b; prmt.b32 t, $1, 0, 0x4431; mov.b32 {a, b}, t; cvt.rn.f16x2.e4m3x2 $0, a; }"
)


class Cache(NamedTuple):
    """What a call on a KV cache knows beyond one on tensors; a field is None where the feature is absent.

    lengths: keys in the cache before the call. starts: the first key that is shown. table: int32, pages of each request; ``pages`` of the
    whole cache. index: a request's entry of a contiguous cache. offsets_q: where a request's rows of packed queries begin. new: keys that
    the call appended to each request, or all that it appended if offsets_new says where those of a request begin. k_scale, v_scale: by
    (request, key head), what an fp8 cache's numbers are multiplied by. pages: entries of the cache.
    """

    lengths: Any = None
    lengths_stride: Any = None
    starts: Any = None
    starts_stride: Any = None
    table: Any = None
    table_strides: Any = None
    index: Any = None
    index_stride: Any = None
    offsets_q: Any = None
    offsets_q_stride: Any = None
    new: Any = None
    offsets_new: Any = None
    offsets_new_stride: Any = None
    k_scale: Any = None
    k_scale_strides: Any = None
    v_scale: Any = None
    v_scale_strides: Any = None
    pages: Any = None


@record
class Part:
    """The chunk of keys, of one request and key head, that a program attends to. first: the first key that is shown (None: 0). last: behind
    the last. split: its number, of ``splits``; a chunk is ``least`` blocks at least. Pointers lead to the request and the head; table: to
    the request's pages.
    """

    b: object
    kv_head: object
    groups: object
    heads: object
    batch_inner: object
    first: object
    last: object
    split: object
    splits: object
    least: object
    table: object
    table_step: object
    pages: object
    v_scale: object
    PAGE: tl.constexpr
    PTX: tl.constexpr


@triton.jit
def page_of(c, n0, BN: tl.constexpr, MASKED: tl.constexpr):
    """Which page holds the block of keys from n0 on, or each of its keys. Wrong entries are clamped; those of hidden keys are not read."""
    if c.table is None:
        return 0
    elif c.PAGE % BN == 0:
        return tl.minimum(tl.maximum(tl.load(c.table + offset(n0 // c.PAGE, c.table_step)), 0), c.pages - 1)
    else:
        n = n0 + tl.arange(0, BN)
        if BN % c.PAGE == 0:  # blocks begin with a page: what is the same in all of them stays out of the loop
            pointers = c.table + (offset(n0 // c.PAGE, c.table_step) + tl.arange(0, BN) // c.PAGE * c.table_step)
        else:
            pointers = c.table + offset(n // c.PAGE, c.table_step)
        if MASKED:
            seen = n < c.last
            if c.first is not None:
                seen = seen & (n >= c.first)
            page = tl.load(pointers, mask=seen, other=0)
        else:
            page = tl.load(pointers)
        return tl.minimum(tl.maximum(page, 0), c.pages - 1)


@triton.jit
def load_keys(base, strides, c, page, n0, BN: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr):
    """Rows of the keys from n0 on as ``[BN, BD]``, zero where they are hidden: what is there may be anything."""
    r = tl.arange(0, BN)[:, None]
    d = tl.arange(0, BD)[None, :]
    if c.table is None:
        pointers = base + offset(n0, strides[1]) + (r * stride_in_tile(strides[1], WIDE) + d)
    elif c.PAGE % BN == 0:
        pointers = base + (offset(page, strides[0]) + offset(n0 % c.PAGE, strides[1])) + (r * stride_in_tile(strides[1], WIDE) + d)
    else:
        slot = tl.arange(0, BN) % c.PAGE if BN % c.PAGE == 0 else (n0 + tl.arange(0, BN)) % c.PAGE
        pointers = base + (offset(page, strides[0]) + offset(slot, strides[1]))[:, None] + d
    seen = None
    if MASKED:
        seen = between(n0 + r, c.last, c.first)
    return load_seen(pointers, seen, d, DIM, BD)


@triton.jit
def e4m3_columns(x, ODD: tl.constexpr, PTX: tl.constexpr):
    """The even (ODD: the odd) columns of an e4m3 tile that was read as int16, in float16."""
    if not PTX:
        return ((x >> (8 if ODD else 0)) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    elif ODD:
        return tl.inline_asm_elementwise(_ODD_PTX, "=r,r", [x], tl.float16, True, 2)
    else:
        return tl.inline_asm_elementwise(_EVEN_PTX, "=r,r", [x], tl.float16, True, 2)


@triton.jit
def even_and_odd(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The even and the odd columns of a tile."""
    return tl.split(tl.reshape(x, [ROWS, COLS // 2, 2]))


@triton.jit
def scaled_to_fp16(x):
    """A bfloat16 tile in float16, each row scaled by a power of two so that its absmax is in ``[2^14, 2^15)``, and the inverse scales
    ``[BM, 1]``. What float16 drops is below 2^-39 of the absmax, less than the rounding of the float32 accumulators. Inf and NaN stay.
    Scales end at 2^126: rows below 2^-112 lose more, and their scores are 0 anyway.
    """
    absmax = tl.max(tl.abs(x.to(tl.float32)), 1).to(tl.int32, bitcast=True)
    exponent = tl.maximum(absmax >> 23, 15)[:, None]  # biased by 127; 255 for inf
    scale = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    inverse = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return (x.to(tl.float32) * scale).to(tl.float16), inverse
