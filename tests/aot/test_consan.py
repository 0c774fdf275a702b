"""``scripts/consan.py`` on a kernel with Triton's sanitizer in it: its functions compute what they did, and ptxas takes it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts"))

from machine_code import MEASURED
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import make_backend
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

import consan
from triflash.launch.ahead import target_of

pytestmark = pytest.mark.skipif(not MEASURED, reason="of another release, which nobody has looked at")


@gluon.jit
def fill(full, empty, buffer):
    for n in range(3):
        mbarrier.wait(empty, (n & 1) ^ 1)
        buffer.store(gl.full([64], n, gl.int32, gl.BlockedLayout([2], [32], [1], [0])))
        mbarrier.arrive(full)


@gluon.jit
def read(full, empty, buffer, out):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for n in range(3):
        mbarrier.wait(full, n & 1)
        gl.store(out + gl.arange(0, 64, LAYOUT), buffer.load(LAYOUT))
        mbarrier.arrive(empty)


@gluon.jit
def hand_over(out):
    buffer = gl.allocate_shared_memory(gl.int32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=1)
    gl.warp_specialize([(read, (full, empty, buffer, out)), (fill, (full, empty, buffer))], [1], [24])


def functions(ptx: str) -> dict[str, list[str]]:
    """The bodies of the sanitizer's."""
    found = re.findall(r"^\.func.*?(__triton_consan_\w+)\(.*?\n\{\n(.*?)^\}", ptx, re.M | re.S)
    return {name: body.splitlines() for name, body in found}


def effects(body: list[str]) -> Iterator[str]:
    """What a function does, in order, with formulas for registers: an address is a formula, and what is loaded one of when."""
    registers: dict[str, str] = {}
    stores: dict[str, int] = {}

    def formula(text: str) -> str:
        return str(hash(re.sub(r"%[a-z]+\d+", lambda found: registers.get(found[0], "new"), text)))

    for part in consan._parts([line for line in body if not line.strip().startswith(".reg")]):
        text = " ".join(consan._code(part))
        writes, _ = consan._registers(part)
        address = consan._PLACE.search(text)
        place = formula(address[0]) if address else ""
        if consan._FIXED.search(text):
            stores[place] = stores.get(place, 0) + 1
            yield formula(text)
            continue
        value = formula(f"{text} {stores.get(place, 0) if 'ld.global' in text else ''}")
        registers |= {name: f"{value}.{number}" for number, name in enumerate(sorted(writes))}


def test_functions_do_what_they_did(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before: list[str] = []
    plain = CUDABackend.make_ptx

    def kept(self: CUDABackend, *given: object) -> str:
        before.append(plain(self, *given))
        return before[-1]

    monkeypatch.setattr(CUDABackend, "make_ptx", kept)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    target = target_of("sm90")
    with consan.watching():
        source = GluonASTSource(hand_over, {"out": "*i32"}, {}, {(0,): [["tt.divisibility", 16]]})
        options = make_backend(target).parse_options({"num_warps": 4, "instrumentation_mode": "consan"})
        after = triton.compile(source, target=target, options=options.__dict__)
    assert CUDABackend.make_ptx is kept and triton.knobs.compilation.instrumentation_mode == ""
    old, new = functions(before[0]), functions(after.asm["ptx"])
    assert old.keys() == new.keys() and any("read_visibility" in name for name in old)
    for name in old:
        assert list(effects(old[name])) == list(effects(new[name])), name
    assert sum(old[name] != new[name] for name in old) > 5
    assert after.asm["cubin"] and not after.metadata.sanitize_overflow
    assert "setmaxnreg" in before[0] and "setmaxnreg" not in after.asm["ptx"]
    failures = before[0].count("call.uni __assertfail")
    deadlocks = sum("Deadlock" in bytes(map(int, x.split(","))).decode() for _, x in re.findall(consan._MESSAGE, before[0]))
    assert 0 < deadlocks == after.asm["ptx"].count("call.uni __assertfail") < failures
    assert after.asm["ptx"].count("call.uni consan_tell") == failures - deadlocks
