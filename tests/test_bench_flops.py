"""FLOPs and bytes against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from triflash import oracle
from triflash.bench.flops import PASSES, attention_bytes, attention_flops, visible_pairs
from triflash.bench.workloads import DTYPES, NAMED, Workload


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
