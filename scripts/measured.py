"""Tables and drawings of recorded runs of ``triflash bench``, for pages of the site. Called by scripts/site_pages.py.

Imports nothing of the package, so that the site is built without PyTorch.

On a page of docs/ stands a comment, which GitHub does not show and the site replaces:

    <!-- measured: results/2026-11-26-h200/no-bias.json fwd plot -->    TFLOP/s over length, where it was measured at several
    <!-- measured: results/2026-11-26-h200/bias.json bwd -->            a table of TFLOP/s; ``memory``: of peak memory
    <!-- measured: … bwd memory-plot -->                                peak memory over length
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from svg import lines_over_length

__all__ = ["MARK", "Recorded"]

MARK = re.compile(r"<!-- measured: (\S+\.json) (\w+)(?: (memory|plot|memory-plot))? -->")
WORDS = {
    "triflash": "triflash", "sdpa-cudnn": "cuDNN", "sdpa-efficient": "memory-efficient", "sdpa-flash": "FlashAttention-2",
    "flex": "FlexAttention", "fa4": "FlashAttention-4", "dense": "plain PyTorch", "chunked": "in chunks", "torch-varlen": "varlen_attn",
}  # fmt: skip
PASSES = {"fwd": "Forward pass", "bwd": "Backward pass", "step": "Forward and backward pass"}


class Recorded:
    """A run as ``triflash bench`` wrote it down, and the commit that the page of its folder names."""

    def __init__(self, path: Path) -> None:
        found = json.loads(path.read_text())
        said = re.search(r"commit\s+`?([0-9a-f]{7,40})\b", (path.parent / "README.md").read_text())
        if said is None:
            raise ValueError(f"{path.parent}/README.md names no commit")
        self.machine, self.cells, self.rows = found["machine"], found["cells"], found["rows"]
        gpu, date = self.machine["name"], self.machine["date"][:10]
        self.source = f"{gpu}, {date}, PyTorch {self.machine['torch']}, triflash at commit {said[1][:7]}"
        self._rows = {(row["cell"], row["provider"], row["which"]): row for row in self.rows}

    def providers(self, which: str) -> list[str]:
        """Who was measured in that pass, in the order of the run."""
        return list(dict.fromkeys(row["provider"] for row in self.rows if row["which"] == which))

    def value(self, cell: dict[str, Any], provider: str, which: str, memory: bool = False) -> float | None:
        """TFLOP/s at the median, or peak memory in MiB; None where there is none."""
        row = self._rows.get((cell["key"], provider, which))
        if row is None or row["status"] != "ok" or (memory and row["peak_bytes"] is None):
            return None
        if memory:
            return float(row["peak_bytes"]) / 2**20
        return float(cell["flops"][which] / statistics.median(row["samples_ms"]) / 1e9)

    def table(self, which: str, memory: bool = False) -> str:
        """Markdown, a row for each problem; the best of a row is bold."""
        providers = self.providers(which)
        lines = ["| | " + " | ".join(WORDS.get(name, name) for name in providers) + " |", "| --- |" + " ---: |" * len(providers)]
        for cell in self.cells:
            values = [self.value(cell, provider, which, memory) for provider in providers]
            known = [value for value in values if value is not None]
            if not known:
                continue
            best = min(known) if memory else max(known)
            words = ["–" if value is None else f"**{value:,.0f}**" if value == best else f"{value:,.0f}" for value in values]
            lines.append(f"| {cell['name']} | " + " | ".join(words) + " |")
        unit = "peak memory beyond inputs and results, MiB" if memory else "TFLOP/s"
        return "\n".join([f"{PASSES[which]}, {unit}; bold: the best of a row.", "", *lines, "", f"{self.source}."])

    def plot(self, which: str, memory: bool = False) -> str:
        """SVG: TFLOP/s, or with ``memory`` peak memory, over length; a panel for each head dim. Where there is a choice, of causal problems
        and of those with the bias's gradient.
        """
        mask = "causal" if any(cell["mask"] == "causal" for cell in self.cells) else "full"
        trained = any(cell["workload"]["dbias"] for cell in self.cells)
        cells = [cell for cell in self.cells if cell["mask"] == mask and cell["workload"]["dbias"] >= trained]
        lengths = sorted({cell["workload"]["keys"] for cell in cells})
        names = self.providers(which)
        panels: dict[str, dict[str, list[float | None]]] = {}
        for cell in sorted(cells, key=lambda cell: (cell["workload"]["head_dim"], cell["workload"]["keys"])):
            panel = panels.setdefault(f"d {cell['workload']['head_dim']}, {mask}", {})
            for name in names:
                row = panel.setdefault(WORDS.get(name, name), [None] * len(lengths))
                row[lengths.index(cell["workload"]["keys"])] = self.value(cell, name, which, memory)
        title, unit = self.caption(which, memory), "MiB" if memory else "TFLOP/s"
        return lines_over_length(title, unit, lengths, panels, [WORDS.get(n, n) for n in names], log=memory)

    def caption(self, which: str, memory: bool = False) -> str:
        """What stands below a plot."""
        return f"{PASSES[which]}{', peak memory beyond inputs and results' if memory else ''}. {self.source}."
