"""Attention of DTensors: what each process computes of it, by a call on its own part. Imported by ``door.py`` with the first DTensor.

Batch entries and heads know nothing of each other, so attention may be sharded over any batch dim and over heads; along every other dim of
the mesh it is replicated. The rule stands here, in front of the operators, and not among PyTorch's sharding strategies: those would see
batch dims folded into one, and cannot say that key heads must divide by the shards of several mesh dims together. What a process runs is a
plain call, bound and repeated like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .arguments import Face, Given, Options, checked
from .errors import UnsupportedError, bad_type, bad_value

__all__ = ["attend_sharded"]

# Which dim of a tensor is each batch dim and, last, that of heads. None: it has none, or broadcasts over it.
Axes = tuple[int | None, ...]


def attend_sharded(attend: Callable[..., Any], face: Face, given: Given, options: Options, return_lse: bool) -> Any:
    """Attention of DTensors, by ``attend`` of each process's part: out, or out and lse, as DTensors on the same mesh.

    Along each dim of the mesh the first of q, k, v, bias and mask that is sharded there over a batch dim, or over heads that divide,
    decides; the others are redistributed to fit. Where none is, all are replicated, whatever they were. The gradient of a bias, of a sink
    and of a single key head that are replicated along a mesh dim over which the call is sharded is a ``Partial`` sum there.
    """
    call = checked(face, given, options)
    mesh = _mesh_of(given)
    batch, heads_first, levels = call.form.batch, call.form.heads_first, len(call.form.batch)
    q, kv, v = given.q, given.k, given.v
    heads_at = -3 if heads_first else -2
    axes = _axes_of(given, levels, heads_at)
    heads = q.shape[heads_at]
    plan = _plan(mesh, given, axes, heads if kv is None else kv.shape[heads_at], heads)
    if call.dropout_p:
        _check_dropout(given, plan)
    here = mesh.get_coordinate()
    if here is None:  # which has nothing to compute; PyTorch's way back from a part to the whole fails there
        raise UnsupportedError(
            f"attention of DTensors in a process outside their mesh, {mesh}: call it where mesh.get_coordinate() is not None"
        )
    own = tuple([_own(name, x, each, plan, here) for name, x, each in zip(Given._fields, given, axes, strict=True)])
    out, lse = attend(face, own, tuple(options), True) if return_lse else (attend(face, own, tuple(options)), None)
    M, width = q.shape[levels + 1 if heads_first else levels], (v if v is not None else kv if kv is not None else q).shape[-1]
    leading = tuple(range(levels))
    rows, strides = _contiguous((*batch, M, heads, width))
    if heads_first:
        rows, strides = ((*x[:-3], x[-2], x[-3], x[-1]) for x in (rows, strides))
    result = _whole(out, mesh, _placements((*leading, levels if heads_first else levels + 1), plan), rows, strides)
    if lse is None:
        return result
    return result, _whole(lse, mesh, _placements((*leading, levels), plan), *_contiguous((*batch, heads, M)))


def _mesh_of(given: Given) -> DeviceMesh:
    """The mesh that all tensors are on; a seed may be a plain tensor."""
    mesh: DeviceMesh = next(x.device_mesh for x in given if isinstance(x, DTensor))
    for field, x in zip(Given._fields, given, strict=True):
        name = {"diagonals": "diagonal", "second_bias": "bias[1]"}.get(field, field)  # as the caller knows it
        if isinstance(x, DTensor):
            if x.device_mesh != mesh:
                raise bad_value(name, f"a DTensor on the mesh of the others, {mesh}", x.device_mesh)
        elif isinstance(x, Tensor) and name != "dropout_seed":
            hint = f"torch.distributed.tensor.distribute_tensor({name}, mesh, placements) makes one"
            raise bad_type(name, "a DTensor, as others are", "a plain tensor", hint)
    return mesh


def _axes_of(given: Given, levels: int, heads_at: int) -> tuple[Axes, ...]:
    """The axes of every tensor. A dim of size 1 counts as broadcast: there is nothing to shard."""
    leading = tuple(range(levels))
    found: list[Axes] = []
    for name, x in zip(Given._fields, given, strict=True):
        axes: Axes = (None,) * (levels + 1)
        if not isinstance(x, Tensor) or name == "dropout_seed":
            pass
        elif name in ("q", "k", "v"):
            axes = (*leading, x.dim() + heads_at)
        elif name in ("bias", "mask", "second_bias"):  # aligned to the right, (*batch, heads, queries, keys)
            axes = tuple(n if n >= 0 else None for n in range(x.dim() - levels - 3, x.dim() - 2))
        elif name in ("key_lengths", "query_starts", "query_lengths", "key_starts", "diagonals"):
            axes = (*leading, None)
        elif x.dim() == 1:  # a sink, or slopes of all batch entries
            axes = (*axes[:-1], 0)
        else:
            axes = (*leading, levels)
        found.append(tuple(n if n is not None and isinstance(x, Tensor) and x.shape[n] > 1 else None for n in axes))
    return tuple(found)


def _plan(mesh: DeviceMesh, given: Given, axes: Sequence[Axes], key_heads: int, heads: int) -> tuple[int | None, ...]:
    """What each dim of the mesh shards: a batch dim, or the heads (the number behind those of the batch dims), or nothing (None).

    Batch dims and heads need not divide, as far as all tensors are cut at the same places. Fewer key heads than query heads are cut where
    their query heads are only if they divide by all shards; one key head for all is on every shard.
    """
    plan: list[int | None] = []
    shards = 1  # of the heads, so far
    for n in range(mesh.ndim):
        chosen = None
        for x, each in zip(given[:5], axes, strict=False):
            placement = x.placements[n] if isinstance(x, DTensor) else None
            if type(placement) is not Shard or placement.dim not in each:
                continue
            at = each.index(placement.dim)
            if at + 1 < len(each) or key_heads in (1, heads) or key_heads % (shards * mesh.size(n)) == 0:
                chosen = at
                break
        if chosen is not None and chosen + 1 == len(axes[0]):
            shards *= mesh.size(n)
        plan.append(chosen)
    return tuple(plan)


def _placements(axes: Axes, plan: Sequence[int | None], elsewhere: type[Placement] = Replicate) -> tuple[Placement, ...]:
    """How a tensor is placed under the plan. elsewhere: where the call is sharded and the tensor has no such dim."""
    placements: list[Placement] = []
    for at in plan:
        axis = None if at is None else axes[at]
        if axis is not None:
            placements.append(Shard(axis))
        else:
            placements.append(Replicate() if at is None else elsewhere())
    return tuple(placements)


def _own(name: str, x: Any, axes: Axes, plan: Sequence[int | None], here: Sequence[int]) -> Any:
    """This process's part of a tensor, differentiably.

    Of a replicated bias or sink the part is cut out of what is here, so that its gradient is a sum still to be made, like that of one which
    broadcasts; q, k and v are redistributed, whose gradient is gathered: activations, of which a sum would move twice as much.
    """
    if not isinstance(x, DTensor):
        return x
    wanted = list(_placements(axes, plan))
    grads = list(_placements(axes, plan, Partial))
    cuts: list[tuple[int, int, int]] = []
    if name in ("bias", "second_bias", "sink"):
        for n, (now, then) in enumerate(zip(x.placements, wanted, strict=True)):
            # Parts of parts are counted from the first dim of the mesh on: what a later one has cut already cannot be cut before it.
            if isinstance(then, Shard) and now == Replicate() and then not in x.placements[n + 1 :]:
                cuts.append((n, then.dim, x.device_mesh.size(n)))
                wanted[n], grads[n] = Replicate(), Partial()
    if list(x.placements) != wanted:
        x = x.redistribute(placements=tuple(wanted))
    own = x.to_local(grad_placements=tuple(grads))
    for n, dim, parts in cuts:
        chunks = own.chunk(parts, dim)
        own = chunks[here[n]] if here[n] < len(chunks) else own.narrow(dim, 0, 0)
    return own


def _check_dropout(given: Given, plan: Sequence[int | None]) -> None:
    if any(at is not None for at in plan):
        placed = ", ".join(f"{name} {x.placements}" for name, x in zip(("q", "k", "v"), given, strict=False) if isinstance(x, DTensor))
        raise UnsupportedError(
            f"dropout of sharded DTensors ({placed}): what is dropped follows the numbers of batch entry and head, which a shard does not "
            "know; use dropout_p=0, or redistribute all tensors to Replicate()"
        )
    if given.dropout_seed is None:
        raise UnsupportedError(
            "dropout of DTensors without dropout_seed: each process would draw a seed of its own; pass dropout_seed=, the same everywhere"
        )


def _contiguous(shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape and its strides."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(shape), tuple(reversed(strides))


def _whole(own: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int], strides: Sequence[int]) -> DTensor:
    """The tensor of which each process has its part. Its shape is given: shards may be uneven."""
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides))
