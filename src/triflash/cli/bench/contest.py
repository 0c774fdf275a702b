"""A workload's tensors, and a provider's view of them: what a pass of it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .entry import Biases
from .gate import Part, Problem, reference
from .gate_packed import packed_reference
from .providers import Provider
from .timing import Call
from .workloads import Workload

__all__ = ["FORWARD_ONLY", "Contest", "Settings", "Side"]

FORWARD_ONLY = ("fwd", "host-nograd", "host-fwd")

Inputs = tuple[Tensor, Tensor, Tensor, "Biases"]


@dataclass(frozen=True)
class Settings:
    """How to measure: which passes, where, seconds for each provider and pass, samples at least, seed of the inputs, breakdowns or none."""

    passes: tuple[str, ...]
    device: torch.device
    budget: float
    min_samples: int
    seed: int
    breakdown: bool = False


class Contest:
    """The tensors of a workload, and which results are judged. provider: whose, where it draws dropout's marks by itself."""

    def __init__(self, workload: Workload, settings: Settings, judged: bool = False, provider: Provider | None = None) -> None:
        self.workload, self.settings = workload, settings
        self.problem: Problem = workload.build(settings.device, settings.seed)
        self.backward = any(which not in FORWARD_ONLY for which in settings.passes)
        self.wants_dbias = workload.dbias and self.problem.bias is not None
        gradients = ("dq", "dk", "dv", *(self.problem.biases if self.wants_dbias else ()))
        self.names = ["out", *(gradients if self.backward else ())]
        right = packed_reference if self.problem.sequences else reference
        if judged and workload.dropout:
            assert provider is not None
            self.problem = replace(self.problem, marks=provider.marks(workload, self.problem))
        self.parts: list[Part] = right(self.problem, self.names) if judged else []
        self.problem = replace(self.problem, marks=None)  # they are as large as the scores


class Side:
    """A provider in a contest: its tensors, in its own layout, and what a pass of it is."""

    def __init__(self, contest: Contest, provider: Provider) -> None:
        x = contest.problem
        self.contest, self.entry = contest, provider.attend(contest.workload, x)
        q, k, v = (self.entry.lay(t.detach()) for t in (x.q, x.k, x.v))
        laid = [self.entry.lay_bias(bias.detach()) for bias in x.biases.values()]
        self.dout = self.entry.lay(x.dout)
        biases = [bias for bias in laid if bias is not None]
        self.plain: Inputs = (q, k, v, _as_given(biases))
        self.leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        if contest.wants_dbias:
            biases = [bias.detach().requires_grad_() for bias in biases]
            self.leaves += biases
        self.inputs: Inputs = (*self.leaves[:3], _as_given(biases))  # type: ignore[assignment]

    def forward(self) -> Tensor:
        """Without autograd, if :meth:`around` says so."""
        return self.entry.call(*self.plain)

    def train(self) -> Tensor:
        """With autograd."""
        return self.entry.call(*self.inputs)

    def gradients(self, out: Tensor, retain_graph: bool = False) -> tuple[Tensor, ...]:
        """Of everything that asks for one."""
        return torch.autograd.grad(out, self.leaves, self.dout, retain_graph=retain_graph)

    def step(self) -> tuple[Tensor, ...]:
        """Forward and backward, as in training."""
        return torch.autograd.grad(self.entry.call(*self.inputs), self.leaves, self.dout)

    def step_with_output(self) -> tuple[Tensor, ...]:
        """The same; the output comes along, so that it is alive at the peak as it is in training."""
        out = self.train()
        return (out.detach(), *self.gradients(out))

    def call(self, which: str) -> Call:
        """What is timed for a pass, within :meth:`around`."""
        if which in ("fwd", "host-nograd"):
            return self.forward
        if which == "host-fwd":
            return self.train
        if which == "bwd":
            with self.entry.around():
                out = self.train()
            return lambda: self.gradients(out, retain_graph=True)
        return self.step

    @contextlib.contextmanager
    def around(self, which: str) -> Iterator[None]:
        """What is entered outside the clock."""
        with self.entry.around(), torch.set_grad_enabled(which not in ("fwd", "host-nograd")):
            yield

    def results(self, which: str) -> dict[str, Tensor]:
        """Of a pass, ``fwd`` or ``step``, by name and in the bench's layout."""
        with self.around(which):
            found = (self.forward(),) if which == "fwd" else self.step_with_output()
        biases = self.contest.problem.biases
        named = zip(self.contest.names, found, strict=False)
        return {name: x.reshape(biases[name].shape) if name in biases else self.entry.unlay(x) for name, x in named}


def _as_given(biases: list[Tensor]) -> Biases:
    """None, one, or a pair, as providers take them."""
    return None if not biases else biases[0] if len(biases) == 1 else (biases[0], biases[1])
