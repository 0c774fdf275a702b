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
_TMA_REASON = "TMA reads rows that are contiguous and start at multiples of 16 bytes"


def copies_of(plans: Sequence[Plan], spec: AttentionSpec, device: DeviceFacts, x: Operands) -> tuple[Copy, ...]:
    """The copies of q, k, v, the bias and the mask, and of the output, in the passes of the plans: forward, or forward and backward."""
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
        yield from _hopper(spec, x)


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


def _hopper(spec: AttentionSpec, operands: Operands) -> Iterator[_Found]:
    q, k, v, bias, *_ = operands
    for name, x in (("q", q), ("k", k), ("v", v)):
        yield from _for_tma(name, x.shape, x.stride(), x)
    if bias is not None and spec.bias is not None and spec.bias.varies[4]:
        yield from _for_tma("bias", layout.tma_bias_shape(bias.shape, bias.stride()), bias.stride(), bias)
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device="meta")
    if not layout.tma_addressable(out.shape, out.stride(), out.element_size(), 0):
        nbytes = math.prod(layout.tma_padded(out.shape, out.element_size())) * out.element_size()
        yield "out", nbytes, "its rows are not a multiple of 16 bytes, so it is written with padding and copied from there"


def _for_tma(name: str, shape: Sequence[int], strides: Sequence[int], x: Tensor) -> Iterator[_Found]:
    if not layout.tma_addressable(shape, strides, x.element_size(), address_of(x)):
        yield name, math.prod(layout.tma_padded(shape, x.element_size())) * x.element_size(), _TMA_REASON
