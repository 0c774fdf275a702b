"""How much memory traffic a problem cannot do without, beside its arithmetic (``triflash/flops.py``). Plain integers.

Bytes count each tensor of the pass once: what any implementation must read and write at least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..flops import attention_flops, visible_pairs

__all__ = ["PASSES", "attention_bytes", "attention_flops", "visible_pairs"]

PASSES = ("fwd", "bwd", "fwd+bwd", "step")


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
    return {"fwd": forward, "bwd": backward}.get(which, forward + backward)
