"""KV caches as serving programs store them: in pages, in 8 bits. Called by ``providers``, before anything is timed."""

from __future__ import annotations

import random

import torch
from torch import Tensor

__all__ = ["paged", "rounded", "stored"]

E4M3 = torch.float8_e4m3fn


def rounded(x: Tensor) -> Tensor:
    """To what 8 bits (e4m3) hold, in the same dtype; 16 bits hold that exactly."""
    return x.to(E4M3).to(x.dtype)


def stored(x: Tensor, fp8: bool) -> Tensor:
    """A cache ``(B, N, Hk, D)`` of numbers that 8 bits hold, in them."""
    return x.to(E4M3) if fp8 else x


def paged(k: Tensor, v: Tensor, page: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Caches ``(B, N, Hk, D)`` as ``(pages, page, Hk, D)``, in an order that a table ``(B, N / page)`` tells, which is drawn."""
    count = k.shape[0] * (k.shape[1] // page)
    order = list(range(count))
    random.Random(seed).shuffle(order)
    table = torch.tensor(order, dtype=torch.int32, device=k.device)
    found = []
    for x in (k, v):
        bits = x.contiguous().view(torch.uint8)  # what indexes has no 8-bit floats
        own = torch.empty_like(bits).view(count, page, *bits.shape[2:])
        own[table.long()] = bits.view(count, page, *bits.shape[2:])
        found.append(own.view(x.dtype))
    return found[0], found[1], table.view(k.shape[0], -1)
