"""Every check of a call on a KV cache, and its options folded, as ``arguments.py`` has them of attention.

Called by ``door_cache.py``. Computes next to nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import band_of, check_offsets
from .checks import (
    check_dtype_and_place,
    check_heads,
    check_key_lengths,
    check_number,
    check_scale,
    check_sink,
    check_slopes,
    check_tensors,
    refuse_foreign,
    same,
    same_device_and_dtype,
)
from .errors import UnsupportedError, bad_type, bad_value
from .plan.select import check_backend, requested_backend
from .spec import resolve_precision
from .spec_cache import FP8, CacheOperands

__all__ = [
    "CacheGiven",
    "CacheOptions",
    "CheckedCache",
    "check_own_memory",
    "check_requests",
    "checked_cache",
    "operands_of",
    "refuse_gradients",
]

_CACHE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, FP8)


class CacheGiven(NamedTuple):
    """The tensors of a call as given."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_lengths: Tensor | None = None
    key_starts: Tensor | None = None
    page_table: Tensor | None = None
    cache_index: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_new: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sink: Tensor | None = None
    k_scale: float | Tensor | None = None
    v_scale: float | Tensor | None = None
    k_new: Tensor | None = None
    v_new: Tensor | None = None
    out: Tensor | None = None


class CacheOptions(NamedTuple):
    """What a caller writes beside the tensors, as given."""

    max_seqlen_q: int | None = None
    causal: bool | str = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    num_splits: int | None = None
    split_size: int | None = None
    precision: str | None = None
    backend: str | None = None


@dataclass(frozen=True)
class CheckedCache:
    """One such call, checked: its options, folded. new: as of :class:`~triflash.spec_cache.CacheSpec`."""

    left: int | None
    right: int | None
    scale: float
    softcap: float
    precision: str
    backend: str
    max_queries: int | None
    new: int | None
    num_splits: int | None
    split_size: int | None

    @property
    def numbers(self) -> tuple[Any, ...]:
        """As :func:`~triflash.spec_cache.cache_spec_of` takes them."""
        return (
            self.left, self.right, self.scale, self.precision, self.softcap, self.max_queries, self.new, self.num_splits, self.split_size
        )  # fmt: skip


def checked_cache(given: CacheGiven, options: CacheOptions) -> CheckedCache:
    """The errors of :func:`triflash.attention_with_kvcache`, or its call in one canonical meaning. No length and no table is read."""
    max_queries, causal, window, scale, softcap, num_splits, split_size, precision, backend = options
    if not torch.compiler.is_compiling():
        for name, x in zip(CacheGiven._fields, given, strict=True):
            refuse_foreign(name, x)
    q, k, v = given[:3]
    packed, paged = given.cu_seqlens_q is not None, given.page_table is not None
    _check_rows("q", q, packed, "cu_seqlens_q", "Tq", "B", "Mq")
    at = "pages page_size" if paged else "slots N"
    sizes = check_tensors(
        {"q": q, "k_cache": k, "v_cache": v},
        {"q": "Tq H D" if packed else "B M H D", "k_cache": f"{at} Hk D", "v_cache": f"{at} Hk Dv"},
    )
    H, Hk = sizes["H"], sizes["Hk"]
    check_heads("k_cache", Hk, H)
    same_device_and_dtype({"q": q})
    for name, cache in (("k_cache", k), ("v_cache", v)):
        if cache.device != q.device:
            raise bad_value(name, f"q's device {q.device}", cache.device)
        if cache.dtype not in _CACHE_DTYPES:
            raise bad_type(name, f"q's dtype {q.dtype}, or {FP8}", cache.dtype)
    if v.dtype != k.dtype:
        raise bad_type("v_cache", f"k_cache's dtype {k.dtype}", v.dtype)
    fp8 = k.dtype == FP8
    if fp8 and q.dtype.itemsize != 2:
        raise bad_type("q", f"float16 or bfloat16, as the caches are {FP8}", q.dtype, "cast it, k_new and v_new to 16 bits")
    if not fp8 and k.dtype != q.dtype:
        raise bad_type("k_cache", f"q's dtype {q.dtype}, or {FP8}", k.dtype, "cast q to the caches' dtype")
    if packed:
        B = check_offsets("cu_seqlens_q", given.cu_seqlens_q, q, None)
    else:
        B = sizes["B"]
    _check_place(given, q, k, B)
    for name in ("cache_lengths", "key_starts"):
        check_key_lengths(getattr(given, name), q, (B,), name)
    new = _check_new(given, q, k, v, B, sizes)
    queries = None if packed else sizes["M"]
    for name, extra in (("bias", given.bias), ("mask", given.mask)):
        _check_extra(name, extra, q, B, H, queries)
    if given.bias is not None and given.bias.dtype == torch.bool and given.mask is not None:
        raise bad_type("bias", "numbers beside a mask", given.bias.dtype, "pass one mask: mask=bias & mask")
    check_slopes(given.alibi_slopes, q, (B,), H)
    check_sink(given.sink, q, H)
    _check_scale_of_cache("k_scale", given.k_scale, q, B, Hk, fp8)
    _check_scale_of_cache("v_scale", given.v_scale, q, B, Hk, fp8)
    _check_out(given, q, sizes["Dv"])
    if not isinstance(causal, bool):
        hint = "queries stand at the end of their request's keys" if causal == "top_left" else ""
        raise bad_type("causal", "True or False", repr(causal), hint)
    band = band_of(causal, window)
    for name, count, least in (("max_seqlen_q", max_queries, 0), ("num_splits", num_splits, 1), ("split_size", split_size, 1)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, (int, torch.SymInt))):
            raise bad_type(name, f"an integer from {least} up, or None", repr(count))
        if count is not None and count < least:
            raise bad_value(name, f"an integer from {least} up, or None", count)
    if num_splits is not None and split_size is not None:
        raise bad_value("split_size", "None beside num_splits", split_size, "one says how many parts, the other how long they are")
    if max_queries is not None and not packed:
        raise bad_value("max_seqlen_q", "None without cu_seqlens_q", max_queries, f"every request has q's {queries} queries")
    cap = 0.0 if softcap is None else check_number("softcap", softcap, 0.0, math.inf, "a positive number, or None (or 0) for none")
    if backend is not None:
        check_backend("backend", backend)
    if precision is not None:
        resolve_precision(precision)
    elif q.dtype == torch.float32 and not torch.compiler.is_compiling():
        precision = resolve_precision("")
    return CheckedCache(
        band.left, band.right, check_scale("scale", scale, sizes["D"]), cap, precision or "", backend or requested_backend(), max_queries,
        new, num_splits, split_size,
    )  # fmt: skip


def operands_of(given: CacheGiven) -> CacheOperands:
    """The canonical operands of checked tensors: views, but for scales that are no float32."""
    bias, mask = _four(given.bias), _four(given.mask)
    if bias is not None and bias.dtype == torch.bool:  # a mask in the bias's place
        bias, mask = None, bias
    slopes, Hk = given.alibi_slopes, given.k_cache.shape[2]
    scales = [_wide(x, Hk, given.q.device) for x in (given.k_scale, given.v_scale)]
    return CacheOperands(*given[:9], bias, mask, slopes if slopes is None or slopes.dim() == 2 else slopes[None], given.sink, *scales)


def refuse_gradients(given: CacheGiven) -> None:
    """A cache is written in place and has no backward pass."""
    if not torch.is_grad_enabled():
        return
    for name, x in zip(CacheGiven._fields, given, strict=True):
        if isinstance(x, Tensor) and x.requires_grad:
            raise UnsupportedError(
                f"gradients by {name}: attention_with_kvcache has none; call triflash.attention(q, k, v) with keys and values as tensors "
                f"for them, or attend under torch.no_grad() (or pass {name}.detach())"
            )


def _four(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dim() == 4 else x[(None,) * (4 - x.dim())]


def _wide(scale: float | Tensor | None, heads: int, device: torch.device) -> Tensor | None:
    """A scale as float32 ``(B|1, Hk|1)``."""
    if scale is None:
        return None
    if not isinstance(scale, Tensor):
        return torch.full((1, 1), float(scale), dtype=torch.float32, device=device)
    scale = scale.float()
    return scale if scale.dim() == 2 else scale.reshape(1, -1)


def _check_rows(name: str, x: Any, packed: bool, offsets: str, total: str, batch: str, rows: str) -> None:
    """That a tensor of rows has a batch dim, or is packed."""
    if not isinstance(x, Tensor):
        raise bad_type(name, "a tensor", type(x).__name__)
    wanted = f"3 dims ({total}, heads, dim) with {offsets}" if packed else f"4 dims ({batch}, {rows}, heads, dim)"
    if x.dim() != (3 if packed else 4):
        hint = f"packed rows come with {offsets}" if x.dim() == 3 else ""
        raise bad_value(name, wanted, f"{x.dim()} dims {tuple(x.shape)}", hint)


def _check_place(given: CacheGiven, q: Tensor, k: Tensor, B: int) -> None:
    """Check what says where a request's keys lie."""
    table, index, slots = given.page_table, given.cache_index, k.shape[0]
    if table is not None:
        if not isinstance(table, Tensor) or table.dtype != torch.int32:
            there = isinstance(table, Tensor)
            got = str(table.dtype) if there else type(table).__name__
            raise bad_type("page_table", "an int32 tensor", got, "page_table.int() makes one" if there else "")
        if table.dim() != 2 or table.shape[0] != B or table.device != q.device:
            got = f"{tuple(table.shape)} on {table.device}"
            raise bad_value("page_table", f"a row of pages for each request, shape (B={B}, max_pages) on {q.device}", got)
        if index is not None:
            raise bad_value("cache_index", "None beside a page_table", "a tensor", "reorder the table's rows: page_table[cache_index]")
        if k.shape[1] < 1 or (slots < 1 and table.shape[1] > 0):
            raise bad_value("k_cache", "pages of at least one key, and at least one of them", tuple(k.shape))
        return
    check_key_lengths(index, q, (B,), "cache_index")
    if index is None and slots != B:
        raise bad_value("k_cache", f"one entry for each of the {B} requests", slots, "cache_index= or page_table= says where others lie")
    if index is not None and slots < 1 and B > 0:
        raise bad_value("k_cache", "at least one entry", slots)


def _check_new(given: CacheGiven, q: Tensor, k: Tensor, v: Tensor, B: int, sizes: dict[str, int]) -> int | None:
    """Check the new keys and values, and say how many there are of a request, or of all if they are packed."""
    k_new, v_new, offsets = given.k_new, given.v_new, given.cu_seqlens_new
    if k_new is None and v_new is None:
        if offsets is not None:
            raise bad_value("cu_seqlens_new", "None without k_new and v_new", "a tensor")
        return None
    for name, x, other in (("v_new", v_new, "k_new"), ("k_new", k_new, "v_new")):
        if x is None:
            raise bad_value(name, f"a tensor beside {other}", None, "keys and values are appended together")
    packed = offsets is not None
    shape = {"Hk": k.shape[2], "D": k.shape[3]}
    for name, x, dim in (("k_new", k_new, k.shape[3]), ("v_new", v_new, v.shape[3])):
        _check_rows(name, x, packed, "cu_seqlens_new", "Tnew", "B", "Mnew")
        assert isinstance(x, Tensor)
        if not same(x.shape[-2:], (shape["Hk"], dim)) or (not packed and x.shape[0] != B):
            wanted = f"(Tnew, Hk={shape['Hk']}, {dim})" if packed else f"(B={B}, Mnew, Hk={shape['Hk']}, {dim})"
            raise bad_value(name, f"shape {wanted}", tuple(x.shape))
        if x.dtype != q.dtype:
            raise bad_type(name, f"q's dtype {q.dtype}", x.dtype, f"cast with {name}.to(q.dtype)")
        if x.device != q.device:
            raise bad_value(name, f"q's device {q.device}", x.device)
    assert isinstance(k_new, Tensor) and isinstance(v_new, Tensor)
    at = 0 if packed else 1
    if v_new.shape[at] != k_new.shape[at]:
        raise bad_value("v_new", f"as many new rows as k_new, {k_new.shape[at]}", v_new.shape[at])
    if packed:
        check_offsets("cu_seqlens_new", offsets, q, B)
    for name, cache in (("k_cache", k), ("v_cache", v)):
        _check_written(name, cache, ", as k_new is written to it")
    return k_new.shape[at]


def _check_extra(name: str, x: Any, q: Tensor, B: int, H: int, queries: int | None) -> None:
    """Check a bias or mask; queries: None if they are packed, when it has any number of them."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise bad_type(name, "a tensor or None", type(x).__name__)
    # While Dynamo traces, "in" finds no constant among symbolic sizes, and words would make the graph one of these sizes alone.
    own = (1,) * (4 - x.dim()) + tuple(x.shape)
    full = (B, H) if queries is None else (B, H, queries)
    if not 2 <= x.dim() <= 4 or any(size != 1 and size != whole for size, whole in zip(own, full, strict=False)):
        rows = "Mq" if queries is None else f"Mq={queries}"
        wanted = f"2 to 4 dims of (B={B}|1, Hq={H}|1, {rows}|1, N|1), by position in the cache"
        hint = f"for one row of keys per request pass {name}[:, None, None, :]" if x.dim() == 2 and x.shape[0] == B else ""
        raise bad_value(name, wanted, tuple(x.shape), hint)
    check_dtype_and_place(name, x, q)


def _check_scale_of_cache(name: str, scale: Any, q: Tensor, B: int, Hk: int, fp8: bool) -> None:
    if scale is None:
        return
    if not fp8:
        raise bad_value(name, f"None unless the caches are {FP8}", "a scale", "multiply scale= by it, or the cache")
    if isinstance(scale, Tensor):
        if not scale.is_floating_point() or scale.dtype.itemsize < 2:
            raise bad_type(name, "a float, or a tensor of floats", scale.dtype)
        if not any(same(scale.shape, shape) for shape in ((), (1,), (Hk,), (B, Hk))):
            raise bad_value(name, f"a float, or shape (Hk={Hk},) or (B={B}, Hk={Hk})", tuple(scale.shape))
        if scale.device != q.device:
            raise bad_value(name, f"q's device {q.device}", scale.device)
    elif isinstance(scale, bool) or not isinstance(scale, Real):
        raise bad_type(name, "a float, or a tensor of floats", type(scale).__name__)
    elif not 0 < scale < math.inf:  # type: ignore[operator]
        raise bad_value(name, "a positive finite number", scale)


def _check_out(given: CacheGiven, q: Tensor, Dv: int) -> None:
    out = given.out
    if out is None:
        return
    if not isinstance(out, Tensor):
        raise bad_type("out", "a tensor or None", type(out).__name__)
    wanted = (*q.shape[:-1], Dv)
    if not same(out.shape, wanted) or out.device != q.device:
        raise bad_value("out", f"shape {tuple(wanted)} on {q.device}", f"{tuple(out.shape)} on {out.device}")
    if out.dtype != q.dtype:
        raise bad_type("out", f"q's dtype {q.dtype}", out.dtype)
    _check_written("out", out, "")


def _check_written(name: str, x: Tensor, why: str) -> None:
    """Check that what is written to x is what is read there."""
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        raise bad_value(name, f"memory of its own for every element{why}", "an expanded tensor (a stride of 0)")
    if not torch.compiler.is_compiling() and x.is_neg():
        raise bad_value(name, f"memory that holds its elements{why}", "a negated view", f"{name}.resolve_neg() makes a copy that does")


def check_own_memory(given: tuple[Any, ...]) -> None:
    """Check that out does not begin where another tensor of a call does."""
    *others, out = given
    for name, x in zip(CacheGiven._fields, others, strict=False):
        if isinstance(x, Tensor) and x.numel() and out.numel() and x.data_ptr() == out.data_ptr():
            raise bad_value("out", "memory of its own", f"that of {name}", "it is written while the others are read")


def check_requests(given: CacheGiven, options: CacheOptions) -> None:
    """For ``TRIFLASH_CHECK=1``: read lengths, tables and offsets, waiting for the device, and name what is wrong with them."""
    call = checked_cache(given, options)
    if given.q.device.type == "meta":
        return
    k, table = given.k_cache, given.page_table
    slots, size = k.shape[:2]
    B = given.q.shape[0] if given.cu_seqlens_q is None else given.cu_seqlens_q.shape[0] - 1
    capacity = size if table is None else size * table.shape[1]
    lengths = [capacity] * B if given.cache_lengths is None else given.cache_lengths.tolist()
    for b, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise bad_value("cache_lengths", f"0 to the {capacity} keys that a request can hold", f"{length}, request {b}")
    new = [call.new or 0] * B
    if given.cu_seqlens_new is not None:
        new = _read_offsets("cu_seqlens_new", given.cu_seqlens_new, call.new or 0)
    used = [length + more for length, more in zip(lengths, new, strict=True)]
    for b, (length, more) in enumerate(zip(lengths, new, strict=True)):
        if length + more > capacity:
            raise bad_value("k_new", f"at most {capacity - length} new keys, which request {b} has room for", more, "others are dropped")
    if given.key_starts is not None:
        for b, (start, end) in enumerate(zip(given.key_starts.tolist(), used, strict=True)):
            if not 0 <= start <= end:
                raise bad_value("key_starts", f"0 to the {end} keys of request {b}", start)
    if given.cache_index is not None:
        entries = given.cache_index.tolist()
        for b, entry in enumerate(entries):
            if not 0 <= entry < slots:
                raise bad_value("cache_index", f"0 to {slots - 1}", f"{entry}, request {b}")
            if new[b] and entry in [other for other, more in zip(entries[:b], new[:b], strict=True) if more]:
                raise bad_value("cache_index", "an entry for each request, as k_new is written to it", f"{entry} twice")
    if table is not None:
        written: dict[int, int] = {}
        for b, (row, length, end) in enumerate(zip(table.tolist(), lengths, used, strict=True)):
            for at, page in enumerate(row[: -(-end // size)]):
                if not 0 <= page < slots:
                    raise bad_value("page_table", f"0 to {slots - 1} of the {slots} pages", f"{page}, page {at} of request {b}")
                if end > length and (at + 1) * size > length and written.setdefault(page, b) != b:
                    raise bad_value("page_table", "pages of their own for what k_new is written to", f"{page} of {written[page]} and {b}")
    longest = given.q.shape[-3]
    if given.cu_seqlens_q is not None:
        longest = max(_read_offsets("cu_seqlens_q", given.cu_seqlens_q, given.q.shape[0]), default=0)
        if options.max_seqlen_q is not None and longest > options.max_seqlen_q:
            raise bad_value("max_seqlen_q", f"{longest} or more, the longest request's queries", options.max_seqlen_q)
    for name, x in (("bias", given.bias), ("mask", given.mask)):
        if x is None:
            continue
        for dim, least in ((-2, longest), (-1, max(used, default=0))):
            if x.shape[dim] != 1 and x.shape[dim] < least:
                raise bad_value(name, f"{least} or more in dim {dim}, the longest request", tuple(x.shape))


def _read_offsets(name: str, offsets: Tensor, rows: int) -> list[int]:
    """The lengths between right offsets."""
    values = offsets.tolist()
    if values[0] != 0:
        raise bad_value(name, "0 as the first offset", values[0])
    if values[-1] > rows:
        raise bad_value(name, f"offsets up to the {rows} rows", values[-1])
    for at, (begin, end) in enumerate(pairwise(values)):
        if end < begin:
            raise bad_value(name, "offsets that do not decrease", f"{begin} before {end}, request {at}")
    return [end - begin for begin, end in pairwise(values)]
