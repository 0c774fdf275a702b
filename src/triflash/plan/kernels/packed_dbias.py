"""The kernel for the gradient of a bias of packed sequences (``kernels/triton/packed.py``): when it gives it, its grid and its splits.

Called by ``plan/packed.py``. Pure. Its configuration is that of ``dbias`` for dense batches (``portable.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...errors import unsupported
from ...spec import AttentionSpec, BiasSpec, Needs
from ..configs import TileConfig
from ..steps import Step, ceil_div
from .packed import cleared_step, most_tiles, packed_of, table_steps
from .parts import dbias_sum_steps

__all__ = ["KERNEL", "alone_steps", "cleared_steps", "sources", "steps"]

KERNEL = "packed_dbias"
Sources = Mapping[str, tuple[str, BiasSpec]]


def sources(spec: AttentionSpec, needs: Needs) -> dict[str, tuple[str, BiasSpec]]:
    """By name of a gradient that is needed: which kernel gives it, and the bias. A pass gives one of them; the other has this kernel."""
    found: dict[str, tuple[str, BiasSpec]] = {}
    for name, need, bias in (("dbias", needs.dbias, spec.bias), ("dsecond", needs.dsecond, spec.second)):
        if need:
            assert bias is not None
            source = _source(spec, bias)
            found[name] = (KERNEL if any(other == source for other, _ in found.values()) else source, bias)
    return found


def _source(spec: AttentionSpec, bias: BiasSpec) -> str:
    """Which kernel gives the gradient of a bias: a pass that meets each of its elements once, or this one, as of dense batches."""
    sequence, _, head, query, key = bias.varies
    if not (sequence and head and key):
        return KERNEL
    return "dq" if query else "dkdv" if spec.groups == 1 else KERNEL


def _sizes(spec: AttentionSpec, name: str) -> tuple[int, int]:
    """Queries and keys that a bias has for each sequence."""
    return packed_of(spec).second_sizes if name == "dsecond" else packed_of(spec).bias_sizes


def _elements(spec: AttentionSpec, name: str, bias: BiasSpec) -> int:
    """Of a bias, in the shape given."""
    packed, (bias_rows, bias_cols) = packed_of(spec), _sizes(spec, name)
    heads = spec.heads if bias.varies[2] else 1
    if packed.bias_layout == "keys":
        return heads * spec.keys
    if packed.bias_layout == "rows":
        return heads * spec.queries * bias_cols
    return heads * (packed.sequences if bias.varies[0] else 1) * bias_rows * bias_cols


def cleared_steps(spec: AttentionSpec, found: Sources) -> list[Step]:
    """Zeros in every gradient of a bias, whoever gives it."""
    return [cleared_step(_elements(spec, name, bias), name) for name, (_, bias) in found.items()]


def alone_steps(spec: AttentionSpec, config: TileConfig, sms: int, precision: str) -> tuple[Step, ...]:
    """The gradient of a bias by this kernel, with tables of its own, whichever kernels give those of q, k and v."""
    assert spec.bias is not None
    layout = packed_of(spec).bias_layout
    extents, *tiles = table_steps(spec, config.block_m if layout == "rows" else None, config.block_n if layout == "keys" else None)
    found = {"dbias": (KERNEL, spec.bias)}
    return replace(extents, gives=("dbias",)), *tiles, *cleared_steps(spec, found), *steps(spec, found, config, sms, precision)


def steps(spec: AttentionSpec, found: Sources, config: TileConfig, sms: int, precision: str) -> list[Step]:
    """This kernel for each gradient that it gives, and the sums of its parts."""
    own = [_steps(spec, bias, name, config, sms, precision) for name, (source, bias) in found.items() if source == KERNEL]
    return [step for each in own for step in each]


def _steps(spec: AttentionSpec, bias: BiasSpec, name: str, config: TileConfig, sms: int, precision: str) -> list[Step]:
    """One program for each tile of the bias's own shape; where all sequences share it and tiles are few, the sequences are split."""
    packed, (bias_rows, bias_cols) = packed_of(spec), _sizes(spec, name)
    sequence, _, head, query, key = bias.varies
    programs = spec.heads if head else 1
    if packed.bias_layout == "rows":
        programs *= most_tiles(spec.queries, packed.sequences, config.block_m) * (ceil_div(bias_cols, config.block_n) if key else 1)
    elif packed.bias_layout == "keys":
        programs *= most_tiles(spec.keys, packed.sequences, config.block_n)
    else:
        programs *= packed.sequences if sequence else 1
        programs *= (ceil_div(bias_rows, config.block_m) if query else 1) * (ceil_div(bias_cols, config.block_n) if key else 1)
    splits = 1 if sequence else max(1, min(packed.sequences, ceil_div(2 * sms, max(programs, 1))))
    if programs * splits >= 2**31:
        raise unsupported(f"the gradient of a bias of {programs} tiles", "triton", "use 'tiled'")
    own = Step(KERNEL, config, programs * splits, splits=splits, gives=(name,), precision=precision)
    return [own, *dbias_sum_steps(spec, splits, bias, name, _elements(spec, name, bias))]
