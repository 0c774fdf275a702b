"""Hugging Face transformers: ``register()`` once, then ``attn_implementation="triattention"``. Imports transformers when called.

``patch(model)`` is for models that keep their attention to themselves. docs/integrations.md has the families.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import attention
from ..errors import bad_type, bad_value
from ..kvcache import attention_with_kvcache
from ..varlen import attention_varlen
from . import patches
from .visible import Visible, lean_mask

__all__ = ["NAME", "OLDEST", "attention_forward", "patch", "register", "unpatch"]

NAME = "triattention"  # transformers takes every name with "flash" in it for FlashAttention
OLDEST = (5, 20)  # before it T5 does not hand every implementation on to its encoder and decoder

# What reaches an attention function and changes nothing in it: most of a model's own keywords are handed through.
HARMLESS = frozenset({
    "cache", "cache_position", "labels", "logits_to_keep", "max_length_k", "max_length_q", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "past_key_value", "past_key_values", "position_ids", "return_dict", "seq_idx", "training", "use_cache",
})  # fmt: skip


def register(*, lean: bool = True) -> None:
    """Teach transformers the name ``"triattention"``: ``AutoModel.from_pretrained(..., attn_implementation="triattention")``.

    Args:
        lean: True makes no mask of (M, N) where a band around the diagonal, key lengths or a row of keys says it all. False always makes
            one, for models that compute with their mask.

    Raises:
        ImportError: transformers is not installed, or older than 5.20.

    Models with the name are refused, by a ValueError in their forward pass, if they do not use transformers' attention interface and would
    misread a bool mask. Calling it again changes ``lean`` for every model.
    """
    from transformers import __version__ as version

    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ImportError(f"transformers: wanted {'.'.join(map(str, OLDEST))} or newer, got {version}")
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    for name, checked in ((NAME, True), (patches.NAME, False)):
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, functools.partial(lean_mask, lean=lean, checked=checked))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Visible | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    deterministic: bool | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers' ``AttentionInterface`` holds them, computed by ``triflash.attention``; of rows that hold
    several sequences, or chunks, by ``triflash.attention_varlen``; of fewer queries than keys where nothing wants a gradient, by
    ``triflash.attention_with_kvcache``: the steps of ``generate``.

    Args:
        module: the model's attention module; its ``is_causal`` counts where there is no mask and no is_causal.
        query: ``(B, H, M, D)``. key, value: ``(B, Hk, N, D)`` and ``(B, Hk, N, Dv)``, H a multiple of Hk; nothing is repeated.
        attention_mask: what the mask function of ``register`` made; or a 4-dim tensor that broadcasts to ``(B, H, M, N)``: bool, True is
            visible, or floats, added to the scores, with their gradient. None: what is_causal and sliding_window say.
        scaling: default ``1 / sqrt(D)``.
        dropout: probability with which a softmax probability is dropped.
        is_causal, sliding_window: without a mask, whether query i sees keys ``j <= i + N − M`` alone, and how many of them. A mask has
            them already.
        softcap: bounds the scaled products. s_aux: a sink for each head ``(H,)``, with its gradient.
        position_bias: floats that broadcast to ``(B, H, M, N)``, added to the scaled scores, with their gradient.
        deterministic: True asks for the same bits in every run; otherwise PyTorch's own setting counts.
        output_attentions: must not be True, nor, if it is not said here, be so in the module's config: probabilities are never in memory.
        cu_seq_lens_q, cu_seq_lens_k: int32 or int64 ``(n + 1,)``, the same numbers in both: of the B·M rows, one behind the other, those
            from number i to number i + 1 are a sequence, which sees itself alone, beside what masks say. Nothing waits for the numbers,
            and a mask of (M, N) is made only beside padding, a position bias or such a mask.
        options: keywords that change nothing here are ignored; others raise.

    Returns:
        ``(B, M, H, Dv)``, contiguous, and None. A query that sees no key gets 0, where eager attention gives a mean of all values.

    Raises:
        ValueError, TypeError: keywords that would change the result and are not known, or arguments that do not fit each other.
    """
    if output_attentions is None:
        output_attentions = getattr(getattr(module, "config", None), "output_attentions", False)
    if output_attentions:
        raise bad_value("output_attentions", "False", True, "probabilities are never in memory; attn_implementation='eager' returns them")
    for name, x in options.items():
        if not (x is None or x is False or name in HARMLESS):
            hint = "attn_implementation='eager' or 'sdpa' may know it"
            raise bad_type(name, "no such keyword for attention", type(x).__name__, hint)
    if query.shape[0] != key.shape[0] and query.shape[0] == 1:  # learned queries, the same for every entry
        query = query.expand(key.shape[0], -1, -1, -1)
    M, N = query.shape[2], key.shape[2]
    cu = None if cu_seq_lens_q is None and cu_seq_lens_k is None else _checked_offsets(cu_seq_lens_q, cu_seq_lens_k, M, N)
    bias = None if position_bias is not None and _is_zero(module) else position_bias
    if attention_mask is None:
        seen = _unmasked(module, M, N, is_causal, sliding_window)
    elif isinstance(attention_mask, Visible):
        if tuple(attention_mask.shape[2:]) != (M, N):
            raise bad_value("attention_mask", f"one of {M} queries and {N} keys", attention_mask)
        bias = _sum(bias, attention_mask.bias)
        if attention_mask.offsets is not None and bias is None and (cu is None or attention_mask.used is None):
            # Blocks of two kinds at once are what lies between two offsets of any kind; those of length 0 are free.
            blocks = attention_mask.offsets if cu is None else torch.cat([attention_mask.offsets, cu.to(attention_mask.offsets)]).sort()[0]
            window = None if attention_mask.left is None else (attention_mask.left, 0)
            return _in_blocks(
                blocks, attention_mask.used, "top_left", window, query, key, value, scaling, dropout, softcap, s_aux, deterministic
            ), None  # fmt: skip
        seen = attention_mask.options() if attention_mask.offsets is None else {"mask": attention_mask.whole()}
    else:
        mask, bias = _added(attention_mask, bias, N)
        seen = {"mask": mask}
    if cu is not None:
        if bias is None and all(seen.get(name) is None for name in ("mask", "key_lengths", "key_starts", "diagonal")):
            causal, window = seen["causal"], seen.get("window")
            return _in_blocks(cu, None, causal, window, query, key, value, scaling, dropout, softcap, s_aux, deterministic), None
        seen = seen | {"mask": _same_sequence(cu, key.shape[0], N, seen.get("mask"))}
    if M < N and not dropout and _decodes((query, key, value, bias, s_aux), seen):
        diagonal = seen.get("diagonal")
        return attention_with_kvcache(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
            cache_lengths=seen.get("key_lengths") if diagonal is None else diagonal + M, key_starts=seen.get("key_starts"), bias=bias,
            mask=seen.get("mask"), causal=seen.get("causal", False), window=seen.get("window"), scale=scaling, softcap=softcap, sink=s_aux,
        ), None  # fmt: skip
    out = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        bias=bias,
        scale=scaling,
        softcap=softcap,
        sink=s_aux,
        dropout_p=dropout,
        deterministic=deterministic or None,
        **seen,
    )
    return out, None


def _checked_offsets(cu_q: Any, cu_k: Any, M: int, N: int) -> Tensor:
    for name, x in (("cu_seq_lens_q", cu_q), ("cu_seq_lens_k", cu_k)):
        if not isinstance(x, Tensor) or x.dim() != 1:
            got = f"{x.dim()} dims" if isinstance(x, Tensor) else type(x).__name__
            raise bad_type(name, "offsets (n + 1,), as of the other", got)
    if M != N or cu_q.shape != cu_k.shape:
        wanted = "the offsets of as many queries as keys"
        raise bad_value("cu_seq_lens_q", wanted, f"{M} queries and {N} keys", "a cache that holds keys has no packed sequences")
    found: Tensor = cu_q
    return found


def _same_sequence(offsets: Tensor, B: int, N: int, mask: Tensor | None) -> Tensor:
    """The bool mask ``(B, 1, N, N)`` of sequences, each of which sees itself alone, and of another mask."""
    sequence = torch.searchsorted(offsets, torch.arange(B * N, device=offsets.device, dtype=offsets.dtype), right=True).view(B, N)
    same = sequence[:, None, :, None] == sequence[:, None, None, :]
    return same if mask is None else same & mask


def _in_blocks(
    offsets: Tensor,
    used: Tensor | None,
    causal: bool | str,
    window: tuple[int | None, int | None] | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    dropout: float,
    softcap: float | None,
    sink: Tensor | None,
    deterministic: bool | None,
) -> Tensor:
    """Sequences that a row holds, or chunks, each by itself: the rows of all entries one behind the other."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = attention_varlen(
        q, k, v, offsets, seqused_k=used, causal=causal, window=window, scale=scale, softcap=softcap, sink=sink, dropout_p=dropout,
        deterministic=deterministic or None,
    )  # fmt: skip
    return out.unflatten(0, (query.shape[0], query.shape[2]))


def _decodes(tensors: tuple[Tensor | None, ...], seen: dict[str, Any]) -> bool:
    """Whether a call is one on a KV cache: it needs no gradient, and its queries stand at the end of its keys."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return False
    query, key, value, bias, _ = tensors
    assert query is not None and key is not None and value is not None
    if key.dtype != value.dtype:  # as under autocast, whose rotary embeddings make keys wider: attention casts all to its dtype
        return False
    full = (*query.shape[:3], key.shape[2])
    for x in (bias, seen.get("mask")):
        if x is not None and (x.dim() != 4 or any(own != 1 and own != size for own, size in zip(x.shape, full, strict=True))):
            return False  # attention has words for it
    diagonal, lengths = seen.get("diagonal"), seen.get("key_lengths")
    if diagonal is not None:  # of a static cache: the last query stands at its last key, and sees none behind it
        return isinstance(diagonal, Tensor) and seen.get("causal") is True and lengths is None
    if lengths is not None:  # these move no diagonal, which a cache's do
        return seen.get("causal") is False and seen.get("window") is None
    return seen.get("causal") != "top_left"


def _is_zero(module: nn.Module) -> bool:
    """Whether a position bias is one of zeros: T5's attention to the encoder makes such a one, and the self-attention of no layer does."""
    of_decoder, causal = getattr(module, "is_decoder", False), getattr(module, "is_causal", True)
    return bool(of_decoder) and not causal and getattr(module, "has_relative_attention_bias", True) is False


def _unmasked(module: nn.Module, M: int, N: int, is_causal: bool | None, window: int | None) -> dict[str, Any]:
    """Keywords of ``attention`` for a call without a mask."""
    causal = M > 1 and (getattr(module, "is_causal", True) if is_causal is None else bool(is_causal))
    if window is None or window >= N:
        return {"causal": causal}
    if not causal and M > 1:
        raise bad_value("sliding_window", "a mask beside it where attention is not causal", f"{window} of {N} keys and no mask")
    return {"causal": True, "window": (window - 1, None)}


def _added(mask: Tensor, bias: Tensor | None, N: int) -> tuple[Tensor | None, Tensor | None]:
    """A model's own mask, and what is added to the scores with it: (mask, bias) of ``attention``."""
    if not isinstance(mask, Tensor):
        raise bad_type("attention_mask", "a tensor or None", type(mask).__name__, "masks of other implementations do not fit")
    if mask.dim() != 4:
        raise bad_value(
            "attention_mask", "4 dims that broadcast to (batch, heads, queries, keys)", f"{mask.dim()} dims {tuple(mask.shape)}"
        )
    if mask.shape[-1] > N:  # made for a longer cache
        mask = mask[..., :N]
    if mask.dtype == torch.bool:
        return mask, bias
    if not mask.is_floating_point():
        raise bad_type("attention_mask", "a bool tensor, True = visible, or a float one that is added", mask.dtype)
    return None, _sum(bias, mask)


def _sum(bias: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if bias is None else bias if more is None else bias + more


def patch(model: nn.Module) -> nn.Module:
    """Put triflash into the attention modules of a model that keeps them to itself: see docs/integrations.md for which.

    Args:
        model: a transformers model. Its weights stay as they are.

    Returns:
        The model itself. ``unpatch`` puts everything back.

    Raises:
        ValueError: there is no patch for it, or it is patched already.
    """
    register_if_needed()
    return patches.patch(model)


def unpatch(model: nn.Module) -> nn.Module:
    """Undo ``patch``: the model's own attention and the implementation that it had. Returns the model.

    Raises:
        ValueError: it is not patched.
    """
    return patches.unpatch(model)


def register_if_needed() -> None:
    """Register unless somebody has, whose ``lean`` then stays."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if patches.NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        register()
