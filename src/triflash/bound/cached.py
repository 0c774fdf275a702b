"""One call on a KV cache, bound. Called by ``door_cache.py`` and ``ops_cache.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..launch.cache import append_new, cache_calls, run_cache
from ..launch.room import Described
from ..plan.cache import plan_cache
from ..plan.device import DeviceFacts
from ..plan.steps import IN_PYTORCH
from ..spec_cache import CacheOperands, CacheSpec
from .passes import BoundPass

__all__ = ["BoundCache"]

Given = Sequence[Tensor | None]
_OPERANDS = len(CacheOperands._fields)
_Q = CacheOperands._fields.index("q")


class BoundCache:
    """What calls of one signature do.

    Args:
        given: meta tensors: the fields of :class:`~triflash.spec_cache.CacheOperands`, k_new, v_new and, if the caller gives it, out.
        spec: the problem. facts: of the device. backend: the one asked for. device: where the tensors are.
        alone: nobody wants lse. attends: False only writes new keys.
    """

    stamp = 0

    def __init__(
        self,
        given: Given,
        spec: CacheSpec,
        facts: DeviceFacts,
        backend: str,
        device: torch.device,
        alone: bool = False,
        attends: bool = True,
    ) -> None:
        self.spec, self.facts, self.backend, self.device = spec, facts, backend, device
        plan = plan_cache(spec, facts, backend)
        appends = given[_OPERANDS] is not None
        steps = tuple(step for step in plan.steps if (appends if step.kernel == "append" else attends))
        self.plan = plan = replace(plan, steps=steps)
        self.has_out = given[_OPERANDS + 2] is not None
        self._alone, self._attends = alone, attends
        room = Described(facts.arch not in ("cpu", "interpreter"))
        room.give(*given)
        q = given[_Q]
        assert q is not None
        x = CacheOperands._make(given[:_OPERANDS])
        shape, rows = (*q.shape[:-1], spec.value_dim), lse_shape(q)
        wide = torch.float64 if spec.dtype == "fp64" else torch.float32
        out, lse = given[_OPERANDS + 2], torch.empty(rows, dtype=wide, device="meta")
        if attends and out is None:
            out = room.result("out", torch.empty(shape, dtype=q.dtype, device="meta"))
        in_pytorch = plan.backend in IN_PYTORCH
        if attends and not alone:
            room.result("lse", lse)
        elif attends and not in_pytorch:
            lse = room.new("lse", rows, wide)
        elif attends:
            room.mention("lse", torch.Size(rows).numel() * wide.itemsize)
        if attends and plan.backend == "oracle":
            pairs = spec.heads * spec.capacity * (q.shape[0] if spec.packed_queries else spec.requests * spec.queries)
            room.mention("every score in float64, several times", pairs * 8)
        calls = None
        if not in_pytorch:
            results = (out, lse) if attends and out is not None else None
            calls = cache_calls(room, plan, spec, x, (given[_OPERANDS], given[_OPERANDS + 1]), results)
        self.bound = BoundPass(plan, spec, room, calls, self._aside, device)

    def _aside(self, tensors: Given) -> None:
        x = CacheOperands._make(tensors[:_OPERANDS])
        k_new, v_new, out, *results = tensors[_OPERANDS:]
        if k_new is not None and v_new is not None:
            append_new(self.plan, self.spec, x, k_new, v_new)
        if not self._attends:
            return
        if out is None:
            out, *results = results
        wide = torch.float64 if self.spec.dtype == "fp64" else torch.float32
        lse = results[0] if results else x.q.new_empty(lse_shape(x.q), dtype=wide)
        assert out is not None and lse is not None
        run_cache(self.plan, self.spec, x, out, lse)

    def run(self, given: Given) -> list[Tensor]:
        """Carry it out; gives what it allocated of out and lse."""
        return self.bound.run([x for x in given if x is not None], given[_Q])  # type: ignore[arg-type]


def lse_shape(q: Tensor) -> tuple[int, ...]:
    """``(B, Hq, Mq)``, or ``(Hq, Tq)`` of packed queries."""
    return (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
