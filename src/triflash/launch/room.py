"""Where a pass finds memory, copies and the sum of a sink: a ``Room``. Called by launchers; who called them decides what it does.

``Real`` allocates and copies as it is asked, for tools that run a plan on tensors at hand. ``Described`` works on meta tensors and keeps
what was asked for: a bound pass (``bound/``) repeats it with new addresses, and ``explain`` prints it. Needs torch only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..spec import Saved
from .calls import address_of, sink_gradient

__all__ = ["META", "Allocation", "Copied", "Described", "Real", "Room", "SinkSum", "View", "meta", "twin"]

META = torch.device("meta")  # by its name it is looked up at every call


class Room(Protocol):
    """What a launcher may ask for. gpu: whether kernels run on a GPU (Triton's interpreter reads any layout at the same speed)."""

    gpu: bool

    def new(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Contiguous, uninitialised memory for the length of the pass."""

    def copied(self, name: str, x: Tensor, target: Tensor, reason: str) -> Tensor:
        """``target``, which :meth:`new` gave or a view of it, with x's values before the first kernel starts."""

    def target(self, name: str, shape: Sequence[int], dtype: torch.dtype, into: Tensor, reason: str) -> Tensor:
        """Memory for a result that kernels cannot write where it belongs; its first ``into.shape`` elements go there after the last."""

    def sum_sink(self, dsink: Tensor, sink: Tensor, saved: Saved, delta: Tensor, factor: float) -> None:
        """After the last kernel, fill dsink by :func:`~triflash.launch.calls.sink_gradient` of ``factor * delta``."""

    def fill_zero(self, x: Tensor) -> None:
        """Zero a result that no kernel writes."""


class Real:
    """Works at once, on the device of ``like``; :meth:`finish` does what comes after the kernels."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.gpu = like, like.device.type in ("cuda", "meta")  # a meta tensor stands for one on a GPU
        self._after: list[tuple[Tensor, Tensor]] = []
        self._sinks: list[tuple[Tensor, Tensor, Saved, Tensor, float]] = []

    def new(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.like.new_empty(shape, dtype=dtype)

    def copied(self, name: str, x: Tensor, target: Tensor, reason: str) -> Tensor:
        return target.copy_(x)

    def target(self, name: str, shape: Sequence[int], dtype: torch.dtype, into: Tensor, reason: str) -> Tensor:
        made = self.new(name, shape, dtype)[tuple(slice(size) for size in into.shape)]
        self._after.append((into, made))
        return made

    def sum_sink(self, dsink: Tensor, sink: Tensor, saved: Saved, delta: Tensor, factor: float) -> None:
        self._sinks.append((dsink, sink, saved, delta, factor))

    def fill_zero(self, x: Tensor) -> None:
        x.zero_()

    def finish(self) -> None:
        for into, made in self._after:
            into.copy_(made)
        for dsink, sink, saved, delta, factor in self._sinks:
            dsink.copy_(sink_gradient(sink, saved, delta, factor))


class Allocation(NamedTuple):
    """Memory that a pass takes anew in every call. use: ``"result"``, ``"copy"``, ``"scratch"``, of which all share one
    allocation, or ``"pytorch"``: a backend in PyTorch takes it by itself.
    """

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    use: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class View(NamedTuple):
    """Part of a slot's memory. offset: in elements of the dtype, from where the slot's tensor begins."""

    slot: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class Copied(NamedTuple):
    """A copy that a pass makes, before its first kernel or after its last."""

    name: str
    source: View
    target: View
    nbytes: int
    reason: str
    after: bool


class SinkSum(NamedTuple):
    """The gradient of a sink from its parts. rest: None if the lse kept none."""

    dsink: View
    sink: View
    lse: View
    rest: View | None
    delta: View
    factor: float


def twin(x: Tensor) -> Tensor:
    """A meta tensor of x's shape, strides, dtype and address modulo 16 bytes."""
    address = address_of(x) % 16
    if address:
        return meta(x.shape, x.stride(), x.dtype, address)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)


def meta(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, address: int = 0) -> Tensor:
    """A meta tensor that starts ``address`` bytes after a multiple of 16."""
    offset = address // dtype.itemsize
    if not offset:
        return torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype, device=META)
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if math.prod(shape) else 0
    return torch.empty(offset + span, dtype=dtype, device=META).as_strided(tuple(shape), tuple(strides), offset)


class Described:
    """Keeps, for meta tensors, what it is asked for. Every meta tensor of a pass is a view of a *slot*: the memory of one tensor that the
    pass is given (slots come in the order of :meth:`give`) or allocates (:attr:`allocations`, after those). Its storage tells which.

    there: the slots of given tensors, but for those where none is handed in. places: of the tensors that slots are of, and of views that
    :meth:`part` was told of, by id, the slot and the bytes from where its tensor begins.
    """

    def __init__(self, gpu: bool = True) -> None:
        self.gpu = gpu
        self.given, self.there = 0, list[int]()
        self.allocations: list[Allocation] = []
        self.copies: list[Copied] = []
        self.sinks: list[SinkSum] = []
        self.zeros: list[View] = []
        self.places: dict[int, tuple[int, int]] = {}
        self._kept: list[Tensor] = []  # while one lives, nothing else gets its number
        self._slots: dict[int, tuple[int, int]] = {}  # storage -> slot, and where in the storage the slot's tensor begins, in bytes
        self._asked = 0  # of those kept, how many _slots knows: as many as views have wanted

    def give(self, *tensors: Tensor | None) -> None:
        """The next tensors that a call hands in; None: it hands in none."""
        assert not self.allocations, "slots of given tensors come first"
        places, there, kept = self.places, self.there, self._kept
        for slot, x in enumerate(tensors, self.given):
            if x is not None:
                places[id(x)] = slot, 0
                there.append(slot)
                kept.append(x)
        self.given += len(tensors)

    def result(self, name: str, x: Tensor) -> Tensor:
        """x, whose memory every call allocates anew and hands out."""
        return self._allocate(name, x, "result")

    def new(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._allocate(name, torch.empty(tuple(shape), dtype=dtype, device=META), "scratch")

    def copied(self, name: str, x: Tensor, target: Tensor, reason: str) -> Tensor:
        nbytes = self._becomes_copy(target)
        self.copies.append(Copied(name, self.view(x), self.view(target), nbytes, reason, False))
        return target

    def target(self, name: str, shape: Sequence[int], dtype: torch.dtype, into: Tensor, reason: str) -> Tensor:
        made = self.new(name, shape, dtype)[tuple(slice(size) for size in into.shape)]
        nbytes = self._becomes_copy(made)
        self.copies.append(Copied(name, self.view(made), self.view(into), nbytes, reason, True))
        return made

    def sum_sink(self, dsink: Tensor, sink: Tensor, saved: Saved, delta: Tensor, factor: float) -> None:
        rest = None if saved.rest is None else self.view(saved.rest)
        self.sinks.append(SinkSum(self.view(dsink), self.view(sink), self.view(saved.lse), rest, self.view(delta), factor))

    def fill_zero(self, x: Tensor) -> None:
        self.zeros.append(self.view(x))

    def contiguous(self, name: str, x: Tensor) -> Tensor:
        """A contiguous copy of x, for batch dims that do not lie one behind the other."""
        return self.copied(name, x, self.new(name, x.shape, x.dtype), "its batch dims do not lie one behind the other")

    def mention(self, name: str, nbytes: int) -> None:
        """Memory that a backend in PyTorch takes by itself."""
        self.allocations.append(Allocation(name, (nbytes,), (1,), torch.uint8, "pytorch"))

    def part(self, whole: Tensor, x: Tensor, begin: int) -> Tensor:
        """x, a view of a slot's tensor that begins so many bytes behind it."""
        self.places[id(x)] = self.places[id(whole)][0], begin
        self._kept.append(x)
        return x

    def place(self, x: Tensor) -> tuple[int, int]:
        """(slot, bytes from where the slot's tensor begins) of a meta tensor."""
        known = self.places.get(id(x))
        if known is not None:
            return known
        slots, storage = self._slots, x.untyped_storage()._cdata
        while storage not in slots:
            each = self._kept[self._asked]
            slot, begin = self.places[id(each)]
            slots[each.untyped_storage()._cdata] = slot, int(each.storage_offset()) * each.element_size() - begin
            self._asked += 1
        slot, begin = slots[storage]
        return slot, int(x.storage_offset()) * x.element_size() - begin

    def view(self, x: Tensor) -> View:
        """A meta tensor as a part of its slot."""
        slot, offset = self.place(x)
        return View(slot, tuple(x.shape), x.stride(), offset // x.element_size(), x.dtype)

    def _allocate(self, name: str, x: Tensor, use: str) -> Tensor:
        self.places[id(x)] = self.given + len(self.allocations), 0
        self._kept.append(x)
        self.allocations.append(Allocation(name, tuple(x.shape), x.stride(), x.dtype, use))
        return x

    def _becomes_copy(self, target: Tensor) -> int:
        """The bytes of the allocation that ``target`` is a view of."""
        at = self.place(target)[0] - self.given
        self.allocations[at] = self.allocations[at]._replace(use="copy")
        return self.allocations[at].nbytes
