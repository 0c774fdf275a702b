"""``triflash env`` says what a bug report needs, and nothing about whose machine it is."""

from __future__ import annotations

import getpass
import platform
import socket
from pathlib import Path

import pytest
import torch

import triflash
from triflash.__main__ import main
from triflash.cli import environment
from triflash.plan import overlay
from triflash.plan.select import BACKENDS


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["env"]) == 0
    return capsys.readouterr().out


def test_it_names_versions_devices_and_backends(report: str) -> None:
    lines = dict(line.strip().split("  ", 1) for line in report.splitlines())
    assert lines["triflash"].strip().startswith(triflash.__version__)
    assert lines["python"].strip() == f"{platform.python_implementation()} {platform.python_version()}"
    assert lines["torch"].strip() == torch.__version__
    assert lines["kernel source"].strip() == overlay.kernel_source()
    assert platform.release() in lines["system"]
    assert all(name in lines for name in BACKENDS if name != "auto")
    assert lines["tiled"].strip() == "runs"
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name(0) in report and "shared memory" in lines["cuda:0"] and lines["driver"].strip()
    if (Path(triflash.__file__).parents[2] / ".git").exists():
        assert "(commit " in lines["triflash"]


def test_it_tells_nobodys_name_or_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/home/somebody/cache")
    monkeypatch.setenv("TRIFLASH_TUNED", "~somebody/tuned.json")
    monkeypatch.setenv("TORCH_SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("TRIFLASH_BACKEND", "tiled")
    monkeypatch.setenv("TRITON_EMPTY", "")
    text = environment.text()
    for private in ("somebody", "hunter2", str(Path.home()), str(Path(triflash.__file__).parent), str(Path.cwd())):
        assert private not in text
    for name in (socket.gethostname(), getpass.getuser()):
        assert len(name) < 5 or name not in text  # a short one may be part of a word
    for part in ("TRITON_CACHE_DIR", "set to a path", "set, not shown", "set, empty", "missing or not a file that triflash tune wrote"):
        assert part in text
    assert ("TRIFLASH_BACKEND", "tiled") in list(environment.collect())


def test_the_interpreter_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    if environment.facts_of(torch.device("cpu")).arch != "interpreter":
        pytest.skip("Triton's interpreter is off")
    lines = dict(environment.collect())
    assert lines["  triton"] == "runs in the interpreter" and "TRITON_INTERPRET" in lines


def test_a_tuned_file_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay.write(tmp_path / "t.json", [])
    monkeypatch.setenv("TRIFLASH_TUNED", str(tmp_path / "t.json"))
    assert ("tuned file", "0 entries") in list(environment.collect())


def test_missing_helpers_are_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No git, no nvidia-smi: fewer words, no traceback."""
    monkeypatch.setenv("PATH", "")
    assert environment.commit() == (None, None) and environment._driver().startswith("unknown")
    assert environment.text().startswith("triflash")
