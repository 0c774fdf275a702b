"""A known call, or backward pass, is told by few questions: they take none for another, and see what is around it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from problems import shifted, spread
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from ways import determinism, environment, nothing_compiled, precision

import triflash
from triflash import attention, attention_varlen
from triflash.bound.call import BoundCall
from triflash.bound.passes import BoundPass
from triflash.bound.signature import CALLS
from triflash.plan.configs import TileConfig
from triflash.plan.override import override_configs

B, M, N, H, D = 2, 40, 56, 2, 16
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def empty() -> None:
    CALLS.clear()


def _plain(**options: Any) -> Callable[[], Any]:
    """A call that has q, k, v and at most a bias, of which C tells whether it came before; ``change`` makes other tensors of these,
    and ``twins`` are q itself.
    """
    change, within = options.pop("change", lambda x: x), options.pop("within", nullcontext)
    names, dtype, twins = options.pop("names", "q"), options.pop("dtype", BF16), options.pop("twins", "")
    keys = M if twins else N
    given = {name: torch.zeros(B, n, H, D, dtype=dtype) for name, n in (("q", M), ("k", keys), ("v", keys))}
    given |= dict.fromkeys(twins, given["q"])
    given |= options.pop("more", {})
    given |= {name: change(given[name]) for name in given if name in names}
    options = {"backend": "triton", **options}

    def call() -> Any:
        with within():
            return attention(given["q"], given["k"], given["v"], bias=given.get("bias"), **options)

    return call


def _options(call: Callable[..., Callable[[], Any]]) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Calls that differ in an option, or in what is around them."""
    return {
        "causal": partial(call, causal=True),
        "top left": partial(call, causal="top_left"),
        "scale": partial(call, scale=0.5),
        "scale, an int": partial(call, scale=1),
        "scale, one": partial(call, scale=1.0),
        "soft cap": partial(call, softcap=2.0),
        "window": partial(call, window=(3, 3)),
        "dropout": partial(call, dropout_p=0.5, dropout_seed=1),
        "deterministic": partial(call, deterministic=False),
        "determinism": partial(call, within=determinism),
        "backend": partial(call, backend="hopper"),
        "auto": partial(call, backend=None),
        "environment": partial(call, backend=None, within=environment(TRIFLASH_BACKEND="tiled")),
        "block": partial(call, backend=None, within=lambda: triflash.backend("triton")),
        "configs": partial(call, within=lambda: override_configs(forward=TileConfig(16, 16, 4, 1))),
        "autocast": partial(call, within=lambda: torch.autocast("cpu", dtype=F16)),
    }


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
    **_options(_plain),
    "diagonal": partial(_plain, diagonal=1),
    "one tensor": partial(_plain, twins="kv"),
    "two tensors": partial(_plain, twins="v"),
}


def _packed(**options: Any) -> Callable[[], Any]:
    """The same of packed sequences; ``offsets``: keys have their own, ``longest``: by position behind them."""
    change, within = options.pop("change", lambda x: x), options.pop("within", nullcontext)
    names, dtype, offsets = options.pop("names", "q"), options.pop("dtype", BF16), options.pop("offsets", None)
    given = {name: torch.zeros(B * M, H, D, dtype=dtype) for name in "qkv"} | options.pop("more", {})
    cu = torch.tensor([0, M - 1, 2 * M], dtype=options.pop("of", torch.int32))
    given |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu if offsets is None else cu.clone()}
    given |= {name: change(given[name]) for name in given if name in names}
    longest = options.pop("longest", (M + 1, M + 1))
    options = {"backend": "triton", **options}

    def call() -> Any:
        with within():
            return attention_varlen(*[given[name] for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")], *longest,
                                    **{name: given[name] for name in ("bias", "mask", "sink") if name in given}, **options)  # fmt: skip

    return call


_PADDED = torch.zeros(1, H, M + 1, M + 1, dtype=BF16)
PACKED: dict[str, Callable[[], Callable[[], Any]]] = {
    "base": _packed,
    **{f"{name} {change.__name__}": partial(_packed, names=[name], change=change)
       for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k") for change in (spread, shifted)},
    "two offsets": partial(_packed, offsets="two"),
    "offsets, 64 bits": partial(_packed, of=torch.int64),
    "three sequences": partial(_packed, names=["cu_seqlens_q", "cu_seqlens_k"], change=lambda _: torch.tensor([0, 7, 9, 80], dtype=torch.int32)),
    "longest": partial(_packed, longest=(M + 1, 2 * M)),
    "longest, one": partial(_packed, longest=(1, 1)),
    "longest, not told": partial(_packed, longest=()),
    "who wants a gradient": partial(_packed, change=lambda x: x.clone().requires_grad_()),
    "dtype": partial(_packed, dtype=F16),
    "float32": partial(_packed, dtype=F32),
    "float32, precision": partial(_packed, dtype=F32, within=precision),
    "bias": partial(_packed, more={"bias": _PADDED}),
    "bias, float32": partial(_packed, more={"bias": _PADDED.float()}),
    "bias, learnt": partial(_packed, more={"bias": _PADDED.clone().requires_grad_()}),
    "bias by rows": partial(_packed, more={"bias": torch.zeros(H, B * M, B * M, dtype=BF16)}, bias_layout="rows"),
    "bias by keys": partial(_packed, more={"bias": torch.zeros(H, B * M, dtype=BF16)}, bias_layout="keys"),
    "mask": partial(_packed, more={"mask": torch.ones(1, 1, M + 1, M + 1, dtype=torch.bool)}),
    "sink": partial(_packed, more={"sink": torch.zeros(H)}),
    "defaults, named": partial(_packed, window=None, softcap=None, dropout_p=0.0, deterministic=None, precision=None),
    **_options(_packed),
}  # fmt: skip


@pytest.mark.parametrize("kinds", [PLAIN, PACKED], ids=["plain", "packed"])
def test_a_call_that_is_told_by_few_questions_is_the_one_that_many_tell(kinds: dict[str, Callable[[], Callable[[], Any]]]) -> None:
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

    calls = {name: make() for name, make in kinds.items()}
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
        others = ("one tensor",) if kinds is PLAIN else ("two offsets", "longest", "bias by rows")
        sooner = ("base", "causal", "bias", "scale", "backend", *others)
        assert {id(wanted[name][0][0]) for name in sooner} <= remembered
        asked: list[Any] = []
        with mock.patch("triflash.door.describe", asked.append):
            calls["bias"]()
            calls.get("defaults, named", calls["base"])()
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
    packed, offsets = [x.flatten(0, 1) for x in plain], torch.tensor([0, 9, 80], dtype=torch.int32)
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: attention(*plain, backend="triton"),
        "step": lambda: torch.autograd.grad(out, given, dout, retain_graph=True),
        "cache": lambda: triflash.attention_with_kvcache(newest, *caches, backend="triton"),
        "packed": lambda: attention_varlen(*packed, offsets, backend="triton"),
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
            mock.patch("triflash.door._varlen_by_operators", notes("packed")), mock.patch("triflash.door._autocasted_varlen", notes("packed, cast")),
            mock.patch("triflash.door_cache._by_operators", notes("cache")), mock.patch("triflash.door_cache._autocasted", notes("cache, cast")),
        ):  # fmt: skip
            for name, call in 2 * [*calls.items()]:
                if name != "step" or way not in ("a transform", "a trace"):  # a backward pass would be theirs
                    refused = name == "cache" and way == "a transform"
                    with pytest.raises(triflash.UnsupportedError) if refused else nullcontext():
                        around(call)
    wanted = {"nothing": [], "a transform": ["forward", "packed"], "autocast": ["forward, cast", "cache, cast", "packed, cast"]}
    everything = [*calls] if way in ("a mode", "fake tensors", "make_fx") else ["forward", "cache", "packed"]
    assert seen == 2 * wanted.get(way, everything)


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


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_a_backward_pass_that_is_told_by_one_question_is_the_one_that_many_tell(packed: bool) -> None:
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
    offsets = torch.tensor([0, 9, B * M], dtype=torch.int32)
    attend: Any = partial(attention_varlen, cu_seqlens_q=offsets) if packed else attention

    def shape(length: int) -> tuple[int, ...]:
        return (B * length,) if packed else (B, length)

    def which(kind: dict[str, Any], forget: bool = False) -> tuple[BoundPass, bool]:
        """The backward pass of a step, and whether many questions were asked."""
        wants = kind.get("wants", "qkv")
        q, k, v = given = [
            torch.zeros(*shape(n), H, D, dtype=BF16, requires_grad=name in wants) for name, n in zip("qkv", (M, N, N), strict=True)
        ]
        with stored(kind["saved"]) if "saved" in kind else nullcontext():
            out, sums = attend(q, k, v, return_lse=True, backend="triton")
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


def test_a_known_call_of_packed_sequences_reads_offsets_where_it_is_asked_to() -> None:
    """``TRIFLASH_CHECK=1`` in the environment, whatever came before."""
    rows, offsets = torch.zeros(8, H, D, dtype=BF16), torch.tensor([0, 3, 8], dtype=torch.int32)
    with nothing_compiled():
        for _ in range(3):
            attention_varlen(rows, rows, rows, offsets, backend="triton")
        offsets[2] = 9
        attention_varlen(rows, rows, rows, offsets, backend="triton")
        with environment(TRIFLASH_CHECK="1")(), pytest.raises(ValueError, match="offsets up to the 8 rows"):
            attention_varlen(rows, rows, rows, offsets, backend="triton")


@pytest.mark.parametrize("name", ["attention", "attention_varlen"])
def test_a_profiler_sees_the_name_of_a_known_call(name: str) -> None:
    q, offsets = torch.zeros(8, 1, D, dtype=BF16, requires_grad=True), torch.tensor([0, 3, 8], dtype=torch.int32)
    calls: dict[str, Callable[[], Any]] = {
        "attention": lambda: attention(q[None], q[None], q[None], backend="triton"),
        "attention_varlen": lambda: attention_varlen(q, q, q, offsets, backend="triton"),
    }
    with nothing_compiled():
        for _ in range(3):
            calls[name]()
        with torch.profiler.profile() as seen:
            (grad,) = torch.autograd.grad(calls[name]().sum(), q)
    assert grad.shape == q.shape and f"triflash::{name}" in {each.name for each in seen.events()}
