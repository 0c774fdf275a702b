"""The online softmax of the forward kernel for Hopper: from scores to probabilities, row sums and references. Called by ``forward.py``.

For every query it keeps a reference m, the sum l of ``p = 2^(score - m)`` and, in its caller, the sum o of p v:

    l' = l 2^(m - m') + sum p;   o' = o 2^(m - m') + p v

Usually m is the maximum of all scores so far, but any m gives the same softmax as long as nothing overflows. Here m is the maximum as of
when a warp last looked for it. p of a block is computed with the m at hand. Only where its sum exceeds 2^15, which a float16 still holds,
or is NaN, does the warp find the maximum, compute p again, and rescale l and o. That takes the maximum, its exchange between lanes and all
rescaling out of the loop. FlashAttention-4 (2025) skips the rescaling for little growth, too, but takes every block's maximum. The branch
is a warp's own, and so in assembly.

Numbers a query are held *by lane*: (64, 4), for the four lanes that share a row of an accumulator. Their m are equal; l is each lane's own
share, added up when a tile ends.
"""

from ..triton.prims import LOG2E
from .compat import gl, gluon
from .features import add_alibi, line, line_of_keys, mask_by_tile, mask_scores, one_sided, rounded, scaled, softcapped, tanh, widened
from .layouts import accumulator
from .scores_qk import add_bias, mask_band

# m of a query that has seen no key: every score is above it, and 2^(-inf - m) is 0 and not NaN.
LOWEST = gl.constexpr(-3.4028234663852886e38)
SMALL_REFERENCE = gl.constexpr(1024.0)  # |m| up to which scores may be summed in any order: p is right to 2^-13


@gluon.constexpr_function
def _by_lane(columns):
    """``accumulator`` of (64, columns), as (64, columns / 8, 4, 2): the third dim are the lanes that share a row."""
    groups = [[0, 1 << n, 0, 0] for n in range((columns // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [8, 0, 0, 0], *groups],
        [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
        [[16, 0, 0, 0], [32, 0, 0, 0]],
        [],
        [64, columns // 8, 4, 2],
    )


@gluon.constexpr_function
def _lanes(columns):
    return gl.SliceLayout(1, gl.SliceLayout(3, _by_lane(columns)))


@gluon.jit
def _split(x):
    """(64, columns) by lane. Nothing moves, here and below."""
    return gl.convert_layout(x.reshape([64, x.shape[1] // 8, 4, 2]), _by_lane(x.shape[1]), assert_trivial=True)


@gluon.jit
def _joined(x):
    return gl.convert_layout(x.reshape([64, x.shape[1] * 8]), accumulator(x.shape[1] * 8), assert_trivial=True)


@gluon.jit
def _spread(x, COLUMNS: gl.constexpr):
    """A number a lane, to go with its share of so many columns."""
    return gl.expand_dims(gl.expand_dims(gl.convert_layout(x, _lanes(COLUMNS), assert_trivial=True), 1), 3)


@gluon.jit
def _of_rows(x, COLUMNS: gl.constexpr):
    """A number a row, for each of its lanes."""
    x = gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, _lanes(COLUMNS))), 1)
    x, _zeros = gl.broadcast(x, gl.zeros([64, 4], gl.float32, _lanes(COLUMNS)))
    return x


@gluon.jit
def by_row(l, m, ROWS: gl.constexpr):
    """l and m of rows from those of lanes: the sum of l, and m."""
    return gl.convert_layout(gl.sum(l, 1), ROWS), gl.convert_layout(gl.max(m, 1), ROWS)


@gluon.constexpr_function
def _halvings(columns):
    return (columns // 8).bit_length() - 1


@gluon.jit
def _first(x):
    """The first of what a lane has of each of its rows."""
    COLUMNS: gl.constexpr = x.shape[1] * 8
    x, _second = gl.split(x)
    for _n in gl.static_range(_halvings(COLUMNS)):
        x = gl.permute(x.reshape([64, 2, x.shape[1] // 2, 4]), (0, 2, 3, 1))
        x, _second = gl.split(x)
    return gl.convert_layout(x.reshape([64, 4]), _lanes(COLUMNS), assert_trivial=True)


@gluon.constexpr_function
def _dtype_name(DT):
    return "bf16" if DT == gl.bfloat16 else "f16"


@gluon.constexpr_function
def _score(n, s, a, b, scaled, shifted, bias):
    """PTX for y, the score number n of a thread in base 2, as the backward kernels round it: ``s * a + b``, or ``bias log2(e) + s * a``."""
    if bias is not None:
        register = f"${b + n // 2}"
        if bias == "f16":
            bias32 = f"mov.b32 {{h0, h1}}, {register}; cvt.f32.f16 w, h{n % 2};"
        elif n % 2:
            bias32 = f"and.b32 v, {register}, 0xFFFF0000; mov.b32 w, v;"
        else:
            bias32 = f"shl.b32 v, {register}, 16; mov.b32 w, v;"
        masked_value = f"setp.eq.f32 r, ${s + n}, 0fFF800000; selp.f32 y, 0fFF800000, y, r;"  # whatever its bias is
        return f"mul.f32 y, ${s + n}, ${a + n}; {bias32} fma.rn.f32 y, w, 0f3FB8AA3B, y; {masked_value}"
    if scaled and shifted:
        return f"fma.rn.f32 y, ${s + n}, ${a + n}, ${b + n};"
    if scaled:
        return f"mul.rn.f32 y, ${s + n}, ${a + n};"  # else the assembler melts it into the subtraction of m
    if shifted:
        return f"add.f32 y, ${s + n}, ${b + n};"
    return f"mov.f32 y, ${s + n};"


@gluon.constexpr_function
def _rescale_ptx(count, scaled, shifted, bias, dtype):
    """PTX for ``_rescale``, of ``count`` scores of a thread: by fours, two in a row and two in the row 8 further down. Operands: p in twos,
    sums, references, factors; s, p, sums, references, a and b as of ``_score``. Of what there is one of a row the first two rows' are used.
    bias, dtype: "f16" or "bf16", of a bias (None: there is none) and of p.
    """
    half = count // 2
    new_p, new_l, new_m, factor = 0, half, half + count, half + 2 * count
    s = half + 3 * count
    p, l, m = s + count, s + count + half, s + 2 * count + half
    a = m + count
    b = a + count if scaled else a
    most = "0f47000000"  # 2^15: no p is above the sum that it is part of
    lines = [
        "{ .reg .pred p, q, r;",
        ".reg .f32 y, z, t0, t1, u0, u1, w;",
        ".reg .b32 v;",
        ".reg .b16 h0, h1;",
        f"setp.gtu.f32 p, ${l}, {most};",
        f"setp.gtu.or.f32 p, ${l + 2}, {most}, p;",
        "vote.sync.any.pred q, p, 0xFFFFFFFF;",
        *(f"mov.b32 ${new_p + n}, ${p + n};" for n in range(half)),
    ]
    for row in (0, 2):
        lines += [f"mov.f32 ${new_l + row}, ${l + row};", f"mov.f32 ${new_m + row}, ${m + row};", f"mov.f32 ${factor + row}, 0f3F800000;"]
    lines += ["@!q bra.uni SETTLED;", f"mov.f32 t0, ${m};", f"mov.f32 t1, ${m + 2};"]
    for n in range(count):
        row = n // 2 % 2
        lines += [_score(n, s, a, b, scaled, shifted, bias), f"max.f32 t{row}, t{row}, y;"]
    for distance in (1, 2):
        for row in (0, 1):
            lines += [f"shfl.sync.bfly.b32 y, t{row}, {distance}, 31, 0xFFFFFFFF;", f"max.f32 t{row}, t{row}, y;"]
    for row in (0, 1):
        lines += [f"mov.f32 ${new_m + 2 * row}, t{row};", f"sub.f32 y, ${m + 2 * row}, t{row};"]
        lines += [f"ex2.approx.ftz.f32 ${factor + 2 * row}, y;", f"mov.f32 u{row}, 0f00000000;"]
    for n in range(count):
        row, last = n // 2 % 2, "zy"[n % 2]
        lines += [_score(n, s, a, b, scaled, shifted, bias), f"sub.f32 y, y, t{row};", f"ex2.approx.ftz.f32 {last}, y;"]
        lines += [f"add.f32 u{row}, u{row}, {last};"]
        if n % 2:
            lines += [f"cvt.rn.{dtype}x2.f32 ${new_p + n // 2}, y, z;"]
    lines += [f"mov.f32 ${new_l}, u0;", f"mov.f32 ${new_l + 2}, u1;", "SETTLED: }"]
    return "\n".join(lines)


@gluon.constexpr_function
def _rescale_operands(count, scaled, shifted, biased):
    outputs = ["=&r"] * (count // 2) + ["=&f"] * (3 * count)
    inputs = ["f"] * count + ["r"] * (count // 2) + ["f"] * (count * (2 + scaled + shifted)) + ["r"] * (count // 2 * biased)
    return ",".join(outputs + inputs)


@gluon.jit
def _rescale(s, p, l, m, a, b, bias):
    """See ``rescaled``. The score of s is ``s * a + b`` (a: for all, b: by lane; None: 1, 0), or beside a bias, a tile of 16 bits,
    ``s * a + bias log2(e)``, with an a and without a b.
    """
    COLUMNS: gl.constexpr = s.shape[1] * 8
    COUNT: gl.constexpr = COLUMNS // 2
    BIAS: gl.constexpr = _dtype_name(bias.dtype) if bias is not None else None  # which need not be p's
    L: gl.constexpr = _by_lane(COLUMNS)
    SCALED: gl.constexpr = a is not None
    SHIFTED: gl.constexpr = b is not None
    TEXT: gl.constexpr = _rescale_ptx(COUNT, SCALED, SHIFTED, BIAS, _dtype_name(p.dtype))
    OPERANDS: gl.constexpr = _rescale_operands(COUNT, SCALED, SHIFTED, bias is not None)
    p = _split(p)
    l, s = gl.broadcast(_spread(l, COLUMNS), s)
    m, s = gl.broadcast(_spread(m, COLUMNS), s)
    if b is not None:
        b, s = gl.broadcast(_spread(b, COLUMNS), s)
    if a is not None:
        a = gl.full(s.shape, 1.0, gl.float32, L) * a
    f32 = gl.float32
    if bias is not None:
        out = gl.inline_asm_elementwise(TEXT, OPERANDS, [s, p, l, m, a, _split(bias)], (p.dtype, f32, f32, f32), True, COUNT)
    elif a is not None and b is not None:
        out = gl.inline_asm_elementwise(TEXT, OPERANDS, [s, p, l, m, a, b], (p.dtype, f32, f32, f32), True, COUNT)
    elif a is not None:
        out = gl.inline_asm_elementwise(TEXT, OPERANDS, [s, p, l, m, a], (p.dtype, f32, f32, f32), True, COUNT)
    elif b is not None:
        out = gl.inline_asm_elementwise(TEXT, OPERANDS, [s, p, l, m, b], (p.dtype, f32, f32, f32), True, COUNT)
    else:
        out = gl.inline_asm_elementwise(TEXT, OPERANDS, [s, p, l, m], (p.dtype, f32, f32, f32), True, COUNT)
    return _joined(out[0]), _first(out[1]), _first(out[2]), _first(out[3])


@gluon.constexpr_function
def _less_reference_ptx(count):
    """PTX for ``_less_reference``. Operands: scores, in place, factors, shifts; scores, m, factors, flags."""
    factor, less = count, 2 * count
    m, a, flag = 4 * count, 5 * count, 6 * count
    lines = [
        "{ .reg .pred p, q;",
        f"setp.neu.f32 p, ${flag}, 0f00000000;",
        f"setp.neu.or.f32 p, ${flag + 2}, 0f00000000, p;",
        "vote.sync.any.pred q, p, 0xFFFFFFFF;",
    ]
    for row in (0, 2):
        lines += [f"mov.f32 ${factor + row}, ${a + row};", f"sub.f32 ${less + row}, 0f00000000, ${m + row};"]
    lines.append("@!q bra.uni SMALL;")
    for n in range(count):
        lines += [f"mul.rn.f32 ${n}, ${n}, ${a + n // 2 % 2 * 2};", f"sub.f32 ${n}, ${n}, ${m + n // 2 % 2 * 2};"]
    for row in (0, 2):
        lines += [f"mov.f32 ${factor + row}, 0f3F800000;", f"mov.f32 ${less + row}, 0f00000000;"]
    return "\n".join([*lines, "SMALL: }"])


@gluon.constexpr_function
def _less_reference_operands(count):
    return ",".join(["=f"] * count + ["=&f"] * (2 * count) + [str(n) for n in range(count)] + ["f"] * (3 * count))


@gluon.jit
def _less_reference(s, m, factor):
    """``(s', factor', less)`` with scores less m = ``s' * factor' + less``: s as it is, or in a warp with a huge m these differences,
    rounded as in the backward kernels.
    """
    COLUMNS: gl.constexpr = s.shape[1] * 8
    COUNT: gl.constexpr = COLUMNS // 2
    flag = gl.where((gl.abs(m) > SMALL_REFERENCE) & (m != LOWEST), 1.0, 0.0)
    spread_m, s = gl.broadcast(_spread(m, COLUMNS), s)
    factor = gl.full(s.shape, factor, gl.float32, _by_lane(COLUMNS))
    flag, s = gl.broadcast(_spread(flag, COLUMNS), s)
    f32 = gl.float32
    out = gl.inline_asm_elementwise(
        _less_reference_ptx(COUNT), _less_reference_operands(COUNT), [s, spread_m, factor, flag], (f32, f32, f32), True, COUNT
    )
    return out[0], _first(out[1]), _first(out[2])


@gluon.constexpr_function
def _less_shifted_ptx(count):
    """PTX for ``_less_shifted``. Operands: scores, in place, and what is added; scores, m, shifts, flags."""
    less, m, shift, flag = count, 3 * count, 4 * count, 5 * count
    lines = [
        "{ .reg .pred p, q;",
        f"setp.neu.f32 p, ${flag}, 0f00000000;",
        f"setp.neu.or.f32 p, ${flag + 2}, 0f00000000, p;",
        "vote.sync.any.pred q, p, 0xFFFFFFFF;",
        *(f"sub.f32 ${less + row}, ${shift + row}, ${m + row};" for row in (0, 2)),
        "@!q bra.uni SMALL;",
    ]
    for n in range(count):
        row = n // 2 % 2 * 2
        lines += [f"add.f32 ${n}, ${n}, ${shift + row};", f"sub.f32 ${n}, ${n}, ${m + row};"]
    return "\n".join([*lines, *(f"mov.f32 ${less + row}, 0f00000000;" for row in (0, 2)), "SMALL: }"])


@gluon.constexpr_function
def _less_shifted_operands(count):
    return ",".join(["=f"] * count + ["=&f"] * count + [str(n) for n in range(count)] + ["f"] * (3 * count))


@gluon.jit
def _less_shifted(s, m, shift):
    """``(s', less)`` with scores less m = ``s + shift - m = s' + less``: s as it is, or in a warp with a huge m these differences,
    rounded as in the backward kernels.
    """
    COLUMNS: gl.constexpr = s.shape[1] * 8
    COUNT: gl.constexpr = COLUMNS // 2
    flag = gl.where((gl.abs(m) > SMALL_REFERENCE) & (m != LOWEST), 1.0, 0.0)
    m, s = gl.broadcast(_spread(m, COLUMNS), s)
    shift, s = gl.broadcast(_spread(shift, COLUMNS), s)
    flag, s = gl.broadcast(_spread(flag, COLUMNS), s)
    f32 = gl.float32
    out = gl.inline_asm_elementwise(_less_shifted_ptx(COUNT), _less_shifted_operands(COUNT), [s, m, shift, flag], (f32, f32), True, COUNT)
    return out[0], _first(out[1])


@gluon.constexpr_function
def _accumulator_ptx(count):
    lines = [
        "{ .reg .pred p, q;",
        f"setp.neu.f32 p, ${2 * count}, 0f3F800000;",
        f"setp.neu.or.f32 p, ${2 * count + 2}, 0f3F800000, p;",
        "vote.sync.any.pred q, p, 0xFFFFFFFF;",
        "@!q bra.uni SAME;",
        *(f"mul.f32 ${n}, ${n}, ${2 * count + n};" for n in range(count)),
        "SAME: }",
    ]
    return "\n".join(lines)


@gluon.constexpr_function
def _accumulator_operands(count):
    return ",".join(["=f"] * count + [str(n) for n in range(count)] + ["f"] * count)


@gluon.jit
def rescaled_accumulator(o, factor):
    """An accumulator times a factor by lane. Warps whose rows all have factor 1, as nearly always, skip it."""
    COLUMNS: gl.constexpr = o.shape[1]
    COUNT: gl.constexpr = min(COLUMNS // 2, 64)
    factor, o = gl.broadcast(_spread(factor, COLUMNS), _split(o))
    return _joined(gl.inline_asm_elementwise(_accumulator_ptx(COUNT), _accumulator_operands(COUNT), [o, factor], gl.float32, True, COUNT))


@gluon.constexpr_function
def _adds(bias, row_bias, is_mask, alibi):
    """Whether something is added to scores."""
    return bool(alibi) or ((bias is not None or row_bias is not None) and not is_mask)


@gluon.constexpr_function
def _order(bias, row_bias, cap, is_mask, alibi, positive_scale, fusing):
    """When scores are scaled: "late", in one instruction with the power; "fused", so with a 16-bit bias; "early", where what is added may
    be huge, and rounded as in the backward kernels.
    """
    if not _adds(bias, row_bias, is_mask, alibi):
        return "late" if positive_scale or cap is not None else "early"
    narrow = bias is not None and (bias.dtype == gl.bfloat16 or bias.dtype == gl.float16)
    return "fused" if fusing and narrow and positive_scale and cap is None and row_bias is None and not alibi else "early"


@gluon.jit
def _factor(cap, scale_log2):
    """What scores that are scaled late are multiplied by: see ``softcapped``."""
    if cap is not None:
        return 2.0 * cap[1]
    else:
        return scale_log2


@gluon.jit
def _shift(cap, slope, ALIBI: gl.constexpr, COLUMNS: gl.constexpr):
    """What is added to the scores of a query, late, by lane: see ``softcapped`` and ``add_alibi``."""
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(COLUMNS))
    if one_sided(ALIBI):
        return _of_rows(line(0.0, -slope, 64, ROWS), COLUMNS)
    else:
        return _of_rows(gl.full([64], 1.0, gl.float32, ROWS) * cap[1], COLUMNS)


@gluon.jit
def softmax(p, t, s, bias, second, mask_tile, m, n0, MASKED: gl.constexpr, CUT: gl.constexpr):
    """``(scores, p in 16 bits, sums of p, m)`` of the scores s = q k of a block, of the 64 queries of ``t`` and the keys from n0 on; the
    last two by lane.

    bias: a tile or a row of a bias or mask; second: a row of another bias, beside which none is fused; mask_tile: of a mask beside them, in
    its buffer. None: absent. m None: a tile's first block, of
    which m is found. Of other blocks p, its sums and m go to ``rescaled``, which takes the scores. Beside a huge m, sums that are scaled or
    added late come out as NaN, so that ``rescaled`` computes them as the backward kernels do. CUT: a length may end in the block.
    ``p.FUSING``: there are registers to add a 16-bit bias in one instruction with the scale.
    """
    COLUMNS: gl.constexpr = s.shape[1]
    FIRST: gl.constexpr = m is None
    ORDER: gl.constexpr = _order(bias, t.row_bias, p.cap, p.IS_MASK, p.ALIBI, p.POSITIVE_SCALE, p.FUSING and not FIRST)
    LINE: gl.constexpr = one_sided(p.ALIBI) and p.cap is None  # added with the scale, and the other one late
    HUGE: gl.constexpr = ORDER == "fused" or LINE or (ORDER == "late" and p.cap is None)  # whether m may be huge where it must not
    SHIFTED: gl.constexpr = one_sided(p.ALIBI) or (p.cap is not None and ORDER == "late")
    L: gl.constexpr = _by_lane(COLUMNS)
    if p.cap is not None:
        if CUT:  # what a hidden key holds may make NaN of its score, and ``tanh`` of those beside it
            s = mask_band(s, t.m0, n0, t.x.keys, None, None, 64, COLUMNS, "0f00000000")
        s = tanh(s, p.cap)
        if ORDER == "early":
            s = softcapped(s, p.cap)
    elif LINE:
        j = n0 + gl.arange(0, COLUMNS, gl.SliceLayout(0, accumulator(COLUMNS)))
        s = scaled(s, p.scale_log2, gl.expand_dims(line_of_keys(t.slope, j, t.m0, t.x.diagonal, COLUMNS), 0))
    elif ORDER == "early" and not p.ALIBI and _adds(bias, t.row_bias, p.IS_MASK, p.ALIBI):
        s = s * p.scale_log2
    elif ORDER == "early":
        s = rounded(s, p.scale_log2)
    if bias is not None and p.IS_MASK:
        s = mask_scores(s, bias)
    elif bias is not None and ORDER == "early":
        bias32, s = gl.broadcast(widened(bias), s)
        s = gl.fma(bias32, gl.full([64, COLUMNS], LOG2E, gl.float32, accumulator(COLUMNS)), s)
    if second is not None:
        s = add_bias(s, second, False)
    if mask_tile is not None:
        s = mask_by_tile(s, mask_tile, 64, COLUMNS)
    if t.row_bias is not None:
        row, s = gl.broadcast(gl.expand_dims(t.row_bias, 1), s)
        if p.IS_MASK:
            s = gl.where(row != 0, s, float("-inf"))
        else:
            s = gl.fma(row, gl.full([64, COLUMNS], LOG2E, gl.float32, accumulator(COLUMNS)), s)
    if p.ALIBI and not LINE:
        s = add_alibi(s, t.slope, n0 - t.m0 - t.x.diagonal, 1, p.ALIBI)
    if MASKED:
        s = mask_band(s, t.m0, n0, t.x.keys, t.x.lo, t.x.hi, 64, COLUMNS, "0fFF800000")
    s = _split(s)
    if FIRST:
        top = gl.max(gl.max(s, 3), 1)
        if ORDER == "late":
            top = top * _factor(p.cap, p.scale_log2)
        if SHIFTED:
            top = top + _shift(p.cap, t.slope, p.ALIBI, COLUMNS)
        m = _of_rows(gl.maximum(gl.max(top, 1), LOWEST), COLUMNS)
    less = -m
    if SHIFTED:
        less = _shift(p.cap, t.slope, p.ALIBI, COLUMNS) - m
    if LINE and FIRST:
        s, less = _less_shifted(s, m, _shift(p.cap, t.slope, p.ALIBI, COLUMNS))
    elif HUGE and FIRST:
        s, factor, less = _less_reference(s, m, p.scale_log2)
    elif HUGE:
        less = gl.where(gl.abs(m) > SMALL_REFERENCE, gl.where(m == LOWEST, -LOWEST, float("nan")), less)
    if ORDER == "fused":
        less, s = gl.broadcast(_spread(less, COLUMNS), s)
        bias32, _s = gl.broadcast(widened(bias), _joined(s))
        weights = gl.exp2(s * p.scale_log2 + gl.fma(_split(bias32), gl.full(s.shape, LOG2E, gl.float32, L), less))
    elif HUGE and FIRST and not LINE:
        weights = gl.exp2(s * _spread(factor, COLUMNS) + _spread(less, COLUMNS))
    elif ORDER == "late":
        weights = gl.exp2(s * _factor(p.cap, p.scale_log2) + _spread(less, COLUMNS))
    else:
        weights = gl.exp2(s + _spread(less, COLUMNS))
    return s, _joined(weights).to(p.q_s.first.dtype), gl.sum(gl.sum(weights, 3), 1), m


@gluon.jit
def rescaled(p, t, s, p16, l, m, bias):
    """``(p, its sums, m, factor)`` of what ``softmax`` gives: as it is with factor 1, or for a warp whose sums are too large, with a new m
    and the factor by which earlier sums shrink.
    """
    COLUMNS: gl.constexpr = s.shape[1] * 8
    ORDER: gl.constexpr = _order(bias, t.row_bias, p.cap, p.IS_MASK, p.ALIBI, p.POSITIVE_SCALE, p.FUSING)
    if ORDER == "fused":
        bias, _s = gl.broadcast(bias, _joined(s))
        return _rescale(s, p16, l, m, p.scale_log2, None, bias)
    elif ORDER == "late" and p.cap is not None:
        return _rescale(s, p16, l, m, _factor(p.cap, p.scale_log2), _shift(p.cap, t.slope, p.ALIBI, COLUMNS), None)
    elif ORDER == "late":
        return _rescale(s, p16, l, m, _factor(p.cap, p.scale_log2), None, None)
    elif one_sided(p.ALIBI):
        return _rescale(s, p16, l, m, None, _shift(p.cap, t.slope, p.ALIBI, COLUMNS), None)
    else:
        return _rescale(s, p16, l, m, None, None, None)
