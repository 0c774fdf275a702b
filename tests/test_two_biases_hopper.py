"""Two biases on Hopper's kernels: one of tiles, over queries and keys, and one over keys alone, in either order. On the GPU, or on the CPU's
stand-in for it, judged as every backend is."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triflash
from cases import Case
from here import HAVE_TRITON, ON_HOPPER
from running import run_case
from triflash import UnsupportedError
from triflash.plan.kernels.dbias import DbiasConfig
from triflash.plan.kernels.dkdv import DkdvConfig, sums_by_mma
from triflash.plan.kernels.dq import DqConfig
from triflash.plan.kernels.forward import ForwardConfig
from triflash.plan.kernels.shared import row_by_mma
from triflash.plan.override import Config
from triflash.spec import AttentionSpec, BiasSpec

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not (ON_HOPPER if GPU else HAVE_TRITON), reason="neither such a GPU nor the interpreter that stands in for it"
)
BF16, F16, F32, BOOL = torch.bfloat16, torch.float16, torch.float32, torch.bool


def check(case: Case, device: torch.device, carefully: bool = False, **configs: Config | None) -> list[str]:
    """Run and judge a case with the plan's own tiles, but for the configurations given; the kernels that ran."""
    given = {name: config for name, config in configs.items() if config is not None}
    how: dict[str, Any] = {} if GPU else {"sms": 2}
    return run_case(replace(case, tiles=None), "hopper" if GPU else "stand-in", device, given, carefully, **how)


TILES = ["bihqk", "b1hqk", "1ihqk", "11hqk", "111qk", "bi1qk"]  # folding models' pair biases, and all else
ROWS = ["bi11k", "b111k", "1111k", "bih1k", "11h1k"]


@pytest.mark.parametrize("tile, row", [
    (tile, row) for at, (tile, row) in enumerate(itertools.product(TILES, ROWS)) if GPU or at % 3 == 0 or (tile, row) == ("b1hqk", "bi11k")
])  # fmt: skip
def test_every_pattern(tile: str, row: str, device: torch.device) -> None:
    """Both orders: what comes first in a call need not come first in a kernel."""
    case = Case("two", B=4, batch_inner=2, M=70, N=150, H=2, bias=tile, second=row)
    check(case, device)
    check(replace(case, bias=row, second=tile, bias_dtype=F32), device)


FEATURES = [
    Case("causal, float32 row", B=2, M=150, N=150, bias="1hqk", second="b11k", second_dtype=F32, causal=True),
    Case("window, float32 tile", B=2, M=100, N=190, bias="b1qk", second="111k", bias_dtype=F32, lo=-30, hi=60),
    Case("mask", B=2, M=100, N=150, bias="1hqk", second="b11k", mask="b11k"),
    Case("mask of queries", B=2, M=100, N=150, bias="bhqk", second="111k", mask="b1qk", hi=40),
    Case("lengths, sink", B=3, M=80, N=150, bias="b11k", second="1hqk", lengths=(150, 0, 77), sink=True, dlse=True),
    Case("slopes", B=2, M=100, N=150, bias="1hqk", second="b11k", alibi="bh", causal=True),
    Case("soft cap", B=2, M=100, N=150, bias="1hqk", second="b11k", softcap=3.0),
    Case("dropout", B=2, M=100, N=150, bias="1hqk", second="b11k", dropout=0.3, softcap=2.0),
    Case("grouped", B=2, M=100, N=150, H=4, Hk=2, bias="1hqk", second="bh1k"),
    Case("rows that see nothing", B=2, M=100, N=150, bias="b11k", second="1hqk", bias_values="all"),
    Case("hidden by -inf", B=2, M=100, N=150, bias="b11k", second="1hqk", bias_values="inf"),
    Case("hidden by the least number", B=2, M=100, N=150, bias="bh1k", second="1hqk", bias_dtype=BF16, bias_values="least", grads="qkvs"),
    Case("huge", B=2, M=100, N=150, bias="b11k", second="1hqk", bias_values="huge"),
    Case("odd rows", B=2, M=75, N=157, bias="1hqk", second="b11k", bias_layout="sliced"),
    Case("bf16", B=2, M=75, N=140, bias="1hqk", second="b11k", dtype=BF16),
    Case("float32 row of bf16", B=2, M=75, N=140, bias="1hqk", second="b11k", second_dtype=F32, dtype=BF16),
    Case("no scale", B=2, M=75, N=140, bias="1hqk", second="b11k", scale=0.0),
    Case("negative scale", B=2, M=75, N=140, bias="1hqk", second="b11k", scale=-0.3, dtype=BF16),
]  # fmt: skip


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features(case: Case, device: torch.device) -> None:
    if case.dtype == BF16 or GPU:
        check(case, device)
    else:
        check(case, device, carefully=True)


@pytest.mark.parametrize("D", [8, 64, 72, 136])
def test_head_dims(D: int, device: torch.device) -> None:
    case = Case("dims", B=2, M=130, N=200, D=D, bias="b11k", second="1hqk")
    check(case, device)
    check(replace(case, second="bhqk", hi=30), device)  # whose gradient leaves with dq


@pytest.mark.parametrize("configs", [
    dict(forward=ForwardConfig(2, 64, 2, 1, ping_pong=True), dqdkdv=DkdvConfig(2, 2, red_dq=True)),
    dict(forward=ForwardConfig(1, 128, 2, 2, separate_o=False), dqdkdv=DkdvConfig(1, 1)),
    dict(forward=ForwardConfig(2, 32, 3, 2, q_stages=2), dqdkdv=DkdvConfig(2, 2, 2, dq_warpgroup=True, unroll=2, kv_stages=2)),
    dict(dkdv=DkdvConfig(2, 2), dq=DqConfig(1, 64, 3, 2, 2, ctas_per_sm=2), dbias=DbiasConfig(1, 128, 4, 4, chunk=32, ctas_per_sm=2)),
    dict(dkdv=DkdvConfig(2, 1), dq=DqConfig(2, 32, 2, 2, 1, separate_dq=False, deferred=False), dbias=DbiasConfig(2, 64, 6, 6, 2)),
], ids="-".join)  # fmt: skip
def test_configurations(configs: dict[str, Config], device: torch.device) -> None:
    case = Case("configurations", B=2, M=200, N=250, D=32, bias="b11k", second="1hqk")
    ran = check(case, device, **configs)
    assert set(configs) & {"dqdkdv", "dkdv"} <= set(ran)


@pytest.mark.parametrize("grads", ["q", "kv", "b", "t", "bt", "qb", "kt"])
def test_single_gradients(grads: str, device: torch.device) -> None:
    for first, second in (("1hqk", "b11k"), ("b11k", "1hqk"), ("bh1k", "bhqk")):
        check(Case("single", B=2, M=100, N=150, bias=first, second=second, grads=grads), device)


def shaped(*shape: int, dtype: torch.dtype = BF16, wanted: bool = True) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype, requires_grad=wanted)


def test_the_plan() -> None:
    q, row, pair = shaped(1, 384, 384, 4, 32), shaped(1, 384, 1, 1, 384), shaped(1, 1, 4, 384, 384)
    for bias, names in (((row, pair), ("dbias", "dsecond")), ((pair, row), ("dsecond", "dbias"))):
        explained = triflash.explain(q, q, q, bias=bias, device="h100")
        assert explained.backend == explained.backward.backend == "hopper"
        of_keys, of_tiles = names
        gives = {step.step.kernel: step.step.gives for step in explained.backward.steps if "sum" not in step.step.kernel}
        assert gives["dbias"] == (of_tiles,) and of_keys in (gives["dqdkdv"] if "dqdkdv" in gives else gives["dkdv"])
        sums = sorted((step.step.gives, step.step.splits) for step in explained.backward.steps if step.step.kernel == "dbias_sum")
        assert sums == sorted(
            [((of_keys,), 4), ((of_tiles,), next(step.step.splits for step in explained.backward.steps if step.step.kernel == "dbias"))]
        )
        assert not explained.copies  # the sum is never there
        assert max(size for _, size in explained.memory) < 384 * 4 * 384 * 384 * 2


def test_rows_by_tensor_cores() -> None:
    """Not where no scale can be divided by, or a soft cap comes between; sums not where bfloat16 would lose what the bias or ds can hold."""
    tile, row = BiasSpec("bf16", (False, False, True, True, True)), BiasSpec("bf16", (True, True, False, False, True))
    spec = AttentionSpec("bf16", 1, 4, 384, 384, 4, 32, 32, tile, None, None, 32**-0.5, "ieee", second=row)
    assert row_by_mma(spec) and sums_by_mma(spec)
    for scale in (0.0, 1e-30, 1e30):
        other = replace(spec, scale=scale)
        assert not row_by_mma(other) and sums_by_mma(other)
    assert row_by_mma(replace(spec, scale=-2.0))
    for other in (replace(spec, softcap=20.0), replace(spec, second=None)):
        assert not row_by_mma(other) and not sums_by_mma(other)
    for other in (replace(spec, dtype="fp16"), replace(spec, second=replace(row, dtype="fp32"))):
        assert row_by_mma(other) and not sums_by_mma(other)


def test_parts_fill_whole_waves() -> None:
    """Of the loops of dbias, each of two programs an SM: 72 tiles of 384 rounds cut in 4 gave 24 of 264 programs twice as much as the rest."""
    for rows, heads, loads in ((384, 4, 36 * 3), (128, 8, 30 * 3)):
        q, pair = shaped(1, rows, 384, heads, 32), shaped(1, 1, heads, 384, 384)
        explained = triflash.explain(q, q, q, bias=pair, device="h100")
        step = next(step.step for step in explained.backward.steps if step.step.kernel == "dbias")
        tiles = heads * 6 * 3 * step.splits
        assert step.programs == 264 and -(-tiles // 264) * -(-rows // step.splits) < loads


@pytest.mark.parametrize("first, second", [
    ((1, 8, 4, 256, 256), (1, 1, 4, 256, 256)), ((1, 8, 1, 1, 256), (1, 1, 4, 1, 256)), ((1, 1, 4, 256, 1), (1, 8, 1, 1, 256)), ((1, 1, 4, 256, 256), (1, 8, 1, 1, 1)),
])  # fmt: skip
def test_other_pairs_are_for_triton(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    q, a, b = shaped(1, 8, 256, 4, 64), shaped(*first), shaped(*second)
    explained = triflash.explain(q, q, q, bias=(a, b), device="h100")
    assert explained.backend == "triton" and "two biases other than one over queries and keys and one over keys alone" in str(explained)
    with pytest.raises(UnsupportedError, match="two biases other than one"):
        triflash.explain(q, q, q, bias=(a, b), device="h100", backend="hopper")
