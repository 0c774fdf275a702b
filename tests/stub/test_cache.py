"""Calls on a KV cache go the bound way: new keys, queries and the sum of parts, with the addresses of each call."""

from __future__ import annotations

from typing import Any

import gpu
import pytest
import torch
from ways import OURS, bound_launches

from triflash import attention_with_kvcache
from triflash.bound.signature import CACHES

B, HK, D = 2, 2, 64


def given(paged: bool, packed: bool) -> dict[str, Any]:
    half = torch.bfloat16
    cache = torch.zeros(20, 64, HK, D, dtype=half) if paged else torch.zeros(B, 2048, HK, D, dtype=half)
    new = torch.zeros(3, HK, D, dtype=half) if packed else torch.zeros(B, 1, HK, D, dtype=half)
    found = {
        "q": torch.zeros(3, 4, D, dtype=half) if packed else torch.zeros(B, 1, 4, D, dtype=half),
        "k_cache": cache, "v_cache": cache.clone(), "cache_lengths": torch.tensor([5, 900]), "k_new": new, "v_new": new.clone(),
        "causal": True, "backend": "triton",
    }  # fmt: skip
    if paged:
        found["page_table"] = torch.zeros(B, 16, dtype=torch.int32)
    if packed:
        found |= {name: torch.tensor([0, 1, 3], dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_new")}
    return found


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_every_launch_is_bound(paged: bool, packed: bool) -> None:
    CACHES.clear()
    x = given(paged, packed)
    for turn in range(4):  # the last are told by their tensors alone
        before = gpu.launches()
        with bound_launches() as bound:
            attention_with_kvcache(**x)
        count = gpu.launches() - before
        assert count == len(bound) and count >= 2, turn
    assert len(CACHES) == 1


def test_combine_is_a_programmatic_dependent_launch() -> None:
    """And no other kernel is one. Triton's launchers, by which later releases launch, are not told."""
    CACHES.clear()
    x = given(False, False)
    for _ in range(2):
        with gpu.watching() as seen:
            attention_with_kvcache(**x)
        assert [(each.kernel, each.shape[7]) for each in seen] == [("append", 0), ("few_forward", 0), ("combine", int(OURS))]
