"""The Hopper backward pass on the GPU that it is for: every kernel, configuration and subset of gradients, many tiles a program.

What every backend must do is in test_edges.py and test_pairwise.py, what is arithmetic in test_hopper_steps.py, what compiles in aot/. Here
out and lse come from the oracle, which compiles nothing; cases share dtypes, dims and masks where they can, so that they share kernels.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from cases import Case, Inputs, build
from expected import expected_kernels
from here import hopper_only
from running import assert_right, few_sms, named_gradients, run_case
from table import FEATURES
from triflash import ops
from triflash.plan.device import facts_of
from triflash.plan.kernels.dkdv import DkdvConfig, choose
from triflash.plan.override import override_configs
from triflash.spec import spec_of
from triflash.triton_flash_attention import _flash_attn_backward

pytestmark = [pytest.mark.gpu, hopper_only]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
BACKEND = "hopper"
BASE = Case("base", B=2, M=201, N=270, H=3, D=64, dtype=BF16, causal=True, grads="qkv", tiles=None)


def options_of(case: Case) -> tuple[Any, ...]:
    return (case.batch_inner, *case.band, case.softmax_scale, "")


def saved_of(case: Case, inputs: Inputs, backend: str = "oracle") -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        return ops.attention_forward(*inputs.operands()[:4], *options_of(case), backend)


def adding(case: Case, inputs: Inputs) -> Any:
    """Has dq added up in memory although keys are few: the plan's own configuration of that kernel, by hand."""
    spec = spec_of(*inputs.operands()[:4], *options_of(case))
    config = choose(spec, facts_of(inputs.q.device).shared_memory, ("dq",)) if max(case.D, case.Dv or 0) <= 128 else None
    return nullcontext() if config is None else override_configs(dqdkdv=config)


def backward(case: Case, inputs: Inputs, saved: tuple[Tensor, ...], deterministic: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """The gradients asked for, in the shapes of their inputs, and the kernels that ran."""
    wanted = inputs.wanted()
    needs = [letter in wanted for letter in "qkvb"]
    with torch.no_grad(), triflash.record_launches() as ran:
        arguments = (inputs.dout, inputs.dlse, *inputs.operands()[:4], *saved, *options_of(case), BACKEND, needs)
        grads = ops.attention_backward(*arguments, deterministic=deterministic)
    named = dict(zip("qkvb", grads[:4], strict=True))
    return {letter: named[letter].reshape(x.shape) for letter, x in wanted.items()}, check_backend(ran)


def check_backend(ran: list[str]) -> list[str]:
    assert all(line.startswith(f"{BACKEND}: ") for line in ran), ran
    return [line.split()[1] for line in ran if not line.split()[1].endswith("_sum")]


def expected(case: Case, inputs: Inputs, adds: bool) -> list[str]:
    return expected_kernels(case, BACKEND, inputs, adds)[1:]  # after the forward pass


def check(case: Case, device: torch.device, adds: bool = True, deterministic: bool = False) -> None:
    """All gradients of the case are right, and came from the kernels that they are to come from."""
    inputs = build(case, device)
    with adding(case, inputs) if adds else nullcontext():
        grads, ran = backward(case, inputs, saved_of(case, inputs), deterministic or not adds)
    assert ran == expected(case, inputs, adds and not deterministic)
    assert_right(case, inputs, named_gradients(grads, grads.values()))


SUBSETS = [
    *((None, letters) for letters in ("q", "k", "v", "qk", "qv", "kv", "qkv")),
    *(("1h1k", letters) for letters in ("b", "qb", "kvb", "qkvb")),
    *(("1hqk", letters) for letters in ("b", "kv", "qkvb")),
    *(("bhqk", letters) for letters in ("b", "qkvb")),
]


@pytest.mark.parametrize("adds", [True, False], ids=["added up", "of its own"])
@pytest.mark.parametrize("bias, letters", SUBSETS)
def test_subsets_of_gradients(bias: str | None, letters: str, adds: bool, device: torch.device) -> None:
    """With a cotangent of lse, too, but for v alone, on which lse does not depend."""
    for dlse in (False, True)[: 1 if letters == "v" else 2]:
        check(replace(BASE, bias=bias, grads=letters, dlse=dlse), device, adds)


LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_around_tiles(length: int, causal: bool, device: torch.device) -> None:
    for other in (1, 65, 128, 200):
        for M, N in {(length, other), (other, length)}:
            check(replace(BASE, B=1, M=M, N=N, H=2, causal=causal), device)


@pytest.mark.parametrize("lo, hi", [
    (-70, None), (0, None), (30, None), (-70, 20), (-300, -100), (64, 128), (-128, 0), (3, 3), (100, 50), (None, -150), (None, 120),
], ids=str)  # fmt: skip
def test_bands(lo: int | None, hi: int | None, device: torch.device) -> None:
    """Queries and keys that see nothing among them; a band that is empty; one a single diagonal wide."""
    check(replace(BASE, causal=False, lo=lo, hi=hi, M=300, N=270), device)


@pytest.mark.parametrize("bias, dtype, values", [
    *itertools.product(("1hqk",), (F32, BF16, torch.bool), ("normal", "rows")), ("1hqk", F32, "inf"), ("1hqk", BF16, "inf"),
    ("1h1k", torch.bool, "normal"), ("1h1k", torch.bool, "all"), ("1h1k", BF16, "inf"), ("1h1k", BF16, "all"),
], ids=str)  # fmt: skip
def test_biases(bias: str, dtype: torch.dtype, values: str, device: torch.device) -> None:
    """Masks and entries of -inf, queries and whole problems that see nothing."""
    check(replace(BASE, bias=bias, bias_dtype=dtype, bias_values=values, grads="qkvb"), device)


@pytest.mark.parametrize("layout", ["sliced", "expanded", "transposed"])
@pytest.mark.parametrize("bias", ["1hqk", "1h1k"])
def test_layouts_of_a_bias(bias: str, layout: str, device: torch.device) -> None:
    check(replace(BASE, bias=bias, bias_layout=layout, grads="qkvb"), device)


@pytest.mark.parametrize("dims, letters, bias", [
    ((256, 256), "qkv", None), ((256, 256), "k", None), ((256, 256), "v", None), ((256, 256), "qkv", "1hqk"), ((192, 128), "qkv", None),
], ids=str)  # fmt: skip
def test_wide_heads(dims: tuple[int, int], letters: str, bias: str | None, device: torch.device) -> None:
    check(replace(BASE, D=dims[0], Dv=dims[1], bias=bias, grads=letters), device)


@pytest.mark.parametrize("dims", [(1, 1), (16, 64), (40, 40), (64, 24)], ids=str)
def test_narrow_heads(dims: tuple[int, int], device: torch.device) -> None:
    """Padded to 64, which is the same kernel; rows that TMA cannot write go by way of a copy."""
    check(replace(BASE, D=dims[0], Dv=dims[1]), device)


CANDIDATES = [
    (64, None, DkdvConfig(2, 2, dq_warpgroup=True)), (64, None, DkdvConfig(2, 2, kv_stages=2, dq_warpgroup=True, unroll=2)), (64, None, DkdvConfig(1, 1)),
    (64, "1hqk", DkdvConfig(2, 2, 2, dq_warpgroup=True)), (64, "1hqk", DkdvConfig(2, 2)), (64, "1hqk", DkdvConfig(1, 1)),
    (128, None, DkdvConfig(2, 2, red_dq=True)), (96, None, DkdvConfig(2, 2)), (128, None, DkdvConfig(2, 1)), (128, None, DkdvConfig(1, 1)),
    (256, None, DkdvConfig(2, 2, d256=True)),
    (32, None, DkdvConfig(2, 2, kv_stages=2, dq_warpgroup=True, unroll=2)), (32, "1hqk", DkdvConfig(2, 2, 2, dq_warpgroup=True)), (24, "1hqk", DkdvConfig(2, 2)),
    (32, None, DkdvConfig(2, 1, red_dq=True)),
]  # fmt: skip


@pytest.mark.parametrize("sms", [2, 132], ids=lambda n: f"{n} SMs")
@pytest.mark.parametrize("dim, bias, config", CANDIDATES, ids=str)
def test_every_candidate(dim: int, bias: str | None, config: DkdvConfig, sms: int, device: torch.device) -> None:
    """With two programs for all tiles, buffers and barriers wrap around many times and from tile to tile; with many, each has one tile."""
    case = replace(BASE, D=dim, bias=bias, N=400)
    inputs = build(case, device)
    kernel = "dkdv" if config.d256 else "dqdkdv"
    with override_configs(**{kernel: config}), few_sms(sms), triflash.record_launches() as ran:
        grads, _ = backward(case, inputs, saved_of(case, inputs))
    assert f"{BACKEND}: {kernel} {config}" in ran
    assert_right(case, inputs, named_gradients(grads, grads.values()))


@pytest.mark.parametrize("sms", [1, 2, 3, 5, 7, 40])
@pytest.mark.parametrize("bias", [None, "1hqk", "1h1k"])
def test_many_tiles_a_program(bias: str | None, sms: int, device: torch.device) -> None:
    case = replace(BASE, M=330, N=650, bias=bias, grads="qkv" if bias is None else "qkvb")
    with few_sms(sms):
        check(case, device)


@pytest.mark.parametrize("deterministic", [False, True], ids=["added up", "deterministic"])
@pytest.mark.parametrize("bias", [None, "1hqk", "1h1k"])
@pytest.mark.parametrize("key_heads", [8, 4, 1])
def test_grouped_heads(key_heads: int, bias: str | None, deterministic: bool, device: torch.device) -> None:
    """8 query heads on 8, 4 and 1 key heads: a program of the kernel that owns keys walks the queries of all heads of a group."""
    case = replace(BASE, H=8, Hk=key_heads, bias=bias, grads="qkv" if bias is None else "qkvb")
    check(case, device, deterministic=deterministic)
    with few_sms(3):
        check(replace(case, seed=1), device, deterministic=deterministic)


@pytest.mark.parametrize("dim, value, bias", [(64, 64, None), (128, 128, None), (40, 72, "1h1k"), (128, 64, "1hqk")])
@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize("adds", [True, False], ids=["added up", "of its own"])
def test_heads_of_a_group_in_parts(adds: bool, splits: int, dim: int, value: int, bias: str | None, device: torch.device) -> None:
    """Seven query heads a key head, in parts that need not be equal: dk and dv from partial sums, the same bits every time."""
    case = replace(BASE, M=300, N=330, H=14, Hk=2, D=dim, Dv=value, bias=bias, grads="qkv" if bias is None else "qkvb")
    inputs = build(case, device)
    saved = saved_of(case, inputs)
    gives = ("dq",) * adds + ("dbias",) * (bias == "1h1k")
    config = choose(spec_of(*inputs.operands()[:4], *options_of(case)), facts_of(device).shared_memory, gives)
    assert config is not None
    with override_configs(**{"dqdkdv" if adds else "dkdv": replace(config, head_splits=splits)}), triflash.record_launches() as ran:
        grads, kernels = backward(case, inputs, saved, deterministic=not adds)
        again, _ = backward(case, inputs, saved, deterministic=not adds)
    assert kernels == expected(case, inputs, adds) and sum("dkdv_sum" in line for line in ran) == 2
    assert_right(case, inputs, named_gradients(grads, grads.values()))
    for letter, grad in grads.items():
        assert torch.equal(grad, again[letter]) or (adds and letter == "q")


@pytest.mark.parametrize("dim, bias", [(64, None), (64, "1hqk"), (64, "bhqk"), (128, "1h1k"), (256, None)])
def test_the_same_bits_every_time(dim: int, bias: str | None, device: torch.device) -> None:
    """Many tiles a program, 300 launches: all gradients if they are to be deterministic, all but dq if not."""
    case = replace(BASE, B=4, M=520, N=500, H=8, D=dim, bias=bias, dlse=True, grads="qkv" if bias is None else "qkvb")
    inputs = build(case, device)
    saved = saved_of(case, inputs)
    for deterministic in (True, False):
        with adding(case, inputs):
            first, ran = backward(case, inputs, saved, deterministic)
            differing = {letter: torch.zeros((), device=device, dtype=torch.int64) for letter in first}
            for _ in range(300):
                for letter, again in backward(case, inputs, saved, deterministic)[0].items():
                    differing[letter] += (again != first[letter]).any()
        assert ran == expected(case, inputs, not deterministic)
        counts = {letter: count.item() for letter, count in differing.items() if letter != "q" or "dqdkdv" not in ran}
        assert not any(counts.values()), counts
        assert all(grad.isfinite().all() for grad in first.values())


@pytest.mark.parametrize("sms", [1, 3, 7])
def test_bits_do_not_depend_on_who_does_a_tile(sms: int, device: torch.device) -> None:
    """But for dbias, whose parts are as many as it takes SMs."""
    for bias in (None, "1h1k", "bhqk"):
        case = replace(BASE, bias=bias, N=650, grads="qkv" if bias is None else "qkvb")
        inputs = build(case, device)
        saved = saved_of(case, inputs)
        with few_sms(20):
            wanted, _ = backward(case, inputs, saved, deterministic=True)
        with few_sms(sms):
            got, _ = backward(case, inputs, saved, deterministic=True)
        assert all(torch.equal(got[letter], x) for letter, x in wanted.items()), bias


def test_gradients_in_memory_that_tma_cannot_write(device: torch.device) -> None:
    """Views of packed tensors, odd offsets, every other element: the bits of contiguous ones, and nothing beside them is touched."""
    for bias in (None, "bhqk", "1hqk", "1h1k"):
        case = replace(BASE, bias=bias, grads="qkv" if bias is None else "qkvb")
        inputs = build(case, device)
        saved = saved_of(case, inputs)
        wanted, _ = backward(case, inputs, saved, deterministic=True)
        for layout in ("packed", "odd offset", "step", "odd rows"):
            whole, views = zip(*(beside(x, layout) for x in wanted.values()), strict=True)
            given = dict(zip(wanted, views, strict=True))
            if "b" in given and bias is not None:
                given["b"] = given["b"].unsqueeze(1)  # five dims
            targets = [given.get(letter) for letter in "qkvb"]
            arguments = (inputs.dout, None, *inputs.operands()[:4], *saved, *options_of(case), BACKEND, *targets)
            with torch.no_grad():
                ops.attention_backward_(*arguments, deterministic=True)
            for letter, buffer, view in zip(wanted, whole, views, strict=True):
                assert torch.equal(view, wanted[letter]), (bias, layout, letter)
                view.fill_(7.0)
                assert (buffer == 7).all(), (bias, layout, letter)


def beside(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """A buffer full of 7 but for a view of x's shape, which is full of NaN."""
    *outer, last = x.shape
    if layout == "packed":
        whole = x.new_full((*outer[:1], 3, *outer[1:], last), 7.0)
        view = whole[:, 1]
    elif layout == "odd offset":
        whole = x.new_full((x.numel() + 9,), 7.0)
        view = whole[1:-8].view(x.shape)
    elif layout == "step":
        whole = x.new_full((*outer, 2 * last), 7.0)
        view = whole[..., ::2]
    else:
        whole = x.new_full((*outer, last + 1), 7.0)
        view = whole[..., :last]
    view.fill_(torch.nan)
    return whole, view


@pytest.mark.parametrize("layout", ["mixed", "transposed", "sliced", "step", "expanded"])
def test_layouts_of_inputs(layout: str, device: torch.device) -> None:
    """Those that TMA cannot address are copied; dout may be such a one, too."""
    for adds, bias in itertools.product((True, False), (None, "1hqk")):
        check(replace(BASE, layout=layout, dout_layout="sliced" if layout == "mixed" else layout, bias=bias), device, adds)


def test_neighbours_of_inputs_are_not_read_into_results(device: torch.device) -> None:
    """Rows beyond a batch entry's last are another entry's; NaN there must not matter."""
    case = replace(BASE, B=1, M=100, N=100, H=2)
    inputs = build(case, device)
    saved = saved_of(case, inputs)
    wanted, _ = backward(case, inputs, saved, deterministic=True)

    def amid_nan(x: Tensor) -> Tensor:
        base = torch.full((3, *x.shape[1:]), torch.nan, device=device, dtype=x.dtype)
        base[1:2] = x.detach()
        return base[1:2]

    q, k, v, dout = (amid_nan(x) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    saved = (amid_nan(saved[0]), amid_nan(saved[1]), saved[2])
    for adds in (False, True):
        with adding(case, inputs) if adds else nullcontext(), torch.no_grad():
            arguments = (dout, None, q, k, v, None, *saved, *options_of(case), BACKEND, [True, True, True, False])
            got = ops.attention_backward(*arguments, deterministic=not adds)
        for letter, grad in zip("qkv", got[:3], strict=True):
            torch.testing.assert_close(grad, wanted[letter], rtol=2e-2 if adds else 0, atol=2e-2 if adds else 0)


@pytest.mark.parametrize("huge", [-1e9, 1e9, -1e30])
@pytest.mark.parametrize("shape", ["1hqk", "1h1k"])
def test_rows_whose_every_score_is_huge(shape: str, huge: float, device: torch.device) -> None:
    """What lse, a float32, loses of them is in ``rest``: with it the gradients are those of the tiled backend, from the same forward pass."""
    case = replace(BASE, bias=shape, grads="qkvb")
    inputs = build(case, device)
    assert inputs.bias is not None
    with torch.no_grad():
        inputs.bias[..., : 3 if shape[2] == "q" else 1, :] = huge
    saved = saved_of(case, inputs, "tiled")
    needs = [True] * 4
    with torch.no_grad():
        arguments = (inputs.dout, None, *inputs.operands()[:4], *saved, *options_of(case))
        wanted = ops.attention_backward(*arguments, "tiled", needs)
        for adds in (True, False):
            with adding(case, inputs) if adds else nullcontext():
                got = ops.attention_backward(*arguments, BACKEND, needs)
            for name, a, b in zip(("dq", "dk", "dv", "dbias"), got, wanted, strict=False):
                assert a.isfinite().all(), name
                assert (a.float() - b.float()).norm() < 1e-2 * b.float().norm() + 1e-3 * inputs.dout.float().norm(), name


@pytest.mark.parametrize("shape", ["1hqk", "1h1k"])
def test_without_what_lse_lost(shape: str, device: torch.device) -> None:
    """The seed's backward function is given lse alone, which is enough where no bias is huge."""
    case = replace(BASE, bias=shape)
    inputs = build(case, device)
    saved = saved_of(case, inputs)
    wanted, _ = backward(case, inputs, saved, deterministic=True)
    given = [x.detach() for x in (inputs.dout, inputs.q, inputs.k, inputs.v, *saved[:2])]
    grads = [torch.full_like(x, torch.nan) for x in given[1:4]]
    with triflash.backend(BACKEND), triflash.record_launches() as ran:
        _flash_attn_backward(*given, *grads, inputs.bias, True)
    assert check_backend(ran) == ["preprocess", "dkdv", "dq"]
    for letter, grad in zip("qkv", grads, strict=True):
        torch.testing.assert_close(grad, wanted[letter], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("case", FEATURES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_features(dim: int, case: Case, device: torch.device) -> None:
    """Both passes, by every kernel: tiles of the plan, and small ones with dq added up; scores from far below the cap to far above it."""
    for tiles, dtype in ((None, BF16), ((32, 32), F16)):
        run_case(replace(case, D=dim, tiles=tiles, dtype=dtype), BACKEND, device)


def test_a_bias_that_does_not_vary_over_keys_is_refused_by_name(device: torch.device) -> None:
    inputs = build(replace(BASE, bias="1hq1"), device)
    saved = saved_of(BASE, inputs)
    with triflash.record_launches() as ran, pytest.raises(triflash.UnsupportedError, match="does not vary over keys: .*'hopper'"):
        backward(replace(BASE, bias="1hq1"), inputs, saved)
    assert ran == []


@pytest.mark.parametrize("deterministic", [True, False])
def test_pytorchs_switch_decides_how_dq_is_summed(deterministic: bool, device: torch.device) -> None:
    """Of the seed's functions, which have no option for it, and where ``attention`` leaves it open; its own option goes before."""
    q, k, v = (torch.randn(1, length, 2, 64, device=device, dtype=BF16, requires_grad=True) for length in (300, 1300, 1300))

    def ran(call: Any) -> list[str]:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        with triflash.record_launches() as seen:
            torch.autograd.grad(call().sum(), (q, k, v))
        return [" ".join(line.split()[:2]) for line in seen]

    added, fixed = (["preprocess", "dqdkdv", "postprocess"], ["preprocess", "dkdv", "dq"])
    usual = fixed if deterministic else added
    for call, steps in (
        (lambda: triflash.flash_attn_func(q, k, v, None, True), usual),
        (lambda: triflash.attention(q, k, v, causal="top_left"), usual),
        (lambda: triflash.attention(q, k, v, causal="top_left", deterministic=True), fixed),
        (lambda: triflash.attention(q, k, v, causal="top_left", deterministic=False), added),
    ):
        assert ran(call) == ["hopper: forward", *(f"hopper: {name}" for name in steps)]
