"""Explanations of packed sequences, and hints for names that ``attention_varlen`` does not have."""

from __future__ import annotations

import inspect
import sys
import typing
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from here import triton_only
from triflash import UnsupportedError, attention, attention_varlen, explain
from triflash.plan.device import KNOWN_DEVICES
from unlaunched import check_bytes, unlaunched

CU = [0, 5, 5, 17, 40]
H, D = 2, 16
BIASES: dict[str, dict[str, Any]] = {
    "none": {},
    "padded, shared": {"bias": (1, H, 23, 23)},
    "padded, of each": {"bias": (4, 1, 23, 23), "sink": (H,)},
    "rows": {"bias": (H, 40, 23), "bias_layout": "rows"},
    "keys": {"bias": (1, 40), "bias_layout": "keys"},
    "padded, two": {"bias": [(1, H, 23, 23), (4, 1, 23, 1)]},
}


def given(name: str, device: torch.device | str) -> dict[str, Any]:
    def made(x: Any) -> Any:
        return tuple(map(made, x)) if isinstance(x, list) else torch.randn(x, device=device, requires_grad=True)

    options = {key: made(x) if key in ("bias", "sink") else x for key, x in BIASES[name].items()}
    rows = {key: torch.randn(40, H, D, device=device, requires_grad=True) for key in "qkv"}
    return rows | {"cu_seqlens_q": torch.tensor(CU, dtype=torch.int32, device=device), "causal": True} | options


def leaves(x: dict[str, Any]) -> list[Tensor]:
    flat = [z for y in x.values() for z in (y if isinstance(y, tuple) else (y,))]
    return [y for y in flat if isinstance(y, Tensor) and y.requires_grad]


@pytest.mark.parametrize("backend", ["auto", "tiled", "oracle", pytest.param("triton", marks=triton_only)])
@pytest.mark.parametrize("name", BIASES)
def test_it_names_what_runs(name: str, backend: str, device: torch.device) -> None:
    x = given(name, device)
    explained = explain(**x, of=attention_varlen, backend=backend)
    with triflash.record_launches() as ran:
        out = attention_varlen(**x, backend=backend)
        torch.autograd.grad(out.sum(), leaves(x))
    assert explained.launches == ran
    text = str(explained)
    assert "4 packed sequences of 40 queries and 40 keys in all" in text and "causal by the last query and key of each sequence" in text
    assert name == "none" or f"bias {name.partition(',')[0]} " in text
    assert all(line.split(": ")[1] in text for line in explained.launches)


@triton_only
@pytest.mark.parametrize("name", BIASES)
def test_to_the_byte(name: str) -> None:
    """Tables, scratch and results of a GPU that is not here."""
    x = given(name, "cpu")
    explained = explain(**x, of=attention_varlen, device="sm80")
    with unlaunched(KNOWN_DEVICES["sm80"]) as seen:
        torch.autograd.grad(attention_varlen(**x), leaves(x), torch.ones(40, H, D))
    check_bytes(explained, seen)
    words = dict(explained.memory)
    assert words["extents of sequences"] == 4 * 4 * 4 and "tiles of queries" in words
    kernels = [step.step.kernel for step in explained.forward.steps]
    assert kernels == ["extents", "tiles", "forward", "unowned"]
    assert any("as many as there can be tiles" in note for note in explained.notes)


@triton_only
def test_tiles_follow_the_mean_length() -> None:
    """Where a kernel has smaller tiles than it would have for a dense batch, it says so."""
    q = torch.empty(4096, H, 64, dtype=torch.float16, device="meta", requires_grad=True)
    short, long = (explain(q, q, q, torch.arange(0, 4097, n), of=attention_varlen, device="sm80") for n in (16, 2048))
    (few,), (many,) = ([each for each in x.forward.steps if each.step.kernel == "forward"] for x in (short, long))
    assert few.step.config.block_m == 16 < many.step.config.block_m
    assert "less rows for what sequences are long on the average" in few.source and "less rows" not in many.source


def test_by_position_and_by_name() -> None:
    q, cu = torch.empty(40, H, D, device="meta"), torch.tensor(CU)
    bias = torch.empty(1, H, 23, 23, device="meta")
    texts = {
        str(explain(q, q, q, cu, cu, 23, 23, of=attention_varlen, bias=bias, device="cpu")),
        str(explain(q, q, q, cu, of=attention_varlen, bias=bias, max_seqlen_k=23, max_seqlen_q=23, device="cpu")),
        str(explain(q=q, k=q, v=q, cu_seqlens_q=cu, cu_seqlens_k=cu, of=attention_varlen, bias=bias, device="cpu")),
    }
    assert len(texts) == 1
    q = q[None]
    assert str(explain(q, q, q, torch.zeros(40, 40, device="meta"), of=attention)) == str(
        explain(q, q, q, bias=torch.zeros(40, 40, device="meta"))
    )


def test_jagged_tensors() -> None:
    x = torch.nested.nested_tensor([torch.randn(n, H, D) for n in (3, 9)], layout=torch.jagged)
    explained = explain(x, x, x, causal=True, grads=("q", "bias"), bias=torch.zeros(9, 9), device="cpu")
    assert "2 packed sequences of 12 queries and 12 keys in all" in str(explained) and explained.needs.dbias and not explained.needs.dk


def explained(**change: Any) -> Any:
    q = torch.zeros(40, H, D)
    return explain(**({"q": q, "k": q, "v": q, "cu_seqlens_q": torch.tensor(CU), "of": attention_varlen} | change))


@pytest.mark.parametrize("change, kind, words", [
    ({"of": triflash.flash_attn_func}, ValueError, "of: wanted one of triflash.attention, triflash.attention_varlen, triflash.attention_with_kvcache, got flash_attn_func"),
    ({"of": "attention"}, ValueError, "of: wanted"),
    ({"cu_seqlens_q": None}, TypeError, "cu_seqlens_q: wanted an int32 or int64 tensor, got NoneType"),
    ({"key_lengths": None}, TypeError, r"key_lengths: wanted an argument of attention_varlen \(.*; seqused_k="),
    ({"bias": torch.zeros(3, 3)}, ValueError, "bias: wanted"),
    ({"grads": ("bias",)}, ValueError, "grads: wanted no bias"),
    ({"backend": "hopper"}, UnsupportedError, "sm90"),
    ({"return_lse": 1}, TypeError, "return_lse: wanted"),
])  # fmt: skip
def test_bad_input(change: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        explained(**change)


def test_too_many_by_position() -> None:
    q = torch.zeros(1, 4, H, D)
    with pytest.raises(TypeError, match="explain: wanted q, k, v, bias by position, got 5 arguments"):
        explain(q, q, q, None, None)
    with pytest.raises(TypeError, match="bias: wanted one bias, got two"):
        explain(q, q, q, None, bias=None)


@pytest.mark.parametrize("others, words", [
    ({"cu_seqlens": None}, r"cu_seqlens: wanted an argument of attention_varlen \(cu_seqlens_q, .*; cu_seqlens_q=, and cu_seqlens_k="),
    ({"cu_seq_lens_q": None}, "cu_seq_lens_q: .*; cu_seqlens_q=$"),
    ({"cu_seq_k": None}, "cu_seq_k: .*; cu_seqlens_k=$"),
    ({"max_q": 3}, "max_q: .*; max_seqlen_q=$"),
    ({"max_length_k": 3}, "max_length_k: .*; max_seqlen_k=$"),
    ({"key_lengths": None}, "key_lengths: .*; seqused_k="),
    ({"position_ids": None}, "position_ids: .*; cu_seqlens_q=, where position_ids begin anew"),
    ({"block_table": None}, "block_table: .*; triflash.attention_with_kvcache takes pages"),
    ({"attention_mask": None}, "attention_mask: .*; nothing where it tells padding"),
    ({"softmax_scale": 1.0}, "softmax_scale: .*; scale="),
    ({"is_causal": True}, "is_causal: .*; causal='top_left'"),
    ({"bias_layuot": "rows"}, r"bias_layuot: .*; did you mean bias_layout=\?"),
])  # fmt: skip
def test_names_of_other_packages(others: dict[str, Any], words: str) -> None:
    q = torch.zeros(4, 1, 8)
    for more in ({}, {"cu_seqlens_q": torch.tensor([0, 4])}):
        with pytest.raises(TypeError, match=words):
            attention_varlen(q, q, q, **more, **others)


def test_offsets_are_missed_and_a_bias_by_position() -> None:
    q, cu = torch.zeros(4, 1, 8), torch.tensor([0, 4])
    with pytest.raises(TypeError, match="cu_seqlens_q: wanted an int32 or int64 tensor, got NoneType"):
        attention_varlen(q, q, q)
    with pytest.raises(TypeError, match="attention_varlen: wanted q, .* and max_seqlen_k by position, got 8 arguments; name what follows"):
        attention_varlen(q, q, q, cu, cu, 4, 4, torch.zeros(1, 1, 4, 4))
    found = inspect.signature(attention_varlen).parameters
    assert "more" not in found and "others" not in found and found["cu_seqlens_q"].default is inspect.Parameter.empty


@pytest.mark.unpoisoned
def test_a_wrong_name_under_compilation() -> None:
    q, cu = torch.zeros(4, 1, 8), torch.tensor([0, 4])
    with pytest.raises(TypeError, match="key_lengths: .*; seqused_k="):
        torch.compile(lambda q, cu: attention_varlen(q, q, q, cu, key_lengths=cu), backend="eager")(q, cu)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python does not tell of overloads")
def test_what_type_checkers_are_told() -> None:
    """The overloads are the function, but for what is returned."""
    own = inspect.signature(attention_varlen).parameters
    overloads = typing.get_overloads(attention_varlen)
    assert len(overloads) == 2
    for overload in overloads:
        parameters = inspect.signature(overload).parameters
        assert parameters.keys() == own.keys()
        for name, parameter in parameters.items():
            assert name == "return_lse" or (parameter.annotation, parameter.default) == (own[name].annotation, own[name].default)


@triton_only
@pytest.mark.parametrize("length, backend", [(8, "triton"), (16, "hopper"), (2048, "hopper")])
def test_what_runs_on_hopper(length: int, backend: str) -> None:
    """Its kernels, but for sequences that leave their tiles empty, and how tiles are dealt out."""
    q = torch.empty(4096, H, 64, dtype=torch.float16, device="meta", requires_grad=True)
    found = explain(q, q, q, torch.arange(0, 4097, length), causal=True, of=attention_varlen, device="h200")
    assert found.forward.backend == backend
    if backend == "hopper":
        kernels = [step.step.kernel for step in found.forward.steps]
        assert kernels == ["prepared", "forward"]
        assert "the longest first" in str(found) and any("listed on the device" in note for note in found.notes)
    else:
        assert "leave most empty" in str(found)


@triton_only
def test_where_configurations_come_from_on_hopper() -> None:
    """The gradient of a bias by rows has a portable kernel's tiles there; what has no tiles of scores says so, delta too."""
    q, cu = torch.empty(4096, H, 64, dtype=torch.bfloat16, device="meta"), torch.empty(17, dtype=torch.int32, device="meta")
    bias = torch.empty(H, 4096, 256, dtype=torch.bfloat16, device="meta")
    told = explain(q, q, q, cu, bias=bias, bias_layout="rows", of=attention_varlen, device="h200", grads=("q", "bias"))
    assert told.backward is not None
    sources = {each.step.kernel: each.source for each in (*told.forward.steps, *told.backward.steps)}
    assert "row of plan/tables.py" in sources["packed_dbias"]
    for kernel in ("prepared", "extents", "delta", "preprocess", "cleared"):
        assert sources[kernel] == "fixed: it has no tiles of scores", kernel


@triton_only
@pytest.mark.parametrize("longest, causal, two", [(None, True, False), (4096, True, False), (1024, True, True), (4096, False, True)])
def test_blocks_go_by_twos_under_a_band_only_where_lengths_are_alike(longest: int | None, causal: bool, two: bool) -> None:
    """Of the kernel that gives dk, dv and dq on Hopper, as measured (docs/tuning.md)."""
    q, k, v = (torch.empty(16384, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    offsets = torch.arange(0, 16385, 1024, dtype=torch.int32)
    more = {"cu_seqlens_q": offsets, "max_seqlen_q": longest, "causal": causal, "deterministic": False}
    explained = explain(q, k, v, **more, of=attention_varlen, device="h200")
    (line,) = [line for line in explained.launches if "dqdkdv" in line]
    assert ("u2" in line.split()) == two
