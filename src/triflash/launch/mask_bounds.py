"""The launch of the kernel that looks between which blocks a mask shows anything, and what Hopper's kernels take of its tables.

Called by ``launch/hopper.py`` and ``launch/hopper_backward.py``. Touches no device: tensors may be meta tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.hopper import mask_bounds as kernels
from ..plan.kernels.mask_bounds import entries, mask_of, members
from ..plan.steps import Plan, Step
from ..spec import AttentionSpec, Operands
from .calls import Call, bias_strides
from .common import config_of
from .room import Room

__all__ = ["Bounds", "bounds_call", "bounds_of", "new_bounds"]

Bounds = dict[str, Tensor]  # the tables, (entries, 2), of tiles of "queries" and of "keys"


def new_bounds(room: Room, plan: Plan, spec: AttentionSpec) -> Bounds:
    """Room for the tables that a plan makes; none where it makes none."""
    step = plan.step("mask_bounds")
    names = () if step is None else step.gives
    return {name: room.new(f"what a mask shows to {name}", (*entries(spec, name), 2), torch.int32) for name in names}


def bounds_call(step: Step, spec: AttentionSpec, x: Operands, bounds: Bounds) -> Call:
    """Fills the tables."""
    kind = mask_of(spec)
    mask = x.bias if kind is spec.bias else x.mask
    assert mask is not None
    mask = mask.view(torch.uint8)
    tables = {name: (bounds[name], *bounds[name].shape[3:1:-1], members(spec, name)) for name in step.gives}
    config = config_of(step)
    first = 2 * math.prod(entries(spec, "queries")) if "queries" in step.gives else 0
    strides = bias_strides(mask)
    assert strides is not None and kind is not None
    args = (
        *(mask, strides[:4], bounds[step.gives[0]].shape[1], first),
        *(tables.get("queries"), tables.get("keys"), mask.shape[3], mask.shape[4]),
    )
    constants = {"ROW": not kind.varies[3], "COLUMN": not kind.varies[4], "TILE": config.block_m, "STEP": config.block_n}
    return Call(kernels.mask_bounds, args, constants, config, step.programs)


def bounds_of(bounds: Bounds | None, name: str) -> tuple[Tensor, int, int, int, int] | None:
    """What a kernel takes of the table for its tiles: it, the distances of (outer batch, inner batch, head) in it, 0 where the mask does
    not vary, and the last tile; None: there is none.
    """
    table = None if bounds is None else bounds.get(name)
    if table is None:
        return None
    outer, inner, head = (0 if size == 1 else stride for size, stride in zip(table.shape[:3], table.stride(), strict=False))
    return table, outer, inner, head, table.shape[3] - 1
