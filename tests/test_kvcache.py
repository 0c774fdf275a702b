"""``attention_with_kvcache`` against a loop over the dense oracle on each request's keys, gathered (``kvcases.py``)."""

from __future__ import annotations

import inspect
import math
import os
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import triflash
from kvcases import CASES, FP8, Call, Case, assert_right, build
from triflash import UnsupportedError, attention, attention_with_kvcache, slots
from triflash.launch.append import append_calls
from triflash.spec_cache import CacheOperands, cache_spec_of

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
RUNS_TRITON = GPU or os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    "tiled",
    "oracle",
    pytest.param("triton", marks=pytest.mark.skipif(not RUNS_TRITON, reason="Triton runs nothing here")),
]
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


def simple(B: int = 2, M: int = 2, N: int = 12, dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    made = {
        "q": torch.randn(B, M, 4, 8, dtype=dtype), "k_cache": torch.randn(B, N, 2, 8, dtype=dtype),
        "v_cache": torch.randn(B, N, 2, 8, dtype=dtype), "cache_lengths": torch.tensor([5, 9][:B]),
    }  # fmt: skip
    return {**{name: x.to(DEVICE) for name, x in made.items()}, **more}


def with_new(M: int = 2, **more: Any) -> dict[str, Any]:
    return simple(M=M, k_new=torch.randn(2, M, 2, 8, device=DEVICE), v_new=torch.randn(2, M, 2, 8, device=DEVICE), causal=True, **more)


PARAMETERS = (
    "q k_cache v_cache cache_lengths key_starts page_table cache_index cu_seqlens_q max_seqlen_q k_new v_new cu_seqlens_new bias mask "
    "causal window scale softcap alibi_slopes sink k_scale v_scale num_splits split_size out return_lse precision backend"
)


def test_signature() -> None:
    parameters = inspect.signature(attention_with_kvcache).parameters
    assert " ".join(parameters) == PARAMETERS
    assert all(p.kind == p.KEYWORD_ONLY for name, p in parameters.items() if name not in ("q", "k_cache", "v_cache"))
    defaults = {name: p.default for name, p in parameters.items() if p.default not in (None, p.empty)}
    assert defaults == {"causal": False, "return_lse": False}


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


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q": ({"q": torch.zeros(2, 4, 8)}, ValueError, r"q: wanted 4 dims \(B, Mq, heads, dim\), got 3 dims .*cu_seqlens_q"),
    "q of 4 dims, packed": ({"cu_seqlens_q": torch.tensor([0, 2, 4])}, ValueError, r"q: wanted 3 dims .*got 4 dims"),
    "no tensor": ({"q": 3}, TypeError, "q: wanted a tensor, got int"),
    "k_cache": ({"k_cache": torch.zeros(2, 12, 2, 9)}, ValueError, "k_cache: wanted shape .*share the head dim"),
    "heads": ({"k_cache": torch.zeros(2, 12, 3, 8), "v_cache": torch.zeros(2, 12, 3, 8)}, ValueError, "k_cache: wanted a number of heads that"),
    "v_cache": ({"v_cache": torch.zeros(2, 11, 2, 8)}, ValueError, "v_cache: wanted shape"),
    "requests": ({"q": torch.zeros(3, 2, 4, 8)}, ValueError, "k_cache: wanted one entry for each of the 3 requests, got 2; .*cache_index= or"),
    "dtype": ({"q": torch.zeros(2, 2, 4, 8).half()}, TypeError, "k_cache: wanted q's dtype torch.float16"),
    "dtype of v": ({"v_cache": torch.zeros(2, 12, 2, 8).half()}, TypeError, "v_cache: wanted k_cache's dtype torch.float32"),
    "integers": ({"q": torch.zeros(2, 2, 4, 8, dtype=torch.int32)}, TypeError, "q: wanted float16"),
    "fp8 beside float32": (
        {"k_cache": torch.zeros(2, 12, 2, 8).to(FP8), "v_cache": torch.zeros(2, 12, 2, 8).to(FP8)}, TypeError, "q: wanted float16 or bfloat16"
    ),
    "other 8 bits": (
        {"k_cache": torch.zeros(2, 12, 2, 8).to(torch.float8_e5m2), "v_cache": torch.zeros(2, 12, 2, 8).to(torch.float8_e5m2)}, TypeError,
        "k_cache: wanted q's dtype torch.float32, or torch.float8_e4m3fn",
    ),
    "lengths": ({"cache_lengths": torch.tensor([1, 2, 3])}, ValueError, "cache_lengths: wanted one for each batch entry"),
    "float lengths": ({"cache_lengths": torch.tensor([1.0, 2.0])}, TypeError, "cache_lengths: wanted a tensor of integers"),
    "a length": ({"cache_lengths": 5}, TypeError, "cache_lengths: wanted a tensor of integers, got int"),
    "starts": ({"key_starts": torch.tensor([[1, 2]])}, ValueError, "key_starts: "),
    "index": ({"cache_index": torch.tensor([1])}, ValueError, "cache_index: "),
    "int64 table": ({"page_table": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, r"page_table: wanted an int32 tensor.*page_table.int\(\)"),
    "table": ({"page_table": torch.zeros(3, 3, dtype=torch.int32)}, ValueError, r"page_table: wanted a row of pages for each request"),
    "both": (
        {"page_table": torch.zeros(2, 3, dtype=torch.int32), "cache_index": torch.tensor([0, 1])}, ValueError, "cache_index: wanted None beside"
    ),
    "k_new alone": ({"k_new": torch.zeros(2, 1, 2, 8)}, ValueError, "v_new: wanted a tensor beside k_new, got None"),
    "v_new alone": ({"v_new": torch.zeros(2, 1, 2, 8)}, ValueError, "k_new: wanted a tensor beside v_new, got None"),
    "k_new": ({"k_new": torch.zeros(2, 1, 4, 8), "v_new": torch.zeros(2, 1, 2, 8)}, ValueError, r"k_new: wanted shape \(B=2, Mnew, Hk=2, 8\)"),
    "v_new": ({"k_new": torch.zeros(2, 1, 2, 8), "v_new": torch.zeros(2, 2, 2, 8)}, ValueError, "v_new: wanted as many new rows as k_new, 1"),
    "new dtype": ({"k_new": torch.zeros(2, 1, 2, 8).half(), "v_new": torch.zeros(2, 1, 2, 8)}, TypeError, "k_new: wanted q's dtype"),
    "packed new": ({"k_new": torch.zeros(2, 2, 8), "v_new": torch.zeros(2, 2, 8)}, ValueError, "k_new: wanted 4 dims .*cu_seqlens_new"),
    "offsets of nothing": ({"cu_seqlens_new": torch.tensor([0, 1, 2])}, ValueError, "cu_seqlens_new: wanted None without k_new"),
    "expanded cache": (
        {"k_new": torch.zeros(2, 1, 2, 8), "v_new": torch.zeros(2, 1, 2, 8), "k_cache": torch.zeros(1, 12, 2, 8).expand(2, -1, -1, -1)},
        ValueError, "k_cache: wanted memory of its own",
    ),
    "bias": ({"bias": torch.zeros(2, 3, 1, 12)}, ValueError, r"bias: wanted 2 to 4 dims of \(B=2\|1, Hq=4\|1, Mq=2\|1, N\|1\)"),
    "bias of keys": ({"bias": torch.zeros(12)}, ValueError, "bias: "),
    "row of keys": ({"mask": torch.ones(4, 12, dtype=torch.bool), "q": torch.zeros(4, 1, 4, 8)}, ValueError, "k_cache: "),
    "float mask": ({"mask": torch.zeros(2, 1, 1, 12)}, TypeError, "mask: wanted a bool tensor.*a float one is a bias"),
    "integer bias": ({"bias": torch.zeros(2, 1, 1, 12, dtype=torch.int32)}, TypeError, "bias: wanted float16"),
    "causal": ({"causal": "top_left"}, TypeError, "causal: wanted True or False, got 'top_left'; queries stand"),
    "window": ({"window": 5}, TypeError, "window: wanted a pair"),
    "scale": ({"scale": math.nan}, ValueError, "scale: "),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap: "),
    "slopes": ({"alibi_slopes": torch.ones(3)}, ValueError, "alibi_slopes: "),
    "sink": ({"sink": torch.ones(2)}, ValueError, "sink: "),
    "k_scale": ({"k_scale": 2.0}, ValueError, "k_scale: wanted None unless the caches are torch.float8_e4m3fn"),
    "num_splits": ({"num_splits": 0}, ValueError, "num_splits: wanted an integer from 1 up"),
    "num_splits by a float": ({"num_splits": 2.0}, TypeError, "num_splits: wanted an integer"),
    "split_size": ({"split_size": -1}, ValueError, "split_size: "),
    "both splits": ({"split_size": 64, "num_splits": 2}, ValueError, "split_size: wanted None beside num_splits"),
    "max_seqlen_q": ({"max_seqlen_q": 4}, ValueError, "max_seqlen_q: wanted None without cu_seqlens_q"),
    "out": ({"out": torch.zeros(2, 2, 4, 9)}, ValueError, "out: wanted shape"),
    "out's dtype": ({"out": torch.zeros(2, 2, 4, 8).half()}, TypeError, "out: wanted q's dtype"),
    "expanded out": ({"out": torch.zeros(1, 2, 4, 8).expand(2, -1, -1, -1)}, ValueError, "out: wanted memory of its own"),
    "backend": ({"backend": "cudnn"}, ValueError, "backend: "),
    "hopper": ({"backend": "hopper"}, UnsupportedError, "KV caches: .*'hopper'.*triton"),
    "precision": ({"precision": "half"}, ValueError, "precision: "),
    "return_lse": ({"return_lse": 1}, TypeError, "return_lse: "),
    "cache_seqlens": ({"cache_seqlens": torch.tensor([1, 2])}, TypeError, "cache_seqlens: .*cache_lengths="),
    "block_table": ({"block_table": None}, TypeError, "block_table: .*page_table="),
    "cache_leftpad": ({"cache_leftpad": None}, TypeError, "cache_leftpad: .*key_starts="),
    "dropout_p": ({"dropout_p": 0.0}, TypeError, "dropout_p: .*inference"),
    "softmax_scale": ({"softmax_scale": 1.0}, TypeError, "softmax_scale: .*scale="),
    "a near name": ({"page_tables": None}, TypeError, "page_tables: .*did you mean page_table="),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    more, error, message = BAD[name]
    given = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in simple().items()}
    with pytest.raises(error, match=message):
        attention_with_kvcache(**{**given, **more})


def test_by_position() -> None:
    given = simple()
    with pytest.raises(TypeError, match="q, k_cache and v_cache by position, got 4 arguments"):
        attention_with_kvcache(given["q"], given["k_cache"], given["v_cache"], given["cache_lengths"])


def test_out_of_its_own() -> None:
    given = simple(cache_lengths=None)
    attention_with_kvcache(**given, out=torch.empty_like(given["q"]))
    for _ in range(2):
        with pytest.raises(ValueError, match="out: wanted memory of its own, got that of q"):
            attention_with_kvcache(**given, out=given["q"])


@pytest.mark.parametrize("name", ["q", "k_cache", "k_new", "sink"])
def test_gradients_are_refused(name: str) -> None:
    given = with_new(sink=torch.zeros(4, device=DEVICE))
    given[name].requires_grad_()
    with pytest.raises(UnsupportedError, match=rf"gradients by {name}: .*triflash\.attention\("):
        attention_with_kvcache(**given)
    if name != "k_cache":
        with torch.no_grad():
            attention_with_kvcache(**given)


def test_transforms_are_refused() -> None:
    given = simple()
    q, k, v = given["q"], given["k_cache"], given["v_cache"]
    for transformed in (
        lambda: torch.func.vmap(lambda x: attention_with_kvcache(x, k, v))(q[None]),
        lambda: torch.func.grad(lambda x: attention_with_kvcache(x, k, v).sum())(q),
        lambda: torch.func.jvp(lambda x: attention_with_kvcache(x, k, v), (q,), (q,)),
        lambda: torch.func.vmap(lambda x: torch.ops.triflash.cache_forward(
            x, k, v, *(None,) * 12, None, None, 1.0, "", 0.0, None, None, None, None, "auto"))(q[None]),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match="attention"):
            transformed()


CHECKS: dict[str, tuple[dict[str, Any], str]] = {
    "lengths": ({"cache_lengths": torch.tensor([5, 13])}, "cache_lengths: wanted 0 to the 12 keys .*got 13, request 1"),
    "negative length": ({"cache_lengths": torch.tensor([-1, 3])}, "cache_lengths: .*got -1, request 0"),
    "no room": ({"cache_lengths": torch.tensor([5, 11])}, "k_new: wanted at most 1 new keys, which request 1 has room for, got 2"),
    "starts": ({"key_starts": torch.tensor([8, 0])}, "key_starts: wanted 0 to the 7 keys of request 0, got 8"),
    "entry": ({"cache_index": torch.tensor([0, 2])}, "cache_index: wanted 0 to 1, got 2, request 1"),
    "entries": ({"cache_index": torch.tensor([1, 1])}, "cache_index: wanted an entry for each request.*1 twice"),
    "page": ({"page_table": torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)}, "page_table: wanted 0 to 1 of the 2 pages, got 2, page 0"),
    "shared page": ({"page_table": torch.tensor([[0, 7], [0, 7]], dtype=torch.int32)}, "page_table: wanted pages of their own"),
    "bias": ({"bias": torch.zeros(2, 1, 1, 10)}, "bias: wanted 11 or more in dim -1"),
    "new offsets": (
        {"k_new": torch.zeros(4, 2, 8), "v_new": torch.zeros(4, 2, 8), "cu_seqlens_new": torch.tensor([0, 3, 2])}, "cu_seqlens_new: .*decrease"
    ),
    "offsets": ({"q": torch.zeros(4, 4, 8), "cu_seqlens_q": torch.tensor([1, 2, 4])}, "cu_seqlens_q: wanted 0 as the first"),
    "last offset": ({"q": torch.zeros(4, 4, 8), "cu_seqlens_q": torch.tensor([0, 2, 5])}, "cu_seqlens_q: wanted offsets up to the 4 rows"),
    "longest": (
        {"q": torch.zeros(4, 4, 8), "cu_seqlens_q": torch.tensor([0, 3, 4]), "max_seqlen_q": 2}, "max_seqlen_q: wanted 3 or more.*got 2"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_checked_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more, message = CHECKS[name]
    given = {**with_new(), **{key: x.to(DEVICE) if isinstance(x, Tensor) else x for key, x in more.items()}}
    attention_with_kvcache(**given)
    monkeypatch.setenv("TRIFLASH_CHECK", "1")
    with pytest.raises(ValueError, match=message):
        attention_with_kvcache(**given)
    attention_with_kvcache(**with_new())


def test_record_and_named_backends() -> None:
    given = with_new()
    with triflash.record_launches() as ran:
        attention_with_kvcache(**given, backend="tiled")
        attention_with_kvcache(**simple(), backend="oracle")
    assert ran == ["tiled: append", "tiled: forward", "oracle: forward"]
    with triflash.backend("oracle"), triflash.record_launches() as ran:
        attention_with_kvcache(**simple())
    assert ran == ["oracle: forward"]


def test_autocast_takes_the_caches_dtype() -> None:
    given = with_new()
    expected = attention_with_kvcache(**given)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        narrow = {**given, **{name: given[name].bfloat16() for name in ("q", "k_new", "v_new")}}
        out = attention_with_kvcache(**narrow)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0.1, atol=0.05)
    caches = {name: given[name].to(FP8) for name in ("k_cache", "v_cache")}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert attention_with_kvcache(**{**given, **caches}).dtype == torch.bfloat16


def test_writes_are_seen_by_autograd() -> None:
    """A cache that a graph saved is no longer what it was."""
    given = with_new()
    weight = torch.ones_like(given["k_cache"]).requires_grad_()
    y = (weight * given["k_cache"]).sum()
    with torch.no_grad():
        attention_with_kvcache(**given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        attention_with_kvcache(**with_new())


def test_meta_and_fake_tensors() -> None:
    given = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in with_new(bias=torch.zeros(4, 2, 12)).items()}
    out, lse = attention_with_kvcache(**given, return_lse=True)
    assert out.shape == (2, 2, 4, 8) and lse.shape == (2, 4, 2) and out.device.type == "meta"
    with FakeTensorMode(allow_non_fake_inputs=True):
        out, lse = attention_with_kvcache(**with_new(), return_lse=True)
        assert out.shape == (2, 2, 4, 8) and lse.dtype == torch.float32


@pytest.mark.parametrize("name", ["plain", "new", "packed"])
def test_operators_check(name: str) -> None:
    given = with_new() if name != "plain" else simple()
    q, k, v = given["q"], given["k_cache"], given["v_cache"]
    cu = torch.tensor([0, 2, 4], device=DEVICE) if name == "packed" else None
    if name == "new":
        args = (k, v, given["k_new"], given["v_new"], given["cache_lengths"], None, None, None, None, None, "auto")
        torch.library.opcheck(torch.ops.triflash.cache_append.default, args)
        return
    q = q if cu is None else q.flatten(0, 1)
    args = (q, k, v, given["cache_lengths"], *(None,) * 3, cu, *(None,) * 7, None, None, 0.3, "", 0.0, None, None, None, None, "auto")
    torch.library.opcheck(torch.ops.triflash.cache_forward.default, args)
    torch.library.opcheck(torch.ops.triflash.cache_forward_out.default, (*args, torch.empty_like(q)))


def test_flops() -> None:
    given = with_new()
    with FlopCounterMode(display=False) as counted:
        attention_with_kvcache(**given)
    pairs = 6 + 7 + 10 + 11  # causal, two queries behind 5 and 9 keys
    assert counted.get_total_flops() == 4 * pairs * 2 * (8 + 8)
    meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in simple().items()}
    with FlopCounterMode(display=False) as counted:
        attention_with_kvcache(**meta)
    assert counted.get_total_flops() == 4 * (2 * 2 * 12) * 2 * (8 + 8)


def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor, v: Tensor, bias: Tensor, **more: Any) -> Any:
    return attention_with_kvcache(
        q, k_cache, v_cache, cache_lengths=lengths, k_new=k, v_new=v, bias=bias, causal=True, return_lse=True, **more
    )  # fmt: skip


def step_inputs(N: int = 12, B: int = 2) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(N)
    made = [torch.randn(B, n, h, 8, generator=g) for n, h in ((1, 4), (N, 2), (N, 2), (1, 2), (1, 2))]
    q, k, v, k_new, v_new = (x.to(DEVICE) for x in made)
    lengths = torch.arange(3, 3 + B, device=DEVICE)
    return q, k, v, lengths, k_new, v_new, torch.randn(1, 4, 1, N, generator=g).to(DEVICE)


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_compiled(dynamic: bool | None) -> None:
    """Graphs without a break write caches in place, and take other sizes."""
    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for N, B in ((12, 2), (20, 3)) if dynamic is not False else ((12, 2),):
        mine, right = step_inputs(N, B), step_inputs(N, B)
        for got, wanted in zip(compiled(*mine), step(*right), strict=True):
            torch.testing.assert_close(got, wanted)
        assert torch.equal(mine[1], right[1]) and torch.equal(mine[2], right[2])
        assert not torch.equal(mine[1], step_inputs(N, B)[1])


def test_compiled_code_copies_no_cache() -> None:
    """Inductor's code hands the caches and a given out to the operators as they are."""
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    mine, right = step_inputs(), step_inputs()
    out = torch.empty_like(mine[0])
    (got, _), code = run_and_get_code(torch.compile(step, fullgraph=True), *mine, out=out)
    torch.testing.assert_close(got, step(*right)[0])
    assert torch.equal(mine[1], right[1]) and torch.equal(out, got)
    text = code[0][code[0].index("def call(") :].partition("def get_args")[0]
    assert "cache_append" in text and "cache_forward_out" in text
    assert "clone" not in text and "copy_" not in text and "empty_strided" not in text


def test_compiled_refuses_gradients() -> None:
    torch.compiler.reset()
    inputs = step_inputs()
    inputs[0].requires_grad_()
    with pytest.raises(Exception, match=r"gradients by q"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(*inputs)


def test_exported() -> None:
    class Module(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return step(*given)[0]

    program = torch.export.export(Module(), step_inputs())
    mine, right = step_inputs(), step_inputs()
    torch.testing.assert_close(program.module()(*mine), step(*right)[0])
    assert torch.equal(mine[1], right[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_explained(backend: str) -> None:
    """What it says is what runs; the problem is in words."""
    given = with_new(bias=torch.randn(4, 1, 12, device=DEVICE), num_splits=4)
    told = triflash.explain(
        **{("k" if n == "k_cache" else "v" if n == "v_cache" else n): x for n, x in given.items()},
        of=attention_with_kvcache,
        backend=backend,
    )
    with triflash.record_launches() as ran:
        attention_with_kvcache(**given, backend=backend)
    assert told.launches == ran and told.backend == backend and told.backward is None
    text = str(told)
    assert ("num_splits=4 changes nothing" in text) == (backend != "triton")
    for words in (
        "2 requests, 2 queries each, on a KV cache of up to 12 keys, 4 heads", "bias 1h1k fp32", "new keys", "causal (queries stand at the end",
        "keys of a request are split into 1 parts of equal length, of 4 asked for" if backend == "triton" else f"keys are not split: backend {backend}", "not taken  ",
    ):  # fmt: skip
        assert words in text, text
    del given["causal"]
    with pytest.raises(TypeError, match="cache_seqlens: .*cache_lengths="):
        triflash.explain(given["q"], given["k_cache"], given["v_cache"], cache_seqlens=None, of=attention_with_kvcache)
    with pytest.raises(UnsupportedError, match="gradients"):
        triflash.explain(given["q"], given["k_cache"], given["v_cache"], grads="q", of=attention_with_kvcache)


def test_explained_paged() -> None:
    """Meta tensors will do; no table is read."""
    q = torch.empty(7, 8, 64, dtype=torch.float16, device="meta")
    cache = torch.empty(40, 16, 2, 64, dtype=torch.float16, device="meta").to(FP8)
    told = triflash.explain(
        q, cache, cache, of=attention_with_kvcache, page_table=torch.empty(3, 5, dtype=torch.int32, device="meta"), window=(20, 0),
        cu_seqlens_q=torch.tensor([0, 1, 3, 7]), max_seqlen_q=4, k_scale=0.5, mask=torch.empty(3, 1, 1, 80, dtype=torch.bool, device="meta"),
        return_lse=True, device="cpu",
    )  # fmt: skip
    text = str(told)
    for words in (
        "3 requests, up to 4 packed queries each", "up to 80 keys in pages of 16", "fp16, fp8 cache", "mask b11k bool", "keys from -20 to +0",
        "8 query heads on 2 key heads", "results  out 7.0 KiB, lse 224 B", "triton: cannot do",
    ):  # fmt: skip
        assert words in text, text


def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    """Three requests join and leave a pool of pages, and get what attention over their own keys gives."""
    path = Path(__file__).parents[1] / "examples" / "paged_cache.py"
    assert path.read_text().count("\n") <= 80
    runpy.run_path(str(path), run_name="__main__")
    told = capsys.readouterr().out
    assert told.count("leaves") == 3 and "10 of 10 pages are free" in told and "every request got" in told


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


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_explain_names_the_products(precision: str) -> None:
    q, k = torch.empty(1, 1, 8, 64, device="meta"), torch.empty(1, 8192, 8, 64, device="meta")
    for of in (attention, attention_with_kvcache):
        step = triflash.explain(q, k, k, of=of, precision=precision, device="h200").forward.steps[0].step
        assert (step.kernel, step.precision) == ("few_forward", precision)


def test_checks_know_autocast_and_shared_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is right stays right when values are checked."""
    monkeypatch.setenv("TRIFLASH_CHECK", "1")
    q, k = torch.randn(2, 1, 2, 16), torch.randn(2, 8, 2, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_with_kvcache(q, k, k.clone()).dtype == torch.bfloat16
    shared, new = torch.zeros(2, dtype=torch.int32), torch.randn(1, 2, 16, dtype=torch.bfloat16)
    packed = {"k_new": new, "v_new": new, "cu_seqlens_new": torch.tensor([0, 1, 1]), "cache_lengths": torch.tensor([3, 4])}
    attention_with_kvcache(q.bfloat16(), k, k.clone(), cache_index=shared, **packed)
    assert attention_with_kvcache(q.to("meta"), *(k.float().to("meta") for _ in range(2))).is_meta
