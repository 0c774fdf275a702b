"""The demo's command line and its defaults. Standard library only."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

__all__ = ["GRADIENT_TOLERANCE", "TOLERANCE", "Options", "add_arguments"]

TOLERANCE = {"fp32": 0.02, "bf16": 0.05, "fp16": 0.05}  # nats per byte by which the two trainings' losses may differ at a checkpoint

# Relative difference of the bias's gradient at the first step. In 16 bits it is the dense model that rounds its scores.
GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.02}

# Sized so that a laptop's two cores finish both trainings well within three minutes, and that a GPU has something to do.
_CPU = {"steps": 200, "seq_len": 512, "batch": 6, "layers": 2, "heads": 4, "dim": 128, "dtype": "fp32"}
_GPU = {"steps": 400, "seq_len": 2048, "batch": 4, "layers": 4, "heads": 8, "dim": 512, "dtype": "bf16"}


@dataclass(frozen=True)
class Options:
    """Everything that one training depends on, as plain values: it travels to the training processes as JSON."""

    steps: int
    seq_len: int
    batch: int
    layers: int
    heads: int
    dim: int
    seed: int
    device: str
    dtype: str
    backend: str
    out: str
    text: str | None

    @property
    def checkpoints(self) -> list[int]:
        """Steps after which both losses are measured: the start, the end and up to eight between."""
        return sorted({round(self.steps * i / 8) for i in range(9)})

    @classmethod
    def of(cls, given: argparse.Namespace, gpu: bool) -> Options:
        """Fill what the user left open with the defaults of the device. Raises ValueError naming a bad option."""
        device = given.device or ("cuda" if gpu else "cpu")
        if device.startswith("cuda") and not gpu:
            raise ValueError(f"--device {device}: PyTorch sees no GPU here")
        chosen = {name: getattr(given, name) for name in cls.__dataclass_fields__}
        for name, default in (_GPU if device.startswith("cuda") else _CPU).items():
            if chosen[name] is None:
                chosen[name] = default
        chosen |= {"device": device, "out": str(given.out), "text": None if given.text is None else str(given.text)}
        options = cls(**chosen)
        if options.dim % options.heads:
            raise ValueError(f"--heads {options.heads}: must divide --dim {options.dim}")
        if options.device == "cpu" and options.dtype == "fp16":
            raise ValueError("--dtype fp16: trains on a GPU only; use fp32 or bf16")
        return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


_positive.__name__ = "int"  # argparse names the type in its message


def _device(text: str) -> str:
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:N")
    return text


def add_arguments(parser: argparse.ArgumentParser, backends: tuple[str, ...]) -> None:
    """The options of ``triflash demo``."""
    for name, words in (
        ("steps", "optimiser steps"),
        ("seq-len", "bytes of context"),
        ("batch", "sequences per step"),
        ("layers", "transformer layers"),
        ("heads", "attention heads"),
        ("dim", "model width"),
    ):
        key = name.replace("-", "_")
        parser.add_argument(f"--{name}", type=_positive, metavar="N", help=f"{words} (default {_CPU[key]}; on a GPU {_GPU[key]})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights and the batches (default 0)")
    parser.add_argument("--device", type=_device, metavar="DEVICE", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), help="of products and attention; weights stay fp32 (default fp32; GPU bf16)")
    parser.add_argument("--backend", choices=backends, default="auto", help="of triflash (default auto)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="train on this file instead of Python's language reference")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="where the picture and numbers go (./demo-out)")
