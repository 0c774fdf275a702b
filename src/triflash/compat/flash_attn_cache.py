"""FlashAttention-2's ``flash_attn_with_kvcache``, by triflash. Imported by ``flash_attn.py``, which has the other functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import band_of
from ..checks import check_bool, check_key_lengths, refuse_layout
from ..errors import bad_type, bad_value
from ..kvcache import attention_with_kvcache
from .words import renamed

__all__ = ["flash_attn_with_kvcache"]

_WORDS = {
    "k_new": "k", "v_new": "v", "cache_lengths": "cache_seqlens", "cache_index": "cache_batch_idx", "key_starts": "cache_leftpad",
    "page_table": "block_table", "window": "window_size", "scale": "softmax_scale", "return_lse": "return_softmax_lse",
}  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention on a KV cache that k and v are appended to first, with flash_attn 2.8's arguments, by
    ``triflash.attention_with_kvcache``.

    Args:
        q: ``(batch, seqlen_q, nheads, headdim)``; fp16, bf16 or fp32.
        k_cache, v_cache: ``(batch_cache, seqlen_cache, nheads_k, headdim)``, or ``(num_blocks, page_block_size, nheads_k, headdim)`` with
            block_table; pages of any size. v's head dim may be another.
        k, v: ``(batch, seqlen_new, nheads_k, headdim)``: written into the caches at cache_seqlens, in place; needs cache_seqlens.
        rotary_cos, rotary_sin: ``(seqlen_ro, rotary_dim / 2)``: k is rotated at positions cache_seqlens, cache_seqlens + 1, … before it
            is stored, and q likewise; q at cache_seqlens throughout if neither causal nor a window is given, as there. Needs k and v.
        cache_seqlens: keys in the cache before the call: integers ``(batch,)``, or one for all. Default: seqlen_cache.
        cache_batch_idx: integers ``(batch,)``: entries of the cache. cache_leftpad: integers ``(batch,)``: where keys begin.
        block_table: int32 ``(batch, max_num_blocks_per_seq)``.
        softmax_scale, causal, window_size, softcap, alibi_slopes: see ``flash_attn_func``; aligned to the last key, the new ones
            included.
        rotary_interleaved: True rotates dims 0 and 1, 2 and 3, … (GPT-J), False those half of rotary_dim apart (GPT-NeoX).
        num_splits: into how many parts keys are split; below 1: chosen here. return_softmax_lse: also return the log-sum-exp.

    Returns:
        out ``(batch, seqlen_q, nheads, headdim)``, or ``(out, softmax_lse)`` with softmax_lse ``(batch, nheads, seqlen_q)``, float32. A
        query that sees no key gets 0 and −inf (FlashAttention: 0 and +inf). New rows that do not fit are dropped.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or option. UnsupportedError: a gradient is wanted; there is none.
    """
    check_bool("causal", causal), check_bool("return_softmax_lse", return_softmax_lse)
    for name, x, length, heads in (("q", q, "seqlen_q", "nheads"), ("k", k, "seqlen_new", "nheads_k"), ("v", v, "seqlen_new", "nheads_k")):
        refuse_layout(name, x)
        if not isinstance(x, Tensor) and (name == "q" or x is not None):
            raise bad_type(name, "a tensor", type(x).__name__)
        if x is not None and x.dim() != 4:
            raise bad_value(name, f"4 dims (batch, {length}, {heads}, headdim)", f"{x.dim()} dims {tuple(x.shape)}")
    if k is not None and cache_seqlens is None:
        raise bad_value("cache_seqlens", "how many keys there are before k and v", None)
    lengths: Any = cache_seqlens
    if isinstance(cache_seqlens, int) and not isinstance(cache_seqlens, bool):
        if not -(2**63) <= cache_seqlens < 2**63:
            raise bad_value("cache_seqlens", "a number of keys", cache_seqlens)
        lengths = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int64, device=q.device)
    check_key_lengths(lengths, q, (q.shape[0],), "cache_seqlens")
    cap: Any = None if isinstance(softcap, (int, float)) and softcap <= 0 else softcap
    if (rotary_cos is None) != (rotary_sin is None):
        raise bad_value("rotary_sin" if rotary_sin is None else "rotary_cos", "a tensor beside the other", None)
    if rotary_cos is not None and rotary_sin is not None:
        if k is None:
            raise bad_value("k", "a tensor beside rotary_cos", None, "without new keys rotate q yourself")
        _check_rotary(rotary_cos, rotary_sin, q, k)
        try:
            band = band_of(False, window_size)
        except (ValueError, TypeError) as error:
            raise renamed(error, _WORDS) from None
        moves = causal or band.left is not None or band.right is not None
        interleaved = check_bool("rotary_interleaved", rotary_interleaved)
        q = _rotated(q, rotary_cos, rotary_sin, lengths, interleaved, moves)
        k = _rotated(k, rotary_cos, rotary_sin, lengths, interleaved, True)
    lse: bool = return_softmax_lse
    try:
        return attention_with_kvcache(
            q, k_cache, v_cache, cache_lengths=lengths, key_starts=cache_leftpad, page_table=block_table, cache_index=cache_batch_idx,
            k_new=k, v_new=v, causal=causal, window=window_size, scale=softmax_scale,
            softcap=cap, alibi_slopes=alibi_slopes,
            num_splits=None if type(num_splits) is int and num_splits < 1 else num_splits, return_lse=lse,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise renamed(error, _WORDS) from None


def _check_rotary(cos: Tensor, sin: Tensor, q: Tensor, k: Tensor) -> None:
    if k.shape[0] != q.shape[0] or k.shape[-1] != q.shape[-1]:
        raise bad_value("k", f"(batch={q.shape[0]}, seqlen_new, nheads_k, headdim={q.shape[-1]})", tuple(k.shape))
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise bad_type(name, "a tensor of floats", str(x.dtype) if isinstance(x, Tensor) else type(x).__name__)
        if x.dim() != 2 or not 0 < 2 * x.shape[1] <= q.shape[-1] or x.shape[0] < 1 or x.device != q.device:
            got = f"{tuple(x.shape)} on {x.device}"
            raise bad_value(name, f"(seqlen_ro, rotary_dim / 2) with a rotary_dim up to {q.shape[-1]} on {q.device}", got)
    if sin.shape != cos.shape:
        raise bad_value("rotary_sin", f"rotary_cos's shape {tuple(cos.shape)}", tuple(sin.shape))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, begins: Tensor, interleaved: bool, moves: bool) -> Tensor:
    """x ``(B, M, H, D)`` rotated by float32 angles at positions ``begins[b] + i``, or with ``moves`` False all at ``begins[b]``.

    The pair (a, b) becomes ``(a cos − b sin, a sin + b cos)``. Positions behind the tables take their last row.
    """
    at = begins.long()[:, None] + torch.arange(x.shape[1], device=x.device) * int(moves)
    at = at.clamp(0, cos.shape[0] - 1)
    c, s = (table[at].float()[:, :, None] for table in (cos, sin))
    dims = 2 * cos.shape[1]
    turned, kept = x[..., :dims].float(), x[..., dims:]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    a, b = a * c - b * s, a * s + b * c
    turned = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    return torch.cat([turned.to(x.dtype), kept], -1)
