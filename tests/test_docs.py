"""The pages under docs: programs run as written, links lead somewhere."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import os
import pydoc
import re
import shlex
import subprocess
import sys
import textwrap
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


def test_where_dq_is_added_up_on_hopper() -> None:
    """The table of docs/backends.md is what the plan does, at the number of keys and one below it."""
    page = (ROOT / "docs" / "backends.md").read_text()
    rows = re.findall(r"^\| (?:up to (\d+)|above) \| ([\d,]+|never)(?: keys)? \| ([\d,]+|never) \| ([\d,]+|never) \|$", page, re.MULTILINE)
    assert len(rows) == 4

    def added(d: int, keys: int, kind: int) -> bool:
        q, k = (torch.empty(2, n, 2, d, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (2048, keys))
        options = [{}, {"causal": True}, {"bias": torch.empty(2048, keys, dtype=torch.bfloat16, device="meta")}][kind]
        found = triflash.explain(q, k, k, **options, deterministic=False, device="h200")
        return any("dqdkdv" in launch for launch in found.launches)

    for dim, *limits in rows:
        for kind, limit in enumerate(limits):
            if limit == "never":
                assert not added(256, 8192, kind)
            else:
                keys = int(limit.replace(",", ""))
                assert added(int(dim), keys, kind) and not added(int(dim), keys - 1, kind), (dim, kind)


PROGRAM_AND_OUTPUT = re.compile(
    r"```python\n(.*?)```\n(?:\n((?:    [^\n]*\n)+))?", re.DOTALL
)  # an indented block right behind it is what it prints


@pytest.mark.parametrize("page", ["biases.md", "masks.md"])
def test_a_guide_runs_as_written_and_prints_what_it_says(page: str) -> None:
    names: dict[str, Any] = {}
    programs = PROGRAM_AND_OUTPUT.findall((ROOT / "docs" / page).read_text())
    assert len(programs) >= 5
    for program, said in programs:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(program, page, "exec"), names)
        assert printed.getvalue() == textwrap.dedent(said)
    q, k, v = (names[name].detach().cpu() for name in "qkv")
    if page == "biases.md":  # the last call is of zeros, in two biases: attention without any
        seen, out = torch.ones(48, 64, dtype=torch.bool), triflash.attention(q, k, v, bias=(names["bias"].cpu(), names["keys"].cpu()))
    else:
        seen, out = names["attention_mask"][:, None, None, :].bool() & torch.ones(32, 32, dtype=torch.bool).tril(), names["out"]
    s = torch.einsum("bihd,bjhd->bhij", q, k) / 4
    dense = torch.einsum("bhij,bjhd->bihd", s.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(), v)
    torch.testing.assert_close(out.detach(), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_the_shell_prints(page: Path) -> None:
    """Where a page shows a command behind ``$``, the lines below are what it prints."""
    sessions = re.findall(r"^    \$ (triflash .*)\n((?:    (?!\$ ).*\n)*)", page.read_text(), re.MULTILINE)
    assert sessions or page != ROOT / "README.md"
    for command, said in sessions:
        here = command.replace("triflash ", f"{shlex.quote(sys.executable)} -m triflash ", 1)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)}
        ran = subprocess.run(here, shell=True, capture_output=True, text=True, env=environment)
        assert (ran.returncode, ran.stdout) == (0, textwrap.dedent(said)), ran.stderr


def test_kv_caches() -> None:
    names = run("kvcache.md")
    assert names["lengths"].tolist() == [5, 0, 40] and names["out"].shape == (3, 1, 8, 32) and names["out"].dtype == torch.float16
    assert names["k_cache"][0, 5].abs().sum() > 0 and (names["k_cache"][0, 6:] == 0).all()


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


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results").iterdir()), ids=lambda path: path.name)
def test_every_record_names_its_commit(path: Path) -> None:
    """Figures on pages link to a record, or name the commit themselves."""
    text = (path / "README.md" if path.is_dir() else path).read_text()
    assert re.search(r"commit ([0-9a-f]{7,40})\b", text), path


@pytest.mark.parametrize(
    "page", ["README.md", "docs/features.md", "docs/integrations.md", "docs/performance.md", "docs/how-it-works.md", "docs/biases.md"]
)
def test_pages_with_figures_name_commits_or_records(page: str) -> None:
    """Every section with a speed or a time in it."""
    for section in re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE):
        if re.search(r"TFLOP/s|\d µs|\d ms\b|tokens a second", section):
            assert re.search(r"commit [0-9a-f]{7}|\]\((\.\./)?(docs/)?results/", section), section[:80]


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


@pytest.mark.parametrize("module", DOCUMENTED)
def test_help_reads_like_the_page(module: str) -> None:
    """No roles of Sphinx, no parameters that only serve error messages; each parameter is told of, here or where the docstring says."""
    for name in importlib.import_module(module).__all__:
        thing = getattr(importlib.import_module(module), name)
        if not callable(thing) or name.startswith(ELSEWHERE):
            continue
        text = inspect.getdoc(thing) or ""
        assert not re.search(r":(func|class|mod|meth|data):`", text), name
        parameters = set() if inspect.isclass(thing) and issubclass(thing, Exception) else set(inspect.signature(thing).parameters)
        if name != "explain":  # which says of them that they are ``attention``'s
            assert not parameters & {"more", "others"}, name
        if "as of ``" not in text:
            assert parameters - set(re.findall(r"\w+", text)) == set(), name
        assert name in pydoc.render_doc(thing)


# Pages for users. The others are the reference, or for whoever changes the code.
GUIDE = sorted({path.name for path in (ROOT / "docs").glob("*.md")} - {"api.md", "api-compat.md", "design.md", "tuning.md", "bench.md"})


def test_every_public_function_has_a_page() -> None:
    """Beyond the reference: a guide calls it, or names it in code."""
    text = "\n".join((ROOT / "docs" / page).read_text() for page in GUIDE)
    code = "\n".join([*re.findall(r"```python\n(.*?)```", text, re.DOTALL), *re.findall(r"`([^`\n]+)`", text)])
    words = set(re.findall(r"\w+", code))
    public = {
        name
        for module in DOCUMENTED
        for name in importlib.import_module(module).__all__
        if callable(getattr(importlib.import_module(module), name)) and not name.startswith(ELSEWHERE)
    }
    assert sorted(public - words) == [], "public functions without a page: write one, or a section of one"


def test_a_user_calls_everything_in_strict_types() -> None:
    """tests/strict_user.py, which mypy checks, names all that is public."""
    words = set(re.findall(r"\w+", (ROOT / "tests" / "strict_user.py").read_text()))
    public = {name for module in DOCUMENTED for name in importlib.import_module(module).__all__ if not name.startswith(ELSEWHERE)}
    assert public - words - {"OLDEST"} == set()
