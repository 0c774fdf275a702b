"""Runs a Gluon kernel's own source on the CPU, on tensors of PyTorch: no performance, no layouts, but its arithmetic and its protocol.

Every partition is a thread. What is asynchronous on the GPU happens here at once or as late as it may, by
chance: a product reads its buffers when it is issued, so one that has not arrived is seen, or when it is waited for, so one that was released
too early has other contents by then; a store reads its buffer when it is waited for; a load lands before or after the next few steps of its
partition. Barriers count arrivals and bytes like mbarriers,
and a wait that nothing ends is a failure. What it cannot see is what a compiler does to the order of instructions (``aot/``).
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import triflash

KERNELS = Path(triflash.__file__).parent / "kernels" / "hopper"
PATIENCE = 10.0  # seconds that a barrier may be waited for
_here = threading.local()  # of a partition: products and stores under way; the program's index


class Pointer:
    """Addresses into a tensor's storage, in elements from where the tensor begins."""

    def __init__(self, base: Tensor, at: Any = 0) -> None:
        self.base, self.at, self.dtype = base, at, SimpleNamespace(element_ty=base.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.base, self.at + other)

    def memory(self) -> Tensor:
        size = sum((n - 1) * s for n, s in zip(self.base.shape, self.base.stride(), strict=True)) + 1
        return self.base.as_strided((size,), (1,))


def load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Tensor:
    memory = pointer.memory()
    mask = torch.ones_like(pointer.at, dtype=torch.bool) if mask is None else mask
    return torch.where(mask, memory[torch.where(mask, pointer.at, 0)], torch.tensor(other, dtype=memory.dtype))


def store(pointer: Pointer, x: Tensor, mask: Any = None) -> None:
    at, mask = torch.broadcast_tensors(pointer.at, torch.tensor(True) if mask is None else mask)
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

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.x[start : start + length])

    def load(self, layout: object) -> Tensor:
        return self.x.clone()

    def store(self, x: Tensor) -> None:
        assert x.dtype == self.x.dtype
        self.x.copy_(x)


class Descriptor:
    """A TMA descriptor: blocks of a tensor, zeros outside it."""

    def __init__(self, host: Any) -> None:
        self.tensor: Tensor = host.base
        self.block_shape, self.dtype, self.layout = host.block_shape, host.base.dtype, None
        elements = 1
        for size in host.block_shape:
            elements *= size
        self.block_type = SimpleNamespace(nbytes=elements * host.base.element_size())

    def part(self, at: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """What of the tensor a block covers, and where in the block that lies."""
        assert len(at) == len(self.block_shape)
        starts = [int(a) for a in at]
        ends = [max(s, min(s + n, size)) for s, n, size in zip(starts, self.block_shape, self.tensor.shape, strict=True)]
        ranges = [slice(s, e) for s, e in zip(starts, ends, strict=True)]
        return tuple(ranges), tuple(slice(0, r.stop - r.start) for r in ranges)


class Barrier:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.phase = self.pending = self.count = self.bytes = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def change(self, arrivals: int, bytes: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += bytes
            assert self.pending >= 0, "more arrivals than a phase expects"
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity: Any) -> None:
        parity = int(parity)
        while _here.loads and random.random() < 0.7:
            _here.loads.pop(0)()
        while _here.loads and self.phase & 1 == parity:  # nothing else may happen before one of these lands
            time.sleep(1e-4)
            _here.loads.pop(0)()
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase & 1 != parity, PATIENCE):
                raise TimeoutError(f"{threading.current_thread().name} waits in vain")


def tma_load(descriptor: Descriptor, at: Sequence[Any], barrier: Barrier, target: Shared) -> None:
    source, inside = descriptor.part(at)

    def land() -> None:
        target.x.zero_()
        target.x[inside] = descriptor.tensor[source]
        barrier.change(0, -descriptor.block_type.nbytes)

    _here.loads.append(land)
    while _here.loads and random.random() < 0.6:
        _here.loads.pop(0)()


def tma_store(descriptor: Descriptor, at: Sequence[Any], source: Shared) -> None:
    target, inside = descriptor.part(at)

    def leave() -> None:
        descriptor.tensor[target] = source.x[inside]

    _here.stores.append(leave)


def tma_store_wait(pendings: int) -> None:
    while len(_here.stores) > pendings:
        _here.stores.pop(0)()


class Product:
    """A product under way: its operands in shared memory are read when it is issued, or when it is waited for."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self.run, self.value = run, None


def warpgroup_mma(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async and (isinstance(a, Shared) or a.dtype == b.dtype)

    left, right = a.x if isinstance(a, Shared) else a, b.x
    if random.random() < 0.5:
        left, right = left.clone(), right.clone()

    def run() -> Tensor:
        before = acc.value if isinstance(acc, Product) else acc
        return left.float() @ right.float() + (before if use_acc else 0.0)

    product = Product(run)
    _here.products.append(product)
    return product


def warpgroup_mma_wait(pendings: int, deps: Sequence[Any]) -> Any:
    if random.random() < 0.1:
        time.sleep(2e-4)  # whoever may go on, does
    while len(_here.products) > pendings:
        product = _here.products.pop(0)
        product.value = product.run()
    (dep,) = deps
    return dep if dep.value is None else dep.value


def warp_specialize(partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], warps: object, registers: object) -> None:
    failures: list[BaseException] = []
    program = _here.program

    def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        _here.program, _here.products, _here.stores, _here.loads = program, [], [], []
        try:
            function(*arguments)
            assert not _here.products and not _here.stores, "left without waiting"
            for land in _here.loads:
                land()
        except BaseException as failure:  # noqa: BLE001 - raised again by the thread that waits
            failures.append(failure)

    threads = [threading.Thread(target=run, args=partition, name=f"partition {n}") for n, partition in enumerate(partitions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def allocate(dtype: Any, shape: Sequence[int], layout: object) -> Any:
    if layout == "barriers":
        return SimpleNamespace(index=[Barrier() for _ in range(shape[0])].__getitem__)
    return Shared(torch.full(tuple(shape), torch.nan if dtype.is_floating_point else 1, dtype=dtype))


def _layout(*_: object, **__: object) -> None:
    return None


def source(module: str) -> str:
    return (KERNELS / f"{module}.py").read_text()


def namespace(*modules: str) -> dict[str, Any]:
    """The names of kernel modules, defined by their source on the stand-ins of this file."""
    gl = SimpleNamespace(
        constexpr=object, static_range=range, float32=torch.float32, int32=torch.int32, int64=torch.int64, arange=lambda a, b, _: torch.arange(a, b),
        zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype), full=lambda shape, x, dtype, _: torch.full(shape, x, dtype=dtype),
        expand_dims=torch.unsqueeze, broadcast=torch.broadcast_tensors, fma=lambda a, b, c: a * b + c, exp2=torch.exp2,
        where=lambda c, a, b: torch.where(torch.as_tensor(c), a, b), minimum=lambda a, b: torch.minimum(a, torch.as_tensor(b)),
        convert_layout=lambda x, _: x, load=load, store=store, allocate_shared_memory=allocate, warp_specialize=warp_specialize,
        program_id=lambda _: torch.tensor(_here.program[0]), num_programs=lambda _: torch.tensor(_here.program[1]),
        SliceLayout=_layout, DotOperandLayout=_layout, NVMMADistributedLayout=_layout,
    )  # fmt: skip
    jit = lambda function=None, **_: function or (lambda f: f)  # noqa: E731
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: "barriers", init=lambda b, count: b.init(count), wait=Barrier.wait, arrive=lambda b: b.change(1, 0),
        expect=lambda b, size: b.change(1, size),
    )  # fmt: skip
    names: dict[str, Any] = {
        "gl": gl, "gluon": SimpleNamespace(jit=jit, constexpr_function=jit), "mbarrier": mbarrier, "tma_load": tma_load,
        "tma_store": tma_store, "tma_store_wait": tma_store_wait, "warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait,
        "fence_async_shared": lambda: None, "optional": lambda x: x, "offset": lambda index, stride: index * stride,
        "LOG2E": 1.4426950408889634, "LN2": 0.6931471805599453,
    }  # fmt: skip
    prims = (KERNELS.parent / "triton" / "prims.py").read_text()
    exec(re.search(r"def segments\(.*?(?=\n\n\n)", prims, re.S)[0].replace(": tl.constexpr", ""), names)  # type: ignore[index]
    for module in modules:
        text = re.sub(r"^from \.+\S* import (\([^)]*\)|.*)$", "", source(module), flags=re.M)
        exec(compile(text.replace("s.type.layout", "None"), f"{module}.py", "exec"), names)
    return names


def run(call: Any, *modules: str, seed: int = 0) -> None:
    """Carry a launch out, program after program; ``modules`` are the kernel's and those that it imports, in order."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    def value(x: Any) -> Any:
        if isinstance(x, TensorDescriptor):
            return Descriptor(x)
        if isinstance(x, Tensor):
            return Pointer(x)
        if isinstance(x, tuple):
            return tuple(value(y) for y in x)
        return torch.tensor(x) if isinstance(x, int) else x

    random.seed(seed)
    kernel = namespace(*modules)[modules[-1]]
    for program in range(call.programs):
        _here.program, _here.loads = (program, call.programs), []
        kernel(*map(value, call.args), **call.constants)
