"""The forward kernel on Hopper (``kernels/hopper/forward.py``): its configuration, choice, shared memory and grid.

Called by ``plan/hopper.py``. Pure.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

from ...errors import bad_value
from ...spec import AttentionSpec
from ..configs import chosen, padded
from ..device import DeviceFacts
from ..steps import Step
from .shared import (
    ROWS,
    Buffer,
    QueryConfig,
    barriers,
    bias_buffer,
    blocks_of_heads,
    is_banded,
    is_light,
    mask_buffer,
    mma_fits,
    order_of,
    query_tiles,
    second_buffer,
    span,
    takes_own_widths,
    widths,
)

__all__ = ["ForwardConfig", "by_hand_of", "choose", "config_of", "fuses_bias", "step", "step_of", "why_not"]

SHORT = 1088  # keys that a query sees at most under a band, where rows are short: 1,024 and a block
SHORT_FULL = 256  # and without one
MOST_WASTED = 1.15  # by large tiles of few queries
FEW_BLOCKS = 320  # keys, of which blocks of 128 would leave much empty


@dataclass(frozen=True)
class ForwardConfig(QueryConfig):
    """One configuration of the forward kernel.

    consumers: warpgroups of 64 queries each. block_n: keys of a block. kv_stages: buffers for K blocks, and as many for V blocks.
    bias_stages: buffers for bias tiles, per consumer. ping_pong: consumers issue their MMAs in turn. separate_o: O has a buffer of its own,
    else it leaves through that of Q. persistent: a grid of as many CTAs as run at a time. q_stages: buffers for Q, per consumer; 2 only
    with separate_o. ctas_per_sm: CTAs that share an SM's registers and shared memory, so that one begins and ends tiles while another
    computes. own_widths: blocks of a head that is padded lie in two buffers, which together have the columns that are multiplied alone.
    """

    consumers: int
    block_n: int
    kv_stages: int
    bias_stages: int = 1
    ping_pong: bool = False
    separate_o: bool = True
    persistent: bool = True
    q_stages: int = 1
    ctas_per_sm: int = 1
    own_widths: bool = False

    SOURCE = "a rule of plan/kernels/forward.py, drawn from measurements on an H200"

    def __post_init__(self) -> None:
        self.require(consumers=(1, 2, 3), block_n=(16, 32, 64, 128, 256), bias_stages=(1, 2, 3, 4), ctas_per_sm=(1, 2, 3, 4))
        if self.q_stages not in ((1, 2) if self.separate_o else (1,)):
            raise bad_value("q_stages", "1, or 2 with separate_o", self.q_stages)
        if self.kv_stages < 1:
            raise bad_value("kv_stages", "at least 1", self.kv_stages)

    @property
    def num_stages(self) -> int:
        return self.kv_stages

    def __str__(self) -> str:
        flags = " ping-pong" * self.ping_pong + " separate-o" * self.separate_o + " persistent" * self.persistent
        flags += f" {self.ctas_per_sm} CTAs/SM" * (self.ctas_per_sm > 1) + " own-widths" * self.own_widths
        return f"{self.block_m}x{self.block_n} s{self.kv_stages} q{self.q_stages} b{self.bias_stages}{flags}"

    def widths(self, dim: int) -> tuple[int, ...]:
        """Columns of the buffers that blocks of a head lie in."""
        return widths(dim, self.own_widths)

    def buffers(self, spec: AttentionSpec, gives: tuple[str, ...] = ()) -> tuple[Buffer, ...]:
        head, value, biases = self.widths(spec.head_dim), self.widths(spec.value_dim), self.bias_stages * self.consumers
        return (
            *blocks_of_heads("q", self.q_stages * self.consumers, ROWS, head),
            *blocks_of_heads("k", self.kv_stages, self.block_n, head),
            *blocks_of_heads("v", self.kv_stages, self.block_n, value),
            *blocks_of_heads("o", self.consumers * self.separate_o, ROWS, value),
            bias_buffer(spec, self, biases),
            second_buffer(spec, self, biases),
            mask_buffer(spec, self, biases),
            barriers(2 * self.q_stages * self.consumers, 2 * self.kv_stages, 2 * biases, 3),
        )


def why_not(spec: AttentionSpec, device: DeviceFacts) -> tuple[str, str] | None:
    """None if the kernel has tiles for the spec, else (what it cannot do, the nearest thing that works)."""
    if choose(spec, device.shared_memory) is None:
        return f"head dims {spec.head_dim} and {spec.value_dim} with such a bias", "no tile fits in shared memory: use backend('triton')"
    return None


def choose(spec: AttentionSpec, limit: int, sms: int = 0) -> ForwardConfig | None:
    """The configuration for a spec within ``limit`` bytes of shared memory; None if no candidate fits.

    Where its tiles are too few for the SMs, tiles of 64 queries take their place.
    """
    config = _first_that_fits(spec, limit)
    if config is not None and 2 * query_tiles(spec, config)[1] <= sms:
        return replace(config, consumers=1, ping_pong=False, ctas_per_sm=1)
    return config


@functools.lru_cache(maxsize=4096)
def _first_that_fits(spec: AttentionSpec, limit: int) -> ForwardConfig | None:
    for config in _candidates_of_widths(spec):
        if config.fits(spec, limit) and mma_fits(config, spec.value_dim) and _has_room_for_o(spec, config):
            return config
    return None


def _has_room_for_o(spec: AttentionSpec, config: ForwardConfig) -> bool:
    value = config.widths(spec.value_dim)
    return config.separate_o or config.widths(spec.head_dim)[: len(value)] == value


def _candidates_of_widths(spec: AttentionSpec) -> tuple[ForwardConfig, ...]:
    """Candidates with blocks of a padded head's own width, where there are such: they have room for larger tiles.

    Not beside soft caps and what else takes registers, where they were slower by a tenth (H200; docs/tuning.md).
    """
    if not (takes_own_widths(spec) and is_light(spec)):
        return _candidates(spec)
    first: tuple[ForwardConfig, ...] = ()
    over_128 = padded(max(spec.head_dim, spec.value_dim)) > 128
    if over_128 and (not is_banded(spec) or span(spec) > 512):
        ping_pong = spec.bias is None
        first = (ForwardConfig(2, 128, 2, ping_pong=ping_pong, separate_o=False), ForwardConfig(2, 64, 2, ping_pong=ping_pong))
    if _fills_sectors(spec):
        first = (*_small_of_own_widths(spec, over_128), *first)
    return tuple(replace(config, own_widths=True) for config in (*first, *_candidates(spec)))


def _fills_sectors(spec: AttentionSpec) -> bool:
    """Whether rows are multiples of L2's sectors of 32 bytes; where not (d 72), what reads keys oftener reads more beside them."""
    return spec.head_dim % 16 == spec.value_dim % 16 == 0


def _small_of_own_widths(spec: AttentionSpec, over_128: bool) -> tuple[ForwardConfig, ...]:
    """Two or three CTAs an SM, which buffers of 80 and 96 columns have room for, and of 160 where O leaves through Q's."""
    seen, banded, bias = span(spec), is_banded(spec), spec.bias
    if over_128:
        return (ForwardConfig(1, 64, 2, separate_o=False, ctas_per_sm=2),) if seen <= 512 and bias is None and not banded else ()
    three = ForwardConfig(1, 64, 2, separate_o=False, ctas_per_sm=3)
    if bias is None:
        if seen > 2048 and (banded or max(spec.head_dim, spec.value_dim) <= 80):
            return ()
        return (ForwardConfig(1, 128, 2, ctas_per_sm=2), three) if FEW_BLOCKS < seen <= 1024 and not banded else (three,)
    if banded or bias.is_mask or not bias.varies[4] or seen > SHORT:
        return ()
    next_come = (ForwardConfig(1, 64, 3, 2, q_stages=2, ctas_per_sm=2),) if seen <= SHORT_FULL else ()
    return (*next_come, replace(three, bias_stages=2), three)


_config = functools.cache(ForwardConfig)  # which checks what it is made of


def _candidates(spec: AttentionSpec) -> tuple[ForwardConfig, ...]:
    """From the fastest measured to the smallest; the first that fits is taken.

    H200, Triton 3.6.0, bf16, 2026-11 (docs/tuning.md). Short rows, and those with tiles of bias, want small CTAs of which several share an
    SM, so that one begins and ends tiles while another computes; long rows want large tiles, which read keys less often. At d 64 three
    consumers hide more of the exponentials, but their tiles of 192 queries waste more of a short triangle, and end more seldom. Ping-pong
    pays where the softmax is long beside the MMAs: at d 128 with ALiBi slopes and, under a band, a soft cap (3 %), not with dropout.
    """
    head, seen, banded, light = padded(max(spec.head_dim, spec.value_dim)), span(spec), is_banded(spec), is_light(spec)
    bias_tiles = spec.bias is not None and spec.bias.varies[4]
    softcapped = spec.softcap > 0
    short = banded and light and seen <= SHORT
    short_full = not banded and light and seen <= SHORT_FULL
    narrow: tuple[ForwardConfig, ...] = ()
    small: tuple[ForwardConfig, ...] = ()
    if head <= 64:
        if bias_tiles:
            if head <= 32 and light:
                narrow = (_config(2, 64, 3, 2, q_stages=2, ctas_per_sm=2), _config(2, 64, 2, ctas_per_sm=2))
                if spec.bias is not None and spec.bias.is_mask:
                    narrow = (_config(1, 64, 3, q_stages=2, ctas_per_sm=4), *narrow)
                else:
                    narrow = (_config(1, 64, 2, 2, ctas_per_sm=4), *narrow)
            if short:
                small = (_config(1, 64, 2, 2, ctas_per_sm=3), _config(1, 64, 2, ctas_per_sm=3))
            large = (
                _config(2, 128, 2, 2, ping_pong=True),
                _config(2, 128, 2, 1, ping_pong=True),
                _config(2, 64, 2, ping_pong=True),
            )
            return (*narrow, *small, _config(1, 128, 2, ctas_per_sm=2), *large)
        if (short or short_full) and spec.bias is None:
            if head <= 32:
                narrow = (_config(1, 64, 3, q_stages=2, ctas_per_sm=4),)
            stages_of_queries = 2 if seen <= (SHORT_FULL if banded else 128) else 1  # the next tile's queries come ahead
            short_rows = tuple(_config(1, 64, 3, q_stages=stages, ctas_per_sm=3) for stages in range(stages_of_queries, 0, -1))
            return (*narrow, *short_rows, _config(2, 64, 2, ping_pong=True))
        if spec.alibi and spec.hi is not None and not softcapped and spec.dropout == 0:
            return (_config(1, 128, 2, q_stages=2, ctas_per_sm=2), _config(2, 64, 2, ping_pong=True))
        if light and spec.bias is None and not banded and seen <= 5 * 64:  # a block of 128 more would be half empty
            return (_config(2, 64, 2, ctas_per_sm=2), _config(2, 64, 2, ping_pong=True))
        in_large, in_small = (ceil(spec.queries / rows) * rows for rows in (192, 128))
        many = seen >= (4096 if banded else 2048) and in_large <= MOST_WASTED * in_small
        if many and light and spec.bias is None:  # a third consumer leaves no registers for more
            return (_config(3, 128, 2, ping_pong=True), _config(2, 64, 2, ping_pong=True))
        return (_config(2, 128, 3, q_stages=2), _config(2, 64, 2, ping_pong=True))
    if head <= 128:
        ping_pong = bias_tiles or spec.alibi or (softcapped and banded)
        few_blocks = not banded and light and seen <= FEW_BLOCKS and (_fills_sectors(spec) or 0 < seen % 128 <= 64)
        if (short or few_blocks) and (bias_tiles or spec.bias is None):
            small = (_config(1, 64, 2, ctas_per_sm=2),)
        return (
            *small,
            *(() if bias_tiles else (_config(2, 128, 2, q_stages=2, ping_pong=ping_pong),)),
            _config(2, 128, 2, ping_pong=ping_pong),
            _config(2, 128, 2, ping_pong=ping_pong, separate_o=False),
            _config(2, 64, 2, ping_pong=ping_pong),
            _config(2, 64, 2, separate_o=False),
        )
    if short and seen <= 512 and spec.bias is None:
        small = (_config(1, 64, 2, q_stages=2), _config(1, 64, 2))  # with a separate O
    return (
        *small,
        _config(2, 64, 2, separate_o=False),
        _config(2, 64, 2),  # for head dims of q and v that differ: O does not fit in Q's buffer
        _config(2, 32, 2, separate_o=False),
        _config(1, 32, 2),
    )


def fuses_bias(spec: AttentionSpec, config: ForwardConfig) -> bool:
    """Whether a consumer has registers to add a 16-bit bias in one instruction with the scale: for a block's scores, its bias, p, p of the
    block before, O, and 40 more. Not beside a second bias.
    """
    if spec.second is not None:
        return False
    scores = config.block_n // 2
    return scores + 3 * scores // 2 + padded(spec.value_dim) // 2 + 40 <= config.registers


def by_hand_of(by_hand: Mapping[str, object]) -> ForwardConfig | None:
    """What the caller chose, if anything."""
    return chosen(by_hand, "forward", ForwardConfig)


def config_of(spec: AttentionSpec, device: DeviceFacts, by_hand: Mapping[str, object]) -> ForwardConfig:
    """By hand, else by rule, for a spec that ``why_not`` allows."""
    if (own := by_hand_of(by_hand)) is not None:
        if not _has_room_for_o(spec, own):
            wanted = f"True for head dims {spec.head_dim} and {spec.value_dim}"
            raise bad_value("separate_o", wanted, False, "a tile of O does not fit in Q's buffer")
        own.check(spec, spec.value_dim, device.shared_memory)
        return own
    config = choose(spec, device.shared_memory, device.sms)
    assert config is not None, "why_not refuses what fits no candidate"
    return config


def step(spec: AttentionSpec, device: DeviceFacts, by_hand: Mapping[str, object]) -> Step:
    """The kernel, with its grid."""
    config = config_of(spec, device, by_hand)
    return step_of(config, query_tiles(spec, config)[1], device, order_of(spec))


def step_of(config: ForwardConfig, tiles: int, device: DeviceFacts, order: str = "tile") -> Step:
    """The kernel with a grid for so many tiles."""
    programs = min(tiles, device.sms * config.ctas_per_sm) if config.persistent else tiles
    return Step("forward", config, programs, order)
