"""The kernel for dbias on Hopper (``kernels/hopper/dbias.py``), of a bias that broadcasts over batch or heads.

Called by ``plan/hopper.py``. Pure.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...errors import bad_value
from ...spec import AttentionSpec, Packed
from ..configs import chosen, padded
from ..device import DeviceFacts
from ..steps import Step, broadcast_rows, ceil_div
from .parts import dbias_sum_steps
from .shared import Buffer, QueryConfig, barriers, bias_buffer, is_banded, order_of, row_buffers, second_buffer

__all__ = [
    "DbiasConfig", "bias_tiles", "choose", "of_packed", "owns_dbias", "places", "programs", "shuffle", "slots_needed", "steps",
    "takes_packed", "why_not",
]  # fmt: skip

EMPTY_PLACE_COST = 0.05  # of passing over a place without a tile, in rounds
PART_COST = 4  # rounds, to write a tile's partial sum and to read it again
MOST_WAVES = 3  # of tiles that are cut into parts: more even out little, and each takes room
MAX_SIMULATED_TILES = 65536  # with more tiles every order comes out even
SHUFFLES = (1, 3, 5, 7, 11, 13, 17, 19)
SHUFFLES_OF_PACKED = (1, 5, 11)  # fewer, as each takes some 0.3 ms
SEQUENCES, MOST_PLACES = 16, 8192  # that stand for any number of sequences, and for more places


@dataclass(frozen=True)
class DbiasConfig(QueryConfig):
    """One configuration of the kernel for dbias.

    consumers: warpgroups of 64 queries each. block_n: keys of a tile. key_slots: buffers of ``chunk`` columns of K or V. query_slots:
    buffers of ``chunk`` columns of Q or dO. bias_stages: bias tiles per consumer. ping_pong, ctas_per_sm: as of the forward kernel.
    """

    consumers: int
    block_n: int
    key_slots: int
    query_slots: int
    bias_stages: int = 1
    chunk: int = 64
    ping_pong: bool = False
    ctas_per_sm: int = 1

    SOURCE = "the first candidate that fits, of plan/kernels/dbias.py"

    def __post_init__(self) -> None:
        self.require(consumers=(1, 2), block_n=(16, 32, 64, 128, 256), bias_stages=(1, 2, 3, 4), ctas_per_sm=(1, 2, 3, 4))
        self.require(chunk=(16, 32, 64, 128))
        for name in ("key_slots", "query_slots"):
            if getattr(self, name) < 1:
                raise bad_value(name, "at least 1", getattr(self, name))

    @property
    def num_stages(self) -> int:
        return self.key_slots

    @property
    def slots(self) -> int:
        """Chunks that both rings hold."""
        return min(self.key_slots, self.query_slots)

    @property
    def in_turn(self) -> bool:
        """Whether a consumer waits until another has issued its MMAs."""
        return self.ping_pong and self.consumers > 1

    def __str__(self) -> str:
        flags = " ping-pong" * self.ping_pong + f" {self.ctas_per_sm} CTAs/SM" * (self.ctas_per_sm > 1)
        return f"{self.block_m}x{self.block_n} s{self.key_slots}/{self.query_slots} b{self.bias_stages} c{self.chunk}{flags}"

    def buffers(self, spec: AttentionSpec, gives: tuple[str, ...] = ()) -> tuple[Buffer, ...]:
        biases = self.bias_stages * self.consumers
        return (
            Buffer("q and dout", self.query_slots * self.consumers, (64, self.chunk), 2),
            Buffer("k and v", self.key_slots, (self.block_n, self.chunk), 2),
            bias_buffer(spec, self, biases),
            second_buffer(spec, self, self.key_slots),
            *row_buffers(spec, self.consumers, self.block_n),
            bias_buffer(spec, self, int(is_banded(spec) or spec.packed is not None))._replace(name="zeros"),
            barriers(2 * self.query_slots, 2 * self.key_slots, 2 * biases, 2),
        )

    def check(self, spec: AttentionSpec, dim: int, limit: int, gives: tuple[str, ...] = ()) -> None:
        super().check(spec, dim, limit, gives)
        least = slots_needed(spec, self.chunk, self.in_turn)
        if self.slots < least:
            wanted = f"at least {least} for head dims {spec.head_dim} and {spec.value_dim} in chunks of {self.chunk}"
            got = (self.key_slots, self.query_slots)
            raise bad_value("key_slots and query_slots", wanted, got, "a round would wait for slots that it holds")

    def reads_small_lse(self, spec: AttentionSpec) -> bool:
        return True


def owns_dbias(spec: AttentionSpec) -> bool:
    """Whether no other kernel gives the gradient of the spec's bias: it is neither of full shape nor one over keys alone."""
    assert spec.bias is not None
    *_, query, key = spec.bias.varies
    return not all(spec.bias.varies) and not (key and not query)


def why_not(spec: AttentionSpec, device: DeviceFacts) -> tuple[str, str] | None:
    """None if the kernel can give the gradient, else (what it cannot do, the nearest thing that works): the bias must be of numbers, vary
    over queries and keys and broadcast over something else, and a mask beside it may not vary over queries.
    """
    bias = spec.bias
    assert bias is not None
    if bias.is_mask or not (bias.varies[3] and bias.varies[4]) or all(bias.varies):
        return f"the gradient of a bias of shape {bias}", "use backend('triton')"
    if spec.mask is not None and spec.mask.varies[3] and spec.queries > 1:
        return f"the gradient of a bias of shape {bias} beside a mask of shape {spec.mask}", "use backend('triton')"
    return None


def takes_packed(spec: AttentionSpec, device: DeviceFacts) -> bool:
    """Whether the kernel gives the gradient of the bias of packed sequences: a padded one over queries and keys, without a mask."""
    packed, bias = spec.packed, spec.bias
    assert packed is not None and bias is not None
    if packed.bias_layout != "padded" or bias.is_mask or not (bias.varies[3] and bias.varies[4]):
        return False
    if spec.mask is not None or spec.second is not None:
        return False
    return choose(of_packed(spec), device.shared_memory) is not None


def of_packed(spec: AttentionSpec) -> AttentionSpec:
    """The spec with the sizes of a batch of sequences as long as their bias, which has the kernel's tiles and rounds.

    Only the device knows which tiles are seen. That diagonals are 0 is a guess, by which tiles are dealt out: sequences that attend to
    themselves have such.
    """
    packed = spec.packed
    assert packed is not None
    return replace(spec, batch_outer=packed.sequences, queries=packed.bias_sizes[0], keys=packed.bias_sizes[1])


def slots_needed(spec: AttentionSpec, chunk: int, in_turn: bool = False) -> int:
    """Chunks that must lie in either ring at the same time: the last of S and all of dP. Where consumers issue their MMAs in turn all of S:
    the one whose turn is next frees none before the other has issued those of a whole round.
    """
    return (ceil_div(spec.head_dim, chunk) if in_turn else 1) + ceil_div(spec.value_dim, chunk)


@functools.lru_cache(maxsize=4096)
def choose(spec: AttentionSpec, limit: int) -> DbiasConfig | None:
    """The configuration within ``limit`` bytes of shared memory; None if no candidate fits.

    A large tile matters most: the loads of a round grow with the sum of its sides, the MMAs with their product. Narrow heads have time to
    load more: two CTAs of one consumer, of which one computes while the other waits, are up to 1.17 times as fast as one of two, but not
    beside a mask, which takes registers. Then, for heads whose tiles are short, a second bias buffer, if it leaves each ring four slots.
    """
    widest = padded(max(spec.head_dim, spec.value_dim))
    chunk = min(64, widest)
    least = slots_needed(spec, chunk)
    if spec.mask is None and max(spec.head_dim, spec.value_dim) <= 48:
        for slots in range(4, least - 1, -1):
            pair = DbiasConfig(1, 128, slots, slots, chunk=chunk, ctas_per_sm=2)
            if pair.fits(spec, limit):
                return pair
    for consumers, block_n in ((2, 128), (2, 64), (1, 64), (1, 32)):
        for bias_stages in (2, 1) if widest <= 64 else (1,):
            for slots in range(16, 2 * (least if bias_stages == 1 else max(least, 4)) - 1, -1):  # of both rings
                config = DbiasConfig(consumers, block_n, slots - slots // 2, slots // 2, bias_stages, chunk=chunk)
                if config.fits(spec, limit):
                    return config
    return None


def bias_tiles(spec: AttentionSpec, config: DbiasConfig) -> tuple[int, int, int]:
    """(query tiles, key tiles, tiles of the whole bias)."""
    assert spec.bias is not None
    tiles_m, tiles_n = -(-spec.queries // config.block_m), -(-spec.keys // config.block_n)
    own = tiles_m * tiles_n
    for size, varies in zip((spec.batch_outer, spec.batch_inner, spec.heads), spec.bias.varies[:3], strict=True):
        own *= size if varies else 1
    return tiles_m, tiles_n, own


@functools.lru_cache(maxsize=4096)
def places(spec: AttentionSpec, config: DbiasConfig) -> tuple[int, tuple[bool, ...]]:
    """(places of a row, whether each place for the tiles of a head has one that some query sees): see ``tile_of`` of the kernel. Packed
    sequences are taken to have the diagonal 0.
    """
    fold, tiles = _tiles_of_places(spec, config)
    return fold, tuple(tile is not None for tile in tiles)


@functools.lru_cache(maxsize=4096)
def _tiles_of_places(spec: AttentionSpec, config: DbiasConfig) -> tuple[int, tuple[tuple[int, int] | None, ...]]:
    """(places of a row, tile of queries and tile of keys in each place; None where nobody sees it)."""
    tiles_m, tiles_n, _ = bias_tiles(spec, config)
    seen = [_seen(spec, config, tm) for tm in range(tiles_m)]
    if spec.lo is not None or spec.hi is None:
        return tiles_n, tuple((tm, tn) if begin <= tn < end else None for tm, (begin, end) in enumerate(seen) for tn in range(tiles_n))
    odd = tiles_m % 2
    ends = [0] * odd + [end for _, end in seen]
    pairs = list(zip(ends, reversed(ends), strict=True))[: len(ends) // 2]
    fold = max(1, *(sum(pair) for pair in pairs))
    folded = tuple(
        (row - odd, column) if column < own else (tiles_m - 1 - row, fold - 1 - column) if column >= fold - opposite else None
        for row, (own, opposite) in enumerate(pairs)
        for column in range(fold)
    )
    return fold, folded + (None,) * (tiles_m * tiles_n if spec.packed is not None else 0)


def _seen(spec: AttentionSpec, config: DbiasConfig, tm: int) -> tuple[int, int]:
    """Which key tiles some query of a query tile sees: (first, end)."""
    last = min((tm + 1) * config.block_m, spec.queries) - 1
    end = spec.keys if spec.hi is None else max(0, min(last + spec.hi + 1, spec.keys))
    begin = 0 if spec.lo is None else max(0, tm * config.block_m + spec.lo)
    return begin // config.block_n, -(-end // config.block_n)


@functools.lru_cache(maxsize=4096)
def programs(spec: AttentionSpec, config: DbiasConfig, splits: int, sms: int) -> int:
    """How many CTAs the grid has: as many as run at a time, or up to three fewer (of packed sequences four) where that balances load.

    Under a band some places are empty, and a grid whose size has a divisor in common with the places of a row gives some CTAs the same
    columns, all long or all short, in every wave.
    """
    tiles, most = bias_tiles(spec, config)[2] * splits, sms * config.ctas_per_sm
    if not _differ(spec, tiles, most):
        return min(tiles, most)
    fewer = 5 if spec.packed is not None else 4
    return min(range(most, max(0, most - fewer), -1), key=lambda count: _best_shuffle(_of_any_number(spec), config, splits, count)[0])


def _of_any_number(spec: AttentionSpec) -> AttentionSpec:
    """The spec, of packed sequences with one number of them for all batches, whose tiles are dealt out alike."""
    return spec if spec.packed is None else replace(spec, batch_outer=SEQUENCES, packed=Packed(SEQUENCES))


def _differ(spec: AttentionSpec, tiles: int, programs: int) -> bool:
    """Whether it matters which program has which tiles: some are more work than others, and there is more than one for each."""
    return programs < tiles <= MAX_SIMULATED_TILES and (is_banded(spec) or spec.packed is not None)


def shuffle(spec: AttentionSpec, config: DbiasConfig, splits: int, programs: int) -> int:
    """In which steps the places of a head are taken (``tile_of`` of the kernel): the ones with the least load imbalance."""
    tiles = bias_tiles(spec, config)[2] * splits
    return _best_shuffle(_of_any_number(spec), config, splits, programs)[1] if _differ(spec, tiles, programs) else 1


@functools.lru_cache(maxsize=4096)
def _best_shuffle(spec: AttentionSpec, config: DbiasConfig, splits: int, programs: int) -> tuple[float, int]:
    """(the most work of a program, shuffle). Of packed sequences, whose lengths are not known, the sum of two shares of all work: where all
    are as long as the bias, and where any length is as likely.
    """
    tiles_m, tiles_n, own = bias_tiles(spec, config)
    rounds = broadcast_rows(spec) / splits
    tiles = _tiles_of_places(spec, config)[1]
    costs = [[EMPTY_PLACE_COST if tile is None else rounds for tile in tiles]]
    if spec.packed is not None:
        costs.append([EMPTY_PLACE_COST if tile is None else rounds * (1 - max(tile[0] / tiles_m, tile[1] / tiles_n)) for tile in tiles])
    copies = own * splits // (tiles_m * tiles_n)
    if spec.packed is not None:
        copies = min(copies, max(1, MOST_PLACES // len(tiles)))
    found = []
    for each in SHUFFLES if spec.packed is None else SHUFFLES_OF_PACKED:
        if math.gcd(each, len(tiles)) == 1:
            most = 0.0
            for cost in costs:
                work = [cost[place * each % len(cost)] for place in range(len(cost))] * copies
                most += max(sum(work[program::programs]) for program in range(programs)) / (1 if spec.packed is None else sum(work))
            found.append((round(most, 2 if spec.packed is None else 5), each))
    return min(found)


def _splits(spec: AttentionSpec, config: DbiasConfig, most: int) -> int:
    """Into how many parts the loops are cut where ``most`` CTAs run at a time: those that give the busiest CTA fewest rounds. Under a band,
    where tiles that nobody sees are no work, as many as give each CTA a tile.
    """
    own, rounds = bias_tiles(spec, config)[2], broadcast_rows(spec)
    if is_banded(spec):
        return max(1, min(rounds, ceil_div(most, own)))
    ways = range(1, max(1, min(rounds, MOST_WAVES * most // own)) + 1)
    return min(ways, key=lambda splits: (ceil_div(own * splits, most) * (ceil_div(rounds, splits) + PART_COST * (splits > 1)), splits))


def steps(spec: AttentionSpec, device: DeviceFacts, by_hand: Mapping[str, object]) -> list[Step]:
    """The kernel, with its grid, and the sum of its parts if tiles are so few that the loop over (batch, head) pairs is split."""
    config = chosen(by_hand, "dbias", DbiasConfig)
    if config is not None:
        config.check(spec, 0, device.shared_memory)
    else:
        config = choose(spec, device.shared_memory)
        assert config is not None, "why_not_backward refuses what fits no candidate"
    splits = _splits(spec, config, device.sms * config.ctas_per_sm)
    grid = programs(spec, config, splits, device.sms)
    return [Step("dbias", config, grid, order_of(spec), splits, ("dbias",)), *dbias_sum_steps(spec, splits)]
