"""Triton's interpreter without the work whose results it throws away, which was most of what the interpreted tests cost. No result changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def quick_interpreter() -> Iterator[None]:
    """Triton's interpreter does some things once that it did over and over."""
    from triton.language import core, semantic
    from triton.runtime import interpreter

    quick = InterpreterParts(interpreter, core, semantic.TritonSemantic)
    with (
        mock.patch.object(interpreter, "_patch_lang", quick.patch_once),
        mock.patch.object(interpreter, "_get_np_dtype", quick.np_dtype),
        mock.patch.object(core.tensor, "__init__", quick.new_tensor),
        mock.patch.object(core.block_type, "__init__", quick.new_block_type),
        mock.patch.object(core.block_type, "__eq__", quick.same_block_type),
        mock.patch.object(semantic.TritonSemantic, "broadcast_impl_value", quick.broadcast),
        mock.patch.object(semantic.TritonSemantic, "computation_type_impl", quick.computation_type),
        mock.patch.object(semantic.TritonSemantic, "cast", quick.cast),
        mock.patch.object(core, "_unwrap_if_constexpr", quick.unwrap),
        # For every sum of integers it works out whether they overflow, to assert that they do not if "debug" is on, which it is not.
        mock.patch.object(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False)),
    ):
        yield


class InterpreterParts:
    """What replaces parts of the interpreter."""

    def __init__(self, interpreter: Any, core: Any, semantic: Any) -> None:
        self.interpreter, self.core = interpreter, core
        self.patch, self.dtype_of = interpreter._patch_lang, interpreter._get_np_dtype
        self.patched: set[int] = set()
        self.languages: dict[Any, frozenset[int]] = {}
        self.dtypes: dict[str, Any] = {}
        self.shapes: dict[str, tuple[Any, Any]] = {}
        self.blocks: dict[Any, tuple[Any, int, str]] = {}
        self.sizes: dict[tuple[int, ...], Any] = {}
        self.computed: dict[Any, Any] = {}
        init, unwrap_of, cast_of = core.block_type.__init__, core._unwrap_if_constexpr, semantic.cast
        broadcast_of, computation_type_of = semantic.broadcast_impl_value, semantic.computation_type_impl

        def new_tensor(tensor: Any, handle: Any, type: Any) -> None:
            """As ``core.tensor`` does, but a type's shape and size are worked out once."""
            if type.name not in self.shapes:
                shape = type.shape if type.is_block() else ()
                size = 1
                for length in shape:
                    size *= length
                self.shapes[type.name] = core.constexpr(size), core.tuple([core.constexpr(length) for length in shape])
            tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
            tensor.numel, tensor.shape = self.shapes[type.name]

        def new_block_type(block: Any, element_ty: Any, shape: Any) -> None:
            """As ``core.block_type`` does, but a shape is checked, and its name made, once."""
            sizes = tuple([x.value if isinstance(x, core.constexpr) else x for x in shape])
            key = element_ty.name, getattr(element_ty, "address_space", None), sizes
            if key not in self.blocks:
                init(block, element_ty, shape)
                self.blocks[key] = self.sizes.setdefault(sizes, block.shape), block.numel, block.name
            block.element_ty = element_ty
            block.shape, block.numel, block.name = self.blocks[key]

        def same_block_type(block: Any, other: Any) -> bool:
            if not isinstance(other, core.block_type):
                return False
            return (block.shape is other.shape or block.shape.values == other.shape.values) and bool(block.element_ty == other.element_ty)

        def broadcast(rules: Any, lhs: Any, rhs: Any) -> Any:
            """Nothing to do for two blocks of one shape, which is the same object in all of their types, nor for two scalars."""
            if getattr(lhs.type, "shape", None) is getattr(rhs.type, "shape", None):
                return lhs, rhs
            return broadcast_of(rules, lhs, rhs)

        def computation_type(rules: Any, *given: Any) -> Any:
            key = tuple([x.name if isinstance(x, core.dtype) else x for x in given])
            if key not in self.computed:
                self.computed[key] = computation_type_of(rules, *given)
            return self.computed[key]

        plain = frozenset((core.tensor, core.dtype, core.block_type, bool, int, float, str, type(None)))

        def cast(rules: Any, input: Any, dst_ty: Any, *more: Any) -> Any:
            return input if input.type.scalar is dst_ty.scalar else cast_of(rules, input, dst_ty, *more)

        def unwrap(o: Any) -> Any:
            """Most of what it is asked for is no ``constexpr`` and no sequence of them."""
            return o if type(o) in plain else o.value if type(o) is core.constexpr else unwrap_of(o)

        self.cast, self.unwrap = cast, unwrap
        self.new_tensor, self.new_block_type, self.same_block_type = new_tensor, new_block_type, same_block_type
        self.broadcast, self.computation_type = broadcast, computation_type

    def np_dtype(self, dtype: Any) -> Any:
        if dtype.name not in self.dtypes:
            self.dtypes[dtype.name] = self.dtype_of(dtype)
        return self.dtypes[dtype.name]

    def patch_once(self, function: Any) -> Any:
        """It makes ``triton.language`` its own for every launch, and again at every call of a device function, which changes nothing."""
        if function not in self.languages:
            tl = self.interpreter.tl
            self.languages[function] = frozenset(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)
        if self.languages[function] <= self.patched:
            return self.interpreter._LangPatchScope()
        scope, outermost = self.patch(function), not self.patched
        self.patched |= self.languages[function]
        if outermost:
            restore = scope.restore
            scope.restore = lambda: (restore(), self.patched.clear())
        return scope
