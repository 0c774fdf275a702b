"""The gradient of a bias that packed sequences share, by Hopper's ``dbias``: on a CPU by its own source (``gluon_twin.py``), and on a GPU."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import gluon_twin
from here import ON_HOPPER, stand_in_only
from mutations import mutate, noticed
from running import planned_with
from test_varlen_hopper import DEVICE, HALF, HOSTILE, check, drawn, hopper, several
from triflash import attention_varlen, explain
from triflash.plan.kernels import dbias as dbias_plan
from triflash.plan.kernels import loops
from triflash.plan.kernels.dbias import DbiasConfig
from triflash.spec import Operands, packed_spec_of

pytestmark = [] if ON_HOPPER else stand_in_only
LENGTHS = [150, 0, 64, 1, 127, 130]


def with_bias(seed: int, lengths: list[int] | None = None, **more: Any) -> Any:
    """``drawn`` with a padded bias over queries and keys, of any sharing, that may end before the longest sequence or behind it."""
    rng = random.Random(-seed)
    batch = drawn(seed, **more)
    while "mask" in batch.options:
        seed += 1000
        batch = drawn(seed, **more)
    batch.options.pop("bias_layout", None)
    longest = [max(n) for n in batch.lengths]
    rows, cols = (max(n + rng.choice([0, 0, 3, -1, 70]), 2) for n in longest)
    shape = rng.choice([1, 1, len(batch.starts[0])]), rng.choice([1, batch.leaves["q"].shape[1]]), rows, cols
    dtype = rng.choice([batch.leaves["q"].dtype, torch.float32])
    batch.leaves["bias"] = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return batch


def ran_dbias(ran: list[str]) -> bool:
    return "dbias" in ran and not {"packed_dbias", "cleared", "tiles"} & set(ran)


@pytest.mark.parametrize("seed", range(300 if ON_HOPPER else 40))
def test_random_problems(seed: int) -> None:
    assert ran_dbias(check(with_bias(seed), seed))


@pytest.mark.parametrize("seed", range(100))
@pytest.mark.skipif(not ON_HOPPER, reason="the stand-in multiplies float16")
def test_random_problems_in_bfloat16(seed: int) -> None:
    assert ran_dbias(check(with_bias(seed, dtype=torch.bfloat16, dims=(16, 64, 128, 256)), seed))


@pytest.mark.parametrize("seed", range(8))
def test_each_loop_by_itself(seed: int) -> None:
    """As of long problems: a launch for where every lse is small, and one for any."""
    with planned_with(loops, LONG=-1.0):
        ran = check(with_bias(seed), seed)
    assert ran_dbias(ran) and ran.count("dbias") in (1, 2)


CONFIGS = [
    DbiasConfig(1, 32, 4, 4, chunk=16), DbiasConfig(2, 64, 4, 4, 2, chunk=16), DbiasConfig(2, 128, 4, 4, chunk=16, ping_pong=True),
    DbiasConfig(1, 128, 4, 4, chunk=16, ctas_per_sm=2),
]  # fmt: skip


@pytest.mark.parametrize("band", [{}, {"causal": True}, {"causal": "top_left"}, {"window": (40, 20)}], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(c).replace(" ", "-"))
def test_configurations(config: DbiasConfig, band: dict[str, Any]) -> None:
    batch = several(LENGTHS, **band)
    batch.leaves["bias"] = torch.randn(1, 2, 150, 152, generator=torch.Generator().manual_seed(1)).to(HALF)
    assert ran_dbias(check(batch, 0, dbias=config))


@pytest.mark.parametrize("config, least", [(DbiasConfig(2, 64, 4, 4, chunk=16), 3), (DbiasConfig(2, 64, 4, 4, chunk=16, ping_pong=True), 4),
                                           (DbiasConfig(1, 64, 4, 4, chunk=16, ping_pong=True), 3)], ids=str)  # fmt: skip
def test_slots_that_a_round_needs(config: DbiasConfig, least: int) -> None:
    """As many run, and fewer are refused before they wait for ever: in turns, a consumer frees nothing of a round while the other has it."""

    def run(key_slots: int, query_slots: int) -> None:
        batch = several([70, 0, 130], D=32, causal=True)
        batch.leaves["bias"] = torch.randn(1, 2, 130, 136, generator=torch.Generator().manual_seed(1)).to(HALF)
        assert ran_dbias(check(batch, 0, dbias=replace(config, key_slots=key_slots, query_slots=query_slots)))

    for slots in ((least, least), (least, least + 2), (least + 2, least)):
        run(*slots)
    for slots in ((least - 1, least), (least, least - 1)):
        with pytest.raises(ValueError, match=f"key_slots and query_slots: wanted at least {least} "):
            run(*slots)


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (1, 2, 150, 150), (6, 1, 150, 150)], ids=str)
def test_few_tiles_are_split(shape: tuple[int, ...]) -> None:
    """The sequences of a tile in parts, which are added in their order."""
    batch = several(LENGTHS, causal=True)
    batch.leaves["bias"] = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(HALF)
    ran = check(batch, 1, sms=60)
    assert ran_dbias(ran) and "dbias_sum" in ran


def test_same_bits_whatever_comes_first() -> None:
    found = []
    for seed in range(3):
        batch = several([150, 3, 0, 200, 90], causal=True)
        leaves = [x.to(DEVICE).requires_grad_() for x in batch.leaves.values()]
        bias = torch.randn(1, 2, 200, 200, generator=torch.Generator().manual_seed(3)).to(DEVICE, HALF).requires_grad_()
        cu = torch.tensor([0, 150, 153, 153, 353, 443], device=DEVICE)
        with hopper(seed) as ran:
            out = attention_varlen(*leaves, cu, bias=bias, causal=True)
            found.append(torch.autograd.grad(out.sin().sum(), bias)[0])
        assert any(" dbias " in line for line in ran)
    assert all(torch.equal(found[0], x) for x in found[1:])


@pytest.mark.parametrize("shared", [True, False])
def test_a_bias_past_a_sequence_may_be_anything(shared: bool) -> None:
    """Where no sequence reaches, NaN; and where one does not, but another."""
    lengths = [70, 130, 5]
    batch = several(lengths, causal=True)
    leaves = [x.to(DEVICE).requires_grad_() for x in batch.leaves.values()]
    bias = torch.randn(1 if shared else 3, 2, 200, 200).to(DEVICE, HALF)
    dirty = bias.clone()
    for b, n in enumerate([max(lengths)] if shared else lengths):
        dirty[b, :, n:] = math.nan
        dirty[b, :, :, n:] = math.inf
    dirty[..., 60:, :][dirty[..., 60:, :] > 1.5] = 60000.0  # as huge as float16 has it, of which the short sequences have none
    bias[..., 60:, :][bias[..., 60:, :] > 1.5] = 60000.0
    cu = torch.tensor([0, 70, 200, 205], device=DEVICE)
    grads = []
    for each in (bias, dirty):
        each.requires_grad_()
        with hopper():
            out = attention_varlen(*leaves, cu, bias=each, causal=True)
            grads.append(torch.autograd.grad(out.sin().sum(), each)[0])
    assert grads[1].isfinite().all()
    torch.testing.assert_close(*grads, rtol=0, atol=2e-3)
    for b, n in enumerate([max(lengths)] if shared else lengths):
        assert not grads[1][b, :, n:].any() and not grads[1][b, :, :, n:].any()


@pytest.mark.parametrize("shape", [(1, 2, 24, 24), (3, 1, 24, 24)], ids=str)
@pytest.mark.parametrize("offsets", HOSTILE, ids=str)
def test_wrong_offsets_end_and_write_nothing_else(offsets: list[int], shape: tuple[int, ...]) -> None:
    T = 150 if max(offsets) == 150 else 20
    given = [torch.randn(T, heads, 16).to(DEVICE, HALF).requires_grad_() for heads in (2, 1, 1)]
    bias = torch.randn(shape).to(DEVICE, HALF).requires_grad_()
    cu = torch.tensor(offsets, dtype=torch.int64, device=DEVICE)
    with hopper() as ran:
        out = attention_varlen(*given, cu, bias=bias, causal=True)
        grads = torch.autograd.grad(out.sum(), [*given, bias])
    assert any(" dbias " in line for line in ran)
    if T == 20:
        assert not any(grad.isnan().any() for grad in grads)


OTHERS: dict[str, dict[str, Any]] = {
    "a mask": {"mask": torch.arange(150 * 150).view(1, 1, 150, 150) % 3 > 0},
    "a bias by rows": {"bias_layout": "rows"},
    "a bias of keys": {"bias_layout": "keys"},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_the_portable_kernel_gives(what: str) -> None:
    batch = several(LENGTHS, **OTHERS[what])
    rows = sum(LENGTHS)
    shape = {"a bias by rows": (2, rows, 150), "a bias of keys": (2, rows)}.get(what, (1, 2, 150, 150))
    batch.leaves["bias"] = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(HALF)
    ran = check(batch, 0)
    assert "packed_dbias" in ran and "dbias" not in ran


def test_explain_tells_of_it() -> None:
    q = torch.empty(4096, 4, 64, dtype=torch.bfloat16, device="meta")
    bias = torch.empty(1, 4, 1024, 1024, dtype=torch.bfloat16, device="meta")
    cu = torch.arange(0, 4097, 1024, dtype=torch.int32)
    told = explain(q, q, q, cu, of=attention_varlen, bias=bias, causal=True, grads=("q", "k", "v", "bias"), device="h200")
    names = [step.step.kernel for step in told.backward.steps]
    assert told.backend == "hopper" and names[-1] == "dbias" and "delta" not in names and "extents" not in names
    assert len(names) == len(set(names)) == 5  # tables, statistics, dk with dv and dq, dq rounded, and this


@pytest.mark.parametrize("sizes", [(2048, 2048), (1000, 300), (64, 700), (2, 2)], ids=str)
@pytest.mark.parametrize("band", [(None, None), (None, 0), (40, 20)], ids=str)
@pytest.mark.parametrize("lengths", [[(2048, 2048)], [(700, 650), (0, 900), (10, 1000)], [(0, 0)]], ids=str)
def test_every_tile_has_one_place(sizes: tuple[int, int], band: tuple[int | None, int | None], lengths: list[tuple[int, int]]) -> None:
    """By the kernel's own function: each tile is met once, and has rounds if a sequence has a pair there."""
    tile_of = gluon_twin.namespace("dbias_tiles", {})["tile_of"]
    q = torch.empty(1, 4096, 8, 64, dtype=torch.bfloat16, device="meta")
    cu = torch.empty(len(lengths) + 1, dtype=torch.int32, device="meta")
    bias = torch.empty(1, 1, 8, *sizes, dtype=torch.bfloat16, device="meta")
    spec = packed_spec_of(Operands(q, q, q, bias, offsets_q=cu, offsets_k=cu), *band, True, 0.125, "", "padded", "padded")
    shape = dbias_plan.of_packed(spec)
    for config in (DbiasConfig(2, 128, 4, 4), DbiasConfig(1, 32, 4, 4)):
        (fold, full), (tiles_m, tiles_n, _) = dbias_plan.places(shape, config), dbias_plan.bias_tiles(shape, config)
        assert (len(full) > tiles_m * tiles_n) == (band == (None, 0))
        some = [(m, n) for m, n in lengths if m and n]
        reach = [min(size, max(of)) for size, of in zip(sizes, zip(*lengths, strict=True), strict=True)]
        reach += [min([0, *(n - m for m, n in some)]), max([0, *(n - m for m, n in some)])]
        counts = dict(batch_outer=len(lengths), batch_inner=1, heads=8, tiles_m=tiles_m, tiles_n=tiles_n, places=len(full), fold=fold)
        counts = {name: gluon_twin.Scalar(count) for name, count in (counts | dict(M=sizes[0], N=sizes[1])).items()}
        varies = dict(VARIES_B0=False, VARIES_B1=False, VARIES_H=True)
        shuffle = gluon_twin.Scalar(dbias_plan.shuffle(shape, config, 1, 132))
        packed = dict(packed=True, reach=tuple(map(gluon_twin.Scalar, reach)))
        program = SimpleNamespace(C=config, lo=spec.lo, hi=spec.hi, splits=1, shuffle=shuffle, **counts, **varies, **packed)
        found = {}
        for place in range(len(full)):
            *_, head, m0, n0, first, last = tile_of(program, gluon_twin.Scalar(5 * len(full) + place))
            assert head == 5 and first == 0 and not (last and found.get((int(m0), int(n0))))
            found[int(m0), int(n0)] = max(int(last), found.get((int(m0), int(n0)), 0))
        assert {(m * config.block_m, n * config.block_n) for m in range(tiles_m) for n in range(tiles_n)} <= set(found)
        for (m0, n0), rounds in found.items():
            assert rounds in (0, len(lengths))
            i, j = torch.arange(m0, m0 + config.block_m)[:, None], torch.arange(n0, n0 + config.block_n)[None]
            for m, n in lengths:
                seen = (i < min(m, sizes[0])) & (j < min(n, sizes[1]))
                seen &= torch.tensor(True) if spec.hi is None else j - i <= spec.hi + n - m
                seen &= torch.tensor(True) if spec.lo is None else j - i >= spec.lo + n - m
                assert rounds or not seen.any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU's stand-in")
@pytest.mark.parametrize("kernel, old, new", [
    ("dbias", "gl.where(_ < t.x.queries, delta, 0.0)", "delta"),
    ("dbias", "weight = own_part(_1, _2, _3, _4, _5)", "pass"),
    ("dbias", "mbarrier.wait(p.biases.full.index(_), _)", "pass"),
    ("dbias_tiles", "gl.where(i < x.queries, x.keys - 1, -1)", "x.keys - 1 + 0 * i"),
    ("dbias_tiles", "gl.minimum(last, i + x.hi)", "last"),
    ("dbias_tiles", "gl.where(_ < queries, end, 0)", "end * 0"),
    ("dbias_tiles", "(m0 < x.queries) & (n0 < x.keys)", "n0 < x.keys - 64"),
    ("dbias_tiles", "whole & (n0 + BN - 1 <= m0 + x.hi)", "whole"),
    ("dbias_tiles", "p.hi + most", "p.hi"),
    ("dbias_tiles", "(tn < own) == (behind < 0)", "behind < 0"),
    ("extent", "p.hi + diagonal", "p.hi"),
])  # fmt: skip
def test_each_of_these_is_needed(kernel: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, kernel, old, new)

    def run(seed: int) -> None:
        batch = several([150, 0, 64, 1, 127, 130], causal=True)
        if seed % 2:  # more keys than queries
            used = [90, 0, 64, 1, 40, 66]
            batch = replace(batch, used=(used, None))
        batch.leaves["bias"] = torch.randn(1, 2, 150, 152, generator=torch.Generator().manual_seed(seed)).to(HALF)
        check(batch, seed, dbias=DbiasConfig(2, 64, 4, 4, 2, chunk=16))

    assert noticed(run, 8)


def test_tiles_are_dealt_out_for_equal_and_for_any_lengths() -> None:
    """As even as one more or less of equal ones allows, and with lengths from 1 to the longest not by neighbouring rows of tiles."""
    q = torch.empty(1, 32768, 16, 64, dtype=torch.bfloat16, device="meta")
    bias = torch.empty(1, 1, 16, 2048, 2048, dtype=torch.bfloat16, device="meta")
    found = []
    for count in (16, 33):
        cu = torch.empty(count + 1, dtype=torch.int32, device="meta")
        spec = packed_spec_of(Operands(q, q, q, bias, offsets_q=cu, offsets_k=cu), None, 0, True, 0.125, "", "padded", "padded")
        shape = dbias_plan.of_packed(spec)
        config = dbias_plan.choose(shape, 232448)
        assert config is not None
        programs = dbias_plan.programs(shape, config, 1, 132)
        shuffle, tiles = dbias_plan.shuffle(shape, config, 1, programs), dbias_plan._tiles_of_places(shape, config)[1]
        found.append((programs, shuffle))
        for lengths, most in (([2048] * count, 1.04), ([*range(64, 2049, 64)], 1.12)):
            load = [0] * programs
            for place in range(16 * len(tiles)):
                if (tile := tiles[place * shuffle % len(tiles)]) is not None:
                    load[place % programs] += sum(n > 128 * max(tile) for n in lengths)
            assert max(load) <= most * sum(load) / programs
    assert found[0] == found[1]
