"""Configurations of the backward kernels for Hopper: what one holds, how much shared memory it takes, and which is used for what. Pure."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from ..errors import bad_value
from ..spec import AttentionSpec
from .configs import padded
from .hopper import L2_SECTION, MOST_SIMULATED, TILE_COST, busiest, dealt, is_light

__all__ = [
    "KeysConfig", "bias_slot_bytes", "dims", "has_bias_tiles", "head_splits", "keys_config", "keys_tiles", "schedule", "shared_memory",
    "stats_kinds", "stats_length",
]  # fmt: skip

NARROW = 128  # head dims up to which one kernel gives dk, dv and dq; above it ("wide") it gives dk and dv, of half as many keys
SMALLEST_DIM = 32  # narrower heads are padded, which costs no memory traffic
APART_DIM = 64  # head dims up to which there are registers for a warpgroup that computes dq
PART_COST = 4  # what partial sums of a tile's dk and dv cost, written and read, in blocks: 2 KB a key at d 128, at an H100's bandwidth
LAUNCH_COST = 2  # and one kernel more
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MANY_HEADS = 4  # query heads one after the other, with which programs that read the same ones drift apart under a band, out of L2's reach:
DRIFT = 1.1  # at d 128, eight were 7 to 14 % slower than two times four
WORTH_SPLITTING = 1.03  # how much more than the mean, or than when split, the busiest program must have to do


@dataclass(frozen=True)
class KeysConfig:
    """One configuration of the kernel that owns keys. block_m: queries of a block. Buffers for q, for dout and, per consumer, for the bias.

    wide: the kernel for head dims above 128, whose consumers share tiles of 64 keys; the others own 64 each. kv_stages: buffers for a
    tile's keys and values; with two, those of the next tile are fetched while this one is at work. apart: where dq is added up, a third
    warpgroup computes it; head dims up to APART_DIM. direct: it is added up straight from registers, else by TMA. unroll: blocks a step of
    the loop, of which each is started before the one before is done. head_splits: parts that the query heads of a key head are dealt out
    in, so that there are more tiles; each gives partial sums of dk and dv.
    """

    q_stages: int
    o_stages: int
    bias_stages: int = 1
    block_m: int = 64
    wide: bool = False
    kv_stages: int = 1
    apart: bool = False
    unroll: int = 1
    direct: bool = False
    head_splits: int = 1

    def __post_init__(self) -> None:
        most = 4 if self.wide else 2  # but in the wide kernel, each buffer has a barrier of the processor, of which there are 11 to spare
        for name in ("q_stages", "o_stages", "bias_stages", "kv_stages"):
            if not 1 <= getattr(self, name) <= most:
                raise bad_value(name, f"1 to {most}", getattr(self, name))
        ahead = self.q_stages > 1 and (self.o_stages > 1 or not self.apart)  # the next block's operands while this one's are in use
        if self.unroll not in ((1, 2, 4) if ahead else (1,)):
            raise bad_value("unroll", "1, or with two q_stages, and apart two o_stages, 2 or 4", self.unroll)
        if self.apart and self.direct:
            raise bad_value("direct", "False with apart", True, "the warpgroup that computes dq apart has time for TMA")
        if self.block_m != 64:
            raise bad_value("block_m", "64, which is what the layouts of the kernels are made for", self.block_m)
        if self.head_splits < 1:
            raise bad_value("head_splits", "at least 1", self.head_splits)
        extras = (self.bias_stages, self.kv_stages, self.apart, self.direct, self.unroll, self.head_splits)
        usual = self.o_stages == self.q_stages and extras == (1, 1, False, False, 1, 1)
        if self.wide and (self.q_stages < 2 or not usual):
            raise bad_value(
                "wide",
                "False for such a configuration",
                True,
                "that kernel has one buffer for a bias, and as many for dout as for q: two or more, else its consumers wait for each other",
            )

    @property
    def block_n(self) -> int:
        """Keys of a program's tile."""
        return 64 if self.wide else 128

    @property
    def num_warps(self) -> int:
        """Of the first consumer; the others are workers of a specialised kernel and bring their own."""
        return 4

    @property
    def num_stages(self) -> int:
        return self.q_stages

    def __str__(self) -> str:
        flags = " wide" * self.wide + f" kv{self.kv_stages}" * (self.kv_stages > 1)
        flags += " apart" * self.apart + " direct" * self.direct + f" u{self.unroll}" * (self.unroll > 1)
        flags += f" h{self.head_splits}" * (self.head_splits > 1)
        return f"{self.block_m}x{self.block_n} s{self.q_stages}/{self.o_stages} b{self.bias_stages}{flags}"


def dims(spec: AttentionSpec) -> tuple[int, int]:
    """Head dims of q and k, and of v, as the kernel pads them: above 128 alike."""
    head, value = max(SMALLEST_DIM, padded(spec.head_dim)), max(SMALLEST_DIM, padded(spec.value_dim))
    widest = max(head, value)
    return (widest, widest) if widest > NARROW else (head, value)


def stats_kinds(spec: AttentionSpec) -> int:
    """Rows of the table of statistics: lse, delta and, where there is one, rest."""
    return 3 if spec.keeps_rest else 2


def stats_length(spec: AttentionSpec) -> int:
    """Columns of the table: queries, rounded up to what every tile divides."""
    return -(-spec.queries // 128) * 128


def bias_slot_bytes(spec: AttentionSpec, config: KeysConfig) -> int:
    """Bytes of one buffer for tiles of a bias and of a mask beside it, of which each consumer that scores has some; none where neither
    varies over both queries and keys.
    """
    tiled = (each for each in (spec.bias, spec.mask) if each is not None and each.varies[3] and each.varies[4])
    return sum(config.block_m * 64 * {"bool": 1, "fp32": 4}.get(each.dtype, 2) for each in tiled)


def has_bias_tiles(spec: AttentionSpec) -> bool:
    """Whether there is a tile of a bias, or of a mask beside it, a block."""
    return bias_slot_bytes(spec, KeysConfig(1, 1)) > 0


def shared_memory(spec: AttentionSpec, config: KeysConfig, adds_dq: bool, dbias: bool = False) -> int:
    """Bytes of shared memory of one program; ``dbias``: it also gives the gradient of a bias that varies over keys alone."""
    head, value = dims(spec)
    stages = config.q_stages * (2 * head + 4 * (stats_kinds(spec) - 1)) + config.o_stages * (2 * value + 4)
    scoring = 1 if config.wide else 2
    total = (
        config.kv_stages * config.block_n * 2 * (head + value)
        + config.block_m * stages
        + scoring * config.bias_stages * bias_slot_bytes(spec, config)
    )
    if config.wide:
        total += (4 if dbias and spec.softcap else 2) * config.block_m * config.block_n * 2  # of p, or of p and what it is multiplied to
    elif adds_dq:
        buffers = 0 if config.direct else 2 if config.apart else 1
        total += 2 * config.block_m * config.block_n * 2 + buffers * config.block_m * head * 4
    barriers = 8 + 2 * (config.kv_stages + config.q_stages + config.o_stages) + 4 * config.bias_stages
    return total + 8 * barriers + 1024  # and what alignment may cost


def _candidates(spec: AttentionSpec, adds_dq: bool, dbias: bool) -> tuple[KeysConfig, ...]:
    """From the fastest measured to the smallest (docs/tuning.md)."""
    widest, bias_tiles = max(dims(spec)), has_bias_tiles(spec)
    if widest > NARROW:
        return (KeysConfig(2, 2, wide=True),)
    if widest <= APART_DIM:
        bias = 2 if bias_tiles else 1
        apart: tuple[KeysConfig, ...] = ()
        if adds_dq and (is_light(spec) or not dbias):
            banded = spec.lo is not None or spec.hi is not None
            unroll = 2 if is_light(spec) and not dbias and not (banded and bias_tiles) else 1  # what is not light takes registers
            apart = tuple(KeysConfig(2, 2, bias, kv_stages=kv, apart=True, unroll=unroll) for kv in (2, 1))
        kept = 1 if adds_dq else bias  # one consumer tells the other of ds at the barriers that a second buffer would want
        return (*apart, KeysConfig(2, 2, kept, kv_stages=2), KeysConfig(2, 2, kept), KeysConfig(2, 2), KeysConfig(1, 1))
    plain = adds_dq and is_light(spec) and spec.bias is None and spec.mask is None  # for what adds straight from registers takes some
    direct = (KeysConfig(2, 2, direct=True),) if plain else ()
    return (*direct, KeysConfig(2, 2, kv_stages=2), KeysConfig(2, 2), KeysConfig(2, 1), KeysConfig(1, 1))


@functools.lru_cache(maxsize=4096)
def keys_config(spec: AttentionSpec, adds_dq: bool, limit: int, dbias: bool = False) -> KeysConfig | None:
    """The first candidate that fits ``limit`` bytes of shared memory, or None."""
    for config in _candidates(spec, adds_dq, dbias):
        if shared_memory(spec, config, adds_dq, dbias) <= limit:
            return config
    return None


def keys_tiles(spec: AttentionSpec, config: KeysConfig) -> tuple[int, int]:
    """(key tiles of a (batch, key head) pair, tiles of the whole problem, whose ``head_splits`` count)."""
    tiles = -(-spec.keys // config.block_n)
    return tiles, tiles * spec.batch * spec.kv_heads * config.head_splits


def head_splits(spec: AttentionSpec, config: KeysConfig, processors: int) -> int:
    """In how many parts the query heads of a key head should be dealt out: as many as give the busiest processor clearly less to do, with
    partial sums paid for. At most half as many as there are heads, so that the sums are no larger than a float32 dq.
    """
    if spec.groups < 4 or config.wide or spec.is_empty:
        return 1
    costs: dict[int, float] = {}
    for splits in SPLITS:
        way = replace(config, head_splits=splits)
        if 2 * splits > max(2, spec.groups) or keys_tiles(spec, way)[1] > MOST_SIMULATED:
            break
        costs[splits], unevenness = _busiest(spec, way, processors)
        if splits == 1 and unevenness < WORTH_SPLITTING:
            break
    best = min(costs, key=lambda splits: (costs[splits], splits), default=1)
    return best if best > 1 and WORTH_SPLITTING * costs[best] + LAUNCH_COST < costs[1] else 1


@functools.lru_cache(maxsize=4096)
def schedule(spec: AttentionSpec, config: KeysConfig, programs: int) -> tuple[int, int]:
    """``(section, snake)`` as of the forward kernel; what tiles share here is the queries and their gradients."""
    tiles_n, tiles = keys_tiles(spec, config)
    if (spec.hi is None and spec.lo is None) or tiles <= programs or tiles > MOST_SIMULATED:
        return 1, 0
    return dealt(_lengths(spec, config), tiles // tiles_n, programs, [_fitting(spec, config) * n for n in (1, 2, 4)])


def _fitting(spec: AttentionSpec, config: KeysConfig) -> int:
    """Pairs of batch and key head (or part of one) whose queries and gradients fit in L2 together."""
    bytes_a_pair = -(-spec.groups // config.head_splits) * spec.queries * (3 * spec.head_dim + spec.value_dim) * 2
    return max(1, L2_SECTION // max(1, bytes_a_pair))


def _busiest(spec: AttentionSpec, config: KeysConfig, programs: int) -> tuple[float, float]:
    """What the busiest of so many programs has to do, in blocks and over the mean; what it takes longer than that for counts, too."""
    tiles_n, tiles = keys_tiles(spec, config)
    lengths, pairs = _lengths(spec, config), tiles // tiles_n
    mean = sum(lengths) * pairs / programs
    if (spec.hi is None and spec.lo is None) or tiles <= programs:
        ratio = max(lengths) * -(-tiles // programs) / mean
    else:
        ratio = busiest(lengths, pairs, programs, *schedule(spec, config, programs))
        if config.direct and spec.groups > MANY_HEADS * config.head_splits:
            ratio *= DRIFT
    return ratio * mean, ratio


def _lengths(spec: AttentionSpec, config: KeysConfig) -> list[int]:
    """What the key tiles of a pair cost, in blocks, from what should be the longest to the shortest."""
    cost = TILE_COST + PART_COST * (config.head_splits > 1)
    lengths = [-(-spec.groups // config.head_splits) * _blocks(spec, config, tile) + cost for tile in range(keys_tiles(spec, config)[0])]
    return lengths if spec.hi is not None else lengths[::-1]


def _blocks(spec: AttentionSpec, config: KeysConfig, tile: int) -> int:
    """Query blocks that a key tile visits."""
    first, last = tile * config.block_n, min((tile + 1) * config.block_n, spec.keys) - 1
    begin = 0 if spec.hi is None else max(0, first - spec.hi)
    end = spec.queries if spec.lo is None else max(0, min(last - spec.lo + 1, spec.queries))
    return max(0, -(-end // config.block_m) - begin // config.block_m)
