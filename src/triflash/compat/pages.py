"""Packed queries on keys and values in pages: what a ``block_table`` of FlashAttention's and PyTorch's varlen functions asks for.

Called by ``flash_attn.py`` and ``torch_varlen.py``; imports the front door of caches, the offsets' way to a device, and errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import bad_type
from ..kvcache import attention_with_kvcache
from ..varlen import near
from .words import renamed

__all__ = ["attend_pages"]


def attend_pages(
    q: Tensor, k: Tensor, v: Tensor, offsets: Any, used: Any, names: Mapping[str, str], max_q: Any, return_lse: bool, **options: Any
) -> Any:
    """``attention_with_kvcache`` of sequences whose keys are as many as ``used`` says, or the offsets' differences; no gradients.

    names: what the caller has for the arguments, ``offsets`` and ``used`` among them.
    """
    by_offsets = used is None
    if by_offsets:
        if not isinstance(offsets, Tensor) or offsets.dim() != 1:
            got = f"{offsets.dim()} dims" if isinstance(offsets, Tensor) else type(offsets).__name__
            raise bad_type(names["offsets"], "offsets of the keys, (B + 1,)", got)
        used = near(q, names["offsets"], offsets).diff()
    words = {**names, "cache_lengths": names["offsets" if by_offsets else "used"]}
    try:
        return attention_with_kvcache(q, k, v, cache_lengths=used, max_seqlen_q=max_q, return_lse=return_lse, **options)
    except (ValueError, TypeError) as error:
        raise renamed(error, words) from None
