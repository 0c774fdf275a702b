"""Process groups and what is said over them: functional collectives, which compiled code takes in, with errors that name the rank.

Called by the rest of ``distributed/``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from ..derivatives import refuse_tangents
from ..errors import UnsupportedError, bad_type, bad_value

__all__ = [
    "Group",
    "added",
    "all_gather",
    "all_reduce",
    "all_there",
    "all_to_all",
    "exchange_numbers",
    "process_group",
    "reduce_scatter",
    "refuse_transforms",
    "refuse_unlike",
    "resolve",
    "shift",
    "wait",
]

_T = TypeVar("_T")
_transforms = torch._C._are_functorch_transforms_active


@dataclass(frozen=True)
class Group:
    """A process group. name: PyTorch's, by which functional collectives know it. call: the function that errors speak of."""

    name: str
    size: int
    rank: int
    call: str = "context_parallel_attention"


def refuse_transforms(call: str, **given: Any) -> None:
    """Raise under ``torch.func``'s transforms and where a tensor given has a forward-mode derivative: collectives have no rule for either.
    Before any collective, so that no rank waits for another.
    """
    if forward_ad._current_level >= 0:
        refuse_tangents(tuple(given.values()), tuple(given))
    if not torch.compiler.is_compiling() and _transforms():
        raise UnsupportedError(
            f"torch.func transforms (grad, vjp, jacrev, vmap, …) of {call}: collectives have no rule for them; use torch.autograd, or make "
            "a loop of calls of what vmap would run over"
        )


def refuse_unlike(**given: Any) -> None:
    """Raise where a tensor is not one of this rank's rows in memory of its own beside q: nested, sparse, spread over ranks by PyTorch, or
    elsewhere, as offsets may be. Before any collective, as :func:`refuse_transforms`.
    """
    q = given["q"]
    for name, x in given.items():
        if isinstance(x, Tensor) and isinstance(q, Tensor) and x.device != q.device and not name.startswith("cu_seqlens"):
            raise bad_value(name, f"q's device {q.device}", x.device)
        if not isinstance(x, Tensor) or (type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided and not x.is_nested):
            continue
        if x.is_nested:
            hint = "attention_varlen's rows of jagged tensors: context_parallel_attention_varlen"
            raise bad_type(name, "this rank's rows in a plain tensor", "a NestedTensor", hint)
        if x.layout != torch.strided:
            raise bad_type(name, "this rank's rows in a plain tensor", x.layout)
        if type(x).__name__ == "DTensor":
            raise bad_type(name, "this rank's rows in a plain tensor", "a DTensor", f"{name}.to_local()")


def process_group(group: Any) -> Any:
    """The ProcessGroup meant by one, by a DeviceMesh of one dim, or by ``(mesh, dim)``, a dim's number or name."""
    mesh, dim = group if isinstance(group, (tuple, list)) and len(group) == 2 else (group, None)
    if type(mesh).__name__ == "DeviceMesh":
        if dim is None and mesh.ndim != 1:
            raise bad_value("group", "a DeviceMesh of one dim", f"one of {mesh.ndim}", "mesh['name'] is one dim of it; so is (mesh, dim)")
        group = mesh.get_group(0 if dim is None else dim)
    outside = group is dist.GroupMember.NON_GROUP_MEMBER  # what new_group gives those who are not in it
    if not outside and not isinstance(group, dist.ProcessGroup):
        got = "None" if group is None else type(group).__name__
        hint = "torch.distributed.group.WORLD is the group of all processes" if group is None else ""
        raise bad_type("group", "a ProcessGroup, a DeviceMesh of one dim, or (mesh, dim)", got, hint)
    return group


def resolve(group: Any, call: str = "context_parallel_attention") -> Group:
    """The group that a caller means (:func:`process_group`), as ranks of it see it."""
    group = process_group(group)
    outside = group is dist.GroupMember.NON_GROUP_MEMBER
    rank = -1 if outside else dist.get_rank(group)
    if rank < 0:
        raise bad_value("group", "a group that this process is in", f"one without it (global rank {dist.get_rank()})")
    return Group(group.group_name, dist.get_world_size(group), rank, call)


def _said(group: Group, what: str, call: Callable[[], _T]) -> _T:
    """A collective's result; its failure, in words. A process that died or hangs is met here, within the group's time-out."""
    if torch.compiler.is_compiling():
        return call()
    try:
        return call()
    except RuntimeError as error:
        raise RuntimeError(
            f"{group.call}, rank {group.rank} of {group.size}: {what} failed, which a process that ended or hangs does to all others; "
            f"this call has no result ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


def wait(x: Tensor, group: Group) -> Tensor:
    """What a collective gives, whole from here on (on a GPU: for what its current stream does from here on)."""
    return _said(group, "a collective", lambda: torch.ops._c10d_functional.wait_tensor(x))


def all_gather(x: Tensor, group: Group) -> Tensor:
    """``(size · n, …)`` from each rank's ``(n, …)``, by rank; to be waited for."""
    return _said(group, "all-gather", lambda: torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), group.size, group.name))


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """``(n, …)``, the sum of all ranks' rows for this one, from ``(size · n, …)``; to be waited for."""
    return _said(
        group, "reduce-scatter", lambda: torch.ops._c10d_functional.reduce_scatter_tensor(x.contiguous(), "sum", group.size, group.name)
    )


def all_to_all(x: Tensor, to: Sequence[int], fro: Sequence[int], group: Group) -> Tensor:
    """Rows of dim 0, ``to[r]`` of them to rank r and ``fro[r]`` from it, by rank; to be waited for."""
    return _said(group, "all-to-all", lambda: torch.ops._c10d_functional.all_to_all_single(x.contiguous(), list(fro), list(to), group.name))


def shift(x: Tensor, count: int, group: Group) -> Tensor:
    """x to the next rank, and ``count`` numbers in one dim from the one before; to be waited for."""
    to, fro = [0] * group.size, [0] * group.size
    to[(group.rank + 1) % group.size] = x.numel()
    fro[(group.rank - 1) % group.size] = count
    return all_to_all(x.reshape(-1), to, fro, group)


def all_reduce(x: Tensor, group: Group, in_order: bool) -> Tensor:
    """The sum over all ranks; ``in_order``: exchanged whole and added in the order of ranks, so that its bits never change."""
    if group.size == 1:
        return x
    if not in_order:
        return wait(_said(group, "all-reduce", lambda: torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group.name)), group)
    return added(wait(all_gather(x[None], group), group))


def all_there(group: Group, like: Tensor) -> None:
    """On CPUs, where the host waits for collectives, wait until every rank has got here: one that died in a ring's last step had sent its
    neighbour all that it needed, and not the others. (On GPUs results are still to come when a call returns; the watchdog is for those.)
    """
    if group.size > 1 and like.device.type == "cpu":
        wait(all_gather(torch.zeros(1, dtype=torch.int32, device=like.device), group), group)


def added(parts: Tensor) -> Tensor:
    """The sum over dim 0 in its order."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def exchange_numbers(numbers: Sequence[int], group: Group, device: torch.device) -> list[list[int]]:
    """Everybody's integers, by rank. The host waits for them."""
    own = torch.tensor([list(numbers)], dtype=torch.int64, device=device)
    return wait(all_gather(own, group), group).tolist()
