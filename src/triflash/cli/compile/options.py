"""The command line of ``triflash compile``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .. import explain_options, shorthand
from .problems import PASSES

__all__ = ["add_arguments", "defaults"]

_OWN = ("command", "workload", "passes", "workers", "cache")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``triflash compile``: named workloads or one problem at several lengths, and how to go about it."""
    parser.add_argument(
        "--workload", type=_names, metavar="NAMES", help="named workloads of triflash bench, comma-separated, instead of a problem"
    )
    parser.add_argument(
        "--pass",
        dest="passes",
        type=_passes,
        default=list(PASSES),
        metavar="NAMES",
        help="fwd: a forward pass without autograd; bwd: a step of training (default both)",
    )
    explain_options.add_problem(parser, several=True)
    parser.add_argument(
        "--workers",
        type=shorthand.option(shorthand.size),
        default=min(16, os.cpu_count() or 1),
        metavar="N",
        help="processes that compile (default: all cores, up to 16)",
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="the cache to fill (default: TRITON_CACHE_DIR, else ~/.triton/cache)")


def defaults(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Of the options that describe a problem and where it runs."""
    return {name: value for name, value in vars(parser.parse_args([])).items() if name not in _OWN}


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("wanted at least one name, got none")
    return names


def _passes(text: str) -> list[str]:
    names = _names(text)
    for name in names:
        if name not in PASSES:
            raise argparse.ArgumentTypeError(f"{name}: wanted some of {', '.join(PASSES)}")
    return names
