"""What reaches into Triton and the driver: a compiled kernel launched with addresses. Knows Triton 3.6 to 3.9 by what it finds there.

``kernel[grid](...)`` binds, specialises, looks up and decomposes descriptors in Python at every launch. Of that only addresses change from
one call of a signature to the next, so :func:`bind` does it once and a :class:`Launch` replaces addresses. :class:`Launches` of a pass keep
the parameters of all its kernels as the driver takes them, by the addresses in them: where these come again, as those that an allocator
gives do from one step of a program to the next, a launch is one call of ``cuLaunchKernelEx``. What is not recognised here is
launched by ``kernel[grid]``, as ever: an AMD driver, the interpreter, a launcher of another form, scratch that Triton would allocate,
launch hooks (profilers), other knobs than those in force when the kernel was bound, and ``TRIFLASH_BIND=0`` in the environment. And by
Triton's C launcher, with addresses replaced among some hundred arguments: kernels of Triton 3.7 and later, clusters, cooperative grids,
parameters that the driver lays out otherwise than they are known here or, before CUDA 12.4, tells nothing of, and whatever the driver
says no to: a launcher has words for it, and on a thread without a context makes one.

Only Triton 3.6.0 ever ran on a GPU here; 3.6.0 and the newest release run in the tests, against a driver that does nothing.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import itertools
import operator
import os
import sys
import threading
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .calls import Call, cells, picking

__all__ = ["Launch", "Launches", "bind", "can_bind", "stands_aside", "streams", "watch"]

_MAPS = 64  # tensor maps kept for each descriptor of a launch, by address
_PREPARED = 4096  # launches of a pass kept ready in a process, by address; some 3 kB each

# Triton loads a kernel when its launcher is first asked for, in steps of which another thread may see the first.
_loading = threading.Lock()

_environment = getattr(os.environ, "_data", None)  # a look-up by bytes takes a fortieth of os.environ.get


def stands_aside() -> bool:
    """Whether launches go Triton's own way now, whatever was bound: hooks want to see them, or the environment says so."""
    off = os.environ.get("TRIFLASH_BIND") == "0" if _environment is None else _environment.get(b"TRIFLASH_BIND") == b"0"
    runtime = _knobs().runtime
    return off or _hooked(runtime.launch_enter_hook) or _hooked(runtime.launch_exit_hook)


def _hooked(hook: Any) -> bool:
    """A hook is None, or a chain of functions, which may be empty, or one."""
    return hook is not None and bool(getattr(hook, "calls", True))


@functools.cache  # an import of what is there takes a microsecond, too
def _knobs() -> Any:
    from triton import knobs

    return knobs


# The knobs by which Triton compiles one or another kernel for the same arguments.
_DECIDING = {"runtime": ("debug", "add_stages_inspection_hook"), "compilation": ("instrumentation_mode", "fpsan_homomorphic_casts")}


def _deciding(group: str) -> list[str]:
    """Those of a group that this release has."""
    return [name for name in _DECIDING[group] if hasattr(getattr(_knobs(), group), name)]


def streams() -> Callable[[int], int]:
    """What tells the current stream of a device, by its index."""
    current: Callable[[int], int] = _driver().active.get_current_stream
    return current


@functools.cache
def _driver() -> Any:
    from triton.runtime.driver import driver

    return driver


# CUlaunchAttribute, 72 bytes: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, allowed.
_PDL = array("Q", [6, 1, *[0] * 7])


class Launch:
    """One compiled kernel with its grid and every parameter but the addresses.

    form: what is known of the kernel. numbers: its parameters as the driver takes them, 8 bytes each, 0 for what is an address. pointers:
    (place among them, slot, offset in bytes). maps: (place, slot, offset, what a tensor map is made of beside its address, those made so
    far). All three are None where only Triton's C launcher can launch it. watched: the module that the kernel comes from, its name there,
    the kernel, and its hooks.
    """

    __slots__ = ("_arguments", "_attributes", "_call", "_place", "form", "grid", "maps", "numbers", "pointers", "watched")

    def __init__(self, call: Call, compiled: Any, place: Callable[[Tensor], tuple[int, int]], known: dict[int, tuple[int, int]]) -> None:
        kernel = call.kernel
        # What changes if somebody replaces the kernel, or wants to see its launches.
        self.watched = (sys.modules[kernel.__module__].__dict__, kernel.__name__, kernel, getattr(kernel, "pre_run_hooks", ()))
        self.form = form = _form_of(compiled, len(call.args))
        self._call, self._place = call, place
        self._arguments: _Arguments | None = None
        self._attributes = (_PDL.buffer_info()[0], 1) if call.pdl else (0, 0)
        self.numbers: array[int] | None = None
        self.pointers: list[tuple[int, int, int]] = []
        self.maps: list[tuple[int, int, int, tuple[Any, ...], dict[int, Any]]] = []
        if form.parts is None:
            self._arguments = _Arguments(call, form, place)
            return
        self.grid = (call.programs | 1 << 32, 1 | form.threads << 32, 1 | 1 << 32, form.shared_memory)
        parts, maps = form.parts, self.maps
        every = [0, *call.spread[0]]
        for to, own, descriptor in zip(parts.maps, form.recipes, parts.descriptors(every), strict=True):
            recipe = _recipe(descriptor, own)
            every += recipe[-3]
            every += recipe[-2]
            base = descriptor.base
            maps.append((to, *(known.get(id(base)) or place(base)), recipe, {}))
        self.pointers = [(to, *(known.get(id(every[at])) or place(every[at]))) for to, at in parts.pointers]
        numbers = [*parts.order(every)]
        for to, kind in parts.floats:
            numbers[to] = _FLOATS[kind](numbers[to])
        try:
            self.numbers = array("q", numbers)
        except OverflowError:  # of 64 bits without a sign
            self.numbers = array("q", [(value + _SIGN & _WHOLE) - _SIGN for value in numbers])

    @property
    def slots(self) -> set[int]:
        """Those whose addresses the launch takes."""
        if self.numbers is None and self._arguments is not None:
            return self._arguments.slots
        return {each[1] for each in self.pointers} | {each[1] for each in self.maps}

    def ready(self, stream: int, addresses: Sequence[int]) -> tuple[tuple[int, int, int, None], Any]:
        """Configuration, function, parameters and nothing more, as ``cuLaunchKernelEx`` takes them, where the slots' tensors begin at
        ``addresses``; and what has to live as long as they are used.
        """
        assert self.numbers is not None
        numbers = self.numbers[:]
        for at, slot, offset in self.pointers:
            numbers[at] = addresses[slot] + offset
        where = array("Q", cells(*numbers.buffer_info()))
        made = []
        encode = self.form.encode
        for at, slot, offset, recipe, known in self.maps:
            address = addresses[slot] + offset
            tensor_map = known.get(address)
            if tensor_map is None:  # as _map_at, at once
                if len(known) >= _MAPS:
                    known.clear()
                tensor_map = known[address] = encode(address, *recipe)
            where[at] = id(tensor_map) + _INSIDE
            made.append(tensor_map)
        config = array("Q", (*self.grid, stream, *self._attributes))
        return (config.buffer_info()[0], self.form.function, where.buffer_info()[0], None), (config, where, numbers, made)

    def __call__(self, stream: int, addresses: Sequence[int]) -> None:
        """Launch it by Triton's C launcher."""
        if self._arguments is None:
            self._arguments = _Arguments(self._call, self.form, self._place)
        self._arguments.launch(stream, addresses)


class _Arguments:
    """What Triton's C launcher takes of one launch: every argument but the addresses.

    pointers: (place among the arguments, slot, offset in bytes). maps: (place, slot, offset, recipe, those made so far), as those of
    :class:`Launch`. nested: tuples among the arguments that hold addresses.
    """

    def __init__(self, call: Call, form: _Form, place: Callable[[Tensor], tuple[int, int]]) -> None:
        self._form, self._grid = form, (call.programs, 1, 1)
        self._template: list[Any] = []
        self._pointers: list[tuple[int, int, int]] = []
        self._maps: list[tuple[int, int, int, tuple[Any, ...], dict[int, Any]]] = []
        self._nested: list[tuple[int, tuple[Any, ...], tuple[tuple[int, int, int], ...]]] = []
        recipes = iter(form.recipes)
        parameters = list(call.kernel.signature.parameters.values())[len(call.args) :]
        for value in (*call.args, *(call.constants.get(each.name, each.default) for each in parameters)):
            at = len(self._template)
            if isinstance(value, Tensor):
                self._pointers.append((at, *place(value)))
                self._template.append(0)
            elif type(value).__name__ == "TensorDescriptor":
                self._maps.append((at, *place(value.base), _recipe(value, next(recipes)), {}))
                self._template += [None, *value.shape, *value.strides]
            elif isinstance(value, tuple) and any(isinstance(x, Tensor) for x in value):
                inside = tuple((i, *place(x)) for i, x in enumerate(value) if isinstance(x, Tensor))
                self._nested.append((at, tuple(None if isinstance(x, Tensor) else x for x in value), inside))
                self._template.append(None)
            else:
                self._template.append(value)

    @property
    def slots(self) -> set[int]:
        nested = {slot for _, _, inside in self._nested for _, slot, _ in inside}
        return {each[1] for each in self._pointers} | {each[1] for each in self._maps} | nested

    def launch(self, stream: int, addresses: Sequence[int]) -> None:
        form, arguments = self._form, self._template.copy()
        for at, slot, offset in self._pointers:
            arguments[at] = addresses[slot] + offset
        for at, slot, offset, recipe, known in self._maps:
            arguments[at] = _map_at(addresses[slot] + offset, recipe, known, form.encode)
        for at, values, inside in self._nested:
            changed = list(values)
            for i, slot, offset in inside:
                changed[i] = addresses[slot] + offset
            arguments[at] = tuple(changed)
        if form.last is None:
            form.raw(*self._grid, stream, *form.after, *arguments)
        else:
            form.raw(*self._grid, stream, *form.after, *form.last, tuple(arguments))


def _map_at(address: int, recipe: tuple[Any, ...], known: dict[int, Any], encode: Callable[..., Any]) -> Any:
    """A tensor map, made or known."""
    made = known.get(address)
    if made is None:
        if len(known) >= _MAPS:
            known.clear()
        made = known[address] = encode(address, *recipe)
    return made


class _Form(NamedTuple):
    """What is known of a compiled kernel.

    raw, after, last: the C function behind its launcher, its arguments between the stream and the kernel's own, and before a tuple of
    those (None: they come one by one). encode: makes a tensor map. recipes: of each descriptor among the arguments, what its tensor map is
    made of beside address, shape and strides. parts: where the kernel's parameters come from; None: the driver does not say that it takes
    such. function, threads, shared_memory: of a launch.
    """

    raw: Callable[..., Any]
    after: tuple[Any, ...]
    last: Any
    encode: Callable[..., Any]
    recipes: tuple[tuple[Any, ...], ...]
    parts: _Parts | None
    function: int
    threads: int
    shared_memory: int


_forms: weakref.WeakKeyDictionary[Any, _Form] = weakref.WeakKeyDictionary()


def _form_of(compiled: Any, given: int) -> _Form:
    """Worked out once for a kernel, with so many arguments by position; raises :class:`_Unknown`. Threads ask under :data:`_loading`."""
    form = _forms.get(compiled)
    if form is None or (form.parts is not None and form.parts.given != given):
        raw, after, last = _c_launcher(compiled.run, compiled)
        recipes = tuple([_recipe_of(each) for each in getattr(compiled.metadata, "tensordesc_meta", None) or ()])
        num_warps, num_ctas, shared_memory, *_ = compiled.packed_metadata
        plain = last is None and num_ctas == 1 and not (compiled.run.launch_cooperative_grid or compiled.run.launch_pdl)
        parts = _parts(compiled, len(recipes), given) if plain else None
        form = _Form(raw, after, last, _encoder(), recipes, parts, compiled.function, 32 * num_warps, shared_memory)
        _forms[compiled] = form
    return form


class _Parts(NamedTuple):
    """Where a kernel's parameters come from. *Every* value is 0, then the arguments and what is in those that are tuples, as
    :attr:`~triflash.launch.calls.Call.spread` has them, then shape and strides of each descriptor.

    given: how many arguments come by position. descriptors: picks them. order: picks, of every value, the parameters as numbers, in order;
    0 for an address, which is none. pointers: of each the place among the parameters, and that among every value. maps: the places of the
    descriptors' tensor maps. floats: the place, and the kind.
    """

    given: int
    descriptors: Callable[[Sequence[Any]], tuple[Any, ...]]
    order: Callable[[list[Any]], tuple[Any, ...]]
    pointers: tuple[tuple[int, int], ...]
    maps: tuple[int, ...]
    floats: tuple[tuple[int, str], ...]


_WHOLE, _SIGN = 0xFFFF_FFFF_FFFF_FFFF, 0x8000_0000_0000_0000
_INSIDE = 128  # bytes from where an object of Triton's begins to the tensor map in it; both are multiples of that
_INTEGERS = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u1": 1, "u8": 1, "u16": 2, "u32": 4, "u64": 8}
# Numbers as they lie in 8 bytes of which a kernel reads the first; ctypes makes what is too large infinite, as C does.
_FLOATS: dict[str, Callable[[float], int]] = {
    "fp32": lambda value: int.from_bytes(bytes(ctypes.c_float(value)), "little"),
    "fp64": lambda value: array("q", array("d", [value]).tobytes())[0],
}


def _parts(compiled: Any, maps: int, given: int) -> _Parts | None:
    """:attr:`_Form.parts` of a kernel of which ``maps`` arguments are descriptors, and the first ``given`` come by position."""
    driver = _libcuda()
    signature = [*compiled.src.signature.values()]
    if any(own != "constexpr" for own in signature[given:]):
        return None
    begins, end, level = {}, 1 + given, [*enumerate(signature[:given], 1)]  # of what is in a tuple, among every value
    while level:
        inside: list[tuple[int, Any]] = []
        for at, own in level:
            if isinstance(own, tuple):
                begins[at] = end
                inside += enumerate(own, end)
                end += len(own)
        level = inside
    order: list[int] = []
    sizes: list[int] = []
    pointers, descriptors, floats = [], [], []
    left = [*enumerate(signature[:given], 1)]  # in the order of the parameters
    while left:
        where, kind = left.pop(0)
        if where in begins:
            left[:0] = enumerate(kind, begins[where])
        elif kind == "constexpr":
            continue
        elif kind.startswith("tensordesc"):
            if where > given:  # in a tuple
                return None
            rank = kind[kind.index("[") : kind.index("]")].count(",") + 1
            descriptors.append((len(order), where))
            order += [0, *range(end, end + 2 * rank)]
            end += 2 * rank
            sizes += [128, *[4] * rank, *[8] * rank]
        elif kind.startswith("*"):
            pointers.append((len(order), where))
            order.append(0)
            sizes.append(8)
        elif kind in _INTEGERS:
            order.append(where)
            sizes.append(_INTEGERS[kind])
        elif kind in _FLOATS:
            floats.append((len(order), kind))
            order.append(where)
            sizes.append(4 if kind == "fp32" else 8)
        else:
            return None
    if driver is None or len(descriptors) != maps or not driver.takes(compiled.function, [*sizes, 8, 8]):
        return None
    order += [0, 0]  # the addresses of scratch that nobody uses
    picked, places = picking([at for _, at in descriptors]), tuple([to for to, _ in descriptors])
    return _Parts(given, picked, operator.itemgetter(*order), tuple(pointers), places, tuple(floats))


class _Libcuda:
    """The driver's own functions. launch: ``cuLaunchKernelEx`` of addresses of configuration, function, parameters and of nothing, each
    made ready by :data:`_argument`; gives an error's number, or 0. Without the interpreter's lock, which whatever the driver waits for
    may need.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.launch = library["cuLaunchKernelEx"]  # of no types: ctypes would convert the arguments in each call, which takes most of it
        self._told = library.cuFuncGetParamInfo
        number = ctypes.POINTER(ctypes.c_size_t)
        self._told.argtypes, self._told.restype = [ctypes.c_void_p, ctypes.c_size_t, number, number], ctypes.c_int

    def takes(self, function: int, sizes: Sequence[int]) -> bool:
        """Whether a function's parameters are as many, and of those sizes: where they lie is the driver's business (ptxas aligns tensor
        maps by their address, not by the distance from the first parameter).
        """
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        for at, wanted in enumerate(sizes):
            if self._told(function, at, offset, size) != 0 or size.value != wanted:
                return False
        return bool(self._told(function, len(sizes), offset, size) != 0)


@functools.cache
def _libcuda() -> _Libcuda | None:
    """The driver that Triton has loaded; None: not here, older than CUDA 12.4, or Triton keeps tensor maps otherwise than is known here."""
    from triton.backends.nvidia import driver

    if sys.byteorder != "little" or getattr(driver.PyCUtensorMap, "__basicsize__", 0) != 2 * _INSIDE:
        return None
    try:
        return _Libcuda(ctypes.CDLL("libcuda.so.1"))
    except (OSError, AttributeError):
        return None


class Launches:
    """The launches of a pass, in order."""

    def __init__(self, launches: Sequence[Launch]) -> None:
        self.launches = tuple(launches)
        self._number = next(_numbers)
        known = all(each.numbers is not None for each in launches)
        driver = _libcuda() if known and launches else None
        self._launch = None if driver is None else driver.launch

    def start(self, stream: int, addresses: tuple[int, ...]) -> None:
        """Launch them on a stream, where the slots' tensors begin at ``addresses``."""
        if self._launch is None:
            for each in self.launches:
                each(stream, addresses)
            return
        prepared = _prepared.get((self._number, stream, addresses)) or self._prepare(stream, addresses)
        rest = iter(prepared[0])
        if any(itertools.starmap(self._launch, rest)):  # which ends at the first that the driver refuses
            for each in self.launches[len(self.launches) - operator.length_hint(rest) - 1 :]:
                each(stream, addresses)

    def _prepare(self, stream: int, addresses: tuple[int, ...]) -> _Prepared:
        made = [each.ready(stream, addresses) for each in self.launches]
        prepared = tuple([tuple(map(_argument, ready)) for ready, _ in made]), [kept for _, kept in made]
        with _preparing:
            if len(_prepared) >= _PREPARED:
                for oldest in list(itertools.islice(_prepared, _PREPARED // 8)):
                    del _prepared[oldest]
            _prepared[self._number, stream, addresses] = prepared
        return prepared


_Prepared = tuple[tuple[tuple[Any, ...], ...], list[Any]]  # of each launch what the driver takes; and what keeps that alive
_argument = ctypes.c_void_p.from_param  # what ctypes makes of a pointer for a call, and takes as it is
_numbers = itertools.count()
_prepared: dict[tuple[int, int, tuple[int, ...]], _Prepared] = {}
_preparing = threading.Lock()


def watch(launches: Sequence[Launch]) -> Callable[[], bool]:
    """What tells, before each run of bound launches, whether they have to go Triton's own way now: hooks want to see them, the environment
    says so, knobs are others than at binding time, a kernel was replaced or somebody watches it. Every eager call waits for the answer.
    """
    watched = [each.watched for each in launches]
    key = tuple(map(id, itertools.chain.from_iterable(watched)))
    known = _watching.get(key)  # one for all passes of the same kernels, which it keeps alive
    if known is not None and not known():
        return known
    knobs = _knobs()
    in_force = _knobs_in_force(_calls_of("launch_enter_hook"), _calls_of("launch_exit_hook"))
    enter, leave, *deciding = in_force(knobs)
    as_bound = (*([] if isinstance(each, list) else None for each in (enter, leave)), *deciding)
    modules, names, kernels, hooks = map(list, zip(*watched, strict=True)) if launches else ([], [], [], [])
    unwatched = [type(each)() for each in hooks]
    switch, off = (lambda _: os.environ.get("TRIFLASH_BIND"), "0") if _environment is None else (_environment.get, b"0")

    def changed() -> bool:
        # C compares each of these in one go: what is the same object is equal.
        try:
            return (
                in_force(knobs) != as_bound
                or [*map(dict.get, modules, names)] != kernels
                or hooks != unwatched
                or switch(b"TRIFLASH_BIND") == off
            )
        except AttributeError:  # hooks of another kind than there were
            return True

    if len(_watching) >= 256:
        _watching.clear()
    _watching[key] = changed
    return changed


_watching: dict[tuple[int, ...], Callable[[], bool]] = {}


@functools.cache
def _knobs_in_force(*hooks: str) -> Callable[[Any], tuple[Any, ...]]:
    """What reads, in one go, Triton's launch hooks and the knobs that decide which kernel it compiles."""
    deciding = [f"{group}.{name}" for group in _DECIDING for name in _deciding(group)]
    return operator.attrgetter(*(f"runtime.{hook}" for hook in hooks), *deciding)


def _calls_of(hook: str) -> str:
    """The name of what is empty as long as nobody hooks in: of a chain of functions its list."""
    return f"{hook}.calls" if hasattr(getattr(_knobs().runtime, hook), "calls") else hook


class _Unknown(Exception):
    """Something of Triton's has another form than those that are known here."""


def can_bind(calls: Sequence[Call]) -> bool:
    """Whether launches need not go Triton's own way for what is known before their kernels are compiled."""
    if getattr(_knobs().runtime, "interpret", False):
        return False
    # Of one with hooks somebody watches the launches.
    return all(hasattr(call.kernel, "warmup") and not getattr(call.kernel, "pre_run_hooks", None) for call in calls)


def bind(
    calls: Sequence[Call], compiled: Sequence[Any], place: Callable[[Tensor], tuple[int, int]], known: dict[int, tuple[int, int]]
) -> list[Launch] | None:
    """Bind launches of compiled kernels on the current device; None: they have to go Triton's own way.

    The calls' tensors are meta tensors, whose addresses modulo 16 bytes are those of every call; ``place`` tells slot and offset in bytes,
    and ``known`` the same of most of them, by id.
    """
    with _loading:
        try:
            return [Launch(call, kernel, place, known) for call, kernel in zip(calls, compiled, strict=True)]
        except _Unknown:
            return None


def _encoder() -> Callable[..., Any]:
    utils = _driver().active.utils
    encode: Callable[..., Any] | None = getattr(utils, "fill_tma_descriptor_tiled", None) or getattr(utils, "fill_tma_descriptor", None)
    if encode is None:
        raise _Unknown
    return encode


def _recipe_of(metadata: Any) -> tuple[Any, ...]:
    """What the tensor map of one of a kernel's descriptors is made of beside address, shape and strides, as Triton's driver passes it."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    if metadata is None or metadata["fp4_padded"] or metadata.get("is_im2col"):
        raise _Unknown
    return metadata["swizzle"], metadata["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[metadata["elem_type"]], metadata["block_size"]


def _recipe(descriptor: Any, own: tuple[Any, ...]) -> tuple[Any, ...]:
    """All of it: what it is of the kernel, shape, strides, and no padding with NaN."""
    shape, strides, padding = _laid(descriptor)
    if padding != "zero" or strides[-1] != 1 or getattr(descriptor, "round_f32_to_tf32", False):
        raise _Unknown
    return (*own, shape, strides, 0)


_laid = operator.attrgetter("shape", "strides", "padding")


def _c_launcher(launcher: Any, compiled: Any) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
    """The C function behind a launcher, and its arguments between the stream and the kernel's own, and before a tuple of those (None: they
    come one by one).
    """
    if type(launcher).__module__ != "triton.backends.nvidia.driver" or type(launcher).__name__ != "CudaLauncher":
        raise _Unknown
    if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        raise _Unknown
    head = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl)
    if hasattr(launcher, "arg_annotations") and hasattr(launcher, "kernel_signature"):  # 3.7 and up: one C function for all kernels
        after = (*head, compiled.packed_metadata, None, None, None, None, None)
        return _driver().active.utils.launch, after, (launcher.arg_annotations, launcher.kernel_signature)
    after = (*head, None, None, compiled.packed_metadata, None, None, None)  # 3.6: one made for the kernel's signature
    function = launcher.launch
    if inspect.isfunction(function):  # what decomposes descriptors, around it
        inside = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        function = inside["launcher"].cell_contents if "launcher" in inside else None
    if not inspect.isbuiltin(function):
        raise _Unknown
    return function, after, None
