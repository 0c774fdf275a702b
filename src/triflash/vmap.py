"""The operators under ``torch.func.vmap``, whose entries become one more batch dim. PyTorch calls it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import OperatorOptions, attention_backward, attention_backward_two, attention_forward

_INPUTS = 4  # q, k, v, bias: in front of the options
_SAVED = 9  # dout, dlse, q, k, v, bias, out, lse, rest: in front of the options of a backward pass


class _Batch:
    """How the entries of a vmap become batch entries of one call. inner: of the call's two batch levels; None: they cannot, and the entries
    run one after the other.
    """

    def __init__(
        self,
        info: Any,
        inputs: Sequence[Any],
        options: OperatorOptions,
        dims: Sequence[Any],
        more: Sequence[Any],
        needs: Sequence[bool] = (),
    ) -> None:
        self.size: int = info.batch_size
        q, bias = inputs[0], inputs[3]
        self.batch = q.movedim(dims[0], 0).shape[1] if dims[0] is not None else q.shape[0]
        own = dict(zip(OperatorOptions._fields, more, strict=False))
        # dbias of each entry: the bias counts as one for each.
        self._bias_dim, self._bias_wanted = dims[3], len(needs) > 3 and needs[3]
        if options.dropout_p > 0 and info.randomness == "error":
            raise RuntimeError(
                "vmap: called random operation while in randomness error mode. Pass randomness='different' or 'same' to vmap for dropout"
            )
        loop = (
            options.second_bias is not None
            or own.get("sink") is not None
            or own.get("dropout_seed") is not None
            or (len(needs) > 4 and needs[4])
        )
        loop = loop or (options.dropout_p > 0 and info.randomness == "same")
        self.inner = None if loop else self._inner(options.batch_inner, bias, options.mask, own.get("mask"))
        self.split = 0 if self.inner is None else (1 if self.inner == self.batch else 2)

    def _inner(self, inner: int, bias: Tensor | None, mask: Tensor | None, mask_dim: int | None) -> int | None:
        """The batch entries of the inner level: bias and mask each vary over all of a level or over nothing of it."""
        sizes = (self.size, self.batch // inner, inner)
        given = [x for x in ((bias, self._bias_dim, self._bias_wanted), (mask, mask_dim, False)) if x[0] is not None]
        flags = []
        for x, dim, wanted in given:
            shape = x.movedim(dim, 0).shape[1:] if dim is not None else x.shape  # type: ignore[union-attr]
            flags.append((dim is not None or wanted, shape[0] > 1, shape[1] > 1))
        for split, own in ((2, inner), (1, self.batch)):
            levels = (range(split), range(split, 3))
            if all(len({flag[n] for n in level if sizes[n] > 1}) < 2 for flag in flags for level in levels):
                return own
        return None

    def folded(self, x: Tensor, dim: int | None) -> Tensor:
        """``(B, …)`` of each entry, or of all, as ``(V B, …)``."""
        x = x.expand(self.size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.reshape(self.size * x.shape[1], *x.shape[2:])

    def unfolded(self, x: Tensor) -> Tensor:
        return x.reshape(self.size, self.batch, *x.shape[1:])

    def leveled(self, x: Tensor | None, dim: int | None) -> Tensor | None:
        """A bias or mask of five dims with the entries in one of its two batch levels."""
        if x is None:
            return None
        if dim is None:
            wanted = self._bias_wanted and x.dtype != torch.bool
            x = x.expand(self.size, *x.shape) if wanted else x[None]
        else:
            x = x.movedim(dim, 0)
        outer, inner = x.shape[: self.split], x.shape[self.split : 3]
        return x.reshape(math.prod(outer), math.prod(inner), *x.shape[3:])

    def options(self, options: OperatorOptions, dims: Sequence[Any]) -> OperatorOptions:
        """The options of the one call."""
        own = dict(zip(OperatorOptions._fields, dims, strict=False))
        lengths, slopes = options.key_lengths, options.alibi_slopes
        if lengths is not None:
            lengths = self.folded(lengths, own.get("key_lengths"))
        if slopes is not None and (own.get("alibi_slopes") is not None or slopes.shape[0] > 1):
            slopes = slopes.expand(self.size, *slopes.shape) if own.get("alibi_slopes") is None else slopes.movedim(own["alibi_slopes"], 0)
            slopes = slopes.expand(self.size, self.batch, slopes.shape[-1]).reshape(self.size * self.batch, slopes.shape[-1])
        places = {name: getattr(options, name) for name in OperatorOptions._fields[15:19]}
        places = {name: None if x is None else self.folded(x, own.get(name)) for name, x in places.items()}
        mask = self.leveled(options.mask, own.get("mask"))
        assert self.inner is not None
        return options._replace(batch_inner=self.inner, mask=mask, key_lengths=lengths, alibi_slopes=slopes, **places)

    @staticmethod
    def entry(args: Sequence[Any], dims: Sequence[Any], n: int) -> list[Any]:
        """The arguments of one entry."""
        return [x.select(dim, n) if isinstance(x, Tensor) and dim is not None else x for x, dim in zip(args, dims, strict=True)]


def _forward_of_entries(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """The forward operator for all entries of a vmap."""
    options = OperatorOptions(*args[_INPUTS:])
    batch = _Batch(info, args[:_INPUTS], options, in_dims[:_INPUTS], in_dims[_INPUTS:])
    if batch.inner is None:
        outs = [attention_forward(*batch.entry(args, in_dims, n)) for n in range(info.batch_size)]
        return tuple(torch.stack(each) for each in zip(*outs, strict=True)), (0, 0, 0)
    q, k, v = (batch.folded(x, dim) for x, dim in zip(args[:3], in_dims[:3], strict=True))
    folded = batch.options(options, in_dims[_INPUTS:])
    out, lse, rest = attention_forward(q, k, v, batch.leveled(args[3], in_dims[3]), *folded)
    kept = rest.dim() > 1
    return (batch.unfolded(out), batch.unfolded(lse), batch.unfolded(rest) if kept else rest), (0, 0, 0 if kept else None)


def _backward_of_entries(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """The backward operator for all entries of a vmap."""
    at = _SAVED + 6
    needs = args[at]
    options = OperatorOptions.of_backward(args[_SAVED:at], args[at + 1 :])
    dims = OperatorOptions.of_backward(in_dims[_SAVED:at], in_dims[at + 1 :])
    dout, dlse, q, k, v, bias, out, lse, rest = args[:_SAVED]
    batch = _Batch(info, (q, k, v, bias), options, in_dims[2:6], dims, needs)
    if batch.inner is None:
        grads = [attention_backward(*batch.entry(args, in_dims, n)) for n in range(info.batch_size)]
        return tuple(torch.stack(each) for each in zip(*grads, strict=True)), (0,) * 5
    rows = [None if x is None else batch.folded(x, dim) for x, dim in zip((dout, dlse, q, k, v), in_dims[:5], strict=True)]
    kept = rest is not None and rest.dim() - (in_dims[8] is not None) > 1
    saved = [batch.folded(x, dim) for x, dim in zip((out, lse), in_dims[6:8], strict=True)]
    saved.append(batch.folded(rest, in_dims[8]) if kept else q.new_empty(0, dtype=torch.float32))
    folded = batch.options(options, dims)
    grads = attention_backward(*rows, batch.leveled(bias, in_dims[5]), *saved, *folded[:6], needs, *folded[6:14], *folded[15:])
    dq, dk, dv, dbias, dsink = grads
    results = [batch.unfolded(x) if need else x for x, need in zip((dq, dk, dv), needs, strict=False)]
    if needs[3]:
        shape = bias.movedim(in_dims[5], 0).shape[1:] if in_dims[5] is not None else bias.shape
        dbias = dbias.reshape(info.batch_size, *shape)
    given = [0 if need else None for need in needs]
    return (*results, dbias, dsink), (*given[:4], None)


def _backward_two_of_entries(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """The backward operator of two biases, entry by entry."""
    grads = [attention_backward_two(*_Batch.entry(args, in_dims, n)) for n in range(info.batch_size)]
    return tuple(torch.stack(each) for each in zip(*grads, strict=True)), (0,) * 6


torch.library.register_vmap(attention_forward, _forward_of_entries)
torch.library.register_vmap(attention_backward, _backward_of_entries)
torch.library.register_vmap(attention_backward_two, _backward_two_of_entries)
