"""``triflash.nn.TriangleAttention`` and ``PairBiasAttention`` against the published algorithms, dense and in float64, and ESMFold's code."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triflash
from triflash.nn import PairBiasAttention, TriangleAttention

ROOT = Path(__file__).parent.parent
C, D, H = 12, 4, 3
Run = Callable[..., Tensor]


def filled(module: nn.Module, device: torch.device) -> nn.Module:
    """In float64, with no parameter that is 0: those of a fresh layer give 0."""
    module = module.to(device, torch.float64)
    with torch.no_grad():
        for x in module.parameters():
            x.copy_(torch.randn_like(x) * 0.5)
    return module


def compare(mine: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(theirs)
    got, right = (torch.autograd.grad((x * weights).sum(), leaves) for x in (mine, theirs))
    for one, other in zip(got, right, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def part(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A projection by the layer's parameters, split in heads."""
    y = torch.einsum("...c,oc->...o", x, w[f"mha.linear_{name}.weight"])
    y = y + w.get(f"mha.linear_{name}.bias", 0)
    return y.reshape(*y.shape[:-1], H, D)


def normed(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x * w.get(f"{name}.weight", 1) + w.get(f"{name}.bias", 0)


def triangle_dense(w: dict[str, Tensor], x: Tensor, shown: Tensor | None, starting: bool) -> Tensor:
    """Algorithms 13 and 14 of AlphaFold 2, each in its own indices: nothing is transposed."""
    x = normed(w, "layer_norm", x)
    q, k, v, g = (part(w, name, x) for name in "qkvg")
    b = torch.einsum("...ijc,hc->...ijh", x, w["linear.weight"])
    if starting:
        s = torch.einsum("...ijhd,...ikhd->...hijk", q, k) / D**0.5 + torch.einsum("...jkh->...hjk", b).unsqueeze(-3)
        hidden = None if shown is None else ~shown[..., None, :, None, :]
    else:
        s = torch.einsum("...ijhd,...kjhd->...hijk", q, k) / D**0.5 + torch.einsum("...kih->...hik", b).unsqueeze(-2)
        hidden = None if shown is None else ~shown.mT[..., None, None, :, :]
    s = s if hidden is None else s.masked_fill(hidden, -1e9)
    o = torch.einsum("...hijk,...ikhd->...ijhd" if starting else "...hijk,...kjhd->...ijhd", s.softmax(-1), v)
    o = (torch.sigmoid(g) * o).flatten(-2)
    return torch.einsum("...c,oc->...o", o, w["mha.linear_o.weight"]) + w.get("mha.linear_o.bias", 0)


@pytest.mark.parametrize("starting", [True, False], ids=["starting", "ending"])
@pytest.mark.parametrize(
    "batch, masked, offsets", [((), "no", True), ((2,), "bool", True), ((2,), "numbers", False), ((2, 3), "lengths", False)]
)
def test_triangle(batch: tuple[int, ...], masked: str, offsets: bool, starting: bool, device: torch.device) -> None:
    N = 7
    layer = filled(TriangleAttention(C, D, H, starting, offsets=offsets), device)
    x = torch.randn(*batch, N, N, C, dtype=torch.float64, device=device, requires_grad=True)
    options: dict[str, Any] = {}
    shown = None
    if masked == "lengths":
        lengths = torch.randint(1, N + 1, batch, device=device)
        tokens = torch.arange(N, device=device) < lengths[..., None]
        options = {"key_lengths": lengths}
        shown = tokens[..., None, :].expand(*batch, N, N)
        shown = shown if starting else shown.mT
    elif masked != "no":
        shown = torch.rand(*batch, N, N, device=device) < 0.6
        shown |= torch.eye(N, device=device, dtype=torch.bool)
        options = {"mask": shown if masked == "bool" else shown.float()}
    weights = dict(layer.named_parameters())
    assert len(weights) == 8 + 2 * offsets
    compare(layer(x, **options), triangle_dense(weights, x, shown, starting), [x, *weights.values()])


@pytest.mark.parametrize("starting", [True, False], ids=["starting", "ending"])
def test_triangle_is_esmfolds(starting: bool) -> None:
    """transformers' copy of OpenFold, whose state dict loads as it is."""
    esm = pytest.importorskip("transformers.models.esm.modeling_esmfold")
    theirs = filled(esm.EsmFoldTriangleAttention(C, D, H, starting=starting), torch.device("cpu"))
    mine = TriangleAttention(C, D, H, starting).double()
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 6, C, dtype=torch.float64, requires_grad=True)
    mask = (torch.rand(2, 6, 6) < 0.7).double()
    mask[..., 0] = mask[..., 0, :] = 1
    for each in (None, mask):
        wanted = theirs(x, each)
        out = mine(x, each)
        torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)
        weights = torch.randn_like(wanted)
        grads = [torch.autograd.grad((y * weights).sum(), [x, *m.parameters()]) for y, m in ((out, mine), (wanted, theirs))]
        by_name = dict(zip([name for name, _ in theirs.named_parameters()], grads[1][1:], strict=True))
        torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-8, atol=1e-9)
        for (name, _), grad in zip(mine.named_parameters(), grads[0][1:], strict=True):
            torch.testing.assert_close(grad, by_name[name], rtol=1e-8, atol=1e-9)


def test_openfold_3s_names_load() -> None:
    """Of the layer alone and within a model; the state dict that was given stays as it is."""
    theirs = filled(TriangleAttention(C, D, H, offsets=False), torch.device("cpu"))
    renamed = {name.replace("linear.", "linear_z."): x for name, x in theirs.state_dict().items()}
    names = set(renamed)
    mine = TriangleAttention(C, D, H, offsets=False).double()
    mine.load_state_dict(renamed)
    model = nn.Sequential(TriangleAttention(C, D, H, offsets=False)).double()
    model.load_state_dict({f"0.{name}": x for name, x in renamed.items()})
    assert set(renamed) == names and "linear_z.weight" in names
    for each in (mine, model[0]):
        assert all(torch.equal(x, y) for x, y in zip(each.parameters(), theirs.parameters(), strict=True))


def test_rows_without_pairs(device: torch.device) -> None:
    """The output's offset, and nothing flows back but to that."""
    layer = filled(TriangleAttention(C, D, H), device)
    x = torch.randn(1, 5, 5, C, dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.ones(1, 5, 5, device=device)
    mask[:, 2] = 0
    out = layer(x, mask)[:, 2]
    torch.testing.assert_close(out, layer.mha.linear_o.bias.expand_as(out))
    assert (torch.autograd.grad(out.sum(), x)[0] == 0).all()


def pair_dense(w: dict[str, Tensor], a: Tensor, z: Tensor, s: Tensor | None, hidden: Tensor | None, beta: Tensor | None) -> Tensor:
    """Algorithm 24 of AlphaFold 3, and 26 where there is an s."""
    if s is None:
        a = normed(w, "layer_norm_a", a)
    else:
        t = normed(w, "layer_norm_a.layer_norm_s", s)
        gate = torch.sigmoid(t @ w["layer_norm_a.linear_g.weight"].T + w["layer_norm_a.linear_g.bias"])
        a = gate * normed({}, "", a) + t @ w["layer_norm_a.linear_s.weight"].T
    q, k, v, g = (part(w, name, a) for name in "qkvg")
    b = torch.einsum("...ijc,hc->...hij", normed(w, "layer_norm_z", z), w["linear_z.weight"])
    b = b if beta is None else b + beta.unsqueeze(-3)
    scores = torch.einsum("...ihd,...jhd->...hij", q, k) / D**0.5 + b
    scores = scores if hidden is None else scores.masked_fill(hidden, -1e9)
    o = (torch.sigmoid(g) * torch.einsum("...hij,...jhd->...ihd", scores.softmax(-1), v)).flatten(-2)
    o = o @ w["mha.linear_o.weight"].T
    return o if s is None else torch.sigmoid(s @ w["linear_ada_out.weight"].T + w["linear_ada_out.bias"]) * o


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("batch, shared, masked", [
    ((2,), False, "no"), ((2,), False, "bool"), ((2, 3), True, "numbers"), ((2, 3), True, "lengths"), ((2, 3), True, "beta"),
    ((2,), False, "bool beta"), ((1,), False, "beta and mask"),
])  # fmt: skip
def test_pair_bias(batch: tuple[int, ...], shared: bool, masked: str, conditioned: bool, device: torch.device) -> None:
    N, cz, cs = 7, 5, 9
    layer = filled(PairBiasAttention(C, cz, D, H, c_s=cs if conditioned else None, pair_offset=not conditioned), device)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)

    pairs = (*batch[:-1], 1) if shared else batch
    a, z = rand(*batch, N, C), rand(*pairs, N, N, cz)
    s = rand(*batch, N, cs) if conditioned else None
    options: dict[str, Any] = {}
    hidden = beta = None
    tokens = torch.rand(*pairs, N, device=device) < 0.6
    tokens[..., 2] = True
    if masked in ("bool", "numbers", "beta and mask"):
        options, hidden = {"mask": tokens if masked == "bool" else tokens.long()}, ~tokens[..., None, None, :]
    if masked == "lengths":
        lengths = torch.randint(1, N + 1, batch, device=device)
        options, hidden = {"key_lengths": lengths}, (torch.arange(N, device=device) >= lengths[..., None])[..., None, None, :]
    if masked in ("beta", "beta and mask"):
        options["beta"] = beta = rand(*pairs, N, N)
    if masked == "bool beta":
        near = (torch.arange(N, device=device)[:, None] - torch.arange(N, device=device)).abs() < 3
        options, hidden = {"beta": near.expand(*batch, N, N), "mask": tokens | True}, ~near
    weights = dict(layer.named_parameters())
    leaves = [x for x in (a, z, s, beta, *weights.values()) if x is not None]
    compare(layer(a, z, s, **options), pair_dense(weights, a, z, s, hidden, beta), leaves)


def test_fresh_layers_start_as_published(device: torch.device) -> None:
    """An update of 0 without conditioning; with it one gated by sigmoid(−2)."""
    z = torch.randn(1, 6, 6, C, device=device)
    assert (TriangleAttention(C, D, H).to(device)(z) == 0).all()
    a, s = torch.randn(1, 6, C, device=device), torch.randn(1, 6, 5, device=device)
    assert (PairBiasAttention(C, C, D, H).to(device)(a, z) == 0).all()
    layer = PairBiasAttention(C, C, D, H, c_s=5).to(device)
    assert layer(a, z, s).abs().max() > 0 and (layer.linear_ada_out.bias == -2).all()


@pytest.mark.parametrize("N", [8, 16])
def test_the_bias_is_laid_out_for_kernels(N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous rows at multiples of 16 elements, so that no kernel of any pass copies it."""
    seen: list[Any] = []

    def recorded(*args: Tensor, **options: Any) -> Tensor:
        seen.append((args, options))
        return attention(*args, **options)

    attention = triflash.attention
    monkeypatch.setattr("triflash.nn.folding.attention", recorded)
    TriangleAttention(C, 8, H)(torch.randn(2, N, N, C))
    PairBiasAttention(C, C, 8, H)(torch.randn(2, N, C), torch.randn(2, N, N, C))
    for _, options in seen:
        *_, row, key = options["bias"].stride()
        assert (row, key) == (16, 1)
    assert seen[0][1]["bias"].shape == (2, 1, H, N, N) and seen[1][1]["bias"].shape == (2, H, N, N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["bfloat16", "autocast"])
def test_half_precision(dtype: torch.dtype | None, device: torch.device) -> None:
    layer = filled(TriangleAttention(16, 8, 2), device)
    x = torch.randn(1, 9, 9, 16, device=device)
    right = layer(x.double())
    if dtype is None:
        layer.float()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            out = layer(x)
        assert layer.linear.weight.grad is None
        out.float().sum().backward()
        assert layer.linear.weight.grad.dtype == torch.float32
    else:
        out = layer.to(dtype)(x.to(dtype))
    assert out.dtype == torch.bfloat16 and (out.double() - right).norm() <= 4e-2 * right.norm()


def test_compiled(device: torch.device) -> None:
    torch.compiler.reset()
    layers = nn.ModuleList([filled(TriangleAttention(C, D, H, False), device), filled(PairBiasAttention(C, C, D, H), device)])

    def step(z: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        return layers[0](z, mask).square().sum() + layers[1](a, z, mask=mask[:, 0]).square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    N = 6
    z, a = torch.randn(2, N, N, C, device=device).double().requires_grad_(), torch.randn(2, N, C, device=device).double()
    mask = torch.rand(2, N, N, device=device) < 0.8
    leaves = [z, *layers.parameters()]
    for got, right in zip(*(torch.autograd.grad(each(z, a, mask), leaves) for each in (compiled, step)), strict=True):
        torch.testing.assert_close(got, right)


def triangle(x: Any, *more: Any, **options: Any) -> Tensor:
    return TriangleAttention(C, D, H)(x, *more, **options)


def pair(a: Any, z: Any, *more: Any, c_s: int | None = None, **options: Any) -> Tensor:
    return PairBiasAttention(C, C, D, H, c_s=c_s)(a, z, *more, **options)


A, Z = torch.zeros(2, 5, C), torch.zeros(2, 5, 5, C)


@pytest.mark.parametrize("call, words", [
    (lambda: TriangleAttention(C, 0, H), "c_hidden: wanted 1 or more, got 0"),
    (lambda: TriangleAttention(C, D, 2.0), "no_heads: wanted a whole number"),  # type: ignore[arg-type]
    (lambda: TriangleAttention(C, D, H, starting=1), "starting: wanted True or False"),  # type: ignore[arg-type]
    (lambda: triangle(Z[..., 1:]), r"x: wanted 3 dims or more \(\*, N, N, c_in\), of which the last has 12 channels, got \(2, 5, 5, 11\)"),
    (lambda: triangle(Z[:, 1:]), "x: wanted as many rows as columns"),
    (lambda: triangle(None), "x: wanted a tensor, got NoneType"),
    (lambda: triangle(Z, Z[..., 0, 0]), r"mask: wanted \(\*, N, N\) that fits \(2, 5, 5\)"),
    (lambda: triangle(Z, 1.0), "mask: wanted a tensor of bools or numbers"),
    (lambda: triangle(Z, key_lengths=torch.ones(2, 5)), r"key_lengths: wanted shape \(2,\), one for each"),
    (lambda: triangle(Z, key_lengths=[5, 5]), "key_lengths: wanted a tensor of integers"),
    (lambda: triangle(Z, key_lengths=torch.ones(2)), "key_lengths: wanted a tensor of integers, got torch.float32"),
    (lambda: PairBiasAttention(C, C, D, H, c_s=0), "c_s: wanted 1 or more"),
    (lambda: pair(A[0], Z[0]), r"a: wanted 3 dims or more \(\*, N, c_a\)"),
    (lambda: pair(A, Z[..., 1:]), r"z: wanted 4 dims or more \(\*, N, N, c_z\), of which the last has 12"),
    (lambda: pair(A, Z[:, 1:]), r"z: wanted \(\*, N, N, c_z\) that fits \(2, 5, 5\)"),
    (lambda: pair(A, Z[:, :1]), r"z: wanted \(\*, N, N, c_z\) that fits \(2, 5, 5\)"),
    (lambda: pair(A, Z, A), "s: wanted None, as the layer has no c_s, got a tensor"),
    (lambda: pair(A, Z, c_s=3), r"s: wanted a tensor \(\*, N, c_s=3\), got None"),
    (lambda: pair(A, Z, A, c_s=3), r"s: wanted 3 dims or more \(\*, N, c_s\), of which the last has 3"),
    (lambda: pair(A, Z, mask=Z[..., 0]), r"mask: wanted \(\*, N\) that fits \(2, 5\)"),
    (lambda: pair(A, Z, beta=Z), r"beta: wanted \(\*, N, N\) that fits \(2, 5, 5\)"),
    (lambda: pair(A, Z, beta=Z[..., 0].long()), "beta: wanted a tensor of floats or bools, got torch.int64"),
])  # fmt: skip
def test_bad_input(call: Callable[[], Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_the_example_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "examples" / "pairformer.py"
    assert path.read_text().count("\n") <= 80
    monkeypatch.setattr(sys, "argv", [str(path), "--steps", "25", "--tokens", "8", "--batch", "6"])
    with triflash.record_launches() as ran:
        runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    first, last = ([float(x) for x in re.findall(r"\d\.\d+", line)] for line in (lines[0], lines[-1]))
    assert len(lines) == 6 and len(first) == len(last) == 2
    assert last[0] < 0.5 * first[0] and last[1] < 0.5 * first[1], lines
    assert sum("forward" in name for name in ran) == 26 * 3  # three layers, every step and the first look
    assert {name.split()[1] for name in ran} > {"forward"}


def test_the_page_runs() -> None:
    """Every snippet alone, as somebody would copy it."""
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "folding.md").read_text(), re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        exec(compile(snippet, "docs/folding.md", "exec"), {"print": lambda *_: None})


@pytest.mark.parametrize("layer", ["triangle", "pair bias"])
def test_exported_for_any_number_of_tokens(layer: str, device: torch.device) -> None:
    """Multiples of what rows are padded to, too."""
    triangle = layer == "triangle"
    module = filled(TriangleAttention(C, D, H) if triangle else PairBiasAttention(C, C, D, H), device)

    def tokens(B: int, N: int) -> tuple[Tensor, ...]:
        pairs = torch.randn(B, N, N, C, device=device, dtype=torch.float64)
        return (pairs,) if triangle else (torch.randn(B, N, C, device=device, dtype=torch.float64), pairs)

    any_size = torch.export.Dim.AUTO
    given = tokens(2, 6)
    program = torch.export.export(
        module, given, dynamic_shapes=tuple([dict.fromkeys(range(x.dim() - 1), any_size) for x in given])
    ).module()
    for N in (9, 16, 32):
        given = tokens(3, N)
        torch.testing.assert_close(program(*given), module(*given))
