"""Problems whose kernels are compiled: named workloads, or what ``triflash explain`` takes as options. Plain values, so that they reach
workers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...plan.device import DeviceFacts
from .. import explain_options

if TYPE_CHECKING:
    from ...launch.calls import Call
    from ..bench.workloads import Workload

__all__ = ["PASSES", "Launch", "Problem", "problems"]

PASSES = ("fwd", "bwd")


@dataclass(frozen=True)
class Launch:
    """A kernel of a pass of a problem: its step, as ``record_launches`` says it, and its launch on meta tensors."""

    which: str  # pass: forward, backward
    step: str
    call: Call


@dataclass(frozen=True)
class Problem:
    """One call of triflash, in one of :data:`PASSES`: ``fwd`` is a forward pass without autograd, ``bwd`` a step of training, whose forward
    pass keeps the lse.

    settings: the options of ``triflash explain`` by name; of a workload only those that say how and where it runs.
    """

    name: str
    which: str
    settings: tuple[tuple[str, Any], ...]
    workload: Workload | None = None

    def launches(self) -> tuple[list[Launch], DeviceFacts, str]:
        """Of its passes' kernels; the device; and the backends. Raises what ``triflash.explain`` raises."""
        from ...explainer import passes_of

        given = argparse.Namespace(**dict(self.settings))
        if self.workload is None:
            tensors, options = explain_options.asked(given)
        else:
            tensors, options = _of_workload(self.workload)
            if given.deterministic and not self.workload.cache:
                options["deterministic"] = True
        wants_dbias = options["bias"] is not None and (self.workload is None or self.workload.dbias)
        there = {"q": True, "k": True, "v": True, "bias": wants_dbias, "sink": options.get("sink") is not None}
        grads = [name for name, is_there in there.items() if is_there and self.which == "bwd"]
        with explain_options.using(given.tuned):
            found = {name: value for name, value in options.items() if value is not None}
            passes, facts = passes_of(*tensors, grads=grads, backend=given.backend, device=given.device, **found)
        launches = [
            Launch(which, str(step), call)
            for which, each in passes
            if each.calls is not None
            for step, call in zip(each.plan.steps, each.calls, strict=True)
        ]
        return launches, facts, ", ".join(dict.fromkeys(each.plan.backend for _, each in passes))


def _of_workload(workload: Workload) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
    """As the bench's provider ``triflash`` calls it."""
    from ..bench.providers import asked_of_triflash

    problem = workload.described()
    asked = asked_of_triflash(workload, problem)
    biases = [asked.lay_bias(each) for each in problem.biases.values()]
    bias = tuple(biases) if len(biases) > 1 else biases[0] if biases else None
    return (asked.lay(problem.q), asked.lay(problem.k), asked.lay(problem.v)), {**asked.more, "of": asked.of, "bias": bias}


def problems(given: argparse.Namespace, defaults: dict[str, Any]) -> Iterator[Problem]:
    """What a command line asks for: each length, or each workload, in each pass. defaults: of the options that describe one problem.

    Raises ValueError for unknown workloads, and for options beside a workload that has its own.
    """
    passes = list(dict.fromkeys(given.passes))
    settings = {name: getattr(given, name) for name in defaults}
    if given.workload is None:
        lengths = settings.pop("s")
        words = [_words(name, value) for name, value in settings.items() if value != defaults[name]]
        for length in lengths:
            for which in passes:
                yield Problem(" ".join([f"--s {length}", *words]), which, tuple({**settings, "s": length}.items()))
        return
    own = ("backend", "device", "tuned", "deterministic")
    if odd := [f"--{name.replace('_', '-')}" for name, value in settings.items() if name not in own and value != defaults[name]]:
        raise ValueError(f"{', '.join(odd)}: a named workload has its own shape; drop them, or drop --workload")
    from ..bench.models import named

    for name in given.workload:
        for workload in named(name):
            for which in ["fwd"] if workload.cache else passes:
                yield Problem(workload.name, which, tuple((name, settings[name]) for name in own), workload)


def _words(name: str, value: object) -> str:
    """An option as the command line has it."""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")
    return f"--{name.replace('_', '-')}" + ("" if value is True else f" {text}")
