"""Context parallelism: values and gradients of what each rank computes are those of attention on the gathered tensors; 2, 3 and 4 processes."""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import tiers
import triflash
from triflash import oracle
from triflash.cli.bench.tolerance import GRADIENT_FACTOR, OUTPUT_FACTOR, Judgement, assert_close

pytestmark = [
    pytest.mark.unpoisoned,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
]

EXAMPLE = Path(__file__).parent.parent / "examples" / "long_context.py"
PAGE = Path(__file__).parent.parent / "docs" / "distributed.md"
METHODS = ("allgather", "ulysses", "ring")
PRELOADED = ["torch", "torch.distributed.device_mesh", "triflash.distributed", "pytest"]


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


def made(name: str, shape: tuple[int, ...], keys: int, dtype: torch.dtype) -> Tensor:
    if name == "mask":
        return torch.rand(shape) > 0.3
    if name == "key_lengths":
        return torch.randint(0, keys + 1, shape)
    x = torch.randn(shape, dtype=torch.float64)
    return (x.abs() if name == "alibi_slopes" else x).to(dtype)


def rows_of(name: str, case: Case) -> int | None:
    """The dim of a tensor that is spread over the group."""
    heads_first = case.options.get("layout") == "bhsd"
    if name in ("q", "k", "v"):
        return len(case.shapes[name]) - (2 if heads_first else 3)
    M = case.shapes["q"][-2 if heads_first else -3]
    if name in ("bias", "second", "mask") and case.shapes[name][-2] == M != 1:
        return len(case.shapes[name]) - 2
    return None


def call_of(function: Any, tensors: dict[str, Tensor], **options: Any) -> Any:
    given = dict(tensors)
    if "second" in given:
        given["bias"] = (given["bias"], given.pop("second"))
    q, k, v = (given.pop(name) for name in "qkv")
    return function(q, k, v, **given, **options)


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


def check_kernels(method: str) -> None:
    """Parts are calls like any other: of the backend that was asked for, with its own words for what it cannot do."""
    from triflash.distributed import context_parallel_attention

    q = torch.randn(1, 3, 2, 4, requires_grad=True)
    for backend in ("tiled", "oracle"):
        if (method, backend) == ("ring", "oracle"):
            with pytest.raises(triflash.UnsupportedError, match=r"^method='ring'.*'oracle'; method='allgather'"):
                context_parallel_attention(q, q, q, group=dist.group.WORLD, method=method, backend=backend)
            continue
        with triflash.record_launches() as ran:
            context_parallel_attention(q, q, q, group=dist.group.WORLD, method=method, backend=backend).sum().backward()
        assert set(ran) == {f"{backend}: forward", f"{backend}: backward"}, ran
    (grad,) = torch.autograd.grad(
        context_parallel_attention(q, q, q, group=dist.group.WORLD, method=method).square().sum(), q, create_graph=True
    )
    with pytest.raises(triflash.UnsupportedError, match="second derivative"):
        grad.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert context_parallel_attention(q, q, q, group=dist.group.WORLD, method=method).dtype == torch.bfloat16


def check_programs() -> None:
    """What plans are told of the device (4 SMs, of the interpreter): all of it, but less while a collective is in flight, or what was asked for."""
    from triflash.bound import signature
    from triflash.distributed import context_parallel_attention

    q, seen = torch.randn(1, 4, 4, 4, requires_grad=True), []
    asked = signature.facts_of

    def noting(device: torch.device) -> Any:
        seen.append(asked(device).sms)
        return asked(device)

    with mock.patch.object(signature, "facts_of", noting):
        for options, forward, backward in (
            ({"head_chunks": 2}, {4, 1}, {1}), ({"head_chunks": 1}, {4}, {4}), ({"programs": 3, "head_chunks": 2}, {3}, {3}),
            ({"method": "ring"}, {4, 1}, {1}), ({"method": "ulysses", "programs": 2}, {2}, {2}), ({"programs": 100}, {4}, {4}),
        ):  # fmt: skip
            seen.clear()
            out = context_parallel_attention(q, q, q, group=dist.group.WORLD, causal=True, **options)
            assert set(seen) == forward, (options, seen)
            seen.clear()
            out.sum().backward()
            assert set(seen) == backward, (options, seen)
    assert asked(q.device).sms == 4


def check_agreement(rank: int) -> None:
    """TRIFLASH_CHECK=1: every rank raises the same words, which name the argument and a rank; one that checks is enough."""
    from triflash.distributed import context_parallel_attention

    group = dist.new_group([0, 1])
    q = torch.randn(1, 4, 2, 4)
    if rank == 1:
        os.environ["TRIFLASH_CHECK"] = "1"
    same = context_parallel_attention(q, q, q, group=group)
    os.environ.pop("TRIFLASH_CHECK", None)  # it was read once
    for name, words, options in (
        ("method", "allgather as on rank 0, got ring on rank 1", {"method": ("allgather", "ring")[rank]}),
        ("causal", "False as on rank 0, got True on rank 1", {"causal": rank == 1}),
        ("window", r"None as on rank 0, got \(1, 1\) on rank 1", {"window": (1, 1) if rank else None}),
        ("bias", r"a float32 tensor of shape \(2, rows, 8\) as on rank 0, got .*float16", {"bias": torch.zeros(2, 4, 8).to((torch.float32, torch.float16)[rank])}),
        ("bias", r"None as on rank 0, got a float32 tensor of shape \(8,\) on rank 1", {"bias": torch.zeros(8) if rank else None}),
        ("sink", "a float32 tensor as on|a float32 tensor of shape .* as on rank 0, got a float32 tensor that requires", {"sink": torch.zeros(2).requires_grad_(rank == 1)}),
        ("length", "8 as on rank 0, got None on rank 1", {"length": 8 if rank == 0 else None}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: wanted the same on every rank, {words}"):
            context_parallel_attention(q, q, q, group=group, **options)
    with pytest.raises(ValueError, match=r"^q: wanted the same on every rank, .*rows, 2, 4\) as on rank 0, got .*rows, 2, 3\) on rank 1"):
        context_parallel_attention(*[q[..., : 4 - rank]] * 3, group=group)
    x = q[:, : 3 + rank]  # shares may differ
    context_parallel_attention(x, x, x, group=group, order="contiguous", length=7, key_length=7)
    torch.testing.assert_close(context_parallel_attention(q, q, q, group=group), same)


def check_compiled(method: str) -> None:
    """One graph, whose collectives are functional ones, with the gradients of the eager call."""
    from torch._dynamo.backends.debugging import aot_eager

    from triflash.distributed import context_parallel_attention, positions, shard, unshard

    group, S = dist.group.WORLD, 11
    graphs: list[Any] = []

    def looking(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def step(q: Tensor, k: Tensor, bias: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = context_parallel_attention(
            q, k, k, group=group, method=method, bias=bias, sink=sink, causal=True, length=S, key_length=S, return_lse=True
        )
        return unshard(out * 2, 1, group, length=S), lse

    def local(x: Tensor) -> Tensor:
        return shard(x, 1, group) + positions(S, group)[:, None, None]

    torch.manual_seed(3)
    q, k, bias, sink = (shard(torch.randn(shape), 1, group) for shape in ((2, S, 4, 4), (2, S, 2, 4), (4, S, S), (1, 4)))
    sink = torch.randn(4)
    found = []
    whole = torch.randn(2, S, 4, 4)
    for run, cut in (
        (step, local),
        (torch.compile(step, backend=looking, fullgraph=True), torch.compile(local, backend="eager", fullgraph=True)),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, bias, sink)]
        out, lse = run(*leaves)
        (out.sin().sum() + lse.sum()).backward()
        found.append([out.detach(), lse.detach(), *(x.grad for x in leaves), cut(whole)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)
    assert len(graphs) == 1
    with pytest.raises(Exception, match="length"):
        torch.compile(lambda x: context_parallel_attention(x, x, x, group=group, method=method), backend="eager", fullgraph=True)(q)


def check_errors(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import DeviceMesh

    from triflash.distributed import context_parallel_attention, positions, shard, unshard

    group = dist.group.WORLD
    q = torch.randn(2, 4, 3, 4)

    def run(*given: Tensor, **options: Any) -> Any:
        return context_parallel_attention(*(given or (q, q, q)), **{"group": group, **options})

    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, r"^method: wanted one of allgather, ulysses, ring, got 'gather'", {"method": "gather"}),
        (ValueError, r"^order: wanted one of zigzag, contiguous, got 'zig'", {"order": "zig"}),
        (TypeError, r"^group: wanted a ProcessGroup, a DeviceMesh of one dim.*got None.*WORLD", {"group": None}),
        (TypeError, r"^group: wanted a ProcessGroup.*got str", {"group": "WORLD"}),
        (TypeError, r"^head_chunks: wanted an integer", {"head_chunks": 1.0}),
        (ValueError, r"^head_chunks: wanted an integer from 1 up", {"head_chunks": 0}),
        (ValueError, r"^programs: wanted an integer from 1 up", {"programs": -1}),
        (TypeError, r"^length: wanted an integer, got str", {"length": "8"}),
        (ValueError, rf"^q: wanted \d+ rows on rank {rank} of 2, its zigzag share of length=11, got 4", {"length": 11}),
        (ValueError, rf"^k: wanted \d+ rows on rank {rank} of 2, its zigzag share of key_length=11, got 4", {"key_length": 11}),
        (ValueError, r"^bias: wanted .*M=4, N=8.*got \(4, 4\)", {"bias": torch.zeros(4, 4)}),
        (triflash.UnsupportedError, r"^method='ulysses' with 3 query heads on 2 ranks.*method='allgather' and", {"method": "ulysses"}),
        (TypeError, r"^is_causal: wanted an argument of context_parallel_attention .*causal='top_left'", {"is_causal": True}),
        (TypeError, r"^return_lse", {"return_lse": 1}),
    ]  # fmt: skip
    for kind, words, options in wrong:
        with pytest.raises(kind, match=words):
            run(**options)
    with pytest.raises(TypeError, match=r"^context_parallel_attention: wanted q, k and v by position, got 4"):
        run(q, q, q, q)
    with pytest.raises(ValueError, match=r"^q: wanted 4 dims or more"):
        run(q[0], q, q)
    with pytest.raises(ValueError, match=r"^q: wanted 3 rows on rank 0 of 2, its contiguous share of 7, got 4; the ranks hold \[4, 3\]"):
        run(*[q[:, : 4 - rank]] * 3, order="contiguous")
    with pytest.raises(ValueError, match=r"^k: wanted"):
        run(q, q[..., :3], q)
    with pytest.raises(ValueError, match=r"^dim: wanted one of the 4 dims"):
        shard(q, 4, group)
    with pytest.raises(ValueError, match=rf"^x: wanted 5 rows on rank {rank} of 2"):
        unshard(q, 1, group, length=10)
    with pytest.raises(ValueError, match="^length: wanted an integer from 0 up"):
        positions(-1, group)
    mesh = DeviceMesh("cpu", torch.arange(world), mesh_dim_names=("cp",))
    for same in (mesh, mesh["cp"], (mesh, 0), (mesh, "cp")):
        torch.testing.assert_close(run(group=same), run(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="^group: wanted a DeviceMesh of one dim, got one of 2"):
        run(group=DeviceMesh("cpu", torch.arange(world).view(1, world)))
    alone = [dist.new_group([n]) for n in range(world)]
    with pytest.raises(ValueError, match="^group: wanted a group that this process is in"):
        run(group=alone[1 - rank])
    for method in METHODS:  # a group of one
        torch.testing.assert_close(run(group=alone[rank], method=method, causal=True), triflash.attention(q, q, q, causal=True))


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


PACKED: list[tuple[str, dict[str, tuple[int, ...]], dict[str, Any]]] = [
    ("plain", {}, {}),
    ("causal, ALiBi, a sink", {"alibi_slopes": (4, 4), "sink": (4,)}, {"causal": True}),
    ("padded", {"bias": (1, 4, 11, 13), "mask": (4, 1, 11, 13)}, {"causal": True, "window": (4, None)}),
    ("rows", {"bias": (4, 24, 13), "sink": (4,)}, {"bias_layout": "rows", "softcap": 4.0}),
    ("keys", {"bias": (1, 30), "second": (4, 30)}, {"bias_layout": "keys", "causal": True}),
    ("dropout", {}, {"dropout_p": 0.3, "dropout_seed": 5, "causal": "top_left"}),
]  # fmt: skip


def check_packed(method: str, order: str, name: str, extra: dict[str, tuple[int, ...]], options: dict[str, Any]) -> None:
    """Documents of 11, 0, 5 and 8 queries and 13, 3, 6 and 8 keys, each cut by itself."""
    from triflash.distributed import context_parallel_attention_varlen, shard

    group = dist.group.WORLD
    cu_q, cu_k = torch.tensor([0, 11, 11, 16, 24]), torch.tensor([0, 13, 16, 22, 30])

    def cut(x: Tensor, cu: Tensor, dim: int = 0) -> Tensor:
        return torch.cat([shard(part, dim, group, order) for part in x.split(cu.diff().tolist(), dim)], dim)

    torch.manual_seed(2)
    shapes = {"q": (24, 4, 3), "k": (30, 2, 3), "v": (30, 2, 5), **extra}
    whole = {each: made(each, shape, 30, torch.float64) for each, shape in shapes.items()}
    dout, dlse = torch.randn(24, 4, 5, dtype=torch.float64), torch.randn(4, 24, dtype=torch.float64)
    cuts: dict[str, Any] = {"q": lambda x: cut(x, cu_q), "k": lambda x: cut(x, cu_k), "v": lambda x: cut(x, cu_k)}
    if name == "rows":
        cuts["bias"] = lambda x: cut(x, cu_q, 1)
    learned = [each for each, x in whole.items() if x.is_floating_point() and each != "alibi_slopes"]
    parts = {each: cuts.get(each, torch.clone)(x).detach().requires_grad_(each in learned) for each, x in whole.items()}
    if name == "padded":  # rows of a document that share one bias differ from document to document: expanded, and cut
        for each in ("bias", "mask"):
            expanded = whole[each].expand(4, -1, -1, -1)
            rows = [shard(x[:, : int(m)], 1, group, order) for x, m in zip(expanded, cu_q.diff(), strict=True)]
            most = max(2, *(x.shape[1] for x in rows))  # a dim of 1 would be shared
            parts[each] = torch.stack([torch.nn.functional.pad(x, (0, 0, 0, most - x.shape[1])) for x in rows]).detach()
        learned.remove("bias")
    for each in learned:
        whole[each].requires_grad_()
    result = call_of(
        context_parallel_attention_varlen,
        parts,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        group=group,
        method=method,
        order=order,
        return_lse=True,
        **options,
    )
    expected = call_of(triflash.attention_varlen, whole, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, **options)
    torch.autograd.backward(expected, [dout, dlse])
    torch.autograd.backward(result, [cut(dout, cu_q), cut(dlse, cu_q, 1)])
    where = f"{name}, {method}, {order}"
    for got, wanted in zip(result, (cut(expected[0], cu_q), cut(expected[1], cu_q, 1)), strict=True):
        torch.testing.assert_close(got.detach(), wanted.detach(), rtol=1e-10, atol=1e-10, msg=lambda text: f"{where}: {text}")
    for each in learned:
        wanted = cuts.get(each, torch.clone)(whole[each].grad)
        torch.testing.assert_close(
            parts[each].grad, wanted, rtol=1e-10, atol=1e-10, msg=lambda text, each=each: f"{where}, d{each}: {text}"
        )


def check_packed_errors(rank: int) -> None:
    from triflash.distributed import context_parallel_attention_varlen

    x, cu = torch.randn(4, 2, 4), torch.tensor([0, 8])
    for error, words, offsets, options in (
        (ValueError, rf"^q: wanted 3 dims and 5 rows on rank {rank} of 2, its zigzag shares of the documents, got \(4, 2, 4\)", torch.tensor([0, 10]), {}),
        (ValueError, "^cu_seqlens_q: wanted offsets that begin with 0 and do not decrease", torch.tensor([0, 9, 8]), {}),
        (TypeError, "^cu_seqlens_q: wanted an int32 or int64 tensor, got list", [0, 8], {}),
        (ValueError, "^bias_layout: wanted one of padded, rows, keys", cu, {"bias_layout": "row"}),
        (ValueError, "^bias: wanted 1 or at least 4 rows and 1 or at least 8 keys, document 0", cu, {"bias": torch.zeros(1, 2, 4, 7)}),
        (ValueError, "^method: wanted one of", cu, {"method": "all"}),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            context_parallel_attention_varlen(x, x, x, offsets, group=dist.group.WORLD, **options)


def begin(rank: int, world: int, store: str, timeout: datetime.timedelta | None = None) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)


def page(rank: int, store: str) -> None:
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(snippets) == 2
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)


def table(world: int) -> None:
    if world == 3:  # partial gradients are exchanged whole, and fresh memory is NaN
        torch._C._set_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
    for n, case in enumerate(CASES):
        for method in case.methods:
            if method == "ulysses" and case.shapes["q"][-2 if "layout" not in case.options else -3] % world:
                continue
            for order in case.orders:
                check(case, method, order, known=n % 2 == 0)


SINGLE_ROWS: list[tuple[str, list[int], tuple[int, ...], dict[str, Any]]] = [
    ("keys that all rows share", [0, 2], (1, 2), {"bias_layout": "keys"}),
    ("a row that all share, of a document with one row a rank", [0, 2, 8], (2, 1, 1, 6), {}),
    ("a row of its own, beside two on another rank", [0, 3], (1, 3, 3), {"bias_layout": "rows"}),
]


def check_single_rows(method: str) -> None:
    """One row on a rank, and a bias of one row: the rank's own, or one that all share, whose gradient is that of all."""
    from triflash.distributed import context_parallel_attention, context_parallel_attention_varlen, shard

    group = dist.group.WORLD
    for name, offsets, shape, options in SINGLE_ROWS:
        torch.manual_seed(3)
        cu = torch.tensor(offsets)
        q, bias = torch.randn(offsets[-1], 2, 4, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)

        def cut(x: Tensor, dim: int = 0, cu: Tensor = cu) -> Tensor:
            return torch.cat([shard(part, dim, group) for part in x.split(cu.diff().tolist(), dim)], dim)

        by_rows = options.get("bias_layout") == "rows"
        learned = [x.clone().requires_grad_() for x in (q, bias)]
        own = [x.clone().requires_grad_() for x in (cut(q), cut(bias, 1) if by_rows else bias)]
        out = triflash.attention_varlen(*[learned[0]] * 3, cu, bias=learned[1], **options)
        part = context_parallel_attention_varlen(*[own[0]] * 3, cu, bias=own[1], group=group, method=method, **options)
        torch.testing.assert_close(part, cut(out), rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}, {method}: {text}")
        weights = torch.randn(out.shape, dtype=torch.float64)
        wanted, got = torch.autograd.grad(out, learned[1], weights)[0], torch.autograd.grad(part, own[1], cut(weights))[0]
        wanted = cut(wanted, 1) if by_rows else wanted
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}, {method}: {text}")
    q, bias = torch.randn(1, 3, 2, 4, dtype=torch.float64), torch.randn(1, 1, 3, 3, dtype=torch.float64)
    parts = [shard(q, 1, group) for _ in range(3)]
    part = context_parallel_attention(*parts, bias=shard(bias, 2, group), group=group, method=method, length=3, key_length=3)
    torch.testing.assert_close(part, shard(triflash.attention(q, q, q, bias=bias), 1, group), rtol=1e-10, atol=1e-10)


def work(rank: int, world: int, store: str, what: str) -> None:
    """What each process does."""
    begin(rank, world, store)
    try:
        if what == "all":
            table(world)
            for method in METHODS:
                for dtype in (torch.float32, torch.bfloat16):
                    check_rounded(method, dtype, world)
        elif what == "errors":
            check_errors(rank, world)
            check_agreement(rank)
            check_programs()
            for method in METHODS:
                check_kernels(method)
        elif what == "packed":
            for n, (name, extra, options) in enumerate(PACKED):
                for method in METHODS:
                    check_packed(method, ("zigzag", "contiguous")[n % 2], name, extra, options)
            check_packed_errors(rank)
            for method in METHODS:
                check_single_rows(method)
        elif what == "shares":
            check_shares(rank, world)
        elif what == "compiled":
            for method in METHODS:
                check_compiled(method)
        else:
            for n, case in enumerate(case for case in CASES if case.name in FIRST):
                check(case, what, "zigzag", known=n == 0)
        dist.barrier()
        Path(f"{store}.seconds.{rank}").write_text(str(time.process_time()))
    finally:
        dist.destroy_process_group()


def example(rank: int, world: int, port: int, folder: str) -> None:
    """What torchrun starts, with what it says in a file."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "")
    torch.set_num_threads(1)
    sys.argv = ["long_context.py", "--steps", "50", "--length", "33"]
    with open(f"{folder}/said.{rank}", "w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    Path(f"{folder}/store.seconds.{rank}").write_text(str(time.process_time()))


def survive(rank: int, world: int, store: str, how: str, done: Any) -> None:
    """One call, in which the last rank dies or hangs in the second step of the ring. What came of it goes to a file."""
    from triflash.distributed import context_parallel_attention, ring

    begin(rank, world, store, datetime.timedelta(seconds=60 if how == "dies" else 5))
    forward, steps = ring.tiles.forward, [0]

    def stopping(*args: Any, **options: Any) -> Any:
        steps[0] += 1
        if rank == world - 1 and steps[0] == 2:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            done.wait()
            os._exit(0)
        return forward(*args, **options)

    ring.tiles.forward = stopping  # type: ignore[assignment]
    q = torch.randn(1, 4, 2, 4)
    try:
        result = context_parallel_attention(q, q, q, group=dist.group.WORLD, method="ring", order="contiguous")
        Path(f"{store}.{rank}").write_text(f"a tensor {tuple(result.shape)}")
    except RuntimeError as error:
        Path(f"{store}.{rank}").write_text(str(error))
    os._exit(0)  # a group that has failed cannot be taken apart


FIRST = ("causal, uneven, other lengths", "bias, a sink, a soft cap", "bias of keys", "ALiBi, causal")


def tell(folder: Path, record_property: Callable[[str, object], None]) -> None:
    """What processes cost that are the fork server's children, to tests/tiers.py."""
    record_property(tiers.ELSEWHERE, sum(float(each.read_text()) for each in folder.glob("store.seconds.*")))


def run(world: int, folder: Path, what: str, record_property: Callable[[str, object], None]) -> None:
    """All processes. The first that fails ends the others, and its words come here. They are forked from one that has imported PyTorch."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(work, (world, str(folder / "store"), what), nprocs=world, start_method="forkserver")
    tell(folder, record_property)


@pytest.mark.parametrize("method", METHODS)
def test_one_of_each(method: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    run(2, tmp_path, method, record_property)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_equal_to_attention(world: int, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    run(world, tmp_path, "all", record_property)


def test_errors_and_kernels(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    run(2, tmp_path, "errors", record_property)


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_that_does_not_go_on_ends_the_others(how: str, tmp_path: Path) -> None:
    """With words, and no tensor anywhere. The test waits for processes to end; the group's time-out is what ends those that wait for one."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    context, world = multiprocessing.get_context("forkserver"), 3
    done = context.Event()
    ranks = [context.Process(target=survive, args=(rank, world, str(tmp_path / "store"), how, done)) for rank in range(world)]
    for each in ranks:
        each.start()
    for each in ranks[:-1]:
        each.join()
    done.set()
    ranks[-1].join()
    assert ranks[-1].exitcode == (-signal.SIGKILL if how == "dies" else 0)
    for rank in range(world - 1):
        said = (tmp_path / f"store.{rank}").read_text()
        assert said.startswith(f"context_parallel_attention, rank {rank} of 3: ") and "ended or hangs" in said, said
    assert not (tmp_path / f"store.{world - 1}").exists()


def test_the_script_checks_and_measures(tmp_path: Path) -> None:
    """On the CPU, where its figures mean nothing."""
    words = ["--device", "cpu", "--ranks", "2", "--tokens", "24", "--heads", "4/2", "--dim", "8", "--repeats", "1", "--json"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(each for each in sys.path if each),
        "TRITON_INTERPRET": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    script = Path(__file__).parent.parent / "scripts" / "context_parallel.py"
    run = subprocess.run(
        [sys.executable, str(script), *words, str(tmp_path / "found.json")], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    methods = {row["method"] for row in found["rows"]}
    assert methods >= {*METHODS, "torch context_parallel", "allgather, bias"} and found["about"]["ranks"] == 2
    assert "results and gradients agree" in run.stdout and "| 4/2 | ring |" in run.stdout


def test_the_page_runs_as_written(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(page, ("",), nprocs=1, start_method="forkserver")


def test_the_example_learns(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(example, (2, port, str(tmp_path)), nprocs=2, start_method="forkserver")
    tell(tmp_path, record_property)
    losses = [float(line.split()[-1]) for line in (tmp_path / "said.0").read_text().splitlines()]
    assert len(losses) == 10 and losses[-1] < 0.75 * losses[0], losses
    assert (tmp_path / "said.1").read_text() == ""
    assert len(EXAMPLE.read_text().splitlines()) <= 80


def test_packed(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    run(2, tmp_path, "packed", record_property)


def test_compiled(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    run(2, tmp_path, "compiled", record_property)


def test_shares(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    run(3, tmp_path, "shares", record_property)
