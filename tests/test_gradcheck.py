"""Finite differences in float64: the tiled backend's hand-written backward against the forward alone, over several tiles."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

import triflash
from triflash import oracle, tiled

# (name, B, M, N, H, D, Dv, batch_inner, bias shape or None, lo, hi, scale)
PROBLEMS = [
    ("plain", 1, 5, 6, 1, 3, 3, 1, None, None, None, 0.7),
    ("full bias", 1, 5, 6, 2, 3, 3, 1, (1, 1, 2, 5, 6), None, None, 0.7),
    ("broadcast over queries", 2, 4, 5, 2, 2, 2, 1, (1, 1, 2, 1, 5), None, None, 0.7),
    ("broadcast over keys", 1, 4, 5, 2, 2, 2, 1, (1, 1, 1, 4, 1), None, None, 0.7),
    ("one number", 1, 3, 4, 1, 2, 2, 1, (1, 1, 1, 1, 1), None, 0, 0.7),
    ("causal", 1, 6, 6, 1, 3, 3, 1, (1, 1, 1, 6, 6), None, 0, 0.7),
    ("band with empty rows", 1, 7, 4, 1, 2, 2, 1, (1, 1, 1, 7, 4), -2, 1, 0.7),
    ("two batch levels", 4, 3, 3, 1, 2, 2, 2, (2, 1, 1, 3, 3), None, None, 0.7),
    ("other value dim", 1, 4, 5, 1, 2, 5, 1, (1, 1, 1, 4, 5), None, None, -0.4),
    ("scale 0", 1, 3, 4, 1, 2, 2, 1, (1, 1, 1, 3, 4), None, None, 0.0),
]


@pytest.fixture(params=[2, 16], ids=["tiles-of-2", "one-tile"])
def tile(request: pytest.FixtureRequest) -> int:
    with mock.patch.object(tiled, "tile_size", lambda _: request.param):
        yield request.param


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p[0])
@pytest.mark.usefixtures("tile")
def test_gradcheck(problem: tuple) -> None:
    """All gradients, of out and of the finite entries of lse."""
    _, B, M, N, H, D, Dv, inner, bias_shape, lo, hi, scale = problem
    shapes = [(B, M, H, D), (B, N, H, D), (B, N, H, Dv), *([bias_shape] if bias_shape else [])]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def function(*x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, *bias = x
        out, lse, _ = torch.ops.triflash.forward(q, k, v, bias[0] if bias else None, inner, lo, hi, scale, "", "tiled")
        return out, lse[lse > -torch.inf]

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_of_the_public_function(causal: bool) -> None:
    q, k, v = (torch.randn(1, length, 2, 3, dtype=torch.float64, requires_grad=True) for length in (4, 5, 5))
    bias = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: triflash.flash_attn_func(*x, causal), (q, k, v, bias))


@pytest.mark.parametrize("masked", ["row", "all"])
def test_gradcheck_beside_infinite_biases(masked: str) -> None:
    """Finite differences know nothing about the formula: rows that see nothing must not move, nor move anything."""
    q, k, v = (torch.randn(1, 4, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.zeros(4, 4, dtype=torch.float64)
    bias[1 if masked == "row" else slice(None)] = -torch.inf
    assert torch.autograd.gradcheck(lambda *x: triflash.flash_attn_func(*x, bias), (q, k, v))


@pytest.mark.parametrize("tile", [1, 4, 16, 64])
@pytest.mark.parametrize("lo, hi", [(None, None), (None, 0), (-7, 3), (30, None)])
def test_any_tile_size_gives_the_dense_result(tile: int, lo: int | None, hi: int | None) -> None:
    """``tiled.forward`` and ``tiled.backward`` themselves, in float64, so that nothing hides behind rounding."""
    q, k, v = (torch.randn(2, length, 2, 3, dtype=torch.float64, requires_grad=True) for length in (37, 41, 41))
    bias = torch.randn(2, 1, 2, 1, 41, dtype=torch.float64, requires_grad=True)
    options = dict(batch_inner=1, lo=lo, hi=hi, scale=0.3)
    wanted_out, wanted_lse = oracle.attention(q, k, v, bias, **options)  # type: ignore[arg-type]
    dout, dlse = torch.randn_like(wanted_out), torch.randn_like(wanted_lse)
    wanted = torch.autograd.grad([wanted_out, wanted_lse], [q, k, v, bias], [dout, dlse])
    with torch.no_grad():
        out, lse = torch.empty_like(wanted_out), torch.empty_like(wanted_lse)
        scores = tiled.Scores(bias, **options)  # type: ignore[arg-type]
        tiled.forward(q, k, v, scores, out=out, lse=lse, tile=tile)
        grads = [torch.empty_like(x) for x in (q, k, v, bias)]
        named = dict(zip(("dq", "dk", "dv", "dbias"), grads, strict=True))
        tiled.backward(dout, tiled.delta_of(out, dout, dlse, tile), q, k, v, scores, lse, tile=tile, **named)
    for got, want in zip((out, lse, *grads), (wanted_out, wanted_lse, *wanted), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_tile_size_is_bounded() -> None:
    sizes: list[Callable[[], int] | int] = [tiled.tile_size(n) for n in (1, 16, 100, 10_000, 10**9)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 512 and sizes[-1] == 16  # type: ignore[type-var]
