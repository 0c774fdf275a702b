"""FlashAttention-2's Python functions (flash_attn 2.8), by triflash: argument order, layouts, alignment and results as there.

Called by programs and, after :func:`install`, by ``import flash_attn``. What triflash does not have yet (``flash_attn_varlen_func`` and its
kin, ``flash_attn_with_kvcache``) is absent here, too. docs/migration.md says what differs.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import torch
from torch import Tensor

from ..arguments import ATTENTION, Given, Options, checked
from ..attention import attention
from ..checks import check_bool, check_tensors, same_device_and_dtype, seed_tensor
from ..errors import UnsupportedError, bad_type, bad_value
from ..ops import attention_backward_
from .words import renamed

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "install",
    "uninstall",
]

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
    """``softmax(softmax_scale * q kᵀ) v`` with FlashAttention-2's arguments, by :func:`triflash.attention`.

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
            q, k, v, causal=check_bool("causal", causal), window=window_size, scale=softmax_scale, softcap=_cap(softcap),
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
    """:func:`flash_attn_func` of k and v in one tensor, ``kv (batch, seqlen_k, 2, nheads_k, headdim)``; its gradient is one tensor, too."""
    check_tensors({"kv": kv}, {"kv": "B N 2 Hk D"})
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )  # fmt: skip


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
    """:func:`flash_attn_func` of q, k and v in one tensor, ``qkv (batch, seqlen, 3, nheads, headdim)``; its gradient is one tensor, too."""
    check_tensors({"qkv": qkv}, {"qkv": "B M 3 H D"})
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )  # fmt: skip


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
    check_tensors({"q": q, "softmax_lse": softmax_lse}, {"q": "B M H D", "softmax_lse": "B H _"})
    if softmax_lse.shape[2] < q.shape[1]:
        raise bad_value("softmax_lse", f"at least {q.shape[1]} rows", f"{softmax_lse.shape[2]} rows")
    wanted = torch.float64 if q.dtype == torch.float64 else torch.float32
    if softmax_lse.dtype != wanted:
        raise bad_type("softmax_lse", str(wanted), softmax_lse.dtype)
    x = call.form.operands((q, k, v, None, None, None, alibi_slopes, None, given.dropout_seed))  # type: ignore[arg-type]
    numbers = (call.form.inner, call.lo, call.hi, call.scale, call.precision, call.backend)
    more = (*x[4:9], call.softcap, call.dropout_p, call.deterministic)
    with torch.no_grad():
        attention_backward_(dout, None, *x[:4], out, softmax_lse[:, :, : q.shape[1]], None, *numbers, dq, dk, dv, None, *more)


def _cap(softcap: float) -> float | None:
    """FlashAttention takes 0 and anything below for none."""
    return None if isinstance(softcap, (int, float)) and softcap <= 0 else softcap


def _same_bits(deterministic: bool) -> bool | None:
    """False is FlashAttention's default, not a wish: PyTorch's own setting still counts."""
    return True if check_bool("deterministic", deterministic) else None


def _missing(name: str) -> Any:
    def missing(*_: Any, **__: Any) -> Any:
        raise UnsupportedError(
            f"{name}: triflash has no packed sequences (varlen) yet; pad the batch and pass key_lengths= to triflash.attention"
        )

    missing.__name__ = missing.__qualname__ = name
    return missing


def install() -> None:
    """Make ``import flash_attn`` give these functions, in this process, until :func:`uninstall`; what is absent here is absent there.

    For programs that import ``flash_attn`` or ``flash_attn.flash_attn_interface`` and use the functions of this module.
    ``flash_attn.__version__`` is ``"2.8.3+triflash"``. There is no installed distribution of that name, so whoever looks for one, as
    transformers does, goes on not finding FlashAttention. Ring packages import ``_flash_attn_varlen_forward`` and ``_backward`` even where
    they do not call them: those raise UnsupportedError when they are called.

    Raises:
        ImportError: a flash_attn that is not this one is installed or was imported.
    """
    present = sys.modules.get("flash_attn")
    if present is not None and getattr(present, "__version__", None) == VERSION:
        return
    if present is not None or importlib.util.find_spec("flash_attn") is not None:
        raise ImportError("flash_attn is installed: uninstall it, or import triflash.compat.flash_attn where its functions are to run here")
    package, interface = _module("flash_attn"), _module("flash_attn.flash_attn_interface")
    for name in ("flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"):
        setattr(package, name, globals()[name])
        setattr(interface, name, globals()[name])
    for name, function in (("_flash_attn_forward", _flash_attn_forward), ("_flash_attn_backward", _flash_attn_backward)):
        setattr(interface, name, function)
        setattr(interface, f"_wrapped{name}", function)
    for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
        setattr(interface, name, _missing(name))
    package.__path__ = []
    package.__dict__.update(__version__=VERSION, flash_attn_interface=interface)
    sys.modules.update({"flash_attn": package, "flash_attn.flash_attn_interface": interface})


def uninstall() -> None:
    """Undo :func:`install`; names that were imported meanwhile stay what they are. Does nothing where it was not called."""
    if getattr(sys.modules.get("flash_attn"), "__version__", None) == VERSION:
        for name in ("flash_attn", "flash_attn.flash_attn_interface"):
            sys.modules.pop(name, None)


def _module(name: str) -> types.ModuleType:
    """A module that says where it comes from, in error messages too."""
    module = types.ModuleType(name, "FlashAttention-2's functions by triflash: triflash.compat.flash_attn.install() put this here.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=__file__, is_package=name == "flash_attn")
    module.__file__ = __file__
    return module
