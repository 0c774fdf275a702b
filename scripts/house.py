"""What the source tree looks like: who imports whom, and how much of the kernels hands arguments on. For whoever rearranges it.

    python3 scripts/house.py imports             the import graph between rooms, as Mermaid, which docs/design.md shows
    python3 scripts/house.py imports --write     … put into docs/design.md
    python3 scripts/house.py plumbing [FOLDER]   lines that only hand arguments on, and the longest signatures; FOLDER: kernels/hopper

Plumbing is a line of a signature behind its first, or of a call behind its first, that holds nothing but names, attributes and constants.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "triflash"
DESIGN = ROOT / "docs" / "design.md"
BEGIN, END = "<!-- imports: scripts/house.py imports --write -->", "<!-- end of imports -->"
PASSED_ON = (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT)
SIGNS = frozenset("(),.:=*")


def modules() -> dict[str, Path]:
    """The package's modules, by their absolute names."""
    found = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def imports(name: str, everywhere: bool = True) -> set[str]:
    """What a module imports, as absolute names; with ``everywhere`` inside functions too, else only when it is imported itself."""
    known = modules()
    path = known[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # "from . import x" and "from ..plan import x" import the modules x, if that is what they are
            found |= {f"{module}.{a.name}" if f"{module}.{a.name}" in known else module for a in node.names}
    return found


def room_of(name: str) -> str:
    """A file of the package itself, or the folder that a module lies in, two levels deep."""
    parts = name.split(".")[1:]
    return ".".join(parts[:2]) if parts[0] == "kernels" else parts[0]


def graph() -> str:
    """Arrows between rooms; those that follow from others are left out."""
    arrows: dict[str, set[str]] = {}
    known = {name for name in modules() if name not in ("triflash", "triflash.__main__")}
    for name in sorted(known):
        own = room_of(name)
        arrows.setdefault(own, set())
        arrows[own] |= {room_of(target) for target in imports(name) & known} - {own}

    def reach(start: str, skip: str) -> set[str]:
        seen, queue = set(), [x for x in arrows[start] if x != skip]
        while queue:
            at = queue.pop()
            if at not in seen:
                seen.add(at)
                queue += arrows.get(at, ())
        return seen

    lines = ["```mermaid", "graph TD"]
    for own in sorted(arrows):
        kept = sorted(target for target in arrows[own] if target not in reach(own, target))
        lines += [f"    {label(own)} --> {label(target)}" for target in kept]
    return "\n".join([*lines, "```"])


def label(room: str) -> str:
    return f'{room.replace(".", "_")}["{room.replace(".", "/")}"]'


def launched() -> set[str]:
    """The kernels that the host launches, with arguments one by one: those of which ``launch/`` makes a ``Call``."""
    nodes = (node for path in (PACKAGE / "launch").glob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    calls = (node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Call")
    return {call.args[0].attr for call in calls if call.args and isinstance(call.args[0], ast.Attribute)}


def plumbing(folder: Path) -> tuple[int, int, list[tuple[int, str, bool]]]:
    """(lines that only hand on, lines in all, (parameters, function, whether the host launches it) of all functions)."""
    handed, total, signatures = 0, 0, []
    entries = launched()
    for path in sorted(folder.glob("*.py")):
        text = path.read_text()
        lines = text.splitlines()
        total += len(lines)
        found: set[int] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                entry = node.name in entries
                taken = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
                signatures.append((taken, f"{path.name}: {node.name}", entry))
                if not entry:
                    found |= set(range(node.lineno + 1, node.body[0].lineno))
            elif isinstance(node, ast.Call) and node.end_lineno is not None:
                found |= set(range(node.lineno + 1, node.end_lineno + 1))
        handed += sum(only_hands_on(lines[number - 1]) for number in found)
    return handed, total, sorted(signatures, reverse=True)


def only_hands_on(line: str) -> bool:
    text = line.strip()
    if not text or text.startswith(('"""', "#", ")")) or not re.search(r"\w", text):
        return False
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(f"({text})").readline))
    except (tokenize.TokenError, IndentationError, SyntaxError):
        tokens = [tokenize.TokenInfo(tokenize.NAME, word, (0, 0), (0, 0), "") for word in re.findall(r"\w+", text)]
    return all(t.type in PASSED_ON or t.type == tokenize.ENDMARKER or (t.type == tokenize.OP and t.string in SIGNS) for t in tokens)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["imports", "plumbing"])
    parser.add_argument("folder", nargs="?", type=Path, default=PACKAGE / "kernels" / "hopper")
    parser.add_argument("--write", action="store_true", help="put the graph into docs/design.md")
    options = parser.parse_args(argv)
    if options.what == "plumbing":
        handed, total, signatures = plumbing(options.folder)
        print(f"{handed} of {total} lines hand arguments on")
        for entry in (False, True):
            count, name, _ = next(each for each in signatures if each[2] == entry)
            print(f"most parameters of a function {'that the host launches' if entry else 'of the device'}: {count}, {name}")
    elif options.write:
        text = DESIGN.read_text()
        before, _, rest = text.partition(BEGIN)
        if not rest:
            sys.exit(f"{DESIGN.name} has no line {BEGIN}")
        DESIGN.write_text(before + BEGIN + "\n\n" + graph() + "\n\n" + END + rest.partition(END)[2])
    else:
        print(graph())
    return 0


if __name__ == "__main__":
    sys.exit(main())
