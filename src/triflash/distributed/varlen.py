"""Packed documents over a group: each is spread by itself, so that every rank sees as many pairs of each."""

from __future__ import annotations

import zlib
from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..arguments import Given, Options, VarlenGiven, VarlenOptions, two_biases
from ..checks import check_bool, seed_tensor
from ..errors import bad_type, bad_value, unsupported
from ..ops_checked import casting, is_casting
from ..plan.device import limited
from ..spec import LAYOUTS
from .agree import agree, rows_apart, values_of
from .attention import DETERMINISTIC, attend_part, check_count, check_method, is_deterministic, seed_of_all
from .chunks import check_order, share
from .group import Group, exchange_numbers, process_group, refuse_transforms, refuse_unlike, resolve
from .merging import wide
from .packed import Packed, at_once

__all__ = ["context_parallel_attention_varlen"]


@overload
def context_parallel_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    group: Any,
    method: str = "allgather",
    order: str = "zigzag",
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
    head_chunks: int | None = None,
    programs: int | None = None,
) -> Tensor: ...
@overload
def context_parallel_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    group: Any,
    return_lse: bool,
    method: str = "allgather",
    order: str = "zigzag",
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
    head_chunks: int | None = None,
    programs: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def context_parallel_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    group: Any,
    method: str = "allgather",
    order: str = "zigzag",
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
    head_chunks: int | None = None,
    programs: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``triflash.attention_varlen`` of packed documents, each of which is spread over the ranks of a group.

    A rank holds, document after document, its share of each, as ``shard`` cuts it: zigzag, every rank sees as many pairs of every
    causal document. Results and gradients are those of ``attention_varlen`` on the gathered documents.

    Args:
        q, k, v: this rank's rows ``(rows, Hq, D)``, ``(rows, Hk, D)``, ``(rows, Hk, Dv)`` of all documents.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 ``(B + 1,)``: where documents begin and end in the whole, the same on every rank. The
            host reads them: on the CPU they cost nothing, on a GPU it waits. cu_seqlens_k: default cu_seqlens_q.
        max_seqlen_q, max_seqlen_k: taken as attention_varlen takes them, and not needed here.
        bias: my rows, all keys in their natural order, in one of three layouts. ``"padded"``: ``(B|1, Hq|1, m|1, N|1)``, of each document
            my rows and its keys, padded behind; ``"rows"``: ``(Hq|1, rows, N|1)``; ``"keys"``: ``(Hq|1, Tk)``, keys of the whole. Or a
            tuple of two. mask: likewise. bias_layout, mask_layout: see ``triflash.attention_varlen``.
        group, method, order, head_chunks, programs: see ``context_parallel_attention``.
        causal, window, scale, softcap, alibi_slopes, sink, dropout_p, dropout_seed, return_lse, deterministic, precision, backend: see
            ``triflash.attention_varlen``.

    Returns:
        out ``(rows, Hq, Dv)``, or ``(out, lse)`` with lse ``(Hq, rows)``. All documents go in one message each way and one launch (a causal
        zigzag: two) by Ulysses, and by allgather if what is visible ends with the diagonal (causal, or a window of 0 to the right) or there
        is neither window nor ALiBi. By ring, with dropout, and with rows of the layout ``"padded"`` they run one after the other.

    Raises:
        ValueError, TypeError: a wrong argument, named. UnsupportedError: under torch.compile, or what no backend can do.
    """
    ranks = resolve(group, "context_parallel_attention_varlen")
    if is_casting(q):
        rest: dict[str, Any] = dict(
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, group=group,
            method=method, order=order, bias=bias, bias_layout=bias_layout, mask=mask, mask_layout=mask_layout, causal=causal,
            window=window, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, sink=sink, dropout_p=dropout_p,
            dropout_seed=dropout_seed, return_lse=return_lse, deterministic=deterministic, precision=precision, backend=backend,
            head_chunks=head_chunks, programs=programs,
        )  # fmt: skip
        with casting((q, k, v)) as cast:
            return context_parallel_attention_varlen(*cast, **rest)
    mask_layout = bias_layout if mask_layout is None else mask_layout

    def told() -> dict[str, Any]:
        added = bias if isinstance(bias, (tuple, list)) else (bias,)
        given = [x for x in added if x is not None]
        biases = {f"bias[{n}]" if n else "bias": _apart(x, bias_layout) for n, x in enumerate(given)}
        return {
            "method": method, "order": order, "cu_seqlens_q": _summary(cu_seqlens_q), "cu_seqlens_k": _summary(cu_seqlens_k),
            "causal": causal, "window": window, "scale": scale, "softcap": softcap, "dropout_p": dropout_p,
            "deterministic": deterministic, DETERMINISTIC: is_deterministic(deterministic), "precision": precision, "backend": backend,
            "head_chunks": head_chunks, "programs": programs, "return_lse": return_lse, "bias_layout": bias_layout,
            "mask_layout": mask_layout, **{name: _apart(x, "q") for name, x in (("q", q), ("k", k), ("v", v))}, "bias": None,
            "bias[1]": None, **biases, "mask": _apart(mask, mask_layout), "alibi_slopes": alibi_slopes, "sink": sink,
            "dropout_seed": values_of(dropout_seed),
        }  # fmt: skip

    def check() -> tuple[Any, Any, list[int], list[int], list[tuple[int, int, int, int, int, int]]]:
        check_bool("return_lse", return_lse)
        check_method(method)
        check_order(order)
        for name, count in (("head_chunks", head_chunks), ("programs", programs)):
            check_count(name, count)
        for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
            if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int) or longest < 0):
                raise bad_type(name, "an integer from 0 up, or None", repr(longest))
        first, second = two_biases(bias)
        refuse_transforms("context_parallel_attention_varlen", q=q, k=k, v=v, bias=first, sink=sink, **{"bias[1]": second})
        refuse_unlike(
            q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, bias=first, mask=mask, alibi_slopes=alibi_slopes,
            sink=sink, dropout_seed=dropout_seed, **{"bias[1]": second},
        )  # fmt: skip
        if torch.compiler.is_compiling():
            raise unsupported("context_parallel_attention_varlen under torch.compile, whose host reads where documents begin", "auto",
                              "call it outside, or compile context_parallel_attention of one document")  # fmt: skip
        starts_q = _starts("cu_seqlens_q", cu_seqlens_q, None)
        starts_k = starts_q if cu_seqlens_k is None else _starts("cu_seqlens_k", cu_seqlens_k, len(starts_q))
        for name, layout in (("bias_layout", bias_layout), ("mask_layout", mask_layout)):
            if layout not in LAYOUTS:
                raise bad_value(name, f"one of {', '.join(LAYOUTS)}", repr(layout))
        spans = []  # of each document: lengths in all, my first query and key, and behind my last
        at_q = at_k = 0
        for (a, b), (c, d) in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
            m, n = (share(length, ranks.size, ranks.rank, order) for length in (b - a, d - c))
            spans.append((b - a, d - c, at_q, at_k, at_q + m, at_k + n))
            at_q, at_k = at_q + m, at_k + n
        for name, x, rows in (("q", q, at_q), ("k", k, at_k), ("v", v, at_k)):
            if not isinstance(x, Tensor):
                raise bad_type(name, "a tensor", type(x).__name__)
            if x.dim() != 3 or x.shape[0] != rows:
                wanted = f"3 dims and {rows} rows on rank {ranks.rank} of {ranks.size}, its {order} shares of the documents"
                raise bad_value(name, wanted, tuple(x.shape))
        return first, second, starts_q, starts_k, spans

    if torch.compiler.is_compiling():
        first, second, starts_q, starts_k, spans = check()
    else:
        first, second, starts_q, starts_k, spans = agree(process_group(group), ranks, (q, k, v), told, check)
    own_rows = _own_rows(((first, bias_layout), (second, bias_layout), (mask, mask_layout)), starts_q, ranks, order)
    cu = torch.tensor(starts_q)
    packed = VarlenGiven(q, k, v, first, mask, alibi_slopes, sink, dropout_seed, cu, cu, None, None, second)
    said = VarlenOptions(bias_layout, mask_layout, causal, window, scale, softcap, dropout_p, deterministic, precision, backend)
    in_order = torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic is True
    with limited(programs):
        whole = at_once(Packed(packed, said, starts_q, starts_k, own_rows, in_order), ranks, method, order)
    if whole is not None:
        return whole if return_lse else whole[0]
    seed = seed_of_all(seed_tensor(dropout_seed, q.device), dropout_seed is None, ranks) if dropout_p else None
    options = Options(causal, window, scale, softcap, dropout_p, deterministic, "bshd", precision, backend)
    outs, lses, heads = [], [], q.shape[1]
    for number, (M, N, q0, k0, q1, k1) in enumerate(spans):
        if M == 0:
            continue
        mine = [_of_document(name, x, layout, own, number, len(spans), (q0, q1), (starts_k[number], N)) for name, x, layout, own in (
            ("bias", first, bias_layout, own_rows[0]), ("bias[1]", second, bias_layout, own_rows[1]),
            ("mask", mask, mask_layout, own_rows[2]),
        )]  # fmt: skip
        slopes = alibi_slopes[number] if isinstance(alibi_slopes, Tensor) and alibi_slopes.dim() == 2 else alibi_slopes
        given = Given(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], mine[0], mine[2], None, slopes, sink, seed, mine[1])
        out, lse = attend_part(given, options, True, ranks, method, order, (M, N), head_chunks, programs, number, own_rows)
        outs.append(out[0])
        lses.append(lse[0])
    if not outs:  # nothing, whose gradients are 0
        nothing = q.sum() + k.sum() + v.sum()
        out, lse = nothing.expand(0, heads, v.shape[2]), nothing.to(wide(q.dtype)).expand(heads, 0)
    else:
        out, lse = torch.cat(outs), torch.cat(lses, 1)
    return (out, lse) if return_lse else out


def _summary(offsets: Any) -> Any:
    """Documents, for :func:`~.agree.agree`: in full where they are few."""
    if not isinstance(offsets, Tensor) or offsets.dim() != 1 or not len(offsets):
        return offsets
    try:
        starts: list[int] = offsets.tolist()
    except RuntimeError:  # meta tensors, those of a transform
        return offsets
    if len(starts) <= 9:
        return f"offsets {starts}"
    return f"offsets of {len(starts) - 1} documents and {starts[-1]} rows (CRC {zlib.crc32(repr(starts).encode()):08x})"


def _apart(x: Any, layout: str) -> Any:
    """A bias, a mask or, layout ``"q"``, rows of q, k or v for :func:`~.agree.agree`, which may differ in number."""
    at = {"q": 0, "rows": 1, "padded": 2}.get(layout)
    return x if at is None or not isinstance(x, Tensor) or x.is_nested or x.dim() <= at else rows_apart(x, at, x.shape[at])


def _own_rows(extras: tuple[tuple[Any, str], ...], starts: list[int], ranks: Group, order: str) -> tuple[bool, bool, bool]:
    """Of bias, second bias and mask: whether a row of a document is a rank's own. That of the layout "padded" is unless a rank that holds
    more than one row of some document has a single one.
    """
    longest = [max((share(b - a, ranks.size, r, order) for a, b in pairwise(starts)), default=0) for r in range(ranks.size)]
    rows = [x.shape[2] if isinstance(x, Tensor) and x.dim() == 4 else -1 for x, _ in extras]
    told = [rows] * ranks.size
    unsure = any(layout == "padded" and own >= 0 for own, (_, layout) in zip(rows, extras, strict=True))
    if unsure and max(longest) > 1 and min(longest) <= 1:  # some rank cannot tell; all ranks know that
        told = exchange_numbers(rows, ranks, next(x.device for x, _ in extras if isinstance(x, Tensor)))
    found = []
    for n, (_, layout) in enumerate(extras):
        shared = any(each[n] == 1 and own > 1 for each, own in zip(told, longest, strict=True))
        found.append(layout == "rows" or (layout == "padded" and not shared))
    return found[0], found[1], found[2]


def _starts(name: str, offsets: Any, count: int | None) -> list[int]:
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        raise bad_type(name, "an int32 or int64 tensor", str(offsets.dtype) if isinstance(offsets, Tensor) else type(offsets).__name__)
    if offsets.dim() != 1 or offsets.shape[0] < 1 or (count is not None and offsets.shape[0] != count):
        wanted = "one number more than documents" if count is None else f"as many as cu_seqlens_q, shape ({count},)"
        raise bad_value(name, wanted, tuple(offsets.shape))
    values: list[int] = offsets.tolist()
    if values[0] != 0 or any(b < a for a, b in pairwise(values)):
        raise bad_value(name, "offsets that begin with 0 and do not decrease", values[:8])
    return values


def _of_document(
    name: str, x: Any, layout: str, own: bool, number: int, count: int, rows: tuple[int, int], keys: tuple[int, int]
) -> Tensor | None:  # fmt: skip
    """A document's part of a bias or mask: ``(heads, my rows, its keys)``. own: a single row is this rank's, of some document."""
    if x is None:
        return None
    if not isinstance(x, Tensor):
        raise bad_type(name, "a tensor or None", type(x).__name__)
    dims = {"padded": 4, "rows": 3, "keys": 2}[layout]
    if x.dim() != dims:
        raise bad_value(name, f"{dims} dims, the layout {layout!r}", tuple(x.shape))
    (q0, q1), (k0, length) = rows, keys
    if layout == "keys":
        return x[:, None, k0 : k0 + length]
    if layout == "padded":
        if x.shape[0] not in (1, count):
            raise bad_value(name, f"1 or {count} documents in dim 0", tuple(x.shape))
        x = x[number if x.shape[0] > 1 else 0]
        q0, q1 = 0, q1 - q0
    if (x.shape[1] != 1 and x.shape[1] < q1) or (x.shape[2] != 1 and x.shape[2] < length):
        raise bad_value(name, f"1 or at least {q1} rows and 1 or at least {length} keys, document {number}", tuple(x.shape[1:]))
    if own or x.shape[1] != 1:
        x = x[:, q0:q1]
    return x[..., :length] if x.shape[2] != 1 else x
