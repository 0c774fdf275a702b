"""An explanation is the plan itself: it names what runs, for tensors that are run, and what would, for devices that are not here."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from cases import with_layout
from here import HAVE_TRITON, triton_only
from test_attention import WRONG, Q
from test_bad_input import OPTIONS, TENSORS, ids, qkv
from test_structure import run_python
from triflash import UnsupportedError, attention, explain
from triflash.__main__ import main
from triflash.cli.shorthand import bias_shape
from triflash.explanation import Explanation, human
from triflash.plan import layout, overlay
from triflash.plan.configs import TileConfig
from triflash.plan.device import KNOWN_DEVICES, NAMED_DEVICES, DeviceFacts, facts_of, interpreting, triton_version
from triflash.plan.kernels.portable import problem_of
from triflash.plan.override import override_configs
from triflash.plan.select import BACKENDS, plan_backward, plan_forward, why_not
from triflash.spec import Needs
from unlaunched import check_bytes, unlaunched

NAMES = ("q", "k", "v", "bias")
B, M, N, H, D = 3, 33, 40, 2, 16


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRIFLASH_TUNED", raising=False)
    monkeypatch.delenv("TRIFLASH_BACKEND", raising=False)
    overlay.of_environment.cache_clear()
    yield
    overlay.of_environment.cache_clear()


def tensors(bias: str | None, device: torch.device | str, dtype: torch.dtype = torch.float16, grads: tuple[str, ...] = NAMES) -> list[Any]:
    """q, k, v and a bias, those in ``grads`` requiring a gradient."""
    shapes = {"q": (B, M, H, D), "k": (B, N, H, D), "v": (B, N, H, D), "bias": bias_shape(bias, B, H, M, N) if bias else None}
    return [
        None if shape is None else torch.randn(shape, device=device).to(dtype).requires_grad_(name in grads)
        for name, shape in shapes.items()
    ]


def ran(arguments: list[Any], causal: bool, backend: str) -> list[str]:
    """What a forward and a backward pass of those tensors record."""
    with triflash.record_launches() as seen:
        with triflash.backend(backend):
            out = attention(*arguments[:3], bias=arguments[3], causal=causal)
        if out.requires_grad:
            out.sum().backward()
    return seen


@pytest.mark.parametrize("backend", ["auto", "tiled", "oracle", pytest.param("triton", marks=triton_only)])
@pytest.mark.parametrize("bias, causal, grads", [
    (None, False, NAMES), (None, True, ("q",)), (None, True, ("v",)), (None, False, ()),
    ("1hqk", True, NAMES), ("1hqk", False, ("bias",)), ("bhqk", False, NAMES), ("b11k", True, NAMES), ("hq1", False, ("k", "bias")),
    ("qk", False, ("q", "k")),
], ids=str)  # fmt: skip
def test_it_names_what_runs(backend: str, bias: str | None, causal: bool, grads: tuple[str, ...], device: torch.device) -> None:
    arguments = tensors(bias, device, grads=grads)
    with triflash.backend(backend):
        explained = explain(*arguments, causal=causal)
    assert explained.launches == ran(arguments, causal, backend)
    assert explained.launches == explain(*arguments, causal=causal, backend=backend).launches
    assert explained.here and explained.device == facts_of(device) and explained.requested == backend
    assert explained.deterministic
    text = str(explained)
    assert all(line.split(": ")[1] in text for line in explained.launches)
    assert "every key visible" in text or causal


def devices() -> list[str]:
    return [arch for arch in KNOWN_DEVICES if arch not in ("cpu", "interpreter") and HAVE_TRITON] + ["cpu"]


@pytest.mark.parametrize("arch", devices())
def test_it_is_the_plan_for_devices_that_are_not_here(arch: str) -> None:
    own = ["cpu", *([facts_of(torch.device("cuda", 0)).arch] if torch.cuda.is_available() else [])]
    patterns = (None, "1hqk", "bhqk", "b11k", "11q1")
    for bias, causal, dtype, d in itertools.product(patterns, (False, True), (torch.bfloat16, torch.float32), (64, 80, 256)):
        q = torch.empty(2, 1000, 4, d, device="meta", dtype=dtype)
        b = None if bias is None else torch.empty(bias_shape(bias, 2, 4, 1000, 1000), device="meta", dtype=dtype)
        explained = explain(q, q, q, b, causal=causal, grads=NAMES if bias else NAMES[:3], device=arch)
        facts = explained.device
        assert facts == KNOWN_DEVICES[arch] or (facts.arch == arch and explained.here)
        forward = plan_forward(explained.spec, facts)
        backward = plan_backward(explained.spec, Needs(True, True, True, bias is not None), facts)
        assert explained.backend == forward.backend and explained.backward is not None
        assert tuple(step.step for step in explained.forward.steps) == forward.steps
        assert tuple(step.step for step in explained.backward.steps) == backward.steps
        assert explained.backward.backend == backward.backend
        assert explained.launches == [f"{plan.backend}: {step}" for plan in (forward, backward) for step in plan.steps]
        assert explained.here == (arch in own)
        others = dict(explained.not_taken)
        assert set(others) == set(BACKENDS) - {"auto", forward.backend, backward.backend}
        assert all(others.values()) and all(f"{name}: {reason}" in str(explained) for name, reason in others.items())
        for step in (*explained.forward.steps, *explained.backward.steps):
            assert (step.source == "") == (step.step.config is None)
            if step.step.kernel in ("forward", "dkdv", "dqdkdv", "dq", "dbias") and forward.backend in ("triton", "hopper"):
                assert step.shared_memory


@pytest.mark.parametrize("product, arch", [("h100", "sm90"), ("H200", "sm90"), ("a100", "sm80"), ("rtx4090", "sm89"), ("mi300x", "gfx942")])
def test_devices_by_product(product: str, arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    q = torch.empty(2, 1000, 4, 64, device="meta", dtype=torch.bfloat16)
    explained = explain(q, q, q, device=product)
    assert explained.device.arch == arch and (explained.here or explained.device == NAMED_DEVICES[product.lower()])
    if arch in KNOWN_DEVICES:
        assert explained.launches[0].split()[0] == explain(q, q, q, device=arch).launches[0].split()[0]
    assert main(["explain", "--device", product]) == 0
    assert arch in capsys.readouterr().out


@triton_only
def test_why_the_others_were_not_taken() -> None:
    q = torch.empty(2, 64, 4, 64, device="meta", dtype=torch.float16)
    assert (
        dict(explain(q, q, q, device="sm80").not_taken)["tiled"]
        == "could run it, slower here: the automatic choice prefers triton on a GPU"
    )
    assert "for debugging" in dict(explain(q, q, q, device="sm80").not_taken)["oracle"]
    assert dict(explain(q, q, q, device="sm80", backend="tiled").not_taken)["triton"] == "could run it, but tiled was asked for by name"
    cannot = dict(explain(q.double(), q.double(), q.double(), device="sm80").not_taken)["triton"]
    assert cannot.startswith("cannot do float64; use backend('tiled')")
    assert dict(explain(q, q, q, device="cpu").not_taken)["triton"].startswith("cannot do CPU tensors")
    tiny = DeviceFacts("sm80", 40, 1024)
    explained = explain(q, q, q, device=tiny)
    assert explained.backend == "tiled" and "1024 bytes of shared memory do not hold" in dict(explained.not_taken)["triton"]
    on_the_interpreter = dict(explain(q, q, q, device="interpreter").not_taken)["triton"]
    assert on_the_interpreter == "could run it, slower here: the automatic choice prefers tiled on a CPU"


@triton_only
def test_a_backend_asked_for_by_name_raises_as_the_call_does() -> None:
    q = torch.empty(2, 64, 4, 520, device="meta", dtype=torch.float16)
    with pytest.raises(UnsupportedError, match="head dim 520: not supported by backend 'triton'"):
        explain(q, q, q, device="sm90", backend="triton")
    assert why_not("triton", explain(q, q, q, device="sm90").spec, KNOWN_DEVICES["sm90"])


def error_of(function: Any, arguments: dict[str, Any]) -> tuple[type[Exception], str] | None:
    try:
        function(**arguments)
    except Exception as error:  # noqa: BLE001
        return type(error), str(error)
    return None


@pytest.mark.parametrize("row", TENSORS + OPTIONS, ids=ids(TENSORS + OPTIONS))
def test_bad_input_is_refused_as_by_the_call(row: Any) -> None:
    _, wrong, *_ = row
    arguments = {**qkv(), "bias": None, **{"scale" if name == "softmax_scale" else name: x for name, x in wrong.items()}}
    wanted = error_of(attention, arguments)
    assert error_of(explain, arguments) == wanted
    assert wanted is not None or row[0] in ("head dim of v", "complex bias")  # attention takes values of another width


@pytest.mark.parametrize("row", WRONG, ids=lambda row: row[0].replace(" ", "-"))
def test_a_wrong_option_is_refused_as_by_the_call(row: Any) -> None:
    arguments = {"q": Q, "k": Q, "v": Q, **row[1]}
    wanted = error_of(attention, arguments)
    assert wanted is not None and wanted[0] is row[2] and error_of(explain, arguments) == wanted


@pytest.mark.parametrize("options, exception, words", [
    ({"grads": ("q", "x")}, ValueError, "grads: wanted some of q, k, v, bias, sink, got 'x'"),
    ({"grads": "bias"}, ValueError, "grads: wanted no bias, got bias; there is none"),
    ({"device": "meta"}, ValueError, "device: wanted one of .*, got 'meta'; there is no device 'meta' here"),
    ({"device": "sm1"}, ValueError, "device: wanted one of cpu, .*, or a device of this machine, got 'sm1'"),
    ({"device": "cuda:99"}, ValueError, "device: wanted .*, got 'cuda:99'; PyTorch sees"),
    ({"device": 3}, TypeError, "device: wanted .*, got int"),
    ({"softmax_scale": 0.5}, TypeError, r"softmax_scale: wanted an argument of attention .*; scale="),
    ({"backend": "x"}, ValueError, "backend: wanted one of .*, got 'x'"),
], ids=str)  # fmt: skip
def test_bad_options(options: dict[str, Any], exception: type[Exception], words: str) -> None:
    with pytest.raises(exception, match=f"^{words}"):
        explain(*tensors(None, "cpu"), **options)


def test_options_of_attention() -> None:
    """Any of them, grouped heads or several batch dims: the front door's call is explained, with its features in words."""
    q = torch.empty(2, 3, 64, 4, 16, device="meta", dtype=torch.float16)
    k = q[..., :48, :2, :]
    options: dict[str, Any] = dict(
        mask=torch.empty(2, 3, 1, 1, 48, device="meta", dtype=torch.bool),
        key_lengths=torch.empty(2, 3, device="meta", dtype=torch.int64),
        softcap=30.0,
        alibi_slopes=torch.empty(4, device="meta"),
        sink=torch.empty(4, device="meta"),
        dropout_p=0.1,
    )
    bias = torch.empty(2, 1, 4, 64, 48, device="meta")
    explained = explain(q, k, k, bias, causal=True, device="sm90", grads=["q", "sink", "bias"], **options)
    text = str(explained)
    words = "4 query heads on 2 key heads, a mask beside a bias, key lengths, ALiBi slopes, a sink, a soft cap, dropout"
    assert f"{words}, keys from the end to -16 of a query" in text and "gradients  dq, dbias, dsink" in text
    assert explained.spec.groups == 2 and explained.spec.batch_inner == 3 and explained.spec.deterministic
    assert "probabilities of the sink" in dict(explained.memory)
    if HAVE_TRITON:
        assert "could run it, but is known to be faster only from 64 queries" in dict(explained.not_taken)["hopper"]
        assert explained.backward.steps[0].step.gives == ("dsink",)  # type: ignore[union-attr]
    assert explain(q[0], k[0], k[0], device="sm90", layout="bshd").spec.groups == 2
    with pytest.raises(TypeError, match="softmax: wanted an argument of attention"):
        explain(q, k, k, softmax=1.0)
    with pytest.raises(ValueError, match="grads: wanted no sink, got sink; there is none"):
        explain(q, k, k, grads=["sink"])


def test_a_mask_has_no_gradient() -> None:
    q, k, v, _ = tensors(None, "cpu")
    with pytest.raises(ValueError, match="a mask has no gradient"):
        explain(q, k, v, torch.ones(M, N, dtype=torch.bool), grads=["bias"])


@triton_only
def test_where_configurations_come_from(tmp_path: Path) -> None:
    q = torch.empty(2, 1000, 4, 64, device="meta", dtype=torch.bfloat16)
    here = dataclasses.replace(KNOWN_DEVICES["sm90"], name="NVIDIA H200")

    def sources(device: Any) -> dict[str, str]:
        explained = explain(q, q, q, grads="q", device=device, backend="triton")
        assert explained.backward is not None
        return {step.step.kernel: step.source for step in (*explained.forward.steps, *explained.backward.steps)}

    assert sources("sm90")["forward"].startswith("measured on H200")
    assert sources("sm80")["dq"].startswith("analytic default")
    assert sources("sm80")["delta"].startswith("fixed")
    problem = problem_of("dq", explain(q, q, q, device="sm90").spec)
    config = TileConfig(32, 256, 8, 1)
    entry = overlay.Entry(here.name, here.arch, triton_version(), overlay.kernel_source(), problem, config)
    overlay.write(tmp_path / "t.json", [entry])
    with triflash.tuned(tmp_path / "t.json"):
        assert sources(here)["dq"] == f"tuned, {tmp_path / 't.json'}"
        assert sources(here)["forward"].startswith("measured on H200")
        assert "tuned configurations are read from" in str(explain(q, q, q, device=here))
        with override_configs(dq=TileConfig(16, 16, 4, 1)):
            explained = explain(q, q, q, grads="q", device=here, backend="triton")
            assert sources(here)["dq"].startswith("chosen by hand") and explained.launches[-1] == "triton: dq 16x16 w4 s1"


def contiguously(out: Tensor) -> None:
    """A backward pass of an output gradient that lies as the output does."""
    out.backward(torch.zeros_like(out))


LAYOUTS = ("plain", "transposed", "sliced", "step", "expanded", "packed")


@triton_only
@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_copies_of_rows_are_those_that_a_call_makes(layout_name: str) -> None:
    q = with_layout((B, M, H, D), layout_name, torch.zeros).requires_grad_()
    k = torch.zeros(B, N, H, D)
    explained = explain(q, k, k, device="sm80")
    assert [copy.tensor for copy in explained.copies] == (["q"] if layout_name == "step" else [])
    with unlaunched(KNOWN_DEVICES["sm80"]) as seen:
        contiguously(attention(q, k, k))
    check_bytes(explained, seen)
    assert explain(q, k, k, device="sm80", backend="tiled").copies == ()


@triton_only
@pytest.mark.parametrize("columns", [32, 40, 48])
@pytest.mark.parametrize("layout_name", [*LAYOUTS, "keys_first"])
def test_copies_of_a_bias_are_those_that_a_call_makes(layout_name: str, columns: int) -> None:
    for rows, dtype in itertools.product((1, 32, 33), (torch.float16, torch.float32)):
        for shape in ((H, rows, columns), (B, H, rows, columns), (H, rows, 1)):
            bias = with_layout(shape, layout_name, lambda shape, dtype=dtype: torch.zeros(shape, dtype=dtype))  # type: ignore[misc]
            if layout_name == "expanded":
                bias = bias[..., :1].expand(shape)
            canonical = bias[(None,) * (4 - bias.dim())].unsqueeze(1)
            copied = layout.copies_bias(canonical.shape, canonical.stride(), bias.data_ptr())
            q, k = torch.zeros(B, rows, H, D, dtype=dtype), torch.zeros(B, columns if shape[-1] > 1 else 5, H, D, dtype=dtype)
            explained = explain(q, k, k, bias, device="sm80")
            assert [copy.tensor for copy in explained.copies] == ["bias"] * copied
            with unlaunched(KNOWN_DEVICES["sm80"]) as seen:
                attention(q, k, k, bias=bias)
            check_bytes(explained, seen)
            assert explain(q, k, k, bias, device="interpreter", backend="triton").copies == () or dtype == torch.bfloat16


@triton_only
@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_lengths_copy_nothing(backend: str) -> None:
    """Kernels read key lengths of any integers, and the keys as they lie."""
    q, k, v, _ = tensors(None, "cpu")
    lengths = torch.tensor([5, 7, 9])
    explained = explain(q, k, v, key_lengths=lengths, device="sm90", backend=backend)
    assert explained.copies == () and "copies     none" in str(explained)
    with unlaunched(explained.device) as seen:
        contiguously(attention(q, k, v, key_lengths=lengths, backend=backend))
    check_bytes(explained, seen)


@triton_only
@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_batch_dims_that_do_not_fold_are_copied(backend: str) -> None:
    """Two batch levels swapped in memory: no view makes one of them."""
    q = torch.zeros(3, 2, M, H, D, dtype=torch.float16).transpose(0, 1)
    explained = explain(q, q.contiguous(), q.contiguous(), device="sm90", backend=backend)
    (copy,) = explained.copies
    assert (copy.tensor, copy.nbytes, copy.passes) == ("q", q.numel() * 2, ("forward",)) and "batch dims" in copy.reason


@triton_only
@pytest.mark.parametrize("bias", [None, "1hqk", "bhqk", "b11k", "11q1"])
def test_scratch_is_what_a_call_allocates(bias: str | None) -> None:
    arguments = tensors(bias, "cpu", torch.float32)
    explained = explain(*arguments, device="sm80", backend="triton")
    with unlaunched(KNOWN_DEVICES["sm80"]) as seen:
        contiguously(attention(*arguments[:3], bias=arguments[3], backend="triton"))
    check_bytes(explained, seen)
    memory = dict(explained.memory)
    assert memory["lse and rest of lse (until the backward pass)"] == 2 * 256 * math.ceil(B * H * M * 4 / 256)
    assert memory["delta"] == B * H * M * 4


def test_determinism_names_the_order_of_partial_sums() -> None:
    q = torch.empty(4, 64, 4, 64, device="meta", dtype=torch.float16)
    bias = torch.empty(1, 4, 1, 64, device="meta")
    explained = explain(q, q, q, bias, grads=["bias"], device="sm80")
    if HAVE_TRITON:
        assert "the 4 partial sums of dbias are added in the order of their numbers" in explained.determinism
        assert dict(explained.memory)["partial sums of dbias"] == 4 * 4 * 64 * 4
    assert "PyTorch" in explain(q, q, q, device="cpu").determinism


def test_gradients_follow_the_tensors_unless_told() -> None:
    q, k, v, bias = tensors("1hqk", "cpu", grads=("k", "bias"))
    assert explain(q, k, v, bias).needs == Needs(False, True, False, True)
    assert explain(q, k, v, bias, grads=()).backward is None
    assert explain(q, k, v, bias, grads=["v"]).needs == Needs(False, False, True, False)
    assert "gradients  dk, dbias" in str(explain(q, k, v, bias))


@triton_only
def test_meta_tensors_are_explained_for_this_machine() -> None:
    q = torch.empty(1, 8, 1, 16, device="meta", dtype=torch.float16)
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert explain(q, q, q).device == facts_of(torch.device(expected)) and explain(q, q, q).here
    empty = torch.empty(1, 0, 1, 16, device="meta", dtype=torch.float16)
    explained = explain(empty, q, q, grads="q", device="sm90", backend="triton")
    assert explained.launches == [] and "nothing to run" in str(explained)


def test_it_can_be_hashed_and_not_changed() -> None:
    explained = explain(*tensors("1hqk", "cpu"))
    assert isinstance(explained, Explanation) and hash(explained) == hash(explain(*tensors("1hqk", "cpu")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        explained.deterministic = False  # type: ignore[misc]


def test_compiling_needs_the_compiler() -> None:
    if interpreting():
        q = torch.empty(1, 8, 1, 16, device="meta", dtype=torch.float16)
        with pytest.raises(ValueError, match="^compile: wanted False, got True; Triton's interpreter"):
            explain(q, q, q, device="sm90", compile=True)


def test_without_triton() -> None:
    program = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] == "triton" else find_spec(name, package)
sys.modules["triton"] = None
import torch, triflash
q = torch.empty(1, 8, 1, 16, device="meta")
print(triflash.explain(q, q, q, device="sm90"))
try:
    triflash.explain(q, q, q, device="sm90", compile=True)
except ValueError as error:
    print(error)
"""
    text = run_python(program)
    assert "backend    tiled" in text and "note       Triton is not installed: this is what runs without it" in text
    assert (
        "triton: cannot do anything: Triton is not installed" in text and "compile: wanted False, got True; Triton is not installed" in text
    )


def test_human() -> None:
    assert [human(n) for n in (0, 1023, 1024, 98304, 3 * 2**29, 5 * 2**50)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "96.0 KiB",
        "1.5 GiB",
        "5120.0 TiB",
    ]


LINE = ["explain", "--d", "128", "--s", "4k", "--dtype", "bf16", "--causal", "--bias", "1hqk", "--device", "sm90"]


@triton_only
def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(LINE) == 0
    text = capsys.readouterr().out
    for part in ("batch 4, 4096 queries, 4096 keys, 16 heads, d 128, bf16, bias 1hqk bf16, causal", "dq, dk, dv, dbias", "copies     none",
                 "same bits  yes"):  # fmt: skip
        assert part in text, part
    q = torch.empty(4, 4096, 16, 128, device="meta", dtype=torch.bfloat16)
    bias = q.new_empty(1, 16, 4096, 4096)
    explained = explain(q, q, q, bias, causal=True, grads=NAMES, device="sm90")
    assert text == f"{explained}\n"
    assert f"backend    {explained.backend}" in text and ", the automatic choice" in text
    assert main(["explain", "--sk", "1k", "--grads", "qb", "--bias", "qk", "--bias-dtype", "fp32", "--device", "gfx942", "--b", "1"]) == 0
    text = capsys.readouterr().out
    assert "2048 queries, 1024 keys" in text and "gradients  dq, dbias" in text and "gfx942" in text and "fp32" in text
    line = "explain --hk 4 --window 128,0 --sink --softcap 30 --device sm90 --dropout 0.1 --alibi --mask b11k --bias 1hqk --lengths"
    assert main(line.split()) == 0
    text = capsys.readouterr().out
    for part in (
        "16 query heads on 4 key heads, a mask beside a bias, key lengths, ALiBi slopes, a sink, a soft cap, dropout",
        "-128 to +0",
        "dsink",
    ):
        assert part in text, part
    assert main(["explain", "--device", "cpu", "--grads", "none"]) == 0
    assert "tiled" in capsys.readouterr().out


@pytest.mark.parametrize("line, status, words", [
    ("--s 4kk", 2, "--s: size: wanted"), ("--bias hk", 2, "--bias: bias: wanted none, or dims"), ("--device sm1", 2, "device: wanted one of"),
    ("--window 1,x", 2, "--window: window: wanted two numbers"), ("--hk 5", 2, "k: wanted a number of heads that divides q's 16"),
    ("--grads qx", 2, "--grads: wanted letters of qkvbs, all or none, got 'qx'"), ("--grads b", 2, "there is none"),
    ("--tuned /none.json", 2, "--tuned: wanted a file that triflash tune wrote"), ("--dtype fp7", 2, "--dtype: dtype: wanted one of fp16"),
    pytest.param("--dtype fp64 --backend triton --device sm90", 1, "float64: not supported by backend 'triton'", marks=triton_only),
], ids=str)  # fmt: skip
def test_wrong_use_of_the_command_line(line: str, status: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main(["explain", *line.split()]) == status
    except SystemExit as stop:
        assert stop.code == status
    assert words in capsys.readouterr().err


def test_sizes_beyond_64_bits_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["explain", "--s", "1m", "--b", "1m", "--h", "1m", "--device", "sm90"])
    assert stopped.value.code == 2
    assert "--b, --s, --h, --d: wanted sizes of tensors below 2^63 bytes" in capsys.readouterr().err
