"""Which probabilities dropout keeps, in plain PyTorch. Torch only; used by the backends ``oracle`` and ``tiled``.

A score's fate depends on (seed, offset, batch entry, query head, query, key) and on nothing else, so that every backend, kernel and tile
size drops the same ones and a backward pass can draw them again. ``kernels/triton/features.py`` computes the same bits.

Method: Philox with 7 rounds, counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): Philox-4x32 gives every
head of every batch entry a stream of its own, Philox-2x32 the bits of its scores. The latter costs a product and an exclusive or a round,
and its 64 bits are enough for four scores: those of two queries and two keys that lie 8 apart, which is what one thread holds of a tile's
scores in the Hopper kernels, transposed or not.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ROUNDS", "keep_mask", "philox2x32", "philox4x32", "rescale", "threshold"]

ROUNDS = 7  # the fewest that pass BigCrush
_WORD = 0xFFFFFFFF
_MULTIPLIER = 0xD256D193
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def threshold(p: float) -> int:
    """Of a 15-bit random number, below which a probability is dropped: p to the nearest multiple of 2^-15, but never all of them."""
    return min(round(p * 2**15), 2**15 - 1)


def rescale(p: float) -> float:
    """What a probability that is kept is multiplied by: one over the share that is, with p as :func:`threshold` takes it."""
    return 2**15 / (2**15 - threshold(p))


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words, in int64, for each counter of four such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def philox2x32(counter: tuple[Tensor, Tensor], key: Tensor) -> tuple[Tensor, Tensor]:
    """Two 32-bit words, in int64, for each counter of two such words."""
    c0, c1 = counter
    for _ in range(ROUNDS):
        high, low = _product(c0, _MULTIPLIER)
        c0, c1 = high ^ key ^ c1, low
        key = (key + _KEY_STEPS[0]) & _WORD
    return c0, c1


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of the product of two 32-bit words: in halves, because int64 does not hold it."""
    high = (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16
    return high, (a * b) & _WORD


def keep_mask(seed: Tensor, p: float, batch: int, heads: int, rows: slice, cols: slice, first: int = 0) -> Tensor:
    """``[batch, heads, rows, cols]`` bool, True where a probability is kept, which each is with probability ``1 - p``.

    seed: int64 ``(2,)``, seed and offset; or ``(6,)`` or ``(7,)``, where tensors are a part of a larger problem: seed, offset, the first
    query, key and head there, and its number of heads (the seventh is for kernels). first: the number of the first of the ``batch``
    entries. The stream of a head: the first two words (key, twist) of Philox-4x32 of the counter (batch entry and head, 0, offset) with the
    seed as key. The number of a score of query i and key j: of Philox-2x32 of the counter (j, i ^ twist), bit 3 of both i and j taken as 0,
    the word that bit 3 of i says, its upper or lower half as bit 3 of j says, without the half's highest bit.
    """
    entries, own = torch.arange(first, first + batch, device=seed.device), torch.arange(heads, device=seed.device)
    placed = seed.shape[0] > 2
    pair = (entries[:, None] * (seed[5] if placed else heads) + (own + seed[4] if placed else own)).flatten()
    low, high = seed & _WORD, (seed >> 32) & _WORD
    key, twist, _, _ = philox4x32((pair, torch.zeros_like(pair), low[1], high[1]), (low[0], high[0]))
    i = torch.arange(rows.start, rows.stop, device=seed.device)[:, None]
    j = torch.arange(cols.start, cols.stop, device=seed.device)
    if placed:
        i, j = i + seed[2], j + seed[3]
    words = philox2x32((j & ~8, (i & ~8) ^ twist[:, None, None]), key[:, None, None])
    number = torch.where((i & 8) == 0, *words) >> 2 * (j & 8) & 0x7FFF
    return (number >= threshold(p)).unflatten(0, (batch, heads))
