"""Jagged NestedTensors into ``attention``: packed sequences by another name. Called by ``door.py``; imports checks and PyTorch alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import LAYOUTS, Given, Options, VarlenGiven, VarlenOptions, argument
from .errors import bad_type, bad_value

__all__ = ["attend_nested", "is_nested", "packed"]


def is_nested(given: Sequence[Any]) -> bool:
    """Whether one of q, k and v is a NestedTensor."""
    return any(isinstance(x, Tensor) and x.is_nested for x in given[:3])


def attend_nested(attend_varlen: Callable[..., Any], given: Given, options: Options, return_lse: bool) -> Any:
    """Attention of jagged q, k and v by ``attend_varlen``: out, or out and lse, jagged, with q's offsets."""
    rows, more = packed(given, options)
    result = attend_varlen(tuple(rows), tuple(more), return_lse)
    q: Any = given.q
    out = result[0] if return_lse else result
    out = _like(q, out.transpose(0, 1), 2) if options.layout == "bhsd" else _like(q, out, 1)
    return (out, _like(q, result[1], 2)) if return_lse else out


def packed(given: Given, options: Options) -> tuple[VarlenGiven, VarlenOptions]:
    """The call of packed sequences that one of jagged q, k and v is. Raises ValueError or TypeError where they do not fit each other.

    Offsets are handed on as they are; the longest sequence is a hint only where PyTorch knows it already: nothing waits for a device.
    """
    if options.layout not in LAYOUTS:
        raise bad_value("layout", f"one of {', '.join(LAYOUTS)}", repr(options.layout))
    ragged = LAYOUTS.index(options.layout) + 1
    q, k, v = (_jagged(name, x, ragged, options.layout) for name, x in zip(Given._fields[:3], given[:3], strict=True))
    if k.shape[0] != q.shape[0]:
        raise bad_value("k", f"q's {q.shape[0]} sequences", k.shape[0])
    if v.shape[0] != k.shape[0] or v.shape[ragged] != k.shape[ragged] or (v.lengths() is not None and v.offsets() is not k.offsets()):
        hint = "torch.nested.nested_tensor_from_jagged(values, k.offsets()) makes one; the numbers in another tensor would have to be read"
        raise bad_value("v", "k's sequences, by the same offsets", "others", hint)
    if given.key_lengths is not None:
        raise bad_value("key_lengths", "None, as jagged tensors have lengths of their own", "a tensor")
    for name in ("query_starts", "query_lengths", "key_starts", "diagonals"):
        if getattr(given, name) is not None:
            raise bad_value(argument(name), "None, as jagged tensors have lengths of their own", "a tensor")
    if options.diagonal is not None:
        raise bad_value("diagonal", "None, as jagged tensors have one for each sequence", options.diagonal, "or causal='top_left'")
    heads = q.shape[3 - ragged]
    biases = (("bias", given.bias), ("mask", given.mask), ("bias[1]", given.second_bias))
    bias, mask, second = (_wide(name, x, q.shape[0], heads) for name, x in biases)
    causal, window, scale, softcap, dropout_p, deterministic, _, precision, backend, _ = options
    q_rows, k_rows, v_rows = (x.values() if ragged == 1 else x.values().transpose(0, 1) for x in (q, k, v))
    rows = VarlenGiven(
        q_rows, k_rows, v_rows, bias, mask, given.alibi_slopes, given.sink, given.dropout_seed, q.offsets(), k.offsets(), q.lengths(),
        k.lengths(), second,
    )  # fmt: skip
    more = VarlenOptions(
        "padded", "padded", causal, window, scale, softcap, dropout_p, deterministic, precision, backend, q._maybe_max_seqlen,
        k._maybe_max_seqlen,
    )  # fmt: skip
    return rows, more


def _jagged(name: str, x: Any, ragged: int, layout: str) -> Any:
    """A jagged tensor of four dims, ragged where the layout has the length."""
    dims = "(B, length, heads, dim)" if ragged == 1 else "(B, heads, length, dim)"
    if not isinstance(x, Tensor) or not x.is_nested:
        raise bad_type(name, "a jagged tensor, as others of q, k and v are", type(x).__name__)
    if x.layout != torch.jagged:
        hint = "torch.nested.nested_tensor(…, layout=torch.jagged) makes one"
        raise bad_type(name, "a jagged tensor", f"a NestedTensor of layout {x.layout}", hint)
    if x.dim() != 4:
        raise bad_value(name, f"4 dims {dims}", f"{x.dim()} dims")
    found: int = x._ragged_idx  # type: ignore[attr-defined]
    if found != ragged:
        other = LAYOUTS[2 - ragged]
        hint = f"x.transpose(1, 2), or layout={other!r}" if found == 3 - ragged else "lengths may differ, heads and head dims not"
        raise bad_value(name, f"dim {ragged} ragged, {dims} of layout {layout!r}", f"dim {found} ragged", hint)
    return x


def _wide(name: str, x: Any, count: int, heads: int) -> Any:
    """A bias or mask as the layout "padded" has it, with four dims. What is no tensor is left to the checks."""
    if not isinstance(x, Tensor):
        return x
    if x.is_nested:
        raise bad_type(name, "a dense tensor, padded to the longest sequence", "a NestedTensor", f"{name}.to_padded_tensor(…)")
    wide = x[(None,) * (4 - x.dim())] if 2 <= x.dim() < 4 else x
    # By !=, not by "in": to Dynamo no tuple with a symbolic size in it holds a number.
    if wide.dim() != 4 or any(own != 1 and own != size for own, size in zip(wide.shape[:2], (count, heads), strict=True)):
        wanted = f"2 to 4 dims that broadcast to ({count}, {heads}, longest of q, longest of k)"
        raise bad_value(name, wanted, tuple(x.shape))
    return wide


def _like(q: Any, values: Tensor, ragged: int) -> Tensor:
    """A jagged tensor of these values with q's offsets."""
    # What torch.nested.nested_tensor_from_jagged calls, less a warning that PyTorch 2.13 has there for tracers.
    from torch.nested._internal.nested_tensor import nested_view_from_values_offsets_lengths

    found: Tensor = nested_view_from_values_offsets_lengths(
        values, q.offsets(), q.lengths(), ragged_idx=ragged, min_seqlen=q._maybe_min_seqlen, max_seqlen=q._maybe_max_seqlen
    )
    return found
