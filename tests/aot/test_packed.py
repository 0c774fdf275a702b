"""Kernels of packed sequences and of two biases, compiled for GPUs that are not here: they fit, and spill little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from triflash.arguments import ATTENTION, Given, Options
from triflash.bound.call import BoundCall
from triflash.door import bind
from triflash.launch.ahead import compile_for, resources
from triflash.launch.room import meta
from triflash.ops_varlen import VarlenOptions, VarlenTensors, bind_varlen
from triflash.plan.device import KNOWN_DEVICES

H, D, T, B = 4, 64, 4096, 16
MOST_SPILLS = 32  # words a thread; 26 is the most seen (dkdv with a bias, sm80)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return meta(shape, strides, dtype)


def packed(arch: str, bias: tuple[int, ...] | None = None, layout: str = "padded", Hk: int = H, **given: Any) -> BoundCall:
    cu = empty(B + 1, dtype=torch.int32)
    tensors = VarlenTensors(
        empty(T, H, D), empty(T, Hk, D), empty(T, Hk, D), None if bias is None else empty(*bias), given.get("mask"), None, given.get("sink"),
        given.get("seed"), cu, cu, None, None, None,
    )  # fmt: skip
    dropout = 0.1 if given.get("seed") is not None else 0.0
    options = VarlenOptions(None, 0, True, 0.125, "ieee", layout, "padded", 0.0, dropout, False, None, None, "triton")
    return bind_varlen(tensors, options, KNOWN_DEVICES[arch], torch.device("cuda"))


def two_biases(arch: str) -> BoundCall:
    q = empty(1, 64, 384, H, 32)
    given = Given(q, q, q, empty(1, 64, 1, 1, 384), second_bias=empty(1, 1, H, 384, 384))
    return bind(ATTENTION, given, Options(backend="triton"), KNOWN_DEVICES[arch])


CASES: dict[str, Callable[[str], BoundCall]] = {
    "packed": packed,
    "packed, a shared bias": lambda arch: packed(arch, (1, H, 512, 512)),
    "packed, a bias by rows": lambda arch: packed(arch, (H, T, 512), "rows"),
    "packed, a bias of keys, everything": lambda arch: packed(
        arch, (1, T), "keys", 2, mask=empty(B, 1, 1, 600, dtype=torch.bool), sink=empty(H), seed=empty(2, dtype=torch.int64)
    ),
    "two biases": two_biases,
}


@pytest.mark.parametrize("arch, name", [
    *(("sm90", name) for name in CASES), ("sm80", "packed, a shared bias"), ("sm80", "two biases"), ("gfx942", "packed, a shared bias"),
])  # fmt: skip
def test_compiles_within_limits(arch: str, name: str) -> None:
    call = CASES[name](arch)
    wanted = call.needs((True, True, True, call.spec.bias is not None, call.spec.sink, call.spec.second is not None))
    limit = KNOWN_DEVICES[arch].shared_memory
    seen = set()
    for bound in (call.forward, call.describe_backward(wanted)):
        assert bound.calls
        for each in bound.calls:
            key = (each.kernel.__name__, str(each.config))
            if key in seen:
                continue
            seen.add(key)
            found = resources(compile_for(each, arch))
            assert found.shared_memory <= limit, key
            assert found.spills <= MOST_SPILLS, (key, found)
    assert {"forward", "dkdv", "dq"} <= {kernel for kernel, _ in seen}
