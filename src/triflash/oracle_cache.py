"""Exact attention on a KV cache, dense: keys are gathered, and the semantics page's code does the rest. Called by ``launch/cache.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from . import oracle
from .slots import Keys, part

__all__ = ["attention"]


def attention(
    q: Tensor,
    keys: Keys,
    bias: Tensor | None,
    mask: Tensor | None,
    slopes: Tensor | None,
    sink: Tensor | None,
    *,
    capacity: int,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float,
    request: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """out ``(B, M, Hq, Dv)`` and lse ``(B, Hq, M)`` in ``dtype``; arguments as of :func:`triflash.tiled_cache.forward`."""
    M = q.shape[1]
    rows, cols = slice(0, M), slice(0, capacity)
    k, v = (x.transpose(1, 2) for x in keys.block(cols, dtype))
    at = (keys.used[:, None] - M + torch.arange(M, device=q.device))[:, None, :, None]
    offset = torch.arange(capacity, device=q.device) - at  # (B, 1, M, N)
    seen = ~keys.hidden(cols)[:, None, None].expand(offset.shape)
    if left is not None:
        seen = seen & (offset >= -left)
    if right is not None:
        seen = seen & (offset <= right)
    if mask is not None:
        seen = seen & part(mask, request, rows, cols)
    distances = None
    if slopes is not None:
        slopes = slopes if request is None or slopes.shape[0] == 1 else slopes[request : request + 1]
        distances = -slopes.to(dtype)[:, :, None, None] * offset.abs().to(dtype)
    own = None if bias is None else part(bias, request, rows, cols)
    return oracle.attention(q, k, v, own, mask=seen, second_bias=distances, sink=sink, scale=scale, softcap=softcap, dtype=dtype)
