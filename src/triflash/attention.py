"""The front door: one function for exact attention, in the field's present conventions, and ``merge_states`` for results in parts.

Method: FlashAttention (Dao et al. 2022), FlashAttention-2 (Dao 2023); merging: Rabe and Staats 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_bias, check_bool, check_scale, check_tensors, same_device_and_dtype
from .errors import bad_type, bad_value, unsupported
from .ops import attention_forward
from .plan.select import check_backend, requested_backend
from .spec import resolve_precision

__all__ = ["attention", "merge_states"]

LAYOUTS = ("bshd", "bhsd")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    layout: str = "bshd",
    precision: str | None = None,
    backend: str | None = None,
) -> Any:
    """Exact attention, ``softmax(scale * q kᵀ + bias) v`` over the visible keys, with gradients for q, k, v and the bias.

    Args:
        q: queries ``(*batch, M, H, D)``; fp16, bf16 or fp32 (fp64 on backend ``tiled``). One batch dim or more; any strides.
        k: keys ``(*batch, N, H, D)``, q's dtype, device and batch dims.
        v: values ``(*batch, N, H, Dv)``; Dv may differ from D.
        bias: added to the scaled scores, unscaled; any shape of 2 dims or more that broadcasts to ``(*batch, H, M, N)``, any strides;
            fp16, bf16 or fp32 whatever q is. −inf hides a key from a query. Its gradient has its own shape and dtype, summed in float32
            over what it broadcasts, and is computed only if it is asked for.
        mask: bool, of a shape as of a bias; True = visible. Not together with a bias: hide by ``bias.masked_fill(~mask, -inf)`` then.
        causal: True hides from query i the keys ``j > i + N − M`` (aligned to the bottom right: the last query sees every key);
            ``"top_left"`` those with ``j > i``.
        window: ``(left, right)``: query i sees the keys from ``i' − left`` to ``i' + right``, where ``i' = i + N − M``, or ``i' = i`` if
            causal is ``"top_left"``. None or −1 leaves a side open. Time is in proportion to the visible blocks.
        key_lengths: integers ``(*batch)``: keys from that number on are hidden. Does not move the diagonal. Not together with a bias or a
            mask.
        scale: default ``1 / sqrt(D)``; 0.0 means 0.0.
        return_lse: also return the natural log of the sum of exponentials of each query's visible scores, differentiable.
        layout: ``"bshd"`` as above, or ``"bhsd"``: q ``(*batch, H, M, D)``, k, v and the output alike. By strides; nothing is copied.
        precision: of float32 products: ``"ieee"``, ``"tf32"`` or ``"tf32x3"``; default PyTorch's own setting for matrix products.
        backend: as :func:`triflash.backend`; default the innermost block's, else ``TRIFLASH_BACKEND``, else ``"auto"``.

    Returns:
        out ``(*batch, M, H, Dv)`` in q's dtype, or ``(out, lse)`` with lse ``(*batch, H, M)`` in float32 (float64 for float64). A query
        that sees no key gets 0 and −inf, and gives zero gradient to everything.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or option; the message names the argument.
        UnsupportedError: no backend, or not the one that was asked for by name, can do this combination.

    Memory beyond inputs and outputs is O(M + N) per head, but for copies of inputs whose layout kernels cannot read. Results are bitwise
    reproducible, gradients included. Not differentiable twice, nor by ``torch.func``.
    """
    if layout not in LAYOUTS:
        raise bad_value("layout", f"one of {', '.join(LAYOUTS)}", repr(layout))
    if layout == "bhsd":
        q, k, v = (_swapped(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    batch, sizes = _check_inputs(q, k, v)
    M, N, H = sizes["M"], sizes["N"], sizes["H"]
    softmax_scale = check_scale("scale", scale, sizes["D"])
    lo, hi = _band(causal, window, M, N)
    check_bool("return_lse", return_lse)
    if backend is not None:
        check_backend("backend", backend)
    if precision is not None:
        resolve_precision(precision)
    elif q.dtype == torch.float32 and not torch.compiler.is_compiling():
        precision = resolve_precision("")  # now, so that a backward pass multiplies as its forward pass did
    scores = (*batch, H, M, N)
    extra = _bias_of(q, bias, mask, key_lengths, batch, scores)
    five, batch_inner = _two_levels(extra, batch, "bias" if mask is None else "mask")
    flat = [x.reshape(math.prod(batch), *x.shape[-3:]) if len(batch) > 1 else x for x in (q, k, v)]
    options = (batch_inner, lo, hi, softmax_scale, precision or "", backend or requested_backend())
    out, lse, _ = attention_forward(*flat, five, *options)
    if len(batch) > 1:
        out, lse = out.reshape(*batch, *out.shape[1:]), lse.reshape(*batch, *lse.shape[1:])
    if layout == "bhsd":
        out = out.transpose(-3, -2)
    return (out, lse) if return_lse else out


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The result over all keys from results over parts of them: ``lse = log Σ exp(lse_t)``, ``out = Σ exp(lse_t − lse) out_t``.

    Args:
        outs: of each part, ``(*batch, M, H, Dv)``. lses: of each part, ``(*batch, H, M)``, as :func:`attention` returns them. Queries and
            heads are the same in every part; keys are disjoint.

    Returns:
        out in the parts' dtype and lse, differentiable by both. A query that no part saw a key for gets 0 and −inf.

    Raises:
        ValueError, TypeError: no part, or parts that do not fit each other.
    """
    if len(outs) != len(lses) or not outs:
        raise bad_value("outs, lses", "as many of one as of the other, one at least", f"{len(outs)} and {len(lses)}")
    for t, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != outs[0].shape or out.dtype != outs[0].dtype or out.device != outs[0].device:
            raise bad_value(f"outs[{t}]", f"{tuple(outs[0].shape)} in {outs[0].dtype}, as outs[0]", f"{tuple(out.shape)} in {out.dtype}")
        wanted = (*out.shape[:-3], out.shape[-2], out.shape[-3])
        if lse.shape != wanted or lse.device != out.device:
            raise bad_value(
                f"lses[{t}]", f"shape {tuple(wanted)} (heads before queries) on {out.device}", f"{tuple(lse.shape)} on {lse.device}"
            )
    stacked = torch.stack(list(lses))
    unseen = (stacked == -math.inf).all(0)
    lse = torch.logsumexp(stacked.masked_fill(unseen, 0.0), 0).masked_fill(unseen, -math.inf)
    weights = torch.exp(stacked - lse.masked_fill(unseen, 0.0)).transpose(-1, -2).unsqueeze(-1)
    merged = (weights * torch.stack([out.to(stacked.dtype) for out in outs])).sum(0)
    return merged.to(outs[0].dtype), lse


def _swapped(name: str, x: Any) -> Tensor:
    """``(*batch, H, L, D)`` seen as ``(*batch, L, H, D)``."""
    if not isinstance(x, Tensor):
        raise bad_type(name, "a tensor", type(x).__name__)
    if x.dim() < 4:
        raise bad_value(name, "4 dims or more (*batch, heads, length, dim)", f"{x.dim()} dims {tuple(x.shape)}")
    return x.transpose(-3, -2)


def _check_inputs(q: Any, k: Any, v: Any) -> tuple[tuple[int, ...], dict[str, int]]:
    """The batch dims and the named sizes of q, k and v, which fit each other."""
    given = {"q": q, "k": k, "v": v}
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise bad_type(name, "a tensor", type(x).__name__)
        if x.dim() < 4:
            raise bad_value(name, "4 dims or more (*batch, length, heads, dim)", f"{x.dim()} dims {tuple(x.shape)}")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads and heads != kv_heads and heads % kv_heads == 0 and v.shape[-2] == kv_heads:
        hint = f"repeat them: k.repeat_interleave({heads // kv_heads}, -2), and v alike"
        raise unsupported(f"{heads} query heads on {kv_heads} key heads", "auto", hint)
    levels = " ".join(f"B{n}" if q.dim() > 4 else "B" for n in range(q.dim() - 3))
    sizes = check_tensors(given, {"q": f"{levels} M H D", "k": f"{levels} N H D", "v": f"{levels} N H Dv"})
    same_device_and_dtype(given)
    return tuple(q.shape[:-3]), sizes


def _band(causal: Any, window: Any, M: int, N: int) -> tuple[int | None, int | None]:
    """Visible offsets ``lo <= j - i <= hi`` of causal and window together."""
    if causal != "top_left" and not isinstance(causal, bool):
        raise bad_type("causal", "True, False or 'top_left'", repr(causal))
    diagonal = 0 if causal == "top_left" else N - M
    lo, hi = None, diagonal if causal else None
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise bad_type("window", "a pair (left, right) or None", repr(window))
        for side in window:
            if side is not None and (isinstance(side, bool) or not isinstance(side, (int, torch.SymInt))):
                raise bad_type("window", "two integers, None or -1 for an open side", repr(window))
            if side is not None and side < -1:
                raise bad_value("window", "integers from 0 up, None or -1 for an open side", repr(window))
        left, right = (None if side is None or side == -1 else side for side in window)
        lo = None if left is None else diagonal - left
        if right is not None and not causal:
            hi = diagonal + right
    return lo, hi


def _bias_of(
    q: Tensor, bias: Tensor | None, mask: Tensor | None, key_lengths: Tensor | None, batch: tuple[int, ...], scores: tuple[int, ...]
) -> Tensor | None:
    """What is added to the scores, a bool mask included, checked; not yet of a canonical shape."""
    check_bias(bias, q, scores)
    check_bias(mask, q, scores, "mask")
    if mask is not None and mask.dtype != torch.bool:
        raise bad_type("mask", "a bool tensor, True = visible", mask.dtype, "a float one is a bias")
    if bias is not None and mask is not None:
        raise unsupported("a bias and a mask together", "auto", "hide by the bias: bias.masked_fill(~mask, -torch.inf)")
    if key_lengths is None:
        return bias if mask is None else mask
    if not isinstance(key_lengths, Tensor) or key_lengths.is_floating_point() or key_lengths.dtype == torch.bool:
        kind = str(key_lengths.dtype) if isinstance(key_lengths, Tensor) else type(key_lengths).__name__
        raise bad_type("key_lengths", "a tensor of integers", kind)
    if tuple(key_lengths.shape) != batch or key_lengths.device != q.device:
        got = f"{tuple(key_lengths.shape)} on {key_lengths.device}"
        raise bad_value("key_lengths", f"one for each batch entry, shape {batch} on {q.device}", got)
    if bias is not None or mask is not None:
        other = "a bias" if mask is None else "a mask"
        raise unsupported(
            f"key_lengths and {other} together", "auto", "hide by the other: keys j with j >= key_lengths[..., None, None, None]"
        )
    return (torch.arange(scores[-1], device=q.device) < key_lengths[..., None])[..., None, None, :]


def _two_levels(bias: Tensor | None, batch: tuple[int, ...], name: str) -> tuple[Tensor | None, int]:
    """A bias as the operators' five dims, and how many batch entries make the inner of their two batch levels.

    Batch dims over which the bias varies are gathered in one level, the others in the other; that wants them to lie side by side.
    """
    if bias is None:
        return None, 1
    while bias.dim() < len(batch) + 3:
        bias = bias.unsqueeze(0)
    # A batch dim of size 1 goes with either level.
    flags = [own > 1 for own, size in zip(bias.shape, batch, strict=False) if size > 1]
    changes = [n for n in range(1, len(flags)) if flags[n] != flags[n - 1]]
    if len(changes) > 1:
        varies = [n for n in range(len(batch)) if bias.shape[n] > 1]
        hint = f"permute the batch dims so that those of the {name} are neighbours, or expand it over the ones between"
        raise unsupported(f"a {name} that varies over batch dims {varies} of {len(batch)} and not over those between", "auto", hint)
    outer_sizes = [size for size in batch if size > 1][: changes[0]] if changes else list(batch)
    outer = math.prod(outer_sizes)
    inner = math.prod(batch) // outer if outer else 1
    if not changes:
        own = math.prod(bias.shape[: len(batch)])
        return bias.reshape(own, 1, *bias.shape[-3:]), 1
    own_outer, own_inner = (outer, 1) if flags[0] else (1, inner)
    return bias.reshape(own_outer, own_inner, *bias.shape[-3:]), inner
