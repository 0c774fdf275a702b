"""The stress script of packed sequences, without a GPU: its reference, its problems, and that it finds what is wrong. What watches processes
is ``stress_hopper.py``'s (``test_stress_hopper.py``)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import stress_hopper
import stress_packed as stress

CPU = torch.device("cpu")
TINY = stress.Packed((5, 0, 20, 1), (9, 3, 17, 0), H=2, Hk=1, D=16, bias="padded", causal=True, spare=3)
KINDS = {
    "a bias of all": TINY,
    "a bias of each, aligned otherwise": replace(TINY, own=True, aligned=False, causal=False),
    "rows, window": replace(TINY, bias="rows", window=4),
    "keys, used rows": replace(TINY, bias="keys", own=True, used=True),
    "a bias that ends early, a sink": replace(TINY, sink=True, short=6, H=3, Hk=1),
    "no bias, soft cap": replace(TINY, bias="", softcap=2.0, dtype="fp16"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_right_is_within_what_is_allowed(kind: str) -> None:
    problem = KINDS[kind]
    x = problem.tensors(CPU)
    assert x["q"][-1].isnan().all() and not x["dout"].isnan().any()  # rows of no sequence
    results = stress.step(problem, x, "tiled")
    part, where = stress.judge(problem, x, results)
    assert 0 < part <= 1, where


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv", "dbias", "dsink"])
def test_the_judge_finds_one_wrong_number_in_each_result(name: str) -> None:
    problem = replace(TINY, sink=True)
    x = problem.tensors(CPU)
    results = [each.clone() for each in stress.step(problem, x, "tiled")]
    at = stress.names_of(x).index(name)
    largest = results[at].nan_to_num(neginf=0.0).abs().argmax()
    results[at].view(-1)[largest] *= 1.5
    part, where = stress.judge(problem, x, results)
    assert part > 1 and where == name
    results[at].view(-1)[largest] = torch.nan
    assert stress.judge(problem, x, results) == (float("inf"), name)


def test_problems_are_the_same_every_time_and_of_all_kinds() -> None:
    drawn = [problem for worker in range(30) for problem in stress.drawn(2, worker, 24)]
    again = [problem for worker in range(30) for problem in stress.drawn(2, worker, 24)]
    assert drawn == again and len({str(problem) for problem in drawn}) == len(drawn)
    assert {problem.wrong for problem in drawn} == {"", "decreasing", "negative", "beyond", "huge"}
    assert {problem.bias for problem in drawn} == {"", "padded", "rows", "keys"} and {problem.D for problem in drawn} == {64, 128}
    for problem in drawn:
        rows = [sum(lengths) + problem.spare for lengths in (problem.queries, problem.keys)]
        assert all(n % 2 for n in rows) and max(problem.queries) and max(problem.keys), problem
        right = replace(problem, wrong="").offsets(problem.queries)
        assert right == sorted(right) and (problem.offsets(problem.queries) != right) == bool(problem.wrong)


def few(worker: int, count: int) -> Iterator[stress.Packed]:
    """As many small problems, each process its own."""
    for number in range(count):
        yield replace(TINY, seed=100 * worker + number, wrong="" if number != 1 else "huge")


def right(problem: Any, device: torch.device) -> tuple[float, str]:
    return stress.solved(problem, device, "tiled") if not problem.wrong else (0.0, "wrong offsets")


def wrong_once(problem: Any, device: torch.device) -> tuple[float, str]:
    x = problem.tensors(device)
    results = stress.step(replace(problem, causal=problem.seed != 102), x, "tiled")
    return stress.judge(problem, x, results)


@pytest.mark.parametrize("judged, bad", [(right, 0), (wrong_once, 1)])
def test_processes_judge_them_all_and_name_the_wrong_one(judged: Any, bad: int, capfd: pytest.CaptureFixture[str]) -> None:
    draw = few if judged is right else functools.partial(map_right, few)
    assert stress_hopper.watch(6, 2, draw, judged, lambda _: False, "cpu") == bad
    printed = capfd.readouterr().out
    assert "6 of 6 problems in" in printed and f"{bad} bad" in printed
    assert ("WRONG" in printed) == bool(bad) and (not bad or "1:2 Packed(" in printed)


def map_right(draw: Any, worker: int, count: int) -> Iterator[stress.Packed]:
    for problem in draw(worker, count):
        yield replace(problem, wrong="")


@pytest.mark.parametrize("noisy", [False, True])
def test_repeats_count_what_differs(noisy: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third step of the noisy backend flips one bit of a gradient."""
    steps, plain = 0, stress.step

    def step(problem: Any, x: Any, backend: str) -> Any:
        nonlocal steps
        results = plain(problem, x, backend)
        if noisy and steps % 3 == 2:
            results[-1].view(torch.int16).view(-1)[-1] ^= 1
        steps += 1
        return results

    monkeypatch.setattr(stress, "step", step)
    monkeypatch.setattr(stress, "TOGETHER", 4)
    monkeypatch.setattr(stress, "SMALL", [TINY])
    assert stress.run_repeats(7, "cpu", "tiled") == (2 if noisy else 0)  # steps 2 and 5
    assert "7 steps in" in capsys.readouterr().out


def test_tiny_problems_and_tools(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stress_hopper, "sanitizer", lambda: None)
    monkeypatch.setattr(sys, "argv", ["stress_packed.py", "--sanitize", "memcheck"])
    assert stress.main() == 2
    printed = capsys.readouterr()
    assert "compute-sanitizer --tool memcheck" in printed.out and "stress_packed.py --tiny" in printed.out
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["stress_packed.py", "--graph", "3"])
        with pytest.raises(SystemExit) as stopped:
            stress.main()
        assert stopped.value.code == 2 and "needs an sm90 GPU" in capsys.readouterr().err
