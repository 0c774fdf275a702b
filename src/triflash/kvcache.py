"""Attention on a KV cache: a few new queries of each request, and all keys that its cache holds.

Method: FlashAttention (Dao et al. 2022); keys split over programs: Flash-Decoding (Dao et al. 2023); pages: PagedAttention (Kwon et al.
2023).
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, overload

from torch import Tensor

from .checks import check_bool
from .door_cache import attend_cache
from .hints import not_ours
from .varlen import near

__all__ = ["attention_with_kvcache"]


@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    page_table: Tensor | None = None,
    cache_index: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    cu_seqlens_new: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    num_splits: int | None = None,
    split_size: int | None = None,
    out: Tensor | None = None,
    return_lse: Literal[False] = False,
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    return_lse: Literal[True],
    cache_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    page_table: Tensor | None = None,
    cache_index: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    cu_seqlens_new: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    num_splits: int | None = None,
    split_size: int | None = None,
    out: Tensor | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    return_lse: bool,
    cache_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    page_table: Tensor | None = None,
    cache_index: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    cu_seqlens_new: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    num_splits: int | None = None,
    split_size: int | None = None,
    out: Tensor | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *more: Any,
    cache_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    page_table: Tensor | None = None,
    cache_index: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    cu_seqlens_new: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    num_splits: int | None = None,
    split_size: int | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    precision: str | None = None,
    backend: str | None = None,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention of new queries on the keys and values in a cache, which new ones may be appended to first, in place.

    For request b with ``N_b`` keys and query i of its m, which stands at position ``i' = N_b − m + i``: ``s = scale * q·k``;
    ``s = softcap * tanh(s / softcap)``; ``s += bias``; ``s -= slope * |i' − j|``; −inf where hidden; ``out = Σ exp(s − lse) v`` with
    ``lse = log(Σ exp(s) + exp(sink))``; each step only if it is asked for. ``N_b = clamp(cache_lengths[b], 0, capacity)`` and the new keys
    that fit behind those.

    Args:
        q: queries ``(B, Mq, Hq, D)``, or ``(Tq, Hq, D)`` with cu_seqlens_q; fp16, bf16 or fp32 (fp64 on backend ``tiled``). Any strides.
        k_cache: keys ``(B, N, Hk, D)``, or ``(pages, page_size, Hk, D)`` with page_table; q's dtype, or ``float8_e4m3fn`` beside a 16-bit
            q. Query head h reads key head ``h // (Hq // Hk)``. Read in place, whatever its strides.
        v_cache: values, likewise with Dv, which may differ from D.
        cache_lengths: integers ``(B,)``: keys in the cache before this call; default: all that it can hold, N or max_pages * page_size.
        key_starts: integers ``(B,)``: keys before are hidden (left padding). Does not move a query.
        page_table: int32 ``(B, max_pages)``: position j of request b is in page ``page_table[b, j // page_size]``. Pages may have any size
            and be shared. Entries past a request's length are not followed.
        cache_index: integers ``(B,)``: request b's entry of a contiguous cache, which may then have more entries, or fewer.
        cu_seqlens_q: int32 or int64 ``(B + 1,)``: request b's queries are rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` of q; on q's
            device, or on the CPU. max_seqlen_q: at least the longest request's queries; default Tq.
        k_new, v_new: ``(B, Mnew, Hk, D)`` and ``(B, Mnew, Hk, Dv)``, or packed ``(Tnew, Hk, D)`` with cu_seqlens_new; q's dtype. Written
            behind the keys in the cache before anything is attended to; what does not fit is dropped. Two requests that write to the same
            place leave it undefined.
        cu_seqlens_new: as cu_seqlens_q, of k_new and v_new.
        bias: added to the scaled scores, by position in the cache: ``(B|1, Hq|1, Mq|1, N|1)``, or its last 2 or 3 dims; fp16, bf16 or
            fp32, any strides. Its N may be any number from the longest ``N_b`` up; keys past it count as hidden. With cu_seqlens_q its Mq
            is any from the longest request's queries up. mask: bool, likewise, True = visible.
        causal: True hides from a query the keys behind its own position. window: ``(left, right)``: keys from ``i' − left`` to
            ``i' + right``; None or −1 leaves a side open.
        scale: default ``1 / sqrt(D)``; 0.0 means 0.0. softcap: bounds the scaled products to ±softcap; None or 0 does not.
        alibi_slopes: floats ``(Hq,)`` or ``(B, Hq)``. sink: floats ``(Hq,)``, a score that takes part in the softmax without a value.
        k_scale, v_scale: of ``float8_e4m3fn`` caches: a float, ``(Hk,)`` or ``(B, Hk)``. A key is ``k_scale * k_cache``; new ones are
            stored as ``k_new / k_scale``, saturating. Default 1.
        num_splits: into how many parts keys are split over programs; split_size: how many keys a part has. Neither changes a result beyond
            rounding; with split_size, the bits of a request do not depend on the others. Default: chosen for the device.
        out: where to write the result, ``(B, Mq, Hq, Dv)`` or ``(Tq, Hq, Dv)`` in q's dtype, of any strides; returned.
        return_lse: also return the natural log of the sum of exponentials of each query's visible scores, sink included.
        precision, backend: see ``triflash.attention``. Backends ``tiled`` and ``oracle`` read cu_seqlens_q.

    Returns:
        out ``(B, Mq, Hq, Dv)`` in q's dtype, or ``(out, lse)`` with lse ``(B, Hq, Mq)`` in float32 (float64 for float64). With cu_seqlens_q
        out ``(Tq, Hq, Dv)`` and lse ``(Hq, Tq)``. A query that sees no key, as of a request of length 0, gets 0 and −inf (with a sink: the
        sink); a row of q that no request owns 0 and −inf.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or option; the message names the argument. For a name that another package has
            for it (cache_seqlens, block_table, softmax_scale, …) it names ours.
        UnsupportedError: a gradient is wanted, of which a cache has none (call ``triflash.attention``); a transform of ``torch.func``;
            or no backend, or not the one that was asked for by name, can do this combination.

    The host reads no length and no table, so a captured CUDA graph replays with new ones. Wrong ones read nothing out of bounds (they are
    clamped) and write nothing outside a request's own places; with ``TRIFLASH_CHECK=1`` in the environment they are read and named. What
    lies past ``N_b`` or before key_starts may hold anything, NaN included; what only causal, a window, a mask or a −inf bias hides must be
    finite. Under autocast q, k_new and v_new take the caches' dtype.

    >>> out = attention_with_kvcache(q, k_cache, v_cache, cache_lengths=lengths, k_new=k, v_new=v, causal=True)
    """
    if more or others:
        raise not_ours("attention_with_kvcache", [*inspect.signature(attention_with_kvcache).parameters][3:], more, others)
    check_bool("return_lse", return_lse)
    if cu_seqlens_q is not None:
        cu_seqlens_q = near(q, "cu_seqlens_q", cu_seqlens_q)
    if cu_seqlens_new is not None:
        cu_seqlens_new = near(q, "cu_seqlens_new", cu_seqlens_new)
    given = (
        q, k_cache, v_cache, cache_lengths, key_starts, page_table, cache_index, cu_seqlens_q, cu_seqlens_new, bias, mask, alibi_slopes,
        sink, k_scale, v_scale, k_new, v_new, out,
    )  # fmt: skip
    options = (max_seqlen_q, causal, window, scale, softcap, num_splits, split_size, precision, backend)
    return attend_cache(given, options, return_lse)


# more and others are for errors alone: help() shows the rest.
_parameters = [each for each in inspect.signature(attention_with_kvcache).parameters.values() if each.name not in ("more", "others")]
attention_with_kvcache.__signature__ = inspect.signature(attention_with_kvcache).replace(parameters=_parameters)  # type: ignore[attr-defined]
