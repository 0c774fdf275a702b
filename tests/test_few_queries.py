"""The kernels for few queries, by hand on small problems: every feature, odd sizes, parts that see nothing, the same bits again.

On the interpreter the plan does not take them by itself; ``override_configs`` does. What it takes on a GPU is asked of plans for such.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kvcases
import triflash
from addresses import every_address
from cases import Case, build, fill_hidden, hidden_of
from expected import kernels
from here import HAVE_TRITON
from running import assert_right, attend, named_gradients, small_tiles
from table import features
from triflash import UnsupportedError, attention, attention_with_kvcache
from triflash.combine import combine
from triflash.plan.configs import TileConfig
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.kernels import few
from triflash.plan.kernels.few import FewConfig
from triflash.plan.override import override_configs
from triflash.plan.select import plan_backward, plan_forward
from triflash.spec import AttentionSpec, BiasSpec, Needs

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from triflash.kernels.triton import combine as combine_kernels
    from triflash.kernels.triton.few_keys import scaled_to_fp16

    @triton.jit
    def _half_rows(x, half, down, ROWS: tl.constexpr, COLS: tl.constexpr):
        r = tl.arange(0, ROWS)[:, None]
        at = r * COLS + tl.arange(0, COLS)[None, :]
        halves, own = scaled_to_fp16(tl.load(x + at))
        tl.store(half + at, halves)
        tl.store(down + r, own)


pytestmark = pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
F32, BOOL = torch.float32, torch.bool
SPLIT = FewConfig(16, 16, 4, 1, splits=3)


@contextmanager
def by_hand(case: Case, forward: FewConfig, backward: FewConfig | None) -> Iterator[list[str]]:
    configs = {"few_forward": forward} | ({} if backward is None else {"few_backward": backward})
    with small_tiles(case.tiles), override_configs(**configs), triflash.record_launches() as ran:
        yield ran


def results_of(case: Case, inputs: Any, forward: FewConfig, backward: FewConfig | None) -> tuple[dict[str, Tensor], list[str]]:
    wanted = inputs.wanted()
    with by_hand(case, forward, backward) as ran:
        out, lse = attend(case, inputs, "triton", raw=True)
        assert lse is not None
        outputs, cotangents = ([out], [inputs.dout]) if inputs.dlse is None else ([out, lse], [inputs.dout, inputs.dlse])
        grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents) if wanted else ()
    return {"out": out.detach(), "lse": lse.detach()} | named_gradients(wanted, grads), kernels(ran)


def run(case: Case, device: torch.device, forward: FewConfig = SPLIT, backward: FewConfig | None = None) -> list[str]:
    """Compute a case by these kernels, judge all of it, and see that they ran, and nothing for dq, dk and dv beside them."""
    rows = case.M * case.H // case.key_heads
    if backward is None:
        backward = replace(SPLIT, block_m=max(16, 1 << (rows - 1).bit_length()))
    inputs = build(case, device)
    results, ran = results_of(case, inputs, forward, backward)
    assert_right(case, inputs, results)
    assert ran[0] == "few_forward" and ("combine" in ran) is (forward.splits != 1)
    grads = set(case.grads) & set(inputs.wanted())
    assert not {"forward", "dq", "dkdv"} & set(ran)
    assert ("few_backward" in ran) is bool(grads & set("qkv")) or "b" in grads
    assert ("sum_rows" in ran) is ("q" in grads and backward.splits != 1)
    again, _ = results_of(case, inputs, forward, backward)
    for name, x in results.items():
        assert torch.equal(x, again[name]), f"{name}: other bits"
    return ran


FEATURES = [
    *features(3, 70),
    Case("one query", B=2, M=1, N=100),
    Case("one query, one head, one batch entry", M=1, N=49, H=1),
    Case("more rows than a tile", M=11, N=70, H=3, Hk=1, causal=False),
    Case("top left", B=2, M=20, N=90, causal=True),
    Case("dq alone", B=2, M=3, N=70, grads="q"),
    Case("dk alone", B=2, M=3, N=70, grads="k"),
    Case("dv alone", B=2, M=3, N=70, grads="v"),
    Case("dbias alone", B=2, M=3, N=70, bias="bhqk", grads="b", hi=50),
    Case("dbias of keys alone", B=2, M=3, N=70, bias="1h1k", grads="b", lo=10),
]  # fmt: skip


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features(case: Case, device: torch.device) -> None:
    run(case, device)


@pytest.mark.parametrize("splits", [1, 2, 7, 40])
def test_splits(splits: int, device: torch.device) -> None:
    """As many parts as blocks, fewer, more: those that are left over see no key."""
    config = replace(SPLIT, splits=splits)
    run(
        Case("splits", B=2, M=2, N=70, H=4, Hk=2, lengths=(70, 20), sink=True, bias="b11k"),
        device,
        config,
        replace(SPLIT, splits=min(splits, 5)),
    )


@pytest.mark.parametrize("rest", range(16))
def test_every_residue(rest: int, device: torch.device) -> None:
    """Rows and keys that are no whole number of tiles: 16 of either."""
    run(Case("residue", M=1 + rest, N=33 + rest, H=3, Hk=1, bias="1hqk", grads="" if rest % 3 else "qkvb"), device)


@pytest.mark.parametrize("queries", [1, 5, 30])
def test_tiles(queries: int, device: torch.device) -> None:
    """Tiles of other sizes."""
    case = Case("tiles", M=queries, N=150, H=4, Hk=2, hi=150 - queries, alibi="h", grads="")
    for config in (FewConfig(32, 32, 4, 1, splits=2), FewConfig(64, 16, 4, 1, splits=3)):
        run(case, device, config)


def test_hidden_keys_may_hold_anything(device: torch.device) -> None:
    case, found = Case("hidden", B=3, M=2, N=70, H=4, Hk=2, bias="b11k", lengths=(70, 20, 0)), []
    for junk in (False, True):
        inputs = build(case, device)
        fill_hidden(inputs, junk)
        results, _ = results_of(case, inputs, SPLIT, SPLIT)
        found.append(results)
        assert not any(x.any() for x in hidden_of(inputs, map(results.get, ("dk", "dv")), [results.get("db")]))
    for name, clean in found[0].items():
        assert torch.equal(clean, found[1][name]), name


def test_two_biases(device: torch.device) -> None:
    q, k, v = (torch.randn(2, rows, 4, 16, device=device, requires_grad=True) for rows in (3, 70, 70))
    for shapes in (((2, 1, 1, 70), (1, 4, 3, 70)), ((2, 4, 3, 70), (1, 4, 1, 70)), ((2, 4, 3, 70), (2, 4, 3, 70))):
        biases = tuple(torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
        leaves = (q, k, v, *biases)
        dout = torch.randn(2, 3, 4, 16, device=device)
        with by_hand(Case(""), SPLIT, SPLIT) as ran:
            out = attention(q, k, v, bias=biases, backend="triton")
            grads = torch.autograd.grad(out, leaves, dout)
        assert {"few_forward", "few_backward"} <= set(kernels(ran))
        exact = [x.detach().double().requires_grad_() for x in leaves]
        wanted = attention(*exact[:3], bias=exact[3] + exact[4], backend="oracle")
        expected = torch.autograd.grad(wanted, exact, dout.double())
        for got, want in zip((out, *grads), (wanted, *expected), strict=True):
            assert (got.double() - want).norm() <= 1e-5 * want.norm()


def test_gradients_fill_only_their_elements(device: torch.device) -> None:
    """Gradients that the caller lays out: what lies between their elements stays as it was."""
    q, k, v = (torch.randn(1, rows, 4, 16, device=device) for rows in (2, 40, 40))
    dout = torch.randn(1, 2, 4, 16, device=device)
    packed = [torch.randn(1, rows, 3, 4, 16, device=device) for rows in (2, 40, 40)]
    leaves = [x.requires_grad_() for x in packed]
    with by_hand(Case(""), SPLIT, SPLIT):
        out = attention(*(x[:, :, 1] for x in leaves), backend="triton")
        grads = torch.autograd.grad(out, leaves, dout)
    for grad in grads:
        assert grad.isfinite().all() and not grad[:, :, ::2].any() and grad[:, :, 1].any()
    del q, k, v


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter")
@pytest.mark.parametrize(
    "case",
    [
        Case("grouped", B=2, M=3, N=77, H=4, Hk=2, D=24, Dv=40, bias="b11k", lengths=(77, 20), mask="1hqk"),
        Case("window", B=2, M=5, N=100, lo=20, hi=60, bias="bhqk", bias_layout="sliced", sink=True, alibi="bh", layout="mixed"),
        Case("whole tiles", M=1, N=96, H=8, Hk=2, D=32, bias="1h1k"),
        Case("keys alone", M=16, N=80, H=1, bias="1h1k", dropout=0.1, dlse=True),
    ],
    ids=str,
)
def test_addresses(case: Case, device: torch.device) -> None:
    for splits in (1, 3, 7):
        config = FewConfig(16, 16, 4, 1, splits=splits)
        inputs = build(case, device)
        with every_address() as count:
            _, ran = results_of(case, inputs, config, config)
        assert {"few_forward", "few_backward"} <= set(ran) and count[0] > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter")
@pytest.mark.parametrize(
    "name", ["pages of 3, packed, new keys", "pages, everything", "entries, new keys", "packed, bias, sink, ALiBi", "splits"]
)
def test_addresses_in_a_cache(name: str) -> None:
    call = kvcases.build(next(case for case in kvcases.CASES if case.name == name))
    with every_address() as count:
        call.run("triton")
    assert count[0] > 1000


@pytest.mark.parametrize(("parts", "at_a_time"), [(1, 2), (2, 2), (5, 8), (33, 32), (70, 32)])
@pytest.mark.parametrize("with_rest", [False, True])
def test_combine_is_one_formula(parts: int, at_a_time: int, with_rest: bool, device: torch.device) -> None:
    """The kernel that adds parts gives what ``triflash.combine`` does in float64; with what lse lost it tells huge parts apart."""
    B, M, H, D = 2, 3, 4, 24
    outs = torch.randn(parts, B, M, H, D, device=device)
    lses = torch.randn(parts, B, H, M, device=device) * 4
    lses[torch.rand(lses.shape, device=device) < 0.3] = -math.inf
    lses[:, 0, 0, 0] = -math.inf
    lses[:, 1, 1] = lses[:, 1, 1] + 1e9
    rests = torch.randn(lses.shape, device=device) if with_rest else None
    out, lse, rest = torch.empty(B, M, H, D, device=device), torch.empty(B, H, M, device=device), torch.empty(B, H, M, device=device)
    poisoned = outs.masked_fill((lses == -math.inf).transpose(-1, -2)[..., None], math.nan)  # which nobody reads
    strides = (out.stride()[:3], lse.stride()[:2], rest.stride()[:2])
    args = (poisoned, lses, rests, out, lse, rest, None, None, *strides, H, M, parts, 0)
    combine_kernels.combine[(B * M * H,)](*args, DV=D, BDV=32, PARTS=at_a_time, PDL=False, num_warps=4)
    wanted, wanted_lse = combine(outs.double(), lses.double(), None if rests is None else rests.double())
    assert (out - wanted).norm() <= 1e-5 * wanted.norm()
    seen = wanted_lse != -math.inf
    assert torch.equal(seen, lse != -math.inf) and not out.isnan().any()
    again = lse.double() * math.log2(math.e) + rest.double()  # lse in base 2, and what it lost
    assert ((again - wanted_lse * math.log2(math.e))[seen].abs() <= 1e-6 * (1.0 + wanted_lse[seen].abs())).all()
    merged, total = triflash.merge_states(list(outs), list(lses), None if rests is None else list(rests))
    assert (merged - wanted).norm() <= 1e-5 * wanted.norm() and torch.equal(total == -math.inf, ~seen)


def test_merging_with_rests(device: torch.device) -> None:
    """Parts whose scores are all near 10⁹ merge as their whole, by rests; gradients too, in float64."""
    q, k, v = (torch.randn(1, rows, 1, 8, dtype=torch.float64, device=device, requires_grad=True) for rows in (2, 20, 20))
    parts = [attention(q, k[:, own], v[:, own], return_lse=True, backend="tiled") for own in (slice(0, 7), slice(7, 20))]
    outs, lses = zip(*parts, strict=True)
    whole = attention(q, k, v, backend="tiled")
    merged, _ = triflash.merge_states(outs, lses, [torch.zeros_like(x) for x in lses])
    torch.testing.assert_close(merged, whole)
    for got, want in zip(torch.autograd.grad(merged.sum(), (q, k, v)), torch.autograd.grad(whole.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(got, want)
    values = [torch.full((1, 2, 1, 4), x, device=device) for x in (0.0, 1.0)]
    huge = torch.full((1, 1, 2), 1e9, device=device)
    merged, _ = triflash.merge_states(values, [huge, huge], [torch.zeros_like(huge), torch.full_like(huge, 1.0)])
    torch.testing.assert_close(merged, torch.full_like(merged, 2 / 3))
    with pytest.raises(ValueError, match=r"rests\[1\]: wanted shape"):
        triflash.merge_states(values, [huge, huge], [huge, huge[..., :1]])


def spec(M: int, N: int, B: int = 1, H: int = 8, groups: int = 1, D: int = 128, **more: Any) -> AttentionSpec:
    return AttentionSpec("bf16", B, 1, M, N, H, D, D, more.pop("bias", None), None, more.pop("hi", None), 0.1, "ieee", groups, **more)


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "gfx942"])
def test_who_takes_them(arch: str) -> None:
    device = KNOWN_DEVICES[arch]

    def names(problem: AttentionSpec, backend: str = "auto") -> list[str]:
        plan = plan_forward(problem, device, backend)
        assert plan.backend == "triton"
        return [step.kernel for step in plan.steps]

    for M in (1, 16, 64):
        assert names(spec(M, 8192)) == names(spec(M, 8192), "triton") == ["few_forward", "combine"]
    assert names(spec(1, 8192, B=8, H=32, groups=4))[0] == "few_forward"
    bias = BiasSpec("bf16", (True, True, True, True, True))
    assert names(spec(1, 8192, bias=bias, sink=True, alibi=True, dropout=0.1, softcap=2.0, key_lengths=True, mask=bias))[0] == "few_forward"
    assert names(spec(1, 100)) == ["forward"]  # a launch costs more
    assert names(spec(256, 8192, B=64), "triton") == ["forward"]  # tiles enough
    assert names(spec(128, 8192, B=64)) == ["forward"]
    assert names(spec(64, 8192, B=64))[0] == ("few_forward" if arch == "sm90" else "forward")  # where that was measured
    assert plan_forward(replace(spec(1, 8192), dtype="fp16"), KNOWN_DEVICES["interpreter"], "triton").step("forward") is not None
    assert plan_forward(spec(1, 8192), device, "tiled").step("forward") is not None
    if arch == "sm90":
        assert [step.kernel for step in plan_forward(spec(1, 8192), device, "hopper").steps] == ["forward"]  # a named backend has its own


def test_splits_fill_the_chip() -> None:
    device = KNOWN_DEVICES["sm90"]
    for M, N, B, H in ((1, 8192, 1, 8), (1, 65536, 1, 1), (64, 8192, 8, 4), (128, 4096, 1, 2)):
        step = plan_forward(spec(M, N, B, H), device).steps[0]
        assert step.kernel == "few_forward" and 1 < step.splits <= N // few.LEAST_KEYS
        assert step.programs == step.splits * B * H * max(1, M // 64) and step.programs >= 0.4 * min(
            device.sms, B * H * N // few.LEAST_KEYS
        )


def test_backward_parts_run_at_once() -> None:
    """Two programs an SM: of 320, as before, 56 ran after the others, for 1.4 times as long (an H200, 2 x 64 queries)."""
    device = KNOWN_DEVICES["sm90"]
    for M, N, B in ((64, 8192, 2), (64, 8192, 8), (64, 8192, 4), (48, 4096, 4), (32, 8192, 2), (1, 8192, 8), (16, 4096, 8)):
        step = plan_backward(spec(M, N, B, 16), Needs(True, True, True, False), device).step("few_backward")
        assert step is not None and 0.9 * 2 * device.sms <= step.programs <= 2 * device.sms, (M, N, B, step)


@pytest.mark.parametrize("arch", [arch for arch in KNOWN_DEVICES if arch not in ("cpu", "interpreter")])
def test_tiles_fit_the_device(arch: str) -> None:
    device = KNOWN_DEVICES[arch]
    for rows in (1, 4, 17, 64, 512):
        for D, itemsize in ((64, 2), (128, 1), (128, 2), (128, 4), (256, 2), (256, 4)):
            for bias in (False, True):
                shape = few.Shape(rows, 8, 8192, D, D, itemsize, bias, False)
                assert few.shared_memory(shape, few.choose(shape, device)) <= device.shared_memory


def test_pages_have_as_many_blocks_in_flight() -> None:
    """Stages are shared with the table."""
    shape = few.Shape(4, 128, 8192, 128, 128, 2, False, False, True)
    device, paged = KNOWN_DEVICES["sm90"], replace(shape, cached=True, paged=True)
    own, of_pages = few.choose(shape, device), few.choose(paged, device)
    assert of_pages == replace(own, num_stages=2 * own.num_stages - 1) and own.num_stages > 1
    assert few.splits_of(shape, own, device.sms) == few.splits_of(paged, of_pages, device.sms)


def test_rows_of_bfloat16_as_float16(device: torch.device) -> None:
    """Of any size: what 16 bits keep of them is within 2^-39 of the row's largest number, or next to nothing; infinities and NaN stay."""
    x = torch.randn(16, 32, device=device).to(torch.bfloat16)
    x[1], x[2], x[3] = x[1] * 2.0**120, x[2] * 2.0**-115, 0.0
    x[4, 1:] *= 1e-6
    x[5, 0], x[6, 0], x[7, 0] = torch.inf, -torch.inf, torch.nan
    half, down = torch.empty_like(x, dtype=torch.float16), torch.empty(16, 1, device=device)
    _half_rows[(1,)](x, half, down, 16, 32)
    whole = [row for row in range(16) if row not in (5, 6, 7)]
    found = (half.double() * down.double())[whole]
    exact = x.double()[whole]
    assert ((found - exact).abs() <= 2.0**-39 * exact.abs().amax(1, keepdim=True) + 2.0**-150).all() and torch.isfinite(down).all()
    assert (half.double().abs() < 2.0**15)[whole].all()
    assert half[5, 0] == torch.inf and half[6, 0] == -torch.inf and half[7, 0].isnan()


def test_explained() -> None:
    q = torch.empty(1, 1, 32, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 8192, 8, 128, dtype=torch.bfloat16, device="meta")
    told = triflash.explain(q, k, k, device="h200")
    text = str(told)
    steps = told.forward.steps
    assert [each.step.kernel for each in steps] == ["few_forward", "combine"]
    for words in (f"{steps[0].step.splits} parts of some", "8 tiles of 4 rows", "132 SMs", "partial outputs"):
        assert words in text, text


def test_configurations_are_checked() -> None:
    with pytest.raises(ValueError, match="splits: "):
        FewConfig(16, 16, 4, 1, splits=-1)
    for name, config in (("few_forward", TileConfig(16, 16, 4, 1)), ("forward", SPLIT)):
        with pytest.raises(TypeError, match=name), override_configs(**{name: config}):
            pass
    with pytest.raises(ValueError, match="few_backward: "), override_configs(few_backward=SPLIT):
        plan_backward(spec(32, 1000), Needs(True, True, True, False), KNOWN_DEVICES["sm90"], "triton")
    for stages, arch, refused in ((1, "sm90", True), (2, "sm90", False), (1, "sm80", False)):
        with override_configs(few_backward=FewConfig(16, 64, 4, stages)):
            told = pytest.raises(ValueError, match="beyond shared memory") if refused else contextlib.nullcontext()
            with told:
                plan_backward(spec(1, 8192), Needs(True, True, True, False), KNOWN_DEVICES[arch], "triton")


# The interpreter rounds to 8 bits in a way of its own, so that there no such keys are appended.
KV = [replace(case, new=None, new_packed=None) if case.fp8 and not torch.cuda.is_available() else case for case in kvcases.CASES]
KV = [case for case in KV if case.dtype in (torch.float16, torch.float32)]


@pytest.mark.parametrize("case", KV, ids=str)
def test_cache(case: kvcases.Case, device: torch.device) -> None:
    """Every call on a KV cache that there is a case for; what is hidden there is NaN."""
    call = kvcases.build(case)
    with triflash.record_launches() as ran:
        out, lse = call.run("triton", str(device))
    kvcases.assert_right(call, out, lse)
    assert next(name for name in kernels(ran) if name != "append") == "few_forward"


def test_bits_do_not_depend_on_the_batch(device: torch.device) -> None:
    """With split_size a request has the same bits alone, beside others and in pages of a longer table."""
    q, k, v = torch.randn(3, 2, 4, 16, device=device), *(torch.randn(3, 96, 2, 16, device=device) for _ in "kv")
    lengths = torch.tensor([40, 96, 7], device=device)
    batched = attention_with_kvcache(q, k, v, cache_lengths=lengths, split_size=32, causal=True, return_lse=True, backend="triton")
    for b in range(3):
        one = slice(b, b + 1)
        for capacity in (96, 48 if b != 1 else 96):
            alone = attention_with_kvcache(
                q[one], k[one, :capacity], v[one, :capacity], cache_lengths=lengths[one], split_size=32, causal=True, return_lse=True,
                backend="triton",
            )  # fmt: skip
            for x, y in zip(batched, alone, strict=True):
                assert torch.equal(x[one], y)
    one = attention_with_kvcache(q, k, v, cache_lengths=lengths, num_splits=1, causal=True, backend="triton")
    assert (batched[0] - one).norm() <= 1e-5 * one.norm()


def test_packed_queries_longer_than_said(device: torch.device) -> None:
    """max_seqlen_q is a hint; rows that no request owns are 0 and −inf."""
    q, k, v = torch.randn(14, 4, 16, device=device), *(torch.randn(3, 40, 2, 16, device=device) for _ in "kv")
    given = {"cu_seqlens_q": torch.tensor([1, 2, 12, 12], device=device), "cache_lengths": torch.tensor([3, 40, 9], device=device)}
    results = [
        attention_with_kvcache(q, k, v, **given, max_seqlen_q=most, causal=True, return_lse=True, backend=backend)
        for backend, most in (("oracle", 10), ("triton", 10), ("triton", 1))
    ]
    for out, lse in results[1:]:
        assert (out - results[0][0]).norm() <= 1e-5 * results[0][0].norm()
        assert not out[:1].any() and not out[12:].any() and (lse[:, 12:] == -math.inf).all() and (lse[:, :1] == -math.inf).all()


HOSTILE: dict[str, dict[str, Tensor]] = {
    "pages": {"page_table": torch.tensor([[-1, 10**6, 2**31 - 1], [-(2**31), 3, 9]], dtype=torch.int32)},
    "no pages": {"page_table": torch.zeros(2, 0, dtype=torch.int32)},
    "entries": {"cache_index": torch.tensor([-7, 10**12])},
    "lengths": {"cache_lengths": torch.tensor([-(2**62), 2**62]), "cache_index": torch.tensor([0, 2])},
    "unsigned lengths": {"cache_lengths": torch.tensor([2**63, 2**64 - 1], dtype=torch.uint64), "cache_index": torch.tensor([0, 2])},
    "starts": {"key_starts": torch.tensor([-(2**62), 2**62]), "cache_index": torch.tensor([0, 2])},
    "queries": {"cu_seqlens_q": torch.tensor([5, -3, 10**6], dtype=torch.int32), "cache_index": torch.tensor([0, 2])},
    "queries that fall": {"cu_seqlens_q": torch.tensor([0, 4, 1], dtype=torch.int32), "cache_index": torch.tensor([0, 2])},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_numbers_read_nothing_beside(name: str, device: torch.device) -> None:
    """Caches lie between guards of NaN: whoever reads one shows it."""
    hostile = {key: x.to(device) for key, x in HOSTILE[name].items()}
    wholes = [torch.full((6, 8, 2, 16), math.nan, device=device) for _ in "kv"]
    caches = [whole[1:5] for whole in wholes]
    for cache in caches:
        cache.copy_(torch.randn(cache.shape))
    q = torch.randn((6, 4, 16) if "cu_seqlens_q" in hostile else (2, 3, 4, 16), device=device)
    given = {"cache_lengths": torch.tensor([5, 6], device=device), **hostile}
    out, lse = attention_with_kvcache(q, *caches, return_lse=True, backend="triton", causal=True, **given)
    if name not in ("queries", "queries that fall"):  # those are undefined
        wanted, wanted_lse = attention_with_kvcache(q, *caches, return_lse=True, backend="oracle", causal=True, **given)
        assert (out - wanted).norm() <= 1e-5 * (1.0 + wanted.norm()) and torch.equal(lse.isinf(), wanted_lse.isinf())
        assert out.isfinite().all() and not lse.isnan().any()


def test_head_dims_that_it_cannot_do(device: torch.device) -> None:
    q = torch.randn(1, 1, 2, 300, device=device)
    cache = torch.randn(1, 8, 2, 300, device=device)
    with pytest.raises(UnsupportedError, match="head dim 300"):
        attention_with_kvcache(q, cache, cache, backend="triton")


def test_strides_of_queries_and_out(device: torch.device) -> None:
    """Of q and out any strides; out's neighbours stay."""
    q = torch.randn(2, 2, 4, 32, device=device)[..., ::2]
    k, v = (torch.randn(2, 40, 2, 16, device=device) for _ in "kv")
    whole = torch.full((2, 2, 4, 16, 2), 7.0, device=device)
    out = attention_with_kvcache(q, k, v, out=whole[..., 0], backend="triton")
    assert torch.equal(out, attention_with_kvcache(q.contiguous(), k, v, backend="triton")) and bool((whole[..., 1] == 7).all())


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize(
    "case",
    [
        Case("plain", B=2, M=3, N=100),
        Case("window, grouped", B=2, M=5, N=100, H=4, Hk=2, lo=20, hi=60),
        Case("bias of full shape, lengths", B=2, M=3, N=100, bias="bhqk", hi=70, lengths=(100, 40), bias_dtype=F32),
        Case("bias of full shape alone", B=1, M=20, N=100, bias="1hqk", grads="b", lo=30),
        Case("mask, dropout, soft cap", B=2, M=3, N=100, bias="b1qk", bias_dtype=BOOL, dropout=0.2, softcap=2.0, dout_layout="step"),
        Case("strides", B=2, M=3, N=64, layout="mixed", grads="q", bias="b1hqk", sink=True),
    ],
    ids=str,
)
def test_dq_by_split_keys(case: Case, splits: int, device: torch.device) -> None:
    """The portable kernel for dq where it has few tiles of queries: parts of the keys, added up in their order."""
    inputs = build(case, device)
    found = []
    for _ in range(2):
        wanted = inputs.wanted()
        with small_tiles(case.tiles), override_configs(dq=FewConfig(16, 16, 4, 1, splits=splits)), triflash.record_launches() as ran:
            out, _lse = attend(case, inputs, "triton", raw=True)
            found.append(named_gradients(wanted, torch.autograd.grad(out, list(wanted.values()), inputs.dout)))
        assert "dq" in kernels(ran) and ("sum_rows" in kernels(ran)) is ("q" in case.grads)
    assert_right(case, inputs, *found)
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


def test_who_splits_dq() -> None:
    device, needs = KNOWN_DEVICES["sm90"], Needs(True, True, True, False)
    few_tiles = plan_backward(spec(100, 8192, B=8), needs, device)
    assert few_tiles.backend == "hopper"  # whose kernel that owns keys sums dq up
    few_tiles = plan_backward(replace(spec(100, 8192, B=8), deterministic=True), needs, device)
    step = few_tiles.step("dq")
    assert few_tiles.backend == "triton" and step is not None and step.splits > 1 and step.programs >= device.sms
    assert [each.kernel for each in few_tiles.steps] == ["delta", "dkdv", "dq", "sum_rows"]
    for problem in (spec(100, 8192, B=64), spec(64, 300)):
        step = plan_backward(replace(problem, deterministic=True), needs, device).step("dq")
        assert step is not None and step.splits == 1
