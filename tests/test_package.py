"""What is published: metadata that fits together, and the checks of scripts/package.py, which `make package` runs on what it built."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import triflash

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import package

CHANGELOG = "# Changelog\n\n## [0.3.0] - 2027-01-31\n\n## [0.2.0] - 2026-12-01\n"
CITATION = "version: 0.3.0\ndate-released: 2027-01-31\n"
PYPROJECT = '[project.urls]\nHomepage = "https://example.org/triflash"\n'


def test_contents() -> None:
    good = ["triflash/__init__.py", "triflash/py.typed", "triflash/kernels/hopper/dq.py", "triflash-0.3.0.dist-info/licenses/LICENSE"]
    bad = ["tests/test_a.py", "triflash/results.json", "docs/x.png", "triflash/__pycache__/a.py", "scripts/house.py", "triflash/a.png"]
    assert package.misplaced(good, wheel=True) == [] and package.misplaced([*good, *bad], wheel=True) == bad
    good = ["README.md", "pyproject.toml", "PKG-INFO", "src/triflash/a.py", "src/triflash.egg-info/SOURCES.txt", "src/triflash/py.typed"]
    bad = ["tests/test_a.py", "docs/results/x.png", "Makefile", "src/triflash/notes.md", ".github/a.yml"]
    assert package.misplaced(good, wheel=False) == [] and package.misplaced([*good, *bad], wheel=False) == bad


@pytest.mark.parametrize("change, lacks", [
    ({}, []),
    ({"version": "0.3.0.dev0"}, ["take .dev off", "no dated heading", "another version", "no date-released"]),
    ({"changelog": CHANGELOG.replace("2027-01-31", "Unreleased")}, ["no dated heading", "no date-released"]),
    ({"changelog": CHANGELOG.replace("01-31", "02-01")}, ["or another date"]),
    ({"citation": "version: 0.3.0\n"}, ["no date-released"]),
    ({"citation": CITATION.replace("0.3.0", "0.2.0")}, ["another version than 0.3.0"]),
    ({"pyproject": "[project]\n"}, ["no [project.urls]"]),
    ({"pyproject": PYPROJECT.replace("https", "http")}, ["no [project.urls]"]),
])  # fmt: skip
def test_what_a_release_lacks(change: dict[str, str], lacks: list[str]) -> None:
    given = {"version": "0.3.0", "changelog": CHANGELOG, "citation": CITATION, "pyproject": PYPROJECT, **change}
    found = package.unready(**given)
    assert len(found) == len(lacks) and all(words in each for words, each in zip(lacks, found, strict=True))


def test_versions_agree() -> None:
    """The next one everywhere, its date open until it is released."""
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    version, date = newest.groups()
    released = date != "Unreleased"
    assert triflash.__version__ == (version if released else f"{version}.dev0")
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\n" in citation and ("date-released" in citation) == released


def test_a_bug_report_wants_triflash_env() -> None:
    yaml = pytest.importorskip("yaml")
    template = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    wanted = {each["id"]: each for each in template["body"]}
    assert wanted["env"]["validations"]["required"] and "`triflash env`" in wanted["env"]["attributes"]["description"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "MIT" and citation["authors"]
