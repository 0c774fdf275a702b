"""The CPU backend on a KV cache: ``tiled.py``'s recurrence over keys that lie in pages or entries. Torch only; called by ``launch/``."""

from __future__ import annotations

import torch
from torch import Tensor

from .oracle import LEAST_BIAS
from .slots import Keys, part
from .tiled import by_key_head, by_query_head, slices, tile_size

__all__ = ["forward"]

_LOG2E, _LN2 = 1.4426950408889634, 0.6931471805599453


def forward(
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
    out: Tensor,
    lse: Tensor,
    request: int | None = None,
    tile: int | None = None,
) -> None:
    """Fill ``out (B, M, Hq, Dv)`` and ``lse (B, Hq, M)`` of q ``(B, M, Hq, D)``.

    Query i of request b stands at ``N_b - M + i``. bias, mask ``(B|1, Hq|1, M|1, N|1)``; slopes ``(B|1, Hq)``; sink ``(Hq,)``.
    request: q and keys are of that one alone, bias, mask and slopes of all. On a CPU the walk over keys ends with the longest request.
    """
    batch, M, H, _ = q.shape
    kv_heads = keys.k_cache.shape[2]
    math = torch.float64 if q.dtype == torch.float64 else torch.float32
    tile = tile or tile_size(batch * H)
    if q.device.type == "cpu":
        capacity = min(capacity, int(keys.used.max())) if batch else 0
    if slopes is not None:
        slopes = slopes.to(math)[:, :, None, None] * _LOG2E
        slopes = slopes if request is None or slopes.shape[0] == 1 else slopes[request : request + 1]
    for rows in slices(0, M, tile):
        q_tile = by_key_head(q[:, rows].transpose(1, 2).to(math), kv_heads)
        m = torch.full((batch, H, rows.stop - rows.start, 1), -torch.inf, dtype=math, device=q.device)
        l = torch.zeros_like(m)
        if sink is not None:
            m, l = m.copy_(sink.to(math)[:, None, None] * _LOG2E), torch.ones_like(m)
        acc = m.new_zeros(*m.shape[:3], keys.v_cache.shape[3])
        at = (keys.used[:, None] - M + torch.arange(rows.start, rows.stop, device=q.device))[:, None, :, None]
        for cols in slices(0, capacity, tile):
            k, v = keys.block(cols, math)
            s = by_query_head(q_tile @ k.transpose(2, 3), H, rows)
            s = torch.tanh(s * (scale / softcap)).mul_(softcap * _LOG2E) if softcap else s.mul_(scale * _LOG2E)
            if bias is not None:
                own = part(bias, request, rows, cols).to(math)
                s.add_(own.masked_fill(own < LEAST_BIAS, -torch.inf), alpha=_LOG2E)
            offset = torch.arange(cols.start, cols.stop, device=q.device) - at  # [B, 1, BM, BN]
            if slopes is not None:
                s.sub_(slopes * offset.abs())
            hidden = keys.hidden(cols)[:, None, None]
            if mask is not None:
                hidden = hidden | ~part(mask, request, rows, cols)
            if left is not None:
                hidden = hidden | (offset < -left)
            if right is not None:
                hidden = hidden | (offset > right)
            s.masked_fill_(hidden, -torch.inf)
            m_new = torch.maximum(m, s.amax(-1, keepdim=True))
            m_safe = m_new.masked_fill(m_new == -torch.inf, 0.0)
            p = torch.exp2(s.sub_(m_safe))
            shrink = torch.exp2(m - m_safe)
            l = l * shrink + p.sum(-1, keepdim=True)
            acc = acc * shrink + by_query_head(by_key_head(p, kv_heads) @ v, H, rows)
            m = m_new
        unseen = l == 0
        l = l.masked_fill(unseen, 1.0)
        out[:, rows] = (acc / l).transpose(1, 2)
        lse[:, :, rows] = ((m + l.log2()) * _LN2).masked_fill(unseen, -torch.inf).squeeze(-1)
