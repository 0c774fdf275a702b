"""How operators are differentiated, or refuse to be: by themselves, within dispatch modes and in inference mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from here import BACKENDS
from test_operators import OPTIONS, saved, tensors
from triflash import UnsupportedError, attention, attention_varlen, ops, ops_cache, ops_varlen

pytestmark = pytest.mark.unpoisoned


class Watching(TorchDispatchMode):
    """A dispatch mode as FlopCounterMode is one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def operator_calls(device: torch.device) -> dict[str, tuple[Any, list[Any]]]:
    """Every operator and its arguments, none of which wants a gradient."""
    given, inputs = saved(device)
    q, k, v, bias = inputs
    made = [torch.zeros_like(x) for x in inputs]
    cu = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)
    packed = (
        q[0], k[0], v[0], *[None] * 5, cu, cu, *[None] * 3, None, 0, True, 0.3, "ieee", "padded", "padded", 0.0, 0.0, False, None, None, "tiled",
    )  # fmt: skip
    out, lse, rest = ops_varlen.varlen_forward(*packed)
    cache = (q, k, v, *[None] * 12, None, None, 0.3, "", 0.0, *[None] * 4, "tiled")
    return {
        "forward": (ops.attention_forward, [q, k, v, bias, *OPTIONS]),
        "backward": (ops.attention_backward, [*given, *OPTIONS, [True] * 4]),
        "backward_": (ops.attention_backward_, [*given, *OPTIONS, *made]),
        "backward_two": (ops.attention_backward_two, [*given, *OPTIONS, [True] * 4 + [False, True], bias]),
        "varlen_forward": (ops_varlen.varlen_forward, [*packed]),
        "varlen_backward": (ops_varlen.varlen_backward, [out, None, out, lse, rest, [True] * 3 + [False] * 3, *packed]),
        "varlen_backward_": (ops_varlen.varlen_backward_, [out, out, lse, *[torch.empty_like(x[0]) for x in made[:3]], *packed]),
        "cache_append": (ops_cache.cache_append, [k, v, q[:, :1], q[:, :1], torch.tensor([3], device=device), *[None] * 5, "tiled"]),
        "cache_forward": (ops_cache.cache_forward, [*cache]),
        "cache_forward_out": (ops_cache.cache_forward_out, [*cache, torch.empty_like(q)]),
    }  # fmt: skip


OPERATORS = [
    "forward", "backward", "backward_", "backward_two", "varlen_forward", "varlen_backward", "varlen_backward_", "cache_append", "cache_forward",
    "cache_forward_out",
]  # fmt: skip


def test_no_operator_is_left_out() -> None:
    """But for those of unchecked arguments, which are made of these."""
    all_of_them = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("triflash::")}
    assert all_of_them - {"attention", "attention_varlen"} == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_refuse_forward_mode(name: str, device: torch.device) -> None:
    """By themselves, too, as in the program that ``torch.export`` makes: PyTorch would make tangents 0, or of whatever is in memory."""
    op, arguments = operator_calls(device)[name]
    for at, x in enumerate(arguments):
        if isinstance(x, Tensor) and x.is_floating_point():
            own = op._schema.arguments[at].name

            def of_one(x: Tensor, at: int = at) -> Any:
                return op(*arguments[:at], x, *arguments[at + 1 :])

            with pytest.raises(UnsupportedError, match=f"forward-mode derivatives by {own} "):
                torch.func.jvp(of_one, (x,), (torch.ones_like(x),))
            with forward_ad.dual_level(), pytest.raises(UnsupportedError, match=f"forward-mode derivatives by {own} "):
                of_one(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("name", ["backward", "backward_two", "varlen_backward"])
def test_backward_operators_refuse_derivatives(name: str, device: torch.device) -> None:
    op, arguments = operator_calls(device)[name]
    dout = arguments[0].clone().requires_grad_()
    dq, *_ = op(dout, *arguments[1:])
    with pytest.raises(UnsupportedError, match="second derivative"):
        dq.sum().backward()


@pytest.mark.parametrize("backend", [*BACKENDS, "oracle"])
def test_backward_operators_of_what_wants_gradients(backend: str, device: torch.device) -> None:
    """Whether or not inputs require gradients, an operator gives the same, and so it does within a dispatch mode."""
    _, inputs = saved(device)
    options = (*OPTIONS[:-1], backend)

    def gradients(q: Tensor) -> list[Tensor]:
        with torch.no_grad():
            out, lse, rest = ops.attention_forward(q, *inputs[1:], *options)
        return [
            x.detach() for x in ops.attention_backward(torch.ones_like(out), None, q, *inputs[1:], out, lse, rest, *options, [True] * 4)
        ]

    wanted = gradients(inputs[0])
    assert all(x.abs().sum() > 0 for x in wanted[:4])
    torch.testing.assert_close(gradients(inputs[0].clone().requires_grad_()), wanted, rtol=0, atol=0)
    with Watching():
        torch.testing.assert_close(gradients(inputs[0]), wanted, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(gradients(inputs[0]), wanted, rtol=0, atol=0)
        torch.testing.assert_close(gradients(inputs[0].clone()), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("backend", [*BACKENDS, "oracle"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_within_a_dispatch_mode(packed: bool, backend: str, device: torch.device) -> None:
    """``FlopCounterMode`` is such a mode: the results are those of a call outside."""
    q, k, v, bias = tensors(device)
    cu = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)

    def step() -> tuple[Tensor, ...]:
        if packed:
            out = attention_varlen(q[0], k[0], v[0], cu, bias=bias, causal=True, backend=backend)
        else:
            out = attention(q, k, v, bias=bias, causal=True, backend=backend)
        return out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v, bias))

    wanted = step()
    assert all(x.abs().sum() > 0 for x in wanted)
    with Watching():
        got = step()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cache_append", "cache_forward", "cache_forward_out"])
def test_operators_of_caches_refuse_gradients(name: str, device: torch.device) -> None:
    op, arguments = operator_calls(device)[name]
    arguments[2] = arguments[2].clone().requires_grad_()
    with pytest.raises(UnsupportedError, match=r"gradients of attention_with_kvcache.*triflash\.attention\("):
        op(*arguments)
    with torch.no_grad():
        op(*arguments)
