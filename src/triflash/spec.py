"""One attention problem as plain numbers: no tensors, hashable, canonical. Built by ``ops.py``; read by ``plan/`` and ``launch/``.

Options are folded here, once. Causal attention and windows are a :class:`Band` about a diagonal; of one sequence, as all are that are not
packed, that becomes ``lo <= j - i <= hi``, so kernels know two optional integers instead of a list of features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import bad_type, bad_value

__all__ = [
    "DTYPE_NAMES",
    "AttentionSpec",
    "Band",
    "BiasSpec",
    "Gradients",
    "Needs",
    "Operands",
    "Saved",
    "check_gradients",
    "check_saved",
    "keeps_rest",
    "resolve_precision",
    "spec_of",
]

DTYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "bool",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
SMALL_CAP = 500.0  # scores up to here leave a float32 lse its digits
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
PRECISIONS = ("ieee", "tf32", "tf32x3")


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

    def offsets(self, queries: int, keys: int) -> tuple[int | None, int | None]:
        """``(lo, hi)`` of the visible ``lo <= j - i <= hi`` in a sequence of so many queries and keys."""
        diagonal = 0 if self.anchor == "top_left" else keys - queries
        return (None if self.left is None else diagonal - self.left, None if self.right is None else diagonal + self.right)


@dataclass(frozen=True)
class AttentionSpec:
    """Sizes and options of one attention problem.

    ``batch_outer * batch_inner`` is the batch of q, k and v; a bias may broadcast over each of the two levels separately.
    ``lo`` and ``hi`` bound the visible offsets ``lo <= j - i <= hi`` of key j and query i; None leaves that side open. ``heads`` are those
    of the queries; ``groups`` of them read the same key head. A boolean mask without a bias is ``bias``, of dtype bool; ``mask`` is one
    beside a bias. ``key_lengths``, ``alibi``, ``sink``: whether there are such. ``softcap`` and ``dropout`` (a probability): 0 for none.
    ``deterministic``: the backward pass must give the same bits every time.
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
    deterministic: bool = False

    @property
    def tensor_dtype(self) -> torch.dtype:
        """PyTorch's name of the dtype of q, k and v."""
        return _DTYPES[self.dtype]

    @property
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
            "key lengths": self.key_lengths,
            "ALiBi slopes": self.alibi,
            "a sink": self.sink,
            "a soft cap": self.softcap > 0,
            "dropout": self.dropout > 0,
        }
        return tuple(name for name, there in named.items() if there)

    @property
    def is_empty(self) -> bool:
        """No score to compute at all: outputs are empty, or every query sees no key."""
        return 0 in (self.batch, self.heads, self.queries, self.keys)

    @property
    def keeps_rest(self) -> bool:
        """Whether a forward pass keeps what a float32 lse lost of a huge one."""
        return keeps_rest(None if self.bias is None else _DTYPES[self.bias.dtype], self.alibi, self.softcap)


def keeps_rest(bias: torch.dtype | None, alibi: bool = False, softcap: float = 0.0) -> bool:
    """Whether a forward pass with a bias of this dtype (None: no bias) keeps what lse lost of a huge one.

    It does, unless a soft cap keeps scores small to which nothing is added.
    """
    return alibi or (bias is not None and bias != torch.bool) or not 0 < softcap <= SMALL_CAP


def resolve_precision(precision: str) -> str:
    """The precision of float32 products: ``""`` follows PyTorch's setting for matrix products, anything else is checked and kept."""
    if not precision:
        setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # PyTorch 2.9 and up; the older switches set it too
        if setting is None:
            setting = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        return "tf32" if setting == "tf32" else "ieee"
    if precision not in PRECISIONS:
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
) -> AttentionSpec:
    """The spec of canonical tensors.

    q (B, M, Hq, D), k (B, N, Hk, D), v (B, N, Hk, Dv); bias and mask (B0|1, B1|1, Hq|1, M|1, N|1) with B1 = batch_inner, a mask without a
    bias being the bias; key_lengths (B,), any integers; alibi_slopes (B|1, Hq) and sink (Hq,), any floats; dropout_seed int64 (2,),
    contiguous.

    The public faces have checked their arguments already, with better words; these few comparisons guard the kernels from whoever
    calls the operators directly.
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
    if batch_inner < 1 or B % batch_inner:
        raise bad_value("batch_inner", f"a positive divisor of the batch {B}", batch_inner)
    if not (q.dtype == k.dtype == v.dtype):
        raise bad_type("k, v", f"q's dtype {q.dtype}", f"{k.dtype} and {v.dtype}")
    given = Operands(q, k, v, bias, mask, key_lengths, alibi_slopes, sink, dropout_seed)._asdict()
    for name, x in given.items():
        if x is not None and x.device != q.device:
            raise bad_value(name, f"q's device {q.device}", x.device)
    full = (B // batch_inner, batch_inner, H, M, N)
    if mask is not None and (mask.dtype != torch.bool or bias is None or bias.dtype == torch.bool):
        raise bad_type("mask", "a bool tensor beside a bias of numbers", f"{mask.dtype} beside {'none' if bias is None else bias.dtype}")
    _check_extras(B, H, key_lengths, alibi_slopes, sink, dropout_seed, softcap, dropout_p)
    # Bounds that hide nothing are open; kernels add the others to 32-bit positions, so those are kept near the sizes.
    lo = None if lo is None or lo <= 1 - M else min(lo, N)
    hi = None if hi is None or hi >= N - 1 else max(hi, -M)
    return AttentionSpec(
        dtype=_dtype_name("q", q),
        batch_outer=B // batch_inner,
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
        groups=H // kv_heads if kv_heads else 1,
        mask=_bias_spec("mask", mask, full),
        key_lengths=key_lengths is not None,
        alibi=alibi_slopes is not None,
        sink=sink is not None,
        softcap=float(softcap),
        dropout=float(dropout_p),
        deterministic=deterministic,
    )


def _bias_spec(name: str, bias: Tensor | None, full: tuple[int, ...]) -> BiasSpec | None:
    if bias is None:
        return None
    if bias.dim() != 5 or any(own not in (1, size) for own, size in zip(bias.shape, full, strict=True)):
        raise bad_value(name, f"5 dims that broadcast to {full}", tuple(bias.shape))
    # A size-1 problem dim counts as varying: there is nothing to reduce over.
    outer, inner, head, query, key = (own == size for own, size in zip(bias.shape, full, strict=True))
    return BiasSpec(_dtype_name(name, bias), (outer, inner, head, query, key))


def _check_extras(
    batch: int,
    heads: int,
    key_lengths: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    dropout_seed: Tensor | None,
    softcap: float,
    dropout_p: float,
) -> None:
    floats = tuple(dtype for dtype in DTYPE_NAMES if dtype.is_floating_point)
    for name, x, dtypes, shapes in (
        ("key_lengths", key_lengths, INTEGERS, ((batch,),)),
        ("alibi_slopes", alibi_slopes, floats, ((1, heads), (batch, heads))),
        ("sink", sink, floats, ((heads,),)),
        ("dropout_seed", dropout_seed, (torch.int64,), ((2,),)),
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


def check_saved(q: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None, saved: Saved) -> None:
    """What a backward pass is given besides its inputs: dout and out (B, M, H, Dv) like q, lse, rest and dlse (B, H, M)."""
    out, lse, rest = saved
    B, M, H, _ = q.shape
    for name, tensor, shape in (
        ("dout", dout, (B, M, H, v.shape[3])),
        ("out", out, (B, M, H, v.shape[3])),
        ("lse", lse, (B, H, M)),
        ("rest", rest, (B, H, M)),
        ("dlse", dlse, (B, H, M)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise bad_value(name, f"shape {shape}", tuple(tensor.shape))
        if tensor.device != q.device:
            raise bad_value(name, f"q's device {q.device}", tensor.device)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    dtypes = (("dout", dout, q.dtype), ("out", out, q.dtype), ("lse", lse, lse_dtype), ("rest", rest, torch.float32))
    for name, tensor, dtype in dtypes:
        if tensor is not None and tensor.dtype != dtype:
            raise bad_type(name, str(dtype), tensor.dtype)


def check_gradients(inputs: dict[str, Tensor | None], gradients: dict[str, Tensor | None], saved: dict[str, Tensor]) -> None:
    """Tensors for gradients to be written to: each the shape, dtype and device of its input; any strides, but memory of its own."""
    for (name, x), (grad_name, grad) in zip(inputs.items(), gradients.items(), strict=True):
        if grad is None:
            continue
        if x is None or x.dtype == torch.bool:
            raise bad_value(
                grad_name, "None", "a tensor", f"there is no {name} to differentiate by" if x is None else "a mask has no gradient"
            )
        if grad.dtype != x.dtype:
            raise bad_type(grad_name, f"{name}'s dtype {x.dtype}", grad.dtype)
        if grad.shape != x.shape or grad.device != x.device:
            raise bad_value(grad_name, f"{name}'s shape {tuple(x.shape)} on {x.device}", f"{tuple(grad.shape)} on {grad.device}")
        if any(stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True)):
            raise bad_value(grad_name, "memory of its own for every element", "an expanded tensor (a stride of 0)")
    taken: dict[int, str] = {}
    for name, tensor in (*inputs.items(), *saved.items(), *gradients.items()):
        if tensor is None or not tensor.numel():
            continue
        if name in gradients and taken.get(tensor.data_ptr(), name) != name:
            raise bad_value(name, "memory of its own", f"that of {taken[tensor.data_ptr()]}", "kernels write it while they read the others")
        taken[tensor.data_ptr()] = name


def _dtype_name(name: str, tensor: Tensor) -> str:
    try:
        return DTYPE_NAMES[tensor.dtype]
    except KeyError:
        raise bad_type(name, f"one of {', '.join(DTYPE_NAMES.values())}", tensor.dtype) from None
