"""What other packages call the arguments of attention: errors for a name that is not ours say which is.

Called by the public functions when something is wrong already.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import bad_type

__all__ = ["not_ours"]

_HINTS = {
    "is_causal": "causal='top_left' is aligned as PyTorch's is_causal is, causal=True to the bottom right",
    "causal_mask": "causal=True (bottom right) or 'top_left'",
    "attn_mask": "mask= for a bool tensor (True = visible), bias= for floats that are added to the scores",
    "attention_mask": "mask=attention_mask[:, None, None, :].bool() for one of keys (True = visible), or key_lengths=; bias= for floats",
    "key_padding_mask": "mask=~key_padding_mask[:, None, None, :] (True = visible), or key_lengths=",
    **dict.fromkeys(("attn_bias", "attention_bias", "position_bias", "pair_bias", "additive_mask"), "bias="),
    **dict.fromkeys(
        ("positional_bias", "relative_position_bias", "relative_attention_bias", "relative_position", "relative_bias", "rel_pos_bias",
         "rel_pos", "pos_bias", "rpe"),
        "bias=, a tensor that broadcasts to (*batch, Hq, M, N); triflash.nn.RelativeBias learns one of relative positions",
    ),
    "block_mask": "mask= for a bool tensor, or causal=, window=, key_lengths=",
    "score_mod": "bias= for what is added to the scores, softcap= for a soft cap",
    "softmax_scale": "scale=",
    "sm_scale": "scale=",
    "scaling": "scale=",
    "dropout": "dropout_p=",
    "dropout_rate": "dropout_p=",
    "attention_dropout": "dropout_p=",
    "p": "dropout_p=",
    "training": "dropout_p=0.0 where nothing is to be dropped",
    "generator": "dropout_seed=, an int or an int64 tensor (seed, offset)",
    "rng_state": "dropout_seed=, an int or an int64 tensor (seed, offset)",
    "seed": "dropout_seed=",
    "window_size": "window=(left, right)",
    "sliding_window": "window=(sliding_window - 1, 0)",
    "local_window_size": "window=(left, right)",
    "soft_cap": "softcap=",
    "logits_soft_cap": "softcap=",
    "logit_softcapping": "softcap=",
    "attn_logit_softcapping": "softcap=",
    "alibi": "alibi_slopes=",
    "sinks": "sink=",
    "s_aux": "sink=",
    "learnable_sink": "sink=",
    "head_mask": "nothing: multiply each head's output, out * head_mask[:, None]",
    **dict.fromkeys(("query", "queries"), "the first by position, q"),
    **dict.fromkeys(("key", "keys"), "the second by position, k"),
    **dict.fromkeys(("value", "values"), "the third by position, v"),
    "num_heads": "leave it out: heads are a dim of q, k and v",
    "gqa": "leave it out: k and v with fewer heads than q are shared by groups of query heads",
    "enable_gqa": "leave it out: k and v with fewer heads than q are shared by groups of query heads",
    "return_attn_probs": "return_lse=True; probabilities are not kept",
    "return_softmax_lse": "return_lse=True",
    "return_attn_weights": "return_lse=True; probabilities are not kept",
    "need_weights": "return_lse=True; probabilities are not kept",
    "seqlens_k": "key_lengths=",
    "seqused_k": "key_lengths=",
    "cache_seqlens": "key_lengths=, or triflash.attention_with_kvcache, which appends to caches",
    "seqlens_q": "query_lengths=",
    "q_lengths": "query_lengths=",
    "left_padding": "key_starts= where keys begin, query_starts= where queries do",
    "leftpad_k": "key_starts=",
    "cache_leftpad": "key_starts=",
    "cache_position": "diagonal=, the position of the first query",
    "q_offset": "diagonal=, the position of the first query",
    "start_pos": "diagonal=, the position of the first query",
    **dict.fromkeys(
        ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "cu_seq_q", "cu_seq_k", "cu_seq_lens_q", "cu_seq_lens_k", "max_seqlen",
         "max_seqlen_q", "max_seqlen_k", "seqused_q"),
        "triflash.attention_varlen takes packed sequences",
    ),
}  # fmt: skip
_VARLEN_HINTS = {
    "cu_seqlens": "cu_seqlens_q=, and cu_seqlens_k= where keys have others",
    "cu_seq_q": "cu_seqlens_q=",
    "cu_seq_k": "cu_seqlens_k=",
    "cu_seq_lens_q": "cu_seqlens_q=",
    "cu_seq_lens_k": "cu_seqlens_k=",
    "offsets": "cu_seqlens_q=",
    "lengths": "cu_seqlens_q=, where sequences begin: torch.nn.functional.pad(lengths.cumsum(0), (1, 0))",
    "position_ids": "cu_seqlens_q=, where position_ids begin anew",
    "max_seqlen": "max_seqlen_q= and max_seqlen_k=, or neither: they are hints",
    "max_q": "max_seqlen_q=",
    "max_k": "max_seqlen_k=",
    "max_length_q": "max_seqlen_q=",
    "max_length_k": "max_seqlen_k=",
    "key_lengths": "seqused_k=",
    "seqlens_k": "seqused_k=",
    "cache_seqlens": "seqused_k=",
    "attention_mask": "nothing where it tells padding, as packed sequences have none; else mask= for a bool tensor, bias= for floats",
    "key_padding_mask": "nothing, as packed sequences have no padding; seqused_k= where some of their keys do not count",
    "block_mask": "mask= for a bool tensor, or causal=, window=; sequences never see each other",
    "layout": "leave it out: packed tensors are (rows, heads, dim)",
    "block_table": "triflash.attention_with_kvcache takes pages (page_table=) and packed queries",
    "page_table": "triflash.attention_with_kvcache takes pages (page_table=) and packed queries",
    "num_splits": "leave it out; triflash.attention_with_kvcache has it",
}
_CACHE_HINTS = {
    "key_lengths": "cache_lengths=",
    "cache_seqlens": "cache_lengths=",
    "seqused_k": "cache_lengths=",
    "seqlens_k": "cache_lengths=",
    "seq_lens": "cache_lengths=",
    "kv_lens": "cache_lengths=",
    "lengths": "cache_lengths=",
    "block_table": "page_table=",
    "block_tables": "page_table=",
    "pages": "page_table=",
    "cache_batch_idx": "cache_index=",
    "cache_leftpad": "key_starts=",
    "leftpad_k": "key_starts=",
    "k": "k_new=",
    "v": "v_new=",
    "key": "k_new=",
    "value": "v_new=",
    "cu_seq_q": "cu_seqlens_q=",
    "cu_seq_lens_q": "cu_seqlens_q=",
    "cu_seqlens_k": "cache_lengths=, and cu_seqlens_new= for packed new keys",
    "cu_seqlens_k_new": "cu_seqlens_new=",
    "max_q": "max_seqlen_q=",
    "max_seqlen_k": "leave it out: what a request can hold follows from the cache or the page_table",
    "k_descale": "k_scale=",
    "v_descale": "v_scale=",
    "rotary_cos": "rotate q and k_new yourself, or call triflash.compat.flash_attn.flash_attn_with_kvcache",
    "rotary_sin": "rotate q and k_new yourself, or call triflash.compat.flash_attn.flash_attn_with_kvcache",
    "dropout_p": "leave it out: a cache is for inference",
    "layout": "leave it out: caches may have any strides, such as k_cache.transpose(1, 2)",
    "deterministic": "leave it out: results are always the same bits",
}
# What each function takes by position.
_BY_POSITION = {
    "attention": ("q", "k", "v"),
    "context_parallel_attention": ("q", "k", "v"),
    "attention_varlen": ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
    "attention_with_kvcache": ("q", "k_cache", "v_cache"),
}


def not_ours(function: str, names: Sequence[str], more: Sequence[Any], others: Mapping[str, Any]) -> TypeError:
    """The error of a call with tensors beyond those by position, or with names that ``function`` does not have among its ``names``."""
    if more:
        *first, last = own = _BY_POSITION[function]
        hint = f"name what follows {last}: bias= for floats that are added to the scores, mask= for a bool tensor, causal=, …"
        return bad_type(function, f"{', '.join(first)} and {last} by position", f"{len(own) + len(more)} arguments", hint)
    name = next(iter(others))
    hints = _HINTS | {"attention_varlen": _VARLEN_HINTS, "attention_with_kvcache": _CACHE_HINTS}.get(function, {})
    hint = hints.get(name.lower(), "")
    if not hint:
        near = difflib.get_close_matches(name.lower(), names, 1)
        hint = f"did you mean {near[0]}=?" if near else ""
    return bad_type(name, f"an argument of {function} ({', '.join(names)})", "a name that it does not have", hint)
