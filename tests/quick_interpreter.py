"""Triton's interpreter without the work whose results it throws away, which was most of what the interpreted tests cost. No result changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def quick_interpreter() -> Iterator[None]:
    """Triton's interpreter does some things once that it did over and over."""
    from triton.language import core
    from triton.runtime import interpreter

    quick = InterpreterParts(interpreter, core)
    with (
        mock.patch.object(interpreter, "_patch_lang", quick.patch_once),
        mock.patch.object(interpreter, "_get_np_dtype", quick.np_dtype),
        mock.patch.object(core.tensor, "__init__", quick.new_tensor),
        # For every sum of integers it works out whether they overflow, to assert that they do not if "debug" is on, which it is not.
        mock.patch.object(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False)),
    ):
        yield


class InterpreterParts:
    """What replaces parts of the interpreter."""

    def __init__(self, interpreter: Any, core: Any) -> None:
        self.interpreter, self.core = interpreter, core
        self.patch, self.dtype_of = interpreter._patch_lang, interpreter._get_np_dtype
        self.patched: set[int] = set()
        self.languages: dict[Any, frozenset[int]] = {}
        self.dtypes: dict[str, Any] = {}
        self.shapes: dict[str, tuple[Any, Any]] = {}

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

        self.new_tensor = new_tensor

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
