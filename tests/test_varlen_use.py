"""``attention_varlen`` as it is used: compiled, exported, under transforms and autocast, captured in a graph, given what is wrong.

What it computes is in ``test_varlen.py``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import triflash
from triflash import UnsupportedError, attention_varlen

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def everything(*x: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, bias, sink, cu = x
    result = attention_varlen(q, k, v, cu, causal=True, bias=bias, sink=sink, return_lse=True)
    assert isinstance(result, tuple)
    return result


def some_inputs() -> tuple[list[Tensor], Tensor]:
    leaves = [torch.randn(22, 2, 16) for _ in range(3)] + [torch.randn(1, 2, 8, 8), torch.randn(2)]
    return [x.to(DEVICE).requires_grad_() for x in leaves], torch.tensor([0, 5, 5, 12, 20], dtype=torch.int32, device=DEVICE)


def gradients(result: tuple[Tensor, Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    out, lse = result
    return torch.autograd.grad(out.square().sum() + lse.masked_fill(lse == -math.inf, 0.0).sin().sum(), leaves)


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_compiled(dynamic: bool | None) -> None:
    torch.compiler.reset()
    leaves, cu = some_inputs()
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for got, right in zip(gradients(compiled(*leaves, cu), leaves), gradients(everything(*leaves, cu), leaves), strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("layout", ["padded", "rows", "keys"])
@pytest.mark.parametrize("seed", [None, 3])
def test_one_graph_for_any_number_of_sequences(seed: int | None, layout: str) -> None:
    """From the second number on a graph has none: of one for each, PyTorch would soon have too many. By the operator, and traced (a seed)."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(q: Tensor, cu: Tensor, bias: Tensor) -> Any:
        return attention_varlen(
            q,
            q,
            q,
            cu,
            seqused_k=cu[1:] - cu[:-1],
            bias=bias,
            bias_layout=layout,
            dropout_p=0.0 if seed is None else 0.1,
            dropout_seed=seed,
        )

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for B in (2, 3, 5, 6):
        T = 7 * B
        bias = torch.randn({"padded": (B, 1, 7, 7), "rows": (2, T, 7), "keys": (2, T)}[layout], device=DEVICE)
        q, cu = torch.randn(T, 2, 16, device=DEVICE), 7 * torch.arange(B + 1, device=DEVICE)
        torch.testing.assert_close(compiled(q, cu, bias), function(q, cu, bias))
    assert counter.frame_count <= 2


def test_exported() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, cu: Tensor) -> Tensor:
            out = attention_varlen(q, q, q, cu, causal=True)
            assert isinstance(out, Tensor)
            return out

    (q, *_), cu = some_inputs()
    program = torch.export.export(Module(), (q.detach(), cu))
    torch.testing.assert_close(program.module()(q.detach(), cu), attention_varlen(q.detach(), q.detach(), q.detach(), cu, causal=True))


def test_transforms() -> None:
    leaves, cu = some_inputs()
    right = gradients(everything(*leaves, cu), leaves)
    given = [x.detach() for x in leaves]

    def loss(*x: Tensor) -> Tensor:
        out, lse = everything(*x, cu)
        return out.square().sum() + lse.masked_fill(lse == -math.inf, 0.0).sin().sum()

    for got, wanted in zip(torch.func.grad(loss, argnums=tuple(range(5)))(*given), right, strict=True):
        torch.testing.assert_close(got, wanted)
    q, *others = given
    many = torch.stack([q, 2 * q])
    got = torch.func.vmap(lambda q: everything(q, *others, cu)[0])(many)
    torch.testing.assert_close(got, torch.stack([everything(x, *others, cu)[0] for x in many]))
    with pytest.raises(UnsupportedError, match="forward-mode"):
        torch.func.jvp(lambda q: everything(q, *others, cu)[0], (q,), (q,))
    first = torch.autograd.grad(everything(*leaves, cu)[0].square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(UnsupportedError, match="second derivative"):
        torch.autograd.grad(first.sum(), leaves[0])


def test_saved_tensors_on_the_cpu() -> None:
    leaves, cu = some_inputs()
    right = gradients(everything(*leaves, cu), leaves)
    with torch.autograd.graph.save_on_cpu():
        result = everything(*leaves, cu)
    for got, wanted in zip(gradients(result, leaves), right, strict=True):
        torch.testing.assert_close(got, wanted)


def test_autocast() -> None:
    (q, k, v, bias, _), cu = some_inputs()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = attention_varlen(q, k, v, cu, bias=bias)
    assert isinstance(out, Tensor) and out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.float().sum(), v)
    assert grad.dtype == torch.float32


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    (q, k, v, *_), cu = some_inputs()
    pairs = sum(n * (n + 1) // 2 for n in (5, 0, 7, 8))
    with FlopCounterMode(display=False) as counter:
        attention_varlen(q, k, v, cu, causal=True).sum().backward()
    assert counter.get_total_flops() == 3.5 * 2 * pairs * 2 * 2 * 16


CU = torch.tensor([0, 5, 12, 20], dtype=torch.int32)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"cu_seqlens_q": CU.float()}, "cu_seqlens_q: wanted an int32 or int64 tensor"),
    ({"cu_seqlens_q": CU.to(torch.int16)}, "cu_seqlens_q: wanted an int32 or int64 tensor"),
    ({"cu_seqlens_q": [0, 5]}, "cu_seqlens_q: wanted an int32 or int64 tensor"),
    ({"cu_seqlens_q": CU[None]}, "cu_seqlens_q: wanted one number more"),
    ({"cu_seqlens_q": CU[:0]}, "cu_seqlens_q: wanted one number more"),
    ({"cu_seqlens_k": CU[:-1]}, "cu_seqlens_k: wanted as many as cu_seqlens_q"),
    ({"k": torch.randn(22, 2, 8)}, "k: wanted shape"),
    ({"k": torch.randn(22, 3, 16), "v": torch.randn(22, 3, 16)}, "k: wanted a number of heads"),
    ({"q": torch.randn(1, 22, 2, 16)}, "q: wanted 3 dims"),
    ({"bias": torch.randn(2, 2, 8, 8)}, "bias: wanted .B=3.1, H=2.1, Mmax.1, Nmax.1."),
    ({"bias": torch.randn(2, 8, 8), "bias_layout": "rows"}, "bias: wanted .H=2.1, Tq=22, Nmax.1."),
    ({"bias": torch.randn(2, 8), "bias_layout": "keys"}, "bias: wanted .H=2.1, Tk=22."),
    ({"bias": torch.randn(1, 1, 8, 8), "bias_layout": "columns"}, "bias_layout: wanted one of padded, rows, keys"),
    ({"mask": torch.ones(1, 1, 8, 8)}, "mask: wanted a bool tensor"),
    ({"mask": torch.ones(1, 1, 8, 8, dtype=torch.bool), "mask_layout": "x"}, "mask_layout: wanted one of"),
    ({"max_seqlen_q": 2.5}, "max_seqlen_q: wanted an integer"),
    ({"seqused_k": torch.ones(3)}, "seqused_k: wanted a tensor of integers"),
    ({"seqused_q": torch.ones(4, dtype=torch.int32)}, "seqused_q: wanted one for each"),
    ({"backend": "hopper"}, "sm90"),
    ({"sink": torch.randn(3)}, "sink: wanted"),
    ({"alibi_slopes": torch.randn(2, 2)}, "alibi_slopes: wanted"),
    ({"window": (1,)}, "window: wanted"),
    ({"causal": 1}, "causal: wanted"),
    ({"dropout_p": 1.0}, "dropout_p: wanted"),
    ({"return_lse": 1}, "return_lse: wanted"),
]


@pytest.mark.parametrize("bad, words", BAD)
def test_bad_input_is_named(bad: dict[str, Any], words: str) -> None:
    q = torch.randn(22, 2, 16)
    given = {"q": q, "k": q, "v": q, "cu_seqlens_q": CU} | bad
    for _ in range(2):
        with pytest.raises((TypeError, ValueError, UnsupportedError), match=words):
            attention_varlen(**given)


@pytest.mark.parametrize(
    "offsets, options, words",
    [
        ([1, 5], {}, "cu_seqlens_q: wanted 0 as the first offset, got 1"),
        ([0, 5, 3], {}, "cu_seqlens_q: wanted offsets that do not decrease, got 5 before 3, sequence 1"),
        ([0, 30], {}, "cu_seqlens_q: wanted offsets up to the 22 rows, got 30"),
        ([0, 9, 22], {"seqused_q": torch.tensor([10, 1])}, "seqused_q: wanted 0 to the 9 rows of sequence 0, got 10"),
        ([0, 9, 22], {"bias": torch.zeros(1, 2, 13, 12)}, "bias: wanted 13 or more in dim -1"),
        ([0, 9, 22], {"mask": torch.ones(2, 2, 12, 13, dtype=torch.bool)}, "mask: wanted 13 or more in dim -2"),
    ],
)
def test_offsets_are_checked_if_you_ask(offsets: list[int], options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, cu = torch.randn(22, 2, 16), torch.tensor(offsets)
    attention_varlen(q, q, q, cu, **options)
    monkeypatch.setenv("TRIFLASH_CHECK", "1")
    attention_varlen(q, q, q, torch.tensor([0, 9, 22]))
    with pytest.raises(ValueError, match=words):
        attention_varlen(q, q, q, cu, **options)


@pytest.mark.skipif(not GPU, reason="a CPU waits for nobody")
def test_the_host_never_waits() -> None:
    leaves, cu = some_inputs()
    gradients(everything(*leaves, cu), leaves)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = everything(*leaves, cu)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not GPU, reason="CUDA graphs")
def test_one_graph_for_all_offsets() -> None:
    """Captured once, replayed with other offsets: the bits of eager calls."""
    (q, k, v, bias, sink), cu = some_inputs()
    leaves = [q, k, v, bias, sink]

    def step() -> tuple[Tensor, ...]:
        out, lse = everything(q, k, v, bias, sink, cu)
        return out, lse, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for offsets in ([0, 5, 5, 12, 20], [0, 1, 2, 3, 4], [0, 22, 22, 22, 22], [0, 8, 16, 16, 20]):
        cu.copy_(torch.tensor(offsets, dtype=torch.int32))
        graph.replay()
        for got, right in zip(captured, step(), strict=True):
            assert torch.equal(got, right)
    on_cpu = cu.cpu()
    with pytest.raises(ValueError, match="while a CUDA graph is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        attention_varlen(q, k, v, on_cpu)


def test_what_runs_is_told() -> None:
    leaves, cu = some_inputs()
    with triflash.record_launches() as ran:
        gradients(everything(*leaves, cu), leaves)
    if not GPU:
        assert ran == ["tiled: forward", "tiled: backward"]
        return
    kernels = [line.split()[1] for line in ran]
    assert kernels[:4] == ["extents", "tiles", "forward", "unowned"]
    assert set(kernels[4:]) == {"extents", "tiles", "delta", "cleared", "dkdv", "dq", "unowned", "packed_dbias", "dbias_sum"}


def test_an_argument_given_twice_is_told_of_the_function_that_was_called() -> None:
    q, offsets = torch.randn(7, 2, 16), torch.tensor([0, 3, 7], dtype=torch.int32)
    for more in ({}, {"window": (2, 0)}):
        with pytest.raises(TypeError, match=r"^attention_varlen\(\) got multiple values for argument 'cu_seqlens_q'"):
            attention_varlen(q, q, q, offsets, cu_seqlens_q=offsets, **more)
