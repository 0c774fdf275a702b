"""``torch.compile`` as the bench uses it, for FlexAttention and for the compiled providers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

__all__ = ["compiled", "forget"]

BACKEND = "inductor"


def compiled(function: Callable[..., Any], fullgraph: bool = False) -> Callable[..., Any]:
    """The function compiled for fixed shapes, with a backward pass that may run more than once."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # bwd is timed with retain_graph=True
    return torch.compile(function, dynamic=False, fullgraph=fullgraph, backend=BACKEND)


def forget() -> None:
    """Drop compiled code, if there is any: every cell compiles anew, and would soon reach the limit of recompilations."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
