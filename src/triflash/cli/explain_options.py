"""``triflash explain`` on the command line: options, and meta tensors of the problem that they describe. ``compile`` takes them, too."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..errors import bad_value
from ..explainer import explain
from ..explanation import Explanation
from ..plan.device import KNOWN_DEVICES, NAMED_DEVICES
from ..plan.overlay import load, tuned
from ..plan.select import BACKENDS
from . import shorthand

__all__ = ["add_arguments", "add_problem", "asked", "explanation", "using"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``triflash explain``."""
    add_problem(parser)
    parser.add_argument(
        "--grads", default="all", metavar="qkvbs", help="gradients wanted: letters of qkvbs (s: sink), all (default) or none"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the kernels and tell registers, spills and shared memory; needs no GPU"
    )


def add_problem(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """What describes a problem, where it runs, and by which backend. several: ``--s`` takes a list of lengths."""
    size, dtype = shorthand.option(shorthand.size), shorthand.option(shorthand.dtype)
    parser.add_argument("--d", type=size, default=64, metavar="D", help="head dim (default 64)")
    if several:
        lengths = shorthand.option(shorthand.items(shorthand.size))
        parser.add_argument("--s", type=lengths, default=[2048], metavar="S,…", help="sequence lengths; 4k is 4096 (default 2k)")
    else:
        parser.add_argument("--s", type=size, default=2048, metavar="S", help="sequence length; 4k is 4096 (default 2k)")
    parser.add_argument("--sk", type=size, metavar="N", help="length of the keys (default that of the queries)")
    parser.add_argument("--b", type=size, default=4, metavar="B", help="batch (default 4)")
    parser.add_argument("--h", type=size, default=16, metavar="H", help="heads (default 16)")
    parser.add_argument("--dtype", type=dtype, default=torch.bfloat16, metavar="TYPE", help="bf16 (default), fp16, fp32, fp64")
    parser.add_argument("--causal", action="store_true", help="hide later keys, aligned to the bottom right")
    parser.add_argument(
        "--bias", type=shorthand.option(shorthand.bias_pattern), metavar="1hqk", help="shape of a bias: a letter where it varies"
    )
    parser.add_argument("--bias-dtype", type=dtype, metavar="TYPE", help="(default that of q)")
    parser.add_argument("--hk", type=size, metavar="HK", help="key heads (default that of the queries)")
    parser.add_argument("--mask", type=shorthand.option(shorthand.mask_pattern), metavar="b11k", help="shape of a boolean mask")
    parser.add_argument("--window", type=shorthand.option(_window), metavar="L,R", help="keys to the left and right of a query; -1 is open")
    parser.add_argument("--lengths", action="store_true", help="a number of keys for each batch entry")
    for name, what in (("query-starts", "the first query"), ("query-lengths", "a number of queries"), ("key-starts", "the first key")):
        parser.add_argument(f"--{name}", action="store_true", help=f"{what} for each batch entry")
    parser.add_argument("--diagonal", type=int, metavar="D", help="the key at which the first query stands (default N - M)")
    parser.add_argument("--diagonals", action="store_true", help="one for each batch entry, read on the device")
    parser.add_argument("--softcap", type=float, metavar="C", help="bound of the scaled products")
    parser.add_argument("--alibi", action="store_true", help="ALiBi slopes")
    parser.add_argument("--sink", action="store_true", help="a sink for each head")
    parser.add_argument("--dropout", type=float, metavar="P", help="probability of dropout")
    parser.add_argument("--deterministic", action="store_true", help="the same bits in every run, as PyTorch's deterministic mode asks for")
    parser.add_argument("--backend", choices=BACKENDS, help="as with triflash.backend (default: TRIFLASH_BACKEND, else auto)")
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help=f"{', '.join((*KNOWN_DEVICES, *NAMED_DEVICES))}, cuda, cuda:1 … (default: this machine's GPU, else its CPU)",
    )
    parser.add_argument("--tuned", type=Path, metavar="FILE", help="as with triflash.tuned")


def explanation(given: argparse.Namespace) -> Explanation:
    """The explanation asked for. Raises ValueError, TypeError or UnsupportedError as :func:`triflash.explain` does."""
    tensors, options = asked(given)
    with using(given.tuned):
        return explain(
            *tensors,
            grads=_gradients(given.grads, options["bias"] is not None, given.sink),
            backend=given.backend,
            device=given.device,
            compile=given.compile,
            **{name: value for name, value in options.items() if value is not None},
        )


def using(file: Path | None) -> AbstractContextManager[None]:
    """A tuned file within a block, checked before; None leaves things as they are."""
    if file is None:
        return nullcontext()
    load(file, "--tuned")
    return tuned(file)


def asked(given: argparse.Namespace) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, Any]]:
    """q, k and v, meta tensors, and the other arguments of ``triflash.attention``; None where one is absent. Raises ValueError."""

    def empty(*shape: int, dtype: torch.dtype = given.dtype) -> torch.Tensor:
        try:
            return torch.empty(shape, dtype=dtype, device="meta")
        except RuntimeError:  # its bytes do not fit 64 bits
            raise bad_value("--b, --s, --h, --d", "sizes of tensors below 2^63 bytes", f"a tensor of {shape}") from None

    keys = given.sk or given.s
    q, k = empty(given.b, given.s, given.h, given.d), empty(given.b, keys, given.hk or given.h, given.d)
    bias = None
    if given.bias is not None:
        bias = empty(*shorthand.bias_shape(given.bias, given.b, given.h, given.s, keys), dtype=given.bias_dtype or given.dtype)
    if given.diagonals and given.diagonal is not None:
        raise bad_value("--diagonals", "no --diagonal beside them", given.diagonal)
    named = ("key_lengths", "query_starts", "query_lengths", "key_starts", "diagonal")
    wanted = (given.lengths, given.query_starts, given.query_lengths, given.key_starts, given.diagonals)
    options: dict[str, Any] = {
        "bias": bias,
        "causal": given.causal,
        "mask": None if given.mask is None else empty(*shorthand.bias_shape(given.mask, given.b, given.h, given.s, keys), dtype=torch.bool),
        "window": given.window,
        **dict(zip(named, (empty(given.b, dtype=torch.int32) if there else None for there in wanted), strict=True)),
        "softcap": given.softcap,
        "alibi_slopes": empty(given.h, dtype=torch.float32) if given.alibi else None,
        "sink": empty(given.h) if given.sink else None,
        "dropout_p": given.dropout,
        "deterministic": True if given.deterministic else None,
    }
    if given.diagonal is not None:
        options["diagonal"] = given.diagonal
    return (q, k, k), options


def _window(text: str) -> tuple[int, int]:
    """``128,0``: the two sides of a window."""
    left, comma, right = text.partition(",")
    try:
        return int(left), int(right if comma else left)
    except ValueError:
        raise bad_value("window", "two numbers such as 128,0 (-1 is open)", repr(text)) from None


def _gradients(text: str, bias: bool, sink: bool) -> list[str]:
    names = {"q": "q", "k": "k", "v": "v", "b": "bias", "s": "sink"}
    if text in ("all", "none"):
        there = {"bias": bias, "sink": sink}
        return [name for name in names.values() if text == "all" and there.get(name, True)]
    if not text or any(letter not in names for letter in text):
        raise bad_value("--grads", "letters of qkvbs, all or none", repr(text))
    return [names[letter] for letter in text]
