"""Configurations of the Hopper kernels: what one holds, how much shared memory it takes, and which is used for what. Pure."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from ..errors import bad_value
from ..spec import AttentionSpec
from .configs import padded

__all__ = [
    "LARGEST_SOFTCAP",
    "HopperConfig",
    "bias_block",
    "bias_bytes",
    "busiest",
    "checked",
    "dealt",
    "equal_sections",
    "forward_config",
    "fuses_bias",
    "is_light",
    "mask_block",
    "mask_bytes",
    "products_fit",
    "reservation",
    "schedule",
    "shared_limit",
    "shared_memory",
    "whole_tiles",
]

ROWS = 64  # queries of one consumer warpgroup: the M of a warpgroup product
REGISTERS = 65536  # of a processor
RESERVED = 1024  # bytes of shared memory that the system takes for each program
SHORT = 1088  # keys that a query sees at most, for rows to be short: 1,024 and a block
PRODUCT_REGISTERS = 30  # of a thread, beside a product's result
PRODUCER_REGISTERS = 24  # of a thread: the kernels say so
MOST_SIMULATED = 8192  # tiles; with more, any way of dealing them comes out even
NEAR = 6 * 2**20  # bytes of keys and values of a section up to which its size makes no difference
UNEVENNESS = 0.02  # of what programs get, that a section no larger is worth
RESIDENT_BIAS = 2**22  # bytes of a head's bias that stay in the L2 cache beside all else
TILE_COST = 1  # what a tile costs besides its blocks, in blocks
SHORTEST = 256
LARGEST_SOFTCAP = (
    500.0  # a score's rounding error is up to 8e-7 of the cap: what more than this makes of it would be seen in 16-bit results
)
L2_SECTION = 24 * 2**20  # bytes of keys and values that tiles running at the same time may share: half of an H100's L2 cache


@dataclass(frozen=True)
class HopperConfig:
    """One launch configuration of the forward kernel.

    consumers: warpgroups of 64 queries each. block_n: keys of a block. num_stages: buffers for key blocks, and as many for value blocks.
    bias_stages: buffers for bias tiles, per consumer. turns: consumers issue their products in turn. own_out: the output has a buffer of
    its own. persistent: a grid of as many programs as run at a time. q_stages: buffers for queries, per consumer; the second only where the
    output has its own. together: programs that a processor runs at a time, so that one begins and ends its
    tiles while another computes; they share its registers and shared memory.
    """

    consumers: int
    block_n: int
    num_stages: int
    bias_stages: int = 1
    turns: bool = False
    own_out: bool = True
    persistent: bool = True
    q_stages: int = 1
    together: int = 1

    def __post_init__(self) -> None:
        for name, allowed in (
            ("consumers", (1, 2, 3)),
            ("block_n", (16, 32, 64, 128, 256)),
            ("bias_stages", (1, 2, 3, 4)),
            ("together", (1, 2, 3, 4)),
        ):
            if getattr(self, name) not in allowed:
                raise bad_value(name, f"one of {allowed}", getattr(self, name))
        if self.q_stages not in ((1, 2) if self.own_out else (1,)):
            raise bad_value("q_stages", "1, or 2 where the output has a buffer of its own", self.q_stages)
        if self.num_stages < 1:
            raise bad_value("num_stages", "at least 1", self.num_stages)

    @property
    def block_m(self) -> int:
        return ROWS * self.consumers

    @property
    def num_warps(self) -> int:
        """Of the first consumer; the others and the producer are workers of a specialised kernel and bring their own."""
        return 4

    @property
    def launch_registers(self) -> int:
        """Of a thread when a program starts: all warpgroups, the producer's too, get as many."""
        return REGISTERS // (128 * (self.consumers + 1) * self.together) // 8 * 8

    @property
    def registers(self) -> int:
        """Of a thread of a consumer, once the producer has given up its own; the first consumer gets what is left."""
        return min(240, (self.launch_registers * (self.consumers + 1) - PRODUCER_REGISTERS) // self.consumers // 8 * 8)

    def __str__(self) -> str:
        flags = " turns" * self.turns + " own-out" * self.own_out + " persistent" * self.persistent
        flags += f" {self.together} together" * (self.together > 1)
        return f"{self.block_m}x{self.block_n} s{self.num_stages} q{self.q_stages} b{self.bias_stages}{flags}"


def bias_block(spec: AttentionSpec, config: HopperConfig) -> tuple[int, int]:
    """Rows and columns of one bias buffer: a tile, or a row of keys of at least 128 bytes, to which TMA wants buffers aligned."""
    assert spec.bias is not None
    return (ROWS, config.block_n) if spec.bias.varies[3] else (1, max(config.block_n, 128 // _bias_itemsize(spec)))


def _bias_itemsize(spec: AttentionSpec) -> int:
    assert spec.bias is not None
    return {"bool": 1, "fp32": 4}.get(spec.bias.dtype, 2)


def bias_bytes(spec: AttentionSpec, config: HopperConfig) -> int:
    """Bytes of one bias buffer; none where the bias has no dim of keys."""
    if spec.bias is None or not spec.bias.varies[4]:
        return 0
    rows, columns = bias_block(spec, config)
    return rows * columns * _bias_itemsize(spec)


def shared_limit(limit: int, together: int) -> int:
    """Bytes of shared memory that each of so many programs of a processor may take, if one alone may take ``limit``."""
    return (limit + RESERVED) // together - RESERVED


def products_fit(config: HopperConfig, dim: int) -> bool:
    """Whether the registers of a launch hold the result of every single product, of a block's keys or of that head dim, and its other
    operand: ptxas insists on that even where a consumer has more by then.
    """
    return max(padded(dim), config.block_n) // 2 + PRODUCT_REGISTERS <= config.launch_registers


def checked(config: HopperConfig, dim: int, used: int, limit: int) -> HopperConfig:
    """A configuration chosen by hand. Raises ValueError if a product has too few registers, or if programs that are to run together have
    not enough shared memory for that; ``used``: bytes of one program.
    """
    if not products_fit(config, dim):
        wanted = f"fewer for head dim {dim} and blocks of {config.block_n} keys"
        raise bad_value("consumers and together", wanted, (config.consumers, config.together), "a product has too few registers")
    if config.together > 1 and used > shared_limit(limit, config.together):
        wanted = f"fewer programs, which take {used} bytes of shared memory each"
        raise bad_value("together", wanted, config.together, f"they have {shared_limit(limit, config.together)}")
    return config


def mask_block(spec: AttentionSpec, config: HopperConfig) -> tuple[int, int]:
    """Rows and columns of one buffer of a mask beside a bias, as of ``bias_block``."""
    assert spec.mask is not None
    return (ROWS, config.block_n) if spec.mask.varies[3] else (1, max(config.block_n, 128))


def mask_bytes(spec: AttentionSpec, config: HopperConfig) -> int:
    """Bytes of one buffer of a mask beside a bias."""
    if spec.mask is None:
        return 0
    rows, columns = mask_block(spec, config)
    return rows * columns


def shared_memory(spec: AttentionSpec, config: HopperConfig) -> int:
    """Bytes of shared memory of one program of the forward kernel."""
    head, value = padded(spec.head_dim) * 2, padded(spec.value_dim) * 2
    queries = config.block_m * (max(head, value) if not config.own_out else config.q_stages * head + value)
    keys = config.block_n * config.num_stages * (head + value)
    bias = config.bias_stages * config.consumers * (bias_bytes(spec, config) + mask_bytes(spec, config))
    barriers = 8 * (2 * config.q_stages * config.consumers + 3 + 2 * config.num_stages + 2 * config.bias_stages * config.consumers)
    return queries + keys + bias + barriers + 1024  # and what alignment of the buffers may cost


def _candidates(spec: AttentionSpec) -> tuple[HopperConfig, ...]:
    """From the fastest measured to the smallest; the first that fits is taken.

    H200, Triton 3.6.0, bf16, 2026-11 (docs/tuning.md). Short rows, and those with tiles of bias, want small programs of which several run
    together, so that one begins and ends tiles while another computes; long ones want large tiles, which read keys less often. At d 64
    three consumers hide more of the exponentials, but their tiles of 192 queries waste more of a short triangle, and end more seldom.
    Turns pay where the softmax is long beside the products: at d 128 with slopes of ALiBi and, under a band, a soft cap (3 %), not with
    dropout.
    """
    head, seen = padded(max(spec.head_dim, spec.value_dim)), _span(spec)
    banded = spec.lo is not None or spec.hi is not None
    bias_tiles = spec.bias is not None and spec.bias.varies[4]
    capped = spec.softcap > 0
    light = is_light(spec)
    short = banded and light and seen <= SHORT
    narrow: tuple[HopperConfig, ...] = ()
    small: tuple[HopperConfig, ...] = ()
    if head <= 64:
        if bias_tiles:
            if head <= 32 and light:
                narrow = (HopperConfig(2, 64, 3, 2, q_stages=2, together=2), HopperConfig(2, 64, 2, together=2))
                if spec.bias is not None and spec.bias.is_mask:
                    narrow = (HopperConfig(1, 64, 3, q_stages=2, together=4), *narrow)
            if short:
                small = (HopperConfig(1, 64, 2, 2, together=3), HopperConfig(1, 64, 2, together=3))
            large = (HopperConfig(2, 128, 2, 2, turns=True), HopperConfig(2, 128, 2, 1, turns=True), HopperConfig(2, 64, 2, turns=True))
            return (*narrow, *small, HopperConfig(1, 128, 2, together=2), *large)
        if short and spec.bias is None:
            if head <= 32:
                narrow = (HopperConfig(1, 64, 3, q_stages=2, together=4),)
            return (*narrow, HopperConfig(1, 64, 3, together=3), HopperConfig(2, 64, 2, turns=True))
        if spec.alibi and spec.hi is not None and not capped and spec.dropout == 0:
            return (HopperConfig(1, 128, 2, q_stages=2, together=2), HopperConfig(2, 64, 2, turns=True))
        if light and spec.bias is None and seen >= (4096 if banded else 2048):  # registers of a third consumer leave no room for more
            return (HopperConfig(3, 128, 2, turns=True), HopperConfig(2, 64, 2, turns=True))
        return (HopperConfig(2, 128, 3, q_stages=2), HopperConfig(2, 64, 2, turns=True))
    if head <= 128:
        turns = bias_tiles or spec.alibi or (capped and banded)
        if short and (bias_tiles or spec.bias is None):
            small = (HopperConfig(1, 64, 2, together=2),)
        return (
            *small,
            *(() if bias_tiles else (HopperConfig(2, 128, 2, q_stages=2, turns=turns),)),
            HopperConfig(2, 128, 2, turns=turns),
            HopperConfig(2, 128, 2, turns=turns, own_out=False),
            HopperConfig(2, 64, 2, turns=turns),
            HopperConfig(2, 64, 2, own_out=False),
        )
    if short and seen <= 512 and spec.bias is None:
        small = (HopperConfig(1, 64, 2, q_stages=2), HopperConfig(1, 64, 2))  # whose output has a buffer of its own
    return (
        *small,
        HopperConfig(2, 64, 2, own_out=False),
        HopperConfig(2, 64, 2),  # head dims of q and v that differ: the output does not fit in q's buffer
        HopperConfig(2, 32, 2, own_out=False),
        HopperConfig(1, 32, 2),
    )


def fuses_bias(spec: AttentionSpec, config: HopperConfig) -> bool:
    """Whether a consumer has registers to add a bias of 16 bits in one instruction with the scale: for a block's products, its bias,
    probabilities and those of the block before, the output, and 40 more.
    """
    scores = config.block_n // 2
    return scores + 3 * scores // 2 + padded(spec.value_dim) // 2 + 40 <= config.registers


def is_light(spec: AttentionSpec) -> bool:
    """Whether there is little that takes registers beside a bias."""
    return not (spec.softcap > 0 or spec.alibi or spec.dropout > 0 or (spec.mask is not None and spec.mask.varies[3]))


def _span(spec: AttentionSpec) -> int:
    """Keys that a query sees, at most."""
    return spec.keys if spec.lo is None or spec.hi is None else max(0, min(spec.keys, spec.hi - spec.lo + 1))


@functools.lru_cache(maxsize=4096)
def forward_config(spec: AttentionSpec, limit: int, processors: int = 0) -> HopperConfig | None:
    """The configuration for a spec within ``limit`` bytes of shared memory; None if no candidate fits.

    Where its tiles are too few for the ``processors``, tiles of 64 queries take their place.
    """
    for config in _candidates(spec):
        fits = shared_memory(spec, config) <= shared_limit(limit, config.together)
        fits = fits and products_fit(config, spec.value_dim)
        if fits and (config.own_out or padded(spec.head_dim) == padded(spec.value_dim)):
            if 2 * whole_tiles(spec, config)[1] <= processors:
                return replace(config, consumers=1, turns=False, together=1)
            return config
    return None


@functools.lru_cache(maxsize=4096)
def schedule(spec: AttentionSpec, config: HopperConfig, programs: int) -> tuple[int, int]:
    """``(section, snake)``: how tiles are dealt to a grid of ``programs`` (see ``kernels/hopper/schedule.Uniform``).

    As small a section as can be: then keys and values come from memory at all times, not for all pairs at once, and are read again soon.
    Where tiles share a bias over the batch, one large enough for that. Under a causal mask tiles differ in length: of sections whose keys
    and values take at most NEAR bytes that is taken which gives the busiest program least work, and a larger one if it is much better.
    """
    pairs = spec.batch * spec.heads
    bytes_a_pair = max(1, spec.keys * (spec.head_dim + spec.value_dim) * 2)
    fitting = max(1, L2_SECTION // bytes_a_pair)
    least = equal_sections(pairs, min(fitting, spec.batch)) if _shares_bias(spec) else 1
    tiles_m, tiles = whole_tiles(spec, config)
    if spec.hi is None or tiles <= programs or tiles > MOST_SIMULATED:
        return least, 0
    lengths = [_blocks(spec, config, tile) + TILE_COST for tile in reversed(range(tiles_m))]
    sizes = [least * 2**n for n in range(5)] + [size * fitting for size in (1, 2, 4)]
    return dealt(lengths, pairs, programs, sizes, max(least, NEAR // bytes_a_pair), UNEVENNESS)


def _shares_bias(spec: AttentionSpec) -> bool:
    """Whether tiles of all batch entries read the same bias, and that of a head is too large to stay in the L2 cache by itself."""
    if spec.bias is None or all(spec.bias.varies[:2]) or not spec.bias.varies[4]:
        return False
    return spec.keys * (spec.queries if spec.bias.varies[3] else 1) * _bias_itemsize(spec) > RESIDENT_BIAS


def dealt(lengths: list[int], pairs: int, programs: int, sizes: list[int], near: int = 0, tolerance: float = 0.0) -> tuple[int, int]:
    """The most even ``(section, snake)`` of these sizes, the smallest if several are, for pairs whose tiles have these lengths, from what
    should be the longest to the shortest: of sections of at most ``near`` pairs, unless a larger one is better by more than the tolerance.
    """
    ways = [(section, snake) for section in sorted({equal_sections(pairs, size) for size in sizes}) for snake in (1, 0)]
    unevenness = {way: round(busiest(lengths, pairs, programs, *way), 2) for way in ways}
    best = min(ways, key=unevenness.__getitem__)
    closest = min((way for way in ways if way[0] <= near), key=unevenness.__getitem__, default=best)
    return closest if unevenness[closest] <= unevenness[best] + tolerance + 1e-9 else best


def equal_sections(pairs: int, most: int) -> int:
    """Sections of at most so many pairs, about equally large."""
    return -(-pairs // -(-pairs // most))


def _blocks(spec: AttentionSpec, config: HopperConfig, tile: int) -> int:
    """Key blocks that a query tile visits."""
    first, last = tile * config.block_m, min((tile + 1) * config.block_m, spec.queries) - 1
    end = spec.keys if spec.hi is None else max(0, min(last + spec.hi + 1, spec.keys))
    begin = 0 if spec.lo is None else max(0, first + spec.lo)
    return max(1, -(-end // config.block_n) - begin // config.block_n)


def busiest(lengths: list[int], pairs: int, programs: int, section: int, snake: int) -> float:
    """The most blocks that a program gets, over the mean."""
    load = [0.0] * programs
    sections = -(-pairs // section)
    at = 0
    for number in range(sections):
        size = min(section, pairs - number * section)
        for length in reversed(lengths) if (sections - 1 - number) % 2 else lengths:
            for _ in range(size):
                wave, place = divmod(at, programs)
                load[programs - 1 - place if wave & snake else place] += length
                at += 1
    return max(load) * programs / sum(load)


def reservation(spec: AttentionSpec) -> str | None:
    """Why the automatic choice does not take these kernels although they can run, or None if it does."""
    if spec.head_dim % 8 or spec.value_dim % 8:
        return "would copy tensors whose rows are no multiple of 16 bytes"
    if min(spec.queries, spec.keys) < SHORTEST:
        return f"costs the host more than it saves the GPU below {SHORTEST} queries or keys"
    return None


def whole_tiles(spec: AttentionSpec, config: HopperConfig) -> tuple[int, int]:
    """(query tiles of a (batch, head) pair, tiles of the whole problem)."""
    tiles = -(-spec.queries // config.block_m)
    return tiles, tiles * spec.batch * spec.heads
