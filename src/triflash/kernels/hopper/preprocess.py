"""What runs before the backward kernels for Hopper: memory-bound, in plain Triton. Launched by ``launch/hopper_backward.py``."""

import triton
import triton.language as tl

from ..triton.prims import LOG2E, load_rows, offset, split_rest, store_rows

# Beside a huge bias a float32 score has no digits left. Then the backward kernels round a score as the forward kernel did, and subtract
# rest, what lse lost: p is right, at the price of instructions and registers. Where every lse of a problem is small, at most
# SMALL_LSE_LIMIT, scores may be summed in any order and without rest: p is right to 2^-13.
SMALL_LSE_LIMIT = tl.constexpr(700.0)
FLAGS = tl.constexpr(512)  # one for each share of lse, 1 where it is small
SCANNED = tl.constexpr(1024)  # statistics at a time
SCANNED_FIRST = tl.constexpr(512)  # and where nothing is cleared beside them: see ``preprocess``


@triton.jit
def _flag_small_lse(small_lse, lse, strides, heads, pairs, M, BLOCK: tl.constexpr):
    """Set the flags: the first programs scan a share of lse each, and those of programs that there are not are 1."""
    scanning = tl.minimum(tl.num_programs(0), FLAGS)
    if tl.program_id(0) < scanning:
        chunks = tl.cdiv(M, BLOCK)
        largest = tl.zeros([BLOCK], tl.float32)
        for chunk in range(tl.program_id(0), pairs * chunks, scanning):
            pair = chunk // chunks
            rows = chunk % chunks * BLOCK + tl.arange(0, BLOCK)
            its = lse + offset(pair // heads, strides[0]) + offset(pair % heads, strides[1])
            some = tl.load(its + rows * strides[2], mask=rows < M, other=0.0)
            largest = tl.maximum(largest, tl.where(some == float("-inf"), 0.0, tl.abs(some)))
        tl.store(small_lse + tl.program_id(0), (tl.max(largest, 0) < SMALL_LSE_LIMIT).to(tl.int32))
        if tl.program_id(0) == 0:
            idle = tl.arange(0, FLAGS)
            tl.store(small_lse + idle, tl.zeros([FLAGS], tl.int32) + 1, mask=idle >= scanning)


@triton.jit
def of_part(entries, heads, BM: tl.constexpr, PARTS: tl.constexpr):
    """What of packed sequences this program has, of as many as there are entries in their table of tiles, heads, and PARTS of BM queries in
    a tile: ``(head, first query in its sequence, queries, first_query, first_padded)``, the last three as of ``extent.Extent``. A program
    for which there is no tile has a sequence without queries.
    """
    part = tl.program_id(0) % PARTS
    bound = tl.num_programs(0) // (heads * PARTS)
    own = entries + tl.program_id(0) // PARTS % bound * 8
    return tl.program_id(0) // (PARTS * bound), tl.load(own) + part * BM, tl.load(own + 3), tl.load(own + 2), tl.load(own + 7)


@triton.jit
def preprocess(
    out, dout, dlse, lse, rest, stats, small_lse, dq_sum, entries, out_strides, dout_strides, dlse_strides, lse_strides, heads, M, padded_M,
    keep, BM: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, ROW: tl.constexpr, BROW: tl.constexpr, KINDS: tl.constexpr,
    WIDE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program owns BM queries of one head: their rows of ``stats``, and zeros for their float32 sum of dq.

    stats is contiguous (batch and head, KINDS, padded_M): lse in base 2, +inf where a query saw no key or does not exist, so that its p is
    0; ``delta = rowsum(out * dout) - dlse``, times ``keep``, the share of probabilities that dropout keeps; and rest, if there is one.
    small_lse: FLAGS flags, or None. dq_sum, in blocks of BM rows of ROW columns, lies as ``dkdv_step.py`` says, or None. entries: the table
    of tiles of packed sequences, or None; their rows lie from ``first_padded`` on in stats and dq_sum, which have padded_M for each head,
    and what of a sequence's last tile is behind its end does not exist.
    """
    first_padded = 0
    there = None
    if entries is not None:
        head, m0, queries, first, first_padded = of_part(entries, heads, BM, PARTS)
        b = 0
        pair = head
        pair_count = heads
        there = (m0 + tl.zeros([BM], tl.int32)) * 0 < queries  # whether there is such a tile
        out += offset(first, out_strides[1])
        dout += offset(first, dout_strides[1])
        lse_first = lse + offset(first, lse_strides[2])
        if dlse is not None:
            dlse += offset(first, dlse_strides[2])
        if rest is not None:
            rest += first
    else:
        tiles = padded_M // BM
        pair_count = tl.num_programs(0) // tiles
        m0 = tl.program_id(0) % tiles * BM
        pair = tl.program_id(0) // tiles
        head = pair % heads
        b = pair // heads
        queries = M
        lse_first = lse
    if small_lse is not None and dq_sum is None:
        # Its loads need not wait behind those of out and dout then: 1.02 of the time without flags, not 1.12 (H200). Where programs clear
        # dq_sum, they wait for memory all the time, and this costs as much as it gains.
        _flag_small_lse(small_lse, lse, lse_strides, heads, pair_count, M, SCANNED_FIRST)
    rows = m0 + tl.arange(0, BM)
    out += offset(b, out_strides[0]) + offset(head, out_strides[2])
    dout += offset(b, dout_strides[0]) + offset(head, dout_strides[2])
    o_tile = load_rows(out, out_strides[1], m0, queries, BM, DV, BDV, True, WIDE).to(tl.float32)
    do_tile = load_rows(dout, dout_strides[1], m0, queries, BM, DV, BDV, True, WIDE).to(tl.float32)
    delta = tl.sum(o_tile * do_tile, 1)
    if dlse is not None:
        dlse += offset(b, dlse_strides[0]) + offset(head, dlse_strides[1])
        delta -= tl.load(dlse + rows * dlse_strides[2], mask=rows < queries, other=0.0)
    own = lse_first + offset(b, lse_strides[0]) + offset(head, lse_strides[1])
    row_lse = tl.load(own + rows * lse_strides[2], mask=rows < queries, other=float("-inf"))
    table = stats + offset(pair, KINDS * padded_M) + (first_padded + rows)
    lse_log2 = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E)
    if rest is not None:
        lse_log2, log2_sum = split_rest(lse_log2, tl.load(rest + offset(pair, M) + rows, mask=rows < queries, other=0.0))
        tl.store(table + 2 * padded_M, log2_sum, mask=there)
    tl.store(table, lse_log2, mask=there)
    tl.store(table + padded_M, delta * keep, mask=there)
    if small_lse is not None and dq_sum is not None:
        _flag_small_lse(small_lse, lse, lse_strides, heads, pair_count, M, SCANNED)
    if dq_sum is not None:
        if m0 < queries:
            if entries is not None:
                number = pair * (padded_M // BM) + (first_padded + m0) // BM
            else:
                number = pair * tl.cdiv(M, BM) + m0 // BM
            block = dq_sum + offset(number, BM * ROW)
            nothing = tl.zeros([BROW // 8, 8 * BM], tl.float32)
            store_rows(block, 8 * BM, 0, ROW // 8, nothing, BROW // 8, 8 * BM, 8 * BM, True, False)
