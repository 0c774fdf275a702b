"""Context parallelism in use: errors and what ranks agree on, which kernels, compilation, ranks that die, the script, the page, the example."""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import triflash
from ranks import METHODS, PRELOADED, begin, needs_gloo, run, tell

pytestmark = needs_gloo

EXAMPLE = Path(__file__).parent.parent / "examples" / "long_context.py"
PAGE = Path(__file__).parent.parent / "docs" / "distributed.md"


def check_kernels(method: str) -> None:
    """Parts are calls like any other: of the backend that was asked for, with its own words for what it cannot do."""
    from triflash.distributed import context_parallel_attention

    q = torch.randn(1, 3, 2, 4, requires_grad=True)
    for backend in ("tiled", "oracle"):
        if (method, backend) == ("ring", "oracle"):
            with pytest.raises(triflash.UnsupportedError, match=r"^method='ring'.*'oracle'; method='allgather'"):
                context_parallel_attention(q, q, q, group=dist.group.WORLD, method=method, backend=backend)
            continue
        with triflash.record_launches() as ran:
            context_parallel_attention(q, q, q, group=dist.group.WORLD, method=method, backend=backend).sum().backward()
        assert set(ran) == {f"{backend}: forward", f"{backend}: backward"}, ran
    (grad,) = torch.autograd.grad(
        context_parallel_attention(q, q, q, group=dist.group.WORLD, method=method).square().sum(), q, create_graph=True
    )
    with pytest.raises(triflash.UnsupportedError, match="second derivative"):
        grad.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert context_parallel_attention(q, q, q, group=dist.group.WORLD, method=method).dtype == torch.bfloat16


def check_programs() -> None:
    """What plans are told of the device (4 SMs, of the interpreter): all of it, but less while a collective is in flight, or what was asked for."""
    from triflash.bound import signature
    from triflash.distributed import context_parallel_attention

    q, seen = torch.randn(1, 4, 4, 4, requires_grad=True), []
    asked = signature.facts_of

    def noting(device: torch.device) -> Any:
        seen.append(asked(device).sms)
        return asked(device)

    with mock.patch.object(signature, "facts_of", noting):
        for options, forward, backward in (
            ({"head_chunks": 2}, {4, 1}, {1}), ({"head_chunks": 1}, {4}, {4}), ({"programs": 3, "head_chunks": 2}, {3}, {3}),
            ({"method": "ring"}, {4, 1}, {1}), ({"method": "ulysses", "programs": 2}, {2}, {2}), ({"programs": 100}, {4}, {4}),
        ):  # fmt: skip
            seen.clear()
            out = context_parallel_attention(q, q, q, group=dist.group.WORLD, causal=True, **options)
            assert set(seen) == forward, (options, seen)
            seen.clear()
            out.sum().backward()
            assert set(seen) == backward, (options, seen)
    assert asked(q.device).sms == 4


def check_known_calls() -> None:
    """A call like one before is neither checked nor planned again; one that differs in anything that checks or plans depend on is."""
    from triflash.distributed import attention, context_parallel_attention

    q, checked, seen = torch.randn(1, 4, 2, 6), attention.checked, []
    slopes = torch.rand(2)

    def counting(*args: Any) -> Any:
        seen.append(args)
        return checked(*args)

    def run(x: Tensor = q, **options: Any) -> int:
        seen.clear()
        context_parallel_attention(x, x, x, **{"group": dist.group.WORLD, "length": 8, "key_length": 8, "softcap": 7.5, **options})
        return len(seen)

    with mock.patch.object(attention, "checked", counting), triflash.backend("tiled"):
        assert run() == 1
        assert run() == run(torch.randn_like(q)) == 0
        for other in (
            {"x": q.double()}, {"x": q[..., :5]}, {"causal": True}, {"window": (1, 1)}, {"scale": 1}, {"scale": 1.0}, {"method": "ring"},
            {"order": "contiguous"}, {"bias": torch.zeros(1, 8)}, {"bias": torch.zeros(1, 8).half()}, {"programs": 3}, {"deterministic": True},
            {"backend": "tiled"}, {"dropout_p": 0.5, "dropout_seed": 1}, {"diagonal": 0}, {"diagonal": torch.zeros(1).int()},
            {"query_starts": torch.zeros(1).int()}, {"group": dist.new_group([0, 1])}, {"alibi_slopes": slopes},
        ):  # fmt: skip
            assert run(**other) == 1, other
            assert run(**other) == 0, other
        assert run(length=None) == run(length=None) == 1  # ranks must tell each other each time
        assert run(dropout_p=0.5, dropout_seed=2) == 0
        with pytest.raises(ValueError, match="^dropout_seed: wanted a number of 64 bits"):
            run(dropout_p=0.5, dropout_seed=2**64)
        with pytest.raises(TypeError, match="^window: wanted two integers"):
            run(window=(True, True))
        with pytest.raises(ValueError, match="^alibi_slopes: wanted a tensor that requires no gradient"):
            run(alibi_slopes=slopes.clone().requires_grad_())
        with triflash.backend("oracle"):
            assert run() == 1
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if before != "tf32" else "ieee"
        try:
            assert run() == 1
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


def check_agreement(rank: int) -> None:
    """TRIFLASH_CHECK=1: every rank raises the same words, which name the argument and a rank; one that checks is enough."""
    from triflash.distributed import context_parallel_attention

    group = dist.new_group([0, 1])
    q = torch.randn(1, 4, 2, 4)
    if rank == 1:
        os.environ["TRIFLASH_CHECK"] = "1"
    same = context_parallel_attention(q, q, q, group=group)
    os.environ.pop("TRIFLASH_CHECK", None)  # it was read once
    for name, words, options in (
        ("method", "allgather as on rank 0, got ring on rank 1", {"method": ("allgather", "ring")[rank]}),
        ("causal", "False as on rank 0, got True on rank 1", {"causal": rank == 1}),
        ("window", r"None as on rank 0, got \(1, 1\) on rank 1", {"window": (1, 1) if rank else None}),
        ("bias", r"a float32 tensor of shape \(2, rows, 8\) as on rank 0, got .*float16", {"bias": torch.zeros(2, 4, 8).to((torch.float32, torch.float16)[rank])}),
        ("bias", r"None as on rank 0, got a float32 tensor of shape \(8,\) on rank 1", {"bias": torch.zeros(8) if rank else None}),
        ("sink", "a float32 tensor as on|a float32 tensor of shape .* as on rank 0, got a float32 tensor that requires", {"sink": torch.zeros(2).requires_grad_(rank == 1)}),
        ("length", "8 as on rank 0, got None on rank 1", {"length": 8 if rank == 0 else None}),
        (r"bias\[2\]", r"None as on rank 0, got a float32 tensor of shape \(rows, 8\)", {"bias": [torch.zeros(4, 8)] * (2 + rank)}),
        ("key_lengths", r"a int64 tensor of values \[8\] as on rank 0, got a int64 tensor of values \[9\]", {"key_lengths": torch.tensor([8 + rank])}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: wanted the same on every rank, {words}"):
            context_parallel_attention(q, q, q, group=group, **options)
    with pytest.raises(ValueError, match=r"^q: wanted the same on every rank, .*rows, 2, 4\) as on rank 0, got .*rows, 2, 3\) on rank 1"):
        context_parallel_attention(*[q[..., : 4 - rank]] * 3, group=group)
    with (
        pytest.raises(ValueError, match="^q: wanted the same .* a float32 tensor .* on rank 0, got a bfloat16 tensor"),
        torch.autocast("cpu", enabled=rank == 1),
    ):
        context_parallel_attention(q, q, q, group=group)
    torch.use_deterministic_algorithms(rank == 1)
    with pytest.raises(ValueError, match="^torch.use_deterministic_algorithms: .* False as on rank 0, got True on rank 1"):
        context_parallel_attention(q, q, q, group=group)
    torch.use_deterministic_algorithms(False)
    with pytest.raises(ValueError, match=r"^mask: wanted q's device cpu, got meta \(on rank 1\)"):
        context_parallel_attention(q, q, q, mask=torch.ones(4, 8, dtype=torch.bool, device=("cpu", "meta")[rank]), group=group)
    for error, words, given, options in (  # what one rank alone refuses
        (ValueError, "q: wanted 4 rows on rank 1 of 2, its zigzag share of length=8, got 3", q[:, : 4 - rank], {"length": 8, "key_length": 8}),
        (TypeError, r"q: wanted this rank's rows in a plain tensor, got torch.sparse_coo \(on rank 1\)", q.to_sparse() if rank else q, {}),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^{words}"):
            context_parallel_attention(given, q, q, group=group, **options)
    with pytest.raises(ValueError, match="^method: wanted one of"):  # what all do
        context_parallel_attention(q, q, q, group=group, method="none")
    with pytest.raises(ValueError, match="^key_lengths: wanted values from 0 to 8, got 9 of batch entry 0"):  # as one rank looks, all do
        context_parallel_attention(q, q, q, group=group, key_lengths=torch.tensor([9]))
    os.environ["TRIFLASH_CHECK"] = "1"  # values are looked at as in attention
    for name, words in (("key_lengths", "values from 0 to 8, got 9"), ("query_starts", "values from 0 to 8, got -1")):
        with pytest.raises(ValueError, match=f"^{name}: wanted {words} of batch entry 0"):
            context_parallel_attention(q, q, q, group=group, **{name: torch.tensor([9 if name == "key_lengths" else -1])})
    del os.environ["TRIFLASH_CHECK"]
    x = q[:, : 3 + rank]  # shares may differ
    context_parallel_attention(x, x, x, group=group, order="contiguous", length=7, key_length=7)
    torch.testing.assert_close(context_parallel_attention(q, q, q, group=group), same)


def check_errors(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import DeviceMesh

    from triflash.distributed import context_parallel_attention, positions, shard, unshard

    group = dist.group.WORLD
    q = torch.randn(2, 4, 3, 4)

    def run(*given: Tensor, **options: Any) -> Any:
        return context_parallel_attention(*(given or (q, q, q)), **{"group": group, **options})

    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, r"^method: wanted one of allgather, ulysses, ring, got 'gather'", {"method": "gather"}),
        (ValueError, r"^order: wanted one of zigzag, contiguous, got 'zig'", {"order": "zig"}),
        (TypeError, r"^group: wanted a ProcessGroup, a DeviceMesh of one dim.*got None.*WORLD", {"group": None}),
        (TypeError, r"^group: wanted a ProcessGroup.*got str", {"group": "WORLD"}),
        (TypeError, r"^head_chunks: wanted an integer", {"head_chunks": 1.0}),
        (ValueError, r"^head_chunks: wanted an integer from 1 up", {"head_chunks": 0}),
        (ValueError, r"^programs: wanted an integer from 1 up", {"programs": -1}),
        (TypeError, r"^length: wanted an integer, got str", {"length": "8"}),
        (ValueError, rf"^q: wanted \d+ rows on rank {rank} of 2, its zigzag share of length=11, got 4", {"length": 11}),
        (ValueError, rf"^k: wanted \d+ rows on rank {rank} of 2, its zigzag share of key_length=11, got 4", {"key_length": 11}),
        (ValueError, r"^bias: wanted .*M=4, N=8.*got \(4, 4\)", {"bias": torch.zeros(4, 4)}),
        (triflash.UnsupportedError, r"^method='ulysses' with 3 query heads on 2 ranks.*method='allgather' and", {"method": "ulysses"}),
        (TypeError, r"^is_causal: wanted an argument of context_parallel_attention .*causal='top_left'", {"is_causal": True}),
        (TypeError, r"^return_lse", {"return_lse": 1}),
    ]  # fmt: skip
    for kind, words, options in wrong:
        with pytest.raises(kind, match=words):
            run(**options)
    with pytest.raises(TypeError, match=r"^context_parallel_attention: wanted q, k and v by position, got 4"):
        run(q, q, q, q)
    with pytest.raises(ValueError, match=r"^q: wanted 4 dims or more"):
        run(q[0], q, q)
    with pytest.raises(ValueError, match=r"^q: wanted 3 rows on rank 0 of 2, its contiguous share of 7, got 4; the ranks hold \[4, 3\]"):
        run(*[q[:, : 4 - rank]] * 3, order="contiguous")
    with pytest.raises(ValueError, match=r"^k: wanted"):
        run(q, q[..., :3], q)
    with pytest.raises(ValueError, match=r"^dim: wanted one of the 4 dims"):
        shard(q, 4, group)
    with pytest.raises(ValueError, match=rf"^x: wanted 5 rows on rank {rank} of 2"):
        unshard(q, 1, group, length=10)
    with pytest.raises(ValueError, match="^length: wanted an integer from 0 up"):
        positions(-1, group)
    mesh = DeviceMesh("cpu", torch.arange(world), mesh_dim_names=("cp",))
    for same in (mesh, mesh["cp"], (mesh, 0), (mesh, "cp")):
        torch.testing.assert_close(run(group=same), run(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="^group: wanted a DeviceMesh of one dim, got one of 2"):
        run(group=DeviceMesh("cpu", torch.arange(world).view(1, world)))
    alone = [dist.new_group([n]) for n in range(world)]
    with pytest.raises(ValueError, match="^group: wanted a group that this process is in"):
        run(group=alone[1 - rank])
    for method in METHODS:  # a group of one
        torch.testing.assert_close(run(group=alone[rank], method=method, causal=True), triflash.attention(q, q, q, causal=True))


def check_arguments(rank: int, world: int) -> None:
    check_errors(rank, world)
    check_agreement(rank)
    check_programs()
    check_known_calls()
    for method in METHODS:
        check_kernels(method)


def check_compiled(rank: int, world: int) -> None:
    for method in METHODS:
        check_compiled_by(method)


def check_compiled_by(method: str) -> None:
    """One graph, whose collectives are functional ones, with the gradients of the eager call."""
    from torch._dynamo.backends.debugging import aot_eager

    from triflash.distributed import context_parallel_attention, positions, shard, unshard

    group, S = dist.group.WORLD, 11
    graphs: list[Any] = []

    def looking(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def step(q: Tensor, k: Tensor, bias: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = context_parallel_attention(
            q, k, k, group=group, method=method, bias=bias, sink=sink, causal=True, length=S, key_length=S, return_lse=True
        )
        return unshard(out * 2, 1, group, length=S), lse

    def local(x: Tensor) -> Tensor:
        return shard(x, 1, group) + positions(S, group)[:, None, None]

    torch.manual_seed(3)
    q, k, bias, sink = (shard(torch.randn(shape), 1, group) for shape in ((2, S, 4, 4), (2, S, 2, 4), (4, S, S), (1, 4)))
    sink = torch.randn(4)
    found = []
    whole = torch.randn(2, S, 4, 4)
    for calling, cut in (
        (step, local),
        (torch.compile(step, backend=looking, fullgraph=True), torch.compile(local, backend="eager", fullgraph=True)),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, bias, sink)]
        out, lse = calling(*leaves)
        (out.sin().sum() + lse.sum()).backward()
        found.append([out.detach(), lse.detach(), *(x.grad for x in leaves), cut(whole)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)
    assert len(graphs) == 1
    with pytest.raises(Exception, match="length"):
        torch.compile(lambda x: context_parallel_attention(x, x, x, group=group, method=method), backend="eager", fullgraph=True)(q)


def page(rank: int, store: str) -> None:
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(snippets) == 2
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)


def example(rank: int, world: int, port: int, folder: str) -> None:
    """What torchrun starts, with what it says in a file."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "")
    torch.set_num_threads(1)
    sys.argv = ["long_context.py", "--steps", "50", "--length", "33"]
    with open(f"{folder}/said.{rank}", "w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    Path(f"{folder}/store.seconds.{rank}").write_text(str(time.process_time()))


def survive(rank: int, world: int, store: str, how: str, done: Any) -> None:
    """One call, in which the last rank dies or hangs in the second step of the ring. What came of it goes to a file."""
    from triflash.distributed import context_parallel_attention, ring

    begin(rank, world, store, datetime.timedelta(seconds=60 if how == "dies" else 5))
    forward, steps = ring.tiles.forward, [0]

    def stopping(*args: Any, **options: Any) -> Any:
        steps[0] += 1
        if rank == world - 1 and steps[0] == 2:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            done.wait()
            os._exit(0)
        return forward(*args, **options)

    ring.tiles.forward = stopping  # type: ignore[assignment]
    q = torch.randn(1, 4, 2, 4)
    try:
        result = context_parallel_attention(q, q, q, group=dist.group.WORLD, method="ring", order="contiguous")
        Path(f"{store}.{rank}").write_text(f"a tensor {tuple(result.shape)}")
    except RuntimeError as error:
        Path(f"{store}.{rank}").write_text(str(error))
    os._exit(0)  # a group that has failed cannot be taken apart


def test_errors_and_kernels(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    run(2, tmp_path, record_property, check_arguments)


def test_compiled(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    run(2, tmp_path, record_property, check_compiled)


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_that_does_not_go_on_ends_the_others(how: str, tmp_path: Path) -> None:
    """With words, and no tensor anywhere. The test waits for processes to end; the group's time-out is what ends those that wait for one."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    context, world = multiprocessing.get_context("forkserver"), 3
    done = context.Event()
    ranks = [context.Process(target=survive, args=(rank, world, str(tmp_path / "store"), how, done)) for rank in range(world)]
    for each in ranks:
        each.start()
    for each in ranks[:-1]:
        each.join()
    done.set()
    ranks[-1].join()
    assert ranks[-1].exitcode == (-signal.SIGKILL if how == "dies" else 0)
    for rank in range(world - 1):
        said = (tmp_path / f"store.{rank}").read_text()
        assert said.startswith(f"context_parallel_attention, rank {rank} of 3: ") and "ended or hangs" in said, said
    assert not (tmp_path / f"store.{world - 1}").exists()


def test_the_script_checks_and_measures(tmp_path: Path) -> None:
    """On the CPU, where its figures mean nothing."""
    words = ["--device", "cpu", "--ranks", "2", "--tokens", "24", "--heads", "4/2", "--dim", "8", "--repeats", "1", "--json"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(each for each in sys.path if each),
        "TRITON_INTERPRET": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    script = Path(__file__).parent.parent / "scripts" / "context_parallel.py"
    run = subprocess.run(
        [sys.executable, str(script), *words, str(tmp_path / "found.json")], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    methods = {row["method"] for row in found["rows"]}
    assert methods >= {*METHODS, "torch context_parallel", "allgather, bias"} and found["about"]["ranks"] == 2
    assert "results and gradients agree" in run.stdout and "| 4/2 | ring |" in run.stdout


def test_the_script_draws_weak_scaling(tmp_path: Path) -> None:
    """From figures that were measured elsewhere: compute and exposed communication lie one on the other, and a mark where no time is lost."""
    rows: list[dict[str, Any]] = [{"heads": "32/8", "method": "ring", "forward": 9.0, "both": 30.0}]
    for ranks, forward, compute in ((1, 2.0, 2.1), (2, 4.5, 4.0), (4, 10.0, 8.0)):
        rows.append(
            {
                "heads": "32/8",
                "method": "allgather",
                "ranks": ranks,
                "forward": forward,
                "compute_forward": compute,
                "both": 3 * forward,
                "compute_both": 3 * compute,
            }
        )
    file = tmp_path / "found.json"
    file.write_text(json.dumps({"about": {"gpu": "A GPU", "tokens a rank": 8192, "head dim": 128}, "rows": rows}))
    script = Path(__file__).parent.parent / "scripts" / "context_parallel.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    run = subprocess.run([sys.executable, str(script), "--draw", str(file)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    drawn = ET.fromstring(file.with_suffix(".svg").read_text())
    shapes = [each.attrib for each in drawn.iter("{http://www.w3.org/2000/svg}rect")]
    assert all(float(x["y"]) >= 0 and float(x["height"]) >= 0 for x in shapes)
    bars = {name: [float(x["height"]) for x in shapes if x["class"] == name][1:] for name in ("cool", "part")}  # behind the legend's
    for panel in (0, 3):
        whole, below = (
            [a + b for a, b in zip(bars["cool"], bars["part"], strict=True)][panel : panel + 3],
            bars["cool"][panel : panel + 3],
        )
        assert [x / whole[2] for x in whole] == pytest.approx([0.2, 0.45, 1.0], rel=1e-3)
        assert [x / whole[2] for x in below] == pytest.approx([0.2, 0.4, 0.8], rel=1e-3)  # never more than the step took
    words = [each.text for each in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert "A GPU, 8,192 tokens a rank, 32/8 heads of 128, allgather" in words
    file.write_text(json.dumps({"about": {}, "rows": rows[:1]}))
    run = subprocess.run([sys.executable, str(script), "--draw", str(file)], capture_output=True, text=True, env=environment)
    assert run.returncode == 1 and "no weak scaling" in run.stderr


def test_the_page_has_what_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = Path(__file__).parent.parent / "scripts"
    monkeypatch.syspath_prepend(scripts)
    script = runpy.run_path(str(scripts / "context_parallel.py"))
    assert f"\n\n{script['model']()}\n\n" in PAGE.read_text()


def test_the_page_runs_as_written(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(page, ("",), nprocs=1, start_method="forkserver")


def test_the_example_learns(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(example, (2, port, str(tmp_path)), nprocs=2, start_method="forkserver")
    tell(tmp_path, record_property)
    losses = [float(line.split()[-1]) for line in (tmp_path / "said.0").read_text().splitlines()]
    assert len(losses) == 10 and losses[-1] < 0.75 * losses[0], losses
    assert (tmp_path / "said.1").read_text() == ""
    assert len(EXAMPLE.read_text().splitlines()) <= 80
