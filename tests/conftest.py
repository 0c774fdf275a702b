"""Shared by every test: which Triton runs (interpreter or GPU), the device, seeds, and allocations that start out as NaN."""

from __future__ import annotations

import atexit
import importlib.util
import os
import random
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiers
from quick_interpreter import quick_interpreter

# Deterministic mode (see `poisoned_allocations`) wants this from cuBLAS; it must be set before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# A compiled graph cached by an older checkout would call operators by the signatures that they had then.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="triflash-inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

torch.set_num_threads(1)  # the tensors are tiny, and several workers share the processors

# Folders that need the real Triton, each in a process of its own: kernels compiled for GPUs that are not there, and a stub of a driver.
APART = tuple(Path(__file__).parent / name for name in ("aot", "stub"))

# As torch.use_deterministic_algorithms, which tells Inductor as well and imports it for that: seconds, in every worker.
set_deterministic = torch._C._set_deterministic_algorithms


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="run the I-th of N parts, or commit/N: that which the commit picks")
    parser.addoption(
        "--tier", choices=tiers.TIERS, help="run what every change should pass, or some or all of what that leaves out (tiers.py)"
    )
    parser.addoption("--part", type=int, choices=range(tiers.PARTS), help="of what is not fixed in the first tier (default: the commit's)")
    parser.addoption("--record", action="store_true", help="measure the tests and write what they cost to durations.json")


def pytest_configure(config: pytest.Config) -> None:
    """Turn Triton's interpreter on where there is no GPU, before anything imports Triton; not for a folder of ``APART`` alone."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped elsewhere")
    config.addinivalue_line("markers", "unpoisoned: allocations are left alone (tests of compilation)")
    if not chosen_apart(config) and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if config.getoption("--tier") and config.getoption("--part") is None:
        config.option.part = tiers.number_of_commit() % tiers.PARTS
    if config.getoption("--record"):
        parts = any("::" in arg for arg in config.args) or config.option.keyword or config.option.markexpr or config.option.tier
        recorder = tiers.Recorder(whole=not parts and not config.option.shard, writes=not hasattr(config, "workerinput"))
        config.pluginmanager.register(recorder)


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        with quick_interpreter():
            yield
    else:
        yield


def chosen_apart(config: pytest.Config) -> Path | None:
    """The folder of ``APART`` that all of the command line is about."""
    chosen = [Path(arg.split("::")[0]).resolve() for arg in config.args]
    return next((folder for folder in APART if chosen and all(path.is_relative_to(folder) for path in chosen)), None)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``pytest tests`` leaves the folders of ``APART`` out: one process cannot have Triton both interpreted and compiled."""
    return True if collection_path in APART and collection_path != chosen_apart(config) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if tier := config.getoption("--tier"):
        budget = tiers.BUDGET["compiled" if chosen_apart(config) else "interpreted"]
        keep(
            config, items, tiers.tier_of([tiers.described(item) for item in items], tiers.read(), budget, tier, config.getoption("--part"))
        )
    if shard := config.getoption("--shard"):
        which, _, of = shard.partition("/")
        parts = int(of)
        part = tiers.number_of_commit() % parts + 1 if which == "commit" else int(which)
        keep(config, items, {item.nodeid for item in items if zlib.crc32(item.nodeid.encode()) % parts == part - 1})
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def keep(config: pytest.Config, items: list[pytest.Item], names: set[str]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in names])
    items[:] = [item for item in items if item.nodeid in names]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """How to run the same tests again, and how many of them nobody has measured."""
    if not config.getoption("--tier"):
        return
    known, ran = tiers.read(), {report.nodeid for report in terminalreporter.getreports("passed")}
    goal = {"first": "test", "some": "test-rest TIER=some", "rest": "test-rest"}[config.getoption("--tier")]
    terminalreporter.write_line(f"the same tests again: make {goal} PART={config.getoption('--part')}")
    if new := ran - known.keys():
        terminalreporter.write_line(f"{len(new)} of them were never measured: make durations")


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
    set_deterministic(wanted, warn_only=True)
    yield
    set_deterministic(False, warn_only=False)
