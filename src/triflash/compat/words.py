"""Errors of the front door in another package's words: its arguments are called otherwise. Imports nothing of this package."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["renamed"]


def renamed(error: Exception, names: Mapping[str, str]) -> Exception:
    """The error with the arguments' other names: in front, of ``name: wanted …, got …``, and wherever its words mention one. Those that are
    English words too only as code: ``scale=``, ``float(scale)``. UnsupportedError and others come back as they are.
    """
    name, wanted, rest = str(error).partition(": wanted ")
    if not wanted:
        return error
    code = [word if "_" in word or len(word) == 1 else rf"{word}(?==)|(?<=\(){word}(?=\))" for word in names]
    rest = re.sub(rf"(?<![\w'\"])(?:{'|'.join(code)})(?!\w)", lambda found: names[found[0]], rest)
    return type(error)(f"{names.get(name, name)}{wanted}{rest}")
