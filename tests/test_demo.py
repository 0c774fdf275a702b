"""The demo end to end at a tiny size, and its bad options."""

import dataclasses
import json
import math

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from triflash.__main__ import main
from triflash.cli.demo import options as demo_options
from triflash.cli.demo import report, text
from triflash.cli.demo.model import BUCKETS, MAX_DISTANCE, relative_buckets

TINY = ["--steps", "3", "--seq-len", "48", "--batch", "2", "--layers", "1", "--heads", "2", "--dim", "16", "--device", "cpu"]


def test_trains_compares_and_writes(tmp_path, capsys):
    assert main(["demo", *TINY, "--backend", "tiled", "--out", str(tmp_path / "new" / "folder")]) == 0
    found = json.loads((tmp_path / "new" / "folder" / "demo.json").read_text())
    ours, dense, comparison = found["runs"]["triflash"], found["runs"]["dense"], found["comparison"]

    assert (tmp_path / "new" / "folder" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert ours["launches"] == {"tiled: forward": 1, "tiled: backward": 1}
    assert dense["launches"] == {}
    assert len(ours["losses"]) == len(dense["losses"]) == 3
    assert comparison["agree"]
    assert comparison["largest"] < 1e-4
    assert [c["at"] for c in ours["checkpoints"]] == [0, 1, 2, 3]

    assert comparison["first_bias_gradient_norm"] > 0
    assert comparison["first_bias_gradient_relative_difference"] < 1e-3
    learned = torch.tensor(ours["bias_by_distance"])
    assert learned.shape == (2, 48)
    assert learned.abs().max() > 1e-3  # it started from zero

    shown = capsys.readouterr().out
    for expected in ("tiled: backward", "demo.png", "demo.json", "agree"):
        assert expected in shown
    tables = [line for line in shown.partition("╭")[0].splitlines() if line.startswith(tuple("┏┃┡│├└"))]  # not what the model writes
    assert max(map(len, tables)) <= 80 and not any("…" in line for line in tables)
    headings = next(line for line in tables if "largest" in line)
    assert headings.count("train") == headings.count("val") == 2 and "·" not in headings and "dense" not in headings  # broken by us


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--steps", "0"], "at least 1"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--heads", "3"], "--heads 3: must divide --dim 16"),
        (["--backend", "cuda"], "invalid choice: 'cuda'"),
        (["--device", "gpu"], "'gpu' is not cpu, cuda or cuda:N"),
        (["--dtype", "fp16"], "--dtype fp16"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--seq-len", "100000"], "need at least"),
        (["--text", "there-is-no-such-file"], "there-is-no-such-file"),
        (["--text", __file__], "need at least"),
        (["--out", __file__], "File exists"),
    ],
)
def test_bad_options_end_in_one_line(wrong, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *TINY, *wrong])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--device", "cuda:0"])
    assert stop.value.code == 2
    assert "--device cuda:0: PyTorch sees no GPU here" in capsys.readouterr().err


def test_disagreement_and_nan_are_failures():
    options = demo_options.Options(2, 8, 1, 1, 1, 8, 0, "cpu", "fp32", "auto", "out", None)

    def run(val, losses=(5.0, 4.0), gradient=1.0):
        return {"losses": list(losses), "checkpoints": [{"train": 1.0, "val": val}], "first_bias_gradient": [[gradient]]}

    def compare(ours):
        return report.compare(options, {"triflash": ours, "dense": run(3.0)})

    assert compare(run(3.01))["agree"]
    assert compare(run(3.0, losses=(5.0, 4.03)))["agree"]  # single batches are reported, not judged
    assert not compare(run(3.03))["agree"]
    assert not compare(run(3.0, gradient=1.01))["agree"]
    for broken in (run(math.nan), run(3.0, losses=(5.0, math.nan)), run(3.0, gradient=math.nan)):
        assert not compare(broken)["agree"]
    assert math.isnan(compare(run(math.nan))["largest"])


def test_a_failed_training_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["demo", *TINY, "--backend", "triton", "--out", str(tmp_path)]) == 1  # CPU tensors without the interpreter
    error = capsys.readouterr().err
    assert "the triflash training failed" in error
    assert "Traceback" not in error


def test_text_is_split_without_overlap():
    data = bytes(i * i % 251 for i in range(50_000))
    corpus = text.load(data, 64)
    assert len(corpus.train) + len(corpus.held_out) == len(data)
    inputs, targets = corpus.batch("held_out", 3, 64, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (3, 64)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_buckets_grow_and_saturate():
    buckets = relative_buckets(torch.arange(-5, 2 * MAX_DISTANCE))
    assert (buckets[:6] == 0).all()
    assert (buckets.diff() >= 0).all()
    assert buckets.unique().tolist() == list(range(BUCKETS))
    assert (buckets[5 + MAX_DISTANCE :] == BUCKETS - 1).all()


def test_checkpoints_hold_both_ends():
    of = demo_options.Options(1, 8, 1, 1, 1, 8, 0, "cpu", "fp32", "auto", "out", None)
    for steps in (1, 3, 8, 200):
        points = dataclasses.replace(of, steps=steps).checkpoints
        assert points[0] == 0
        assert points[-1] == steps
        assert len(points) <= 9


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["demo", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "triflash" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["rich", "matplotlib"])
def test_missing_extras_are_named(missing, monkeypatch, capsys):
    import sys

    for name in [name for name in sys.modules if name.startswith("triflash.cli.demo.r")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("triflash.cli.demo.run", raising=False)
    monkeypatch.delattr("triflash.cli.demo.report", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["demo", *TINY]) == 2
    assert "pip install '.[demo]'" in capsys.readouterr().err
