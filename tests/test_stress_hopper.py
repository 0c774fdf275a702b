"""The stress script's own machinery, without a GPU: it finds what is wrong, stuck or dead, names it, and goes on with the rest."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import stress_hopper as stress
from here import triton_only
from triflash import oracle
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.override import override_configs
from triflash.plan.select import plan_forward

SEED, COUNT = 5, 6


def right(problem: Any, tensors: Any) -> Any:
    options = dict(batch_inner=problem.inner, lo=problem.lo, hi=problem.hi, scale=problem.scale, softcap=problem.softcap)
    out, lse = oracle.attention(*tensors, **options)
    kept = lse.float().masked_fill(lse == -torch.inf, 0.0)
    rest = torch.where(lse == -torch.inf, 0.0, lse - kept.double()) / torch.log(torch.tensor(2.0, dtype=torch.float64))
    return out.to(tensors[0].dtype), lse.float(), None if tensors[3] is None or tensors[3].dtype == torch.bool else rest.float()


def one_row_off(problem: Any, tensors: Any) -> Any:
    out, lse, rest = right(problem, tensors)
    if problem == troubled():
        out[-1, -1] = out[-1, -2]
    return out, lse, rest


def stuck(problem: Any, tensors: Any) -> Any:
    while problem == troubled():
        signal.pause()
    return right(problem, tensors)


def dead(problem: Any, tensors: Any) -> Any:
    if problem == troubled():
        os._exit(7)
    return right(problem, tensors)


def failing(problem: Any, tensors: Any) -> Any:
    if problem == troubled():
        raise RuntimeError("an illegal memory access was encountered")
    return right(problem, tensors)


def troubled() -> Any:
    """The second problem of the second process."""
    return list(stress.drawn(SEED, 1, 2))[1]


@pytest.mark.parametrize("solver, bad, said", [
    (right, 0, "6 of 6 problems"), (one_row_off, 1, "WRONG"), (stuck, 1, "HANG, no progress"), (dead, 1, "CRASH, exit status 7"),
    (failing, 1, "ERROR RuntimeError: an illegal memory access was encountered"),
], ids=["right", "wrong", "hang", "crash", "error"])  # fmt: skip
def test_random(solver: Any, bad: int, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    def hangs(worker: Any) -> bool:  # not by a clock, which a busy machine outlasts
        return solver is stuck and worker.problem == str(troubled())

    assert stress.run_random(COUNT, 2, SEED, hangs, "cpu", solver) == bad
    printed = capfd.readouterr().out
    assert said in printed
    if bad:
        (line,) = (line for line in printed.splitlines() if said in line)
        assert f"1:1 {troubled()}" in line
        assert f"{COUNT if said == 'WRONG' else COUNT - 1} of {COUNT} problems" in printed


def test_problems_are_the_same_every_time_and_differ_from_process_to_process() -> None:
    first, again, other = (list(stress.drawn(1, worker, 40)) for worker in (0, 0, 1))
    assert first == again and not set(map(str, first)) & set(map(str, other))
    assert first[:7] == list(stress.drawn(1, 0, 7))


@triton_only
def test_every_drawn_configuration_is_one_that_the_plan_takes() -> None:
    for worker in range(30):
        for problem in stress.drawn(0, worker, 60):
            if problem.config is not None:
                sizes = ((problem.M, problem.D), (problem.N, problem.D), (problem.N, problem.Dv))
                batch, dtype = problem.outer * problem.inner, stress.DTYPES[problem.dtype]
                q, k, v = (torch.empty(batch, length, problem.H, dim, device="meta", dtype=dtype) for length, dim in sizes)
                bias = None
                if problem.bias:
                    full = (problem.outer, problem.inner, problem.H, problem.M, problem.N)
                    shape = [1 if letter == "1" else size for letter, size in zip(problem.bias, full, strict=True)]
                    bias = torch.empty(shape, device="meta", dtype=stress.DTYPES[problem.bias_dtype])
                spec = problem.spec(q, k, v, bias)
                assert problem.config.shared_memory(spec) <= KNOWN_DEVICES["sm90"].shared_memory, problem
                with override_configs(forward=problem.config):
                    assert plan_forward(spec, KNOWN_DEVICES["sm90"], "hopper").steps[0].config == problem.config


def test_the_judge_knows_wrong_from_right() -> None:
    problem = stress.Problem(2, 1, 2, 40, 50, 16, 16, bias="b1hqk", hi=-5, hidden=True)
    tensors = problem.tensors(torch.device("cpu"))
    out, lse, rest = right(problem, tensors)
    assert (lse == -torch.inf).any()
    assert stress.judge(problem, tensors, (out, lse, rest))[0] <= 1
    for change, place in (
        ("a value", "out[1, 30, 1, 3]"), ("a nan", "out[1, 30, 1, 3]"), ("lse", "lse"), ("an unseen row", "lse[0, 0, 0]"),
        ("rest", "lse + rest[1, 1, 30]"),
    ):  # fmt: skip
        wrong = [x.clone() for x in (out, lse, rest)]
        if change == "a value":
            wrong[0][1, 30, 1, 3] *= 1.1
        elif change == "a nan":
            wrong[0][1, 30, 1, 3] = torch.nan
        elif change == "lse":
            wrong[1][1, 1, 30] += 0.01
        elif change == "an unseen row":
            wrong[1][0, 0, 0] = -1e30
        else:
            wrong[2][1, 1, 30] = torch.nan
        ratio, where = stress.judge(problem, tensors, tuple(wrong))
        assert ratio > 1, change
        assert where.startswith(place), (change, where)


@pytest.mark.parametrize("noisy", [False, True])
def test_repeats_count_what_differs(noisy: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third launch of the noisy kernel flips one bit of one lse, and leaves nothing of the NaN that was there before."""
    launches = 0

    def starter(problem: Any, tensors: Any, results: Any) -> Any:
        wanted = right(problem, tensors)

        def start() -> None:
            nonlocal launches
            for x, y in zip(results, wanted, strict=True):
                if x is not None:
                    assert x.isnan().all()
                    x.copy_(y)
            if noisy and launches % 3 == 2:
                results[1].view(torch.int32)[0, 0, 0] ^= 1
            launches += 1

        return start

    monkeypatch.setattr(stress, "starter", starter)
    monkeypatch.setattr(stress, "TOGETHER", 4)
    monkeypatch.setattr(stress, "SMALL", stress.SMALL[3:5])
    assert stress.run_repeats(11, "cpu") == (8 if noisy else 0)  # launches 0 and 12 are what the others are compared with
    assert capsys.readouterr().out.count("11 launches in ") == 2
    assert stress.run_tiny("cpu") == 0


def test_without_a_gpu_or_a_tool_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["stress_hopper.py", "--repeat", "3"])
        with pytest.raises(SystemExit) as stopped:
            stress.main()
        assert stopped.value.code == 2 and "needs an sm90 GPU" in capsys.readouterr().err
    monkeypatch.setattr(stress, "sanitizer", lambda: None)
    assert stress.sanitize("racecheck") == 2
    printed = capsys.readouterr()
    assert "compute-sanitizer --tool racecheck" in printed.out and "--tiny" in printed.out and "not installed" in printed.err
