"""Integers and pointers as a Gluon kernel computes with them, on tensors of PyTorch: part of the stand-in of ``gluon_twin.py``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def wrapped(x: int) -> int:
    """x as an int32 has it."""
    return (x + 2**31) % 2**32 - 2**31


def kind(dtype: torch.dtype) -> SimpleNamespace:
    """What kernels ask about a dtype of integers."""
    return SimpleNamespace(is_int_unsigned=lambda: not dtype.is_signed, primitive_bitwidth=8 * dtype.itemsize)


INT32 = kind(torch.int32)


class Scalar(int):
    """An integer that a kernel computes with: divides as the GPU does, towards zero, and a comparison of it is one of its kind."""

    dtype = INT32

    def to(self, dtype: object, bitcast: bool = False) -> Scalar:
        if isinstance(dtype, int):  # unsigned dtypes are their bits here
            return Scalar(self & 2**dtype - 1)
        return Scalar(wrapped(self)) if dtype == torch.int32 else self


def _quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _scalar_operator(function: Callable[[int, int], int], reflected: bool = False) -> Callable[[Scalar, Any], Any]:
    def method(self: Scalar, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        a, b = int(self), int(other)
        return Scalar(function(b, a) if reflected else function(a, b))

    return method


for _name, _function in {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": _quotient, "mod": lambda a, b: a - _quotient(a, b) * b,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor, "rshift": operator.rshift, "lshift": operator.lshift,
}.items():  # fmt: skip
    setattr(Scalar, f"__{_name}__", _scalar_operator(_function))
    setattr(Scalar, f"__r{_name}__", _scalar_operator(_function, True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Scalar, f"__{_name}__", _scalar_operator(getattr(operator, _name)))
Scalar.__hash__ = int.__hash__  # type: ignore[method-assign]
Scalar.__neg__ = lambda self: Scalar(-int(self))  # type: ignore[method-assign]


def scalars(numbers: Iterable[int]) -> Iterator[Scalar]:
    return map(Scalar, numbers)


def where(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, int):
        return torch.where(condition, a, b)
    chosen = a if condition else b
    return Scalar(chosen) if isinstance(chosen, int) else chosen


class Pointer:
    """Addresses into a tensor's storage, in elements from where the tensor begins."""

    def __init__(self, base: Tensor, at: Any = 0) -> None:
        self.base, self.at, self.dtype = base, at, SimpleNamespace(element_ty=base.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.base, self.at + other)

    def to(self, _dtype: object) -> Pointer:
        return self

    def memory(self) -> Tensor:
        size = sum((n - 1) * s for n, s in zip(self.base.shape, self.base.stride(), strict=True)) + 1
        return self.base.as_strided((size,), (1,))


def load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Any:
    memory = pointer.memory()
    if not isinstance(pointer.at, Tensor):
        x = memory[int(pointer.at)]
        if x.is_floating_point():
            return x.clone()
        scalar = Scalar(x.item())
        scalar.dtype = kind(x.dtype)
        return scalar
    mask = torch.ones_like(pointer.at, dtype=torch.bool) if mask is None else mask
    if memory.dtype == torch.uint8:  # read by two: the byte behind an odd number of them belongs to what is read, and may be anything
        memory = torch.nn.functional.pad(memory, (0, 1), value=1)
    return torch.where(mask, memory[torch.where(mask, pointer.at, 0)], torch.tensor(other, dtype=memory.dtype))


def store(pointer: Pointer, x: Any, mask: Any = None) -> None:
    x = x if isinstance(x, Tensor) and x.dim() else torch.as_tensor(x, dtype=pointer.base.dtype)
    at, x, mask = torch.broadcast_tensors(torch.as_tensor(pointer.at), x, torch.tensor(True) if mask is None else mask)
    assert x.dtype == pointer.base.dtype
    pointer.memory()[at[mask]] = x[mask]


def reduced(function: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Any]:
    """A reduction along a dim, which makes one whole number of a row of them."""

    def own(x: Tensor, dim: int) -> Any:
        result = function(x, dim)
        return result if result.dim() or result.is_floating_point() else Scalar(result.item())

    return own


def smaller(a: Any, b: Any) -> Any:
    return Scalar(min(a, b)) if isinstance(a, int) and isinstance(b, int) else torch.minimum(torch.as_tensor(a), torch.as_tensor(b))


def larger(a: Any, b: Any) -> Any:
    return Scalar(max(a, b)) if isinstance(a, int) and isinstance(b, int) else torch.maximum(torch.as_tensor(a), torch.as_tensor(b))
