"""``triflash.compat.flash_attn`` against the formula in float64, as flash_attn 2.8 documents it, and as packages around it call it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from triflash.compat import flash_attn as compat
from triflash.compat.flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func

# The parameters of flash_attn 2.8's functions behind their tensors, with their defaults.
PARAMETERS = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0, "alibi_slopes": None,
    "deterministic": False, "return_attn_probs": False,
}  # fmt: skip
FORWARD = "q k v dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes return_softmax"
BACKWARD = (
    "dout q k v out softmax_lse dq dk dv dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes "
    "deterministic rng_state"
)


def formula(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False, window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse), dense, from the words of flash_attn's docstrings; rows that see nothing: 0 and −inf."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(groups, 1), v.transpose(1, 2).repeat_interleave(groups, 1)
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    M, N = s.shape[-2:]
    at, j = torch.arange(M)[:, None] + N - M, torch.arange(N)[None, :]
    if slopes is not None:
        slopes = slopes.double().reshape(-1, slopes.shape[-1], 1, 1)
        s = s - slopes * (at - j).abs()
    left, right = window
    if causal:
        right = 0
    hidden = torch.zeros(M, N, dtype=torch.bool)
    if left >= 0:
        hidden |= j < at - left
    if right >= 0:
        hidden |= j > at + right
    s = s.masked_fill(hidden, -torch.inf)
    unseen = hidden.all(-1, keepdim=True)
    lse = s.masked_fill(unseen, 0.0).logsumexp(-1, keepdim=True)
    out = (s - lse).exp().masked_fill(unseen, 0.0) @ v
    return out.transpose(1, 2), lse.masked_fill(unseen, -torch.inf).squeeze(-1)


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {  # queries, keys, key heads, options
    "plain": (5, 7, 4, {}),
    "grouped": (5, 7, 2, {"softmax_scale": 0.3}),
    "causal": (5, 7, 4, {"causal": True}),
    "causal, rows without keys": (7, 4, 1, {"causal": True}),
    "window": (6, 9, 4, {"window_size": (2, 1)}),
    "open to the left": (6, 9, 4, {"window_size": (-1, 1)}),
    "open to the right": (9, 6, 4, {"window_size": (1, -1)}),
    "causal window": (9, 9, 2, {"causal": True, "window_size": (3, 5)}),
    "soft cap": (5, 7, 4, {"softcap": 1.5}),
    "no soft cap": (5, 7, 4, {"softcap": -1.0}),
    "alibi": (5, 7, 4, {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0])}),
    "alibi of each entry": (7, 7, 2, {"alibi_slopes": torch.rand(2, 4), "causal": True, "deterministic": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_formula(name: str) -> None:
    M, N, Hk, options = CASES[name]
    q, k, v = inputs = drawn((2, M, 4, 8), (2, N, Hk, 8), (2, N, Hk, 8))
    expected, expected_lse = formula(
        q, k, v, options.get("softmax_scale"), options.get("causal", False), options.get("window_size", (-1, -1)),
        options.get("softcap", 0.0), options.get("alibi_slopes"),
    )  # fmt: skip
    out, lse, nothing = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert nothing is None and lse.shape == (2, 4, M)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-9, atol=1e-9)
    assert torch.equal(flash_attn_func(q, k, v, **options), out)
    weights = torch.randn_like(out)
    grads = [torch.autograd.grad((x * weights).sum(), inputs) for x in (out, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_argument_order_by_position() -> None:
    q, k, v = drawn((2, 6, 2, 8), (2, 6, 2, 8), (2, 6, 2, 8))
    slopes = torch.tensor([0.5, 0.1])
    given = (0.0, 0.4, True, (2, 0), 3.0, slopes, True)
    expected, expected_lse = formula(q, k, v, 0.4, True, (2, 0), 3.0, slopes)
    results = [
        flash_attn_func(q, k, v, *given, True),
        flash_attn_kvpacked_func(q, torch.stack([k, v], 2), *given, True),
        flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), *given, True),
    ]
    for out, lse, nothing in results:
        assert nothing is None
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("function, tensors", [(flash_attn_func, 3), (flash_attn_kvpacked_func, 2), (flash_attn_qkvpacked_func, 1)])
def test_signatures(function: Any, tensors: int) -> None:
    found = list(inspect.signature(function).parameters.values())
    assert [each.name for each in found[:tensors]] == {3: ["q", "k", "v"], 2: ["q", "kv"], 1: ["qkv"]}[tensors]
    assert {each.name: each.default for each in found[tensors:]} == PARAMETERS
    assert list(inspect.signature(compat._flash_attn_forward).parameters) == FORWARD.split()
    assert list(inspect.signature(compat._flash_attn_backward).parameters) == BACKWARD.split()


def test_packed_gradients() -> None:
    (qkv,) = drawn((2, 5, 3, 2, 4))
    q, kv = qkv[:, :, 0].detach().requires_grad_(), qkv[:, :, 1:].detach().requires_grad_()
    expected = formula(*qkv.unbind(2), causal=True)[0]
    weights = torch.randn_like(expected)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), qkv)
    (mine,) = torch.autograd.grad((flash_attn_qkvpacked_func(qkv, causal=True) * weights).sum(), qkv)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    dq, dkv = torch.autograd.grad((flash_attn_kvpacked_func(q, kv, causal=True) * weights).sum(), [q, kv])
    torch.testing.assert_close(torch.cat([dq[:, :, None], dkv], 2), theirs, rtol=1e-9, atol=1e-9)


def test_deterministic_false_leaves_pytorchs_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(compat, "attention", lambda *_, **options: seen.append(options["deterministic"]))
    q = torch.zeros(1, 2, 1, 4)
    flash_attn_func(q, q, q)
    flash_attn_func(q, q, q, deterministic=True)
    assert seen == [None, True]


def passes(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dropout_p: float = 0.0, **options: Any) -> tuple[Tensor, ...]:
    """out, lse, dq, dk and dv by the two functions that ring packages call, as they do."""
    given: dict[str, Any] = {
        "dropout_p": dropout_p, "softmax_scale": q.shape[-1] ** -0.5, "causal": False, "window_size_left": -1, "window_size_right": -1,
        "softcap": 0.0, "alibi_slopes": None, **options,
    }  # fmt: skip
    out, lse, marks, rng_state = compat._flash_attn_forward(q=q, k=k, v=v, **given, return_softmax=dropout_p > 0)
    assert marks.numel() == 0 and rng_state.shape == (2,) and rng_state.dtype == torch.int64
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    names = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    assert compat._flash_attn_backward(
        dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse, **names, **given, deterministic=False, rng_state=rng_state
    ) is None  # fmt: skip
    return out, lse, *grads


@pytest.mark.parametrize("backend", ["tiled", "triton"])
@pytest.mark.parametrize("options", [
    {"causal": True}, {"window_size_left": 2, "window_size_right": 1, "softcap": 2.0}, {"alibi_slopes": torch.tensor([0.5, 0.1])},
])  # fmt: skip
def test_forward_and_backward_by_keyword(options: dict[str, Any], backend: str, device: torch.device) -> None:
    q, k, v, dout = (x.detach().to(device) for x in drawn((2, 6, 2, 16), (2, 9, 1, 16), (2, 9, 1, 16), (2, 6, 2, 16), dtype=torch.float32))
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    with triflash.backend(backend), triflash.record_launches() as ran:
        found = passes(q, k, v, dout, **options)
    assert all(each.startswith(backend) for each in ran) and len(ran) >= 2
    wide = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    window = (options.get("window_size_left", -1), options.get("window_size_right", -1))
    slopes = options["alibi_slopes"].cpu() if "alibi_slopes" in options else None
    out, lse = formula(*wide, None, options.get("causal", False), window, options.get("softcap", 0.0), slopes)
    expected = (out, lse, *torch.autograd.grad((out * dout.cpu().double()).sum(), wide))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.cpu().double(), theirs, rtol=1e-4, atol=1e-5)


def test_dropout_is_the_same_in_both_passes() -> None:
    q, k, v, dout = (x.detach() for x in drawn(*[(1, 8, 2, 4)] * 4))
    torch.manual_seed(5)
    out, _, *grads = passes(q, k, v, dout, dropout_p=0.5)
    x = [each.clone().requires_grad_() for each in (q, k, v)]
    torch.manual_seed(5)
    expected = flash_attn_func(*x, dropout_p=0.5)
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(out, formula(q, k, v)[0])
    for mine, theirs in zip(grads, torch.autograd.grad(expected, x, dout), strict=True):
        torch.testing.assert_close(mine, theirs)
    with pytest.raises(ValueError, match="rng_state: wanted what _flash_attn_forward returned"):
        compat._flash_attn_backward(dout, q, k, v, out, out, None, None, None, 0.5, None, False, -1, -1, 0.0, None, False)


def test_a_ring_of_two() -> None:
    """Keys in two parts: results merged by lse, and gradients of each part from out and lse over all of them."""
    q, k, v = inputs = drawn((1, 6, 4, 8), (1, 6, 2, 8), (1, 6, 2, 8))
    expected, expected_lse = formula(q, k, v, causal=True)
    dout = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, inputs, dout)
    scale, plain = 8**-0.5, (-1, -1, 0.0, None)
    second = slice(3, 6)  # the second process: its queries see its own keys causally, and all of the first's
    with torch.no_grad():
        own = compat._flash_attn_forward(q[:, second], k[:, second], v[:, second], 0.0, scale, True, *plain, False)
        other = compat._flash_attn_forward(q[:, second], k[:, :3], v[:, :3], 0.0, scale, False, *plain, False)
        lse = torch.logaddexp(own[1], other[1])
        out = sum(each[0] * (each[1] - lse).exp().mT.unsqueeze(-1) for each in (own, other))
        torch.testing.assert_close(out, expected[:, second], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(lse, expected_lse[:, :, second], rtol=1e-9, atol=1e-9)
        dq = torch.zeros_like(q[:, second])
        for causal, part in ((True, second), (False, slice(0, 3))):
            dq_part, dk, dv = torch.empty_like(dq), torch.empty_like(k[:, part]), torch.empty_like(v[:, part])
            compat._flash_attn_backward(
                dout[:, second], q[:, second], k[:, part], v[:, part], out, lse, dq_part, dk, dv, 0.0, scale, causal, *plain, False
            )  # fmt: skip
            dq += dq_part
        torch.testing.assert_close(dq, theirs[0][:, second], rtol=1e-8, atol=1e-9)
        # The last part's keys are seen by nobody else.
        compat._flash_attn_backward(
            dout[:, second], q[:, second], k[:, second], v[:, second], out, lse, None, dk, dv, 0.0, scale, True, *plain, False
        )  # fmt: skip
        torch.testing.assert_close(dk, theirs[1][:, second], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(dv, theirs[2][:, second], rtol=1e-8, atol=1e-9)


def call(**change: Any) -> Any:
    given: dict[str, Any] = {"q": torch.zeros(1, 4, 2, 8), "k": torch.zeros(1, 4, 2, 8), "v": torch.zeros(1, 4, 2, 8)}
    return flash_attn_func(**(given | change))


@pytest.mark.parametrize("change, kind, message", [
    ({"k": torch.zeros(1, 4, 3, 8), "v": torch.zeros(1, 4, 3, 8)}, ValueError, "k: wanted a number of heads that divides q's 2, got 3"),
    ({"causal": "top_left"}, TypeError, "causal: wanted True or False"),
    ({"window_size": 3}, TypeError, "window_size: wanted a pair"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale: wanted a number or None"),
    ({"deterministic": None}, TypeError, "deterministic: wanted True or False"),
    ({"alibi_slopes": torch.zeros(3)}, ValueError, "alibi_slopes: wanted one for each head"),
])  # fmt: skip
def test_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(**change)
    with pytest.raises(ValueError, match=r"kv: wanted shape \(B, N, 2, Hk, D\)|kv: wanted"):
        flash_attn_kvpacked_func(torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 3, 2, 8))
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="softmax_lse: wanted at least 4 rows"):
        compat._flash_attn_backward(q, q, q, q, q, torch.zeros(1, 2, 3), q, q, q, 0.0, None, False, -1, -1, 0.0, None, False)


@pytest.fixture
def installed() -> Iterator[None]:
    compat.install()
    yield
    compat.uninstall()


@pytest.mark.skipif(
    "flash_attn" not in sys.modules and __import__("importlib.util").util.find_spec("flash_attn") is not None,
    reason="flash_attn is installed",
)
def test_import_flash_attn(installed: None) -> None:
    import flash_attn
    from flash_attn import flash_attn_func as imported
    from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward, _flash_attn_varlen_forward

    compat.install()  # again: nothing
    assert flash_attn.__version__ == "2.8.3+triflash" and imported is flash_attn_func
    assert _flash_attn_forward is compat._flash_attn_forward and _flash_attn_backward is compat._flash_attn_backward
    assert _flash_attn_varlen_forward is compat._flash_attn_varlen_forward
    assert flash_attn.flash_attn_varlen_func is compat.flash_attn_varlen_func
    assert flash_attn.flash_attn_with_kvcache is flash_attn.flash_attn_interface.flash_attn_with_kvcache is compat.flash_attn_with_kvcache
    with pytest.raises(ImportError, match=r"flash_attn_no_such.*triflash"):
        from flash_attn import flash_attn_no_such  # noqa: F401
    with pytest.raises(ImportError):
        import flash_attn.bert_padding
    compat.uninstall()
    with pytest.raises(ImportError):
        import flash_attn.flash_attn_interface
    compat.uninstall()


def test_another_flash_attn_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    other = type(sys)("flash_attn")
    other.__version__ = "2.8.3"
    monkeypatch.setitem(sys.modules, "flash_attn", other)
    with pytest.raises(ImportError, match="flash_attn is installed"):
        compat.install()
    compat.uninstall()
    assert sys.modules["flash_attn"] is other


def test_transformers_goes_on_not_finding_it() -> None:
    pytest.importorskip("transformers")
    program = """
from triflash.compat import flash_attn
flash_attn.install()
from transformers.utils import is_flash_attn_2_available
print(is_flash_attn_2_available())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr


def test_a_window_that_is_open_by_no_integers_is_refused() -> None:
    q = torch.randn(1, 5, 2, 16)
    for window in ((-1.0, -1), (-1, "-1"), [-1.0, -1], torch.tensor([-1, -1]), (-1, -1, -1)):
        with pytest.raises((TypeError, ValueError), match="^window_size: wanted"):
            flash_attn_func(q, q, q, window_size=window)  # type: ignore[arg-type]
