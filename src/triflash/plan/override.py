"""Configurations chosen by hand: called by ``triflash tune`` and by tests that must reach a tile boundary at a small size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import bad_type, bad_value
from .configs import TileConfig
from .kernels import few, short
from .kernels.dbias import DbiasConfig
from .kernels.dkdv import DkdvConfig
from .kernels.dq import DqConfig
from .kernels.few import FewConfig
from .kernels.forward import ForwardConfig
from .kernels.shared import HopperConfig
from .kernels.short import ShortConfig

HOPPER: dict[str, type[HopperConfig] | None] = {
    "forward": ForwardConfig, "delta": None, "dkdv": DkdvConfig, "dqdkdv": DkdvConfig, "dq": DqConfig, "dbias": DbiasConfig,
    **dict.fromkeys(few.KERNELS), **dict.fromkeys(short.KERNELS),
}  # fmt: skip
FEW = few.KERNELS  # which a configuration chosen by hand has backend triton take wherever they can run
SHORT = short.KERNELS  # and these
KERNELS = tuple(HOPPER)
Config = TileConfig | HopperConfig

__all__ = ["active", "override_configs"]

# Process-wide on purpose: autograd runs the backward pass of GPU tensors on threads of its own.
_active: dict[str, Config] = {}


@contextmanager
def override_configs(**configs: Config) -> Iterator[None]:
    """Within the block, kernels named as keywords (``forward=…, dkdv=…, dq=…, dbias=…``) run with the given :class:`TileConfig`.

    A :class:`FewConfig` for ``few_forward`` or ``few_backward`` has backend ``triton`` take that kernel wherever it can run; one for
    ``dq`` says into how many parts that kernel cuts the keys.

    A :class:`ShortConfig` for ``short_forward`` or ``short_backward`` likewise.

    A :class:`ForwardConfig` for ``forward``, a :class:`DkdvConfig` for ``dkdv`` or ``dqdkdv``, a :class:`DqConfig` for ``dq`` and a
    :class:`DbiasConfig` for ``dbias`` are for backend ``hopper``; each backend passes over a configuration of the other's. One for
    ``dqdkdv`` also has dq summed in memory wherever that is possible.

    Raises:
        ValueError: no kernel has that name.
        TypeError: a Hopper kernel gets the configuration of another.
    """
    global _active
    for name, config in configs.items():
        if name not in KERNELS:
            raise bad_value(name, f"one of {', '.join(KERNELS)}", "a configuration for an unknown kernel")
        own = HOPPER[name]
        if isinstance(config, FewConfig) != (name in FEW) and not (name == "dq" and isinstance(config, FewConfig)):
            raise bad_type(name, "FewConfig" if name in FEW else "TileConfig", type(config).__name__)
        if isinstance(config, ShortConfig) != (name in SHORT):
            raise bad_type(name, "ShortConfig" if name in SHORT else "TileConfig", type(config).__name__)
        if isinstance(config, HopperConfig) and not (own and isinstance(config, own)):
            wanted = f"TileConfig or {own.__name__}" if own else "TileConfig"
            raise bad_type(name, wanted, type(config).__name__)
    before = _active
    _active = {**before, **configs}
    try:
        yield
    finally:
        _active = before


def active() -> tuple[tuple[str, Config], ...]:
    """The configurations chosen by hand, as a hashable key for plan caches."""
    return tuple(_active.items()) if _active else ()
