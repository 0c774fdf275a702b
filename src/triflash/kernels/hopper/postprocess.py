"""What runs after the backward kernels for Hopper: memory-bound, in plain Triton. Launched by ``launch/hopper_backward.py``."""

import triton
import triton.language as tl

from ..triton.prims import load_rows, offset, store_rows
from .preprocess import of_part


@triton.jit
def postprocess(
    dq_sum, dq, entries, dq_strides, heads, M, scale, padded_M, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROW: tl.constexpr,
    RED_DQ: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program owns BM queries of one head: ``dq = scale * dq_sum``, in dq's dtype. RED_DQ: it was added up straight from registers.
    entries: the table of tiles of packed sequences, or None; dq_sum has padded_M rows for each head then.
    """
    if entries is not None:
        head, m0, M, first, first_padded = of_part(entries, heads, BM, PARTS)
        dq += offset(first, dq_strides[1]) + offset(head, dq_strides[2])
        block = dq_sum + offset(head * (padded_M // BM) + (first_padded + m0) // BM, BM * ROW)
    else:
        tiles = tl.cdiv(M, BM)
        m0 = tl.program_id(0) % tiles * BM
        pair = tl.program_id(0) // tiles
        dq += offset(pair // heads, dq_strides[0]) + offset(pair % heads, dq_strides[2])
        block = dq_sum + offset(tl.program_id(0), BM * ROW)
    if RED_DQ:
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
