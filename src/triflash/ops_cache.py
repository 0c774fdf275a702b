"""The operators of calls on a KV cache, for what traces; eager calls take :class:`~triflash.bound.cached.BoundCache`. Called by
``door_cache.py``.

``triflash::cache_append``       writes new keys and values into the caches, which it declares mutated
``triflash::cache_forward``      (operands, options) -> (out, lse): queries on a cache that has them already; no derivative
``triflash::cache_forward_out``  the same into a given out; -> lse

Operands are the fields of :class:`~triflash.spec_cache.CacheOperands`, options those of :func:`~triflash.spec_cache.cache_spec_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .bound.cached import BoundCache, lse_shape
from .bound.signature import CACHES, ambient, describe
from .derivatives import underivable
from .errors import UnsupportedError
from .flops import register_cache_formulas
from .launch.room import twin
from .plan.device import DeviceFacts
from .spec_cache import CacheOperands, cache_spec_of

__all__ = ["bind_cache", "cache_append", "cache_forward", "cache_forward_out"]

_COUNT = len(CacheOperands._fields)
_OPERANDS = (
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor? cache_lengths, Tensor? key_starts, Tensor? page_table, Tensor? cache_index, "
    "Tensor? offsets_q, Tensor? offsets_new, Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sink, Tensor? k_scale, "
    "Tensor? v_scale"
)
_OPTIONS = (
    "SymInt? left, SymInt? right, float scale, str precision, float softcap, SymInt? max_queries, SymInt? new, SymInt? num_splits, "
    "SymInt? split_size, str backend"
)

_library = torch.library.Library("triflash", "FRAGMENT")
_library.define(
    "cache_append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k_new, Tensor v_new, Tensor? cache_lengths, Tensor? page_table, "
    "Tensor? cache_index, Tensor? offsets_new, Tensor? k_scale, Tensor? v_scale, str backend) -> ()"
)
_library.define(f"cache_forward({_OPERANDS}, {_OPTIONS}) -> (Tensor, Tensor)")
_library.define(f"cache_forward_out({_OPERANDS}, {_OPTIONS}, Tensor(a!) out) -> Tensor")


def bind_cache(
    operands: Sequence[Tensor | None], more: Sequence[Tensor | None], options: Sequence[Any], facts: DeviceFacts, device: torch.device,
    **how: bool,
) -> BoundCache:  # fmt: skip
    """What a call would run on a device; no tensor's memory is read. more: k_new, v_new, out. options: with the backend at the end."""
    twins = [None if x is None else twin(x) for x in (*operands, *more)]
    spec = cache_spec_of(CacheOperands._make(twins[:_COUNT]), *options[:-1])
    return BoundCache(twins, spec, facts, options[-1], device, **how)


def _bound(operands: Sequence[Tensor | None], more: Sequence[Tensor | None], options: Sequence[Any], attends: bool) -> BoundCache:
    q = operands[0]
    assert q is not None
    facts, around = ambient(q)
    options = tuple(options)
    key = ("cache operator", tuple([describe(x) for x in (*operands, *more)]), options, tuple(map(type, options)), attends, around)
    call = CACHES.get(key)
    if call is None:
        call = bind_cache(operands, more, options, facts, q.device, attends=attends)
        CACHES.add(key, call)
    return call


def _append(
    k_cache: Tensor, v_cache: Tensor, k_new: Tensor, v_new: Tensor, lengths: Tensor | None, table: Tensor | None, index: Tensor | None,
    offsets: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, backend: str,
) -> None:  # fmt: skip
    # The problem is that of one query head for each key head; a query that is not looked at stands for them.
    requests = k_new.shape[0] if offsets is None else offsets.shape[0] - 1
    q = k_new.new_empty(requests, 1, k_cache.shape[2], k_cache.shape[3])
    operands = (q, k_cache, v_cache, lengths, None, table, index, None, offsets, *(None,) * 4, k_scale, v_scale)
    new = k_new.shape[0 if offsets is not None else 1]
    call = _bound(operands, (k_new, v_new, None), (None, None, 1.0, "", 0.0, None, new, None, None, backend), attends=False)
    call.run((*operands, k_new, v_new, None))


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    operands, options = args[:_COUNT], args[_COUNT:]
    out, lse = _bound(operands, (None,) * 3, options, attends=True).run((*operands, None, None, None))
    return out, lse


def _forward_out(*args: Any) -> Tensor:
    operands, options, out = args[:_COUNT], args[_COUNT:-1], args[-1]
    (lse,) = _bound(operands, (None, None, out), options, attends=True).run((*operands, None, None, out))
    return lse


def _fake_append(*_: Any) -> None:
    return None


def _fake_lse(q: Tensor) -> Tensor:
    return q.new_empty(lse_shape(q), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    q, _, v_cache = args[:3]
    return q.new_empty(*q.shape[:-1], v_cache.shape[3]), _fake_lse(q)


def _fake_forward_out(*args: Any) -> Tensor:
    return _fake_lse(args[0])


def _no_vmap(*_: Any) -> Any:
    raise UnsupportedError(
        "vmap of attention_with_kvcache: requests are its batch already; make the mapped dim part of it, or call triflash.attention"
    )


for _name, _fn, _fake in (
    ("cache_append", _append, _fake_append),
    ("cache_forward", _forward, _fake_forward),
    ("cache_forward_out", _forward_out, _fake_forward_out),
):
    _library.impl(_name, _fn, "CompositeExplicitAutograd")
    torch.library.register_fake(f"triflash::{_name}", _fake, lib=_library)
    torch.library.register_vmap(f"triflash::{_name}", _no_vmap, lib=_library)

_NO_GRADIENTS = (
    "gradients of attention_with_kvcache, which has none: call triflash.attention(q, k, v) with keys and values as tensors, or attend "
    "under torch.no_grad()"
)
cache_append = torch.ops.triflash.cache_append.default
cache_forward = torch.ops.triflash.cache_forward.default
cache_forward_out = torch.ops.triflash.cache_forward_out.default
underivable(_library, cache_append, _append, _NO_GRADIENTS)
underivable(_library, cache_forward, _forward, _NO_GRADIENTS)
underivable(_library, cache_forward_out, _forward_out, _NO_GRADIENTS)
register_cache_formulas(torch.ops.triflash.cache_forward, torch.ops.triflash.cache_forward_out)
