"""All Hopper kernels, by the plans and launches that a GPU would get, on the CPU's stand-in for it (``gluon_twin.py``), judged as every
backend is. Few processors, so that a program has several tiles and its buffers and barriers wrap around."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import gluon_twin
import triflash
from cases import Case, build, judge, kernels
from pairwise import pairwise
from triflash.bench.tolerance import assert_close
from triflash.plan.hopper import HopperConfig
from triflash.plan.hopper_backward import KeysConfig
from triflash.plan.override import Config, override_configs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for the GPU that there is, or without Triton's interpreter")

CPU, BF16, F16, F32, BOOL = torch.device("cpu"), torch.bfloat16, torch.float16, torch.float32, torch.bool


def check(case: Case, processors: int = 2, seed: int = 0, **configs: Config) -> list[str]:
    """Run and judge a case; the kernels that ran."""
    inputs = build(case, CPU)
    if inputs.alibi_slopes is not None:
        inputs.alibi_slopes.mul_(0.02)  # far from the diagonal, all would be lost beside a sink
    wanted = inputs.wanted()
    with gluon_twin.twin_device(processors, seed), override_configs(**configs), triflash.record_launches() as ran:
        x, options = inputs.operands(), (case.batch_inner, *case.band, case.softmax_scale, "", "hopper")
        out, lse = torch.ops.triflash.forward(*x[:4], *options, *x[4:])[:2]  # the seed's functions would be deterministic here
        outputs, cotangents = ([out], [inputs.dout]) if inputs.dlse is None else ([out, lse], [inputs.dout, inputs.dlse])
        grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents) if wanted else ()
    for kernel, config in configs.items():
        assert kernel not in kernels(ran) or f"hopper: {kernel} {config}" in ran
    judgements = judge(case, inputs)
    assert_close("out", out.detach(), judgements["out"])
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


AXES: dict[str, list[Any]] = {
    "lengths": [(65, 150), (150, 65), (192, 256), (1, 130), (200, 1), (130, 290)],
    "heads": [(1, 1), (2, 2), (4, 2), (4, 1)],  # of queries, of keys
    "batch": [(1, 1), (3, 1), (2, 2)],  # outer, inner
    "dims": [(16, 16), (64, 64), (24, 40), (40, 8), (72, 72)],
    "dtype": [F16, BF16],
    "bias": [None, None, "bihqk", "b1hqk", "11hqk", "1i1qk", "11h1k", "b111k"],
    "bias_dtype": [None, F32, BOOL],
    "bias_values": ["normal", "rows", "inf"],
    "band": [(None, None), (None, 0), (-70, 40), (-30, None), (None, -60), (None, 90)],
    "scale": [None, -0.4],
    "lengths_shown": [None, (0, 60, 999), (128, 1)],
    "alibi": [None, "h", "bh"],
    "sink": [False, True],
    "dlse": [False, True],
    "grads": ["qkvbs", "qkvbs", "b", "qv", "kb", "k", "v", "qs"],
    "layout": ["plain", "plain", "mixed"],
    "processors": [1, 2, 3],
    "keys": [None, *KEYS_CONFIGS],
    "forward": [None, HopperConfig(1, 64, 2), HopperConfig(2, 64, 2, turns=True), HopperConfig(3, 32, 2), HopperConfig(2, 128, 1, 2)],
}
ROWS = pairwise({name: range(len(values)) for name, values in AXES.items()}, seed=7)


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_features_together(number: int) -> None:
    row = {name: AXES[name][at] for name, at in ROWS[number].items()}
    (M, N), (H, Hk), (outer, inner), (D, Dv), (lo, hi) = (row[name] for name in ("lengths", "heads", "batch", "dims", "band"))
    if row["bias_dtype"] == BOOL and row["bias_values"] == "inf":
        row["bias_values"] = "normal"
    row["dlse"] = row["dlse"] and row["grads"] != "v"  # which lse does not depend on
    plain = ("dtype", "bias", "bias_dtype", "bias_values", "scale", "alibi", "sink", "dlse", "grads", "layout")
    sizes = dict(B=outer * inner, M=M, N=N, H=H, Hk=Hk, D=D, Dv=Dv, lo=lo, hi=hi, batch_inner=inner, lengths=row["lengths_shown"])
    configs = {name: row[key] for name, key in (("dqdkdv", "keys"), ("forward", "forward")) if row[key] is not None}
    check(Case(f"together {number}", seed=number, **sizes, **{name: row[name] for name in plain}), row["processors"], number, **configs)
