"""The torch.library operators: schemas, fakes and autograd. The only module that knows autograd; called by the public faces.

``triflash::forward``   (q, k, v, bias, …) -> (out, lse, rest), differentiable; rest is what lse, a float32, lost of a huge one
``triflash::backward``  (dout, dlse, q, k, v, bias, out, lse, rest, …, needs) -> (dq, dk, dv, dbias), empty where not needed
``triflash::backward_`` the same, filling the tensors it is given

They take canonical tensors (see ``spec.spec_of``) and run for every device: the plan picks the kernels. The requested backend travels as
an argument, so that the backward pass, which may run on another thread after the ``with backend(...)`` block has ended, uses the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedError, bad_value
from .launch import run_backward, run_forward
from .plan.device import facts_of
from .plan.select import plan_backward, plan_forward
from .spec import Needs, check_gradients, check_saved, keeps_rest, spec_of

__all__ = ["attention_backward", "attention_backward_", "attention_forward", "differentiable_once"]

_OPTIONS = "SymInt batch_inner, SymInt? lo, SymInt? hi, float scale, str precision, str backend"
_SAVED = "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse, Tensor? rest"

_library = torch.library.Library("triflash", "DEF")
_library.define(f"forward(Tensor q, Tensor k, Tensor v, Tensor? bias, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
_library.define(f"backward({_SAVED}, {_OPTIONS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(f"backward_({_SAVED}, {_OPTIONS}, Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor(d!)? dbias) -> ()")


def _allocate_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, heads, _dim = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(batch, heads, queries, dtype=lse_dtype)
    kept = keeps_rest(q.dtype, None if bias is None else bias.dtype)
    rest = q.new_empty(lse.shape if kept else 0, dtype=torch.float32)
    return q.new_empty(batch, queries, heads, v.shape[3]), lse, rest


def _allocate_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = rest[-1]
    wanted = [x if need else None for x, need in zip((q, k, v, bias), needs, strict=True)]
    dq, dk, dv, dbias = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in wanted)
    return dq, dk, dv, dbias


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    batch_inner: int,
    lo: int | None,
    hi: int | None,
    scale: float,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    spec = spec_of(q, k, v, bias, batch_inner, lo, hi, scale, precision)
    plan = plan_forward(spec, facts_of(q.device), backend)
    out, lse, rest = _allocate_forward(q, k, v, bias)
    run_forward(plan, spec, q, k, v, bias, out, lse, _kept(rest))
    return out, lse, rest


def _kept(rest: Tensor | None) -> Tensor | None:
    """The forward operator returns a tensor of one dim, empty, where there is no rest to keep."""
    return None if rest is None or rest.dim() == 1 else rest


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rest: Tensor | None,
    batch_inner: int,
    lo: int | None,
    hi: int | None,
    scale: float,
    precision: str,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if needs[3] and (bias is None or bias.dtype == torch.bool):
        raise bad_value("needs", "False for a bias that is absent or a mask", list(needs))
    grads = _allocate_backward(dout, dlse, q, k, v, bias, needs)
    given = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    _backward_(dout, dlse, q, k, v, bias, out, lse, rest, batch_inner, lo, hi, scale, precision, backend, *given)
    return grads


def _backward_(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rest: Tensor | None,
    batch_inner: int,
    lo: int | None,
    hi: int | None,
    scale: float,
    precision: str,
    backend: str,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dbias: Tensor | None,
) -> None:
    spec = spec_of(q, k, v, bias, batch_inner, lo, hi, scale, precision)
    rest = _kept(rest)
    check_saved(q, v, dout, dlse, out, lse, rest)
    check_gradients({"q": q, "k": k, "v": v, "bias": bias}, {"dq": dq, "dk": dk, "dv": dv, "dbias": dbias}, {"dout": dout, "out": out})
    needs = Needs(dq is not None, dk is not None, dv is not None, dbias is not None)
    plan = plan_backward(spec, needs, facts_of(q.device), backend)
    run_backward(plan, spec, dout, dlse, q, k, v, bias, out, lse, rest, dq, dk, dv, dbias)


def _fake_backward_(*_: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, bias, *options = inputs
    out, lse, rest = output
    ctx.mark_non_differentiable(rest)
    ctx.save_for_backward(q, k, v, bias, out, lse, rest)
    ctx.options = tuple(options)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, bias, out, lse, rest = ctx.saved_tensors
    needs = [bool(need) for need in ctx.needs_input_grad[:4]]
    nothing = (None,) * 10
    if (dout is None and dlse is None) or not any(needs):
        return nothing
    if dout is None:
        dout = torch.zeros_like(out)
    with torch.no_grad():
        grads = attention_backward(dout, dlse, q, k, v, bias, out, lse, rest, *ctx.options, needs)
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return differentiable_once(wanted, (dout, dlse, q, k, v, bias)) + nothing[4:]


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

attention_forward = torch.ops.triflash.forward.default
attention_backward = torch.ops.triflash.backward.default
attention_backward_ = torch.ops.triflash.backward_.default
