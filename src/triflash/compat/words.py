"""Errors of the front door in another package's words: its arguments are called otherwise. Imports nothing."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["renamed"]


def renamed(error: Exception, names: Mapping[str, str]) -> Exception:
    """The error with the argument's other name, of ``name: wanted …, got …``. UnsupportedError and others come back as they are."""
    name, colon, rest = str(error).partition(":")
    return type(error)(f"{names[name]}{colon}{rest}") if colon and name in names else error
