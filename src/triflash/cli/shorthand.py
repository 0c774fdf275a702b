"""How the command line writes sizes, dtypes, masks and biases: ``--s 2k,8k --dtype bf16 --causal both --bias none,1hqk``.

Used by every command that takes shapes. Every function raises ``ValueError`` with what it wanted and what it got.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import TypeVar

import torch

from ..errors import bad_value
from ..spec import DTYPE_NAMES

__all__ = ["bias_pattern", "bias_shape", "causal", "dtype", "items", "mask_pattern", "option", "pair", "quotient", "size"]

T = TypeVar("T")

_MULTIPLES = {"": 1, "k": 1024, "m": 1024**2}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items() if dtype.is_floating_point}
_LONG_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}
_LETTERS = "bihqk"  # outer batch, inner batch, head, query, key


def size(text: str) -> int:
    """A positive whole number; ``k`` counts 1024 and ``m`` 1024²: ``4k`` is 4096, ``1.5k`` is 1536."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([km]?)", text.strip().lower())
    value = float(match[1]) * _MULTIPLES[match[2]] if match else 0.0
    if value < 1 or value != int(value):
        raise bad_value("size", "a positive whole number such as 512, 4k or 1.5k (k = 1024)", repr(text))
    return int(value)


def pair(text: str) -> tuple[int, int]:
    """A size for both, or one for each: ``128`` is ``(128, 128)``, ``192x128`` is ``(192, 128)``."""
    first, by, second = text.partition("x")
    return size(first), size(second if by else first)


def quotient(option: str, total: int, name: str, size: int) -> int:
    """``total / size``, where ``option`` gives ``total``, which must be a multiple of every size of the option ``name``."""
    if total % size:
        raise bad_value(option, f"a multiple of every {name}", total, f"{name} {size} does not divide it")
    return total // size


def dtype(text: str) -> torch.dtype:
    """A floating-point dtype: ``fp16``, ``bf16``, ``fp32``, ``fp64``, or PyTorch's name for it."""
    name = text.strip().lower().removeprefix("torch.")
    found = _DTYPES.get(name) or _LONG_NAMES.get(name)
    if found is None:
        raise bad_value("dtype", f"one of {', '.join(_DTYPES)}", repr(text))
    return found


def causal(text: str) -> tuple[bool, ...]:
    """``yes``, ``no`` or ``both`` as the values to run: ``(True,)``, ``(False,)`` or ``(False, True)``; also ``causal`` and ``full``."""
    values = {"no": (False,), "full": (False,), "yes": (True,), "causal": (True,), "both": (False, True)}
    if text.strip().lower() not in values:
        raise bad_value("causal", "yes, no or both", repr(text))
    return values[text.strip().lower()]


def bias_pattern(text: str, name: str = "bias") -> str | None:
    """A bias by the dims along which it varies: a letter of ``bhqk`` where it does, 1 where it broadcasts, None for ``none``.

    ``1hqk`` is one value per head, query and key, shared by the batch. Leading dims may be left out (``qk``), as a tensor's may. Five
    letters are over (outer batch, inner batch, head, query, key), ``bihqk``, for the operators underneath. name: what errors call it.
    """
    pattern = text.strip().lower()
    if pattern == "none":
        return None
    letters = _LETTERS if len(pattern) == 5 else "bhqk"[-len(pattern) :]
    if not 2 <= len(pattern) <= 5 or any(own not in ("1", letter) for own, letter in zip(pattern, letters, strict=True)):
        raise bad_value(name, "none, or dims such as 1hqk, b11k, qk (bhqk in order; 1 where it broadcasts)", repr(text))
    return pattern


def mask_pattern(text: str) -> str | None:
    """As :func:`bias_pattern`, of a mask."""
    return bias_pattern(text, "mask")


def bias_shape(pattern: str, batch: int, heads: int, queries: int, keys: int, batch_inner: int = 1) -> tuple[int, ...]:
    """The shape of a bias of that pattern: ``bias_shape("1hqk", b, h, m, n)`` is ``(1, h, m, n)``.

    Five letters split the batch in two levels, of ``batch // batch_inner`` and ``batch_inner``.
    """
    levels = {"i": batch_inner, "h": heads, "q": queries, "k": keys, "b": batch // batch_inner if len(pattern) == 5 else batch}
    return tuple(1 if letter == "1" else levels[letter] for letter in pattern)


def items(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """A parser of comma-separated lists: ``items(size)("2k,8k")`` is ``[2048, 8192]``; repeated values count once."""

    def parse_list(text: str) -> list[T]:
        return list(dict.fromkeys(parse(part) for part in text.split(",")))

    return parse_list


def option(parse: Callable[[str], T]) -> Callable[[str], T]:
    """The same parser as argparse's ``type=``, so that its own words reach whoever mistyped an option."""

    def parse_option(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_option
