"""Runs a Gluon kernel's own source on the CPU, on tensors of PyTorch: no performance, no layouts, but its arithmetic and its protocol.

Every partition is a thread, of which one runs at a time: a ``Schedule`` picks it, by chance, wherever others could notice the order, so a
seed runs the same every time. What is asynchronous on the GPU happens here at once or as late as it may, by chance as well: a product or a
store reads its buffers when it is issued, so one that has not arrived is seen, or when it is waited for, so one that was released too early
has other contents by then; a load lands some steps later, and until a product has been waited for its registers hold NaN. Barriers count
arrivals and bytes like mbarriers. It is a failure (``Hang``) if every partition waits, no load is under way and so none can go on, and so is
telling another partition of plain stores that no fence has made visible to TMA and MMAs. What it cannot see is what a compiler does to
the order of instructions (``aot/``), nor programs that run at the same time.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import ptx_twin
from gluon_schedule import KERNELS, Barrier, NamedBarriers, Schedule, here, step
from gluon_values import Pointer, Scalar, larger, load, reduced, scalars, smaller, store, where, wrapped
from triflash.bound import signature
from triflash.dropout import philox2x32
from triflash.launch.calls import Call
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.kernels.shared import HopperConfig


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
        here.unfenced.add(self.buffer)

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


class Ragged(Descriptor):
    """One whose rows may begin and end anywhere: coordinates (2^30, end, 2^30 - length + row, head, column) are those of a row of so many
    that end there. An address counts modulo 2^64, as on the GPU.
    """

    def __init__(self, host: Any) -> None:
        rows, heads, columns = host.base.shape[1:]
        super().__init__(
            SimpleNamespace(base=host.base, shape=(rows, heads, columns), strides=host.strides[2:], block_shape=host.block_shape)
        )
        self.shape, self.steps = host.shape, host.strides

    def part(self, at: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        starts = [int(a) for a in at]
        assert len(at) == 5 and all(0 <= start < 2**31 for start in starts)
        inside = [min(max(size - start, 0), n) for start, n, size in zip(starts, self.block_shape, self.shape, strict=True)]
        if 0 in inside:
            nothing = slice(0, 0)
            return (nothing,) * 3, (0, 0, *(nothing,) * 3)  # type: ignore[return-value]
        first = sum(start * step for start, step in zip(starts, self.steps, strict=True)) % (2**64 // self.tensor.element_size())
        row = (first - starts[3] * self.steps[3] - starts[4]) // self.steps[2] if self.tensor.shape[0] > 1 else 0
        assert 0 <= row <= self.tensor.shape[0] - inside[2], "rows that there are not"
        ranges = (slice(row, row + inside[2]), slice(starts[3], starts[3] + inside[3]), slice(starts[4], starts[4] + inside[4]))
        return ranges, (0, 0, *(slice(0, n) for n in inside[2:]))  # type: ignore[return-value]


def tma_load(descriptor: Descriptor, at: Sequence[Any], barrier: Barrier, target: Shared) -> None:
    assert int(at[-1]) * target.x.element_size() % 16 == 0, "an H200 calls that an illegal instruction"
    source, inside = descriptor.part(at)

    def land() -> None:
        target.x.zero_()
        target.x[inside] = descriptor.tensor[source]
        barrier.change(0, -descriptor.block_type.nbytes)

    here.schedule.loads.append((here.number, land))
    step()


def tma_store(descriptor: Descriptor, at: Sequence[Any], source: Shared, adds: bool = False) -> None:
    assert source.buffer not in here.unfenced, "TMA would not see what was stored"
    assert source.dtype == descriptor.dtype and source.shape == descriptor.block_shape
    tensor, target, inside = descriptor.written(at)
    x = source.x.clone() if random.random() < 0.5 else source.x

    def leave() -> None:
        if adds:
            tensor[target] += x[inside]
        else:
            tensor[target] = x[inside]

    here.stores.append(leave)


def reinterpret(buffer: Shared, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared:
    return Shared(buffer.x.view(-1).view(dtype)[: math.prod(shape)].view(tuple(shape)))


def tma_add(descriptor: Descriptor, at: Sequence[Any], source: Shared) -> None:
    tma_store(descriptor, at, source, adds=True)


def tma_store_wait(pendings: int) -> None:
    step()
    while len(here.stores) > pendings:
        here.stores.pop(0)()


class Mma:
    """A product under way: its operands in shared memory are read when it is issued, or when it is waited for."""

    def __init__(self, run: Callable[[], Tensor], shape: tuple[int, int]) -> None:
        self.run, self.value, self.unfinished = run, None, torch.full(shape, torch.nan)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unfinished, name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*(x.unfinished if isinstance(x, Mma) else x for x in args), **(kwargs or {}))


def _of_unfinished(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self.unfinished, name)(*(x.unfinished if isinstance(x, Mma) else x for x in others))


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "lt", "le", "gt", "ge", "getitem"):
    setattr(Mma, f"__{_name}__", _of_unfinished(f"__{_name}__"))


def warpgroup_mma(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Mma:
    assert is_async and a.dtype == b.dtype
    assert not any(isinstance(x, Shared) and x.buffer in here.unfenced for x in (a, b)), "a product would not see what was stored"
    step()
    left, right = a.x if isinstance(a, Shared) else a, b.x
    if random.random() < 0.5:
        left, right = left.clone(), right.clone()

    def run() -> Tensor:
        before = acc.value if isinstance(acc, Mma) else acc
        return left.float() @ right.float() + (before if use_acc else 0.0)

    mma = Mma(run, (left.shape[0], right.shape[1]))
    here.mmas.append(mma)
    return mma


def warpgroup_mma_wait(pendings: int, deps: Sequence[Any]) -> Any:
    step()
    while len(here.mmas) > pendings:
        mma = here.mmas.pop(0)
        mma.value = mma.run()
    done = tuple(dep if dep.value is None else dep.value for dep in deps)
    return done if len(done) > 1 else done[0]


def fence() -> None:
    here.unfenced.clear()


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
    """A copy, a wider copy, an addition in memory, a negative, choices, ``tanh`` and ``p_and_ds_factor`` of a soft cap, what dropout draws, what warps vote about, or a named barrier."""
    if text == "mov.b32 $0, $1;":
        return arguments[0]
    if "vote." in text:
        return ptx_twin.run(text, constraints, arguments, dtype)
    if text.startswith("shl.b32 $0, $2, 16;"):
        return arguments[0].to(dtype)
    if "setp.ne.u16" in text:
        s, mask = arguments
        assert mask.dtype == torch.uint8
        return torch.where(mask != 0, s, -math.inf)
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
    here.named.reach(int(arguments[0]), int(threads), kind == "sync")
    return None


def _sharing(u: Tensor) -> Tensor:
    """Four scores of a thread share a reciprocal, and NaN: two neighbours in a row, and those 8 rows further down."""
    quads = u.view(u.shape[0] // 16, 2, 8, u.shape[1] // 2, 2)
    return quads.masked_fill(quads.isnan().any(4, True).any(1, True), torch.nan).view(u.shape)


def warp_specialize(partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], warps: Sequence[int], registers: object) -> None:
    program, named, schedule = here.program, NamedBarriers(), Schedule(len(partitions))

    def partition(number: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        here.program, here.named, here.schedule, here.number = program, named, schedule, number
        here.threads = 32 * [4, *warps][number]
        begin()
        function(*arguments)
        assert not here.mmas and not here.stores, "left without waiting"

    schedule.run([functools.partial(partition, number, *each) for number, each in enumerate(partitions)])


def begin() -> None:
    here.mmas, here.stores, here.unfenced = [], [], set()


def allocate(dtype: Any, shape: Sequence[int], layout: object) -> Any:
    if layout == "barriers":
        return SimpleNamespace(index=[Barrier() for _ in range(shape[0])].__getitem__)
    return Shared(torch.full(tuple(shape), torch.nan if dtype.is_floating_point else 1, dtype=dtype))


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
            if node.level == 3:  # what is no kernel's is what it is
                others = vars(importlib.import_module(f"triflash.{node.module}"))
            else:
                others = namespace((node.module or "").rpartition(".")[2], loaded)
            names |= {alias.name: others[alias.name] for alias in node.names}
        exec(code, names)
    return loaded[module]


def _stand_ins() -> dict[str, Any]:
    gl = SimpleNamespace(
        constexpr=lambda x: x, static_range=range, float32=torch.float32, uint8=torch.uint8, float16=torch.float16,
        bfloat16=torch.bfloat16, int16=torch.int16, int32=torch.int32, int64=torch.int64, uint32=32, uint64=64,
        cast=lambda x, dtype, bitcast=False: x.view(dtype) if bitcast else x,
        add=lambda a, b, sanitize_overflow: a + b,
        arange=lambda a, b, _=None: torch.arange(a, b), zeros=lambda shape, dtype, _=None: torch.zeros(shape, dtype=dtype),
        cdiv=lambda a, b: (a + b - 1) // b,
        full=lambda shape, x, dtype, _: torch.full(shape, wrapped(x) if dtype == torch.int32 else x, dtype=dtype), where=where, expand_dims=torch.unsqueeze,
        broadcast=torch.broadcast_tensors, fma=lambda a, b, c: a * b + c, exp2=torch.exp2, log2=torch.log2, abs=torch.abs,
        sum=torch.sum, max=reduced(torch.amax), minimum=smaller, maximum=larger, min=reduced(torch.amin),
        convert_layout=lambda x, *_, **__: x, permute=torch.permute, split=lambda x: (x[..., 0], x[..., 1]), load=load, store=store, allocate_shared_memory=allocate, warp_specialize=warp_specialize,
        inline_asm_elementwise=inline_asm, program_id=lambda _: Scalar(here.program[0]), num_programs=lambda _: Scalar(here.program[1]),
        SliceLayout=_layout, BlockedLayout=_layout, DistributedLinearLayout=_layout, DotOperandLayout=_layout, NVMMADistributedLayout=_layout,
        NVMMASharedLayout=SimpleNamespace(get_default_for=_layout),
    )  # fmt: skip
    jit = lambda function=None, **_: function or (lambda f: f)  # noqa: E731
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: "barriers", init=Barrier.init, wait=Barrier.wait, arrive=Barrier.arrive, expect=Barrier.expect,
    )  # fmt: skip
    return {
        "gl": gl, "tl": gl, "gluon": SimpleNamespace(jit=jit, constexpr_function=jit), "triton": SimpleNamespace(jit=jit), "mbarrier": mbarrier,
        "tma_load": tma_load, "tma_store": tma_store, "tma_add": tma_add, "reinterpret": reinterpret, "tma_store_wait": tma_store_wait, "warpgroup_mma": warpgroup_mma,
        "warpgroup_mma_wait": warpgroup_mma_wait, "mma_v2": lambda a, b, acc: a.float() @ b.float() + acc, "fence_async_shared": fence, "thread_barrier": lambda: None, "record": record,
        "range": lambda *bounds: scalars(range(*bounds)), "min": lambda *x: Scalar(min(x)), "max": lambda *x: Scalar(max(x)),
    }  # fmt: skip


def run(call: Any, seed: int = 0) -> None:
    """Carry a launch of a Gluon kernel out, program after program."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    def value(x: Any) -> Any:
        if isinstance(x, TensorDescriptor):
            return Ragged(x) if x.shape[0] == 0x7FFF0000 else Descriptor(x)
        if isinstance(x, Tensor):
            return Pointer(x)
        if isinstance(x, tuple):
            return tuple(value(y) for y in x)
        return Scalar(x) if isinstance(x, int) else x

    random.seed(seed)
    function = call.kernel.fn
    kernel = namespace(function.__module__.rpartition(".")[2], {})[function.__name__]
    for program in range(call.programs):
        here.program, here.schedule = (program, call.programs), None
        begin()
        kernel(*map(value, call.args), **{name: x for name, x in call.constants.items() if name != "maxnreg"})  # which is no argument


@contextlib.contextmanager
def twin_device(sms: int, seed: int = 0, rowwise: bool = True, small_lse: bool = True) -> Iterator[None]:
    """The package believes in an sm90 with so many SMs; its Gluon kernels run here, and what runs before and after them unless
    ``rowwise`` is false; the others in Triton's interpreter, which is slow. small_lse: without it, no lse counts as small.
    """
    interpreted = Call.start

    def carry_out(call: Call) -> None:
        if isinstance(call.config, HopperConfig) or (rowwise and call.kernel.fn.__module__.endswith((".preprocess", ".postprocess"))):
            run(call, seed)
        else:
            interpreted(call)
        if not small_lse and call.kernel.fn.__name__ == "preprocess" and call.args[6] is not None:
            assert call.args[6].dtype == torch.int32
            call.args[6].zero_()

    facts = replace(KNOWN_DEVICES["sm90"], sms=sms)
    with mock.patch.object(Call, "start", carry_out), mock.patch.object(signature, "facts_of", lambda _: facts):
        yield
