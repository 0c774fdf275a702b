"""Spec and device facts in, plan out: which backend runs; its module says which kernels, and their rooms how. Called by ``bound/``.

Pure, cached, no tensors.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import UnsupportedError, bad_type, bad_value, unsupported
from ..spec import AttentionSpec, Needs
from . import hopper, triton
from .choices import NO_CHOICES, Choices, current_choices
from .device import DeviceFacts, triton_problem
from .steps import IN_PYTORCH, Plan, Step

__all__ = [
    "BACKENDS",
    "NO_CHOICES",
    "Choices",
    "Plan",
    "Step",
    "backend",
    "current_choices",
    "plan_backward",
    "plan_forward",
    "requested_backend",
    "requested_backend_soon",
    "why_not",
]

BACKENDS = ("auto", "tiled", "triton", "hopper", "oracle")
_ENVIRONMENT = "TRIFLASH_BACKEND"
_ENVIRONMENT_BYTES = _ENVIRONMENT.encode()
_lookup = os.environ._data.get if os.name == "posix" and hasattr(os.environ, "_data") else None


class _Requested(threading.local):
    """The innermost ``with backend(...)`` of this thread. A thread-local, not a context variable, because torch.compile can guard it.

    Set in ``__init__``, which runs once a thread: torch.compile would read a class attribute instead of the thread's own value.
    """

    def __init__(self) -> None:
        self.name: str | None = None


_requested = _Requested()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every triflash call of this thread within the block on the named backend.

    Args:
        name: ``"auto"`` (the default: Triton kernels on a GPU, ``tiled`` on a CPU), ``"tiled"`` (PyTorch, any device, also float64),
            ``"triton"`` (portable Triton kernels; on CPU tensors only with ``TRITON_INTERPRET=1``), ``"hopper"`` (16-bit
            inputs on an NVIDIA H100, H200 or H20), or ``"oracle"`` (dense float64 reference, for debugging).

    A named backend never falls back: what it cannot do raises ``triflash.UnsupportedError``. The choice is made in the forward
    pass; the backward pass of that call uses the same one, wherever it runs. The environment variable ``TRIFLASH_BACKEND`` sets the
    choice for calls outside any block.

    Raises:
        ValueError, TypeError: ``name`` is not one of the above.
    """
    check_backend("backend", name)
    before = _requested.name
    _requested.name = name
    try:
        yield
    finally:
        _requested.name = before


def check_backend(argument: str, name: object) -> None:
    """Raise unless ``name`` is a backend's name."""
    if not isinstance(name, str):
        raise bad_type(argument, f"a string, one of {', '.join(BACKENDS)}", type(name).__name__)
    if name not in BACKENDS:
        raise bad_value(argument, f"one of {', '.join(BACKENDS)}", repr(name))


def requested_backend() -> str:
    """What the caller asked for: the innermost ``with backend(...)``, else ``TRIFLASH_BACKEND``, else ``auto``."""
    return _requested.name or _of_environment()


def _of_environment() -> str:
    name = os.environ.get(_ENVIRONMENT) or "auto"
    check_backend(_ENVIRONMENT, name)
    return name


# As torch.compiler.assume_constant_result says it, which imports all of Dynamo: compiled programs keep the environment that they saw.
_of_environment._dynamo_marked_constant = True  # type: ignore[attr-defined]


def requested_backend_soon() -> str:
    """The same, for eager calls, which wait for it: without what ``os.environ`` does to encode a name, and not to be traced."""
    if _requested.name is None and _lookup is not None and not _lookup(_ENVIRONMENT_BYTES):
        return "auto"
    return requested_backend()


def why_not(name: str, spec: AttentionSpec, device: DeviceFacts, backward: bool = False) -> tuple[str, str] | None:
    """None if the backend can compute the spec's forward (or backward) pass on the device, else (what it cannot, what does work)."""
    if name in IN_PYTORCH:
        return None
    if problem := triton_problem():
        return f"anything: {problem}", "install triton (Linux) or use backend('tiled')"
    return hopper.why_not(spec, device) if name == "hopper" else triton.why_not(spec, device, backward)


def _why_not_pass(name: str, spec: AttentionSpec, device: DeviceFacts, needs: Needs | None) -> tuple[str, str] | None:
    """``why_not``, of a forward pass or, with needs, of a backward pass."""
    if reason := why_not(name, spec, device, needs is not None):
        return reason
    return hopper.why_not_backward(spec, needs, device) if name == "hopper" and needs is not None else None


def _choose(requested: str, spec: AttentionSpec, device: DeviceFacts, needs: Needs | None = None) -> str:
    check_backend("backend", requested)
    if requested == "auto":
        if device.arch in ("cpu", "interpreter"):
            return "tiled"
        if hopper.reservation(spec, device, needs is not None) is None and not _why_not_pass("hopper", spec, device, needs):
            return "hopper"
        return "tiled" if why_not("triton", spec, device, needs is not None) else "triton"
    if reason := _why_not_pass(requested, spec, device, needs):
        raise unsupported(reason[0], requested, reason[1])
    return requested


def _or_tiled(requested: str, plan: Callable[[str], Plan]) -> Plan:
    """The plan, or for the automatic choice that of ``tiled`` where no tile of a kernel fits the device after all."""
    try:
        return plan(requested)
    except UnsupportedError:
        if requested != "auto":
            raise
        return plan("tiled")


def plan_forward(spec: AttentionSpec, device: DeviceFacts, requested: str = "auto") -> Plan:
    """The plan of a forward pass. Raises :class:`UnsupportedError` where a backend asked for by name cannot do it."""
    return _or_tiled(requested, lambda name: _plan_forward(spec, device, name, current_choices()))


@functools.lru_cache(maxsize=1024)
def _plan_forward(spec: AttentionSpec, device: DeviceFacts, requested: str, choices: Choices) -> Plan:
    name = _choose(requested, spec, device)
    if name == "hopper":
        return Plan(name, hopper.forward_steps(spec, device, dict(choices.by_hand)))
    return Plan(name, triton.forward_steps(spec, device, choices) if name == "triton" else (Step("forward"),))


def plan_backward(spec: AttentionSpec, needs: Needs, device: DeviceFacts, requested: str = "auto") -> Plan:
    """The plan of a backward pass: only the kernels that the gradients asked for need."""
    return _or_tiled(requested, lambda name: _plan_backward(spec, needs, device, name, current_choices()))


@functools.lru_cache(maxsize=1024)
def _plan_backward(spec: AttentionSpec, needs: Needs, device: DeviceFacts, requested: str, choices: Choices) -> Plan:
    name = _choose(requested, spec, device, needs)
    if name == "hopper":
        return Plan(name, hopper.backward_steps(spec, needs, device, choices))
    return Plan(name, triton.backward_steps(spec, needs, device, choices) if name == "triton" else (Step("backward"),))
