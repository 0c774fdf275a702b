"""Compile a kernel launch for a GPU that is not here, and read what the compiler made of it. Used by tests, ``explain`` and ``tune``.

Works without any GPU or driver, but not under Triton's interpreter: the kernels must have been imported with ``TRITON_INTERPRET`` off.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from ..plan import layout
from ..plan.select import Plan
from ..spec import AttentionSpec, Gradients, Needs, Operands, Saved
from . import hopper, hopper_backward
from .calls import Call, address_of
from .triton import backward_calls, forward_calls, scratch

__all__ = ["Resources", "calls_of", "compile_for", "pass_calls", "resources"]


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel takes: registers a thread, spilled 4-byte words a thread, bytes of shared memory."""

    registers: int
    spills: int
    shared_memory: int


def target_of(arch: str) -> GPUTarget:
    """Triton's target for ``sm80`` … or ``gfx942`` …."""
    return GPUTarget("cuda", int(arch[2:]), 32) if arch.startswith("sm") else GPUTarget("hip", arch, 64)


def compile_for(call: Call, arch: str) -> Any:
    """Triton's compiled kernel of a launch, exactly as the launch itself would compile it on that architecture.

    The tensors among the arguments may be meta tensors.
    """
    target = target_of(arch)
    backend = make_backend(target)
    kernel = call.kernel
    options = {"num_warps": call.config.num_warps, "num_stages": call.config.num_stages, "debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*call.args, **call.constants, **options)
    packed, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, options)
    source_type = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_type(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=packed.__dict__)


def resources(compiled: Any) -> Resources:
    """Registers, spills and shared memory of a compiled kernel, from its binary (NVIDIA) or its assembly (AMD)."""
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        found = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"])}
        return Resources(found["vgpr_count"], found["vgpr_spill_count"], shared)
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    if match is None:
        raise RuntimeError(f"no resource usage in cuobjdump's output: {usage.stdout}{usage.stderr}")
    return Resources(int(match[1]), int(match[2]) // 4, shared)


def calls_of(plan: Plan, spec: AttentionSpec, needs: Needs, *operands: Tensor | None) -> list[Call]:
    """The launches of a forward or a backward plan for ``operands`` (:class:`~triflash.spec.Operands`) of these shapes and strides, on meta
    tensors: allocates nothing.

    An input that a launch would copy first enters as that copy.
    """
    x = Operands(*operands)  # type: ignore[arg-type]
    if plan.backend == "hopper":
        x = x._replace(
            q=_tma_meta(x.q),
            k=_tma_meta(x.k),
            v=_tma_meta(x.v),
            bias=None if x.bias is None else _tma_meta_bias(spec, x.bias),
            mask=None if x.mask is None else _tma_meta_once(x.mask),
        )
    else:
        bias, mask = (None if each is None else _meta_bias(each) for each in (x.bias, x.mask))
        rest = (None if each is None else _meta(each) for each in x[5:])
        x = Operands(_meta_rows(x.q), _meta_rows(x.k), _meta_rows(x.v), bias, mask, *rest)
    out = torch.empty((*x.q.shape[:3], x.v.shape[3]), dtype=x.q.dtype, device="meta")
    lse = out.new_empty((x.q.shape[0], x.q.shape[2], x.q.shape[1]), dtype=torch.float32)
    q, k, v, bias, *_ = operands  # a copy of an expanded bias is smaller than its gradient
    wanted = zip((q, k, v, bias, x.sink), vars(needs).values(), strict=True)
    grads = [torch.empty(y.shape, dtype=y.dtype, device="meta") if need and y is not None else None for y, need in wanted]
    saved = Saved(out, lse, lse.new_empty(lse.shape) if spec.keeps_rest else None)
    return pass_calls(plan, spec, x, saved, out, Gradients(*grads))


def pass_calls(plan: Plan, spec: AttentionSpec, x: Operands, saved: Saved, dout: Tensor, grads: Gradients) -> list[Call]:
    """The launches of a plan: a forward pass writes ``saved``, a backward pass those of ``grads`` that are given."""
    if plan.backend == "hopper":
        if any(step.kernel == "forward" for step in plan.steps):
            out = saved.out if hopper.writable(saved.out) else hopper.padded_rows(saved.out)
            return hopper.forward_calls(plan, spec, x, saved._replace(out=out))
        dout = dout if hopper.addressable(dout) else hopper.padded_rows(dout)
        targets, stats = hopper_backward.targets(plan, grads), hopper_backward.new_stats(spec, saved.lse, saved.rest)
        return hopper_backward.backward_calls(plan, spec, x, saved, dout, None, stats, targets)
    if any(step.kernel == "forward" for step in plan.steps):
        return forward_calls(plan, spec, x, saved)
    return backward_calls(plan, spec, x, saved, dout, None, scratch(plan, saved), grads)


def _meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _meta_rows(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta") if layout.copies_rows(x.size(-1), x.stride(-1)) else _meta(x)


def _meta_bias(bias: Tensor) -> Tensor:
    """What ``launch.triton`` passes on for a bias: the bias, or its copy with padded rows."""
    if not layout.copies_bias(bias.shape, bias.stride(), address_of(bias)):
        return _meta(bias)
    copy = torch.empty(layout.copied_bias_shape(bias.shape, bias.stride()), dtype=bias.dtype, device="meta")
    return copy[..., : 1 if bias.stride(4) == 0 else bias.shape[4]].expand(bias.shape)


def _tma_meta(x: Tensor) -> Tensor:
    """What ``launch.hopper`` passes on for a tensor: the tensor, or its copy with padded rows."""
    if layout.tma_addressable(x.shape, x.stride(), x.element_size(), address_of(x)):
        return _meta(x)
    return torch.empty(layout.tma_padded(x.shape, x.element_size()), dtype=x.dtype, device="meta")[..., : x.shape[-1]]


def _tma_meta_bias(spec: AttentionSpec, bias: Tensor) -> Tensor:
    """The same for a bias: of a dim that ``expand`` repeats, the one element that there is."""
    if spec.bias is None or not spec.bias.varies[4]:
        return _meta(bias)
    return _tma_meta_once(bias)


def _tma_meta_once(bias: Tensor) -> Tensor:
    return _tma_meta(bias.as_strided(layout.tma_bias_shape(bias.shape, bias.stride()), bias.stride(), bias.storage_offset()))
