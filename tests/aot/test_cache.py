"""Calls on a KV cache, compiled for GPUs that are not here: the launches that a call would make, as ``explain`` compiles them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from machine_code import MEASURED

import triflash
from triflash import UnsupportedError, attention_with_kvcache
from triflash.plan.device import KNOWN_DEVICES
from triflash.spec_cache import FP8

B, H, HK, D = 8, 32, 8, 128


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def given(paged: bool = False, packed: bool = False, fp8: bool = False, bias: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """q and both caches, and the rest of a call of 8 requests on up to 4096 keys."""
    cache = empty(600, 64, HK, D) if paged else empty(B, 4096, HK, D)
    cache = empty(*cache.shape, dtype=FP8) if fp8 else cache
    new = empty(20, HK, D) if packed else empty(B, 1, HK, D)
    options: dict[str, Any] = {
        "cache_lengths": empty(B, dtype=torch.int32), "k_new": new, "v_new": new, "causal": True, "return_lse": True,
    }  # fmt: skip
    if paged:
        options["page_table"] = empty(B, 64, dtype=torch.int32)
    if packed:
        options |= {name: empty(B + 1, dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_new")} | {"max_seqlen_q": 6}
    if fp8:
        options |= {"k_scale": 0.5, "v_scale": empty(HK, dtype=torch.float32)}
    if bias:
        options["bias"] = empty(B, H, 1, 4096)
    return (empty(20, H, D) if packed else empty(B, 1, H, D), cache, cache), options


CASES: dict[str, dict[str, bool]] = {
    "plain": {},
    "pages, packed": {"paged": True, "packed": True},
    "bias": {"bias": True},
    "fp8, pages": {"fp8": True, "paged": True},
}
SPILLS = {"pages, packed": 64, "fp8, pages": 8}  # words of few_forward on NVIDIA, as found: 54 and 4


@pytest.mark.parametrize("arch", ["sm90", "sm80", "gfx942"])
@pytest.mark.parametrize("name", CASES)
def test_a_call_compiles(name: str, arch: str) -> None:
    tensors, options = given(**CASES[name])
    if CASES[name].get("fp8") and arch != "sm90":
        if arch == "sm80":  # Triton has no e4m3 for it
            with pytest.raises(UnsupportedError, match="float8_e4m3fn caches on sm80.*'triton'; keep 16-bit caches"):
                triflash.explain(*tensors, **options, of=attention_with_kvcache, device=arch, backend="triton")
            told = triflash.explain(*tensors, **options, of=attention_with_kvcache, device=arch)
            assert told.backend == "tiled"
        return
    told = triflash.explain(*tensors, **options, of=attention_with_kvcache, device=arch, compile=True)
    kernels = [step.step.kernel for step in told.forward.steps]
    assert told.backend == "triton" and kernels[:2] == ["append", "few_forward"], kernels
    for step in told.forward.steps:
        assert step.compiled is not None
        if MEASURED:
            most = SPILLS.get(name, 0) if step.step.kernel == "few_forward" else 0
            assert step.compiled.spills <= most, (step.step.kernel, step.compiled)
        assert step.compiled.shared_memory <= KNOWN_DEVICES[arch].shared_memory
    assert "keys are split into" in str(told) or "not split" in str(told)
