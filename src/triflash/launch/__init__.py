"""Carrying a plan out: the only package that starts kernels. Called by ``bound/``, which repeats what it finds here."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import oracle, tiled
from ..lengths import Places
from ..plan.select import Plan
from ..spec import AttentionSpec, Gradients, Operands, Saved
from . import sequences
from .calls import Call, on, sink_gradient, start
from .room import Real, Room

__all__ = ["backward_calls", "forward_calls", "on", "record", "record_launches", "recorders", "run_backward", "run_forward"]

# Process-wide, because autograd runs the backward of GPU tensors on threads of its own.
recorders: list[list[str]] = []


@contextmanager
def record_launches() -> Iterator[list[str]]:
    """Collect what runs within the block, in order, as ``"backend: kernel configuration"`` lines.

    >>> with triflash.record_launches() as ran:
    ...     out = flash_attn_func(q, k, v)
    >>> ran
    ['tiled: forward']
    """
    seen: list[str] = []
    recorders.append(seen)
    try:
        yield seen
    finally:
        recorders[:] = [r for r in recorders if r is not seen]


def record(plan: Plan) -> None:
    """Tell whoever is recording what ran."""
    for recorder in recorders:
        recorder.extend(f"{plan.backend}: {step}" for step in plan.steps)


def forward_calls(room: Room, plan: Plan, spec: AttentionSpec, x: Operands, saved: Saved) -> list[Call]:
    """The launches of a forward pass by kernels, on real tensors or meta tensors."""
    calls: list[Call] = _family(plan.backend == "hopper", False).forward(room, plan, spec, x, saved)
    return calls


def backward_calls(
    room: Room, plan: Plan, spec: AttentionSpec, x: Operands, saved: Saved, dout: Tensor, dlse: Tensor | None, grads: Gradients
) -> list[Call]:
    """The launches of a backward pass by kernels, on real tensors or meta tensors."""
    calls: list[Call] = _family(plan.backend == "hopper", True).backward(room, plan, spec, x, saved, dout, dlse, grads)
    return calls


@functools.cache  # an import of what is there takes a microsecond, too
def _family(is_hopper: bool, backward: bool) -> Any:
    """The launchers of a pass, which import Triton."""
    if not is_hopper:
        from . import triton

        return triton
    if backward:
        from . import hopper_backward

        return hopper_backward
    from . import hopper

    return hopper


def run_forward(plan: Plan, spec: AttentionSpec, x: Operands, saved: Saved, first_entry: int = 0) -> None:
    """Fill ``out (B, M, H, Dv)``, ``lse (B, H, M)`` and, if given, ``rest (B, H, M)``. first_entry: the number of the first batch entry."""
    if plan.backend in ("triton", "hopper"):
        room = Real(x.q)
        start(x.q.device, forward_calls(room, plan, spec, x, saved))
        room.finish()
    elif spec.batch == 0:
        pass
    elif spec.packed is not None:
        sequences.forward(spec, x, saved, lambda each, own: run_forward(plan, each.spec, each.operands, own, each.number))
    elif plan.backend == "tiled":
        with _without_autocast(x.q):
            tiled.forward(x.q, x.k, x.v, _scores(spec, x, first_entry), x.sink, **saved._asdict())
    else:
        with _without_autocast(x.q):
            dense_out, dense_lse = oracle.attention(**x.dense, **_options(spec, first_entry), shift=spec.shift)
        saved.out.copy_(dense_out)
        saved.lse.copy_(dense_lse)
        if saved.rest is not None:
            saved.rest.zero_()  # its own backward pass differentiates the forward pass and reads no lse


def run_backward(
    plan: Plan,
    spec: AttentionSpec,
    x: Operands,
    saved: Saved,
    dout: Tensor,
    dlse: Tensor | None,
    grads: Gradients,
    first_entry: int = 0,
) -> None:
    """Fill those of dq, dk, dv, dbias, dsink, dsecond that are given. first_entry: as of the forward pass."""
    if plan.backend in ("triton", "hopper"):
        room = Real(x.q)
        start(x.q.device, backward_calls(room, plan, spec, x, saved, dout, dlse, grads))
        room.finish()
    elif spec.batch == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
    elif spec.packed is not None:

        def run(each: sequences.Sequence, own: Saved, dout: Tensor, dlse: Tensor | None, part: Gradients) -> None:
            run_backward(plan, each.spec, each.operands, own, dout, dlse, part, each.number)

        sequences.backward(spec, x, saved, dout, dlse, grads, run)
    elif plan.backend == "tiled":
        with _without_autocast(x.q):
            scores = _scores(spec, x, first_entry)
            delta = tiled.delta_of(saved.out, dout, dlse, scores=scores)
            dq, dk, dv, dbias, _, dsecond = grads
            tiled.backward(dout, delta, x.q, x.k, x.v, scores, saved.lse, saved.rest, dq=dq, dk=dk, dv=dv, dbias=dbias, dsecond=dsecond)
            if grads.dsink is not None and x.sink is not None:
                grads.dsink.copy_(sink_gradient(x.sink, saved, delta))
    else:
        with _without_autocast(x.q):
            _oracle_backward(dout, dlse, x, grads, {**_options(spec, first_entry), "shift": spec.shift})


def _options(spec: AttentionSpec, first_entry: int) -> dict[str, Any]:
    """What is no tensor, as the backends in PyTorch name it."""
    return {
        "batch_inner": spec.batch_inner,
        "lo": spec.lo,
        "hi": spec.hi,
        "scale": spec.scale,
        "softcap": spec.softcap,
        "dropout_p": spec.dropout,
        "first_entry": first_entry,
    }


def _scores(spec: AttentionSpec, x: Operands, first_entry: int) -> tiled.Scores:
    options = _options(spec, first_entry)
    places = Places(x.query_starts, x.query_lengths, x.key_starts, x.diagonal, spec.shift)
    return tiled.Scores(x.bias, x.mask, x.key_lengths, x.alibi_slopes, x.dropout_seed, **options, second_bias=x.second_bias, places=places)


def _without_autocast(q: Tensor) -> torch.autocast:
    """The kernels' arithmetic is float32 whatever the caller's autocast says; so is that of the backends in PyTorch."""
    return torch.autocast(q.device.type, enabled=False)


_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCUDA)


def _oracle_backward(dout: Tensor, dlse: Tensor | None, x: Operands, given: Gradients, options: dict[str, Any]) -> None:
    """The gradients of the dense reference by autograd, of which only those asked for are computed."""
    names = ("q", "k", "v", "bias", "sink", "second_bias")
    # Autograd is left out of what a dispatch mode calls, such as FlopCounterMode's, and in inference mode: gradients would be 0.
    put_in, left_out = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch.inference_mode(False), torch.enable_grad(), torch._C._ForceDispatchKeyGuard(put_in, left_out - _AUTOGRAD):
        x = Operands._make([each.clone() if each is not None and each.is_inference() else each for each in x])
        # One leaf per argument, by position: q, k and v may be the very same tensor.
        leaves = {name: getattr(x, name).detach().requires_grad_() for name, grad in zip(names, given, strict=True) if grad is not None}
        outputs = oracle.attention(**x._replace(**leaves).dense, **options)
    cotangents = (dout.to(outputs[0].dtype), torch.zeros_like(outputs[1]) if dlse is None else dlse.to(outputs[1].dtype))
    reached = [(y, dy) for y, dy in zip(outputs, cotangents, strict=True) if y.requires_grad]  # the lse does not depend on v
    grads = torch.autograd.grad([y for y, _ in reached], list(leaves.values()), [dy for _, dy in reached], allow_unused=True)
    for name, grad in zip(leaves, grads, strict=True):
        target = given[names.index(name)]
        assert target is not None
        target.zero_() if grad is None else target.copy_(grad)
