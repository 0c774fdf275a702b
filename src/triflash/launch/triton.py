"""Arguments and launches of the portable Triton kernels. Called by ``launch/__init__.py`` when a plan needs it: it imports triton.

They turn a plan and tensors, which may be meta tensors, into :class:`Call` values and start none; a :class:`~.room.Room` gives the memory.
The ahead-of-time tests compile the very same calls for GPUs that are not here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dropout import rescale, threshold
from ..kernels.triton import dbias as dbias_kernels
from ..kernels.triton.features import Features
from ..plan import layout
from ..plan.configs import OWNERS_OF_KEYS
from ..plan.steps import Plan, Step
from ..spec import AttentionSpec, BiasSpec, Gradients, Operands, Saved
from .calls import Call, bias_strides, lengths_stride, slope_strides
from .common import bias_given, config_of, constants_of, is_wide
from .few import backward_call as few_backward_call
from .few import dq_parts, row_strides, sum_rows_call
from .few import forward_calls as few_forward_calls
from .few import partial_sums as sums_of
from .packed import backward_calls as packed_backward_calls
from .packed import forward_calls as packed_forward_calls
from .packed import in_line, packed_features
from .portable import BackwardPass, Rows, dbias_sum_call, delta_call, dkdv_call, dq_call, forward_call, input_strides
from .room import Room
from .short import backward_call as short_backward_call
from .short import forward_calls as short_forward_calls

__all__ = [
    "backward", "backward_calls", "contiguous", "features_of", "forward", "forward_calls", "partial_sums", "row_strides", "rows", "scratch",
]  # fmt: skip

_NO_FEATURES = Features()


_NOT_CONTIGUOUS = "its last dim is not contiguous"
_BIAS_REASON = f"its rows are not a multiple of {layout.BIAS_STRIDE} elements apart, or do not start at 16 bytes"


def forward(room: Room, plan: Plan, spec: AttentionSpec, x: Operands, saved: Saved) -> list[Call]:
    """The launches that fill out, lse and, if given, rest. Every tensor is canonical (``spec.spec_of``); the outputs are contiguous."""
    x = _ready(room, x)
    if spec.packed is not None:
        return packed_forward_calls(room, plan, spec, x, features_of(spec, x), saved)
    if plan.step("few_forward") is not None:
        return few_forward_calls(room, plan, spec, x, features_of(spec, x), saved)
    if plan.step("short_forward") is not None:
        return short_forward_calls(plan, spec, x, features_of(spec, x), saved)
    return forward_calls(plan, spec, x, saved)


def backward(
    room: Room, plan: Plan, spec: AttentionSpec, x: Operands, saved: Saved, dout: Tensor, dlse: Tensor | None, grads: Gradients
) -> list[Call]:
    """The launches that fill those of dq, dk, dv, dbias, dsink, dsecond that are given, of any strides."""
    if spec.is_empty or spec.no_sequences:
        for grad in (*grads[:4], grads.dsecond):
            if grad is not None:
                room.fill_zero(grad)
        _sum_sink(room, x, saved, dlse, grads, -1.0)
        return []
    out, lse, rest = saved
    lse = lse if lse.stride(2) == 1 or lse.shape[2] == 1 else contiguous(room, "lse", lse, _NOT_CONTIGUOUS)
    rest = rest if rest is None or rest.is_contiguous() else contiguous(room, "rest", rest, "it is not contiguous")
    saved = Saved(rows(room, "out", out), lse, rest)
    # Kernels write rows whose last dim is contiguous, and a contiguous dbias; what is laid out otherwise is filled by way of a copy.
    dq, dk, dv = (None if grad is None else _writable(room, name, grad) for name, grad in zip(("dq", "dk", "dv"), grads, strict=False))
    dbias, dsecond = (
        room.target(name, grad.shape, grad.dtype, grad, "it is not contiguous") if grad is not None and not grad.is_contiguous() else grad
        for name, grad in (("dbias", grads.dbias), ("dsecond", grads.dsecond))
    )
    delta = scratch(room, plan, saved)
    written = Gradients(dq, dk, dv, dbias, dsecond=dsecond)
    calls = backward_calls(room, plan, spec, _ready(room, x), saved, rows(room, "dout", dout), dlse, delta, written)
    _sum_sink(room, x, saved, delta, grads, 1.0)
    return calls


def scratch(room: Room, plan: Plan, saved: Saved) -> Tensor | None:
    """Where a backward plan puts delta, for what comes after: kernels that read it, or the gradient of a sink."""
    short = plan.step("short_backward")
    wanted = plan.step("delta") is not None
    wanted = wanted or (short is not None and ("dsink" in short.gives or plan.step("dbias") is not None))
    return room.new("delta", saved.lse.shape, saved.lse.dtype) if wanted else None


def _sum_sink(room: Room, x: Operands, saved: Saved, delta: Tensor | None, grads: Gradients, factor: float) -> None:
    if grads.dsink is not None and x.sink is not None:
        if delta is None:
            room.fill_zero(grads.dsink)
        else:
            room.sum_sink(grads.dsink, x.sink, saved, delta, factor)


def forward_calls(plan: Plan, spec: AttentionSpec, x: Operands, saved: Saved) -> list[Call]:
    """The launches of a forward pass."""
    return [forward_call(step, spec, x, features_of(spec, x), saved, _rows_of(spec)) for step in plan.steps]


def backward_calls(
    room: Room,
    plan: Plan,
    spec: AttentionSpec,
    x: Operands,
    saved: Saved,
    dout: Tensor,
    dlse: Tensor | None,
    delta: Tensor | None,
    grads: Gradients,
) -> list[Call]:
    """The launches of a backward pass, of which the first fills ``delta`` (:func:`scratch`)."""
    if spec.packed is not None:
        return packed_backward_calls(room, plan, spec, x, features_of(spec, x), saved, dout, dlse, delta, grads)
    q, k, v, bias, mask, *_ = x
    dq, dk, dv, *_ = grads
    wide = is_wide((q, k, v, saved.out, dout, bias, mask, dq, dk, dv, x.second_bias))
    p = _Pass(room, spec, x, features_of(spec, x), saved, dout, dlse, delta, grads, wide, {}, _rows_of(spec))
    return [_BACKWARD[step.kernel](step, p) for step in plan.steps]


@dataclass(frozen=True)
class _Pass(BackwardPass):
    """Of a dense batch, with where its rows are."""

    rows: Rows


def _delta(step: Step, p: _Pass) -> Call:
    f = _NO_FEATURES
    if p.spec.query_starts or p.spec.query_lengths:
        f = f._replace(**{name: own for name, own in _places(p.spec, p.x).items() if name == "placed" or name.startswith("query_")})
    return delta_call(step, p.spec, p.saved.out, p.dout, p.dlse, p.delta, f, p.wide)


def _dkdv(step: Step, p: _Pass) -> Call:
    name, target = bias_given(step, p.grads)
    parts = p.sums[name] = partial_sums(p.room, step, target)
    strides = row_strides(p.spec, parts) if parts is not None else None
    dk, dv = (grad if name in step.gives else None for name, grad in (("dk", p.grads.dk), ("dv", p.grads.dv)))
    return dkdv_call(step, p.spec, p.inputs, p.rows, (dk, dv, parts), strides, p.wide)


def _dq(step: Step, p: _Pass) -> Call:
    _, target = bias_given(step, p.grads)
    dq = p.grads.dq
    strides: tuple[int, ...] | None = _strides(dq)
    if step.splits > 1 and dq is not None:
        dq, strides = dq_parts(p.room, step.splits, dq)
        p.sums["dq"] = dq
    return dq_call(step, p.spec, p.inputs, p.rows, (dq, target), strides, p.wide)


def _dbias(step: Step, p: _Pass) -> Call:
    spec, config = p.spec, config_of(step)
    name, target = bias_given(step, p.grads)
    bias = spec.second if name == "dsecond" else spec.bias
    parts = p.sums[name] = partial_sums(p.room, step, target)
    assert parts is not None and bias is not None
    sizes = (spec.heads, spec.groups, spec.batch_outer, spec.batch_inner, spec.queries, spec.keys)
    parts_strides = (parts.stride(0), *bias_strides(parts[0]))  # type: ignore[misc]
    args = (*p.inputs, parts, *input_strides(p.inputs, p.rows), parts_strides, *sizes, spec.lo, spec.hi, spec.scale, step.splits)
    varies = dict(zip(("VARIES_B0", "VARIES_B1", "VARIES_H", "VARIES_M", "VARIES_N"), bias.varies, strict=True))
    return Call(dbias_kernels.dbias, args, constants_of(spec, config, p.wide, step.precision) | varies, config, step.programs)


# How a backward pass launches each kernel of its plan.
_BACKWARD: dict[str, Callable[[Step, _Pass], Call]] = {
    "delta": _delta,
    "short_backward": lambda step, p: short_backward_call(p.room, step, p.spec, p.x, p.inputs, p.saved.out, p.dlse, p.grads, p.sums),
    "few_backward": lambda step, p: few_backward_call(p.room, step, p.spec, p.x, p.inputs, p.grads, p.sums),
    **dict.fromkeys(OWNERS_OF_KEYS, _dkdv),
    "dq": _dq,
    "sum_rows": lambda step, p: sum_rows_call(step, p.spec, p.sums["dq"], p.grads.dq),
    "dbias": _dbias,
    "dbias_sum": lambda step, p: dbias_sum_call(step, p.grads, p.sums),
}


def features_of(spec: AttentionSpec, x: Operands) -> Features:
    """Everything beyond q, k, v and a band, as the kernels take it."""
    placed = spec.placed or spec.diagonal
    if all(each is None for each in x[3:9]) and not spec.softcap and not placed:
        return _NO_FEATURES
    bias, bias_spec, mask, mask_spec = x.bias, spec.bias, x.mask, spec.mask
    if bias_spec is not None and bias_spec.is_mask:
        bias, bias_spec, mask, mask_spec = None, None, bias, bias_spec
    slopes, sink = x.alibi_slopes, x.sink
    dropped = {"seed": x.dropout_seed, "threshold": threshold(spec.dropout), "rescale": rescale(spec.dropout)} if spec.dropout else {}
    if spec.dropout_place:
        dropped["dropout_placed"] = 1
    f = Features(
        bias=bias,
        bias_strides=_varying_strides(bias, bias_spec),
        second=x.second_bias,
        second_strides=_varying_strides(x.second_bias, spec.second),
        mask=None if mask is None else mask.view(torch.uint8),  # Triton has no loads of single bits
        mask_strides=_varying_strides(mask, mask_spec),
        lengths=x.key_lengths,
        lengths_stride=None if x.key_lengths is None else lengths_stride(x.key_lengths),
        slopes=slopes,
        slope_strides=slope_strides(slopes),
        sink=sink,
        sink_stride=None if sink is None else sink.stride(0),
        softcap=spec.softcap or None,
        **dropped,
        **_places(spec, x),
    )
    return f if spec.packed is None else packed_features(spec, x, f)


def _places(spec: AttentionSpec, x: Operands) -> dict[str, Any]:
    """Which queries and keys of each batch entry there are, and where they stand."""
    found: dict[str, Any] = {"placed": 1 if spec.placed else None, "shift": spec.shift}
    given = {"query_starts": x.query_starts, "query_lengths": x.query_lengths, "key_starts": x.key_starts}
    if spec.diagonal:
        given["diagonals"] = x.diagonal
    for name, own in given.items():
        if own is not None:
            found |= {name: own, f"{name}_stride": lengths_stride(own)}
    return found


def _varying_strides(bias: Tensor | None, spec: BiasSpec | None) -> tuple[int | None, ...] | None:
    """Strides of a canonical bias or mask: 0 along batch and head dims, None along queries and keys, that it broadcasts."""
    strides = bias_strides(bias)
    if strides is None or spec is None:
        return None
    return (*strides[:3], *(stride if on else None for stride, on in zip(strides[3:], spec.varies[3:], strict=True)))


def partial_sums(room: Room, step: Step, dbias: Tensor | None) -> Tensor | None:
    """Where a kernel writes the gradient of a bias, of which ``step`` gives one."""
    if dbias is None:
        return None
    name = next(name for name in step.gives if name in ("dbias", "dsecond"))
    return sums_of(room, name, step.splits, dbias)


def _ready(room: Room, x: Operands) -> Operands:
    """The operands with copies in place of those that the kernels cannot read as they lie."""
    q, k, v = (rows(room, name, each) for name, each in zip("qkv", x[:3], strict=True))
    bias, second, mask = (
        _vectorisable(room, name, each) for name, each in (("bias", x.bias), ("second bias", x.second_bias), ("mask", x.mask))
    )
    found = (q, k, v, bias, mask, second)
    if not all(map(operator.is_, found, (*x[:5], x.second_bias))):
        x = x._replace(q=q, k=k, v=v, bias=bias, mask=mask, second_bias=second)
    return in_line(room, x)


def rows(room: Room, name: str, x: Tensor) -> Tensor:
    """x itself if its last dim is contiguous, else a copy."""
    return contiguous(room, name, x, _NOT_CONTIGUOUS) if layout.copies_rows(x.size(-1), x.stride(-1)) else x


def contiguous(room: Room, name: str, x: Tensor, reason: str) -> Tensor:
    """A contiguous copy of x."""
    return room.copied(name, x, room.new(name, x.shape, x.dtype), reason)


def _writable(room: Room, name: str, grad: Tensor) -> Tensor:
    if not layout.copies_rows(grad.size(-1), grad.stride(-1)):
        return grad
    return room.target(name, grad.shape, grad.dtype, grad, _NOT_CONTIGUOUS)


def _vectorisable(room: Room, name: str, bias: Tensor | None) -> Tensor | None:
    """The bias itself, or where ``layout.copies_bias`` says so a copy with padded rows.

    The copy has the size of the bias (expanded dims are not materialised) and lives as long as the launches.
    """
    if bias is None or not room.gpu:
        return bias
    shape, strides = bias.shape, bias.stride()
    if not layout.copies_bias(shape, strides, bias.data_ptr()):
        return bias
    stored = bias[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]
    copy = room.new(name, layout.copied_bias_shape(shape, strides), bias.dtype)[..., : stored.shape[4]]
    return room.copied(name, stored, copy, _BIAS_REASON).expand(shape)


def _strides(x: Tensor | None) -> tuple[int, int, int] | None:
    """(batch, row, head) strides of a (B, L, H, D) tensor."""
    return None if x is None else x.stride()[:3]  # type: ignore[return-value]


def _rows_of(spec: AttentionSpec) -> Rows:
    """How rows of a dense batch are found."""
    return Rows(_strides, lambda lse: lse.stride()[:2], spec.batch, spec.batch_inner, None)
