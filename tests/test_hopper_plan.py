"""The Hopper backend as far as it is arithmetic: what is chosen when, what is refused, and that its schedule visits every tile once. No GPU.

Which kernels a backward pass has is in test_hopper_steps.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from here import triton_only
from triflash import UnsupportedError, backend, flash_attn_func, record_launches
from triflash.plan.configs import TileConfig
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.kernels import forward, shared
from triflash.plan.kernels.dbias import DbiasConfig
from triflash.plan.kernels.dkdv import DkdvConfig
from triflash.plan.kernels.dq import DqConfig
from triflash.plan.kernels.forward import ForwardConfig
from triflash.plan.override import override_configs
from triflash.plan.select import Step, plan_backward, plan_forward, why_not
from triflash.spec import AttentionSpec, BiasSpec, Needs

SM90 = KNOWN_DEVICES["sm90"]
NEEDS = Needs(True, True, True, False)


def spec(bias: str | None = None, bias_dtype: str = "bf16", dtype: str = "bf16", **changes: Any) -> AttentionSpec:
    """A spec; ``bias`` in the docs' shorthand, five letters over (outer, inner, head, query, key)."""
    sizes = dict(batch_outer=2, batch_inner=1, queries=300, keys=300, heads=4, head_dim=64, value_dim=64, lo=None, hi=None)
    bias_spec = BiasSpec(bias_dtype, tuple(letter != "1" for letter in bias)) if bias else None  # type: ignore[arg-type]
    return AttentionSpec(dtype, **(sizes | changes), bias=bias_spec, scale=0.1, precision="ieee")  # type: ignore[arg-type]


# ---- what is chosen


@triton_only
@pytest.mark.parametrize("problem", [
    spec(), spec(dtype="fp16"), spec(hi=0), spec(lo=-290, hi=3), spec(head_dim=192, value_dim=128), spec(head_dim=256, value_dim=256),
], ids=lambda problem: f"{problem.dtype} {problem.bias} {problem.lo} {problem.hi} {problem.head_dim}")  # fmt: skip
def test_the_automatic_choice_on_sm90(problem: AttentionSpec) -> None:
    """Both passes on these kernels, and the choice of a name is the same plan."""
    plan = plan_forward(problem, SM90)
    assert plan.backend == "hopper" and [step.kernel for step in plan.steps] == ["forward"]
    assert plan == plan_forward(problem, SM90, "hopper") and isinstance(plan.steps[0].config, ForwardConfig)
    assert str(plan.steps[0]).startswith("forward ") and why_not("hopper", problem, SM90) is None
    backward = plan_backward(problem, NEEDS, SM90)
    assert backward.backend == "hopper" and backward == plan_backward(problem, NEEDS, SM90, "hopper")
    assert plan_forward(problem, SM90, "triton").backend == "triton"


@triton_only
@pytest.mark.parametrize("bias", ["b1hqk", "11h1k", "b11q1", "11111"])
def test_a_bias_is_taken(bias: str) -> None:
    for dims in ((64, 64), (256, 256), (64, 192)):
        assert plan_forward(spec(bias, head_dim=dims[0], value_dim=dims[1]), SM90).backend == "hopper"


REFUSED = [
    ("sm80", spec(), "sm80", "triton"),
    ("sm100", spec(), "sm100", "triton"),
    ("gfx942", spec(), "gfx942", "triton"),
    ("cpu", spec(), "cpu", "tiled"),
    ("interpreter", spec(), "interpreter", "tiled"),
    ("sm90", spec(dtype="fp32"), "fp32", "triton"),
    ("sm90", spec(dtype="fp64"), "fp64", "tiled"),
    ("sm90", spec("b1hqk", "fp64"), "a float64 bias", "tiled"),
    ("sm90", spec(head_dim=257), "head dim 257", "triton"),
    ("sm90", spec(value_dim=300), "head dim 300", "triton"),
    ("sm90", spec(queries=0), "empty tensors", "triton"),
    ("sm90", spec(keys=0), "empty tensors", "triton"),
    ("sm90", spec(heads=0), "empty tensors", "triton"),
    ("sm90", spec(batch_outer=0), "empty tensors", "triton"),
    (
        "sm90",
        spec("b1hqk", mask=BiasSpec("bool", (True,) * 4 + (False,))),
        "a mask beside a bias of which one does not vary over keys",
        "triton",
    ),
    ("sm90", spec("11hq1", mask=BiasSpec("bool", (True,) * 5)), "a mask beside a bias of which one does not vary over keys", "triton"),
    ("sm90", spec(alibi=True, softcap=501.0, groups=2), "a soft cap of 501", "triton"),
]


@triton_only
@pytest.mark.parametrize("arch, problem, feature, instead", REFUSED, ids=[f"{row[0]} {row[2]}" for row in REFUSED])
def test_what_it_refuses(arch: str, problem: AttentionSpec, feature: str, instead: str) -> None:
    """By name an error that says the feature and the nearest thing that works; by automatic choice that thing."""
    device = KNOWN_DEVICES[arch]
    with pytest.raises(UnsupportedError, match=rf"^{feature}: not supported by backend 'hopper'; .+"):
        plan_forward(problem, device, "hopper")
    with pytest.raises(UnsupportedError, match=rf"^{feature}: not supported by backend 'hopper'; .+"):
        plan_backward(problem, NEEDS, device, "hopper")
    reason = why_not("hopper", problem, device)
    assert reason is not None and reason[0] == feature and reason[1]
    backward = "tiled" if feature.startswith("head dim") else instead  # beyond what the portable backward pass takes as well
    assert (plan_forward(problem, device).backend, plan_backward(problem, NEEDS, device).backend) == (instead, backward)


@triton_only
def test_a_device_without_the_memory_is_refused() -> None:
    small = replace(SM90, shared_memory=16_384)
    with pytest.raises(UnsupportedError, match=r"^head dims 64 and 64 with such a bias: .*no tile fits"):
        plan_forward(spec("b1hqk"), small, "hopper")
    assert plan_forward(spec("b1hqk"), replace(SM90, shared_memory=65_536)).backend == "triton"  # which gets by with less


@triton_only
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_naming_it_without_a_gpu_raises() -> None:
    q = torch.randn(1, 4, 1, 8, dtype=torch.float16)
    with record_launches() as ran, backend("hopper"), pytest.raises(UnsupportedError, match=r"not supported by backend 'hopper'"):
        flash_attn_func(q, q, q)
    assert ran == []


# ---- configurations

DIMS = (1, 16, 17, 32, 64, 80, 96, 128, 192, 256)
BIASES = [None, *itertools.product(("bihqk", "11hqk", "11h1k", "b11q1", "11111"), ("bf16", "fp16", "fp32", "bool"))]


@pytest.mark.parametrize("bias", BIASES, ids=str)
def test_every_configuration_fits(bias: tuple[str, str] | None) -> None:
    for head, value, band in itertools.product(DIMS, DIMS, ((None, None), (None, 0), (-9, 4))):
        problem = spec(*(bias or (None,)), head_dim=head, value_dim=value, lo=band[0], hi=band[1])
        config = forward.choose(problem, SM90.shared_memory)
        assert config is not None, problem
        limit = shared.shared_limit(SM90.shared_memory, config.ctas_per_sm)
        assert config.shared_memory(problem) <= limit <= SM90.shared_memory, (problem, config)


@pytest.mark.parametrize("consumers, ctas_per_sm", [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3), (1, 4)])
def test_programs_that_run_together_share_registers_and_shared_memory(consumers: int, ctas_per_sm: int) -> None:
    """Registers of all threads at launch, and later, when the producer's warpgroup has given up its own."""
    config = ForwardConfig(consumers, 64, 2, ctas_per_sm=ctas_per_sm)
    assert config.launch_registers % 8 == config.registers % 8 == 0
    assert ctas_per_sm * (consumers + 1) * 128 * config.launch_registers <= 65536
    assert consumers * config.registers + 24 <= (consumers + 1) * config.launch_registers
    assert ctas_per_sm * (shared.shared_limit(SM90.shared_memory, ctas_per_sm) + 1024) <= SM90.shared_memory + 1024


@triton_only
@pytest.mark.parametrize("kernel, config, words", [
    ("forward", ForwardConfig(1, 64, 2, ctas_per_sm=3), r"consumers and ctas_per_sm: wanted fewer for head dim 128 .* got \(1, 3\)"),
    ("forward", ForwardConfig(3, 64, 2, separate_o=False, ctas_per_sm=2), r"consumers and ctas_per_sm: .* got \(3, 2\)"),
    ("forward", ForwardConfig(1, 64, 4, ctas_per_sm=2), "ctas_per_sm: wanted fewer CTAs, which take .* bytes of shared memory each, got 2"),
    ("dq", DqConfig(2, 64, 3, 2, ctas_per_sm=2), r"consumers and ctas_per_sm: .* got \(2, 2\)"),
], ids=str)  # fmt: skip
def test_programs_that_cannot_run_together_are_refused(kernel: str, config: ForwardConfig, words: str) -> None:
    problem = spec(head_dim=128, value_dim=128)
    with override_configs(**{kernel: config}), pytest.raises(ValueError, match=words):
        plan_forward(problem, SM90, "hopper") if kernel == "forward" else plan_backward(problem, NEEDS, SM90, "hopper")


@triton_only
def test_short_rows_and_biases_are_given_to_several_programs_a_processor() -> None:
    def ctas(problem: AttentionSpec) -> tuple[int, int]:
        (step,) = plan_forward(problem, SM90).steps
        assert isinstance(step.config, ForwardConfig)
        return step.config.ctas_per_sm, step.programs

    long, short = dict(queries=4096, keys=4096), dict(queries=512, keys=512, hi=0)
    assert ctas(spec(head_dim=64, value_dim=64, **long)) == (1, 132)
    assert ctas(spec(head_dim=64, value_dim=64, heads=64, **short)) == (3, 3 * 132)
    assert ctas(spec(head_dim=128, value_dim=128, heads=64, **short)) == (2, 2 * 132)
    assert ctas(spec(head_dim=64, value_dim=64, lo=-255, hi=0, **long)) == (3, 3 * 132)
    assert ctas(spec("11hqk", head_dim=64, value_dim=64, **long)) == (2, 2 * 132)
    assert ctas(spec("11hqk", head_dim=32, value_dim=32, **long)) == (4, 512)
    assert ctas(spec(head_dim=128, value_dim=128, heads=64, queries=257, keys=257)) == (2, 2 * 132)
    assert ctas(spec(head_dim=96, value_dim=96, heads=64, queries=257, keys=257)) == (3, 3 * 132)
    assert ctas(spec(head_dim=72, value_dim=72, heads=64, queries=256, keys=256)) == (1, 132)  # rows of 144 bytes
    assert ctas(spec(head_dim=160, value_dim=160, heads=64, queries=512, keys=512)) == (2, 2 * 132)
    assert ctas(spec(head_dim=64, value_dim=64, heads=1, batch_outer=1, **short)) == (1, 8)


def test_shared_memory_counts_every_buffer() -> None:
    """Against a sum written out: 2 consumers of 64 queries, 32 keys, dims 80 and 48 padded to 128 and 64."""
    problem = spec("b1hqk", "fp32", head_dim=80, value_dim=48)
    config = ForwardConfig(2, 32, 4, bias_stages=2)
    q, k, v, out, bias = 2 * 64 * 128 * 2, 4 * 32 * 128 * 2, 4 * 32 * 64 * 2, 2 * 64 * 64 * 2, 2 * 2 * 64 * 32 * 4
    used = config.shared_memory(problem)
    assert q + k + v + out + bias < used < q + k + v + out + bias + 2048
    assert used - replace(config, separate_o=False).shared_memory(problem) == out
    assert bias_bytes(spec("b1h1k", "fp32"), config) == 32 * 4 and bias_bytes(spec("b1hqk", "bool"), config) == 64 * 32
    assert bias_bytes(spec("b1hq1"), config) == bias_bytes(spec(), config) == 0


def bias_bytes(problem: AttentionSpec, config: ForwardConfig) -> int:
    return shared.bias_buffer(problem, config).nbytes


@pytest.mark.parametrize("wrong", [
    {"consumers": 0}, {"consumers": 4}, {"block_n": 8}, {"block_n": 96}, {"bias_stages": 0}, {"bias_stages": 5}, {"kv_stages": 0}, {"ctas_per_sm": 0},
    {"ctas_per_sm": 5},
], ids=str)  # fmt: skip
def test_a_config_checks_itself(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: wanted .+, got {next(iter(wrong.values()))}"):
        ForwardConfig(**{"consumers": 2, "block_n": 64, "kv_stages": 2} | wrong)


def test_block_and_text_of_a_config() -> None:
    config = ForwardConfig(3, 64, 2, separate_o=False)
    assert config.block_m == 192 and config.num_warps == 4 and str(config).startswith("192x64 ")
    assert (
        len({str(c) for c in (config, replace(config, ping_pong=True), replace(config, separate_o=True), replace(config, kv_stages=3))})
        == 4
    )


@triton_only
def test_override_by_hand() -> None:
    """A Hopper configuration reaches the Hopper forward pass alone, a portable one the portable one alone."""
    mine, portable = ForwardConfig(1, 32, 1), TileConfig(16, 16, 4, 1)
    usual = {name: plan_forward(spec(), SM90, name) for name in ("hopper", "triton")}
    with override_configs(forward=mine):
        assert plan_forward(spec(), SM90, "hopper").steps[0].config == mine
        assert plan_forward(spec(), SM90, "triton") == usual["triton"]
    with override_configs(forward=portable):
        assert plan_forward(spec(), SM90, "hopper") == usual["hopper"]
        assert plan_forward(spec(), SM90, "triton").steps[0].config == portable


@triton_only
def test_programs_and_order() -> None:
    config = ForwardConfig(2, 64, 2)
    for persistent, few in itertools.product((True, False), (True, False)):
        device = replace(SM90, sms=7 if few else 10_000)
        with override_configs(forward=replace(config, persistent=persistent)):
            (step,) = plan_forward(spec(), device, "hopper").steps
        tiles = 3 * 2 * 4  # ceil(300 / 128) tiles of queries, times batch, times heads
        assert step == Step("forward", replace(config, persistent=persistent), 7 if persistent and few else tiles, "head")
    assert plan_forward(spec("11hqk"), SM90, "hopper").steps[0].order == "batch"  # neighbours share the bias
    assert plan_forward(spec("bihqk"), SM90, "hopper").steps[0].order == "head"
    assert shared.query_tiles(spec(queries=1), config) == (1, 8)
    assert shared.query_tiles(spec(queries=129), config) == (2, 16)


# ---- the schedule, which is integer arithmetic of the kernel itself


class Scalar(int):
    """An integer as the kernel's language knows it: comparisons are numbers too, and convert."""

    def __lt__(self, other: int) -> Scalar:  # type: ignore[override]
        return Scalar(int(self) < int(other))

    def to(self, _: Any) -> Scalar:
        return self


def visits(monkeypatch: pytest.MonkeyPatch, programs: int, tiles: int, *problem: Any) -> list[list[tuple[int, int, int]]]:
    """(first query, head, batch) of the tiles that each program works through, by the kernel's own functions; tiles of 128 queries."""
    from triflash.kernels.hopper import schedule

    tiles_each, batch, heads, l2_group, serpentine, batch_fastest, longest = problem
    grid = SimpleNamespace(
        tiles_each=tiles_each, tiles=tiles, batch=batch, heads=heads, l2_group=l2_group, serpentine=serpentine, TILE=128, LONGEST=longest,
        BATCH_FASTEST=batch_fastest,
    )  # fmt: skip

    def tiles_of(pid: int) -> list[tuple[int, int, int]]:
        language = SimpleNamespace(
            program_id=lambda _: Scalar(pid), num_programs=lambda _: programs, where=lambda c, a, b: Scalar(a if c else b), int32=None
        )
        with monkeypatch.context() as patched:
            patched.setattr(schedule, "gl", language)
            for helper in ("_place", "_head_and_batch"):
                patched.setattr(schedule, helper, getattr(schedule, helper).fn)
            return [schedule.Uniform.locate.fn(grid, wave) for wave in range(schedule.Uniform.waves.fn(grid))]

    return [tiles_of(pid) for pid in range(programs)]


@triton_only
@pytest.mark.parametrize("batch_fastest", [False, True], ids=["heads fastest", "batch fastest"])
@pytest.mark.parametrize("longest", ["none", "last", "first"])
def test_every_tile_is_visited_once(batch_fastest: bool, longest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every l2_group and way of dealing. A grid is never larger than the number of tiles, so no program is without work."""
    for tiles_m, batch, heads, programs in itertools.product((1, 2, 5), (1, 3), (1, 2, 5), (1, 2, 3, 7, 8)):
        pairs, tiles = batch * heads, tiles_m * batch * heads
        if programs > tiles:
            continue
        for l2_group, serpentine in itertools.product({1, 2, pairs}, (0, 1)):
            problem = (tiles_m, batch, heads, min(l2_group, pairs), serpentine, batch_fastest, longest)
            visited = visits(monkeypatch, programs, tiles, *problem)
            wanted = itertools.product(range(0, 128 * tiles_m, 128), range(heads), range(batch))
            assert sorted(itertools.chain(*visited)) == sorted(wanted), (programs, problem)
            counts = [len(mine) for mine in visited]
            assert min(counts) >= 1 and max(counts) - min(counts) <= 1, (programs, problem)


@triton_only
def test_l2_groups_are_worked_off_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a causal mask the longest tiles come first, in every other l2_group last; the last l2_group ends with the shortest."""
    (order,) = visits(monkeypatch, 1, 12, 3, 1, 4, 2, 0, False, "last")
    assert [(m0 // 128, head) for m0, head, _ in order] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3), (1, 2), (1, 3), (0, 2), (0, 3),
    ]  # fmt: skip
    (order,) = visits(monkeypatch, 1, 12, 3, 1, 4, 2, 0, False, "first")
    assert [n0 // 128 for n0, _, _ in order] == [2, 2, 1, 1, 0, 0, 0, 0, 1, 1, 2, 2]
    (order,) = visits(monkeypatch, 1, 12, 3, 2, 2, 4, 0, True, "none")
    assert [(head, b) for _, head, b in order[:4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]  # neighbours share a head, and its bias


@triton_only
def test_the_plans_own_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grid, l2_groups and order of real plans, carried out: every (query tile, head, batch) once."""
    problems = [
        spec(queries=queries, heads=heads, batch_outer=batch, keys=keys, hi=hi, head_dim=256, value_dim=256)
        for queries, heads, batch, keys, hi in itertools.product((1, 129, 700), (1, 5), (1, 6), (1, 30_000), (None, 0))
    ] + [spec("11hqk", batch_outer=3, batch_inner=2, queries=500, head_dim=128, value_dim=128)]
    for problem in problems:
        (step,) = plan_forward(problem, replace(SM90, sms=13), "hopper").steps
        assert isinstance(step.config, ForwardConfig)
        tiles_m, tiles = shared.query_tiles(problem, step.config)
        l2_group, serpentine = shared.l2_order(problem, step.config, step.programs)
        assert 1 <= l2_group <= problem.batch * problem.heads
        if step.config.block_m != 128:
            continue
        arguments = (
            tiles_m,
            problem.batch,
            problem.heads,
            l2_group,
            serpentine,
            step.order == "batch",
            "last" if problem.hi is not None else "none",
        )
        visited = itertools.chain(*visits(monkeypatch, step.programs, tiles, *arguments))
        wanted = itertools.product(range(0, 128 * tiles_m, 128), range(problem.heads), range(problem.batch))
        assert sorted(visited) == sorted(wanted), problem
        assert 128 * tiles_m >= problem.queries > 128 * (tiles_m - 1)


@triton_only
@pytest.mark.parametrize("length, pairs", [(512, 512), (2048, 128), (8192, 32), (16384, 16), (8192, 128), (4096, 40), (2048, 64)])
def test_causal_work_is_dealt_evenly(length: int, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The busiest of 132 programs has at most 7 % more blocks than the mean: counted tile by tile, as the kernel deals them."""
    problem = spec(queries=length, keys=length, heads=pairs, batch_outer=1, head_dim=128, value_dim=128, hi=0)
    config = ForwardConfig(2, 128, 2)
    tiles_m, tiles = shared.query_tiles(problem, config)
    visited = visits(monkeypatch, 132, tiles, tiles_m, 1, pairs, *shared.l2_order(problem, config, 132), False, "last")
    load = [sum(m0 // 128 + 1 + shared.TILE_COST for m0, _, _ in mine) for mine in visited]
    assert max(load) <= 1.07 * sum(load) / len(load)


def test_l2_groups_are_no_larger_than_they_need_to_be() -> None:
    config = ForwardConfig(2, 128, 2)
    sizes: dict[str, Any] = dict(queries=2048, keys=2048, heads=16, batch_outer=4, head_dim=128, value_dim=128)
    assert shared.l2_order(spec(**sizes), config, 132) == (1, 0)
    assert shared.l2_order(spec("11hqk", **sizes), config, 132) == (
        4,
        0,
    )  # all entries of the batch, which read the same 8 MB of bias a head
    assert shared.l2_order(spec("bihqk", **sizes), config, 132) == (1, 0)
    assert shared.l2_order(spec("11hqk", **sizes | dict(queries=512, keys=512)), config, 132) == (1, 0)  # which L2 keeps


@pytest.mark.parametrize("lo, hi", [(None, None), (None, 0), (0, None), (-100, 50), (None, -150), (200, None), (None, 290)], ids=str)
def test_blocks_of_a_tile_of_queries_are_counted_right(lo: int | None, hi: int | None) -> None:
    """From the first to the last with a key that a query of the tile sees, or where none is seen one: of what lies before the diagonal too."""
    config = ForwardConfig(1, 64, 2)
    for queries, keys in itertools.product((1, 64, 300, 513), (1, 128, 300, 700)):
        counted = shared._key_blocks(spec(None, queries=queries, keys=keys, lo=lo, hi=hi), config)
        for tile, blocks in enumerate(counted):
            first, last = tile * 64, min(tile * 64 + 64, queries) - 1
            end = keys if hi is None else max(0, min(last + hi + 1, keys))
            begin = 0 if lo is None else max(0, first + lo)
            assert blocks == max(1, (end - 1) // 64 - begin // 64 + 1), (queries, keys, tile)
        assert len(counted) == -(-queries // 64)


def test_a_larger_l2_group_must_be_worth_it() -> None:
    """Two tiles a pair, of 4 blocks and 1, on four programs: one pair after the other gives two programs all the long ones."""
    lengths, pairs, programs = [4, 1], 8, 4
    even = {size: min(shared.load_imbalance(lengths, pairs, programs, size, serpentine) for serpentine in (0, 1)) for size in (1, 2, 8)}
    assert even == {1: 1.6, 2: 1.0, 8: 1.0}
    assert shared.best_order(lengths, pairs, programs, [1, 2, 8])[0] == 2  # the smallest of the best
    assert shared.best_order(lengths, pairs, programs, [1, 8], preferred=1, tolerance=0.6)[0] == 1
    assert shared.best_order(lengths, pairs, programs, [1, 8], preferred=1, tolerance=0.5)[0] == 8
    assert shared.best_order(lengths, pairs, programs, [1, 2, 8], preferred=4)[0] == 2


@pytest.mark.parametrize("serpentine", [0, 1])
def test_load_imbalance_is_that_of_dealing_tile_by_tile(serpentine: int) -> None:
    rng = random.Random(serpentine)
    for _ in range(200):
        lengths = [rng.randrange(1, 20) for _ in range(rng.randrange(1, 9))]
        pairs, programs = rng.randrange(1, 30), rng.randrange(1, 17)
        l2_group = rng.randrange(1, pairs + 1)
        groups = -(-pairs // l2_group)
        tiles = [
            length
            for number in range(groups)
            for length in (lengths[::-1] if (groups - 1 - number) % 2 else lengths)
            for _ in range(min(l2_group, pairs - number * l2_group))
        ]
        load = [0.0] * programs
        for at, length in enumerate(tiles):
            wave, place = divmod(at, programs)
            load[programs - 1 - place if wave & serpentine else place] += length
        assert shared.load_imbalance(lengths, pairs, programs, l2_group, serpentine) == max(load) * programs / sum(load)


@triton_only
def test_queries_that_see_nothing_get_a_block_to_hide() -> None:
    """The kernel's loops have no empty case: ``visible_blocks`` is ``segments`` with at least one block, which lies inside the axis."""
    from triflash.kernels.hopper import scores_qk
    from triflash.kernels.triton import prims

    config, bounds = SimpleNamespace(consumers=2, block_n=32), (None, -200, -70, -1, 0, 1, 40, 100, 300)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scores_qk, "segments", prims.segments.fn)
        patched.setattr(scores_qk, "BM", 64)
        for m0, M, N, lo, hi in itertools.product((0, 128, 256), (257, 300), (1, 31, 32, 200), bounds, bounds):
            begin, full_begin, full_end, end = scores_qk.visible_blocks.fn(
                SimpleNamespace(C=config, bounds=None), SimpleNamespace(queries=M, keys=N, lo=lo, hi=hi), m0, 0
            )
            before = prims.segments.fn(m0, min(m0 + 128, M) - 1, N, lo, hi, 32)
            problem = (m0, M, N, lo, hi, (begin, full_begin, full_end, end))
            assert (begin, full_begin, full_end) == before[:3] and end == max(before[3], begin + 1), problem
            hidden = before[0] == before[3]
            assert begin < end and (not hidden or full_begin == full_end), problem  # the block that is there for form's sake is masked
            if not hidden:
                assert end == before[3] and end * 32 < N + 32, problem


@pytest.mark.parametrize(
    "config", [ForwardConfig(2, 64, 2), DqConfig(2, 64, 2, 2), DbiasConfig(2, 64, 2, 2), DkdvConfig(2, 2)], ids=lambda c: type(c).__name__
)
def test_a_configuration_says_all_of_itself(config: Any) -> None:
    """Kernels take it as one compile-time constant, which Triton tells from another by its text."""
    others = {
        "consumers": 1, "block_n": 32, "bias_stages": 2, "ping_pong": True, "separate_o": False, "separate_dq": False, "persistent": False,
        "q_stages": 2, "ctas_per_sm": 2, "deferred": False, "chunk": 32, "k_stages": 3, "v_stages": 1, "o_stages": 1, "kv_stages": 3,
        "key_slots": 3, "query_slots": 3, "dq_warpgroup": True, "unroll": 2, "red_dq": True, "head_splits": 2, "d256": True, "block_m": None,
        "own_widths": True, "hold_q": True, "hold_dout": True, "p_stages": 1, "hold_k": True, "hold_v": True, "dq_blocks": 4,
    }  # fmt: skip
    for field in dataclasses.fields(config):
        other = {"q_stages": 1, "kv_stages": 2}.get(field.name) if isinstance(config, DkdvConfig) else None
        other = other or others[field.name]
        if other is not None:
            wide = isinstance(config, DkdvConfig) and field.name in ("p_stages", "own_widths", "hold_k", "hold_v")
            whole = dataclasses.replace(config, d256=True) if wide else config
            whole = dataclasses.replace(config, dq_warpgroup=True) if field.name == "dq_blocks" else whole
            assert str(dataclasses.replace(whole, **{field.name: other})) != str(whole), field.name
