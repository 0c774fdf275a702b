"""One training run in a process of its own, so that its peak memory is its own: ``python -m triflash.cli.demo.train NAME OPTIONS_AS_JSON``.

Started by ``run``. Writes one JSON object per line to stdout: ``{"step", "loss"}`` after each step, ``{"at", "train", "val"}`` at each
checkpoint, ``{"result": …}`` at the end, or ``{"error": …}``.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import triflash

from . import text
from .memory import Memory
from .model import ATTENTIONS, Decoder, relative_buckets
from .options import Options

__all__ = ["main"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PEAK_RATE, _EVAL_BATCHES = 0.4, 4  # the peak rate is this over the width: 3e-3 at 128
_BIAS_RATE = 5e-2  # a head that attends to one distance needs a bias of several units, and has some hundred steps to get there
_PROMPT, _SAMPLED = b"The ", 160


def main(name: str, options: Options) -> None:
    """Train the model called ``name`` and report as the module says."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    corpus = text.load(text.read(Path(options.text) if options.text else None), options.seq_len)
    torch.manual_seed(options.seed)
    model = Decoder(options.seq_len, options.layers, options.heads, options.dim, ATTENTIONS[name], dtype).to(device)
    bias, rest = model.relative_bias.weight, [p for n, p in model.named_parameters() if n != "relative_bias.weight"]
    groups = [{"params": rest, "peak": _PEAK_RATE / options.dim}, {"params": [bias], "peak": _BIAS_RATE, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01)
    batches = torch.Generator().manual_seed(options.seed)

    def batch(part: str, generator: torch.Generator) -> list[Tensor]:
        return [x.to(device) for x in corpus.batch(part, options.batch, options.seq_len, generator)]

    @torch.no_grad()
    def evaluate(part: str) -> float:
        fixed = torch.Generator().manual_seed(options.seed + 1)
        return sum(model.loss(*batch(part, fixed)).item() for _ in range(_EVAL_BATCHES)) / _EVAL_BATCHES

    def checkpoint(at: int) -> None:
        if at in options.checkpoints:
            emit(at=at, train=evaluate("train"), val=evaluate("held_out"))

    checkpoint(0)
    memory, seconds, launches, first_gradient = Memory(device), [], [], torch.zeros(0)
    for step in range(options.steps):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * rate(step, options.steps)
        tokens, targets = batch("train", batches)
        start = clock(device)
        with triflash.record_launches() as ran:
            loss = model.loss(tokens, targets)
            loss.backward()
        if step == 0:
            launches, first_gradient = ran, gradient(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        seconds.append(clock(device) - start)
        emit(step=step + 1, loss=loss.item())
        if step + 1 == options.steps:
            peak = memory.peak()  # of training alone, before the last evaluation
        checkpoint(step + 1)

    distances = torch.arange(options.seq_len)
    with torch.no_grad():
        learned = model.relative_bias(relative_buckets(distances).to(device)).T
    emit(
        result={
            "seconds": sum(seconds),
            "seconds_per_step": sorted(seconds)[len(seconds) // 2],
            "peak_bytes": peak,
            "launches": dict(Counter(launches)),
            "first_bias_gradient": first_gradient.tolist(),
            "bias_by_distance": learned.tolist(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "sample": sample(model, options.seq_len, options.seed),
        }
    )


def rate(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then half a cosine down to a tenth."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def gradient(model: Decoder) -> Tensor:
    """The gradient of the learned bias, ``(buckets, heads)``."""
    grad = model.relative_bias.weight.grad
    return torch.zeros(0) if grad is None else grad.detach().cpu()


@torch.no_grad()
def sample(model: Decoder, length: int, seed: int) -> str:
    """A few words from the model, byte by byte at temperature 0.6. Zeros to the right of the text are in its future, so it sees none."""
    generator = torch.Generator().manual_seed(seed)
    data = list(_PROMPT)
    for _ in range(_SAMPLED):
        window = data[-length:]
        tokens = torch.zeros(1, length, dtype=torch.long)
        tokens[0, : len(window)] = torch.tensor(window)
        logits = model(tokens.to(model.buckets.device))[0, len(window) - 1].cpu()
        data.append(int(torch.multinomial(torch.softmax(logits / 0.6, -1), 1, generator=generator)))
    return bytes(data).decode(errors="replace")


def clock(device: torch.device) -> float:
    """Seconds, once the device has caught up."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def emit(**event: Any) -> None:
    """One line for the parent process."""
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    chosen = Options(**json.loads(sys.argv[2]))
    try:
        with triflash.backend(chosen.backend):
            main(sys.argv[1], chosen)
    except (triflash.UnsupportedError, ValueError, OSError, torch.OutOfMemoryError) as error:
        emit(error=str(error).splitlines()[0])
        sys.exit(1)
