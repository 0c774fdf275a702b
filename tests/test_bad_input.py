"""Bad input, as a table: every wrong argument raises the right type, names the argument, says what was wanted and got, and touches nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import triflash
from triflash.triton_flash_attention import (
    FlashAttnFunc,
    FlashAttnKVPackedFunc,
    FlashAttnQKVPackedFunc,
    _flash_attn_backward,
    _flash_attn_forward,
)

B, M, N, H, D = 2, 6, 7, 3, 8


def qkv(**kwargs: Any) -> dict[str, Any]:
    return {"q": torch.randn(B, M, H, D, **kwargs), "k": torch.randn(B, N, H, D, **kwargs), "v": torch.randn(B, N, H, D, **kwargs)}


def rand(*shape: int, **kwargs: Any) -> torch.Tensor:
    return torch.randn(*shape, **kwargs)


# (what is wrong, replaced arguments, exception, the argument that is blamed, what the message must contain)
Row = tuple[str, dict[str, Any], type[Exception], str, list[str]]
TENSORS: list[Row] = [
    ("q is a list", {"q": [1.0]}, TypeError, "q", ["wanted a tensor", "got list"]),
    ("k is None", {"k": None}, TypeError, "k", ["wanted a tensor", "got NoneType"]),
    ("v is an array", {"v": rand(B, N, H, D).numpy()}, TypeError, "v", ["wanted a tensor", "got ndarray"]),
    ("q is sparse", {"q": rand(B, M, H, D).to_sparse()}, TypeError, "q", ["wanted a dense", "got torch.sparse_coo"]),
    ("q of 3 dims", {"q": rand(M, H, D)}, ValueError, "q", ["wanted 4 dims (B, M, H, D)", "got 3 dims (6, 3, 8)"]),
    ("k of 5 dims", {"k": rand(1, B, N, H, D)}, ValueError, "k", ["wanted 4 dims", "got 5 dims"]),
    ("v of 0 dims", {"v": torch.tensor(1.0)}, ValueError, "v", ["wanted 4 dims", "got 0 dims"]),
    ("batch of k", {"k": rand(B + 1, N, H, D)}, ValueError, "k", ["B=2", "got (3, 7, 3, 8)", "q and k must share the batch"]),
    ("batch of v is 1", {"v": rand(1, N, H, D)}, ValueError, "v", ["B=2", "got (1, 7, 3, 8)", "must share the batch"]),
    ("heads of k", {"k": rand(B, N, 1, D)}, ValueError, "k", ["H=3", "got (2, 7, 1, 8)", "q and k must share the number of heads"]),
    ("heads of v", {"v": rand(B, N, H + 1, D)}, ValueError, "v", ["H=3", "got (2, 7, 4, 8)", "number of heads"]),
    ("head dim of k", {"k": rand(B, N, H, 2 * D)}, ValueError, "k", ["D=8", "got (2, 7, 3, 16)", "q and k must share the head dim"]),
    ("head dim of v", {"v": rand(B, N, H, D - 1)}, ValueError, "v", ["D=8", "got (2, 7, 3, 7)", "head dim"]),
    ("length of v", {"v": rand(B, N + 1, H, D)}, ValueError, "v", ["N=7", "got (2, 8, 3, 8)", "k and v must share the key length"]),
    ("heads before sequence", {"k": rand(B, H, N, D)}, ValueError, "k", ["H=3", "got (2, 3, 7, 8)"]),
    (
        "head dim 0",
        {"q": rand(B, M, H, 0), "k": rand(B, N, H, 0), "v": rand(B, N, H, 0)},
        ValueError,
        "q",
        ["head dim of at least 1", "got 0"],
    ),
    (
        "integers",
        qkv(dtype=torch.float32) | {"q": torch.ones(B, M, H, D, dtype=torch.int32)},
        TypeError,
        "q",
        ["float16", "got torch.int32"],
    ),
    ("complex", {"q": rand(B, M, H, D, dtype=torch.complex64)}, TypeError, "q", ["float16", "got torch.complex64"]),
    ("float8", {"q": rand(B, M, H, D).to(torch.float8_e4m3fn)}, TypeError, "q", ["float16", "got torch.float8_e4m3fn"]),
    (
        "k in another dtype",
        {"k": rand(B, N, H, D, dtype=torch.bfloat16)},
        TypeError,
        "k",
        ["float32", "got torch.bfloat16", "k.to(q.dtype)"],
    ),
    ("v in another dtype", {"v": rand(B, N, H, D, dtype=torch.float64)}, TypeError, "v", ["float32", "got torch.float64"]),
    ("k elsewhere", {"k": rand(B, N, H, D, device="meta")}, ValueError, "k", ["q's device cpu", "got meta"]),
    ("v elsewhere", {"v": rand(B, N, H, D, device="meta")}, ValueError, "v", ["q's device cpu", "got meta"]),
]
OPTIONS: list[Row] = [
    ("bias is a number", {"bias": 0.5}, TypeError, "bias", ["a tensor or None", "got float"]),
    ("bias of 0 dims", {"bias": torch.tensor(1.0)}, ValueError, "bias", ["2 to 4 dims", "got 0 dims"]),
    ("bias of 1 dim", {"bias": rand(N)}, ValueError, "bias", ["2 to 4 dims", "(B=2, H=3, M=6, N=7)", "got 1 dims (7,)"]),
    ("bias of 5 dims", {"bias": rand(1, 1, 1, 1, 1)}, ValueError, "bias", ["2 to 4 dims", "got 5 dims"]),
    ("bias keys", {"bias": rand(M, N + 1)}, ValueError, "bias", ["broadcast to", "got (6, 8)"]),
    ("bias queries", {"bias": rand(M + 1, 1)}, ValueError, "bias", ["broadcast to", "got (7, 1)"]),
    ("bias heads", {"bias": rand(2 * H, M, N)}, ValueError, "bias", ["broadcast to", "got (6, 6, 7)"]),
    ("bias batch", {"bias": rand(B + 1, H, M, N)}, ValueError, "bias", ["broadcast to", "got (3, 3, 6, 7)"]),
    ("bias transposed", {"bias": rand(N, M)}, ValueError, "bias", ["broadcast to", "got (7, 6)", "each dim must be 1 or the full size"]),
    ("bias of no keys", {"bias": rand(M, 0)}, ValueError, "bias", ["broadcast to", "got (6, 0)"]),
    ("bias (B, M, N)", {"bias": rand(B, M, N)}, ValueError, "bias", ["got (2, 6, 7)", "pass bias[:, None]"]),
    ("bias (B, N)", {"bias": rand(B, N)}, ValueError, "bias", ["got (2, 7)", "pass bias[:, None, None, :]"]),
    ("bias of integers", {"bias": torch.ones(M, N, dtype=torch.int64)}, TypeError, "bias", ["bool (True = visible)", "got torch.int64"]),
    ("bias of bytes", {"bias": torch.ones(M, N, dtype=torch.uint8)}, TypeError, "bias", ["bool (True = visible)", "got torch.uint8"]),
    ("bias in float64", {"bias": rand(M, N, dtype=torch.float64)}, TypeError, "bias", ["float32", "got torch.float64"]),
    ("bias elsewhere", {"bias": rand(M, N, device="meta")}, ValueError, "bias", ["q's device cpu", "got meta"]),
    ("bias is sparse", {"bias": rand(M, N).to_sparse()}, TypeError, "bias", ["dense", "got torch.sparse_coo"]),
    ("causal is a string", {"causal": "False"}, TypeError, "causal", ["True or False", "got 'False'"]),
    ("causal is 1", {"causal": 1}, TypeError, "causal", ["True or False", "got 1"]),
    ("causal is None", {"causal": None}, TypeError, "causal", ["True or False", "got None"]),
    ("causal is a tensor", {"causal": torch.tensor(True)}, TypeError, "causal", ["True or False", "got tensor(True)"]),
    ("scale is NaN", {"softmax_scale": math.nan}, ValueError, "softmax_scale", ["finite", "got nan"]),
    ("scale is infinite", {"softmax_scale": -math.inf}, ValueError, "softmax_scale", ["finite", "got -inf"]),
    ("scale is a string", {"softmax_scale": "0.5"}, TypeError, "softmax_scale", ["a number or None", "got str"]),
    ("scale is a bool", {"softmax_scale": True}, TypeError, "softmax_scale", ["a number or None", "got bool"]),
    (
        "scale is a tensor",
        {"softmax_scale": torch.tensor(0.5)},
        TypeError,
        "softmax_scale",
        ["a number or None", "got Tensor", "float(scale)"],
    ),
    ("scale is complex", {"softmax_scale": 1j}, TypeError, "softmax_scale", ["a number or None", "got complex"]),
]
PACKED: list[tuple[str, str, dict[str, Any], type[Exception], str, list[str]]] = [
    ("kv of 4 dims", "kv", {"kv": rand(B, N, H, D)}, ValueError, "kv", ["wanted 5 dims (B, N, 2, H, D)", "got 4 dims"]),
    (
        "kv of 3 parts",
        "kv",
        {"kv": rand(B, N, 3, H, D)},
        ValueError,
        "kv",
        ["(B=2, N=7, 2, H=3, D=8)", "got (2, 7, 3, 3, 8)", "holds its 2 parts"],
    ),
    ("kv with other heads", "kv", {"kv": rand(B, N, 2, 1, D)}, ValueError, "kv", ["H=3", "q and kv must share the number of heads"]),
    ("kv in another dtype", "kv", {"kv": rand(B, N, 2, H, D).half()}, TypeError, "kv", ["float32", "got torch.float16"]),
    ("kv is a tuple", "kv", {"kv": (1, 2)}, TypeError, "kv", ["a tensor", "got tuple"]),
    ("q beside kv is None", "kv", {"q": None}, TypeError, "q", ["a tensor", "got NoneType"]),
    ("qkv of 2 parts", "qkv", {"qkv": rand(B, M, 2, H, D)}, ValueError, "qkv", ["3", "got (2, 6, 2, 3, 8)", "holds its 3 parts"]),
    ("qkv of 4 dims", "qkv", {"qkv": rand(B, M, H, D)}, ValueError, "qkv", ["5 dims (B, M, 3, H, D)", "got 4 dims"]),
    ("qkv is None", "qkv", {"qkv": None}, TypeError, "qkv", ["a tensor", "got NoneType"]),
    ("qkv of integers", "qkv", {"qkv": torch.ones(B, M, 3, H, D, dtype=torch.int8)}, TypeError, "qkv", ["float16", "got torch.int8"]),
    ("causal is 0", "qkv", {"causal": 0}, TypeError, "causal", ["True or False", "got 0"]),
    ("bias on kv", "kv", {"bias": rand(B, H, N, M)}, ValueError, "bias", ["got (2, 3, 7, 6)"]),
    ("scale on kv", "kv", {"softmax_scale": math.inf}, ValueError, "softmax_scale", ["finite"]),
]
BACKWARD: list[Row] = [
    ("do is None", {"do": None}, TypeError, "do", ["a tensor", "got NoneType"]),
    ("do of another length", {"do": rand(B, M + 1, H, D)}, ValueError, "do", ["M=6", "got (2, 7, 3, 8)"]),
    ("do in another dtype", {"do": rand(B, M, H, D).half()}, TypeError, "do", ["float32", "got torch.float16"]),
    ("o of another shape", {"o": rand(B, M, H, D + 1)}, ValueError, "o", ["D=8", "got (2, 6, 3, 9)"]),
    ("o elsewhere", {"o": rand(B, M, H, D, device="meta")}, ValueError, "o", ["cpu", "got meta"]),
    ("lse of too few rows", {"lse": rand(B, H, M - 1)}, ValueError, "lse", ["at least 6 rows", "got 5 rows"]),
    ("lse of other heads", {"lse": rand(B, H + 1, 128)}, ValueError, "lse", ["H=3", "got (2, 4, 128)"]),
    ("lse of 2 dims", {"lse": rand(H, 128)}, ValueError, "lse", ["3 dims", "got 2 dims"]),
    ("lse in float16", {"lse": rand(B, H, 128).half()}, TypeError, "lse", ["torch.float32", "got torch.float16"]),
    ("lse elsewhere", {"lse": rand(B, H, 128, device="meta")}, ValueError, "lse", ["cpu", "got meta"]),
    ("lse is None", {"lse": None}, TypeError, "lse", ["a tensor", "got NoneType"]),
    ("dq of another shape", {"dq": rand(B, M, H, D + 1)}, ValueError, "dq", ["D=8", "got (2, 6, 3, 9)"]),
    ("dk in the shape of q", {"dk": rand(B, M, H, D)}, ValueError, "dk", ["N=7", "got (2, 6, 3, 8)"]),
    ("dv in another dtype", {"dv": rand(B, N, H, D).double()}, TypeError, "dv", ["float32", "got torch.float64"]),
    ("dv elsewhere", {"dv": rand(B, N, H, D, device="meta")}, ValueError, "dv", ["cpu", "got meta"]),
    ("dq expanded", {"dq": rand(1, M, H, D).expand(B, M, H, D)}, ValueError, "dq", ["memory of its own", "an expanded tensor"]),
    ("dk expanded", {"dk": rand(B, N, 1, D).expand(B, N, H, D)}, ValueError, "dk", ["memory of its own", "an expanded tensor"]),
]


def ids(table: list[Any]) -> list[str]:
    return [row[0].replace(" ", "-") for row in table]


def assert_refuses(call: Callable[[], Any], exception: type[Exception], name: str, parts: list[str]) -> None:
    """``call`` raises exactly ``exception("name: wanted …, got …")`` with the parts in it, and starts nothing."""
    with triflash.record_launches() as ran, pytest.raises(exception) as caught:
        call()
    message = str(caught.value)
    assert caught.type is exception
    assert re.match(rf"{re.escape(name)}: wanted .+, got .+", message), message
    assert all(part in message for part in parts), message
    assert ran == []


@pytest.mark.parametrize("face", [triflash.flash_attn_func, FlashAttnFunc.apply, _flash_attn_forward], ids=["func", "apply", "forward"])
@pytest.mark.parametrize("row", TENSORS + OPTIONS, ids=ids(TENSORS + OPTIONS))
def test_forward(row: Row, face: Callable[..., Any]) -> None:
    _, wrong, exception, name, parts = row
    arguments = {**qkv(), "bias": None, "causal": False, "softmax_scale": None, **wrong}
    assert_refuses(lambda: face(*arguments.values()), exception, name, parts)
    if face != FlashAttnFunc.apply:  # takes no keywords on every PyTorch
        assert_refuses(lambda: face(**arguments), exception, name, parts)


@pytest.mark.parametrize("row", PACKED, ids=ids(PACKED))
def test_packed(row: tuple[str, str, dict[str, Any], type[Exception], str, list[str]]) -> None:
    _, packing, wrong, exception, name, parts = row
    tensors = {"q": rand(B, M, H, D), "kv": rand(B, N, 2, H, D)} if packing == "kv" else {"qkv": rand(B, M, 3, H, D)}
    arguments = {**tensors, "bias": None, "causal": False, "softmax_scale": None, **wrong}
    func = triflash.flash_attn_kvpacked_func if packing == "kv" else triflash.flash_attn_qkvpacked_func
    apply = FlashAttnKVPackedFunc.apply if packing == "kv" else FlashAttnQKVPackedFunc.apply
    assert_refuses(lambda: func(**arguments), exception, name, parts)
    assert_refuses(lambda: apply(*arguments.values()), exception, name, parts)


@pytest.mark.parametrize("row", TENSORS + OPTIONS + BACKWARD, ids=ids(TENSORS + OPTIONS + BACKWARD))
def test_backward_leaves_its_outputs_untouched(row: Row) -> None:
    _, wrong, exception, name, parts = row
    arguments = {"do": rand(B, M, H, D), **qkv(), "o": rand(B, M, H, D), "lse": rand(B, H, 128)}
    outputs = {"dq": torch.full((B, M, H, D), 7.0), "dk": torch.full((B, N, H, D), 7.0), "dv": torch.full((B, N, H, D), 7.0)}
    arguments |= {**outputs, "bias": None, "causal": False, "softmax_scale": None, **wrong}
    before = {n: x.clone() for n, x in arguments.items() if n in outputs}
    assert_refuses(lambda: _flash_attn_backward(**arguments), exception, name, parts)
    for n, old in before.items():
        assert old.is_meta or torch.equal(arguments[n], old), f"{n} was written"
    for n, x in outputs.items():
        assert (x == 7.0).all(), f"{n} was written"


def test_unknown_arguments_are_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="dropout_p"):
        triflash.flash_attn_func(**qkv(), dropout_p=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        triflash.flash_attn_func(rand(B, M, H, D))  # type: ignore[call-arg]


RAW = {"batch_inner": 1, "lo": None, "hi": None, "scale": 1.0, "precision": "", "backend": "auto"}
RAW_WRONG: list[Row] = [
    ("heads of k", {"k": rand(B, N, H + 1, D)}, ValueError, "k, v", ["(2, N, 4, 8)", "(2, 7, 3, 8)"]),
    ("heads of k and v", {n: rand(B, N, H - 1, D) for n in "kv"}, ValueError, "k, v", ["divides q's 3", "got 2"]),
    ("mask without a bias of numbers", {"bias": torch.zeros(1, 1, 1, M, N) > 0, "mask": torch.zeros(1, 1, 1, M, N) > 0}, TypeError, "mask", ["beside a bias"]),
    ("key lengths of floats", {"key_lengths": torch.ones(B)}, TypeError, "key_lengths", ["torch.int32", "torch.uint64"]),
    ("slopes of one dim", {"alibi_slopes": torch.ones(H)}, ValueError, "alibi_slopes", ["(1, 3)"]),
    ("sink of two", {"sink": torch.ones(2)}, ValueError, "sink", ["(3,)"]),
    ("dropout without a seed", {"dropout_p": 0.1}, ValueError, "dropout_p", ["with a dropout_seed"]),
    ("soft cap below 0", {"softcap": -1.0}, ValueError, "softcap", ["0 for none"]),
    ("length of v", {"v": rand(B, N + 1, H, D)}, ValueError, "k, v", ["(2, 8, 3, 8)"]),
    ("dtype of k", {"k": rand(B, N, H, D).half()}, TypeError, "k, v", ["torch.float16"]),
    ("integers", {n: torch.ones(s, dtype=torch.int32) for n, s in (("q", (B, M, H, D)), ("k", (B, N, H, D)), ("v", (B, N, H, D)))}, TypeError, "q", ["torch.int32"]),
    ("batch_inner 0", {"batch_inner": 0}, ValueError, "batch_inner", ["divisor of the batch 2", "got 0"]),
    ("batch_inner 3", {"batch_inner": 3}, ValueError, "batch_inner", ["divisor of the batch 2", "got 3"]),
    ("bias of 4 dims", {"bias": rand(1, 1, M, N)}, ValueError, "bias", ["5 dims", "got (1, 1, 6, 7)"]),
    ("bias too long", {"bias": rand(1, 1, 1, M, N + 1)}, ValueError, "bias", ["broadcast to (2, 1, 3, 6, 7)", "got (1, 1, 1, 6, 8)"]),
    ("bias of integers", {"bias": torch.ones(1, 1, 1, M, N, dtype=torch.int8)}, TypeError, "bias", ["bool", "got torch.int8"]),
    ("q of 3 dims", {"q": rand(B, M, D)}, ValueError, "q, k, v", ["4 dims each", "got 3, 4 and 4"]),
    ("scale NaN", {"scale": float("nan")}, ValueError, "scale", ["finite", "got nan"]),
    ("backend", {"backend": "cuda"}, ValueError, "backend", ["auto, tiled, triton, hopper, oracle", "got 'cuda'"]),
    ("precision", {"precision": "fp8"}, ValueError, "precision", ["ieee, tf32, tf32x3", "got 'fp8'"]),
]  # fmt: skip


@pytest.mark.parametrize("row", RAW_WRONG, ids=ids(RAW_WRONG))
def test_raw_operators(row: Row) -> None:
    """Whoever calls ``torch.ops.triflash`` directly gets fewer words, but the kernels are guarded."""
    _, wrong, exception, name, parts = row
    arguments = {**qkv(), "bias": None, **RAW, **wrong}
    assert_refuses(lambda: torch.ops.triflash.forward(**arguments), exception, name, parts)
    tensors = [arguments.pop(n) for n in ("q", "k", "v", "bias")]
    dq = torch.full((B, M, H, D), 7.0)
    saved = (rand(B, M, H, D), None, *tensors, rand(B, M, H, D), rand(B, H, M), None)
    given = {"dq": dq, "dk": None, "dv": None, "dbias": None}
    assert_refuses(lambda: torch.ops.triflash.backward(*saved, needs=[True] * 3 + [False], **arguments), exception, name, parts)
    assert_refuses(lambda: torch.ops.triflash.backward_(*saved, **arguments, **given), exception, name, parts)
    assert (dq == 7.0).all()


RAW_BACKWARD: list[Row] = [
    ("dout too short", {"dout": rand(B, M - 1, H, D)}, ValueError, "dout", ["(2, 5, 3, 8)"]),
    ("dout of another dtype", {"dout": rand(B, M, H, D).half()}, TypeError, "dout", ["torch.float16"]),
    ("dlse too short", {"dlse": rand(B, H, M - 1)}, ValueError, "dlse", ["(2, 3, 5)"]),
    ("out of another head dim", {"out": rand(B, M, H, D - 1)}, ValueError, "out", ["(2, 6, 3, 7)"]),
    ("lse too short", {"lse": rand(B, H, M - 1)}, ValueError, "lse", ["(2, 3, 5)"]),
    ("rest too short", {"rest": rand(B, H, M - 1)}, ValueError, "rest", ["(2, 3, 5)"]),
    ("rest in half precision", {"rest": rand(B, H, M).half()}, TypeError, "rest", ["torch.float16"]),
    ("lse in half precision", {"lse": rand(B, H, M).half()}, TypeError, "lse", ["torch.float16"]),
]
RAW_OUTPUTS: list[Row] = [
    ("dq too short", {"dq": torch.full((B, M - 1, H, D), 7.0)}, ValueError, "dq", ["(2, 5, 3, 8)"]),
    ("dk of other heads", {"dk": torch.full((B, N, H + 1, D), 7.0)}, ValueError, "dk", ["(2, 7, 4, 8)"]),
    ("dv of another dtype", {"dv": torch.full((B, N, H, D), 7.0).half()}, TypeError, "dv", ["torch.float16"]),
    ("dbias of the full shape", {"dbias": torch.full((B, 1, H, M, N), 7.0)}, ValueError, "dbias", ["(2, 1, 3, 6, 7)"]),
]


@pytest.mark.parametrize("row", RAW_BACKWARD + RAW_OUTPUTS, ids=ids(RAW_BACKWARD + RAW_OUTPUTS))
def test_raw_backward(row: Row) -> None:
    """A kernel would read or write past the end of these."""
    _, wrong, exception, name, parts = row
    bias = rand(1, 1, H, M, N)
    inputs = {"dout": rand(B, M, H, D), "dlse": None, **qkv(), "bias": bias, "out": rand(B, M, H, D), "lse": rand(B, H, M), "rest": None}
    outputs = {n: torch.full_like(x, 7.0) for n, x in (("dq", inputs["q"]), ("dk", inputs["k"]), ("dv", inputs["v"]), ("dbias", bias))}
    inputs |= {n: x for n, x in wrong.items() if n in inputs}
    outputs |= {n: x for n, x in wrong.items() if n in outputs}
    assert_refuses(lambda: torch.ops.triflash.backward_(*inputs.values(), *RAW.values(), *outputs.values()), exception, name, parts)
    assert all((x == 7.0).all() for x in outputs.values())
    if name in inputs:
        assert_refuses(lambda: torch.ops.triflash.backward(*inputs.values(), *RAW.values(), [True] * 4), exception, name, parts)


@pytest.mark.parametrize("first, second", [("dq", "q"), ("dk", "v"), ("dv", "do"), ("dq", "o")], ids=str)
def test_gradients_into_memory_that_is_read(first: str, second: str) -> None:
    """Kernels write gradients while others still read; shared memory would give wrong numbers, silently."""
    tensors = {**{n: rand(B, M, H, D) for n in ("do", "q", "k", "v", "o")}, "lse": rand(B, H, 128)}
    outputs = {n: torch.zeros(B, M, H, D) for n in ("dq", "dk", "dv")} | {first: tensors[second]}
    before = tensors[second].clone()
    names = {"do": "dout", "o": "out"}
    parts = ["memory of its own", names.get(second, second)]
    assert_refuses(lambda: _flash_attn_backward(**tensors, **outputs), ValueError, first, parts)
    assert torch.equal(tensors[second], before)


def test_two_gradients_into_one_tensor() -> None:
    shared = torch.zeros(B, M, H, D)
    tensors = {**{n: rand(B, M, H, D) for n in ("do", "q", "k", "v", "o")}, "lse": rand(B, H, 128)}
    call = lambda: _flash_attn_backward(**tensors, dq=shared, dk=shared, dv=torch.zeros_like(shared))  # noqa: E731
    assert_refuses(call, ValueError, "dk", ["memory of its own", "that of dq"])


def test_raw_gradient_of_an_absent_bias() -> None:
    """There is none: an error, or an empty tensor, but no assertion inside the planner."""
    inputs = {"dout": rand(B, M, H, D), "dlse": None, **qkv(), "bias": None, "out": rand(B, M, H, D), "lse": rand(B, H, M), "rest": None}
    try:
        dbias = torch.ops.triflash.backward(*inputs.values(), *RAW.values(), [True] * 4)[3]
    except ValueError as error:
        assert "bias" in str(error)
    else:
        assert dbias.numel() == 0
