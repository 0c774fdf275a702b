"""The README's programs run as written, one after the other as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parent.parent / "README.md"


def test_programs_run_as_written() -> None:
    programs = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(programs) >= 8
    # Only the head dim is smaller than written.
    names: dict[str, Any] = {}
    for program in programs:
        exec(compile(program.replace("b, s, h, d = 2, 1024, 8, 64", "b, s, h, d = 2, 1024, 8, 8"), str(README), "exec"), names)
    assert names["sink"].grad.shape == (8,) and names["out"].shape == (2, 1024, 8, 8)
    table, out = names["positions"].weight, names["attention"](names["q"], names["k"], names["v"], bias=None)
    assert table.requires_grad and torch.isfinite(out).all()
