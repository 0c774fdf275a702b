"""Are a provider's output and gradients right? The tolerance rule against float64, on all of a small problem and on parts of a large one.

Of a problem with more than ``limit`` scores these parts are judged, each by the same rule, its yardstick taken from the same part:

- a few *blocks of queries*, both ends of the sequence among them, of **every** batch entry and head: out, dq, and the gradient of a
  bias that varies over queries, summed over everything that it is broadcast over;
- *whole heads*, the last of the last batch entry first, as many as ``limit`` allows: out, dq, dk, dv at every position;
- the gradient of a bias that does not vary over queries: the last index along each batch and head dim that it varies over, summed over
  all the rest, every key.

And every element of every result must be finite. What this leaves unseen is a dk or dv that is wrong, but finite, in a head that was not
drawn. Scores are computed in boxes of at most ``BOX``, which take less than a gigabyte; what is kept takes some 20 bytes for each element
that is judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .exact import Box, Problem, as_slice
from .tolerance import (
    FLOAT32_ULPS,
    GRADIENT_FACTOR,
    OUTPUT_FACTOR,
    STORED_FACTOR,
    Judgement,
    disagreement,
    unit_roundoff,
)

__all__ = ["GRADIENTS", "Part", "Problem", "reference", "verdict"]

GRADIENTS = ("dq", "dk", "dv", "dbias", "dsecond")
LIMIT = {"cuda": 2**29, "cpu": 2**22}  # scores computed in float64: some 0.3 s on an H100, a second on two processor cores
BOX = 2**22
BLOCK = 8  # queries of a block

Index = tuple[slice | Tensor, ...]


@dataclass(frozen=True)
class Part:
    """A part of one result and what it is held against."""

    name: str
    shape: tuple[int, ...]  # of the whole result
    index: Index
    judgement: Judgement


@dataclass(frozen=True)
class _Region:
    """Batch entries, query heads and queries whose scores are looked at, and the results that they complete."""

    batch: range
    heads: range
    rows: tuple[int, ...]
    gives: tuple[str, ...]


def reference(problem: Problem, wanted: Sequence[str] = ("out", *GRADIENTS), limit: int | None = None) -> list[Part]:
    """What the results ``wanted`` (of out, dq, dk, dv, dbias, dsecond) of the problem are held against; reused for every provider.

    Args:
        problem: its inputs; not modified.
        wanted: names of the results to judge. ``dbias`` and ``dsecond`` need a bias that is not a mask, and are left out without one.
        limit: scores up to which all of the results are judged, by default 2^29 on a GPU and 2^22 on a CPU.
    """
    limit = LIMIT.get(problem.q.device.type, LIMIT["cpu"]) if limit is None else limit
    with torch.no_grad():
        parts = []
        for region in _regions(problem, wanted, limit):
            parts += _compute(problem, region)
    return parts


def verdict(parts: Sequence[Part], results: Mapping[str, Tensor]) -> str | None:
    """The first thing wrong with the results, as ``dk: largest error …``, or None. Results that no part is about are looked at for NaN."""
    for name, got in results.items():
        if not torch.isfinite(got).all():
            return f"{name}: {int((~torch.isfinite(got)).sum())} of {got.numel()} elements are not finite"
    for part in parts:
        if part.name in results:
            got = results[part.name].detach()
            if got.shape != part.shape:
                return f"{part.name}: shape {tuple(got.shape)}, wanted {part.shape}"
            problem = disagreement(got[part.index], part.judgement)
            if problem is not None:
                return f"{part.name}: {problem}"
    return None


def _regions(problem: Problem, wanted: Sequence[str], limit: int) -> Iterator[_Region]:
    B, M, Hq, _ = problem.q.shape
    N, Hk = problem.k.shape[1:3]
    all_rows = tuple(range(M))
    if B * Hq * M * N <= limit:
        yield _Region(range(B), range(Hq), all_rows, tuple(wanted))
        return
    biases = {name: bias for name, bias in problem.biases.items() if name in wanted}
    of_rows = [name for name, bias in biases.items() if bias.shape[3] == M]
    rows = _sampled_rows(M, limit // (4 * B * Hq * N))
    yield _Region(range(B), range(Hq), rows, tuple(n for n in wanted if n in ("out", "dq", *of_rows)))
    group = Hq // Hk
    pairs = list(dict.fromkeys([(B - 1, Hk - 1), (0, 0), (B // 2, Hk // 2)]))
    for b, h in pairs[: max(1, limit // (group * M * N))]:
        yield _Region(range(b, b + 1), range(h * group, (h + 1) * group), all_rows, tuple(n for n in wanted if n not in biases))
    for name, bias in biases.items():
        if name in of_rows:
            continue
        inner = problem.options.batch_inner
        entries = range(B)
        if bias.shape[0] > 1:
            entries = entries[-inner:]
        if bias.shape[1] > 1:
            entries = entries[inner - 1 :: inner]
        yield _Region(entries, range(Hq)[-1:] if bias.shape[2] > 1 else range(Hq), all_rows, (name,))


def _sampled_rows(M: int, most: int) -> tuple[int, ...]:
    """Blocks of queries: both ends, one across the middle, one at an odd place; of the latter two as many as fit."""
    starts = [M - BLOCK, 0, M // 2 - BLOCK // 2, (5 * M) // 7]
    rows: set[int] = set()
    for start in starts[: max(2, most // BLOCK)]:
        rows |= {i for i in range(start, start + BLOCK) if 0 <= i < M}
    return tuple(sorted(rows))


def _boxes(region: _Region, keys: int) -> Iterator[tuple[range, range]]:
    """The region in pieces of at most BOX scores, as (batch entries, neighbouring queries)."""
    runs: list[range] = []
    for row in region.rows:
        if runs and runs[-1].stop == row:
            runs[-1] = range(runs[-1].start, row + 1)
        else:
            runs.append(range(row, row + 1))
    for run in runs:
        rows = max(1, min(len(run), BOX // (len(region.heads) * keys)))
        entries = max(1, BOX // (len(region.heads) * keys * rows))
        for at in range(0, len(run), rows):
            for first in range(0, len(region.batch), entries):
                yield region.batch[first : first + entries], run[at : at + rows]


class _Sum:
    """One result of a region under construction, as the sum of its boxes: the reference, the yardstick and the two slacks."""

    def __init__(self, name: str, tensor: Tensor, index: Index) -> None:
        self.name, self.tensor, self.index = name, tensor, index
        shape = tensor[index].shape
        precise = torch.float64 if tensor.dtype == torch.float64 else torch.float32  # a yardstick is rounded once, at the end
        self.exact, self.shift, self.rounding = (tensor.new_zeros(shape, dtype=torch.float64) for _ in range(3))
        self.plain = tensor.new_zeros(shape, dtype=precise)

    def part(self, dtype: torch.dtype) -> Part:
        """What was summed, as the rule takes it."""
        ulps = FLOAT32_ULPS * unit_roundoff(torch.float64 if dtype == torch.float64 else torch.float32)
        slack = ulps * self.rounding + STORED_FACTOR * self.shift.abs()
        factor = OUTPUT_FACTOR if self.name == "out" else GRADIENT_FACTOR
        return Part(
            self.name, tuple(self.tensor.shape), self.index, Judgement(self.exact, self.plain.to(self.tensor.dtype), factor, dtype, slack)
        )


def _compute(problem: Problem, region: _Region) -> list[Part]:
    """The parts that a region completes."""
    device, inner = problem.q.device, problem.options.batch_inner
    group = problem.q.shape[2] // problem.k.shape[2]
    batch, heads = as_slice(region.batch), as_slice(region.heads)
    rows: Index = (batch, torch.tensor(region.rows, device=device), heads)
    kv_heads = range(region.heads.start // group, region.heads[-1] // group + 1)
    keys: Index = (batch, slice(None), as_slice(kv_heads))
    places: dict[str, tuple[Tensor | None, Index]] = {
        "out": (problem.dout, rows),
        "dq": (problem.q, rows),
        "dk": (problem.k, keys),
        "dv": (problem.v, keys),
    }
    places |= {name: (bias, _bias_index(bias, inner, region)) for name, bias in problem.biases.items() if name in region.gives}
    sums = [_Sum(name, tensor, index) for name, (tensor, index) in places.items() if name in region.gives and tensor is not None]

    for entries, queries in _boxes(region, problem.k.shape[1]):
        box = Box(problem, entries, region.heads, queries, backward=region.gives != ("out",))
        mine = slice(region.batch.index(entries[0]), region.batch.index(entries[-1]) + 1)
        first = region.rows.index(queries.start)
        own_rows = slice(first, first + len(queries))
        to_kv = torch.tensor([h // group - kv_heads.start for h in region.heads], device=device)
        for total in sums:
            for kind in ("exact", "plain", "shift", "rounding"):
                into: Tensor = getattr(total, kind)
                value = box.value(kind, total.name)
                if value is None:
                    continue
                value = value.to(into.dtype)
                if total.name in ("out", "dq"):
                    into[mine, own_rows] = value
                elif total.name in ("dk", "dv"):
                    into[mine, box.keys].index_add_(2, to_kv, value)
                else:
                    whole = total.tensor.shape
                    outer = [(b - region.batch.start) // inner if whole[0] > 1 else 0 for b in entries]
                    within = [b % inner if whole[1] > 1 and into.shape[1] > 1 else 0 for b in entries]
                    at = torch.tensor([o * into.shape[1] + i for o, i in zip(outer, within, strict=True)], device=device)
                    own = own_rows if whole[3] > 1 else slice(None)
                    columns = box.keys if whole[4] > 1 else slice(None)
                    into.flatten(0, 1)[:, :, own, columns].index_add_(0, at, value)
    return [total.part(problem.q.dtype) for total in sums]


def _bias_index(bias: Tensor, inner: int, region: _Region) -> Index:
    """Which part of a bias's gradient a region completes."""
    everything = slice(None)
    outer = slice(region.batch.start // inner, None) if bias.shape[0] > 1 else everything
    within = slice(region.batch.start % inner, None) if bias.shape[1] > 1 and region.batch.step > 1 else everything
    if bias.shape[1] > 1 and inner > 1 and len(region.batch) == 1:  # one entry: its step says nothing
        within = slice(region.batch.start % inner, region.batch.start % inner + 1)
    heads = as_slice(region.heads) if bias.shape[2] > 1 else everything
    rows = torch.tensor(region.rows, device=bias.device) if bias.shape[3] > 1 else everything
    return (outer, within, heads, rows, everything)
