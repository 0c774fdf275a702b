"""The Hopper kernels dq and dbias against the dense formula in float64, by their launches as ``launch/hopper_dq.py`` and ``launch/hopper_dbias.py`` build them.

On the GPU that they are for they run on it; without a GPU their source runs on the CPU (``gluon_twin.py``).
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import gluon_twin
from cases import Case, Inputs, build, with_layout
from expected import spec_of_case
from here import ON_HOPPER, hopper_only
from mutations import mutate, noticed
from running import assert_right, named_gradients
from triflash import oracle
from triflash.launch.calls import Call, start
from triflash.launch.hopper_dbias import dbias_call
from triflash.launch.hopper_dq import dq_call
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.kernels import dbias as dbias_plan
from triflash.plan.kernels import dq as dq_plan
from triflash.plan.kernels.dbias import DbiasConfig
from triflash.plan.kernels.dq import DqConfig
from triflash.plan.kernels.shared import STATS_MULTIPLE
from triflash.plan.steps import broadcast_rows
from triflash.spec import AttentionSpec, spec_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available() and not ON_HOPPER, reason="needs an sm90 GPU, or none at all")

BF16, F16, F32, BOOL = torch.bfloat16, torch.float16, torch.float32, torch.bool
LIMIT = 232448


def problem(band: tuple[int | None, int | None] = (None, None), group: int = 1, **options: Any) -> Case:
    """group: query heads of a key head."""
    usual: dict[str, Any] = dict(B=2, M=200, N=150, H=2, D=64, dtype=BF16, lo=band[0], hi=band[1])
    usual |= options
    return Case("rows", **usual, Hk=usual["H"] // group, layout="padded", dout_layout="padded", bias_layout="padded")


def statistics(case: Case, x: Inputs, spec: AttentionSpec) -> Tensor:
    """What ``preprocess`` would have left, from exact results. The split of lse into lse and rest is a random one."""
    options = {"batch_inner": case.batch_inner, "lo": spec.lo, "hi": spec.hi, "scale": spec.scale}
    with torch.no_grad():
        out, lse = oracle.attention(**x.operands().dense, **options)
    lse, delta = lse * 1.4426950408889634, (out * x.dout.double()).sum(-1).mT
    rest = torch.zeros_like(lse)
    if spec.keeps_rest:
        rest = torch.rand(lse.shape, generator=torch.Generator().manual_seed(case.seed)).to(lse.device)
    rows = [torch.where(lse == -torch.inf, torch.inf, lse - rest), delta, *([rest] if spec.keeps_rest else [])]
    B, H, M = lse.shape
    stats = torch.zeros((B * H, len(rows), -(-M // STATS_MULTIPLE) * STATS_MULTIPLE), device=lse.device)
    stats[:, 0] = torch.inf
    stats[..., :M] = torch.stack(rows, 2).flatten(0, 1)
    return stats


def carry_out(call: Call, device: torch.device, seed: int = 0) -> None:
    if device.type == "cuda":
        start(device, [call])
    else:
        gluon_twin.run(call, seed)


def empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return with_layout(tuple(x.shape), "padded", lambda shape: x.new_full(shape, torch.nan, dtype=dtype or x.dtype))


def run_dq(case: Case, device: torch.device, config: DqConfig | None = None, sms: int = 2, seed: int = 0) -> Call:
    """dq, and dbias if the bias is of full shape."""
    case = replace(case, seed=seed)
    x = build(case, device)
    spec = spec_of_case(case, x)
    given = {"q": x.q} | ({"b": x.bias} if "b" in x.wanted() and spec.bias is not None and all(spec.bias.varies) else {})
    config = config or dq_plan.choose(spec, LIMIT, ("dq", "dbias") if "b" in given else ("dq",))
    assert config is not None
    grads = {letter: empty(leaf) for letter, leaf in given.items() if leaf is not None}
    programs = dq_plan.programs(spec, config, sms)
    call = dq_call(spec, config, programs, x.q, x.k, x.v, x.bias, x.dout, statistics(case, x, spec), grads["q"], grads.get("b"))
    carry_out(call, device, seed)
    assert_right(case, x, named_gradients(grads, grads.values()))
    return call


def run_dbias(case: Case, device: torch.device, config: DbiasConfig | None = None, sms: int = 2, splits: int = 1, seed: int = 0) -> Call:
    case = replace(case, seed=seed)
    x = build(case, device)
    spec = spec_of_case(case, x)
    assert dbias_plan.why_not(spec, KNOWN_DEVICES["sm90"]) is None and x.bias is not None and "b" in x.wanted()
    config = config or dbias_plan.choose(spec, LIMIT)
    assert config is not None
    splits = min(splits, broadcast_rows(spec))
    shape = x.bias.new_empty(splits, *x.bias.shape)
    parts = empty(shape) if splits == 1 else torch.full_like(shape, torch.nan, dtype=F32)
    programs = dbias_plan.programs(spec, config, splits, sms)
    call = dbias_call(spec, config, programs, splits, x.q, x.k, x.v, x.bias, x.dout, statistics(case, x, spec), parts)
    carry_out(call, device, seed)
    assert_right(case, x, {"db": parts.double().sum(0).to(x.bias.dtype)})
    return call


BANDS = [(None, None), (None, 0), (-70, 20), (None, -60), (40, None), (-30, -10), (None, 400)]


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("sizes", [(257, 321), (321, 257), (128, 128)], ids=str)
def test_bands(band: tuple[int | None, int | None], sizes: tuple[int, int], device: torch.device) -> None:
    case = problem(M=sizes[0], N=sizes[1], band=band)
    run_dq(case, device, sms=3)
    run_dq(replace(case, bias="b1hqk"), device, sms=3)
    run_dbias(replace(case, bias="11hqk"), device, sms=3)
    run_dbias(replace(case, bias="11hqk"), device, sms=5, splits=2)


@pytest.mark.parametrize("M", [1, 2, 63, 64, 65, 127, 128, 129, 193])
@pytest.mark.parametrize("N", [1, 31, 64, 65, 128, 200])
def test_lengths(M: int, N: int, device: torch.device) -> None:
    for band in ((None, None), (None, 0)):
        run_dq(problem(B=1, M=M, N=N, bias="b1hqk", band=band), device)
        run_dbias(problem(M=M, N=N, D=32, Dv=32, bias="11hqk", band=band), device)


BIASES = [
    *((bias, None) for bias in ("b1hqk", "11hqk", "b11qk", "111qk", "11h1k", "b111k", "11hq1", "11111")),
    *((bias, F32) for bias in ("b1hqk", "11hqk", "11h1k", "11hq1")),
    *((bias, BOOL) for bias in ("b1hqk", "111qk", "b111k", "11hq1")),
]


@pytest.mark.parametrize("bias, bias_dtype", BIASES, ids=str)
def test_biases(bias: str, bias_dtype: torch.dtype | None, device: torch.device) -> None:
    for D, band, dtype in ((128, (None, 0), BF16), (64, (None, None), F16)):
        case = problem(B=3, D=D, Dv=D, bias=bias, bias_dtype=bias_dtype, band=band, dtype=dtype)
        run_dq(case, device)
        if bias[3:] == "qk" and bias != "b1hqk" and bias_dtype != BOOL:
            run_dbias(case, device)
            run_dbias(case, device, splits=3)


@pytest.mark.parametrize("bias", ["bihqk", "1ihqk", "b1hqk", "1i1qk", "b11qk", "11hqk"])
def test_two_levels_of_batch(bias: str, device: torch.device) -> None:
    case = problem(B=6, M=70, N=70, batch_inner=2, bias=bias)
    run_dq(case, device)
    if bias != "bihqk":
        run_dbias(case, device)
        run_dbias(case, device, splits=2)


@pytest.mark.parametrize("dims", [(256, 256), (192, 128), (16, 256), (256, 16), (80, 80), (32, 32), (8, 96)], ids=str)
def test_head_dims(dims: tuple[int, int], device: torch.device) -> None:
    for dtype, bias_dtype in ((BF16, None), (F16, F32)):
        case = problem(M=130, N=130, D=dims[0], Dv=dims[1], dtype=dtype, band=(None, 0))
        run_dq(case, device)
        run_dq(replace(case, bias="b1hqk", bias_dtype=bias_dtype), device)
        run_dbias(replace(case, bias="11hqk", bias_dtype=bias_dtype), device)


@pytest.mark.parametrize("group", [2, 4])
def test_fewer_key_heads(group: int, device: torch.device) -> None:
    for bias in ("11hqk", "b11qk", "b1hqk"):
        case = problem(H=4, M=70, N=70, group=group, bias=bias)
        run_dq(case, device)
        if bias != "b1hqk":
            run_dbias(case, device)


DQ_CONFIGS = [
    DqConfig(1, 32, 2, 2, separate_dq=False),
    DqConfig(2, 64, 2, 1, separate_dq=False, deferred=False),
    DqConfig(2, 64, 1, 1, deferred=False),
    DqConfig(2, 128, 2, 2, 2, separate_dq=False, deferred=False),
    DqConfig(1, 64, 2, 2, 2, persistent=False),
    DqConfig(2, 64, 3, 2, 3),
    DqConfig(2, 64, 3, 2, 2, ping_pong=True),
    DqConfig(2, 64, 2, 2, deferred=False, ping_pong=True),
    DqConfig(1, 64, 2, 2, ping_pong=True),
]
DBIAS_CONFIGS = [
    DbiasConfig(1, 32, 3, 3),
    DbiasConfig(2, 64, 2, 2, ping_pong=True),
    DbiasConfig(1, 64, 4, 4, chunk=32),
    DbiasConfig(2, 128, 3, 3),
    DbiasConfig(2, 64, 5, 5, chunk=16),
    DbiasConfig(2, 128, 5, 4, 2),
    DbiasConfig(2, 64, 2, 3, 2, ping_pong=True),
    DbiasConfig(1, 32, 7, 5, 3, chunk=32),
    DbiasConfig(1, 128, 4, 4, ctas_per_sm=2),
]


def with_sms(configs: list[Any]) -> list[Any]:
    """Each with few or many of them, in turn."""
    return [pytest.param(c, (2, 132)[n % 2], id=str(c).replace(" ", "-")) for n, c in enumerate(configs)]


@pytest.mark.parametrize(("config", "sms"), with_sms(DQ_CONFIGS))
def test_configurations_of_dq(config: DqConfig, sms: int, device: torch.device) -> None:
    for bias, band in ((None, (None, None)), ("b1hqk", (None, 0)), ("11hqk", (-50, 50)), ("b111k", (None, None))):
        run_dq(problem(M=300, N=333, bias=bias, band=band), device, config, sms)


@pytest.mark.parametrize(("config", "sms"), with_sms(DBIAS_CONFIGS))
def test_configurations_of_dbias(config: DbiasConfig, sms: int, device: torch.device) -> None:
    for bias, band in (("11hqk", (None, None)), ("b11qk", (None, 0))):
        run_dbias(problem(M=300, N=333, H=3, bias=bias, band=band), device, config, sms)


@pytest.mark.parametrize("config", [DbiasConfig(2, 128, 5, 4, 2), DbiasConfig(1, 64, 5, 6)], ids=lambda c: str(c).replace(" ", "-"))
def test_parts_bands_and_shapes_of_dbias(config: DbiasConfig, device: torch.device) -> None:
    cases = [
        *(problem(M=257, N=700, bias="11hqk", band=band) for band in ((None, None), (None, 0), (-70, 20), (None, -500), (-300, None))),
        problem(B=6, M=70, N=300, batch_inner=2, bias="1i1qk", bias_dtype=F32),
        problem(H=4, M=300, N=200, group=2, bias="b11qk", dtype=F16, band=(None, 0)),
        problem(M=130, N=600, D=128, Dv=128, bias="11hqk", band=(None, 0)),
        problem(M=130, N=300, D=16, Dv=96, bias="111qk"),
        problem(M=1, N=1, bias="11hqk"),
        problem(M=400, N=65, D=96, Dv=32, bias="111qk", band=(None, 300)),
    ]
    for case in cases:
        for splits in (1, 2):
            fits = config.shared_memory(spec_of_case(case, build(case, device))) <= LIMIT
            run_dbias(case, device, config if fits else None, 3, splits)


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("kernel", ["dq", "dq and dbias", "dbias"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_repeats(kernel: str, dim: int, device: torch.device) -> None:
    """Many tiles a program, 200 launches: programs, warps, loads and stores really race, and the bits are the same every time."""
    for band in ((None, None), (None, 0)):
        case = problem(B=4, M=520, N=504, H=16, D=dim, Dv=dim, band=band)
        bias = {"dq": "11h1k", "dq and dbias": "b1hqk", "dbias": "11hqk"}[kernel]
        call = (run_dbias if kernel == "dbias" else run_dq)(replace(case, bias=bias), device, sms=132)
        written = [x.base for x in call.args[4:7] if hasattr(x, "base")] if kernel != "dbias" else [call.args[5].base]
        first, differing = [x.clone() for x in written], torch.zeros((), device=device, dtype=torch.int64)
        for _ in range(200):
            start(device, [call])
            differing += sum((x != y).any() for x, y in zip(written, first, strict=True))
        assert differing.item() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU's stand-in")
@pytest.mark.parametrize("kernel, old, new", [
    ("dq", "mbarrier.wait(p.values.full.index(_), _)", "pass"),
    ("dq", "p.values.acquire(_1, _2)", "p.values.full.index(p.values.slot(_1, _2))"),
    ("dq", "p.keys.acquire(_1, _2)", "p.keys.full.index(p.keys.slot(_1, _2))"),
    ("dq", "mbarrier.arrive(p.keys.empty.index(before))", "pass"),
    ("dq", "warpgroup_mma_wait(groups(_1) + DQ, [s_pending])", "warpgroup_mma_wait(groups(_1) + DQ + 1, [s_pending])"),
    ("dq", "tma_store_wait(1)", "pass"),
    ("dbias", "slots.acquire(_, _)", "pass"),
    ("dbias", "p.left.wait(_, _)", "pass"),
    ("dbias", "p.right.wait(at, _)", "pass"),
    ("dbias", "p.left.release(_, _)", "pass"),
    ("dbias", "mbarrier.wait(p.biases.full.index(_), _)", "pass"),
    ("dbias", "p.biases.acquire(_, _)", "pass"),
    ("dbias", "warpgroup_mma_wait(DP_CHUNKS, [s_pending])", "warpgroup_mma_wait(DP_CHUNKS + 1, [s_pending])"),
    ("dbias", "tma_store(_1, _2, _3)\ntma_store_wait(0)", "tma_store(_1, _2, _3)"),
])  # fmt: skip
@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU's stand-in")
def test_the_stand_in_sees_broken_protocols(kernel: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, kernel, old, new)

    def run(seed: int) -> None:
        if kernel == "dq":
            config = DqConfig(2, 64, 3, 2 + 2 * ("p.keys" in old), 2)
            run_dq(problem(M=300, N=600, bias=None if "p.keys" in old else "b1hqk"), torch.device("cpu"), config, seed=seed)
        else:
            config = DbiasConfig(2, 64, 5, 4) if seed % 2 else None
            run_dbias(problem(B=8, M=300, N=304, bias="11hqk"), torch.device("cpu"), config, seed=seed)

    assert noticed(run, 8)


@pytest.mark.parametrize("sizes", [(2048, 2048), (1000, 2048), (2048, 1000), (640, 640), (130, 700), (1, 1)], ids=str)
@pytest.mark.parametrize("band", [(None, None), (None, 0), (None, 300), (None, -300), (-200, 100), (-300, None)], ids=str)
def test_every_tile_that_anybody_sees_has_one_place(sizes: tuple[int, int], band: tuple[int | None, int | None]) -> None:
    """By the kernel's own function; and the plan knows which places are empty. A window may leave a tile behind the last key one too many."""
    tile = gluon_twin.namespace("dbias_tiles", {})["tile_of"]
    q, k = (torch.empty(4, size, 16, 64, device="meta", dtype=BF16) for size in sizes)
    spec = spec_of(q, k, k, torch.empty(1, 1, 16, *sizes, device="meta", dtype=BF16), 1, *band, 0.125, "")
    i, j = torch.arange(sizes[0])[:, None], torch.arange(sizes[1])[None]
    seen = torch.ones(sizes, dtype=torch.bool)
    seen &= torch.tensor(True) if spec.hi is None else j <= i + spec.hi
    seen &= torch.tensor(True) if spec.lo is None else j >= i + spec.lo
    for config in (DbiasConfig(2, 128, 4, 4), DbiasConfig(1, 32, 4, 4)):
        M, N = config.block_m, config.block_n
        wanted = [(m, n) for m in range(0, sizes[0], M) for n in range(0, sizes[1], N) if seen[m : m + M, n : n + N].any()]
        (fold, full), tiles_m = dbias_plan.places(spec, config), dbias_plan.bias_tiles(spec, config)[0]
        shuffle = dbias_plan.shuffle(spec, config, 1, 132)
        counts = dict(batch_outer=4, batch_inner=1, heads=16, tiles_m=tiles_m, places=len(full), fold=fold, shuffle=shuffle)
        counts = {name: gluon_twin.Scalar(count) for name, count in (counts | dict(M=sizes[0], N=sizes[1])).items()}
        varies = dict(VARIES_B0=False, VARIES_B1=False, VARIES_H=True)
        program = SimpleNamespace(C=config, packed=None, lo=spec.lo, hi=spec.hi, splits=1, **counts, **varies)
        found = []
        for place in range(len(full)):
            *_, head, m0, n0, first, last = tile(program, gluon_twin.Scalar(5 * len(full) + place))
            assert head == 5 and first == 0 and last == 4 * full[place * shuffle % len(full)]
            found += [(m0, n0)] * (first < last)
        assert len(set(found)) == len(found) and set(wanted) <= set(found)
        assert spec.lo is not None or len(found) == len(wanted)


@pytest.mark.parametrize("band", [(None, None), (None, 0), (None, 300), (-500, 100)], ids=str)
def test_a_grid_that_deals_tiles_evenly(band: tuple[int | None, int | None]) -> None:
    """With a size that has a divisor in common with the places of a row, some programs would get the long columns in every wave."""
    x = torch.empty(4, 2048, 16, 64, device="meta", dtype=BF16)
    bias = torch.empty(1, 1, 16, 2048, 2048, device="meta", dtype=BF16)
    spec = spec_of(x, x, x, bias, 1, *band, 0.125, "")
    config = dbias_plan.choose(spec, LIMIT)
    assert config is not None
    programs, most = dbias_plan.programs(spec, config, 1, 132), 132 * config.ctas_per_sm
    assert programs == most if band[0] is None else most - 8 <= programs <= most
    shuffle, full = dbias_plan.shuffle(spec, config, 1, programs), dbias_plan.places(spec, config)[1]
    load = [0] * programs
    for place in range(16 * len(full)):
        load[place % programs] += full[place * shuffle % len(full)]
    assert max(load) <= (1.1 if band[0] is None else 1.3) * sum(load) / most


def test_two_programs_of_a_processor_or_a_second_buffer_for_the_bias() -> None:
    """The one up to head dim 48, the other up to 64, where it fits beside four slots of both rings."""
    for dim, causal, bias_dtype, wanted in (
        (16, False, BF16, (64, 128, 1, 2)),
        (48, True, BF16, (64, 128, 1, 2)),
        (64, False, BF16, (128, 128, 2, 1)),
        (64, True, BF16, (128, 128, 2, 1)),
        (128, True, BF16, (128, 128, 1, 1)),
        (48, True, F32, (128, 128, 1, 1)),
        (64, True, F32, (128, 128, 1, 1)),
        (256, False, BF16, (128, 128, 1, 1)),
    ):
        x = torch.empty(4, 2048, 16, dim, device="meta", dtype=BF16)
        spec = spec_of(
            x, x, x, torch.empty(1, 1, 16, 2048, 2048, device="meta", dtype=bias_dtype), 1, None, 0 if causal else None, 0.125, ""
        )
        config = dbias_plan.choose(spec, LIMIT)
        assert config is not None and (config.block_m, config.block_n, config.bias_stages, config.ctas_per_sm) == wanted


def test_what_fits_nowhere_is_said_so() -> None:
    x = torch.empty(4, 2048, 16, 256, device="meta", dtype=BF16)
    bias = torch.empty(1, 1, 16, 2048, 2048, device="meta", dtype=F32)
    spec = spec_of(x, x, x, bias, 1, None, 0, 0.125, "")
    assert dq_plan.choose(spec, 20_000, ("dq", "dbias")) is None and dbias_plan.choose(spec, 20_000) is None
    for limit in (232448, 180_000, 120_000, 101_376):
        for config in (dq_plan.choose(spec, limit, ("dq", "dbias")), dbias_plan.choose(spec, limit)):
            assert config is None or config.shared_memory(spec, ("dq", "dbias")) <= limit
