"""In which order the portable kernels' programs go through tiles."""

from __future__ import annotations

import types

import pytest
import torch

import triflash
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.select import plan_backward, plan_forward
from triflash.spec import AttentionSpec, Needs

ALL = Needs(True, True, True, False)


def spec(head_dim: int = 64, keys: int = 2048, hi: int | None = 0, heads: int = 8, batch: int = 8) -> AttentionSpec:
    return AttentionSpec("bf16", batch, 1, keys, keys, heads, head_dim, head_dim, None, None, hi, 0.1, "ieee")


@pytest.mark.parametrize("order", ["heavy", "tile", "batch", "head", 1, 4, 16, 64, 10_000])
def test_every_tile_has_one_program(order: str | int) -> None:
    prims = pytest.importorskip("triflash.kernels.triton.prims")
    source = prims.locate.fn
    for tiles, heads, batch in ((1, 1, 1), (3, 1, 5), (8, 3, 2), (32, 8, 5)):
        for reverse in (False, True):
            seen = []
            for pid in range(tiles * heads * batch):
                there = {**source.__globals__, "tl": types.SimpleNamespace(program_id=lambda _axis, pid=pid: pid)}
                seen.append(types.FunctionType(source.__code__, there)(tiles, heads, batch, order, reverse))
            assert sorted(seen) == [(t, h, b) for t in range(tiles) for h in range(heads) for b in range(batch)]
            if isinstance(order, int):  # a head's programs lie near each other, and of those the longest first
                pairs = max(1, order // tiles)
                for number, (tile, head, b) in enumerate(seen):
                    assert (b * heads + head) // pairs == number // (pairs * tiles)
                    earlier = [t for t, *other in seen[:number] if other == [head, b]]
                    assert all(t > tile if reverse else t < tile for t in earlier)


def test_sections_hold_a_few_programs_for_each_that_runs() -> None:
    """Under a band; and explain tells. What has no band goes by heads."""
    for arch in ("sm80", "sm90", "gfx942"):
        device = KNOWN_DEVICES[arch]
        steps = (*plan_forward(spec(), device, "triton").steps, *plan_backward(spec(), ALL, device, "triton").steps)
        for step in steps:
            if step.kernel != "delta":
                assert step.order == "heavy" and step.l2_group >= 2 * device.sms and step.config is not None
                assert step.l2_group == 2 * device.sms * max(1, 8 // step.config.num_warps)
        assert not any(step.l2_group for step in plan_backward(spec(hi=None), ALL, device, "triton").steps)
    q = torch.empty(8, 2048, 8, 64, dtype=torch.bfloat16, device="meta")
    text = str(triflash.explain(q, q, q, causal=True, backend="triton", device="h200"))
    assert "longest rows of the triangle first in sections of 528 programs" in text
