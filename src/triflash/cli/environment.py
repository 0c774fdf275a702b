"""What a bug report needs to know about this installation: ``triflash env``. No host name, user name or absolute path is in it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from ..plan import overlay
from ..plan.device import DeviceFacts, facts_of, triton_version
from ..plan.select import BACKENDS, why_not
from ..spec import AttentionSpec

__all__ = ["collect", "commit", "output", "text", "version"]

_PACKAGE = Path(__file__).parents[1]
_PREFIXES = ("TRIFLASH_", "TRITON_", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "PYTORCH_", "TORCH_", "CUBLAS_")
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
_WAIT = 20  # seconds that a helper program may take


def text() -> str:
    """The whole, as aligned lines to paste into a report."""
    lines = list(collect())
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in lines)


def collect() -> Iterator[tuple[str, str]]:
    """(label, value) pairs."""
    from .. import __version__

    hash_, changed = commit()
    at = f" (commit {hash_[:12]}{', with changes' if changed else ''})" if hash_ else ""
    yield "triflash", __version__ + at
    yield "kernel source", overlay.kernel_source()
    yield "python", f"{platform.python_implementation()} {platform.python_version()}"
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}, {' '.join(platform.libc_ver()) or 'libc unknown'}"
    yield "torch", torch.__version__
    yield "triton", triton_version() or "not installed"
    for package in ("numpy", "transformers", "flash-attn", "flash-attn-4"):
        if found := version(package):
            yield package, found
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}" if torch.version.hip else "CPU only"
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    yield "torch built for", built + (f", cuDNN {cudnn}" if cudnn else "")
    yield from _devices()
    yield "float32 products", torch.get_float32_matmul_precision()
    yield from _settings()


def version(package: str) -> str:
    """The version of an installed package; empty if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _devices() -> Iterator[tuple[str, str]]:
    """Every device with its facts, its driver, and what each backend says to a plain 16-bit problem there."""
    cpu = torch.device("cpu")
    places = [cpu, *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    for place in places:
        facts = facts_of(place)
        if place == cpu:
            yield "cpu", f"{os.cpu_count()} logical processors, {torch.get_num_threads()} threads of PyTorch"
        else:
            name = torch.cuda.get_device_properties(place).name
            limits = f"{facts.sms} {facts.units}, {facts.shared_memory} bytes of shared memory a program"
            yield str(place), f"{name}: {facts.arch}, {limits}"
        for backend in BACKENDS:
            if backend != "auto":
                yield f"  {backend}", _state(backend, facts)
    if len(places) > 1:
        yield "driver", _driver()
    elif torch.version.cuda or torch.version.hip:
        yield "GPU", "PyTorch sees none"


def _state(backend: str, facts: DeviceFacts) -> str:
    dtype = "fp32" if facts.arch in ("cpu", "interpreter") else "bf16"
    plain = AttentionSpec(dtype, 1, 1, 128, 128, 1, 64, 64, None, None, None, 0.125, "ieee")
    reason = why_not(backend, plain, facts)
    return (
        f"runs{' in the interpreter' if facts.arch == 'interpreter' and backend == 'triton' else ''}"
        if reason is None
        else (f"cannot do {reason[0]}; {reason[1]}")
    )


def _driver() -> str:
    lines = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")
    return next((line.strip() for line in lines if line.strip()), "unknown (nvidia-smi did not say)")


def _settings() -> Iterator[tuple[str, str]]:
    """Environment variables that change what runs. A value that holds a path is not shown, nor is one that could be a secret."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIXES)}
    for name, value in found.items():
        hidden = "set, not shown" if _SECRET.search(name) else "set to a path" if re.search(r"[/\\~]", value) else ""
        yield name, hidden or value or "set, empty"
    if not found:
        yield "settings", f"none of {', '.join(prefix + '*' if prefix.endswith('_') else prefix for prefix in _PREFIXES)} is set"
    if os.environ.get("TRIFLASH_TUNED"):
        try:
            loaded = overlay.load(os.environ["TRIFLASH_TUNED"], "TRIFLASH_TUNED")
            yield "tuned file", f"{len(loaded.entries)} entries"
        except ValueError:
            yield "tuned file", "missing or not a file that triflash tune wrote"


def commit() -> tuple[str, bool] | tuple[None, None]:
    """The git commit of the checkout that the package runs from, and whether the package's files differ from it.

    Nothing where it is installed, perhaps inside somebody else's checkout, or where git is missing.
    """
    here = ("git", "-C", str(_PACKAGE))
    if not output(*here, "ls-files", "--error-unmatch", "__init__.py").strip():
        return None, None
    found = output(*here, "rev-parse", "HEAD").strip()
    return (found, bool(output(*here, "status", "--porcelain", "--", ".").strip())) if found else (None, None)


def output(*command: str) -> str:
    """What a program prints, or nothing if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_WAIT, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
