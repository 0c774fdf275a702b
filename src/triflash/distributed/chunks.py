"""Which rows of a sequence each rank holds. Integers alone: no tensor, no process group. Called by all methods, and remembered."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from ..errors import bad_value

__all__ = ["ORDERS", "Piece", "check_order", "natural", "pieces", "share", "shares"]

ORDERS = ("zigzag", "contiguous")


class Piece(NamedTuple):
    """Rows ``start`` to ``stop`` of the sequence, which lie one behind the other from row ``at`` of what a rank holds."""

    start: int
    stop: int
    at: int


_F = TypeVar("_F", bound=Callable[..., Any])


def _remembered(function: _F) -> _F:
    """What a function of integers gave for the same; not for symbolic ones."""
    known: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(function)
    def asked(*args: Any) -> Any:
        if torch.compiler.is_compiling() or type(args[0]) is not int:
            return function(*args)
        found = known.get(args)
        if found is None:
            if len(known) >= 4096:
                known.clear()
            found = known[args] = function(*args)
        return found

    return asked  # type: ignore[return-value]


def check_order(order: object) -> None:
    """Raise ValueError unless ``order`` names one."""
    if order not in ORDERS:
        raise bad_value("order", f"one of {', '.join(ORDERS)}", repr(order))


@_remembered
def pieces(length: int, size: int, rank: int, order: str) -> tuple[Piece, ...]:
    """What rank holds of a sequence, in the order in which it holds it; neighbours are one piece, empty ones none.

    zigzag: chunks ``rank`` and ``2 size − 1 − rank`` of ``2 size``, so that every rank sees as much of a causal sequence; contiguous: chunk
    ``rank`` of ``size``. Chunk c of n is rows ``⌊c length / n⌋`` to ``⌊(c + 1) length / n⌋``.
    """
    count = 2 * size if order == "zigzag" else size
    held = (rank, count - 1 - rank) if order == "zigzag" else (rank,)
    found: list[Piece] = []
    at = 0
    for chunk in held:
        start, stop = chunk * length // count, (chunk + 1) * length // count
        if start == stop:
            continue
        if found and found[-1].stop == start:
            found[-1] = found[-1]._replace(stop=stop)
        else:
            found.append(Piece(start, stop, at))
        at += stop - start
    return tuple(found)


@_remembered
def share(length: int, size: int, rank: int, order: str) -> int:
    """How many rows rank holds."""
    return sum(piece.stop - piece.start for piece in pieces(length, size, rank, order))


@_remembered
def shares(length: int, size: int, order: str) -> tuple[int, ...]:
    """How many rows each rank holds."""
    return tuple([share(length, size, rank, order) for rank in range(size)])


@_remembered
def natural(length: int, size: int, order: str) -> tuple[tuple[int, Piece], ...]:
    """All pieces with their ranks, in the order of the sequence."""
    found = [(rank, piece) for rank in range(size) for piece in pieces(length, size, rank, order)]
    return tuple(sorted(found, key=lambda each: each[1].start))
