"""A GPU that is not there: the stub libcuda (``stub.c``), Triton's own driver on it, and what a launch hands to the driver.

Kernels are compiled as far as PTX, which tells the sizes of their arguments; nothing assembles or runs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from parameters import parameter_offsets

SHARED = 232_448  # bytes a program may use on sm90
_POINTER, _MAP, _NUMBER = "pointer", "map", "number"
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z]+(\d+)\s*(\.ptr[^,)]*?)?\s+\S+_param_\d+(?:\[(\d+)\])?")


class _Map(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64), ("strides", ctypes.c_uint64 * 4), ("sizes", ctypes.c_uint32 * 5), ("box", ctypes.c_uint16 * 5),
        ("type", ctypes.c_uint8), ("rank", ctypes.c_uint8), ("steps", ctypes.c_uint8 * 5), ("interleave", ctypes.c_uint8),
        ("swizzle", ctypes.c_uint8), ("promotion", ctypes.c_uint8), ("fill", ctypes.c_uint8),
    )  # fmt: skip


@dataclass
class Argument:
    """One argument of a kernel as the driver got it. value: of a pointer or tensor map its address, of a number its bytes. recipe: the
    rest of a tensor map. content: what lay there, NaN made one; of a pointer the first bytes.
    """

    kind: str
    value: Any
    recipe: bytes = b""
    content: Any = field(default=None, repr=False)


@dataclass
class Launch:
    """One launch as the driver got it. shape: grid, block, bytes of shared memory, attributes."""

    kernel: str
    function: int
    shape: tuple[int, ...]
    stream: int
    arguments: list[Argument]
    thread: int = field(default_factory=threading.get_ident)


def build(directory: Path) -> str | None:
    """Compile the stub into a directory and load it, so that whoever asks for libcuda.so.1 gets it; or why that is not possible."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "there is no C compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Triton's launchers need Python.h"
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = directory / "libcuda.so.1"
    source = Path(__file__).with_name("stub.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{include}", str(source), "-o", str(library)], check=True
    )
    os.environ["TRITON_LIBCUDA_PATH"] = str(directory)
    global _library
    _library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return None


_library: Any = None
_compiled: dict[int, tuple[str, list[tuple[str, int]]]] = {}  # function -> its kernel's name, and its parameters
stream = {"current": 0}


def activate() -> None:
    """Let Triton believe in the stub."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler
    from triton.backends.nvidia import driver as nvidia
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.driver import driver

    class Driver(nvidia.CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda index: stream["current"]
            self.get_device_capability = lambda index=0: (9, 0)
            self.set_current_device = lambda index: None

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Driver())
    _library.stub_tell(_tell)
    compiler.CUDABackend.make_cubin = lambda self, source, *_: source.encode()
    load = CompiledKernel._init_handles

    def loaded(self: Any) -> None:
        load(self)
        if self.function not in _compiled:
            _compiled[self.function] = (self.name, _parameters(self.asm["ptx"]))

    CompiledKernel._init_handles = loaded


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_size_t, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t))
def _tell(function: int, index: int, offset: Any, size: Any) -> int:
    """cuFuncGetParamInfo."""
    sizes = [own for _, own in _compiled[function][1]]
    if index >= len(sizes):
        return 1
    offset[0], size[0] = parameter_offsets(sizes)[index], sizes[index]
    return 0


def refuse(count: int) -> None:
    """The next so many launches fail, as on a thread without a context."""
    _library.stub_refuse(count)


def _parameters(ptx: str) -> list[tuple[str, int]]:
    head = ptx[ptx.index(".entry") :]
    found = []
    for bits, pointer, count in _PARAMETER.findall(head[: head.index("{")]):
        size = int(bits) // 8 * int(count or 1)
        found.append((_POINTER if pointer else _MAP if size == 128 else _NUMBER, size))
    return found


def launches() -> int:
    """How many there were."""
    return int(_library.stub_launches())


@contextlib.contextmanager
def watching(given: Any = (), kernels: bool = True) -> Iterator[list[Launch]]:
    """Within it, launches are kept, and stand-ins for their kernels write to whatever memory is not that of the given tensors: numbers
    that follow from the place among launches and arguments. ``kernels``: false, they do not.
    """
    seen: list[Launch] = []
    kept = [(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in given]
    lock = threading.Lock()
    failures: list[Exception] = []

    def launched(function: int, shape: Any, on: int, arguments: Any) -> None:
        try:
            with lock:
                name, parameters = _compiled[function]
                read = [_read(kind, size, arguments[at]) for at, (kind, size) in enumerate(parameters)]
                seen.append(Launch(name, function, tuple(shape[:8]), on, read))
                for at, each in enumerate(read if kernels else ()):
                    if each.kind == _NUMBER or not each.value:
                        continue
                    if not any(begin <= each.value < begin + size for begin, size in kept):
                        _write(each, 31 * len(seen) + 7 * at)
        except Exception as failure:  # noqa: BLE001 (nobody above could catch it)
            failures.append(failure)

    watcher = ctypes.CFUNCTYPE(
        None, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint32), ctypes.c_uint64, ctypes.POINTER(ctypes.c_void_p)
    )(launched)  # fmt: skip
    _library.stub_watch(watcher)
    try:
        yield seen
    finally:
        _library.stub_watch(None)
    if failures:
        raise failures[0]


def _read(kind: str, size: int, address: int) -> Argument:
    data = ctypes.string_at(address, size)
    if kind == _NUMBER:
        return Argument(kind, data)
    if kind == _POINTER:
        value = int.from_bytes(data, "little")
        return Argument(kind, value, content=ctypes.string_at(value, 4) if value else None)
    made = _Map.from_buffer_copy(data)
    argument = Argument(kind, made.address, data[8:])
    argument.content = _without_nans(_view(argument).copy(), made.type)
    return argument


def _view(argument: Argument) -> Any:
    """The memory of a tensor map, last dim last."""
    made = _Map.from_buffer_copy(argument.value.to_bytes(8, "little") + argument.recipe)
    itemsize = {0: 1, 1: 2, 2: 4, 6: 2, 7: 4, 9: 2}[made.type]
    sizes, strides = list(made.sizes)[: made.rank][::-1], [*list(made.strides)[: made.rank - 1][::-1], itemsize]
    span = itemsize + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    memory = np.frombuffer((ctypes.c_char * span).from_address(argument.value), dtype=np.uint8)
    flat = np.ndarray((span // itemsize,), f"u{itemsize}", memory)
    return np.lib.stride_tricks.as_strided(flat, sizes, strides)


_INFINITY = {6: 0x7C00, 7: 0x7F800000, 9: 0x7F80}  # by the type of a tensor map


def _without_nans(x: Any, kind: int) -> Any:
    if kind in _INFINITY:
        magnitude = np.iinfo(x.dtype).max // 2
        x[(x & magnitude) > _INFINITY[kind]] = magnitude
        if x.dtype == np.uint32:  # scratch is poisoned in q's dtype: two NaN of float16 are a number of float32
            x[x == 0x7E007E00] = magnitude
    return x


def _write(argument: Argument, seed: int) -> None:
    if argument.kind == _POINTER:
        ctypes.memmove(argument.value, np.float32(seed % 97 + 1).tobytes(), 4)
        return
    made = _Map.from_buffer_copy(argument.value.to_bytes(8, "little") + argument.recipe)
    view = _view(argument)
    numbers = ((np.arange(view.size) + seed) % 97 + 1).astype(np.float32).reshape(view.shape)
    if made.type == 6:
        view[...] = numbers.astype(np.float16).view(np.uint16)
    elif made.type == 9:
        view[...] = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    elif made.type == 7:
        view[...] = numbers.view(np.uint32)
    else:
        view[...] = numbers.astype(np.uint32) & 1
