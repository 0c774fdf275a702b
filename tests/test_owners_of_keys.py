"""dk and dv by a launch each of the kernel for both."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import triflash
from triflash.plan.configs import Problem, TileConfig, default_config, shared_memory
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.override import override_configs
from triflash.plan.select import plan_backward
from triflash.spec import AttentionSpec, BiasSpec, Needs

ALL = Needs(True, True, True, False)
SM90 = KNOWN_DEVICES["sm90"]


def spec(head_dim: int = 64, keys: int = 2048, hi: int | None = 0, heads: int = 8, batch: int = 8) -> AttentionSpec:
    return AttentionSpec("bf16", batch, 1, keys, keys, heads, head_dim, head_dim, None, None, hi, 0.1, "ieee")


def names(problem: AttentionSpec, needs: Needs = ALL, arch: str = "sm90") -> list[str]:
    return [step.kernel for step in plan_backward(problem, needs, KNOWN_DEVICES[arch], "triton").steps]


def test_a_launch_each_by_hand() -> None:
    both, tile = ["delta", "dkdv", "dq"], TileConfig(32, 128, 8, 3)
    assert names(spec(64)) == both
    for chosen in ({"dk": tile}, {"dv": tile}, {"dk": tile, "dv": tile}):
        with override_configs(**chosen):
            steps = plan_backward(spec(64), ALL, SM90, "triton").steps
        assert [(step.kernel, step.gives) for step in steps[1:3]] == [("dk", ("dk",)), ("dv", ("dv",))]
        own = {step.kernel: step.config for step in steps}
        default = default_config(Problem("dkdv", 64, 2, False, True), SM90)
        assert (own["dk"], own["dv"]) == (chosen.get("dk", default), chosen.get("dv", default))
        assert all(step.programs == 8 * 8 * 2048 // step.config.block_n for step in steps[1:3])  # type: ignore[union-attr]
    with override_configs(dk=tile, dkdv=tile):
        assert names(spec(64))[1:3] == ["dk", "dv"]
    bias = BiasSpec("bf16", (False, False, True, False, True))
    with override_configs(dk=tile):  # a launch for dk and dv gives the gradient of such a bias, and there is one of them
        assert names(dataclasses.replace(spec(64), bias=bias), Needs(True, True, True, True))[1] == "dkdv"


def test_where_rows_say_so() -> None:
    """Head dims above 128 on sm90, of 16 bits, without what takes registers; for what is wanted alone, too."""
    apart, both, wide = ["delta", "dk", "dv", "dq"], ["delta", "dkdv", "dq"], spec(256)
    assert names(wide) == names(spec(160, hi=None)) == names(dataclasses.replace(wide, dtype="fp16")) == apart
    assert names(spec(256, 512)) == apart and names(spec(256, 511)) == both
    assert names(wide, Needs(False, False, True, False)) == ["dv"] and names(wide, Needs(False, True, False, False)) == ["delta", "dk"]
    bias = BiasSpec("bf16", (False, False, True, True, True))
    heavier = ({"bias": bias}, {"second": bias}, {"mask": bias}, {"softcap": 20.0}, {"alibi": True}, {"dropout": 0.1}, {"dtype": "fp32"})
    for more in ({}, *heavier):
        assert names(dataclasses.replace(wide, **more))[1] == ("dkdv" if more else "dk"), more
        assert names(dataclasses.replace(spec(128), **more)) == both
    assert names(wide, arch="sm80") == names(wide, arch="gfx942") == both
    with override_configs(dkdv=TileConfig(32, 64, 8, 3)):
        assert names(wide) == both


def test_one_keeps_less_than_both() -> None:
    config = TileConfig(32, 64, 4, 2)
    used = {kernel: shared_memory(Problem(kernel, 128, 2, False, True), config, SM90) for kernel in ("dkdv", "dk", "dv")}
    assert used["dk"] == used["dkdv"] == used["dv"] + 64 * 128 * 2


@pytest.mark.parametrize("causal", [False, True])
def test_a_launch_each_gives_the_same_bits(device: torch.device, causal: bool) -> None:
    """The loops are the same, and so is the order of every sum."""
    q, k, v, dout = (
        torch.randn(2, rows, heads, 16, dtype=torch.float16, device=device) for rows, heads in ((50, 4), (50, 2), (50, 2), (50, 4))
    )
    for x in (q, k, v):
        x.requires_grad_()
    tile = TileConfig(16, 32, 4, 1)
    found = []
    for chosen in ({"dkdv": tile}, {"dk": tile, "dv": tile}):
        with override_configs(**chosen):
            out = triflash.attention(q, k, v, causal=causal, backend="triton")
            found.append(torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
            found.append((found[-1][0], *torch.autograd.grad(out, (k,), dout, retain_graph=True), *torch.autograd.grad(out, (v,), dout)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert all(x.abs().max() > 0 for x in found[0])
