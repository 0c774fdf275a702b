"""Records: named values of which a kernel passes one instead of forty. Used by the kernels of both folders."""

import triton
import triton.language as tl
from triton import knobs
from triton.language.core import _aggregate, base_value

__all__ = ["record"]


@triton.constexpr_function
def _wrapped(value):
    """A constant as one again: Triton 3.6 unwraps those among a constructor's arguments, inside tuples too."""
    if isinstance(value, tl.tuple):
        return tl.tuple([_wrapped(x) for x in value.values])
    return value if isinstance(value, base_value) else tl.constexpr(value)


@triton.constexpr_function
def _init(self, *values):
    for name, value in zip(self.NAMES, values, strict=True):
        setattr(self, name, _wrapped(value))


def _plain_init(self, *values):
    for name, value in zip(self.NAMES, values, strict=True):
        setattr(self, name, value)


def record(cls):
    """A class whose constructor takes a value for each annotated field, in that order: constants stay constants, None stays None (absent).

    A value may be a record or a tuple, but no tuple with None in it, which Triton 3.6 cannot hand to a constructor. Methods run on the
    device; Triton's interpreter cannot call them, so that only Gluon's kernels have any.
    """
    cls.NAMES = tuple(cls.__annotations__)
    if knobs.runtime.interpret:
        cls.__init__ = _plain_init
        return cls
    cls.__init__ = _init
    made = _aggregate(cls)
    made.NAMES = cls.NAMES
    return made
