"""What a plan is made of: a backend and its kernels in order. Called by all of ``plan/`` and ``launch/``. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import UNSET, AttentionSpec, BiasSpec
from ..spec_cache import CacheSpec
from .configs import TileConfig
from .kernels.shared import SMALLEST_BLOCK, HopperConfig

__all__ = ["IN_PYTORCH", "Plan", "Step", "asked_products", "broadcast_rows", "ceil_div", "dbias_source"]

IN_PYTORCH = ("tiled", "oracle")  # backends that launch no kernels of ours


@dataclass(frozen=True)
class Step:
    """One kernel of a plan.

    kernel, config: its name and tile configuration (None: it has none). programs: how many it starts.
    order: which index of the grid varies fastest (see ``kernels/triton/prims.locate``). l2_group: of order ``"heavy"``, programs that are
    ordered so before the next ones are; 0: all. splits: parts that a reduction is cut into.
    gives: the gradients that it computes. precision: of its float32 products. forward_keys: of a block of the forward pass, where a
    backward kernel repeats its rounding. ptx: its kernel may hold PTX. pdl: a programmatic dependent launch,
    which starts while the kernel before it still runs and waits for it by itself. loops: ``"both"``, or of a kernel that is launched for
    each of its loops (``kernels/loops.py``) ``"small"`` or ``"any"``, of which one works and the other leaves at once.
    """

    kernel: str
    config: TileConfig | HopperConfig | None = None
    programs: int = 1
    order: str = "tile"
    splits: int = 1
    gives: tuple[str, ...] = ()
    precision: str = "ieee"
    forward_keys: int = SMALLEST_BLOCK
    ptx: bool = False
    pdl: bool = False
    loops: str = "both"
    l2_group: int = 0

    def __str__(self) -> str:
        alone = "" if self.loops == "both" else f" for {self.loops} lse"
        return self.kernel if self.config is None else f"{self.kernel} {self.config}{alone}"


@dataclass(frozen=True)
class Plan:
    """What will run: a backend and its kernels in order."""

    backend: str
    steps: tuple[Step, ...]

    def step(self, kernel: str) -> Step | None:
        """The step of that kernel, or None if the plan has none."""
        for step in self.steps:
            if step.kernel == kernel:
                return step
        return None


def ceil_div(a: int, b: int) -> int:
    """The least integer that is not below a / b."""
    return -(-a // b)


def asked_products(spec: AttentionSpec | CacheSpec) -> str:
    """How float32 elements are multiplied as the caller asks; where nobody does by FMA units, ``"ieee"``."""
    return "ieee" if spec.dtype != "fp32" or spec.precision == UNSET else spec.precision


def dbias_source(spec: AttentionSpec, bias: BiasSpec) -> str:
    """Which kernel gives the gradient of a bias: a pass that has it anyway, or one of its own.

    The pass for dq meets every ds of a full-shape bias exactly once. The pass for dk and dv meets all queries of a key, which is what
    a bias that varies over keys alone sums over; what is left is one row of partial sums per batch entry and head. With grouped heads the
    portable one sums over several heads, which may have rows of their own.
    """
    *_, query, key = bias.varies
    if all(bias.varies):
        return "dq"
    return "dkdv" if key and not query and spec.groups == 1 else "dbias"


def broadcast_rows(spec: AttentionSpec, bias: BiasSpec | None = None) -> int:
    """Over how many (batch, head) pairs a bias is broadcast; None: the first."""
    bias = bias or spec.bias
    assert bias is not None
    rows = 1
    for size, varies in zip((spec.batch_outer, spec.batch_inner, spec.heads), bias.varies[:3], strict=True):
        rows *= 1 if varies else size
    return rows
