"""Why a call runs what it runs: :func:`explain` asks for the very plan that would be carried out, and says what it found.

Starts nothing on a device, works for GPUs that are not here, and does without Triton where that is not installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .arguments import arguments_of
from .copies import copies_of
from .errors import UnsupportedError, bad_type, bad_value
from .explanation import ExplainedStep, Explanation, Pass
from .plan import hopper, hopper_steps
from .plan.configs import TileConfig, shared_memory
from .plan.device import KNOWN_DEVICES, DeviceFacts, facts_of, interpreting, triton_problem, triton_version
from .plan.hopper import HopperConfig
from .plan.override import KERNELS
from .plan.scratch import scratch
from .plan.select import (
    BACKENDS,
    Plan,
    Step,
    backend,
    config_of,
    current_choices,
    hopper_config_of,
    plan_backward,
    plan_forward,
    problem_of,
    why_not,
)
from .spec import AttentionSpec, Needs, Operands, spec_of
from .triton_flash_attention import _arguments

__all__ = ["explain"]

_INPUTS = ("q", "k", "v", "bias", "sink")
_OPTIONS = tuple(name for name, p in inspect.signature(arguments_of).parameters.items() if p.kind == p.KEYWORD_ONLY)
_IN_PYTORCH = ("tiled", "oracle")  # backends that launch no kernels of ours


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    *,
    grads: Iterable[str] | None = None,
    backend: str | None = None,
    device: str | torch.device | DeviceFacts | None = None,
    compile: bool = False,
    **options: Any,
) -> Explanation:
    """What ``flash_attn_func`` or ``attention`` with these arguments would run, and why: ``print(triflash.explain(q, k, v, bias))``.

    It is the plan that the call itself would carry out, under the same ``with triflash.backend(...)``, ``triflash.tuned(...)`` and
    environment; no tensor is read, and nothing is launched.

    Args:
        q, k, v, bias, causal, softmax_scale: as for :func:`triflash.flash_attn_func`, with the same checks. Meta tensors will do.
        options: of :func:`triflash.attention` (``mask=``, ``window=``, ``key_lengths=``, ``softcap=``, ``alibi_slopes=``, ``sink=``,
            ``dropout_p=``, ``layout=``, …). With any of them (``layout="bshd"`` changes nothing else), or more than one batch dim, it is
            that function which is explained, with its grouped heads and its meaning of ``causal``.
        grads: which of ``"q", "k", "v", "bias", "sink"`` a backward pass gives gradients for; default those that require one.
        backend: as in ``with triflash.backend(backend)``.
        device: what to explain it for: a kind of device (``"sm80"``, ``"sm86"``, ``"sm90"``, ``"sm100"``, ``"gfx942"``, ``"cpu"``, …;
            if this machine has one, that one), a ``torch.device`` of this machine, or :class:`~triflash.plan.device.DeviceFacts`.
            Default: where the tensors are; for meta tensors this machine's GPU, if it has one, else its CPU.
        compile: also compile the kernels ahead of time for that device, which takes some seconds and needs no GPU, and report
            their registers, spills and shared memory.

    Returns:
        :class:`~triflash.explanation.Explanation`, whose text is a report.

    Raises:
        ValueError, TypeError: what the function would raise, or a wrong ``grads`` or ``device``, or ``compile`` where Triton cannot
            compile (it is not installed, or ``TRITON_INTERPRET`` is on).
        UnsupportedError: the backend asked for by name cannot do this.
    """
    with _requested(backend):
        x, spec, requested = _call(q, k, v, bias, causal, softmax_scale, options)
    needs = _needs(grads, (q, k, v, bias, options.get("sink")))
    facts, here = _facts(device, q.device)
    plans = [plan_forward(spec, facts, requested)]
    if any(vars(needs).values()):
        plans.append(plan_backward(spec, needs, facts, requested))
    passes = [Pass(plan.backend, tuple(_explained(plan, step, spec, facts) for step in plan.steps)) for plan in plans]
    copies = copies_of(plans, spec, facts, x)
    if compile:
        passes = _with_resources(passes, plans, spec, needs, facts, x)
    deterministic, determinism = _determinism(plans)
    return Explanation(
        spec=spec,
        needs=needs,
        device=facts,
        here=here,
        requested=requested,
        not_taken=tuple(_not_taken(plans, spec, needs, facts, requested)),
        forward=passes[0],
        backward=passes[1] if len(passes) > 1 else None,
        copies=copies,
        memory=tuple(scratch(plans, spec, needs)),
        deterministic=deterministic,
        determinism=determinism,
        changed=_changed(plans, spec, needs, facts),
        notes=tuple(_notes(facts, plans, compile)),
    )


def _call(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None, options: dict[str, Any]
) -> tuple[Operands, AttentionSpec, str]:
    """The call as the operators would get it, and the backend that it asks for."""
    for name in options:
        if name not in _OPTIONS:
            raise bad_type("explain", f"options of attention ({', '.join(_OPTIONS)})", repr(name))
    if options or (isinstance(q, Tensor) and q.dim() > 4):
        call = arguments_of(q, k, v, bias=bias, causal=causal, scale=scale, **options)
        return call.operands, call.spec, call.backend
    canonical, own = _arguments(q, k, v, bias, causal, scale)
    spec = replace(spec_of(q, k, v, canonical, *own[:-1]), deterministic=torch.are_deterministic_algorithms_enabled())
    return Operands(q, k, v, canonical), spec, own[-1]


def _requested(name: str | None) -> Any:
    return nullcontext() if name is None else backend(name)


def _needs(grads: Iterable[str] | None, tensors: Sequence[Tensor | None]) -> Needs:
    if grads is None:
        return Needs(*(x is not None and x.requires_grad for x in tensors))
    names = tuple(grads) if not isinstance(grads, str) else (grads,)
    for name in names:
        if name not in _INPUTS:
            raise bad_value("grads", f"some of {', '.join(_INPUTS)}", repr(name))
    if "bias" in names and (tensors[3] is None or tensors[3].dtype == torch.bool):
        raise bad_value("grads", "no bias", "bias", "there is none" if tensors[3] is None else "a mask has no gradient")
    if "sink" in names and tensors[4] is None:
        raise bad_value("grads", "no sink", "sink", "there is none")
    return Needs(*(name in names for name in _INPUTS))


def _facts(device: str | torch.device | DeviceFacts | None, tensors: torch.device) -> tuple[DeviceFacts, bool]:
    """Facts about the device to explain for, and whether it is in this machine."""
    if isinstance(device, DeviceFacts):
        return device, device in (facts_of(own) for own in _own_devices())
    if isinstance(device, str) and device in KNOWN_DEVICES:
        own = next((facts_of(own) for own in _own_devices() if facts_of(own).arch == device), None)
        return own or KNOWN_DEVICES[device], own is not None or device == "cpu"
    if device is None:
        device = _own_devices()[-1] if tensors.type == "meta" else tensors
    wanted = f"one of {', '.join(KNOWN_DEVICES)}, or a device of this machine"
    if not isinstance(device, (str, torch.device)):
        raise bad_type("device", wanted, type(device).__name__)
    try:
        device = torch.device(device)
    except RuntimeError:
        raise bad_value("device", wanted, repr(device)) from None
    if device.type not in ("cpu", "cuda") and (not torch.accelerator.is_available() or _accelerator() != device.type):
        raise bad_value("device", wanted, repr(str(device)), f"there is no device {device.type!r} here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise bad_value("device", wanted, repr(str(device)), f"PyTorch sees {torch.cuda.device_count()} GPUs here")
    return facts_of(device), True


def _accelerator() -> str | None:
    own = torch.accelerator.current_accelerator()
    return None if own is None else own.type


def _own_devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", 0) for _ in range(min(1, torch.cuda.device_count())))]


def _explained(plan: Plan, step: Step, spec: AttentionSpec, device: DeviceFacts) -> ExplainedStep:
    if step.config is None:
        return ExplainedStep(step)
    source = "fixed: it has no tiles of scores" if step.kernel not in KERNELS else f"the choice of backend {plan.backend}"
    estimate = None
    if plan.backend == "hopper" and step.kernel == "forward":
        assert isinstance(step.config, HopperConfig)
        source = hopper_config_of(spec, device, current_choices())[1]
        estimate = hopper.shared_memory(spec, step.config)
    elif plan.backend == "hopper" and not isinstance(step.config, TileConfig):
        source = hopper_steps.source_of(step, dict(current_choices().by_hand))
        estimate = hopper_steps.shared_memory(spec, step)
    elif plan.backend == "triton" and step.kernel in KERNELS:
        config, found = config_of(step.kernel, spec, device, current_choices())
        source = found if config == step.config else source
        estimate = shared_memory(problem_of(step.kernel, spec), config, device)
    return ExplainedStep(step, source, estimate)


def _not_taken(plans: list[Plan], spec: AttentionSpec, needs: Needs, device: DeviceFacts, requested: str) -> Iterable[tuple[str, str]]:
    taken = {plan.backend for plan in plans}
    for name in BACKENDS:
        if name == "auto" or name in taken:
            continue
        yield name, _cannot(name, spec, needs, device, len(plans) > 1) or _not_preferred(name, plans[0].backend, spec, device, requested)


def _cannot(name: str, spec: AttentionSpec, needs: Needs, device: DeviceFacts, backward: bool) -> str | None:
    """What keeps a backend from running this, or None: asked for by name, it says so itself."""
    if reason := why_not(name, spec, device):
        return f"cannot do {reason[0]}; {reason[1]}"
    try:
        plan_forward(spec, device, name)
        if backward:
            plan_backward(spec, needs, device, name)
    except UnsupportedError as error:
        return str(error)
    return None


def _not_preferred(name: str, chosen: str, spec: AttentionSpec, device: DeviceFacts, requested: str) -> str:
    could = "could run it"
    if requested != "auto":
        return f"{could}, but {chosen} was asked for by name"
    if name == "oracle":
        return f"{could}, for debugging: it holds every score in memory, and is taken only when asked for by name"
    if name == "hopper" and (reservation := hopper.reservation(spec)):
        return f"{could}, but {reservation}"
    kind = "a CPU" if device.arch in ("cpu", "interpreter") else "a GPU"
    return f"{could}, slower here: the automatic choice prefers {chosen} on {kind}"


def _changed(plans: list[Plan], spec: AttentionSpec, needs: Needs, device: DeviceFacts) -> str:
    """Why the backward pass has another backend than the forward pass, or nothing if it has not."""
    if len({plan.backend for plan in plans}) == 1:
        return ""
    first = plans[0].backend
    try:
        plan_backward(spec, needs, device, first)
    except UnsupportedError as error:
        return str(error)
    return "the automatic choice is made for each pass, and prefers it where it can run"


def _determinism(plans: list[Plan]) -> tuple[bool, str]:
    """Every backend sums in an order that follows from sizes and device alone, but for dq where the Hopper kernels add it up in memory."""
    if any(step.kernel == "finish" for plan in plans for step in plan.steps):
        return False, (
            "dq is added up in memory in no fixed order, everything else in one order; torch.use_deterministic_algorithms(True), or "
            "deterministic=True of triflash.attention, has dq computed by a kernel of its own instead"
        )
    reasons = []
    for plan in plans:
        if plan.backend in _IN_PYTORCH:
            reasons.append("PyTorch's matrix products over tiles in a fixed order (on a GPU as far as cuBLAS repeats itself)")
        else:
            reasons.append("no atomics, each element is summed by one program in one order")
        for kernel, sums in (("dkdv_sum", "dk and dv"), ("dbias_sum", "dbias")):
            if last := plan.step(kernel):
                reasons.append(f"the {last.splits} partial sums of {sums} are added in the order of their numbers")
    return True, "; ".join(dict.fromkeys(reasons))


def _notes(device: DeviceFacts, plans: list[Plan], compiled: bool) -> Iterable[str]:
    if problem := triton_problem():
        yield f"{problem}: this is what runs without it, on any device"
    if compiled and all(plan.backend in _IN_PYTORCH for plan in plans):
        yield f"nothing was compiled: only kernels of backends triton and hopper can be, and {plans[0].backend} runs"
    choices = current_choices()
    if choices.tuned is not None and device.arch not in ("cpu", "interpreter"):
        yield f"tuned configurations are read from {choices.tuned.path} (they hold for one GPU, Triton {triton_version() or 'unknown'})"


def _with_resources(
    passes: list[Pass], plans: list[Plan], spec: AttentionSpec, needs: Needs, device: DeviceFacts, x: Operands
) -> list[Pass]:
    """The passes with what the compiler makes of their kernels."""
    if problem := triton_problem():
        raise bad_value("compile", "False", "True", problem)
    if interpreting() or device.arch == "interpreter":
        raise bad_value("compile", "False", "True", "Triton's interpreter does not compile: unset TRITON_INTERPRET, or name a GPU's device")
    from .launch import ahead

    compiled = []
    for each, plan in zip(passes, plans, strict=True):
        if plan.backend in _IN_PYTORCH:
            compiled.append(each)
            continue
        calls = ahead.calls_of(plan, spec, needs, *x)
        used = [ahead.resources(ahead.compile_for(call, device.arch)) for call in calls]
        steps = tuple(replace(step, compiled=found) for step, found in zip(each.steps, used, strict=True))
        compiled.append(Pass(each.backend, steps))
    return compiled
