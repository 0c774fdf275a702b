"""Explaining the Hopper kernels on a machine without one: what runs in which pass, and what is copied for TMA."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import with_layout
from here import triton_only
from triflash import attention, explain
from triflash.__main__ import main
from triflash.cli.shorthand import bias_shape
from triflash.plan import layout
from triflash.plan.configs import TileConfig
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.kernels.dkdv import DkdvConfig
from triflash.plan.kernels.dq import DqConfig
from triflash.plan.kernels.forward import ForwardConfig
from triflash.plan.override import override_configs
from unlaunched import check_bytes, unlaunched

pytestmark = triton_only

B, M, N, H = 3, 33, 40, 2
LAYOUTS = ("plain", "transposed", "sliced", "step", "expanded", "packed")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_both_passes_by_hopper() -> None:
    q = empty(2, 1000, 4, 64)
    explained = explain(q, q, q, causal=True, grads=("q", "k", "v"), device="sm90")
    assert explained.backward is not None and explained.backward.backend == explained.backend == "hopper" and explained.changed == ""
    preprocess, keys, rows = explained.backward.steps
    assert preprocess.source.startswith("fixed") and preprocess.shared_memory is None
    assert isinstance(keys.step.config, DkdvConfig) and isinstance(rows.step.config, DqConfig)
    assert keys.source == "the first candidate that fits, of plan/kernels/dkdv.py"
    assert rows.source == "the first candidate that fits, of plan/kernels/dq.py"
    assert keys.shared_memory == keys.step.config.shared_memory(explained.spec, ("dk", "dv"))
    assert rows.shared_memory == rows.step.config.shared_memory(explained.spec, ("dq",))
    text = str(explained)
    assert "backend    hopper, the automatic choice, which prefers it where it can run" in text
    assert f"dkdv {keys.step.config}: " in text and "in groups whose queries and their gradients fit in the L2 cache, gives dk, dv" in text
    assert explained.deterministic and "same bits  yes" in text and "sum of dq" not in text


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("bias", [None, "h1k"])
def test_what_adding_up_dq_costs(bias: str | None, deterministic: bool) -> None:
    """The float32 sum, and the promise of the same bits; PyTorch's switch gives dq a kernel of its own."""
    q = empty(2, 4000, 4, 40)
    given = None if bias is None else empty(4, 1, 4000)
    torch.use_deterministic_algorithms(deterministic)
    explained = explain(q, q, q, given, grads=("q", "k", "v", "bias") if bias else ("q", "k", "v"), device="sm90")
    assert explained.spec.deterministic == explained.deterministic == deterministic
    assert explained.backward is not None
    kernels = [step.step.kernel for step in explained.backward.steps]
    owners = ["dkdv", "dq"] if deterministic else ["dqdkdv", "postprocess"]
    assert kernels == ["preprocess", *owners, *["dbias_sum"] * (bias is not None)]
    assert dict(explained.memory).get("float32 sum of dq", 0) == (0 if deterministic else 2 * 4032 * 4 * 40 * 4)  # whole blocks of 64
    text = str(explained)
    assert ("same bits  no: dq is added up in memory in no fixed order" in text) == (not deterministic)
    assert deterministic or "torch.use_deterministic_algorithms(True)" in text
    if not deterministic:
        keys = explained.backward.steps[1]
        assert isinstance(keys.step.config, DkdvConfig)
        assert keys.shared_memory == keys.step.config.shared_memory(explained.spec, ("dk", "dv", "dq"))


def test_dq_summed_in_shared_memory() -> None:
    """The same bits without asking, no float32 sum, and an order of its own."""
    q, bias = empty(132, 256, 1, 64), empty(1, 1, 256, 256)
    for given, order in ((None, ""), (bias, ", batch entries that share a bias block side by side")):
        explained = explain(q, q, q, given, causal=True, grads=("q", "k", "v"), device="h200")
        assert explained.backward is not None and explained.deterministic and "float32 sum of dq" not in dict(explained.memory)
        (keys,) = (step for step in explained.backward.steps if step.step.kernel == "dqdkdv")
        assert isinstance(keys.step.config, DkdvConfig) and keys.step.config.dq_blocks == 4
        text = str(explained)
        assert f"dqdkdv {keys.step.config}: 132 programs" in text and "same bits  yes" in text
        assert f", all tiles of a batch entry and head by one program{order}, gives dk, dv, dq" in text


def test_a_gradient_nobody_asked_for() -> None:
    """The kernel that gives the gradient of a bias of full shape writes dq, wanted or not."""
    q, bias = empty(2, 1000, 4, 64), empty(2, 4, 1000, 1000)
    for grads, extra in (("bias", True), (("q", "bias"), False)):
        explained = explain(q, q, q, bias, grads=grads, device="sm90")
        assert explained.launches[-1].startswith("hopper: dq ")
        assert dict(explained.memory).get("dq, which nobody asked for", 0) == (2 * 1000 * 4 * 64 * 2 if extra else 0)


def test_forward_by_hopper_backward_by_triton() -> None:
    """With a bias that does not vary over keys."""
    q = empty(2, 1000, 4, 64)
    explained = explain(q, q, q, empty(4, 1000, 1), causal=True, grads=("q", "k", "v"), device="sm90")
    assert explained.backward is not None
    assert (explained.forward.backend, explained.backward.backend) == ("hopper", "triton")
    (forward,) = explained.forward.steps
    assert isinstance(forward.step.config, ForwardConfig)
    assert forward.source == "a rule of plan/kernels/forward.py, drawn from measurements on an H200"
    assert forward.shared_memory == forward.step.config.shared_memory(explained.spec) <= KNOWN_DEVICES["sm90"].shared_memory
    assert explained.launches[0] == f"hopper: forward {forward.step.config}" and explained.launches[1].startswith("triton: delta")
    assert set(dict(explained.not_taken)) == {"tiled", "oracle"}
    text = str(explained)
    assert "hopper for the forward pass, the automatic choice, which prefers it where it can run" in text
    words = "the backward pass with a bias that does not vary over keys: not supported by backend 'hopper'; use backend('triton')"
    assert f"triton for the backward pass: {words}" in text


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--device sm90 --dtype fp32", "hopper: cannot do fp32; its products are 16-bit ones"),
        ("--device sm80", "hopper: cannot do sm80; its kernels are made for sm90"),
        ("--device cpu", "hopper: cannot do cpu; its kernels are made for sm90"),
        ("--device sm90 --softcap 501", "hopper: cannot do a soft cap of 501; above 500 its kernels round scores too far"),
        ("--device sm90 --backend triton", "hopper: could run it, but triton was asked for by name"),
        ("--device sm90 --backend hopper --grads none", "backend    hopper, asked for by name"),
    ],
)
def test_why_not_hopper(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *arguments.split()]) == 0
    text = capsys.readouterr().out
    assert words in text and "hopper for the forward pass" not in text


def test_what_its_backward_pass_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--device", "sm90", "--backend", "hopper", "--grads", "q", "--bias", "hq1"]) == 1
    assert "the backward pass with a bias that does not vary over keys: not supported by backend 'hopper'" in capsys.readouterr().err
    assert main(["explain", "--device", "sm90", "--backend", "triton", "--bias", "hq1"]) == 0
    words = "hopper: the backward pass with a bias that does not vary over keys: not supported by backend 'hopper'"
    assert words in capsys.readouterr().out


def test_a_mask_beside_a_bias() -> None:
    """Both passes take it; the gradient of a broadcast bias beside a mask of queries is the portable kernels', and explain says why."""
    q, bias = empty(2, 1000, 4, 64), empty(4, 1000, 1000)
    for mask, backward in (
        (torch.empty(2, 1, 1, 1000, dtype=torch.bool, device="meta"), "hopper"),
        (torch.empty(1000, 1000, dtype=torch.bool, device="meta"), "triton"),
    ):
        explained = explain(q, q, q, bias, grads=("q", "k", "v", "bias"), device="sm90", mask=mask)
        assert explained.backward is not None
        assert (explained.forward.backend, explained.backward.backend) == ("hopper", backward)
        reason = "beside a mask of shape 1b1qk: not supported by backend 'hopper'"
        assert (reason in str(explained)) == (backward == "triton")
        assert explain(q, q, q, bias, grads=("q", "k", "v"), device="sm90", mask=mask).backward.backend == "hopper"  # type: ignore[union-attr]


def test_each_backend_takes_its_own_kind_of_configuration() -> None:
    q = empty(2, 1000, 4, 64)
    for config, backend in ((ForwardConfig(1, 64, 3), "hopper"), (TileConfig(16, 16, 4, 1), "triton")):
        with override_configs(forward=config):
            taken, other = (explain(q, q, q, device="sm90", backend=name).forward.steps[0] for name in ("hopper", "triton"))
        if backend == "triton":
            taken, other = other, taken
        assert taken.step.config == config and taken.source == "chosen by hand (override_configs)"
        assert type(other.step.config) is not type(config) and not other.source.startswith("chosen by hand")


def test_backward_configurations_by_hand() -> None:
    q = empty(2, 1000, 4, 64)
    keys, rows = DkdvConfig(1, 1), DqConfig(1, 32, 2, 2)
    with override_configs(dkdv=keys, dq=rows, forward=TileConfig(16, 16, 4, 1)):
        explained = explain(q, q, q, grads=("q", "k", "v"), device="sm90")
    assert explained.backward is not None
    assert [step.step.config for step in explained.backward.steps[1:]] == [keys, rows]
    assert all(step.source == "chosen by hand (override_configs)" for step in explained.backward.steps[1:])
    assert explained.forward.steps[0].source.startswith("a rule of plan/kernels/forward.py")


def hopper_copies(q: Tensor, k: Tensor, bias: Tensor | None, backend: str = "hopper") -> dict[str, int]:
    """The copies of a forward pass as explained, which are those that are made."""
    explained = explain(q, k, k, bias, device="sm90", backend=backend)
    assert all(copy.passes == ("forward",) for copy in explained.copies)
    with unlaunched(KNOWN_DEVICES["sm90"]) as seen:
        attention(q, k, k, bias=bias, backend=backend)
    check_bytes(explained, seen)
    return {copy.tensor: copy.nbytes for copy in explained.copies}


@pytest.mark.parametrize("head_dim", [16, 20, 24])
@pytest.mark.parametrize("name", LAYOUTS)
def test_copies_for_tma_are_those_that_a_call_makes(name: str, head_dim: int) -> None:
    from triflash.launch import hopper as launch

    q = with_layout((B, M, H, head_dim), name, lambda shape: torch.zeros(shape, dtype=torch.float16))
    k = torch.zeros(B, N, H, head_dim, dtype=torch.float16)
    copied = hopper_copies(q, k, None)
    padded = 2 * B * H * (24 if head_dim == 20 else head_dim)
    sizes = {"q": padded * M, "k": padded * N, "v": padded * N, "out": padded * M}
    assert copied == {n: sizes[n] for n in copied}
    assert ("out" in copied) == ("k" in copied) == ("v" in copied) == (head_dim == 20)
    assert ("q" in copied) == (head_dim == 20 or name in ("sliced", "step", "expanded"))
    assert layout.tma_addressable(q.shape, q.stride(), q.element_size(), q.data_ptr()) == launch.addressable(q) == ("q" not in copied)


@pytest.mark.parametrize("columns", [40, 41])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bool], ids=str)
@pytest.mark.parametrize("name", [*LAYOUTS, "keys_first"])
def test_copies_of_a_bias_for_tma(name: str, dtype: torch.dtype, columns: int) -> None:
    """Expanded batch and head dims once, expanded queries and keys whole; a bias that does not vary over keys is read as it lies."""
    q, k = (torch.zeros(B, length, H, 16, dtype=torch.float16) for length in (M, columns))
    for shape in ((H, M, columns), (B, H, M, columns), (B, 1, 1, columns), (H, M, 1)):
        bias = with_layout(shape, name, lambda shape: torch.zeros(shape, dtype=dtype))
        wide = bias[(None,) * (4 - bias.dim())]
        stored = wide[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in wide.stride()[:2])]
        fits = layout.tma_addressable(stored.shape, stored.stride(), stored.element_size(), stored.data_ptr())
        copied = shape[-1] > 1 and not fits
        size = math.prod(layout.tma_padded(stored.shape, bias.element_size())) * bias.element_size()
        assert hopper_copies(q, k, bias) == ({"bias": size} if copied else {})


def test_a_pass_copies_by_the_rules_of_its_own_backend() -> None:
    """Heads 20 elements apart suit the portable kernels but not TMA; every other element suits neither. The bias is for backward by triton."""
    q, k, bias = empty(2, 256, 4, 20)[..., :16], empty(2, 256, 4, 32)[..., ::2], empty(256, 1)

    def found(*tensors: Any) -> list[tuple[str, int, tuple[str, ...]]]:
        explained = explain(*tensors, bias, grads="q", device="sm90")
        assert str(explained).count(" in the forward pass: ") == sum(copy.passes == ("forward",) for copy in explained.copies)
        return [(copy.tensor, copy.nbytes, copy.passes) for copy in explained.copies]

    plain = 2 * 256 * 4 * 16 * 2
    assert found(q, q, q) == [(name, plain, ("forward",)) for name in ("q", "k", "v")]
    assert found(q, k, q)[-1] == ("k", plain, ("backward",)) and len(found(q, k, q)) == 4
    for tensors, backend, names in (((q, k, q), "triton", ["k"]), ((q, k, q), "hopper", ["q", "k", "v"])):
        both = explain(*tensors, grads="q", device="sm90", backend=backend).copies
        assert [(copy.tensor, copy.nbytes, copy.passes) for copy in both] == [(name, plain, ("forward", "backward")) for name in names]


@pytest.mark.parametrize("bias, columns", [(None, 40), ("bhqk", 40), ("bhqk", 41), ("1hqk", 41), ("1h1k", 41)])
@pytest.mark.parametrize("name", ["plain", "sliced"])
@pytest.mark.parametrize("head_dim, value_dim", [(16, 16), (20, 16), (24, 20)])
def test_copies_of_a_backward_pass(head_dim: int, value_dim: int, name: str, bias: str | None, columns: int) -> None:
    """Those that a call makes: of what it reads, and of gradients that TMA cannot write."""

    def zeros(*shape: int) -> Tensor:
        return with_layout(shape, name, lambda shape: torch.zeros(shape, dtype=torch.float16)).requires_grad_()

    q, k, v = zeros(B, M, H, head_dim), zeros(B, columns, H, head_dim), zeros(B, columns, H, value_dim)
    given = None if bias is None else zeros(*bias_shape(bias, B, H, M, columns))
    options: Any = {} if bias is None else {"mask": torch.ones(B, 1, 1, columns, dtype=torch.bool)}
    explained = explain(q, k, v, given, device="sm90", backend="hopper", **options)
    with unlaunched(KNOWN_DEVICES["sm90"]) as seen:
        out = attention(q, k, v, bias=given, backend="hopper", **options)
        out.backward(torch.zeros_like(out))
    check_bytes(explained, seen)
    names = {copy.tensor for copy in explained.copies if "backward" in copy.passes}
    assert ("mask" in names) == (bias is not None)
    assert ({"dq", "dk"} <= names) == (head_dim == 20) and ({"dout", "dv"} <= names) == (value_dim == 20)
    assert ("dbias" in names) == (bias == "bhqk" and columns == 41)


def test_rules_of_layouts() -> None:
    """By hand, for the strides and addresses that people meet."""
    assert not layout.copies_rows(64, 1) and not layout.copies_rows(1, 7) and layout.copies_rows(64, 2) and layout.copies_rows(64, 0)
    for row, column, address, copied in (
        (2048, 1, 0, False),
        (2047, 1, 0, True),
        (1, 2048, 0, False),
        (2048, 1, 2, True),
        (0, 1, 0, False),
    ):
        assert layout.copies_bias((1, 1, 4, 2000, 2000), (0, 0, 2048 * 2048, row, column), address) == copied
    assert not layout.copies_bias((1, 1, 4, 1, 2001), (0, 0, 2001, 2001, 1), 0)
    assert layout.copied_bias_shape((2, 1, 4, 100, 33), (0, 0, 3300, 33, 1)) == (1, 1, 4, 100, 48)
    for shape, strides, address, fits in (
        ((2, 8, 64), (512, 64, 1), 0, True),
        ((2, 8, 64), (512, 64, 1), 8, False),  # begins between two units
        ((2, 8, 20), (160, 20, 1), 0, False),  # rows of 40 bytes
        ((2, 8, 64), (0, 64, 1), 0, False),  # expanded
        ((1, 8, 64), (0, 64, 1), 0, True),  # no second element to step to
        ((2, 8, 64), (1024, 128, 2), 0, False),
        ((2, 8, 64), (2**39, 64, 1), 0, False),  # 2**40 bytes apart
    ):
        assert layout.tma_addressable(shape, strides, 2, address) == layout.tma_writable(shape, strides, 2, address) == fits
    for width, itemsize, fits in ((20, 2, False), (24, 2, True), (20, 4, True), (18, 4, False)):  # rows that begin at 16 bytes
        assert layout.tma_addressable((2, 8, width), (256, 32, 1), itemsize, 0)
        assert layout.tma_writable((2, 8, width), (256, 32, 1), itemsize, 0) == fits
    assert layout.tma_addressable((1, 1, 20), (20, 20, 1), 2, 0) and not layout.tma_writable((1, 1, 20), (20, 20, 1), 2, 0)
    assert (
        layout.tma_padded((3, 20), 2) == (3, 24) and layout.tma_padded((3, 20), 1) == (3, 32) and layout.tma_padded((3, 20), 4) == (3, 20)
    )
