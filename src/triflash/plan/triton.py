"""The passes of backend ``triton``: which kernels run for which gradients, and what none of them can do.

Called by ``select.py``; ``cache.py`` asks what of it holds for KV caches. Pure.
"""

from __future__ import annotations

from ..spec import AttentionSpec, BiasSpec, Needs
from . import packed
from .choices import Choices
from .configs import MAX_FORWARD_HEAD_DIM, MAX_HEAD_DIM
from .device import DeviceFacts
from .kernels import few, portable, short
from .kernels.parts import dbias_sum_steps
from .steps import Step, broadcast_rows

__all__ = ["backward_steps", "forward_steps", "why_not", "why_not_dtypes"]


def why_not(spec: AttentionSpec, device: DeviceFacts, backward: bool) -> tuple[str, str] | None:
    """None if the portable kernels can compute the spec's forward (or backward) pass, else (what they cannot, what does work)."""
    if reason := why_not_dtypes(device, spec.dtype, spec.bias, spec.second):
        return reason
    head_dim, limit = max(spec.head_dim, spec.value_dim), MAX_HEAD_DIM if backward else MAX_FORWARD_HEAD_DIM
    if head_dim > limit:
        which = "backward pass" if backward else "forward pass"
        return f"the {which} of head dim {head_dim}", f"its limit is {limit}; backend('tiled') takes any"
    return None


def why_not_dtypes(device: DeviceFacts, dtype: str, *biases: BiasSpec | None) -> tuple[str, str] | None:
    """None if kernels for elements and biases of such dtypes run on the device, else (what cannot, what does work)."""
    of_biases = [each.dtype for each in biases if each is not None]
    if device.arch == "cpu":
        return "CPU tensors", "move them to a GPU, set TRITON_INTERPRET=1 before importing triflash, or use backend('tiled')"
    if device.arch.startswith("sm") and int(device.arch[2:]) < 80:
        return f"{device.arch}", "Triton needs sm80 (Ampere) or later: use backend('tiled')"
    if dtype == "fp64":
        return "float64", "use backend('tiled'), or float32 with torch.set_float32_matmul_precision('highest')"
    if "fp64" in of_biases:
        return "a float64 bias", "cast the bias to float32, or use backend('tiled')"
    if device.arch == "interpreter" and "bf16" in (dtype, *of_biases):
        return "bfloat16 in Triton's interpreter", "the interpreter multiplies bfloat16 wrongly: use float16 or float32 there"
    return None


def forward_steps(spec: AttentionSpec, device: DeviceFacts, choices: Choices) -> tuple[Step, ...]:
    """The kernels of a forward pass: those for short rows or few queries where their rooms say so, else the one that walks blocks."""
    if spec.packed is not None:
        return packed.forward_steps(spec, device, choices)
    by_hand = dict(choices.by_hand)
    if steps := short.forward_steps(spec, device, by_hand):
        return steps
    config, _ = portable.config_of("forward", spec, device, choices)
    return few.forward_steps(spec, device, by_hand, config) or portable.forward_steps(spec, device, config)


def backward_steps(spec: AttentionSpec, needs: Needs, device: DeviceFacts, choices: Choices) -> tuple[Step, ...]:
    """The kernels of a backward pass: only those that the gradients asked for need."""
    if spec.is_empty or spec.no_sequences:
        return ()
    if spec.packed is not None:
        return packed.backward_steps(spec, needs, device, choices)
    by_hand = dict(choices.by_hand)
    if short_steps := short.backward_steps(spec, needs, device, by_hand):
        return (*short_steps, *_left_biases(spec, needs, device, choices, short_steps[0].gives))
    sources = portable.bias_sources(spec, needs)
    steps = []
    if needs.dq or needs.dk or needs.dsink or sources:
        steps.append(portable.delta_step(spec, device, choices, needs.dsink))
    gives = tuple(name for name in ("dq", "dk", "dv") if getattr(needs, name))
    fused = (*gives, *(grad for grad, (source, _) in sources.items() if source != "dbias"))
    steps += few.backward_steps(spec, device, by_hand, fused) or (
        *portable.dkdv_steps(spec, device, choices, gives, sources),
        *portable.dq_steps(spec, device, choices, gives, sources),
    )
    for grad, (source, bias) in sources.items():
        if source == "dkdv":
            steps += dbias_sum_steps(spec, broadcast_rows(spec, bias), bias, grad)
        elif source == "dbias":
            steps += portable.dbias_steps(spec, bias, grad, device, choices)
    return tuple(steps)


def _left_biases(spec: AttentionSpec, needs: Needs, device: DeviceFacts, choices: Choices, given: tuple[str, ...]) -> list[Step]:
    """The kernel ``dbias`` for the gradients of such biases as are needed and not given."""
    steps: list[Step] = []
    for name, bias in (("dbias", spec.bias), ("dsecond", spec.second)):
        if getattr(needs, name) and name not in given:
            assert bias is not None
            steps += portable.dbias_steps(spec, bias, name, device, choices)
    return steps
