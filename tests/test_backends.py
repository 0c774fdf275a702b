"""Choosing a backend: by block, by environment, by argument; what a named one cannot do raises and says what does work."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import triflash
from here import triton_only
from triflash import UnsupportedError, attention, backend, flash_attn_func, record_launches

ON_GPU = torch.cuda.is_available()


def ran_on(**kwargs: object) -> list[str]:
    q = torch.randn(1, 4, 1, 8, device="cuda" if ON_GPU else "cpu", **kwargs)  # type: ignore[call-overload]
    with record_launches() as ran:
        flash_attn_func(q, q, q)
    return [line.split(":")[0] for line in ran]


AUTOMATIC = "triton" if ON_GPU else "tiled"


def test_blocks_nest_and_end() -> None:
    assert ran_on() == [AUTOMATIC]
    with backend("oracle"):
        assert ran_on() == ["oracle"]
        with backend("tiled"):
            assert ran_on() == ["tiled"]
            with backend("auto"):
                assert ran_on() == [AUTOMATIC]
        assert ran_on() == ["oracle"]
        with pytest.raises(RuntimeError, match="inside"), backend("tiled"):
            raise RuntimeError("inside")
        assert ran_on() == ["oracle"]
    assert ran_on() == [AUTOMATIC]


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIFLASH_BACKEND", "oracle")
    assert ran_on() == ["oracle"]
    with backend("tiled"):
        assert ran_on() == ["tiled"]
    monkeypatch.setenv("TRIFLASH_BACKEND", "")
    assert ran_on() == [AUTOMATIC]


def test_environment_with_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIFLASH_BACKEND", "cudnn")
    with pytest.raises(ValueError, match=r"^TRIFLASH_BACKEND: wanted one of auto, tiled, triton, hopper, oracle, got 'cudnn'"):
        ran_on()


@pytest.mark.parametrize("name, exception, got", [("flash", ValueError, "'flash'"), ("Tiled", ValueError, "'Tiled'"), ("", ValueError, "''"), (None, TypeError, "NoneType"), (3, TypeError, "int")])  # fmt: skip
def test_unknown_names(name: object, exception: type[Exception], got: str) -> None:
    with pytest.raises(exception, match=rf"^backend: wanted .*one of auto, tiled, triton, hopper, oracle, got {got}"), backend(name):  # type: ignore[arg-type]
        pytest.fail("entered the block")


def test_the_choice_is_the_threads_own() -> None:
    seen: dict[str, list[str]] = {}
    barrier = threading.Barrier(2)

    def work(name: str) -> None:
        with backend(name):
            barrier.wait()  # both are inside their blocks
            q = torch.randn(1, 3, 1, 4)
            seen[name] = [triflash.plan.select.requested_backend()]  # type: ignore[attr-defined]
            flash_attn_func(q, q, q)
            barrier.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("tiled", "oracle")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"tiled": ["tiled"], "oracle": ["oracle"]}
    assert ran_on() == [AUTOMATIC]


def test_backward_stays_on_the_backend_of_its_forward() -> None:
    """Also after the block has ended, and inside a block that names another."""
    for name in ("tiled", "oracle"):
        q = torch.randn(1, 4, 1, 8, requires_grad=True)
        with backend(name):
            out = flash_attn_func(q, q, q)
        with record_launches() as ran, backend("auto"):
            out.sum().backward()
        assert ran == [f"{name}: backward"]


@triton_only
def test_backward_stays_on_triton(device: torch.device) -> None:
    q = torch.randn(1, 4, 1, 8, device=device, requires_grad=True)
    with backend("triton"):
        out = flash_attn_func(q, q, q)
    with record_launches() as ran, backend("tiled"):
        out.sum().backward()
    assert ran and all(line.startswith("triton: ") for line in ran)


def test_records_nest_and_say_the_configuration(device: torch.device) -> None:
    q = torch.randn(1, 4, 1, 8, device=device)
    with record_launches() as outer:
        with backend("tiled"), record_launches() as inner:
            flash_attn_func(q, q, q)
        with backend("oracle"):
            flash_attn_func(q, q, q)
    assert inner == ["tiled: forward"]
    assert outer == ["tiled: forward", "oracle: forward"]


def refusal(dtype: torch.dtype, dim: int, device: torch.device, bias_dtype: torch.dtype | None = None) -> str:
    q = torch.randn(1, 4, 1, dim, device=device).to(dtype)
    bias = None if bias_dtype is None else torch.zeros(4, 4, device=device, dtype=bias_dtype)
    with record_launches() as ran, backend("triton"), pytest.raises(UnsupportedError) as caught:
        flash_attn_func(q, q, q, bias)
    assert isinstance(caught.value, NotImplementedError) and ran == []
    assert "backend 'triton'" in str(caught.value)
    return str(caught.value)


@triton_only
def test_what_triton_refuses(device: torch.device) -> None:
    """By name: an error that says the feature and the nearest thing that works. By automatic choice: that thing."""
    message = refusal(torch.float64, 8, device)
    assert message.startswith("float64: not supported") and "backend('tiled')" in message and "set_float32_matmul_precision" in message
    message = refusal(torch.float16, 513, device)
    assert message.startswith("the forward pass of head dim 513: not supported") and "512" in message and "backend('tiled')" in message
    if not ON_GPU:
        for bias_dtype, dtype in ((None, torch.bfloat16), (torch.bfloat16, torch.float32)):
            message = refusal(dtype, 8, device, bias_dtype)
            assert message.startswith("bfloat16 in Triton's interpreter: not supported") and "float16 or float32" in message
    assert ran_on(dtype=torch.float64) == ["tiled"]


def test_automatic_choice_takes_any_head_dim(device: torch.device) -> None:
    q = torch.randn(1, 3, 1, 300, device=device)
    with record_launches() as ran:
        out = flash_attn_func(q, q, q)
    assert [" ".join(line.split()[:2]) for line in ran] == ["triton: forward" if device.type == "cuda" else "tiled: forward"]
    assert out.isfinite().all()


@triton_only
def test_large_head_dims_go_forward_on_triton(device: torch.device) -> None:
    """Up to 512; the backward pass of more than 256 raises by name, and by automatic choice is tiled's, which takes what triton saved."""
    q, k, v = (torch.randn(1, 20, 2, 300, device=device, requires_grad=True) for _ in range(3))
    with backend("triton"):
        out = flash_attn_func(q, k, v, None, True)
    with backend("oracle"):
        wanted = flash_attn_func(q, k, v, None, True)
    torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-4)
    with pytest.raises(UnsupportedError, match="^the backward pass of head dim 300: not supported by backend 'triton'; its limit is 256"):
        out.sum().backward()


@triton_only
def test_triton_on_cpu_tensors_needs_the_interpreter() -> None:
    program = """
import torch, triflash
q = torch.randn(1, 4, 1, 8)
try:
    with triflash.backend("triton"), triflash.record_launches() as ran:
        triflash.flash_attn_func(q, q, q)
except triflash.UnsupportedError as error:
    assert ran == []
    print(error)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("CPU tensors: not supported by backend 'triton'; ")
    assert "TRITON_INTERPRET=1" in run.stdout and "backend('tiled')" in run.stdout


NAMES = ["tiled", "oracle", pytest.param("triton", marks=triton_only)]


def results(function: Any, tensors: Sequence[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """An output and the gradients of what it is made of."""
    out = function(*tensors, **options)
    return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_autocast_is_that_of_sdpa(dtype: torch.dtype) -> None:
    """q, k and v become autocast's dtype, gradients come back in the given one; float64 stays; bias, sink and slopes keep theirs."""
    device = "cuda" if ON_GPU else "cpu"
    tensors = [torch.randn(1, 40, 2, 16, device=device).to(dtype).requires_grad_() for _ in range(3)]
    heads_first = [x.detach().transpose(1, 2).requires_grad_() for x in tensors]
    for to in (torch.bfloat16, torch.float16):
        cast = dtype if dtype == torch.float64 else to
        with torch.autocast(device, dtype=to):
            got = results(attention, tensors, causal=True)
            peer = results(torch.nn.functional.scaled_dot_product_attention, heads_first, is_causal=True)
        assert [x.dtype for x in got] == [x.dtype for x in peer] == [cast, dtype, dtype, dtype]
        with torch.no_grad():
            low = [x.to(cast) for x in tensors]
        wanted = results(attention, [x.requires_grad_() for x in low], causal=True)
        assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, wanted, strict=True))
        for a, b in zip(got, peer, strict=True):
            torch.testing.assert_close(a, b.transpose(1, 2), rtol=5e-2, atol=5e-2)
    bias, sink = torch.randn(40, 40, device=device, requires_grad=True), torch.randn(2, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        function = lambda *x: attention(*x[:3], bias=x[3], sink=x[4])  # noqa: E731
        got = results(function, [*tensors, bias, sink])
    assert got[4].dtype == bias.dtype and got[5].dtype == sink.dtype
    with torch.no_grad():
        cast = dtype if dtype == torch.float64 else torch.bfloat16
        assert torch.equal(got[0], attention(*(x.to(cast) for x in tensors), bias=bias, sink=sink))


def test_autocast_of_another_device_or_switched_off_changes_nothing() -> None:
    q = torch.randn(1, 40, 2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there may be no such device
        elsewhere = torch.autocast("cuda", dtype=torch.bfloat16)
    with elsewhere:
        assert torch.equal(attention(q, q, q), flash_attn_func(q, q, q)) and attention(q, q, q).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(q, q, q).dtype == flash_attn_func(q, q, q).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert attention(q, q, q).dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_reach_the_arithmetic(name: str) -> None:
    """Sums and exponentials are float32 whatever the caller's autocast says: the same bits as of inputs that were cast before."""
    device = "cuda" if ON_GPU else "cpu"
    tensors = [torch.randn(1, 40, 2, 16, device=device).half().requires_grad_() for _ in range(3)]
    with backend(name):
        wanted = results(flash_attn_func, tensors, causal=True)
        with torch.autocast(device, dtype=torch.float16):
            got = results(flash_attn_func, tensors, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
