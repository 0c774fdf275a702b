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
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", RACES.CASES)
def test_cases_run_what_they_say(name: str, small: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import gluon_twin

    tensor, rand, randn = torch.tensor, torch.rand, torch.randn
    for made, function in (("tensor", tensor), ("rand", rand), ("randn", randn)):
        monkeypatch.setattr(torch, made, lambda *x, f=function, device=None, **more: f(*x, **more))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with gluon_twin.twin_device(2):
        assert RACES.run_case(name, small=small) == 0, capsys.readouterr().out


def test_between_them_cases_launch_every_kernel() -> None:
    wanted = {"preprocess", "dqdkdv", "dkdv", "dq", "postprocess", "dkdv_sum", "dbias"}
    assert {kernel for case in RACES.CASES.values() for kernel in case.kernels.split()} >= wanted


@pytest.mark.parametrize(("tool", "status", "text", "wanted"), [
    ("racecheck", 0, "ran: dq\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "clean"),
    ("racecheck", 0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "the case did not run to its end"),
    ("racecheck", 9, "ran: dq\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)",
     "2 hazards displayed (2 errors, 0 warnings), 0 explained: the others are not shown"),
    ("synccheck", 0, "ran: dq\n========= ERROR SUMMARY: 0 errors", "clean"),
    ("synccheck", 0, "========= ERROR SUMMARY: 0 errors", "the case did not run to its end"),
    ("synccheck", 9, "ran: dq\n========= ERROR SUMMARY: 3 errors", "3 errors"),
    ("racecheck", 0, "ran: forward", "the tool said nothing"),
    ("consan-forward", 0, "ran: forward", "clean"),
    ("consan-forward", 0, "consan: dq: dq.py:3: two\nconsan: dq: dq.py:1: one\nconsan: dq: dq.py:3: two\nran: forward", "2 places, 0 explained"),
    ("consan-backward", 4, "consan: dq: dq.py:3: two\nWRONG: dq is 0.3 off", "WRONG: dq is 0.3 off"),
    ("consan-backward", 1, "consan: dq: dq.py:3: two\nRuntimeError", "1 places, 0 explained, status 1"),
    ("consan-backward", 1, "RuntimeError: device-side assert triggered", "status 1: RuntimeError: device-side assert triggered"),
    ("consan-backward", 1, "x\n/a/dq.py:7: dq: block: [0,0,0], thread: [3,0,0] Assertion `int32 overflow` failed.\nRuntimeError: device-side assert",
     "status 1: /a/dq.py:7: dq: block: [0,0,0], thread: [3,0,0] Assertion `int32 overflow` failed."),
    ("consan-backward", None, "", "did not finish"),
    ("synccheck", 4, "WRONG: dq is 0.3 off\n========= ERROR SUMMARY: 0 errors", "WRONG: dq is 0.3 off"),
    ("synccheck", 3, "DID NOT RUN: dbias\n========= ERROR SUMMARY: 0 errors", "DID NOT RUN: dbias"),
])  # fmt: skip
def test_verdicts(tool: str, status: int | None, text: str, wanted: str) -> None:
    assert RACES.verdict(tool, status, text) == wanted


CODE = """
0x10 .L_x_1:
0x10 BAR.SYNC.DEFER_BLOCKING 0x1
0x20 LDS.U8 R2, [R2+UR30+0x1e12c]
0x30 BAR.SYNC.DEFER_BLOCKING 0x0, 0x80
0x40 LDS.U8 R4, [R3]
0x50 LDS R3, [R3]
0x60 STS [UR6+0x1e134], R5
0x70 STS [UR6+0x1e130], R2
0x80 BAR.SYNC.DEFER_BLOCKING 0x1
0x90 STS [UR6+0x1e130], R2
0xa0 @P0 BRA `(.L_x_1)
0xb0 BAR.SYNC.DEFER_BLOCKING 0x1
0xc0 .L_x_2:
0xc0 LDS.U8 R9, [R3]
0xd0 EXIT
"""


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    lines = [line.split(" ", 1) for line in CODE.strip().splitlines()]
    found = [(-1 if what.startswith(".L") else int(at, 16), what) for at, what in lines]
    monkeypatch.setattr(RACES, "instructions", lambda path: found if path == "/cache/x/dq.cubin" else [])
    return found


@pytest.mark.parametrize(("write", "read", "wanted"), [
    (0x70, 0x20, True),
    (0x60, 0x20, True),
    (0x90, 0x20, False),  # may jump past the barrier
    (0x70, 0x40, False),  # behind a barrier of some of the threads
    (0x70, 0x50, False),  # not a byte
    (0x70, 0xC0, False),  # may be jumped to past the barrier
    (0x20, 0x70, False),
    (0x74, 0x20, False),  # no instruction
])  # fmt: skip
def test_what_orders_a_byte(write: int, read: int, wanted: bool, code: list[tuple[int, str]]) -> None:
    assert RACES.handed_over(code, write, read) is wanted


KNOWN = """========= Error: Race reported between Read access at dq+0x20 in dq.py:40
=========     and Write access at dq+0x70 in dq.py:41 [12 hazards]
=========     and Write access at dq+0x60 in dq.py:41 [2 hazards]
=========
"""


@pytest.mark.parametrize(("reports", "errors", "wanted"), [
    (KNOWN, 1, "clean, 1 explained"),
    (KNOWN * 2, 2, "clean, 2 explained"),
    (KNOWN, 2, "some (2 errors, 0 warnings), 1 explained: the others are not shown"),
    (KNOWN + KNOWN.replace("0x60", "0x90"), 2, "some (2 errors, 0 warnings), 1 explained: Race reported between Read access at dq+0x20 in"),
    (KNOWN.replace("Read", "Write"), 1, "some (1 errors, 0 warnings), 0 explained: Race reported between Write access at dq+0x20"),
    (KNOWN.replace("at dq", "at dkdv"), 1, "some (1 errors, 0 warnings), 0 explained: Race reported between Read access at dkdv+0x20"),
    ("========= Error: Something else\n", 1, "some (1 errors, 0 warnings), 0 explained: Something else"),
])  # fmt: skip
def test_only_known_reports_are_explained(reports: str, errors: int, wanted: str, code: list[tuple[int, str]]) -> None:
    text = f"code: /cache/x/dq.cubin\ncode: /cache/y/dq.cubin\n{reports}ran: dq\n========= RACECHECK SUMMARY: some ({errors} errors, 0 warnings)\n"
    assert RACES.verdict("racecheck", 9, text).startswith(wanted)


def line_of(file: str, statement: str) -> str:
    lines = (SCRIPT.parent.parent / "src" / "triflash" / "kernels" / "hopper" / file).read_text().splitlines()
    return f"{file}:{next(n for n, line in enumerate(lines, 1) if statement in line)}"


@pytest.mark.parametrize(("file", "statement", "says", "by"), [
    ("dkdv.py", "tma_load(f.q_desc", "Buffer being accessed has outstanding reads", "Q_FREE"),
    ("dkdv.py", "tma_load(f.stats_desc, [row, LSE", "Buffer being accessed has outstanding reads", "Q_FREE"),
    ("dkdv.py", "tma_load(f.o_desc", "Accessing buffer with pending access. Pending access type: warpgroup_mma operand read", "O_FREE"),
    ("dkdv.py", "tma_load(f.mask_desc", "Buffer being accessed has outstanding reads", "BIAS_FREE"),
    ("dkdv_step.py", ".store(ds16)", "Buffer being accessed has outstanding reads", "DS_HERE"),
    ("dkdv_step.py", "warpgroup_mma(p.ds_s", "Buffer being accessed has outstanding writes. Operand: A", "DS_HERE"),
    ("dkdv_step.py", "tma_add(dq_desc", "Buffer being accessed has outstanding writes.", "DQ_HERE"),
    ("dkdv_step.py", "warpgroup_mma(p.ds_s", "Buffer being accessed has outstanding writes. Operand: B", "DS_HERE"),
    ("dkdv.py", "tma_load(f.q_desc", "Buffer being accessed has outstanding writes.", ""),
    ("dkdv.py", "tma_load(f.k_desc", "Buffer being accessed has outstanding reads", ""),
    ("dkdv.py", "tma_load(f.q_desc", "Barrier arrive underflow", ""),
])  # fmt: skip
def test_what_named_barriers_order_is_known(file: str, statement: str, says: str, by: str) -> None:
    report = f"dkdv: {line_of(file, statement)} < dkdv.py:428: {says}"
    assert RACES.behind_named_barrier(report) == by
    assert RACES.behind_named_barrier(report.replace("dkdv: ", "dq: ")) == ""
    said = f"consan: {report.replace(' < dkdv.py:428', ' < dkdv.py:421 < dkdv.py:428')}\nran: forward"
    assert RACES.verdict("consan-backward", 0, said) == ("clean, 1 explained" if by else "1 places, 0 explained")


def test_reports_are_told_apart_by_the_line_and_the_call() -> None:
    places = ["a.py:1 < b.py:2 < c.py:3", "a.py:1 < b.py:2 < c.py:4", "a.py:1 < b.py:3 < c.py:3", "a.py:1", "somewhere"]
    text = "".join(f"consan: dq: {place}: it is wrong: so\n" for place in places)
    wanted = ["a.py:1 < b.py:2", "a.py:1 < b.py:3", "a.py:1", "somewhere"]
    assert RACES.reports(text) == [f"dq: {place}: it is wrong: so" for place in wanted]


def test_places_that_the_sanitizer_tells_of_are_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = tmp_path / "case.py"
    case.write_text("import os, sys\nprint('consan: dq: dq.py:3: two')\nprint('ran: dq', os.environ['TRITON_CACHE_DIR'])")
    monkeypatch.setattr(RACES, "__file__", str(case))
    assert RACES.main(["--tools", "consan-forward", "--cases", "wide", "--logs", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "consan-forward: 0 of 2 cases clean" in said and "  wide, bias, mask: 1 places, 0 explained" in said
    assert said.endswith("dq: dq.py:3: two (2 cases: wide; wide, bias, mask)\n")
    caches = {path.read_text().split()[-1] for path in tmp_path.glob("*.txt")}
    assert len(caches) == 1 and not Path(*caches).exists()


def test_without_the_tool_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(RACES, "sanitizer", lambda: None)
    assert RACES.main(["--tools", "racecheck", "--cases", "apart;wide", "--logs", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "racecheck: 0 of 4 cases clean" in said and "  wide: compute-sanitizer is not installed here" in said
