"""What the compiler made of a Hopper kernel: ptxas's log, the machine code, and what is looked for in them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import tempfile
from dataclasses import replace
from typing import Any
from unittest import mock

import triton
from triton.backends.nvidia.compiler import get_ptxas

from triflash.launch import ahead
from triflash.launch.calls import Call
from triflash.plan.steps import Plan

MEASURED = triton.__version__.startswith("3.6")  # whose compiler's counts of registers and spills the limits of these tests are
MOST_SPILLS = 32 if MEASURED else 64  # 4-byte words of a thread, in portable kernels; compilers that nothing was tuned for may take more


def compiled_with_log(call: Call) -> tuple[Any, str]:
    """A launch's kernel, compiled for sm90, and what ptxas had to say about it: once more where it had been compiled before."""
    printed = io.StringIO()
    with mock.patch.object(triton.knobs.nvidia, "dump_ptxas_log", True), contextlib.redirect_stdout(printed):
        compiled = ahead.compile_for(call, "sm90")
    log = printed.getvalue() or assembled(compiled.asm["ptx"])
    assert "Compiling entry function" in log, "not what ptxas says with -v, in which nothing would be found"
    return compiled, log


def with_both_loops(plan: Plan) -> Plan:
    """A plan whose kernels with two loops are launched once, as of short problems."""
    return Plan(plan.backend, tuple(replace(step, loops="both") for step in plan.steps if step.loops != "any"))


def assembled(ptx: str, *options: str) -> str:
    """What ptxas, the one that Triton itself uses, has to say about a PTX text."""
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "kernel.ptx")
        with open(source, "w") as file:
            file.write(ptx)
        command = [get_ptxas(90).path, "-v", *options, "--gpu-name=sm_90a", source, "-o", os.path.join(folder, "kernel.cubin")]
        run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def serialised(log: str) -> list[str]:
    """Lines of ptxas's log that say that asynchronous products wait for one another (C7510 and its kin)."""
    return [line for line in log.splitlines() if re.search(r"C75\d\d|serializ", line)]


def parameters_of(compiled: Any) -> list[tuple[int, int]]:
    """Offset and size of each of a kernel's parameters, in order, as its cubin has them."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-elf", file.name], capture_output=True, text=True, check=True).stdout
    pattern = r"Ordinal\s*:\s*0x(\w+)\s+Offset\s*:\s*0x(\w+)\s+Size\s*:\s*0x(\w+)"
    found = sorted(tuple(int(number, 16) for number in each) for each in re.findall(pattern, text))
    return [(offset, size) for _, offset, size in found]


def disassembled(compiled: Any) -> str:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def unfenced_releases(code: str) -> int:
    """How often a barrier is told "empty" while loads from shared memory, and no fence after them, came before in the text.

    A load may wait in its queue while its thread goes on, and TMA overtakes it: a bias once changed under its readers that way. Loads of a
    partition's arguments, before its first wait, do not count.
    """
    waited = pending = False
    found = 0
    for line in code.splitlines():
        if "USETMAXREG" in line:
            waited = pending = False
        elif "PHASECHK" in line:
            waited = True
        elif re.search(r"\bLDSM?\b", line):
            pending = waited
        elif "MEMBAR" in line:
            pending = False
        elif "SYNCS.ARRIVE" in line:
            found += pending
    return found


_LABEL = re.compile(r"^\s*\.(L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z0-9_.]+)\s*(.*?)\s*;")
_WRITES_UNIFORM = re.compile(r"^(U(?!SETMAXREG|STATUS|BLK|TMA|CGABAR|SYNCS)|R2UR|S2UR|VOTEU|REDUX|CREDUX)")


def unfenced_products(code: str) -> int:
    """How many products follow in the text upon own stores to shared memory without a fence, and behind that a barrier, between: they might
    not see what was stored."""
    found = 0
    for partition in re.split(r"USETMAXREG", code):
        state = "clean"
        for line in partition.splitlines():
            if re.search(r"\bSTSM?\b", line):
                state = "stored"
            elif "FENCE.VIEW.ASYNC" in line and state == "stored":
                state = "fenced"
            elif "BAR.SYNC" in line and state == "fenced":
                state = "clean"
            elif "HGMMA" in line:
                found += state != "clean"
    return found


def ambiguous_descriptors(code: str) -> list[str]:
    """Products whose operands' descriptors come from one instruction on some paths to them, and from another one on others.

    Descriptors are worked out once before a loop, or anew in each step, so that only one instruction should be found for each. ptxas 12.8 has
    made two loops share a descriptor that is worked out just where the first of them is entered, which may have been passed by; the second
    then read what another computation had left in the register. Found by reaching definitions, through sums of uniform registers.
    """
    order = ["entry"]
    blocks: dict[str, list[tuple[str, str, str, str]]] = {"entry": []}

    def begin(name: str) -> None:
        order.append(name)
        blocks[name] = []

    for line in code.splitlines():
        label, found = _LABEL.match(line), _INSTRUCTION.search(line)
        if label:
            begin(label.group(1))
        elif found:
            blocks[order[-1]].append((found.group(1) or "", found.group(2), found.group(3), line.strip()))
            if found.group(2).startswith(("BRA", "BRX", "EXIT", "RET")):
                begin(f"after {len(order)}")
    leads: dict[str, list[str]] = {}
    for place, name in enumerate(order):
        following = order[place + 1 : place + 2]
        predicate, op, operands, _ = blocks[name][-1] if blocks[name] else ("", "", "", "")
        targets = re.findall(r"\.(L_x_\d+)", operands) if op.startswith(("BRA", "BRX")) else []
        passes = not op.startswith(("BRA", "BRX", "EXIT", "RET")) or predicate or re.match(r"!?U?P\d", operands) or op.startswith("BRA.")
        leads[name] = targets + (following if passes else [])

    def effect(op: str, operands: str) -> tuple[list[int], list[int]]:
        """Uniform registers that an instruction reads (of a product: its descriptors), and those that it writes."""
        parts = [part.strip() for part in operands.split(",")]
        if op.startswith("HGMMA"):
            first = int(re.search(r"gdesc\[UR(\d+)", operands).group(1))  # type: ignore[union-attr]
            return list(range(first + 2 * parts[1].startswith("R"), first + 4)), []
        written: list[int] = []
        if _WRITES_UNIFORM.match(op):
            while parts and not re.fullmatch(r"UR\d+", parts[0]) and re.fullmatch(r"!?UP\w+|PT", parts[0]):
                parts.pop(0)
            if parts and re.fullmatch(r"UR\d+", parts[0]):
                first = int(parts.pop(0)[2:])
                written = list(range(first, first + (2 if ".64" in op or ".WIDE" in op else 1)))
        return [int(number) for number in re.findall(r"\bUR(\d+)", ",".join(parts))], written

    Place = tuple[str, int]
    arriving: dict[str, dict[int, frozenset[Place]]] = {name: {} for name in order}
    work, seen = ["entry"], {"entry"}
    while work:
        name = work.pop()
        have = dict(arriving[name])
        for at, (predicate, op, operands, _) in enumerate(blocks[name]):
            for register in effect(op, operands)[1]:
                have[register] = frozenset({(name, at)}) | (have.get(register, frozenset()) if predicate else frozenset())
        for to in leads[name]:
            changed = to not in seen
            seen.add(to)
            for register, places in have.items():
                joined = arriving[to].get(register, frozenset()) | places
                if joined != arriving[to].get(register):
                    arriving[to][register] = joined
                    changed = True
            if changed:
                work.append(to)
    sources: dict[tuple[Place, int], frozenset[Place]] = {}
    products: list[tuple[Place, int]] = []
    for name in order:
        have = dict(arriving[name])
        for at, (predicate, op, operands, _) in enumerate(blocks[name]):
            read, written = effect(op, operands)
            for register in read:
                sources[(name, at), register] = have.get(register, frozenset())
                if op.startswith("HGMMA"):
                    products.append(((name, at), register))
            for register in written:
                have[register] = frozenset({(name, at)}) | (have.get(register, frozenset()) if predicate else frozenset())

    found = []
    for use in products:
        follow, known = [use], {use}
        while follow:
            one = follow.pop()
            # R2UR brings back what registers were too few to keep: it is one with the instruction that worked it out.
            places = {(n, at) for n, at in sources[one] if blocks[n][at][1] != "R2UR"}
            if len({blocks[n][at][1] for n, at in places}) > 1:  # instructions of one kind do the same for either path
                found.append(blocks[use[0][0]][use[0][1]][3] + f" // UR{one[1]}: " + "; ".join(sorted(blocks[n][a][3] for n, a in places)))
                break
            for place in places:
                predicate, op, operands, _ = blocks[place[0]][place[1]]
                if op.startswith(("UIADD3", "UMOV", "ULOP3", "USGXT")):
                    for register in effect(op, operands)[0]:
                        if (place, register) not in known:
                            known.add((place, register))
                            follow.append((place, register))
    return found


_LOW_HALF = re.compile(r"(R\d+), (P\d), (R\d+)(?:\.reuse)?, 0x[0-9a-f]+, RZ$")
_HIGH_HALF = re.compile(r"R\d+, (R\d+)(?:\.reuse)?, -?0x[0-9a-f]+, RZ, (P\d), !PT$")


def halves_of_one_register(code: str) -> list[str]:
    """Sums of 64 bits of which both halves start from one register that nothing wrote in between.

    A shared-memory descriptor is a sum of an address, whose upper half is 0, and a constant. ptxas 12.8 has lost both of its halves where
    registers were scarce, and added the constant to one register that held a score by then: an illegal address.
    """
    found = []
    lower: dict[str, str] = {}  # by the predicate that carries
    for line in code.splitlines():
        instruction = _INSTRUCTION.search(line)
        if not instruction:
            continue
        _, op, operands = instruction.groups()
        high = _HIGH_HALF.search(operands) if op == "IADD3.X" else None
        if high and lower.get(high[2]) == high[1]:
            found.append(line.strip())
        written = re.match(r"(?:!?U?P\w+, )*R(\d+)\b", operands)
        if written and not op.startswith(("ST", "RED", "R2UR")):
            first, count = int(written[1]), 4 if ".128" in op else 2 if ".64" in op or "WIDE" in op else 1
            gone = {f"R{first + n}" for n in range(count)}
            lower = {carry: register for carry, register in lower.items() if register not in gone}
        low = _LOW_HALF.match(operands) if op == "IADD3" else None
        if low:
            lower.pop(low[2], None)
            if low[1] != low[3]:
                lower[low[2]] = low[3]
    return found
