"""Tile configurations: what a row may hold, how much shared memory it takes, and the analytic default where nothing was measured.

Called by the rooms of kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from ..errors import bad_value, unsupported
from .device import DeviceFacts

__all__ = [
    "MAX_FORWARD_HEAD_DIM",
    "MAX_HEAD_DIM",
    "OWNERS_OF_KEYS",
    "Problem",
    "TileConfig",
    "chosen",
    "default_config",
    "misread",
    "of_both",
    "others_chosen",
    "padded",
    "shared_memory",
    "with_features",
    "with_wide_bias",
]

_ROW_KERNELS = ("delta", "dbias_sum")  # no tiles of scores, no shared memory
OWNERS_OF_KEYS = ("dkdv", "dk", "dv")  # one kernel's launches for both gradients and for one
MAX_HEAD_DIM = 256  # of the backward kernels: the widest tile row whose two accumulators fit the register file
MAX_FORWARD_HEAD_DIM = 512  # of the portable forward kernel, which has one


@dataclass(frozen=True)
class TileConfig:
    """One launch configuration: ``block_m`` queries by ``block_n`` keys per tile, warps of a program, depth of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    SOURCE: ClassVar[str] = ""  # where the plan takes one from by a rule of its room, as explain says it; others say it case by case

    def __post_init__(self) -> None:
        for name, allowed in (("block_m", (16, 32, 64, 128, 256)), ("block_n", (16, 32, 64, 128, 256)), ("num_warps", (1, 2, 4, 8, 16))):
            if getattr(self, name) not in allowed:
                raise bad_value(name, f"one of {allowed}", getattr(self, name))
        if self.num_stages < 1:
            raise bad_value("num_stages", "at least 1", self.num_stages)

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n} w{self.num_warps} s{self.num_stages}"


@dataclass(frozen=True)
class Problem:
    """What a configuration is chosen by: the part of a spec on which registers and shared memory depend."""

    kernel: str
    head_dim: int  # the larger of D and Dv, padded to a power of two
    itemsize: int  # bytes of an element of q, k, v
    bias: bool
    banded: bool  # causal: some tiles are partly visible, and a second, masked copy of the loop takes registers
    products: str = ""  # of float32 elements: "tf32" or "tf32x3" by tensor cores; "" by FMA units, and of 16-bit elements


problem_like = functools.cache(Problem)  # plans, and the table's rows, ask for the same few: then they are told apart by identity

_Config = TypeVar("_Config")


def chosen(by_hand: Mapping[str, object], kernel: str, kind: type[_Config]) -> _Config | None:
    """What the caller chose for a kernel by hand, if it is of a room's own kind: backends pass over each other's."""
    config = by_hand.get(kernel)
    return config if isinstance(config, kind) else None


def others_chosen(by_hand: Mapping[str, object], *kernels: str) -> bool:
    """Whether the caller chose one of these portable kernels by hand, so that no other takes its place by itself."""
    return bool(by_hand) and any(chosen(by_hand, kernel, TileConfig) is not None for kernel in kernels)


@functools.cache  # a plan asks for the same few dims dozens of times
def padded(head_dim: int) -> int:
    """The power of two, at least 16, that a tile row of ``head_dim`` elements occupies."""
    return max(16, 1 << (head_dim - 1).bit_length())


def shared_memory(problem: Problem, config: TileConfig, device: DeviceFacts) -> int:
    """An upper estimate, in bytes, of what one program of the kernel keeps in shared memory on a device.

    Streamed tiles take a buffer a pipeline stage (AMD: one less, with what is in flight and the program's own tiles in registers).
    Score and bias tiles pass through it to change layout.
    """
    if problem.kernel in _ROW_KERNELS:
        return 0
    m, n = config.block_m, config.block_n
    row = problem.head_dim * problem.itemsize
    score_tile = m * n * problem.itemsize
    own, streamed, exchange = {
        "forward": (m * row, 2 * n * row, score_tile),
        "dkdv": (2 * n * row, 2 * m * row, score_tile),
        "dk": (2 * n * row, 2 * m * row, score_tile),
        "dv": (n * row, 2 * m * row, score_tile),
        "dq": (2 * m * row, 2 * n * row, score_tile),
        "dbias": (0, 2 * (m + n) * row, 0),
    }[problem.kernel]
    amd = device.arch.startswith("gfx")
    if amd:
        own = 0
    buffers = (max(1, 2 * config.num_stages - 2) if amd else 2 * config.num_stages) / 2  # AMD, one stage: the two tiles take turns
    # WGMMA reads TF32 along one axis alone: tiles are stored again, transposed, and what TF32 leaves of them. Narrow ones go by registers.
    if problem.products and problem.kernel != "dbias" and problem.head_dim < 256:
        buffers, exchange = buffers + 2, 2 * exchange
    bias = m * n * 4 * (1 + buffers) if problem.bias else 0  # as wide as float32, once for its change of layout
    return int(own + streamed * buffers + max(exchange, score_tile if problem.bias else 0) + bias)


def of_both(kernel: str) -> str:
    """``"dkdv"`` for what it is called where it gives dk or dv alone, and then keeps less; every other name as it is."""
    return "dkdv" if kernel in OWNERS_OF_KEYS else kernel


def misread(problem: Problem, config: TileConfig) -> str | None:
    """What Triton makes of a configuration that must not run, or None. Of TF32 products by WGMMA over 16 rows, with two warpgroups, 3.6
    reads beyond the shared memory (H200, compute-sanitizer).
    """
    least, most = sorted((config.block_m, config.block_n))
    if problem.products and config.num_warps >= 8 and least < 32 and most >= 64:
        return f"8 warps on {config.block_m}x{config.block_n} tiles read beyond shared memory in TF32 products"
    return None


def with_wide_bias(problem: Problem, config: TileConfig, device: DeviceFacts) -> TileConfig:
    """A measured configuration, made to fit a float32 bias: rows were measured with a 16-bit one, whose buffers are half the size."""
    m, n, row = config.block_m, config.block_n, problem.head_dim * problem.itemsize
    own, streamed = {"forward": (m, 2 * n), "dkdv": (2 * n, 2 * m), "dq": (2 * m, 2 * n), "dbias": (0, 2 * (m + n))}[
        of_both(problem.kernel)
    ]
    stages = config.num_stages
    while stages > 1 and own * row + stages * (streamed * row + m * n * 4) > device.shared_memory:
        stages -= 1
    return replace(config, num_stages=stages)


def with_features(problem: Problem, config: TileConfig, weight: int) -> TileConfig:
    """A configuration made to leave registers for what scores go through: fewer scores a thread than the rows were measured with.

    weight: 1 for each of a soft cap, ALiBi, a mask beside a bias, dropout, and starts or query lengths. By what the compiler spills
    (``tests/aot``); not measured.

    TF32 products beside any of them get tiles of 32 by 32, which are multiplied by mma.sync. Larger ones take WGMMA, and where registers
    are scarce ptxas 12.8 works out the address of an operand in shared memory from a register that holds something else by then: an
    illegal address (H200, compute-sanitizer: dq by 64x64 tiles and 8 warps, a soft cap and dropout; docs/results).
    """
    if weight and problem.products:
        if config.block_m <= 32 and config.block_n <= 32:
            return config
        return TileConfig(min(config.block_m, 32), min(config.block_n, 32), 4 if problem.head_dim <= 64 else 8, 1)
    most = 32 if weight < 2 else 16 if weight < 4 else 8
    of_keys = problem.kernel in OWNERS_OF_KEYS
    least_m, most_warps = 32 if of_keys else 64, 8
    while weight and config.block_m * config.block_n > most * 32 * config.num_warps:
        if config.block_m > least_m and (of_keys or config.num_warps >= most_warps):
            config = replace(config, block_m=config.block_m // 2)
        elif config.num_warps < most_warps:
            config = replace(config, num_warps=config.num_warps * 2)
        else:
            break
    return config


def _candidates(problem: Problem, amd: bool) -> list[TileConfig]:
    """Configurations from most to least demanding; the first that fits a device is its default.

    Chosen from what compiles with few or no spills for sm80, sm86, sm90, sm100 and gfx942 (``tests/aot``); not measured.
    """
    kernel = of_both(problem.kernel)
    width = 64 if problem.head_dim <= 64 else problem.head_dim
    if width > MAX_HEAD_DIM:  # the forward kernel alone
        shapes = [(16, 16, 8, 1)] if problem.itemsize > 2 or amd else [(64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1)]
        return [TileConfig(*shape) for shape in [*shapes, (16, 16, 4, 1)]]
    if amd:  # half the registers a thread with 8 warps: 4 warps on small tiles
        small = [(32, 32, 4, 1)] if problem.kernel == "forward" else [(16, 16, 4, 1)]
        shapes = {
            "forward": {64: [(64, 64, 4, 2)] if problem.bias else [(128, 64, 4, 2)], 128: [(64, 64, 4, 1), (64, 32, 4, 2)]},
            "dkdv": {64: [(64, 64, 4, 1)], 128: [(64, 32, 4, 1)]},
            "dq": {64: [(64, 64, 4, 2), (64, 64, 4, 1)], 128: [(64, 32, 4, 1)]},
            "dbias": {64: [(64, 64, 4, 1)], 128: [(64, 32, 4, 1)]},
        }[kernel].get(width, small)
        if problem.itemsize > 2:
            shapes = [(32, 32, 4, 1)] if width == 64 else []
        return [TileConfig(*shape) for shape in [*shapes, (16, 16, 4, 1)]]
    if problem.products and width < 256:
        shapes = {
            "forward": {64: [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)], 128: [(128, 32, 8, 1), (64, 32, 4, 1)]},
            "dkdv": {64: [(32, 32, 4, 1)], 128: [(32, 32, 8, 1), (16, 32, 8, 1)]},
            "dq": {64: [(64, 64, 4, 1), (64, 32, 4, 1)], 128: [(32, 32, 4, 1), (32, 16, 4, 1)]},
            "dbias": {64: [(32, 32, 4, 1)], 128: [(32, 64, 8, 1), (32, 32, 8, 1)]},
        }[kernel][width]
        return [TileConfig(*shape) for shape in [*shapes, (16, 16, 8, 1)]]
    if problem.itemsize > 2:  # float32 products keep whole operand rows in registers, so tiles are small
        shapes = {
            "forward": {64: [(32, 32, 4, 2)], 128: [(32, 16, 4, 1)], 256: [(32, 16, 8, 1)]},
            "dkdv": {64: [(16, 32, 4, 1)], 128: [(16, 32, 8, 1)], 256: [(16, 16, 8, 1)]},
            "dq": {64: [(32, 32, 4, 2)], 128: [(32, 16, 8, 1)], 256: [(16, 16, 8, 1)]},
            "dbias": {64: [(32, 32, 4, 2)], 128: [(32, 32, 8, 1)], 256: [(32, 16, 8, 1)]},
        }[kernel][width]
        return [TileConfig(*shape) for shape in [*shapes, (16, 16, 8, 1)]]
    few_registers = [(64, 64, 8, 2)] if problem.bias else [(64, 128, 8, 2), (64, 64, 8, 2)]
    shapes = {
        "forward": {
            64: [(128, 64, 4, 3), (128, 64, 4, 2)],
            128: [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)],
            256: [(128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1)],
        },
        "dkdv": {
            64: [(32, 128, 8, 2)] if problem.bias else [(64, 128, 8, 2), (64, 64, 4, 2)],
            128: [*few_registers, (32, 64, 4, 2)],
            256: [(32, 64, 8, 2), (32, 32, 4, 1)],
        },
        "dq": {
            64: [(128, 64, 8, 2), (64, 64, 4, 2)],
            128: [(128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)],
            256: [(64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 1)],
        },
        "dbias": {64: [(128, 64, 8, 2), (64, 64, 4, 2)], 128: [(128, 64, 8, 2), (64, 64, 4, 2)], 256: [(32, 64, 4, 1), (32, 32, 4, 1)]},
    }[kernel][width]
    return [TileConfig(*shape) for shape in [*shapes, (64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)]]


def default_config(problem: Problem, device: DeviceFacts) -> TileConfig:
    """The configuration for a device and problem that nobody measured: the first candidate that fits the device's shared memory.

    Raises :class:`UnsupportedError` if none does.
    """
    if problem.kernel in _ROW_KERNELS:
        return TileConfig(64, 16, 4, 1)
    if device.arch == "interpreter":
        return TileConfig(32, 16, 4, 1)
    candidates = _candidates(problem, device.arch.startswith("gfx"))
    for config in candidates:
        if shared_memory(problem, config, device) <= device.shared_memory:
            return config
    raise unsupported(
        f"{problem.kernel} at head dim {problem.head_dim} with {problem.itemsize}-byte elements on {device.arch}",
        "triton",
        f"its {device.shared_memory} bytes of shared memory do not hold the smallest tile: use a 16-bit dtype or backend('tiled')",
    )
