"""Exact attention, dense: the semantics page in code, and the judge of every test. Torch only.

It materialises every score, so it is meant for small problems; ``backend("oracle")`` runs it for anyone who wants to rule triflash out.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LEAST_BIAS", "attention", "visible"]

# A bias below this counts as -inf, so that the least finite number, which some models write for "hidden", hides. The Triton kernels work in
# base 2, where such a bias overflows to -inf by itself: this is the float32 range divided by log2(e).
LEAST_BIAS = -torch.finfo(torch.float32).max / 1.4426950408889634


def visible(queries: int, keys: int, lo: int | None, hi: int | None, device: torch.device | None = None) -> Tensor:
    """``(queries, keys)`` bool: True where ``lo <= j - i <= hi``; None leaves a side open."""
    offset = torch.arange(keys, device=device)[None, :] - torch.arange(queries, device=device)[:, None]
    seen = torch.ones_like(offset, dtype=torch.bool)
    if lo is not None:
        seen &= offset >= lo
    if hi is not None:
        seen &= offset <= hi
    return seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    batch_inner: int = 1,
    lo: int | None = None,
    hi: int | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q kᵀ + bias) v`` and its log-sum-exp, every step in ``dtype``, differentiable by autograd.

    Args:
        q, k, v: ``(B, M, H, D)``, ``(B, N, H, D)``, ``(B, N, H, Dv)``.
        bias: ``(B0|1, B1|1, H|1, M|1, N|1)`` with ``B1 = batch_inner`` and ``B0 B1 = B``, or up to 4 dims that broadcast to
            ``(B, H, M, N)``; added unscaled; below -2.35e38 it counts as -inf. A bool bias is a mask, True = visible.
        lo, hi: key j is visible to query i when ``lo <= j - i <= hi``; None leaves a side open.
        scale: default ``1 / sqrt(D)``.
        dtype: what everything is computed in; float64 makes this the reference, the inputs' own dtype the "plain PyTorch" yardstick.

    Returns:
        out ``(B, M, H, Dv)`` and lse ``(B, H, M)``, natural log, both in ``dtype``. A query that sees no key gets out 0, lse -inf and
        gives zero gradient to everything.
    """
    batch, M, H, D = q.shape
    N = k.shape[1]
    scale = D**-0.5 if scale is None else scale
    s = torch.einsum("bmhd,bnhd->bhmn", q.to(dtype), k.to(dtype)) * scale
    if bias is not None:
        if bias.dim() == 5:
            bias = bias.expand(batch // batch_inner, batch_inner, H, M, N).reshape(batch, H, M, N)
        s = (
            s.masked_fill(~bias, -torch.inf)
            if bias.dtype == torch.bool
            else s + bias.to(dtype).masked_fill(bias.double() < LEAST_BIAS, -torch.inf)
        )
    s = s.masked_fill(~visible(M, N, lo, hi, q.device), -torch.inf)

    # Rows that see no key: the maximum is -inf and the sum 0; both are replaced before they can make a NaN.
    top = s.detach().amax(-1, keepdim=True) if N else s.new_full((batch, H, M, 1), -torch.inf)
    e = torch.exp(s - top.masked_fill(top == -torch.inf, 0.0))
    total = e.sum(-1, keepdim=True)
    seen = total > 0
    safe = total.masked_fill(~seen, 1.0)
    out = torch.einsum("bhmn,bnhd->bmhd", e / safe, v.to(dtype))
    lse = (top + torch.log(safe)).masked_fill(~seen, -torch.inf).squeeze(-1)
    return out, lse
