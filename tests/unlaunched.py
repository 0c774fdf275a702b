"""Calls on tensors of the CPU as a GPU that is not here would get them: everything is allocated and copied, and no kernel starts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch import Tensor

from triflash import launch
from triflash.bound import signature
from triflash.explanation import Explanation, Pass
from triflash.launch.calls import Call
from triflash.launch.room import Real
from triflash.plan.device import DeviceFacts


@dataclass
class Seen:
    """What calls did. results, allocated: the bytes of each tensor that a pass hands out, and of each that it keeps to itself."""

    calls: list[Call] = field(default_factory=list)
    results: list[int] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)


class OnGPU(Real):
    """Takes tensors for those of a GPU, whose layouts matter."""

    def __init__(self, like: Tensor) -> None:
        super().__init__(like)
        self.gpu = True


@contextlib.contextmanager
def watching(allocated: list[int], name: str) -> Iterator[None]:
    """Within it, the bytes of what the method ``name`` of tensors makes are counted."""
    function = getattr(Tensor, name)

    def recorded(self: Tensor, *size: Any, **options: Any) -> Tensor:
        made = function(self, *size, **options)
        if made.device.type != "meta":
            allocated.append(made.untyped_storage().nbytes())
        return made

    with mock.patch.object(Tensor, name, recorded):
        yield


@contextlib.contextmanager
def unlaunched(facts: DeviceFacts) -> Iterator[Seen]:
    """The package believes that all tensors are on such a device, and launches nothing."""
    seen = Seen()
    with (
        mock.patch.object(launch, "Real", OnGPU),
        mock.patch.object(launch, "start", lambda _, calls: seen.calls.extend(calls)),
        mock.patch.object(signature, "facts_of", lambda _: facts),
        mock.patch.dict(os.environ, TRIFLASH_BIND="0"),
        watching(seen.results, "new_empty_strided"),
        watching(seen.allocated, "new_empty"),
    ):
        yield seen


def check_bytes(explained: Explanation, seen: Seen) -> None:
    """An explanation names what was allocated, to the byte, and the launches that were made."""
    passes: Sequence[Pass] = [each for each in (explained.forward, explained.backward) if each is not None]
    assert seen.results == [size for each in passes for _, size in each.results]
    copied = [copy.nbytes for copy in explained.copies for _ in copy.passes]
    assert sorted(seen.allocated) == sorted([*copied, *scratch(explained)])
    assert [call.programs for call in seen.calls] == [step.step.programs for each in passes for step in each.steps]


def scratch(explained: Explanation) -> list[int]:
    """The bytes of each part of what passes take for themselves, but for copies and what PyTorch's own arithmetic takes."""
    results = ("lse", "rest of lse") if any(name.startswith("lse") for name, _ in explained.forward.results) else ()
    return [size for what, size in explained.memory if not what.startswith((*results, "probabilities")) or "TMA" in what]
