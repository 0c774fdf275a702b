"""docs/pytorch.md: its programs run as they stand, and what is spread over two processes gives the gradients of the whole.

Checkpointing is in tests/test_checkpoint.py, DTensors in all their placements in tests/test_sharded.py, compiled calls through Inductor and
every keyword under symbolic sizes in tests/test_operators.py.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import triflash
from ranks import needs_gloo, run, without_group

pytestmark = pytest.mark.unpoisoned
_, NEEDS_GLOO = needs_gloo
PAGE = Path(__file__).parent.parent / "docs" / "pytorch.md"


def program(heading: str) -> str:
    """The program of a section; of the page's head, which has the module that all others use, without one."""
    text = PAGE.read_text()
    section = text.partition(f"\n## {heading}\n")[2] if heading else text
    (found,) = re.findall(r"```python\n(.*?)```", re.split(r"^## ", section, flags=re.MULTILINE)[0], re.DOTALL)
    return found


def execute(heading: str, names: dict[str, Any]) -> None:
    exec(compile(program(heading), f"{PAGE.name}: {heading}", "exec"), names)


@pytest.fixture
def names() -> dict[str, Any]:
    found: dict[str, Any] = {}
    execute("", found)
    return found


def test_compile(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = names["model"], names["x"]
    model(x).sum().backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    with triflash.record_launches() as ran:
        execute("Compile", names)
    assert ran == ["tiled: forward", "tiled: backward", "tiled: forward", "tiled: forward"]
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_export_and_aotinductor(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("AOTInductor needs a C++ compiler")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch._inductor.config.aot_inductor, "compile_wrapper_opt_level", "O0")  # a tenth of the time is ours
    with triflash.record_launches() as ran:
        execute("Export and AOTInductor", names)
    assert ran == ["tiled: forward"] * 2  # of the package and of the module
    y = torch.randn(64, 70, 64)
    with torch.no_grad():
        for each in (names["program"].module(), names["loaded"]):
            torch.testing.assert_close(each(y), names["model"](y))
    # What a process says that has not imported triflash.
    load = "import torch; torch._inductor.aoti_load_package('block.pt2')"
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert done.returncode and "triflash::forward" in done.stderr


def test_meta_tensors(names: dict[str, Any]) -> None:
    execute("Meta tensors", names)
    small, model, x = names["small"], names["model"], names["x"]
    assert torch.equal(small(x), model(x))
    q, bias = torch.randn(2, 5, 4, 8), torch.randn(4, 5, 5)
    real = triflash.attention(q, q, q, bias=bias, return_lse=True)
    for a, b in zip(real, triflash.attention(*[q.to("meta")] * 3, bias=bias.to("meta"), return_lse=True), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()) and b.is_meta
    with pytest.raises(ValueError, match="^bias: "):
        triflash.attention(*[q.to("meta")] * 3, bias=bias[:3].to("meta"))


@pytest.mark.gpu
def test_cuda_graphs(names: dict[str, Any]) -> None:
    execute("CUDA graphs", names)
    torch.cuda.synchronize()
    with torch.no_grad():
        assert torch.equal(names["out"], names["model"](names["still"]))


def whole_of(weight: Tensor) -> Tensor:
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach()


def check_parts(spread: torch.nn.Module, names: dict[str, Any], factor: float) -> None:
    """Gradients of the module that is spread are ``factor`` times those of a plain one with the same weights and the whole batch."""
    weights = {name.removeprefix("module."): weight for name, weight in spread.named_parameters()}
    plain = names["Block"]()
    plain.load_state_dict({name: whole_of(weight) for name, weight in weights.items()})
    plain(names["x"]).sum().backward()
    for name, weight in plain.named_parameters():
        got = whole_of(weights[name].grad)
        torch.testing.assert_close(got, factor * weight.grad, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def check_processes(rank: int, world: int) -> None:
    """The programs as each of several processes runs them, in the group that there is."""
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    execute("", names)
    source = program("DDP and FSDP2"), program("Tensor parallel")
    data, (tensor, ended) = re.sub(r"^dist\.init.*\n", "", source[0], flags=re.MULTILINE), source[1].split("dist.destroy_process_group()")
    assert data != source[0] and not ended.strip()
    exec(data, names)
    check_parts(names["replicated"], names, 1 / world)
    check_parts(names["sharded"], names, 1 / world)
    exec(tensor, names)
    check_parts(names["parallel"], names, 1)
    local = names["parallel"].position.weight.to_local()
    assert names["mesh"].size() == world and local.shape == (32, 4 // world)


@NEEDS_GLOO
def test_two_processes(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    run(2, tmp_path, record_property, check_processes)


@NEEDS_GLOO
def test_one_process_as_written(names: dict[str, Any]) -> None:
    with without_group():
        for heading in ("DDP and FSDP2", "Tensor parallel"):
            execute(heading, names)
    check_parts(names["replicated"], names, 1)
