"""The Hopper backward kernels that own keys compile for sm90, without a GPU, into what they were written for. As test_hopper.py; ``dq`` and
``dbias`` are in test_hopper_rows.py."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch

triton = pytest.importorskip("triton")

from machine_code import (
    MEASURED,
    ambiguous_descriptors,
    compiled_with_log,
    disassembled,
    serialised,
    unfenced_products,
    unfenced_releases,
    with_both_loops,
)
from test_hopper import CAUSAL, FULL, MIXED, WINDOW, features_of, lengths_of, mask_of, second_of, seed_of, slopes_of

from triflash.launch import ahead
from triflash.launch.calls import Call
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.kernels.dkdv import DkdvConfig
from triflash.plan.kernels.shared import HopperConfig
from triflash.plan.override import override_configs
from triflash.plan.select import plan_backward
from triflash.plan.steps import Step
from triflash.spec import AttentionSpec, Needs, spec_of

BF16, F16, F32, BOOL = torch.bfloat16, torch.float16, torch.float32, torch.bool
SM90 = KNOWN_DEVICES["sm90"]
EVEN, UNEVEN, ODD = 4096, 4080, 4095  # as in test_hopper.py, and long enough to add dq


@dataclass(frozen=True)
class Target:
    """One compilation. bias: a letter where it varies, over (batch, head, query, key); empty is none. grads: letters of qkvb,
    and t for that of the second bias. config None:
    the plan's. adds: dq is added up where that can be. spills: 4-byte words that a thread may spill, on Triton 3.6.
    """

    dims: tuple[int, int]
    dtype: torch.dtype = BF16
    bias: str = ""
    bias_dtype: torch.dtype | None = None
    band: tuple[int | None, int | None] = (None, None)
    length: int = UNEVEN
    grads: str = "qkv"
    groups: int = 1
    config: DkdvConfig | None = None
    adds: bool = True
    spills: int = 24
    softcap: float = 0.0
    mask: str = ""
    lengths: bool = False
    dropout: float = 0.0
    slopes: bool = False
    second: str = ""

    def __str__(self) -> str:
        names = {BF16: "bf16", F16: "fp16", F32: "fp32", BOOL: "bool", None: ""}
        dims = f"d{self.dims[0]}" + f"-dv{self.dims[1]}" * (self.dims[1] != self.dims[0])
        band = {(None, None): "full", (None, 0): "causal"}.get(self.band, "window")
        heads = f"g{self.groups}" * (self.groups > 1)
        own = "fixed" * (not self.adds) + features_of(self)
        parts = (dims, names[self.dtype], self.bias, names[self.bias_dtype], band, str(self.length), self.grads, heads, own)
        return "-".join(part.replace(" ", "-") for part in (*parts, str(self.config or "")) if part)

    @property
    def kernel(self) -> str:
        adds = self.adds and max(self.dims) <= 128 and "q" in self.grads and self.grads.strip("qbt") != ""
        return "dqdkdv" if adds else "dkdv"


LOOP = 72  # at d 128 what the loop keeps fills the registers: scalars that it does not need in every step are spilled once a tile
TARGETS = [
    # The sizes that matter most, causal and not, at lengths with and without a rest; with dq and, as where bits must repeat, without.
    Target((64, 64), length=EVEN),
    Target((64, 64), band=CAUSAL),
    Target((64, 64), F16, band=CAUSAL, length=ODD, adds=False),
    Target((128, 128), length=EVEN, spills=LOOP),
    Target((128, 128), band=CAUSAL, spills=LOOP),
    Target((128, 128), F16, band=CAUSAL, adds=False, spills=LOOP),
    Target((256, 256), length=EVEN),
    Target((256, 256), F16, band=CAUSAL, length=ODD, spills=28),
    # Other head dims, padded ones among them, and a value dim of its own.
    Target((40, 40), F16, band=CAUSAL, length=ODD),
    *(Target((d, d), band=CAUSAL, spills=LOOP) for d in (80, 96)),
    Target((160, 160), F16, band=CAUSAL),
    Target((160, 160), bias="1h1k", band=CAUSAL, grads="kvb", softcap=50.0, dropout=0.1, spills=28),
    Target((192, 128), band=WINDOW, length=EVEN),
    # A tile of bias a block.
    *(Target((64, 64), bias="1hqk", band=band) for band in (FULL, CAUSAL)),
    Target((64, 64), F16, bias="bhqk", bias_dtype=F32),
    Target((64, 64), bias="1hqk", bias_dtype=BOOL, band=WINDOW, length=ODD),
    Target((128, 128), bias="1hqk", spills=LOOP),
    Target((128, 128), bias="1hqk", bias_dtype=F32, band=CAUSAL, spills=72),
    Target((256, 256), bias="1hqk", band=CAUSAL, spills=28),
    # A number a key, and its gradient.
    Target((64, 64), bias="1h1k", band=CAUSAL, grads="qkvb"),
    Target((128, 128), bias="1h1k", length=EVEN, grads="qkvb", spills=80),
    Target((256, 256), bias="1h1k", bias_dtype=F32, band=CAUSAL, grads="kvb", spills=28),
    # Both: the row's gradient beside tiles of the other bias.
    Target((32, 32), bias="1hqk", second="b11k", grads="qkvbt", length=512),
    Target((128, 128), bias="1hqk", second="b11k", grads="qkvbt", spills=88),
    Target((256, 256), bias="1hqk", bias_dtype=F32, second="111k", band=CAUSAL, grads="kvt", spills=28),
    # Some of the gradients.
    Target((128, 128), band=CAUSAL, grads="qk", spills=LOOP),
    Target((64, 64), bias="1h1k", grads="vb"),
    Target((256, 256), grads="k"),
    # Soft caps: nothing more is spilled, but where one number a key and its gradient come with it.
    *(Target((d, d), band=band, adds=d == 64, softcap=50.0, spills=LOOP) for d, band in MIXED),
    Target((64, 64), F16, bias="1hqk", band=CAUSAL, softcap=30.0),
    Target((256, 256), band=WINDOW, softcap=50.0),
    # Masks, between whose first and last queries of a tile blocks are walked.
    *(Target((d, d), bias="b1qk", bias_dtype=BOOL, band=band, adds=d < 128, spills=LOOP) for d, band in ((64, FULL), (128, CAUSAL))),
    Target((128, 128), bias="b11k", bias_dtype=BOOL, spills=LOOP),
    Target((256, 256), bias="bhqk", bias_dtype=BOOL),
    # Masks beside biases.
    Target((128, 128), bias="1hqk", mask="b1qk", spills=64),
    Target((64, 64), F16, bias="1h1k", grads="qkvb", mask="b1qk", spills=28),
    # Key lengths.
    *(Target((d, d), band=band, lengths=True, spills=LOOP) for d, band in MIXED),
    # All at once: names and types of one feature must leave those of another alone, which nothing but the compiler checks.
    Target((64, 64), bias="1h1k", grads="qkvb", mask="b11k", lengths=True, softcap=50.0, spills=80),
    Target((128, 128), bias="1hqk", band=WINDOW, mask="b1qk", lengths=True, softcap=50.0, spills=120),
    Target((256, 256), bias="1h1k", grads="kvb", mask="b11k", lengths=True, softcap=50.0, spills=40),
    # Narrow heads: as they are where dq has a kernel of its own.
    Target((16, 16), bias="1hqk", adds=False),
    Target((32, 32), bias="1hqk", mask="b11k", band=CAUSAL, adds=False, dropout=0.1, spills=96),
    # … and where it is added up: no wider than they are.
    Target((32, 32), bias="1hqk", band=CAUSAL),
    Target((24, 64), F16, bias="1h1k", grads="qkvb", softcap=50.0, lengths=True),
    Target((16, 32), bias="1hqk", bias_dtype=F32, band=WINDOW, slopes=True, config=DkdvConfig(2, 2)),
    # dq summed in shared memory, as much of it as there is room for.
    Target((64, 64), length=384, config=DkdvConfig(2, 2, kv_stages=2, dq_warpgroup=True, unroll=2, dq_blocks=6)),
    Target((64, 64), F16, band=CAUSAL, length=500, config=DkdvConfig(2, 2, dq_warpgroup=True, unroll=2, dq_blocks=8)),
    Target((32, 32), bias="1hqk", length=384, config=DkdvConfig(2, 2, 2, kv_stages=2, dq_warpgroup=True, unroll=2, dq_blocks=6)),
    Target((40, 24), length=200, lengths=True, dropout=0.1, config=DkdvConfig(2, 2, dq_warpgroup=True, dq_blocks=4), spills=96),
    # The query heads of a key head in parts, whose sums leave straight from registers.
    Target((64, 64), band=CAUSAL, groups=4, config=DkdvConfig(2, 2, dq_warpgroup=True, unroll=2, head_splits=2)),
    Target((128, 128), F16, groups=8, config=DkdvConfig(2, 2, red_dq=True, head_splits=3), spills=LOOP),
    Target((40, 128), bias="1h1k", grads="qvb", groups=4, config=DkdvConfig(2, 2, head_splits=4), adds=False, spills=LOOP),
    Target((80, 72), groups=4, config=DkdvConfig(2, 2, head_splits=2)),
    # ALiBi, one- and two-sided.
    Target((128, 128), slopes=True, spills=72),
    # Dropout: marks take 16 registers more beside products that fill them, some of which are spilled once a block.
    *(Target((d, d), band=band, dropout=0.1, spills=96) for d, band in MIXED[:2]),
    Target((128, 128), bias="1hqk", band=CAUSAL, dropout=0.1, spills=124),
    *(Target((d, d), F16, band=CAUSAL, grads=grads, dropout=0.1, spills=96) for d, grads in ((64, "k"), (128, "v"))),
    Target((64, 64), bias="1h1k", grads="qkvb", softcap=50.0, lengths=True, dropout=0.1, spills=96),
    # Candidates that the plan does not choose here.
    Target((128, 128), config=DkdvConfig(1, 1), spills=108),
    Target((192, 128), band=CAUSAL, length=EVEN, config=DkdvConfig(2, 2, d256=True, own_widths=True, hold_k=True, hold_v=True)),
    Target((160, 160), config=DkdvConfig(2, 2, d256=True, own_widths=True, hold_k=True, hold_v=True)),
    Target((192, 128), band=CAUSAL, length=EVEN, config=DkdvConfig(2, 2, d256=True, own_widths=True, block_m=128, p_stages=1), spills=48),
    Target((128, 128), band=CAUSAL, config=DkdvConfig(2, 2), spills=LOOP),
]  # fmt: skip


def the_call(target: Target, batch: int = 2, heads: int = 16, loops: str = "both") -> tuple[AttentionSpec, Step, Call]:
    """The launch of a target on meta tensors. loops: of the kernel, which long problems launch for each of them."""

    def make(*shape: int, dtype: torch.dtype = target.dtype) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    D, Dv = target.dims
    q = make(batch, target.length, heads, D)
    k, v = (make(batch, target.length, heads // target.groups, d) for d in (D, Dv))
    bias = None
    if target.bias:
        sizes = (batch, heads, target.length, target.length)
        b, *rest = (size if letter != "1" else 1 for letter, size in zip(target.bias, sizes, strict=True))
        bias = make(b, 1, *rest, dtype=target.bias_dtype or target.dtype)
    mask, lengths = mask_of(target.mask, batch, heads, target.length), lengths_of(target.lengths, batch)
    slopes, seed = slopes_of(target.slopes, heads), seed_of(target.dropout)
    second = second_of(target.second, batch, heads, target.length, target.dtype)
    numbers = (target.softcap, target.dropout, not target.adds)
    spec = spec_of(q, k, v, bias, 1, *target.band, 0.125, "ieee", mask, lengths, slopes, None, seed, *numbers, second)
    needs = Needs(*(letter in target.grads for letter in "qkvb"), dsecond="t" in target.grads)
    with override_configs(**{target.kernel: target.config}) if target.config else nullcontext():
        planned = plan_backward(spec, needs, SM90, "hopper")
    plan = with_both_loops(planned) if loops == "both" else planned
    calls = ahead.calls_of(plan, spec, needs, q, k, v, bias, mask, lengths, slopes, None, seed, *[None] * 4, second)
    both = zip(plan.steps, calls, strict=True)
    ((step, call),) = ((step, call) for step, call in both if step.kernel in ("dkdv", "dqdkdv") and step.loops == loops)
    assert step.kernel == target.kernel and call.constants["LOOPS"] == loops
    return spec, step, call


def test_every_target_has_a_name_of_its_own() -> None:
    names = [str(target) for target in TARGETS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_compiles_within_limits(target: Target) -> None:
    spec, step, call = the_call(target)
    compiled, log = compiled_with_log(call)
    assert isinstance(step.config, HopperConfig)
    used, reckoned = ahead.resources(compiled), step.config.shared_memory(spec, step.gives)
    assert used.shared_memory <= reckoned <= SM90.shared_memory, f"{call.config}: {used}, reckoned {reckoned}"
    code = disassembled(compiled)
    assert re.search(r"\bHGMMA\b", code), "products run on the warpgroup matrix units"
    sums = call.constants.get("SUM_BY_MMA", False)  # of a bias over keys, beside one of tiles: four small products a block, for 32 powers
    assert len(re.findall(r"\bHMMA\b", code)) * 8 == sums * code.count("MUFU.EX2")
    # Statistics, and a bias, are read by plain loads: their buffers go back to TMA behind a fence.
    assert re.search(r"\bLDSM?\b", code) and unfenced_releases(code) == 0
    assert not ambiguous_descriptors(code)
    if target.lengths and target.kernel == "dkdv":
        # Cleared by plain stores; where ds is stored too, products that do not read it come between.
        assert unfenced_products(code) == 0
    if MEASURED:  # what is declared was read off this version's compiler
        assert used.spills <= target.spills, f"{call.config}: {used}"
    assert not serialised(log)


@pytest.mark.parametrize(
    "dims, columns",
    [((64, 64), (64, 64)), ((80, 72), (80, 80)), ((96, 64), (96, 64)), ((192, 128), (192, 128)), ((160, 24), (160, 32))],
)
def test_columns_that_pad_a_head_are_not_multiplied(dims: tuple[int, int], columns: tuple[int, int]) -> None:
    """As in test_hopper.py: s, dk and dq have the columns of q and k, dp and dv those of dout and v."""
    s, dp = (n // 16 for n in columns)
    call = the_call(Target(dims, band=CAUSAL, adds=False))[2]
    assert (call.constants["QK"], call.constants["OV"]) == columns
    if dims == (160, 24):  # s and dp are 64 queries wide, and dp is there once; dk is 128 and 32 wide, dv 32
        found = Counter(re.findall(r"m64n(\d+)k16", ahead.compile_for(call, "sm90").asm["ptx"]))
        assert set(found) == {"64", "128", "32"} and found["32"] > found["128"] > 0
        assert found["64"] > dp and (found["64"] - dp) % s == 0


ALONE = [
    Target((64, 64), length=EVEN),
    Target((64, 64), length=EVEN, adds=False),
    Target((64, 64), bias="1h1k", length=EVEN, grads="qkvb"),
    Target((128, 128), length=EVEN, spills=LOOP),
    Target((128, 128), length=EVEN, band=CAUSAL, adds=False, spills=LOOP),
    Target((256, 256), length=EVEN),
]


@pytest.mark.parametrize("target", ALONE, ids=str)
def test_a_kernel_of_one_loop_has_no_other(target: Target) -> None:
    """And spills no more than one of both; that of small lse fetches no rest."""
    both, small, other = (the_call(target, loops=which) for which in ("both", "small", "any"))
    kernels = [compiled_with_log(call) for _, _, call in (both, small, other)]
    code = [disassembled(compiled) for compiled, _ in kernels]
    powers = [each.count("MUFU.EX2") for each in code]
    assert powers[1] + powers[2] == powers[0] and min(powers) > 0
    lines = [each.count(";") for each in code]
    assert lines[1] < lines[2] < 0.8 * lines[0]  # dkdv_d256 has two loops in but one of two partitions
    if not both[2].config.d256:
        assert lines[1] < 0.65 * lines[0]
    used = [ahead.resources(compiled) for compiled, _ in kernels]
    assert used[1].shared_memory < used[2].shared_memory <= both[1].config.shared_memory(both[0], both[1].gives)
    if MEASURED:
        assert max(used[1].spills, used[2].spills) <= max(used[0].spills, target.spills)
    for (_, log), each in zip(kernels, code, strict=True):
        assert not serialised(log) and unfenced_releases(each) == 0 and not ambiguous_descriptors(each)


def test_other_sizes_are_the_same_kernel() -> None:
    """Batches, heads, groups of heads, their parts and lengths are arguments; only whether a length is a multiple of the tile is compiled in."""
    for target in (Target((64, 64), band=CAUSAL), Target((256, 256))):
        sizes = ((EVEN, 2, 16, 1), (5120, 1, 9, 3), (EVEN, 16, 2, 2), (8192, 3, 12, 3))
        made = [the_call(replace(target, length=length, groups=groups), batch, heads)[2] for length, batch, heads, groups in sizes]
        assert len({ahead.compile_for(call, "sm90").hash for call in made}) == 1
    parts = [replace(TARGETS[1], groups=8, config=DkdvConfig(2, 2, dq_warpgroup=True, head_splits=splits)) for splits in (2, 3)]
    assert len({ahead.compile_for(the_call(target)[2], "sm90").hash for target in parts}) == 1


def test_releases_without_a_fence_are_found() -> None:
    """The check above can fail."""
    code = disassembled(ahead.compile_for(the_call(TARGETS[0])[2], "sm90"))
    assert unfenced_releases(code.replace("MEMBAR", "NOP")) > 0
