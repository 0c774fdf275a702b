"""FlashAttention-2's Python functions (flash_attn 2.8), by triflash: argument order, layouts, alignment and results as there.

Called by programs and, after :func:`install`, by ``import flash_attn``. docs/migration.md says what differs.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import torch
from torch import Tensor

from ..arguments import ATTENTION, Given, Options, VarlenGiven, VarlenOptions, checked, checked_varlen
from ..attention import attention
from ..checks import check_bool, check_tensors, same_device_and_dtype, seed_tensor
from ..errors import UnsupportedError, bad_type, bad_value
from ..ops import attention_backward_
from ..ops_checked import varlen_options
from ..ops_varlen import VarlenTensors, varlen_backward_
from ..varlen import attention_varlen, near
from .flash_attn_cache import flash_attn_with_kvcache
from .pages import attend_pages
from .words import renamed, unless_open

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "uninstall",
]

_PACKED_KV = {"k": "kv", "v": "kv"}
_PACKED = dict.fromkeys("qkv", "qkv")
_PAGED = {
    "offsets": "cu_seqlens_k", "k_cache": "k", "v_cache": "v", "page_table": "block_table", "window": "window_size",
    "scale": "softmax_scale",
}  # fmt: skip
VERSION = "2.8.3+triflash"  # what the module that install() makes calls itself


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``softmax(softmax_scale * q kᵀ) v`` with FlashAttention-2's arguments, by ``triflash.attention``.

    Args:
        q: ``(batch, seqlen_q, nheads, headdim)``; fp16, bf16, fp32, or fp64 on backend ``tiled``. Any head dim; any strides.
        k: ``(batch, seqlen_k, nheads_k, headdim)``; nheads is a multiple of nheads_k. v: likewise, with a head dim of its own.
        dropout_p: the probability with which a softmax probability is dropped.
        softmax_scale: default ``1 / sqrt(headdim)``.
        causal: query i sees the keys up to ``i + seqlen_k − seqlen_q`` (aligned to the bottom right).
        window_size: ``(left, right)``: the keys from ``i + seqlen_k − seqlen_q − left`` to ``… + right``; −1 leaves a side open.
        softcap: bounds the scaled products to ±softcap; 0 or less does not.
        alibi_slopes: ``(nheads,)`` or ``(batch, nheads)``: adds ``−slope * |i + seqlen_k − seqlen_q − j|``.
        deterministic: True asks for the same bits in every run; False leaves that to ``torch.are_deterministic_algorithms_enabled()``.
        return_attn_probs: also return the log-sum-exp, and None where FlashAttention has the probabilities.

    Returns:
        out ``(batch, seqlen_q, nheads, headdim)``, or ``(out, softmax_lse, None)`` with softmax_lse ``(batch, nheads, seqlen_q)`` in
        float32, which is differentiable here. A query that sees no key gets 0 and −inf (FlashAttention: 0 and +inf).

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or option. UnsupportedError: nothing here can compute it.
    """
    check_bool("return_attn_probs", return_attn_probs)
    try:
        result = attention(
            q, k, v, causal=check_bool("causal", causal), window=unless_open(window_size), scale=softmax_scale, softcap=_cap(softcap),
            alibi_slopes=alibi_slopes, dropout_p=dropout_p, deterministic=_same_bits(deterministic), return_lse=return_attn_probs,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise renamed(error, {"window": "window_size", "scale": "softmax_scale"}) from None
    return (*result, None) if return_attn_probs else result


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_func`` of k and v in one tensor, whose gradient is one tensor, too.

    Args:
        kv: ``(batch, seqlen_k, 2, nheads_k, headdim)``. All else, what is returned and what is raised: as of ``flash_attn_func``.
    """
    check_tensors({"kv": kv}, {"kv": "B N 2 Hk D"})
    k, v = kv.unbind(2)
    try:
        return flash_attn_func(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise renamed(error, _PACKED_KV) from None


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_func`` of q, k and v in one tensor, whose gradient is one tensor, too.

    Args:
        qkv: ``(batch, seqlen, 3, nheads, headdim)``. All else, what is returned and what is raised: as of ``flash_attn_func``.
    """
    check_tensors({"qkv": qkv}, {"qkv": "B M 3 H D"})
    q, k, v = qkv.unbind(2)
    try:
        return flash_attn_func(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise renamed(error, _PACKED) from None


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """``flash_attn_func`` of sequences packed one behind the other, by ``triflash.attention_varlen``.

    Args:
        q: ``(total_q, nheads, headdim)``. k, v: ``(total_k, nheads_k, headdim)``; v's head dim may be another.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 ``(batch + 1,)``: sequence b is rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.
        max_seqlen_q, max_seqlen_k: hints; results do not depend on them.
        block_table: int32 ``(batch, max_num_blocks_per_seq)``: k and v are pages ``(num_blocks, page_block_size, nheads_k, headdim)``
            of any size, cu_seqlens_k says how many keys a sequence has, max_seqlen_q must be no less than the longest, and there are
            neither gradients nor dropout. The rest as of ``flash_attn_func``, within each sequence.

    Returns:
        out ``(total_q, nheads, headdim)``, or ``(out, softmax_lse, None)`` with softmax_lse ``(nheads, total_q)``, float32, differentiable.
        Rows that no sequence owns get 0 and −inf.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or option. UnsupportedError: gradients or dropout beside ``block_table``.
    """
    check_bool("return_attn_probs", return_attn_probs)
    if block_table is not None:
        if dropout_p:
            raise UnsupportedError("dropout_p beside block_table: no cache has dropout; call it without a block_table")
        check_bool("deterministic", deterministic)
        paged = attend_pages(
            q, k, v, cu_seqlens_k, None, _PAGED, max_seqlen_q, return_attn_probs, page_table=block_table, cu_seqlens_q=cu_seqlens_q,
            causal=check_bool("causal", causal), window=window_size, scale=softmax_scale, softcap=_cap(softcap), alibi_slopes=alibi_slopes,
        )  # fmt: skip
        return (*paged, None) if return_attn_probs else paged
    try:
        result = attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=check_bool("causal", causal),
            window=unless_open(window_size), scale=softmax_scale, softcap=_cap(softcap), alibi_slopes=alibi_slopes, dropout_p=dropout_p,
            deterministic=_same_bits(deterministic), return_lse=return_attn_probs,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise renamed(error, {"window": "window_size", "scale": "softmax_scale"}) from None
    return (*result, None) if return_attn_probs else result


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_varlen_func`` of k and v in one tensor, whose gradient is one tensor, too.

    Args:
        kv: ``(total_k, 2, nheads_k, headdim)``. All else, what is returned and what is raised: as of ``flash_attn_varlen_func``.
    """
    check_tensors({"kv": kv}, {"kv": "Tk 2 Hk D"})
    k, v = kv.unbind(1)
    try:
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size, softcap,
            alibi_slopes, deterministic, return_attn_probs,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise renamed(error, _PACKED_KV) from None


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_varlen_func`` of q, k and v in one tensor, whose gradient is one tensor, too.

    Args:
        qkv: ``(total, 3, nheads, headdim)``. All else, what is returned and what is raised: as of ``flash_attn_varlen_func``.
    """
    check_tensors({"qkv": qkv}, {"qkv": "T 3 H D"})
    q, k, v = qkv.unbind(1)
    try:
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
            alibi_slopes, deterministic, return_attn_probs,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise renamed(error, _PACKED | {"cu_seqlens_q": "cu_seqlens", "max_seqlen_q": "max_seqlen"}) from None


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A forward pass without autograd, as packages that spread a sequence over GPUs call it. Arguments: :func:`flash_attn_func`.

    Returns:
        out, softmax_lse ``(batch, nheads, seqlen_q)``, S_dmask (always empty: nothing here keeps probabilities), and rng_state, int64
        ``(seed, offset)`` of dropout, to be handed to :func:`_flash_attn_backward`.
    """
    rng_state = seed_tensor(None if dropout_p else 0, q.device)
    with torch.no_grad():
        out, lse = attention(
            q, k, v, causal=check_bool("causal", causal), window=(window_size_left, window_size_right), scale=softmax_scale,
            softcap=_cap(softcap), alibi_slopes=alibi_slopes, dropout_p=dropout_p, dropout_seed=rng_state, return_lse=True,
        )  # fmt: skip
    return out, lse, q.new_empty(0), rng_state


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> None:
    """The backward pass of :func:`_flash_attn_forward` without autograd: fills dq, dk and dv; those that are None are not computed.

    Args:
        dout, out: ``(batch, seqlen_q, nheads, headdim)``. softmax_lse: ``(batch, nheads, seqlen_q)``, more rows go as well. Where out and
            softmax_lse are those over all keys, and k and v a part of them, the gradients are that part's share.
        dq, dk, dv: in the shapes and dtype of q, k and v; any strides; nothing beside their elements is touched.
        rng_state: as the forward pass returned it; needed where dropout_p is not 0.

    FlashAttention's returns the row sums of dout · out, which its callers drop; this returns None. A float32 lse has no room for the
    logarithm of a sum beside a huge maximum: where ``|lse|`` is beyond some 10⁴ gradients are off. Those of the functions above are right.
    """
    if dropout_p and rng_state is None:
        raise bad_value("rng_state", "what _flash_attn_forward returned, as dropout_p is not 0", None)
    given = Given(q, k, v, alibi_slopes=alibi_slopes, dropout_seed=rng_state if dropout_p else None)
    window = (window_size_left, window_size_right)
    options = Options(
        check_bool("causal", causal), window, softmax_scale, _cap(softcap), dropout_p, _same_bits(deterministic), "bshd", None, None
    )  # fmt: skip
    call = checked(ATTENTION, given, options)
    rows = {"q": "B M H D", "v": "B N Hk Dv", "dout": "B M H Dv", "out": "B M H Dv"}
    named = {"q": q, "v": v, "dout": dout, "out": out}
    check_tensors(named, rows)
    same_device_and_dtype(named)
    _check_lse(softmax_lse, q, "B M H D", "B H _", q.shape[1])
    x = call.form.operands((q, k, v, None, None, None, alibi_slopes, None, given.dropout_seed))  # type: ignore[arg-type]
    numbers = (call.form.inner, call.lo, call.hi, call.scale, call.precision, call.backend)
    more = (*x[4:9], call.softcap, call.dropout_p, call.deterministic)
    with torch.no_grad():
        attention_backward_(dout, None, *x[:4], out, softmax_lse[:, :, : q.shape[1]], None, *numbers, dq, dk, dv, None, *more)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`_flash_attn_forward` of packed sequences: softmax_lse is ``(nheads, total_q)``. Arguments: :func:`flash_attn_varlen_func`.

    Args:
        seqused_k: integers ``(batch,)``: how many of a sequence's keys count.
        block_table, leftpad_k: None; else an UnsupportedError.
        zero_tensors: makes no difference: rows that no sequence owns are 0 and −inf.
    """
    _no_pages(block_table)
    if leftpad_k is not None:
        raise UnsupportedError("leftpad_k: no keys of a packed sequence can be left out at its start; begin it later, by cu_seqlens_k")
    rng_state = seed_tensor(None if dropout_p else 0, q.device)
    with torch.no_grad():
        out, lse = attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k=seqused_k, causal=check_bool("causal", causal),
            window=(window_size_left, window_size_right), scale=softmax_scale, softcap=_cap(softcap), alibi_slopes=alibi_slopes,
            dropout_p=dropout_p, dropout_seed=rng_state, return_lse=True,
        )  # fmt: skip
    return out, lse, q.new_empty(0), rng_state


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> None:
    """:func:`_flash_attn_backward` of packed sequences: fills dq, dk and dv, with 0 in rows that no sequence owns.

    Args:
        dout, out: ``(total_q, nheads, headdim)``. softmax_lse: ``(nheads, total_q)``, more columns go as well. zero_tensors: makes no
            difference. The rest, and what is true of a large lse, as of :func:`_flash_attn_backward`.
    """
    if dropout_p and rng_state is None:
        raise bad_value("rng_state", "what _flash_attn_varlen_forward returned, as dropout_p is not 0", None)
    seed = rng_state if dropout_p else None
    cu_seqlens_q, cu_seqlens_k = near(q, "cu_seqlens_q", cu_seqlens_q), near(q, "cu_seqlens_k", cu_seqlens_k)
    given = VarlenGiven(q, k, v, None, None, alibi_slopes, None, seed, cu_seqlens_q, cu_seqlens_k, None, None)
    options = VarlenOptions(
        causal=check_bool("causal", causal), window=(window_size_left, window_size_right), scale=softmax_scale, softcap=_cap(softcap),
        dropout_p=dropout_p, deterministic=_same_bits(deterministic), max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    settled = checked_varlen(given, options)
    rows = {"q": "Tq H D", "v": "Tk Hk Dv", "dout": "Tq H Dv", "out": "Tq H Dv"}
    named = {"q": q, "v": v, "dout": dout, "out": out}
    check_tensors(named, rows)
    same_device_and_dtype(named)
    _check_lse(softmax_lse, q, "Tq H D", "H _", q.shape[0])
    with torch.no_grad():
        tensors = VarlenTensors(q, k, v, None, None, alibi_slopes, None, seed, cu_seqlens_q, cu_seqlens_k, None, None, None)
        varlen_backward_(dout, out, softmax_lse[:, : q.shape[0]], dq, dk, dv, *tensors, *varlen_options(settled))


def _check_lse(lse: Tensor, q: Tensor, dims: str, lse_dims: str, rows: int) -> None:
    """That lse fits q: as many heads and, in its last dim, as many rows or more."""
    check_tensors({"q": q, "softmax_lse": lse}, {"q": dims, "softmax_lse": lse_dims})
    if lse.shape[-1] < rows:
        raise bad_value("softmax_lse", f"at least {rows} rows", f"{lse.shape[-1]} rows")
    wanted = torch.float64 if q.dtype == torch.float64 else torch.float32
    if lse.dtype != wanted:
        raise bad_type("softmax_lse", str(wanted), lse.dtype)


def _no_pages(block_table: Tensor | None) -> None:
    if block_table is not None:
        raise UnsupportedError("block_table: no pages here; triflash.attention_with_kvcache takes them, with cu_seqlens_q too")


def _cap(softcap: float) -> float | None:
    """FlashAttention takes 0 and anything below for none."""
    return None if isinstance(softcap, (int, float)) and softcap <= 0 else softcap


def _same_bits(deterministic: bool) -> bool | None:
    """False is FlashAttention's default, not a wish: PyTorch's own setting still counts."""
    return True if check_bool("deterministic", deterministic) else None


def install() -> None:
    """Make ``import flash_attn`` give these functions, in this process, until ``uninstall``; what is absent here is absent there.

    For programs that import ``flash_attn`` or ``flash_attn.flash_attn_interface`` and use the functions of this module.
    ``flash_attn.__version__`` is ``"2.8.3+triflash"``. There is no installed distribution of that name, so whoever looks for one, as
    transformers does, goes on not finding FlashAttention.

    Raises:
        ImportError: a flash_attn that is not this one is installed or was imported.
    """
    present = sys.modules.get("flash_attn")
    if present is not None and getattr(present, "__version__", None) == VERSION:
        return
    if present is not None or importlib.util.find_spec("flash_attn") is not None:
        raise ImportError("flash_attn is installed: uninstall it, or import triflash.compat.flash_attn where its functions are to run here")
    package, interface = _module("flash_attn"), _module("flash_attn.flash_attn_interface")
    for name in __all__[:-2]:
        setattr(package, name, globals()[name])
        setattr(interface, name, globals()[name])
    for function in (_flash_attn_forward, _flash_attn_backward, _flash_attn_varlen_forward, _flash_attn_varlen_backward):
        setattr(interface, function.__name__, function)
        setattr(interface, f"_wrapped{function.__name__}", function)
    package.__path__ = []
    package.__dict__.update(__version__=VERSION, flash_attn_interface=interface)
    sys.modules.update({"flash_attn": package, "flash_attn.flash_attn_interface": interface})


def uninstall() -> None:
    """Undo ``install``; names that were imported meanwhile stay what they are. Does nothing where it was not called."""
    if getattr(sys.modules.get("flash_attn"), "__version__", None) == VERSION:
        for name in ("flash_attn", "flash_attn.flash_attn_interface"):
            sys.modules.pop(name, None)


def _module(name: str) -> types.ModuleType:
    """A module that says where it comes from, in error messages too."""
    module = types.ModuleType(name, "FlashAttention-2's functions by triflash: triflash.compat.flash_attn.install() put this here.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=__file__, is_package=name == "flash_attn")
    module.__file__ = __file__
    return module
