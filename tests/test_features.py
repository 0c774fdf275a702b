"""The front door's features, alone and in company, on every backend, judged by the definition written out in ``test_attention``."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import triflash
from cases import Case
from here import BACKENDS, HAVE_TRITON, hopper_only
from running import run_hidden, small_tiles
from test_attention import agree, inputs
from triflash import attention, ops
from triflash.dropout import keep_mask, philox2x32, philox4x32, rescale, threshold

ALL = ["oracle", *BACKENDS]


@pytest.fixture(autouse=True)
def tiles() -> Any:
    with small_tiles((16, 16)):
        yield


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=str)
def test_grouped_heads(heads: tuple[int, int], backend: str, device: torch.device) -> None:
    H, Hk = heads
    for options in ({}, {"causal": True, "window": (9, None)}):
        agree(inputs(2, H=H, Hk=Hk, Dv=8, device=device), backend, **options)
    for shape in ((H, 20, 27), (2, H, 20, 27), (H, 1, 27)):
        agree(inputs(2, H=H, Hk=Hk, device=device), backend, torch.randn(shape, device=device, requires_grad=True))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("lengths", [(0, 27), (16, 17), (1, 99), (15, 26)], ids=str)
def test_key_lengths(lengths: tuple[int, int], backend: str, device: torch.device) -> None:
    shown = torch.tensor(lengths, device=device)
    for options in ({}, {"causal": True}, {"window": (5, 2)}):
        agree(inputs(2, device=device), backend, key_lengths=shown, **options)
    for shape in ((2, 2, 20, 27), (2, 20, 27), (2, 1, 27)):
        agree(inputs(2, device=device), backend, torch.randn(shape, device=device, requires_grad=True), key_lengths=shown, causal=True)


@pytest.mark.parametrize("backend", [*ALL, pytest.param("hopper", marks=[pytest.mark.gpu, hopper_only])])
def test_hidden_keys_may_hold_anything(backend: str, device: torch.device) -> None:
    """What lies beyond a key length is never read into a result: caches are not initialised. (Hopper's kernels: test_hopper_lengths.py.)"""
    run_hidden(Case("hidden", B=2, M=20, N=27, bias="b11k", lengths=(5, 20), tiles=(16, 16)), backend, device)
    run_hidden(Case("hidden", B=3, M=33, N=70, H=1, bias="bhqk", mask="b11k", lengths=(65, 40, 0), tiles=None), backend, device)
    run_hidden(Case("hidden", B=2, M=40, N=150, H=1, D=64, lengths=(150, 70), tiles=None), backend, device)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", ["qk", "1hqk", "b11k", "bhqk", "11q1", "1111", "b111"])
def test_mask_beside_a_bias(shape: str, backend: str, device: torch.device) -> None:
    sizes = dict(zip("bhqk", (2, 2, 20, 27), strict=True))
    mask = torch.rand([sizes.get(letter, 1) for letter in shape], device=device) < 0.6
    for bias_shape in ((2, 2, 20, 27), (2, 20, 27), (2, 1, 1, 27)):
        bias = torch.randn(bias_shape, device=device, requires_grad=True)
        agree(inputs(2, device=device), backend, bias, mask=mask, causal=True)


@pytest.mark.parametrize("backend", ALL)
def test_blocks_that_a_mask_hides(backend: str, device: torch.device) -> None:
    """Whole blocks, whole rows and whole columns of them; dbias of a hidden block is 0, not whatever was in memory."""
    mask = torch.zeros(50, 50, dtype=torch.bool, device=device)
    mask[:20, :10] = mask[20:33, 16:32] = mask[40:, 33:] = True
    for shape in ((2, 50, 50), (1, 50), (1, 2, 50, 50), ()):
        bias = torch.randn(shape, device=device, requires_grad=True) if shape else None
        agree(inputs(1, M=50, N=50, H=2, device=device), backend, bias, mask=mask)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("batch", [(2, 3), (2, 1, 2)], ids=str)
def test_bias_and_mask_over_different_batch_dims(batch: tuple[int, ...], backend: str, device: torch.device) -> None:
    """Triangle attention: a bias for each of the outer dims, a padding mask for each entry."""
    bias = torch.randn(batch[0], *(1 for _ in batch[1:]), 2, 20, 27, device=device, requires_grad=True)
    mask = torch.rand(*batch, 1, 1, 27, device=device) < 0.7
    agree(inputs(*batch, device=device), backend, bias, mask=mask)
    inner = torch.rand(*(1 for _ in batch[:1]), *batch[1:], 1, 20, 27, device=device) < 0.7
    agree(inputs(*batch, device=device), backend, bias, mask=inner, key_lengths=torch.randint(0, 28, batch, device=device))


def test_bias_and_mask_that_share_no_split(device: torch.device) -> None:
    bias, mask = torch.zeros(2, 1, 1, 1, 20, 27, device=device), torch.ones(1, 1, 2, 1, 1, 27, dtype=torch.bool, device=device)
    with pytest.raises(
        triflash.UnsupportedError,
        match=r"bias that varies over batch dims \[0\] beside a mask .* \[2\] of 3: not supported by any backend; .*expand one",
    ):
        attention(*inputs(2, 3, 2, device=device), bias=bias, mask=mask)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_soft_cap(softcap: float, backend: str, device: torch.device) -> None:
    for scale in (None, -2.0, 3.0):
        agree(inputs(2, device=device), backend, softcap=softcap, scale=scale, causal=True)
    for shape in ((2, 20, 27), (2, 2, 20, 27), (2, 1, 1, 27)):
        agree(inputs(2, device=device), backend, torch.randn(shape, device=device, requires_grad=True), softcap=softcap, scale=2.0)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("lengths", [(20, 27), (27, 20), (1, 33), (33, 1)], ids=str)
def test_alibi(lengths: tuple[int, int], backend: str, device: torch.device) -> None:
    M, N = lengths
    for shape in ((2,), (2, 2)):
        slopes = torch.rand(shape, device=device)
        agree(inputs(2, M=M, N=N, device=device), backend, alibi_slopes=slopes)
        agree(inputs(2, M=M, N=N, device=device), backend, alibi_slopes=slopes.half().float(), causal=True, window=(12, 0))
    bias = torch.randn(2, M, N, device=device, requires_grad=True)
    agree(inputs(2, M=M, N=N, device=device), backend, bias, alibi_slopes=slopes, softcap=3.0)


@pytest.mark.parametrize("backend", ALL)
def test_alibi_is_the_bias_that_it_spares(backend: str, device: torch.device) -> None:
    q, k, v = inputs(2, device=device)
    slopes = torch.tensor([0.5, 0.25], device=device)
    i, j = torch.arange(20, device=device)[:, None], torch.arange(27, device=device)
    bias = -slopes[:, None, None] * (i + 7 - j).abs()
    for a, b in zip(
        *(attention(q, k, v, return_lse=True, backend=backend, **x) for x in ({"alibi_slopes": slopes}, {"bias": bias})), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ALL)
def test_sink(backend: str, device: torch.device) -> None:
    sink = torch.tensor([0.7, -torch.inf], device=device, requires_grad=True)
    for options in ({}, {"causal": True, "window": (3, None)}, {"key_lengths": torch.tensor([0, 9], device=device)}):
        agree(inputs(2, M=33, device=device), backend, sink=sink.detach(), **options)
        finite = torch.tensor([0.7, -2.0, 5.0, 90.0], device=device, requires_grad=True)
        agree(inputs(2, M=33, H=4, Hk=2, device=device), backend, sink=finite, **options)
    bias = torch.randn(4, 20, 27, device=device, requires_grad=True)
    agree(inputs(2, H=4, device=device), backend, bias, sink=finite, softcap=2.0)


@pytest.mark.parametrize("backend", ALL)
def test_sink_of_a_query_that_sees_no_key(backend: str, device: torch.device) -> None:
    """Out 0, lse the sink; and without any keys at all, the gradient of lse still reaches it."""
    sink = torch.tensor([0.5, -1.0], device=device, requires_grad=True)
    for N in (0, 3):
        q, k, v = inputs(2, M=9, N=N, device=device)
        out, lse = attention(q, k, v, sink=sink, causal=True, return_lse=True, backend=backend)
        blind = 9 - N
        assert (out[:, :blind] == 0).all()
        torch.testing.assert_close(lse[..., :blind], sink.detach()[None, :, None].expand(2, 2, blind))
        (dsink,) = torch.autograd.grad(lse[..., :blind].sum(), sink)
        torch.testing.assert_close(dsink, torch.full_like(sink, 2.0 * blind))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("only", ["sink", "lse"])
def test_only_the_gradient_of_a_sink(only: str, backend: str, device: torch.device) -> None:
    q, k, v = (x.detach() for x in inputs(2, device=device))
    sinks = [torch.tensor([0.5, -1.0], device=device, dtype=torch.float16, requires_grad=True) for _ in range(2)]
    out, lse = attention(q, k, v, sink=sinks[0], return_lse=True, backend=backend)
    wanted = attention(q, k, v, sink=sinks[1], return_lse=True, backend="oracle")
    pick = 0 if only == "sink" else 1
    with triflash.record_launches() as ran:
        (got,) = torch.autograd.grad((out, lse)[pick].square().sum(), sinks[0])
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, torch.autograd.grad(wanted[pick].square().sum(), sinks[1])[0], rtol=2e-3, atol=1e-3)
    if backend == "triton":
        assert [line.split()[1] for line in ran] == ["delta"]


def kept(seed: int, p: float, batch: int = 2, H: int = 2, M: int = 20, N: int = 27, device: Any = None) -> Tensor:
    pair = torch.tensor([seed, 0], device=device)
    return keep_mask(pair, p, batch, H, slice(0, M), slice(0, N)).double() * rescale(p)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout(p: float, backend: str, device: torch.device) -> None:
    """Values, lse and gradients for the keep-mask of a seed, which every backend draws alike, whatever its tiles."""
    for tiles in ((32, 16), (16, 32)):
        with small_tiles(tiles):
            agree(inputs(2, device=device), backend, kept=kept(7, p, device=device), dropout_p=p, dropout_seed=7, causal=True)
    for shape in ((2, 20, 27), (2, 2, 20, 27), (2, 1, 1, 27)):
        bias = torch.randn(shape, device=device, requires_grad=True)
        mask = torch.rand(20, 27, device=device) < 0.7
        more: dict[str, Any] = {"dropout_p": p, "dropout_seed": -5, "mask": mask, "softcap": 4.0}
        agree(inputs(2, device=device), backend, bias, kept=kept(-5, p, device=device), **more)
    sink = torch.randn(4, device=device, requires_grad=True)
    more = {"dropout_p": p, "dropout_seed": 2**40 + 3, "sink": sink, "key_lengths": torch.tensor([20, 9], device=device)}
    agree(inputs(2, H=4, Hk=1, device=device), backend, kept=kept(2**40 + 3, p, H=4, device=device), **more)


FEATURES: list[dict[str, Any]] = [  # of which some counts what wraps round
    {"dropout_p": 0.3, "dropout_seed": 2**62 + 7},
    {"dropout_p": 0.9, "dropout_seed": -1, "causal": True, "window": (3, None), "softcap": 4.0},
]


@pytest.mark.skipif(not HAVE_TRITON or torch.cuda.is_available(), reason="Triton's interpreter is off")
@pytest.mark.parametrize("options", FEATURES)
def test_integers_overflow_only_where_they_may(options: dict[str, Any], device: torch.device) -> None:
    """With its debugging on, Triton asserts of every sum of integers that it does not overflow, unless the kernel says that it may."""
    from triton.runtime import interpreter

    tensors = inputs(2, device=device)
    with mock.patch.object(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True)):
        out = attention(*tensors, backend="triton", **options)
        torch.autograd.grad(out.sum(), tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", pytest.param("hopper", marks=hopper_only)])
def test_debugging_stops_at_nothing(backend: str) -> None:
    """The same in compiled kernels, in a process of its own: a failed assertion ends all work on the GPU."""
    program = f"""
import torch
from triflash import attention
for options in {FEATURES!r}:
    q, k, v = (torch.randn(2, 70, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 70, 70, device="cuda", requires_grad=True)
    out = attention(q, k, v, bias=bias, backend={backend!r}, **options)
    torch.autograd.grad(out.sum(), (q, k, v, bias))
    torch.cuda.synchronize()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "TRITON_DEBUG": "1"})
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_draws_seeds(backend: str, device: torch.device) -> None:
    """From PyTorch's generator: reproducible by manual_seed, another mask every call, the same mask again in the backward pass."""
    q, k, v = inputs(2, device=device)

    def results() -> list[Tensor]:
        out = attention(q, k, v, dropout_p=0.4, backend=backend)
        return [out, *torch.autograd.grad(out.sum(), (q, k, v))]

    torch.manual_seed(3)
    first, second = results(), results()
    torch.manual_seed(3)
    again = results()
    assert not torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    state = torch.get_rng_state()  # of the CPU; on a GPU nothing is drawn from it anyway
    plain = [attention(q, k, v, backend=backend, **x) for x in ({}, {"dropout_p": 0.0}, {"dropout_p": 0.0, "dropout_seed": 4})]
    assert torch.equal(plain[0], plain[1]) and torch.equal(plain[0], plain[2]) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("backend", ALL)
def test_dropout_seed_tensors(backend: str, device: torch.device) -> None:
    q, k, v = inputs(2, device=device)

    def out(seed: Any) -> Tensor:
        return attention(q, k, v, dropout_p=0.4, dropout_seed=seed, backend=backend)

    pairs = [(5, 0), (5, 1), (6, 0), (5, 2**32), (5 + 2**33, 0), (-5, -1)]
    outs = [out(torch.tensor(pair, device=device)) for pair in pairs]
    assert torch.equal(outs[0], out(5))
    for a, b in itertools.combinations(outs, 2):
        assert not torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_captured_graph_draws_anew(backend: str, device: torch.device) -> None:
    """A replay reads the seed tensor as it is then: fresh masks, forward and backward by the same one."""
    tensors = inputs(2, M=64, N=64, device=device)
    seed = torch.tensor([3, 0], device=device)

    def step() -> list[Tensor]:
        out = attention(*tensors, dropout_p=0.3, dropout_seed=seed, backend=backend)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), tensors)]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for offset in (1, 2):
        seed[1] = offset
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.parametrize(
    "generator, counter, key, wanted",
    [
        (philox2x32, (0, 0), (0,), (0x257A3673, 0xCD26BE2A)),
        (philox2x32, (0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF,), (0xAB302C4D, 0x3DC9D239)),
        (philox2x32, (0x243F6A88, 0x85A308D3), (0x13198A2E,), (0xBEDBBE6B, 0xE4C770B3)),
        (philox4x32, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (philox4x32, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
)
def test_philox_gives_known_answers(generator: Any, counter: tuple[int, ...], key: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Those that its authors publish for 7 rounds."""
    words, keys = (tuple(torch.tensor(x) for x in numbers) for numbers in (counter, key))
    assert tuple(int(word) for word in generator(words, keys if len(keys) > 1 else keys[0])) == wanted


@pytest.mark.parametrize("p", [0.05, 0.5, 0.85])
def test_dropout_statistics(p: float) -> None:
    """Of a keep-mask: its mean, its rows, columns and heads, and pairs of neighbours, within five standard deviations."""
    shape = (4, 8, 128, 256)
    x = keep_mask(torch.tensor([12345, 6]), p, *shape[:2], slice(0, shape[2]), slice(0, shape[3])).double()
    deviation = math.sqrt(p * (1 - p))

    def close(means: Tensor, wanted: float, count: int, spread: float = deviation) -> None:
        assert ((means - wanted).abs() < 5.5 * spread / math.sqrt(count)).all()

    close(x.mean(), 1 - p, x.numel())
    for dims in itertools.combinations(range(4), 3):
        close(x.mean(dims), 1 - p, math.prod(shape[d] for d in dims))
    centred = x - (1 - p)
    for dim in range(4):
        for step in (n for n in (1, 2, 3, 8) if n < shape[dim]):
            a, b = centred.narrow(dim, 0, shape[dim] - step), centred.narrow(dim, step, shape[dim] - step)
            close((a * b).mean(), 0.0, a.numel(), deviation**2)


@pytest.mark.parametrize("p", [1e-6, 1e-4, 0.1, 0.5, 0.9999, 0.999999])
def test_what_is_kept_makes_up_for_what_is_dropped(p: float) -> None:
    """p counts to the nearest 2^-15, in what is dropped and in what the rest is multiplied by; something is always kept."""
    share = 1 / rescale(p)
    assert share * 2**15 == pytest.approx(2**15 - threshold(p)) and threshold(p) < 2**15
    assert abs(share - (1 - p)) <= max(2**-16, 1 / 2**15 - (1 - p))


@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
def test_the_mean_over_seeds_is_attention_without_dropout(device: torch.device) -> None:
    q, k, v = (x.detach() for x in inputs(1, M=8, N=12, device=device))
    wanted = attention(q, k, v)
    outs = torch.stack([attention(q, k, v, dropout_p=0.3, dropout_seed=seed) for seed in range(400)])
    torch.testing.assert_close(outs.mean(0), wanted, rtol=0.0, atol=6 * outs.std(0).max().item() / 20)


@pytest.mark.parametrize("backend", ALL)
def test_everything_at_once(backend: str, device: torch.device) -> None:
    for seed, (M, N) in enumerate([(17, 33), (33, 20)]):
        torch.manual_seed(seed)
        bias = torch.randn(2, 1, 2, M, N, device=device, requires_grad=True)
        options: dict[str, Any] = dict(
            mask=torch.rand(2, 2, 1, 1, N, device=device) < 0.8,
            key_lengths=torch.randint(0, N + 1, (2, 2), device=device),
            causal=True,
            window=(20, None),
            softcap=2.0,
            alibi_slopes=torch.rand(2, device=device),
            sink=torch.randn(2, device=device, requires_grad=True),
            dropout_p=0.25,
            dropout_seed=99,
        )
        keep = kept(99, 0.25, 4, 2, M, N, device).unflatten(0, (2, 2))
        agree(inputs(2, 2, M=M, N=N, H=2, Hk=1, Dv=24, device=device), backend, bias, kept=keep, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_repeat(backend: str, device: torch.device) -> None:
    tensors = inputs(2, M=33, N=40, H=2, Hk=1, device=device)
    sink, bias = torch.randn(2, device=device, requires_grad=True), torch.randn(2, 1, 40, device=device, requires_grad=True)
    results = []
    for _ in range(2):
        out = attention(*tensors, bias=bias, sink=sink, softcap=3.0, dropout_p=0.2, dropout_seed=1, deterministic=True, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*tensors, bias, sink])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.unpoisoned
def test_compiled_with_everything(device: torch.device) -> None:
    torch._dynamo.reset()
    tensors = [*inputs(2, 3, N=20, H=4, Hk=2, device=device), torch.randn(2, 1, 4, 20, 20, device=device), torch.randn(4, device=device)]
    mask, lengths = torch.rand(2, 3, 1, 1, 20, device=device) < 0.8, torch.randint(1, 21, (2, 3), device=device)
    for x in tensors[3:]:
        x.requires_grad_()

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sink: Tensor) -> Tensor:
        options: dict[str, Any] = dict(mask=mask, key_lengths=lengths, softcap=3.0, sink=sink, dropout_p=0.2, dropout_seed=11)
        out, lse = attention(q, k, v, bias=bias, causal=True, alibi_slopes=torch.rand(4, device=device) * 0, **options, return_lse=True)
        return out.sum() + lse.sum()

    wanted = torch.autograd.grad(function(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(function, backend="aot_eager", fullgraph=True)(*tensors), tensors)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.unpoisoned
def test_opcheck_with_everything(device: torch.device) -> None:
    """Schemas, fakes and autograd of the operators agree with what they compute, all operands given."""
    q, k, v = inputs(4, M=12, N=12, H=2, Hk=1, D=8, Dv=8, device=device)
    bias = torch.randn(2, 1, 2, 12, 12, device=device, requires_grad=True)
    mask = torch.rand(2, 2, 1, 1, 12, device=device) < 0.8
    lengths, slopes = torch.tensor([3, 0, 12, 7], dtype=torch.int32, device=device), torch.rand(1, 2, device=device)
    sink, seed = torch.randn(2, device=device, requires_grad=True), torch.tensor([1, 2], device=device)
    options = (2, None, 0, 0.3, "", "tiled")
    more = (mask, lengths, slopes, sink, seed, 5.0, 0.2, True)
    torch.library.opcheck(ops.attention_forward, (q, k, v, bias, *options, *more))
    tensors = [x.detach() for x in (q, k, v, bias)]
    more = (*more[:3], sink.detach(), *more[4:])
    out, lse, rest = ops.attention_forward(*tensors, *options, *more)
    saved = (torch.randn_like(out), torch.randn_like(lse), *tensors, out, lse, rest)
    for needs in ([True] * 5, [False, False, False, False, True], [True, False, True, False]):
        torch.library.opcheck(ops.attention_backward, (*saved, *options, needs, *more))
    given = [torch.zeros_like(x) for x in tensors]
    torch.library.opcheck(ops.attention_backward_, (*saved, *options, *given, *more, torch.zeros_like(sink)))


def test_gradcheck_with_everything() -> None:
    """Finite differences of the tiled backend in float64."""
    q, k, v = (torch.randn(2, length, heads, 3, dtype=torch.float64, requires_grad=True) for length, heads in ((5, 2), (6, 1), (6, 1)))
    bias = torch.randn(2, 1, 6, dtype=torch.float64, requires_grad=True)
    sink = torch.randn(2, dtype=torch.float64, requires_grad=True)
    mask, lengths = torch.rand(5, 6) < 0.8, torch.tensor([6, 4])

    def function(*x: Tensor) -> Any:
        more: dict[str, Any] = dict(mask=mask, key_lengths=lengths, softcap=1.5, dropout_p=0.3, dropout_seed=3)
        out, lse = attention(*x[:3], bias=x[3], sink=x[4], alibi_slopes=torch.tensor([0.3, 0.1]), **more, return_lse=True)
        return out, lse

    assert torch.autograd.gradcheck(function, (q, k, v, bias, sink))
