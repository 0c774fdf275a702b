"""Runs a Gluon kernel's own source on the CPU, on tensors of PyTorch: no performance, no layouts, but its arithmetic and its protocol.

Every partition is a thread, of which one runs at a time: a ``Schedule`` picks it, by chance, wherever others could notice the order, so a
seed runs the same every time. What is asynchronous on the GPU happens here at once or as late as it may, by chance as well: a product or a
store reads its buffers when it is issued, so one that has not arrived is seen, or when it is waited for, so one that was released too early
has other contents by then; a load lands some steps later, and until a product has been waited for its registers hold NaN. Barriers count
arrivals and bytes like mbarriers. It is a failure (``Hang``) if every partition waits, no load is under way and so none can go on, and so is
telling another partition of plain stores that no fence has made visible to TMA and products. What it cannot see is what a compiler does to
the order of instructions (``aot/``), nor programs that run at the same time.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import math
import operator
import random
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import ptx_twin
import triflash
from triflash.bound import signature
from triflash.dropout import philox2x32
from triflash.launch.calls import Call
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.kernels.shared import HopperConfig

KERNELS = Path(triflash.__file__).parent / "kernels" / "hopper"
_here = threading.local()  # of a partition: its schedule, and what is under way; the program's index


def _kind(dtype: torch.dtype) -> SimpleNamespace:
    """What kernels ask about a dtype of integers."""
    return SimpleNamespace(is_int_unsigned=lambda: not dtype.is_signed, primitive_bitwidth=8 * dtype.itemsize)


INT32 = _kind(torch.int32)


class Scalar(int):
    """An integer that a kernel computes with: divides as the GPU does, towards zero, and a comparison of it is one of its kind."""

    dtype = INT32

    def to(self, dtype: object, bitcast: bool = False) -> Scalar:
        if isinstance(dtype, int):  # unsigned dtypes are their bits here
            return Scalar(self & 2**dtype - 1)
        return Scalar(_wrapped(self)) if dtype == torch.int32 else self


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
        scalar.dtype = _kind(x.dtype)
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


class Shared:
    """A buffer in shared memory, or a view of one."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.shape, self.dtype = x, list(x.shape), x.dtype

    def index(self, i: int) -> Shared:
        assert 0 <= i < self.x.shape[0]
        return Shared(self.x[i])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.x.view(tuple(shape)))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.x.permute(order))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.x.narrow(dim, start, length))

    def load(self, layout: object) -> Tensor:
        step()
        return self.x.clone()

    def store(self, x: Tensor) -> None:
        assert x.dtype == self.x.dtype and x.shape == self.x.shape
        step()
        self.x.copy_(x)
        _here.unfenced.add(self.buffer)

    @property
    def buffer(self) -> int:
        return self.x.untyped_storage().data_ptr()


class Descriptor:
    """A TMA descriptor: blocks of a tensor, zeros outside it."""

    def __init__(self, host: Any) -> None:
        self.tensor: Tensor = host.base.as_strided(host.shape, host.strides)
        self.block_shape, self.dtype, self.layout = host.block_shape, host.base.dtype, None
        elements = 1
        for size in host.block_shape:
            elements *= size
        self.block_type = SimpleNamespace(nbytes=elements * host.base.element_size())

    def part(self, at: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """What of the tensor a block covers, and where in the block that lies."""
        assert len(at) == len(self.block_shape)
        starts = [int(a) for a in at]
        assert min(starts) >= 0
        ends = [max(s, min(s + n, size)) for s, n, size in zip(starts, self.block_shape, self.tensor.shape, strict=True)]
        ranges = [slice(s, e) for s, e in zip(starts, ends, strict=True)]
        return tuple(ranges), tuple(slice(0, r.stop - r.start) for r in ranges)

    def written(self, at: Sequence[Any]) -> tuple[Tensor, tuple[slice, ...], tuple[slice, ...]]:
        """What a store of a block writes, and what of the block: rows in whole 16 bytes, also past where they end."""
        ranges, inside = self.part(at)
        unit, (*shape, width) = 16 // self.tensor.element_size(), self.tensor.shape
        whole = self.tensor.as_strided((*shape, -(-width // unit) * unit), self.tensor.stride())  # past its memory an error of its own
        end = min(-(-ranges[-1].stop // unit) * unit, ranges[-1].start + self.block_shape[-1])
        last = slice(ranges[-1].start, max(end, ranges[-1].start))
        return whole, (*ranges[:-1], last), (*inside[:-1], slice(0, last.stop - last.start))


class Hang(Exception):
    """Every partition waits, and none of them can arrive."""


class Stopped(BaseException):
    """Ends a partition because another one has failed."""


class Schedule:
    """Lets one partition run at a time. Who goes on is drawn at every ``step``, and so is when loads land; one of four draws, at most, favours
    everybody but one partition, whose loads are late as well.
    """

    def __init__(self, partitions: int) -> None:
        self.turns = [threading.Semaphore(0) for _ in range(partitions)]
        self.until: dict[int, Callable[[], bool] | None] = dict.fromkeys(range(partitions))  # what those wait for that have not ended
        self.idents: dict[int, int | None] = {}
        self.loads: list[tuple[int, Callable[[], None]]] = []
        self.laggard = random.randrange(max(4, partitions))
        self.failure: BaseException | None = None

    def step(self, me: int, until: Callable[[], bool] | None = None) -> None:
        """Called by the partition that runs: others may go first. Returns when ``until`` holds."""
        self.land_some()
        if random.random() < (0.3 if me == self.laggard else 0.6) and (until is None or until()):
            return
        self.until[me] = until
        if (chosen := self.chosen()) != me:
            self.turns[chosen].release()
            self.turns[me].acquire()
            if self.failure is not None:
                raise Stopped
        self.until[me] = None

    def chosen(self) -> int:
        """Who goes on: any partition that does not wait for something."""
        while True:
            able = [number for number, until in self.until.items() if until is None or until()]
            if able:
                swift = [number for number in able if number != self.laggard]
                return random.choice(swift if swift and random.random() < 0.8 else able)
            if not self.loads:
                raise Hang("; ".join(map(self.place, self.until)))
            self.land(random.randrange(len(self.loads)))

    def land(self, number: int) -> None:
        """Loads land in any order."""
        self.loads.pop(number)[1]()

    def land_some(self) -> None:
        while self.loads:
            number = random.randrange(len(self.loads))
            if random.random() > (0.1 if self.loads[number][0] == self.laggard else 0.4):
                return
            self.land(number)

    def place(self, number: int) -> str:
        """Where in the kernels' source a partition waits."""
        frame = sys._current_frames().get(self.idents[number] or 0)
        while frame is not None and not frame.f_code.co_filename.startswith(str(KERNELS)):
            frame = frame.f_back
        return f"partition {number} waits at " + ("?" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")

    def ended(self, me: int, failure: BaseException | None) -> None:
        """The partition that ran is through; the next one goes on, or all end."""
        del self.until[me]
        if self.failure is None and failure is None and self.until:
            try:
                self.turns[self.chosen()].release()
            except BaseException as found:  # noqa: BLE001 - the kernel's failure, raised again by ``run``
                failure = found
        if self.failure is None and failure is not None:
            self.failure = failure
            for number in self.until:
                self.turns[number].release()

    def run(self, partitions: Sequence[Callable[[], None]]) -> None:
        """Carry all of them out; raises what the first that fails raises."""

        @torch.no_grad()
        def carry_out(me: int) -> None:
            self.turns[me].acquire()
            failure = None
            try:
                if self.failure is None:
                    partitions[me]()
            except Stopped:
                pass
            except BaseException as found:  # noqa: BLE001
                failure = found
            self.ended(me, failure)

        threads = [threading.Thread(target=carry_out, args=(me,), name=f"partition {me}") for me in range(len(partitions))]
        for me, thread in enumerate(threads):
            thread.start()
            self.idents[me] = thread.ident
        self.turns[self.chosen()].release()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        with torch.no_grad():
            while self.loads:
                self.land(0)


def step(until: Callable[[], bool] | None = None) -> None:
    """Whoever may go on, does."""
    if _here.schedule is not None:
        _here.schedule.step(_here.number, until)
    elif until is not None and not until():
        raise Hang("the only partition waits")


class Barrier:
    def __init__(self) -> None:
        self.phase = self.pending = self.count = self.bytes = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def change(self, arrivals: int, bytes: int) -> None:
        self.pending -= arrivals
        self.bytes += bytes
        assert self.pending >= 0, "more arrivals than a phase expects"
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def arrive(self, count: int = 1, pred: Any = True) -> None:
        assert not _here.unfenced, "others would be told before what was stored can be seen by TMA and products"
        if pred:
            step()
            self.change(count, 0)

    def expect(self, size: int, pred: Any = True) -> None:
        if pred:
            self.change(1, size)

    def wait(self, parity: Any, pred: Any = True) -> None:
        if pred:
            parity = int(parity)
            step(lambda: self.phase & 1 != parity)


def tma_load(descriptor: Descriptor, at: Sequence[Any], barrier: Barrier, target: Shared) -> None:
    source, inside = descriptor.part(at)

    def land() -> None:
        target.x.zero_()
        target.x[inside] = descriptor.tensor[source]
        barrier.change(0, -descriptor.block_type.nbytes)

    _here.schedule.loads.append((_here.number, land))
    step()


def tma_store(descriptor: Descriptor, at: Sequence[Any], source: Shared, adds: bool = False) -> None:
    assert source.buffer not in _here.unfenced, "TMA would not see what was stored"
    assert source.dtype == descriptor.dtype and source.shape == descriptor.block_shape
    tensor, target, inside = descriptor.written(at)
    x = source.x.clone() if random.random() < 0.5 else source.x

    def leave() -> None:
        if adds:
            tensor[target] += x[inside]
        else:
            tensor[target] = x[inside]

    _here.stores.append(leave)


def tma_add(descriptor: Descriptor, at: Sequence[Any], source: Shared) -> None:
    tma_store(descriptor, at, source, adds=True)


def tma_store_wait(pendings: int) -> None:
    step()
    while len(_here.stores) > pendings:
        _here.stores.pop(0)()


class Product:
    """A product under way: its operands in shared memory are read when it is issued, or when it is waited for."""

    def __init__(self, run: Callable[[], Tensor], shape: tuple[int, int]) -> None:
        self.run, self.value, self.unfinished = run, None, torch.full(shape, torch.nan)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unfinished, name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*(x.unfinished if isinstance(x, Product) else x for x in args), **(kwargs or {}))


def _of_unfinished(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self.unfinished, name)(*(x.unfinished if isinstance(x, Product) else x for x in others))


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "lt", "le", "gt", "ge", "getitem"):
    setattr(Product, f"__{_name}__", _of_unfinished(f"__{_name}__"))


def warpgroup_mma(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async and a.dtype == b.dtype
    assert not any(isinstance(x, Shared) and x.buffer in _here.unfenced for x in (a, b)), "a product would not see what was stored"
    step()
    left, right = a.x if isinstance(a, Shared) else a, b.x
    if random.random() < 0.5:
        left, right = left.clone(), right.clone()

    def run() -> Tensor:
        before = acc.value if isinstance(acc, Product) else acc
        return left.float() @ right.float() + (before if use_acc else 0.0)

    product = Product(run, (left.shape[0], right.shape[1]))
    _here.products.append(product)
    return product


def warpgroup_mma_wait(pendings: int, deps: Sequence[Any]) -> Any:
    step()
    while len(_here.products) > pendings:
        product = _here.products.pop(0)
        product.value = product.run()
    (dep,) = deps
    return dep if dep.value is None else dep.value


def fence() -> None:
    _here.unfenced.clear()


def _wrapped(x: int) -> int:
    """x as an int32 has it."""
    return (x + 2**31) % 2**32 - 2**31


def _drawn(keys_by_row: bool, arguments: Sequence[Any]) -> Any:
    """The marks of ``kernels/hopper/dropout.py``: of every 16 by 16 elements, those of two rows and two columns share a counter."""
    j, i, key, keep = (x.long() & 0xFFFFFFFF for x in arguments)
    rows, columns = (torch.arange(n) for n in j.shape)
    first = (rows & ~8)[:, None], (columns & ~8)[None, :]
    words = philox2x32((j[first], i[first]), key)
    upper, left = (rows & 8)[:, None] == 0, (columns & 8)[None, :] == 0
    query, half = (left, upper) if keys_by_row else (upper, left)
    word = torch.where(query, *words)
    number = torch.where(half, word, word >> 16) & 0x7FFF
    return torch.where(number + (keep & 0xFFFF) >= 0x8000, -1, 0).to(torch.int16)  # keep has it in both halves


def _added_up(pointer: Pointer, x: Tensor, kept: Tensor) -> None:
    """A thread adds four numbers in a row, two neighbours and those eight rows further down, each of which is given where the first one goes."""
    row, column = (torch.arange(n) for n in x.shape)
    at = pointer.at + (row // 8 % 2 * 2)[:, None] + (column % 2)[None, :]
    kept = kept != 0
    pointer.memory().index_add_(0, at[kept], x[kept])


def inline_asm(text: str, constraints: str, arguments: Sequence[Any], dtype: Any, *_: object) -> Any:
    """A copy, a wider copy, an addition in memory, a negative, choices, ``tanh`` and ``p_and_ds_factor`` of a soft cap, what dropout draws, what warps vote about, or a barrier of the processor."""
    if text == "mov.b32 $0, $1;":
        return arguments[0]
    if "vote." in text:
        return ptx_twin.run(text, constraints, arguments, dtype)
    if text.startswith("shl.b32 $0, $2, 16;"):
        return arguments[0].to(dtype)
    if "setp.ne.u16" in text:
        s, shown = arguments
        assert shown.dtype == torch.uint8
        return torch.where(shown != 0, s, -math.inf)
    if "red." in text:
        return _added_up(*arguments)
    if text.startswith("neg.f32"):
        return -arguments[0]
    if "setp.le.s32 p, $2, $3; selp.f32 $0, $1, " in text:
        x, at, last = arguments
        return torch.where(at <= last, x, {"0fFF800000": -math.inf, "0f00000000": 0.0}[text.split(", ")[-2]])
    if "mul.wide" in text:
        return _drawn("/* keys by row */" in text, arguments)
    if text.startswith("and.b32"):
        return torch.where(arguments[1] < 0, arguments[0], 0.0).to(dtype)
    if "shl" in text:
        return torch.where(arguments[1] < 0, arguments[0], -arguments[0].abs())
    if "cvt" in text:
        x, u = arguments
        return torch.exp2(x).to(dtype[0]), torch.exp2(x) * (-4.0 * u * (1.0 + u))
    if "ex2" in text:
        return _sharing(-1.0 / (1.0 + torch.exp2(arguments[0].clamp(max=30.0))))
    kind, threads = re.fullmatch(r"bar\.(arrive|sync) \$1, (\d+); mov.u32 \$0, 0;", text).groups()  # type: ignore[union-attr]
    _here.processor.reach(int(arguments[0]), int(threads), kind == "sync")
    return None


class Processor:
    """The numbered barriers of a processor, at which whole partitions arrive or wait."""

    def __init__(self) -> None:
        self.arrived, self.phase = [0] * 16, [0] * 16

    def reach(self, number: int, threads: int, waits: bool) -> None:
        assert 5 <= number < 16, "Triton uses the others"
        assert not _here.unfenced, "others would be told before what was stored can be seen by TMA and products"
        step()
        phase = self.phase[number]
        self.arrived[number] += _here.threads
        assert self.arrived[number] <= threads, "more arrivals than a phase expects"
        if self.arrived[number] == threads:
            self.arrived[number], self.phase[number] = 0, phase + 1
        elif waits:
            step(lambda: self.phase[number] != phase)


def _sharing(u: Tensor) -> Tensor:
    """Four scores of a thread share a reciprocal, and NaN: two neighbours in a row, and those 8 rows further down."""
    together = u.view(u.shape[0] // 16, 2, 8, u.shape[1] // 2, 2)
    return together.masked_fill(together.isnan().any(4, True).any(1, True), torch.nan).view(u.shape)


def warp_specialize(partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], warps: Sequence[int], registers: object) -> None:
    program, processor, schedule = _here.program, Processor(), Schedule(len(partitions))

    def partition(number: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        _here.program, _here.processor, _here.schedule, _here.number = program, processor, schedule, number
        _here.threads = 32 * [4, *warps][number]
        begin()
        function(*arguments)
        assert not _here.products and not _here.stores, "left without waiting"

    schedule.run([functools.partial(partition, number, *each) for number, each in enumerate(partitions)])


def begin() -> None:
    _here.products, _here.stores, _here.unfenced = [], [], set()


def allocate(dtype: Any, shape: Sequence[int], layout: object) -> Any:
    if layout == "barriers":
        return SimpleNamespace(index=[Barrier() for _ in range(shape[0])].__getitem__)
    return Shared(torch.full(tuple(shape), torch.nan if dtype.is_floating_point else 1, dtype=dtype))


def _smaller(a: Any, b: Any) -> Any:
    return Scalar(min(a, b)) if isinstance(a, int) and isinstance(b, int) else torch.minimum(torch.as_tensor(a), torch.as_tensor(b))


def _larger(a: Any, b: Any) -> Any:
    return Scalar(max(a, b)) if isinstance(a, int) and isinstance(b, int) else torch.maximum(torch.as_tensor(a), torch.as_tensor(b))


def _layout(*_: object, **__: object) -> None:
    return None


def record(cls: type) -> type:
    """A kernel's record: a class of the values that its constructor takes in the order of the annotations."""
    names = tuple(cls.__annotations__)

    def init(self: Any, *values: Any) -> None:
        for name, value in zip(names, values, strict=True):
            setattr(self, name, value)

    cls.__init__ = init  # type: ignore[misc]
    return cls


def source(module: str) -> str:
    return _path(module).read_text()


def _path(module: str) -> Path:
    own = KERNELS / f"{module}.py"
    return own if own.exists() else KERNELS.parent / "triton" / f"{module}.py"


@functools.lru_cache(maxsize=256)
def _compiled(module: str, text: str) -> tuple[list[ast.ImportFrom], CodeType]:
    """What a module imports from others, and the rest of it."""
    tree = ast.parse(re.sub(r"\b\w+\.type\.layout|(?<=\[x\], )x\.dtype", "None", text))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module not in ("compat", None)]
    tree.body = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    return imports, compile(tree, str(_path(module)), "exec")


def namespace(module: str, loaded: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The names of a kernel module, defined by its source on the stand-ins of this file; ``loaded``: those of others so far."""
    if module not in loaded:
        imports, code = _compiled(module, source(module))
        names = loaded[module] = _stand_ins()
        for node in imports:
            others = namespace((node.module or "").rpartition(".")[2], loaded)
            names |= {alias.name: others[alias.name] for alias in node.names}
        exec(code, names)
    return loaded[module]


def _stand_ins() -> dict[str, Any]:
    gl = SimpleNamespace(
        constexpr=lambda x: x, static_range=range, float32=torch.float32, uint8=torch.uint8, float16=torch.float16,
        bfloat16=torch.bfloat16, int16=torch.int16, int32=torch.int32, int64=torch.int64, uint32=32, uint64=64, cast=lambda x, _: x,
        arange=lambda a, b, _=None: torch.arange(a, b), zeros=lambda shape, dtype, _=None: torch.zeros(shape, dtype=dtype),
        cdiv=lambda a, b: (a + b - 1) // b,
        full=lambda shape, x, dtype, _: torch.full(shape, _wrapped(x) if dtype == torch.int32 else x, dtype=dtype), where=where, expand_dims=torch.unsqueeze,
        broadcast=torch.broadcast_tensors, fma=lambda a, b, c: a * b + c, exp2=torch.exp2, log2=torch.log2, abs=torch.abs,
        sum=torch.sum, max=torch.amax, minimum=_smaller, maximum=_larger, min=torch.amin,
        convert_layout=lambda x, *_, **__: x, permute=torch.permute, split=lambda x: (x[..., 0], x[..., 1]), load=load, store=store, allocate_shared_memory=allocate, warp_specialize=warp_specialize,
        inline_asm_elementwise=inline_asm, program_id=lambda _: Scalar(_here.program[0]), num_programs=lambda _: Scalar(_here.program[1]),
        SliceLayout=_layout, BlockedLayout=_layout, DistributedLinearLayout=_layout, DotOperandLayout=_layout, NVMMADistributedLayout=_layout,
        NVMMASharedLayout=SimpleNamespace(get_default_for=_layout),
    )  # fmt: skip
    jit = lambda function=None, **_: function or (lambda f: f)  # noqa: E731
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: "barriers", init=Barrier.init, wait=Barrier.wait, arrive=Barrier.arrive, expect=Barrier.expect,
    )  # fmt: skip
    return {
        "gl": gl, "tl": gl, "gluon": SimpleNamespace(jit=jit, constexpr_function=jit), "triton": SimpleNamespace(jit=jit), "mbarrier": mbarrier,
        "tma_load": tma_load, "tma_store": tma_store, "tma_add": tma_add, "tma_store_wait": tma_store_wait, "warpgroup_mma": warpgroup_mma,
        "warpgroup_mma_wait": warpgroup_mma_wait, "fence_async_shared": fence, "thread_barrier": lambda: None, "record": record,
        "range": lambda *bounds: scalars(range(*bounds)), "min": lambda *x: Scalar(min(x)), "max": lambda *x: Scalar(max(x)),
    }  # fmt: skip


def run(call: Any, seed: int = 0) -> None:
    """Carry a launch of a Gluon kernel out, program after program."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    def value(x: Any) -> Any:
        if isinstance(x, TensorDescriptor):
            return Descriptor(x)
        if isinstance(x, Tensor):
            return Pointer(x)
        if isinstance(x, tuple):
            return tuple(value(y) for y in x)
        return Scalar(x) if isinstance(x, int) else x

    random.seed(seed)
    function = call.kernel.fn
    kernel = namespace(function.__module__.rpartition(".")[2], {})[function.__name__]
    for program in range(call.programs):
        _here.program, _here.schedule = (program, call.programs), None
        begin()
        kernel(*map(value, call.args), **{name: x for name, x in call.constants.items() if name != "maxnreg"})  # which is no argument


@contextlib.contextmanager
def twin_device(processors: int, seed: int = 0, edges: bool = True, mild: bool = True) -> Iterator[None]:
    """The package believes in an sm90 with so many processors; its Gluon kernels run here, and what runs before and after them unless
    ``edges`` is false; the others in Triton's interpreter, which is slow. mild: without it, no statistic counts as mild.
    """
    interpreted = Call.start

    def carry_out(call: Call) -> None:
        if isinstance(call.config, HopperConfig) or (edges and call.kernel.fn.__module__.endswith((".preprocess", ".postprocess"))):
            run(call, seed)
        else:
            interpreted(call)
        if not mild and call.kernel.fn.__name__ == "preprocess" and call.args[6] is not None:
            assert call.args[6].dtype == torch.int32
            call.args[6].zero_()

    facts = replace(KNOWN_DEVICES["sm90"], sms=processors)
    with mock.patch.object(Call, "start", carry_out), mock.patch.object(signature, "facts_of", lambda _: facts):
        yield
