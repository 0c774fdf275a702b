"""The Hopper kernels compile for sm90, without a GPU, into what they were written for: warpgroup products that are not serialised, few spills,
and no more shared memory than the plan reckons with. Compiled is the very call that the plan makes."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from machine_code import (
    MEASURED,
    ambiguous_descriptors,
    assembled,
    compiled_with_log,
    disassembled,
    parameters_of,
    serialised,
    unfenced_products,
    unfenced_releases,
)

from parameters import parameter_offsets
from triflash.launch import ahead
from triflash.launch.calls import Call
from triflash.launch.hopper import forward_calls
from triflash.launch.mask_bounds import new_bounds
from triflash.launch.room import Real
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.kernels.forward import ForwardConfig
from triflash.plan.override import override_configs
from triflash.plan.select import plan_forward
from triflash.spec import INTEGERS, AttentionSpec, Operands, Saved, spec_of

BF16, F16, F32, BOOL = torch.bfloat16, torch.float16, torch.float32, torch.bool
SM90 = KNOWN_DEVICES["sm90"]
EVEN, UNEVEN, ODD = 2048, 2032, 2047  # of every block; of none, but rows of 16-bit elements are wide; not even that

SPILLS = 12  # 4-byte words that a thread may spill: a handful is what loop-invariant scalars cost, once a tile and not once a block


def features_of(target: Any) -> str:
    """What a target has beyond dims, a bias and a band, as part of its name."""
    own = "soft-cap" * (target.softcap > 0) + f"mask-{target.mask}" * bool(target.mask) + "lengths" * target.lengths
    own += f"second-{target.second}" * bool(target.second)
    return own + "dropout" * (target.dropout > 0) + "slopes" * target.slopes


@dataclass(frozen=True)
class Target:
    """One compilation. bias, second: a letter where they vary, over (batch, head, query, key); empty is none. band: (lo, hi). config None: the plan's."""

    dims: tuple[int, int]
    dtype: torch.dtype = BF16
    bias: str = ""
    bias_dtype: torch.dtype | None = None
    band: tuple[int | None, int | None] = (None, None)
    length: int = UNEVEN
    config: ForwardConfig | None = None
    softcap: float = 0.0
    mask: str = ""
    lengths: bool = False
    dropout: float = 0.0
    slopes: bool = False
    second: str = ""
    spills: int = 0

    def __str__(self) -> str:
        names = {BF16: "bf16", F16: "fp16", F32: "fp32", BOOL: "bool", None: ""}
        dims = f"d{self.dims[0]}" + f"-dv{self.dims[1]}" * (self.dims[1] != self.dims[0])
        band = {(None, None): "full", (None, 0): "causal"}.get(self.band, "window")
        parts = (
            dims,
            names[self.dtype],
            self.bias,
            names[self.bias_dtype],
            band,
            str(self.length),
            features_of(self),
            str(self.config or ""),
        )
        return "-".join(part.replace(" ", "-") for part in parts if part)


FULL, CAUSAL, WINDOW = (None, None), (None, 0), (-500, 100)
OF_OWN_WIDTHS = ForwardConfig(2, 128, 2, separate_o=False, own_widths=True)
MIXED = ((64, CAUSAL), (128, FULL), (256, CAUSAL))  # for what changes little about the loops: of head dims by bands, some
TARGETS = [
    # The sizes that matter most, causal and not, at lengths with and without a rest.
    *(Target((d, d), band=band, length=length) for d in (64, 128, 256) for band, length in ((FULL, EVEN), (CAUSAL, UNEVEN))),
    # Other head dims, padded ones among them, and a value dim of its own.
    Target((32, 32), band=CAUSAL),
    Target((96, 96), F16, band=WINDOW),
    Target((192, 128), band=CAUSAL, length=EVEN),
    # Of which columns that pad a head are left out of q k.
    Target((80, 80), band=CAUSAL),
    Target((160, 160), length=EVEN),
    Target((208, 72), F16, band=CAUSAL),  # three pieces would be needed of its q k
    Target((72, 208), band=CAUSAL),  # … and of its output, which is one
    Target((192, 192), band=CAUSAL),
    Target((160, 160), bias="1hqk", band=CAUSAL),
    # … which may lie in buffers of a head's own width, that leave room for larger tiles.
    *(Target((d, d), band=band, config=OF_OWN_WIDTHS) for d, band in ((160, CAUSAL), (160, FULL))),
    Target((192, 128), band=CAUSAL, config=OF_OWN_WIDTHS),
    Target((192, 192), F16, length=EVEN, config=ForwardConfig(2, 64, 2, own_widths=True)),
    Target((160, 160), band=CAUSAL, config=ForwardConfig(2, 64, 3, own_widths=True)),
    Target((80, 96), band=CAUSAL, config=ForwardConfig(2, 128, 2, q_stages=2, own_widths=True)),
    Target((72, 72), length=EVEN, lengths=True, config=ForwardConfig(2, 128, 2, q_stages=2, own_widths=True)),
    # A tile of bias a block.
    *(Target((d, d), bias="1hqk", band=band) for d, band in ((64, CAUSAL), (128, CAUSAL), (256, FULL))),
    Target((128, 128), bias="1hqk", spills=24),
    Target((256, 256), bias="1hqk", bias_dtype=F32, spills=20),
    Target((96, 96), F16, bias="bhqk", bias_dtype=F32, band=WINDOW, length=ODD, spills=18),
    # A row of bias a block.
    Target((64, 64), bias="1h1k", band=CAUSAL),
    Target((128, 128), bias="1h1k", bias_dtype=F32, spills=30),
    Target((32, 32), bias="b11k", bias_dtype=BOOL),
    # Masks, between whose first and last keys of a tile blocks are walked.
    *(Target((d, d), bias="b1qk", bias_dtype=BOOL, band=band) for d, band in ((64, FULL), (128, CAUSAL))),
    Target((256, 256), bias="b11k", bias_dtype=BOOL),
    # A number a query.
    Target((64, 64), bias="1hq1"),
    # Soft caps.
    *(Target((d, d), band=band, softcap=50.0) for d, band in MIXED[:2]),
    Target((128, 128), F16, bias="1hqk", band=CAUSAL, softcap=30.0),
    # Masks beside biases, a row or a tile of either.
    Target((128, 128), bias="1hqk", mask="b1qk"),
    Target((64, 64), F16, bias="1h1k", bias_dtype=F32, mask="b1qk", length=ODD),
    Target((128, 128), bias="1hqk", mask="b11k", softcap=50.0),
    # A row of keys beside a tile of bias, of either dtype, and a mask beside both.
    Target((32, 32), bias="1hqk", second="b11k", length=512, spills=16),
    Target((128, 128), F16, bias="bhqk", bias_dtype=F32, second="111k", mask="b11k", length=ODD, spills=24),
    # Key lengths.
    Target((64, 64), length=EVEN, lengths=True, spills=32),  # three consumers
    Target((256, 256), band=CAUSAL, length=EVEN, lengths=True),
    Target((16, 16), F16, length=ODD, lengths=True),
    Target((64, 64), lengths=True, config=ForwardConfig(3, 16, 2)),
    Target((128, 128), bias="bhqk", band=WINDOW, mask="b1qk", lengths=True),
    # ALiBi, one- and two-sided.
    *(Target((d, d), band=band, slopes=True) for d, band in MIXED[:2]),
    Target((64, 64), bias="1hqk", band=CAUSAL, slopes=True, softcap=50.0),
    # Dropout.
    Target((128, 128), dropout=0.1, spills=28),  # in the block of one consumer
    Target((128, 128), bias="1hqk", band=CAUSAL, dropout=0.1),
    # All at once, with spills outside the loops, but for one word in a block that the band cuts.
    Target((128, 128), F16, bias="1h1k", mask="b11k", band=WINDOW, lengths=True, softcap=50.0, dropout=0.1, spills=16),
    Target((256, 256), bias="1hqk", mask="b1qk", band=CAUSAL, lengths=True, dropout=0.1),
    # Several programs an SM.
    *(Target((d, d), bias="1hqk", band=band, length=512) for d, band in ((32, FULL), (64, CAUSAL))),
    *(Target((d, d), band=CAUSAL, length=512) for d in (32, 64, 128, 256)),
    Target((64, 64), band=(-255, 0), length=ODD),
    Target((64, 64), band=CAUSAL, length=512, lengths=True),
    # What the plan does not choose (or not yet), and tests choose by hand.
    Target((64, 64), F16, bias="1hqk", band=WINDOW, config=ForwardConfig(1, 16, 1)),
    Target((128, 128), config=ForwardConfig(2, 64, 3, 2, ping_pong=True, separate_o=False)),
    Target((64, 64), bias="1h1k", config=ForwardConfig(3, 64, 2, 2, ping_pong=True, persistent=False)),
    Target((64, 64), band=WINDOW, config=ForwardConfig(2, 128, 2, q_stages=2)),
]  # fmt: skip


def mask_of(pattern: str, batch: int, heads: int, length: int) -> torch.Tensor | None:
    """A mask beside a bias, on rows that TMA can address."""
    if not pattern:
        return None
    b, h, q, k = (size if letter != "1" else 1 for letter, size in zip(pattern, (batch, heads, length, length), strict=True))
    return torch.empty((b, 1, h, q, -(-k // 16) * 16), device="meta", dtype=BOOL)[..., :k]


def second_of(pattern: str, batch: int, heads: int, length: int, dtype: torch.dtype) -> torch.Tensor | None:
    """A second bias, on rows that TMA can address."""
    mask = mask_of(pattern, batch, heads, length)
    return None if mask is None else torch.empty_strided(mask.shape, mask.stride(), dtype=dtype, device="meta")


def lengths_of(wanted: bool, batch: int) -> torch.Tensor | None:
    return torch.empty(batch, device="meta", dtype=torch.int32) if wanted else None


def slopes_of(wanted: bool, heads: int) -> torch.Tensor | None:
    return torch.empty(1, heads, device="meta", dtype=F32) if wanted else None


def seed_of(dropout: float) -> torch.Tensor | None:
    return torch.empty(2, device="meta", dtype=torch.int64) if dropout else None


def the_call(target: Target, batch: int = 2, heads: int = 16) -> tuple[AttentionSpec, Call]:
    """The launch of a target on meta tensors."""

    def make(*shape: int, dtype: torch.dtype = target.dtype) -> torch.Tensor:
        row = -(-shape[-1] // 16) * 16  # what TMA can address; the launcher copies a bias of odd rows to this
        return torch.empty((*shape[:-1], row), device="meta", dtype=dtype)[..., : shape[-1]]

    D, Dv = target.dims
    q, k, v, out = (make(batch, target.length, heads, d) for d in (D, D, Dv, Dv))
    lse = make(batch, heads, target.length, dtype=F32).contiguous()
    bias = None
    if target.bias:
        sizes = (batch, heads, target.length, target.length)
        b, *rest = (size if letter != "1" else 1 for letter, size in zip(target.bias, sizes, strict=True))
        bias = make(b, 1, *rest, dtype=target.bias_dtype or target.dtype)
    mask = mask_of(target.mask, batch, heads, target.length)
    lengths = lengths_of(target.lengths, batch)
    slopes, seed = slopes_of(target.slopes, heads), seed_of(target.dropout)
    second = second_of(target.second, batch, heads, target.length, target.dtype)
    numbers = (target.softcap, target.dropout, False)
    spec = spec_of(q, k, v, bias, 1, *target.band, 0.125, "ieee", mask, lengths, slopes, None, seed, *numbers, second)
    kept = torch.empty_like(lse) if spec.keeps_rest else None
    with override_configs(forward=target.config) if target.config else nullcontext():
        plan = plan_forward(spec, SM90, "hopper")
    operands = Operands(q, k, v, bias, mask, lengths, slopes, dropout_seed=seed, second_bias=second)
    *_, call = forward_calls(plan, spec, operands, Saved(out, lse, kept), bounds=new_bounds(Real(q), plan, spec))
    return spec, call


def test_every_target_has_a_name_of_its_own() -> None:
    names = [str(target) for target in TARGETS]
    assert len(set(names)) == len(names)


def test_serialised_products_are_found() -> None:
    """The check below can fail: without the kernel's own waits ptxas puts in some, and says so."""
    ptx = ahead.compile_for(the_call(TARGETS[0])[1], "sm90").asm["ptx"]
    careless = re.sub(r"wgmma\.wait_group\.sync\.aligned \d+;", "", ptx)
    assert careless != ptx and serialised(assembled(careless)) and not serialised(assembled(ptx))


SKIPPED_DESCRIPTOR = """
    /*0000*/  UIMAD.WIDE.U32 UR16, UR17, UR18, URZ ;
    /*0010*/  @!P1 BRA `(.L_x_2) ;
    /*0020*/  UMOV UR16, UR13 ;
.L_x_1:
    /*0030*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;
    /*0040*/  @P0 BRA `(.L_x_1) ;
.L_x_2:
    /*0050*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;
    /*0060*/  @P0 BRA `(.L_x_2) ;
    /*0070*/  EXIT ;
"""


def test_a_descriptor_that_only_an_earlier_loop_sets_is_found() -> None:
    (found,) = ambiguous_descriptors(SKIPPED_DESCRIPTOR)
    assert "/*0050*/" in found
    assert not ambiguous_descriptors(SKIPPED_DESCRIPTOR.replace("@!P1 BRA `(.L_x_2)", "NOP"))


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_compiles_within_limits(target: Target) -> None:
    spec, call = the_call(target)
    compiled, log = compiled_with_log(call)
    used = ahead.resources(compiled)
    assert used.shared_memory <= SM90.shared_memory, f"{call.config}: {used}"
    assert used.shared_memory <= call.config.shared_memory(spec), f"{call.config}: {used}, more than the plan reckons with"
    code = disassembled(compiled)
    assert re.search(r"\bHGMMA\b", code) and not re.search(r"\bHMMA\b", code), "products run on the warpgroup matrix units, all of them"
    assert not serialised(log)
    assert not ambiguous_descriptors(code)
    if target.bias and target.bias[-1] == "k":  # read by plain loads: its buffer goes back to TMA behind a fence
        assert re.search(r"\bLDSM?\b", code) and unfenced_releases(code) == 0
    if target.lengths:  # what a length hides is cleared by plain stores
        assert re.search(r"\bSTS\b", code) and unfenced_products(code) == 0 and unfenced_releases(code) == 0
        assert unfenced_products(code.replace("FENCE", "NOP")) > 0  # the check can fail
    if MEASURED:  # what is declared was read off this version's compiler
        assert used.spills <= max(SPILLS, target.spills), f"{call.config}: {used}"


@pytest.mark.parametrize("head_dim, steps", [(64, 4), (72, 5), (80, 5), (96, 6), (128, 8), (144, 9), (160, 10), (192, 12), (256, 16)])
def test_columns_that_pad_a_head_are_not_multiplied(head_dim: int, steps: int) -> None:
    """q and k in steps of 16, and v: by the constants that the kernel is compiled for, and one head dim by its PTX."""
    _, call = the_call(Target((head_dim, head_dim), band=CAUSAL))
    assert call.constants["QK"] == call.constants["OV"] == 16 * steps
    if head_dim == 160:  # q k is 128 keys wide, as is the first of two accumulators of p v, which has as many steps as the second, 32 wide
        found = Counter(re.findall(r"m64n(\d+)k16", ahead.compile_for(call, "sm90").asm["ptx"]))
        products = found["128"] - found["32"]
        assert set(found) == {"128", "32"} and found["32"] % 8 == 0 and products > 0 and products % steps == 0


@pytest.mark.parametrize(
    "sizes", [((2048, 2, 16), (2560, 1, 5), (1536, 16, 1)), ((512, 8, 16), (640, 4, 5), (1024, 16, 1))], ids=["long", "short"]
)
def test_other_sizes_are_the_same_kernel(sizes: tuple[tuple[int, int, int], ...]) -> None:
    """A service that meets many batch sizes and lengths compiles once, or once for short and once for long rows, not once for each combination
    of multiples of 16."""
    compiled = [
        ahead.compile_for(the_call(Target((64, 64), band=CAUSAL, length=length), batch, heads)[1], "sm90").hash
        for length, batch, heads in sizes
    ]
    assert len(set(compiled)) == 1


def test_releases_without_a_fence_are_found() -> None:
    """The check above can fail."""
    code = disassembled(ahead.compile_for(the_call(Target((64, 64), bias="1hqk"))[1], "sm90"))
    assert unfenced_releases(code.replace("MEMBAR", "NOP")) > 0


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_key_lengths_of_any_integers(dtype: torch.dtype) -> None:
    """No dtype of theirs costs registers that are spilled; int32 lengths are the ones above."""
    target = Target((64, 64), band=CAUSAL, length=512, lengths=True)
    plain = ahead.resources(ahead.compile_for(the_call(target)[1], "sm90"))
    _spec, call = the_call(target)
    args = tuple(
        (torch.empty(2, device="meta", dtype=dtype), 1) if isinstance(x, tuple) and isinstance(x[0], torch.Tensor) else x for x in call.args
    )
    used = ahead.resources(ahead.compile_for(replace(call, args=args), "sm90"))
    assert used.spills <= plain.spills and used.registers <= plain.registers + 8


@pytest.mark.parametrize("target", [Target((64, 64)), Target((128, 128), bias="1hqk")], ids=str)
def test_parameters_lie_where_the_stub_of_a_driver_has_them(target: Target) -> None:
    """The first tensor map at an address that is a multiple of 64, and not at such a distance from the first parameter."""
    found = parameters_of(compiled_with_log(the_call(target)[-1])[0])
    offsets, sizes = zip(*found, strict=True)
    assert [*offsets] == parameter_offsets(sizes) and sizes[0] == 128 and offsets[0] == 48
