"""The drawings of docs/how-it-works.md, from the functions and plans that they are about. No GPU.

    PYTHONPATH=src python3 scripts/figures.py    write docs/figures/*.svg

tests/test_figures.py compares what is committed with what is drawn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

import triflash
from svg import Drawing
from triflash.kernels.triton.prims import segments
from triflash.plan.device import KNOWN_DEVICES
from triflash.spec import Band

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"


def band() -> str:
    """Which blocks a tile visits, by ``segments``: rows that own queries, and columns that own keys."""
    queries, keys, tile, block = 768, 1024, 128, 64
    drawing = Drawing(760, 392, "Blocks that the band lets a tile of queries, and a tile of keys, visit")
    across, down, left, top = 20.5, 41.0, 34.0, 70.0  # of a block of keys, of a tile of queries
    x = 12.0
    for name, at in (("hidden: not visited", "empty"), ("cut by the band: masked body", "part"), ("whole: body without a mask", "whole")):
        drawing.rect(x, 8, 13, 13, at)
        drawing.text(x + 19, 19, name, "small ink")
        x += 38 + 6.6 * len(name)
    panels = (("causal=True", Band(None, 0)), ("causal=True, window=(384, 0)", Band(384, 0)))
    for number, (name, mask) in enumerate(panels):
        lo, hi = mask.offsets(queries, keys)
        x0 = left + number * (16 * across + 50)
        drawing.text(x0, top - 30, name, "head ink mono")
        drawing.text(
            x0, top - 11, f"{'' if lo is None else f'{lo} ≤ '}j − i{'' if hi is None else f' ≤ {hi}'}".replace("-", "−"), "small soft"
        )
        for row in range(queries // tile):
            begin, full, full_end, end = segments.fn(row * tile, row * tile + tile - 1, keys, lo, hi, block)
            for column in range(keys // block):
                kind = "empty" if not begin <= column < end else "whole" if full <= column < full_end else "part"
                drawing.rect(x0 + column * across, top + row * down, across - 1.5, down - 1.5, kind)
        for bound in (lo, hi):  # a line i -> i + bound, cut by the edges of the matrix
            if bound is not None:
                points = [(i, i + bound + 0.5) for i in (max(0, -bound), min(queries, keys - bound))]
                drawing.path([(x0 + j / block * across, top + i / tile * down) for i, j in points], "line dash s-ink")
        row = 3
        begin, _, _, end = segments.fn(row * tile, row * tile + tile - 1, keys, lo, hi, block)
        y = top + (row + 0.5) * down
        drawing.path([(x0 - 1, top + row * down - 1), (x0 - 1, top + (row + 1) * down - 1)], "thick s-mark")
        drawing.arrow([(x0 + end * across - 6, y), (x0 + begin * across + 3, y)], "ink")
        low, high = (None if hi is None else -hi), (None if lo is None else -lo)  # seen from a key
        column = 10
        first, _, _, last = segments.fn(column * block, column * block + block - 1, queries, low, high, tile)
        xk = x0 + (column + 0.5) * across
        drawing.path([(x0 + column * across - 1, top - 4), (x0 + (column + 1) * across - 1, top - 4)], "thick s-cool")
        drawing.arrow([(xk, top + first * down + 3), (xk, top + last * down - 5)], "ink")
    bottom = top + 6 * down
    drawing.text(
        left, bottom + 22, f"{queries} queries in tiles of {tile} (rows), {keys} keys in blocks of {block} (columns), bottom right.", "soft"
    )
    drawing.text(left, bottom + 46, "forward, dq: a tile of queries walks the keys it sees", "mark")
    drawing.text(
        left,
        bottom + 68,
        "dk, dv: a tile of keys walks the queries that see it, by the same function and the band −hi ≤ i − j ≤ −lo",
        "cool",
    )
    return drawing.svg()


def reference(scores: list[list[float]], block: int) -> list[tuple[float, bool]]:
    """For each block of a row of base-2 scores of 16 rows: the reference m of the first row by the rule of kernels/hopper/softmax.py, and
    whether its warp looked for the maximum.
    """
    m: list[float] = []
    found = []
    for start in range(0, len(scores[0]), block):
        blocks = [row[start : start + block] for row in scores]
        looked = not m
        if m:  # a warp's vote over the sums of its lanes, each of which has two neighbours of every eight scores of a row
            sums = [sum(2.0 ** min(s - top, 200.0) for s in own[lane::4]) for own, top in zip(blocks, m, strict=True) for lane in range(4)]
            looked = max(sums) > 2.0**15
        if looked:
            m = [max([*own, top]) for own, top in zip(blocks, m or [-math.inf] * len(blocks), strict=True)]
        found.append((m[0], looked))
    return found


def softmax() -> str:
    """The reference of a query over the blocks of its keys: the running maximum, and the one that is kept only near enough."""
    draw = random.Random(3)
    count, block = 32, 128
    log2e = math.log2(math.e)
    rows = [[log2e * draw.gauss(0, 1.5) for _ in range(count * block)] for _ in range(16)]
    rows[0][20 * block + 9] = 24.0  # one key in block 20 that outdoes all others
    found = reference(rows, block)
    top = [max(rows[0][n * block : (n + 1) * block]) for n in range(count)]
    running = [max(top[: n + 1]) for n in range(count)]
    grew = sum(a < b for a, b in pairwise(running))
    jumps = sum(looked for _, looked in found[1:])
    drawing = Drawing(760, 330, "Running maximum and reference of a query over 32 blocks of keys")
    left, right, high, low, least, most = 52.0, 730.0, 48.0, 268.0, 0.0, 28.0

    def at(n: float, value: float) -> tuple[float, float]:
        return left + (right - left) * n / count, low - (low - high) * (value - least) / (most - least)

    for value in range(0, 29, 4):
        drawing.path([at(0, value), at(count, value)], "thin s-grid")
        drawing.text(left - 8, at(0, value)[1] + 4, str(value), "small soft", "end")
    drawing.text(12, 24, "log₂ of the weight", "small soft")
    limit = found[0][0] + 15
    drawing.path([at(0, limit), at(20, limit)], "line dash s-mark")
    drawing.text(at(1, 0)[0], at(0, limit)[1] - 7, "a sum of weights 2^(s − m) above 2¹⁵: the warp looks again", "small mark")
    for name, levels, look in (("cool", running, "line"), ("ours", [m for m, _ in found], "thick")):
        points = [at(n + side, levels[n]) for n in range(count) for side in (0, 1)]
        drawing.path(points, f"{look} s-{name}")
    for n in range(count):
        drawing.dot(*at(n + 0.5, top[n]), 3, "soft")
    drawing.text(at(count, 0)[0], at(0, 11.6)[1], "dots: the largest score of each block", "small soft", "end")
    drawing.text(at(21.6, 0)[0], at(0, 21.5)[1], "running maximum and m together", "small ink")
    drawing.text(left, low + 24, f"running maximum: grew {grew} times; every block pays for finding it", "cool")
    drawing.text(left, low + 46, f"m: looked for in the first block, and {jumps} time since; no other block touches it", "ours")
    drawing.text(right, low + 24, "blocks of 128 keys, in the order of the walk", "small soft", "end")
    return drawing.svg()


def _dbias_step(b: int, h: int, s: int, bias: tuple[int, ...]) -> tuple[int, int, int]:
    """Rows and columns of a tile, and partial sums, of the kernel that owns the tiles of such a bias on an H200."""
    q = torch.empty(b, s, h, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    found = triflash.explain(q, q, q, bias=torch.empty(bias, device="meta", dtype=q.dtype, requires_grad=True), device="h200")
    assert found.backward is not None
    step = next(each.step for each in found.backward.steps if each.step.kernel == "dbias")
    assert step.config is not None
    return step.config.block_m, step.config.block_n, step.splits


def dbias() -> str:
    """Who owns a tile of the bias's gradient, and how a small bias is split."""
    drawing = Drawing(760, 420, "A program owns one tile of the bias and walks everything that is broadcast into it")
    rows, columns, splits = _dbias_step(4, 16, 2048, (1, 16, 2048, 2048))
    assert splits == 1
    drawing.text(12, 22, "bias (1, h, s, s): one owner a tile, a loop over the batch", "head ink")
    for entry in range(4):
        x, y = 30 + entry * 92.0, 52 + (3 - entry) * 10.0
        for row in range(4):
            for column in range(4):
                drawing.rect(x + column * 19, y + row * 19, 17.5, 17.5, "part" if (row, column) == (1, 2) else "empty")
        drawing.text(x + 37, y + 92, f"ds, entry {entry}", "small soft", "middle")
        drawing.path([(x + 47, y + 18), (x + 47, 40)], "line s-mark")
    drawing.arrow([(77, 40), (588, 40), (588, 84)], "mark")
    x, y = 541.0, 68.0
    for row in range(4):
        for column in range(4):
            drawing.rect(x + column * 19, y + row * 19, 17.5, 17.5, "part" if (row, column) == (1, 2) else "pale")
    drawing.text(x + 37, y + 94, f"dbias: tiles of {rows} x {columns}", "small ink", "middle")
    drawing.text(640, 92, "own = Σ ds", "mono mark")
    drawing.text(640, 112, "entries 0, 1, 2, 3", "small soft")
    b, h, s = 64, 8, 256
    rows, columns, splits = _dbias_step(b, h, s, (1, 1, s, s))
    tiles = (s // rows) * (s // columns)
    pairs, sms = b * h, KNOWN_DEVICES["sm90"].sms
    drawing.path([(12, 196), (748, 196)], "thin s-grid")
    drawing.text(12, 222, f"bias (1, 1, {s}, {s}), batch {b}, {h} heads: {tiles} tiles for {sms} SMs, so the loop is cut", "head ink")
    shown = (0, 1, 2, splits - 1)
    for line, part in enumerate(shown):
        y = 244 + 34 * line + (10 if part == splits - 1 else 0)
        first, last = pairs * part // splits, pairs * (part + 1) // splits - 1
        drawing.text(12, y + 16, f"part {part}", "small soft")
        drawing.rect(66, y, 230, 24, "warm", 3)
        drawing.text(181, y + 16, f"ds of pairs {first} … {last}", "small ink", "middle")
        drawing.arrow([(300, y + 12), (346, y + 12)], "mark")
        drawing.rect(350, y, 110, 24, "part", 3)
        drawing.text(405, y + 16, f"slot {part}, float32", "small slot", "middle")
        drawing.arrow([(464, y + 12), (556, 312)], "cool")
    drawing.text(170, 352, "⋮", "ink")
    drawing.rect(560, 294, 78, 40, "pale", 3)
    drawing.text(599, 318, "dbias", "ink", "middle")
    drawing.text(650, 306, "slots added in", "small soft")
    drawing.text(650, 324, "order 0, 1, 2, …", "small soft")
    work = f"{tiles} tiles x {splits} parts = {tiles * splits} pieces of work. No atomics: every sum's order follows from sizes and device."
    drawing.text(12, 404, work, "small soft")
    return drawing.svg()


def bound() -> str:
    """What a signature's first call does, and every other."""
    q = torch.empty(8, 2048, 16, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    found = triflash.explain(q, q, q, causal=True, device="h200", deterministic=False)
    assert found.backward is not None
    kernels = [each.step.kernel for each in (*found.forward.steps, *found.backward.steps)]
    drawing = Drawing(760, 300, "The first call of a signature binds a pass; every other call repeats it")
    drawing.text(12, 22, "first call of a signature", "head ink")
    drawing.text(12, 150, "every other call", "head ink")

    def box(x: float, y: float, wide: float, words: str, more: str, kind: str) -> None:
        drawing.rect(x, y, wide, 54, kind, 5)
        drawing.text(x + wide / 2, y + 23, words, "ink", "middle")
        drawing.text(x + wide / 2, y + 42, more, "small soft", "middle")

    first = (
        ("check", "words for errors", 112), ("fold", "band, layout, scale", 136), ("plan", "kernels, tiles, grid", 136),
        ("launchers once", "on meta tensors", 136),
    )  # fmt: skip
    x = 12.0
    for number, (words, more, wide) in enumerate(first):
        box(x, 38, wide, words, more, "pale")
        if number:
            drawing.arrow([(x - 16, 65), (x - 1, 65)])
        x += wide + 17
    drawing.arrow([(x - 16, 65), (x - 1, 65)])
    drawing.rect(x, 38, 136, 54, "part", 5)
    drawing.text(x + 68, 61, "bound pass", "slot", "middle")
    drawing.text(x + 68, 80, "no tensor in it", "small slot", "middle")
    drawing.arrow([(x + 68, 94), (x + 68, 128), (178, 128), (178, 166), (100, 166), (100, 199)], "mark")
    drawing.text(x - 8, 122, "kept by signature: shapes, strides, dtypes, alignment, options, device", "small mark", "end")
    x = 12.0
    repeat = (
        ("look up", "one dict", 128), ("allocate", "results, one scratch", 152), ("copy", "what TMA cannot read", 160),
        ("addresses", "into argument lists", 148),
    )  # fmt: skip
    for number, (words, more, wide) in enumerate(repeat):
        box(x, 202, wide, words, more, "warm")
        if number:
            drawing.arrow([(x - 13, 229), (x - 1, 229)])
        x += wide + 14
    drawing.arrow([(x - 13, 229), (x - 1, 229)])
    drawing.rect(x, 202, 748 - x, 54, "whole", 5)
    drawing.text((x + 748) / 2, 234, "launch", "slot", "middle")
    drawing.text(12, 284, "launches of a causal step on an H200: " + ", ".join(kernels), "small soft")
    return drawing.svg()


FIGURES: dict[str, Callable[[], str]] = {"band.svg": band, "softmax.svg": softmax, "dbias.svg": dbias, "bound.svg": bound}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, figure in FIGURES.items():
        text = figure()
        (FOLDER / name).write_text(text)
        print(f"{name}: {len(text)} bytes")
