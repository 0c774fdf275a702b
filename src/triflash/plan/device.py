"""Facts about a device that a plan may depend on. The only module that asks about hardware; called by ``bound/`` and by applications."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace

import torch

OLDEST_TRITON = (3, 6)

__all__ = ["KNOWN_DEVICES", "NAMED_DEVICES", "DeviceFacts", "facts_of", "limited", "limits_in_force", "triton_problem", "triton_version"]


@dataclass(frozen=True)
class DeviceFacts:
    """What planning needs to know, as plain numbers, so that a plan for any GPU can be made on any machine.

    arch: ``cpu``, ``interpreter`` (Triton's, on the CPU), ``sm80`` … or ``gfx942`` ….
    sms: SMs (of NVIDIA) or compute units (of AMD) that a grid should fill.
    shared_memory: bytes of shared memory that one program may use.
    name: what its vendor calls a GPU that is here; empty elsewhere. Tuned configurations hold for one name.
    """

    arch: str
    sms: int
    shared_memory: int
    name: str = ""

    @property
    def units(self) -> str:
        """What the vendor calls them."""
        return "compute units" if self.arch.startswith("gfx") else "SMs"


KNOWN_DEVICES = {
    facts.arch: facts
    for facts in (
        DeviceFacts("cpu", 1, 0),
        DeviceFacts("interpreter", 4, 1 << 20),
        DeviceFacts("sm80", 108, 166_912),
        DeviceFacts("sm86", 84, 101_376),
        DeviceFacts("sm89", 128, 101_376),
        DeviceFacts("sm90", 132, 232_448),
        DeviceFacts("sm100", 148, 232_448),
        DeviceFacts("sm120", 170, 101_376),
        DeviceFacts("gfx942", 304, 65_536),
        DeviceFacts("gfx950", 256, 163_840),
    )
}


def _named(arch: str, sms: int) -> DeviceFacts:
    return DeviceFacts(arch, sms, KNOWN_DEVICES[arch].shared_memory)


NAMED_DEVICES = {
    "a100": _named("sm80", 108),
    "a10": _named("sm86", 72),
    "a40": _named("sm86", 84),
    "rtx3090": _named("sm86", 82),
    "l4": _named("sm89", 58),
    "l40s": _named("sm89", 142),
    "rtx4090": _named("sm89", 128),
    "h100": _named("sm90", 132),
    "h200": _named("sm90", 132),
    "h20": _named("sm90", 78),
    "b200": _named("sm100", 148),
    "rtx5090": _named("sm120", 170),
    "mi300x": _named("gfx942", 304),
    "mi355x": _named("gfx950", 256),
}


def interpreting() -> bool:
    """Whether Triton's interpreter is on (``TRITON_INTERPRET=1``, which must be set before triflash's kernels are imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def triton_problem() -> str | None:
    """Why Triton cannot be used here at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = importlib.metadata.version("triton") if _has_metadata("triton") else ""
    if version and tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return None


@functools.cache
def triton_version() -> str:
    """The version of the installed Triton; empty if there is none, or none that says."""
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        if _has_metadata(package):
            return importlib.metadata.version(package)
    return ""


def _has_metadata(package: str) -> bool:
    """PyTorch's nightly and ROCm builds ship Triton under other names; then its version is not looked at."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


_limits: ContextVar[tuple[int | None, int] | None] = ContextVar("limits", default=None)
limits_in_force = _limits.get  # the largest number of SMs, and how many to leave alone; None outside of blocks of limited


class limited:
    """A block whose persistent grids leave some SMs alone: they use at most ``most`` (None: any number) and leave ``idle`` to others."""

    def __init__(self, most: int | None, idle: int = 0) -> None:
        self.limits = None if most is None and not idle else (most, idle)
        self._before: Token[tuple[int | None, int] | None] | None = None

    def __enter__(self) -> None:
        if self.limits is not None and not torch.compiler.is_compiling():
            self._before = _limits.set(self.limits)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            _limits.reset(self._before)
            self._before = None


def facts_of(device: torch.device) -> DeviceFacts:
    """Facts about the device that a tensor lives on: ``interpreter`` wherever Triton's interpreter is on, for that is where kernels run.
    In a block of :class:`limited` it has fewer SMs.
    """
    limits = _limits.get()
    return _facts_of(device) if limits is None else _fewer(_facts_of(device), *limits)


@functools.cache
def _fewer(facts: DeviceFacts, most: int | None, idle: int) -> DeviceFacts:
    left = max(1, facts.sms - idle)
    return replace(facts, sms=left if most is None else min(left, most))


@functools.cache
def _facts_of(device: torch.device) -> DeviceFacts:
    if interpreting():
        return KNOWN_DEVICES["interpreter"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            arch = properties.gcnArchName.split(":")[0]
        else:
            arch = f"sm{properties.major}{properties.minor}"
        limit = getattr(properties, "shared_memory_per_block_optin", 0)
        if not limit:
            limit = KNOWN_DEVICES[arch].shared_memory if arch in KNOWN_DEVICES else 65_536
        return DeviceFacts(arch, properties.multi_processor_count, limit, properties.name)
    return KNOWN_DEVICES["cpu"]
