"""Which tests run first. ``durations.json`` has what each test cost when it was last measured and which kernels it ran; from that follow
a fixed part, in which every test function, kernel and feature appears at its cheapest, and parts of the rest, of which the commit picks one.

``--tier first`` is the fixed part and that one, ``--tier some`` the parts after it that a merge is held to as well (.ci/run), ``--tier rest``
all that ``first`` leaves out: together they are all tests. ``--record`` measures.
"""

from __future__ import annotations

import json
import resource
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

DURATIONS = Path(__file__).parent / "durations.json"
PARTS = 50  # of what is not fixed
SOME = 20  # of them, in the tier of that name
TIERS = ("first", "some", "rest")
BUDGET = {"interpreted": 100.0, "compiled": 15.0}  # CPU seconds of the fixed part, in each of the three processes that make up a run
DEAREST = 2.5  # CPU seconds; a test function with no case below has no claim to be in the fixed part
ELSEWHERE = "processor seconds elsewhere"  # the property by which a test tells of processes that are not its children
UNMEASURED = 2  # tests of a function that were never measured, which run first; any more wait like others, and count as ASSUMED
ASSUMED = 1.0  # CPU seconds
LEAST = 0.005  # CPU seconds; what a test costs that was too short to measure


@dataclass(frozen=True)
class Cost:
    """seconds: of the processor; 0 for a test that was skipped. kernels: which ones it ran or compiled."""

    seconds: float
    kernels: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Candidate:
    """What the choice knows of a test. function: its name without parameters. values: (parameter, index) of each."""

    name: str
    function: str
    values: tuple[tuple[str, int], ...] = ()
    backend: str = ""
    features: frozenset[str] = frozenset()


def described(item: pytest.Item) -> Candidate:
    spec = getattr(item, "callspec", None)
    parameters: dict[str, Any] = {} if spec is None else spec.params
    values = () if spec is None else tuple(sorted(spec.indices.items()))
    found = frozenset(name for value in parameters.values() for name in features_of(value))
    return Candidate(item.nodeid, item.nodeid.partition("[")[0], values, str(parameters.get("backend", "")), found)


def features_of(case: Any) -> Iterator[str]:
    """What of a ``cases.Case`` is not as usual: strings and dtypes with their values, numbers without."""
    if type(case).__name__ != "Case":
        return
    for each in fields(case):
        value = getattr(case, each.name)
        if value != each.default and each.name not in ("name", "B", "M", "N", "H", "tiles", "seed", "grads", "magnitude"):
            yield each.name if isinstance(value, (int, float, tuple)) else f"{each.name} {value}"


def tier_of(tests: Sequence[Candidate], costs: dict[str, Cost], budget: float, tier: str, part: int) -> set[str]:
    """The names of one of ``TIERS``, where ``part`` is the one that is picked."""
    fixed = fixed_part(tests, costs, budget)
    seconds = {test.name: costs[test.name].seconds if test.name in costs else ASSUMED for test in tests}
    rest = sorted((test.name for test in tests if test.name not in fixed), key=lambda name: (-seconds[name], name))
    parts = [set(rest[n::PARTS]) for n in range(PARTS)]  # each has some of the longest and some of the shortest
    if tier == "first":
        return fixed | parts[part]
    after = [parts[(part + n) % PARTS] for n in range(1, PARTS)]
    return set().union(*(after[:SOME] if tier == "some" else after))


def fixed_part(tests: Sequence[Candidate], costs: dict[str, Cost], budget: float) -> set[str]:
    """The first tests of a function that were never measured, and those that are skipped; then, cheapest first, whatever has something in it
    that no other yet has.
    """
    chosen, new = {test.name for test in tests if test.name in costs and costs[test.name].seconds == 0}, Counter[str]()
    for test in tests:
        if test.name not in costs:
            new[test.function] += 1
            if new[test.function] <= UNMEASURED:
                chosen.add(test.name)
    costs = {test.name: costs.get(test.name, Cost(ASSUMED)) for test in tests}
    measured = sorted((test for test in tests if test.name not in chosen), key=lambda test: (costs[test.name].seconds, test.name))
    spent = 0.0
    for wanted, must in LEVELS:
        ran = (test for test in tests if test.name in chosen and costs[test.name].seconds)
        covered = {tag for test in ran for tag in wanted(test, costs[test.name])}
        for test in measured:
            cost = costs[test.name]
            tags = set(wanted(test, cost))
            if test.name not in chosen and not tags <= covered and (must or spent + cost.seconds <= budget):
                chosen.add(test.name)
                covered |= tags
                spent += cost.seconds
    return chosen


Level = Callable[[Candidate, Cost], Iterable[Any]]
LEVELS: list[tuple[Level, bool]] = [  # what must be in the fixed part, whatever it costs, and then what else as long as there is time
    (lambda test, cost: [test.function] if cost.seconds <= DEAREST else [], True),
    (lambda test, cost: cost.kernels, True),
    (lambda test, cost: ((test.backend, name) for name in test.features if test.backend in ("tiled", "oracle") or cost.kernels), True),
    (lambda test, cost: [(test.function, test.backend)], False),
    (lambda test, cost: ((kernel, name) for kernel in cost.kernels for name in test.features), False),
    (lambda test, cost: ((test.function, value) for value in test.values), False),
    (lambda test, cost: [test.name], False),
]


def read() -> dict[str, Cost]:
    """What is known, by the name of the test."""
    if not DURATIONS.exists():
        return {}
    found = json.loads(DURATIONS.read_text())
    costs = {}
    for function, cases in found["tests"].items():
        for parameters, (hundredths, *kernels) in cases.items():
            costs[function + parameters] = Cost(hundredths / 100, frozenset(found["kernels"][number] for number in kernels))
    return costs


def write(costs: dict[str, Cost]) -> None:
    """A test function a line: {its parameters: [hundredths of a second, numbers of kernels]}."""
    kernels = sorted(set().union(*(cost.kernels for cost in costs.values())))
    tests: dict[str, dict[str, list[float]]] = {}
    for name, cost in sorted(costs.items()):
        function, bracket, parameters = name.partition("[")
        hundredths = 0 if cost.seconds == 0 else round(100 * max(cost.seconds, LEAST), 1 if cost.seconds < 0.1 else None)
        tests.setdefault(function, {})[bracket + parameters] = [hundredths, *sorted(map(kernels.index, cost.kernels))]
    lines = ",\n".join(
        f"{json.dumps(function)}: {json.dumps(cases, ensure_ascii=False, separators=(',', ':'))}" for function, cases in tests.items()
    )
    DURATIONS.write_text(f'{{"kernels": {json.dumps(kernels)},\n"tests": {{\n{lines}\n}}}}\n')


def number_of_commit() -> int:
    """The hash of the commit that is checked out, by which parts are picked; 0 where there is no commit."""
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return int(run.stdout.strip(), 16)


def processor_seconds() -> float:
    """Of this process and of those that it has started and seen end."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


@dataclass
class Recorder:
    """A pytest plugin: measures every test, in whichever process runs it, and writes down what it was told of all of them."""

    whole: bool  # whether every test of each file runs, so that those that do not are gone
    writes: bool
    began: float = 0.0
    kernels: set[str] = field(default_factory=set)
    found: dict[str, Cost] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.began, self.kernels = processor_seconds(), set()
        with ExitStack() as stack:
            self.watch(stack)
            return (yield)

    def watch(self, stack: ExitStack) -> None:
        """Note which kernels are launched, run on the stand-in, or compiled. The calls go on as they were."""
        try:
            import gluon_twin
            from triflash.launch import ahead
            from triflash.launch.calls import Call
        except ImportError:  # without Triton
            return

        def noting(function: Any) -> Any:
            def noted(call: Any, *args: Any, **options: Any) -> Any:
                of = getattr(call.kernel, "fn", call.kernel)
                self.kernels.add(f"{of.__module__.removeprefix('triflash.kernels.')}.{of.__name__}")
                return function(call, *args, **options)

            return noted

        for owner, name in ((Call, "start"), (gluon_twin, "run"), (ahead, "compile_for")):
            stack.enter_context(mock.patch.object(owner, name, noting(getattr(owner, name))))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        if call.when == "teardown":
            elsewhere = sum(value for name, value in item.user_properties if name == ELSEWHERE)
            item.user_properties.append(("cost", (processor_seconds() - self.began + elsewhere, sorted(self.kernels))))
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.skipped.add(report.nodeid)
        if report.when == "teardown" and "cost" in dict(report.user_properties):
            seconds, kernels = dict(report.user_properties)["cost"]
            skipped = report.nodeid in self.skipped
            self.found[report.nodeid] = Cost(0.0) if skipped else Cost(max(seconds, LEAST), frozenset(kernels))  # type: ignore[arg-type]

    def pytest_sessionfinish(self) -> None:
        if self.writes:
            files = {name.partition("::")[0] for name in self.found} if self.whole else set()
            kept = {name: cost for name, cost in read().items() if name.partition("::")[0] not in files}
            write(kept | self.found)
