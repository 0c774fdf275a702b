"""``scripts/sass.py``, by which a change of kernels that must change nothing is judged: its table has every kernel that there is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import house
import sass


@pytest.fixture(autouse=True)
def any_order() -> Iterator[None]:
    """As the script runs: without PyTorch's deterministic algorithms, under which dq is never added up."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before)


def test_the_table_launches_every_kernel() -> None:
    found = {sass.kernel_name(call) for problem in sass.PROBLEMS for call in problem.calls()}
    assert found == house.launched() and len(found) >= 24


def test_problems_have_names_of_their_own() -> None:
    names = [problem.name for problem in sass.PROBLEMS]
    assert len(names) == len({name.replace(",", "").replace(" ", "-") for name in names})


def test_launches_of_one_table_compare_equal_and_another_does_not() -> None:
    one, other = (problem for problem in sass.PROBLEMS if problem.name in ("packed d64 causal", "packed d64 tiny"))
    described = [list(map(sass.described, problem.calls())) for problem in (one, one, other)]
    assert described[0] == described[1] != described[2]


def test_keys_tell_without_compiling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what a launch is compiled from, and with which arguments; a key that differs is a kernel that does."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        assert sass.main(["keys", str(folder), "--only", "packed d64 tiny"]) == 0
    assert sass.main(["compare", str(one), str(other)]) == 0
    assert capsys.readouterr().out.endswith("0 launches with other arguments, 0 compiled from something else\n")
    lines = (other / "keys.txt").read_text().splitlines()
    assert len(lines) == 6 == len((other / "launches.txt").read_text().splitlines())
    (other / "keys.txt").write_text("\n".join([lines[0] + "0", *lines[1:]]))
    assert sass.main(["compare", str(one), str(other)]) == 1
    assert "0 launches with other arguments, 1 compiled from something else" in capsys.readouterr().out
