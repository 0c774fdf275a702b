"""What a float32 lse lost of ``m + log2 l`` when it was stored, in one more float32. Torch only; called by ``tiled``, ``combine``,
``launch`` and ``distributed``. Kernels have the same in kernels/triton/prims.py (``join_rest``, ``split_rest``).

lse, read again in base 2, misses the maximum m by d: 0, or as much as two neighbouring float32s are apart, which beside scores of 10¹⁴ and
more leaves no room for log2 l in ``d + log2 l``. There rest is ``d (1 + log2 l / 128)``: d is a power of two, and can be told apart again.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["join_rest", "rest_of", "split_rest"]

_FAR = 256.0  # from here on d is a power of two, because distances of float32s there are; below there is room for a sum, to 2^-16
_ROOM, _WHOLE = 64.0, 128.0  # more than log2 l, and what it is a part of: less than half, so that rounding to one bit finds d


def join_rest(off: Tensor, log2_sum: Tensor) -> Tensor:
    """rest of ``d`` and ``log2 l``, of any float dtype."""
    far = (off.abs() > _FAR) & (log2_sum >= 0) & (log2_sum < _ROOM)
    return torch.where(far, off * (1 + log2_sum / _WHOLE), off + log2_sum)


def split_rest(rest: Tensor) -> tuple[Tensor, Tensor]:
    """``(d, log2 l)`` of rest: first d is to be added to lse in base 2, which gives m exactly. (0, rest) where rest is a sum."""
    far = rest.abs() >= 2 * _FAR
    power = (rest.float().view(torch.int32) & -(2**23)).view(torch.float32)  # sign and exponent: d, since the factor is less than 2
    return torch.where(far, power, 0.0), torch.where(far, (rest / power - 1) * _WHOLE, rest)


def rest_of(whole: Tensor, lse_log2: Tensor) -> Tensor:
    """float32 rest of ``m + log2 l``, given in float64, beside lse as it is read again in base 2."""
    lost = whole - lse_log2.double()
    mantissa, exponent = torch.frexp(lost.abs())
    exponent = torch.where((lost > 0) | (mantissa == 0.5), exponent - 1, exponent)
    off = torch.ldexp(torch.sign(lost), exponent)  # the power of two above which lost is log2 l
    return join_rest(torch.where(off.abs() > _FAR, off, 0.0), torch.where(off.abs() > _FAR, lost - off, lost)).float()
