"""The demo's text: English that every CPython ships, or a file of the user's. Standard library and torch only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Corpus", "load", "read"]

HELD_OUT = 10  # one block in so many is for validation
_BLOCK = 4096  # bytes


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes to validate on, each a 1-dim uint8 tensor."""

    train: Tensor
    held_out: Tensor

    def batch(self, part: str, rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``rows`` random windows of the part as (inputs, the same shifted by one), both ``(rows, length)`` int64."""
        data = getattr(self, part)
        starts = torch.randint(len(data) - length, (rows,), generator=generator)
        windows = data[starts[:, None] + torch.arange(length + 1)].long()
        return windows[:, :-1], windows[:, 1:]


def read(path: Path | None = None) -> bytes:
    """The file's bytes, or the language reference that ``help()`` shows, each paragraph once (its topics quote each other).

    Raises:
        FileNotFoundError: this Python was packaged without ``pydoc_data``.
    """
    if path is not None:
        return path.read_bytes()
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError("this Python ships no pydoc_data.topics to train on; pass --text FILE") from None
    paragraphs: dict[str, None] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs |= dict.fromkeys(topics[name].strip().split("\n\n"))
    return "\n\n".join(paragraphs).encode()


def load(text: bytes, length: int) -> Corpus:
    """Split text into blocks and hold every tenth out.

    Raises:
        ValueError: the text is too short for windows of ``length`` bytes.
    """
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    blocks = list(data.split(max(_BLOCK, 2 * length)))
    held_out = blocks[HELD_OUT - 1 :: HELD_OUT]
    train = [block for i, block in enumerate(blocks) if i % HELD_OUT != HELD_OUT - 1]
    if not held_out or sum(map(len, held_out)) <= length:
        least = HELD_OUT * max(_BLOCK, 2 * length)
        raise ValueError(f"the text has {len(text)} bytes; windows of {length} need at least {least}")
    return Corpus(torch.cat(train), torch.cat(held_out))
