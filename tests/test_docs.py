"""The pages under docs: programs run as written, links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import triflash

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


# Whose public functions and classes the site's reference shows.
DOCUMENTED = [
    "triflash", "triflash.distributed", "triflash.nn", "triflash.compat.sdpa", "triflash.compat.torch_varlen", "triflash.compat.flash_attn", "triflash.compat.xformers",
    "triflash.compat.evoformer",
    "triflash.integrations.transformers", "triflash.triton_flash_attention",
]  # fmt: skip
ELSEWHERE = ("FlashAttn", "_flash_attn")  # the seed's autograd classes and what ring-attention packages call: docs/migration.md


def test_the_reference_has_every_public_name() -> None:
    """And under each name stands the object that a program gets, with a docstring."""
    shown = [
        path
        for page in ("api.md", "api-compat.md")
        for path in re.findall(r"^::: (\S+)$", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    ]
    objects = [getattr(importlib.import_module(module), name) for module, _, name in (path.rpartition(".") for path in shown)]
    public = {
        f"{module}.{name}": getattr(importlib.import_module(module), name)
        for module in DOCUMENTED
        for name in importlib.import_module(module).__all__
    }
    wanted = {name: thing for name, thing in public.items() if callable(thing) and not name.rpartition(".")[2].startswith(ELSEWHERE)}
    assert [name for name, thing in wanted.items() if not any(thing is each for each in objects)] == []
    assert [path for path, thing in zip(shown, objects, strict=True) if not inspect.getdoc(thing)] == []
    assert triflash.attention in objects and len(shown) == len(set(shown))


def test_the_reference_names_what_programs_import() -> None:
    """A heading that is not where the object is defined is where it is imported from."""
    for path, heading in re.findall(
        r"^::: (\S+)\n    options: \{heading: (triflash[\w.]+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE
    ):
        there, here = (getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in (path, heading))
        assert there is here, path


def test_the_site_has_every_page() -> None:
    """In its menu, but for the results, which their own page lists."""
    menu = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)) - {"index.md"}
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} | {path.name for path in ROOT.glob("*.md")} - {"README.md"}
    assert menu == pages | {"results/README.md"}


def test_pages_outside_docs_are_on_the_site() -> None:
    """Whatever of the repository a page links to, scripts/site_pages.py brings in (without its plugins: read, not run)."""
    source = ast.parse((ROOT / "scripts" / "site_pages.py").read_text())
    found = next(
        ast.literal_eval(node.value) for node in source.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OUTSIDE"
    )
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s:#]+)[)#]", page.read_text()):
            path = (page.parent / target).resolve()
            if path.exists() and not path.is_relative_to(ROOT / "docs"):
                assert str(path.relative_to(ROOT)) in found, f"{page.name}: {target}"


def test_a_user_calls_everything_in_strict_types() -> None:
    """tests/strict_user.py, which mypy checks, names all that is public."""
    words = set(re.findall(r"\w+", (ROOT / "tests" / "strict_user.py").read_text()))
    public = {name for module in DOCUMENTED for name in importlib.import_module(module).__all__ if not name.startswith(ELSEWHERE)}
    assert public - words - {"OLDEST"} == set()
