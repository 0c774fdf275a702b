"""Carrying a plan out: the only package that starts kernels. Called by ``ops.py``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import oracle, tiled
from ..plan.select import Plan
from ..spec import AttentionSpec

__all__ = ["record_launches", "run_backward", "run_forward"]

# Process-wide, because autograd runs the backward of GPU tensors on threads of its own.
_recorders: list[list[str]] = []


@contextmanager
def record_launches() -> Iterator[list[str]]:
    """Collect what runs within the block, in order, as ``"backend: kernel configuration"`` lines.

    >>> with triflash.record_launches() as ran:
    ...     out = flash_attn_func(q, k, v)
    >>> ran
    ['tiled: forward']
    """
    seen: list[str] = []
    _recorders.append(seen)
    try:
        yield seen
    finally:
        _recorders[:] = [r for r in _recorders if r is not seen]


def _record(plan: Plan) -> None:
    for recorder in _recorders:
        recorder.extend(f"{plan.backend}: {step}" for step in plan.steps)


def run_forward(
    plan: Plan, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, rest: Tensor | None
) -> None:
    """Fill ``out (B, M, H, Dv)``, ``lse (B, H, M)`` and, if given, ``rest (B, H, M)``."""
    options: dict[str, Any] = {"batch_inner": spec.batch_inner, "lo": spec.lo, "hi": spec.hi, "scale": spec.scale}
    if plan.backend == "triton":
        from . import triton

        triton.forward(plan, spec, q, k, v, bias, out, lse, rest)
    elif plan.backend == "hopper":
        from . import hopper

        hopper.forward(plan, spec, q, k, v, bias, out, lse, rest)
    elif plan.backend == "tiled":
        with _without_autocast(q):
            tiled.forward(q, k, v, bias, out=out, lse=lse, rest=rest, **options)
    else:
        with _without_autocast(q):
            dense_out, dense_lse = oracle.attention(q, k, v, bias, **options)
        out.copy_(dense_out)
        lse.copy_(dense_lse)
        if rest is not None:
            rest.zero_()  # its own backward pass differentiates the forward pass and reads no lse
    if _recorders:
        _record(plan)


def run_backward(
    plan: Plan,
    spec: AttentionSpec,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rest: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Fill those of dq, dk, dv, dbias that are given."""
    options: dict[str, Any] = {"batch_inner": spec.batch_inner, "lo": spec.lo, "hi": spec.hi, "scale": spec.scale}
    if plan.backend == "triton":
        from . import triton

        triton.backward(plan, spec, dout, dlse, q, k, v, bias, out, lse, rest, dq, dk, dv, dbias)
    elif plan.backend == "hopper":
        from . import hopper_backward

        hopper_backward.backward(plan, spec, dout, dlse, q, k, v, bias, out, lse, rest, dq, dk, dv, dbias)
    elif plan.backend == "tiled":
        with _without_autocast(q):
            tiled.backward(dout, dlse, q, k, v, bias, out, lse, rest, dq=dq, dk=dk, dv=dv, dbias=dbias, **options)
    else:
        with _without_autocast(q):
            _oracle_backward(dout, dlse, (q, k, v, bias), (dq, dk, dv, dbias), options)
    if _recorders:
        _record(plan)


def _without_autocast(q: Tensor) -> torch.autocast:
    """The kernels' arithmetic is float32 whatever the caller's autocast says; so is that of the backends in PyTorch."""
    return torch.autocast(q.device.type, enabled=False)


def _oracle_backward(
    dout: Tensor,
    dlse: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    gradients: tuple[Tensor | None, ...],
    options: dict[str, Any],
) -> None:
    """The gradients of the dense reference by autograd, of which only those asked for are computed."""
    with torch.enable_grad():
        # One leaf per argument, by position: q, k and v may be the very same tensor.
        inputs: list[Any] = [
            x if x is None or dx is None else x.detach().requires_grad_() for x, dx in zip(tensors, gradients, strict=True)
        ]
        outputs = oracle.attention(*inputs, **options)
    cotangents = (dout.to(outputs[0].dtype), torch.zeros_like(outputs[1]) if dlse is None else dlse.to(outputs[1].dtype))
    wanted = [(x, dx) for x, dx in zip(inputs, gradients, strict=True) if x is not None and dx is not None]
    reached = [(y, dy) for y, dy in zip(outputs, cotangents, strict=True) if y.requires_grad]  # the lse does not depend on v
    grads = torch.autograd.grad([y for y, _ in reached], [x for x, _ in wanted], [dy for _, dy in reached], allow_unused=True)
    for (_, dx), grad in zip(wanted, grads, strict=True):
        dx.zero_() if grad is None else dx.copy_(grad)
