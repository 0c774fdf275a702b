"""``shard``, ``unshard`` and ``positions``: a rank's share of a tensor, the tensor from all shares, and where its rows stand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import bad_type, bad_value
from .chunks import check_order, natural, pieces, shares
from .group import Group, all_gather, exchange_numbers, refuse_transforms, resolve, wait

__all__ = ["arranged", "check_length", "gathered", "positions", "shard", "unshard"]


def shard(x: Tensor, dim: int, group: Any, order: str = "zigzag") -> Tensor:
    """This rank's share of a tensor that every rank has whole; the inverse of ``unshard``. Nothing is sent.

    Args:
        x: any tensor. dim: the one that is spread over the group; its length need not be divisible, and shares may be empty.
        group: a ProcessGroup, a DeviceMesh of one dim, or ``(mesh, dim)``.
        order: ``"zigzag"``: rank r of R gets chunks r and 2R − 1 − r of 2R, in that order, which balances causal attention;
            ``"contiguous"``: chunk r of R. Chunk c of n is rows ``⌊c S / n⌋`` to ``⌊(c + 1) S / n⌋``.

    Returns:
        A copy of the share. Its backward pass scatters the gradient into zeros of x's shape: each rank's has its own rows.

    Raises:
        ValueError, TypeError: no such dim, order or group.
    """
    own, dim = resolve(group, "shard"), _dim(x, dim)
    check_order(order)
    found = [x.narrow(dim, p.start, p.stop - p.start) for p in pieces(x.shape[dim], own.size, own.rank, order)]
    return torch.cat(found, dim) if found else x.narrow(dim, 0, 0).clone()


def unshard(x: Tensor, dim: int, group: Any, order: str = "zigzag", length: int | None = None) -> Tensor:
    """The tensor of which every rank has a share, on every rank.

    Args:
        x: this rank's share, as ``shard`` gives it. dim, group, order: as there.
        length: of dim, over all ranks; None: asked of the group, for which the host waits. torch.compile needs it.

    Returns:
        The whole tensor. Its backward pass slices: each rank takes its own rows of the gradient, which is the same on all ranks where
        all compute the same loss of the whole tensor.

    Raises:
        ValueError, TypeError: no such dim, order or group, or shares that are not those of the length.
    """
    refuse_transforms("unshard", x=x)
    own, dim = resolve(group, "unshard"), _dim(x, dim)
    check_order(order)
    if length is None:
        if torch.compiler.is_compiling():
            raise bad_value("length", "the length over all ranks under torch.compile", None)
        held = [each[0] for each in exchange_numbers([x.shape[dim]], own, x.device)]
        length = sum(held)
        _check_shares("x", "length", held, length, own, order)
    else:
        check_length("length", length, "x", x.shape[dim], own, order)
    return _Unshard.apply(x, dim, own, order, length)


def positions(length: int, group: Any, order: str = "zigzag") -> Tensor:
    """Which rows of a sequence of ``length`` this rank of ``group`` holds, int64, in the ``order`` in which it holds them ("zigzag" or
    "contiguous", as ``shard`` has them): for rotary embeddings, say.
    """
    own = resolve(group, "positions")
    check_order(order)
    _check_integer("length", length)
    found = [torch.arange(p.start, p.stop) for p in pieces(length, own.size, own.rank, order)]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group, order: str, length: int) -> Tensor:
        ctx.rest = dim, group, order, length
        return gathered(x.movedim(dim, 0), group, order, length).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dim, group, order, length = ctx.rest
        found = [grad.narrow(dim, p.start, p.stop - p.start) for p in pieces(length, group.size, group.rank, order)]
        return torch.cat(found, dim) if found else grad.narrow(dim, 0, 0), None, None, None, None


def gathered(x: Tensor, group: Group, order: str, length: int) -> Tensor:
    """``(length, …)`` in its natural order from each rank's share of dim 0."""
    held = shares(length, group.size, order)
    most = max(held)
    if most > x.shape[0]:
        x = torch.cat((x, x.new_zeros(most - x.shape[0], *x.shape[1:])))
    return arranged(wait(all_gather(x, group), group).unflatten(0, (group.size, most)), 0, group, order, length)


def arranged(parts: Tensor, dim: int, group: Group, order: str, length: int) -> Tensor:
    """From the shares ``(size, …)``, padded in ``dim`` of each, the whole in its natural order."""
    of = parts.unbind(0)
    found = [of[rank].narrow(dim, p.at, p.stop - p.start) for rank, p in natural(length, group.size, order)]
    return torch.cat(found, dim) if found else of[0].narrow(dim, 0, 0)


def check_length(name: str, length: int, of: str, held: int, group: Group, order: str) -> None:
    """Check that what this rank holds is its share of the length given."""
    _check_integer(name, length)
    wanted = shares(length, group.size, order)[group.rank]
    if held != wanted:
        raise bad_value(
            of, f"{wanted} rows on rank {group.rank} of {group.size}, its {order} share of {name}={length}", held, "shard makes shares"
        )


def check_shares(of: str, name: str, held: list[int], group: Group, order: str) -> int:
    """The length of which the ranks hold the shares given. Where these are not its shares every rank raises the same ValueError."""
    length = sum(held)
    _check_shares(of, name, held, length, group, order)
    return length


def _check_shares(of: str, name: str, held: list[int], length: int, group: Group, order: str) -> None:
    for rank, (own, wanted) in enumerate(zip(held, shares(length, group.size, order), strict=True)):
        if own != wanted:
            hint = f"the ranks hold {held}; shard makes shares"
            raise bad_value(of, f"{wanted} rows on rank {rank} of {group.size}, its {order} share of {length}", own, hint)


def _check_integer(name: str, length: Any) -> None:
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
        raise bad_type(name, "an integer", type(length).__name__)
    if length < 0:
        raise bad_value(name, "an integer from 0 up", length)


def _dim(x: Any, dim: Any) -> int:
    if not isinstance(x, Tensor):
        raise bad_type("x", "a tensor", type(x).__name__)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise bad_type("dim", "an integer", type(dim).__name__)
    if not -x.dim() <= dim < x.dim():
        raise bad_value("dim", f"one of the {x.dim()} dims of {tuple(x.shape)}", dim)
    return dim % x.dim()
