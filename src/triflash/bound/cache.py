"""A bounded map that forgets what was least recently asked for. A look-up is one of a dict: eager calls wait for it.

Called by ``bound/`` and ``door.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Entry", "Recent"]


class Entry(Protocol):
    """What is kept: it carries when it was asked for last, as a number that only :class:`Recent` reads."""

    stamp: int


_E = TypeVar("_E", bound=Entry)


class Recent(Generic[_E]):
    """``capacity`` entries at most; beyond it an eighth of them goes, the least recently used first.

    Time is counted in entries added, so that a look-up only notes the present. Threads share it: look-ups take no lock.

    near: whatever a caller knows of entries that finds them faster; forgotten with the first of them.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.near: dict[Hashable, Any] = {}
        self.now = 0
        self._entries: dict[Hashable, _E] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> _E | None:
        """The entry of a key, or None. Raises TypeError for a key that cannot be hashed."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.stamp = self.now
        return entry

    def add(self, key: Hashable, entry: _E) -> None:
        """Keep an entry."""
        with self._lock:
            self.now += 1
            entry.stamp = self.now
            self._entries[key] = entry
            if len(self._entries) > self.capacity:
                self.near.clear()
                oldest = sorted(self._entries.items(), key=lambda item: item[1].stamp)[: max(1, self.capacity // 8)]
                for stale, _ in oldest:
                    if stale != key:
                        del self._entries[stale]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self.near.clear()
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)
