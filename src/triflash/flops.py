"""How many floating-point operations a problem cannot do without, and PyTorch's counter told of it. Used by ``ops.py`` and ``bench``.

FLOPs count what visible pairs of query and key cost: a product of two numbers and its addition are 2. The forward pass has two products of
length D and Dv a pair (q kᵀ, p v), the backward pass five (q kᵀ again, dout vᵀ, and those of dq, dk and dv): 2.5 times as many where
D = Dv. Softmax, the bias and its gradient are not counted, nor is what an implementation computes twice or for hidden pairs.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["attention_flops", "register_formulas", "visible_pairs"]

_COUNTER = "torch.utils.flop_counter"


@functools.lru_cache(maxsize=1024)
def visible_pairs(queries: int, keys: int, lo: int | None = None, hi: int | None = None) -> int:
    """How many pairs of query i and key j have ``lo <= j - i <= hi``; None leaves a side open."""
    if lo is None and hi is None:
        return queries * keys
    pairs = 0
    for i in range(queries):
        first = 0 if lo is None else max(i + lo, 0)
        last = keys - 1 if hi is None else min(i + hi, keys - 1)
        pairs += max(last - first + 1, 0)
    return pairs


def attention_flops(pairs: int, head_dim: int, value_dim: int, which: str) -> int:
    """FLOPs of a pass over ``pairs`` visible pairs, counted over all batch entries and query heads."""
    forward = pairs * 2 * (head_dim + value_dim)
    backward = pairs * 2 * (3 * head_dim + 2 * value_dim)
    return {"fwd": forward, "bwd": backward}.get(which, forward + backward)


def register_formulas(forward: Any, backward: Any, backward_: Any) -> None:
    """Have ``torch.utils.flop_counter.FlopCounterMode`` count these operators, as soon as anybody imports it, and with it Triton.

    A pair is visible if the band shows it. Masks and key lengths are not looked at: their values are on a device.
    """

    def pairs(q: Sequence[int], k: Sequence[int], lo: int | None, hi: int | None) -> int:
        return q[0] * q[2] * visible_pairs(q[1], k[1], lo, hi)

    def of_forward(q: Any, k: Any, v: Any, bias: Any, batch_inner: int, lo: int | None, hi: int | None, *_: Any, **__: Any) -> int:
        return attention_flops(pairs(q, k, lo, hi), q[3], v[3], "fwd")

    def of_backward(
        needs: Callable[[Sequence[Any]], Sequence[bool]], dout: Any, dlse: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, lse: Any,
        rest: Any, batch_inner: int, lo: int | None, hi: int | None, scale: float, precision: str, backend: str, *more: Any, **_: Any,
    ) -> int:  # fmt: skip
        dq, dk, dv, dbias = needs(more)
        D, Dv = q[3], v[3]
        lengths = D + Dv * (dq or dk or dbias) + D * dq + D * dk + Dv * dv
        return pairs(q, k, lo, hi) * 2 * lengths if dq or dk or dv or dbias else 0

    def register(counter: ModuleType) -> None:
        counter.register_flop_formula(forward)(of_forward)
        counter.register_flop_formula(backward)(functools.partial(of_backward, lambda more: list(map(bool, more[0][:4]))))
        counter.register_flop_formula(backward_)(functools.partial(of_backward, lambda more: [x is not None for x in more[:4]]))

    if _COUNTER in sys.modules:
        register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported(register))


class _WhenImported(MetaPathFinder):
    """Finds the module of PyTorch's counter like everybody else, once, and tells of it when it has been executed."""

    def __init__(self, tell: Callable[[ModuleType], None]) -> None:
        self.tell = tell

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                self.tell(module)

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec
