"""Packed sequences one after the other, for the backends in PyTorch: each is a dense problem on views. Reads the offsets.

Called by ``launch/__init__.py``. Torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import AttentionSpec, BiasSpec, Gradients, Operands, Saved

__all__ = ["Sequence", "backward", "forward", "sequences"]


class Sequence(NamedTuple):
    """One sequence: its rows among the queries, and among the keys, and its dense problem."""

    number: int
    rows: slice
    cols: slice
    spec: AttentionSpec
    operands: Operands


def _extents(offsets: Tensor, used: Tensor | None, rows: int) -> list[tuple[int, int]]:
    """First and last row of each sequence, kept within the tensor, as the kernels do."""
    ends = [max(0, min(int(x), rows)) for x in offsets.tolist()]
    lengths = [max(end - start, 0) for start, end in pairwise(ends)]
    if used is not None:
        lengths = [min(length, max(0, int(own))) for length, own in zip(lengths, used.tolist(), strict=True)]
    return [(start, start + length) for start, length in zip(ends, lengths, strict=False)]


def _part(extra: Tensor, layout: str, number: int, rows: slice, cols: slice, value: float | bool) -> Tensor:
    """A sequence's part of a bias or mask in five dims; what it needs past a dim that is not 1 is ``value``."""
    m, n = rows.stop - rows.start, cols.stop - cols.start
    if layout == "rows":
        extra = extra[:, :, :, rows]
    elif layout == "keys":
        return extra[..., cols]
    elif extra.shape[0] > 1:
        extra = extra[number : number + 1]
    for dim, length in ((3, m), (4, n)):
        if extra.shape[dim] != 1 and (dim == 4 or layout != "rows"):
            extra = extra.narrow(dim, 0, min(length, extra.shape[dim]))
            if extra.shape[dim] < length:
                shape = list(extra.shape)
                shape[dim] = length - extra.shape[dim]
                extra = torch.cat([extra, extra.new_full(shape, value)], dim)
    return extra


def sequences(spec: AttentionSpec, x: Operands) -> Iterator[Sequence]:
    """The sequences in order, less those without queries or keys."""
    packed = spec.packed
    assert packed is not None and x.offsets_q is not None and x.offsets_k is not None
    everything = zip(_extents(x.offsets_q, x.used_q, spec.queries), _extents(x.offsets_k, x.used_k, spec.keys), strict=True)
    for number, (of_queries, of_keys) in enumerate(everything):
        rows, cols = slice(*of_queries), slice(*of_keys)
        m, n = rows.stop - rows.start, cols.stop - cols.start
        if not m:
            continue
        diagonal = n - m if packed.bottom_right else 0
        parts: dict[str, Tensor | None] = {}
        for name, extra, layout in (
            ("bias", x.bias, packed.bias_layout), ("mask", x.mask, packed.mask_layout), ("second", x.second_bias, packed.bias_layout),
        ):  # fmt: skip
            hidden = False if extra is not None and extra.dtype == torch.bool else -torch.inf
            parts[name] = None if extra is None else _part(extra, layout, number, rows, cols, hidden)
        slopes = x.alibi_slopes
        own = Operands(
            x.q[:, rows], x.k[:, cols], x.v[:, cols], parts["bias"], parts["mask"], None,
            slopes if slopes is None or slopes.shape[0] == 1 else slopes[number : number + 1], x.sink, x.dropout_seed,
            second_bias=parts["second"],
        )  # fmt: skip
        small = replace(
            spec,
            packed=None,
            queries=m,
            keys=n,
            lo=None if spec.lo is None else spec.lo + diagonal,
            hi=None if spec.hi is None else spec.hi + diagonal,
            bias=_dense(spec.bias, parts["bias"], m, n),
            mask=_dense(spec.mask, parts["mask"], m, n),
            second=_dense(spec.second, parts["second"], m, n),
        )
        yield Sequence(number, rows, cols, small, own)


def _dense(spec: BiasSpec | None, part: Tensor | None, queries: int, keys: int) -> BiasSpec | None:
    if spec is None or part is None:
        return None
    return BiasSpec(spec.dtype, (True, True, spec.varies[2], part.shape[3] == queries, part.shape[4] == keys))


def forward(spec: AttentionSpec, x: Operands, saved: Saved, run: Callable[[Sequence, Saved], None]) -> None:
    """Fill a packed result by ``run``, which fills that of one sequence."""
    saved.out.zero_()
    saved.lse.fill_(-torch.inf)
    if saved.rest is not None:
        saved.rest.zero_()
    for each in sequences(spec, x):
        run(each, _rows_of(saved, each))


def _rows_of(saved: Saved, each: Sequence) -> Saved:
    rest = None if saved.rest is None else saved.rest[:, :, each.rows]
    return Saved(saved.out[:, each.rows], saved.lse[:, :, each.rows], rest)


def backward(
    spec: AttentionSpec,
    x: Operands,
    saved: Saved,
    dout: Tensor,
    dlse: Tensor | None,
    grads: Gradients,
    run: Callable[[Sequence, Saved, Tensor, Tensor | None, Gradients], None],
) -> None:
    """Fill packed gradients by ``run``, which fills those of one sequence. What sequences share is added up in their order."""
    wide = torch.float64 if spec.dtype == "fp64" else torch.float32
    sums: list[Tensor | None] = []
    for n, grad in enumerate(grads):
        if grad is not None:
            grad.zero_()
        sums.append(None if grad is None or n < 3 else torch.zeros_like(grad, dtype=wide))
    for each in sequences(spec, x):
        own = _rows_of(saved, each)
        sink = each.operands.sink
        dq, dk, dv = (None if g is None else g[:, where] for g, where in zip(grads, (each.rows, each.cols, each.cols), strict=False))
        dbias, dsecond = (
            None if total is None or extra is None else torch.empty(extra.shape, dtype=wide, device=extra.device)
            for total, extra in ((sums[3], each.operands.bias), (sums[5], each.operands.second_bias))
        )
        dsink = None if sums[4] is None or sink is None else torch.empty_like(sink, dtype=wide)
        part = Gradients(dq, dk, dv, dbias, dsink, dsecond)
        run(each, own, dout[:, each.rows], None if dlse is None else dlse[:, :, each.rows], part)
        for total, own_part in ((sums[3], part.dbias), (sums[5], part.dsecond)):
            if total is not None and own_part is not None:
                _add(total, own_part, spec, each)
        if sums[4] is not None and part.dsink is not None:
            sums[4] += part.dsink
    for grad, total in zip(grads, sums, strict=True):
        if grad is not None and total is not None:
            grad.copy_(total)


def _add(total: Tensor, part: Tensor, spec: AttentionSpec, each: Sequence) -> None:
    """A sequence's gradient of the bias, to where its part lies."""
    assert spec.packed is not None
    layout = spec.packed.bias_layout
    if layout == "keys":
        total[..., each.cols] += part
        return
    if layout == "rows":
        total = total[:, :, :, each.rows]
    elif total.shape[0] > 1:
        total = total[each.number : each.number + 1]
    m, n = min(total.shape[3], part.shape[3]), min(total.shape[4], part.shape[4])
    total[:, :, :, :m, :n] += part[:, :, :, :m, :n]
