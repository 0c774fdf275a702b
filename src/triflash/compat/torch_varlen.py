"""PyTorch's ``torch.nn.attention.varlen.varlen_attn`` by triflash, with the arguments of all its releases from 2.10 to 2.14.

Called by programs. docs/migration.md says what differs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import check_bool, refuse_layout
from ..errors import UnsupportedError, bad_type, bad_value
from ..varlen import attention_varlen
from .pages import attend_pages
from .words import renamed, unless_open

__all__ = ["varlen_attn"]

_NAMES = {
    "q": "query", "k": "key", "v": "value", "cu_seqlens_q": "cu_seq_q", "cu_seqlens_k": "cu_seq_k", "max_seqlen_q": "max_q",
    "max_seqlen_k": "max_k", "window": "window_size",
}  # fmt: skip
_PAGED = _NAMES | {"offsets": "cu_seq_k", "used": "seqused_k", "k_cache": "key", "v_cache": "value", "page_table": "block_table"}


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: Any = None,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Any:
    """Attention of sequences packed one behind the other, by ``triflash.attention_varlen``.

    Args:
        query: ``(Tq, Hq, D)``; fp16, bf16, fp32, or fp64 on backend ``tiled``; any head dim, any strides, on a CPU too.
        key: ``(Tk, Hk, D)``. value: ``(Tk, Hk, Dv)``.
        cu_seq_q, cu_seq_k: int32 or int64 ``(N + 1,)``: sequence n is rows ``cu_seq[n]`` to ``cu_seq[n + 1]``.
        max_q, max_k: hints; results do not depend on them.
        is_causal: (2.10) hides key j from query i where ``j > i + n_k − n_q``, the lengths of their sequence.
        return_aux: PyTorch's ``AuxRequest``, or whatever has a ``lse`` that is true or false.
        scale: default ``1 / sqrt(D)``.
        window_size: ``(left, right)``, −1 leaves a side open, ``(-1, 0)`` is causal; aligned to the bottom right of each sequence.
        enable_gqa: Hk may be less than Hq, which it divides.
        seqused_k: integers ``(N,)``: how many of a sequence's keys count; has a backward pass here.
        block_table: int32 ``(N, max_pages)``: key and value are pages ``(pages, page_size, Hk, D)`` of any size, seqused_k (or else
            cu_seq_k, which may be None) says how many keys a sequence has, max_q must be no less than the longest, and there are no
            gradients.
        num_splits: None or 1: keys are never split; others are an UnsupportedError. Beside a block_table the number of parts.

    Returns:
        out ``(Tq, Hq, Dv)``, or ``(out, lse)`` with lse ``(Hq, Tq)``, float32, differentiable. A query that sees no key gets 0 and −inf.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or option. UnsupportedError: ``num_splits``, gradients beside ``block_table``.
    """
    if num_splits not in (None, 1) and block_table is None:
        raise UnsupportedError(f"num_splits={num_splits}: triflash does not split the keys of a sequence; leave it out, or pass 1")
    if cu_seq_k is None and (block_table is None or seqused_k is None):
        raise bad_value("cu_seq_k", "offsets of the keys", None, "it may be None beside a block_table and seqused_k alone")
    for name, x in (("query", query), ("key", key)):
        refuse_layout(name, x)
    dims = ((query, 3), (key, 3 if block_table is None else 4))
    heads = [x.shape[-2] if isinstance(x, Tensor) and x.dim() == dim else None for x, dim in dims]
    if not check_bool("enable_gqa", enable_gqa) and None not in heads and heads[0] != heads[1]:
        raise bad_value("key", f"query's {heads[0]} heads", heads[1], "enable_gqa=True allows fewer")
    wants_lse = False if return_aux is None else getattr(return_aux, "lse", None)
    if not isinstance(wants_lse, bool):
        raise bad_type("return_aux", "torch.nn.attention.varlen.AuxRequest or None", repr(return_aux))
    check_bool("is_causal", is_causal)
    if block_table is not None:
        return attend_pages(
            query, key, value, cu_seq_k, seqused_k, _PAGED, max_q, wants_lse, page_table=block_table, cu_seqlens_q=cu_seq_q,
            causal=is_causal, window=window_size, scale=scale, num_splits=num_splits,
        )  # fmt: skip
    try:
        return attention_varlen(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, seqused_k=seqused_k, causal=is_causal,
            window=unless_open(window_size), scale=scale, return_lse=wants_lse,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise renamed(error, _NAMES) from None
