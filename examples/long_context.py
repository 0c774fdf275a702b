"""Train a transformer block on sequences that are spread over processes: each holds its share of every row, a zigzag of two chunks.

    torchrun --nproc-per-node 2 examples/long_context.py                             # two processes on the CPU, or two GPUs
    torchrun --nproc-per-node 4 examples/long_context.py --length 65536 --method ring

The task is synthetic: a token is the one that stood 'back' places before, so the block must learn to look there. Its attention has a
sliding window, a learned sink for each head, as gpt-oss, and a learned bias of distances, whose gradient is summed over processes like
every weight's.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from triflash.distributed import context_parallel_attention, positions, shard


class Block(nn.Module):
    def __init__(self, tokens: int, dim: int, heads: int, distances: int):
        super().__init__()
        self.heads, self.embed, self.sink = heads, nn.Embedding(tokens, dim), nn.Parameter(torch.zeros(heads))
        self.qkv, self.out, self.head = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False), nn.Linear(dim, tokens)
        self.distance = nn.Embedding(distances, heads)

    def forward(self, ids: Tensor, at: Tensor, length: int, window: int, method: str) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        behind = (at[:, None] - torch.arange(length, device=at.device)).clamp(0, self.distance.num_embeddings - 1)
        bias = self.distance(behind).permute(2, 0, 1)  # (heads, my rows, all keys)
        out = context_parallel_attention(
            q, k, v, group=dist.group.WORLD, method=method, bias=bias, sink=self.sink, causal=True, window=(window - 1, 0), length=length,
            key_length=length,
        )  # fmt: skip
        return self.head(x + self.out(out.flatten(2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--window", type=int, default=16, help="keys that a query sees, itself among them")
    parser.add_argument("--back", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--method", default="allgather", choices=["allgather", "ulysses", "ring"])
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    group, length = dist.group.WORLD, options.length
    torch.manual_seed(0)  # the same weights and the same rows everywhere
    model = Block(16, 32, 4, 16).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    at = positions(length, group).to(device)
    for step in range(options.steps):
        ids = torch.randint(16, (4, options.back), device="cpu").repeat(1, -(-length // options.back) + 1).to(device)
        now, then = (shard(ids[:, n : n + length], 1, group) for n in (0, 1))
        logits = model(now, at, length, options.window, options.method)
        loss = F.cross_entropy(logits.flatten(0, 1), then.flatten(), reduction="sum") / (4 * length)  # this process's part of the mean
        optimizer.zero_grad()
        loss.backward()
        for weight in model.parameters():  # parts of a sum, as rows are spread; the sink's is that of all rows already
            if weight is not model.sink:
                dist.all_reduce(weight.grad)
        optimizer.step()
        dist.all_reduce(loss.detach_())
        if dist.get_rank() == 0 and step % 10 in (0, 9):
            print(f"step {step} loss {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
