"""``triflash env --check``: what would run here, what is missing, and the command that mends it. Starts nothing on a GPU."""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import UnsupportedError
from ..explainer import explain
from ..plan import overlay
from ..plan.device import OLDEST_TRITON, interpreting, triton_problem, triton_version
from .environment import version
from .extras import EXTRAS, install

__all__ = ["Finding", "findings", "text"]

OLDEST_TORCH = (2, 10)
FINE, MISSING, OPTIONAL = "ok", "missing", "optional"


class Finding(NamedTuple):
    """mark: ``ok``, ``missing`` (something that should run here does not) or ``optional``. mend: a command, or what to do; may be empty."""

    mark: str
    what: str
    mend: str = ""


def text(found: list[Finding]) -> str:
    """A line for each, with its remedy below, and the verdict."""
    lines = []
    for mark, what, mend in found:
        lines.append(f"{mark:<9} {what}")
        if mend:
            lines.append(f"{'':<9} -> {mend}")
    missing = sum(finding.mark == MISSING for finding in found)
    lines.append(f"{missing} missing" if missing else "nothing is missing")
    return "\n".join(lines)


def findings() -> Iterator[Finding]:
    """All that there is to say, versions first."""
    yield _torch()
    gpus = torch.cuda.device_count()
    yield from _triton(gpus)
    yield from _gpu(gpus)
    yield from _settings()
    for place in (*(f"cuda:{index}" for index in range(gpus)), "cpu"):
        yield _runs(place)
    for extra, requirements in EXTRAS.items():
        lacking = [name for name in (requirement.partition(">")[0] for requirement in requirements) if not version(name)]
        for_what = {"demo": "triflash demo", "bench": "triflash bench and tune", "hf": "triflash.integrations.transformers"}[extra]
        yield Finding(OPTIONAL, f"{for_what}: no {', no '.join(lacking)}", install(extra)) if lacking else Finding(FINE, for_what)


def _torch() -> Finding:
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    oldest = ".".join(map(str, OLDEST_TORCH))
    if found < OLDEST_TORCH:
        return Finding(MISSING, f"torch {torch.__version__} is older than {oldest}", f"pip install 'torch>={oldest}'")
    return Finding(FINE, f"torch {torch.__version__}")


def _triton(gpus: int) -> Iterator[Finding]:
    """Triton, and what it builds its launchers with where there is a GPU."""
    if problem := triton_problem():
        command = f"pip install 'triton>={'.'.join(map(str, OLDEST_TRITON))}'"
        if sys.platform == "linux":
            yield Finding(MISSING, f"{problem}: its kernels cannot run", command)
        else:
            yield Finding(OPTIONAL, f"{problem}, and there is none for {sys.platform}: backend tiled runs")
        return
    yield Finding(FINE, f"triton {triton_version()}")
    if not gpus:
        return
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        yield Finding(MISSING, "no C compiler, with which Triton builds its launchers", "apt-get install gcc, or set CC")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        name = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        yield Finding(MISSING, "no Python.h, which Triton's launchers include", f"apt-get install {name}")


def _gpu(gpus: int) -> Iterator[Finding]:
    """Why PyTorch sees no GPU, if there seems to be one."""
    if gpus:
        return
    tool = next((name for name in ("nvidia-smi", "rocm-smi") if shutil.which(name)), "")
    hidden = next((name for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if name in os.environ), "")
    if not tool:
        yield Finding(OPTIONAL, "no GPU: no driver's nvidia-smi or rocm-smi is here")
    elif not (torch.version.cuda or torch.version.hip):
        yield Finding(MISSING, f"{tool} is here, but PyTorch is built for CPUs only", "pip install --force-reinstall torch")
    elif hidden:
        yield Finding(MISSING, f"PyTorch sees no GPU, as {hidden} is set", f"unset {hidden}")
    else:
        yield Finding(MISSING, f"PyTorch sees no GPU, though {tool} is here", f"run {tool}; its driver may be too old for this PyTorch")


def _settings() -> Iterator[Finding]:
    """Settings that make calls slow or fail."""
    if interpreting():
        yield Finding(OPTIONAL, "TRITON_INTERPRET is set: Triton's kernels run in its interpreter, very slowly", "unset TRITON_INTERPRET")
    if os.environ.get("TRIFLASH_TUNED"):
        try:
            overlay.load(os.environ["TRIFLASH_TUNED"], "TRIFLASH_TUNED")
        except ValueError:
            yield Finding(MISSING, "TRIFLASH_TUNED names no file that triflash tune wrote", "unset TRIFLASH_TUNED")


def _runs(place: str) -> Finding:
    """The plan of a usual problem with a bias and its gradient there: b 1, s 1024, h 8, d 64."""
    dtype = torch.float32 if place == "cpu" else torch.bfloat16
    q, k, v = (torch.empty(1, 1024, 8, 64, device="meta", dtype=dtype) for _ in range(3))
    bias = torch.empty(1, 8, 1024, 1024, device="meta")
    name = "cpu" if place == "cpu" else f"{place}, {torch.cuda.get_device_name(place)}"
    try:
        found = explain(q, k, v, bias, grads=("q", "k", "v", "bias"), device=torch.device(place))
    except UnsupportedError as error:
        return Finding(MISSING, f"{name}: {error}", "unset TRIFLASH_BACKEND" if os.environ.get("TRIFLASH_BACKEND") else "")
    except (ValueError, TypeError) as error:  # of TRIFLASH_BACKEND, which is read with the first call
        return Finding(MISSING, f"{name}: {error}", "unset TRIFLASH_BACKEND")
    backward = found.backward.backend if found.backward else found.backend
    both = found.backend if found.backend == backward else f"{found.backend}, backward {backward}"
    if place != "cpu" and "tiled" in (found.backend, backward):
        why = "; ".join(f"{other}: {reason}" for other, reason in found.not_taken if other in ("triton", "hopper"))
        return Finding(MISSING, f"{name} runs on backend {both}, without kernels: {why}")
    return Finding(FINE, f"{name} runs on backend {both}: attention with a bias and its gradient")
