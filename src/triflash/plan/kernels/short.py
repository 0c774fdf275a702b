"""The kernels for short rows (``kernels/triton/short.py``), whose programs have all keys of a head: their configurations, what they can do,
when they are taken, and their grids. Called by ``plan/triton.py`` and ``launch/short.py``. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ...errors import bad_value
from ...spec import AttentionSpec, BiasSpec, Needs
from ..configs import MAX_HEAD_DIM, OWNERS_OF_KEYS, TileConfig, chosen, others_chosen, padded
from ..device import DeviceFacts
from ..steps import Step, asked_products, broadcast_rows, ceil_div
from .parts import dbias_sum_steps

__all__ = [
    "KERNELS", "ShortConfig", "backward_steps", "bias_form", "choose", "choose_backward", "forward_steps", "pieces", "runs", "sum_of",
    "takes", "takes_backward", "why_not",
]  # fmt: skip

KERNELS = ("short_forward", "short_backward")
MAX_KEYS = 256  # of the backward kernel's one tile
MAX_FORWARD_KEYS = 384  # of the forward kernel's three
MEASURED = ("sm90",)  # H200, docs/tuning.md, 2026-11-30
PIECES = 80  # keys of two tiles, 64 and 16, with which the forward kernel is faster than Hopper's up to head dim 64
ROUNDS = 4  # tiles of queries of a program where a head has many
TINY = 32  # queries and keys that a warp or two compute, of which an SM holds many more than of programs of four
MAX_LOAD_IMBALANCE = 1.15  # of pairs to SMs where a pair has so many queries that a program takes long


@dataclass(frozen=True)
class ShortConfig(TileConfig):
    """``block_m`` queries by tiles of ``block_n`` keys: one tile that has all of them (backward), or up to three (forward, :func:`pieces`).

    rounds: tiles of queries (forward), or pairs of batch entry and key head (backward), that a program takes one after the other; 0: what
    the plan finds. ctas_per_sm: programs that share an SM's registers, so that one waits for its tiles while another computes; 0: as many
    as it comes to. late_v: values take the place of keys in shared memory (forward), which has room for more programs then.
    """

    rounds: int = 0
    ctas_per_sm: int = 0
    late_v: bool = False

    SOURCE: ClassVar[str] = "by keys and head dim, of plan/kernels/short.py"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 0:
            raise bad_value("rounds", "0 (the plan's choice) or more", self.rounds)
        if not 0 <= self.ctas_per_sm <= 16:
            raise bad_value("ctas_per_sm", "from 0 (as many as it comes to) to 16", self.ctas_per_sm)

    @property
    def launch_registers(self) -> int:
        """What a thread may take of an SM's 65,536 registers; 0: no limit."""
        return min(255, 65_536 // (32 * self.num_warps * self.ctas_per_sm) // 8 * 8) if self.ctas_per_sm else 0

    def __str__(self) -> str:
        text = super().__str__() + (f" {self.rounds} rounds" if self.rounds else "")
        return text + (f" {self.ctas_per_sm} CTAs/SM" if self.ctas_per_sm else "") + " late-v" * self.late_v


def why_not(spec: AttentionSpec, backward: bool) -> tuple[str, str] | None:
    """None if the kernel of a pass can run a spec that backend ``triton`` can, else (what it cannot do, the nearest thing that works)."""
    if spec.packed is not None:
        return "packed sequences", "backend triton's own kernels for them"
    if spec.placed or spec.diagonal or spec.shift is not None:
        return "starts, query lengths and diagonals of their own", "backend triton's other kernels"
    if max(spec.head_dim, spec.value_dim) > MAX_HEAD_DIM:
        return f"head dim {max(spec.head_dim, spec.value_dim)}", f"its limit is {MAX_HEAD_DIM}"
    limit = MAX_KEYS if backward else MAX_FORWARD_KEYS
    if spec.keys > limit:
        return f"{spec.keys} keys", f"its limit is {limit}: backend triton's other kernels"
    return None


def runs(spec: AttentionSpec, backward: bool = False) -> bool:
    """Whether there is anything to run, and the kernel of the pass can."""
    return not spec.is_empty and why_not(spec, backward) is None


def takes(spec: AttentionSpec, device: DeviceFacts) -> bool:
    """Whether ``attention`` takes the forward kernel by itself: where it was measured to be the faster."""
    return _measured(spec, device, False) and _best(spec, device.sms) is not None


def takes_backward(spec: AttentionSpec, device: DeviceFacts) -> bool:
    """Whether ``attention`` takes the backward kernel by itself: where it was measured to be the faster."""
    return _measured(spec, device, True) and _best_backward(spec, device.sms) is not None


def _measured(spec: AttentionSpec, device: DeviceFacts, backward: bool) -> bool:
    """Whether anything like it ran on a GPU of that kind, and was right: what has not is no default, whatever the interpreter says."""
    if device.arch not in MEASURED or spec.dtype not in ("fp16", "bf16") or _width(spec) > 128 or not runs(spec, backward):
        return False
    bias = spec.bias
    tiled = bias is None or (bias.dtype == spec.dtype and bias.varies[3] and bias.varies[4])
    return tiled and spec.groups == 1 and spec.lo is None and not (_is_heavy(spec) or spec.key_lengths or spec.sink)


def _width(spec: AttentionSpec) -> int:
    return padded(max(spec.head_dim, spec.value_dim))


def _is_heavy(spec: AttentionSpec) -> bool:
    """Whether more happens to a score than a bias or a band: that takes registers, for fewer programs an SM."""
    return spec.softcap > 0 or spec.alibi or spec.mask is not None or spec.dropout > 0 or spec.second is not None


def _best(spec: AttentionSpec, sms: int) -> ShortConfig | None:
    """What was measured to be the fastest of the forward kernel, where that is faster than other kernels; else None."""
    width = _width(spec)
    if spec.keys > (PIECES if width <= 64 and not _is_full(spec.bias) else 64) or _is_long_beside_full_bias(spec):
        return None
    if (longest := max(spec.queries, spec.keys)) <= TINY:
        size = padded(longest)
        return ShortConfig(size, size, 1 if size == 16 or width <= 64 else 2, 1)
    tiles = ceil_div(spec.queries, 64)
    if tiles >= 4 * ROUNDS and tiles // ROUNDS * spec.batch * spec.heads >= 4 * sms:
        return ShortConfig(64, 64, 4, 1, rounds=ROUNDS)  # reads keys and values a quarter as often
    return ShortConfig(64, 64, 4, 1, late_v=width > 64)


def _best_backward(spec: AttentionSpec, sms: int) -> ShortConfig | None:
    """The same of the backward kernel."""
    width, pairs = _width(spec), spec.batch * spec.kv_heads
    if (spec.queries > 256 and ceil_div(pairs, sms) * sms > MAX_LOAD_IMBALANCE * pairs) or _is_long_beside_full_bias(spec):
        return None
    if (longest := max(spec.queries, spec.keys)) <= TINY:
        size = padded(longest)
        warps = 1 if width <= (64 if size == 16 else 32) else 2
        return ShortConfig(size, size, warps, 1, ctas_per_sm=8 // warps if _is_shared(spec.bias) else 0)
    if spec.keys <= 64:
        if _is_full(spec.bias):
            return ShortConfig(64, 64, 4, 1, ctas_per_sm=3) if width <= 64 else ShortConfig(64, 64, 4, 2)
        if spec.bias is not None:  # more to keep in registers
            return ShortConfig(64, 64, 4 if width <= 64 else 8, 2)
        return ShortConfig(64, 64, 4, 1, ctas_per_sm={64: 4, 128: 2}.get(width, 0))
    if spec.keys > 128 or spec.bias is not None:
        return None
    if spec.queries > 128:
        return ShortConfig(64, 128, 8, 2) if width <= 64 else None
    return ShortConfig(64 if spec.queries <= 64 else 128, 128, 8, 1)


def _is_full(bias: BiasSpec | None) -> bool:
    """Whether a bias has as many elements as there are scores."""
    return bias is not None and all(bias.varies)


def _is_long_beside_full_bias(spec: AttentionSpec) -> bool:
    """Whether queries are more than a tile, beside a bias of full shape: nobody measured those."""
    return spec.queries > 64 and _is_full(spec.bias)


def _is_shared(bias: BiasSpec | None) -> bool:
    """Whether pairs share a bias, whose gradient a program then sums up."""
    return bias is not None and not all(bias.varies)


def choose(spec: AttentionSpec, device: DeviceFacts) -> ShortConfig:
    """The configuration of the forward kernel where nobody chose one."""
    config = None if device.arch == "interpreter" else _best(spec, device.sms)
    return config or ShortConfig(16, padded(min(spec.keys, MAX_KEYS)), 4, 1)


def choose_backward(spec: AttentionSpec, device: DeviceFacts) -> ShortConfig:
    """The configuration of the backward kernel where nobody chose one."""
    config = None if device.arch == "interpreter" else _best_backward(spec, device.sms)
    return config or ShortConfig(16, padded(spec.keys), 4, 1)


def pieces(keys: int, block_n: int) -> tuple[int, ...]:
    """Up to three tiles of ``block_n`` keys at most that have all of them, and few others: 197 are one of 256, or 128, 64 and 16; () if
    there are none. Only the last has other keys, so that the others need no mask.
    """
    found: list[int] = []
    left = keys
    while left > 0 and len(found) < 3:
        size = min(block_n, padded(left))
        if found or keys > block_n:  # smaller ones, if another is to come and that saves something
            while len(found) < 2 and size > left and padded(left - size // 2) < size // 2:
                size //= 2
        found.append(size)
        left -= size
    return tuple(found) if left <= 0 else ()


def forward_steps(spec: AttentionSpec, device: DeviceFacts, by_hand: Mapping[str, object]) -> tuple[Step, ...]:
    """The kernel of a forward pass; none where others are to run: with a configuration chosen by hand it runs wherever it can, and nowhere
    where another kernel's was.
    """
    config = chosen(by_hand, "short_forward", ShortConfig)
    others = others_chosen(by_hand, "forward", "few_forward")
    if not (takes(spec, device) and not others if config is None else runs(spec)):
        return ()
    config = config or choose(spec, device)
    if not pieces(spec.keys, config.block_n):
        raise bad_value("short_forward", f"block_n that has {spec.keys} keys in three pieces", config.block_n)
    parts = ceil_div(ceil_div(spec.queries, config.block_m), max(1, config.rounds))
    return (Step("short_forward", config, parts * spec.heads * spec.batch, precision=asked_products(spec)),)


def _check_backward(spec: AttentionSpec, device: DeviceFacts, config: ShortConfig) -> None:
    """Raise ValueError where a configuration is none for the spec."""
    if config.block_n < spec.keys:
        raise bad_value("short_backward", f"block_n of {spec.keys} keys at least", config.block_n)
    if device.arch == "sm90" and spec.dtype != "fp32" and config.block_m < 64 and config.num_warps >= 4:
        why = "Triton 3.6 reads ds of 32 queries wrongly there, as an operand of WGMMA, which four warps take: dq was wrong on an H200"
        raise bad_value("short_backward", "block_m of 64 queries at least, or fewer than 4 warps, on sm90", config.block_m, why)


def bias_form(spec: AttentionSpec, bias: BiasSpec, config: ShortConfig) -> str:
    """How the backward kernel gives the gradient of a bias: "full", of as many elements as scores; "keys", of one that varies over keys, a
    row a pair; "sum" over the pairs that share it, if it has one tile and no program has several heads; "": not at all.
    """
    *_, query, key = bias.varies
    if all(bias.varies):
        return "full"
    if spec.groups > 1 or not key:
        return ""
    if not query:
        return "keys"
    return "sum" if spec.queries <= config.block_m else ""


def _gives_of(spec: AttentionSpec, needs: Needs, config: ShortConfig) -> tuple[str, ...]:
    """The gradients that the backward kernel gives: of two biases a full one and one other, which it adds up in the same registers."""
    gives = [name for name in ("dq", "dk", "dv") if getattr(needs, name)]
    taken: set[bool] = set()
    for name, bias in _biases(spec):
        form = bias_form(spec, bias, config) if getattr(needs, name) else ""
        if form and (form == "full") not in taken:
            taken.add(form == "full")
            gives.append(name)
    return tuple(gives)


def sum_of(spec: AttentionSpec, config: ShortConfig, gives: tuple[str, ...]) -> tuple[str, BiasSpec] | None:
    """Of the gradients that a step gives, that which it sums over pairs, and its bias; None if none is."""
    return next(((name, bias) for name, bias in _biases(spec) if name in gives and bias_form(spec, bias, config) == "sum"), None)


def _biases(spec: AttentionSpec) -> list[tuple[str, BiasSpec]]:
    return [(name, bias) for name, bias in (("dbias", spec.bias), ("dsecond", spec.second)) if bias is not None]


def backward_steps(spec: AttentionSpec, needs: Needs, device: DeviceFacts, by_hand: Mapping[str, object]) -> tuple[Step, ...]:
    """The backward kernel, and what adds up its partial sums of the gradient of a bias; it leaves those that it cannot sum up. None where
    others are to run, as of the forward pass, or where it has nothing to give. For dsink it writes delta, from which that follows.
    """
    config = chosen(by_hand, "short_backward", ShortConfig)
    others = others_chosen(by_hand, *OWNERS_OF_KEYS, "dq", "few_backward")
    if not (takes_backward(spec, device) and not others if config is None else runs(spec, True)):
        return ()
    config = config or choose_backward(spec, device)
    _check_backward(spec, device, config)
    gives = _gives_of(spec, needs, config)
    if not gives:
        return ()
    sums: list[Step] = []
    own, looped = 1, spec.batch * spec.kv_heads  # pairs that programs own, or loop over
    summed = sum_of(spec, config, gives)
    if summed is None:
        splits = ceil_div(looped, max(1, config.rounds))
        for name, bias in _biases(spec):
            if name in gives and bias_form(spec, bias, config) == "keys":
                sums = dbias_sum_steps(spec, broadcast_rows(spec, bias), bias, name)
    else:
        name, bias = summed
        looped = broadcast_rows(spec, bias)
        own = spec.batch * spec.heads // looped
        at_a_time = device.sms * (config.ctas_per_sm or 2)
        splits = ceil_div(looped, config.rounds) if config.rounds else min(looped, max(1, at_a_time // own))
        sums = dbias_sum_steps(spec, splits, bias, name)
    gives = (*gives, "dsink") if needs.dsink else gives
    return Step("short_backward", config, own * splits, splits=splits, gives=gives, precision=asked_products(spec)), *sums
