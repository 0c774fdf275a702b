"""A kernel launch as a value, and what the kernel families' launchers share. Called by all of ``launch/``; imports torch only."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..dropout import rescale, threshold
from ..plan.configs import TileConfig
from ..plan.kernels.shared import HopperConfig
from ..rest import split_rest
from ..spec import AttentionSpec, Saved

__all__ = [
    "SMALLEST_SCALE",
    "Call",
    "address_of",
    "alibi_of",
    "bias_strides",
    "cap_of",
    "cells",
    "dropout_of",
    "lengths_of",
    "lengths_stride",
    "on",
    "picking",
    "sink_gradient",
    "slope_strides",
    "start",
]

# Where a tensor starts; for a meta tensor, where it would, modulo what memory is aligned to. For ``map``, which takes half the time of a
# comprehension.
address_of: Callable[[Tensor], int] = torch._C.TensorBase.data_ptr

LOG2E = 1.4426950408889634
LARGEST_FACTOR = 2.0**126  # times 0 it is still 0
SMALLEST_SCALE = 2.0**-126  # the least normal float32: what is smaller may reach a kernel as 0


@dataclass(eq=False, slots=True)  # not frozen: that takes three times as long to make
class Call:
    """One kernel launch: the kernel, its arguments in order, its compile-time constants, and its grid.

    pdl: a programmatic dependent launch: the kernel may start while the one before it still runs, and waits for its end by itself
    (griddepcontrol.wait). Triton's own way launches it after that end.
    """

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    config: TileConfig | HopperConfig
    programs: int
    pdl: bool = False
    _spread: tuple[tuple[Any, ...], tuple[Any, ...]] | None = field(default=None, init=False)

    @property
    def spread(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The arguments, behind these what is in those that are tuples, behind that what is in such as are tuples there, and so on; and the
        types of all of it, with the lengths of the tuples.
        """
        found = self._spread
        if found is None:
            level = values = self.args
            types: tuple[Any, ...] = ()
            while level:
                own = tuple(map(type, level))
                tuples = _tuples_among(own)
                if tuples is None:
                    types += own
                    break
                inside = tuples(level)
                types = (*types, *own, *map(len, inside))
                level = tuple(itertools.chain.from_iterable(inside))
                values += level
            found = self._spread = values, types
        return found

    def start(self) -> None:
        """Launch it on the current device, by Triton's own way."""
        self.settle()
        self.kernel[(self.programs,)](*self.args, **self.options)

    def settle(self) -> None:
        """Fix its kernel's key in Triton's cache, whatever this process has compiled before."""
        from ..kernels.keys import settle

        settle(self.kernel)

    @property
    def options(self) -> dict[str, Any]:
        """Everything that goes to the kernel by keyword."""
        return {**self.constants, "num_warps": self.config.num_warps, "num_stages": self.config.num_stages}


def on(device: torch.device) -> AbstractContextManager[object]:
    """Within it that device is the current one, on which Triton compiles and launches."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


def start(device: torch.device, calls: Iterable[Call]) -> None:
    """Launch them in order on that device."""
    with on(device):
        for call in calls:
            call.start()


def picking(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """What picks them of a sequence."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    if not places:
        return lambda _: ()
    (at,) = places
    return lambda args: (args[at],)


@functools.lru_cache(maxsize=1024)
def _tuples_among(types: tuple[type, ...]) -> Callable[[Sequence[Any]], tuple[Any, ...]] | None:
    """What picks, of values of these types, the tuples; None: there are none."""
    places = [at for at, kind in enumerate(types) if issubclass(kind, tuple)]
    return picking(places) if places else None


def cells(begin: int, count: int) -> bytes:
    """The addresses of so many numbers of 8 bytes from ``begin`` on, one behind the other, as they lie in memory."""
    ones, steps = _ones_and_steps(count)
    return (begin * ones + steps).to_bytes(8 * count, "little")


@functools.cache
def _ones_and_steps(count: int) -> tuple[int, int]:
    """1 in each of so many numbers of 64 bits, and 0, 8, 16 and so on: a loop in Python over addresses takes ten times as long."""
    return sum(1 << 64 * at for at in range(count)), sum(8 * at << 64 * at for at in range(count))


def bias_strides(bias: Tensor | None) -> tuple[int, ...] | None:
    """Strides of a canonical bias, 0 along dims that it broadcasts."""
    return None if bias is None else tuple(0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True))


def slope_strides(slopes: Tensor | None) -> tuple[int, int] | None:
    """(batch, head) strides of ALiBi slopes (B|1, Hq), 0 where all batch entries share them."""
    return None if slopes is None else (slopes.stride(0) if slopes.shape[0] > 1 else 0, slopes.stride(1))


def lengths_of(lengths: Tensor | None) -> tuple[Tensor, int] | None:
    """What the Hopper kernels take of key lengths (``kernels/hopper/features.visible_keys``); None: there are none."""
    return None if lengths is None else (lengths, lengths_stride(lengths))


def lengths_stride(lengths: Tensor) -> int:
    """Between the lengths of two batch entries. Of a single one it is 1, so that no kernel is compiled for another."""
    return lengths.stride(0) if lengths.shape[0] > 1 else 1


def cap_of(spec: AttentionSpec) -> tuple[float, float] | None:
    """What the Hopper kernels take of a soft cap (``kernels/hopper/features.tanh``), within float32; None: there is none."""
    if spec.softcap == 0:
        return None
    factor = 2.0 * LOG2E * spec.scale / spec.softcap
    return max(-LARGEST_FACTOR, min(factor, LARGEST_FACTOR)), max(SMALLEST_SCALE, spec.softcap * LOG2E)


def alibi_of(spec: AttentionSpec, keys: int) -> int:
    """Which form of ALIBI the Hopper kernels take (``kernels/hopper/features.one_sided``), with the keys of a block of the forward kernel,
    whose rounding they repeat beside huge scores: queries are counted so that the last meets the
    last key, and a bound to the right may keep all of them from seeing a key behind them.

    Not beside a bias of numbers: kernels that own queries add the line over keys to a score and kernels that own keys the other one, and
    beside a bias like -10⁹ the two would be rounded to different scores, whose p no saved lse makes a sum of 1.
    """
    if not spec.alibi:
        return 0
    exact = spec.bias is None or spec.bias.is_mask
    diagonal = 0 if spec.packed is not None else spec.keys - spec.queries  # that a band counts from
    return keys if exact and spec.hi is not None and spec.hi <= diagonal else 1


def dropout_of(spec: AttentionSpec, seed: Tensor | None) -> tuple[Any, ...] | None:
    """What the Hopper kernels take of dropout (``kernels/hopper/dropout.philox_of``); None: there is none."""
    if seed is None:
        return None
    own = (seed, threshold(spec.dropout), rescale(spec.dropout))
    return (*own, 1) if spec.dropout_place else own


def sink_gradient(sink: Tensor, saved: Saved, delta: Tensor, factor: float = 1.0) -> Tensor:
    """``dsink (Hq,)``, summed in float32 in a fixed order, from ``factor * delta = rowsum(out * dout) - dlse`` ``(B, Hq, M)``.

    A sink is a key of probability ``p = exp(sink - lse)`` whose value is 0: its ds is ``p * (0 - delta)``, summed over queries and batch.
    In base 2, as the forward pass has it, where it kept what lse lost.
    """
    lse = saved.lse
    own = sink.to(lse.dtype)[:, None]
    if saved.rest is None:
        p = torch.exp(own - lse)
    else:
        off, log2_sum = split_rest(saved.rest)
        p = torch.exp2((own * LOG2E - (lse * LOG2E + off)) - log2_sum)
    ds = p.mul_(delta if factor == 1.0 else delta * factor)
    return -ds.masked_fill_(lse == -torch.inf, 0.0).sum((0, 2))  # what comes back for queries that are no rows may be anything
