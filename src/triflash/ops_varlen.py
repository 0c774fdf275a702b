"""The operators of packed sequences, for what traces; eager calls take :class:`~triflash.ops.Attention`. Called by ``door.py``.

``triflash::varlen_forward``   (tensors, options) -> (out, lse, rest), differentiable
``triflash::varlen_backward``  (dout, dlse, out, lse, rest, needs, tensors, options) -> (dq, dk, dv, dbias, dsink, dsecond), empty where
not needed
``triflash::varlen_backward_`` (dout, out, lse, dq, dk, dv, tensors, options): the first three, filling the tensors it is given

Tensors and options are the fields of :class:`VarlenTensors` and :class:`VarlenOptions`; every tensor is as the caller of
:func:`triflash.attention_varlen` gave it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bound.call import BoundCall
from .bound.signature import CALLS, ambient, describe
from .derivatives import differentiable, differentiable_once, keep_nothing, refuse_second, underivable
from .flops import register_varlen_formulas
from .form import Form
from .launch.room import twin
from .ops import kept
from .plan.device import DeviceFacts
from .saved import check_gradients, check_saved
from .spec import Saved, keeps_rest, packed_spec_of

__all__ = ["VarlenOptions", "VarlenTensors", "backward_of", "bind_varlen", "varlen_backward", "varlen_backward_", "varlen_forward"]


class VarlenTensors(NamedTuple):
    """The tensors of a call: those of :class:`~triflash.spec.Operands`, less key lengths."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None
    alibi_slopes: Tensor | None
    sink: Tensor | None
    dropout_seed: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    second_bias: Tensor | None

    @property
    def given(self) -> tuple[Tensor | None, ...]:
        """In the order of :class:`~triflash.spec.Operands`."""
        return (*self[:5], None, *self[5:])


class VarlenOptions(NamedTuple):
    """What is no tensor, as :func:`~triflash.spec.packed_spec_of` takes it."""

    left: int | None
    right: int | None
    bottom_right: bool
    scale: float
    precision: str
    bias_layout: str
    mask_layout: str
    softcap: float
    dropout_p: float
    deterministic: bool
    longest_q: int | None
    longest_k: int | None
    backend: str


_COUNT = len(VarlenTensors._fields)
_WANTED = tuple(VarlenTensors._fields.index(name) for name in ("q", "k", "v", "bias", "sink", "second_bias"))
_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sink, Tensor? dropout_seed, "
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, Tensor? second_bias"
)
_OPTIONS = (
    "SymInt? left, SymInt? right, bool bottom_right, float scale, str precision, str bias_layout, str mask_layout, float softcap, "
    "float dropout_p, bool deterministic, SymInt? longest_q, SymInt? longest_k, str backend"
)

_library = torch.library.Library("triflash", "FRAGMENT")
_library.define(f"varlen_forward({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"varlen_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor? rest, bool[] needs, {_TENSORS}, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"varlen_backward_(Tensor dout, Tensor out, Tensor lse, Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, {_TENSORS}, {_OPTIONS}) -> ()"
)


def bind_varlen(
    tensors: VarlenTensors, options: VarlenOptions, facts: DeviceFacts, device: torch.device, contiguous: bool = False
) -> BoundCall:
    """What a call would run on a device; no tensor's memory is read. contiguous: so are the gradients of q, k and v."""
    form = Form((), 0, contiguous=contiguous, layouts=(options.bias_layout, options.mask_layout))
    twins = [None if x is None else twin(x) for x in tensors.given]
    if tensors.bias is None:  # a mask alone is a bias, and its layout that of one
        options = options._replace(bias_layout=options.mask_layout)
    spec = packed_spec_of(form.operands(twins), *options[:-1])
    return BoundCall(form, twins, spec, facts, options.backend, device, backward_of)


def _bound(tensors: VarlenTensors, options: VarlenOptions) -> BoundCall:
    facts, around = ambient(tensors.q)
    key = ("varlen operator", tuple([describe(x) for x in tensors]), options, tuple(map(type, options)), around)
    call = CALLS.get(key)
    if call is None:
        call = bind_varlen(tensors, options, facts, tensors.q.device, contiguous=True)  # as the fake kernel says
        CALLS.add(key, call)
    return call


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors = VarlenTensors(*args[:_COUNT])
    out, lse, *lost = _bound(tensors, VarlenOptions(*args[_COUNT:])).run_forward(tensors.given)
    return out, lse, lost[0] if lost else tensors.q.new_empty(0, dtype=torch.float32)


def _backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, rest: Tensor | None, needs: Sequence[bool], *args: Any
) -> tuple[Tensor, ...]:
    tensors = VarlenTensors(*args[:_COUNT])
    saved = [x for x in (out, lse, kept(rest)) if x is not None]
    grads = _bound(tensors, VarlenOptions(*args[_COUNT:])).run_backward(tensors.given, saved, dout, dlse, tuple(needs))
    return tuple(tensors.q.new_empty(0) if grad is None else grad for grad in grads)


def _backward_(dout: Tensor, out: Tensor, lse: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, *args: Any) -> None:
    tensors = VarlenTensors(*args[:_COUNT])
    q, k, v = tensors[:3]
    check_saved(q[None], v[None], dout[None], None, Saved(out[None], lse[None], None))
    check_gradients({"q": q, "k": k, "v": v}, {"dq": dq, "dk": dk, "dv": dv}, {"dout": dout, "out": out})
    into = (dq, dk, dv, None, None, None)
    needs = tuple(grad is not None for grad in into)
    _bound(tensors, VarlenOptions(*args[_COUNT:])).run_backward(tensors.given, (out, lse), dout, None, needs, into)


def _fake_backward_(*_: Any) -> None:
    return None


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    t, options = VarlenTensors(*args[:_COUNT]), VarlenOptions(*args[_COUNT:])
    q = t.q
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    rest = keeps_rest(None if t.bias is None else t.bias.dtype, t.alibi_slopes is not None, options.softcap)
    lost = q.new_empty((1, *lse.shape) if rest else 0, dtype=torch.float32)
    return q.new_empty(q.shape[0], q.shape[1], t.v.shape[2]), lse, lost


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, rest: Tensor | None, needs: Sequence[bool], *args: Any
) -> tuple[Tensor, ...]:
    wanted = [args[at] if need else None for at, need in zip(_WANTED, needs, strict=True)]
    return tuple(dout.new_empty(0) if x is None else x.new_empty(x.shape) for x in wanted)


def _keep(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*args[:_COUNT], *output)
    ctx.options = args[_COUNT:]


def _give(ctx: Any, wants: Sequence[bool], dout: Tensor | None, dlse: Tensor | None, _: Any) -> list[Tensor | None]:
    *tensors, out, lse, rest = ctx.saved_tensors
    result: list[Tensor | None] = [None] * len(wants)
    needs = [bool(wants[at]) for at in _WANTED]
    if (dout is None and dlse is None) or not any(needs):
        return result
    if dout is None:
        dout = torch.zeros_like(out)
    with torch.no_grad():
        grads = varlen_backward(dout, dlse, out, lse, rest, needs, *tensors, *ctx.options)
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    for at, grad in zip(_WANTED, differentiable_once(wanted, (dout, dlse, *tensors)), strict=True):
        result[at] = grad
    return result


def backward_of(
    call: BoundCall, given: Sequence[Tensor | None], outputs: Sequence[Tensor], dout: Tensor, dlse: Tensor | None, needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients of an eager call by the operator."""
    spec, packed, layouts = call.spec, call.spec.packed, call.form.layouts
    assert packed is not None and layouts is not None
    options = VarlenOptions(
        None if spec.lo is None else -spec.lo, spec.hi, packed.bottom_right, spec.scale, spec.precision, *layouts, spec.softcap,
        spec.dropout, spec.deterministic, packed.longest_q, packed.longest_k, call.backend,
    )  # fmt: skip
    out, lse, *rest = call.separate(outputs)
    assert out is not None
    lost = rest[0] if rest else out.new_empty(0, dtype=torch.float32)
    grads = varlen_backward(dout, dlse, out, lse, lost, list(needs), *given[:5], *given[6:], *options)
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


for _name, _fn, _fake in (
    ("varlen_forward", _forward, _fake_forward),
    ("varlen_backward", _backward, _fake_backward),
    ("varlen_backward_", _backward_, _fake_backward_),
):
    _library.impl(_name, _fn, "CompositeExplicitAutograd")
    torch.library.register_fake(f"triflash::{_name}", _fake, lib=_library)

varlen_forward = torch.ops.triflash.varlen_forward.default
varlen_backward = torch.ops.triflash.varlen_backward.default
varlen_backward_ = torch.ops.triflash.varlen_backward_.default
differentiable(_library, varlen_forward, _forward, _keep, _give)
differentiable(_library, varlen_backward, _backward, keep_nothing, refuse_second)
underivable(_library, varlen_backward_, _backward_)
register_varlen_formulas(torch.ops.triflash.varlen_forward, torch.ops.triflash.varlen_backward, torch.ops.triflash.varlen_backward_)
