"""What ``attention_with_kvcache`` refuses, with which words, and what it checks on request."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcases import DEVICE, FP8, simple, with_new
from triflash import UnsupportedError, attention_with_kvcache

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
    "negated cache": (
        {"k_new": torch.zeros(2, 1, 2, 8), "v_new": torch.zeros(2, 1, 2, 8), "v_cache": torch._neg_view(torch.zeros(2, 12, 2, 8))},
        ValueError, "v_cache: wanted memory that holds its elements, as k_new is written to it, got a negated view",
    ),
    "negated out": ({"out": torch._neg_view(torch.zeros(2, 2, 4, 8))}, ValueError, "out: wanted memory that holds its elements, got"),
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
        lambda: torch.compile(lambda q: torch.func.jvp(lambda x: attention_with_kvcache(x, k, v), (q,), (q,)), backend="eager")(q),
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
