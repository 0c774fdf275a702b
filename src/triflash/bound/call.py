"""One call of attention, bound: its forward pass, and its backward passes as they come. Called by ``door.py`` and ``ops*.py``."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import launch
from ..form import Form
from ..launch.calls import Call
from ..launch.room import META, Described, meta, twin
from ..plan.device import DeviceFacts
from ..plan.select import NO_CHOICES, Plan, current_choices, plan_backward, plan_forward
from ..plan.steps import IN_PYTORCH
from ..spec import AttentionSpec, Gradients, Needs, Operands, Saved
from .cache import Recent
from .compare import address, comparison_of
from .passes import BoundPass

__all__ = ["BoundCall"]

_BACKWARD_PASSES = 16  # kept for one call's signature: by the gradients asked for and the strides of what comes back
_RESULT, _TOGETHER, _SCRATCH = "results", "one result with rest", "scratch"  # what lse is to a forward pass
_ALIGNED = 64  # numbers: 256 bytes
_KNOWN = 4  # kinds of backward passes that one C function each tells, of the same gradients
GRADIENTS = (0, 1, 2, 3, 7, 13)  # the operands that have one: q, k, v, bias, sink, second bias

Given = Sequence[Tensor | None]


@functools.lru_cache(maxsize=256)
def _places_of(there: tuple[bool, ...]) -> tuple[list[int], list[int | None]]:
    """The places of the operands that are there, and of each gradient the place, among these, of what it belongs to. To be read only."""
    places = [at for at, own in enumerate(there) if own]
    return places, [places.index(at) if at in places else None for at in GRADIENTS]


class BoundCall:
    """What calls of one signature do.

    differentiated: of each gradient the place, among the tensors that are there, of what it belongs to.

    Args:
        form: the layout of the tensors given.
        given: these, as meta tensors, in the order of :class:`~triflash.spec.Operands`.
        spec: the problem. facts: of the device. backend: the one asked for. device: where the tensors are.
        by_operator: gives the gradients by an operator, where something wants to see one; None: ``triflash::backward`` does.
        operands: the canonical ones of ``given``, if whoever calls has them.
    """

    stamp = 0

    def __init__(
        self,
        form: Form,
        given: Given,
        spec: AttentionSpec,
        facts: DeviceFacts,
        backend: str,
        device: torch.device,
        by_operator: Callable[..., list[Tensor | None]] | None = None,
        operands: Operands | None = None,
    ) -> None:
        self.by_operator = by_operator
        self._operands = operands
        self.form, self.given, self.spec, self.facts, self.backend, self.device = form, tuple(given), spec, facts, backend, device
        self._gpu = facts.arch not in ("cpu", "interpreter")
        self._backward: Recent[BoundPass] = Recent(_BACKWARD_PASSES)
        self._places, self.differentiated = _places_of(tuple([x is not None for x in given]))
        self._count = len(self._places)
        self._there = [x for x in given if x is not None]
        self._plan = plan_forward(spec, facts, backend)
        self._kept_as: tuple[tuple[Tensor, Tensor], Saved] | None = None  # the meta tensors of :attr:`kept`, as given and canonical

    @functools.cached_property
    def forward(self) -> BoundPass:
        """The forward pass, whose results are out, lse and, if the spec keeps it, rest."""
        return self._bind_forward(self._plan, _RESULT)

    @functools.cached_property
    def kept(self) -> BoundPass:
        """The forward pass where the backward pass alone wants lse and rest, if the spec keeps it: they are one result, of one dim."""
        fits = self.spec.keeps_rest and self._plan.backend not in IN_PYTORCH
        return self._bind_forward(self._plan, _TOGETHER) if fits else self.forward

    @functools.cached_property
    def alone(self) -> BoundPass:
        """The forward pass where nobody wants lse and rest: they are scratch, which takes one allocation less and ends with the pass."""
        return self.forward if self._plan.backend in IN_PYTORCH else self._bind_forward(self._plan, _SCRATCH)

    def _bind_forward(self, plan: Plan, lse_is: str) -> BoundPass:
        spec, form = self.spec, self.form
        room = Described(self._gpu)
        room.give(*self.given)
        sum_dtype = torch.float64 if spec.dtype == "fp64" else torch.float32
        out = torch.empty((spec.batch, spec.queries, spec.heads, spec.value_dim), dtype=spec.tensor_dtype, device=META)
        rows = (spec.batch, spec.heads, spec.queries)
        given_out = room.result("out", form.out_of(out))
        rest: Tensor | None
        if lse_is == _SCRATCH:
            lse = room.new("lse", rows, sum_dtype)
            rest = room.new("rest of lse", rows, torch.float32) if spec.keeps_rest else None
        elif lse_is == _TOGETHER:
            both = torch.empty(2 * self._room_of_lse, dtype=torch.float32, device=META)
            lse, rest = self._parts(room, room.result("lse and rest of lse", both), *self._apart(both))
            self._kept_as = (given_out, both), Saved(out, lse, rest)
        else:
            lse = torch.empty(rows, dtype=sum_dtype, device=META)
            rest = torch.empty(rows, dtype=torch.float32, device=META) if spec.keeps_rest else None
            room.result("lse", form.lse_of(lse))
            if rest is not None:
                room.result("rest of lse", rest)
        calls = None
        if plan.backend not in IN_PYTORCH:
            calls = launch.forward_calls(room, plan, spec, self._operands_of(self.given, room), Saved(out, lse, rest))
        elif plan.backend == "oracle":
            room.mention("every score in float64, several times", spec.batch * spec.heads * spec.queries * spec.keys * 8)

        def aside(tensors: Given) -> None:
            count = len(self.given)
            results = tensors[count:]
            if lse_is == _SCRATCH:
                (out,) = results
                assert out is not None
                lost = out.new_empty(rows, dtype=torch.float32) if spec.keeps_rest else None
                saved = Saved(form.rows("out", out), out.new_empty(rows, dtype=sum_dtype), lost)
            else:
                saved = self.saved(results)
            launch.run_forward(plan, spec, form.operands(tensors[:count]), saved)

        return BoundPass(plan, spec, room, calls, aside, self.device, None if lse_is == _SCRATCH else self._calls_of_backward)

    def _operands_of(self, given: Given, room: Described) -> Operands:
        """The canonical operands of meta tensors, which are :attr:`given` or others like these."""
        if given is not self.given or self.form.folds:
            return self.form.operands(given, room.contiguous)
        if self._operands is None:
            self._operands = self.form.operands(given)
        if self.form.tensors == 3:
            _tell_of_views(room, given[:5], self._operands)
        return self._operands

    def _parts(self, room: Described, both: Tensor, lse: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """lse and rest of a result that is both."""
        return room.part(both, lse, 0), room.part(both, rest, 4 * self._room_of_lse)

    def _calls_of_backward(self, given: Given) -> list[Call]:
        """The launches of the backward pass that will be asked for: where these tensors require gradients."""
        needs = [at < len(given) and (x := given[at]) is not None and x.requires_grad for at in GRADIENTS]
        return (self._usual_backward(needs).calls or []) if any(needs) else []

    @property
    def _room_of_lse(self) -> int:
        """The numbers from where lse begins to where rest does, where both are one tensor: each as well aligned as memory of its own."""
        spec = self.spec
        return -(-spec.batch * spec.heads * spec.queries // _ALIGNED) * _ALIGNED

    def _apart(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """lse and rest ``(B, H, M)`` of what :attr:`kept` gives; views. Hooks on saved tensors may hand it back with another stride."""
        spec, (each,) = self.spec, both.stride()
        rows, begin, apart = (spec.batch, spec.heads, spec.queries), int(both.storage_offset()), each * self._room_of_lse
        strides = (each * spec.heads * spec.queries, each * spec.queries, each)
        return both.as_strided(rows, strides, begin), both.as_strided(rows, strides, begin + apart)

    def separate(self, results: Given) -> Given:
        """out, lse and, where it was kept, rest, as :attr:`forward` gives them, of what it or :attr:`kept` gave."""
        out, both = results[:2]
        if both is None or both.dim() > 1:
            return results
        lse, rest = self._apart(both)
        return out, self.form.lse_of(lse), rest

    def saved(self, results: Given) -> Saved:
        """The same in canonical form."""
        out, lse, *rest = self.separate(results)
        assert out is not None and lse is not None
        return Saved(self.form.rows("out", out), self.form.lse("lse", lse), rest[0] if rest else None)

    def run_forward(self, given: Given) -> list[Tensor]:
        """out and lse in the caller's layout and, if the spec keeps it, rest ``(B, H, M)``. Missing tensors may be left out."""
        there: Sequence[Any] = given if len(given) == self._count else [x for x in given if x is not None]
        return self.forward.run(there, there[0])

    def run_kept(self, given: Given) -> list[Tensor]:
        """out in the caller's layout, and what the backward pass wants of lse: as :attr:`kept` gives it."""
        there: Sequence[Any] = given if len(given) == self._count else [x for x in given if x is not None]
        return self.kept.run(there, there[0])

    def run_alone(self, given: Given) -> Tensor:
        """out alone."""
        there: Sequence[Any] = given if len(given) == self._count else [x for x in given if x is not None]
        return self.alone.run(there, there[0])[0]

    def run_backward(
        self, given: Given, saved: Given, dout: Tensor, dlse: Tensor | None, needs: tuple[bool, ...], into: Given | None = None
    ) -> list[Tensor | None]:
        """The gradients of q, k, v (as they are packed), bias, sink and second bias; None where they are not needed.

        Args:
            given: as the forward pass had them; their strides may have changed (hooks that offload what is saved).
            saved: what the forward pass gave: out, lse and, where there is one, rest, or out and both in one. dout, dlse: in the layouts
                of out and lse.
            needs: of each gradient whether it is needed. into: tensors to fill, in the form given; None: new ones.
        """
        tensors = (*given, *saved, dout, dlse, *(() if into is None else into))
        there = [x for x in tensors if x is not None]
        addresses = [*map(address, there)]
        bound = self._backward_of(tensors, there, addresses, len(saved), needs, into is not None)
        made = iter(bound.run(there, dout, addresses))
        return [] if into is not None else [next(made) if need else None for need in needs]

    def run_known_backward(self, wants: tuple[bool, ...], there: tuple[Tensor, ...]) -> tuple[Tensor | None, ...] | None:
        """The gradients where ``wants``, of two that are no tensors and the operands, says so, None elsewhere, by the pass that
        :meth:`remember_backward` was told of for tensors like these. None: nothing is known of such.
        """
        for check, bound, behind in self._backward.near.get((wants, len(there)), ()):
            if check(*there):
                addresses = [*map(address, there)]
                if functools.reduce(operator.or_, addresses) & 15 or current_choices() is not NO_CHOICES:
                    return None
                bound.stamp = self._backward.now
                grads = bound.run(there, there[-1], addresses)
                if behind is not None:
                    return None, None, *grads, *behind
                made = iter(grads)
                return tuple([next(made) if want else None for want in wants])
        return None

    def given_of(self, there: Sequence[Tensor]) -> Given:
        """All operands, of those that are there."""
        given: list[Tensor | None] = [None] * len(self.given)
        for at, x in zip(self._places, there, strict=True):
            given[at] = x
        return given

    @property
    def backward_passes(self) -> int:
        """How many are bound."""
        return len(self._backward)

    def remember_backward(self, wants: tuple[bool, ...], there: tuple[Tensor, ...], saved_count: int, needs: tuple[bool, ...]) -> None:
        """Let backward passes for such tensors, the operands, what was saved and dout, be told by one C function.

        wants: stands for needs. Nothing is remembered of addresses that are no multiples of 16, where configurations are chosen, or of more
        kinds than few.
        """
        key = wants, len(there)  # which differs by whether lse and rest are one
        known = self._backward.near.get(key, ())
        if len(known) >= _KNOWN or current_choices() is not NO_CHOICES:
            return
        addresses = [*map(address, there)]
        check = None if any(each & 15 for each in addresses) else comparison_of(there)
        if check is not None:
            tensors = (*self.given_of(there[: self._count]), *there[self._count :], None)
            bound = self._backward_of(tensors, there, addresses, saved_count, needs, False)
            first, behind = wants[2 : 2 + sum(wants)], (None,) * (len(wants) - 2 - sum(wants))
            self._backward.near[key] = (*known, (check, bound, behind if all(first) else None))

    def bound_backward(self, tensors: Given, saved_count: int, needs: tuple[bool, ...]) -> BoundPass:
        """The backward pass for such tensors: the operands, what was saved, dout and dlse."""
        there = [x for x in tensors if x is not None]
        return self._backward_of(tensors, there, [*map(address, there)], saved_count, needs, False)

    def _backward_of(
        self, tensors: Given, there: Sequence[Tensor], addresses: Sequence[int], saved_count: int, needs: tuple[bool, ...], into: bool
    ) -> BoundPass:
        """The backward pass for tensors, of which these are there, at these addresses."""
        strides = tuple(map(_strides, there))
        aligned = tuple([each & 15 for each in addresses]) if functools.reduce(operator.or_, addresses) & 15 else None
        # Operands are always the same of them, and gradients those that are needed.
        without_dlse = tensors[len(self.given) + saved_count + 1] is None
        key = (needs, into, saved_count, without_dlse, current_choices(), strides, aligned)
        bound = self._backward.get(key)  # strides and alignment may change between a forward pass and its backward pass
        if bound is None:
            bound = self.bind_backward(tensors, saved_count, needs, into, strides if aligned is None else None)
            self._backward.add(key, bound)
        return bound

    def bind_backward(
        self, tensors: Given, saved_count: int, needs: Sequence[bool], into: bool, strides: tuple[Any, ...] | None = None
    ) -> BoundPass:
        """The backward pass for tensors of such layouts: the operands, what was saved, dout, dlse, and if ``into`` the gradients.

        strides: of those that are there, where all addresses are multiples of 16 bytes.
        """
        spec, form = self.spec, self.form
        room = Described(self._gpu)
        count = len(self.given)
        behind = count + saved_count + 2
        kept = self._kept_as
        if strides is not None and kept is not None and saved_count == 2 and self._lie_as_forward(strides, kept[0]):
            # Meta tensors are made in microseconds each: those of the forward pass will do.
            given, (out, both), saved = self.given, *kept
            twins = [None if x is None else twin(x) for x in tensors[behind - 2 :]]
            room.give(*given, out, both, *twins)
            assert saved.rest is not None
            self._parts(room, both, saved.lse, saved.rest)
        else:
            all_twins = [None if x is None else twin(x) for x in tensors]
            room.give(*all_twins)
            given, twins = tuple(all_twins[:count]), all_twins[behind - 2 :]
            saved = self.saved(all_twins[count : behind - 2])
        dout, dlse, *grads = twins
        assert dout is not None
        if not into:
            grads = self._new_gradients(room, given, needs)
        written = self._gradients(grads)
        if not (into or self.form.folds) and self.form.tensors == 3:
            _tell_of_views(room, grads[:4], written)
        copy = room.contiguous
        plan = plan_backward(spec, self.needs(needs), self.facts, self.backend)
        calls = None
        if plan.backend not in IN_PYTORCH:
            rows = form.rows("dout", dout, copy)
            dlse = None if dlse is None else form.lse("dlse", dlse, copy)
            calls = launch.backward_calls(room, plan, spec, self._operands_of(given, room), saved, rows, dlse, written)
        elif plan.backend == "tiled":
            _mention_tiled(room, spec, written)

        def aside(tensors: Given) -> None:
            saved = self.saved(tensors[count : count + saved_count])
            dout, dlse = tensors[behind - 2 : behind]
            assert dout is not None
            dlse = None if dlse is None else form.lse("dlse", dlse)
            results = iter(tensors[behind:])
            written = self._gradients([next(results) if need or into else None for need in needs])
            launch.run_backward(plan, spec, form.operands(tensors[:count]), saved, form.rows("dout", dout), dlse, written)

        return BoundPass(plan, spec, room, calls, aside, self.device)

    def _lie_as_forward(self, strides: tuple[Any, ...], results: Sequence[Tensor]) -> bool:
        """Whether tensors of which the first have such strides, at multiples of 16 bytes, lie as those that the forward pass was given and
        gave.
        """
        own = tuple(map(_strides, (*self._there, *results)))
        return strides[: len(own)] == own and not any(map(address, self._there))

    def describe_backward(self, needs: Needs) -> BoundPass:
        """The backward pass that gives such gradients, for an output gradient that lies as out does, and none of lse."""
        return self._usual_backward((needs.dq, needs.dk, needs.dv, needs.dbias, needs.dsink, needs.dsecond))

    def _usual_backward(self, needs: Sequence[bool]) -> BoundPass:
        results = [meta(each.shape, each.strides, each.dtype) for each in self.kept.room.allocations if each.use == "result"]
        return self.bind_backward((*self.given, *results, twin(results[0]), None), len(results), needs, into=False)

    def needs(self, needs: Sequence[bool]) -> Needs:
        """The gradients of canonical operands that are needed, from those of what was given."""
        q, k, v, bias, sink, second = needs
        if self.form.tensors == 2:
            v = k
        elif self.form.tensors == 1:
            k = v = q
        return Needs(q, k, v, bias, sink, second)

    def _new_gradients(self, room: Described, given: Given, needs: Sequence[bool]) -> list[Tensor | None]:
        """Meta tensors for the gradients needed, each with its operand's strides where these leave no gaps, as autograd likes them."""
        made: list[Tensor | None] = []
        for name, at, need in zip(("dq", "dk", "dv", "dbias", "dsink", "dsecond"), GRADIENTS, needs, strict=True):
            x = given[at] if at < len(given) else None
            if not need or x is None:
                made.append(None)
                continue
            like = torch.empty(x.shape, dtype=x.dtype, device=META)
            if at < 3 and not self.form.contiguous and not x.is_contiguous() and _leaves_no_gaps(x):
                dense = meta(x.shape, x.stride(), x.dtype)
                like = dense if self._folds(name, dense) else like
            made.append(room.result(name, like))
        return made

    def _folds(self, name: str, like: Tensor) -> bool:
        """Whether kernels can write such a gradient: rows whose last dim is contiguous, and batch dims that fold without a copy."""
        rows = self.form.rows(name, like) if self.form.tensors == 3 or like.dim() == 4 else like
        return rows.untyped_storage()._cdata == like.untyped_storage()._cdata and (rows.stride(-1) == 1 or rows.shape[-1] == 1)

    def _gradients(self, grads: Given) -> Gradients:
        """Gradients in the form given as the kernels write them: views."""
        q, k, v, bias, sink, second = grads
        form = self.form
        if form.tensors == 2:
            k, v = (None, None) if k is None else k.unbind(2)
        elif form.tensors == 1:
            q, k, v = (None, None, None) if q is None else q.unbind(2)
        dq, dk, dv = (None if x is None else form.rows(name, x) for name, x in (("dq", q), ("dk", k), ("dv", v)))
        dbias, dsecond = (None if x is None else form.bias(x) for x in (bias, second))
        return Gradients(dq, dk, dv, dbias, sink, dsecond)


def _tell_of_views(room: Described, given: Given, views: Given) -> None:
    """Which of these tensors the views are of, that begin where they do."""
    for x, view in zip(given, views, strict=False):
        if view is not x and x is not None and view is not None:
            room.part(x, view, 0)


_strides: Callable[[Tensor], tuple[int, ...]] = torch._C.TensorBase.stride


def _leaves_no_gaps(x: Tensor) -> bool:
    """Whether x's elements fill its memory, each place once."""
    size = 1
    for stride, own in sorted((stride, own) for stride, own in zip(x.stride(), x.shape, strict=True) if own != 1):
        if stride != size:
            return False
        size *= own
    return True


def _mention_tiled(room: Described, spec: AttentionSpec, grads: Gradients) -> None:
    """What the backward pass in PyTorch allocates beside its results."""
    rows, itemsize = spec.batch * spec.heads * spec.queries, 8 if spec.dtype == "fp64" else 4
    room.mention("delta", rows * itemsize)
    if grads.dsink is not None:
        room.mention("probabilities of the sink", rows * itemsize)
    for name, grad in (("dq", grads.dq), ("dbias", grads.dbias), ("dsecond", grads.dsecond)):
        if grad is not None and grad.dtype in (torch.float16, torch.bfloat16):
            room.mention(f"float32 sum of {name}", grad.numel() * 4)
