"""What the caller chose of configurations: single kernels by hand, or a tuned file.

Called by ``select.py``, ``triton.py``, ``hopper.py`` and the room of the portable kernels.
"""

from __future__ import annotations

from typing import NamedTuple

from . import overlay, override

__all__ = ["NO_CHOICES", "Choices", "current_choices"]


class Choices(NamedTuple):
    """A part of the key of plan caches. by_hand: (kernel, configuration) pairs. tuned: None without a file."""

    by_hand: tuple[tuple[str, override.Config], ...]
    tuned: overlay.Overlay | None


NO_CHOICES = Choices((), None)


def current_choices() -> Choices:
    """The choices in force where a pass starts. Every eager call asks, twice."""
    tuned = overlay.of_environment() if overlay.chosen is overlay.NOBODY else overlay.chosen
    if tuned is None and not override.by_hand:
        return NO_CHOICES
    return Choices(override.active(), tuned)  # type: ignore[arg-type]
