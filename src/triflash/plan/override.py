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
from .kernels.mask_bounds import MaskBoundsConfig
from .kernels.shared import HopperConfig
from .kernels.short import ShortConfig

TAKES: dict[str, tuple[type[TileConfig | HopperConfig], ...]] = {  # which configurations a kernel of that name takes
    "forward": (TileConfig, ForwardConfig), "delta": (TileConfig,), "dkdv": (TileConfig, DkdvConfig), "dqdkdv": (TileConfig, DkdvConfig),
    "dk": (TileConfig,), "dv": (TileConfig,),
    "dq": (TileConfig, DqConfig, FewConfig), "dbias": (TileConfig, DbiasConfig), **dict.fromkeys(few.KERNELS, (FewConfig,)),
    **dict.fromkeys(short.KERNELS, (ShortConfig,)), "mask_bounds": (MaskBoundsConfig,),
}  # fmt: skip
KERNELS = tuple(TAKES)
Config = TileConfig | HopperConfig

__all__ = ["active", "override_configs"]

# Process-wide on purpose: autograd runs the backward pass of GPU tensors on threads of its own.
by_hand: dict[str, Config] = {}


@contextmanager
def override_configs(**configs: Config) -> Iterator[None]:
    """Within the block, kernels named as keywords (``forward=…, dkdv=…, dq=…, dbias=…``) run with the given :class:`TileConfig`.

    With one for ``dk`` or ``dv`` backend ``triton`` launches the kernel for both once for each, unless it also gives the gradient of a
    bias.

    A :class:`FewConfig` for ``few_forward`` or ``few_backward`` has backend ``triton`` take that kernel wherever it can run; one for
    ``dq`` says into how many parts that kernel cuts the keys.

    A :class:`ShortConfig` for ``short_forward`` or ``short_backward`` likewise, and a :class:`MaskBoundsConfig` for ``mask_bounds`` has
    backend ``hopper`` look where a mask shows anything however small the problem is.

    A :class:`ForwardConfig` for ``forward``, a :class:`DkdvConfig` for ``dkdv`` or ``dqdkdv``, a :class:`DqConfig` for ``dq`` and a
    :class:`DbiasConfig` for ``dbias`` are for backend ``hopper``; each backend passes over a configuration of the other's. One for
    ``dqdkdv`` also has dq summed in memory, or with ``dq_blocks`` in shared memory, wherever that is possible.

    Raises:
        ValueError: no kernel has that name.
        TypeError: a kernel gets the configuration of another.
    """
    global by_hand
    for name, config in configs.items():
        if name not in KERNELS:
            raise bad_value(name, f"one of {', '.join(KERNELS)}", "a configuration for an unknown kernel")
        if type(config) not in TAKES[name]:
            raise bad_type(name, " or ".join(each.__name__ for each in TAKES[name]), type(config).__name__)
    before = by_hand
    by_hand = {**before, **configs}
    try:
        yield
    finally:
        by_hand = before


def active() -> tuple[tuple[str, Config], ...]:
    """The configurations chosen by hand, as a hashable key for plan caches."""
    return tuple(by_hand.items()) if by_hand else ()
