"""``triflash.compat.sdpa`` beside PyTorch's own function and the formula in float64, and what the switch does and leaves alone."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils.checkpoint import checkpoint

import triflash
from triflash.compat import sdpa

BUILTIN = F.scaled_dot_product_attention


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, hidden: Tensor | None, scale: float | None = None) -> Tensor:
    """Dense attention whose unseen rows are 0."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    unseen = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(unseen, 0.0).softmax(-1).masked_fill(unseen, 0.0) @ v


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, device: Any = None) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]


def compare(one: Tensor, other: Tensor, inputs: list[Tensor], rtol: float = 1e-9, keep: bool = True) -> None:
    """Values and the gradients of all inputs. keep: the graphs, for another comparison; compiled ones may refuse that."""
    assert one.shape == other.shape and one.dtype == other.dtype
    torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)
    weights = torch.randn_like(one)
    inputs = [x for x in inputs if x.requires_grad]
    grads = [torch.autograd.grad((x * weights).sum(), inputs, retain_graph=keep) for x in (one, other)]
    for mine, theirs, x in zip(*grads, inputs, strict=True):
        assert mine.shape == x.shape
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=rtol)


SHAPES = {
    "4-d": ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 3)),
    "3-d": ((3, 5, 4), (3, 6, 4), (3, 6, 4)),
    "2-d": ((5, 4), (6, 4), (6, 2)),
    "two batch dims": ((2, 2, 3, 5, 4), (2, 2, 3, 6, 4), (2, 2, 3, 6, 4)),
    "keys of one batch entry": ((2, 3, 5, 4), (1, 3, 6, 4), (1, 3, 6, 4)),
    "queries of one batch entry": ((1, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4)),
    "one key head": ((2, 3, 5, 4), (2, 1, 6, 4), (2, 1, 6, 4)),
    "one value head": ((2, 3, 5, 4), (2, 3, 6, 4), (2, 1, 6, 4)),
    "one query head": ((2, 1, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4)),
    "keys of fewer dims": ((2, 3, 5, 4), (3, 6, 4), (6, 4)),
    "no keys": ((2, 3, 5, 4), (2, 3, 0, 4), (2, 3, 0, 4)),
    "more queries than keys": ((2, 3, 7, 4), (2, 3, 4, 4), (2, 3, 4, 4)),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, causal: bool) -> None:
    q, k, v = inputs = drawn(*SHAPES[name])
    out = sdpa.scaled_dot_product_attention(q, k, v, is_causal=causal)
    compare(out, BUILTIN(q, k, v, is_causal=causal), inputs)
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1) if causal else None
    compare(out, formula(q, k, v, None, hidden), inputs)


MASKS = {
    "queries and keys": (5, 6),
    "heads": (3, 5, 6),
    "one per batch entry": (2, 1, 1, 6),
    "full": (2, 3, 5, 6),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float", "float32"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_beside_causal(name: str, kind: str, causal: bool) -> None:
    q, k, v = inputs = drawn((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4))
    mask = (
        torch.randn(MASKS[name]) > -0.3
        if kind == "bool"
        else torch.randn(MASKS[name], dtype=torch.float32 if kind == "float32" else torch.float64)
    )
    if kind != "bool":
        inputs.append(mask.requires_grad_())
    out = sdpa.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=0.7)
    hidden = torch.ones(5, 6, dtype=torch.bool).triu(1) if causal else None
    compare(out, formula(q, k, v, mask, hidden, 0.7), inputs, 1e-6 if kind == "float32" else 1e-9)


def test_rows_without_keys_are_zero() -> None:
    q, k, v = drawn((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4))
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    for given in (mask, torch.zeros(3, 5, dtype=q.dtype).masked_fill(~mask, -torch.inf)):
        out = sdpa.scaled_dot_product_attention(q, k, v, given)
        assert (out[:, :, 1] == 0).all() and (out[:, :, 0] != 0).all()
        compare(out, formula(q, k, v, mask, None), [q, k, v])


@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 1, 1), (4, 2, 4), (6, 2, 3)])
def test_grouped_heads(heads: tuple[int, int, int]) -> None:
    Hq, Hk, Hv = heads
    q, k, v = inputs = drawn((2, Hq, 5, 4), (2, Hk, 6, 4), (2, Hv, 6, 4))
    mask = torch.randn(Hq, 5, 6, dtype=torch.float64, requires_grad=True)
    out = sdpa.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    compare(out, BUILTIN(q, k, v, mask, enable_gqa=True), [*inputs, mask])


@pytest.mark.parametrize("varies", [(True, False, True), (False, True, False), (True, True, False), (False, False, True)])
def test_masks_over_any_of_three_batch_dims(varies: tuple[bool, bool, bool]) -> None:
    batch = (2, 3, 2)
    q, k, v = inputs = drawn(*[(*batch, 2, 4, 3)] * 3)
    shape = tuple(size if on else 1 for size, on in zip(batch, varies, strict=True))
    mask = torch.randn(*shape, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    compare(sdpa.scaled_dot_product_attention(q, k, v, mask), formula(q, k, v, mask, None), [*inputs, mask])


@pytest.mark.parametrize("lengths", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")
def test_causal_biases(lengths: tuple[int, int], is_causal: bool) -> None:
    M, N = lengths
    q, k, v = inputs = drawn((2, 2, M, 4), (2, 2, N, 4), (2, 2, N, 4))
    for bias, diagonal in ((causal_upper_left(M, N), 0), (causal_lower_right(M, N), N - M)):
        hidden = torch.ones(M, N, dtype=torch.bool).triu(1 + min(diagonal, 0 if is_causal else diagonal))
        compare(sdpa.scaled_dot_product_attention(q, k, v, bias, is_causal=is_causal), formula(q, k, v, None, hidden), inputs)
    with pytest.raises(ValueError, match="attn_mask: wanted a CausalBias for"):
        sdpa.scaled_dot_product_attention(q, k, v, causal_upper_left(M + 1, N))


def test_dropout_is_unbiased_and_seeded_by_the_generator() -> None:
    q, k, v = (torch.randn(2, 4, 32, 8) for _ in range(3))
    torch.manual_seed(3)
    one = sdpa.scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    torch.manual_seed(3)
    assert torch.equal(one, sdpa.scaled_dot_product_attention(q, k, v, dropout_p=0.25))
    ones = torch.ones_like(v)
    rows = sdpa.scaled_dot_product_attention(q, k, ones, dropout_p=0.25)
    assert abs(rows.mean() - 1) < 0.05 and rows.std() > 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v, mask = inputs = drawn((2, 3, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8), (3, 9, 9), dtype=dtype, device=device)
    out = sdpa.scaled_dot_product_attention(q, k, v, mask, is_causal=True)
    hidden = torch.ones(9, 9, dtype=torch.bool, device=device).triu(1)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    other = formula(*wide, hidden)
    rtol = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(out.double(), other, rtol=rtol, atol=rtol)
    grads = torch.autograd.grad(out.sum(), inputs)
    for mine, theirs in zip(grads, torch.autograd.grad(other.sum(), wide), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=2 * rtol, atol=2 * rtol)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"key": torch.zeros(2, 3, 6, 5)}, ValueError, "key: wanted query's head dim 4, got 5"),
    ({"value": torch.zeros(2, 3, 5, 4)}, ValueError, "value: wanted as many rows as key has, 6, got 5"),
    ({"key": torch.zeros(2, 2, 6, 4)}, ValueError, "key: wanted 1 or 3 heads, got 2; enable_gqa=True"),
    ({"key": torch.zeros(2, 2, 6, 4), "enable_gqa": True}, ValueError, "key: wanted a number of heads that divides query's 3, got 2"),
    ({"key": torch.zeros(3, 3, 6, 4)}, ValueError, "key: wanted size 1 or 2 in batch dim 0, got 3"),
    ({"attn_mask": torch.zeros(4, 6)}, ValueError, "attn_mask: wanted 2 to 4 dims that broadcast to"),
    ({"attn_mask": torch.zeros(5, 6, dtype=torch.int32)}, TypeError, "attn_mask: wanted float16"),
    ({"query": torch.zeros(4)}, ValueError, "query: wanted 2 dims or more"),
    ({"query": None}, TypeError, "query: wanted a dense tensor, got NoneType"),
    ({"key": torch.zeros(2, 3, 6, 4, dtype=torch.float64)}, TypeError, "key: wanted query's dtype torch.float32, got torch.float64"),
    ({"is_causal": 1}, TypeError, "is_causal: wanted True or False"),
]  # fmt: skip


@pytest.mark.parametrize("change, kind, message", WRONG)
def test_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"query": torch.zeros(2, 3, 5, 4), "key": torch.zeros(2, 3, 6, 4), "value": torch.zeros(2, 3, 6, 4)}
    with pytest.raises(kind, match=message.replace("(", r"\(")):
        sdpa.scaled_dot_product_attention(**(given | change))


# The switch.


def ran_in(function: Any, *args: Any) -> list[str]:
    with triflash.record_launches() as ran:
        function(*args)
    return list(ran)


def test_a_block_replaces_nests_and_restores() -> None:
    q = torch.randn(1, 1, 3, 4)
    call = lambda: F.scaled_dot_product_attention(q, q, q)  # noqa: E731
    assert F.scaled_dot_product_attention is BUILTIN and ran_in(call) == []
    with sdpa.replace():
        assert ran_in(call)
        with pytest.raises(KeyError), sdpa.replace():
            raise KeyError
        assert ran_in(call) and F.scaled_dot_product_attention is not BUILTIN
    assert F.scaled_dot_product_attention is BUILTIN and ran_in(call) == []

    @sdpa.replace()
    def decorated() -> list[str]:
        return ran_in(call)

    assert decorated() and decorated() and F.scaled_dot_product_attention is BUILTIN


def test_other_threads_keep_pytorch() -> None:
    q = torch.randn(1, 1, 3, 4)
    seen: dict[str, list[str]] = {}
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait()
        seen["outside"] = ran_in(lambda: F.scaled_dot_product_attention(q, q, q))
        with sdpa.replace():
            seen["own block"] = ran_in(lambda: F.scaled_dot_product_attention(q, q, q))
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with sdpa.replace():
        inside.set()
        done.wait()
        seen["first"] = ran_in(lambda: F.scaled_dot_product_attention(q, q, q))
    thread.join()
    assert seen["outside"] == [] and seen["own block"] and seen["first"]
    assert F.scaled_dot_product_attention is BUILTIN


def test_whoever_replaced_it_meanwhile_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 1, 3, 4)
    with sdpa.replace():
        ours = F.scaled_dot_product_attention
        theirs = functools.partial(ours)
        monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
    assert F.scaled_dot_product_attention is theirs
    assert ran_in(lambda: F.scaled_dot_product_attention(q, q, q)) == []
    with sdpa.replace():
        assert ran_in(lambda: F.scaled_dot_product_attention(q, q, q))
    assert F.scaled_dot_product_attention is theirs
    monkeypatch.setattr(F, "scaled_dot_product_attention", BUILTIN)


def test_what_it_cannot_do_pytorch_does_and_is_told_once() -> None:
    class Own(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                return ("theirs", func) if func is BUILTIN else func(*args, **(kwargs or {}))

    sdpa._told.clear()
    q = torch.randn(1, 1, 3, 4)
    with sdpa.replace(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert F.scaled_dot_product_attention(q.as_subclass(Own), q, q) == ("theirs", BUILTIN)
            with torch.autograd.forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
                dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
                out = F.scaled_dot_product_attention(dual, q, q)
                assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None
            with pytest.raises(RuntimeError):  # PyTorch's own words for what neither can do
                F.scaled_dot_product_attention(q, q[..., :3], q)
    messages = [str(each.message) for each in caught if "triflash" in str(each.message)]
    assert len(messages) == 3 and all("PyTorch's scaled_dot_product_attention computes this call" in each for each in messages)
    assert "__torch_function__" in messages[0] and "forward-mode" in messages[1] and "head dim" in messages[2]


MODULES: dict[str, Any] = {
    "MultiheadAttention": lambda: (nn.MultiheadAttention(8, 2, batch_first=True), 3),
    "TransformerEncoderLayer": lambda: (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 1),
    "TransformerDecoderLayer": lambda: (nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2),
}


def test_weights_that_are_asked_for_are_pytorchs_to_compute() -> None:
    """What docs/migration.md lists as not reached; and nothing but that keyword decides."""
    module, x = nn.MultiheadAttention(8, 2, batch_first=True).train(), torch.randn(2, 5, 8)
    with sdpa.replace():
        assert ran_in(lambda: module(x, x, x)) == [] and module(x, x, x)[1].shape == (2, 5, 5)
        assert ran_in(lambda: module(x, x, x, need_weights=False)) == ["tiled: forward"]


@pytest.mark.parametrize("how", ["plain", "causal", "padding", "float mask"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_of_pytorch(name: str, how: str) -> None:
    module, count = MODULES[name]()
    module.double().train()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    prefix = {1: "src_", 2: "tgt_", 3: "attn_"}[count]
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    options: dict[str, Any] = {} if count < 3 else {"need_weights": False}
    if how == "causal":
        options |= {prefix + "mask": causal, "tgt_is_causal" if count == 2 else "is_causal": True}
    elif how == "padding":
        options["key_padding_mask" if count == 3 else prefix + "key_padding_mask"] = padding
    elif how == "float mask":
        options[prefix + "mask"] = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)

    def run() -> Tensor:
        out = module(*[x] * count, **options)
        return out[0] if isinstance(out, tuple) else out

    expected = run()
    with sdpa.replace():
        assert ran_in(run).count("tiled: forward") == (2 if count == 2 else 1)
        out = run()
    learned = [each for each in options.values() if isinstance(each, Tensor) and each.requires_grad]
    compare(out, expected, [x, *module.parameters(), *learned])


def test_a_checkpointed_layer_is_run_again_by_the_same_function(device: torch.device) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).to(device)
    x = torch.randn(2, 5, 8, device=device, requires_grad=True)
    layer(x).sum().backward()
    expected = x.grad.clone()
    x.grad = None
    with sdpa.replace():
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


def test_the_switch_reaches_the_threads_of_a_backward_pass() -> None:
    """As on a GPU, where layers that are checkpointed run again on autograd's own threads: deep nesting takes others on a CPU, too."""
    program = """
import os, threading, torch
from triflash.compat import sdpa

class Deep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, depth):
        ctx.depth = depth
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        seen.add((threading.get_ident() == main, sdpa._active()))
        if ctx.depth:
            with torch.enable_grad():
                Deep.apply(torch.zeros(1, requires_grad=True), ctx.depth - 1).sum().backward()
        return grad, None

main = threading.get_ident()
for block in (sdpa.replace, torch.enable_grad):
    seen = set()
    with block():
        Deep.apply(torch.zeros(1, requires_grad=True), 65).sum().backward()
    print(sorted(seen), flush=True)
os._exit(0)  # PyTorch does not join such threads
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.splitlines() == ["[(False, True), (True, True)]", "[(False, False), (True, False)]"], run.stderr


@pytest.mark.unpoisoned
def test_compiled() -> None:
    def step(q: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    q, mask = torch.randn(1, 2, 5, 4, requires_grad=True), torch.randn(2, 5, 5, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with sdpa.replace():
        expected = step(q, mask)
        with triflash.record_launches() as ran:
            out = compiled(q, mask)
        compare(out, expected, [q, mask], 1e-5, keep=False)
        assert "tiled: forward" in ran
    assert ran_in(compiled, q, mask) == []  # guarded: PyTorch's own again


@pytest.mark.unpoisoned
def test_compiled_with_symbolic_sizes_and_grouped_heads() -> None:
    compiled = torch.compile(sdpa.scaled_dot_product_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for B, M, N in ((2, 5, 6), (3, 7, 4)):
        q, k = drawn((B, 4, M, 8), (B, 2, N, 8))
        out = compiled(q, k, k, is_causal=True, enable_gqa=True)
        compare(out, BUILTIN(q, k, k, is_causal=True, enable_gqa=True), [q, k], keep=False)


@pytest.mark.unpoisoned
def test_compiled_with_symbolic_sizes_beside_known_ones() -> None:
    def attend(q: Tensor) -> Tensor:
        k, v = torch.ones(3, 4, 5, 8, dtype=q.dtype), torch.ones(3, 1, 5, 8, dtype=q.dtype)
        return sdpa.scaled_dot_product_attention(q, k, v)

    (q,) = drawn((3, 4, 5, 8))
    torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)(q), attend(q))
