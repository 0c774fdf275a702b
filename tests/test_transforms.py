"""``torch.func`` on attention: reverse-mode derivatives and vmap equal loops over the entries; what does not exist is a named error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import triflash
from triflash import UnsupportedError, attention, flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func

B, M, N, H, D, V = 2, 6, 7, 4, 8, 3


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def hidden(*shape: int) -> Tensor:
    mask = torch.rand(shape) < 0.7
    mask[..., :1] = True
    return mask


# Operands beside q, k and v, each of all entries and whether vmap takes one for each.
CASES: dict[str, dict[str, tuple[Callable[[], Tensor], bool]]] = {
    "plain": {},
    "a bias for all": {"bias": (lambda: draw(H, M, N), False)},
    "a bias of the batch": {"bias": (lambda: draw(B, 1, M, N), False)},
    "a bias of each": {"bias": (lambda: draw(V, 1, H, M, N), True)},
    "a bias of each and the batch": {"bias": (lambda: draw(V, B, H, M, N), True)},
    "bias of each, mask of the batch": {"bias": (lambda: draw(V, 1, H, M, N), True), "mask": (lambda: hidden(B, 1, M, N), False)},
    "a mask of each": {"mask": (lambda: hidden(V, M, N), True)},
    "lengths for all": {"key_lengths": (lambda: torch.tensor([3, 7]), False)},
    "lengths of each": {"key_lengths": (lambda: torch.tensor([[3, 7], [1, 2], [0, 5]]), True)},
    "slopes for all": {"alibi_slopes": (lambda: torch.rand(H), False)},
    "slopes of the batch": {"alibi_slopes": (lambda: torch.rand(B, H), False)},
    "slopes of each": {"alibi_slopes": (lambda: torch.rand(V, H), True)},
    "a sink for all": {"sink": (lambda: draw(H), False)},
    "a sink of each": {"sink": (lambda: draw(V, H), True)},
}


def build(name: str) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    tensors = {"q": draw(V, B, M, H, D), "k": draw(V, B, N, 2, D), "v": draw(V, B, N, 2, D)}
    dims: dict[str, int | None] = dict.fromkeys(tensors, 0)
    for key, (make, each) in CASES[name].items():
        tensors[key], dims[key] = make(), 0 if each else None
    return tensors, dims


def called(tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = attention(**tensors, causal=True, return_lse=True, backend="tiled", **options)
    return result


def entry(tensors: dict[str, Tensor], dims: dict[str, int | None], n: int) -> dict[str, Tensor]:
    return {key: x if dims[key] is None else x[n] for key, x in tensors.items()}


def same(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_vmap_is_a_loop(name: str) -> None:
    tensors, dims = build(name)
    got = torch.func.vmap(called, (dims,))(tensors)
    each = [called(entry(tensors, dims, n)) for n in range(V)]
    same(got, tuple(map(torch.stack, zip(*each, strict=True))))


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_each_entry(name: str) -> None:
    """vmap over grad: gradients of what all entries share come out for each of them."""
    tensors, dims = build(name)
    wanted = [key for key in ("q", "k", "v", "bias", "sink") if key in tensors]

    def loss(leaves: dict[str, Tensor], others: dict[str, Tensor]) -> Tensor:
        out, lse = called({**leaves, **others})
        return (out.sin().sum() + lse.masked_fill(lse == -torch.inf, 0.0).cos().sum()).float().double()

    def split(x: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return {key: x[key] for key in wanted}, {key: value for key, value in x.items() if key not in wanted}

    got = torch.func.vmap(torch.func.grad(loss), split(dims))(*split(tensors))
    for n in range(V):
        leaves, others = split(entry(tensors, dims, n))
        leaves = {key: x.detach().requires_grad_() for key, x in leaves.items()}
        right = torch.autograd.grad(loss(leaves, others), list(leaves.values()))
        for key, grad in zip(leaves, right, strict=True):
            same(got[key][n], grad)


@pytest.mark.parametrize("backend", ["tiled", "oracle"])
def test_reverse_mode_equals_autograd(backend: str) -> None:
    q, k, v, bias = draw(B, M, H, D), draw(B, N, H, D), draw(B, N, H, D), draw(H, M, N)

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attention(q, k, v, bias=bias, window=(3, 2), softcap=5.0, backend=backend)

    leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
    dout = torch.randn(B, M, H, D, dtype=torch.float64)
    right = torch.autograd.grad(f(*leaves), leaves, dout)
    same(torch.func.vjp(f, q, k, v, bias)[1](dout), right)
    same(torch.func.grad(lambda *x: (f(*x) * dout).sum(), argnums=(0, 1, 2, 3))(q, k, v, bias), right)
    rows = torch.func.jacrev(lambda q: f(q, k, v, bias)[0, 1, 2])(q)
    for n in range(D):
        (row,) = torch.autograd.grad(f(*leaves)[0, 1, 2, n], leaves[0])
        same(rows[n], row)


@pytest.mark.parametrize("call, shapes", [
    (flash_attn_func, ((B, M, H, D),) * 3), (flash_attn_kvpacked_func, ((B, M, H, D), (B, N, 2, H, D))), (flash_attn_qkvpacked_func, ((B, M, 3, H, D),)),
])  # fmt: skip
def test_the_seeds_functions(call: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...]) -> None:
    inputs = [draw(*shape) for shape in shapes]
    leaves = [x.clone().requires_grad_() for x in inputs]
    right = torch.autograd.grad(call(*leaves).sin().sum(), leaves)
    same(torch.func.grad(lambda *x: call(*x).sin().sum(), argnums=tuple(range(len(inputs))))(*inputs), right)
    many = [torch.stack([x, 2 * x]) for x in inputs]
    same(torch.func.vmap(call)(*many), torch.stack([call(*inputs), call(*(2 * x for x in inputs))]))


COMPILED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "grad": torch.func.grad(lambda q, bias: attention(q, q, q, bias=bias, causal=True).sin().sum(), argnums=(0, 1)),
    "vjp": lambda q, bias: torch.func.vjp(lambda q: attention(q, q, q, bias=bias), q)[1](q.cos()),
    "jacrev": torch.func.jacrev(lambda q, bias: attention(q, q, q, bias=bias)[0, 1, :2], argnums=(0, 1)),
    "vmap": torch.func.vmap(lambda q, bias: attention(q, q, q, bias=bias[None]), (1, 0), out_dims=1),
    "vmap of grad": torch.func.vmap(torch.func.grad(lambda q, bias: attention(q, q, q, bias=bias[None]).sin().sum(), argnums=(0, 1)), (1, 0)),
    "grad of vmap": torch.func.grad(
        lambda q, bias: torch.func.vmap(lambda q, bias: attention(q, q, q, bias=bias[None]), (1, 0))(q, bias).sin().sum(), argnums=(0, 1)
    ),
    "grad beside autograd": lambda q, bias: attention(q, q, q).sum() + torch.func.grad(lambda q: attention(q, q, q, bias=bias).sum())(q).sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_transforms(name: str) -> None:
    """In one graph, and as in eager calls; entries are the heads."""
    torch.compiler.reset()
    f = COMPILED[name]
    q, bias = draw(B, M, H, D), draw(H, M, M)
    if name.startswith(("vmap", "grad of vmap")):
        q = draw(B, H, M, 1, D)
    same(torch.compile(f, backend="aot_eager", fullgraph=True)(q, bias), f(q, bias))


def test_nested_vmap_and_other_dims() -> None:
    q, k, v = draw(B, V, M, 2, H, D), draw(V, B, N, H, D), draw(2, B, N, H, D)
    got = torch.func.vmap(torch.func.vmap(attention, (None, None, 0)), (1, 0, None))(q[..., 0, :, :], k, v)
    for n in range(V):
        for m in range(2):
            same(got[n, m], attention(q[:, n, :, 0], k[n], v[m]))


def test_batched_cotangents() -> None:
    """``is_grads_batched``: an eager backward pass for several output gradients."""
    q, k, v = (draw(B, N, H, D).requires_grad_() for _ in range(3))
    out = attention(q, k, v, causal=True)
    douts = torch.randn(3, *out.shape, dtype=torch.float64)
    got = torch.autograd.grad(out, (q, k, v), douts, is_grads_batched=True, retain_graph=True)
    for n in range(3):
        same([grad[n] for grad in got], list(torch.autograd.grad(out, (q, k, v), douts[n], retain_graph=True)))


def test_dropout_follows_the_randomness_of_vmap() -> None:
    x = draw(1, 16, 2, D).expand(V, -1, -1, -1, -1)

    def f(q: Tensor) -> Tensor:
        return attention(q, q, q, dropout_p=0.5, dropout_seed=7)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(f)(x)
    alike = torch.func.vmap(f, randomness="same")(x)
    assert torch.equal(alike[0], alike[1]) and torch.equal(alike[0], f(x[0]))
    apart = torch.func.vmap(f, randomness="different")(x)
    assert not torch.equal(apart[0], apart[1])
    drawn = torch.func.vmap(lambda q: attention(q, q, q, dropout_p=0.5), randomness="different")(x)
    assert not torch.equal(drawn[0], drawn[1])


def dual(f: Callable[[Tensor], Tensor], q: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(q, q))).tangent


FORWARD_MODE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "jvp": lambda f, q: torch.func.jvp(f, (q,), (q,)),
    "jacfwd": lambda f, q: torch.func.jacfwd(f)(q),
    "linearize": lambda f, q: torch.func.linearize(f, q)[1](q),
    "vmap of jvp": lambda f, q: torch.func.vmap(lambda x: torch.func.jvp(f, (x,), (x,)))(q[None]),
    "compiled jvp": lambda f, q: torch.compile(lambda q: torch.func.jvp(f, (q,), (q,)), backend="eager")(q),
    "autograd's jvp by forward mode": dual,
}


@pytest.mark.parametrize("mode", FORWARD_MODE)
@pytest.mark.parametrize("argument", ["q", "bias", "sink"])
@pytest.mark.parametrize("backend", ["tiled", "oracle"])
def test_forward_mode_is_refused(backend: str, argument: str, mode: str) -> None:
    torch._dynamo.reset()
    given = {"q": draw(B, M, H, D), "k": draw(B, N, H, D), "v": draw(B, N, H, D), "bias": draw(M, N), "sink": draw(H)}
    with pytest.raises(UnsupportedError, match="forward-mode"):
        FORWARD_MODE[mode](lambda x: attention(**{**given, argument: x}, backend=backend), given[argument])


def test_forward_mode_by_a_second_bias_is_called_that() -> None:
    q, bias = draw(1, M, H, D), draw(1, H, M, M)
    for f in (
        lambda x: attention(q, q, q, bias=(bias, x)),
        lambda x: triflash.attention_varlen(q[0], q[0], q[0], torch.tensor([0, M]), bias=(bias, x)),
    ):
        with pytest.raises(UnsupportedError, match=r"forward-mode derivatives by bias\[1\]"):
            torch.func.jvp(f, (bias,), (bias,))


def test_forward_mode_by_an_outputs_gradient_is_refused() -> None:
    """In a backward pass that begins outside, known or not: gradients depend on it, and kernels would leave that out."""
    q = draw(1, M, H, D).requires_grad_()
    out, lse = attention(q, q, q, return_lse=True)
    for y, name in ((out, "dout"), (lse, "dlse")):
        dy = torch.ones_like(y)
        for _ in range(3):
            torch.autograd.grad(y, q, dy, retain_graph=True)
        with forward_ad.dual_level():
            with pytest.raises(UnsupportedError, match=f"forward-mode derivatives by {name} "):
                torch.autograd.grad(y, q, forward_ad.make_dual(dy, dy), retain_graph=True)
            torch.autograd.grad(y, q, dy, retain_graph=True)


def test_tangents_of_others_do_not_matter() -> None:
    """Within a dual level, attention of tensors without a tangent is what it is elsewhere."""
    q = draw(B, M, H, D)
    with forward_ad.dual_level():
        forward_ad.make_dual(draw(2), draw(2))
        assert torch.equal(attention(q, q, q), attention(q.clone(), q, q))


@pytest.mark.parametrize("second", [
    lambda f, q: torch.func.hessian(f)(q), lambda f, q: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(q),
    torch.autograd.functional.hessian, lambda f, q: torch.func.jacrev(torch.func.jacrev(f))(q),
    lambda f, q: torch.compile(torch.func.grad(lambda x: torch.func.grad(f)(x).sum()), backend="aot_eager")(q),
])  # fmt: skip
def test_second_derivatives_are_refused(second: Callable[[Callable[[Tensor], Tensor], Tensor], Any]) -> None:
    q = draw(1, 3, 1, 4)
    with pytest.raises(UnsupportedError, match="second derivative|forward-mode"):
        second(lambda q: attention(q, q, q).square().sum(), q)


def test_the_hint_for_second_derivatives_works_as_written() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = draw(1, 2, 3, 4).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        first = torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(q, q, q).square().sum(), q, create_graph=True)[0]
    assert torch.autograd.grad(first.sum(), q)[0].abs().sum() > 0


def test_negated_views_are_what_they_look_like() -> None:
    z = torch.randn(1, 5, 2, 4, dtype=torch.complex64)
    negated = torch.conj(z).imag
    assert negated.is_neg()
    q = torch.randn(1, 5, 2, 4)
    plain = torch.randn(1, 5, 2, 8)[..., 1::2]
    assert plain.stride() == negated.stride()
    attention(plain, q, q)  # the same signature, but for the bit that negates
    torch.testing.assert_close(attention(negated, q, q), attention(-z.imag, q, q))
    leaf = q.clone().requires_grad_()
    out = attention(leaf, q, q)
    torch.testing.assert_close(torch.autograd.grad(out, leaf, negated, retain_graph=True), torch.autograd.grad(out, leaf, -z.imag))


def test_no_backend_is_lost() -> None:
    with triflash.backend("oracle"), triflash.record_launches() as ran:
        torch.func.grad(lambda q: attention(q, q, q).sum())(torch.randn(1, 4, 1, 8))
    assert ran == ["oracle: forward", "oracle: backward"]
