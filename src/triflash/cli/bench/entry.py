"""How a provider is called: its function, and the layout in which those who call it hold their tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Attend", "Biases", "Entry", "heads_first"]

Biases = Tensor | tuple[Tensor, Tensor] | None  # a pair is added
Attend = Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # q, k, v, biases -> out


def _as_is(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Entry:
    """A provider's function for one workload. Called itself, it goes from and to the bench's layout, ``(B, S, H, D)`` and five-dim biases.

    call: what is timed: q, k, v and the bias (or None, or two) in the provider's own layout -> out in that layout.
    lay, unlay: q, k, v, out and its gradient from the bench's layout into the provider's, and back; views, made before anything is timed.
    lay_bias: the same of a bias; None where the provider is told otherwise (as key lengths).
    around: what a program enters once, and not in each call: SDPA's choice of a backend.
    """

    call: Attend
    lay: Callable[[Tensor], Tensor] = _as_is
    unlay: Callable[[Tensor], Tensor] = _as_is
    lay_bias: Callable[[Tensor], Tensor | None] = _as_is
    around: Callable[[], AbstractContextManager[object]] = nullcontext

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Biases) -> Tensor:
        laid = tuple(self.lay_bias(each) for each in bias) if isinstance(bias, tuple) else None if bias is None else self.lay_bias(bias)
        with self.around():
            return self.unlay(self.call(self.lay(q), self.lay(k), self.lay(v), laid))


def heads_first(x: Tensor) -> Tensor:
    """``(B, S, H, D)`` seen as ``(B, H, S, D)``, and the other way round."""
    return x.transpose(1, 2)
