"""Whatever a pass depends on tells it from another, each member of the signature by itself; and what is no member changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from problems import Problem, shifted, spread, step_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from ways import binding, check_both_ways, determinism, environment, nothing_compiled, precision

import triflash
from triflash import attention
from triflash.bound.call import BoundCall
from triflash.bound.signature import CALLS
from triflash.plan import overlay
from triflash.plan.configs import TileConfig
from triflash.plan.kernels.forward import ForwardConfig
from triflash.plan.override import override_configs

B, M, N, H, D = 2, 40, 56, 2, 16
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def tensors(dtype: torch.dtype = BF16) -> dict[str, Tensor]:
    return {
        **{name: torch.zeros(B, length, H, D, dtype=dtype) for name, length in (("q", M), ("k", N), ("v", N))},
        "bias": torch.zeros(H, M, N, dtype=dtype),
        "mask": torch.ones(B, 1, M, N, dtype=torch.bool),
        "key_lengths": torch.full((B,), N, dtype=torch.int32),
        "alibi_slopes": torch.zeros(B, H),
        "sink": torch.zeros(H),
        "dropout_seed": torch.zeros(2, dtype=torch.int64),
    }


OPTIONS: dict[str, Any] = dict(
    causal=False, window=(5, 6), scale=0.5, softcap=2.0, dropout_p=0.5, deterministic=True, layout="bshd", precision=None, backend="triton"
)


@pytest.fixture(autouse=True)
def empty() -> None:
    CALLS.clear()


def call(given: dict[str, Tensor], options: dict[str, Any]) -> Any:
    q, k, v, *_ = given.values()
    return attention(q, k, v, **{name: x for name, x in given.items() if name not in "qkv"}, **options)


def check_change(
    one: tuple[dict[str, Tensor], dict[str, Any]], other: tuple[dict[str, Tensor], dict[str, Any]], new: bool = True, within: Any = None
) -> None:
    """Of two calls in turn, twice over, each is bound once; ``new`` false: one for both. within: a context for the other one."""
    CALLS.clear()
    with nothing_compiled(), binding() as made:
        for _ in range(2):
            call(*one)
            if within is None:
                call(*other)
            else:
                with within():
                    call(*other)
        assert len(made) == (2 if new else 1)


@pytest.mark.parametrize("change", [spread, shifted, None], ids=["strides", "alignment", "absent"])
@pytest.mark.parametrize("name", list(tensors()))
def test_tensors(name: str, change: Callable[[Tensor], Tensor] | None) -> None:
    given = tensors()
    changed = dict(given)
    if change is not None:
        changed[name] = change(given[name])
        assert name != "dropout_seed" or change is shifted or not changed[name].is_contiguous()
    elif name in "qkv":
        pytest.skip("is always there")
    else:
        del changed[name]
    check_change((given, OPTIONS), (changed, OPTIONS))


@pytest.mark.parametrize("name", list(tensors()))
def test_a_shift_of_16_bytes_changes_nothing(name: str) -> None:
    given = tensors()
    changed = {**given, name: shifted(given[name], 16 // given[name].element_size())}
    check_change((given, OPTIONS), (changed, OPTIONS), new=False)


@pytest.mark.parametrize("name, dtype", [
    ("bias", F32), ("key_lengths", torch.int64), ("key_lengths", torch.uint8), ("alibi_slopes", F16), ("sink", BF16),
])  # fmt: skip
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    given = tensors()
    check_change((given, OPTIONS), ({**given, name: given[name].to(dtype)}, OPTIONS))


def test_the_dtype_of_all() -> None:
    check_change((tensors(), OPTIONS), (tensors(F16), OPTIONS))


@pytest.mark.parametrize("name, shape", [
    ("bias", (1, M, N)), ("bias", (B, H, M, N)), ("bias", (1, H, M, N)), ("mask", (M, N)), ("alibi_slopes", (H,)),
])  # fmt: skip
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    given = tensors()
    check_change((given, OPTIONS), ({**given, name: torch.zeros(shape, dtype=given[name].dtype)}, OPTIONS))


def test_lengths() -> None:
    given = tensors()
    less = {**given, "q": given["q"][:, :39], "bias": given["bias"][:, :39], "mask": given["mask"][:, :, :39]}
    check_change((given, OPTIONS), (less, OPTIONS))


@pytest.mark.parametrize("name, value", [
    ("causal", True), ("causal", "top_left"), ("window", (5, 7)), ("window", None), ("scale", 0.25), ("scale", None), ("softcap", 3.0),
    ("softcap", None), ("dropout_p", 0.25), ("dropout_p", 0.0), ("deterministic", False), ("precision", "tf32"), ("backend", "tiled"),
    ("backend", "hopper"), ("backend", None), ("diagonal", 3), ("diagonal", torch.zeros(B, dtype=torch.int32)),
    ("query_starts", torch.zeros(B, dtype=torch.int32)), ("query_lengths", torch.zeros(B, dtype=torch.int32)),
    ("key_starts", torch.zeros(B, dtype=torch.int32)),
])  # fmt: skip
def test_options(name: str, value: Any) -> None:
    given = tensors()
    check_change((given, OPTIONS), (given, {**OPTIONS, name: value}))


def test_the_layout() -> None:
    """The same strides mean something else in another layout."""
    q = torch.zeros(B, 4, 4, D)
    with nothing_compiled(), binding() as made:
        for layout in ("bshd", "bhsd", "bshd"):
            attention(q, q, q, layout=layout, backend="triton", causal=True, window=(1, 0))
    assert len(made) == 2


@pytest.mark.parametrize("name, good, bad", [
    ("causal", True, 1), ("causal", False, 0), ("deterministic", True, 1), ("softcap", 1.0, True), ("scale", 1.0, True),
    ("dropout_p", 0.0, False), ("window", (1, 2), (True, 2)), ("window", (1, 2), (1.0, 2.0)), ("dropout_seed", 1, True),
    ("diagonal", 1, True), ("diagonal", 1, 1.0),
])  # fmt: skip
def test_a_value_of_another_type_is_another_value(name: str, good: Any, bad: Any) -> None:
    """They are equal and have one hash, and only one of them is allowed."""
    assert good == bad and hash(good) == hash(bad)
    q = torch.zeros(B, M, H, D, dtype=BF16)
    with nothing_compiled():
        for _ in range(3):
            attention(q, q, q, **{name: good}, backend="triton")
            with pytest.raises(TypeError, match=f"^{name}: "):
                attention(q, q, q, **{name: bad}, backend="triton")


def test_allowed_values_of_another_type() -> None:
    given = tensors()
    check_change((given, {**OPTIONS, "scale": 1.0}), (given, {**OPTIONS, "scale": 1}))
    check_change((given, OPTIONS), (given, {**OPTIONS, "window": [5, 6]}), new=False)  # a list, which has no hash


@pytest.mark.parametrize("within, dtype, named", [
    (precision, F32, "triton"), (determinism, BF16, "triton"), (environment(TRIFLASH_BACKEND="tiled"), BF16, None),
    (lambda: triflash.backend("tiled"), BF16, None), (lambda: override_configs(forward=TileConfig(16, 16, 4, 1)), BF16, "triton"),
    (lambda: override_configs(dq=TileConfig(16, 16, 4, 1)), BF16, "triton"),
    (lambda: override_configs(forward=ForwardConfig(1, 64, 2)), BF16, "hopper"), (lambda: torch.autocast("cpu", dtype=F16), BF16, "triton"),
], ids=["precision", "determinism", "environment", "block", "configs", "backward-configs", "hopper-configs", "autocast"])  # fmt: skip
def test_settings(within: Any, dtype: torch.dtype, named: str | None) -> None:
    given, options = tensors(dtype), {**OPTIONS, "deterministic": None, "backend": named}
    check_change((given, options), (given, options), within=within)


def test_settings_that_do_not_matter() -> None:
    """An option beats the setting that is its default; products of 16 bits have one precision; autocast of another device."""
    given = tensors()
    for within in (precision, environment(TRIFLASH_BACKEND="tiled"), lambda: triflash.backend("tiled")):
        check_change((given, OPTIONS), (given, OPTIONS), new=False, within=within)
    given = tensors(F32)
    options = {**OPTIONS, "precision": "ieee"}
    check_change((given, options), (given, options), new=False, within=precision)


def test_a_tuned_file(tmp_path: Path) -> None:
    overlay.write(tmp_path / "tuned.json", [])
    given = tensors()
    check_change((given, OPTIONS), (given, OPTIONS), within=lambda: triflash.tuned(tmp_path / "tuned.json"))
    overlay.of_environment.cache_clear()
    try:
        with mock.patch.dict(os.environ, TRIFLASH_TUNED=str(tmp_path / "tuned.json")):
            check_change((given, OPTIONS), (given, OPTIONS), within=lambda: triflash.tuned(None))
    finally:
        overlay.of_environment.cache_clear()


def test_what_is_no_member() -> None:
    """Values, addresses, who wants gradients or the lse, seeds: one bound call for all."""
    with nothing_compiled(), binding() as made:
        for number in range(4):
            given = {name: x + number if x.is_floating_point() else x for name, x in tensors().items()}
            given["q"].requires_grad_(number == 1)
            given["bias"].requires_grad_(number > 1)
            given["dropout_seed"] = torch.tensor([number, 2])
            with torch.set_grad_enabled(number != 3):
                call(given, {**OPTIONS, "return_lse": number == 2})
        for seed in (1, 2**62):
            call({**tensors(), "dropout_seed": seed}, OPTIONS)  # type: ignore[dict-item]
    assert len(made) == 2  # a tensor of seeds, and an int


def test_choices_of_a_backward_pass_are_those_when_it_starts() -> None:
    """Not those of its forward pass, nor of an earlier backward pass of the same call."""
    q, k, v = (
        torch.zeros(B, n, H, 64, dtype=BF16, requires_grad=True) for n in (M, 400, 400)
    )  # beyond rows that have kernels of their own
    small = TileConfig(16, 32, 4, 1)

    def tiles(**chosen: TileConfig) -> bool:
        out = attention(q, k, v, backend="triton")
        with override_configs(**chosen), triflash.record_launches() as ran:
            out.sum().backward()
        return f"triton: dq {small}" in ran

    with nothing_compiled():
        assert [tiles(), tiles(dq=small), tiles(), tiles(dq=small)] == [False, True, False, True]


def test_backward_passes_by_what_is_wanted_and_how_it_lies() -> None:
    """Of one bound call: by the gradients needed, the strides and alignment of dout, and whether there is a dlse."""
    bind_backward = BoundCall.bind_backward
    bound: list[Any] = []

    def counted(self: BoundCall, *arguments: Any) -> Any:
        bound.append(arguments)
        return bind_backward(self, *arguments)

    def step(wants: str = "qkv", dout: Any = None, lse: bool = False) -> None:
        q, k, v = (torch.zeros(B, n, H, D, dtype=BF16, requires_grad=name in wants) for name, n in (("q", M), ("k", N), ("v", N)))
        out, sums = attention(q, k, v, return_lse=True, backend="triton")
        dout = torch.zeros_like(out) if dout is None else dout(torch.zeros_like(out))
        torch.autograd.backward((out, sums) if lse else (out,), (dout, torch.zeros_like(sums)) if lse else (dout,))

    kinds: list[Callable[[], None]] = [
        step, lambda: step("q"), lambda: step("kv"), lambda: step(dout=spread), lambda: step(dout=shifted), lambda: step(lse=True),
        lambda: step(dout=lambda x: x[:, :1].expand(x.shape)),
    ]  # fmt: skip
    with nothing_compiled(), mock.patch.object(BoundCall, "bind_backward", counted), binding() as made:
        for count, kind in enumerate(kinds, 1):
            for _ in range(2):
                kind()
            assert len(bound) == count
        for kind in kinds:
            kind()
    assert len(bound) == len(kinds) and len(made) == 1


@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_backward_passes_with_and_without_lse_do_not_meet(backend: str) -> None:
    """Of one signature: what is saved differs, in whatever order they come."""
    given = [torch.zeros(2, 72, 1, 32, dtype=BF16, requires_grad=True) for _ in range(3)]
    with nothing_compiled():
        for number in range(6):
            out, *_ = found = attention(*given, return_lse=True, backend=backend)
            assert len(found) == 2
            alone = attention(*given, backend=backend)
            for each in (out, alone) if number % 2 else (alone, out):
                grads = torch.autograd.grad(each, given, torch.zeros_like(each))
                assert [grad.shape for grad in grads] == [x.shape for x in given]
        assert out.grad_fn.call is alone.grad_fn.call


class Unreadable(dict):  # type: ignore[type-arg]
    """An environment that nobody may read."""

    def _no(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("reads the environment")

    __getitem__ = __contains__ = get = items = keys = copy = __iter__ = _no


class MetaOnly(TorchDispatchMode):
    """No operator may see a tensor that has memory."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for x in (*args, *(made if isinstance(made, (tuple, list)) else (made,))):
            assert not isinstance(x, Tensor) or x.device.type == "meta", f"{function} of a tensor with memory"
        return made


@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_binding_reads_nothing_around_it(backend: str) -> None:
    """Neither the environment, nor settings of PyTorch, nor a caller's tensor: all of that is in the signature."""

    def raising(*_: Any) -> Any:
        raise AssertionError("reads a setting")

    @contextmanager
    def closed() -> Iterator[None]:
        with (
            MetaOnly(),
            mock.patch.object(os, "environ", Unreadable()),
            mock.patch.object(torch, "get_float32_matmul_precision", raising),
            mock.patch.object(torch, "are_deterministic_algorithms_enabled", raising),
            mock.patch.object(torch, "is_autocast_enabled", raising),
        ):
            yield

    init, bind_backward = BoundCall.__init__, BoundCall.bind_backward
    closures = []

    def bind(self: BoundCall, *arguments: Any) -> None:
        assert all(x is None or x.device.type == "meta" for x in arguments[1])
        closures.append("forward")
        with closed():
            init(self, *arguments)

    def bind_back(self: BoundCall, *arguments: Any) -> Any:
        closures.append("backward")
        with closed():
            return bind_backward(self, *arguments)

    attention(*(torch.zeros(1, 1, 1, 1) for _ in range(3)))  # what is read once in a process has been
    with MetaOnly():
        torch.empty(0, device="meta")
    given = tensors()
    if backend == "hopper":
        del given["sink"]
    given["q"].requires_grad_()
    with nothing_compiled(), mock.patch.object(BoundCall, "__init__", bind), mock.patch.object(BoundCall, "bind_backward", bind_back):
        call(given, {**OPTIONS, "backend": backend}).sum().backward()
    assert closures == ["forward", "backward"]


@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_one_after_the_other(backend: str) -> None:
    """Two calls that differ in strides or alignment alone: both hand over what they should, in turns."""
    plain = Problem("plain", M=72, N=72, D=32, wants="", backend=backend)
    steps = [step_of(plain), step_of(plain, 1), step_of(plain, 2)]
    steps[1].given["k"] = shifted(steps[1].given["k"])
    steps[2].given["v"] = spread(steps[2].given["v"])
    for step in steps:

        def forward(given: dict[str, Tensor] = step.given) -> Any:
            return attention(*given.values(), backend=backend)

        step.forward = forward
    for step in (*steps, *steps):
        check_both_ways(step, backend)
