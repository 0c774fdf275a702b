"""Every check of user arguments, and the one table of shapes that drives them. Called by the public faces; bad input ends here.

Nothing is computed, allocated or launched before these return. Messages read ``name: wanted …, got …; hint``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Rational, Real
from typing import Any

import torch
from torch import Tensor

from .errors import bad_type, bad_value

__all__ = [
    "check_bias",
    "check_bool",
    "check_dtype_and_place",
    "check_heads",
    "check_key_lengths",
    "check_number",
    "check_scale",
    "check_seed",
    "check_seed_range",
    "check_sink",
    "check_slopes",
    "check_tensors",
    "refuse_foreign",
    "refuse_layout",
    "same",
    "same_device_and_dtype",
    "seed_tensor",
]

_LARGEST = sys.float_info.max

INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BIAS_DTYPES = (*INPUT_DTYPES[:3], torch.bool)


def check_tensors(tensors: Mapping[str, Any], shapes: Mapping[str, str]) -> dict[str, int]:
    """Check every tensor against its line of named dims and return the dims' sizes.

    ``shapes`` maps an argument to its dims, such as ``{"q": "B M H D", "k": "B N H D"}``. A name takes the size it meets first and must
    have it everywhere; a number must match exactly; ``_`` takes any size.
    """
    sizes: dict[str, int] = {}
    for name, line in shapes.items():
        tensor, dims = tensors[name], line.split()
        if not isinstance(tensor, Tensor):
            raise bad_type(name, "a tensor", type(tensor).__name__)
        refuse_layout(name, tensor)
        if tensor.dim() != len(dims):
            raise bad_value(name, f"{len(dims)} dims ({', '.join(dims)})", f"{tensor.dim()} dims {tuple(tensor.shape)}")
        for dim, size in zip(dims, tensor.shape, strict=True):
            wanted = int(dim) if dim.isdigit() else size if dim == "_" else sizes.setdefault(dim, size)
            if size != wanted:
                named = ", ".join(f"{d}={sizes[d]}" if d in sizes else d for d in dims)
                raise bad_value(name, f"shape ({named})", tuple(tensor.shape), _shape_hint(name, dim, shapes))
    if sizes.get("D") == 0:
        raise bad_value(next(iter(shapes)), "a head dim of at least 1", 0)
    return sizes


_DIM_WORDS = {
    "B": "the batch",
    "H": "the number of heads",
    "Hk": "the number of heads",
    "D": "the head dim",
    "M": "the query length",
    "N": "the key length",
}


def _shape_hint(name: str, dim: str, shapes: Mapping[str, str]) -> str:
    if dim.isdigit():
        return f"that dim of {name} holds its {dim} parts"
    others = [other for other, line in shapes.items() if other != name and dim in line.split()]
    word = _DIM_WORDS.get(dim, dim)
    return f"{' and '.join([*others[:1], name])} must share {word}"


def refuse_foreign(name: str, x: Any) -> None:
    """Refuse tensors that nobody here can read, since they are not what their memory holds: nested, sparse, and PyTorch's CausalBias."""
    refuse_layout(name, x)
    if type(x) is not Tensor and type(x).__name__ == "CausalBias":
        hint = "causal=True is lower right, causal='top_left' is upper left"
        raise bad_type(name, "a tensor of numbers or a mask", "a CausalBias", hint)


def refuse_layout(name: str, x: Any) -> None:
    """Refuse a tensor without strides: a nested or a sparse one, of which PyTorch cannot even tell a shape or an address."""
    if not isinstance(x, Tensor) or (x.layout == torch.strided and not x.is_nested):
        return
    if x.is_nested:
        hint = "attention takes jagged q, k and v; or pad it (x.to_padded_tensor(0.0)) and pass key_lengths="
        raise bad_type(name, "a dense (strided) tensor", "a NestedTensor", hint)
    raise bad_type(name, "a dense (strided) tensor", x.layout)


def same_device_and_dtype(tensors: Mapping[str, Tensor]) -> None:
    """Check that all tensors share the first one's device and its (floating-point) dtype."""
    (first_name, first), *others = tensors.items()
    if first.dtype not in INPUT_DTYPES:
        raise bad_type(first_name, "float16, bfloat16 or float32 (float64 on backend 'tiled')", first.dtype)
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise bad_type(name, f"{first_name}'s dtype {first.dtype}", tensor.dtype, f"cast with {name}.to({first_name}.dtype)")
        if tensor.device != first.device:
            raise bad_value(name, f"{first_name}'s device {first.device}", tensor.device)


def check_heads(name: str, key_heads: int, heads: int) -> None:
    """Check that as many query heads, or none, read each key head."""
    if key_heads != heads and (key_heads == 0 or heads % key_heads):
        raise bad_value(name, f"a number of heads that divides q's {heads}", key_heads, "as many query heads read each key head")


def check_bool(name: str, value: Any) -> bool:
    """Check a true-or-false option; strings and numbers are refused, so that ``causal="False"`` cannot mean True."""
    if not isinstance(value, bool):
        raise bad_type(name, "True or False", repr(value))
    return value


def check_scale(name: str, value: Any, head_dim: int) -> float:
    """Check the softmax scale; None means ``1 / sqrt(head_dim)``, and 0.0 means 0.0."""
    if value is None:
        return float(head_dim) ** -0.5
    number = value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise bad_type(name, "a number or None", type(value).__name__, "pass float(scale)" if isinstance(value, Tensor) else "")
    # Comparisons, because torch.compile traces them with a symbolic scale, but not math.isfinite; NaN fails them as well. NumPy's float32
    # would take the bounds for its own kind, and a float may have no room for an integer or a fraction.
    if not isinstance(number, Rational):
        number = float(number)
    if not -_LARGEST <= number <= _LARGEST:
        raise bad_value(name, "a finite number", value)
    return float(number)


def check_number(name: str, value: Any, least: float, below: float, wanted: str) -> float:
    """Check a number in ``[least, below)``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise bad_type(name, wanted, type(value).__name__, f"pass float({name})" if isinstance(value, Tensor) else "")
    if not least <= value < below:  # type: ignore[operator]
        raise bad_value(name, wanted, value)
    return float(value)


def check_key_lengths(lengths: Any, q: Tensor, batch: tuple[int, ...], name: str = "key_lengths") -> None:
    """Check that key lengths, unless they are None, are one integer of any dtype for each batch entry. Kernels clamp them."""
    if lengths is None:
        return
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise bad_type(name, "a tensor of integers", str(lengths.dtype) if isinstance(lengths, Tensor) else type(lengths).__name__)
    if not same(lengths.shape, batch) or lengths.device != q.device:
        got = f"{tuple(lengths.shape)} on {lengths.device}"
        raise bad_value(name, f"one for each batch entry, shape {batch} on {q.device}", got)


def check_slopes(slopes: Any, q: Tensor, batch: tuple[int, ...], heads: int) -> None:
    """Check that ALiBi's slopes, unless they are None, are one number for each query head, of each batch entry or of all."""
    if slopes is None:
        return
    _check_floats(
        "alibi_slopes", slopes, q, ((heads,), (*batch, heads)), lambda: f"one for each head, shape ({heads},) or {(*batch, heads)}"
    )
    if slopes.requires_grad and torch.is_grad_enabled():
        raise bad_value("alibi_slopes", "a tensor that requires no gradient", "one that does", "detach it, or learn a bias instead")


def check_sink(sink: Any, q: Tensor, heads: int) -> None:
    """Check that a sink, unless it is None, is one number for each query head."""
    if sink is not None:
        _check_floats("sink", sink, q, ((heads,),), lambda: f"one for each query head, shape ({heads},)")


def check_seed(seed: Any, q: Tensor) -> None:
    """Check a dropout_seed: None, an int of 64 bits, or an int64 tensor (seed, offset) where q is."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise bad_type("dropout_seed", "an int, or an int64 tensor (seed, offset)", seed.dtype)
        if not same(seed.shape, (2,)) or seed.device != q.device:
            raise bad_value("dropout_seed", f"(seed, offset), shape (2,) on {q.device}", f"{tuple(seed.shape)} on {seed.device}")
    elif seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise bad_type("dropout_seed", "an int, an int64 tensor (seed, offset), or None", type(seed).__name__)
        check_seed_range(seed)


def check_seed_range(seed: int) -> None:
    """Check an int as the seed of dropout: of an argument that was checked before, only its value can be wrong."""
    if not -(2**63) <= seed < 2**63:
        raise bad_value("dropout_seed", "a number of 64 bits", seed)


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """(seed, offset) of dropout as the operators take it, int64 and contiguous; drawn from PyTorch's generator of the device for None."""
    if isinstance(seed, Tensor):
        return seed.contiguous()
    if seed is None:
        return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device)
    made = torch.zeros(2, dtype=torch.int64, device=device)
    made[:1].fill_(seed)  # no copy from the host, for which a captured graph could not wait
    return made


def same(shape: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether two shapes are the same; sizes may be symbolic, of which a tuple would compare identities first."""
    return len(shape) == len(wanted) and all(own == size for own, size in zip(shape, wanted, strict=True))


def _check_floats(name: str, x: Any, q: Tensor, shapes: tuple[tuple[int, ...], ...], wanted: Callable[[], str]) -> None:
    if not isinstance(x, Tensor) or x.dtype not in INPUT_DTYPES:
        raise bad_type(name, "a tensor of floats, or None", str(x.dtype) if isinstance(x, Tensor) else type(x).__name__)
    if not any(same(x.shape, shape) for shape in shapes):
        raise bad_value(name, wanted(), tuple(x.shape))
    if x.device != q.device:
        raise bad_value(name, f"q's device {q.device}", x.device)


def check_bias(bias: Any, q: Tensor, full: tuple[int, ...], name: str = "bias") -> None:
    """Check that a bias (or mask), unless it is None, broadcasts to ``full = (*batch, H, M, N)`` and sits where q does."""
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise bad_type(name, "a tensor or None", type(bias).__name__)
    refuse_layout(name, bias)
    if not 2 <= bias.dim() <= len(full):
        raise bad_value(name, _bias_wanted(full), f"{bias.dim()} dims {tuple(bias.shape)}")
    for own, size in zip(reversed(bias.shape), reversed(full), strict=False):
        if own != 1 and own != size:
            raise bad_value(name, _bias_wanted(full), tuple(bias.shape), _bias_hint(name, tuple(bias.shape), full))
    check_dtype_and_place(name, bias, q)


def check_dtype_and_place(name: str, bias: Tensor, q: Tensor) -> None:
    """Check that a bias (or mask) is of numbers or bools, dense and where q is."""
    refuse_layout(name, bias)
    if name == "mask" and bias.dtype != torch.bool:
        hint = "a float one is a bias" if bias.is_floating_point() else "mask.bool() is True where it is not 0"
        raise bad_type("mask", "a bool tensor, True = visible", bias.dtype, hint)
    if bias.dtype not in BIAS_DTYPES and not (bias.dtype == q.dtype == torch.float64):
        raise bad_type(name, "float16, bfloat16, float32 or bool (True = visible)", bias.dtype)
    if bias.device != q.device:
        raise bad_value(name, f"q's device {q.device}", bias.device)


def _bias_wanted(full: tuple[int, ...]) -> str:
    # Worded only when it is needed: formatting a symbolic size would make torch.compile specialise on it.
    *batch, H, M, N = full
    names = [f"B={size}" if len(batch) == 1 else f"B{n}={size}" for n, size in enumerate(batch)]
    return f"2 to {len(full)} dims that broadcast to ({', '.join(names)}, H={H}, M={M}, N={N})"


def _bias_hint(name: str, shape: tuple[int, ...], full: tuple[int, ...]) -> str:
    if len(full) == 4 and len(shape) == 3 and shape[0] == full[0] != full[1]:
        return f"a 3-dim {name} is (H, M, N); for one per batch entry pass {name}[:, None]"
    if len(full) == 4 and len(shape) == 2 and shape == (full[0], full[3]):
        return f"for one row of keys per batch entry pass {name}[:, None, None, :]"
    return "each dim must be 1 or the full size"
