"""The front door: one function for exact attention, in the field's present conventions, and ``merge_states`` for results in parts.

Method: FlashAttention (Dao et al. 2022), FlashAttention-2 (Dao 2023); merging: Rabe and Staats 2021.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .arguments import ATTENTION, two_biases
from .checks import check_bool
from .combine import combine
from .door import attend, attend_plain
from .errors import bad_value
from .hints import not_ours
from .ops_checked import checked_attention
from .plan.select import _of_environment, _requested

__all__ = ["attention", "merge_states"]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | tuple[Tensor | None, ...] | None = None,
    mask: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    diagonal: int | Tensor | None = None,
    query_starts: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: Literal[False] = False,
    deterministic: bool | None = None,
    layout: str = "bshd",
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    bias: Tensor | tuple[Tensor | None, ...] | None = None,
    mask: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    diagonal: int | Tensor | None = None,
    query_starts: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool | None = None,
    layout: str = "bshd",
    precision: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool,
    bias: Tensor | tuple[Tensor | None, ...] | None = None,
    mask: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    diagonal: int | Tensor | None = None,
    query_starts: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool | None = None,
    layout: str = "bshd",
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(q: Tensor, k: Tensor, v: Tensor, *more: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, ``softmax(scale * q kᵀ + bias) v`` over the visible keys, with gradients for q, k, v, the bias and the sink.

    Written out, for query i and key j of one head: ``s = scale * q·k``; ``s = softcap * tanh(s / softcap)``; ``s += bias``;
    ``s -= slope * |i + diagonal − j|``; −inf where hidden; ``p = exp(s − lse)`` with ``lse = log(Σ exp(s) + exp(sink))``;
    ``out = Σ p * keep / (1 − dropout_p) * v``; each step only if it is asked for.

    Args:
        q: queries ``(*batch, M, Hq, D)``; fp16, bf16 or fp32 (fp64 on backend ``tiled``). One batch dim or more; any strides.
        k: keys ``(*batch, N, Hk, D)``, q's dtype, device and batch dims. Hq is a multiple G of Hk: query head h reads key head ``h // G``.
        v: values ``(*batch, N, Hk, Dv)``; Dv may differ from D.
        bias: added to the scaled scores, unscaled; any shape of 2 dims or more that broadcasts to ``(*batch, Hq, M, N)``, any strides;
            fp16, bf16 or fp32 whatever q is. −inf hides a key from a query. Its gradient has its own shape and dtype, summed in float32
            over what it broadcasts, and is computed only if it is asked for. Or a tuple of two, each of its own shape and dtype and with
            its own gradient, whose sum is never materialised (backend ``hopper``: one over queries and keys beside one over keys alone).
        mask: bool, of a shape as of a bias, and also beside one; True = visible. Blocks that it hides altogether cost no products.
        causal: True hides from query i the keys ``j > i + diagonal`` (by default aligned to the bottom right: the last query sees every
            key); ``"top_left"`` those with ``j > i``.
        window: ``(left, right)``: query i sees the keys from ``i' − left`` to ``i' + right``, where ``i' = i + diagonal``, or ``i' = i`` if
            causal is ``"top_left"``. None or −1 leaves a side open. Time is in proportion to the visible blocks.
        key_lengths: integers ``(*batch)``: keys from that number on are hidden, cost nothing, and may hold anything. Does not move
            the diagonal.
        diagonal: where queries stand among the keys, for causal, window and ALiBi: query i is at key ``i + diagonal``. An int from −2²⁹ to
            2²⁹; or integers ``(*batch)``, one for each batch entry, read on the device (kept to that range). Default ``N − M``; beside
            causal ``"top_left"``, which is 0, it must be None. Backend ``hopper`` takes an int, without ALiBi.
        query_starts, query_lengths: integers ``(*batch)``: queries before the start, and from the length on, are no rows. They give 0 and
            −inf, sink or not, cost nothing, may hold anything, and have no gradient at all, nor give one to the sink.
        key_starts: integers ``(*batch)``: keys before are hidden, as those beyond key_lengths are. Neither of the three moves the diagonal;
            what is out of range counts as its end. Backends ``oracle``, ``tiled`` and ``triton``.
        scale: default ``1 / sqrt(D)``; 0.0 means 0.0.
        softcap: bounds the scaled products to ±softcap, before the bias; None or 0 does not.
        alibi_slopes: floats ``(Hq,)`` or ``(*batch, Hq)``, used in float32, without a gradient.
        sink: floats ``(Hq,)``, with a gradient: a score for each head that takes part in the softmax and has no value.
        dropout_p: the probability with which a softmax probability is dropped; the others are multiplied by ``1 / (1 − dropout_p)``. It
            counts to the nearest 2⁻¹⁵.
        dropout_seed: what decides which: an int, or an int64 tensor (seed, offset) where q is, which a captured CUDA graph reads anew at
            every replay. The same seed drops the same on every backend. Default: drawn from PyTorch's generator of q's device.
        return_lse: also return the natural log of the sum of exponentials of each query's visible scores, differentiable.
        deterministic: True asks for the same bits of every gradient in every run, False allows faster kernels that do not promise it for
            dq; default ``torch.are_deterministic_algorithms_enabled()``. Only the backward kernels of backend ``hopper`` make a difference.
        layout: ``"bshd"`` as above, or ``"bhsd"``: q ``(*batch, Hq, M, D)``, k, v and the output alike. By strides; nothing is copied.
        precision: of float32 products: ``"ieee"``, ``"tf32"`` or ``"tf32x3"``, three TF32 products for one; default PyTorch's own setting
            for matrix products, and where nobody set one, ``"tf32x3"`` on NVIDIA GPUs for head dims up to 128, else ``"ieee"``.
        backend: as ``triflash.backend``; default the innermost block's, else ``TRIFLASH_BACKEND``, else ``"auto"``.

    Returns:
        out ``(*batch, M, Hq, Dv)`` in q's dtype, or ``(out, lse)`` with lse ``(*batch, Hq, M)`` in float32 (float64 for float64), sink
        included, dropout not. A query that sees no key gets 0 and −inf (with a sink: the sink), and gives zero gradient to everything but
        the sink. One that is no row gets 0 and −inf, and gives none.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or option; the message names the argument. For a name that another package
            has for it (is_causal, attn_mask, softmax_scale, dropout, window_size, …) or a bias by position, it names ours.
        UnsupportedError: no backend, or not the one that was asked for by name, can do this combination (docs/features.md).

    q, k and v may be jagged NestedTensors, ``(B, lengths, heads, dim)``, ragged in dim 1, or 2 with ``layout="bhsd"``: out and lse are
    jagged with q's offsets, causal, windows and ALiBi follow each sequence's own lengths, a bias or mask is padded to the longest, and
    key_lengths, starts, query_lengths and diagonal must be None. ``triflash.attention_varlen`` computes it.

    What causal, window, mask or a bias of −inf hides must be finite; what key_lengths and key_starts hide, and queries that are no rows,
    may hold anything, in q, k, v, bias and mask alike. ``TRIFLASH_CHECK=1`` in the environment has values of lengths, starts and diagonals
    checked, which waits for the device.

    Memory beyond inputs and outputs is O(M + N) per head, but for copies of inputs whose layout kernels cannot read. Results are bitwise
    reproducible, gradients included, but for dq on backend ``hopper`` unless ``deterministic``. Under autocast q, k and v become its dtype,
    as those of SDPA do. ``torch.func``'s ``grad``, ``vjp``, ``jacrev`` and ``vmap`` work; forward-mode and second derivatives raise
    UnsupportedError.

    Sources: grouped heads (Ainslie et al. 2023), ALiBi (Press et al. 2022), soft cap (Gemma 2, 2024), sinks (gpt-oss, 2025).
    """
    if _compiling():
        return _in_graph(q, k, v, *more, **options)
    if more or not _PLAIN.issuperset(options):
        return _attention(q, k, v, *more, **options)
    return attend_plain(ATTENTION, q, k, v, **options)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *more: Any,
    bias: Tensor | tuple[Tensor | None, ...] | None = None,
    mask: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    diagonal: int | Tensor | None = None,
    query_starts: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    layout: str = "bshd",
    precision: str | None = None,
    backend: str | None = None,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    if more or others:
        raise not_ours("attention", [*inspect.signature(attention).parameters][3:], more, others)
    if return_lse is not False:
        check_bool("return_lse", return_lse)
    second = number = diagonals = None
    if isinstance(bias, (tuple, list)):
        bias, second = two_biases(bias)
    if isinstance(diagonal, Tensor):
        diagonals = diagonal
    else:
        number = diagonal
    given = (
        q, k, v, bias, mask, key_lengths, alibi_slopes, sink, dropout_seed, second, query_starts, query_lengths, key_starts, diagonals,
    )  # fmt: skip
    options = (causal, window, scale, softcap, dropout_p, deterministic, layout, precision, backend, number)
    return attend(ATTENTION, given, options, return_lse)


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
        bias: Any = None, mask: Any = None, causal: Any = False, window: Any = None, key_lengths: Any = None, diagonal: Any = None,
        query_starts: Any = None, query_lengths: Any = None, key_starts: Any = None, scale: Any = None, softcap: Any = None,
        alibi_slopes: Any = None, sink: Any = None, dropout_p: Any = 0.0, dropout_seed: Any = None, return_lse: Any = False,
        deterministic: Any = None, layout: Any = "bshd", precision: Any = None, backend: Any = None, **others: Any,
    ) -> Any:  # fmt: skip
        number = diagonals = None
        if are(("int", "NoneType"), diagonal):
            number = diagonal
        else:
            diagonals = diagonal
        left, right = window if are(("tuple",), window) and len(window) == 2 else (None, None)
        if (
            others or not are(("Tensor", "Parameter"), q, k, v)
            or (q.device.type in ("cpu", "cuda", "xpu") and _autocast(q.device.type))  # casts are seen: PyTorch 2.10 caches graphs by these
            or not are(("NoneType", "Tensor", "Parameter"), bias, mask, key_lengths, alibi_slopes, sink, dropout_seed)
            or not are(("NoneType", "Tensor", "Parameter"), query_starts, query_lengths, key_starts, diagonals)
            or not (are(("bool",), causal) or (are(("str",), causal) and causal == "top_left"))
            or not (window is None or (are(("tuple",), window) and len(window) == 2)) or not are(("NoneType", "int"), left, right)
            or not are(("NoneType", "int", "float"), scale, softcap) or not are(("float",), dropout_p)
            or not are(("NoneType", "bool"), deterministic) or not are(("bool",), return_lse)
            or not are(("str",), layout) or not are(("NoneType", "str"), precision, backend)
        ):  # fmt: skip
            return None
        out, lse = checked_attention(
            q, k, v, bias, mask, key_lengths, alibi_slopes, sink, dropout_seed, None, query_starts, query_lengths, key_starts, diagonals,
            number, "top_left" if causal == "top_left" else "True" if causal else "False", window is not None, left, right, scale, softcap,
            dropout_p, deterministic, layout, precision, backend or _requested.name or _of_environment(),
        )  # fmt: skip
        return (out, lse) if return_lse else out

    found = None if more else by_operator(**options)
    return _attention(q, k, v, *more, **options) if found is None else found


_compiling, _autocast = torch.compiler.is_compiling, torch.is_autocast_enabled
_PLAIN = frozenset({"bias", "causal", "scale", "return_lse", "layout", "backend"})  # options of a call that is told soonest

# more and others are for errors alone: help() shows the rest.
_parameters = [each for each in inspect.signature(_attention).parameters.values() if each.name not in ("more", "others")]
attention.__signature__ = inspect.signature(_attention).replace(parameters=_parameters)  # type: ignore[attr-defined]


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor], rests: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The result over all keys from results over parts of them: ``lse = log Σ exp(lse_t)``, ``out = Σ exp(lse_t − lse) out_t``.

    Args:
        outs: of each part, ``(*batch, M, H, Dv)``. lses: of each part, ``(*batch, H, M)``, as ``attention`` returns them. Queries and
            heads are the same in every part; keys are disjoint. rests: in lses' shapes, what each lse lost in rounding, in base 2, as
            ``torch.ops.triflash.forward`` gives it; it matters where scores are huge. None: nothing.

    Returns:
        out in the parts' dtype and lse, differentiable by both. A query that no part saw a key for gets 0 and −inf.

    Raises:
        ValueError, TypeError: no part, or parts that do not fit each other.
    """
    if len(outs) != len(lses) or not outs:
        raise bad_value("outs, lses", "as many of one as of the other, one at least", f"{len(outs)} and {len(lses)}")
    for t, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != outs[0].shape or out.dtype != outs[0].dtype or out.device != outs[0].device:
            raise bad_value(f"outs[{t}]", f"{tuple(outs[0].shape)} in {outs[0].dtype}, as outs[0]", f"{tuple(out.shape)} in {out.dtype}")
        wanted = (*out.shape[:-3], out.shape[-2], out.shape[-3])
        if lse.shape != wanted or lse.device != out.device:
            raise bad_value(
                f"lses[{t}]", f"shape {tuple(wanted)} (heads before queries) on {out.device}", f"{tuple(lse.shape)} on {lse.device}"
            )
    if rests is not None:
        if len(rests) != len(lses):
            raise bad_value("rests", f"one of each of {len(lses)} parts", len(rests))
        for t, (lse, rest) in enumerate(zip(lses, rests, strict=True)):
            if rest.shape != lse.shape or rest.device != lse.device:
                raise bad_value(
                    f"rests[{t}]", f"shape {tuple(lse.shape)} on {lse.device}, as lses[{t}]", f"{tuple(rest.shape)} on {rest.device}"
                )
    merged, lse = combine(torch.stack(list(outs)), torch.stack(list(lses)), None if rests is None else torch.stack(list(rests)))
    return merged.to(outs[0].dtype), lse
