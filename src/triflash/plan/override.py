"""Choose tile configurations by hand, for tuning and for tests that must reach a tile boundary at a small size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import bad_value
from .configs import TileConfig

KERNELS = ("forward", "delta", "dkdv", "dq", "dbias")

__all__ = ["active", "override_configs"]

# Process-wide on purpose: autograd runs the backward pass of GPU tensors on threads of its own.
_active: dict[str, TileConfig] = {}


@contextmanager
def override_configs(**configs: TileConfig) -> Iterator[None]:
    """Within the block, kernels named as keywords (``forward=…, dkdv=…, dq=…, dbias=…``) run with the given :class:`TileConfig`."""
    global _active
    for name in configs:
        if name not in KERNELS:
            raise bad_value(name, f"one of {', '.join(KERNELS)}", "a configuration for an unknown kernel")
    before = _active
    _active = {**before, **configs}
    try:
        yield
    finally:
        _active = before


def active() -> tuple[tuple[str, TileConfig], ...]:
    """The configurations chosen by hand, as a hashable key for plan caches."""
    return tuple(_active.items()) if _active else ()
