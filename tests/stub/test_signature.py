"""Whatever a pass depends on tells it from another, each member of the signature by itself; and what is no member changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from problems import Problem, step_of
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from ways import binding, check_both_ways, nothing_compiled

import triflash
from triflash import attention
from triflash.bound.call import BoundCall
from triflash.bound.passes import BoundPass
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


def shifted(x: Tensor, elements: int = 1) -> Tensor:
    """x so many elements behind an address that is a multiple of 64."""
    whole = torch.zeros(x.numel() + elements, dtype=x.dtype)
    return whole[elements:].view(x.shape).copy_(x)


def spread(x: Tensor) -> Tensor:
    """x with its outermost elements further apart."""
    return torch.zeros(2 * x.shape[0], *x.shape[1:], dtype=x.dtype)[::2].copy_(x)


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


@contextmanager
def precision() -> Iterator[None]:
    before, own = torch.get_float32_matmul_precision(), getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        if own is not None:  # "none" is not what "highest" is: nobody set it
            torch.backends.cuda.matmul.fp32_precision = own


@contextmanager
def determinism() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def environment(**values: str) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.dict(os.environ, values)


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


def _plain(**options: Any) -> Callable[[], Any]:
    """A call that has q, k, v and at most a bias, of which C tells whether it came before; ``change`` makes other tensors of these."""
    change, within = options.pop("change", lambda x: x), options.pop("within", nullcontext)
    names, dtype = options.pop("names", "q"), options.pop("dtype", BF16)
    given = {name: torch.zeros(B, n, H, D, dtype=dtype) for name, n in (("q", M), ("k", N), ("v", N))}
    given |= options.pop("more", {})
    given |= {name: change(given[name]) for name in given if name in names}
    options = {"backend": "triton", **options}

    def call() -> Any:
        with within():
            return attention(given["q"], given["k"], given["v"], bias=given.get("bias"), **options)

    return call


PLAIN: dict[str, Callable[[], Callable[[], Any]]] = {
    "base": _plain,
    **{f"{name} {change.__name__}": partial(_plain, names=name, change=change) for name in "qkv" for change in (spread, shifted)},
    "a parameter": partial(_plain, change=lambda x: torch.nn.Parameter(x, requires_grad=False)),
    "who wants a gradient": partial(_plain, change=lambda x: x.clone().requires_grad_()),
    "another's gradient": partial(_plain, names="v", change=lambda x: x.clone().requires_grad_()),
    "keys": partial(_plain, names="kv", change=lambda x: x[:, :50].contiguous()),
    "queries": partial(_plain, change=lambda x: x[:, :39].contiguous()),
    "dtype": partial(_plain, dtype=F16),
    "float32": partial(_plain, dtype=F32),
    "float32, precision": partial(_plain, dtype=F32, within=precision),
    "bias": partial(_plain, more={"bias": torch.zeros(H, M, N, dtype=BF16)}),
    "bias, float32": partial(_plain, more={"bias": torch.zeros(H, M, N)}),
    "bias, shape": partial(_plain, more={"bias": torch.zeros(1, M, N, dtype=BF16)}),
    "bias, strides": partial(_plain, more={"bias": torch.zeros(H, M, N, dtype=BF16)}, names="bias", change=spread),
    "bias, alignment": partial(_plain, more={"bias": torch.zeros(H, M, N, dtype=BF16)}, names="bias", change=shifted),
    "bias, learnt": partial(_plain, more={"bias": torch.zeros(H, M, N, dtype=BF16, requires_grad=True)}),
    "causal": partial(_plain, causal=True),
    "top left": partial(_plain, causal="top_left"),
    "scale": partial(_plain, scale=0.5),
    "scale, an int": partial(_plain, scale=1),
    "scale, one": partial(_plain, scale=1.0),
    "soft cap": partial(_plain, softcap=2.0),
    "window": partial(_plain, window=(3, 3)),
    "diagonal": partial(_plain, diagonal=1),
    "dropout": partial(_plain, dropout_p=0.5, dropout_seed=1),
    "deterministic": partial(_plain, deterministic=False),
    "determinism": partial(_plain, within=determinism),
    "backend": partial(_plain, backend="hopper"),
    "auto": partial(_plain, backend=None),
    "environment": partial(_plain, backend=None, within=environment(TRIFLASH_BACKEND="tiled")),
    "block": partial(_plain, backend=None, within=lambda: triflash.backend("triton")),
    "configs": partial(_plain, within=lambda: override_configs(forward=TileConfig(16, 16, 4, 1))),
    "autocast": partial(_plain, within=lambda: torch.autocast("cpu", dtype=F16)),
}


def test_a_call_that_is_told_by_few_questions_is_the_one_that_many_tell() -> None:
    """Whatever came before it, in any order: C's comparison takes no call for another."""
    ran: list[tuple[BoundCall, bool]] = []

    def recorded(name: str) -> Any:
        whole = getattr(BoundCall, name)

        def run(self: BoundCall, *args: Any) -> Any:
            ran.append((self, bool(name == "run_alone")))
            return whole(self, *args)

        return mock.patch.object(BoundCall, name, run)

    def which(call: Callable[[], Any]) -> list[tuple[BoundCall, bool]]:
        ran.clear()
        call()
        return [*ran]

    calls = {name: make() for name, make in PLAIN.items()}
    with nothing_compiled(), recorded("run_forward"), recorded("run_kept"), recorded("run_alone"):
        wanted = {}
        for name, call in calls.items():
            call()
            CALLS.near.clear()
            wanted[name] = which(call)
        assert len({id(each[0][0]) for each in wanted.values()}) >= len(calls) - 10  # gradients and blocks are not told apart
        for _ in range(3):
            for name, call in calls.items():
                assert which(call) == wanted[name], name
        for name, call in reversed(calls.items()):
            assert which(call) == wanted[name], name
        remembered = {id(each.entry) for entries in CALLS.near.values() for each in entries}
        assert {id(wanted[name][0][0]) for name in ("base", "causal", "bias", "scale", "backend")} <= remembered
        asked: list[Any] = []
        with mock.patch("triflash.door.describe", asked.append):
            calls["bias"]()
        assert not asked
    CALLS.clear()
    assert not CALLS.near


def _transformed(call: Callable[[], Any]) -> None:
    torch.func.vmap(lambda x: (call(), x)[1])(torch.zeros(2))


def _traced_by_fx(call: Callable[[], Any]) -> None:
    make_fx(lambda x: (call(), x + 1)[1])(torch.zeros(2))


def _traced(call: Callable[[], Any]) -> None:
    torch.jit.trace(lambda x: (call(), x + 1)[1], (torch.zeros(2),), check_trace=False)


def _within(context: Callable[[], Any]) -> Callable[[Callable[[], Any]], None]:
    def run(call: Callable[[], Any]) -> None:
        with context():
            call()

    return run


AROUND: dict[str, Callable[[Callable[[], Any]], None]] = {
    "nothing": _within(nullcontext),
    "a mode": _within(lambda: FlopCounterMode(display=False)),
    "fake tensors": _within(lambda: FakeTensorMode(allow_non_fake_inputs=True)),
    "make_fx": _traced_by_fx,
    "a transform": _transformed,
    "a trace": _traced,
    "autocast": _within(lambda: torch.autocast("cpu", dtype=F16)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("way", AROUND)
def test_what_is_around_a_known_call_is_seen(way: str) -> None:
    """As around a call that is not known: PyTorch's comparison of tensors tells of each, or the stack of modes."""
    around, seen = AROUND[way], []
    given = [torch.zeros(B, n, H, D, dtype=BF16, requires_grad=True) for n in (M, N, N)]
    plain, gradients = [x.detach() for x in given], [torch.zeros_like(x) for x in given]
    newest, caches = torch.zeros(1, 1, H, D, dtype=BF16), [x[:1] for x in plain[1:]]
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: attention(*plain, backend="triton"),
        "step": lambda: torch.autograd.grad(out, given, dout, retain_graph=True),
        "cache": lambda: triflash.attention_with_kvcache(newest, *caches, backend="triton"),
    }

    def notes(what: str) -> Any:
        return lambda *_: (seen.append(what), [*gradients, None, None, None])[1]

    with nothing_compiled():
        out = attention(*given, backend="triton")
        dout = torch.zeros_like(out)
        for _ in range(3):
            for call in calls.values():
                call()
        with (
            mock.patch("triflash.door._by_operators", notes("forward")), mock.patch("triflash.door._autocasted", notes("forward, cast")),
            mock.patch("triflash.ops._backward_by_operator", notes("step")),
            mock.patch("triflash.door_cache._by_operators", notes("cache")), mock.patch("triflash.door_cache._autocasted", notes("cache, cast")),
        ):  # fmt: skip
            for name, call in 2 * [*calls.items()]:
                if name != "step" or way not in ("a transform", "a trace"):  # a backward pass would be theirs
                    refused = name == "cache" and way == "a transform"
                    with pytest.raises(triflash.UnsupportedError) if refused else nullcontext():
                        around(call)
    wanted = {"nothing": [], "a transform": ["forward"], "autocast": ["forward, cast", "cache, cast"]}
    assert seen == 2 * wanted.get(way, [*calls] if way in ("a mode", "fake tensors", "make_fx") else ["forward", "cache"])


def stored(pack: Callable[[Tensor], Tensor]) -> AbstractContextManager[Any]:
    """What is saved for a backward pass comes back otherwise than it went."""
    return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)


BACKWARD: dict[str, dict[str, Any]] = {
    "base": {},
    "q": {"wants": "q"},
    "k, v": {"wants": "kv"},
    "strides": {"dout": spread},
    "alignment": {"dout": shifted},
    "expanded": {"dout": lambda x: x[:, :1].expand(x.shape)},
    "negated": {"dout": torch._neg_view},
    "dlse": {"lse": True},
    "configs": {"within": lambda: override_configs(delta=TileConfig(16, 16, 4, 1))},
    "saved, strides": {"saved": spread},
    "saved, alignment": {"saved": shifted},
    "gradients of gradients": {"twice": True},
}


def test_a_backward_pass_that_is_told_by_one_question_is_the_one_that_many_tell() -> None:
    """Whatever came before it, in any order: C's comparison takes no backward pass for another."""
    ran: list[BoundPass] = []
    described: list[Any] = []
    run, backward_of = BoundPass.run, BoundCall._backward_of

    def recorded(self: BoundPass, *args: Any) -> Any:
        ran.append(self)
        return run(self, *args)

    def counted(self: BoundCall, *args: Any) -> Any:
        described.append(args)
        return backward_of(self, *args)

    calls: list[BoundCall] = []

    def which(kind: dict[str, Any], forget: bool = False) -> tuple[BoundPass, bool]:
        """The backward pass of a step, and whether many questions were asked."""
        wants = kind.get("wants", "qkv")
        q, k, v = given = [
            torch.zeros(B, n, H, D, dtype=BF16, requires_grad=name in wants) for name, n in zip("qkv", (M, N, N), strict=True)
        ]
        with stored(kind["saved"]) if "saved" in kind else nullcontext():
            out, sums = attention(q, k, v, return_lse=True, backend="triton")
        calls.append(out.grad_fn.call)
        if forget:
            calls[-1]._backward.near.clear()
        ran.clear(), described.clear()
        of, by = ((out, sums), (torch.zeros_like(out), torch.zeros_like(sums))) if kind.get("lse") else ((out,), (torch.zeros_like(out),))
        with kind.get("within", nullcontext)():
            torch.autograd.grad(
                of,
                [x for x in given if x.requires_grad],
                [kind.get("dout", lambda x: x)(by[0]), *by[1:]],
                create_graph=kind.get("twice", False),
            )
        (one,) = ran or (None,)
        return one, bool(described)  # type: ignore[return-value]

    with nothing_compiled(), mock.patch.object(BoundPass, "run", recorded), mock.patch.object(BoundCall, "_backward_of", counted):
        wanted = {}
        for name, kind in BACKWARD.items():
            which(kind)
            wanted[name] = which(kind, forget=True)[0]
        for names in (list(BACKWARD), list(reversed(BACKWARD)), list(BACKWARD)):
            for name in names:
                assert which(BACKWARD[name])[0] is wanted[name], name
        assert len({*map(id, calls)}) == 1
        for name in ("base", "q", "k, v", "strides", "expanded", "saved, strides"):
            which(BACKWARD[name])
            assert not which(BACKWARD[name])[1], name
        for name in ("alignment", "dlse", "configs", "saved, alignment", "gradients of gradients"):
            assert which(BACKWARD[name])[1], name


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
