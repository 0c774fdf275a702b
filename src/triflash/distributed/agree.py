"""Whether all ranks mean the same call: with ``TRIFLASH_CHECK=1`` they tell each other first, and what differs is named.

Called by ``attention.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import bad_value
from .group import Group, all_gather, exchange_numbers, wait

__all__ = ["agree", "rows_apart"]

_EITHER = "1 or rows"
_checks: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # by process group: whether its ranks check, as all of them know


def agree(handle: Any, group: Group, device: torch.device, told: Callable[[], Mapping[str, Any]]) -> None:
    """Raise the same ValueError on every rank, naming the first argument that ranks do not agree about, and a rank. told: gives
    the arguments, by name.

    Whether to is read from the environment when a group is first used, by every rank, and agreed by one collective: if one checks, all do.
    Never while PyTorch traces or a CUDA graph is captured.
    """
    if group.size == 1 or torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return
    if handle not in _checks:
        own = os.environ.get("TRIFLASH_CHECK") == "1"
        _checks[handle] = any(each[0] for each in exchange_numbers([own], group, device))
    if not _checks[handle]:
        return
    given = told()
    text = json.dumps({name: _described(x) for name, x in given.items()}).encode()
    most = max(each[0] for each in exchange_numbers([len(text)], group, device))
    padded = torch.tensor([[*text, *b" " * (most - len(text))]], dtype=torch.uint8, device=device)
    said = [json.loads(bytes(row)) for row in wait(all_gather(padded, group), group).tolist()]
    for name in given:
        for rank, each in enumerate(said):
            if not _same(each[name], said[0][name]):
                raise bad_value(name, f"the same on every rank, {said[0][name]} as on rank 0", f"{each[name]} on rank {rank}")


def rows_apart(x: Any, dim: int, rows: int) -> Any:
    """A tensor for :func:`agree` whose dim of rows may differ between ranks: described, with its own rows called so."""
    if not isinstance(x, Tensor) or not -x.dim() <= dim < x.dim():
        return x
    shape: list[Any] = list(x.shape)
    if shape[dim] == rows:
        shape[dim] = _EITHER if rows == 1 else "rows"
    return f"{_of(x)} of shape ({', '.join(map(str, shape))})"


def _same(one: str, other: str) -> bool:
    """A dim of one row, where a rank holds one, may be that row or shared by all."""
    return any(one.replace(_EITHER, word) == other.replace(_EITHER, word) for word in ("rows", "1"))


def _of(x: Tensor) -> str:
    learned = " that requires a gradient" if x.requires_grad and torch.is_grad_enabled() else ""
    return f"a {str(x.dtype).removeprefix('torch.')} tensor{learned}"


def _described(x: Any) -> str:
    return f"{_of(x)} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else x if isinstance(x, str) else repr(x)
