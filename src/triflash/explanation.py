"""What :func:`triflash.explain` returns: plain values about one call, and their text. Called by ``explainer.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .plan.configs import OWNERS_OF_KEYS
from .plan.device import KNOWN_DEVICES, DeviceFacts
from .plan.kernels.dkdv import DkdvConfig
from .plan.select import Step
from .spec import UNSET, AttentionSpec, BiasSpec, Needs
from .spec_cache import CacheSpec

if TYPE_CHECKING:
    from .launch.ahead import Resources

__all__ = ["Copy", "ExplainedStep", "Explanation", "Pass", "human"]

_HOPPER_ORDERS = {
    "head": "batches and heads in groups whose keys and values fit in the L2 cache",
    "batch": "batch entries that share a bias block side by side, in groups whose keys and values fit in the L2 cache",
    "tile": "tiles of one head, the longest first, among those whose keys and values fit in the L2 cache, then the next head's",
}
_KEYS_ORDERS = {order: text.replace("keys and values", "queries and their gradients") for order, text in _HOPPER_ORDERS.items()}
_PAIRS_ORDERS = {
    "head": "all tiles of a batch entry and head by one program",
    "batch": "all tiles of a batch entry and head by one program, batch entries that share a bias block side by side",
}
_LOOPS = {
    "small": "for where every lse is small, as it is of ordinary scores; else it leaves at once, and the next launch works",
    "any": "for where some lse is large; else it leaves at once, and the launch before has worked",
}
_ORDERS = {
    "tile": "tiles of one head back to back",
    "batch": "batch entries that share a bias block back to back",
    "head": "heads that share a bias block back to back",
    "heavy": "longest rows of the triangle first",
}


@dataclass(frozen=True)
class ExplainedStep:
    """One kernel: its step of the plan, where the configuration comes from, and what it takes.

    source: empty if the kernel has no configuration. shared_memory: bytes a program takes at most, by the estimate that planning uses
    (None: no estimate). compiled: registers, spills and shared memory of the compiled kernel, if that was asked for. tensor_maps: how many
    descriptors of tensors in memory, by which TMA loads and stores, travel with a launch.
    """

    step: Step
    source: str = ""
    shared_memory: int | None = None
    compiled: Resources | None = None
    tensor_maps: int = 0


@dataclass(frozen=True)
class Pass:
    """A forward or a backward pass: the backend that runs it, its kernels in order (none for an empty problem), and what it allocates for
    its results, ``(what, bytes)``.
    """

    backend: str
    steps: tuple[ExplainedStep, ...]
    results: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Copy:
    """A tensor that is copied because kernels cannot read (of the output: write) it as it lies in memory.

    ``nbytes`` live as long as a pass, in each of ``passes`` (``"forward"``, ``"backward"``).
    """

    tensor: str
    nbytes: int
    reason: str
    passes: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """What one call would run, and why. ``str()`` of it is a report.

    spec: the problem. needs: the gradients asked for. device: what it is explained for; ``here``: whether that device is in this machine.
    requested: the backend asked for, ``auto`` if none. not_taken: the other backends, each with the reason. backward: None if no gradient
    is needed. changed: why the backward pass has another backend than the forward pass; empty if it has not. memory: scratch beyond
    inputs, outputs and gradients, ``(what, bytes)``, copies not included.
    """

    spec: AttentionSpec | CacheSpec
    needs: Needs
    device: DeviceFacts
    here: bool
    requested: str
    not_taken: tuple[tuple[str, str], ...]
    forward: Pass
    backward: Pass | None
    copies: tuple[Copy, ...]
    memory: tuple[tuple[str, int], ...]
    deterministic: bool
    determinism: str
    changed: str = ""
    notes: tuple[str, ...] = ()

    @property
    def backend(self) -> str:
        """The backend of the forward pass."""
        return self.forward.backend

    @property
    def launches(self) -> list[str]:
        """What ``triflash.record_launches`` reports of a forward and a backward pass."""
        passes = (self.forward,) if self.backward is None else (self.forward, self.backward)
        return [f"{each.backend}: {explained.step}" for each in passes for explained in each.steps]

    def __str__(self) -> str:
        problem = _problem_of_cache(self.spec) if isinstance(self.spec, CacheSpec) else _problem(self.spec)
        lines = [("problem", problem), ("gradients", _gradients(self.needs)), ("device", _device(self.device, self.here))]
        how = "the automatic choice" if self.requested == "auto" else "asked for by name"
        if self.requested == "auto" and self.backend == "hopper":
            how += ", which prefers it where it can run"
        if self.backward is not None and self.changed:
            lines.append(("backend", f"{self.backend} for the forward pass, {how}"))
            lines.append(("", f"{self.backward.backend} for the backward pass: {self.changed}"))
        else:
            lines.append(("backend", f"{self.backend}, {how}"))
        lines += [("not taken" if at == 0 else "", f"{name}: {reason}") for at, (name, reason) in enumerate(self.not_taken)]
        for name, each in (("forward", self.forward), ("backward", self.backward)):
            if each is not None:
                text = [line for explained in each.steps for line in _step(explained, each.backend, self.device)] or [
                    "nothing to run: there are no scores"
                ]
                if each.results:
                    text.append("results  " + ", ".join(f"{what} {human(size)}" for what, size in each.results))
                lines += [(name if at == 0 else "", line) for at, line in enumerate(text)]
        copies = [f"{copy.tensor}, {human(copy.nbytes)} {_where(copy)}: {copy.reason}" for copy in self.copies] or ["none"]
        lines += [("copies" if at == 0 else "", line) for at, line in enumerate(copies)]
        lines.append(("scratch", ", ".join(f"{what} {human(size)}" for what, size in self.memory) or "none"))
        lines.append(("same bits", f"{'yes' if self.deterministic else 'no'}: {self.determinism}"))
        lines += [("note", note) for note in self.notes]
        return "\n".join(f"{label:<10} {text}" for label, text in lines)


def human(nbytes: int) -> str:
    """Bytes as people read them: ``512 B``, ``96.0 KiB``, ``1.5 GiB``."""
    size, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{nbytes} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _problem(spec: AttentionSpec) -> str:
    packed = spec.packed
    batch = f"{spec.batch_outer}x{spec.batch_inner}" if spec.batch_inner > 1 else f"{spec.batch}"
    lengths = f"batch {batch}, {spec.queries} queries, {spec.keys} keys"
    if packed is not None:
        lengths = f"{packed.sequences} packed sequences of {spec.queries} queries and {spec.keys} keys in all"
    dims = f"d {spec.head_dim}" + (f" (values {spec.value_dim})" if spec.value_dim != spec.head_dim else "")
    where = "" if packed is None or packed.bias_layout == "padded" else packed.bias_layout
    patterns = [f"{_pattern(spec, each)[bool(where) :]} {each.dtype}" for each in (spec.bias, spec.second) if each is not None]
    layout = "" if packed is None else f"{packed.bias_layout} "
    bias = f"bias {layout}{' and '.join(patterns)}" if patterns else "no bias"
    band = f"keys from {_bound(spec.lo)} to {_bound(spec.hi)} of a query"
    if spec.lo is None and spec.hi in (None, 0):
        band = "every key visible" if spec.hi is None else "causal"
    if packed is not None and (spec.lo, spec.hi) != (None, None):
        band += f" by the {'last' if packed.bottom_right else 'first'} query and key of each sequence"
    precision = f" ({spec.precision} products)" if spec.dtype == "fp32" and spec.precision != UNSET else ""
    extras = "".join(f", {extra}" for extra in spec.extras if extra != "packed sequences")
    return f"{lengths}, {spec.heads} heads, {dims}, {spec.dtype}{precision}, {bias}{extras}, {band}, scale {spec.scale:.4g}"


def _problem_of_cache(spec: CacheSpec) -> str:
    queries = f"{spec.queries} queries each" if not spec.packed_queries else f"up to {spec.queries} packed queries each"
    where = "" if spec.page_size is None else f" in pages of {spec.page_size}"
    dims = f"d {spec.head_dim}" + (f" (values {spec.value_dim})" if spec.value_dim != spec.head_dim else "")
    cache = f", {spec.cache_dtype} cache" if spec.cache_dtype != spec.dtype else ""
    extras = [f"bias {_shorthand(spec.bias)}" if spec.bias is not None else "no bias"]
    extras += [f"mask {_shorthand(spec.mask)}"] if spec.mask is not None else []
    shown = ("pages of", "a bias", "a mask", "an fp8 cache", "packed queries")
    extras += [extra for extra in spec.extras if not extra.startswith(shown)]
    band = f"keys from {_bound(None if spec.left is None else -spec.left)} to {_bound(spec.right)} of a query"
    if spec.left is None:
        band = "every key visible" if spec.right is None else "causal" if spec.right == 0 else band
    precision = f" ({spec.precision} products)" if spec.dtype == "fp32" and spec.precision != UNSET else ""
    return (
        f"{spec.requests} requests, {queries}, on a KV cache of up to {spec.capacity} keys{where}, {spec.heads} heads, {dims}, "
        f"{spec.dtype}{precision}{cache}, {', '.join(extras)}, {band} (queries stand at the end of their keys), scale {spec.scale:.4g}"
    )


def _shorthand(bias: BiasSpec) -> str:
    request, _, head, query, key = bias.varies
    return "".join(letter if on else "1" for letter, on in zip("bhqk", (request, head, query, key), strict=True)) + f" {bias.dtype}"


def _pattern(spec: AttentionSpec, bias: BiasSpec) -> str:
    """``1hqk`` and so on; the second level of the batch only where there is one."""
    text = str(BiasSpec(bias.dtype, (*bias.varies[:1], spec.batch_inner > 1 and bias.varies[1], *bias.varies[2:])))
    if spec.batch_inner == 1 and bias.varies[0]:
        return text.replace("b1", "b", 1)
    return text


def _bound(offset: int | None) -> str:
    return "the end" if offset is None else f"{offset:+d}"


def _gradients(needs: Needs) -> str:
    return ", ".join(name for name in ("dq", "dk", "dv", "dbias", "dsecond", "dsink") if getattr(needs, name)) or "none"


def _device(device: DeviceFacts, here: bool) -> str:
    name = f" ({device.name})" if device.name else ""
    if device.arch == "cpu":
        facts = ""
    elif device.arch == "interpreter":
        facts = ": Triton's interpreter on the CPU"
    else:
        facts = f": {device.sms} {device.units}, {human(device.shared_memory)} of shared memory a program"
    away = (
        "" if here else ", which is not here: typical facts" if device in KNOWN_DEVICES.values() else ", which is not here: facts as given"
    )
    return f"{device.arch}{name}{facts}{away}"


def _where(copy: Copy) -> str:
    return "a pass" if len(copy.passes) > 1 else f"in the {copy.passes[0]} pass"


def _step(explained: ExplainedStep, backend: str, device: DeviceFacts) -> list[str]:
    step = explained.step
    if step.config is None:
        return [f"{step.kernel} in PyTorch"]
    gives = f", gives {', '.join(step.gives)}" if step.gives else ""
    splits = f", {step.splits} partial sums" if step.splits > 1 else ""
    order = f", {_order(step, backend)}" if step.kernel in ("forward", *OWNERS_OF_KEYS, "dqdkdv", "dq") else ""
    maps = f", {explained.tensor_maps} tensor maps" if explained.tensor_maps else ""
    lines = [f"{step}: {step.programs} programs{maps}{order}{splits}{gives}"]
    lines.append(f"  configuration  {explained.source}")
    if step.loops != "both":
        lines.append(f"  launched       {_LOOPS[step.loops]}")
    if step.precision != "ieee":
        times = "three products for one" if step.precision == "tf32x3" else "one product, of 10-bit mantissas"
        lines.append(f"  float32        by tensor cores: {step.precision}, {times}")
    if explained.compiled is not None:
        used = explained.compiled
        spilled = f"{used.spills} words spilled" if used.spills else "no spills"
        lines.append(f"  compiled       {used.registers} registers a thread, {spilled}, {human(used.shared_memory)} of shared memory")
    elif explained.shared_memory:
        loose = ", a loose bound: compiling tells" if explained.shared_memory > device.shared_memory else ""
        lines.append(f"  shared memory  estimated, at most {human(explained.shared_memory)}{loose}")
    return lines


def _order(step: Step, backend: str) -> str:
    """In which order a kernel's programs, or the tiles that they work through, go by."""
    if backend != "hopper":
        return _ORDERS[step.order] + (f" in sections of {step.l2_group} programs" if step.l2_group else "")
    if isinstance(step.config, DkdvConfig) and step.config.dq_blocks:
        return _PAIRS_ORDERS[step.order]
    return (_KEYS_ORDERS if step.kernel in ("dkdv", "dqdkdv") else _HOPPER_ORDERS)[step.order]
