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

from .arguments import SEED, Given, Options, checked
from .checks import check_bool, check_tensors, same_device_and_dtype
from .door import attend
from .errors import bad_type, bad_value
from .ops import attention_backward_

__all__ = [
    "FlashAttnFunc",
    "FlashAttnKVPackedFunc",
    "FlashAttnQKVPackedFunc",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
]

LSE_ROW_MULTIPLE = 128  # rows of the lse that _flash_attn_forward returns are padded to a multiple of this, as they were in the seed


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
            ``torch.set_float32_matmul_precision``; where nobody set it, see ``precision`` of ``triflash.attention``). Any strides,
            head dims 1 … 256.
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
    Autocast and ``torch.func``: as for ``triflash.attention``.
    """
    return _attend((q, k, v), bias, causal, softmax_scale)


def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, bias: Tensor | None = None, causal: bool = False, softmax_scale: float | None = None
) -> Tensor:
    """``flash_attn_func`` with k and v in one tensor, whose gradient is one tensor, too.

    Args:
        kv: ``(batch, seqlen_k, 2, nheads, headdim)``. All else, what is returned and what is raised: as of ``flash_attn_func``.
    """
    return _attend((q, kv), bias, causal, softmax_scale)


def flash_attn_qkvpacked_func(qkv: Tensor, bias: Tensor | None = None, causal: bool = False, softmax_scale: float | None = None) -> Tensor:
    """``flash_attn_func`` with all three in one tensor, whose gradient is one tensor, too.

    Args:
        qkv: ``(batch, seqlen, 3, nheads, headdim)``. All else, what is returned and what is raised: as of ``flash_attn_func``.
    """
    return _attend((qkv,), bias, causal, softmax_scale)


def _attend(inputs: tuple[Tensor, ...], bias: Tensor | None, causal: bool, softmax_scale: float | None) -> Tensor:
    """Attention of q, k and v however they are packed; a packed input gets a packed gradient, written in place by the kernels."""
    return attend(SEED[len(inputs)], _given(*inputs)._replace(bias=bias), _options(causal, softmax_scale))


def _given(q: Tensor, k: Tensor | None = None, v: Tensor | None = None, bias: Tensor | None = None) -> Given:
    return Given(q, k, v, bias)


def _options(causal: bool, softmax_scale: float | None) -> Options:
    return Options("top_left" if check_bool("causal", causal) else False, None, softmax_scale, None, 0.0, None, "bshd", None, None, None)


class _SeedFunction(torch.autograd.Function):
    """One of the seed's autograd functions: what autograd needs of it, :func:`_attend` brings along."""

    @classmethod
    def apply(cls, *args: Any, **options: Any) -> Tensor:
        result: Tensor = cls.forward(None, *args, **options)
        return result


class FlashAttnFunc(_SeedFunction):
    """The seed's autograd function: ``FlashAttnFunc.apply(q, k, v, bias, causal, softmax_scale)``, as ``flash_attn_func``."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False, softmax_scale: float | None = None
    ) -> Tensor:
        return _attend((q, k, v), bias, causal, softmax_scale)


class FlashAttnKVPackedFunc(_SeedFunction):
    """The seed's autograd function: ``FlashAttnKVPackedFunc.apply(q, kv, bias, causal, softmax_scale)``."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, bias: Tensor | None = None, causal: bool = False, softmax_scale: float | None = None
    ) -> Tensor:
        return _attend((q, kv), bias, causal, softmax_scale)


class FlashAttnQKVPackedFunc(_SeedFunction):
    """The seed's autograd function: ``FlashAttnQKVPackedFunc.apply(qkv, bias, causal, softmax_scale)``."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None = None, causal: bool = False, softmax_scale: float | None = None) -> Tensor:
        return _attend((qkv,), bias, causal, softmax_scale)


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
    given, options = _given(q, k, v, bias), _options(causal, softmax_scale)
    scale = checked(SEED[3], given, options).scale
    with torch.no_grad():
        out, lse = attend(SEED[3], given, options, return_lse=True)
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % LSE_ROW_MULTIPLE), value=-torch.inf)
    return out, lse, scale


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
    call = checked(SEED[3], _given(q, k, v, bias), _options(causal, softmax_scale))
    shapes = dict(SEED[3].shapes or ())
    given = {"q": q, "k": k, "v": v, "do": do, "o": o, "dq": dq, "dk": dk, "dv": dv}
    check_tensors(given, {**shapes, "do": shapes["q"], "o": shapes["q"], "dq": shapes["q"], "dk": shapes["k"], "dv": shapes["k"]})
    same_device_and_dtype(given)
    check_tensors({"q": q, "lse": lse}, {"q": "B M H D", "lse": "B H _"})
    if lse.shape[2] < q.shape[1]:
        raise bad_value("lse", f"at least {q.shape[1]} rows", f"{lse.shape[2]} rows", "pass the lse that _flash_attn_forward returned")
    wanted = torch.float64 if q.dtype == torch.float64 else torch.float32
    if lse.dtype != wanted:
        raise bad_type("lse", str(wanted), lse.dtype)
    if lse.device != q.device:
        raise bad_value("lse", f"q's device {q.device}", lse.device)
    x = call.form.operands((q, k, v, bias, *(None,) * 5))
    options = (call.form.inner, call.lo, call.hi, call.scale, call.precision, call.backend)
    with torch.no_grad():
        saved = (o, lse[:, :, : q.shape[1]], None)
        attention_backward_(do, None, *x[:4], *saved, *options, dq, dk, dv, None, deterministic=call.deterministic)
