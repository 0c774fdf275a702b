"""What mkdocs.yml needs beyond plugins: pages that lie outside docs/, links to them, and public names in the API reference.

The README is the first page, and the other pages of the root keep their names. A link that leads out of docs/ leads to the same file on
the site: nothing is written twice. Tables and plots of measurements are made from docs/results (scripts/measured.py). A link to a file that
the site does not have is left alone, and mkdocs, which is strict, stops at it.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from measured import MARK, Recorded  # noqa: E402  beside this file

OUTSIDE = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "RELEASING.md",
    "SECURITY.md",
    "LICENSE",
    "examples/t5_finetune.py",
    "examples/llama_generate.py",
    "examples/swin_images.py",
    "examples/pairformer.py",
    "examples/paged_cache.py",
    "examples/plot_bias.py",
]
RENAMED = {"README.md": "index.md"}
_LINK = re.compile(r"(?<=\]\()([^)\s:#]+)(?=[)#])")
_CODE = re.compile(r"`[^`\n]+`")


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside docs/."""
    for name in OUTSIDE:
        files.append(File.generated(config, RENAMED.get(name, name), content=(ROOT / name).read_text()))
    for page in (ROOT / "docs").glob("*.md"):
        for path, which, what in MARK.findall(page.read_text()):
            if what.endswith("plot"):
                drawn = Recorded(ROOT / "docs" / path).plot(which, memory=what == "memory-plot")
                files.append(File.generated(config, _drawing(path, which, what), content=drawn))
    return files


def _drawing(path: str, which: str, what: str) -> str:
    return f"{path.removesuffix('.json')}-{which}-{what}.svg"


def _measured(match: re.Match[str]) -> str:
    """What a page shows of a recorded run in place of its comment."""
    path, which, what = match.groups()
    recorded = Recorded(ROOT / "docs" / path)
    if what and what.endswith("plot"):
        caption = recorded.caption(which, memory=what == "memory-plot")
        return f"![{caption}]({_drawing(path, which, what)})\n\n{caption}"
    return recorded.table(which, memory=what == "memory")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Measurements in place of their comments; links to files of the repository as links to files of the site; a bar in code in a table as
    the bar that is meant.
    """
    uri = page.file.src_uri
    markdown = MARK.sub(_measured, markdown)
    here = next((name for name, other in RENAMED.items() if other == uri), uri if uri in OUTSIDE else f"docs/{uri}")

    def on_site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[1]))
        if target in OUTSIDE:
            target = RENAMED.get(target, target)
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        else:
            return match[1]
        return posixpath.relpath(target, posixpath.dirname(uri) or ".")

    lines = [
        _CODE.sub(lambda code: code[0].replace("\\|", "|"), line) if line.startswith("|") else line
        for line in markdown.splitlines(keepends=True)
    ]
    return _LINK.sub(on_site, "".join(lines))


class PublicNames(griffe.Extension):
    """Parameters that only serve error messages are left out, as in ``help()``."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Signatures that the module replaces by ``__signature__``."""
        if func.path in ("triflash.attention.attention", "triflash.varlen.attention_varlen"):
            for name in ("more", "others"):
                if name in func.parameters:
                    del func.parameters[name]
            func.overloads = None
