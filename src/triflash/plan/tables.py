"""Measured configurations: the rows that beat the analytic default, and where they did. Read by ``kernels/portable.py``.

A row says on what it was measured and against what. Anything without a row gets ``configs.default_config``.
"""

from __future__ import annotations

from dataclasses import dataclass

from .configs import Problem, TileConfig, problem_like

__all__ = ["MEASURED_ON", "ROWS", "THREE_TF32", "Row", "lookup"]

MEASURED_ON = {"sm90": "H200"}  # the GPU that stood for an architecture


@dataclass(frozen=True)
class Row:
    """``config`` is the best measured for ``problem`` on ``arch``; ``spills`` is the most registers the compiler may spill for it.

    most_keys: up to how many keys it is the best; None: where no row of short problems is.
    """

    arch: str
    problem: Problem
    config: TileConfig
    spills: int = 0
    most_keys: int | None = None


def _measured(
    arch: str, kernel: str, head_dim: int, bias: bool, full: str, banded: str, spills: tuple[int, int] = (0, 0), products: str = ""
) -> tuple[Row, Row]:
    """Two rows, for full and for causal attention, of configurations written as ``_config`` reads them. products: those of float32
    elements; without it elements have 16 bits.
    """
    itemsize = 4 if products else 2
    return (
        Row(arch, problem_like(kernel, head_dim, itemsize, bias, False, products), _config(full), spills[0]),
        Row(arch, problem_like(kernel, head_dim, itemsize, bias, True, products), _config(banded), spills[1]),
    )


def _config(text: str) -> TileConfig:
    """``BMxBN wWARPS sSTAGES``."""
    tile, warps, stages = text.split()
    block_m, block_n = map(int, tile.split("x"))
    return TileConfig(block_m, block_n, int(warps[1:]), int(stages[1:]))


def _short(most_keys: int, kernel: str, head_dim: int, banded: bool, config: str, spills: int = 0) -> Row:
    """A row of 16-bit elements without a bias, for so many keys and fewer."""
    return Row("sm90", problem_like(kernel, head_dim, 2, False, banded, ""), _config(config), spills, most_keys)


def _three_tf32(kernel: str, head_dim: int, config: str, spills: tuple[int, int, int, int] = (0, 0, 0, 0)) -> tuple[Row, ...]:
    """Four float32 rows of one configuration: without and with a bias, full and causal."""
    return (
        *_measured("sm90", kernel, head_dim, False, config, config, (spills[0], spills[1]), "tf32x3"),
        *_measured("sm90", kernel, head_dim, True, config, config, (spills[2], spills[3]), "tf32x3"),
    )


# H200, Triton 3.6.0, bf16, 16,384 tokens, h*d = 2048, s 2048, 2026-11: the best of up to 33 configurations each, all checked against a
# float32 reference, as triflash tune does it now. Comments give TFLOP/s over the kernel's own products, full / causal.
ROWS: tuple[Row, ...] = (
    *_measured("sm90", "forward", 32, False, "64x64 w4 s3", "128x64 w4 s3"),  # 297 / 210
    *_measured("sm90", "forward", 64, False, "64x64 w4 s3", "128x64 w4 s3"),  # 436 / 331
    *_measured("sm90", "forward", 128, False, "256x64 w8 s3", "128x64 w8 s3", (42, 0)),  # 503 / 360
    *_measured("sm90", "forward", 256, False, "128x64 w8 s2", "128x64 w8 s2", (12, 16)),  # 474 / 390
    *_measured("sm90", "forward", 32, True, "64x64 w4 s3", "64x64 w4 s3"),  # 199 / 170
    *_measured("sm90", "forward", 64, True, "128x64 w8 s3", "64x64 w4 s3"),  # 322 / 278
    *_measured("sm90", "forward", 128, True, "128x64 w8 s3", "128x64 w8 s3"),  # 379 / 336
    *_measured("sm90", "forward", 256, True, "128x64 w8 s2", "128x32 w8 s2", (12, 0)),  # 416 / -
    *_measured("sm90", "dkdv", 32, False, "32x128 w4 s3", "32x128 w4 s3"),  # 414 / 279
    *_measured("sm90", "dkdv", 64, False, "64x64 w4 s3", "64x64 w4 s3", (0, 6)),  # 505 / 375
    *_measured("sm90", "dkdv", 128, False, "64x128 w8 s3", "32x64 w4 s3", (26, 6)),  # 542 / 454
    *_measured("sm90", "dkdv", 256, False, "64x64 w8 s2", "32x64 w8 s3", (126, 46)),  # 273 / 163
    # The next two together in place of dkdv, 2026-12-01: 1,426 µs and 794 causal, dkdv 2,000 and 1,310.
    *_measured("sm90", "dk", 256, False, "32x128 w8 s3", "32x128 w8 s3", (0, 2)),  # 832 and 481 µs
    *_measured("sm90", "dv", 256, False, "64x128 w8 s2", "32x128 w8 s3", (16, 0)),  # 594 and 313 µs
    *_measured("sm90", "dkdv", 32, True, "32x128 w4 s3", "32x128 w4 s3", (0, 10)),  # 208 / 180
    *_measured("sm90", "dkdv", 64, True, "32x64 w4 s3", "64x64 w4 s3", (0, 8)),  # 332 / 292
    *_measured("sm90", "dkdv", 128, True, "32x64 w4 s3", "32x64 w4 s3", (10, 18)),  # 395 / 369 (64x128 w8: 402, spills)
    *_measured("sm90", "dkdv", 256, True, "64x64 w8 s2", "32x64 w8 s3", (110, 52)),  # 206 / 151
    *_measured("sm90", "dq", 32, False, "128x32 w4 s3", "128x32 w4 s3"),  # 435 / 328
    *_measured("sm90", "dq", 64, False, "128x64 w8 s3", "64x64 w4 s3"),  # 623 / 440
    *_measured("sm90", "dq", 128, False, "128x32 w8 s3", "128x64 w8 s3"),  # 618 / 469
    *_measured("sm90", "dq", 256, False, "128x32 w8 s3", "128x32 w8 s3", (2, 4)),  # 561 / 476
    *_measured("sm90", "dq", 32, True, "64x64 w4 s3", "64x64 w4 s3"),  # 291 / 262
    *_measured(
        "sm90", "dq", 64, True, "64x32 w4 s3", "64x32 w4 s3"
    ),  # 378 / 381; 128x64 w4 s3: 390 / 245, but spills where it writes dbias
    *_measured("sm90", "dq", 128, True, "128x64 w8 s3", "128x64 w8 s3"),  # 516 / 434
    *_measured("sm90", "dq", 256, True, "64x32 w4 s3", "128x32 w8 s2", (50, 0)),  # 420 / 303
    *_measured("sm90", "dbias", 32, True, "64x64 w4 s4", "64x64 w4 s3"),  # 130 / 94
    *_measured("sm90", "dbias", 64, True, "64x64 w4 s3", "64x64 w4 s3"),  # 234 / 173
    *_measured("sm90", "dbias", 128, True, "128x64 w8 s2", "64x128 w8 s2"),  # 259 / 202
    *_measured("sm90", "dbias", 256, True, "128x64 w8 s1", "64x64 w4 s1", (42, 90)),  # 205 / 174
    # float32 by three TF32 products; 2 x 16 heads of 2048 (backward 2 x 8), 2026-11-29, full attention only. Comments give milliseconds.
    *_three_tf32("forward", 64, "128x64 w8 s2", (0, 0, 20, 18)),  # 0.68; 64x64 w4 s2 0.78, 128x32 w8 s2 0.90
    *_three_tf32("forward", 128, "128x64 w8 s1", (74, 74, 104, 106)),  # 1.46; 128x32 w8 s1 1.72, 64x32 w4 s1 2.18
    *_three_tf32("dkdv", 64, "32x128 w8 s1", (4, 14, 0, 38)),  # 0.77; 32x64 w4 s1 0.85, 32x32 w4 s1 0.91
    *_three_tf32("dkdv", 128, "32x32 w8 s1", (2, 16, 20, 22)),  # 2.87; 16x32 w4 s1 2.97, 32x64 w8 s1 3.80
    *_three_tf32("dq", 64, "64x64 w4 s1", (0, 20, 10, 10)),  # 0.47; 64x32 w4 s1 0.60, 128x32 w8 s1 0.60
    *_three_tf32("dq", 128, "32x32 w4 s1", (36, 32, 26, 42)),  # 1.42; 32x16 w4 s1 2.34, 32x32 w8 s1 2.52
    *_three_tf32("dbias", 64, "64x64 w4 s1", (0, 0, 46, 40))[2:],  # 0.37; 64x32 w4 s1 0.51, 64x64 w8 s1 0.70
    *_three_tf32("dbias", 128, "64x64 w8 s1", (0, 0, 140, 162))[2:],  # 1.38; 32x64 w8 s1 1.76, 64x32 w8 s1 1.92
    # Short sequences, bf16, 16,384 tokens, h*d = 2048, 2026-12-01. Microseconds at s 512 / 1024 of the row for any, and of this.
    _short(512, "forward", 128, False, "128x32 w8 s3"),  # 206 / 334; 191 / 327
    _short(1024, "forward", 128, True, "64x32 w4 s3"),  # 190 / 259; 148 / 221 (128x32 w4 s3: 163 / 229)
    _short(1024, "dq", 64, True, "64x32 w4 s3"),  # 196 / 271; 184 / 269
    _short(1024, "dq", 128, True, "64x64 w4 s2"),  # 210 / 280; 189 / 268
)

# Kernels and padded head dims whose float32 results were within the tolerance rule when each product is three TF32 products, on an H200
# with hard inputs: large means of q, k, v or dout, huge biases, random magnitudes, confident rows (docs/tuning.md). What has not been
# seen with hard ones is no default.
THREE_TF32 = frozenset((kernel, head_dim) for kernel in ("forward", "dkdv", "dq", "dbias") for head_dim in (16, 32, 64, 128))

_BY_KEY = {(row.arch, row.problem): row for row in ROWS if row.most_keys is None}
_SHORT = {(row.arch, row.problem): row for row in ROWS if row.most_keys is not None}


def lookup(arch: str, problem: Problem, keys: int | None = None) -> Row | None:
    """The measured row for this architecture, problem and number of keys (None: not known), or None."""
    short = _SHORT.get((arch, problem))
    if short is not None and keys is not None and short.most_keys is not None and keys <= short.most_keys:
        return short
    return _BY_KEY.get((arch, problem))
