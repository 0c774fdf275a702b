"""The snippets of docs/migration.md run as written, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

PAGE = Path(__file__).parent.parent / "docs" / "migration.md"


def test_snippets_run_as_written() -> None:
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(snippets) == 13
    builtin, names = F.scaled_dot_product_attention, dict[str, Any]()
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)
    assert F.scaled_dot_product_attention is builtin
    # The call of xformers' function, dense.
    q, k, v, bias = (names[name].detach() for name in ("q", "k", "v", "bias"))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * 0.5 + bias
    s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(names["out"].detach(), torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v), atol=1e-5, rtol=1e-5)
    # Folding models' layouts, dense.
    Q, K, V, bias1, bias2 = (names[name].detach() for name in ("Q", "K", "V", "bias1", "bias2"))
    s = torch.einsum("bnihd,bnjhd->bnhij", Q, K) / 8**0.5 + bias1 + bias2
    torch.testing.assert_close(names["folded"].detach(), torch.einsum("bnhij,bnjhd->bnihd", s.softmax(-1), V), atol=1e-5, rtol=1e-5)
