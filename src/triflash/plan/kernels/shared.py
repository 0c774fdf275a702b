"""What the rooms of Hopper's kernels share: buffers in shared memory, registers, tiles of a bias, and the order of tiles. Pure.

Called by those rooms and by ``launch/hopper*.py``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import chain, repeat
from typing import Any, ClassVar, NamedTuple

from ...errors import bad_value
from ...spec import AttentionSpec, BiasSpec
from ..configs import padded

__all__ = [
    "L2_GROUP_BYTES", "MAX_SIMULATED_TILES", "MOST_PIECES", "ROWS", "SMALLEST_BLOCK", "STATS_MULTIPLE", "TILE_COST", "Buffer",
    "HopperConfig", "QueryConfig", "barriers", "batch_fastest", "best_order", "bias_buffer", "blocks_of_heads", "check_held",
    "ends_within", "equal_groups", "is_banded", "is_light", "kind_of", "l2_order", "load_imbalance", "mask_buffer", "mma_fits",
    "multiplied_columns", "order_of", "query_tiles", "row_buffers", "row_by_mma", "second_buffer", "shared_limit", "span",
    "stats_kinds", "stats_length", "takes_own_widths", "widths",
]  # fmt: skip

ROWS = 64  # queries of a consumer warpgroup: M of a WGMMA
SMALLEST_BLOCK = 16  # keys
WARPGROUP = 128  # threads
STATS_MULTIPLE = 128  # queries of the table of statistics, which TMA loads in whole blocks
REGISTERS = 65536  # of an SM
PRODUCER_REGISTERS = 24  # of a thread; the kernels say so
MMA_REGISTERS = 30  # of a thread, beside the accumulator of an MMA
RESERVED = 1024  # bytes of shared memory that the system takes for each CTA
ALIGNMENT = 1024  # bytes that aligning the buffers may cost a CTA
MMA_STEP = 16  # columns of a WGMMA of 16-bit numbers
LARGEST_SCALE = 2.0**64  # or its inverse, of scores of which a bias is a step of the product: both are far from what overflows
MOST_PIECES = 2  # buffers or operands that a head's columns are in, each a power of 2 of columns
TMA_ROW = 128  # bytes: the alignment that TMA asks of a buffer, and so the least size of a row of one

L2_GROUP_BYTES = 24 * 2**20  # keys and values that tiles running at a time may share: half of an H100's L2 cache
PREFERRED_GROUP_BYTES = 6 * 2**20  # of keys and values of a group; up to here its size makes no difference to L2
RESIDENT_BIAS = 2**22  # bytes of a head's bias that stay in L2 beside all else
MAX_LOAD_IMBALANCE = 0.02  # over the mean; prefer the smaller L2 group within 2 % of the best (H200, docs/tuning.md)
MAX_SIMULATED_TILES = 8192  # with more tiles every order comes out even
TILE_COST = 1  # of a tile besides its blocks, in blocks


class Buffer(NamedTuple):
    """``blocks`` of ``shape`` in a CTA's shared memory, ``itemsize`` bytes an element."""

    name: str
    blocks: int
    shape: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        size = self.blocks * self.itemsize
        for length in self.shape:
            size *= length
        return size


def barriers(*counts: int) -> Buffer:
    """So many mbarriers, 8 bytes each."""
    return Buffer("barriers", sum(counts), (), 8)


_MOST_COUNTED = 4096
_counted: dict[tuple[Any, ...], int] = {}  # bytes of shared memory
_NUMBERS = ("batch_outer", "batch_inner", "queries", "keys", "heads", "lo", "hi", "packed", "shift")
_others = operator.attrgetter(*(each.name for each in fields(AttentionSpec) if each.name not in _NUMBERS))


def kind_of(spec: AttentionSpec) -> tuple[Any, ...]:
    """All but numbers of queries, keys, batch entries and heads: which sides a band has, whether there are packed sequences."""
    return spec.lo is None, spec.hi is None, spec.packed is None, *_others(spec)


class HopperConfig:
    """What the configurations of Hopper's kernels have in common. Each is a frozen dataclass and reaches its kernel as one constant, C."""

    SOURCE: ClassVar[str]  # where the plan takes one from, as explain says it
    ctas_per_sm: int = 1

    @property
    def num_warps(self) -> int:
        """Of the first consumer. The other partitions are workers of ``warp_specialize`` and bring their own."""
        return 4

    @property
    def num_stages(self) -> int:
        """Depth of the ring that the producer runs ahead in."""
        raise NotImplementedError

    def buffers(self, spec: AttentionSpec, gives: tuple[str, ...] = ()) -> tuple[Buffer, ...]:
        """What a CTA allocates in shared memory where the kernel computes the gradients ``gives``. A test compares it with the kernel."""
        raise NotImplementedError

    def shared_memory(self, spec: AttentionSpec, gives: tuple[str, ...] = ()) -> int:
        """Bytes of shared memory of a CTA, at most. Counted once for problems of a kind."""
        key = self, gives, kind_of(spec)
        known = _counted.get(key)
        if known is None:
            if len(_counted) >= _MOST_COUNTED:
                _counted.clear()
            known = _counted[key] = sum(buffer.nbytes for buffer in self.buffers(spec, gives)) + ALIGNMENT
        return known

    def reads_small_lse(self, spec: AttentionSpec) -> bool:
        """Whether the kernel has a faster loop for where every lse is small (``kernels/hopper/preprocess.py``)."""
        return False

    def require(self, **allowed: tuple[int, ...]) -> None:
        """Raise ValueError unless each field has one of the values allowed."""
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise bad_value(name, f"one of {values}", getattr(self, name))


class QueryConfig(HopperConfig):
    """Of kernels whose consumers own 64 queries each."""

    consumers: int
    block_n: int

    @property
    def block_m(self) -> int:
        return ROWS * self.consumers

    @property
    def launch_registers(self) -> int:
        """Of a thread when a CTA starts: all warpgroups, the producer's too, get as many."""
        return REGISTERS // (WARPGROUP * (self.consumers + 1) * self.ctas_per_sm) // 8 * 8

    @property
    def registers(self) -> int:
        """Of a thread of a consumer, once the producer has given up its own; the first consumer gets what is left."""
        return min(240, (self.launch_registers * (self.consumers + 1) - PRODUCER_REGISTERS) // self.consumers // 8 * 8)

    def check(self, spec: AttentionSpec, dim: int, limit: int, gives: tuple[str, ...] = ()) -> None:
        """Of a configuration chosen by hand: raise ValueError if an accumulator of ``dim`` columns or of a block has too few registers, or
        if CTAs that are to share an SM have too little shared memory for that.
        """
        if not mma_fits(self, dim):
            wanted = f"fewer for head dim {dim} and blocks of {self.block_n} keys"
            got = (self.consumers, self.ctas_per_sm)
            raise bad_value("consumers and ctas_per_sm", wanted, got, "an MMA has too few registers")
        used = self.shared_memory(spec, gives)
        if self.ctas_per_sm > 1 and used > shared_limit(limit, self.ctas_per_sm):
            wanted = f"fewer CTAs, which take {used} bytes of shared memory each"
            raise bad_value("ctas_per_sm", wanted, self.ctas_per_sm, f"they have {shared_limit(limit, self.ctas_per_sm)}")

    def fits(self, spec: AttentionSpec, limit: int, gives: tuple[str, ...] = ()) -> bool:
        """Whether the shared memory of an SM, of which one CTA alone may take ``limit`` bytes, holds ``ctas_per_sm`` of them."""
        return self.shared_memory(spec, gives) <= shared_limit(limit, self.ctas_per_sm)


def shared_limit(limit: int, ctas_per_sm: int) -> int:
    """Bytes of shared memory that each of ``ctas_per_sm`` CTAs may take, if one alone may take ``limit``."""
    return (limit + RESERVED) // ctas_per_sm - RESERVED


def mma_fits(config: QueryConfig, dim: int) -> bool:
    """Whether the registers of a launch hold the accumulator of each MMA, of ``block_n`` or ``dim`` columns, and its other operand. ptxas
    insists on that even where a consumer has more by then.
    """
    return max(widths(dim, True)[0], config.block_n) // 2 + MMA_REGISTERS <= config.launch_registers


# Columns of a head.


@functools.cache
def multiplied_columns(dim: int, width: int) -> int:
    """Of a head that lies in blocks of ``width`` columns, how many are multiplied: whole panels of 64, as shared memory is swizzled, and
    16, 32 or 64 of the last one; all of a block of one panel.
    """
    whole, rest = divmod(dim, 64)
    return 64 * whole + (padded(rest) if rest else 0) if width > 64 else width


@functools.cache
def widths(dim: int, own: bool) -> tuple[int, ...]:
    """Columns of the buffers that a head's blocks lie in: one of a power of 2, or (own) two that have the multiplied columns alone, where
    that many are two powers of 2.
    """
    width = padded(dim)
    columns = multiplied_columns(dim, width)
    first = 1 << (columns.bit_length() - 1)
    return (first, columns - first) if own and columns.bit_count() == MOST_PIECES else (width,)


def blocks_of_heads(name: str, count: int, rows: int, columns: tuple[int, ...]) -> tuple[Buffer, ...]:
    """The buffers of ``count`` blocks, of so many columns each (``widths``)."""
    return tuple(Buffer(name, count, (rows, each), 2) for each in columns)


def takes_own_widths(spec: AttentionSpec) -> bool:
    """Whether some blocks lie in two buffers where a configuration has ``own_widths``."""
    return len(widths(spec.head_dim, True)) > 1 or len(widths(spec.value_dim, True)) > 1


def check_held(name: str, held: bool, dim: int) -> None:
    """Raise ValueError where a configuration chosen by hand holds an operand that would have too many pieces."""
    if held and multiplied_columns(dim, padded(dim)).bit_count() > MOST_PIECES:
        raise bad_value(name, f"False for head dim {dim}", True, "an operand in registers has one or two pieces")


# The table of statistics that the backward kernels read.


def stats_kinds(spec: AttentionSpec) -> int:
    """Rows of the table of statistics: lse, delta and, where there is one, rest."""
    return 3 if spec.keeps_rest else 2


def stats_length(spec: AttentionSpec) -> int:
    """Columns of the table: queries, rounded up to what every tile divides; of packed sequences, those of each."""
    multiples = -(-spec.queries // STATS_MULTIPLE)
    return (multiples if spec.packed is None else multiples + spec.packed.sequences) * STATS_MULTIPLE


# Tiles of a bias, and of a mask beside it.


def bias_buffer(spec: AttentionSpec, config: QueryConfig, count: int = 1) -> Buffer:
    """``count`` tiles of the bias, or rows of it where it does not vary over queries; none where it does not vary over keys."""
    if spec.bias is None or not spec.bias.varies[4]:
        return Buffer("bias", 0, (0, 0), 0)
    return _tiles_of("bias", spec.bias, config, count)


def second_buffer(spec: AttentionSpec, config: QueryConfig, count: int = 1) -> Buffer:
    """``count`` rows of the second bias, which varies over keys alone; none without one."""
    return Buffer("second bias", 0, (0, 0), 0) if spec.second is None else _tiles_of("second bias", spec.second, config, count)


def row_by_mma(spec: AttentionSpec) -> bool:
    """Whether the backward kernels add a bias over keys alone, beside one of tiles, as a step of q k (``kernels/hopper/key_rows.py``)."""
    in_range = 1 / LARGEST_SCALE <= abs(spec.scale) <= LARGEST_SCALE
    return spec.second is not None and spec.keeps_rest and not spec.softcap and in_range


def row_buffers(spec: AttentionSpec, count: int, keys: int) -> tuple[Buffer, Buffer]:
    """``count`` such rows, and the ones that they are multiplied by; none where they are added otherwise."""
    there = int(row_by_mma(spec))
    return Buffer("row of keys", count * there, (keys, MMA_STEP), 2), Buffer("ones", there, (ROWS, MMA_STEP), 2)


def _tiles_of(name: str, bias: BiasSpec, config: QueryConfig, count: int) -> Buffer:
    itemsize = bias_itemsize(bias)
    shape = (ROWS, config.block_n) if bias.varies[3] else (1, max(config.block_n, TMA_ROW // itemsize))
    return Buffer(name, count, shape, itemsize)


def bias_itemsize(bias: BiasSpec) -> int:
    """Bytes of an element."""
    return {"bool": 1, "fp32": 4}.get(bias.dtype, 2)


def mask_buffer(spec: AttentionSpec, config: QueryConfig, count: int = 1) -> Buffer:
    """``count`` tiles or rows of the mask beside a bias, a byte an element; none without a mask."""
    if spec.mask is None:
        return Buffer("mask", 0, (0, 0), 0)
    return Buffer("mask", count, (ROWS, config.block_n) if spec.mask.varies[3] else (1, max(config.block_n, TMA_ROW)), 1)


def is_light(spec: AttentionSpec) -> bool:
    """Whether scores go through little that takes registers besides a bias."""
    return not (spec.softcap > 0 or spec.alibi or spec.dropout > 0 or (spec.mask is not None and spec.mask.varies[3]))


def is_banded(spec: AttentionSpec) -> bool:
    """Whether a band hides keys: causal, or a window."""
    return spec.lo is not None or spec.hi is not None


def span(spec: AttentionSpec) -> int:
    """Keys that a query sees, at most."""
    return spec.keys if spec.lo is None or spec.hi is None else max(0, min(spec.keys, spec.hi - spec.lo + 1))


# Which tile comes when.


def batch_fastest(spec: AttentionSpec) -> bool:
    """Whether neighbouring tiles should differ in the batch, because they share a bias then."""
    return spec.bias is not None and spec.batch > 1 and not all(spec.bias.varies[:2])


def order_of(spec: AttentionSpec) -> str:
    """What varies fastest over neighbouring tiles."""
    return "batch" if batch_fastest(spec) else "head"


def query_tiles(spec: AttentionSpec, config: QueryConfig) -> tuple[int, int]:
    """(query tiles of a (batch, head) pair, tiles of the whole problem)."""
    tiles = -(-spec.queries // config.block_m)
    return tiles, tiles * spec.batch * spec.heads


@functools.lru_cache(maxsize=4096)
def l2_order(spec: AttentionSpec, config: QueryConfig, programs: int) -> tuple[int, int]:
    """``(l2_group, serpentine)``: how query tiles are dealt to a grid of ``programs`` (``kernels/hopper/schedule.Uniform``).

    The group is as small as it may be: then keys and values come from memory at all times, not for all pairs at once, and are read again
    soon. Where tiles share a bias over the batch, the group is large enough for that. Under a causal mask tiles differ in length: the order
    is the one that gives the busiest program least work, of groups up to PREFERRED_GROUP_BYTES unless a larger one is much better.
    """
    pairs = spec.batch * spec.heads
    pair_bytes = max(1, spec.keys * (spec.head_dim + spec.value_dim) * 2)
    fitting = max(1, L2_GROUP_BYTES // pair_bytes)
    least = equal_groups(pairs, min(fitting, spec.batch)) if _shares_bias(spec) else 1
    _, tiles = query_tiles(spec, config)
    if spec.hi is None or tiles <= programs or tiles > MAX_SIMULATED_TILES:
        return least, 0
    lengths = [blocks + TILE_COST for blocks in reversed(_key_blocks(spec, config))]
    sizes = [least * 2**n for n in range(5)] + [size * fitting for size in (1, 2, 4)]
    return best_order(lengths, pairs, programs, sizes, max(least, PREFERRED_GROUP_BYTES // pair_bytes), MAX_LOAD_IMBALANCE)


def _shares_bias(spec: AttentionSpec) -> bool:
    """Whether all batch entries read the same bias, of which a head's does not stay in the L2 cache by itself."""
    if spec.bias is None or all(spec.bias.varies[:2]) or not spec.bias.varies[4]:
        return False
    return spec.keys * (spec.queries if spec.bias.varies[3] else 1) * bias_itemsize(spec.bias) > RESIDENT_BIAS


def _key_blocks(spec: AttentionSpec, config: QueryConfig) -> list[int]:
    """Key blocks that each query tile visits."""
    rows, columns, queries, keys, lo, hi = config.block_m, config.block_n, spec.queries, spec.keys, spec.lo, spec.hi
    firsts = range(0, queries, rows)
    ends = [keys] * len(firsts) if hi is None else ends_within(firsts, rows, queries, hi, keys)
    if lo is None:
        return [-(-end // columns) or 1 for end in ends]
    return [max(1, -(-end // columns) - max(0, first + lo) // columns) for first, end in zip(firsts, ends, strict=True)]


def ends_within(firsts: Sequence[int], size: int, total: int, shift: int, limit: int) -> list[int]:
    """Where tiles of ``size`` end that begin at ``firsts``, the last of them at ``total``, moved by ``shift`` and kept from 0 to ``limit``.
    Without ``min`` and ``max``: first calls wait for hundreds of tiles.
    """
    ends = [first + size + shift for first in firsts]
    if ends:
        ends[-1] = total + shift
    return [0 if end < 0 else limit if end > limit else end for end in ends]


def best_order(
    lengths: Sequence[int], pairs: int, programs: int, sizes: Iterable[int], preferred: int = 0, tolerance: float = 0.0
) -> tuple[int, int]:
    """``(l2_group, serpentine)`` with the least load imbalance, the smallest group of several, for groups of about these sizes.

    lengths: of a pair's tiles, in the order in which a kernel deals them out. A group of at most ``preferred`` pairs is taken unless a
    larger one is better by more than ``tolerance``.
    """
    groups = tuple(sorted({equal_groups(pairs, size) for size in sizes}))
    return _best_order(tuple(lengths), pairs, programs, groups, min(preferred, pairs), tolerance)


@functools.lru_cache(maxsize=1024)  # problems of as many tiles share it: lengths that differ by less than a block
def _best_order(
    lengths: tuple[int, ...], pairs: int, programs: int, groups: tuple[int, ...], preferred: int, tolerance: float
) -> tuple[int, int]:
    ways = [(group, serpentine) for group in groups for serpentine in (1, 0)]
    imbalance = {way: round(load_imbalance(lengths, pairs, programs, *way), 2) for way in ways}
    best = min(ways, key=imbalance.__getitem__)
    small = min((way for way in ways if way[0] <= preferred), key=imbalance.__getitem__, default=best)
    return small if imbalance[small] <= imbalance[best] + tolerance + 1e-9 else best


def equal_groups(pairs: int, most: int) -> int:
    """The size of groups of at most ``most`` pairs, about equally large."""
    return -(-pairs // -(-pairs // most))


def load_imbalance(lengths: Sequence[int], pairs: int, programs: int, l2_group: int, serpentine: int) -> float:
    """The blocks of the busiest program over the mean."""
    even, odd = _dealt(tuple(lengths), pairs, programs, l2_group)
    load = [*map(operator.add, even, odd[::-1] if serpentine else odd)]
    return max(load) * programs / sum(load)


@functools.lru_cache(maxsize=64)
def _dealt(lengths: tuple[int, ...], pairs: int, programs: int, l2_group: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The blocks at each place of all even waves, and of all odd ones. Loops in C: first calls wait for tens of thousands of tiles."""
    groups = -(-pairs // l2_group)
    group, last = ([*chain.from_iterable(map(repeat, lengths, repeat(n)))] for n in (l2_group, pairs - (groups - 1) * l2_group))
    ways = (group, group[::-1])
    tiles = [*chain.from_iterable(ways[(groups - 1 - number) % 2] for number in range(groups - 1)), *last]
    tiles += [0] * (-len(tiles) % (2 * programs))
    waves = [tiles[at : at + programs] for at in range(0, len(tiles), programs)]
    even, odd = (tuple(map(sum, zip(*waves[first::2], strict=True))) for first in (0, 1))
    return even, odd
