"""Activation checkpointing, whole and selective, and threads: which backend runs a call again, and whether one runs again at all. And hooks
that keep what is saved in their own way."""

from __future__ import annotations

import functools
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import triflash
from here import BACKENDS

pytestmark = pytest.mark.unpoisoned
PAGE = Path(__file__).parent.parent / "docs" / "pytorch.md"


def inputs(device: torch.device) -> list[Tensor]:
    return [torch.randn(2, 5, 2, 8, device=device, requires_grad=True) for _ in range(3)]


def block(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return triflash.attention(q * 2, k * 2, v * 2, causal=True, **options) * 3


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """By ``backward()``: checkpointing by re-entering autograd takes no other way."""
    for x in leaves:
        x.grad = None
    out.square().sum().backward()
    return [x.grad.clone() for x in leaves]  # type: ignore[union-attr]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_saved_may_come_back_in_other_strides(backend: str, packed: bool, device: torch.device) -> None:
    """As columns of what a hook keeps, say; of lse and its rest, too, which nobody else sees."""
    leaves = inputs(device)
    bias = torch.randn(1, 2, 5, 5, device=device, requires_grad=True)
    cu = torch.tensor([0, 5, 10], device=device)

    def call() -> Tensor:
        if packed:
            q, k, v = (x.flatten(0, 1) for x in leaves)
            return triflash.attention_varlen(q, k, v, cu, bias=bias, backend=backend)
        return triflash.attention(*leaves, bias=bias, backend=backend)

    wanted = gradients(call(), [*leaves, bias])
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(torch.stack([x, torch.zeros_like(x)], -1))
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda wide: wide[..., 0]):
        out = call()
    assert kept
    for a, b in zip(gradients(out, [*leaves, bias]), wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_named_backend_holds_where_a_call_is_run_again(reentrant: bool, device: torch.device) -> None:
    leaves = inputs(device)
    wanted = gradients(block(*leaves, backend="oracle"), leaves)
    with triflash.record_launches() as ran:
        out = checkpoint(functools.partial(block, backend="oracle"), *leaves, use_reentrant=reentrant)
        got = gradients(out, leaves)
    assert ran == ["oracle: forward", "oracle: forward", "oracle: backward"]
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_holds_where_it_also_spans_the_backward_pass(reentrant: bool, device: torch.device) -> None:
    """PyTorch tells nobody that a call is run again: what docs/pytorch.md says of blocks."""
    leaves = inputs(device)
    with triflash.record_launches() as ran:
        with triflash.backend("oracle"):
            out = checkpoint(block, *leaves, use_reentrant=reentrant)
        gradients(out, leaves)
    assert ran[0] == "oracle: forward" and not ran[1].startswith("oracle")
    assert ran[-1].startswith("oracle") != reentrant  # the first call's backward pass, or the second one's
    if device.type == "cpu":  # elsewhere autograd has threads of its own
        with triflash.record_launches() as ran, triflash.backend("oracle"):
            gradients(checkpoint(block, *leaves, use_reentrant=reentrant), leaves)
        assert ran == ["oracle: forward", "oracle: forward", "oracle: backward"]


def test_a_named_backend_holds_in_new_threads(device: torch.device) -> None:
    leaves = inputs(device)
    wanted = block(*leaves, backend="oracle")
    seen: list[Any] = []

    def work() -> None:
        with triflash.record_launches() as ran:
            out = block(*leaves, backend="oracle")
        seen.extend((ran, out))

    with triflash.backend("tiled"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen[0] == ["oracle: forward"] and torch.equal(seen[1], wanted)


@pytest.mark.parametrize("policy", ["list", "function"])
def test_selective_checkpointing_keeps_what_the_forward_pass_returned(policy: str, device: torch.device) -> None:
    """A policy is asked about operators: with ours kept, the kernels do not run again."""
    kept = torch.ops.triflash.forward.default

    def choose(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, [kept] if policy == "list" else choose)
    leaves = inputs(device)
    wanted = gradients(block(*leaves, backend="tiled"), leaves)
    with triflash.record_launches() as ran:
        out = checkpoint(functools.partial(block, backend="tiled"), *leaves, use_reentrant=False, context_fn=contexts)
        got = gradients(out, leaves)
    assert ran == ["tiled: forward", "tiled: backward"]
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_selective_checkpointing_compiled(device: torch.device) -> None:
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.triflash.forward.default])

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(functools.partial(block, backend="tiled"), q, k, v, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]

    leaves = inputs(device)
    wanted = gradients(block(*leaves, backend="tiled"), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager_decomp_partition", fullgraph=True)
    with triflash.record_launches() as ran:
        got = gradients(compiled(*leaves), leaves)
    assert ran == ["tiled: forward", "tiled: backward"]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_program_of_the_page_runs() -> None:
    section = re.split(r"^## ", PAGE.read_text().partition("## Checkpointing and threads")[2], flags=re.MULTILINE)[0]
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, Any] = {}
    with triflash.record_launches() as ran:
        exec(compile(program, str(PAGE), "exec"), names)
    assert ran == [f"tiled: {name}" for name in ("forward", "forward", "backward", "forward", "backward")]
    assert names["q"].grad is not None
