"""Every public function that computes attention, once: small inputs that have gradients, and a call of them. For tests of what all of them
owe: ``test_every_function.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import triflash
from triflash import attention, attention_varlen, attention_with_kvcache
from triflash.compat import flash_attn, sdpa, torch_varlen, xformers
from triflash.compat.evoformer import DS4Sci_EvoformerAttention, triangle_attention
from triflash.distributed import context_parallel_attention, context_parallel_attention_varlen
from triflash.nn import PairBiasAttention, TriangleAttention

B, M, N, H, D = 2, 5, 6, 2, 8
DENSE = ((B, M, H, D), (B, N, H, D), (B, N, H, D))
SQUARE = ((B, M, H, D),) * 3
PACKED = ((8, H, D),) * 3
OFFSETS = (0, 3, 3, 8)


@dataclass(frozen=True)
class Function:
    """shapes: of the tensors that have gradients. call: on them and a device, out."""

    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., Tensor]

    def inputs(self, device: torch.device, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator).to(device) for shape in self.shapes]


def numbers(like: Tensor, *values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=dtype)


def group() -> Any:
    """One process that is a group by itself."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


def layer(make: Callable[..., torch.nn.Module], *sizes: int) -> Callable[..., Tensor]:
    """A layer whose parameters are drawn, the same ones in every call."""

    def call(*x: Tensor) -> Tensor:
        if x[0].device not in layers:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                own = make(*sizes)
                for parameter in own.parameters():
                    torch.nn.init.normal_(parameter, std=0.3)
            layers[x[0].device] = own.to(x[0].device)
        found: Tensor = layers[x[0].device](*x)
        return found

    layers: dict[torch.device, torch.nn.Module] = {}
    return call


def placed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, causal=True, query_lengths=numbers(q, 5, 3), key_starts=numbers(q, 1, 0), diagonal=numbers(q, 1, 2))


def triangle(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    found: Tensor = triangle_attention(q, k, v, bias, kv_lengths=numbers(q, 5, 3, 4).view(1, 3, 1, 1, 1))
    return found


def packed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, sink: Tensor | None = None, **options: Any) -> Tensor:
    return attention_varlen(q, k, v, numbers(q, *OFFSETS), bias=bias, sink=sink, **options)  # type: ignore[no-any-return]


FUNCTIONS = {
    "attention": Function((*DENSE, (H, M, N), (H,)), lambda q, k, v, b, s: attention(q, k, v, bias=b, sink=s, causal=True)),
    "two biases": Function((*DENSE, (H, M, N), (B, 1, 1, N)), lambda q, k, v, a, b: attention(q, k, v, bias=(a, b))),
    "placed": Function(DENSE, placed),
    "varlen": Function((*PACKED, (1, H, 5, 5), (H,)), partial(packed, causal=True)),
    "varlen, rows": Function((*PACKED, (H, 8, 5)), partial(packed, bias_layout="rows")),
    "seed": Function((*SQUARE, (B, H, M, M)), lambda q, k, v, b: triflash.flash_attn_func(q, k, v, b, True)),
    "seed, kv": Function(((B, M, H, D), (B, M, 2, H, D)), triflash.flash_attn_kvpacked_func),
    "seed, qkv": Function(((B, M, 3, H, D),), triflash.flash_attn_qkvpacked_func),
    "flash_attn": Function(DENSE, lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=True, softcap=2.0)),
    "flash_attn, kv": Function(((B, M, H, D), (B, N, 2, H, D)), flash_attn.flash_attn_kvpacked_func),
    "flash_attn, qkv": Function(((B, M, 3, H, D),), flash_attn.flash_attn_qkvpacked_func),
    "flash_attn, varlen": Function(
        PACKED, lambda q, k, v: flash_attn.flash_attn_varlen_func(q, k, v, *[numbers(q, *OFFSETS)] * 2, 5, 5, causal=True)
    ),
    "flash_attn, varlen, kv": Function(
        ((8, H, D), (8, 2, H, D)), lambda q, kv: flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *[numbers(q, *OFFSETS)] * 2, 5, 5)
    ),
    "flash_attn, varlen, qkv": Function(
        ((8, 3, H, D),), lambda qkv: flash_attn.flash_attn_varlen_qkvpacked_func(qkv, numbers(qkv, *OFFSETS), 5)
    ),
    "sdpa": Function((*((B, H, n, D) for n in (M, N, N)), (M, N)), sdpa.scaled_dot_product_attention),
    "xformers": Function((*DENSE, (B, H, M, N)), xformers.memory_efficient_attention),
    "torch varlen": Function(PACKED, lambda q, k, v: torch_varlen.varlen_attn(q, k, v, *[numbers(q, *OFFSETS)] * 2, 5, 5, True)),
    "evoformer": Function(
        (*((1, 3, 5, H, D),) * 3, (1, 3, 1, 1, 5), (1, 1, H, 5, 5)), lambda q, k, v, a, b: DS4Sci_EvoformerAttention(q, k, v, [a, b])
    ),
    "triangle": Function((*((1, 3, H, 5, D),) * 3, (1, 1, H, 5, 5)), triangle),
    "nn triangle": Function(((1, 5, 5, 8),), layer(TriangleAttention, 8, 4, 2)),
    "nn pair bias": Function(((1, 5, 8), (1, 5, 5, 6)), layer(PairBiasAttention, 8, 6, 4, 2)),
}
PARALLEL = {
    f"{method} in parallel": Function(
        (*SQUARE, (H, M, M)),
        lambda q, k, v, b, method=method: context_parallel_attention(q, k, v, group=group(), method=method, bias=b, causal=True, length=M, key_length=M),
    )
    for method in ("allgather", "ring", "ulysses")
}  # fmt: skip
PARALLEL["varlen in parallel"] = Function(
    PACKED, lambda q, k, v: context_parallel_attention_varlen(q, k, v, numbers(q, *OFFSETS).cpu(), group=group(), causal=True)
)
CACHES = {
    "kvcache": Function(((B, 1, H, D), (B, N, H, D), (B, N, H, D)), lambda q, k, v: attention_with_kvcache(q, k, v, cache_lengths=numbers(q, 4, 6))),
    "flash_attn, kvcache": Function(
        ((B, 1, H, D), (B, N, H, D), (B, N, H, D)), lambda q, k, v: flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=numbers(q, 4, 6))
    ),
}  # fmt: skip
EVERY = {**FUNCTIONS, **PARALLEL, **CACHES}
