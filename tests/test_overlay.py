"""Tuned files: what they may hold, when an entry counts, and that nothing is read unless the user points to it."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import triflash
from test_plan import spec
from test_structure import run_python
from triflash.plan import overlay, tables
from triflash.plan.configs import Problem, TileConfig, with_wide_bias
from triflash.plan.device import KNOWN_DEVICES, triton_version
from triflash.plan.kernels.portable import config_of, problem_of
from triflash.plan.overlay import Entry, load, tuned, write
from triflash.plan.override import override_configs
from triflash.plan.select import current_choices, plan_backward, plan_forward
from triflash.spec import Needs

HERE = dataclasses.replace(KNOWN_DEVICES["sm90"], name="NVIDIA H200")
CONFIG = TileConfig(16, 256, 8, 2)  # nobody's default


@pytest.fixture(autouse=True)
def no_file_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRIFLASH_TUNED", raising=False)
    overlay.of_environment.cache_clear()
    yield
    overlay.of_environment.cache_clear()


def entry(kernel: str = "forward", config: TileConfig = CONFIG, bias: str | None = None, **changes: Any) -> Entry:
    """An entry that holds for ``spec(bias)`` on HERE."""
    plain = Entry(HERE.name, HERE.arch, triton_version(), overlay.kernel_source(), problem_of(kernel, spec(bias)), config, {"ms": 1.5})
    return dataclasses.replace(plain, **changes)


def test_a_file_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    entries = (entry(), entry("dq", TileConfig(32, 32, 4, 1)))
    assert write(path, entries).entries == load(path).entries == entries
    assert load(path).entries[0].measured == {"ms": 1.5}
    assert load(path) is load(path)  # one overlay, so plans stay cached
    assert os.listdir(tmp_path) == ["tuned.json"]


def test_writing_adds_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    other_gpu, other_kernel = entry(gpu="NVIDIA A100"), entry("dkdv")
    write(path, [entry(), other_gpu])
    newer = entry(config=TileConfig(32, 64, 4, 2))
    assert set(write(path, [other_kernel, newer]).entries) == {newer, other_gpu, other_kernel}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuned.json"
    write(path, [entry()])

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write(path, [entry("dq")])
    assert load(path).entries == (entry(),) and os.listdir(tmp_path) == ["tuned.json"]


def test_plans_use_it_only_where_the_user_points_to_it(tmp_path: Path) -> None:
    write(tmp_path / "t.json", [entry(), entry("dkdv")])
    before = plan_forward(spec(), HERE, "triton"), plan_backward(spec(), Needs(True, True, True, False), HERE, "triton")
    assert overlay.active() is None
    with tuned(tmp_path / "t.json"):
        assert plan_forward(spec(), HERE, "triton").step("forward").config == CONFIG  # type: ignore[union-attr]
        backward = plan_backward(spec(), Needs(True, True, True, False), HERE, "triton")
        assert backward.step("dkdv").config == CONFIG  # type: ignore[union-attr]
        assert backward.step("dq") == before[1].step("dq")
        with tuned(None):
            assert plan_forward(spec(), HERE, "triton") is before[0]
        with override_configs(forward=TileConfig(32, 32, 1, 1)):
            config, source = config_of("forward", spec(), HERE, current_choices())
            assert config == TileConfig(32, 32, 1, 1) and "by hand" in source
        config, source = config_of("forward", spec(), HERE, current_choices())
        assert config == CONFIG and source == f"tuned, {tmp_path / 't.json'}"
    assert plan_forward(spec(), HERE, "triton") is before[0] and overlay.active() is None
    assert triflash.tuned is tuned


def test_a_file_is_left_on_the_way_out_of_an_error(tmp_path: Path) -> None:
    write(tmp_path / "t.json", [entry()])
    with pytest.raises(KeyError), tuned(tmp_path / "t.json"):
        raise KeyError
    assert overlay.active() is None


def test_where_a_configuration_comes_from() -> None:
    for kernel, device, start in (
        ("forward", HERE, "measured on H200 (row"),
        ("forward", KNOWN_DEVICES["sm80"], "analytic default"),
        ("delta", HERE, "fixed"),
    ):
        assert config_of(kernel, spec(), device, current_choices())[1].startswith(start)
    assert all(row.arch in tables.MEASURED_ON for row in tables.ROWS)


def test_a_float32_bias_cuts_the_stages_of_a_tuned_configuration_too(tmp_path: Path) -> None:
    sizes = {"head_dim": 128, "value_dim": 128}
    wide = spec("b1hqk", "bf16", **sizes)
    problem = problem_of("dq", wide)
    deep = TileConfig(128, 64, 8, 4)
    assert with_wide_bias(problem, deep, HERE) != deep
    write(tmp_path / "t.json", [entry("dq", deep, problem=problem)])
    with tuned(tmp_path / "t.json"):
        config, source = config_of("dq", wide, HERE, current_choices())
    assert config == with_wide_bias(problem, deep, HERE) and "fewer stages than 128x64 w8 s4" in source


@pytest.mark.parametrize("changes, reason", [
    ({"gpu": "NVIDIA A100"}, r"measured on NVIDIA A100 \(sm90\), this is NVIDIA H200 \(sm90\)"),
    ({"arch": "sm80"}, r"measured on NVIDIA H200 \(sm80\)"),
    ({"triton": "3.5.0"}, "measured with Triton 3.5.0, this is "),
    ({"kernels": "0123456789abcdef"}, "measured with kernel source 0123456789abcdef, this is "),
], ids=["gpu", "arch", "triton", "kernels"])  # fmt: skip
def test_a_stale_entry_is_ignored_with_one_warning(tmp_path: Path, changes: dict[str, str], reason: str) -> None:
    path = tmp_path / "t.json"
    write(path, [entry(**changes), entry("dq", **changes)])
    plain = plan_forward(spec(), HERE, "triton")
    with tuned(path):
        with pytest.warns(UserWarning, match=rf"t\.json: tuned configurations are ignored: {reason}.*; run triflash tune again"):
            assert plan_forward(spec(), HERE, "triton") == plain
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan_backward(spec(), Needs(True, True, True, False), HERE, "triton")
            plan_forward(spec(queries=17), HERE, "triton")
    with tuned(path), warnings.catch_warnings():  # entering again is not another file
        warnings.simplefilter("error")
        plan_forward(spec(queries=18), HERE, "triton")


def test_no_warning_where_another_entry_holds_or_none_is_for_this_problem(tmp_path: Path) -> None:
    write(tmp_path / "t.json", [entry(gpu="NVIDIA A100"), entry(), entry("dq", gpu="NVIDIA A100")])
    with tuned(tmp_path / "t.json"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan_forward(spec(), HERE, "triton").step("forward").config == CONFIG  # type: ignore[union-attr]
        plan_forward(spec(head_dim=128, value_dim=128), HERE, "triton")
        plan_backward(spec(), Needs(True, True, True, False), HERE, "tiled")


def changed(**changes: Any) -> dict[str, Any]:
    """A file of one right entry but for some values, named as ``problem__bias``; ``...`` leaves one out."""
    item = json.loads(json.dumps({**dataclasses.asdict(entry()), "measured": {}}))
    for path, value in changes.items():
        *outer, last = path.split("__")
        target = item
        for name in outer:
            target = target[name]
        if value is ...:
            del target[last]
        else:
            target[last] = value
    return {"schema": overlay.SCHEMA, "entries": [item]}


@pytest.mark.parametrize("content, words", [
    ("", "Expecting value"),
    ("{", "Expecting"),
    (b"\xff\xfe\xfa", "can't decode|invalid|Expecting"),
    ([], "schema None"),
    ({"entries": []}, "schema None"),
    ({"schema": 99, "entries": []}, f"schema {overlay.SCHEMA}, got .*schema 99; run triflash tune again"),
    ({"schema": overlay.SCHEMA}, "no list of entries"),
    ({"schema": overlay.SCHEMA, "entries": [3]}, "entry 0 gpu: wanted a JSON str, got None"),
    (changed(gpu=...), "entry 0 gpu: wanted a JSON str, got None"),
    (changed(triton=3.6), "entry 0 triton: wanted a JSON str, got 3.6"),
    (changed(measured=...), "entry 0 measured: wanted a JSON dict, got None"),
    (changed(problem=[]), r"entry 0 problem: wanted a JSON dict, got \[\]"),
    (changed(problem__bias=0), "entry 0 problem bias: wanted a JSON bool, got 0"),
    (changed(problem__head_dim="64"), "entry 0 problem head_dim: wanted a JSON int, got '64'"),
    (changed(problem__kernel="delta"), "entry 0 problem kernel: wanted one of forward, dkdv, dk, dv, dq, dbias, got 'delta'"),
    (changed(config__num_warps=...), "entry 0 config num_warps: wanted a JSON int, got None"),
    (changed(config__num_warps=True), "entry 0 config num_warps: wanted a JSON int, got True"),
    (changed(config__block_m=17), r"block_m: wanted one of \(16, .*, got 17"),
    (changed(config__num_stages=0), "num_stages: wanted at least 1, got 0"),
], ids=lambda value: None if isinstance(value, dict) else str(value)[:30])  # fmt: skip
def test_what_is_wrong_with_a_file(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode())
    with pytest.raises(ValueError, match=rf"(?s)^path: wanted a file that triflash tune wrote.*{words}"), tuned(path):
        pass
    with pytest.raises(ValueError, match="^path: wanted"):  # nor is it overwritten
        write(path, [entry()])


def test_a_missing_file(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="^path: wanted a file that triflash tune wrote, got .*No such file"),
        tuned(tmp_path / "none.json"),
    ):
        pass


def test_the_environment_points_to_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "t.json", [entry()])
    monkeypatch.setenv("TRIFLASH_TUNED", str(tmp_path / "t.json"))
    assert plan_forward(spec(), HERE, "triton").step("forward").config == CONFIG  # type: ignore[union-attr]
    with tuned(None):
        assert plan_forward(spec(), HERE, "triton").step("forward").config != CONFIG  # type: ignore[union-attr]
    monkeypatch.setenv("TRIFLASH_TUNED", "")
    overlay.of_environment.cache_clear()
    assert overlay.active() is None


def test_a_broken_file_in_the_environment_stops_every_call(tmp_path: Path) -> None:
    program = """
import torch, triflash
q = torch.zeros(1, 3, 1, 4)
for _ in range(2):
    try:
        triflash.flash_attn_func(q, q, q)
    except ValueError as error:
        print(error)
"""
    lines = run_python(program, TRIFLASH_TUNED=str(tmp_path / "none.json")).splitlines()
    assert len(lines) == 2 and all(line.startswith("TRIFLASH_TUNED: wanted a file that triflash tune wrote, got") for line in lines)


def test_the_digest_follows_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = tmp_path / "kernels" / "triton"
    kernels.mkdir(parents=True)
    (kernels / "forward.py").write_text("a = 1\n")
    monkeypatch.setattr(overlay, "__file__", str(tmp_path / "plan" / "overlay.py"))
    digest = overlay.kernel_source.__wrapped__
    first = digest()
    (kernels / "forward.py").write_text("a = 2\n")
    assert len({first, digest(), overlay.kernel_source()}) == 3
    assert Problem("forward", 64, 2, False, False) == problem_of("forward", spec())
