"""On what a run was measured: device, clocks, power limit, versions, commit; and the two ceilings. No host names, no paths."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import triflash

from .. import environment
from .timing import Samples, measure_interleaved, quantiles
from .workloads import DTYPES

__all__ = ["ceilings", "clocks", "facts"]

_QUERY = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "power.draw", "temperature.gpu", "driver_version")


def facts(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit, date; on a GPU also what :func:`clocks` says."""
    commit, changed = environment.commit()
    found: dict[str, Any] = {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": environment.version("triton") or None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "flash-attn-4": environment.version("flash-attn-4") or None,
        "triflash": triflash.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": changed,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "processors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
        found["clocks_before"] = clocks(device)
    return found


def clocks(device: torch.device) -> dict[str, str] | None:
    """Clocks, power limit, temperature and driver, as nvidia-smi words them; None without a GPU or nvidia-smi."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    chosen = f"--id={device.index or 0}"
    try:
        uuid = torch.cuda.get_device_properties(device).uuid  # CUDA_VISIBLE_DEVICES renumbers, nvidia-smi does not
        chosen = f"--id=GPU-{uuid}"
    except AttributeError:
        pass
    said = environment.output("nvidia-smi", chosen, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader")
    values = [value.strip() for value in said.splitlines()[0].split(",")] if said else []
    return dict(zip(_QUERY, values, strict=True)) if len(values) == len(_QUERY) else None


def ceilings(device: torch.device, dtypes: Iterable[str], budget: float = 0.3) -> dict[str, dict[str, Any]]:
    """What the device does at best, measured: a large matrix product in each dtype and a copy.

    Returns ``{"matmul bf16": {"flops_per_second": median, "p10": …, "samples_ms": […]}, …, "copy": {"bytes_per_second": …}}``; bytes are
    read and written, by PyTorch's copy or by a kernel that negates 16-bit words, whichever is faster: on an H200 its copy is a driver's,
    at two thirds of what kernels reach. On a GPU the product is 8192 cubed and the copy 1 GiB, on a CPU 1024 cubed and 64 MiB.
    """
    size, copied = (8192, 2**30) if device.type == "cuda" else (1024, 2**26)
    source = torch.empty(copied, dtype=torch.int8, device=device).zero_()
    target = torch.empty_like(source)
    words, into = source.view(torch.int16), target.view(torch.int16)
    calls: dict[str, Any] = {"copy": lambda: target.copy_(source), "by a kernel": lambda: torch.neg(words, out=into)}
    works = {"copy": 2 * copied}
    for name in dtypes:
        a, b = (torch.randn(size, size, device=device).to(DTYPES[name]) for _ in range(2))
        calls[f"matmul {name}"] = lambda a=a, b=b: a @ b
        works[f"matmul {name}"] = 2 * size**3
    measured = measure_interleaved(calls, device=device, budget=budget, flush=False)
    measured["copy"] = min(measured["copy"], measured.pop("by a kernel"), key=lambda samples: samples.median)
    return {
        name: _ceiling(measured[name], work, "bytes_per_second" if name == "copy" else "flops_per_second") for name, work in works.items()
    }


def _ceiling(samples: Samples, work: int, unit: str) -> dict[str, Any]:
    if samples.error is not None:
        raise samples.error
    rates = [1e3 * work / ms for ms in samples.ms]
    found = quantiles(rates)
    return {unit: found["p50"], **found, "samples_ms": samples.ms}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
