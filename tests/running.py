"""``run_case`` computes a case on a backend, judges every result by the tolerance rule, and asserts that exactly the kernels ran that were
asked for.

A backend is one of the package's own or ``stand-in``: ``hopper`` on the CPU's stand-in for such a GPU (``gluon_twin.py``).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import triflash
from cases import Case, Inputs, build, fill_hidden, hidden_of
from expected import (
    Configs,
    expected_launches,
    is_to_add_dq,
    is_unsupported,
    kernels,
    lse_may_be_large,
    once,
    sums_dq_by_pairs,
    what_hopper_gives,
    with_mask_bounds,
)
from here import ON_HOPPER
from judging import HOPPER, judge
from triflash import tiled
from triflash.bound import signature
from triflash.bound.signature import CALLS
from triflash.cli.bench.tolerance import assert_close
from triflash.plan import select
from triflash.plan.configs import TileConfig
from triflash.plan.device import facts_of
from triflash.plan.kernels import loops
from triflash.plan.kernels.dkdv import DkdvConfig
from triflash.plan.kernels.forward import ForwardConfig
from triflash.plan.override import override_configs

FEW_SMS = 3  # what a persistent grid is made to believe in, so that a program gets several tiles of a small problem
KERNELS = ("forward", "delta", "dkdv", "dq", "dbias")


def attend(case: Case, inputs: Inputs, backend: str, raw: bool = False) -> tuple[Tensor, Tensor | None]:
    """out and, from the raw operator, lse."""
    q, k, v, bias = inputs.q, inputs.k, inputs.v, inputs.bias
    if case.is_raw or raw:
        x = inputs.operands()
        options = (case.batch_inner, *case.band, case.softmax_scale, "", "hopper" if backend == "stand-in" else backend)
        return torch.ops.triflash.forward(*x[:4], *options, *x[4:9], case.softcap, case.dropout, False, *x[13:], case.shift)[:2]
    with triflash.backend(backend):
        return triflash.flash_attn_func(q, k, v, bias, case.causal, case.scale), None


@contextlib.contextmanager
def small_tiles(tiles: tuple[int, int] | None, backend: str = "") -> Iterator[None]:
    """Run every kernel, and the tiled backend, with these tiles, so that boundaries are reached at small sizes.

    Hopper's come as near as its hardware allows: 64 queries a consumer, of which there are two for wide tiles.
    """
    if tiles is None:
        yield
        return
    if backend in HOPPER:
        with override_configs(forward=ForwardConfig(1 if tiles[0] <= 32 else 2, tiles[1], 2), dqdkdv=DkdvConfig(1, 1)), few_sms():
            yield
        return
    config = TileConfig(*tiles, num_warps=4, num_stages=1)
    with override_configs(**dict.fromkeys(KERNELS, config)), mock.patch.object(tiled, "tile_size", lambda _: tiles[1]):
        yield


@contextlib.contextmanager
def few_sms(count: int = FEW_SMS) -> Iterator[None]:
    """Plans are made for a device like this one with so many SMs."""
    facts = functools.cache(lambda device: replace(facts_of(device), sms=count))
    with mock.patch.object(signature, "facts_of", facts):
        yield


@contextlib.contextmanager
def planned_with(room: ModuleType, **constants: Any) -> Iterator[None]:
    """Within it a module of ``plan/`` has other constants, and no call is known that was planned before; nor one of these behind it."""

    def forget() -> None:
        CALLS.clear()
        select._plan_forward.cache_clear()
        select._plan_backward.cache_clear()

    forget()
    with mock.patch.multiple(room, **constants):
        yield
    forget()


def loops_apart() -> AbstractContextManager[None]:
    """Within it Hopper's kernels of two loops are launched for each of them, however short they are."""
    return planned_with(loops, LONG=0.0)


@contextlib.contextmanager
def on_backend(
    case: Case, backend: str, configs: Configs, sms: int | None = None, seed: int = 0, rowwise: bool = True, small_lse: bool = True
) -> Iterator[list[str]]:
    """Where a case runs: with the configurations given, or without any with ``small_tiles``; the record of what is launched.

    sms: that a device of Hopper's is believed to have. seed, rowwise, small_lse: of the stand-in (``gluon_twin.twin_device``).
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(override_configs(**configs) if configs else small_tiles(case.tiles, backend))
        if backend == "stand-in":  # last, so that it says what the device is
            import gluon_twin

            stack.enter_context(gluon_twin.twin_device(sms or FEW_SMS, seed, rowwise, small_lse))
        elif sms is not None:
            stack.enter_context(few_sms(sms))
        yield stack.enter_context(triflash.record_launches())


def results_of(
    case: Case, inputs: Inputs, backend: str, configs: Configs | None = None, carefully: bool = False, **device: Any
) -> tuple[list[dict[str, Tensor]], list[str]]:
    """out, lse (from the operator alone) and every gradient asked for, by name; and the record of launches. device: see ``on_backend``.

    With configurations and on the stand-in by the operator, else by the seed's functions if they can. carefully: if an lse might be
    large, the stand-in computes the gradients once more as if one were.
    """
    configs, wanted = configs or {}, inputs.wanted()
    twice = backend == "stand-in" and carefully and bool(wanted) and lse_may_be_large(case, inputs)
    with on_backend(case, backend, configs, **device) as ran:
        out, lse = attend(case, inputs, backend, is_raw_on(backend, configs))
        outputs, cotangents = ([out], [inputs.dout]) if inputs.dlse is None else ([out, lse], [inputs.dout, inputs.dlse])
        grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents, retain_graph=twice) if wanted else ()
    results = {"out": out.detach()} if lse is None else {"out": out.detach(), "lse": lse.detach()}
    found = [results | named_gradients(wanted, grads)]
    if twice:
        with on_backend(case, backend, configs, small_lse=False, **device) as again:
            grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents)
        assert again == ran[1:]
        found.append(named_gradients(wanted, grads))
    return found, ran


def named_gradients(letters: Iterable[str], grads: Iterable[Tensor]) -> dict[str, Tensor]:
    return {"d" + letter: grad for letter, grad in zip(letters, grads, strict=True)}


def is_raw_on(backend: str, configs: Configs) -> bool:
    return backend == "stand-in" or bool(configs)


def assert_right(case: Case, inputs: Inputs, *results: dict[str, Tensor], backend: str = "") -> None:
    """What was computed, by name, has the dtype, the shape and the values that it must have."""
    judgements, wanted = judge(case, inputs, backend), inputs.wanted()
    dtypes = {"out": case.dtype, "lse": torch.float64 if case.dtype == torch.float64 else torch.float32}
    dtypes |= {"d" + letter: x.dtype for letter, x in wanted.items()}
    for name, x in itertools.chain.from_iterable(each.items() for each in results):
        assert x.dtype == dtypes[name] and x.shape == judgements[name].reference.shape, name
        assert_close(name, x, judgements[name])


def assert_launched(case: Case, inputs: Inputs, backend: str, configs: Configs, ran: list[str]) -> None:
    """The kernels that must run did, and no other, with the configurations given."""
    on_hopper = backend in (*HOPPER, "auto")
    by_pairs = on_hopper and sums_dq_by_pairs(case, inputs, configs)
    adds = by_pairs or (on_hopper and is_to_add_dq(case, inputs, is_raw_on(backend, configs), configs))
    lines = once(ran)
    launched = [" ".join(line.split()[:2]) for line in lines]
    expected = expected_launches(case, backend, inputs, adds)
    if "mask_bounds" in configs:
        expected = with_mask_bounds(case, inputs, expected)
    if by_pairs:  # which leaves no sum of dq to a kernel behind it
        expected = [line for line in expected if line != "hopper: postprocess"]
    assert [line for line in launched if not line.split()[1].endswith("_sum")] == expected
    for kernel, config in configs.items():
        assert kernel not in kernels(ran) or f"hopper: {kernel} {config}" in lines


def run_case(
    case: Case, backend: str, device: torch.device, configs: Configs | None = None, carefully: bool = True, **how: Any
) -> list[str]:
    """Compute the case on the backend and judge all of it; the kernels that ran. The options are those of ``results_of``."""
    inputs, configs = build(case, device), configs or {}
    if backend in HOPPER and (less := what_hopper_gives(case, inputs)) != case:
        if set(inputs.wanted()) - set(less.grads):
            with pytest.raises(triflash.UnsupportedError):
                results_of(case, inputs, backend, configs, **how)
        case, inputs = less, build(less, device)
    if is_unsupported(case, backend, device):
        with on_backend(case, backend, configs, **how) as ran, pytest.raises(triflash.UnsupportedError):
            attend(case, inputs, backend, is_raw_on(backend, configs))
        assert ran == []
        return ran
    before = {n: x.detach().clone() for n, x in vars(inputs).items() if x is not None}
    results, ran = results_of(case, inputs, backend, configs, carefully, **how)
    assert_launched(case, inputs, backend, configs, ran)
    for name, old in before.items():
        assert torch.equal(getattr(inputs, name), old), f"{name} was modified"
    assert_right(case, inputs, *results, backend="hopper" if ON_HOPPER and backend == "auto" else backend)
    return kernels(ran)


def run_hidden(case: Case, backend: str, device: torch.device, configs: Configs | None = None, seed: int = 0, **how: Any) -> list[str]:
    """Junk behind key lengths changes no bit of a result and gets no gradient; the kernels that ran. That results are right, ``run_case`` says."""
    found = []
    for junk in (False, True):
        inputs = build(case, device)
        fill_hidden(inputs, junk)
        (results,), ran = results_of(case, inputs, backend, configs, seed=seed + junk, **how)
        assert_launched(case, inputs, backend, configs or {}, ran)
        found.append(results)
        lse = results.get("lse")
        rows = (results["out"], results.get("dq"), None if lse is None else (lse != -math.inf).movedim(2, 1))
        assert not any(x.any() for x in hidden_of(inputs, map(results.get, ("dk", "dv")), [results.get("db"), results.get("dt")], rows))
    for name, clean in found[0].items():
        dirty = found[1][name]
        assert not dirty.isnan().any(), name
        if name == "dq" and "postprocess" in kernels(ran):  # added up in no fixed order
            torch.testing.assert_close(dirty, clean, rtol=1e-2, atol=1e-3)
        else:
            assert torch.equal(dirty, clean), name
    return kernels(ran)
