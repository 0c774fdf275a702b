"""Kernels of packed sequences and of two biases, compiled for GPUs that are not here: they fit, and spill little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from machine_code import MEASURED, MOST_SPILLS, ambiguous_descriptors, compiled_with_log, disassembled, serialised, unfenced_releases

from triflash.arguments import ATTENTION, Given, Options
from triflash.bound.call import BoundCall
from triflash.door import bind
from triflash.launch.ahead import compile_for, resources
from triflash.launch.room import meta
from triflash.ops_varlen import VarlenOptions, VarlenTensors, bind_varlen
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.kernels.shared import HopperConfig

H, D, T, B = 4, 64, 4096, 16


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return meta(shape, strides, dtype)


def packed(
    arch: str, bias: tuple[int, ...] | None = None, layout: str = "padded", Hk: int = H, D: int = D, T: int = T, backend: str = "triton",
    left: int | None = None, right: int | None = 0, softcap: float = 0.0, deterministic: bool = False, **given: Any,
) -> BoundCall:  # fmt: skip
    cu = empty(B + 1, dtype=torch.int32)
    tensors = VarlenTensors(
        empty(T, H, D), empty(T, Hk, D), empty(T, Hk, D), None if bias is None else empty(*bias), given.get("mask"), given.get("slopes"),
        given.get("sink"), given.get("seed"), cu, cu, None, None, None,
    )  # fmt: skip
    dropout = 0.1 if given.get("seed") is not None else 0.0
    options = VarlenOptions(left, right, True, 0.125, "ieee", layout, "padded", softcap, dropout, deterministic, None, None, backend)
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


LONG = 32768  # rows in all, 2,048 of a sequence
HOPPER: dict[str, tuple[dict[str, Any], int]] = {  # problems, and words that a thread may spill: no more than of a dense batch
    "d64 causal": ({}, 12),
    "d128 full, fixed order": ({"D": 128, "right": None, "deterministic": True}, 72),
    "d128 causal": ({"D": 128, "Hk": 2}, 72),
    "d256 window": ({"D": 256, "left": 700}, 28),
    "d64 soft cap, slopes": ({"softcap": 30.0, "slopes": empty(1, H, dtype=torch.float32)}, 72),
    "d64 a shared bias, a mask": ({"bias": (1, H, 2048, 2048), "mask": empty(B, 1, 2048, 2048, dtype=torch.bool)}, 64),
    "d64 causal, a shared bias's gradient": ({"bias": (1, H, 2048, 2048)}, 64),
    "d128 window, a shared bias's gradient": ({"D": 128, "left": 700, "bias": (1, H, 2048, 2048)}, 80),
    "d64 a bias of keys": ({"bias": (1, LONG), "layout": "keys"}, 64),
    "d128 dropout, a sink": ({"D": 128, "seed": empty(2, dtype=torch.int64), "sink": empty(H)}, 96),
}


@pytest.mark.parametrize("name", HOPPER)
def test_hopper_kernels(name: str) -> None:
    """As those of dense batches: no product waits for another, no barrier is told too early, and no more is spilled."""
    given, spills = HOPPER[name]
    call = packed("sm90", **{"T": LONG, "backend": "hopper"} | given)
    wanted = call.needs((True, True, True, "gradient" in name, call.spec.sink, False))
    seen = {}
    for bound in (call.forward, call.describe_backward(wanted)):
        for each in bound.calls or ():
            key = (each.kernel.__name__, str(each.config))
            if key in seen:
                continue
            compiled, log = compiled_with_log(each)
            seen[key] = found = resources(compiled)
            assert found.shared_memory <= KNOWN_DEVICES["sm90"].shared_memory, key
            if not isinstance(each.config, HopperConfig):
                assert found.spills <= 2 or not MEASURED, (key, found)
                continue
            if MEASURED:  # what is declared was read off this version's compiler
                assert found.spills <= spills, (key, found)
            assert found.shared_memory <= each.config.shared_memory(call.spec, ("dq",) if "postprocess" in str(bound.plan) else ()), key
            code = disassembled(compiled)
            assert not serialised(log) and not ambiguous_descriptors(code), key
            if each.kernel.__name__ == "dbias":  # reads a tile of the bias ahead of other buffers' releases; its own comes behind a fence
                continue
            if each.kernel.__name__ != "forward":  # statistics are read by plain loads
                assert unfenced_releases(code) == 0, key
    kernels = {kernel for kernel, _ in seen}
    assert {"forward", "preprocess", "prepared"} <= kernels and ("dbias" in kernels) == ("gradient" in name)
    assert kernels & {"dkdv", "dkdv_d256"} and kernels & {"dq", "postprocess"}
