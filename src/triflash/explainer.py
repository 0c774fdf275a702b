"""Why a call runs what it runs: :func:`explain` asks for the very plan that would be carried out, and says what it found.

Starts nothing on a device, works for GPUs that are not here, and does without Triton where that is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .arguments import ATTENTION, Given, Options, VarlenGiven, VarlenOptions, two_biases
from .arguments_cache import CacheGiven, CacheOptions, checked_cache, refuse_gradients
from .attention import attention
from .bound.call import BoundCall
from .bound.passes import BoundPass
from .checks import check_bool
from .door import bind, bind_sequences
from .door_cache import bind_call
from .errors import UnsupportedError, bad_type, bad_value
from .explanation import Copy, ExplainedStep, Explanation, Pass
from .hints import not_ours
from .kvcache import attention_with_kvcache
from .nested import is_nested, packed
from .plan import hopper
from .plan.cache import split_words, why_not_cache
from .plan.configs import TileConfig, shared_memory
from .plan.device import KNOWN_DEVICES, NAMED_DEVICES, DeviceFacts, facts_of, interpreting, triton_problem, triton_version
from .plan.kernels import few
from .plan.kernels.few import FewConfig
from .plan.kernels.portable import config_of, problem_of
from .plan.kernels.shared import HopperConfig
from .plan.override import KERNELS
from .plan.select import (
    BACKENDS,
    Plan,
    Step,
    backend,
    current_choices,
    plan_backward,
    plan_forward,
    why_not,
)
from .plan.steps import IN_PYTORCH
from .spec import AttentionSpec, Needs
from .spec_cache import CacheSpec
from .varlen import attention_varlen, near

__all__ = ["explain", "passes_of"]

_INPUTS = ("q", "k", "v", "bias", "sink")
# Of each function that is explained: what may follow v by position, and its other arguments.
_BY_POSITION = {
    attention: ("bias",),
    attention_varlen: ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
    attention_with_kvcache: (),
}
_NAMES = {
    attention: (
        *(name for name in Given._fields[3:] if name not in ("second_bias", "diagonals")),
        *(name for name in Options._fields if name != "backend"),
        "return_lse",
    ),
    attention_varlen: (
        *(name for name in VarlenGiven._fields[3:] if name != "second_bias"),
        *(name for name in VarlenOptions._fields if name != "backend"),
        "return_lse",
    ),
    attention_with_kvcache: (*CacheGiven._fields[3:], *(name for name in CacheOptions._fields if name != "backend"), "return_lse"),
}


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *more: Any,
    of: Callable[..., Any] = attention,
    grads: Iterable[str] | None = None,
    backend: str | None = None,
    device: str | torch.device | DeviceFacts | None = None,
    compile: bool = False,
    **options: Any,
) -> Explanation:
    """What ``attention`` with these arguments would run, and why: ``print(triflash.explain(q, k, v, bias, causal=True))``.

    It is the call's own bound pass, put into words: the same plan, allocations, copies and launches, under the same
    ``with triflash.backend(...)``, ``triflash.tuned(...)`` and environment. No tensor is read, and nothing is launched.

    Args:
        q, k, v: as for ``triflash.attention``, with the same checks; jagged ones, too; or q and both caches. Meta tensors will do.
        more: the bias; or, of ``attention_varlen``, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k. By name they go as well.
        of: the function: ``triflash.attention``; ``triflash.attention_varlen``, whose offsets are not read either; or
            ``triflash.attention_with_kvcache``, nor are its lengths and tables.
        options: its other keywords, of the same meaning (``causal=``, ``mask=``, ``window=``, ``scale=``, …). The
            seed's functions align causal to the top left: that is ``causal="top_left"``.
        grads: which of ``"q", "k", "v", "bias", "sink"`` a backward pass gives gradients for; ``"bias"`` stands for both of two. Default:
            those that require one.
        backend: as in ``with triflash.backend(backend)``.
        device: what to explain it for: a kind of device (``"sm80"``, ``"sm90"``, ``"gfx942"``, ``"cpu"``, …; if this machine has one, that
            one), a product (``"a100"``, ``"h100"``, ``"h200"``, ``"rtx4090"``, ``"mi300x"``, …), a ``torch.device`` of this machine, or
            ``DeviceFacts``. Default: where the tensors are; for meta tensors this machine's GPU, if it has one,
            else its CPU.
        compile: also compile the kernels ahead of time for that device, which takes some seconds and needs no GPU, and report
            their registers, spills and shared memory.

    Returns:
        ``Explanation``, whose text is a report.

    Raises:
        ValueError, TypeError: what the function would raise, or a wrong ``grads`` or ``device``, or ``compile`` where Triton cannot
            compile (it is not installed, or ``TRITON_INTERPRET`` is on).
        UnsupportedError: the backend asked for by name cannot do this.
    """
    named = _named(of, more, options)
    if of is attention_with_kvcache:
        return _of_cache(q, k, v, named, grads, backend, device, compile)
    call, needs, bound, facts, here = _bound_passes(of, q, k, v, named, grads, backend, device)
    spec, requested = call.spec, call.backend
    plans = [each.plan for each in bound]
    passes = [_pass(each, spec, facts) for each in bound]
    if compile:
        passes = _with_resources(passes, bound, facts)
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
        copies=_copies(bound),
        memory=tuple(_memory(bound)),
        deterministic=deterministic,
        determinism=determinism,
        changed=_changed(plans, spec, needs, facts),
        notes=tuple(_notes(facts, plans, spec, compile)),
    )


def passes_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    of: Callable[..., Any] = attention,
    grads: Iterable[str] | None = None,
    backend: str | None = None,
    device: str | torch.device | DeviceFacts | None = None,
    **options: Any,
) -> tuple[list[tuple[str, BoundPass]], DeviceFacts]:
    """The passes that a call with :func:`explain`'s arguments would carry out, by name, each with its launches on meta tensors, and the
    device that they are for. Raises what ``explain`` raises.
    """
    named = _named(of, (), options)
    if of is attention_with_kvcache:
        call, facts, _ = _bound_cache(q, k, v, named, grads, backend, device)[:3]
        return [("forward", call.bound)], facts
    _, _, bound, facts, _ = _bound_passes(of, q, k, v, named, grads, backend, device)
    return list(zip(("forward", "backward"), bound, strict=False)), facts


def _bound_passes(
    of: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    named: dict[str, Any],
    grads: Iterable[str] | None,
    backend: str | None,
    device: str | torch.device | DeviceFacts | None,
) -> tuple[BoundCall, Needs, list[BoundPass], DeviceFacts, bool]:
    """The call; the gradients wanted; its forward and, if any are, its backward pass; the device, and whether it is here."""
    with _requested(backend):
        facts, here = _facts(device, q.device if isinstance(q, Tensor) else torch.device("meta"))
        call, given = _bound(of, q, k, v, named, facts)
    needs = _needs(grads, (given.q, given.k, given.v, given.bias, given.sink, given.second_bias))
    wants_gradients = any(vars(needs).values())
    bound = [call.forward if named.get("return_lse") else call.kept if wants_gradients else call.alone]
    if wants_gradients:
        bound.append(call.describe_backward(needs))
    return call, needs, bound, facts, here


def _named(of: Callable[..., Any], more: Sequence[Any], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments behind v by their names."""
    if of not in _NAMES:
        names = ", ".join(f"triflash.{each.__name__}" for each in _NAMES)
        raise bad_value("of", f"one of {names}", getattr(of, "__name__", repr(of)))
    name = of.__name__
    places = _BY_POSITION[of]
    if len(more) > len(places):
        raise bad_type("explain", f"q, k, v, {', '.join(places)} by position", f"{3 + len(more)} arguments", f"name the others of {name}")
    for key, value in options.items():
        if key not in _NAMES[of]:
            raise not_ours(name, _NAMES[of], (), {key: value})
        if key in places[: len(more)]:
            raise bad_type(key, f"one {key}", "two, by position and by name")
    check_bool("return_lse", options.get("return_lse", False))
    found = dict(zip(places, more, strict=False)) | options
    found["bias"], found["second_bias"] = two_biases(found.get("bias"))
    if of is attention and isinstance(found.get("diagonal"), Tensor):
        found["diagonals"] = found.pop("diagonal")
    return found


def _bound(
    of: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, named: dict[str, Any], facts: DeviceFacts
) -> tuple[BoundCall, Given | VarlenGiven]:
    """The call, and its tensors."""
    if of is attention_varlen:
        offsets = named.get("cu_seqlens_q")
        keys = named.get("cu_seqlens_k")
        pair = [near(q, name, x) for name, x in (("cu_seqlens_q", offsets), ("cu_seqlens_k", offsets if keys is None else keys))]  # type: ignore[arg-type]
        tensors = {name: named.get(name) for name in VarlenGiven._fields[3:]} | dict(
            zip(("cu_seqlens_q", "cu_seqlens_k"), pair, strict=True)
        )
        rows = VarlenGiven(q, k, v, **tensors)  # type: ignore[arg-type]
        return bind_sequences(rows, VarlenOptions(**{name: named[name] for name in VarlenOptions._fields if name in named}), facts), rows
    given = Given(q, k, v, **{name: named[name] for name in Given._fields if name in named})
    options = Options(**{name: named[name] for name in Options._fields if name in named})
    if is_nested(given):
        rows, more = packed(given, options)
        return bind_sequences(rows, more, facts), rows
    return bind(ATTENTION, given, options, facts), given


def _of_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    named: dict[str, Any],
    grads: Iterable[str] | None,
    name: str | None,
    device: str | torch.device | DeviceFacts | None,
    compiled: bool,
) -> Explanation:
    """Of a call on a KV cache."""
    call, facts, here, settled = _bound_cache(q, k, v, named, grads, name, device)
    bound, spec = call.bound, call.spec
    passes = [_pass(bound, spec, facts)]
    if compiled:
        passes = _with_resources(passes, [bound], facts)
    deterministic, determinism = _determinism([call.plan])
    return Explanation(
        spec=spec,
        needs=Needs(False, False, False, False),
        device=facts,
        here=here,
        requested=settled.backend,
        not_taken=tuple(_not_taken_by_cache(call.plan.backend, spec, facts, settled.backend)),
        forward=passes[0],
        backward=None,
        copies=_copies([bound]),
        memory=tuple(_memory([bound])),
        deterministic=deterministic,
        determinism=determinism,
        notes=(split_words(call.plan, spec, facts), *_notes(facts, [call.plan], spec, compiled)),
    )


def _bound_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    named: dict[str, Any],
    grads: Iterable[str] | None,
    name: str | None,
    device: str | torch.device | DeviceFacts | None,
) -> tuple[Any, DeviceFacts, bool, Any]:
    """The call on a KV cache, the device, whether it is here, and what was settled."""
    tensors: dict[str, Any] = {field: named.get(field) for field in CacheGiven._fields[3:]}
    for offsets in ("cu_seqlens_q", "cu_seqlens_new"):
        if tensors[offsets] is not None:
            tensors[offsets] = near(q, offsets, tensors[offsets])
    given = CacheGiven(q, k, v, **tensors)
    options = CacheOptions(**{field: named[field] for field in CacheOptions._fields if field in named})
    if grads is not None and tuple(grads):
        raise UnsupportedError("gradients of attention_with_kvcache: there are none; explain triflash.attention, which has them")
    refuse_gradients(given)
    with _requested(name):
        facts, here = _facts(device, q.device if isinstance(q, Tensor) else torch.device("meta"))
        settled = checked_cache(given, options)
        call = bind_call(given, (*settled.numbers, settled.backend), facts, alone=not named.get("return_lse"))
    return call, facts, here, settled


def _not_taken_by_cache(taken: str, spec: CacheSpec, device: DeviceFacts, requested: str) -> Iterable[tuple[str, str]]:
    for name in BACKENDS:
        if name not in ("auto", taken):
            reason = why_not_cache(name, spec, device)
            yield name, f"cannot do {reason[0]}; {reason[1]}" if reason else _not_preferred(name, taken, spec, device, requested)


def _pass(bound: BoundPass, spec: AttentionSpec | CacheSpec, device: DeviceFacts) -> Pass:
    calls = bound.calls or ()
    tensor_maps = [sum(type(x).__name__ == "TensorDescriptor" for x in call.args) for call in calls] or [0] * len(bound.plan.steps)
    steps = tuple(
        replace(_explained(bound.plan, step, spec, device), tensor_maps=count)
        for step, count in zip(bound.plan.steps, tensor_maps, strict=True)
    )
    results = tuple((each.name, each.nbytes) for each in bound.room.allocations if each.use == "result")
    return Pass(bound.plan.backend, steps, results)


def _copies(bound: Sequence[BoundPass]) -> tuple[Copy, ...]:
    """The copies of both passes; one that both make is named once."""
    passes: dict[tuple[str, int, str], list[str]] = {}
    for name, each in zip(("forward", "backward"), bound, strict=False):
        for copy in each.room.copies:
            passes.setdefault((copy.name, copy.nbytes, copy.reason), []).append(name)
    return tuple(Copy(*found, tuple(names)) for found, names in passes.items())


def _memory(bound: Sequence[BoundPass]) -> Iterable[tuple[str, int]]:
    """(what, bytes) beyond inputs, outputs, gradients and copies."""
    for each in bound[0].room.allocations:
        if each.use == "result" and each.name != "out":
            until = " (until the backward pass)" if each.name.startswith("lse") and len(bound) > 1 else ""
            yield each.name + until, each.nbytes
    for each_pass in bound:
        for each in each_pass.room.allocations:
            if each.use in ("scratch", "pytorch"):
                yield each.name, each.nbytes
        for sink in each_pass.room.sinks:
            yield "probabilities of the sink", math.prod(sink.lse.shape) * sink.lse.dtype.itemsize


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
    return replace(Needs(*(name in names for name in _INPUTS)), dsecond="bias" in names and tensors[5] is not None)


def _facts(device: str | torch.device | DeviceFacts | None, tensors: torch.device) -> tuple[DeviceFacts, bool]:
    """Facts about the device to explain for, and whether it is in this machine."""
    if isinstance(device, DeviceFacts):
        return device, device in (facts_of(own) for own in _own_devices())
    if isinstance(device, str) and (typical := KNOWN_DEVICES.get(device) or NAMED_DEVICES.get(device.lower())):
        own = next((facts_of(own) for own in _own_devices() if facts_of(own).arch == typical.arch), None)
        return own or typical, own is not None or device == "cpu"
    if device is None:
        device = _own_devices()[-1] if tensors.type == "meta" else tensors
    wanted = f"one of {', '.join((*KNOWN_DEVICES, *NAMED_DEVICES))}, or a device of this machine"
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


_SAME_TILES = {"packed_dbias": "dbias"}  # kernels that have the configuration of another


def _explained(plan: Plan, step: Step, spec: AttentionSpec | CacheSpec, device: DeviceFacts) -> ExplainedStep:
    if step.config is None:
        return ExplainedStep(step)
    portable = plan.backend == "triton" or step.kernel in _SAME_TILES  # of which hopper's plans have some
    fixed = step.kernel not in KERNELS or not (portable or isinstance(step.config, HopperConfig))
    source = "fixed: it has no tiles of scores" if fixed else f"the choice of backend {plan.backend}"
    estimate = None
    if isinstance(spec, CacheSpec):
        return ExplainedStep(step, "fixed: it has no tiles of scores" if step.kernel in ("append", "combine") else source)
    if step.config.SOURCE:  # a rule of the kernel's room
        chosen = dict(current_choices().by_hand).get(step.kernel) == step.config
        source = "chosen by hand (override_configs)" if chosen else step.config.SOURCE
        if isinstance(step.config, FewConfig):
            source += f"; {few.why(spec, step, device)}"
        elif isinstance(step.config, HopperConfig):
            estimate = hopper.shared_memory(spec, step)
    elif portable and (kernel := _SAME_TILES.get(step.kernel, step.kernel)) in KERNELS:
        assert isinstance(step.config, TileConfig)
        config, found = config_of(kernel, spec, device, current_choices())
        if spec.packed is not None and config != step.config:
            found, config = f"{found}, less rows for what sequences are long on the average", step.config
        source = found if config == step.config else source
        estimate = shared_memory(problem_of(kernel, spec, device), config, device)
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


def _not_preferred(name: str, chosen: str, spec: AttentionSpec | CacheSpec, device: DeviceFacts, requested: str) -> str:
    could = "could run it"
    if requested != "auto":
        return f"{could}, but {chosen} was asked for by name"
    if name == "oracle":
        return f"{could}, for debugging: it holds every score in memory, and is taken only when asked for by name"
    if name == "hopper" and isinstance(spec, AttentionSpec) and (reservation := hopper.reservation(spec, device)):
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
    if any(step.kernel == "postprocess" for plan in plans for step in plan.steps):
        return False, (
            "dq is added up in memory in no fixed order, everything else in one order; torch.use_deterministic_algorithms(True), or "
            "deterministic=True of triflash.attention, has dq computed by a kernel of its own instead"
        )
    reasons = []
    for plan in plans:
        if plan.backend in IN_PYTORCH:
            reasons.append("PyTorch's matrix products over tiles in a fixed order (on a GPU as far as cuBLAS repeats itself)")
        else:
            reasons.append("no atomics, each element is summed by one program in one order")
        for kernel, sums in (("dkdv_sum", "dk and dv"), ("dbias_sum", "dbias")):
            if last := plan.step(kernel):
                reasons.append(f"the {last.splits} partial sums of {sums} are added in the order of their numbers")
    return True, "; ".join(dict.fromkeys(reasons))


def _notes(device: DeviceFacts, plans: list[Plan], spec: AttentionSpec | CacheSpec, compiled: bool) -> Iterable[str]:
    if problem := triton_problem():
        yield f"{problem}: this is what runs without it, on any device"
    if compiled and all(plan.backend in IN_PYTORCH for plan in plans):
        yield f"nothing was compiled: only kernels of backends triton and hopper can be, and {plans[0].backend} runs"
    if plans[0].backend == "triton" and isinstance(spec, AttentionSpec) and spec.packed is not None and plans[0].steps:
        bound = "programs are as many as there can be tiles: the host does not know how long sequences are"
        yield f"{bound}; those that are left over end at once"
    if plans[0].backend == "hopper" and isinstance(spec, AttentionSpec) and spec.packed is not None:
        listed = "tiles are listed on the device, the longest first, and dealt out to a fixed number of programs"
        yield f"{listed}: the host does not know how long sequences are"
    choices = current_choices()
    if choices.tuned is not None and device.arch not in ("cpu", "interpreter"):
        yield f"tuned configurations are read from {choices.tuned.path} (they hold for one GPU, Triton {triton_version() or 'unknown'})"


def _with_resources(passes: list[Pass], bound: Sequence[BoundPass], device: DeviceFacts) -> list[Pass]:
    """The passes with what the compiler makes of their kernels."""
    if problem := triton_problem():
        raise bad_value("compile", "False", "True", problem)
    if interpreting() or device.arch == "interpreter":
        raise bad_value("compile", "False", "True", "Triton's interpreter does not compile: unset TRITON_INTERPRET, or name a GPU's device")
    compiled = []
    for each, own in zip(passes, bound, strict=True):
        if own.calls is None:
            compiled.append(each)
            continue
        from .launch import ahead

        used = [ahead.resources(ahead.compile_for(call, device.arch)) for call in own.calls]
        steps = tuple(replace(step, compiled=found) for step, found in zip(each.steps, used, strict=True))
        compiled.append(replace(each, steps=steps))
    return compiled
