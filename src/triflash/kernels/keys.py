"""Keys of kernels in Triton's cache that no earlier use of another kernel changes. Called by ``launch/calls.py``.

Triton keys a function by its source, the keys of the functions that it calls, and global constants: its own, and of those functions whose
keys were known before (3.6 and 3.7: ``DependenciesFinder._update_hash`` reads a callee's constants, then works out its key). What else a
process has compiled would so decide whether it finds what ``triflash compile`` left for it. Here callees come first, whoever calls them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from triton.runtime.jit import JITCallable

__all__ = ["settle"]

_settled: dict[int, JITCallable] = {}  # by id: a function's own hash is that of its key
_settling = threading.RLock()


def settle(kernel: Any) -> None:
    """Work out the keys of a kernel and of all that it calls, innermost first. A kernel that the interpreter runs has none."""
    if id(kernel) in _settled or not isinstance(kernel, JITCallable):
        return
    with _settling:
        _settle(kernel)


def _settle(function: JITCallable) -> None:
    if id(function) in _settled:
        return
    _settled[id(function)] = function  # before its callees: a function may call itself
    for callee in _callees(function):
        _settle(callee)
    _ = function.cache_key


def _callees(function: JITCallable) -> Iterator[JITCallable]:
    """What its source can name, and of modules and records that it names, every function whose name occurs, or that a record has."""
    names = function.fn.__code__.co_names
    for name in names:
        value = function.__globals__.get(name)
        held = [vars(value).get(inner) for inner in names] if isinstance(value, ModuleType) else [value]
        for one in held:
            yield from (x for x in getattr(one, "hash_attrs", [one]) if isinstance(x, JITCallable))
