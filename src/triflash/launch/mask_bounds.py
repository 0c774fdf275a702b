"""The launch of the kernel that looks between which blocks a mask shows anything, and what Hopper's kernels take of its tables.

Called by ``launch/hopper.py`` and ``launch/hopper_backward.py``. Touches no device: tensors may be meta tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.hopper import mask_bounds as kernels
from ..plan.kernels.mask_bounds import MaskBoundsConfig, entries, finds_whole, mask_of, members, programs
from ..plan.steps import Plan, Step
from ..spec import AttentionSpec, Operands
from .calls import Call, bias_strides
from .room import Room

__all__ = ["Bounds", "Table", "bounds_call", "bounds_of", "new_bounds", "skips"]


class Table(NamedTuple):
    """numbers: (outer, inner, head, tile, 4), int32; whole: whether the last two of four are there."""

    numbers: Tensor
    whole: bool


Bounds = dict[str, Table]  # of tiles of "queries" and of "keys"


def new_bounds(room: Room, plan: Plan, spec: AttentionSpec) -> Bounds:
    """Room for the tables that a plan makes; none where it makes none."""
    step = plan.step("mask_bounds")
    if step is None:
        return {}
    assert isinstance(step.config, MaskBoundsConfig)
    return {
        name: Table(room.new(f"what a mask shows to {name}", (*entries(spec, name), 4), torch.int32), finds_whole(spec, name, step.config))
        for name in step.gives
    }


def bounds_call(step: Step, spec: AttentionSpec, x: Operands, bounds: Bounds) -> Call:
    """Fills the tables."""
    kind = mask_of(spec)
    mask = x.bias if kind is spec.bias else x.mask
    assert mask is not None
    mask = mask.view(torch.uint8)
    tables = {name: (each.numbers, *each.numbers.shape[3:1:-1], members(spec, name)) for name, each in bounds.items()}
    config = step.config
    assert isinstance(config, MaskBoundsConfig)
    first = programs(spec, "queries", config) if "queries" in step.gives else 0
    strides = bias_strides(mask)
    assert strides is not None and kind is not None
    args = (
        *(mask, strides[:4], bounds[step.gives[0]].numbers.shape[1], first),
        *(tables.get("queries"), tables.get("keys"), mask.shape[3], mask.shape[4]),
    )
    constants = {
        "ROW": not kind.varies[3],
        "COLUMN": not kind.varies[4],
        "WHOLE_QUERIES": skips(bounds, "queries"),
        "WHOLE_KEYS": skips(bounds, "keys"),
        "TILE": config.block_m,
        "STEP": config.block_n,
    }
    return Call(kernels.mask_bounds, args, constants, config, step.programs)


def bounds_of(bounds: Bounds | None, name: str) -> tuple[Tensor, int, int, int, int] | None:
    """What a kernel takes of the table for its tiles: it, the distances of (outer batch, inner batch, head) in it, 0 where the mask does
    not vary, and the last tile; None: there is none.
    """
    table = None if bounds is None else bounds.get(name)
    if table is None:
        return None
    x = table.numbers
    outer, inner, head = (0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride(), strict=False))
    return x, outer, inner, head, x.shape[3] - 1


def skips(bounds: Bounds | None, name: str) -> bool:
    """Whether that table says where the mask shows everything, so that the kernel visits such blocks without it."""
    table = None if bounds is None else bounds.get(name)
    return table is not None and table.whole
