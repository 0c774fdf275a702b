"""Everything that autograd and PyTorch's tracers know of attention. Called by ``door.py``.

Eager calls go through one ``autograd.Function``, :class:`Attention`, whose passes are bound (``bound/``). What traces takes the
``torch.library`` operators, whose bodies use bound passes too:

``triflash::forward``   (q, k, v, bias, …) -> (out, lse, rest), differentiable; rest is what lse, a float32, lost of a huge one
``triflash::backward``  (dout, dlse, q, k, v, bias, out, lse, rest, …, needs, …) -> (dq, dk, dv, dbias, dsink), empty where not needed
``triflash::backward_`` the same, filling the tensors it is given
``triflash::backward_two`` the same as backward, of two biases: (…, needs, second_bias, …) -> (dq, dk, dv, dbias, dsink, dsecond)

They take canonical tensors (see ``spec.spec_of``) and run for every device: the plan picks the kernels. The requested backend travels as
an argument, so that the backward pass, which may run on another thread after the ``with backend(...)`` block has ended, uses the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .bound.call import BoundCall
from .bound.passes import nothing
from .bound.ready import Ready, ready
from .bound.signature import CALLS, ambient, describe
from .derivatives import differentiable, differentiable_once, keep_nothing, refuse_second, refuse_tangents, underivable
from .errors import bad_value
from .flops import register_formulas
from .form import Form
from .launch.room import twin
from .saved import check_gradients, check_saved
from .spec import Gradients, Saved, keeps_rest, spec_of

__all__ = [
    "Attention",
    "OperatorOptions",
    "attention_backward",
    "attention_backward_",
    "attention_backward_two",
    "attention_forward",
    "kept",
]

_OPTIONS = "SymInt batch_inner, SymInt? lo, SymInt? hi, float scale, str precision, str backend"
_MORE = (
    "Tensor? mask=None, Tensor? key_lengths=None, Tensor? alibi_slopes=None, Tensor? sink=None, Tensor? dropout_seed=None, "
    "float softcap=0.0, float dropout_p=0.0, bool deterministic=False"
)
_PLACES = "Tensor? query_starts=None, Tensor? query_lengths=None, Tensor? key_starts=None, Tensor? diagonal=None, SymInt? shift=None"
_SAVED = "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse, Tensor? rest"
_GIVEN = "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor(d!)? dbias"

# Kernels take any strides. Inductor does not see to those of the original program, and calls such an operator without naming defaults.
ANY_LAYOUT = (torch.Tag.flexible_layout,)

_library = torch.library.Library("triflash", "DEF")
_library.define(
    f"forward(Tensor q, Tensor k, Tensor v, Tensor? bias, {_OPTIONS}, {_MORE}, Tensor? second_bias=None, {_PLACES})"
    " -> (Tensor, Tensor, Tensor)",
    tags=ANY_LAYOUT,
)
_library.define(
    f"backward({_SAVED}, {_OPTIONS}, bool[] needs, {_MORE}, {_PLACES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", tags=ANY_LAYOUT
)
_library.define(
    f"backward_two({_SAVED}, {_OPTIONS}, bool[] needs, Tensor second_bias, {_MORE}, {_PLACES})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=ANY_LAYOUT,
)
_library.define(f"backward_({_SAVED}, {_OPTIONS}, {_GIVEN}, {_MORE}, Tensor(e!)? dsink=None, {_PLACES}) -> ()")


class OperatorOptions(NamedTuple):
    """The operators' arguments after the bias (forward) and rest (backward), in order. PyTorch leaves out trailing defaults.

    Between ``backend`` and ``mask`` the backward operators have what they give; here that is left out.
    """

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
    second_bias: Tensor | None = None
    query_starts: Tensor | None = None
    query_lengths: Tensor | None = None
    key_starts: Tensor | None = None
    diagonal: Tensor | None = None
    shift: int | None = None

    @property
    def numbers(self) -> tuple[Any, ...]:
        """What is no tensor."""
        return (*self[:6], *self[11:14], self.shift)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """mask, key_lengths, alibi_slopes, sink and dropout_seed."""
        return self[6:11]

    @property
    def places(self) -> tuple[Tensor | None, ...]:
        """query_starts, query_lengths, key_starts and diagonal."""
        return self[15:19]

    @classmethod
    def of_backward(cls, front: Sequence[Any], more: Sequence[Any]) -> OperatorOptions:
        """From what a backward operator takes in front of what it gives, and behind it."""
        return cls(*front, *more[:_BEHIND])._replace(**dict(zip(cls._fields[15:], more[_BEHIND:], strict=False)))


_TENSORS = 9  # q to dropout_seed: what a bound call has of tensors in front of those that few calls have
_FRONT = 16  # dout to needs: what the backward operator takes in front of the mask
_BEHIND = 8  # mask to deterministic: what the backward operators take before query_starts


def _given(q: Any, k: Any, v: Any, bias: Any, options: OperatorOptions, behind: int) -> tuple[Any, ...]:
    """The tensors of a bound call, in order, or whatever stands for them; behind: how many there are after the seed of dropout."""
    given = (q, k, v, bias, *options.tensors)
    return (*given, None, None, None, None, options.second_bias, *options.places)[: len(given) + behind]


def _bound(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: OperatorOptions) -> tuple[BoundCall, tuple[Tensor | None, ...]]:
    """What an operator's arguments bind to, and its tensors in order. Only a new signature is checked."""
    behind = 9 if any(x is not None for x in options.places) else 5 if options.second_bias is not None else 0
    given = _given(q, k, v, bias, options, behind)
    numbers = options.numbers
    facts, around = ambient(q)
    key = ("operator", tuple([describe(x) for x in given]), numbers, tuple(map(type, numbers)), around)
    call = CALLS.get(key)
    if call is None:
        form = Form((q.shape[0],), 1, canonical=True, contiguous=True)
        x = form.operands(given)
        spec = spec_of(
            *x[:4], options.batch_inner, options.lo, options.hi, options.scale, options.precision, *x[4:9], options.softcap,
            options.dropout_p, options.deterministic, *x[13:], options.shift,
        )  # fmt: skip
        call = BoundCall(form, [None if each is None else twin(each) for each in given], spec, facts, options.backend, q.device)
        CALLS.add(key, call)
    return call, given


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    q = args[0]
    results = ready("forward", args, q, _ready_forward).run(args, q)
    if len(results) == 3:
        return results  # type: ignore[return-value]
    return *results, nothing(q, torch.float32)  # type: ignore[return-value]


def _ready_forward(args: tuple[Any, ...]) -> Ready:
    q, k, v, bias, *rest = args
    call, given = _bound(q, k, v, bias, OperatorOptions(*rest))
    return Ready(call.forward, _given(0, 1, 2, 3, OperatorOptions(*range(4, len(args))), len(given) - _TENSORS), args)


def kept(rest: Tensor | None) -> Tensor | None:
    """The forward operator returns a tensor of one dim, empty, where there is no rest to keep."""
    return None if rest is None or rest.dim() == 1 else rest


def _all_needs(needs: Sequence[bool]) -> tuple[bool, ...]:
    """Whether dq, dk, dv, dbias and dsink are wanted; the last may be left out."""
    if not 4 <= len(needs) <= 5:
        raise bad_value("needs", "4 or 5 of them: of q, k, v, bias and sink", list(needs))
    return (*needs, False)[:5]


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
    rest: Tensor | None, batch_inner: int, lo: int | None, hi: int | None, scale: float, precision: str, backend: str,
    needs: Sequence[bool], *more: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    args = (
        dout, dlse, q, k, v, bias, out, lse, rest, batch_inner, lo, hi, scale, precision, backend, tuple(needs), *more,
    )  # fmt: skip
    made = iter(ready("backward", args, q, _ready_backward).run(args, dout))
    dq, dk, dv, dbias, dsink = [next(made) if need else nothing(q, q.dtype) for need in _all_needs(needs)]
    return dq, dk, dv, dbias, dsink


def _ready_backward(args: tuple[Any, ...]) -> Ready:
    dout, dlse, q, k, v, bias, out, lse, rest, *front, needs = args[:_FRONT]
    options = OperatorOptions.of_backward(front, args[_FRONT:])
    needs = _all_needs(needs)
    if needs[3] and (bias is None or bias.dtype == torch.bool):
        raise bad_value("needs", "False for a bias that is absent or a mask", needs)
    if needs[4] and options.sink is None:
        raise bad_value("needs", "False for a sink that is absent", needs)
    call, given = _bound(q, k, v, bias, options)
    saved = Saved(out, lse, kept(rest))
    check_saved(q, v, dout, dlse, saved)
    kept_of = [at for at, x in zip((6, 7, 8), saved, strict=True) if x is not None]
    bound = call.bound_backward((*given, *(args[at] for at in kept_of), dout, dlse), len(kept_of), (*needs, False))
    behind = len(given) - _TENSORS
    places = _given(2, 3, 4, 5, OperatorOptions.of_backward(range(9, 15), range(_FRONT, len(args))), behind)
    return Ready(bound, (*places, *kept_of, 0, 1), args)


def _backward_two(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
    rest: Tensor | None, *more: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *front, needs, second = more[:8]
    options = OperatorOptions.of_backward(front, more[8:])._replace(second_bias=second)
    if len(needs) != 6:
        raise bad_value("needs", "6 of them: of q, k, v, bias, sink and second_bias", list(needs))
    call, given = _bound(q, k, v, bias, options)
    saved = Saved(out, lse, kept(rest))
    check_saved(q, v, dout, dlse, saved)
    grads = call.run_backward(given, [x for x in saved if x is not None], dout, dlse, tuple(needs))
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


def _fake_backward_two(dout: Tensor, *more: Any) -> tuple[Tensor, ...]:
    _, q, k, v, bias, _, _, _, *rest = more
    *front, needs, second = rest[:8]
    sink = OperatorOptions.of_backward(front, rest[8:]).sink
    wanted = [x if need else None for x, need in zip((q, k, v, bias, sink, second), needs, strict=True)]
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in wanted)


def _backward_(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
    rest: Tensor | None, batch_inner: int, lo: int | None, hi: int | None, scale: float, precision: str, backend: str,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dbias: Tensor | None, *more: Any,
) -> None:  # fmt: skip
    front = (batch_inner, lo, hi, scale, precision, backend)
    options = OperatorOptions.of_backward(front, (*more[:_BEHIND], *more[_BEHIND + 1 :]))
    grads = Gradients(dq, dk, dv, dbias, *more[_BEHIND : _BEHIND + 1])
    call, given = _bound(q, k, v, bias, options)
    saved = Saved(out, lse, kept(rest))
    check_saved(q, v, dout, dlse, saved)
    inputs = {"q": q, "k": k, "v": v, "bias": bias, "sink": options.sink}
    check_gradients(inputs, dict(list(grads._asdict().items())[:5]), {"dout": dout, "out": out})
    needs = tuple(grad is not None for grad in grads)
    call.run_backward(given, [x for x in saved if x is not None], dout, dlse, needs, into=grads)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    options = OperatorOptions(*rest)
    batch, queries, heads, _dim = q.shape
    lse = q.new_empty(batch, heads, queries, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    kept = keeps_rest(None if bias is None else bias.dtype, options.alibi_slopes is not None, options.softcap)
    lost = q.new_empty(lse.shape if kept else 0, dtype=torch.float32)
    return q.new_empty(batch, queries, heads, v.shape[3]), lse, lost


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
    rest: Tensor | None, batch_inner: int, lo: int | None, hi: int | None, scale: float, precision: str, backend: str,
    needs: Sequence[bool], *more: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    sink = OperatorOptions.of_backward((batch_inner, lo, hi, scale, precision, backend), more).sink
    wanted = [x if need else None for x, need in zip((q, k, v, bias, sink), _all_needs(needs), strict=True)]
    dq, dk, dv, dbias, dsink = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in wanted)
    return dq, dk, dv, dbias, dsink


def _fake_backward_(*_: Any) -> None:
    return None


# Whether a transform of ``torch.func`` or a dispatch mode is to see what runs: they see operators alone.
_transforms = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack


def _opaque(x: Tensor) -> bool:
    """Whether a tensor is not what its memory holds: a subclass, one of several of a vmap, a negated view."""
    if type(x) is not Tensor or x.is_neg():
        return True
    try:
        x.data_ptr()
    except RuntimeError:  # "Cannot access data pointer of Tensor that doesn't have storage"
        return True
    return False


def _backward_by_operator(
    call: BoundCall, given: Sequence[Tensor | None], outputs: Sequence[Tensor], dout: Tensor, dlse: Tensor | None, needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients of an eager call by the operator, in the layouts of what was given."""
    form, spec = call.form, call.spec
    if call.by_operator is not None:
        return call.by_operator(call, given, outputs, dout, dlse, needs)
    x = form.operands(given)
    saved = call.saved(outputs)
    rest = x.q.new_empty(0, dtype=torch.float32) if saved.rest is None else saved.rest
    dlse = None if dlse is None else form.lse("dlse", dlse)
    all_needs = vars(call.needs(needs))
    inner = form.inner if not form.canonical else spec.batch_inner
    grads = _gradients_by_operator(
        (form.rows("dout", dout), dlse, *x[:4], saved.out, saved.lse, rest),
        (inner, spec.lo, spec.hi, spec.scale, spec.precision, call.backend),
        list(all_needs.values()), x[4:9], (spec.softcap, spec.dropout, spec.deterministic, *x[14:], spec.shift), x.second_bias,
    )  # fmt: skip
    return form.gradients_of([grad if need else None for grad, need in zip(grads, all_needs.values(), strict=True)], given)


def _gradients_by_operator(
    tensors: tuple[Any, ...], front: tuple[Any, ...], needs: list[bool], more: Sequence[Any], behind: tuple[Any, ...], second: Tensor | None
) -> Sequence[Tensor]:
    """Six gradients, empty where they are not needed, by the operator for one bias or for two."""
    if second is None:
        five: tuple[Tensor, ...] = attention_backward(*tensors, *front, needs[:5], *more, *behind)
        return (*five, tensors[2].new_empty(0))
    six: tuple[Tensor, ...] = attention_backward_two(*tensors, *front, needs, second, *more, *behind)
    return six


class Attention(torch.autograd.Function):
    """Eager attention with gradients: ``Attention.apply(call, return_lse, *there)``, there being the tensors of a bound call in order, but
    for those that are missing: autograd looks at each of them.
    """

    @staticmethod
    def forward(ctx: Any, call: BoundCall, return_lse: bool, *there: Tensor) -> Any:
        results = call.run_forward(there) if return_lse else call.run_kept(there)
        ctx.call = call
        ctx.to_save = (*there, *results)  # what save_for_backward and set_materialize_grads do
        ctx.materialize_grads = False
        return (results[0], results[1]) if return_lse else results[0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        wants, call, saved = ctx.needs_input_grad, ctx.call, ctx.saved_tensors
        once = not torch.is_grad_enabled()
        if forward_ad._current_level >= 0:
            refuse_tangents((dout, dlse, *saved), ("dout", "dlse", *("what attention saved",) * len(saved)))
        if once and dlse is None and dout is not None and not _dispatch_modes():
            known = call.run_known_backward(wants, (*saved, dout))
            if known is not None:
                return known
        if dout is None and dlse is None:
            return (None,) * len(wants)
        count = len(wants) - 2
        given, outputs = call.given_of(saved[:count]), saved[count:]
        if dout is None:
            dout = torch.zeros_like(outputs[0])
        needs = tuple([at is not None and wants[2 + at] for at in call.differentiated])
        if _transforms() or _dispatch_modes() or _opaque(dout) or (dlse is not None and _opaque(dlse)):
            grads = _backward_by_operator(call, given, outputs, dout, dlse, needs)
        elif once:
            bound = call.backward_passes
            grads = call.run_backward(given, outputs, dout, dlse, needs)
            if dlse is None and call.backward_passes == bound:  # what comes twice
                call.remember_backward(wants, (*saved, dout), len(outputs), needs)
        else:
            with torch.no_grad():
                grads = call.run_backward(given, outputs, dout, dlse, needs)
            grads = list(differentiable_once(grads, (dout, dlse, *given)))
        by_place = dict(zip(call.differentiated, grads, strict=True))
        return None, None, *(by_place.get(at) for at in range(count))


if hasattr(Attention, "_backward_cls"):  # autograd calls ``apply`` of the context, which asks three more functions
    Attention._backward_cls.apply = Attention.backward  # type: ignore[attr-defined]


_WANTED = (0, 1, 2, 3, *(4 + OperatorOptions._fields.index(name) for name in ("sink", "second_bias")))


def _keep(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, bias, *rest = args
    options = OperatorOptions(*rest)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(q, k, v, bias, *options.tensors, options.second_bias, *options.places, *output)
    ctx.numbers = options.numbers


def _give(ctx: Any, wants: Sequence[bool], dout: Tensor | None, dlse: Tensor | None, _: Any) -> list[Tensor | None]:
    q, k, v, bias, *tensors, out, lse, rest = ctx.saved_tensors
    tensors, second, places = tensors[:5], tensors[5], tensors[6:]
    *numbers, shift = ctx.numbers
    needs = [at < len(wants) and bool(wants[at]) for at in _WANTED]
    result: list[Tensor | None] = [None] * len(wants)
    if (dout is None and dlse is None) or not any(needs):
        return result
    if dout is None:
        dout = torch.zeros_like(out)
    with torch.no_grad():
        grads = _gradients_by_operator(
            (dout, dlse, q, k, v, bias, out, lse, rest), numbers[:6], needs, tensors, (*numbers[6:], *places, shift), second
        )
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    for at, grad in zip(_WANTED, differentiable_once(wanted, (dout, dlse, q, k, v, bias, *tensors, second)), strict=True):
        if grad is not None:
            result[at] = grad
    return result


for _name, _fn, _fake in (
    ("forward", _forward, _fake_forward),
    ("backward", _backward, _fake_backward),
    ("backward_", _backward_, _fake_backward_),
    ("backward_two", _backward_two, _fake_backward_two),
):
    _library.impl(_name, _fn, "CompositeExplicitAutograd")
    torch.library.register_fake(f"triflash::{_name}", _fake, lib=_library)

register_formulas(torch.ops.triflash.forward, torch.ops.triflash.backward, torch.ops.triflash.backward_, torch.ops.triflash.backward_two)

attention_forward = torch.ops.triflash.forward.default
attention_backward = torch.ops.triflash.backward.default
attention_backward_ = torch.ops.triflash.backward_.default
attention_backward_two = torch.ops.triflash.backward_two.default
differentiable(_library, attention_forward, _forward, _keep, _give)
differentiable(_library, attention_backward, _backward, keep_nothing, refuse_second)
differentiable(_library, attention_backward_two, _backward_two, keep_nothing, refuse_second)
underivable(_library, attention_backward_, _backward_)
