"""The drawings of docs/how-it-works.md are those that scripts/figures.py draws: redraw them by running it."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

pytest.importorskip("triton")

import figures
import svg


@pytest.mark.parametrize("name", figures.FIGURES)
def test_what_is_committed_is_what_is_drawn(name: str) -> None:
    drawn = figures.FIGURES[name]()
    assert (figures.FOLDER / name).read_text() == drawn
    assert len(drawn) < 20_000
    box = [float(x) for x in ET.fromstring(drawn).attrib["viewBox"].split()]
    for shape in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}rect"):  # nothing outside the picture
        assert float(shape.attrib["x"]) + float(shape.attrib["width"]) <= box[2]
        assert float(shape.attrib["y"]) + float(shape.attrib["height"]) <= box[3]


def test_every_figure_is_on_a_page() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    assert {path.name for path in figures.FOLDER.iterdir()} == set(figures.FIGURES)
    assert [name for name in figures.FIGURES if f"(figures/{name})" not in page] == []


def test_the_reference_follows_the_kernels_rule() -> None:
    """A lane's sum above 2^15 moves every reference of the warp to its maximum; one that is as large moves none."""
    calm = [[0.0] * 64 for _ in range(16)]
    assert figures.reference(calm, 32) == [(0.0, True), (0.0, False)]
    for score, looked in ((14.99, False), (15.01, True)):
        rows = [row.copy() for row in calm]
        rows[3][40] = score - 0.001  # its lane has 7 more scores of weight 1
        rows[0][50] = 1.0
        assert figures.reference(rows, 32)[1] == (1.0 if looked else 0.0, looked)


def test_lines_over_length() -> None:
    drawn = svg.lines_over_length("t", "TFLOP/s", [512, 1024], {"d 64": {"a": [100.0, 200.0], "b": [None, 50.0]}}, ["a", "b"])
    root = ET.fromstring(drawn)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 3
    assert svg.lines_over_length("t", "MiB", [512], {"d 64": {"a": [33.5]}}, ["a"], log=True).count("<circle") == 1
