"""What packed sequences need beside the kernels for all: tables of sequences and tiles, made on the device, zeros where no sequence is, and
the gradient of a bias that several sequences, heads, queries or keys share.

Launched by ``launch/packed.py``. The host knows neither lengths nor tiles, only how many there can be. No offset reaches out of bounds.
"""

import triton
import triton.language as tl

from .dbias import Round, _ds
from .extent import diagonal, of_sequence
from .features import Program, Span, at_head, bias_tile, mask_tile, shows_anything, visible_keys
from .prims import clamped, last_at_most, offset, segments, store_tile

MOST_TILES: tl.constexpr = tl.constexpr(2**30)


@triton.jit
def _lengths(offsets, used, b, inside, T):
    """Start and length of sequences b."""
    start = clamped(tl.load(offsets + b, mask=inside, other=0), T)
    end = clamped(tl.load(offsets + b + 1, mask=inside, other=0), T)
    length = tl.maximum(end - start, 0)
    if used is not None:
        length = tl.minimum(length, clamped(tl.load(used + b, mask=inside, other=0), T))
    return start, length


@triton.jit
def extents_of(offsets_q, offsets_k, used_q, used_k, table, diagonals, b, inside, T_q, T_k, most_q, most_k):
    """First query, queries, first key, keys and diagonal of sequences b, also written where ``extents`` writes them."""
    q0, M = _lengths(offsets_q, used_q, b, inside, T_q)
    k0, N = _lengths(offsets_k, used_k, b, inside, T_k)
    diagonal = N - M
    if diagonals is not None:
        tl.store(diagonals + b, diagonal, mask=inside)
    if most_q is not None:
        M = tl.minimum(M, most_q)
    if most_k is not None:
        N = tl.minimum(N, most_k)
    tl.store(table + 4 * b, q0, mask=inside)
    tl.store(table + 4 * b + 1, M, mask=inside)
    tl.store(table + 4 * b + 2, k0, mask=inside)
    tl.store(table + 4 * b + 3, N, mask=inside)
    return q0, M, k0, N, diagonal


@triton.jit
def _numbered(first, before, length, b, inside, BLOCK: tl.constexpr):
    """Number the tiles of sequences b from ``before`` on; how many there are then."""
    tiles = (length.to(tl.int64) + BLOCK - 1) // BLOCK
    upto = tl.minimum(before + tl.cumsum(tiles, 0), MOST_TILES)
    tl.store(first + b, tl.minimum(upto - tiles, MOST_TILES).to(tl.int32), mask=inside)
    return tl.minimum(before + tl.sum(tiles, 0), MOST_TILES)


@triton.jit
def extents(
    offsets_q, offsets_k, used_q, used_k, table, first_q, first_k, diagonals, counters, sequences, T_q, T_k, most_q, most_k,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """One program. table (sequences, 4): first query, queries, first key, keys of each, kept within the tensors; first_q, first_k
    (sequences + 1,): the number of its first tile of BM queries, of BN keys, and how many there are in all; diagonals (sequences,): the key
    that its first query meets where its last query meets its last key; counters: COUNTERS zeros. None: not wanted. most_q, most_k: so many
    queries and keys of a sequence count as its own, but for diagonals; None: all.
    """
    if counters is not None:
        tl.store(counters + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))
    before_q = tl.cast(0, tl.int64)
    before_k = tl.cast(0, tl.int64)
    for begin in range(0, sequences, BLOCK):
        b = begin + tl.arange(0, BLOCK)
        inside = b < sequences
        _q0, M, _k0, N, _diagonal = extents_of(
            offsets_q, offsets_k, used_q, used_k, table, diagonals, b, inside, T_q, T_k, most_q, most_k
        )  # fmt: skip
        if first_q is not None:
            before_q = _numbered(first_q, before_q, M, b, inside, BM)
        if first_k is not None:
            before_k = _numbered(first_k, before_k, N, b, inside, BN)
    if first_q is not None:
        tl.store(first_q + sequences, before_q.to(tl.int32))
    if first_k is not None:
        tl.store(first_k + sequences, before_k.to(tl.int32))


@triton.jit
def tiles(first, table, sequences, bound, rounds, BLOCK: tl.constexpr):
    """One program fills BLOCK of the ``bound`` entries (sequence, tile) of a table of tiles; (-1, 0) where there is no tile left."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = last_at_most(first, 1, entry, sequences, rounds)
    exists = entry < tl.load(first + sequences)
    tile = tl.where(exists, entry - tl.load(first + b), 0)
    tl.store(table + 2 * entry, tl.where(exists, b, -1), mask=entry < bound)
    tl.store(table + 2 * entry + 1, tile, mask=entry < bound)


@triton.jit
def unowned(
    offsets, used, most, sink, x, y, lse, rest, x_strides, y_strides, lse_stride, sequences, T, heads, rounds, first,
    DX: tl.constexpr, DY: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK rows of packed tensors x and y (strides by row and head) and of lse and rest, by (head, row), and writes 0,
    and -inf to lse, where no sequence is: by what ``extents`` reads. Rows of a sequence from ``most`` on, which see no key, are such, too,
    but their lse is the head's sink, ``(sinks, stride)``. first: the program that owns the first rows. None: not there.
    """
    rows = (tl.program_id(0) - first) * BLOCK + tl.arange(0, BLOCK)
    b = last_at_most(offsets, 1, rows, sequences, rounds)
    start, length = _lengths(offsets, used, b, b < sequences, T)
    blind = (rows >= start) & (rows < start + length)
    if most is not None:
        length = tl.minimum(length, most)
    lost = (rows < T) & ((rows < start) | (rows >= start + length))
    if tl.max(lost.to(tl.int32), 0) > 0:
        d = tl.arange(0, BLOCK_DIM)
        for head in range(heads):
            if x is not None:
                _zero(x + offset(head, x_strides[1]), x_strides[0], rows, lost, d, DX, BLOCK, BLOCK_DIM)
            if y is not None:
                _zero(y + offset(head, y_strides[1]), y_strides[0], rows, lost, d, DY, BLOCK, BLOCK_DIM)
            if lse is not None:
                nothing = tl.zeros([BLOCK], tl.float32) + float("-inf")
                if sink is not None:
                    nothing = tl.where(blind, tl.load(sink[0] + offset(head, sink[1])).to(tl.float32), nothing)
                tl.store(lse + offset(head, lse_stride) + rows, nothing, mask=lost)
            if rest is not None:
                tl.store(rest + offset(head, T) + rows, 0.0, mask=lost)


@triton.jit
def _zero(x, stride, rows, lost, d, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr):
    pointers = x + rows.to(tl.int64)[:, None] * stride + d[None, :]
    nothing = tl.zeros([BLOCK, BLOCK_DIM], x.dtype.element_ty)
    tl.store(pointers, nothing, mask=lost[:, None] & (d[None, :] < DIM))


@triton.jit
def cleared(x, elements, BLOCK: tl.constexpr):
    """One program writes BLOCK zeros."""
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.zeros([BLOCK], x.dtype.element_ty), mask=at < elements)


@triton.jit
def packed_dbias(
    q, k, v, f, dout, lse, rest_in, delta_in, dbias_out, packed,
    q_strides, k_strides, v_strides, dout_strides, lse_strides, dbias_strides, dbias_starts,
    heads, groups, sequences, rows_q, bound, rows_m, rows_n, lo, hi, scale, splits,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    LISTED: tl.constexpr, VARIES_B: tl.constexpr, VARIES_H: tl.constexpr, VARIES_M: tl.constexpr, VARIES_N: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``dbias.dbias`` for packed sequences: one program owns one tile of the bias's own shape and adds up ds of the sequences that reach
    it, in their order, of all heads, queries and keys that share it.

    LISTED: "rows" or "keys", a bias packed along its queries or keys: ``packed[0]`` tells the program's sequence and tile of these, and
    dbias_starts by what its first query and first key move it. Else, "", it is padded, (sequences or 1, heads or 1, rows_m or 1,
    rows_n or 1). splits: parts of the sequences, if all share it; part t writes to ``dbias_out + t * dbias_strides[0]``. rows_q: of q.
    dbias_strides: part, sequence, head, row, column.
    """
    pid = tl.program_id(0)
    own_b = 0
    tm = 0
    tn = 0
    own_head = 0
    if LISTED != "":
        entry = pid % bound
        pid = pid // bound
        own_b = tl.load(packed[0] + 2 * entry)
        tile = tl.load(packed[0] + 2 * entry + 1)
        if LISTED == "rows":
            tm = tile
        else:
            tn = tile
    if VARIES_N and LISTED != "keys":
        tn = pid % tl.cdiv(rows_n, BN)
        pid = pid // tl.cdiv(rows_n, BN)
    if VARIES_M and LISTED != "rows":
        tm = pid % tl.cdiv(rows_m, BM)
        pid = pid // tl.cdiv(rows_m, BM)
    if VARIES_H:
        own_head = pid % heads
        pid = pid // heads
    if VARIES_B and LISTED == "":
        own_b = pid % sequences
        pid = pid // sequences
    part = pid
    if VARIES_B:
        exists = own_b >= 0
        own_b = tl.maximum(own_b, 0)
        first = own_b
        last = tl.where(exists, own_b + 1, own_b)
    else:
        first = tl.cast(tl.cast(sequences, tl.int64) * part // splits, tl.int32)
        last = tl.cast(tl.cast(sequences, tl.int64) * (part + 1) // splits, tl.int32)

    i = tl.arange(0, BM)[:, None]
    j = tl.arange(0, BN)[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    if f.mask is not None:
        SKIPS: tl.constexpr = f.mask_strides[3] is not None and f.mask_strides[4] is not None
    else:
        SKIPS: tl.constexpr = False
    for b in tl.range(first, last):
        e = of_sequence(packed[1], b, own_head, 0, True)
        M = e.queries
        N = e.keys
        visible = visible_keys(f, b, N)
        low = lo
        high = hi
        if lo is not None:
            low = lo + diagonal(packed, M, N)
        if hi is not None:
            high = hi + diagonal(packed, M, N)
        p = Program(M, N, low, high, scale, BM, BN, D, DV, BD, BDV, EVEN_M, EVEN_N, PRECISION, WIDE, None, None, f.shift)
        begin_m = 0
        count_m = 1
        begin_n = 0
        count_n = 1
        if VARIES_M:
            begin, _a, _b, end = segments(tm * BM, min(tm * BM + BM, M) - 1, visible, low, high, BN)
            end = tl.where(tm * BM < M, end, begin)
            if VARIES_N:
                count_n = tl.where((tn >= begin) & (tn < end), 1, 0)
            else:
                begin_n = begin
                count_n = end - begin
        elif VARIES_N:
            above = -high if hi is not None else None  # the band as keys see queries
            below = -low if lo is not None else None
            begin, _a, _b, end = segments(tn * BN, min(tn * BN + BN, visible) - 1, M, above, below, BM)
            begin_m = begin
            count_m = tl.where(tn * BN < visible, end - begin, 0)
        else:
            count_m = tl.cdiv(M, BM)
            count_n = tl.cdiv(visible, BN)
        rounds = count_m * count_n
        if not VARIES_H:
            rounds = rounds * heads
        for r in tl.range(0, rounds):
            head = own_head
            left = r
            if not VARIES_N:
                tn = begin_n + left % count_n
                left = left // count_n
            if not VARIES_M:
                tm = begin_m + left % count_m
                left = left // count_m
            if not VARIES_H:
                head = left
            m0 = tm * BM
            n0 = tn * BN
            at = at_head(f, b, head, heads, 1, e.first_query, e.first_key)
            q_at = q + offset(e.first_query, q_strides[0]) + offset(head, q_strides[2])
            k_at = k + offset(e.first_key, k_strides[0]) + offset(head // groups, k_strides[2])
            v_at = v + offset(e.first_key, v_strides[0]) + offset(head // groups, v_strides[2])
            do_at = dout + offset(e.first_query, dout_strides[0]) + offset(head, dout_strides[2])
            lse_at = lse + offset(e.first_query, lse_strides[0]) + offset(head, lse_strides[1])
            delta_at = delta_in + offset(head, rows_q) + e.first_query
            rest_at = rest_in
            if rest_in is not None:
                rest_at = rest_in + offset(head, rows_q) + e.first_query
            bias = bias_tile(f, at, m0, n0, i, j, Span(None, M), Span(None, visible), True, True, WIDE)
            seen = mask_tile(f, at, m0, n0, i, j, M, visible, True, True, WIDE)
            t = Round(
                q_at, k_at, v_at, do_at, q_strides[1], k_strides[1], v_strides[1], dout_strides[1], lse_at, rest_at, delta_at, at, visible,
            )  # fmt: skip
            if SKIPS:
                if shows_anything(seen):
                    acc += _ds(p, t, f, bias, seen, m0, n0, i, j, False)
            else:
                acc += _ds(p, t, f, bias, seen, m0, n0, i, j, False)

    own = dbias_out + offset(part, dbias_strides[0]) + offset(own_head, dbias_strides[2])
    rows = rows_m
    cols = rows_n
    if VARIES_B:
        own += offset(own_b, dbias_strides[1])
        e = of_sequence(packed[1], own_b, own_head, 0, exists)
        if LISTED == "rows":
            own += offset(e.first_query, dbias_starts[0])
            rows = e.queries
        if LISTED == "keys":
            own += offset(e.first_key, dbias_starts[1])
            cols = e.keys
    if VARIES_M and VARIES_N:
        store_tile(own, dbias_strides[3], dbias_strides[4], tm * BM, tn * BN, i, j, rows, cols, acc, True, True)
    elif VARIES_N:
        at_cols = tn * BN + tl.arange(0, BN)
        column = tl.sum(acc, 0)
        tl.store(own + offset(at_cols, dbias_strides[4]), column.to(dbias_out.dtype.element_ty), mask=at_cols < cols)
    elif VARIES_M:
        at_rows = tm * BM + tl.arange(0, BM)
        column = tl.sum(acc, 1)
        tl.store(own + offset(at_rows, dbias_strides[3]), column.to(dbias_out.dtype.element_ty), mask=at_rows < rows)
    else:
        tl.store(own, tl.sum(tl.sum(acc, 1), 0).to(dbias_out.dtype.element_ty))
