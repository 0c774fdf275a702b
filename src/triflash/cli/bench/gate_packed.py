"""The gate for packed sequences: those of one length are a dense batch, judged by the gate for such, and what they share is summed.

Of a problem with more than ``limit`` scores as many sequences are judged as it allows, the last, the first and the longest before others.
The gradient of a bias needs them all; it is judged in the last key head's query heads. Every element of every result must be finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .exact import Problem
from .gate import LIMIT, Index, Part, reference
from .tolerance import GRADIENT_FACTOR, Judgement

__all__ = ["packed_reference"]


def packed_reference(problem: Problem, wanted: Sequence[str], limit: int | None = None) -> list[Part]:
    """:func:`~.gate.reference` of packed sequences: q ``(1, T, H, D)``, a bias ``(B|1, 1, H|1, longest|1, longest|1)``."""
    limit = LIMIT.get(problem.q.device.type, LIMIT["cpu"]) if limit is None else limit
    own = [name for name in wanted if name != "dbias"]
    parts: list[Part] = []
    for numbers in _groups(problem, _judged(problem, limit)):
        rows = _rows(problem, numbers)
        parts += [
            replace(part, shape=_whole(problem, part.name), index=_moved(part.index, rows))
            for part in reference(_dense(problem, numbers), own, limit)
        ]
    if "dbias" in wanted:
        parts.append(_dbias(problem, limit))
    return parts


def _whole(problem: Problem, name: str) -> tuple[int, ...]:
    return tuple({"out": problem.dout, "dq": problem.q, "dk": problem.k, "dv": problem.v}[name].shape)


def _judged(problem: Problem, limit: int) -> list[int]:
    """Numbers of sequences that have at most ``limit`` scores between them, or of one."""
    sequences, heads = problem.sequences, problem.q.shape[2]
    last = len(sequences) - 1
    middle = sorted(range(len(sequences)), key=lambda n: (-sequences[n], n))
    chosen: list[int] = []
    left = limit
    for n in dict.fromkeys([last, 0, *middle]):
        if not chosen or heads * sequences[n] ** 2 <= left:
            chosen.append(n)
            left -= heads * sequences[n] ** 2
    return sorted(chosen)


def _groups(problem: Problem, numbers: Sequence[int]) -> list[list[int]]:
    """Sequences of one length together."""
    by_length: dict[int, list[int]] = {}
    for n in numbers:
        by_length.setdefault(problem.sequences[n], []).append(n)
    return list(by_length.values())


def _rows(problem: Problem, numbers: Sequence[int]) -> Tensor:
    """Where sequences of one length have their rows: (sequence, position)."""
    length = problem.sequences[numbers[0]]
    begins = torch.tensor([0, *problem.sequences]).cumsum(0)[torch.tensor(numbers)]
    return (begins[:, None] + torch.arange(length)).to(problem.q.device)


def _dense(problem: Problem, numbers: Sequence[int]) -> Problem:
    """Sequences of one length as a dense batch."""
    rows, length = _rows(problem, numbers), problem.sequences[numbers[0]]
    q, k, v, dout = (x[0][rows] for x in (problem.q, problem.k, problem.v, problem.dout))
    bias = problem.bias
    if bias is not None:
        own = bias[torch.tensor(numbers, device=bias.device)] if bias.shape[0] > 1 else bias
        bias = own[:, :, :, : (length if bias.shape[3] > 1 else 1), : (length if bias.shape[4] > 1 else 1)]
    return Problem(q, k, v, bias, dout, problem.options)


def _moved(index: Index, rows: Tensor) -> Index:
    """A part's index into a dense batch, (entries, positions, heads), as one into the packed tensor."""
    entries, positions, heads = index
    return (0, rows[entries][:, positions], heads)  # type: ignore[return-value]


def _dbias(problem: Problem, limit: int) -> Part:
    """The gradient of the bias, summed over sequences that share it."""
    bias, heads = problem.bias, problem.q.shape[2]
    assert bias is not None
    own = slice(None)
    if heads * sum(n * n for n in problem.sequences) > limit and bias.shape[2] > 1:
        group = heads // problem.k.shape[2]
        own = slice(heads - group, heads)
        q, dout = problem.q[:, :, own], problem.dout[:, :, own]
        k, v = problem.k[:, :, -1:], problem.v[:, :, -1:]
        sinks = None if problem.options.sinks is None else problem.options.sinks[own]
        problem = replace(problem, q=q, k=k, v=v, dout=dout, bias=bias[:, :, own], options=replace(problem.options, sinks=sinks))
    assert problem.bias is not None
    exact, plain, slack = (problem.bias.new_zeros(problem.bias.shape, dtype=torch.float64) for _ in range(3))
    for numbers in _groups(problem, range(len(problem.sequences))):
        dense = _dense(problem, numbers)
        assert dense.bias is not None
        scores = dense.q.shape[0] * dense.q.shape[2] * dense.q.shape[1] ** 2
        (part,) = reference(dense, ("dbias",), scores)  # all of it
        entries: Tensor | slice = torch.tensor(numbers, device=bias.device) if bias.shape[0] > 1 else slice(None)
        at = (entries, slice(None), slice(None), slice(0, dense.bias.shape[3]), slice(0, dense.bias.shape[4]))
        judged = part.judgement
        for total, value in ((exact, judged.reference), (plain, judged.plain), (slack, judged.slack)):
            total[at] += value
    index: Index = (slice(None), slice(None), own)
    judgement = Judgement(exact, plain.to(bias.dtype), GRADIENT_FACTOR, problem.q.dtype, slack)
    return Part("dbias", tuple(bias.shape), index, judgement)
