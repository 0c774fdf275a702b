"""Whether all ranks mean the same call: with ``TRIFLASH_CHECK=1`` they tell each other first, and what differs is named.

Called by ``attention.py``.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import UnsupportedError, bad_value
from .group import Group, all_gather, exchange_numbers, wait

__all__ = ["agree", "is_checking", "rows_apart", "values_of"]

_T = TypeVar("_T")
_EITHER = "1 or rows"
_REFUSED = "refused"
_KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (ValueError, TypeError, UnsupportedError, RuntimeError)}
_checks: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # by process group: whether its ranks check, as all of them know


def agree(handle: Any, group: Group, given: tuple[Any, ...], told: Callable[[], Mapping[str, Any]], check: Callable[[], _T]) -> _T:
    """What check returns, which raises what is wrong with this rank's arguments. Where ranks are to agree they tell each other first: each
    raises the same ValueError, naming the first argument that they do not agree about, and a rank, or what check raised on the first rank
    that it did so on, so that none waits for one that has left. given: tensors of the call. told: gives its arguments, by name.

    Whether to is read from the environment when a group is first used, by every rank, and agreed by one collective: if one checks, all do.
    Never while PyTorch traces or a CUDA graph is captured.
    """
    device = next((x.device for x in given if isinstance(x, Tensor)), None)
    if group.size == 1 or device is None or _is_capturing(device):
        return check()
    if handle not in _checks:
        own = os.environ.get("TRIFLASH_CHECK") == "1"
        _checks[handle] = any(each[0] for each in exchange_numbers([own], group, device))
    if not _checks[handle]:
        return check()
    refused, words = None, ["", ""]
    try:
        found = check()
    except Exception as error:  # noqa: BLE001 (whatever it is, the others wait)
        refused, words = error, [next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "RuntimeError"), str(error)]
    text = json.dumps({name: _described(x) for name, x in told().items()} | {_REFUSED: words}).encode()
    most = max(each[0] for each in exchange_numbers([len(text)], group, device))
    padded = torch.tensor([[*text, *b" " * (most - len(text))]], dtype=torch.uint8, device=device)
    said = [json.loads(bytes(row)) for row in wait(all_gather(padded, group), group).tolist()]
    for name in dict.fromkeys(name for each in said for name in each if name != _REFUSED):
        first = said[0].get(name, "None")
        for rank, own in enumerate([each.get(name, "None") for each in said]):
            if not _same(own, first):
                raise bad_value(name, f"the same on every rank, {first} as on rank 0", f"{own} on rank {rank}")
    if refused is not None and all(each[_REFUSED] == words for each in said):
        raise refused
    for rank, each in enumerate(said):
        kind, message = each[_REFUSED]
        if kind:
            raise _KINDS[kind](message if f"on rank {rank}" in message else f"{message} (on rank {rank})") from refused
    return found


def is_checking(handle: Any, device: torch.device) -> bool:
    """Whether the ranks of a group tell each other their arguments, as all of them know; or this one was asked to look at values since."""
    return (_checks.get(handle, False) or os.environ.get("TRIFLASH_CHECK") == "1") and not _is_capturing(device)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def rows_apart(x: Any, dim: int, rows: int) -> Any:
    """A tensor for :func:`agree` whose dim of rows may differ between ranks: described, with its own rows called so."""
    if not isinstance(x, Tensor) or x.is_nested or not -x.dim() <= dim < x.dim():
        return x
    shape: list[Any] = list(x.shape)
    if shape[dim] == rows:
        shape[dim] = _EITHER if rows == 1 else "rows"
    return f"{_of(x)} of shape ({', '.join(map(str, shape))})"


def values_of(x: Any) -> Any:
    """A tensor of few numbers for :func:`agree`, which are to be the same as well: in full, if very few. Waits for the device."""
    if not isinstance(x, Tensor) or x.is_nested:
        return x
    try:
        values = x.tolist()
    except RuntimeError:  # meta tensors, those of a transform
        return x
    text = repr(values)
    return f"{_of(x)} of values {text if x.numel() <= 8 else f'whose CRC is {zlib.crc32(text.encode()):08x}, shape {tuple(x.shape)}'}"


def _same(one: str, other: str) -> bool:
    """A dim of one row, where a rank holds one, may be that row or shared by all."""
    return any(one.replace(_EITHER, word) == other.replace(_EITHER, word) for word in ("rows", "1"))


def _of(x: Tensor) -> str:
    learned = " that requires a gradient" if x.requires_grad and torch.is_grad_enabled() else ""
    return f"a {str(x.dtype).removeprefix('torch.')} tensor{learned}"


def _described(x: Any) -> str:
    if isinstance(x, Tensor):
        return "a NestedTensor" if x.is_nested else f"{_of(x)} of shape {tuple(x.shape)}"
    return x if isinstance(x, str) else repr(x)
