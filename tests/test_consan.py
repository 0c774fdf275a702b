"""``scripts/consan.py`` on PTX written by hand: what it moves, and what it does at a failed assertion. tests/aot has a whole kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import consan

LOADS = """
ld.param.b64 %rd1, [f_param_0];
add.s64 %rd2, %rd1, 8;
ld.global.b64 %rd3, [%rd1];
ld.global.b64 %rd4, [%rd2];
and.b64 %rd5, %rd3, 3;
and.b64 %rd6, %rd4, 3;
st.global.b64 [%rd1], %rd5;
st.global.b64 [%rd2], %rd6;
ret;
"""


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


def test_numbers_are_loaded_where_they_are_used() -> None:
    assert [line.split()[0] for line in consan.lazily(lines(LOADS))] == [
        "ld.param.b64", "ld.global.b64", "and.b64", "st.global.b64", "add.s64", "ld.global.b64", "and.b64", "st.global.b64", "ret;"
    ]  # fmt: skip


@pytest.mark.parametrize("between", [
    "st.global.b64 [%rd1], %rd2;",  # the same address by the same register
    "st.global.b64 [%rd7], %rd2;",  # and by another: 8 of %rd2 and 0 of %rd1 …
    "bar.sync 0;",
    "// begin inline asm\natom.global.add.u32 %r1, [%rd9], 1;\n// end inline asm",
    "{ // callseq\n.param .b64 x;\nst.param.b64 [x], %rd2;\ncall.uni other, (x);\n}",
])  # fmt: skip
def test_no_load_moves_behind_what_may_change_it(between: str) -> None:
    body = lines(f"add.s64 %rd2, %rd1, 8;\nadd.s64 %rd7, %rd2, -8;\nld.global.b64 %rd3, [%rd1];\n{between}\nst.global.b64 [%rd8], %rd3;")
    moved = consan.lazily(body)
    assert moved.index("ld.global.b64 %rd3, [%rd1];") < moved.index(lines(between)[0])


def test_a_load_moves_behind_a_store_elsewhere() -> None:
    body = lines("ld.global.b64 %rd3, [%rd1];\nst.global.b64 [%rd1+8], %rd2;\nst.global.b64 [%rd8], %rd3;\nret;")
    assert consan.lazily(body) == [body[1], body[0], body[2], body[3]]


@pytest.mark.parametrize("jump", ["@%p1 bra $L__BB0_1;\n$L__BB0_1:", "ld.global.b64 %rd3, [%rd1];"])
def test_what_jumps_or_writes_twice_stays(jump: str) -> None:
    body = lines(f"ld.global.b64 %rd3, [%rd1];\n{jump}\nst.global.b64 [%rd1+8], %rd2;\nst.global.b64 [%rd8], %rd3;")
    assert consan.lazily(body) == body


def kernel(message: str) -> str:
    text = ", ".join(map(str, message.encode() + b"\0"))
    return f""".version 8.7
.address_size 64
.global .align 1 .b8 assertMessage_3[{len(message) + 1}] = {{{text}}};
.visible .entry dq()
{{
setmaxnreg.dec.sync.aligned.u32 24;
.loc 1 2 3 // rings.py:2:3 @[ dq.py:40:5 ]
@%p1 bra $L__BB1_2;
// %bb.1:
bra.uni $L__BB1_9;
$L__BB1_2:
ret;
$L__BB1_9:
.loc 1 7 3 // rings.py:7:3 @[ dq.py:41:5 ]
{{ // callseq 0, 0
mov.b64 %rd1, assertMessage_3;
call.uni __assertfail, (param0);
}}
trap;
}}"""


def test_a_failed_assertion_is_told_of_once_and_passed_over() -> None:
    said = consan.quicker(kernel("50% of it"))
    body = said[said.index(".entry") :]
    assert "trap" not in said and "__assertfail" not in said and "setmaxnreg" not in said
    assert body.index("$L__BB1_9:") < body.index("call.uni consan_tell") < body.index("bra $L__BB1_2;\n}")
    text = b"consan: dq: rings.py:7 < dq.py:41: 50%% of it\n\0"  # of printf
    assert f"consan_site_0[{len(text)}] = {{{', '.join(map(str, text))}}};" in said and "consan_told[1]" in said


def test_a_place_is_told_of_with_what_calls_it() -> None:
    """The sanitizer gives the right line and the kernel's own file; the compiler's note of what follows has both, and the calls."""
    said = kernel("it").replace("rings.py:7:3 @[ dq.py:41:5 ]", "dq.py:7:3")
    said = said.replace("ret;", "ret;\n.loc 1 7 3 // step.py:7:3 @[ dq.py:9:5 @[ dq.py:20 ] ]\n.loc 1 7 3 // far.py:7:3 @[ dq.py:1:1 ]")
    text = b"consan: dq: step.py:7 < dq.py:9 < dq.py:20: it\n"
    assert ", ".join(map(str, text)) in consan.quicker(said)


@pytest.mark.parametrize("said", [kernel("Deadlock detected"), kernel("it").replace("bra.uni $L__BB1_9", "ret")])
def test_a_deadlock_ends_the_kernel_and_so_does_what_is_not_known(said: str) -> None:
    rewritten = consan.quicker(said)
    assert "trap;" in rewritten and "__assertfail" in rewritten and "consan_tell" not in rewritten
