"""Configurations of the Hopper backward kernels that hold scores in rows, ``dq`` and ``dbias``: shared memory, choice, and grids. Pure."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from ..errors import bad_value
from ..spec import AttentionSpec
from .configs import padded
from .hopper import HopperConfig, bias_bytes, is_light, mask_bytes, shared_limit, whole_tiles

__all__ = [
    "RowsConfig", "batch_fastest", "dbias_config", "dbias_places", "dbias_programs", "dbias_rounds", "dbias_shared_memory", "dbias_shuffle",
    "dbias_tiles", "dbias_works", "dq_config", "dq_programs", "dq_shared_memory", "slots_needed",
]  # fmt: skip

ROWS = 64  # queries of one consumer warpgroup
EMPTY_PLACE_COST = 0.05  # of passing over a place without a tile, in rounds
MOST_SIMULATED = 65536  # tiles; with more, any way of dealing them comes out even


@dataclass(frozen=True)
class RowsConfig(HopperConfig):
    """One launch configuration of ``dq`` or ``dbias``.

    dq: as in the forward kernel; num_stages are buffers for key blocks, v_stages, if not 0, those for value blocks, and ahead says that the
    last product of a block is issued behind the first two of the next, which takes registers and a second key buffer.

    dbias: num_stages are slots of ``chunk`` columns of keys or values, v_stages such of queries or their dout, and bias_stages the tiles
    whose bias has room; of the other fields only turns and together matter.
    """

    ahead: bool = True
    chunk: int = 64
    v_stages: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.consumers > 2:
            raise bad_value("consumers", "1 or 2", self.consumers)
        if self.chunk not in (16, 32, 64, 128):
            raise bad_value("chunk", "16, 32, 64 or 128", self.chunk)

    @property
    def value_stages(self) -> int:
        return self.v_stages or self.num_stages

    def __str__(self) -> str:
        flags = " turns" * self.turns + " ahead" * self.ahead + " own-out" * self.own_out + " persistent" * self.persistent
        flags += f" {self.together} together" * (self.together > 1)
        return f"{self.block_m}x{self.block_n} s{self.num_stages}/{self.value_stages} b{self.bias_stages} c{self.chunk}{flags}"


def dq_shared_memory(spec: AttentionSpec, config: RowsConfig, dbias: bool) -> int:
    """Bytes of shared memory of one program of ``dq``; ``dbias``: it also gives the gradient of a full-shape bias."""
    head, value = padded(spec.head_dim) * 2, padded(spec.value_dim) * 2
    queries = config.block_m * (head + value + head * config.own_out)
    keys = config.block_n * (config.num_stages * head + config.value_stages * value)
    one = bias_bytes(spec, config)
    bias = config.bias_stages * config.consumers * (one + mask_bytes(spec, config)) + one * (dbias and (_banded(spec) or spec.key_lengths))
    barriers = 8 * (config.consumers * (3 + 2 * config.bias_stages) + 2 * (config.num_stages + config.value_stages))
    return queries + keys + bias + barriers + 1024  # and what alignment of the buffers may cost


def _dq_candidates(head: int, bias: bool, light: bool) -> tuple[RowsConfig, ...]:
    """From the fastest to the smallest as reckoned, measured only up to d 32; the first that fits is taken.

    A key block is used for two steps when the last product lags behind, so there are three buffers for them. A bias tile's buffer is in use
    for longer where its gradient leaves through it.
    """
    if head <= 64:
        # d 32, the whole backward pass with large and small programs: triangle attention of 384 tokens 0.87 and 0.82 ms, s 512 causal
        # without a bias 0.62 and 0.57.
        small = (RowsConfig(1, 64, 3, 2 if bias else 1, v_stages=2, together=3),) if head <= 32 and light else ()
        if not bias:
            return (*small, RowsConfig(2, 128, 3, v_stages=2), RowsConfig(2, 64, 3, v_stages=2))
        return (*small, RowsConfig(2, 64, 3, 2, v_stages=2), RowsConfig(2, 64, 3, 1, v_stages=2))
    if head <= 128:
        stages = 2 if bias else 1
        return (
            RowsConfig(2, 64, 3, stages, v_stages=2),
            RowsConfig(2, 64, 3, stages, v_stages=2, own_out=False),
            RowsConfig(2, 64, 2, 1, own_out=False),
            RowsConfig(2, 32, 2, 1, own_out=False),
        )
    return (
        RowsConfig(2, 32, 3, 2 if bias else 1, v_stages=2, own_out=False),
        RowsConfig(2, 32, 3, 1, v_stages=2, own_out=False),
        RowsConfig(2, 32, 2, 1, own_out=False, ahead=False),
        RowsConfig(1, 32, 2, 1, own_out=False),
    )


@functools.lru_cache(maxsize=4096)
def dq_config(spec: AttentionSpec, limit: int, dbias: bool = False, processors: int = 0) -> RowsConfig | None:
    """The configuration of ``dq`` within ``limit`` bytes of shared memory, None if no candidate fits; few tiles are made of 64 queries."""
    for config in _dq_candidates(padded(max(spec.head_dim, spec.value_dim)), spec.bias is not None, is_light(spec)):
        if dq_shared_memory(spec, config, dbias) <= shared_limit(limit, config.together):
            return replace(config, consumers=1, together=1) if 2 * whole_tiles(spec, config)[1] <= processors else config
    return None


def dq_programs(spec: AttentionSpec, config: RowsConfig, processors: int) -> int:
    """How many programs ``dq`` starts."""
    tiles = whole_tiles(spec, config)[1]
    return min(tiles, processors * config.together) if config.persistent else tiles


def batch_fastest(spec: AttentionSpec) -> bool:
    """Whether neighbouring tiles should differ in the batch, because they share a bias then."""
    return spec.bias is not None and spec.batch > 1 and not all(spec.bias.varies[:2])


def dbias_works(spec: AttentionSpec) -> bool:
    """Whether ``dbias`` can give the gradient of the spec's bias: it varies over queries and keys, and broadcasts over something else."""
    return spec.bias is not None and not spec.bias.is_mask and spec.bias.varies[3] and spec.bias.varies[4] and not all(spec.bias.varies)


def dbias_shared_memory(spec: AttentionSpec, config: RowsConfig) -> int:
    """Bytes of shared memory of one program of ``dbias``."""
    rings = (config.num_stages * config.block_n + config.value_stages * config.block_m) * config.chunk * 2
    biases = config.bias_stages * config.consumers
    bias = (biases + _banded(spec)) * bias_bytes(spec, config)  # and zeros for what nobody sees
    barriers = 8 * (2 * (config.num_stages + config.value_stages + biases) + config.consumers)
    return rings + bias + barriers + 1024


def slots_needed(spec: AttentionSpec, chunk: int) -> int:
    """Chunks that must lie in either ring at the same time: the last of s and all of dp."""
    return 1 + -(-spec.value_dim // chunk)


@functools.lru_cache(maxsize=4096)
def dbias_config(spec: AttentionSpec, limit: int) -> RowsConfig | None:
    """The configuration of ``dbias`` within ``limit`` bytes of shared memory; None if no candidate fits.

    A wide tile matters most: what a round loads grows with the sum of its sides, what it multiplies with their product. Narrow heads have
    time to load more, and two programs of one consumer, of which one computes while the other waits, are up to 1.17 times as fast as one
    of two, but not beside a mask, which takes registers. Then, for heads whose tiles are short, a second buffer for the bias, if it leaves
    each ring four slots.
    """
    widest = padded(max(spec.head_dim, spec.value_dim))
    chunk = min(64, widest)
    least = slots_needed(spec, chunk)
    if spec.mask is None and max(spec.head_dim, spec.value_dim) <= 48:
        for slots in range(4, least - 1, -1):
            pair = RowsConfig(1, 128, slots, v_stages=slots, chunk=chunk, together=2)
            if dbias_shared_memory(spec, pair) <= shared_limit(limit, pair.together):
                return pair
    for consumers, block_n in ((2, 128), (2, 64), (1, 64), (1, 32)):
        for bias_stages in (2, 1) if widest <= 64 else (1,):
            for slots in range(16, 2 * (least if bias_stages == 1 else max(least, 4)) - 1, -1):  # of both rings
                config = RowsConfig(consumers, block_n, slots - slots // 2, bias_stages, v_stages=slots // 2, chunk=chunk)
                if dbias_shared_memory(spec, config) <= limit:
                    return config
    return None


def dbias_tiles(spec: AttentionSpec, config: RowsConfig) -> tuple[int, int, int]:
    """(query tiles, key tiles, tiles of the whole bias)."""
    assert spec.bias is not None
    tiles_m, tiles_n = -(-spec.queries // config.block_m), -(-spec.keys // config.block_n)
    own = tiles_m * tiles_n
    for size, varies in zip((spec.batch_outer, spec.batch_inner, spec.heads), spec.bias.varies[:3], strict=True):
        own *= size if varies else 1
    return tiles_m, tiles_n, own


def dbias_rounds(spec: AttentionSpec) -> int:
    """How many (batch, head) pairs a tile of the bias is summed over: the most that ``splits`` may be."""
    assert spec.bias is not None
    sizes = zip((spec.batch_outer, spec.batch_inner, spec.heads), spec.bias.varies[:3], strict=True)
    return math.prod(size for size, varies in sizes if not varies)


@functools.lru_cache(maxsize=4096)
def dbias_places(spec: AttentionSpec, config: RowsConfig) -> tuple[int, tuple[bool, ...]]:
    """(places of a row, whether each place for the tiles of a head has one that somebody sees): see ``_tile`` of the kernel."""
    tiles_m, tiles_n, _ = dbias_tiles(spec, config)
    seen = [_seen(spec, config, tm) for tm in range(tiles_m)]
    if spec.lo is not None or spec.hi is None:
        return tiles_n, tuple(begin <= tn < end for begin, end in seen for tn in range(tiles_n))
    ends = [0] * (tiles_m % 2) + [end for _, end in seen]
    pairs = list(zip(ends, reversed(ends), strict=True))[: len(ends) // 2]
    fold = max(1, *(sum(pair) for pair in pairs))
    return fold, tuple(column < own or column >= fold - opposite for own, opposite in pairs for column in range(fold))


@functools.lru_cache(maxsize=4096)
def dbias_programs(spec: AttentionSpec, config: RowsConfig, splits: int, processors: int) -> int:
    """How many programs ``dbias`` starts: as many as processors run at a time, or a few less where that deals tiles out more evenly.

    Under a band some places are empty, and a grid whose size has a divisor in common with the places of a row gives some programs the same
    columns, all long or all short, in every wave.
    """
    tiles = dbias_tiles(spec, config)[2] * splits
    processors *= config.together
    if tiles <= processors or not _banded(spec) or tiles > MOST_SIMULATED:
        return min(tiles, processors)
    return min(range(processors, max(0, processors - 4), -1), key=lambda programs: _best_shuffle(spec, config, splits, programs)[0])


def dbias_shuffle(spec: AttentionSpec, config: RowsConfig, splits: int, programs: int) -> int:
    """In which steps the places of a head are taken (``_tile`` of the kernel): that which gives the busiest program least work."""
    tiles = dbias_tiles(spec, config)[2] * splits
    if tiles <= programs or not _banded(spec) or tiles > MOST_SIMULATED:
        return 1
    return _best_shuffle(spec, config, splits, programs)[1]


@functools.lru_cache(maxsize=4096)
def _best_shuffle(spec: AttentionSpec, config: RowsConfig, splits: int, programs: int) -> tuple[float, int]:
    """(the most work that a program gets, shuffle)."""
    tiles_m, tiles_n, own = dbias_tiles(spec, config)
    rounds = dbias_rounds(spec) / splits
    cost = [rounds if full else EMPTY_PLACE_COST for full in dbias_places(spec, config)[1]]
    found = []
    for shuffle in (1, 3, 5, 7, 11, 13, 17, 19):
        if math.gcd(shuffle, len(cost)) == 1:
            work = [cost[place * shuffle % len(cost)] for place in range(len(cost))] * (own * splits // (tiles_m * tiles_n))
            found.append((round(max(sum(work[program::programs]) for program in range(programs)), 2), shuffle))
    return min(found)


def _seen(spec: AttentionSpec, config: RowsConfig, tm: int) -> tuple[int, int]:
    """Which tiles of keys some query of a tile of queries sees: (first, end)."""
    last = min((tm + 1) * config.block_m, spec.queries) - 1
    end = spec.keys if spec.hi is None else max(0, min(last + spec.hi + 1, spec.keys))
    begin = 0 if spec.lo is None else max(0, tm * config.block_m + spec.lo)
    return begin // config.block_n, -(-end // config.block_n)


def _banded(spec: AttentionSpec) -> bool:
    return spec.lo is not None or spec.hi is not None
