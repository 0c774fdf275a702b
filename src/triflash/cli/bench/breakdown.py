"""Where the host's time of an eager step goes: pieces of it timed alone, and a profile by file and by function.

The profile runs the backward pass on the calling thread (``torch.autograd.set_multithreading_enabled(False)``): on a GPU autograd has a
thread of its own for it, which a profiler does not see.
"""

from __future__ import annotations

import cProfile
import functools
import importlib.util
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .contest import Side
from .timing import HOST_CALLS, measure_interleaved

__all__ = ["breakdown", "place", "tables"]

MOST_BATCHES = 12  # of HOST_CALLS steps under the profiler, or fewer where those take longer than the budget
GROUPS, FUNCTIONS = 24, 24  # lines of the tables; what is left is one more line of the former
_PACKAGES = ("triflash", "torch", "triton")


class _Bare(torch.autograd.Function):
    """Allocates what attention does, and does nothing else."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, *inputs: Tensor) -> Tensor:
        out, lse = _outputs(like)
        ctx.save_for_backward(*inputs, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        wanted = ctx.needs_input_grad[1:]
        return None, *(torch.empty_like(x) if need else None for x, need in zip(ctx.saved_tensors, wanted, strict=False))


def _outputs(like: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(like), like.new_empty(like.shape[:-1], dtype=torch.float32)


def breakdown(side: Side, device: torch.device, budget: float) -> dict[str, Any]:
    """A step taken apart, in µs; within the side's :meth:`around`.

    Returns ``pieces``: name -> median time of that alone; ``profiled``: µs a step under the profiler, the sum of all own times; ``groups``:
    (file or package, calls, own µs) a step, the largest first; ``functions``: (function, calls, own µs, µs with what it calls) likewise.
    """
    with torch.no_grad():
        like = side.train()
    inputs = [x for x in side.inputs if x is not None]

    def bare() -> Any:
        return torch.autograd.grad(_Bare.apply(like, *inputs), side.leaves, side.dout)

    calls: dict[str, Callable[[], Any]] = {
        "allocating outputs and gradients": lambda: (*_outputs(like), *map(torch.empty_like, side.leaves)),
        "a step of a bare autograd.Function that allocates them": bare,
        "forward without autograd": side.forward,
        "forward": side.train,
        "step": side.step,
    }
    around = {"forward without autograd": functools.partial(side.around, "host-nograd")}
    timed = measure_interleaved(calls, device=device, budget=budget, clock="host", around=around)
    for samples in timed.values():
        if samples.error is not None:
            raise samples.error
    seconds = HOST_CALLS * timed["step"].median / 1e3
    entries, steps = _profile(side.step, device, max(1, min(MOST_BATCHES, int(budget / seconds))))
    return {"pieces": {name: round(1e3 * samples.median, 2) for name, samples in timed.items()}, **tables(entries, steps)}


def _profile(step: Callable[[], Any], device: torch.device, batches: int) -> tuple[list[Any], int]:
    """What cProfile saw in some steps, and how many. Waiting for the device is left out."""
    profiler = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):
        for _ in range(3):
            step()
        for _ in range(batches):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            profiler.enable()
            try:
                for _ in range(HOST_CALLS):
                    step()
            finally:
                profiler.disable()
    own = "of '_lsprof.Profiler' objects"
    return [entry for entry in profiler.getstats() if not (isinstance(entry.code, str) and own in entry.code)], batches * HOST_CALLS


def tables(entries: Iterable[Any], steps: int) -> dict[str, Any]:
    """cProfile's entries of so many steps as ``profiled``, ``groups`` and ``functions``: see :func:`breakdown`."""
    groups: dict[str, list[float]] = {}
    functions = []
    total = 0.0
    for entry in entries:
        group, name = place(entry.code)
        calls, own, whole = (x / steps for x in (entry.callcount, 1e6 * entry.inlinetime, 1e6 * entry.totaltime))
        known = groups.setdefault(group, [0.0, 0.0])
        known[0] += calls
        known[1] += own
        total += own
        functions.append((name, round(calls, 2), round(own, 2), round(whole, 2)))
    ordered = sorted(groups.items(), key=lambda item: -item[1][1])
    lines = [(name, round(calls, 2), round(own, 2)) for name, (calls, own) in ordered[:GROUPS]]
    if rest := ordered[GROUPS:]:
        lines.append(("all others", round(sum(x[0] for _, x in rest), 2), round(sum(x[1] for _, x in rest), 2)))
    return {"profiled": round(total, 2), "groups": lines, "functions": sorted(functions, key=lambda f: -f[2])[:FUNCTIONS]}


@functools.cache
def _roots() -> dict[str, str]:
    """Package -> its folder."""
    found = {name: importlib.util.find_spec(name) for name in _PACKAGES}
    return {name: os.path.dirname(spec.origin) + os.sep for name, spec in found.items() if spec is not None and spec.origin}


def place(code: Any) -> tuple[str, str]:
    """The group that a profiled function counts to, and its name: no absolute paths.

    Files of triflash are groups of their own, those of PyTorch and Triton by folder; then C and C++ by package, generated code (of named
    tuples, say), and the rest of Python.
    """
    if isinstance(code, str):
        name = re.sub(r" at 0x[0-9a-fA-F]+", "", code.strip("<>"))
        if re.search(r"\blaunch\b|triton|cuda_utils", name):
            return "triton, C", name
        return ("torch, C++" if re.search(r"torch|triflash|aten", name) else "python, C"), name
    path, function = code.co_filename, getattr(code, "co_qualname", code.co_name)
    for package, root in _roots().items():
        if path.startswith(root):
            parts = [package, *path[len(root) :].split(os.sep)]
            where = "/".join(parts)
            return where if package == "triflash" else "/".join(parts[:2]), f"{where}:{code.co_firstlineno} {function}"
    if path.startswith("<"):
        return "generated code", f"{path} {function}"
    return "python", f"{os.path.basename(path)}:{code.co_firstlineno} {function}"
