"""``torch.compile`` as the bench uses it, for FlexAttention and for the compiled providers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

__all__ = ["compiled", "forget"]

BACKEND = "inductor"


def compiled(function: Callable[..., Any], fullgraph: bool = False) -> Callable[..., Any]:
    """The function compiled for fixed shapes, with a backward pass that may run more than once."""
    import torch
    from torch._functorch import config

    config.donated_buffer = False  # bwd is timed with retain_graph=True
    # The gradient of an output lies as the output does, here as in models. Before it knew that, PyTorch made it contiguous in each step;
    # and cuDNN's backward pass, which is kept by the layouts of q, k and v alone, read it as it had read others before.
    if hasattr(config, "guess_tangent_strides_as_outputs"):
        config.guess_tangent_strides_as_outputs = True
    return torch.compile(function, dynamic=False, fullgraph=fullgraph, backend=BACKEND)


def forget() -> None:
    """Drop compiled code, if there is any: every cell compiles anew, and would soon reach the limit of recompilations."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
