"""Key lengths, which are integers of any dtype, for the backends in PyTorch. Torch only."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["comparable"]


def comparable(lengths: Tensor) -> Tensor:
    """The lengths as int64, which PyTorch compares positions with; what an int64 has no room for is the largest that there is."""
    x = lengths.to(torch.int64)
    return torch.where(x < 0, torch.iinfo(torch.int64).max, x) if lengths.dtype == torch.uint64 else x
