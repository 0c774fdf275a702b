"""Context parallelism on several GPUs of one host: checks it against attention on one, then measures it, and prints a table.

    python scripts/context_parallel.py                       # all GPUs; checks, then measures
    python scripts/context_parallel.py --tokens 4096 --heads 32/8 64/8 --json results.json
    python scripts/context_parallel.py --draw results.json   # measures nothing: draws weak scaling from what was, in results.svg
    python scripts/context_parallel.py --device cpu --ranks 2 --tokens 64 --heads 4/2 --dim 8   # gloo: that the script runs

A step is timed by CUDA events on every rank, behind a barrier; the figure is the median of the slowest rank's. Efficiency is what one GPU
takes for the same share of the work (the whole sequence, 1/R of the heads) over the step. "compute" is the same call with collectives left
out; what a step takes beyond it is exposed communication.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import triflash
from svg import Drawing
from triflash.distributed import all_gather as gather_method
from triflash.distributed import context_parallel_attention, shard
from triflash.distributed import ring as ring_method
from triflash.distributed import ulysses as ulysses_method

METHODS = ("allgather", "ulysses", "ring")


def norm_of_difference(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def check(rank: int, world: int, device: torch.device, dtype: torch.dtype, dim: int) -> dict[str, float]:
    """The largest relative norm of a difference to attention on the gathered tensors, by method, result and gradient."""
    found: dict[str, float] = {}
    S, H, Hk = 128 * world + 8, 4 * world, world
    for name, options in (("causal", {"causal": True}), ("window", {"window": (150, 30)}), ("alibi", {"causal": True})):
        torch.manual_seed(1)
        made = lambda *shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
        whole = {"q": made(1, S, H, dim), "k": made(1, S, Hk, dim), "v": made(1, S, Hk, dim), "sink": made(H)}
        more: dict[str, Any] = dict(options)
        if name == "alibi":
            more["alibi_slopes"] = torch.rand(H, device=device)
        else:
            whole["bias"] = made(H, S, S)
        dout = made(1, S, H, dim)
        leaves = {each: x.clone().requires_grad_() for each, x in whole.items()}
        expected = triflash.attention(**leaves, **more)
        expected.backward(dout)
        for method in METHODS:
            parts = {each: (x.clone() if each == "sink" else shard(x, 1, dist.group.WORLD)).requires_grad_() for each, x in whole.items()}
            out = context_parallel_attention(**parts, **more, group=dist.group.WORLD, method=method, length=S, key_length=S)
            out.backward(shard(dout, 1, dist.group.WORLD))
            pairs = {"out": (out.detach(), shard(expected.detach(), 1, dist.group.WORLD))}
            for each, x in parts.items():
                grad = leaves[each].grad
                pairs["d" + each] = (x.grad, grad if each == "sink" else shard(grad, 1, dist.group.WORLD))
            for each, (got, wanted) in pairs.items():
                worst = torch.tensor(norm_of_difference(got, wanted), device=device)
                dist.all_reduce(worst, dist.ReduceOp.MAX)
                found[f"{name} {method} {each}"] = float(worst)
    limit = {torch.bfloat16: 2e-2, torch.float32: 1e-4}[dtype]  # two results, each within the rule's 1e-2 of float64
    bad = {name: value for name, value in found.items() if not value < limit}
    if bad:
        raise SystemExit(f"rank {rank}: further than {limit} from attention on one GPU: {bad}")
    return found


def timed(run: Callable[[], None], device: torch.device, repeats: int, alone: bool = False) -> float:
    """Milliseconds of a step: the median over repeats of the slowest rank's."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        if not alone:
            dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
    each = torch.tensor(times, device=device)
    if not alone:
        dist.all_reduce(each, dist.ReduceOp.MAX)
    return statistics.median(each.tolist())


def steps(call: Callable[[dict[str, Tensor]], Tensor], tensors: dict[str, Tensor]) -> tuple[Callable[[], None], Callable[[], None]]:
    """A forward pass without autograd, and a forward and a backward pass."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    with torch.no_grad():
        dout = torch.randn_like(call(tensors))

    def forward() -> None:
        with torch.no_grad():
            call(tensors)

    def both() -> None:
        torch.autograd.grad(call(leaves), list(leaves.values()), dout)

    return forward, both


@contextmanager
def silent() -> Iterator[None]:
    """Collectives that send nothing and leave whatever memory holds."""

    def gathered(x: Tensor, group: Any) -> Tensor:
        return x.new_zeros((group.size * x.shape[0], *x.shape[1:]))

    def scattered(x: Tensor, group: Any) -> Tensor:
        return x[: x.shape[0] // group.size]

    def exchanged(x: Tensor, to: list[int], fro: list[int], group: Any) -> Tensor:
        return x if sum(fro) == x.shape[0] else x.new_zeros((sum(fro), *x.shape[1:]))

    with ExitStack() as stack:
        for module in (gather_method, ring_method, ulysses_method):
            for name, stub in (
                ("all_gather", gathered), ("reduce_scatter", scattered), ("all_to_all", exchanged),
                ("shift", lambda x, count, group: x.reshape(-1)), ("wait", lambda x, group: x),
            ):  # fmt: skip
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, stub))
        yield


def torch_context_parallel(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, device: torch.device, repeats: int) -> tuple[float, float] | str:
    """PyTorch's own, ring attention over SDPA with key heads repeated, in milliseconds; or why not."""
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.experimental import context_parallel
        from torch.nn.attention import SDPBackend, sdpa_kernel

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        group, world = q.shape[2] // k.shape[2], dist.get_world_size()
        full = [
            x.transpose(1, 2).repeat_interleave(times, 1).repeat(1, 1, world, 1).contiguous()
            for x, times in ((q, 1), (k, group), (v, group))
        ]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION), context_parallel(mesh, buffers=full, buffer_seq_dims=[2, 2, 2]):
            leaves = [x.detach().requires_grad_() for x in full]
            ahead = dout.transpose(1, 2).contiguous()

            def forward() -> None:
                with torch.no_grad():
                    torch.nn.functional.scaled_dot_product_attention(*full, is_causal=True)

            def both() -> None:
                torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True), leaves, ahead)

            return timed(forward, device, repeats), timed(both, device, repeats)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"


def measure(
    rank: int, world: int, device: torch.device, dtype: torch.dtype, options: argparse.Namespace, deadline: float
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def note(**row: Any) -> None:
        rows.append(row)
        if rank == 0:
            print(json.dumps(row), flush=True)

    def late() -> bool:
        flag = torch.tensor(float(time.monotonic() > deadline), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    m, D = options.tokens, options.dim
    S = m * world
    made = lambda *shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
    for heads in options.heads:
        H, Hk = map(int, heads.split("/"))
        one = {"q": made(1, S, H // world, D), "k": made(1, S, max(Hk // world, 1), D), "v": made(1, S, max(Hk // world, 1), D)}
        forward, both = steps(lambda x: triflash.attention(**x, causal=True), one)
        base = timed(forward, device, options.repeats), timed(both, device, options.repeats)
        note(heads=heads, method="one GPU, 1/R of the heads", forward=base[0], both=base[1])
        del one
        own = {"q": made(1, m, H, D), "k": made(1, m, Hk, D), "v": made(1, m, Hk, D)}
        for method in METHODS:
            if late():
                return rows
            call = lambda x, method=method: context_parallel_attention(  # noqa: E731
                **x, causal=True, group=dist.group.WORLD, method=method, length=S, key_length=S
            )
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            forward, both = steps(call, own)
            took = timed(forward, device, options.repeats), timed(both, device, options.repeats)
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if device.type == "cuda" else 0.0
            with silent():
                alone = timed(forward, device, options.repeats), timed(both, device, options.repeats)
            note(
                heads=heads, method=method, forward=took[0], both=took[1], efficiency_forward=base[0] / took[0],
                efficiency_both=base[1] / took[1], compute_forward=alone[0], compute_both=alone[1], peak_mib=round(peak),
            )  # fmt: skip
        if not late():
            theirs = torch_context_parallel(own["q"], own["k"], own["v"], made(1, m, H, D), device, options.repeats)
            if isinstance(theirs, str):
                note(heads=heads, method="torch context_parallel", error=theirs)
            else:
                note(heads=heads, method="torch context_parallel", forward=theirs[0], both=theirs[1])
        del own, forward, both
    # A bias (1, h, M, N) and its gradient.
    if not late():
        H, Hk = map(int, options.heads[0].split("/"))
        one = {
            "q": made(1, S, H // world, D), "k": made(1, S, max(Hk // world, 1), D), "v": made(1, S, max(Hk // world, 1), D),
            "bias": made(1, H // world, S, S),
        }  # fmt: skip
        forward, both = steps(lambda x: triflash.attention(**x, causal=True), one)
        base = timed(forward, device, 3), timed(both, device, 3)
        note(heads=options.heads[0], method="one GPU, 1/R of the heads, bias", forward=base[0], both=base[1])
        del one, forward, both
        if device.type == "cuda":
            torch.cuda.empty_cache()
        own = {"q": made(1, m, H, D), "k": made(1, m, Hk, D), "v": made(1, m, Hk, D), "bias": made(1, H, m, S)}
        for method in ("allgather", "ulysses"):
            if late():
                return rows
            forward, both = steps(
                lambda x, method=method: context_parallel_attention(
                    **x, causal=True, group=dist.group.WORLD, method=method, length=S, key_length=S
                ),
                own,
            )
            took = timed(forward, device, 3), timed(both, device, 3)
            note(
                heads=options.heads[0], method=f"{method}, bias", forward=took[0], both=took[1], efficiency_forward=base[0] / took[0],
                efficiency_both=base[1] / took[1],
            )  # fmt: skip
        del own, forward, both
        if device.type == "cuda":
            torch.cuda.empty_cache()
    # Weak scaling: the same rows a rank on groups of 1, 2, 4, … ranks.
    size = 1
    while size <= world and not late():
        groups = [dist.new_group(list(range(at, at + size))) for at in range(0, world, size)]
        group = groups[rank // size]
        H, Hk = map(int, options.heads[0].split("/"))
        own = {"q": made(1, m, H, D), "k": made(1, m, Hk, D), "v": made(1, m, Hk, D)}
        forward, both = steps(
            lambda x, group=group, size=size: context_parallel_attention(
                **x, causal=True, group=group, length=m * size, key_length=m * size
            ),
            own,
        )
        took = timed(forward, device, options.repeats), timed(both, device, options.repeats)
        with silent():
            alone = timed(forward, device, options.repeats), timed(both, device, options.repeats)
        note(
            heads=options.heads[0],
            method="allgather",
            ranks=size,
            forward=took[0],
            both=took[1],
            compute_forward=alone[0],
            compute_both=alone[1],
        )
        size *= 2
    return rows


def work(rank: int, world: int, port: int, options: argparse.Namespace) -> None:
    deadline = time.monotonic() + options.seconds
    cuda = options.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=world, device_id=device if cuda else None)
    dtype = torch.bfloat16 if cuda else torch.float32
    checked = check(rank, world, device, dtype, 64 if cuda else 8)
    if rank == 0:
        print(
            f"{len(checked)} results and gradients agree; the largest relative norm of a difference is {max(checked.values()):.2e}",
            flush=True,
        )
    rows = measure(rank, world, device, dtype, options, deadline)
    if rank == 0:
        about = {
            "gpu": torch.cuda.get_device_name() if cuda else platform.processor(), "ranks": world, "torch": torch.__version__,
            "triflash": triflash.__version__, "tokens a rank": options.tokens, "head dim": options.dim, "dtype": str(dtype),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else "",
        }  # fmt: skip
        print(table(rows))
        if options.json:
            with open(options.json, "w") as file:
                json.dump({"about": about, "checked": checked, "rows": rows}, file, indent=1)
    dist.barrier()
    dist.destroy_process_group()


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| heads | method | ranks | forward, ms | forward + backward, ms | efficiency | both | compute, ms | both | peak, MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    columns = ("forward", "both", "efficiency_forward", "efficiency_both", "compute_forward", "compute_both", "peak_mib")
    for row in rows:
        cells = [f"{row[name]:.2f}" if isinstance(row.get(name), float) else str(row.get(name, "")) for name in columns]
        if "error" in row:
            cells[0] = row["error"]
        lines.append(f"| {row['heads']} | {row['method']} | {row.get('ranks', 'all')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def model() -> str:
    """The computed table of docs/distributed.md: 8,192 tokens a rank, 32 query heads on 8 key heads, d 128, causal, 2 bytes a number."""
    m, H, Hk, D, MiB = 8192, 32, 8, 128, 2**20
    lines = [
        "| R | tokens | compute, ms | all-gather, ring: MiB sent | ms | Ulysses: MiB sent | ms | MiB held: all-gather | Ulysses | ring |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for R in (2, 4, 8, 16, 32, 64):
        S = m * R
        products = 4 * H * D * S * S / 2 / R  # of a rank's visible pairs; the backward pass has 2.5 times as many
        compute = f"{products / 560e9:.1f} / {2.5 * products / 460e9:.1f}"
        keys = S * 2 * Hk * D * 2  # bytes of K and V
        speed = 370e6 if R <= 8 else 45e6  # bytes a millisecond
        cells = []
        for forward, backward in (
            ((R - 1) / R * keys, (R - 1) / R * 3 * keys),  # K and V; and again, with dk and dv in float32
            ((R - 1) / R**2 * S * 2 * (H + Hk) * D * 2,) * 2,  # Q, K, V and out; dout, dq, dk and dv
        ):
            digits = 2 if R <= 8 else 1
            cells += [f"{forward / MiB:,.0f} / {backward / MiB:,.0f}", f"{forward / speed:.{digits}f} / {backward / speed:.{digits}f}"]
        held = (keys / 2, m * 2 * (H + Hk) * D * 2, 2 * m * 2 * Hk * D * 2 + m * H * (4 * D + 8))
        lines.append(f"| {R} | {S:,} | {compute} | {' | '.join(cells)} | {' | '.join(f'{x / MiB:,.0f}' for x in held)} |")
    return "\n".join(lines)


def weak_scaling(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A step on groups of more and more ranks, each with as many rows, as SVG: compute, and above it exposed communication. A causal rank's
    work grows with the group: a mark is at one GPU's time times its size, which would be perfect.
    """
    rows = [row for row in rows if "ranks" in row]
    if not rows:
        raise SystemExit("no weak scaling in what was measured")
    wide, gap, high, left, top = 250.0, 44.0, 190.0, 44.0, 74.0
    drawing = Drawing(left + 2 * wide + gap + 10, top + high + 46, "Weak scaling of context-parallel attention")
    heads, gpu = rows[0]["heads"], about.get("gpu") or "CPU"
    drawing.text(
        8, 20, f"{gpu}, {about['tokens a rank']:,} tokens a rank, {heads} heads of {about['head dim']}, {rows[0]['method']}", "ink head"
    )
    for at, colour, words in ((8, "cool", "compute"), (96, "part", "exposed communication"), (270, "mark", "one GPU's time × ranks")):
        drawing.rect(at, 32 if colour != "mark" else 37, 12, 12 if colour != "mark" else 3, colour)
        drawing.text(at + 18, 43, words, "small soft")
    for number, (name, title) in enumerate((("forward", "forward"), ("both", "forward and backward"))):
        ideal = [rows[0][name] / rows[0]["ranks"] * row["ranks"] for row in rows]
        ceiling = max([row[name] for row in rows] + ideal)
        step = 10 ** math.floor(math.log10(ceiling)) / 2
        while ceiling / step > 6:
            step *= 2
        above = step * math.ceil(ceiling / step)
        x0 = left + number * (wide + gap)
        drawing.text(x0 + wide / 2, top - 8, f"{title}, ms", "ink", "middle")
        for n in range(round(above / step) + 1):
            y = top + high * (1 - n * step / above)
            drawing.path([(x0, y), (x0 + wide, y)], "thin s-grid")
            drawing.text(x0 - 6, y + 4, f"{n * step:g}", "small soft", "end")
        room = (wide - 20) / len(rows)
        for n, (row, perfect) in enumerate(zip(rows, ideal, strict=True)):
            compute = min(row["compute_" + name], row[name])
            x, scale = x0 + 10 + n * room + room * 0.2, high / above
            drawing.rect(x, top + high - compute * scale, room * 0.6, compute * scale, "cool")
            drawing.rect(x, top + high - row[name] * scale, room * 0.6, (row[name] - compute) * scale, "part")
            drawing.rect(x - room * 0.1, top + high - perfect * scale - 1.5, room * 0.8, 3, "mark")
            drawing.text(x + room * 0.3, top + high + 18, f"{row['ranks']}", "small soft", "middle")
        drawing.text(x0 + wide / 2, top + high + 38, "ranks", "small soft", "middle")
    return drawing.svg()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="default: as many as there are GPUs")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, default=8192, help="of each rank")
    parser.add_argument("--heads", nargs="+", default=["32/8", "64/8"], help="query heads/key heads")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so many")
    parser.add_argument("--json", help="a file for what was measured")
    parser.add_argument("--model", action="store_true", help="print what the model says of up to 64 GPUs, and measure nothing")
    parser.add_argument("--draw", metavar="JSON", help="draw weak scaling from such a file, beside it, and measure nothing")
    options = parser.parse_args()
    if options.model:
        print(model())
        return
    if options.draw:
        found = json.loads(Path(options.draw).read_text())
        Path(options.draw).with_suffix(".svg").write_text(weak_scaling(found["about"], found["rows"]))
        return
    world = options.ranks or torch.cuda.device_count()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (world, port, options), nprocs=world)


if __name__ == "__main__":
    main()
