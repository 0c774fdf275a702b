"""The pictures of a run: speed over length, speed and memory with a bias's gradient, and how triflash stands against the best peer."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from .flops import HOST_PASSES
from .record import Cell, Row, Run, write_whole
from .report import best_peer_ratio
from .workloads import short

__all__ = ["draw", "draw_picture"]

# Okabe and Ito's colours, which stay apart for colour-blind eyes; triflash takes the two strongest.
_OURS = ("#d55e00", "#0072b2", "#000000", "#882255")
_PEERS = ("#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#999933", "#44aa99")
_MARKERS = "osD^vPX*"
_WORDS = {
    "sdpa-efficient": "SDPA, memory-efficient", "sdpa-cudnn": "SDPA, cuDNN", "sdpa-flash": "SDPA, FlashAttention-2", "sdpa": "SDPA",
    "flex": "FlexAttention", "fa4": "FlashAttention-4", "dense": "plain PyTorch", "chunked": "plain PyTorch, in chunks",
}  # fmt: skip


def draw(run: Run, folder: Path) -> list[Path]:
    """Write the PNG files and return their paths.

    For each pass a picture of lines for every dtype and bias that was measured at several lengths, one of bars for all other workloads;
    where the gradient of a bias was asked for, a picture of speed and peak memory side by side; for steps of decoding that differ in the
    cache's length alone GB/s over it; and the heat map.
    """
    written = []
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in run.cells:
        if not cell.workload["about"]:  # of the grid, not a model's
            groups.setdefault((cell.dtype, cell.bias), []).append(cell)
    lines = {group: cells for group, cells in groups.items() if len({cell.workload["keys"] for cell in cells}) > 1}
    drawn = {cell.key for cells in lines.values() for cell in cells}
    bars = [cell for cell in run.cells if cell.key not in drawn]
    steps = _steps(bars)
    for which in run.passes:
        if which in HOST_PASSES or which == "first":
            continue
        safe = which.replace("+", "-")
        for (dtype, bias), cells in lines.items():
            figure = _lines(run, which, dtype, bias, cells)
            written.append(_write(figure, folder / f"speed-{safe}-{bias.replace('+', '-')}-{dtype}.png"))
            if bias.endswith("+db") and _has_peaks(run, which, cells):
                figure = _memory_lines(run, which, dtype, bias, cells)
                written.append(_write(figure, folder / f"memory-{safe}-{bias.replace('+', '-')}-{dtype}.png"))
        if steps and any(cell.bytes.get(which) for own in steps.values() for cell in own):
            written.append(_write(_decoding(run, which, steps), folder / f"decode-{safe}.png"))
        if bars:
            written.append(_write(_bars(run, which, bars), folder / f"speed-{safe}.png"))
            trained = [cell for cell in bars if cell.workload["dbias"]]
            if _has_peaks(run, which, trained):
                written.append(_write(_bars(run, which, trained, memory=True), folder / f"memory-{safe}.png"))
    heat = _heat(run)
    if heat is not None:
        written.append(_write(heat, folder / "ratio.png"))
    return written


def draw_picture(run: Run, path: Path) -> Path:
    """Write the one picture: speed and peak memory with a bias and its gradient over sequence length, of the first problem of the run that
    was measured so, its backward pass or else its step. PNG or SVG by the name of the file. Raises ValueError where there is none.
    """
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"--picture: wanted a name that ends in .png or .svg, got {path.name}")
    for which in ("bwd", "step"):
        problems: dict[tuple[object, ...], list[Cell]] = {}
        for cell in run.cells:
            if cell.workload["dbias"]:
                problem = (cell.dtype, cell.bias, cell.mask, *(cell.workload[name] for name in ("head_dim", "value_dim", "batch", "heads")))
                problems.setdefault(problem, []).append(cell)
        for cells in problems.values():
            if len({cell.workload["keys"] for cell in cells}) > 1 and _has_peaks(run, which, cells):
                return _write(_picture(run, which, sorted(cells, key=lambda c: int(c.workload["keys"]))), path)
    wanted = "a run of passes bwd or step at several lengths with --dbias on, one batch and number of heads for all"
    raise ValueError(f"--picture: wanted {wanted}, got none in the file")


def _picture(run: Run, which: str, cells: list[Cell]) -> Figure:
    """Cells differ in their length alone. A cross at the top: out of memory."""
    unit, factor = _unit(run)
    figure = Figure(figsize=(10.0, 4.3), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    handles = _over_length(run, which, speed, cells, lambda cell, row: _per(run.rate(cell, row), factor), cells)
    handles |= _over_length(run, which, memory, cells, lambda cell, row: _per(row.peak_bytes, 2**20), cells)
    memory.set_yscale("log", base=2)
    memory.autoscale(axis="y")
    memory.yaxis.set_major_formatter(lambda mib, _at: f"{mib / 1024:g} GiB" if mib >= 1024 else f"{mib:g} MiB")
    for provider in run.providers:
        lost = [row.cell for cell in cells if (row := run.row(cell, provider, which)) is not None and row.reason == "out of memory"]
        places = [cell.workload["keys"] for cell in cells if cell.key in lost]
        if places:
            cross = {"color": _style(run, provider)["color"], "marker": "x", "markersize": 8, "linestyle": "none", "clip_on": False}
            memory.plot(places, [1.0] * len(places), transform=memory.get_xaxis_transform(), **cross)
    for panel, title in ((speed, f"{unit}: more is better"), (memory, "peak memory beyond inputs and results: less is better")):
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("sequence length")
    w = cells[0].workload
    what = "Backward pass" if which == "bwd" else "Forward and backward pass"
    problem = f"{what} with the gradient of a bias ({_dims(cells[0])}), b {w['batch']}, h {w['heads']}, d {w['head_dim']}"
    machine = run.machine
    commit = f", commit {machine['commit'][:7]}{' and changes' if machine['dirty'] else ''}" if machine.get("commit") else ""
    where = f"{cells[0].mask}, {cells[0].dtype}: {machine['name']}, torch {machine['torch']}{commit}"
    figure.suptitle(f"{problem},\n{where}", fontsize=11)
    names = [_WORDS.get(name, name) for name in handles]
    figure.legend(list(handles.values()), names, loc="outside lower center", ncols=min(5, max(1, len(handles))), frameon=False)
    return figure


def _dims(cell: Cell) -> str:
    """``1, h, s, s`` of the bias ``1hqk``."""
    return ", ".join("s" if letter in "qk" else letter for letter in str(cell.workload["bias"]))


def _style(run: Run, provider: str) -> dict[str, Any]:
    ours = [name for name in run.providers if name.startswith("triflash")]
    peers = [name for name in run.providers if name not in ours]
    if provider in ours:
        return {"color": _OURS[ours.index(provider) % len(_OURS)], "linewidth": 3.0, "marker": "o", "markersize": 7, "zorder": 5}
    at = peers.index(provider)
    return {"color": _PEERS[at % len(_PEERS)], "linewidth": 1.4, "marker": _MARKERS[(at + 1) % len(_MARKERS)], "markersize": 5}


def _lines(run: Run, which: str, dtype: str, bias: str, cells: list[Cell]) -> Figure:
    """A row of panels for each mask, a column for each head dim."""
    unit, factor = _unit(run)
    dims = sorted({(c.workload["head_dim"], c.workload["value_dim"]) for c in cells})
    masks = [mask for mask in ("full", "causal", "window") if any(c.mask == mask for c in cells)]
    figure = Figure(figsize=(1.6 + 4.2 * len(dims), 1.6 + 3.1 * len(masks)), layout="constrained")
    axes = figure.subplots(len(masks), len(dims), sharex=True, sharey=True, squeeze=False)
    ceiling = run.ceilings.get(f"matmul {dtype}")
    handles: dict[str, Any] = {}
    for across, (d, dv) in enumerate(dims):
        for down, mask in enumerate(masks):
            panel = axes[down][across]
            own = [c for c in cells if (c.workload["head_dim"], c.workload["value_dim"], c.mask) == (d, dv, mask)]
            own.sort(key=lambda c: c.workload["keys"])
            handles |= _over_length(run, which, panel, own, lambda cell, row: _per(run.rate(cell, row), factor), cells)
            if ceiling:
                low, high = ceiling["p10"] / factor, ceiling["p90"] / factor
                middle = ceiling["p50"] / factor
                low, high = min(low, 0.99 * middle), max(high, 1.01 * middle)
                handles["matrix product"] = panel.axhspan(low, high, color="#bbbbbb", alpha=0.6, zorder=0, label="matrix product")
            panel.set_title(f"d {d if d == dv else f'{d} x {dv}'}, {mask}", fontsize=11)
            if across == 0:
                panel.set_ylabel(unit)
            if down == len(masks) - 1:
                panel.set_xlabel("keys")
    figure.suptitle(f"{which}, {dtype}, bias {bias}: {run.machine['name']}", fontsize=12)
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(5, len(handles)), frameon=False)
    return figure


def _memory_lines(run: Run, which: str, dtype: str, bias: str, cells: list[Cell]) -> Figure:
    """Speed on the left, peak memory on the right, a row of panels for each head dim and mask."""
    unit, factor = _unit(run)
    groups: dict[tuple[int, int, str], list[Cell]] = {}
    for cell in sorted(cells, key=lambda c: c.workload["keys"]):
        groups.setdefault((cell.workload["head_dim"], cell.workload["value_dim"], cell.mask), []).append(cell)
    figure = Figure(figsize=(10.0, 1.6 + 2.8 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 2, sharex=True, sharey="col", squeeze=False)
    handles: dict[str, Any] = {}
    for ((d, dv, mask), own), (speed, memory) in zip(sorted(groups.items()), axes, strict=True):
        handles |= _over_length(run, which, speed, own, lambda cell, row: _per(run.rate(cell, row), factor), cells)
        handles |= _over_length(run, which, memory, own, lambda cell, row: _per(row.peak_bytes, 2**20), cells)
        for panel, label in ((speed, unit), (memory, "MiB beyond inputs and outputs")):
            panel.set_title(f"d {d if d == dv else f'{d} x {dv}'}, {mask}", fontsize=11)
            panel.set_ylabel(label)
    for panel in axes[-1]:
        panel.set_xlabel("keys")
    figure.suptitle(f"{which} with the gradient of a bias, {dtype}, {bias}: {run.machine['name']}", fontsize=12)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(5, max(1, len(handles))), frameon=False)
    return figure


def _over_length(
    run: Run, which: str, panel: Any, own: list[Cell], value: Callable[[Cell, Row], float | None], cells: list[Cell]
) -> dict[str, Any]:
    """A line for each provider over the keys of ``own``; the handles for the legend. cells: those of all panels, which share the axis."""
    handles: dict[str, Any] = {}
    for provider in run.providers:
        points = []
        for cell in own:
            row = run.row(cell, provider, which)
            height = value(cell, row) if row is not None and row.status == "ok" else None
            if height is not None:
                points.append((cell.workload["keys"], height))
        if points:
            (handles[provider],) = panel.plot(*zip(*points, strict=True), label=provider, **_style(run, provider))
    lengths = sorted({c.workload["keys"] for c in cells})  # one panel may be empty
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [short(n) for n in lengths])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    return handles


def _steps(cells: list[Cell]) -> dict[str, list[Cell]]:
    """Steps of decoding that differ in the length of the cache alone, by what they share; of several lengths."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        w = cell.workload
        if w.get("cache"):
            heads = f"{w['heads']}" + (f" on {w['kv_heads']}" if w["kv_heads"] != w["heads"] else "")
            queries = f", {w['queries']} queries each" if w["queries"] > 1 else ""
            more = f", bias {w['bias']}" if w["bias"] else ""
            more += (f"/{w['second']}" if w.get("second") else "") + (", ragged" if "padding" in w["bias_values"] else "")
            groups.setdefault(f"b {w['batch']}, h {heads}, d {w['head_dim']}{queries}{more}, {cell.dtype}", []).append(cell)
    return {name: own for name, own in groups.items() if len({cell.workload["keys"] for cell in own}) > 1}


def _decoding(run: Run, which: str, steps: dict[str, list[Cell]]) -> Figure:
    """A panel for each kind of step: GB/s over the keys in the cache, and the copy bandwidth of the same run."""
    figure = Figure(figsize=(1.6 + 4.2 * len(steps), 4.7), layout="constrained")
    (axes,) = figure.subplots(1, len(steps), sharey=True, squeeze=False)
    everything = [cell for own in steps.values() for cell in own]
    handles: dict[str, Any] = {}
    for (name, own), panel in zip(steps.items(), axes, strict=True):
        own = sorted(own, key=lambda cell: cell.workload["keys"])
        handles |= _over_length(run, which, panel, own, lambda cell, row: cell.bytes_of(row) / row.median_ms / 1e6, everything)
        if copy := run.ceilings.get("copy"):
            handles["copy"] = panel.axhline(copy["bytes_per_second"] / 1e9, color="#888888", linestyle="--", zorder=0, label="copy")
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("keys in the cache")
    axes[0].set_ylabel("GB/s")
    figure.suptitle(f"{which}, steps of decoding: {run.machine['name']}", fontsize=12)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(5, max(1, len(handles))), frameon=False)
    return figure


def _per(amount: float | None, unit: float) -> float | None:
    return None if amount is None else amount / unit


def _has_peaks(run: Run, which: str, cells: list[Cell]) -> bool:
    """Whether memory was measured in that pass, a backward one: a forward pass has no gradient."""
    if which not in ("bwd", "step"):
        return False
    rows = (run.row(cell, provider, which) for cell in cells for provider in run.providers)
    return any(row is not None and row.status == "ok" and row.peak_bytes is not None for row in rows)


def _bars(run: Run, which: str, cells: list[Cell], memory: bool = False) -> Figure:
    """A group of bars for each workload, one for each provider that computed it; with ``memory`` beside bars of peak memory."""
    unit, factor = _unit(run)
    rows = [[(p, row) for p in run.providers if (row := run.row(c, p, which)) is not None and row.status == "ok"] for c in cells]
    figure = Figure(figsize=(9.5, 1.6 + 0.19 * sum(max(1, len(own)) + 1 for own in rows)), layout="constrained")
    panels = figure.subplots(1, 2 if memory else 1, sharey=True, squeeze=False)[0]
    at, ticks = 0.0, []
    handles: dict[str, Any] = {}
    for cell, own in zip(cells, rows, strict=True):
        ticks.append(at + max(0, len(own) - 1) / 2)
        for provider, row in own:
            color = _style(run, provider)["color"]
            handles[provider] = panels[0].barh(at, (run.rate(cell, row) or 0.0) / factor, height=0.9, color=color)
            if memory and row.peak_bytes is not None:
                bar = panels[1].barh(at, row.peak_bytes / 2**20, height=0.9, color=color)
                panels[1].bar_label(bar, [f" {row.peak_bytes / 2**20:.0f}"], fontsize=8)
            at += 1
        at += 1 if own else 2
    for name, ceiling in run.ceilings.items():
        if name != "copy" and not memory:
            low, high = min(ceiling["p10"], 0.99 * ceiling["p50"]) / factor, max(ceiling["p90"], 1.01 * ceiling["p50"]) / factor
            handles[f"matrix product, {name.split()[1]}"] = panels[0].axvspan(low, high, color="#bbbbbb", alpha=0.6, zorder=0)
    panels[0].set_yticks(ticks, _labels(run, cells), fontsize=8)
    panels[0].invert_yaxis()
    for panel, label in zip(panels, (f"{unit}: more is better", "peak memory, MiB: less is better") if memory else (unit,), strict=True):
        panel.set_xlabel(label)
        panel.grid(axis="x", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{which}{' with the gradient of a bias' if memory else ''}: {run.machine['name']}", fontsize=12)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(5, max(1, len(handles))), frameon=False)
    return figure


def _unit(run: Run) -> tuple[str, float]:
    return ("TFLOP/s", 1e12) if run.machine["device"] == "cuda" else ("GFLOP/s", 1e9)


def _labels(run: Run, cells: list[Cell]) -> list[str]:
    several = len({cell.dtype for cell in run.cells}) > 1
    return [cell.name + (f" {cell.dtype}" if several else "") for cell in cells]


def _heat(run: Run) -> Figure | None:
    """Rows are cells, columns passes; above 1 (blue) triflash is faster than the best peer. None if there is nothing to compare."""
    ratios = [[best_peer_ratio(run, cell, which) for which in run.passes] for cell in run.cells]
    if not any(ratio is not None for line in ratios for ratio in line):
        return None
    labels = _labels(run, run.cells)
    logs = [[math.nan if ratio is None else math.log2(ratio) for ratio in line] for line in ratios]
    known = [abs(x) for line in logs for x in line if not math.isnan(x)]
    reach = min(2.0, max(0.3, *known)) if known else 1.0
    width = 2.2 + 0.085 * max(map(len, labels)) + 0.8 * len(run.passes)
    figure = Figure(figsize=(width, 1.5 + 0.27 * len(labels)), layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(logs, cmap="RdBu", norm=TwoSlopeNorm(0.0, -reach, reach), aspect="auto")
    panel.set_facecolor("#eeeeee")
    for down, line in enumerate(ratios):
        for across, ratio in enumerate(line):
            if ratio is not None:
                dark = abs(math.log2(ratio)) > 0.65 * reach
                panel.text(across, down, f"{ratio:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    panel.set_xticks(range(len(run.passes)), run.passes)
    panel.set_yticks(range(len(labels)), labels, fontsize=8)
    panel.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    panel.set_title("time of the best peer / time of triflash", fontsize=11)
    marks = [x for x in (-2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0) if abs(x) <= reach]
    bar = figure.colorbar(image, ax=panel, ticks=marks)
    bar.ax.set_yticklabels([f"{2**x:.2f}" for x in marks])
    figure.supxlabel(run.machine["name"], fontsize=8)
    return figure


def _write(figure: Figure, path: Path) -> Path:
    """PNG or SVG, whole or not at all."""
    FigureCanvasAgg(figure)
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix[1:], dpi=130)
    write_whole(path, data.getvalue())
    return path
