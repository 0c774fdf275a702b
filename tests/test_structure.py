"""The rules of the house, checked: imports point one way, autograd lives in two places, and importing starts nothing."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import triflash

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import house
from house import imports

ROOT = Path(triflash.__file__).parent
MODULES = house.modules()
OUTSIDE_THE_RULES = ("triflash.cli", "triflash.__main__")  # applications: they may use anything that is public

# Who may import what: the longest prefix decides; a rule lists allowed prefixes.
RULES: dict[str, list[str]] = {
    "triflash.kernels": [],
    "triflash.kernels.keys": ["triton"],
    "triflash.kernels.triton": ["triton", "triflash.kernels.triton"],
    "triflash.kernels.hopper": ["triton", "triflash.kernels.hopper", "triflash.kernels.triton.packed", "triflash.kernels.triton.prims", "triflash.kernels.triton.records"],
    "triflash.dropout": ["torch"],
    "triflash.lengths": ["torch"],
    "triflash.rest": ["torch"],
    "triflash.combine": ["torch", "triflash.rest"],
    "triflash.flops": [],
    "triflash.tiled": ["torch", "triflash.dropout", "triflash.lengths", "triflash.rest"],
    "triflash.oracle": ["torch", "triflash.dropout", "triflash.lengths"],
    "triflash.errors": [],
    "triflash.saved": ["torch", "triflash.errors", "triflash.spec"],
    "triflash.spec": ["torch", "triflash.errors", "triflash.lengths"],
    "triflash.slots": ["torch", "triflash.lengths"],
    "triflash.tiled_cache": ["torch", "triflash.oracle", "triflash.slots", "triflash.tiled"],
    "triflash.oracle_cache": ["torch", "triflash.oracle", "triflash.slots"],
    "triflash.spec_cache": ["torch", "triflash.errors", "triflash.spec"],
    "triflash.checks": ["torch", "triflash.errors"],
    "triflash.form": ["torch", "triflash.spec"],
    "triflash.explanation": ["triflash.plan", "triflash.spec", "triflash.spec_cache", "triflash.launch.ahead"],
    "triflash.explainer": [
        "torch", "triflash.arguments", "triflash.arguments_cache", "triflash.attention", "triflash.bound", "triflash.checks", "triflash.door",
        "triflash.door_cache", "triflash.errors", "triflash.explanation", "triflash.hints", "triflash.kvcache", "triflash.launch.ahead",
        "triflash.nested", "triflash.plan", "triflash.spec", "triflash.spec_cache", "triflash.varlen",
    ],
    "triflash.plan": ["triflash.plan", "triflash.flops", "triflash.spec", "triflash.spec_cache", "triflash.errors"],
    "triflash.plan.device": ["torch"],
    "triflash.launch": [
        "torch", "triflash.launch", "triflash.lengths", "triflash.plan", "triflash.spec", "triflash.spec_cache", "triflash.tiled",
        "triflash.oracle", "triflash.errors",
    ],
    "triflash.launch.cache": [
        "torch", "triflash.launch.append", "triflash.launch.calls", "triflash.launch.few", "triflash.launch.room", "triflash.oracle_cache",
        "triflash.plan", "triflash.slots", "triflash.spec_cache", "triflash.tiled_cache",
    ],
    "triflash.launch.append": ["torch", "triflash.kernels.triton", "triflash.launch.calls", "triflash.plan", "triflash.spec_cache"],
    "triflash.launch.calls": ["torch", "triflash.kernels.keys", "triflash.dropout", "triflash.plan", "triflash.rest", "triflash.spec"],
    "triflash.launch.room": ["torch", "triflash.launch.calls", "triflash.spec"],
    "triflash.launch.native": ["torch", "triton", "triflash.launch.calls"],
    "triflash.launch.compiling": ["torch", "triton", "triflash.errors", "triflash.launch.ahead", "triflash.launch.calls"],
    "triflash.launch.triton": [
        "torch", "triton", "triflash.dropout", "triflash.kernels.triton", "triflash.launch.calls", "triflash.launch.common",
        "triflash.launch.few", "triflash.launch.packed", "triflash.launch.portable", "triflash.launch.room", "triflash.launch.short",
        "triflash.plan", "triflash.spec", "triflash.errors",
    ],
    "triflash.launch.portable": [
        "torch", "triflash.kernels.triton", "triflash.launch.calls", "triflash.launch.common", "triflash.launch.room", "triflash.plan", "triflash.spec",
    ],
    "triflash.launch.short": [
        "torch", "triflash.kernels.triton", "triflash.launch.calls", "triflash.launch.common", "triflash.launch.few", "triflash.launch.room",
        "triflash.plan", "triflash.spec",
    ],
    "triflash.launch.few": [
        "torch", "triflash.kernels.triton", "triflash.launch.calls", "triflash.launch.common", "triflash.launch.room", "triflash.plan",
        "triflash.spec", "triflash.spec_cache",
    ],
    "triflash.launch.common": ["torch", "triflash.plan", "triflash.spec"],
    "triflash.launch.packed": [
        "torch", "triflash.kernels.triton", "triflash.launch.calls", "triflash.launch.common", "triflash.launch.portable",
        "triflash.launch.room", "triflash.plan", "triflash.spec",
    ],
    "triflash.launch.sequences": ["torch", "triflash.spec"],
    "triflash.launch.hopper": [
        "torch", "triton", "triflash.kernels.hopper", "triflash.launch.calls", "triflash.launch.hopper_packed", "triflash.launch.mask_bounds", "triflash.launch.packed",
        "triflash.launch.room", "triflash.plan", "triflash.spec", "triflash.errors",
    ],
    "triflash.launch.hopper_packed": [
        "torch", "triflash.kernels.hopper", "triflash.launch.calls", "triflash.launch.common", "triflash.launch.packed", "triflash.launch.room", "triflash.plan", "triflash.spec",
    ],
    "triflash.launch.mask_bounds": [
        "torch", "triflash.kernels.hopper", "triflash.launch.calls", "triflash.launch.common", "triflash.launch.room", "triflash.plan", "triflash.spec",
    ],
    "triflash.launch.hopper_dq": [
        "torch", "triflash.kernels.hopper", "triflash.launch.calls", "triflash.launch.hopper", "triflash.plan", "triflash.spec",
    ],
    "triflash.launch.hopper_dbias": [
        "torch", "triflash.kernels.hopper", "triflash.launch.calls", "triflash.launch.hopper", "triflash.plan", "triflash.spec",
    ],
    "triflash.launch.hopper_backward": [
        "torch", "triflash.dropout", "triflash.kernels.hopper", "triflash.kernels.triton.features", "triflash.launch.calls", "triflash.launch.common", "triflash.launch.hopper",
        "triflash.launch.hopper_dbias", "triflash.launch.hopper_dq", "triflash.launch.hopper_packed", "triflash.launch.mask_bounds", "triflash.launch.packed",
        "triflash.launch.portable", "triflash.launch.room", "triflash.launch.triton", "triflash.plan", "triflash.spec",
    ],
    "triflash.launch.ahead": ["torch", "triton", "triflash.launch", "triflash.plan", "triflash.spec", "triflash.errors"],
    "triflash.bound": [
        "torch", "triflash.bound", "triflash.form", "triflash.launch", "triflash.plan", "triflash.spec", "triflash.spec_cache",
    ],
    "triflash.bound.cache": [],
    "triflash.derivatives": ["torch", "triflash.errors"],
    "triflash.ops": [
        "torch", "triflash.bound", "triflash.derivatives", "triflash.errors", "triflash.flops", "triflash.form", "triflash.launch.room", "triflash.saved", "triflash.spec",
    ],
    "triflash.ops_checked": ["torch", "triflash.arguments", "triflash.checks", "triflash.derivatives", "triflash.ops", "triflash.ops_varlen"],
    "triflash.ops_varlen": [
        "torch", "triflash.bound", "triflash.derivatives", "triflash.flops", "triflash.form", "triflash.launch.room", "triflash.ops", "triflash.plan.device",
        "triflash.saved", "triflash.spec",
    ],
    "triflash.arguments": [
        "torch", "triflash.checks", "triflash.errors", "triflash.form", "triflash.lengths", "triflash.plan.select", "triflash.spec",
    ],
    "triflash.ops_cache": [
        "torch", "triflash.bound", "triflash.derivatives", "triflash.errors", "triflash.flops", "triflash.launch.room", "triflash.plan.device",
        "triflash.spec_cache",
    ],
    "triflash.arguments_cache": [
        "torch", "triflash.arguments", "triflash.checks", "triflash.errors", "triflash.plan.select", "triflash.spec", "triflash.spec_cache",
    ],
    "triflash.door_cache": [
        "torch", "triflash.arguments_cache", "triflash.bound", "triflash.derivatives", "triflash.door", "triflash.errors", "triflash.ops_cache", "triflash.ops_checked", "triflash.plan",
        "triflash.spec", "triflash.spec_cache",
    ],
    "triflash.kvcache": ["torch", "triflash.checks", "triflash.door_cache", "triflash.hints", "triflash.varlen"],
    "triflash.door": [
        "torch", "triflash.arguments", "triflash.bound", "triflash.checks", "triflash.derivatives", "triflash.errors", "triflash.launch.room", "triflash.nested",
        "triflash.ops", "triflash.ops_checked", "triflash.ops_varlen", "triflash.plan", "triflash.sharded", "triflash.spec",
    ],
    "triflash.nested": ["torch", "triflash.arguments", "triflash.errors"],
    "triflash.sharded": ["torch", "triflash.arguments", "triflash.errors"],
    "triflash.vmap": ["torch", "triflash.ops"],
    "triflash.distributed": [
        "torch", "triflash.distributed", "triflash.arguments", "triflash.bound.cache", "triflash.checks", "triflash.derivatives", "triflash.errors",
        "triflash.form", "triflash.hints", "triflash.lengths", "triflash.ops", "triflash.ops_checked", "triflash.plan.device", "triflash.plan.select", "triflash.spec",
        "triflash.varlen",
    ],
    "triflash.distributed.chunks": ["torch", "triflash.errors"],
    "triflash.distributed.merging": ["torch", "triflash.rest"],
    "triflash.distributed.group": ["torch", "triflash.derivatives", "triflash.errors"],
    "triflash.hints": ["triflash.errors"],
    "triflash.attention": [
        "torch", "triflash.arguments", "triflash.checks", "triflash.combine", "triflash.door", "triflash.errors", "triflash.hints",
        "triflash.ops_checked", "triflash.plan.select",
    ],
    "triflash.nn": ["torch", "triflash.attention", "triflash.checks", "triflash.errors", "triflash.nn"],
    "triflash.compat": [
        "torch", "triflash.attention", "triflash.checks", "triflash.compat", "triflash.errors", "triflash.kvcache", "triflash.varlen",
    ],
    "triflash.compat.words": [],
    "triflash.compat.evoformer": [
        "torch", "triflash.attention", "triflash.checks", "triflash.compat.words", "triflash.errors", "triflash.ops_checked",
    ],
    "triflash.compat.flash_attn_cache": [
        "torch", "triflash.arguments", "triflash.checks", "triflash.compat.words", "triflash.errors", "triflash.kvcache",
    ],
    "triflash.compat.flash_attn": [
        "torch", "triflash.arguments", "triflash.attention", "triflash.checks", "triflash.compat.flash_attn_cache", "triflash.compat.pages",
        "triflash.compat.words",
        "triflash.door", "triflash.errors",
        "triflash.ops", "triflash.ops_checked", "triflash.ops_varlen", "triflash.varlen",
    ],
    "triflash.varlen": [
        "torch", "triflash.arguments", "triflash.checks", "triflash.door", "triflash.errors", "triflash.hints", "triflash.ops_checked", "triflash.plan.select",
    ],
    "triflash.triton_flash_attention": [
        "torch", "triflash.arguments", "triflash.checks", "triflash.door", "triflash.errors", "triflash.ops", "triflash.plan.select",
        "triflash.spec",
    ],
    "triflash.integrations": [
        "torch", "transformers", "triflash.attention", "triflash.errors", "triflash.integrations", "triflash.kvcache", "triflash.plan.device",
        "triflash.varlen",
    ],
}  # fmt: skip
THIRD_PARTY = ("torch", "transformers", "triton", "numpy", "triflash")


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("name", [name for name in MODULES if not any(within(name, p) for p in OUTSIDE_THE_RULES) and name != "triflash"])
def test_arrows_point_downward(name: str) -> None:
    matching = [prefix for prefix in RULES if within(name, prefix)]
    assert matching, f"{name} has no rule: say in RULES what it may import"
    allowed = RULES[max(matching, key=len)]
    for target in imports(name):
        if target.split(".")[0] in THIRD_PARTY:
            assert any(within(target, prefix) for prefix in allowed), f"{name} imports {target}"
        else:
            assert target.split(".")[0] in sys.stdlib_module_names, f"{name} imports {target}"


def test_only_launch_imports_kernels() -> None:
    importers = {
        name for name in MODULES if any(within(t, "triflash.kernels") for t in imports(name)) and not within(name, "triflash.kernels")
    }
    assert importers <= {name for name in MODULES if within(name, "triflash.launch")}


def test_only_kernels_and_their_launchers_import_triton() -> None:
    importers = {name for name in MODULES if any(within(t, "triton") for t in imports(name))}
    assert all(within(name, "triflash.kernels") or within(name, "triflash.launch") for name in importers), importers


def test_importing_the_package_reaches_no_triton() -> None:
    """Follow the imports that happen at import time."""
    seen: set[str] = set()
    queue = ["triflash"]
    while queue:
        name = queue.pop()
        if name in seen or name not in MODULES:
            continue
        seen.add(name)
        for target in imports(name, everywhere=False):
            assert not within(target, "triton"), f"{name} imports {target}"
            parts = target.split(".")
            queue += [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    assert "triflash.ops" in seen and not {"triflash.launch.triton", "triflash.launch.hopper"} & seen


def test_autograd_lives_in_few_places() -> None:
    for name, path in MODULES.items():
        text = path.read_text()
        if any(within(name, p) for p in OUTSIDE_THE_RULES):
            continue
        assert "register_autograd" not in text or name == "triflash.derivatives", name
        assert "(torch.autograd.Function):" not in text or name in (
            "triflash.derivatives",
            "triflash.ops",
            "triflash.vmap",
            "triflash.triton_flash_attention",
            "triflash.distributed.attention",
            "triflash.distributed.packed",
            "triflash.distributed.shares",
        ), name


@pytest.mark.parametrize("name", MODULES)
def test_a_file_opens_with_what_it_is(name: str) -> None:
    text = MODULES[name].read_text()
    if text:
        docstring = ast.get_docstring(ast.parse(text))
        assert docstring, f"{name} wants a first line that says what it holds"
        assert text.count("\n") <= 550, f"{name} is probably two files"


PUBLIC = (  # what users call, and what is called as they ask for it
    "triflash", "triflash.__main__", "triflash.attention", "triflash.varlen", "triflash.kvcache", "triflash.triton_flash_attention",
    "triflash.explainer", "triflash.cli", "triflash.compat", "triflash.integrations", "triflash.nn", "triflash.distributed",
    "triflash.distributed.attention", "triflash.distributed.varlen", "triflash.distributed.shares",
)  # fmt: skip
ROOMS = ("triflash.cli", "triflash.compat", "triflash.integrations", "triflash.nn")  # of which all files are so


@pytest.mark.parametrize("name", [n for n in MODULES if n not in PUBLIC and not any(within(n, room) for room in ROOMS)])
def test_a_file_says_who_calls_it(name: str) -> None:
    docstring = ast.get_docstring(ast.parse(MODULES[name].read_text())) or ""
    by = r"\b([Cc]alled|[Ll]aunched|[Uu]sed|[Ii]mported|[Rr]ead|[Ss]tarted( only)?) by\b"
    assert re.search(rf"{by}|[Kk]ernels import them|\bcalls? it\b|what ``dkdv.py`` makes", docstring, re.IGNORECASE), name


def test_each_kernel_has_one_room() -> None:
    """Steps with a configuration and a grid are made in ``plan/kernels`` alone, and each kernel's in one file, of its backend."""
    rooms: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())) if within(name, "triflash.plan") else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Step" and len(node.args) > 1:
                assert within(name, "triflash.plan.kernels"), f"{name}:{node.lineno} plans a kernel"
                if isinstance(node.args[0], ast.Constant):
                    rooms.setdefault(node.args[0].value, set()).add(name.rpartition(".")[2])
    of_both = {
        "forward": {"forward", "portable"},
        "dq": {"dq", "portable"},
        "dbias": {"dbias", "portable"},
        "delta": {"portable", "rowwise"},
    }
    of_both |= {"extents": {"listed", "packed"}}
    assert len(rooms) >= 20 and {kernel: files for kernel, files in rooms.items() if len(files) > 1} == of_both


def test_kernels_hand_records_on() -> None:
    """No function that runs on the device takes more than 12 parameters, and few lines only hand them on."""
    for folder in ("hopper", "triton"):
        handed, total, signatures = house.plumbing(ROOT / "kernels" / folder)
        assert handed < 0.03 * total and total > 1000
        assert [(count, name) for count, name, entry in signatures if not entry and count > 12] == []
        assert {name.partition(": ")[2] for count, name, entry in signatures if entry and count > 30} == {
            "hopper": {"dkdv", "dkdv_d256", "dbias", "dq", "forward"}, "triton": {"forward", "dkdv", "dq", "dbias", "packed_dbias", "few_forward", "few_backward",
                       "short_forward", "short_backward"},
        }[folder]  # fmt: skip


def test_the_import_graph_is_drawn_as_it_is() -> None:
    """After a change: python3 scripts/house.py imports --write."""
    assert house.graph() in house.DESIGN.read_text()


def test_no_asserts_on_user_input() -> None:
    for name in ("triflash.checks", "triflash.triton_flash_attention", "triflash.errors"):
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(MODULES[name].read_text()))), name


def run_python(program: str, **environment: str) -> str:
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_importing_starts_nothing() -> None:
    """No Triton, no CUDA context, no DTensor; nor does a call on the CPU need them. Adapters import what they adapt to when called."""
    program = """
import sys, torch
before = "triton" in sys.modules
import triflash, triflash.triton_flash_attention
assert not any(name.startswith("triflash.compat") for name in sys.modules)
print("triton" in sys.modules and not before, torch.cuda.is_initialized())
tensors = "torch.distributed.tensor" in sys.modules
q = torch.randn(1, 3, 1, 4, requires_grad=True)
triflash.flash_attn_func(q, q, q).sum().backward()
print(any(f"triflash.launch.{name}" in sys.modules for name in ("triton", "hopper")), torch.cuda.is_initialized())
print("triflash.sharded" in sys.modules or "triflash.distributed" in sys.modules or tensors)
import triflash.integrations.transformers
print("transformers" in sys.modules)
"""
    assert run_python(program, TRITON_INTERPRET="0").split() == ["False"] * 6


def test_help_needs_little_beyond_torch() -> None:
    """`triflash --help` and the greeting answer at once: nothing heavy is imported. Counted, because clocks differ."""
    program = """
import sys, torch
before = set(sys.modules)
from triflash.__main__ import main
for words in (["--help"], []):
    try:
        main(words)
    except SystemExit as left:
        assert not left.code
new = [name for name in sys.modules if name not in before]
print([name for name in new if name.startswith(("triflash.cli.bench", "triflash.cli.tune", "triflash.cli.compile", "triflash.cli.explain"))])
print("modules", len([name for name in new if not name.startswith("triflash")]), *{name.partition(".")[0] for name in new})
"""
    *answer, modules = run_python(program, TRITON_INTERPRET="0").splitlines()
    assert any("usage: triflash" in line for line in answer) and any("triflash --help says" in line for line in answer)
    _, count, *roots = modules.split()
    assert int(count) <= 12, modules  # 0 on 2026-11-30; rich alone has 60
    assert not {"triton", "rich", "matplotlib", "numpy", "transformers", "sympy"} & set(roots), roots
    assert answer[-1] == "[]"  # nor the options of any command


def test_a_reader_that_has_seen_enough() -> None:
    """``triflash env | head -1`` ends without a traceback, whenever the text leaves."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run([sys.executable, "-m", "triflash", "env"], stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (run.returncode, run.stderr) == (141, "")


def test_without_triton() -> None:
    """Where Triton is not installed the tiled backend runs, and naming Triton's says why it cannot."""
    program = """
import importlib.util, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] == "triton" else find_spec(name, package)
sys.meta_path.insert(0, Blocker())
import torch, triflash
q = torch.randn(1, 3, 1, 4, requires_grad=True)
with triflash.record_launches() as ran:
    triflash.flash_attn_func(q, q, q).sum().backward()
print(ran)
try:
    with triflash.backend("triton"):
        triflash.flash_attn_func(q, q, q)
except triflash.UnsupportedError as error:
    print(error)
"""
    ran, message = run_python(program).splitlines()
    assert ran == "['tiled: forward', 'tiled: backward']"
    assert "Triton is not installed" in message and "install triton" in message and "backend('tiled')" in message


def test_version_and_type_information() -> None:
    assert triflash.__version__.count(".") >= 1
    assert (ROOT / "py.typed").exists()
    assert all(hasattr(triflash, name) for name in triflash.__all__)
