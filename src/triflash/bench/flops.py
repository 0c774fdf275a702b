"""How much arithmetic and how much memory traffic a problem cannot do without. Plain integers.

FLOPs count what visible pairs of query and key cost: a product of two numbers and its addition are 2. The forward pass has two products of
length D and Dv a pair (q kᵀ, p v), the backward pass five (q kᵀ again, dout vᵀ, and those of dq, dk and dv): 2.5 times as many where
D = Dv. Softmax, the bias and its gradient are not counted, nor is what an implementation computes twice or for hidden pairs.

Bytes count each tensor of the pass once: what any implementation must read and write at least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["HOST_PASSES", "PASSES", "attention_bytes", "attention_flops", "visible_pairs"]

HOST_PASSES = ("host-nograd", "host-fwd", "host-step")
PASSES = ("fwd", "bwd", "step", "eager", *HOST_PASSES, "first")
_FORWARD = ("fwd", "host-nograd", "host-fwd")


def visible_pairs(queries: int, keys: int, lo: int | None = None, hi: int | None = None) -> int:
    """How many pairs of query i and key j have ``lo <= j - i <= hi``; None leaves a side open."""
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
    return forward if which in _FORWARD else backward if which == "bwd" else forward + backward


def attention_bytes(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], bias: Sequence[int] | None, itemsize: int, dbias: bool, which: str
) -> int:
    """Bytes that a pass must move, from the shapes of its tensors; the bias has the others' dtype.

    Forward: q, k, v and the bias are read, the output is written. Backward: these, the output, its gradient and the float32 lse are read;
    dq, dk, dv and, with ``dbias``, the bias's gradient are written.
    """
    (B, M, Hq, _), Dv = q, v[3]
    inputs = math.prod(q) + math.prod(k) + math.prod(v)
    biases = 0 if bias is None else math.prod(bias)
    out = B * M * Hq * Dv
    forward = (inputs + biases + out) * itemsize
    backward = (inputs + biases + 2 * out + inputs + (biases if dbias else 0)) * itemsize + 4 * B * Hq * M
    return forward if which in _FORWARD else backward if which == "bwd" else forward + backward
