"""Sweeps: several kinds of problems, each with its own providers and passes, and what the results are held to.

``models`` are the layers of many models, held to their best peers; the others have bars (:mod:`.bars`). A new one is a function that
returns its jobs and bars, and a line of :data:`SWEEPS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .bars import Bar
from .flops import HOST_PASSES
from .models import LAYERS, MODELS
from .packed import KINDS, TOKENS
from .record import Cell
from .workloads import DECODE, NAMED, Workload, short

__all__ = ["SWEEPS", "Job", "Sweep"]


@dataclass(frozen=True)
class Job:
    """A workload, who computes it, and in which passes. Of a sweep, no providers or passes: the device's defaults."""

    workload: Workload
    providers: tuple[str, ...]
    passes: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """about: a line for ``--list``. budget: seconds for each provider and pass, unless ``--budget`` says others. cliffs: what is shown are
    the cells in which a peer is faster, and there are no bars.
    """

    about: str
    jobs: tuple[Job, ...]
    bars: tuple[Bar, ...] = ()
    budget: float = 0.15
    cliffs: bool = False


def _workload(b: int, s: int, h: int, d: int, causal: bool = False, bias: bool = False) -> Workload:
    words = [f"b{b} s{short(s)} d{d}", *(["causal"] if causal else []), *(["1hqk+db"] if bias else [])]
    return Workload(" ".join(words), b, h, s, s, d, hi=0 if causal else None, bias="1hqk" if bias else None, dbias=bias)


def _host() -> Sweep:
    sdpa = ("sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient")
    plain = ("triflash", "triflash-triton", *sdpa, "fa4", "triflash-compiled", "sdpa-compiled")
    biased = ("triflash", "triflash-triton", "sdpa", "sdpa-efficient", "sdpa-nobias", "triflash-compiled", "sdpa-compiled")
    shapes = [(b, s, d) for b in (1, 8) for s in (128, 512, 2048) for d in (64, 128)]
    jobs = [Job(_workload(b, s, 16, d, causal=True), plain, (*HOST_PASSES, "eager")) for b, s, d in shapes]
    jobs += [Job(_workload(b, s, 16, d, bias=True), biased, (*HOST_PASSES, "eager")) for b, s, d in shapes]
    # One of them is among the shapes above too; here the times of the device stand beside.
    large = [replace(w, name=f"{w.name} h{w.heads}") for w in (_workload(32, 512, 32, 64), _workload(8, 2048, 16, 128, causal=True))]
    jobs += [Job(w, ("triflash", *sdpa[1:3], "fa4", "triflash-compiled", "sdpa-compiled"), ("step", "eager", "host-step")) for w in large]
    lengths = (_workload(1, 1001, 16, 64, causal=True), _workload(1, 1040, 16, 128, causal=True), _workload(1, 1040, 16, 64, bias=True))
    jobs += [Job(w, ("triflash", "triflash-triton", "sdpa"), ("first",)) for w in lengths]
    of_large, without = tuple(w.name for w in large), ("sdpa-nobias",)

    def is_plain(cell: Cell) -> bool:
        return not cell.workload["bias"]

    def is_biased(cell: Cell) -> bool:
        return not is_plain(cell)

    def is_large(cell: Cell) -> bool:
        return cell.name.startswith(of_large)

    return Sweep(
        "what an eager call costs the host, beside SDPA and FlashAttention-4: forward and step, plain, with a bias, compiled, portable",
        tuple(jobs),
        (
            Bar("forward without autograd", "triflash", "host-nograd", "time", 1.3, sdpa, of=is_plain),
            Bar("forward without autograd, with a bias, to SDPA without it", "triflash", "host-nograd", "time", 1.3, without, of=is_biased),
            Bar("step", "triflash", "host-step", "time", 1.15, sdpa, of=is_plain),
            Bar("step with a bias and its gradient, to SDPA without it", "triflash", "host-step", "time", 1.5, without, of=is_biased),
            Bar("step with a bias and its gradient", "triflash", "host-step", "time", 1.0, ("sdpa-efficient",), of=is_biased),
            Bar("compiled step", "triflash-compiled", "host-step", "time", 1.3, ("sdpa-compiled",)),
            Bar("portable step", "triflash-triton", "host-step", "time", 1.5, sdpa, of=is_plain),
            Bar("eager step, wall time", "triflash", "eager", "time", 1.0, ("sdpa-cudnn", "fa4"), every=True, of=is_large),
            Bar("first step at a new length", "triflash", "first", "ms", 2.0),
        ),
    )


def _models() -> Sweep:
    about = f"{len(LAYERS)} attention layers of {len(MODELS)} models, of which it shows those where a peer is faster; --count N draws some"
    return Sweep(about, tuple(Job(layer, (), ()) for layer in LAYERS.values()), cliffs=True)


def _each(name: str, kind: str, bounds: Mapping[str, float | None], *peers: str, ours: str = "triflash", **more: Any) -> tuple[Bar, ...]:
    """A bar for each pass: pass -> bound."""
    words = {"fwd": "forward", "bwd": "backward"}
    return tuple(Bar(f"{name}, {words[which]}", ours, which, kind, bound, peers, **more) for which, bound in bounds.items())


def _grid(dims: tuple[int, ...], sizes: tuple[int, ...]) -> list[Workload]:
    """16,384 tokens of heads that have 2,048 columns together, causal and not."""
    found = (_workload(16384 // s, s, 2048 // d, d, causal) for d, causal, s in itertools.product(dims, (True, False), sizes))
    return [replace(w, name=f"d{w.head_dim} s{short(w.queries)} {w.mask}") for w in found]


_BLOCK = 128  # queries and keys of a block, as most of Hopper's tiles have them
_FEATURES: dict[str, dict[str, Any]] = {
    "soft cap 50": {"softcap": 50.0},
    "dropout 0.1": {"dropout": 0.1},
    "ALiBi": {"slopes": True},
    "mask of keys": {"bias": "b11k", "bias_values": "all mask"},
    "mask of keys with holes": {"bias": "b11k", "bias_values": "holes mask"},
    "window 512": {"lo": -511},
    "window 1024": {"lo": -1023},
    "window 2048": {"lo": -2047},
    "padding mask": {"hi": None, "bias": "b11k", "bias_values": "padding mask"},
    "documents mask": {"hi": None, "bias": "b1qk", "bias_values": "documents mask"},
    "key lengths": {"hi": None, "bias": "b11k", "bias_values": "padding"},
    "bias 1hqk": {"bias": "1hqk"},
    "sinks": {"sinks": True},
    "8 query heads a key head": {"group": 8},
    "one key head": {"group": 0},
    "deterministic": {"deterministic": True},
}


def _of_plain(count: Callable[[Workload], int]) -> Callable[[Cell], float]:
    """How much of something a cell has, of what the plain call of its sizes has."""

    def share(cell: Cell) -> float:
        w = Workload(**cell.workload)
        return count(w) / count(w.plain())

    return share


def _visited(w: Workload) -> int:
    """Blocks of queries and keys in which a band shows anything."""
    blocks = 0
    for row in range(0, w.queries, _BLOCK):
        first = 0 if w.lo is None else max(0, row + w.lo)
        last = w.keys - 1 if w.hi is None else min(w.keys - 1, min(row + _BLOCK, w.queries) - 1 + w.hi)
        blocks += max(0, last // _BLOCK - first // _BLOCK + 1)
    return blocks


def _features() -> Sweep:
    """b 4, s 4096, as many heads as have 2,048 columns together."""
    jobs = []
    for d, (name, more) in itertools.product((64, 128), _FEATURES.items()):
        heads, own = 2048 // d, dict(more)
        group = own.pop("group", 1) or heads
        w = Workload(f"d{d} {name}", 4, heads, 4096, 4096, d, kv_heads=heads // group, **{"hi": 0, **own})
        jobs.append(Job(w, ("triflash", "triflash-plain", *(["sdpa-cudnn"] if w.dropout else [])), ("fwd", "bwd")))

    def cost(name: str, bound: float | None, *features: str, per: Callable[[Workload], int] | None = None) -> tuple[Bar, ...]:
        def of(cell: Cell) -> bool:
            return cell.name.partition(" ")[2].removesuffix(" (tiny)") in (features or (name,))

        more: dict[str, Any] = {} if per is None else {"per": _of_plain(per)}
        return _each(name, "time", {"fwd": bound, "bwd": bound}, "triflash-plain", of=of, **more)

    def drops(cell: Cell) -> bool:
        return bool(cell.workload["dropout"])

    def pairs(w: Workload) -> int:
        return w.pairs

    windows = [name for name in _FEATURES if name.startswith("window")]
    return Sweep(
        "what features cost beside the plain call of the same sizes, forward and backward",
        tuple(jobs),
        (
            *cost("soft cap", 1.25, "soft cap 50"),
            *cost("dropout", 1.35, "dropout 0.1"),
            *_each("dropout, beside cuDNN's", "speed", {"fwd": None, "bwd": 1.0}, "sdpa-cudnn", of=drops),
            *cost("ALiBi", 1.08),
            *cost("mask of keys", 1.05),
            *cost("windows, a visited block", 1.15, *windows, per=_visited),
            *cost("padding mask, a pair", 1.25, "padding mask", per=pairs),
            *cost("documents mask, a pair", 1.25, "documents mask", per=pairs),
            *cost("key lengths, a pair", None, "key lengths", per=pairs),
            *cost(
                "others", None, "mask of keys with holes", "bias 1hqk", "sinks", "8 query heads a key head", "one key head", "deterministic"
            ),
        ),
        budget=0.05,
    )


def _folding() -> Sweep:
    """The layers with a bias of pairs, which rows share, and its gradient."""
    layers = [w for w in NAMED.values() if w.dbias and w.bias == "b1hqk" and w.name != "af3-diffusion"]
    passes, both = ("fwd", "bwd"), {"fwd": 2.5, "bwd": 2.5}

    def has_two(cell: Cell) -> bool:
        return bool(cell.workload["second"])

    return Sweep(
        "triangle attention and MSA rows with one bias and two, with gradients, beside FlexAttention and memory-efficient SDPA",
        tuple(Job(w, ("triflash", *(["triflash-onebias"] if w.second else []), "flex", "sdpa-efficient"), passes) for w in layers),
        (
            *_each("beside FlexAttention", "speed", {"fwd": 1.25, "bwd": 1.4}, "flex"),
            *_each("beside memory-efficient SDPA", "speed", both, "sdpa-efficient"),
            *_each("two biases, to one", "time", {"fwd": 1.15, "bwd": 1.15}, "triflash-onebias", of=has_two),
        ),
        budget=0.08,
    )


def _portable() -> Sweep:
    """What GPUs other than an H100 or H200 run."""
    grid = [*_grid((64, 128), (512, 1024, 2048, 4096, 8192)), *_grid((256,), (512, 2048, 8192))]
    ours, peer = "triflash-triton", "sdpa-flash"

    def is_wide(cell: Cell) -> bool:
        return int(cell.workload["head_dim"]) > 128

    def is_usual(cell: Cell) -> bool:
        return not is_wide(cell)

    return Sweep(
        "the portable kernels (backend triton) beside FlashAttention-2 (SDPA), without a bias",
        tuple(Job(w, (ours, peer), ("fwd", "bwd")) for w in grid),
        (
            *_each("d 64 and 128", "speed", {"fwd": 1.2, "bwd": 1.1}, peer, ours=ours, of=is_usual),
            *_each("d 256", "speed", {"fwd": None, "bwd": 1.0}, peer, ours=ours, of=is_wide),
        ),
        budget=0.05,
    )


def _sequences(kind: str, d: int, causal: bool = True, bias: bool = False) -> Workload:
    """Packed sequences of 16 heads; equal ones are 16 of 2,048."""
    tokens = 32768 if kind == "equal" else TOKENS[kind]
    words = [f"{kind} 2k" if kind == "equal" else kind, f"d{d}", f"t{short(tokens)}", "causal" if causal else "full"]
    more: dict[str, Any] = {"bias": "1hqk", "dbias": True} if bias else {}
    name = " ".join([*words, *(["1hqk+db"] if bias else [])])
    return Workload(name, 1, 16, tokens, tokens, d, hi=0 if causal else None, packed=kind, length=2048 if kind == "equal" else 0, **more)


def _packed() -> Sweep:
    """Nine problems beside FlashAttention-4; others beside those who can do them."""
    nine = [_sequences("equal", 64), *(_sequences(*each) for each in itertools.product(("documents", "uniform"), (64, 128), (True, False)))]
    equal = [_sequences("equal", 64, False), _sequences("equal", 128), _sequences("equal", 128, False)]
    long, tiny = ([_sequences(kind, d) for d in (64, 128)] for kind in ("one-long", "tiny"))
    biased = [_sequences(kind, d, bias=True) for kind in ("equal", "uniform") for d in (64, 128)]
    jobs = []
    for w in (*nine, *equal, *long, *tiny, *biased):
        own = ["triflash", *(["triflash-dense"] if w.packed == "equal" else [])]
        peers = ["flex"] if w.bias else ["torch-varlen", *(["fa4"] if w in (*nine, *tiny) else [])]
        jobs.append(Job(w, (*own, *peers), ("fwd", "bwd", *(["host-step"] if w.packed == "equal" and w.head_dim == 64 else []))))
    names = tuple(w.name for w in nine)

    def is_nine(cell: Cell) -> bool:
        return cell.name.removesuffix(" (tiny)") in names

    def of(kinds: Iterable[str], bias: bool) -> Callable[[Cell], bool]:
        return lambda cell: cell.workload["packed"] in kinds and bool(cell.workload["bias"]) == bias

    any_, equal_ = tuple(KINDS), ("equal",)
    return Sweep(
        "packed sequences beside FlashAttention-4, PyTorch's varlen, with a bias beside FlexAttention, and beside our own batches",
        tuple(jobs),
        (
            *_each("nine, beside FlashAttention-4", "speed", {"fwd": 0.97}, "fa4", of=is_nine, mean=1.08),
            *_each("nine, beside FlashAttention-4", "speed", {"bwd": 0.93}, "fa4", of=is_nine, mean=1.0),
            *_each("8,192 of 34, beside FlashAttention-4", "speed", {"fwd": 1.2, "bwd": 1.2}, "fa4", of=of(("tiny",), False)),
            *_each("beside PyTorch's varlen", "speed", {"fwd": 1.6, "bwd": 1.5}, "torch-varlen", of=of(any_, False)),
            *_each("with a bias, beside FlexAttention", "speed", {"fwd": 1.6, "bwd": 1.7}, "flex", of=of(any_, True)),
            *_each("equal lengths, beside our batch", "speed", {"fwd": 0.96, "bwd": 0.94}, "triflash-dense", of=of(equal_, False)),
            *_each("equal lengths with a bias, to our batch", "time", {"fwd": 1.05, "bwd": 1.05}, "triflash-dense", of=of(equal_, True)),
            Bar("host, a step, to our batch's", "triflash", "host-step", "time", 1.3, ("triflash-dense",)),
        ),
        budget=0.05,
    )


_LATENCIES = {1: 12.3, 2: 14.2, 4: 15.9, 8: 18.8, 16: 25.1}  # thousands of keys -> µs: the best published for an H100


def _step(name: str, batch: int, keys: int, queries: int = 1, **more: Any) -> Workload:
    """A step of decoding on thousands of keys, with Llama 3 8B's heads unless it says others."""
    sizes = {"heads": 32, "kv_heads": 8, "head_dim": 128, "hi": None if queries == 1 else 1024 * keys - queries, **more}
    return Workload(name, batch, queries=queries, keys=1024 * keys, cache=True, **sizes)


def _few(batch: int, queries: int, keys: int, heads: int, kv_heads: int) -> Workload:
    return Workload(f"attention {batch} x {queries} on {short(keys)}", batch, heads, queries, keys, 128, kv_heads=kv_heads)


def _decode() -> Sweep:
    """Steps of decoding, and few queries with their gradients."""
    peers = ("sdpa-cudnn", "flex")
    jobs = []
    for batch, keys in ((1, 1), (1, 8), (1, 64), (8, 1), (8, 8), (8, 32), (64, 1), (64, 8)):
        more, host = ("fa4",) if keys == 64 else (), batch == 1 and keys < 64
        who = ("triflash", *peers, *more, *(["sdpa"] if host else []))
        jobs.append(Job(DECODE[f"decode-llama3-8b-b{batch}-{keys}k"], who, ("fwd", "host-nograd") if host else ("fwd",)))
    alone = [DECODE[f"decode-llama3-8b-b{batch}-{keys}k"] for batch, keys in ((1, 16), (8, 2))]
    for page, fp8, batch in ((16, False, 8), (64, False, 8), (0, True, 16), (16, True, 16), (64, True, 16)):
        words = [f"b{batch} 8k", *(["e4m3"] if fp8 else []), *([f"pages of {page}"] if page else [])]
        alone.append(_step(" ".join(words), batch, 8, page=page, fp8=fp8))
    alone += [_step(f"b1 {keys}k, 4 key heads", 1, keys, kv_heads=4) for keys in _LATENCIES]
    one_long: dict[str, Any] = {"bias": "b11k", "bias_values": "one-longest+padding"}
    alone += [DECODE["decode-ragged"], DECODE["decode-ragged-one-long"], _step("one of 128k, 63 of 1k", 64, 128, **one_long)]
    jobs += [Job(w, ("triflash",), ("fwd",)) for w in alone]
    several = (DECODE["decode-speculative-m8"], _step("b16 1k, 8 queries", 16, 1, 8), _step("b16 8k e4m3, 8 queries", 16, 8, 8, fp8=True))
    jobs += [Job(w, ("triflash", "triflash-onequery"), ("fwd",)) for w in several]
    jobs += [Job(_step("b8 8k, bias bh1k", 8, 8, bias="bh1k"), ("triflash", "triflash-nobias"), ("fwd",))]
    sizes = [(32, 1, 8192, 32, 8), (1, 1, 65536, 32, 8), *((b, m, n, 16, 16) for b, m, n in ((8, 1, 8192), (8, 64, 8192), (8, 16, 4096)))]
    sizes += [(8, 4, 32768, 16, 16), (2, 64, 8192, 16, 16)]
    jobs += [Job(_few(*each), ("triflash", "sdpa-cudnn"), ("fwd", "bwd")) for each in sizes]

    def cache_of(cell: Cell) -> int:
        w = Workload(**cell.workload)
        return w.bytes("fwd") if w.cache and w.queries == 1 and w.bias is None and w.kv_heads == 8 else 0

    def bar(name: str, kind: str, bound: float, *peers: str, of: Callable[[Cell], bool], which: str = "fwd", **more: Any) -> Bar:
        return Bar(name, "triflash", which, kind, bound, peers, of=of, **more)

    def is_few(cell: Cell) -> bool:
        return not cell.workload["cache"]

    def is_cache(cell: Cell) -> bool:
        return not is_few(cell)

    def named(*names: str) -> Callable[[Cell], bool]:
        return lambda cell: cell.name.removesuffix(" (tiny)") in names

    with_peers = [job.workload.name for job in jobs if "flex" in job.providers]
    return Sweep(
        "steps of decoding, in pages, in 8 bits, ragged, with biases, and attention of few queries: bandwidth, cuDNN, FlexDecoding",
        tuple(jobs),
        (
            bar("caches from 256 MB on", "copy", 0.9, of=lambda cell: cache_of(cell) >= 2**28),
            bar("caches of 64 MB", "copy", 0.8, of=lambda cell: 2**26 <= cache_of(cell) < 2**27),
            bar("ragged", "copy", 0.85, of=lambda cell: is_cache(cell) and "padding" in cell.workload["bias_values"]),
            *(bar(f"b1 {n}k, 4 key heads", "ms", us / 1e3, of=named(f"b1 {n}k, 4 key heads"), on="H100") for n, us in _LATENCIES.items()),
            bar("beside cuDNN", "speed", 1.0, "sdpa-cudnn", of=named(*with_peers), mean=1.1),
            bar("beside FlexDecoding", "speed", 1.0, "flex", of=named(*with_peers), mean=1.1),
            bar("b1 64k beside FlashAttention-4", "speed", 3.0, "fa4", of=named("decode-llama3-8b-b1-64k")),
            bar("bias bh1k, to none", "time", 1.1, "triflash-nobias", of=lambda cell: cell.workload["bias"] == "bh1k"),
            bar("8 queries, to one", "time", 1.15, "triflash-onequery", of=lambda cell: is_cache(cell) and cell.workload["queries"] > 1),
            *_each("attention of few queries, beside cuDNN", "speed", {"fwd": 1.0, "bwd": 1.0}, "sdpa-cudnn", of=is_few),
            bar("host, to SDPA's", "time", 1.3, "sdpa", "sdpa-cudnn", of=is_cache, which="host-nograd"),
        ),
        budget=0.05,
    )


def _published() -> Sweep:
    """The grid of docs/results/2026-11-26-h200."""
    grid, both = _grid((64, 128, 256), (512, 2048, 8192, 16384)), ("sdpa-cudnn", "fa4")
    return Sweep(
        "the published table without a bias, beside cuDNN (SDPA) and FlashAttention-4",
        tuple(Job(w, ("triflash", *both), ("fwd", "bwd")) for w in grid),
        (
            *_each("beside the faster of both", "speed", {"fwd": 1.0}, *both, every=True, mean=1.05),
            *_each("beside the faster of both", "speed", {"bwd": 0.97}, *both, every=True, mean=1.03),
            *_each("beside cuDNN", "speed", {"fwd": 1.0, "bwd": 0.97}, "sdpa-cudnn", mean=1.1),
            *_each("beside FlashAttention-4", "speed", {"fwd": 1.0, "bwd": 0.97}, "fa4"),
        ),
        budget=0.08,
    )


SWEEPS = {
    "host": _host(),
    "models": _models(),
    "features": _features(),
    "folding": _folding(),
    "portable": _portable(),
    "decode": _decode(),
    "packed": _packed(),
    "published": _published(),
}
