"""Partitions of a program as threads of which one runs at a time, and what they wait at: part of the stand-in of ``gluon_twin.py``."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import triflash

KERNELS = Path(triflash.__file__).parent / "kernels" / "hopper"
here = threading.local()  # of a partition: its schedule, and what is under way; the program's index


class Hang(Exception):
    """Every partition waits, and none of them can arrive."""


class Stopped(BaseException):
    """Ends a partition because another one has failed."""


class Schedule:
    """Lets one partition run at a time. Who goes on is drawn at every ``step``, and so is when loads land; one of four draws, at most, favours
    everybody but one partition, whose loads are late as well.
    """

    def __init__(self, partitions: int) -> None:
        self.gates = [threading.Semaphore(0) for _ in range(partitions)]
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
            self.gates[chosen].release()
            self.gates[me].acquire()
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
                self.gates[self.chosen()].release()
            except BaseException as found:  # noqa: BLE001 - the kernel's failure, raised again by ``run``
                failure = found
        if self.failure is None and failure is not None:
            self.failure = failure
            for number in self.until:
                self.gates[number].release()

    def run(self, partitions: Sequence[Callable[[], None]]) -> None:
        """Carry all of them out; raises what the first that fails raises."""

        @torch.no_grad()
        def carry_out(me: int) -> None:
            self.gates[me].acquire()
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
        self.gates[self.chosen()].release()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        with torch.no_grad():
            while self.loads:
                self.land(0)


def step(until: Callable[[], bool] | None = None) -> None:
    """Whoever may go on, does."""
    if here.schedule is not None:
        here.schedule.step(here.number, until)
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
        assert not here.unfenced, "others would be told before what was stored can be seen by TMA and MMAs"
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


class NamedBarriers:
    """The numbered barriers of a program, at which whole partitions arrive or wait."""

    def __init__(self) -> None:
        self.arrived, self.phase = [0] * 16, [0] * 16

    def reach(self, number: int, threads: int, waits: bool) -> None:
        assert 5 <= number < 16, "Triton uses the others"
        assert not here.unfenced, "others would be told before what was stored can be seen by TMA and MMAs"
        step()
        phase = self.phase[number]
        self.arrived[number] += here.threads
        assert self.arrived[number] <= threads, "more arrivals than a phase expects"
        if self.arrived[number] == threads:
            self.arrived[number], self.phase[number] = 0, phase + 1
        elif waits:
            step(lambda: self.phase[number] != phase)
