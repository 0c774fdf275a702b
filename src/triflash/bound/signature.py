"""What tells one call from another: everything that a bound pass depends on, and nothing else. And the calls that are bound.

Called by ``door*.py`` and ``ops*.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..plan.device import DeviceFacts, facts_of, limits_in_force
from ..plan.select import Choices, current_choices
from .cache import Recent
from .cached import BoundCache
from .call import BoundCall

__all__ = ["CACHES", "CALLS", "Ambient", "Near", "ambient", "current_choices", "describe", "near_of", "remember_near"]

CAPACITY = 1024  # signatures; one takes some 50 kB

CALLS: Recent[BoundCall] = Recent(CAPACITY)
CACHES: Recent[BoundCache] = Recent(CAPACITY)  # calls on a KV cache

Ambient = tuple[int, Choices]


def describe(x: Tensor | None) -> tuple[Any, ...] | None:
    """Of a tensor what a pass depends on, its address modulo 16 bytes included, and whether memory holds its values: class, negation."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15, x.is_neg(), type(x))


def ambient(q: Tensor) -> tuple[DeviceFacts, Ambient]:
    """What is known of q's device, and what stands for it and for chosen configurations in a signature.

    The facts of a device are one object, which the bound calls keep alive: its number is looked up faster than its contents.
    """
    facts = facts_of(q.device)
    return facts, (id(facts), current_choices())


class Near(NamedTuple):
    """An entry of a :class:`~triflash.bound.cache.Recent` as one C function tells it: ``check(*tensors)`` compares classes, dispatch keys
    (negation among them), dtypes, devices, sizes, strides and who requires a gradient. Addresses are multiples of 16. wants: whether one
    of them requires a gradient.
    """

    check: Callable[..., bool]
    entry: Any
    wants: bool


_NEAR, _EACH = 1024, 4  # keys, and of each the entries that are told apart by check
# What Dynamo compares tensors by, in a tenth of the time that describing them takes. PyTorch does not promise it.
_guards: Any = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)


def _near_key(key: Any) -> tuple[Any, ...]:
    """With what the facts of a device follow from: it has one set of them, but for limits, and unless a test gives it another."""
    return (key, facts_of, limits_in_force())


def near_of(recent: Recent[Any], key: Any, tensors: Sequence[Tensor]) -> Near | None:
    """The entry that was remembered under such a key for tensors like these."""
    for each in recent.near.get(_near_key(key), ()):
        if each.check(*tensors):
            low = 0
            for x in tensors:
                low |= x.data_ptr()
            if low & 15:
                return None
            each.entry.stamp = recent.now
            found: Near = each
            return found
    return None


def remember_near(recent: Recent[Any], key: Any, tensors: Sequence[Tensor], entry: Any) -> None:
    """Remember them, if their addresses are multiples of 16, few like them are, and this PyTorch has what compares them."""
    key = _near_key(key)
    others = recent.near.get(key, ())
    if _guards is None or len(others) >= _EACH or any(x.data_ptr() & 15 for x in tensors):
        return
    try:
        sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
        check = _guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        known = check(*tensors) is True
    except Exception:  # noqa: BLE001 (another form than that known here)
        return
    if known:
        if len(recent.near) >= _NEAR:
            recent.near.clear()
        recent.near[key] = (*others, Near(check, entry, any(x.requires_grad for x in tensors)))
