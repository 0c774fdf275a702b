"""The judge: when is a result close enough to the float64 reference? The only statement of it: used by the tests and by the bench's gate.

The rule is the FlashAttention projects': no further from the float64 reference than a small multiple of what the same formula in plain
PyTorch is in the same dtype, and close in relative norm as well. Two effects have nothing to do with the quality of a kernel, so both
limits are raised by them:

- *Rounding* of float32 arithmetic and of the final store. Where plain PyTorch happens to be exact (one query and one key: softmax is 1 and
  ds is 0) any rounding at all would be infinitely worse. Its size is the formula evaluated on absolute values, times a few float32 ulps.
- *The stored output.* The backward pass of every flash attention forms ``delta = rowsum(out * dout)`` from the output as it was stored.
  The effect of rounding ``out`` to its dtype is computed exactly, in float64, rather than allowed for by a constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RELATIVE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-10}
OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
FLOAT32_ULPS = 4.0
STORED_FACTOR = 2.0  # a kernel's own stored output differs from the rounded reference by about as much again


@dataclass(frozen=True)
class Judgement:
    """What one result is held against."""

    reference: Tensor  # float64
    plain: Tensor  # the same formula in plain PyTorch
    factor: float
    dtype: torch.dtype  # of the arithmetic's inputs: sets the limit on the relative norm
    slack: Tensor | float = 0.0  # per element: rounding and stored-output effects, as the module's docstring says


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to the dtype."""
    return torch.finfo(dtype).eps / 2


def assert_close(name: str, got: Tensor, judgement: Judgement) -> None:
    """Raise AssertionError with both errors, their limits and the worst coordinate unless ``got`` is as close as the rule wants it."""
    problem = disagreement(got, judgement)
    assert problem is None, f"{name}: {problem}"


def disagreement(got: Tensor, judgement: Judgement) -> str | None:
    """What is wrong with ``got``, or None."""
    reference, plain = judgement.reference.detach(), judgement.plain.detach()
    if got.shape != reference.shape:
        return f"shape {tuple(got.shape)}, wanted {tuple(reference.shape)}"
    if got.numel() == 0:
        return None
    infinite = reference.isinf()
    error = torch.where(infinite, (got.double() != reference).double(), (got.double() - reference).abs())
    plain_error = torch.where(infinite, 0.0, (plain.double() - reference).abs())
    if not plain_error.isfinite().all():
        return "the plain yardstick itself is not finite: choose inputs that it survives"
    size = torch.where(infinite, 0.0, reference)
    slack = judgement.slack + unit_roundoff(got.dtype) * size.abs()
    largest_slack = slack.max().item()
    worst_at = tuple(int(i) for i in torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape))
    worst = f"worst at {worst_at}: got {got[worst_at].item():.9g}, wanted {reference[worst_at].item():.9g}"
    if not error.isfinite().all():
        return f"{int((~error.isfinite()).sum())} of {error.numel()} elements are not finite; {worst}"
    limit = judgement.factor * plain_error.max().item() + largest_slack
    if error.max().item() > limit:
        parts = f"plain {plain_error.max().item():.3e}, slack {largest_slack:.3e}"
        return f"largest error {error.max().item():.3e} exceeds {limit:.3e} ({parts}); {worst}"
    if size.norm() < plain_error.norm():
        return None  # the reference is zero but for cancellation (a bias of one column only shifts its rows): no relative norm of nothing
    limit = RELATIVE[judgement.dtype] * size.norm().item() + slack.norm().item()
    if error.norm().item() > limit:
        return f"norm of the error {error.norm().item():.3e} exceeds {limit:.3e}; {worst}"
    return None


@dataclass(frozen=True)
class Gradients:
    """By the closed formula, in float64: dq, dk, dv, ds (of the scores, ``[B, H, M, N]``) and delta (``[B, H, M]``)."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    ds: Tensor
    delta: Tensor


def closed_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    out: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    scale: float,
    slope: Tensor | None = None,
    kept: Tensor | None = None,
) -> Gradients:
    """``ds = p (dout vᵀ - rowsum(out dout) + dlse)`` and what follows, without autograd, for any ``out``.

    ``slope`` is the derivative of a function that the scaled products went through before the bias was added (a soft cap); None is 1.
    ``kept`` is what dropout multiplied the probabilities by.
    """
    delta = torch.einsum("bmhd,bmhd->bhm", out, dout)
    if dlse is not None:
        delta = delta - dlse
    dp = torch.einsum("bmhd,bnhd->bhmn", dout, v)
    ds = p * ((dp if kept is None else dp * kept) - delta[..., None])
    return _spread(q, k, p if kept is None else p * kept, dout, ds, scale, slope, delta)


def rounding_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    p: Tensor,
    out: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    scale: float,
    slope: Tensor | None = None,
    kept: Tensor | None = None,
) -> Gradients:
    """The same on absolute values: multiply by a unit roundoff to bound what rounding can do. ``s`` enters as the error of ``exp(s)``."""
    q, k, v, out, dout = (x.abs() for x in (q, k, v, out, dout))
    p = p * (1 + s.nan_to_num(posinf=0.0, neginf=0.0).abs())
    delta = torch.einsum("bmhd,bmhd->bhm", out, dout)
    if dlse is not None:
        delta = delta + dlse.abs()
    dp = torch.einsum("bmhd,bnhd->bhmn", dout, v)
    ds = p * ((dp if kept is None else dp * kept) + delta[..., None])
    return _spread(q, k, p if kept is None else p * kept, dout, ds, abs(scale), slope, delta)


def _spread(q: Tensor, k: Tensor, p: Tensor, dout: Tensor, ds: Tensor, scale: float, slope: Tensor | None, delta: Tensor) -> Gradients:
    inner = ds if slope is None else ds * slope
    return Gradients(
        dq=scale * torch.einsum("bhmn,bnhd->bmhd", inner, k),
        dk=scale * torch.einsum("bhmn,bmhd->bnhd", inner, q),
        dv=torch.einsum("bhmn,bmhd->bnhd", p, dout),
        ds=ds,
        delta=delta,
    )
