"""The bench's command line and its defaults."""

from __future__ import annotations

import argparse
import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import bad_value
from .. import shorthand
from .flops import HOST_PASSES, PASSES
from .models import LAYERS, MODELS, named, sample
from .packed import KINDS, TOKENS
from .providers import PROVIDERS, provider
from .sweeps import SWEEPS, Job
from .workloads import DECODE, DTYPES, NAMED, Workload, short

__all__ = ["Options", "add_arguments", "listing"]

_SHAPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"d": "64,128", "s": "2k,8k", "b": 4, "h": 16, "causal": "both", "bias": "none,1hqk", "dbias": "off"},
    "cpu": {"d": "64", "s": "512,1k", "b": 1, "h": 4, "causal": "both", "bias": "none,1hqk", "dbias": "on"},
}
_DEFAULTS = {
    "cuda": {"dtype": "bf16", "pass": "fwd,bwd", "providers": "triflash,sdpa-flash,sdpa-cudnn,sdpa-efficient,flex,fa4"},
    "cpu": {"dtype": "fp32", "pass": "fwd,bwd", "providers": "triflash,sdpa,dense"},
}
_PACKED_PROVIDERS = {"cuda": "triflash,triflash-dense,torch-varlen,flex,fa4", "cpu": "triflash,triflash-dense,dense"}
_BUDGET = 0.25  # seconds for each provider and pass; sweeps have their own
_CPU_TOKENS = 1024
_HOST = "host"  # on the command line: all of the host's passes
_ON = {"off": (False,), "on": (True,), "both": (False, True)}
_pairs = shorthand.option(shorthand.items(shorthand.pair))


def _one_or_two(text: str) -> str | None:
    """A bias's pattern, or two with a stroke between them."""
    patterns = [shorthand.bias_pattern(each) for each in text.split("/")]
    if len(patterns) > 2 or (len(patterns) == 2 and None in patterns):
        raise bad_value("bias", "one pattern, none, or two such as 1hqk/b11k", repr(text))
    return None if patterns[0] is None else "/".join(map(str, patterns))


_biases = shorthand.option(shorthand.items(_one_or_two))
_size, _causal = shorthand.option(shorthand.size), shorthand.option(shorthand.causal)


@dataclass(frozen=True)
class Options:
    """A run, resolved: its jobs, in order.

    words: the command line, for the record. prepare: worker processes; part: this process is one of them, (i, n). sweep: the name of the
    one that the jobs are from, or nothing. all: whether cells without a cliff are shown, too. breakdown: whether steps of triflash are
    taken apart.
    """

    jobs: tuple[Job, ...]
    sweep: str
    all: bool
    breakdown: bool
    device: str
    budget: float
    min_samples: int
    seed: int
    prepare: int
    part: tuple[int, int] | None
    out: Path
    note: str
    words: tuple[str, ...]

    @classmethod
    def of(cls, given: argparse.Namespace, gpu: bool, words: list[str]) -> Options:
        """Fill what the user left open with the device's defaults. Raises ValueError naming a bad option."""
        device = given.device or ("cuda" if gpu else "cpu")
        kind = device.split(":")[0]
        if kind == "cuda" and not gpu:
            raise ValueError(f"--device {device}: PyTorch sees no GPU here")
        chosen = {name: getattr(given, name) or default for name, default in _DEFAULTS[kind].items()}
        if given.packed and not given.providers:
            chosen["providers"] = _PACKED_PROVIDERS[kind]
        if given.breakdown and not getattr(given, "pass"):
            chosen["pass"] = _HOST
        dtypes = _choices("--dtype", chosen["dtype"], tuple(DTYPES))
        passes = [
            name for word in _choices("--pass", chosen["pass"], (*PASSES, _HOST)) for name in (HOST_PASSES if word == _HOST else (word,))
        ]
        if given.breakdown and "host-step" not in passes:
            passes.append("host-step")
        providers = list(PROVIDERS) if chosen["providers"] == "all" else _some("--providers", _list(chosen["providers"]))
        for name in providers:
            provider(name)
        shape = [f"--{name}" for name in (*_SHAPE_DEFAULTS[kind], "tokens", "hd", "packed") if getattr(given, name) is not None]
        if given.packed and "first" in passes:
            raise ValueError("--pass first: packed sequences are drawn for one number of tokens; drop it, or drop --packed")
        if given.sweep:
            jobs = _swept(given, shape, {"providers": providers, "pass": passes})
        else:
            for option in ("count", "all_cells"):
                if getattr(given, option):
                    raise ValueError(f"--{option.split('_')[0]}: is for --sweep models")
            jobs = [
                Job(w, tuple(dict.fromkeys(providers)), tuple(dict.fromkeys(_of_caches(passes) if w.cache else passes)))
                for w in _workloads(given, shape, kind)
            ]
        return cls(
            jobs=tuple(replace(job, workload=replace(job.workload, dtype=dtype)) for dtype in dtypes for job in jobs),
            sweep=given.sweep or "",
            all=given.all_cells,
            breakdown=given.breakdown,
            device=device,
            budget=given.budget or (SWEEPS[given.sweep].budget if given.sweep else _BUDGET),
            min_samples=given.min_samples,
            seed=given.seed,
            prepare=min(8, (os.cpu_count() or 2) // 2) if given.prepare is None else given.prepare,
            part=given.prepare_part,
            out=given.out,
            note=given.note,
            words=tuple(words),
        )

    @property
    def workloads(self) -> list[Workload]:
        """Each once."""
        return list(dict.fromkeys(job.workload for job in self.jobs))

    @property
    def passes(self) -> list[str]:
        """Of all jobs."""
        return list(dict.fromkeys(which for job in self.jobs for which in job.passes))


def _of_caches(passes: list[str]) -> list[str]:
    """A KV cache has no backward pass: those of the passes asked for that need none, or the forward pass."""
    return [name for name in passes if name in ("fwd", "host-nograd")] or ["fwd"]


def _workloads(given: argparse.Namespace, shape: list[str], kind: str) -> list[Workload]:
    """The named ones, or the grid's."""
    if not given.workload:
        if given.tiny:
            raise ValueError("--tiny: is for named workloads and sweeps; choose small --s yourself")
        return _packed_grid(given, kind) if given.packed else _grid(given, kind)
    if shape:
        raise ValueError(f"{', '.join(shape)}: a named workload has its own shape; drop them, or drop --workload")
    found = [w for name in _some("--workload", _list(given.workload)) for w in named(name)]
    return list(dict.fromkeys(w.shrunk() if given.tiny else w for w in found))


def _swept(given: argparse.Namespace, shape: list[str], chosen: dict[str, list[str]]) -> list[Job]:
    """The jobs of a sweep, of which ``--providers`` and ``--pass`` choose some; ``chosen`` are these, or the device's defaults."""
    if shape or given.workload:
        raise ValueError(f"{', '.join(shape or ['--workload'])}: a sweep has its own problems; drop them, or drop --sweep")
    sweep = SWEEPS[given.sweep]
    if sweep.cliffs:
        return _for_cliffs(given, chosen)
    for option in ("count", "all_cells"):
        if getattr(given, option):
            raise ValueError(f"--{option.split('_')[0]}: is for --sweep models, whose cells are many")
    jobs = []
    for job in sweep.jobs:
        providers = [name for name in job.providers if not given.providers or name in chosen["providers"]]
        passes = [which for which in job.passes if not getattr(given, "pass") or which in chosen["pass"]]
        if providers and passes:
            workload = job.workload.shrunk() if given.tiny else job.workload
            jobs.append(Job(workload, tuple(providers), tuple(passes)))
    if not jobs:
        raise ValueError("--providers, --pass: the sweep has none of these together")
    return jobs


def _for_cliffs(given: argparse.Namespace, chosen: dict[str, list[str]]) -> list[Job]:
    """All layers or a sample, each beside all peers. A cell is two times: without triflash, or without peers, there is nothing to show."""
    providers = tuple(dict.fromkeys(chosen["providers"]))
    ours = [name.startswith("triflash") for name in providers]
    if all(ours) or not any(ours):
        raise ValueError(f"--providers {','.join(providers)}: wanted triflash and its peers, which --sweep {given.sweep} compares")
    if "first" in chosen["pass"]:
        raise ValueError("--pass first: its lengths are not the models'; wanted some of " + ", ".join(p for p in PASSES if p != "first"))
    layers = sample(given.count, given.seed)
    passes = tuple(dict.fromkeys(chosen["pass"]))
    of_caches = tuple(_of_caches(list(passes)))
    return [Job(w.shrunk() if given.tiny else w, providers, of_caches if w.cache else passes) for w in layers]


def _grid(given: argparse.Namespace, kind: str) -> list[Workload]:
    """The product of the shape options."""
    if given.tokens and given.b:
        raise ValueError("--tokens, --b: give one of them")
    if given.hd and given.h:
        raise ValueError("--hd, --h: give one of them")
    defaults = _SHAPE_DEFAULTS[kind]
    parsed = {"d": _pairs, "s": _pairs, "causal": _causal, "bias": _biases}
    chosen: dict[str, Any] = {n: getattr(given, n) or parsed.get(n, lambda default: default)(defaults[n]) for n in defaults}
    found = []
    for bias, (d, dv), (m, n), causal in itertools.product(chosen["bias"], chosen["d"], chosen["s"], chosen["causal"]):
        b = shorthand.quotient("--tokens", given.tokens, "--s", m) if given.tokens else chosen["b"]
        h = shorthand.quotient("--hd", given.hd, "--d", d) if given.hd else chosen["h"]
        for dbias in _ON[chosen["dbias"]] if bias else (False,):
            words = [f"d{d}" + (f"x{dv}" if dv != d else ""), f"s{short(m)}" + (f"x{short(n)}" if n != m else "")]
            words += ["causal" if causal else "full"]
            words += [bias + ("+db" if dbias else "")] if bias else []
            first, _, second = (bias or "").partition("/")
            biases: dict[str, Any] = {"bias": first or None, "second": second or None, "dbias": dbias}
            found.append(Workload(" ".join(words), b, h, m, n, d, value_dim=dv, hi=0 if causal else None, **biases))
    return list(dict.fromkeys(found))


def _packed_grid(given: argparse.Namespace, kind: str) -> list[Workload]:
    """The product of the shape options and the kinds of packed sequences."""
    kinds = _choices("--packed", given.packed, tuple(KINDS))
    if given.b:
        raise ValueError("--b: packed sequences are as many as --tokens has room for; give --tokens")
    if given.s and "equal" not in kinds:
        raise ValueError(f"--s: --packed {given.packed} has lengths of its own; only equal takes one")
    if given.hd and given.h:
        raise ValueError("--hd, --h: give one of them")
    defaults = _SHAPE_DEFAULTS[kind]
    parsed = {"d": _pairs, "s": _pairs, "causal": _causal, "bias": _biases}
    chosen: dict[str, Any] = {n: getattr(given, n) or parsed.get(n, lambda default: default)(defaults[n]) for n in defaults}
    found = []
    for bias, name, (d, dv), causal in itertools.product(chosen["bias"], kinds, chosen["d"], chosen["causal"]):
        if bias is not None and "/" in bias:
            raise ValueError(f"--bias {bias}: two biases are for a batch here, not for packed sequences")
        if bias is not None and len(bias) > 4:
            raise ValueError(f"--bias {bias}: packed sequences have one batch level; b is a bias of each")
        h = shorthand.quotient("--hd", given.hd, "--d", d) if given.hd else chosen["h"]
        tokens = given.tokens or (TOKENS[name] if kind == "cuda" else _CPU_TOKENS)
        for length in chosen["s"] if name == "equal" else [(0, 0)]:
            if length[0] != length[1]:
                raise ValueError(f"--s {length[0]}x{length[1]}: packed sequences have as many queries as keys here")
            if name == "equal":
                shorthand.quotient("--tokens", tokens, "--s", length[0])
            for dbias in _ON[chosen["dbias"]] if bias else (False,):
                words = [f"{name} {short(length[0])}" if name == "equal" else name, f"d{d}" + (f"x{dv}" if dv != d else "")]
                words += [f"t{short(tokens)}", "causal" if causal else "full", *([bias + ("+db" if dbias else "")] if bias else [])]
                found.append(Workload(
                    " ".join(words), 1, h, tokens, tokens, d, value_dim=dv, hi=0 if causal else None, bias=bias, dbias=dbias,
                    about=f"packed: {KINDS[name]}", packed=name, packed_seed=given.seed, length=length[0],
                ))  # fmt: skip
    return list(dict.fromkeys(found))


def _list(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _some(option: str, words: list[str]) -> list[str]:
    if not words:
        raise ValueError(f"{option}: wanted at least one name, got none")
    return words


def _choices(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    words = _some(option, _list(text))
    for word in words:
        if word not in known:
            raise ValueError(f"{option} {word}: wanted some of {', '.join(known)}")
    return words


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _effect(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of percent from 0 up")
    return value


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability between 0 and 1")
    return value


def _device(text: str) -> str:
    kind, colon, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not index.isdigit())):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:N")
    return text


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    return int(part), int(parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``triflash bench`` and its commands ``compare`` and ``plot``."""
    gpu, cpu = ({**_SHAPE_DEFAULTS[kind], **_DEFAULTS[kind]} for kind in ("cuda", "cpu"))

    def words(text: str, name: str) -> str:
        return f"{text} (default {gpu[name]}" + (f"; CPU {cpu[name]})" if cpu[name] != gpu[name] else ")")

    add = parser.add_argument
    add(
        "--workload",
        metavar="NAMES",
        help="named workloads, comma-separated: a family such as gemma2, 'decode-*', or all; see --list",
    )
    sweep = "a set of problems, providers and passes, and what to hold them to; --list shows them; without a name: models"
    add("--sweep", choices=tuple(SWEEPS), nargs="?", const="models", help=sweep)
    add("--count", type=_size, metavar="N", help="of --sweep models: N layers, drawn by --seed, instead of all")
    add("--all", dest="all_cells", action="store_true", help="of --sweep models: show all cells, not only those in which a peer is faster")
    add(
        "--packed",
        metavar="KINDS",
        help=f"packed sequences instead of a batch, of {', '.join(KINDS)}, comma-separated; --list tells of them",
    )
    add("--tiny", action="store_true", help="shrink named workloads and sweeps to try something out; says nothing about their speed")
    add("--d", type=_pairs, metavar="SIZES", help=words("head dims; 192x128 is q, k by v", "d"))
    add("--s", type=_pairs, metavar="SIZES", help=words("lengths; 1kx2k is queries by keys", "s"))
    add("--b", type=_size, metavar="N", help=words("batch", "b"))
    add("--h", type=_size, metavar="N", help=words("heads", "h"))
    add("--tokens", type=_size, metavar="N", help="instead of --b: batch times length; of --packed the rows in all")
    add("--hd", type=_size, metavar="N", help="instead of --h: heads times head dim")
    add("--causal", type=_causal, metavar="WHICH", help=words("top-left aligned: yes, no or both", "causal"))
    add("--bias", type=_biases, metavar="KINDS", help=words("none, or bhqk with any letter replaced by 1; two as 1hqk/b11k", "bias"))
    add("--dbias", choices=tuple(_ON), help=words("whether a bias asks for its gradient", "dbias"))
    add("--dtype", metavar="NAMES", help=words(f"of {', '.join(DTYPES)}", "dtype"))
    add(
        "--pass",
        metavar="NAMES",
        help=words(f"of {', '.join(PASSES)}, or {_HOST} for all of its own; docs/bench.md tells what they time", "pass"),
    )
    add("--providers", metavar="NAMES", help=words("see --list, or all", "providers"))
    add("--breakdown", action="store_true", help="also where the host's time of a step of triflash goes, by piece, file and function")
    words_of_budget = f"seconds of samples for each provider and pass (default {_BUDGET}; a sweep has its own)"
    add("--budget", type=_seconds, metavar="S", help=words_of_budget)
    add("--min-samples", type=_size, default=10, metavar="N", help="samples even if the budget is spent (default 10)")
    add("--seed", type=_seed, default=0, metavar="N", help="of the random inputs, and of the layers that --count draws (default 0)")
    add("--device", type=_device, metavar="DEVICE", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--prepare", type=_count, metavar="N", help="on a GPU, first compile everything in N processes (default half the cores, up to 8)")
    add("--prepare-part", type=_part, help=argparse.SUPPRESS)
    add("--note", default="", metavar="TEXT", help="kept with the results")
    add("--out", type=Path, default=Path("bench-out"), metavar="DIR", help="where tables, samples and plots go (./bench-out)")
    add("--list", action="store_true", help="list the named workloads and the providers, and stop")
    commands = parser.add_subparsers(dest="bench_command", metavar="command", required=False)
    compare = commands.add_parser("compare", help="what moved between two runs", description="What moved between two runs, beyond noise.")
    compare.add_argument("before", type=Path, help="bench.json of one run")
    compare.add_argument("after", type=Path, help="bench.json of the other")
    compare.add_argument(
        "--effect", type=_effect, default=2.0, metavar="PERCENT", help="smallest change of the median to report (default 2)"
    )
    compare.add_argument(
        "--alpha", type=_probability, default=0.01, metavar="P", help="chance of one false report in the whole table (default 0.01)"
    )
    compare.add_argument("--all", action="store_true", help="show also what did not move")
    plot = commands.add_parser("plot", help="draw a run again", description="Write the tables and plots of a run again from its samples.")
    plot.add_argument("run", type=Path, help="bench.json of a run")
    plot.add_argument("--out", dest="plot_out", type=Path, metavar="DIR", help="where to (default: beside the file)")
    alone = "write one picture alone, PNG or SVG: speed and peak memory with a bias and its gradient over sequence length"
    plot.add_argument("--picture", type=Path, metavar="FILE", help=alone)


def listing() -> str:
    """What ``--list`` prints."""
    width = max(map(len, (*NAMED, *LAYERS)))
    lines = ["Workloads:"]
    for w in NAMED.values():
        sizes = (
            f"b {w.batch}, h {w.heads}" + (f" on {w.kv_heads}" if w.kv_heads != w.heads else "") + f", s {short(w.queries)}, d {w.head_dim}"
        )
        features = [w.mask if w.is_banded else "", f"bias {w.biases}" if w.bias else "", "with its gradient" if w.dbias else ""]
        lines.append(f"  {w.name:<{width}}  {w.about} ({', '.join(x for x in (sizes, *features) if x)})")
    lines += ["Layers of models, by name or in --sweep models, beside those above:"]
    for model in MODELS:
        names = [w.name for w in model.layers if w.name not in NAMED and w.name not in DECODE]
        lines += [f"  {name:<{width}}  {model.name}: {LAYERS[name].about}" for name in names]
    lines += ["Steps of decoding, by name or all by decode:"]
    lines += [f"  {w.name:<{width}}  {w.about}" for w in DECODE.values()]
    lines += ["Packed sequences:", *(f"  {name:<{width}}  {about}" for name, about in KINDS.items())]
    lines += ["Sweeps:", *(f"  {name}  {sweep.about}" for name, sweep in SWEEPS.items())]
    return "\n".join([*lines, "Providers:", "  " + ", ".join(PROVIDERS)])
