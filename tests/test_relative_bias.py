"""``triflash.nn.RelativeBias`` against T5's and Swin's formulas, its table's gradient against nn.Embedding's, and bit for bit."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import triflash
from ranks import without_group
from triflash.nn import RelativeBias


def t5_bucket(distance: int, buckets: int, max_distance: int, bidirectional: bool) -> int:
    """T5's rule for key minus query, one number at a time, in the float32 that its code computes in."""
    row = 0
    if bidirectional:
        buckets //= 2
        row, near = (buckets if distance > 0 else 0), abs(distance)
    else:
        near = max(-distance, 0)
    exact = buckets // 2
    if near < exact:
        return row + near
    scaled = torch.log(torch.tensor(near / exact, dtype=torch.float32)) / math.log(max_distance / exact) * (buckets - exact)
    return row + min(exact + int(scaled), buckets - 1)


def swin_index(height: int, width: int) -> Tensor:
    """Rows of Swin's table for each pair of positions of a window."""
    y, x = (each.flatten() for each in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    return (y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1


def embedded(weight: Tensor, index: Tensor) -> Tensor:
    """The bias by nn.Embedding of every pair's row, as models do it."""
    return nn.functional.embedding(index, weight).permute(2, 0, 1)[None]


T5: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {  # options; queries, keys, first_query
    "defaults": ({}, (40, 40, 0)),
    "far beyond the last distance": ({}, (5, 300, 0)),
    "causal": ({"bidirectional": False}, (40, 40, 0)),
    "few buckets": ({"buckets": 8, "max_distance": 20}, (33, 17, 0)),
    "few causal buckets": ({"buckets": 4, "max_distance": 7, "bidirectional": False}, (9, 21, 0)),
    "one query of a cache": ({}, (1, 150, 149)),
    "some queries of a cache": ({"bidirectional": False}, (3, 150, 147)),
    "one key": ({}, (50, 1, 0)),
    "odd": ({"buckets": 10, "max_distance": 11}, (12, 13, 4)),
    "queries far behind all keys": ({"buckets": 8, "max_distance": 9}, (3, 5, 10**12)),
    "queries far before all keys": ({"buckets": 8, "max_distance": 9}, (3, 5, -(10**12))),
    "queries before all keys, one of them far": ({"buckets": 8, "max_distance": 9}, (4, 5, -7)),
}


@pytest.mark.parametrize("name", T5)
def test_t5(name: str, device: torch.device) -> None:
    options, (M, N, first) = T5[name]
    module = RelativeBias(3, **options, device=device, dtype=torch.float64)
    rule = (module.weight.shape[0], options.get("max_distance", 128), options.get("bidirectional", True))
    index = torch.tensor([[t5_bucket(j - i - first, *rule) for j in range(N)] for i in range(M)], device=device)
    bias, expected = module(M, N, first), embedded(module.weight, index)
    assert bias.shape == (1, 3, M, N) and bias.stride(-2) % 16 == 0
    torch.testing.assert_close(bias, expected, rtol=0, atol=0)
    weights = torch.randn_like(bias)
    mine, theirs = (torch.autograd.grad((x * weights).sum(), module.weight)[0] for x in (bias, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_buckets_are_those_of_transformers() -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-700, 701)
    for bidirectional in (True, False):
        # With the last, float64 would round to another bucket.
        for buckets, max_distance in ((32, 128), (32, 100), (64, 256), (16, 20), (8, 300), (20, 160)):
            rows = t5.T5Attention._relative_position_bucket(distance, bidirectional, buckets, max_distance)
            module = RelativeBias(1, buckets=buckets, max_distance=max_distance, bidirectional=bidirectional, dtype=torch.float64)
            with torch.no_grad():
                module.weight.copy_(torch.arange(buckets)[:, None])
                assert torch.equal(module(1, 1401, 700)[0, 0, 0], rows.double()), (bidirectional, buckets, max_distance)


@pytest.mark.parametrize("window", [(1, 1), (7, 7), (2, 5), (4, 1), (1, 3)])
def test_swin(window: tuple[int, int], device: torch.device) -> None:
    module = RelativeBias(2, window=window, device=device, dtype=torch.float64)
    bias, expected = module(), embedded(module.weight, swin_index(*window).to(device))
    torch.testing.assert_close(bias, expected, rtol=0, atol=0)
    weights = torch.randn_like(bias)
    mine, theirs = (torch.autograd.grad((x * weights).sum(), module.weight)[0] for x in (bias, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert torch.equal(module(window[0] * window[1]), bias)


def nodes_behind(x: Tensor) -> set[str]:
    seen, queue = set[str](), [x.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None:
            seen.add(node.name())
            queue += [each for each, _ in node.next_functions]
    return seen


@pytest.mark.parametrize("module", [RelativeBias(4), RelativeBias(4, window=(6, 7))], ids=["t5", "swin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_the_same_bits_and_never_scattered(module: RelativeBias, dtype: torch.dtype, device: torch.device) -> None:
    module = module.to(device, dtype)
    sizes = () if module.window else (65, 130)
    bias = module(*sizes)
    weights = torch.randn(bias.shape, device=device, dtype=dtype)
    grads = [torch.autograd.grad(module(*sizes), module.weight, weights)[0] for _ in range(5)]
    assert grads[0].dtype == dtype and all(torch.equal(grads[0], each) for each in grads)
    # What is added where an index says is added by atomics on a GPU; so is what overlaps.
    found = nodes_behind(bias)
    assert not {name for name in found if any(word in name for word in ("Index", "Embedding", "Gather", "Scatter", "Unfold", "AsStrided"))}
    assert any("Expand" in name for name in found)
    wide = RelativeBias(4, window=module.window).to(device, torch.float64)
    (exact,) = torch.autograd.grad(wide(*sizes), wide.weight, weights.double())
    size = exact.abs().max()
    assert (grads[0].double() - exact).abs().max() <= (1e-6 if dtype == torch.float32 else 4e-3) * size  # one rounding, at the end


def test_attention_trains_the_table(device: torch.device) -> None:
    module = RelativeBias(2, buckets=8, max_distance=16).to(device)
    q, k, v = (torch.randn(3, 20, 2, 8, device=device, requires_grad=True) for _ in range(3))
    out = triflash.attention(q, k, v, bias=module(20), scale=1.0)
    weights = torch.randn_like(out)
    (mine,) = torch.autograd.grad((out * weights).sum(), module.weight)
    s = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) + module(20).double()
    dense = torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v.double())
    (theirs,) = torch.autograd.grad((dense * weights).sum(), module.weight)
    torch.testing.assert_close(out.double(), dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.unpoisoned
def test_compiled_and_on_meta() -> None:
    module = RelativeBias(2, buckets=8, max_distance=16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for M, N in ((20, 20), (7, 33)):  # the second with symbolic lengths
        weights = torch.randn(1, 2, M, N)
        mine, theirs = (torch.autograd.grad((each(M, N) * weights).sum(), module.weight)[0] for each in (compiled, module))
        torch.testing.assert_close(mine, theirs)
    assert RelativeBias(2, device="meta")(3, 5).shape == (1, 2, 3, 5)
    assert RelativeBias(2)(0, 5).shape == (1, 2, 0, 5) and RelativeBias(2)(5, 0).shape == (1, 2, 5, 0)
    assert RelativeBias(2, window=(3, 4), device="meta")().shape == (1, 2, 12, 12)


class Reader(nn.Module):
    """Queries of one sequence on the keys of another, the last of each at the same position."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = RelativeBias(2)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        M, N = q.shape[1], k.shape[1]
        return triflash.attention(q, k, k, bias=self.bias(M, N, first_query=N - M), causal=True)


def rows(*lengths: int) -> list[Tensor]:
    return [torch.randn(2, length, 2, 8) for length in lengths]


@pytest.mark.unpoisoned
@pytest.mark.parametrize("own", [False, True], ids=["two lengths", "one length"])
def test_an_exported_program_holds_for_a_range_of_lengths(own: bool) -> None:
    model, name = Reader(), torch.export.Dim("queries", min=2, max=300)
    shapes = {"q": {1: name}, "k": {1: name if own else torch.export.Dim("keys", min=2, max=400)}}
    with torch.no_grad():
        program = torch.export.export(model, tuple(rows(16, 16 if own else 32)), dynamic_shapes=shapes).module()
        for M, N in ((300, 300), (17, 17), (2, 2)) if own else ((3, 400), (300, 2), (160, 160)):
            given = rows(M, N)
            torch.testing.assert_close(program(*given), model(*given))


@pytest.mark.unpoisoned
def test_two_graphs_are_enough_for_all_lengths() -> None:
    """Of lengths that 16 divides, and of others: what is near and what is far is no matter of the graph."""
    model = Reader()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):  # a third raises
        for length in (7, 32, 100, 250, 160):
            given = rows(length, length)
            torch.testing.assert_close(compiled(*given), model(*given))


@pytest.mark.unpoisoned
def test_made_without_memory_and_filled_later() -> None:
    """As large models are, before each process gets its part."""
    with torch.device("meta"):
        module = RelativeBias(2, buckets=8, max_distance=20)
        assert module(30, 41).shape == (1, 2, 30, 41)
    expected = RelativeBias(2, buckets=8, max_distance=20)
    module.to_empty(device="cpu").load_state_dict(expected.state_dict())
    assert torch.equal(module(30, 41), expected(30, 41))


@pytest.mark.unpoisoned
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_a_table_that_is_a_dtensor_has_its_gradient() -> None:
    """Rows that no distance has, as T5's of distance 0 from behind, included."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    whole, module = RelativeBias(4), RelativeBias(4)
    with without_group():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        module.weight = nn.Parameter(distribute_tensor(whole.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(1)]))
        bias, weights = module(9, 30), torch.randn(1, 4, 9, 30)
        assert isinstance(bias, DTensor) and bias.placements[0] in (Shard(1), Replicate())  # the latter before PyTorch 2.13
        for x, y in ((bias.to_local(), weights), (whole(9, 30), weights)):
            (x * y).sum().backward()
        torch.testing.assert_close(module.weight.grad.full_tensor(), whole.weight.grad)


@pytest.mark.parametrize("make, kind, message", [
    (lambda: RelativeBias(0), ValueError, "heads: wanted 1 or more, got 0"),
    (lambda: RelativeBias(2, buckets=7), ValueError, "buckets: wanted an even number"),
    (lambda: RelativeBias(2, buckets=2), ValueError, "buckets: wanted 4 or more"),
    (lambda: RelativeBias(2, max_distance=8), ValueError, "max_distance: wanted 9 or more, got 8"),
    (lambda: RelativeBias(2, bidirectional=1), TypeError, "bidirectional: wanted True or False"),  # type: ignore[arg-type]
    (lambda: RelativeBias(2, window=7), TypeError, r"window: wanted a pair \(height, width\)"),  # type: ignore[arg-type]
    (lambda: RelativeBias(2, window=(7, 0)), ValueError, "window: wanted 1 or more"),
    (RelativeBias(2), TypeError, "queries: wanted a number of queries, got None"),
    (lambda: RelativeBias(2)(3.0), TypeError, "queries: wanted a whole number"),
    (lambda: RelativeBias(2)(3, 3, 0.5), TypeError, "first_query: wanted a whole number, got 0.5"),
    (lambda: RelativeBias(2, window=(3, 3))(8), ValueError, r"queries: wanted 9, of the window \(3, 3\), got 8"),
    (lambda: RelativeBias(2, window=(3, 3))(9, 9, 1), ValueError, "first_query: wanted 0"),
])  # fmt: skip
def test_bad_input(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_the_example_draws_what_it_learned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = Path(__file__).parent.parent / "examples" / "plot_bias.py"
    assert path.read_text().count("\n") <= 80
    monkeypatch.setattr(sys, "argv", [str(path), "--steps", "3", "--out", str(tmp_path / "bias.png")])
    runpy.run_path(str(path), run_name="__main__")
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert losses[-1] < losses[0] and (tmp_path / "bias.png").read_bytes()[:4] == b"\x89PNG"
