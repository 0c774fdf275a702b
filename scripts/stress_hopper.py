"""Puts the Hopper kernels under stress on an sm90 GPU: for whoever changes its barriers, its schedule or its loads.

    python3 scripts/stress_hopper.py --repeat 10000          the same launch again and again: the same bits, every time
    python3 scripts/stress_hopper.py --random 2000           so many random problems in processes of their own, each judged and watched
    python3 scripts/stress_hopper.py --random 2000 --backward the same with all gradients, by every kernel of the backward pass
    python3 scripts/stress_hopper.py --only 3:17             one problem of --random again, here, by the name that a report gave it
    python3 scripts/stress_hopper.py --sanitize memcheck     a few tiny problems under compute-sanitizer (racecheck, synccheck, initcheck)

A process that gets nowhere for --patience seconds is killed, and the problem it was at is reported as a hang; the others go on. Problems
come in families that share what a kernel is compiled for, because compiling is what takes the time; lengths are drawn freely. A result is
judged against ``oracle.py`` in float64 by what rounding can do: out within 2.5 unit roundoffs of sum(p |v|), lse and rest within
1e-4 (1 + |lse|); a gradient by its norm, 1.2 % of it for bf16, 0.3 % for fp16, and 1e-3 for each element. dq that is added up in memory may
have other bits every time: --repeat does not compare it.
The exit status is 1 if anything was wrong,
different or stuck.
"""

import argparse
import functools
import math
import multiprocessing
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor

from races import sanitizer
from triflash import launch, oracle
from triflash.plan.configs import padded
from triflash.plan.device import KNOWN_DEVICES, facts_of
from triflash.plan.kernels import dkdv
from triflash.plan.kernels.forward import ForwardConfig
from triflash.plan.kernels.shared import mma_fits, shared_limit
from triflash.plan.override import override_configs
from triflash.plan.select import plan_backward, plan_forward
from triflash.spec import AttentionSpec, Gradients, Operands, Saved, spec_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "bool": torch.bool}
PER_FAMILY = 8  # two or three compilations each: what a process can do in a minute or so, for its share of 2000 problems
REPLACEMENTS = 3  # processes that may follow one that hung or crashed
STARTING = 240.0  # seconds that a process may take to import, to start CUDA and to compile its first kernel


@dataclass(frozen=True)
class Problem:
    """One forward pass; bias: five letters over (outer batch, inner batch, head, query, key), 1 where it broadcasts, or None."""

    outer: int
    inner: int
    H: int
    M: int
    N: int
    D: int
    Dv: int
    dtype: str = "bf16"
    bias: str | None = None
    bias_dtype: str = "bf16"
    lo: int | None = None
    hi: int | None = None
    scale: float = 0.125
    hidden: bool = False  # a fifth of the bias is -inf
    sms: int = 132  # what the plan is told: with few, a program works through many tiles
    config: ForwardConfig | None = None
    seed: int = 0
    softcap: float = 0.0
    gradients: str = ""  # dq "added" up in memory, or in shared memory, of "pairs", where that can be; "own": never; "": forward alone

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v and bias."""
        generator = torch.Generator(device).manual_seed(self.seed)

        def normal(*shape: int, dtype: str = self.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])

        B = self.outer * self.inner
        q, k, v = normal(B, self.M, self.H, self.D), normal(B, self.N, self.H, self.D), normal(B, self.N, self.H, self.Dv)
        if self.bias is None:
            return q, k, v, None
        full = (self.outer, self.inner, self.H, self.M, self.N)
        shape = [1 if letter == "1" else size for letter, size in zip(self.bias, full, strict=True)]
        dropped = torch.rand(shape, generator=generator, device=device) < 0.2
        if self.bias_dtype == "bool":
            return q, k, v, ~dropped
        bias = normal(*shape, dtype=self.bias_dtype)
        return q, k, v, bias.masked_fill(dropped, -torch.inf) if self.hidden else bias

    def spec(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> AttentionSpec:
        return spec_of(q, k, v, bias, self.inner, self.lo, self.hi, self.scale, "", softcap=self.softcap)


Results = tuple[Tensor | None, ...]  # out, lse, rest; and dq, dk, dv, dbias
Judged = Callable[[Any, torch.device], tuple[float, str]]  # a problem, where -> largest error as a part of what is allowed, at what


def results_of(problem: Problem, q: Tensor, v: Tensor, bias: Tensor | None) -> Results:
    """out, lse and rest, and where they are wanted dq, dk, dv and dbias, full of NaN."""
    lse = torch.full((q.shape[0], problem.H, problem.M), torch.nan, device=q.device)
    rest = None if bias is None or bias.dtype == torch.bool else torch.full_like(lse, torch.nan)
    forward = (torch.full((*q.shape[:3], v.shape[3]), torch.nan, device=q.device, dtype=q.dtype), lse, rest)
    if not problem.gradients:
        return forward
    k = q.new_empty(v.shape[0], v.shape[1], v.shape[2], q.shape[3])
    wanted = (q, k, v, None if bias is None or bias.dtype == torch.bool else bias)
    return (*forward, *(None if x is None else torch.full(x.shape, torch.nan, device=x.device, dtype=x.dtype) for x in wanted))


def cotangent(problem: Problem, q: Tensor, v: Tensor) -> Tensor:
    """The gradient of the output that gradients are taken for."""
    generator = torch.Generator(q.device).manual_seed(problem.seed + 1)
    return torch.randn((*q.shape[:3], v.shape[3]), generator=generator, device=q.device).to(q.dtype)


def _adding(problem: Problem, spec: AttentionSpec, limit: int) -> dkdv.DkdvConfig | None:
    """The configuration of the kernel that adds dq up, in memory or in shared memory."""
    widest, blocks = max(problem.D, problem.Dv), -(-problem.M // 64)
    if problem.gradients == "added":
        return dkdv.choose(spec, limit, ("dq",)) if widest <= dkdv.NARROW else None
    if widest > dkdv.DQ_WARPGROUP_DIM or blocks > dkdv.MOST_DQ_BLOCKS:
        return None
    by_pairs = dkdv.DkdvConfig(2, 2, dq_warpgroup=True, dq_blocks=blocks)
    return by_pairs if by_pairs.shared_memory(spec, ("dq",)) <= limit else None


def starter(problem: Problem, tensors: tuple[Tensor, Tensor, Tensor, Tensor | None], results: Results) -> Callable[[], None]:
    """What launches the kernel of a problem."""
    spec = problem.spec(*tensors)
    x, saved = Operands(*tensors), Saved(results[0], results[1], results[2])  # type: ignore[arg-type]
    with override_configs(forward=problem.config) if problem.config else nullcontext():
        plan = plan_forward(spec, replace(facts_of(tensors[0].device), sms=problem.sms), "hopper")
    if not problem.gradients:
        return lambda: launch.run_forward(plan, spec, x, saved)
    facts = replace(facts_of(tensors[0].device), sms=problem.sms)
    adding = None if problem.gradients == "own" else _adding(problem, spec, facts.shared_memory)
    with override_configs(dqdkdv=adding) if adding else nullcontext():
        grads = Gradients(*results[3:])
        fixed = replace(spec, deterministic=problem.gradients != "added")
        back = plan_backward(fixed, grads.needs, facts, "hopper")
    dout = cotangent(problem, tensors[0], tensors[2])

    def start() -> None:
        launch.run_forward(plan, spec, x, saved)
        launch.run_backward(back, fixed, x, saved, dout, None, grads)

    return start


def solve(problem: Problem, tensors: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> Results:
    """out, lse and rest, and the gradients, by the Hopper kernels."""
    results = results_of(problem, tensors[0], tensors[2], tensors[3])
    starter(problem, tensors, results)()
    return results


def judge(problem: Problem, tensors: tuple[Tensor, Tensor, Tensor, Tensor | None], results: Results) -> tuple[float, str]:
    """The largest error as a part of what is allowed (up to 1 is right; NaN where it should not be counts as infinite), and where."""
    q, k, v, bias = tensors
    out, lse, rest = results[:3]
    assert out is not None and lse is not None
    options = dict(batch_inner=problem.inner, lo=problem.lo, hi=problem.hi, scale=problem.scale, softcap=problem.softcap)
    wanted, wanted_lse = oracle.attention(q, k, v, bias, **options)
    weight, _ = oracle.attention(q, k, v.abs(), bias, **options)
    roundoff = torch.finfo(q.dtype).eps / 2
    # A probability below the least subnormal of float16 is lost; so are 2^-25 of each of N of them at most.
    slack = 1e-6 + problem.N * 2.0**-25 * v.abs().max().double()
    worst, where = 0.0, ""
    parts = [("out", out.double(), wanted, 2.5 * roundoff * weight + slack)]
    lses = [("lse", lse.double())] + ([] if rest is None else [("lse + rest", lse.double() + rest.double() * math.log(2))])
    parts += [(name, got, wanted_lse, 1e-4 * (1 + wanted_lse.abs())) for name, got in lses]
    for name, got, right, limit in parts:
        part = torch.where(got == right, 0.0, (got - right).abs() / limit).nan_to_num(torch.inf, torch.inf)  # -inf equals itself alone
        at = part.argmax()
        if part.flatten()[at] > worst or not where:
            worst = part.flatten()[at].item()
            index = tuple(int(i) for i in torch.unravel_index(at, part.shape))
            where = f"{name}{list(index)}: got {got[index].item():.6g}, wanted {right[index].item():.6g}"
    if problem.gradients:
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        given = None if bias is None else bias if bias.dtype == torch.bool else bias.double().requires_grad_()
        exact, _ = oracle.attention(*leaves, given, **options)
        wanted_by = [*leaves, *([given] if given is not None and given.requires_grad else [])]
        right = torch.autograd.grad(exact, wanted_by, cotangent(problem, q, v).double())
        for name, got, one in zip(("dq", "dk", "dv", "dbias"), results[3:], right, strict=False):
            assert got is not None
            error = (got.double() - one).norm().nan_to_num(torch.inf, torch.inf)
            part = (error / ((0.012 if q.dtype == torch.bfloat16 else 0.003) * one.norm() + 1e-3 * one.numel() ** 0.5)).item()
            if part > worst:
                worst, where = part, f"{name}: error {error.item():.3g} of {one.norm().item():.3g}"
    return worst, where


# ---- random problems


def random_config(chooser: random.Random, head: int, biased: bool, one_width: bool) -> ForwardConfig | None:
    """None (the plan's own) half of the time, else anything that fits in shared memory, and its output in q's buffer if it has none."""
    if chooser.random() < 0.5:
        return None
    while True:
        separate_o = chooser.random() < 0.5 or not one_width
        config = ForwardConfig(
            consumers=chooser.choice((1, 2, 3) if head <= 64 else (1, 2)),
            block_n=chooser.choice((32, 64, 128) if head <= 128 else (32, 64)),
            kv_stages=chooser.choice((1, 2, 3)),
            bias_stages=chooser.choice((1, 2)),
            ping_pong=chooser.random() < 0.5,
            separate_o=separate_o,
            persistent=chooser.random() < 0.8,
            q_stages=chooser.choice((1, 2)) if separate_o else 1,
            own_widths=chooser.random() < 0.5,
        )
        widest = spec_of(*(torch.empty(1, 128, 1, head, device="meta", dtype=torch.bfloat16),) * 3, None, 1, None, None, 1.0, "")
        bias = config.bias_stages * config.block_m * config.block_n * 4 if biased else 0
        small = replace(config, consumers=1, block_n=min(64, config.block_n), ctas_per_sm=chooser.choice((1, 2, 3)))
        if small.ctas_per_sm > 1 and mma_fits(small, head):
            config = small
        limit = shared_limit(KNOWN_DEVICES["sm90"].shared_memory, config.ctas_per_sm)
        if config.shared_memory(widest) + bias + 4096 <= limit:
            return config


def drawn(seed: int, worker: int, count: int, backward: bool = False) -> Iterator[Problem]:
    """The problems of one process, always the same."""
    chooser = random.Random(1000 * seed + worker)
    for number in range(count):
        if number % PER_FAMILY == 0:
            D, Dv = chooser.choice(
                [(16, 16), (32, 32), (64, 64), (128, 128), (40, 40), (80, 80), (96, 96), (160, 160), (192, 128), (256, 256), (64, 24)]
            )
            outer, inner, H = chooser.choice([(1, 1, 1), (2, 1, 3), (2, 2, 2), (3, 1, 5), (1, 3, 4), (1, 1, 16)])
            dtype = chooser.choice(["bf16", "fp16"])
            letters = [None, None, None, "bihqk", "b1hqk", "1ihqk", "11hqk", "111qk", "11h1k", "b111k", "bih1k", "11hq1", "b11q1", "11111"]
            bias = chooser.choice(letters)
            widest = 256 if max(D, Dv) > 128 else 128 if max(D, Dv) > 64 else 64
            config = random_config(chooser, widest, bias is not None, padded(D) == padded(Dv))
            family = dict(
                outer=outer, inner=inner, H=H, D=D, Dv=Dv, dtype=dtype, bias=bias, config=config,
                bias_dtype=chooser.choice([dtype, "fp32", "bool"]),
                hidden=chooser.random() < 0.3,
                scale=chooser.choice([D**-0.5, D**-0.5, D**-0.5, -0.2, 0.0]),
                softcap=chooser.choice([0.0, 0.0, 2.0]),
            )  # fmt: skip
            band = chooser.choice(["none", "none", "causal", "causal", "window", "left", "right"])
            few = chooser.random() < 0.2  # one tile of queries
            step_m, step_n = chooser.choice((1, 1, 16)), chooser.choice((1, 1, 16, 128))  # of multiples of 16 Triton makes other kernels
        M = chooser.randint(2, 64) if few else chooser.randint(200, 900)
        N = chooser.randint(2, 900)
        M, N = (-(-size // step) * step if step > 1 else size | 1 for size, step in ((M, step_m), (N, step_n)))
        middle, width = 2 * chooser.randint(-M // 2, N // 2) + 1, 2 * chooser.randint(1, 200)
        lo, hi = {"none": (None, None), "causal": (None, 0), "left": (middle, None), "right": (None, middle)}.get(
            band, (middle, middle + width)
        )
        problem = Problem(**family, M=M, N=N, lo=lo, hi=hi, sms=chooser.choice((2, 5, 132)), seed=chooser.randint(0, 2**31))
        if backward and (problem.bias is None or problem.bias[4] == "k"):  # a bias without a dim of keys has no Hopper backward pass
            problem = replace(problem, gradients=("own", "added", "pairs")[number // PER_FAMILY % 3])
        yield problem


def work(
    worker: int, first: int, count: int, draw: Callable[[int, int], Iterator[Any]], judged: Judged, device: str, report: Connection
) -> None:
    """One process: problems ``first … count`` of its own, saying what it does before it does it."""
    where = torch.device(device)
    torch.set_num_threads(1)
    for index, problem in enumerate(draw(worker, count)):
        if index < first:
            continue
        report.send(("start", index, str(problem)))
        try:
            worst, at = judged(problem, where)
        except Exception as error:  # a CUDA error leaves nothing to go on with: the next problem gets a process of its own
            report.send(("error", index, f"{type(error).__name__}: {str(error)[:400]}"))
            return
        report.send(("done", index, (worst, at)))
    report.send(("end", count, None))


@dataclass
class Worker:
    """What is known about a running process."""

    number: int
    process: multiprocessing.process.BaseProcess
    connection: Connection
    heard: float
    count: int
    problem: str = ""
    index: int = -1
    replaced: int = 0


def silent(patience: float) -> Callable[[Worker], bool]:
    """Whether a process counts as stuck: it has said nothing for so many seconds."""
    return lambda worker: time.monotonic() - worker.heard > (patience if worker.problem else max(patience, STARTING))


def solved(solver: Callable[..., Results], problem: Problem, device: torch.device) -> tuple[float, str]:
    """The judgement of what a solver makes of a problem."""
    tensors = problem.tensors(device)
    return judge(problem, tensors, solver(problem, tensors))


def run_random(
    total: int,
    processes: int,
    seed: int,
    stuck: Callable[[Worker], bool],
    device: str = "cuda",
    solver: Callable[..., Results] = solve,
    backward: bool = False,
) -> int:
    """Draw and judge ``total`` problems; returns how many went wrong."""
    draw = functools.partial(drawn, seed, backward=backward)
    return watch(total, processes, draw, functools.partial(solved, solver), stuck, device)


def watch(
    total: int,
    processes: int,
    draw: Callable[[int, int], Iterator[Any]],
    judged: Judged,
    stuck: Callable[[Worker], bool],
    device: str = "cuda",
) -> int:
    """Judge ``total`` problems, which ``draw(process, how many)`` draws, in processes; returns how many went wrong."""
    context = multiprocessing.get_context("spawn")
    began = time.monotonic()

    def start(number: int, first: int, count: int, replaced: int) -> Worker:
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(number, first, count, draw, judged, device, theirs), daemon=True)
        process.start()
        theirs.close()
        return Worker(number, process, mine, time.monotonic(), count, replaced=replaced)

    shares = [total // processes + (number < total % processes) for number in range(processes)]
    running = [start(number, 0, share, 0) for number, share in enumerate(shares) if share]
    done, bad, worst, worst_at = 0, 0, 0.0, "nothing"
    while running:
        try:
            ready = wait([worker.connection for worker in running], timeout=1.0)
        except KeyboardInterrupt:  # what has been found is told all the same
            for worker in running:
                worker.process.kill()
            break
        for worker in list(running):
            outcome = None
            if worker.connection in ready:
                try:
                    kind, worker.index, told = worker.connection.recv()
                except EOFError:
                    worker.process.join()
                    outcome = f"CRASH, exit status {worker.process.exitcode}"
                else:
                    worker.heard = time.monotonic()
                    if kind == "start":
                        worker.problem = told
                    elif kind == "error":
                        outcome = f"ERROR {str(told)[:400]}"
                    elif kind == "done":
                        done += 1
                        name = f"{worker.number}:{worker.index} {worker.problem}"
                        if told[0] > worst:
                            worst, worst_at = told[0], f"{name} at {told[1]}"
                        if told[0] > 1:
                            bad += 1
                            print(f"WRONG {told[0]:.3g} times what is allowed, {name} at {told[1]}", flush=True)
                        if done % 200 == 0:
                            print(f"{done} problems in {time.monotonic() - began:.0f} s, {bad} bad, worst {worst:.2f}", flush=True)
                    else:
                        worker.process.join()
                        running.remove(worker)
                        continue
            elif stuck(worker):
                worker.process.kill()
                worker.process.join(10)
                outcome = f"HANG, no progress for {time.monotonic() - worker.heard:.0f} s"
            if outcome is not None:
                bad += 1
                print(f"{outcome}: {worker.number}:{worker.index} {worker.problem or 'before its first problem'}", flush=True)
                running.remove(worker)
                if worker.replaced < REPLACEMENTS and worker.index + 1 < worker.count:
                    running.append(start(worker.number, worker.index + 1, worker.count, worker.replaced + 1))
    print(f"{done} of {total} problems in {time.monotonic() - began:.0f} s, {bad} bad; worst {worst:.2f} of what is allowed: {worst_at}")
    return bad + (done < total and not bad)


# ---- the same launch again and again

SMALL = [
    Problem(1, 1, 4, 300, 300, 64, 64, hi=0),
    Problem(2, 1, 8, 260, 200, 64, 64, sms=7),
    Problem(1, 1, 4, 500, 500, 128, 128, hi=0, sms=5),
    Problem(2, 1, 4, 200, 333, 128, 128, bias="11hqk"),
    Problem(2, 1, 4, 200, 333, 40, 40, dtype="fp16", bias="b111k", bias_dtype="fp32", hi=0),
    Problem(1, 1, 3, 300, 200, 256, 256, sms=3),
    Problem(1, 1, 16, 500, 500, 64, 64, hi=0, sms=5),
    Problem(2, 1, 4, 400, 400, 64, 64, bias="11hqk", hi=0, sms=3),
    Problem(2, 1, 4, 300, 300, 64, 64, hi=0, config=ForwardConfig(2, 64, 2, ping_pong=True), sms=4),
    Problem(1, 1, 3, 400, 300, 64, 64, bias="11hqk", config=ForwardConfig(3, 64, 2, bias_stages=2, separate_o=False), sms=2),
]
TOGETHER = 500  # launches between two looks at the result


def ours(backward: bool) -> list[Problem]:
    """The small problems, forward alone or with gradients: dq added up in memory, or in shared memory, and of a kernel of its own."""
    return [replace(problem, gradients=kind) for problem in SMALL for kind in (("added", "pairs", "own") if backward else ("",))]


def run_repeats(count: int, device: str = "cuda", backward: bool = False) -> int:
    """Launch each of a few problems ``count`` times into memory full of NaN; returns how many launches gave other bits than the first."""
    bad = 0
    for problem in ours(backward):
        tensors = problem.tensors(torch.device(device))
        first = solve(problem, tensors)
        ratio, at = judge(problem, tensors, first)
        results = results_of(problem, tensors[0], tensors[2], tensors[3])
        start = starter(problem, tensors, results)
        began, done, differing = time.monotonic(), 0, 0
        while done < count:
            different = torch.zeros((), dtype=torch.int64, device=device)
            for _ in range(min(TOGETHER, count - done)):
                for x in results:
                    if x is not None:
                        x.fill_(torch.nan)
                start()
                other = torch.zeros((), dtype=torch.bool, device=device)
                for at_, (x, y) in enumerate(zip(results, first, strict=True)):
                    if at_ == 3 and problem.gradients == "added":
                        continue
                    if x is not None and y is not None:
                        kind = torch.int16 if x.element_size() == 2 else torch.int32
                        other = other | (x.view(kind) != y.view(kind)).any()
                different += other
            done += min(TOGETHER, count - done)
            differing += int(different.item())
        wrong = f", but WRONG: {ratio:.3g} times what is allowed at {at}" if ratio > 1 else ""
        seconds = time.monotonic() - began
        print(f"{done} launches in {seconds:.1f} s, {differing} differ from the first{wrong}: {problem}", flush=True)
        bad += differing + (ratio > 1)
    return bad


def run_tiny(device: str = "cuda", backward: bool = False) -> int:
    """A few problems of few tiles, for a tool that makes everything a hundred times slower."""
    bad = 0
    for problem in (replace(problem, outer=1, H=2, M=130, N=100, sms=2) for problem in ours(backward)):
        tensors = problem.tensors(torch.device(device))
        ratio, at = judge(problem, tensors, solve(problem, tensors))
        bad += ratio > 1
        print(f"{ratio:.2f} of what is allowed, {problem} at {at}", flush=True)
    return bad


def sanitize(tool: str, backward: bool = False, script: str = __file__) -> int:
    """Run a script's tiny problems under compute-sanitizer; if it is not there, say what would have been run."""
    program = sanitizer()
    command = [
        program or "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "1",
        *["--report-api-errors", "no"] * (tool == "memcheck"),  # binding a launch asks the driver for parameters until there is none
        sys.executable,
        os.path.abspath(script),
        "--tiny",
        *["--backward"] * backward,
    ]
    print("PYTORCH_NO_CUDA_MEMORY_CACHING=1", shlex.join(command), flush=True)
    if program is None:
        print("compute-sanitizer is not installed here", file=sys.stderr)
        return 2
    # Every tensor an allocation of its own, or the tool sees no bounds.
    return subprocess.run(command, check=False, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--repeat", type=int, metavar="N", help="launches of each of a few small problems")
    what.add_argument("--random", type=int, metavar="N", help="random problems, all processes together")
    what.add_argument("--only", metavar="PROCESS:NUMBER", help="one problem of --random")
    what.add_argument("--sanitize", choices=("memcheck", "racecheck", "synccheck", "initcheck"))
    what.add_argument("--tiny", action="store_true", help="what --sanitize runs")
    parser.add_argument("--backward", action="store_true", help="with all gradients")
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=60.0, metavar="SECONDS")
    given = parser.parse_args()
    if given.sanitize:
        return sanitize(given.sanitize, given.backward)
    if not torch.cuda.is_available() or facts_of(torch.device("cuda")).arch != "sm90":
        parser.error("needs an sm90 GPU (H100, H200, H20)")
    if given.repeat is not None:
        bad = run_repeats(given.repeat, backward=given.backward)
    elif given.random is not None:
        bad = run_random(given.random, given.processes, given.seed, silent(given.patience), backward=given.backward)
    elif given.only:
        worker, number = map(int, given.only.split(":"))
        *_, problem = drawn(given.seed, worker, number + 1, given.backward)
        print(problem, flush=True)
        tensors = problem.tensors(torch.device("cuda"))
        ratio, at = judge(problem, tensors, solve(problem, tensors))
        print(f"{ratio:.3g} of what is allowed at {at}")
        bad = int(ratio > 1)
    else:
        bad = run_tiny(backward=given.backward)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
