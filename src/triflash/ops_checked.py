"""The checks of a call and ``triflash::forward``, or ``varlen_forward``, in one operator, for what ``torch.compile`` traces.

``triflash::attention``        (tensors and options as a caller writes them) -> (out, lse), in the caller's layout
``triflash::attention_varlen`` the same of packed sequences

Dynamo compares in each call of a compiled program whatever it read while it traced. It takes an operator as one step, so our checks run
while the graph is made and no call waits for them; it consists of others, so autograd, functional transforms and Inductor see
``triflash::forward`` and views. Called by ``attention.py``, ``varlen.py`` and ``door.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .arguments import ATTENTION, CheckedVarlen, Face, Given, Options, VarlenGiven, VarlenOptions, argument, checked, checked_varlen
from .checks import seed_tensor
from .derivatives import refuse_tangents
from .ops import attention_forward
from .ops_varlen import VarlenOptions as Varlen
from .ops_varlen import varlen_forward

__all__ = [
    "CASTING", "CASTS", "casting", "checked_attention", "checked_attention_varlen", "compute", "compute_varlen", "is_casting",
    "varlen_options",
]  # fmt: skip

CASTS = (torch.float16, torch.bfloat16, torch.float32)  # what autocast changes
# Where autocast exists; Dynamo of PyTorch 2.10 cannot trace the question.
CASTING = tuple([kind for kind in ("cpu", "cuda", "xpu") if torch.amp.is_autocast_available(kind)])


def compute(face: Face, given: Given, options: Options) -> tuple[Tensor, Tensor]:
    """out and lse in the caller's layout, by operators, of tensors that are what they look like. Raises what ``checked`` does."""
    call = checked(face, given, options)
    seed = seed_tensor(given.dropout_seed, given.q.device) if call.dropout_p else None
    x = call.form.operands((*given[:8], seed, None, None, None, None, *given[9:]))
    out, lse, _ = attention_forward(
        *x[:4], call.form.inner, call.lo, call.hi, call.scale, call.precision, call.backend, *x[4:9], call.softcap, call.dropout_p,
        call.deterministic, *x[13:], call.shift,
    )  # fmt: skip
    return call.form.out_of(out), call.form.lse_of(lse)


def compute_varlen(given: VarlenGiven, options: VarlenOptions) -> tuple[Tensor, Tensor]:
    """:func:`compute`, of packed sequences. Raises what ``checked_varlen`` does."""
    call = checked_varlen(given, options)
    seed = seed_tensor(given.dropout_seed, given.q.device) if call.dropout_p else None
    out, lse, _ = varlen_forward(*given[:7], seed, *given[8:], *varlen_options(call))
    return out, lse


def varlen_options(call: CheckedVarlen) -> Varlen:
    """What the operators of packed sequences take beside the tensors."""
    band = call.band
    return Varlen(
        band.left, band.right, band.anchor == "bottom_right", call.scale, call.precision, call.bias_layout, call.mask_layout, call.softcap,
        call.dropout_p, call.deterministic, call.longest_q, call.longest_k, call.backend,
    )  # fmt: skip


def is_casting(q: Any) -> bool:
    """Whether autocast is on where a tensor is."""
    return isinstance(q, Tensor) and q.device.type in CASTING and torch.is_autocast_enabled(q.device.type)


@contextmanager
def casting(given: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """q, k and v in autocast's dtype, for a call in the block, in which there is none."""
    device = given[0].device.type
    dtype = torch.get_autocast_dtype(device)
    cast = tuple([x.to(dtype) if isinstance(x, Tensor) and x.dtype in CASTS else x for x in given[:3]])
    with torch.autocast(device, enabled=False):
        yield cast


_library = torch.library.Library("triflash", "FRAGMENT")
_library.define(
    "attention(Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? mask, Tensor? key_lengths, Tensor? alibi_slopes, Tensor? sink, "
    "Tensor? dropout_seed, Tensor? second_bias, Tensor? query_starts, Tensor? query_lengths, Tensor? key_starts, Tensor? diagonals, "
    "SymInt? diagonal, str causal, bool windowed, SymInt? left, SymInt? right, float? scale, float? softcap, float dropout_p, "
    "bool? deterministic, str layout, str? precision, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sink, Tensor? dropout_seed, "
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, Tensor? second_bias, str bias_layout, "
    "str? mask_layout, str causal, bool windowed, SymInt? left, SymInt? right, float? scale, float? softcap, float dropout_p, "
    "bool? deterministic, str? precision, str backend, SymInt? longest_q, SymInt? longest_k) -> (Tensor, Tensor)"
)
_CAUSAL: dict[str, bool | str] = {"True": True, "False": False, "top_left": "top_left"}


def _attention(*args: Any) -> tuple[Tensor, Tensor]:
    given = Given(*args[:14])
    diagonal, causal, windowed, left, right, scale, softcap, dropout_p, deterministic, layout, precision, backend = args[14:]
    window = (left, right) if windowed else None
    options = Options(_CAUSAL[causal], window, scale, softcap, dropout_p, deterministic, layout, precision, backend, diagonal)
    if forward_ad._current_level >= 0:
        refuse_tangents(given, [*map(argument, Given._fields)])
    try:
        return compute(ATTENTION, given, options)
    except (ValueError, TypeError) as error:
        if not torch._C._len_torch_dispatch_stack():
            raise
        raise _refused(error, given) from None


def _attention_varlen(*args: Any) -> tuple[Tensor, Tensor]:
    given = VarlenGiven(*args[:13])
    bias_layout, mask_layout, causal, windowed, left, right, *others = args[13:]
    window = (left, right) if windowed else None
    options = VarlenOptions._make([bias_layout, mask_layout, _CAUSAL[causal], window, *others])
    if forward_ad._current_level >= 0:
        refuse_tangents(given, [*map(argument, VarlenGiven._fields)])
    try:
        return compute_varlen(given, options)
    except (ValueError, TypeError) as error:
        if not torch._C._len_torch_dispatch_stack():
            raise
        raise _refused(error, given) from None


def _refused(error: Exception, given: tuple[Any, ...]) -> Exception:
    """An error that Dynamo is to tell of: of a kind for which it leaves a call to Python, which raises the error itself; others become
    Dynamo's. Of sizes that it knows by names the words have the numbers.
    """
    kind, words = type(error), str(error)
    sizes: list[Any] = [size for x in given if isinstance(x, Tensor) for size in x.shape]
    for size in sizes:
        if isinstance(size, torch.SymInt):
            words = re.sub(rf"\b{re.escape(str(size))}\b", str(size.node.hint), words)
    return type(kind.__name__, (kind, NotImplementedError), {})(words)


_library.impl("attention", _attention, "CompositeImplicitAutograd")
_library.impl("attention_varlen", _attention_varlen, "CompositeImplicitAutograd")
checked_attention = torch.ops.triflash.attention.default
checked_attention_varlen = torch.ops.triflash.attention_varlen.default
