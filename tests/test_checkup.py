"""``triflash env --check`` names what is missing and the command that mends it; so do errors of commands that lack a package."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from triflash.__main__ import main
from triflash.cli import checkup, extras
from triflash.cli.checkup import Finding

ROOT = Path(__file__).parent.parent


def found(monkeypatch: pytest.MonkeyPatch, gpus: int = 0) -> list[Finding]:
    """All findings on a machine with that many GPUs, which are not asked what would run there."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if gpus:
        monkeypatch.setattr(checkup, "_runs", lambda place: Finding("ok", f"{place} runs"))
    return list(checkup.findings())


def programs(monkeypatch: pytest.MonkeyPatch, *present: str) -> None:
    monkeypatch.setattr(checkup.shutil, "which", lambda name: f"/bin/{name}" if name in present else None)


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where nothing is missing and that has no GPU."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "TRIFLASH_TUNED", "TRIFLASH_BACKEND", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(checkup, "triton_problem", lambda: None)
    monkeypatch.setattr(checkup, "version", lambda package: "1")
    programs(monkeypatch)


def test_nothing_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["env", "--check"]) == 0
    said = capsys.readouterr().out
    assert f"ok        torch {torch.__version__}" in said and said.endswith("\nnothing is missing\n")
    assert "ok        cpu runs on backend tiled: attention with a bias and its gradient" in said
    assert all(len(line) <= 120 for line in said.splitlines())


def test_something_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu130")
    assert main(["env", "--check"]) == 1
    said = capsys.readouterr().out
    assert "missing   torch 2.9.1+cu130 is older than 2.10\n          -> pip install 'torch>=2.10'\n" in said
    assert said.endswith("\n1 missing\n")


def test_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "triton_problem", lambda: "Triton is not installed")
    monkeypatch.setattr(sys, "platform", "linux")
    assert Finding("missing", "Triton is not installed: its kernels cannot run", "pip install 'triton>=3.6'") in found(monkeypatch)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not [each for each in found(monkeypatch) if each.mark == "missing"]


def test_launchers_want_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkup.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert not [each for each in found(monkeypatch) if each.mark == "missing"]  # no GPU, nothing to launch
    mends = [each.mend for each in found(monkeypatch, gpus=1) if each.mark == "missing"]
    assert mends == ["apt-get install gcc, or set CC", f"apt-get install python3.{sys.version_info.minor}-dev"]
    (tmp_path / "Python.h").touch()
    programs(monkeypatch, "clang")
    assert not [each for each in found(monkeypatch, gpus=1) if each.mark == "missing"]
    assert Finding("ok", "cuda:0 runs") in found(monkeypatch, gpus=1)


@pytest.mark.parametrize("cuda, hip, hidden, mend", [
    (None, None, "", "pip install --force-reinstall torch"),
    ("13.0", None, "CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES"),
    (None, "7.0", "HIP_VISIBLE_DEVICES", "unset HIP_VISIBLE_DEVICES"),
    ("13.0", None, "", "run nvidia-smi; its driver may be too old for this PyTorch"),
])  # fmt: skip
def test_a_gpu_that_is_not_seen(cuda: str | None, hip: str | None, hidden: str, mend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(monkeypatch, "nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    if hidden:
        monkeypatch.setenv(hidden, "")
    assert [each.mend for each in found(monkeypatch) if each.mark == "missing"] == [mend]


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIFLASH_TUNED", "/nowhere/tuned.json")
    monkeypatch.setattr(checkup, "interpreting", lambda: True)
    mends = {each.mend: each.mark for each in found(monkeypatch)}
    assert mends["unset TRITON_INTERPRET"] == "optional" and mends["unset TRIFLASH_TUNED"] == "missing"


def test_extras_of_a_clone_and_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkup, "version", lambda package: "" if package == "matplotlib" else "1")
    lacking = [each for each in found(monkeypatch) if "matplotlib" in each.what]
    assert [each.what for each in lacking] == ["triflash demo: no matplotlib", "triflash bench and tune: no matplotlib"]
    assert {each.mark for each in lacking} == {"optional"}
    assert extras.install("bench", tmp_path) == "pip install 'rich>=13' 'matplotlib>=3.9.2'"  # somewhere in Python's own folders
    monkeypatch.chdir(ROOT)
    assert extras.install("bench", ROOT) == "pip install '.[bench]'"
    monkeypatch.chdir(tmp_path)
    assert extras.install("hf", ROOT) == "pip install '.[hf]', in the clone of triflash"


def test_requirements_are_those_of_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for extra, requirements in extras.EXTRAS.items():
        (listed,) = re.findall(rf"^{extra} = \[(.*?)\]", project, re.MULTILINE)
        assert tuple(re.findall(r'"(.*?)"', listed)) == requirements
    assert f'"torch>={".".join(map(str, checkup.OLDEST_TORCH))}"' in project
    assert f'"triton>={".".join(map(str, checkup.OLDEST_TRITON))};' in project
