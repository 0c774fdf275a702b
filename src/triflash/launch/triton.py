"""Arguments and launches of the portable Triton kernels. Imports triton, so it is itself imported only when a plan needs it.

``*_calls`` turn a plan and tensors into :class:`Call` values and touch no device: the ahead-of-time tests compile the very same calls
for GPUs that are not here, from meta tensors. ``forward`` and ``backward`` start them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..kernels.triton import backward as backward_kernels
from ..kernels.triton import dbias as dbias_kernels
from ..kernels.triton import forward as forward_kernels
from ..plan import layout
from ..plan.configs import TileConfig, padded
from ..plan.steps import SUM_BLOCK, Plan, Step
from ..spec import AttentionSpec
from .calls import SMALLEST_SCALE, Call, bias_strides, start

__all__ = ["backward", "backward_calls", "forward", "forward_calls", "partial_sums", "row_strides"]

_WIDE_STRIDE = 2**22  # from this stride on, an offset inside a tile of up to 256 rows and columns might not fit 31 bits


def forward(
    plan: Plan, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, rest: Tensor | None
) -> None:
    """Fill out, lse and, if given, rest. Every tensor is canonical (``spec.spec_of``); the outputs are contiguous."""
    start(q.device, forward_calls(plan, spec, _rows(q), _rows(k), _rows(v), _vectorisable(bias), out, lse, rest))


def backward(
    plan: Plan,
    spec: AttentionSpec,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rest: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Fill those of dq, dk, dv, dbias that are given, of any strides."""
    given = (dq, dk, dv, dbias)
    if spec.is_empty:
        for grad in given:
            if grad is not None:
                grad.zero_()
        return
    q, k, v, out, dout = map(_rows, (q, k, v, out, dout))
    lse = lse if lse.stride(2) == 1 or lse.shape[2] == 1 else lse.contiguous()
    rest = None if rest is None else rest.contiguous()
    # Kernels write rows whose last dim is contiguous, and a contiguous dbias; what is laid out otherwise is filled by way of a copy.
    written = [None if grad is None else _rows(grad) for grad in given[:3]]
    written.append(None if dbias is None else dbias.contiguous())
    start(q.device, backward_calls(plan, spec, dout, dlse, q, k, v, _vectorisable(bias), out, lse, rest, *written))
    for grad, filled in zip(given, written, strict=True):
        if grad is not None and filled is not None and filled is not grad:
            grad.copy_(filled)


def forward_calls(
    plan: Plan, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, rest: Tensor | None
) -> list[Call]:
    """The launches of a forward pass."""
    calls = []
    for step in plan.steps:
        args = (
            *(q, k, v, _bytes(bias), out, lse, rest),
            *(_strides(q), _strides(k), _strides(v), bias_strides(bias), _strides(out), lse.stride()[:2]),
            *_sizes(spec),
            *(spec.lo, spec.hi, spec.scale),
        )
        constants = _constants(spec, _config(step), _wide((q, k, v, out, bias)))
        constants = constants | {"IS_MASK": _is_mask(spec), "POSITIVE_SCALE": spec.scale >= SMALLEST_SCALE, "ORDER": step.order}
        calls.append(Call(forward_kernels.forward, args, constants, _config(step), step.programs))
    return calls


def backward_calls(
    plan: Plan,
    spec: AttentionSpec,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rest: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dbias: Tensor | None,
) -> list[Call]:
    """The launches of a backward pass; allocates the scratch between them (delta, and partial sums of a split dbias)."""
    inputs = (q, k, v, _bytes(bias), dout, lse, rest)
    strides = (_strides(q), _strides(k), _strides(v), bias_strides(bias), _strides(dout), lse.stride()[:2])
    wide = _wide((q, k, v, out, dout, bias, dq, dk, dv))
    delta = parts = None
    outputs: tuple[Any, ...]
    calls = []
    for step in plan.steps:
        config = _config(step)
        if step.kernel == "delta":
            delta = lse.new_empty(lse.shape)
            args: tuple[Any, ...] = (out, dout, dlse, delta, _strides(out), _strides(dout), None if dlse is None else dlse.stride())
            constants = {"BM": config.block_m, "DV": spec.value_dim, "BDV": padded(spec.value_dim), "WIDE": wide}
            calls.append(Call(backward_kernels.delta, (*args, spec.heads, spec.queries), constants, config, step.programs))
        elif step.kernel == "dkdv":
            parts = partial_sums(step, dbias)
            target_strides = row_strides(spec, parts) if parts is not None else None
            outputs = (delta, dk, dv, parts, *strides, _strides(dk), _strides(dv), target_strides)
            args = (*inputs, *outputs, *_sizes(spec), spec.lo, spec.hi, spec.scale)
            constants = _constants(spec, config, wide) | {"IS_MASK": _is_mask(spec), "ORDER": step.order}
            calls.append(Call(backward_kernels.dkdv, args, constants, config, step.programs))
        elif step.kernel == "dq":
            target = dbias if "dbias" in step.gives else None
            outputs = (delta, dq, target, *strides, _strides(dq), bias_strides(target))
            args = (*inputs, *outputs, *_sizes(spec), spec.lo, spec.hi, spec.scale)
            constants = _constants(spec, config, wide) | {"IS_MASK": _is_mask(spec), "ORDER": step.order}
            calls.append(Call(backward_kernels.dq, args, constants, config, step.programs))
        elif step.kernel == "dbias":
            assert dbias is not None and spec.bias is not None
            parts = partial_sums(step, dbias)
            assert parts is not None
            sizes = (spec.heads, spec.batch_outer, spec.batch_inner, spec.queries, spec.keys)
            args = (*inputs, delta, parts, *strides, (parts.stride(0), *bias_strides(parts[0])))  # type: ignore[misc]
            args += (*sizes, spec.lo, spec.hi, spec.scale, step.splits)
            outer, inner, head, _, _ = spec.bias.varies
            constants = _constants(spec, config, wide) | {"VARIES_B0": outer, "VARIES_B1": inner, "VARIES_H": head}
            calls.append(Call(dbias_kernels.dbias, args, constants, config, step.programs))
        elif step.kernel == "dbias_sum":
            assert dbias is not None
            args = (parts, dbias, dbias.numel(), step.splits)
            calls.append(Call(dbias_kernels.dbias_sum, args, {"BLOCK": SUM_BLOCK}, config, step.programs))
    return calls


def partial_sums(step: Step, dbias: Tensor | None) -> Tensor | None:
    """Where a kernel writes dbias: ``(splits, *dbias.shape)``, scratch if there are several parts, else dbias itself."""
    if "dbias" not in step.gives:
        return None
    assert dbias is not None
    return dbias.new_empty((step.splits, *dbias.shape), dtype=torch.float32) if step.splits > 1 else dbias.unsqueeze(0)


def row_strides(spec: AttentionSpec, parts: Tensor) -> tuple[int, int, int, int]:
    """Strides of ``parts (splits, B0|1, B1|1, H|1, 1, N)`` by (outer batch, inner batch, head, key): a broadcast dim counts parts."""
    strides, part = [0, 0, 0], parts.stride(0)
    for dim, size in ((2, spec.heads), (1, spec.batch_inner), (0, spec.batch_outer)):
        if parts.shape[1 + dim] == size:
            strides[dim] = parts.stride(1 + dim) if size > 1 else 0
        else:
            strides[dim] = part
            part *= size
    return strides[0], strides[1], strides[2], parts.stride(5) if parts.shape[5] > 1 else 0


def _rows(x: Tensor) -> Tensor:
    """x itself if its last dim is contiguous, else a copy."""
    return x.contiguous() if layout.copies_rows(x.size(-1), x.stride(-1)) else x


def _vectorisable(bias: Tensor | None) -> Tensor | None:
    """The bias itself, or where ``layout.copies_bias`` says so a copy with padded rows.

    The copy has the size of the bias (expanded dims are not materialised) and lives as long as the launches.
    """
    if bias is None or not bias.is_cuda:
        return bias
    shape, strides = bias.shape, bias.stride()
    if not layout.copies_bias(shape, strides, bias.data_ptr()):
        return bias
    stored = bias[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]
    copy = bias.new_empty(layout.copied_bias_shape(shape, strides))[..., : stored.shape[4]]
    return copy.copy_(stored).expand(shape)


def _bytes(bias: Tensor | None) -> Tensor | None:
    """A boolean mask as bytes: Triton has no loads of single bits."""
    return bias.view(torch.uint8) if bias is not None and bias.dtype == torch.bool else bias


def _config(step: Step) -> TileConfig:
    assert isinstance(step.config, TileConfig), f"{step.kernel} was planned with {step.config} for a tile configuration"
    return step.config


def _strides(x: Tensor | None) -> tuple[int, int, int] | None:
    """(batch, row, head) strides of a (B, L, H, D) tensor."""
    return None if x is None else x.stride()[:3]  # type: ignore[return-value]


def _sizes(spec: AttentionSpec) -> tuple[int, int, int, int, int]:
    return spec.batch, spec.heads, spec.batch_inner, spec.queries, spec.keys


def _is_mask(spec: AttentionSpec) -> bool:
    return spec.bias is not None and spec.bias.is_mask


def _wide(tensors: Iterable[Tensor | None]) -> bool:
    """Whether offsets inside a tile need 64 bits: the stride of a row (of a bias: of a row or a column) is huge."""
    for x in tensors:
        if x is not None:
            strides = x.stride()
            if max(strides[3:] if len(strides) == 5 else strides[1:2]) >= _WIDE_STRIDE:
                return True
    return False


@functools.lru_cache(maxsize=4096)
def _constants(spec: AttentionSpec, config: TileConfig, wide: bool) -> dict[str, Any]:
    """The compile-time constants that the kernels share. Cached: add to it with ``|``, never ``|=``."""
    return {
        "BM": config.block_m,
        "BN": config.block_n,
        "D": spec.head_dim,
        "DV": spec.value_dim,
        "BD": padded(spec.head_dim),
        "BDV": padded(spec.value_dim),
        "VARIES_M": spec.bias is not None and spec.bias.varies[3],
        "VARIES_N": spec.bias is not None and spec.bias.varies[4],
        "EVEN_M": spec.queries % config.block_m == 0,
        "EVEN_N": spec.keys % config.block_n == 0,
        "PRECISION": spec.precision,
        "WIDE": wide,
    }
