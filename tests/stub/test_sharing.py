"""What calls share: bound passes, between threads and for as long as a bounded cache keeps them; and what they do not: anybody's memory."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from problems import BF16, Problem, Step, step_of
from torch import Tensor
from ways import binding, bound_launches, nothing_compiled

import triflash
from test_attention import WRONG, Q
from triflash import attention
from triflash.bound.signature import CALLS
from unlaunched import watching

PROBLEMS = [Problem("shared", M=72, N=72, D=32, bias=(2, 72, 72), backend="hopper"), Problem("shared", M=40, N=40, D=32, backend="triton")]


@pytest.fixture(autouse=True)
def empty() -> None:
    CALLS.clear()


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_threads_share_a_bound_call(problem: Problem) -> None:
    """Each has tensors of its own, all bind and launch at once, and no launch gets an address of another's."""
    count, times = 6, 20
    barrier, failures, made = threading.Barrier(count), [], []
    steps = [step_of(problem, seed) for seed in range(count)]
    everything = [x for step in steps for x in (*step.given.values(), *step.cotangents.values())]
    spans = {id(step): [(x.data_ptr(), x.nbytes) for x in (*step.given.values(), *step.cotangents.values())] for step in steps}
    threads: dict[int, int] = {}

    def work(number: int) -> None:
        threads[threading.get_ident()] = number
        step = steps[number]
        try:
            barrier.wait()
            for _ in range(times):
                results = step.run()
                made.append((number, {x.data_ptr() for x in results.values()}))
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    with gpu.watching(everything, kernels=False) as seen, binding() as bound:
        started = [threading.Thread(target=work, args=(number,)) for number in range(count)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
    assert not failures and len(bound) <= count
    launched = dict.fromkeys(range(count), 0)
    for each in seen:
        own = threads[each.thread]
        launched[own] += 1
        given = {at for at, step in enumerate(steps) for x in each.arguments if x.kind != "number" and x.value
                 if any(begin <= x.value < begin + size for begin, size in spans[id(step)])}  # fmt: skip
        assert given == {own} or (not given and each.kernel == "dbias_sum"), "a launch of one thread with another's tensors"
    assert len(set(launched.values())) == 1


def test_threads_bind_cold_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All threads need the same kernels, which nobody ever compiled: one does, the others wait."""
    from triton import knobs

    compiled: list[str] = []

    def listening(*, metadata: dict[str, Any], **_: Any) -> None:
        compiled.append(metadata["name"])

    monkeypatch.setattr(knobs.compilation, "listener", listening)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    steps = [step_of(Problem("cold", M=16, N=400, D=16, options={"softcap": 2.0**-number}, backend="triton")) for number in range(1, 7)]
    barrier, failures = threading.Barrier(len(steps)), []

    def work(step: Step) -> None:
        barrier.wait()
        try:
            step.run()
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    with binding() as bound, bound_launches() as launched:
        started = [threading.Thread(target=work, args=(step,)) for step in steps]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
    assert not failures and len(compiled) == len(set(compiled)) > 0
    assert len(bound) == len(steps) and len(launched) >= 3 * len(steps)


def test_more_signatures_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently used go, with all that they hold; what is used all along stays bound."""
    monkeypatch.setattr(CALLS, "capacity", 16)
    q = torch.zeros(1, 8, 1, 16, dtype=BF16, requires_grad=True)

    def step(length: int) -> None:
        k = torch.zeros(1, length, 1, 16, dtype=BF16)
        attention(q, k, k, backend="triton").sum().backward()

    with nothing_compiled(), binding() as made:
        references = []
        for length in range(1, 101):
            step(length)
            step(1000)
            assert len(CALLS) <= 16
            references += [weakref.ref(each) for each in made if each.spec.keys == length]
        assert sum(each.spec.keys == 1000 for each in made) == 1
        made.clear()
        gc.collect()
        assert sum(reference() is not None for reference in references) <= 16
        step(1)  # forgotten, and bound again
        assert len(made) == 1


def test_backward_passes_of_one_call_are_bounded() -> None:
    """However many layouts of dout come."""
    from triflash.bound.call import _BACKWARD_PASSES

    q = torch.zeros(1, 8, 1, 16, dtype=BF16, requires_grad=True)
    with nothing_compiled(), binding() as made:
        for row in range(1, 3 * _BACKWARD_PASSES):
            dout = torch.zeros(1, 8, row, 16, dtype=BF16)[:, :, :1]
            attention(q, q, q, backend="triton").backward(dout)
        (call,) = made
        assert len(call._backward) <= _BACKWARD_PASSES


def reachable(root: Any) -> list[Tensor]:
    """The tensors that an object keeps alive, but for what modules and classes do."""
    seen, found, queue = set(), [], [root]
    while queue:
        x = queue.pop()
        if id(x) in seen or isinstance(x, (type, type(gc))) or type(x).__module__.startswith("triton"):
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            found.append(x)
        elif callable(x) and hasattr(x, "__globals__"):
            queue += [cell.cell_contents for cell in x.__closure__ or ()]
        else:
            queue += gc.get_referents(x)
    return found


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_nobodys_memory_is_kept(problem: Problem) -> None:
    """Of all that a step had, nothing is left when its caller lets go; what is bound holds meta tensors only."""
    step = step_of(problem)
    with bound_launches() as launched, binding() as made:
        results = step.run()
        results = step.run()
    assert launched
    tensors = [weakref.ref(x) for x in (*step.given.values(), *step.cotangents.values(), *results.values())]
    del step, results
    gc.collect()
    assert all(reference() is None for reference in tensors)
    kept = reachable(made[0])
    assert kept and all(x.device.type == "meta" for x in kept)
    step_of(problem, 1).run()
    assert len(made) == 1


def test_tensors_freed_between_forward_and_backward() -> None:
    """Autograd keeps what the backward pass needs, and no more than that."""
    problem = PROBLEMS[1]
    step = step_of(problem)
    out = step.forward()
    references = {name: weakref.ref(x) for name, x in step.given.items()}
    dout = step.cotangents["dout"]
    storages = [x.untyped_storage().data_ptr() for x in step.given.values()]
    step.given.clear()
    step.forward = lambda: None
    with gpu.watching([dout], kernels=False) as seen:
        out.backward(dout)
    used = {x.value for each in seen for x in each.arguments if x.kind == "pointer"}
    assert set(storages) <= used and references


WRONG_ALWAYS = [row for row in WRONG if row[0] != "slopes to learn"]


def error_of(function: Callable[[], Any]) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function()
    return caught.type, str(caught.value)


def test_bad_input_raises_in_the_first_call_and_in_the_thousandth() -> None:
    """The same words, however often the good calls beside it, and it itself, came before."""

    def bad(wrong: dict[str, Any]) -> Callable[[], Any]:
        arguments = {"q": Q, "k": Q, "v": Q, **wrong}
        return lambda: attention(arguments["q"], arguments["k"], arguments["v"], **{n: x for n, x in arguments.items() if n not in "qkv"})

    first = {name: error_of(bad(wrong)) for name, wrong, *_ in WRONG}
    slopes = torch.ones(4)
    with nothing_compiled():
        for _ in range(1000):
            attention(Q, Q, Q, backend="triton")
        for _ in range(30):
            attention(
                Q, Q, Q, causal=True, window=(1, 2), softcap=1.0, dropout_p=0.5, dropout_seed=1, alibi_slopes=slopes, backend="triton"
            )
    for _ in range(2):
        assert {name: error_of(bad(wrong)) for name, wrong, *_ in WRONG} == first
    for name, wrong, exception, words in WRONG:
        with pytest.raises(exception, match=words):
            bad(wrong)()
        assert first[name][0] is exception
    with nothing_compiled():  # only values tell these from calls that are bound
        options: dict[str, Any] = dict(dropout_p=0.5, alibi_slopes=slopes, backend="triton")
        for _ in range(3):
            attention(Q, Q, Q, **options, dropout_seed=1)
            with pytest.raises(ValueError, match="^dropout_seed: wanted a number of 64 bits"):
                attention(Q, Q, Q, **options, dropout_seed=2**63)
            with pytest.raises(ValueError, match="^alibi_slopes: .* requires no gradient"):
                attention(Q, Q, Q, **{**options, "alibi_slopes": slopes.clone().requires_grad_()}, dropout_seed=1)


@pytest.mark.parametrize("backend", ["triton", "hopper"])
@pytest.mark.parametrize("name", ["qkv", "kv"])
def test_packed_tensors_get_one_packed_gradient(name: str, backend: str) -> None:
    """dk and dv are written where they belong: no copy, no concatenation."""
    packed = torch.randn(2, 400, 3 if name == "qkv" else 2, 2, 32).to(BF16).requires_grad_()
    q = torch.randn(2, 400, 2, 32).to(BF16).requires_grad_()
    functions = {
        "qkv": (triflash.flash_attn_qkvpacked_func, (packed,)), "kv": (triflash.flash_attn_kvpacked_func, (q, packed)),
    }  # fmt: skip
    function, given = functions[name]
    for _ in range(2):
        with triflash.backend(backend):
            out = function(*given)
        dout, results, scratch = torch.zeros_like(out), [], []
        with bound_launches() as launched, watching(results, "new_empty_strided"), watching(scratch, "new_empty"):
            gradients = torch.autograd.grad(out, given, dout)
    assert launched and not scratch
    wanted = [x.nbytes for x in given]
    assert results[: len(wanted)] == wanted and len(results) == len(wanted) + 1  # what passes keep to themselves is one more
    assert results[-1] < sum(wanted)
    assert [x.shape for x in gradients] == [x.shape for x in given] and all(x.is_contiguous() for x in gradients)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_results_are_allocated_one_way_and_the_other(problem: Problem) -> None:
    """As compiled graphs allocate, and by PyTorch where it may be asked to fill what it allocates (deterministic mode)."""

    def facts(x: Tensor) -> tuple[Any, ...]:
        return x.shape, x.stride(), x.dtype, x.device, type(x), x.is_leaf, x.requires_grad, x.is_inference(), x.storage_offset()

    made, step = [], step_of(problem)
    for deterministic in (False, True):
        torch._C._set_deterministic_algorithms(deterministic, warn_only=True)
        with bound_launches() as launched, watching(counted := [], "new_empty_strided"):
            found = [facts(x) for x in step.run().values()]
            with torch.inference_mode():
                found.append(facts(attention(*(step.given[name] for name in "qkv"), backend=problem.backend)))
        assert launched and bool(counted) == deterministic
        made.append(found)
    assert made[0] == made[1] and made[0][-1][-2]
