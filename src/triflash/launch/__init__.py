"""Carrying a plan out: the only package that starts kernels. Called by ``ops.py``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


def run_forward(plan: Plan, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """Fill ``out (B, M, H, Dv)`` and ``lse (B, H, M)``."""
    if _recorders:
        _record(plan)
    if plan.backend == "triton":
        from . import triton

        triton.forward(plan, spec, q, k, v, bias, out, lse)
        return
    options = dict(batch_inner=spec.batch_inner, lo=spec.lo, hi=spec.hi, scale=spec.scale)
    if plan.backend == "tiled":
        tiled.forward(q, k, v, bias, out=out, lse=lse, **options)  # type: ignore[arg-type]
    else:
        dense_out, dense_lse = oracle.attention(q, k, v, bias, **options)  # type: ignore[arg-type]
        out.copy_(dense_out)
        lse.copy_(dense_lse)


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
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Fill those of dq, dk, dv, dbias that are given."""
    if _recorders:
        _record(plan)
    if plan.backend == "triton":
        from . import triton

        triton.backward(plan, spec, dout, dlse, q, k, v, bias, out, lse, dq, dk, dv, dbias)
        return
    options = dict(batch_inner=spec.batch_inner, lo=spec.lo, hi=spec.hi, scale=spec.scale)
    if plan.backend == "tiled":
        tiled.backward(
            dout,
            dlse,
            q,
            k,
            v,
            bias,
            out,
            lse,
            dq=dq,
            dk=dk,
            dv=dv,
            dbias=dbias,
            **options,  # type: ignore[arg-type]
        )
        return
    grads_out = (dq, dk, dv, dbias)
    with torch.enable_grad():
        # One leaf per argument, by position: q, k and v may be the very same tensor.
        inputs = [x if x is None or dx is None else x.detach().requires_grad_() for x, dx in zip((q, k, v, bias), grads_out, strict=True)]
        outputs = oracle.attention(*inputs, **options)  # type: ignore[arg-type]
    cotangents = (dout.to(outputs[0].dtype), torch.zeros_like(outputs[1]) if dlse is None else dlse.to(outputs[1].dtype))
    wanted = [(x, dx) for x, dx in zip(inputs, grads_out, strict=True) if x is not None and dx is not None]
    grads = torch.autograd.grad(outputs, [x for x, _ in wanted], cotangents, allow_unused=True)
    for (_, dx), grad in zip(wanted, grads, strict=True):
        dx.zero_() if grad is None else dx.copy_(grad)
