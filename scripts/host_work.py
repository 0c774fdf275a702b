"""What calls cost the host, measured without a GPU, of several checkouts beside each other: a table on standard output.

    python3 scripts/host_work.py [CHECKOUT ...] [--rounds 5] [--only step]     this checkout, where none is named
    python3 scripts/host_work.py --count step                                  which functions a step runs, and how many bytecodes of each

Launches go their real way to a driver that does nothing (tests/stub); tensors are the CPU's, small, and taken for those of an H200.
Checkouts take turns, a process each, and of each cell the quietest batch counts, in processor time of the thread: other programs still
disturb caches, so compare within a table alone. A ``first`` step has a new length, after steps at lengths round it; ``bare`` is a step of
an ``autograd.Function`` that allocates out, lse and gradients; ``cold`` steps run after 4 MB were copied. Bytecodes are counted, which
nothing disturbs, but differ between releases of Python.
"""

import argparse
import collections
import contextlib
import functools
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

CELLS = (
    "forward",
    "cache",
    "cache, lengths",
    "cache, new",
    "step",
    "step, bias",
    "step, portable",
    "packed",
    "packed step",
    "packed step, full",
    "packed step, bias",
    "first step",
    "first step, d 128",
    "first step, bias",
    "operator",
    "operator, backward",
    "bare",
    "cold step",
    "cold bare",
)
LENGTHS = 41  # of first steps, 16 apart, which all kernels take alike; of every second one steps come before
_folder = tempfile.TemporaryDirectory()  # of the stub, which Triton's launchers are linked to
# The C library gives no memory back between steps, as PyTorch's allocator of GPUs does not.
QUIET = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_TOP_PAD_": "67108864", "MALLOC_MMAP_THRESHOLD_": "1000000000"}


def calls(checkout: Path) -> dict[str, Callable[[], Any]]:
    """Name -> what is measured, by the package of a checkout, which this process has from now on."""
    sys.path[:0] = [str(checkout / each) for each in ("src", "tests", "tests/stub")]
    os.environ |= {"TRITON_INTERPRET": "0", "DISABLE_LLVM_OPT": "1"}
    os.environ["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir(), "triflash-host-work")))
    import gpu
    import torch

    from unlaunched import OnGPU

    if problem := gpu.build(Path(_folder.name)):
        raise SystemExit(problem)
    gpu.activate()
    from triflash import attention, attention_varlen, attention_with_kvcache, launch
    from triflash.bound import signature
    from triflash.plan.device import KNOWN_DEVICES

    facts = replace(KNOWN_DEVICES["sm90"], name="NVIDIA H200")
    signature.facts_of, launch.Real = lambda _: facts, OnGPU
    torch.set_num_threads(1)
    grad, forward, backward = torch.autograd.grad, torch.ops.triflash.forward.default, torch.ops.triflash.backward.default
    given = [torch.zeros(1, 136, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    plain, dout = [x.detach() for x in given], torch.zeros_like(given[0])
    bias = torch.zeros(1, 2, 136, 136, dtype=torch.bfloat16, requires_grad=True)

    q, *new = (torch.zeros(2, 1, heads, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
    caches = [torch.zeros(2, 2048, 2, 64, dtype=torch.bfloat16) for _ in range(2)]
    lengths = torch.zeros(2, dtype=torch.int32)

    rows = [torch.zeros(136, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    flat, drows, offsets = [x.detach() for x in rows], torch.zeros_like(rows[0]), torch.tensor([0, 64, 136], dtype=torch.int32)

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            out, lse = torch.empty_like(q), torch.empty(1, 2, 136)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, dout: Any) -> Any:
            return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])

    options = (1, None, 0, 0.125, "ieee", "auto")
    saved = forward(*plain, None, *options)
    warm = torch.zeros(4 << 20, dtype=torch.uint8), torch.zeros(4 << 20, dtype=torch.uint8)
    found: dict[str, Callable[[], Any]] = {
        "forward": lambda: attention(*plain, causal=True),
        "cache": lambda: attention_with_kvcache(q, *caches, backend="triton"),
        "cache, lengths": lambda: attention_with_kvcache(q, *caches, cache_lengths=lengths, backend="triton"),
        "cache, new": lambda: attention_with_kvcache(
            q, *caches, cache_lengths=lengths, k_new=new[0], v_new=new[1], causal=True, backend="triton"
        ),
        "step": lambda: grad(attention(*given, causal=True), given, dout),
        "step, bias": lambda: grad(attention(*given, bias=bias), (*given, bias), dout),
        "step, portable": lambda: grad(attention(*given, causal=True, backend="triton"), given, dout),
        "packed": lambda: attention_varlen(*flat, offsets, offsets, 72, 72, causal=True),
        "packed step": lambda: grad(attention_varlen(*rows, offsets, offsets, 72, 72, causal=True), rows, drows),
        "packed step, full": lambda: grad(attention_varlen(*rows, offsets, offsets, 72, 72), rows, drows),
        "packed step, bias": lambda: grad(attention_varlen(*rows, offsets, offsets, 72, 72, bias=bias), (*rows, bias), drows),
        "operator": lambda: forward(*plain, None, *options),
        "operator, backward": lambda: backward(dout, None, *plain, None, *saved, *options, [True, True, True, False, False]),
        "bare": lambda: grad(Bare.apply(*given), given, dout),
    }
    for name, length, dim, biased in (
        ("first step", 1001, 64, False),
        ("first step, d 128", 1040, 128, False),
        ("first step, bias", 1040, 64, True),
    ):
        found[name] = functools.partial(new_lengths, length, dim, biased)
    return found | {f"cold {name}": found[name] for name in ("step", "bare")} | {"copy": lambda: warm[0].copy_(warm[1])}


def new_lengths(length: int, dim: int, biased: bool) -> Iterator[Callable[[], Any]]:
    """Steps, each at a length for the first time, causal or with a bias and its gradient: 16 heads, as ``triflash bench --sweep host``."""
    import torch

    from triflash import attention

    def step(length: int) -> Callable[[], Any]:
        leaves = [torch.empty(1, length, 16, dim, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
        dout = torch.empty_like(leaves[0], requires_grad=False)
        if not biased:
            return lambda: torch.autograd.grad(attention(*leaves, causal=True), leaves, dout)
        leaves.append(torch.empty(1, 16, length, length, dtype=torch.bfloat16).requires_grad_())
        return lambda: torch.autograd.grad(attention(*leaves[:3], bias=leaves[3]), leaves, dout)

    for number in range(0, LENGTHS, 2):
        step(length + 16 * number)()
    for number in range(1, LENGTHS, 2):
        yield step(length + 16 * number)


def measured(checkout: Path, names: list[str]) -> dict[str, float]:
    """Name -> µs a call: of batches of 100 the quietest; of cold calls, and first ones, the mean of the quietest quarter."""
    found = calls(checkout)
    cool, clock = found["copy"], time.thread_time
    gc.disable()
    result = {}
    for name in names:
        call = found[name]
        times = []
        if name.startswith("first"):
            for step in call():
                begin = clock()
                step()
                times.append((clock() - begin) * 1e6)
            times.sort()
            result[name] = sum(times[: len(times) // 4]) / (len(times) // 4)
            continue
        for _ in range(50):
            call()
        for _ in range(400 if name.startswith("cold") else 25):
            if name.startswith("cold"):
                cool()
            count = 1 if name.startswith("cold") else 100
            begin = clock()
            for _ in range(count):
                call()
            times.append((clock() - begin) / count * 1e6)
        times.sort()
        result[name] = sum(times[:100]) / 100 if name.startswith("cold") else times[0]
    return result


def count(name: str) -> None:
    """Print the functions that a call runs, with their bytecodes."""
    call = calls(Path(__file__).resolve().parent.parent)[name]
    steps: Iterator[Callable[[], Any]] = itertools.repeat(call)
    if name.startswith("first"):
        steps = call()
    else:
        for _ in range(400):
            call()
    codes: collections.Counter[str] = collections.Counter()

    def trace(frame: Any, event: str, _: Any) -> Any:
        frame.f_trace_opcodes = True
        if event == "opcode":
            codes[f"{Path(frame.f_code.co_filename).name}: {getattr(frame.f_code, 'co_qualname', frame.f_code.co_name)}"] += 1
        return trace

    for step in itertools.islice(steps, 6):  # tracing moves memory, and launches are prepared for new addresses
        codes.clear()
        sys.settrace(trace)
        step()
        sys.settrace(None)
    print(f"{sum(codes.values())} bytecodes")
    for function, many in codes.most_common():
        print(f"{many:6d} {function}")


def main() -> None:
    here = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[here])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=CELLS, action="append")
    parser.add_argument("--count", choices=CELLS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = given.only or list(CELLS)
    if given.count:
        count(given.count)
        return
    if given.measure:
        with contextlib.redirect_stdout(sys.stderr):
            found = measured(given.checkouts[0], names)
        print(json.dumps(found))
        return
    best: dict[Path, dict[str, float]] = {each: {} for each in given.checkouts}
    environment = {**os.environ, **QUIET, "CUDA_VISIBLE_DEVICES": ""}
    for _ in range(given.rounds):
        for checkout, times in best.items():
            words = [sys.executable, __file__, str(checkout.resolve()), "--measure", *(f"--only={name}" for name in names)]
            ran = subprocess.run(words, check=False, env=environment, capture_output=True, text=True)
            if ran.returncode:
                raise SystemExit(ran.stderr)
            for name, one in json.loads(ran.stdout).items():
                times[name] = min(one, times.get(name, one))
    print(f"{'µs':20}", *(f"{each.name or each.resolve().name:>20}" for each in best))
    for name in names:
        print(f"{name:20}", *(f"{times[name]:20.1f}" for times in best.values()))


if __name__ == "__main__":
    main()
