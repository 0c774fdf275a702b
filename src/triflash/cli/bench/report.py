"""A run as tables: on the terminal, in markdown, and as CSV with a summary and with every sample. The run itself is saved as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .bars import Bar, Mean, means, verdicts, worst_first
from .record import Cell, Row, Run, write_whole
from .sweeps import SWEEPS, Sweep
from .timing import quantiles
from .versus import Versus, beside_best_peer, command, compared, geometric_mean
from .workloads import short

__all__ = ["best_peer_ratio", "save", "save_samples", "show"]

_INCOMPLETE = "Not complete: interrupted."
_WORDS = ("case", "pass", "peer", "sizes")  # headings of columns that hold no numbers, beside the first


@dataclass
class _Sheet:
    """A table before it has a format; ``notes`` are the reasons that its cells number, ``closing`` what is said below it."""

    title: str
    headings: list[str]
    lines: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    closing: list[str] = field(default_factory=list)

    def note(self, text: str) -> str:
        if text not in self.notes:
            self.notes.append(text)
        return f"[{self.notes.index(text) + 1}]"


def show(run: Run, console: Console) -> None:
    """Print the tables; of a sweep its own alone, the other tables are in ``bench.md``."""
    sweep = _sweep_of(run)
    sheets = list(_sheets(run))
    if sweep is not None:
        own = _cliffs(run, run.options.get("all", False)) if sweep.cliffs else _bars(run, sweep)
        sheets = [own, *(sheet for row in run.rows if row.breakdown for sheet in _breakdown(run, row))]
    if not run.complete:
        console.print(f"\n{_INCOMPLETE}", style="red")
    for sheet in sheets:
        table = Table(title="\n" + escape(sheet.title), title_justify="left")
        for at, heading in enumerate(sheet.headings):
            style = "bold" if heading.startswith("triflash") else None
            justify: Any = "left" if at == 0 or heading in _WORDS else "right"
            table.add_column(escape(heading), justify=justify, style=style, overflow="fold")
        for line in sheet.lines:
            table.add_row(
                *(f"[red]{escape(text)}[/red]" if text.startswith("WRONG") or text.endswith("MISSED") else escape(text) for text in line)
            )
        console.print(table)
        for number, text in enumerate(sheet.notes, 1):
            console.print(f"  [{number}] {text}", markup=False, highlight=False)
        for text in sheet.closing:
            console.print(f"  {text}", markup=False, highlight=False, soft_wrap=True, style="red" if "MISSED" in text else None)


def save(run: Run, folder: Path) -> list[Path]:
    """Write ``bench.json``, ``bench.csv``, ``samples.csv``, ``bench.md`` and, of a sweep, ``bars.json`` or ``cliffs.json``, each whole
    or not at all.

    Returns their paths.
    """
    files = {"bench.json": run.dump(), "bench.csv": _summary(run), "samples.csv": _samples(run), "bench.md": _markdown(run)}
    sweep = _sweep_of(run)
    if sweep is not None and sweep.cliffs:
        files["cliffs.json"] = json.dumps([each.facts(run) for each in compared(run)], indent=1) + "\n"
    elif sweep is not None:
        found = verdicts(run, sweep.bars)
        facts = [each.facts for each in found] + [each.facts for each in means(found, sweep.bars, run.complete)]
        files["bars.json"] = json.dumps(facts, indent=1) + "\n"
    for name, text in files.items():
        write_whole(folder / name, text)
    return [folder / name for name in files]


def save_samples(run: Run, folder: Path) -> None:
    """Write ``bench.json`` alone: all that the rest can be made from, after each workload."""
    write_whole(folder / "bench.json", run.dump())


def best_peer_ratio(run: Run, cell: Cell, which: str) -> float | None:
    """Time of the fastest peer over that of triflash; None if either is missing."""
    found = beside_best_peer(run, cell, which)
    return None if found is None else found.ratio


_HOST_TITLES = {
    "eager": "eager: wall time of a step in a program that runs step after step, µs",
    "host-nograd": "host-nograd: how long a forward pass without autograd keeps the host busy, µs",
    "host-fwd": "host-fwd: how long a forward pass keeps the host busy, µs",
    "host-step": "host-step: how long a forward and backward pass keep the host busy, µs",
    "first": "first: how long the first step at a new length keeps the host busy, kernels compiled before, µs: median / longest",
}


def _sheets(run: Run) -> Iterable[_Sheet]:
    unit, factor = ("TFLOP/s", 1e12) if run.machine["device"] == "cuda" else ("GFLOP/s", 1e9)
    sweep = _sweep_of(run)
    if sweep is not None:
        yield _cliffs(run, everything=True) if sweep.cliffs else _bars(run, sweep)
    for which in run.passes:
        if which in _HOST_TITLES:
            yield _sheet(run, which, _HOST_TITLES[which], _first_cell if which == "first" else _host_cell)
        else:
            title = f"{which}: {unit} at the median, and % of the ceiling that binds (c: compute, m: memory)"
            yield _sheet(run, which, title, lambda run, cell, row: _rate_cell(run, cell, row, factor))
        if any(row.peak_bytes is not None for row in run.rows if row.which == which):
            yield _sheet(run, which, f"{which}: peak memory beyond inputs and outputs, MiB", _memory_cell, ratio=False)
    for row in run.rows:
        if row.breakdown:
            yield from _breakdown(run, row)


def _sweep_of(run: Run) -> Sweep | None:
    return SWEEPS.get(run.options.get("sweep", ""))


def _bars(run: Run, sweep: Sweep) -> _Sheet:
    """Every bar in every cell, worst first, and below what each bar comes to."""
    headings = ["bar", "case", "triflash, µs", "peer", "peer, µs", "measured", "wanted", "of what is allowed"]
    sheet = _Sheet(f"sweep {run.options['sweep']}: medians held to its bars, worst first", headings)
    several = len({cell.dtype for cell in run.cells}) > 1
    found = verdicts(run, sweep.bars)
    alike = Counter((each.bar.name, each.why) for each in found if each.value is None)
    for each in worst_first(found):
        bar, share = each.bar, each.share
        name = each.cell.name + (f" {each.cell.dtype}" if several else "")
        times = [_microseconds(each.ours_ms), each.peer, _microseconds(each.peer_ms)]
        if each.value is None:
            count = alike.pop((bar.name, each.why), 0)  # a line for all that lack the same
            if count == 0:
                continue
            name, times = (name, times) if count == 1 else (f"{count} cases", [""] * 3)
            words = f"not judged {sheet.note(each.why)}"
        else:
            words = "" if share is None else f"{100 * share:.1f}%" + ("" if share <= 1 else " MISSED")
        measured = "" if each.value is None else _measured(bar.kind, each.value)
        sheet.lines.append([bar.name, name, *times, measured, "" if bar.bound is None else _wanted(bar, bar.bound), words])
    sheet.closing += [_comes_to(each) for each in means(found, sweep.bars, run.complete)]
    return sheet


def _microseconds(ms: float | None) -> str:
    return "" if ms is None else f"{1e3 * ms:.0f}" if ms >= 0.1 else f"{1e3 * ms:.1f}"


def _measured(kind: str, value: float) -> str:
    return f"{1e3 * value:.4g} µs" if kind == "ms" else f"{100 * value:.0f}% of a copy" if kind == "copy" else f"{value:.2f}x"


def _wanted(bar: Bar, bound: float) -> str:
    sign = "≥" if bar.more_is_better else "≤"
    return f"{sign} " + (f"{1e3 * bound:g} µs" if bar.kind == "ms" else f"{100 * bound:.0f}%" if bar.kind == "copy" else f"{bound:g}x")


def _comes_to(of: Mean) -> str:
    """A line below the table."""
    bar = of.bar
    if not of.cells:
        return f"{bar.name}: not measured"
    if not of.judged:
        return f"{bar.name}: not judged in any of {of.cells}"
    words = [] if of.met is None else [f"met in {of.met} of {of.judged}"]
    if of.judged < of.cells:
        words.append(f"not judged in {of.cells - of.judged}")
    if of.value is not None and of.worst is not None and of.worst.value is not None:
        mean = f"geometric mean {_measured(bar.kind, of.value)}"
        if bar.mean is not None:
            verdict = {True: "met", False: "MISSED", None: "not judged, for want of cells"}[of.mean_met]
            mean += f" (wanted {_wanted(bar, bar.mean)}: {verdict})"
        words += [mean, f"worst {_measured(bar.kind, of.worst.value)} ({of.worst.cell.name})"]
    return f"{bar.name}: " + ", ".join(words)


def _cliffs(run: Run, everything: bool) -> _Sheet:
    """The cells in which a peer is faster, or triflash has no right result, slowest first; ``everything``: all cells."""
    found = compared(run)
    shown = sorted((each for each in found if everything or each.is_cliff), key=_worst_first)
    title = "every cell beside its best peer" if everything else "cells below 1.0 of the best peer"
    sheet = _Sheet(f"sweep {run.options['sweep']}: {title}", ["case", "pass", "sizes", "triflash, ms", "peer", "peer, ms", "ratio"])
    several = len({cell.dtype for cell in run.cells}) > 1
    for each in shown:
        name = each.cell.name + (f" {each.cell.dtype}" if several else "")
        ours = f"{each.ours.median_ms:.4g}" if each.ours.status == "ok" else _why_none(sheet, each.ours)
        peer = ["", ""] if each.peer is None else [each.peer.provider, f"{each.peer.median_ms:.4g}"]
        sheet.lines.append([name, each.which, _sizes(each.cell), ours, *peer, "" if each.ratio is None else f"{each.ratio:.2f}x"])
    for which in run.passes:
        own = [each for each in found if each.which == which]
        with_ratio = [each for each in own if each.ratio is not None]
        if not with_ratio:
            sheet.closing.append(f"{which}: no cell in which both triflash and a peer have a time")
            continue
        ratios = [each.ratio or 0.0 for each in with_ratio]
        least = min(with_ratio, key=_worst_first)
        words = f"{which}: geometric mean {geometric_mean(ratios):.2f}x of the best peer over {len(ratios)} cells"
        words += f", {sum(ratio < 1 for ratio in ratios)} below 1.0, worst {min(ratios):.2f}x ({least.cell.name})"
        alone = sum(each.peer is None and each.ours.status == "ok" for each in own)
        sheet.closing.append(words + (f"; no peer in {alone}" if alone else ""))
    if found:
        worst = min(found, key=_worst_first)
        sheet.closing.append(f"The {'worst' if worst.is_cliff else 'closest'} alone: {command(run, worst)}")
    return sheet


def _worst_first(each: Versus) -> tuple[bool, float]:
    """No right result comes before any ratio; no peer behind all."""
    return each.ours.status == "ok", math.inf if each.ratio is None else each.ratio


def _why_none(sheet: _Sheet, row: Row) -> str:
    return ("– " if row.status == "dash" else "WRONG ") + sheet.note(row.reason)


def _sizes(cell: Cell) -> str:
    """``b 2, h 32 on 8, s 8k, d 128, causal``."""
    w = cell.workload
    heads = f"h {w['heads']}" + (f" on {w['kv_heads']}" if w["kv_heads"] != w["heads"] else "")
    length = f"s {short(w['queries'])}" + (f" x {short(w['keys'])}" if w["keys"] != w["queries"] else "")
    dim = f"d {w['head_dim']}" + (f" x {w['value_dim']}" if w["value_dim"] != w["head_dim"] else "")
    more = [cell.mask if cell.mask != "full" else "", "" if cell.bias == "none" else f"bias {cell.bias}"]
    more += [f"soft cap {w['softcap']:g}" if w["softcap"] else "", "sinks" if w["sinks"] else "", "cache" if w["cache"] else ""]
    return ", ".join([f"b {w['batch']}", heads, length, dim, *(x for x in more if x)])


def _breakdown(run: Run, row: Row) -> Iterable[_Sheet]:
    """Where the host's time of a step goes."""
    case = f"{next(cell.name for cell in run.cells if cell.key == row.cell)}, {row.provider}"
    found = row.breakdown
    if "failed" in found:
        yield _Sheet(f"{case}: no breakdown", ["why"], [[found["failed"]]])
        return
    pieces = [[name, f"{us:.1f}"] for name, us in found["pieces"].items()]
    yield _Sheet(f"{case}: what keeps the host busy, each alone", ["piece", "µs"], pieces)
    total = found["profiled"] or 1.0
    title = f"{case}: a step under the profiler, {found['profiled']:.0f} µs, by file or package"
    lines = [[name, f"{calls:g}", f"{own:.1f}", f"{100 * own / total:.0f}%"] for name, calls, own in found["groups"]]
    yield _Sheet(title, ["file or package", "calls", "own µs", "share"], lines)
    lines = [[name, f"{calls:g}", f"{own:.1f}", f"{whole:.1f}"] for name, calls, own, whole in found["functions"]]
    yield _Sheet(f"{case}: the functions with the most time of their own", ["function", "calls", "own µs", "with what it calls, µs"], lines)


def _sheet(run: Run, which: str, title: str, text: Callable[[Run, Cell, Row], str], ratio: bool = True) -> _Sheet:
    """A line for each cell and a column for each provider that the pass was measured for."""
    several = len({cell.dtype for cell in run.cells}) > 1
    mine = [row for row in run.rows if row.which == which]
    cells, names = {row.cell for row in mine}, {row.provider for row in mine}
    providers = [name for name in run.providers if name in names]
    sheet = _Sheet(title, ["case", *providers, *(["to best peer"] if ratio else [])])
    for cell in run.cells:
        if cell.key not in cells:
            continue
        line = [cell.name + (f" {cell.dtype}" if several else "")]
        for provider in providers:
            row = run.row(cell, provider, which)
            if row is None:
                line.append("")
            elif row.status == "ok":
                line.append(text(run, cell, row))
            else:
                line.append(_why_none(sheet, row))
        if ratio:
            times = best_peer_ratio(run, cell, which)
            line.append("" if times is None else f"{times:.2f}x")
        sheet.lines.append(line)
    return sheet


def _rate_cell(run: Run, cell: Cell, row: Row, factor: float) -> str:
    rate, shares = (run.rate(cell, row) or 0.0) / factor, run.of_ceiling(cell, row)
    if cell.workload.get("cache"):  # nothing but memory traffic
        moved = 1e3 * cell.bytes_of(row) / row.median_ms / 1e9
        return f"{moved:.4g} GB/s" + (f" {100 * shares['copy']:.0f}%m" if "copy" in shares else "")
    text = f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"
    if not shares:
        return text
    binds = "c" if shares["best"] == shares.get("matmul") else "m"
    return f"{text} {100 * shares['best']:.0f}%{binds}"


def _host_cell(run: Run, cell: Cell, row: Row) -> str:
    return f"{1e3 * row.median_ms:.0f}"


def _first_cell(run: Run, cell: Cell, row: Row) -> str:
    return f"{1e3 * row.median_ms:.0f} / {1e3 * max(row.samples_ms):.0f}"


def _memory_cell(run: Run, cell: Cell, row: Row) -> str:
    return "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.1f}"


def _markdown(run: Run) -> str:
    machine = run.machine
    facts = [f"{name} {machine[name]}" for name in ("torch", "triton", "cuda", "cudnn", "flash-attn-4", "triflash") if machine.get(name)]
    commit = f", commit {machine['commit'][:10]}{' and changes' if machine['dirty'] else ''}" if machine.get("commit") else ""
    lines = [f"# Attention on {machine['name']}, {machine['date'][:10]}", "", ", ".join(facts) + commit + "."]
    clocks = machine.get("clocks_before")
    lines += ["Before the run: " + ", ".join(f"{k} {v}" for k, v in clocks.items()) + "."] if clocks else []
    lines += [f"`triflash {' '.join(run.options['words'])}`"]
    lines += [run.options["note"]] if run.options["note"] else []
    lines += ["", *([] if run.complete else [f"**{_INCOMPLETE}**", ""])]
    for name, ceiling in run.ceilings.items():
        rate = ceiling.get("flops_per_second")
        lines.append(f"- {name}: " + (f"{rate / 1e12:.3g} TFLOP/s" if rate else f"{ceiling['bytes_per_second'] / 1e9:.4g} GB/s"))
    for sheet in _sheets(run):
        lines += ["", f"## {sheet.title[0].upper()}{sheet.title[1:]}", ""]
        lines += [
            "| " + " | ".join(sheet.headings) + " |",
            "| --- " + "".join("| --- " if heading in _WORDS else "| ---: " for heading in sheet.headings[1:]) + "|",
        ]
        lines += ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in sheet.lines]
        lines += ["", *(f"[{number}] {text}  " for number, text in enumerate(sheet.notes, 1))]
        lines += [*([""] if sheet.notes and sheet.closing else []), *(f"{text}  " for text in sheet.closing)]
    return "\n".join(lines).rstrip() + "\n"


def _summary(run: Run) -> str:
    sizes = [name for name in (run.cells[0].workload if run.cells else {}) if name not in ("name", "about")]
    head = ["case", *sizes, "provider", "pass", "status", "reason", "samples", "p10_ms", "p25_ms", "median_ms", "p75_ms", "p90_ms"]
    head += ["flops", "bytes", "tflops_per_s", "gbytes_per_s", "of_matmul", "of_copy", "peak_bytes", "ran"]
    cells = {cell.key: cell for cell in run.cells}
    lines: list[list[object]] = [list(head)]
    for row in run.rows:
        cell = cells[row.cell]
        found = list(quantiles(row.samples_ms).values()) if row.samples_ms else [""] * 5
        rate, shares = run.rate(cell, row), run.of_ceiling(cell, row)
        moved = 1e3 * cell.bytes_of(row) / row.median_ms / 1e9 if row.status == "ok" else ""
        line = [cell.name, *(cell.workload[name] for name in sizes), row.provider, row.which, row.status, row.reason, len(row.samples_ms)]
        line += [*found, cell.flops_of(row), cell.bytes_of(row), "" if rate is None else rate / 1e12, moved]
        lines.append([*line, shares.get("matmul", ""), shares.get("copy", ""), row.peak_bytes, "; ".join(row.ran)])
    return _csv(lines)


def _samples(run: Run) -> str:
    names = {cell.key: cell.name for cell in run.cells}
    lines: list[list[object]] = [["case", "key", "provider", "pass", "sample", "ms"]]
    for row in run.rows:
        lines += [[names[row.cell], row.cell, row.provider, row.which, at, ms] for at, ms in enumerate(row.samples_ms)]
    return _csv(lines)


def _csv(lines: list[list[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
