"""One pass, bound: its allocations, copies and launches, repeated with the addresses of each call. Called by ``call.py``, ``cached.py``.

Tensors of a pass have *slots*: first those that a call hands in, then those that the pass allocates. A bound pass is made from the shapes,
strides, dtypes and alignments of its tensors alone, on meta tensors, and holds no tensor of a caller and no scratch: calls of any thread
share it.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import launch
from ..launch.calls import Call, sink_gradient
from ..launch.room import Described, View
from ..plan.steps import Plan
from ..spec import AttentionSpec, Saved
from ..spec_cache import CacheSpec
from .compare import address

if TYPE_CHECKING:
    from ..launch.native import Launch

__all__ = ["BoundPass", "nothing"]

_ALIGNMENT = 256  # bytes, of each part of the scratch: what any load or tensor map wants

Given = Sequence[Tensor | None]
_Allocated = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class BoundPass:
    """A forward or a backward pass of one signature.

    plan, spec: what it carries out. room: what it allocates and copies, as ``explain`` prints it. calls: its launches on meta tensors; None
    where the backend works in PyTorch, or there is nothing to compute. aside: runs the pass without anything bound, from the tensors of
    all slots, whose allocations have been made. follows: the launches, on meta tensors, of the pass that these given tensors will probably
    ask for next, whose kernels are compiled beside those of this one; it may raise.
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
        follows: Callable[[Given], list[Call]] | None = None,
    ) -> None:
        self.follows = follows
        self.plan, self.spec, self.room, self.calls, self._aside = plan, spec, room, calls, aside
        self._device = device
        self._there = room.there
        self._steps: _Native | None = None
        self._tried = calls is None
        self._lock = threading.Lock()

    def run(self, there: Sequence[Tensor], like: Tensor, addresses: Sequence[int] | None = None) -> list[Tensor]:
        """Carry the pass out on the tensors of the given slots, less those where there is none; returns the results, in the order of their
        allocation.

        ``like``, in the spec's dtype, is one of them, where all memory is allocated. addresses: theirs, if that is known.

        Of a pass that is bound and has nothing to do but launches, an attribute takes this method's place: :meth:`_Native.at_once`.
        """
        native = self._steps
        if native is None:
            if not self._tried:
                native = self._bind(there)
        elif native.repeats:  # this is not the first time, and may not be the last
            self.run = at_once = native.at_once(functools.partial(BoundPass.run, self))  # type: ignore[method-assign]
            native.repeats = False
            return at_once(there, like, addresses)
        if native is None or native.changed():
            results = self._run_aside(there, like)
        elif native.index is None or native.index == _current_device():
            results = native.run(there, like, addresses)
        else:
            with torch.cuda.device(self._device):
                results = native.run(there, like, addresses)
        if launch.recorders:
            launch.record(self.plan)
        return results

    def _run_aside(self, there: Sequence[Tensor], like: Tensor) -> list[Tensor]:
        new = like.new_empty_strided
        shapes = [each[1:4] for each in self.room.allocations if each.use == "result"]
        results = [new(shape, strides, dtype=dtype) for shape, strides, dtype in shapes]
        self._aside([*self._given(there), *results])
        return results

    def _given(self, there: Sequence[Tensor]) -> list[Tensor | None]:
        """The tensors of all given slots."""
        given: list[Tensor | None] = [None] * self.room.given
        for slot, x in zip(self._there, there, strict=True):
            given[slot] = x
        return given

    def _bind(self, there: Sequence[Tensor]) -> _Native | None:
        if _binding()[0].stands_aside():
            return None  # for now
        with self._lock, launch.on(self._device):
            if not self._tried:
                self._steps = self._bound(there)
                self._tried = True
        return self._steps

    def _bound(self, there: Sequence[Tensor]) -> _Native | None:
        native, compiling = _binding()
        assert self.calls is not None
        if not native.can_bind(self.calls):
            return None
        compiled = compiling.compiled_kernels(self.calls, None if self.follows is None else functools.partial(self._following, there))
        memory = _Memory(self.room, self._there, self.spec.tensor_dtype)
        launches = native.bind(self.calls, compiled, memory.place, memory.known)
        memory.known.clear()  # some forty objects that nobody asks for again
        return None if launches is None else _Native(memory, launches, self._device)

    def _following(self, there: Sequence[Tensor]) -> list[Call]:
        assert self.follows is not None
        return self.follows(self._given(there))


@functools.cache
def _binding() -> tuple[ModuleType, ModuleType]:
    """What needs Triton: ``launch/native.py`` and ``launch/compiling.py``. An import of what is there takes a microsecond, too."""
    from ..launch import compiling, native

    return native, compiling


_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)  # which is not there in builds for CPUs
_deterministic: Callable[[], bool] = torch._C._get_deterministic_algorithms

# What compiled graphs allocate by, on the current device, in half the time: not by way of the dispatcher, which PyTorch does not promise.
_ALLOCATORS = {kind: getattr(getattr(torch._C._dynamo, "guards", None), f"_empty_strided_{kind}", None) for kind in ("cpu", "cuda")}


def nothing(like: Tensor, dtype: torch.dtype) -> Tensor:
    """``like.new_empty(0, dtype=dtype)``, sooner."""
    new = _ALLOCATORS["cpu"] if like.is_cpu else _ALLOCATORS["cuda"] if like.is_cuda and like.get_device() == _current_device() else None
    return like.new_empty(0, dtype=dtype) if new is None else new((0,), (1,), dtype)


class _Memory:
    """Where the memory of a pass is: among the given tensors that are there, results, copies, then all scratch in one. made: what of it is
    allocated in each call, results first; count: how many these are. known: of meta tensors, by id, what :meth:`place` tells.
    """

    def __init__(self, room: Described, there: Sequence[int], like: torch.dtype) -> None:
        self.room = room
        self._places = places = {slot: (at, 0) for at, slot in enumerate(there)}
        results: list[_Allocated] = []
        copies: list[_Allocated] = []
        copied, scratch, size = [], [], 0
        for slot, each in enumerate(room.allocations, room.given):
            use = each.use
            if use == "result":
                places[slot] = len(places), 0
                results.append(each[1:4])
            elif use == "scratch":
                scratch.append((slot, size))
                size += -(-each.nbytes // _ALIGNMENT) * _ALIGNMENT
            elif use == "copy":
                copied.append(slot)
                copies.append(each[1:4])
        for slot in copied:
            places[slot] = len(places), 0
        self.count, self.made = len(results), results + copies
        if size:
            self.made.append(((size // like.itemsize,), (1,), like))
            last = len(places)
            for slot, begin in scratch:
                places[slot] = last, begin
        self.known = {}
        for number, (slot, offset) in room.places.items():
            at, begin = places[slot]
            self.known[number] = at, begin + offset

    def place(self, x: Tensor) -> tuple[int, int]:
        """(which of them, bytes from where it begins) of a meta tensor."""
        known = self.known.get(id(x))
        if known is None:
            slot, offset = self.room.place(x)
            at, begin = self._places[slot]
            known = at, begin + offset
        return known

    def moved(self, view: View) -> View:
        """A view of a slot as one of these."""
        at, begin = self._places[view.slot]
        return view._replace(slot=at, offset=view.offset + begin // view.dtype.itemsize)


class _Native:
    """The launches of a pass, bound, with the memory that they share. changed: whether they have to go Triton's own way now. index: of the
    device that must be the current one; None: any. repeats: whether :meth:`at_once` is to run them from the second time on.
    """

    def __init__(self, memory: _Memory, launches: list[Launch], device: torch.device) -> None:
        native, _ = _binding()
        room, moved = memory.room, memory.moved
        self._launches = native.Launches(launches)
        self.changed = native.watch(launches)
        self.index = device.index if device.type == "cuda" else None
        self._device = self.index or 0
        self._stream: Callable[[int], int] = native.streams() if launches else int
        self._allocate = _ALLOCATORS.get(device.type)
        self._made, self._count = memory.made, memory.count
        self._all = len(self._made) == self._count
        self._plain = not (room.copies or room.zeros or room.sinks)
        self.repeats = self._plain and self._allocate is not None
        if self._plain:
            return
        self._before = [(moved(each.target), moved(each.source)) for each in room.copies if not each.after]
        self._after = [(moved(each.target), moved(each.source)) for each in room.copies if each.after]
        self._zeros = [moved(view) for view in room.zeros]
        self._sinks = [
            (moved(s.dsink), moved(s.sink), moved(s.lse), None if s.rest is None else moved(s.rest), moved(s.delta), s.factor)
            for s in room.sinks
        ]

    def at_once(self, otherwise: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        """:meth:`BoundPass.run` of a pass that repeats, in one function, which every eager call waits for; where it does not apply it asks
        ``otherwise``.
        """
        new, changed, launches, current_stream = self._allocate, self.changed, self._launches, self._stream
        assert new is not None
        index, device, recorders, address_of = self.index, self._device, launch.recorders, address
        shapes, count = self._made, None if self._all else self._count

        def run(there: Sequence[Tensor], like: Tensor, addresses: Sequence[int] | None = None) -> list[Tensor]:
            if changed() or recorders or _deterministic() or (index is not None and index != _current_device()):
                return otherwise(there, like, addresses)
            made = [*itertools.starmap(new, shapes)]
            known = map(address_of, there) if addresses is None else addresses
            launches.start(current_stream(device), (*known, *map(address_of, made)))
            return made if count is None else made[:count]

        return run

    def run(self, there: Sequence[Tensor], like: Tensor, known: Sequence[int] | None) -> list[Tensor]:
        """The results, on the current device. known: the addresses of what is given."""
        new = self._allocate
        if new is None or _deterministic():  # PyTorch may be asked to fill what it allocates then
            made = [like.new_empty_strided(shape, strides, dtype=dtype) for shape, strides, dtype in self._made]
        else:
            made = [*itertools.starmap(new, self._made)]
        addresses = (*map(address, there), *map(address, made)) if known is None else (*known, *map(address, made))
        if self._plain:
            self._launches.start(self._stream(self._device), addresses)
            return made if self._all else made[: self._count]
        tensors = [*there, *made]
        for target, source in self._before:
            _seen(target, tensors).copy_(_seen(source, tensors))
        self._launches.start(self._stream(self._device), addresses)
        for target, source in self._after:
            _seen(target, tensors).copy_(_seen(source, tensors))
        for view in self._zeros:
            _seen(view, tensors).zero_()
        for dsink, sink, lse, rest, delta, factor in self._sinks:
            saved = Saved(_seen(lse, tensors), _seen(lse, tensors), None if rest is None else _seen(rest, tensors))
            _seen(dsink, tensors).copy_(sink_gradient(_seen(sink, tensors), saved, _seen(delta, tensors), factor))
        return made[: self._count]


def _seen(view: View, tensors: list[Tensor]) -> Tensor:
    """The part of a slot that a view means."""
    whole = tensors[view.slot]
    if whole.dtype != view.dtype:
        if whole.dtype.itemsize == view.dtype.itemsize:  # bool read as bytes
            whole = whole.view(view.dtype)
        else:  # in the scratch
            size = 1 + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True)) if math.prod(view.shape) else 0
            begin, width = view.offset * view.dtype.itemsize, view.dtype.itemsize
            return whole.view(torch.uint8)[begin : begin + size * width].view(view.dtype).as_strided(view.shape, view.strides)
    return whole.as_strided(view.shape, view.strides, whole.storage_offset() + view.offset)
