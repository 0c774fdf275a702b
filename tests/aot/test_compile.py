"""Every configuration that a plan can choose compiles for its architecture, without a GPU, within its shared memory and spill limits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from machine_code import MEASURED, disassembled, halves_of_one_register

from triflash.launch import ahead
from triflash.launch.calls import Call
from triflash.launch.room import Real
from triflash.launch.triton import backward_calls, forward_calls, scratch
from triflash.plan import tables
from triflash.plan.configs import MAX_HEAD_DIM
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.kernels.portable import problem_of
from triflash.plan.override import override_configs
from triflash.plan.select import Plan, plan_backward, plan_forward
from triflash.spec import AttentionSpec, Gradients, Needs, Operands, Saved, spec_of

ARCHITECTURES = ("sm80", "sm86", "sm90", "sm100", "gfx942")
DEFAULT_SPILLS = 96  # words a thread that an unmeasured configuration may spill, half of it in a loop for huge scores alone; a measured row declares its own
WIDE_BIAS_SPILLS = 160  # the same for a measured row, which declares what it spills with a 16-bit bias, under a float32 one
FEATURE_SPILLS = 72  # with one of FEATURES, or all; the most is dropout's, d 128 on sm90, where other kernels are chosen
TF32_FEATURE_SPILLS = 272  # at d 128, by mma.sync on tiles of 32 rows
LENGTH = 2032  # a multiple of 16, so that loads are wide, but of no tile, so that every masked loop is compiled


FEATURES = ("groups", "mask", "lengths", "alibi", "sink", "softcap", "dropout")
PLACES = ("query_starts", "query_lengths", "key_starts", "diagonal")  # "places" among a target's features: all of them
HEADS = 16


class Target(NamedTuple):
    """One compilation: which kernel of which problem for which architecture."""

    arch: str
    kernel: str
    head_dim: int
    dtype: torch.dtype
    bias: str  # a letter where it varies, over (batch, head, query, key); empty: none
    causal: bool
    bias_dtype: torch.dtype | None = None  # None: q's
    features: tuple[str, ...] = ()  # of FEATURES, and "places"
    precision: str = "ieee"
    length: int = LENGTH

    def __str__(self) -> str:
        flags = (
            f"-{self.precision}" * (self.precision != "ieee")
            + f"-{self.bias}" * bool(self.bias)
            + ("-fp32bias" if self.bias_dtype else "")
            + ("-causal" if self.causal else "")
        )
        flags += "".join(f"-{name}" for name in self.features) + f"-s{self.length}" * (self.length != LENGTH)
        return f"{self.arch}-{self.kernel}-d{self.head_dim}-{str(self.dtype)[6:]}{flags}"


def targets() -> Iterator[Target]:
    for arch in ARCHITECTURES:
        close = arch in ("sm86", "sm100")  # to one that is compiled for more: other limits, the same instructions
        for head_dim in (256,) if close else (32, 64, 128, 256) if arch == "sm90" else (128, 256):
            for bias in ("", "1hqk") if arch == "sm90" or (head_dim in (64, 128) and not close) else ("1hqk",):
                # A causal kernel holds both copies of the loop; where measured rows tell full from causal, both are compiled.
                for causal in (False, True) if arch == "sm90" else (True,):
                    for kernel in ("forward", "dkdv", "dq", *(["dbias"] if bias else [])):
                        yield Target(arch, kernel, head_dim, torch.bfloat16, bias, causal)
                    if arch == "sm90" and head_dim == 256 and not bias:
                        for kernel, features in itertools.product(("dk", "dv"), ((), ("groups",), ("lengths",))):
                            yield Target(arch, kernel, head_dim, torch.bfloat16, bias, causal, None, features)
        for head_dim in (64, 256) if arch == "sm90" else () if close else (256,):
            for kernel in ("forward", "dkdv", "dq", "dbias"):
                yield Target(arch, kernel, head_dim, torch.float32, "1hqk", True)
        if close:
            continue
        yield Target(arch, "delta", 128, torch.bfloat16, "", False)
        yield Target(arch, "dbias_sum", 64, torch.bfloat16, "1h1k", False)
        for head_dim in (64, 128) if arch == "sm90" else (128,):  # the passes that write the gradient of a bias on their way
            for causal in (False, True) if arch == "sm90" else (True,):
                yield Target(arch, "dkdv", head_dim, torch.bfloat16, "1h1k", causal)
                yield Target(arch, "dq", head_dim, torch.bfloat16, "bhqk", causal)
    for kernel, kind in (("forward", "1hqk"), ("dkdv", "1hqk"), ("dkdv", "1h1k"), ("dq", "1hqk"), ("dq", "bhqk"), ("dbias", "1hqk")):
        for head_dim, causal in ((64, False), (256, True)):
            yield Target("sm90", kernel, head_dim, torch.bfloat16, kind, causal, torch.float32)
        if kind in ("1h1k", "bhqk"):
            for head_dim, causal in ((32, False), (256, True)):
                yield Target("sm90", kernel, head_dim, torch.bfloat16, kind, causal)
    for arch in ("sm80", "sm90", "gfx942"):
        alone = (*(((name,), "") for name in FEATURES if name != "mask"), (("mask",), "1hqk")) if arch == "sm90" else ()
        for features, bias in (*alone, (FEATURES, "1hqk")):
            kernels = ("forward", "dkdv", "dq", *(["dbias"] if bias else []))
            # The kernels of a feature take turns in head dim and mask; all features together fit d 64 on every architecture.
            for n, kernel in enumerate(kernels if features != ("sink",) else ("forward",)):
                yield Target(arch, kernel, 64 if n % 2 or len(features) > 1 else 128, torch.bfloat16, bias, n != 2, None, features)
        for kernel in ("forward", "dkdv", "dq", "dbias"):
            yield Target(arch, kernel, 64, torch.bfloat16, "1hqk", True, None, ("places", "lengths", "alibi"))
        yield Target(arch, "forward", 512, torch.bfloat16, "1hqk", True)  # wider than the backward kernels take
    for kernel in ("forward", "dkdv", "dq", "dbias"):  # float32 by three TF32 products
        for head_dim in (64, 128):
            for bias, causal in (("", False), ("", True), ("1hqk", False), ("1hqk", True)):
                if bias or kernel != "dbias":
                    yield Target("sm90", kernel, head_dim, torch.float32, bias, causal, precision="tf32x3")
            yield Target("sm80", kernel, head_dim, torch.float32, "1hqk", True, precision="tf32x3")
            yield Target("sm90", kernel, head_dim, torch.float32, "1hqk", True, None, FEATURES, precision="tf32x3")
    yield Target("sm90", "forward", 80, torch.float16, "1hqk", True)  # a head dim that is padded
    yield Target("sm90", "dkdv", 80, torch.float16, "1hqk", True)
    for row in tables.ROWS:
        if row.most_keys is not None:
            yield Target(row.arch, row.problem.kernel, row.problem.head_dim, torch.bfloat16, "", row.problem.banded, length=row.most_keys)


def bias_shape(target: Target, batch: int, heads: int) -> tuple[int, ...]:
    b, *rest = (
        size if letter != "1" else 1 for letter, size in zip(target.bias, (batch, heads, target.length, target.length), strict=True)
    )
    return (b, 1, *rest)


def operands(target: Target, batch: int = 2, heads: int = HEADS) -> Operands:
    """Meta tensors."""

    def make(*shape: int, dtype: torch.dtype = target.dtype) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    given = set(target.features)
    q = make(batch, target.length, heads, target.head_dim)
    k = make(batch, target.length, heads // 4, target.head_dim) if "groups" in given else q
    bias = make(*bias_shape(target, batch, heads), dtype=target.bias_dtype or target.dtype) if target.bias else None
    return Operands(
        *(q, k, k, bias),
        mask=make(batch, 1, 1, target.length, target.length, dtype=torch.bool) if "mask" in given else None,
        key_lengths=make(batch, dtype=torch.int32) if "lengths" in given else None,
        alibi_slopes=make(1, heads, dtype=torch.float32) if "alibi" in given else None,
        sink=make(heads) if "sink" in given else None,
        dropout_seed=make(2, dtype=torch.int64) if "dropout" in given else None,
        **{name: make(batch, dtype=torch.int32) for name in PLACES if "places" in given},
    )


def spec_for(target: Target, x: Operands) -> AttentionSpec:
    numbers = (50.0 if "softcap" in target.features else 0.0, 0.1 if "dropout" in target.features else 0.0)
    return spec_of(*x[:4], 1, None, 0 if target.causal else None, 0.125, target.precision, *x[4:9], *numbers, False, *x[13:])


def calls(target: Target) -> tuple[Plan, list[Call]]:
    """The launches of a forward and a backward pass on meta tensors, and the plan that they carry out."""
    x = operands(target)
    spec = spec_for(target, x)
    out, lse = torch.empty_like(x.q), x.q.new_empty(x.q.shape[0], HEADS, target.length, dtype=torch.float32)
    facts = KNOWN_DEVICES[target.arch]
    saved = Saved(out, lse, torch.empty_like(lse) if spec.keeps_rest else None)
    forward = plan_forward(spec, facts, "triton")
    if target.head_dim > MAX_HEAD_DIM:
        return forward, forward_calls(forward, spec, x, saved)
    # Where dk and dv have a launch each, the kernel for both still has its row, for packed sequences and what scores go through.
    row = tables.lookup(target.arch, problem_of("dkdv", spec, facts), target.length)
    with override_configs(
        **({"dkdv": row.config} if target.kernel == "dkdv" and row is not None and not target.bias_dtype and not target.features else {})
    ):
        backward = plan_backward(spec, Needs(True, True, True, x.bias is not None), facts, "triton")
    made = forward_calls(forward, spec, x, saved)
    room, grads = Real(x.q), Gradients(x.q, x.k, x.v, x.bias)
    made += backward_calls(room, backward, spec, x, saved, out, None, scratch(room, backward, saved), grads)
    return Plan("triton", forward.steps + backward.steps), made


def declared_spills(target: Target) -> int:
    problem = problem_of(target.kernel, spec_for(target, operands(target, 1)), KNOWN_DEVICES[target.arch])
    row = tables.lookup(target.arch, problem, target.length)
    if target.features:
        return FEATURE_SPILLS if target.precision == "ieee" or target.head_dim == 64 else TF32_FEATURE_SPILLS
    if target.bias_dtype is not None:
        return WIDE_BIAS_SPILLS
    return row.spills if row else DEFAULT_SPILLS


@pytest.mark.parametrize("target", list(targets()), ids=str)
def test_compiles_within_limits(target: Target) -> None:
    plan, made = calls(target)
    call = next(call for step, call in zip(plan.steps, made, strict=True) if step.kernel == target.kernel)
    used = ahead.resources(ahead.compile_for(call, target.arch))
    assert used.shared_memory <= KNOWN_DEVICES[target.arch].shared_memory, f"{call.config}: {used}"
    if MEASURED:  # what the rows declare was read off this version's compiler
        assert used.spills <= declared_spills(target), f"{call.config}: {used}"
    if target.arch == "sm90" and target.precision.startswith("tf32"):
        assert not halves_of_one_register(disassembled(ahead.compile_for(call, target.arch)))


def test_a_descriptor_of_one_register_is_seen() -> None:
    """As ptxas 12.8 wrote it for dq by 64x64 tiles and 8 warps with a soft cap and dropout; and what only looks like it."""
    lost = ["/*20e0*/ IADD3 R32, P3, R0, 0x2, RZ ;", "/*2100*/ FMUL R7, R0, R9 ;", "/*2110*/ IADD3.X R35, R0, 0x40000040, RZ, P3, !PT ;"]
    assert halves_of_one_register("\n".join(lost)) == [lost[-1]]
    assert not halves_of_one_register("\n".join([lost[0], "/*2100*/ IMAD.MOV.U32 R0, RZ, RZ, RZ ;", lost[2]]))
    assert not halves_of_one_register("\n".join([lost[0], lost[2].replace("P3", "P4")]))


def test_every_measured_row_is_compiled() -> None:
    """A row that no target reaches would never be checked."""
    reached = []
    for target in targets():
        problem = problem_of(target.kernel, spec_for(target, operands(target)), KNOWN_DEVICES[target.arch])
        reached.append(tables.lookup(target.arch, problem, target.length))
    assert set(tables.ROWS) <= set(reached)


@pytest.mark.parametrize("kernel", ["forward", "dkdv", "dq", "dbias"])
def test_matrix_units_are_used_on_hopper(kernel: str) -> None:
    """bf16 products run on the warpgroup matrix units; a silent fall to the older path would cost half the speed."""
    target = Target("sm90", kernel, 128, torch.bfloat16, "1hqk", False)
    plan, made = calls(target)
    call = next(call for step, call in zip(plan.steps, made, strict=True) if step.kernel == kernel)
    assert "wgmma.mma_async" in ahead.compile_for(call, "sm90").asm["ptx"]
