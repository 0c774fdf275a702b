"""Peak memory of exact attention on a CPU, forward and backward with a bias gradient: triflash's tiled backend against dense PyTorch.

    python scripts/peak_memory.py [--lengths 2048 4096 8192] [--heads 2] [--dim 64]

Each measurement is a process of its own; the figure is how far its resident memory grew beyond what it held with its inputs in place.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time

import torch

import triflash
from triflash.cli.demo.memory import Memory
from triflash.cli.demo.model import dense_attention


def measure(name: str, length: int, heads: int, dim: int) -> None:
    """One forward and backward pass in this process; prints its cost and a checksum of each gradient as JSON."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, heads, dim, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, heads, 1, length, requires_grad=True)
    dout = torch.randn(1, length, heads, dim)
    (q[:, :64] @ q[:, :64].mT).sum().backward()  # the thread pool and the allocator have started
    q.grad = None
    memory, start = Memory(torch.device("cpu")), time.perf_counter()
    attention = dense_attention if name == "dense" else lambda *x: triflash.flash_attn_func(*x, causal=True)
    with triflash.backend("tiled"):
        attention(q, k, v, bias).backward(dout)
    seconds, peak = time.perf_counter() - start, memory.peak()
    grads = [float(x.grad.double().norm()) for x in (q, k, v, bias) if x.grad is not None]
    print(json.dumps({"seconds": seconds, "peak": peak, "grads": grads}))


def main() -> None:
    """Measure every length and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "LENGTH"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        measure(given.one[0], int(given.one[1]), given.heads, given.dim)
        return
    print(f"Batch 1, {given.heads} heads of dim {given.dim}, float32, causal, bias (1, {given.heads}, 1, s) with its gradient.")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads.\n")
    print("| s | peak, tiled | peak, dense | ratio | time, tiled | time, dense | largest relative difference of a gradient's norm |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for length in given.lengths:
        found = {}
        for name in ("tiled", "dense"):
            sizes = ["--heads", str(given.heads), "--dim", str(given.dim)]
            command = [sys.executable, __file__, "--one", name, str(length), *sizes]
            environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
            found[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
        tiled, dense = found["tiled"], found["dense"]
        peaks = [f"{x['peak'] / 2**20:,.0f} MiB" for x in (tiled, dense)]
        times = [f"{x['seconds']:.1f} s" for x in (tiled, dense)]
        apart = max(abs(a - b) / b for a, b in zip(tiled["grads"], dense["grads"], strict=True))
        print("|", " | ".join([str(length), *peaks, f"{dense['peak'] / tiled['peak']:.0f}x", *times, f"{apart:.0e}"]), "|", flush=True)


if __name__ == "__main__":
    main()
