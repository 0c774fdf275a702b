"""The command line of ``triflash tune`` as values."""

from __future__ import annotations

import argparse
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ...plan.configs import MAX_HEAD_DIM
from ...plan.device import KNOWN_DEVICES
from ...plan.overlay import TUNABLE
from ...spec import PRECISIONS
from .. import shorthand
from .cases import Case

__all__ = ["Options", "add_arguments"]

_size = shorthand.option(shorthand.size)
_sizes = shorthand.option(shorthand.items(shorthand.size))


@dataclass(frozen=True)
class Options:
    """cases: what to measure. budget: seconds for a configuration. margin: by how much (0.01: one percent) the default must be beaten.
    spills: words a thread that a configuration may spill and still be tried. device: compile for it only, measure nothing.
    """

    cases: tuple[Case, ...]
    kernels: tuple[str, ...]
    out: Path
    log: Path | None
    budget: float
    margin: float
    spills: int
    workers: int
    device: str | None

    @classmethod
    def of(cls, given: argparse.Namespace) -> Options:
        """Check the options together. Raises ValueError naming a bad one."""
        if given.causal is None:
            given.causal = (False,)
        compilable = [arch for arch in KNOWN_DEVICES if arch.startswith(("sm", "gfx"))]
        if given.device is not None and given.device not in compilable:
            raise ValueError(f"--compile-only {given.device}: wanted one of {', '.join(compilable)}")
        for name in given.kernels:
            if name not in TUNABLE:
                raise ValueError(f"--kernels {name}: wanted some of {', '.join(TUNABLE)}")
        if given.dtype == torch.float64:
            raise ValueError("--dtype fp64: the Triton kernels do not take it")
        for d in given.d:
            if d > MAX_HEAD_DIM:
                raise ValueError(f"--d {d}: the Triton kernels take head dims up to {MAX_HEAD_DIM}")
        for path in (given.out, given.log):
            if path is not None and not path.absolute().parent.is_dir():
                raise ValueError(f"{path}: its folder does not exist")
        cases = tuple(
            Case(
                _batch(given, s),
                s,
                given.sk or s,
                _heads(given, d),
                d,
                given.dtype,
                bias,
                causal,
                bias is not None and given.dbias,
                precision=given.precision if given.dtype == torch.float32 else "",
            )
            for d, s, causal, bias in itertools.product(given.d, given.s, given.causal, given.bias)
        )
        return cls(
            cases,
            tuple(given.kernels),
            given.out,
            given.log,
            given.budget,
            given.margin / 100,
            given.spills,
            given.workers,
            given.device,
        )


def _batch(given: argparse.Namespace, s: int) -> int:
    return int(given.b) if given.tokens is None else shorthand.quotient("--tokens", given.tokens, "--s", s)


def _heads(given: argparse.Namespace, d: int) -> int:
    return int(given.h) if given.hd is None else shorthand.quotient("--hd", given.hd, "--d", d)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must be a number from 0 up")
    return value


def _kernels(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``triflash tune``; commas give several problems, and every combination is measured."""
    biases = shorthand.option(shorthand.items(shorthand.bias_pattern))
    parser.add_argument("--d", type=_sizes, default=[64], metavar="D,…", help="head dims (default 64)")
    parser.add_argument("--s", type=_sizes, default=[2048], metavar="S,…", help="sequence lengths; 4k is 4096 (default 2k)")
    parser.add_argument("--sk", type=_size, metavar="N", help="length of the keys (default that of the queries)")
    parser.add_argument("--b", type=_size, default=4, metavar="B", help="batch (default 4)")
    parser.add_argument("--h", type=_size, default=16, metavar="H", help="heads (default 16)")
    parser.add_argument("--tokens", type=_size, metavar="T", help="instead of --b: batch * length")
    parser.add_argument("--hd", type=_size, metavar="W", help="instead of --h: heads * head dim")
    parser.add_argument(
        "--dtype", type=shorthand.option(shorthand.dtype), default=torch.bfloat16, metavar="TYPE", help="bf16 (default), fp16, fp32"
    )
    parser.add_argument(
        "--causal",
        type=shorthand.option(shorthand.causal),
        nargs="?",
        const=(True,),
        metavar="both",
        help="causal; 'both': with and without",
    )
    parser.add_argument("--bias", type=biases, default=[None], metavar="1hqk,…", help="shapes of a bias; none (default) for no bias")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="",
        help="of float32 products (default: PyTorch's setting)",
    )
    parser.add_argument("--no-dbias", dest="dbias", action="store_false", help="the bias asks for no gradient")
    parser.add_argument("--kernels", type=_kernels, default=list(TUNABLE), metavar="NAME,…", help=f"only these of {', '.join(TUNABLE)}")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("triflash-tuned.json"),
        metavar="FILE",
        help="the file to write, or to add to (./triflash-tuned.json)",
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="also write every configuration with its times, as JSON")
    parser.add_argument(
        "--budget",
        type=_number,
        default=0.1,
        metavar="SEC",
        help="seconds to time a configuration (default 0.1; finalists get four times that)",
    )
    parser.add_argument(
        "--margin", type=_number, default=1.0, metavar="PERCENT", help="how much faster than the default it must be (default 1)"
    )
    parser.add_argument("--spills", type=_size, default=64, metavar="WORDS", help="leave out what spills more words a thread (default 64)")
    parser.add_argument(
        "--workers",
        type=_size,
        default=min(16, os.cpu_count() or 1),
        metavar="N",
        help="processes that compile (default: all cores, up to 16)",
    )
    parser.add_argument(
        "--compile-only",
        dest="device",
        metavar="ARCH",
        help="compile for sm80, sm90, gfx942, … and list what is feasible; needs no GPU, writes no --out",
    )
