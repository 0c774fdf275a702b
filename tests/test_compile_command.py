"""``triflash compile`` without a compiler: which problems, which kernels, what it says. ``tests/stub`` compiles and launches."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("triton")

from rich.console import Console

from triflash.__main__ import main
from triflash.cli.bench.models import LAYERS
from triflash.cli.bench.workloads import DECODE, NAMED
from triflash.cli.compile import options, run
from triflash.cli.compile.problems import Problem, problems
from triflash.launch.ahead import Resources


def asked(*words: str) -> list[Problem]:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    return list(problems(parser.parse_args(words), options.defaults(parser)))


def test_a_problem_at_several_lengths() -> None:
    found = asked("--s", "512,1k", "--causal", "--window", "128,0", "--device", "h100", "--dtype", "fp16", "--hk", "4")
    name = "--dtype float16 --causal --hk 4 --window 128,0 --device h100"
    assert [(each.name, each.which) for each in found] == [(f"--s {s} {name}", which) for s in (512, 1024) for which in ("fwd", "bwd")]
    assert [each.which for each in asked("--pass", "bwd,bwd")] == ["bwd"]
    assert all(hash(each) == hash(each) for each in found)


HOPPER = ["forward", "preprocess", "dkdv", "dq"]


@pytest.mark.parametrize(
    "name, steps",
    [
        ("llama3-8b", {"fwd": ["forward"], "bwd": [*HOPPER[:2], "dkdv", "dkdv", "dq", "dq"]}),  # long: one for each of two loops
        ("bert-large", {"fwd": ["forward"], "bwd": ["forward", "preprocess", "dqdkdv"]}),  # its bias is key lengths
        ("t5-xl-encoder", {"fwd": ["forward"], "bwd": [*HOPPER, "dbias"]}),
        ("decode-llama3-8b-b8-8k", {"fwd": ["few_forward", "combine"]}),
    ],
)
def test_workloads(name: str, steps: dict[str, list[str]]) -> None:
    """dq by a kernel of its own, or summed in shared memory, as where results have to repeat themselves."""
    found = asked("--workload", name, "--device", "h100", "--deterministic")
    assert {each.which: [launch.step.split()[0] for launch in each.launches()[0]] for each in found} == steps
    assert all(each.launches()[1].arch == "sm90" for each in found)


def test_a_mask_is_looked_at_first() -> None:
    found = asked("--mask", "b1qk", "--s", "4k,128", "--device", "h100", "--deterministic")
    names = {(each.name.split()[1], each.which): [launch.step.split()[0] for launch in each.launches()[0]] for each in found}
    assert {key: [name for name, _ in itertools.groupby(each)] for key, each in names.items()} == {
        ("4096", "fwd"): ["mask_bounds", "forward"], ("4096", "bwd"): ["mask_bounds", "forward", "mask_bounds", *HOPPER[1:]],
        ("128", "fwd"): ["forward"], ("128", "bwd"): HOPPER,
    }  # fmt: skip


@pytest.mark.parametrize("name", [*NAMED, *LAYERS, "decode-ragged"])
def test_every_workload_has_launches(name: str) -> None:
    """On an A100 and an H100."""
    workload = {**NAMED, **LAYERS, **DECODE}[name]
    for device in ("a100", "h100"):
        for each in asked("--workload", name, "--device", device):
            launches, facts, _ = each.launches()
            assert launches and facts.arch == {"a100": "sm80", "h100": "sm90"}[device]
            assert not workload.cache or each.which == "fwd"
            assert {launch.which for launch in launches} == ({"forward"} if each.which == "fwd" else {"forward", "backward"})


def test_a_workload_is_described_as_it_is_built() -> None:
    """Meta tensors have the shapes, dtypes and strides of those that the bench makes."""
    for workload in (*NAMED.values(), *LAYERS.values()):
        small = workload.shrunk()
        described, built = small.described(), small.build(torch.device("cpu"))
        for a, b in zip((described.q, described.k, described.v, described.bias), (built.q, built.k, built.v, built.bias), strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert described.sequences == built.sequences and described.options.lo == built.options.lo


class Compiled:
    """What stands in for the workers."""

    def __init__(self, workers: int, build: Any, failed: Callable[[str], run.Built], **kinds: run.Built) -> None:
        self.workers, self.kinds, self.jobs = workers, kinds, []  # type: ignore[var-annotated]

    def build_all(self, jobs: list[run.Job], done: Callable[[], None]) -> dict[run.Job, run.Built]:
        self.jobs += jobs
        for _ in jobs:
            done()
        kinds = [
            run.Built(Resources(168, 6, 1024), 5.0, launcher=0.5), run.Built(Resources(32, 0, 2048), 0.1, cached=True, launcher=0.25),
            run.Built(error="ValueError: no"),
        ]  # fmt: skip
        return {job: kinds[at % 3] for at, job in enumerate(jobs)}

    def __enter__(self) -> Compiled:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither compiled nor hashed: kernels are told apart by name."""
    from triflash.launch import ahead

    monkeypatch.setattr(run, "interpreting", lambda: False)
    monkeypatch.setattr(ahead, "identity", lambda call, arch: f"{call.kernel.__name__} {arch}")
    with mock.patch.object(run, "Compiler", Compiled):
        yield


def shown(chosen: list[Problem], cache: Path | None = None) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    with mock.patch.object(run, "table_console", lambda: console), contextlib.redirect_stderr(io.StringIO()):
        status = run.run(chosen, 4, cache)
    return status, console.file.getvalue()  # type: ignore[attr-defined]


def test_what_it_says(not_compiled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    cache = tmp_path / "new" / "cache"
    status, said = shown(asked("--s", "512,1k", "--device", "a100"), cache)
    assert status == 1 and cache.is_dir()
    rows = [line.split("│")[1:-1] for line in said.splitlines() if "│" in line]
    assert len(rows) == 4  # forward, delta, dkdv, dq: the two lengths are of the same kernels here
    assert [[cell.strip() for cell in row[3:]] for row in rows[:3]] == [
        ["5.0", "168", "6", "1.0"],
        ["there", "32", "0", "2.0"],
        ["failed", "", "", ""],
    ]
    assert all("and 1 more" in row[2] for row in rows) and "ValueError: no" in said
    assert "2 kernels compiled in 10.0 s and 3 launchers built in 1.2 s, by 4 processes" in said and "1 were in the cache" in said
    assert str(cache) in said.replace("\n", "") and "sm80, Triton" in said


def test_nothing_to_compile(not_compiled: None) -> None:
    status, said = shown(asked("--d", "64", "--dtype", "fp64", "--device", "h100"))
    assert status == 0 and "nothing to compile: tiled runs it in PyTorch" in said


@pytest.mark.parametrize(
    "words, message",
    [
        (["--workload", "gpt5"], "--workload gpt5: wanted all or one of"),
        (["--workload", "phi2", "--d", "128", "--causal"], "--d, --causal: a named workload has its own shape"),
        (["--workload", ","], "argument --workload: wanted at least one name, got none"),
        (["--pass", "step"], "argument --pass: step: wanted some of fwd, bwd"),
        (["--workers", "0"], "argument --workers: size: wanted a positive whole number"),
        (["--device", "h1000"], "device: wanted one of cpu, "),
        (["--cache", __file__], "File exists"),
        (["--s", "64,none"], "argument --s: size: wanted a positive whole number"),
    ],
)
def test_bad_options(words: list[str], message: str, not_compiled: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["compile", *words])
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "interpreting", lambda: True)
    with pytest.raises(SystemExit):
        main(["compile", "--device", "h100"])
    assert "TRITON_INTERPRET: wanted 0: the interpreter compiles nothing, got 1" in capsys.readouterr().err


def test_a_backend_that_cannot(not_compiled: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "--backend", "hopper", "--device", "a100"]) == 1
    assert "hopper" in capsys.readouterr().err
