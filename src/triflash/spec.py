"""One attention problem as plain numbers: no tensors, hashable, canonical. Built by ``ops.py``; read by ``plan/`` and ``launch/``.

Options are folded here, once. Causal attention (later: windows, lengths) becomes a *band* ``lo <= j - i <= hi`` of visible
key-minus-query offsets, so kernels know two optional integers instead of a list of features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .errors import bad_type, bad_value

__all__ = [
    "DTYPE_NAMES",
    "AttentionSpec",
    "BiasSpec",
    "Needs",
    "causal_band",
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


@dataclass(frozen=True)
class AttentionSpec:
    """Sizes and options of one attention problem.

    ``batch_outer * batch_inner`` is the batch of q, k and v; a bias may broadcast over each of the two levels separately.
    ``lo`` and ``hi`` bound the visible offsets ``lo <= j - i <= hi`` of key j and query i; None leaves that side open.
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
    deterministic: bool = False

    @property
    def batch(self) -> int:
        return self.batch_outer * self.batch_inner

    @property
    def is_empty(self) -> bool:
        """No score to compute at all: outputs are empty, or every query sees no key."""
        return 0 in (self.batch, self.heads, self.queries, self.keys)

    @property
    def keeps_rest(self) -> bool:
        """Whether a forward pass keeps what a float32 lse lost of a huge one."""
        return keeps_rest(_DTYPES[self.dtype], None if self.bias is None else _DTYPES[self.bias.dtype])


def keeps_rest(dtype: torch.dtype, bias: torch.dtype | None) -> bool:
    """Whether a forward pass of q, k, v and a bias (None: no bias) of these dtypes keeps what a float32 lse lost of a huge one.

    Scores are huge only by a bias; float64 has room for the logarithm beside any that matters.
    """
    return bias is not None and bias != torch.bool and dtype != torch.float64


def causal_band(causal: bool) -> tuple[int | None, int | None]:
    """``(lo, hi)`` of the seed's causal option: top-left aligned, key j is visible to query i when ``i >= j``."""
    return (None, 0) if causal else (None, None)


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
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    batch_inner: int,
    lo: int | None,
    hi: int | None,
    scale: float,
    precision: str,
) -> AttentionSpec:
    """The spec of canonical tensors: q (B, M, H, D), k (B, N, H, D), v (B, N, H, Dv), bias (B0|1, B1|1, H|1, M|1, N|1); B1 = batch_inner.

    The public faces have checked their arguments already, with better words; these few comparisons guard the kernels from whoever
    calls the operators directly.
    """
    if not q.dim() == k.dim() == v.dim() == 4:
        raise bad_value("q, k, v", "4 dims each", f"{q.dim()}, {k.dim()} and {v.dim()}")
    if not -math.inf < scale < math.inf:
        raise bad_value("scale", "a finite number", scale)
    B, M, H, D = q.shape
    N, Dv = k.shape[1], v.shape[3]
    if k.shape != (B, N, H, D) or v.shape != (B, N, H, Dv):
        raise bad_value("k, v", f"shapes ({B}, N, {H}, {D}) and ({B}, N, {H}, Dv)", f"{tuple(k.shape)} and {tuple(v.shape)}")
    if batch_inner < 1 or B % batch_inner:
        raise bad_value("batch_inner", f"a positive divisor of the batch {B}", batch_inner)
    if not (q.dtype == k.dtype == v.dtype):
        raise bad_type("k, v", f"q's dtype {q.dtype}", f"{k.dtype} and {v.dtype}")
    if not (q.device == k.device == v.device) or (bias is not None and bias.device != q.device):
        raise bad_value("k, v, bias", f"q's device {q.device}", [str(t.device) for t in (k, v, bias) if t is not None])
    bias_spec = None
    if bias is not None:
        full = (B // batch_inner, batch_inner, H, M, N)
        if bias.dim() != 5 or any(own not in (1, size) for own, size in zip(bias.shape, full, strict=True)):
            raise bad_value("bias", f"5 dims that broadcast to {full}", tuple(bias.shape))
        # A size-1 problem dim counts as varying: there is nothing to reduce over.
        varies = tuple(own == size for own, size in zip(bias.shape, full, strict=True))
        bias_spec = BiasSpec(_dtype_name("bias", bias), varies)  # type: ignore[arg-type]
    # Bounds that hide nothing are open; kernels add the others to 32-bit positions, so those are kept near the sizes.
    lo = None if lo is None or lo <= 1 - M else min(lo, N)
    hi = None if hi is None or hi >= N - 1 else max(hi, -M)
    precision = resolve_precision(precision) if q.dtype == torch.float32 else "ieee"
    return AttentionSpec(_dtype_name("q", q), B // batch_inner, batch_inner, M, N, H, D, Dv, bias_spec, lo, hi, float(scale), precision)


def check_saved(
    q: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    rest: torch.Tensor | None,
) -> None:
    """What a backward pass is given besides its inputs: dout and out (B, M, H, Dv) like q, lse, rest and dlse (B, H, M)."""
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


def check_gradients(
    inputs: dict[str, torch.Tensor | None], gradients: dict[str, torch.Tensor | None], saved: dict[str, torch.Tensor]
) -> None:
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


def _dtype_name(name: str, tensor: torch.Tensor) -> str:
    try:
        return DTYPE_NAMES[tensor.dtype]
    except KeyError:
        raise bad_type(name, f"one of {', '.join(DTYPE_NAMES.values())}", tensor.dtype) from None
