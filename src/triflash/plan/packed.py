"""Which portable kernels run for packed sequences: the tables that come first, as many programs as there can be tiles, and who gives dbias.

Called by ``plan/triton.py`` and, for the gradient of a bias, by ``plan/hopper.py``. The host does not know the sequences, only how many
there are and how many rows in all.
"""

from __future__ import annotations

from dataclasses import replace

from ..spec import AttentionSpec, Needs
from .choices import Choices
from .configs import TileConfig
from .device import DeviceFacts
from .kernels import packed_dbias, portable
from .kernels.packed import packed_of, table_steps, unowned_step
from .steps import Step, ceil_div

__all__ = ["backward_steps", "dbias_steps", "forward_steps"]


def _fitted(config: TileConfig, spec: AttentionSpec, of_keys: bool) -> TileConfig:
    """A configuration with no more rows a tile than most sequences have, as far as the host can tell, but 16 at least."""
    packed = packed_of(spec)
    rows, longest = (spec.keys, packed.longest_k) if of_keys else (spec.queries, packed.longest_q)
    typical = max(ceil_div(rows, max(packed.sequences, 1)), 1)
    if longest is not None:
        typical = min(typical, max(longest, 1))
    field = "block_n" if of_keys else "block_m"
    while getattr(config, field) > 16 and getattr(config, field) >= 2 * typical:
        smaller = getattr(config, field) // 2
        warps = max(config.num_warps // 2, 4) if smaller < 64 else config.num_warps
        config = replace(config, **{field: smaller}, num_warps=warps)
    return config


def forward_steps(spec: AttentionSpec, device: DeviceFacts, choices: Choices) -> tuple[Step, ...]:
    """The kernels of a forward pass."""
    if 0 in (spec.queries, spec.heads):
        return ()
    unowned = unowned_step(spec.queries, ("out", "lse"))
    if spec.no_sequences:
        return (unowned,)
    own = _fitted(portable.config_of("forward", spec, device, choices)[0], spec, of_keys=False)
    step = portable.packed_step("forward", spec, device, own)
    return (*table_steps(spec, own.block_m, None), step, unowned)


def backward_steps(spec: AttentionSpec, needs: Needs, device: DeviceFacts, choices: Choices) -> tuple[Step, ...]:
    """The kernels of a backward pass: only those that the gradients asked for need."""

    def config(kernel: str) -> TileConfig:
        return portable.config_of(kernel, spec, device, choices)[0]

    packed, sources = packed_of(spec), packed_dbias.sources(spec, needs)
    by_keys, by_queries = _fitted(config("dkdv"), spec, of_keys=True), _fitted(config("dq"), spec, of_keys=False)
    shared = config("dbias") if any(source == packed_dbias.KERNEL for source, _ in sources.values()) else None
    # One size of tile for all that own some of the queries, and one for all that own some of the keys.
    if shared is not None and packed.bias_layout == "rows":
        block = min(by_queries.block_m, shared.block_m)
        by_queries, shared = replace(by_queries, block_m=block), replace(shared, block_m=block)
    elif shared is not None and packed.bias_layout == "keys":
        block = min(by_keys.block_n, shared.block_n)
        by_keys, shared = replace(by_keys, block_n=block), replace(shared, block_n=block)
    steps, block_m, block_n = [], None, None
    if needs.dq or needs.dk or needs.dsink or sources:
        steps.append(portable.delta_step(spec, device, choices, needs.dsink))
    steps += packed_dbias.cleared_steps(spec, sources)

    def wanted(kernel: str, *grads: tuple[str, bool]) -> tuple[str, ...]:
        return (*(name for name, need in grads if need), *(name for name, (source, _) in sources.items() if source == kernel))

    if gives := wanted("dkdv", ("dk", needs.dk), ("dv", needs.dv)):
        block_n = by_keys.block_n
        steps.append(portable.packed_step("dkdv", spec, device, by_keys, of_keys=True, gives=gives))
        if given := tuple(name for name in gives if name in ("dk", "dv")):
            steps.append(unowned_step(spec.keys, given))
    if gives := wanted("dq", ("dq", needs.dq)):
        block_m = by_queries.block_m
        steps.append(portable.packed_step("dq", spec, device, by_queries, gives=gives))
        if needs.dq:
            steps.append(unowned_step(spec.queries, ("dq",)))
    if shared is not None:
        if packed.bias_layout == "rows":
            block_m = shared.block_m
        elif packed.bias_layout == "keys":
            block_n = shared.block_n
        steps += packed_dbias.steps(spec, sources, shared, device.sms, portable.products_of("dbias", spec, device))
    return (*table_steps(spec, block_m, block_n), *steps)


def dbias_steps(spec: AttentionSpec, device: DeviceFacts, choices: Choices) -> tuple[Step, ...]:
    """The gradient of a bias, with tables of its own, beside kernels of Hopper."""
    config, _ = portable.config_of("dbias", spec, device, choices)
    return packed_dbias.alone_steps(spec, config, device.sms, portable.products_of("dbias", spec, device))
