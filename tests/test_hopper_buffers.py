"""What the plan adds up for shared memory is what Hopper's kernels allocate: buffer by buffer, by the kernels' own source. No GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

import gluon_twin
from cases import Case, build
from expected import spec_of_case
from here import stand_in_only
from triflash.launch import ahead
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.kernels.dbias import DbiasConfig
from triflash.plan.kernels.dkdv import DkdvConfig
from triflash.plan.kernels.dq import DqConfig
from triflash.plan.kernels.forward import ForwardConfig
from triflash.plan.kernels.shared import HopperConfig, kind_of
from triflash.plan.override import override_configs
from triflash.plan.select import plan_backward, plan_forward
from triflash.spec import Needs

pytestmark = stand_in_only
BF16, F32, BOOL = torch.bfloat16, torch.float32, torch.bool
ONE_SM = replace(KNOWN_DEVICES["sm90"], sms=1)  # too few for a gradient of a bias in parts

SMALL = {"B": 2, "M": 70, "N": 90, "H": 2, "grads": "qkv"}
CASES: list[tuple[Case, dict[str, Any]]] = [
    (Case("plain", **SMALL), {}),
    (Case("two dims", **SMALL, D=80, Dv=48), {}),
    (Case("O in Q's buffer", **SMALL), {"forward": ForwardConfig(2, 64, 2, separate_o=False), "dq": DqConfig(1, 32, 2, 1, separate_dq=False)}),
    (Case("own widths", **SMALL, D=160, Dv=80), {"forward": ForwardConfig(2, 64, 2, own_widths=True), "dq": DqConfig(2, 32, 2, 2, own_widths=True)}),
    (Case("own widths, O in Q's buffer", **SMALL, D=192, Dv=128), {"forward": ForwardConfig(2, 128, 2, separate_o=False, own_widths=True)}),
    (Case("own widths, d256", **SMALL, D=192, Dv=128), {"dkdv": DkdvConfig(2, 2, d256=True, own_widths=True, block_m=128, p_stages=1)}),
    (Case("deep", **SMALL), {"forward": ForwardConfig(3, 32, 4, q_stages=2, ping_pong=True), "dqdkdv": DkdvConfig(2, 1, kv_stages=2)}),
    (Case("dq by a warpgroup", **SMALL), {"dqdkdv": DkdvConfig(2, 2, dq_warpgroup=True, unroll=2)}),
    (Case("dq by red.global", **SMALL), {"dqdkdv": DkdvConfig(2, 2, red_dq=True)}),
    (Case("d256", **SMALL, D=136), {}),
    (Case("d256, bias of keys, soft cap", **SMALL | {"grads": "qkvb"}, D=136, bias="1h1k", softcap=30.0), {}),
    (Case("full bias, causal", **SMALL | {"grads": "qkvb"}, bias="bhqk", bias_dtype=F32, causal=True), {"dq": DqConfig(1, 64, 3, 2, 2)}),
    (Case("bias of heads, window", **SMALL | {"grads": "qkvb", "N": 96}, bias="1hqk", lo=-20, hi=5), {"dbias": DbiasConfig(2, 64, 5, 4, 2)}),
    (Case("bias of heads", **SMALL | {"grads": "qkvb"}, bias="1hqk"), {"dbias": DbiasConfig(1, 32, 5, 4, chunk=32)}),
    (Case("bias and mask", **SMALL, bias="1hqk", mask="b11k"), {}),
    (Case("two biases", **SMALL | {"grads": "qkvbt"}, bias="1hqk", second="b11k", second_dtype=F32), {}),
    (Case("two biases, fixed order", **SMALL | {"grads": "qkvbt"}, bias="bhqk", second="111k", hi=9), {"dq": DqConfig(1, 64, 3, 2, 2)}),
    (Case("boolean bias", **SMALL, bias="11qk", bias_dtype=BOOL), {}),
    (Case("bias of queries", **SMALL | {"grads": ""}, bias="1hq1"), {}),
]  # fmt: skip


@pytest.mark.parametrize(("case", "configs"), CASES, ids=lambda x: str(x) if isinstance(x, Case) else "")
def test_the_plan_adds_up_what_kernels_allocate(case: Case, configs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = build(replace(case, dtype=BF16), torch.device("cpu"))
    spec = spec_of_case(case, inputs)
    needs, nothing = Needs(*(letter in case.grads for letter in "qkvbst")), Needs(*[False] * 4)
    operands = [None if x is None else x.detach().to("meta") for x in inputs.operands()[:14]]
    with override_configs(**configs):
        plans = [(plan_forward(spec, ONE_SM, "hopper"), nothing)]
        plans += [(plan_backward(spec, needs, ONE_SM, "hopper"), needs)] if case.grads else []
    band = {name: 3 * (getattr(spec, name) or 0) for name in ("lo", "hi") if getattr(spec, name) is not None}
    larger = replace(spec, batch_outer=5, queries=1000, keys=3001, heads=4 * spec.heads, **band)
    assert kind_of(larger) == kind_of(spec), "what shared memory is counted once for"
    seen = []
    for plan, wanted in plans:
        for step, call in zip(plan.steps, ahead.calls_of(plan, spec, wanted, *operands), strict=True):
            if isinstance(step.config, HopperConfig):
                buffers = [each for each in step.config.buffers(spec, step.gives) if each.nbytes]
                assert step.config.buffers(larger, step.gives) == step.config.buffers(spec, step.gives)
                planned = Counter((each.nbytes, each.itemsize) for each in buffers if each.name != "barriers")
                allocated, barriers = allocations(call, monkeypatch)
                assert allocated == planned, (step, buffers)
                assert [8 * barriers] == [each.nbytes for each in buffers if each.name == "barriers"], step
                seen.append(step.kernel)
    assert set(configs) <= set(seen) and seen[0] == "forward" and len(seen) == (1 if not case.grads else len(set(seen)))


def allocations(call: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[tuple[int, int]], int]:
    """(bytes, bytes an element) of every buffer that a program allocates, and how many barriers: what it does before its partitions."""
    found: Counter[tuple[int, int]] = Counter()
    barriers = 0

    def allocate(dtype: torch.dtype, shape: list[int], layout: object) -> Any:
        nonlocal barriers
        if layout == "barriers":
            barriers += shape[0]
        else:
            found[torch.Size(shape).numel() * dtype.itemsize, dtype.itemsize] += 1
        return gluon_allocate(dtype, shape, layout)

    gluon_allocate = gluon_twin.allocate
    with monkeypatch.context() as patched:
        patched.setattr(gluon_twin, "allocate", allocate)
        patched.setattr(gluon_twin, "warp_specialize", lambda *_: None)
        gluon_twin.run(replace(call, programs=1))
    return found, barriers
