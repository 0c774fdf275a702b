"""How operators are differentiated: once, in reverse mode. Every other derivative is refused by name; PyTorch would leave it out silently.

Called by the rooms of operators, and by those that refuse before they start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function as _single_level
from torch.autograd import forward_ad

from .errors import UnsupportedError

__all__ = ["SECOND_DERIVATIVE", "differentiable", "differentiable_once", "keep_nothing", "refuse_second", "refuse_tangents", "underivable"]

SECOND_DERIVATIVE = (
    "second derivative of attention (create_graph=True, torch.func.hessian): no backend has one; dense attention in PyTorch, such as "
    "torch.nn.functional.scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH), can be differentiated any number of times"
)


class _NoSecondDerivative(torch.autograd.Function):
    """Passes gradients through, tied to what they depend on, so that differentiating them again raises instead of counting as zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *gradients_and_inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in gradients_and_inputs[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(SECOND_DERIVATIVE)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(SECOND_DERIVATIVE)


def differentiable_once(grads: list[Tensor | None], inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients as a backward pass returns them. With ``create_graph=True`` (gradients on) they depend on ``inputs``, visibly."""
    if not torch.is_grad_enabled():
        return tuple(grads)
    tied: tuple[Tensor | None, ...] = _NoSecondDerivative.apply(len(grads), *grads, *inputs)
    return tied


# What says of an operator how it is differentiated: keep, of a context, its arguments and its results, what the backward pass needs; and
# give, of the context, which arguments want a gradient and the gradients of the results, those of all arguments.
Keep = Callable[[Any, tuple[Any, ...], Any], None]
Give = Callable[..., Sequence[Tensor | None]]

_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
_BELOW_VIEWS = torch._C._after_ADInplaceOrView_keyset
_DEVICES = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
_plain: dict[int, bool] = {}  # by the keys of a call, of which there are few sets


def refuse_tangents(given: Sequence[Any], names: Sequence[str]) -> None:
    """Forward-mode derivatives (``torch.func.jvp``, ``jacfwd``, ``linearize``, dual tensors) are refused: they would come out as zero."""
    for name, x in zip(names, given, strict=False):
        if isinstance(x, Tensor) and x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None:
            raise UnsupportedError(
                f"forward-mode derivatives by {name} (torch.func.jvp, jacfwd, linearize, dual tensors): no backend has them; use reverse "
                "mode (torch.func.vjp, jacrev, grad), or differentiate dense attention in PyTorch"
            )


def underivable(library: torch.library.Library, op: Any, body: Callable[..., Any], gradients: str | None = None) -> None:
    """Have an operator that writes into what it is given, or that has no backward pass, refuse forward-mode derivatives, which PyTorch
    leaves out without a word, and gradients in the words given.
    """
    names = [argument.name for argument in op._schema.arguments]
    written = [n for n, argument in enumerate(op._schema.arguments) if argument.alias_info is not None and argument.alias_info.is_write]

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_tangents(args, names)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            output = _below(op, body, keyset, args)
        elif gradients is not None:
            raise UnsupportedError(gradients)
        else:
            with torch.no_grad():
                output = _below(op, body, keyset, args)
        if written and not torch._C._are_functorch_transforms_active():
            plain, there = _is_plain(keyset), [args[at] for at in written if at < len(args)]
            # A dispatch mode calls below autograd what it saw. Tensors of what traces count for themselves.
            counted = [x for x in there if x is not None and (plain or type(x) is Tensor) and not x.is_inference()]
            torch.autograd.graph.increment_version(counted)
        return output

    library.impl(op._schema.name.split("::")[1], kernel, "Autograd", with_keyset=True)


def _is_plain(keyset: Any) -> bool:
    """Whether nobody but a device wants to see a call that autograd has seen."""
    keys = keyset.raw_repr()  # a number: Python compares keys and intersects sets of them in a microsecond
    known = _plain.get(keys)
    if known is None:
        known = _plain[keys] = (keyset & _BELOW_VIEWS).highestPriorityTypeId() in _DEVICES
    return known


def _below(op: Any, body: Callable[..., Any], keyset: Any, args: tuple[Any, ...]) -> Any:
    """The operator below autograd. A body is called without PyTorch's guard, under which backend ``oracle`` could not differentiate."""
    if _is_plain(keyset):
        output = body(*args)
        return tuple(output) if isinstance(output, list) else output  # autograd takes a list for no tensors at all
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & _BELOW_AUTOGRAD, *args)


def differentiable(library: torch.library.Library, op: Any, body: Callable[..., Any], keep: Keep, give: Give) -> None:
    """Make an operator differentiable, once. ``torch.library.register_autograd`` makes the like, which costs a call 6 µs more and which
    transforms of ``torch.func`` that are compiled cannot take apart.
    """

    class Differentiable(torch.autograd.Function):
        """The operator where a gradient is wanted: the dispatch keys, then its arguments in order."""

        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            output = _below(op, body, keyset, args)
            ctx.set_materialize_grads(False)
            keep(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return None, *give(ctx, ctx.needs_input_grad[1:], *grads)

        @staticmethod
        def jvp(ctx: Any, *_: Any) -> Any:
            raise UnsupportedError(
                "forward-mode derivatives of attention: no backend has them; use reverse mode (torch.func.vjp, jacrev, grad)"
            )

    # Less what Function.apply asks of functorch: where an operator gets here, its levels have been told apart.
    apply = super(torch.autograd.Function, Differentiable).apply
    names = [argument.name for argument in op._schema.arguments]

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_tangents(args, names)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            with _single_level() if torch._C._are_functorch_transforms_active() else nullcontext():
                return apply(keyset, *args)
        return _below(op, body, keyset, args)

    library.impl(op._schema.name.split("::")[1], kernel, "Autograd", with_keyset=True)


def keep_nothing(*_: Any) -> None:
    """For a backward pass."""


def refuse_second(*_: Any) -> Any:
    """A backward pass is an operator of its own, which others call too."""
    raise UnsupportedError(SECOND_DERIVATIVE)
