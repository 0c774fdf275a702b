"""``scripts/races.py``: its cases launch every Hopper kernel and are right, on the CPU's stand-in; its reading of what the tools say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent.parent / "scripts" / "races.py"


def races() -> ModuleType:
    spec = importlib.util.spec_from_file_location("races", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["races"] = module  # where its dataclass looks for its annotations
    spec.loader.exec_module(module)
    return module


RACES = races()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for the GPU that there is")
@pytest.mark.parametrize("name", RACES.CASES)
def test_cases_run_what_they_say(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import gluon_twin

    tensor, rand, randn = torch.tensor, torch.rand, torch.randn
    for made, function in (("tensor", tensor), ("rand", rand), ("randn", randn)):
        monkeypatch.setattr(torch, made, lambda *x, f=function, device=None, **more: f(*x, **more))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with gluon_twin.twin_device(2):
        assert RACES.run_case(name, False) == 0, capsys.readouterr().out


def test_between_them_cases_launch_every_kernel() -> None:
    wanted = {"preprocess", "dqdkdv", "dkdv", "dq", "postprocess", "dkdv_sum", "dbias"}
    assert {kernel for case in RACES.CASES.values() for kernel in case.kernels.split()} >= wanted


@pytest.mark.parametrize(("tool", "status", "text", "wanted"), [
    ("racecheck", 0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "clean"),
    ("racecheck", 9, "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", "2 hazards displayed (2 errors, 0 warnings)"),
    ("synccheck", 0, "========= ERROR SUMMARY: 0 errors", "clean"),
    ("synccheck", 9, "========= ERROR SUMMARY: 3 errors", "3 errors"),
    ("racecheck", 0, "ran: forward", "the tool said nothing"),
    ("consan", 0, "ran: forward", "clean"),
    ("consan", 1, "RuntimeError: device-side assert triggered", "status 1: RuntimeError: device-side assert triggered"),
    ("consan", None, "", "did not finish"),
    ("synccheck", 4, "WRONG: dq is 0.3 off\n========= ERROR SUMMARY: 0 errors", "WRONG: dq is 0.3 off"),
    ("synccheck", 3, "DID NOT RUN: dbias\n========= ERROR SUMMARY: 0 errors", "DID NOT RUN: dbias"),
])  # fmt: skip
def test_verdicts(tool: str, status: int | None, text: str, wanted: str) -> None:
    assert RACES.verdict(tool, status, text) == wanted


def test_without_the_tool_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(RACES, "sanitizer", lambda: None)
    assert RACES.main(["--tools", "racecheck", "--cases", "apart;wide", "--logs", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "racecheck: 0 of 4 cases clean" in said and "  wide: compute-sanitizer is not installed here" in said
