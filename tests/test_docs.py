"""The pages under docs: programs run as written, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def run(page: str, **changes: str) -> dict[str, Any]:
    """All programs of a page, one after the other."""
    names: dict[str, Any] = {}
    for program in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL):
        for old, new in changes.items():
            program = re.sub(rf"\b{old} = .*", f"{old} = {new}", program)
        exec(compile(program, page, "exec"), names)
    return names


def test_recipes() -> None:
    names = run("recipes.md", d="2, 1024, 8, 8")  # only the head dim is smaller than written
    q, k, v = (names[name].detach().float().permute(0, 2, 1, 3) for name in "qkv")
    assert q.shape == (2, 8, 1024, 8)
    # The last: causal from the top left, which is the bottom right here, with the bias of zeros.
    torch.testing.assert_close(
        names["out"].detach().float(),
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2),
        atol=1e-4 if names["dtype"] == torch.float32 else 3e-2,
        rtol=1e-3,
    )
    table = names["positions"].weight
    assert table.requires_grad and names["sink"].grad.shape == (8,) and names["keys"].grad.shape == (2, 1, 1, 1024)
    assert names["lse"].shape == (2, 8, 1024) and torch.isfinite(names["lse"]).all()


def test_what_runs_where() -> None:
    assert [str(launch) for launch in run("backends.md")["ran"]] == ["tiled: forward"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    """Relative ones; that of a heading to a heading, by GitHub's rule."""
    prose = re.sub(r"^(```.*?^```|    .*?)$|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)  # no code
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists() and path.is_relative_to(ROOT), f"{page.name}: {target}"
        if anchor:
            text = path.read_text()
            headings = [
                re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in re.findall(r"^#+ .*$", text, re.MULTILINE)
            ]
            assert anchor in headings or f'<a id="{anchor}">' in text, f"{page.name}: {target}"
