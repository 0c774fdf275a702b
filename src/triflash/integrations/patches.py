"""Forward passes for attention modules that never ask transformers' attention interface, put in place of their own and taken out again.

Weights, caches and what surrounds the attention stay the module's. Each function stands for the ``forward`` of the class that FORWARDS
names, and returns what that returns, with None for the probabilities.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import attention
from ..errors import bad_type, bad_value
from .visible import Visible

__all__ = ["FORWARDS", "NAME", "patch", "unpatch"]

NAME = "triattention_patched"  # the implementation of a patched model: its mask function is the same, less the refusal


def _seen(mask: Tensor | Visible | None, M: int, N: int) -> tuple[dict[str, Any], Tensor | None]:
    """Keywords of ``attention`` for a mask, and what of it is to be added to the scores."""
    if mask is None:
        return {"causal": True}, None
    if isinstance(mask, Visible):
        if tuple(mask.shape[2:]) != (M, N):
            raise bad_value("attention_mask", f"one of {M} queries and {N} keys", mask)
        return mask.options(), mask.bias
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise bad_type("attention_mask", "a tensor of 4 dims or None", type(mask).__name__)
    mask = mask[..., :N]
    return ({"mask": mask}, None) if mask.dtype == torch.bool else ({}, mask)


def _no_probabilities(asked: bool) -> None:
    if asked:
        raise bad_value("output_attentions", "False", True, "probabilities are never in memory; unpatch(model) returns them")


def bloom(
    self: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Any,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """BLOOM: ALiBi is a row of the keys' positions times a slope for each head ``(B · H, 1, N)``, a bias that varies over keys alone."""
    _no_probabilities(output_attentions)
    B, M, width = hidden_states.shape
    query, key, value = self.query_key_value(hidden_states).view(B, M, self.num_heads, 3, self.head_dim).unbind(3)
    if layer_past is not None:
        key, value = (x.transpose(1, 2) for x in layer_past.update(key.transpose(1, 2), value.transpose(1, 2), self.layer_idx))
    N = key.shape[1]
    seen, added = _seen(attention_mask, M, N)
    bias = alibi.view(B, self.num_heads, 1, -1)[..., :N]
    dropout = self.attention_dropout.p if self.training else 0.0
    out = attention(
        query, key, value, bias=bias if added is None else bias + added, scale=self.inv_norm_factor, dropout_p=dropout, **seen
    ).view(B, M, width)  # fmt: skip
    if self.pretraining_tp > 1 and self.slow_but_exact:
        part = width // self.pretraining_tp
        parts = zip(out.split(part, -1), self.dense.weight.split(part, 1), strict=True)
        out = sum(nn.functional.linear(x, weight) for x, weight in parts)
    else:
        out = self.dense(out)
    return residual + nn.functional.dropout(out, p=self.hidden_dropout, training=self.training), None


def mpt(
    self: Any,
    hidden_states: Tensor,
    position_bias: Tensor | None,
    cache: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    past_key_value: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """MPT: ALiBi ``(H, 1, longest)``, of which the last N columns belong to the keys."""
    _no_probabilities(kwargs.get("output_attentions", False))
    cache = next((x for x in (cache, past_key_values, past_key_value) if x is not None), None)
    B, M, _ = hidden_states.shape
    mixed = self.Wqkv(hidden_states)
    if self.clip_qkv:
        mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    query, key, value = (x.reshape(B, M, self.n_heads, self.head_dim) for x in mixed.chunk(3, dim=2))
    if cache is not None:
        key, value = (x.transpose(1, 2) for x in cache.update(key.transpose(1, 2), value.transpose(1, 2), self.layer_idx))
    N = key.shape[1]
    seen, bias = _seen(attention_mask, M, N)
    if position_bias is not None:
        if position_bias.dim() != 3 or position_bias.shape[1] != 1:
            raise bad_value("position_bias", "shape (heads, 1, keys)", tuple(position_bias.shape))
        alibi = position_bias[:, :, max(0, position_bias.shape[2] - N) :]
        bias = alibi if bias is None else alibi + bias
    dropout = self.attn_dropout_p if self.training else 0.0
    out = attention(query, key, value, bias=bias, scale=self.softmax_scale, dropout_p=dropout, **seen)
    return self.out_proj(out.reshape(B, M, -1)), None


def falcon(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Any,
    position_ids: Any = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Falcon: with ALiBi its model hands over a float mask that holds it; keys are not repeated where it has one head for all."""
    _no_probabilities(output_attentions)
    query, key, value = self._split_heads(self.query_key_value(hidden_states))
    B, M = query.shape[:2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if alibi is None:
        assert position_embeddings is not None
        turn = sys.modules[type(self).__module__].apply_rotary_pos_emb
        query, key = turn(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    seen, bias = _seen(attention_mask, M, key.shape[2])
    # Dropout as in the module: none without ALiBi.
    dropout = self.attention_dropout.p if self.training and alibi is not None else 0.0
    out = attention(*(x.transpose(1, 2) for x in (query, key, value)), bias=bias, dropout_p=dropout, **seen)
    return self.dense(out.reshape(B, M, -1)), None


def swin(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """Swin: its learned bias ``(1, H, S, S)`` and the mask of shifted windows ``(windows, S, S)`` stay apart."""
    _no_probabilities(kwargs.get("output_attentions", False))
    windows, S, _ = hidden_states.shape
    shown = attention_mask.shape[0] if attention_mask is not None else 1
    heads = (windows // shown, shown, S, -1, self.head_dim)  # images, windows of an image
    query, key, value = (layer(hidden_states).view(heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
    dropout = self.attention_dropout if self.training else 0.0
    out = attention(
        query,
        key,
        value,
        bias=self.relative_position_bias(),
        mask=None if attention_mask is None else (attention_mask == 0)[:, None],
        scale=self.scaling,
        dropout_p=dropout,
    )
    return self.o_proj(out.reshape(windows, S, -1)), None


def swin_v2(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False, **kwargs: Any
) -> tuple[Tensor]:
    """Swin V2: cosines times a learned scale of each head, and a bias ``(1, H, S, S)`` from a small network over log-spaced offsets."""
    _no_probabilities(output_attentions)
    windows, S, width = hidden_states.shape
    H = self.num_attention_heads
    shown = attention_mask.shape[0] if attention_mask is not None else 1
    heads = (windows // shown, shown, S, H, -1)
    query, key, value = (layer(hidden_states).view(heads) for layer in (self.query, self.key, self.value))
    largest = math.log(1.0 / 0.01)
    query = nn.functional.normalize(query, dim=-1) * torch.clamp(self.logit_scale, max=largest).exp().view(H, 1)
    table = self.continuous_position_bias_mlp(self.relative_coords_table).view(-1, H)
    bias = 16 * torch.sigmoid(table[self.relative_position_index.view(-1)].view(S, S, H).permute(2, 0, 1))
    out = attention(
        query.to(value.dtype),
        nn.functional.normalize(key, dim=-1).to(value.dtype),
        value,
        bias=bias[None],
        mask=None if attention_mask is None else (attention_mask == 0)[:, None],
        scale=1.0,
        dropout_p=self.dropout.p if self.training else 0.0,
    )
    return (out.reshape(windows, S, width),)


def deberta_v2(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, None]:
    """DeBERTa V2 and V3: scores of contents with positions are a bias ``(B, H, M, N)`` that the module itself makes, with its gradient."""
    _no_probabilities(output_attentions)
    H = self.num_attention_heads
    given = ((self.query_proj, hidden_states if query_states is None else query_states), (self.key_proj, hidden_states))
    query, key = (self.transpose_for_scores(layer(x), H) for layer, x in given)  # (B · H, length, D)
    parts = 1 + sum(kind in self.pos_att_type for kind in ("c2p", "p2c"))
    bias = None
    if self.relative_attention:
        positions = self.pos_dropout(rel_embeddings)
        bias = self.disentangled_attention_bias(query, key, relative_pos, positions, parts).view(-1, H, query.shape[1], key.shape[1])
    query, key = (x.view(-1, H, *x.shape[1:]).transpose(1, 2) for x in (query, key))
    value = self.value_proj(hidden_states).view(key.shape)
    dropout = self.dropout.p if self.training else 0.0
    scale = (query.shape[-1] * parts) ** -0.5
    out = attention(query, key, value, bias=bias, mask=attention_mask.bool(), scale=scale, dropout_p=dropout)
    return out.flatten(2), None


# The class of an attention module, whose name alone tells: transformers copies classes from file to file under names of their own.
FORWARDS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "BloomAttention": bloom,
    "DisentangledSelfAttention": deberta_v2,
    "FalconAttention": falcon,
    "MptAttention": mpt,
    "SwinAttention": swin,
    "Swinv2SelfAttention": swin_v2,
}
# What each forward pass takes for granted of its module. A version whose modules lack it is refused.
NEEDS = {
    "DisentangledSelfAttention": (
        "query_proj",
        "disentangled_attention_bias",
        "transpose_for_scores",
        "pos_att_type",
        "relative_attention",
    ),
    "Swinv2SelfAttention": ("query", "logit_scale", "continuous_position_bias_mlp", "relative_coords_table", "relative_position_index"),
    "BloomAttention": ("query_key_value", "inv_norm_factor", "layer_idx", "pretraining_tp", "slow_but_exact", "hidden_dropout"),
    "FalconAttention": ("query_key_value", "_split_heads", "dense", "attention_dropout", "layer_idx"),
    "MptAttention": ("Wqkv", "softmax_scale", "clip_qkv", "attn_dropout_p", "layer_idx"),
    "SwinAttention": ("q_proj", "k_proj", "v_proj", "o_proj", "relative_position_bias", "scaling", "attention_dropout"),
}


def _targets(model: nn.Module) -> list[nn.Module]:
    """The model's modules that there is a patch for."""
    return [module for module in model.modules() if type(module).__name__ in FORWARDS]


def patch(model: nn.Module) -> nn.Module:
    """As ``triflash.integrations.transformers.patch``, which see."""
    found = _targets(model)
    config: Any = getattr(model, "config", None)
    if not found or config is None:
        raise bad_value("model", f"a transformers model with one of {', '.join(FORWARDS)}", type(model).__name__)
    if any("_triflash_was" in vars(module) for module in found):
        raise bad_value("model", "one that is not patched", f"a patched {type(model).__name__}", "unpatch(model) undoes it")
    for module in found:
        name = type(module).__name__
        if lacking := [part for part in NEEDS[name] if not hasattr(module, part)]:
            raise bad_value("model", f"a {name} with {', '.join(NEEDS[name])}", f"none with {', '.join(lacking)}", "another transformers?")
    for module in found:
        vars(module)["_triflash_was"] = config._attn_implementation
        vars(module)["forward"] = types.MethodType(FORWARDS[type(module).__name__], module)
    config._attn_implementation = NAME
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """As ``triflash.integrations.transformers.unpatch``, which see."""
    found = [module for module in _targets(model) if "_triflash_was" in vars(module)]
    if not found:
        raise bad_value("model", "one that patch() has patched", type(model).__name__)
    config: Any = model.config
    for module in found:
        config._attn_implementation = vars(module).pop("_triflash_was")
        vars(module).pop("forward")
    return model
