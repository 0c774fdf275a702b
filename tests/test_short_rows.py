"""The kernels for short rows, by hand on small problems: every feature, every residue, every subset of gradients, the same bits again.

On the interpreter the plan does not take them by itself; ``override_configs`` does. What it takes on a GPU is asked of plans for such.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from addresses import every_address
from cases import Case, build, fill_hidden, hidden_of
from expected import kernels
from here import HAVE_TRITON
from running import assert_right, attend, named_gradients, small_tiles
from table import features
from triflash import attention
from triflash.plan.configs import TileConfig
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.kernels.few import FewConfig
from triflash.plan.kernels.short import ShortConfig, pieces
from triflash.plan.override import override_configs
from triflash.plan.select import Plan, plan_backward, plan_forward
from triflash.spec import AttentionSpec, BiasSpec, Needs

pytestmark = pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
F32 = torch.float32

LEAST = 64 if torch.cuda.is_available() else 16  # rows of a tile: what WGMMA multiplies


def block_of(keys: int) -> int:
    return max(16, 1 << (keys - 1).bit_length())


@contextmanager
def by_hand(case: Case, forward: ShortConfig, backward: ShortConfig) -> Iterator[list[str]]:
    with small_tiles(case.tiles), override_configs(short_forward=forward, short_backward=backward), triflash.record_launches() as ran:
        yield ran


def results_of(case: Case, inputs: Any, forward: ShortConfig, backward: ShortConfig) -> tuple[dict[str, Tensor], list[str]]:
    wanted = inputs.wanted()
    with by_hand(case, forward, backward) as ran:
        out, lse = attend(case, inputs, "triton", raw=True)
        assert lse is not None
        outputs, cotangents = ([out], [inputs.dout]) if inputs.dlse is None else ([out, lse], [inputs.dout, inputs.dlse])
        grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents) if wanted else ()
    return {"out": out.detach(), "lse": lse.detach()} | named_gradients(wanted, grads), kernels(ran)


def run(case: Case, device: torch.device, tile: int = 16, rounds: int = 0, block: int = 0) -> list[str]:
    """Compute a case by these kernels, judge all of it, and see that they ran, and no other pass beside them."""
    block = max(LEAST, block or block_of(case.N))
    forward = ShortConfig(max(LEAST, tile), block, 4, 1, rounds=min(rounds, 2), late_v=rounds == 3)
    backward = ShortConfig(max(LEAST, tile), max(LEAST, block_of(case.N)), 4, 1, rounds=rounds)
    inputs = build(case, device)
    results, ran = results_of(case, inputs, forward, backward)
    assert_right(case, inputs, results)
    assert ran[0] == "short_forward" and not {"forward", "dq", "dkdv", "delta"} & set(ran)
    if set(case.grads) & set(inputs.wanted()) & set("qkv"):
        assert ran[1] == "short_backward"
    again, _ = results_of(case, inputs, forward, backward)
    for name, x in results.items():
        assert torch.equal(x, again[name]), f"{name}: other bits"
    return ran


FEATURES = [
    *features(20, 30),
    Case("one query, one key", M=1, N=1, H=1),
    Case("one tile", B=2, M=16, N=16, H=3, causal=True),
    Case("grouped, one tile", B=2, M=7, N=16, H=4, Hk=1, bias="1hqk"),
    Case("bias of a batch", B=5, M=13, N=30, H=3, bias="1hqk"),
    Case("bias of a batch, several tiles", B=3, M=20, N=30, bias="1hqk"),
    Case("bias of all heads", B=2, M=13, N=30, H=3, bias="b1qk"),
    Case("bias of all", B=3, M=13, N=30, H=3, bias="11qk"),
    Case("bias, two batch levels, one tile", B=6, M=12, N=30, batch_inner=2, bias="1ihqk"),
    Case("bias, two batch levels, outer", B=6, M=12, N=30, batch_inner=3, bias="b1hqk"),
    Case("least numbers, one tile", B=1, M=14, N=30, bias="1hqk", bias_values="least", bias_dtype=F32),
    Case("huge bias, one tile", B=1, M=14, N=30, bias="1hqk", bias_values="huge", bias_dtype=F32),
    Case("mask beside a bias, one tile", B=2, M=13, N=30, bias="1hqk", mask="b1qk"),
    Case("causal, more queries than keys", B=2, M=40, N=20, causal=True),
    Case("everything, a bias of a batch", B=3, M=16, N=30, H=2, bias="1hqk", mask="b11k", lengths=(30, 17, 0), sink=True, dropout=0.2, hi=17,
         dlse=True),
]  # fmt: skip


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features(case: Case, device: torch.device) -> None:
    run(case, device)


@pytest.mark.parametrize("rounds", [1, 2, 3, 100])
def test_rounds(rounds: int, device: torch.device) -> None:
    """Programs of one pair, of several, of all; tiles of queries of a head the same."""
    for bias in (None, "1hqk", "b1qk", "bhqk", "11qk"):
        ran = run(Case("rounds", B=3, M=14, N=20, H=2, bias=bias), device, rounds=rounds)
        assert "dbias" not in ran
    run(Case("rounds, several tiles", B=2, M=50, N=20, H=2, hi=0), device, rounds=rounds)


@pytest.mark.parametrize("rest", range(16))
def test_every_residue(rest: int, device: torch.device) -> None:
    """Queries and keys that are no whole number of tiles."""
    run(Case("residue", M=1 + rest, N=17 + rest, H=2, bias="1hqk"), device)
    run(Case("residue", M=17 + rest, N=1 + rest, H=2, D=24, hi=rest % 5), device)


@pytest.mark.parametrize("keys", [17, 32, 33, 40, 48])
def test_pieces(keys: int, device: torch.device) -> None:
    """Keys in two tiles and three, the last of which is whole or not."""
    on_gpu = device.type == "cuda"
    block, keys, grads = (64, 4 * keys, "") if on_gpu else (16, keys, "qkvb")
    everything = dict(bias="bhqk", mask="b11k", lengths=(keys, 17), alibi="bh", sink=True, softcap=2.0, dropout=0.2, hi=keys - 20)
    for case in (
        Case("plain", B=2, M=20, N=keys, grads=grads),
        Case("bias", B=2, M=20, N=keys, bias="1hqk", grads=grads),
        Case("everything", B=2, M=20, N=keys, grads=grads, **everything),
    ):
        run(case, device, block=block)


@pytest.mark.parametrize("grads", ["".join(each) for n in range(1, 4) for each in itertools.combinations("qkv", n)])
def test_every_subset_of_gradients(grads: str, device: torch.device) -> None:
    run(Case("subset", B=2, M=20, N=30, grads=grads), device)
    for bias in ("1hqk", "bhqk", "b11k", "1hq1"):
        ran = run(Case("subset", B=2, M=14, N=30, bias=bias, grads=grads + "b"), device)
        assert ("dbias" in ran) is (bias == "1hq1")
    run(Case("subset", B=2, M=14, N=30, sink=True, grads=grads + "s"), device)


@pytest.mark.parametrize("bias", ["1hqk", "bhqk", "b11k", "11qk"])
def test_dbias_alone(bias: str, device: torch.device) -> None:
    run(Case("dbias alone", B=2, M=14, N=30, bias=bias, grads="b", hi=20), device)


def test_hidden_keys_may_hold_anything(device: torch.device) -> None:
    case, found = Case("hidden", B=3, M=20, N=30, H=4, Hk=2, bias="b11k", lengths=(30, 20, 0)), []
    config = ShortConfig(LEAST, max(LEAST, 32), 4, 1)
    for junk in (False, True):
        inputs = build(case, device)
        fill_hidden(inputs, junk)
        results, _ = results_of(case, inputs, config, config)
        found.append(results)
        assert not any(x.any() for x in hidden_of(inputs, map(results.get, ("dk", "dv")), [results.get("db")]))
    for name, clean in found[0].items():
        assert torch.equal(clean, found[1][name]), name


def test_two_biases(device: torch.device) -> None:
    q, k, v = (torch.randn(2, rows, 4, 16, device=device, requires_grad=True) for rows in (13, 30, 30))
    config = ShortConfig(LEAST, max(LEAST, 32), 4, 1)
    pairs = [
        ((2, 1, 1, 30), (1, 4, 13, 30)),
        ((2, 4, 13, 30), (1, 4, 1, 30)),
        ((2, 4, 13, 30), (2, 4, 13, 30)),
        ((1, 4, 13, 30), (2, 1, 13, 30)),
        ((1, 4, 13, 30), (2, 4, 13, 30)),
    ]
    for shapes in pairs:
        biases = tuple(torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
        leaves = (q, k, v, *biases)
        dout = torch.randn(2, 13, 4, 16, device=device)
        with by_hand(Case(""), config, config) as ran:
            out = attention(q, k, v, bias=biases, backend="triton")
            grads = torch.autograd.grad(out, leaves, dout)
        assert {"short_forward", "short_backward"} <= set(kernels(ran))
        exact = [x.detach().double().requires_grad_() for x in leaves]
        wanted = attention(*exact[:3], bias=exact[3] + exact[4], backend="oracle")
        expected = torch.autograd.grad(wanted, exact, dout.double())
        for got, want in zip((out, *grads), (wanted, *expected), strict=True):
            assert (got.double() - want).norm() <= 1e-5 * want.norm()


def test_gradients_fill_only_their_elements(device: torch.device) -> None:
    """Gradients that the caller lays out: what lies between their elements stays as it was."""
    dout = torch.randn(1, 12, 4, 16, device=device)
    leaves = [torch.randn(1, rows, 3, 4, 16, device=device).requires_grad_() for rows in (12, 20, 20)]
    config = ShortConfig(LEAST, max(LEAST, 32), 4, 1)
    with by_hand(Case(""), config, config):
        out = attention(*(x[:, :, 1] for x in leaves), backend="triton")
        grads = torch.autograd.grad(out, leaves, dout)
    for grad in grads:
        assert grad.isfinite().all() and not grad[:, :, ::2].any() and grad[:, :, 1].any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter")
@pytest.mark.parametrize(
    "case",
    [
        Case("grouped", B=2, M=20, N=27, H=4, Hk=2, D=24, Dv=40, bias="b11k", lengths=(27, 20), mask="1hqk"),
        Case("window", B=2, M=25, N=40, lo=-3, hi=6, bias="bhqk", bias_layout="sliced", sink=True, alibi="bh", layout="mixed"),
        Case("whole tiles", B=2, M=32, N=32, H=4, Hk=2, D=32, bias="1h1k"),
        Case("shared bias", B=3, M=13, N=29, H=2, bias="1hqk", dropout=0.1, dlse=True),
        Case("wide heads", M=17, N=20, H=1, D=72, sink=True),
    ],
    ids=str,
)
def test_addresses(case: Case, device: torch.device) -> None:
    block = block_of(case.N)
    for rounds, forward_block in ((0, block), (2, 16), (3, block)):
        forward, backward = (ShortConfig(16, each, 4, 1, rounds=rounds) for each in (forward_block, block))
        inputs = build(case, device)
        with every_address() as count:
            _, ran = results_of(case, inputs, forward, backward)
        assert {"short_forward", "short_backward"} <= set(ran) and count[0] > 1000


def spec(M: int, N: int, B: int = 64, H: int = 16, groups: int = 1, D: int = 64, **more: Any) -> AttentionSpec:
    return AttentionSpec("bf16", B, 1, M, N, H, D, D, more.pop("bias", None), None, more.pop("hi", None), 0.1, "ieee", groups, **more)


def names(plan: Plan) -> list[str]:
    assert plan.backend == "triton"
    return [step.kernel for step in plan.steps]


SHARED = BiasSpec("bf16", (False, False, True, True, True))
ALL = Needs(True, True, True, False)


@pytest.mark.parametrize("D", [32, 64, 128])
@pytest.mark.parametrize("N", [16, 49, 64])
def test_who_takes_them(N: int, D: int) -> None:
    device = KNOWN_DEVICES["sm90"]
    assert names(plan_forward(spec(N, N, D=D), device)) == ["short_forward"]
    assert names(plan_backward(spec(N, N, D=D), ALL, device)) == ["short_backward"]
    plan = plan_backward(spec(N, N, D=D, bias=SHARED), replace(ALL, dbias=True), device)
    assert names(plan) == ["short_backward", "dbias_sum"] and plan.steps[0].splits == plan.steps[1].splits
    unseen = (  # what they can do, and nobody has seen them do on a GPU
        replace(spec(N, N, D=D), dtype="fp32"), spec(N, N, D=D, groups=2), spec(N, N, D=D, key_lengths=True), spec(N, N, D=D, sink=True),
        spec(N, N, D=D, softcap=30.0), spec(N, N, D=D, alibi=True), spec(N, N, D=D, dropout=0.1), spec(N, N, D=D, mask=SHARED),
        replace(spec(N, N, D=D), lo=-5), spec(N, N, D=D, bias=BiasSpec("fp32", SHARED.varies)), spec(N, N, D=D, second=SHARED),
    )  # fmt: skip
    for kept in (spec(N, N, D=D, query_starts=True), spec(N, N, D=256), *unseen):
        assert names(plan_forward(kept, device)) == ["forward"]
        assert names(plan_backward(kept, ALL, device)) == ["delta", "dkdv", "dq"]
    for arch in ("sm80", "sm100", "gfx942"):  # where nobody measured them
        assert names(plan_forward(spec(N, N, D=D), KNOWN_DEVICES[arch])) == ["forward"]
        assert names(plan_backward(spec(N, N, D=D), ALL, KNOWN_DEVICES[arch])) == ["delta", "dkdv", "dq"]


def test_a_kernel_chosen_by_hand_is_not_replaced() -> None:
    """Neither by these nor by those for few queries, which take the place of others by themselves."""
    device, tile, few = KNOWN_DEVICES["sm90"], TileConfig(64, 64, 4, 1), FewConfig(16, 64, 4, 2)
    for config, forward, backward in (
        ({"forward": tile}, "forward", "short_backward"), ({"few_forward": few}, "few_forward", "short_backward"),
        ({"dq": tile}, "short_forward", "delta"), ({"dkdv": tile, "short_backward": ShortConfig(64, 64, 4, 1)}, "short_forward", "short_backward"),
    ):  # fmt: skip
        with override_configs(**config):
            assert names(plan_forward(spec(1, 49), device, "triton"))[0] == forward
            assert names(plan_backward(spec(1, 49), ALL, device, "triton"))[0] == backward
    with override_configs(forward=tile):
        assert names(plan_forward(spec(8, 4096), device)) == ["forward"]


def test_who_takes_longer_rows() -> None:
    """Up to 80 keys forward and 128 backward these, where nothing else is asked of them; then Hopper's, from 64 queries on."""
    device = KNOWN_DEVICES["sm90"]

    def kernels_of(problem: AttentionSpec) -> tuple[str, str]:
        plans = plan_forward(problem, device), plan_backward(problem, replace(ALL, dbias=problem.bias is not None), device)
        forward, backward = (f"{plan.backend} {plan.steps[0].kernel}" for plan in plans)
        return forward, backward

    short, hopper = ("triton short_forward", "triton short_backward"), ("hopper forward", "hopper preprocess")
    assert kernels_of(spec(77, 77)) == short
    assert kernels_of(spec(128, 128)) == kernels_of(spec(77, 77, D=128)) == (hopper[0], short[1])
    assert kernels_of(spec(77, 77, bias=SHARED)) == (short[0], hopper[1]) and kernels_of(spec(77, 77, softcap=30.0)) == hopper
    assert kernels_of(spec(197, 197)) == kernels_of(spec(2048, 77, B=8, D=128)) == hopper
    assert kernels_of(spec(2048, 77, B=8)) == short and plan_forward(spec(2048, 77, B=8), device).steps[0].programs == 8 * 16 * 8
    assert kernels_of(spec(2048, 77, B=9)) == (short[0], hopper[1])  # pairs for two rounds, of which the second is nearly empty
    assert kernels_of(spec(50, 197)) == ("triton forward", "triton delta")
    assert kernels_of(spec(50, 600)) == ("triton few_forward", hopper[1])
    for problem in (spec(50, 600, groups=2, D=128), spec(20, 600, groups=2)):  # too many rows, and head dim 64
        assert names(plan_backward(problem, ALL, device))[:3] == ["delta", "dkdv", "dq"]
    for problem in (spec(16, 600, D=128), spec(20, 600, groups=2, D=128)):
        assert names(plan_backward(problem, ALL, device))[:2] == ["delta", "few_backward"]
    assert kernels_of(spec(16, 600, D=128, softcap=30.0))[1] == kernels_of(spec(16, 600))[1] == hopper[1]
    assert kernels_of(spec(200, 600)) == kernels_of(spec(200, 300)) == hopper


def test_who_takes_the_shortest_rows() -> None:
    """A warp or two a program, of a bias that pairs share as many programs as keep its sums busy."""
    device, full = KNOWN_DEVICES["sm90"], BiasSpec("bf16", (True, True, True, True, True))

    def configs(problem: AttentionSpec) -> tuple[str, str]:
        plans = plan_forward(problem, device), plan_backward(problem, replace(ALL, dbias=problem.bias is not None), device)
        return str(plans[0].steps[0].config), str(plans[1].steps[0].config)

    assert configs(spec(16, 16)) == configs(spec(7, 12, bias=full)) == ("16x16 w1 s1", "16x16 w1 s1")
    assert configs(spec(16, 20)) == ("32x32 w1 s1", "32x32 w2 s1") and configs(spec(32, 5, D=32)) == ("32x32 w1 s1", "32x32 w1 s1")
    assert configs(spec(16, 16, D=128)) == ("16x16 w1 s1", "16x16 w2 s1") and configs(spec(20, 20, D=128))[0] == "32x32 w2 s1"
    assert (
        configs(spec(16, 16, bias=SHARED))[1] == "16x16 w1 s1 8 CTAs/SM"
        and configs(spec(32, 32, bias=SHARED))[1] == "32x32 w2 s1 4 CTAs/SM"
    )
    assert configs(spec(52, 52, bias=full)) == ("64x64 w4 s1", "64x64 w4 s1 3 CTAs/SM")


def test_what_the_backward_kernel_leaves_to_others() -> None:
    """The gradient of a bias that it cannot sum up, for which it writes delta; of a sink, that alone."""
    device = KNOWN_DEVICES["sm90"]
    dbias, column = replace(ALL, dbias=True), BiasSpec("bf16", (True, False, True, True, False))
    with override_configs(short_backward=ShortConfig(64, 64, 4, 1)):
        assert names(plan_backward(spec(49, 49, bias=column), dbias, device, "triton")) == ["short_backward", "dbias"]
        assert names(plan_backward(spec(49, 49, bias=SHARED, groups=2), dbias, device, "triton"))[:2] == ["short_backward", "dbias"]
        assert names(plan_backward(spec(300, 49, bias=SHARED), dbias, device, "triton"))[:2] == ["short_backward", "dbias"]
        dsink = replace(ALL, dsink=True)
        assert plan_backward(spec(49, 49, sink=True), dsink, device, "triton").steps[0].gives == ("dq", "dk", "dv", "dsink")
        assert names(plan_backward(spec(49, 49, sink=True), Needs(False, False, False, False, True), device, "triton")) == ["delta"]


def test_pieces_have_all_keys() -> None:
    assert pieces(197, 128) == (128, 64, 16) and pieces(197, 256) == (256,) and pieces(77, 64) == (64, 16) and pieces(400, 128) == ()
    for keys in range(1, 400):
        for block in (16, 32, 64, 128, 256):
            if found := pieces(keys, block):
                assert sum(found) >= keys > sum(found[:-1]) and max(found) <= block and len(found) <= 3
                assert all(size >= 16 and size & (size - 1) == 0 for size in found)
            else:
                assert keys > 2 * block


def test_programs_of_a_shared_bias_fill_the_chip_once() -> None:
    device = KNOWN_DEVICES["sm90"]
    step = plan_backward(spec(49, 49, B=512, H=8, D=32, bias=SHARED), replace(ALL, dbias=True), device).steps[0]
    assert isinstance(step.config, ShortConfig)
    slots = device.sms * (step.config.ctas_per_sm or 2)
    assert slots - 8 < step.programs <= slots and step.splits == step.programs // 8


def test_configurations_are_checked() -> None:
    with pytest.raises(ValueError, match="rounds: "):
        ShortConfig(16, 16, 4, 1, rounds=-1)
    with pytest.raises(ValueError, match="ctas_per_sm: "):
        ShortConfig(16, 16, 4, 1, ctas_per_sm=17)
    config = ShortConfig(16, 32, 4, 1, 2, 3, True)
    assert str(config) == "16x32 w4 s1 2 rounds 3 CTAs/SM late-v" and config.launch_registers == 168
    for name, wrong in (("short_forward", TileConfig(16, 16, 4, 1)), ("forward", config), ("short_backward", FewConfig(16, 16, 4, 1))):
        with pytest.raises(TypeError, match=name), override_configs(**{name: wrong}):
            pass
    with pytest.raises(ValueError, match="short_forward: "), override_configs(short_forward=config):
        plan_forward(spec(100, 100), KNOWN_DEVICES["sm90"], "triton")
    with pytest.raises(ValueError, match="short_backward: "), override_configs(short_backward=config):
        plan_backward(spec(100, 33), ALL, KNOWN_DEVICES["sm90"], "triton")


def test_explained() -> None:
    q = torch.empty(512, 49, 8, 32, dtype=torch.bfloat16, device="meta")
    bias = torch.empty(8, 49, 49, dtype=torch.bfloat16, device="meta")
    told = triflash.explain(q, q, q, bias, device="h200", grads=["q", "k", "v", "bias"])
    assert told.backward is not None
    assert [each.step.kernel for each in (*told.forward.steps, *told.backward.steps)] == ["short_forward", "short_backward", "dbias_sum"]
    text = str(told)
    assert ShortConfig.SOURCE in text and "partial sums of dbias" in text and "delta" not in dict(told.memory)
