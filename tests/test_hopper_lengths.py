"""Key lengths on Hopper: blocks are loaded whole, and what a length hides, NaN included, reaches no result. Every kernel, by its own source on
the CPU (``gluon_twin.py``)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import gluon_twin
import triflash
from cases import kernels
from mutations import mutate, noticed
from triflash.plan.hopper import HopperConfig
from triflash.plan.hopper_backward import KeysConfig
from triflash.plan.hopper_rows import RowsConfig
from triflash.plan.override import Config, override_configs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for the GPU that there is, or without Triton's interpreter")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
JUNK = (math.nan, math.inf, -math.inf)


@dataclass(frozen=True)
class Problem:
    """bias: a letter where it varies, over (batch, head, query, key). lengths: of every batch entry, one more than N among them."""

    name: str
    M: int = 130
    N: int = 200
    H: int = 2
    Hk: int = 1
    D: int = 16
    Dv: int = 16
    dtype: torch.dtype = F16
    bias: str = ""
    bias_dtype: torch.dtype | None = None
    mask: str = ""
    band: tuple[int | None, int | None] = (None, None)
    softcap: float = 0.0
    sink: bool = False
    alibi: bool = False
    grads: str = "qkvb"
    lengths: tuple[int, ...] = (0, 1, 63, 64, 65, 128, 199, 999)

    def __str__(self) -> str:
        return self.name


def run(problem: Problem, junk: bool, processors: int = 3, seed: int = 0, **configs: Config) -> tuple[list[Tensor], list[str]]:
    """out, lse and every gradient; hidden keys, values, biases and masks hold junk, or zeros."""
    p, B = problem, len(problem.lengths)
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    q, k, v, dout = (
        normal(B, length, heads, dim) for length, heads, dim in ((p.M, p.H, p.D), (p.N, p.Hk, p.D), (p.N, p.Hk, p.Dv), (p.M, p.H, p.Dv))
    )
    sizes = (B, p.H, p.M, p.N)
    bias = mask = None
    if p.bias:
        bias = normal(*(n if c != "1" else 1 for c, n in zip(p.bias, sizes, strict=True)), dtype=p.bias_dtype or p.dtype).unsqueeze(1)
    if p.mask:
        mask = (torch.rand([n if c != "1" else 1 for c, n in zip(p.mask, sizes, strict=True)], generator=g) < 0.8).unsqueeze(1)
    for b, n in enumerate(p.lengths):
        for x in (k, v):
            hidden = torch.tensor(JUNK)[torch.randint(0, 3, x[b, n:].shape, generator=g)]
            x[b, n:] = hidden.to(p.dtype) if junk else 0.0
        if bias is not None and p.bias[0] == "b" and p.bias[3] == "k":
            bias[b, ..., n:] = math.nan if junk else 0.0
    lengths = torch.tensor(p.lengths, dtype=torch.int32)
    slopes = torch.rand(1, p.H, generator=g) * 0.02 if p.alibi else None
    sink = normal(p.H) if p.sink else None
    leaves = {"q": q, "k": k, "v": v, "b": bias, "s": sink}
    wanted = [x.requires_grad_() for letter, x in leaves.items() if x is not None and letter in p.grads]
    with gluon_twin.twin_device(processors, seed), override_configs(**configs), triflash.record_launches() as ran:
        out, lse = torch.ops.triflash.forward(
            q, k, v, bias, 1, *p.band, p.D**-0.5, "", "hopper", mask, lengths, slopes, sink, None, p.softcap
        )[:2]
        grads = torch.autograd.grad(out, wanted, dout) if wanted else ()
    assert all(line.startswith("hopper") for line in ran)
    found = [out.detach(), lse.detach(), *grads]
    for letter, grad in zip((c for c in "qkvbs" if c in p.grads and leaves[c] is not None), grads, strict=True):
        for b, n in enumerate(p.lengths):
            if letter in "kv":
                assert not grad[b, n:].any()
            if letter == "b" and p.bias[0] == "b" and p.bias[3] == "k":
                assert not grad[b, ..., n:].any()
    return found, kernels(ran)


def check(problem: Problem, seed: int = 0, **configs: Config) -> list[str]:
    """Junk changes nothing. (That the results are right where there are zeros is what ``test_hopper_twin.py`` is for.)"""
    clean, ran = run(problem, False, seed=seed, **configs)
    dirty, _ = run(problem, True, seed=seed + 1, **configs)
    added = "finish" in ran  # dq is added up in no fixed order
    for n, (a, b) in enumerate(zip(clean, dirty, strict=True)):
        assert not b.isnan().any()
        if added and n == 2:
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
        else:
            assert torch.equal(a, b), n
    return ran


def pairs(configs: list[Any], problems: list[Problem]) -> list[Any]:
    """All problems for the first configuration, and a third of them, others each time, for every further one."""
    chosen = [(c, p) for n, c in enumerate(configs) for m, p in enumerate(problems) if n == 0 or m % 3 == n % 3]
    return [pytest.param(c, p, id=f"{c}-{p}".replace(" ", "-")) for c, p in chosen]


FORWARD_CONFIGS = [
    None,
    HopperConfig(1, 64, 1),
    HopperConfig(2, 64, 3),
    HopperConfig(2, 64, 4, own_out=False, turns=True),
    HopperConfig(2, 128, 2, 2, turns=True),
    HopperConfig(3, 16, 2),
    HopperConfig(2, 128, 2, q_stages=2, turns=True),
]
FORWARD = [
    Problem("full", grads=""),
    Problem("causal, bias", band=(None, 0), N=150, bias="b1qk", grads="", sink=True),
    Problem("window, slopes", band=(-30, 40), alibi=True, H=4, Hk=2, grads=""),
    Problem("nothing on the left", band=(90, None), grads=""),
    Problem("soft cap", softcap=1.5, grads="", dtype=BF16),
    Problem("soft cap, bias of keys", softcap=1.5, bias="b11k", bias_dtype=F32, grads="", band=(None, 20)),
    Problem("mask beside a bias", bias="1hqk", mask="b11k", grads="", sink=True),
]


@pytest.mark.parametrize(("config", "problem"), pairs(FORWARD_CONFIGS, FORWARD))
def test_forward(config: HopperConfig | None, problem: Problem) -> None:
    check(problem, FORWARD.index(problem), **({} if config is None else {"forward": config}))


KEYS = [
    Problem("full"),
    Problem("full, slopes, grouped", H=4, Hk=2, alibi=True, Dv=32),
    Problem("causal, bias of keys", band=(None, 0), N=150, bias="b11k", sink=True, grads="qkvbs"),
    Problem("window", band=(-30, 40), bias="1h1k", bias_dtype=F32),
    Problem("soft cap", softcap=1.5, dtype=BF16),
    Problem("soft cap, bias", softcap=1.5, bias="b1qk", grads="qkv", band=(None, 60)),
    Problem("mask beside a bias", bias="1hqk", mask="b11k", grads="qkv"),
    Problem("keys alone", grads="k"),
    Problem("values alone", grads="v"),
    Problem("queries alone", grads="q"),
    Problem("bias of full shape", bias="bhqk", bias_dtype=F32, band=(None, 0)),
    Problem("bias of full shape, soft cap, mask", bias="bhqk", softcap=1.5, mask="b11k"),
]


@pytest.mark.parametrize(  # all problems with dq computed apart, and all by the consumers
    ("config", "problem"), pairs([KeysConfig(2, 2, 2, apart=True)], KEYS) + pairs([KeysConfig(2, 1), KeysConfig(2, 2, direct=True)], KEYS)
)
def test_keys_that_add_dq(config: KeysConfig, problem: Problem) -> None:
    check(problem, KEYS.index(problem), dqdkdv=config)


@pytest.mark.parametrize(
    ("config", "problem"), pairs([None, RowsConfig(2, 64, 2, 2, ahead=False), RowsConfig(1, 32, 2, own_out=False)], KEYS)
)
def test_dq_by_itself(config: RowsConfig | None, problem: Problem) -> None:
    check(problem, KEYS.index(problem), **({} if config is None else {"dq": config}))


@pytest.mark.parametrize("problem", KEYS, ids=str)
def test_wide_heads(problem: Problem) -> None:
    """Head dims above 128; in the plan's configurations."""
    ran = check(replace(problem, D=136, Dv=160 if problem.Dv == 32 else 136, M=70, lengths=(0, 1, 64, 65, 137, 999)), KEYS.index(problem))
    assert "dqdkdv" not in ran


TILES = [
    Problem("full", bias="1hqk"),
    Problem("causal, slopes", bias="1hqk", band=(None, 0), alibi=True, H=4, Hk=2),
    Problem("over heads, window", bias="b1qk", band=(-40, 60)),
    Problem("soft cap", bias="1hqk", softcap=1.5),
    Problem("soft cap, mask", bias="11qk", mask="b11k", softcap=1.5, dtype=BF16),
]


@pytest.mark.parametrize(("config", "problem"), pairs([None, RowsConfig(2, 64, 5, v_stages=4), RowsConfig(1, 32, 6, 2, v_stages=4)], TILES))
def test_gradients_of_a_bias_by_a_kernel_of_their_own(config: RowsConfig | None, problem: Problem) -> None:
    ran = check(problem, TILES.index(problem), **({} if config is None else {"dbias": config}))
    assert "dbias" in ran


@pytest.mark.parametrize("kernel, old", [
    ("forward", "clear_hidden(_, _)"),
    ("softmax", "s = hide_unseen(_, _, _, _, None, None, _, _, _)"),
    ("features", "fence_async_shared()"),
    ("backward", "clear_hidden(k_s.index(_).reshape(_), _)"),
    ("backward", "clear_hidden(v_s.index(_).reshape(_), _)"),
    ("wide", "clear_hidden(k_s.reshape(_), _)"),
    ("wide", "clear_hidden(v_s.reshape(_), _)"),
    ("dq", "clear_hidden(_, _)"),
    ("dq", "dp = hide_unseen(_, _, _, _, None, None, _, _, _)"),
    ("dbias", "s = hide_unseen(_, _, _, _, None, None, _, _, _)"),
    ("dbias", "dp = hide_unseen(_, _, _, _, None, None, _, _, _)"),
])  # fmt: skip
def test_each_of_these_is_needed(kernel: str, old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, kernel, old)
    problem = Problem("broken", softcap=1.5, N=130, lengths=(129, 65), bias="1hqk" if kernel == "dbias" else "")
    problem = (
        replace(problem, D=136, Dv=136) if kernel == "wide" else replace(problem, grads="") if kernel in ("forward", "softmax") else problem
    )
    assert noticed(lambda seed: check(problem, seed, **({"dqdkdv": KeysConfig(2, 2)} if kernel == "backward" else {})), 12)
