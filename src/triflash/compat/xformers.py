"""``xformers.ops.memory_efficient_attention`` by triflash, with masks of its own or xformers' where that is installed.

Called by programs. xformers is never imported: its masks are known by the names of their classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention import attention
from ..errors import bad_type, bad_value, unsupported
from .words import renamed

__all__ = ["LowerTriangularMask", "LowerTriangularMaskWithTensorBias", "memory_efficient_attention"]


class LowerTriangularMask:
    """Hides key j from query i when ``j > i``, counted from the top left. device: taken and ignored, as nothing is made."""

    def __init__(self, device: torch.device | None = None) -> None:
        pass

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        """This mask, and a bias that is added to the scaled scores."""
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """``LowerTriangularMask`` and a bias, which may be learned."""

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """``dropout_p(softmax(scale * query keyᵀ + attn_bias)) value`` with xformers' arguments and layouts, by ``triflash.attention``.

    Args:
        query: ``(B, M, H, K)``, ``(B, M, K)`` for one head, or ``(B, M, G, H, K)`` for groups of heads; fp16, bf16, fp32, fp64.
        key: ``(B, N, H, K)`` and so on, as many dims. value: ``(B, N, H, Kv)`` and so on.
        attn_bias: None; a tensor that broadcasts to ``(B, H, M, N)`` (``(B, M, N)`` for three dims, ``(B, G, H, M, N)`` for five), floats
            with a gradient or bool (True = visible); ``LowerTriangularMask``, also with ``.add_bias(tensor)``; or one of xformers'
            LowerTriangularMask, LowerTriangularMaskWithTensorBias, LowerTriangularFromBottomRightMask,
            LowerTriangularFromBottomRightLocalAttentionMask, LocalAttentionFromBottomRightMask.
        p: the probability with which a softmax probability is dropped.
        scale: default ``1 / sqrt(K)``.
        op: taken and ignored: it names kernels of xformers'.
        output_dtype: of the result; default query's.

    Returns:
        ``(B, M, H, Kv)``, or as many dims as query has. A query that sees no key gets 0.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or option. UnsupportedError: another of xformers' masks (block-diagonal, paged ones).
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise bad_type(name, "a tensor", type(x).__name__)
        if x.dim() not in (3, 4, 5) or x.dim() != query.dim():
            wanted = "3 dims (B, M, K), 4 (B, M, H, K) or 5 (B, M, G, H, K), as many as query has"
            raise bad_value(name, wanted, f"{x.dim()} dims {tuple(x.shape)}")
    causal, window, bias = _mask_of(attn_bias)
    dims = query.dim()
    if dims == 3:
        query, key, value = (x.unsqueeze(2) for x in (query, key, value))
        bias = bias.unsqueeze(-3) if bias is not None and bias.dim() == 3 else bias
    elif dims == 5:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    try:
        out = attention(query, key, value, bias=bias, causal=causal, window=window, scale=scale, dropout_p=p)
    except (ValueError, TypeError) as error:
        raise renamed(error, {"q": "query", "k": "key", "v": "value", "bias": "attn_bias", "dropout_p": "p"}) from None
    if dims == 3:
        out = out.squeeze(2)
    elif dims == 5:
        out = out.transpose(1, 2)
    return out if output_dtype is None else out.to(output_dtype)


def _mask_of(attn_bias: Any) -> tuple[bool | str, tuple[int | None, int | None] | None, Tensor | None]:
    """causal, window and bias as :func:`triflash.attention` takes them."""
    if attn_bias is None or isinstance(attn_bias, Tensor):
        return False, None, attn_bias
    own = isinstance(attn_bias, LowerTriangularMask)
    name = type(attn_bias).__name__
    if not own and type(attn_bias).__module__.partition(".")[0] != "xformers":
        raise bad_type("attn_bias", "a tensor, a LowerTriangularMask or None", name)
    if name in ("LowerTriangularMask", "LowerTriangularMaskWithTensorBias"):
        return "top_left", None, getattr(attn_bias, "_bias", None)
    if name == "LowerTriangularFromBottomRightMask":
        return True, None, None
    if name == "LowerTriangularFromBottomRightLocalAttentionMask":
        return True, (attn_bias._window_size - 1, 0), None
    if name == "LocalAttentionFromBottomRightMask":
        return False, (attn_bias.window_left, attn_bias.window_right), None
    hint = "packed and paged sequences do not exist yet: pad the batch and pass key_lengths= to triflash.attention"
    raise unsupported(f"attn_bias of xformers' class {name}", "auto", hint)
