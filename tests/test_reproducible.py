"""The same inputs give the same bits, every time: forward, all gradients, and a dbias whose reduction is split over programs."""

from __future__ import annotations

import pytest
import torch

import triflash
from cases import Case, build
from expected import kernels
from here import BACKENDS
from running import results_of, small_tiles

ON_GPU = torch.cuda.is_available()
CASES = [
    Case("split dbias", B=4, M=24, N=24, H=2, D=16, bias="11qk", dlse=True),
    Case("bias of one row, causal", B=2, M=40, N=24, H=2, D=8, bias="1h1k", causal=True),
    Case("one number", B=2, M=24, N=40, H=1, D=8, bias="1111", dlse=True, dtype=torch.float32),
    Case("no bias", B=1, M=64, N=50, H=2, D=40, dlse=True),
]


def bits(case: Case, backend: str, device: torch.device) -> tuple[dict[str, torch.Tensor], list[str]]:
    (results,), ran = results_of(case, build(case, device), backend)
    return results, kernels(ran)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_repeats(case: Case, backend: str, device: torch.device) -> None:
    """20 times on a CPU, 1000 on a GPU, where programs really race. Memory in between is dirtied with other values."""
    repeats = 1000 if ON_GPU else 4 if backend == "triton" else 20
    first, ran = bits(case, backend, device)
    if case.name == "split dbias" and backend == "triton":
        assert "dbias_sum" in ran, "this case is meant to reach the split reduction"
    for repeat in range(repeats - 1):
        del_me = [torch.full((1 << 12,), float(repeat), device=device) for _ in range(repeat % 5)]
        again, _ = bits(case, backend, device)
        del del_me
        for name, x in first.items():
            assert torch.equal(x, again[name]), f"{name} differs in repeat {repeat + 1}"


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [40, 64, 128])
@pytest.mark.parametrize("bias", [None, "11qk", "1h1k"])
def test_repeats_with_the_devices_own_tiles(bias: str | None, dim: int, device: torch.device) -> None:
    """The seed's author feared races at head dims other than 64 and 128; so this runs many programs per SM, 100 times."""
    case = Case("races", B=8, M=520, N=500, H=8, D=dim, bias=bias, tiles=None, dlse=True, dtype=torch.bfloat16)
    first, _ = bits(case, "triton", device)
    for _ in range(100):
        again, _ = bits(case, "triton", device)
        assert all(torch.equal(x, again[name]) for name, x in first.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_entry_does_not_depend_on_its_neighbours(backend: str, device: torch.device) -> None:
    """Alone or in a batch, out and gradients of an entry have the same bits (same tiles, same order of additions)."""
    q, k, v = (torch.randn(3, 20, 2, 8, device=device, requires_grad=True) for _ in range(3))
    dout = torch.randn(3, 20, 2, 8, device=device)
    with triflash.backend(backend), small_tiles((16, 16)):
        batched = torch.autograd.grad(triflash.flash_attn_func(q, k, v, None, True), (q, k, v), dout)
        alone = [x[1:2].detach().requires_grad_() for x in (q, k, v)]
        single = torch.autograd.grad(triflash.flash_attn_func(*alone, None, True), alone, dout[1:2])
    tolerance = 0.0 if backend == "triton" else 1e-6  # PyTorch's batched products may choose another algorithm per batch size
    for a, b in zip(batched, single, strict=True):
        torch.testing.assert_close(a[1:2], b, rtol=tolerance, atol=tolerance)
