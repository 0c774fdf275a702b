"""Results over parts of the keys, put together, in any dtype and with gradients: ``merge_states`` calls it.

``kernels/triton/combine.py`` is the same as a kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rest import split_rest

__all__ = ["combine"]


def combine(outs: Tensor, lses: Tensor, rests: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``lse = log Σ exp(lse_t)``, ``out = Σ exp(lse_t − lse) out_t``.

    Args:
        outs: ``(parts, *, M, H, Dv)``. lses: ``(parts, *, H, M)``. rests: what each lse lost when it was rounded, in base 2, as forward
            passes keep it; None: nothing.

    Returns:
        out in lses' dtype and lse; 0 and −inf of a query that no part saw a key for.
    """
    unseen = (lses == -math.inf).all(0)
    high = lses.masked_fill(unseen, 0.0)
    low = torch.zeros_like(high) if rests is None else (torch.add(*split_rest(rests)) * math.log(2.0)).masked_fill(lses == -math.inf, 0.0)
    # Two steps: beside a huge lse, what its rounding lost tells two parts apart. Neither maximum has a gradient.
    top = high.detach().amax(0)
    above = ((high - top) + low).detach().amax(0)
    weights = torch.exp(((high - top) + low) - above)
    total = weights.sum(0)
    lse = (top + (above + torch.log(total))).masked_fill(unseen, -math.inf)
    shares = (weights / total).masked_fill(unseen, 0.0).transpose(-1, -2).unsqueeze(-1)
    return (shares * outs.to(lses.dtype)).sum(0), lse
