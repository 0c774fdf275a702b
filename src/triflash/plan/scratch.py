"""What a plan allocates beyond inputs, outputs and gradients, as ``launch/`` and the backends do it. Plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..spec import AttentionSpec, Needs
from .hopper_backward import KeysConfig, dims, keys_tiles, stats_kinds, stats_length
from .hopper_steps import EDGE, FLAGS, finds_mild
from .layout import tma_padded
from .steps import Plan

__all__ = ["scratch"]


def scratch(plans: Sequence[Plan], spec: AttentionSpec, needs: Needs) -> Iterable[tuple[str, int]]:
    """(what, bytes) of a forward plan, or of a forward and a backward plan. Copies of inputs are not in it: see ``layout.py``."""
    rows = spec.batch * spec.heads * spec.queries
    width = 8 if spec.dtype == "fp64" else 4
    yield "lse" if len(plans) == 1 else "lse (until the backward pass)", rows * width
    if spec.keeps_rest:
        yield "rest of lse", rows * 4
    if len(plans) > 1:
        backward = plans[1]
        if backward.backend == "tiled" or backward.step("delta"):
            yield "delta", rows * width
        if backward.step("prepare"):
            yield "lse and delta for TMA", spec.batch * spec.heads * stats_kinds(spec) * stats_length(spec) * 4
            if finds_mild(spec, backward.steps):
                yield "whether lse is mild", FLAGS * 4
        if backward.step("finish"):
            blocks = spec.batch * spec.heads * -(-spec.queries // EDGE.block_m)
            yield "float32 sum of dq", blocks * EDGE.block_m * -(-spec.head_dim // 8) * 8 * 4
        if backward.backend == "hopper" and any(step.gives == ("dbias",) and step.kernel == "dq" for step in backward.steps):
            yield "dq, which nobody asked for", math.prod(tma_padded((rows, spec.head_dim), 2)) * 2
        for step in backward.steps:
            if isinstance(step.config, KeysConfig) and step.config.head_splits > 1 and {"dk", "dv"} & set(step.gives):
                columns = sum(width for name, width in zip(("dk", "dv"), dims(spec), strict=True) if name in step.gives)
                yield "partial sums of dk and dv", keys_tiles(spec, step.config)[1] * step.config.block_n * columns * 4
            if "dbias" in step.gives and step.splits > 1 and step.kernel != "dbias_sum":
                yield "partial sums of dbias", step.splits * _bias_elements(spec) * 4
        if needs.dsink and backward.backend != "oracle":
            yield "probabilities of the sink", rows * width
        if backward.backend == "tiled" and needs.dq and spec.dtype in ("fp16", "bf16"):
            yield "float32 sum of dq", rows * spec.head_dim * 4
        if backward.backend == "tiled" and needs.dbias and spec.bias is not None and spec.bias.dtype in ("fp16", "bf16"):
            yield "float32 sum of dbias", _bias_elements(spec) * 4
    if any(plan.backend == "oracle" for plan in plans):
        yield "every score in float64, several times", rows * spec.keys * 8


def _bias_elements(spec: AttentionSpec) -> int:
    assert spec.bias is not None
    sizes = (spec.batch_outer, spec.batch_inner, spec.heads, spec.queries, spec.keys)
    return math.prod(size for size, varies in zip(sizes, spec.bias.varies, strict=True) if varies)
