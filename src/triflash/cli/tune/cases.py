"""One problem that configurations are tried on: its tensors, its plans, and the launches of one kernel in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...plan.configs import Problem, TileConfig
from ...plan.device import DeviceFacts
from ...plan.kernels.portable import problem_of
from ...plan.layout import BIAS_STRIDE
from ...plan.overlay import TUNABLE, tuned
from ...plan.override import override_configs
from ...plan.select import Plan, plan_backward, plan_forward
from ...spec import DTYPE_NAMES, AttentionSpec, Needs, spec_of
from ..shorthand import bias_shape

if TYPE_CHECKING:
    from ...launch.calls import Call

__all__ = ["Case", "Tensors", "launches", "meta", "plan_of"]

Make = Callable[[Sequence[int], torch.dtype], Tensor]


@dataclass(frozen=True)
class Tensors:
    """q, dout ``(b, s, h, d)``, k, v ``(b, n, h, d)``, and the canonical bias or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    dout: Tensor


@dataclass(frozen=True)
class Case:
    """An attention problem as ``triflash tune`` takes it. bias: a pattern such as ``1hqk``, or None; dbias: its gradient is wanted."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    bias: str | None
    causal: bool
    dbias: bool
    bias_dtype: torch.dtype | None = None  # None: that of q
    precision: str = ""  # of float32 products; empty: PyTorch's setting

    def __str__(self) -> str:
        lengths = f"s{self.queries}" if self.queries == self.keys else f"s{self.queries}x{self.keys}"
        bias = f" {self.bias}{' +db' if self.dbias else ''}" if self.bias else ""
        mask = " causal" if self.causal else ""
        products = f" {self.precision}" if self.precision else ""
        return f"b{self.batch} h{self.heads} {lengths} d{self.head_dim} {DTYPE_NAMES[self.dtype]}{products}{bias}{mask}"

    @property
    def needs(self) -> Needs:
        return Needs(True, True, True, self.dbias)

    def tensors(self, make: Make) -> Tensors:
        """Tensors of the case, in the layout that kernels see: rows of a bias a multiple of 16 elements apart."""
        q, dout = (make((self.batch, self.queries, self.heads, self.head_dim), self.dtype) for _ in range(2))
        k, v = (make((self.batch, self.keys, self.heads, self.head_dim), self.dtype) for _ in range(2))
        bias = None
        if self.bias is not None:
            *outer, row = bias_shape(self.bias, self.batch, self.heads, self.queries, self.keys)
            padded = row if row == 1 else -(-row // BIAS_STRIDE) * BIAS_STRIDE
            bias = make((*outer, padded), self.bias_dtype or self.dtype)[..., :row]
            bias = bias[(None,) * (4 - bias.dim())].unsqueeze(1)
        return Tensors(q, k, v, bias, dout)

    def spec(self) -> AttentionSpec:
        """The spec of the case."""
        x = self.tensors(meta)
        return spec_of(x.q, x.k, x.v, x.bias, 1, None, 0 if self.causal else None, self.head_dim**-0.5, self.precision)

    def problem(self, kernel: str, device: DeviceFacts) -> Problem:
        """What a configuration of the kernel is chosen by in this case."""
        return problem_of(kernel, self.spec(), device)

    def kernels(self, device: DeviceFacts) -> list[str]:
        """The kernels of the case's forward and backward pass that have a configuration to choose."""
        plans = (plan_of(self, "forward", device), plan_of(self, "dkdv", device))
        return [step.kernel for plan in plans for step in plan.steps if step.kernel in TUNABLE]

    def default(self, kernel: str, device: DeviceFacts) -> TileConfig:
        """The configuration that runs without a tuned file."""
        step = plan_of(self, kernel, device).step(kernel)
        assert step is not None and isinstance(step.config, TileConfig)
        return step.config


def meta(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def plan_of(case: Case, kernel: str, device: DeviceFacts, config: TileConfig | None = None) -> Plan:
    """The plan of the pass that a kernel belongs to, on backend ``triton``, with a configuration for that kernel or the default."""
    with tuned(None), override_configs(**({} if config is None else {kernel: config})):
        if kernel == "forward":
            return plan_forward(case.spec(), device, "triton")
        return plan_backward(case.spec(), case.needs, device, "triton")


def launches(plan: Plan, kernel: str, calls: Sequence[Call]) -> list[Call]:
    """Of the calls of a plan those of one kernel, with the sum of the partial results that it leaves."""
    names = [step.kernel for step in plan.steps]
    at = names.index(kernel)
    step = plan.steps[at]
    wanted = {at}
    if "dbias" in step.gives and "dbias_sum" in names:
        wanted.add(names.index("dbias_sum"))
    return [calls[i] for i in sorted(wanted)]
