"""The exceptions triflash raises and the one place that words them. Imported by everything above the kernels; imports nothing."""

from __future__ import annotations

__all__ = ["UnsupportedError", "bad_type", "bad_value", "unsupported"]


class UnsupportedError(NotImplementedError):
    """The arguments are valid, but the backend that was asked for cannot compute this combination.

    The message names the feature, the backend, and the nearest thing that works. Valid arguments never raise this from the automatic
    choice as long as one backend can compute them.
    """


def _message(name: str, wanted: str, got: object, hint: str) -> str:
    text = f"{name}: wanted {wanted}, got {got}"
    return f"{text}; {hint}" if hint else text


def bad_value(name: str, wanted: str, got: object, hint: str = "") -> ValueError:
    """``ValueError("name: wanted …, got …; hint")``, to be raised by the caller."""
    return ValueError(_message(name, wanted, got, hint))


def bad_type(name: str, wanted: str, got: object, hint: str = "") -> TypeError:
    """``TypeError("name: wanted …, got …; hint")``, to be raised by the caller."""
    return TypeError(_message(name, wanted, got, hint))


def unsupported(feature: str, backend: str, nearest: str) -> UnsupportedError:
    """``UnsupportedError`` naming what was asked, of whom (of ``"auto"``: whoever might), and what to do instead."""
    return UnsupportedError(f"{feature}: not supported by {'any backend' if backend == 'auto' else f'backend {backend!r}'}; {nearest}")
