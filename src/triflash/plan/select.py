"""Spec and device facts in, plan out: which backend runs, which kernels, with which tiles and grids. Called by ``bound/``.

Pure, cached, no tensors.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from ..errors import UnsupportedError, bad_type, bad_value, unsupported
from ..spec import UNSET, AttentionSpec, BiasSpec, Needs
from . import hopper, overlay, override, packed, tables
from .configs import MAX_FORWARD_HEAD_DIM, MAX_HEAD_DIM, Problem, TileConfig, default_config, misread, padded, with_features, with_wide_bias
from .device import DeviceFacts, triton_problem
from .kernels import few, short
from .steps import Plan, Step, broadcast_rows, ceil_div, dbias_source, sum_steps

__all__ = [
    "BACKENDS",
    "NO_CHOICES",
    "Choices",
    "Plan",
    "Step",
    "backend",
    "config_of",
    "current_choices",
    "plan_backward",
    "plan_forward",
    "products_of",
    "requested_backend",
    "requested_backend_soon",
    "why_not",
]

BACKENDS = ("auto", "tiled", "triton", "hopper", "oracle")
_ENVIRONMENT = "TRIFLASH_BACKEND"
_ENVIRONMENT_BYTES = _ENVIRONMENT.encode()
_lookup = os.environ._data.get if os.name == "posix" and hasattr(os.environ, "_data") else None


class _Requested(threading.local):
    """The innermost ``with backend(...)`` of this thread. A thread-local, not a context variable, because torch.compile can guard it.

    Set in ``__init__``, which runs once a thread: torch.compile would read a class attribute instead of the thread's own value.
    """

    def __init__(self) -> None:
        self.name: str | None = None


_requested = _Requested()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every triflash call of this thread within the block on the named backend.

    Args:
        name: ``"auto"`` (the default: Triton kernels on a GPU, ``tiled`` on a CPU), ``"tiled"`` (PyTorch, any device, also float64),
            ``"triton"`` (portable Triton kernels; on CPU tensors only with ``TRITON_INTERPRET=1``), ``"hopper"`` (16-bit
            inputs on an NVIDIA H100, H200 or H20), or ``"oracle"`` (dense float64 reference, for debugging).

    A named backend never falls back: what it cannot do raises ``triflash.UnsupportedError``. The choice is made in the forward
    pass; the backward pass of that call uses the same one, wherever it runs. The environment variable ``TRIFLASH_BACKEND`` sets the
    choice for calls outside any block.

    Raises:
        ValueError, TypeError: ``name`` is not one of the above.
    """
    check_backend("backend", name)
    before = _requested.name
    _requested.name = name
    try:
        yield
    finally:
        _requested.name = before


def check_backend(argument: str, name: object) -> None:
    """Raise unless ``name`` is a backend's name."""
    if not isinstance(name, str):
        raise bad_type(argument, f"a string, one of {', '.join(BACKENDS)}", type(name).__name__)
    if name not in BACKENDS:
        raise bad_value(argument, f"one of {', '.join(BACKENDS)}", repr(name))


def requested_backend() -> str:
    """What the caller asked for: the innermost ``with backend(...)``, else ``TRIFLASH_BACKEND``, else ``auto``."""
    name = _requested.name
    if name is None:
        name = os.environ.get(_ENVIRONMENT) or "auto"
        check_backend(_ENVIRONMENT, name)
    return name


def requested_backend_soon() -> str:
    """The same, for eager calls, which wait for it: without what ``os.environ`` does to encode a name, and not to be traced."""
    if _requested.name is None and _lookup is not None and not _lookup(_ENVIRONMENT_BYTES):
        return "auto"
    return requested_backend()


def why_not(name: str, spec: AttentionSpec, device: DeviceFacts, backward: bool = False) -> tuple[str, str] | None:
    """None if the backend can compute the spec's forward (or backward) pass on the device, else (what it cannot, what does work)."""
    if name not in ("triton", "hopper"):
        return None
    if problem := triton_problem():
        return f"anything: {problem}", "install triton (Linux) or use backend('tiled')"
    if name == "hopper":
        return hopper.why_not(spec, device)
    if device.arch == "cpu":
        return "CPU tensors", "move them to a GPU, set TRITON_INTERPRET=1 before importing triflash, or use backend('tiled')"
    if device.arch.startswith("sm") and int(device.arch[2:]) < 80:
        return f"{device.arch}", "Triton needs sm80 (Ampere) or later: use backend('tiled')"
    if spec.dtype == "fp64":
        return "float64", "use backend('tiled'), or float32 with torch.set_float32_matmul_precision('highest')"
    if "fp64" in (each.dtype for each in (spec.bias, spec.second) if each is not None):
        return "a float64 bias", "cast the bias to float32, or use backend('tiled')"
    head_dim, limit = max(spec.head_dim, spec.value_dim), MAX_HEAD_DIM if backward else MAX_FORWARD_HEAD_DIM
    if head_dim > limit:
        which = "backward pass" if backward else "forward pass"
        return f"the {which} of head dim {head_dim}", f"its limit is {limit}; backend('tiled') takes any"
    if device.arch == "interpreter" and "bf16" in (spec.dtype, *(each.dtype for each in (spec.bias, spec.second) if each is not None)):
        return "bfloat16 in Triton's interpreter", "the interpreter multiplies bfloat16 wrongly: use float16 or float32 there"
    return None


def _why_not_pass(name: str, spec: AttentionSpec, device: DeviceFacts, needs: Needs | None) -> tuple[str, str] | None:
    """``why_not``, of a forward pass or, with needs, of a backward pass."""
    if reason := why_not(name, spec, device, needs is not None):
        return reason
    return hopper.why_not_backward(spec, needs, device) if name == "hopper" and needs is not None else None


def _choose(requested: str, spec: AttentionSpec, device: DeviceFacts, needs: Needs | None = None) -> str:
    check_backend("backend", requested)
    if requested == "auto":
        if device.arch in ("cpu", "interpreter"):
            return "tiled"
        if hopper.reservation(spec, device, needs is not None) is None and not _why_not_pass("hopper", spec, device, needs):
            return "hopper"
        return "tiled" if why_not("triton", spec, device, needs is not None) else "triton"
    if reason := _why_not_pass(requested, spec, device, needs):
        raise unsupported(reason[0], requested, reason[1])
    return requested


def _or_tiled(requested: str, plan: Callable[[str], Plan]) -> Plan:
    """The plan, or for the automatic choice that of ``tiled`` where no tile of a kernel fits the device after all."""
    try:
        return plan(requested)
    except UnsupportedError:
        if requested != "auto":
            raise
        return plan("tiled")


def products_of(kernel: str, spec: AttentionSpec, device: DeviceFacts) -> str:
    """How a portable kernel multiplies float32 elements: ``"ieee"`` (FMA units), ``"tf32"``, or ``"tf32x3"``, three products for one.

    Where nobody chose: three TF32 products on NVIDIA's tensor cores for kernels and head dims that passed the rule so, else ieee.
    """
    if spec.dtype != "fp32":
        return "ieee"
    if spec.precision != UNSET:
        return spec.precision
    if kernel in few.KERNELS or (spec.queries <= few.MAX_QUERIES and spec.keys >= few.MIN_KEYS and few.runs(spec)):
        return few.products_of(spec)  # the other kernels too: a backward pass must find the scores of its forward pass
    passed = (kernel.removeprefix("packed_"), padded(max(spec.head_dim, spec.value_dim))) in tables.THREE_TF32
    return "tf32x3" if passed and device.arch.startswith("sm") else "ieee"


def problem_of(kernel: str, spec: AttentionSpec, device: DeviceFacts | None = None) -> Problem:
    """The part of a spec by which a kernel's configuration is chosen; device: needed where nobody chose how float32 is multiplied."""
    banded = spec.lo is not None or spec.hi is not None
    head_dim = padded(max(spec.head_dim, spec.value_dim))
    products = "ieee" if spec.dtype != "fp32" else spec.precision if device is None else products_of(kernel, spec, device)
    amd = device is not None and device.arch.startswith("gfx")  # whose tiles for float32 are the same, whatever multiplies them
    by_tensor_cores = products if products in ("tf32", "tf32x3") and not amd else ""
    return Problem(kernel, head_dim, 4 if spec.dtype == "fp32" else 2, spec.bias is not None, banded, by_tensor_cores)


_MULTIPLY = ("forward", "dkdv", "dq", "dbias", "packed_dbias", *few.KERNELS, *short.KERNELS)  # tiles; the others add, copy or make tables


def _with_products(steps: Iterable[Step], spec: AttentionSpec, device: DeviceFacts) -> tuple[Step, ...]:
    """The steps of a plan of the portable kernels, each with the precision of its products."""
    if spec.dtype != "fp32":
        return tuple(steps)
    return tuple(replace(step, precision=products_of(step.kernel, spec, device)) if step.kernel in _MULTIPLY else step for step in steps)


class Choices(NamedTuple):
    """What the caller chose of configurations, as part of the key of plan caches: single kernels by hand, or a tuned file."""

    by_hand: tuple[tuple[str, override.Config], ...]
    tuned: overlay.Overlay | None


NO_CHOICES = Choices((), None)


def current_choices() -> Choices:
    """The choices in force where a pass starts."""
    by_hand, tuned = override.active(), overlay.active()
    return Choices(by_hand, tuned) if by_hand or tuned is not None else NO_CHOICES


def config_of(kernel: str, spec: AttentionSpec, device: DeviceFacts, choices: Choices) -> tuple[TileConfig, str]:
    """A kernel's configuration and where it comes from: by hand, else a tuned file, else a measured row, else the analytic default."""
    chosen = dict(choices.by_hand).get(kernel)
    problem = problem_of(kernel, spec, device)
    if isinstance(chosen, TileConfig):
        if kernel != "delta" and (wrong := misread(problem, chosen)):
            raise bad_value(f"override_configs({kernel}=…)", "tiles of 32 rows and more, or 4 warps", chosen, wrong)
        return chosen, "chosen by hand (override_configs)"
    config, source = _measured_or_default(kernel, problem, spec, device, choices)
    weight = _weight(spec, problem.products) if device.arch.startswith("sm") else 0  # AMD's registers suffice
    lighter = with_features(problem, config, weight)
    if lighter != config and kernel != "delta" and not misread(problem, lighter):
        return lighter, f"{source}, with fewer scores a thread than {config} for what they go through"
    return config, source


def _measured_or_default(
    kernel: str, problem: Problem, spec: AttentionSpec, device: DeviceFacts, choices: Choices
) -> tuple[TileConfig, str]:
    if choices.tuned is not None and (config := choices.tuned.lookup(problem, device)) and not misread(problem, config):
        source = f"tuned, {choices.tuned.path}"
    elif row := tables.lookup(device.arch, problem):
        config, source = row.config, f"measured on {tables.MEASURED_ON.get(device.arch, device.arch)} (row of plan/tables.py)"
    elif kernel == "delta":
        return default_config(problem, device), "fixed: it has no tiles of scores"
    else:
        return default_config(problem, device), "analytic default: the first candidate that fits, not measured"
    # A second bias is one more buffer, as a float32 one is twice as much.
    doubled = spec.second is not None or (spec.bias is not None and spec.bias.dtype == "fp32")
    if doubled and kernel != "delta":
        narrower = with_wide_bias(problem, config, device)
        if narrower != config:
            return narrower, f"{source}, with fewer stages than {config} to hold a float32 bias"
    return config, source


def _weight(spec: AttentionSpec, products: str) -> int:
    """How much scores go through on their way, as :func:`with_features` counts it. products: TF32's, which leave fewer registers."""
    packed_bias = spec.packed is not None and spec.bias is not None  # whose rows and columns end anywhere
    weight = (spec.softcap > 0) + spec.alibi + (spec.mask is not None) + (spec.dropout > 0) + packed_bias + spec.placed
    if products:
        weight += (spec.packed is not None) + (spec.second is not None) + (spec.bias is not None and spec.bias.is_mask)
    return weight


def _config(kernel: str, spec: AttentionSpec, device: DeviceFacts, choices: Choices) -> TileConfig:
    return config_of(kernel, spec, device, choices)[0]


def _order(spec: AttentionSpec) -> str:
    """Which index of the grid varies fastest: tiles that share a bias block run back to back, else those that share keys."""
    bias = spec.bias
    if spec.second is not None and not (bias is not None and bias.varies[3]):  # the larger of two
        bias = spec.second
    if bias is not None:
        outer, inner, head, _, _ = bias.varies
        if spec.batch > 1 and not (outer and inner):
            return "batch"
        if spec.heads > 1 and not head:
            return "head"
    return "tile" if spec.hi is None and spec.lo is None else "heavy"


def plan_forward(spec: AttentionSpec, device: DeviceFacts, requested: str = "auto") -> Plan:
    """The plan of a forward pass. Raises :class:`UnsupportedError` where a backend asked for by name cannot do it."""
    return _or_tiled(requested, lambda name: _plan_forward(spec, device, name, current_choices()))


@functools.lru_cache(maxsize=1024)
def _plan_forward(spec: AttentionSpec, device: DeviceFacts, requested: str, choices: Choices) -> Plan:
    name = _choose(requested, spec, device)
    if name == "hopper":
        return Plan(name, hopper.forward_steps(spec, device, dict(choices.by_hand)))
    if name != "triton":
        return Plan(name, (Step("forward"),))
    if spec.packed is not None:
        steps = packed.forward_steps(spec, lambda kernel: _config(kernel, spec, device, choices))
        return Plan(name, _with_products(steps, spec, device))
    by_hand = dict(choices.by_hand)
    if short.takes(spec, device) if "short_forward" not in by_hand else short.runs(spec):
        return Plan(name, _with_products([short.forward_step(spec, device, by_hand)], spec, device))
    config = _config("forward", spec, device, choices)
    if few.takes(spec, device, config) if "few_forward" not in by_hand else few.runs(spec):
        return Plan(name, _with_products(few.forward_steps(spec, device, by_hand), spec, device))
    programs = ceil_div(spec.queries, config.block_m) * spec.heads * spec.batch
    return Plan(name, _with_products([Step("forward", config, programs, _order(spec))] if programs else [], spec, device))


def plan_backward(spec: AttentionSpec, needs: Needs, device: DeviceFacts, requested: str = "auto") -> Plan:
    """The plan of a backward pass: only the kernels that the gradients asked for need."""
    return _or_tiled(requested, lambda name: _plan_backward(spec, needs, device, name, current_choices()))


@functools.lru_cache(maxsize=1024)
def _plan_backward(spec: AttentionSpec, needs: Needs, device: DeviceFacts, requested: str, choices: Choices) -> Plan:
    name = _choose(requested, spec, device, needs)

    def portable(kernel: str) -> TileConfig:
        return _config(kernel, spec, device, choices)

    if name == "hopper":
        return Plan(name, hopper.backward_steps(spec, needs, device, dict(choices.by_hand), portable))
    if name != "triton":
        return Plan(name, (Step("backward"),))
    if spec.is_empty:
        return Plan(name, ())
    if spec.packed is not None:
        packed_steps = packed.backward_steps(spec, needs, lambda kernel: _config(kernel, spec, device, choices), device.sms)
        return Plan(name, _with_products(packed_steps, spec, device))
    by_hand = dict(choices.by_hand)
    is_short = short.takes_backward(spec, device) if "short_backward" not in by_hand else short.runs(spec, True)
    if is_short and (short_steps := _short_steps(spec, needs, device, choices)):
        return Plan(name, _with_products(short_steps, spec, device))
    batch_heads, batch_key_heads = spec.batch * spec.heads, spec.batch * spec.kv_heads
    steps = []
    sources = _bias_sources(spec, needs)
    passes: tuple[str, ...] = ()  # of which gradients fall out of one kernel for few queries
    if needs.dq or needs.dk or needs.dsink or sources:
        config = _config("delta", spec, device, choices)
        gives = ("dsink",) if needs.dsink else ()
        steps.append(Step("delta", config, ceil_div(spec.queries, config.block_m) * batch_heads, gives=gives))
    if few.takes_backward(spec, device) if "few_backward" not in by_hand else few.runs_backward(spec):
        passes = ("dkdv", "dq")
        wanted = tuple(name for name in ("dq", "dk", "dv") if getattr(needs, name))
        wanted += tuple(grad for grad, (source, _) in sources.items() if source in passes)
        steps += few.backward_steps(spec, device, by_hand, wanted) if wanted else ()
    for kernel, length, own, heads, results in (
        ("dkdv", spec.keys, "block_n", batch_key_heads, (("dk", needs.dk), ("dv", needs.dv))),
        ("dq", spec.queries, "block_m", batch_heads, (("dq", needs.dq),)),
    ):
        if kernel in passes:
            continue
        biases = [grad for grad, (source, _) in sources.items() if source == kernel]
        wanted = (*(grad for grad, need in results if need), *biases)
        if wanted:
            config = _config(kernel, spec, device, choices)
            programs = ceil_div(length, getattr(config, own)) * heads
            splits = broadcast_rows(spec, sources[biases[0]][1]) if kernel == "dkdv" and biases else 1
            parts = few.dq_splits(spec, device, config, programs) if kernel == "dq" else 1
            if parts > 1:
                steps += few.dq_steps(spec, config, programs, parts, wanted)
            else:
                steps.append(Step(kernel, config, programs, _order(spec), splits, wanted))
    for grad, (source, bias) in sources.items():
        if source == "dkdv":
            steps += sum_steps(spec, broadcast_rows(spec, bias), bias, grad)
        elif source == "dbias":
            steps += _dbias_steps(spec, bias, grad, device, _config("dbias", spec, device, choices))
    return Plan(name, _with_products(steps, spec, device))


def _short_steps(spec: AttentionSpec, needs: Needs, device: DeviceFacts, choices: Choices) -> list[Step]:
    """The backward pass by the kernel for short rows, which leaves to ``dbias`` the gradients of such biases as it cannot sum up; empty if
    it has nothing to give.
    """
    own = short.config_of_backward(spec, device, dict(choices.by_hand))
    gives = short.gives_of(spec, needs, own)
    if not gives:
        return []
    steps = list(short.backward_steps(spec, device, own, gives, needs.dsink))
    for name, bias in (("dbias", spec.bias), ("dsecond", spec.second)):
        if getattr(needs, name) and name not in gives:
            assert bias is not None
            steps += _dbias_steps(spec, bias, name, device, _config("dbias", spec, device, choices))
    return steps


def _bias_sources(spec: AttentionSpec, needs: Needs) -> dict[str, tuple[str, BiasSpec]]:
    """Which kernel gives the gradient of which bias. A pass gives one of them; where two fall out of the same, the other has its own."""
    sources: dict[str, tuple[str, BiasSpec]] = {}
    for grad, need, bias in (("dbias", needs.dbias, spec.bias), ("dsecond", needs.dsecond, spec.second)):
        if need:
            assert bias is not None
            source = dbias_source(spec, bias)
            taken = any(other == source for other, _ in sources.values())
            sources[grad] = ("dbias" if taken else source, bias)
    return sources


def _dbias_steps(spec: AttentionSpec, bias: BiasSpec, name: str, device: DeviceFacts, config: TileConfig) -> list[Step]:
    """One program per tile of the bias's own shape; where those are too few to fill the chip, the loop over broadcast dims is split."""
    outer, inner, head, query, key = bias.varies
    tiles_m, tiles_n = ceil_div(spec.queries, config.block_m), ceil_div(spec.keys, config.block_n)
    sizes = ((spec.batch_outer, outer), (spec.batch_inner, inner), (spec.heads, head), (tiles_m, query), (tiles_n, key))
    own = looped = 1
    for size, varies in sizes:
        if varies:
            own *= size
        else:
            looped *= size
    if looped >= 2**31:
        raise unsupported(f"the gradient of a bias broadcast over {looped} tiles", "triton", "sum a larger bias's gradient, or use 'tiled'")
    splits = max(1, min(looped, ceil_div(2 * device.sms, own)))
    return [Step("dbias", config, own * splits, splits=splits, gives=(name,)), *sum_steps(spec, splits, bias, name)]
