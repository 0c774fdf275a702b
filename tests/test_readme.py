"""The README's programs run when copied alone, and what it says of speed is what the tables under docs/results say."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

# What is asked of each program once it has run, in the order of the page.
CHECKS = [
    """
s = torch.einsum("bihd,bjhd->bhij", q, k) / 8 + bias
dense = torch.einsum("bhij,bjhd->bihd", s.masked_fill(torch.ones(512, 512, dtype=torch.bool, device=device).triu(1), -torch.inf).softmax(-1), v)
wanted, = torch.autograd.grad(dense.sum(), bias)
torch.testing.assert_close(out, dense, atol=1e-4 if dtype == torch.float32 else 3e-2, rtol=1e-3)
torch.testing.assert_close(bias.grad, wanted, atol=1e-3 if dtype == torch.float32 else 0.3, rtol=1e-2)
""",
    """
import copy, torch, triflash
ids = torch.arange(2 * 12).reshape(2, 12)
with torch.no_grad(), triflash.record_launches() as ran:
    logits = model.eval()(input_ids=ids, decoder_input_ids=ids).logits
eager = copy.deepcopy(model)
eager.set_attn_implementation("eager")
with torch.no_grad():
    torch.testing.assert_close(eager(input_ids=ids, decoder_input_ids=ids).logits, logits, atol=1e-3, rtol=1e-3)
assert len(ran) == 6, ran  # two layers, and the decoder's look at the encoder's output
""",
    """
x = torch.randn(8, 2, 64, device=device)
for module in layer.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
layer.self_attn.dropout = 0.0
with triflash.compat.sdpa.replace(), triflash.record_launches() as ran:
    ours = layer(x)
torch.testing.assert_close(ours, layer(x), atol=1e-4, rtol=1e-4)
assert len(ran) == 1 and layer.self_attn.in_proj_weight.grad is not None, ran
""",
    """
whole = triflash.attention_varlen(q, k, v, begins, bias=positions(450), causal=True)
alone = triflash.attention(q[None, 300:320], k[None, 300:320], v[None, 300:320], bias=positions(450)[..., :20, :20], causal=True)
torch.testing.assert_close(whole[300:320], alone[0], atol=1e-4, rtol=1e-4)
assert positions.weight.grad.abs().sum() > 0
""",
]


@pytest.mark.parametrize("number", range(len(CHECKS)), ids=["bias", "transformers", "sdpa", "packed"])
def test_a_program_runs_alone(number: int, tmp_path: Path) -> None:
    """In a process of its own, in an empty folder, and it prints what its comments say."""
    program = PROGRAMS[number]
    if "transformers" in program:
        pytest.importorskip("transformers")
    said = re.findall(r"^print\(.*\)  # (.*)$", program, re.MULTILINE)
    path = os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    words = [sys.executable, "-c", program + CHECKS[number]]
    run = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == said
    assert not list(tmp_path.iterdir())


def test_every_program_is_checked() -> None:
    assert len(PROGRAMS) == len(CHECKS)


def test_two_minutes() -> None:
    assert README.count("\n") <= 130


def rates(which: str) -> dict[str, dict[str, int]]:
    """TFLOP/s at the median of each pass by the names of cell, provider and pass, as ``triflash bench`` computes it."""
    found = json.loads((ROOT / "docs" / "results" / "2026-11-26-h200" / f"{which}.json").read_text())
    cells = {cell["key"]: cell for cell in found["cells"]}
    table: dict[str, dict[str, int]] = {}
    for row in found["rows"]:
        if row["status"] == "ok":
            cell = cells[row["cell"]]
            rate = cell["flops"][row["which"]] / statistics.median(row["samples_ms"]) / 1e9
            table.setdefault(cell["name"], {})[f"{row['provider']} {row['which']}"] = round(rate)
    return table


PROVIDERS = {
    "triflash": "triflash",
    "cuDNN": "sdpa-cudnn",
    "FlashAttention-4": "fa4",
    "FlexAttention": "flex",
    "memory-efficient": "sdpa-efficient",
}


def test_speeds_are_measured_ones() -> None:
    """Each number of the table of TFLOP/s is in the raw data, and bold where it is ahead of triflash's."""
    lines = README.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("| | triflash | cuDNN |"))
    columns = [PROVIDERS[word.strip()] for word in lines[start].strip("| ").split("|")]
    compared = 0
    plain, biased = rates("no-bias"), rates("bias")
    for line in lines[start + 2 :]:
        if not line.startswith("| d "):
            break
        name, *values = (word.strip() for word in line[1:-1].split("|"))
        d, s = re.findall(r"\d+", name)[:2]
        bias = ("1hqk" if "bias" in name else "") + ("+db" if "gradient" in name else "")
        length = f"{int(s) // 1024}k" if int(s) >= 1024 else s
        mask = "causal" if "causal" in name else "full"
        cell = (biased if bias else plain)[f"d{d} s{length} {mask} {bias}".strip()]
        for provider, value in zip(columns, values, strict=True):
            for which, said in zip(("fwd", "bwd"), value.split(" / "), strict=False):
                if said.strip("*").isdigit():
                    number = int(said.strip("*"))
                    assert number == cell[f"{provider} {which}"], (line, provider, which)
                    assert said.startswith("**") == (number > cell[f"triflash {which}"]), (line, provider, which)
                    compared += 1
                elif "no gradient" in said:
                    assert f"{provider} {which}" not in cell, (line, provider)
    assert compared >= 40
