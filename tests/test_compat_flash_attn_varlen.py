"""Packed sequences by ``triflash.compat.flash_attn`` against the dense formula in float64 of each sequence by itself."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from test_compat_flash_attn import CASES, PARAMETERS, drawn, formula
from test_compat_torch_varlen import paged
from triflash import ops_varlen
from triflash.compat import flash_attn as compat
from triflash.compat.flash_attn import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func

CU_Q, CU_K = [0, 5, 5, 12, 13], [0, 7, 9, 13, 22]  # the second has no queries
OFFSETS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
# The parameters of flash_attn 2.8's two passes that packages for ring attention call, and those with a default.
FORWARD = (
    f"q k v {OFFSETS} dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes return_softmax block_table "
    "leftpad_k seqused_k zero_tensors"
)
FORWARD_DEFAULTS = {
    "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None, "return_softmax": False, "block_table": None,
    "leftpad_k": None, "seqused_k": None, "zero_tensors": False,
}  # fmt: skip
BACKWARD = (
    f"dout q k v out softmax_lse dq dk dv {OFFSETS} dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes "
    "deterministic rng_state zero_tensors"
)


def reference(q: Tensor, k: Tensor, v: Tensor, cu_q: list[int], cu_k: list[int], slopes: Tensor | None = None, **options: Any) -> Any:
    """(out, lse) of sequences that own every row, each by the dense formula."""
    outs, lses = [], []
    for b, ((i, m), (j, n)) in enumerate(zip(pairwise(cu_q), pairwise(cu_k), strict=True)):
        own = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
        out, lse = formula(q[None, i:m], k[None, j:n], v[None, j:n], slopes=own, **options)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def offsets(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    return torch.tensor(CU_Q, dtype=torch.int32, device=device), torch.tensor(CU_K, dtype=torch.int32, device=device)


@pytest.mark.parametrize("name", CASES)
def test_against_the_formula_of_each_sequence(name: str) -> None:
    _, _, Hk, options = CASES[name]
    options = {key: torch.rand(4, 4) if key == "alibi_slopes" and x.dim() == 2 else x for key, x in options.items()}
    q, k, v = inputs = drawn((13, 4, 8), (22, Hk, 8), (22, Hk, 8))
    names = {"softmax_scale": "scale", "causal": "causal", "window_size": "window", "softcap": "softcap", "alibi_slopes": "slopes"}
    expected, expected_lse = reference(q, k, v, CU_Q, CU_K, **{names[key]: x for key, x in options.items() if key in names})
    out, lse, nothing = flash_attn_varlen_func(q, k, v, *offsets(), 7, 9, **options, return_attn_probs=True)
    assert nothing is None and lse.shape == (4, 13)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-9, atol=1e-9)
    assert torch.equal(flash_attn_varlen_func(q, k, v, *offsets(), 7, 9, **options), out)
    weights = torch.randn_like(out)
    grads = [torch.autograd.grad((x * weights).sum(), inputs) for x in (out, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_argument_order_by_position() -> None:
    (qkv,) = drawn((13, 3, 2, 8))
    slopes, (cu, _) = torch.tensor([0.5, 0.1]), offsets()
    q, k, v = qkv.detach().unbind(1)
    given = (0.0, 0.4, True, (2, 0), 3.0, slopes, True)
    expected, expected_lse = reference(q, k, v, CU_Q, CU_Q, slopes, scale=0.4, causal=True, window=(2, 0), softcap=3.0)
    results = [
        flash_attn_varlen_func(q, k, v, cu, cu, 7, 7, *given, True, None),
        flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], cu, cu, 7, 7, *given, True),
        flash_attn_varlen_qkvpacked_func(qkv, cu, 7, *given, True),
    ]
    for out, lse, nothing in results:
        assert nothing is None
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-9, atol=1e-9)


def test_signatures() -> None:
    for function, first, more in (
        (flash_attn_varlen_func, f"q k v {OFFSETS}", {"block_table": None}),
        (flash_attn_varlen_kvpacked_func, f"q kv {OFFSETS}", {}),
        (flash_attn_varlen_qkvpacked_func, "qkv cu_seqlens max_seqlen", {}),
    ):
        found = list(inspect.signature(function).parameters.values())
        count = len(first.split())
        assert [each.name for each in found[:count]] == first.split()
        assert all(each.default is inspect.Parameter.empty for each in found[:count])
        assert [(each.name, each.default) for each in found[count:]] == list((PARAMETERS | more).items())
    for function, names, defaults in (
        (compat._flash_attn_varlen_forward, FORWARD, FORWARD_DEFAULTS),
        (compat._flash_attn_varlen_backward, BACKWARD, {"rng_state": None, "zero_tensors": False}),
    ):
        found = inspect.signature(function).parameters
        assert list(found) == names.split()
        assert {name: each.default for name, each in found.items() if each.default is not inspect.Parameter.empty} == defaults


def test_packed_gradients() -> None:
    (qkv,) = drawn((13, 3, 2, 4))
    q, kv = qkv[:, 0].detach().requires_grad_(), qkv[:, 1:].detach().requires_grad_()
    cu, _ = offsets()
    expected = reference(*qkv.unbind(1), CU_Q, CU_Q, causal=True)[0]
    weights = torch.randn_like(expected)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), qkv)
    (mine,) = torch.autograd.grad((flash_attn_varlen_qkvpacked_func(qkv, cu, 7, causal=True) * weights).sum(), qkv)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    dq, dkv = torch.autograd.grad((flash_attn_varlen_kvpacked_func(q, kv, cu, cu, 7, 7, causal=True) * weights).sum(), [q, kv])
    torch.testing.assert_close(torch.cat([dq[:, None], dkv], 1), theirs, rtol=1e-9, atol=1e-9)


def passes(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, cu: tuple[Tensor, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """out, lse, dq, dk and dv by the two functions as ring packages call them: every default by its name, then what they know."""
    known: dict[str, Any] = {
        "q": q, "k": k, "v": v, "cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1], "max_seqlen_q": 7, "max_seqlen_k": 9, "dropout_p": 0.0,
        "softmax_scale": q.shape[-1] ** -0.5, "causal": False, "window_size_left": -1, "window_size_right": -1, "alibi_slopes": None, **options,
    }  # fmt: skip
    out, lse, marks, rng_state = compat._flash_attn_varlen_forward(**(FORWARD_DEFAULTS | known))
    assert marks.numel() == 0 and rng_state.shape == (2,) and rng_state.dtype == torch.int64
    names = {name: torch.full_like(x, torch.nan) for name, x in (("dq", q), ("dk", k), ("dv", v))}
    more = {"softcap": 0.0, "deterministic": False, "rng_state": rng_state, "zero_tensors": False}
    assert compat._flash_attn_varlen_backward(dout=dout, out=out, softmax_lse=lse, **names, **(more | known)) is None
    return out, lse, *names.values()


@pytest.mark.parametrize("backend", ["tiled", "triton"])
@pytest.mark.parametrize("options", [{"causal": True}, {"window_size_left": 2, "window_size_right": 1, "softcap": 2.0}])
def test_forward_and_backward_by_keyword(options: dict[str, Any], backend: str, device: torch.device) -> None:
    q, k, v, dout = (x.detach().to(device) for x in drawn((13, 2, 16), (22, 1, 16), (22, 1, 16), (13, 2, 16), dtype=torch.float32))
    with triflash.backend(backend), triflash.record_launches() as ran:
        found = passes(q, k, v, dout, offsets(device), **options)
    assert all(each.startswith(backend) for each in ran) and len(ran) >= 2
    wide = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    window = (options.get("window_size_left", -1), options.get("window_size_right", -1))
    expected = reference(*wide, CU_Q, CU_K, causal=options.get("causal", False), window=window, softcap=options.get("softcap", 0.0))
    theirs = (*expected, *torch.autograd.grad((expected[0] * dout.cpu().double()).sum(), wide))
    for mine, right in zip(found, theirs, strict=True):
        torch.testing.assert_close(mine.cpu().double(), right, rtol=1e-4, atol=1e-5)


def test_dropout_is_the_same_in_both_passes() -> None:
    q, k, v, dout = (x.detach() for x in drawn((13, 2, 4), (22, 2, 4), (22, 2, 4), (13, 2, 4)))
    torch.manual_seed(5)
    out, _, *grads = passes(q, k, v, dout, offsets(), dropout_p=0.5)
    x = [each.clone().requires_grad_() for each in (q, k, v)]
    torch.manual_seed(5)
    expected = flash_attn_varlen_func(*x, *offsets(), 7, 9, dropout_p=0.5)
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(out, reference(q, k, v, CU_Q, CU_K)[0])
    for mine, theirs in zip(grads, torch.autograd.grad(expected, x, dout), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_ring_of_two() -> None:
    """Two processes with half of every sequence each, as ring-flash-attn's ring_flash_attn_varlen_func calls the passes."""
    lengths, H, D = [6, 2, 10], 2, 8
    cu, half = [0, 6, 8, 18], [0, 3, 4, 9]
    q, k, v = inputs = drawn(*[(18, H, D)] * 3)
    expected, expected_lse = reference(q, k, v, cu, cu, causal=True)
    dout = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, inputs, dout)
    parts = [torch.cat([torch.arange(start, start + n)[r * n // 2 : (r + 1) * n // 2] for start, n in zip(cu, lengths, strict=False)])
             for r in range(2)]  # fmt: skip
    first, second = parts
    given: dict[str, Any] = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor(half, dtype=torch.int32))
    given |= {"max_seqlen_q": 5, "max_seqlen_k": 5, "dropout_p": 0.0, "softmax_scale": D**-0.5}
    with torch.no_grad():
        found = [compat._flash_attn_varlen_forward(q[second], k[own], v[own], causal=own is second, **given) for own in (second, first)]
        lse = torch.logaddexp(found[0][1], found[1][1])
        out = sum(each[0] * (each[1] - lse).exp().mT.unsqueeze(-1) for each in found)
        torch.testing.assert_close(out, expected[second], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(lse, expected_lse[:, second], rtol=1e-9, atol=1e-9)
        more = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None, "deterministic": False}
        lse = lse.mT.contiguous().mT  # as they merge it
        dq = torch.zeros_like(out)
        for own in (first, second):
            dq_part, dk, dv = (torch.full_like(x, torch.nan) for x in (dq, k[own], v[own]))
            compat._flash_attn_varlen_backward(
                dout[second], q[second], k[own], v[own], out, lse, dq_part, dk, dv, causal=own is second, **given, **more
            )
            dq += dq_part
        torch.testing.assert_close(dq, theirs[0][second], rtol=1e-8, atol=1e-9)
        # The last part's keys are seen by nobody else.
        torch.testing.assert_close(dk, theirs[1][second], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(dv, theirs[2][second], rtol=1e-8, atol=1e-9)


def test_keys_that_are_used() -> None:
    q, k, v = (x.detach() for x in drawn((13, 2, 8), (22, 2, 8), (22, 2, 8)))
    used, (cu_q, cu_k) = [3, 1, 0, 9], offsets()
    out, lse, _, _ = compat._flash_attn_varlen_forward(
        q, k, v, cu_q, cu_k, 7, 9, 0.0, None, False, seqused_k=torch.tensor(used, dtype=torch.int32)
    )  # fmt: skip
    keys = torch.cat([torch.arange(start, start + n) for start, n in zip(CU_K, used, strict=False)])
    right = reference(q, k[keys], v[keys], CU_Q, [0, 3, 4, 4, 13])
    torch.testing.assert_close((out, lse), tuple(right), rtol=1e-9, atol=1e-9)


def test_some_gradients_and_more_columns_of_lse() -> None:
    q, k, v, dout = (x.detach() for x in drawn(*[(13, 2, 8)] * 4))
    cu, _ = offsets()
    out, lse, _, _ = compat._flash_attn_varlen_forward(q, k, v, cu, cu, 7, 7, 0.0, None, True)
    wide, dk = torch.full((2, 20), torch.nan, dtype=lse.dtype), torch.full((13, 2, 9), torch.nan, dtype=k.dtype)[..., :8]
    wide[:, :13] = lse
    more = (0.0, None, True, -1, -1, 0.0, None, False)
    compat._flash_attn_varlen_backward(dout, q, k, v, out, wide, None, dk, None, cu, cu, 7, 7, *more)
    leaf = k.clone().requires_grad_()
    (right,) = torch.autograd.grad(reference(q, leaf, v, CU_Q, CU_Q, causal=True)[0], leaf, dout)
    torch.testing.assert_close(dk, right, rtol=1e-8, atol=1e-9)
    assert dk._base is not None and dk._base[..., 8].isnan().all()


def test_compiled() -> None:
    q, k, v, dout = (x.detach() for x in drawn((13, 2, 8), (22, 2, 8), (22, 2, 8), (13, 2, 8), dtype=torch.float32))
    right = passes(q, k, v, dout, offsets(), causal=True)
    got = torch.compile(passes, backend="aot_eager", fullgraph=True)(q, k, v, dout, offsets(), causal=True)
    torch.testing.assert_close(got, right)


@pytest.mark.parametrize("causal", [False, True])
def test_pages(causal: bool) -> None:
    """flash_attn 2.8's arguments by position; pages lie in no order."""
    k, v, k_pages, v_pages, table = paged([n - j for j, n in pairwise(CU_K)])
    q, slopes = torch.randn(13, 4, 8), torch.rand(4, 4)
    given = (7, 9, 0.0, 0.3, causal, (6, 2), 5.0, slopes, False, True, table)
    out, lse, nothing = flash_attn_varlen_func(q, k_pages, v_pages, *offsets(), *given)
    x = [each.double() for each in (q, k, v)]
    right, right_lse = (
        each.float() for each in reference(*x, CU_Q, CU_K, slopes.double(), scale=0.3, causal=causal, window=(6, 2), softcap=5.0)
    )
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, right_lse, rtol=1e-4, atol=1e-5)
    assert nothing is None and flash_attn_varlen_func(q, k_pages, v_pages, *offsets(), *given[:-2], False, table).equal(out)


def call(**change: Any) -> Any:
    x = torch.zeros(13, 2, 8)
    cu, _ = offsets()
    given = {"q": x, "k": x, "v": x, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 7, "max_seqlen_k": 7}
    return flash_attn_varlen_func(**(given | change))


@pytest.mark.parametrize("change, kind, message", [
    ({"block_table": torch.zeros(4, 1, dtype=torch.int32)}, ValueError, r"k: wanted 4 dims \(pages, page_size, Hk, D\), got 3 dims"),
    ({"block_table": torch.zeros(4, 1, dtype=torch.int32), "dropout_p": 0.1}, triflash.UnsupportedError, "dropout_p beside block_table"),
    ({"block_table": torch.zeros(4, 1, dtype=torch.int32), "cu_seqlens_k": None}, TypeError, "cu_seqlens_k: wanted offsets of the keys"),
    ({"causal": "top_left"}, TypeError, "causal: wanted True or False"),
    ({"window_size": 3}, TypeError, "window_size: wanted a pair"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale: wanted a number or None"),
    ({"cu_seqlens_k": torch.zeros(3, dtype=torch.int32)}, ValueError, "cu_seqlens_k: wanted as many as cu_seqlens_q"),
    ({"max_seqlen_q": 7.5}, TypeError, "max_seqlen_q: wanted an integer"),
    ({"return_attn_probs": 1}, TypeError, "return_attn_probs: wanted True or False"),
])  # fmt: skip
def test_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(**change)


def test_bad_input_of_the_others() -> None:
    cu, _ = offsets()
    x, lse = torch.zeros(13, 2, 8), torch.zeros(2, 13)
    with pytest.raises(ValueError, match=r"kv: wanted shape \(Tk=13, 2, Hk, D\)"):
        flash_attn_varlen_kvpacked_func(x, torch.zeros(13, 3, 2, 8), cu, cu, 7, 7)
    with pytest.raises(ValueError, match=r"qkv: wanted shape \(T=13, 3, H, D\)"):
        flash_attn_varlen_qkvpacked_func(torch.zeros(13, 2, 2, 8), cu, 7)
    with pytest.raises(ValueError, match="kv: wanted a number of heads that divides q's 2, got 0"):
        flash_attn_varlen_kvpacked_func(x, torch.zeros(13, 2, 0, 8), cu, cu, 7, 7)
    with pytest.raises(TypeError, match=r"kv: wanted q's dtype .*; cast with kv.to\(q.dtype\)"):
        compat.flash_attn_kvpacked_func(x[None], torch.zeros(1, 13, 2, 2, 8).half())
    with pytest.raises(TypeError, match="qkv: wanted float16"):
        flash_attn_varlen_qkvpacked_func(torch.zeros(13, 3, 2, 8).int(), cu, 7)
    with pytest.raises(TypeError, match="qkv: wanted float16"):
        compat.flash_attn_qkvpacked_func(torch.zeros(1, 13, 3, 2, 8).int())
    with pytest.raises(TypeError, match="cu_seqlens: wanted an int32 or int64 tensor"):
        flash_attn_varlen_qkvpacked_func(torch.zeros(13, 3, 2, 8), [0, 13], 7)
    with pytest.raises(triflash.UnsupportedError, match="leftpad_k: "):
        compat._flash_attn_varlen_forward(x, x, x, cu, cu, 7, 7, 0.0, None, True, leftpad_k=cu)
    with pytest.raises(triflash.UnsupportedError, match="block_table: "):
        compat._flash_attn_varlen_forward(x, x, x, cu, cu, 7, 7, 0.0, None, True, block_table=cu)

    def backward(lse: Tensor = lse, dq: Tensor = x, dropout_p: float = 0.0) -> None:
        grads = (dq, torch.zeros_like(x), torch.zeros_like(x))
        compat._flash_attn_varlen_backward(x, x, x, x, x, lse, *grads, cu, cu, 7, 7, dropout_p, None, True, -1, -1, 0.0, None, False)

    with pytest.raises(ValueError, match="softmax_lse: wanted at least 13 rows, got 12 rows"):
        backward(lse[:, :12])
    with pytest.raises(TypeError, match="softmax_lse: wanted torch.float32"):
        backward(lse.half())
    with pytest.raises(ValueError, match="rng_state: wanted what _flash_attn_varlen_forward returned"):
        backward(dropout_p=0.5)
    with pytest.raises(ValueError, match="dq: wanted memory of its own"):
        backward()
    with pytest.raises(ValueError, match="dq: wanted q's shape"):
        backward(dq=torch.zeros(12, 2, 8))


def operands(dtype: torch.dtype = torch.float32) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of the operator that fills gradients, less these; and its options, causal."""
    q, k, v, dout = (x.detach() for x in drawn((13, 2, 8), (22, 1, 8), (22, 1, 8), (13, 2, 8), dtype=dtype))
    cu_q, cu_k = offsets()
    out, lse, _, _ = compat._flash_attn_varlen_forward(q, k, v, cu_q, cu_k, 7, 9, 0.0, None, True)
    options = (None, 0, True, 8**-0.5, "ieee", "padded", "padded", 0.0, 0.0, False, None, None, "tiled")
    return (dout, out, lse), (q, k, v, *[None] * 5, cu_q, cu_k, *[None] * 3, *options)


def test_the_operator() -> None:
    saved, rest = operands()
    given = [torch.empty_like(x) for x in rest[:3]]
    torch.library.opcheck(ops_varlen.varlen_backward_, (*saved, *given, *rest))
    ops_varlen.varlen_backward_(*saved, *given, *rest)
    leaves = [x.clone().requires_grad_() for x in rest[:3]]
    right = torch.autograd.grad(flash_attn_varlen_func(*leaves, *offsets(), 7, 9, causal=True), leaves, saved[0])
    torch.testing.assert_close(tuple(given), right)
    with pytest.raises(ValueError, match="out: wanted shape"):
        ops_varlen.varlen_backward_(saved[0], saved[1][:5], saved[2], *given, *rest)


def test_flops_of_both_passes() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    saved, rest = operands()
    pairs = 2 * sum(sum(max(0, n - m + i + 1) for i in range(m)) for m, n in ((5, 7), (0, 2), (7, 4), (1, 9)))
    with FlopCounterMode(display=False) as counter:
        ops_varlen.varlen_backward_(*saved, *[torch.empty_like(x) for x in rest[:3]], *rest)
    assert counter.get_total_flops() == pairs * 2 * 5 * 8
    with FlopCounterMode(display=False) as counter:
        ops_varlen.varlen_backward_(*saved, None, torch.empty_like(rest[1]), None, *rest)
    assert counter.get_total_flops() == pairs * 2 * 3 * 8
