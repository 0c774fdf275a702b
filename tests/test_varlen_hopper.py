"""Packed sequences by Hopper's kernels, against a loop over the dense reference in float64 as in ``test_varlen.py``: on a CPU by their own
source (``gluon_twin.py``), and on a GPU that they are made for."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import gluon_twin
import triflash
from here import ON_HOPPER, stand_in_only
from running import planned_with
from test_varlen import Batch, loss_of, near
from triflash import UnsupportedError, attention_varlen, explain
from triflash.kernels.hopper import listed as listed_kernels
from triflash.kernels.hopper.extent import PADDING
from triflash.plan.kernels import listed
from triflash.plan.kernels.dkdv import DkdvConfig
from triflash.plan.kernels.dq import DqConfig
from triflash.plan.kernels.forward import ForwardConfig
from triflash.plan.kernels.shared import STATS_MULTIPLE
from triflash.plan.override import override_configs

DEVICE = "cuda" if ON_HOPPER else "cpu"
pytestmark = [] if ON_HOPPER else stand_in_only
HALF = torch.float16
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
SIZES = (0, 1, 15, 16, 63, 64, 65, 127, 128, 129, 150)


APART = ["extents", "listed", "ordered"]  # the kernels that make the tables of many tiles


def many_tiles() -> contextlib.AbstractContextManager[None]:
    """Within it all tiles are too many for one program."""
    return planned_with(listed, LISTED_AT_ONCE=-1)


@contextlib.contextmanager
def hopper(seed: int = 0, sms: int = 3, apart: bool = False, **configs: Any) -> Iterator[list[str]]:
    """Within it calls run on Hopper's kernels, or the stand-in for them; what ran. apart: with ``many_tiles``."""
    with contextlib.ExitStack() as stack:
        if apart:
            stack.enter_context(many_tiles())
        if not ON_HOPPER:
            stack.enter_context(gluon_twin.twin_device(sms, seed))
        stack.enter_context(override_configs(**{name: config for name, config in configs.items() if config is not None}))
        stack.enter_context(triflash.backend("hopper"))
        yield stack.enter_context(triflash.record_launches())


def drawn(seed: int, dtype: torch.dtype = HALF, dims: tuple[int, ...] = (16, 64)) -> Batch:
    """A random problem of what the kernels take: any lengths and features together."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    B, Hk, D = rng.choice([1, 2, 3, 5]), rng.choice([1, 2]), rng.choice(dims)
    H, Dv = Hk * rng.choice([1, 1, 2]), rng.choice([D, D, 24])
    own = [rng.choice(SIZES) for _ in range(B)]
    lengths = own, own if rng.random() < 0.4 else [rng.choice(SIZES) for _ in range(B)]
    first = rng.choice([0, 0, 2])
    starts = tuple([first + sum(x[:b]) for b in range(B)] for x in lengths)
    Tq, Tk = (max(s[-1] + x[-1], 1) + rng.choice([0, 3]) for s, x in zip(starts, lengths, strict=True))
    used = tuple([rng.randint(0, n) for n in x] if rng.random() < 0.3 else None for x in lengths)
    longest = [max([*(x if u is None else u), 1]) for x, u in zip(lengths, used, strict=True)]
    options: dict[str, Any] = {}
    leaves = {"q": rand(Tq, H, D), "k": rand(Tk, Hk, D), "v": rand(Tk, Hk, Dv)}

    def shape(layout: str) -> tuple[int, ...]:
        h, m = rng.choice([1, H]), rng.choice([1, *(longest[0] + more for more in (0, 3, -1))])
        n = max(longest[1] + rng.choice([0, 0, 3, -1]), 2)
        return {"padded": (rng.choice([1, B]), h, max(m, 1), n), "rows": (h, Tq, n), "keys": (h, Tk)}[layout]

    if rng.random() < 0.5:
        options["bias_layout"] = rng.choice(["padded", "padded", "rows", "keys"])
        leaves["bias"] = rand(*shape(options["bias_layout"]))
    if rng.random() < 0.3:
        options["mask_layout"] = rng.choice(["padded", "rows", "keys"])
        options["mask"] = torch.rand(shape(options["mask_layout"]), generator=generator) < 0.8
    some = (
        (0.5, "causal", rng.choice([True, "top_left"])),
        (0.3, "window", (rng.choice([None, 0, 3, 70]), rng.choice([None, 0, 50]))),
        (0.2, "softcap", 3.0),
        (0.2, "alibi_slopes", torch.rand(rng.choice([(H,), (B, H)]), generator=generator)),
        (0.2, "scale", 0.2),
    )
    options |= {name: value for chance, name, value in some if rng.random() < chance}
    if rng.random() < 0.3:
        leaves["sink"] = rand(H)
    if rng.random() < 0.25:
        options |= {"dropout_p": 0.3, "dropout_seed": 77}
    return Batch(leaves, starts, lengths, used, options, rng.choice([torch.int32, torch.int64]))


def check(batch: Batch, seed: int, deterministic: bool = False, share: float = 1.0, **configs: Any) -> list[str]:
    """Results, and all gradients or a random share of them; the kernels that ran."""
    rng = random.Random(seed)
    dtype = batch.leaves["q"].dtype
    able = list(batch.leaves) if share else []
    wanted = [name for name in able if rng.random() < share] or able
    exact = {name: x.double().requires_grad_(name in wanted) for name, x in batch.leaves.items()}
    leaves: dict[str, Tensor | None] = {name: x.to(DEVICE).requires_grad_(name in wanted) for name, x in batch.leaves.items()}
    with_lse = rng.random() < 0.5
    right = batch.reference(exact)
    loss = loss_of(*right, seed, with_lse)
    right_grads = torch.autograd.grad(loss, [exact[name] for name in wanted], allow_unused=True) if loss.requires_grad and wanted else ()
    options, batch.options = batch.options, batch.options | {"deterministic": deterministic}
    with hopper(seed, **configs) as ran:
        got = batch.call(leaves, "hopper", DEVICE)
        grads = (
            torch.autograd.grad(loss_of(*got, seed, with_lse), [leaves[name] for name in wanted], allow_unused=True) if right_grads else ()
        )
    batch.options = options
    for name, x, y in zip(("out", "lse"), got, right, strict=True):
        near(name, x, y, TOLERANCE[dtype])
    largest = max((float(y.norm()) for y in right_grads if y is not None), default=0.0)
    for name, x, y in zip(wanted, grads, right_grads, strict=False):
        if x is not None:
            near("d" + name, x, torch.zeros_like(exact[name]) if y is None else y, TOLERANCE[dtype], largest)
    return [line.split()[1] for line in ran if line.startswith("hopper")]


@pytest.mark.parametrize("seed", range(300 if ON_HOPPER else 40))
def test_random_problems(seed: int) -> None:
    ran = check(drawn(seed), seed, seed % 2 == 1, 0.8, apart=seed % 3 == 0)
    assert ran[:3] == APART if seed % 3 == 0 else ran[0] == "prepared"


def test_plan_and_kernel_agree_on_how_much_one_program_lists() -> None:
    assert listed_kernels.AT_ONCE.value == listed.LISTED_AT_ONCE and PADDING.value == STATS_MULTIPLE


def test_offsets_of_any_strides() -> None:
    """Every other number of something larger: the kernel that reads them takes them one behind the other."""
    for bias in ({}, {"bias": torch.randn(1, 2, 150, 150, generator=torch.Generator().manual_seed(1)).to(HALF)}):
        batch = several([70, 0, 64, 1], causal=True)
        batch.leaves |= bias
        batch.used, batch.step = ([70, 0, 33, 1], [5, 0, 64, 1]), 2
        assert "prepared" in check(batch, 0) and "extents" in check(batch, 0, apart=True)


@pytest.mark.skipif(not ON_HOPPER, reason="the same again, in the other dtype and in wide heads")
@pytest.mark.parametrize("seed", range(100))
def test_random_problems_in_bfloat16(seed: int) -> None:
    check(drawn(1000 + seed, torch.bfloat16, (64, 128, 136, 256)), seed, seed % 2 == 1, 0.8)


FORWARD = [ForwardConfig(1, 64, 2), ForwardConfig(2, 64, 2, ping_pong=True), ForwardConfig(3, 128, 2, ping_pong=True),
           ForwardConfig(2, 32, 2, q_stages=2), ForwardConfig(2, 64, 1, separate_o=False), ForwardConfig(1, 128, 2, persistent=False)]  # fmt: skip


@pytest.mark.parametrize("config", FORWARD, ids=lambda c: str(c).replace(" ", "-"))
@pytest.mark.parametrize("number", range(2))
def test_forward_tiles(number: int, config: ForwardConfig) -> None:
    batch = drawn(3 * FORWARD.index(config) + number, dims=(16,))
    if not config.separate_o:
        batch.leaves["v"] = batch.leaves["v"][..., :16].contiguous()
    assert [name for name in check(batch, number, share=0.0, forward=config) if name != "spread"][:2] == ["prepared", "forward"]


KEYS = [DkdvConfig(2, 2, dq_warpgroup=True, unroll=2), DkdvConfig(2, 2, red_dq=True), DkdvConfig(2, 2, kv_stages=2), DkdvConfig(1, 1)]
FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window, top left": {"window": (40, 30), "causal": "top_left"},
    "soft cap, dropout": {"softcap": 3.0, "dropout_p": 0.3, "dropout_seed": 5},
    "slopes": {"alibi_slopes": torch.tensor([0.2, 0.4]), "causal": True},
    "mask": {"mask": torch.arange(150 * 150).view(1, 1, 150, 150) % 3 > 0},
}


def several(lengths: list[int] | None = None, D: int = 16, H: int = 2, Hk: int = 1, **options: Any) -> Batch:
    lengths = lengths or [150, 0, 64, 1, 127, 130]
    starts = [sum(lengths[:b]) for b in range(len(lengths))]
    generator = torch.Generator().manual_seed(D)
    leaves = {name: torch.randn(sum(lengths), heads, D, generator=generator).to(HALF) for name, heads in (("q", H), ("k", Hk), ("v", Hk))}
    return Batch(leaves, (starts, starts), (lengths, lengths), (None, None), options)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("config", KEYS, ids=lambda c: str(c).replace(" ", "-"))
def test_keys_that_add_dq(config: DkdvConfig, features: str) -> None:
    ran = check(several(**FEATURES[features]), 0, dqdkdv=config)
    assert "dqdkdv" in ran and "postprocess" in ran and "dq" not in ran


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("config", [None, DqConfig(1, 32, 2, 2, separate_dq=False)], ids=["usual", "small"])
def test_dq_by_itself(config: DqConfig | None, features: str) -> None:
    ran = check(several(**FEATURES[features]), 0, True, dq=config)
    assert "dkdv" in ran and "dq" in ran and "postprocess" not in ran


@pytest.mark.parametrize("features", FEATURES)
def test_wide_heads(features: str) -> None:
    ran = check(several([70, 0, 130, 64], D=136, **FEATURES[features]), 0)
    assert "dkdv" in ran and "dq" in ran


@pytest.mark.parametrize("D", [16, 136])
@pytest.mark.parametrize("extra", ["bias", "mask"])
def test_blocks_in_turn(extra: str, D: int) -> None:
    """Key tiles visit whole blocks of queries in orders of their own, and what lies past a sequence's end is told by where those are."""
    batch = several([330, 20], D=D)
    if extra == "mask":
        batch.options["mask"] = torch.arange(330 * 330).view(1, 1, 330, 330) % 3 > 0
    else:
        batch.leaves["bias"] = torch.randn(2, 1, 330, 330, generator=torch.Generator().manual_seed(1)).to(HALF)
    ran = check(batch, 0, **({"dqdkdv": DkdvConfig(2, 2)} if D == 16 else {}))
    assert ("dqdkdv" in ran) == (D == 16)


@pytest.mark.parametrize("block", range(0, 130, 10 if not ON_HOPPER else 1))
def test_every_residue_of_a_tile(block: int) -> None:
    check(several([block, 130 - block, block + 1, 3], causal=block % 20 == 0), block, block % 4 > 0)


def walled(rows: int, heads: int, fill: float, dtype: torch.dtype = HALF, wall: int = 64) -> tuple[Tensor, Tensor]:
    """Rows within a larger tensor, and that tensor, of the value ``fill``."""
    whole = torch.full((rows + 2 * wall, heads, 16), fill, device=DEVICE, dtype=dtype)
    return whole, whole[wall : wall + rows]


HOSTILE = [[0, 30, 10, 20], [-5, 4, -1, 99], [40, 30, 20, 10], [0, 10**9, 5, 2**31 - 1], [0, 0, 0, 0], [20, 20, 20, 20], [0, 150, 0, 150]]


@pytest.mark.parametrize("deterministic, apart", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("offsets", HOSTILE, ids=str)
def test_wrong_offsets_touch_nothing_else(offsets: list[int], deterministic: bool, apart: bool) -> None:
    """Results are undefined, but nothing beside the tensors is read (it is NaN) or, of gradients, written (it is guarded)."""
    T = 150 if max(offsets) == 150 else 20
    given = []
    for heads in (2, 1, 1):
        _, inside = walled(T, heads, math.nan)
        inside.copy_(torch.randn(inside.shape).to(HALF))
        given.append(inside.requires_grad_())
    cu = torch.tensor(offsets, dtype=torch.int64, device=DEVICE)
    pairs = [walled(T, heads, 7.0) for heads in (2, 1, 1)]
    with hopper(apart=apart) as ran:
        out, lse = attention_varlen(*given, cu, causal=True, return_lse=True, deterministic=deterministic)
        grads = torch.autograd.grad(out.sum(), given)
        from triflash.compat import flash_attn

        small = cu.clamp(-(2**31), 2**31 - 1).to(torch.int32)
        flash_attn._flash_attn_varlen_backward(
            torch.ones_like(out), *(x.detach() for x in given), out.detach(), lse.detach(), *(inside for _, inside in pairs), small, small,
            T, T, 0.0, None, True, -1, -1, 0.0, None, deterministic,
        )  # fmt: skip
    if T == 20:  # else there are more tiles than the table has room for, and nobody writes what those were to write
        assert out.isfinite().all() and not lse.isnan().any() and not any(grad.isnan().any() for grad in grads)
    for whole, _ in pairs:
        assert (whole[:64] == 7.0).all() and (whole[64 + T :] == 7.0).all()
    assert all(line.startswith("hopper") for line in ran)


@pytest.mark.parametrize("deterministic, apart", [(False, False), (True, False), (False, True)])
def test_what_no_sequence_owns_may_be_anything(deterministic: bool, apart: bool) -> None:
    """NaN in rows of nobody, in rows that are not used, and in a neighbour, stays there; such rows get zeros."""
    used, starts, T = [60, 30, 70], [2, 80, 130], 220
    dead = torch.ones(T, dtype=torch.bool)
    for start, n in zip(starts, used, strict=True):
        dead[start : start + n] = False
    dead = dead.to(DEVICE)
    q, k, v = (torch.randn(T, heads, 16).to(DEVICE, HALF) for heads in (2, 1, 1))
    dirty = [x.masked_fill(dead[:, None, None], math.nan).requires_grad_() for x in (q, k, v)]
    cu, some = torch.tensor([*starts, 210], device=DEVICE), torch.tensor(used, device=DEVICE)
    options: dict[str, Any] = {"seqused_q": some, "seqused_k": some, "causal": True, "deterministic": deterministic}
    options["sink"] = torch.randn(2, device=DEVICE, requires_grad=True)
    with hopper(apart=apart):
        out, lse = attention_varlen(*dirty, cu, return_lse=True, **options)
        dout = torch.randn(out.shape).to(out).masked_fill(dead[:, None, None], math.nan)
        *grads, dsink = torch.autograd.grad(out, [*dirty, options["sink"]], dout)
        clean = [x.masked_fill(dead[:, None, None], 0.0) for x in (q, k, v)]
        same = attention_varlen(*clean, cu, **options)
        for x in clean:
            x[80:110] = math.nan  # the second sequence
        other = attention_varlen(*clean, cu, **options)
    assert not out[dead].any() and (lse[:, dead] == -math.inf).all()
    assert out[~dead].isfinite().all() and lse[:, ~dead].isfinite().all() and torch.equal(out, same)
    for grad in grads:
        assert grad.isfinite().all() and not grad[dead].any()
    assert dsink.isfinite().all()
    assert other[80:110].isnan().all() and other[:80].isfinite().all() and other[110:].isfinite().all()


def test_a_bias_past_a_sequence_may_be_anything() -> None:
    lengths = [70, 130, 5]
    batch = several(lengths, causal=True)
    leaves = {name: x.to(DEVICE).requires_grad_() for name, x in batch.leaves.items()}
    bias = torch.randn(3, 2, 130, 130).to(DEVICE, HALF)
    dirty = bias.clone()
    for b, n in enumerate(lengths):
        dirty[b, :, n:] = math.nan
        dirty[b, :, :, n:] = math.nan
    cu = torch.tensor([0, 70, 200, 205], device=DEVICE)
    for deterministic in (False, True):
        results = []
        for each in (bias, dirty):
            with hopper(dqdkdv=None if deterministic else DkdvConfig(2, 2)):
                out = attention_varlen(*leaves.values(), cu, bias=each, causal=True, deterministic=deterministic)
                results.append((out, *torch.autograd.grad(out.sin().sum(), list(leaves.values()))))
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=2e-3)  # rows share a warp, whose maximum is taken again for NaN


def test_as_many_sequences_as_you_like() -> None:
    """None, many of one row, and more than the tables take at once, most of them empty."""
    rows = 1100 if ON_HOPPER else 130
    q, k, v = (torch.randn(rows, 1, 16).to(DEVICE, HALF).requires_grad_() for _ in range(3))
    with hopper():
        out = attention_varlen(q, k, v, torch.arange(rows + 1, device=DEVICE))
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        nowhere = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        none, lse = attention_varlen(q, k, v, nowhere, return_lse=True)
        with pytest.raises(UnsupportedError, match="ALiBi slopes of no sequences"):  # which have no memory
            attention_varlen(q, k, v, nowhere, alibi_slopes=torch.rand(0, 1, device=DEVICE))
        for shape, words in (((0, 1, 8, 8), "sequences"), ((0, 1, 1, 8), "sequences"), ((1, 1, 1, 0), "queries or no keys")):
            with pytest.raises(UnsupportedError, match=f"a bias or mask of no {words}"):
                attention_varlen(
                    q, k, v, nowhere if shape[0] == 0 else torch.zeros_like(nowhere).expand(2), bias=torch.zeros(shape).to(DEVICE, HALF)
                )
        empty, bias = torch.ones(1, rows, 0, dtype=torch.bool, device=DEVICE), torch.zeros(1, rows).to(DEVICE, HALF)
        with pytest.raises(UnsupportedError, match="a bias or mask of no queries or no keys"):
            attention_varlen(q, k, v, torch.zeros_like(nowhere).expand(2), bias=bias, bias_layout="keys", mask=empty, mask_layout="rows")
    given = q.detach().to("meta"), k.detach().to("meta"), v.detach().to("meta"), nowhere.cpu()
    found = explain(*given, of=attention_varlen, mask=torch.ones(0, 1, 8, 8, dtype=torch.bool, device="meta"), device="sm90")
    assert found.backend == "triton"
    torch.testing.assert_close(out, v)
    for grad, right in zip(grads, (0.0, 0.0, 1.0), strict=True):
        torch.testing.assert_close(grad, torch.full_like(grad, right), atol=1e-3, rtol=0)
    assert not none.any() and (lse == -math.inf).all()
    many = torch.zeros(2500, dtype=torch.int32, device=DEVICE)
    many[1700:] = rows // 2
    many[2300:] = rows
    with hopper():
        found = attention_varlen(q, k, v, many, causal=True)
    right = attention_varlen(*(x.detach().double() for x in (q, k, v)), many, causal=True, backend="oracle")
    torch.testing.assert_close(found.double(), right, atol=2e-3, rtol=2e-3)


def test_what_it_cannot_do_is_said() -> None:
    q, k, v = (torch.randn(100, 2, 16).to(DEVICE, HALF) for _ in range(3))
    bias = torch.randn(1, 2, 60, 60).to(DEVICE, HALF)
    cu = torch.tensor([0, 40, 100], device=DEVICE)
    with hopper(), pytest.raises(UnsupportedError, match="hopper"):
        attention_varlen(q, k, v, cu, bias=(bias, bias))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_sink_beside_a_bias_that_ends_early(seed: int, apart: bool) -> None:
    """Queries behind its last row see no key: their lse is the sink, whose gradient it passes on. A sink may have any strides."""
    generator = torch.Generator().manual_seed(seed)
    batch = several([70, 0, 64, 1, 40], causal=seed % 2 == 0)
    batch.leaves["bias"] = torch.randn(1, 2, [50, 64, 1, 50][seed], [60, 70, 70, 10][seed], generator=generator).to(HALF)
    batch.leaves["sink"] = torch.randn(4, generator=generator)[::2]
    batch.used = ([69, 0, 30, 1, 40], [70, 0, 64, 0, 0])
    assert "forward" in check(batch, seed, apart=apart)


def test_deterministic_results_have_the_same_bits() -> None:
    batch = several([150, 3, 0, 200, 90], causal=True)
    leaves = {name: x.to(DEVICE).requires_grad_() for name, x in batch.leaves.items()}
    cu = torch.tensor([0, 150, 153, 153, 353, 443], device=DEVICE)
    found = []
    for seed in range(2):
        with hopper(seed):
            out = attention_varlen(*leaves.values(), cu, causal=True, deterministic=True)
            found.append([out, *torch.autograd.grad(out.sin().sum(), list(leaves.values()))])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
