"""What an eager call costs: who is called and how, the passes of the host, their breakdown, and the sweep with its bars. No clock is judged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch._functorch.config as functorch_config
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import triflash
from triflash.__main__ import main
from triflash.cli.bench import breakdown, compiling, measure
from triflash.cli.bench.contest import Contest, Settings, Side
from triflash.cli.bench.entry import Entry
from triflash.cli.bench.gate import verdict
from triflash.cli.bench.providers import PROVIDERS, Dense, provider
from triflash.cli.bench.record import Run
from triflash.cli.bench.sweeps import SWEEPS
from triflash.cli.bench.workloads import Workload

CPU = torch.device("cpu")
STEP = Settings(("step",), CPU, 0.001, 2, 0)
PLAIN = Workload("plain", 2, 2, 24, 24, 8, hi=0, dtype="fp32")
BIASED = dataclasses.replace(PLAIN, hi=None, bias="1hqk", dbias=True)


def called(workload: Workload, name: str = "triflash") -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """What a step of a provider hands to ``triflash.attention``."""
    seen: list[Any] = []
    real = triflash.attention

    def attention(*args: Any, **more: Any) -> Tensor:
        seen.append((args, more))
        out: Tensor = real(*args, **more)
        return out

    with mock.patch.object(triflash, "attention", attention):
        Side(Contest(workload, STEP), provider(name)).step()
    (call,) = seen
    return call


@pytest.mark.parametrize(
    "workload, name, wanted",
    [
        (PLAIN, "triflash", {"bias": None, "causal": True}),
        (PLAIN, "triflash-tiled", {"bias": None, "causal": True, "backend": "tiled"}),
        (dataclasses.replace(PLAIN, keys=40), "triflash", {"bias": None, "causal": "top_left"}),
        (dataclasses.replace(PLAIN, hi=None, scale=1.0, softcap=5.0), "triflash", {"bias": None, "scale": 1.0, "softcap": 5.0}),
        (dataclasses.replace(PLAIN, lo=-7), "triflash", {"bias": None, "causal": True, "window": (7, None)}),
        (dataclasses.replace(PLAIN, keys=40, lo=-7), "triflash", {"bias": None, "causal": "top_left", "window": (7, None)}),
        (dataclasses.replace(PLAIN, keys=28, lo=-3, hi=5), "triflash", {"bias": None, "window": (7, 1)}),
        (dataclasses.replace(PLAIN, lo=-3, hi=None), "triflash", {"bias": None, "window": (3, None)}),
    ],
)
def test_triflash_is_called_as_its_users_call_it(workload: Workload, name: str, wanted: dict[str, Any]) -> None:
    """And computes the same as the formula: the band, say, means the same."""
    args, more = called(workload, name)
    assert more == wanted
    assert [tuple(x.shape) for x in args] == list(workload.shapes)
    contest = Contest(workload, STEP, judged=True)
    assert verdict(contest.parts, Side(contest, provider(name)).results("step")) is None


def test_two_batch_levels_are_two_batch_dims() -> None:
    workload = dataclasses.replace(PLAIN, batch=6, batch_inner=3, bias="b1hqk", dbias=True)
    (q, k, _), more = called(workload)
    assert q.shape == k.shape == (2, 3, 24, 2, 8) and more["bias"].shape == (2, 1, 2, 24, 24)
    assert called(dataclasses.replace(workload, batch_inner=1, bias="bhqk"))[1]["bias"].shape == (6, 2, 24, 24)


def test_a_mask_is_a_mask() -> None:
    more = called(dataclasses.replace(PLAIN, bias="b11k", bias_values="holes mask"))[1]
    assert "bias" not in more and more["mask"].dtype == torch.bool and more["causal"] is True


def test_what_else_triflash_is_told() -> None:
    more = called(dataclasses.replace(PLAIN, slopes=True, dropout=0.25, deterministic=True))[1]
    assert more["alibi_slopes"].tolist() == [2**-4, 2**-8] and (more["dropout_p"], more["deterministic"]) == (0.25, True)
    assert isinstance(more["dropout_seed"], int)


def test_padding_reaches_triflash_as_key_lengths() -> None:
    workload = dataclasses.replace(PLAIN, hi=None, bias="b11k", bias_values="padding")
    more = called(workload)[1]
    assert more["bias"] is None and more["key_lengths"].tolist() == workload.lengths


@pytest.mark.parametrize("name, shape", [("triflash", (2, 24, 2, 8)), ("sdpa", (2, 2, 24, 8)), ("sdpa-cudnn", (2, 2, 24, 8))])
def test_tensors_are_leaves_in_their_callers_layout(name: str, shape: tuple[int, ...]) -> None:
    """Nothing of the bench's own is in the graph that is timed."""
    side = Side(Contest(BIASED, STEP), provider(name))
    assert [tuple(x.shape) for x in side.leaves] == [shape] * 3 + [(1, 2, 24, 24)]
    assert all(x.is_leaf and x.requires_grad for x in side.leaves) and [*side.inputs] == side.leaves
    assert not any(x is not None and x.requires_grad for x in side.plain)
    assert tuple(side.dout.shape) == shape


def test_sdpa_chooses_its_backend_outside_the_call() -> None:
    entry = provider("sdpa-efficient").attend(PLAIN, PLAIN.build(CPU))
    assert torch.backends.cuda.flash_sdp_enabled()
    with entry.around():
        assert torch.backends.cuda.mem_efficient_sdp_enabled() and not torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("name", ["triflash-compiled", "sdpa-compiled"])
@pytest.mark.parametrize("workload", [PLAIN, BIASED], ids=["plain", "biased"])
def test_compiled_providers_compute_it(name: str, workload: Workload) -> None:
    """Whole graphs, without the compiler behind them."""
    compiling.forget()
    with mock.patch.object(compiling, "BACKEND", "aot_eager"):
        contest = Contest(workload, STEP, judged=True)
        side = Side(contest, provider(name))
        for which in ("fwd", "step"):
            assert verdict(contest.parts, side.results(which)) is None
    compiling.forget()
    assert provider(name).is_ours == (name == "triflash-compiled")
    assert provider(name).why_not(workload, CPU) == "needs a GPU"


def test_compiled_backward_passes_get_the_output_gradient_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA's lies heads first in memory of another order. PyTorch 2.11 would make it contiguous."""
    seen: list[tuple[int, ...]] = []

    def noted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*args: Tensor) -> Any:
            (at,) = [i for i, node in enumerate(graph.graph.find_nodes(op="placeholder")) if node.name.startswith("tangents")]
            seen.append(args[at].stride())
            return graph(*args)

        return make_boxed_func(run)

    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=noted)
    monkeypatch.setattr(compiling, "BACKEND", backend)
    compiling.forget()
    with functorch_config.patch(guess_tangent_strides_as_outputs=False):
        side = Side(Contest(PLAIN, STEP), provider("sdpa-compiled"))
        side.step()
    compiling.forget()
    assert seen == [side.dout.stride()] and not side.dout.is_contiguous()


def test_without_its_bias_a_problem_is_judged_as_what_it_is() -> None:
    full, bare = BIASED.build(CPU), BIASED.without_bias().build(CPU)
    assert bare.bias is None and all(torch.equal(getattr(full, name), getattr(bare, name)) for name in ("q", "k", "v", "dout"))
    found = measure.measure(BIASED, [PROVIDERS["sdpa-nobias"], PROVIDERS["dense"]], STEP, lambda _: None)
    assert [row.status for row in found] == ["ok", "ok"]


class Lengths(Dense):
    """Remembers the lengths that it was called at."""

    def __init__(self) -> None:
        super().__init__("lengths")
        self.seen: list[int] = []

    def attend(self, workload: Workload, problem: Any) -> Entry:
        attend = super().attend(workload, problem)

        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            self.seen.append(q.shape[1])
            return attend(q, k, v, bias)

        return Entry(run)


def test_a_first_step_is_at_a_length_not_seen_before() -> None:
    """Between lengths that were, and alike in what compilers look at."""
    it = Lengths()
    with mock.patch.object(measure, "FIRST_LENGTHS", 2):
        (row,) = measure.measure(PLAIN, [it], Settings(("first",), CPU, 0.001, 2, 0), lambda _: None)
    assert it.seen[:2] == [24, 24]  # judged
    assert it.seen[2:] == [24, 56, 88, 40, 72] and len(row.samples_ms) == 2


def test_who_compiles_for_every_length_has_no_first_step() -> None:
    with mock.patch.object(Dense, "compiles_lengths", True):
        rows = measure.measure(PLAIN, [Dense("x")], Settings(("first", "step"), CPU, 0.001, 2, 0), lambda _: None)
    assert [(row.status, row.reason) for row in rows] == [("dash", "compiles anew for every length"), ("ok", "")]


def entry(code: Any, calls: int, own: float, whole: float) -> Any:
    return SimpleNamespace(code=code, callcount=calls, inlinetime=own, totaltime=whole)


def function_in(path: str) -> Any:
    return compile("def f(): pass", path, "exec").co_consts[0]


def test_a_profile_is_summed_by_file_and_package() -> None:
    grad, generated = torch.autograd.grad.__code__, function_in("<string>")
    here = breakdown._roots()["triflash"] + "attention.py"
    entries = [
        entry(function_in(here), 10, 20e-6, 90e-6),
        entry(function_in(here), 5, 5e-6, 5e-6),
        entry(grad, 10, 30e-6, 60e-6),
        entry("<built-in method torch.empty>", 40, 25e-6, 25e-6),
        entry("<built-in method launch at 0x7f00deadbeef>", 40, 8e-6, 8e-6),
        entry("<built-in method builtins.len>", 10, 1e-6, 1e-6),
        entry(generated, 10, 1e-6, 1e-6),
        entry(test_a_profile_is_summed_by_file_and_package.__code__, 10, 10e-6, 10e-6),
    ]
    found = breakdown.tables(entries, 10)
    assert found["profiled"] == 10.0
    assert found["groups"] == [
        ("torch/autograd", 1.0, 3.0),
        ("triflash/attention.py", 1.5, 2.5),
        ("torch, C++", 4.0, 2.5),
        ("python", 1.0, 1.0),
        ("triton, C", 4.0, 0.8),
        ("python, C", 1.0, 0.1),
        ("generated code", 1.0, 0.1),
    ]
    assert found["functions"][0][0].startswith("torch/autograd/__init__.py:") and found["functions"][0][0].endswith(" grad")
    assert ("built-in method launch", 4.0, 0.8, 0.8) in found["functions"]
    assert not any("0x" in f[0] or f[0].startswith("/") for f in found["functions"])


def test_many_files_end_in_one_line() -> None:
    codes = [function_in(breakdown._roots()["triflash"] + f"m{n}.py") for n in range(30)]
    found = breakdown.tables([entry(code, 1, 1e-6, 1e-6) for code in codes], 1)
    assert len(found["groups"]) == breakdown.GROUPS + 1 and found["groups"][-1] == ("all others", 6.0, 6.0)
    assert sum(own for _, _, own in found["groups"]) == found["profiled"] == 30.0


@pytest.mark.parametrize("workload", [PLAIN, BIASED], ids=["plain", "biased"])
def test_a_step_is_taken_apart(workload: Workload) -> None:
    """The backward pass too, wherever autograd runs it; every own time is in the sum, and no path of this machine."""
    side = Side(Contest(workload, STEP), provider("triflash-tiled"))
    found = breakdown.breakdown(side, CPU, 0.001)
    assert list(found["pieces"]) == [
        "allocating outputs and gradients",
        "a step of a bare autograd.Function that allocates them",
        "forward without autograd",
        "forward",
        "step",
    ]
    assert all(us > 0 for us in found["pieces"].values())
    groups = {name: calls for name, calls, _ in found["groups"]}
    assert groups["triflash/tiled.py"] > 1 and groups["torch, C++"] > 1
    assert sum(own for _, _, own in found["groups"]) == pytest.approx(found["profiled"], rel=0.01)
    names = [name for name, *_ in found["functions"]]
    assert any("tiled.py" in name and name.endswith("backward") for name in names)
    assert str(Path(triflash.__file__).parent) not in json.dumps(found)


def test_the_bare_function_has_a_gradient_for_every_leaf() -> None:
    side = Side(Contest(BIASED, STEP), provider("triflash-tiled"))
    out = breakdown._Bare.apply(side.train().detach(), *side.inputs)
    grads = torch.autograd.grad(out, side.leaves, side.dout)
    assert [x.shape for x in grads] == [x.shape for x in side.leaves]


def test_breakdown_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked for alone it measures the host; a breakdown that fails says so and leaves the times."""
    words = ["bench", "--device", "cpu", "--budget", "0.002", "--min-samples", "2", "--d", "8", "--s", "16", "--h", "1", "--causal", "yes"]
    words += ["--bias", "none", "--providers", "triflash,sdpa", "--breakdown", "--out", str(tmp_path)]
    assert main(words) == 0
    found = Run.load(tmp_path / "bench.json")
    assert found.passes == ["host-nograd", "host-fwd", "host-step"]
    assert [(row.provider, row.which) for row in found.rows if row.breakdown] == [("triflash", "host-step")]
    page = (tmp_path / "bench.md").read_text()
    for expected in ("| forward without autograd |", "| triflash/tiled.py |", "own µs", "by file or package"):
        assert expected in page
    assert main(["bench", "plot", str(tmp_path / "bench.json")]) == 0 and (tmp_path / "bench.md").read_text() == page
    with mock.patch.object(measure, "breakdown", side_effect=ValueError("Another profiling tool is already active")):
        assert main([*words, "--pass", "fwd"]) == 0
    found = Run.load(tmp_path / "bench.json")
    assert found.passes == ["fwd", "host-step"] and all(row.status == "ok" for row in found.rows)
    assert "ValueError: Another profiling tool is already active" in (tmp_path / "bench.md").read_text()


def test_the_sweep_of_the_host() -> None:
    jobs = SWEEPS["host"].jobs
    sizes = {(b, s, d) for b in (1, 8) for s in (128, 512, 2048) for d in (64, 128)}
    for bias in (None, "1hqk"):
        found = [j for j in jobs if j.workload.bias == bias and "host-nograd" in j.passes]
        assert {(j.workload.batch, j.workload.keys, j.workload.head_dim) for j in found} == sizes and len(found) == len(sizes)
        assert all(j.workload.heads == 16 and j.workload.dbias == (bias is not None) for j in found)
    eager = [j.workload for j in jobs if "step" in j.passes]
    assert [(w.batch, w.keys, w.heads, w.head_dim, w.is_causal) for w in eager] == [(32, 512, 32, 64, False), (8, 2048, 16, 128, True)]
    assert len({j.workload.key for j in jobs}) == len(jobs)
    assert all(name in PROVIDERS for j in jobs for name in j.providers)
    for bar in SWEEPS["host"].bars:
        for name in (bar.ours, *bar.peers):
            assert any(name in j.providers and bar.which in j.passes for j in jobs), (bar.name, name)


def test_a_sweep_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some of its jobs, shrunk; the bars have their table, met or not, and ``plot`` makes it again."""
    whole = SWEEPS["host"]
    some = dataclasses.replace(whole, jobs=(whole.jobs[0], whole.jobs[12], *whole.jobs[-4:-2]))
    words = ["bench", "--sweep", "host", "--tiny", "--dtype", "fp32", "--device", "cpu", "--budget", "0.002", "--min-samples", "2"]
    words += ["--providers", "triflash,sdpa,sdpa-nobias,fa4", "--out", str(tmp_path)]
    with mock.patch.dict(SWEEPS, {"host": some}), mock.patch.object(measure, "FIRST_LENGTHS", 2):
        assert main(words) == 0
    found = Run.load(tmp_path / "bench.json")
    assert [len({row.provider for row in found.rows if row.cell == cell.key}) for cell in found.cells] == [3, 3, 2, 2]
    page = (tmp_path / "bench.md").read_text()
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and "(tiny)" in line]
    bars = [(line[0][2:], line[1], line[3], line[6]) for line in lines if len(line) == 8 and line[6][:1] in "≥≤"]
    assert ("step", "b1 s128 d64 causal (tiny)", "sdpa", "≤ 1.15x") in bars
    assert ("step with a bias and its gradient, to SDPA without it", "b1 s128 d64 1hqk+db (tiny)", "sdpa-nobias", "≤ 1.5x") in bars
    assert ("first step at a new length", "b1 s1001 d64 causal (tiny)", "", "≤ 2000 µs") in bars
    facts = json.loads((tmp_path / "bars.json").read_text())
    cells, means = [fact for fact in facts if "case" in fact], [fact for fact in facts if "geometric_mean" in fact]
    assert len(cells) == len(bars) and len(means) == len(whole.bars) and len(facts) == len(cells) + len(means)
    for fact in cells:
        value = fact["ms"] if fact["kind"] == "ms" else fact["ms"] / fact["peer_ms"] if fact["peer"] else None
        assert fact["value"] == value and fact["met"] == (None if value is None else value <= fact["bound"])
    assert {fact["bar"] for fact in cells if fact["met"] is None} == {"step", "step with a bias and its gradient", "eager step, wall time"}
    assert all("sdpa-efficient: was not asked for" in page and fact["reason"] for fact in cells if fact["met"] is None)
    assert "compiled step: not measured" in page and "step: met in " in page
    assert main(["bench", "plot", str(tmp_path / "bench.json")]) == 0 and (tmp_path / "bench.md").read_text() == page
