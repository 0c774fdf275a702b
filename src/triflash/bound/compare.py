"""Tensors told from others by one C function, where every microsecond counts. Called by ``signature.py``, ``call.py``, ``passes.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..launch.calls import address_of as address
from ..launch.calls import picking

__all__ = ["address", "comparison_of"]

# What Dynamo compares tensors by, in a tenth of the time that describing them takes. PyTorch does not promise it.
_guards: Any = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)


def comparison_of(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """``check(*others)``, which compares classes, dispatch keys, dtypes, devices, sizes, strides and who requires a gradient; None: this
    PyTorch does not have it in the form known here. It keeps no tensor.

    Keys are those in force: they tell negation, and of what is around a call autocast on that device, transforms of ``torch.func`` and
    ``torch.jit.trace``. Of dispatch modes PyTorch's own are left out (fake tensors, say): the stack of modes has to be asked.
    """
    if _guards is None:
        return None
    ids = [*map(id, tensors)]
    if len(set(ids)) < len(ids):  # one tensor twice, which they do not take
        return _comparison_of_twins(tensors, [ids.index(each) for each in ids])
    try:
        sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
        check: Callable[..., bool] = _guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return check if check(*tensors) is True else None
    except Exception:  # noqa: BLE001 (another form than that known here)
        return None


def _comparison_of_twins(tensors: Sequence[Tensor], first: list[int]) -> Callable[..., bool] | None:
    """The same where some are one tensor, as offsets of queries and keys are. first: of each the place where it comes first."""
    places = sorted(set(first))
    check = comparison_of([tensors[at] for at in places])
    if check is None:
        return None
    twins = [(at, own) for at, own in enumerate(first) if at != own]

    def check_twins(*others: Tensor) -> bool:
        for at, own in twins:
            if others[at] is not others[own]:
                return False
        return check(*pick(others))

    pick = picking(places)
    return check_twins
