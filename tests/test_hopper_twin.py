"""All Hopper kernels, by the plans and launches that a GPU would get, on the CPU's stand-in for it (``gluon_twin.py``), judged as every
backend is. Few processors, so that a program has several tiles and its buffers and barriers wrap around."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

import gluon_twin
import triflash
from cases import Case, attend, build, judge, kernels
from triflash.bench.tolerance import assert_close
from triflash.plan.hopper_backward import KeysConfig
from triflash.plan.override import Config, override_configs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for the GPU that there is, or without Triton's interpreter")

CPU, F32, BOOL = torch.device("cpu"), torch.float32, torch.bool


def check(case: Case, processors: int = 2, seed: int = 0, **configs: Config) -> list[str]:
    """Run and judge a case; the kernels that ran."""
    inputs = build(case, CPU)
    wanted = inputs.wanted()
    with gluon_twin.twin_device(processors, seed), override_configs(**configs), triflash.record_launches() as ran:
        out, lse = attend(case, inputs, "hopper")
        outputs, cotangents = ([out], [inputs.dout]) if inputs.dlse is None else ([out, lse], [inputs.dout, inputs.dlse])
        grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents) if wanted else ()
    for kernel, config in configs.items():
        assert kernel not in kernels(ran) or f"hopper: {kernel} {config}" in ran
    judgements = judge(case, inputs)
    assert_close("out", out.detach(), judgements["out"])
    if lse is not None:
        assert_close("lse", lse.detach(), judgements["lse"])
    for letter, grad in zip(wanted, grads, strict=True):
        assert_close("d" + letter, grad, judgements["d" + letter])
    return kernels(ran)


KEYS_CONFIGS = [
    KeysConfig(*stages, early=early)
    for stages, early in itertools.product([(1, 1), (2, 1), (2, 2), (2, 2, 2)], [False, True])
]  # fmt: skip
KEYS = [
    Case("full", B=2, M=130, N=150, H=2),
    Case("causal, wide bias", B=2, M=200, N=200, bias="1hqk", causal=True, grads="qkv"),
    Case("window, bias of keys", B=2, M=150, N=300, bias="1h1k", lo=-40, hi=120),
    Case("grouped, lengths, slopes", B=3, M=140, N=200, H=4, Hk=2, lengths=(70, 0, 200), alibi="h", dlse=True),
    Case("mask, sink", B=2, M=100, N=260, bias="b1qk", bias_dtype=BOOL, bias_values="rows", sink=True, hi=60),
]


@pytest.mark.parametrize("case", KEYS, ids=str)
@pytest.mark.parametrize("config", KEYS_CONFIGS, ids=lambda c: str(c).replace(" ", "-"))
def test_keys_that_add_dq(config: KeysConfig, case: Case) -> None:
    ran = check(case, dqdkdv=config)
    assert [kernel for kernel in ran if kernel != "dbias_sum"] == ["forward", "prepare", "dqdkdv", "finish"]
