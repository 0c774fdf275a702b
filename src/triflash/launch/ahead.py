"""Compile a kernel launch for a GPU that is not here, and read what the compiler made of it. Used by tests, ``explain``, ``tune`` and
``compile``.

Works without any GPU or driver, but not under Triton's interpreter: the kernels must have been imported with ``TRITON_INTERPRET`` off.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from ..plan.select import Plan
from ..spec import AttentionSpec, Gradients, Needs, Operands, Saved
from . import backward_calls, forward_calls
from .calls import Call
from .room import Real, twin

__all__ = ["Resources", "build_launcher", "cache_folder", "calls_of", "compile_for", "identity", "pass_calls", "resources", "timed"]


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
    source, target, options = _source_of(call, arch)
    return triton.compile(source, target=target, options=options.__dict__)


def identity(call: Call, arch: str) -> str:
    """What two launches share that are one compiled kernel: all of Triton's cache key that is the launch's own."""
    source, _, options = _source_of(call, arch)
    return f"{source.hash()}-{options.hash()}"


def timed(call: Call, arch: str) -> tuple[Any, float, bool]:
    """The compiled kernel, the seconds that this took, and whether Triton's cache had it."""
    hits: list[bool] = []
    knobs = triton.knobs.compilation
    before = knobs.listener

    def listener(*args: Any, cache_hit: bool, **more: Any) -> None:
        hits.append(cache_hit)
        if before is not None:
            before(*args, cache_hit=cache_hit, **more)

    knobs.listener = listener
    try:
        start = time.perf_counter()
        compiled = compile_for(call, arch)
        return compiled, time.perf_counter() - start, hits == [True]
    finally:
        knobs.listener = before


def build_launcher(compiled: Any) -> bool:
    """Build the C function by which this process would launch a compiled kernel on an NVIDIA GPU, and what Triton's driver needs, into
    Triton's cache; whether that can be done here. Triton 3.6 has a launcher for each signature of kernels, later releases one for all.
    """
    from triton.backends.nvidia import driver

    make = getattr(driver, "make_launcher", None)
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if make is None or compiler is None or compiled.metadata.target.backend != "cuda":
        return False
    from triton.runtime.build import compile_module_from_src

    src = compiled.src
    constants = {(src.fn.arg_names.index(at),) if isinstance(at, str) else at: value for at, value in src.constants.items()}
    text = make(constants, dict(src.signature), getattr(compiled.metadata, "tensordesc_meta", None))
    with tempfile.TemporaryDirectory() as folder:
        try:
            libraries = driver.library_dirs()
        except (AssertionError, OSError, subprocess.SubprocessError):  # no driver is here: linked to an empty one of its name
            empty = os.path.join(folder, "libcuda.so.1")
            subprocess.run([compiler, "-shared", "-x", "c", os.devnull, "-Wl,-soname,libcuda.so.1", "-o", empty], check=True)
            libraries = [driver.libdevice_dir, folder]
        for name, source in (("__triton_launcher", text), ("cuda_utils", Path(driver.dirname, "driver.c").read_text())):
            if _is_built(name, source):
                continue
            with contextlib.suppress(ImportError):  # Triton stores it, and then loads it, which needs the driver
                compile_module_from_src(
                    src=source, name=name, library_dirs=libraries, include_dirs=driver.include_dirs, libraries=driver.libraries
                )
    return True


def _is_built(name: str, source: str) -> bool:
    """Whether Triton's cache has this module, by the key that Triton 3.6 gives it; asked here because Triton would load it to find out."""
    from triton.runtime.build import platform_key
    from triton.runtime.cache import get_cache_manager

    key = hashlib.sha256((source + platform_key()).encode("utf-8")).hexdigest()
    return get_cache_manager(key).get_file(f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}") is not None


def cache_folder() -> Path:
    """Where Triton keeps what this process compiles."""
    return Path(triton.knobs.cache.dir)


def _source_of(call: Call, arch: str) -> tuple[Any, GPUTarget, Any]:
    """A launch as Triton compiles it: source, target, and the backend's options."""
    target = target_of(arch)
    backend = make_backend(target)
    kernel = call.kernel
    call.settle()
    options = {"num_warps": call.config.num_warps, "num_stages": call.config.num_stages, "debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*call.args, **call.constants, **options)
    packed, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, options)
    source_type = GluonASTSource if kernel.is_gluon() else ASTSource
    return source_type(kernel, signature, constexprs, attrs), target, packed


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
    tensors: allocates nothing. The output's gradient and the gradients are contiguous.
    """
    x = Operands(*(None if each is None else twin(each) for each in operands))  # type: ignore[arg-type]
    out = torch.empty((*x.q.shape[:3], x.v.shape[3]), dtype=x.q.dtype, device="meta")
    lse = out.new_empty((x.q.shape[0], x.q.shape[2], x.q.shape[1]), dtype=torch.float32)
    wanted = zip((x.q, x.k, x.v, x.bias, x.sink, x.second_bias), vars(needs).values(), strict=True)
    grads = [torch.empty(y.shape, dtype=y.dtype, device="meta") if need and y is not None else None for y, need in wanted]
    saved = Saved(out, lse, lse.new_empty(lse.shape) if spec.keeps_rest else None)
    return pass_calls(plan, spec, x, saved, out, Gradients(*grads))


def pass_calls(plan: Plan, spec: AttentionSpec, x: Operands, saved: Saved, dout: Tensor, grads: Gradients) -> list[Call]:
    """The launches of a plan: a forward pass writes ``saved``, a backward pass those of ``grads`` that are given."""
    room = Real(x.q)
    if any(step.kernel in ("forward", "few_forward", "short_forward") for step in plan.steps):
        return forward_calls(room, plan, spec, x, saved)
    return backward_calls(room, plan, spec, x, saved, dout, None, grads)
