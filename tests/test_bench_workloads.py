"""The named workloads have their models' shapes, and everyone who claims to compute them computes them rightly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from triflash.cli.bench import flexible, formula, providers
from triflash.cli.bench.gate import Problem, reference, verdict
from triflash.cli.bench.models import named
from triflash.cli.bench.providers import PROVIDERS, one_line, provider
from triflash.cli.bench.workloads import NAMED, Workload, short
from triflash.plan.select import BACKENDS

# batch, heads, key heads, queries, head dim, (lo, hi), bias, its shape
SHAPES = {
    "llama3-8b": (2, 32, 8, 8192, 128, (None, 0), None),
    "gemma2-9b-local": (2, 16, 8, 8192, 256, (-4095, 0), None),
    "gemma2-9b-global": (2, 16, 8, 8192, 256, (None, 0), None),
    "mistral-7b": (1, 32, 8, 16384, 128, (-4095, 0), None),
    "gpt-oss-20b-local": (1, 64, 8, 8192, 64, (-127, 0), None),
    "gpt-oss-20b-global": (1, 64, 8, 8192, 64, (None, 0), None),
    "bert-large": (32, 16, 16, 512, 64, (None, None), (32, 1, 1, 1, 512)),
    "t5-xl-encoder": (16, 32, 32, 512, 64, (None, None), (1, 1, 32, 512, 512)),
    "bloom-7b": (4, 32, 32, 2048, 128, (None, 0), (4, 1, 32, 1, 2048)),
    "swin-b": (4096, 4, 4, 49, 32, (None, None), (1, 1, 4, 49, 49)),
    "swin-b-shifted": (4096, 4, 4, 49, 32, (None, None), (1, 64, 4, 49, 49)),
    "vit-l": (64, 16, 16, 197, 64, (None, None), None),
    "af3-triangle": (384, 4, 4, 384, 32, (None, None), (1, 1, 4, 384, 384)),
    "af3-pair-bias": (1, 16, 16, 768, 24, (None, None), (1, 1, 16, 768, 768)),
    "af3-diffusion": (48, 16, 16, 384, 48, (None, None), (1, 1, 16, 384, 384)),
    "boltz-triangle": (512, 4, 4, 256, 32, (None, None), (2, 1, 4, 256, 256)),
    "boltz2-triangle": (512, 4, 4, 512, 32, (None, None), (1, 1, 4, 512, 512)),
    "of3-triangle": (768, 4, 4, 768, 32, (None, None), (1, 1, 4, 768, 768)),
    "of3-template": (1536, 4, 4, 384, 16, (None, None), (4, 1, 4, 384, 384)),
    "openfold-msa-row": (128, 8, 8, 256, 32, (None, None), (1, 1, 8, 256, 256)),
    "openfold-extra-msa": (1024, 8, 8, 256, 8, (None, None), (1, 1, 8, 256, 256)),
    "evoformer-msa-row": (128, 8, 8, 384, 32, (None, None), (1, 1, 8, 384, 384)),
    "evoformer-triangle": (384, 4, 4, 384, 32, (None, None), (1, 1, 4, 384, 384)),
}
TINY = [replace(w.shrunk(), dtype="fp32") for w in NAMED.values()]
CPU = torch.device("cpu")


def test_shapes() -> None:
    assert set(SHAPES) == set(NAMED)
    for name, (b, h, hk, s, d, band, bias) in SHAPES.items():
        w = NAMED[name]
        assert (w.batch, w.heads, w.kv_heads, w.queries, w.keys, w.head_dim, w.value_dim) == (b, h, hk, s, s, d, d), name
        assert ((w.lo, w.hi), w.bias_shape) == (band, bias), name
        assert w.about
    assert {name: w.second_shape for name, w in NAMED.items() if w.second} == {
        "evoformer-msa-row": (1, 128, 1, 1, 384), "evoformer-triangle": (1, 384, 1, 1, 384),
    }  # fmt: skip
    assert NAMED["t5-xl-encoder"].softmax_scale == 1.0
    assert NAMED["gemma2-9b-local"].softcap == NAMED["gemma2-9b-global"].softcap == 50.0
    assert NAMED["gpt-oss-20b-local"].sinks and NAMED["gpt-oss-20b-global"].sinks
    assert len({w.key for w in NAMED.values()}) == len(NAMED)


def test_shapes_of_a_bias() -> None:
    """``b`` alone is the whole batch, both of its levels."""
    w = Workload("x", 6, 2, 5, 7, 8, batch_inner=3)
    for bias, shape in (("bhqk", (2, 3, 2, 5, 7)), ("1ih1k", (1, 3, 2, 1, 7)), ("b1hqk", (2, 1, 2, 5, 7)), ("qk", (1, 1, 1, 5, 7))):
        assert replace(w, bias=bias).bias_shape == shape
    with pytest.raises(ValueError, match="^bias: wanted none, or dims such as 1hqk.*, got 'khqb'"):
        _ = replace(w, bias="khqb").bias_shape


def test_families_and_unknown_names() -> None:
    assert [w.name for w in named("gemma2-9b")] == ["gemma2-9b-local", "gemma2-9b-global"]
    assert [w.name for w in named("swin-b")] == ["swin-b"]
    assert len(named("all")) == len(NAMED)
    with pytest.raises(ValueError, match="--workload gpt5: wanted all or one of llama3-8b"):
        named("gpt5")


def run(workload: Workload, attend: object) -> str | None:
    """The gate's verdict on the output and every gradient."""
    x: Problem = workload.build(CPU)
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
    bias = x.given
    names = ["out", "dq", "dk", "dv"]
    wanted = list(leaves)
    if workload.dbias:
        biases = [t.clone().requires_grad_() for t in x.biases.values()]
        wanted += biases
        names += x.biases
        bias = biases[0] if len(biases) == 1 else tuple(biases)  # type: ignore[assignment]
    out = attend(workload, x)(*leaves, bias)  # type: ignore[operator]
    results = dict(zip(names, (out.detach(), *torch.autograd.grad(out, wanted, x.dout)), strict=True))
    return verdict(reference(x, names), results)


@pytest.mark.parametrize("workload", TINY, ids=lambda w: w.name)
def test_tiled_computes_it(workload: Workload) -> None:
    tiled = provider("triflash-tiled")
    assert tiled.why_not(workload, CPU) is None
    assert run(workload, tiled.attend) is None


def test_padding_is_passed_as_key_lengths() -> None:
    """Without its bias, that is."""
    w = replace(NAMED["bert-large"].shrunk(), dtype="fp32")
    x = w.build(CPU)
    out = provider("triflash-tiled").attend(w, x)(x.q, x.k, x.v, None)
    torch.testing.assert_close(out, provider("dense").attend(w, x)(x.q, x.k, x.v, x.bias))


@pytest.mark.parametrize("name", ["dense", "chunked", "sdpa"])
@pytest.mark.parametrize("workload", TINY, ids=lambda w: w.name)
def test_peers_compute_it(workload: Workload, name: str) -> None:
    why = provider(name).why_not(workload, CPU)
    assert (why is None) == (name != "sdpa" or not (workload.softcap or workload.sinks))
    if why is None:
        assert run(workload, provider(name).attend) is None


@pytest.mark.parametrize("letters", ["bhqk", "1hqk", "b11k", "b1hqk", "1ihqk", "bihqk", "1i11k"])
def test_chunks_of_every_kind_of_bias(letters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two entries at a time of an inner batch of three, forward and, twice over one graph, backward; no more scores are there at once."""
    w = Workload("x", 6, 2, 16, 24, 8, bias=letters, batch_inner=3 if len(letters) == 5 else 1, dtype="fp32", dbias=True)
    x = w.build(CPU)
    monkeypatch.setattr(providers, "_CHUNK", 2 * 2 * 16 * 24)
    sizes = []
    attention = formula.attention

    def recorded(q: torch.Tensor, *more: object) -> torch.Tensor:
        sizes.append(q.shape[0])
        return attention(q, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(formula, "attention", recorded)
    leaves = [y.detach().clone().requires_grad_() for y in (x.q, x.k, x.v, x.bias) if y is not None]
    out = provider("chunked").attend(w, x)(*leaves)
    assert sizes == ([2, 1, 2, 1] if w.batch_inner == 3 else [1] * 6)
    wanted = attention(*leaves, x.options)
    torch.testing.assert_close(out, wanted)
    right = torch.autograd.grad(wanted, leaves, x.dout)
    for _ in range(2):
        for got, grad in zip(torch.autograd.grad(out, leaves, x.dout, retain_graph=True), right, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("workload", TINY, ids=lambda w: w.name)
def test_flex_means_the_same(workload: Workload) -> None:
    """Its score and mask functions, run by FlexAttention's own dense emulation, forward only: it has no backward pass on a CPU."""
    x = workload.build(CPU)
    with torch.no_grad():
        out = flexible.attend(workload, x, dense=True)(x.q, x.k, x.v, x.given)
    biases = [bias.double() for bias in x.biases.values()]
    wanted = formula.attention(x.q.double(), x.k.double(), x.v.double(), biases, x.options)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)


def test_flex_reads_a_bias_of_every_kind() -> None:
    for letters in ("bhqk", "1hqk", "b11k", "1h1k", "11q1", "b1hqk", "1ihqk", "bihqk", "1i11k"):
        w = Workload("x", 6, 2, 16, 24, 8, bias=letters, batch_inner=3 if len(letters) == 5 else 1, dtype="fp32")
        x = w.build(CPU)
        with torch.no_grad():
            out = flexible.attend(w, x, dense=True)(x.q, x.k, x.v, x.bias)
        torch.testing.assert_close(out, formula.attention(x.q, x.k, x.v, x.bias, x.options), rtol=1e-4, atol=1e-5)


def test_shifted_windows_hide_what_was_no_neighbour() -> None:
    """Against the definition: roll an image of numbered blocks, cut it into windows, compare neighbours."""
    w = NAMED["swin-b-shifted"]
    bias = replace(w.shrunk(), batch=4, batch_inner=4).build(CPU).bias
    assert bias is not None
    image = torch.arange(14)
    block = torch.where(image < 7, 0, torch.where(image < 11, 1, 2))  # after a shift by 3, the last 3 rows come from the other side
    blocks = 3 * block[:, None] + block[None, :]
    windows = blocks.reshape(2, 7, 2, 7).transpose(1, 2).reshape(4, 49)
    hidden = windows[:, :, None] != windows[:, None, :]
    assert torch.equal(bias[0, :, 0] < -50, hidden)


def test_every_backend_is_a_provider() -> None:
    for backend in BACKENDS:
        assert (("triflash" if backend == "auto" else f"triflash-{backend}") in PROVIDERS) == (backend != "oracle")
    assert {"sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flex", "fa4", "dense"} <= set(PROVIDERS)


def test_reasons() -> None:
    gpu = torch.device("cuda")
    plain = Workload("x", 1, 2, 64, 64, 64)
    biased, window = replace(plain, bias="1hqk"), replace(plain, lo=-8, hi=0)
    assert provider("fa4").why_not(plain, gpu) == "flash-attn-4 is not installed"
    for w in (biased, window):
        assert provider("sdpa-flash").why_not(w, gpu) == "takes no bias, mask or window"
    assert provider("sdpa-flash").why_not(plain, gpu) is None
    assert provider("sdpa-cudnn").why_not(plain, CPU) == "needs a GPU"
    assert provider("flex").why_not(plain, CPU) == "needs a GPU"
    assert one_line(RuntimeError("\n  first\nsecond")) == "RuntimeError: first"
    assert one_line(torch.OutOfMemoryError("CUDA out of memory. Tried …")) == "out of memory"
    assert len(one_line(RuntimeError("x" * 1000))) <= 140


def test_short() -> None:
    assert [short(n) for n in (49, 512, 1024, 2048, 2050)] == ["49", "512", "1k", "2k", "2050"]
