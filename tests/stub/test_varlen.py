"""Packed sequences go the bound way, with the addresses of each call: tables, ragged rows, and what clears rows of nobody."""

from __future__ import annotations

import gpu
import pytest
import torch
from ways import bound_launches

from triflash import attention_varlen
from triflash.bound.signature import CALLS


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("D, dtype", [(64, torch.bfloat16), (72, torch.float16)])
def test_every_launch_is_bound(D: int, dtype: torch.dtype, deterministic: bool) -> None:
    CALLS.clear()
    cu = torch.tensor([0, 300, 300, 1000], dtype=torch.int32)
    for turn in range(2):
        q, k, v = (torch.zeros(1024, heads, D, dtype=dtype).requires_grad_() for heads in (4, 2, 2))
        before = gpu.launches()
        with bound_launches() as bound:
            out = attention_varlen(q, k, v, cu, causal=True, backend="hopper", deterministic=deterministic)
            torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
        count = gpu.launches() - before
        assert count == len(bound) and count >= 12, turn
    assert len(CALLS) == 1
