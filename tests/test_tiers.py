"""What is tested first, and the changes that tests make to kernels: the choice keeps one of everything, and the changes hit what they say."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tiers
import triflash
from cases import Case
from tiers import Candidate, Cost


def example() -> tuple[list[Candidate], dict[str, Cost]]:
    tests, costs = [], {}
    for function in ("a", "b"):
        for number in range(50):
            backend = ("tiled", "triton")[number % 2]
            features = frozenset({"sink"} if number == 40 else {"bias hqk"} if number % 5 == 0 else ())
            test = Candidate(f"{function}[{number}]", function, (("number", number),), backend, features)
            tests.append(test)
            costs[test.name] = Cost(1.0 + number, frozenset({"forward"} | ({"dq"} if number == 49 else set())))
    return tests, costs


def test_the_fixed_part_has_one_of_everything_and_keeps_to_its_budget() -> None:
    tests, costs = example()
    least = tiers.fixed_part(tests, costs, 0.0)
    # each function at its cheapest, the one kernel that only the dearest runs, and each feature on each backend that has it
    assert least == {"a[0]", "b[0]", "a[49]", "a[40]", "a[5]"}
    more = tiers.fixed_part(tests, costs, sum(costs[name].seconds for name in least) + 20.0)
    assert least < more and sum(costs[name].seconds for name in more - least) <= 20.0
    assert tiers.fixed_part(tests, costs, 1e9) == set(costs)


def test_what_nobody_has_measured_and_what_is_skipped_runs_first() -> None:
    tests, costs = example()
    tests.append(Candidate("a[new]", "a"))
    costs["b[7]"] = Cost(0.0)
    assert {"a[new]", "b[7]"} <= tiers.fixed_part(tests, costs, 0.0)
    many = [Candidate(f"c[{number}]", "c") for number in range(2 * tiers.PARTS)]
    fixed = tiers.fixed_part([*tests, *many], costs, 0.0)
    assert len(fixed & {test.name for test in many}) == tiers.UNMEASURED  # the others are spread over the parts
    parts = [tiers.tier_of([*tests, *many], costs, 0.0, "first", part) - fixed for part in range(tiers.PARTS)]
    assert all(1 <= len(part & {test.name for test in many}) <= 3 for part in parts)


def test_the_tiers_are_all_tests_and_parts_cost_alike() -> None:
    tests, costs = example()
    fixed = tiers.fixed_part(tests, costs, 30.0)
    parts = []
    for part in range(tiers.PARTS):
        first, some, rest = (tiers.tier_of(tests, costs, 30.0, tier, part) for tier in tiers.TIERS)
        assert fixed < first and not first & rest and first | rest == set(costs) and some < rest
        assert (
            some
            == set().union(*(tiers.tier_of(tests, costs, 30.0, "first", (part + n) % tiers.PARTS) for n in range(1, tiers.SOME + 1)))
            - fixed
        )
        parts.append(first - fixed)
    assert sorted(name for part in parts for name in part) == sorted(costs.keys() - fixed)
    prices = [sum(costs[name].seconds for name in part) for part in parts]
    assert max(prices) - min(prices) <= max(cost.seconds for cost in costs.values())


def test_what_is_special_about_a_case() -> None:
    case = Case("some", bias="1hqk", sink=True, lo=-3, softcap=1.5, mask="b11k", lengths=(1, 2))
    assert set(tiers.features_of(case)) == {"bias 1hqk", "sink", "lo", "softcap", "mask b11k", "lengths"}
    assert not set(tiers.features_of("some")) | set(tiers.features_of(Case("plain")))


def test_durations_survive_being_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tiers, "DURATIONS", tmp_path / "durations.json")
    assert tiers.read() == {}
    costs = {"f.py::a[x-[1]]": Cost(1.25, frozenset({"dq", "forward"})), "f.py::a[y]": Cost(0.0), "f.py::b": Cost(0.016, frozenset({"dq"}))}
    tiers.write(costs)
    assert tiers.read() == costs
    tiers.write(tiers.read())
    assert tiers.read() == costs


def test_every_kernel_has_been_seen_to_run() -> None:
    """By the durations file, so that the fixed part has all of them: whatever is launched by name."""
    known = set().union(*(cost.kernels for cost in tiers.read().values()))
    launched = set()
    for path in sorted((Path(triflash.__file__).parent / "launch").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Call" and node.args:
                launched.add(ast.unparse(node.args[0]).rpartition(".")[2])
    assert launched, "no launch was found"
    assert launched <= {name.rpartition(".")[2] for name in known}, "not measured yet: make durations"
