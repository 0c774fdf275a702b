"""Looks for races in every Hopper kernel on an sm90 GPU: for whoever changes a barrier, a fence or a buffer.

    python3 scripts/races.py                       racecheck, synccheck and Triton's concurrency sanitizer, in less than eight minutes
    python3 scripts/races.py --tools racecheck --cases apart,wide --logs races
    python3 scripts/races.py --case apart          one case, here, under nothing

Each case is a small problem, forward and backward, by configurations that between them launch all kernels, with biases, masks, lengths and
dropout; each tool gets each case in a process of its own, several at a time. racecheck and synccheck are compute-sanitizer's; consan is
Triton's own (Gluon kernels since Triton 3.5), which follows barriers and so knows of asynchronous copies and products. The last lines are a
table: what each found, and what did not finish. The exit status is 1 if anything was found, wrong or not finished.
"""

import argparse
import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

TOOLS = ("racecheck", "synccheck", "consan")
BUDGET = 450.0  # seconds for everything
PATIENCE = 200.0  # seconds for one case under one tool


@dataclass(frozen=True)
class Case:
    """A problem, and the configurations of its kernels, as Python writes them. bias: letters over (batch, head, query, key)."""

    kernels: str  # that must run, beside the forward kernel
    configs: dict[str, str] = field(default_factory=dict)
    D: int = 64
    H: int = 2
    Hk: int = 2
    bias: str = ""
    mask: str = ""
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "apart": Case("preprocess dqdkdv postprocess", {"dqdkdv": "DkdvConfig(2, 2, dq_warpgroup=True, unroll=2)"}),
    "apart, bias, mask, dropout": Case(
        "dqdkdv dbias", {"dqdkdv": "DkdvConfig(2, 2, 2, dq_warpgroup=True)"}, bias="1hqk", mask="b11k", options={"dropout_p": 0.2}
    ),
    "direct": Case("dqdkdv postprocess", {"dqdkdv": "DkdvConfig(2, 2, red_dq=True)"}, D=128, options={"causal": True}),
    "direct, bias, heads in parts": Case(
        "dqdkdv dkdv_sum", {"dqdkdv": "DkdvConfig(2, 2, red_dq=True, head_splits=2)"}, H=4, Hk=1, bias="1hqk", options={"window": (60, 0)}
    ),
    "by TMA": Case("dqdkdv postprocess", {"dqdkdv": "DkdvConfig(2, 1)", "forward": "ForwardConfig(2, 64, 2, ping_pong=True)"}),
    "by TMA, bias of keys, lengths": Case(
        "dqdkdv", {"dqdkdv": "DkdvConfig(2, 2)"}, bias="1h1k", options={"causal": True, "lengths": True, "dropout_p": 0.1}
    ),
    "fixed order": Case("dkdv dq", {}, options={"deterministic": True, "dropout_p": 0.1}),
    "fixed order, bias of full shape, mask": Case(
        "dkdv dq", {"dq": "DqConfig(2, 64, 2, 2, 2)"}, bias="bhqk", mask="b1qk", options={"deterministic": True, "causal": True}
    ),
    "fixed order, one consumer": Case(
        "dkdv dq", {"dq": "DqConfig(1, 32, 2, 2, separate_dq=False)", "forward": "ForwardConfig(1, 64, 2, separate_o=False)"},
        bias="1hqk", options={"deterministic": True, "lengths": True},
    ),
    "wide": Case("dkdv dq", {}, D=136, options={"causal": True, "dropout_p": 0.1}),
    "wide, bias, mask": Case("dkdv dq dbias", {}, D=256, bias="1hqk", mask="b11k"),
    "gradient of a bias, soft cap": Case("dbias", {"dbias": "DbiasConfig(2, 64, 5, 4)"}, bias="11qk", options={"softcap": 5.0}),
}  # fmt: skip


def run_case(name: str, consan: bool) -> int:
    """One case, here: results must be near the reference, so that nothing is checked that does not work."""
    import torch

    from triflash import attention, record_launches
    from triflash.plan.kernels.dbias import DbiasConfig
    from triflash.plan.kernels.dkdv import DkdvConfig
    from triflash.plan.kernels.dq import DqConfig
    from triflash.plan.kernels.forward import ForwardConfig
    from triflash.plan.override import override_configs

    if consan:
        import triton

        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    case = CASES[name]
    names = {"ForwardConfig": ForwardConfig, "DkdvConfig": DkdvConfig, "DqConfig": DqConfig, "DbiasConfig": DbiasConfig}
    configs = {kernel: eval(text, names) for kernel, text in case.configs.items()}
    torch.manual_seed(0)
    B, M, N = 2, 130, 200
    sizes = dict(zip("bhqk", (B, case.H, M, N), strict=True))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(torch.bfloat16)

    q, k, v = (normal(B, n, heads, case.D).requires_grad_() for n, heads in ((M, case.H), (N, case.Hk), (N, case.Hk)))
    options = dict(case.options)
    options.setdefault("deterministic", False)
    if options.pop("lengths", False):
        options["key_lengths"] = torch.tensor([70, N], device="cuda")
    leaves = [q, k, v]
    if case.bias:
        options["bias"] = normal(*(sizes.get(letter, 1) for letter in case.bias)).requires_grad_()
        leaves.append(options["bias"])
    if case.mask:
        options["mask"] = torch.rand([sizes.get(letter, 1) for letter in case.mask], device="cuda") < 0.8
    if options.get("dropout_p"):
        options["dropout_seed"] = 3
    with override_configs(**configs), record_launches() as ran:
        out = attention(q, k, v, **options, backend="hopper")
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    torch.cuda.synchronize()
    seen = {line.split()[1] for line in ran}
    print("ran:", *sorted(seen), flush=True)
    if missing := {"forward", *case.kernels.split()} - seen:
        print("DID NOT RUN:", *sorted(missing), flush=True)
        return 3
    if consan:
        return 0
    wanted = attention(q, k, v, **options, backend="oracle")
    references = [wanted, *torch.autograd.grad(wanted, leaves, torch.ones_like(wanted))]
    for what, a, b in zip(("out", "dq", "dk", "dv", "dbias"), (out, *grads), references, strict=False):
        off = float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-9))
        if not off < 0.05:
            print(f"WRONG: {what} is {off:.2g} off", flush=True)
            return 4
    return 0


def sanitizer() -> str | None:
    """Where compute-sanitizer is: on the path, in a CUDA toolkit, or in a wheel."""
    places = ["/usr/local/cuda*/bin/compute-sanitizer", "/usr/local/cuda*/compute-sanitizer/compute-sanitizer"]
    places.append(os.path.join(sysconfig.get_paths()["purelib"], "nvidia", "**", "compute-sanitizer"))
    found = [path for place in places for path in glob.glob(place, recursive=True) if os.access(path, os.X_OK) and os.path.isfile(path)]
    return shutil.which("compute-sanitizer") or (found[0] if found else None)


def verdict(tool: str, status: int | None, text: str) -> str:
    """What a process said, in a few words; "clean" if nothing is wrong."""
    if status is None:
        return "did not finish"
    for line in text.splitlines():
        if line.startswith(("WRONG", "DID NOT RUN")):
            return line
    if tool == "racecheck" and (found := re.search(r"RACECHECK SUMMARY: (.*)", text)):
        return "clean" if found[1].startswith("0 hazards") and status == 0 else found[1]
    if tool == "synccheck" and (found := re.search(r"ERROR SUMMARY: (\d+) error", text)):
        return "clean" if found[1] == "0" and status == 0 else f"{found[1]} errors"
    if status == 0:
        return "clean" if tool == "consan" else "the tool said nothing"
    lines = [line for line in text.splitlines() if line.strip()]
    told = [line for line in lines if re.search(r"[Aa]ssert|[Rr]ace|[Ee]rror", line)]
    return f"status {status}: {(told or lines or ['nothing said'])[-1].strip()[:160]}"


def examine(tool: str, name: str, program: str | None, deadline: float, logs: str) -> str:
    command = [sys.executable, os.path.abspath(__file__), "--case", name]
    environment = dict(os.environ)
    if tool == "consan":
        environment["TRITON_INSTRUMENTATION_MODE"] = "consan"
        command.append("--consan")
    elif program is None:
        return "compute-sanitizer is not installed here"
    else:
        command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *command]
    left = min(PATIENCE, deadline - time.monotonic())
    if left < 5:
        return "no time left"
    status: int | None = None
    with open(os.path.join(logs, f"{tool} {name}.txt".replace(" ", "-").replace(",", "")), "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            status = process.wait(left)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.seek(0)
        return verdict(tool, status, log.read())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default=",".join(TOOLS), help=f"of {', '.join(TOOLS)}")
    parser.add_argument("--cases", default="", help="names, or beginnings of names, separated by semicolons; default all")
    parser.add_argument("--logs", metavar="FOLDER", help="where what the tools say is kept (default: a new folder for temporary files)")
    parser.add_argument("--processes", type=int, default=8, help="at a time")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--consan", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.case:
        return run_case(given.case, given.consan)
    tools = given.tools.split(",")
    if unknown := set(tools) - set(TOOLS):
        parser.error(f"--tools: wanted some of {', '.join(TOOLS)}, got {', '.join(sorted(unknown))}")
    beginnings = [name.strip() for name in given.cases.split(";") if name.strip()]
    names = [name for name in CASES if not beginnings or any(name.startswith(beginning) for beginning in beginnings)]
    logs = given.logs or tempfile.mkdtemp(prefix="triflash-races-")
    os.makedirs(logs, exist_ok=True)
    program, began = sanitizer(), time.monotonic()
    jobs = [(tool, name) for name in names for tool in tools]
    with ThreadPoolExecutor(given.processes) as pool:
        found = dict(zip(jobs, pool.map(lambda job: examine(*job, program, began + given.budget, logs), jobs), strict=True))
    print(f"{len(jobs)} runs in {time.monotonic() - began:.0f} s; what the tools said is in {logs}")
    for tool in tools:
        clean = sum(found[tool, name] == "clean" for name in names)
        print(f"{tool}: {clean} of {len(names)} cases clean")
        for name in names:
            if found[tool, name] != "clean":
                print(f"  {name}: {found[tool, name]}")
    return int(any(said != "clean" for said in found.values()))


if __name__ == "__main__":
    sys.exit(main())
