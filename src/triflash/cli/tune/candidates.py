"""Which configurations are tried, and which of them compile to something that can run. Compiles in worker processes; needs no GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ...plan.configs import Problem, TileConfig, misread, of_both, with_wide_bias
from ...plan.device import DeviceFacts
from ..pool import Compiler, in_a_line
from .cases import Case, launches, meta, plan_of

if TYPE_CHECKING:
    from ...launch.ahead import Resources

__all__ = ["Built", "Job", "build", "candidates", "compiler", "shares"]

# 16-bit elements on GPUs with 160 KiB of shared memory and more: block_m, block_n, warps, stages.
_LARGE = {
    "forward": [(64, n, 4, s) for n in (32, 64, 128) for s in (2, 3, 4)]
    + [(128, n, w, s) for n in (32, 64, 128) for w in (4, 8) for s in (2, 3, 4)]
    + [(256, n, 8, s) for n in (32, 64) for s in (2, 3)],
    "dkdv": [(m, n, w, s) for n in (64, 128) for m in (32, 64, 128) for w in (4, 8) for s in (2, 3)],
    "dq": [(m, n, w, s) for m in (64, 128) for n in (32, 64, 128) for w in (4, 8) for s in (2, 3)],
    "dbias": [
        (m, n, w, s) for m, n in ((64, 64), (128, 64), (64, 128), (128, 128), (256, 64), (64, 256)) for w in (4, 8) for s in (1, 2, 3, 4)
    ],
}
# What else float32 elements, little shared memory, or few registers (AMD) leave room for.
_SMALL = [(m, n, w, s) for m, n in itertools.product((16, 32, 64), repeat=2) for w in (4, 8) for s in (1, 2)]
# Float32 elements multiplied by tensor cores: an operand is kept twice and more.
_BY_TENSOR_CORES = {
    "forward": [(m, n, w, s) for m, n in ((64, 32), (64, 64), (128, 32), (128, 64)) for w in (4, 8) for s in (1, 2, 3)],
    "dkdv": [(m, n, w, s) for m, n in ((16, 64), (32, 64), (64, 64), (32, 128), (16, 128)) for w in (4, 8) for s in (1, 2)],
    "dq": [(m, n, w, s) for m, n in ((64, 16), (64, 32), (64, 64), (128, 16), (128, 32)) for w in (4, 8) for s in (1, 2)],
    "dbias": [(m, n, w, s) for m, n in ((32, 64), (64, 32), (64, 64), (128, 32)) for w in (4, 8) for s in (1, 2)],
}
_MUCH_SHARED_MEMORY = 160 * 1024


@dataclass(frozen=True)
class Job:
    """One configuration of one kernel in one case, to be compiled for a device."""

    case: Case
    kernel: str
    config: TileConfig
    device: DeviceFacts


@dataclass(frozen=True)
class Built:
    """What the compiler made of a job: the resources of its kernel, or why there are none."""

    resources: Resources | None
    error: str = ""

    def refused(self, device: DeviceFacts, spills: int | None) -> str | None:
        """Why this is not to be run on the device, or None. The one statement of what is feasible; spills: words allowed, None for any."""
        if self.resources is None:
            return self.error
        if self.resources.shared_memory > device.shared_memory:
            return f"{self.resources.shared_memory} bytes of shared memory, of {device.shared_memory}"
        if spills is not None and self.resources.spills > spills:
            return f"{self.resources.spills} spilled words a thread"
        return None


def candidates(problem: Problem, device: DeviceFacts, default: TileConfig) -> list[TileConfig]:
    """The configurations to try, the default first.

    With float32 elements only those that a plan would take as they are: for a float32 bias it cuts stages of what does not fit.
    """
    large = problem.itemsize == 2 and device.arch.startswith("sm") and device.shared_memory >= _MUCH_SHARED_MEMORY
    kernel = of_both(problem.kernel)
    shapes: Iterable[tuple[int, int, int, int]] = _LARGE[kernel]
    if not large:
        shapes = [*_SMALL, *(shape for shape in shapes if problem.itemsize == 2)]
    if problem.products:
        shapes = [*_SMALL, *_BY_TENSOR_CORES[kernel]]
    found = [default, *(config for shape in shapes if not misread(problem, config := TileConfig(*shape)))]
    if problem.itemsize > 2 and problem.bias:
        found = [config for config in found if config == default or with_wide_bias(problem, config, device) == config]
    return list(dict.fromkeys(found))


def shares(job: Job) -> list[Job]:
    """Jobs that the same entry of a tuned file would be used for, and that take more than the job itself.

    A configuration is chosen by kernel, head dim, element size, bias or not, causal or not. So it has to fit where the kernel writes the
    gradient of a bias on its way, and where the bias is float32 (there with the stages that a plan leaves it).
    """
    case, jobs = job.case, []
    if case.bias is None:
        return []
    problem = case.problem(job.kernel, job.device)
    patterns = {"dq": ("bhqk",), "dkdv": ("1h1k", "1hqk"), "forward": ("1hqk",), "dbias": ("1hqk",)}[of_both(job.kernel)]
    for pattern, dtype in itertools.product(patterns, dict.fromkeys((case.dtype, torch.float32))):
        # two batch entries: a bias of one would count as one that varies over the batch
        other = replace(case, batch=max(2, case.batch), bias=pattern, dbias=True, bias_dtype=dtype)
        config = with_wide_bias(problem, job.config, job.device) if dtype == torch.float32 else job.config
        jobs.append(Job(other, job.kernel, config, job.device))
    return jobs


def build(job: Job) -> Built:
    """Compile a job ahead of time; a launch of the same kernel finds it in Triton's cache."""
    from ...launch import ahead

    try:
        plan = plan_of(job.case, job.kernel, job.device, job.config)
        x = job.case.tensors(meta)
        calls = ahead.calls_of(plan, job.case.spec(), job.case.needs, x.q, x.k, x.v, x.bias)
        call = launches(plan, job.kernel, calls)[0]
        return Built(ahead.resources(ahead.compile_for(call, job.device.arch)))
    except Exception as error:  # noqa: BLE001 (compilers fail in many ways, and each only costs this configuration)
        return Built(None, in_a_line(error))


def compiler(workers: int) -> Compiler[Job, Built]:
    """Worker processes that build jobs."""
    return Compiler(workers, build, _crashed)


def _crashed(reason: str) -> Built:
    return Built(None, reason)
