"""Arguments and launches of the Hopper kernels. Called by ``launch/__init__.py`` when a plan needs it: it imports triton.

What TMA can address: a contiguous last dim, an address and strides that are multiples of 16 bytes. Tensors that are laid out otherwise are
copied to rows that are padded to that; their copies live as long as the launch. It writes whole 16 bytes: what ends between two of them is
written to such a copy too.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.hopper import forward as forward_kernels
from ..kernels.hopper.compat import TensorDescriptor, gl
from ..plan import layout
from ..plan.configs import padded
from ..plan.hopper import tile_first
from ..plan.kernels.forward import ForwardConfig, fuses_bias
from ..plan.kernels.shared import (
    ROWS,
    QueryConfig,
    bias_buffer,
    l2_order,
    mask_buffer,
    multiplied_columns,
    query_tiles,
    second_buffer,
    widths,
)
from ..plan.steps import Plan
from ..spec import AttentionSpec, Operands, Saved
from . import hopper_packed
from .calls import SMALLEST_SCALE, Call, address_of, alibi_of, bias_strides, cap_of, dropout_of, lengths_of, slope_strides
from .hopper_packed import AROUND, Around, Tables
from .mask_bounds import Bounds, bounds_call, bounds_of, new_bounds, skips
from .packed import in_line
from .room import Room

__all__ = [
    "addressable",
    "bias_by_queries",
    "blocks_of",
    "descriptor",
    "forward",
    "forward_calls",
    "in_order",
    "ready",
    "ready_operands",
    "register_limit",
    "writable",
    "written",
]

_TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32, torch.uint8: gl.uint8}
_ALIGNMENT = 16  # bytes


_FIELDS = {
    "base",
    "shape",
    "strides",
    "block_shape",
    "layout",
    "padding",
    "round_f32_to_tf32",
}  # of a descriptor, in the releases known here
_READ_REASON = "TMA reads rows that are contiguous and start at multiples of 16 bytes"
_WRITE_REASON = "its rows are not a multiple of 16 bytes, so it is written with padding and copied from there"


def forward(room: Room, plan: Plan, spec: AttentionSpec, x: Operands, saved: Saved) -> list[Call]:
    """The launches that fill out, lse and, if given, rest. Every tensor is canonical (``spec.spec_of``); lse and rest are contiguous."""
    saved = saved._replace(out=written(room, "out", saved.out))
    x = ready_operands(room, spec, x)
    return forward_calls(plan, spec, x, saved, hopper_packed.tables(room, plan, spec, x), new_bounds(room, plan, spec))


def in_order(spec: AttentionSpec, x: Operands) -> tuple[AttentionSpec, Operands]:
    """Spec and operands with that of two biases first that kernels take tiles of (``plan.hopper.tile_first``)."""
    own = tile_first(spec)
    return (own, x) if own is spec else (own, x._replace(bias=x.second_bias, second_bias=x.bias))


def forward_calls(
    plan: Plan, spec: AttentionSpec, x: Operands, saved: Saved, t: Tables | None = None, bounds: Bounds | None = None
) -> list[Call]:
    """The launches of a forward pass; all tensors are addressable. t: the tables of packed sequences; bounds: of what a mask shows."""
    spec, given = in_order(spec, x)
    x = hopper_packed.as_spread(t, given)
    q, k, v, bias, mask, lengths, slopes, sink, seed, *_ = x
    out, lse, rest = saved
    around = None if t is None else Around(spec, given, t, {"out": out}, saved)
    calls = []
    for step in plan.steps:
        config = step.config
        if step.kernel in AROUND:
            assert around is not None
            calls.append(AROUND[step.kernel](step, around))
            continue
        if step.kernel == "mask_bounds":
            assert bounds is not None
            calls.append(bounds_call(step, spec, x, bounds))
            continue
        assert isinstance(config, ForwardConfig)
        head, value, block_n = padded(spec.head_dim), padded(spec.value_dim), config.block_n
        bias_desc, bias_on, pointer, pointer_strides = bias_by_queries(spec, bias, config)
        of_heads, of_values = widths(spec.head_dim, config.own_widths), widths(spec.value_dim, config.own_widths)
        blocks = ((q, ROWS, of_heads), (k, block_n, of_heads), (v, block_n, of_values), (out, ROWS, of_values))
        args = (
            *[of_rows(spec, each, rows, columns[0]) for each, rows, columns in blocks],
            *(bias_desc, pointer, lengths_of(lengths), hopper_packed.tiles_of(t, spec, "queries"), bounds_of(bounds, "queries")),
            *(slopes, sink, lse, rest),
            *(pointer_strides, bias_on),
            *(slope_strides(slopes), None if sink is None else sink.stride(0), cap_of(spec), dropout_of(spec, seed)),
            *blocks_of(x.second_bias, second_buffer(spec, config).shape),
            *blocks_of(mask, mask_buffer(spec, config).shape),
            *[of_rows(spec, each, rows, columns[1]) if len(columns) > 1 else None for each, rows, columns in blocks],
            *(batch_of(spec), spec.heads, spec.groups, spec.batch_inner, spec.queries, spec.keys, spec.lo, spec.hi, spec.scale),
            *schedule_of_queries(spec, config, step.programs),
        )
        constants: dict[str, Any] = {
            "C": config,
            "BATCH_FASTEST": step.order == "batch",
            "IS_MASK": spec.bias is not None and spec.bias.is_mask,
            "VARIES_M": spec.bias is not None and spec.bias.varies[3],
            "POSITIVE_SCALE": spec.scale >= SMALLEST_SCALE,
            "EVEN_N": is_even(spec, block_n),
            "ALIBI": alibi_of(spec, block_n),
            "FUSING": fuses_bias(spec, config),
            "QK": multiplied_columns(spec.head_dim, head),
            "OV": multiplied_columns(spec.value_dim, value),
            "SKIPS": skips(bounds, "queries"),
        }
        calls.append(Call(forward_kernels.forward, args, constants | register_limit(config), config, step.programs))
    return calls


def register_limit(config: QueryConfig) -> dict[str, int]:
    """``maxnreg``, the registers of a thread at launch, where several CTAs share an SM: one would else take all."""
    return {"maxnreg": config.launch_registers} if config.ctas_per_sm > 1 else {}


def blocks_of(x: Tensor | None, block: Sequence[int]) -> tuple[TensorDescriptor | None, tuple[int, ...] | None]:
    """How kernels get a bias or a mask in blocks of its two inner dims: a descriptor, and along which outer dims it varies."""
    if x is None:
        return None, None
    x = x.view(torch.uint8) if x.dtype == torch.bool else x
    return descriptor(x, (1, 1, 1, *block)), tuple(int(size > 1) for size in x.shape[:3])


def bias_by_queries(
    spec: AttentionSpec, bias: Tensor | None, config: QueryConfig
) -> tuple[TensorDescriptor | None, tuple[int, ...] | None, Tensor | None, tuple[int, ...] | None]:
    """How kernels that own queries get the bias: as :func:`blocks_of`, or where it does not vary over keys a pointer and its strides."""
    if bias is None or (spec.bias is not None and spec.bias.varies[4]):
        return *blocks_of(bias, bias_buffer(spec, config).shape), None, None
    bias = bias.view(torch.uint8) if bias.dtype == torch.bool else bias
    return None, None, bias, bias_strides(bias)[:4]  # type: ignore[index]


def batch_of(spec: AttentionSpec) -> int:
    """How many batch entries, or packed sequences."""
    return spec.batch if spec.packed is None else spec.packed.sequences


def schedule_of_queries(spec: AttentionSpec, config: QueryConfig, programs: int) -> tuple[int, int, int, int]:
    """How kernels that own queries deal out their tiles (``kernels/hopper/schedule.Uniform``); those of packed sequences have a table."""
    return (0, 0, 0, 0) if spec.packed is not None else (*query_tiles(spec, config), *l2_order(spec, config, programs))


def is_even(spec: AttentionSpec, block_n: int) -> bool:
    """Whether keys end where a block does."""
    return spec.keys % block_n == 0 and not spec.key_lengths and spec.packed is None


def of_rows(spec: AttentionSpec, x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A TMA descriptor of q, k, v or what lies like one, (batch, rows, heads, dim), in blocks of so many rows of a head."""
    return descriptor(x, (1, rows, 1, columns)) if spec.packed is None else ragged(x, (1, 1, rows, 1, columns))


def ragged(x: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """A TMA descriptor of packed rows (1, rows, heads, dim), in which a sequence may begin and end anywhere (``kernels/hopper/extent.py``).

    A block's address is that of coordinates (2^30, end, 2^30 - length + row, head, column): the first two dims' strides cancel 2^30 rows
    modulo 2^64, and the third ends at 2^30, so what lies past the sequence's end is outside (Triton's ``tools/ragged_tma.py``).
    """
    _, rows, heads, _ = x.shape
    unit = _ALIGNMENT // x.element_size()
    row = unit if rows == 1 else x.stride(1)
    strides = [2**34 - row, row, row, unit if heads == 1 else x.stride(2), 1]
    return _descriptor(x, [0x7FFF0000, 0x7FFF0000, 2**30, heads, x.shape[3]], strides, tuple(block))


def descriptor(x: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """A TMA descriptor of an addressable tensor, in blocks of that shape."""
    return _descriptor(x, *_laid(x.shape, x.stride(), _ALIGNMENT // x.element_size()), tuple(block))


@functools.lru_cache(maxsize=256)  # keys lie as values do, and gradients as what they are of
def _laid(shape: tuple[int, ...], strides: tuple[int, ...], unit: int) -> tuple[list[int], list[int]]:
    """Shape and strides of a descriptor, to be read only. unit: numbers of 16 bytes, the stride of a dim of one."""
    own = [unit if size == 1 else stride for size, stride in zip(shape, strides, strict=True)]
    own[-1] = 1
    return [*shape], own


_alike: dict[tuple[Any, ...], dict[str, Any] | None] = {}  # by block and dtype, the fields of a descriptor; None: there are others
_new = object.__new__


def _descriptor(x: Tensor, shape: list[int], strides: list[int], block: tuple[int, ...]) -> TensorDescriptor:
    """One that Triton has checked, or of a meta tensor, whose launchers asked if TMA can address it, one like another that it has."""
    if not x.is_meta or (fields := _alike.get((block, x.dtype))) is None:
        made = TensorDescriptor(x, shape, strides, list(block), _shared_layout(block, x.dtype))
        _alike[block, x.dtype] = {**vars(made), "base": None} if vars(made).keys() <= _FIELDS else None
        return made
    made = _new(TensorDescriptor)
    made.__dict__ = {**fields, "base": x, "shape": shape, "strides": strides}
    return made


@functools.lru_cache(maxsize=1024)
def _shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    """How a block lies in shared memory. Cached: working it out takes longer than all else about a descriptor."""
    return gl.NVMMASharedLayout.get_default_for(list(block), _TYPES[dtype])


def addressable(x: Tensor) -> bool:
    """Whether TMA can address the tensor as it lies."""
    return layout.tma_addressable(x.shape, x.stride(), x.element_size(), address_of(x) % _ALIGNMENT)


def writable(x: Tensor) -> bool:
    """Whether TMA can write the tensor as it lies, and nothing beside it."""
    return layout.tma_writable(x.shape, x.stride(), x.element_size(), address_of(x) % _ALIGNMENT)


def ready(room: Room, name: str, x: Tensor) -> Tensor:
    """x itself, or a copy that TMA can address."""
    if addressable(x):
        return x
    target = room.new(name, layout.tma_padded(x.shape, x.element_size()), x.dtype)[..., : x.shape[-1]]
    return room.copied(name, x, target, _READ_REASON)


def written(room: Room, name: str, x: Tensor) -> Tensor:
    """x itself, or memory that TMA can write, from where x is filled."""
    if writable(x):
        return x
    return room.target(name, layout.tma_padded(x.shape, x.element_size()), x.dtype, x, _WRITE_REASON)


def ready_operands(room: Room, spec: AttentionSpec, x: Operands) -> Operands:
    """The operands, or copies, as the kernels read them."""
    q, k, v = (ready(room, name, each) for name, each in zip("qkv", x[:3], strict=True))
    bias, second, mask = x.bias, x.second_bias, x.mask
    if bias is not None and spec.bias is not None and spec.bias.varies[4]:  # else the bias is read through a pointer, of any strides
        bias = once(bias) if hopper_packed.spreads(spec, "bias") else ready(room, "bias", once(bias))
    if mask is not None:
        mask = once(mask) if hopper_packed.spreads(spec, "mask") else ready(room, "mask", once(mask))
    second = None if second is None else ready(room, "second bias", once(second))
    found = (q, k, v, bias, mask, second)
    if not all(map(operator.is_, found, (*x[:5], x.second_bias))):
        x = x._replace(q=q, k=k, v=v, bias=bias, mask=mask, second_bias=second)
    return in_line(room, x)


def once(bias: Tensor) -> Tensor:
    """A bias or mask whose expanded outer dims are read at their only element. An expanded dim of queries or keys is what a tile is made
    of: whoever makes it ready writes it out.
    """
    strides = bias.stride()[:3]
    return bias[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)] if 0 in strides else bias
