"""A test case is data. ``Case`` says what to compute; ``run_case`` computes it on a backend, judges every result by the tolerance rule, and
asserts that exactly the kernels ran that were asked for.

A backend is one of the package's own or ``stand-in``: ``hopper`` on the CPU's stand-in for such a GPU (``gluon_twin.py``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import triflash
from judging import HOPPER, five_dims, judge
from triflash import tiled
from triflash.bound import signature
from triflash.cli.bench.tolerance import (
    assert_close,
)
from triflash.plan.configs import MAX_HEAD_DIM, TileConfig
from triflash.plan.device import KNOWN_DEVICES, facts_of
from triflash.plan.hopper import adds_dq
from triflash.plan.kernels.dkdv import DkdvConfig
from triflash.plan.kernels.forward import ForwardConfig
from triflash.plan.override import Config, override_configs
from triflash.plan.select import plan_backward, plan_forward
from triflash.spec import AttentionSpec, Needs, Operands, spec_of

HAVE_TRITON = importlib.util.find_spec("triton") is not None
triton_only = pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
ON_HOPPER = torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability() == (9, 0)
hopper_only = pytest.mark.skipif(not ON_HOPPER, reason="needs an sm90 GPU")  # together with the marker gpu
stand_in_only = pytest.mark.skipif(
    not HAVE_TRITON or torch.cuda.is_available(), reason="a stand-in for the GPU that there is, or without Triton's interpreter"
)
BACKENDS = ["tiled", pytest.param("triton", marks=triton_only)]
EVERY_BACKEND = [*BACKENDS, pytest.param("hopper", marks=triton_only)]
NEAREST = pytest.param("hopper" if torch.cuda.is_available() else "stand-in", marks=triton_only)  # what there is to run Hopper's kernels
Configs = Mapping[str, Config]  # of kernels, by their names
FEW_PROCESSORS = 3  # what a persistent grid is made to believe in, so that a program gets several tiles of a small problem
KERNELS = ("forward", "delta", "dkdv", "dq", "dbias")


@dataclass(frozen=True)
class Case:
    """One attention problem, its inputs' memory layouts, and what is asked of it.

    bias: a letter where it varies and 1 where it broadcasts, aligned to the right of ``bhqk``, as in ``1h1k`` or ``qk``; five letters
        (``b1hqk``, ``1ihqk``) are over (outer batch, inner batch, head, query, key). None is no bias.
    second: the same for another bias beside it, of dtype second_dtype. mask: the same for a boolean mask beside them. Hk: key heads, if not H. lengths: keys shown to the batch entries, repeated as needed.
    starts, ends, key_starts: queries and keys that there are, likewise; diagonal: of the batch entries, from which lo and hi count.
    shift: the diagonal of ALiBi.
    alibi: ``h`` or ``bh``, what the slopes vary over. sink: whether there is one. softcap, dropout: 0 for none.
    grads: any of the letters q, k, v, b, s (sink), t (second bias). dlse: the log-sum-exp gets a cotangent as well.
    tiles: queries and keys of a tile; None takes the default of the plan (and, on the tiled backend, its own choice).
    """

    name: str
    B: int = 1
    M: int = 33
    N: int = 40
    H: int = 2
    D: int = 16
    Dv: int | None = None
    dtype: torch.dtype = torch.float16
    bias: str | None = None
    bias_dtype: torch.dtype | None = None
    bias_layout: str = "plain"
    bias_values: str = "normal"
    second: str | None = None
    second_dtype: torch.dtype | None = None
    Hk: int | None = None
    mask: str | None = None
    mask_layout: str = "plain"
    lengths: tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None
    ends: tuple[int, ...] | None = None
    key_starts: tuple[int, ...] | None = None
    diagonal: tuple[int, ...] | None = None
    shift: int | None = None
    integers: torch.dtype = torch.int32
    alibi: str | None = None
    sink: bool = False
    softcap: float = 0.0
    dropout: float = 0.0
    causal: bool = False
    lo: int | None = None
    hi: int | None = None
    scale: float | None = None
    batch_inner: int = 1
    grads: str = "qkvbst"
    dlse: bool = False
    layout: str = "plain"
    dout_layout: str = "plain"
    magnitude: float = 1.0
    tiles: tuple[int, int] | None = (32, 32)
    seed: int = 0

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    @property
    def is_raw(self) -> bool:
        """Beyond what the seed's functions express: goes through ``torch.ops.triflash`` directly."""
        special = self.lo is not None or self.hi is not None or self.batch_inner > 1 or self.dlse
        return special or self.has_features or self.Dv not in (None, self.D) or len(self.bias or "") == 5

    @property
    def has_features(self) -> bool:
        """Beyond a band and one bias or mask."""
        tensors = (self.second, self.mask, self.lengths, self.alibi, self.starts, self.ends, self.key_starts, self.diagonal)
        return self.key_heads != self.H or any(x is not None for x in tensors) or self.sink or self.softcap > 0 or self.dropout > 0

    @property
    def key_heads(self) -> int:
        return self.H if self.Hk is None else self.Hk

    @property
    def band(self) -> tuple[int | None, int | None]:
        return (self.lo, 0 if self.causal else self.hi)

    @property
    def softmax_scale(self) -> float:
        return self.D**-0.5 if self.scale is None else self.scale


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    dout: Tensor
    dlse: Tensor | None
    mask: Tensor | None = None
    key_lengths: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sink: Tensor | None = None
    dropout_seed: Tensor | None = None
    second_bias: Tensor | None = None
    query_starts: Tensor | None = None
    query_lengths: Tensor | None = None
    key_starts: Tensor | None = None
    diagonal: Tensor | None = None

    @property
    def places(self) -> tuple[Tensor | None, ...]:
        return self.query_starts, self.query_lengths, self.key_starts, self.diagonal

    def wanted(self) -> dict[str, Tensor]:
        named = (("q", self.q), ("k", self.k), ("v", self.v), ("b", self.bias), ("s", self.sink), ("t", self.second_bias))
        return {n: x for n, x in named if x is not None and x.requires_grad}

    def operands(self) -> Operands:
        """As the operators take them; a mask without a bias is one."""
        bias, second, mask = five_dims(self.bias), five_dims(self.second_bias), five_dims(self.mask)
        bias, mask = (mask, None) if bias is None else (bias, mask)
        some = (self.q, self.k, self.v, bias, mask, self.key_lengths, self.alibi_slopes, self.sink, self.dropout_seed)
        return Operands(*some, *(None,) * 4, second, *self.places)

    def replaced(self, leaves: dict[str, Tensor]) -> Operands:
        """The operands with others for some of q, k, v, b, s, t."""
        names = {"q": "q", "k": "k", "v": "v", "b": "bias", "s": "sink", "t": "second_bias"}
        return self.operands()._replace(**{names[n]: five_dims(x) if n in "bt" else x for n, x in leaves.items()})


def with_layout(shape: tuple[int, ...], layout: str, make: Any) -> Tensor:
    """A tensor of ``shape`` in a memory layout: ``make(shape)`` gives the values."""
    rank = len(shape)
    if layout == "plain":
        return make(shape)
    if layout == "transposed":  # the last two dims (bias), or sequence and heads (q, k, v), swapped in memory
        a, b = (rank - 2, rank - 1) if rank != 4 else (1, 2)
        swapped = list(shape)
        swapped[a], swapped[b] = swapped[b], swapped[a]
        return make(tuple(swapped)).transpose(a, b)
    if layout == "keys_first":
        return make((*shape[:-2], shape[-1], shape[-2])).transpose(-1, -2)
    if layout == "sliced":  # a window of something larger, at an odd offset, rows not a multiple of 16 bytes apart
        return make(tuple(size + 3 for size in shape))[tuple(slice(1, 1 + size) for size in shape)]
    if layout == "step":  # every other element of the last dim
        return make((*shape[:-1], 2 * shape[-1]))[..., ::2]
    if layout == "expanded":  # one batch entry and head, repeated without memory
        return make((1, *shape[1:])).expand(shape) if rank != 4 else make((1, shape[1], 1, shape[3])).expand(shape)
    if layout == "packed":  # one of three in the middle of a packed tensor
        return make((*shape[:2], 3, *shape[2:]))[:, :, 1]
    if layout == "padded":  # rows of multiples of 16 elements, with NaN or True between them
        x = make(shape)
        whole = x.new_full((*shape[:-1], -(-shape[-1] // 16) * 16), True if x.dtype == torch.bool else torch.nan)
        whole[..., : shape[-1]] = x
        return whole[..., : shape[-1]]
    raise ValueError(layout)


def bias_shape(case: Case, pattern: str | None = None) -> tuple[int, ...]:
    pattern = pattern or case.bias
    assert pattern is not None
    full = {"b": case.B // case.batch_inner, "i": case.batch_inner, "h": case.H, "q": case.M, "k": case.N}
    return tuple(1 if letter == "1" else full[letter] for letter in pattern)


def build(case: Case, device: torch.device) -> Inputs:
    """The inputs of a case: seeded, laid out, marked for gradients."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = case.dtype

    def normal(shape: tuple[int, ...], dtype: torch.dtype = dtype, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float32) * size).to(dtype).to(device)

    Dv = case.D if case.Dv is None else case.Dv
    layouts = ("transposed", "sliced", "packed") if case.layout == "mixed" else (case.layout,) * 3  # mixed: no two tensors share a stride
    q = with_layout((case.B, case.M, case.H, case.D), layouts[0], lambda shape: normal(shape, size=case.magnitude))
    k = with_layout((case.B, case.N, case.key_heads, case.D), layouts[1], lambda shape: normal(shape, size=case.magnitude))
    v = with_layout((case.B, case.N, case.key_heads, Dv), layouts[2], normal)
    dout = with_layout((case.B, case.M, case.H, Dv), case.dout_layout, normal)
    dlse = normal((case.B, case.H, case.M), torch.float64 if dtype == torch.float64 else torch.float32) if case.dlse else None
    bias = None
    if case.bias is not None:
        bias_dtype = case.bias_dtype or dtype

        def values(shape: tuple[int, ...]) -> Tensor:
            if bias_dtype == torch.bool:
                bias = torch.rand(shape, generator=generator) < {"normal": 0.6, "rows": 0.6, "all": -1.0}[case.bias_values]
                hidden: Any = False
            else:
                bias = torch.randn(shape, generator=generator) * (1e4 if case.bias_values == "huge" else 1.0)
                hidden = -torch.inf
                if case.bias_values == "rising":  # towards the first key, not at all, slowly or fast: maxima that keep growing
                    row = torch.arange(shape[-2])[:, None]
                    rates = torch.tensor([0.0, 0.05, 0.4, 3.0])[row % 4] * ((row // 8 + row // 32) % 2) if len(row) > 1 else 0.4
                    bias = bias + rates * torch.arange(shape[-1]).flip(0)
                if case.bias_values == "inf":
                    bias[torch.rand(shape, generator=generator) < 0.4] = hidden
                if case.bias_values == "least":  # what many models write for "hidden": a third of the entries, and a whole row
                    bias = bias.masked_fill(torch.rand(shape, generator=generator) < 0.3, torch.finfo(torch.float32).min)
                    bias[..., 0, :] = torch.finfo(torch.float32).min
                if case.bias_values == "all":
                    bias.fill_(hidden)
            if case.bias_values == "rows":  # the first query, the last, and one in three see nothing
                bias[..., ::3, :] = hidden
                bias[..., -1, :] = hidden
            return bias.to(bias_dtype).to(device)

        if case.bias_layout == "expanded":
            full = Case("", B=case.B, M=case.M, N=case.N, H=case.H, bias="bhqk"[-len(case.bias) :])
            bias = values(bias_shape(case)).expand(bias_shape(full))
        elif case.bias_layout == "transposed":
            bias = with_layout(bias_shape(case), "keys_first", values)
        else:
            bias = with_layout(bias_shape(case), case.bias_layout, values)
    second = None
    if case.second is not None:
        second = with_layout(bias_shape(case, case.second), case.bias_layout, lambda shape: normal(shape, case.second_dtype or dtype))
    mask = None
    if case.mask is not None:  # whole blocks of it show nothing
        mask = with_layout(bias_shape(case, case.mask), case.mask_layout, lambda shape: torch.rand(shape, generator=generator) < 0.7)
        mask = mask.clone() if case.mask_layout == "plain" else mask
        if mask.shape[-1] > 32 and mask.shape[-2] != 1:
            mask[..., :16, 16:32] = False
        mask = mask.to(device)
    slopes = seed = None

    def integers(values: tuple[int, ...] | None) -> Tensor | None:
        if values is None:
            return None
        return torch.tensor(list(itertools.islice(itertools.cycle(values), case.B)), dtype=case.integers, device=device)

    lengths, *places = map(integers, (case.lengths, case.starts, case.ends, case.key_starts, case.diagonal))
    if case.alibi is not None:
        slopes = torch.rand((case.B if case.alibi == "bh" else 1, case.H), generator=generator).to(device)
        if max(case.M, case.N) >= 100:  # far from the diagonal, all would be lost beside a sink
            slopes.mul_(0.02)
    sink = normal((case.H,)) if case.sink else None
    if case.dropout:
        seed = torch.tensor([case.seed, 1], device=device)
    leaves = [None if x is None else x.detach() for x in (q, k, v, bias, sink, second)]
    for letter, leaf in zip("qkvbst", leaves, strict=True):
        if leaf is not None and letter in case.grads and leaf.is_floating_point():
            leaf.requires_grad_()
    *leaves, sink, second = leaves
    return Inputs(*leaves, dout, dlse, mask, lengths, slopes, sink, seed, second, *places)  # type: ignore[arg-type]


def hidden_of(
    inputs: Inputs, tensors: Iterable[Tensor | None], extras: Iterable[Tensor | None], rows: Iterable[Tensor | None] = ()
) -> Iterator[Tensor]:
    """Views of what lengths and starts hide: of tensors like k or v, of extras like a bias of which every batch entry has keys or queries of
    its own, and of rows, tensors like q.
    """
    (B, M), N = inputs.q.shape[:2], inputs.k.shape[1]
    parts = [[x.detach() for x in each if x is not None] for each in (rows, tensors)]
    fives = [x.detach() for x in map(five_dims, extras) if x is not None and (x.dim() == 5 or B == 1 or x.shape[0] == B)]
    for at, (length, dim) in enumerate(((M, -2), (N, -1))):
        parts[at] += [x.view(B, *x.shape[2:]).movedim(dim, 1) for x in fives if x.shape[0] * x.shape[1] == B and x.shape[dim] == length > 1]
    for own, length, first, end in (
        (parts[0], M, inputs.query_starts, inputs.query_lengths), (parts[1], N, inputs.key_starts, inputs.key_lengths),
    ):  # fmt: skip
        firsts, ends = ([default] * B if x is None else x.clamp(0, length).tolist() for x, default in ((first, 0), (end, length)))
        for b in range(B):
            yield from (view for x in own for view in (x[b, : firsts[b]], x[b, ends[b] :]))


def fill_hidden(inputs: Inputs, junk: bool) -> None:
    """Hidden keys and values, and what bias and mask have for them, are junk, or zeros."""
    generator = torch.Generator().manual_seed(1)
    statistics = None if inputs.dlse is None else inputs.dlse.movedim(2, 1)
    for x in hidden_of(inputs, (inputs.k, inputs.v), (inputs.bias, inputs.second_bias, inputs.mask), (inputs.q, inputs.dout, statistics)):
        most = 1.0 if x.dtype == torch.bool else torch.finfo(x.dtype).max
        values = torch.tensor([math.nan, math.inf, -math.inf, most] if junk else [0.0])
        x.copy_(values[torch.randint(len(values), x.shape, generator=generator)])


def attend(case: Case, inputs: Inputs, backend: str, raw: bool = False) -> tuple[Tensor, Tensor | None]:
    """out and, from the raw operator, lse."""
    q, k, v, bias = inputs.q, inputs.k, inputs.v, inputs.bias
    if case.is_raw or raw:
        x = inputs.operands()
        options = (case.batch_inner, *case.band, case.softmax_scale, "", "hopper" if backend == "stand-in" else backend)
        return torch.ops.triflash.forward(*x[:4], *options, *x[4:9], case.softcap, case.dropout, False, *x[13:], case.shift)[:2]
    with triflash.backend(backend):
        return triflash.flash_attn_func(q, k, v, bias, case.causal, case.scale), None


@contextlib.contextmanager
def small_tiles(tiles: tuple[int, int] | None, backend: str = "") -> Iterator[None]:
    """Run every kernel, and the tiled backend, with these tiles, so that boundaries are reached at small sizes.

    Hopper's come as near as its hardware allows: 64 queries a consumer, of which there are two for wide tiles.
    """
    if tiles is None:
        yield
        return
    if backend in HOPPER:
        with override_configs(forward=ForwardConfig(1 if tiles[0] <= 32 else 2, tiles[1], 2), dqdkdv=DkdvConfig(1, 1)), few_processors():
            yield
        return
    config = TileConfig(*tiles, num_warps=4, num_stages=1)
    with override_configs(**dict.fromkeys(KERNELS, config)), mock.patch.object(tiled, "tile_size", lambda _: tiles[1]):
        yield


@contextlib.contextmanager
def few_processors(count: int = FEW_PROCESSORS) -> Iterator[None]:
    """Plans are made for a device like this one with so many processors."""
    facts = functools.cache(lambda device: replace(facts_of(device), sms=count))
    with mock.patch.object(signature, "facts_of", facts):
        yield


def kernels(ran: list[str]) -> list[str]:
    """The kernels' names of a record of launches."""
    return [line.split()[1] for line in ran]


def dbias_kernel(case: Case, shape: tuple[int, ...]) -> str:
    """Which kernel the gradient of a bias of this shape comes from: the pass for dq has every ds of a bias of full shape, the pass for dk
    and dv the sums over queries of one that varies over keys only, if heads are not grouped; any other has its own."""
    full = (case.B // case.batch_inner, case.batch_inner, case.H, case.M, case.N)
    if len(shape) < 5:
        batch, *rest = (1,) * (4 - len(shape)) + shape
        shape = (batch, 1, *rest)
    varies = [own == size for own, size in zip(shape, full, strict=True)]
    if all(varies):
        return "dq"
    return "dkdv" if varies[4] and not varies[3] and case.key_heads == case.H else "dbias"


def expected_kernels(case: Case, backend: str, inputs: Inputs, adds: bool = False) -> list[str]:
    """What must run, in order, and nothing else; where something is summed up in parts, a ``…_sum`` may follow.

    adds: on Hopper, the kernel that gives dk or dv adds up dq wherever it can.
    """
    there = {"b": case.bias is not None and case.bias_dtype != torch.bool, "s": case.sink, "t": case.second is not None}
    wanted = [n for n in case.grads if there.get(n, True)]
    if backend not in ("triton", *HOPPER):
        return ["forward", "backward"] if wanted else ["forward"]
    if 0 in (case.B, case.H, case.M):
        return []
    if case.N == 0:
        return ["forward"]
    steps = ["forward"]
    if backend in HOPPER:
        return steps + _expected_on_hopper(case, wanted, inputs, adds) if wanted else steps
    steps += ["delta"] if set(wanted) & set("qkbst") else []
    sources = dbias_kernels(case, wanted, inputs)
    steps += ["dkdv"] if set(wanted) & set("kv") or "dkdv" in sources else []
    steps += ["dq"] if "q" in wanted or "dq" in sources else []
    return steps + ["dbias"] * sources.count("dbias")


def dbias_kernels(case: Case, wanted: Iterable[str], inputs: Inputs) -> list[str]:
    """Which kernels the gradients of biases come from. A pass gives one of them; where both fall out of the same, the second has its own."""
    given = [x for letter, x in (("b", inputs.bias), ("t", inputs.second_bias)) if letter in wanted and x is not None]
    sources = [dbias_kernel(case, tuple(x.shape)) for x in given]
    return [*sources[:1], *("dbias" if source in sources[:1] else source for source in sources[1:])]


def _expected_on_hopper(case: Case, wanted: list[str], inputs: Inputs, adds: bool) -> list[str]:
    sources = dbias_kernels(replace(case, Hk=None), wanted, inputs)
    narrow = max(case.D, case.Dv or case.D) <= 128
    adding = adds and narrow and "q" in wanted and bool(set(wanted) & set("kv")) and "dq" not in sources
    steps = ["preprocess"]
    if set(wanted) & set("kv") or "dkdv" in sources:
        steps += ["dqdkdv" if adding else "dkdv"]
    steps += ["dq"] if ("q" in wanted and not adding) or "dq" in sources else []
    steps += ["postprocess"] if adding else []
    return steps + ["dbias"] * sources.count("dbias")


def is_to_add_dq(case: Case, inputs: Inputs, raw: bool, configs: Configs) -> bool:
    """Whether Hopper is to add up dq wherever it can: if ``small_tiles`` or the test has a configuration for that, else by the plan's own
    rule, which test_hopper_steps.py is about.

    Not in the seed's functions under PyTorch's deterministic algorithms, which ``poisoned_allocations`` turns on.
    """
    if torch.are_deterministic_algorithms_enabled() and not (case.is_raw or raw):
        return False
    if "dqdkdv" in configs or (case.tiles is not None and not configs):
        return True
    return adds_dq(spec_of_case(case, inputs), Needs(True, True, True, False), KNOWN_DEVICES["sm90"].shared_memory)


def spec_of_case(case: Case, inputs: Inputs) -> AttentionSpec:
    x = inputs.operands()
    return spec_of(
        *x[:4], case.batch_inner, *case.band, case.softmax_scale, "", *x[4:9], case.softcap, case.dropout, False, *x[13:], case.shift
    )


def expected_launches(case: Case, backend: str, inputs: Inputs, adds: bool = False) -> list[str]:
    """``expected_kernels`` as they are recorded. The automatic choice may take its forward pass from another backend than its backward pass."""
    forward = backward = backend
    if backend == "auto":
        spec, facts = spec_of_case(case, inputs), facts_of(inputs.q.device)
        wanted = inputs.wanted()
        needs = Needs(*(letter in wanted for letter in "qkvbst"))
        forward, backward = plan_forward(spec, facts).backend, plan_backward(spec, needs, facts).backend
    names = expected_kernels(case, backward, inputs, adds)
    forward, backward = ("hopper" if each == "stand-in" else each for each in (forward, backward))
    return [f"{forward if name == 'forward' else backward}: {name}" for name in names]


def lacks_backward(case: Case, inputs: Inputs) -> bool:
    """Whether Hopper runs the forward pass alone: with a bias (or a mask without one) that does not vary over keys."""
    bias = inputs.operands().bias
    return bias is not None and bias.shape[-1] != case.N


def lacks_dbias(case: Case, inputs: Inputs) -> bool:
    """Whether Hopper gives every gradient but the bias's: beside a mask of queries, one that is summed by a kernel of its own."""
    if inputs.bias is None or inputs.mask is None or inputs.bias.dtype == torch.bool:
        return False
    return inputs.mask.shape[-2] == case.M > 1 and dbias_kernel(replace(case, Hk=None), tuple(inputs.bias.shape)) == "dbias"


def what_hopper_gives(case: Case, inputs: Inputs) -> Case:
    """The case, asking for those gradients alone."""
    if lacks_backward(case, inputs):
        return replace(case, grads="", dlse=False)
    if lacks_dbias(case, inputs):
        return replace(case, grads=case.grads.replace("b", ""), dlse=case.dlse and case.grads != "b")
    return case


def is_unsupported(case: Case, backend: str, device: torch.device) -> bool:
    on_interpreter = device.type == "cpu"
    dtypes = (case.dtype, case.bias_dtype if case.bias else None)
    if backend in HOPPER:
        there = ON_HOPPER or backend == "stand-in"
        can = there and case.dtype in (torch.float16, torch.bfloat16) and torch.float64 not in dtypes
        empty = 0 in (case.B, case.H, case.M, case.N)
        masked = case.mask is not None and case.bias is not None  # beside a bias, both must vary over keys
        if case.second is not None and sorted((len(p) > 1 and p[-2] == "q", p[-1] == "k") for p in (case.bias or "", case.second)) != [
            (False, True),
            (True, True),
        ]:
            return True  # of two biases, one varies over queries and keys and one over keys alone
        apart = masked and any(bias_shape(case, pattern)[-1] != case.N for pattern in (case.bias, case.mask))
        return not can or empty or apart or max(case.D, case.Dv or case.D) > MAX_HEAD_DIM
    return backend == "triton" and (torch.float64 in dtypes or (on_interpreter and torch.bfloat16 in dtypes))


def may_not_be_mild(case: Case, inputs: Inputs) -> bool:
    """Whether Hopper's ``preprocess`` is asked if statistics are mild, and may say no."""
    bias = inputs.operands().bias
    return max(case.D, case.Dv or 0) <= 128 and ((bias is not None and bias.dtype != torch.bool) or case.alibi is not None)


@contextlib.contextmanager
def on_backend(
    case: Case, backend: str, configs: Configs, processors: int | None = None, seed: int = 0, edges: bool = True, mild: bool = True
) -> Iterator[list[str]]:
    """Where a case runs: with the configurations given, or without any with ``small_tiles``; the record of what is launched.

    processors: that a device of Hopper's is believed to have. seed, edges, mild: of the stand-in (``gluon_twin.twin_device``).
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(override_configs(**configs) if configs else small_tiles(case.tiles, backend))
        if backend == "stand-in":  # last, so that it says what the device is
            import gluon_twin

            stack.enter_context(gluon_twin.twin_device(processors or FEW_PROCESSORS, seed, edges, mild))
        elif processors is not None:
            stack.enter_context(few_processors(processors))
        yield stack.enter_context(triflash.record_launches())


def results_of(
    case: Case, inputs: Inputs, backend: str, configs: Configs | None = None, carefully: bool = False, **device: Any
) -> tuple[list[dict[str, Tensor]], list[str]]:
    """out, lse (from the operator alone) and every gradient asked for, by name; and the record of launches. device: see ``on_backend``.

    With configurations and on the stand-in by the operator, else by the seed's functions if they can. carefully: if statistics might not be
    mild, the stand-in computes the gradients once more as if they were not.
    """
    configs, wanted = configs or {}, inputs.wanted()
    twice = backend == "stand-in" and carefully and bool(wanted) and may_not_be_mild(case, inputs)
    with on_backend(case, backend, configs, **device) as ran:
        out, lse = attend(case, inputs, backend, is_raw_on(backend, configs))
        outputs, cotangents = ([out], [inputs.dout]) if inputs.dlse is None else ([out, lse], [inputs.dout, inputs.dlse])
        grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents, retain_graph=twice) if wanted else ()
    results = {"out": out.detach()} if lse is None else {"out": out.detach(), "lse": lse.detach()}
    found = [results | named_gradients(wanted, grads)]
    if twice:
        with on_backend(case, backend, configs, mild=False, **device) as again:
            grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents)
        assert again == ran[1:]
        found.append(named_gradients(wanted, grads))
    return found, ran


def named_gradients(letters: Iterable[str], grads: Iterable[Tensor]) -> dict[str, Tensor]:
    return {"d" + letter: grad for letter, grad in zip(letters, grads, strict=True)}


def is_raw_on(backend: str, configs: Configs) -> bool:
    return backend == "stand-in" or bool(configs)


def assert_right(case: Case, inputs: Inputs, *results: dict[str, Tensor], backend: str = "") -> None:
    """What was computed, by name, has the dtype, the shape and the values that it must have."""
    judgements, wanted = judge(case, inputs, backend), inputs.wanted()
    dtypes = {"out": case.dtype, "lse": torch.float64 if case.dtype == torch.float64 else torch.float32}
    dtypes |= {"d" + letter: x.dtype for letter, x in wanted.items()}
    for name, x in itertools.chain.from_iterable(each.items() for each in results):
        assert x.dtype == dtypes[name] and x.shape == judgements[name].reference.shape, name
        assert_close(name, x, judgements[name])


def assert_launched(case: Case, inputs: Inputs, backend: str, configs: Configs, ran: list[str]) -> None:
    """The kernels that must run did, and no other, with the configurations given."""
    adds = backend in (*HOPPER, "auto") and is_to_add_dq(case, inputs, is_raw_on(backend, configs), configs)
    launched = [" ".join(line.split()[:2]) for line in ran]
    assert [line for line in launched if not line.split()[1].endswith("_sum")] == expected_launches(case, backend, inputs, adds)
    for kernel, config in configs.items():
        assert kernel not in kernels(ran) or f"hopper: {kernel} {config}" in ran


def run_case(
    case: Case, backend: str, device: torch.device, configs: Configs | None = None, carefully: bool = True, **how: Any
) -> list[str]:
    """Compute the case on the backend and judge all of it; the kernels that ran. The options are those of ``results_of``."""
    inputs, configs = build(case, device), configs or {}
    if backend in HOPPER and (less := what_hopper_gives(case, inputs)) != case:
        if set(inputs.wanted()) - set(less.grads):
            with pytest.raises(triflash.UnsupportedError):
                results_of(case, inputs, backend, configs, **how)
        case, inputs = less, build(less, device)
    if is_unsupported(case, backend, device):
        with on_backend(case, backend, configs, **how) as ran, pytest.raises(triflash.UnsupportedError):
            attend(case, inputs, backend, is_raw_on(backend, configs))
        assert ran == []
        return ran
    before = {n: x.detach().clone() for n, x in vars(inputs).items() if x is not None}
    results, ran = results_of(case, inputs, backend, configs, carefully, **how)
    assert_launched(case, inputs, backend, configs, ran)
    for name, old in before.items():
        assert torch.equal(getattr(inputs, name), old), f"{name} was modified"
    assert_right(case, inputs, *results, backend="hopper" if ON_HOPPER and backend == "auto" else backend)
    return kernels(ran)


def run_hidden(case: Case, backend: str, device: torch.device, configs: Configs | None = None, seed: int = 0, **how: Any) -> list[str]:
    """Junk behind key lengths changes no bit of a result and gets no gradient; the kernels that ran. That results are right, ``run_case`` says."""
    found = []
    for junk in (False, True):
        inputs = build(case, device)
        fill_hidden(inputs, junk)
        (results,), ran = results_of(case, inputs, backend, configs, seed=seed + junk, **how)
        assert_launched(case, inputs, backend, configs or {}, ran)
        found.append(results)
        lse = results.get("lse")
        rows = (results["out"], results.get("dq"), None if lse is None else (lse != -math.inf).movedim(2, 1))
        assert not any(x.any() for x in hidden_of(inputs, map(results.get, ("dk", "dv")), [results.get("db"), results.get("dt")], rows))
    for name, clean in found[0].items():
        dirty = found[1][name]
        assert not dirty.isnan().any(), name
        if name == "dq" and "postprocess" in kernels(ran):  # added up in no fixed order
            torch.testing.assert_close(dirty, clean, rtol=1e-2, atol=1e-3)
        else:
            assert torch.equal(dirty, clean), name
    return kernels(ran)
