"""Explaining with the compiler's numbers, and tuning's worker processes: both need the real Triton, and no GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from test_compile import Target, calls

import triflash
from triflash.__main__ import main
from triflash.cli.tune.candidates import Job, compiler
from triflash.cli.tune.cases import Case
from triflash.launch import ahead
from triflash.launch.room import Real
from triflash.plan.configs import TileConfig
from triflash.plan.device import KNOWN_DEVICES
from triflash.spec import Gradients, Needs, Operands, Saved, spec_of


@pytest.mark.parametrize("arch", ["sm90", "gfx942"])
def test_compiled_numbers_are_those_of_the_launches(arch: str) -> None:
    plan, made = calls(Target(arch, "", 64, torch.bfloat16, "1hqk", True))
    wanted = [ahead.resources(ahead.compile_for(call, arch)) for call in made]
    q = torch.empty(2, 2032, 16, 64, device="meta", dtype=torch.bfloat16)
    bias = q.new_empty(1, 16, 2032, 2032)
    explained = triflash.explain(
        q, q, q, bias, causal=True, scale=0.125, grads=("q", "k", "v", "bias"), device=arch, backend="triton", compile=True
    )
    assert explained.backward is not None
    steps = (*explained.forward.steps, *explained.backward.steps)
    assert tuple(step.step for step in steps) == plan.steps and [step.compiled for step in steps] == wanted
    for found in wanted:
        assert f"{found.registers} registers a thread" in str(explained)
        assert found.shared_memory <= KNOWN_DEVICES[arch].shared_memory


def test_a_copied_input_is_compiled_as_its_copy() -> None:
    """Odd rows would make every load of the bias a scalar one: other registers than those of the launch."""
    q = torch.empty(2, 512, 4, 64, device="meta", dtype=torch.bfloat16)

    def compiled(bias: torch.Tensor) -> Any:
        explained = triflash.explain(q, q[:, :480], q[:, :480], bias, device="sm90", backend="triton", compile=True)
        return bool(explained.copies), explained.forward.steps[0].compiled

    padded, odd = torch.empty(4, 512, 480, device="meta"), torch.empty(4, 512, 481, device="meta")[..., :480]
    assert compiled(padded)[0] is False and compiled(odd) == (True, compiled(padded)[1])


@pytest.mark.parametrize("head_dim, columns", [(64, 480), (24, 481)])
def test_the_hopper_kernel_is_compiled_as_it_is_launched(head_dim: int, columns: int) -> None:
    """From real tensors through the launcher's own copies, and from meta tensors through explain."""
    from triflash import launch
    from triflash.plan.select import plan_forward

    q, k = (torch.zeros(2, length, 4, head_dim, dtype=torch.bfloat16) for length in (512, columns))
    bias = torch.zeros(1, 1, 4, 512, columns, dtype=torch.bfloat16).expand(2, 1, 4, 512, columns)
    explained = triflash.explain(q, k, k, bias[:, 0], grads=(), device="sm90", backend="hopper", compile=True)
    plan = plan_forward(explained.spec, KNOWN_DEVICES["sm90"], "hopper")
    lse = torch.zeros(2, 4, 512)
    saved = Saved(torch.empty_like(q), lse, torch.zeros_like(lse))
    (call,) = launch.forward_calls(Real(q), plan, explained.spec, Operands(q, k, k, bias), saved)
    compiled = explained.forward.steps[0].compiled
    assert plan.backend == "hopper" and compiled == ahead.resources(ahead.compile_for(call, "sm90"))
    assert compiled.shared_memory <= call.config.shared_memory(explained.spec)
    assert explained.backward is None

    (meta,) = ahead.calls_of(plan, explained.spec, Needs(False, False, False, False), q, k, k, bias)
    for own, real in zip(meta.args, call.args, strict=True):
        assert getattr(own, "shape", own) == getattr(real, "shape", real)
        assert getattr(own, "strides", None) == getattr(real, "strides", None)
    assert meta.constants == call.constants


def outline(x: Any) -> Any:
    """What a kernel is compiled for of an argument: of a tensor or descriptor its layout."""
    if isinstance(x, torch.Tensor):
        return tuple(x.shape), x.stride(), x.dtype
    if hasattr(x, "block_shape"):
        return tuple(x.shape), tuple(x.strides), tuple(x.block_shape), x.layout
    return x


@pytest.mark.parametrize("head_dim, columns, bias", [
    (64, 480, None), (64, 2000, "1h1k"), (24, 481, "bhqk"), (20, 481, "1hqk"), (256, 480, "b1qk"), (40, 481, "expanded"),
])  # fmt: skip
def test_the_hopper_backward_kernels_are_compiled_as_they_are_launched(head_dim: int, columns: int, bias: str | None) -> None:
    """The launcher's calls for real tensors, none of them started, and those made up for meta tensors: the same layouts and constants."""
    from triflash import launch
    from triflash.plan.select import plan_backward

    B, H, M = 2, 4, 300
    q, k = (torch.zeros(B, length, H, head_dim, dtype=torch.bfloat16) for length in (M, columns))
    given = None
    if bias == "expanded":
        given = torch.zeros(1, 1, H, M, columns, dtype=torch.bfloat16).expand(B, 1, H, M, columns)
    elif bias is not None:
        b, *rest = (size if letter != "1" else 1 for letter, size in zip(bias, (B, H, M, columns), strict=True))
        given = torch.zeros(b, 1, *rest)
    spec = spec_of(q, k, k, given, 1, None, 0, 0.125, "")
    needs = Needs(True, True, True, given is not None)
    plan = plan_backward(spec, needs, KNOWN_DEVICES["sm90"], "hopper")
    out, lse = torch.zeros_like(q), torch.zeros(B, H, M)
    grads = Gradients(*(None if x is None else torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, k, given)))
    saved = Saved(out, lse, torch.zeros_like(lse) if spec.keeps_rest else None)
    real = launch.backward_calls(Real(q), plan, spec, Operands(q, k, k, given), saved, torch.zeros_like(out), None, grads)
    made_up = ahead.calls_of(plan, spec, needs, q, k, k, given)
    assert len(made_up) == len(real) == len(plan.steps)
    for own, launched in zip(made_up, real, strict=True):
        assert own.kernel is launched.kernel and own.constants == launched.constants and own.programs == launched.programs
        assert [outline(x) for x in own.args] == [outline(x) for x in launched.args]


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--d", "64", "--s", "1k", "--device", "sm90", "--grads", "none", "--compile"]) == 0
    text = capsys.readouterr().out
    assert "compiled" in text and "registers a thread" in text and "estimated" not in text
    assert main(["explain", "--d", "64", "--s", "4k", "--device", "sm90", "--backend", "hopper", "--compile"]) == 0
    text = capsys.readouterr().out
    assert text.count("  compiled  ") == 6 and "estimated" not in text  # forward, preprocess, dkdv and dq, each of these for either loop
    assert main(["explain", "--d", "520", "--s", "1k", "--device", "sm90", "--compile"]) == 0
    assert "nothing was compiled" in capsys.readouterr().out


CASE = Case(1, 256, 256, 2, 64, torch.bfloat16, None, False, False)


class Crash(Job):
    """A job that takes its worker process down as it arrives."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


def test_a_crash_of_the_compiler_costs_one_configuration() -> None:
    device = KNOWN_DEVICES["sm90"]
    good = [Job(CASE, "forward", TileConfig(64, 64, 4, stages), device) for stages in (2, 3)]
    too_large = Job(CASE, "forward", TileConfig(256, 256, 4, 8), device)
    crash = Crash(CASE, "forward", TileConfig(128, 64, 4, 1), device)
    done: list[None] = []
    with compiler(1) as workers:
        found = workers.build_all([good[0], crash, good[1]], lambda: done.append(None))
        assert found[crash].refused(device, 64) == "the compiler crashed" and len(done) == 3
        assert all(found[job].refused(device, 64) is None for job in good)
        again = workers.build_all([good[0], too_large])
    assert again[good[0]] == found[good[0]]
    assert "bytes of shared memory" in (again[too_large].refused(device, None) or "")


def test_compile_only(capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from triflash.cli.tune import candidates

    monkeypatch.setattr(candidates, "_LARGE", {"dq": [(64, 64, 4, 2)]})
    log = tmp_path / "log.json"
    assert main(f"tune --compile-only sm90 --kernels dq --d 64 --s 512 --workers 1 --log {log}".split()) == 0
    assert "dq: b4 h16 s512 d64 bf16" in capsys.readouterr().out and '"config": "64x64 w4 s2"' in log.read_text()
