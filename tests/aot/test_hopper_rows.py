"""The Hopper kernels dq and dbias compile for sm90, without a GPU, into what they were written for. What that is: see test_hopper.py."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from machine_code import MEASURED
from test_hopper import (
    BF16,
    BOOL,
    CAUSAL,
    EVEN,
    F16,
    F32,
    FULL,
    MIXED,
    ODD,
    SM90,
    UNEVEN,
    WINDOW,
    ambiguous_descriptors,
    compiled_with_log,
    disassembled,
    features_of,
    lengths_of,
    mask_of,
    second_of,
    seed_of,
    serialised,
    slopes_of,
    unfenced_products,
    unfenced_releases,
)

triton = pytest.importorskip("triton")

from triflash.launch import ahead
from triflash.launch.calls import Call
from triflash.launch.hopper_dbias import dbias_call
from triflash.launch.hopper_dq import dq_call
from triflash.launch.mask_bounds import bounds_of, new_bounds
from triflash.launch.room import Real
from triflash.plan.configs import padded
from triflash.plan.hopper import reads_small_lse
from triflash.plan.kernels import dbias as dbias_plan
from triflash.plan.kernels import dq as dq_plan
from triflash.plan.kernels import mask_bounds
from triflash.plan.kernels.dbias import DbiasConfig
from triflash.plan.kernels.dq import DqConfig
from triflash.plan.kernels.rowwise import FLAGS
from triflash.plan.steps import Plan, Step
from triflash.spec import spec_of

SPILLS = {64: 8, 128: 8, 256: 20}  # 4-byte words of a thread, by padded head dim; in what a tile does once, not in what a block does


@dataclass(frozen=True)
class Target:
    """One compilation. splits 0: the kernel dq, which gives dbias too if ``gradient``; else the kernel dbias, in that many parts."""

    dims: tuple[int, int]
    bias: str = ""
    band: tuple[int | None, int | None] = FULL
    gradient: bool = False
    splits: int = 0
    dtype: torch.dtype = BF16
    bias_dtype: torch.dtype | None = None
    length: int = UNEVEN
    config: DqConfig | DbiasConfig | None = None
    group: int = 1
    softcap: float = 0.0
    mask: str = ""
    lengths: bool = False
    dropout: float = 0.0
    slopes: bool = False
    second: str = ""
    spills: int = 0

    def __str__(self) -> str:
        names = {BF16: "bf16", F16: "fp16", F32: "fp32", BOOL: "bool", None: ""}
        kernel = f"dbias-in-{self.splits}" if self.splits else "dq-and-dbias" if self.gradient else "dq"
        dims = f"d{self.dims[0]}" + f"-dv{self.dims[1]}" * (self.dims[1] != self.dims[0])
        band = {FULL: "full", CAUSAL: "causal"}.get(self.band, "window")
        parts = (
            kernel,
            dims,
            names[self.dtype],
            self.bias,
            names[self.bias_dtype],
            band,
            str(self.length),
            features_of(self),
            str(self.config or ""),
        )
        return "-".join(part.replace(" ", "-") for part in parts if part) + f"-group-{self.group}" * (self.group > 1)


def dq(d: int, *args: object, **more: object) -> Target:
    return Target((d, d), *args, **more)  # type: ignore[arg-type]


def dbias(d: int, *args: object, splits: int = 1, **more: object) -> Target:
    return Target((d, d), *args, splits=splits, **more)  # type: ignore[arg-type]


TARGETS = [
    *(dq(d, band=band, length=length) for d in (64, 128, 256) for band, length in ((FULL, EVEN), (CAUSAL, UNEVEN))),
    dq(32, dtype=F16, length=ODD),
    dq(96, band=WINDOW, dtype=F16),
    dq(160, band=CAUSAL),
    dq(160, band=CAUSAL, dropout=0.1),
    Target((192, 128), band=CAUSAL),
    *(dq(d, "1hqk", band) for d, band in MIXED),
    dq(128, "1hqk", WINDOW, dtype=F16, bias_dtype=F32),
    dq(128, "bhqk", bias_dtype=BOOL),
    dq(64, "1h1k", CAUSAL, group=4),
    dq(128, "1hq1", CAUSAL, bias_dtype=BOOL, spills=12),
    *(dq(d, "bhqk", band, True) for d, band in ((64, FULL), (128, CAUSAL))),
    dq(32, "bhqk", CAUSAL, True, dtype=F16),
    dq(256, "bhqk", CAUSAL, True, bias_dtype=F32, length=ODD),
    Target((192, 128), "bhqk", FULL, True, dtype=F16),
    *(dbias(d, "1hqk", band) for d, band in ((64, FULL), (64, CAUSAL), (128, FULL), (256, CAUSAL))),
    dbias(128, "b1qk", WINDOW, bias_dtype=F32, group=2),
    dbias(64, "11qk", splits=3),
    dbias(128, "1hqk", CAUSAL, splits=2, length=ODD, dtype=F16),
    Target((16, 256), "11qk", WINDOW, splits=1, bias_dtype=F32),
    # Soft caps.
    dq(128, softcap=50.0),
    dq(128, "bhqk", CAUSAL, True, softcap=30.0),
    dbias(64, "1hqk", CAUSAL, softcap=50.0),
    # Masks beside biases.
    *(dq(d, "1hqk", band, mask="b1qk") for d, band in MIXED[1:]),
    dq(128, "bhqk", CAUSAL, True, mask="b11k"),
    *(dbias(d, "1hqk", band, mask="b11k") for d, band in MIXED[:2]),
    # Key lengths.
    *(dq(d, band=band, lengths=True) for d, band in MIXED[:2]),
    dq(64, "bhqk", lengths=True, gradient=True),
    *(dbias(d, "1hqk", band, lengths=True, spills=20) for d, band in MIXED[:2]),
    dq(128, "1hqk", CAUSAL, mask="b1qk", lengths=True, softcap=50.0, spills=20),
    dbias(64, "1hqk", CAUSAL, mask="b11k", lengths=True, softcap=50.0, spills=40),
    # ALiBi, one- and two-sided.
    *(dq(d, band=band, slopes=True) for d, band in MIXED[:2]),
    dbias(128, "1hqk", CAUSAL, slopes=True),
    # Dropout.
    dq(128, dropout=0.1, spills=48),
    dq(128, "bhqk", CAUSAL, True, dropout=0.1, spills=48),
    dbias(64, "1hqk", CAUSAL, dropout=0.1, spills=48),
    # All at once, at wide heads.
    dq(256, "1hqk", CAUSAL, mask="b1qk", lengths=True, softcap=50.0, dropout=0.1, spills=48),
    dbias(256, "1hqk", mask="b11k", lengths=True, softcap=50.0, dropout=0.1, spills=56),
    # A row of keys beside a tile of bias.
    dq(64, "1hqk", CAUSAL, second="b11k"),
    dq(128, "bhqk", gradient=True, second="111k", bias_dtype=F32),
    dbias(32, "1hqk", second="b11k", spills=24),
    dbias(64, "1hqk", CAUSAL, second="b11k"),
    dbias(128, "11qk", second="bh1k", mask="b11k", length=ODD, spills=48),
    # Several programs an SM.
    dq(32, "1hqk", mask="b11k"),
    dq(32, "bhqk", gradient=True),
    *(dq(32, band=band) for band in (FULL, WINDOW)),
    dbias(48, "1hqk", bias_dtype=F32),
    dbias(32, "1hqk", CAUSAL, lengths=True, spills=28),
    dbias(32, "1hqk", dropout=0.1, spills=48),
    # What the plan falls back to, and what may turn out faster.
    dq(128, band=CAUSAL, config=DqConfig(2, 128, 2, 2, separate_dq=False, deferred=False)),
    dq(64, "bhqk", CAUSAL, True, config=DqConfig(2, 128, 2, 2, 2, deferred=False)),
    dq(128, "bhqk", WINDOW, True, config=DqConfig(1, 32, 2, 2, separate_dq=False)),
    # … padded heads in buffers of their own width, q in registers or not.
    dq(160, band=CAUSAL, config=DqConfig(2, 64, 2, 2, separate_dq=False, own_widths=True)),
    dq(160, band=CAUSAL, config=DqConfig(2, 32, 3, 2, own_widths=True, hold_q=True, hold_dout=True)),
    dbias(128, "1hqk", config=DbiasConfig(2, 128, 6, 6, ping_pong=True)),
    dbias(64, "11qk", CAUSAL, splits=2, length=ODD, config=DbiasConfig(2, 64, 7, 6, 2)),
    dq(64, "1hqk", CAUSAL, config=DqConfig(2, 64, 3, 2, 2, ping_pong=True)),
    dbias(128, "1hqk", CAUSAL, config=DbiasConfig(1, 32, 4, 4)),
]


def the_call(target: Target, batch: int = 2, heads: int = 16) -> tuple[Call, int]:
    """The launch of a target on meta tensors, and the shared memory that the plan reckons with."""

    def make(*shape: int, dtype: torch.dtype = target.dtype) -> torch.Tensor:
        row = -(-shape[-1] // 16) * 16
        return torch.empty((*shape[:-1], row), device="meta", dtype=dtype)[..., : shape[-1]]

    D, Dv = target.dims
    q, dout, grad = (make(batch, target.length, heads, d) for d in (D, Dv, D))
    k, v = (make(batch, target.length, heads // target.group, d) for d in (D, Dv))
    bias = None
    if target.bias:
        sizes = (batch, heads, target.length, target.length)
        b, *rest = (size if letter != "1" else 1 for letter, size in zip(target.bias, sizes, strict=True))
        bias = make(b, 1, *rest, dtype=target.bias_dtype or target.dtype)
    mask, lengths = mask_of(target.mask, batch, heads, target.length), lengths_of(target.lengths, batch)
    slopes, seed = slopes_of(target.slopes, heads), seed_of(target.dropout)
    second = second_of(target.second, batch, heads, target.length, target.dtype)
    numbers = (target.softcap, target.dropout, False)
    spec = spec_of(q, make(*q.shape), dout, bias, 1, *target.band, 0.125, "ieee", mask, lengths, slopes, None, seed, *numbers, second)
    stats = torch.empty((batch * heads, 3 if spec.keeps_rest else 2, -(-target.length // 128) * 128), device="meta", dtype=F32)
    if target.splits:
        assert bias is not None and dbias_plan.why_not(spec, SM90) is None
        config = target.config or dbias_plan.choose(spec, SM90.shared_memory)
        assert isinstance(config, DbiasConfig)
        dtype = bias.dtype if target.splits == 1 else F32
        parts = make(target.splits, *bias.shape, dtype=dtype)
        programs = dbias_plan.programs(spec, config, target.splits, SM90.sms)
        operands = (q, k, v, bias, dout, stats, parts, lengths, slopes, mask, seed, None, second)
        return dbias_call(spec, config, programs, target.splits, *operands), config.shared_memory(spec)
    gives = ("dq", "dbias") if target.gradient else ("dq",)
    config = target.config or dq_plan.choose(spec, SM90.shared_memory, gives)
    assert isinstance(config, DqConfig)
    full = make(*bias.shape, dtype=bias.dtype) if bias is not None and target.gradient else None
    programs = dq_plan.programs(spec, config, SM90.sms)
    small_lse = torch.empty(FLAGS, device="meta", dtype=torch.int32) if reads_small_lse(spec, Step("dq", config, programs)) else None
    features = (lengths, slopes, mask, seed, small_lse, second)
    bounds = None
    if mask is not None and full is None:
        plan = Plan("hopper", mask_bounds.steps(spec, {"mask_bounds": mask_bounds.CONFIG}, ("queries",)))
        bounds = bounds_of(new_bounds(Real(q), plan, spec), "queries")
    call = dq_call(spec, config, programs, q, k, v, bias, dout, stats, grad, full, *features, bounds=bounds)
    return call, config.shared_memory(spec, gives)


def test_every_target_has_a_name_of_its_own() -> None:
    names = [str(target) for target in TARGETS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_compiles_within_limits(target: Target) -> None:
    call, reckoned = the_call(target)
    compiled, log = compiled_with_log(call)
    used = ahead.resources(compiled)
    assert used.shared_memory <= reckoned <= SM90.shared_memory, f"{call.config}: {used}, reckoned {reckoned}"
    code = disassembled(compiled)
    assert re.search(r"\bHGMMA\b", code) and not re.search(r"\bHMMA\b", code)
    assert not serialised(log)
    if target.gradient or target.splits:
        assert unfenced_stores(code) == 0
        assert unfenced_stores(code.replace("MEMBAR", "NOP")) > 0  # the check can fail
    else:
        assert unfenced_releases(code) == 0
    assert not ambiguous_descriptors(code)
    if target.lengths and not target.splits:  # what a length hides is cleared by plain stores
        assert unfenced_products(code) == 0
    if target.splits:
        assert powers_under_a_product(code) == {(call.config.block_n // 2 * (1 + (target.softcap > 0)), 0)}
    if MEASURED:  # what is declared was read off this version's compiler
        assert used.spills <= max(SPILLS[max(64, padded(max(target.dims)))], target.spills), f"{call.config}: {used}"


def unfenced_stores(code: str) -> int:
    """How often a buffer leaves by TMA, or is released for the last time by a consumer, with own reads or writes of shared memory before it
    in the text and no fence between. Buffers of these kernels that are also read by hand are released behind such a store only."""
    found = 0
    for partition in re.split(r"USETMAXREG", code):
        lines = partition.splitlines()
        arrivals = [n for n, line in enumerate(lines) if "SYNCS.ARRIVE" in line and ".A1T0" in line]
        pending = False
        for n, line in enumerate(lines):
            if re.search(r"\b(LDSM?|STSM?)\b", line):
                pending = True
            elif "MEMBAR" in line:
                pending = False
            elif "UTMASTG" in line or (arrivals and n == arrivals[-1] and "HGMMA" in partition):
                found += pending
    return found


def powers_under_a_product(code: str) -> set[tuple[int, int]]:
    """Of every consumer of ``dbias``: how many powers of 2 a thread takes between a round's last two waits for products, and how many else.

    Behind the last but one it knows s, behind the last dp: ptxas is known to move that up, so that nothing is done under the product.
    """
    found = set()
    for partition in re.split(r"USETMAXREG", code):
        events = "".join(event[0] for event in re.findall(r"MUFU\.EX2|WARPGROUP\.DEPBAR", partition))
        if "W" in events:
            *before, under, behind = events.split("W")
            found.add((len(under), len("".join(before) + behind)))
    return found


@pytest.mark.parametrize("target", [target for target in TARGETS if target.length != EVEN and not target.splits][::6], ids=str)
def test_the_softmax_runs_under_a_product(target: Target) -> None:
    """In every loop the exponentials come before the last wait for products: ptxas is known to move that wait up."""
    code = disassembled(ahead.compile_for(the_call(target)[0], "sm90"))
    events = "".join("x" if "MUFU.EX2" in line else "w" for line in code.splitlines() if re.search(r"MUFU.EX2|WARPGROUP.DEPBAR", line))
    blocks = re.findall(r"w+x+w", events)
    assert len(blocks) >= 2, events


def test_other_sizes_are_the_same_kernel() -> None:
    """A service that meets many batch sizes and lengths compiles once, not once for each combination of multiples of 16."""
    for targets in ([dq(64, band=CAUSAL, length=n) for n in (2048, 2560, 1024)], [dbias(64, "1hqk", length=n) for n in (2048, 2560, 1024)]):
        sizes = ((2, 16), (4, 5), (3, 16))
        assert len({ahead.compile_for(the_call(target, *size)[0], "sm90").hash for target, size in zip(targets, sizes, strict=True)}) == 1
