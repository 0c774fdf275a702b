"""Packed sequences: attention of sequences that lie one behind the other in one tensor, with everything that ``attention`` takes.

Method: FlashAttention's variable lengths (Dao et al. 2022), with any bias and its gradient.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .arguments import two_biases
from .checks import check_bool
from .door import attend_known_varlen, attend_varlen
from .errors import bad_value
from .hints import not_ours
from .ops_checked import checked_attention_varlen
from .plan.select import _of_environment, _requested

__all__ = ["attention_varlen", "near"]


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    bias: Tensor | tuple[Tensor | None, ...] | None = None,
    bias_layout: str = "padded",
    mask: Tensor | None = None,
    mask_layout: str | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: Literal[False] = False,
    deterministic: bool | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: bool,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    bias: Tensor | tuple[Tensor | None, ...] | None = None,
    bias_layout: str = "padded",
    mask: Tensor | None = None,
    mask_layout: str | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention_varlen(q: Tensor, k: Tensor, v: Tensor, *more: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention within each of many sequences packed one behind the other, with gradients for q, k, v, the bias and the sink.

    What ``triflash.attention`` computes, of each sequence on its own: no sequence sees another's values, NaN included.

    Args:
        q: queries ``(Tq, Hq, D)`` of all sequences; fp16, bf16 or fp32 (fp64 on backend ``tiled``).
        k: keys ``(Tk, Hk, D)``; Hq is a multiple of Hk. v: values ``(Tk, Hk, Dv)``.
        cu_seqlens_q: int32 or int64 ``(B + 1,)``: sequence b's queries are rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``. On q's
            device, or on the CPU, from where they are copied without waiting (not while a CUDA graph is captured). The host never reads
            them: wrong ones read or write nothing out of bounds, but results are then undefined; with ``TRIFLASH_CHECK=1`` in the
            environment they are read and named.
        cu_seqlens_k: the same of the keys; default cu_seqlens_q.
        max_seqlen_q, max_seqlen_k: the longest sequence, a hint for the choice of tiles; results do not depend on it.
        seqused_q, seqused_k: integers ``(B,)``: how many of a sequence's rows count. Causal, windows and ALiBi follow them.
        bias: added to the scaled scores, in one of three layouts; fp16, bf16 or fp32. Its gradient has its shape, 0 in padding. Or a tuple
            of two, in the same layout, each of its own shape and dtype and with its own gradient.
        bias_layout: ``"padded"``: ``(B|1, Hq|1, Mmax|1, Nmax|1)``, by position in the sequence; what a sequence needs past a dim that is
            not 1 counts as −inf. ``"rows"``: ``(Hq|1, Tq, Nmax|1)``, packed along queries. ``"keys"``: ``(Hq|1, Tk)``, a number a key.
        mask: bool, True = visible, in one of the same layouts, also beside a bias.
        mask_layout: of the mask; default bias_layout.
        causal: aligned to the bottom right of each sequence (True), or ``"top_left"``. window: see ``triflash.attention``, likewise.
        scale, softcap: see ``triflash.attention``. alibi_slopes: ``(Hq,)`` or ``(B, Hq)``. sink: ``(Hq,)``.
        dropout_p, dropout_seed: the marks of the padded batch: by sequence, head and position in the sequence.
        return_lse, deterministic, precision, backend: see ``triflash.attention``; backends ``tiled`` and ``oracle`` read the offsets.

    Returns:
        out ``(Tq, Hq, Dv)``, or ``(out, lse)`` with lse ``(Hq, Tq)``, differentiable. Rows that no sequence owns, or behind seqused_q, get
        0 and −inf, and give and get zero gradient.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or option; the message names the argument. For a name that another package has
            for it (cu_seq_q, max_q, key_lengths, softmax_scale, …) it names ours.
        UnsupportedError: no backend, or not the one that was asked for by name, can do this combination.

    >>> out = attention_varlen(q, k, v, torch.tensor([0, 5, 12], device=q.device), causal=True)
    """
    if _compiling():
        return _in_graph(q, k, v, *more, **options)
    known = attend_known_varlen(q, k, v, *more, **options) if len(more) <= 4 and _PLAIN.issuperset(options) else None
    return _attention_varlen(q, k, v, *more, **options) if known is None else known


def _attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor = None,  # type: ignore[assignment]
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *more: Any,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    bias: Tensor | tuple[Tensor | None, ...] | None = None,
    bias_layout: str = "padded",
    mask: Tensor | None = None,
    mask_layout: str | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    precision: str | None = None,
    backend: str | None = None,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    if more or others:
        raise not_ours("attention_varlen", [*inspect.signature(attention_varlen).parameters][3:], more, others)
    check_bool("return_lse", return_lse)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    cu_seqlens_q, cu_seqlens_k = near(q, "cu_seqlens_q", cu_seqlens_q), near(q, "cu_seqlens_k", cu_seqlens_k)
    second = None
    if isinstance(bias, (tuple, list)):
        bias, second = two_biases(bias)
    given = (q, k, v, bias, mask, alibi_slopes, sink, dropout_seed, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, second)
    options = (
        bias_layout, mask_layout, causal, window, scale, softcap, dropout_p, deterministic, precision, backend, max_seqlen_q, max_seqlen_k
    )  # fmt: skip
    return attend_varlen(given, options, return_lse)


def _in_graph(q: Any, k: Any, v: Any, *more: Any, **options: Any) -> Any:
    """What ``torch.compile`` traces: one operator, if arguments are of the usual types, else all that an eager call does.

    A compiled program compares in each call whatever was read here from outside, functions and their defaults too: hence those within.
    """

    def are(kinds: tuple[str, ...], *values: Any) -> bool:
        for value in values:  # noqa: SIM110 (one thing less to compare)
            if type(value).__name__ not in kinds:
                return False
        return True

    def by_operator(
        cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, max_seqlen_q: Any = None, max_seqlen_k: Any = None, *others: Any,
        seqused_q: Any = None, seqused_k: Any = None, bias: Any = None, bias_layout: Any = "padded", mask: Any = None,
        mask_layout: Any = None, causal: Any = False, window: Any = None, scale: Any = None, softcap: Any = None,
        alibi_slopes: Any = None, sink: Any = None, dropout_p: Any = 0.0, dropout_seed: Any = None, return_lse: Any = False,
        deterministic: Any = None, precision: Any = None, backend: Any = None, **unknown: Any,
    ) -> Any:  # fmt: skip
        cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        second = None
        if are(("tuple",), bias) and len(bias) == 2:
            bias, second = bias
        left, right = window if are(("tuple",), window) and len(window) == 2 else (None, None)
        if (
            others or unknown or not are(("Tensor", "Parameter"), q, k, v, cu_seqlens_q, cu_k)
            or (q.device.type in ("cpu", "cuda", "xpu") and _autocast(q.device.type))  # casts are seen: PyTorch 2.10 caches graphs by these
            or cu_seqlens_q.device != q.device or cu_k.device != q.device
            or not are(("NoneType", "Tensor", "Parameter"), bias, second, mask, alibi_slopes, sink, dropout_seed, seqused_q, seqused_k)
            or not (are(("bool",), causal) or (are(("str",), causal) and causal == "top_left"))
            or not (window is None or (are(("tuple",), window) and len(window) == 2))
            or not are(("NoneType", "int"), left, right, max_seqlen_q, max_seqlen_k)
            or not are(("NoneType", "int", "float"), scale, softcap) or not are(("float",), dropout_p)
            or not are(("NoneType", "bool"), deterministic) or not are(("bool",), return_lse) or not are(("str",), bias_layout)
            or not are(("NoneType", "str"), mask_layout, precision, backend)
        ):  # fmt: skip
            return None
        out, lse = checked_attention_varlen(
            q, k, v, bias, mask, alibi_slopes, sink, dropout_seed, cu_seqlens_q, cu_k, seqused_q, seqused_k, second, bias_layout,
            mask_layout, "top_left" if causal == "top_left" else "True" if causal else "False", window is not None, left, right, scale,
            softcap, dropout_p, deterministic, precision, backend or _requested.name or _of_environment(), max_seqlen_q, max_seqlen_k,
        )  # fmt: skip
        return (out, lse) if return_lse else out

    found = by_operator(*more, **options)
    return _attention_varlen(q, k, v, *more, **options) if found is None else found


for _own in (attend_known_varlen, _attention_varlen, _in_graph):  # as errors of Python itself call them
    _own.__qualname__ = attention_varlen.__qualname__

_compiling, _autocast = torch.compiler.is_compiling, torch.is_autocast_enabled
_PLAIN = frozenset({  # options of a call that is told soonest
    "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "bias", "bias_layout", "causal", "scale", "return_lse", "backend"
})  # fmt: skip

# more and others are for errors alone, and offsets there must be: help() shows the rest.
_parameters = [
    each.replace(default=inspect.Parameter.empty) if each.name == "cu_seqlens_q" else each
    for each in inspect.signature(_attention_varlen).parameters.values()
    if each.name not in ("more", "others")
]
attention_varlen.__signature__ = inspect.signature(_attention_varlen).replace(parameters=_parameters)  # type: ignore[attr-defined]


def near(q: Tensor, name: str, offsets: Tensor) -> Tensor:
    """Offsets on q's device: those on the CPU are copied, without waiting. Raises ValueError while a CUDA graph is captured."""
    if not isinstance(offsets, Tensor) or not isinstance(q, Tensor) or offsets.device == q.device or offsets.device.type != "cpu":
        return offsets
    if q.device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise bad_value(name, f"offsets on {q.device} while a CUDA graph is captured", "offsets on the CPU", "a replay would not copy them")
    return offsets.to(q.device, non_blocking=True)
