"""Attention of sequences that are spread over processes, on torch.distributed: results and gradients are those of the gathered tensors.

Imported where it is named first; docs/distributed.md says what each method sends and when to take which.
"""

from .attention import context_parallel_attention
from .shares import positions, shard, unshard
from .varlen import context_parallel_attention_varlen

__all__ = ["context_parallel_attention", "context_parallel_attention_varlen", "positions", "shard", "unshard"]
