"""How much arithmetic and memory traffic a pass that the bench times cannot do without (``triflash/flops.py``). Plain integers.

Bytes count each tensor of the pass once: what any implementation must read and write at least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ... import flops
from ...flops import visible_pairs

__all__ = ["HOST_PASSES", "PASSES", "attention_bytes", "attention_flops", "visible_pairs"]

HOST_PASSES = ("host-nograd", "host-fwd", "host-step")
PASSES = ("fwd", "bwd", "step", "eager", *HOST_PASSES, "first")
_FORWARD = ("fwd", "host-nograd", "host-fwd")


def attention_flops(pairs: int, head_dim: int, value_dim: int, which: str) -> int:
    """FLOPs of a pass over ``pairs`` visible pairs, counted over all batch entries and query heads."""
    return flops.attention_flops(pairs, head_dim, value_dim, "fwd" if which in _FORWARD else which)


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
