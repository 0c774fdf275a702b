"""Arguments and launches of the kernels for short rows. Called by ``launch/triton.py``; imports triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels.triton import short as kernels
from ..plan.kernels.short import ShortConfig, bias_form, pieces, sum_of
from ..plan.steps import Plan, Step, broadcast_rows
from ..spec import AttentionSpec, Gradients, Operands, Saved
from .calls import Call, bias_strides
from .common import constants_of, is_wide, tile_constants
from .few import partial_sums, row_strides
from .room import Room

__all__ = ["backward_call", "forward_calls"]


def forward_calls(plan: Plan, spec: AttentionSpec, x: Operands, f: Any, saved: Saved) -> list[Call]:
    """The launch of a forward pass."""
    step = plan.steps[0]
    config = _config_of(step)
    q, k, v = x.q, x.k, x.v
    out, lse, rest = saved
    tiles = -(-spec.queries // config.block_m)
    rounds = config.rounds if config.rounds > 1 else None
    args = (
        *(q, k, v, f, out, lse, rest, *(each.stride()[:3] for each in (q, k, v, out)), lse.stride()[:2]),
        *(-(-tiles // (rounds or 1)), rounds, spec.heads, spec.groups, spec.batch_inner, spec.queries, spec.keys),
        *(spec.lo, spec.hi, spec.scale),
    )
    wide = is_wide((q, k, v, out, x.bias, x.mask, x.second_bias))
    own = pieces(spec.keys, config.block_n)
    sizes = dict(zip(("BN", "BN2", "BN3"), (*own, 0, 0), strict=False))
    even = {"EVEN_M": spec.queries % config.block_m == 0, "EVEN_N": sum(own) == spec.keys}
    constants = tile_constants(spec.head_dim, spec.value_dim, config, wide, step.precision) | sizes | even | {"LATE": config.late_v}
    return [Call(kernels.short_forward, args, constants | _limit_of(config), config, step.programs)]


def backward_call(
    room: Room,
    step: Step,
    spec: AttentionSpec,
    x: Operands,
    inputs: tuple[Any, ...],
    out: Tensor,
    dlse: Tensor | None,
    grads: Gradients,
    sums: dict[str, Tensor | None],
) -> Call:
    """The launch that fills dq, dk, dv, and such gradients of a bias as the step gives, whose parts go to ``sums``. inputs: q, k, v,
    features, dout, lse, rest and delta.
    """
    config = _config_of(step)
    q, k, v, f, dout, lse, rest, delta = inputs
    dq, dk, dv = (grad if name in step.gives else None for name, grad in zip(("dq", "dk", "dv"), grads, strict=False))
    full: Tensor | None = None
    keys: Tensor | None = None
    parts: Tensor | None = None
    keys_strides = parts_strides = None
    for name, grad, bias in (("dbias", grads.dbias, spec.bias), ("dsecond", grads.dsecond, spec.second)):
        if name not in step.gives:
            continue
        assert grad is not None and bias is not None
        form = bias_form(spec, bias, config)
        if form == "full":
            full = grad
        elif form == "keys":
            keys = sums[name] = partial_sums(room, name, broadcast_rows(spec, bias), grad)
            keys_strides = row_strides(spec, keys)
        else:
            parts = sums[name] = partial_sums(room, name, step.splits, grad)
            parts_strides = (parts.stride(0), *bias_strides(parts[0]))  # type: ignore[misc]
    summed = sum_of(spec, config, step.gives)
    splits = None if summed is None and step.splits == spec.batch * spec.kv_heads else step.splits
    varies = (False, False, False) if summed is None else summed[1].varies[:3]
    args = (
        *(q, k, v, f, out, dout, lse, rest, dlse, delta, dq, dk, dv, full, keys, parts),
        *(each.stride()[:3] for each in (q, k, v, out, dout)),
        *(lse.stride()[:2], None if dlse is None else dlse.stride()),
        *(None if grad is None else grad.stride()[:3] for grad in (dq, dk, dv)),
        *(bias_strides(full), keys_strides, parts_strides),
        *(spec.heads, spec.groups, spec.batch_outer, spec.batch_inner, spec.queries, spec.keys, spec.lo, spec.hi, spec.scale, splits),
    )
    constants = constants_of(spec, config, is_wide((q, k, v, out, dout, x.bias, x.mask, dq, dk, dv, x.second_bias)), step.precision)
    constants = constants | dict(zip(("VARIES_B0", "VARIES_B1", "VARIES_H"), varies, strict=True))
    constants = constants | {"ALONE": spec.groups == 1 and spec.queries <= config.block_m}
    return Call(kernels.short_backward, args, constants | _limit_of(config), config, step.programs)


def _limit_of(config: ShortConfig) -> dict[str, int]:
    """The registers of a thread, where several programs are to share an SM."""
    return {"maxnreg": config.launch_registers} if config.ctas_per_sm else {}


def _config_of(step: Step) -> ShortConfig:
    assert isinstance(step.config, ShortConfig)
    return step.config
