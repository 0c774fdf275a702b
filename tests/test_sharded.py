"""DTensors: values and gradients of a sharded call are those of the whole one, on 2 and 4 processes, and lie where they should."""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import triflash

pytestmark = [
    pytest.mark.unpoisoned,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
]

OLD = torch.__version__.startswith("2.10.")  # gathers some gradients while it accumulates them

PLACEMENTS: dict[str, Placement] = {"R": Replicate(), "P": Partial(), **{f"S{n}": Shard(n) for n in range(5)}}


@dataclass(frozen=True)
class Case:
    """One call. placed: each tensor's placements, one word a mesh dim (R, P or S and the dim); out, lse, grads: what must come of it."""

    name: str
    mesh: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]]
    placed: dict[str, str]
    out: str
    grads: dict[str, str]
    lse: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    call: str = "attention"


def qkv(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...] | None = None, **more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"q": q, "k": k, "v": v or k, **more}


def same(word: str, names: str = "qkv") -> dict[str, str]:
    return dict.fromkeys(names, word)


TWO = [
    Case(
        "batch, biases and a sink that broadcast over it", (2,),
        qkv((4, 5, 2, 8), (4, 6, 2, 8), (4, 6, 2, 4), bias=(2, 5, 6), sink=(2,), key_lengths=(4,)),
        {**same("S0"), "bias": "R", "sink": "R", "key_lengths": "S0"}, "S0", {**same("S0"), "bias": "P", "sink": "P"}, lse="S0",
    ),
    Case(
        "batch, a bias of it, uneven", (2,), qkv((3, 5, 2, 8), (3, 6, 2, 8), bias=(3, 1, 1, 6), mask=(3, 2, 5, 6), key_lengths=(3,)),
        {**same("S0"), "bias": "S0", "mask": "S0", "key_lengths": "R"}, "S0", {**same("S0"), "bias": "S0"}, lse="S0",
    ),
    Case(
        "where queries stand", (2,),
        qkv((4, 5, 2, 8), (4, 6, 2, 8), sink=(2,), query_starts=(4,), query_lengths=(4,), key_starts=(4,), diagonal=(4,)),
        {**same("S0"), "sink": "R", "query_starts": "R", "query_lengths": "S0", "key_starts": "S0", "diagonal": "R"}, "S0",
        {**same("S0"), "sink": "P"}, lse="S0", options={"causal": True},
    ),
    Case(
        "batch of q alone", (2,), qkv((4, 5, 2, 8), (4, 6, 2, 8), bias=(4, 2, 5, 6)), {"q": "S0", "k": "R", "v": "P", "bias": "R"}, "S0",
        {"q": "S0", "k": "R", "v": "R", "bias": "P"},
    ),
    Case(
        "heads", (2,), qkv((2, 5, 4, 8), (2, 6, 4, 8), bias=(2, 1, 5, 6), sink=(4,), alibi_slopes=(4,), key_lengths=(2,)),
        {**same("S2"), "bias": "R", "sink": "S0", "alibi_slopes": "S0", "key_lengths": "R"}, "S2", {**same("S2"), "bias": "P", "sink": "S0"},
        lse="S1", options={"causal": True, "softcap": 20.0},
    ),
    Case(
        "heads, uneven", (2,), qkv((2, 5, 3, 8), (2, 6, 3, 8), bias=(3, 5, 6), sink=(3,), alibi_slopes=(2, 3)),
        {**same("S2"), "bias": "S0", "sink": "S0", "alibi_slopes": "R"}, "S2", {**same("S2"), "bias": "S0", "sink": "S0"}, lse="S1",
    ),
    Case(
        "grouped heads", (2,), qkv((2, 5, 4, 8), (2, 6, 2, 8), bias=(4, 5, 6), mask=(5, 6)), {**same("S2"), "bias": "S0", "mask": "R"}, "S2",
        {**same("S2"), "bias": "S0"}, options={"window": (3, 1)},
    ),
    Case(
        "one key head for all", (2,), qkv((2, 5, 3, 8), (2, 6, 1, 8), bias=(1, 1, 5, 6)), {"q": "S2", "k": "R", "v": "R", "bias": "R"}, "S2",
        {"q": "S2", "k": "P", "v": "P", "bias": "P"},
    ),
    Case("key heads that do not divide", (2,), qkv((2, 5, 6, 8), (2, 6, 3, 8)), same("S2"), "R", same("S2")),
    Case(
        "sequences", (2,), qkv((2, 4, 2, 8), (2, 6, 2, 8), bias=(2, 4, 6)), {**same("S1"), "bias": "S1"}, "R",
        {**same("S1"), "bias": "S1"}, lse="R", options={"causal": True},
    ),
    Case("nothing", (2,), qkv((2, 4, 2, 8), (2, 6, 2, 8), bias=(4, 6), sink=(2,)), {**same("R"), "bias": "R", "sink": "R"}, "R",
         {**same("R"), "bias": "R", "sink": "R"}, lse="R"),
    Case("a bias alone", (2,), qkv((2, 4, 2, 8), (2, 6, 2, 8), bias=(2, 4, 6)), {**same("R"), "bias": "S0"}, "S2", {**same("R"), "bias": "S0"}),
    Case(
        "the second of two batch dims, heads first", (2,), qkv((2, 4, 2, 5, 8), (2, 4, 2, 6, 8), bias=(2, 1, 2, 5, 6), mask=(2, 4, 1, 1, 6)),
        {**same("S1"), "bias": "R", "mask": "S1"}, "S1", {**same("S1"), "bias": "P"}, lse="S1", options={"layout": "bhsd"},
    ),
    Case("heads first", (2,), qkv((2, 4, 5, 8), (2, 2, 6, 8), sink=(4,)), {**same("S1"), "sink": "S0"}, "S1", {**same("S1"), "sink": "S0"},
         lse="S1", options={"layout": "bhsd"}),
    Case("k and v in one tensor", (2,), {"q": (2, 5, 4, 8), "kv": (2, 6, 2, 4, 8), "bias": (4, 1, 6)}, {"q": "S2", "kv": "S3", "bias": "S0"},
         "S2", {"q": "S2", "kv": "S3", "bias": "S0"}, call="flash_attn_kvpacked_func"),
    Case("all three in one tensor", (2,), {"qkv": (2, 5, 3, 4, 8), "bias": (5, 5)}, {"qkv": "S0", "bias": "R"}, "S0",
         {"qkv": "S0", "bias": "P"}, options={"causal": True}, call="flash_attn_qkvpacked_func"),
    Case("the seed's function", (2,), qkv((2, 5, 4, 8), (2, 6, 4, 8)), same("S2"), "S2", same("S2"), call="flash_attn_func"),
    Case("dropout of replicated tensors", (2,), qkv((2, 5, 4, 8), (2, 6, 4, 8)), same("S1"), "R", same("S1"),
         options={"dropout_p": 0.5, "dropout_seed": 7}),
    Case("batch, few batch entries", (2,), qkv((1, 5, 4, 8), (1, 6, 4, 8)), same("S0"), "R", same("S0")),
]  # fmt: skip
FOUR = [
    Case(
        "batch and heads", (2, 2), qkv((4, 5, 4, 8), (4, 6, 2, 8), bias=(4, 5, 6), sink=(4,), key_lengths=(4,)),
        {**same("S0 S2"), "bias": "R S0", "sink": "R R", "key_lengths": "S0 R"}, "S0 S2", {**same("S0 S2"), "bias": "P S0", "sink": "P P"},
        lse="S0 S1", options={"causal": True},
    ),
    Case("batch and heads, a bias of neither", (2, 2), qkv((4, 5, 4, 8), (4, 6, 2, 8), bias=(5, 6)), {**same("S0 S2"), "bias": "R R"},
         "S0 S2", {**same("S0 S2"), "bias": "P P"}),
    Case("heads and batch, one key head for all", (2, 2), qkv((3, 5, 4, 8), (3, 6, 1, 8)), {"q": "S2 S0", "k": "R S0", "v": "R R"},
         "S2 S0", {"q": "S2 S0", "k": "P S0", "v": "R R"}),
    Case("heads over both dims", (2, 2), qkv((2, 5, 8, 8), (2, 6, 4, 8), sink=(8,)), {**same("S2 S2"), "sink": "S0 S0"}, "S2 S2",
         {**same("S2 S2"), "sink": "S0 S0"}, lse="S1 S1"),
    Case("key heads that divide by one dim", (2, 2), qkv((2, 5, 12, 8), (2, 6, 6, 8), bias=(12, 1, 6)), {**same("S2 S2"), "bias": "S0 S0"},
         "S2 R", {**same("S2 S2"), "bias": "S0 S0"}),
    Case("batch over both dims, uneven", (2, 2), qkv((5, 5, 2, 8), (5, 6, 2, 8), bias=(5, 1, 5, 6)), {**same("S0 S0"), "bias": "S0 S0"},
         "S0 S0", {**same("S0 S0"), "bias": "S0 S0"}),
    Case("more processes than batch entries", (4,), qkv((3, 5, 2, 8), (3, 6, 2, 8), bias=(2, 5, 6), sink=(2,)),
         {**same("S0"), "bias": "R", "sink": "R"}, "S0", {**same("S0"), "bias": "P", "sink": "P"}, lse="S0"),
    Case("a bias and a sink cut in other orders", (2, 2), qkv((2, 5, 5, 8), (2, 6, 5, 8), bias=(5, 5, 6), sink=(5,)),
         {**same("S2 S2"), "bias": "S0 R", "sink": "R S0"}, "S2 S2", {**same("S2 S2"), "bias": "S0 P", "sink": "R S0"}),
    Case("a replicated bias and sink, cut twice", (2, 2), qkv((2, 5, 5, 8), (2, 6, 5, 8), bias=(5, 5, 6), sink=(5,)),
         {**same("S2 S2"), "bias": "R R", "sink": "R R"}, "S2 S2", {**same("S2 S2"), "bias": "P P", "sink": "P P"}),
    Case("batch and a sequence", (2, 2), qkv((2, 4, 2, 8), (2, 6, 2, 8), bias=(4, 6)), {**same("S0 S1"), "bias": "R S1"}, "S0 R",
         {**same("S0 S1"), "bias": "R S1"}),
]  # fmt: skip


def placements(words: str) -> tuple[Placement, ...]:
    return tuple(PLACEMENTS[word] for word in words.split())


def made(name: str, shape: tuple[int, ...]) -> Tensor:
    if name == "mask":
        return torch.rand(shape) > 0.3
    if name in ("key_lengths", "query_lengths", "query_starts", "key_starts", "diagonal"):
        return torch.randint(1, 7, shape) // (2 if name.endswith("starts") else 1)
    return torch.randn(shape, dtype=torch.float64)


def placed(x: Tensor, mesh: DeviceMesh, where: tuple[Placement, ...]) -> Tensor:
    """The tensor, every process knowing all of it, on the mesh; a partial sum of halves where one is wanted."""
    if any(p.is_partial() for p in where):
        parts = [mesh.size(n) for n, p in enumerate(where) if p.is_partial()]
        x = x / torch.tensor(parts).prod()
        return DTensor.from_local(x, mesh, where, run_check=False)
    return distribute_tensor(x, mesh, where)


def check(case: Case, meshes: dict[tuple[int, ...], DeviceMesh], run: Callable[..., Any]) -> None:
    torch.manual_seed(len(case.name))
    mesh = meshes[case.mesh]
    whole = {name: made(name, shape) for name, shape in case.shapes.items()}
    parts = {name: placed(x, mesh, placements(case.placed[name])) for name, x in whole.items()}
    learned = [name for name, x in whole.items() if x.is_floating_point() and name != "alibi_slopes"]
    for name in learned:
        whole[name].requires_grad_()
        parts[name] = parts[name].detach().requires_grad_()
    options = {**case.options, **({"return_lse": True} if case.lse else {})}
    results, expected = run(**parts, **options), run(**whole, **options)
    if not case.lse:
        results, expected = (results,), (expected,)
    cotangents = [torch.randn_like(x) for x in expected]
    for result, reference, where in zip(results, expected, (case.out, case.lse), strict=False):
        assert isinstance(result, DTensor) and result.placements == placements(where), (case.name, where, result.placements)
        assert result.shape == reference.shape and result.stride() == reference.stride(), case.name
    torch.autograd.backward(expected, cotangents)
    torch.autograd.backward(results, [distribute_tensor(x, mesh, r.placements) for x, r in zip(cotangents, results, strict=True)])
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result.full_tensor(), reference, rtol=1e-12, atol=1e-12, msg=lambda text: f"{case.name}: {text}")
    for name in learned:
        grad: Any = parts[name].grad
        wanted = case.grads.get(name, case.placed[name])
        gathered = OLD and all(p.is_replicate() for p in grad.placements)
        assert isinstance(grad, DTensor) and (gathered or grad.placements == placements(wanted)), (case.name, name, wanted, grad.placements)
        assert grad.shape == whole[name].shape
        torch.testing.assert_close(
            grad.full_tensor(), whole[name].grad, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{case.name}, {name}: {text}"
        )


def function_of(case: Case) -> Callable[..., Any]:
    return triflash.attention if case.call == "attention" else getattr(triflash, case.call)  # type: ignore[no-any-return]


def work(rank: int, world: int, store: str) -> None:
    """What each process does."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        meshes = {
            shape: DeviceMesh("cpu", torch.arange(math.prod(shape)).view(shape))
            for shape in ((2,), (4,), (2, 2))
            if math.prod(shape) <= world
        }
        for case in FOUR if world == 4 else TWO:
            check(case, meshes, function_of(case))
        if world == 2:
            check_errors(meshes[2,])
            check_kernels(meshes[2,])
            check_around(meshes[2,])
            check_compiled(meshes[2,])
        else:
            check_outside(meshes[2,])
        dist.barrier()
    finally:
        dist.destroy_process_group()


def check_errors(mesh: DeviceMesh) -> None:
    q = distribute_tensor(torch.randn(2, 5, 4, 8), mesh, [Shard(0)])
    other = distribute_tensor(torch.randn(2, 5, 4, 8), mesh, [Replicate()])
    with pytest.raises(triflash.UnsupportedError, match=r"dropout of sharded DTensors \(q \(Shard\(dim=0\),\).*Replicate\(\)"):
        triflash.attention(q, q, q, dropout_p=0.5, dropout_seed=1)
    with pytest.raises(triflash.UnsupportedError, match="dropout of sharded DTensors"):  # which a seed would not help
        triflash.attention(q, q, q, dropout_p=0.5)
    with pytest.raises(triflash.UnsupportedError, match="without dropout_seed"):
        triflash.attention(other, other, other, dropout_p=0.5)
    with pytest.raises(TypeError, match="^bias: wanted a DTensor, as others are, got a plain tensor; .*distribute_tensor"):
        triflash.attention(q, q, q, bias=torch.randn(4, 5, 5))
    with pytest.raises(TypeError, match="^q: wanted a DTensor, as others are, got a plain tensor"):
        triflash.attention(
            q.full_tensor(), q.full_tensor(), q.full_tensor(), bias=distribute_tensor(torch.randn(5, 5), mesh, [Replicate()])
        )
    elsewhere = distribute_tensor(torch.randn(5, 5), DeviceMesh("cpu", torch.arange(2).view(1, 2)), [Replicate(), Replicate()])
    with pytest.raises(ValueError, match="^bias: wanted a DTensor on the mesh of the others"):
        triflash.attention(q, q, q, bias=elsewhere)
    for transformed in (
        torch.func.grad(lambda x: triflash.attention(x, q, q).sum()),
        torch.func.vmap(lambda x: triflash.attention(*[x[None]] * 3), randomness="error"),
    ):
        with pytest.raises(triflash.UnsupportedError, match="torch.func transforms of DTensors"):
            transformed(other)
    with pytest.raises(ValueError, match=r"^k: wanted shape .*got \(2, 5, 4, 4\)"):
        triflash.attention(q, q[..., :4], q)


def check_outside(mesh: DeviceMesh) -> None:
    q = DTensor.from_local(
        torch.randn(2, 5, 4, 8), mesh, [Shard(0)], run_check=False, shape=torch.Size((4, 5, 4, 8)), stride=(160, 32, 8, 1)
    )
    if mesh.get_coordinate() is None:
        with pytest.raises(triflash.UnsupportedError, match="in a process outside their mesh"):
            triflash.attention(q, q, q)
    else:
        assert triflash.attention(q, q, q).to_local().shape == (2, 5, 4, 8)


def check_kernels(mesh: DeviceMesh) -> None:
    """A part is a plain call: on whatever backend was asked for, and with operators where modes look on."""
    q = distribute_tensor(torch.randn(2, 3, 2, 4), mesh, [Shard(0)]).requires_grad_()
    with triflash.record_launches() as ran:
        triflash.attention(q, q, q, backend="oracle").sum().backward()
    assert ran == ["oracle: forward", "oracle: backward"], ran


def check_around(mesh: DeviceMesh) -> None:
    """Parameters, autocast, what is still on its way, and selective checkpointing."""
    whole = torch.randn(2, 3, 2, 4)
    moving = distribute_tensor(whole, mesh, [Shard(1)]).requires_grad_().redistribute(placements=[Replicate()], async_op=True)
    with torch.no_grad():
        out = triflash.attention(moving, moving, moving)
    torch.testing.assert_close(out.full_tensor(), triflash.attention(whole, whole, whole))
    moving = distribute_tensor(whole, mesh, [Shard(1)]).requires_grad_().redistribute(placements=[Replicate()], async_op=True)
    out = triflash.attention(moving, moving, moving)
    torch.testing.assert_close(out.full_tensor().detach(), triflash.attention(whole, whole, whole))
    out.sum().backward()
    q = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(2)]))
    with torch.autocast("cpu", torch.bfloat16):
        out = triflash.attention(q, q, q)
        expected = triflash.attention(whole, whole, whole)
    assert isinstance(out, DTensor) and out.dtype == torch.bfloat16 and torch.equal(out.full_tensor(), expected)
    keep = functools.partial(create_selective_checkpoint_contexts, [torch.ops.triflash.forward.default])
    with triflash.record_launches() as ran:
        checkpoint(triflash.attention, q, q, q, use_reentrant=False, context_fn=keep).square().sum().backward()
    assert ran == ["tiled: forward", "tiled: backward"], ran
    assert isinstance(q.grad, DTensor) and q.grad.placements == (Shard(2),)
    whole.requires_grad_()
    triflash.attention(whole, whole, whole).square().sum().backward()
    torch.testing.assert_close(q.grad.full_tensor(), whole.grad)
    (grad,) = torch.autograd.grad(triflash.attention(q, q, q).square().sum(), q, create_graph=True)
    if not OLD:  # whose to_local ends the graph
        with pytest.raises(triflash.UnsupportedError, match="second derivative"):
            grad.sum().backward()


def check_compiled(mesh: DeviceMesh) -> None:
    q, bias = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 3)
    grads = []
    for run in (triflash.attention, torch.compile(triflash.attention, backend="aot_eager", fullgraph=True)):
        x, b = distribute_tensor(q, mesh, [Shard(0)]).requires_grad_(), distribute_tensor(bias, mesh, [Replicate()]).requires_grad_()
        out = run(x, x, x, bias=b, causal=True)
        assert isinstance(out, DTensor) and out.placements == (Shard(0),)
        out.sum().backward()
        assert b.grad.placements == (Partial(),)
        grads.append((x.grad.full_tensor(), b.grad.full_tensor()))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("world", [2, 4])
def test_sharded(world: int, tmp_path: Path) -> None:
    """All cases in one set of processes. The first that fails ends the others, and its words come here."""
    torch.multiprocessing.spawn(work, (world, str(tmp_path / "store")), nprocs=world)
