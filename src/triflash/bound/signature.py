"""What tells one call from another: everything that a bound pass depends on, and nothing else. And the calls that are bound.

Called by ``door*.py`` and ``ops*.py``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..plan.device import DeviceFacts, facts_of, limits_in_force
from ..plan.select import Choices, current_choices
from .cache import Recent
from .cached import BoundCache
from .call import BoundCall
from .compare import address, comparison_of

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
    """An entry of a :class:`~triflash.bound.cache.Recent` as one C function, :func:`~triflash.bound.compare.comparison_of`'s, tells it.
    Addresses are multiples of 16. wants: whether one of the tensors requires a gradient.
    """

    check: Callable[..., bool]
    entry: Any
    wants: bool


_NEAR, _EACH = 1024, 4  # keys, and of each the entries that are told apart by check


def near_of(recent: Recent[Any], key: Any, tensors: Sequence[Tensor]) -> Near | None:
    """The entry that was remembered under such a key for tensors like these."""
    # The facts of a device follow from it: it has one set of them, but for limits, and unless a test gives it another.
    for each in recent.near.get((key, facts_of, limits_in_force()), ()):
        if each.check(*tensors):
            if functools.reduce(operator.or_, map(address, tensors)) & 15:
                return None
            each.entry.stamp = recent.now
            found: Near = each
            return found
    return None


def remember_near(recent: Recent[Any], key: Any, tensors: Sequence[Tensor], entry: Any) -> None:
    """Remember them, if their addresses are multiples of 16, few like them are, and this PyTorch has what compares them."""
    key = (key, facts_of, limits_in_force())
    others = recent.near.get(key, ())
    if len(others) >= _EACH or any(x.data_ptr() & 15 for x in tensors):
        return
    check = comparison_of(tensors)
    if check is not None:
        if len(recent.near) >= _NEAR:
            recent.near.clear()
        recent.near[key] = (*others, Near(check, entry, any(x.requires_grad for x in tensors)))
