"""A user's file that calls everything public: `make lint` checks it with mypy --strict, tests/test_docs.py that no name is missing."""

from __future__ import annotations

import torch
from torch import Tensor

import triflash
from triflash import distributed
from triflash.compat import evoformer, flash_attn, sdpa, torch_varlen, xformers
from triflash.integrations import transformers
from triflash.triton_flash_attention import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func


def dense(q: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    out: Tensor = triflash.attention(q, q, q, bias=bias, causal=True, window=(8, None), scale=0.5)
    both: Tensor = triflash.attention(q, q, q, bias=(bias, bias))
    starts = torch.zeros(q.shape[0], dtype=torch.int32)
    both = triflash.attention(q, both, q, causal=True, diagonal=3, query_starts=starts, query_lengths=starts, key_starts=starts)
    both, _lse = triflash.attention(q, both, q, window=(3, 0), diagonal=starts, return_lse=True)
    part, lse = triflash.attention(out, both, q, return_lse=True)
    return triflash.merge_states([part], [lse])


def packed(rows: Tensor, cu: Tensor, bias: Tensor) -> Tensor:
    out: Tensor = triflash.attention_varlen(rows, rows, rows, cu, bias=bias, bias_layout="keys")
    return out


def cached(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, pages: Tensor) -> Tensor:
    out, lse = triflash.attention_with_kvcache(q, k_cache, v_cache, cache_lengths=lengths, page_table=pages, causal=True, return_lse=True)
    again: Tensor = triflash.attention_with_kvcache(q, k_cache, v_cache, k_new=q, v_new=q, k_scale=0.5, v_scale=lse[0], out=out)
    return again


def spread(x: Tensor, group: torch.distributed.ProcessGroup) -> tuple[Tensor, Tensor]:
    own = distributed.shard(x, 1, group)
    at: Tensor = distributed.positions(x.shape[1], group)
    out: Tensor = distributed.context_parallel_attention(own, own, own, group=group, method="ring", causal=True)
    rows: Tensor = distributed.context_parallel_attention_varlen(own[0], own[0], own[0], torch.tensor([0, x.shape[1]]), group=group)
    out = out + rows
    part, lse = distributed.context_parallel_attention(out, own, own, group=group, return_lse=True)
    return distributed.unshard(part, 1, group, length=x.shape[1]) + at.sum(), lse


def relative(heads: int) -> Tensor:
    module = triflash.nn.RelativeBias(heads, window=(7, 7))
    bias: Tensor = module()
    return bias


def folding(rows: Tensor, pairs: Tensor, tokens: Tensor, bias: Tensor) -> list[Tensor]:
    update: Tensor = triflash.nn.TriangleAttention(128, 32, 4, starting=False)(pairs)
    tokens = triflash.nn.PairBiasAttention(384, 128, 24, 16)(tokens, pairs)
    out = evoformer.DS4Sci_EvoformerAttention(rows, rows, rows, [None, bias])
    part, lse, most = evoformer.triangle_attention(rows, rows, rows, bias, None, None, True)
    return [update, tokens, out, part, lse, most]


def tools(q: Tensor) -> list[str]:
    try:
        with triflash.backend("tiled"), triflash.tuned(None), triflash.record_launches() as ran:
            triflash.attention(q, q, q)
    except triflash.UnsupportedError as error:
        ran = [str(error), triflash.__version__]
    found = triflash.explain(q, q, q, causal=True, device="h200")
    return [*ran, found.backend, *found.launches]


def seed(q: Tensor, bias: Tensor) -> list[Tensor]:
    kv, qkv = torch.stack((q, q), 2), torch.stack((q, q, q), 2)
    return [flash_attn_func(q, q, q, bias, True), flash_attn_kvpacked_func(q, kv, bias), flash_attn_qkvpacked_func(qkv, bias)]


def others(q: Tensor, rows: Tensor, cu: Tensor) -> None:
    with sdpa.replace():
        sdpa.scaled_dot_product_attention(q, q, q, is_causal=True)
    torch_varlen.varlen_attn(rows, rows, rows, cu, cu, 8, 8)
    mask = xformers.LowerTriangularMask()
    biased: xformers.LowerTriangularMaskWithTensorBias = mask.add_bias(q)
    xformers.memory_efficient_attention(q, q, q, attn_bias=biased)
    flash_attn.install()
    flash_attn.flash_attn_func(q, q, q, causal=True)
    flash_attn.flash_attn_kvpacked_func(q, torch.stack((q, q), 2))
    flash_attn.flash_attn_qkvpacked_func(torch.stack((q, q, q), 2))
    flash_attn.flash_attn_varlen_func(rows, rows, rows, cu, cu, 8, 8)
    flash_attn.flash_attn_varlen_kvpacked_func(rows, torch.stack((rows, rows), 1), cu, cu, 8, 8)
    flash_attn.flash_attn_varlen_qkvpacked_func(torch.stack((rows, rows, rows), 1), cu, 8)
    flash_attn.flash_attn_with_kvcache(q, q, q, cache_seqlens=8)
    flash_attn.uninstall()


def models(model: torch.nn.Module, q: Tensor) -> Tensor:
    transformers.register(lean=False)
    transformers.patch(model)
    transformers.unpatch(model)
    name: str = transformers.NAME
    out, nothing = transformers.attention_forward(model, q, q, q, None)
    assert nothing is None and name
    return out
