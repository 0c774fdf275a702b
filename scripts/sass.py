"""Machine code of a table of problems, compiled for sm90 without a GPU: for whoever rearranges kernels and must not change them.

    python3 scripts/sass.py write before           before/<problem>.<number>.<kernel>.sass and .ptx, one a launch, and before/launches.txt
    python3 scripts/sass.py write after --only bias --only d64
    python3 scripts/sass.py keys after             after/launches.txt and keys.txt alone, in seconds: nothing is compiled
    python3 scripts/sass.py compare before after   exit status 1 if any kernel differs; --renamed OLD=NEW for a kernel

``launches.txt`` has grids and arguments of every launch, ``keys.txt`` what Triton compiles it from: its source with all that it calls,
constants, types and options, hashed. Where keys are the same, so is the machine code, and nobody need compile it. The first line of a
kernel's machine code has its registers, spilled words and shared memory. Compiling all of it takes two cores eight minutes. ptxas 12.8
makes now and then another order of instructions of the very same PTX: such kernels are named and do not count. Code of two Triton releases
differs: compare what one release makes of two trees, of which ``PYTHONPATH=<other tree>/src`` chooses the other.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton

import triflash
from triflash.arguments import ATTENTION, Given, Options
from triflash.door import bind
from triflash.explainer import passes_of
from triflash.launch import ahead
from triflash.launch.calls import Call
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.kernels.dbias import DbiasConfig
from triflash.plan.kernels.dkdv import DkdvConfig
from triflash.plan.kernels.dq import DqConfig
from triflash.plan.kernels.few import FewConfig
from triflash.plan.kernels.forward import ForwardConfig
from triflash.plan.kernels.mask_bounds import CONFIG as MASK_BOUNDS
from triflash.plan.kernels.short import ShortConfig
from triflash.plan.override import override_configs
from triflash.plan.select import plan_backward, plan_forward
from triflash.spec import Needs

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SM90 = KNOWN_DEVICES["sm90"]


@dataclass(frozen=True)
class Problem:
    """What every problem has. S: queries, and keys if nothing says otherwise. bias: letters or a shape. wants: gradients, letters of qkvb
    and, of the second bias, s.
    """

    name: str
    D: int = 64
    S: int = 2048
    Hk: int = 8
    dtype: torch.dtype = BF16
    bias: Any = ""
    wants: str = "qkv"
    backend: str = "hopper"
    options: dict[str, Any] = field(default_factory=dict)

    def calls(self) -> list[Call]:
        """The launches of the forward and the backward pass, as ``explain`` has them."""
        passes, _ = passes_of(*self.tensors(), **self.named(), device=SM90)
        return [call for _, bound in passes for call in bound.calls or ()]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """q, and keys and values."""
        raise NotImplementedError

    def named(self) -> dict[str, Any]:
        """What ``passes_of`` is told besides."""
        raise NotImplementedError


@dataclass(frozen=True)
class Dense(Problem):
    """Of ``attention``. bias, second, mask: letters where they vary over (batch, head, query, key), 1 where they broadcast. N: keys.
    features: of "lengths", "slopes", "sink". configs: chosen by hand.
    """

    N: int | None = None
    bias_dtype: torch.dtype | None = None
    second: str = ""
    mask: str = ""
    features: tuple[str, ...] = ()
    configs: dict[str, Any] = field(default_factory=dict)

    def calls(self) -> list[Call]:
        def of(pattern: str, dtype: torch.dtype) -> torch.Tensor | None:
            sizes = (B, H, self.S, self.N or self.S)
            return empty(*(1 if c == "1" else n for c, n in zip(pattern, sizes, strict=True)), dtype=dtype) if pattern else None

        k = empty(B, self.N or self.S, self.Hk, self.D, dtype=self.dtype)
        given = Given(
            q=empty(B, self.S, H, self.D, dtype=self.dtype), k=k, v=k, bias=of(self.bias, self.bias_dtype or self.dtype),
            mask=of(self.mask, torch.bool), second_bias=of(self.second, self.dtype),
            key_lengths=empty(B, dtype=torch.int32) if "lengths" in self.features else None,
            alibi_slopes=empty(H, dtype=F32) if "slopes" in self.features else None,
            sink=empty(H, dtype=self.dtype) if "sink" in self.features else None,
            dropout_seed=empty(2, dtype=torch.int64) if self.options.get("dropout_p") else None,
        )  # fmt: skip
        with override_configs(**self.configs):
            call = bind(ATTENTION, given, Options(**self.options, backend=self.backend), SM90)
            operands = call.form.operands((*given[:9], None, None, None, None, given.second_bias))
            nothing, needs = Needs(*[False] * 4), Needs(*(letter in self.wants for letter in "qkvb"), dsecond="s" in self.wants)
            calls = ahead.calls_of(plan_forward(call.spec, SM90, self.backend), call.spec, nothing, *operands)
            if self.wants:
                calls += ahead.calls_of(plan_backward(call.spec, needs, SM90, self.backend), call.spec, needs, *operands)
        for kernel, config in self.configs.items():
            assert any(each.config == config for each in calls), f"{self.name}: {kernel} is not launched by {config}"
        return calls


@dataclass(frozen=True)
class Packed(Problem):
    """Of ``attention_varlen``: S rows in 16 sequences."""

    S: int = 32768

    def tensors(self) -> tuple[torch.Tensor, ...]:
        q, k = (empty(self.S, heads, self.D, dtype=self.dtype) for heads in (H, self.Hk))
        return q, k, k

    def named(self) -> dict[str, Any]:
        letters = {"q": "q", "k": "k", "v": "v", "b": "bias"}
        tensors = {"cu_seqlens_q": empty(SEQUENCES + 1, dtype=torch.int32)}
        tensors |= {"bias": empty(*self.bias, dtype=self.dtype)} if self.bias else {}
        tensors |= {"dropout_seed": empty(2, dtype=torch.int64)} if "dropout_p" in self.options else {}
        grads = [letters[letter] for letter in self.wants]
        return {"of": triflash.attention_varlen, "grads": grads, "backend": self.backend, **tensors, **self.options}


@dataclass(frozen=True)
class Cache(Problem):
    """Of ``attention_with_kvcache``: 4 requests of M new rows, on S keys. page: keys of a page; 0: no pages. bias: a letter for any."""

    D: int = 128
    S: int = 4096
    Hk: int = 2
    backend: str = "triton"
    M: int = 1
    page: int = 0
    packed: bool = False
    fp8: bool = False

    def tensors(self) -> tuple[torch.Tensor, ...]:
        slots = (600, self.page) if self.page else (B, self.S)
        cache = empty(*slots, self.Hk, self.D, dtype=torch.float8_e4m3fn if self.fp8 else self.dtype)
        return self._rows(H), cache, cache

    def _rows(self, heads: int) -> torch.Tensor:
        return empty(*((B * self.M,) if self.packed else (B, self.M)), heads, self.D, dtype=self.dtype)

    def named(self) -> dict[str, Any]:
        new = self._rows(self.Hk)
        tensors = {"cache_lengths": empty(B, dtype=torch.int32), "k_new": new, "v_new": new}
        tensors |= {"page_table": empty(B, self.S // self.page, dtype=torch.int32)} if self.page else {}
        tensors |= {"k_scale": empty(self.Hk, dtype=F32), "v_scale": empty(self.Hk, dtype=F32)} if self.fp8 else {}
        tensors |= {"bias": empty(B, H, self.M, self.S, dtype=self.dtype)} if self.bias else {}
        tensors |= {name: empty(B + 1, dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_new") if self.packed}
        longest = {"max_seqlen_q": self.M} if self.packed else {}
        return {"of": triflash.attention_with_kvcache, "backend": self.backend, "causal": True, **tensors, **longest}


B, H, SEQUENCES = 4, 8, 16
P, CAUSAL, WINDOW = Dense, {"causal": True}, {"window": (500, 100)}
SLOW = {"separate_dq": False, "deferred": False}
PING_PONG = ForwardConfig(2, 64, 2, ping_pong=True, separate_o=False)
EVERY = {"dropout_p": 0.1, "softcap": 30.0, "causal": True}
PROBLEMS = (
    P("d64 full"),
    P("d64 causal", options=CAUSAL),
    P("d64 causal, short", S=512, options=CAUSAL),
    P("d64 uneven, fp16", S=2000, dtype=F16),
    P("d64 fixed order", options={"deterministic": True}),
    P("d64 fixed order, causal", S=2000, options={"deterministic": True, "causal": True}),
    P("d64 window", options=WINDOW),
    P("d64 grouped, window", Hk=2, options=WINDOW),
    P("d64 one key head", S=512, Hk=1, options=CAUSAL),
    P("d64 by TMA", options=CAUSAL, configs={"dqdkdv": DkdvConfig(2, 1), "forward": PING_PONG}),
    P("d64 dq warpgroup",
      configs={"dqdkdv": DkdvConfig(2, 2, dq_warpgroup=True, unroll=2), "forward": ForwardConfig(2, 128, 2, q_stages=2)}),
    P("d64 dq of pairs", S=384, configs={"dqdkdv": DkdvConfig(2, 2, kv_stages=2, dq_warpgroup=True, unroll=2, dq_blocks=6)}),
    P("d64 red dq", options=CAUSAL, configs={"dqdkdv": DkdvConfig(2, 2, red_dq=True, unroll=2), "forward": ForwardConfig(1, 64, 2)}),
    P("d64 three consumers", configs={"forward": ForwardConfig(3, 128, 2, ping_pong=True)}, wants=""),
    P("d128 full", D=128),
    P("d128 causal", D=128, options=CAUSAL),
    P("d128 fixed order", D=128, options={"deterministic": True}),
    P("d128 window, uneven", D=128, S=2000, options=WINDOW),
    P("d256 full", D=256),
    P("d256 causal, fp16", D=256, dtype=F16, options=CAUSAL),
    P("d256 bias, mask, all else", D=256, bias="1hqk", mask="b11k", features=("lengths", "slopes"), options=EVERY),
    P("d160 causal, grouped", D=160, Hk=2, options=CAUSAL),
    P("d192 full, uneven", D=192, S=2000),
    P("d80 causal", D=80, options=CAUSAL),
    P("d96 bias", D=96, bias="1hqk", wants="qkvb"),
    P("d32 causal", D=32, options=CAUSAL),
    P("d40 fp16", D=40, dtype=F16, S=1000),
    P("d64 bias", bias="1hqk", wants="qkvb"),
    P("d64 bias, causal", bias="1hqk", wants="qkvb", options=CAUSAL),
    P("d64 float32 bias", bias="1hqk", bias_dtype=F32, wants="qkvb", S=2000),
    P("d64 full bias, causal", bias="bhqk", wants="qkvb", S=1024, options=CAUSAL),
    P("d64 full bias", bias="bhqk", wants="qkvb", S=1024),
    P("d64 bias of keys", bias="b11k", wants="qkvb"),
    P("d64 bias of queries", bias="1hq1", wants=""),
    P("d64 boolean bias", bias="11qk", bias_dtype=torch.bool, options=CAUSAL, configs={"mask_bounds": MASK_BOUNDS}),
    P("d64 bias, mask, lengths", bias="1hqk", mask="b11k", features=("lengths",), wants="qkvb"),
    P("d64 bias, mask of queries", bias="1hqk", mask="b1qk", wants="qkv"),
    P("d64 all", bias="1hqk", mask="b11k", features=("lengths", "slopes", "sink"), wants="qkvb", options=EVERY),
    P("d64 slopes", features=("slopes",)),
    P("d64 slopes, causal", features=("slopes",), options=CAUSAL),
    P("d64 soft cap", options={"softcap": 30.0}),
    P("d64 dropout", options={"dropout_p": 0.1}),
    P("d64 lengths, sink", features=("lengths", "sink"), options=CAUSAL),
    P("d32 two biases", D=32, S=384, bias="b11k", second="1hqk", wants="qkvbs"),
    P("d32 two biases, fixed order", D=32, S=384, bias="1hqk", second="b11k", wants="qkvbs", options={"deterministic": True}),
    P("d64 two biases, causal", S=2000, bias="bhqk", second="111k", wants="qkvbs", options=CAUSAL),
    P("d128 two biases, float32", D=128, bias="1hqk", second="b11k", bias_dtype=F32, wants="qkvbs"),
    P("d256 two biases, mask", D=256, bias="1hqk", second="b11k", mask="b11k", wants="qkvbs"),
    P("d128 bias", D=128, bias="1hqk", wants="qkvb"),
    P("d128 bias, causal", D=128, bias="1hqk", wants="qkvb", options=CAUSAL),
    P("d128 bias of keys", D=128, bias="1h1k", wants="qkvb"),
    P("d128 slopes, soft cap, dropout, sink", D=128, features=("slopes", "sink"), options=EVERY),
    P("d128 dbias of one consumer", D=128, bias="1hqk", wants="b", configs={"dbias": DbiasConfig(1, 64, 6, 6)}),
    P("d128 dq not deferred", D=128, S=1000, options={"deterministic": True},
      configs={"dq": DqConfig(2, 64, 2, 2, ping_pong=True, **SLOW)}),
    P("portable d64", backend="triton", options=CAUSAL),
    P("portable d128, bias", D=128, backend="triton", bias="1hqk", wants="qkvb"),
    P("portable, all", backend="triton", bias="1hqk", mask="b11k", features=("lengths", "slopes", "sink"), wants="qkvb", options=EVERY),
    P("portable, bias of keys, fp32", backend="triton", dtype=F32, bias="b11k", wants="qkvb", S=1000),
    P("portable, full bias", backend="triton", bias="bhqk", wants="qkvb", S=1000),
    P("short d64", S=64, backend="auto"),
    P("short d32, bias", D=32, S=49, backend="auto", bias="1hqk", wants="qkvb"),
    P("short d64, many queries, causal", S=2048, N=77, backend="auto", options=CAUSAL),
    P("short, all", S=60, backend="triton", bias="bhqk", mask="b11k", features=("lengths", "slopes", "sink"), wants="qkvb", options=EVERY,
      configs={"short_forward": ShortConfig(64, 64, 4, 1), "short_backward": ShortConfig(64, 64, 4, 2)}),
    P("few d64", S=8, N=8192, backend="triton"),
    P("few d128, grouped, bias", D=128, S=1, N=8192, Hk=2, backend="triton", bias="1hqk", wants="qkvb",
      configs={"few_backward": FewConfig(16, 64, 4, 2, splits=4)}),
    Packed("packed d64 causal", options=CAUSAL),
    Packed("packed d128, fixed order", D=128, Hk=2, options={"deterministic": True}),
    Packed("packed d256 window", D=256, options=WINDOW),
    Packed("packed d64 tiny", S=512, options=CAUSAL),
    Packed("packed d64, many tiles", S=131072, options=CAUSAL),
    Packed("packed d64, a shared bias", bias=(1, H, 2048, 2048), wants="qkvb", options=CAUSAL),
    Packed("packed d64, a bias by rows, all", bias=(H, 32768, 2048), options={"bias_layout": "rows", **EVERY}),
    Packed("packed d64, a bias of keys", bias=(H, 32768), options={"bias_layout": "keys", **CAUSAL}),
    Packed("packed portable d64", S=4096, backend="triton", options=CAUSAL),
    Packed("packed portable, a shared bias", S=4096, backend="triton", bias=(1, H, 256, 256), wants="qkvb"),
    Packed("packed portable, a full bias", S=4096, backend="triton", bias=(SEQUENCES, H, 256, 256), wants="qkvb"),
    Packed("packed portable, a bias of keys, all", S=4096, Hk=2, backend="triton", bias=(1, 4096), wants="qkvb",
           options={"bias_layout": "keys", **EVERY}),
    Cache("cache d128"),
    Cache("cache d64, bias", M=4, D=64, bias="k"),
    Cache("cache d128, pages, 8 bits", page=64, fp8=True),
    Cache("cache d128, small pages, packed", M=6, page=16, packed=True),
)  # fmt: skip


def empty(*shape: int, dtype: torch.dtype, wanted: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=wanted)


def described(call: Call) -> str:
    """What a launch hands over: tensors by dtype, shape and strides."""

    def text(x: Any) -> str:
        if isinstance(x, torch.Tensor):
            return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}{list(x.stride())}"
        if type(x).__name__ == "TensorDescriptor":
            return f"map({text(x.base)}, {x.shape}, {x.strides}, {x.block_shape})"
        return f"({', '.join(map(text, x))})" if isinstance(x, tuple) else repr(x)

    names = list(call.kernel.signature.parameters)
    given = {**dict(zip(names, map(text, call.args), strict=False)), **{name: text(x) for name, x in call.constants.items()}}
    return f"{kernel_name(call)} {call.config} programs={call.programs} " + " ".join(f"{n}={x}" for n, x in given.items())


def kernel_name(call: Call) -> str:
    return str(call.kernel.fn.__name__)


def compiled(name: str, number: int) -> tuple[str, str, str]:
    """The name of a problem's launch, its machine code and its PTX."""
    problem = next(p for p in PROBLEMS if p.name == name)
    call = problem.calls()[number]
    kernel = ahead.compile_for(call, "sm90")
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    lines = [re.sub(r"/\*[0-9a-f]+\*/", "", line).strip() for line in text.splitlines()]
    code = [line for line in lines if line and not line.startswith(DIRECTIVES)]
    file_name = re.sub(r"[ ,]+", "-", name) + f".{number}.{kernel_name(call)}"
    return file_name, "\n".join([f"// {ahead.resources(kernel)}", *code, ""]), kernel.asm["ptx"]


def chosen(only: Sequence[str]) -> list[Problem]:
    return [p for p in PROBLEMS if not only or any(text in p.name for text in only)]


def distinct(problems: Sequence[Problem]) -> Iterator[tuple[Problem, int, Call]]:
    """Launches whose kernel is compiled in another way than that of any launch before."""
    seen = set()
    for problem in problems:
        for number, call in enumerate(problem.calls()):
            kinds = tuple(re.sub(r"\d+", "#", text) for text in map(described_kind, call.args))
            key = (kernel_name(call), call.kernel.fn.__module__, kinds, str(call.constants), str(call.config))
            if key not in seen:
                seen.add(key)
                yield problem, number, call


DIRECTIVES = ("//", ".section", ".text", ".type", ".size", ".global", ".other", ".align")


def described_kind(x: Any) -> str:
    return f"{x.base.dtype}{x.block_shape}" if type(x).__name__ == "TensorDescriptor" else str(getattr(x, "dtype", None) or type(x))


def write_keys(folder: Path, only: Sequence[str]) -> None:
    """``launches.txt`` and ``keys.txt``, a line a launch."""
    folder.mkdir(parents=True, exist_ok=True)
    calls = [(f"{p.name}: ", call) for p in chosen(only) for call in p.calls()]
    (folder / "launches.txt").write_text("".join(f"{name}{described(call)}\n" for name, call in calls))
    keys = [(f"{name}{kernel_name(call)} ", ahead.identity(call, "sm90")) for name, call in calls]
    (folder / "keys.txt").write_text("".join(f"{name}{key}\n" for name, key in keys))
    print(f"{len(keys)} launches of {len({key for _, key in keys})} kernels")


def write(folder: Path, only: Sequence[str], workers: int) -> None:
    write_keys(folder, only)
    work = list(distinct(chosen(only)))
    with ProcessPoolExecutor(workers) as pool:
        running = [pool.submit(compiled, problem.name, number) for problem, number, _ in work]
        for count, each in enumerate(as_completed(running), 1):
            name, text, ptx = each.result()
            (folder / f"{name}.sass").write_text(text)
            (folder / f"{name}.ptx").write_text(ptx)
            print(f"{count}/{len(work)} {name} {text.partition(chr(10))[0]}", flush=True)


def nameless(path: Path) -> str:
    """A kernel's PTX without its name, which stands in comments that are padded and in names of parameters."""
    kernel = path.name.split(".")[-2]
    return re.sub(r"\s+", " ", re.sub(rf"\b{kernel}(?=\b|_param)", "kernel", path.read_text()))


def compare(before: Path, after: Path, only: Sequence[str], renamed: dict[str, str]) -> int:
    """How many kernels of ``after`` differ from those of ``before``, or are in one of them alone; prints a table."""
    wanted = [re.sub(r"[ ,]+", "-", text) for text in only]

    def found(folder: Path, renamed: dict[str, str]) -> dict[str, Path]:
        files = [f for f in folder.glob("*.sass") if not wanted or any(w in f.name for w in wanted)]
        return {".".join(renamed.get(part, part) for part in f.name.split(".")): f for f in files}

    names = [found(before, renamed), found(after, {})]
    bad = 0
    for name in sorted({*names[0], *names[1]}):
        if name not in names[0] or name not in names[1]:
            same, result = False, f"only in {before if name in names[0] else after}"
        else:
            one, other = (each[name].read_text().splitlines() for each in names)
            ptx = [nameless(each[name].with_suffix(".ptx")) for each in names]
            changed = sum(line[:1] in "+-" for line in difflib.unified_diff(one, other, n=0)) if one != other else 0
            same = one == other or ptx[0] == ptx[1]
            result = f"{len(one) - 1} lines" if one == other else f"{changed} lines in another order, of the same PTX"
            result = result if same else f"DIFFERS in {changed} lines: {one[0]}, {other[0]}"
        bad += not same
        print(f"{name}: {result}")
    print(f"{len({*names[0], *names[1]})} kernels, {bad} differ")
    return bad + compare_lines(before, after, only)


def compare_lines(before: Path, after: Path, only: Sequence[str]) -> int:
    """How many launches of one are compiled from what none of the other is, where there is no machine code of both to tell; prints it."""

    def lines(folder: Path, name: str) -> list[str]:
        text = (folder / name).read_text() if (folder / name).exists() else ""
        return [line for line in text.splitlines() if not only or any(part in line.partition(": ")[0] for part in only)]

    changed = {}
    for name in ("launches.txt", "keys.txt"):
        one, other = (Counter(lines(folder, name)) for folder in (before, after))
        changed[name] = max((one - other).total(), (other - one).total())
    print(f"{changed['launches.txt']} launches with other arguments, {changed['keys.txt']} compiled from something else")
    return 0 if any(before.glob("*.sass")) and any(after.glob("*.sass")) else changed["keys.txt"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["write", "keys", "compare"])
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--only", action="append", default=[], help="part of a problem's name")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--renamed", action="append", default=[], metavar="OLD=NEW", help="a kernel, or another part of a file's name")
    options = parser.parse_args(argv)
    if len(options.folder) != (2 if options.what == "compare" else 1):
        parser.error("write and keys take one folder, compare two")
    if options.what == "keys":
        write_keys(options.folder[0], options.only)
        return 0
    if options.what == "write":
        os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # the same instructions at other lines of the source are the same
        write(options.folder[0], options.only, options.workers)
        return 0
    renamed = dict(text.split("=", 1) for text in options.renamed)
    return int(compare(*options.folder, options.only, renamed) > 0)


if __name__ == "__main__":
    sys.exit(main())
