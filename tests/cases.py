"""A test case is data. ``Case`` says what to compute; ``build`` draws its inputs, seeded, in any memory layout. ``running.py`` runs it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from judging import five_dims
from triflash.spec import Operands


@dataclass(frozen=True)
class Case:
    """One attention problem, its inputs' memory layouts, and what is asked of it.

    bias: a letter where it varies and 1 where it broadcasts, aligned to the right of ``bhqk``, as in ``1h1k`` or ``qk``; five letters
        (``b1hqk``, ``1ihqk``) are over (outer batch, inner batch, head, query, key). None is no bias.
    second: the same for another bias beside it, of dtype second_dtype. mask: the same for a boolean mask beside them. Hk: key heads, if not H. lengths: keys shown to the batch entries, repeated as needed.
    starts, ends, key_starts: queries and keys that there are, likewise; diagonal: of the batch entries, from which lo and hi count.
    shift: the diagonal of ALiBi.
    shown: what the mask, or a bias that is one, shows (``shown_by``), if not what chance has it.
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
    shown: str = ""

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


def shown_by(shape: tuple[int, ...], how: str, generator: torch.Generator) -> Tensor:
    """A mask (…, queries, keys) that shows all but padding on the "left" or "right" of each entry's keys, "documents" of a row to themselves,
    those with "holes", of which whole blocks are hidden, or but for a third of their "rows"; "one" pair of each entry; "nothing";
    "everything", or that "but one" pair or "but a key".
    """
    *outer, M, N = shape
    entries = math.prod(outer)
    mask = torch.zeros(entries, M, N, dtype=torch.bool)
    i, j = torch.arange(M)[:, None], torch.arange(N)[None, :]
    for own in mask:
        at = int(torch.randint(N + 1, (1,), generator=generator))
        if how in ("left", "right"):
            own |= (j >= at) if how == "left" else (j < at)
        elif how == "one":
            own[int(torch.randint(M, (1,), generator=generator)), min(at, N - 1)] = True
        elif how == "everything":
            own.fill_(True)
        elif how == "but one":
            own.fill_(True)[int(torch.randint(M, (1,), generator=generator)), min(at, N - 1)] = False
        elif how == "but a key":
            own.fill_(True)[:, min(at, N - 1)] = False
        elif how != "nothing":
            cuts_m, cuts_n = (torch.randint(size + 1, (3,), generator=generator).sort().values for size in (M, N))
            own |= torch.bucketize(i, cuts_m, right=True) == torch.bucketize(j, cuts_n, right=True)
            if how == "holes":
                own &= torch.rand((M, N), generator=generator) < 0.8
                own &= (j < N // 3) | (j >= N // 2)
            if how == "rows":
                own &= (i < M // 3) | (i >= M // 2 + 40)
    return mask.view(shape)


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
            if bias_dtype == torch.bool and case.shown:
                return shown_by(shape, case.shown, generator).to(device)
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

        def shown(shape: tuple[int, ...]) -> Tensor:
            return shown_by(shape, case.shown, generator) if case.shown else torch.rand(shape, generator=generator) < 0.7

        mask = with_layout(bias_shape(case, case.mask), case.mask_layout, shown)
        mask = mask.clone() if case.mask_layout == "plain" else mask
        if not case.shown and mask.shape[-1] > 32 and mask.shape[-2] != 1:
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
