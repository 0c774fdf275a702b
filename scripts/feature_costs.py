"""What each feature of ``triflash.attention`` costs beside the plain call, on the GPU at hand: a markdown table on standard output.

    python3 scripts/feature_costs.py [--budget 0.05] [--length 4096] [--dim 128] [--only dropout]

A feature's time is divided by that of the plain causal call of the same sizes; where it hides scores (a window, key lengths), "pairs" is
the share of visible query-key pairs, which time should follow. Calls are interleaved (``cli.bench.timing``), so that drift hits all
alike.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch

import triflash
from triflash.cli.bench.timing import measure_interleaved


def cases(length: int, heads: int) -> dict[str, tuple[dict[str, Any], float | None]]:
    """Name -> (options of attention, share of the plain causal call's pairs that is visible, if it differs)."""
    device = "cuda"
    whole = length * (length + 1) / 2

    def window(left: int) -> tuple[dict[str, Any], float]:
        pairs = sum(min(i, left) + 1 for i in range(length))
        return {"causal": True, "window": (left, None)}, pairs / whole

    lengths = torch.tensor([length, length // 2, length // 4, 3 * length // 4], device=device, dtype=torch.int32)
    shown = sum(n * (n + 1) / 2 + (length - n) * n for n in lengths.tolist()) / 4 / whole
    slopes = torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)], device=device)
    bias = torch.randn(1, heads, length, length, device=device, dtype=torch.bfloat16)
    mask = torch.rand(1, 1, 1, length, device=device) > 0.1
    return {
        "plain, causal": ({"causal": True}, None),
        "full": ({}, length * length / whole),
        **{f"window ({left}, 0)": window(left) for left in (length // 16, length // 8, length // 4, length // 2)},
        "key lengths 1, 1/2, 1/4, 3/4": ({"causal": True, "key_lengths": lengths}, shown),
        "ALiBi": ({"causal": True, "alibi_slopes": slopes}, None),
        "sinks": ({"causal": True, "sink": torch.randn(heads, device=device)}, None),
        "soft cap 50": ({"causal": True, "softcap": 50.0}, None),
        "dropout 0.1": ({"causal": True, "dropout_p": 0.1, "dropout_seed": 7}, None),
        "mask (1, 1, 1, N)": ({"causal": True, "mask": mask}, None),
        "bias (1, H, M, N)": ({"causal": True, "bias": bias}, None),
        "bias and mask": ({"causal": True, "bias": bias, "mask": mask}, None),
        "deterministic": ({"causal": True, "deterministic": True}, None),
        "8 query heads a key head": ({"causal": True, "group": 8}, None),
        "one key head": ({"causal": True, "group": heads}, None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What each feature costs beside the plain call.")
    parser.add_argument("--budget", type=float, default=0.05, help="seconds of samples a call (default 0.05)")
    parser.add_argument("--length", type=int, default=4096, help="queries and keys (default 4096)")
    parser.add_argument("--dim", type=int, default=128, help="head dim (default 128)")
    parser.add_argument("--only", default="", help="the features whose names contain this, beside the plain call")
    given = parser.parse_args()
    batch, heads, length, dim = 4, 16, given.length, given.dim
    torch.manual_seed(0)
    calls: dict[str, Callable[[], Any]] = {}
    backends: dict[str, str] = {}
    shares: dict[str, float | None] = {}
    for name, (options, share) in cases(length, heads).items():
        if not name.startswith("plain") and given.only not in name:
            continue
        group = options.pop("group", 1)
        q, k, v = (
            torch.randn(batch, length, heads // g, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True) for g in (1, group, group)
        )
        with triflash.record_launches() as ran:
            out = triflash.attention(q, k, v, **options)
            dout = torch.randn_like(out)
            torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        backends[name] = " / ".join(dict.fromkeys(line.split(":")[0] for line in ran))
        shares[name] = share

        def forward(q: Any = q, k: Any = k, v: Any = v, options: Any = options) -> Any:
            with torch.no_grad():
                return triflash.attention(q, k, v, **options)

        def backward(out: Any = out, wanted: Any = (q, k, v), dout: Any = dout) -> Any:
            return torch.autograd.grad(out, wanted, dout, retain_graph=True)

        calls[f"{name}|forward"], calls[f"{name}|backward"] = forward, backward
    found = measure_interleaved(calls, device=torch.device("cuda"), budget=given.budget)
    median = {name: sorted(samples.ms)[len(samples.ms) // 2] for name, samples in found.items() if samples.ms}
    sizes = f"batch {batch}, {heads} heads, {length} queries and keys, head dim {dim}"
    print(f"{torch.cuda.get_device_name()}, bf16, {sizes}; ms, and times plain\n")
    print("| | backend | pairs | forward | backward |\n| --- | --- | --- | --- | --- |")
    for name, share in shares.items():
        cells = []
        for which in ("forward", "backward"):
            time, plain = median.get(f"{name}|{which}"), median[f"plain, causal|{which}"]
            cells.append("-" if time is None else f"{time:.3f} ({time / plain:.2f}x)")
        print(f"| {name} | {backends[name]} | {'' if share is None else f'{share:.2f}'} | {cells[0]} | {cells[1]} |")
    for name, samples in found.items():
        if samples.error is not None:
            print(f"\n{name}: {type(samples.error).__name__}: {samples.error}")


if __name__ == "__main__":
    main()
