"""Every address that a kernel touches in Triton's interpreter, looked at. Called by the tests of single kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor


@contextmanager
def every_address() -> Iterator[list[int]]:
    """Every address that a kernel reads or writes in Triton's interpreter lies in a tensor of its launch; gives how many were looked at."""
    from triton.runtime import interpreter

    from triflash.launch.calls import Call

    inside: list[tuple[int, int]] = []
    count, start, real = [0], Call.start, interpreter._interpreter

    def extents(x: Any) -> Iterator[tuple[int, int]]:
        if isinstance(x, Tensor) and x.numel():
            last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            yield x.data_ptr(), x.data_ptr() + last * x.element_size()
        elif isinstance(x, tuple):
            for each in x:
                yield from extents(each)

    def starting(call: Call) -> None:
        inside[:] = extents(call.args)
        start(call)

    def check(addresses: Any, mask: Any) -> None:
        used = addresses[mask.astype(bool)] if mask is not None else addresses.reshape(-1)
        good = np.zeros(used.shape, dtype=bool)
        for begin, last in inside:
            good |= (used >= begin) & (used <= last)
        assert good.all(), f"{int((~good).sum())} of {used.size} addresses lie outside"
        count[0] += used.size

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def load(self, pointers: Any, mask: Any, *rest: Any) -> Any:
            check(pointers, mask)
            return real.load(pointers, mask, *rest)

        def store(self, pointers: Any, values: Any, mask: Any) -> Any:
            check(pointers, mask)
            return real.store(pointers, values, mask)

    with mock.patch.object(Call, "start", starting), mock.patch.object(interpreter, "_interpreter", Watched()):
        yield count
