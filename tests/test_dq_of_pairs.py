"""dq summed in shared memory by programs that have whole (batch, head) pairs (``kernels/hopper/dq_of_pairs.py``). On the GPU, or on the CPU's
stand-in for it, judged as every backend is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from cases import Case, build
from here import HAVE_TRITON, ON_HOPPER, stand_in_only
from mutations import mutate, noticed
from running import results_of, run_case
from triflash.plan.device import NAMED_DEVICES
from triflash.plan.kernels.dkdv import DkdvConfig, l2_order, of_pairs
from triflash.plan.kernels.mask_bounds import CONFIG as MASK_BOUNDS
from triflash.plan.override import Config, override_configs
from triflash.plan.select import plan_backward
from triflash.spec import AttentionSpec, BiasSpec, Needs

CPU, GPU = torch.device("cpu"), torch.cuda.is_available()
runs = pytest.mark.skipif(not (ON_HOPPER if GPU else HAVE_TRITON), reason="neither such a GPU nor the interpreter that stands in for it")
BF16, F16, F32, BOOL = torch.bfloat16, torch.float16, torch.float32, torch.bool
H200 = NAMED_DEVICES["h200"]
PAIRS = DkdvConfig(2, 2, dq_warpgroup=True, dq_blocks=4)
BIASED = replace(PAIRS, bias_stages=2, kv_stages=2)
WITHOUT_DQ_SUM = ["forward", "preprocess", "dqdkdv"]


def check(
    case: Case, device: torch.device, config: DkdvConfig = PAIRS, carefully: bool = False, seed: int = 0, **configs: Config
) -> list[str]:
    """Run and judge a case; the kernels that ran. Two programs have its pairs on the stand-in."""
    if GPU:
        case = replace(case, dtype=BF16 if case.dtype == F16 else case.dtype)
    how: dict[str, Any] = {} if GPU else {"sms": 2, "seed": seed}
    given = {"dqdkdv": config, **configs}
    return run_case(replace(case, tiles=None), "hopper" if GPU else "stand-in", device, given, carefully, **how)


CASES = [
    Case("whole tiles", B=2, M=128, N=256, H=2, D=64),
    Case("odd lengths", B=3, M=131, N=201, H=1, D=40, Dv=24),
    Case("a tile of each", B=3, M=64, N=128, H=1, D=32, grads="qk"),
    Case("fewer queries than a block", B=2, M=37, N=300, H=2, D=16, grads="qv"),
    Case("causal", B=2, M=250, N=250, H=2, D=32, causal=True),
    Case("causal, queries that see nothing", B=1, M=250, N=131, H=3, D=32, hi=-40),
    Case("window", B=2, M=190, N=330, H=1, D=64, lo=-40, hi=30),
    Case("keys that nobody sees", B=1, M=70, N=400, H=3, D=32, lo=0, hi=90),
    Case("lengths", B=3, M=150, N=300, H=1, D=64, lengths=(300, 0, 77)),
    Case("slopes", B=2, M=150, N=190, H=2, D=32, alibi="bh", causal=True),
    Case("sink", B=2, M=150, N=190, H=2, D=32, sink=True, dlse=True),
    Case("soft cap", B=2, M=100, N=190, H=2, D=32, softcap=3.0),
    Case("dropout", B=2, M=100, N=190, H=2, D=64, dropout=0.3),
    Case("batches of batches", B=4, batch_inner=2, M=70, N=150, H=2, D=32),
    Case("strided", B=2, M=70, N=150, H=2, D=32, layout="sliced", dout_layout="sliced"),
    Case("negative scale", B=2, M=100, N=190, H=2, D=64, scale=-0.3),
    Case("large", B=2, M=100, N=190, H=2, D=64, magnitude=30.0),
    Case("blocks in turn", B=3, M=190, N=400, H=1, D=32),
]


@runs
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case, device: torch.device) -> None:
    assert check(case, device) == WITHOUT_DQ_SUM


@runs
@pytest.mark.parametrize("case", [
    Case("of heads", B=3, M=100, N=190, H=2, D=32, bias="1hqk"),
    Case("of pairs, of each entry", B=4, batch_inner=2, M=100, N=190, H=2, D=24, bias="b1hqk"),
    Case("two", B=4, batch_inner=2, M=70, N=150, H=2, bias="b1hqk", second="bi11k"),
    Case("of keys", B=2, M=100, N=190, H=2, D=32, bias="bh1k"),
    Case("beside a mask", B=2, M=100, N=190, H=2, D=32, bias="1hqk", mask="b1qk", causal=True),
], ids=str)  # fmt: skip
def test_biases(case: Case, device: torch.device) -> None:
    ran = check(case, device, BIASED)
    assert [kernel for kernel in ran if kernel not in ("dbias", "dbias_sum")] == WITHOUT_DQ_SUM


@runs
@pytest.mark.parametrize("shown", ["", "documents", "one", "none"])
def test_masks(shown: str, device: torch.device) -> None:
    case = Case("masked", B=2, M=150, N=270, H=2, D=32, bias="b1qk", bias_dtype=BOOL, shown=shown)
    for bounds in ({}, {"mask_bounds": MASK_BOUNDS}):
        ran = check(case, device, BIASED, **bounds)
        assert [kernel for kernel in ran if kernel != "mask_bounds"] == WITHOUT_DQ_SUM


@runs
@pytest.mark.parametrize(
    "config", [replace(PAIRS, dq_blocks=3), replace(PAIRS, unroll=2, kv_stages=2), replace(PAIRS, q_stages=1, o_stages=1)], ids=str
)
def test_configurations(config: DkdvConfig, device: torch.device) -> None:
    check(Case("configured", B=2, M=190, N=270, H=2, D=64), device, config, carefully=True)
    check(Case("configured, causal", B=2, M=190, N=190, H=2, D=32, causal=True), device, config, carefully=True)


@runs
def test_the_same_bits_in_every_run(device: torch.device) -> None:
    """dq, too, and whichever programs have the pairs: a pair's key tiles come in order."""
    case = Case("again", B=2, M=190, N=400, H=3, D=64, dtype=BF16 if GPU else F16, tiles=None)
    backend, inputs = "hopper" if GPU else "stand-in", build(case, device)
    found = [results_of(case, inputs, backend, {"dqdkdv": PAIRS}, **({} if GPU else {"sms": sms, "seed": sms}))[0][0] for sms in (1, 2, 3)]
    assert all(torch.equal(found[0][name], each[name]) for each in found[1:] for name in ("dq", "dk", "dv"))


@stand_in_only
@pytest.mark.parametrize("kernel, old, new", [
    ("dq_of_pairs", "p.dq_s.index(block).store(nothing)", "pass"),
    ("dq_of_pairs", "own.store(dq)", "pass"),
    ("dq_of_pairs", "bar_sync(DS_HERE + slot, 384)", "pass"),
    ("dq_of_pairs", "own.load(S) * factor", "own.load(S)"),
    ("dq_of_pairs", "tma_store_wait(0)", "pass"),
    ("dq_of_pairs", "turned(p, step, steps, begin, whole, part, bare, n0, BM)", "begin + step"),
    ("schedule", "wave % self.tiles_each == _", "wave % self.tiles_each == 0"),
])  # fmt: skip
def test_each_of_these_is_needed(kernel: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, kernel, old, new)
    assert noticed(lambda seed: check(CASES[(0, 1, -1)[seed % 3]], CPU, seed=seed), 6)


def spec(B: int = 384, H: int = 4, M: int = 384, N: int = 384, D: int = 32, **more: Any) -> AttentionSpec:
    sizes = {"batch_outer": B, "batch_inner": 1, "heads": H, "queries": M, "keys": N, "head_dim": D, "value_dim": D}
    return AttentionSpec(**sizes, dtype="bf16", **{"lo": None, "hi": None, "bias": None, "scale": 0.1, "precision": "", **more})


BIAS = BiasSpec("bf16", (False, False, True, True, True))


def test_the_plan() -> None:
    def names(given: AttentionSpec, needs: Needs | None = None) -> list[str]:
        needs = needs or Needs(True, True, True, given.bias is not None)
        return [*dict.fromkeys(step.kernel for step in plan_backward(given, needs, H200, "hopper").steps)]

    triangle = spec(bias=BIAS)
    assert names(triangle) == ["preprocess", "dqdkdv", "dbias", "dbias_sum"]
    assert names(replace(triangle, deterministic=True)) == names(triangle)
    step = plan_backward(triangle, Needs(True, True, True, True), H200, "hopper").step("dqdkdv")
    assert step is not None and isinstance(step.config, DkdvConfig)
    assert step.config.dq_blocks == 8 and step.programs == 132 and step.config.shared_memory(triangle, step.gives) <= H200.shared_memory
    causal = spec(B=384, H=4, M=384, N=384, D=64, hi=0)
    causal_step = plan_backward(causal, Needs(True, True, True, False), H200, "hopper").step("dqdkdv")
    assert causal_step is not None and isinstance(causal_step.config, DkdvConfig) and causal_step.config.dq_blocks
    assert l2_order(causal, causal_step.config, causal_step.programs) == (1, 0)  # nothing is simulated for what has none
    assert names(spec(M=2048, N=2048)) == ["preprocess", "dqdkdv", "postprocess"]  # more queries than there is room for
    assert names(spec(H=8, groups=4)) == ["preprocess", "dqdkdv", "postprocess"]
    assert names(spec(B=1, H=140)) == ["preprocess", "dqdkdv", "postprocess"]  # 8 of 132 programs would have two pairs
    assert names(spec(B=1, H=2)) == ["preprocess", "dqdkdv", "postprocess"]
    assert names(spec(D=128)) == ["preprocess", "dkdv", "dq"]
    assert names(spec(bias=BiasSpec("bf16", (True,) * 5))) == ["preprocess", "dkdv", "dq"]  # which has to write every ds
    assert names(spec(), Needs(True, False, False, False)) == ["preprocess", "dq"]


@pytest.mark.parametrize("M", [1, 64, 65, 129, 300, 384, 500, 700, 900, 1100])
@pytest.mark.parametrize("D", [16, 32, 40, 64])
def test_blocks_cover_all_queries(M: int, D: int) -> None:
    for bias in (None, BIAS):
        given = spec(M=M, N=4096, D=D, bias=bias)
        config = of_pairs(given, H200, {}, ("dk", "dv", "dq"))
        if config is not None:
            assert M <= 64 * config.dq_blocks < M + 256 and config.shared_memory(given, ("dq",)) <= H200.shared_memory
    assert (of_pairs(spec(M=M, N=4096, D=D), H200, {}, ("dk", "dv", "dq")) is not None) == ((1024 if D <= 32 else 512) >= M)


def test_what_is_refused(device: torch.device) -> None:
    for wrong in ({"dq_warpgroup": False}, {"head_splits": 2}, {"dq_blocks": 17}, {"dq_blocks": -1}):
        with pytest.raises(ValueError, match="dq_blocks"):
            replace(PAIRS, **wrong)
    for given in (spec(M=300), spec(H=4, groups=2, M=64)):
        with override_configs(dqdkdv=PAIRS), pytest.raises(ValueError, match="dq_blocks"):
            plan_backward(given, Needs(True, True, True, False), H200, "hopper")
