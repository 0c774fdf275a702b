"""Calls on KV caches as data, built with junk wherever a call must not look, and what each is held against: a loop over the dense oracle on
the keys of each request, gathered by the text of docs/semantics.md, in Python's own arithmetic.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from triflash import attention_with_kvcache, oracle
from triflash.cli.bench.tolerance import FLOAT32_ULPS, OUTPUT_FACTOR, Judgement, disagreement, unit_roundoff

FP8 = torch.float8_e4m3fn
JUNK_PAGES = (10**6, -1, -(10**9), 2**31 - 1)


@dataclass(frozen=True)
class Case:
    """One call.

    B requests of M queries (packed: of each request) on ``lengths`` keys in a cache of N (paged: rounded up to pages of ``page``). new: keys
    appended to each; new_packed: to each of them, packed. starts: key_starts. entries: cache_index into so many entries. bias, mask: letters
    of what they vary over, ``1h1k``; bias_keys: how many keys they have, if not N. scales: k_scale and v_scale, ``"number"``, ``"h"`` or
    ``"bh"``, of an fp8 cache.
    """

    name: str
    B: int = 3
    M: int = 2
    H: int = 4
    Hk: int = 2
    D: int = 16
    Dv: int | None = None
    N: int = 40
    lengths: tuple[int, ...] | None = (17, 0, 40)
    page: int | None = None
    packed: tuple[int, ...] | None = None
    new: int | None = None
    new_packed: tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None
    entries: int | None = None
    bias: str | None = None
    mask: str | None = None
    bias_keys: int | None = None
    bias_dtype: torch.dtype | None = None
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi: str | None = None
    sink: bool = False
    dtype: torch.dtype = torch.float32
    fp8: bool = False
    scales: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    integers: torch.dtype = torch.int32
    layout: str = "plain"

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    @property
    def capacity(self) -> int:
        return self.N if self.page is None else -(-self.N // self.page) * self.page

    @property
    def queries(self) -> tuple[int, ...]:
        return self.packed or (self.M,) * self.B

    @property
    def added(self) -> tuple[int, ...]:
        return self.new_packed or (self.new or 0,) * self.B

    @property
    def held(self) -> list[int]:
        """Keys of each request before the call."""
        if self.lengths is None:
            return [self.capacity] * self.B
        return [min(max(0, n), self.capacity) for n in self.lengths]

    @property
    def used(self) -> list[int]:
        return [min(n + m, self.capacity) for n, m in zip(self.held, self.added, strict=True)]


CASES = (
    Case("plain"),
    Case("all keys", lengths=None),
    Case("one query", M=1, causal=True),
    Case("heads of their own, values wider", Hk=4, Dv=24, M=1),
    Case("one key head", Hk=1, M=3, causal=True),
    Case("causal", M=5, causal=True, lengths=(17, 3, 40)),
    Case("causal, more queries than keys", M=5, causal=True, lengths=(2, 0, 7)),
    Case("window", M=4, window=(6, 0), lengths=(17, 4, 40)),
    Case("window to both sides", M=4, window=(3, 1), lengths=(17, 4, 40)),
    Case("causal window", M=3, window=(7, None), causal=True),
    Case("left padding", starts=(4, 0, 33), M=2, causal=True),
    Case("left padding hides all", starts=(17, 5, 40), M=2),
    Case("lengths out of range", lengths=(-3, 10**9, 7), M=2),
    Case("scale and cap", scale=0.4, softcap=2.0, M=2),
    Case("scale of 0", scale=0.0),
    Case("ALiBi", alibi="h", M=3, causal=True),
    Case("ALiBi of each request", alibi="bh", M=3),
    Case("sink", sink=True, M=2),
    Case("bias of keys", bias="b11k", M=2),
    Case("bias of all", bias="bhqk", M=3, causal=True),
    Case("T5's bias", bias="1h1k", M=1, scale=1.0),
    Case("bias of queries alone", bias="1hq1", M=3),
    Case("bias just long enough", bias="bh1k", bias_keys=21, lengths=(17, 0, 21), M=2),
    Case("bias longer than the cache", bias="1h1k", bias_keys=61, M=2),
    Case("half bias beside a mask", bias="1hqk", bias_dtype=torch.float16, mask="b1qk", M=2),
    Case("mask", mask="b11k", M=2),
    Case("mask of heads", mask="1hqk", M=2),
    Case("three dims", bias="hqk", M=2),
    Case("two dims", mask="qk", M=2),
    Case("new keys", new=2, M=2, causal=True),
    Case("new keys past the capacity", new=5, M=5, causal=True, lengths=(37, 0, 40)),
    Case("many new keys", new=23, M=23, causal=True, lengths=(17, 0, 40)),
    Case("packed new keys", new_packed=(3, 0, 7), M=2, lengths=(17, 9, 36)),
    Case("packed queries", packed=(1, 0, 6), causal=True),
    Case("packed queries and new keys", packed=(1, 4, 6), new_packed=(1, 4, 6), causal=True, lengths=(17, 0, 20)),
    Case("packed, bias, sink, ALiBi", packed=(2, 3, 1), bias="b1qk", mask="1h1k", alibi="bh", sink=True, softcap=3.0),
    Case("int64 packed", packed=(2, 3, 1), integers=torch.int64, causal=True, starts=(3, 0, 8)),
    Case("entries", entries=7, M=2, causal=True),
    Case("entries, new keys", entries=5, new=3, M=3, causal=True, lengths=(17, 0, 39)),
    Case("pages of 1", page=1, N=20, lengths=(17, 0, 20), M=2, causal=True),
    Case("pages of 3", page=3, M=2, causal=True),
    Case("pages of 16", page=16, M=1, lengths=(17, 0, 48), Dv=24),
    Case("pages, new keys", page=8, new=3, M=3, causal=True, lengths=(17, 0, 39)),
    Case("pages of 3, packed, new keys", page=3, packed=(3, 1, 4), new_packed=(3, 1, 4), causal=True, lengths=(17, 0, 39)),
    Case("pages, everything", page=8, new=2, M=2, bias="bhqk", mask="b11k", alibi="h", sink=True, softcap=4.0, causal=True, starts=(3, 0, 9)),
    Case("a table of slices", page=4, M=2, layout="sliced", new=1),
    Case("heads first", layout="heads first", M=2, new=1, causal=True),
    Case("sliced", layout="sliced", M=2, new=2),
    Case("fp8", fp8=True, dtype=torch.float16, M=2, causal=True),
    Case("fp8, a number", fp8=True, dtype=torch.float16, scales="number", new=2, M=2, causal=True),
    Case("fp8, scales of heads", fp8=True, dtype=torch.float16, scales="h", new=2, M=2, page=8),
    Case("fp8, scales of all", fp8=True, dtype=torch.float16, scales="bh", packed=(2, 1, 3), new_packed=(2, 1, 3), causal=True),
    Case("fp8 in pairs", fp8=True, dtype=torch.float16, D=32, M=2, causal=True),
    Case("fp8 in pairs, values wider", fp8=True, dtype=torch.float16, D=48, Dv=64, scales="h", M=3, page=3, window=(6, 0)),
    Case("fp8 in pairs, values of one", fp8=True, dtype=torch.float16, D=32, Dv=16, scales="bh", page=8, starts=(4, 0, 33)),
    Case(
        "fp8 in pairs, everything", fp8=True, dtype=torch.float16, D=64, Dv=32, scales="bh", packed=(2, 1, 3), page=1, N=40,
        bias="b1qk", mask="1h1k", alibi="bh", sink=True, softcap=3.0,
    ),
    Case("fp8, an odd head dim", fp8=True, dtype=torch.float16, D=33, M=2),
    Case("fp8, sliced", fp8=True, dtype=torch.float16, D=32, M=2, layout="sliced"),
    Case("half", dtype=torch.float16, M=2, new=2, causal=True, bias="1h1k"),
    Case("uint8 lengths", integers=torch.uint8, M=2),
    Case("uint64 lengths", integers=torch.uint64, M=2, starts=(1, 0, 5)),
    Case("int64 lengths", integers=torch.int64, M=2, starts=(1, 0, 5), entries=4),
    Case("splits", M=2, options=(("num_splits", 3),)),
    Case("split size", M=2, options=(("split_size", 16),), causal=True),
)  # fmt: skip


@dataclass
class Call:
    """A built case: the arguments, and the keys and values that each request sees, in float64."""

    case: Case
    given: dict[str, Any]
    seen: list[tuple[Tensor, Tensor]]
    slots: list[list[tuple[int, int]]]  # of each request, where its position j lies: (entry or page, place)

    def run(self, backend: str, device: str = "cpu", **more: Any) -> tuple[Tensor, Tensor]:
        given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.given.items()}
        result = attention_with_kvcache(**{**given, **more}, return_lse=True, backend=backend)
        self.given.update({name: given[name] for name in ("k_cache", "v_cache")})
        return result


def _layout(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    """Memory for a cache."""
    if layout == "heads first":
        return torch.empty((shape[0], shape[2], shape[1], shape[3]), dtype=dtype).transpose(1, 2)
    if layout == "sliced":
        return torch.empty(tuple(size + 3 for size in shape), dtype=dtype)[tuple(slice(1, 1 + size) for size in shape)]
    return torch.empty(shape, dtype=dtype)


def build(case: Case, seed: int = 0, exact: bool = False) -> Call:
    """exact: new rows of 8-bit caches need no rounding, or saturate, and scales are powers of 2: Triton's interpreter does not carry where it
    rounds to 8 bits.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    B, Hk, D, N = case.B, case.Hk, case.D, case.N
    Dv = D if case.Dv is None else case.Dv
    cache_dtype = FP8 if case.fp8 else case.dtype
    used, held, added = case.used, case.held, case.added
    given: dict[str, Any] = {"causal": case.causal, **dict(case.options)}
    given |= {name: x for name in ("window", "scale", "softcap") if (x := getattr(case, name)) is not None}
    if case.page is not None:
        most = case.capacity // case.page
        pages = B * most + 2
        order = torch.randperm(pages, generator=g).tolist()
        table = torch.tensor([JUNK_PAGES[n % 4] for n in range(B * most)], dtype=torch.int32).view(B, most)
        slots = []
        for b in range(B):
            for at in range(-(-used[b] // case.page)):
                table[b, at] = order[b * most + at]
            slots.append([(int(table[b, j // case.page]), j % case.page) for j in range(used[b])])
        if case.layout == "sliced":
            table = torch.cat([table, table], 1)[:, :most]
        given["page_table"] = table
        shape = (pages, case.page)
    else:
        count = case.entries or B
        entry = torch.randperm(count, generator=g)[:B].tolist() if case.entries else list(range(B))
        if case.entries:
            given["cache_index"] = torch.tensor(entry).to(case.integers)
        slots = [[(entry[b], j) for j in range(used[b])] for b in range(B)]
        shape = (count, N)
    scale_shape = {None: None, "number": None, "h": (1, Hk), "bh": (B, Hk)}[case.scales]
    scales = []
    for name in ("k_scale", "v_scale"):
        own: Any = 1.0
        if case.scales == "number":
            own = given[name] = 0.75 if name[0] == "k" and not exact else 0.5
        elif scale_shape is not None:
            own = torch.rand(scale_shape, generator=g) + 0.5
            own = own.log2().round().exp2() if exact else own
            given[name] = own[0] if case.scales == "h" else own
        scales.append(torch.as_tensor(own).expand(B, Hk))
    seen: list[tuple[Tensor, Tensor]] = []
    kept: dict[str, list[Tensor]] = {}
    for name, dim, own in (("k", D, scales[0]), ("v", Dv, scales[1])):
        cache = _layout((*shape, Hk, dim), case.layout, cache_dtype)
        cache.copy_(torch.full(cache.shape, math.nan, dtype=torch.float32).to(cache_dtype))
        parts = []
        for b in range(B):
            fresh = normal(added[b], Hk, dim)
            if case.fp8 and exact:
                grid = torch.randint(16, 0x48, fresh.shape, dtype=torch.uint8, generator=g).view(FP8)
                fresh = (grid.float() * own[b, :, None]).to(case.dtype)
            if case.fp8 and added[b]:
                fresh[0] = normal(Hk, dim) * 1000.0 if not exact else normal(Hk, dim).sign() * 3000.0  # saturates
            old = (normal(held[b], Hk, dim).float() / own[b, :, None]).to(cache_dtype)
            for j in range(held[b]):
                if case.starts is None or j >= case.starts[b]:
                    cache[slots[b][j]] = old[j]
            stored = fresh
            if case.fp8:
                stored = (fresh.float() / own[b, :, None]).clamp(-448, 448).to(FP8)
            whole = torch.cat([old.float(), stored[: used[b] - held[b]].float()]).double()
            kept.setdefault(name, []).append(whole * (own[b, :, None].double() if case.fp8 else 1.0))
            parts.append(fresh)
        given[f"{name}_cache"] = cache
        if case.new_packed is not None:
            given[f"{name}_new"] = torch.cat(parts)
        elif case.new is not None:
            given[f"{name}_new"] = torch.stack(parts)
    seen = list(zip(kept["k"], kept["v"], strict=True))
    if case.packed is not None:
        ends = [0, *torch.tensor(case.packed).cumsum(0).tolist()]
        given["q"] = normal(ends[-1], case.H, D)
        given["cu_seqlens_q"] = torch.tensor(ends, dtype=torch.int64 if case.integers == torch.int64 else torch.int32)
        given["max_seqlen_q"] = max(case.packed)
    else:
        given["q"] = normal(B, case.M, case.H, D)
    if case.new_packed is not None:
        given["cu_seqlens_new"] = torch.tensor([0, *torch.tensor(case.new_packed).cumsum(0).tolist()], dtype=torch.int32)
    for name, numbers in (("cache_lengths", case.lengths), ("key_starts", case.starts)):
        if numbers is not None:
            given[name] = torch.tensor(numbers).to(case.integers)
    sizes = {"b": B, "h": case.H, "q": max(case.queries), "k": case.bias_keys or case.capacity, "1": 1}
    if case.bias:
        given["bias"] = normal(*(sizes[letter] for letter in case.bias), dtype=case.bias_dtype or case.dtype)
    if case.mask:
        given["mask"] = torch.rand(tuple(sizes[letter] for letter in case.mask), generator=g) < 0.7
    if case.alibi:
        given["alibi_slopes"] = torch.rand((B, case.H) if case.alibi == "bh" else (case.H,), generator=g)
    if case.sink:
        given["sink"] = normal(case.H)
    return Call(case, given, seen, slots)


def references(call: Call) -> dict[str, Judgement]:
    """What out and lse are held against."""
    case, given = call.case, call.given
    results: dict[str, list[Tensor]] = {name: [] for name in ("out", "lse", "plain out", "plain lse", "slack")}
    first = 0
    for b, m in enumerate(case.queries):
        k, v = (x[None] for x in call.seen[b])
        n = k.shape[1]
        start = 0 if case.starts is None else min(case.starts[b], n)
        k, v = k[:, start:], v[:, start:]
        q = given["q"][None, first : first + m] if case.packed else given["q"][b : b + 1]
        first += m
        left, right = case.window or (None, None)
        right = 0 if case.causal else right
        diagonal = n - m - start
        extras = {}
        for name in ("bias", "mask"):
            x = given.get(name)
            if x is not None:
                x = x[(None,) * (4 - x.dim())]
                x = x[b : b + 1] if x.shape[0] > 1 else x
                x = x[:, :, :m] if x.shape[2] > 1 else x
                extras[name] = x[..., start:n] if x.shape[3] > 1 else x
        slopes = given.get("alibi_slopes")
        options = {
            **extras, "alibi_slopes": slopes if slopes is None or slopes.dim() == 1 else slopes[b], "sink": given.get("sink"),
            "lo": None if left is None else diagonal - left, "hi": None if right is None else diagonal + right,
            "scale": case.scale, "softcap": case.softcap or 0.0,
        }  # fmt: skip
        out, lse = oracle.attention(q, k, v, **options)
        wide = torch.float32 if case.dtype != torch.float64 else case.dtype
        plain, _ = oracle.attention(q, k.to(case.dtype), v.to(case.dtype), **options, dtype=case.dtype)
        _, plain_lse = oracle.attention(q, k, v, **options, dtype=wide)
        # Rounding: the formula on absolute values, as the judge of attention has it.
        weights, _ = oracle.attention(q, k, v.abs(), **options)
        results["slack"].append(weights * (1.0 + _largest_score(case, q, k, extras.get("bias"))))
        for name, x in (("out", out), ("lse", lse), ("plain out", plain), ("plain lse", plain_lse)):
            results[name].append(x[0])
    axis = {"out": 0, "lse": 1, "plain out": 0, "plain lse": 1, "slack": 0}
    results["slack"] = [x[0] for x in results["slack"]]
    if case.packed:
        joined = {name: torch.cat(parts, axis[name]) for name, parts in results.items()}
    else:
        joined = {name: torch.stack(parts) for name, parts in results.items()}
    unit = FLOAT32_ULPS * unit_roundoff(torch.float32)
    finite = joined["lse"].masked_fill(joined["lse"].isinf(), 0.0)
    return {
        "out": Judgement(joined["out"], joined["plain out"], OUTPUT_FACTOR, case.dtype, unit * joined["slack"]),
        "lse": Judgement(joined["lse"], joined["plain lse"], OUTPUT_FACTOR, torch.float32, unit * (1.0 + finite.abs())),
    }


def _largest_score(case: Case, q: Tensor, k: Tensor, bias: Tensor | None) -> float:
    """A bound of |s|."""
    scale = case.D**-0.5 if case.scale is None else case.scale
    if not q.numel() or not k.numel():
        return 0.0
    size = abs(scale) * q.double().norm(dim=-1).max() * k.norm(dim=-1).max()
    if bias is not None and bias.numel():
        size = size + bias.double().abs().max()
    if case.alibi:
        size = size + case.capacity
    return float(size)


def assert_right(call: Call, out: Tensor, lse: Tensor) -> None:
    """Both results by the tolerance rule."""
    judgements = references(call)
    for name, got in (("out", out), ("lse", lse)):
        problem = disagreement(got.cpu(), judgements[name])
        assert problem is None, f"{call.case.name}: {name}: {problem}"


# Calls that are no case: small tensors, of which a test changes some.
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
RUNS_TRITON = GPU or os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    "tiled",
    "oracle",
    pytest.param("triton", marks=pytest.mark.skipif(not RUNS_TRITON, reason="Triton runs nothing here")),
]


def simple(B: int = 2, M: int = 2, N: int = 12, dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    made = {
        "q": torch.randn(B, M, 4, 8, dtype=dtype), "k_cache": torch.randn(B, N, 2, 8, dtype=dtype),
        "v_cache": torch.randn(B, N, 2, 8, dtype=dtype), "cache_lengths": torch.tensor([5, 9][:B]),
    }  # fmt: skip
    return {**{name: x.to(DEVICE) for name, x in made.items()}, **more}


def with_new(M: int = 2, **more: Any) -> dict[str, Any]:
    return simple(M=M, k_new=torch.randn(2, M, 2, 8, device=DEVICE), v_new=torch.randn(2, M, 2, 8, device=DEVICE), causal=True, **more)
