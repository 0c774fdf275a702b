"""What ``TRIFLASH_UNTRIED=1`` turns on is right on the stand-in for a GPU: some tests of it once more, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from here import stand_in_only
from triflash.untried import UNTRIED

HERE = Path(__file__).parent
TESTS = (  # and which of them: packed sequences, whole blocks first, and sinks beside any bias; heads in two buffers beside anything
    ("test_varlen_hopper.py", "a_sink_beside or (keys_that_add and full)"),
    ("test_hopper_heads.py", "padded or wide_heads"),
)


@pytest.mark.skipif(UNTRIED, reason="they run so anyway")
@pytest.mark.parametrize(("file", "which"), TESTS, ids=[file.removeprefix("test_").removesuffix(".py") for file, _ in TESTS])
def test_what_is_off_is_right(file: str, which: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file), "-k", which]
    run = subprocess.run(command, env=os.environ | {"TRIFLASH_UNTRIED": "1"}, capture_output=True, text=True, cwd=HERE.parent)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert " passed" in run.stdout


pytestmark = stand_in_only
