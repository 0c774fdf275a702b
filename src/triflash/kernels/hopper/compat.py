"""The names of Gluon that differ between Triton releases (3.6 to 3.9), under one name each. Kernels import them from here."""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..triton.records import record

__all__ = [
    "TensorDescriptor",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "mma_v2",
    "record",
    "reinterpret",
    "thread_barrier",
    "tma_add",
    "tma_load",
    "tma_store",
    "tma_store_wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@builtin
def _tma_add(tensor_desc, coord, src, _semantic=None):
    """Add a tile in shared memory to global memory. Triton 3.6 and 3.7 have the operation, but no name for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


@builtin
def reinterpret(buffer, dtype, shape, layout, _semantic=None):
    """A buffer's memory, from its first byte on, as another one. Triton 3.6 and 3.7 have it as a method with an underscore."""
    method = getattr(buffer, "reinterpret", None) or buffer._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)


tma_add = tma.async_atomic_add if hasattr(tma, "async_atomic_add") else _tma_add
