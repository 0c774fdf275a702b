"""Problems that between them reach every kernel with every feature, and how a step of one is run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import triflash

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Problem:
    """One step.

    bias, mask, alibi: shapes. lengths, places: their dtype, of key_lengths and of starts, query_lengths and diagonals. seed: of dropout, as a tensor. wants: the gradients, letters of qkvbs. apart: q, k, v and the bias lie as TMA cannot read them. call: the public
    function; packed ones get q, k and v in one tensor or two.
    """

    name: str
    batch: tuple[int, ...] = (2,)
    M: int = 136
    N: int = 136
    H: int = 2
    Hk: int | None = None
    D: int = 64
    Dv: int | None = None
    dtype: torch.dtype = BF16
    bias: tuple[int, ...] | None = None
    bias_dtype: torch.dtype | None = None
    mask: tuple[int, ...] | None = None
    lengths: torch.dtype | None = None
    places: torch.dtype | None = None
    alibi: tuple[int, ...] | None = None
    sink: bool = False
    seed: bool = False
    wants: str = "qkvbs"
    dlse: bool = False
    apart: bool = False
    call: str = "attention"
    backend: str = "hopper"
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.backend}-{self.name}".replace(" ", "-")


@dataclass
class Step:
    """The tensors of a step and how it is run."""

    given: dict[str, Tensor]
    cotangents: dict[str, Tensor]
    forward: Callable[[], Any]
    wants: list[str]

    def run(self) -> dict[str, Tensor]:
        """out and lse (or out alone), and the gradients."""
        out = self.forward()
        results = dict(zip(("out", "lse"), out if isinstance(out, tuple) else (out,), strict=False))
        if self.wants:
            targets = [x for name, x in results.items() if f"d{name}" in self.cotangents]
            grads = torch.autograd.grad(
                targets,
                [self.given[name] for name in self.wants],
                [self.cotangents[f"d{name}"] for name in results if f"d{name}" in self.cotangents],
            )
            results |= {f"d{name}": grad for name, grad in zip(self.wants, grads, strict=True)}
        return results


def _laid_out(x: Tensor, apart: bool) -> Tensor:
    """x, or its values in rows three elements longer, one element behind a multiple of 16 bytes."""
    if not apart:
        return x
    return torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)[..., 1:-2].copy_(x)


def step_of(p: Problem, seed: int = 0) -> Step:
    """A step of a problem on new tensors."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    bhsd = p.options.get("layout") == "bhsd"
    sizes = {"q": (p.M, p.H, p.D), "k": (p.N, p.Hk or p.H, p.D), "v": (p.N, p.Hk or p.H, p.Dv or p.D), "out": (p.M, p.H, p.Dv or p.D)}
    if bhsd:
        sizes = {name: (heads, length, dim) for name, (length, heads, dim) in sizes.items()}
    parts: dict[str, tuple[int, ...]] = {name: (*p.batch, *size) for name, size in sizes.items()}
    tensors: dict[str, Tensor] = {}
    if p.call == "flash_attn_qkvpacked_func":
        tensors["qkv"] = rand(*p.batch, p.M, 3, p.H, p.D)
    elif p.call == "flash_attn_kvpacked_func":
        tensors |= {"q": rand(*parts["q"]), "kv": rand(*p.batch, p.N, 2, p.H, p.D)}
    else:
        tensors |= {name: _laid_out(rand(*parts[name]), p.apart) for name in "qkv"}
    if p.bias is not None:
        tensors["bias"] = _laid_out(rand(*p.bias, dtype=p.bias_dtype or p.dtype), p.apart)
    if p.mask is not None:
        tensors["mask"] = _laid_out(torch.rand(p.mask, generator=generator) > 0.2, p.apart)
    if p.lengths is not None:
        tensors["key_lengths"] = torch.randint(1, p.N, p.batch, generator=generator).to(p.lengths)
    if p.places is not None:
        for name, most in (("query_starts", p.M // 2), ("query_lengths", p.M), ("key_starts", p.N // 2), ("diagonal", p.N)):
            tensors[name] = torch.randint(0, min(most, torch.iinfo(p.places).max), p.batch, generator=generator).to(p.places)
    if p.alibi is not None:
        tensors["alibi_slopes"] = torch.rand(p.alibi, generator=generator)
    if p.sink:
        tensors["sink"] = rand(p.H)
    if p.seed:
        tensors["dropout_seed"] = torch.tensor([5, 6])
    letters = {"q": "q", "k": "k", "v": "v", "b": "bias", "s": "sink"}
    wants = [name for letter, name in letters.items() if letter in p.wants and name in tensors and tensors[name].is_floating_point()]
    wants += [name for name in ("kv", "qkv") if name in tensors]
    for name in wants:
        tensors[name].requires_grad_()
    cotangents = {"dout": rand(*parts["out"])}
    if p.dlse:
        cotangents["dlse"] = rand(*p.batch, p.H, p.M, dtype=F32)

    def forward() -> Any:
        with triflash.backend(p.backend):
            if p.call == "attention":
                q, k, v, *_ = tensors.values()
                rest = {name: x for name, x in tensors.items() if name not in ("q", "k", "v")}
                return triflash.attention(q, k, v, **rest, **p.options, return_lse=p.dlse)
            return getattr(triflash, p.call)(*tensors.values(), **p.options)

    return Step(tensors, cotangents, forward, wants)


def many(backend: str) -> list[Problem]:
    """The table, for one backend."""
    own = dict(backend=backend)
    fast = dict(deterministic=False)
    P = lambda name, **changes: Problem(name, **{**own, **changes})  # noqa: E731
    problems = [
        P("plain"),
        P("causal", options=dict(causal=True), wants="kv"),
        P("dq alone", wants="q"),
        P("no gradient", wants=""),
        P("packed qkv", call="flash_attn_qkvpacked_func"),
        P("packed kv", call="flash_attn_kvpacked_func", options=dict(causal=True)),
        P("heads first", options=dict(layout="bhsd", window=(40, 8))),
        P("two batch levels", batch=(2, 3), bias=(2, 1, 2, 136, 136)),
        P("two batch levels, inner", batch=(2, 3), bias=(1, 3, 2, 136, 136), mask=(2, 3, 1, 1, 136)),
        P("bias 1hqk", bias=(2, 136, 136)),
        P("bias bhqk", bias=(2, 2, 136, 136), wants="b"),
        P("bias b1qk fp32", bias=(2, 1, 136, 136), bias_dtype=F32),
        P("bias 1h1k", bias=(2, 1, 136)),
        P("bias hq1", bias=(2, 136, 1), wants="qkv" if backend == "triton" else ""),
        P("bias b11k beside a mask", bias=(2, 1, 1, 136), mask=(2, 1, 136, 136), wants="qkv"),
        P("mask", mask=(136, 136), lengths=torch.int64),
        P("many features", H=4, Hk=2, lengths=torch.uint8, alibi=(4,), sink=True, dlse=True, options=dict(softcap=30.0, causal=True)),
        P("sink alone", sink=True, wants="s"),
        P("dropout", alibi=(2, 2), options=dict(dropout_p=0.2, dropout_seed=7, causal=True)),
        P("dropout, seed a tensor", bias=(2, 136, 136), seed=True, options=dict(dropout_p=0.2)),
        P("copies", D=20, bias=(2, 136, 136), mask=(2, 1, 136, 136), apart=True, wants="qkv"),
        P("odd keys", N=131, D=40, Dv=20, bias=(2, 2, 136, 131), dlse=True),
        P("wide", D=256, M=72, N=72, options=dict(causal=True)),
    ]  # fmt: skip
    if backend == "hopper":
        problems += [
            P("added up", N=1100, M=72, options=fast),
            P("added up, copies", N=1100, M=72, D=20, apart=True, bias=(1, 2, 1, 1100), options={**fast, "causal": True}),
            P("mask of many blocks", M=1032, N=1032, H=32, mask=(2, 1, 1032, 1032)),
            P("heads in parts", M=72, N=200, H=16, Hk=2, wants="kv", dtype=F16),
        ]
    else:
        problems += [
            P("fp32", dtype=F32, bias=(2, 136, 136), options=dict(precision="tf32")),
            P("short rows", M=60, N=60, bias=(2, 60, 60)),
            P("short rows, packed", M=49, N=49, call="flash_attn_qkvpacked_func", options=dict(causal=True)),
            P(
                "short rows, many features",
                M=60,
                N=60,
                H=4,
                Hk=2,
                lengths=torch.int32,
                alibi=(4,),
                sink=True,
                dlse=True,
                bias=(2, 4, 60, 60),
                mask=(2, 1, 1, 60),
                options=dict(softcap=30.0, causal=True, dropout_p=0.2, dropout_seed=7),
            ),
            P("short rows, copies", M=50, N=61, D=20, bias=(2, 50, 61), mask=(2, 1, 50, 61), apart=True, wants="qvb"),
            P("short rows, bias hq1", M=60, N=60, bias=(2, 60, 1), sink=True),
            P("wide forward", D=320, M=40, N=40, wants=""),
            P(
                "where queries stand",
                batch=(2, 3),
                places=torch.int64,
                bias=(1, 3, 2, 136, 136),
                alibi=(2,),
                sink=True,
                dlse=True,
                options=dict(causal=True),
            ),
        ]
    return problems


def bytes_of(x: Tensor) -> int:
    return math.prod(x.shape) * x.element_size()


def shifted(x: Tensor, elements: int = 1) -> Tensor:
    """x so many elements behind an address that is a multiple of 64."""
    whole = torch.zeros(x.numel() + elements, dtype=x.dtype)
    return whole[elements:].view(x.shape).copy_(x)


def spread(x: Tensor) -> Tensor:
    """x with its outermost elements further apart."""
    return torch.zeros(2 * x.shape[0], *x.shape[1:], dtype=x.dtype)[::2].copy_(x)
