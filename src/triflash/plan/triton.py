"""The passes of backend ``triton``: which kernels run for which gradients. Called by ``select.py``. Pure."""

from __future__ import annotations

from ..spec import AttentionSpec, Needs
from . import packed
from .choices import Choices
from .device import DeviceFacts
from .kernels import few, portable, short
from .steps import Step, broadcast_rows, sum_steps

__all__ = ["backward_steps", "forward_steps"]


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
    if spec.is_empty:
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
            steps += sum_steps(spec, broadcast_rows(spec, bias), bias, grad)
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
