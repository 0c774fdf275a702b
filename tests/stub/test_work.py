"""How much of our Python a call runs: by count, which no other process disturbs. Eager calls wait for every line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from ways import OURS

import triflash
from triflash import attention, attention_varlen, attention_with_kvcache
from triflash.bound.signature import CACHES, CALLS
from triflash.compat.flash_attn import flash_attn_func, flash_attn_varlen_func

# Memory is allocated another way where PyTorch may be asked to fill it.
pytestmark = pytest.mark.unpoisoned

SOURCE = str(Path(triflash.__file__).parent)
Q, K, V, DOUT = (torch.zeros(2, 136, 2, 64, dtype=torch.bfloat16) for _ in range(4))
CACHE, OTHER, NEW, NEW_VALUES = (torch.zeros(2, n, 2, 64, dtype=torch.bfloat16) for n in (2048, 2048, 1, 1))
LENGTHS = torch.zeros(2, dtype=torch.int32)
LEARNT = [x.clone().requires_grad_() for x in (Q, K, V, torch.zeros(1, 2, 136, 136, dtype=torch.bfloat16))]


def forward(**options: Any) -> None:
    attention(Q, K, V, **options)


def step(**options: Any) -> None:
    torch.autograd.grad(attention(*LEARNT[:3], **options), LEARNT[:3], DOUT)


def step_with_bias(**options: Any) -> None:
    torch.autograd.grad(attention(*LEARNT[:3], bias=LEARNT[3], **options), LEARNT, DOUT)


PACKED = [torch.zeros(272, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
OFFSETS, DROWS = torch.tensor([0, 100, 272], dtype=torch.int32), torch.zeros(272, 2, 64, dtype=torch.bfloat16)


def packed_forward(**options: Any) -> None:
    with torch.no_grad():
        attention_varlen(*PACKED, OFFSETS, OFFSETS, 172, 172, **options)


def packed_step(**options: Any) -> None:
    torch.autograd.grad(attention_varlen(*PACKED, OFFSETS, causal=True, **options), PACKED, DROWS)


def packed_step_with_bias(**options: Any) -> None:
    torch.autograd.grad(attention_varlen(*PACKED, OFFSETS, bias=LEARNT[3], **options), [*PACKED, LEARNT[3]], DROWS)


def as_flash_attn(backend: str) -> None:
    with triflash.backend(backend):
        torch.autograd.grad(flash_attn_func(*LEARNT[:3], causal=True), LEARNT[:3], DOUT)


def as_flash_attn_varlen(backend: str) -> None:
    with triflash.backend(backend):
        torch.autograd.grad(flash_attn_varlen_func(*PACKED, OFFSETS, OFFSETS, 172, 172, causal=True), PACKED, DROWS)


def decode(**options: Any) -> None:
    attention_with_kvcache(Q[:, :1], CACHE, OTHER, cache_lengths=LENGTHS, **options)


def decode_new(**options: Any) -> None:
    attention_with_kvcache(Q[:, :1], CACHE, OTHER, cache_lengths=LENGTHS, k_new=NEW, v_new=NEW_VALUES, causal=True, **options)


def functions_run(call: Callable[[], object], before: int = 5) -> list[str]:
    """Our functions, in order, as often as they are called, after as many calls; but for what prepares launches for new addresses, which an allocator decides,
    and what hands them to Triton's C launcher, which its release does.
    """
    seen: list[str] = []
    here = sys._getframe()  # whose own callers have a __call__, too

    def called(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(SOURCE):
            above: FrameType | None = frame
            while above is not None and above is not here and above.f_code.co_name not in ("_prepare", "__call__"):
                above = above.f_back
            if above is None or above is here:
                seen.append(frame.f_code.co_name)

    for _ in range(before):
        call()
    sys.setprofile(called)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize(
    ("call", "backend", "most"),
    [
        (forward, "triton", 9), (forward, "hopper", 9), (step, "triton", 15), (step, "hopper", 15), (step_with_bias, "hopper", 15),
        (decode, "triton", 9), (decode_new, "triton", 11),
        (packed_forward, "triton", 12), (packed_forward, "hopper", 12), (packed_step, "triton", 19), (packed_step, "hopper", 19),
        (packed_step_with_bias, "hopper", 19), (as_flash_attn, "hopper", 29), (as_flash_attn_varlen, "hopper", 38),
    ],
)  # fmt: skip
def test_a_known_call_runs_few_functions(call: Callable[..., None], backend: str, most: int) -> None:
    CALLS.clear()
    CACHES.clear()
    seen = functions_run(lambda: call(backend=backend))
    assert len(seen) <= most, " ".join(seen)


def step_at(length: int, backend: str) -> None:
    leaves = [torch.zeros(1, length, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    torch.autograd.grad(attention(*leaves, causal=True, backend=backend), leaves, torch.zeros_like(leaves[0]))


# A later Triton than 3.6 is asked which kernel it has, argument by argument.
@pytest.mark.parametrize(("backend", "most"), [("triton", 565 if OURS else 865), ("hopper", 740 if OURS else 845)])
def test_a_step_at_a_new_length_runs_a_limited_number_of_functions(backend: str, most: int) -> None:
    """Its kernels are there, from lengths round it; all else is checked, planned and bound."""
    CALLS.clear()
    for length in (136, 168):
        step_at(length, backend)
    seen = functions_run(lambda: step_at(152, backend), before=0)
    assert len(seen) <= most, len(seen)
