"""The 2022/23 experimental Triton FlashAttention module: the same names, argument order, layouts and semantics, on today's Triton.

A program that imported ``flash_attn_func`` and its siblings from there imports them from here and goes on, now with keyword arguments,
bias gradients, head dims 1 to 256, any lengths and bias shapes, float32, and reproducible results.

All functions compute ``softmax(softmax_scale * q kᵀ + bias) v`` exactly, without materialising the scores. ``causal=True`` is aligned to
the top left, as it was there: key j is hidden from query i when ``j > i``, whatever the two lengths are.

Method: FlashAttention (Dao et al. 2022), FlashAttention-2 (Dao 2023), both rewritten for Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import canonical_bias, check_bias, check_bool, check_scale, check_tensors, same_device_and_dtype
from .errors import bad_type, bad_value
from .ops import attention_backward_, attention_forward, differentiable_once
from .plan.select import requested_backend
from .spec import causal_band, resolve_precision

__all__ = [
    "FlashAttnFunc",
    "FlashAttnKVPackedFunc",
    "FlashAttnQKVPackedFunc",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
]

LSE_ROW_MULTIPLE = 128  # rows of the lse that _flash_attn_forward returns are padded to a multiple of this, as they were in the seed

_QKV = {"q": "B M H D", "k": "B N H D", "v": "B N H D"}


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, softmax_scale: float | None
) -> tuple[Tensor | None, tuple[Any, ...]]:
    """Check the arguments of one call; return the canonical bias and the options that every operator takes."""
    given = {"q": q, "k": k, "v": v}
    sizes = check_tensors(given, _QKV)
    same_device_and_dtype(given)
    lo, hi = causal_band(check_bool("causal", causal))
    scale = check_scale("softmax_scale", softmax_scale, sizes["D"])
    check_bias(bias, q, (sizes["B"], sizes["H"], sizes["M"], sizes["N"]))
    # Resolved here, so that a backward pass multiplies as its forward pass did. torch.compile cannot trace the setting: "" is read later.
    precision = resolve_precision("") if q.dtype == torch.float32 and not torch.compiler.is_compiling() else ""
    return canonical_bias(bias), (1, lo, hi, scale, precision, requested_backend())


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """Exact attention, ``softmax(softmax_scale * q kᵀ + bias) v``, with gradients for q, k, v and the bias.

    Args:
        q: queries, ``(batch, seqlen_q, nheads, headdim)``; fp16, bf16 or fp32 (products of fp32 follow
            ``torch.set_float32_matmul_precision``: ``"highest"`` is IEEE float32, anything else TF32). Any strides, head dims 1 … 256.
        k, v: keys and values, ``(batch, seqlen_k, nheads, headdim)``, q's dtype and device.
        bias: added to the scaled scores, unscaled; any shape of 2 to 4 dims that broadcasts to
            ``(batch, nheads, seqlen_q, seqlen_k)``, any strides; fp16, bf16 or fp32 whatever q is. Entries of -inf hide a key from a
            query. A bool bias is a mask, True = visible. Its gradient has its own shape and dtype, summed in float32 over the dims
            that it broadcasts, and is computed only if it is asked for.
        causal: hide key j from query i when ``j > i`` (top-left aligned, also where the two lengths differ).
        softmax_scale: default ``1 / sqrt(headdim)``; 0.0 means 0.0.

    Returns:
        out ``(batch, seqlen_q, nheads, headdim)`` in q's dtype. A query that sees no key gets 0, and zero gradient to everything.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or option; the message names the argument.
        UnsupportedError: the backend that was asked for by name cannot do this combination.

    Memory beyond inputs and outputs is O(seqlen_q + seqlen_k), but for copies of inputs whose layout kernels cannot read: a last dim that
    is not contiguous, or a bias whose rows are not a multiple of 16 elements apart. Results are bitwise reproducible, gradients included,
    but for dq on backend ``hopper``, unless ``torch.use_deterministic_algorithms(True)`` is in force when this is called.
    Autocast does not change the inputs' dtypes: cast them yourself. Not differentiable twice, nor by ``torch.func``.
    """
    if not torch.compiler.is_compiling():  # the same operators, with less of a host's time than their registered autograd takes
        return FlashAttnFunc.apply(q, k, v, bias, causal, softmax_scale)
    bias, options = _arguments(q, k, v, bias, causal, softmax_scale)
    return attention_forward(q, k, v, bias, *options, deterministic=torch.are_deterministic_algorithms_enabled())[0]


def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, bias: Tensor | None = None, causal: bool = False, softmax_scale: float | None = None
) -> Tensor:
    """:func:`flash_attn_func` with k and v in one tensor ``kv (batch, seqlen_k, 2, nheads, headdim)``; so is their gradient."""
    return FlashAttnKVPackedFunc.apply(q, kv, bias, causal, softmax_scale)


def flash_attn_qkvpacked_func(qkv: Tensor, bias: Tensor | None = None, causal: bool = False, softmax_scale: float | None = None) -> Tensor:
    """:func:`flash_attn_func` with all three in one tensor ``qkv (batch, seqlen, 3, nheads, headdim)``; so is their gradient."""
    return FlashAttnQKVPackedFunc.apply(qkv, bias, causal, softmax_scale)


def _forward(ctx: Any, inputs: tuple[Tensor, ...], bias: Tensor | None, causal: bool, softmax_scale: float | None) -> Tensor:
    """Forward of the autograd classes: ``inputs`` are q, k, v however they are packed."""
    q, k, v = _unpack(*inputs)
    canonical, options = _arguments(q, k, v, bias, causal, softmax_scale)
    out, lse, rest = attention_forward(q, k, v, canonical, *options)
    ctx.save_for_backward(*inputs, bias, out, lse, rest)
    ctx.options, ctx.deterministic = options, torch.are_deterministic_algorithms_enabled()
    return out


def _unpack(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) from q, k, v, or from q and kv, or from qkv; views."""
    if len(inputs) == 3:
        return inputs
    *q, packed = inputs
    return (*q, *packed.unbind(2))  # type: ignore[return-value]


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    """Backward of the autograd classes: a packed input gets a packed gradient, written in place by the kernels."""
    *inputs, bias, out, lse, rest = ctx.saved_tensors
    q, k, v = _unpack(*inputs)
    canonical = canonical_bias(bias)
    wanted = ctx.needs_input_grad
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) if need else None for x, need in zip(inputs, wanted, strict=False)]
    parts: list[Tensor | None] = []
    for grad, count in zip(grads, {3: (1, 1, 1), 2: (1, 2), 1: (3,)}[len(inputs)], strict=True):
        parts += [None] * count if grad is None else [grad] if count == 1 else grad.unbind(2)
    dbias = None
    if canonical is not None and wanted[len(inputs)]:
        dbias = torch.empty_like(canonical, memory_format=torch.contiguous_format)
    with torch.no_grad():
        saved = (out, lse, rest)
        attention_backward_(dout, None, q, k, v, canonical, *saved, *ctx.options, *parts, dbias, deterministic=ctx.deterministic)
    grads.append(None if dbias is None else dbias.view(bias.shape))
    return (*differentiable_once(grads, (dout, *inputs, bias)), None, None)


class FlashAttnFunc(torch.autograd.Function):
    """The seed's autograd function: ``FlashAttnFunc.apply(q, k, v, bias, causal, softmax_scale)``, as :func:`flash_attn_func`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None = None,
        causal: bool = False,
        softmax_scale: float | None = None,
    ) -> Tensor:
        return _forward(ctx, (q, k, v), bias, causal, softmax_scale)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, do)


class FlashAttnKVPackedFunc(torch.autograd.Function):
    """The seed's autograd function: ``FlashAttnKVPackedFunc.apply(q, kv, bias, causal, softmax_scale)``."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        bias: Tensor | None = None,
        causal: bool = False,
        softmax_scale: float | None = None,
    ) -> Tensor:
        check_tensors({"q": q, "kv": kv}, {"q": "B M H D", "kv": "B N 2 H D"})
        return _forward(ctx, (q, kv), bias, causal, softmax_scale)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, do)


class FlashAttnQKVPackedFunc(torch.autograd.Function):
    """The seed's autograd function: ``FlashAttnQKVPackedFunc.apply(qkv, bias, causal, softmax_scale)``."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None = None, causal: bool = False, softmax_scale: float | None = None) -> Tensor:
        check_tensors({"qkv": qkv}, {"qkv": "B M 3 H D"})
        return _forward(ctx, (qkv,), bias, causal, softmax_scale)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, do)


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor, float]:
    """The seed's forward without autograd. Arguments as :func:`flash_attn_func`.

    Returns:
        o ``(batch, seqlen_q, nheads, headdim)``; lse ``(batch, nheads, ceil(seqlen_q / 128) * 128)``, float32 (float64 for float64
        inputs), natural log of the sum of exponentials of each query's scores, -inf for a query that sees no key and for the padded
        rows; and the scale that was used.
    """
    canonical, options = _arguments(q, k, v, bias, causal, softmax_scale)
    with torch.no_grad():
        out, lse, _ = attention_forward(q, k, v, canonical, *options)
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % LSE_ROW_MULTIPLE), value=-torch.inf)
    return out, lse, options[3]


def _flash_attn_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> None:
    """The seed's backward without autograd: fill ``dq``, ``dk`` and ``dv`` in place.

    Args:
        do: gradient of o, ``(batch, seqlen_q, nheads, headdim)``.
        q, k, v, bias, causal, softmax_scale: as given to :func:`_flash_attn_forward`.
        o, lse: as it returned them; lse may have any number of rows from seqlen_q up.
        dq, dk, dv: outputs in the shapes, dtype and device of q, k, v; any strides; nothing beside their elements is touched. Untouched if
            an argument is wrong.

    A float32 lse has no room for the logarithm of a sum beside a huge maximum, and nothing else is handed over: where ``|lse|`` is beyond
    some 10⁴, gradients are off, and without a bias beyond 10⁷ they need not be finite. Those of the functions above are right.
    """
    canonical, options = _arguments(q, k, v, bias, causal, softmax_scale)
    given = {"q": q, "k": k, "v": v, "do": do, "o": o, "dq": dq, "dk": dk, "dv": dv}
    rows, cols = _QKV["q"], _QKV["k"]
    check_tensors(given, {**_QKV, "do": rows, "o": rows, "dq": rows, "dk": cols, "dv": cols})
    same_device_and_dtype(given)
    check_tensors({"q": q, "lse": lse}, {"q": "B M H D", "lse": "B H _"})
    if lse.shape[2] < q.shape[1]:
        raise bad_value("lse", f"at least {q.shape[1]} rows", f"{lse.shape[2]} rows", "pass the lse that _flash_attn_forward returned")
    wanted = torch.float64 if q.dtype == torch.float64 else torch.float32
    if lse.dtype != wanted:
        raise bad_type("lse", str(wanted), lse.dtype)
    if lse.device != q.device:
        raise bad_value("lse", f"q's device {q.device}", lse.device)
    with torch.no_grad():
        saved, fixed = (o, lse[:, :, : q.shape[1]], None), torch.are_deterministic_algorithms_enabled()
        attention_backward_(do, None, q, k, v, canonical, *saved, *options, dq, dk, dv, None, deterministic=fixed)
