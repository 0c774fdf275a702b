"""Heads that are padded, or lie in two buffers, on the CPU's stand-in for Hopper's kernels: which columns are multiplied, where blocks lie,
what leaves through whose buffer, and what the plan chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triflash
from cases import Case
from here import stand_in_only
from mutations import mutate, noticed
from test_hopper_twin import BOOL, check
from triflash.plan.kernels.dkdv import DkdvConfig
from triflash.plan.kernels.dq import DqConfig
from triflash.plan.kernels.forward import ForwardConfig
from triflash.plan.kernels.shared import widths
from triflash.plan.override import Config

pytestmark = stand_in_only

WIDE = [
    Case("full", B=2, M=150, N=130, H=1, D=256),
    Case("causal, wide bias", B=1, M=130, N=200, D=144, bias="1hqk", causal=True, grads="qkv"),
    Case("bias of keys, window, grouped", B=2, M=200, N=150, H=4, Hk=2, D=16, Dv=136, bias="1h1k", lo=-60, hi=30, dlse=True),
    Case("slopes, lengths, sink", B=3, M=256, N=200, H=2, Hk=1, D=136, lengths=(0, 128, 999), alibi="bh", sink=True),
    Case("mask of rows", B=2, M=130, N=100, D=160, Dv=40, bias="bhqk", bias_dtype=BOOL, bias_values="rows"),
    Case("keys alone", B=2, M=130, N=100, D=136, hi=0, grads="k", lengths=(64, 99)),
    Case("values alone", B=2, M=130, N=100, D=136, alibi="h", grads="v"),
    Case("bias alone", B=2, M=130, N=100, D=136, bias="b11k", grads="b"),
]


@pytest.mark.parametrize("case", WIDE, ids=str)
@pytest.mark.parametrize("stages", [2, 3])
def test_wide_heads(stages: int, case: Case) -> None:
    ran = check(case, 7 - 2 * stages, stages, rowwise=stages == 2, dkdv=DkdvConfig(stages, stages, d256=True))
    assert "dkdv" in ran and "dqdkdv" not in ran


PADDED = [(66, 80), (88, 96), (112, 72), (130, 144), (160, 160), (192, 128), (200, 24), (40, 224)]


@pytest.mark.parametrize("dims", PADDED, ids=str)
def test_heads_that_are_padded(dims: tuple[int, int]) -> None:
    """Every kernel leaves out columns that only pad: pieces of 64 and 128 columns, and 16, 32 and 64 behind them."""
    D, Dv = dims
    both = {"B": 2, "H": 1, "M": 70, "N": 140, "D": D, "Dv": Dv}
    ran = check(Case("padded", **both, causal=True))  # dq by a kernel of its own
    ran += check(Case("padded, a shared bias", **both, bias="11qk", grads="b"))
    assert {"forward", "dkdv", "dq", "dbias"} <= set(ran)
    if max(dims) <= 128:
        config = DkdvConfig(2, 2, red_dq=True)
        for case in (Case("padded, lengths", **both, lengths=(140, 70)), Case("padded, dropout", **both, dropout=0.2)):
            assert "dqdkdv" in check(case, dqdkdv=config)
        assert "dqdkdv" in check(Case("padded, a bias", **both, bias="1hqk", grads="qkv", hi=40), dqdkdv=DkdvConfig(2, 2))
        grouped = Case("padded, in parts", **both | {"B": 1, "H": 4}, Hk=1, grads="qkv")
        assert "dkdv_sum" in check(grouped, dqdkdv=DkdvConfig(2, 2, head_splits=2))


OWN_WIDTHS = [  # with a buffer for O and without, one and two buffers for q, one to three consumers
    ForwardConfig(2, 64, 2, separate_o=False, own_widths=True),
    ForwardConfig(1, 128, 2, q_stages=2, own_widths=True),
    ForwardConfig(3, 32, 3, ping_pong=True, own_widths=True),
    ForwardConfig(2, 64, 1, own_widths=True),
]

IN_PIECES = [
    Case("causal", B=2, M=200, N=200, H=2, D=160, causal=True),
    Case("lengths, sink, narrower values", B=3, M=140, N=200, H=4, Hk=2, D=192, Dv=128, lengths=(70, 0, 200), sink=True),
    Case("a bias, window", B=2, M=150, N=300, D=72, bias="1hqk", lo=-40, hi=120),
    Case("dropout, slopes, wider values", B=2, M=130, N=140, D=80, Dv=96, dropout=0.2, alibi="h"),
    Case("three pieces of values", B=1, M=70, N=140, D=144, Dv=208, hi=20),
    Case("one piece of keys", B=2, M=130, N=140, D=64, Dv=66, bias="b11k", bias_dtype=BOOL),
]


@pytest.mark.parametrize("case", IN_PIECES, ids=str)
@pytest.mark.parametrize("config", OWN_WIDTHS, ids=lambda c: str(c).replace(" ", "-"))
def test_blocks_of_a_heads_own_width(config: ForwardConfig, case: Case) -> None:
    """Columns lie in two buffers, each with a TMA descriptor of its own, and O leaves by two stores."""
    if widths(case.D, True)[: len(widths(case.Dv or case.D, True))] != widths(case.Dv or case.D, True):
        config = replace(config, separate_o=True)
    if case.Dv == 208:  # for whose whole accumulator three consumers have no registers
        config = replace(config, consumers=min(2, config.consumers))
    check(replace(case, grads=""), 1 + IN_PIECES.index(case) % 3, forward=config)


DQ_OF_OWN_WIDTHS = [
    DqConfig(2, 32, 3, 2, own_widths=True, hold_q=True, hold_dout=True),
    DqConfig(1, 64, 2, 2, own_widths=True, separate_dq=False),
    DqConfig(2, 32, 2, 1, own_widths=True, deferred=False, hold_q=True, ping_pong=True),
]

KEYS_OF_OWN_WIDTHS = [
    DkdvConfig(2, 2, d256=True, own_widths=True, hold_k=True, hold_v=True),
    DkdvConfig(2, 2, d256=True, own_widths=True, block_m=128, p_stages=1, hold_v=True),
    DkdvConfig(3, 3, d256=True, own_widths=True, p_stages=1),
]

WIDE_IN_PIECES = [
    Case("causal, grouped", B=2, M=200, N=150, H=4, Hk=2, D=160, causal=True),
    Case("lengths, sink, narrower values", B=3, M=260, N=200, H=2, D=192, Dv=128, lengths=(70, 0, 200), sink=True),
    Case("a bias of keys, soft cap", B=2, M=130, N=140, H=1, D=144, Dv=136, bias="1h1k", softcap=2.0, grads="kvb"),
    Case("dropout, slopes, much narrower values", B=1, M=300, N=140, H=2, D=184, Dv=24, dropout=0.2, alibi="h"),
]


@pytest.mark.parametrize("case", WIDE_IN_PIECES, ids=str)
@pytest.mark.parametrize("config", KEYS_OF_OWN_WIDTHS, ids=lambda c: str(c).replace(" ", "-"))
def test_dk_and_dv_by_blocks_of_a_heads_own_width(config: DkdvConfig, case: Case) -> None:
    """Blocks of 128 queries are shared, and pᵀ may travel through one buffer."""
    ran = check(replace(case, grads=case.grads.replace("q", "")), 1 + WIDE_IN_PIECES.index(case) % 3, dkdv=config)
    assert "dkdv" in ran


@pytest.mark.parametrize("case", IN_PIECES[:4], ids=str)
@pytest.mark.parametrize("config", DQ_OF_OWN_WIDTHS, ids=lambda c: str(c).replace(" ", "-"))
def test_dq_by_blocks_of_a_heads_own_width(config: DqConfig, case: Case) -> None:
    ran = check(replace(case, grads="q"), 1 + IN_PIECES.index(case) % 3, dq=config)
    assert "dq" in ran


@pytest.mark.parametrize(
    "old, new",
    [
        ("FIRST + SIZE < COLUMNS", "False"),  # what a product sums over
        ("b.slice(FIRST, SECOND, 1)", "b.slice(0, SECOND, 1)"),
        ("target.slice(FIRST, _1, 1)", "target.slice(0, _1, 1)"),
    ],
)
def test_a_wrong_piece_is_noticed(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    mutate(monkeypatch, "products", old, new)
    whole: dict[str, Config] = {
        "forward": ForwardConfig(2, 64, 2),
        "dkdv": DkdvConfig(2, 2, d256=True),
        "dq": DqConfig(2, 32, 3, 2, separate_dq=False),
    }
    case = Case("padded", B=1, H=1, M=70, N=140, D=160, Dv=96, causal=True)
    for grads, kernel in (("", "forward"), ("k", "dkdv"), ("q", "dq")):
        own = {kernel: whole[kernel], "forward": whole["forward"]}
        assert noticed(lambda seed, grads=grads, own=own: check(replace(case, grads=grads), seed=seed, **own), 1)


@pytest.mark.parametrize(
    "old, new",
    [
        (
            "tma_load(descs.second, rows(p, place, head, _1), full, block.second)",
            "tma_load(descs.second, rows(p, place, head, 0), full, block.second)",
        ),
        (
            "tma_store(descs.second, rows(p, place, head, _1), block.second)",
            "tma_store(descs.second, rows(p, place, head, 0), block.second)",
        ),
    ],
)
def test_a_wrong_block_in_two_buffers_is_noticed(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    mutate(monkeypatch, "blocks", old, new)
    case = Case("in pieces", B=1, H=1, M=70, N=140, D=160, causal=True)
    own: dict[str, Config] = {
        "forward": ForwardConfig(1, 64, 2, own_widths=True),
        "dkdv": DkdvConfig(2, 2, d256=True, own_widths=True),
        "dq": DqConfig(1, 32, 2, 2, own_widths=True),
    }
    for grads, kernel in (("", "forward"), ("k", "dkdv"), ("q", "dq")):
        given = {kernel: own[kernel]}
        assert noticed(lambda seed, grads=grads, given=given: check(replace(case, grads=grads), seed=seed, **given), 3)


def test_consumers_that_swap_buffers_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """dk leaves through k's buffer, and dv through v's, where the other consumer may still be at work."""
    case, config = Case("swapped", B=1, H=2, M=150, N=140, D=200, Dv=32, grads="kv"), DkdvConfig(2, 2, d256=True, own_widths=True)
    check(case, dkdv=config)
    mutate(monkeypatch, "dkdv_d256", "bar_sync(TILE_DONE, 256)", "None")
    assert noticed(lambda seed: check(case, seed=seed, dkdv=config), 12)


def test_one_buffer_of_p_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, "dkdv_d256", "mbarrier.wait(p.weights.empty.index(_), _)", "pass")
    config = DkdvConfig(2, 2, d256=True, p_stages=1)
    assert noticed(lambda seed: check(Case("one", B=1, H=2, M=300, N=140, D=136, grads="k"), seed=seed, dkdv=config), 12)


CHOSEN: list[tuple[tuple[int, int], dict[str, Config]]] = [  # by the plan for long rows of heads that lie in two buffers
    ((160, 160), {
        "forward": ForwardConfig(2, 128, 2, ping_pong=True, separate_o=False, own_widths=True),
        "dkdv": DkdvConfig(3, 3, d256=True, own_widths=True, hold_k=True, hold_v=True),
        "dq": DqConfig(2, 32, 3, 2, own_widths=True, hold_q=True, hold_dout=True),
    }),
    ((192, 128), {
        "forward": ForwardConfig(2, 128, 2, ping_pong=True, separate_o=False, own_widths=True),
        "dkdv": DkdvConfig(3, 3, d256=True, own_widths=True, hold_k=True, hold_v=True),
        "dq": DqConfig(2, 64, 3, 2, separate_dq=False, own_widths=True),
    }),
    ((192, 192), {
        "forward": ForwardConfig(2, 64, 2, ping_pong=True, own_widths=True),
        "dkdv": DkdvConfig(2, 2, d256=True, own_widths=True),
        "dq": DqConfig(2, 32, 3, 2, separate_dq=False, own_widths=True),
    }),
    ((96, 72), {"forward": ForwardConfig(2, 128, 2, q_stages=2, own_widths=True)}),
]  # fmt: skip


@pytest.mark.parametrize(("dims", "configs"), CHOSEN, ids=[f"{a}x{b}" for (a, b), _ in CHOSEN])
def test_what_is_chosen_for_heads_in_two_buffers(dims: tuple[int, int], configs: dict[str, Config]) -> None:
    """It is right for several tiles a program, and for tiles that keys and queries do not fill."""
    both: dict[str, Any] = {"D": dims[0], "Dv": dims[1]}
    check(Case("causal, grouped", **both, M=330, N=430, H=2, Hk=1, hi=100), 2, 1, **configs)
    check(Case("full", **both, M=290, N=290, H=1), 1, 2, **configs)
    check(Case("window", **both, B=2, M=200, N=300, H=2, lo=-30, hi=60, grads="kv"), 3, 3, **configs)
    q, k, v = (torch.empty(4, 2048, 8, dim, dtype=torch.bfloat16, device="meta", requires_grad=True) for dim in (dims[0], *dims))
    told = triflash.explain(q, k, v, causal=True, deterministic=True, device="h200")
    assert told.backward is not None
    steps = {step.step.kernel: step.step.config for step in (*told.forward.steps, *told.backward.steps)}
    assert {name: steps[name] for name in configs} == configs
    soft = triflash.explain(q, k, v, softcap=30.0, device="h200")  # where whole blocks were faster forward
    assert soft.backward is not None
    forward, backward = ([str(step.step.config) for step in which.steps] for which in (soft.forward, soft.backward))
    assert not any("own-widths" in each for each in forward) and any("own-widths" in each for each in backward) == (max(dims) > 128)


def test_wide_heads_want_two_buffers() -> None:
    """With one, the consumers wait for each other: the next q wants dk of the block before, which wants the next dout, that dv, that the next q."""
    with pytest.raises(ValueError, match="d256"):
        DkdvConfig(1, 1, d256=True)
