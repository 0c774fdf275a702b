"""What a backward pass is given besides its inputs, checked: operators are called directly, too. Called by their bodies."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import bad_type, bad_value
from .spec import Saved

__all__ = ["check_gradients", "check_saved"]


def check_saved(q: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None, saved: Saved) -> None:
    """What a backward pass is given besides its inputs: dout and out (B, M, H, Dv) like q, lse, rest and dlse (B, H, M)."""
    out, lse, rest = saved
    B, M, H, _ = q.shape
    for name, tensor, shape in (
        ("dout", dout, (B, M, H, v.shape[3])),
        ("out", out, (B, M, H, v.shape[3])),
        ("lse", lse, (B, H, M)),
        ("rest", rest, (B, H, M)),
        ("dlse", dlse, (B, H, M)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise bad_value(name, f"shape {shape}", tuple(tensor.shape))
        if tensor.device != q.device:
            raise bad_value(name, f"q's device {q.device}", tensor.device)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    dtypes = (("dout", dout, q.dtype), ("out", out, q.dtype), ("lse", lse, lse_dtype), ("rest", rest, torch.float32))
    for name, tensor, dtype in dtypes:
        if tensor is not None and tensor.dtype != dtype:
            raise bad_type(name, str(dtype), tensor.dtype)


def check_gradients(inputs: dict[str, Tensor | None], gradients: dict[str, Tensor | None], saved: dict[str, Tensor]) -> None:
    """Tensors for gradients to be written to: each the shape, dtype and device of its input; any strides, but memory of its own."""
    for (name, x), (grad_name, grad) in zip(inputs.items(), gradients.items(), strict=True):
        if grad is None:
            continue
        if x is None or x.dtype == torch.bool:
            raise bad_value(
                grad_name, "None", "a tensor", f"there is no {name} to differentiate by" if x is None else "a mask has no gradient"
            )
        if grad.dtype != x.dtype:
            raise bad_type(grad_name, f"{name}'s dtype {x.dtype}", grad.dtype)
        if grad.shape != x.shape or grad.device != x.device:
            raise bad_value(grad_name, f"{name}'s shape {tuple(x.shape)} on {x.device}", f"{tuple(grad.shape)} on {grad.device}")
        if any(stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True)):
            raise bad_value(grad_name, "memory of its own for every element", "an expanded tensor (a stride of 0)")
    taken: dict[int, str] = {}
    for name, tensor in (*inputs.items(), *saved.items(), *gradients.items()):
        if tensor is None or not tensor.numel():
            continue
        if name in gradients and taken.get(tensor.data_ptr(), name) != name:
            raise bad_value(name, "memory of its own", f"that of {taken[tensor.data_ptr()]}", "kernels write it while they read the others")
        taken[tensor.data_ptr()] = name
