"""What every public function owes, whatever it computes: each of PyTorch's transforms gives the right numbers or a named error, never a zero or
an error of PyTorch's own; every argument of integers takes every dtype of them, or names the ones that it takes; inputs of any magnitude; and
nothing beside the tensors that are written into changes. By the backends that the device has, on a CPU ``tiled``."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention.bias import causal_lower_right
from torch.utils._pytree import tree_map_only

import triflash
from public import CACHES, DENSE, EVERY, FUNCTIONS, OFFSETS, PARALLEL, B, D, Function, H, N, numbers
from triflash import UnsupportedError, attention, attention_varlen, attention_with_kvcache
from triflash.compat import flash_attn, torch_varlen
from triflash.compat.evoformer import triangle_attention
from triflash.spec import INTEGERS

WITH_GRADIENTS = [*FUNCTIONS, *PARALLEL]


def near(got: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    assert got.shape == wanted.shape
    assert (got.double() - wanted.double()).norm() <= tolerance * (1e-3 + wanted.double().norm())


class Called:
    """A function on its inputs, a cotangent, and what autograd makes of it in an eager call."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.function = EVERY[name]
        self.x = self.function.inputs(device)
        leaves = self.leaves()
        self.out = self.function.call(*leaves)
        self.dout = torch.randn(self.out.shape, generator=torch.Generator().manual_seed(1)).to(device)
        self.grads = torch.autograd.grad(self.out, leaves, self.dout) if name not in CACHES else ()

    def leaves(self) -> list[Tensor]:
        return [x.clone().requires_grad_() for x in self.x] if self.function not in CACHES.values() else self.x

    def loss(self, *x: Tensor) -> Tensor:
        return (self.function.call(*x) * self.dout).sum()


def refused(call: Callable[[], Any], parallel: bool, words: str) -> bool:
    """Whether the call is refused, by name, as those that wait for other processes may; else it must work."""
    if not parallel:
        call()
        return False
    with pytest.raises(UnsupportedError, match=words):
        call()
    return True


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_reverse_mode(name: str, device: torch.device) -> None:
    own = Called(name, device)
    every = tuple(range(len(own.x)))

    def check() -> None:
        for got, wanted in zip(torch.func.grad(own.loss, argnums=every)(*own.x), own.grads, strict=True):
            near(got, wanted)
        for got, wanted in zip(torch.func.vjp(own.function.call, *own.x)[1](own.dout), own.grads, strict=True):
            near(got, wanted)

    refused(check, name in PARALLEL, "torch.func transforms")


@pytest.mark.parametrize("name", [*WITH_GRADIENTS, *CACHES])
def test_vmap(name: str, device: torch.device) -> None:
    """Over each of the inputs alone, and over gradients of all of them."""
    own = Called(name, device)
    stacks = [torch.stack([x, 0.5 * x]) for x in own.x]

    def check() -> None:
        for at, stack in enumerate(stacks):

            def of_one(x: Tensor, at: int = at) -> Tensor:
                return own.function.call(*own.x[:at], x, *own.x[at + 1 :])

            near(torch.func.vmap(of_one)(stack), torch.stack([of_one(x) for x in stack]))
        gradients = torch.func.grad(own.loss, argnums=tuple(range(len(own.x))))
        found = torch.func.vmap(gradients)(*stacks)
        for got, *wanted in zip(found, *(gradients(*(x[n] for x in stacks)) for n in range(2)), strict=True):
            near(got, torch.stack(wanted))

    refused(check, name in PARALLEL or name in CACHES, "torch.func transforms")


@pytest.mark.parametrize("name", [*WITH_GRADIENTS, *CACHES])
def test_forward_mode_is_refused(name: str, device: torch.device) -> None:
    own = Called(name, device)
    for at, x in enumerate(own.x):

        def of_one(x: Tensor, at: int = at) -> Tensor:
            return own.function.call(*own.x[:at], x, *own.x[at + 1 :])

        words = "forward-mode derivatives" if name not in CACHES else "forward-mode derivatives|torch.func transforms"
        with pytest.raises(UnsupportedError, match=words):
            torch.func.jvp(of_one, (x,), (x,))
        with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="forward-mode derivatives"):
            of_one(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_second_derivatives_are_refused(name: str, device: torch.device) -> None:
    own = Called(name, device)
    leaves = own.leaves()
    (first,) = torch.autograd.grad(own.loss(*leaves), leaves[:1], create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivative"):
        first.square().sum().backward()


@pytest.mark.parametrize("name", CACHES)
def test_gradients_of_caches_are_refused(name: str, device: torch.device) -> None:
    own = Called(name, device)
    for at in range(3):
        with pytest.raises(UnsupportedError, match="attention"):
            own.function.call(*(x.clone().requires_grad_(n == at) for n, x in enumerate(own.x)))
    with pytest.raises(UnsupportedError, match="attention"):
        torch.func.grad(lambda q: own.function.call(q, *own.x[1:]).sum())(own.x[0])


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", [*FUNCTIONS, *CACHES, "allgather in parallel"])
def test_compiled(name: str, dynamic: bool | None, device: torch.device) -> None:
    own, leaves = Called(name, device), Called(name, device).leaves()
    torch.compiler.reset()
    out = torch.compile(own.function.call, backend="aot_eager", fullgraph=True, dynamic=dynamic)(*leaves)
    near(out, own.out)
    if own.grads:
        for got, wanted in zip(torch.autograd.grad(out, leaves, own.dout), own.grads, strict=True):
            near(got, wanted)


@pytest.mark.parametrize("name", [*WITH_GRADIENTS, *CACHES])
def test_autocast(name: str, device: torch.device) -> None:
    """Of float32 inputs bfloat16 comes out, as of SDPA, and gradients are float32; caches stay, and what reads them takes their dtype."""
    own = Called(name, device)
    leaves = own.leaves()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = own.function.call(*leaves)
    assert out.dtype == (torch.float32 if name in CACHES else torch.bfloat16)
    near(out, own.out, 5e-2)
    if own.grads:
        for got, wanted in zip(torch.autograd.grad(out.float(), leaves, own.dout), own.grads, strict=True):
            assert got.dtype == torch.float32
            near(got, wanted, 1e-1)


@pytest.mark.parametrize("name", [*WITH_GRADIENTS, *CACHES])
def test_autocast_of_mixed_inputs(name: str, device: torch.device) -> None:
    """Whichever of the inputs is in half precision already: what comes out is what the call on float32 inputs gives."""
    own = Called(name, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        for at in range(len(own.x)) if name not in CACHES else (0,):
            leaves = own.leaves()
            halves = [x.to(torch.bfloat16) if n == at else x for n, x in enumerate(leaves)]
            out = own.function.call(*halves)
            near(out, own.out, 5e-2)
            if own.grads:
                for got, wanted in zip(torch.autograd.grad(out.float(), leaves, own.dout), own.grads, strict=True):
                    near(got, wanted, 1e-1)


class Subclass(Tensor):
    """One that leaves everything to Tensor."""


class Wrapper(Tensor):
    """One that holds another tensor and sees every operator."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        found = function(*tree_map_only(cls, cls.unwrapped, args), **tree_map_only(cls, cls.unwrapped, options or {}))
        return tree_map_only(Tensor, cls, found)

    def unwrapped(self) -> Tensor:
        return self.inner


@pytest.mark.parametrize("name", [*WITH_GRADIENTS, *CACHES])
def test_subclasses(name: str, device: torch.device) -> None:
    """In the place of any input."""
    own = Called(name, device)
    for kind in (Subclass, Wrapper):
        for at in range(len(own.x)):
            given = [x.clone() for x in own.x]
            given[at] = given[at].as_subclass(Subclass) if kind is Subclass else Wrapper(given[at])
            out = own.function.call(*given)
            near(out.inner if isinstance(out, Wrapper) else out, own.out)


FOREIGN: dict[str, Callable[[Tensor], Any]] = {
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x.unsqueeze(-1) if x.dim() == 1 else x), layout=torch.jagged),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.flatten(0, -2).to_sparse_csr() if x.dim() > 1 else x.to_sparse(),
    "complex": lambda x: x.to(torch.complex64),
    "integers": lambda x: x.to(torch.int32),
    "8 bits": lambda x: x.to(torch.float8_e5m2),
    "a causal bias": lambda x: causal_lower_right(*(x.shape * 2)[-2:]),
}
# Where such an input means something: CausalBias is a mask to SDPA.
MEANT = {("sdpa", "a causal bias", 3)}


@pytest.mark.filterwarnings("ignore:.*(nested tensors is in prototype|Sparse CSR tensor support|Lower right causal bias)")
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("nn")])
def test_what_is_no_tensor_of_floats_in_memory_of_its_own(name: str, kind: str, device: torch.device) -> None:
    """It is refused in words, in the place of any input, after a call of the same shapes as well."""
    own = Called(name, device)
    for at, x in enumerate(own.x):
        if (name, kind, at) in MEANT:
            continue
        given = [*own.x[:at], FOREIGN[kind](x), *own.x[at + 1 :]]
        with pytest.raises((TypeError, ValueError), match=r"^[\w\[\], ]+: wanted .*, got "):
            own.function.call(*given)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in PARALLEL])
def test_threads(name: str, device: torch.device) -> None:
    """Calls on several threads at once, each of numbers of its own."""
    every = [Function(EVERY[name].shapes, EVERY[name].call).inputs(device, seed) for seed in range(4)]
    wanted = [EVERY[name].call(*(x.clone() for x in inputs)) for inputs in every]
    with ThreadPoolExecutor(4) as pool:
        for got, right in zip(pool.map(lambda inputs: EVERY[name].call(*inputs), every), wanted, strict=True):
            near(got, right)


@pytest.mark.parametrize("name", [*WITH_GRADIENTS, *CACHES])
def test_without_gradients(name: str, device: torch.device) -> None:
    own = Called(name, device)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            near(own.function.call(*own.x), own.out)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_checkpointed(name: str, device: torch.device) -> None:
    """The recomputation runs what the forward pass did, outside of the block that chose it."""
    own = Called(name, device)
    leaves = own.leaves()
    with triflash.backend("tiled"):
        out = torch.utils.checkpoint.checkpoint(own.function.call, *leaves, use_reentrant=False)
    for got, wanted in zip(torch.autograd.grad(out, leaves, own.dout), own.grads, strict=True):
        near(got, wanted)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_products_are_counted(name: str, device: torch.device) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    own, leaves = Called(name, device), Called(name, device).leaves()
    with FlopCounterMode(display=False) as forward:
        out = own.function.call(*leaves)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out, leaves, own.dout)
    assert forward.get_total_flops() > 0 and backward.get_total_flops() > 2 * forward.get_total_flops() * (not name.startswith("nn"))


OF_ANY = tuple(INTEGERS)
OFFSET_DTYPES, TABLE_DTYPES = (torch.int32, torch.int64), (torch.int32,)


def dense(device: torch.device) -> list[Tensor]:
    return Function(DENSE, attention).inputs(device)


def varlen(device: torch.device) -> list[Tensor]:
    return Function(((8, H, D),) * 3, attention).inputs(device)


def cache(device: torch.device, *sizes: int) -> list[Tensor]:
    sizes = sizes or (B, N)
    return Function(((B, 1, H, D), (*sizes, H, D), (*sizes, H, D)), attention).inputs(device)


def new_keys(device: torch.device, offsets: Tensor) -> Tensor:
    q, k, v = cache(device)
    found = attention_with_kvcache(q, k, v, k_new=q[:, 0], v_new=q[:, 0], cu_seqlens_new=offsets, cache_lengths=numbers(q, 4, 5))
    return torch.cat((found.flatten(), k.flatten()))


def kv_lengths(device: torch.device, lengths: Tensor) -> Tensor:
    q, _, _, bias = EVERY["triangle"].inputs(device)
    found: Tensor = triangle_attention(q, q, q, bias, kv_lengths=lengths.view(1, 3, 1, 1, 1))
    return found


# The argument: its numbers, the dtypes that it takes, and a call.
INTEGER_ARGUMENTS: dict[str, tuple[tuple[int, ...], Sequence[torch.dtype], Callable[..., Tensor]]] = {
    **{
        name: (values, OF_ANY, lambda device, x, name=name: attention(*dense(device), causal=True, **{name: x}))
        for name, values in (("key_lengths", (5, 3)), ("query_lengths", (5, 3)), ("query_starts", (0, 3)), ("key_starts", (1, 3)), ("diagonal", (1, 3)))
    },
    "cu_seqlens_q": (OFFSETS, OFFSET_DTYPES, lambda device, x: attention_varlen(*varlen(device), x, numbers(x, *OFFSETS))),
    "cu_seqlens_k": (OFFSETS, OFFSET_DTYPES, lambda device, x: attention_varlen(*varlen(device), numbers(x, *OFFSETS), x)),
    **{
        name: ((2, 0, 4), OF_ANY, lambda device, x, name=name: attention_varlen(*varlen(device), numbers(x, *OFFSETS), **{name: x}))
        for name in ("seqused_q", "seqused_k")
    },
    **{
        name: (values, OF_ANY, lambda device, x, name=name: attention_with_kvcache(*cache(device), **{name.split()[0]: x}))
        for name, values in (("cache_lengths", (2, 4)), ("key_starts of a cache", (2, 1)), ("cache_index", (1, 0)))
    },
    "page_table": (
        (2, 1, 0, 3), TABLE_DTYPES,
        lambda device, x: attention_with_kvcache(*cache(device, 4, 4), page_table=x.view(2, 2), cache_lengths=numbers(x, 7, 5)),
    ),
    "cu_seqlens_q of a cache": (
        (0, 1, 2), OFFSET_DTYPES,
        lambda device, x: attention_with_kvcache(cache(device)[0][:, 0], *cache(device)[1:], cu_seqlens_q=x, cache_lengths=numbers(x, 4, 5)),
    ),
    "cu_seqlens_new": ((0, 1, 2), OFFSET_DTYPES, new_keys),
    "flash_attn's cu_seqlens": (OFFSETS, OFFSET_DTYPES, lambda device, x: flash_attn.flash_attn_varlen_func(*varlen(device), x, x, 5, 5)),
    "flash_attn's cache_seqlens": ((2, 4), OF_ANY, lambda device, x: flash_attn.flash_attn_with_kvcache(*cache(device), cache_seqlens=x)),
    "flash_attn's cache_leftpad": ((1, 2), OF_ANY, lambda device, x: flash_attn.flash_attn_with_kvcache(*cache(device), cache_leftpad=x, cache_seqlens=5)),
    "torch's cu_seq_q": (OFFSETS, OFFSET_DTYPES, lambda device, x: torch_varlen.varlen_attn(*varlen(device), x, x, 5, 5)),
    "torch's seqused_k": ((2, 0, 4), OF_ANY, lambda device, x: torch_varlen.varlen_attn(*varlen(device), *[numbers(x, *OFFSETS)] * 2, 5, 5, seqused_k=x)),
    "kv_lengths": ((5, 3, 4), OF_ANY, kv_lengths),
}  # fmt: skip


@pytest.mark.parametrize("argument", INTEGER_ARGUMENTS)
def test_integers(argument: str, device: torch.device) -> None:
    values, taken, call = INTEGER_ARGUMENTS[argument]
    given = torch.tensor(values, device=device, dtype=torch.int32)
    wanted = call(device, given)
    for dtype in INTEGERS:
        if dtype in taken:
            assert torch.equal(call(device, given.to(dtype)), wanted), dtype
        else:
            with pytest.raises((TypeError, ValueError), match="wanted.*int32"):
                call(device, given.to(dtype))
    for dtype in (torch.float32, torch.bool):
        with pytest.raises((TypeError, ValueError), match="wanted"):
            call(device, given.to(dtype))


@pytest.mark.parametrize("seed", range(40 if torch.cuda.is_available() else 4))
@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("nn")])
def test_magnitudes(name: str, seed: int, device: torch.device) -> None:
    """Inputs from 10⁻⁶ to 10³⁰, products of up to 10³⁸: results are finite and those of the same call with float64 inputs, where scores are
    not so huge that float32 products tell them apart in another way."""
    own, draw = EVERY[name], random.Random(f"{name} {seed}")
    x = own.inputs(device, seed)
    scale = [10.0 ** draw.uniform(-6, 30) for _ in x]
    most = 1e37 if draw.random() < 0.3 else 1e3
    scale[1 % len(x)] = min(scale[1 % len(x)], most / scale[0] ** (2 if len(x) == 1 else 1))
    scale[0] = min(scale[0], most**0.5) if len(x) == 1 else scale[0]
    if len(x) > 3:  # a bias goes with what scores there are
        scale[3:] = [10.0 ** draw.uniform(-6, 3) for _ in x[3:]]
    leaves = [(y * s).requires_grad_(name not in CACHES) for y, s in zip(x, scale, strict=True)]
    out = own.call(*leaves)
    assert out.isfinite().all()
    if name in CACHES:
        return
    dout = torch.ones_like(out)
    grads = torch.autograd.grad(out, leaves, dout)
    with triflash.backend("tiled"):
        exact = [y.detach().double().requires_grad_() for y in leaves]
        wanted = own.call(*exact)
        wanted_grads = torch.autograd.grad(wanted, exact, dout.double())
    largest = [float(y.detach().abs().max()) for y in leaves]
    lost = 1e-5 * largest[: min(len(x), 3)][-1] * max(largest[:2])  # what the rounding of dout vᵀ comes to in dq and dk
    for got, right in zip(grads, wanted_grads, strict=True):
        assert (got.isfinite() | (right.abs() + lost > 1e35)).all()
    if most == 1e3:
        near(out, wanted, 2e-3)


@pytest.mark.parametrize("width", range(1, 18))
def test_caches_are_written_where_they_are(width: int, device: torch.device) -> None:
    """New keys, in place, in rows of any width that do not follow one another; and ``out=``. Nothing beside them changes."""
    for dtype in (torch.float32, torch.float16):
        memory = [torch.full((B, N + 2, H, width + 3), 7.0, device=device, dtype=dtype) for _ in range(3)]
        k_cache, v_cache, own = (x[:, 1 : N + 1, :, 1 : width + 1] for x in memory)
        own = own[:, :1]
        for x in (k_cache, v_cache):
            x.copy_(torch.randn(x.shape))
        q, new = (torch.randn(B, 1, H, width).to(device, dtype) for _ in range(2))
        wanted = [x.clone() for x in (k_cache, v_cache)]
        lengths = (2, N)  # there is no room for the second one's
        for x in wanted:
            x[0, 2] = new[0, 0]
        attention_with_kvcache(q, k_cache, v_cache, k_new=new, v_new=new, cache_lengths=numbers(q, *lengths), out=own)
        for x, right in zip((k_cache, v_cache), wanted, strict=True):
            assert torch.equal(x, right)
        near(own, attention_with_kvcache(q, *wanted, cache_lengths=numbers(q, 3, N)), 1e-3)
        for x in (k_cache, v_cache, own):
            x.fill_(7.0)
        assert all((x == 7.0).all() for x in memory)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "qkv" not in name and not name.startswith("nn")])
def test_gradients_into_given_tensors(name: str, device: torch.device) -> None:
    """What autograd adds to a ``.grad`` of any strides leaves its neighbours alone."""
    own = Called(name, device)
    leaves = own.leaves()
    memory = [torch.full((*x.shape[:-1], x.shape[-1] + 3), 7.0, device=device) for x in leaves]
    for x, around in zip(leaves, memory, strict=True):
        x.grad = around[..., 1 : x.shape[-1] + 1].zero_()
    own.function.call(*leaves).backward(own.dout)
    for x, around, wanted in zip(leaves, memory, own.grads, strict=True):
        assert x.grad is not None
        near(x.grad, wanted)
        around[..., 1 : x.shape[-1] + 1] = 7.0
        assert (around == 7.0).all()
