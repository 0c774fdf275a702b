"""Which probabilities dropout keeps, in plain PyTorch. Torch only; used by the backends ``oracle`` and ``tiled``.

A score's fate depends on (seed, offset, batch entry, query head, query, key) and on nothing else, so that every backend, kernel and tile
size drops the same ones and a backward pass can draw them again. ``kernels/triton/features.py`` computes the same bits.

Method: Philox-4x32 with 7 rounds, counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ROUNDS", "keep_mask", "philox", "threshold"]

ROUNDS = 7  # the fewest that pass BigCrush
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def threshold(p: float) -> int:
    """Of a 31-bit random number, below which a probability is dropped."""
    return min(int(p * 2**31), 2**31 - 1)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words, in int64, for each counter of four such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of the product of two 32-bit words: in halves, because int64 does not hold it."""
    high = (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16
    return high, (a * b) & _WORD


def keep_mask(seed: Tensor, p: float, batch: int, heads: int, rows: slice, cols: slice) -> Tensor:
    """``[batch, heads, rows, cols]`` bool, True where a probability is kept, which each is with probability ``1 - p``.

    seed: int64 ``(2,)``, seed and offset. Philox's key is the seed, its high word mixed with the offset's; its counter is (key index // 4,
    query, batch entry and head, offset's low word); the key index modulo 4 picks the word.
    """
    first, last = cols.start // 4, -(-cols.stop // 4)
    c0 = torch.arange(first, last, device=seed.device)
    c1 = torch.arange(rows.start, rows.stop, device=seed.device)[:, None]
    c2 = torch.arange(batch * heads, device=seed.device)[:, None, None]
    c3 = seed[1] & _WORD
    key = seed[0] & _WORD, ((seed[0] >> 32) ^ (seed[1] >> 32)) & _WORD
    words = torch.stack(torch.broadcast_tensors(*philox((c0, c1, c2, c3), key)), -1).flatten(-2)
    return (words[..., cols.start - 4 * first :][..., : cols.stop - cols.start] >> 1 >= threshold(p)).unflatten(0, (batch, heads))
