"""PyTorch's ``scaled_dot_product_attention`` computed by triflash, and a switch that puts it in the place of PyTorch's own for a block.

Called by programs; imports the public front door and the checks alone.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import attention
from ..checks import check_bias, check_bool, refuse_layout
from ..errors import bad_type, bad_value
from .words import renamed

__all__ = ["replace", "scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(scale * query keyᵀ + attn_mask) value``, with PyTorch's arguments and layout, by ``triflash.attention``.

    Args:
        query: ``(..., Hq, M, D)``; fp16, bf16, fp32 or fp64. ``(B, M, D)`` and ``(M, D)`` go as well; any number of batch dims.
        key: ``(..., H, N, D)``. value: ``(..., H, N, Dv)``. Batch dims and heads broadcast to each other, nothing is copied for heads.
        attn_mask: bool (True = visible) or floats that are added to the scaled scores; 2 dims or more that broadcast to
            ``(..., Hq, M, N)``. Floats have a gradient, in their own shape and dtype. Or a ``torch.nn.attention.bias.CausalBias``.
        dropout_p: as given, whatever the mode of the module around it.
        is_causal: hides key j from query i when ``j > i``, counted from the top left; also together with attn_mask.
        scale: default ``1 / sqrt(D)``.
        enable_gqa: the heads of key and of value divide those of query, which share them in groups of neighbours.

    Returns:
        ``(..., Hq, M, Dv)`` in query's dtype. A query that sees no key gets 0.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or option; the message names the argument.

    Batch dims are two levels to the kernels: an attn_mask that varies over the first and third of three, say, and not over the second, is
    expanded over it. Dropout drops other probabilities than PyTorch's for the same seed. Everything else: docs/semantics.md.
    """
    check_bool("is_causal", is_causal)
    check_bool("enable_gqa", enable_gqa)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise bad_type(name, "a dense tensor", type(x).__name__)
        refuse_layout(name, x)
        if x.dim() < 2:
            raise bad_value(name, "2 dims or more (..., heads, length, dim)", f"{x.dim()} dims {tuple(x.shape)}")
    if key.shape[-1] != query.shape[-1]:
        raise bad_value("key", f"query's head dim {query.shape[-1]}", f"{key.shape[-1]} of {tuple(key.shape)}")
    if value.shape[-2] != key.shape[-2]:
        raise bad_value("value", f"as many rows as key has, {key.shape[-2]}", f"{value.shape[-2]} of {tuple(value.shape)}")
    causal: bool | str = "top_left" if is_causal else False
    if _is_causal_bias(attn_mask):
        causal = _causal_of(attn_mask, is_causal, query.shape[-2], key.shape[-2])
        attn_mask = None
    dims = max(query.dim(), key.dim(), value.dim())
    q, k, v = _with_heads(_widened(query, dims), _widened(key, dims), _widened(value, dims), enable_gqa)
    batch = _broadcast(q, k, v)
    q, k, v = (x if x.shape[:-3] == batch else x.expand(*batch, *x.shape[-3:]) for x in (q, k, v))
    bias = mask = None
    if attn_mask is not None:
        check_bias(attn_mask, q, (*batch, q.shape[-3], q.shape[-2], k.shape[-2]), "attn_mask")
        shown = _two_levels(attn_mask, batch)
        bias, mask = (None, shown) if shown.dtype == torch.bool else (shown, None)
    try:
        out = attention(q, k, v, bias=bias, mask=mask, causal=causal, scale=scale, dropout_p=dropout_p, layout="bhsd")
    except (ValueError, TypeError) as error:
        raise renamed(error, {"q": "query", "k": "key", "v": "value"}) from None
    while out.dim() > dims:
        out = out.squeeze(0)
    return out


def _widened(x: Tensor, dims: int) -> Tensor:
    """With 1s in front, as broadcasting has them, up to four dims at least."""
    for _ in range(max(dims, 4) - x.dim()):
        x = x.unsqueeze(0)
    return x


def _with_heads(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Heads as :func:`triflash.attention` takes them: one number of key heads, which divides that of the queries."""
    Hq, Hk, Hv = q.shape[-3], k.shape[-3], v.shape[-3]
    if Hq == Hk == Hv:
        return q, k, v
    if grouped:
        for name, H in (("key", Hk), ("value", Hv)):
            if Hq != H and (H == 0 or Hq % H):
                raise bad_value(name, f"a number of heads that divides query's {Hq}", H)
        common = Hk if Hk == Hv else Hq  # not their least common multiple, of which Dynamo knows nothing
        k = k if common == Hk else k.repeat_interleave(common // Hk, -3)
        v = v if common == Hv else v.repeat_interleave(common // Hv, -3)
        return q, k, v
    H = next((size for size in (Hq, Hk, Hv) if size != 1), 1)
    for name, own in (("key", Hk), ("value", Hv)):
        if own != 1 and own != H:  # not by "in": to Dynamo no tuple with a symbolic size in it holds a number
            raise bad_value(name, f"1 or {H} heads", own, "enable_gqa=True lets groups of query heads share a key head")
    q = q.expand(*q.shape[:-3], H, *q.shape[-2:])
    if Hk != Hv:
        k, v = (x.expand(*x.shape[:-3], H, *x.shape[-2:]) for x in (k, v))
    return q, k, v


def _broadcast(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """The batch dims that those of all three broadcast to; sizes may be symbolic."""
    sizes = []
    for n, own in enumerate(zip(q.shape[:-3], k.shape[:-3], v.shape[:-3], strict=True)):
        size = next((size for size in own if size != 1), 1)
        for name, each in zip(("query", "key", "value"), own, strict=True):
            if each != 1 and each != size:
                raise bad_value(name, f"size 1 or {size} in batch dim {n}", each)
        sizes.append(size)
    return tuple(sizes)


def _two_levels(mask: Tensor, batch: tuple[int, ...]) -> Tensor:
    """A mask whose batch dims fall into two groups of neighbours, over each of which it varies throughout or not at all."""
    own = (1,) * (len(batch) + 3 - mask.dim()) + tuple(mask.shape)
    varies = [own[n] != 1 for n, size in enumerate(batch) if size != 1]
    changes = sum(varies[n] != varies[n - 1] for n in range(1, len(varies)))
    return mask if changes < 2 else mask.expand(*batch, *own[-3:])


def _is_causal_bias(x: Any) -> bool:
    """By name: torch.nn.attention.bias takes time to import, and whoever has such a bias has imported it."""
    return type(x).__name__ == "CausalBias" and type(x).__module__ == "torch.nn.attention.bias"


def _causal_of(bias: Any, is_causal: bool, queries: int, keys: int) -> bool | str:
    """What a CausalBias hides, and is_causal with it: the stricter of two diagonals."""
    if bias.seq_len_q != queries or bias.seq_len_kv != keys:
        wanted = f"a CausalBias for {queries} queries and {keys} keys"
        raise bad_value("attn_mask", wanted, f"one for {bias.seq_len_q} and {bias.seq_len_kv}")
    if bias.variant.name == "UPPER_LEFT" or (is_causal and queries <= keys):
        return "top_left"
    return True


# The switch. Whether a thread is in a block stands in two places: tracers read and guard _local, and what PyTorch hands on to the threads
# that run a backward pass, where checkpointed layers are run again, is stashed with it.
_local = threading.local()
_STASH = "triflash.compat.sdpa"
_lock = threading.Lock()
_blocks = 0  # of all threads
_stand_in: Callable[..., Any] | None = None
_told: set[str] = set()


@contextmanager
def replace() -> Iterator[None]:
    """Within the block ``torch.nn.functional.scaled_dot_product_attention`` is this module's, for the calls of this thread.

    Blocks may be nested, and hold on several threads at once; PyTorch's function is back when the last one ends, however it ends. What
    triflash cannot do (nested tensors, forward-mode derivatives, subclasses with a ``__torch_function__`` of their own) PyTorch does, and a
    warning says so, once for each reason. A backward pass that runs checkpointed layers again must run within the block as well.

    Not reached: names that were imported before (``from torch.nn.functional import scaled_dot_product_attention``), calls of
    ``torch.ops.aten`` and ``torch._C._nn``, scripted modules, ``nn.MultiheadAttention`` that is asked for weights (``need_weights=True``,
    its default), and what it and ``nn.TransformerEncoderLayer`` run in eval mode without gradients, which is a fused operator of their own
    (``torch.backends.mha.set_fastpath_enabled(False)`` turns it off).
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _blocks, _stand_in
    with _lock:
        current = F.scaled_dot_product_attention
        if _stand_in is None or (current is not _stand_in and current is not _stand_in.original):  # type: ignore[attr-defined]
            _stand_in = _made(current)  # not each time anew: compiled code is guarded by its identity
        F.scaled_dot_product_attention = _stand_in
        _blocks += 1
    _count(1)


def _leave() -> None:
    global _blocks
    _count(-1)
    with _lock:
        _blocks -= 1
        # Whoever has put another function there in the meantime has taken ours for PyTorch's, which it is without a block.
        if _blocks == 0 and _stand_in is not None and F.scaled_dot_product_attention is _stand_in:
            F.scaled_dot_product_attention = _stand_in.original  # type: ignore[attr-defined]


def _count(change: int) -> None:
    _local.depth = getattr(_local, "depth", 0) + change
    torch._C._stash_obj_in_tls(_STASH, _local.depth > 0)


def _active() -> bool:
    if getattr(_local, "depth", 0) > 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._is_key_in_tls(_STASH) and bool(torch._C._get_obj_in_tls(_STASH))


def _made(original: Callable[..., Any]) -> Callable[..., Any]:
    def scaled_dot_product_attention_or_original(*args: Any, **options: Any) -> Any:
        if not _active():
            return original(*args, **options)
        reason = _foreign((*args, *options.values()))
        if not reason:
            try:
                return scaled_dot_product_attention(*args, **options)
            except (ValueError, TypeError, NotImplementedError) as error:
                reason = str(error)
        _tell(reason)
        return original(*args, **options)

    scaled_dot_product_attention_or_original.__name__ = "scaled_dot_product_attention"
    scaled_dot_product_attention_or_original.__doc__ = original.__doc__
    scaled_dot_product_attention_or_original.original = original  # type: ignore[attr-defined]
    return scaled_dot_product_attention_or_original


def _foreign(given: tuple[Any, ...]) -> str:
    """A tensor whose class wants to see PyTorch's own function, in words."""
    for x in given:
        if type(x) in (Tensor, torch.nn.Parameter) or not isinstance(x, Tensor) or _is_causal_bias(x):
            continue
        if type(x).__torch_function__ not in (Tensor.__torch_function__, torch._C._disabled_torch_function_impl):
            return f"a tensor of class {type(x).__name__}, which has a __torch_function__ of its own"
    return ""


def _tell(reason: str) -> None:
    if torch.compiler.is_compiling() or reason in _told:
        return
    _told.add(reason)
    warnings.warn(f"triflash.compat.sdpa.replace: PyTorch's scaled_dot_product_attention computes this call: {reason}", stacklevel=3)
