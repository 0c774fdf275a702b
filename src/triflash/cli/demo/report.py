"""What the demo found: the comparison, the tables on screen, the picture and the numbers on disk."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

import triflash

from .options import GRADIENT_TOLERANCE, TOLERANCE, Options

__all__ = ["compare", "show", "write"]

Runs = dict[str, dict[str, Any]]


def compare(options: Options, runs: Runs) -> dict[str, Any]:
    """How far the two trainings lie apart, and whether that is within the tolerances of their dtype. A NaN agrees with nothing.

    Judged are the losses at the checkpoints (means over several batches) and the gradient of the bias at the first step, before rounding
    has had steps to grow; the losses of single batches in between are reported.
    """
    ours, dense = runs["triflash"], runs["dense"]
    at_checkpoints = [
        largest([abs(a[part] - b[part]) for part in ("train", "val")])
        for a, b in zip(ours["checkpoints"], dense["checkpoints"], strict=True)
    ]
    per_step = [abs(a - b) for a, b in zip(ours["losses"], dense["losses"], strict=True)]
    a, b = (torch.tensor(run["first_bias_gradient"], dtype=torch.float64) for run in (ours, dense))
    tolerance, gradient_tolerance = TOLERANCE[options.dtype], GRADIENT_TOLERANCE[options.dtype]
    gradient = float((a - b).norm() / b.norm())
    return {
        "at_checkpoints": at_checkpoints,
        "per_step": per_step,
        "largest": largest(at_checkpoints),
        "largest_of_a_step": largest(per_step),
        "tolerance": tolerance,
        "gradient_tolerance": gradient_tolerance,
        "agree": largest(at_checkpoints) <= tolerance and not math.isnan(largest(per_step)) and gradient <= gradient_tolerance,
        "first_bias_gradient_norm": float(a.norm()),
        "first_bias_gradient_relative_difference": gradient,
    }


def largest(values: list[float]) -> float:
    """The maximum, or NaN if there is one (``max`` would pass it over)."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def show(console: Console, options: Options, runs: Runs, comparison: dict[str, Any]) -> None:
    """Print the tables, a sample of what the model writes, and the verdict."""
    ours, dense = runs["triflash"], runs["dense"]
    losses = Table(title="\nLoss, nats per byte", title_justify="left")
    for heading in ("step", "train\ntriflash", "train\ndense", "val\ntriflash", "val\ndense", "largest\ndifference"):  # within 80 columns
        losses.add_column(heading, justify="right")
    for a, b, apart in zip(ours["checkpoints"], dense["checkpoints"], comparison["at_checkpoints"], strict=True):
        cells = [f"{run[part]:.4f}" for part in ("train", "val") for run in (a, b)]
        losses.add_row(str(a["at"]), *cells, f"{apart:.1e}")
    console.print(losses)

    cost = Table(title="\nCost and path", title_justify="left")
    for heading in ("", "triflash", "PyTorch dense"):
        cost.add_column(heading)
    gpu = options.device != "cpu"
    cost.add_row("time of the steps", *(f"{run['seconds']:.1f} s ({1e3 * run['seconds_per_step']:.0f} ms each)" for run in (ours, dense)))
    memory = "peak memory, all of training" if gpu else "peak memory above start"
    cost.add_row(memory, *(f"{run['peak_bytes'] / 2**20:,.0f} MiB" for run in (ours, dense)))
    ran = [f"{count} x {launch}" for launch, count in ours["launches"].items()]
    cost.add_row("what ran in one step", "\n".join(ran), "softmax(q kᵀ + bias) v")
    console.print(cost)

    console.print(Panel(ours["sample"].strip(), title="the triflash model writes", title_align="left"), markup=False, highlight=False)
    relative = comparison["first_bias_gradient_relative_difference"]
    console.print(
        f"Gradient of the bias at the first step: relative difference {relative:.1e} (tolerance {comparison['gradient_tolerance']}).",
        highlight=False,
    )
    verdict = (
        f"Largest difference of the losses at a checkpoint: {comparison['largest']:.1e} (tolerance {comparison['tolerance']}); "
        f"of a single batch: {comparison['largest_of_a_step']:.1e}."
    )
    if comparison["agree"]:
        console.print(f"[green]The two trainings agree.[/green] {verdict}", highlight=False)
    else:
        console.print(f"[red]The two trainings DISAGREE.[/red] {verdict}", highlight=False)


def write(out: Path, options: Options, runs: Runs, comparison: dict[str, Any]) -> list[Path]:
    """Write ``demo.png`` and ``demo.json`` and return their paths."""
    picture, numbers = out / "demo.png", out / "demo.json"
    _draw(picture, options, runs, comparison)
    versions = {"triflash": triflash.__version__, "torch": torch.__version__, "python": platform.python_version()}
    device = torch.cuda.get_device_name(options.device) if options.device != "cpu" else platform.processor() or platform.machine()
    content = {"options": asdict(options), "versions": versions, "device": device, "comparison": comparison, "runs": runs}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    numbers.write_text(f"{{\n{lines}\n}}\n")
    return [picture, numbers]


def _draw(path: Path, options: Options, runs: Runs, comparison: dict[str, Any]) -> None:
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 3, height_ratios=(3, 1), width_ratios=(1.1, 1, 1))
    steps = range(1, options.steps + 1)

    loss = figure.add_subplot(grid[0, 0])
    styles = {"triflash": ("tab:blue", "-", 3.0, "o"), "dense": ("black", "--", 1.0, "x")}
    for name, (colour, line, width, marker) in styles.items():
        run = runs[name]
        loss.plot(steps, run["losses"], line, color=colour, linewidth=width, label=f"{name}, training batch")
        at, val = zip(*((c["at"], c["val"]) for c in run["checkpoints"]), strict=True)
        loss.plot(at, val, marker, color="tab:orange" if name == "triflash" else colour, markersize=6, label=f"{name}, held-out text")
    loss.set(ylabel="loss, nats per byte", title="One seed, the same batches: the curves coincide")
    loss.legend(frameon=False)
    loss.tick_params(labelbottom=False)

    apart = figure.add_subplot(grid[1, 0], sharex=loss)
    apart.semilogy(steps, [d or math.nan for d in comparison["per_step"]], ".", color="tab:red", markersize=3)  # a log axis has no 0
    apart.axhline(comparison["tolerance"], color="grey", linestyle=":")
    apart.annotate("tolerance", (options.steps, comparison["tolerance"]), ha="right", va="top", color="grey", fontsize=8)
    apart.set(xlabel="step", ylabel="|difference|", ylim=(1e-8, 10 * comparison["tolerance"]))

    bias = runs["triflash"]["bias_by_distance"]
    far = min(len(bias[0]), 2 * 256)
    curves = figure.add_subplot(grid[:, 1])
    colours = [f"C{head % 10}" for head in range(len(bias))]
    for head, (values, colour) in enumerate(zip(bias, colours, strict=True)):
        curves.plot(range(far), values[:far], color=colour, drawstyle="steps-mid", linewidth=1.6, label=f"head {head}")
    curves.axhline(0, color="grey", linewidth=0.6)
    curves.set_xscale("symlog", linthresh=16, base=2)
    ticks = [d for d in (0, 4, 8, 16, 32, 64, 128, 256, 512) if d < far]
    curves.set_xticks(ticks, map(str, ticks))
    curves.set(xlim=(0, far), xlabel="distance i − j", ylabel="added to the scores", title="The bias that was learned, from zero")
    curves.legend(frameon=False, ncols=1 + len(bias) // 9)

    near = min(far, 33)
    heat = figure.add_subplot(grid[:, 2])
    limit = max(abs(value) for values in bias for value in values[:near]) or 1.0
    image = heat.imshow([values[:near] for values in bias], aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    heat.set(xlabel="distance i − j", ylabel="head", yticks=range(len(bias)), title="The same near by")
    figure.colorbar(image, ax=heat, label="bias")

    figure.suptitle(
        f"triflash demo · {options.device}, {options.dtype} · {options.layers} layers × {options.heads} heads, context {options.seq_len} · "
        f"largest difference of the losses {comparison['largest']:.1e}",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
