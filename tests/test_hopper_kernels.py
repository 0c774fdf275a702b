"""The Hopper forward kernel on the GPU that it is for: every configuration, many tiles a program, and how it stands beside the portable one.

What every backend must do is in test_edges.py and test_pairwise.py, what is arithmetic in test_hopper_plan.py, what compiles in aot/,
the backward pass in test_hopper_backward.py.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from cases import Case, build
from here import hopper_only
from running import attend, few_sms, run_case
from table import FORWARD, GROWING
from triflash import ops, oracle
from triflash.plan.kernels.forward import ForwardConfig
from triflash.plan.override import override_configs

pytestmark = [pytest.mark.gpu, hopper_only]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

CONFIGS = [
    *(ForwardConfig(consumers, block_n, 2) for consumers, block_n in itertools.product((1, 2, 3), (16, 64, 128))),
    ForwardConfig(2, 64, 1),
    ForwardConfig(2, 64, 3),
    ForwardConfig(2, 64, 4),
    ForwardConfig(2, 64, 2, separate_o=False),
    ForwardConfig(2, 64, 2, bias_stages=2),
    ForwardConfig(1, 32, 2, ping_pong=True),
    ForwardConfig(2, 64, 2, ping_pong=True),
    ForwardConfig(3, 64, 3, bias_stages=3, ping_pong=True, separate_o=False),
    ForwardConfig(2, 64, 2, persistent=False),
    ForwardConfig(2, 64, 2, q_stages=2),
    ForwardConfig(2, 128, 2, ping_pong=True, q_stages=2),
    ForwardConfig(3, 64, 3, ping_pong=True, q_stages=2),
    ForwardConfig(2, 64, 2, own_widths=True),
]
NARROWER = Case("values narrower than keys", B=3, M=200, N=200, H=2, D=64, Dv=32, bias="b11k", lo=-70, hi=20)
PROBLEMS = [
    *(
        replace(case, D=dim)
        for case, dim in zip((*FORWARD[:2], FORWARD[3], *GROWING[:2], GROWING[5]), (64, 40, 32, 64, 64, 64), strict=True)
    ),
    NARROWER,
]


@pytest.mark.parametrize("sms", [2, 132], ids=lambda n: f"{n} SMs")
@pytest.mark.parametrize("case", PROBLEMS, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(c).replace(" ", "-"))
def test_every_configuration(config: ForwardConfig, case: Case, sms: int, device: torch.device) -> None:
    """With two programs for all tiles, buffers and barriers wrap around many times and from tile to tile; with many, each has one tile."""
    if case.Dv is not None and not config.separate_o:
        pytest.skip("the output leaves through q's buffer, which has other rows")
    run_case(replace(case, grads=""), "hopper", device, {"forward": config}, sms=sms)


@pytest.mark.parametrize("sms", [1, 3, 5, 7])
def test_bits_do_not_depend_on_who_does_a_tile(sms: int, device: torch.device) -> None:
    q, k, v = (torch.randn(2, 500, 3, 64, device=device, dtype=BF16) for _ in range(3))
    bias = torch.randn(1, 1, 3, 500, 500, device=device)
    for given, hi in ((None, None), (bias, 0)):
        arguments = (q, k, v, given, 1, None, hi, 0.125, "", "hopper")
        wanted = ops.attention_forward(*arguments)
        with few_sms(sms):
            got = ops.attention_forward(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_around_tiles(length: int, causal: bool, device: torch.device) -> None:
    """With the device's own tiles, against few and many keys."""
    for other in (1, 128, 200):
        for M, N in ((length, other), (other, length)):
            run_case(Case("lengths", B=1, M=M, N=N, H=2, D=64, dtype=BF16, causal=causal, tiles=None), "hopper", device)


@pytest.mark.parametrize("dims", [(256, 256), (192, 128), (16, 256), (256, 16), (1, 1), (96, 200)], ids=str)
@pytest.mark.parametrize("bias_dtype", [None, BF16, F32, torch.bool], ids=str)
def test_head_dims_and_biases(dims: tuple[int, int], bias_dtype: torch.dtype | None, device: torch.device) -> None:
    """More queries and keys than a tile has, at the sizes that fill shared memory."""
    bias = None if bias_dtype is None else "bhqk"
    case = Case("dims", B=2, M=300, N=250, H=2, D=dims[0], Dv=dims[1], dtype=BF16, bias=bias, bias_dtype=bias_dtype, hi=5, tiles=None)
    run_case(case, "hopper", device)


@pytest.mark.parametrize("backend", ["hopper", "auto"])
def test_the_public_function_is_the_operator(backend: str, device: torch.device) -> None:
    q, k, v = (torch.randn(2, 300, 3, 64, device=device, dtype=BF16) for _ in range(3))
    bias = torch.randn(3, 300, 300, device=device, dtype=BF16) if backend == "hopper" else None  # auto takes it without a bias alone
    with triflash.backend(backend), triflash.record_launches() as ran:
        out = triflash.flash_attn_func(q, k, v, bias, True, 0.2)
    assert [line.split()[:2] for line in ran] == [["hopper:", "forward"]]
    five = None if bias is None else bias[None, None]
    assert torch.equal(out, ops.attention_forward(q, k, v, five, 1, None, 0, 0.2, "", "hopper")[0])


def test_a_training_step_takes_both_families_where_it_must(device: torch.device) -> None:
    """A bias that does not vary over keys is for the portable backward kernels, which take what the Hopper forward pass saved."""
    q, k, v = (torch.randn(2, 300, 3, 64, device=device, dtype=F16, requires_grad=True) for _ in range(3))
    for bias, steps in (
        (None, ["hopper: preprocess", "hopper: dkdv", "hopper: dq"]),
        (300, ["triton: delta", "triton: dkdv", "triton: dq"]),
    ):
        given = None if bias is None else torch.randn(bias, 1, device=device, dtype=F16)
        with triflash.record_launches() as ran:
            triflash.flash_attn_func(q, k, v, given, True).sum().backward()
        assert [" ".join(line.split()[:2]) for line in ran] == ["hopper: forward", *steps]


def test_the_backward_pass_is_refused_by_name(device: torch.device) -> None:
    q = torch.randn(1, 20, 2, 16, device=device, dtype=F16, requires_grad=True)
    with triflash.backend("hopper"):
        out = triflash.flash_attn_func(q, q, q, torch.zeros(20, 1, device=device, dtype=F16))
    with triflash.record_launches() as ran, pytest.raises(triflash.UnsupportedError, match="the backward pass with a bias .*'hopper'"):
        out.sum().backward()
    assert ran == [] and q.grad is None


@pytest.mark.parametrize("dtype", [F32, torch.float64], ids=str)
def test_other_dtypes_are_refused_by_name(dtype: torch.dtype, device: torch.device) -> None:
    q = torch.randn(1, 20, 2, 16, device=device, dtype=dtype)
    with triflash.backend("hopper"), triflash.record_launches() as ran, pytest.raises(triflash.UnsupportedError, match="hopper"):
        triflash.flash_attn_func(q, q, q)
    assert ran == []


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("huge", [-1e9, 1e9, -1e30])
@pytest.mark.parametrize("shape", ["1111", "11q1", "1hqk", "1h1k"])
def test_rows_whose_every_score_is_huge(shape: str, huge: float, causal: bool, device: torch.device) -> None:
    """What lse, a float32, loses of them is kept in ``rest``: lse + rest, and the gradients built on them, are the portable kernels'."""
    q, k, v, dout = (torch.randn(2, length, 2, 32, device=device, dtype=BF16) for length in (300, 270, 270, 300))
    bias = torch.zeros([size if letter != "1" else 1 for letter, size in zip(shape, (2, 2, 300, 270), strict=True)], device=device)
    bias[..., : 3 if shape[2] == "q" else 1, :] = huge
    options = (1, None, 0 if causal else None, 0.2, "")
    results: dict[str, list[Tensor]] = {}
    for backend in ("triton", "hopper"):
        out, lse, rest = ops.attention_forward(q, k, v, bias[:, None], *options, backend)
        arguments = (dout, None, q, k, v, bias[:, None], out, lse, rest, *options, "triton", [True] * 4)
        results[backend] = [out, *ops.attention_backward(*arguments)[:4]]
    for name, got, wanted in zip(("out", "dq", "dk", "dv", "dbias"), results["hopper"], results["triton"], strict=True):
        assert got.isfinite().all(), name
        assert (got.float() - wanted.float()).norm() < 1e-2 * wanted.float().norm() + 1e-3 * dout.float().norm(), name


def test_rest_is_what_lse_has_no_room_for(device: torch.device) -> None:
    """lse + rest in float64 is the log-sum-exp; without huge scores rest is next to nothing."""
    q, k, v = (torch.randn(1, 70, 2, 32, device=device, dtype=BF16) for _ in range(3))
    for size in (1.0, 1e6):
        bias = torch.full((1, 1, 2, 70, 70), -size, device=device)
        _, lse, rest = ops.attention_forward(q, k, v, bias, 1, None, None, 0.2, "", "hopper")
        whole = lse.double() + rest.double() * torch.log(torch.tensor(2.0, dtype=torch.float64)).item()
        wanted = oracle.attention(q, k, v, bias, scale=0.2)[1]
        error = (whole - wanted).abs().max().item()
        rounding = size * torch.finfo(F32).eps * 4  # of the scores themselves, which are float32
        assert error < 1e-3 + rounding, (size, error)
        assert rest.isfinite().all() and rest.abs().max().item() < 1e-5 + rounding
        assert size == 1 or rest.abs().max().item() > 1e-3  # float32 counts in steps of 0.06 there


def aliased(layout: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v that TMA can address as they are, or not: views of one packed tensor, odd offsets, heads before rows, no stride at all."""
    if layout == "packed":
        q, k, v = torch.randn(2, 90, 3, 2, 32, device=device, dtype=BF16).unbind(2)
    elif layout == "an odd offset":
        q, k, v = (torch.randn(2 * 90 * 2 * 32 + 1, device=device, dtype=BF16)[1:].view(2, 90, 2, 32) for _ in range(3))
    elif layout == "odd rows":
        q, k, v = (torch.randn(2, 90, 2, 33, device=device, dtype=BF16)[..., :32] for _ in range(3))
    elif layout == "heads before rows":
        q, k, v = (torch.randn(2, 2, 90, 32, device=device, dtype=BF16).transpose(1, 2) for _ in range(3))
    else:  # expanded
        q, k, v = (torch.randn(1, 90, 1, 32, device=device, dtype=BF16).expand(2, 90, 2, 32) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("layout", ["packed", "an odd offset", "odd rows", "heads before rows", "expanded"])
def test_layouts_give_the_bits_of_compact_tensors(layout: str, device: torch.device) -> None:
    tensors = aliased(layout, device)
    options: Any = (None, 1, None, 0, 0.2, "", "hopper")
    got = ops.attention_forward(*tensors, *options)
    wanted = ops.attention_forward(*(x.contiguous() for x in tensors), *options)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_neighbours_of_inputs_are_not_read_into_results(device: torch.device) -> None:
    """Rows beyond a batch entry's last are another entry's; NaN there must not matter."""
    base = torch.full((3, 100, 2, 32), torch.nan, device=device, dtype=BF16)
    base[1] = torch.randn(100, 2, 32, device=device).to(BF16)
    x = base[1:2]
    alone = x.clone()
    for hi in (None, 0):
        options: Any = (None, 1, None, hi, 0.2, "", "hopper")
        got, wanted = ops.attention_forward(x, x, x, *options), ops.attention_forward(alone, alone, alone, *options)
        assert got[0].isfinite().all() and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_nothing_is_written_past_the_last_row(device: torch.device) -> None:
    """Tiles are larger than the problem: what lies behind out and lse stays as it was."""
    from triflash import launch
    from triflash.plan.device import facts_of
    from triflash.plan.select import plan_forward
    from triflash.spec import Operands, Saved, spec_of

    for config in (None, ForwardConfig(2, 64, 2, separate_o=False), ForwardConfig(3, 64, 2)):
        q, k, v = (torch.randn(2, 70, 2, 64, device=device, dtype=BF16) for _ in range(3))
        whole = torch.full((2, 200, 2, 64), 7.0, device=device, dtype=BF16)
        lses = torch.full((2 * 2 * 70 + 500,), 7.0, device=device)
        out, lse = whole[:, 50:120], lses[: 2 * 2 * 70].view(2, 2, 70)
        spec = spec_of(q, k, v, None, 1, None, 0, 0.125, "")
        with override_configs(**({"forward": config} if config else {})):
            plan = plan_forward(spec, facts_of(device), "hopper")
        launch.run_forward(plan, spec, Operands(q, k, v), Saved(out, lse, None))
        assert (whole[:, :50] == 7).all() and (whole[:, 120:] == 7).all() and (lses[2 * 2 * 70 :] == 7).all(), config
        wanted = oracle.attention(q, k, v, scale=0.125, hi=0)
        torch.testing.assert_close(out.double(), wanted[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse.double(), wanted[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dim, bias", list(itertools.product((40, 64, 128, 256), (None, "11qk", "1h1k"))))
def test_repeats(dim: int, bias: str | None, device: torch.device) -> None:
    """Many tiles a program, 1000 launches: programs, warps and loads really race, and the bits are the same every time."""
    case = Case("races", B=4, M=520, N=500, H=8, D=dim, bias=bias, tiles=None, dtype=BF16, causal=True, grads="")
    inputs = build(case, device)
    out, lse = attend(case, inputs, "hopper", raw=True)
    differing = torch.zeros((), device=device, dtype=torch.int64)
    for _ in range(1000):
        again, again_lse = attend(case, inputs, "hopper", raw=True)
        differing += (again != out).any() | (again_lse != lse).any()
    assert differing.item() == 0


@pytest.mark.unpoisoned
def test_cuda_graph(device: torch.device) -> None:
    """Descriptors of tensors travel with the launch: a captured one replays on new values."""
    q, k, v = (torch.randn(2, 300, 3, 64, device=device, dtype=BF16) for _ in range(3))
    bias = torch.randn(3, 300, 300, device=device, dtype=BF16)
    with triflash.backend("hopper"):
        triflash.flash_attn_func(q, k, v, bias, True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = triflash.flash_attn_func(q, k, v, bias, True)
        q.copy_(torch.randn_like(q))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, triflash.flash_attn_func(q, k, v, bias, True))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_equals_eager(compiler: str, device: torch.device) -> None:
    torch._dynamo.reset()
    q, k, v = (torch.randn(2, 300, 3, 64, device=device, dtype=BF16, requires_grad=True) for _ in range(3))

    def step(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        out = call(q, k, v, None, True)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

    call: Any = triflash.flash_attn_func
    wanted = step(q, k, v)
    call = torch.compile(triflash.flash_attn_func, backend=compiler, fullgraph=True)
    step(q, k, v)
    with triflash.record_launches() as ran:
        got = step(q, k, v)
    assert [" ".join(line.split()[:2]) for line in ran] == [f"hopper: {name}" for name in ("forward", "preprocess", "dkdv", "dq")]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_on_a_stream_of_its_own(device: torch.device) -> None:
    """Kernels run on the caller's stream, after what is queued there: their inputs are written just before, and overwritten just after."""
    stream = torch.cuda.Stream()
    x = torch.randn(2, 300, 4, 64, device=device, dtype=BF16)
    wanted = ops.attention_forward(x, x, x, None, 1, None, None, 0.125, "", "hopper")[0]
    y = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        y.copy_(x)
        out = ops.attention_forward(y, y, y, None, 1, None, None, 0.125, "", "hopper")[0]
        y.fill_(torch.nan)
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)
