"""How a caller lays the tensors of one call out, and the way to the canonical form of the operators: views, wherever strides allow.

Called by ``arguments.py``, ``ops*.py`` and ``bound/``: on a caller's tensors, on fake ones while PyTorch traces, and on meta tensors while
a pass is bound. Torch only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .spec import Operands

__all__ = ["Form"]

Copy = Callable[[str, Tensor], Tensor]  # (name, x) -> a contiguous copy of x


@dataclass(frozen=True)
class Form:
    """The layout of a call's tensors.

    batch: the leading dims of q, k and v, in one in the canonical form. split: how many of them are the outer of the two batch levels that
    a bias and a mask know. heads_first: q is ``(*batch, H, M, D)``, not ``(*batch, M, H, D)``, and k, v, out alike. tensors: in how many q,
    k and v come: 3, 2 (q, and k and v stacked in dim 2) or 1 (all three stacked there); those that are absent are None. canonical: the
    tensors are in the operators' form already, bias and mask with five dims. contiguous: gradients of q, k and v are; else they have their
    operands' strides where these leave no gaps, as PyTorch's own do. layouts: of the bias and the mask of packed sequences
    (``spec.LAYOUTS``), of which q is ``(Tq, H, D)`` and ``batch`` is ``()``; None: there are none.
    """

    batch: tuple[int, ...]
    split: int
    heads_first: bool = False
    tensors: int = 3
    canonical: bool = False
    contiguous: bool = False
    layouts: tuple[str, str] | None = None

    @property
    def folds(self) -> bool:
        """Whether canonical tensors have fewer batch dims, so that some may be copies."""
        return len(self.batch) > 1 and not self.canonical

    @property
    def inner(self) -> int:
        """The batch entries of the inner level."""
        return math.prod(self.batch[self.split :])

    def operands(self, given: Sequence[Tensor | None], copy: Copy | None = None) -> Operands:
        """The canonical operands of the tensors given (in the order of :class:`~triflash.spec.Operands`, packed ones as above).

        Where a fold of batch dims is no view, ``copy`` makes what is folded; None: PyTorch does, differentiably.
        """
        q, k, v, bias, mask, lengths, slopes, sink, seed, *others = given
        others, places = others[:5], others[5:]
        *offsets, other = others if len(others) == 5 else (*others, None)
        first, second = self.layouts or ("", "")
        if bias is None:  # one mask alone is one more kind of bias
            bias, mask, first = mask, None, second
        q, k, v = self.unpacked(q, k, v)
        if self.canonical:
            everything = (q, k, v, bias, mask, lengths, slopes, sink, seed, *(offsets or (None,) * 4), other, *places)
            return Operands._make(everything + (None,) * (len(Operands._fields) - len(everything)))
        # Names that no variable holds: whatever is read here from outside, a compiled program compares at every call.
        offsets_q, offsets_k, used_q, used_k = offsets or (None, None, None, None)
        starts, counts, key_starts, diagonal = places or (None, None, None, None)
        return Operands(
            self.rows("q", q, copy),
            self.rows("k", k, copy),
            self.rows("v", v, copy),
            bias=None if bias is None else self._five("bias", bias, copy, first),
            mask=None if mask is None else self._five("mask", mask, copy, second),
            key_lengths=None if lengths is None else _entries("key_lengths", lengths, copy),
            alibi_slopes=None if slopes is None else self._heads(slopes, copy),
            sink=sink,
            dropout_seed=seed,
            offsets_q=offsets_q,
            offsets_k=offsets_k,
            used_q=used_q,
            used_k=used_k,
            second_bias=None if other is None else self._five("second_bias", other, copy, first),
            query_starts=None if starts is None else _entries("query_starts", starts, copy),
            query_lengths=None if counts is None else _entries("query_lengths", counts, copy),
            key_starts=None if key_starts is None else _entries("key_starts", key_starts, copy),
            diagonal=None if diagonal is None else _entries("diagonal", diagonal, copy),
        )

    def unpacked(self, q: Tensor | None, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v however they are packed; views."""
        if self.tensors == 1:
            q, k, v = q.unbind(2)  # type: ignore[union-attr]
        elif self.tensors == 2:
            k, v = k.unbind(2)  # type: ignore[union-attr]
        return q, k, v  # type: ignore[return-value]

    def rows(self, name: str, x: Tensor, copy: Copy | None = None) -> Tensor:
        """q, k, v, out or a gradient of them, one tensor, as ``(B, L, H, D)``."""
        if self.canonical:
            return x
        if self.heads_first:
            x = x.transpose(-3, -2)
        return x if len(self.batch) == 1 else _fold(name, x, (math.prod(self.batch), *x.shape[-3:]), copy)

    def lse(self, name: str, x: Tensor, copy: Copy | None = None) -> Tensor:
        """An lse or its gradient ``(*batch, H, M)`` as ``(B, H, M)``."""
        return x if self.canonical or len(self.batch) == 1 else _fold(name, x, (math.prod(self.batch), *x.shape[-2:]), copy)

    def out_of(self, rows: Tensor) -> Tensor:
        """A contiguous canonical out as the caller gets it; a view."""
        if self.canonical:
            return rows
        out = rows if len(self.batch) == 1 else rows.reshape(*self.batch, *rows.shape[1:])
        return out.transpose(-3, -2) if self.heads_first else out

    def lse_of(self, lse: Tensor) -> Tensor:
        """A contiguous canonical lse as the caller gets it; a view."""
        return lse if self.canonical or len(self.batch) == 1 else lse.reshape(*self.batch, *lse.shape[1:])

    def gradients_of(self, grads: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of canonical q, k, v, bias, sink and second bias as given: views, and a copy of what is packed."""
        q, k, v = (None if x is None else self.out_of(x) for x in grads[:3])
        bias, like = grads[3], given[3]
        if self.tensors == 2:
            k, v = (None if k is None or v is None else torch.stack([k, v], 2)), None
        elif self.tensors == 1:
            q, k, v = (None if q is None or k is None or v is None else torch.stack([q, k, v], 2)), None, None
        other = None if grads[5] is None or given[13] is None else grads[5].reshape(given[13].shape)
        return [q, k, v, None if bias is None or like is None else bias.reshape(like.shape), grads[4], other]

    def bias(self, bias: Tensor) -> Tensor:
        """The gradient of a bias, contiguous and of its shape, with five dims; a view."""
        return bias if self.canonical else self._five("dbias", bias, None, (self.layouts or ("",))[0])

    def _five(self, name: str, bias: Tensor, copy: Copy | None, layout: str) -> Tensor:
        if layout:
            return {"padded": lambda x: x[:, None], "rows": lambda x: x[None, None], "keys": lambda x: x[None, None, :, None]}[layout](bias)
        missing = len(self.batch) + 3 - bias.dim()
        wide = bias[(None,) * missing] if missing else bias
        if len(self.batch) == 1:
            return wide[:, None] if self.split == 1 else wide[None]
        outer, inner = wide.shape[: self.split], wide.shape[self.split : len(self.batch)]
        return _fold(name, wide, (math.prod(outer), math.prod(inner), *wide.shape[-3:]), copy)

    def _heads(self, slopes: Tensor, copy: Copy | None) -> Tensor:
        if slopes.dim() == 1:
            return slopes[None]
        return slopes if slopes.dim() == 2 else _fold("alibi_slopes", slopes, (math.prod(self.batch), slopes.shape[-1]), copy)


def _entries(name: str, x: Tensor, copy: Copy | None) -> Tensor:
    """One number for each batch entry."""
    return _fold(name, x, (math.prod(x.shape),), copy)


def _fold(name: str, x: Tensor, shape: tuple[int, ...], copy: Copy | None) -> Tensor:
    if copy is None:
        return x.reshape(shape)
    try:
        return x.view(shape)
    except RuntimeError:  # "view size is not compatible": the dims do not lie one behind the other
        return copy(name, x).view(shape)
