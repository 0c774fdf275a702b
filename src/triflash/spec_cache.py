"""One call on a KV cache as plain numbers, as ``spec.py`` has it of attention: no tensors, hashable, canonical.

Called by ``arguments_cache.py``, ``plan/`` and ``launch/``. Torch and ``spec`` only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import bad_type, bad_value
from .spec import DTYPE_NAMES, INTEGERS, BiasSpec, resolve_precision

__all__ = ["FP8", "CacheOperands", "CacheSpec", "cache_spec_of"]

FP8 = torch.float8_e4m3fn
_NAMES = {**DTYPE_NAMES, FP8: "fp8"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_FLOATS = tuple(dtype for dtype in DTYPE_NAMES if dtype.is_floating_point)


class CacheOperands(NamedTuple):
    """The tensors of a call on a KV cache, canonical (:func:`cache_spec_of`). None: absent.

    q: ``(B, Mq, Hq, D)``, or ``(Tq, Hq, D)`` with offsets_q.
    k_cache: ``(B', N, Hk, D)``, or ``(pages, page_size, Hk, D)`` with page_table. v_cache: likewise with Dv.
    cache_lengths: ``(B,)``, keys in the cache before this call; None: all that it can hold. key_starts: ``(B,)``.
    page_table: int32 ``(B, max_pages)``. cache_index: ``(B,)``, a request's entry of a contiguous cache.
    offsets_q, offsets_new: ``(B + 1,)``, where a request's rows begin in packed queries, and in packed new keys.
    bias, mask: ``(B|1, Hq|1, Mq|1, N|1)``. alibi_slopes: ``(B|1, Hq)``. sink: ``(Hq,)``.
    k_scale, v_scale: float32 ``(B|1, Hk|1)``, of fp8 caches.

    Any strides. Integers are of any integer dtype but page_table's.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_lengths: Tensor | None = None
    key_starts: Tensor | None = None
    page_table: Tensor | None = None
    cache_index: Tensor | None = None
    offsets_q: Tensor | None = None
    offsets_new: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sink: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


@dataclass(frozen=True)
class CacheSpec:
    """Sizes and options of one call on a KV cache.

    ``dtype``: of q; ``cache_dtype``: of the caches, ``"fp8"`` among them. ``requests``: B. ``queries``: of each request, or what the caller
    says of the longest if they are packed. ``capacity``: keys that a request can hold, N or max_pages * page_size. ``page_size``: None for
    a contiguous cache. ``bias``, ``mask``: of their five dims the outer batch level is the request, and there is no inner one.

    Request b has ``N_b = min(clamp(cache_lengths[b], 0, capacity) + its new keys, capacity)`` keys, and its query i of m stands at
    ``N_b - m + i``: key j is visible when ``-left <= j - (N_b - m + i) <= right``; None leaves a side open.

    ``new``: keys that the call appends to each request, or the sum of them if they are packed; None: it appends none. ``lengths``,
    ``starts``, ``indexed``, ``packed_queries``, ``packed_new``, ``alibi``, ``sink``, ``k_scaled``, ``v_scaled``: whether there are such.
    ``contiguous_rows``: the last dim of both caches is contiguous. ``softcap``: 0 for none.
    ``num_splits``, ``split_size``: as asked for; None: the plan decides.
    """

    dtype: str
    cache_dtype: str
    requests: int
    queries: int
    capacity: int
    page_size: int | None
    heads: int
    groups: int
    head_dim: int
    value_dim: int
    bias: BiasSpec | None
    mask: BiasSpec | None
    left: int | None
    right: int | None
    scale: float
    softcap: float
    alibi: bool
    sink: bool
    lengths: bool
    starts: bool
    indexed: bool
    packed_queries: bool
    new: int | None
    k_scaled: bool
    v_scaled: bool
    num_splits: int | None
    split_size: int | None
    precision: str
    packed_new: bool = False
    contiguous_rows: bool = True

    @property
    def tensor_dtype(self) -> torch.dtype:
        """PyTorch's name of the dtype of q."""
        return _DTYPES[self.dtype]

    @property
    def kv_heads(self) -> int:
        return self.heads // self.groups

    @property
    def is_empty(self) -> bool:
        """No score to compute at all: outputs are empty, or every query sees no key."""
        return 0 in (self.requests, self.heads, self.queries, self.capacity)

    @property
    def extras(self) -> tuple[str, ...]:
        """What there is beyond q and the caches, in words."""
        named = {
            f"pages of {self.page_size}": self.page_size is not None,
            f"{self.heads} query heads on {self.kv_heads} key heads": self.groups > 1,
            "packed queries": self.packed_queries,
            "new keys": self.new is not None,
            "a bias": self.bias is not None,
            "a mask": self.mask is not None,
            "cache lengths": self.lengths,
            "key starts": self.starts,
            "a cache index": self.indexed,
            "ALiBi slopes": self.alibi,
            "a sink": self.sink,
            "a soft cap": self.softcap > 0,
            "an fp8 cache": self.cache_dtype == "fp8",
        }
        return tuple(name for name, there in named.items() if there)


def cache_spec_of(
    x: CacheOperands,
    left: int | None,
    right: int | None,
    scale: float,
    precision: str,
    softcap: float = 0.0,
    max_queries: int | None = None,
    new: int | None = None,
    num_splits: int | None = None,
    split_size: int | None = None,
) -> CacheSpec:
    """The spec of canonical operands. max_queries: of the longest request, if they are packed. new: as of :class:`CacheSpec`.

    The public faces have checked their arguments already, with better words; these comparisons guard the kernels from whoever calls the
    operators directly.
    """
    q, k, v = x.q, x.k_cache, x.v_cache
    packed = x.offsets_q is not None
    if q.dim() != (3 if packed else 4) or k.dim() != 4 or v.dim() != 4:
        raise bad_value("q, k_cache, v_cache", f"{3 if packed else 4}, 4 and 4 dims", f"{q.dim()}, {k.dim()} and {v.dim()}")
    H, D = q.shape[-2:]
    slots, size, kv_heads, _ = k.shape
    Dv = v.shape[3]
    if k.shape[3] != D or v.shape[:3] != k.shape[:3]:
        wanted = f"shapes ({slots}, {size}, {kv_heads}, {D}) and ({slots}, {size}, {kv_heads}, Dv)"
        raise bad_value("k_cache, v_cache", wanted, f"{tuple(k.shape)} and {tuple(v.shape)}")
    if kv_heads != H and (kv_heads == 0 or H % kv_heads):
        raise bad_value("k_cache, v_cache", f"a number of heads that divides q's {H}", kv_heads)
    B = x.offsets_q.shape[0] - 1 if x.offsets_q is not None else q.shape[0]
    if x.page_table is not None:
        capacity = x.page_table.shape[-1] * size
        if x.cache_index is not None:
            raise bad_value("cache_index", "None beside a page_table", "a tensor")
    else:
        capacity = size
        if x.cache_index is None and slots != B:
            raise bad_value("k_cache", f"one entry for each of {B} requests", slots)
    if q.dtype not in DTYPE_NAMES or k.dtype != v.dtype or (k.dtype != q.dtype and (k.dtype != FP8 or q.dtype.itemsize != 2)):
        raise bad_type("k_cache, v_cache", f"q's dtype {q.dtype}, or {FP8} beside 16 bits", f"{k.dtype} and {v.dtype}")
    if not -math.inf < scale < math.inf:
        raise bad_value("scale", "a finite number", scale)
    if not 0 <= softcap < math.inf:
        raise bad_value("softcap", "a finite number, 0 for none", softcap)
    wanted_shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "cache_lengths": ((B,),), "key_starts": ((B,),), "cache_index": ((B,),), "offsets_q": ((B + 1,),), "offsets_new": ((B + 1,),),
        "alibi_slopes": ((1, H), (B, H)), "sink": ((H,),),
    }  # fmt: skip
    scales = ((1, 1), (1, kv_heads), (B, 1), (B, kv_heads))
    for name, own in x._asdict().items():
        if own is None:
            continue
        if own.device != q.device:
            raise bad_value(name, f"q's device {q.device}", own.device)
        shapes = scales if name.endswith("_scale") else wanted_shapes.get(name)
        if name == "page_table":
            if own.dtype != torch.int32 or own.dim() != 2 or own.shape[0] != B:
                raise bad_value(name, f"int32 of shape ({B}, max_pages)", f"{own.dtype} of {tuple(own.shape)}")
        elif shapes is not None:
            dtypes = (torch.float32,) if name.endswith("_scale") else _FLOATS if name in ("alibi_slopes", "sink") else INTEGERS
            if own.dtype not in dtypes:
                raise bad_type(name, " or ".join(map(str, dtypes)), own.dtype)
            if tuple(own.shape) not in shapes:
                raise bad_value(name, f"shape {' or '.join(map(str, shapes))}", tuple(own.shape))
    rows = q.shape[0] if packed else q.shape[1]
    queries = rows if not packed or max_queries is None else min(max(max_queries, 1), rows)
    mask = x.mask
    if mask is not None and mask.dtype != torch.bool:
        raise bad_type("mask", "a bool tensor", mask.dtype)
    if x.bias is not None and x.bias.dtype == torch.bool:
        raise bad_type("bias", "numbers", x.bias.dtype)
    # Bounds that hide nothing are open; kernels add the others to 32-bit positions, so those are kept near the sizes.
    if left is not None:
        left = None if left >= capacity + rows else max(left, -capacity - rows)
    if right is not None:
        right = None if right >= rows - 1 else max(right, -capacity - rows)
    return CacheSpec(
        dtype=_NAMES[q.dtype],
        cache_dtype=_NAMES[k.dtype],
        requests=B,
        queries=queries,
        capacity=capacity,
        page_size=None if x.page_table is None else size,
        heads=H,
        groups=H // kv_heads if H and kv_heads else 1,
        head_dim=D,
        value_dim=Dv,
        bias=_bias_spec("bias", x.bias, B, H, None if packed else rows),
        mask=_bias_spec("mask", mask, B, H, None if packed else rows),
        left=left,
        right=right,
        scale=float(scale),
        softcap=float(softcap),
        alibi=x.alibi_slopes is not None,
        sink=x.sink is not None,
        lengths=x.cache_lengths is not None,
        starts=x.key_starts is not None,
        indexed=x.cache_index is not None,
        packed_queries=packed,
        new=new,
        k_scaled=x.k_scale is not None,
        v_scaled=x.v_scale is not None,
        num_splits=num_splits,
        split_size=split_size,
        precision=resolve_precision(precision) if q.dtype == torch.float32 else "ieee",
        packed_new=x.offsets_new is not None,
        contiguous_rows=all(cache.stride(3) == 1 or cache.shape[3] == 1 for cache in (k, v)),
    )


def _bias_spec(name: str, bias: Tensor | None, requests: int, heads: int, queries: int | None) -> BiasSpec | None:
    """queries: None if they are packed, when a bias has any number. Of keys it has any number; a size of 1 is shared by all."""
    if bias is None:
        return None
    if bias.dim() != 4 or bias.shape[0] not in (1, requests) or bias.shape[1] not in (1, heads):
        raise bad_value(name, f"shape ({requests}|1, {heads}|1, Mq|1, N|1)", tuple(bias.shape))
    B, H, M, N = bias.shape
    if queries is not None and M not in (1, queries):
        raise bad_value(name, f"1 or {queries} queries", M)
    if bias.dtype not in DTYPE_NAMES:
        raise bad_type(name, f"one of {', '.join(DTYPE_NAMES.values())}", bias.dtype)
    return BiasSpec(DTYPE_NAMES[bias.dtype], (requests == B, True, heads == H, M != 1 or queries == M, N != 1))
