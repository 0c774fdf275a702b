"""From what a caller of ``attention`` writes to what the operators take: every check, and every option folded. Computes next to nothing."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import (
    check_bias,
    check_bool,
    check_number,
    check_scale,
    check_tensors,
    key_lengths_of,
    same_device_and_dtype,
    seed_of,
    sink_of,
    slopes_of,
)
from .errors import bad_type, bad_value, unsupported
from .plan.select import check_backend, requested_backend
from .spec import AttentionSpec, Operands, resolve_precision, spec_of

__all__ = ["LAYOUTS", "Arguments", "arguments_of"]

LAYOUTS = ("bshd", "bhsd")


class Arguments(NamedTuple):
    """One call of ``attention``, checked. ``batch``: the leading dims that ``operands`` have in one."""

    operands: Operands
    batch: tuple[int, ...]
    batch_inner: int
    lo: int | None
    hi: int | None
    scale: float
    precision: str
    backend: str
    softcap: float
    dropout_p: float
    deterministic: bool

    @property
    def for_operator(self) -> tuple[Any, ...]:
        """As ``torch.ops.triflash.forward`` takes them."""
        x = self.operands
        options = (self.batch_inner, self.lo, self.hi, self.scale, self.precision, self.backend)
        return (*x[:4], *options, *x[4:], self.softcap, self.dropout_p, self.deterministic)

    @property
    def spec(self) -> AttentionSpec:
        x = self.operands
        more: Any = (*x[4:], self.softcap, self.dropout_p, self.deterministic)
        return spec_of(*x[:4], self.batch_inner, self.lo, self.hi, self.scale, self.precision, *more)


def arguments_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
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
) -> Arguments:
    """The arguments of :func:`triflash.attention`, with its errors."""
    if layout not in LAYOUTS:
        raise bad_value("layout", f"one of {', '.join(LAYOUTS)}", repr(layout))
    if layout == "bhsd":
        q, k, v = (_swapped(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    batch, sizes = _check_inputs(q, k, v)
    M, N, H = sizes["M"], sizes["N"], sizes["H"]
    softmax_scale = check_scale("scale", scale, sizes["D"])
    lo, hi = _band(causal, window, M, N)
    scores = (*batch, H, M, N)
    bias, mask = _bias_and_mask(q, bias, mask, scores)
    cap = 0.0 if softcap is None else check_number("softcap", softcap, 0.0, math.inf, "a positive number, or None (or 0) for none")
    lengths = key_lengths_of(key_lengths, q, batch)
    slopes = slopes_of(alibi_slopes, q, batch, H)
    sink_of(sink, q, H)
    chance = check_number("dropout_p", dropout_p, 0.0, 1.0, "a number from 0 up to but not including 1")
    seed = seed_of(dropout_seed, q, chance)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    check_bool("deterministic", deterministic)
    if backend is not None:
        check_backend("backend", backend)
    if precision is not None:
        resolve_precision(precision)
    elif q.dtype == torch.float32 and not torch.compiler.is_compiling():
        precision = resolve_precision("")  # now, so that a backward pass multiplies as its forward pass did
    bias5, mask5, batch_inner = _two_levels(bias, mask, batch)
    if bias5 is None:  # one mask alone is one more kind of bias
        bias5, mask5 = mask5, None
    q, k, v = (x.reshape(math.prod(batch), *x.shape[-3:]) if len(batch) > 1 else x for x in (q, k, v))
    operands = Operands(q, k, v, bias5, mask5, lengths, slopes, sink, seed)
    return Arguments(
        operands, batch, batch_inner, lo, hi, softmax_scale, precision or "", backend or requested_backend(), cap, chance, deterministic
    )


def _swapped(name: str, x: Any) -> Tensor:
    """``(*batch, H, L, D)`` seen as ``(*batch, L, H, D)``."""
    if not isinstance(x, Tensor):
        raise bad_type(name, "a tensor", type(x).__name__)
    if x.dim() < 4:
        raise bad_value(name, "4 dims or more (*batch, heads, length, dim)", f"{x.dim()} dims {tuple(x.shape)}")
    return x.transpose(-3, -2)


def _check_inputs(q: Any, k: Any, v: Any) -> tuple[tuple[int, ...], dict[str, int]]:
    """The batch dims and the named sizes of q, k and v, which fit each other."""
    given = {"q": q, "k": k, "v": v}
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise bad_type(name, "a tensor", type(x).__name__)
        if x.dim() < 4:
            raise bad_value(name, "4 dims or more (*batch, length, heads, dim)", f"{x.dim()} dims {tuple(x.shape)}")
    levels = " ".join(f"B{n}" if q.dim() > 4 else "B" for n in range(q.dim() - 3))
    sizes = check_tensors(given, {"q": f"{levels} M H D", "k": f"{levels} N Hk D", "v": f"{levels} N Hk Dv"})
    H, Hk = sizes["H"], sizes["Hk"]
    if Hk != H and (Hk == 0 or H % Hk):
        raise bad_value("k", f"a number of heads that divides q's {H}", Hk, "as many query heads read each key head")
    same_device_and_dtype(given)
    return tuple(q.shape[:-3]), sizes


def _band(causal: Any, window: Any, M: int, N: int) -> tuple[int | None, int | None]:
    """Visible offsets ``lo <= j - i <= hi`` of causal and window together."""
    if causal != "top_left" and not isinstance(causal, bool):
        raise bad_type("causal", "True, False or 'top_left'", repr(causal))
    diagonal = 0 if causal == "top_left" else N - M
    lo, hi = None, diagonal if causal else None
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise bad_type("window", "a pair (left, right) or None", repr(window))
        for side in window:
            if side is not None and (isinstance(side, bool) or not isinstance(side, (int, torch.SymInt))):
                raise bad_type("window", "two integers, None or -1 for an open side", repr(window))
            if side is not None and side < -1:
                raise bad_value("window", "integers from 0 up, None or -1 for an open side", repr(window))
        left, right = (None if side is None or side == -1 else side for side in window)
        lo = None if left is None else diagonal - left
        if right is not None and not causal:
            hi = diagonal + right
    return lo, hi


def _bias_and_mask(q: Tensor, bias: Tensor | None, mask: Tensor | None, scores: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores and what hides some, checked; not yet of a canonical shape."""
    check_bias(bias, q, scores)
    check_bias(mask, q, scores, "mask")
    if mask is not None and mask.dtype != torch.bool:
        raise bad_type("mask", "a bool tensor, True = visible", mask.dtype, "a float one is a bias")
    if mask is not None and bias is not None and bias.dtype == torch.bool:
        raise unsupported("two masks, one of them as the bias", "auto", "pass one: mask=bias & mask")
    return bias, mask


def _two_levels(bias: Tensor | None, mask: Tensor | None, batch: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None, int]:
    """Bias and mask as the operators' five dims, and how many batch entries make the inner of their two batch levels.

    Neighbouring batch dims over which each of the two varies, or does not, are gathered in one level.
    """
    given = {name: x for name, x in (("bias", bias), ("mask", mask)) if x is not None}
    if not given:
        return None, None, 1
    wide = {name: x[(None,) * (len(batch) + 3 - x.dim())] for name, x in given.items()}
    # A batch dim of size 1 goes with either level.
    counted = [n for n, size in enumerate(batch) if size > 1]
    flags = [tuple(x.shape[n] > 1 for x in wide.values()) for n in counted]
    changes = [n for n in range(1, len(flags)) if flags[n] != flags[n - 1]]
    if len(changes) > 1:
        raise unsupported(*_too_many_levels({name: [n for n in counted if x.shape[n] > 1] for name, x in wide.items()}, len(batch)))
    split = counted[changes[0]] if changes else len(batch)
    inner = math.prod(batch[split:])
    five = {}
    for name, x in wide.items():
        five[name] = x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split : len(batch)]), *x.shape[-3:])
    return five.get("bias"), five.get("mask"), inner


def _too_many_levels(varies: dict[str, list[int]], dims: int) -> tuple[str, str, str]:
    """The words of an UnsupportedError for a bias, a mask or both whose batch dims do not fall into two levels."""
    if len(varies) == 1:
        ((name, own),) = varies.items()
        hint = f"permute the batch dims so that those of the {name} are neighbours, or expand it over the ones between"
        return f"a {name} that varies over batch dims {own} of {dims} and not over those between", "auto", hint
    words = " beside ".join(f"a {name} that varies over batch dims {own}" for name, own in varies.items())
    return (
        f"{words} of {dims}",
        "auto",
        "kernels tell two batch levels apart: permute the batch dims, or expand one of the two over more of them",
    )
