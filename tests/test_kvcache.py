"""``attention_with_kvcache`` against a loop over the dense oracle on each request's keys, gathered (``kvcases.py``); what it writes.

What it refuses is in test_kvcache_input.py; operators, compilation and explanations in test_kvcache_use.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from kvcases import BACKENDS, CASES, DEVICE, FP8, GPU, RUNS_TRITON, Call, Case, assert_right, build, simple, with_new
from triflash import attention, attention_with_kvcache, slots
from triflash.launch.append import append_calls
from triflash.spec_cache import CacheOperands, cache_spec_of

APPENDING = [case for case in CASES if case.new or case.new_packed]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, backend: str) -> None:
    call = build(case, exact=case.fp8 and backend == "triton" and not GPU)
    assert_right(call, *call.run(backend, DEVICE))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8).clone()


def written_by_hand(call: Call, cache: str) -> Tensor:
    """What the call must leave in a cache: the new rows in their slots, everything else as it was, NaN included."""
    case, given = call.case, call.given
    expected, first = given[f"{cache}_cache"].clone(), 0
    scale = given.get(f"{cache}_scale", 1.0)
    for b, (held, used, added) in enumerate(zip(case.held, case.used, case.added, strict=True)):
        new = given[f"{cache}_new"]
        rows = new[first : first + added] if case.new_packed else new[b]
        first += added
        own = scale if not isinstance(scale, Tensor) else (scale[b] if scale.dim() == 2 else scale)[:, None]
        stored = (rows.float() / own).clamp(-448, 448).to(FP8) if case.fp8 else rows
        for j in range(held, used):
            expected[call.slots[b][j]] = stored[j - held]
    return expected


@pytest.mark.parametrize("how", ["plain", "triton"])
@pytest.mark.parametrize("case", APPENDING, ids=str)
def test_new_keys_are_written_and_nothing_else(case: Case, how: str) -> None:
    """By the form in PyTorch and by the kernel."""
    call = build(case, exact=case.fp8 and how == "triton" and not GPU)
    given = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in call.given.items()}
    expected = [bits(written_by_hand(call, name)) for name in "kv"]
    scales = [given.get(name) for name in ("k_scale", "v_scale")]
    scales = [x if x is None or isinstance(x, Tensor) else torch.tensor(x, device=DEVICE) for x in scales]
    scales = [x if x is None or x.dim() == 2 else x.reshape(1, -1) for x in scales]
    lengths, table, index, offsets = (given.get(name) for name in ("cache_lengths", "page_table", "cache_index", "cu_seqlens_new"))
    caches, new = (given["k_cache"], given["v_cache"]), (given["k_new"], given["v_new"])
    if how == "plain":
        slots.append(*caches, *new, lengths, table, index, offsets, *scales)
    elif not RUNS_TRITON:
        pytest.skip("Triton runs nothing here")
    else:
        q = torch.zeros(case.B, 1, case.H, case.D, dtype=case.dtype, device=DEVICE)
        x = CacheOperands(q, *caches, lengths, None, table, index, None, offsets, *(None,) * 4, *scales)
        spec = cache_spec_of(x, None, None, 1.0, "ieee", new=new[0].shape[0 if offsets is not None else 1])
        for one in append_calls(spec, x, *new):
            one.start()
    for cache, wanted in zip(caches, expected, strict=True):
        assert torch.equal(bits(cache.cpu()), wanted)


HOSTILE: dict[str, dict[str, Any]] = {
    "pages": {"page_table": torch.tensor([[-1, 10**6, 2**31 - 1], [-(2**31), 3, 9]], dtype=torch.int32)},
    "pages of nobody": {"page_table": torch.full((2, 3), 4, dtype=torch.int32)},
    "no pages": {"page_table": torch.zeros(2, 0, dtype=torch.int32)},
    "entries": {"cache_index": torch.tensor([-7, 10**12])},
    "unsigned entries": {"cache_index": torch.tensor([255, 4], dtype=torch.uint8)},
    "lengths": {"cache_lengths": torch.tensor([-(2**62), 2**62])},
    "unsigned lengths": {"cache_lengths": torch.tensor([2**63, 2**64 - 1], dtype=torch.uint64)},
    "starts": {"key_starts": torch.tensor([-(2**62), 2**62])},
    "queries": {"cu_seqlens_q": torch.tensor([5, -3, 10**6], dtype=torch.int32)},
    "queries that fall": {"cu_seqlens_q": torch.tensor([0, 4, 1], dtype=torch.int32)},
    "new keys": {"cu_seqlens_new": torch.tensor([2**31 - 1, -(2**31), 3], dtype=torch.int32)},
    "new keys that fall": {"cu_seqlens_new": torch.tensor([0, 6, 2], dtype=torch.int32)},
}


@pytest.mark.parametrize("how", ["tiled", "oracle", "triton", "triton append"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_numbers_touch_nothing_beside(name: str, how: str) -> None:
    """Caches lie between guards of NaN: whoever reads one shows it, whoever writes one changes it."""
    hostile = {key: x.to(DEVICE) for key, x in HOSTILE[name].items()}
    paged = "page_table" in hostile
    shape = (4, 8, 2, 16)
    if not paged and "cache_index" not in hostile:
        hostile["cache_index"] = torch.tensor([0, 2], device=DEVICE)
    wholes = [torch.full((4 + 2, *shape[1:]), math.nan, device=DEVICE) for _ in "kv"]
    caches = [whole[1:5] for whole in wholes]
    for cache in caches:
        cache.copy_(torch.randn(shape))
    before = [bits(whole) for whole in wholes]
    packed = "cu_seqlens_q" in hostile
    q = torch.randn((6, 4, 16) if packed else (2, 3, 4, 16), device=DEVICE)
    k_new, v_new = (torch.randn((6, 2, 16) if "cu_seqlens_new" in hostile else (2, 3, 2, 16), device=DEVICE) for _ in "kv")
    given = {"cache_lengths": torch.tensor([5, 6], device=DEVICE), "k_new": k_new, "v_new": v_new, **hostile}
    if "triton" in how and not RUNS_TRITON:
        pytest.skip("Triton runs nothing here")
    if how == "triton append":
        offsets = given.get("cu_seqlens_new")
        dense = torch.zeros(2, 1, 4, 16, device=DEVICE)
        x = CacheOperands(
            dense, *caches, given["cache_lengths"], None, given.get("page_table"), given.get("cache_index"), None, offsets
        )  # fmt: skip
        for one in append_calls(
            cache_spec_of(x, None, None, 1.0, "ieee", new=k_new.shape[0 if offsets is not None else 1]), x, k_new, v_new
        ):
            one.start()
    else:
        out, lse = attention_with_kvcache(q, *caches, return_lse=True, backend=how, causal=True, **given)
        assert out.isfinite().all() and not lse.isnan().any()
    allowed = {  # what may change: the rest of the entries, or what pages hold, that the right numbers name
        "pages": {(3, 0)}, "pages of nobody": set(), "no pages": set(), "entries": set(), "unsigned entries": set(),
        "lengths": {(0, 0), (0, 1), (0, 2)}, "unsigned lengths": set(),
    }.get(name)  # fmt: skip
    for whole, old in zip(wholes, before, strict=True):
        changed = (bits(whole) != old).view(6, 8, -1).any(-1).nonzero().tolist()
        assert all(1 <= entry <= 4 for entry, _ in changed)
        entries = {0, 2} if not paged and "cache_index" not in HOSTILE[name] else {0, 1, 2, 3}
        assert {entry - 1 for entry, _ in changed} <= entries
        if allowed is not None:
            assert {(entry - 1, at) for entry, at in changed} == allowed


def test_equal_to_attention() -> None:
    """A full cache without anything is ``attention``; one request of a long one is that of its keys."""
    given = simple(cache_lengths=None)
    q, k, v = given["q"], given["k_cache"], given["v_cache"]
    torch.testing.assert_close(attention_with_kvcache(q, k, v), attention(q, k, v))
    torch.testing.assert_close(
        attention_with_kvcache(q, k, v, causal=True, window=(3, -1)), attention(q, k, v, causal=True, window=(3, None))
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_given_out(backend: str, packed: bool) -> None:
    """It is filled and returned, whatever its strides; nothing beside its elements is touched."""
    given = with_new(backend=backend)
    if packed:
        given |= {"q": given["q"].flatten(0, 1), "cu_seqlens_q": torch.tensor([0, 2, 4], device=DEVICE)}
    expected, lse = attention_with_kvcache(**given, return_lse=True)
    whole = torch.full(tuple(size + 2 for size in expected.shape), math.nan, device=DEVICE)
    out = whole[tuple(slice(1, -1) for _ in expected.shape)]
    assert attention_with_kvcache(**given, out=out) is out
    assert torch.equal(out, expected)
    out.fill_(math.nan)
    again, own_lse = attention_with_kvcache(**given, out=out, return_lse=True)
    assert again is out and torch.equal(out, expected) and torch.equal(own_lse, lse)
    out.fill_(math.nan)
    assert whole.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_no_request(backend: str) -> None:
    """Between, before and behind the requests' own: out 0 and lse -inf, also with a sink."""
    given = simple(
        q=torch.randn(9, 4, 8, device=DEVICE), cu_seqlens_q=torch.tensor([2, 4, 7], device=DEVICE), sink=torch.ones(4, device=DEVICE)
    )
    given["backend"] = backend
    out, lse = attention_with_kvcache(**given, return_lse=True)
    for rows in (slice(0, 2), slice(7, 9)):
        assert (out[rows] == 0).all() and (lse[:, rows] == -math.inf).all()
    assert (out[2:7] != 0).all() and lse[:, 2:7].isfinite().all()
    short, _ = attention_with_kvcache(**given, max_seqlen_q=3, return_lse=True)
    assert torch.equal(short, out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_on_the_cpu_and_no_requests(backend: str) -> None:
    given = simple(backend=backend)
    q = given.pop("q").flatten(0, 1)
    packed = attention_with_kvcache(q, **given, cu_seqlens_q=torch.tensor([0, 2, 4]))
    torch.testing.assert_close(packed, attention_with_kvcache(q.view(2, 2, 4, 8), **given).flatten(0, 1))
    k = given["k_cache"][:0]
    out, lse = attention_with_kvcache(q[:0].view(0, 2, 4, 8), k, k, return_lse=True, backend=backend)
    assert out.shape == (0, 2, 4, 8) and lse.shape == (0, 4, 2)
    out, lse = attention_with_kvcache(q, k, k, cu_seqlens_q=torch.tensor([0], device=DEVICE), return_lse=True, backend=backend)
    assert (out == 0).all() and (lse == -math.inf).all()
    empty = torch.zeros(2, 0, 2, 8, device=DEVICE)
    out, lse = attention_with_kvcache(q.view(2, 2, 4, 8), empty, empty, return_lse=True, backend=backend)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.skipif(not RUNS_TRITON, reason="Triton runs nothing here")
def test_split_size_makes_bits_independent_of_the_batch() -> None:
    """A request alone, among others, in another place and of a larger cache: the same bits."""
    given = simple(B=1, M=2, N=96, cache_lengths=torch.tensor([77], device=DEVICE), split_size=32, causal=True, backend="triton")
    alone, lse = attention_with_kvcache(**given, return_lse=True)
    for B, at in ((3, 1), (5, 4)):
        many = {name: torch.randn(B, *given[name].shape[1:], device=DEVICE) for name in ("q", "k_cache", "v_cache")}
        for name, x in many.items():
            x[at] = given[name][0]
        lengths = torch.randint(0, 96, (B,), device=DEVICE)
        lengths[at] = 77
        out, lses = attention_with_kvcache(**{**given, **many, "cache_lengths": lengths}, return_lse=True)
        assert torch.equal(out[at], alone[0]) and torch.equal(lses[at], lse[0])


@pytest.mark.parametrize("how", ["tiled", "triton"])
@pytest.mark.parametrize("extra", ["bias", "mask"])
def test_a_bias_of_no_keys_hides_all(extra: str, how: str) -> None:
    """It is not one that all keys share."""
    if how == "triton" and not RUNS_TRITON:
        pytest.skip("Triton runs nothing here")
    q, k = torch.randn(1, 1, 1, 16, device=DEVICE), torch.randn(1, 64, 1, 16, device=DEVICE)
    nothing = torch.zeros(1, 1, 1, 0, device=DEVICE, dtype=torch.bool if extra == "mask" else torch.float32)
    out, lse = attention_with_kvcache(q, k, k, **{extra: nothing}, backend=how, return_lse=True)
    assert not out.any() and (lse == -math.inf).all()


def test_a_longest_of_no_queries_is_too_small_and_nothing_worse() -> None:
    if not RUNS_TRITON:
        pytest.skip("Triton runs nothing here")
    q, k = torch.randn(1, 1, 16, device=DEVICE), torch.randn(1, 64, 1, 16, device=DEVICE)
    cu = torch.tensor([0, 1], device=DEVICE)
    got = attention_with_kvcache(q, k, k, cu_seqlens_q=cu, max_seqlen_q=0, backend="triton")
    torch.testing.assert_close(got, attention_with_kvcache(q, k, k, cu_seqlens_q=cu, backend="tiled"))


def test_no_more_splits_than_blocks() -> None:
    q, k = torch.empty(4, 1, 8, 64, device="meta", dtype=torch.float16), torch.empty(4, 1024, 8, 64, device="meta", dtype=torch.float16)
    found = triflash.explain(q, k, k, of=attention_with_kvcache, num_splits=10**6, device="h200")
    assert found.forward.steps[0].step.splits <= 1024 // 16


@pytest.mark.parametrize(
    "requests, keys, parts", [(64, 1024, 1), (64, 4096, 3), (64, 8192, 3), (32, 16384, 1), (128, 4096, 3), (256, 2048, 1)]
)
def test_many_full_requests_have_parts_too(requests: int, keys: int, parts: int) -> None:
    """Where SMs have programs for more than a wave, shorter ones leave fewer of them idle at the end."""
    assert _parts_of(requests, 1, keys) == parts


@pytest.mark.parametrize("requests, queries, keys", [(64, 512, 8192), (16, 128, 4096), (2, 4096, 8192)])
def test_prompts_have_no_parts(requests: int, queries: int, keys: int) -> None:
    """In float32 those of 64 x 512 queries would be 1.5 GiB, to be put together for a wave in thirty."""
    assert _parts_of(requests, queries, keys) == 1


def _parts_of(requests: int, queries: int, keys: int) -> int:
    q, k = (torch.empty(requests, n, h, 128, device="meta", dtype=torch.bfloat16) for n, h in ((queries, 32), (keys, 8)))
    return triflash.explain(q, k, k, of=attention_with_kvcache, device="h200").forward.steps[0].step.splits
