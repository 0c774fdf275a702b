"""How many FLOPs a problem cannot do without, and PyTorch's counter told of it. Used by ``ops.py``, plans and ``bench``.

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
from itertools import pairwise
from types import ModuleType
from typing import Any

__all__ = ["attention_flops", "register_cache_formulas", "register_formulas", "register_varlen_formulas", "visible_pairs"]

_COUNTER = "torch.utils.flop_counter"


@functools.lru_cache(maxsize=1024)
def visible_pairs(queries: int, keys: int, lo: int | None = None, hi: int | None = None) -> int:
    """How many pairs of query i and key j have ``lo <= j - i <= hi``; None leaves a side open."""

    def up_to(count: int) -> int:
        """Pairs of which j - i is less than ``count``: query i has ``i + count`` keys, from 0 to all of them."""
        return _triangle(queries + count, keys) - _triangle(count, keys)

    return max((queries * keys if hi is None else up_to(hi + 1)) - (0 if lo is None else up_to(lo)), 0)


def _triangle(rows: int, most: int) -> int:
    """The sum of ``0 … rows - 1``, each at most ``most``."""
    growing = max(min(rows, most + 1), 0)
    return growing * (growing - 1) // 2 + max(rows - growing, 0) * most if rows > 0 else 0


def attention_flops(pairs: int, head_dim: int, value_dim: int, which: str) -> int:
    """FLOPs of a pass over ``pairs`` visible pairs, counted over all batch entries and query heads."""
    forward = pairs * 2 * (head_dim + value_dim)
    backward = pairs * 2 * (3 * head_dim + 2 * value_dim)
    return {"fwd": forward, "bwd": backward}.get(which, forward + backward)


def register_formulas(forward: Any, backward: Any, backward_: Any, backward_two: Any) -> None:
    """Have ``torch.utils.flop_counter.FlopCounterMode`` count these operators, as soon as anybody imports it, and with it Triton.

    A pair is visible if the band shows it. Masks, starts and lengths are not looked at: their values are on a device. Diagonals are read;
    of fake tensors, which have none, the last query counts as meeting the last key.
    """

    def pairs(q: Any, k: Any, lo: int | None, hi: int | None, diagonals: Any) -> int:
        (B, M, H), N = q.shape[:3], k.shape[1]
        if diagonals is None:
            return int(B * H * visible_pairs(M, N, lo, hi))
        try:
            found = [max(-M - N, min(int(x), M + N)) for x in diagonals.tolist()]
        except Exception:  # noqa: BLE001 (each kind of tensor without values has an error of its own)
            found = [N - M] * B
        sides = ((None if lo is None else lo + x, None if hi is None else hi + x) for x in found)
        return int(H * sum(visible_pairs(M, N, *each) for each in sides))

    def of_forward(
        q: Any, k: Any, v: Any, bias: Any, batch_inner: int, lo: int | None, hi: int | None, scale: float, precision: str, backend: str,
        *more: Any, **_: Any,
    ) -> int:  # fmt: skip
        return attention_flops(pairs(q, k, lo, hi, more[12] if len(more) > 12 else None), q.shape[3], v.shape[3], "fwd")

    def of_backward(
        needs: Callable[[Sequence[Any]], Sequence[bool]], at: int, dout: Any, dlse: Any, q: Any, k: Any, v: Any, bias: Any, out: Any,
        lse: Any, rest: Any, batch_inner: int, lo: int | None, hi: int | None, scale: float, precision: str, backend: str, *more: Any,
        **_: Any,
    ) -> int:  # fmt: skip
        dq, dk, dv, dbias = needs(more)
        D, Dv = q.shape[3], v.shape[3]
        lengths = D + Dv * (dq or dk or dbias) + D * dq + D * dk + Dv * dv
        seen = pairs(q, k, lo, hi, more[at] if len(more) > at else None)
        return int(seen * 2 * lengths) if dq or dk or dv or dbias else 0

    def register(counter: ModuleType) -> None:
        counter.register_flop_formula(forward, get_raw=True)(of_forward)
        for operator, needs, at in (  # at: where the diagonal is among what is behind the backend
            (backward, lambda more: list(map(bool, more[0][:4])), 12),
            (backward_two, lambda more: [*map(bool, more[0][:3]), bool(more[0][3] or more[0][5])], 13),
            (backward_, lambda more: [x is not None for x in more[:4]], 16),
        ):
            counter.register_flop_formula(operator, get_raw=True)(functools.partial(of_backward, needs, at))

    _when_imported(register)


def register_varlen_formulas(forward: Any, backward: Any, backward_: Any) -> None:
    """The same for the operators of packed sequences. Offsets are read; of fake tensors, which have none, sequences count as equally long,
    or as long as the caller says the longest is.
    """

    def lengths(offsets: Any, used: Any, rows: int, longest: int | None) -> list[int]:
        count = offsets.shape[0] - 1
        try:
            ends = [max(0, min(int(x), rows)) for x in offsets.tolist()]
            own = [max(end - start, 0) for start, end in pairwise(ends)]
            return own if used is None else [max(0, min(x, int(y))) for x, y in zip(own, used.tolist(), strict=True)]
        except Exception:  # noqa: BLE001 (each kind of tensor without values has an error of its own)
            return [rows // max(count, 1) if longest is None else longest] * count

    def pairs(q: Any, k: Any, at: Sequence[Any]) -> int:
        cu_q, cu_k, used_q, used_k, _second, left, right, bottom_right, *_, longest_q, longest_k, _backend = at
        total = 0
        own = zip(lengths(cu_q, used_q, q.shape[0], longest_q), lengths(cu_k, used_k, k.shape[0], longest_k), strict=True)
        for m, n in own:
            diagonal = n - m if bottom_right else 0
            lo, hi = None if left is None else diagonal - left, None if right is None else diagonal + right
            total += visible_pairs(m, n, lo, hi)
        return int(q.shape[1]) * total

    def of_forward(q: Any, k: Any, v: Any, *more: Any, **_: Any) -> int:
        return attention_flops(pairs(q, k, more[5:]), q.shape[2], v.shape[2], "fwd")

    def of_backward(dout: Any, dlse: Any, out: Any, lse: Any, rest: Any, needs: Any, q: Any, k: Any, v: Any, *more: Any, **_: Any) -> int:
        return of_gradients(list(map(bool, needs[:4])), q, k, v, more)

    def of_given(dout: Any, out: Any, lse: Any, dq: Any, dk: Any, dv: Any, q: Any, k: Any, v: Any, *more: Any, **_: Any) -> int:
        return of_gradients([*(x is not None for x in (dq, dk, dv)), False], q, k, v, more)

    def of_gradients(needs: Sequence[bool], q: Any, k: Any, v: Any, more: Sequence[Any]) -> int:
        dq, dk, dv, dbias = needs
        D, Dv = q.shape[2], v.shape[2]
        terms = D + Dv * (dq or dk or dbias) + D * dq + D * dk + Dv * dv
        return pairs(q, k, more[5:]) * 2 * terms if dq or dk or dv or dbias else 0

    def register(counter: ModuleType) -> None:
        counter.register_flop_formula(forward, get_raw=True)(of_forward)
        counter.register_flop_formula(backward, get_raw=True)(of_backward)
        counter.register_flop_formula(backward_, get_raw=True)(of_given)

    _when_imported(register)


def register_cache_formulas(forward: Any, forward_out: Any) -> None:
    """The same for the operators on KV caches. Lengths and offsets are read; of fake tensors, which have none, every request counts with
    all keys that it can hold, and packed queries are dealt out equally.
    """

    def of_forward(q: Any, k: Any, v: Any, lengths: Any, starts: Any, table: Any, index: Any, cu_q: Any, cu_new: Any, *more: Any) -> int:
        left, right, new = more[6], more[7], more[12]
        requests = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
        capacity = k.shape[1] * (1 if table is None else table.shape[1])
        queries = _read([q.shape[1]] * requests if cu_q is None else cu_q, q.shape[0] // max(requests, 1), requests, cu_q is not None)
        added = _read([new or 0] * requests if cu_new is None else cu_new, 0, requests, cu_new is not None)
        own = _read([capacity] * requests if lengths is None else lengths, capacity, requests, False)
        first = _read([0] * requests if starts is None else starts, 0, requests, False)
        pairs = 0
        for m, more_keys, length, start in zip(queries, added, own, first, strict=True):
            n = min(max(0, min(length, capacity)) + more_keys, capacity)
            lo, hi = None if left is None else n - m - left, None if right is None else n - m + right
            pairs += visible_pairs(m, n, lo, hi) - visible_pairs(m, max(0, min(start, n)), lo, hi)
        return attention_flops(int(q.shape[-2]) * pairs, q.shape[-1], v.shape[3], "fwd")

    def register(counter: ModuleType) -> None:
        for operator in (forward, forward_out):
            counter.register_flop_formula(operator, get_raw=True)(lambda *args, **_: of_forward(*args))

    _when_imported(register)


def _read(numbers: Any, otherwise: int, count: int, offsets: bool) -> list[int]:
    """Numbers in a list or a tensor, or the differences of offsets; ``otherwise`` each where a tensor has no values."""
    try:
        values = [int(x) for x in (numbers if isinstance(numbers, list) else numbers.tolist())]
    except Exception:  # noqa: BLE001 (each kind of tensor without values has an error of its own)
        return [otherwise] * count
    return [max(end - begin, 0) for begin, end in pairwise(values)] if offsets else values


def _when_imported(register: Callable[[ModuleType], None]) -> None:
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
