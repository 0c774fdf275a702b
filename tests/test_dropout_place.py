"""Dropout of a part of a larger problem drops what the whole does, on every backend: its seed tells where the part lies."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import triflash
from gluon_twin import twin_device
from triflash import oracle
from triflash.cli.bench.tolerance import GRADIENT_FACTOR, OUTPUT_FACTOR, Judgement, assert_close
from triflash.dropout import keep_mask
from triflash.ops import attention_forward

P = 0.4
SEED, OFFSET, HEADS = 11, 3, 5


def placed(row: int, key: int, head: int, *more: int) -> Tensor:
    return torch.tensor([SEED, OFFSET, row, key, head, HEADS, *more])


@pytest.mark.parametrize("row, key, head", [(0, 0, 0), (16, 32, 1), (5, 0, 2), (8, 9, 3), (2**20 + 7, 2**21 + 8, 4)])
def test_a_part_of_the_marks(row: int, key: int, head: int) -> None:
    whole = keep_mask(torch.tensor([SEED, OFFSET]), P, 2, HEADS, slice(row, row + 40), slice(key, key + 24))
    part = keep_mask(placed(row, key, head), P, 2, HEADS - head, slice(0, 40), slice(0, 24))
    assert torch.equal(part, whole[:, head:]) and not torch.equal(part, ~whole[:, head:])
    seven = keep_mask(placed(row, key, head, 16), P, 2, 1, slice(8, 40), slice(0, 24))
    assert torch.equal(seven, whole[:, head : head + 1, 8:])


@pytest.mark.parametrize("backend, row, key", [("oracle", 5, 9), ("tiled", 5, 9), ("triton", 5, 9), ("triton", 48, 16), ("hopper", 48, 16)])
def test_backends_drop_the_same(backend: str, row: int, key: int) -> None:
    """Values and gradients against the dense oracle in float64, whose marks the test above has judged."""
    dtype = torch.float16
    q, k, v = (torch.randn(1, length, 2, 16).to(dtype) for length in (70, 90, 90))
    bias, dout = torch.randn(1, 1, 2, 70, 90).to(dtype), torch.randn(1, 70, 2, 16).to(dtype)
    seed = placed(row, key, 2, 16) if backend == "hopper" else placed(row, key, 2)

    def dense(to: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(to).requires_grad_() for x in (q, k, v, bias)]
        out, _ = oracle.attention(*leaves, dropout_seed=placed(row, key, 2), dropout_p=P, hi=20, dtype=to)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(to))]

    exact, plain = dense(torch.float64), dense(dtype)
    with twin_device(2) if backend == "hopper" else nullcontext(), triflash.record_launches() as ran:
        leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
        out, _, _ = attention_forward(*leaves, 1, None, 20, 0.25, "", backend, None, None, None, None, seed, 0.0, P, True)
        found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    assert ran and all(line.startswith(backend) for line in ran), ran
    for name, got, reference, yardstick in zip(("out", "dq", "dk", "dv", "dbias"), found, exact, plain, strict=True):
        factor = OUTPUT_FACTOR if name == "out" else GRADIENT_FACTOR
        assert_close(name, got, Judgement(reference, yardstick, factor, dtype, 1e-3))


def test_hopper_wants_multiples_of_16() -> None:
    x = torch.randn(1, 32, 2, 16).half()
    with twin_device(2), pytest.raises(triflash.UnsupportedError, match=r"^dropout of a part that begins at no multiple of 16 .*triton"):
        attention_forward(x, x, x, None, 1, None, None, 0.25, "", "hopper", None, None, None, None, placed(5, 0, 0), 0.0, P)
    with pytest.raises(ValueError, match="dropout_seed"):
        attention_forward(x, x, x, None, 1, None, None, 0.25, "", "tiled", None, None, None, None, placed(5, 0, 0)[:5], 0.0, P)
