"""``triflash compile`` on a machine without a GPU, and that a process on the GPU then compiles nothing: kernels and launchers are found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import gpu
import pytest
import torch
from triton import knobs

from triflash import attention
from triflash.bound.signature import CALLS

BF16 = torch.bfloat16


def command(cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which knows nothing of the stub."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_LIBCUDA_PATH"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    words = ("-m", "triflash", "compile", *words, "--device", "h200", "--workers", "1", "--cache", str(cache))
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the kernels of one problem, portable and for Hopper, forward and backward."""
    cache = tmp_path_factory.mktemp("cache") / "new"
    for backend in ("triton", "hopper"):
        done = command(cache, "--b", "2", "--s", "160", "--h", "2", "--d", "32", "--causal", "--backend", backend)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "registers" in done.stdout and str(cache) in done.stdout and "no launcher" not in done.stdout
    return cache


@pytest.fixture
def fresh(filled: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, bool]]]:
    """A process that finds the cache, and has nothing in memory. What it compiles, and whether it was a hit."""
    from triflash.kernels import hopper, triton  # noqa: F401
    from triflash.launch import hopper as hopper_calls  # noqa: F401

    seen: list[tuple[str, bool]] = []

    def listener(*, src: Any, cache_hit: bool, **_: Any) -> None:
        seen.append((src.name, cache_hit))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(filled))
    monkeypatch.setattr(knobs.compilation, "listener", listener)
    CALLS.clear()
    with mock.patch("triton.runtime.build._build", side_effect=AssertionError("a launcher was built")):
        yield seen
    CALLS.clear()


def forgotten() -> None:
    """Every kernel that this process has compiled or loaded. Their keys stay as they are, whatever was compiled before."""
    from triton.runtime.jit import JITFunction

    import triflash.kernels.hopper as hopper
    import triflash.kernels.triton as portable

    for package in (hopper, portable):
        for name, module in list(sys.modules.items()):
            if name.startswith(package.__name__ + "."):
                for value in vars(module).values():
                    if isinstance(value, JITFunction):
                        value.device_caches.clear()


def step(B: int, S: int, H: int, D: int, backend: str) -> None:
    q, k, v = (torch.zeros(B, S, H, D, dtype=BF16, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        attention(q, k, v, causal=True, backend=backend)
    out = attention(q, k, v, causal=True, backend=backend)
    out.backward(torch.zeros_like(out))


@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_a_process_on_the_gpu_compiles_nothing(backend: str, fresh: list[tuple[str, bool]]) -> None:
    forgotten()
    before = gpu.launches()
    step(2, 160, 2, 32, backend)
    assert gpu.launches() - before >= 4
    names = {name for name, _ in fresh}
    assert {"forward"} < names and all(hit for _, hit in fresh), fresh


def test_another_problem_is_compiled(fresh: list[tuple[str, bool]]) -> None:
    """So that the test above can fail: head dim 64 is not in the cache. Its launchers are, whose signatures are the same."""
    forgotten()
    step(2, 160, 2, 64, "triton")
    assert fresh and not any(hit for _, hit in fresh)


def test_what_is_there_is_not_compiled_again(filled: Path) -> None:
    done = command(filled, "--b", "2", "--s", "160", "--h", "2", "--d", "32", "--causal", "--backend", "triton", "--pass", "fwd")
    assert "could not be loaded" not in done.stderr
    assert done.returncode == 0 and "there" in done.stdout and "0 kernels compiled" in done.stdout and "1 were in the cache" in done.stdout
