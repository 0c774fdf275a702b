"""Attention calls of protein-folding models: DeepSpeed4Science's Evoformer attention and cuEquivariance's triangle attention.

Called by programs; imports the public front door, the checks, the errors and the question whether autocast is on alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..attention import attention
from ..checks import check_bool, check_scale, check_tensors, refuse_layout, same_device_and_dtype
from ..errors import bad_type, bad_value
from ..ops_checked import is_casting
from .words import renamed

__all__ = ["DS4Sci_EvoformerAttention", "triangle_attention"]

_CHUNK = 2**22  # float32 scores that the pass for the maxima holds at once: 16 MiB


def DS4Sci_EvoformerAttention(Q: Tensor, K: Tensor, V: Tensor, biases: Sequence[Tensor | None]) -> Tensor:
    """``softmax(Q Kᵀ / sqrt(D) + bias1 + bias2) V``, as ``deepspeed.ops.deepspeed4science`` has it, by ``triflash.attention``.

    Args:
        Q: queries ``(B, N, L, H, D)``: N rows of an alignment, or of pairs, of L residues; fp16, bf16 or fp32 (fp64 on backend ``tiled``).
        K: keys ``(B, N, L, H, D)``. V: values ``(B, N, L, H, D)``. Both of Q's dtype.
        biases: up to two, in this order; each may be None, any of its dims may be 1, and its dtype need not be Q's.
            bias1 ``(B, N, 1, 1, L)``: of keys, floats that are added or, beyond DeepSpeed's, bool (True = visible), which is a mask.
            bias2 ``(B, 1, H, L, L)``: of pairs, floats. The list is left as it is.

    Returns:
        ``(B, N, L, H, D)`` in Q's dtype, with gradients for Q, K, V and both float biases, each in its own shape and dtype. A query that
        sees no key (−inf or False throughout) gets 0; −10⁹ throughout gives it the mean of V, as there.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device; the message names the argument.

    Lengths and head dims are not restricted (DeepSpeed: more than 16, at most 64). The sum of the biases is never in memory.
    Both run on backend ``hopper``, too, as does one of them, or bias2 beside a bool bias1.
    """
    tensors = {"Q": Q, "K": K, "V": V}
    sizes = check_tensors(tensors, dict.fromkeys(tensors, "B N L H D"))
    if not is_casting(Q):
        same_device_and_dtype(tensors)
    if not isinstance(biases, (list, tuple)):
        raise bad_type("biases", "a list of up to two tensors or None", type(biases).__name__)
    if len(biases) > 2:
        raise bad_value("biases", "up to two", len(biases))
    rows, pairs = (*biases, None, None)[:2]
    B, N, L, H = (sizes[name] for name in "BNLH")
    _check_bias("biases[0]", rows, Q, (B, N, 1, 1, L), "(B, N, 1, 1, L)")
    _check_bias("biases[1]", pairs, Q, (B, 1, H, L, L), "(B, 1, H, L, L)")
    if pairs is not None and pairs.dtype == torch.bool:
        raise bad_type("biases[1]", "numbers", pairs.dtype, "a mask of pairs is mask= of triflash.attention")
    mask = None
    if rows is not None and rows.dtype == torch.bool:
        rows, mask = None, rows
    return attention(Q, K, V, bias=(rows, pairs), mask=mask)


@overload
def triangle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_aux: Literal[False] = False,
    *,
    kv_lengths: Tensor | None = None,
) -> Tensor: ...
@overload
def triangle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    scale: float | None,
    return_aux: Literal[True],
    *,
    kv_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def triangle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    return_aux: Literal[True],
    kv_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...
def triangle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_aux: bool = False,
    *,
    kv_lengths: Tensor | None = None,
) -> Any:
    """``softmax(scale * q kᵀ + bias) v`` over the visible keys, as ``cuequivariance_torch.triangle_attention`` has it, by triflash's.

    Args:
        q: queries ``(B, N, H, Q, D)``, or ``(N, H, Q, D)``, which means B = 1; fp16, bf16 or fp32 (fp64 on backend ``tiled``).
        k: keys ``(B, N, H, K, D)``, as many dims as q has. v: values ``(B, N, H, K, Dv)``. Both of q's dtype.
        bias: of pairs, ``(B, 1, H, Q, K)`` or ``(1, H, Q, K)``; fp16, bf16 or fp32 whatever q is, used as it is. Any dim may be 1.
        mask: of keys, ``(B, N, 1, 1, K)`` or ``(N, 1, 1, K)``: bool, or numbers of which 0 hides and every other shows. Any dim may be 1.
        scale: default ``1 / sqrt(D)``.
        return_aux: also return the log-sum-exp and the maximum of each query's visible scores.
        kv_lengths: integers ``(B, N, 1, 1, 1)`` or ``(N, 1, 1, 1)``: keys from that number on are hidden, cost nothing, and may hold
            anything. Instead of a mask.

    Returns:
        out ``(B, N, H, Q, Dv)`` in q's dtype, five dims always, with gradients for q, k, v and the bias, each in its own shape and dtype;
        or ``(out, lse, max)``, with lse and max ``(B, N, H, Q, 1)`` in float32 without a gradient, lse a natural logarithm. A query that
        sees no key gets 0, −inf and −inf (cuEquivariance gives it the mean of v under a mask, and 0 under kv_lengths).

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, or both mask and kv_lengths; the message names the argument.

    Memory beyond inputs and outputs is O(Q + K) for each row and head; the maxima take a pass of their own in PyTorch over the products,
    some 16 MiB at a time, and time as a forward pass without fusion.
    """
    check_bool("return_aux", return_aux)
    for name, x in (("q", q), ("bias", bias), ("mask", mask), ("kv_lengths", kv_lengths)):
        refuse_layout(name, x)
    if mask is not None and kv_lengths is not None:
        raise bad_value("mask, kv_lengths", "one of them", "both")
    five = isinstance(q, Tensor) and q.dim() == 5
    lead = "B " if five else ""
    tensors = {"q": q, "k": k, "v": v}
    shapes = {"q": f"{lead}N H Q D", "k": f"{lead}N H K D", "v": f"{lead}N H K _"}
    if isinstance(q, Tensor) and q.dim() not in (4, 5):
        raise bad_value("q", "5 dims (B, N, H, Q, D), or 4 (N, H, Q, D)", f"{q.dim()} dims {tuple(q.shape)}")
    sizes = check_tensors(tensors, shapes)
    if not is_casting(q):
        same_device_and_dtype(tensors)
    if not isinstance(bias, Tensor):
        raise bad_type("bias", "a tensor", type(bias).__name__)
    B, N, H, M, K = sizes.get("B", 1), sizes["N"], sizes["H"], sizes["Q"], sizes["K"]
    q, k, v = (x if five else x.unsqueeze(0) for x in (q, k, v))
    bias = _five(bias)
    _check_bias("bias", bias, q, (B, 1, H, M, K), "(B, 1, H, Q, K)")
    if bias.dtype == torch.bool:
        raise bad_type("bias", "numbers", bias.dtype, "pass it as mask=")
    if mask is not None:
        mask = _five(mask)
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            mask = mask != 0
        _check_bias("mask", mask, q, (B, N, 1, 1, K), "(B, N, 1, 1, K)")
    lengths = None if kv_lengths is None else _lengths(kv_lengths, q, (B, N, 1, 1, 1))
    scale = check_scale("scale", scale, q.shape[-1])
    try:
        given = attention(q, k, v, bias=bias, mask=mask, key_lengths=lengths, scale=scale, return_lse=return_aux, layout="bhsd")
    except (ValueError, TypeError) as error:
        raise renamed(error, {"key_lengths": "kv_lengths"}) from None
    if not return_aux:
        return given
    out, lse = given
    kind = q.device.type
    plain = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with torch.no_grad(), plain:
        hidden = None if mask is None else ~mask
        if lengths is not None:
            hidden = (torch.arange(K, device=q.device) >= lengths.unsqueeze(-1))[:, :, None, None, :]
        return out, lse.detach().float().unsqueeze(-1), _maxima(q, k, bias, hidden, scale)


def _five(x: Any) -> Any:
    """With 1s in front up to five dims, as cuEquivariance has it."""
    while isinstance(x, Tensor) and 0 < x.dim() < 5:
        x = x.unsqueeze(0)
    return x


def _check_bias(name: str, bias: Any, q: Tensor, full: tuple[int, ...], words: str) -> None:
    """Check the shape of a bias or mask; its dtype and where it is are checked by the front door, which has other words for shapes."""
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise bad_type(name, "a tensor or None", type(bias).__name__)
    refuse_layout(name, bias)
    # By !=, not by "in": to Dynamo no tuple with a symbolic size in it holds a number.
    if bias.dim() != len(full) or any(own != 1 and own != size for own, size in zip(bias.shape, full, strict=True)):
        raise bad_value(name, f"shape {words} = {full}, of which any dim may be 1", tuple(bias.shape))
    if bias.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.bool, q.dtype):
        raise bad_type(name, "float16, bfloat16 or float32", bias.dtype)
    if bias.device != q.device:
        raise bad_value(name, f"the device of the queries, {q.device}", bias.device)


def _lengths(lengths: Any, q: Tensor, full: tuple[int, ...]) -> Tensor:
    """kv_lengths as (B, N)."""
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise bad_type("kv_lengths", "a tensor of integers", str(lengths.dtype) if isinstance(lengths, Tensor) else type(lengths).__name__)
    if tuple(_five(lengths).shape) != full or lengths.device != q.device:
        raise bad_value("kv_lengths", f"shape (B, N, 1, 1, 1) = {full} on {q.device}", f"{tuple(lengths.shape)} on {lengths.device}")
    return lengths.reshape(full[:2])


def _maxima(q: Tensor, k: Tensor, bias: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    """The largest visible score of each query, ``(B, N, H, Q, 1)`` in float32; −inf where there is none.

    In blocks of rows, queries and keys, so that never more than some :data:`_CHUNK` scores are in memory.
    """
    B, N, H, M, _ = q.shape
    K = k.shape[-2]
    if 0 in (B, N, H, M, K):
        return torch.full((B, N, H, M, 1), -math.inf, device=q.device, dtype=torch.float32)
    keys = max(1, min(K, _CHUNK // H))
    queries = max(1, min(M, _CHUNK // (H * keys)))
    rows = max(1, min(N, _CHUNK // (H * keys * queries)))

    def block(b: int, n: int, i: int) -> Tensor:
        some = q[b, n : n + rows, :, i : i + queries].float() * scale
        top = None
        for j in range(0, K, keys):
            s = torch.matmul(some, k[b, n : n + rows, :, j : j + keys].float().mT)
            s = s + _part(bias, (b, None, None, (i, queries), (j, keys)))
            if hidden is not None:
                s = s.masked_fill(_part(hidden, (b, (n, rows), None, None, (j, keys))), -math.inf)
            found = s.amax(-1, keepdim=True).float()
            top = found if top is None else torch.maximum(top, found)
        assert top is not None
        return top

    # Nothing is written in place, which vmap could not follow.
    return torch.stack(
        [torch.cat([torch.cat([block(b, n, i) for i in range(0, M, queries)], -2) for n in range(0, N, rows)]) for b in range(B)]
    )


def _part(x: Tensor, at: tuple[int | tuple[int, int] | None, ...]) -> Tensor:
    """A part of what broadcasts: of each dim that is not 1 the given index, or (first, how many), or all of it for None."""
    for dim, where in enumerate(at):
        if isinstance(where, tuple) and x.shape[dim] != 1:
            x = x.narrow(dim, where[0], min(where[1], x.shape[dim] - where[0]))
    first = at[0] if x.shape[0] != 1 else 0
    return x[first]
