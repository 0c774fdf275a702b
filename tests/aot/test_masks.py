"""Where a mask shows whole blocks, Hopper's kernels have a loop that knows nothing of it: compiled for sm90, without a GPU."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

from machine_code import MEASURED, ambiguous_descriptors, compiled_with_log, disassembled, serialised, unfenced_releases

from triflash.explainer import passes_of
from triflash.launch import ahead
from triflash.launch.calls import Call
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.kernels.dkdv import DkdvConfig
from triflash.plan.kernels.dq import DqConfig
from triflash.plan.kernels.forward import ForwardConfig
from triflash.plan.kernels.mask_bounds import CONFIG
from triflash.plan.override import override_configs

BF16, BOOL = torch.bfloat16, torch.bool
LENGTH, BATCH, HEADS = 4096, 4, 16

# Kernel, head dim, mask, configuration, whether dq is computed by itself.
CASES = [
    ("forward", 64, "b11k", ForwardConfig(3, 128, 2, ping_pong=True), False),
    ("forward", 64, "b1qk", ForwardConfig(3, 128, 2, ping_pong=True), False),
    ("forward", 128, "b1qk", ForwardConfig(2, 128, 2, ping_pong=True), False),
    ("dkdv", 64, "b1qk", DkdvConfig(2, 2, 2, kv_stages=2, dq_warpgroup=True, unroll=2), False),
    ("dkdv", 128, "b1qk", DkdvConfig(2, 2), False),
    ("dq", 64, "b1qk", DqConfig(2, 64, 3, 2, 2), True),
    ("dkdv_d256", 256, "b1qk", DkdvConfig(2, 2, d256=True), False),
]


def the_call(kernel: str, dim: int, mask: str, config: object, fixed: bool, whole: bool = True) -> Call:
    """The launch; with an empty ``mask`` that of a pass without one."""
    q = torch.empty(BATCH, LENGTH, HEADS, dim, dtype=BF16, device="meta")
    shape = [{"b": BATCH, "q": LENGTH, "k": LENGTH, "1": 1}[letter] for letter in mask]
    given = torch.empty(shape, dtype=BOOL, device="meta") if mask else None
    name = "dqdkdv" if kernel == "dkdv" else "dkdv" if kernel == "dkdv_d256" else kernel
    with override_configs(mask_bounds=replace(CONFIG, whole=whole), **{name: config}):  # type: ignore[arg-type]
        passes = passes_of(q, q, q, mask=given, grads=("q", "k", "v"), device="h200", deterministic=fixed)[0]
        calls = [call for _, bound in passes for call in bound.calls]
    return next(call for call in calls if call.kernel.fn.__name__ == kernel)


def loops(code: str) -> list[int]:
    """Instructions of the innermost loops that have products and powers."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    jumps = [
        (labels[to[1]], at) for at, text in enumerate(instructions) if (to := re.search(r"\bBRA\b.*\.(L_x_\d+)", text)) and to[1] in labels
    ]
    back = {(first, last) for first, last in jumps if first < last}
    inner = [own for own in back if not any(own != other and own[0] <= other[0] and other[1] <= own[1] for other in back)]
    return [
        last - first + 1
        for first, last in inner
        if all(any(name in text for text in instructions[first:last]) for name in ("HGMMA", "MUFU.EX2"))
    ]


@pytest.mark.parametrize(("kernel", "dim", "mask", "config", "fixed"), CASES, ids=lambda x: str(x).replace(" ", "-"))
def test_a_loop_without_the_mask(kernel: str, dim: int, mask: str, config: object, fixed: bool) -> None:
    call = the_call(kernel, dim, mask, config, fixed)
    assert call.constants["SKIPS"]
    compiled, log = compiled_with_log(call)
    code = disassembled(compiled)
    assert ahead.resources(compiled).shared_memory <= KNOWN_DEVICES["sm90"].shared_memory
    assert not serialised(log) and not ambiguous_descriptors(code)
    if kernel in ("forward", "dq"):
        assert unfenced_releases(code) == 0
    without, always = (
        loops(disassembled(compiled_with_log(the_call(kernel, dim, own, config, fixed, whole))[0]))
        for own, whole in (("", True), (mask, False))
    )
    found = loops(code)
    assert len(found) > len(always) >= len(without)
    if MEASURED:
        assert min(found) <= 1.06 * min(without) and 1.05 * min(found) < min(always)
