"""Kernels for few queries, compiled for GPUs that are not here: they fit, and spill little; and they load ahead."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from machine_code import MOST_SPILLS

from triflash.arguments import ATTENTION, Given, Options
from triflash.bound.passes import BoundPass
from triflash.door import bind
from triflash.launch.ahead import compile_for, resources
from triflash.launch.few import cache_calls
from triflash.launch.room import Described, meta
from triflash.plan.cache import plan_cache
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.kernels import few
from triflash.plan.kernels.few import FewConfig
from triflash.plan.override import override_configs
from triflash.spec import Needs
from triflash.spec_cache import CacheOperands, cache_spec_of

F8 = torch.float8_e4m3fn


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return meta(shape, strides, dtype)


def attention_passes(arch: str, M: int, H: int, Hk: int, D: int, bias: tuple[int, ...] | None = None, **options: Any) -> list[BoundPass]:
    q, k = empty(1, M, H, D), empty(1, 8192, Hk, D)
    given = Given(q, k, k, None if bias is None else empty(*bias))
    call = bind(ATTENTION, given, Options(backend="triton", **options), KNOWN_DEVICES[arch])
    return [call.forward, call.describe_backward(Needs(True, True, True, bias is not None))]


SHAPES: dict[str, tuple[Any, ...]] = {
    "one query, grouped": (1, 32, 8, 128), "d 64": (64, 8, 8, 64), "d 128": (64, 8, 8, 128), "d 256": (1, 8, 8, 256),
    "bias": (16, 32, 8, 128, (1, 32, 16, 8192)),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "gfx942"])
def test_attention_compiles_within_limits(arch: str, name: str) -> None:
    seen = set()
    for bound in attention_passes(arch, *SHAPES[name]):
        for call in bound.calls or ():
            kernel = call.kernel.__name__
            seen.add(kernel)
            if kernel in ("few_forward", "few_backward", "combine", "sum_rows") or (kernel == "dq" and arch == "sm90"):
                found = resources(compile_for(call, arch))
                assert found.shared_memory <= KNOWN_DEVICES[arch].shared_memory, (kernel, found)
                assert found.spills <= MOST_SPILLS, (kernel, found)
    assert {"few_forward", "combine", "sum_rows"} <= seen and ("few_backward" in seen) != ("dq" in seen)


@pytest.mark.parametrize("M, D", [(1, 64), (1, 128), (64, 64), (64, 128)])
def test_backward_compiles_within_limits(M: int, D: int) -> None:
    rows = max(16, M)
    with override_configs(few_backward=FewConfig(rows, 64, 4 if rows * D <= 4096 else 8, 2)):
        _, bound = attention_passes("sm90", M, 8, 8, D)
    (call,) = (each for each in bound.calls or () if each.kernel.__name__ == "few_backward")
    found = resources(compile_for(call, "sm90"))
    assert found.spills <= MOST_SPILLS and found.shared_memory <= KNOWN_DEVICES["sm90"].shared_memory, found


@pytest.mark.parametrize("M", [1, 64])
def test_backward_counts_on_as_many_programs_as_an_sm_holds(M: int) -> None:
    _, bound = attention_passes("sm90", M, 8, 8, 128)
    (call,) = (each for each in bound.calls or () if each.kernel.__name__ == "few_backward")
    found = resources(compile_for(call, "sm90"))
    config = call.config
    assert isinstance(config, FewConfig)
    by_registers, by_memory = 65_536 // (found.registers * 32 * config.num_warps), 233_472 // (found.shared_memory + 1024)
    assert 1 <= few.per_sm(few.Shape(M, 8, 8192, 128, 128, 2, False, False), config, backward=True) <= min(by_registers, by_memory)


CACHES: dict[str, dict[str, Any]] = {
    "contiguous": {}, "pages of 64": {"page": 64}, "pages of 16": {"page": 16}, "pages of 1": {"page": 1}, "fp8": {"cache": F8},
    "fp8, pages of 16": {"cache": F8, "page": 16}, "eight queries": {"M": 8, "page": 16}, "packed": {"M": 8, "packed": True},
    "bias": {"bias": (8, 32, 1, 8192)},
}  # fmt: skip


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "gfx942"])
def test_caches_compile_within_limits(arch: str, name: str) -> None:
    how = CACHES[name]
    M, page, dtype, packed = how.get("M", 1), how.get("page"), how.get("cache", torch.bfloat16), how.get("packed", False)
    if dtype == F8 and arch in ("sm80", "gfx942"):
        return
    B, N, H, Hk, D = 8, 8192, 32, 8, 128
    cache = empty(B * N // page, page, Hk, D, dtype=dtype) if page else empty(B, N, Hk, D, dtype=dtype)
    scale = empty(1, Hk, dtype=torch.float32) if dtype == F8 else None
    x = CacheOperands(
        empty(B * M, H, D) if packed else empty(B, M, H, D), cache, cache, empty(B, dtype=torch.int32),
        page_table=empty(B, N // page, dtype=torch.int32) if page else None, offsets_q=empty(B + 1, dtype=torch.int32) if packed else None,
        bias=empty(*how["bias"]) if "bias" in how else None, k_scale=scale, v_scale=scale,
    )  # fmt: skip
    spec = cache_spec_of(x, None, 0 if M > 1 else None, 0.1, "", max_queries=M if packed else None)
    room = Described(True)
    for each in x:
        room.give(each)
    out, lse = room.new("out", (*x.q.shape[:-1], D), x.q.dtype), room.new("lse", (H, B * M) if packed else (B, H, M), torch.float32)
    calls = cache_calls(room, plan_cache(spec, KNOWN_DEVICES[arch], "triton"), spec, x, out, lse)
    assert [call.kernel.__name__ for call in calls] == ["few_forward", "combine"]
    compiled, last = (compile_for(call, arch) for call in calls)
    ptx, behind = (each.asm.get("ptx", "") for each in (compiled, last))
    assert ("griddepcontrol.launch_dependents" in ptx) == ("griddepcontrol.wait" in behind) == calls[1].pdl
    assert calls[1].pdl == (arch in ("sm90", "sm100") and 2 * calls[0].programs <= KNOWN_DEVICES[arch].sms)
    if calls[1].pdl:
        assert behind.index("griddepcontrol.wait") < behind.index("ld.global")
    found = resources(compiled)
    assert found.spills <= MOST_SPILLS and found.shared_memory <= KNOWN_DEVICES[arch].shared_memory, found
    if arch == "sm90":
        assert "cp.async.cg" in ptx  # keys come ahead, also through a table
        if page or dtype == F8:
            assert found.shared_memory >= 2 * 64 * 2 * D * dtype.itemsize  # two blocks of keys and values, of 64 at least
        if dtype == F8:  # not byte by byte, nor by the unit that turns one number at a time
            assert "ldmatrix.sync.aligned.m8n8.x4.trans" in ptx and not re.search(r"ld\.shared[.\w]*\.[bu]8\b|cvt\.rn\.bf16\.f16", ptx)
