"""Packed sequences go the bound way, with the addresses of each call: tables, ragged rows, and what clears rows of nobody."""

from __future__ import annotations

import gpu
import pytest
import torch
from ways import bound_launches

from triflash import attention_varlen
from triflash.bound.signature import CALLS


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("D, dtype, deterministic", [(64, torch.bfloat16, False), (64, torch.bfloat16, True), (72, torch.float16, False)])
def test_every_launch_is_bound(D: int, dtype: torch.dtype, deterministic: bool, step: int) -> None:
    """step: of the offsets in memory; those that do not lie one behind the other are copied."""
    CALLS.clear()
    cu = torch.tensor([0, 300, 300, 1000], dtype=torch.int32).repeat_interleave(step)[::step]
    for turn in range(2):
        q, k, v = (torch.zeros(1024, heads, D, dtype=dtype).requires_grad_() for heads in (4, 2, 2))
        before = gpu.launches()
        with bound_launches() as bound:
            out = attention_varlen(q, k, v, cu, causal=True, backend="hopper", deterministic=deterministic)
            torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
        count = gpu.launches() - before
        assert count == len(bound), turn
        assert count == 6, turn  # forward two, backward four: tables, statistics, and two that have the products or sum dq
    assert len(CALLS) == 1
