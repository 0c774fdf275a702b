"""One pass, bound: its allocations, copies and launches, repeated with the addresses of each call.

Tensors of a pass have *slots*: first those that a call hands in, then those that the pass allocates. A bound pass is made from the shapes,
strides, dtypes and alignments of its tensors alone, on meta tensors, and holds no tensor of a caller and no scratch: calls of any thread
share it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import launch
from ..launch.calls import Call, sink_gradient
from ..launch.room import Allocation, Described, View
from ..plan.steps import Plan
from ..spec import AttentionSpec, Saved
from ..spec_cache import CacheSpec

if TYPE_CHECKING:
    from ..launch.native import Launch

__all__ = ["BoundPass"]

_ALIGNMENT = 256  # bytes, of each part of the scratch: what any load or tensor map wants

Given = Sequence[Tensor | None]
_Allocated = tuple[tuple[int, ...], tuple[int, ...], "torch.dtype | None"]  # None: the dtype of what it is allocated like


class BoundPass:
    """A forward or a backward pass of one signature.

    plan, spec: what it carries out. room: what it allocates and copies, as ``explain`` prints it. calls: its launches on meta tensors; None
    where the backend works in PyTorch, or there is nothing to compute. aside: runs the pass without anything bound, from the tensors of
    all slots, whose allocations have been made.
    """

    stamp = 0

    def __init__(
        self,
        plan: Plan,
        spec: AttentionSpec | CacheSpec,
        room: Described,
        calls: list[Call] | None,
        aside: Callable[[Given], None],
        device: torch.device,
    ) -> None:
        self.plan, self.spec, self.room, self.calls, self._aside = plan, spec, room, calls, aside
        self._device = device
        self._results = [_shape_of(each, spec.tensor_dtype) for each in room.allocations if each.use == "result"]
        self._steps: _Native | None = None
        self._tried = calls is None
        self._lock = threading.Lock()

    def run(self, given: Given, like: Tensor) -> list[Tensor]:
        """Carry the pass out on the tensors of the given slots; returns the results, in the order of their allocation.

        ``like``, in the spec's dtype, is one of them, where all memory is allocated.
        """
        new = like.new_empty_strided
        # Parsing a dtype takes PyTorch longer than finding the memory.
        results = [new(shape, strides) if dtype is None else new(shape, strides, dtype=dtype) for shape, strides, dtype in self._results]
        native = self._steps
        if native is None and not self._tried:
            native = self._bind()
        if native is None or native.changed():
            self._aside([*given, *results])
        elif native.index is None or native.index == _current_device():
            native.run(given, results, like)
        else:
            with torch.cuda.device(self._device):
                native.run(given, results, like)
        if launch.recorders:
            launch.record(self.plan)
        return results

    def _bind(self) -> _Native | None:
        from ..launch import native as _native  # needs Triton

        if _native.stands_aside():
            return None  # for now
        assert self.calls is not None
        with self._lock, launch.on(self._device):
            if not self._tried:
                bound = [_native.bind(call, self.room.place) for call in self.calls]
                known = [each for each in bound if each is not None]
                self._steps = _Native(self.room, known, self._device, self.spec.tensor_dtype) if len(known) == len(bound) else None
                self._tried = True
        return self._steps


def _shape_of(each: Allocation, like: torch.dtype) -> _Allocated:
    return each.shape, each.strides, None if each.dtype == like else each.dtype


_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)  # which is not there in builds for CPUs


class _Native:
    """The launches of a pass, bound, with the memory that they share. changed: whether they have to go Triton's own way now. index: of the
    device that must be the current one; None: any.
    """

    def __init__(self, room: Described, launches: list[Launch], device: torch.device, like: torch.dtype) -> None:
        from ..launch import native

        self._launches = launches
        self.changed = native.watch(launches)
        self.index = device.index if device.type == "cuda" else None
        self._stream: Callable[[int], int] = native.streams() if launches else int
        given, results = room.given, sum(each.use == "result" for each in room.allocations)
        # Behind given and results: copies, then all scratch in one.
        copies = [(room.given + at, each) for at, each in enumerate(room.allocations) if each.use == "copy"]
        self._copies_made = [_shape_of(each, like) for _, each in copies]
        places = {slot: (slot, 0) for slot in range(given)}
        kept = [room.given + at for at, each in enumerate(room.allocations) if each.use == "result"]
        places |= {slot: (given + at, 0) for at, slot in enumerate(kept)}
        places |= {slot: (given + results + at, 0) for at, (slot, _) in enumerate(copies)}
        shared, size = given + results + len(copies), 0
        for at, each in enumerate(room.allocations):
            if each.use == "scratch":
                places[room.given + at] = (shared, size)
                size += -(-each.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._scratch = size // like.itemsize
        for one in launches:
            one.move(places)
        used = sorted({slot for each in launches for slot in each.slots})
        self._used, self._count = [slot for slot in used if slot < given + results], shared + 1
        self._first_own, self._shared = given + results, shared
        moved = lambda view: _moved(view, places)  # noqa: E731
        self._before = [(moved(each.target), moved(each.source)) for each in room.copies if not each.after]
        self._after = [(moved(each.target), moved(each.source)) for each in room.copies if each.after]
        self._zeros = [moved(view) for view in room.zeros]
        self._sinks = [
            (moved(s.dsink), moved(s.sink), moved(s.lse), None if s.rest is None else moved(s.rest), moved(s.delta), s.factor)
            for s in room.sinks
        ]
        self._plain = not (self._before or self._after or self._zeros or self._sinks or copies)

    def run(self, given: Given, results: list[Tensor], like: Tensor) -> None:
        """Fill the results, on the current device."""
        addresses = [0] * self._count
        tensors = [*given, *results]
        for slot in self._used:
            addresses[slot] = tensors[slot].data_ptr()  # type: ignore[union-attr]
        if not self._plain:
            new = like.new_empty_strided
            for at, (shape, strides, dtype) in enumerate(self._copies_made, self._first_own):
                made = new(shape, strides) if dtype is None else new(shape, strides, dtype=dtype)
                tensors.append(made)
                addresses[at] = made.data_ptr()
        if self._scratch:
            scratch = like.new_empty_strided((self._scratch,), (1,))
            addresses[self._shared] = scratch.data_ptr()
            tensors.append(scratch)
        for target, source in self._before:
            _seen(target, tensors).copy_(_seen(source, tensors))
        if self._launches:
            stream = self._stream(self.index or 0)
            for each in self._launches:
                each(stream, addresses)
        if not self._plain:
            for target, source in self._after:
                _seen(target, tensors).copy_(_seen(source, tensors))
            for view in self._zeros:
                _seen(view, tensors).zero_()
            for dsink, sink, lse, rest, delta, factor in self._sinks:
                saved = Saved(_seen(lse, tensors), _seen(lse, tensors), None if rest is None else _seen(rest, tensors))
                _seen(dsink, tensors).copy_(sink_gradient(_seen(sink, tensors), saved, _seen(delta, tensors), factor))


def _moved(view: View, places: dict[int, tuple[int, int]]) -> View:
    slot, offset = places[view.slot]
    return view._replace(slot=slot, offset=view.offset + offset // view.dtype.itemsize)


def _seen(view: View, tensors: list[Tensor | None]) -> Tensor:
    """The part of a slot that a view means."""
    whole = tensors[view.slot]
    assert whole is not None
    if whole.dtype != view.dtype:
        if whole.dtype.itemsize == view.dtype.itemsize:  # bool read as bytes
            whole = whole.view(view.dtype)
        else:  # in the scratch
            size = 1 + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True)) if math.prod(view.shape) else 0
            begin, width = view.offset * view.dtype.itemsize, view.dtype.itemsize
            return whole.view(torch.uint8)[begin : begin + size * width].view(view.dtype).as_strided(view.shape, view.strides)
    return whole.as_strided(view.shape, view.strides, whole.storage_offset() + view.offset)
