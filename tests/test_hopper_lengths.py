"""Key lengths on Hopper: blocks are loaded whole, and what a length hides, NaN included, reaches no result. Every kernel, by its own source on
the CPU (``gluon_twin.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from cases import Case
from here import stand_in_only
from mutations import mutate, noticed
from running import run_hidden
from table import DBIAS_CONFIGS, FORWARD_CONFIGS
from triflash.plan.kernels.dbias import DbiasConfig
from triflash.plan.kernels.dkdv import DkdvConfig
from triflash.plan.kernels.dq import DqConfig
from triflash.plan.kernels.forward import ForwardConfig
from triflash.plan.override import Config

pytestmark = stand_in_only

BF16, F32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")
LENGTHS = (0, 1, 63, 64, 65, 128, 199, 999)  # one more than N among them


def problem(name: str, **options: Any) -> Case:
    usual: dict[str, Any] = dict(B=len(LENGTHS), M=130, N=200, H=2, Hk=1, lengths=LENGTHS, grads="qkvb", tiles=None)
    return Case(name, **usual | options)


def check(case: Case, seed: int = 0, **configs: Config | None) -> list[str]:
    given = {name: config for name, config in configs.items() if config is not None}
    return run_hidden(case, "stand-in", CPU, given, seed, sms=3)


def pairs(configs: Sequence[Any], problems: list[Case]) -> list[Any]:
    """All problems for the first configuration, and a third of them, others each time, for every further one."""
    chosen = [(c, p) for n, c in enumerate(configs) for m, p in enumerate(problems) if n == 0 or m % 3 == n % 3]
    return [pytest.param(c, p, id=f"{c}-{p}".replace(" ", "-")) for c, p in chosen]


FORWARD = [
    problem("full", grads=""),
    problem("causal, bias", causal=True, N=150, bias="b1qk", grads="", sink=True),
    problem("window, slopes", lo=-30, hi=40, alibi="h", H=4, Hk=2, grads=""),
    problem("nothing on the left", lo=90, grads=""),
    problem("soft cap", softcap=1.5, grads="", dtype=BF16),
    problem("soft cap, bias of keys", softcap=1.5, bias="b11k", bias_dtype=F32, grads="", hi=20),
    problem("mask beside a bias", bias="1hqk", mask="b11k", grads="", sink=True),
]


@pytest.mark.parametrize(("config", "case"), pairs([None, *FORWARD_CONFIGS[1::2]], FORWARD))
def test_forward(config: ForwardConfig | None, case: Case) -> None:
    check(case, FORWARD.index(case), forward=config)


KEYS = [
    problem("full"),
    problem("full, slopes, grouped", H=4, Hk=2, alibi="h", Dv=32),
    problem("causal, bias of keys", causal=True, N=150, bias="b11k", sink=True, grads="qkvbs"),
    problem("window", lo=-30, hi=40, bias="1h1k", bias_dtype=F32),
    problem("soft cap", softcap=1.5, dtype=BF16),
    problem("soft cap, bias", softcap=1.5, bias="b1qk", grads="qkv", hi=60),
    problem("mask beside a bias", bias="1hqk", mask="b11k", grads="qkv"),
    problem("keys alone", grads="k"),
    problem("values alone", grads="v"),
    problem("queries alone", grads="q"),
    problem("bias of full shape", bias="bhqk", bias_dtype=F32, causal=True),
    problem("bias of full shape, soft cap, mask", bias="bhqk", softcap=1.5, mask="b11k"),
]


@pytest.mark.parametrize(  # all problems with dq computed apart, and all by the consumers
    ("config", "case"),
    pairs([DkdvConfig(2, 2, 2, dq_warpgroup=True)], KEYS) + pairs([DkdvConfig(2, 1), DkdvConfig(2, 2, red_dq=True)], KEYS),
)
def test_keys_that_add_dq(config: DkdvConfig, case: Case) -> None:
    check(case, KEYS.index(case), dqdkdv=config)


@pytest.mark.parametrize(
    ("config", "case"), pairs([None, DqConfig(2, 64, 2, 2, 2, deferred=False), DqConfig(1, 32, 2, 2, separate_dq=False)], KEYS)
)
def test_dq_by_itself(config: DqConfig | None, case: Case) -> None:
    check(case, KEYS.index(case), dq=config)


@pytest.mark.parametrize("case", KEYS, ids=str)
def test_wide_heads(case: Case) -> None:
    """Head dims above 128; in the plan's configurations."""
    wide = replace(case, B=6, M=70, D=136, Dv=160 if case.Dv == 32 else None, lengths=(0, 1, 64, 65, 137, 999))
    ran = check(wide, KEYS.index(case))
    assert "dqdkdv" not in ran


TILES = [
    problem("full", bias="1hqk"),
    problem("causal, slopes", bias="1hqk", causal=True, alibi="h", H=4, Hk=2),
    problem("over heads, window", bias="b1qk", lo=-40, hi=60),
    problem("soft cap", bias="1hqk", softcap=1.5),
    problem("soft cap, mask", bias="11qk", mask="b11k", softcap=1.5, dtype=BF16),
]


@pytest.mark.parametrize(("config", "case"), pairs(DBIAS_CONFIGS, TILES))
def test_gradients_of_a_bias_by_a_kernel_of_their_own(config: DbiasConfig | None, case: Case) -> None:
    ran = check(case, TILES.index(case), dbias=config)
    assert "dbias" in ran


@pytest.mark.parametrize("kernel, old", [
    ("forward", "clear_masked_block(_, _)"),
    ("softmax", "s = mask_band(_, _, _, _, None, None, _, _, _)"),
    ("features", "fence_async_shared()"),
    ("dkdv", "clear_masked(p.k_s.index(_).reshape(_), _)"),
    ("dkdv", "clear_masked(p.v_s.index(_).reshape(_), _)"),
    ("dkdv_d256", "clear_masked_block(as_rows(p.k_s, _), _)"),
    ("dkdv_d256", "clear_masked_block(as_rows(p.v_s, _), _)"),
    ("dq", "clear_masked_block(_, _)"),
    ("blocks", "clear_masked(block.second, visible)"),
    ("dq", "dp = mask_band(_, _, _, _, None, None, _, _, _)"),
    ("dbias", "s = mask_band(_, _, _, _, None, None, _, _, _)"),
    ("dbias", "dp = mask_band(_, _, _, _, None, None, _, _, _)"),
])  # fmt: skip
def test_each_of_these_is_needed(kernel: str, old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, kernel, old)
    assert noticed(lambda seed: run_breakable(kernel, seed), 12)


def run_breakable(kernel: str, seed: int) -> None:
    bias = "1hqk" if kernel == "dbias" else None
    case = problem("broken", B=2, N=130, lengths=(129, 65), D=136 if kernel == "dkdv_d256" else 16, softcap=1.5, bias=bias)
    case = replace(case, grads="") if kernel in ("forward", "softmax", "blocks") else case
    if kernel == "blocks":
        check(replace(case, D=72), seed, forward=ForwardConfig(2, 64, 2, own_widths=True))
        return
    check(case, seed, dqdkdv=DkdvConfig(2, 2) if kernel == "dkdv" else None)


@pytest.mark.parametrize("kernel", ["forward", "features", "dkdv", "dkdv_d256", "dbias", "blocks"])
def test_unbroken_ones_are_right(kernel: str) -> None:
    run_breakable(kernel, 0)
