"""Choose tile configurations by hand, for tuning and for tests that must reach a tile boundary at a small size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import bad_value
from .configs import TileConfig
from .hopper import HopperConfig
from .hopper_backward import KeysConfig

KERNELS = ("forward", "delta", "dkdv", "dqdkdv", "dq", "dbias")
Config = TileConfig | HopperConfig | KeysConfig

__all__ = ["active", "override_configs"]

# Process-wide on purpose: autograd runs the backward pass of GPU tensors on threads of its own.
_active: dict[str, Config] = {}


@contextmanager
def override_configs(**configs: Config) -> Iterator[None]:
    """Within the block, kernels named as keywords (``forward=…, dkdv=…, dq=…, dbias=…``) run with the given :class:`TileConfig`.

    A :class:`HopperConfig` for ``forward``, a :class:`KeysConfig` for ``dkdv`` or ``dqdkdv`` and a :class:`RowsConfig` for ``dq`` or
    ``dbias`` are for backend ``hopper``; each backend passes over a configuration of the other's. One for ``dqdkdv`` also has dq added up
    in memory wherever that is possible.
    """
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


def active() -> tuple[tuple[str, Config], ...]:
    """The configurations chosen by hand, as a hashable key for plan caches."""
    return tuple(_active.items()) if _active else ()
