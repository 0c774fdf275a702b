"""Which way launches go, what they hand over, and settings of others around a call: shared by the tests of this folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import gpu
import numpy as np
import torch
import triton
from gpu import Argument, Launch
from problems import Step
from torch import Tensor

import triflash
from triflash import launch
from triflash.bound.call import BoundCall
from triflash.launch import native

# Of Triton 3.6 kernels are launched by the driver's own function, with a kernel's parameters as they are; of later ones by Triton's.
OURS = triton.__version__.startswith("3.6")
# What poisoned memory begins with, by the dtype that it was allocated in.
FILLED = {bytes.fromhex(text) for text in ("ffffffff", "c07fc07f", "007e007e", "0000c07f", "ffffff7f")}


@contextlib.contextmanager
def bound_launches() -> Iterator[list[native.Launch]]:
    """Those that go the bound way within the block."""
    seen: list[native.Launch] = []
    called = native.Launches.start

    def counted(self: native.Launches, *arguments: object) -> None:
        seen.extend(self.launches)
        called(self, *arguments)  # type: ignore[arg-type]

    with mock.patch.object(native.Launches, "start", counted):
        yield seen


@contextlib.contextmanager
def binding() -> Iterator[list[BoundCall]]:
    """The calls that are bound within the block."""
    seen: list[BoundCall] = []
    init = BoundCall.__init__

    def counted(self: BoundCall, *arguments: object) -> None:
        seen.append(self)
        init(self, *arguments)  # type: ignore[arg-type]

    with mock.patch.object(BoundCall, "__init__", counted):
        yield seen


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    """Calls are bound, as far as our own code goes, and nothing is compiled or launched."""
    with mock.patch.dict(os.environ, TRIFLASH_BIND="0"), mock.patch.object(launch, "start", lambda *_: None):
        yield


class Names:
    """Addresses of a pass in words that hold in another run: given tensors and results by name, all other memory by order of appearance."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._ranges = [(name, x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for name, x in tensors.items()]
        self._own: dict[int, str] = {}

    def of(self, address: int) -> str:
        for name, begin, size in self._ranges:
            if begin <= address < begin + size:
                return f"{name} + {address - begin}"
        return self._own.setdefault(address, f"own {len(self._own)}") if address else "null"


def run(step: Step, bound: bool) -> tuple[list[list[Launch]], dict[str, Tensor], list[Names]]:
    """The launches of a step's forward and backward pass, its results, and what addresses are called in either."""
    counted: list[int] = []
    forward = step.forward

    def counting() -> object:
        out = forward()
        counted.append(len(seen))
        return out

    given = {**step.given, **step.cotangents}
    with (
        mock.patch.object(step, "forward", counting),
        mock.patch.dict(os.environ, {} if bound else {"TRIFLASH_BIND": "0"}),
        bound_launches() as calls,
        gpu.watching(given.values()) as seen,
    ):
        results = step.run()
    assert len(calls) == (len(seen) if bound else 0), "which way they went"
    before = {name: x for name, x in results.items() if name in ("out", "lse")}  # memory of gradients may have been another's then
    return [seen[: counted[0]], seen[counted[0] :]], results, [Names(given | before), Names(given | results)]


def check_both_ways(step: Step, backend: str) -> list[str]:
    """A step hands the same to the driver, and gives the same results, whichever way its launches go; returns what it runs."""
    with triflash.record_launches() as first:
        step.run()
    with triflash.record_launches() as recorded:
        bound, results, names = run(step, True)
    with triflash.record_launches() as recorded_unbound:
        unbound, wanted, other_names = run(step, False)
    assert first == recorded == recorded_unbound and sum(map(len, bound)) == len(recorded)
    assert {line.split(":")[0] for line in recorded} == {backend}
    for own, others, *naming in zip(bound, unbound, names, other_names, strict=True):
        for one, other in zip(own, others, strict=True):
            assert (one.kernel, one.function, one.shape, one.stream) == (other.kernel, other.function, other.shape, other.stream)
            for number, pair in enumerate(zip(one.arguments, other.arguments, strict=True)):
                try:
                    _check_argument(*pair, naming)
                except AssertionError as error:
                    raise AssertionError(f"{one.kernel}, argument {number}: {error}, {pair}") from error
    assert results.keys() == wanted.keys()
    for name, x in results.items():
        assert x.stride() == wanted[name].stride(), name
        torch.testing.assert_close(x, wanted[name], rtol=0, atol=0, equal_nan=True, msg=name)
    return recorded


def _check_argument(one: Argument, other: Argument, names: list[Names]) -> None:
    assert one.kind == other.kind and one.recipe == other.recipe
    if one.kind == "number":
        assert one.value == other.value
        return
    assert names[0].of(one.value) == names[1].of(other.value), (names[0].of(one.value), names[1].of(other.value))
    assert one.value % 16 == other.value % 16, "alignment"
    if one.kind == "map":
        assert np.array_equal(one.content, other.content), "what lies there"
    else:
        assert one.content == other.content or FILLED & {one.content, other.content}, "what lies there"


@contextlib.contextmanager
def precision() -> Iterator[None]:
    before, own = torch.get_float32_matmul_precision(), getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        if own is not None:  # "none" is not what "highest" is: nobody set it
            torch.backends.cuda.matmul.fp32_precision = own


@contextlib.contextmanager
def determinism() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def environment(**values: str) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.dict(os.environ, values)
