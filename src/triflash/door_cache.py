"""The way in of calls on a KV cache, as ``door.py`` is of attention: a call is checked once for each signature; what traces takes the
operators. Called by ``kvcache.py``.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from .arguments_cache import (
    CacheGiven,
    CacheOptions,
    check_own_memory,
    check_requests,
    checked_cache,
    operands_of,
    refuse_gradients,
)
from .bound.cached import BoundCache
from .bound.signature import CACHES, ambient, describe, near_of, remember_near
from .derivatives import refuse_tangents
from .door import PLAIN, is_dtensor
from .errors import UnsupportedError
from .ops_cache import bind_cache, cache_append, cache_forward, cache_forward_out
from .ops_checked import CASTS, is_casting
from .plan.device import DeviceFacts
from .plan.select import NO_CHOICES, current_choices, requested_backend_soon
from .spec import resolve_precision
from .spec_cache import FP8

__all__ = ["attend_cache", "bind_call"]

_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
_compiling = torch.compiler.is_compiling
_autocast = torch._C._is_any_autocast_enabled
_HALF = (torch.float16, torch.bfloat16)  # whose products have one precision
_environment = getattr(os.environ, "_data", None)  # a look-up by bytes takes a fraction of os.environ.get
_constants: dict[tuple[float, torch.device], Tensor] = {}


def attend_cache(given: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool) -> Any:
    """out, or with ``return_lse`` out and lse, after new keys were written into the caches.

    ``given`` and ``options`` are the fields of :class:`~triflash.arguments_cache.CacheGiven` and
    :class:`~triflash.arguments_cache.CacheOptions`. Raises what :func:`~triflash.arguments_cache.checked_cache` does.
    """
    if _compiling():
        return _by_operators(given, options, return_lse)
    q, k, v, lengths, starts, table, index, cu_q, cu_new, bias, mask, slopes, sink, k_scale, v_scale, k_new, v_new, out = given
    most_queries, causal, window, scale, softcap, num_splits, split_size, precision, backend = options
    near: tuple[Any, ...] | None = None
    few: tuple[Tensor, ...] = ()
    if (
        starts is index is cu_q is cu_new is bias is mask is slopes is sink is out is None
        and most_queries is num_splits is split_size is precision is None and (softcap is None or type(softcap) is float)
        and (causal is True or causal is False) and (scale is None or type(scale) is float) and (return_lse is False or return_lse is True)
        and (k_scale is None or type(k_scale) is float) and (v_scale is None or type(v_scale) is float)
        and not (_dispatch_modes() or forward_ad._current_level >= 0) and current_choices() is NO_CHOICES
    ):  # fmt: skip
        try:
            if table is k_new is v_new is None:
                few = (q, k, v) if lengths is None else (q, k, v, lengths)
            else:
                few = tuple([x for x in (q, k, v, lengths, table, k_new, v_new) if x is not None])
            near = (
                "cache", causal, None if window is None else (*window, *map(type, window)), scale, softcap, return_lse, lengths is None,
                table is None, k_new is None, v_new is None, k_scale, v_scale,
                requested_backend_soon() if backend is None else backend, q.shape, k.shape,
            )  # fmt: skip
            found = near_of(CACHES, near, few)
        except (AttributeError, TypeError, RuntimeError, NotImplementedError):
            near = found = None  # as in _attend
        if found is not None and not (found.wants and torch.is_grad_enabled()) and not _checks():
            if not (k_scale is v_scale is None):
                k_scale, v_scale = _constant(k_scale, q.device), _constant(v_scale, q.device)
                few = tuple([x for x in (q, k, v, lengths, table, k_scale, v_scale, k_new, v_new) if x is not None])
            if profiler._is_profiler_enabled:
                with profiler.record_function("triflash::attention_with_kvcache"):
                    results = found.entry.bound.run(few, q)
            else:
                results = found.entry.bound.run(few, q)
            if k_new is not None:
                _count_writes((k, v))
            return (results[0], results[1]) if return_lse else results[0]
    return _attend(given, options, return_lse, near, few)


def _attend(
    given: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool, near: tuple[Any, ...] | None, few: tuple[Tensor, ...]
) -> Any:
    """:func:`attend_cache` of anything. near: what finds the call sooner the next time, by the tensors few."""
    if forward_ad._current_level >= 0:
        refuse_tangents(given, CacheGiven._fields)
    if _transforms():
        raise UnsupportedError(
            "torch.func transforms (vmap, grad, …) of attention_with_kvcache: requests are its batch already, and it has no gradients; "
            "call triflash.attention, which they take"
        )
    if _dispatch_modes() or _tracing() is not None:
        return _by_operators(given, options, return_lse)
    if torch.is_grad_enabled():
        refuse_gradients(CacheGiven(*given))
    call, key, cast = None, None, False
    q = given[0]
    try:
        cast = _autocast() and torch.is_autocast_enabled(q.device.type)
        facts, around = ambient(q)
        key = (
            "cache", tuple([x if x is None else describe(x) if isinstance(x, Tensor) else (type(x), x) for x in given]),
            options, tuple(map(type, options)), return_lse,
            None if options[2] is None else tuple(map(type, options[2])), requested_backend_soon() if options[8] is None else options[8],
            resolve_precision("") if options[7] is None and q.dtype is torch.float32 else "", around,
        )  # fmt: skip
        call = CACHES.get(key)
        if call is not None and near is not None and not cast and q.dtype in _HALF:
            remember_near(CACHES, near, few, call)
    except (AttributeError, TypeError, RuntimeError, NotImplementedError):
        key = None  # a tensor that is none, or has no memory, or an option that cannot be hashed: the checks have words for it
    if cast:
        return _autocasted(given, options, return_lse)
    if _checks():
        check_requests(CacheGiven(*given), CacheOptions(*options))
    if call is None:
        named = CacheGiven(*given)
        settled = checked_cache(named, CacheOptions(*options))
        if isinstance(options[2], list):
            return attend_cache(given, CacheOptions(*options)._replace(window=tuple(options[2])), return_lse)
        if key is None or q.device.type == "meta" or any(isinstance(x, Tensor) and (type(x) not in PLAIN or x.is_neg()) for x in given):
            return _by_operators(given, options, return_lse)
        call = bind_call(named, (*settled.numbers, settled.backend), facts, alone=not return_lse)
        CACHES.add(key, call)
    if given[13] is not None or given[14] is not None:
        given = (*given[:13], *[_constant(x, q.device) for x in given[13:15]], *given[15:])
    if given[17] is not None:
        check_own_memory(given)
    if profiler._is_profiler_enabled:
        with profiler.record_function("triflash::attention_with_kvcache"):
            return _run(call, given, return_lse)
    return _run(call, given, return_lse)


def _checks() -> bool:
    """Whether the caller wants lengths and tables to be read."""
    if _environment is None:
        return os.environ.get("TRIFLASH_CHECK") == "1"
    return bool(_environment.get(b"TRIFLASH_CHECK") == b"1")


def bind_call(given: CacheGiven, options: tuple[Any, ...], facts: DeviceFacts, alone: bool = False) -> BoundCache:
    """What a checked call would run on a device, from its arguments, of which no tensor's memory is read."""
    meta = {name: torch.empty((1, 1), device="meta") for name in ("k_scale", "v_scale") if _is_number(getattr(given, name))}
    without: dict[str, Any] = dict.fromkeys(meta)
    operands = operands_of(given._replace(**without))._replace(**meta)
    return bind_cache(operands, (given.k_new, given.v_new, given.out), options, facts, given.q.device, alone=alone)


def _run(call: BoundCache, given: tuple[Any, ...], return_lse: bool) -> Any:
    bias, _, slopes, _, k_scale, v_scale, k_new, _, out = given[9:]
    if bias is given[10] is slopes is k_scale is v_scale is None:  # nothing to bring into another form
        results = call.run(given)
    else:
        results = call.run((*operands_of(CacheGiven._make(given)), *given[15:]))
    if k_new is not None:
        _count_writes(given[1:3])
    if out is not None:
        _count_writes((out,))
        results = [out, *results]
    return (results[0], results[1]) if return_lse else results[0]


def _count_writes(tensors: tuple[Tensor, ...]) -> None:
    """Autograd, which may have saved them, is told that they were written."""
    for x in tensors:
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)


def _is_number(x: Any) -> bool:
    return x is not None and not isinstance(x, Tensor)


def _constant(x: Any, device: torch.device) -> Any:
    """A scale that is a number, as the tensor that kernels read. Kept, but not from within a capture, whose memory is the graph's."""
    if not _is_number(x):
        return x
    kept = _constants.get((float(x), device))
    if kept is not None:
        return kept
    made = torch.full((1, 1), float(x), dtype=torch.float32, device=device)
    if len(_constants) < 256 and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        if device.type == "cuda":  # once: another stream may read it next
            torch.cuda.current_stream(device).synchronize()
        _constants[float(x), device] = made
    return made


def _by_operators(given: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool) -> Any:
    """The same by operators, which tracers and subclasses see."""
    q = given[0]
    if is_casting(q):
        return _autocasted(given, options, return_lse)
    if any(isinstance(x, Tensor) and is_dtensor(x) for x in given):
        raise UnsupportedError("KV caches as DTensors: call attention_with_kvcache on what each process has, x.to_local()")
    named = CacheGiven._make(given)
    settled = checked_cache(named, CacheOptions._make(options))
    refuse_gradients(named)
    x = operands_of(named)
    if named.k_new is not None:
        cache_append(
            x.k_cache, x.v_cache, named.k_new, named.v_new, x.cache_lengths, x.page_table, x.cache_index, x.offsets_new, x.k_scale,
            x.v_scale, settled.backend,
        )  # fmt: skip
    if named.out is None:
        out, lse = cache_forward(*x, *settled.numbers, settled.backend)
    else:
        out, lse = named.out, cache_forward_out(*x, *settled.numbers, settled.backend, named.out)
    return (out, lse) if return_lse else out


def _autocasted(given: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool) -> Any:
    """Under autocast q, k_new and v_new take the caches' dtype, which are not copied; beside 8-bit ones, that of autocast."""
    named = CacheGiven._make(given)
    device = named.q.device.type
    cache = named.k_cache.dtype if isinstance(named.k_cache, Tensor) else None
    dtype = torch.get_autocast_dtype(device) if cache == FP8 else cache
    cast = {
        name: x.to(dtype)
        for name in ("q", "k_new", "v_new")
        if isinstance(x := getattr(named, name), Tensor) and x.dtype in CASTS and dtype in CASTS
    }
    with torch.autocast(device, enabled=False):
        return attend_cache(named._replace(**cast), options, return_lse)
