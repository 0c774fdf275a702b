"""What the compiler made of a Hopper kernel: ptxas's log, the machine code, and what is looked for in them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from typing import Any

import triton
from triton.backends.nvidia.compiler import get_ptxas


def assembled(ptx: str, *options: str) -> str:
    """What ptxas, the one that Triton itself uses, has to say about a PTX text."""
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "kernel.ptx")
        with open(source, "w") as file:
            file.write(ptx)
        command = [get_ptxas(90).path, "-v", *options, "--gpu-name=sm_90a", source, "-o", os.path.join(folder, "kernel.cubin")]
        run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def serialised(log: str) -> list[str]:
    """Lines of ptxas's log that say that asynchronous products wait for one another (C7510 and its kin)."""
    return [line for line in log.splitlines() if re.search(r"C75\d\d|serializ", line)]


def disassembled(compiled: Any) -> str:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def unfenced_releases(code: str) -> int:
    """How often a barrier is told "empty" while loads from shared memory, and no fence after them, came before in the text.

    A load may wait in its queue while its thread goes on, and TMA overtakes it: a bias once changed under its readers that way. Loads of a
    partition's arguments, before its first wait, do not count.
    """
    waited = pending = False
    found = 0
    for line in code.splitlines():
        if "USETMAXREG" in line:
            waited = pending = False
        elif "PHASECHK" in line:
            waited = True
        elif re.search(r"\bLDSM?\b", line):
            pending = waited
        elif "MEMBAR" in line:
            pending = False
        elif "SYNCS.ARRIVE" in line:
            found += pending
    return found
