"""The backward pass on Hopper as far as it is arithmetic: which kernels give which gradients, what is refused, configurations, schedules. No GPU."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from here import triton_only
from test_hopper_plan import SM90, spec, visits
from triflash import UnsupportedError
from triflash.launch.room import Described, Real, twin
from triflash.plan import hopper
from triflash.plan.configs import TileConfig
from triflash.plan.kernels.dbias import DbiasConfig, bias_tiles
from triflash.plan.kernels.dkdv import DkdvConfig, _query_blocks, key_tiles, l2_order
from triflash.plan.kernels.dq import DqConfig
from triflash.plan.kernels.shared import HopperConfig
from triflash.plan.override import override_configs
from triflash.plan.select import Plan, plan_backward, plan_forward
from triflash.spec import AttentionSpec, Gradients, Needs, Operands, Packed, Saved
from unlaunched import watching

pytestmark = triton_only
SHORT, LONG = 200, 4096  # keys: below where adding up dq is worth it, and above it whatever is hidden
LIMIT = SM90.shared_memory


def needs_of(letters: str) -> Needs:
    return Needs(*(letter in letters for letter in "qkvb"))


def subsets(letters: str) -> list[str]:
    return ["".join(some) for count in range(1, len(letters) + 1) for some in itertools.combinations(letters, count)]


def names(plan: Plan) -> list[str]:
    return [step.kernel for step in plan.steps]


def planned(problem: AttentionSpec, letters: str, sms: int = SM90.sms) -> Plan:
    plan = plan_backward(problem, needs_of(letters), replace(SM90, sms=sms), "hopper")
    assert plan.backend == "hopper"
    return plan


# ---- which kernels run


@pytest.mark.parametrize("letters", subsets("qkv"))
@pytest.mark.parametrize("dim, keys, band, deterministic, adds", [
    (64, LONG, None, False, True), (128, LONG, None, False, True), (40, LONG, 0, False, True), (128, LONG, 0, False, True),
    (64, SHORT, None, False, False), (128, SHORT, None, False, False), (64, 512, 0, False, True), (40, 512, None, False, True),
    (128, 768, None, False, False), (128, 1024, None, False, True), (64, 384, None, False, False), (32, 256, None, False, True),
    (32, SHORT, 0, False, False), (32, LONG, 0, False, True),
    (64, 2000, 0, False, True), (128, 2000, 0, False, False),  # what is seen on average is half of the keys, and tiles are short; narrow heads do not mind
    (64, LONG, None, True, False), (128, LONG, 0, True, False),
    (136, LONG, None, False, False), (256, LONG, 0, False, False),
])  # fmt: skip
def test_dq_is_added_up_where_keys_are_many(letters: str, dim: int, keys: int, band: int | None, deterministic: bool, adds: bool) -> None:
    """With dk or dv, that is: alone it has a kernel of its own. Each gradient is given by one kernel (dq_sum's owner hands it to postprocess)."""
    problem = spec(head_dim=dim, value_dim=dim, queries=700, keys=keys, hi=band, deterministic=deterministic)
    plan = planned(problem, letters)
    adds = adds and "q" in letters and letters != "q"
    if adds:
        assert names(plan) == ["preprocess", "dqdkdv", "postprocess"]
        assert plan.steps[1].gives == tuple(f"d{letter}" for letter in "kvq" if letter in letters) and plan.steps[2].gives == ("dq",)
    else:
        assert names(plan) == ["preprocess", *["dkdv"] * bool(set(letters) & set("kv")), *["dq"] * ("q" in letters)]
        given = [gradient for step in plan.steps for gradient in step.gives]
        assert sorted(given) == sorted(f"d{letter}" for letter in letters)
    assert hopper.adds_dq(problem, needs_of(letters), LIMIT) == adds


@pytest.mark.parametrize("dim, lo, hi, adds", [
    (128, -511, 0, False), (128, -1023, 0, False), (128, -1024, 0, True), (128, -256, 256, False), (128, None, 0, True), (64, -511, 0, True), (32, -511, 0, True),
])  # fmt: skip
def test_dq_of_wide_heads_is_not_added_up_within_narrow_windows(dim: int, lo: int | None, hi: int, adds: bool) -> None:
    """However many keys there are: a key tile sees few queries, and begins and ends as often."""
    problem = spec(head_dim=dim, value_dim=dim, queries=LONG, keys=LONG, lo=lo, hi=hi)
    assert ("dqdkdv" in names(planned(problem, "qkv"))) == adds


@pytest.mark.parametrize("dim, keys, lo, hi, unroll", [
    (32, 2048, None, 0, 1), (24, 2048, None, 0, 1), (32, 1056, None, 0, 1), (32, 2048, None, None, 2), (32, 2048, -511, 0, 2), (64, 2048, None, 0, 2),
])  # fmt: skip
def test_narrow_heads_take_one_block_a_step_in_long_triangles(dim: int, keys: int, lo: int | None, hi: int | None, unroll: int) -> None:
    """As measured (docs/tuning.md); windows and wider heads two."""
    problem = spec(head_dim=dim, value_dim=dim, queries=keys, keys=keys, lo=lo, hi=hi)
    (step,) = [step for step in planned(problem, "qkv").steps if step.kernel == "dqdkdv" and step.loops in ("both", "small")]
    assert isinstance(step.config, DkdvConfig) and step.config.unroll == unroll


@pytest.mark.parametrize("letters", subsets("qkvb"))
@pytest.mark.parametrize("bias", ["b1hqk", "11hqk", "b11qk", "11h1k", "b1h1k", "b111k", "1ihqk", "bih1k"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
def test_which_kernel_gives_the_gradient_of_a_bias(bias: str, letters: str, dims: tuple[int, int]) -> None:
    """dq if the bias is of full shape, dkdv if it varies over keys alone, else dbias; every gradient comes from one kernel, and no other runs."""
    for keys, inner in itertools.product((SHORT, LONG), (1, 3)):
        varies = tuple(letter != "1" for letter in bias)
        if inner > 1 or varies[1]:  # of one inner batch entry, a bias counts as varying
            problem = spec(bias, batch_inner=inner, keys=keys, head_dim=dims[0], value_dim=dims[1])
        else:
            problem = spec(bias[0] + "i" + bias[2:], keys=keys, head_dim=dims[0], value_dim=dims[1])
        assert problem.bias is not None
        source = "dq" if all(problem.bias.varies) else "dkdv" if not problem.bias.varies[3] else "dbias"
        plan = planned(problem, letters)
        steps = names(plan)
        adding = "dqdkdv" in steps
        assert adding == (
            keys == LONG
            and max(dims) <= 128
            and "q" in letters
            and bool(set(letters) & set("kv"))
            and not (source == "dq" and "b" in letters)
        )
        wanted = {"preprocess", *["postprocess"] * adding}
        if set(letters) & set("kv") or ("b" in letters and source == "dkdv"):
            wanted.add("dqdkdv" if adding else "dkdv")
        if ("q" in letters and not adding) or ("b" in letters and source == "dq"):
            wanted.add("dq")
        if "b" in letters and source == "dbias":
            wanted.add("dbias")
        assert set(steps) - {"dbias_sum"} == wanted and len(steps) == len(set(steps)), (problem, steps)
        assert {gradient for step in plan.steps for gradient in step.gives} == {
            {"b": "dbias"}.get(letter, f"d{letter}") for letter in letters
        }
        if "b" in letters:
            (giver,) = (step for step in plan.steps if "dbias" in step.gives and step.kernel != "dbias_sum")
            assert giver.kernel == ("dqdkdv" if adding and source == "dkdv" else source)
            assert ("dbias_sum" in steps) == (giver.splits > 1)
            if source == "dkdv":
                sizes = zip((problem.batch_outer, problem.batch_inner, problem.heads), problem.bias.varies[:3], strict=True)
                assert giver.splits == math.prod(size for size, on in sizes if not on)


def test_a_small_bias_is_cut_into_parts() -> None:
    """Such that the busiest SM has no more rounds than with a tile for each, in three waves at most, and no more parts than rounds."""
    problem = spec("11hqk", batch_outer=40, queries=300, keys=200, heads=2)
    for sms in (1, 8, 132, 10_000):
        plan = planned(problem, "b", sms)
        (step,) = (step for step in plan.steps if step.kernel == "dbias")
        assert isinstance(step.config, DbiasConfig)
        tiles = bias_tiles(problem, step.config)[2]
        programs = sms * step.config.ctas_per_sm
        each = max(1, min(40, -(-programs // tiles)))
        rounds, most = (-(-tiles * parts // programs) * -(-40 // parts) for parts in (step.splits, each))
        assert rounds <= most and step.programs <= min(programs, tiles * step.splits)
        assert 1 <= step.splits <= min(40, max(1, 3 * programs // tiles))
        assert (plan.steps[-1].kernel == "dbias_sum") == (step.splits > 1)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_heads(groups: int) -> None:
    """Both passes take them; the kernel of keys has tiles for key heads alone, the others for query heads."""
    problem = spec(heads=4, groups=groups, keys=LONG)
    assert plan_forward(problem, SM90).backend == plan_backward(problem, needs_of("qkv"), SM90).backend == "hopper"
    many = planned(problem, "qkv", 10_000)
    preprocess, keys, *sums, postprocess = many.steps
    assert isinstance(keys.config, DkdvConfig) and keys.config.head_splits == (2 if groups == 4 else 1)  # for so many SMs
    assert keys.programs == LONG // 128 * 2 * 4 // groups * keys.config.head_splits
    assert preprocess.programs == -(-300 // 128) * 2 * 2 * 4 and postprocess.programs == -(-300 // 64) * 2 * 4
    assert [step.programs for step in sums] == ([LONG // 64 * 2] if groups == 4 else [])
    for bias in ("b1hqk", "11h1k", "11hqk"):
        assert plan_backward(spec(bias, heads=4, groups=groups), needs_of("qkvb"), SM90).backend == "hopper"


# ---- what is refused


@pytest.mark.parametrize("bias", ["11hq1", "b1hq1", "11111", "b1h11"])
@pytest.mark.parametrize("letters", ["q", "kv", "qkvb"])
def test_a_bias_that_does_not_vary_over_keys_goes_elsewhere(bias: str, letters: str) -> None:
    problem = spec(bias)
    assert plan_forward(problem, SM90).backend == "hopper"
    assert plan_backward(problem, needs_of(letters), SM90).backend == "triton"
    with pytest.raises(UnsupportedError, match=r"^the backward pass with a bias that does not vary over keys: .*'hopper'; .*'triton'"):
        plan_backward(problem, needs_of(letters), SM90, "hopper")


def test_a_device_without_the_memory_is_refused() -> None:
    """Where a forward tile fits and a backward one does not, the backward pass goes elsewhere."""
    problem, small = spec("11hqk", head_dim=256, value_dim=256), replace(SM90, shared_memory=150_000)
    assert plan_forward(problem, small).backend == "hopper"
    assert plan_backward(problem, needs_of("qkv"), small).backend == "triton"
    with pytest.raises(UnsupportedError, match=r"^the backward pass at head dims 256 and 256 with such a bias: .*no tile fits"):
        plan_backward(problem, needs_of("qkv"), small, "hopper")


# ---- configurations


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "bool"])
@pytest.mark.parametrize("bias", [None, "b1hqk", "11hqk", "11h1k"])
def test_every_configuration_fits(bias: str | None, dtype: str) -> None:
    widths = (1, 16, 40, 64, 65, 96, 128, 129, 192, 256)
    for head, value, letters, hi in itertools.product(widths, widths, ("qkv", "q", "v", "qkvb", "b"), (None, 0)):
        if "b" in letters and (bias is None or dtype == "bool"):
            continue
        problem = spec(bias, dtype, head_dim=head, value_dim=value, hi=hi, keys=LONG)
        for step in planned(problem, letters).steps:
            if isinstance(step.config, HopperConfig):
                assert 1024 < step.config.shared_memory(problem, step.gives) <= LIMIT, (problem, step)
            else:
                assert step.kernel in ("preprocess", "postprocess", "dkdv_sum", "dbias_sum")
            if isinstance(step.config, DkdvConfig):
                assert step.config.d256 == (max(head, value) > 128)


def test_shared_memory_counts_every_buffer() -> None:
    """Against sums written out, of blocks of 64 queries: dims 80 and 48 padded to 128 and 64; dims 200 and 130 padded to 256."""
    problem = spec("b1hqk", "fp32", head_dim=80, value_dim=48)
    config = DkdvConfig(2, 1, 2)
    k_v, q, dout, bias = 128 * 2 * (128 + 64), 2 * 64 * (128 * 2 + 2 * 4), 64 * (64 * 2 + 4), 2 * 2 * 64 * 64 * 4
    used = config.shared_memory(problem)
    assert k_v + q + dout + bias < used < k_v + q + dout + bias + 2048
    ds, dq = 2 * 64 * 128 * 2, 64 * 128 * 4
    assert config.shared_memory(problem, ("dq",)) - used == ds + dq
    assert replace(config, red_dq=True).shared_memory(problem, ("dq",)) - used == ds
    wide = spec("b1hqk", "bool", head_dim=200, value_dim=130)
    softcapped = replace(wide, bias=spec("11h1k").bias, softcap=50.0)  # dk asks for p times a derivative, dbias for p itself
    own, shared = (DkdvConfig(2, 2, d256=True).shared_memory(softcapped, gives) for gives in (("dbias",), ()))
    assert own - shared == 2 * 64 * 64 * 2 and own <= LIMIT
    k_v, q, dout, p, bias = 64 * 2 * 512, 2 * 64 * (512 + 4), 2 * 64 * (512 + 4), 2 * 64 * 64 * 2, 64 * 64
    used = DkdvConfig(2, 2, d256=True).shared_memory(wide)
    assert k_v + q + dout + p + bias < used < k_v + q + dout + p + bias + 2048
    assert not any(each.name == "bias" for each in config.buffers(spec("11h1k")))  # a number a key comes without a buffer


@pytest.mark.parametrize("wrong", [
    {"q_stages": 0}, {"o_stages": 5}, {"bias_stages": 0}, {"block_m": 128}, {"d256": True}, {"d256": True, "o_stages": 2, "dq_warpgroup": True},
    {"d256": True, "q_stages": 1}, {"q_stages": 3}, {"unroll": 3}, {"unroll": 2, "q_stages": 1}, {"unroll": 2, "dq_warpgroup": True},
    {"red_dq": True, "dq_warpgroup": True}, {"d256": True, "q_stages": 2, "o_stages": 2, "red_dq": True},
], ids=str)  # fmt: skip
def test_a_config_checks_itself(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: wanted .+, got {next(iter(wrong.values()))}"):
        DkdvConfig(**{"q_stages": 2, "o_stages": 1} | wrong)


def test_text_of_a_config() -> None:
    config = DkdvConfig(2, 2)
    others = (
        replace(config, dq_warpgroup=True),
        replace(config, unroll=2),
        replace(config, red_dq=True),
        replace(config, d256=True),
        replace(config, o_stages=1),
        replace(config, bias_stages=2),
    )
    assert str(config).startswith("64x128 ") and str(replace(config, d256=True)).startswith("64x64 ")
    assert len({str(c) for c in (config, *others)}) == 7


def test_override_by_hand() -> None:
    """One for dqdkdv has dq added up where it need not be, and nowhere where it must not be; other backends pass over all of them."""
    keys, rows, portable = DkdvConfig(1, 1), DqConfig(1, 32, 2, 2, separate_dq=False), TileConfig(16, 16, 4, 1)
    problem = spec(keys=SHORT)
    usual = {name: plan_backward(problem, needs_of("qkv"), SM90, name) for name in ("hopper", "triton")}
    with override_configs(dqdkdv=keys):
        plan = planned(problem, "qkv")
        assert names(plan) == ["preprocess", "dqdkdv", "postprocess"] and plan.steps[1].config == keys
        for unable in (replace(problem, deterministic=True), replace(problem, head_dim=256)):
            assert "dqdkdv" not in names(planned(unable, "qkv"))
        assert names(planned(problem, "q")) == ["preprocess", "dq"] and names(planned(problem, "kv")) == ["preprocess", "dkdv"]
        assert plan_backward(problem, needs_of("qkv"), SM90, "triton") == usual["triton"]
    bias = DbiasConfig(1, 32, 2, 2)
    with override_configs(dkdv=keys, dq=rows, dbias=bias):
        plan = planned(spec("11hqk", keys=SHORT), "qkvb")
        assert [step.config for step in plan.steps[1:4]] == [keys, rows, bias]
        assert plan_backward(problem, needs_of("qkv"), SM90, "triton") == usual["triton"]
    tiny = replace(spec(keys=512, queries=512, batch_outer=1), packed=Packed(16), deterministic=True)
    both = [plan_forward(tiny, SM90, "hopper"), planned(tiny, "qkv")]
    with override_configs(forward=portable, dkdv=portable, dq=portable, dqdkdv=portable):
        assert planned(problem, "qkv") == usual["hopper"]
        assert [plan_forward(tiny, SM90, "hopper"), planned(tiny, "qkv")] == both
        assert plan_backward(problem, needs_of("qkv"), SM90, "triton").steps[-1].config == portable
    for kernel, other in (("forward", keys), ("dkdv", rows), ("dq", bias), ("dbias", rows), ("delta", keys)):
        with pytest.raises(TypeError, match=f"^{kernel}: wanted TileConfig"), override_configs(**{kernel: other}):
            pass
    for wide in (False, True):
        with override_configs(dkdv=DkdvConfig(2, 2, d256=wide)), pytest.raises(ValueError, match=f"^d256: wanted {not wide} for head dims"):
            planned(replace(problem, head_dim=64 if wide else 256), "k")


# ---- the schedule of the kernel that owns keys


def blocks_that_see(problem: AttentionSpec, config: DkdvConfig, tile: int) -> int:
    """Query blocks from the first to the last with a query that sees a key of the tile; the last block is whole, of queries that are not."""
    keys = range(tile * config.block_n, min((tile + 1) * config.block_n, problem.keys))
    low, high = problem.lo, problem.hi
    first = max(0, keys[0] - high) if high is not None else 0
    last = -(-problem.queries // config.block_m) * config.block_m - 1
    last = min(last, keys[-1] - low) if low is not None else last
    return 0 if first > last else last // config.block_m - first // config.block_m + 1


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("lo, hi", [(None, None), (None, 0), (0, None), (-100, 50), (None, -150), (200, None), (None, 290)], ids=str)
def test_work_of_a_tile_is_counted_right(lo: int | None, hi: int | None, wide: bool) -> None:
    config = DkdvConfig(2, 2, d256=wide)
    for queries, keys in itertools.product((1, 64, 300, 513), (1, 128, 300, 700)):
        problem = spec(queries=queries, keys=keys, lo=lo, hi=hi)
        for tile in range(key_tiles(problem, config)[0]):
            assert _query_blocks(problem, config)[tile] == blocks_that_see(problem, config, tile), (problem, tile)


@pytest.mark.parametrize("groups", [1, 5])
def test_the_plans_own_schedules(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grid, sections and order of real plans, carried out: every (key tile, key head, batch) once."""
    for keys, batch, queries, (lo, hi) in itertools.product(
        (1, 129, 700), (1, 6), (1, 20_000), ((None, None), (None, 0), (-50, None), (-50, 50))
    ):
        problem = spec(keys=keys, heads=5, groups=groups, batch_outer=batch, queries=queries, lo=lo, hi=hi, head_dim=128, value_dim=128)
        step = planned(problem, "kv", 13).steps[1]
        assert isinstance(step.config, DkdvConfig)
        tiles_n, tiles = key_tiles(problem, step.config)
        l2_group, serpentine = l2_order(problem, step.config, step.programs)
        longest = "first" if hi is not None else "last" if lo is not None else "none"
        parts = 5 // groups * step.config.head_splits
        arguments = (tiles_n, batch, parts, l2_group, serpentine, step.order == "batch", longest)
        visited = itertools.chain(*visits(monkeypatch, step.programs, tiles, *arguments))
        assert sorted(visited) == sorted(itertools.product(range(0, 128 * tiles_n, 128), range(parts), range(batch))), problem


def test_blocks_in_turn_are_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """``turned`` visits every query block of a tile once, partly visible ones in their places; and tiles of one head begin elsewhere."""
    from types import SimpleNamespace

    from test_hopper_plan import Scalar
    from triflash.kernels.hopper import scores_kq
    from triflash.kernels.triton import prims

    class Comparable(Scalar):
        def __ge__(self, other: int) -> Any:
            return Scalar(int(self) >= int(other))

        def __lt__(self, other: int) -> Any:
            return Scalar(int(self) < int(other))

    language = SimpleNamespace(where=lambda c, a, b: Comparable(a if c else b))
    every = SimpleNamespace(SKIPS=False)  # block with its mask, if there is one
    monkeypatch.setattr(scores_kq, "gl", language)
    monkeypatch.setattr(scores_kq, "segments", prims.segments.fn)
    monkeypatch.setattr(scores_kq, "in_turn", scores_kq.in_turn.fn)
    for M, N, lo, hi in itertools.product((1, 64, 300, 1024), (128, 300, 1024), (None, -200, 3), (None, 0, 90, -130)):
        firsts = set()
        for n0 in range(0, N, 128):
            begin, whole, part, end = (
                int(x)
                for x in scores_kq.visible_blocks.fn(
                    SimpleNamespace(C=DkdvConfig(2, 2), bounds=None), SimpleNamespace(queries=M, keys=N, lo=lo, hi=hi), n0, 0
                )
            )
            blocks = blocks_that_see(spec(queries=M, keys=N, lo=lo, hi=hi), DkdvConfig(1, 1), n0 // 128)
            assert begin <= whole <= part <= end and end - begin == blocks, (M, N, lo, hi, n0)
            for member in range(2):  # of a group of heads
                steps = [
                    int(scores_kq.turned.fn(every, Comparable(member * blocks + step), max(blocks, 1), begin, whole, part, None, n0, 64))
                    for step in range(blocks)
                ]
                assert sorted(steps) == list(range(begin, end)), (M, N, lo, hi, n0)
                assert steps[: whole - begin] == list(range(begin, whole)) and steps[part - begin :] == list(range(part, end))
            firsts.update(steps[:1])
        if (lo, hi, M, N) == (None, None, 1024, 1024):
            assert len(firsts) == 8  # eight tiles, eight places to begin at


# ---- what a launch allocates and hands out, on tensors of this machine's own


def launched(problem: AttentionSpec, letters: str, rest: bool = True) -> tuple[Plan, list[Any], dict[str, int]]:
    """The calls of a backward pass on zeros, none of them started, and the bytes of what was allocated between them, which are those that
    a description of it names.
    """
    from triflash.launch import hopper_backward as launch

    plan = planned(problem, letters)
    B, H, M, N = problem.batch, problem.heads, problem.queries, problem.keys
    dtype = torch.bfloat16

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    x = Operands(zeros(B, M, H, problem.head_dim), *(zeros(B, N, problem.kv_heads, d) for d in (problem.head_dim, problem.value_dim)))
    if problem.bias is not None:
        sizes = (problem.batch_outer, problem.batch_inner, H, M, N)
        x = x._replace(bias=zeros(*(size if on else 1 for size, on in zip(sizes, problem.bias.varies, strict=True))))
    out, lse = zeros(B, M, H, problem.value_dim), zeros(B, H, M, dtype=torch.float32)
    grads = Gradients(
        *(torch.zeros_like(y) if need and y is not None else None for y, need in zip(x[:4], vars(needs_of(letters)).values(), strict=False))
    )
    saved = Saved(out, lse, torch.zeros_like(lse) if problem.keeps_rest and rest else None)
    allocated: list[int] = []
    with watching(allocated, "new_empty"):
        calls = launch.backward(Real(x.q), plan, problem, x, saved, torch.zeros_like(out), None, grads)

    room = Described()
    twins = [None if each is None else twin(each) for each in (*x, *saved, out, *grads)]
    for each in twins:
        room.give(each)
    operands, (out, lse, rests, dout, dq, dk, dv, dbias) = twins[: len(x)], twins[len(x) : len(x) + 8]  # type: ignore[assignment]
    written = Gradients(dq, dk, dv, dbias)
    described = launch.backward(room, plan, problem, Operands(*operands), Saved(out, lse, rests), dout, None, written)  # type: ignore[arg-type]
    assert [(call.kernel, call.programs, call.constants) for call in described] == [
        (call.kernel, call.programs, call.constants) for call in calls
    ]
    assert [each.nbytes for each in room.allocations] == allocated
    return plan, calls, {each.name: each.nbytes for each in room.allocations}


@pytest.mark.parametrize("letters, bias", [
    *itertools.product(("qkv", "q", "kv"), (None, "bihqk", "1ihqk", "1ih1k")),
    *itertools.product(("qkvb", "b"), ("bihqk", "1ihqk", "1ih1k", "bi11k")),
])  # fmt: skip
@pytest.mark.parametrize("keys, dim", [(SHORT, 64), (2048, 40), (SHORT, 256)])
def test_scratch_is_what_a_launch_allocates(letters: str, bias: str | None, keys: int, dim: int) -> None:
    problem = spec(bias, batch_inner=1, queries=70, keys=keys, heads=2, head_dim=dim, value_dim=dim)
    plan, calls, memory = launched(problem, letters)
    assert [call.programs for call in calls] == [step.programs for step in plan.steps]
    assert memory["lse and delta for TMA"] == 2 * 2 * 3 * 128 * 4
    assert ("float32 sum of dq" in memory) == ("postprocess" in names(plan)) and ("partial sums of dbias" in memory) == (
        "dbias_sum" in names(plan)
    )


@pytest.mark.parametrize("letters", ["qkv", "qk", "v"])
@pytest.mark.parametrize("keys, dim", [(200, 64), (SHORT, 40), (2048, 128)])
def test_scratch_of_heads_in_parts(letters: str, keys: int, dim: int) -> None:
    problem = spec(batch_inner=1, queries=70, keys=keys, heads=16, groups=8, head_dim=dim, value_dim=64)
    plan, calls, memory = launched(problem, letters)
    assert [step.kernel for step in plan.steps].count("dkdv_sum") == 1
    assert [call.programs for call in calls] == [step.programs for step in plan.steps]
    assert {name for name in memory if name.startswith("partial")} == {f"partial sums of d{letter}" for letter in letters if letter != "q"}


def test_heads_in_parts_for_the_bias_alone() -> None:
    """There is nothing else to be summed up than what keeps the heads apart."""
    problem = spec("11h1k", queries=70, keys=200, heads=16, groups=8, head_dim=64, value_dim=64)
    plan, calls, memory = launched(problem, "b")
    assert [step.config.head_splits for step in plan.steps if isinstance(step.config, DkdvConfig)] == [4]
    assert names(plan) == ["preprocess", "dkdv", "dbias_sum"] and len(calls) == 3
    assert set(memory) == {"lse and delta for TMA", "whether lse is small", "partial sums of dbias"}


@pytest.mark.parametrize("group, splits", [(4, 2), (7, 2), (71, 24), (5, 5), (8, 3)])
def test_parts_of_a_key_head_have_all_its_query_heads(group: int, splits: int) -> None:
    from triflash.kernels.hopper.scores_kq import key_heads, query_heads

    heads = 3 * group
    assert (key_heads.fn(heads, group, None), key_heads.fn(heads, group, splits)) == (3, 3 * splits)
    assert [query_heads.fn(n, group, None) for n in range(3)] == [(n, n * group, group) for n in range(3)]
    parts = [query_heads.fn(n, group, splits) for n in range(3 * splits)]
    assert [(own, own * group + member) for own in range(3) for member in range(group)] == [
        (own, head) for own, first, count in parts for head in range(first, first + count)
    ]
    assert {count for _, _, count in parts} <= {group // splits, -(-group // splits)}


@pytest.mark.parametrize("batch, heads, groups, length, dim, hi, splits", [
    (4, 16, 16, 4096, 128, 0, 4),  # 1.79 times as fast as whole, on an H200 (docs/tuning.md)
    (4, 16, 8, 4096, 128, 0, 2),  # 1.12
    (4, 16, 8, 4096, 128, None, 1),  # two parts: 0.98
    (4, 16, 8, 4096, 64, 0, 1),  # 0.95
    (1, 32, 4, 4096, 128, 0, 1),  # 0.92
    (1, 32, 8, 8192, 128, 0, 2),  # 1.06
    (1, 28, 7, 4096, 128, 0, 2),  # 1.48: of four heads and three
    (1, 28, 7, 4096, 128, None, 1),  # 0.88
    (1, 28, 7, 16384, 128, 0, 1),  # 0.93
    (1, 71, 71, 2048, 64, 0, 24),  # 7.9
    (4, 16, 16, 2048, 128, None, 2),  # 1.74
    (8, 16, 16, 1, 128, None, 8),  # too little to do for a GPU, but no reason to fail
    (4, 16, 1, 4096, 128, 0, 1),
    (4, 16, 2, 128, 128, 0, 1),
    (4, 16, 16, 4096, 256, 0, 1),  # wide heads: not yet
])  # fmt: skip
def test_in_how_many_parts_heads_are_dealt_out(
    batch: int, heads: int, groups: int, length: int, dim: int, hi: int | None, splits: int
) -> None:
    sizes = {"batch_outer": 1, "batch_inner": batch, "heads": heads, "groups": groups, "queries": length, "keys": length}
    problem = spec(**sizes, head_dim=dim, value_dim=dim, hi=hi)
    for deterministic in (False, True):
        plan = plan_backward(replace(problem, deterministic=deterministic), Needs(True, True, True, False), SM90, "hopper")
        (keys,) = {step.config for step in plan.steps if isinstance(step.config, DkdvConfig)}  # of one launch, or of both
        assert keys.head_splits == splits or deterministic
        assert (plan.step("dkdv_sum") is not None) == (keys.head_splits > 1)


def test_parts_that_cannot_be() -> None:
    problem = spec(batch_inner=1, heads=8, groups=4, head_dim=64, value_dim=64)
    with (
        override_configs(dqdkdv=DkdvConfig(2, 2, dq_warpgroup=True, head_splits=5)),
        pytest.raises(ValueError, match=r"head_splits.*at most 4.*5"),
    ):
        plan_backward(problem, Needs(True, True, True, False), SM90, "hopper")
    with pytest.raises(ValueError, match="head_splits"):
        DkdvConfig(2, 2, head_splits=0)
    with pytest.raises(ValueError, match="d256"):
        DkdvConfig(2, 2, d256=True, head_splits=2)


@pytest.mark.parametrize("bias", ["bihqk", "1ihqk", "1ih1k"])
def test_kernels_read_no_rest_that_nobody_kept(bias: str) -> None:
    """The seed's ``_flash_attn_backward`` is given lse alone, with whatever bias."""
    for letters, rest in itertools.product(("qkv", "qkvb"), (True, False)):
        _, (preprocess, *others), _ = launched(spec(bias, queries=70, keys=90), letters, rest)
        assert preprocess.constants["KINDS"] == (3 if rest else 2)
        assert {call.constants["HAS_REST"] for call in others if "HAS_REST" in call.constants} == {rest}


@triton_only
@pytest.mark.parametrize("dim", [8, 16, 24, 32, 40, 64, 256])
def test_every_head_dim_takes_these_kernels(dim: int) -> None:
    """By itself, in both passes; the narrowest, which they pad to 32, were 1.6 to 2.7 times as fast there as in the portable ones."""
    problem = spec(head_dim=dim, value_dim=dim, keys=384)
    assert plan_forward(problem, SM90).backend == plan_backward(problem, Needs(True, True, True, False), SM90).backend == "hopper"
