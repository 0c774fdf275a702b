"""New keys and values, written behind those in a KV cache. Launched by ``launch/append.py``."""

import triton
import triton.language as tl

from .prims import clamped, offset

LARGEST_FP8: tl.constexpr = tl.constexpr(448.0)  # of e4m3


@triton.jit
def _within(x, count):
    """Whether x, integers of any dtype, are from 0 to count - 1; and them, in 64 bits."""
    if x.dtype.is_int_unsigned():
        inside = x.to(tl.uint64) < tl.cast(count, tl.uint64)
    else:
        inside = (x.to(tl.int64) >= 0) & (x.to(tl.int64) < count)
    return inside, x.to(tl.int64)


@triton.jit
def _owner(offsets, stride, rows, requests, total, ROUNDS: tl.constexpr):
    """The request that packed rows belong to, their number in it, and whether it has them."""
    low = tl.zeros_like(rows)
    high = low + (requests - 1)
    for _ in tl.static_range(ROUNDS):  # the last request that begins at or before the row
        middle = (low + high + 1) // 2
        at_most = clamped(tl.load(offsets + offset(middle, stride)), total) <= rows
        low = tl.where(at_most, middle, low)
        high = tl.maximum(tl.where(at_most, high, middle - 1), low)
    begin = clamped(tl.load(offsets + offset(low, stride)), total)
    end = clamped(tl.load(offsets + offset(low + 1, stride)), total)
    return low, rows - begin, (rows >= begin) & (rows < end)


@triton.jit
def _copy(
    cache, strides, slot, at, new, new_offset, new_strides, head, scale, scale_offset, there, DIM: tl.constexpr
):  # fmt: skip
    """Rows of one of the two tensors."""
    BLOCK_DIM: tl.constexpr = triton.next_power_of_2(DIM)
    d = tl.arange(0, BLOCK_DIM)[None, :]
    mask = there[:, None] & (d < DIM)
    x = tl.load(new + (new_offset + offset(head, new_strides[2]))[:, None] + offset(d, new_strides[3]), mask=mask, other=0.0)
    target = offset(slot, strides[0]) + offset(at, strides[1]) + offset(head, strides[2])
    if cache.dtype.element_ty != new.dtype.element_ty:
        x = x.to(tl.float32)
        if scale is not None:
            x = tl.div_rn(x, tl.broadcast_to(tl.load(scale + scale_offset, mask=there, other=1.0)[:, None], x.shape))
        # Comparisons, not tl.clamp, so that NaN stays what it is.
        x = tl.where(x > LARGEST_FP8, LARGEST_FP8, tl.where(x < -LARGEST_FP8, -LARGEST_FP8, x))
    tl.store(cache + target[:, None] + offset(d, strides[3]), x.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def append(
    k_cache, v_cache, k_new, v_new, lengths, table, index, offsets, k_scale, v_scale,
    k_strides, v_strides, k_new_strides, v_new_strides, table_strides, vector_strides, scale_strides,
    rows, new, requests, slots, size, max_pages, heads,
    BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK new rows of one key head, k and v.

    Row i of request b goes to position ``clamp(lengths[b], 0, capacity) + i`` of it. What lies past the capacity, or behind a page or an
    entry that there is not, is dropped. Values for 8-bit caches are divided by the scale and kept within what the cache can hold.

    rows: new rows of all requests, ``new`` of each, or packed by offsets. strides: of every dim; vector_strides: of lengths, index and
    offsets; scale_strides: (request, head) of k_scale, then of v_scale.
    """
    head = tl.program_id(0) % heads
    row = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    row = tl.minimum(row, rows - 1)
    if offsets is None:
        b = row // new
        number = row % new
        k_at = offset(b, k_new_strides[0]) + offset(number, k_new_strides[1])
        v_at = offset(b, v_new_strides[0]) + offset(number, v_new_strides[1])
    else:
        b, number, owned = _owner(offsets, vector_strides[2], row, requests, rows, ROUNDS)
        there = there & owned
        k_at = offset(row, k_new_strides[1])
        v_at = offset(row, v_new_strides[1])
    capacity = size
    if table is not None:
        capacity = size * max_pages
    length = capacity
    if lengths is not None:
        length = clamped(tl.load(lengths + offset(b, vector_strides[0])), capacity)
    at = length + number
    there = there & (at < capacity)
    if table is not None:
        page = tl.minimum(at // size, max_pages - 1)
        entry = tl.load(table + offset(b, table_strides[0]) + offset(page, table_strides[1]), mask=there, other=-1)
        inside, slot = _within(entry, slots)
        there = there & inside
        at = at % size
    elif index is not None:
        inside, slot = _within(tl.load(index + offset(b, vector_strides[1])), slots)
        there = there & inside
    else:
        slot = b.to(tl.int64)
        there = there & (slot < slots)
    k_scale_at = offset(b, scale_strides[0]) + offset(head, scale_strides[1])
    v_scale_at = offset(b, scale_strides[2]) + offset(head, scale_strides[3])
    _copy(k_cache, k_strides, slot, at, k_new, k_at, k_new_strides, head, k_scale, k_scale_at, there, D)
    _copy(v_cache, v_strides, slot, at, v_new, v_at, v_new_strides, head, v_scale, v_scale_at, there, DV)
