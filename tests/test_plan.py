"""Planning is arithmetic on plain numbers: it runs on any machine for any device, and these tests need no GPU."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from dataclasses import replace

import pytest
import torch

from triflash import UnsupportedError
from triflash.plan import tables
from triflash.plan.configs import (
    MAX_HEAD_DIM,
    OWNERS_OF_KEYS,
    Problem,
    TileConfig,
    default_config,
    misread,
    padded,
    shared_memory,
    with_features,
)
from triflash.plan.device import KNOWN_DEVICES, DeviceFacts, facts_of
from triflash.plan.override import active, override_configs
from triflash.plan.select import Plan, Step, plan_backward, plan_forward, why_not
from triflash.spec import AttentionSpec, Band, BiasSpec, Needs, resolve_precision, spec_of

GPU = KNOWN_DEVICES["sm90"]
KERNELS = ("forward", "delta", "dkdv", "dq", "dbias")
ALL = Needs(True, True, True, True)
NO_BIAS = Needs(True, True, True, False)


def spec(bias: str | None = None, dtype: str = "fp16", **sizes: int) -> AttentionSpec:
    """A spec; ``bias`` in the docs' shorthand, five letters over (outer, inner, head, query, key)."""
    plain = dict(batch_outer=2, batch_inner=1, queries=300, keys=200, heads=4, head_dim=64, value_dim=64) | sizes
    bias_spec = BiasSpec("fp32", tuple(letter != "1" for letter in bias)) if bias else None  # type: ignore[arg-type]
    return AttentionSpec(dtype, **plain, bias=bias_spec, lo=None, hi=None, scale=0.1, precision="ieee")


def names(plan: Plan) -> list[str]:
    return [step.kernel for step in plan.steps]


def test_plans_are_pure_hashable_and_cached() -> None:
    first, again = (plan_forward(spec("b1hqk"), GPU, "triton") for _ in range(2))
    assert first is again and hash(first) == hash(again)
    assert hash(spec("b1hqk")) == hash(spec("b1hqk")) and spec("b1hqk") != spec("b1h1k")
    assert plan_backward(spec("b1hqk"), ALL, GPU) is plan_backward(spec("b1hqk"), ALL, GPU)
    for value in (first, first.steps[0], spec(), GPU, ALL, TileConfig(16, 16, 4, 1)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, None)


@pytest.mark.parametrize("dq, dk, dv, dbias", list(itertools.product([False, True], repeat=4)))
def test_only_the_kernels_that_the_gradients_need(dq: bool, dk: bool, dv: bool, dbias: bool) -> None:
    """The gradient of a bias comes from the pass that has it anyway, where there is one, and from a kernel of its own elsewhere."""
    for bias, source in (("bihqk", "dq"), ("11h1k", "dkdv"), ("bih1k", "dkdv"), ("b1hqk", "dbias"), ("11hq1", "dbias")):
        plan = plan_backward(spec(bias, batch_outer=8, batch_inner=8, heads=64), Needs(dq, dk, dv, dbias), GPU, "triton")
        extra = source if dbias else None
        wanted = {"delta": dq or dk or dbias, "dkdv": dk or dv or extra == "dkdv", "dq": dq or extra == "dq", "dbias": extra == "dbias"}
        assert [name for name in names(plan) if name != "dbias_sum"] == [kernel for kernel, needed in wanted.items() if needed]
        given = [name for step in plan.steps if step.kernel not in ("delta", "dbias_sum") for name in step.gives]
        assert sorted(given) == sorted(name for name, need in (("dq", dq), ("dk", dk), ("dv", dv), ("dbias", dbias)) if need)
    for backend in ("tiled", "oracle"):
        assert plan_backward(spec("b1hqk"), Needs(dq, dk, dv, dbias), GPU, backend).steps == (Step("backward"),)


@pytest.mark.parametrize("sizes", [{"queries": 0}, {"keys": 0}, {"heads": 0}, {"batch_outer": 0}], ids=str)
def test_empty_problems(sizes: dict[str, int]) -> None:
    """No backward kernels; a forward one only where there are queries (they see nothing, and must say so)."""
    assert spec(**sizes).is_empty and not spec().is_empty
    assert plan_backward(spec("11hqk", **sizes), ALL, GPU, "triton").steps == ()
    assert names(plan_forward(spec(**sizes), GPU, "triton")) == (["forward"] if "keys" in sizes else [])


@pytest.mark.parametrize("arch", [arch for arch in KNOWN_DEVICES if arch != "cpu"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_default_fits_the_device(kernel: str, arch: str) -> None:
    device = KNOWN_DEVICES[arch]
    flags = ["bias", "banded"]
    for head_dim, itemsize, *values in itertools.product((16, 32, 64, 128, 256), (2, 4), *[(False, True)] * len(flags)):
        for products in ("",) if itemsize == 2 else ("", "tf32", "tf32x3"):
            problem = Problem(kernel, head_dim, itemsize, **dict(zip(flags, values, strict=True)), products=products)
            config = default_config(problem, device)
            assert shared_memory(problem, config, device) <= device.shared_memory, (problem, config)
            assert misread(problem, config) is None


def test_every_measured_row_is_valid() -> None:
    """That it fits its device is measured, by compiling it ahead of time, and not left to the estimate."""
    seen = set()
    for row in tables.ROWS:
        assert row.arch in KNOWN_DEVICES and row.problem.kernel in (*KERNELS, *OWNERS_OF_KEYS) and row.spills >= 0
        assert row.problem.head_dim == padded(row.problem.head_dim) <= MAX_HEAD_DIM
        short = row.most_keys is not None
        assert (row.arch, row.problem, short) not in seen, f"two rows for {row.problem}"
        seen.add((row.arch, row.problem, short))
        assert tables.lookup(row.arch, row.problem, row.most_keys) == row
        if row.most_keys is not None:
            longer = tables.lookup(row.arch, row.problem, row.most_keys + 1)
            assert longer == tables.lookup(row.arch, row.problem) != row
        assert tables.lookup("sm00", row.problem) is None


def test_padded() -> None:
    assert [padded(d) for d in (1, 16, 17, 32, 33, 40, 64, 72, 96, 128, 129, 256)] == [16, 16, 32, 32, 64, 64, 64, 128, 128, 128, 256, 256]


@pytest.mark.parametrize("wrong", [{"block_m": 24}, {"block_n": 8}, {"num_warps": 3}, {"num_stages": 0}], ids=str)
def test_a_config_checks_itself(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: wanted"):
        TileConfig(**{"block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 1} | wrong)


def test_programs_cover_the_problem() -> None:
    config = TileConfig(64, 32, 4, 1)
    with override_configs(**dict.fromkeys(KERNELS, config)):
        forward = plan_forward(spec(), GPU, "triton")
        backward = plan_backward(spec("b11qk"), ALL, GPU, "triton")
    assert forward.steps[0].programs == 5 * 2 * 4  # ceil(300 / 64) tiles of queries, times batch, times heads
    assert {s.kernel: s.programs for s in backward.steps if s.kernel in ("delta", "dq", "dkdv")} == {"delta": 40, "dq": 40, "dkdv": 7 * 8}
    own, splits = 5 * 7 * 2, backward.step("dbias")
    assert splits is not None and splits.programs == own * splits.splits


PATTERNS = ["".join(x) for x in itertools.product("b1", "i1", "h1", "q1", "k1")]


@pytest.mark.parametrize("bias", [x for x in PATTERNS if x.endswith("1k") and x[:3] != "bih"])
def test_partial_rows_of_dbias(bias: str) -> None:
    """One row of partial sums per (batch, head) pair that the bias is broadcast over, summed afterwards."""
    plan = plan_backward(spec(bias, batch_outer=3, batch_inner=2, heads=5), Needs(False, False, False, True), GPU, "triton")
    rows = 1
    for letter, size in zip(bias, (3, 2, 5), strict=False):
        rows *= size if letter == "1" else 1
    assert plan.step("dkdv").splits == plan.step("dbias_sum").splits == rows  # type: ignore[union-attr]


@pytest.mark.parametrize("bias", [x for x in PATTERNS if not x.endswith("1k") and x != "bihqk"])
def test_dbias_splits(bias: str) -> None:
    """The broadcast loop is split only where tiles are few, never into more parts than it has rounds, and then the parts are summed."""
    config = TileConfig(64, 64, 4, 1)
    for heads, sms in itertools.product((1, 5, 500), (1, 100, 10_000)):
        problem = spec(bias, batch_outer=3, batch_inner=2, queries=130, keys=70, heads=heads)
        with override_configs(dbias=config):
            plan = plan_backward(problem, Needs(False, False, False, True), DeviceFacts("sm90", sms, 1 << 18), "triton")
        step = plan.step("dbias")
        assert step is not None and step.config == config
        sizes = dict(zip(range(5), (3, 2, heads, 3, 2), strict=True))
        own = looped = 1
        for at, size in sizes.items():
            if bias[at] == "1":
                looped *= size
            else:
                own *= size
        assert 1 <= step.splits <= looped
        assert step.programs == own * step.splits
        assert own < 2 * sms or step.splits == 1
        assert (plan.step("dbias_sum") is not None) == (step.splits > 1)
        if step.splits > 1:
            assert plan.step("dbias_sum").splits == step.splits  # type: ignore[union-attr]


def test_override() -> None:
    config = TileConfig(16, 256, 8, 2)
    before = plan_forward(spec(), GPU, "triton")
    assert active() == ()
    with override_configs(forward=config):
        assert plan_forward(spec(), GPU, "triton").steps[0].config == config
        with override_configs(dq=TileConfig(32, 32, 1, 1)):
            assert dict(active()) == {"forward": config, "dq": TileConfig(32, 32, 1, 1)}
        assert "dq" not in dict(active())
        assert plan_backward(spec(), ALL, GPU, "tiled").steps == (Step("backward"),)
    assert active() == () and plan_forward(spec(), GPU, "triton") is before
    assert str(before.steps[0]).startswith("forward ")
    assert str(Step("forward", config)) == "forward 16x256 w8 s2" and str(Step("backward")) == "backward"


def test_automatic_choice() -> None:
    for arch, backend in (("cpu", "tiled"), ("interpreter", "tiled"), ("sm80", "triton"), ("gfx942", "triton")):
        assert plan_forward(spec(), KNOWN_DEVICES[arch]).backend == backend
        assert plan_backward(spec("11hqk"), ALL, KNOWN_DEVICES[arch]).backend == backend
    assert plan_forward(spec(dtype="fp64"), GPU).backend == "tiled"
    assert plan_forward(spec(head_dim=513), GPU).backend == "tiled"
    assert plan_forward(spec(head_dim=300), GPU).backend == "triton"
    assert plan_backward(spec(head_dim=300), NO_BIAS, GPU).backend == "tiled"


def test_a_spec_is_hashed_once_and_takes_no_hash_to_another_process() -> None:
    one = spec("bhqk")
    before = pickle.dumps(one)
    assert hash(one) == hash(spec("bhqk")) and hash(one) != hash(spec())
    assert pickle.loads(pickle.dumps(one)) == one and pickle.dumps(one) == before


@pytest.mark.parametrize("problem, arch, feature", [
    (spec(), "cpu", "CPU tensors"),
    (spec(dtype="fp64"), "sm90", "float64"),
    (spec(head_dim=513), "sm90", "the (forward|backward) pass of head dim 513"),
    (spec(value_dim=1024), "sm90", "the (forward|backward) pass of head dim 1024"),
    (spec(dtype="bf16"), "interpreter", "bfloat16 in Triton's interpreter"),
], ids=["cpu", "float64", "head dim", "value dim", "bfloat16"])  # fmt: skip
def test_a_named_backend_never_falls_back(problem: AttentionSpec, arch: str, feature: str) -> None:
    for plan in (
        lambda: plan_forward(problem, KNOWN_DEVICES[arch], "triton"),
        lambda: plan_backward(problem, ALL, KNOWN_DEVICES[arch], "triton"),
    ):
        with pytest.raises(UnsupportedError, match=rf"^{feature}: not supported by backend 'triton'; .+"):
            plan()
    assert why_not("tiled", problem, KNOWN_DEVICES[arch]) is None
    assert why_not("oracle", problem, KNOWN_DEVICES[arch]) is None


def test_spec_of_tensors() -> None:
    q, k, v = torch.zeros(6, 5, 2, 8), torch.zeros(6, 7, 2, 8), torch.zeros(6, 7, 2, 3)
    got = spec_of(q, k, v, torch.zeros(3, 1, 1, 5, 7, dtype=torch.bool), 2, -1, 4, 0.5, "tf32")
    assert (got.batch_outer, got.batch_inner, got.batch, got.queries, got.keys, got.heads, got.head_dim, got.value_dim) == (
        3,
        2,
        6,
        5,
        7,
        2,
        8,
        3,
    )
    assert got.bias == BiasSpec("bool", (True, False, False, True, True)) and got.bias.is_mask and str(got.bias) == "b11qk"
    assert (got.lo, got.hi, got.scale, got.precision, got.dtype) == (-1, 4, 0.5, "tf32", "fp32")
    made = AttentionSpec(**{each.name: getattr(got, each.name) for each in dataclasses.fields(AttentionSpec)})
    assert vars(got).keys() - {"batch"} == vars(made).keys() and got == made and hash(got) == hash(made)
    assert spec_of(q.half(), k.half(), v.half(), None, 1, None, None, 1, "tf32").precision == "ieee"
    assert str(BiasSpec("fp32", (True, True, True, False, True))) == "bh1k"


def test_precision_follows_pytorch() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        highest = "ieee" if hasattr(torch.backends.cuda.matmul, "fp32_precision") else "default"  # before 2.9 the two look alike
        for setting, wanted in (("highest", highest), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert resolve_precision("") == wanted
            assert resolve_precision("tf32x3") == "tf32x3"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch 2.9 and up")
def test_a_precision_that_nobody_set() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "none"
        assert resolve_precision("") == "default"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("head_dim", [16, 40, 64, 65, 128, 256])
@pytest.mark.parametrize("arch", ["sm80", "sm90", "gfx942", "interpreter"])
@pytest.mark.parametrize("precision", ["default", "ieee", "tf32", "tf32x3"])
def test_each_kernel_says_how_it_multiplies_float32(precision: str, arch: str, head_dim: int) -> None:
    """Unset: three TF32 products where that was seen to be exact enough. Asked for by name: just that."""
    asked = replace(spec("11hqk", "fp32", head_dim=head_dim, value_dim=head_dim), precision=precision)
    steps = plan_forward(asked, KNOWN_DEVICES[arch], "triton").steps
    steps += plan_backward(asked, Needs(True, True, True, True), KNOWN_DEVICES[arch], "triton").steps
    unset = "tf32x3" if arch.startswith("sm") and head_dim <= 128 else "ieee"
    wanted = unset if precision == "default" else precision
    assert {step.precision for step in steps if step.kernel in ("forward", "dkdv", "dq", "dbias")} == {wanted}


def test_few_queries_multiply_alike_in_both_passes() -> None:
    """Where few_forward may run, which multiplies by FMA units, a backward pass that did otherwise would find other scores."""
    asked = replace(spec(None, "fp32", queries=4, keys=4096), precision="default")
    steps = plan_forward(asked, GPU, "triton").steps + plan_backward(asked, NO_BIAS, GPU, "triton").steps
    assert {step.precision for step in steps} == {"ieee"} and steps[0].kernel == "few_forward"


def test_kernels_that_multiply_no_tiles_say_nothing_of_products() -> None:
    asked = replace(spec("11hqk", "fp32"), precision="tf32x3")
    found = {step.kernel: step.precision for step in plan_backward(asked, ALL, GPU, "triton").steps}
    assert found["delta"] == "ieee" and found["dq"] == "tf32x3"


def test_features_do_not_lead_to_tiles_that_triton_misreads() -> None:
    asked = replace(spec("11hqk", "fp32"), precision="tf32x3", softcap=5.0, alibi=True, dropout=0.1, key_starts=True)
    for plan in (plan_forward(asked, GPU, "triton"), plan_backward(asked, ALL, GPU, "triton")):
        for step in plan.steps:
            if step.kernel in ("forward", "dkdv", "dq", "dbias"):
                problem = Problem(step.kernel, 64, 4, True, False, step.precision)
                assert isinstance(step.config, TileConfig) and misread(problem, step.config) is None


def test_tiles_that_triton_misreads_are_refused() -> None:
    asked = replace(spec(None, "fp32"), precision="tf32x3")
    with override_configs(dkdv=TileConfig(16, 64, 8, 1)), pytest.raises(ValueError, match="override_configs.*or 4 warps, got 16x64 w8 s1"):
        plan_backward(asked, Needs(True, True, True, False), KNOWN_DEVICES["sm90"], "triton")
    with override_configs(dkdv=TileConfig(16, 64, 4, 1)):
        plan_backward(asked, Needs(True, True, True, False), KNOWN_DEVICES["sm90"], "triton")


def test_small_facts() -> None:
    assert (
        Band(None, 0, "top_left").offsets(3, 5) == (None, 0) and Band(2, 0).offsets(3, 5) == (0, 2) and Band().offsets(3, 5) == (None, None)
    )
    assert facts_of(torch.device("cpu")).arch in ("cpu", "interpreter")
    assert all(arch == facts.arch for arch, facts in KNOWN_DEVICES.items())


def test_automatic_choice_on_a_gpu_that_triton_does_not_know() -> None:
    old = DeviceFacts("sm75", 40, 65_536)
    assert plan_forward(spec(), old).backend == "tiled"
    with pytest.raises(UnsupportedError, match="sm75: not supported by backend 'triton'; .*sm80"):
        plan_forward(spec(), old, "triton")


def test_a_device_that_holds_no_tile_is_refused() -> None:
    tiny = DeviceFacts("sm80", 40, 1024)
    with pytest.raises(UnsupportedError, match="shared memory"):
        plan_forward(spec(), tiny, "triton")
    with pytest.raises(UnsupportedError, match="shared memory"):
        plan_backward(spec(), Needs(True, True, True, False), tiny, "triton")
    assert (
        plan_forward(spec(), tiny).backend == plan_backward(spec(), Needs(True, True, True, False), tiny).backend == "tiled"
    )  # the automatic choice takes the next


@pytest.mark.parametrize("bias", ["b1hqk", "bihqk", "11h1k"])
def test_a_float32_bias_gets_buffers_that_fit(bias: str) -> None:
    """Measured rows hold a 16-bit bias; the same tiles with a float32 one take more, and must still fit."""
    for head_dim in (32, 64, 128, 256):
        plan = plan_backward(spec(bias, dtype="bf16", head_dim=head_dim, value_dim=head_dim), ALL, GPU, "triton")
        for step in plan.steps:
            if step.kernel in ("dkdv", "dq", "dbias"):
                config = step.config
                assert config is not None
                row = 2 * head_dim
                m, n = config.block_m * row, config.block_n * row
                own, streamed = {"dkdv": (2 * n, 2 * m), "dq": (2 * m, 2 * n), "dbias": (0, 2 * (m + n))}[step.kernel]
                used = own + config.num_stages * (streamed + config.block_m * config.block_n * 4)
                assert used <= GPU.shared_memory or config.num_stages == 1, (step.kernel, head_dim, used)


@pytest.mark.parametrize("precision", ["tf32x3", "tf32"])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("feature", ["softcap", "dropout", "alibi", "mask", "second"])
def test_tf32_products_beside_features_leave_wgmma(feature: str, head_dim: int, precision: str) -> None:
    """ptxas 12.8 loses the descriptors of WGMMA's operands where registers are scarce: products of 32 rows take mma.sync."""
    value = {"softcap": 2.0, "dropout": 0.5, "alibi": True, "mask": spec("b1hqk").bias, "second": spec("b1hqk").bias}[feature]
    one = dataclasses.replace(spec("b1hqk", dtype="fp32", head_dim=head_dim, value_dim=head_dim), precision=precision, **{feature: value})
    plain = dataclasses.replace(one, **{feature: getattr(spec(), feature)})
    for chosen, largest in ((one, 32), (plain, 128)):
        steps = (*plan_forward(chosen, GPU, "triton").steps, *plan_backward(chosen, ALL, GPU, "triton").steps)
        tiles = [max(step.config.block_m, step.config.block_n) for step in steps if step.kernel in ("forward", "dkdv", "dq", "dbias")]
        assert len(tiles) >= 3 and max(tiles) <= largest
        assert largest == 32 or max(tiles) >= 64


def test_features_leave_fewer_scores_a_thread() -> None:
    """What scores go through takes registers: fewer of them a thread, by smaller tiles or more warps; without features nothing changes."""
    problems = [Problem(kernel, 128, 2, False, True) for kernel in ("forward", "dq", "dkdv")]
    for problem, shape, weight in itertools.product(problems, [(256, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 2), (32, 32, 4, 1)], range(6)):
        config = TileConfig(*shape)
        found = with_features(problem, config, weight)
        most = 32 if weight < 2 else 16 if weight < 4 else 8
        least = 32 if problem.kernel == "dkdv" else 64
        assert found == config if not weight else found.block_n == config.block_n and found.num_stages == config.num_stages
        if weight:
            each = found.block_m * found.block_n / (32 * found.num_warps)
            assert each <= most or (found.block_m <= max(least, config.block_m) and found.num_warps == 8 and found.block_m <= least)
    assert plan_backward(dataclasses.replace(spec(), sink=True), Needs(False, False, False, False, True), GPU, "triton").steps[0].gives == (
        "dsink",
    )
