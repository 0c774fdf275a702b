"""Kernels for short rows, compiled for GPUs that are not here: they fit, spill little, and multiply by WGMMA on Hopper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from machine_code import MEASURED, MOST_SPILLS

from triflash.arguments import ATTENTION, Given, Options
from triflash.door import bind
from triflash.launch.ahead import compile_for, resources
from triflash.launch.calls import Call
from triflash.launch.room import meta
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.kernels.short import ShortConfig
from triflash.plan.override import override_configs
from triflash.spec import Needs


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return meta(shape, strides, dtype)


def calls(arch: str, M: int, N: int, D: int, bias: bool = False, **options: Any) -> dict[str, Call]:
    q, k = empty(41, M, 16, D), empty(41, N, 16, D)
    given = Given(q, k, k, empty(1, 16, M, N) if bias else None)
    call = bind(ATTENTION, given, Options(**options), KNOWN_DEVICES[arch])
    passes = (call.forward, call.describe_backward(Needs(True, True, True, bias)))
    return {each.kernel.__name__: each for bound in passes for each in bound.calls or ()}


SHAPES: dict[str, dict[str, Any]] = {
    "windows": dict(M=49, N=49, D=32, bias=True), "patches": dict(M=64, N=64, D=64), "wide heads": dict(M=64, N=64, D=128),
    "captions": dict(M=77, N=77, D=64, causal=True), "captions, many queries": dict(M=2048, N=77, D=64),
    "64, bias": dict(M=64, N=64, D=128, bias=True),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_taken_fits(name: str) -> None:
    """Of what the plan takes by itself nothing spills much, and as many programs share an SM as were measured."""
    found = calls("sm90", **SHAPES[name])
    assert {"short_forward", "short_backward"} <= set(found)
    for kernel in ("short_forward", "short_backward"):
        config = found[kernel].config
        assert isinstance(config, ShortConfig)
        compiled = compile_for(found[kernel], "sm90")
        used = resources(compiled)
        assert used.spills <= MOST_SPILLS, (kernel, used)
        threads = 32 * config.num_warps * max(1, config.ctas_per_sm)
        assert threads * used.registers <= 65_536 or not MEASURED, (kernel, used)
        assert max(1, config.ctas_per_sm) * used.shared_memory <= 232_448, (kernel, used)
        assert "wgmma.mma_async" in compiled.asm["ptx"]


def test_rounds_load_ahead() -> None:
    """Where a program takes several pairs, or tiles of queries, what comes next is fetched meanwhile; offsets are not kept in registers."""
    for kernel, config in (
        ("short_backward", ShortConfig(64, 64, 4, 2, rounds=4)),
        ("short_forward", ShortConfig(64, 64, 4, 2, rounds=4)),
    ):
        with override_configs(**{kernel: config}):
            compiled = compile_for(calls("sm90", 256 if kernel == "short_forward" else 64, 64, 64, backend="triton")[kernel], "sm90")
        assert "cp.async.cg" in compiled.asm["ptx"]
        used = resources(compiled)
        assert (used.spills == 0 and used.registers <= 168) or not MEASURED, (kernel, used)


@pytest.mark.parametrize("arch", ["sm80", "sm100", "gfx942"])
def test_others_compile(arch: str) -> None:
    """Where nobody measured them they are there by hand."""
    with override_configs(short_forward=ShortConfig(32, 64, 4, 1), short_backward=ShortConfig(32, 64, 4, 1)):
        found = calls(arch, M=49, N=49, D=64, bias=True, backend="triton")
    for kernel in ("short_forward", "short_backward"):
        assert resources(compile_for(found[kernel], arch)).shared_memory <= KNOWN_DEVICES[arch].shared_memory
