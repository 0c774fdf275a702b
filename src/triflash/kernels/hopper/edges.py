"""What runs before and after the backward kernels for Hopper: small, bound by memory, in plain Triton."""

import triton
import triton.language as tl

from ..triton.prims import LOG2E, load_rows, offset, store_rows


@triton.jit
def prepare(
    out, dout, dlse, lse, rest, stats, dq_sum, out_strides, dout_strides, dlse_strides, lse_strides, heads, M, padded_M, keep,
    BM: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, ROW: tl.constexpr, BROW: tl.constexpr, KINDS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program owns BM queries of one head: their rows of ``stats``, and zeros for their float32 sum of dq.

    stats is contiguous (batch and head, KINDS, padded_M): lse in base 2, +inf where a query saw no key or does not exist, so that its p is
    0; ``delta = rowsum(out * dout) - dlse``, times ``keep``, the share of probabilities that dropout keeps; and
    rest, if there is one. dq_sum, in blocks of BM rows of ROW columns, is laid out as ``keys_dq.py`` says, or None.
    """
    tiles = padded_M // BM
    m0 = tl.program_id(0) % tiles * BM
    pair = tl.program_id(0) // tiles
    head = pair % heads
    b = pair // heads
    rows = m0 + tl.arange(0, BM)
    out += offset(b, out_strides[0]) + offset(head, out_strides[2])
    dout += offset(b, dout_strides[0]) + offset(head, dout_strides[2])
    o_tile = load_rows(out, out_strides[1], m0, M, BM, DV, BDV, True, WIDE).to(tl.float32)
    do_tile = load_rows(dout, dout_strides[1], m0, M, BM, DV, BDV, True, WIDE).to(tl.float32)
    delta = tl.sum(o_tile * do_tile, 1)
    if dlse is not None:
        dlse += offset(b, dlse_strides[0]) + offset(head, dlse_strides[1])
        delta -= tl.load(dlse + rows * dlse_strides[2], mask=rows < M, other=0.0)
    lse += offset(b, lse_strides[0]) + offset(head, lse_strides[1])
    row_lse = tl.load(lse + rows * lse_strides[2], mask=rows < M, other=float("-inf"))
    table = stats + offset(pair, KINDS * padded_M) + rows
    tl.store(table, tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E))
    tl.store(table + padded_M, delta * keep)
    if rest is not None:
        tl.store(table + 2 * padded_M, tl.load(rest + offset(pair, M) + rows, mask=rows < M, other=0.0))
    if dq_sum is not None:
        if m0 < M:
            block = dq_sum + offset(pair * tl.cdiv(M, BM) + m0 // BM, BM * ROW)
            nothing = tl.zeros([BROW // 8, 8 * BM], tl.float32)
            store_rows(block, 8 * BM, 0, ROW // 8, nothing, BROW // 8, 8 * BM, 8 * BM, True, False)


@triton.jit
def finish(
    dq_sum, dq, dq_strides, heads, M, scale, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROW: tl.constexpr, DIRECT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program owns BM queries of one head: ``dq = scale * dq_sum``, in dq's dtype. DIRECT: it was added up straight from registers."""
    tiles = tl.cdiv(M, BM)
    m0 = tl.program_id(0) % tiles * BM
    pair = tl.program_id(0) // tiles
    dq += offset(pair // heads, dq_strides[0]) + offset(pair % heads, dq_strides[2])
    block = dq_sum + offset(tl.program_id(0), BM * ROW)
    if DIRECT:
        # A number of a group lies at (16 rows of a warp, row of 8, pair of columns, whether 8 rows further down, column of the pair).
        groups = load_rows(block, 8 * BM, 0, ROW // 8, BD // 8, 8 * BM, 8 * BM, True, False)
        total = groups.reshape([BD // 8, BM // 16, 8, 4, 2, 2]).permute((1, 4, 2, 0, 3, 5)).reshape([BM, BD])
    else:
        total = load_rows(block, ROW, 0, BM, BM, D, BD, False, False)
    store_rows(dq, dq_strides[1], m0, M, total * scale, BM, D, BD, True, WIDE)
