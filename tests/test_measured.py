"""What the site shows of recorded runs (scripts/measured.py) is what ``triflash bench`` wrote beside them."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from measured import MARK, PASSES, Recorded

MARKED = [(page.name, *found) for page in sorted((ROOT / "docs").glob("*.md")) for found in MARK.findall(page.read_text())]


def test_the_page_of_performance_has_tables_and_plots() -> None:
    assert {what for page, _, _, what in MARKED if page == "performance.md"} == {"", "memory", "plot"}


def test_every_mark_is_one() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert page.read_text().count("<!-- measured:") == len(MARK.findall(page.read_text())), page.name


@pytest.mark.parametrize(("page", "path", "which", "what"), MARKED, ids=lambda x: Path(x).stem or "table")
def test_numbers_are_those_of_the_bench(page: str, path: str, which: str, what: str) -> None:
    """Those of the markdown that the bench wrote, rounded; and the folder's commit is named."""
    recorded = Recorded(ROOT / "docs" / path)
    commit = re.search(r"commit ([0-9a-f]{7})", (ROOT / "docs" / path).parent.joinpath("README.md").read_text())[1]
    assert commit in recorded.source
    if what == "plot":
        drawn = recorded.plot(which)
        points = ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}circle")
        assert (
            sum(1 for _ in points) == sum(row["status"] == "ok" and row["which"] == which for row in recorded.rows) / 2
        )  # half are causal
        assert commit in drawn
        return
    table = recorded.table(which, memory=what == "memory")
    assert table.startswith(PASSES[which]) and commit in table
    said = (ROOT / "docs" / path).with_suffix(".md").read_text()
    section = said[said.index(f"## {which.capitalize()}: " + ("peak" if what else "TFLOP")) :].partition("\n## ")[0]
    written = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in section.splitlines() if line.startswith("| ")
    }
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) >= 4
    for name, *values in rows:
        for value, words in zip(values, written[name], strict=False):
            if value == "–":
                assert words.startswith(("–", "WRONG"))
            else:
                assert float(value.strip("*").replace(",", "")) == pytest.approx(float(words.split()[0].replace(",", "")), abs=0.51)


def test_memory_over_length() -> None:
    """A point for each provider's peak memory, on an axis of powers of two."""
    recorded = Recorded(ROOT / "docs" / MARKED[0][1])
    drawn = recorded.plot("bwd", memory=True)
    known = [row for row in recorded.rows if row["which"] == "bwd" and row["status"] == "ok" and row["peak_bytes"] is not None]
    drawn_cells = {cell["key"] for cell in recorded.cells if cell["mask"] == "causal" and cell["workload"]["dbias"]}
    points = sum(row["cell"] in drawn_cells for row in known)
    assert points == 6 and drawn.count("<circle") == points and "peak memory" in drawn and ">MiB<" in drawn


def test_a_run_without_a_commit_is_no_figure(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Numbers from somewhere\n")
    (tmp_path / "run.json").write_text((ROOT / "docs" / MARKED[0][1]).read_text())
    with pytest.raises(ValueError, match="names no commit"):
        Recorded(tmp_path / "run.json")
