"""Key lengths, masks, ALiBi and soft caps in the Hopper kernels. Called by all of them. None: the feature is absent, its branch compiled
out.
"""

from ..triton.prims import LOG2E, clamped, offset
from .compat import fence_async_shared, gl, gluon, thread_barrier
from .preprocess import FLAGS


@gluon.constexpr_function
def one_sided(ALIBI):
    """Of ALIBI of the kernels: 0 without slopes, else 1, or where no query sees a key behind it the keys of a forward block."""
    return ALIBI > 1


@gluon.jit
def visible_keys(lengths, b, N):
    """How many keys batch entry b shows, of N. lengths: a pointer to any integers, and their stride; or None."""
    if lengths is not None:
        return clamped(gl.load(lengths[0] + offset(b, lengths[1])), N)
    else:
        return N


@gluon.constexpr_function
def _spread(columns):
    """A warpgroup's layout of rows of 16-bit numbers, 16 bytes a thread."""
    across = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


@gluon.jit
def clear_masked(tile, visible):
    """Store zeros to the rows of a 16-bit tile in shared memory from number ``visible`` on: keys or values that a length hides.

    TMA loads a tile that a length cuts through whole, and what it hides may be NaN, whose product with p = 0 is NaN. Every consumer clears
    the tile before it multiplies by it; several write the same zeros, and none waits. The caller is a warpgroup that has waited for the
    tile and not released it. MMAs issued behind it see the zeros.
    """
    COLUMNS: gl.constexpr = tile.shape[1]
    ROWS: gl.constexpr = min(tile.shape[0], 4096 // COLUMNS)  # a go: 16 registers
    GOES: gl.constexpr = tile.shape[0] // ROWS
    SPREAD: gl.constexpr = _spread(COLUMNS)
    for go in gl.static_range(GOES):
        if visible < (go + 1) * ROWS:
            rows = tile.slice(go * ROWS, ROWS, 0)
            x = rows.load(SPREAD)
            number, x = gl.broadcast(gl.expand_dims(go * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SPREAD)), 1), x)
            rows.store(gl.where(number < visible, x, gl.zeros([ROWS, COLUMNS], tile.dtype, SPREAD)))
    fence_async_shared()
    thread_barrier()  # here, else the compiler puts one before every MMA of the loops behind


@gluon.constexpr_function
def _select_ptx(masked_value):
    return "{ .reg .pred p; setp.le.s32 p, $2, $3; selp.f32 $0, $1, " + masked_value + ", p; }"


@gluon.jit
def select_le(x, at, last, MASKED_VALUE: gl.constexpr):
    """x, float32, where ``at <= last``, else MASKED_VALUE, a float32 as PTX writes it; at and last are 32 bits and broadcast to x.

    In assembly: LLVM would pack a comparison of whole tiles into a vector of bits and unpack it, twice the instructions.
    """
    at, x = gl.broadcast(at, x)
    last, x = gl.broadcast(last, x)
    return gl.inline_asm_elementwise(_select_ptx(MASKED_VALUE), "=f,f,r,r", [x, at, last], gl.float32, True, 1)


_MASK_PTX = gl.constexpr("""{
    .reg .pred p;
    .reg .b16 t;
    and.b16 t, $4, 0x00FF;
    setp.ne.u16 p, t, 0;
    selp.f32 $0, $2, 0fFF800000, p;
    and.b16 t, $4, 0xFF00;
    setp.ne.u16 p, t, 0;
    selp.f32 $1, $3, 0fFF800000, p;
}""")


@gluon.jit
def mask_scores(s, mask_tile):
    """Scores where a mask that broadcasts to them is not 0, else -inf.

    Bytes go through assembly, two instructions a score: LLVM would pack a comparison of whole tiles into a vector of bits and unpack it.
    Two neighbours share a register: keys, in tiles whose columns are keys.
    """
    mask_tile, s = gl.broadcast(mask_tile, s)
    if mask_tile.dtype == gl.uint8:
        return gl.inline_asm_elementwise(_MASK_PTX, "=f,=f,f,f,h", [s, mask_tile], gl.float32, True, 2)
    else:
        return gl.where(mask_tile != 0, s, float("-inf"))


@gluon.jit
def mask_by_tile(s, buffer, BM: gl.constexpr, BN: gl.constexpr):
    """Scores of BM queries and BN keys, -inf where the mask in ``buffer`` is 0: a tile, or a row of at least 128 keys for all queries."""
    S: gl.constexpr = s.type.layout
    if buffer.shape[3] > 1:
        mask_tile = buffer.reshape([BM, BN]).load(S)
    else:
        mask_tile = gl.expand_dims(buffer.reshape([buffer.shape[4]]).slice(0, BN).load(gl.SliceLayout(0, S)), 0)
    return mask_scores(s, mask_tile)


@gluon.jit
def slope_of(slopes, slope_strides, b, head):
    """The ALiBi slope of a query head, in base 2; 0 if there are none."""
    if slopes is not None:
        return gl.load(slopes + offset(b, slope_strides[0]) + offset(head, slope_strides[1])).to(gl.float32) * LOG2E
    else:
        return 0.0


_WIDENED = gl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;")


@gluon.jit
def widened(x):
    """A tile as float32. Two neighbours of bfloat16 share a register and take an instruction each; the compiler would take three."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(_WIDENED, "=f,=f,r", [x], gl.float32, True, 2)
    else:
        return x.to(gl.float32)


@gluon.jit
def opaque(x):
    """Identity that hides x, 32 bits, from LLVM and ptxas, so nothing derived from it is hoisted out of a loop."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, False, 1)


@gluon.jit
def rounded(x, factor):
    """``x * factor``, rounded: the compiler does not contract it with a following addition."""
    L: gl.constexpr = x.type.layout
    return gl.fma(x, gl.full(x.shape, factor, gl.float32, L), gl.zeros(x.shape, gl.float32, L))


@gluon.jit
def line(first, slope, COUNT: gl.constexpr, LAYOUT: gl.constexpr):
    """``first + slope * (0 … COUNT - 1)``. A thread knows all but the low bits of its elements' numbers at compile time; these alone are
    converted.
    """
    return _line_at(gl.full([COUNT], first, gl.float32, LAYOUT), slope, gl.arange(0, COUNT, LAYOUT))


@gluon.jit
def _line_at(first, slope, at):
    slopes = gl.full(at.shape, slope, gl.float32, at.type.layout)
    low = gl.fma(slopes, (at & 7).to(gl.float32), first)
    return gl.fma(slopes, (at & -8).to(gl.float32), low)


@gluon.jit
def line_of_keys(slope, j, m0, diagonal, BLOCK: gl.constexpr):
    """What the forward kernel adds to scores of the keys j and its 64 queries from m0 on, one-sidedly, to the last bit: it counts from the
    first of a block's BLOCK keys.
    """
    at = j & (BLOCK - 1)
    return _line_at(slope * (j - at - m0 - diagonal).to(gl.float32), slope, at)


@gluon.jit
def scaled(s, factor, line):
    """``s * factor + line``, rounded once."""
    line, s = gl.broadcast(line, s)
    return gl.fma(s, gl.full(s.shape, factor, gl.float32, s.type.layout), line)


@gluon.jit
def add_alibi(x, slope, first, sign, FORM: gl.constexpr):
    """Scores x in base 2 less ``slope * |i - j|``, queries counted so that the last meets the last key.

    first: ``j - i`` of the tile's first row and column; sign: 1 where columns are keys, -1 where they are queries. FORM: ALIBI. Where it is
    ``one_sided``, ``-slope * |i - j| = slope * (j - i)`` is a line over columns plus one over rows: a score takes one addition, and the
    latter is left to the caller.
    """
    L: gl.constexpr = x.type.layout
    first = first.to(gl.float32)
    if one_sided(FORM):
        return x + gl.expand_dims(line(opaque(slope * first), slope * sign, x.shape[1], gl.SliceLayout(0, L)), 0)
    else:
        columns = gl.expand_dims(line(opaque(first), 1.0 * sign, x.shape[1], gl.SliceLayout(0, L)), 0)
        rows = gl.expand_dims(line(0.0, 1.0 * sign, x.shape[0], gl.SliceLayout(1, L)), 1)
        return gl.fma(gl.abs(columns - rows), gl.full(x.shape, -slope, gl.float32, L), x)


# u = -1 / (1 + 2^x) of four scores of a thread, to 2^-21. An SM does 16 powers or reciprocals a cycle and 128 multiplications. The four
# share one reciprocal, that of their product, 2^120 at most, so x ends at 30, where u is as good as 0. NaN stays NaN.
_TANH = gl.constexpr("""{
    .reg .f32 y<4>, a, b, c;
    min.NaN.f32 y0, $4, 0f41F00000;
    min.NaN.f32 y1, $5, 0f41F00000;
    min.NaN.f32 y2, $6, 0f41F00000;
    min.NaN.f32 y3, $7, 0f41F00000;
    ex2.approx.ftz.f32 y0, y0;
    ex2.approx.ftz.f32 y1, y1;
    ex2.approx.ftz.f32 y2, y2;
    ex2.approx.ftz.f32 y3, y3;
    sub.f32 y0, 0fBF800000, y0;
    sub.f32 y1, 0fBF800000, y1;
    sub.f32 y2, 0fBF800000, y2;
    sub.f32 y3, 0fBF800000, y3;
    mul.f32 a, y0, y1;
    mul.f32 b, y2, y3;
    mul.f32 c, a, b;
    rcp.approx.ftz.f32 c, c;
    mul.f32 b, b, c;
    mul.f32 a, a, c;
    mul.f32 $0, y1, b;
    mul.f32 $1, y0, b;
    mul.f32 $2, y3, a;
    mul.f32 $3, y2, a;
}""")


@gluon.jit
def tanh(s, cap):
    """``u``, half of tanh - 1, of a tile of products s: under a soft cap scores are ``softcap * (1 + 2 u)``.

    tanh is that of ``scale * s / softcap``. cap: ``(2 log2(e) scale / softcap, softcap log2(e))``. u grows with the score, so a maximum may
    be taken of either. The GPU's own tanh instruction is right to 2^-11 only, which a soft cap of 50 makes 0.025 of a score: too much for
    16-bit results.
    """
    return gl.inline_asm_elementwise(_TANH, "=f,=f,=f,=f,f,f,f,f", [s * cap[0]], gl.float32, True, 4)


@gluon.jit
def softcapped(u, cap):
    """Scores in base 2 from what ``tanh`` gives."""
    twice = gl.full(u.shape, 2.0 * cap[1], gl.float32, u.type.layout)
    return gl.fma(u, twice, gl.full(u.shape, cap[1], gl.float32, u.type.layout))


@gluon.jit
def tanh_slope(u):
    """The derivative of a score by ``scale * s``: ``1 - tanh² = -4 u (1 + u)``."""
    return u * (u * -4.0 - 4.0)


@gluon.constexpr_function
def _p_and_ds_factor_ptx(TYPE):
    """``2^x`` of two scores, in 16 bits, and ``2^x * tanh_slope(u)``. One text, for the sake of its order: where all powers came first, and
    then all slopes, the assembler kept both, and spilled.
    """
    return f"""{{
    .reg .f32 p<2>;
    ex2.approx.ftz.f32 p0, $3;
    ex2.approx.ftz.f32 p1, $4;
    cvt.rn.{TYPE}x2.f32 $0, p1, p0;
    fma.rn.f32 $1, $5, 0fC0800000, 0fC0800000;
    mul.f32 $1, $1, $5;
    mul.f32 $1, $1, p0;
    fma.rn.f32 $2, $6, 0fC0800000, 0fC0800000;
    mul.f32 $2, $2, $6;
    mul.f32 $2, $2, p1;
}}"""


@gluon.jit
def p_and_ds_factor(x, u, DT: gl.constexpr):
    """``p = 2^x`` in the 16-bit dtype DT, and ``p * tanh_slope(u)`` in float32."""
    if DT == gl.bfloat16:
        return gl.inline_asm_elementwise(_p_and_ds_factor_ptx("bf16"), "=r,=f,=f,f,f,f,f", [x, u], (gl.bfloat16, gl.float32), True, 2)
    else:
        return gl.inline_asm_elementwise(_p_and_ds_factor_ptx("f16"), "=r,=f,=f,f,f,f,f", [x, u], (gl.float16, gl.float32), True, 2)


@gluon.jit
def all_lse_small(small_lse):
    """1 if every lse is small, else 0: the flags of ``preprocess``."""
    EACH_WARP: gl.constexpr = gl.BlockedLayout([FLAGS // 32], [32], [4], [0])  # so that they need not sync
    return gl.min(gl.load(small_lse + gl.arange(0, FLAGS, EACH_WARP)), 0)
