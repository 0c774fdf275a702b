"""Small drawings as SVG text, readable on light and dark pages: their colours follow ``prefers-color-scheme``, which browsers take from the
page around an image. Used by scripts/figures.py and scripts/site_pages.py; imports nothing of the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

__all__ = ["SERIES", "Drawing", "lines_over_length"]

SERIES = ("ours", "p1", "p2", "p3", "p4", "p5")  # classes of lines, triflash's first: Okabe and Ito's colours

# class: (light, dark). ``t-`` classes fill text, ``s-`` classes stroke lines, the others fill areas.
_COLOURS = {
    "ink": ("#1f2430", "#e3e6ee"), "soft": ("#5c6473", "#a3abbb"), "grid": ("#d3d7de", "#454b5a"), "none": ("none", "none"),
    "empty": ("#eef0f3", "#2a2f3a"), "whole": ("#3d8fc4", "#3d8fc4"), "part": ("#e9a45c", "#d18b41"), "mark": ("#c2410c", "#ff9a5c"),
    "cool": ("#0b62a3", "#6db8ef"), "pale": ("#d8e8f4", "#22405a"), "warm": ("#fbe3cd", "#573a20"),
    "slot": ("#1f1606", "#1f1606"), "ours": ("#c2410c", "#ff8a4c"), "p1": ("#0b62a3", "#6db8ef"), "p2": ("#087f5b", "#4fd0a5"),
    "p3": ("#a13c86", "#e293cb"),
    "p4": ("#8a6d00", "#e0c04a"), "p5": ("#5c6473", "#a3abbb"),
}  # fmt: skip


def _rules(used: set[str], dark: bool) -> str:
    """Style of the classes that are used."""
    found = []
    for name, both in _COLOURS.items():
        if name in used:
            found.append(f".{name}{{fill:{both[dark]}}}.s-{name}{{stroke:{both[dark]}}}")
    return "".join(found)


_STYLE = (
    "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif;font-size:13px}"
    ".small{font-size:11.5px}.head{font-weight:600;font-size:14px}.mono{font-family:ui-monospace,Menlo,Consolas,monospace}"
    ".line{fill:none;stroke-width:1.6}.thin{fill:none;stroke-width:1}.thick{fill:none;stroke-width:3}.dash{stroke-dasharray:5 4}"
)


class Drawing:
    """Shapes in the order in which they are drawn, in a box of ``width`` times ``height``."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._used: set[str] = set()
        self._body: list[str] = []

    def _add(self, text: str, classes: str) -> None:
        self._used |= {name.removeprefix("s-") for name in classes.split()}
        self._body.append(text)

    def rect(self, x: float, y: float, w: float, h: float, classes: str, radius: float = 0) -> None:
        """A filled rectangle."""
        corner = f' rx="{radius:g}"' if radius else ""
        self._add(f'<rect x="{x:.4g}" y="{y:.4g}" width="{w:.4g}" height="{h:.4g}"{corner} class="{classes}"/>', classes)

    def text(self, x: float, y: float, words: str, classes: str = "ink", anchor: str = "start") -> None:
        """A line of text, whose baseline is at y."""
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self._add(f'<text x="{x:.4g}" y="{y:.4g}"{place} class="{classes}">{escape(words)}</text>', classes)

    def path(self, points: Sequence[tuple[float, float]], classes: str) -> None:
        """A line through points. classes: ``line``, ``thin`` or ``thick``, and ``s-`` with a colour."""
        way = "M" + "L".join(f"{x:.5g} {y:.5g}" for x, y in points)
        self._add(f'<path d="{way}" class="{classes}"/>', classes)

    def dot(self, x: float, y: float, radius: float, classes: str) -> None:
        """A filled circle."""
        self._add(f'<circle cx="{x:.5g}" cy="{y:.5g}" r="{radius:g}" class="{classes}"/>', classes)

    def arrow(self, points: Sequence[tuple[float, float]], colour: str = "soft", size: float = 6) -> None:
        """A line through points with a head at its end."""
        (x0, y0), (x1, y1) = points[-2], points[-1]
        long = math.hypot(x1 - x0, y1 - y0)
        ux, uy = (x1 - x0) / long, (y1 - y0) / long
        base = (x1 - size * ux, y1 - size * uy)
        self.path([*points[:-1], base], f"line s-{colour}")
        wing = size * 0.55
        corners = [(x1, y1), (base[0] - wing * uy, base[1] + wing * ux), (base[0] + wing * uy, base[1] - wing * ux)]
        way = " ".join(f"{x:.5g},{y:.5g}" for x, y in corners)
        self._add(f'<polygon points="{way}" class="{colour}"/>', colour)

    def svg(self) -> str:
        """The file. Rules of classes that are not used are left out."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" width="{self.width:g}" role="img">'
            f"<title>{escape(self.title)}</title>"
        )
        style = f"<style>{_STYLE}{_rules(self._used, False)}@media(prefers-color-scheme:dark){{{_rules(self._used, True)}}}</style>"
        return "\n".join([head, style, *self._body, "</svg>"]) + "\n"


def lines_over_length(
    title: str, unit: str, lengths: Sequence[int], panels: dict[str, dict[str, list[float | None]]], names: Sequence[str], log: bool = False
) -> str:
    """Panels side by side, each with a line for every name over sequence length (its values; None: not measured), as SVG.

    All panels share the vertical axis, from 0 or, with ``log``, in powers of two.
    """
    wide, high, left, top = 250.0, 190.0, 52.0, 58.0
    drawing = Drawing(left + len(panels) * (wide + 14), top + high + 46, title)
    known = [value for lines in panels.values() for line in lines.values() for value in line if value is not None]
    ceiling = max(known)
    step = 10 ** math.floor(math.log10(ceiling)) / 2 if not log else 0
    while not log and ceiling / step > 6:
        step *= 2
    ticks = [2.0**n for n in range(math.floor(math.log2(min(known))), math.ceil(math.log2(ceiling)) + 1)] if log else []
    ticks = ticks[:: max(1, len(ticks) // 6)] if log else [n * step for n in range(int(ceiling / step) + 2)]
    low, above = (math.log2(ticks[0]), math.log2(max(ticks[-1], ceiling))) if log else (0.0, ticks[-1])

    def height(value: float) -> float:
        return top + high * (1 - ((math.log2(value) if log else value) - low) / (above - low))

    at = left
    for name, series in zip(names, SERIES, strict=False):
        drawing.path([(at, 14), (at + 18, 14)], f"{'thick' if series == 'ours' else 'line'} s-{series}")
        drawing.text(at + 24, 18, name, f"small {series}")
        at += 42 + 6.6 * len(name)
    for number, (panel, lines) in enumerate(panels.items()):
        x0 = left + number * (wide + 14)
        across = [x0 + 14 + (wide - 28) * n / max(1, len(lengths) - 1) for n in range(len(lengths))]
        drawing.text(x0 + wide / 2, top - 12, panel, "ink", "middle")
        for tick in ticks:
            drawing.path([(x0, height(tick)), (x0 + wide, height(tick))], "thin s-grid")
            if number == 0:
                drawing.text(left - 8, height(tick) + 4, f"{tick:,.0f}", "small soft", "end")
        for x, length in zip(across, lengths, strict=True):
            drawing.text(x, top + high + 18, f"{length // 1024}k" if length % 1024 == 0 else str(length), "small soft", "middle")
        for name, series in reversed(list(zip(names, SERIES, strict=False))):
            points = [(x, height(y)) for x, y in zip(across, lines.get(name, []), strict=False) if y is not None]
            if len(points) > 1:
                drawing.path(points, f"{'thick' if series == 'ours' else 'line'} s-{series}")
            for point in points:
                drawing.dot(*point, 4 if series == "ours" else 3, series)
    drawing.text(left - 8, top - 12, unit, "small soft", "end" if len(unit) < 8 else "middle")
    drawing.text(left + (drawing.width - left) / 2, top + high + 38, "keys", "small soft", "middle")
    return drawing.svg()
