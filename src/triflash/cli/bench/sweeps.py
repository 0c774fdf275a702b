"""Sweeps: several kinds of problems, each with its own providers and passes, and what the results are held to.

``host`` is what an eager call costs the host, and what an eager program sees of it, held to bars. ``models`` are the layers of many models,
held to their best peers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .flops import HOST_PASSES
from .models import LAYERS, MODELS
from .record import Cell, Run
from .workloads import Workload, short

__all__ = ["SWEEPS", "Bar", "Job", "Sweep", "Verdict", "verdicts"]


def _any(cell: Cell) -> bool:
    return True


@dataclass(frozen=True)
class Job:
    """A workload, who computes it, and in which passes. Of a sweep, no providers or passes: the device's defaults."""

    workload: Workload
    providers: tuple[str, ...]
    passes: tuple[str, ...]


@dataclass(frozen=True)
class Bar:
    """How much time a pass of ``ours`` may take: ``factor`` times that of the fastest of ``peers``; without peers, ``factor`` milliseconds.

    It applies to the cells in which these were measured, and of which ``of`` is true.
    """

    name: str
    ours: str
    which: str
    peers: tuple[str, ...]
    factor: float
    of: Callable[[Cell], bool] = _any


@dataclass(frozen=True)
class Verdict:
    """A bar in one cell. peer: which one bound, or nothing. bar_ms: what was allowed."""

    bar: Bar
    cell: Cell
    ours_ms: float
    peer: str
    peer_ms: float | None
    bar_ms: float

    @property
    def share(self) -> float:
        """Time over what was allowed: up to 1 the bar is met."""
        return self.ours_ms / self.bar_ms

    @property
    def facts(self) -> dict[str, Any]:
        """As data; times in milliseconds."""
        peer = {"peer": self.peer, "peer_ms": self.peer_ms, "factor": self.bar.factor} if self.bar.peers else {}
        mine = {"bar": self.bar.name, "case": self.cell.name, "provider": self.bar.ours, "pass": self.bar.which, "ms": self.ours_ms}
        return {**mine, **peer, "allowed_ms": self.bar_ms, "share": self.share, "met": self.share <= 1}


@dataclass(frozen=True)
class Sweep:
    """about: a line for ``--list``. cliffs: what is shown are the cells in which a peer is faster, and there are no bars."""

    about: str
    jobs: tuple[Job, ...]
    bars: tuple[Bar, ...] = ()
    cliffs: bool = False


def verdicts(run: Run, bars: tuple[Bar, ...]) -> list[Verdict]:
    """Every bar in every cell in which it could be looked at, bar by bar."""
    found = []
    for bar in bars:
        for cell in run.cells:
            row = run.row(cell, bar.ours, bar.which)
            if row is None or row.status != "ok" or not bar.of(cell):
                continue
            peers = {
                name: peer.median_ms for name in bar.peers if (peer := run.row(cell, name, bar.which)) is not None and peer.status == "ok"
            }
            if bar.peers and not peers:
                continue
            fastest = min(peers, key=peers.__getitem__) if peers else ""
            peer_ms = peers.get(fastest)
            found.append(Verdict(bar, cell, row.median_ms, fastest, peer_ms, bar.factor * (1.0 if peer_ms is None else peer_ms)))
    return found


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
    of_large = tuple(w.name for w in large)

    def is_plain(cell: Cell) -> bool:
        return not cell.workload["bias"]

    def is_biased(cell: Cell) -> bool:
        return not is_plain(cell)

    return Sweep(
        "what an eager call costs the host, beside SDPA and FlashAttention-4: forward and step, plain, with a bias, compiled, portable",
        tuple(jobs),
        (
            Bar("forward without autograd", "triflash", "host-nograd", sdpa, 1.3, is_plain),
            Bar("forward without autograd, with a bias, to SDPA without it", "triflash", "host-nograd", ("sdpa-nobias",), 1.3, is_biased),
            Bar("step", "triflash", "host-step", sdpa, 1.15, is_plain),
            Bar("step with a bias and its gradient, to SDPA without it", "triflash", "host-step", ("sdpa-nobias",), 1.5, is_biased),
            Bar("step with a bias and its gradient", "triflash", "host-step", ("sdpa-efficient",), 1.0, is_biased),
            Bar("compiled step", "triflash-compiled", "host-step", ("sdpa-compiled",), 1.3),
            Bar("portable step", "triflash-triton", "host-step", sdpa, 1.5, is_plain),
            Bar("eager step, wall time", "triflash", "eager", ("sdpa-cudnn", "fa4"), 1.0, lambda cell: cell.name.startswith(of_large)),
            Bar("first step at a new length", "triflash", "first", (), 2.0),
        ),
    )


def _models() -> Sweep:
    about = f"{len(LAYERS)} attention layers of {len(MODELS)} models, of which it shows those where a peer is faster; --count N draws some"
    return Sweep(about, tuple(Job(layer, (), ()) for layer in LAYERS.values()), cliffs=True)


SWEEPS = {"host": _host(), "models": _models()}
