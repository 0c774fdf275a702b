"""The shorthand of the command line, and what it says to what it cannot read."""

from __future__ import annotations

import argparse

import pytest
import torch

from triflash.cli import shorthand


@pytest.mark.parametrize(
    "text, value", [("1", 1), ("512", 512), ("4k", 4096), (" 2K ", 2048), ("1.5k", 1536), ("1m", 1 << 20), ("0.5k", 512)]
)
def test_size(text: str, value: int) -> None:
    assert shorthand.size(text) == value


@pytest.mark.parametrize("text", ["", "0", "-1", "k", "4kb", "1.5", "1e3", "four", "0.0001k", "2 k"])
def test_size_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"^size: wanted .*4k.*, got '"):
        shorthand.size(text)


def test_pair() -> None:
    assert shorthand.pair("128") == (128, 128) and shorthand.pair("192x128") == (192, 128) and shorthand.pair("1kx2k") == (1024, 2048)
    for wrong in ("x", "64x", "x64", "1x2x3", "64x0"):
        with pytest.raises(ValueError, match="^size: wanted"):
            shorthand.pair(wrong)


def test_quotient() -> None:
    assert shorthand.quotient("--tokens", 4096, "--s", 1024) == 4
    with pytest.raises(ValueError, match="^--tokens: wanted a multiple of every --s, got 4096; --s 1000 does not divide it$"):
        shorthand.quotient("--tokens", 4096, "--s", 1000)


def test_dtype() -> None:
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("FP32", torch.float32), ("fp64", torch.float64)):
        assert shorthand.dtype(name) == dtype
        assert shorthand.dtype(str(dtype)) == shorthand.dtype(str(dtype).removeprefix("torch.")) == dtype
    for wrong in ("bool", "fp8", "int8", ""):
        with pytest.raises(ValueError, match=r"^dtype: wanted one of fp16, bf16, fp32, fp64, got '"):
            shorthand.dtype(wrong)


def test_causal() -> None:
    assert (shorthand.causal("yes"), shorthand.causal("No"), shorthand.causal("both")) == ((True,), (False,), (False, True))
    with pytest.raises(ValueError, match="^causal: wanted yes, no or both, got 'maybe'"):
        shorthand.causal("maybe")


def test_bias() -> None:
    assert shorthand.bias_pattern("none") is None
    for pattern, shape in (
        ("1hqk", (1, 3, 5, 7)),
        ("b11k", (4, 1, 1, 7)),
        ("bhqk", (4, 3, 5, 7)),
        ("hq1", (3, 5, 1)),
        ("qk", (5, 7)),
        ("1111", (1, 1, 1, 1)),
    ):
        assert shorthand.bias_shape(shorthand.bias_pattern(pattern.upper()) or "", 4, 3, 5, 7) == shape
    assert shorthand.bias_shape("b1hqk", 4, 3, 5, 7, batch_inner=2) == (2, 1, 3, 5, 7)
    assert shorthand.bias_shape("1ih1k", 4, 3, 5, 7, batch_inner=2) == (1, 2, 3, 1, 7)
    for wrong in ("", "k", "hb", "khqb", "1hqkk", "bbhqk", "2hqk", "1hqk1k"):
        with pytest.raises(ValueError, match="^bias: wanted none, or dims such as 1hqk"):
            shorthand.bias_pattern(wrong)


def test_a_wrong_mask_is_called_a_mask() -> None:
    with pytest.raises(ValueError, match="^mask: wanted none, or dims"):
        shorthand.mask_pattern("1")


def test_lists_and_options() -> None:
    assert shorthand.items(shorthand.size)("2k,8k,2048") == [2048, 8192]
    assert shorthand.items(shorthand.bias_pattern)("none,1hqk") == [None, "1hqk"]
    with pytest.raises(ValueError, match="got ''"):
        shorthand.items(shorthand.size)("2k,,8k")
    with pytest.raises(argparse.ArgumentTypeError, match="^size: wanted"):
        shorthand.option(shorthand.size)("x")
    assert shorthand.option(shorthand.size)("1k") == 1024
