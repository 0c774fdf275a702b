"""Context parallelism of packed documents, each cut by itself: values and gradients of ``attention_varlen``, single rows, errors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import triflash
from ranks import METHODS, call_of, made, needs_gloo, run

pytestmark = needs_gloo

ORDERS = ("zigzag", "contiguous")
PACKED: list[tuple[str, dict[str, tuple[int, ...]], dict[str, Any]]] = [
    ("plain", {}, {}),
    ("causal, ALiBi, a sink", {"alibi_slopes": (4, 4), "sink": (4,)}, {"causal": True}),
    ("padded", {"bias": (1, 4, 11, 13), "mask": (4, 1, 11, 13)}, {"causal": True, "window": (4, None)}),
    ("rows", {"bias": (4, 24, 13), "sink": (4,)}, {"bias_layout": "rows", "softcap": 4.0}),
    ("keys", {"bias": (1, 30), "second": (4, 30)}, {"bias_layout": "keys", "causal": True}),
    ("dropout", {}, {"dropout_p": 0.3, "dropout_seed": 5, "causal": "top_left"}),
    ("keys that a window ends with", {"bias": (4, 24, 16), "second": (1, 24, 13), "mask": (4, 30)}, {"bias_layout": "rows", "mask_layout": "keys", "window": (3, 0)}),
    ("one row of a bias", {"bias": (4, 1, 1, 13), "mask": (1, 4, 1, 13), "alibi_slopes": (4,)}, {"causal": True}),
    ("a window both ways", {"sink": (4,)}, {"window": (4, 2)}),
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
    if options.get("bias_layout") == "rows":
        cuts["bias"] = cuts["second"] = lambda x: cut(x, cu_q, 1)
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
        (ValueError, r"^alibi_slopes: wanted one for each head, shape \(2,\) or \(2, 2\), got \(3,\)", torch.tensor([0, 4, 8]), {"alibi_slopes": torch.ones(3)}),
        (ValueError, r"^v: wanted shape \(Tk=8, Hk=2, Dv\)|^k: ", cu, {"v": x[:, :1]}),
        (TypeError, "^causal: wanted True, False or 'top_left'", cu, {"causal": "left"}),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            context_parallel_attention_varlen(x, x, **{"v": x, "cu_seqlens_q": offsets, "group": dist.group.WORLD, **options})
    leaf = x.clone().requires_grad_()
    for method in METHODS:
        out = context_parallel_attention_varlen(leaf, leaf, leaf, cu, group=dist.group.WORLD, method=method)
        (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        with pytest.raises(triflash.UnsupportedError, match="second derivative"):
            grad.sum().backward()


def check_at_once() -> None:
    """Of four documents: how many launches each method takes, forward. Two where a rank's two pieces see unlike parts of a
    document; the last rank's are one piece."""
    from triflash.distributed import context_parallel_attention_varlen, shard

    group, cu = dist.group.WORLD, torch.tensor([0, 9, 13, 21, 30])
    shares = [torch.cat([shard(x, 0, group, order) for x in torch.ones(30, 2, 4).split(cu.diff().tolist())]) for order in ORDERS]
    for method, order, options, launches in (
        ("allgather", "zigzag", {}, 1), ("allgather", "zigzag", {"causal": True}, 2 - dist.get_rank()), ("allgather", "contiguous", {"causal": True}, 1),
        ("allgather", "zigzag", {"window": (3, 3)}, None), ("allgather", "zigzag", {"dropout_p": 0.5}, None),
        ("ulysses", "zigzag", {"window": (3, 3)}, 1), ("ulysses", "contiguous", {"causal": "top_left"}, 1), ("ring", "zigzag", {}, None),
    ):  # fmt: skip
        x = shares[ORDERS.index(order)]
        with triflash.record_launches() as ran:
            context_parallel_attention_varlen(x, x, x, cu, group=group, method=method, order=order, backend="tiled", **options)
        assert ran == ["tiled: forward"] * launches if launches else len(ran) >= 4, (method, order, options, ran)
    few = torch.tensor([0, 5, 9, 17, 22])  # keys; in contiguous shares only some ranks have rows beyond them
    y = torch.cat([shard(x, 0, group, "contiguous") for x in torch.randn(30, 2, 4).split(cu.diff().tolist())])
    keys = torch.cat([shard(x, 0, group, "contiguous") for x in torch.ones(22, 2, 4).split(few.diff().tolist())])
    for method in METHODS:
        out = context_parallel_attention_varlen(y, keys, keys, cu, few, group=group, method=method, order="contiguous", causal="top_left")
        torch.testing.assert_close(out, torch.ones_like(out))
    nothing = torch.zeros(0, 2, 4, requires_grad=True)
    for method in METHODS:
        for options in ({}, {"dropout_p": 0.5}, {"alibi_slopes": torch.ones(0, 2)}):
            out = context_parallel_attention_varlen(*[nothing] * 3, torch.tensor([0]), group=group, method=method, **options)
            assert out.shape == (0, 2, 4) and torch.autograd.grad(out.sum(), nothing)[0].shape == nothing.shape


def check_packed_agreement(rank: int) -> None:
    """TRIFLASH_CHECK=1, packed: what differs is named on every rank."""
    from triflash.distributed import context_parallel_attention_varlen

    x = torch.randn(8, 2, 4)
    os.environ["TRIFLASH_CHECK"] = "1"
    other = dist.new_group([0, 1])
    for name, words, cu, options in (
        ("cu_seqlens_q", r"offsets \[0, 16\] as on rank 0, got offsets \[0, 8, 16\] on rank 1", [[0, 16], [0, 8, 16]][rank], {}),
        ("cu_seqlens_q", r"offsets \[0, 16\] as on rank 0, got offsets \[0, 17\] on rank 1", [0, 16 + rank], {}),  # of which x is no share
        ("cu_seqlens_k", r"None as on rank 0, got offsets \[1, 16\] on rank 1", [0, 16], {"cu_seqlens_k": torch.tensor([1, 16]) if rank else None}),
        ("method", "allgather as on rank 0, got none on rank 1", [0, 16], {"method": ("allgather", "none")[rank]}),
        ("causal", "False as on rank 0, got True on rank 1", [0, 16], {"causal": rank == 1}),
        ("bias", r"a float32 tensor of shape \(2, rows, 16\) as on rank 0, got .*\(1, rows, 16\) on rank 1", [0, 16], {"bias": torch.zeros(2 - rank, 8, 16), "bias_layout": "rows"}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: wanted the same on every rank, {words}"):
            context_parallel_attention_varlen(x, x, x, torch.tensor(cu), group=other, **options)
    with pytest.raises(ValueError, match=r"^q: wanted 3 dims and 8 rows on rank 1 of 2, .* got \(7, 2, 4\)"):
        context_parallel_attention_varlen(x[: 8 - rank], x, x, torch.tensor([0, 16]), group=other)
    with pytest.raises(
        ValueError, match=r"^cu_seqlens_q: wanted the same on every rank, offsets .* got a int64 tensor of shape \(2,\) on rank 1"
    ):
        context_parallel_attention_varlen(x, x, x, torch.tensor([0, 16], device=("cpu", "meta")[rank]), group=other)
    assert context_parallel_attention_varlen(x, x, x, torch.tensor([0, 16]), group=other).shape == x.shape
    del os.environ["TRIFLASH_CHECK"]


def pairs_of(starts: list[int], world: int, order: str) -> list[int]:
    """The visible pairs of causal documents that each rank has."""
    from triflash.distributed.packed import Documents

    documents = Documents.of(starts, world, order)
    found = []
    for rank in range(world):
        begin, length, _ = documents.pieces(rank)
        first = begin - documents.starts[:-1, None] + 1  # the keys that a piece's first row sees
        found.append(int((length * first + length * (length - 1) // 2).sum()))
    return found


def test_a_zigzag_deals_out_as_many_visible_pairs() -> None:
    """To each rank exactly as many where chunks are of one length, else to within a row of a chunk and document; and no row twice."""
    from triflash.distributed.packed import Documents

    starts = [0, 48, 48, 144, 168]
    assert len(set(pairs_of(starts, 3, "zigzag"))) == 1
    assert max(pairs_of(starts, 3, "contiguous")) > 4 * min(pairs_of(starts, 3, "contiguous"))
    uneven = [0, 101, 333, 335, 1000]
    for world in (2, 3, 8):
        found = pairs_of(uneven, world, "zigzag")
        assert sum(found) == sum(n * (n + 1) // 2 for n in (101, 232, 2, 665))
        assert max(found) - min(found) <= sum(n for n in (101, 232, 2, 665))
        for order in ORDERS:
            documents = Documents.of(uneven, world, order)
            slots = documents.slots(documents.rows, torch.device("cpu"))
            assert sorted(slots.tolist()) == list(range(1000))


SINGLE_ROWS: list[tuple[str, list[int], tuple[int, ...], dict[str, Any]]] = [
    ("keys that all rows share", [0, 2], (1, 2), {"bias_layout": "keys"}),
    ("a row that all share, of a document with one row a rank", [0, 2, 8], (2, 1, 1, 6), {}),
    ("a row of its own, beside two on another rank", [0, 3], (1, 3, 3), {"bias_layout": "rows"}),
    ("a row of its own, beside a document without any there", [0, 1, 3], (1, 3, 2), {"bias_layout": "rows"}),
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


def check_documents(rank: int, world: int) -> None:
    for n, (name, extra, options) in enumerate(PACKED):
        for method in METHODS:
            check_packed(method, ("zigzag", "contiguous")[n % 2], name, extra, options)
    check_packed_errors(rank)
    check_packed_agreement(rank)
    check_at_once()
    for method in METHODS:
        check_single_rows(method)


def test_packed(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    run(2, tmp_path, record_property, check_documents)
