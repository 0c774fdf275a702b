"""Worker processes that compile kernels, for ``triflash tune`` and ``triflash compile``. Needs no GPU."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Generic, TypeVar

__all__ = ["Compiler", "in_a_line"]

J = TypeVar("J")  # a job: hashable, and made from plain values, so that it reaches another process
B = TypeVar("B")  # what comes of it


class Compiler(Generic[J, B]):
    """Worker processes, each of which builds a job at a time. To be used in a ``with`` block.

    build: a function of a module, which raises nothing. failed: what comes of a job whose compiler took its process with it, from the
    reason.
    """

    def __init__(self, workers: int, build: Callable[[J], B], failed: Callable[[str], B]) -> None:
        self.workers, self._build, self._failed = workers, build, failed
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Compiler[J, B]:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            self.pool = None

    def build_all(self, jobs: Iterable[J], done: Callable[[], None] = lambda: None) -> dict[J, B]:
        """Compile all jobs; ``done`` is called after each.

        A compiler that crashes takes its process with it, and all that was under way: that is then compiled again, one process each.
        """
        found: dict[J, B] = {}
        left = list(dict.fromkeys(jobs))
        if not left:
            return found
        self.pool = self.pool or _pool(self.workers)
        try:
            futures = {self.pool.submit(self._build, job): job for job in left}
            for future in as_completed(futures):
                found[futures[future]] = future.result()
                done()
        except BrokenProcessPool:
            self.pool.shutdown()
            self.pool = None
            for job in left:
                if job not in found:
                    found[job] = self._build_alone(job)
                    done()
        return found

    def _build_alone(self, job: J) -> B:
        try:
            with _pool(1) as pool:
                return pool.submit(self._build, job).result()
        except BrokenProcessPool:
            return self._failed("the compiler crashed")


def in_a_line(error: Exception) -> str:
    """Why a compiler failed: its class and the beginning of its words."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_leave_interrupts_to_the_parent)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
