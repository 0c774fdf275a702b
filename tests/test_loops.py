"""Hopper's backward kernels that are launched for each of their two loops, of which one works and the other leaves at once: the plan of it,
and on the CPU's stand-in (``gluon_twin.py``) or on such a GPU that results are the same."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import gluon_twin
import test_huge
import test_varlen_hopper
from cases import Case, build
from expected import kernels
from here import NEAREST, stand_in_only
from running import loops_apart, results_of, run_case
from triflash import explain
from triflash.flops import visible_pairs
from triflash.launch.calls import Call
from triflash.plan.device import NAMED_DEVICES, DeviceFacts
from triflash.plan.kernels import loops
from triflash.plan.kernels.dkdv import DkdvConfig
from triflash.plan.override import Config
from triflash.plan.select import plan_backward
from triflash.plan.steps import Step
from triflash.spec import AttentionSpec, BiasSpec, Needs

BF16, F16, BOOL = torch.bfloat16, torch.float16, torch.bool
H200 = NAMED_DEVICES["h200"]
NEEDS = Needs(True, True, True, False)


def spec(D: int, S: int, causal: bool = False, B: int | None = None, **more: Any) -> AttentionSpec:
    """16,384 tokens of 16 heads."""
    sizes = {"batch_outer": B or 16384 // S, "batch_inner": 1, "heads": 16, "queries": S, "keys": S}
    return AttentionSpec(
        **sizes,
        head_dim=D,
        value_dim=D,
        dtype="bf16",
        lo=None,
        hi=0 if causal else None,
        **{"bias": None, "scale": 0.1, "precision": "", **more},
    )


def steps(problem: AttentionSpec, needs: Needs = NEEDS, device: DeviceFacts = H200) -> list[tuple[str, str]]:
    return [(step.kernel, step.loops) for step in plan_backward(problem, needs, device, "hopper").steps]


# The plan.


def test_long_kernels_are_launched_for_each_loop() -> None:
    both, each = (lambda kernel: [(kernel, "both")]), (lambda kernel: [(kernel, "small"), (kernel, "any")])
    first, last = both("preprocess"), both("postprocess")
    assert steps(spec(64, 2048)) == [*first, *each("dqdkdv"), *last]
    assert steps(spec(64, 2048, causal=True)) == [*first, *both("dqdkdv"), *last]
    assert steps(spec(128, 2048, causal=True)) == [*first, *each("dkdv"), *both("dq")]
    assert steps(spec(128, 512, causal=True)) == [*first, *both("dkdv"), *both("dq")]
    assert steps(spec(256, 2048)) == [*first, *each("dkdv"), *each("dq")]
    assert steps(spec(256, 512, B=1)) == [*first, *both("dkdv"), *both("dq")]
    few = replace(H200, sms=H200.sms // 8)  # on which it takes as long
    assert steps(spec(256, 512, B=8), device=few) == [*first, *each("dkdv"), *each("dq")]


def test_kernels_of_one_loop_are_launched_once() -> None:
    """Where nothing can be large, and where a kernel is no faster for small lse."""
    assert {loops for _, loops in steps(spec(128, 8192, softcap=20.0))} == {"both"}
    biased = spec(256, 8192, bias=BiasSpec("bf16", (True, True, True, True, True)))
    assert {loops for _, loops in steps(biased)} == {"both"}
    shared = spec(64, 4096, bias=BiasSpec("bf16", (False, False, True, True, True)))
    found = steps(shared, replace(NEEDS, dbias=True))
    assert [name for name, loops in found if loops == "small"] == ["dqdkdv", "dbias"]
    assert [name for name, loops in found if loops == "any"] == ["dqdkdv", "dbias"]


@pytest.mark.parametrize(
    ("D", "causal", "kernel", "measured"), [(128, False, "dqdkdv", 1048), (128, True, "dkdv", 407), (128, True, "dq", 296)]
)
def test_what_a_kernel_is_believed_to_take(D: int, causal: bool, kernel: str, measured: float) -> None:
    """Of 2048 queries and keys on an H200."""
    problem = spec(D, 2048, causal)
    step = plan_backward(problem, NEEDS, H200, "hopper").step(kernel)
    assert step is not None
    assert abs(loops.microseconds(problem, step, H200) / measured - 1) < 0.1


def test_what_is_believed_follows_pairs_gradients_and_processors() -> None:
    problem, step = spec(64, 2048), Step("dqdkdv", DkdvConfig(2, 2), gives=("dk", "dv", "dq"))
    whole = loops.microseconds(problem, step, H200)
    assert loops.microseconds(problem, replace(step, gives=("dk", "dv")), H200) == pytest.approx(whole * 4 / 5)
    assert loops.microseconds(problem, step, replace(H200, sms=66)) == pytest.approx(2 * whole)
    assert loops.microseconds(replace(problem, hi=0), step, H200) == pytest.approx(whole / 2, rel=1e-3)
    assert loops.microseconds(replace(problem, batch_outer=4), step, H200) == pytest.approx(whole / 2)


def test_visible_pairs_of_long_rows() -> None:
    """In no time: plans ask for them."""
    assert visible_pairs(10**9, 10**9, None, 0) == 10**9 * (10**9 + 1) // 2
    for M, N in itertools.product((0, 1, 5, 9), repeat=2):
        for lo, hi in itertools.product((None, -12, -5, -1, 0, 3, 10), repeat=2):
            seen = sum((lo is None or j - i >= lo) and (hi is None or j - i <= hi) for i in range(M) for j in range(N))
            assert visible_pairs(M, N, lo, hi) == seen, (M, N, lo, hi)


def test_explain_says_so() -> None:
    q = torch.empty(8, 2048, 16, 128, dtype=BF16, device="meta")
    told = explain(q, q, q, grads=("q", "k", "v"), device="h200", deterministic=True)
    assert [line for line in told.launches if " dkdv" in line] == [
        "hopper: dkdv 64x128 s2/2 b1 kv2 for small lse", "hopper: dkdv 64x128 s2/2 b1 kv2 for any lse",
    ]  # fmt: skip
    text = str(told)
    for words in (
        "for where every lse is small, as it is of ordinary scores; else it leaves",
        "for where some lse is large; else it leaves",
    ):
        assert text.count(f"  launched       {words}") == 2  # of dkdv, and of dq
    short = explain(q[:1, :512], q[:1, :512], q[:1, :512], grads=("q", "k", "v"), device="h200")
    assert "launched" not in str(short) and not any("lse" in line for line in short.launches)


def test_two_launches_share_memory() -> None:
    """Partial sums of grouped heads and of biases, and dq that nobody asked for."""
    q, k = torch.empty(1, 8192, 16, 64, dtype=BF16, device="meta"), torch.empty(1, 8192, 1, 64, dtype=BF16, device="meta")
    for pattern, dims in (("hqk", (1, 16, 8192, 8192)), ("qk", (1, 1, 8192, 8192)), ("k", (1, 1, 1, 8192))):
        bias = torch.empty(dims, dtype=BF16, device="meta")
        for grads in (("q", "k", "v", "bias"), ("bias",)):
            told = explain(q, k, k, bias, grads=grads, device="h200", backend="hopper")
            names = [name for name, _ in told.memory]
            assert len(names) == len(set(names)), (pattern, names)
            assert any(line.endswith(" for any lse") for line in told.launches) == (pattern != "hqk" or len(grads) > 1), pattern


# Results.

DKDV = [
    Case("full", B=2, M=130, N=150, H=2),
    Case("causal, wide bias", B=2, M=200, N=200, bias="1hqk", causal=True),
    Case("window, bias of keys", B=2, M=150, N=300, bias="1h1k", lo=-40, hi=120),
    Case("grouped, lengths, slopes", B=3, M=140, N=200, H=4, Hk=2, lengths=(70, 0, 200), alibi="h", dlse=True),
    Case("mask, sink", B=2, M=100, N=260, bias="b1qk", bias_dtype=BOOL, bias_values="rows", sink=True, hi=60),
    Case("d 128", B=1, M=140, N=150, D=128, causal=True),
    Case("d 256", B=1, M=100, N=140, D=256, causal=True),
    Case("d 192, grouped", B=1, M=70, N=140, H=2, Hk=1, D=192),
    Case("no dq", B=1, M=70, N=130, grads="kv"),
    Case("full bias", B=2, M=70, N=130, bias="bhqk", grads="qkvb"),
    Case("two biases", B=2, M=130, N=150, H=2, bias="1hqk", second="b11k", dtype=BF16, grads="qkvbt"),
    Case("bias alone", B=2, M=130, N=150, H=2, bias="1hqk", grads="b"),
]


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("backend", [NEAREST])
@pytest.mark.parametrize("case", DKDV, ids=lambda case: str(case.name).replace(" ", "-"))
def test_results(case: Case, backend: str, adds: bool, device: torch.device) -> None:
    """For small lse and, where the case has any, for large ones."""
    configs: dict[str, Config] = {"dqdkdv": DkdvConfig(2, 2)} if adds and case.D <= 128 and "b" not in case.grads else {}
    with loops_apart():
        run_case(replace(case, tiles=None), backend, device, configs, True, sms=2)


def results(case: Case, size: float, apart: bool, **how: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """With q of so large numbers."""
    inputs = build(replace(case, tiles=None), torch.device("cpu"))
    with torch.no_grad():
        inputs.q.mul_(size)
    if apart:
        with loops_apart():
            (found,), ran = results_of(case, inputs, "stand-in", {}, **how)
    else:
        (found,), ran = results_of(case, inputs, "stand-in", {}, **how)
    return found, ran


WRITTEN = {
    "dkdv": ("dk_desc", "dv_desc", "dk_parts", "dv_parts", "dbias", "dq_desc", "dq_sum"),
    "dkdv_d256": ("dk_desc", "dv_desc", "dbias"),
    "dq": ("dq_desc", "dbias_desc"),
    "dbias": ("dbias_desc", "dbias_out"),
}
SPLIT = Case("grouped", B=1, M=300, N=300, H=8, Hk=1)  # whose query heads are dealt out in parts


@stand_in_only
@pytest.mark.parametrize("size", [1.0, 3000.0])
@pytest.mark.parametrize("case", [*(case for case in DKDV if case.alibi is None), SPLIT], ids=lambda case: str(case.name).replace(" ", "-"))
def test_one_of_two_launches_writes(case: Case, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the kernel gives, and nobody else touches it; bits are those of a kernel with both loops."""
    wrote: list[tuple[str, str]] = []
    run = gluon_twin.run

    def watched(call: Call, seed: int = 0) -> None:
        way = call.constants.get("LOOPS", "both")
        if way == "both":
            run(call, seed)
            return
        name = call.kernel.fn.__name__
        given = dict(zip((parameter.name for parameter in call.kernel.params), call.args, strict=False))
        targets = [getattr(given[each], "base", given[each]) for each in WRITTEN[name] if given[each] is not None]
        assert targets
        sums = [id(getattr(given.get(each), "base", given.get(each))) for each in ("dq_desc", "dq_sum")] if name == "dkdv" else []
        for target in targets:
            if way == "small" and id(target) not in sums:  # which preprocess has cleared
                target.fill_(float("nan"))
        before = [target.clone() for target in targets]
        run(call, seed)
        changed = [not torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before, targets, strict=True)]
        assert all(changed) or not any(changed)
        if all(changed):
            wrote.append((name, way))

    wanted, _ = results(case, size, False, sms=4)
    monkeypatch.setattr(gluon_twin, "run", watched)
    found, ran = results(case, size, True, sms=4)
    monkeypatch.undo()
    assert {way for _, way in wrote} == ({"small"} if size == 1.0 else {"any"})
    assert len(wrote) == sum(line.endswith(" for small lse") for line in ran) == sum(line.endswith(" for any lse") for line in ran)
    for name, x in wanted.items():
        assert not found[name].isnan().any(), name
        if name != "dq" or "postprocess" not in kernels(ran):  # added up in no fixed order
            assert torch.equal(found[name].view(torch.uint8), x.view(torch.uint8)), name
        else:
            torch.testing.assert_close(found[name], x, rtol=1e-2, atol=1e-2 * max(1.0, float(x.abs().max())))


@pytest.fixture
def apart() -> Iterator[None]:
    with loops_apart():
        yield


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("size", [1.0, 2.0**13, 2.0**40])
def test_huge_products(size: float, dtype: torch.dtype, apart: None, device: torch.device) -> None:
    test_huge.test_equal_keys_share_alike(size, dtype, "hopper", device)


@pytest.mark.parametrize("seed", range(3))
def test_huge_products_of_many_kinds(seed: int, apart: None, device: torch.device) -> None:
    test_huge.test_any_magnitude(seed, BF16, "hopper", device)


def test_huge_products_at_random(apart: None, device: torch.device) -> None:
    test_huge.test_random_products("hopper", device)
    test_huge.test_what_was_reported("hopper", device)


@stand_in_only
@pytest.mark.parametrize("small_lse", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_packed_sequences(seed: int, small_lse: bool, apart: None) -> None:
    """small_lse: without it, none counts as small."""
    batch = test_varlen_hopper.drawn(seed, F16)
    with mock.patch.object(gluon_twin, "twin_device", functools.partial(gluon_twin.twin_device, small_lse=small_lse)):
        for deterministic in (False, True):
            ran = Counter(test_varlen_hopper.check(batch, seed, deterministic))
            rounded = "softcap" not in batch.options or "bias" in batch.leaves  # a cap alone leaves no room for what is large
            wanted = {"dkdv": 1 + rounded, "dqdkdv": 1 + rounded, "dq": 1 + (rounded and "bias" not in batch.leaves)}
            assert all(ran[name] in (0, count) for name, count in wanted.items()) and any(ran[name] for name in wanted)


@stand_in_only
@pytest.mark.parametrize("D", [64, 136])
def test_saved_results_without_a_rest(D: int, apart: None) -> None:
    """As the seed's backward function has them: whether lse is small is looked for all the same, and one of two launches works."""
    q, k, v, dout = (torch.randn(1, 100, 1, D).to(F16) for _ in range(4))
    with gluon_twin.twin_device(2):
        options = (1, None, None, 0.1, "", "hopper")
        out, lse, rest = torch.ops.triflash.forward(q, k, v, None, *options)
        saved = (dout, None, q, k, v, None, out, lse)
        needs = [True, True, True, False, False]
        with_rest, without = (torch.ops.triflash.backward(*saved, each, *options, needs) for each in (rest, None))
    for name, one, other in zip(("dq", "dk", "dv"), with_rest, without, strict=False):
        assert one.abs().max() > 0 and torch.equal(one, other), name
