"""A group of processes for the tests of ``triflash.distributed``: what they begin with, how they are started, what they cost."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import tiers

needs_gloo = [
    pytest.mark.unpoisoned,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
]
METHODS = ("allgather", "ulysses", "ring")
PRELOADED = ["torch", "torch.distributed.device_mesh", "triflash.distributed", "pytest"]


def made(name: str, shape: tuple[int, ...], keys: int, dtype: torch.dtype) -> Tensor:
    if name == "mask":
        return torch.rand(shape) > 0.3
    if name in ("key_lengths", "key_starts", "query_starts", "query_lengths", "diagonal"):
        lengths = torch.randint(0, keys + 1, shape)
        return lengths // 3 if name.endswith("starts") else lengths
    x = torch.randn(shape, dtype=torch.float64)
    return (x.abs() if name == "alibi_slopes" else x).to(dtype)


def call_of(function: Any, tensors: dict[str, Tensor], **options: Any) -> Any:
    given = dict(tensors)
    if "second" in given:
        given["bias"] = (given["bias"], given.pop("second"))
    q, k, v = (given.pop(name) for name in "qkv")
    return function(q, k, v, **given, **options)


def begin(rank: int, world: int, store: str, timeout: datetime.timedelta | None = None) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)


@contextlib.contextmanager
def without_group() -> Iterator[None]:
    """No process group is there, of an earlier test in this process neither, and none is left."""

    def end() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    end()
    try:
        yield
    finally:
        end()


def work(rank: int, world: int, store: str, function: Callable[..., None], *args: Any) -> None:
    """What each process does: a module's function of (rank, world), and what follows."""
    begin(rank, world, store)
    try:
        function(rank, world, *args)
        dist.barrier()
        Path(f"{store}.seconds.{rank}").write_text(str(time.process_time()))
    finally:
        dist.destroy_process_group()


def tell(folder: Path, record_property: Callable[[str, object], None]) -> None:
    """What processes cost that are the fork server's children, to tests/tiers.py."""
    record_property(tiers.ELSEWHERE, sum(float(each.read_text()) for each in folder.glob("store.seconds.*")))


def run(world: int, folder: Path, record_property: Callable[[str, object], None], function: Callable[..., None], *args: Any) -> None:
    """All processes. The first that fails ends the others, and its words come here. They are forked from one that has imported PyTorch."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    given = (world, str(folder / "store"), function, *args)
    torch.multiprocessing.start_processes(work, given, nprocs=world, start_method="forkserver")
    tell(folder, record_property)
