"""``triflash.compat.torch_varlen`` against a loop over the dense formula in float64, and on a GPU beside PyTorch's own."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import triflash
from triflash.compat.torch_varlen import varlen_attn

CU_Q, CU_K = [0, 5, 5, 12, 13], [0, 7, 9, 13, 22]  # the second has no queries
# Behind the seven that all releases have.
RELEASES: dict[str, list[tuple[str, Any, str]]] = {  # (name, default, how)
    "2.10": [("is_causal", False, "by position"), ("return_aux", None, "by position")],
    "2.11": [("return_aux", None, "by name"), ("scale", None, "by name"), ("window_size", (-1, -1), "by name")],
    "2.12 to 2.14": [
        ("return_aux", None, "by name"), ("scale", None, "by name"), ("window_size", (-1, -1), "by name"), ("enable_gqa", False, "by name"),
        ("seqused_k", None, "by name"), ("block_table", None, "by name"), ("num_splits", None, "by name"),
    ],
}  # fmt: skip
FIRST = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


class Aux(NamedTuple):
    lse: bool = False


def formula(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: tuple[int, int], used: int | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one sequence, (m, H, D), keys (n, Hk, D)."""
    k, v = (x[:used].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    i, j = torch.arange(s.shape[1])[:, None] + s.shape[2] - s.shape[1], torch.arange(s.shape[2])
    left, right = window
    hidden = ((left >= 0) & (j < i - left)) | ((right >= 0) & (j > i + right))
    s = s.masked_fill(hidden, -torch.inf)
    unseen = hidden.all(-1, keepdim=True)
    lse = s.masked_fill(unseen, 0.0).logsumexp(-1, keepdim=True)
    out = torch.einsum("hij,jhd->ihd", (s - lse).exp().masked_fill(unseen, 0.0), v)
    return out, lse.masked_fill(unseen, -torch.inf).squeeze(-1)


def loop(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, window: tuple[int, int] = (-1, -1), used: Any = None) -> Any:
    found = []
    for b, ((i, m), (j, n)) in enumerate(zip(pairwise(CU_Q), pairwise(CU_K), strict=True)):
        found.append(formula(q[i:m], k[j:n], v[j:n], scale, window, None if used is None else used[b]))
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs), torch.cat(lses, 1)


def inputs(Hk: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((13, 4, 8), (22, Hk, 8), (22, Hk, 8))]


def offsets(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    return torch.tensor(CU_Q, dtype=torch.int32, device=device), torch.tensor(CU_K, dtype=torch.int32, device=device)


@pytest.mark.parametrize("Hk, given, wanted", [
    (4, {}, {}),
    (4, {"is_causal": True}, {"window": (-1, 0)}),
    (4, {"window_size": (-1, 0)}, {"window": (-1, 0)}),
    (4, {"window_size": (2, 0), "scale": 0.3}, {"window": (2, 0), "scale": 0.3}),
    (4, {"window_size": (1, 2), "num_splits": 1}, {"window": (1, 2)}),
    (2, {"enable_gqa": True, "window_size": (-1, 0)}, {"window": (-1, 0)}),
    (1, {"enable_gqa": True, "seqused_k": torch.tensor([3, 1, 0, 9], dtype=torch.int32)}, {"used": [3, 1, 0, 9]}),
])  # fmt: skip
def test_against_the_formula(Hk: int, given: dict[str, Any], wanted: dict[str, Any]) -> None:
    x = inputs(Hk)
    right, right_lse = loop(*x, **wanted)
    out, lse = varlen_attn(*x, *offsets(), 7, 9, return_aux=Aux(lse=True), **given)
    torch.testing.assert_close(out, right, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, right_lse, rtol=1e-9, atol=1e-9)
    assert torch.equal(varlen_attn(*x, *offsets(), 7, 9, return_aux=Aux(), **given), out)
    weights, more = torch.randn_like(out), torch.randn_like(lse)
    seen = right_lse.isfinite()
    grads = [
        torch.autograd.grad((o * weights).sum() + (torch.where(seen, other, 0.0) * more).sum(), x)
        for o, other in ((out, lse), (right, right_lse))
    ]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_2_10_by_position() -> None:
    x = inputs()
    out, lse = varlen_attn(*x, *offsets(), 7, 9, True, Aux(True))
    torch.testing.assert_close((out, lse), loop(*x, window=(-1, 0)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("release", RELEASES)
def test_signature_has_all_of_a_release(release: str) -> None:
    found = inspect.signature(varlen_attn).parameters
    assert list(found)[:7] == FIRST
    for at, (name, default, how) in enumerate(RELEASES[release]):
        assert found[name].default == default
        assert how == "by name" or list(found).index(name) == 7 + at


def test_signature_has_all_of_the_release_that_runs() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    found = inspect.signature(varlen_attn).parameters
    for name, theirs in inspect.signature(varlen.varlen_attn).parameters.items():
        assert name in found and found[name].default == theirs.default


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch's own has no kernels for a CPU")
@pytest.mark.parametrize("given", [{}, {"window_size": (-1, 0)}, {"window_size": (2, 1)}, {"scale": 0.2}])
def test_beside_pytorchs_own(given: dict[str, Any], device: torch.device) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    x = [y.detach().to(device, torch.bfloat16).requires_grad_() for y in inputs()]
    try:
        theirs, their_lse = varlen.varlen_attn(*x, *offsets(device), 7, 9, return_aux=varlen.AuxRequest(lse=True), **given)
    except TypeError:
        pytest.skip("an older release without these arguments")
    out, lse = varlen_attn(*x, *offsets(device), 7, 9, return_aux=varlen.AuxRequest(lse=True), **given)
    assert lse.shape == their_lse.shape == (4, 13) and lse.dtype == their_lse.dtype
    torch.testing.assert_close(out, theirs, rtol=2e-2, atol=2e-2)
    seen = lse.isfinite()
    torch.testing.assert_close(lse[seen], their_lse[seen], rtol=1e-3, atol=1e-3)
    dout = torch.randn_like(out)
    for mine, right in zip(torch.autograd.grad(out, x, dout), torch.autograd.grad(theirs, x, dout), strict=True):
        torch.testing.assert_close(mine, right, rtol=4e-2, atol=4e-2)


def paged(lengths: list[int], page: int = 4, Hk: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Packed keys and values, the same in pages that lie in no order, and their table."""
    most = -(-max(lengths) // page)
    table = torch.randperm(len(lengths) * most).to(torch.int32).view(len(lengths), most)
    pages = [torch.randn(table.numel(), page, Hk, 8) for _ in range(2)]
    rows = [torch.cat([x[own.long()].flatten(0, 1)[:n] for own, n in zip(table, lengths, strict=True)]) for x in pages]
    return rows[0], rows[1], pages[0], pages[1], table


def test_pages() -> None:
    """seqused_k says how many keys there are, or else offsets; num_splits may be any number there."""
    lengths = [n - j for j, n in pairwise(CU_K)]
    k, v, k_pages, v_pages, table = paged(lengths)
    q, (cu_q, cu_k) = torch.randn(13, 4, 8), offsets()
    right, right_lse = loop(q, k, v, 0.3, (3, 0))
    given: dict[str, Any] = {"scale": 0.3, "window_size": (3, 0), "enable_gqa": True, "return_aux": Aux(lse=True), "block_table": table}
    for keys, used in ((None, torch.tensor(lengths)), (cu_k, None)):
        out, lse = varlen_attn(q, k_pages, v_pages, cu_q, keys, 7, 9, seqused_k=used, num_splits=2, **given)
        torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, right_lse, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="seqused_k: wanted a tensor of integers"):
        varlen_attn(q, k_pages, v_pages, cu_q, None, 7, 9, seqused_k=torch.ones(4), **given)
    with pytest.raises(
        ValueError, match="cu_seq_k: wanted offsets of the keys, got None; it may be None beside a block_table and seqused_k"
    ):
        varlen_attn(q, k_pages, v_pages, cu_q, None, 7, 9, **given)
    with pytest.raises(ValueError, match="key: wanted query's 4 heads, got 2; enable_gqa=True"):
        varlen_attn(q, k_pages, v_pages, cu_q, cu_k, 7, 9, block_table=table)
    with pytest.raises(triflash.UnsupportedError, match="gradients by q"):
        varlen_attn(q.clone().requires_grad_(), k_pages, v_pages, cu_q, cu_k, 7, 9, **given)


def test_compiled() -> None:
    x = inputs(dtype=torch.float32)

    def run(*given: Tensor) -> Any:
        return varlen_attn(*given, 7, 9, window_size=(-1, 0))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*x, *offsets()), run(*x, *offsets()))


@pytest.mark.parametrize("change, kind, message", [
    ({"block_table": torch.zeros(4, 1, dtype=torch.int32)}, ValueError, r"key: wanted 4 dims \(pages, page_size, Hk, D\), got 3 dims"),
    ({"num_splits": 4}, triflash.UnsupportedError, "num_splits=4: "),
    ({"cu_seq_k": None}, ValueError, "cu_seq_k: wanted offsets of the keys"),
    ({"key": torch.zeros(22, 2, 8), "value": torch.zeros(22, 2, 8)}, ValueError, "key: wanted query's 4 heads, got 2; enable_gqa=True"),
    ({"key": torch.zeros(22, 3, 8), "value": torch.zeros(22, 3, 8), "enable_gqa": True}, ValueError, "key: wanted a number of heads"),
    ({"value": torch.zeros(21, 4, 8)}, ValueError, "value: wanted shape.*; key and value must share Tk"),
    ({"key": torch.zeros(22, 4, 8).half()}, TypeError, r"key: wanted query's dtype .*; cast with key.to\(query.dtype\)"),
    ({"cu_seq_k": torch.zeros(3, dtype=torch.int32)}, ValueError, "cu_seq_k: wanted as many as cu_seq_q, "),
    ({"cu_seq_q": [0, 13]}, TypeError, "cu_seq_q: wanted an int32 or int64 tensor"),
    ({"max_k": 7.5}, TypeError, "max_k: wanted an integer"),
    ({"window_size": 3}, TypeError, "window_size: wanted a pair"),
    ({"is_causal": 1}, TypeError, "is_causal: wanted True or False"),
    ({"return_aux": True}, TypeError, "return_aux: wanted torch.nn.attention.varlen.AuxRequest"),
])  # fmt: skip
def test_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    cu_q, cu_k = offsets()
    given = {
        "query": torch.zeros(13, 4, 8), "key": torch.zeros(22, 4, 8), "value": torch.zeros(22, 4, 8), "cu_seq_q": cu_q, "cu_seq_k": cu_k,
        "max_q": 7, "max_k": 9,
    }  # fmt: skip
    with pytest.raises(kind, match=message):
        varlen_attn(**(given | change))
