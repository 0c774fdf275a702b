"""Kernels of dropout at a place compile for a Hopper GPU, as they do without: those of backend hopper read it in Gluon itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from triflash.launch import ahead
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.select import plan_backward, plan_forward
from triflash.spec import Needs, Operands, spec_of


@pytest.mark.parametrize("backend, numbers, dim", [("hopper", 7, 64), ("hopper", 7, 256), ("triton", 6, 64)])
def test_kernels_compile(backend: str, numbers: int, dim: int) -> None:
    facts = KNOWN_DEVICES["sm90"]
    q, seed = (
        torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in (((1, 512, 2, dim), torch.bfloat16), (numbers, torch.int64))
    )
    bias = torch.empty(1, 1, 2, 512, 512, dtype=torch.bfloat16, device="meta") if dim == 64 else None
    spec = spec_of(q, q, q, bias, 1, None, 0, 0.125, "", dropout_seed=seed, dropout_p=0.1)
    operands = Operands(q, q, q, bias, dropout_seed=seed)
    needs = Needs(True, True, True, bias is not None)
    calls = ahead.calls_of(plan_forward(spec, facts, backend), spec, replace(needs, dq=False, dk=False, dv=False, dbias=False), *operands)
    calls += ahead.calls_of(plan_backward(spec, needs, facts, backend), spec, needs, *operands)
    assert len(calls) >= 3
    for call in calls:
        assert ahead.resources(ahead.compile_for(call, "sm90")).registers > 0
