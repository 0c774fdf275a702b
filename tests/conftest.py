"""Shared by every test: which Triton runs (interpreter or GPU), the device, seeds, and allocations that start out as NaN."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

# Deterministic mode (see `poisoned_allocations`) wants this from cuBLAS; it must be set before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# A compiled graph cached by an older checkout would call operators by the signatures that they had then.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="triflash-inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

torch.set_num_threads(1)  # the tensors are tiny, and several workers share the processors

# Folders that need the real Triton, each in a process of its own: kernels compiled for GPUs that are not there, and a stub of a driver.
APART = tuple(Path(__file__).parent / name for name in ("aot", "stub"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="run the I-th of N equal parts: several processes share a GPU without pytest-xdist")


def pytest_configure(config: pytest.Config) -> None:
    """Turn Triton's interpreter on where there is no GPU, before anything imports Triton; not for a folder of ``APART`` alone."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped elsewhere")
    config.addinivalue_line("markers", "unpoisoned: allocations are left alone (tests of compilation)")
    if not chosen_apart(config) and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def patched_once_a_launch() -> Iterator[None]:
    """Triton's interpreter makes ``triton.language`` its own for every launch, and again at every call of a device function, which changes
    nothing but took half of the time of these tests. Here it does so once a launch.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Any) -> Any:
        languages = {id(x) for x in function.__globals__.values() if x is interpreter.tl or x is interpreter.tl.core}
        if languages <= patched:
            return interpreter._LangPatchScope()
        scope, outermost = patch(function), not patched
        patched.update(languages)
        if outermost:
            restore = scope.restore
            scope.restore = lambda: (restore(), patched.clear())
        return scope

    with mock.patch.object(interpreter, "_patch_lang", patch_once):
        yield


def chosen_apart(config: pytest.Config) -> Path | None:
    """The folder of ``APART`` that all of the command line is about."""
    chosen = [Path(arg.split("::")[0]).resolve() for arg in config.args]
    return next((folder for folder in APART if chosen and all(path.is_relative_to(folder) for path in chosen)), None)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``pytest tests`` leaves the folders of ``APART`` out: one process cannot have Triton both interpreted and compiled."""
    return True if collection_path in APART and collection_path != chosen_apart(config) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if shard := config.getoption("--shard", None):
        part, parts = map(int, shard.split("/"))
        items[:] = items[part - 1 :: parts]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tensors of a test live: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_allocations(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every ``torch.empty`` and its relatives return NaN (integers: their maximum), so that an element nobody writes is seen.

    ``test_tolerance.py`` asserts that this is so. PyTorch ties the filling to its deterministic mode.
    """
    wanted = request.node.get_closest_marker("unpoisoned") is None
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
