"""Where queries stand: ``diagonal``, ``query_starts``, ``query_lengths`` and ``key_starts`` of ``attention``, on every backend."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from cases import Case
from here import BACKENDS
from running import run_case, run_hidden
from test_guards import Guarded, backends, on_backends
from triflash import UnsupportedError, attention, ops

ROOM: dict[str, Any] = {"B": 3, "M": 45, "N": 70, "D": 16}
STARTS, ENDS, KEYS, LENGTHS = (3, 0, 34), (45, 31, 40), (0, 35, 66), (70, 64, 69)  # the last entry: few of both, of one tile each
ALL: dict[str, Any] = {"starts": STARTS, "ends": ENDS, "key_starts": KEYS, "lengths": LENGTHS}
MOVED: dict[str, Any] = {"diagonal": (25, -9, 40), "hi": 0}
FAR = {"diagonal": (2**40, -(2**40), 0), "integers": torch.int64}

CASES = [
    Case("starts of queries", **ROOM, starts=STARTS),
    Case("lengths of queries", **ROOM, ends=ENDS, dlse=True),
    Case("starts of keys, causal", **ROOM, key_starts=KEYS, causal=True),
    Case("everything", **ROOM, **ALL, dlse=True, sink=True),
    Case("everything, a window", **ROOM, **ALL, lo=-4, hi=30, bias="bhqk"),
    Case("no rows, no keys", **ROOM, starts=(0, 45, 20), ends=(45, 45, 20), key_starts=(70, 0, 12), lengths=(70, 70, 12), sink=True, bias="1hqk"),
    Case("out of range", **ROOM, starts=(-3, 50, 2), ends=(99, 60, -1), key_starts=(-9, 71, 3), lengths=(90, 70, 70), bias="qk", integers=torch.int64),
    Case("int8", **ROOM, **ALL, **MOVED, integers=torch.int8),
    Case("moved", **ROOM, **MOVED, bias="hqk"),
    Case("moved, two sides", **ROOM, diagonal=(25, -9, 40), lo=-20, hi=7, bias="b1qk", dlse=True),
    Case("moved beyond", **ROOM, **FAR, lo=-20),
    Case("moved beyond, causal", **ROOM, **FAR, hi=0, bias="1hqk"),
    Case("everything moved", **ROOM, **ALL, **MOVED, alibi="bh", sink=True, dropout=0.3, softcap=4.0, bias="1hqk", mask="b11k", Hk=1, dlse=True),
    Case("bias of keys", **ROOM, **ALL, **MOVED, bias="bh1k"),
    Case("shared bias of keys", **ROOM, **ALL, lo=-20, bias="11k"),
    Case("bias of keys, grouped", **ROOM, **ALL, **MOVED, H=4, Hk=2, bias="1h1k"),
    Case("bias of queries", **ROOM, **ALL, **MOVED, bias="1hq1"),
    Case("bias of heads", **ROOM, **ALL, **MOVED, bias="h11"),
    Case("bias of two batch levels", **{**ROOM, "B": 6}, **ALL, **MOVED, batch_inner=3, bias="1ihqk"),
    Case("mask", **ROOM, **ALL, **MOVED, mask="bhqk"),
    Case("mask beside a full bias", **ROOM, **ALL, mask="b1qk", bias="bhqk"),
    Case("ALiBi from somewhere", **ROOM, alibi="h", shift=7, hi=20, key_starts=KEYS, bias="hqk"),
    Case("ALiBi alone, moved", **ROOM, alibi="bh", diagonal=(5, 60, -80), bias="1hqk"),
    Case("fp32, huge products", **ROOM, **ALL, **MOVED, dtype=torch.float32, magnitude=100.0),
    Case("uneven head dims", **{**ROOM, "D": 24}, **ALL, Dv=12, layout="mixed"),
    Case("long", B=2, M=130, N=200, starts=(40, 99), ends=(128, 130), key_starts=(150, 10), lengths=(190, 200), bias="bhqk", diagonal=(100, 70), hi=0),
]  # fmt: skip
JUNK = [case for case in CASES if case.starts or case.ends or case.key_starts]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results(case: Case, backend: str, device: torch.device) -> None:
    run_case(case, backend, device)


@pytest.mark.parametrize("backend", ["oracle", *BACKENDS])
@pytest.mark.parametrize("case", JUNK, ids=str)
def test_what_is_hidden_may_hold_anything(case: Case, backend: str, device: torch.device) -> None:
    """NaN in it changes no bit, and its gradient is 0; so of the gradients that come back to it."""
    run_hidden(case, backend, device)


SUBSETS = ["".join(each) for count in range(6) for each in itertools.combinations("qkvbs", count)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", ["bhqk", "1hqk", "h1k"])
def test_every_subset_of_gradients(bias: str, backend: str, device: torch.device) -> None:
    for grads in SUBSETS if bias == "1hqk" else SUBSETS[6::5]:
        run_case(Case(grads, B=2, M=20, N=34, **ALL, **MOVED, bias=bias, sink=True, grads=grads), backend, device)


def drawn(*batch: int, M: int = 12, N: int = 20, H: int = 4, Hk: int = 2, D: int = 16, device: Any = None) -> list[Tensor]:
    shapes = ((*batch, M, H, D), (*batch, N, Hk, D), (*batch, N, Hk, D), (*batch, H, M, N), (H,))
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


def near(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["oracle", *BACKENDS])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"window": (4, 2)}, {"alibi_slopes": (0.5, 0.1, 0.2, 0.3)}, {}],
    ids=["causal", "window", "alibi", "plain"],
)
def test_it_is_the_call_on_what_is_there(options: dict[str, Any], moved: bool, backend: str, device: torch.device) -> None:
    """Each batch entry's rows and keys, cut out, with the diagonal counted from there."""
    M, N, B = 12, 20, 3
    starts, ends, first, last, diagonal = [2, 0, 5], [12, 7, 6], [0, 4, 13], [20, 15, 20], [3, 11, 8] if moved else [N - M] * 3
    leaves = drawn(B, device=device)
    q, k, v, bias, sink = leaves
    options = {name: torch.tensor(x, device=device) if name == "alibi_slopes" else x for name, x in options.items()}
    places = {"query_starts": starts, "query_lengths": ends, "key_starts": first, "key_lengths": last} | (
        {"diagonal": diagonal} if moved else {}
    )
    tensors = {name: torch.tensor(x, device=device) for name, x in places.items()}
    with backends(backend):
        out, lse = attention(q, k, v, bias=bias, sink=sink, return_lse=True, backend=backend, **options, **tensors)
        wanted, wanted_lse = torch.zeros_like(out), torch.full_like(lse, -math.inf)
        for b in range(B):
            rows, cols = slice(starts[b], ends[b]), slice(first[b], last[b])
            own = {"diagonal": diagonal[b] + starts[b] - first[b], "bias": bias[b : b + 1, :, rows, cols]}
            part, part_lse = attention(
                q[b : b + 1, rows], k[b : b + 1, cols], v[b : b + 1, cols], sink=sink, return_lse=True, backend=backend, **own, **options
            )
            wanted = wanted.index_put((torch.tensor(b), torch.arange(rows.start, rows.stop)), part[0])
            before, after = wanted_lse[b : b + 1, :, : rows.start], wanted_lse[b : b + 1, :, rows.stop :]
            wanted_lse = torch.cat([wanted_lse[:b], torch.cat([before, part_lse, after], 2), wanted_lse[b + 1 :]])
        dout = torch.randn_like(out)
        grads = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        right = torch.autograd.grad(wanted, leaves, dout, retain_graph=True)
    near(out, wanted)
    near(lse, wanted_lse)
    for got, wanted_grad in zip(grads, right, strict=True):
        near(got, wanted_grad)


@pytest.mark.parametrize("backend", ["oracle", *BACKENDS])
def test_a_number_is_the_same_as_a_tensor(backend: str, device: torch.device) -> None:
    leaves = drawn(2, device=device)
    slopes = torch.rand(4, device=device)
    for diagonal in (-30, -5, 0, 8, 50):
        results = []
        for given in (diagonal, torch.full((2,), diagonal, device=device)):
            out, lse = attention(
                *leaves[:3], bias=leaves[3], window=(6, 1), alibi_slopes=slopes, diagonal=given, return_lse=True, backend=backend
            )  # type: ignore[call-overload]
            results.append((out, lse, *torch.autograd.grad(out.square().sum(), leaves[:4])))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
    q, k, v, *_ = leaves
    assert torch.equal(attention(q, k, v, causal=True, backend=backend), attention(q, k, v, causal=True, diagonal=8, backend=backend))
    assert torch.equal(attention(q, k, v, causal="top_left", backend=backend), attention(q, k, v, causal=True, diagonal=0, backend=backend))
    assert torch.equal(
        attention(q, k, v, backend=backend), attention(q, k, v, diagonal=torch.tensor([3, -4], device=device), backend=backend)
    )


@pytest.mark.parametrize("backend", ["oracle", *BACKENDS])
def test_two_biases(backend: str, device: torch.device) -> None:
    q, k, v, bias, sink = leaves = drawn(2, device=device)
    row = torch.randn(2, 1, 1, 20, device=device, requires_grad=True)
    places = {"query_starts": [3, 0], "query_lengths": [12, 6], "key_starts": [7, 2], "diagonal": [4, 9]}
    tensors = {name: torch.tensor(x, device=device) for name, x in places.items()}
    with backends(backend):
        both = attention(q, k, v, bias=(bias, row), sink=sink, causal=True, backend=backend, **tensors)
        one = attention(q, k, v, bias=bias + row, sink=sink, causal=True, backend=backend, **tensors)
        dout = torch.randn_like(both)
        for got, wanted in zip(*(torch.autograd.grad(out, [*leaves, row], dout) for out in (both, one)), strict=True):
            near(got, wanted)
    near(both, one)


@pytest.mark.parametrize("backend", ["tiled", *BACKENDS[1:]])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_more_batch_dims_and_layouts(layout: str, backend: str, device: torch.device) -> None:
    q, k, v, bias, _ = leaves = drawn(2, 3, device=device)
    names = ("query_starts", "query_lengths", "key_starts", "diagonal")
    tensors = {name: torch.randint(2, 10, (3, 2), device=device).T for name in names}  # of any strides
    given = [x if layout == "bshd" else x.transpose(-3, -2) for x in (q, k, v)]
    out = attention(*given, bias=bias, causal=True, layout=layout, backend=backend, **tensors)  # type: ignore[call-overload]
    out = out if layout == "bshd" else out.transpose(-3, -2)
    flat = attention(
        *(
            x.flatten(0, 1)
            for x in (
                q,
                k,
                v,
            )
        ),
        bias=bias.flatten(0, 1),
        causal=True,
        backend="oracle",
        **{name: x.flatten() for name, x in tensors.items()},
    )  # type: ignore[call-overload]
    near(out.flatten(0, 1), flat)
    dout = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad(out, leaves[:4], dout), torch.autograd.grad(flat, leaves[:4], dout.flatten(0, 1)), strict=True
    ):
        near(got, wanted)


@pytest.mark.parametrize("width, backend", [each for each in on_backends([16, 20]) if each.values[1] != "hopper"])
def test_guards(width: int, backend: str, device: torch.device) -> None:
    """Gradients go into the elements given, those of hidden slots too, and nowhere else."""
    q, k, v = (torch.randn(2, length, 2, width, device=device) for length in (40, 70, 70))
    bias = torch.randn(2, 1, 2, 40, 70, device=device)
    places = [torch.tensor(x, device=device) for x in ([3, 40], [38, 2], [33, -4], [5, 60])]
    options = (1, None, 0, 0.3, "", backend)
    with backends(backend):
        out, lse, rest = ops.attention_forward(q, k, v, bias, *options, *(None,) * 5, 0.0, 0.0, False, None, *places)
        saved = (torch.randn_like(out), None, q, k, v, bias, out, lse, rest)
        more = (*(None,) * 5, 0.0, 0.0, False)
        wanted = ops.attention_backward(*saved, *options, [True] * 4, *more, *places)[:4]
        given = [Guarded(x.shape, x.dtype, device) for x in (q, k, v, bias)]
        ops.attention_backward_(*saved, *options, *(each.tensor for each in given), *more, None, *places)
    for name, each, right in zip(("dq", "dk", "dv", "dbias"), given, wanted, strict=True):
        each.check(right, name)


def test_hidden_blocks_are_not_visited(device: torch.device) -> None:
    """By the arithmetic that kernels bound their loops with, run as Python: all that is visible is in them, and no block before a start."""
    from triflash.kernels.triton.prims import segments

    plain = getattr(segments, "fn", segments)
    for start, first, last, length, lo, hi in itertools.product(
        (0, 1, 16, 40, 70), (0, 5, 33), (33, 44), (0, 37, 64), (None, -5, 4), (None, 0, 20)
    ):
        begin, a, b, end = plain(first, last, length, lo, hi, 16, start)
        rows = range(first, last + 1)
        for block in range(length // 16 + 2):
            cols = list(range(block * 16, block * 16 + 16))
            seen = [[start <= c < length and (lo is None or c - r >= lo) and (hi is None or c - r <= hi) for c in cols] for r in rows]
            if any(map(any, seen)):
                assert begin <= block < end
            if a <= block < b:
                assert all(map(all, seen))
            if start // 16 > block or block * 16 >= max(length, 1):
                assert not begin <= block < end


WRONG = [
    ({"query_starts": [1, 2]}, TypeError, "query_starts: wanted a tensor of integers, got list"),
    ({"query_lengths": torch.ones(2)}, TypeError, "query_lengths: wanted a tensor of integers, got torch.float32"),
    ({"key_starts": torch.ones(3, dtype=torch.int32)}, ValueError, r"key_starts: wanted one for each batch entry, shape \(2,\) on"),
    ({"key_starts": torch.ones(2, 1, dtype=torch.int32)}, ValueError, r"key_starts: wanted one for each batch entry, shape \(2,\) on"),
    ({"diagonal": torch.ones(3, dtype=torch.int32)}, ValueError, r"diagonal: wanted one for each batch entry, shape \(2,\) on"),
    ({"diagonal": torch.ones(2, dtype=torch.bool)}, TypeError, "diagonal: wanted a tensor of integers, got torch.bool"),
    ({"diagonal": True}, TypeError, "diagonal: wanted an int, a tensor of integers, or None, got bool"),
    ({"diagonal": 1.0}, TypeError, "diagonal: wanted an int, a tensor of integers, or None, got float"),
    ({"diagonal": 2**40}, ValueError, "diagonal: wanted an int from -536870912 to 536870912"),
    ({"diagonal": 0, "causal": "top_left"}, ValueError, "diagonal: wanted None beside causal='top_left', which is diagonal 0"),
    ({"diagonals": 3}, TypeError, r"diagonals: wanted an argument of attention .* did you mean diagonal=\?"),
    ({"left_padding": 3}, TypeError, "left_padding: wanted an argument of attention .* key_starts="),
    ({"cache_position": 3}, TypeError, "cache_position: wanted an argument of attention .* diagonal="),
    ({"q_lengths": 3}, TypeError, r"q_lengths: wanted an argument of attention .* query_lengths"),
]  # fmt: skip


@pytest.mark.parametrize("options, error, text", WRONG, ids=[f"{n}-{next(iter(each[0]))}" for n, each in enumerate(WRONG)])
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], text: str) -> None:
    q, k, v, *_ = drawn(2)
    with pytest.raises(error, match=text):
        attention(q, k, v, **options)
    if "diagonals" not in options:
        with pytest.raises(error, match=text):
            triflash.explain(q, k, v, **options)


OUT_OF_RANGE = [
    ("query_starts", [0, 13], "query_starts: wanted values from 0 to 12, got 13 of batch entry 1"),
    ("query_lengths", [-1, 3], "query_lengths: wanted values from 0 to 12, got -1 of batch entry 0"),
    ("key_starts", [0, 21], "key_starts: wanted values from 0 to 20, got 21 of batch entry 1"),
    ("key_lengths", [0, 21], "key_lengths: wanted values from 0 to 20, got 21 of batch entry 1"),
    ("diagonal", [0, 2**30], "diagonal: wanted values from -536870912 to 536870912"),
]


@pytest.mark.parametrize("name, values, text", OUT_OF_RANGE)
def test_values_are_checked_on_request(name: str, values: list[int], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, *_ = drawn(2)
    given: dict[str, Any] = {name: torch.tensor(values)}
    attention(q, k, v, causal=True, **given)
    monkeypatch.setenv("TRIFLASH_CHECK", "1")
    attention(q, k, v, causal=True, **{name: torch.tensor([1, 2])})
    with pytest.raises(ValueError, match=text):
        attention(q, k, v, causal=True, **given)
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    with pytest.raises(ValueError, match=text):
        attention(*turned, causal=True, layout="bhsd", **given)


def test_hopper_says_what_it_cannot() -> None:
    q = torch.empty(2, 512, 4, 64, dtype=torch.bfloat16, device="meta")
    integers = torch.empty(2, dtype=torch.int32, device="meta")
    for name in ("query_starts", "query_lengths", "key_starts", "diagonal"):
        found = triflash.explain(q, q, q, causal=True, device="h100", **{name: integers})
        assert found.backend == "triton" and any(each == "hopper" and name in why for each, why in found.not_taken), found.not_taken
        with pytest.raises(UnsupportedError, match=f"^{name}.*backend 'hopper'; .* use backend\\('triton'\\)"):
            triflash.explain(q, q, q, causal=True, device="h100", backend="hopper", **{name: integers})
    assert triflash.explain(q, q, q, causal=True, device="h100", diagonal=-100, window=(5, 3)).backend == "hopper"
    slopes = torch.empty(4, device="meta")
    assert triflash.explain(q, q, q, causal=True, device="h100", diagonal=0, alibi_slopes=slopes).backend == "hopper"
    assert triflash.explain(q, q, q, causal=True, device="h100", diagonal=5, alibi_slopes=slopes).backend == "triton"


def test_jagged_tensors_have_their_own() -> None:
    q = torch.nested.nested_tensor([torch.randn(n, 2, 16) for n in (3, 5)], layout=torch.jagged)
    for name, value in (("query_starts", torch.ones(2)), ("key_starts", torch.ones(2)), ("diagonal", 3), ("diagonal", torch.ones(2))):
        with pytest.raises(ValueError, match=f"^{name}: wanted None, as jagged tensors"):
            attention(q, q, q, **{name: value})  # type: ignore[call-overload]


def test_an_empty_inner_batch_dim(device: torch.device) -> None:
    """A bias over the outer one then has nobody to be added to."""
    for backend in ("oracle", "tiled", "triton"):
        q = torch.randn(2, 0, 5, 2, 16, device=device, requires_grad=True)
        bias = torch.randn(2, 1, 2, 5, 5, device=device, requires_grad=True)
        out, lse = attention(q, q, q, bias=bias, return_lse=True, backend=backend)
        assert out.shape == q.shape and lse.shape == (2, 0, 2, 5)
        dq, dbias = torch.autograd.grad(out.sum(), (q, bias))
        assert dq.shape == q.shape and dbias.shape == bias.shape and not dbias.any()


def test_gradcheck() -> None:
    q, k, v = (torch.randn(2, length, heads, 3, dtype=torch.float64, requires_grad=True) for length, heads in ((5, 2), (6, 1), (6, 1)))
    bias = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    sink = torch.randn(2, dtype=torch.float64, requires_grad=True)
    places = {"query_starts": [1, 0], "query_lengths": [5, 3], "key_starts": [0, 2], "diagonal": [1, 3]}
    tensors = {name: torch.tensor(x) for name, x in places.items()}

    def function(*x: Tensor) -> Any:
        more: dict[str, Any] = dict(causal=True, softcap=1.5, dropout_p=0.3, dropout_seed=3, alibi_slopes=torch.tensor([0.3, 0.1]))
        out, lse = attention(*x[:3], bias=x[3], sink=x[4], **more, **tensors, return_lse=True)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(function, (q, k, v, bias, sink))


# What traces, transforms and counts.


def places_of(*lists: list[int], device: Any = None) -> dict[str, Tensor]:
    names = ("query_starts", "query_lengths", "key_starts", "key_lengths")
    return {name: torch.tensor(x, device=device) for name, x in zip(names, lists, strict=False)}


PLACES = ([2, 0, 5], [12, 7, 9], [1, 4, 0], [20, 15, 18])


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled(dynamic: bool | None, device: torch.device) -> None:
    """One graph, whatever the tensors say; numbers, too, where sizes are dynamic."""
    q, k, v, bias, _ = leaves = drawn(3, device=device)
    row = torch.randn(3, 1, 1, 20, device=device, requires_grad=True)
    options: dict[str, Any] = {"causal": True, **places_of(*PLACES, device=device)}
    frames = []

    def counting(graph: Any, inputs: Any) -> Any:
        frames.append(graph)
        return graph.forward

    def step(q: Tensor, diagonal: Any, **options: Any) -> Tensor:
        return attention(q, k, v, bias=(bias, row), diagonal=diagonal, **options)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counting)
    for diagonal in ([3, 4, 5], [8, 0, -2]):
        given = torch.tensor(diagonal, device=device)
        out, wanted = compiled(q, given, **options), step(q, given, **options)
        near(out, wanted)
        for got, right in zip(*(torch.autograd.grad(x.square().sum(), [*leaves[:4], row]) for x in (out, wanted)), strict=True):
            near(got, right)
    assert len(frames) == 1
    slopes = torch.rand(4, device=device)
    for diagonal in (3, 5, 7, 9):
        near(compiled(q, diagonal, alibi_slopes=slopes), step(q, diagonal, alibi_slopes=slopes))
    assert len(frames) <= (3 if dynamic else 4)


@pytest.mark.unpoisoned
def test_exported() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, starts: Tensor, diagonal: Tensor) -> Tensor:
            return attention(q, k, k, causal=True, key_starts=starts, diagonal=diagonal)

    q, k, *_ = (x.detach() for x in drawn(3))
    program = torch.export.export(Module(), (q, k, torch.tensor([1, 2, 3]), torch.tensor([3, 4, 5]))).module()
    others = torch.tensor([0, 5, 2]), torch.tensor([1, 9, 8])
    near(program(q, k, *others), Module()(q, k, *others))


def test_transformed() -> None:
    """vmap over what hides and where queries stand, or not, also over gradients, and where it is a loop."""
    vmap, grad = torch.func.vmap, torch.func.grad
    q, k, v = (torch.randn(4, 3, length, 2, 16) for length in (12, 20, 20))
    diagonal, starts = torch.randint(-3, 10, (4, 3)), torch.randint(0, 10, (4, 3))
    sink = torch.randn(4, 2)

    def one(q: Tensor, k: Tensor, v: Tensor, diagonal: Tensor, starts: Tensor, sink: Tensor | None = None) -> Tensor:
        return attention(q, k, v, diagonal=diagonal, key_starts=starts, query_starts=starts // 2, sink=sink, causal=True)

    def gradient(*x: Tensor) -> Tensor:
        return grad(lambda q, *more: one(q, *more).square().sum())(*x)  # type: ignore[no-any-return]

    for function in (one, gradient):
        near(vmap(function)(q, k, v, diagonal, starts), torch.stack([function(*x) for x in zip(q, k, v, diagonal, starts, strict=True)]))
        same = vmap(function, (0, 0, 0, None, None))(q, k, v, diagonal[0], starts[0])
        near(same, torch.stack([function(*x, diagonal[0], starts[0]) for x in zip(q, k, v, strict=True)]))
        looped = vmap(function)(q, k, v, diagonal, starts, sink)
        near(looped, torch.stack([function(*x) for x in zip(q, k, v, diagonal, starts, sink, strict=True)]))


def test_checkpointed_fake_and_counted() -> None:
    q, k, v, *_ = leaves = drawn(3)
    options: dict[str, Any] = {"causal": True, **places_of(*PLACES), "diagonal": torch.tensor([3, 4, 5])}
    again = torch.utils.checkpoint.checkpoint(lambda q: attention(q, k, v, **options), q, use_reentrant=False)
    for got, right in zip(
        *(torch.autograd.grad(x.square().sum(), leaves[:3]) for x in (again, attention(q, k, v, **options))), strict=True
    ):
        near(got, right)
    meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in options.items()}
    assert attention(*(x.detach().to("meta") for x in (q, k, v)), **meta).is_meta
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for diagonal in (8, 0, -100, torch.tensor([8, 0, -100])):
        with FlopCounterMode(display=False) as counter:
            attention(q, k, v, causal=True, diagonal=diagonal).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[2] == 0 and 0 < counts[1] < counts[0] and counts[3] * 3 == sum(counts[:3])


def test_operators() -> None:
    q, k, v, bias, sink = leaves = drawn(2, H=2)
    five, places = bias[:, None], [torch.tensor(x) for x in ([2, 0], [12, 7], [1, 4], [3, 9])]
    options, more = (1, None, 0, 0.25, "", "tiled"), (None, None, None, sink, None, 0.0, 0.0, False)
    torch.library.opcheck(ops.attention_forward, (q, k, v, five, *options, *more, None, *places, None))
    tensors = [x.detach() for x in (q, k, v, five)]
    more = (None, None, None, sink.detach(), None, 0.0, 0.0, False)
    out, lse, rest = ops.attention_forward(*tensors, *options, *more, None, *places, None)
    saved = (torch.randn_like(out), torch.randn_like(lse), *tensors, out, lse, rest)
    torch.library.opcheck(ops.attention_backward, (*saved, *options, [True] * 5, *more, *places, None))
    given = [torch.zeros_like(x) for x in tensors]
    torch.library.opcheck(ops.attention_backward_, (*saved, *options, *given, *more, torch.zeros(2), *places, None))
    for x, text in (
        (torch.ones(2), "query_starts: wanted integers"),
        (torch.ones(3, dtype=torch.int32), r"query_starts: wanted shape \(2,\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            ops.attention_forward(*tensors, *options, *more, None, x)
    assert len(leaves) == 5
