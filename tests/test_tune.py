"""Tuning: what is tried, what is refused, who wins, and what is written. The timer is a stand-in here, except where a GPU is."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("triton")

import io

from rich.console import Console

import triflash
from triflash.__main__ import main
from triflash.cli.tune import candidates as listing
from triflash.cli.tune import run
from triflash.cli.tune.candidates import Built, Job, candidates, shares
from triflash.cli.tune.cases import Case
from triflash.cli.tune.choose import FINALISTS, finalists, ranking
from triflash.cli.tune.measure import Bench, Measured
from triflash.cli.tune.options import Options
from triflash.cli.tune.report import visible_pairs
from triflash.launch.triton import Call
from triflash.plan import overlay, tables
from triflash.plan.configs import Problem, TileConfig
from triflash.plan.device import KNOWN_DEVICES, facts_of
from triflash.plan.select import plan_backward, plan_forward
from triflash.spec import Needs

GPU = dataclasses.replace(KNOWN_DEVICES["sm90"], name="NVIDIA H200")
CASE = Case(4, 2048, 2048, 16, 64, torch.bfloat16, "1hqk", True, True)


def options(tmp_path: Path, *cases: Case, **changes: Any) -> Options:
    plain = Options(cases or (CASE,), overlay.TUNABLE, tmp_path / "t.json", None, 0.01, 0.01, 64, 1, None)
    return dataclasses.replace(plain, **changes)


@dataclasses.dataclass(frozen=True)
class Resources:
    registers: int = 128
    spills: int = 0
    shared_memory: int = 65_536


class Compiler:
    """Compiles nothing: ``says`` names what a job takes."""

    def __init__(self, says: Callable[[Job], Resources | str] = lambda job: Resources()) -> None:
        self.says, self.jobs = says, []  # type: ignore[var-annotated]

    def build_all(self, jobs: Iterable[Job], done: Callable[[], None] = lambda: None) -> dict[Job, Built]:
        found = {}
        for job in jobs:
            self.jobs.append(job)
            said = self.says(job)
            found[job] = Built(None, said) if isinstance(said, str) else Built(said)  # type: ignore[arg-type]
            done()
        return found


def timer(ms: Callable[[Case, str, TileConfig], float | str]) -> Any:
    """A stand-in for ``Bench``: ``ms`` says how long a configuration takes, or what is wrong with it. ``seen`` has what was measured."""

    class Fake:
        seen: ClassVar[list[tuple[Case, str, tuple[TileConfig, ...], float]]] = []

        def __init__(self, case: Case, *_: Any) -> None:
            self.case = case

        def measure(self, kernel: str, configs: Iterable[TileConfig], budget: float, done: Any = lambda: None) -> Any:
            self.seen.append((self.case, kernel, tuple(configs), budget))
            said = {config: ms(self.case, kernel, config) for config in configs}
            return {config: Measured(problem=x) if isinstance(x, str) else Measured((x, x, x)) for config, x in said.items()}

    return Fake


def tune(chosen: Options, ms: Callable[[Case, str, TileConfig], float | str], compiler: Compiler | None = None, device: Any = GPU) -> str:
    """The text that a run prints."""
    console = Console(file=io.StringIO(), width=200)
    status = run.tune(chosen, device, compiler or Compiler(), timer(ms), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert status == (0 if "written to" in text else 1)
    return text


def best(path: Path) -> dict[str, TileConfig]:
    return {entry.problem.kernel: entry.config for entry in overlay.load(path).entries}


# ------------------------------------------------------------------------------------------------------------------- what is tried


@pytest.mark.parametrize("arch", ["sm80", "sm86", "sm90", "gfx942"])
@pytest.mark.parametrize("kernel", overlay.TUNABLE)
def test_candidates(kernel: str, arch: str) -> None:
    default = TileConfig(16, 16, 1, 4)
    for itemsize, bias in ((2, False), (2, True), (4, False), (4, True)):
        found = candidates(Problem(kernel, 64, itemsize, bias, False), KNOWN_DEVICES[arch], default)
        assert found[0] == default and len(found) == len(set(found)) > 10
        if arch == "sm86" or arch == "gfx942" or itemsize == 4:
            assert TileConfig(32, 32, 4, 1) in found
        elif arch == "sm90":
            assert not any(config.block_m < 64 and config.block_n < 64 for config in found[1:])


def test_measured_rows_would_be_found_again() -> None:
    missing = []
    for row in tables.ROWS:
        if row.problem.head_dim in (64, 128) and row.arch == "sm90":
            found = candidates(row.problem, KNOWN_DEVICES["sm90"], TileConfig(16, 16, 1, 4))
            missing += [] if row.config in found else [str(row)]
    assert not missing, missing


def test_what_is_feasible() -> None:
    assert Built(Resources()).refused(GPU, 0) is None  # type: ignore[arg-type]
    assert Built(Resources(spills=65)).refused(GPU, 64) == "65 spilled words a thread"  # type: ignore[arg-type]
    assert Built(Resources(spills=65)).refused(GPU, None) is None  # type: ignore[arg-type]
    assert Built(Resources(shared_memory=232_448)).refused(GPU, 64) is None  # type: ignore[arg-type]
    assert Built(Resources(shared_memory=232_449)).refused(GPU, None) == "232449 bytes of shared memory, of 232448"  # type: ignore[arg-type]
    assert Built(None, "no").refused(GPU, None) == "no"


def test_cases() -> None:
    assert str(CASE) == "b4 h16 s2048 d64 bf16 1hqk +db causal"
    assert CASE.kernels(GPU) == ["forward", "dkdv", "dq", "dbias"]
    assert dataclasses.replace(CASE, bias=None, dbias=False).kernels(GPU) == ["forward", "dkdv", "dq"]
    assert dataclasses.replace(CASE, bias="b11k").kernels(GPU) == ["forward", "dkdv", "dq"]
    assert CASE.problem("dq", KNOWN_DEVICES["sm90"]) == Problem("dq", 64, 2, True, True)
    row = tables.lookup("sm90", CASE.problem("dq", KNOWN_DEVICES["sm90"]))
    assert row is not None and CASE.default("dq", GPU) == row.config
    x = dataclasses.replace(CASE, keys=100, queries=7).tensors(lambda shape, dtype: torch.zeros(*shape, dtype=dtype))
    assert x.bias is not None and x.bias.shape == (1, 1, 16, 7, 100) and x.bias.stride(3) == 112
    assert (x.q.shape, x.v.shape, x.dout.shape) == ((4, 7, 16, 64), (4, 100, 16, 64), (4, 7, 16, 64))


@pytest.mark.parametrize("queries, keys", [(1, 1), (5, 5), (3, 7), (7, 3)])
def test_visible_pairs(queries: int, keys: int) -> None:
    for causal in (False, True):
        case = dataclasses.replace(CASE, queries=queries, keys=keys, causal=causal)
        assert visible_pairs(case) == sum(not causal or j <= i for i in range(queries) for j in range(keys))


def test_an_entry_must_serve_its_whole_problem() -> None:
    """The dq kernel of a full bias writes dbias, and a float32 bias is twice as wide: the same row of a file is used for both."""
    jobs = shares(Job(CASE, "dq", TileConfig(128, 64, 8, 4), GPU))
    assert {(job.case.bias, job.case.bias_dtype) for job in jobs} == {("bhqk", torch.bfloat16), ("bhqk", torch.float32)}
    assert all(
        job.case.problem("dq", KNOWN_DEVICES["sm90"]) == CASE.problem("dq", KNOWN_DEVICES["sm90"]) and job.kernel == "dq" for job in jobs
    )
    assert {job.config for job in shares(Job(dataclasses.replace(CASE, head_dim=128), "dq", TileConfig(128, 64, 8, 4), GPU))} == {
        TileConfig(128, 64, 8, 4), TileConfig(128, 64, 8, 2)
    }  # fmt: skip
    assert shares(Job(dataclasses.replace(CASE, bias=None, dbias=False), "dq", TileConfig(64, 64, 4, 2), GPU)) == []
    for kernel in ("forward", "dkdv", "dbias"):
        assert all(kernel in job.case.kernels(GPU) for job in shares(Job(CASE, kernel, TileConfig(64, 64, 4, 2), GPU)))


# ------------------------------------------------------------------------------------------------------------------------ who wins


def configs(count: int) -> list[TileConfig]:
    return [TileConfig(64, 64, 4, stages) for stages in range(1, count + 1)]


def test_finalists() -> None:
    many = configs(20)
    first = {config: Measured((float(20 - at),)) for at, config in enumerate(many)}
    first[many[19]] = Measured(problem="WRONG")
    assert finalists(first, many[0]) == [many[0], *many[18 : 18 - FINALISTS : -1]]
    assert finalists(first, many[18]) == many[18 : 18 - FINALISTS : -1]


def test_ranking() -> None:
    a, b, c, d = configs(4)

    def timed(**ms: float) -> dict[TileConfig, Measured]:
        return {dict(a=a, b=b, c=c, d=d)[name]: Measured((value,)) for name, value in ms.items()}

    assert ranking([[timed(a=2, b=1, c=4)]], a) == {b: 0.5, a: 1.0, c: 2.0}
    assert ranking([[timed(a=2, b=1, c=4), timed(a=1, b=2)]], a) == {a: 1.0, b: 2.0, c: 2.0}  # the last round counts
    both = ranking([[timed(a=1, b=0.5)], [timed(a=1, b=4, c=0.1)]], a)
    assert list(both) == [a, b] and both[b] == pytest.approx(math.sqrt(2))  # c did not run in every case
    assert ranking([[timed(a=1) | {b: Measured(problem="WRONG")}]], a) == {a: 1.0}
    assert ranking([[timed(b=1) | {a: Measured(problem="WRONG")}]], a) == {}


# ------------------------------------------------------------------------------------------------------------------ what is written


def winner(case: Case, kernel: str, config: TileConfig) -> float:
    """Twice as fast as the rest: 128x64 w8 s2."""
    return 1.0 if config == TileConfig(128, 64, 8, 2) else 2.0 + 0.001 * config.num_stages


def test_the_fastest_is_written_and_plans_use_it(tmp_path: Path) -> None:
    text = tune(options(tmp_path), winner)
    assert best(tmp_path / "t.json") == dict.fromkeys(("forward", "dkdv", "dq", "dbias"), TileConfig(128, 64, 8, 2))
    assert "128x64 w8 s2" in text and "TRIFLASH_TUNED=" in text and "b4 h16 s2048 d64 bf16 1hqk +db causal" in text
    with triflash.tuned(tmp_path / "t.json"):
        plans = plan_forward(CASE.spec(), GPU, "triton"), plan_backward(CASE.spec(), Needs(True, True, True, True), GPU, "triton")
    chosen = {step.kernel: step.config for plan in plans for step in plan.steps if step.kernel in overlay.TUNABLE}
    assert chosen == best(tmp_path / "t.json")
    (entry, *_) = overlay.load(tmp_path / "t.json").entries
    assert entry.measured["cases"][str(CASE)]["ms"] == 1.0 and entry.measured["default"] == str(CASE.default("forward", GPU))
    assert not list(tmp_path.glob(".tuned-*"))


def test_a_wrong_result_never_wins_and_is_told(tmp_path: Path) -> None:
    def ms(case: Case, kernel: str, config: TileConfig) -> float | str:
        return "WRONG: dq: largest error 3" if config == TileConfig(64, 32, 8, 2) else 1.0 if config.num_stages == 2 else 2.0

    text = tune(options(tmp_path, kernels=("dq",)), ms)
    assert best(tmp_path / "t.json")["dq"] != TileConfig(64, 32, 8, 2)
    assert f"dq 64x32 w8 s2 on {CASE}: WRONG: dq: largest error 3" in text


def test_what_does_not_fit_is_not_measured(tmp_path: Path) -> None:
    def says(job: Job) -> Resources | str:
        if job.config == TileConfig(128, 64, 8, 2):
            return Resources(spills=65)
        if job.config == TileConfig(128, 64, 4, 2):
            return Resources(shared_memory=1 << 20)
        return "CompilationError: no" if job.config == TileConfig(64, 64, 8, 2) else Resources()

    log = tmp_path / "log.json"
    bench = timer(winner)
    run.tune(options(tmp_path, kernels=("dq",), log=log), GPU, Compiler(says), bench, Console(file=io.StringIO()))
    measured = {config for _, _, tried, _ in bench.seen for config in tried}
    assert not measured & {TileConfig(128, 64, 8, 2), TileConfig(128, 64, 4, 2), TileConfig(64, 64, 8, 2)} and len(measured) > 10
    rows = {row["config"]: row for row in json.loads(log.read_text())["rows"]}
    assert rows["64x64 w8 s2"]["problem"] == "CompilationError: no" and rows["128x64 w8 s2"]["spills"] == 65
    assert rows["64x64 w4 s3"]["ms"] and not rows["128x64 w4 s2"]["ms"]


def test_the_default_is_measured_even_if_it_spills(tmp_path: Path) -> None:
    default = CASE.default("dq", GPU)
    tune(options(tmp_path, kernels=("dq",), spills=1), winner, Compiler(lambda job: Resources(spills=30 if job.config == default else 0)))
    assert best(tmp_path / "t.json")["dq"] == TileConfig(128, 64, 8, 2)


def test_one_that_does_not_fit_elsewhere_gives_way_to_the_next(tmp_path: Path) -> None:
    """The fastest fits its own case, but not the same kernel where it also writes the gradient of a full bias."""
    fastest, next_best = TileConfig(128, 64, 8, 2), TileConfig(64, 64, 8, 2)

    def says(job: Job) -> Resources:
        return Resources(shared_memory=1 << 20 if job.case.bias == "bhqk" and job.config == fastest else 0)

    def ms(case: Case, kernel: str, config: TileConfig) -> float:
        return {fastest: 1.0, next_best: 1.2}.get(config, 2.0)

    tune(options(tmp_path, kernels=("dq",)), ms, Compiler(says))
    assert best(tmp_path / "t.json")["dq"] == next_best
    tune(options(tmp_path, kernels=("dq",)), ms, Compiler(lambda job: Resources(shared_memory=1 << 20 if job.case.bias == "bhqk" else 0)))
    assert best(tmp_path / "t.json")["dq"] == CASE.default("dq", GPU)


def test_the_default_stays_unless_it_is_beaten_by_the_margin(tmp_path: Path) -> None:
    default = CASE.default("dq", GPU)

    def ms(case: Case, kernel: str, config: TileConfig) -> float:
        return 1.0 if config == default else 0.995 if config == TileConfig(128, 64, 8, 2) else 2.0

    text = tune(options(tmp_path, kernels=("dq",)), ms)
    assert best(tmp_path / "t.json")["dq"] == default and "the default" in text
    tune(options(tmp_path, kernels=("dq",), margin=0.001), ms)
    assert best(tmp_path / "t.json")["dq"] == TileConfig(128, 64, 8, 2)


def test_lengths_share_an_entry(tmp_path: Path) -> None:
    short, other = dataclasses.replace(CASE, queries=512, keys=512), dataclasses.replace(CASE, head_dim=128)
    default = CASE.default("dq", GPU)
    steady, fickle = TileConfig(128, 64, 8, 2), TileConfig(64, 64, 8, 2)

    def ms(case: Case, kernel: str, config: TileConfig) -> float:
        long = case.queries == 2048
        return {default: 1.0, steady: 0.8, fickle: 0.5 if long else 1.5}.get(config, 3.0)

    bench = timer(ms)
    chosen = options(tmp_path, CASE, short, other, kernels=("dq",))
    assert run.tune(chosen, GPU, Compiler(), bench, Console(file=io.StringIO())) == 0
    entries = {entry.problem.head_dim: entry for entry in overlay.load(tmp_path / "t.json").entries}
    assert set(entries) == {64, 128} and entries[64].config == steady
    assert set(entries[64].measured["cases"]) == {str(CASE), str(short)}
    rounds = [(case, len(tried), budget) for case, _, tried, budget in bench.seen if case.head_dim == 64]
    assert [case for case, *_ in rounds] == [CASE, CASE, short, short]
    assert rounds[0][1] > rounds[1][1] and rounds[1][2] == 4 * rounds[0][2]  # fewer, longer


def test_what_was_found_is_kept_when_it_is_interrupted(tmp_path: Path) -> None:
    def ms(case: Case, kernel: str, config: TileConfig) -> float:
        if case.head_dim == 128:
            raise KeyboardInterrupt
        return winner(case, kernel, config)

    with pytest.raises(KeyboardInterrupt):
        tune(options(tmp_path, CASE, dataclasses.replace(CASE, head_dim=128), kernels=("dq",)), ms)
    assert best(tmp_path / "t.json") == {"dq": TileConfig(128, 64, 8, 2)}


def test_it_adds_to_a_file_and_spoils_no_other(tmp_path: Path) -> None:
    tune(options(tmp_path, kernels=("dq",)), winner)
    tune(options(tmp_path, kernels=("dkdv",)), winner)
    assert set(best(tmp_path / "t.json")) == {"dq", "dkdv"}
    (tmp_path / "t.json").write_text("my thesis")
    compiler = Compiler()
    with pytest.raises(ValueError, match="^--out: wanted a file that triflash tune wrote"):
        tune(options(tmp_path), winner, compiler)
    assert not compiler.jobs and (tmp_path / "t.json").read_text() == "my thesis"


def test_nothing_to_measure(tmp_path: Path) -> None:
    text = tune(options(tmp_path, dataclasses.replace(CASE, bias=None, dbias=False), kernels=("dbias",)), winner)
    assert "nothing was measured" in text and not (tmp_path / "t.json").exists()


def test_a_wrong_default_is_told_and_nothing_is_written_for_it(tmp_path: Path) -> None:
    default = CASE.default("dq", GPU)
    text = tune(options(tmp_path, kernels=("dq",)), lambda case, kernel, config: "WRONG: dq" if config == default else 1.0)
    assert "WRONG: dq" in text and "nothing was measured" in text


# -------------------------------------------------------------------------------------------------- judging and timing, for real

TINY = Case(2, 20, 24, 2, 16, torch.float16, "1hqk", True, True)


def bench_device() -> tuple[Any, torch.device]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return facts_of(device), device


@pytest.mark.parametrize(
    "kernel, bias", [("forward", "1hqk"), ("dkdv", "1hqk"), ("dkdv", "1h1k"), ("dq", "bhqk"), ("dq", None), ("dbias", "11qk")]
)
def test_right_configurations_are_timed_and_wrong_ones_told(kernel: str, bias: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(TINY, bias=bias, dbias=bias is not None)
    facts, device = bench_device()
    right, lazy, late, raising = (TileConfig(m, n, 4, 1) for m, n in ((32, 16), (16, 16), (16, 32), (32, 32)))
    bench = Bench(case, facts, device)
    result = bench.scratch[0] if kernel == "forward" else bench.grads[{"dkdv": "dv", "dq": "dq", "dbias": "dbias"}[kernel]]
    start, running = Call.start, [right]

    def spoiled(self: Call) -> None:
        name = self.kernel.fn.__name__
        if name == kernel:
            running[0] = self.config
            if self.config == raising:
                raise RuntimeError("out of resources")
            if self.config == lazy:
                return  # writes nothing
        start(self)
        if name in (kernel, "dbias_sum") and running[0] == late:  # one element: of the last row, of the last head
            result.view(-1)[-1] += 0.25

    monkeypatch.setattr(Call, "start", spoiled)
    with torch.no_grad():
        found = bench.measure(kernel, [right, lazy, late, raising], 0.001)
    assert not found[right].problem and len(found[right].ms) >= 10 and found[right].median > 0
    assert "not finite" in found[lazy].problem and "largest error" in found[late].problem
    assert found[raising].problem == "WRONG: RuntimeError: out of resources"
    assert all(math.isnan(found[config].median) for config in (lazy, late, raising))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter; test_on_a_gpu does it there")
def test_the_whole_in_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiled, but kernels, judge, timer and file are the real ones."""
    monkeypatch.setattr(listing, "_LARGE", {kernel: [] for kernel in overlay.TUNABLE})
    monkeypatch.setattr(listing, "_SMALL", [(16, 32, 4, 1)])
    facts, _ = bench_device()
    console = Console(file=io.StringIO(), width=200)
    chosen = options(tmp_path, dataclasses.replace(TINY, heads=1, queries=16, keys=16), kernels=("forward", "dbias"), budget=1e-6)
    assert run.tune(chosen, facts, Compiler(), Bench, console) == 0
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert set(best(tmp_path / "t.json")) == {"forward", "dbias"} and text.count("2 of 2") == 2 and "WRONG" not in text


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole, with few configurations, really compiled in worker processes and timed."""
    few = {"forward": [(64, 64, 4, 2)], "dkdv": [(64, 64, 4, 2)], "dq": [(64, 64, 4, 2)], "dbias": [(64, 64, 4, 2)]}
    monkeypatch.setattr(listing, "_LARGE", few)
    monkeypatch.setattr(listing, "_SMALL", [])
    out = tmp_path / "t.json"
    line = f"tune --d 64 --s 512 --b 2 --h 4 --causal --bias 1hqk --budget 0.01 --workers 2 --margin 0 --out {out} --log {tmp_path / 'log.json'}"
    assert main(line.split()) == 0
    entries = overlay.load(out).entries
    assert {entry.problem.kernel for entry in entries} == set(overlay.TUNABLE)
    assert all(row["ms"] for row in json.loads((tmp_path / "log.json").read_text())["rows"])
    q = torch.randn(2, 512, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(1, 4, 512, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with triflash.tuned(out), triflash.backend("triton"), triflash.record_launches() as ran:
        triflash.flash_attn_func(q, q, q, bias, True).sum().backward()
    for entry in entries:
        assert f"triton: {entry.problem.kernel} {entry.config}" in ran


# ----------------------------------------------------------------------------------------------------------------- the command line


def parsed(line: str) -> Options:
    import argparse

    from triflash.cli.tune.options import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return Options.of(parser.parse_args(line.split()))


def test_options() -> None:
    (case,) = parsed("--d 128 --s 4k --b 4 --h 16 --causal --bias 1hqk --dtype bf16").cases
    assert case == Case(4, 4096, 4096, 16, 128, torch.bfloat16, "1hqk", True, True)
    many = parsed("--d 64,128 --s 1k,2k --causal both --bias none,1hqk --tokens 16k --hd 2k --no-dbias").cases
    assert len(many) == 16 and {(case.batch, case.queries, case.heads, case.head_dim) for case in many} == {
        (16, 1024, 32, 64), (8, 2048, 32, 64), (16, 1024, 16, 128), (8, 2048, 16, 128)
    }  # fmt: skip
    assert not any(case.dbias for case in many) and not parsed("").cases[0].causal and parsed("").out == Path("triflash-tuned.json")
    assert parsed("--margin 2.5").margin == 0.025


@pytest.mark.parametrize("line, words", [
    ("--s 2kk", "--s: size: wanted"), ("--causal maybe", "--causal: causal: wanted yes, no or both"), ("--kernels forward,delta", "--kernels delta: wanted some of"),
    ("--s 2k --tokens 3k", "--tokens: wanted a multiple of every --s, got 3072; --s 2048 does not divide it"), ("--d 48 --hd 64", "--hd: wanted a multiple of every --d, got 64; --d 48 does not divide it"),
    ("--dtype fp64", "--dtype fp64"), ("--out /nowhere/at/all.json", "/nowhere/at/all.json: its folder does not exist"),
    ("--d 512 --compile-only sm90", "--d 512: the Triton kernels take head dims up to 256"), ("--budget abc", "--budget: must be a number from 0 up"),
    ("--budget -1", "--budget: must be a number from 0 up"), ("--compile-only cpu", "--compile-only cpu: wanted one of sm80"),
], ids=str)  # fmt: skip
def test_wrong_use(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["tune", *line.split()])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for interpret, words in (("1", "TRITON_INTERPRET: wanted 0"), ("0", "wanted a GPU, got a machine without one; --compile-only")):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        with pytest.raises(SystemExit) as stop:
            main(["tune"])
        assert stop.value.code == 2
        assert words in capsys.readouterr().err


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "rich" or name.startswith("triflash.cli.tune.r")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("triflash.cli.tune.run", raising=False)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["tune"]) == 2
    assert "pip install '.[bench]'" in capsys.readouterr().err


def test_a_forward_pass_is_judged_by_its_lse_too() -> None:
    """A right output beside a wrong lse would make every gradient wrong."""
    from triflash.cli.tune.measure import Bench

    bench = object.__new__(Bench)
    lse = torch.tensor([[[0.5, -torch.inf, 1e9]]])
    bench.saved = (torch.zeros(1), lse, torch.zeros_like(lse))
    for got, rest, words in (
        (lse, 0.0, None),
        (lse + torch.tensor([5e-5, 0.0, 64.0]), 0.0, None),
        (lse + torch.tensor([1e-2, 0.0, 0.0]), 0.0, "lse is off .* in 1 of 3 rows"),
        (torch.tensor([[[0.5, 0.0, 1e9]]]), 0.0, "lse is off"),
        (torch.full_like(lse, torch.nan), 0.0, "in 3 of 3 rows"),
        (lse, torch.nan, "rest is off"),
    ):
        bench.scratch = (torch.zeros(1), got, torch.full_like(lse, rest))
        problem = bench._lse_problem()
        assert problem is None if words is None else problem is not None and re.search(words, problem), (got, problem)
