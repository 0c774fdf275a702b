"""Every check of a call's arguments, and every option folded: what comes out has one meaning each. Called by ``door.py`` and faces."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .checks import (
    check_bias,
    check_bool,
    check_dtype_and_place,
    check_heads,
    check_key_lengths,
    check_number,
    check_scale,
    check_seed,
    check_sink,
    check_slopes,
    check_tensors,
    refuse_foreign,
    same_device_and_dtype,
)
from .errors import bad_type, bad_value, unsupported
from .form import Form
from .lengths import FARTHEST
from .plan.select import check_backend, requested_backend
from .spec import LAYOUTS as PACKED_LAYOUTS
from .spec import Band, resolve_precision

__all__ = [
    "ATTENTION",
    "LAYOUTS",
    "SEED",
    "Checked",
    "CheckedVarlen",
    "Face",
    "Given",
    "Options",
    "VarlenGiven",
    "VarlenOptions",
    "argument",
    "band_of",
    "check_offsets",
    "check_places",
    "check_sequences",
    "checked",
    "checked_varlen",
    "two_biases",
]

LAYOUTS = ("bshd", "bhsd")


class Options(NamedTuple):
    """What a caller writes beside the tensors, as given. Code that torch.compile traces names all: it takes a default for an input."""

    causal: bool | str = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    deterministic: bool | None = None
    layout: str = "bshd"
    precision: str | None = None
    backend: str | None = None
    diagonal: int | None = None


class Given(NamedTuple):
    """The tensors of a call as given, in the order of :class:`~triflash.spec.Operands`: packed ones in place of their first part."""

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None = None
    mask: Tensor | None = None
    key_lengths: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sink: Tensor | None = None
    dropout_seed: int | Tensor | None = None
    second_bias: Tensor | None = None
    query_starts: Tensor | None = None
    query_lengths: Tensor | None = None
    key_starts: Tensor | None = None
    diagonals: Tensor | None = None  # diagonal, where it is a tensor


def argument(field: str) -> str:
    """What a caller calls a field of :class:`Given` or :class:`VarlenGiven`."""
    return _ARGUMENTS.get(field, field)


_ARGUMENTS = {"second_bias": "bias[1]", "diagonals": "diagonal"}


def two_biases(bias: Any) -> tuple[Any, Any]:
    """A bias, or up to two in a tuple, as two; None: there is none."""
    if not isinstance(bias, (tuple, list)):
        return bias, None
    given = [x for x in bias if x is not None]
    if len(given) > 2:
        raise bad_value("bias", "a tensor, or a tuple of up to two", f"{len(given)} of them", "add up those that vary over least")
    for n, x in enumerate(given):
        if isinstance(x, Tensor) and x.dtype == torch.bool:
            raise bad_type(f"bias[{n}]", "numbers, in a tuple of biases", x.dtype, "pass it as mask=")
    return (*given, None, None)[:2]


@dataclass(frozen=True)
class Face:
    """A public function's own words: the dims of the tensors that hold q, k and v (None: those of :func:`triflash.attention`, with any
    batch dims and grouped heads), and what it calls the scale. name: tells faces apart.
    """

    name: str
    shapes: tuple[tuple[str, str], ...] | None = None
    scale: str = "scale"

    @property
    def tensors(self) -> int:
        return 3 if self.shapes is None else len(self.shapes)


ATTENTION = Face("attention")
# The seed's functions, by the number of tensors that hold q, k and v.
SEED = {
    3: Face("seed 3", (("q", "B M H D"), ("k", "B N H D"), ("v", "B N H D")), "softmax_scale"),
    2: Face("seed 2", (("q", "B M H D"), ("kv", "B N 2 H D")), "softmax_scale"),
    1: Face("seed 1", (("qkv", "B M 3 H D"),), "softmax_scale"),
}


class Checked(NamedTuple):
    """One call, checked: the layout of its tensors and its options, folded. lo, hi: of its band, see :class:`~triflash.spec.Band`; from
    the diagonal of a batch entry, if that is a tensor. shift: the diagonal to ALiBi, if one is given.
    """

    form: Form
    lo: int | None
    hi: int | None
    scale: float
    softcap: float
    dropout_p: float
    deterministic: bool
    precision: str
    backend: str
    shift: int | None = None


def checked(face: Face, given: Given, options: Options) -> Checked:
    """The errors of a public function, or its call in one canonical meaning."""
    causal, window, scale, softcap, dropout_p, deterministic, layout, precision, backend, diagonal = options
    if not torch.compiler.is_compiling():
        for name, x in zip(Given._fields, given, strict=True):
            if x is not None:
                refuse_foreign(argument(name), x)
    q, k, v, bias, mask, lengths, slopes, sink, seed, second, query_starts, query_lengths, key_starts, diagonals = given
    if layout not in LAYOUTS:
        raise bad_value("layout", f"one of {', '.join(LAYOUTS)}", repr(layout))
    if face.shapes is not None:
        names = {name: x for (name, _), x in zip(face.shapes, given, strict=False)}
        sizes = check_tensors(names, dict(face.shapes))
        same_device_and_dtype(names)  # type: ignore[arg-type]
        batch: tuple[int, ...] = (sizes["B"],)
    else:
        if layout == "bhsd":
            q, k, v = (_swapped(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
        batch, sizes = _check_inputs(q, k, v)
    M, N, H = sizes["M"], sizes.get("N", sizes["M"]), sizes["H"]
    softmax_scale = check_scale(face.scale, scale, sizes["D"])
    _check_diagonal(diagonal, diagonals, causal)
    lo, hi = band_of(causal, window).offsets(M, N, diagonal if diagonals is None else 0)
    _check_bias_and_mask(q, bias, mask, (*batch, H, M, N))
    check_bias(second, q, (*batch, H, M, N), "bias[1]")
    cap = 0.0 if softcap is None else check_number("softcap", softcap, 0.0, math.inf, "a positive number, or None (or 0) for none")
    if not (lengths is query_starts is query_lengths is key_starts is diagonals is None):
        for name, x in (
            ("key_lengths", lengths), ("query_starts", query_starts), ("query_lengths", query_lengths), ("key_starts", key_starts),
            ("diagonal", diagonals),
        ):  # fmt: skip
            check_key_lengths(x, q, batch, name)
    check_slopes(slopes, q, batch, H)
    check_sink(sink, q, H)
    chance = check_number("dropout_p", dropout_p, 0.0, 1.0, "a number from 0 up to but not including 1")
    check_seed(seed, q)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    check_bool("deterministic", deterministic)
    if backend is not None:
        check_backend("backend", backend)
    if precision is not None:
        resolve_precision(precision)
    elif q.dtype == torch.float32 and not torch.compiler.is_compiling():
        precision = resolve_precision("")  # now, so that a backward pass multiplies as its forward pass did
    form = Form(batch, _split(bias, mask, second, batch), layout == "bhsd", face.tensors, contiguous=face.shapes is not None)
    shift = None if slopes is None else 0 if causal == "top_left" else diagonal
    return Checked(form, lo, hi, softmax_scale, cap, chance, deterministic, precision or "", backend or requested_backend(), shift)


def _check_diagonal(diagonal: Any, diagonals: Tensor | None, causal: Any) -> None:
    """Check where queries stand, if somebody says so."""
    if diagonal is None and diagonals is None:
        return
    if causal == "top_left":
        raise bad_value("diagonal", "None beside causal='top_left', which is diagonal 0", "one", "pass causal=True")
    if diagonal is not None:
        if isinstance(diagonal, bool) or not isinstance(diagonal, (int, torch.SymInt)):
            raise bad_type("diagonal", "an int, a tensor of integers, or None", type(diagonal).__name__)
        if not -FARTHEST <= diagonal <= FARTHEST:
            raise bad_value("diagonal", f"an int from -{FARTHEST} to {FARTHEST}", diagonal)


class _Lengths(Protocol):
    @property
    def queries(self) -> int: ...
    @property
    def keys(self) -> int: ...


def check_places(given: Given, spec: _Lengths) -> None:
    """Look at the values of lengths, starts and diagonals, and name those that are out of range. Waits for the device."""
    most = {"key_lengths": spec.keys, "key_starts": spec.keys, "query_starts": spec.queries, "query_lengths": spec.queries}
    for name in (*most, "diagonals"):
        x, limit = getattr(given, name), most.get(name)
        least, limit = (-FARTHEST, FARTHEST) if limit is None else (0, limit)
        for entry, value in enumerate([] if x is None else x.flatten().tolist()):
            if not least <= value <= limit:
                wanted = f"values from {least} to {limit}"
                raise bad_value(argument(name), wanted, f"{value} of batch entry {entry}")


class VarlenOptions(NamedTuple):
    """What a caller of :func:`triflash.attention_varlen` writes beside the tensors, as given."""

    bias_layout: str = "padded"
    mask_layout: str | None = None
    causal: bool | str = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    deterministic: bool | None = None
    precision: str | None = None
    backend: str | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None


class VarlenGiven(NamedTuple):
    """The tensors of such a call as given, in the order of :class:`~triflash.ops_varlen.VarlenTensors`."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None
    alibi_slopes: Tensor | None
    sink: Tensor | None
    dropout_seed: int | Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    second_bias: Tensor | None = None


class CheckedVarlen(NamedTuple):
    """One such call, checked: its options, folded."""

    band: Band
    scale: float
    softcap: float
    dropout_p: float
    deterministic: bool
    precision: str
    backend: str
    bias_layout: str
    mask_layout: str
    longest_q: int | None
    longest_k: int | None


def checked_varlen(given: VarlenGiven, options: VarlenOptions) -> CheckedVarlen:
    """The errors of :func:`triflash.attention_varlen`, or its call in one canonical meaning. No offset is read."""
    bias_layout, mask_layout, causal, window, scale, softcap, dropout_p, deterministic, precision, backend, longest_q, longest_k = options
    if not torch.compiler.is_compiling():
        for name, x in zip(VarlenGiven._fields, given, strict=True):
            refuse_foreign(argument(name), x)
    q, k, v = given[:3]
    sizes = check_tensors({"q": q, "k": k, "v": v}, {"q": "Tq H D", "k": "Tk Hk D", "v": "Tk Hk Dv"})
    H, Hk = sizes["H"], sizes["Hk"]
    check_heads("k", Hk, H)
    same_device_and_dtype({"q": q, "k": k, "v": v})
    count = check_offsets("cu_seqlens_q", given.cu_seqlens_q, q, None)
    check_offsets("cu_seqlens_k", given.cu_seqlens_k, q, count)
    for name, used in (("seqused_q", given.seqused_q), ("seqused_k", given.seqused_k)):
        check_key_lengths(used, q, (count,), name)
    if mask_layout is None:
        mask_layout = bias_layout
    for name, layout in (("bias_layout", bias_layout), ("mask_layout", mask_layout)):
        if layout not in PACKED_LAYOUTS:
            raise bad_value(name, f"one of {', '.join(PACKED_LAYOUTS)}, or None for bias_layout's" if name[0] == "m" else
                            f"one of {', '.join(PACKED_LAYOUTS)}", repr(layout))  # fmt: skip
    _check_packed("bias", given.bias, q, k, count, bias_layout)
    _check_packed("bias[1]", given.second_bias, q, k, count, bias_layout)
    _check_packed("mask", given.mask, q, k, count, mask_layout)
    _check_kinds(given.bias, given.mask)
    for name, longest in (("max_seqlen_q", longest_q), ("max_seqlen_k", longest_k)):
        if longest is not None and (isinstance(longest, bool) or not isinstance(longest, (int, torch.SymInt)) or longest < 0):
            raise bad_type(name, "an integer from 0 up, or None", repr(longest))
    cap = 0.0 if softcap is None else check_number("softcap", softcap, 0.0, math.inf, "a positive number, or None (or 0) for none")
    check_slopes(given.alibi_slopes, q, (count,), H)
    check_sink(given.sink, q, H)
    chance = check_number("dropout_p", dropout_p, 0.0, 1.0, "a number from 0 up to but not including 1")
    check_seed(given.dropout_seed, q)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    check_bool("deterministic", deterministic)
    if backend is not None:
        check_backend("backend", backend)
    if precision is not None:
        resolve_precision(precision)
    elif q.dtype == torch.float32 and not torch.compiler.is_compiling():
        precision = resolve_precision("")
    return CheckedVarlen(
        band_of(causal, window), check_scale("scale", scale, sizes["D"]), cap, chance, deterministic, precision or "",
        backend or requested_backend(), bias_layout, mask_layout, longest_q, longest_k,
    )  # fmt: skip


def check_sequences(given: VarlenGiven, options: VarlenOptions) -> None:
    """For ``TRIFLASH_CHECK=1``: read the offsets, waiting for the device, and name what is wrong with them."""
    checked_varlen(given, options)
    if given.q.device.type == "meta":
        return
    lengths = []
    for name, offsets, used, rows in (
        ("cu_seqlens_q", given.cu_seqlens_q, given.seqused_q, given.q.shape[0]),
        ("cu_seqlens_k", given.cu_seqlens_k, given.seqused_k, given.k.shape[0]),
    ):
        values = offsets.tolist()
        if values[0] != 0 and used is None:  # else rows between sequences are what the caller means
            raise bad_value(name, "0 as the first offset", values[0])
        own = [end - start for start, end in pairwise(values)]
        if min(own, default=0) < 0:
            at = next(n for n, length in enumerate(own) if length < 0)
            raise bad_value(name, "offsets that do not decrease", f"{values[at]} before {values[at + 1]}, sequence {at}")
        if values[-1] > rows:
            raise bad_value(name, f"offsets up to the {rows} rows", values[-1])
        counted = own if used is None else used.tolist()
        for at, (length, some) in enumerate(zip(own, counted, strict=True)):
            if not 0 <= some <= length:
                raise bad_value(name.replace("cu_seqlens", "seqused"), f"0 to the {length} rows of sequence {at}", some)
        lengths.append(max(counted, default=0))
    for name, x, layout in (
        ("bias", given.bias, options.bias_layout), ("bias[1]", given.second_bias, options.bias_layout),
        ("mask", given.mask, options.mask_layout or options.bias_layout),
    ):  # fmt: skip
        if x is None or layout == "keys":
            continue
        for dim, longest in ((-2, lengths[0]), (-1, lengths[1])):
            if (dim == -1 or layout == "padded") and x.shape[dim] not in (1,) and x.shape[dim] < longest:
                raise bad_value(name, f"{longest} or more in dim {dim}, the longest sequence", tuple(x.shape))


def check_offsets(name: str, offsets: Any, q: Tensor, count: int | None) -> int:
    """Check offsets of sequences (their values are never looked at) and return how many sequences there are."""
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        raise bad_type(name, "an int32 or int64 tensor", str(offsets.dtype) if isinstance(offsets, Tensor) else type(offsets).__name__)
    if offsets.dim() != 1 or offsets.shape[0] < 1 or (count is not None and offsets.shape[0] != count + 1):
        wanted = "one number more than sequences, shape (B + 1,)"
        if count is not None:
            as_many = "one number more than requests" if name == "cu_seqlens_new" else "as many as cu_seqlens_q"
            wanted = f"{as_many}, shape ({count + 1},)"
        raise bad_value(name, wanted, tuple(offsets.shape))
    if offsets.device != q.device:
        raise bad_value(name, f"q's device {q.device}, or the CPU", offsets.device)
    return offsets.shape[0] - 1


def _check_packed(name: str, x: Any, q: Tensor, k: Tensor, count: int, layout: str) -> None:
    """Check a bias or mask of packed sequences."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise bad_type(name, "a tensor or None", type(x).__name__)
    (Tq, H, _), Tk = q.shape, k.shape[0]
    dims = {"padded": ((1, count), (1, H), None, None), "rows": ((1, H), (Tq,), None), "keys": ((1, H), (Tk,))}[layout]
    # While Dynamo traces, "in" finds no constant among symbolic sizes, and words would make the graph one of these sizes alone.
    if x.dim() != len(dims) or any(own is not None and all(size != each for each in own) for own, size in zip(dims, x.shape, strict=True)):
        words = {
            "padded": f"(B={count}|1, H={H}|1, Mmax|1, Nmax|1)", "rows": f"(H={H}|1, Tq={Tq}, Nmax|1)", "keys": f"(H={H}|1, Tk={Tk})"
        }[layout]  # fmt: skip
        raise bad_value(name, f"{words}, the layout {layout!r}", tuple(x.shape), f"{name.removesuffix('[1]')}_layout= names another one")
    check_dtype_and_place(name, x, q)


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
    if not torch.compiler.is_compiling() and q.dim() == 4 and q.shape[3] and _fit(q.shape, k.shape, v.shape):
        B, M, heads, D = q.shape
        sizes = {"B": B, "M": M, "H": heads, "D": D, "N": k.shape[1], "Hk": k.shape[2], "Dv": v.shape[3]}
    else:
        levels = " ".join(f"B{n}" if q.dim() > 4 else "B" for n in range(q.dim() - 3))
        sizes = check_tensors(given, {"q": f"{levels} M H D", "k": f"{levels} N Hk D", "v": f"{levels} N Hk Dv"})
    H, Hk = sizes["H"], sizes["Hk"]
    check_heads("k", Hk, H)
    same_device_and_dtype(given)
    return tuple(q.shape[:-3]), sizes


def _fit(q: torch.Size, k: torch.Size, v: torch.Size) -> bool:
    """Whether tensors with one batch dim fit each other, told at once: most do, and of others :func:`check_tensors` says what is wrong."""
    return len(k) == len(v) == 4 and q[0] == k[0] == v[0] and k[1:3] == v[1:3] and q[3] == k[3]


def band_of(causal: Any, window: Any) -> Band:
    """Of causal and window together."""
    if causal != "top_left" and not isinstance(causal, bool):
        raise bad_type("causal", "True, False or 'top_left'", repr(causal))
    left = right = None
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise bad_type("window", "a pair (left, right) or None", repr(window))
        for side in window:
            if side is not None and (isinstance(side, bool) or not isinstance(side, (int, torch.SymInt))):
                raise bad_type("window", "two integers, None or -1 for an open side", repr(window))
            if side is not None and side < -1:
                raise bad_value("window", "integers from 0 up, None or -1 for an open side", repr(window))
        left, right = (None if side is None or side == -1 else side for side in window)
    return Band(left, 0 if causal else right, "top_left" if causal == "top_left" else "bottom_right")


def _check_bias_and_mask(q: Tensor, bias: Tensor | None, mask: Tensor | None, scores: tuple[int, ...]) -> None:
    """Check what is added to the scores and what hides some."""
    check_bias(bias, q, scores)
    check_bias(mask, q, scores, "mask")
    _check_kinds(bias, mask)


def _check_kinds(bias: Tensor | None, mask: Tensor | None) -> None:
    if mask is not None and bias is not None and bias.dtype == torch.bool:
        raise unsupported("two masks, one of them as the bias", "auto", "pass one: mask=bias & mask")


def _split(bias: Tensor | None, mask: Tensor | None, second: Tensor | None, batch: tuple[int, ...]) -> int:
    """How many batch dims are the outer of the two batch levels that kernels tell apart, so that biases and mask each vary, or do not, over
    all of a level.
    """
    if (bias is None and mask is None) or len(batch) == 1:
        return len(batch)
    given = {name: x for name, x in (("bias", bias), ("mask", mask), ("bias[1]", second)) if x is not None}
    wide = {name: x[(None,) * (len(batch) + 3 - x.dim())] for name, x in given.items()}
    # A batch dim of size 1 goes with either level.
    counted = [n for n, size in enumerate(batch) if size != 1]
    # Numbers, not truth values: those of symbolic sizes stay symbolic under torch.compile.
    flags = [tuple([1 if x.shape[n] > 1 else 0 for x in wide.values()]) for n in counted]
    changes = [n for n in range(1, len(flags)) if flags[n] != flags[n - 1]]
    if len(changes) > 1:
        raise unsupported(*_too_many_levels({name: [n for n in counted if x.shape[n] > 1] for name, x in wide.items()}, len(batch)))
    return counted[changes[0]] if changes else len(batch)


def _too_many_levels(varies: dict[str, list[int]], dims: int) -> tuple[str, str, str]:
    """The words of an UnsupportedError for biases and a mask whose batch dims do not fall into two levels."""
    if len(varies) == 1:
        ((name, own),) = varies.items()
        hint = f"permute the batch dims so that those of the {name} come first or last, or expand it over more of them"
        return f"a {name} that varies over batch dims {own} of {dims}, neither the first ones nor the last ones", "auto", hint
    words = " beside ".join(f"a {name} that varies over batch dims {own}" for name, own in varies.items())
    return (
        f"{words} of {dims}",
        "auto",
        "kernels tell two batch levels apart: permute the batch dims, or expand one of them over more",
    )
