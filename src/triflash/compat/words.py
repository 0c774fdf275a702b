"""The front door in another package's words: errors whose arguments are called otherwise, and windows. Imports nothing of this package."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["renamed", "unless_open"]


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


def unless_open(window: Any) -> Any:
    """The window, or None where it is FlashAttention's (-1, -1): the same, but a call without one is told sooner when it comes again."""
    return None if type(window) is tuple and window == (-1, -1) and type(window[0]) is type(window[1]) is int else window
