"""Tables that more than one file of tests runs, each case by the one body that ``running.py`` has: problems of several tiles, which on Hopper
fill its rings of buffers, and configurations of its kernels; every feature at a size that a file chooses (``features``). Problems of a tile or
two, for every backend, are in test_edges.py.
"""

from __future__ import annotations

from typing import Any

import torch

from cases import Case
from triflash.plan.kernels.dbias import DbiasConfig
from triflash.plan.kernels.forward import ForwardConfig

BF16, F16, F32, BOOL = torch.bfloat16, torch.float16, torch.float32, torch.bool

FORWARD_CONFIGS = [
    None,
    ForwardConfig(1, 64, 1),
    ForwardConfig(1, 32, 2, ping_pong=True),
    ForwardConfig(2, 64, 3),
    ForwardConfig(2, 64, 4, separate_o=False, ping_pong=True),
    ForwardConfig(2, 128, 2, 2, ping_pong=True),
    ForwardConfig(3, 64, 3, 3, ping_pong=True, separate_o=False),
    ForwardConfig(3, 16, 2),
    ForwardConfig(2, 64, 2, persistent=False),
    ForwardConfig(1, 64, 1, q_stages=2),
    ForwardConfig(2, 128, 2, q_stages=2, ping_pong=True),
    ForwardConfig(3, 32, 4, q_stages=2, ping_pong=True),
]
DBIAS_CONFIGS = [None, DbiasConfig(2, 64, 5, 4), DbiasConfig(1, 32, 6, 4, 2)]

FORWARD = [
    Case("full", B=2, M=300, N=200),
    Case("causal, bias", B=2, M=200, N=300, bias="1hqk", bias_dtype=F32, causal=True),
    Case("window, bias of keys", B=2, M=260, N=300, bias="b11k", lo=-50, hi=20, sink=True),
    Case("a number a query, rows that see nothing", B=2, M=200, N=150, bias="1hq1", hi=-60),
    Case("mask of queries", B=2, M=130, N=100, bias="b1q1", bias_dtype=BOOL, lengths=(0, 70)),
    Case("one number", B=2, M=70, N=100, bias="1111", lengths=(100, 1), alibi="bh"),
    Case("all", B=3, M=260, N=200, H=4, Hk=1, lengths=(0, 128, 999), alibi="h", sink=True, bias="bhqk", bias_values="inf", hi=90),
    Case("slopes, grouped", B=2, M=128, N=256, H=4, Hk=2, alibi="bh", causal=True, scale=-0.3),
    Case("nothing is seen but the sink", B=2, M=130, N=200, lengths=(0, 0), sink=True),
]
GROWING = [
    Case("growing, full", B=1, M=130, N=500, H=2, bias="1hqk", bias_values="rising", dtype=BF16),
    Case("growing, bias of keys", B=2, M=100, N=400, bias="b11k", bias_values="rising", sink=True, hi=50, dropout=0.1),
    Case("growing, soft cap", B=1, M=70, N=300, H=2, bias="1hqk", bias_values="rising", softcap=5.0, causal=True),
    Case("growing, ALiBi, one-sided", B=1, M=130, N=300, H=2, alibi="h", causal=True, magnitude=6.0, scale=1.0),
    Case("growing, no bias", B=1, M=70, N=300, H=2, D=64, magnitude=6.0, scale=1.0),
    Case("growing, another dtype's bias", B=1, M=130, N=300, H=2, bias="1hqk", bias_values="rising", dtype=BF16, bias_dtype=F16),
    Case("growing, another dtype's bias of keys", B=1, M=70, N=300, H=2, bias="b11k", bias_values="huge", bias_dtype=BF16),
]

# Every feature beside others, and beside every kind of bias.
CAPPED = [
    Case("soft cap, full", B=2, M=130, N=150, softcap=2.0, magnitude=3.0),
    Case("soft cap, causal, no rest", B=2, M=200, N=200, causal=True, softcap=0.5, dtype=BF16, scale=-1.0, dlse=True),
    Case("soft cap, bias, window", B=2, M=150, N=200, bias="11hqk", lo=-40, hi=60, softcap=1.0, bias_values="inf", magnitude=3.0),
    Case("soft cap, bias of full shape", B=2, M=130, N=140, bias="b1hqk", bias_dtype=F32, softcap=1.0, causal=True, magnitude=2.0),
    Case("soft cap, bias of keys, sink, grouped", B=2, M=140, N=150, H=4, Hk=2, bias="11h1k", softcap=3.0, sink=True, hi=90, magnitude=2.0),
    Case("soft cap, mask, lengths", B=2, M=130, N=150, bias="b1qk", bias_dtype=BOOL, bias_values="rows", lengths=(64, 150), softcap=1.0),
    Case("soft cap, slopes, far above the scores", B=2, M=130, N=150, alibi="h", softcap=500.0),
    Case("soft cap, far below them", B=2, M=100, N=150, softcap=0.05, bias="11hqk", grads="qkvb"),
]
MASKED = [
    Case("mask, keys beside a bias", B=2, M=130, N=150, bias="11hqk", mask="b11k", causal=True),
    Case("mask, keys beside keys", B=2, M=130, N=150, bias="11h1k", mask="b11k", lo=-40, hi=60, sink=True),
    Case("mask, keys beside a full shape", B=2, M=140, N=150, bias="b1hqk", bias_dtype=F32, mask="111k", lengths=(64, 150)),
    Case("mask, tiles beside a bias", B=2, M=130, N=150, bias="1hqk", bias_dtype=BF16, mask="b1qk", grads="qkvs", alibi="h", dlse=True),
    Case("mask, tiles beside keys", B=2, M=150, N=130, H=4, Hk=2, bias="1h1k", mask="bhqk", mask_layout="sliced"),
    Case("mask, tiles beside a full shape", B=2, M=130, N=150, bias="bhqk", mask="11qk", softcap=2.0, causal=True),
    Case("mask, two levels", B=6, M=100, N=130, batch_inner=3, bias="b11qk", mask="1i11k", softcap=2.0),
    Case("mask, what is hidden twice", B=2, M=130, N=100, bias="1hqk", bias_values="inf", mask="b11k", mask_layout="expanded"),
]
DROPPED = [
    Case("dropout, full", B=2, M=130, N=150, dropout=0.3),
    Case("dropout, causal, grouped, sink", B=2, M=200, N=200, H=4, Hk=2, causal=True, sink=True, dropout=0.5, dtype=BF16, dlse=True),
    Case("dropout, bias, window", B=2, M=150, N=200, bias="11hqk", lo=-40, hi=60, dropout=0.1),
    Case("dropout, bias of full shape, mask", B=2, M=130, N=140, bias="b1hqk", bias_dtype=F32, mask="b111k", causal=True, dropout=0.2),
    Case("dropout, bias of keys, soft cap", B=2, M=140, N=150, bias="11h1k", softcap=3.0, hi=90, dropout=0.2),
    Case("dropout, lengths, slopes", B=2, M=130, N=150, lengths=(64, 150), alibi="h", dropout=0.9),
]
FEATURES = [*CAPPED, *MASKED, *DROPPED]


def features(M: int, N: int) -> list[Case]:
    """Every feature by itself, and all together, at the size that a kernel is for: M queries and N keys."""
    size: dict[str, Any] = dict(M=M, N=N)
    everything: dict[str, Any] = dict(
        H=4, Hk=2, mask="b11k", lengths=(N, N // 2 + 2), sink=True, softcap=2.0, dropout=0.2, hi=N - M, dlse=True
    )
    return [
        Case("grouped", B=2, **size, H=6, Hk=2),
        Case("float32", **size, dtype=F32, bias="1hqk"),
        Case("head dims", **size, D=24, Dv=40),
        Case("value dim of 1", **size, D=17, Dv=1),
        Case("wide heads", **size, D=200, Dv=72, H=1),
        Case("strides", B=2, **size, layout="mixed", dout_layout="sliced"),
        Case("last dim not contiguous", B=2, **size, layout="step", dout_layout="step"),
        Case("bias of full shape", B=2, **size, bias="bhqk", bias_values="inf"),
        Case("bias of full shape, float32, grouped", B=2, **size, H=4, Hk=2, bias="bhqk", bias_dtype=F32),
        Case("bias of keys", B=2, **size, bias="b11k"),
        Case("bias of keys of a head", B=2, **size, bias="1h1k", lo=-5, hi=N - 10),
        Case("bias of keys, grouped", B=2, **size, H=4, Hk=2, bias="1h1k"),
        Case("bias of queries", B=2, **size, bias="1hq1", bias_layout="expanded"),
        Case("bias of one number", B=2, **size, bias="1111"),
        Case("bias, transposed in memory", B=2, **size, bias="1hqk", bias_layout="transposed"),
        Case("bias, sliced", B=2, **size, bias="bhqk", bias_layout="sliced"),
        Case("bias, two batch levels", B=4, **size, batch_inner=2, bias="1ihqk"),
        Case("least numbers", **size, bias="1hqk", bias_values="least", bias_dtype=F32),
        Case("huge bias", **size, bias="1hqk", bias_values="huge", bias_dtype=F32),
        Case("mask", B=2, **size, bias="b11k", bias_dtype=BOOL),
        Case("mask that hides all", B=2, **size, bias="b1qk", bias_dtype=BOOL, bias_values="all"),
        Case("mask beside a bias", B=2, **size, bias="1hqk", mask="b1qk"),
        Case("ALiBi", B=2, **size, alibi="bh", H=4, Hk=2),
        Case("window", B=2, **size, lo=N // 5, hi=N // 2),
        Case("bottom right", B=2, **size, hi=N - M),
        Case("rows that see nothing", B=2, M=20, N=40, hi=-10),
        Case("soft cap", B=2, **size, softcap=2.0, magnitude=3.0, bias="1hqk"),
        Case("sink", B=2, **size, sink=True, H=4, Hk=2),
        Case("sink alone", B=2, **size, sink=True, lengths=(0, 0)),
        Case("lengths", B=4, **size, lengths=(N, 1, 0, N // 2 - 2)),
        Case("dropout", B=2, **size, H=4, Hk=2, dropout=0.3),
        Case("gradient of lse", B=2, **size, dlse=True),
        Case("negative scale", B=2, **size, scale=-0.4),
        Case("scale 0", **size, scale=0.0),
        Case("huge scores", **size, magnitude=30.0, scale=1.0, dtype=F32),
        Case("everything", B=2, **size, bias="bhqk", alibi="bh", **everything),
    ]  # fmt: skip
