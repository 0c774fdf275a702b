"""``triflash explain`` on the command line: options, and meta tensors of the problem that they describe."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch

from . import shorthand
from .errors import bad_value
from .explainer import explain
from .explanation import Explanation
from .plan.device import KNOWN_DEVICES
from .plan.overlay import load, tuned
from .plan.select import BACKENDS

__all__ = ["add_arguments", "explanation"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``triflash explain``."""
    size, dtype = shorthand.option(shorthand.size), shorthand.option(shorthand.dtype)
    parser.add_argument("--d", type=size, default=64, metavar="D", help="head dim (default 64)")
    parser.add_argument("--s", type=size, default=2048, metavar="S", help="sequence length; 4k is 4096 (default 2k)")
    parser.add_argument("--sk", type=size, metavar="N", help="length of the keys (default that of the queries)")
    parser.add_argument("--b", type=size, default=4, metavar="B", help="batch (default 4)")
    parser.add_argument("--h", type=size, default=16, metavar="H", help="heads (default 16)")
    parser.add_argument("--dtype", type=dtype, default=torch.bfloat16, metavar="TYPE", help="bf16 (default), fp16, fp32, fp64")
    parser.add_argument("--causal", action="store_true", help="hide later keys")
    parser.add_argument(
        "--bias", type=shorthand.option(shorthand.bias_pattern), metavar="1hqk", help="shape of a bias: a letter where it varies"
    )
    parser.add_argument("--bias-dtype", type=dtype, metavar="TYPE", help="(default that of q)")
    parser.add_argument("--grads", default="all", metavar="qkvb", help="gradients wanted: letters of qkvb, all (default) or none")
    parser.add_argument("--backend", choices=BACKENDS, help="as with triflash.backend (default: TRIFLASH_BACKEND, else auto)")
    parser.add_argument(
        "--device", metavar="DEVICE", help=f"{', '.join(KNOWN_DEVICES)}, cuda, cuda:1 … (default: this machine's GPU, else its CPU)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the kernels and tell registers, spills and shared memory; needs no GPU"
    )
    parser.add_argument("--tuned", type=Path, metavar="FILE", help="as with triflash.tuned")


def explanation(given: argparse.Namespace) -> Explanation:
    """The explanation asked for. Raises ValueError, TypeError or UnsupportedError as :func:`triflash.explain` does."""

    def empty(*shape: int, dtype: torch.dtype = given.dtype) -> torch.Tensor:
        try:
            return torch.empty(shape, dtype=dtype, device="meta")
        except RuntimeError:  # its bytes do not fit 64 bits
            raise bad_value("--b, --s, --h, --d", "sizes of tensors below 2^63 bytes", f"a tensor of {shape}") from None

    keys = given.sk or given.s
    q, k = empty(given.b, given.s, given.h, given.d), empty(given.b, keys, given.h, given.d)
    bias = None
    if given.bias is not None:
        bias = empty(*shorthand.bias_shape(given.bias, given.b, given.h, given.s, keys), dtype=given.bias_dtype or given.dtype)
    if given.tuned is not None:
        load(given.tuned, "--tuned")
    with nullcontext() if given.tuned is None else tuned(given.tuned):
        return explain(
            q,
            k,
            k,
            bias,
            given.causal,
            grads=_gradients(given.grads, bias),
            backend=given.backend,
            device=given.device,
            compile=given.compile,
        )


def _gradients(text: str, bias: torch.Tensor | None) -> list[str]:
    names = {"q": "q", "k": "k", "v": "v", "b": "bias"}
    if text in ("all", "none"):
        return [name for name in names.values() if text == "all" and (name != "bias" or bias is not None)]
    if not text or any(letter not in names for letter in text):
        raise bad_value("--grads", "letters of qkvb, all or none", repr(text))
    return [names[letter] for letter in text]
