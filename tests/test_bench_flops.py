"""FLOPs and bytes against brute force."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

import triflash
from triflash import oracle
from triflash.cli.bench.flops import PASSES, attention_bytes, attention_flops, visible_pairs
from triflash.cli.bench.workloads import DTYPES, NAMED, Workload


@pytest.mark.parametrize("lo", [None, -20, -5, -1, 0, 2, 30])
@pytest.mark.parametrize("hi", [None, -20, -4, 0, 1, 7, 30])
def test_visible_pairs(lo: int | None, hi: int | None) -> None:
    for queries, keys in itertools.product((0, 1, 2, 9, 16), (0, 1, 3, 10, 17)):
        seen = oracle.visible(queries, keys, lo, hi)
        assert visible_pairs(queries, keys, lo, hi) == int(seen.sum()), (queries, keys)


def test_causal_is_not_half() -> None:
    assert visible_pairs(512, 512, None, 0) == 512 * 513 // 2


@pytest.mark.parametrize("workload", [w.shrunk() for w in NAMED.values()], ids=lambda w: w.name)
def test_pairs_of_named_workloads(workload: Workload) -> None:
    """Counted from the very tensors: the band, and the keys that the bias hides."""
    problem = workload.build(torch.device("cpu"))
    seen = oracle.visible(workload.queries, workload.keys, workload.lo, workload.hi).expand(workload.batch, workload.heads, -1, -1)
    if problem.bias is not None:
        outer, inner = workload.batch // workload.batch_inner, workload.batch_inner
        sizes = (outer, inner, workload.heads, workload.queries, workload.keys)
        seen = seen & (problem.bias.expand(sizes).flatten(0, 1) != -torch.inf)
    assert workload.pairs == int(seen.sum())


def test_flops_of_every_product() -> None:
    """Each pair costs a multiplication and an addition for each element that is summed."""
    pairs, d, dv = 7, 3, 5
    qk, pv, dp, dvalue, dk, dq = (2 * pairs * size for size in (d, dv, dv, dv, d, d))
    assert attention_flops(pairs, d, dv, "fwd") == qk + pv
    assert attention_flops(pairs, d, dv, "bwd") == qk + dp + dvalue + dk + dq
    assert attention_flops(pairs, 64, 64, "bwd") == 2.5 * attention_flops(pairs, 64, 64, "fwd")
    forward, backward = (attention_flops(pairs, d, dv, which) for which in ("fwd", "bwd"))
    for which in PASSES:
        if which != "bwd":
            wanted = forward if which in ("fwd", "host-nograd", "host-fwd") else forward + backward
            assert attention_flops(pairs, d, dv, which) == wanted, which


@pytest.mark.parametrize("grads", ["qkv", "q", "kv", "b", ""])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, (3, 2))])
def test_pytorchs_counter(grads: str, causal: bool, window: tuple[int, int] | None, device: torch.device) -> None:
    """``FlopCounterMode`` counts calls of the front door, forward and backward, of the operators and of compiled functions alike."""
    from torch.utils.flop_counter import FlopCounterMode

    B, M, N, H, Hk, D, Dv = 2, 9, 12, 4, 2, 8, 16
    shapes = {"q": (B, M, H, D), "k": (B, N, Hk, D), "v": (B, N, Hk, Dv), "b": (1, 1, M, N)}
    q, k, v, bias = (torch.randn(shape, device=device, requires_grad=name in grads) for name, shape in shapes.items())
    lo, hi = (None, N - M if causal else None) if window is None else (N - M - 3, N - M + 2)
    pairs = B * H * visible_pairs(M, N, lo, hi)
    with FlopCounterMode(display=False) as counter:
        out = triflash.attention(q, k, v, bias=bias, causal=causal, window=window, key_lengths=torch.tensor([3, 12], device=device))
    assert counter.get_total_flops() == attention_flops(pairs, D, Dv, "fwd")
    if grads:
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        wanted = D + Dv * (grads != "") + D * ("q" in grads) + D * ("k" in grads) + Dv * ("v" in grads)
        assert counter.get_total_flops() == 2 * pairs * wanted
        assert grads != "qkv" or counter.get_total_flops() == attention_flops(pairs, D, Dv, "bwd")


@pytest.mark.parametrize("first", ["triflash", "torch.utils.flop_counter"])
def test_pytorchs_counter_knows_the_operators_whatever_is_imported_first(first: str) -> None:
    program = f"""if True:
    import {first}, torch, triflash
    from torch.utils.flop_counter import FlopCounterMode
    q = torch.randn(1, 3, 1, 4)
    with FlopCounterMode(display=False) as counter:
        triflash.attention(q, q, q, backend="tiled")
    print(counter.get_total_flops())
    """
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
    )
    assert run.stdout.split() == [str(9 * 2 * 8)], run.stderr


@pytest.mark.unpoisoned
def test_pytorchs_counter_of_the_operators(device: torch.device) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = (torch.randn(1, 6, 2, 8, device=device) for _ in range(3))
    options = (1, None, 0, 0.3, "", "auto")
    with FlopCounterMode(display=False) as counter:
        out, lse, rest = torch.ops.triflash.forward(q, k, v, None, *options)
        saved = (out, None, q, k, v, None, out, lse, rest)
        torch.ops.triflash.backward_(*saved, *options, torch.empty_like(q), None, torch.empty_like(v), None)
    assert counter.get_total_flops() == 2 * 21 * 2 * (2 * 8 + 4 * 8)


@pytest.mark.parametrize("dbias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_every_tensor(dtype: str, dbias: bool) -> None:
    w = Workload("x", 4, 6, 10, 12, 8, kv_heads=2, value_dim=16, bias="1ihqk", batch_inner=2, dbias=dbias, dtype=dtype)
    x = w.build(torch.device("cpu"))
    assert x.bias is not None
    lse = torch.empty(4, 6, 10)
    forward = [x.q, x.k, x.v, x.bias, x.dout]  # the output is like its gradient
    backward = [x.q, x.k, x.v, x.bias, x.dout, x.dout, lse, x.q, x.k, x.v, *([x.bias] if dbias else [])]
    assert w.bytes("fwd") == sum(t.nbytes for t in forward)
    assert w.bytes("bwd") == sum(t.nbytes for t in backward)
    assert w.bytes("eager") == w.bytes("step") == w.bytes("fwd") + w.bytes("bwd")
    assert attention_bytes(x.q.shape, x.k.shape, x.v.shape, None, x.q.itemsize, dbias, "fwd") == w.bytes("fwd") - x.bias.nbytes
