"""Who computes attention: triflash's backends and the peers, behind one interface. What one cannot do, it says in a line."""

from __future__ import annotations

import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import triflash
from triflash import ops
from triflash.plan.select import BACKENDS

from . import flexible, formula
from .gate import Problem
from .workloads import Workload

__all__ = ["PROVIDERS", "Attend", "Provider", "one_line", "provider"]

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # q, k, v (B, S, H, D) and a five-dim bias or None -> out (B, M, Hq, Dv)


class Provider(ABC):
    """One way to compute attention.

    name: as the command line and the tables have it. is_ours: triflash, not a peer. compiles: has something to compile first, which
    ``--prepare`` does ahead.
    """

    is_ours = False
    compiles = False

    def __init__(self, name: str) -> None:
        self.name = name

    def why_not(self, workload: Workload, device: torch.device) -> str | None:
        """What of the workload it cannot do, in a few words; None if it is worth a try, which may still raise."""
        return None

    @abstractmethod
    def attend(self, workload: Workload, problem: Problem) -> Attend:
        """The function to be timed. What can be prepared once per shape (masks that ask for no gradient) is prepared here."""


class Triflash(Provider):
    """A backend of triflash; ``auto`` is its own choice."""

    is_ours = True

    def __init__(self, backend: str) -> None:
        super().__init__("triflash" if backend == "auto" else f"triflash-{backend}")
        self.backend, self.compiles = backend, backend != "tiled"

    def attend(self, workload: Workload, problem: Problem) -> Attend:
        """The seed's function where it has the arguments, else the operator below ``attention``; padding is passed as key lengths.

        Not to backend ``hopper``, which takes it as the bias that it is given.
        """
        name, w, options = self.backend, workload, problem.options
        lengths = None
        if w.lengths is not None and w.bias_values == "padding" and not w.dbias and name != "hopper":
            lengths = torch.tensor(w.lengths, dtype=torch.int32, device=problem.q.device)
        plain = w.kv_heads == w.heads and w.softcap is None and options.sinks is None and lengths is None
        if plain and w.lo is None and w.hi in (None, 0) and w.batch_inner == 1 and w.value_dim == w.head_dim:

            def public(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
                four = None if bias is None else bias.squeeze(1)  # indexing would make autograd fill a second tensor of the bias's size
                with triflash.backend(name):
                    return triflash.flash_attn_func(q, k, v, four, w.is_causal, w.softmax_scale)

            return public

        def operator(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            band = (w.batch_inner, w.lo, w.hi, w.softmax_scale, "", name)
            extras = (None, lengths, None, options.sinks, None, w.softcap or 0.0)
            return ops.attention_forward(q, k, v, bias if lengths is None else None, *band, *extras)[0]

        return operator


class Sdpa(Provider):
    """``torch.nn.functional.scaled_dot_product_attention`` with one of its backends, or (None) its own choice."""

    def __init__(self, name: str, backend: SDPBackend | None) -> None:
        super().__init__(name)
        self.backend = backend

    def why_not(self, workload: Workload, device: torch.device) -> str | None:
        """A band other than causal, and causal beside a bias, go into the mask, which FlashAttention takes on CPUs only."""
        if workload.softcap is not None or workload.sinks:
            return "no soft cap" if workload.softcap is not None else "no sinks"
        needs_mask = workload.bias is not None or workload.mask == "window"
        if self.backend == SDPBackend.FLASH_ATTENTION and needs_mask and device.type == "cuda":
            return "takes no bias, mask or window"
        if self.backend == SDPBackend.CUDNN_ATTENTION and device.type != "cuda":
            return "needs a GPU"
        return None

    def attend(self, workload: Workload, problem: Problem) -> Attend:
        """A mask that asks for no gradient is folded with the band here, once; a bias that does is folded inside the call."""
        w, options = workload, problem.options
        causal = w.is_causal and w.bias is None
        hidden = None if causal else formula.hidden(w.queries, w.keys, options, problem.q.device)

        def mask_of(bias: Tensor | None) -> Tensor | None:
            if bias is None:
                return None if hidden is None else ~hidden
            bias = formula.dense_bias(bias, w.batch, options.batch_inner)
            return bias if hidden is None else bias.masked_fill(hidden, -torch.inf)

        folded = None if w.dbias else mask_of(problem.bias)
        more = {} if w.kv_heads == w.heads else {"enable_gqa": True}

        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            mask = mask_of(bias) if w.dbias else folded
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=w.softmax_scale, **more)
            return out.transpose(1, 2)

        if self.backend is None:
            return run
        backend = self.backend

        def chosen(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            with sdpa_kernel([backend]):
                return run(q, k, v, bias)

        return chosen


class Flex(Provider):
    """FlexAttention, compiled for each shape."""

    compiles = True

    def why_not(self, workload: Workload, device: torch.device) -> str | None:
        """Its CPU code has no backward pass, and compiles C++."""
        return "needs a GPU" if device.type != "cuda" else None

    def attend(self, workload: Workload, problem: Problem) -> Attend:
        """See :mod:`triflash.bench.flexible`."""
        return flexible.attend(workload, problem, compiled=True)


class Fa4(Provider):
    """FlashAttention-4, from the package flash-attn-4."""

    compiles = True

    def why_not(self, workload: Workload, device: torch.device) -> str | None:
        """It takes a bias only as code."""
        try:
            found = importlib.util.find_spec("flash_attn.cute") is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return "flash-attn-4 is not installed"
        if device.type != "cuda":
            return "needs a GPU"
        if workload.bias is not None:
            return "takes no bias tensor"
        return "aligns causal to the bottom right" if workload.is_banded and workload.queries != workload.keys else None

    def attend(self, workload: Workload, problem: Problem) -> Attend:
        """``flash_attn_func`` of ``flash_attn.cute``."""
        from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

        w = workload
        more: dict[str, object] = {"softmax_scale": w.softmax_scale}
        if w.is_causal:
            more["causal"] = True
        elif w.is_banded:
            more["window_size"] = (None if w.lo is None else -w.lo, w.hi)
        if w.softcap is not None:
            more["softcap"] = w.softcap
        if problem.options.sinks is not None:
            more["learnable_sink"] = problem.options.sinks.to(problem.q.dtype)

        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            found = flash_attn_func(q, k, v, **more)
            out: Tensor = found[0] if isinstance(found, tuple) else found
            return out

        return run


class Dense(Provider):
    """The formula in plain PyTorch: products in the inputs' dtype, softmax in float32, every score in memory."""

    def attend(self, workload: Workload, problem: Problem) -> Attend:
        """See :mod:`triflash.bench.formula`."""
        precise = torch.promote_types(problem.q.dtype, torch.float32)
        hidden = formula.hidden(workload.queries, workload.keys, problem.options, problem.q.device)
        return lambda q, k, v, bias: formula.attention(q, k, v, bias, problem.options, precise, hidden)


PROVIDERS: dict[str, Provider] = {
    p.name: p
    for p in (
        *(Triflash(backend) for backend in BACKENDS if backend != "oracle"),
        Sdpa("sdpa", None),
        Sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION),
        Sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
        Sdpa("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
        Flex("flex"),
        Fa4("fa4"),
        Dense("dense"),
    )
}


def provider(name: str) -> Provider:
    """The provider of that name. Raises ValueError listing the names."""
    try:
        return PROVIDERS[name]
    except KeyError:
        raise ValueError(f"--providers {name}: wanted some of {', '.join(PROVIDERS)}") from None


def one_line(error: BaseException, warned: list[warnings.WarningMessage] | None = None) -> str:
    """Why a provider failed, for a table: the warnings of SDPA say more than its error, of any other the first line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if text.startswith(("No available kernel", "No viable backend")):
        said = [str(w.message).split(" (Triggered internally")[0].strip() for w in warned or ()]
        said = [line for line in said if "kernel not used because" not in line and "runtime disabled" not in line.lower()]
        text = said[0].splitlines()[0] if said else "no kernel for this problem"
        return text[:140]
    return f"{type(error).__name__}: {text}"[:140]
