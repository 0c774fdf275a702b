"""Peak memory of a call beyond what was there before and what it returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["peak_bytes"]


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that PyTorch had allocated at the peak of one call, above those before it and above the tensors that it returns.

    Counted by PyTorch's allocators, on a GPU to blocks of 512 bytes. What libraries allocate by themselves is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        peak, result = _peak_on_cpu(call)
    return max(0, peak - _own_bytes(result))


def _own_bytes(result: Any) -> int:
    tensors: Iterable[Any] = result if isinstance(result, (tuple, list)) else (result,)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(storages.values())


def _peak_on_cpu(call: Callable[[], Any]) -> tuple[int, Any]:
    """The allocator reports each allocation and release to the profiler: their running sum."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
        result = call()
    events = sorted((e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]")
    now = peak = 0
    for _, size in events:
        now += size
        peak = max(peak, now)
    return peak, result
