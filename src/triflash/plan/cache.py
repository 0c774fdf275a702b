"""Which backend runs a call on a KV cache, and its steps. Called by ``bound/``. Pure, cached, no tensors."""

from __future__ import annotations

import functools

from ..errors import unsupported
from ..spec_cache import CacheSpec
from . import override
from .configs import MAX_HEAD_DIM
from .device import DeviceFacts, triton_problem
from .kernels import append, few
from .select import check_backend
from .steps import IN_PYTORCH, Plan, Step
from .triton import why_not_dtypes

__all__ = ["plan_cache", "split_words", "why_not_cache"]

_E4M3 = 89  # the first sm whose Triton has it


def why_not_cache(name: str, spec: CacheSpec, device: DeviceFacts) -> tuple[str, str] | None:
    """None if the backend can run such a call on the device, else (what it cannot, what does work)."""
    if name in IN_PYTORCH:
        return None
    if name == "hopper":
        return "KV caches", "use backend('triton'), which splits keys on every GPU"
    if problem := triton_problem():
        return f"anything: {problem}", "install triton (Linux) or use backend('tiled')"
    if reason := why_not_dtypes(device, spec.dtype, spec.bias):
        return reason
    if spec.cache_dtype == "fp8" and device.arch.startswith("sm") and int(device.arch[2:]) < _E4M3:
        return f"float8_e4m3fn caches on {device.arch}, for which Triton has no e4m3", "keep 16-bit caches there, or use backend('tiled')"
    if not spec.contiguous_rows:
        return "caches whose last dim is not contiguous", "lay them out with a contiguous last dim, or use backend('tiled')"
    if max(spec.head_dim, spec.value_dim) > MAX_HEAD_DIM:
        return f"head dim {max(spec.head_dim, spec.value_dim)}", f"its limit is {MAX_HEAD_DIM}; backend('tiled') takes any"
    return None


def plan_cache(spec: CacheSpec, device: DeviceFacts, requested: str = "auto") -> Plan:
    """The plan of a call. Raises :class:`UnsupportedError` where a backend asked for by name cannot do it."""
    check_backend("backend", requested)
    return _plan(spec, device, requested, override.active())


@functools.lru_cache(maxsize=1024)
def _plan(spec: CacheSpec, device: DeviceFacts, requested: str, by_hand: tuple[tuple[str, override.Config], ...]) -> Plan:
    name = requested
    if requested == "auto":
        name = "tiled" if device.arch in ("cpu", "interpreter") or why_not_cache("triton", spec, device) else "triton"
    elif reason := why_not_cache(requested, spec, device):
        raise unsupported(reason[0], requested, reason[1])
    if name == "triton":
        appends = () if spec.new is None else (append.step(spec),)
        return Plan(name, (*appends, *few.cache_steps(spec, device, dict(by_hand))))
    return Plan(name, (*(() if spec.new is None else (Step("append"),)), Step("forward")))


def split_words(plan: Plan, spec: CacheSpec, device: DeviceFacts) -> str:
    """Into how many parts keys are split, and why."""
    if (forward := plan.step("few_forward")) is not None:
        return few.why_cache(spec, forward, device)
    asked = f"num_splits={spec.num_splits}" if spec.num_splits is not None else f"split_size={spec.split_size}"
    asked = "" if spec.num_splits is None and spec.split_size is None else f"; {asked} changes nothing here"
    return f"keys are not split: backend {plan.backend} walks the keys of all requests together{asked}"
