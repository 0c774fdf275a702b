"""Bound passes on a GPU: captured graphs, streams, threads with a stream each, and thousands of signatures one after the other."""

from __future__ import annotations

import gc
import random
import resource
import threading
from unittest import mock

import pytest
import torch
from torch import Tensor

import triflash
from triflash import attention
from triflash.bound import signature
from triflash.launch import native

triton = pytest.importorskip("triton")

pytestmark = [pytest.mark.gpu, pytest.mark.unpoisoned]
CUDA = torch.device("cuda")
BF16 = torch.bfloat16


def inputs(seed: int = 0, B: int = 2, S: int = 320, H: int = 4, D: int = 64, device: torch.device = CUDA) -> list[Tensor]:
    """q, k, v and a bias for all entries, each of which gets a gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = ((B, S, H, D),) * 3 + ((1, H, S, S),)
    return [torch.randn(shape, device=device, generator=generator).to(BF16).requires_grad_() for shape in shapes]


def step(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, **options: object) -> list[Tensor]:
    """The output and all gradients, the same bits in every run."""
    out = attention(q, k, v, bias=bias, causal=True, deterministic=True, **options)  # type: ignore[arg-type]
    return [out.detach(), *torch.autograd.grad(out, (q, k, v, bias), torch.ones_like(out))]


@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_bound_and_unbound_give_the_same_bits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs()
    if backend == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an sm90")
    bound = [step(*given, backend=backend) for _ in range(3)]
    monkeypatch.setenv("TRIFLASH_BIND", "0")
    unbound = step(*given, backend=backend)
    assert all(torch.equal(a, b) for each in bound for a, b in zip(each, unbound, strict=True))


@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_launches_are_the_drivers_own(backend: str) -> None:
    """Triton's C launcher, which takes the host twice as long for a kernel with tensor maps, is for what the driver says it takes
    otherwise; whether it does, no stub of a driver can tell.
    """
    if backend == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an sm90")
    if not triton.__version__.startswith("3.6"):
        pytest.skip("whose kernels are not launched so")
    given = inputs()
    step(*given, backend=backend)
    with mock.patch.object(native.Launch, "__call__", autospec=True, side_effect=native.Launch.__call__) as by_triton:
        step(*given, backend=backend)
    assert not by_triton.called


def test_a_captured_graph_replays_on_new_values() -> None:
    q, k, v, bias = inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(q, k, v, bias)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(q, k, v, bias)
    for seed in (1, 2):
        fresh = inputs(seed)
        with torch.no_grad():
            for x, y in zip((q, k, v, bias), fresh, strict=True):
                x.copy_(y)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(*fresh), strict=True))


@pytest.mark.parametrize("seed", ["drawn", "tensor"])
def test_dropout_is_fresh_in_every_replay(seed: str) -> None:
    q, k, v, _ = (x.detach() for x in inputs())
    state = torch.tensor([5, 0], device=CUDA)
    options = {"dropout_p": 0.5, "dropout_seed": None if seed == "drawn" else state}
    for _ in range(3):
        attention(q, k, v, **options)  # type: ignore[arg-type]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, **options)  # type: ignore[arg-type]
    seen = []
    for n in range(3):
        state[1] = n
        graph.replay()
        seen.append(out.clone())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    if seed == "tensor":
        assert torch.equal(seen[2], attention(q, k, v, dropout_p=0.5, dropout_seed=torch.tensor([5, 2], device=CUDA)))


def test_inputs_made_late_on_a_side_stream() -> None:
    """Launches go to the stream that is current at the call, and so does the backward pass's to that of its forward pass."""
    given = inputs()
    wanted = step(*given)
    side = torch.cuda.Stream()
    late = [torch.zeros_like(x).requires_grad_() for x in given]
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for x, y in zip(late, given, strict=True):
                x.copy_(y)
        got = step(*late)
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_threads_with_a_stream_each() -> None:
    """They share bound passes, and each gets its own results."""
    wanted = [step(*inputs(seed)) for seed in range(4)]
    wrong: list[str] = []

    def work(seed: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(40):
                    got = step(*inputs(seed))
                    torch.cuda.current_stream().synchronize()
                    if not all(torch.equal(a, b) for a, b in zip(got, wanted[seed], strict=True)):
                        wrong.append(f"thread {seed}")
        except Exception as error:  # noqa: BLE001 (a thread's error is the test's)
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def compiled_kernels() -> int:
    """How many this process has."""
    gc.collect()
    return sum(type(x).__name__ == "CompiledKernel" for x in gc.get_objects())


def test_memory_is_flat_over_ever_new_shapes() -> None:
    """10,000 calls: after the first 2,000 neither the GPU's memory in use nor this process's grows with the number of signatures."""
    chooser = random.Random(0)
    begin = kernels = 0
    base = [torch.randn(1, 1024, 2, 64, device=CUDA, dtype=BF16) for _ in range(3)]
    for n in range(10_000):
        q = base[0][:, : chooser.randint(1, 1024)].detach().requires_grad_(n % 4 == 0)
        keys = chooser.randint(1, 1024)
        out = attention(q, base[1][:, :keys], base[2][:, :keys], causal=n % 2 == 0, backend="triton" if n % 3 else None)
        if q.requires_grad:
            out.sum().backward()
        del out, q
        if n == 2_000:
            kernels = compiled_kernels()
            torch.cuda.synchronize()
            begin, resident = torch.cuda.memory_allocated(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kernels = compiled_kernels() - kernels  # for lengths that are 1, or multiples of 16, where others were not; each keeps its texts
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= begin
    assert len(signature.CALLS) <= signature.CAPACITY
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident  # KiB
    assert grown < (64 + 2 * kernels) * 1024, f"{grown} KiB, {kernels} kernels"


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    there = torch.device("cuda", 1)
    given = [x.detach().to(there).requires_grad_() for x in inputs()]
    with torch.cuda.device(there):
        wanted = step(*given)
    got = step(*given)
    assert all(x.device == there for x in got) and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_profiler_sees_our_range_and_kernels() -> None:
    given = inputs()
    step(*given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(*given)
        torch.cuda.synchronize()
    names = {event.key for event in profile.key_averages()}
    assert "triflash::attention" in names and any("forward" in name for name in names if not name.startswith("triflash"))
    assert triflash.explain(*given, causal=True, deterministic=True).forward.steps
