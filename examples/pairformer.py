"""Train a small Pairformer-like stack on triflash, on random graphs: which tokens share neighbours, and what the neighbours of each carry.

    python examples/pairformer.py            # a minute on a CPU; more with --tokens 256 --blocks 4 --steps 1000

Pair (i, j) is to tell which part of j's neighbours are i's, token i the mean of its neighbours' values. Attention finds neighbours by
what is added to its scores alone: a bias of pairs, which is trained. Graphs are of various sizes, and padded.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from triflash.nn import PairBiasAttention, TriangleAttention


class Block(nn.Module):
    """A Pairformer block without triangle multiplication and dropout."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.starting = TriangleAttention(c, 16, 2, starting=True, offsets=False)
        self.ending = TriangleAttention(c, 16, 2, starting=False, offsets=False)
        self.single = PairBiasAttention(c, c, 16, 2)
        self.of_pairs = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, 2 * c), nn.SiLU(), nn.Linear(2 * c, c))

    def forward(self, s: Tensor, z: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        z = z + self.starting(z, key_lengths=lengths)
        z = z + self.ending(z, key_lengths=lengths)
        z = z + self.of_pairs(z)
        return s + self.single(s, z, key_lengths=lengths), z


class Model(nn.Module):
    """Values (B, N), edges (B, N, N) and how many tokens there are (B,), to an answer for each token and for each pair."""

    def __init__(self, blocks: int, c: int = 32) -> None:
        super().__init__()
        self.into_s, self.into_z, self.from_s, self.from_z = nn.Linear(1, c), nn.Linear(1, c), nn.Linear(c, 1), nn.Linear(c, 1)
        self.blocks = nn.ModuleList(Block(c) for _ in range(blocks))

    def forward(self, values: Tensor, edges: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        s, z = self.into_s(values.unsqueeze(-1)), self.into_z(edges.unsqueeze(-1))
        for block in self.blocks:
            s, z = block(s, z, lengths)
        return self.from_s(s).squeeze(-1), self.from_z(z).squeeze(-1)


def main() -> None:
    """Train, and say which part of the answers' variance is still unexplained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 75), ("tokens", 16), ("blocks", 1), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.manual_seed(0)
    device, N = "cuda" if torch.cuda.is_available() else "cpu", options.tokens
    model = Model(options.blocks).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(options.steps + 1):
        lengths = torch.randint(N // 2, N + 1, (options.batch,), device=device)
        there = torch.arange(N, device=device) < lengths[:, None]
        edges = (torch.rand(options.batch, N, N, device=device) < 4 / N).triu(1) & there[:, None]
        edges, values = (edges | edges.mT).float(), torch.randn(options.batch, N, device=device)
        some = edges.sum(-1) > 0  # of the others nothing is asked
        means = edges / edges.sum(-1, keepdim=True).clamp(min=1)
        wanted = (means @ values.unsqueeze(-1)).squeeze(-1), edges @ means.mT
        asked = some, there[:, :, None] & some[:, None]
        found = model(values, edges, lengths)
        tokens, pairs = ((x - y)[at].square().mean() / y[at].var() for x, y, at in zip(found, wanted, asked, strict=True))
        optimizer.zero_grad()
        (tokens + pairs).backward()
        optimizer.step()
        if step % max(1, options.steps // 5) == 0:
            print(f"step {step:4}: unexplained of tokens {tokens:.3f}, of pairs {pairs:.3f}")


if __name__ == "__main__":
    main()
