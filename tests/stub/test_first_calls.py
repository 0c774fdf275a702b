"""New kernels of a pass are compiled side by side, those of the backward pass that follows with them; and when they are not."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import gpu
import pytest
import torch
import triton
from test_compiled_ahead import forgotten
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from ways import OURS

from triflash import attention
from triflash.bound.signature import CALLS
from triflash.kernels import triton as portable
from triflash.launch import compiling
from triflash.launch.calls import Call
from triflash.plan.configs import TileConfig

BF16 = torch.bfloat16
GUARD = 300.0  # seconds after which a test fails that would otherwise hang


@pytest.fixture(autouse=True)
def cold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing is bound, in memory or on disk; two kernels at a time, however many cores there are."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRIFLASH_COMPILE_THREADS", "2")
    assert portable
    forgotten()
    CALLS.clear()
    yield
    CALLS.clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Kernels that are compiled, not found on disk, each with the thread that does it."""
    seen: list[tuple[str, str]] = []

    def listener(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            seen.append((src.name, threading.current_thread().name))

    monkeypatch.setattr(knobs.compilation, "listener", listener)
    return seen


def assembled_by(monkeypatch: pytest.MonkeyPatch, assemble: Callable[[str], None]) -> None:
    """Run this, with a kernel's name, as the last step of its compilation."""

    def make_cubin(self: Any, source: str, metadata: dict[str, Any], *_: Any) -> bytes:
        assemble(metadata["name"])
        return source.encode()

    monkeypatch.setattr(CUDABackend, "make_cubin", make_cubin)


def inputs(rows: int) -> list[Tensor]:
    """16 rows are two cheap kernels, 160 are four."""
    return [torch.zeros(1, rows, 1, 16, dtype=BF16, requires_grad=True) for _ in range(3)]


def forward(rows: int = 16) -> Tensor:
    out: Tensor = attention(*inputs(rows), backend="triton")
    return out


def step(rows: int = 16) -> None:
    forward(rows).backward(torch.zeros(1, rows, 1, 16, dtype=BF16))


BOTH = ["short_forward", "short_backward"]


def names(seen: list[tuple[str, str]]) -> list[str]:
    return [name for name, _ in seen]


def settled() -> None:
    for thread in threading.enumerate():
        if thread.name == "triflash-compile":
            thread.join()


def test_kernels_of_a_step_are_compiled_side_by_side(monkeypatch: pytest.MonkeyPatch, compiled: list[tuple[str, str]]) -> None:
    """The forward pass's kernel is not ready before one of the backward pass's is as far."""
    both, arrived = threading.Barrier(2), []

    def assemble(name: str) -> None:
        arrived.append(name)
        if len(arrived) <= 2:
            both.wait(GUARD)

    assembled_by(monkeypatch, assemble)
    before = gpu.launches()
    step(160)
    assert gpu.launches() - before == len(compiled) == 4 and len(set(names(compiled))) == 4
    assert dict(compiled)["forward"] == "MainThread"


def test_what_threads_compile_is_what_one_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def files(threads: str) -> dict[str, bytes]:
        folder = tmp_path / threads
        monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
        monkeypatch.setenv("TRIFLASH_COMPILE_THREADS", threads)
        forgotten()
        CALLS.clear()
        step()
        return {str(x.relative_to(folder)): x.read_bytes() for x in folder.rglob("*.ptx")}

    found = [files("1"), files("3")]
    assert len(found[0]) == len(BOTH) and found[0] == found[1]


def test_without_gradients_nothing_is_compiled_for_later(compiled: list[tuple[str, str]]) -> None:
    with torch.no_grad():
        forward()
    attention(*(x.detach() for x in inputs(16)), backend="triton", return_lse=True)
    settled()
    assert names(compiled) == BOTH[:1]


def test_later_kernels_are_those_of_the_gradients_that_will_be_wanted(compiled: list[tuple[str, str]]) -> None:
    q, k, v = inputs(160)
    attention(q, k.detach(), v.detach(), backend="triton")
    settled()
    ahead = names(compiled)
    assert "dkdv" not in ahead and len(ahead) > 1
    attention(q, k.detach(), v.detach(), backend="triton").backward(torch.zeros_like(q))
    assert names(compiled) == ahead, "others than those that the backward pass took"


def test_sources_are_read_while_the_caller_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of later kernels too, however fast its own kernel is: Triton changes the process's filters of warnings meanwhile."""
    ready, read, make_ir = threading.Event(), [], ASTSource.make_ir

    def slow(self: Any, *arguments: Any) -> Any:
        if self.name != "forward":
            ready.wait(GUARD)
        module = make_ir(self, *arguments)
        read.append(self.name)
        return module

    monkeypatch.setattr(ASTSource, "make_ir", slow)
    assembled_by(monkeypatch, lambda name: ready.set() if name == "forward" else None)
    forward(160)
    assert len(read) == 4


@pytest.mark.parametrize("threads", ["2", "1"])
def test_nothing_is_begun_for_kernels_that_are_there(
    threads: str, monkeypatch: pytest.MonkeyPatch, compiled: list[tuple[str, str]]
) -> None:
    monkeypatch.setenv("TRIFLASH_COMPILE_THREADS", threads)
    step()
    assert names(compiled) == BOTH
    refused = AssertionError("a kernel that is there was begun")
    with mock.patch.object(compiling, "_start", side_effect=refused), mock.patch.object(compiling, "_later_jobs", side_effect=refused):
        CALLS.clear()
        step()  # in memory
        forgotten()
        CALLS.clear()
        step()  # on disk
        with mock.patch.object(compiling, "compiled_kernels", side_effect=refused):
            step()  # bound: nobody asks
    assert names(compiled) == BOTH


def test_a_kernel_in_memory_is_found_without_asking_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Triton's 3.6. Unless a constant of its module is another than it was: Triton says so."""
    forward()
    CALLS.clear()
    if OURS:
        with mock.patch.object(compiling, "_asked", side_effect=AssertionError("nobody needs to")):
            forward()
    noted = next(each for each in compiling._noted.values() if each.kernel.__name__ == "short_forward" and each.names)
    monkeypatch.setitem(noted.where[0], noted.names[0], triton.language.constexpr(object()))
    CALLS.clear()
    with pytest.raises(RuntimeError, match=f"{noted.names[0]} has changed"):
        forward()


@pytest.mark.skipif(not OURS, reason="later releases are asked themselves")
def test_numbers_are_told_apart_as_triton_does() -> None:
    """By each if it is 1, and if it is a multiple of 16, also of numbers whose lowest byte is that of another."""
    parameter = SimpleNamespace(is_constexpr=False, do_not_specialize=False)
    noted = compiling._Noted(SimpleNamespace(params=[parameter, parameter]), "", [], [], [], {}, {})

    def told(*numbers: int) -> Any:
        return compiling._told(noted, Call(noted.kernel, numbers, {}, TileConfig(16, 16, 4, 1), 1), ())

    kinds = {n: (n == 1, n % 16 == 0) for n in (1, 257, 2**30 + 1, -255, 0, 16, 272, -16, 2, 18, 2**31 - 1, -(2**31))}
    pairs = [*itertools.product(kinds, repeat=2)]
    for one, other in itertools.product(pairs, repeat=2):
        if [kinds[n] for n in one] != [kinds[n] for n in other]:
            assert told(*one) != told(*other), (one, other)
    assert told(16, 2) is not None and told(16, 2) == told(272, 18) and told(1, 2) == told(1, 18)
    assert told(2**31, 1) is None and told(1, -(2**31) - 1) is None


def alone_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIFLASH_COMPILE_THREADS", "1")


def alone_by_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def alone_by_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **_: None)


ALONE = [alone_by_variable, alone_by_capture, alone_by_hook]


@pytest.mark.parametrize("alone", ALONE, ids=lambda each: each.__name__)
def test_one_after_another(
    alone: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, compiled: list[tuple[str, str]]
) -> None:
    alone(monkeypatch)
    with mock.patch.object(compiling, "_start", side_effect=AssertionError("threads were asked")):
        out = forward()
        assert names(compiled) == BOTH[:1]
        out.backward(torch.zeros_like(out))
    assert names(compiled) == BOTH


def test_how_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiling._limit() == 2
    monkeypatch.setenv("TRIFLASH_COMPILE_THREADS", "30")
    assert compiling._limit() == 30
    monkeypatch.delenv("TRIFLASH_COMPILE_THREADS")
    for cores, limit in ((1, 1), (3, 3), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, count=cores: set(range(count)), raising=False)
        assert compiling._limit() == limit


def test_a_wrong_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("0", "-1", "many", ""):
        monkeypatch.setenv("TRIFLASH_COMPILE_THREADS", wrong)
        with pytest.raises(ValueError, match="^TRIFLASH_COMPILE_THREADS: wanted a number from 1 .*, got '"):
            forward()


@pytest.mark.parametrize(("broken", "threads"), [(BOTH[0], "2"), (BOTH[1], "2"), (BOTH[1], "1")])
def test_an_error_is_raised_where_the_kernel_is_needed(
    broken: str, threads: str, monkeypatch: pytest.MonkeyPatch, compiled: list[tuple[str, str]]
) -> None:
    """As often as it is needed; and a kernel that compiles at last is taken."""
    monkeypatch.setenv("TRIFLASH_COMPILE_THREADS", threads)

    def assemble(name: str) -> None:
        if name == broken:
            raise RuntimeError(f"no registers for {name}")

    with monkeypatch.context() as patched:
        assembled_by(patched, assemble)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"^no registers for {broken}$"):
                step()
        settled()
    step()
    assert sorted(names(compiled)) == sorted(BOTH)


@pytest.mark.parametrize("threads", ["2", "1"])
def test_a_cache_that_cannot_be_written(threads: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton's own error; what is there is found."""
    monkeypatch.setenv("TRIFLASH_COMPILE_THREADS", threads)
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patched:
        patched.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
        with pytest.raises(OSError, match=str(tmp_path / "file")):
            forward()
    step()
    forgotten()
    CALLS.clear()
    with mock.patch("triton.runtime.cache.FileCacheManager.put", side_effect=OSError("Read-only file system")):
        step()


def test_an_interrupted_kernel_is_left_to_others(monkeypatch: pytest.MonkeyPatch, compiled: list[tuple[str, str]]) -> None:
    interrupts = [KeyboardInterrupt()]

    def assemble(name: str) -> None:
        if name == BOTH[0] and interrupts:
            raise interrupts.pop()

    assembled_by(monkeypatch, assemble)
    with pytest.raises(KeyboardInterrupt):
        forward()
    step()
    assert sorted(names(compiled)) == sorted(BOTH)


class Source:
    """Of a kernel that nobody reads."""

    name = "kernel"

    def make_ir(self) -> None:
        pass


def job(name: str, compile_it: Callable[[], Any]) -> compiling._Job:
    """Of a kernel that is compiled thus, after its source is read."""
    source = Source()

    def whole() -> Any:
        source.make_ir()
        return compile_it()

    made = compiling._under_way[name] = compiling._Job(name, whole, source)
    return made


def test_no_more_kernels_at_a_time_than_asked_for() -> None:
    """Beside those that somebody needs at once. Sources are read meanwhile, one at a time."""
    gate, inside, most = threading.Semaphore(0), [0], [0]

    def compile_it() -> None:
        with compiling._changed:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        gate.acquire(timeout=GUARD)
        with compiling._changed:
            inside[0] -= 1

    jobs = [job(str(number), compile_it) for number in range(6)]
    compiling._start(jobs[:5], 2)
    for each in jobs[:5]:
        each.wait_for_source()
    with compiling._changed:
        compiling._changed.wait_for(lambda: compiling._compiling == 2, GUARD)
    gate.release()  # for any one
    needed = threading.Thread(target=jobs[5].wait)
    needed.start()
    gate.release(5)
    for each in jobs:
        each.wait()
    needed.join()
    assert 2 <= most[0] <= 3 and compiling._compiling == 0 and not compiling._under_way


def test_the_largest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that wait: by the time that their sources took to read."""
    clock, gate, order = [0.0], threading.Event(), []
    monkeypatch.setattr(compiling.time, "thread_time", lambda: clock[0])

    def sized(name: str, size: float) -> compiling._Job:
        made = job(name, lambda: (order.append(name), gate.wait(GUARD)))
        made._make_ir = lambda: clock.__setitem__(0, clock[0] + size)
        return made

    jobs = [sized("first", 1.0), sized("small", 1.0), sized("large", 4.0), sized("middle", 2.0)]
    compiling._start(jobs[:1], 1)
    with compiling._changed:
        compiling._changed.wait_for(lambda: compiling._compiling == 1, GUARD)
    compiling._start(jobs[1:], 1)
    for each in jobs:
        each.wait_for_source()
    while len(compiling._waiting) < 3:
        threading.Event().wait(0.001)
    gate.set()
    settled()
    assert order == ["first", "large", "middle", "small"] and not compiling._waiting


def test_threads_hold_up_the_end_of_the_process_for_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no daemons, whoever starts them, and begin nothing when the main thread has ended."""
    begun, gate, main = [], threading.Event(), mock.Mock()
    main.is_alive.return_value = False

    def first() -> None:
        begun.append("first")
        gate.wait(GUARD)

    jobs = [job("first", first), job("second", lambda: begun.append("second"))]
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", started_in(started))
    daemon = threading.Thread(target=compiling._start, args=(jobs[:1], 1), daemon=True)
    daemon.start()
    daemon.join()
    compiling._start(jobs[1:], 1)
    assert [each.daemon for each in started] == [True, False, False]
    for each in jobs:
        each.wait_for_source()
    with mock.patch.object(threading, "main_thread", lambda: main):
        gate.set()
        for each in started:
            each.join()
        assert begun == ["first"]
        jobs[1].wait()  # of another thread, which needs it
    assert begun == ["first", "second"]


def started_in(started: list[threading.Thread]) -> Callable[[threading.Thread], None]:
    start = threading.Thread.start

    def noted(self: threading.Thread) -> None:
        started.append(self)
        start(self)

    return noted


def test_without_another_thread_who_waits_does_it_all(compiled: list[tuple[str, str]]) -> None:
    with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
        forward()
        assert names(compiled) == BOTH[:1] and not compiling._compiling
    step()
    assert names(compiled) == BOTH


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_waits_for_no_thread_of_the_other() -> None:
    begun, gate, ran = threading.Event(), threading.Event(), []

    def compile_it() -> None:
        ran.append(os.getpid())
        begun.set()
        gate.wait(GUARD)

    own = job("under way", compile_it)
    compiling._start([own], 2)
    assert begun.wait(GUARD)
    child = os.fork()
    if child == 0:  # where only the forking thread is
        gate.set()
        with compiling._parsing:
            fresh = compiling._compiling == 0
        own.wait()
        os._exit(0 if fresh and ran[-1] == os.getpid() else 1)
    gate.set()
    own.wait()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ran == [os.getpid()] and not compiling._under_way


def test_a_process_may_end_while_a_kernel_is_compiled() -> None:
    """Without a word, and with its own status."""
    program = (
        "import sys, threading\n"
        "from types import SimpleNamespace\n"
        "from triton._C.libtriton import ir\n"
        "from triflash.launch import compiling\n"
        "begun = threading.Event()\n"
        "source = SimpleNamespace(make_ir=lambda: None)\n"
        "def first():\n"
        "    source.make_ir()\n"
        "    begun.set()\n"
        "    threading.main_thread().join()\n"
        "    ir.context()\n"
        "    print('first')\n"
        "def second():\n"
        "    other.make_ir()\n"
        "    print('second')\n"
        "other = SimpleNamespace(make_ir=lambda: None)\n"
        "compiling._start([compiling._Job('1', first, source)], 1)\n"
        "begun.wait()\n"
        "compiling._start([compiling._Job('2', second, other)], 1)\n"
        "sys.exit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "first\n", "")
