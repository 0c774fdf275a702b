"""Launches of the portable kernels that dense batches, packed sequences and Hopper's backward pass share: arguments in order, once.

Called by ``launch/triton.py``, ``launch/packed.py`` and ``launch/hopper_backward.py``; imports triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..kernels.triton import backward as backward_kernels
from ..kernels.triton import dbias as dbias_kernels
from ..kernels.triton import forward as forward_kernels
from ..kernels.triton.features import Features
from ..plan.configs import TileConfig, padded
from ..plan.kernels.parts import SUM_BLOCK
from ..plan.steps import Step
from ..spec import AttentionSpec, Gradients, Operands, Saved
from .calls import SMALLEST_SCALE, Call, bias_strides
from .common import bias_given, config_of, constants_of, is_wide
from .room import Room

__all__ = ["BackwardPass", "Rows", "dbias_sum_call", "delta_call", "dkdv_call", "dq_call", "forward_call", "input_strides"]

Strides = tuple[int, int, int]


class Rows(NamedTuple):
    """How rows of tensors are found. strides: of q, k, v or what lies like one, by (batch entry or first row, row, head); None of None.
    lse_strides: by (batch entry or first row, head). batch, batch_inner: batch entries, and those of the inner level. packed: the tables of
    packed sequences (``kernels/triton/extent.py``); then ``batch`` is how many tiles there may be.
    """

    strides: Callable[[Tensor | None], Strides | None]
    lse_strides: Callable[[Tensor], tuple[int, ...]]
    batch: int
    batch_inner: int
    packed: tuple[Tensor | None, Tensor, int] | None

    def problem(self, spec: AttentionSpec) -> tuple[Any, ...]:
        """The numbers that the three kernels end with."""
        sizes = (self.batch, spec.heads, spec.groups, self.batch_inner, spec.queries, spec.keys)
        return (*sizes, spec.lo, spec.hi, spec.scale, self.packed)


@dataclass(frozen=True)
class BackwardPass:
    """What the launches of a backward pass share. sums: by name, where a gradient comes in parts."""

    room: Room
    spec: AttentionSpec
    x: Operands
    f: Features
    saved: Saved
    dout: Tensor
    dlse: Tensor | None
    delta: Tensor | None
    grads: Gradients
    wide: bool
    sums: dict[str, Tensor | None]

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What kernels begin with."""
        return (*self.x[:3], self.f, self.dout, self.saved.lse, self.saved.rest, self.delta)


def forward_call(step: Step, spec: AttentionSpec, x: Operands, f: Features, saved: Saved, rows: Rows) -> Call:
    """out, lse and, if given, rest."""
    config = config_of(step)
    out, lse, _ = saved
    strides = (*map(rows.strides, (x.q, x.k, x.v, out)), rows.lse_strides(lse))
    args = (x.q, x.k, x.v, f, *saved, *strides, *rows.problem(spec))
    constants = constants_of(spec, config, is_wide((x.q, x.k, x.v, out, x.bias, x.mask, x.second_bias)), step.precision)
    constants = constants | {"POSITIVE_SCALE": spec.scale >= SMALLEST_SCALE, "ORDER": step.l2_group or step.order}
    return Call(forward_kernels.forward, args, constants, config, step.programs)


def input_strides(inputs: tuple[Any, ...], rows: Rows) -> tuple[Any, ...]:
    """Strides of q, k, v, dout and lse. inputs: of a backward kernel: q, k, v, features, dout, lse, rest, delta."""
    q, k, v, _, dout, lse, *_ = inputs
    return (*map(rows.strides, (q, k, v, dout)), rows.lse_strides(lse))


def dkdv_call(
    step: Step, spec: AttentionSpec, inputs: tuple[Any, ...], rows: Rows, results: tuple[Tensor | None, ...],
    dbias_strides: tuple[int, int, int, int] | None, wide: bool,
) -> Call:  # fmt: skip
    """results: dk, dv and the gradient of a bias of keys, those that are wanted, of which dbias_strides are by (outer batch or sequence,
    inner batch, head, key).
    """
    config = config_of(step)
    dk, dv, _ = results
    args = (*inputs, *results, *input_strides(inputs, rows), rows.strides(dk), rows.strides(dv), dbias_strides, *rows.problem(spec))
    constants = constants_of(spec, config, wide, step.precision) | {"GROUPED": spec.groups > 1, "ORDER": step.l2_group or step.order}
    return Call(backward_kernels.dkdv, args, constants, config, step.programs)


def dq_call(
    step: Step, spec: AttentionSpec, inputs: tuple[Any, ...], rows: Rows, results: tuple[Tensor | None, ...],
    dq_strides: tuple[int, ...] | None, wide: bool,
) -> Call:  # fmt: skip
    """results: dq, or parts of it if the step has several, and the gradient of a bias of full shape."""
    config = config_of(step)
    splits = step.splits if step.splits > 1 else None
    strides = (*input_strides(inputs, rows), dq_strides, bias_strides(results[1]))
    args = (*inputs, *results, *strides, *rows.problem(spec), splits)
    constants = constants_of(spec, config, wide, step.precision) | {"ORDER": step.l2_group or step.order}
    return Call(backward_kernels.dq, args, constants, config, step.programs)


def delta_call(
    step: Step, spec: AttentionSpec, out: Tensor, dout: Tensor, dlse: Tensor | None, delta: Tensor | None, f: Features, wide: bool
) -> Call:
    """``delta = rowsum(out * dout) - dlse``."""
    config = step.config
    assert isinstance(config, TileConfig)
    args = (out, dout, dlse, delta, out.stride()[:3], dout.stride()[:3], None if dlse is None else dlse.stride())
    constants = {"BM": config.block_m, "DV": spec.value_dim, "BDV": padded(spec.value_dim), "WIDE": wide}
    return Call(backward_kernels.delta, (*args, spec.heads, spec.queries, f), constants, config, step.programs)


def dbias_sum_call(step: Step, grads: Gradients, sums: dict[str, Tensor | None]) -> Call:
    """The gradient of a bias from its parts, added up in their order. sums: by name, where a gradient comes in parts."""
    name, target = bias_given(step, grads)
    assert target is not None
    args = (sums[name], target, target.numel(), step.splits)
    return Call(dbias_kernels.dbias_sum, args, {"BLOCK": SUM_BLOCK}, config_of(step), step.programs)
