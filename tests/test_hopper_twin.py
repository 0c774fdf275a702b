"""All Hopper kernels, by the plans and launches that a GPU would get, on the CPU's stand-in for it (``gluon_twin.py``), judged as every
backend is. Few SMs, so that a program has several tiles and its buffers and barriers wrap around."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import gluon_twin
from cases import Case, Inputs, build
from here import stand_in_only
from mutations import mutate, noticed
from pairwise import pairwise
from running import assert_right, results_of, run_case
from table import DBIAS_CONFIGS, FEATURES, FORWARD, FORWARD_CONFIGS, GROWING
from triflash.launch.hopper_backward import new_stats, preprocess_call
from triflash.launch.room import Real
from triflash.plan.kernels.dbias import DbiasConfig
from triflash.plan.kernels.dkdv import DkdvConfig
from triflash.plan.kernels.forward import ForwardConfig
from triflash.plan.kernels.rowwise import preprocess_step
from triflash.plan.override import Config, override_configs
from triflash.spec import spec_of

pytestmark = stand_in_only

CPU, BF16, F16, F32, BOOL = torch.device("cpu"), torch.bfloat16, torch.float16, torch.float32, torch.bool


def check(case: Case, sms: int = 2, seed: int = 0, rowwise: bool = True, carefully: bool = True, **configs: Config | None) -> list[str]:
    """Run and judge a case with the plan's own tiles, but for the configurations given; the kernels that ran."""
    given = {name: config for name, config in configs.items() if config is not None}
    return run_case(replace(case, tiles=None), "stand-in", CPU, given, carefully, sms=sms, seed=seed, rowwise=rowwise)


KEYS_CONFIGS = [
    DkdvConfig(*stages, unroll=unroll, **dict.fromkeys(ways, True))
    for stages, ways, unroll in itertools.product([(1, 1), (2, 1), (2, 2), (2, 2, 2)], [(), ("dq_warpgroup",), ("red_dq",)], [1, 2])
    if min(stages[: 2 if "dq_warpgroup" in ways else 1]) >= unroll and ("dq_warpgroup" in ways or len(stages) == 2) and ("red_dq" not in ways or stages != (2, 1))
]  # fmt: skip
KEYS = [
    Case("full", B=2, M=130, N=150, H=2),
    Case("causal, wide bias", B=2, M=200, N=200, bias="1hqk", causal=True, grads="qkv"),
    Case("window, bias of keys", B=2, M=150, N=300, bias="1h1k", lo=-40, hi=120),
    Case("grouped, lengths, slopes", B=3, M=140, N=200, H=4, Hk=2, lengths=(70, 0, 200), alibi="h", dlse=True),
    Case("mask, sink", B=2, M=100, N=260, bias="b1qk", bias_dtype=BOOL, bias_values="rows", sink=True, hi=60),
]


# Three cases for each configuration, in turns: test_features_together has every second one beside every feature.
KEYS_BY_CONFIG = [(config, case) for n, config in enumerate(KEYS_CONFIGS) for m, case in enumerate(KEYS) if (m - n) % 5 in (0, 1, 3)]


@pytest.mark.parametrize(("config", "case"), [pytest.param(*x, id="-".join(map(str, x)).replace(" ", "-")) for x in KEYS_BY_CONFIG])
def test_keys_that_add_dq(config: DkdvConfig, case: Case) -> None:
    ran = check(case, carefully=config.unroll == 1, dqdkdv=config)
    assert [kernel for kernel in ran if kernel != "dbias_sum"] == ["forward", "preprocess", "dqdkdv", "postprocess"]


@pytest.mark.parametrize("way", ["plain", "dq_warpgroup", "red_dq"])
@pytest.mark.parametrize("D", [64, 128])
def test_distances_of_whole_blocks(D: int, way: str) -> None:
    """Key tiles visit whole blocks of queries in orders of their own, and only ALiBi and ``red_dq`` ask where they are."""
    for lo, hi in ((-200, None),) if way == "plain" else ((None, None), (None, 60)):
        case = Case("ALiBi", B=2, M=320, N=260, H=1, D=D, lengths=(256, 260), alibi="h", grads="qkv", lo=lo, hi=hi)
        config = DkdvConfig(2, 2, dq_warpgroup=way == "dq_warpgroup" and D <= 64, red_dq=way == "red_dq", unroll=1 if way == "plain" else 2)
        assert check(case, dqdkdv=config)[2] == "dqdkdv"


@pytest.mark.parametrize("D", [1, 8, 24, 64, 72, 100, 128])
def test_columns_of_a_direct_sum(D: int) -> None:
    """Of which there are whole groups of eight, but no more than the head dim asks for."""
    check(Case("red_dq", B=1, M=70, N=300, D=D, Dv=16, hi=20, grads="qk"), dqdkdv=DkdvConfig(2, 2, red_dq=True))
    check(Case("red_dq", B=2, M=64, N=260, D=D, Dv=16, grads="qv"), dqdkdv=DkdvConfig(2, 2, red_dq=True))


@pytest.mark.parametrize("bias", ["b1hqk", "11hqk", "11h1k"])
def test_without_a_rest(bias: str) -> None:
    """The backward pass of whoever kept no rest of lse: all its kernels, ``preprocess`` and ``postprocess`` in Triton's interpreter, adding dq or not,
    and at wide heads.
    """
    for D, config in ((16, DkdvConfig(2, 2, dq_warpgroup=True)), (16, None), (136, None)):
        case = Case("no rest", B=2, M=130, N=150, D=D, bias=bias, alibi="h", causal=D > 16, lengths=(140, 64))
        inputs = build(case, CPU)
        x, options = inputs.operands(), (1, *case.band, case.softmax_scale, "", "hopper")
        with gluon_twin.twin_device(2, rowwise=False), override_configs(**({} if config is None else {"dqdkdv": config})), torch.no_grad():
            out, lse, _ = torch.ops.triflash.forward(*x[:4], *options, *x[4:9])
            grads = torch.ops.triflash.backward(inputs.dout, None, *x[:4], out, lse, None, *options, [True] * 4, *x[4:9])
        found = {f"d{letter}": grad.view_as(leaf) for (letter, leaf), grad in zip(inputs.wanted().items(), grads, strict=False)}
        assert list(found) == ["dq", "dk", "dv", "db"]
        assert_right(case, inputs, found)


@pytest.mark.parametrize("outer, M", [(1, 1), (2, 130), (300, 70), (2, 1100)])  # programs: fewer and more than flags; several goes a head
def test_whether_every_lse_is_small(outer: int, M: int) -> None:
    """Of every query, the last one of the last head included; those that see no key have no say."""
    like = torch.empty(outer, M, 2, 16, dtype=F16)
    spec = spec_of(like, like, like, torch.empty(1, 1, 2, M, M), 1, None, None, 0.25, "ieee")
    for value, small_lse in ((-699.0, 1), (-math.inf, 1), (701.0, 0), (-701.0, 0)):
        for at in ((0, 0, 0), (-1, -1, -1)):
            lse = torch.zeros(outer, 2, M)
            lse[at] = value
            stats, flags = new_stats(Real(lse), spec, True), torch.full((512,), 7, dtype=torch.int32)
            zeros = torch.zeros_like(like)
            gluon_twin.run(preprocess_call(spec, preprocess_step(spec), zeros, zeros, None, lse, torch.zeros_like(lse), stats, flags, None))
            assert set(flags.tolist()) <= {0, 1} and flags.min() == small_lse and (flags == 0).sum() == 1 - small_lse


@pytest.mark.parametrize("grads", ["q", "k", "v", "b", "s", "qk", "vb", "kvs"])
@pytest.mark.parametrize("bias", ["b1hqk", "11hqk", "11h1k"])
def test_single_gradients(bias: str, grads: str) -> None:
    for D, config in ((24, DkdvConfig(2, 2, dq_warpgroup=True)), (24, None), (136, None)):
        if D == 24 or bias == "11h1k":
            case = Case("single", B=2, M=100, N=180, D=D, bias=bias, grads=grads, causal=grads < "m", sink=True, lengths=(170, 33))
            check(case, dqdkdv=config)


TILES = [
    Case("lengths, slopes", B=3, M=200, N=600, H=2, bias="1hqk", lengths=(0, 128, 999), alibi="bh", sink=True, grads="qkvb"),
    Case("causal, grouped, slopes", B=2, M=300, N=300, H=4, Hk=2, bias="b1qk", alibi="h", causal=True, grads="b"),
    Case(
        "window, lengths, two levels",
        B=4,
        M=130,
        N=400,
        H=1,
        batch_inner=2,
        bias="1i1qk",
        lengths=(300, 7, 400, 0),
        lo=-90,
        hi=60,
        grads="b",
    ),
    Case("mask, soft cap, causal", B=4, M=300, N=260, bias="1hqk", mask="b11k", softcap=2.0, causal=True, grads="b"),
    Case("two levels of both, soft cap", B=6, M=140, N=130, batch_inner=3, bias="b11qk", mask="1i11k", softcap=1.5, hi=70, grads="b"),
]


@pytest.mark.parametrize("case", TILES, ids=str)
@pytest.mark.parametrize("config", DBIAS_CONFIGS, ids=lambda c: str(c).replace(" ", "-"))
def test_gradients_of_a_bias_by_a_kernel_of_their_own(config: DbiasConfig | None, case: Case) -> None:
    ran = check(case, 3, TILES.index(case), dbias=config)
    assert "dbias" in ran


def every_other(configs: list[Any], cases: list[Case]) -> list[Any]:
    """Half of their pairs, as the white squares of a board."""
    chosen = [(c, case) for n, c in enumerate(configs) for m, case in enumerate(cases) if (n + m) % 2 == 0]
    return [pytest.param(c, case, id=f"{c}-{case}".replace(" ", "-")) for c, case in chosen]


@pytest.mark.parametrize(("config", "case"), every_other(FORWARD_CONFIGS, FORWARD))
def test_forward(config: ForwardConfig | None, case: Case) -> None:
    sms = 1 + 2 * (FORWARD.index(case) % 2)
    check(replace(case, grads=""), sms, sms, forward=config)


ADDING = [
    DkdvConfig(2, 2, dq_warpgroup=True),
    DkdvConfig(2, 1),
    DkdvConfig(2, 2, 2, dq_warpgroup=True, unroll=2),
    DkdvConfig(2, 2, red_dq=True),
]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features(case: Case, wide: bool) -> None:
    """In every kernel: those of narrow and of wide heads, dq added up and by itself, and every kernel that gives a bias its gradient. A case has
    one of two narrow widths and two of the ways to add up dq: ``test_features_together`` has every two of features, widths and ways.
    """
    number = FEATURES.index(case)
    D = 136 if wide else (16, 64)[number % 2]
    check(replace(case, D=D), 2, D)
    if not wide:
        for config in ADDING[number // 2 % 2 :: 2]:
            check(replace(case, D=D), 3, D, carefully=False, dqdkdv=config)


# Of the configurations but the default one, two or three for each case.
FORWARD_FEATURES = [(config, case) for number, case in enumerate(FEATURES) for config in FORWARD_CONFIGS[1 + number % 5 :: 5]]


@pytest.mark.parametrize(("config", "case"), [pytest.param(*x, id="-".join(map(str, x)).replace(" ", "-")) for x in FORWARD_FEATURES])
def test_forward_with_features(config: ForwardConfig, case: Case) -> None:
    check(replace(case, grads="", dlse=False), 1, 1, forward=config)


@pytest.mark.parametrize("adds", [True, False])
def test_slopes_beside_a_huge_bias(adds: bool) -> None:
    """Queries whose every score carries -10⁹: their scores are rounded to multiples of 64, alike in both passes, so that p sums up to 1."""
    case = Case("huge", B=2, M=300, N=300, bias="1hqk", bias_dtype=F32, alibi="h", causal=True, dtype=BF16, grads="qkv", tiles=None)
    inputs = build(case, CPU)
    assert inputs.bias is not None and inputs.alibi_slopes is not None
    with torch.no_grad():
        inputs.bias[..., :100, :] = -1e9
        inputs.alibi_slopes.copy_(torch.linspace(0.2, 0.5, case.H).expand_as(inputs.alibi_slopes))
    assert off_one(case, inputs, {"dqdkdv": DkdvConfig(2, 2)} if adds else {}) < 0.01


@pytest.mark.parametrize("small_lse", [True, False])
def test_maxima_that_become_huge(small_lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias that the forward kernel adds together with the scale: not where it is huge, else p of the two passes would not be the same. small_lse:
    were it taken for small, that would be seen.
    """
    case = Case("huge", B=2, M=200, N=300, H=2, bias="1hqk", dtype=BF16, grads="v")
    inputs = build(case, CPU)
    assert inputs.bias is not None
    with torch.no_grad():
        inputs.bias[..., :100, :] = -1e9
        inputs.bias[..., 40:140, 17:22] = 1e9  # visited last
    if small_lse:
        mutate(monkeypatch, "softmax", "gl.abs(m) > SMALL_REFERENCE", "m > 1e38")
    assert (off_one(case, inputs, {"forward": ForwardConfig(1, 128, 2, ctas_per_sm=2)}) < 0.01) is not small_lse


def off_one(case: Case, inputs: Inputs, configs: dict[str, Config]) -> float:
    """By how much p of the backward pass sums up to something else than 1 over the keys of a query, on average over queries."""
    inputs.dout.fill_(1.0)
    (results,), _ = results_of(case, inputs, "stand-in", configs, sms=2)
    return (results["dv"].double().sum(1) / case.M - 1).abs().max().item()


@pytest.mark.parametrize("case", GROWING, ids=str)
@pytest.mark.parametrize("config", FORWARD_CONFIGS[:1] + FORWARD_CONFIGS[5:8:2], ids=lambda c: str(c).replace(" ", "-"))
def test_forward_of_growing_maxima(config: ForwardConfig | None, case: Case) -> None:
    check(replace(case, grads=""), 1, 1, forward=config)


def test_the_rounding_error_of_a_soft_cap() -> None:
    """What plan/hopper.py says of it, by the arithmetic of ``tanh`` with instructions as inexact as they may be."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(100_000, generator=generator) * size for size in (0.01, 1, 10, 100)]).reshape(-1, 4)

    def inexact(y: torch.Tensor, bits: int) -> torch.Tensor:
        return y * (1 + (2 * torch.rand(y.shape, generator=generator) - 1) * 2.0**-bits)

    y = -1 - inexact(torch.exp2(x.clamp(max=30.0)), 22)
    a, b = y[:, :1] * y[:, 1:2], y[:, 2:3] * y[:, 3:]
    c = inexact(1 / (a * b), 23)
    u = torch.cat([b * c * y[:, 1:2], b * c * y[:, :1], a * c * y[:, 3:], a * c * y[:, 2:3]], 1)
    tanh = torch.tanh(x.double() * math.log(2) / 2)
    assert ((1 + 2 * u.double()) - tanh).abs().max() < 8e-7
    assert (-4 * u.double() * (1 + u.double()) - (1 - tanh**2)).abs().max() < 2e-6


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
    "mask": [None, "b111k", "1i1qk"],
    "lengths_shown": [None, (0, 60, 999), (128, 1)],
    "alibi": [None, "h", "bh"],
    "sink": [False, True],
    "softcap": [0.0, 1.5],
    "dropout": [0.0, 0.2],
    "dlse": [False, True],
    "grads": ["qkvbs", "qkvbs", "b", "qv", "kb", "k", "v", "qs"],
    "layout": ["plain", "plain", "mixed"],
    "sms": [1, 2, 3],
    "keys": [None, *KEYS_CONFIGS[::2]],  # each by itself has a test above
    "forward": [
        None,
        ForwardConfig(1, 64, 2),
        ForwardConfig(2, 64, 2, ping_pong=True),
        ForwardConfig(3, 32, 2, q_stages=2),
        ForwardConfig(2, 128, 1, 2),
    ],
}
ROWS = pairwise({name: range(len(values)) for name, values in AXES.items()}, seed=7)


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_features_together(number: int) -> None:
    row = {name: AXES[name][at] for name, at in ROWS[number].items()}
    (M, N), (H, Hk), (outer, inner), (D, Dv), (lo, hi) = (row[name] for name in ("lengths", "heads", "batch", "dims", "band"))
    if row["bias_dtype"] == BOOL or row["bias"] is None:
        row["mask"] = None  # one mask at a time
    if row["bias_dtype"] == BOOL and row["bias_values"] == "inf":
        row["bias_values"] = "normal"
    row["dlse"] = row["dlse"] and row["grads"] not in ("v", "")  # which lse does not depend on
    plain = (
        "dtype",
        "bias",
        "bias_dtype",
        "bias_values",
        "mask",
        "scale",
        "alibi",
        "sink",
        "softcap",
        "dropout",
        "dlse",
        "grads",
        "layout",
    )
    sizes = dict(B=outer * inner, M=M, N=N, H=H, Hk=Hk, D=D, Dv=Dv, lo=lo, hi=hi, batch_inner=inner, lengths=row["lengths_shown"])
    configs = {name: row[key] for name, key in (("dqdkdv", "keys"), ("forward", "forward")) if row[key] is not None}
    if "dqdkdv" in configs and max(D, Dv) > 64:  # no registers for it
        configs["dqdkdv"] = replace(configs["dqdkdv"], dq_warpgroup=False, bias_stages=1)
    check(Case(f"together {number}", seed=number, **sizes, **{name: row[name] for name in plain}), row["sms"], number, **configs)


@pytest.mark.parametrize("kernel, old, new", [
    ("dkdv", "p.kv.acquire(_, _)", "pass"),
    ("dkdv", "bar_sync(Q_FREE + _, _)", "pass"),
    ("dkdv", "bar_sync(O_FREE + _, _)", "pass"),
    ("dkdv", "bar_sync(BIAS_FREE + _, _)", "pass"),
    ("dkdv", "mbarrier.expect(_1, BIAS_BYTES + MASK_BYTES)", "mbarrier.expect(_1, BIAS_BYTES)"),
    ("dkdv_step", "mbarrier.wait(p.o_full.index(stage), _)", "pass"),
    ("dkdv_step", "mbarrier.wait(p.ds_empty.index(at & 1), _)", "pass"),
    ("dkdv_step", "mbarrier.wait(p.dq_empty.index(_), _)", "pass"),
    ("dkdv_step", "bar_sync(DS_HERE + _ + _, 256)", "pass"),
    ("dkdv_step", "bar_arrive(DS_HERE + _ + _, 256)", "pass"),
    ("dkdv_step", "waited(AFTER + NEXT, dv_pending)", "waited(AFTER + NEXT + 1, dv_pending)"),
    ("dkdv_step", "warpgroup_mma_wait(AFTER + NEXT, [dq_pending])", "warpgroup_mma_wait(AFTER + NEXT + 1, [dq_pending])"),
    ("dkdv_step", "place = t.sum_base + _", "place = t.sum_base + block"),
    ("dkdv_step", "if go:\n    red_add_dq(_1, _2, _3, None, _4, _5)", "red_add_dq(_1, _2, _3, None, _4, _5)"),
    ("dkdv_step", "fence_async_shared()\nif _1:\n    bar_arrive(_2, _3)", "if _1:\n    bar_arrive(_2, _3)"),
    ("dkdv_step", "bar_sync(DS_HERE + _, _)", "pass"),
    ("dkdv_step", "bar_sync(DQ_HERE, _)", "pass"),
    ("dkdv_step", "tma_store_wait(1)", "pass"),
    ("dkdv_step", "tma_store_wait(2)", "pass"),
    ("dkdv", "mbarrier.wait(p.ds_empty.index(_), _)", "pass"),
    ("dkdv", "mbarrier.wait(p.consumers_done.index(_), _)", "pass"),
    ("dkdv", "bar_sync(DS_HERE + _ + _, 256)", "pass"),
    ("softmax", "s = mask_by_tile(_, _, _, _)", "pass"),
    ("dkdv_d256_loads", "p.kv.acquire(_, _)", "p.kv.full.index(0)"),
    ("dkdv_d256_loads", "mbarrier.wait(p.douts.empty.index(_), _)", "pass"),
    ("dkdv_d256", "mbarrier.wait(p.weights.full.index(_), _)", "pass"),
    ("dkdv_d256_loads", "mbarrier.wait(p.queries.empty.index(_), _)", "pass"),
    ("dkdv_d256_loads", "p.biases.acquire(_, _)", "p.biases.full.index(0)"),
    ("forward_loads", "p.kv.acquire(at, _)", "pass"),
    ("forward_loads", "p.kv.acquire(done, _)", "p.kv.full.index(p.kv.slot(done, 0))"),
    ("forward_loads", "p.queries.acquire(_1, _2)", "p.queries.full.index(p.queries.slot(_1, _2))"),
    ("forward_loads", "load_block(p, f.v, (_, _), _1, full, _2)", "load_block(p, f.v, (b, n0), _1, full, _2)"),
    ("forward", "p.kv.wait(at, _)", "pass"),
    ("forward", "warpgroup_mma_wait(pieces(_1, _2), [s_pending])", "warpgroup_mma_wait(pieces(_1, _2) + 1, [s_pending])"),
    ("rings", "mbarrier.wait(self.full.index(_), _)", "pass"),
    ("scores_kq", "later - count", "later"),
])  # fmt: skip
def test_the_stand_in_sees_broken_protocols(kernel: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, kernel, old, new)
    assert noticed(lambda seed: run_breakable(kernel, seed), 30)  # when partitions happen to meet in a bad order


def run_breakable(kernel: str, seed: int) -> None:
    grads = "" if kernel in ("forward", "forward_loads", "softmax") else "qkv"
    case = Case("broken", B=2, M=300, N=300, bias="1hqk", mask="b1qk", grads=grads)
    if kernel.startswith("dkdv_d256"):
        check(replace(case, D=136, mask="b11k"), 1, seed, dkdv=DkdvConfig(2, 2, d256=True))  # with three buffers 30 orders show nothing
    elif not grads:
        check(case, 1, seed, forward=ForwardConfig(2, 128, 2, 2, ping_pong=True))
    else:
        config = (DkdvConfig(2, 2), DkdvConfig(2, 2, 2, dq_warpgroup=True, unroll=2), DkdvConfig(2, 1, red_dq=True))[seed % 3]
        check(case, 1, seed, dqdkdv=config)


@pytest.mark.parametrize("kernel, seed", [("forward", 0), ("dkdv_d256", 0), ("dkdv", 0), ("dkdv", 1), ("dkdv", 2)])
def test_unbroken_ones_are_right(kernel: str, seed: int) -> None:
    run_breakable(kernel, seed)


@pytest.mark.parametrize("old, new", [
    ('f"setp.gtu.or.f32 p, ${l + 2}, {_}, p;"', '""'),  # rows of a thread that have no say
    ('f"setp.gtu.f32 p, ${l}, {_1};"', 'f"setp.gtu.f32 p, ${l + 2}, {_1};"'),
    ("(1, 2)", "(1,)"),  # the distances at which lanes ask each other
    ('f"ex2.approx.ftz.f32 ${_1 + 2 * row}, y;"', 'f"mov.f32 ${_1 + 2 * row}, 0f3F800000;"'),
    ('f"cvt.rn.{_1}x2.f32 ${_2}, y, z;"', 'f"cvt.rn.{_1}x2.f32 ${_2}, z, y;"'),
    ('f"shl.b32 v, {_1}, 16; mov.b32 w, v;"', 'f"and.b32 v, {_1}, 0xFFFF0000; mov.b32 w, v;"'),
    ('f"add.f32 u{row}, u{row}, {_1};"', 'f"add.f32 u0, u0, {_1};"'),
    ("l = l * factor + more", "l = l + more"),
    ("o = _rescaled(o, factor)", "pass"),
])  # fmt: skip
def test_growing_maxima_are_looked_after(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of it is left out or wrong is seen; the parts of the text that the assembler takes are carried out here, too."""
    case = Case("growing", B=1, M=100, N=500, H=2, D=64, bias="1hqk", bias_values="rising", dtype=BF16, grads="")
    check(case, 1, 0, forward=ForwardConfig(1, 128, 2, ctas_per_sm=2))
    mutate(monkeypatch, "forward" if "factor" in old and "f32" not in old else "softmax", old, new)
    assert noticed(lambda seed: check(case, 1, seed, forward=ForwardConfig(1, 128, 2, ctas_per_sm=2)), 1)


PARTS = [
    Case("full", B=2, M=130, N=150, H=5, Hk=1),
    Case("causal, wide bias", B=2, M=200, N=200, H=4, Hk=2, bias="1hqk", causal=True, grads="qkv"),
    Case("window, bias of keys", B=2, M=150, N=300, H=4, Hk=1, bias="1h1k", lo=-40, hi=120),
    Case("lengths, slopes, dims that differ", B=3, M=140, N=200, H=8, Hk=2, D=40, Dv=24, lengths=(70, 0, 200), alibi="h", dlse=True),
    Case("dropout, one gradient of the two", B=2, M=100, N=260, H=4, Hk=1, dropout=0.2, grads="qv"),
    Case("another", B=2, M=100, N=260, H=4, Hk=1, grads="k", hi=30),
    Case("neither", B=2, M=100, N=260, H=4, Hk=1, bias="1h1k", grads="b", hi=30),
]


@pytest.mark.parametrize(("way", "case"), every_other(["plain", "dq_warpgroup", "red_dq", "alone"], PARTS))
def test_heads_of_a_group_in_parts(way: str, case: Case) -> None:
    """Each sums up dk and dv over its share of the query heads: several, or one."""
    case = replace(case, grads=case.grads.replace("q", "")) if way == "alone" else case
    members = 2 if way == "plain" and 2 * case.key_heads < case.H else 1
    config = DkdvConfig(2, 2, dq_warpgroup=way == "dq_warpgroup", red_dq=way == "red_dq", head_splits=case.H // case.key_heads // members)
    kernel = "dqdkdv" if "q" in case.grads else "dkdv"
    assert check(case, carefully=False, **{kernel: config})[2:4] == [kernel, "dkdv_sum" if set(case.grads) & set("kv") else "dbias_sum"]
