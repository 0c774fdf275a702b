"""What runs before and after the backward kernels for Hopper: small, bound by memory, in plain Triton."""

import triton
import triton.language as tl

from ..triton.prims import LOG2E, load_rows, offset, store_rows

# A bias may be so huge that float32 has no digits left beside it. Then a score is rounded in the backward kernels as it was in the forward
# kernel, and lse comes with what it lost, its rest: p is right all the same, but takes more instructions and registers. Where every lse of
# a problem is mild, that is at most MILDEST, its scores may be summed up in any order, and the rest left out: p is then right to 2^-13.
MILDEST = tl.constexpr(700.0)
FLAGS = tl.constexpr(512)  # one for each share of lse, 1 where it is mild
SCANNED = tl.constexpr(1024)  # statistics at a time


@triton.jit
def _find_mild(mild, lse, strides, heads, pairs, M):
    """Set the flags: the first programs scan a share of lse each, and those of programs that there are not are 1."""
    scanning = tl.minimum(tl.num_programs(0), FLAGS)
    if tl.program_id(0) < scanning:
        chunks = tl.cdiv(M, SCANNED)
        largest = tl.zeros([SCANNED], tl.float32)
        for chunk in range(tl.program_id(0), pairs * chunks, scanning):
            pair = chunk // chunks
            rows = chunk % chunks * SCANNED + tl.arange(0, SCANNED)
            its = lse + offset(pair // heads, strides[0]) + offset(pair % heads, strides[1])
            some = tl.load(its + rows * strides[2], mask=rows < M, other=0.0)
            largest = tl.maximum(largest, tl.where(some == float("-inf"), 0.0, tl.abs(some)))
        tl.store(mild + tl.program_id(0), (tl.max(largest, 0) < MILDEST).to(tl.int32))
        if tl.program_id(0) == 0:
            idle = tl.arange(0, FLAGS)
            tl.store(mild + idle, tl.zeros([FLAGS], tl.int32) + 1, mask=idle >= scanning)


@triton.jit
def prepare(
    out, dout, dlse, lse, rest, stats, mild, dq_sum, out_strides, dout_strides, dlse_strides, lse_strides, heads, M, padded_M, keep,
    BM: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, ROW: tl.constexpr, BROW: tl.constexpr, KINDS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program owns BM queries of one head: their rows of ``stats``, and zeros for their float32 sum of dq.

    stats is contiguous (batch and head, KINDS, padded_M): lse in base 2, +inf where a query saw no key or does not exist, so that its p is
    0; ``delta = rowsum(out * dout) - dlse``, times ``keep``, the share of probabilities that dropout keeps; and
    rest, if there is one. mild: FLAGS flags, or None. dq_sum, in blocks of BM rows of ROW columns, is laid out as ``keys_dq.py`` says, or
    None.
    """
    tiles = padded_M // BM
    pair_count = tl.num_programs(0) // tiles
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
    own = lse + offset(b, lse_strides[0]) + offset(head, lse_strides[1])
    row_lse = tl.load(own + rows * lse_strides[2], mask=rows < M, other=float("-inf"))
    table = stats + offset(pair, KINDS * padded_M) + rows
    tl.store(table, tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E))
    tl.store(table + padded_M, delta * keep)
    if rest is not None:
        tl.store(table + 2 * padded_M, tl.load(rest + offset(pair, M) + rows, mask=rows < M, other=0.0))
    if mild is not None:
        _find_mild(mild, lse, lse_strides, heads, pair_count, M)
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


@triton.jit
def dkdv_sum(
    dk_parts, dv_parts, dk, dv, dk_strides, dv_strides, kv_heads, N, padded_N, splits,
    BM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program owns BM keys of one key head: dk and dv, if not None, from their ``splits`` partial sums, added in order in float32.
    ``backward.py`` says how those lie.
    """
    tiles = tl.cdiv(N, BM)
    n0 = tl.program_id(0) % tiles * BM
    pair = tl.program_id(0) // tiles
    if dk is not None:
        dk += offset(pair // kv_heads, dk_strides[0]) + offset(pair % kv_heads, dk_strides[2])
        _add_parts(dk_parts, dk, dk_strides[1], pair * splits, n0, N, padded_N, splits, BM, D, BD, WIDE)
    if dv is not None:
        dv += offset(pair // kv_heads, dv_strides[0]) + offset(pair % kv_heads, dv_strides[2])
        _add_parts(dv_parts, dv, dv_strides[1], pair * splits, n0, N, padded_N, splits, BM, DV, BDV, WIDE)


@triton.jit
def _add_parts(
    parts, total, stride, first, n0, N, padded_N, splits, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros([BM, BD], tl.float32)
    for part in range(splits):
        acc += load_rows(parts, BD, (first + part) * padded_N + n0, 0, BM, BD, BD, False, False)
    store_rows(total, stride, n0, N, acc, BM, D, BD, True, WIDE)
