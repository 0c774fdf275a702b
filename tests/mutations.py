"""Changes of a kernel's source that its tests must notice. A place is found by its structure: ``old`` is Python in which ``_`` stands for any
expression and ``_1``, ``_2`` … for one that ``new`` may use, so neither layout nor what else a line mentions matters.

A change is noticed by a wrong value, by what the stand-in asserts or by a ``Hang``. Python that breaks (a TypeError …) is an error of the test.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

import pytest

import gluon_schedule
import gluon_twin

WILDCARD = re.compile(r"_\d*")


def matches(pattern: Any, node: Any, found: dict[str, ast.AST]) -> bool:
    if isinstance(pattern, ast.Name) and WILDCARD.fullmatch(pattern.id):
        return isinstance(node, ast.expr) and (pattern.id == "_" or ast.dump(found.setdefault(pattern.id, node)) == ast.dump(node))
    if isinstance(pattern, ast.AST):
        same = type(pattern) is type(node)
        return same and all(matches(getattr(pattern, name), getattr(node, name), found) for name in pattern._fields if name != "ctx")
    if isinstance(pattern, list):
        same = isinstance(node, list) and len(pattern) == len(node)
        return same and all(matches(a, b, found) for a, b in zip(pattern, node, strict=True))
    return bool(pattern == node)


class _Changed(ast.NodeTransformer):
    def __init__(self, old: str, new: str) -> None:
        self.old, self.new, self.count = ast.parse(old).body, new, 0
        self.within = None  # an expression, looked for anywhere, if the new one is an expression as well
        if len(self.old) == 1 and isinstance(self.old[0], ast.Expr) and _is_expression(new):
            self.within = self.old[0].value

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for _, body in ast.iter_fields(node):
            if self.within is None and isinstance(body, list) and body and isinstance(body[0], ast.stmt):
                for at in range(len(body) - len(self.old), -1, -1):
                    found: dict[str, ast.AST] = {}
                    if matches(self.old, body[at : at + len(self.old)], found):
                        self.count += 1
                        body[at : at + len(self.old)] = [_Filled(found).visit(x) for x in ast.parse(self.new).body]
        return node

    def visit(self, node: ast.AST) -> Any:
        found: dict[str, ast.AST] = {}
        if self.within is None or not matches(self.within, node, found):
            return self.generic_visit(node)
        self.count += 1
        return _Filled(found).visit(ast.parse(self.new, mode="eval").body)


def _is_expression(text: str) -> bool:
    try:
        ast.parse(text, mode="eval")
    except SyntaxError:
        return False
    return True


class _Filled(ast.NodeTransformer):
    def __init__(self, found: dict[str, ast.AST]) -> None:
        self.found = found

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self.found.get(node.id, node)


def mutated(text: str, old: str, new: str) -> str:
    """Source in which what looks like ``old``, wherever it does, is ``new``: expressions, or statements that follow each other."""
    change = _Changed(old, new)
    tree = change.visit(ast.parse(text))
    assert change.count, f"nothing looks like {old}"
    return ast.unparse(ast.fix_missing_locations(tree))


def mutate(monkeypatch: pytest.MonkeyPatch, module: str, old: str, new: str = "pass") -> None:
    """On the stand-in, a kernel module has the change from here on."""
    source = gluon_twin.source
    texts = {module: mutated(source(module), old, new)}
    monkeypatch.setattr(gluon_twin, "source", lambda module: texts.get(module) or source(module))


def noticed(run: Callable[[int], Any], seeds: int) -> bool:
    """Whether one of so many runs fails as a wrong kernel does."""
    for seed in range(seeds):
        try:
            run(seed)
        except (AssertionError, gluon_schedule.Hang):
            return True
    return False
