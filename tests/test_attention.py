"""The front door, judged by the definition written out: ``attention`` on every backend, and ``merge_states``."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
import typing
import warnings
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from here import BACKENDS
from triflash import attention, merge_states

F32 = torch.float32


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention as the docstring defines it, dense, in float64, without anything of triflash."""
    q, k, v = (x.double().transpose(-3, -2) for x in (q, k, v))
    M, N, D = q.shape[-2], k.shape[-2], q.shape[-1]
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    s = q @ k.transpose(-1, -2) * (D**-0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.double()
    i, j = torch.arange(M, device=q.device)[:, None], torch.arange(N, device=q.device)[None, :]
    centre = i if causal == "top_left" else i + N - M
    if alibi_slopes is not None:
        s = s - alibi_slopes.double()[..., None, None] * (centre - j).abs()
    seen = torch.ones(M, N, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen & (j <= centre)
    for side, sign in zip(window or (None, None), (-1, 1), strict=True):
        if side is not None and side >= 0:
            seen = seen & (sign * (j - centre) <= side)
    if mask is not None:
        seen = seen & mask
    if key_lengths is not None:
        seen = seen & (j < key_lengths[..., None, None, None])
    s = s.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(s if sink is None else torch.cat([s, sink.double()[:, None, None].expand(*s.shape[:-1], 1)], -1), -1)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    if kept is not None:
        p = p * kept
    return (p @ v).transpose(-3, -2), lse


def inputs(
    *batch: int, M: int = 20, N: int = 27, H: int = 2, Hk: int | None = None, D: int = 16, Dv: int = 16, device: Any = None
) -> list[Tensor]:
    Hk = H if Hk is None else Hk
    shapes = ((*batch, M, H, D), (*batch, N, Hk, D), (*batch, N, Hk, Dv))
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


def agree(tensors: list[Tensor], backend: str, extra: Tensor | None = None, kept: Tensor | None = None, **options: Any) -> None:
    """Outputs, lse and all gradients, lse's own cotangent included, against the definition. ``kept``: what dropout multiplies by."""
    if extra is not None:
        options["bias" if extra.is_floating_point() else "mask"] = extra
    leaves = [*tensors, *(x for x in (options.get("bias"), options.get("sink")) if x is not None and x.requires_grad)]
    got = attention(*tensors, **options, return_lse=True, backend=backend)
    wanted = plain(*tensors, **{name: x for name, x in options.items() if not name.startswith("dropout")}, kept=kept)
    seen = wanted[1] != -torch.inf
    assert got[0].shape == wanted[0].shape and got[1].shape == wanted[1].shape and got[1].dtype == F32
    assert torch.equal(got[1] != -torch.inf, seen)
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(got[1].double(), wanted[1], rtol=1e-3, atol=1e-4)
    cotangents = torch.randn_like(wanted[0]), torch.randn_like(wanted[1])
    grads = [
        torch.autograd.grad((out * cotangents[0].to(out.dtype)).sum() + (lse[seen] * cotangents[1][seen].to(lse.dtype)).sum(), leaves)
        for out, lse in (got, wanted)
    ]
    for x, a, b in zip(leaves, *grads, strict=True):
        assert a.shape == x.shape and a.dtype == x.dtype
        torch.testing.assert_close(a.double(), b.double(), rtol=5e-3, atol=5e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(20, 27), (27, 20), (1, 30), (33, 1), (16, 16)], ids=str)
@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("window", [None, (5, None), (None, 3), (4, 2), (0, 0), (-1, 7)], ids=str)
def test_who_sees_whom(window: Any, causal: Any, lengths: tuple[int, int], backend: str, device: torch.device) -> None:
    M, N = lengths
    agree(inputs(1, M=M, N=N, device=device), backend, causal=causal, window=window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(20, 27), (27, 20)], ids=str)
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_slopes_count_from_where_queries_stand(causal: Any, lengths: tuple[int, int], backend: str, device: torch.device) -> None:
    M, N = lengths
    agree(inputs(1, M=M, N=N, device=device), backend, causal=causal, window=(9, 3), alibi_slopes=torch.rand(2, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [(2**31 - 1, 2**31 - 1), (None, 2**31 - 1), (2**40, 0), (10**9, None)], ids=str)
def test_windows_as_good_as_open(window: Any, backend: str, device: torch.device) -> None:
    """The largest 32-bit number means "no limit" to some; added to a position it would wrap around."""
    for causal in (False, True, "top_left"):
        agree(inputs(1, device=device), backend, causal=causal, window=window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ["qk", "hqk", "b1qk", "1h1k", "b11k", "1hq1", "bhqk", "1111"])
@pytest.mark.parametrize("kind", ["bias", "mask"])
def test_bias_and_mask(kind: str, shape: str, backend: str, device: torch.device) -> None:
    sizes = dict(zip("bhqk", (2, 2, 20, 27), strict=True))
    extra = torch.randn([sizes.get(letter, 1) for letter in shape], device=device)
    agree(inputs(2, device=device), backend, extra > -0.5 if kind == "mask" else extra.requires_grad_(), causal=True)


# Which of the leading batch dims the bias varies over, b where it does.
LEVELS = [
    ((2, 3), "b1"), ((2, 3), "1b"), ((2, 3), "bb"), ((2, 3), "11"), ((2, 3), "b"), ((2, 3), ""),
    ((2, 3, 2), "bb1"), ((2, 3, 2), "b11"), ((2, 3, 2), "1bb"), ((2, 1, 3), "b11"), ((1, 2, 3), "11b"), ((2, 1, 3), "b1b"),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, varies", LEVELS, ids=str)
@pytest.mark.parametrize("rest", ["hqk", "11k"])
def test_leading_batch_dims(rest: str, batch: tuple[int, ...], varies: str, backend: str, device: torch.device) -> None:
    """Folding models' biases, over one batch dim of two: nothing is expanded, and the gradient is summed over the other."""
    letters = varies.rjust(len(batch), "1") if varies else ""
    lead = [size if letter == "b" else 1 for letter, size in zip(letters, batch, strict=False)]
    sizes = {"h": 2, "q": 20, "k": 27}
    bias = torch.randn([*lead, *(sizes.get(letter, 1) for letter in rest)], device=device, requires_grad=True)
    agree(inputs(*batch, device=device), backend, bias)


@pytest.mark.parametrize("own", [(0, 2), (1,), (1, 2)])
def test_batch_dims_that_no_two_levels_express(own: tuple[int, ...], device: torch.device) -> None:
    """The error, and what it says to do."""
    batch = (2, 3, 2) if own != (1, 2) else (2, 3, 2, 2)
    tensors = inputs(*batch, device=device)
    bias = torch.randn(*[size if n in own else 1 for n, size in enumerate(batch)], 2, 20, 27, device=device)
    words = rf"bias that varies over batch dims {re.escape(str(list(own)))} of {len(batch)}, neither .*; permute .* come first or last, or expand it"
    with pytest.raises(triflash.UnsupportedError, match=words):
        attention(*tensors, bias=bias)
    expected = attention(*tensors, bias=bias.expand(*batch, -1, -1, -1))
    for order in ([*own, *others], [*others, *own]) if (others := [n for n in range(len(batch)) if n not in own]) else ():
        rest = range(len(batch), len(batch) + 3)
        q, k, v, permuted = (x.permute(*order, *rest) for x in (*tensors, bias))
        torch.testing.assert_close(attention(q, k, v, bias=permuted), expected.permute(*order, *rest))


@pytest.mark.parametrize("backend", [*BACKENDS, "oracle"])
@pytest.mark.parametrize("bias", [None, (20, 27), (0, 20, 27)], ids=str)
def test_no_query_heads_beside_some_key_heads(bias: tuple[int, ...] | None, backend: str, device: torch.device) -> None:
    """What a shard has where there are fewer heads than shards and one key head for all: nothing, and gradients of 0."""
    q, k, v = (torch.randn(2, length, heads, 8, device=device, requires_grad=True) for length, heads in ((20, 0), (27, 1), (27, 1)))
    added = None if bias is None else torch.randn(bias, device=device, requires_grad=True)
    out, lse = attention(q, k, v, bias=added, causal=True, return_lse=True, backend=backend)
    assert out.shape == (2, 20, 0, 8) and lse.shape == (2, 0, 20)
    leaves = [x for x in (q, k, v, added) if x is not None]
    for x, grad in zip(leaves, torch.autograd.grad([out, lse], leaves, [out, lse]), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))
    assert "0 heads" in str(triflash.explain(q, k, v, bias=added, backend=backend))
    with torch.no_grad():
        assert triflash.attention_with_kvcache(q, k, v, backend=backend).shape == out.shape
        cu = torch.tensor([0, 5, 20], dtype=torch.int32, device=device)
        assert triflash.attention_varlen(q[0], k[0], v[0], cu, cu, backend=backend).shape == out.shape[1:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_key_lengths(backend: str, device: torch.device) -> None:
    lengths = torch.tensor([[0, 5, 27], [26, 1, 99]], device=device)
    for causal in (False, True):
        agree(inputs(2, 3, device=device), backend, key_lengths=lengths, causal=causal)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_are_strides(backend: str, device: torch.device) -> None:
    tensors = inputs(2, device=device)
    for options in ({}, {"causal": True, "window": (7, 0)}):
        wanted, wanted_lse = attention(*tensors, **options, return_lse=True, backend=backend)
        got, lse = attention(*(x.transpose(1, 2) for x in tensors), **options, return_lse=True, layout="bhsd", backend=backend)
        assert torch.equal(got.transpose(1, 2), wanted) and torch.equal(lse, wanted_lse)


def test_a_scale_of_numpy_is_a_number() -> None:
    """Numpy's float32 took the bounds of a scale for float32 too, which overflowed with a warning."""
    numpy = pytest.importorskip("numpy")
    x = torch.randn(1, 4, 2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(attention(x, x, x, scale=numpy.float32(0.5)), attention(x, x, x, scale=0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_dims_and_scales(backend: str, device: torch.device) -> None:
    for Dv, scale in itertools.product((8, 32), (0.0, -0.3, None)):
        agree(inputs(1, Dv=Dv, device=device), backend, scale=scale)


def test_empty_and_without_keys(device: torch.device) -> None:
    for changes in ({"M": 0}, {"N": 0}, {"H": 0}):
        tensors = inputs(2, **changes, device=device)
        out, lse = attention(*tensors, return_lse=True, causal=True)
        assert out.shape == tensors[0].shape and lse.shape == (2, tensors[0].shape[2], tensors[0].shape[1])
        assert (out == 0).all() and (lse == -torch.inf).all()
    assert attention(*inputs(0, 3, device=device)).shape == (0, 3, 20, 2, 16)


def test_it_is_the_seeds_function_where_they_mean_the_same(device: torch.device) -> None:
    q, k, v = inputs(2, device=device)
    bias = torch.randn(1, 2, 20, 27, device=device)
    assert torch.equal(attention(q, k, v, bias=bias, causal="top_left"), triflash.flash_attn_func(q, k, v, bias, True))


@pytest.mark.unpoisoned
def test_compiled(device: torch.device) -> None:
    torch._dynamo.reset()

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out, lse = attention(q, k, v, bias=bias, causal=True, window=(9, None), return_lse=True)
        return out.sum() + lse.sum()

    tensors = [*inputs(2, 3, N=20, device=device), torch.randn(2, 1, 2, 20, 20, device=device, requires_grad=True)]
    wanted = torch.autograd.grad(function(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(function, backend="aot_eager", fullgraph=True)(*tensors), tensors)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_backend_is_chosen_and_kept(device: torch.device) -> None:
    tensors = inputs(1, device=device)
    with triflash.record_launches() as ran:
        attention(*tensors, backend="tiled").sum().backward()
    assert ran == ["tiled: forward", "tiled: backward"]
    with triflash.backend("oracle"), triflash.record_launches() as ran:
        attention(*tensors)
    assert ran == ["oracle: forward"]


Q = torch.zeros(2, 6, 4, 8)
WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("q of 3 dims", {"q": Q[0]}, ValueError, "q: wanted 4 dims or more"),
    ("q no tensor", {"q": [1.0]}, TypeError, "q: wanted a tensor, got list"),
    ("q no tensor, heads first", {"q": None, "layout": "bhsd"}, TypeError, "q: wanted a tensor"),
    ("head dim of k", {"k": Q[..., :4]}, ValueError, "k: wanted shape"),
    ("batch of v", {"v": Q[:1]}, ValueError, "v: wanted shape"),
    ("dtype of k", {"k": Q.half()}, TypeError, "k: wanted q's dtype"),
    ("three key heads", {"k": Q[:, :, :3], "v": Q[:, :, :3]}, ValueError, "k: wanted a number of heads that divides q's 4, got 3"),
    ("no key heads", {"k": Q[:, :, :0], "v": Q[:, :, :0]}, ValueError, "k: wanted a number of heads that divides q's 4, got 0"),
    ("heads of v", {"k": Q[:, :, :2], "v": Q[:, :, :1]}, ValueError, "v: wanted shape.*k and v must share the number of heads"),
    ("causal as a word", {"causal": "yes"}, TypeError, "causal: wanted True, False or 'top_left', got 'yes'"),
    ("causal as a number", {"causal": 1}, TypeError, "causal: wanted"),
    ("window no pair", {"window": 5}, TypeError, "window: wanted a pair"),
    ("window of fractions", {"window": (1.5, 2)}, TypeError, "window: wanted two integers"),
    ("window of bools", {"window": (True, 2)}, TypeError, "window: wanted two integers"),
    ("window below -1", {"window": (-2, 2)}, ValueError, "window: wanted integers from 0 up"),
    ("layout", {"layout": "sbhd"}, ValueError, "layout: wanted one of bshd, bhsd, got 'sbhd'"),
    ("mask of integers", {"mask": torch.ones(6, 6, dtype=torch.uint8)}, TypeError, "mask: wanted a bool tensor, True = visible, got torch.uint8; mask.bool"),
    ("mask of floats", {"mask": torch.zeros(6, 6)}, TypeError, "mask: wanted a bool tensor.*a float one is a bias"),
    ("mask too long", {"mask": torch.ones(6, 7, dtype=torch.bool)}, ValueError, "mask: wanted 2 to 4 dims that broadcast"),
    ("bias of 1 dim", {"bias": torch.zeros(6)}, ValueError, "bias: wanted 2 to 4 dims"),
    ("bias of integers", {"bias": torch.zeros(6, 6, dtype=torch.int32)}, TypeError, "bias: wanted float16"),
    ("two masks", {"bias": torch.ones(6, 6) > 0, "mask": torch.ones(6, 6) > 0}, triflash.UnsupportedError, "mask=bias & mask"),
    ("lengths of floats", {"key_lengths": torch.ones(2)}, TypeError, "key_lengths: wanted a tensor of integers, got torch.float32"),
    ("lengths too many", {"key_lengths": torch.ones(3, dtype=torch.int32)}, ValueError, r"key_lengths: wanted one .* shape \(2,\)"),
    ("soft cap below 0", {"softcap": -1.0}, ValueError, "softcap: wanted a positive number"),
    ("soft cap infinite", {"softcap": float("inf")}, ValueError, "softcap: wanted a positive number"),
    ("soft cap as a tensor", {"softcap": torch.tensor(2.0)}, TypeError, "softcap: wanted a positive number.*pass float"),
    ("slopes of 3 heads", {"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes: wanted one for each head, shape \(4,\) or \(2, 4\)"),
    ("slopes of integers", {"alibi_slopes": torch.ones(4, dtype=torch.int32)}, TypeError, "alibi_slopes: wanted a tensor of floats"),
    ("slopes to learn", {"alibi_slopes": torch.ones(4, requires_grad=True)}, ValueError, "alibi_slopes: .* requires no gradient"),
    ("slopes as a list", {"alibi_slopes": [1.0] * 4}, TypeError, "alibi_slopes: wanted a tensor of floats, or None, got list"),
    ("sink of 2 heads", {"sink": torch.ones(2)}, ValueError, r"sink: wanted one for each query head, shape \(4,\), got \(2,\)"),
    ("sink as a number", {"sink": 1.0}, TypeError, "sink: wanted a tensor of floats"),
    ("dropout of 1", {"dropout_p": 1.0}, ValueError, "dropout_p: wanted a number from 0 up to but not including 1, got 1.0"),
    ("dropout below 0", {"dropout_p": -0.1}, ValueError, "dropout_p: wanted"),
    ("dropout NaN", {"dropout_p": float("nan")}, ValueError, "dropout_p: wanted"),
    ("dropout as True", {"dropout_p": True}, TypeError, "dropout_p: wanted"),
    ("seed of int32", {"dropout_seed": torch.ones(2, dtype=torch.int32)}, TypeError, "dropout_seed: wanted an int, or an int64 tensor"),
    ("seed of 3", {"dropout_seed": torch.ones(3, dtype=torch.int64)}, ValueError, r"dropout_seed: wanted \(seed, offset\), shape \(2,\)"),
    ("seed of a fraction", {"dropout_seed": 1.5}, TypeError, "dropout_seed: wanted an int"),
    ("seed too large", {"dropout_seed": 2**63}, ValueError, "dropout_seed: wanted a number of 64 bits"),
    ("deterministic as a word", {"deterministic": "yes"}, TypeError, "deterministic: wanted True or False"),
    ("scale, a fraction beyond float64", {"scale": Fraction(10**400)}, ValueError, "scale: wanted a finite number"),
    ("scale NaN", {"scale": float("nan")}, ValueError, "scale: wanted a finite number"),
    ("return_lse", {"return_lse": 1}, TypeError, "return_lse: wanted True or False"),
    ("precision", {"precision": "fp8"}, ValueError, "precision: wanted one of"),
    ("backend", {"backend": "cuda"}, ValueError, "backend: wanted one of"),
]  # fmt: skip


@pytest.mark.parametrize("row", WRONG, ids=lambda row: row[0].replace(" ", "-"))
def test_wrong_arguments(row: tuple[str, dict[str, Any], type[Exception], str]) -> None:
    _, wrong, exception, words = row
    arguments = {"q": Q, "k": Q, "v": Q, **wrong}
    with triflash.record_launches() as ran, pytest.raises(exception, match=words):
        attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    assert ran == []


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_merged_parts_are_the_whole(parts: int, device: torch.device) -> None:
    """Values, lse and gradients; one part of some queries' keys is empty of visible ones."""
    tensors = inputs(2, M=20, N=24, device=device)
    q, k, v = tensors
    wanted = attention(q, k, v, causal=True, return_lse=True)
    size, outs, lses = 24 // parts, [], []
    for t in range(parts):
        j = torch.arange(size * t, size * (t + 1), device=device)
        seen = j[None, :] <= torch.arange(20, device=device)[:, None] + 4
        out, lse = attention(q, k[:, j], v[:, j], mask=seen, return_lse=True)
        outs.append(out)
        lses.append(lse)
    got = merge_states(outs, lses)
    cotangents = [torch.randn_like(x) for x in wanted]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got, tensors, cotangents), torch.autograd.grad(wanted, tensors, cotangents), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_merging_nothing_seen(device: torch.device) -> None:
    out, lse = torch.zeros(1, 3, 2, 4, device=device), torch.full((1, 2, 3), -torch.inf, device=device)
    merged, total = merge_states([out, out], [lse, lse])
    assert (merged == 0).all() and (total == -torch.inf).all()


def test_merging_what_does_not_fit() -> None:
    out, lse = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 3)
    for outs, lses, words in (
        ([], [], "outs, lses: wanted as many"),
        ([out], [], "outs, lses: wanted as many"),
        ([out, out[:, :2]], [lse, lse], r"outs\[1\]"),
        ([out, out], [lse, lse.transpose(1, 2)], r"lses\[1\]: wanted shape \(1, 2, 3\)"),
    ):
        with pytest.raises(ValueError, match=words):
            merge_states(outs, lses)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python does not tell of overloads")
def test_what_type_checkers_are_told() -> None:
    """A tensor, or with ``return_lse=True`` two; otherwise the overloads are the function."""
    told = {"Literal[False]": "Tensor", "Literal[True]": "tuple[Tensor, Tensor]", "bool": "Tensor | tuple[Tensor, Tensor]"}
    own = inspect.signature(attention).parameters
    for overload in typing.get_overloads(attention):
        parameters = inspect.signature(overload).parameters
        assert parameters.keys() == own.keys() and overload.__annotations__["return"] == told.pop(parameters["return_lse"].annotation)
        for name, parameter in parameters.items():
            assert name == "return_lse" or (parameter.annotation, parameter.default) == (own[name].annotation, own[name].default)
    assert not told


@pytest.mark.parametrize("others, words", [
    ({"is_causal": True}, r"is_causal: wanted an argument of attention \(bias, mask, causal, .*; causal='top_left' is aligned as"),
    ({"attn_mask": None}, "attn_mask: .*; mask= for a bool tensor .*, bias= for floats"),
    ({"softmax_scale": 1.0}, "softmax_scale: .*; scale="),
    ({"relative_position_bias": None}, "relative_position_bias: .*; bias=, .*RelativeBias"),
    ({"dropout": 0.1}, "dropout: .*; dropout_p="),
    ({"window_size": (3, 0)}, r"window_size: .*; window=\(left, right\)"),
    ({"enable_gqa": True}, "enable_gqa: .*; leave it out"),
    ({"cu_seqlens_q": None}, "cu_seqlens_q: .*; triflash.attention_varlen takes packed sequences"),
    ({"attention_bias": None}, "attention_bias: .*; bias="),
    ({"pos_bias": None}, "pos_bias: .*; bias=, .*RelativeBias"),
    ({"head_mask": None}, r"head_mask: .*; nothing: multiply each head's output, out \* head_mask"),
    ({"value": None}, "value: .*; the third by position, v"),
    ({"learnable_sink": None}, "learnable_sink: .*; sink="),
    ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping: .*; softcap="),
    ({"attention_dropout": 0.1}, "attention_dropout: .*; dropout_p="),
    ({"cuasal": True}, r"cuasal: .*; did you mean causal=\?"),
    ({"nonsense": 1}, "nonsense: wanted an argument of attention .*, got a name that it does not have$"),
])  # fmt: skip
def test_names_of_other_packages(others: dict[str, Any], words: str) -> None:
    q = torch.zeros(1, 2, 1, 4)
    with pytest.raises(TypeError, match=words):
        attention(q, q, q, **others)


def test_a_bias_by_position() -> None:
    q = torch.zeros(1, 2, 1, 4)
    with pytest.raises(TypeError, match="attention: wanted q, k and v by position, got 4 arguments; name what follows v: bias="):
        attention(q, q, q, torch.zeros(2, 2))  # type: ignore[call-overload]
    assert "more" not in inspect.signature(attention).parameters and "others" not in inspect.signature(attention).parameters
    with pytest.raises(TypeError, match="'k'"):
        attention(q)  # type: ignore[call-overload]


@pytest.mark.unpoisoned
def test_a_wrong_name_under_compilation() -> None:
    q = torch.zeros(1, 2, 1, 4)
    with pytest.raises(TypeError, match="dropout: .*; dropout_p="):
        torch.compile(lambda q: attention(q, q, q, dropout=0.1), backend="eager")(q)  # type: ignore[call-overload]


def test_tensors_that_hold_something_else_are_refused_by_name(device: torch.device) -> None:
    """They are never read as their raw data."""
    from torch.nn.attention.bias import causal_lower_right

    q = torch.randn(2, 9, 3, 8, device=device)
    with pytest.raises(TypeError, match="bias: wanted a tensor of numbers.*CausalBias; causal=True is lower right"):
        attention(q, q, q, bias=causal_lower_right(9, 9))
    nested = torch.nested.nested_tensor([torch.randn(n, 2, 8, device=device) for n in (3, 5)], layout=torch.strided)
    with pytest.raises(TypeError, match="q: wanted a jagged tensor, got a NestedTensor of layout torch.strided"):
        attention(nested, nested, nested)
    with pytest.raises(TypeError, match="sink: wanted a dense .strided. tensor, got a NestedTensor"):
        attention(q, q, q, sink=nested)
