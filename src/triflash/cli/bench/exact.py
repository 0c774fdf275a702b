"""A box of scores in float64, and what plain PyTorch makes of it: the pieces that the gate's references are summed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import oracle
from . import formula
from .formula import Options
from .marks import Marks
from .tolerance import closed_backward, rounding_backward

__all__ = ["Box", "Problem", "as_slice"]


@dataclass(frozen=True)
class Problem:
    """One attention problem: tensors as :class:`.formula.Options` names them, dout like the output, bias and a second one beside it
    five-dim or None.

    sequences: lengths of those that are packed into the one batch entry; a bias is then by sequence and position. marks: of dropout, by
    which results are judged.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    dout: Tensor
    options: Options
    sequences: tuple[int, ...] = ()
    second: Tensor | None = None
    marks: Marks | None = None

    @property
    def biases(self) -> dict[str, Tensor]:
        """Those that there are, by the names of their gradients."""
        return {name: x for name, x in (("dbias", self.bias), ("dsecond", self.second)) if x is not None}

    @property
    def given(self) -> Tensor | tuple[Tensor, Tensor] | None:
        """The bias, or two, or None, as providers take them."""
        return self.bias if self.bias is None or self.second is None else (self.bias, self.second)


def as_slice(numbers: range) -> slice:
    """The slice that picks these numbers."""
    return slice(numbers.start, numbers.stop, numbers.step)


class Box:
    """Some neighbouring queries of some batch entries and heads, and the keys that their band lets them see."""

    def __init__(self, problem: Problem, entries: range, heads: range, queries: range, backward: bool) -> None:
        options, N = problem.options, problem.k.shape[1]
        group = problem.q.shape[2] // problem.k.shape[2]
        first = 0 if options.lo is None else min(max(0, queries.start + options.lo), N - 1)
        last = N if options.hi is None else max(min(N, queries.stop + options.hi), first + 1)
        self.keys = slice(first, last)
        moved = queries.start - first
        self.options = Options(
            scale=options.scale,
            lo=None if options.lo is None else options.lo + moved,
            hi=None if options.hi is None else options.hi + moved,
            softcap=options.softcap,
            sinks=None if options.sinks is None else options.sinks[as_slice(heads)],
            slopes=None if options.slopes is None else options.slopes[as_slice(heads)],
            shift=options.shift + moved,
            kept=None if problem.marks is None else problem.marks.kept(entries, heads, queries, self.keys) * problem.marks.factor,
        )
        batch, rows = as_slice(entries), as_slice(queries)
        kv_heads = torch.tensor([h // group for h in heads], device=problem.k.device)
        self.q, self.dout = (x[batch, rows, as_slice(heads)] for x in (problem.q, problem.dout))
        self.k, self.v = (x[batch, self.keys].index_select(2, kv_heads) for x in (problem.k, problem.v))
        self.biases = {name: self._part_of(x, options.batch_inner, entries, heads, rows) for name, x in problem.biases.items()}
        self._exact(backward)
        self.plain = self._plain(backward)

    def _part_of(self, bias: Tensor, inner: int, entries: range, heads: range, rows: slice) -> Tensor:
        """``(entries, heads|1, queries|1, keys|1)``."""
        everything = slice(None)
        bias = bias[
            :,
            :,
            as_slice(heads) if bias.shape[2] > 1 else everything,
            rows if bias.shape[3] > 1 else everything,
            self.keys if bias.shape[4] > 1 else everything,
        ]
        outer = [b // inner if bias.shape[0] > 1 else 0 for b in entries]
        within = [b % inner if bias.shape[1] > 1 else 0 for b in entries]
        return bias[outer, within]

    def _exact(self, backward: bool) -> None:
        """The reference in float64 and the slacks: see ``tolerance``."""
        q, k, v, dout = (x.double() for x in (self.q, self.k, self.v, self.dout))
        s, slope = formula.scores(q, k, tuple(self.biases.values()), self.options)
        p = formula.probabilities(s, self.options.sinks)
        kept = None if self.options.kept is None else self.options.kept.double()
        given = p if kept is None else p * kept
        out = torch.einsum("bhmn,bnhd->bmhd", given, v)
        size = s.masked_fill(s == -torch.inf, 0.0).abs()
        self.exact, self.shift = {"out": out}, {}
        self.rounding = {"out": torch.einsum("bhmn,bnhd->bmhd", given * (1 + size), v.abs())}
        if not backward:
            return
        stored = out.to(self.q.dtype).double()
        exact, shifted = (closed_backward(q, k, v, p, o, dout, None, self.options.scale, slope, kept) for o in (out, stored))
        rounding = rounding_backward(q, k, v, s, p, out, dout, None, self.options.scale, slope, kept)
        for name in ("dq", "dk", "dv", *self.biases):
            if name in self.biases:
                a, b, c = (x.ds.sum_to_size(self.biases[name].shape) for x in (exact, shifted, rounding))
            else:
                a, b, c = (getattr(x, name) for x in (exact, shifted, rounding))
            self.exact[name], self.shift[name], self.rounding[name] = a, b - a, c

    def _plain(self, backward: bool) -> dict[str, Tensor]:
        """The yardstick: the oracle's formula, or its extension, in the inputs' dtype, by autograd."""
        named = {"dq": self.q, "dk": self.k, "dv": self.v}
        named |= {name: x for name, x in self.biases.items() if x.dtype != torch.bool}
        with torch.enable_grad():
            leaves = {name: x.detach().clone().requires_grad_(backward) for name, x in named.items()}
            q, k, v = leaves["dq"], leaves["dk"], leaves["dv"]
            biases = {**self.biases, **leaves}
            bias, second = (biases.get(name) for name in ("dbias", "dsecond"))
            options = self.options
            if options.softcap is None and options.sinks is None and options.kept is None:
                more = dict(
                    lo=options.lo, hi=options.hi, scale=options.scale, dtype=q.dtype, alibi_slopes=options.slopes, shift=options.shift
                )
                out, _ = oracle.attention(q, k, v, bias, second_bias=second, **more)  # type: ignore[arg-type]
            else:
                out = formula.attention(q, k, v, tuple(x[:, None] for x in (bias, second) if x is not None), options)
        if not backward:
            return {"out": out}
        grads = torch.autograd.grad(out, list(leaves.values()), self.dout)
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}

    def value(self, kind: str, name: str) -> Tensor | None:
        """One result in one of its four kinds; None stands for zeros."""
        found: dict[str, Tensor] = getattr(self, kind)
        return found.get(name)
