"""The stub of a GPU, for the whole session: see ``gpu.py``."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import gpu
import pytest
import torch

os.environ["TRITON_INTERPRET"] = "0"
os.environ["DISABLE_LLVM_OPT"] = "1"  # nobody runs what is compiled
NAME = "NVIDIA H200"


def pytest_configure(config: pytest.Config) -> None:
    """Before anything imports Triton's driver. Kernels that were compiled, as far as they are here, are kept for the next run."""
    assert config.cache is not None
    kept = Path(os.environ["TRITON_CACHE_DIR"]) / "stub" if "TRITON_CACHE_DIR" in os.environ else config.cache.mkdir("triflash-stub")
    os.environ["TRITON_CACHE_DIR"] = str(kept)


@pytest.fixture(scope="session", autouse=True)
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The package takes CPU tensors for those of an sm90 with 132 SMs."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU")
    problem = gpu.build(tmp_path_factory.mktemp("stub"))
    if problem is not None:
        pytest.skip(problem)
    gpu.activate()
    from triflash import launch
    from triflash.bound import signature
    from triflash.plan.device import KNOWN_DEVICES
    from unlaunched import OnGPU

    facts = replace(KNOWN_DEVICES["sm90"], name=NAME)
    with (
        mock.patch.object(signature, "facts_of", lambda _: facts),
        mock.patch.object(launch, "Real", OnGPU),
    ):
        yield


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment of the tests says, launches are bound."""
    for name in ("TRIFLASH_BIND", "TRIFLASH_BACKEND", "TRIFLASH_TUNED", "TRIFLASH_COMPILE_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def compiled_to_the_end(settings: None) -> Iterator[None]:
    """No kernel that one test began is compiled in another, with its settings."""
    yield
    for thread in threading.enumerate():
        if thread.name == "triflash-compile":
            thread.join()
