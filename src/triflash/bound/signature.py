"""What tells one call from another: everything that a bound pass depends on, and nothing else. And the calls that are bound."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..plan.device import DeviceFacts, facts_of
from ..plan.select import Choices, current_choices
from .cache import Recent
from .cached import BoundCache
from .call import BoundCall

__all__ = ["CACHES", "CALLS", "Ambient", "ambient", "describe"]

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
