"""Where the keys of a KV cache lie, how many of them a request has, and new ones put behind them: for the backends in PyTorch. Torch only.

Called by ``launch/cache.py``, ``tiled_cache.py`` and ``oracle_cache.py``. What is wrong is kept harmless here as the kernels do it: lengths
are clamped to what a request can hold, numbers of pages and entries to those that there are when they are read; what would be written
through a wrong one, or past the capacity, is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .lengths import comparable

__all__ = ["LARGEST_FP8", "Keys", "append", "extents", "keys_of", "part"]

LARGEST_FP8 = 448.0  # of float8_e4m3fn


def extents(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """First row and number of rows of each request, int64 ``(B,)``, kept within the tensor."""
    ends = comparable(offsets).clamp(0, rows)
    return ends[:-1], (ends[1:] - ends[:-1]).clamp(min=0)


def keys_of(lengths: Tensor | None, new: Tensor | int, capacity: int, requests: int, device: torch.device) -> Tensor:
    """``N_b``, int64 ``(B,)``: the keys in the cache, with the new ones that fit behind them."""
    if lengths is None:
        return torch.full((requests,), capacity, dtype=torch.int64, device=device)
    return (comparable(lengths).clamp(0, capacity) + new).clamp(max=capacity)


@dataclass(frozen=True)
class Keys:
    """The keys and values of B requests.

    k_cache ``(B', N, Hk, D)``, or ``(pages, page_size, Hk, D)`` with table ``(B, max_pages)``; v_cache likewise. used ``(B,)``: N_b.
    starts ``(B,)``: keys before are hidden. index ``(B,)``: entries of a contiguous cache. k_scale, v_scale ``(B|1, Hk|1)``.
    """

    k_cache: Tensor
    v_cache: Tensor
    used: Tensor
    starts: Tensor | None = None
    table: Tensor | None = None
    index: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def of(self, b: int) -> Keys:
        """Those of one request."""
        one = slice(b, b + 1)
        scales = (None if x is None else x[one] if x.shape[0] > 1 else x for x in (self.k_scale, self.v_scale))
        k, v, index = self.k_cache, self.v_cache, self.index
        if self.table is None and index is None:
            k, v = k[one], v[one]
        starts, table, index = (None if x is None else x[one] for x in (self.starts, self.table, index))
        return Keys(k, v, self.used[one], starts, table, index, *scales)

    def hidden(self, cols: slice) -> Tensor:
        """``(B, n)``: which of these positions are no keys, or hidden ones."""
        j = torch.arange(cols.start, cols.stop, device=self.used.device)
        beyond = j >= self.used[:, None]
        return beyond if self.starts is None else beyond | (j < comparable(self.starts)[:, None])

    def block(self, cols: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys ``[B, Hk, n, D]`` and values at these positions, scaled; hidden ones as zeros: they may hold anything."""
        hidden = self.hidden(cols)[:, None, :, None]
        k, v = (self._read(x, cols).transpose(1, 2).to(dtype) for x in (self.k_cache, self.v_cache))
        if self.k_scale is not None:
            k = k * self.k_scale.to(dtype)[:, :, None, None]
        if self.v_scale is not None:
            v = v * self.v_scale.to(dtype)[:, :, None, None]
        return k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)

    def _read(self, cache: Tensor, cols: slice) -> Tensor:
        """``(B, n, Hk, D)``."""
        if self.table is None:
            return cache[:, cols] if self.index is None else _bits(cache)[:, cols][self.index_read].view(cache.dtype)
        j = torch.arange(cols.start, cols.stop, device=cache.device)
        pages, size = cache.shape[:2]
        page = self.table[:, j // size].long().clamp(0, pages - 1)
        return _bits(cache)[page, j % size].view(cache.dtype)

    @property
    def index_read(self) -> Tensor:
        """Entries that there are."""
        assert self.index is not None
        return comparable(self.index).clamp(0, self.k_cache.shape[0] - 1)


def append(
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    lengths: Tensor | None,
    table: Tensor | None,
    index: Tensor | None,
    offsets: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Write new keys and values behind those in the cache, in place.

    k_new ``(B, Mnew, Hk, D)``, or ``(Tnew, Hk, D)`` with offsets ``(B + 1,)``; v_new likewise. The rest as of :class:`Keys`, lengths before
    the call. Does not wait for the device.
    """
    device = k_cache.device
    slots, size = k_cache.shape[:2]
    capacity = size if table is None else table.shape[1] * size
    if offsets is None:
        requests, new = k_new.shape[:2]
        owner = torch.arange(requests, device=device).repeat_interleave(new)
        number = torch.arange(new, device=device).repeat(requests)
        k_new, v_new = k_new.flatten(0, 1), v_new.flatten(0, 1)
        there = torch.ones_like(owner, dtype=torch.bool)
    else:
        requests = offsets.shape[0] - 1
        starts, counts = extents(offsets, k_new.shape[0])
        rows = torch.arange(k_new.shape[0], device=device)
        owner = (torch.searchsorted(starts.contiguous(), rows, right=True) - 1).clamp(0, max(requests - 1, 0))
        if requests:
            number = rows - starts[owner]
            there = (number >= 0) & (number < counts[owner])
    if not requests or not owner.numel() or not capacity or not slots:
        return
    at = keys_of(lengths, 0, capacity, requests, device)[owner] + number
    there &= at < capacity
    if table is not None:
        slot, at = table[owner, (at // size).clamp(0, table.shape[1] - 1)].long(), at % size
    else:
        slot = owner if index is None else comparable(index)[owner]
    there &= (slot >= 0) & (slot < slots)
    # Nothing waits for the device, so rows that are dropped go along: they write what the first one that is not writes, to where it does;
    # where all are dropped, to where the first would go, if that were there, what is there already.
    rows = torch.where(there, torch.arange(len(there), device=device), there.to(torch.uint8).argmax())
    slot, at, owner = slot[rows].clamp(0, slots - 1), at[rows].clamp(0, size - 1), owner[rows]
    for cache, new_rows, scale in ((k_cache, k_new, k_scale), (v_cache, v_new, v_scale)):
        values = new_rows[rows]
        if cache.dtype != values.dtype:
            own = 1.0 if scale is None else scale.expand(requests, -1)[owner][:, :, None]
            values = (values.float() / own).clamp(-LARGEST_FP8, LARGEST_FP8).to(cache.dtype)
        bits = _bits(cache)
        bits[slot, at] = torch.where(there.any(), _bits(values), bits[slot, at])


def part(extra: Tensor, b: int | None, rows: slice, cols: slice) -> Tensor:
    """The part of a bias or mask ``(B|1, Hq|1, M|1, N|1)`` that a tile of scores needs, of one request (None: of all), broadcast dims left
    at size 1. What the tile needs past a dim that is not 1 is hidden.
    """
    if b is not None and extra.shape[0] > 1:
        extra = extra[b : b + 1]
    for dim, wanted in ((2, rows), (3, cols)):
        size = extra.shape[dim]
        if size == 1:
            continue
        stop = min(wanted.stop, size)
        extra = extra.narrow(dim, min(wanted.start, size), max(stop - wanted.start, 0))
        lacking = wanted.stop - wanted.start - extra.shape[dim]
        if lacking:
            shape = list(extra.shape)
            shape[dim] = lacking
            extra = torch.cat([extra, extra.new_full(shape, False if extra.dtype == torch.bool else -torch.inf)], dim)
    return extra


def _bits(x: Tensor) -> Tensor:
    """x, or of 8-bit floats, which PyTorch does not index everywhere, their bits."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
