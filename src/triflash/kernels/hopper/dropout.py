"""Dropout in the Hopper kernels: ``triflash.dropout.keep_mask`` in assembly. Called by every kernel that has p.

Four scores share one Philox counter: of two queries and two keys that lie 8 apart. An accumulator gives a thread just those, of every 16 by
16 scores two rows and two columns 8 apart (and their neighbours), whether rows are queries or keys. Eight elements in a row of a thread's
registers are two such fours: bit 0 of an element's number is its column's, bit 1 says which row, bit 2 which of the columns.

A backward pass needs p for delta and 0 where it was dropped. ``sign_dropped`` negates what was dropped, and ``ds_of`` computes
``ds = p * (keep * dp - delta)`` of it.
"""

from ..triton.prims import offset
from .compat import gl, gluon
from .features import opaque
from .layouts import accumulator

ROUNDS = gl.constexpr(7)  # of Philox, and its constants below: as triflash/dropout.py


@gluon.jit
def philox_of(dropout, b, head, heads):
    """``(key, twist, keep, rescale)`` of a query head; of a part, whose place is given, ``(…, query0, key0)``. key, twist: of its
    Philox-2x32. keep: in both halves of a word, what brings a kept number to 2^15 or more. rescale: the factor of kept probabilities.

    dropout: ``(seed, threshold, rescale)``, a pointer to (seed, offset), ``dropout.threshold``, and 1 / (1 - p). A fourth element says that
    behind the offset stand the first query, key and head, and the number of heads, of the larger problem that this is a part of.
    """
    seed = gl.load(dropout[0])
    start = gl.load(dropout[0] + 1)
    PLACED: gl.constexpr = len(dropout) == 4
    if PLACED:
        c0 = (offset(b, gl.load(dropout[0] + 5).to(gl.int32)) + gl.load(dropout[0] + 4).to(gl.int32) + head).to(gl.uint32)
    else:
        c0 = (offset(b, heads) + head).to(gl.uint32)
    c1 = c0 * 0
    c2 = start.to(gl.uint32)
    c3 = (start >> 32).to(gl.uint32)
    k0 = seed.to(gl.uint32)
    k1 = (seed >> 32).to(gl.uint32)
    for _ in gl.static_range(ROUNDS):
        first = c0.to(gl.uint64) * 0xD2511F53
        second = c2.to(gl.uint64) * 0xCD9E8D57
        c0 = (second >> 32).to(gl.uint32) ^ c1 ^ k0
        c2 = (first >> 32).to(gl.uint32) ^ c3 ^ k1
        c1 = second.to(gl.uint32)
        c3 = first.to(gl.uint32)
        k0 = gl.add(k0, 0x9E3779B9, sanitize_overflow=False).to(gl.uint32)  # it overflows by design: TRITON_DEBUG is not to stop at that
        k1 = gl.add(k1, 0xBB67AE85, sanitize_overflow=False).to(gl.uint32)
    keep = (0x8000 - dropout[1]) * 0x10001
    if PLACED:
        return (
            c0.to(gl.int32, bitcast=True), c1.to(gl.int32, bitcast=True), keep, dropout[2],
            gl.load(dropout[0] + 2).to(gl.int32), gl.load(dropout[0] + 3).to(gl.int32),
        )  # fmt: skip
    else:
        return c0.to(gl.int32, bitcast=True), c1.to(gl.int32, bitcast=True), keep, dropout[2]


@gluon.constexpr_function
def _philox_ptx(KEYS_BY_ROW):
    """Two counters for eight elements. Operands: the results, 16 bits each; then for each element its key index, its query index ^ twist,
    the key of the head, and keep.
    """
    lines = ["/* keys by row */" if KEYS_BY_ROW else "/* queries by row */"]
    lines += [".reg .b32 l<2>, h<2>, z<2>, x<4>, k;", ".reg .b64 y<2>;"]
    lines += [f"mov.b32 l{n}, ${4 + n}; mov.b32 h{n}, ${12 + n};" for n in range(2)]
    for step in range(7):
        lines += [f"add.s32 k, $20, {0x9E3779B9 * step & 0xFFFFFFFF:#x};"]
        for n in range(2):
            lines += [f"mul.wide.u32 y{n}, l{n}, 0xD256D193;", f"mov.b64 {{z{n}, l{n}}}, y{n};"]
            lines += [f"lop3.b32 l{n}, l{n}, h{n}, k, 0x96;", f"mov.b32 h{n}, z{n};"]
    for n in range(2):  # bit 15 and bit 31 of x: keep; first words of both counters, then second words
        lines += [f"and.b32 x{n}, l{n}, 0x7FFF7FFF; add.s32 x{n}, x{n}, $28;"]
        lines += [f"and.b32 x{2 + n}, h{n}, 0x7FFF7FFF; add.s32 x{2 + n}, x{2 + n}, $28;"]
    for row in range(2):
        for column in range(2):
            query, key = (column, row) if KEYS_BY_ROW else (row, column)
            halves = 0xFFBB if key else 0xDD99  # of two neighbours, of one counter each, the sign of that half in every bit
            lines += [f"prmt.b32 ${row + 2 * column}, x{2 * query}, x{2 * query + 1}, {halves:#x};"]
    return "{ " + "\n".join(lines) + " }"


_PHILOX_OPERANDS = gl.constexpr(",".join(["=r"] * 4 + ["r"] * 32))


@gluon.jit
def keep_bits(philox, m0, n0, ROWS: gl.constexpr, COLUMNS: gl.constexpr, KEYS_BY_ROW: gl.constexpr):
    """int16, -1 where a tile's probability is kept, else 0. Queries from m0 on, keys from n0 on, multiples of 16.

    It depends on no score, so it can run while an MMA is waited for.
    """
    PLACED: gl.constexpr = len(philox) == 6
    if PLACED:
        m0 += philox[4]
        n0 += philox[5]
    L: gl.constexpr = accumulator(COLUMNS)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, L))
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, L))
    if KEYS_BY_ROW:
        j, i = gl.broadcast(gl.expand_dims(n0 + row, 1), gl.expand_dims((m0 + column) ^ philox[1], 0))
    else:
        j, i = gl.broadcast(gl.expand_dims(n0 + column, 0), gl.expand_dims((m0 + row) ^ philox[1], 1))
    key = gl.full([ROWS, COLUMNS], opaque(philox[0]), gl.int32, L)
    keep = gl.full([ROWS, COLUMNS], philox[2], gl.int32, L)
    text: gl.constexpr = _philox_ptx(KEYS_BY_ROW)
    return gl.inline_asm_elementwise(text, _PHILOX_OPERANDS, [j, i, key, keep], gl.int16, True, 8)


_DROP = gl.constexpr("and.b32 $0, $1, $2;")
_SIGN = gl.constexpr("{ .reg .b32 m; shl.b32 m, $4, 16; lop3.b32 $0, $2, m, 0x80000000, 0xF2; lop3.b32 $1, $3, $4, 0x80000000, 0xF2; }")


@gluon.jit
def drop(p16, bits):
    """16-bit probabilities, 0 where dropped; not rescaled."""
    return gl.inline_asm_elementwise(_DROP, "=r,r,r", [p16, bits], p16.dtype, True, 2)


@gluon.jit
def sign_dropped(w, bits):
    """w >= 0, float32, as -w (or -0) where dropped."""
    return gl.inline_asm_elementwise(_SIGN, "=f,=f,f,f,r", [w, bits], gl.float32, True, 2)


@gluon.jit
def ds_of(w, dp, delta, DROPPED: gl.constexpr):
    """``w * (dp - delta)``, or of what ``sign_dropped`` gave ``|w| * (keep * dp - delta)``. delta None: dp has it subtracted already."""
    if delta is None:
        return w * dp
    elif DROPPED:
        return gl.fma(gl.maximum(w, 0.0), dp, gl.abs(w) * -delta)
    else:
        return w * (dp - delta)
