"""All packed documents of a call at once, by all-gather or Ulysses: one message each way, and one launch, or two of a causal zigzag.

Between the exchanges a rank has whole documents (Ulysses: of its heads) or its pieces of queries and whole documents of keys, which
``attention_varlen`` takes as sequences. Called by ``varlen.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import VarlenGiven, VarlenOptions, band_of, checked_varlen
from ..derivatives import differentiable_once
from ..varlen import attention_varlen
from .call import apart, joined
from .group import Group, added, all_gather, all_reduce, all_to_all, reduce_scatter, wait
from .merging import wide
from .ulysses import repeats_of

__all__ = ["Documents", "Packed", "at_once"]


@dataclass(frozen=True)
class Documents:
    """How a stream of documents is spread. starts: of each, and the stream's end. begin, length: of each document's chunks in the stream,
    ``(documents, chunks)``. held: the chunks of each rank, and rows: how many rows these have.
    """

    starts: Tensor
    begin: Tensor
    length: Tensor
    held: list[list[int]]
    rows: list[int]
    _slots: dict[Any, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, starts: list[int], size: int, order: str) -> Documents:
        offsets = torch.tensor(starts, dtype=torch.int64)
        count = 2 * size if order == "zigzag" else size
        bounds = offsets.diff()[:, None] * torch.arange(count + 1) // count
        held = [[rank, count - 1 - rank] if order == "zigzag" else [rank] for rank in range(size)]
        length = bounds.diff(dim=1)
        of_chunks = length.sum(0).tolist()
        rows = [sum(of_chunks[chunk] for chunk in own) for own in held]
        return cls(offsets, offsets[:-1, None] + bounds[:, :-1], length, held, rows)

    def pieces(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of a rank's chunks, ``(documents, 1 or 2)``: where they begin in the stream, their lengths, and where they stand in its rows."""
        begin, length = self.begin[:, self.held[rank]], self.length[:, self.held[rank]]
        return begin, length, (length.flatten().cumsum(0) - length.flatten()).view(length.shape)

    def slots(self, most: list[int], device: torch.device) -> Tensor:
        """Of every row of the stream: where it stands in the rows of all ranks, ``most[r]`` of rank r, one rank's behind another's."""
        key = (*most, device)
        known = self._slots.get(key)
        if known is not None:
            return known
        at = torch.empty_like(self.begin)
        for rank, before in enumerate(accumulate(most[:-1], initial=0)):
            at[:, self.held[rank]] = self.pieces(rank)[2] + before
        total = int(self.starts[-1])
        moved = torch.stack(((at - self.begin).flatten(), self.length.flatten())).to(device)
        found = torch.repeat_interleave(moved[0], moved[1], output_size=total) + torch.arange(total, device=device)
        self._slots[key] = found
        return found


class Packed(NamedTuple):
    """A call. own_rows: of bias, second bias and mask, whether a row is a rank's own, and not one that all share."""

    given: VarlenGiven
    options: VarlenOptions
    starts_q: list[int]
    starts_k: list[int]
    own_rows: tuple[bool, bool, bool]
    deterministic: bool


def at_once(call: Packed, group: Group, method: str, order: str) -> tuple[Tensor, Tensor] | None:
    """out and lse of this rank's rows; None: documents must run one after the other."""
    _check(call)
    given, options = call.given, call.options
    if method == "ring" or options.dropout_p or _uneven(call, method):
        return None
    queries, keys = (Documents.of(starts, group.size, order) for starts in (call.starts_q, call.starts_k))
    begin, length, at = queries.pieces(group.rank)
    if queries.held[group.rank][1:] == [queries.held[group.rank][0] + 1]:  # neighbours: one piece
        begin, length, at = begin[:, :1], length.sum(1, keepdim=True), at[:, :1]
    band = band_of(options.causal, options.window)
    whole = band.left is None and band.right is None and given.alibi_slopes is None
    if method == "allgather" and not whole:
        M, N = queries.starts.diff(), keys.starts.diff()
        if band.right != 0 or (band.anchor == "top_left" and bool((M > N).any())):  # of all ranks' rows: all must find the same
            return None
        diagonal = torch.zeros_like(M) if band.anchor == "top_left" else N - M
        seen = (begin + length - queries.starts[:-1, None]) + diagonal[:, None]  # keys up to a piece's last row's
    times = 1 if whole or method == "ulysses" else length.shape[1]
    shared = _replicated(call, group, times)
    if method == "ulysses":
        return _by_heads(call, shared[0], queries, keys, group)
    streams = _Gathered.apply(given.k, given.v, keys, group, call.deterministic, times)
    offsets_k = keys.starts.int()
    if whole:
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), length.sum(1).cumsum(0))).int()
        return _attended(call, shared[0], given.q, streams[0], streams[1], _Sequences((offsets, offsets_k)))
    parts = []
    for n in range(times):
        offsets = torch.cat((at[:, n], torch.tensor([given.q.shape[0]]))).int()
        used = (length[:, n].int(), seen[:, n].clamp(min=0).int())
        parts.append(_attended(call, shared[n], given.q, streams[2 * n], streams[2 * n + 1], _Sequences((offsets, offsets_k), used)))
    if times == 1:
        return parts[0]
    (out, lse), (more, other) = parts
    return out + more, torch.maximum(lse, other)  # rows that a launch does not own give 0 and -inf


def _uneven(call: Packed, method: str) -> bool:
    """Whether a bias or mask is one that sequences of other rows than a document's cannot have."""
    layouts = (call.options.bias_layout, call.options.bias_layout, call.options.mask_layout or call.options.bias_layout)
    for x, own, layout in zip((call.given.bias, call.given.second_bias, call.given.mask), call.own_rows, layouts, strict=True):
        if not isinstance(x, Tensor):
            continue
        if layout == "padded" and (x.dim() != 4 or own or x.shape[2] != 1):
            return True
        if layout == "rows" and method == "ulysses" and (x.dtype == torch.bool or x.dim() != 3 or x.shape[0] == 1):
            return True
    return False


def _check(call: Packed) -> None:
    """The errors of ``attention_varlen``, before anything is sent."""
    given = call.given
    k, v = (x.new_empty(()).expand(call.starts_k[-1], *x.shape[1:]) for x in (given.k, given.v))
    offsets = torch.zeros(len(call.starts_q), dtype=torch.int32, device=given.q.device)
    checked_varlen(given._replace(k=k, v=v, cu_seqlens_q=offsets, cu_seqlens_k=offsets), call.options)


def _replicated(call: Packed, group: Group, times: int) -> list[VarlenGiven]:
    """The tensors for each of so many launches, those that every rank has with gradients that are summed over launches and the group."""
    given, layout = call.given, call.options.bias_layout

    def over_group(x: Any) -> Any:
        return (x,) * times if x is None or not x.requires_grad else _Summed.apply(x, group, call.deterministic, times)

    biases = [(x,) * times if layout == "rows" else over_group(x) for x in (given.bias, given.second_bias)]
    return [given._replace(bias=a, second_bias=b, sink=c) for a, b, c in zip(*biases, over_group(given.sink), strict=True)]


class _Sequences(NamedTuple):
    """Where sequences begin in the rows given, and how much of each is used; None: all. For queries and for keys, integers on the CPU."""

    offsets: tuple[Tensor, Tensor]
    used: tuple[Tensor | None, Tensor | None] = (None, None)


def _attended(call: Packed, given: VarlenGiven, q: Tensor, k: Tensor, v: Tensor, which: _Sequences) -> tuple[Tensor, Tensor]:
    """One launch."""
    options = call.options
    causal = options.causal
    if which.used[1] is not None and causal == "top_left":  # of a piece and the keys up to its last row's, that is the bottom right
        causal = True
    lengths = [x.diff() if some is None else some for x, some in zip(which.offsets, which.used, strict=True)]
    longest_q, longest_k = (max(x.tolist(), default=0) for x in lengths)
    cu_q, cu_k = (x.to(q.device) for x in which.offsets)
    used_q, used_k = (None if x is None else x.to(q.device) for x in which.used)
    out, lse = attention_varlen(
        q, k, v, cu_q, cu_k, longest_q, longest_k, seqused_q=used_q, seqused_k=used_k,
        bias=given.bias if given.second_bias is None else (given.bias, given.second_bias), bias_layout=options.bias_layout,
        mask=given.mask, mask_layout=options.mask_layout, causal=causal, window=options.window, scale=options.scale,
        softcap=options.softcap, alibi_slopes=given.alibi_slopes, sink=given.sink, return_lse=True,
        deterministic=options.deterministic, precision=options.precision, backend=options.backend,
    )  # fmt: skip
    return out, lse


def _by_heads(call: Packed, given: VarlenGiven, queries: Documents, keys: Documents, group: Group) -> tuple[Tensor, Tensor]:
    """Ulysses: whole documents of some heads."""
    heads, size = given.q.shape[1], group.size
    repeats = repeats_of(heads, given.k.shape[1], size)
    own = slice(group.rank * (heads // size), (group.rank + 1) * (heads // size))

    def part(x: Tensor | None, dim: int) -> Tensor | None:
        return x if x is None or x.shape[dim] == 1 != heads else x[(slice(None),) * dim + (own,)]

    def biased(x: Tensor | None, layout: str) -> Tensor | None:
        if x is None or layout != "rows":
            return part(x, 1 if layout == "padded" else 0)
        return _ToHeads.apply(x.transpose(0, 1), queries, group, 1).transpose(0, 1)

    q, k, v = (
        _ToHeads.apply(x, of, group, times) for x, of, times in ((given.q, queries, 1), (given.k, keys, repeats), (given.v, keys, repeats))
    )
    bias, second = (biased(x, call.options.bias_layout) for x in (given.bias, given.second_bias))
    mask = biased(given.mask, call.options.mask_layout or call.options.bias_layout)
    slopes = None if given.alibi_slopes is None else given.alibi_slopes[..., own]
    some = given._replace(bias=bias, second_bias=second, mask=mask, alibi_slopes=slopes, sink=part(given.sink, 0))
    out, lse = _attended(call, some, q, k, v, _Sequences((queries.starts.int(), keys.starts.int())))
    back = _ToRows.apply(out, queries, group), _ToRows.apply(lse.transpose(0, 1).unsqueeze(-1), queries, group)
    return back[0], back[1].squeeze(-1).transpose(0, 1)


class _Summed(torch.autograd.Function):
    """A replicated tensor, ``times`` times, whose gradients are summed in float32, over the group too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, in_order: bool, times: int) -> tuple[Tensor, ...]:
        ctx.group, ctx.in_order = group, in_order
        return tuple([x.view_as(x) for _ in range(times)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            total = added(torch.stack([grad.to(wide(grad.dtype)) for grad in grads]))
            total = all_reduce(total, ctx.group, ctx.in_order).to(grads[0].dtype)
        return (*differentiable_once([total], grads), None, None, None)


class _Gathered(torch.autograd.Function):
    """Keys and values of the whole stream, ``times`` times (the same memory), so that their gradients are added in float32."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, documents: Documents, group: Group, in_order: bool, times: int
    ) -> tuple[Tensor, ...]:  # fmt: skip
        held = documents.rows
        ctx.group, ctx.in_order, ctx.held, ctx.width = group, in_order, held, k.shape[2]
        both, most = joined(k, v), max(held)
        slots = documents.slots([most] * group.size, k.device)
        if most > both.shape[0]:
            both = torch.cat((both, both.new_zeros(most - both.shape[0], *both.shape[1:])))
        ctx.save_for_backward(slots)
        whole = wait(all_gather(both, group), group) if group.size > 1 else both
        whole = whole.index_select(0, slots)
        return tuple([x.view_as(x) for _ in range(times) for x in apart(whole, k.shape[2])])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slots,) = ctx.saved_tensors
        group, most = ctx.group, max(ctx.held)
        with torch.no_grad():
            total = torch.cat(grads[:2], -1).to(wide(grads[0].dtype))
            for at in range(2, len(grads), 2):
                total += torch.cat(grads[at : at + 2], -1)
            stacked = total.new_zeros(group.size * most, *total.shape[1:])
            stacked[slots] = total  # no slot twice
            own = stacked
            if group.size > 1 and ctx.in_order:
                split = [most] * group.size
                own = added(wait(all_to_all(stacked, split, split, group), group).unflatten(0, (group.size, most)))
            elif group.size > 1:
                own = wait(reduce_scatter(stacked, group), group)
            dk, dv = apart(own[: ctx.held[group.rank]].to(grads[0].dtype), ctx.width)
        return (*differentiable_once([dk, dv], grads), None, None, None, None)


def _heads_out(x: Tensor, documents: Documents, slots: Tensor, group: Group) -> Tensor:
    """Of this rank's rows ``(rows, heads, W)``: the whole stream of its heads."""
    parts = x.unflatten(1, (group.size, -1)).transpose(0, 1).flatten(0, 1)
    if group.size > 1:
        held = documents.rows
        parts = wait(all_to_all(parts, [x.shape[0]] * group.size, held, group), group)
    return parts.index_select(0, slots)


def _rows_back(x: Tensor, documents: Documents, slots: Tensor, group: Group) -> Tensor:
    """Of the whole stream of this rank's heads: its rows of all heads."""
    held = documents.rows
    parts = torch.empty_like(x)
    parts[slots] = x
    if group.size > 1:
        parts = wait(all_to_all(parts, held, [held[group.rank]] * group.size, group), group)
    return parts.view(group.size, held[group.rank], *x.shape[1:]).transpose(0, 1).flatten(1, 2)


class _ToHeads(torch.autograd.Function):
    """Rows of all heads, each head ``times`` times, to the whole stream of some."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, documents: Documents, group: Group, times: int) -> Tensor:
        slots = documents.slots(documents.rows, x.device)
        ctx.save_for_backward(slots)
        ctx.rest = documents, group, times
        return _heads_out(x.repeat_interleave(times, 1) if times > 1 else x, documents, slots, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        documents, group, times = ctx.rest
        (slots,) = ctx.saved_tensors
        with torch.no_grad():
            rows = _rows_back(grad if times == 1 else grad.to(wide(grad.dtype)), documents, slots, group)
            if times > 1:
                rows = rows.unflatten(1, (-1, times)).sum(2).to(grad.dtype)
        return (*differentiable_once([rows], (grad,)), None, None, None)


class _ToRows(torch.autograd.Function):
    """The whole stream of some heads to a rank's rows of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, documents: Documents, group: Group) -> Tensor:
        slots = documents.slots(documents.rows, x.device)
        ctx.save_for_backward(slots)
        ctx.rest = documents, group
        return _rows_back(x, documents, slots, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        documents, group = ctx.rest
        (slots,) = ctx.saved_tensors
        with torch.no_grad():
            heads = _heads_out(grad, documents, slots, group)
        return (*differentiable_once([heads], (grad,)), None, None)
