"""Which tensors the launches of a call copy, by the rules of ``plan/layout.py``. Asked by ``explainer.py``; copies nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .explanation import Copy
from .launch.calls import address_of
from .plan import layout
from .plan.device import DeviceFacts
from .plan.select import Plan
from .spec import AttentionSpec, Operands

__all__ = ["copies_of"]

_Found = tuple[str, int, str]  # tensor, bytes, reason
_PADDED = "its rows are not a multiple of 16 bytes, so it is written with padding and copied from there"
_TMA_REASON = "TMA reads rows that are contiguous and start at multiples of 16 bytes"


def copies_of(plans: Sequence[Plan], spec: AttentionSpec, device: DeviceFacts, x: Operands) -> tuple[Copy, ...]:
    """The copies of q, k, v, the bias and the mask, and of what kernels write, in the passes of the plans: forward, or both.

    Taken as contiguous are the output's gradient, which nobody knows yet, and the gradients, which a backward pass allocates.
    """
    passes: dict[_Found, list[str]] = {}
    for name, plan in zip(("forward", "backward"), plans, strict=False):
        for found in _in_pass(plan, spec, device, x):
            passes.setdefault(found, []).append(name)
    return tuple(Copy(*found, tuple(names)) for found, names in passes.items())


def _in_pass(plan: Plan, spec: AttentionSpec, device: DeviceFacts, x: Operands) -> Iterator[_Found]:
    """Backends in PyTorch read any layout, and a plan without steps reads nothing."""
    if plan.steps and plan.backend == "triton":
        yield from _portable(device, x)
    elif plan.steps and plan.backend == "hopper":
        yield from _hopper(plan, spec, x)


def _portable(device: DeviceFacts, operands: Operands) -> Iterator[_Found]:
    for name, x in zip("qkv", operands[:3], strict=True):
        if layout.copies_rows(x.size(-1), x.stride(-1)):
            yield name, x.numel() * x.element_size(), "its last dim is not contiguous"
    for name, bias in (("bias", operands.bias), ("mask", operands.mask)):
        if bias is not None and device.arch not in ("cpu", "interpreter"):
            shape, strides = bias.shape, bias.stride()
            if layout.copies_bias(shape, strides, address_of(bias)):
                reason = f"its rows are not a multiple of {layout.BIAS_STRIDE} elements apart, or do not start at 16 bytes"
                yield name, math.prod(layout.copied_bias_shape(shape, strides)) * bias.element_size(), reason


def _hopper(plan: Plan, spec: AttentionSpec, operands: Operands) -> Iterator[_Found]:
    q, k, v, bias, mask, *_ = operands
    for name, x in (("q", q), ("k", k), ("v", v)):
        if name != "q" and spec.key_lengths:
            yield (
                name,
                x.numel() * x.element_size(),
                "keys beyond a length may hold anything, and kernels load some of them: they are zeroed",
            )
        else:
            yield from _for_tma(name, x.shape, x.stride(), x)
    if bias is not None and spec.bias is not None and spec.bias.varies[4]:
        yield from _for_tma("bias", layout.tma_bias_shape(bias.shape, bias.stride()), bias.stride(), bias)
    if mask is not None:
        yield from _for_tma("mask", layout.tma_bias_shape(mask.shape, mask.stride()), mask.stride(), mask)
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device="meta")
    if plan.step("forward"):
        yield from _written("out", out)
        return
    yield from _for_tma("dout", out.shape, out.stride(), out)
    gives = {name for step in plan.steps for name in step.gives}
    for name, x in (("dq", q), ("dk", k), ("dv", v)):
        if name in gives:
            yield from _written(name, x)
    if bias is not None and any(step.kernel == "dq" and "dbias" in step.gives for step in plan.steps):
        yield from _written("dbias", bias)


def _written(name: str, like: Tensor) -> Iterator[_Found]:
    """A fresh contiguous tensor of that shape and dtype, where TMA cannot write it."""
    if not layout.tma_writable(like.shape, _contiguous(like.shape), like.element_size(), 0):
        yield name, math.prod(layout.tma_padded(like.shape, like.element_size())) * like.element_size(), _PADDED


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))


def _for_tma(name: str, shape: Sequence[int], strides: Sequence[int], x: Tensor) -> Iterator[_Found]:
    if not layout.tma_addressable(shape, strides, x.element_size(), address_of(x)):
        yield name, math.prod(layout.tma_padded(shape, x.element_size())) * x.element_size(), _TMA_REASON
