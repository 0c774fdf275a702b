"""The torch.library operators: schemas, fakes and autograd. The only module that knows autograd; called by the public faces.

``triflash::forward``   (q, k, v, bias, …) -> (out, lse, rest), differentiable; rest is what lse, a float32, lost of a huge one
``triflash::backward``  (dout, dlse, q, k, v, bias, out, lse, rest, …, needs, …) -> (dq, dk, dv, dbias, dsink), empty where not needed
``triflash::backward_`` the same, filling the tensors it is given

They take canonical tensors (see ``spec.spec_of``) and run for every device: the plan picks the kernels. The requested backend travels as
an argument, so that the backward pass, which may run on another thread after the ``with backend(...)`` block has ended, uses the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import UnsupportedError, bad_value
from .flops import register_formulas
from .launch import run_backward, run_forward
from .plan.device import facts_of
from .plan.select import plan_backward, plan_forward
from .spec import AttentionSpec, Gradients, Operands, Saved, check_gradients, check_saved, keeps_rest, spec_of

__all__ = ["attention_backward", "attention_backward_", "attention_forward", "differentiable_once"]

_OPTIONS = "SymInt batch_inner, SymInt? lo, SymInt? hi, float scale, str precision, str backend"
_MORE = (
    "Tensor? mask=None, Tensor? key_lengths=None, Tensor? alibi_slopes=None, Tensor? sink=None, Tensor? dropout_seed=None, "
    "float softcap=0.0, float dropout_p=0.0, bool deterministic=False"
)
_SAVED = "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse, Tensor? rest"
_GIVEN = "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor(d!)? dbias"

_library = torch.library.Library("triflash", "DEF")
_library.define(f"forward(Tensor q, Tensor k, Tensor v, Tensor? bias, {_OPTIONS}, {_MORE}) -> (Tensor, Tensor, Tensor)")
_library.define(f"backward({_SAVED}, {_OPTIONS}, bool[] needs, {_MORE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define(f"backward_({_SAVED}, {_OPTIONS}, {_GIVEN}, {_MORE}, Tensor(e!)? dsink=None) -> ()")


class _Options(NamedTuple):
    """The operators' arguments after the bias (forward) and rest (backward), in order. PyTorch leaves out trailing defaults."""

    batch_inner: int
    lo: int | None
    hi: int | None
    scale: float
    precision: str
    backend: str
    mask: Tensor | None = None
    key_lengths: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sink: Tensor | None = None
    dropout_seed: Tensor | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    deterministic: bool = False


_BEFORE_MORE = 6  # options before mask
_SINK = 4 + _Options._fields.index("sink")  # its place among the arguments of forward


def _operands(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: _Options) -> Operands:
    mask = options.mask
    if bias is None and mask is not None:  # one mask alone is one more kind of bias
        bias, mask = mask, None
    return Operands(q, k, v, bias, mask, options.key_lengths, options.alibi_slopes, options.sink, options.dropout_seed)


def _spec(x: Operands, options: _Options) -> AttentionSpec:
    more: Any = (*x[4:], options.softcap, options.dropout_p, options.deterministic)
    return spec_of(*x[:4], options.batch_inner, options.lo, options.hi, options.scale, options.precision, *more)


def _allocate_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, heads, _dim = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(batch, heads, queries, dtype=lse_dtype)
    options = _Options(*rest)
    kept = keeps_rest(None if bias is None else bias.dtype, options.alibi_slopes is not None, options.softcap)
    lost = q.new_empty(lse.shape if kept else 0, dtype=torch.float32)
    return q.new_empty(batch, queries, heads, v.shape[3]), lse, lost


def _allocate_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, *options, needs = rest[: _BEFORE_MORE + 2]
    sink = _Options(*options, *rest[_BEFORE_MORE + 2 :]).sink
    wanted = [x if need else None for x, need in zip((q, k, v, bias, sink), _all_needs(needs), strict=True)]
    dq, dk, dv, dbias, dsink = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in wanted)
    return dq, dk, dv, dbias, dsink


def _all_needs(needs: Sequence[bool]) -> list[bool]:
    """Whether dq, dk, dv, dbias and dsink are wanted; the last may be left out."""
    if not 4 <= len(needs) <= 5:
        raise bad_value("needs", "4 or 5 of them: of q, k, v, bias and sink", list(needs))
    return [*needs, False][:5]


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    options = _Options(*rest)
    operands = _operands(q, k, v, bias, options)
    spec = _spec(operands, options)
    plan = plan_forward(spec, facts_of(q.device), options.backend)
    out, lse, lost = _allocate_forward(q, k, v, bias, *rest)
    run_forward(plan, spec, operands, Saved(out, lse, _kept(lost)))
    return out, lse, lost


def _kept(rest: Tensor | None) -> Tensor | None:
    """The forward operator returns a tensor of one dim, empty, where there is no rest to keep."""
    return None if rest is None or rest.dim() == 1 else rest


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    saved, options, more = args[:9], args[9 : 9 + _BEFORE_MORE], args[10 + _BEFORE_MORE :]
    needs, bias, sink = _all_needs(args[9 + _BEFORE_MORE]), args[5], _Options(*options, *more).sink
    if needs[3] and (bias is None or bias.dtype == torch.bool):
        raise bad_value("needs", "False for a bias that is absent or a mask", needs)
    if needs[4] and sink is None:
        raise bad_value("needs", "False for a sink that is absent", needs)
    grads = _allocate_backward(*args)
    *given, dsink = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    more = _Options(*options, *more)[_BEFORE_MORE:]
    _backward_(*saved, *options, *given, *more, dsink)
    return grads


def _backward_(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, *args: Any
) -> None:
    rest, *args = args  # type: ignore[assignment]
    given, more = args[_BEFORE_MORE : _BEFORE_MORE + 4], args[_BEFORE_MORE + 4 :]
    count = len(_Options._fields) - _BEFORE_MORE
    options = _Options(*args[:_BEFORE_MORE], *more[:count])
    grads = Gradients(*given, *more[count:])
    x = _operands(q, k, v, bias, options)
    spec = _spec(x, options)
    saved = Saved(out, lse, _kept(rest))
    check_saved(q, v, dout, dlse, saved)
    inputs = {"q": x.q, "k": x.k, "v": x.v, "bias": x.bias, "sink": x.sink}
    check_gradients(inputs, grads._asdict(), {"dout": dout, "out": out})
    plan = plan_backward(spec, grads.needs, facts_of(q.device), options.backend)
    run_backward(plan, spec, x, saved, dout, dlse, grads)


def _fake_backward_(*_: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, bias, *rest = inputs
    out, lse, lost = output
    options = _Options(*rest)
    ctx.mark_non_differentiable(lost)
    tensors = options[_BEFORE_MORE : _BEFORE_MORE + 5]
    ctx.save_for_backward(q, k, v, bias, *tensors, out, lse, lost)
    ctx.options = (*options[:_BEFORE_MORE], *(None for _ in tensors), *options[_BEFORE_MORE + 5 :])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, bias, *tensors, out, lse, rest = ctx.saved_tensors
    wants = ctx.needs_input_grad
    needs = [*map(bool, wants[:4]), len(wants) > _SINK and bool(wants[_SINK])]
    result: list[Tensor | None] = [None] * len(wants)
    if (dout is None and dlse is None) or not any(needs):
        return tuple(result)
    if dout is None:
        dout = torch.zeros_like(out)
    options, more = ctx.options[:_BEFORE_MORE], ctx.options[_BEFORE_MORE + 5 :]
    with torch.no_grad():
        grads = attention_backward(dout, dlse, q, k, v, bias, out, lse, rest, *options, needs, *tensors, *more)
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    *result[:4], dsink = differentiable_once(wanted, (dout, dlse, q, k, v, bias, *tensors))
    if len(wants) > _SINK:
        result[_SINK] = dsink
    return tuple(result)


class _NoSecondDerivative(torch.autograd.Function):
    """Passes gradients through, tied to what they depend on, so that differentiating them again raises instead of counting as zero."""

    @staticmethod
    def forward(ctx: Any, count: int, *gradients_and_inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in gradients_and_inputs[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(
            "second derivative of attention (create_graph=True): no backend has one; triflash.oracle.attention can be "
            "differentiated any number of times"
        )


def differentiable_once(grads: list[Tensor | None], inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients as a backward pass returns them. With ``create_graph=True`` (gradients on) they depend on ``inputs``, visibly."""
    if not torch.is_grad_enabled():
        return tuple(grads)
    tied: tuple[Tensor | None, ...] = _NoSecondDerivative.apply(len(grads), *grads, *inputs)
    return tied


for _name, _fn, _fake in (
    ("forward", _forward, _allocate_forward),
    ("backward", _backward, _allocate_backward),
    ("backward_", _backward_, _fake_backward_),
):
    _library.impl(_name, _fn, "CompositeExplicitAutograd")
    torch.library.register_fake(f"triflash::{_name}", _fake, lib=_library)
torch.library.register_autograd("triflash::forward", _autograd_backward, setup_context=_setup_context, lib=_library)

register_formulas(torch.ops.triflash.forward, torch.ops.triflash.backward, torch.ops.triflash.backward_)

attention_forward = torch.ops.triflash.forward.default
attention_backward = torch.ops.triflash.backward.default
attention_backward_ = torch.ops.triflash.backward_.default
