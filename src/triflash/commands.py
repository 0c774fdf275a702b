"""The options of ``triflash explain``, ``env`` and ``tune``, and what the first two do."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any

import torch

from . import shorthand
from .plan.device import KNOWN_DEVICES
from .plan.overlay import tuned
from .plan.select import BACKENDS

__all__ = ["add_explain", "add_problem", "explain"]

_size, _sizes = shorthand.option(shorthand.size), shorthand.option(shorthand.items(shorthand.size))


def add_problem(parser: argparse.ArgumentParser) -> None:
    """One problem, or with commas several."""
    parser.add_argument("--d", type=_sizes, default=[64], metavar="D", help="head dim (default 64)")
    parser.add_argument("--s", type=_sizes, default=[2048], metavar="S", help="sequence length; 4k is 4096 (default 2k)")
    parser.add_argument("--sk", type=_sizes, metavar="N", help="length of the keys (default that of the queries)")
    parser.add_argument("--b", type=_size, default=4, metavar="B", help="batch (default 4)")
    parser.add_argument("--h", type=_size, default=16, metavar="H", help="heads (default 16)")
    parser.add_argument("--dtype", type=shorthand.option(shorthand.dtype), default=torch.bfloat16, help="fp16, bf16, fp32, fp64 (default bf16)")
