"""What there is here to run kernels on: backends to test, and marks of tests that need more. Read by most files of tests."""

from __future__ import annotations

import importlib.util

import pytest
import torch

HAVE_TRITON = importlib.util.find_spec("triton") is not None
triton_only = pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
ON_HOPPER = torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability() == (9, 0)
hopper_only = pytest.mark.skipif(not ON_HOPPER, reason="needs an sm90 GPU")  # together with the marker gpu
stand_in_only = pytest.mark.skipif(
    not HAVE_TRITON or torch.cuda.is_available(), reason="a stand-in for the GPU that there is, or without Triton's interpreter"
)
BACKENDS = ["tiled", pytest.param("triton", marks=triton_only)]
EVERY_BACKEND = [*BACKENDS, pytest.param("hopper", marks=triton_only)]
NEAREST = pytest.param("hopper" if torch.cuda.is_available() else "stand-in", marks=triton_only)  # what there is to run Hopper's kernels
