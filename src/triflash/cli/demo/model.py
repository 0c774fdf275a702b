"""A byte-level decoder whose only knowledge of position is a learned relative-position bias, as in T5 (Raffel et al. 2020).

The attention is a function passed in, so that the same weights run through triflash and through PyTorch's dense formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import flash_attn_func

__all__ = ["ATTENTIONS", "Decoder", "dense_attention", "relative_buckets"]

BUCKETS = 32
MAX_DISTANCE = 256  # distances from here on share the last bucket
VOCABULARY = 256

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def triflash_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Causal attention by triflash; the gradient of the bias comes with it."""
    return flash_attn_func(q, k, v, bias, causal=True)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same in plain PyTorch: every score, its softmax and their gradients are tensors of ``(batch, heads, length, length)``."""
    length = q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    s = (q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5 + bias
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    p = torch.softmax(s.masked_fill(future, -torch.inf), -1)
    return (p.to(v.dtype) @ v).transpose(1, 2)


ATTENTIONS: dict[str, Attention] = {"triflash": triflash_attention, "dense": dense_attention}


def relative_buckets(distance: Tensor) -> Tensor:
    """T5's bucket of each distance ``i - j``: one each for the near half, then logarithmically wider ones up to ``MAX_DISTANCE``."""
    distance = distance.clamp(min=0)  # keys in the future are masked anyway
    exact = BUCKETS // 2
    far = exact + (distance.clamp(min=1) / exact).log() / math.log(MAX_DISTANCE / exact) * (BUCKETS - exact)
    return torch.where(distance < exact, distance, far.long().clamp(max=BUCKETS - 1))


class Linear(nn.Linear):
    """Float32 weights, used in the dtype of what comes in: the optimiser never rounds a small update away."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Block(nn.Module):
    """One pre-norm layer: attention, then a feed-forward network four times as wide."""

    def __init__(self, dim: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norms = nn.ModuleList([nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)])
        self.qkv, self.project = Linear(dim, 3 * dim, bias=False), Linear(dim, dim, bias=False)
        self.widen, self.narrow = Linear(dim, 4 * dim, bias=False), Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` is the float32 residual stream ``(B, S, dim)``; products run in ``dtype``."""
        q, k, v = self.qkv(self.norms[0](x).to(dtype)).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, S, H, D]
        x = x + self.project(self.attention(q, k, v, bias).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.norms[1](x).to(dtype))))


class Decoder(nn.Module):
    """Bytes ``(B, S)`` in, logits of the next byte ``(B, S, 256)`` out."""

    buckets: Tensor

    def __init__(self, length: int, layers: int, heads: int, dim: int, attention: Attention, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.relative_bias = nn.Embedding(BUCKETS, heads)  # shared by all layers, as in T5
        self.blocks = nn.ModuleList([Block(dim, heads, attention) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim, bias=False)
        at = torch.arange(length)
        self.register_buffer("buckets", relative_buckets(at[:, None] - at[None, :]), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=dim**-0.5 / (2 * layers) ** (0.5 if "project" in name or "narrow" in name else 0))
        nn.init.zeros_(self.relative_bias.weight)  # what the picture shows was learned

    def bias(self) -> Tensor:
        """The position bias ``(1, heads, S, S)``, float32: what attention gets, and what its gradient comes back in."""
        return self.relative_bias(self.buckets).permute(2, 0, 1).contiguous()[None]

    def forward(self, tokens: Tensor) -> Tensor:
        bias = self.bias()
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, bias, self.dtype)
        return F.linear(self.norm(x).to(self.dtype), self.embedding.weight.to(self.dtype)).float()

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())
