"""The launch that puts new keys and values into a KV cache. Called by ``launch/cache.py`` when one runs: it imports Triton's kernels."""

from __future__ import annotations

from torch import Tensor

from ..kernels.triton import append as kernels
from ..plan.kernels.append import CONFIG, programs
from ..spec_cache import CacheOperands, CacheSpec
from .calls import Call

__all__ = ["append_calls"]


def append_calls(spec: CacheSpec, x: CacheOperands, k_new: Tensor, v_new: Tensor) -> list[Call]:
    """k_new, v_new: as of :func:`triflash.slots.append`; none for an empty problem."""
    k, v = x.k_cache, x.v_cache
    slots, size, heads, D = k.shape
    rows = k_new.shape[0] if spec.packed_new else k_new.shape[0] * k_new.shape[1]
    if 0 in (rows, heads, slots, spec.capacity, spec.requests):
        return []
    constants = {"BLOCK": CONFIG.block_m, "D": D, "DV": v.shape[3], "ROUNDS": spec.requests.bit_length() if spec.packed_new else 0}
    scales = [stride for own in (x.k_scale, x.v_scale) for stride in _shared(own)]
    args = (
        k, v, k_new, v_new, x.cache_lengths, x.page_table, x.cache_index, x.offsets_new, x.k_scale, x.v_scale,
        k.stride(), v.stride(), _four(k_new), _four(v_new), (0, 0) if x.page_table is None else x.page_table.stride(),
        tuple(0 if own is None else own.stride(0) for own in (x.cache_lengths, x.cache_index, x.offsets_new)), tuple(scales),
        rows, k_new.shape[1] if k_new.dim() == 4 else 1, spec.requests, slots, size,
        0 if x.page_table is None else x.page_table.shape[1], heads,
    )  # fmt: skip
    return [Call(kernels.append, args, constants, CONFIG, programs(rows, heads))]


def _four(x: Tensor) -> tuple[int, ...]:
    return x.stride() if x.dim() == 4 else (0, *x.stride())


def _shared(x: Tensor | None) -> tuple[int, int]:
    """Strides of a scale ``(B|1, Hk|1)``, 0 where it is shared."""
    return (0, 0) if x is None else (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0)
