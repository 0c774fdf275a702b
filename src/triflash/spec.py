"""One attention problem as plain numbers: no tensors, hashable, canonical. Built by ``ops.py``; read by ``plan/`` and ``launch/``.

Options are folded here, once. Causal attention and windows are a :class:`Band` about a diagonal; of one sequence, as all are that are not
packed, that becomes ``lo <= j - i <= hi``, so kernels know two optional integers instead of a list of features.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import bad_type, bad_value
from .lengths import FARTHEST

__all__ = [
    "DTYPE_NAMES",
    "AttentionSpec",
    "Band",
    "BiasSpec",
    "Gradients",
    "Needs",
    "LAYOUTS",
    "Operands",
    "Packed",
    "Saved",
    "keeps_rest",
    "packed_spec_of",
    "resolve_precision",
    "spec_of",
]

LAYOUTS = ("padded", "rows", "keys")  # of a bias or mask of packed sequences

DTYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "bool",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_FLOATS = tuple(dtype for dtype in DTYPE_NAMES if dtype.is_floating_point)
_EXTRAS = ("key_lengths", "alibi_slopes", "sink", "dropout_seed", "query_starts", "query_lengths", "key_starts", "diagonal")
PLACES = {2: "", 6: "any", 7: "aligned"}  # of dropout, by the length of its seed
SMALL_CAP = 500.0  # scores up to here leave a float32 lse its digits
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
PRECISIONS = ("ieee", "tf32", "tf32x3")
UNSET = "default"  # precision where nobody set one: the plan chooses for each kernel (plan/tables.py)


@dataclass(frozen=True)
class BiasSpec:
    """What a kernel must know about a bias: its dtype and along which of (outer batch, inner batch, head, query, key) it varies."""

    dtype: str
    varies: tuple[bool, bool, bool, bool, bool]

    @property
    def is_mask(self) -> bool:
        """A boolean bias is a mask: True means visible."""
        return self.dtype == "bool"

    def __str__(self) -> str:
        """The shorthand of the docs: a letter where the bias varies, 1 where it broadcasts, such as ``1hqk``."""
        outer, inner, head, query, key = self.varies
        batch = {(False, False): "1", (True, True): "b", (True, False): "b1", (False, True): "1b"}[outer, inner]
        return batch + "".join(letter if on else "1" for letter, on in zip("hqk", (head, query, key), strict=True))


@dataclass(frozen=True)
class Needs:
    """Which gradients a backward pass is asked for."""

    dq: bool
    dk: bool
    dv: bool
    dbias: bool
    dsink: bool = False
    dsecond: bool = False


class Operands(NamedTuple):
    """The tensors that attention is computed from, canonical (:func:`spec_of`). None: absent."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    key_lengths: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sink: Tensor | None = None
    dropout_seed: Tensor | None = None
    offsets_q: Tensor | None = None
    offsets_k: Tensor | None = None
    used_q: Tensor | None = None
    used_k: Tensor | None = None
    second_bias: Tensor | None = None
    query_starts: Tensor | None = None
    query_lengths: Tensor | None = None
    key_starts: Tensor | None = None
    diagonal: Tensor | None = None

    @property
    def dense(self) -> dict[str, Any]:
        """Those that a dense batch may have, by name."""
        return {name: x for name, x in self._asdict().items() if name not in ("offsets_q", "offsets_k", "used_q", "used_k")}


class Saved(NamedTuple):
    """What a forward pass fills and a backward pass reads: out ``(B, M, Hq, Dv)``, lse and, where it is kept, rest ``(B, Hq, M)``."""

    out: Tensor
    lse: Tensor
    rest: Tensor | None


class Gradients(NamedTuple):
    """What a backward pass fills, each in the shape of its operand. None: not wanted."""

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dbias: Tensor | None
    dsink: Tensor | None = None
    dsecond: Tensor | None = None

    @property
    def needs(self) -> Needs:
        return Needs(*(x is not None for x in self))


class Band(NamedTuple):
    """Which keys a query sees: those from ``left`` before the diagonal to ``right`` behind it; None leaves a side open.

    anchor: the diagonal is ``j = i + N - M``, so that the last query meets the last key ("bottom_right"), or ``j = i`` ("top_left").
    """

    left: int | None = None
    right: int | None = None
    anchor: str = "bottom_right"

    def offsets(self, queries: int, keys: int, diagonal: int | None = None) -> tuple[int | None, int | None]:
        """``(lo, hi)`` of the visible ``lo <= j - i <= hi`` in a sequence of so many queries and keys, about another diagonal than the
        anchor's if there is one.
        """
        if diagonal is None:
            diagonal = 0 if self.anchor == "top_left" else keys - queries
        return (None if self.left is None else diagonal - self.left, None if self.right is None else diagonal + self.right)


@dataclass(frozen=True)
class Packed:
    """What the host knows of sequences that are packed into one batch entry: not how long they are.

    sequences: how many. bottom_right: a sequence's diagonal meets its last query and last key, else its first ones.
    bias_layout, mask_layout: of :data:`LAYOUTS`. bias_sizes, second_sizes: sizes of the dims of queries and keys that a bias has for each
    sequence ("padded" ones, and the keys of "rows"); 1 for others. most_queries, most_keys: of a sequence, behind which bias or mask have
    none; None: they have all. longest_q, longest_k: what the caller says of the longest sequence, for the choice of tiles; None: nothing.
    """

    sequences: int
    bottom_right: bool = True
    bias_layout: str = "padded"
    mask_layout: str = "padded"
    bias_sizes: tuple[int, int] = (1, 1)
    second_sizes: tuple[int, int] = (1, 1)
    most_queries: int | None = None
    most_keys: int | None = None
    longest_q: int | None = None
    longest_k: int | None = None


@dataclass(frozen=True)
class AttentionSpec:
    """Sizes and options of one attention problem.

    ``batch_outer * batch_inner`` is the batch of q, k and v; a bias may broadcast over each of the two levels separately.
    ``lo`` and ``hi`` bound the visible offsets ``lo <= j - i <= hi`` of key j and query i; None leaves that side open. ``heads`` are those
    of the queries; ``groups`` of them read the same key head. A boolean mask without a bias is ``bias``, of dtype bool; ``mask`` is one
    beside a bias, and ``second`` another bias beside it. ``key_lengths``, ``alibi``, ``sink``: whether there are such. ``softcap`` and
    ``dropout`` (a probability): 0 for none.
    ``dropout_place``: "" if tensors are the whole of what dropout numbers; "any" if they are a part whose place the seed tells, ``(6,)``
    numbers of :func:`triflash.dropout.keep_mask`; "aligned" if its first query and key are multiples of 16 there, ``(7,)``.
    ``deterministic``: the backward pass must give the same bits every time. ``packed``: its one batch entry holds several sequences; then
    lo and hi count from a sequence's diagonal, and outer batch entries, to a bias, are sequences. ``query_starts``, ``query_lengths``,
    ``key_starts``: whether each batch entry has such. ``diagonal``: whether each has one of its own, from which lo and hi count. ``shift``:
    the diagonal that ALiBi counts from, if it is not N - M.
    """

    dtype: str
    batch_outer: int
    batch_inner: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    value_dim: int
    bias: BiasSpec | None
    lo: int | None
    hi: int | None
    scale: float
    precision: str
    groups: int = 1
    mask: BiasSpec | None = None
    key_lengths: bool = False
    alibi: bool = False
    sink: bool = False
    softcap: float = 0.0
    dropout: float = 0.0
    dropout_place: str = ""
    deterministic: bool = False
    packed: Packed | None = None
    second: BiasSpec | None = None
    query_starts: bool = False
    query_lengths: bool = False
    key_starts: bool = False
    diagonal: bool = False
    shift: int | None = None

    @property
    def tensor_dtype(self) -> torch.dtype:
        """PyTorch's name of the dtype of q, k and v."""
        return _DTYPES[self.dtype]

    @functools.cached_property
    def batch(self) -> int:
        return self.batch_outer * self.batch_inner

    @property
    def kv_heads(self) -> int:
        return self.heads // self.groups

    @property
    def extras(self) -> tuple[str, ...]:
        """What there is beyond q, k, v, one bias or mask and a band, in words."""
        named = {
            f"{self.heads} query heads on {self.kv_heads} key heads": self.groups > 1,
            "a mask beside a bias": self.mask is not None,
            "a second bias": self.second is not None,
            "key lengths": self.key_lengths,
            "ALiBi slopes": self.alibi,
            "a sink": self.sink,
            "a soft cap": self.softcap > 0,
            "dropout": self.dropout > 0,
            "packed sequences": self.packed is not None,
            "query starts": self.query_starts,
            "query lengths": self.query_lengths,
            "key starts": self.key_starts,
            "a diagonal of each batch entry": self.diagonal,
            f"ALiBi from diagonal {self.shift}": self.shift is not None,
        }
        return tuple(name for name, there in named.items() if there)

    def __hash__(self) -> int:
        """Worked out once: making one plan asks for it a dozen times."""
        known: int | None = self.__dict__.get("_hash")
        if known is None:
            known = self.__dict__["_hash"] = hash(_numbers_of(self))
        return known

    def __getstate__(self) -> dict[str, Any]:
        """Without its hash, which is another in another process."""
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    @property
    def placed(self) -> bool:
        """Whether some queries may be no rows, or some first keys hidden."""
        return self.query_starts or self.query_lengths or self.key_starts

    @property
    def is_empty(self) -> bool:
        """No score to compute at all: outputs are empty, or every query sees no key."""
        return 0 in (self.batch, self.heads, self.queries, self.keys)

    @property
    def no_sequences(self) -> bool:
        """Packed rows that nobody owns: what has a number for each sequence, as ALiBi slopes may, has no memory at all."""
        return self.packed is not None and self.packed.sequences == 0

    @functools.cached_property
    def keeps_rest(self) -> bool:
        """Whether a forward pass keeps what a float32 lse lost of a huge one."""
        return keeps_rest(None if self.bias is None else _DTYPES[self.bias.dtype], self.alibi, self.softcap)


_numbers_of = operator.attrgetter(*(each.name for each in fields(AttentionSpec)))


def keeps_rest(bias: torch.dtype | None, alibi: bool = False, softcap: float = 0.0) -> bool:
    """Whether a forward pass with a bias of this dtype (None: no bias) keeps what lse lost of a huge one.

    It does, unless a soft cap keeps scores small to which nothing is added.
    """
    return alibi or (bias is not None and bias != torch.bool) or not 0 < softcap <= SMALL_CAP


def resolve_precision(precision: str) -> str:
    """The precision of float32 products: ``""`` follows PyTorch's setting for matrix products, anything else is checked and kept.

    Where nobody set one it is ``"default"``, which leaves the choice to the plan.
    """
    if not precision:
        setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # PyTorch 2.9 and up; the older switches set it too
        if setting is None:
            setting = "none" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        return {"tf32": "tf32", "none": UNSET}.get(setting, "ieee")
    if precision not in PRECISIONS and precision != UNSET:
        raise bad_value("precision", f"one of {', '.join(PRECISIONS)}", repr(precision))
    return precision


def spec_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    batch_inner: int,
    lo: int | None,
    hi: int | None,
    scale: float,
    precision: str,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    second_bias: Tensor | None = None,
    query_starts: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    diagonal: Tensor | None = None,
    shift: int | None = None,
    guarded: bool = True,
) -> AttentionSpec:
    """The spec of canonical tensors.

    q (B, M, Hq, D), k (B, N, Hk, D), v (B, N, Hk, Dv); biases and mask (B0|1, B1|1, Hq|1, M|1, N|1) with B1 = batch_inner, a mask without a
    bias being the bias; key_lengths, query_starts, query_lengths, key_starts and diagonal (B,), any integers; alibi_slopes (B|1, Hq) and
    sink (Hq,), any floats; dropout_seed int64 (2,), or of a part of a larger problem (6,) or (7,), contiguous. lo and hi count from
    diagonal, if there is one.

    The public faces have checked their arguments already, with better words; these few comparisons guard the kernels from whoever
    calls the operators directly. guarded: false, what is neither q, k, v nor a bias has been checked, and where all tensors are.
    """
    if not q.dim() == k.dim() == v.dim() == 4:
        raise bad_value("q, k, v", "4 dims each", f"{q.dim()}, {k.dim()} and {v.dim()}")
    if not -math.inf < scale < math.inf:
        raise bad_value("scale", "a finite number", scale)
    B, M, H, D = q.shape
    N, kv_heads, Dv = k.shape[1], k.shape[2], v.shape[3]
    if k.shape != (B, N, kv_heads, D) or v.shape != (B, N, kv_heads, Dv):
        wanted = f"shapes ({B}, N, {kv_heads}, {D}) and ({B}, N, {kv_heads}, Dv)"
        raise bad_value("k, v", wanted, f"{tuple(k.shape)} and {tuple(v.shape)}")
    if kv_heads != H and (kv_heads == 0 or H % kv_heads):
        raise bad_value("k, v", f"a number of heads that divides q's {H}", kv_heads)
    if batch_inner < 0 or (B if batch_inner == 0 else B % batch_inner):
        raise bad_value("batch_inner", f"a positive divisor of the batch {B}, or 0 for none", batch_inner)
    # Of an empty inner level nothing tells how many outer entries there are but what varies over them.
    outer = B // batch_inner if batch_inner else max([1, *(x.shape[0] for x in (bias, mask, second_bias) if x is not None)])
    if not (q.dtype == k.dtype == v.dtype):
        raise bad_type("k, v", f"q's dtype {q.dtype}", f"{k.dtype} and {v.dtype}")
    extras, places = (key_lengths, alibi_slopes, sink, dropout_seed), (query_starts, query_lengths, key_starts, diagonal)
    full = (outer, batch_inner, H, M, N)
    if guarded:
        others = (k, v, bias, mask, second_bias, *extras, *places)
        for name, x in zip(("k", "v", "bias", "mask", "second_bias", *_EXTRAS), others, strict=True):
            if x is not None and x.device != q.device:
                raise bad_value(name, f"q's device {q.device}", x.device)
        _check_extras(B, H, *extras, softcap, dropout_p)
        for name, x in zip(_EXTRAS[4:], places, strict=True):
            if x is not None and x.dtype not in INTEGERS:
                raise bad_type(name, "integers", x.dtype)
            if x is not None and tuple(x.shape) != (B,):
                raise bad_value(name, f"shape ({B},)", tuple(x.shape))
    if mask is not None and (mask.dtype != torch.bool or bias is None or bias.dtype == torch.bool):
        raise bad_type("mask", "a bool tensor beside a bias of numbers", f"{mask.dtype} beside {'none' if bias is None else bias.dtype}")
    if second_bias is not None and (bias is None or torch.bool in (bias.dtype, second_bias.dtype)):
        raise bad_type("second_bias", "numbers beside a bias of numbers", second_bias.dtype)
    if diagonal is None:
        # Bounds that hide nothing are open; kernels add the others to 32-bit positions, so those are kept near the sizes.
        lo = None if lo is None or lo <= 1 - M else min(lo, N)
        hi = None if hi is None or hi >= N - 1 else max(hi, -M)
        if shift is not None and not -FARTHEST <= shift <= FARTHEST:
            raise bad_value("diagonal", f"an integer within {FARTHEST}", shift)
    else:
        lo, hi = (None if x is None else max(-FARTHEST, min(x, FARTHEST)) for x in (lo, hi))
    moved = diagonal is not None and (lo is not None or hi is not None or alibi_slopes is not None)
    made = object.__new__(AttentionSpec)  # to set frozen fields one by one takes three times as long
    made.__dict__.update(
        dtype=_dtype_name("q", q),
        batch_outer=outer,
        batch_inner=batch_inner,
        queries=M,
        keys=N,
        heads=H,
        head_dim=D,
        value_dim=Dv,
        bias=_bias_spec("bias", bias, full),
        lo=lo,
        hi=hi,
        scale=float(scale),
        precision=resolve_precision(precision) if q.dtype == torch.float32 else "ieee",
        groups=H // kv_heads if H and kv_heads else 1,
        mask=_bias_spec("mask", mask, full),
        key_lengths=key_lengths is not None,
        alibi=alibi_slopes is not None,
        sink=sink is not None,
        softcap=float(softcap),
        dropout=float(dropout_p),
        dropout_place="" if dropout_seed is None else PLACES[dropout_seed.shape[0]],
        deterministic=deterministic,
        packed=None,
        second=_bias_spec("second_bias", second_bias, full),
        query_starts=query_starts is not None,
        query_lengths=query_lengths is not None,
        key_starts=key_starts is not None,
        diagonal=moved,
        shift=None if diagonal is not None or alibi_slopes is None or shift == N - M else shift,
    )
    return made


def packed_spec_of(
    x: Operands, left: int | None, right: int | None, bottom_right: bool, scale: float, precision: str, bias_layout: str,
    mask_layout: str, softcap: float = 0.0, dropout_p: float = 0.0, deterministic: bool = False,
    longest_q: int | None = None, longest_k: int | None = None,
) -> AttentionSpec:  # fmt: skip
    """The spec of packed sequences.

    q (1, Tq, Hq, D), k (1, Tk, Hk, D), v (1, Tk, Hk, Dv); offsets_q, offsets_k (B + 1,) int32 or int64; used_q, used_k (B,) integers.
    Bias and mask (B|1, 1, Hq|1, Mmax|1, Nmax|1) if "padded", (1, 1, Hq|1, Tq, Nmax|1) if "rows", (1, 1, Hq|1, 1, Tk) if "keys";
    alibi_slopes (B|1, Hq). The rest as of :func:`spec_of`.
    """
    offsets_q, offsets_k = x.offsets_q, x.offsets_k
    assert offsets_q is not None and offsets_k is not None
    B = offsets_q.shape[0] - 1
    for name, own, wanted, dtypes in (
        ("cu_seqlens_q", offsets_q, B + 1, INTEGERS[2:4]), ("cu_seqlens_k", offsets_k, B + 1, INTEGERS[2:4]),
        ("seqused_q", x.used_q, B, INTEGERS), ("seqused_k", x.used_k, B, INTEGERS),
    ):  # fmt: skip
        if own is None:
            continue
        if own.dtype not in dtypes:
            raise bad_type(name, "int32 or int64" if len(dtypes) == 2 else "integers", own.dtype)
        if B < 0 or tuple(own.shape) != (wanted,):
            raise bad_value(name, "one number more than sequences" if B < 0 else f"shape ({wanted},)", tuple(own.shape))
        if own.device != x.q.device:
            raise bad_value(name, f"q's device {x.q.device}", own.device)
    slopes = x.alibi_slopes
    dense = spec_of(
        x.q, x.k, x.v, None, 1, None, None, scale, precision, None, None, None if slopes is None or not B else slopes[:1], x.sink,
        x.dropout_seed, softcap, dropout_p, deterministic,
    )  # fmt: skip
    if dense.dropout_place:
        raise bad_value("dropout_seed", "(seed, offset) beside packed sequences", "the place of a part")
    if dense.batch != 1:
        raise bad_value("q", "packed sequences in one batch entry", dense.batch)
    if slopes is not None:
        _check_extras(B, dense.heads, None, slopes, None, None, 0.0, 0.0)
    bias = None if x.bias is None else _packed_bias_spec("bias", x.bias, dense, B, bias_layout)
    mask = None if x.mask is None else _packed_bias_spec("mask", x.mask, dense, B, mask_layout)
    most: list[int | None] = [None, None]
    for own, layout in ((x.bias, bias_layout), (x.second_bias, bias_layout), (x.mask, mask_layout)):
        if own is None or layout == "keys":
            continue
        for at, size in ((0, own.shape[3] if layout == "padded" else 1), (1, own.shape[4])):
            if size != 1 and size < (dense.queries, dense.keys)[at]:
                most[at] = min(size, size if most[at] is None else most[at])  # type: ignore[type-var]
    packed = Packed(
        B, bottom_right, bias_layout, mask_layout,
        _sizes_of(x.bias, bias_layout), _sizes_of(x.second_bias, bias_layout), most[0], most[1], longest_q, longest_k,
    )  # fmt: skip
    lo = None if left is None or left >= dense.keys + dense.queries else -left
    hi = None if right is None or right >= dense.keys + dense.queries else right
    second = None if x.second_bias is None else _packed_bias_spec("second_bias", x.second_bias, dense, B, bias_layout)
    shift = 0 if slopes is not None and not bottom_right else None
    return replace(dense, bias=bias, mask=mask, second=second, alibi=slopes is not None, lo=lo, hi=hi, packed=packed, shift=shift)


def _sizes_of(bias: Tensor | None, layout: str) -> tuple[int, int]:
    if bias is None or layout == "keys":
        return 1, 1
    return (bias.shape[3] if layout == "padded" else 1), bias.shape[4]


def _packed_bias_spec(name: str, bias: Tensor, spec: AttentionSpec, sequences: int, layout: str) -> BiasSpec:
    """A dim of size 1 is one that a bias shares."""
    B, _, H, M, N = shape = tuple(bias.shape)
    fits = {
        "padded": B in (1, sequences),
        "rows": B == 1 and spec.queries == M,
        "keys": B == 1 and M == 1 and spec.keys == N,
    }
    if layout not in fits:
        raise bad_value(f"{name}_layout", f"one of {', '.join(LAYOUTS)}", layout)
    if len(shape) != 5 or shape[1] != 1 or H not in (1, spec.heads) or not fits[layout]:
        raise bad_value(name, f"the shape of {layout!r} in 5 dims", shape)
    per_sequence = layout != "padded" or sequences == B
    return BiasSpec(_dtype_name(name, bias), (per_sequence, True, spec.heads == H, layout == "rows" or M != 1, layout == "keys" or N != 1))


def _bias_spec(name: str, bias: Tensor | None, full: tuple[int, ...]) -> BiasSpec | None:
    if bias is None:
        return None
    if bias.dim() != 5 or any(own not in (1, size) for own, size in zip(bias.shape, full, strict=True)):
        raise bad_value(name, f"5 dims that broadcast to {full}", tuple(bias.shape))
    # A size-1 problem dim counts as varying: there is nothing to reduce over.
    outer, inner, head, query, key = (own == size for own, size in zip(bias.shape, full, strict=True))
    return BiasSpec(_dtype_name(name, bias), (outer, inner, head, query, key))


def _check_extras(
    batch: int, heads: int, key_lengths: Tensor | None, alibi_slopes: Tensor | None, sink: Tensor | None,
    dropout_seed: Tensor | None, softcap: float, dropout_p: float,
) -> None:  # fmt: skip
    for name, x, dtypes, shapes in (
        ("key_lengths", key_lengths, INTEGERS, ((batch,),)),
        ("alibi_slopes", alibi_slopes, _FLOATS, ((1, heads), (batch, heads))),
        ("sink", sink, _FLOATS, ((heads,),)),
        ("dropout_seed", dropout_seed, (torch.int64,), ((2,), (6,), (7,))),
    ):
        if x is None:
            continue
        if x.dtype not in dtypes:
            raise bad_type(name, " or ".join(map(str, dtypes)), x.dtype)
        if tuple(x.shape) not in shapes:
            raise bad_value(name, f"shape {' or '.join(map(str, shapes))}", tuple(x.shape))
        if name == "dropout_seed" and not x.is_contiguous():
            raise bad_value(name, "a contiguous tensor", f"strides {x.stride()}")
    if not 0 <= softcap < math.inf:
        raise bad_value("softcap", "a finite number, 0 for none", softcap)
    if not 0 <= dropout_p < 1 or (dropout_p > 0) != (dropout_seed is not None):
        raise bad_value("dropout_p", "a number in [0, 1), with a dropout_seed unless it is 0", dropout_p)


def _dtype_name(name: str, tensor: Tensor) -> str:
    try:
        return DTYPE_NAMES[tensor.dtype]
    except KeyError:
        raise bad_type(name, f"one of {', '.join(DTYPE_NAMES.values())}", tensor.dtype) from None
