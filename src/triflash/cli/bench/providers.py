"""Who computes attention: triflash's backends and the peers, behind one interface. What one cannot do, it says in a line."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import triflash
from triflash.plan.select import BACKENDS

from . import caches, flexible, formula, marks
from .compiling import compiled
from .entry import Biases, Entry, heads_first
from .gate import Problem
from .marks import Marks
from .packed import offsets, places
from .simpler import SIMPLER
from .workloads import Workload

__all__ = ["PROVIDERS", "Asked", "Entry", "Provider", "asked_of_triflash", "one_line", "provider"]

_CHUNK = 2**26  # scores of a chunk of the provider "chunked": 256 MiB in float32


class Provider(ABC):
    """One way to compute attention.

    name: as the command line and the tables have it. is_ours: triflash, not a peer. compiles: has something to compile first, which
    ``--prepare`` does ahead; compiles_lengths: anew for every length.
    """

    is_ours = False
    compiles = compiles_lengths = False

    def __init__(self, name: str) -> None:
        self.name = name

    def why_not(self, workload: Workload, device: torch.device) -> str | None:
        """What of the workload it cannot do, in a few words; None if it is worth a try, which may still raise."""
        return None

    def own(self, workload: Workload) -> Workload:
        """What it computes of the workload: all of it, but for those that are there to tell what a part costs."""
        return workload

    def marks(self, workload: Workload, problem: Problem) -> Marks:
        """Which probabilities its dropout keeps. Called of a workload with dropout that :meth:`why_not` has nothing against."""
        raise NotImplementedError(f"{self.name} has no dropout")

    @abstractmethod
    def attend(self, workload: Workload, problem: Problem) -> Entry:
        """The function to be timed, and its layout. Masks that ask for no gradient are prepared here, once."""


class Triflash(Provider):
    """``triflash.attention`` on a backend by name; ``auto`` names none."""

    is_ours = True

    def __init__(self, backend: str) -> None:
        super().__init__("triflash" if backend == "auto" else f"triflash-{backend}")
        self.backend, self.compiles = backend, backend != "tiled"

    def attend(self, workload: Workload, problem: Problem) -> Entry:
        """Two batch levels are two batch dims; padding without a gradient is passed as key lengths."""
        asked = asked_of_triflash(workload, problem)
        more = asked.more if self.backend == "auto" else {**asked.more, "backend": self.backend}
        if workload.page or workload.fp8:
            return self._stored(workload, problem, asked, more)

        def call(q: Tensor, k: Tensor, v: Tensor, bias: Biases) -> Tensor:
            out: Tensor = asked.of(q, k, v, bias=bias, **more)
            return out

        def masked(q: Tensor, k: Tensor, v: Tensor, mask: Biases) -> Tensor:
            out: Tensor = asked.of(q, k, v, mask=mask, **more)
            return out

        return Entry(masked if workload.is_mask else call, lay=asked.lay, unlay=asked.unlay, lay_bias=asked.lay_bias)

    def _stored(self, w: Workload, problem: Problem, asked: Asked, more: dict[str, Any]) -> Entry:
        """On a cache of its own, which is filled here."""
        k, v = (caches.stored(x, w.fp8) for x in (problem.k, problem.v))
        if w.page:
            k, v, table = caches.paged(k, v, w.page)
            more = {**more, "page_table": table}

        def call(q: Tensor, _k: Tensor, _v: Tensor, bias: Biases) -> Tensor:
            out: Tensor = asked.of(q, k, v, bias=bias, **more)
            return out

        return Entry(call, lay=asked.lay, unlay=asked.unlay, lay_bias=asked.lay_bias)

    def marks(self, workload: Workload, problem: Problem) -> Marks:
        """A function of the seed."""
        return marks.drawn(workload.dropout, workload.heads, problem.q.device)


@dataclass(frozen=True)
class Asked:
    """What a workload asks of triflash: which function, with what beside q, k, v and the bias; and tensors' layouts (:class:`Entry`)."""

    of: Callable[..., Any]
    more: dict[str, Any]
    lay: Callable[[Tensor], Tensor]
    unlay: Callable[[Tensor], Tensor]
    lay_bias: Callable[[Tensor], Tensor | None]


def asked_of_triflash(w: Workload, problem: Problem) -> Asked:
    """As its users would call it. The problem's tensors may be meta tensors."""
    if w.packed:  # told how long the longest sequence is
        cu, longest = offsets(problem.sequences, problem.q.device), max(problem.sequences)
        lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
        return Asked(triflash.attention_varlen, lengths | _band(w), lambda x: x[0], lambda x: x[None], lambda bias: bias.squeeze(1))
    lengths_of = None if w.lengths is None else torch.tensor(w.lengths, dtype=torch.int32, device=problem.q.device)
    if w.cache:  # k and v as they are, of which requests hold so many keys
        more = {"cache_lengths": lengths_of, "causal": w.hi is not None, "scale": w.scale}
        return Asked(triflash.attention_with_kvcache, more, _same, _same, lambda bias: None if lengths_of is not None else bias.squeeze(1))
    more = _band(w)
    options = {"scale": w.scale, "softcap": w.softcap, "sink": problem.options.sinks, "alibi_slopes": problem.options.slopes}
    more |= {name: value for name, value in options.items() if value is not None}
    if w.dropout:
        more |= {"dropout_p": w.dropout, "dropout_seed": marks.SEED}
    if w.deterministic:
        more["deterministic"] = True
    levels = (w.batch // w.batch_inner, w.batch_inner)
    padded = lengths_of is not None and w.bias_values == "padding" and not w.dbias
    if lengths_of is not None and padded:
        more["key_lengths"] = lengths_of if w.batch_inner == 1 else lengths_of.unflatten(0, levels)

    def lay_bias(bias: Tensor) -> Tensor | None:
        return None if padded else bias.squeeze(1) if w.batch_inner == 1 else bias

    if w.batch_inner == 1:
        return Asked(triflash.attention, more, _same, _same, lay_bias)
    return Asked(triflash.attention, more, lambda x: x.unflatten(0, levels), lambda x: x.flatten(0, 1), lay_bias)


def _same(x: Tensor) -> Tensor:
    return x


class TriflashDense(Provider):
    """``triflash.attention`` on packed sequences of one length, which are a dense batch: what packing costs."""

    is_ours = compiles = True

    def why_not(self, workload: Workload, device: torch.device) -> str | None:
        """Only equal lengths."""
        if not workload.packed:
            return "is for packed sequences"
        return _lacks(workload) if len(set(workload.sequences)) == 1 else "sequences differ in length"

    def attend(self, workload: Workload, problem: Problem) -> Entry:
        """Views."""
        more = _band(workload)
        shape = len(problem.sequences), problem.sequences[0]

        def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            out: Tensor = triflash.attention(q, k, v, bias=bias, **more)
            return out

        return Entry(
            call,
            lay=lambda x: x[0].unflatten(0, shape),
            unlay=lambda x: x.flatten(0, 1)[None],
            lay_bias=lambda bias: bias.squeeze(1),
        )


class TorchVarlen(Provider):
    """``torch.nn.attention.varlen.varlen_attn``: FlashAttention-2, or what PyTorch has in its place."""

    def why_not(self, workload: Workload, device: torch.device) -> str | None:
        """16 bits on a GPU, from PyTorch 2.11 on for what is not causal."""
        if not workload.packed:
            return "is for packed sequences"
        if device.type != "cuda":
            return "needs a GPU"
        return "takes no bias" if workload.bias is not None else _lacks(workload)

    def attend(self, workload: Workload, problem: Problem) -> Entry:
        """Windows say what is visible."""
        from torch.nn.attention.varlen import varlen_attn

        w, cu, longest = workload, offsets(problem.sequences, problem.q.device), max(problem.sequences)
        window = (-1 if w.lo is None else -w.lo, -1 if w.hi is None else w.hi)

        def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            found = varlen_attn(q, k, v, cu, cu, longest, longest, window_size=window)
            return found[0] if isinstance(found, tuple) else found

        return Entry(call, lay=lambda x: x[0], unlay=lambda x: x[None])


def _band(w: Workload) -> dict[str, Any]:
    """A workload's visible offsets as ``attention`` takes them. Workloads are aligned to the top left; squares to both corners."""
    if w.hi == 0:
        causal: dict[str, Any] = {"causal": True if w.queries == w.keys else "top_left"}
        return causal if w.lo is None else {**causal, "window": (-w.lo, None)}
    if not w.is_banded:
        return {}
    diagonal = w.keys - w.queries
    return {"window": (None if w.lo is None else diagonal - w.lo, None if w.hi is None else w.hi - diagonal)}


_BUT_DROPOUT = ("softcap", "sinks", "slopes", "deterministic", "page", "fp8")


def _lacks(w: Workload, *has: str) -> str | None:
    """The first feature of a workload that a provider lacks, in words; ``has`` are the fields of those that it has."""
    words = {
        "softcap": "no soft cap", "sinks": "no sinks", "slopes": "takes no ALiBi slopes", "dropout": "no dropout",
        "deterministic": "no gradients of the same bits by request", "page": "no pages", "fp8": "no cache in 8 bits",
    }  # fmt: skip
    return next((said for name, said in words.items() if getattr(w, name) and name not in has), None)


def _to_bottom_right(w: Workload) -> bool:
    """Whether the mask is causal and the last query stands at the last key, as of a chunk that is prefilled."""
    return w.lo is None and w.hi == w.keys - w.queries


class Sdpa(Provider):
    """``torch.nn.functional.scaled_dot_product_attention`` with one of its backends, or (None) its own choice."""

    def __init__(self, name: str, backend: SDPBackend | None) -> None:
        super().__init__(name)
        self.backend = backend

    def why_not(self, workload: Workload, device: torch.device) -> str | None:
        """A band other than causal, and causal beside a bias, go into the mask, which FlashAttention takes on CPUs only."""
        if workload.packed:
            return "takes no packed sequences"
        if (lacks := _lacks(workload, "dropout")) is not None:
            return lacks
        needs_mask = workload.bias is not None or workload.mask == "window"
        if self.backend == SDPBackend.FLASH_ATTENTION and needs_mask and device.type == "cuda":
            return "takes no bias, mask or window"
        if self.backend == SDPBackend.CUDNN_ATTENTION and device.type != "cuda":
            return "needs a GPU"
        return None

    def attend(self, workload: Workload, problem: Problem) -> Entry:
        """A mask that asks for no gradient is folded with the band here, once; a bias that does is folded inside the call."""
        w, options = workload, problem.options
        causal = w.is_causal and w.bias is None
        hidden = None if causal else formula.hidden(w.queries, w.keys, options, problem.q.device)

        def mask_of(bias: Biases) -> Tensor | None:
            if bias is None:
                return None if hidden is None else ~hidden
            if isinstance(bias, tuple):  # it takes their sum
                bias = bias[0] + bias[1]
            if bias.dim() == 5:
                bias = formula.dense_bias(bias, w.batch, options.batch_inner)
            if hidden is None:
                return bias
            return bias & ~hidden if bias.dtype == torch.bool else bias.masked_fill(hidden, -torch.inf)

        def lay_bias(bias: Tensor) -> Tensor:
            return bias.squeeze(1) if bias.shape[1] == 1 and (bias.shape[0] == 1 or w.batch_inner == 1) else bias

        folded = None if w.dbias else mask_of(problem.given)
        more: dict[str, Any] = {"is_causal": causal, "scale": w.scale}
        if w.kv_heads != w.heads:
            more["enable_gqa"] = True
        if w.dropout:
            more["dropout_p"] = w.dropout

        def call(q: Tensor, k: Tensor, v: Tensor, bias: Biases) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_of(bias) if w.dbias else folded, **more)

        device, backends = problem.q.device, [] if self.backend is None else [self.backend]

        @contextlib.contextmanager
        def around() -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                if backends:
                    stack.enter_context(sdpa_kernel(backends))
                if w.dropout:  # every call draws the same
                    stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
                    torch.manual_seed(marks.SEED)
                yield

        nothing = self.backend is None and not w.dropout
        return Entry(call, heads_first, heads_first, lay_bias, contextlib.nullcontext if nothing else around)

    def marks(self, workload: Workload, problem: Problem) -> Marks:
        """Asked for."""
        entry = self.attend(workload, problem)
        return marks.asked(lambda q, k, v: entry(q, k, v, problem.given), workload.dropout, problem.q, problem.k, problem.v)


class Flex(Provider):
    """FlexAttention, compiled for each shape."""

    compiles = compiles_lengths = True

    def why_not(self, workload: Workload, device: torch.device) -> str | None:
        """Its CPU code has no backward pass, and compiles C++."""
        return "needs a GPU" if device.type != "cuda" else _lacks(workload, "softcap", "sinks", "slopes")

    def attend(self, workload: Workload, problem: Problem) -> Entry:
        """See :mod:`triflash.cli.bench.flexible`."""
        return flexible.attend(workload, problem)


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
        if (lacks := _lacks(workload, "softcap", "sinks")) is not None:
            return lacks
        odd = workload.is_banded and workload.queries != workload.keys and not _to_bottom_right(workload)
        return "aligns causal to the bottom right" if odd else None

    def attend(self, workload: Workload, problem: Problem) -> Entry:
        """``flash_attn_func`` of ``flash_attn.cute``, or ``flash_attn_varlen_func``."""
        from flash_attn import cute  # type: ignore[import-not-found]

        w = workload
        more: dict[str, object] = {"softmax_scale": w.softmax_scale}
        if w.is_causal or _to_bottom_right(w):
            more["causal"] = True
        elif w.is_banded:
            more["window_size"] = (None if w.lo is None else -w.lo, w.hi)
        if w.softcap is not None:
            more["softcap"] = w.softcap
        if problem.options.sinks is not None:
            more["learnable_sink"] = problem.options.sinks.to(problem.q.dtype)

        function = cute.flash_attn_func
        if w.packed:
            function = cute.flash_attn_varlen_func
            cu, longest = offsets(problem.sequences, problem.q.device), max(problem.sequences)
            more |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}

        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            found = function(q, k, v, **more)
            out: Tensor = found[0] if isinstance(found, tuple) else found
            return out

        return Entry(run, lay=lambda x: x[0], unlay=lambda x: x[None]) if w.packed else Entry(run)


class Dense(Provider):
    """The formula in plain PyTorch: products in the inputs' dtype, softmax in float32, every score in memory."""

    def why_not(self, workload: Workload, device: torch.device) -> str | None:
        """It draws nothing."""
        return _lacks(workload, "softcap", "sinks", "slopes")

    def attend(self, workload: Workload, problem: Problem) -> Entry:
        """See :mod:`triflash.cli.bench.formula`."""
        precise = torch.promote_types(problem.q.dtype, torch.float32)
        hidden = formula.hidden(workload.queries, workload.keys, problem.options, problem.q.device)
        if not workload.packed:
            return Entry(lambda q, k, v, bias: formula.attention(q, k, v, bias, problem.options, precise, hidden))
        # Every score of the whole batch: what programs do that know no packed sequences.
        number, place = places(problem.sequences, problem.q.device)
        others = number[:, None] != number
        banned = others if hidden is None else hidden | others

        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            if bias is not None:
                i, j = (place if size > 1 else 0 * place for size in bias.shape[3:])
                b = number if bias.shape[0] > 1 else 0 * number
                bias = bias.squeeze(1)[b[:, None], :, i[:, None], j].permute(2, 0, 1)[None, None]
            return formula.attention(q, k, v, bias, problem.options, precise, banned)

        return Entry(run)


class Chunked(Provider):
    """The formula in plain PyTorch for some batch entries at a time, computed again in the backward pass: how folding models save memory.

    A chunk is as many entries of the inner batch as :data:`_CHUNK` scores are, one at least.
    """

    def why_not(self, workload: Workload, device: torch.device) -> str | None:
        """Packed sequences have no batch entries."""
        return "no packed sequences" if workload.packed else _lacks(workload, "softcap", "sinks", "slopes")

    def attend(self, workload: Workload, problem: Problem) -> Entry:
        """Chunks do not cross the outer batch, so that no bias is expanded."""
        w, options = workload, problem.options
        precise = torch.promote_types(problem.q.dtype, torch.float32)
        hidden = formula.hidden(w.queries, w.keys, options, problem.q.device)
        inner = options.batch_inner
        each = min(inner, max(1, _CHUNK // (w.heads * w.queries * w.keys)))

        def part(q: Tensor, k: Tensor, v: Tensor, *biases: Tensor) -> Tensor:
            return formula.attention(q, k, v, biases, replace(options, batch_inner=q.shape[0]), precise, hidden)

        def run(q: Tensor, k: Tensor, v: Tensor, bias: Biases) -> Tensor:
            outs = []
            for outer in range(w.batch // inner):
                for at in range(0, inner, each):
                    rows = slice(outer * inner + at, outer * inner + min(at + each, inner))
                    some = []
                    for own in formula.listed(bias):
                        own = own[outer : outer + 1] if own.shape[0] > 1 else own
                        some.append(own[:, at : at + each] if own.shape[1] > 1 else own)
                    outs.append(checkpoint(part, q[rows], k[rows], v[rows], *some, use_reentrant=False, preserve_rng_state=False))
            return torch.cat(outs)

        return Entry(run)


class Compiled(Provider):
    """Another provider's function under ``torch.compile``, whole and for fixed shapes."""

    compiles = compiles_lengths = True

    def __init__(self, inner: Provider) -> None:
        super().__init__(f"{inner.name}-compiled")
        self.inner, self.is_ours = inner, inner.is_ours

    def why_not(self, workload: Workload, device: torch.device) -> str | None:
        """Compiled C++ is nobody's measure."""
        return "needs a GPU" if device.type != "cuda" else _lacks(workload, *_BUT_DROPOUT) or self.inner.why_not(workload, device)

    def attend(self, workload: Workload, problem: Problem) -> Entry:
        """The other's, compiled."""
        entry = self.inner.attend(workload, problem)
        return replace(entry, call=compiled(entry.call, fullgraph=True))


class OfSimpler(Provider):
    """Another provider on a simpler workload (see :data:`.simpler.SIMPLER`): no peer, but a measure of what the difference costs."""

    def __init__(self, inner: Provider, name: str) -> None:
        super().__init__(f"{inner.name}-{name}")
        self.inner, self.simpler = inner, SIMPLER[name]
        self.is_ours, self.compiles, self.compiles_lengths = inner.is_ours, inner.compiles, inner.compiles_lengths

    def own(self, workload: Workload) -> Workload:
        """The simpler one."""
        return self.simpler.of(workload)

    def why_not(self, workload: Workload, device: torch.device) -> str | None:
        """It is handed the workload as it is."""
        own = self.own(workload)
        return self.simpler.absent if own == workload else self.inner.why_not(own, device)

    def marks(self, workload: Workload, problem: Problem) -> Marks:
        """Where the simpler workload has dropout."""
        return self.inner.marks(workload, problem)

    def attend(self, workload: Workload, problem: Problem) -> Entry:
        """Of the simpler workload already."""
        return self.inner.attend(workload, problem)


PROVIDERS: dict[str, Provider] = {
    p.name: p
    for p in (
        *(Triflash(backend) for backend in BACKENDS if backend != "oracle"),
        Sdpa("sdpa", None),
        Sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION),
        Sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
        Sdpa("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
        TriflashDense("triflash-dense"),
        TorchVarlen("torch-varlen"),
        Flex("flex"),
        Fa4("fa4"),
        Dense("dense"),
        Chunked("chunked"),
        Compiled(Triflash("auto")),
        Compiled(Sdpa("sdpa", None)),
        OfSimpler(Sdpa("sdpa", None), "nobias"),
        *(OfSimpler(Triflash("auto"), name) for name in SIMPLER),
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
