"""Triton's concurrency sanitizer for large kernels: quick to assemble, and going on behind what it finds. Called by ``races.py``.

It keeps its books in tables of up to 64 numbers for each buffer of a kernel, and has functions that read and write them without a loop.
As Triton 3.6 writes them, ptxas took from one to more than six minutes for a kernel. ``quicker`` rewrites the PTX:

- ``setmaxnreg`` is left out, by which alone ptxas puts each function into the kernel wherever that calls it, 600 times. Kernels are right
  without it, by registers kept in memory.
- Functions load a table, compute, and store it: 2,000 registers, which are kept in memory, in minutes. ``lazily`` loads each number where
  it is used first, and nothing else changes.
- A failed assertion ended the kernel. Now each place prints its line once and the kernel goes on, so that one report, which may be
  explained (the sanitizer knows nothing of named barriers), hides no other. A deadlock still ends it.

Assertions that integers do not overflow, which come with the sanitizer, are not asked for: the step of Philox's key wraps round by design.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

PREFIX = "consan: "  # of what the device prints
# What stays in its place: whatever stores, waits, jumps or talks to other threads.
_FIXED = re.compile(r"\b(st|atom|red|bar|barrier|fence|membar|call|trap|ret|bra|shfl|vote|match|redux|activemask|elect|cp|mbarrier)\b")
_REGISTER = re.compile(r"%[a-z]+\d+")
_PLACE = re.compile(r"\[\s*(%rd\d+)(?:\s*\+\s*(-?\d+))?\s*\]")
_TELL = """
.extern .func (.param .b32 func_retval0) vprintf (.param .b64 vprintf_param_0, .param .b64 vprintf_param_1);
.global .align 4 .b32 consan_told[{count}];
.func consan_tell(.param .b64 consan_tell_text, .param .b32 consan_tell_site)
{{
	.reg .pred %p<2>;
	.reg .b32 %r<4>;
	.reg .b64 %rd<7>;
	ld.param.b32 %r1, [consan_tell_site];
	mul.wide.u32 %rd1, %r1, 4;
	mov.b64 %rd2, consan_told;
	add.s64 %rd3, %rd2, %rd1;
	atom.global.exch.b32 %r2, [%rd3], 1;
	setp.ne.b32 %p1, %r2, 0;
	@%p1 bra $consan_told_before;
	ld.param.b64 %rd4, [consan_tell_text];
	cvta.global.u64 %rd5, %rd4;
	mov.b64 %rd6, 0;
	{{
	.param .b64 text;
	.param .b64 values;
	.param .b32 length;
	st.param.b64 [text], %rd5;
	st.param.b64 [values], %rd6;
	call.uni (length), vprintf, (text, values);
	ld.param.b32 %r3, [length];
	}}
$consan_told_before:
	ret;
}}
"""


@contextmanager
def watching() -> Iterator[None]:
    """Within it Triton compiles kernels with its sanitizer, for NVIDIA GPUs."""
    import triton
    from triton.backends.nvidia.compiler import CUDABackend

    parse_options, make_ptx = CUDABackend.parse_options, CUDABackend.make_ptx

    def parsed(self: Any, given: dict[str, Any]) -> Any:
        return parse_options(self, {**given, "sanitize_overflow": False, "ptx_options": "-O1"})

    def made(self: Any, *given: Any) -> str:
        return quicker(make_ptx(self, *given))

    triton.knobs.compilation.instrumentation_mode = "consan"
    CUDABackend.parse_options, CUDABackend.make_ptx = parsed, made
    try:
        yield
    finally:
        CUDABackend.parse_options, CUDABackend.make_ptx = parse_options, make_ptx
        triton.knobs.compilation.instrumentation_mode = ""


def quicker(ptx: str) -> str:
    """The PTX of a kernel with the sanitizer in it, as this file's head says."""
    lines = [line for line in ptx.split("\n") if not line.lstrip().startswith("setmaxnreg")]
    done: list[str] = []
    at = 0
    while at < len(lines):
        if re.match(r"\.func\b.*__triton_consan_", lines[at]):
            begin = next(n for n in range(at, len(lines)) if lines[n].startswith("{"))
            end = next(n for n in range(begin, len(lines)) if lines[n].startswith("}"))
            done += [*lines[at : begin + 1], *lazily(lines[begin + 1 : end])]
            at = end
        done.append(lines[at])
        at += 1
    return "\n".join(going_on(done))


def lazily(body: Sequence[str]) -> list[str]:
    """A function's instructions in another order: each that only computes or loads directly before the first that needs it (none that
    nobody needs), but no load behind a store to the same address. Functions with jumps in them stay as they are.
    """
    declared = [line for line in body if line.strip().startswith((".reg", ".local"))]
    parts = list(_parts([line for line in body if line not in declared]))
    texts = [" ".join(_code(part)) for part in parts]
    made: dict[str, int] = {}
    places: dict[str, tuple[str, int]] = {}
    needs: list[set[str]] = []
    for number, (part, text) in enumerate(zip(parts, texts, strict=True)):
        writes, reads = _registers(part)
        needs.append(reads)
        if re.search(r"\bbra\b|^\$L__BB", text) or any(name in made for name in writes):
            return list(body)
        if found := re.fullmatch(r"add\.s64\s+(%rd\d+), (%rd\d+), (-?\d+);", text):
            base, offset = places.get(found[2], (found[2], 0))
            places[found[1]] = base, offset + int(found[3])
        made |= dict.fromkeys(writes, number)

    def place(text: str) -> tuple[str, int] | None:
        """A register and bytes from where it points to."""
        found = _PLACE.search(text)
        if found is None:
            return None
        base, offset = places.get(found[1], (found[1], 0))
        return base, offset + int(found[2] or 0)

    out: list[str] = []
    written = [False] * len(parts)

    def write(number: int) -> None:
        waiting = [(number, False)]
        while waiting:
            one, ready = waiting.pop()
            if ready and not written[one]:
                written[one] = True
                out.extend(parts[one])
            elif not written[one]:
                waiting.append((one, True))
                waiting += [(made[name], False) for name in sorted(needs[one]) if made.get(name, one) < one]

    loads: dict[tuple[str, int] | None, list[int]] = {}
    for number, text in enumerate(texts):
        if not _FIXED.search(text):
            if re.search(r"\bld\.(?!param)", text):
                loads.setdefault(place(text), []).append(number)
            if text.startswith((".", "$")):
                write(number)
            continue
        if not text.startswith("st.param"):  # a result
            alone = "st.global" in text and place(text) is not None
            for key in [place(text), None] if alone else list(loads):
                for load in loads.pop(key, ()):
                    write(load)
        write(number)
    return [*declared, *out]


def _parts(lines: Sequence[str]) -> Iterator[Sequence[str]]:
    """A function's instructions, with what belongs together (inline assembly, a call) in one; no comments, no numbers of lines."""
    at = 0
    while at < len(lines):
        text, end = lines[at].strip(), at
        if text.startswith("// begin inline asm"):
            while "// end inline asm" not in lines[end]:
                end += 1
        elif text.startswith("{"):
            depth = text.count("{") - text.count("}")
            while depth:
                end += 1
                depth += lines[end].count("{") - lines[end].count("}")
        elif not text or text.startswith(("//", ".loc")):
            at += 1
            continue
        else:
            while not lines[end].partition("//")[0].rstrip().endswith((";", ":")):
                end += 1
        yield lines[at : end + 1]
        at = end + 1


def _code(part: Sequence[str]) -> list[str]:
    return [code for line in part if (code := line.partition("//")[0].strip())]


def _registers(part: Sequence[str]) -> tuple[set[str], set[str]]:
    """Those that it writes, and the others that it reads."""
    writes: set[str] = set()
    reads: set[str] = set()
    for line in _code(part):
        for instruction in filter(None, map(str.strip, line.split(";"))):
            found = re.match(r"(@!?%p\d+\s+)?([a-z][\w.:]*)\s*(.*)", instruction)
            if found is None:
                continue
            guard, name, operands = found.groups()
            first = 0 if name.startswith(("st.", "red.", "bar", "call", "trap", "bra", "ret")) else _end_of_first(operands)
            writes |= set(_REGISTER.findall(operands[:first]))
            reads |= set(_REGISTER.findall((guard or "") + operands[first:]))
    return writes, reads - writes


def _end_of_first(operands: str) -> int:
    """Where the first operand ends, which is what an instruction writes."""
    at = operands.find("}") if operands.startswith("{") else operands.find(",")
    return len(operands) if at < 0 else at + 1


def going_on(lines: Sequence[str]) -> list[str]:
    """A kernel that prints a line where an assertion fails, once a place, and goes on."""
    text = "\n".join(lines)
    kernel = re.search(r"\.entry (\w+)", text)
    messages = {name: bytes(map(int, found.split(","))).rstrip(b"\0").decode() for name, found in _MESSAGE.findall(text)}
    where = ""
    sites: list[str] = []
    rewritten: list[str] = []
    behind = {fails: goes_on for goes_on, fails in _BRANCH.findall(text)}
    at_label = {found[1]: at for at, line in enumerate(lines) if (found := re.match(r"(\$L__BB\d+_\d+):", line))}
    chains: dict[str, list[tuple[int, str]]] = {}
    for at, line in enumerate(lines):
        if found := re.match(r"\s*\.loc\s.*?//\s*([\w.]+\.py(:\d+:\d+) @\[.*)", line):
            chains.setdefault(found[2], []).append((at, found[1]))
    at = 0
    while at < len(lines):
        line = lines[at]
        if found := re.match(r"\s*\.loc\s.*?//\s*(.*)", line):
            where = found[1]
        label = re.match(r"(\$L__BB\d+_\d+):", line)
        if label and label[1] in behind:
            end = next(n for n in range(at, len(lines)) if re.match(r"\s*(trap|bra\S*|ret)\b", lines[n]))
            block = "\n".join(lines[at : end + 1])
            message = re.search(r"assertMessage_\d+", block)
            if "__assertfail" in block and "trap;" in lines[end] and message and "Deadlock" not in messages[message[0]]:
                where = (re.findall(r"\.loc\s.*?//\s*(.*)", block) or [where])[-1]
                place = re.search(r":\d+:\d+", where)  # the sanitizer gives line and column, and the file of the kernel
                near = [(abs(each - at_label[behind[label[1]]]), chain) for each, chain in chains.get(place[0] if place else "", ())]
                where = min(near)[1] if near else where
                told = f"{PREFIX}{kernel[1] if kernel else ''}: {_chain(where)}: {messages[message[0]]}\n"
                rewritten += [lines[at], *_told(len(sites)), f"\tbra {behind[label[1]]};"]
                sites.append(told)
                at = end + 1
                continue
        rewritten.append(line)
        at += 1
    if not sites:
        return rewritten
    head = next(n for n, line in enumerate(rewritten) if line.startswith(".address_size")) + 1
    texts = [(each.replace("%", "%%") + "\0").encode() for each in sites]
    strings = [f".global .align 1 .b8 consan_site_{n}[{len(x)}] = {{{', '.join(map(str, x))}}};" for n, x in enumerate(texts)]
    return [*rewritten[:head], *strings, *_TELL.format(count=len(sites)).split("\n"), *rewritten[head:]]


_MESSAGE = re.compile(r"(assertMessage_\d+)\[\d+\] = \{([\d, ]+)\}")
_BRANCH = re.compile(r"@!?%p\d+ bra\s+(\$L__BB\d+_\d+);\n(?:\s*//.*\n|\s*\.loc.*\n|\$L__tmp\d+:\n)*\s*bra\.uni\s+(\$L__BB\d+_\d+);")


def _told(site: int) -> list[str]:
    return [
        "\t{", "\t.reg .b64 %at;", "\t.param .b64 text;", "\t.param .b32 site;", f"\tmov.b64 %at, consan_site_{site};",
        "\tst.param.b64 [text], %at;", f"\tst.param.b32 [site], {site};", "\tcall.uni consan_tell, (text, site);", "\t}",
    ]  # fmt: skip


def _chain(where: str) -> str:
    """Of the compiler's note of a place, which line of which file, and what that was called by."""
    return " < ".join(re.findall(r"([\w.]+\.py:\d+)", where)) or "somewhere"
