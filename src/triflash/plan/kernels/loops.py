"""Which of Hopper's backward kernels are launched twice, each time with one of their two loops. Called by ``plan/hopper.py``. Pure.

A kernel that may meet huge scores has a loop for where every lse is small and another for any (``kernels/hopper/preprocess.py``), and finds
out on the device which. Both in one kernel make it 1.01 to 1.06 times as slow as the first alone, by their length and by what the compiler
makes of them. Two kernels with a loop each, of which one leaves at once, have none of that, but launching one more takes the GPU 2.6 µs and
the host a few (H200, docs/results/2026-11-30-h200-huge-scores).
"""

from __future__ import annotations

from dataclasses import replace

from ...flops import visible_pairs
from ...spec import AttentionSpec
from ..device import DeviceFacts
from ..steps import Step
from .shared import HopperConfig

__all__ = ["LONG", "by_loops", "microseconds", "reads_small_lse"]

LONG = 370.0  # µs of a kernel, of which 2.6 are 0.7 %; shorter ones are those of models whose steps wait for the host
FLOPS = 5e6  # a µs and an SM, of dkdv and dq; 500 to 700 TFLOP/s an H200, the least where time goes to softmax


def reads_small_lse(spec: AttentionSpec, step: Step) -> bool:
    """Whether that kernel is the faster for it if every lse is small."""
    return spec.keeps_rest and isinstance(step.config, HopperConfig) and step.config.reads_small_lse(spec)


def microseconds(spec: AttentionSpec, step: Step, device: DeviceFacts) -> float:
    """About how long the MMAs of a backward kernel take, of all pairs that the band shows: lengths and masks are known on the device alone.

    It is right to a tenth at head dim 128, and too little where something else takes longer. µs, H200, 16,384 tokens, 16 heads:

    ====================  ========  =========
    kernel, sequences     measured  this says
    ====================  ========  =========
    dqdkdv, d 128, 2048   1048      1041
    dkdv, d 128 c., 2048  407       417
    dq, d 128 c., 2048    296       312
    dqdkdv, d 64, 2048    604       521
    dqdkdv, d 64 c., 2048 341       260
    ====================  ========  =========
    """
    head, value = spec.head_dim, spec.value_dim
    columns = head + value  # of s and dp
    columns += head * sum(name in step.gives for name in ("dk", "dq")) + value * ("dv" in step.gives)
    pairs = spec.batch * spec.heads * visible_pairs(spec.queries, spec.keys, spec.lo, spec.hi)
    return 2.0 * pairs * columns / (FLOPS * device.sms)


def by_loops(spec: AttentionSpec, step: Step, device: DeviceFacts) -> tuple[Step, ...]:
    """The step, or if it has two loops and takes long, one for each: ``loops`` is then ``"small"``, and ``"any"``. spec: of a dense batch,
    of which packed sequences have those of the mean length, with no more pairs than their own.
    """
    if not reads_small_lse(spec, step) or microseconds(spec, step, device) < LONG:
        return (step,)
    return replace(step, loops="small"), replace(step, loops="any")
