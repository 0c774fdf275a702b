"""The kernels for dk and dv on Hopper, which may sum dq too (``kernels/hopper/dkdv.py``, ``dkdv_d256.py``).

Called by ``plan/hopper.py``. Pure.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...errors import bad_value
from ...spec import AttentionSpec, BiasSpec
from ..configs import chosen, padded
from ..device import DeviceFacts
from ..steps import Step, broadcast_rows, ceil_div
from .shared import (
    L2_GROUP_BYTES,
    MAX_SIMULATED_TILES,
    MOST_PIECES,
    ROWS,
    TILE_COST,
    Buffer,
    HopperConfig,
    barriers,
    best_order,
    blocks_of_heads,
    check_held,
    ends_within,
    is_banded,
    is_light,
    load_imbalance,
    multiplied_columns,
    order_of,
    row_buffers,
    span,
    stats_kinds,
    takes_own_widths,
    widths,
)

__all__ = [
    "DQ_WARPGROUP_DIM", "MOST_DQ_BLOCKS", "NARROW", "DkdvConfig", "choose", "dims", "has_bias_tiles", "head_splits", "key_tiles",
    "l2_order", "of_pairs", "row_of_keys", "step", "sums_by_mma", "sums_dq_by_hand",
]  # fmt: skip

NARROW = 128  # head dims up to which one kernel gives dk, dv and dq; above, dkdv_d256 gives dk and dv, of half as many keys
SMALLEST_DIM = 32  # narrower heads are padded, which costs no memory traffic
DQ_WARPGROUP_DIM = 64  # head dims up to which there are registers for a warpgroup that computes dq
PART_COST = 4  # blocks, to write and read partial sums of a tile's dk and dv: 2 KB a key at d 128, at an H100's bandwidth
LAUNCH_COST = 2  # blocks, of one kernel more
MOST_DQ_BLOCKS = 16  # 1,024 queries, for which head dims up to 32 have room
LEAST_SCORES = 2**22  # of all heads, below which a step waits for the host
IMBALANCE = 1.05  # of programs that have whole pairs, over those that have tiles: what no sum of dq in global memory is worth
SHORT_IMBALANCE = 1.15  # where else a kernel of its own would give dq: of up to SHORT_KEYS keys at head dims above 32, without bias tiles
SHORT_KEYS = 511
LEAST_SPAN = 1024  # keys that a query sees at most, up to which two blocks a step were no slower under a band at head dims up to 32
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MANY_HEADS = 4  # query heads in a row; with more, programs that read the same heads fall out of step under a band, out of L2's reach:
DRIFT = 1.1  # at d 128, eight were 7 to 14 % slower than two times four
HELD = 192  # registers of sums, scores and a left operand, beside which nothing is spilled
WORTH_SPLITTING = 1.03  # load imbalance, or gain over no split, from which a split pays


@dataclass(frozen=True)
class DkdvConfig(HopperConfig):
    """One configuration of the kernels that own keys.

    q_stages, o_stages: buffers for Q blocks and for dO blocks. bias_stages: bias tiles per consumer. block_m: queries of a block. d256: the
    kernel for head dims above 128, whose consumers share tiles of 64 keys; else each owns 64. kv_stages: buffers for a tile's K and V; with
    two, those of the next tile are fetched meanwhile. dq_warpgroup: where dq is summed, a third warpgroup computes it; head dims up to
    DQ_WARPGROUP_DIM. unroll: blocks a step of the loop, of which each starts before the one before is done. red_dq: dq is summed by
    red.global from registers, else by TMA. dq_blocks: with dq_warpgroup, blocks of queries whose dq is summed in shared memory by a program
    that has all key tiles of a (batch, head) pair; 0: in global memory. head_splits: parts that the query heads of a key head are dealt out
    in, for more tiles; each gives partial sums of dk and dv. Of d256 alone: p_stages, buffers for p on its way from one consumer to the
    other; own_widths, as of the forward kernel; hold_k, hold_v: a tile's k or v is read from registers. Its block_m may be 128.
    """

    q_stages: int
    o_stages: int
    bias_stages: int = 1
    block_m: int = 64
    d256: bool = False
    kv_stages: int = 1
    dq_warpgroup: bool = False
    unroll: int = 1
    red_dq: bool = False
    head_splits: int = 1
    p_stages: int = 2
    dq_blocks: int = 0
    own_widths: bool = False
    hold_k: bool = False
    hold_v: bool = False

    SOURCE = "the first candidate that fits, of plan/kernels/dkdv.py"

    def __post_init__(self) -> None:
        most = 4 if self.d256 else 2  # but in dkdv_d256, each buffer has a named barrier, of which there are 11 to spare
        for name in ("q_stages", "o_stages", "bias_stages", "kv_stages"):
            if not 1 <= getattr(self, name) <= most:
                raise bad_value(name, f"1 to {most}", getattr(self, name))
        next_fits = self.q_stages > 1 and (self.o_stages > 1 or not self.dq_warpgroup)  # its operands, while this block's are in use
        if self.unroll not in ((1, 2, 4) if next_fits else (1,)):
            raise bad_value("unroll", "1, or with two q_stages, and dq_warpgroup two o_stages, 2 or 4", self.unroll)
        if self.dq_warpgroup and self.red_dq:
            raise bad_value("red_dq", "False with dq_warpgroup", True, "a warpgroup of its own has time for TMA")
        if not 0 <= self.dq_blocks <= MOST_DQ_BLOCKS or (self.dq_blocks and not (self.dq_warpgroup and self.head_splits == 1)):
            raise bad_value("dq_blocks", f"0, or with dq_warpgroup and without head_splits up to {MOST_DQ_BLOCKS}", self.dq_blocks)
        if self.block_m not in ((64, 128) if self.d256 else (64,)):
            raise bad_value("block_m", "64, or with d256 128, which is what the layouts of the kernels are made for", self.block_m)
        if self.p_stages not in (1, 2):
            raise bad_value("p_stages", "1 or 2", self.p_stages)
        if not self.d256 and (self.p_stages, self.own_widths, self.hold_k, self.hold_v) != (2, False, False, False):
            raise bad_value("d256", "True for p_stages, own_widths, hold_k and hold_v", False)
        if self.head_splits < 1:
            raise bad_value("head_splits", "at least 1", self.head_splits)
        extras = (self.bias_stages, self.kv_stages, self.dq_warpgroup, self.red_dq, self.unroll, self.head_splits)
        usual = self.o_stages == self.q_stages and extras == (1, 1, False, False, 1, 1)
        if self.d256 and (self.q_stages < 2 or not usual):
            why = "that kernel has one buffer for a bias, and as many for dO as for Q: two or more, else its consumers wait for each other"
            raise bad_value("d256", "False for such a configuration", True, why)

    @property
    def block_n(self) -> int:
        """Keys of a CTA's tile."""
        return 64 if self.d256 else 128

    @property
    def num_stages(self) -> int:
        return self.q_stages

    def __str__(self) -> str:
        flags = " d256" * self.d256 + f" kv{self.kv_stages}" * (self.kv_stages > 1)
        flags += " dq-warpgroup" * self.dq_warpgroup + " red-dq" * self.red_dq + f" u{self.unroll}" * (self.unroll > 1)
        flags += (
            f" smem-dq{self.dq_blocks}" * (self.dq_blocks > 0)
            + f" h{self.head_splits}" * (self.head_splits > 1)
            + f" p{self.p_stages}" * (self.p_stages != 2)
        )
        flags += " own-widths" * self.own_widths + " hold-k" * self.hold_k + " hold-v" * self.hold_v
        return f"{self.block_m}x{self.block_n} s{self.q_stages}/{self.o_stages} b{self.bias_stages}{flags}"

    def widths(self, dim: int, padding: int) -> tuple[int, ...]:
        """Columns of the buffers of a head's blocks, which without ``own_widths`` has ``padding`` of them."""
        return widths(max(SMALLEST_DIM, dim), True) if self.own_widths else (padding,)

    def buffers(self, spec: AttentionSpec, gives: tuple[str, ...] = ()) -> tuple[Buffer, ...]:
        head, value = (
            self.widths(dim, padding) for dim, padding in zip((spec.head_dim, spec.value_dim), dims(spec, self.own_widths), strict=True)
        )
        rows = self.block_m
        consumers = 1 if self.d256 else 2  # that score, and so have bias tiles
        rest = self.q_stages * (stats_kinds(spec) == 3)
        loaded = (
            *blocks_of_heads("q", self.q_stages, rows, head),
            *blocks_of_heads("dout", self.o_stages, rows, value),
            *blocks_of_heads("k", self.kv_stages, self.block_n, head),
            *blocks_of_heads("v", self.kv_stages, self.block_n, value),
            Buffer("lse", self.q_stages, (rows,), 4),
            Buffer("delta", self.o_stages, (rows,), 4),
            Buffer("rest", rest, (rows,), 4),
            *(Buffer(name, consumers * self.bias_stages, (rows, 64), itemsize) for name, itemsize in _tiled(spec)),
        )
        stages = 2 * self.kv_stages, self.q_stages, self.o_stages
        if self.d256:  # p, and p times the derivative of the scores if the gradient of a bias wants it without
            tiles = self.p_stages * (2 if _sums_keys(gives) and spec.softcap else 1)
            return (*loaded, Buffer("p", tiles, (rows, 64), 2), barriers(*stages, self.q_stages, self.o_stages, 2 * self.p_stages, 2))
        adding = "dq" in gives
        tma = 0 if self.red_dq or not adding else 4 if self.dq_warpgroup else 2
        return (
            *loaded,
            Buffer("ds", 4 * adding, (64, 64), 2),
            Buffer("dq", 2 * self.dq_blocks or tma, (64, head[0] // 2), 4),
            *row_buffers(spec, 2, 64),
            barriers(*stages, 2 * self.bias_stages, 2, 2, 1),
        )

    def reads_small_lse(self, spec: AttentionSpec) -> bool:
        return not self.d256 or spec.bias is None or spec.bias.is_mask  # beside a bias d256's loop is no faster for it


def row_of_keys(spec: AttentionSpec) -> tuple[str, BiasSpec] | None:
    """The bias over keys alone, and the name of its gradient, which the kernel gives: a row of sums a (batch, head) pair."""
    if spec.bias is not None:  # without one there is no second
        for name, bias in (("dbias", spec.bias), ("dsecond", spec.second)):
            if bias is not None and bias.varies[4] and not bias.varies[3]:
                return name, bias
    return None


def sums_by_mma(spec: AttentionSpec) -> bool:
    """Whether the kernel sums that gradient up from ds of 16 bits, beside a bias of tiles: where the bias has as few, and ds float32's
    range. A soft cap's is of another ds.
    """
    row = row_of_keys(spec)
    return spec.second is not None and not spec.softcap and row is not None and spec.dtype == row[1].dtype == "bf16"


def _sums_keys(gives: tuple[str, ...]) -> bool:
    return "dbias" in gives or "dsecond" in gives


def dims(spec: AttentionSpec, own_widths: bool = False) -> tuple[int, int]:
    """Head dims of q and k, and of v, as the kernel pads them: above 128 alike, but where blocks have their own widths."""
    return _padded_alike(spec.head_dim, spec.value_dim, own_widths)


@functools.cache  # a plan asks a dozen times
def _padded_alike(head_dim: int, value_dim: int, own_widths: bool) -> tuple[int, int]:
    head, value = max(SMALLEST_DIM, padded(head_dim)), max(SMALLEST_DIM, padded(value_dim))
    widest = max(head, value)
    return (widest, widest) if widest > NARROW and not own_widths else (head, value)


def _tiled(spec: AttentionSpec) -> list[tuple[str, int]]:
    """(name, bytes an element) of a bias, and of a mask beside it, that has a tile a block: it varies over queries and keys."""
    both = (("bias", spec.bias), ("mask", spec.mask))
    return [
        (name, {"bool": 1, "fp32": 4}.get(each.dtype, 2)) for name, each in both if each is not None and each.varies[3] and each.varies[4]
    ]


def has_bias_tiles(spec: AttentionSpec) -> bool:
    """Whether there is a tile of a bias, or of a mask beside it, a block."""
    return bool(_tiled(spec))


def _candidates(spec: AttentionSpec, gives: tuple[str, ...]) -> tuple[DkdvConfig, ...]:
    """From the fastest measured to the smallest (docs/tuning.md)."""
    if max(dims(spec)) > NARROW:
        whole = DkdvConfig(2, 2, d256=True)
        if not takes_own_widths(spec):
            return (whole,)
        own = _holding(spec, replace(whole, own_widths=True))
        return (*((replace(own, q_stages=3, o_stages=3),) if own.hold_k and own.hold_v else ()), own, whole)
    bare = spec.bias is None and spec.mask is None
    return _listed(max(dims(spec)), has_bias_tiles(spec), bare, is_light(spec), is_banded(spec), "dq" in gives, _sums_keys(gives))


@functools.cache
def _listed(widest: int, bias_tiles: bool, bare: bool, light: bool, banded: bool, adding: bool, dbias: bool) -> tuple[DkdvConfig, ...]:
    if widest <= DQ_WARPGROUP_DIM:
        bias = 2 if bias_tiles else 1
        of_its_own: tuple[DkdvConfig, ...] = ()
        if adding and (light or not dbias):
            short = light and not (banded and bias_tiles)  # what is not light takes registers
            unroll = 2 if short and not dbias else 1
            of_its_own = tuple(DkdvConfig(2, 2, bias, kv_stages=kv, dq_warpgroup=True, unroll=unroll) for kv in (2, 1))
        kept = 1 if adding else bias  # dS is announced at the named barriers that a second buffer would want
        return (*of_its_own, DkdvConfig(2, 2, kept, kv_stages=2), DkdvConfig(2, 2, kept), DkdvConfig(2, 2), DkdvConfig(1, 1))
    plain = adding and light and bare  # red.global takes registers
    red_dq = (DkdvConfig(2, 2, red_dq=True),) if plain else ()
    return (*red_dq, DkdvConfig(2, 2, kv_stages=2), DkdvConfig(2, 2), DkdvConfig(2, 1), DkdvConfig(1, 1))


def _holding(spec: AttentionSpec, config: DkdvConfig) -> DkdvConfig:
    """The configuration of d256 with k and v in registers where they are left, so that nothing is spilled."""
    head, value = (multiplied_columns(dim, padding) for dim, padding in zip((spec.head_dim, spec.value_dim), dims(spec), strict=True))

    def fits(accumulated: int, dim: int, held: int) -> bool:
        return held.bit_count() <= MOST_PIECES and sum(widths(dim, True)) // 2 + accumulated + held // 4 <= HELD

    hold_k, hold_v = fits(config.block_m, spec.value_dim, head), fits(config.block_m, spec.head_dim, value)
    return replace(config, hold_k=hold_k, hold_v=hold_v)


@functools.lru_cache(maxsize=4096)
def choose(spec: AttentionSpec, limit: int, gives: tuple[str, ...]) -> DkdvConfig | None:
    """The first candidate that fits ``limit`` bytes of shared memory, or None; ``gives``: with "dq", the gradient of a bias, or neither."""
    for config in _candidates(spec, gives):
        if config.shared_memory(spec, gives) <= limit:
            return config
    return None


def of_pairs(spec: AttentionSpec, device: DeviceFacts, by_hand: Mapping[str, object], gives: tuple[str, ...]) -> DkdvConfig | None:
    """The configuration that sums dq up in shared memory, as ``kernels/hopper/dq_of_pairs.py``: what is chosen by hand, else the first that
    fits, where whole (batch, head) pairs keep SMs about as busy as their tiles do. None: another way is taken.
    """
    config = chosen(by_hand, "dqdkdv", DkdvConfig)
    if config is not None:
        return config if config.dq_blocks else None
    blocks = ceil_div(spec.queries, ROWS)
    if spec.groups > 1 or spec.is_empty or max(dims(spec)) > DQ_WARPGROUP_DIM or blocks > MOST_DQ_BLOCKS:
        return None
    pairs, tiles = spec.batch * spec.heads, ceil_div(spec.keys, 128)
    short = max(dims(spec)) > SMALLEST_DIM and spec.keys <= SHORT_KEYS and not has_bias_tiles(spec)
    waves, waves_of_tiles = ceil_div(pairs, device.sms), ceil_div(pairs * tiles, device.sms)
    if waves * tiles > (SHORT_IMBALANCE if short else IMBALANCE) * waves_of_tiles or pairs * spec.queries * spec.keys < LEAST_SCORES:
        return None
    own = tuple(name for name in gives if name in ("dq", "dbias", "dsecond"))
    for config in _candidates(spec, own):
        for unit in (4, 2, 1):  # room for more than there are where it fits: lengths near each other share a kernel
            way = replace(config, dq_blocks=ceil_div(blocks, unit) * unit) if config.dq_warpgroup else config
            if way.dq_blocks and way.shared_memory(spec, own) <= device.shared_memory:
                return way
    return None


def key_tiles(spec: AttentionSpec, config: DkdvConfig) -> tuple[int, int]:
    """(key tiles of a (batch, key head) pair, tiles of the whole problem, whose ``head_splits`` count)."""
    tiles = -(-spec.keys // config.block_n)
    return tiles, tiles * spec.batch * spec.kv_heads * config.head_splits


def head_splits(spec: AttentionSpec, config: DkdvConfig, sms: int) -> int:
    """In how many parts the query heads of a key head are dealt out: as many as give the busiest SM clearly less to do, with partial sums
    paid for. At most half as many as there are heads, so that the sums are no larger than a float32 dq.
    """
    if spec.groups < 4 or config.d256 or spec.is_empty:
        return 1
    costs: dict[int, float] = {}
    for splits in SPLITS:
        way = replace(config, head_splits=splits)
        if 2 * splits > max(2, spec.groups) or key_tiles(spec, way)[1] > MAX_SIMULATED_TILES:
            break
        costs[splits], imbalance = _heaviest(spec, way, sms)
        if splits == 1 and imbalance < WORTH_SPLITTING:
            break
    best = min(costs, key=lambda splits: (costs[splits], splits), default=1)
    return best if best > 1 and WORTH_SPLITTING * costs[best] + LAUNCH_COST < costs[1] else 1


@functools.lru_cache(maxsize=4096)
def l2_order(spec: AttentionSpec, config: DkdvConfig, programs: int) -> tuple[int, int]:
    """``(l2_group, serpentine)`` as of the forward kernel; what tiles share here is the queries and their gradients. Programs that have
    whole pairs do not ask for it (``schedule.Pairs``).
    """
    tiles_n, tiles = key_tiles(spec, config)
    if config.dq_blocks or not is_banded(spec) or tiles <= programs or tiles > MAX_SIMULATED_TILES:
        return 1, 0
    return best_order(_lengths(spec, config), tiles // tiles_n, programs, [_fitting(spec, config) * n for n in (1, 2, 4)])


def _fitting(spec: AttentionSpec, config: DkdvConfig) -> int:
    """Pairs of batch and key head (or part of one) whose queries and gradients fit in L2 together."""
    pair_bytes = -(-spec.groups // config.head_splits) * spec.queries * (3 * spec.head_dim + spec.value_dim) * 2
    return max(1, L2_GROUP_BYTES // max(1, pair_bytes))


def _heaviest(spec: AttentionSpec, config: DkdvConfig, programs: int) -> tuple[float, float]:
    """The load of the busiest program, in blocks and over the mean, drift of programs out of L2's reach included."""
    tiles_n, tiles = key_tiles(spec, config)
    lengths, pairs = _lengths(spec, config), tiles // tiles_n
    mean = sum(lengths) * pairs / programs
    if not is_banded(spec) or tiles <= programs:
        ratio = max(lengths) * -(-tiles // programs) / mean
    else:
        ratio = load_imbalance(lengths, pairs, programs, *l2_order(spec, config, programs))
        if config.red_dq and spec.groups > MANY_HEADS * config.head_splits:
            ratio *= DRIFT
    return ratio * mean, ratio


def _lengths(spec: AttentionSpec, config: DkdvConfig) -> list[int]:
    """What the key tiles of a pair cost, in blocks, from what should be the longest to the shortest."""
    cost = TILE_COST + PART_COST * (config.head_splits > 1)
    heads = -(-spec.groups // config.head_splits)
    lengths = [heads * blocks + cost for blocks in _query_blocks(spec, config)]
    return lengths if spec.hi is not None else lengths[::-1]


def _query_blocks(spec: AttentionSpec, config: DkdvConfig) -> list[int]:
    """Query blocks that each key tile visits."""
    rows, columns, queries, keys, lo, hi = config.block_m, config.block_n, spec.queries, spec.keys, spec.lo, spec.hi
    firsts = range(0, keys, columns)
    ends = [queries] * len(firsts) if lo is None else ends_within(firsts, columns, keys, -lo, queries)
    if hi is None:
        return [-(-end // rows) for end in ends]
    return [max(0, -(-end // rows) - max(0, first - hi) // rows) for first, end in zip(firsts, ends, strict=True)]


def _check(spec: AttentionSpec, config: DkdvConfig, adding: bool) -> None:
    """Raise ValueError where a configuration chosen by hand is none for the spec."""
    widest, sizes = max(dims(spec)), f"head dims {spec.head_dim} and {spec.value_dim}"
    if config.d256 != (widest > NARROW):
        raise bad_value("d256", f"{not config.d256} for {sizes}", config.d256)
    check_held("hold_k", config.hold_k, spec.head_dim)
    check_held("hold_v", config.hold_v, spec.value_dim)
    if config.dq_warpgroup and widest > DQ_WARPGROUP_DIM:
        raise bad_value("dq_warpgroup", f"False for {sizes}", True, "there are no registers for it")
    if adding and not config.dq_warpgroup and config.bias_stages > 1:
        raise bad_value("bias_stages", "1, or 2 with dq_warpgroup", config.bias_stages, "there are no named barriers for more")
    if config.dq_blocks and (not adding or spec.groups > 1 or spec.queries > ROWS * config.dq_blocks):
        raise bad_value("dq_blocks", f"0, or for dq of up to {ROWS} queries each, without grouped heads", config.dq_blocks)
    if config.head_splits > spec.groups:
        raise bad_value("head_splits", f"at most {spec.groups}, the query heads of a key head", config.head_splits)


def sums_dq_by_hand(by_hand: Mapping[str, object]) -> bool:
    """Whether the caller asks for the kernel that sums dq, by its configuration."""
    return chosen(by_hand, "dqdkdv", DkdvConfig) is not None


def step(
    spec: AttentionSpec, device: DeviceFacts, by_hand: Mapping[str, object], gives: tuple[str, ...], pairs: DkdvConfig | None = None
) -> Step:
    """The kernel, with its grid, for what a plan of ``plan/hopper.py`` asks of it: called "dqdkdv" where it gives dq too. pairs: see
    :func:`of_pairs`.
    """
    kernel = "dqdkdv" if "dq" in gives else "dkdv"
    config = chosen(by_hand, kernel, DkdvConfig)
    if config is not None:
        _check(spec, config, "dq" in gives)
        if config.dq_blocks and pairs is None:
            raise bad_value("dq_blocks", "0 for packed sequences", config.dq_blocks)
    elif pairs is not None:
        config = pairs
    else:
        found = choose(spec, device.shared_memory, tuple(name for name in gives if name in ("dq", "dbias", "dsecond")))
        assert found is not None, "why_not_backward refuses what fits no candidate"
        if found.unroll == 2 and max(dims(spec)) <= SMALLEST_DIM and is_banded(spec) and span(spec) > LEAST_SPAN:
            found = replace(found, unroll=1)  # 0.92 to 0.97 of the time (H200; docs/tuning.md)
        splits = head_splits(spec, found, device.sms)
        config = found if splits == found.head_splits else replace(found, head_splits=splits)
    tiles_n, tiles = key_tiles(spec, config)
    programs = min(tiles // tiles_n if config.dq_blocks else tiles, device.sms)
    row = row_of_keys(spec)
    rows = broadcast_rows(spec, row[1]) if row is not None and row[0] in gives else 1
    return Step(kernel, config, programs, order_of(spec), rows, gives)
