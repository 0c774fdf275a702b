"""Context parallelism: values and gradients of what each rank computes are those of attention on the gathered tensors; 2, 3 and 4 processes.

Packed documents are in test_distributed_packed.py; errors, compilation, failures and pages in test_distributed_use.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import triflash
from ranks import METHODS, call_of, made, needs_gloo, run
from triflash import oracle
from triflash.cli.bench.tolerance import GRADIENT_FACTOR, OUTPUT_FACTOR, Judgement, assert_close

pytestmark = needs_gloo


@dataclass(frozen=True)
class Case:
    """One call. shapes: of the gathered tensors. by_rows: those of bias, second and mask that are spread with the queries."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    orders: tuple[str, ...] = ("zigzag",)
    methods: tuple[str, ...] = METHODS
    lse: bool = False
    extra: dict[str, Any] = field(default_factory=dict)  # of the distributed call alone


def qkv(
    M: int,
    N: int,
    H: int = 4,
    Hk: int | None = None,
    D: int = 4,
    Dv: int | None = None,
    batch: tuple[int, ...] = (2,),
    **more: tuple[int, ...],
) -> dict[str, tuple[int, ...]]:
    Hk, Dv = Hk or H, Dv or D
    return {"q": (*batch, M, H, D), "k": (*batch, N, Hk, D), "v": (*batch, N, Hk, Dv), **more}


BOTH = ("zigzag", "contiguous")
CASES = [
    Case("plain", qkv(16, 16), orders=BOTH),
    Case("causal", qkv(16, 16), {"causal": True}, BOTH, lse=True),
    Case("causal, uneven, other lengths", qkv(13, 19, 4, 2, Dv=3), {"causal": True}, BOTH, lse=True),
    Case("fewer keys than queries", qkv(17, 6), {"causal": True}, BOTH, lse=True),
    Case("empty shares", qkv(3, 5), {"causal": True}, BOTH),
    Case("top left", qkv(11, 18), {"causal": "top_left"}),
    Case("windows", qkv(23, 23, 4, 1), {"window": (5, 2)}, BOTH, lse=True),
    Case("a causal window", qkv(24, 24), {"window": (3, None), "causal": True}),
    Case("bias, a sink, a soft cap", qkv(14, 15, bias=(4, 14, 15), sink=(4,)), {"causal": True, "softcap": 5.0}, BOTH, lse=True),
    Case("bias of all heads", qkv(12, 12, bias=(2, 1, 12, 12), sink=(4,)), {"window": (4, 4)}),
    Case("bias of keys", qkv(12, 13, bias=(2, 1, 1, 13)), {"causal": True}, BOTH),
    Case("bias of queries", qkv(12, 13, bias=(4, 12, 1)), {"causal": True}),
    Case("bias of heads and keys", qkv(12, 13, bias=(4, 1, 13), mask=(2, 1, 12, 13))),
    Case("two biases", qkv(12, 13, bias=(4, 12, 13), second=(2, 1, 1, 13), sink=(4,)), {"causal": True}, lse=True),
    Case("a mask", qkv(12, 13, mask=(12, 13))),
    Case("a mask of keys and lengths", qkv(12, 13, mask=(2, 1, 1, 13), key_lengths=(2,)), {"causal": True}, BOTH),
    Case("lengths", qkv(12, 17, 4, 2, key_lengths=(2,)), lse=True),
    Case("ALiBi, causal", qkv(16, 16, alibi_slopes=(4,)), {"causal": True}, BOTH, lse=True),
    Case("ALiBi, top left", qkv(11, 18, alibi_slopes=(4,)), {"causal": "top_left"}),
    Case("ALiBi, top left, fewer keys", qkv(18, 11, alibi_slopes=(4,)), {"causal": "top_left", "window": (30, None)}),
    Case("ALiBi both ways", qkv(13, 17, alibi_slopes=(2, 4)), {}, BOTH, lse=True),
    Case("ALiBi, a window, a bias, fewer keys", qkv(17, 11, bias=(4, 17, 11), alibi_slopes=(4,)), {"window": (6, 3)}, BOTH),
    Case("ALiBi, a mask alone, a sink", qkv(10, 12, mask=(10, 12), alibi_slopes=(4,), sink=(4,)), {}),
    Case("rows that are none, a sink", qkv(17, 23, query_starts=(2,), query_lengths=(2,), sink=(4,)), {"causal": True}, BOTH, lse=True),
    Case("padded in front", qkv(15, 19, 4, 2, key_starts=(2,), key_lengths=(2,), bias=(4, 15, 19)), {"window": (9, 2)}, BOTH, lse=True),
    Case("another diagonal", qkv(14, 21, alibi_slopes=(4,), bias=(4, 14, 21)), {"causal": True, "diagonal": 4}, BOTH),
    Case("a diagonal of each entry, ALiBi", qkv(13, 18, diagonal=(2,), alibi_slopes=(4,), query_lengths=(2,)), {"window": (7, 1)}, BOTH, lse=True),
    Case("a diagonal of each entry that nothing counts from", qkv(11, 12, diagonal=(2,), mask=(2, 4, 11, 12))),
    Case("everything numbered, dropout", qkv(18, 16, 12, 6, batch=(2, 2), diagonal=(2, 2), key_starts=(2, 2), query_starts=(2, 2), query_lengths=(2, 2), sink=(12,)), {"causal": True, "dropout_p": 0.2, "dropout_seed": 4}),
    Case("two biases and ALiBi", qkv(16, 19, bias=(4, 16, 19), second=(2, 1, 1, 19), alibi_slopes=(4,)), {}, BOTH, lse=True),
    Case("heads first", {"q": (2, 4, 10, 4), "k": (2, 2, 12, 4), "v": (2, 2, 12, 4), "bias": (4, 10, 12)}, {"layout": "bhsd", "causal": True}),
    Case("two batch dims", qkv(10, 12, batch=(2, 3), bias=(2, 1, 4, 10, 12)), {"causal": True}, lse=True),
    Case("one row", qkv(1, 9, bias=(4, 1, 9)), {"causal": True}, ("contiguous",)),
    Case("chunks of heads", qkv(10, 12, 8, 4, bias=(2, 8, 10, 12), sink=(8,), alibi_slopes=(8,)), {"causal": True}, methods=("allgather",), lse=True, extra={"head_chunks": 3}),
    Case("chunks of heads that share a bias", qkv(10, 12, 8, 4, bias=(10, 12)), {"causal": True}, methods=("allgather",), extra={"head_chunks": 2}),
    Case("one key head", qkv(10, 12, 12, 1), {"causal": True}),
    Case("key heads that no rank divides", qkv(10, 12, 12, 6, bias=(12, 10, 12), mask=(2, 1, 10, 12), sink=(12,)), {"causal": True}, BOTH),
    Case("heads that share a bias", qkv(10, 12, 12, 2, bias=(10, 12), second=(12, 1, 12), alibi_slopes=(12,)), {"causal": True}, ("zigzag",), ("ulysses",)),
    Case("dropout", qkv(21, 37, 4, 2), {"causal": True, "dropout_p": 0.4, "dropout_seed": 7}, BOTH),
    Case("dropout, everything", qkv(33, 20, 12, 6, bias=(12, 33, 20), sink=(12,), alibi_slopes=(12,)), {"dropout_p": 0.2, "dropout_seed": -3}, extra={"head_chunks": 2}),
    Case("deterministic", qkv(10, 13, bias=(1, 1, 1, 13), sink=(4,)), {"causal": True, "deterministic": True}),
]  # fmt: skip
FIRST = ("causal, uneven, other lengths", "bias, a sink, a soft cap", "bias of keys", "ALiBi, causal")


def rows_of(name: str, case: Case) -> int | None:
    """The dim of a tensor that is spread over the group."""
    heads_first = case.options.get("layout") == "bhsd"
    if name in ("q", "k", "v"):
        return len(case.shapes[name]) - (2 if heads_first else 3)
    M = case.shapes["q"][-2 if heads_first else -3]
    if name in ("bias", "second", "mask") and case.shapes[name][-2] == M != 1:
        return len(case.shapes[name]) - 2
    return None


def check(case: Case, method: str, order: str, known: bool) -> None:
    from triflash.distributed import context_parallel_attention, shard, unshard

    group = dist.group.WORLD
    torch.manual_seed(len(case.name))
    at = -2 if case.options.get("layout") == "bhsd" else -3
    M, N = case.shapes["q"][at], case.shapes["k"][at]
    whole = {name: made(name, shape, N, torch.float64) for name, shape in case.shapes.items()}
    learned = [name for name, x in whole.items() if x.is_floating_point() and name != "alibi_slopes"]
    parts = {}
    for name, x in whole.items():
        dim = rows_of(name, case)
        parts[name] = (x.clone() if dim is None else shard(x, dim, group, order)).requires_grad_(name in learned)
        x.requires_grad_(name in learned)
    lengths = {"length": M, "key_length": N} if known else {}
    where = f"{case.name}, {method}, {order}"
    results = call_of(
        context_parallel_attention,
        parts,
        group=group,
        method=method,
        order=order,
        return_lse=case.lse,
        **case.options,
        **case.extra,
        **lengths,
    )
    expected = call_of(triflash.attention, whole, return_lse=case.lse, **case.options)
    if not case.lse:
        results, expected = (results,), (expected,)
    cotangents = [torch.randn_like(x) for x in expected]
    dims = [len(expected[0].shape) + at, len(expected[0].shape) - 2]
    torch.autograd.backward(expected, cotangents)
    torch.autograd.backward(results, [shard(x, dim, group, order) for x, dim in zip(cotangents, dims, strict=False)])
    for result, reference, dim in zip(results, expected, dims, strict=False):
        own = shard(reference.detach(), dim, group, order)
        torch.testing.assert_close(result.detach(), own, rtol=1e-10, atol=1e-10, msg=lambda text: f"{where}: {text}")
        assert torch.equal(unshard(own, dim, group, order, reference.shape[dim] if known else None), reference.detach())
    for name in learned:
        dim = rows_of(name, case)
        reference = whole[name].grad if dim is None else shard(whole[name].grad, dim, group, order)
        torch.testing.assert_close(
            parts[name].grad, reference, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{where}, d{name}: {text}"
        )


def check_rounded(method: str, dtype: torch.dtype, world: int) -> None:
    """In 16 and 32 bits, by the rule of tolerance: no further from the float64 oracle than the formula in plain PyTorch, within its factors."""
    from triflash.distributed import context_parallel_attention, shard, unshard

    group, order = dist.group.WORLD, "zigzag"
    torch.manual_seed(5)
    M, H = 61, 2 * world
    shapes = {"q": (2, M, H, 16), "k": (2, M, world, 16), "v": (2, M, world, 16), "bias": (H, M, M), "sink": (H,)}
    whole = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    dout = torch.randn(2, M, H, 16).to(dtype)

    def dense(to: torch.dtype) -> tuple[Tensor, ...]:
        leaves = {
            name: x.detach().clone().to(torch.float64 if to == torch.float64 else dtype).requires_grad_() for name, x in whole.items()
        }
        out, _ = oracle.attention(**leaves, hi=0, dtype=to)
        return (out.detach(), *torch.autograd.grad(out, list(leaves.values()), dout.to(to)))

    exact, plain = dense(torch.float64), dense(dtype)
    dims = {"q": 1, "k": 1, "v": 1, "bias": 1}
    parts = {name: (shard(x, dims[name], group, order) if name in dims else x.clone()).requires_grad_() for name, x in whole.items()}
    out = call_of(context_parallel_attention, parts, group=group, method=method, order=order, causal=True)
    out.backward(shard(dout, 1, group, order))
    found = [unshard(out.detach(), 1, group, order)]
    for name, x in parts.items():
        assert x.grad is not None and x.grad.dtype == dtype, (name, method, x.grad, dtype)
        found.append(unshard(x.grad, dims[name], group, order) if name in dims else x.grad)
    for name, result, reference, yardstick in zip(("out", *(f"d{name}" for name in parts)), found, exact, plain, strict=True):
        factor = OUTPUT_FACTOR if name == "out" else GRADIENT_FACTOR
        assert_close(f"{method}, {dtype}, {name}", result, Judgement(reference, yardstick, factor, dtype, 1e-6))


def check_all(rank: int, world: int) -> None:
    if world == 3:  # partial gradients are exchanged whole, and fresh memory is NaN
        torch._C._set_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
    for n, case in enumerate(CASES):
        for method in case.methods:
            if method == "ulysses" and case.shapes["q"][-2 if "layout" not in case.options else -3] % world:
                continue
            for order in case.orders:
                check(case, method, order, known=n % 2 == 0)
    for method in METHODS:
        for dtype in (torch.float32, torch.bfloat16):
            check_rounded(method, dtype, world)


def check_first(rank: int, world: int, method: str) -> None:
    for n, case in enumerate(case for case in CASES if case.name in FIRST):
        check(case, method, "zigzag", known=n == 0)


def check_shares(rank: int, world: int) -> None:
    from triflash.distributed import positions, shard, unshard

    group = dist.group.WORLD
    for order in ("zigzag", "contiguous"):
        for length in (0, 1, 2 * world, 2 * world + 3, 29):
            own = positions(length, group, order)
            ends = [c * length // (2 * world) for c in range(2 * world + 1)]
            chunks = [rank, 2 * world - 1 - rank]
            if order == "contiguous":
                ends, chunks = [c * length // world for c in range(world + 1)], [rank]
            assert own.tolist() == [i for c in chunks for i in range(ends[c], ends[c + 1])], (order, length)
            x = torch.randn(2, length, dtype=torch.float64, generator=torch.Generator().manual_seed(length)).requires_grad_()
            part = shard(x, -1, group, order)
            assert torch.equal(part, x[:, own])
            whole = unshard(part, 1, group, order, length if length % 2 else None)
            assert torch.equal(whole, x)
            weights = torch.arange(2.0 * length, dtype=torch.float64).view(2, length)
            (grad,) = torch.autograd.grad((whole * weights).sum(), x)
            expected = torch.zeros_like(weights)
            expected[:, own] = weights[:, own]
            assert torch.equal(grad, expected)  # unshard slices, shard scatters


@pytest.mark.parametrize("method", METHODS)
def test_one_of_each(method: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    run(2, tmp_path, record_property, check_first, method)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_equal_to_attention(world: int, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    run(world, tmp_path, record_property, check_all)


def test_shares(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    run(3, tmp_path, record_property, check_shares)
