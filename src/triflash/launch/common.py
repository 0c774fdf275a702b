"""What launches of the portable kernels share, of dense batches and packed sequences. Called by their files here; needs torch only."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..plan.configs import TileConfig, padded
from ..plan.steps import Step
from ..spec import AttentionSpec, Gradients

__all__ = ["bias_given", "config_of", "constants_of", "is_wide", "tile_constants"]

_WIDE_STRIDE = 2**22  # from this stride on, an offset inside a tile of up to 256 rows and columns might not fit 31 bits


def config_of(step: Step) -> TileConfig:
    """The configuration of a kernel of this family."""
    assert isinstance(step.config, TileConfig), f"{step.kernel} was planned with {step.config} for a tile configuration"
    return step.config


def bias_given(step: Step, grads: Gradients) -> tuple[str, Tensor | None]:
    """The gradient of a bias that a step gives: its name and where it is wanted; ``""`` and None where the step gives none."""
    for name in step.gives:
        if name in ("dbias", "dsecond"):
            return name, getattr(grads, name)
    return "", None


def is_wide(tensors: Iterable[Tensor | None]) -> bool:
    """Whether offsets inside a tile need 64 bits: the stride of a row (of a bias: of a row or a column) is huge."""
    for x in tensors:
        if x is not None:
            strides = x.stride()
            if (strides[1] if len(strides) == 4 else max(strides[3:])) >= _WIDE_STRIDE:
                return True
    return False


@functools.lru_cache(maxsize=4096)
def constants_of(spec: AttentionSpec, config: TileConfig, wide: bool, precision: str) -> dict[str, Any]:
    """The compile-time constants of the kernels that walk blocks of ``block_n`` keys. Cached: add to it with ``|``, never ``|=``."""
    dense = spec.packed is None and not spec.placed
    even = {"EVEN_M": dense and spec.queries % config.block_m == 0, "EVEN_N": dense and spec.keys % config.block_n == 0}
    return tile_constants(spec.head_dim, spec.value_dim, config, wide, precision) | {"BN": config.block_n} | even


def tile_constants(head_dim: int, value_dim: int, config: TileConfig, wide: bool, precision: str) -> dict[str, Any]:
    """The compile-time constants of all portable kernels that have tiles of scores."""
    dims = {"D": head_dim, "DV": value_dim, "BD": padded(head_dim), "BDV": padded(value_dim)}
    return {"BM": config.block_m, **dims, "PRECISION": precision, "WIDE": wide}
