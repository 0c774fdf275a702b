"""Configurations of the Hopper kernels: what one holds, how much shared memory it takes, and which is used for what. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import bad_value
from ..spec import AttentionSpec
from .configs import padded

__all__ = ["HopperConfig", "bias_bytes", "forward_config", "forward_section", "preferred", "shared_memory", "whole_tiles"]

ROWS = 64  # queries of one consumer warpgroup: the M of a warpgroup product
L2_SECTION = 24 * 2**20  # bytes of keys and values that tiles running at the same time may share: half of an H100's L2 cache


@dataclass(frozen=True)
class HopperConfig:
    """One launch configuration of the forward kernel.

    consumers: warpgroups of 64 queries each. block_n: keys of a block. num_stages: buffers for key and for value blocks. bias_stages: buffers for
    bias tiles, per consumer. turns: consumers issue their products in turn. own_out: the output has a buffer of its own. registers: a
    thread of a consumer other than the first, which gets what is left.
    """

    consumers: int
    block_n: int
    num_stages: int
    bias_stages: int = 1
    turns: bool = False
    own_out: bool = True
    persistent: bool = True
    q_stages: int = 1
    v_stages: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("consumers", (1, 2, 3)), ("block_n", (16, 32, 64, 128, 256)), ("bias_stages", (1, 2, 3, 4))):
            if getattr(self, name) not in allowed:
                raise bad_value(name, f"one of {allowed}", getattr(self, name))
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
    def registers(self) -> int:
        return 160 if self.consumers == 3 else 240

    def __str__(self) -> str:
        flags = " turns" * self.turns + " own-out" * self.own_out + " persistent" * self.persistent
        return f"{self.block_m}x{self.block_n} s{self.num_stages}/{self.v_stages or self.num_stages} b{self.bias_stages} q{self.q_stages}{flags}"


def bias_bytes(spec: AttentionSpec, config: HopperConfig) -> int:
    """Bytes of one bias buffer: a tile, a row of keys, or none where the bias has no dim of keys."""
    if spec.bias is None or not spec.bias.varies[4]:
        return 0
    itemsize = {"bool": 1, "fp32": 4}.get(spec.bias.dtype, 2)
    return (ROWS if spec.bias.varies[3] else 1) * config.block_n * itemsize


def shared_memory(spec: AttentionSpec, config: HopperConfig) -> int:
    """Bytes of shared memory of one program of the forward kernel."""
    head, value = padded(spec.head_dim) * 2, padded(spec.value_dim) * 2
    queries = config.block_m * (config.q_stages * head + config.own_out * value)
    keys = config.block_n * (config.num_stages * head + (config.v_stages or config.num_stages) * value)
    bias = config.bias_stages * config.consumers * bias_bytes(spec, config)
    barriers = 8 * ((2 * config.q_stages + 1) * config.consumers + 4 * config.num_stages + 2 * config.bias_stages * config.consumers)
    return queries + keys + bias + barriers + 1024  # and what alignment of the buffers may cost


def _candidates(head: int, bias: bool, banded: bool) -> tuple[HopperConfig, ...]:
    if head <= 64:
        consumers = 2 if banded or bias else 3
        return (HopperConfig(consumers, 128, 2), HopperConfig(2, 64, 2))
    if head <= 128:
        return (HopperConfig(2, 128, 2), HopperConfig(2, 128, 2, own_out=False), HopperConfig(2, 64, 2, own_out=False))
    return (HopperConfig(2, 64, 2, own_out=False), HopperConfig(2, 32, 2, own_out=False), HopperConfig(1, 32, 2, own_out=False))


def forward_config(spec: AttentionSpec, limit: int) -> HopperConfig | None:
    """The configuration for a spec within ``limit`` bytes of shared memory; None if no candidate fits."""
    head = padded(max(spec.head_dim, spec.value_dim))
    bias = spec.bias is not None and spec.bias.varies[4]
    for config in _candidates(head, bias, spec.lo is not None or spec.hi is not None):
        if shared_memory(spec, config) <= limit:
            return config
    return None


def forward_section(spec: AttentionSpec) -> int:
    """How many (batch, head) pairs run side by side: as many as keep their keys and values in the L2 cache."""
    pair = spec.keys * (spec.head_dim + spec.value_dim) * 2
    return max(1, min(spec.batch * spec.heads, L2_SECTION // max(1, pair)))


def preferred(spec: AttentionSpec) -> bool:
    """Whether the automatic choice takes these kernels where they can run."""
    return True


def whole_tiles(spec: AttentionSpec, config: HopperConfig) -> tuple[int, int]:
    """(query tiles of a (batch, head) pair, tiles of the whole problem)."""
    tiles = -(-spec.queries // config.block_m)
    return tiles, tiles * spec.batch * spec.heads
