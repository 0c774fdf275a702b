"""What reaches into Triton: a compiled kernel's C launcher, called with addresses. Knows Triton 3.6 to 3.9 by what it finds there.

``kernel[grid](...)`` binds, specialises, looks up and decomposes descriptors in Python at every launch. Of that only addresses change from
one call of a signature to the next, so :func:`bind` does it once and a :class:`Launch` replaces addresses. What is not recognised here is
launched by ``kernel[grid]``, as ever: an AMD driver, the interpreter, a launcher of another form, scratch that Triton would allocate,
launch hooks (profilers), other knobs than those in force when the kernel was bound, and ``TRIFLASH_BIND=0`` in the environment.

Only Triton 3.6.0 ever ran on a GPU here; 3.6.0 and the newest release run in the tests, against a driver that does nothing.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .calls import Call

__all__ = ["Launch", "bind", "stands_aside", "streams", "watch"]

_MAPS = 64  # tensor maps kept for each descriptor of a launch, by address

# Threads that need the same new kernel would each compile it, and parsing in two at once has failed. Triton loads a kernel when its
# launcher is first asked for, in steps of which another thread may see the first.
_compiling = threading.Lock()

_environment = getattr(os.environ, "_data", None)  # a look-up by bytes takes a fortieth of os.environ.get


def stands_aside() -> bool:
    """Whether launches go Triton's own way now, whatever was bound: hooks want to see them, or the environment says so.

    A hook is None, or a chain of functions, which may be empty, or one.
    """
    if (os.environ.get("TRIFLASH_BIND") == "0") if _environment is None else (_environment.get(b"TRIFLASH_BIND") == b"0"):
        return True
    runtime = (_triton_knobs or _knobs()).runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return (before is not None and bool(getattr(before, "calls", True))) or (after is not None and bool(getattr(after, "calls", True)))


def _knobs() -> Any:
    global _triton_knobs
    if _triton_knobs is None:
        from triton import knobs

        _triton_knobs = knobs
    return _triton_knobs


_triton_knobs: Any = None


def state() -> tuple[Any, ...]:
    """The knobs by which Triton compiles one or another kernel for the same arguments."""
    knobs = _triton_knobs or _knobs()
    runtime, compilation = knobs.runtime, knobs.compilation
    return (
        runtime.debug,
        getattr(compilation, "instrumentation_mode", ""),
        getattr(compilation, "fpsan_homomorphic_casts", None),
        getattr(runtime, "add_stages_inspection_hook", None),
    )


def streams() -> Callable[[int], int]:
    """What tells the current stream of a device, by its index."""
    current: Callable[[int], int] = _driver().active.get_current_stream
    return current


def _driver() -> Any:
    global _triton_driver
    if _triton_driver is None:
        from triton.runtime.driver import driver

        _triton_driver = driver
    return _triton_driver


_triton_driver: Any = None


class Launch:
    """One compiled kernel with its grid and every argument but the addresses.

    pointers: (place among the arguments, slot, offset in bytes). maps: (place, slot, offset, what a tensor map is made of beside its
    address, those made so far). nested: tuples among the arguments that hold addresses. watched: the module that the kernel comes from,
    its name there, the kernel, and its hooks.
    """

    __slots__ = (
        "_after",
        "_before",
        "_encode",
        "_last",
        "_maps",
        "_nested",
        "_pointers",
        "_raw",
        "_template",
        "compiled",
        "watched",
    )

    def __init__(self, call: Call, compiled: Any, place: Callable[[Tensor], tuple[int, int]]) -> None:
        launcher = compiled.run
        self.compiled = compiled
        kernel = call.kernel
        # What changes if somebody replaces the kernel, or wants to see its launches.
        self.watched = (sys.modules[kernel.__module__].__dict__, kernel.__name__, kernel, getattr(kernel, "pre_run_hooks", ()))
        self._encode = _encoder()
        self._raw, self._before, self._after, self._last = _c_launcher(launcher, compiled, call.programs)
        self._template: list[Any] = []
        self._pointers: list[tuple[int, int, int]] = []
        self._maps: list[tuple[int, int, int, tuple[Any, ...], dict[int, Any]]] = []
        self._nested: list[tuple[int, tuple[Any, ...], tuple[tuple[int, int, int], ...]]] = []
        metadata = list(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        for value in _in_order(call):
            at = len(self._template)
            if isinstance(value, Tensor):
                self._pointers.append((at, *place(value)))
                self._template.append(0)
            elif _is_descriptor(value):
                recipe = _recipe(value, metadata.pop(0))
                self._maps.append((at, *place(value.base), recipe, {}))
                self._template += [None, *value.shape, *value.strides]
            elif isinstance(value, tuple) and any(isinstance(x, Tensor) for x in value):
                inside = tuple((i, *place(x)) for i, x in enumerate(value) if isinstance(x, Tensor))
                self._nested.append((at, tuple(None if isinstance(x, Tensor) else x for x in value), inside))
                self._template.append(None)
            else:
                self._template.append(value)

    @property
    def slots(self) -> set[int]:
        """Those whose addresses the launch takes."""
        nested = {slot for _, _, inside in self._nested for _, slot, _ in inside}
        return {each[1] for each in self._pointers} | {each[1] for each in self._maps} | nested

    def move(self, places: Mapping[int, tuple[int, int]]) -> None:
        """Take slots for others: each is found at an offset, in bytes, of another."""

        def moved(at: int, slot: int, offset: int) -> tuple[int, int, int]:
            other, begin = places[slot]
            return at, other, begin + offset

        self._pointers = [moved(*each) for each in self._pointers]
        self._maps = [(*moved(*each[:3]), *each[3:]) for each in self._maps]
        self._nested = [(at, values, tuple(moved(*each) for each in inside)) for at, values, inside in self._nested]

    def arguments(self, addresses: Sequence[int]) -> list[Any]:
        """What the kernel gets where the slots' tensors begin at ``addresses``."""
        arguments = self._template.copy()
        for at, slot, offset in self._pointers:
            arguments[at] = addresses[slot] + offset
        for at, slot, offset, recipe, made in self._maps:
            address = addresses[slot] + offset
            tensor_map = made.get(address)
            if tensor_map is None:
                if len(made) >= _MAPS:
                    made.clear()
                tensor_map = made[address] = self._encode(address, *recipe)
            arguments[at] = tensor_map
        for at, values, inside in self._nested:
            changed = list(values)
            for i, slot, offset in inside:
                changed[i] = addresses[slot] + offset
            arguments[at] = tuple(changed)
        return arguments

    def __call__(self, stream: int, addresses: Sequence[int]) -> None:
        arguments = self.arguments(addresses)
        if self._last is None:
            self._raw(*self._before, stream, *self._after, *arguments)
        else:
            self._raw(*self._before, stream, *self._after, *self._last, tuple(arguments))


def watch(launches: Sequence[Launch]) -> Callable[[], bool]:
    """What tells, before each run of bound launches, whether they have to go Triton's own way now: hooks want to see them, the environment
    says so, knobs are others than at binding time, a kernel was replaced or somebody watches it. Every eager call waits for the answer.
    """
    then = state()
    watched = [each.watched for each in launches]

    def changed() -> bool:
        if stands_aside() or state() != then:
            return True
        for module, name, kernel, hooks in watched:  # noqa: SIM110 (a generator would take longer than the rest)
            if hooks or module.get(name) is not kernel:
                return True
        return False

    return changed


class _Unknown(Exception):
    """Something of Triton's has another form than those that are known here."""


def bind(call: Call, place: Callable[[Tensor], tuple[int, int]]) -> Launch | None:
    """Compile a launch's kernel for the current device, unless that was done, and bind it; None: it has to go Triton's own way.

    The call's tensors are meta tensors, whose addresses modulo 16 bytes are those of every call; ``place`` tells slot and offset in bytes.
    """
    kernel = call.kernel
    if getattr(_knobs().runtime, "interpret", False):
        return None
    if not hasattr(kernel, "warmup") or getattr(kernel, "pre_run_hooks", None):
        return None  # somebody watches it
    with _compiling:
        compiled = kernel.run(*call.args, grid=(call.programs,), warmup=True, **call.options)
        if hasattr(compiled, "result"):  # compiled by a thread of its own
            compiled = compiled.result()
        try:
            return Launch(call, compiled, place)
        except _Unknown:
            return None


def _in_order(call: Call) -> list[Any]:
    """The kernel's arguments, one for each of its parameters."""
    parameters = list(call.kernel.signature.parameters.values())
    behind = parameters[len(call.args) :]
    return [*call.args, *(call.constants.get(each.name, each.default) for each in behind)]


def _is_descriptor(value: Any) -> bool:
    return type(value).__name__ == "TensorDescriptor"


def _encoder() -> Callable[..., Any]:
    utils = _driver().active.utils
    encode: Callable[..., Any] | None = getattr(utils, "fill_tma_descriptor_tiled", None) or getattr(utils, "fill_tma_descriptor", None)
    if encode is None:
        raise _Unknown
    return encode


def _recipe(descriptor: Any, metadata: Any) -> tuple[Any, ...]:
    """What a tensor map is made of beside its address, as Triton's driver passes it."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    odd = metadata is None or metadata["fp4_padded"] or metadata.get("is_im2col") or getattr(descriptor, "round_f32_to_tf32", False)
    if odd or descriptor.padding != "zero" or descriptor.strides[-1] != 1:
        raise _Unknown
    dtype = TMA_DTYPE_DEVICE_TO_HOST[metadata["elem_type"]]
    return (
        *(metadata["swizzle"], metadata["elem_size"], dtype, metadata["block_size"]),
        *(list(descriptor.shape), list(descriptor.strides), 0),
    )


def _c_launcher(launcher: Any, compiled: Any, programs: int) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...], Any]:
    """The C function behind a launcher, and its arguments before the stream, after it, and before a tuple of the kernel's own (None: those
    come one by one).
    """
    if type(launcher).__module__ != "triton.backends.nvidia.driver" or type(launcher).__name__ != "CudaLauncher":
        raise _Unknown
    if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        raise _Unknown
    grid = (programs, 1, 1)
    head = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl)
    if hasattr(launcher, "arg_annotations") and hasattr(launcher, "kernel_signature"):  # 3.7 and up: one C function for all kernels
        after = (*head, compiled.packed_metadata, None, None, None, None, None)
        return _driver().active.utils.launch, grid, after, (launcher.arg_annotations, launcher.kernel_signature)
    after = (*head, None, None, compiled.packed_metadata, None, None, None)  # 3.6: one made for the kernel's signature
    function = launcher.launch
    if inspect.isfunction(function):  # what decomposes descriptors, around it
        inside = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        function = inside["launcher"].cell_contents if "launcher" in inside else None
    if not inspect.isbuiltin(function):
        raise _Unknown
    return function, grid, after, None
