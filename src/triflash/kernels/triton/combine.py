"""Results over parts of the keys, put together: the last step of kernels that split keys, of ring steps, and of ``merge_states``.

A part is (out, lse, rest): its own softmax's output, and the log of its sum as a float32 and what that lost (``prims.lse_rest``).
``triflash/combine.py`` is the same in PyTorch. Launched by ``launch/few.py``.
"""

import triton
import triton.language as tl

from .prims import LN2, LOG2E, clamped, gdc_wait, join_rest, offset, split_rest


@triton.jit
def _load_base_two(lse, rest, begin, step, parts, PARTS: tl.constexpr, USED_REST: tl.constexpr):
    """lse in base 2 of PARTS parts, and what it lacks; -inf and 0 of those behind the last, and of parts that saw no key."""
    t = begin + tl.arange(0, PARTS)
    at = offset(t, step)
    high = tl.load(lse + at, mask=t < parts, other=float("-inf")) * LOG2E
    low = tl.zeros([PARTS], tl.float32)
    if USED_REST:
        low = tl.where(high == float("-inf"), 0.0, tl.load(rest + at, mask=t < parts, other=0.0))
        high, low = split_rest(high, low)
    return t, high, low


@triton.jit
def combine(
    outs, lses, rests, out, lse, rest, offsets, offsets_stride, out_strides, lse_strides, rest_strides, heads, rows, parts, requests,
    DV: tl.constexpr, BDV: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program owns one query of one head and adds its parts in their order, in float32:

        lse = log sum_t exp(lse_t);  out = sum_t exp(lse_t - lse) out_t

    outs (parts, batch, row, head, DV) and lses, rests (parts, batch, head, row) are contiguous float32; ``rows`` of each. Strides are
    (batch, row, head) of out, (batch, head) of lse and rest. What a part that saw no key has for out is not read. rests, rest None: not
    kept. offsets: of so many packed ``requests``; rows that they do not own get 0 and -inf. None: all rows are somebody's.
    PARTS: looked at at a time. PDL: what gives the parts may still run.
    """
    if PDL:
        gdc_wait()
    pid = tl.program_id(0)
    head = pid % heads
    row = pid // heads % rows
    b = pid // heads // rows
    batch = tl.num_programs(0) // heads // rows
    step = tl.cast(batch, tl.int64) * heads * rows
    lses += offset(b * heads + head, rows) + row
    USED_REST: tl.constexpr = rests is not None
    if USED_REST:
        rests += offset(b * heads + head, rows) + row
    outs += (offset(b, rows) + row) * heads * DV + head * DV
    last = parts
    if offsets is not None:
        first_row = clamped(tl.load(offsets), rows)
        last_row = clamped(tl.load(offsets + offset(requests, offsets_stride)), rows)
        last = tl.where((row >= first_row) & (row < last_row), parts, 0)
    # The largest lse, of two parts: beside a huge one what a float32 lost of it tells two parts apart.
    top = tl.full([PARTS], float("-inf"), tl.float32)
    for begin in range(0, last, PARTS):
        _, high, _low = _load_base_two(lses, rests, begin, step, last, PARTS, USED_REST)
        top = tl.maximum(top, high)
    top = tl.max(top, 0)
    unseen = top == float("-inf")
    top = tl.where(unseen, 0.0, top)
    above = tl.full([PARTS], float("-inf"), tl.float32)
    for begin in range(0, last, PARTS):
        _, high, low = _load_base_two(lses, rests, begin, step, last, PARTS, USED_REST)
        above = tl.maximum(above, (high - top) + low)
    above = tl.max(above, 0)
    above = tl.where(unseen, 0.0, above)

    d = tl.arange(0, BDV)
    acc = tl.zeros([BDV], tl.float32)
    totals = tl.zeros([PARTS], tl.float32)
    for begin in range(0, last, PARTS):
        t, high, low = _load_base_two(lses, rests, begin, step, last, PARTS, USED_REST)
        weights = tl.exp2(((high - top) + low) - above)
        totals += weights
        own = tl.load(
            outs + offset(t, step)[:, None] * DV + d[None, :], mask=(high > float("-inf"))[:, None] & (d < DV)[None, :], other=0.0
        )
        acc += tl.sum(weights[:, None] * own, 0)
    total = tl.where(unseen, 1.0, tl.sum(totals, 0))
    acc = acc / total
    row_lse = tl.where(unseen, float("-inf"), (top + (above + tl.log2(total))) * LN2)
    out += offset(b, out_strides[0]) + offset(row, out_strides[1]) + offset(head, out_strides[2])
    tl.store(out + d, acc.to(out.dtype.element_ty), mask=d < DV)
    tl.store(lse + offset(b, lse_strides[0]) + offset(head, lse_strides[1]) + row, row_lse)
    if rest is not None:
        again = tl.where(unseen, 0.0, row_lse * LOG2E)  # as prims.lse_rest
        lost = tl.where(unseen, 0.0, join_rest(top - again, above + tl.log2(total)))
        tl.store(rest + offset(b, rest_strides[0]) + offset(head, rest_strides[1]) + row, lost)


@triton.jit
def sum_rows(parts, total, strides, heads, rows, count, D: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr):
    """One program owns one row of one head and adds its ``count`` parts, PARTS at a time. parts: (count, batch, row, head, D), contiguous
    float32. strides: (batch, row, head) of the sum.
    """
    pid = tl.program_id(0)
    head = pid % heads
    row = pid // heads % rows
    b = pid // heads // rows
    step = tl.cast(tl.num_programs(0), tl.int64) * D
    d = tl.arange(0, BD)
    parts += offset(pid, D)
    acc = tl.zeros([BD], tl.float32)
    for begin in range(0, count, PARTS):
        t = begin + tl.arange(0, PARTS)
        acc += tl.sum(tl.load(parts + offset(t, step)[:, None] + d[None, :], mask=(t < count)[:, None] & (d < D)[None, :], other=0.0), 0)
    total += offset(b, strides[0]) + offset(row, strides[1]) + offset(head, strides[2])
    tl.store(total + d, acc.to(total.dtype.element_ty), mask=d < D)
