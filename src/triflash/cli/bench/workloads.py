"""The problems that are measured: shapes by name, from models that people run, and by shorthand. The same names serve tests."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..shorthand import bias_pattern, bias_shape
from .caches import rounded
from .flops import attention_bytes, attention_flops, visible_pairs
from .formula import Options
from .gate import Problem
from .packed import lengths

__all__ = ["DECODE", "DTYPES", "NAMED", "Workload", "short"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Workload:
    """One attention problem without its tensors.

    name: what the tables show. batch: of q, k and v; ``batch_inner`` divides it into (outer, inner). lo, hi: key j is visible to query i
    when ``lo <= j - i <= hi``. bias: a letter where it varies and 1 where it broadcasts, over ``bhqk`` or ``bihqk`` (i is the inner batch);
    None is no bias. bias_values: ``normal`` (random), ``alibi``, ``padding`` (keys beyond a batch entry's length are hidden),
    ``alibi+padding``, ``one-long+padding`` (the first entry has all keys, the others a sixteenth), ``one-longest+padding`` (a 128th) or
    ``windows``; or of a boolean mask ``all mask`` (hides nothing), ``holes mask`` (hides a tenth, drawn), ``padding mask`` and
    ``documents mask`` (see :attr:`documents`). second: where another bias beside it varies; one over keys alone hides a seventh of them
    with -1e9, others are random. dbias: their gradients are asked for. scale: default ``1 / sqrt(head_dim)``. softcap, sinks, slopes
    (ALiBi's, of as many queries as keys), dropout: see :class:`triflash.cli.bench.formula.Options`. deterministic: gradients have the
    same bits on every run. about: where the shape is from. packed: a kind of
    :data:`triflash.cli.bench.packed.KINDS`: the one batch entry holds sequences of such lengths, drawn from packed_seed ("equal": of
    ``length``), within which the band holds; a bias is by sequence (``b``) and position. cache: k and v are a KV cache, of which the
    queries are the last tokens: a forward pass alone. page: keys of a page, which are anywhere, in an order drawn; 0: no pages. fp8: it
    is stored in 8 bits (e4m3).
    """

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    kv_heads: int = 0
    value_dim: int = 0
    lo: int | None = None
    hi: int | None = None
    bias: str | None = None
    bias_values: str = "normal"
    second: str | None = None
    dbias: bool = False
    batch_inner: int = 1
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    slopes: bool = False
    dropout: float = 0.0
    deterministic: bool = False
    dtype: str = "bf16"
    about: str = ""
    packed: str = ""
    packed_seed: int = 0
    length: int = 0
    cache: bool = False
    page: int = 0
    fp8: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)

    @property
    def key(self) -> str:
        """What identifies it in another run's file: its name and every number."""
        sizes = (
            f"b{self.batch}/{self.batch_inner} h{self.heads}/{self.kv_heads} s{self.queries}x{self.keys} d{self.head_dim}x{self.value_dim}"
        )
        if self.cache:
            sizes += " cache" + (f" pages of {self.page}" if self.page else "") + (" e4m3" if self.fp8 else "")
        packed = f" | {self.packed} {self.length} {self.packed_seed}" if self.packed else ""
        features = [self.bias_values] if self.is_mask else []
        features += [word for word, there in (("slopes", self.slopes), ("deterministic", self.deterministic)) if there]
        packed += "".join(f" | {word}" for word in (*features, *([f"dropout {self.dropout}"] if self.dropout else [])))
        return f"{self.name} | {sizes} | {self.lo}..{self.hi} | {self.biases}{'+db' if self.dbias else ''} | {self.dtype}{packed}"

    @property
    def sequences(self) -> tuple[int, ...]:
        """The lengths of packed sequences; empty where there are none."""
        return lengths(self.packed, self.queries, self.length, self.packed_seed) if self.packed else ()

    @property
    def is_mask(self) -> bool:
        """Whether the bias is boolean, True where a key is visible."""
        return self.bias is not None and self.bias_values.endswith("mask")

    @property
    def documents(self) -> tuple[int, ...]:
        """The lengths of what a mask of documents holds apart: eight, as equal as can be; empty where there is none."""
        if self.bias_values != "documents mask":
            return ()
        ends = [self.keys * n // 8 for n in range(9)]
        return tuple(end - start for start, end in itertools.pairwise(ends))

    @property
    def is_causal(self) -> bool:
        return self.lo is None and self.hi == 0

    @property
    def is_banded(self) -> bool:
        return self.lo is not None or self.hi is not None

    @property
    def mask(self) -> str:
        """``full``, ``causal`` or ``window``."""
        return "full" if not self.is_banded else "causal" if self.is_causal else "window"

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def biases(self) -> str | None:
        """As ``--bias`` takes them: two with a stroke between them."""
        return self.bias if self.second is None else f"{self.bias}/{self.second}"

    @property
    def bias_shape(self) -> tuple[int, ...] | None:
        """The bias's five sizes: outer batch, inner batch, head, query, key. Raises ValueError where ``bias`` is no pattern."""
        return self._shape_of(self.bias)

    @property
    def second_shape(self) -> tuple[int, ...] | None:
        """The same of the second bias."""
        return self._shape_of(self.second)

    def _shape_of(self, bias: str | None) -> tuple[int, ...] | None:
        five = None if bias is None else bias_pattern(bias)
        if five is None:
            return None
        if len(five) < 5:
            four = five.rjust(4, "1")
            five = ("bi" if four[0] == "b" else "11") + four[1:]
        if self.packed:
            longest = max(self.sequences)
            return bias_shape(five, len(self.sequences), self.heads, longest, longest)
        return bias_shape(five, self.batch, self.heads, self.queries, self.keys, self.batch_inner)

    @property
    def lengths(self) -> list[int] | None:
        """Visible keys of each batch entry, spread evenly from a quarter of the keys to all of them; None where nothing is padded."""
        if "padding" not in self.bias_values:
            return None
        if self.bias_values.startswith("one-long"):
            return [self.keys, *[max(1, self.keys // (128 if "longest" in self.bias_values else 16))] * (self.batch - 1)]
        steps = max(1, self.batch - 1)
        return [self.keys - (3 * self.keys // 4) * (self.batch - 1 - i) // steps for i in range(self.batch)]

    @property
    def pairs(self) -> int:
        """Visible pairs of query and key, over all batch entries and query heads, of what a ``holes mask`` hides, too."""
        if self.packed or self.documents:
            lengths = self.sequences or self.batch * self.documents
            squares = {n: visible_pairs(n, n, self.lo, self.hi) for n in set(lengths)}
            return self.heads * sum(squares[n] for n in lengths)
        shown = self.lengths or [self.keys] * self.batch
        each = {n: visible_pairs(self.queries, n, self.lo, self.hi) for n in set(shown)}
        return self.heads * sum(each[n] for n in shown)

    @property
    def shapes(self) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int], tuple[int, int, int, int]]:
        """Of q, k and v."""
        B, M, N = self.batch, self.queries, self.keys
        return (B, M, self.heads, self.head_dim), (B, N, self.kv_heads, self.head_dim), (B, N, self.kv_heads, self.value_dim)

    def flops(self, which: str) -> int:
        """Of a pass: see :mod:`triflash.cli.bench.flops`."""
        return attention_flops(self.pairs, self.head_dim, self.value_dim, which)

    def bytes(self, which: str) -> int:
        """Compulsory traffic of a pass. Of a cache, what requests do not hold is no traffic, nor is what tells how much they hold."""
        if self.fp8:
            wide = replace(self, fp8=False)
            keys = self.batch * self.keys if self.lengths is None else sum(self.lengths)
            return wide.bytes(which) - keys * self.kv_heads * (self.head_dim + self.value_dim) * (DTYPES[self.dtype].itemsize - 1)
        if self.cache and self.lengths is not None:
            held = replace(self.without_bias(), batch=1, keys=sum(self.lengths), queries=self.queries * self.batch)
            return held.bytes(which)
        biases = [math.prod(shape) for shape in (self.bias_shape, self.second_shape) if shape is not None]
        if self.is_mask:  # a byte each
            biases[0] = -(-biases[0] // DTYPES[self.dtype].itemsize)
        return attention_bytes(*self.shapes, (sum(biases),), DTYPES[self.dtype].itemsize, self.dbias, which)

    def build(self, device: torch.device, seed: int = 0) -> Problem:
        """Random tensors: q, k, v and the output's gradient, standard normal (q such that scores are), and the bias."""
        generator = torch.Generator(device=device).manual_seed(seed)
        dtype = DTYPES[self.dtype]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

        q, k, v = (normal(*shape) for shape in self.shapes)
        if self.fp8:
            k, v = rounded(k), rounded(v)
        if self.scale is not None:  # a model without a scale has it in its weights: scores of the usual size
            q = q * (self.head_dim**-0.5 / self.scale)
        dout = normal(self.batch, self.queries, self.heads, self.value_dim)
        shape = self.bias_shape
        bias = None
        if shape is not None and self.is_mask:
            bias = self._mask(shape, generator)
        elif shape is not None:
            bias = normal(*shape) if self.bias_values in ("normal", "windows") else torch.zeros(shape, device=device, dtype=torch.float32)
            if self.bias_values == "windows":
                bias = bias + _shifted_windows(self.batch_inner, self.queries, device).to(dtype)
            if "alibi" in self.bias_values:
                slopes = 2.0 ** (-8.0 * torch.arange(1, self.heads + 1, device=device) / self.heads)
                bias = bias + slopes[:, None, None] * torch.arange(self.keys, device=device)  # per row the same as slope * (j - i)
            if self.lengths is not None:
                hidden = torch.arange(self.keys, device=device) >= torch.tensor(self.lengths, device=device)[:, None]
                bias = bias.masked_fill(hidden[:, None, None, None, :], -torch.inf)
            bias = bias.to(dtype).contiguous()
        sinks = normal(self.heads).float() if self.sinks else None
        second = None
        if (shape := self.second_shape) is not None:
            second = normal(*shape)
            if shape[3] == 1 != self.queries:  # as models write a mask of keys; the first is seen
                second = torch.where(second < -1.07, -1e9, 0.0).to(dtype)
                second[..., 0] = 0.0
        return Problem(q, k, v, bias, dout, self._options(sinks, device), self.sequences, second)

    def _options(self, sinks: Tensor | None, device: torch.device) -> Options:
        slopes = 2.0 ** (-8.0 * torch.arange(1, self.heads + 1, device=device) / self.heads) if self.slopes else None
        return Options(self.softmax_scale, self.batch_inner, self.lo, self.hi, self.softcap, sinks, slopes)

    def _mask(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Of a boolean mask: five-dim, True where a key is visible."""
        device = generator.device
        if self.documents:
            of = torch.repeat_interleave(torch.arange(len(self.documents), device=device), torch.tensor(self.documents, device=device))
            return (of[:, None] == of).expand(shape).contiguous()
        if self.lengths is not None:
            shown = torch.arange(self.keys, device=device) < torch.tensor(self.lengths, device=device)[:, None]
            return shown.unflatten(0, (-1, self.batch_inner))[:, :, None, None].expand(shape).contiguous()
        shown = torch.ones(shape, dtype=torch.bool, device=device)
        if "holes" in self.bias_values:
            shown = torch.rand(shape, generator=generator, device=device) > 0.1
            shown[..., 0] = True
        return shown

    def described(self) -> Problem:
        """The same without memory: meta tensors."""
        dtype, device = DTYPES[self.dtype], torch.device("meta")
        q, k, v = (torch.empty(shape, dtype=dtype, device=device) for shape in self.shapes)
        bias, second = (
            None if shape is None else torch.empty(shape, dtype=own, device=device)
            for shape, own in ((self.bias_shape, torch.bool if self.is_mask else dtype), (self.second_shape, dtype))
        )
        dout = q.new_empty(self.batch, self.queries, self.heads, self.value_dim)
        sinks = q.new_empty(self.heads, dtype=torch.float32) if self.sinks else None
        return Problem(q, k, v, bias, dout, self._options(sinks, device), self.sequences, second)

    def without_bias(self) -> Workload:
        """The same, biases and padding left out. Its random q, k and v are the same."""
        return replace(self, bias=None, bias_values="normal", second=None, dbias=False)

    def plain(self) -> Workload:
        """The plain call of these sizes: every key head its own, nothing beside scores, and of a band only whether it is causal."""
        features = dict(softcap=None, sinks=False, slopes=False, dropout=0.0, deterministic=False)
        hi = 0 if self.hi == 0 else None
        return replace(self.without_bias(), kv_heads=self.heads, lo=None, hi=hi, **features)  # type: ignore[arg-type]

    def one_query(self) -> Workload:
        """A step of decoding with the last of its queries alone."""
        return replace(self, queries=1, hi=None) if self.cache else self

    def shrunk(self, length: int = 48) -> Workload:
        """The same features at a size for trying out and testing: says nothing about the model's speed."""
        if self.bias_values == "windows":
            queries, inner, outer = self.queries, 4, min(2, self.batch // self.batch_inner)
        else:
            queries, inner, outer = min(self.queries, length), min(self.batch_inner, 3), min(2, self.batch // self.batch_inner)
        longer = length + length // 3  # keys of cross attention, where both are cut short: still not as many as queries
        keys = queries if self.keys == self.queries else min(self.keys, longer if queries == length else length)
        kv_heads = min(self.kv_heads, 2)
        lo = None if self.lo is None else -max(1, -self.lo * queries // self.queries)
        hi = self.hi
        if hi is not None and hi == self.keys - self.queries:  # the last query stands at the last key
            hi = keys - queries
        elif hi:
            hi = max(1, hi * queries // self.queries)
        heads = kv_heads * min(4, self.heads // self.kv_heads)
        sizes = dict(batch=outer * inner, batch_inner=inner, heads=heads, kv_heads=kv_heads, queries=queries, keys=keys)
        sizes |= dict(page=min(self.page, 16), length=min(self.length, length // 3))
        return replace(self, **sizes, lo=lo, hi=hi, name=f"{self.name} (tiny)")  # type: ignore[arg-type]


def _shifted_windows(windows: int, tokens: int, device: torch.device) -> Tensor:
    """Swin's mask of shifted windows, ``(1, windows, 1, tokens, tokens)``: -100 between pixels that the shift brought together."""
    grid, side = math.isqrt(windows), math.isqrt(tokens)
    at = torch.arange(grid * side, device=device)
    part = (at >= (grid - 1) * side).long() + (at >= grid * side - side // 2).long()
    regions = (3 * part[:, None] + part[None, :]).reshape(grid, side, grid, side).transpose(1, 2).reshape(windows, tokens)
    return torch.where(regions[:, :, None] == regions[:, None, :], 0.0, -100.0)[None, :, None]


def _square(name: str, about: str, batch: int, heads: int, length: int, head_dim: int, **more: object) -> Workload:
    return Workload(name, batch, heads, length, length, head_dim, about=about, **more)  # type: ignore[arg-type]


_WORKLOADS = (
    _square("llama3-8b", "Llama 3 8B: 32 heads on 8, context 8192", 2, 32, 8192, 128, kv_heads=8, hi=0),
    _square(
        "gemma2-9b-local", "Gemma 2 9B: soft cap 50, window 4096, every other layer", 2, 16, 8192, 256,
        kv_heads=8, lo=-4095, hi=0, softcap=50.0,
    ),
    _square("gemma2-9b-global", "Gemma 2 9B: soft cap 50, the other layers", 2, 16, 8192, 256, kv_heads=8, hi=0, softcap=50.0),
    _square("mistral-7b", "Mistral 7B v0.1: 32 heads on 8, window 4096", 1, 32, 16384, 128, kv_heads=8, lo=-4095, hi=0),
    _square(
        "gpt-oss-20b-local", "gpt-oss 20B: sinks, window 128, every other layer", 1, 64, 8192, 64,
        kv_heads=8, lo=-127, hi=0, sinks=True,
    ),
    _square("gpt-oss-20b-global", "gpt-oss 20B: sinks, the other layers", 1, 64, 8192, 64, kv_heads=8, hi=0, sinks=True),
    _square("bert-large", "BERT large: 512 tokens, padded batch", 32, 16, 512, 64, bias="b11k", bias_values="padding"),
    _square(
        "t5-xl-encoder", "T5 1.1 XL encoder: learned position bias, products not scaled", 16, 32, 512, 64,
        bias="1hqk", dbias=True, scale=1.0,
    ),
    _square("bloom-7b", "BLOOM 7B1: ALiBi and a padded batch", 4, 32, 2048, 128, bias="bh1k", bias_values="alibi+padding", hi=0),
    _square("swin-b", "Swin B, stage 1, 64 images of 224: windows of 7 x 7, learned bias", 4096, 4, 49, 32, bias="1hqk", dbias=True),
    _square(
        "swin-b-shifted", "the same with shifted windows: bias and mask of each of an image's 64 windows", 4096, 4, 49, 32,
        batch_inner=64, bias="1ihqk", bias_values="windows", dbias=True,
    ),
    _square("vit-l", "ViT-L/16 at 224: 197 tokens", 64, 16, 197, 64),
    _square(
        "af3-triangle", "AlphaFold 3, triangle attention, crop 384: a row of the pair representation is a batch entry", 384, 4, 384, 32,
        batch_inner=384, bias="b1hqk", dbias=True,
    ),
    _square("af3-pair-bias", "AlphaFold 3 Pairformer, single attention with pair bias, crop 768", 1, 16, 768, 24, bias="bhqk", dbias=True),
    _square(
        "af3-diffusion", "AlphaFold 3 diffusion transformer, crop 384: 48 noised samples share a pair bias", 48, 16, 384, 48,
        batch_inner=48, bias="b1hqk", dbias=True,
    ),
    _square("boltz-triangle", "Boltz, triangle attention, two crops of 256", 512, 4, 256, 32, batch_inner=256, bias="b1hqk", dbias=True),
    _square(
        "boltz2-triangle", "Boltz-2 and Protenix, triangle attention, 512 tokens", 512, 4, 512, 32,
        batch_inner=512, bias="b1hqk", dbias=True,
    ),
    _square("of3-triangle", "OpenFold-3, triangle attention, crop 768", 768, 4, 768, 32, batch_inner=768, bias="b1hqk", dbias=True),
    _square(
        "of3-template", "OpenFold-3, triangle attention of four templates, crop 384", 1536, 4, 384, 16,
        batch_inner=384, bias="b1hqk", dbias=True,
    ),
    _square(
        "openfold-msa-row", "OpenFold, MSA rows with pair bias, 128 sequences, crop 256; no mask of keys", 128, 8, 256, 32,
        batch_inner=128, bias="b1hqk", dbias=True,
    ),
    _square(
        "openfold-extra-msa", "OpenFold, extra MSA rows with pair bias, 1024 sequences, crop 256; no mask of keys", 1024, 8, 256, 8,
        batch_inner=1024, bias="b1hqk", dbias=True,
    ),
    _square(
        "evoformer-msa-row", "DS4Sci_EvoformerAttention on MSA rows: 128 sequences, crop 384, a bias of keys beside that of pairs",
        128, 8, 384, 32, batch_inner=128, bias="b1hqk", second="bi11k", dbias=True,
    ),
    _square(
        "evoformer-triangle", "DS4Sci_EvoformerAttention on pairs, crop 384: af3-triangle with a bias of keys beside that of pairs",
        384, 4, 384, 32, batch_inner=384, bias="b1hqk", second="bi11k", dbias=True,
    ),
)  # fmt: skip
NAMED = {workload.name: workload for workload in _WORKLOADS}


def _decode(name: str, about: str, batch: int, keys: int, queries: int = 1, **more: object) -> Workload:
    """A step of decoding: Llama 3 8B's heads unless it says others."""
    sizes = {"heads": 32, "kv_heads": 8, "head_dim": 128, "hi": None if queries == 1 else keys - queries, **more}
    return Workload(f"decode-{name}", batch=batch, queries=queries, keys=keys, about=about, cache=True, **sizes)  # type: ignore[arg-type]


_STEPS = (
    *(
        _decode(f"llama3-8b-b{batch}-{n}k", f"a token of each of {batch} requests of Llama 3 8B, {n}k keys in the cache", batch, 1024 * n)
        for batch in (1, 8, 64)
        for n in (1, 2, 4, 8, 16, 32, 64, 128)
    ),
    *(
        _decode(f"speculative-m{m}", f"Llama 3 8B, {m} new tokens of each of 8 requests", 8, 16384, m)
        for m in (1, 2, 4, 8)
    ),
    _decode("ragged", "Llama 3 8B, requests of 8k to 32k keys", 16, 32768, bias="b11k", bias_values="padding"),
    _decode(
        "ragged-one-long", "Llama 3 8B, one request of 128k keys beside 15 of 8k", 16, 131072, bias="b11k", bias_values="one-long+padding"
    ),
    *(
        _decode(f"t5-xl-{n}", "T5 1.1 XL's decoder: a row of its position bias, products not scaled", 32, n, heads=32, kv_heads=32,
                head_dim=64, bias="1h1k", scale=1.0)
        for n in (512, 4096)
    ),
)  # fmt: skip
DECODE = {workload.name: workload for workload in _STEPS}


def short(size: int) -> str:
    """2048 as 2k, where that is exact."""
    return f"{size // 1024}k" if size >= 1024 and size % 1024 == 0 else str(size)
