"""Judging and timing configurations on the GPU: every configuration's results first, then all that were right, in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...plan.configs import TileConfig
from ...plan.device import DeviceFacts
from ...spec import Gradients, Operands, Saved
from ..bench.formula import Options
from ..bench.gate import Problem, reference, verdict
from ..bench.timing import Samples, measure_interleaved
from .cases import Case, launches, plan_of

__all__ = ["Bench", "Measured"]

LSE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Measured:
    """One configuration of one kernel in one case: milliseconds of each sample, or what is wrong with it."""

    ms: tuple[float, ...] = ()
    problem: str = ""

    @property
    def median(self) -> float:
        """Milliseconds; NaN if it was not timed."""
        return Samples(list(self.ms)).median


class Bench:
    """A case on this GPU: random inputs, the forward pass's results, and what every result is held against."""

    def __init__(self, case: Case, facts: DeviceFacts, device: torch.device) -> None:
        self.case, self.facts, self.device = case, facts, device
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)

        self.x = case.tensors(normal)
        self.spec = case.spec()
        self.saved = self._forward_outputs()
        for call in self._calls("forward", case.default("forward", facts), self.saved, {}):
            call.start()
        lo, hi = None, 0 if case.causal else None
        options = Options(scale=self.spec.scale, lo=lo, hi=hi)
        problem = Problem(self.x.q, self.x.k, self.x.v, self.x.bias, self.x.dout, options)
        wanted = ("out", "dq", "dk", "dv", *(["dbias"] if case.dbias else []))
        self.parts = reference(problem, wanted)
        # What configurations write to, one after the other.
        self.scratch = self._forward_outputs()
        inputs = {"dq": self.x.q, "dk": self.x.k, "dv": self.x.v, **({"dbias": self.x.bias} if case.dbias else {})}
        self.grads = {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in inputs.items() if x is not None}

    def measure(
        self, kernel: str, configs: Sequence[TileConfig], budget: float, done: Callable[[], None] = lambda: None
    ) -> dict[TileConfig, Measured]:
        """Judge and time configurations of a kernel. budget: seconds for each."""
        found: dict[TileConfig, Measured] = {}
        ready: dict[str, Callable[[], Any]] = {}
        for config in configs:
            try:
                run, results = self._prepare(kernel, config)
                for result in (*results.values(), *(x for x in self.scratch[1:] if x is not None)):
                    result.fill_(torch.nan)
                run()
                problem = verdict([part for part in self.parts if part.name in results], results)
                if problem is None and kernel == "forward":
                    problem = self._lse_problem()
            except Exception as error:  # noqa: BLE001 (what a launch raises concerns this configuration)
                problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # raises if the device is lost, and with it the measurement
            if problem is None:
                ready[str(config)] = run
            else:
                found[config] = Measured(problem=f"WRONG: {problem}")
            done()
        timed: Mapping[str, Samples] = measure_interleaved(ready, device=self.device, budget=budget)
        for config in configs:
            if config not in found:
                samples = timed[str(config)]
                found[config] = Measured(tuple(samples.ms), "" if samples.error is None else f"failed: {samples.error}")
        return found

    def _lse_problem(self) -> str | None:
        """What is wrong with the lse and its rest of a forward pass, against those that the backward kernels were judged with."""
        for name, got, wanted in zip(("lse", "rest"), self.scratch[1:], self.saved[1:], strict=True):
            if got is None or wanted is None:
                continue
            limit = LSE_TOLERANCE * (1 + self.saved[1].abs().nan_to_num(posinf=0.0))
            wrong = ~((got == wanted) | ((got - wanted).abs() <= limit))  # NaN is wrong; equal infinities are not
            if wrong.any():
                return f"{name} is off by more than {LSE_TOLERANCE:g} (1 + |lse|) in {int(wrong.sum())} of {wrong.numel()} rows"
        return None

    def _prepare(self, kernel: str, config: TileConfig) -> tuple[Callable[[], None], dict[str, Tensor]]:
        """What runs a kernel, and the results that it then holds."""
        plan = plan_of(self.case, kernel, self.facts, config)
        step = plan.step(kernel)
        assert step is not None
        if kernel == "forward":
            calls, results = self._calls(kernel, config, self.scratch, {}), {"out": self.scratch[0]}
        else:
            calls = self._calls(kernel, config, self.saved, self.grads)
            results = {name: self.grads[name] for name in step.gives}
            calls[[s.kernel for s in plan.steps].index("delta")].start()
        own = launches(plan, kernel, calls)

        def run() -> None:
            for call in own:
                call.start()

        return run, results

    def _forward_outputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """out, lse and rest, as ``launch`` takes them."""
        case = self.case
        lse = self.x.q.new_empty((case.batch, case.heads, case.queries), dtype=torch.float32)
        return torch.empty_like(self.x.dout), lse, torch.empty_like(lse) if self.spec.keeps_rest else None

    def _calls(
        self, kernel: str, config: TileConfig, outputs: tuple[Tensor, Tensor, Tensor | None], grads: Mapping[str, Tensor]
    ) -> list[Any]:
        from ...launch import ahead

        x, plan = self.x, plan_of(self.case, kernel, self.facts, config)
        given = Gradients(*(grads.get(name) for name in ("dq", "dk", "dv", "dbias")))
        return ahead.pass_calls(plan, self.spec, Operands(x.q, x.k, x.v, x.bias), Saved(*outputs), x.dout, given)
