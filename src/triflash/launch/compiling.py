"""Kernels that a pass needs and Triton does not have yet, compiled side by side by threads. Called by ``bound/passes.py``, once for a pass.

Triton holds the interpreter's lock while it reads a kernel's source, a seventh of the time; MLIR's passes and LLVM release it, and ptxas is
a process. So threads do what processes would, without a start that takes as long as a small kernel, and leave nothing behind. What is
compiled, under which key and with which settings, is for Triton to say: its own mode for compiling asynchronously hands over functions.

Whoever needs new kernels compiles the first of them and starts a thread for each other, also for those of a backward pass that will be
asked for. Sources are read one at a time, and while somebody waits here: reading them, Triton changes the process's filters of warnings for
a while. A thread ends with its kernel, and its failure is raised where the kernel is needed.

One kernel after another: with ``TRIFLASH_COMPILE_THREADS=1``, on one core, while a CUDA graph is captured, under hooks and knobs of
Triton that mean to see every compilation, and where Triton has no such mode.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import operator
import os
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import bad_value
from .calls import Call, picking

__all__ = ["compiled_kernels"]

_MOST = 8  # kernels at a time: no pass has more large ones, and each takes some 100 MB
_VARIABLE = "TRIFLASH_COMPILE_THREADS"


# Held while Triton is asked for kernels and reads their sources. Parsing in two threads at once has failed (CPython 3.11).
_parsing = threading.Lock()

_under_way: dict[str, _Job] = {}  # by Triton's key; added to under ``_parsing``
_changed = threading.Condition(threading.RLock())  # of a job's state, and of
_compiling = 0  # jobs beyond their source
_waiting: list[_Job] = []  # until there are fewer


def compiled_kernels(calls: Sequence[Call], later: Callable[[], Sequence[Call]] | None = None) -> list[Any]:
    """The compiled kernels of launches on the current device. later: launches that will follow, whose kernels are begun as well if some of
    these are new; it may raise.

    Raises what Triton raises for a kernel that does not compile.
    """
    settings = _settings()
    found = [None if settings is None else _known(call, settings) for call in calls]
    if None not in found:
        return found
    limit = _limit()
    mode = _triton_mode() if limit > 1 and not _capturing() else None
    if mode is None or mode.get() is not None:
        with _parsing:
            found = [_asked(call) for call in calls]
    else:
        with _parsing, _as_mode(mode):
            found = [_asked(call) for call in calls]
        if jobs := [each.job for each in found if isinstance(each, _Awaited)]:
            behind = _later_jobs(mode, later) if later is not None else []
            for job in jobs:
                job.urgent = True
            start = functools.partial(_start, [*jobs[1:], *behind], limit)
            jobs[0].run(None, start)
            if jobs[0].error is None:
                start()  # if somebody else compiles it, or has by now
            for job in behind:
                job.wait_for_source()
    return [_result(each) for each in found]


def _asked(call: Call) -> Any:
    """Triton's compiled kernel of a launch, or what stands for it until it is compiled."""
    call.settle()
    found = call.kernel.run(*call.args, grid=(call.programs,), warmup=True, **call.options)
    _note(call.kernel)
    return found


class _Noted(NamedTuple):
    """Of a kernel whose global constants Triton has compared: its key then, and where they are, their names and what they were.

    sorts: by the types of arguments, how to tell them apart. found: what tells a call -> Triton's key for it, the compiled kernel, and the
    call, so that what its arguments are told by lives.
    """

    kernel: Any
    key: str
    where: list[dict[str, Any]]
    names: list[str]
    values: list[Any]
    sorts: dict[tuple[Any, ...], _Sort | None]
    found: dict[tuple[Any, ...], tuple[str, Any, Call]]


_noted: dict[int, _Noted] = {}  # by id: a function's own hash is that of its key


def _note(kernel: Any) -> None:
    used = getattr(kernel, "used_global_vals", None)
    if id(kernel) not in _noted and isinstance(used, dict) and getattr(kernel, "hash", None) is not None:
        where, names = [scope for _, scope in used.values()], [name for name, _ in used]
        _noted[id(kernel)] = _Noted(kernel, kernel.hash, where, names, [*map(dict.get, where, names)], {}, {})


@functools.cache
def _triton() -> tuple[Any, Any, Any]:
    """Its knobs, driver and ``jit``: an import of what is there takes a microsecond, too."""
    from triton import knobs
    from triton.runtime import driver, jit

    return knobs, driver, jit


_Settings = tuple[int, Any, Any]


def _settings() -> _Settings | None:
    """The current device, and what Triton compiles by beside arguments, which takes some microseconds to ask; None: in a way that is not
    known here.
    """
    knobs, driver, _ = _triton()
    if getattr(knobs.runtime, "add_stages_inspection_hook", None) or getattr(knobs.compilation, "fpsan_homomorphic_casts", None):
        return None  # parts of the key in later releases
    try:
        return driver.active.get_current_device(), knobs.runtime.debug, knobs.compilation.instrumentation_mode
    except AttributeError:  # another release
        return None


def _known(call: Call, settings: _Settings) -> Any:
    """What Triton would answer where it has the kernel in memory, sooner: its global constants are compared as objects, all in one go, not
    by the operators of each. None: ask Triton.
    """
    kernel = call.kernel
    noted = _noted.get(id(kernel))
    if noted is None or noted.key != kernel.hash or [*map(dict.get, noted.where, noted.names)] != noted.values:
        return None
    device, debug, mode = settings
    try:
        known, keys, _, _, binder = kernel.device_caches[device]
        debug = kernel.debug or debug
        told = _told(noted, call, (debug, mode))
        key, found, _ = noted.found.get(told, _NOTHING) if told is not None else _NOTHING
        if found is not None and known.get(key) is found:
            return found
        _, specialization, options = binder(*call.args, **call.options, debug=debug, instrumentation_mode=mode)
        key = _triton()[2].compute_cache_key(keys, specialization, options)
        found = known.get(key)
    except (AttributeError, TypeError, ValueError):  # another release
        return None
    if hasattr(found, "result"):
        return None
    if told is not None and found is not None:
        noted.found[told] = key, found, call
    return found


_NOTHING = (None, None, None)


class _Sort(NamedTuple):
    """What picks, of arguments of some types and what is in those that are tuples, such. specialised: the integers by whose values kernels
    differ. others: what is told by itself.
    """

    integers: Callable[[Sequence[Any]], tuple[int, ...]]
    specialised: Callable[[Sequence[Any]], tuple[int, ...]]
    tensors: Callable[[Sequence[Any]], tuple[Any, ...]]
    descriptors: Callable[[Sequence[Any]], tuple[Any, ...]]
    others: Callable[[Sequence[Any]], tuple[Any, ...]]


def _told(noted: _Noted, call: Call, more: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What tells a call from those that take another kernel, as Triton 3.6 does: by each integer if it is 1, and if it is a multiple of 16,
    unless the kernel wants no such difference. Triton finds out argument by argument, which takes longer. None: leave it to Triton.
    """
    args, types = call.spread
    sort = noted.sorts.get(types, _NEW)
    if sort is _NEW:
        sort = noted.sorts[types] = _sort(noted.kernel, args, len(call.args))
    if sort is None:
        return None
    specialised = sort.specialised(args)
    try:
        array("i", sort.integers(args))
        low = array("i", specialised).tobytes()[_LOWEST]
    except OverflowError:  # beyond 32 bits
        return None
    # What is 1 if its lowest byte is, as most are, is told by that byte alone.
    ones = None if low.count(1) == specialised.count(1) else tuple(map((1).__eq__, specialised))
    options = call.options
    values = tuple(options.values())
    return (
        types, low.translate(_DIVISIBLE), ones,
        *[(x.dtype, x.data_ptr() % 16 == 0) for x in sort.tensors(args)], *map(id, map(_block, sort.descriptors(args))),
        sort.others(args), *options, values, tuple(map(type, values)), more,
    )  # fmt: skip


_NEW: Any = object()
_LOWEST = slice(None, None, 4) if sys.byteorder == "little" else slice(3, None, 4)  # byte of each number of 32 bits
_DIVISIBLE = bytes([16 if byte % 16 == 0 else 1 if byte == 1 else 0 for byte in range(256)])  # of that byte: 16, or 1, or neither
# The list of a block is one object for all descriptors of a dtype, a block and a layout (``launch/hopper.py``); of a descriptor with a list
# of its own Triton is asked.
_block = operator.attrgetter("block_shape")


def _sort(kernel: Any, args: tuple[Any, ...], count: int) -> _Sort | None:
    """For arguments of such types, of which the first ``count`` are parameters; None: they cannot be told here."""
    if not _specialises_as_known():
        return None
    integers, specialised, tensors, descriptors, others = [], [], [], [], []
    for at, x in enumerate(args):
        kind, parameter = type(x), kernel.params[at] if at < count else None
        if parameter is not None and parameter.is_constexpr:
            others.append(at)
        elif kind is int:
            integers.append(at)
            if parameter is None or not parameter.do_not_specialize:
                specialised.append(at)
        elif kind is torch.Tensor:
            tensors.append(at)
        elif kind.__name__ == "TensorDescriptor":
            descriptors.append(at)
        elif kind is bool:
            others.append(at)
        elif not (x is None or kind is float or isinstance(x, tuple)):  # whose types tell all
            return None
    return _Sort(*map(picking, (integers, specialised, tensors, descriptors, others)))


@functools.cache
def _specialises_as_known() -> bool:
    """Whether this Triton tells arguments apart as it is known here."""
    import triton

    return bool(triton.__version__.startswith("3.6."))


def _result(compiled: Any) -> Any:
    return compiled.result() if hasattr(compiled, "result") else compiled


def _later_jobs(mode: Any, later: Callable[[], Sequence[Call]]) -> list[_Job]:
    with contextlib.suppress(Exception):  # whoever needs these kernels is told then
        calls = later()
        with _parsing, _as_mode(mode):
            found = [each for each in map(_asked, calls) if isinstance(each, _Awaited)]
        for each in found:
            each.kept = True
        return [each.job for each in found]
    return []


def _limit() -> int:
    """How many kernels are compiled at a time."""
    given = os.environ.get(_VARIABLE)
    if given is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, _MOST)
    if not given.isdecimal() or int(given) < 1:
        raise bad_value(_VARIABLE, "a number from 1 (one kernel after another) up", repr(given))
    return int(given)


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _triton_mode() -> Any:
    """Triton's variable for a mode of compiling; None: it has none, or somebody wants to see kernels compiled one by one."""
    from triton import knobs

    try:
        from triton.runtime._async_compile import active_mode
    except ImportError:
        return None
    watched = knobs.runtime.jit_cache_hook is not None or knobs.runtime.jit_post_compile_hook is not None
    return None if watched or knobs.compilation.always_compile else active_mode


@contextlib.contextmanager
def _as_mode(mode: Any) -> Iterator[None]:
    token = mode.set(_Mode())
    try:
        yield
    finally:
        mode.reset(token)


class _Mode:
    """What Triton asks, in the place of its ``AsyncCompileMode``, to have a kernel compiled that is not in memory."""

    def submit(
        self, key: str, compile_it: Callable[[], Any], keep: Callable[[Any], None], drop: Callable[[Any], None] | None = None
    ) -> Any:
        """The kernel if Triton's cache on disk has it, else an :class:`_Awaited`. keep, drop: tell Triton that it is there, or failed."""
        job = _under_way.get(key)
        if job is None:
            source = _source_of(compile_it)
            if source is None or _on_disk(key, source):
                kernel = compile_it()
                keep(kernel)
                return kernel
            job = _under_way[key] = _Job(key, compile_it, source)
        awaited = _Awaited(job, keep, drop)
        job.awaiting.append(awaited)
        return awaited


def _source_of(compile_it: Callable[[], Any]) -> Any:
    """Of Triton's function that compiles a kernel what it compiles, or None if that has another form than is known here."""
    code, cells = getattr(compile_it, "__code__", None), getattr(compile_it, "__closure__", None)
    inside = dict(zip(code.co_freevars, cells, strict=True)) if code is not None and cells is not None else {}
    source = inside["src"].cell_contents if "src" in inside else None
    return source if hasattr(source, "make_ir") and hasattr(source, "name") else None


def _on_disk(key: str, source: Any) -> bool:
    """Whether Triton's cache has a kernel, as ``triton.compile`` asks for it. Raises what that raises where there can be no cache."""
    from triton.runtime.cache import get_cache_manager

    name = f"{source.name[:150]}.json"
    return name in (get_cache_manager(hashlib.sha256(key.encode("utf-8")).hexdigest()).get_group(name) or {})


class _Abandoned(Exception):
    """The main thread has ended: nothing more is begun."""


class _Job:
    """A kernel to compile, by whoever comes first."""

    def __init__(self, key: str, compile_it: Callable[[], Any], source: Any) -> None:
        self.key, self._compile, self._source, self._make_ir = key, compile_it, source, source.make_ir
        self.awaiting: list[_Awaited] = []
        self.kernel: Any = None
        self.error: Exception | None = None
        self.urgent, self.size = False, 0.0  # somebody waits; seconds that its source took to read
        self._begun = self._read = self._ended = False

    def claim(self) -> bool:
        """Whether nobody has begun; then the caller has."""
        with _changed:
            begun, self._begun = self._begun, True
        return not begun

    def run(self, limit: int | None, then: Callable[[], None] | None = None) -> None:
        """Compile it, unless somebody has begun."""
        if self.claim():
            self.carry_out(limit, then)

    def carry_out(self, limit: int | None, then: Callable[[], None] | None = None) -> None:
        """Compile it, which is claimed. limit: of kernels at a time; None: somebody needs it at once. then: what to do when its source has
        been read.
        """
        inside = False

        def read(*arguments: Any) -> Any:
            nonlocal inside
            with _parsing:
                if limit is not None and _process_ends():
                    raise _Abandoned
                before = time.thread_time()
                module = self._make_ir(*arguments)
                self.size = time.thread_time() - before
            with _changed:
                self._read = True
                _changed.notify_all()
            if then is not None:
                then()
            self._enter(limit)
            inside = True
            return module

        self._source.make_ir = read
        try:
            self._ended = self._tried()
        finally:
            self._source.make_ir = self._make_ir
            self._leave(inside)

    def _enter(self, limit: int | None) -> None:
        """Be one of a limited number: what somebody waits for goes first, then what is larger."""
        global _compiling
        with _changed:
            if limit is not None:
                _waiting.append(self)
                _changed.wait_for(lambda: _process_ends() or (_compiling < limit and self is max(_waiting, key=_Job.rank)))
                _waiting.remove(self)
                _changed.notify_all()
                if _process_ends():
                    raise _Abandoned
            _compiling += 1

    def _leave(self, inside: bool) -> None:
        """And claim it no longer: an interrupted one is left to others."""
        global _compiling
        with _changed:
            _compiling -= inside
            self.release()

    def rank(self) -> tuple[bool, float]:
        return self.urgent, self.size

    def _tried(self) -> bool:
        """Whether the kernel is there, or failed."""
        try:
            self.kernel = self._compile()
            _build_launcher(self.kernel)
        except _Abandoned:
            return False
        except Exception as error:  # noqa: BLE001 (raised by who needs the kernel)
            self.error = error
        _under_way.pop(self.key, None)
        for each in list(self.awaiting):
            each.settle()
        return True

    def release(self) -> None:
        """Claim it no longer."""
        with _changed:
            self._begun = self._ended
            _changed.notify_all()

    def wait_for_source(self) -> None:
        """Until it has been read, or whoever began to is no more."""
        with _changed:
            _changed.wait_for(lambda: self._read or not self._begun or self._ended)

    def wait(self) -> None:
        """Until it is compiled, or failed; by oneself if nobody has begun."""
        while not self._ended:
            self.run(None)
            with _changed:
                self.urgent = True
                _changed.notify_all()
                _changed.wait_for(lambda: self._ended or not self._begun)


def _process_ends() -> bool:
    return not threading.main_thread().is_alive()


class _Awaited:
    """What Triton has of a kernel until it is compiled. kept: nobody waits for it now."""

    def __init__(self, job: _Job, keep: Callable[[Any], None], drop: Callable[[Any], None] | None) -> None:
        self.job, self._keep, self._drop = job, keep, drop
        self.kept = False

    def settle(self) -> None:
        """Tell Triton of a kernel that nobody waits for."""
        if not self.kept:
            return
        if self.job.error is None:
            self._keep(self.job.kernel)
        elif self._drop is not None:
            self._drop(self)

    def result(self, ignore_errors: bool = False) -> Any:
        self.job.wait()
        if self.job.error is None:
            self._keep(self.job.kernel)
        else:
            if self._drop is not None:
                self._drop(self)
            if not ignore_errors:
                raise self.job.error
        return self.job.kernel


def _build_launcher(kernel: Any) -> None:
    """The C function that launches it, half a second of a C compiler, where Triton has one for each signature. What fails here fails again,
    and is told, where the kernel is loaded.
    """
    from .ahead import build_launcher

    with contextlib.suppress(Exception):
        build_launcher(kernel)


def _start(jobs: Sequence[_Job], limit: int) -> None:
    """A thread for each job that nobody has begun."""
    for job in jobs:
        if not job.claim():
            continue
        # They hold up the end of the process for as long as a kernel takes: Python cannot end a thread inside LLVM.
        thread = threading.Thread(target=job.carry_out, args=(limit,), name="triflash-compile", daemon=False)
        try:
            thread.start()
        except RuntimeError:  # the process ends, or has too many: who needs the kernel compiles it
            job.release()


def _after_fork() -> None:
    """Of threads a forked process has none but its own."""
    global _parsing, _changed, _compiling
    _parsing, _changed, _compiling = threading.Lock(), threading.Condition(threading.RLock()), 0
    _waiting.clear()
    for job in _under_way.values():
        job.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
