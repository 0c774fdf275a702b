"""Key lengths of every dtype of integers and slopes of every dtype of floats, of any strides: kernels read them as they lie, on every backend
(Hopper's where there is no such GPU on the CPU, by ``gluon_twin.py``)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from here import EVERY_BACKEND, ON_HOPPER
from running import small_tiles
from triflash import attention
from triflash.form import Form
from triflash.spec import INTEGERS

ALL = ["oracle", *EVERY_BACKEND]
F16, F32, F64 = torch.float16, torch.float32, torch.float64
KEYS = 300  # more than a byte counts


def on(backend: str) -> AbstractContextManager[Any]:
    if backend != "hopper" or ON_HOPPER:
        return nullcontext()
    if torch.cuda.is_available():
        pytest.skip("needs an sm90 GPU")
    import gluon_twin

    return gluon_twin.twin_device(3)


def lengths_in(dtype: torch.dtype) -> list[int]:
    """What is hardest to read as another dtype: the ends, what lies beyond those of narrower ones, and what N as this dtype would be."""
    ends = torch.iinfo(dtype)
    candidates = [ends.min, -1, 1, 130, KEYS - 1, 2**32 + 5, 2**63, ends.max]
    return [n for n in candidates if ends.min <= n <= ends.max]


def results(backend: str, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    with small_tiles((16, 128)) if backend != "hopper" else on(backend):
        out, lse = attention(*tensors, **options, return_lse=True, backend=backend, deterministic=True)
        return [out, lse, *torch.autograd.grad(out.sum(), tensors)]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_key_lengths_of_any_integers(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    lengths = lengths_in(dtype)
    table = torch.tensor([[7, n, 9] for n in lengths], dtype=dtype).to(device)  # on the way no arithmetic, of which some dtypes have none
    shapes = ((len(lengths), length, 1, 16) for length in (3, KEYS, KEYS))
    tensors = [torch.randn(shape, device=device).to(F16).requires_grad_() for shape in shapes]
    known = torch.tensor([min(max(n, 0), KEYS) for n in lengths], dtype=torch.int32, device=device)
    wanted = results(backend, tensors, key_lengths=known)
    for a, b in zip(results(backend, tensors, key_lengths=table[:, 1]), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("batch", [1, 2])
def test_key_lengths_expanded(batch: int, backend: str, device: torch.device) -> None:
    tensors = [torch.randn(batch, length, 1, 16, device=device).to(F16).requires_grad_() for length in (3, 27, 27)]
    known = torch.full((batch,), 11, dtype=torch.int32, device=device)
    for a, b in zip(*(results(backend, tensors, key_lengths=x) for x in (known[:1].expand(batch), known)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [F16, torch.bfloat16, F32, F64], ids=str)
def test_slopes_of_any_floats(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    tensors = [torch.randn(2, length, 2, 16, device=device).to(F16).requires_grad_() for length in (9, 27, 27)]
    slopes = torch.rand(3, 2, 2, device=device).to(dtype)[1].t()
    wanted = results(backend, tensors, alibi_slopes=slopes.to(F32).contiguous())
    for a, b in zip(results(backend, tensors, alibi_slopes=slopes), wanted, strict=True):
        assert torch.equal(a, b)


def test_nothing_is_computed_of_them() -> None:
    """A call launches no kernels for its lengths and slopes: what the operators get are views of what was given."""
    q = torch.empty(2, 4, 8, 2, 16)
    lengths, slopes = torch.ones(2, 4, dtype=torch.uint8), torch.ones(2, 4, 2, dtype=F16)
    form = Form((2, 4), 2)
    for slopes_given in (slopes, slopes[0, 0]):
        x = form.operands((q, q, q, None, None, lengths, slopes_given, None, None), lambda name, _: pytest.fail(f"copies {name}"))
        for given, taken in ((lengths, x.key_lengths), (slopes_given, x.alibi_slopes)):
            assert taken is not None and taken.data_ptr() == given.data_ptr() and taken.dtype == given.dtype
    assert triflash.attention(q[0], q[0], q[0], key_lengths=lengths[0]).shape == q[0].shape
