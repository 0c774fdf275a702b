"""The snippets of docs/varlen.md run as written, one after the other."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import triflash

PAGE = Path(__file__).parent.parent / "docs" / "varlen.md"


def test_snippets_run_as_written() -> None:
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(snippets) == 4
    names: dict[str, Any] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, str(PAGE), "exec"), names)
        if number == 1:  # each document by itself, with the bias cut to its length
            q, k, v, bias = *(names[name].detach() for name in "qkv"), names["positions"](names["longest"]).detach()
            for start, end in pairwise(names["cu"].tolist()):
                part = slice(start, end)
                alone = triflash.attention(*(x[None, part] for x in (q, k, v)), bias=bias[:, :, : end - start, : end - start], scale=1.0)
                torch.testing.assert_close(names["out"][part].detach(), alone[0], rtol=1e-4, atol=1e-5)
    explained = triflash.explain(*(names[name] for name in "qkv"), names["cu"], causal=True, of=triflash.attention_varlen)
    assert "4 packed sequences" in str(explained)
