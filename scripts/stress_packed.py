"""Puts packed sequences on the Hopper kernels under stress on an sm90 GPU: for whoever changes their tables, their grids or their loads.

    python3 scripts/stress_packed.py --random 2000           so many random sets of offsets, forward and backward, judged and watched
    python3 scripts/stress_packed.py --only 3:17             one of them again, here, by the name that a report gave it
    python3 scripts/stress_packed.py --repeat 10000          a few problems again and again: the same bits of out, lse and every gradient
    python3 scripts/stress_packed.py --graph 50              a captured step, replayed over other offsets: the bits of an eager one
    python3 scripts/stress_packed.py --sanitize memcheck     small problems, wrong offsets among them, under compute-sanitizer

What ``stress_hopper.py`` does with a batch, whose processes and patience this has. Every eighth problem of --random has offsets that are
wrong: decreasing, negative, or beyond the tensors. It must end. The others are judged against a padded batch in float64 by what rounding
can do, as there. Rows of no sequence hold NaN, and must come out as 0 (lse: −inf), with gradients of 0.
The exit status is 1 if anything was wrong, different or stuck.
"""

import argparse
import functools
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from stress_hopper import DTYPES, TOGETHER, sanitize, silent, watch
from triflash import attention_varlen
from triflash.plan.device import facts_of

PER_FAMILY = 84  # problems that share what a kernel is compiled for
LEAVES = ("q", "k", "v", "bias", "sink")


@dataclass(frozen=True)
class Packed:
    """Sequences and the options of a call. bias: its layout, "" without one; own: it is of each sequence and head, not shared by all. used:
    a sequence's last rows do not count. wrong: what is the matter with the offsets. spare: rows of no sequence at the end. aligned: rows of
    the bias begin at multiples of 16 elements.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    H: int = 2
    Hk: int = 2
    D: int = 64
    dtype: str = "bf16"
    bias: str = ""
    own: bool = False
    causal: bool = False
    window: int | None = None  # of keys to the left
    softcap: float = 0.0
    deterministic: bool = False
    used: bool = False
    wrong: str = ""
    spare: int = 0
    aligned: bool = True
    sink: bool = False
    short: int = 0  # so many rows of the longest sequences are behind a padded bias's last
    seed: int = 0

    def offsets(self, lengths: tuple[int, ...]) -> list[int]:
        """As the call gets them."""
        right = [0, *accumulate(lengths)]
        total = right[-1]
        if self.wrong == "decreasing":
            return right[::-1]
        if self.wrong == "negative":
            return [x - total // 2 for x in right]
        if self.wrong == "beyond":
            return [3 * x for x in right]
        if self.wrong == "huge":
            return [x + (2**30 if i % 2 else 0) for i, x in enumerate(right)]
        return right

    def counted(self) -> tuple[list[int], list[int]]:
        """How many of each sequence's queries and keys count."""
        queries, keys = list(self.queries), list(self.keys)
        return ([max(n - 3, 0) for n in queries], [n // 2 for n in keys]) if self.used else (queries, keys)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """q, k, v and bias, dout and dlse, offsets and used lengths."""
        generator = torch.Generator(device).manual_seed(self.seed)
        rows, columns = sum(self.queries) + self.spare, sum(self.keys) + self.spare
        longest_q, longest_k = max(self.queries), -(-max(self.keys) // 16) * 16 + (not self.aligned)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(DTYPES[self.dtype])

        heads = self.H if self.own else 1
        shape = {
            "padded": (len(self.queries) if self.own else 1, self.H, max(longest_q - self.short, 1), longest_k),
            "rows": (heads, rows, longest_k),
            "keys": (heads, columns),
        }.get(self.bias)  # fmt: skip
        x = {"q": normal(rows, self.H, self.D), "k": normal(columns, self.Hk, self.D), "v": normal(columns, self.Hk, self.D)}
        if shape:
            x["bias"] = normal(*shape)
        if self.sink:
            x["sink"] = normal(self.H)
        x["dout"], x["dlse"] = normal(rows, self.H, self.D), normal(self.H, rows).float()
        if not self.wrong:
            for side, names in zip(_sides(self, device), (("q",), ("k", "v")), strict=True):
                for name in names:
                    nobody = torch.ones(x[name].shape[0], dtype=torch.bool, device=device)
                    nobody[side[0][side[1]]] = False
                    x[name][nobody] = torch.nan
        for name, lengths, counted in zip("qk", (self.queries, self.keys), self.counted(), strict=True):
            x[f"cu_seqlens_{name}"] = torch.tensor(self.offsets(lengths), dtype=torch.int32, device=device)
            if self.used:
                x[f"seqused_{name}"] = torch.tensor(counted, dtype=torch.int32, device=device)
        return x


def _sides(problem: Packed, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Of queries and of keys: which row of the packed tensor each one of the padded batch is, and whether there is one."""
    found = []
    for lengths, counted in zip((problem.queries, problem.keys), problem.counted(), strict=True):
        begins = torch.tensor([0, *accumulate(lengths)][:-1], device=device)
        at = torch.arange(max(lengths), device=device)
        there = at < torch.tensor(counted, device=device)[:, None]
        found.append((torch.where(there, begins[:, None] + at, 0), there))
    return found


def step(problem: Packed, x: dict[str, Tensor], backend: str = "hopper") -> list[Tensor]:
    """out, lse, and the gradients of q, k, v and the bias."""
    leaves = {name: x[name].detach().requires_grad_() for name in LEAVES if name in x}
    more = {name: x[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k") if name in x}
    window = None if problem.window is None else (problem.window, None)
    out, lse = attention_varlen(
        **leaves, **more, bias_layout=problem.bias or "padded", causal=problem.causal, window=window, softcap=problem.softcap or None,
        deterministic=problem.deterministic, return_lse=True, backend=backend,
    )  # fmt: skip
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], list(leaves.values()), [x["dout"], x["dlse"]])]


def exact(problem: Packed, x: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """The same as a padded batch in float64, and the sum of p |v|, by which out is judged."""
    (rows, is_row), (columns, is_key) = _sides(problem, x["q"].device)
    leaves = {name: x[name].double().nan_to_num().requires_grad_() for name in LEAVES if name in x}
    q, k, v = (leaves[name][at] * there[:, :, None, None] for name, at, there in (
        ("q", rows, is_row), ("k", columns, is_key), ("v", columns, is_key)
    ))  # fmt: skip
    k, v = (each.repeat_interleave(problem.H // problem.Hk, 2) for each in (k, v))
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * problem.D**-0.5
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if problem.bias:
        bias = leaves["bias"]
        if problem.bias == "rows":
            bias = bias[:, rows].transpose(0, 1)
        elif problem.bias == "keys":
            bias = bias[:, columns].transpose(0, 1)[:, :, None]
        if bias.shape[2] > 1:  # behind its last row it hides all keys
            bias = torch.nn.functional.pad(bias, (0, 0, 0, max(q.shape[1] - bias.shape[2], 0)), value=-torch.inf)
        scores = scores + bias[:, :, : q.shape[1], : k.shape[1]]
    i, j = (torch.arange(at.shape[1], device=at.device) for at in (rows, columns))
    shift = j - i[:, None] - (is_key.sum(1) - is_row.sum(1))[:, None, None]  # 0 on each sequence's diagonal
    shown = is_row[:, :, None] & is_key[:, None]
    if problem.causal:
        shown = shown & (shift <= 0)
    if problem.window is not None:
        shown = shown & (shift >= -problem.window)
    shown = shown[:, None]
    scores = scores.masked_fill(~shown, -torch.inf)
    sinks = leaves["sink"] if problem.sink else scores.new_full((problem.H,), -torch.inf)
    every = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)], -1)  # a sink is one more key, without a value
    sees = (every > -torch.inf).any(-1) & is_row[:, None]
    lse = torch.logsumexp(every.masked_fill(~sees[..., None], 0.0), -1).masked_fill(~sees, -torch.inf)
    p = torch.exp(scores - lse.masked_fill(~sees, 0.0)[..., None])

    def packed(y: Tensor, fill: float) -> Tensor:
        whole = y.new_full((x["q"].shape[0], *y.shape[2:]), fill)
        return whole.index_put((rows[is_row],), y[is_row])

    out = packed(torch.einsum("bhmn,bnhd->bmhd", p, v), 0.0)
    weight = packed(torch.einsum("bhmn,bnhd->bmhd", p.detach(), v.detach().abs()), 0.0)
    flat = packed(lse.transpose(1, 2), -torch.inf).T
    total = (out * x["dout"]).sum() + torch.where(flat == -torch.inf, 0.0, flat * x["dlse"]).sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    return [out.detach(), flat.detach(), *grads], weight


def names_of(x: dict[str, Tensor]) -> list[str]:
    """Of the results of a problem with these tensors."""
    return ["out", "lse", *(f"d{name}" for name in LEAVES if name in x)]


def judge(problem: Packed, x: dict[str, Tensor], results: list[Tensor]) -> tuple[float, str]:
    """The largest error as a part of what is allowed (up to 1 is right), and where. Of wrong offsets only that a call ends counts."""
    if problem.wrong:
        if x["q"].device.type == "cuda":
            torch.cuda.synchronize()
        return 0.0, "wrong offsets"
    right, weight = exact(problem, x)
    roundoff = torch.finfo(x["q"].dtype).eps / 2
    slack = 1e-6 + max(problem.keys) * 2.0**-25 * 8
    worst, where = 0.0, ""
    for name, got, wanted in zip(names_of(x), results, right, strict=True):
        if name in ("out", "lse"):
            limit = 2.5 * roundoff * weight + slack if name == "out" else 1e-4 * (1 + wanted.abs())
            parts = torch.where(got == wanted, 0.0, (got.double() - wanted).abs() / limit).nan_to_num(torch.inf, torch.inf)
            part = parts.max().item() if parts.numel() else 0.0
        else:
            allowed = (0.012 if x["q"].dtype == torch.bfloat16 else 0.003) * wanted.norm() + 1e-3 * wanted.numel() ** 0.5
            part = ((got.double() - wanted).norm() / allowed).nan_to_num(torch.inf, torch.inf).item()
        if part > worst or not where:
            worst, where = part, name
    return worst, where


def solved(problem: Packed, device: torch.device, backend: str = "hopper") -> tuple[float, str]:
    """The judgement of what a backend makes of a problem."""
    x = problem.tensors(device)
    return judge(problem, x, step(problem, x, backend))


def lengths(chooser: random.Random, spread: str, count: int, mean: int) -> tuple[int, ...]:
    """So many, near ``mean`` in the mean, by which tiles are chosen."""
    weights = [
        {
            "equal": 1.0,
            "even": chooser.random(),
            "skewed": chooser.lognormvariate(0.0, 1.0),
            "mostly empty": float(chooser.random() < 0.3),
        }[spread]
        for _ in range(count)
    ]
    weights[chooser.randrange(count)] += 1e-3  # one that is not empty
    return tuple(round(weight / sum(weights) * mean * count) for weight in weights)


def drawn(seed: int, worker: int, count: int) -> Iterator[Packed]:
    """The problems of one process, always the same."""
    chooser = random.Random(1000 * seed + worker)
    for number in range(count):
        if number % PER_FAMILY == 0:
            H, Hk = chooser.choice([(2, 2), (2, 2), (4, 2), (3, 1)])
            mean = chooser.choice([20, 48, 100, 250])
            band = chooser.choice(["full", "causal", "causal", "window"])
            family = dict(
                H=H, Hk=Hk, D=chooser.choice([64, 128]), dtype=chooser.choice(["bf16", "bf16", "fp16"]),
                bias=chooser.choice(["", "", "", "padded", "rows", "keys"]), own=chooser.random() < 0.5,
                causal=band == "causal", window=chooser.randint(1, 100) if band == "window" else None,
                softcap=chooser.choice([0.0, 0.0, 0.0, 2.0]), deterministic=chooser.random() < 0.5,
                used=chooser.random() < 0.2, aligned=chooser.random() < 0.5, short=chooser.choice([0, 0, 30]),
            )  # fmt: skip
            family["sink"] = chooser.random() < 0.3
        B = 2 * chooser.randint(1, 10) + 1  # odd, as are rows in all: of multiples of 16 Triton makes other kernels
        spread = chooser.choice(["equal", "even", "skewed", "mostly empty"])

        queries = lengths(chooser, spread, B, mean)
        keys = queries if spread == "mostly empty" or chooser.random() < 0.5 else lengths(chooser, spread, B, mean)
        if (sum(queries) - sum(keys)) % 2:
            keys = (*keys[:-1], keys[-1] + 1)
        wrong = chooser.choice(["decreasing", "negative", "beyond", "huge"]) if number % 8 == 7 else ""
        spare = 1 + sum(queries) % 2 + 2 * chooser.randint(0, 2)
        yield Packed(queries, keys, **family, wrong=wrong, spare=spare, seed=chooser.randint(0, 2**31))


SMALL = [
    Packed((130, 1, 0, 300, 64, 17), (130, 1, 0, 300, 64, 17), H=4, Hk=2, bias="padded", causal=True, deterministic=True, spare=7),
    Packed((34,) * 40, (34,) * 40, causal=True, deterministic=True),
    Packed((200, 90, 333), (200, 90, 333), D=128, bias="rows", own=True, deterministic=True, spare=1),
    Packed((100, 260), (300, 64), D=128, bias="keys", window=70, used=True, deterministic=True),
    Packed((70, 0, 130), (70, 0, 130), bias="padded", short=20, sink=True, deterministic=True, spare=3),
]


def differing(results: list[Tensor], others: list[Tensor]) -> Tensor:
    """Whether a bit of them differs, on the device."""
    found = [(a.view(torch.uint8) != b.view(torch.uint8)).any() for a, b in zip(results, others, strict=True)]
    return torch.stack(found).any()


def run_repeats(count: int, device: str = "cuda", backend: str = "hopper") -> int:
    """Take each of a few steps ``count`` times; returns how many gave other bits than the first. Nothing waits for one of them."""
    bad = 0
    for problem in SMALL:
        x = problem.tensors(torch.device(device))
        first = [each.clone() for each in step(problem, x, backend)]
        ratio, at = judge(problem, x, first)
        began, done, other = time.monotonic(), 0, torch.zeros((), dtype=torch.int64, device=device)
        while done < count:
            for _ in range(min(TOGETHER, count - done)):
                other += differing(step(problem, x, backend), first)
                done += 1
            if device == "cuda":
                torch.cuda.synchronize()
        many = int(other.item())
        wrong = f", but WRONG: {ratio:.3g} times what is allowed at {at}" if ratio > 1 else ""
        print(f"{done} steps in {time.monotonic() - began:.1f} s, {many} differ from the first{wrong}: {problem}", flush=True)
        bad += many + (ratio > 1)
    return bad


def run_graph(count: int) -> int:
    """Capture a step of each of a few problems, replay it over offsets that change in place; returns how many replays were not right."""
    bad = 0
    for problem in SMALL:
        x = problem.tensors(torch.device("cuda"))
        x["q"], x["k"], x["v"] = (x[name].nan_to_num() for name in ("q", "k", "v"))  # all rows will be somebody's
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(problem, x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = step(problem, x)
        chooser, wrong = random.Random(problem.seed), 0
        for _ in range(count):
            for name in "qk":
                rows, cu = x[name].shape[0], x[f"cu_seqlens_{name}"]
                cuts = sorted(chooser.randint(0, rows) for _ in range(cu.shape[0] - 2))
                cu.copy_(torch.tensor([0, *cuts, rows - chooser.randint(0, rows - max(cuts, default=0))], dtype=torch.int32))
            graph.replay()
            replayed = [each.clone() for each in held]
            wrong += int(differing(step(problem, x), replayed).item())
        print(f"{count} replays over other offsets, {wrong} differ from eager steps: {problem}", flush=True)
        bad += wrong
    return bad


def run_tiny(device: str = "cuda", backend: str = "hopper") -> int:
    """A few problems of few tiles, right and wrong offsets, for a tool that makes everything a hundred times slower."""
    bad = 0
    for problem in SMALL[:1] + SMALL[2:]:
        for wrong in ("", "decreasing", "negative", "beyond", "huge"):
            ratio, at = solved(replace(problem, wrong=wrong), torch.device(device), backend)
            bad += ratio > 1
            print(f"{ratio:.2f} of what is allowed, {wrong or 'right'} offsets of {problem} at {at}", flush=True)
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--repeat", type=int, metavar="N", help="steps of each of a few small problems")
    what.add_argument("--random", type=int, metavar="N", help="random problems, all processes together")
    what.add_argument("--only", metavar="PROCESS:NUMBER", help="one problem of --random")
    what.add_argument("--graph", type=int, metavar="N", help="replays of a captured step of each of a few small problems")
    what.add_argument("--sanitize", choices=("memcheck", "racecheck", "synccheck", "initcheck"))
    what.add_argument("--tiny", action="store_true", help="what --sanitize runs")
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=60.0, metavar="SECONDS")
    given = parser.parse_args()
    if given.sanitize:
        return sanitize(given.sanitize, script=__file__)
    if not torch.cuda.is_available() or facts_of(torch.device("cuda")).arch != "sm90":
        parser.error("needs an sm90 GPU (H100, H200, H20)")
    if given.repeat is not None:
        bad = run_repeats(given.repeat)
    elif given.graph is not None:
        bad = run_graph(given.graph)
    elif given.random is not None:
        bad = watch(given.random, given.processes, functools.partial(drawn, given.seed), solved, silent(given.patience))
    elif given.only:
        worker, number = map(int, given.only.split(":"))
        *_, problem = drawn(given.seed, worker, number + 1)
        print(problem, flush=True)
        ratio, at = solved(problem, torch.device("cuda"))
        print(f"{ratio:.3g} of what is allowed at {at}")
        bad = int(ratio > 1)
    else:
        bad = run_tiny()
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
