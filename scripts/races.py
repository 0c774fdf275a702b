"""Looks for races in every Hopper kernel on an sm90 GPU: for whoever changes a barrier, a fence or a buffer.

    python3 scripts/races.py                       racecheck, synccheck and Triton's concurrency sanitizer, in at most nine minutes
    python3 scripts/races.py --tools racecheck --cases 'apart;wide' --logs races
    python3 scripts/races.py --case apart          one case, here, under nothing

Each case is a small problem, forward and backward, by configurations that between them launch all kernels, with biases, masks, lengths and
dropout; each tool gets each case in a process of its own, several at a time. racecheck and synccheck are compute-sanitizer's; consan is
Triton's own (Gluon kernels since Triton 3.5), which follows mbarriers and so knows of asynchronous copies and products; ``consan.py`` has
how. It reports places; those of all cases are listed behind the table.

racecheck reports, of every kernel, the bytes by which Triton tells warps which partition to run. A report counts as explained if the
kernel's machine code shows what orders its two accesses (``handed_over``); any other is a finding. The last lines are a table: what each
tool found, and what did not finish. The exit status is 1 if anything was found, wrong or not finished.
"""

import argparse
import functools
import glob
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from consan import PREFIX, watching

TOOLS = ("racecheck", "synccheck", "consan-forward", "consan-backward")
SOURCES = getattr(importlib.util.find_spec("triflash"), "origin", None) or ""
BUDGET = 540.0  # seconds for everything
PATIENCE = {"racecheck": 200.0, "synccheck": 200.0, "consan-forward": 300.0, "consan-backward": 480.0}  # seconds for one case


@dataclass(frozen=True)
class Case:
    """A problem, and the configurations of its kernels, as Python writes them. bias, second: letters over (batch, head, query, key). small,
    small_options: for consan, which keeps books on every buffer and barrier in code of its own, in tables of a power of two. At most 16 of
    each kernel's are taken, and 8 where that is possible; a soft cap saves one, since bounded scores have no rest of lse. packed: two
    sequences of other lengths, one behind the other.
    """

    kernels: str  # that must run, beside the forward kernel
    configs: dict[str, str] = field(default_factory=dict)
    small: dict[str, str] = field(default_factory=dict)
    D: int = 64
    H: int = 2
    Hk: int = 2
    bias: str = ""
    second: str = ""
    mask: str = ""
    packed: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    small_options: dict[str, Any] = field(default_factory=dict)


SMALL_DBIAS = "DbiasConfig(1, 64, 2, 2)"
CAPPED: dict[str, Any] = {"softcap": 5.0}
CASES = {
    "apart": Case(
        "preprocess dqdkdv postprocess", {"dqdkdv": "DkdvConfig(2, 2, dq_warpgroup=True, unroll=2)"},
        {"dqdkdv": "DkdvConfig(1, 1, dq_warpgroup=True)"}, small_options=CAPPED,
    ),
    "apart, bias, mask, dropout": Case(
        "dqdkdv dbias", {"dqdkdv": "DkdvConfig(2, 2, 2, dq_warpgroup=True)"},
        {"dqdkdv": "DkdvConfig(1, 1, red_dq=True)", "dbias": SMALL_DBIAS}, bias="1hqk", mask="b11k", options={"dropout_p": 0.2},
    ),
    "dq of pairs": Case(
        "preprocess dqdkdv", {"dqdkdv": "DkdvConfig(2, 2, kv_stages=2, dq_warpgroup=True, unroll=2, dq_blocks=8)"},
        {"dqdkdv": "DkdvConfig(1, 1, dq_warpgroup=True, dq_blocks=4)"}, options={"causal": True}, small_options=CAPPED,
    ),
    "direct": Case(
        "dqdkdv postprocess", {"dqdkdv": "DkdvConfig(2, 2, red_dq=True)"}, {"dqdkdv": "DkdvConfig(1, 1, red_dq=True)"},
        D=128, options={"causal": True},
    ),
    "direct, bias, heads in parts": Case(
        "dqdkdv dkdv_sum", {"dqdkdv": "DkdvConfig(2, 2, red_dq=True, head_splits=2)"},
        {"dqdkdv": "DkdvConfig(1, 1, red_dq=True, head_splits=2)", "dbias": SMALL_DBIAS}, H=4, Hk=1, bias="1hqk",
        options={"window": (60, 0)},
    ),
    "by TMA": Case(
        "dqdkdv postprocess", {"dqdkdv": "DkdvConfig(2, 1)", "forward": "ForwardConfig(2, 64, 2, ping_pong=True)"},
        {"dqdkdv": "DkdvConfig(1, 1)"},
    ),
    "by TMA, bias of keys, lengths": Case(
        "dqdkdv", {"dqdkdv": "DkdvConfig(2, 2)"}, {"dqdkdv": "DkdvConfig(1, 1)"},
        bias="1h1k", options={"causal": True, "lengths": True, "dropout_p": 0.1},
    ),
    "fixed order": Case(
        "dkdv dq", {}, {"dkdv": "DkdvConfig(1, 1)"}, options={"deterministic": True, "dropout_p": 0.1}, small_options=CAPPED
    ),
    "fixed order, bias of full shape, mask": Case(
        "dkdv dq", {"dq": "DqConfig(2, 64, 2, 2, 2)"}, {"dkdv": "DkdvConfig(1, 1)", "dq": "DqConfig(1, 64, 2, 2)"},
        bias="bhqk", mask="b1qk", options={"deterministic": True, "causal": True},
    ),
    "fixed order, one consumer": Case(
        "dkdv dq", {"dq": "DqConfig(1, 32, 2, 2, separate_dq=False)", "forward": "ForwardConfig(1, 64, 2, separate_o=False)"},
        {"dkdv": "DkdvConfig(1, 1)", "dbias": SMALL_DBIAS}, bias="1hqk", options={"deterministic": True, "lengths": True},
    ),
    "wide": Case("dkdv dq", {}, D=136, options={"causal": True, "dropout_p": 0.1}, small_options=CAPPED),
    "wide, bias, mask": Case(
        "dkdv dq dbias", {}, {"dq": "DqConfig(1, 32, 2, 1)", "dbias": "DbiasConfig(1, 32, 3, 3, chunk=128)"},
        D=256, bias="1hqk", mask="b11k",
    ),
    "two biases": Case(
        "dqdkdv dbias",
        {"dqdkdv": "DkdvConfig(2, 2, 2, dq_warpgroup=True)", "dbias": "DbiasConfig(1, 128, 4, 4, chunk=32, ctas_per_sm=2)"},
        {"dqdkdv": "DkdvConfig(1, 1, red_dq=True)", "dbias": "DbiasConfig(1, 64, 2, 2, chunk=32)"}, bias="1hqk", second="b11k", D=32,
        small_options=CAPPED,
    ),
    "two biases, fixed order, slopes": Case(
        "dkdv dq", {"dkdv": "DkdvConfig(2, 2)"}, {"dkdv": "DkdvConfig(1, 1)", "dq": "DqConfig(1, 64, 2, 2)"},
        bias="bhqk", second="111k", options={"deterministic": True, "causal": True, "slopes": True},
    ),
    "fixed order, slopes": Case(
        "dkdv dq", {}, {"dkdv": "DkdvConfig(1, 1)"}, options={"deterministic": True, "causal": True, "slopes": True}
    ),
    "gradient of a bias, soft cap": Case(
        "dbias", {"dbias": "DbiasConfig(2, 64, 5, 4)"}, {"dqdkdv": "DkdvConfig(1, 1, red_dq=True)", "dbias": "DbiasConfig(2, 64, 2, 2)"},
        bias="11qk", options={"softcap": 5.0},
    ),
    "packed": Case(
        "preprocess dqdkdv postprocess", {"dqdkdv": "DkdvConfig(2, 2, red_dq=True)"}, {"dqdkdv": "DkdvConfig(1, 1, red_dq=True)"},
        packed=True, options={"causal": True},
    ),
    "packed, fixed order, a shared bias": Case(
        "dkdv dq dbias", {}, {"dkdv": "DkdvConfig(1, 1)", "dq": "DqConfig(1, 64, 2, 2)", "dbias": SMALL_DBIAS},
        bias="1hqk", packed=True, options={"deterministic": True},
    ),
}  # fmt: skip


def run_case(name: str, consan: str = "", small: bool = False) -> int:
    """One case, here: results must be near the reference, so that nothing is checked that does not work. consan: the pass that Triton is to
    look at, "forward", behind which nothing runs, or "backward".
    """
    import torch

    from triflash import attention, attention_varlen, record_launches
    from triflash.plan.kernels.dbias import DbiasConfig
    from triflash.plan.kernels.dkdv import DkdvConfig
    from triflash.plan.kernels.dq import DqConfig
    from triflash.plan.kernels.forward import ForwardConfig
    from triflash.plan.override import override_configs

    if not consan and torch.cuda.is_available():
        tell_of_code()
    case = CASES[name]
    names = {"ForwardConfig": ForwardConfig, "DkdvConfig": DkdvConfig, "DqConfig": DqConfig, "DbiasConfig": DbiasConfig}
    configs = {kernel: eval(text, names) for kernel, text in (case.configs | case.small if small else case.configs).items()}
    torch.manual_seed(0)
    B, M, N = 2, 130, 200
    sizes = dict(zip("bhqk", (B, case.H, M, N), strict=True))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(torch.bfloat16)

    def run(backend: str) -> torch.Tensor:
        out = attend(q, k, v, **options, backend=backend)
        assert isinstance(out, torch.Tensor)
        return out

    queries, keys = ((B * M,), (B * N,)) if case.packed else ((B, M), (B, N))
    shapes = ((*queries, case.H), (*keys, case.Hk), (*keys, case.Hk))
    q, k, v = (normal(*shape, case.D).requires_grad_() for shape in shapes)
    attend: Any = attention_varlen if case.packed else attention
    options = case.options | (case.small_options if small else {})
    options.setdefault("deterministic", False)
    if options.pop("lengths", False):
        options["key_lengths"] = torch.tensor([70, N], device="cuda")
    if case.packed:
        options["cu_seqlens_q"] = torch.tensor([0, 90, B * M], device="cuda", dtype=torch.int32)
        options["cu_seqlens_k"] = torch.tensor([0, 140, B * N], device="cuda", dtype=torch.int32)
        sizes |= {"q": 2 * M - 90, "k": 2 * N - 140}
    leaves = [q, k, v]
    if case.bias:
        options["bias"] = normal(*(sizes.get(letter, 1) for letter in case.bias)).requires_grad_()
        leaves.append(options["bias"])
    if case.second:
        options["bias"] = (options["bias"], normal(*(sizes.get(letter, 1) for letter in case.second)).requires_grad_())
        leaves.append(options["bias"][1])
    if options.pop("slopes", False):
        options["alibi_slopes"] = torch.rand(case.H, device="cuda")
    if case.mask:
        options["mask"] = torch.rand([sizes.get(letter, 1) for letter in case.mask], device="cuda") < 0.8
    if options.get("dropout_p"):
        options["dropout_seed"] = 3
    grads: tuple[torch.Tensor, ...] = ()
    with override_configs(**configs), record_launches() as ran:
        with one_by_one(bool(consan)), sanitized(consan == "forward"):
            out = run("hopper")
        if consan != "forward":
            with sanitized(consan == "backward"):
                grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    torch.cuda.synchronize()
    seen = {line.split()[1] for line in ran}
    print("ran:", *sorted(seen), flush=True)
    if missing := {"forward", *(case.kernels.split() if consan != "forward" else ())} - seen:
        print("DID NOT RUN:", *sorted(missing), flush=True)
        return 3
    wanted = run("oracle")
    references = [wanted.detach(), *torch.autograd.grad(wanted, leaves, torch.ones_like(wanted))]
    for what, a, b in zip(("out", "dq", "dk", "dv", "dbias", "dsecond"), (out.detach(), *grads), references, strict=False):
        off = float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-9))
        if not off < 0.05:
            print(f"WRONG: {what} is {off:.2g} off", flush=True)
            return 4
    return 0


@contextmanager
def one_by_one(on: bool) -> Iterator[None]:
    """Within it kernels are compiled as they are launched, and none of a backward pass ahead, which consan would take its minutes for or be
    asked about too late.
    """
    name = "TRIFLASH_COMPILE_THREADS"
    before = os.environ.get(name)
    if on:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if on and before is None:
            del os.environ[name]
        elif on:
            os.environ[name] = str(before)


@contextmanager
def sanitized(on: bool) -> Iterator[None]:
    """Within it Triton's concurrency sanitizer looks at what is launched; what it found is told of when it ends."""
    if not on:
        yield
        return
    import torch
    import triton

    def memory(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int8, device="cuda")

    triton.set_allocator(memory)  # of this thread, in which therefore the backward pass has to run
    began = time.monotonic()
    with watching(), torch.autograd.set_multithreading_enabled(False):
        yield
    print(f"compiled and launched in {time.monotonic() - began:.0f} s", flush=True)
    torch.cuda.synchronize()  # which prints what was asserted
    print(f"ran in {time.monotonic() - began:.0f} s", flush=True)


def tell_of_code() -> None:
    """Print where Triton keeps the machine code of each kernel that it compiles, or finds compiled."""
    from triton import knobs

    def tell(*, metadata_group: dict[str, str], **_: Any) -> None:
        for path in metadata_group.values():
            if path.endswith(".cubin"):
                print("code:", path, flush=True)

    knobs.compilation.listener = tell


@functools.lru_cache(maxsize=64)
def instructions(cubin: str) -> list[tuple[int, str]]:
    """(address, instruction) of a compiled kernel in order; a label has address -1."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    tool = shutil.which("nvdisasm") or os.path.join(os.path.dirname(spec.origin), "backends", "nvidia", "bin", "nvdisasm")
    text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*(?:/\*([0-9a-f]{4,})\*/\s+(.*?);|(\.L\w+):)", text, re.M)
    return [(int(at, 16), what.strip()) if at else (-1, label) for at, what, label in found]


TOGETHER = re.compile(r"BAR\.SYNC\S* 0x1")  # barrier 1, of all threads of the program: no number of them follows
ELSEWHERE = re.compile(r"\.L|(@\S+ )?(BRA|BRX|JMP|CALL|RET|EXIT|BAR)\b")  # a label, a jump, another barrier


def handed_over(code: list[tuple[int, str]], write: int, read: int) -> bool:
    """Whether machine code orders a write and a read of the bytes that tell warps what to run: straight-line code leads from the store to
    barrier 1 of all threads, and from that barrier to the load. Between a load and the next store all threads meet there twice more.
    """
    places = {at: number for number, (at, _) in enumerate(code)}
    if write not in places or read not in places:
        return False
    after = [what for _, what in code[places[write] + 1 :]]
    before = [what for _, what in code[: places[read]][::-1]]
    stores = code[places[write]][1].startswith("STS") and code[places[read]][1].startswith("LDS.U8")
    ends = [next((what for what in ways if ELSEWHERE.match(what)), "") for ways in (after, before)]
    return stores and all(TOGETHER.fullmatch(end) for end in ends)


def explained(text: str) -> tuple[int, list[str]]:
    """Of racecheck's reports: how many are of nothing but Triton's handing over, and the others, in a line each."""
    code: dict[str, list[str]] = {}
    for path in re.findall(r"^code: (.*)$", text, re.M):
        code.setdefault(os.path.basename(path).removesuffix(".cubin"), []).append(path)
    good, others = 0, []
    for report in re.findall(r"^=+ (?:Error|Warning): (.*(?:\n=+ {2,}.*)*)", text, re.M):
        (kind, kernel, at), *rest = re.findall(r"(Write|Read) (?:Thread \S+|access) at (\w+)\+(0x[0-9a-f]+)", report) or [("", "", "0")]
        pairs = [
            (at, other) if kind == "Write" else (other, at)
            for what, where, other in rest
            if {kind, what} == {"Read", "Write"} and where == kernel
        ]
        known = [instructions(path) for path in code.get(kernel, ())]
        if rest and len(pairs) == len(rest) and all(any(handed_over(x, int(w, 16), int(r, 16)) for x in known) for w, r in pairs):
            good += 1
        else:
            others.append(" ".join(report.replace("=", "").split())[:300])
    return good, others


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
    if "SUMMARY" in text and not re.search("^ran: ", text, re.M):
        return "the case did not run to its end"
    if tool == "racecheck" and (found := re.search(r"RACECHECK SUMMARY: (.* \((\d+) errors?, (\d+) warnings?\))", text)):
        good, others = explained(text)
        if good < int(found[2]) + int(found[3]):
            return f"{found[1]}, {good} explained: {others[0] if others else 'the others are not shown'}"
        return f"clean, {good} explained" if status == 9 else "clean" if status == 0 else f"status {status}"
    if tool == "synccheck" and (found := re.search(r"ERROR SUMMARY: (\d+) error", text)):
        return "clean" if found[1] == "0" and status == 0 else f"{found[1]} errors"
    if places := reports(text):
        others = [each for each in places if not behind_named_barrier(each)]
        if others or status:
            return f"{len(others)} places, {len(places) - len(others)} explained" + (f", status {status}" if status else "")
        return f"clean, {len(places)} explained"
    if status == 0:
        return "clean" if tool.startswith("consan") else "the tool said nothing"
    if found := re.search(r"\S+: .*Assertion `.*` failed.*", text):
        return f"status {status}: {found[0][:300]}"
    lines = [line for line in text.splitlines() if line.strip()]
    told = [line for line in lines if re.search(r"[Aa]ssert|[Rr]ace|[Ee]rror", line)]
    return f"status {status}: {(told or lines or ['nothing said'])[-1].strip()[:160]}"


def reports(text: str) -> list[str]:
    """What Triton's sanitizer printed, in order, each once: kernel, the line and the one that called it, and what is wrong there."""
    said = re.findall(rf"{PREFIX}(\S+: [^<\n]*?)((?: < [^:\n]*:\d+)*)(: .*)", text)
    return list(dict.fromkeys(f"{at}{' < '.join(callers.split(' < ')[:2])}{wrong}" for at, callers, wrong in said))


# Accesses of ``dkdv`` that named barriers order, of which Triton's sanitizer knows nothing: how the statement reads, what it may then say,
# and the barrier (``kernels/hopper/dkdv_step.py``).
_READS, _WRITES = "outstanding reads|operand read", "outstanding writes"
NAMED = (
    (r"tma_load\(f\.(stats|q)_desc, .*q_full, p\.(rest|lse|q)_s", _READS, "Q_FREE"),
    (r"tma_load\(f\.(stats|o)_desc, .*o_full, p\.(delta|o)_s", _READS, "O_FREE"),
    (r"tma_load\(f\.(bias|mask)_desc, .*full, p\.(bias|mask)_s", _READS, "BIAS_FREE"),
    (r"p\.ds_s\.index\(.*\.store\(ds16\)", _READS, "DS_HERE"),
    (r"warpgroup_mma\(p\.ds_s\.index", f"{_WRITES}. Operand: A", "DS_HERE"),
    (r"warpgroup_mma\(p\.ds_s\.index", f"{_WRITES}. Operand: B", "DS_HERE"),  # keys past a length, which their consumer cleared before ds
    (r"tma_add\(dq_desc, .*p\.dq_s", _WRITES, "DQ_HERE"),
)


def behind_named_barrier(report: str) -> str:
    """By which named barrier the access is ordered that a report names, or nothing if by none that is known."""
    found = re.match(r"dkdv: (\w+\.py):(\d+)\b.*?: (.*)", report)
    path = found and os.path.join(os.path.dirname(SOURCES), "kernels", "hopper", found[1])
    if not found or not path or not os.path.exists(path):
        return ""
    with open(path) as file:
        statement = file.read().splitlines()[int(found[2]) - 1]
    return next((name for reads, says, name in NAMED if re.search(reads, statement) and re.search(says, found[3])), "")


def log_of(logs: str, tool: str, name: str) -> str:
    return os.path.join(logs, f"{tool} {name}.txt".replace(" ", "-").replace(",", ""))


def examine(tool: str, name: str, program: str | None, deadline: float, logs: str, cache: str) -> str:
    """cache: a folder for what Triton compiles for its sanitizer, which is not what its key says."""
    environment = dict(os.environ)
    command = [sys.executable, os.path.abspath(__file__), "--case", name]
    if tool.startswith("consan"):
        command += ["--consan", tool.removeprefix("consan-")]
        environment["TRITON_CACHE_DIR"] = cache
    elif program is None:
        return "compute-sanitizer is not installed here"
    else:
        shown = ["--racecheck-report", "analysis", "--show-backtrace", "no"] if tool == "racecheck" else []
        command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "100000", *shown, *command]
    left = min(PATIENCE[tool], deadline - time.monotonic())
    if left < 5:
        return "no time left"
    status: int | None = None
    with open(log_of(logs, tool, name), "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
        try:
            status = process.wait(left)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and the program under the tool
            process.wait()
        log.seek(0)
        return verdict(tool, status, log.read())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default=",".join(TOOLS), help=f"of {', '.join(TOOLS)}")
    parser.add_argument("--cases", default="", help="names, or beginnings of names, separated by semicolons; default all")
    parser.add_argument("--logs", metavar="FOLDER", help="where what the tools say is kept (default: a new folder for temporary files)")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="at a time (default: %(default)s, as many as there are processors)"
    )
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--consan", choices=("", "forward", "backward"), default="", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.case:
        return run_case(given.case, given.consan, given.consan == "backward")
    tools = given.tools.split(",")
    if unknown := set(tools) - set(TOOLS):
        parser.error(f"--tools: wanted some of {', '.join(TOOLS)}, got {', '.join(sorted(unknown))}")
    beginnings = [name.strip() for name in given.cases.split(";") if name.strip()]
    names = [name for name in CASES if not beginnings or any(name.startswith(beginning) for beginning in beginnings)]
    logs = given.logs or tempfile.mkdtemp(prefix="triflash-races-")
    os.makedirs(logs, exist_ok=True)
    program, began = sanitizer(), time.monotonic()
    jobs = [(tool, name) for tool in sorted(tools, key=TOOLS.index, reverse=True) for name in names]  # what takes longest comes first
    with ThreadPoolExecutor(given.processes) as pool, tempfile.TemporaryDirectory(prefix="triflash-consan-") as cache:
        found = dict(zip(jobs, pool.map(lambda job: examine(*job, program, began + given.budget, logs, cache), jobs), strict=True))
    told: dict[str, list[str]] = defaultdict(list)
    for tool, name in jobs:
        if tool.startswith("consan") and os.path.exists(log_of(logs, tool, name)):
            with open(log_of(logs, tool, name)) as log:
                for each in reports(log.read()):
                    told[each].append(name)
    print(f"{len(jobs)} runs in {time.monotonic() - began:.0f} s; what the tools said is in {logs}")
    for tool in tools:
        clean = sum(found[tool, name].startswith("clean") for name in names)
        print(f"{tool}: {clean} of {len(names)} cases clean")
        for name in names:
            if found[tool, name] != "clean":
                print(f"  {name}: {found[tool, name]}")
    for each, cases in sorted(told.items()):
        by = behind_named_barrier(each)
        print(f"{each} ({f'ordered by {by}; ' * bool(by)}{len(cases)} cases: {'; '.join(cases)})")
    return int(not all(said.startswith("clean") for said in found.values()))


if __name__ == "__main__":
    sys.exit(main())
