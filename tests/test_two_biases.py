"""``bias=(a, b)``: two biases at once give what their sum gives, and each its own gradient, in every broadcast pattern of folding models."""

from __future__ import annotations

import itertools
import os
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from triflash import UnsupportedError, attention

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INTERPRETED = not GPU and os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    "tiled",
    "oracle",
    pytest.param("triton", marks=pytest.mark.skipif(not (GPU or INTERPRETED), reason="Triton runs nothing here")),
]

# (B, R, H, M, N): which dims a bias has. DS4Sci's Evoformer: of the rows' keys, and of pairs; its MSA column attention; AlphaFold 3's.
PATTERNS = ["BR..N", "B.HMN", "BRHMN", "..HMN", "B...N", "BRH.N", "..H..", ".R.M.", "....."]
SIZES = {"B": 2, "R": 3, "H": 2, "M": 9, "N": 17}


def shape_of(pattern: str) -> tuple[int, ...]:
    return tuple(SIZES[name] if name in pattern else 1 for name in SIZES)


def inputs(*patterns: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    B, R, H, M, N = SIZES.values()
    shapes = [(B, R, M, H, 16), (B, R, N, H, 16), (B, R, N, H, 16), *map(shape_of, patterns)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("patterns", list(itertools.combinations_with_replacement(PATTERNS, 2)))
def test_both_gradients(patterns: tuple[str, str], backend: str) -> None:
    drawn = inputs(*patterns)
    exact = [x.double().requires_grad_() for x in drawn]
    q, k, v, a, b = exact
    right = attention(q, k, v, bias=a + b, causal=True, backend="oracle")
    dout = torch.randn_like(right)
    wanted = torch.autograd.grad(right, exact, dout)
    leaves = [x.to(DEVICE).requires_grad_() for x in drawn]
    out = attention(*leaves[:3], bias=(leaves[3], leaves[4]), causal=True, backend=backend)
    torch.testing.assert_close(out.double().cpu(), right.detach(), rtol=1e-4, atol=1e-5)
    for got, grad, x in zip(torch.autograd.grad(out, leaves, dout.to(out)), wanted, leaves, strict=True):
        assert got.shape == x.shape and got.dtype == x.dtype
        torch.testing.assert_close(got.double().cpu(), grad, rtol=1e-3, atol=1e-4)


def problem(seed: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Any shapes, and any features beside."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch = rng.choice([(2,), (2, 3), (1, 4), (3, 1)])
    Hk, D = rng.choice([1, 2]), rng.choice([8, 16])
    H, M, N = Hk * rng.choice([1, 2]), rng.choice([1, 7, 33]), rng.choice([1, 16, 50])

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def shape() -> tuple[int, ...]:
        whole = (*batch, H, M, N)
        return tuple(rng.choice([1, size]) for size in whole)[rng.choice([0, 0, len(whole) - 2]) :]

    leaves = [
        rand(*batch, M, H, D),
        rand(*batch, N, Hk, D),
        rand(*batch, N, Hk, D),
        rand(*shape()),
        rand(*shape()).to(rng.choice([torch.float16, torch.float32])),
    ]
    some: list[tuple[float, str, Any]] = [
        (0.3, "mask", torch.rand((*batch, 1, 1, N), generator=generator) < 0.8),
        (0.4, "causal", True),
        (0.2, "softcap", 3.0),
        (0.2, "alibi_slopes", torch.rand(H, generator=generator)),
        (0.3, "key_lengths", torch.randint(0, N + 1, batch, generator=generator)),
        (0.3, "sink", rand(H)),
    ]
    options = {name: value for chance, name, value in some if rng.random() < chance}
    return leaves, options | ({"dropout_p": 0.3, "dropout_seed": 5} if rng.random() < 0.2 else {})


@pytest.mark.parametrize("backend, seed", [
    *(("tiled", seed) for seed in range(30)), *(("oracle", seed) for seed in range(10)),
    *(pytest.param("triton", seed, marks=pytest.mark.skipif(not (GPU or INTERPRETED), reason="Triton runs nothing here")) for seed in range(200 if GPU else 10)),
])  # fmt: skip
def test_two_are_their_sum(backend: str, seed: int) -> None:
    drawn, options = problem(seed)
    exact = [x.double().requires_grad_() for x in drawn]
    try:
        right = attention(*exact[:3], bias=exact[3] + exact[4], backend="oracle", **options)
    except UnsupportedError:
        pytest.skip("three batch levels")
    dout = torch.randn_like(right)
    wanted = torch.autograd.grad(right, exact, dout)
    rng = random.Random(seed)
    needs = [at for at in range(5) if rng.random() < 0.7] or [4]
    leaves = [x.to(DEVICE).requires_grad_(at in needs) for at, x in enumerate(drawn)]
    options = {key: x.to(DEVICE) if isinstance(x, Tensor) else x for key, x in options.items()}
    try:
        out = attention(*leaves[:3], bias=(leaves[3], leaves[4]), backend=backend, **options)
    except UnsupportedError as error:
        assert "batch dims" in str(error)
        return
    grads = torch.autograd.grad(out, [leaves[at] for at in needs], dout.to(out))
    near(out, right)
    for at, grad in zip(needs, grads, strict=True):
        near(grad, wanted[at], 2e-5 if drawn[at].dtype == torch.float32 else 1e-3)


def near(got: Tensor, right: Tensor, tolerance: float = 2e-5) -> None:
    got, right = got.detach().double().cpu(), right.detach()
    assert got.shape == right.shape and (got - right).norm() <= tolerance * (1 + right.norm())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_have_the_same_bits(backend: str) -> None:
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs("BR..N", "B.HMN")]
    found = []
    for _ in range(3):
        out = attention(*leaves[:3], bias=(leaves[3], leaves[4]), backend=backend)
        found.append(torch.autograd.grad(out.sin().sum(), leaves))
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_the_sum_is_never_there() -> None:
    """Of a call for a GPU: no allocation is as large as the sum of the biases would be."""
    q = torch.empty(1, 64, 128, 4, 32, device="meta", dtype=torch.bfloat16, requires_grad=True)
    a, b = (
        torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True) for shape in ((1, 64, 1, 1, 128), (1, 1, 4, 128, 128))
    )
    explained = triflash.explain(q, q, q, bias=(a, b), device="a100")
    assert explained.forward.backend == "triton"
    gives = {name for step in explained.backward.steps for name in step.step.gives}
    assert {"dbias", "dsecond"} <= gives
    whole = 64 * 4 * 128 * 128 * 2
    taken = [size for _, size in explained.memory] + [copy.nbytes for copy in explained.copies]
    assert max(taken) < whole
    text = str(explained)
    assert "bias b11k bf16 and 1hqk bf16" in text and "dsecond" in text


def step(*x: Tensor) -> Tensor:
    q, k, v, a, b = x
    out = attention(q, k, v, bias=(a, b))
    assert isinstance(out, Tensor)
    return out.square().sum()


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled(dynamic: bool | None) -> None:
    torch.compiler.reset()
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs("BR..N", "B.HMN")]
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for got, right in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(step(*leaves), leaves), strict=True):
        torch.testing.assert_close(got, right)


def test_transforms() -> None:
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs("BR..N", "B.HMN")]
    right = torch.autograd.grad(step(*leaves), leaves)
    given = [x.detach() for x in leaves]
    for got, wanted in zip(torch.func.grad(step, argnums=tuple(range(5)))(*given), right, strict=True):
        torch.testing.assert_close(got, wanted)
    *others, b = given
    each = torch.func.vmap(torch.func.grad(lambda b: step(*others, b)))(torch.stack([b, 2 * b]))
    torch.testing.assert_close(each[0], right[4])
    q, *others = given
    each = torch.func.vmap(lambda q: step(q, *others))(torch.stack([q, 2 * q]))
    torch.testing.assert_close(each, torch.stack([step(x, *others) for x in (q, 2 * q)]))


def test_fewer_than_two() -> None:
    q, k, v, a, _ = inputs("BR..N", "B.HMN")
    one = attention(q, k, v, bias=a)
    for bias in ((a,), (a, None), (None, a), [a], (None, a, None)):
        assert torch.equal(attention(q, k, v, bias=bias), one)  # type: ignore[arg-type]
    assert torch.equal(attention(q, k, v, bias=()), attention(q, k, v))


@pytest.mark.parametrize("make, words", [
    (lambda a, b: (a, b, a), "bias: wanted a tensor, or a tuple of up to two, got 3"), (lambda a, b: (a, b > 0), r"bias\[1\]: wanted numbers.*pass it as mask="),
    (lambda a, b: (a > 0, b), r"bias\[0\]: wanted numbers.*pass it as mask="), (lambda a, b: (a, b[..., 1:]), r"bias\[1\]: wanted 2 to 5 dims that broadcast"),
    (lambda a, b: (a, "b"), r"bias\[1\]: wanted a tensor"), (lambda a, b: (a, b.long()), r"bias\[1\]: wanted float16"),
])  # fmt: skip
def test_bad_input_is_named(make: Any, words: str) -> None:
    q, k, v, a, b = inputs("BR..N", "B.HMN")
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=words):
            attention(q, k, v, bias=make(a, b))


def test_more_batch_levels_than_two() -> None:
    q = torch.randn(2, 2, 2, 4, 1, 8)
    a, b = torch.randn(2, 1, 1, 1, 4, 4), torch.randn(1, 1, 2, 1, 4, 4)
    with pytest.raises(
        UnsupportedError, match=r"a bias that varies over batch dims \[0\] beside a bias\[1\] that varies over batch dims \[2\]"
    ):
        attention(q, q, q, bias=(a, b))
