"""The kernel for dq on Hopper (``kernels/hopper/dq.py``), which also gives dbias of a full-shape bias.

Called by ``plan/hopper.py``. Pure.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...errors import bad_value
from ...spec import AttentionSpec
from ..configs import chosen, padded
from ..device import DeviceFacts
from ..steps import Step
from .shared import (
    MOST_PIECES,
    ROWS,
    Buffer,
    QueryConfig,
    barriers,
    bias_buffer,
    blocks_of_heads,
    check_held,
    is_banded,
    is_light,
    mask_buffer,
    multiplied_columns,
    order_of,
    query_tiles,
    second_buffer,
    takes_own_widths,
    widths,
)

__all__ = ["DqConfig", "by_hand_of", "choose", "owns_dbias", "programs", "step"]

HELD = 192  # registers of dq, scores and left operands


@dataclass(frozen=True)
class DqConfig(QueryConfig):
    """One configuration of the kernel for dq.

    consumers, block_n, bias_stages, ping_pong, persistent, ctas_per_sm: as of the forward kernel. k_stages, v_stages: buffers for K blocks
    and for V blocks. deferred: the MMA dS·K of a block is issued behind S and dP of the next; it takes registers and a second K buffer.
    separate_dq: dQ has a buffer of its own, else it leaves through that of Q. own_widths: as of the forward kernel. hold_q, hold_dout: a
    tile's q or dout is read from registers.
    """

    consumers: int
    block_n: int
    k_stages: int
    v_stages: int
    bias_stages: int = 1
    ping_pong: bool = False
    deferred: bool = True
    separate_dq: bool = True
    persistent: bool = True
    ctas_per_sm: int = 1
    own_widths: bool = False
    hold_q: bool = False
    hold_dout: bool = False

    SOURCE = "the first candidate that fits, of plan/kernels/dq.py"

    def __post_init__(self) -> None:
        self.require(consumers=(1, 2), block_n=(16, 32, 64, 128, 256), bias_stages=(1, 2, 3, 4), ctas_per_sm=(1, 2, 3, 4))
        if self.k_stages < 1 + self.deferred:
            raise bad_value("k_stages", "at least 1, or 2 with deferred, whose last MMA would wait for its own K buffer", self.k_stages)
        if self.v_stages < 1:
            raise bad_value("v_stages", "at least 1", self.v_stages)

    @property
    def num_stages(self) -> int:
        return self.k_stages

    def __str__(self) -> str:
        flags = " ping-pong" * self.ping_pong + " deferred" * self.deferred + " separate-dq" * self.separate_dq
        flags += " persistent" * self.persistent + f" {self.ctas_per_sm} CTAs/SM" * (self.ctas_per_sm > 1)
        flags += " own-widths" * self.own_widths + " hold-q" * self.hold_q + " hold-dout" * self.hold_dout
        return f"{self.block_m}x{self.block_n} s{self.k_stages}/{self.v_stages} b{self.bias_stages}{flags}"

    def buffers(self, spec: AttentionSpec, gives: tuple[str, ...] = ()) -> tuple[Buffer, ...]:
        head, value = widths(spec.head_dim, self.own_widths), widths(spec.value_dim, self.own_widths)
        biases = self.bias_stages * self.consumers
        unseen = "dbias" in gives and (is_banded(spec) or spec.key_lengths)
        return (
            *blocks_of_heads("q", self.consumers, ROWS, head),
            *blocks_of_heads("dout", self.consumers, ROWS, value),
            *blocks_of_heads("k", self.k_stages, self.block_n, head),
            *blocks_of_heads("v", self.v_stages, self.block_n, value),
            *blocks_of_heads("dq", self.consumers * self.separate_dq, ROWS, head),
            bias_buffer(spec, self, biases),
            second_buffer(spec, self, biases),
            mask_buffer(spec, self, biases),
            bias_buffer(spec, self, int(unseen))._replace(name="zeros"),
            barriers(2 * self.consumers, 2 * self.k_stages, 2 * self.v_stages, 2 * biases, 3),
        )

    def reads_small_lse(self, spec: AttentionSpec) -> bool:
        return spec.bias is None or spec.bias.is_mask  # beside a bias the loop is no faster for it


def owns_dbias(spec: AttentionSpec) -> bool:
    """Whether the kernel gives the gradient of the spec's bias: of full shape, so that it meets each dS exactly once."""
    return spec.bias is not None and all(spec.bias.varies)


@functools.cache
def _candidates(head: int, bias: bool, light: bool) -> tuple[DqConfig, ...]:
    """From the fastest to the smallest as reckoned, measured only up to d 32; the first that fits is taken.

    A K block is read in two steps when the last MMA is deferred, so there are three buffers for them. A bias tile's buffer is in use for
    longer where its gradient leaves through it.
    """
    stages = 2 if bias else 1
    if head <= 64:
        # d 32, the whole backward pass with large and small CTAs: triangle attention of 384 tokens 0.87 and 0.82 ms, s 512 causal
        # without a bias 0.62 and 0.57.
        small = (DqConfig(1, 64, 3, 2, stages, ctas_per_sm=3),) if head <= 32 and light else ()
        if not bias:
            return (*small, DqConfig(2, 128, 3, 2), DqConfig(2, 64, 3, 2))
        return (*small, DqConfig(2, 64, 3, 2, 2), DqConfig(2, 64, 3, 2, 1))
    if head <= 128:
        return (
            DqConfig(2, 64, 3, 2, stages),
            DqConfig(2, 64, 3, 2, stages, separate_dq=False),
            DqConfig(2, 64, 2, 2, 1, separate_dq=False),
            DqConfig(2, 32, 2, 2, 1, separate_dq=False),
        )
    return (
        DqConfig(2, 32, 3, 2, stages, separate_dq=False),
        DqConfig(2, 32, 3, 2, 1, separate_dq=False),
        DqConfig(2, 32, 2, 2, 1, separate_dq=False, deferred=False),
        DqConfig(1, 32, 2, 2, 1, separate_dq=False),
    )


def choose(spec: AttentionSpec, limit: int, gives: tuple[str, ...] = ("dq",), sms: int = 0) -> DqConfig | None:
    """The configuration within ``limit`` bytes of shared memory, None if no candidate fits; few tiles are made of 64 queries."""
    config = _first_that_fits(spec, limit, gives)
    if config is not None and 2 * query_tiles(spec, config)[1] <= sms:
        return replace(config, consumers=1, ctas_per_sm=1)
    return config


@functools.lru_cache(maxsize=4096)
def _first_that_fits(spec: AttentionSpec, limit: int, gives: tuple[str, ...]) -> DqConfig | None:
    widest = padded(max(spec.head_dim, spec.value_dim))
    own = (_with_own_widths(spec),) if widest > 128 and takes_own_widths(spec) else ()
    for config in (*own, *_candidates(widest, spec.bias is not None, is_light(spec))):
        if config.fits(spec, limit, gives):
            return config
    return None


def _with_own_widths(spec: AttentionSpec) -> DqConfig:
    """Of wide heads in two buffers: q and dout in registers where both are left, else blocks of 64 keys where values are narrow."""
    held = _holding(spec, DqConfig(2, 32, 3, 2, own_widths=True))
    return held if held.hold_dout else DqConfig(2, 64 if padded(spec.value_dim) <= 128 else 32, 3, 2, separate_dq=False, own_widths=True)


def _holding(spec: AttentionSpec, config: DqConfig) -> DqConfig:
    """The configuration with q, and dout too, in registers where they are left: with 208 ptxas serialises MMAs."""
    head, value = (multiplied_columns(dim, padded(dim)) for dim in (spec.head_dim, spec.value_dim))
    used = sum(widths(spec.head_dim, True)) // 2 + config.block_n + head // 4
    hold_q = head.bit_count() <= MOST_PIECES and used <= HELD
    return replace(config, hold_q=hold_q, hold_dout=hold_q and value.bit_count() <= MOST_PIECES and used + value // 4 <= HELD)


def programs(spec: AttentionSpec, config: DqConfig, sms: int) -> int:
    """How many CTAs the grid has."""
    tiles = query_tiles(spec, config)[1]
    return min(tiles, sms * config.ctas_per_sm) if config.persistent else tiles


def by_hand_of(by_hand: Mapping[str, object]) -> DqConfig | None:
    """What the caller chose, if anything."""
    return chosen(by_hand, "dq", DqConfig)


def step(spec: AttentionSpec, device: DeviceFacts, by_hand: Mapping[str, object], gives: tuple[str, ...]) -> Step:
    """The kernel, with its grid, for what a plan of ``plan/hopper.py`` asks of it."""
    config = by_hand_of(by_hand)
    if config is not None:
        for name, held, dim in (("hold_q", config.hold_q, spec.head_dim), ("hold_dout", config.hold_dout, spec.value_dim)):
            check_held(name, held, dim)
        config.check(spec, spec.head_dim, device.shared_memory, gives)
    else:
        config = choose(spec, device.shared_memory, gives, device.sms)
        assert config is not None, "why_not_backward refuses what fits no candidate"
    return Step("dq", config, programs(spec, config, device.sms), order_of(spec), gives=gives)
