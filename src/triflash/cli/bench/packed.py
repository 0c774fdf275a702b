"""Packed sequences in the bench: the lengths that are measured, drawn from a seed, and where each sequence lies."""

from __future__ import annotations

import functools
import math
import random
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["KINDS", "TOKENS", "lengths", "offsets", "places"]

# What each kind is, in a line, and how many tokens a batch has unless the command line says so.
KINDS = {
    "equal": "sequences of the length --s",
    "documents": "log-normal as the lengths of web pages, median 600, sigma 1.1, at most 8192",
    "uniform": "1 to 2048, each as likely",
    "tiny": "34 each",
    "one-long": "one with half of the tokens, among others of 128",
}
TOKENS = {"equal": 16384, "documents": 32768, "uniform": 32768, "tiny": 8192 * 34, "one-long": 32768}
MEDIAN, SIGMA, LONGEST = 600, 1.1, 8192  # of documents
MOST, TINY, SHORT = 2048, 34, 128  # of uniform, tiny and one-long


@functools.lru_cache(maxsize=64)
def lengths(kind: str, tokens: int, length: int = 0, seed: int = 0) -> tuple[int, ...]:
    """The lengths of sequences that have so many tokens in all: of a kind of :data:`KINDS`, the last one cut to fit.

    ``random.Random(seed)`` draws them, whose numbers are the same on every machine. length: of "equal" sequences.
    """
    generator = random.Random(seed)
    found: list[int] = []
    left = tokens
    if kind == "one-long":
        left -= tokens // 2
    while left > 0:
        if kind == "documents":
            own = min(max(round(generator.lognormvariate(math.log(MEDIAN), SIGMA)), 1), LONGEST)
        elif kind == "uniform":
            own = generator.randint(1, MOST)
        else:
            own = {"equal": length, "tiny": TINY, "one-long": SHORT}[kind]
        found.append(min(own, left))
        left -= found[-1]
    if kind == "one-long" and tokens > 1:
        found.insert(len(found) // 2, tokens // 2)
    return tuple(found)


def offsets(sequences: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sequence begins, and the end of the last: int32 ``(B + 1,)``."""
    return torch.tensor([0, *accumulate(sequences)], dtype=torch.int32, device=device)


def places(sequences: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each token the number of its sequence, and its position there."""
    own = torch.tensor(sequences, device=device)
    number = torch.repeat_interleave(torch.arange(len(sequences), device=device), own)
    begins = own.cumsum(0) - own
    return number, torch.arange(number.shape[0], device=device) - begins[number]
