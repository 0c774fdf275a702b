"""Rows that hold several sequences, and chunks of one: read off the mask functions that transformers builds, for ``lean_mask``.

transformers composes a mask of functions of indices. Those that are known here say that visible keys are blocks along the diagonal, which
``triflash.attention_varlen`` computes, or that all queries stand in one block, of which a cache holds the keys so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Parts", "chunk_starts", "offsets_of", "parts_of"]


@dataclass(frozen=True)
class Parts:
    """What a causal mask function is made of.

    window: how many keys a query sees at most. chunk: their length, and left: the padding ``(B,)`` before the first. sequences: integers
    ``(B, N)`` that differ from sequence to sequence of a row; positions: in them, likewise.
    """

    window: int | None = None
    chunk: int | None = None
    left: Tensor | None = None
    sequences: Tensor | None = None
    positions: Tensor | None = None
    causal: bool = False


def parts_of(function: Callable[..., Any] | None) -> Parts | None:
    """The parts of a mask function of transformers'; None if it has one that is not known."""
    name = getattr(function, "__qualname__", "")
    if function is None or name == "causal_mask_function":
        return Parts(causal=True)
    if getattr(function, "__module__", "") != "transformers.masking_utils":
        return None
    held = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))
    within = name.partition(".")[0]
    if within == "and_masks":
        return _together([parts_of(each) for each in held["mask_functions"]])
    if within == "sliding_window_overlay":
        return Parts(window=held["sliding_window"])
    if within == "chunked_overlay":
        return Parts(chunk=held["chunk_size"], left=held["left_padding"])
    if within == "packed_sequence_mask_function":
        return Parts(sequences=held["packed_sequence_mask"])
    if within == "remap_positions_for_packed_sequence":
        inner = parts_of(held["mask_function"])
        return None if inner is None else replace(inner, positions=held["position_ids"])
    return None


def _together(parts: list[Parts | None]) -> Parts | None:
    found: dict[str, Any] = {}
    for each in parts:
        if each is None:
            return None
        given = {name: x for name, x in vars(each).items() if x is not None and x is not False}
        if found.keys() & given.keys() - {"causal"}:
            return None
        found |= given
    return Parts(**found)


def offsets_of(parts: Parts, B: int, N: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """(cu_seqlens, seqused_k) of ``attention_varlen`` for B rows of N tokens, one behind the other; None if padding leaves holes in a
    block.

    mask: bool ``(B, tokens so far)``, False is padding. The device is read twice a forward pass: how many blocks there are, and what
    padding hides.
    """
    if parts.positions is not None:
        device = parts.positions.device
    else:
        assert parts.left is not None
        device = parts.left.device
    begins = torch.zeros(B, N, dtype=torch.bool, device=device)
    begins[:, 0] = True
    if parts.sequences is not None:
        begins[:, 1:] |= parts.sequences[:, 1:] != parts.sequences[:, :-1]
    if parts.chunk is not None:
        at = torch.arange(N, device=device).expand(B, N) if parts.positions is None else parts.positions
        left = at.new_zeros(B) if parts.left is None else parts.left
        begins |= (at - left[:, None]) % parts.chunk == 0
    begins, used = begins.flatten(), None
    if mask is not None:
        mask = torch.nn.functional.pad(mask.to(torch.bool), (0, max(0, N - mask.shape[1])))[:, :N].flatten()
        holes = (mask[1:] & ~mask[:-1] & ~begins[1:]).any()
        some, hides = torch.stack([holes, ~mask.all()]).tolist()
        if some:
            return None
        used = mask if hides else None
    offsets = torch.nn.functional.pad(begins.nonzero()[:, 0], (0, 1), value=B * N)
    if used is None:
        return offsets, None
    return offsets, torch.nn.functional.pad(used.cumsum(0), (1, 0))[offsets].diff()


def chunk_starts(parts: Parts, M: int, q_offset: int | Tensor, kv_offset: int | Tensor, reads: bool) -> Tensor | None:
    """The first key ``(B,)`` that M queries see, if all of an entry stand in one chunk. reads: whether tensors may be looked at, which more
    than one query asks for.
    """
    assert parts.chunk is not None and parts.left is not None
    first = q_offset - parts.left
    chunk = first.div(parts.chunk, rounding_mode="floor")
    if M > 1 and not (reads and torch.equal(chunk, (first + M - 1).div(parts.chunk, rounding_mode="floor"))):
        return None
    return (chunk * parts.chunk + parts.left - kv_offset).clamp(min=0)
