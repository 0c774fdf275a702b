"""The kernel for few queries on many keys (``kernels/triton/few.py``): its configuration, what it can do, when it is taken, and into how
many parts keys are cut. Called by ``plan/triton.py``, ``plan/cache.py`` and ``launch/few.py``. Pure.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ...errors import bad_value
from ...spec import AttentionSpec
from ...spec_cache import CacheSpec
from ..configs import MAX_HEAD_DIM, OWNERS_OF_KEYS, TileConfig, chosen, others_chosen, padded
from ..device import DeviceFacts
from ..steps import Step, asked_products, ceil_div
from .parts import combine_step, sum_rows_steps

__all__ = [
    "KERNELS", "MIN_KEYS", "FewConfig", "Shape", "backward_steps", "cache_shape_of", "cache_steps", "choose",
    "choose_backward", "dq_splits", "forward_steps", "has_few_queries", "least_blocks", "least_cache_blocks", "runs", "runs_backward",
    "shape_of", "splits_of", "takes", "takes_backward", "why", "why_cache", "why_not",
]  # fmt: skip

KERNELS = ("few_forward", "few_backward")
MAX_QUERIES = 128  # of one request, from which on tiles of queries are many enough
MEASURED = ("sm90",)  # H200, docs/tuning.md, 2026-11-29
MIN_KEYS = 512  # below, a second launch costs more than idle SMs
LEAST_KEYS = 128  # of a part: fewer keys take less time than putting parts together
MAX_SPLITS = 256  # that the plan takes by itself
MOST_KEYS = 8192  # of a part where requests may differ in length: SMs that are done with short ones share a long one
PART_COST = 2  # of a part, in keys of a program, however many run at a time: what SMs share, and ``combine``
BACKWARD_WARPS = 8  # of few_backward that an SM runs at a time
PROGRAM_COST = 512  # of a program besides its keys, in keys: beginning, end and what ``combine`` reads of it


@dataclass(frozen=True)
class FewConfig(TileConfig):
    """``block_m`` rows (queries times grouped heads) by ``block_n`` keys. splits: parts that keys are cut into; 0: what the plan finds."""

    splits: int = 0

    SOURCE: ClassVar[str] = "by rows and head dim, of plan/kernels/few.py"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.splits <= MAX_SPLITS:
            raise bad_value("splits", f"from 0 (the plan's choice) to {MAX_SPLITS}", self.splits)

    def __str__(self) -> str:
        return super().__str__() + (f" {self.splits} splits" if self.splits else "")


@dataclass(frozen=True)
class Shape:
    """What a configuration and the number of parts are chosen by. rows: queries times grouped heads of a request."""

    rows: int
    pairs: int  # of requests and key heads
    keys: int
    head_dim: int
    value_dim: int
    itemsize: int  # bytes of an element of the keys
    bias: bool
    heavy: bool  # more happens to a score than a bias or a band
    cached: bool = False  # keys of a KV cache
    paged: bool = False


def shape_of(spec: AttentionSpec) -> Shape:
    """The shape of a dense batch."""
    heavy = spec.softcap > 0 or spec.alibi or spec.mask is not None or spec.dropout > 0 or spec.second is not None
    itemsize = 4 if spec.dtype == "fp32" else 2
    return Shape(
        spec.queries * spec.groups,
        spec.batch * spec.kv_heads,
        spec.keys,
        spec.head_dim,
        spec.value_dim,
        itemsize,
        spec.bias is not None,
        heavy,
    )


def why_not(spec: AttentionSpec) -> tuple[str, str] | None:
    """None if the kernel can run a spec that backend ``triton`` can, else (what it cannot do, the nearest thing that works)."""
    if spec.packed is not None:
        return "packed sequences", "backend triton's own kernels for them"
    if spec.dropout_place:
        return "dropout of a part of a larger problem", "backend triton's other kernels"
    if spec.placed or spec.diagonal or spec.shift is not None:
        return "starts, query lengths and diagonals of their own", "backend triton's other kernels"
    if max(spec.head_dim, spec.value_dim) > MAX_HEAD_DIM:
        return f"head dim {max(spec.head_dim, spec.value_dim)}", f"its limit is {MAX_HEAD_DIM}"
    return None


def runs(spec: AttentionSpec) -> bool:
    """Whether there is anything to run, and the kernel can."""
    return not spec.is_empty and why_not(spec) is None


def has_few_queries(spec: AttentionSpec) -> bool:
    """Whether a spec that the kernel can run is what it is made for, whether or not it is taken."""
    return spec.queries <= MAX_QUERIES and spec.keys >= MIN_KEYS and runs(spec)


def takes(spec: AttentionSpec, device: DeviceFacts, tile: TileConfig) -> bool:
    """Whether ``attention`` takes the kernel by itself: where the forward kernel, with its ``tile``, would leave SMs without work.

    That is a GPU, at most MAX_QUERIES queries on MIN_KEYS keys or more, and fewer tiles of queries than SMs. Where one tile holds all rows
    of a key head it is also taken for grouped heads, each of which would read the same keys, and in 16 bits wherever it was measured: with
    128 tiles for 132 SMs it took a third to a half of the forward kernel's time, most of whose tile is padding.
    """
    if not device.arch.startswith(("sm", "gfx")) or not has_few_queries(spec):
        return False
    programs = ceil_div(spec.queries, tile.block_m) * spec.heads * spec.batch
    one_tile = spec.queries * spec.groups <= 64
    return programs < device.sms or (one_tile and (spec.groups > 1 or (device.arch in MEASURED and spec.dtype != "fp32")))


def choose(shape: Shape, device: DeviceFacts) -> FewConfig:
    """The configuration for a shape: with fewer stages, then fewer keys, where the device has less shared memory than the best takes.

    Triton deals stages out evenly to loads of which one waits for another, pages for their table: half of them are the keys'.
    """
    config = _best(shape, device)
    while shared_memory(shape, config) > device.shared_memory:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_n > 16:
            config = replace(config, block_n=config.block_n // 2)
        else:
            break
    return replace(config, num_stages=2 * config.num_stages - 1) if shape.paged else config


def shared_memory(shape: Shape, config: FewConfig) -> int:
    """An upper estimate, in bytes, of what a program keeps in shared memory: queries, keys and values of each stage (the last of them in
    registers where tiles have few rows), and scores or a bias on their way from one layout to another.
    """
    head, value = padded(shape.head_dim), padded(shape.value_dim)
    stages = max(1, config.num_stages - (config.block_m <= 32))
    converted = 2 if shape.itemsize == 1 else 0  # keys of 8 bits once more, in 16
    keys = config.block_n * (head + value) * (shape.itemsize * stages + converted)
    return keys + config.block_m * head * max(shape.itemsize, 2) + config.block_m * config.block_n * 4 * (1 + shape.bias)


def _best(shape: Shape, device: DeviceFacts) -> FewConfig:
    head = padded(max(shape.head_dim, shape.value_dim))
    if device.arch == "interpreter":
        return FewConfig(16, 16, 4, 1)
    block_m = 16 if shape.rows <= 16 else 32 if shape.rows <= 32 else 64
    if shape.itemsize > 2:  # float32 products keep whole operand rows in registers
        return FewConfig(16, 32 if head <= 128 else 16, 4 if head <= 128 else 8, 1)
    if device.arch.startswith("gfx"):
        return FewConfig(min(block_m, 32), 64 if head <= 64 else 32 if head <= 128 else 16, 4, 1)
    if head <= 64:
        return FewConfig(block_m, 128, 4, 3)
    if head <= 128:
        # H200, d 128: 9 configurations in each of 8 problems (docs/tuning.md, 2026-11-29)
        if block_m == 16 and shape.rows > 1 and not shape.heavy:
            if shape.cached:  # 7 to 12 configurations, 2026-11-30
                return FewConfig(16, 128 if shape.itemsize == 1 else 64, 4, 3)
            return FewConfig(16, 128, 8, 3)
        return FewConfig(block_m, 128, 4, 3) if block_m <= 32 and not shape.heavy else FewConfig(block_m, 64, 4, 4 if block_m == 64 else 3)
    return FewConfig(block_m, 32, 4, 2)


@functools.lru_cache(maxsize=4096)
def splits_of(shape: Shape, config: FewConfig, sms: int, backward: bool = False) -> int:
    """Into how many parts keys are cut: such that SMs are busy for the shortest time, whole waves of programs counted. backward: of
    ``few_backward``.
    """
    if config.splits:
        return config.splits
    items = ceil_div(shape.rows, config.block_m) * shape.pairs
    slots = sms * per_sm(shape, config, backward)
    most = max(1, min(MAX_SPLITS, shape.keys // LEAST_KEYS))

    def cost(splits: int) -> int:
        blocks = ceil_div(ceil_div(shape.keys, config.block_n), splits) * config.block_n
        return ceil_div(items * splits, slots) * (blocks + PROGRAM_COST * (splits > 1)) + PART_COST * items * splits

    return min(range(1, most + 1), key=cost)


def per_sm(shape: Shape, config: FewConfig, backward: bool = False) -> int:
    """How many programs an SM runs at a time: by shared memory, of which an SM has some 200 KB, and by registers, of which a program of
    ``few_backward`` takes all that 4 warps may have and an SM holds twice as many.
    """
    row = (padded(shape.head_dim) + padded(shape.value_dim)) * shape.itemsize
    stages = (config.num_stages + 1) // 2 if shape.paged else config.num_stages
    most = max(1, BACKWARD_WARPS // config.num_warps) if backward else 4
    return max(1, min(most, 200_000 // (config.block_n * row * stages)))


def least_blocks(config: FewConfig) -> int:
    """Blocks of keys that a part has at least."""
    return 1 if config.splits else max(1, LEAST_KEYS // config.block_n)


def forward_steps(spec: AttentionSpec, device: DeviceFacts, by_hand: Mapping[str, object], tile: TileConfig) -> tuple[Step, ...]:
    """The kernels of a forward pass, which the forward kernel would run with ``tile``; none where it is to: with a configuration chosen by
    hand they run wherever they can.

    Three TF32 products were not judged here, so that they are nobody's default.
    """
    config = chosen(by_hand, "few_forward", FewConfig)
    others = others_chosen(by_hand, "forward")
    if not (takes(spec, device, tile) and not others if config is None else runs(spec)):
        return ()
    shape = shape_of(spec)
    config = config or choose(shape, device)
    splits = splits_of(shape, config, device.sms)
    programs = ceil_div(shape.rows, config.block_m) * shape.pairs * splits
    steps = [Step("few_forward", config, programs, splits=splits, precision=asked_products(spec))]
    if splits > 1:
        steps.append(combine_step(spec.batch * spec.heads * spec.queries, splits, programs, device))
    return tuple(steps)


def most_rows(spec: AttentionSpec) -> int:
    """Rows that the backward kernel has room for: it keeps all of them, and dq of all."""
    return 128 if padded(max(spec.head_dim, spec.value_dim)) <= 64 else 64


def runs_backward(spec: AttentionSpec) -> bool:
    """Whether there is anything to run, and the backward kernel can: a program has all rows of a key head."""
    return runs(spec) and spec.queries * spec.groups <= most_rows(spec)


def takes_backward(spec: AttentionSpec, device: DeviceFacts) -> bool:
    """Whether ``attention`` takes the backward kernel by itself: where it was measured to be the fastest, up to 64 rows without a bias or
    anything heavier.
    """
    if device.arch not in MEASURED or spec.dtype not in ("fp16", "bf16") or spec.keys < MIN_KEYS or not runs_backward(spec):
        return False
    shape = shape_of(spec)
    return padded(max(spec.head_dim, spec.value_dim)) == 128 and not (shape.bias or shape.heavy)


def choose_backward(shape: Shape, device: DeviceFacts) -> FewConfig:
    """The configuration of the backward kernel for a shape: a tile has all rows."""
    rows = max(16, padded(shape.rows))
    head = padded(max(shape.head_dim, shape.value_dim))
    if device.arch == "interpreter":
        return FewConfig(rows, 16, 4, 1)
    if shape.itemsize > 2:
        return FewConfig(rows, 16, 4 if head <= 64 else 8, 1)
    if device.arch.startswith("gfx"):
        return FewConfig(rows, 64 if head <= 64 else 32 if head <= 128 else 16, 4, 1)
    if device.arch.startswith("sm9") and head <= 128:  # H200, d 128, docs/tuning.md, 2026-11-30
        if rows == 16:
            return FewConfig(16, 64, 4, 3)
        return FewConfig(64, 32, 4, 3) if rows <= 64 else FewConfig(rows, 32, 8, 2)  # of 32 rows WGMMA gives a wrong dq
    return FewConfig(rows, 64 if head <= 128 else 32, 4 if rows * head <= 64 * 64 else 8, 2)


def backward_steps(spec: AttentionSpec, device: DeviceFacts, by_hand: Mapping[str, object], gives: tuple[str, ...]) -> tuple[Step, ...]:
    """The kernels that give these gradients, where the statistics are there; none where others are to, as of the forward pass."""
    config = chosen(by_hand, "few_backward", FewConfig)
    others = others_chosen(by_hand, *OWNERS_OF_KEYS, "dq")
    if not gives or not (takes_backward(spec, device) and not others if config is None else runs_backward(spec)):
        return ()
    shape = shape_of(spec)
    config = config or choose_backward(shape, device)
    if config.block_m < shape.rows:
        raise bad_value("few_backward", f"block_m of {shape.rows} rows at least (queries times grouped heads)", config.block_m)
    # Seen on an H200 with Triton 3.6.0, 4 and 8 warps; with blocks of 32 keys, tiles of 64 rows, or two stages gradients were right.
    if device.arch.startswith("sm9") and config.block_m < 32 and config.block_n >= 64 and config.num_stages < 2:
        raise bad_value(
            "few_backward", "two stages, blocks of 32 keys, or tiles of 32 rows", config, "its products read beyond shared memory"
        )
    splits = min(splits_of(shape, config, device.sms, backward=True), ceil_div(spec.keys, config.block_n))
    step = Step("few_backward", config, shape.pairs * splits, splits=splits, gives=gives, precision=asked_products(spec))
    return (step, *sum_rows_steps(spec, splits)) if "dq" in gives else (step,)


def dq_splits(spec: AttentionSpec, device: DeviceFacts, config: TileConfig, programs: int) -> int:
    """Into how many parts the portable kernel for dq, with so many programs for whole rows, cuts the keys: 1 unless that leaves SMs of a
    GPU without work.
    """
    if isinstance(config, FewConfig) and config.splits:
        return config.splits
    if not device.arch.startswith(("sm", "gfx")) or spec.queries > MAX_QUERIES or spec.keys < MIN_KEYS or programs >= device.sms:
        return 1
    shape = replace(shape_of(spec), rows=spec.queries, pairs=spec.batch * spec.heads)
    return splits_of(shape, FewConfig(config.block_m, config.block_n, config.num_warps, config.num_stages), device.sms)


def cache_shape_of(spec: CacheSpec) -> Shape:
    """The shape of a call on a KV cache."""
    heavy = spec.softcap > 0 or spec.alibi or spec.mask is not None
    itemsize = {"fp32": 4, "fp8": 1}.get(spec.cache_dtype, 2)
    sizes = (spec.queries * spec.groups, spec.requests * spec.kv_heads, spec.capacity, spec.head_dim, spec.value_dim)
    return Shape(*sizes, itemsize, spec.bias is not None, heavy, True, spec.page_size is not None)


def _has_waves(shape: Shape, config: FewConfig, sms: int) -> bool:
    """Whether full requests are so long and so many, for more than one wave of programs, that three parts of each are faster than one: the
    last wave then leaves fewer SMs idle.

    Three rather than two or four, whose programs are at the same place of parts of 2^n keys: on an H200 64 requests of 8,192 keys take 556
    µs in one part, 535 in two, 497 in three, 507 in four; of 2,048 in 8 bits one is the best (docs/tuning.md). Only where rows fit a
    tile: outputs of parts are float32, and of a prompt they would be more to move than its keys.
    """
    tiled, enough = 1 < shape.rows <= config.block_m, 2 * shape.pairs >= 3 * sms * per_sm(shape, config)
    return tiled and enough and shape.keys >= 4096 and shape.itemsize > 1


def cache_steps(spec: CacheSpec, device: DeviceFacts, by_hand: Mapping[str, object]) -> tuple[Step, ...]:
    """The kernels of a call on a KV cache.

    With split_size nothing that a request's bits depend on follows from the others: not the tile, not where its keys are cut, not whether
    parts are put together.
    """
    shape = cache_shape_of(spec)
    # How long packed queries are says the longest one.
    typical = replace(shape, rows=spec.groups) if spec.packed_queries and spec.split_size is not None else shape
    config = chosen(by_hand, "few_forward", FewConfig) or choose(typical, device)
    if spec.split_size is not None:
        splits = max(1, ceil_div(ceil_div(spec.capacity, config.block_n), ceil_div(spec.split_size, config.block_n)))
    elif spec.num_splits is not None:
        splits = min(spec.num_splits, max(1, ceil_div(spec.capacity, config.block_n)))
    else:
        splits = splits_of(shape, config, device.sms)
        if spec.lengths and not config.splits:
            # Two of what is longer than half a part: a program more or less on an SM is then less of its time (b 64: 1.08).
            least = max(ceil_div(spec.capacity, MOST_KEYS), 1 + (2 * spec.capacity > MOST_KEYS))
            splits = max(splits, min(MAX_SPLITS, least))
        elif splits == 1 and not config.splits and _has_waves(shape, config, device.sms):
            splits = 3
    programs = ceil_div(shape.rows, config.block_m) * shape.pairs * splits
    ptx = spec.cache_dtype == "fp8" and device.arch.startswith("sm")
    forward = Step("few_forward", config, programs, splits=splits, precision=asked_products(spec), ptx=ptx)
    steps = [forward] if programs else []
    if splits > 1 or spec.packed_queries or spec.split_size is not None:
        rows = spec.requests * spec.heads * spec.queries  # of packed queries at most: the launch knows their sum
        steps.append(combine_step(rows, splits, programs, device))
    return tuple(steps)


def least_cache_blocks(spec: CacheSpec, config: FewConfig) -> int:
    """Blocks of keys that a part has at least."""
    if spec.split_size is not None:
        return ceil_div(spec.split_size, config.block_n)
    return 1 if spec.num_splits is not None else least_blocks(config)


def why_cache(spec: CacheSpec, step: Step, device: DeviceFacts) -> str:
    """Why keys of a cache are cut into so many parts, in words."""
    assert isinstance(step.config, FewConfig)
    if spec.split_size is not None:
        size = least_cache_blocks(spec, step.config) * step.config.block_n
        whole = "" if size == spec.split_size else f" ({spec.split_size} in whole blocks of {step.config.block_n})"
        return f"keys are split every {size}{whole}, as asked for, whatever the batch"
    if spec.num_splits is not None:
        why = "as asked for" if step.splits == spec.num_splits else f"of {spec.num_splits} asked for: there are no more blocks of keys"
        return f"keys of a request are split into {step.splits} parts of equal length, {why}"
    text = _why(cache_shape_of(spec), step, step.config, device)
    return text + (", or fewer of a short request" if step.splits > 1 else "")


def why(spec: AttentionSpec, step: Step, device: DeviceFacts) -> str:
    """Why so many parts, in words."""
    assert isinstance(step.config, FewConfig)
    return _why(shape_of(spec), step, step.config, device)


def _why(shape: Shape, step: Step, config: FewConfig, device: DeviceFacts) -> str:
    items = ceil_div(shape.rows, config.block_m) * shape.pairs
    rows = min(shape.rows, config.block_m)
    what = f"{items} tile{'s' * (items > 1)} of {rows} row{'s' * (rows > 1)} (queries x grouped heads) for {device.sms} {device.units}"
    if config.splits:
        return f"{what}: keys are split into {step.splits} parts, chosen by hand"
    if step.splits == 1:
        return f"{what}: keys are not split"
    return f"{what}: keys are split into {step.splits} parts of some {ceil_div(shape.keys, step.splits)}"
