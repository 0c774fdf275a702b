"""The one way in: from what a caller of a public function writes to a bound call, or to the operators where PyTorch traces.

Called by the public functions. A call is checked once for each signature (``arguments.py``); a repeat finds what was bound then and
hands its tensors over. Eager calls wait for every microsecond spent here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter

from .arguments import (
    Checked,
    CheckedVarlen,
    Face,
    Given,
    Options,
    VarlenGiven,
    VarlenOptions,
    argument,
    check_places,
    check_sequences,
    checked,
    checked_varlen,
    two_biases,
)
from .bound.call import BoundCall
from .bound.signature import CALLS, Near, ambient, describe, near_of, remember_near
from .checks import check_bool, check_seed_range, seed_tensor
from .derivatives import refuse_tangents
from .errors import UnsupportedError
from .launch.room import meta, twin
from .nested import attend_nested, is_nested
from .ops import Attention
from .ops_checked import casting, compute, compute_varlen, is_casting, varlen_options
from .ops_varlen import VarlenTensors, bind_varlen
from .plan.device import DeviceFacts
from .plan.select import NO_CHOICES, _lookup, current_choices, requested_backend_soon
from .spec import resolve_precision, spec_of

__all__ = [
    "PLAIN",
    "attend",
    "attend_known_varlen",
    "attend_plain",
    "attend_varlen",
    "bind",
    "bind_sequences",
    "is_dtensor",
]

PLAIN = frozenset({Tensor, Parameter})  # classes whose tensors are what they look like
_LONGEST = frozenset({int, type(None)})  # types of max_seqlen_q and max_seqlen_k
_HALF = (torch.float16, torch.bfloat16)  # whose products have one precision
_SEED = meta((2,), (1,), torch.int64)

# Looked up once: an eager call asks all of them.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
_apply = super(torch.autograd.Function, Attention).apply  # less what Function.apply asks of functorch, which attend did
_compiling = torch.compiler.is_compiling
_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
_deterministic: Callable[[], bool] = torch._C._get_deterministic_algorithms


def attend(face: Face, given: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool = False) -> Any:
    """Attention of the tensors given: out, or with ``return_lse`` out and lse, in the caller's layout, with gradients.

    ``given`` and ``options`` are the fields of :class:`~triflash.arguments.Given` and :class:`~triflash.arguments.Options`, of which plain
    tuples are made faster. Raises what :func:`~triflash.arguments.checked` does, in the first call of a signature and in every other.
    """
    q, k, v, bias, mask, lengths, slopes, sink, seed, second, query_starts, query_lengths, key_starts, diagonals = given
    causal, window, scale, softcap, dropout_p, deterministic, layout, precision, backend, diagonal = options
    if (
        not _compiling() and mask is lengths is slopes is sink is seed is second is None
        and query_starts is query_lengths is key_starts is diagonals is None
        and window is softcap is precision is diagonal is deterministic is None and type(dropout_p) is float and not dropout_p
    ):  # fmt: skip
        return attend_plain(face, q, k, v, bias, causal, scale, layout, backend, return_lse)
    return _attend(face, given, options, return_lse, None)


def attend_plain(
    face: Face, q: Tensor, k: Tensor, v: Tensor, bias: Any = None, causal: bool | str = False, scale: float | None = None,
    layout: str = "bshd", backend: str | None = None, return_lse: bool = False,
) -> Any:  # fmt: skip
    """:func:`attend` of nothing more than that, where Dynamo does not trace. bias may be two."""
    key = None
    if (
        (causal is True or causal is False) and (scale is None or type(scale) is float) and (return_lse is False or return_lse is True)
        and not (_dispatch_modes() or forward_ad._current_level >= 0) and current_choices() is NO_CHOICES
    ):  # fmt: skip
        few = (q, k, v) if bias is None else (q, k, v, bias)
        try:
            key = (
                face.name, causal, scale, layout, requested_backend_soon() if backend is None else backend,
                _deterministic(), bias is None, q.shape, k.shape,
            )  # fmt: skip
            found = near_of(CALLS, key, few)
        except (AttributeError, TypeError, RuntimeError, NotImplementedError):
            key = found = None  # as in _attend
        if found is not None:
            if profiler._is_profiler_enabled:
                with profiler.record_function("triflash::attention"):
                    return _run_known(found, few, return_lse)
            if found.wants and torch.is_grad_enabled():
                return _apply(found.entry, return_lse, *few)
            return _without_gradients(found.entry, few, return_lse)
    check_bool("return_lse", return_lse)
    second = None
    if isinstance(bias, (tuple, list)):
        (bias, second), key = two_biases(bias), None
    given = (q, k, v, bias, None, None, None, None, None, second, None, None, None, None)
    return _attend(face, given, (causal, None, scale, None, 0.0, None, layout, None, backend, None), return_lse, key)


def _attend(face: Face, given: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool, near: tuple[Any, ...] | None) -> Any:
    """:func:`attend` of anything. near: what finds the call sooner the next time."""
    if forward_ad._current_level >= 0:
        refuse_tangents(given, [*map(argument, Given._fields)])
    if _compiling():
        return _by_operators(face, given, options, return_lse)
    q, k, v, bias, mask, lengths, slopes, sink, seed, second, query_starts, query_lengths, key_starts, diagonals = given
    if _dispatch_modes() or _transforms() or _tracing() is not None:
        return _by_operators(face, given, options, return_lse)
    causal, window, scale, softcap, dropout_p, deterministic, layout, precision, backend, diagonal = options
    call, cast, placed = None, False, not (query_starts is query_lengths is key_starts is diagonals is None)
    try:
        more: Any = None
        if placed or not (mask is lengths is slopes is sink is seed is second is None):
            drawn = describe(seed) if isinstance(seed, Tensor) else type(seed)
            more = (describe(mask), describe(lengths), describe(slopes), describe(sink), drawn, describe(second))
            if placed:
                more = (*more, describe(query_starts), describe(query_lengths), describe(key_starts), describe(diagonals))
        cast = _autocast() and torch.is_autocast_enabled(q.device.type)
        facts, around = ambient(q)
        key: Any = (
            face.name, describe(q), describe(k), describe(v), None if bias is None else describe(bias), more,
            causal, window, scale, softcap, dropout_p, layout, precision, requested_backend_soon() if backend is None else backend,
            deterministic, _deterministic(), type(causal), type(scale), type(softcap), type(dropout_p), type(deterministic),
            None if window is None else tuple(map(type, window)), diagonal, type(diagonal),
            resolve_precision("") if precision is None and q.dtype is torch.float32 else "",
            around,
        )  # fmt: skip
        if slopes is None or not (slopes.requires_grad and torch.is_grad_enabled()):
            call = CALLS.get(key)
            if call is not None and near is not None and not cast and q.dtype in _HALF:
                remember_near(CALLS, near, (q, k, v) if bias is None else (q, k, v, bias), call)
    except (AttributeError, TypeError, RuntimeError, NotImplementedError):
        key = None  # a tensor that is none, or has no memory, or an option that cannot be hashed: the checks have words for it
    if cast:
        return _autocasted(face, given, options, return_lse)
    if call is None:
        if face.shapes is None and is_nested(given):
            return _by_operators(face, given, options, return_lse)
        named = Given(*given)
        settled = checked(face, named, Options(*options))
        if isinstance(window, list):  # which has no hash
            return attend(face, given, Options(*options)._replace(window=(window[0], window[1])), return_lse)
        there = [x for x in given if x is not None and isinstance(x, Tensor)]
        if key is None or q.device.type == "meta" or not PLAIN.issuperset(map(type, there)) or any(map(Tensor.is_neg, there)):
            return _by_operators(face, given, options, return_lse)
        call = _bound(settled, named, facts, q.device)
        CALLS.add(key, call)
    if (placed or lengths is not None) and os.environ.get("TRIFLASH_CHECK") == "1":
        check_places(Given(*given), call.spec)
    if isinstance(seed, int):
        check_seed_range(seed)
    tensors: Any = (q, k, v, bias, mask, lengths, slopes, sink, seed_tensor(seed, q.device) if dropout_p else None)
    if placed:
        tensors = (*tensors, None, None, None, None, second, query_starts, query_lengths, key_starts, diagonals)
    elif second is not None:
        tensors = (*tensors, None, None, None, None, second)
    if profiler._is_profiler_enabled:
        with profiler.record_function("triflash::attention"):
            return _run(call, tensors, return_lse)
    return _run(call, tensors, return_lse)


def attend_varlen(given: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool = False) -> Any:
    """Attention of packed sequences, as :func:`attend`.

    ``given`` and ``options`` are the fields of :class:`~triflash.arguments.VarlenGiven` and :class:`~triflash.arguments.VarlenOptions`.
    """
    if forward_ad._current_level >= 0:
        refuse_tangents(given, [*map(argument, VarlenGiven._fields)])
    q, k, v, bias, *_ = given
    seed, offsets = given[7], given[8:10]
    traced = _compiling() or _dispatch_modes() or _transforms() or _tracing() is not None
    if traced:
        return _varlen_by_operators(given, options, return_lse)
    plain = _is_plain_varlen(given, options)
    if plain:
        bias_layout, _, causal, _, scale, *_, backend, longest_q, longest_k = options
        known = attend_known_varlen(
            q, k, v, offsets[0], offsets[1], longest_q, longest_k, bias=bias, bias_layout=bias_layout, causal=causal, scale=scale,
            return_lse=return_lse, backend=backend,
        )  # fmt: skip
        if known is not None:
            return known
    call, key, cast = None, None, False
    try:
        cast = _autocast() and torch.is_autocast_enabled(q.device.type)
        facts, around = ambient(q)
        tensors = (*given[:7], *given[8:])
        own = (*options[:9], requested_backend_soon() if options[9] is None else options[9], *options[10:])
        key = (
            "varlen", tuple([None if x is None else describe(x) for x in tensors]),
            describe(seed) if isinstance(seed, Tensor) else type(seed), own, tuple(map(type, own)),
            None if options[3] is None else tuple(map(type, options[3])), _deterministic(),
            resolve_precision("") if options[8] is None and q.dtype is torch.float32 else "", around,
        )  # fmt: skip
        if given[5] is None or not (given[5].requires_grad and torch.is_grad_enabled()):
            call = CALLS.get(key)
            if plain and call is not None and not cast and q.dtype in _HALF:
                few = (q, k, v, *offsets) if bias is None else (q, k, v, bias, *offsets)
                near = _near_varlen(few, options[0], options[2], options[4], *options[9:])
                if near is not None:
                    remember_near(CALLS, near, few, call)
    except (AttributeError, TypeError, RuntimeError, NotImplementedError):
        key = None
    if cast:
        return _autocasted_varlen(given, options, return_lse)
    if os.environ.get("TRIFLASH_CHECK") == "1":
        check_sequences(VarlenGiven(*given), VarlenOptions(*options))
    if call is None:
        named = VarlenGiven(*given)
        settled = checked_varlen(named, VarlenOptions(*options))
        if isinstance(options[3], list):
            return attend_varlen(given, VarlenOptions(*options)._replace(window=tuple(options[3])), return_lse)
        if key is None or q.device.type == "meta" or any(isinstance(x, Tensor) and (type(x) not in PLAIN or x.is_neg()) for x in given):
            return _varlen_by_operators(given, options, return_lse)
        call = _bound_sequences(settled, named, facts)
        CALLS.add(key, call)
    if isinstance(seed, int):
        check_seed_range(seed)
    drawn = seed_tensor(seed, q.device) if call.spec.dropout else None
    all_given = (*given[:5], None, *given[5:7], drawn, *given[8:])
    if profiler._is_profiler_enabled:
        with profiler.record_function("triflash::attention_varlen"):
            return _run(call, all_given, return_lse)
    return _run(call, all_given, return_lse)


def attend_known_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, *, bias: Any = None, bias_layout: str = "padded", causal: bool | str = False,
    scale: float | None = None, return_lse: bool = False, backend: str | None = None,
) -> Any:  # fmt: skip
    """:func:`attend_varlen` of nothing more than that, where Dynamo does not trace and a call like it has come twice; else None."""
    if _dispatch_modes() or forward_ad._current_level >= 0 or not (return_lse is False or return_lse is True):
        return None
    offsets = (cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k)
    few = (q, k, v, *offsets) if bias is None else (q, k, v, bias, *offsets)
    try:
        key = _near_varlen(few, bias_layout, causal, scale, backend, max_seqlen_q, max_seqlen_k)
        found = None if key is None else near_of(CALLS, key, few)
    except (AttributeError, TypeError, RuntimeError, NotImplementedError):
        return None  # as in attend_varlen
    if found is None:
        return None
    if profiler._is_profiler_enabled:
        with profiler.record_function("triflash::attention_varlen"):
            return _run_known(found, few, return_lse)
    return _run_known(found, few, return_lse)


def _near_varlen(few: tuple[Any, ...], bias_layout: Any, causal: Any, scale: Any, backend: Any, *longest: Any) -> tuple[Any, ...] | None:
    """What finds calls of packed sequences sooner, together with their tensors; None: such calls are not found so."""
    if (
        not (causal is True or causal is False) or not (scale is None or type(scale) is float) or current_choices() is not NO_CHOICES
        or not _LONGEST.issuperset(map(type, longest)) or _lookup is None or _lookup(b"TRIFLASH_CHECK")
    ):  # fmt: skip
        return None
    backend = requested_backend_soon() if backend is None else backend
    return ("varlen", bias_layout, causal, scale, backend, longest, _deterministic(), len(few), few[0].shape, few[1].shape)


def _is_plain_varlen(given: tuple[Any, ...], options: tuple[Any, ...]) -> bool:
    """Whether a call has no other arguments than :func:`attend_known_varlen` takes."""
    _, _, _, _, mask, slopes, sink, seed, _, _, used_q, used_k, second = given
    _, mask_layout, _, window, _, softcap, dropout_p, deterministic, precision, *_ = options
    return (
        mask is slopes is sink is seed is used_q is used_k is second is None
        and mask_layout is window is softcap is deterministic is precision is None and type(dropout_p) is float and not dropout_p
    )  # fmt: skip


def bind_sequences(given: VarlenGiven, options: VarlenOptions, facts: DeviceFacts) -> BoundCall:
    """:func:`bind`, of packed sequences."""
    return _bound_sequences(checked_varlen(given, options), given, facts)


def _bound_sequences(settled: CheckedVarlen, given: VarlenGiven, facts: DeviceFacts) -> BoundCall:
    seed, drawn = given.dropout_seed, None
    if settled.dropout_p:
        drawn = twin(seed) if isinstance(seed, Tensor) and seed.is_contiguous() else _SEED
    return bind_varlen(VarlenTensors(*given[:7], drawn, *given[8:]), varlen_options(settled), facts, given.q.device)


def _varlen_by_operators(given: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool) -> Any:
    q = given[0]
    if is_casting(q):
        return _autocasted_varlen(given, options, return_lse)
    named = VarlenGiven(*given)
    if any(isinstance(x, Tensor) and is_dtensor(x) for x in given):
        raise UnsupportedError("packed sequences as DTensors: call attention_varlen on what each process has, x.to_local()")
    out, lse = compute_varlen(named, VarlenOptions(*options))
    return (out, lse) if return_lse else out


def _autocasted_varlen(given: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool) -> Any:
    with casting(given) as cast:
        return attend_varlen((*cast, *given[3:]), options, return_lse)


def _run(call: BoundCall, given: tuple[Tensor | None, ...], return_lse: bool) -> Any:
    if torch.is_grad_enabled():
        q, k, v, bias, _, _, _, sink, *_ = given
        wanted = q.requires_grad or (k is not None and k.requires_grad) or (v is not None and v.requires_grad)  # type: ignore[union-attr]
        second = given[13] if len(given) >= 14 else None
        wanted = wanted or (second is not None and second.requires_grad)
        if wanted or (bias is not None and bias.requires_grad) or (sink is not None and sink.requires_grad):
            return _apply(call, return_lse, *[x for x in given if x is not None])
    return _without_gradients(call, given, return_lse)


def _run_known(found: Near, there: tuple[Tensor, ...], return_lse: bool) -> Any:
    """A call that was told sooner, of the tensors that are there."""
    if found.wants and torch.is_grad_enabled():
        return _apply(found.entry, return_lse, *there)
    return _without_gradients(found.entry, there, return_lse)


def _without_gradients(call: BoundCall, given: tuple[Tensor | None, ...], return_lse: bool) -> Any:
    if not return_lse:
        return call.run_alone(given)
    out, lse, *_ = call.run_forward(given)
    return out, lse


def bind(face: Face, given: Given, options: Options, facts: DeviceFacts) -> BoundCall:
    """What a call would run on a device, from its arguments, of which no tensor's memory is read."""
    return _bound(checked(face, given, options), given, facts, given.q.device)


def _bound(call: Checked, given: Given, facts: DeviceFacts, device: torch.device) -> BoundCall:
    seed = given.dropout_seed
    drawn = None
    if call.dropout_p:
        drawn = twin(seed) if isinstance(seed, Tensor) and seed.is_contiguous() else _SEED
    twins = [*[None if x is None else twin(x) for x in given[:8]], drawn]
    behind = given[9:]
    if [x for x in behind if x is not None]:
        last = 5 if any(x is not None for x in behind[1:]) else 1
        twins += [None, None, None, None, *(None if x is None else twin(x) for x in behind[:last])]
    x = call.form.operands(twins)
    spec = spec_of(
        *x[:4], call.form.inner, call.lo, call.hi, call.scale, call.precision, *x[4:9], call.softcap, call.dropout_p, call.deterministic,
        *x[13:], call.shift, False,
    )  # fmt: skip
    return BoundCall(call.form, twins, spec, facts, call.backend, device, None, x)


def _by_operators(face: Face, given: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool) -> Any:
    """The same by operators, which tracers, transforms and subclasses see."""
    q = given[0]
    if is_casting(q):
        return _autocasted(face, given, options, return_lse)
    if face.shapes is None and is_nested(given):
        return attend_nested(attend_varlen, Given(*given), Options(*options), return_lse)
    if any(isinstance(x, Tensor) and is_dtensor(x) for x in given):
        if _transforms():
            raise UnsupportedError(
                "torch.func transforms of DTensors: use torch.autograd, or transform what each process does with its part, x.to_local()"
            )
        from .sharded import attend_sharded  # here: DTensor's imports take more than half a second

        return attend_sharded(attend, face, Given(*given), Options(*options), return_lse)
    out, lse = compute(face, Given(*given), Options(*options))
    return (out, lse) if return_lse else out


def is_dtensor(x: Tensor) -> bool:
    """Whether a tensor is a DTensor, or under a transform stands for one. By its name: only who has one should have to import the class."""
    if not _compiling():
        while torch._C._functorch.is_functorch_wrapped_tensor(x):
            x = torch._C._functorch.get_unwrapped(x)
    return type(x).__name__ == "DTensor" and type(x).__module__.startswith("torch.distributed.tensor")


def _autocasted(face: Face, given: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool) -> Any:
    """Under autocast q, k and v are of its dtype, as those of SDPA; bias, sink and slopes keep theirs. Casts are differentiable."""
    with casting(given) as cast:
        return attend(face, (*cast, *given[3:]), options, return_lse)
