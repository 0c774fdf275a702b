"""Calls of ``attention_with_kvcache`` like one before are told by their tensors alone: apart from all others, and not where more is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from here import triton_only
from kvcases import DEVICE, FP8
from triflash import UnsupportedError, attention_with_kvcache, door_cache
from triflash.bound import compare
from triflash.bound.signature import CACHES

pytestmark = pytest.mark.skipif(compare._guards is None, reason="this PyTorch has nothing that tells tensors soon")

B, M, H, HK, D, N = 2, 2, 4, 2, 16, 24


def tensors(dtype: torch.dtype = torch.float16, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"q": (B, M, H, D), "k_cache": (B, N, HK, D), "v_cache": (B, N, HK, D), "k_new": (B, M, HK, D), "v_new": (B, M, HK, D)}
    found: dict[str, Any] = {name: torch.randn(shape, generator=g).to(dtype).to(DEVICE) for name, shape in shapes.items()}
    return {**found, "cache_lengths": torch.tensor([5, 20], dtype=torch.int32, device=DEVICE), "causal": True}


def of_pages() -> dict[str, Any]:
    given = tensors()
    pages = {name: given[name].reshape(2 * B, N // 2, HK, D) for name in ("k_cache", "v_cache")}
    return {**given, **pages, "page_table": torch.tensor([[3, 1], [0, 2]], dtype=torch.int32, device=DEVICE)}


def of_bytes(**scales: Any) -> dict[str, Any]:
    given = tensors()
    return {**given, **{name: given[name].to(FP8) for name in ("k_cache", "v_cache")}, **scales}


def without(*names: str, **others: Any) -> dict[str, Any]:
    return {name: x for name, x in {**tensors(), **others}.items() if name not in names}


# Of each, what the one before it had otherwise must make a difference.
CALLS: dict[str, dict[str, Any]] = {
    "plain": tensors(), "others": tensors(seed=1), "not causal": without("causal"), "window": without(window=(3, 0)),
    "window of booleans' size": without(window=(1, 0)), "scale": without(scale=0.5), "cap": without(softcap=0.5), "lse": without(return_lse=True),
    "no new": without("k_new", "v_new"), "no lengths": without("k_new", "v_new", "cache_lengths"),
    "no lengths, new": without("cache_lengths"), "int64": without(cache_lengths=torch.tensor([5, 20], device=DEVICE)), "pages": of_pages(),
    "bytes": of_bytes(), "bytes, scales": of_bytes(k_scale=0.5, v_scale=0.25), "bytes, other scales": of_bytes(k_scale=0.25, v_scale=0.5),
    "bytes, one scale": of_bytes(v_scale=0.5), "bfloat16": tensors(torch.bfloat16), "float32": tensors(torch.float32), "splits": without(num_splits=2),
    "oracle": without(backend="oracle"),
}  # fmt: skip


def run(given: dict[str, Any]) -> list[Tensor]:
    """Results and caches, of copies."""
    own = {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}
    found = attention_with_kvcache(**own)
    return [*(found if isinstance(found, tuple) else (found,)), *(own[name].view(torch.uint8) for name in ("k_cache", "v_cache"))]


def test_told_apart() -> None:
    expected = {}
    for name, given in CALLS.items():
        CACHES.clear()
        expected[name] = run(given)
    CACHES.clear()
    for _ in range(4):
        for name, given in CALLS.items():
            for x, y in zip(run(given), expected[name], strict=True):
                assert torch.equal(x, y), name
    assert len(CACHES.near) >= 10


@pytest.mark.parametrize("name", ["plain", "no lengths", "pages", "bytes, scales", "lse"])
def test_known_ones_are_not_described(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    CACHES.clear()
    for _ in range(3):
        run(CALLS[name])
    monkeypatch.setattr(door_cache, "describe", None)
    run(CALLS[name])


def test_what_is_asked_beside() -> None:
    """A gradient, checks of lengths, autocast and other devices are no call as before."""
    CACHES.clear()
    given = tensors()
    for _ in range(3):
        run(given)
    with pytest.raises(UnsupportedError, match="gradients by q"):
        attention_with_kvcache(**{**given, "q": given["q"].requires_grad_()})
    with torch.no_grad():
        for _ in range(3):
            run({**given, "q": given["q"].requires_grad_()})
    with pytest.raises(UnsupportedError, match="gradients by q"):
        attention_with_kvcache(**given)
    given["q"].requires_grad_(False)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert attention_with_kvcache(**{**given, "q": given["q"].float()}).dtype == torch.float16
    out, lse = attention_with_kvcache(**{name: x.to("meta") if isinstance(x, Tensor) else x for name, x in given.items()}, return_lse=True)
    assert out.device.type == lse.device.type == "meta"


def test_lengths_are_still_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    CACHES.clear()
    for _ in range(3):
        run(tensors())
    monkeypatch.setenv("TRIFLASH_CHECK", "1")
    with pytest.raises(ValueError, match="cache_lengths"):
        attention_with_kvcache(**{**tensors(), "cache_lengths": torch.tensor([5, -1], dtype=torch.int32, device=DEVICE)})


def test_writes_are_counted() -> None:
    CACHES.clear()
    given = tensors()
    for _ in range(4):
        before = given["k_cache"]._version, given["v_cache"]._version
        attention_with_kvcache(**given)
        assert given["k_cache"]._version > before[0] and given["v_cache"]._version > before[1]


@pytest.mark.parametrize("backend", ["", False])
def test_a_backend_that_is_none_is_refused_the_second_time_too(backend: Any) -> None:
    run(tensors())
    run(tensors())
    with pytest.raises((TypeError, ValueError), match="backend"):
        run(without(backend=backend))


def of_wide_heads(**others: Any) -> dict[str, Any]:
    """Of 32 columns, which kernels read in pairs from caches of 8 bits."""
    given = without("k_new", "v_new", **others)
    return {**given, **{name: torch.cat((given[name], given[name].flip(1)), 3) for name in ("q", "k_cache", "v_cache")}}


@triton_only
def test_a_sink_far_above_the_scores_leaves_8_bit_caches_their_digits() -> None:
    """Relative to such a sink weights are below what float16 holds."""
    given = of_wide_heads(sink=torch.full((H,), 14.0, device=DEVICE))
    given |= {"k_cache": given["k_cache"].to(FP8), "v_cache": (64 * given["v_cache"]).to(FP8)}  # results that float16 holds
    found, right = (attention_with_kvcache(**given, backend=backend).double() for backend in ("triton", "oracle"))
    assert (found - right).norm() < 1e-3 * right.norm()


@triton_only
@pytest.mark.skipif(DEVICE != "cpu", reason="GPUs' memory begins at multiples of 512 bytes")
def test_an_8_bit_cache_at_an_even_address_of_an_odd_offset() -> None:
    given = of_wide_heads()
    given |= {name: given[name].to(FP8) for name in ("k_cache", "v_cache")}
    right = attention_with_kvcache(**given, backend="triton")
    kept = []
    for name in ("k_cache", "v_cache"):
        cache = given[name].view(torch.uint8)
        kept.append(memory := bytearray(cache.numel() + 8))
        odd = 1 - torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 2
        moved = torch.frombuffer(memory, dtype=torch.uint8, offset=odd)[1 : 1 + cache.numel()].view(cache.shape).copy_(cache)
        given[name] = moved.view(FP8)
        assert moved.storage_offset() % 2 == 1 and moved.data_ptr() % 2 == 0
    torch.testing.assert_close(attention_with_kvcache(**given, backend="triton"), right, atol=2e-3, rtol=2e-3)
