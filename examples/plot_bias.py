"""Learn a bias of relative positions and draw it: what attention has learned about distances, without a notebook.

    python examples/plot_bias.py --out bias.png

The task: copy the token seven places back, which nothing but the bias can find. Needs: pip install torch triflash matplotlib
"""

from __future__ import annotations

import argparse

import matplotlib
import torch
from torch import nn

import triflash

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LENGTH, HEADS, DIM, BACK = 48, 4, 32, 7


class Copier(nn.Module):
    """One layer of causal attention whose queries and keys know no positions."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.embedding, self.qkv, self.out = nn.Embedding(tokens, DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, tokens)
        self.position = triflash.nn.RelativeBias(HEADS, buckets=32, max_distance=64, bidirectional=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.embedding(ids)).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        return self.out(triflash.attention(q, k, v, bias=self.position(ids.shape[1]), causal=True).flatten(-2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="bias.png")
    given = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Copier(16).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for step in range(given.steps):
        ids = torch.randint(0, 16, (8, LENGTH), device=device)
        loss = nn.functional.cross_entropy(model(ids)[:, BACK:].flatten(0, 1), ids[:, :-BACK].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == given.steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    bias = model.position(LENGTH)[0].detach().float().cpu()  # (heads, queries, keys)
    best = bias[:, -1].max(0).values.argmax().item()
    print(f"the last query's largest bias is {LENGTH - 1 - best} places back")
    figure, axes = plt.subplots(1, HEADS, figsize=(3 * HEADS, 3), layout="constrained")
    for head, axis in enumerate(axes):
        shown = axis.imshow(bias[head].masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), torch.nan), cmap="viridis")
        axis.set(title=f"head {head}", xlabel="key", ylabel="query" if head == 0 else "")
        figure.colorbar(shown, ax=axis, shrink=0.7)
    figure.savefig(given.out, dpi=120)
    print(f"drawn in {given.out}")


if __name__ == "__main__":
    main()
