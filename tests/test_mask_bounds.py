"""Masks that hide whole blocks, on Hopper's kernels: what lies outside of all that a mask shows to a tile is not visited. Results on the GPU, or
on the CPU's stand-in for it (``gluon_twin.py``), which also counts what is visited."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import gluon_twin
import triflash
from addresses import every_address
from cases import Case, build
from expected import spec_of_case
from here import HAVE_TRITON, ON_HOPPER, stand_in_only, triton_only
from mutations import mutate, noticed
from running import results_of, run_case
from triflash.launch.calls import start
from triflash.launch.hopper import ready_operands
from triflash.launch.mask_bounds import bounds_call, new_bounds
from triflash.launch.room import Real
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.kernels import mask_bounds
from triflash.plan.kernels.dkdv import DkdvConfig
from triflash.plan.kernels.dq import DqConfig
from triflash.plan.kernels.forward import ForwardConfig
from triflash.plan.kernels.mask_bounds import CONFIG, MaskBoundsConfig
from triflash.plan.override import Config, override_configs
from triflash.plan.select import plan_backward, plan_forward
from triflash.plan.steps import Plan
from triflash.spec import Needs

GPU = torch.cuda.is_available()
somewhere = pytest.mark.skipif(
    not (ON_HOPPER if GPU else HAVE_TRITON), reason="neither such a GPU nor the interpreter that stands in for it"
)
CPU, SM90 = torch.device("cpu"), KNOWN_DEVICES["sm90"]
BF16, F32, BOOL = torch.bfloat16, torch.float32, torch.bool
SHOWN = ["left", "right", "documents", "holes", "rows", "one", "nothing", "everything", "but one", "but a key"]
SHORT_STEPS = MaskBoundsConfig(64, 64, 4, 1)  # so that a search has several
BOTH_ENDS = replace(CONFIG, whole=False)  # every block that is visited loads its tile of the mask


def problem(name: str, **options: Any) -> Case:
    usual: dict[str, Any] = dict(B=2, M=200, N=300, H=1, bias="b1qk", bias_dtype=BOOL, grads="qkv", tiles=None)
    return Case(name, **usual | options)


def check(case: Case, device: torch.device, seed: int = 0, **configs: Config | None) -> list[str]:
    given = {"mask_bounds": SHORT_STEPS, **{name: config for name, config in configs.items() if config is not None}}
    how: dict[str, Any] = {} if GPU else {"sms": 2, "seed": seed}
    return run_case(replace(case, seed=seed), "hopper" if GPU else "stand-in", device, given, carefully=False, **how)


# ---- the tables


def between(mask: Tensor) -> Tensor:
    """By definition: of a mask (entries, rows or 1, walked or 1) the first that each 64 rows see, and one more than the last."""
    tiles = [mask[:, at : at + 64].any(1) for at in range(0, mask.shape[1], 64)]
    found = []
    for tile in tiles:
        for entry in tile:
            seen = entry.nonzero()
            everything = mask.shape[2] == 1 and len(seen) == 1
            found.append((0, 2**30) if everything else (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (2**30, 0))
    return torch.tensor(found, dtype=torch.int32).view(len(tiles), mask.shape[0], 2).transpose(0, 1)


def all_shown(mask: Tensor) -> Tensor:
    """Likewise where the longest of the stretches of whole 64 begins, the first of them, that each 64 rows see altogether, and where it ends."""
    tiles = [mask[:, at : at + 64].all(1) for at in range(0, mask.shape[1], 64)]
    found = []
    for tile in tiles:
        for entry in tile:
            units = [bool(entry[at : at + 64].all()) for at in range(0, len(entry), 64)]
            stretches = [(b - a, -a) for a in range(len(units)) for b in range(a, len(units) + 1) if all(units[a:b])]
            length, start = max(stretches)
            found.append((-start * 64, (length - start) * 64) if length else (0, 0))
    return torch.tensor(found, dtype=torch.int32).view(len(tiles), mask.shape[0], 2).transpose(0, 1)


TABLES = [
    problem("two levels, heads, grouped", B=6, batch_inner=3, H=4, Hk=2, bias="b1hqk"),
    problem("of all", B=4, batch_inner=2, H=6, Hk=3, M=130, N=65, bias="bihqk"),
    problem("of the inner level", B=4, batch_inner=2, M=64, N=128, bias="1i1qk"),
    problem("of keys", bias="b11k", M=70, N=1000),
    problem("of keys of a head", bias="1h1k", H=4, Hk=1, N=129),
    problem("of queries", bias="b1q1", grads=""),
    problem("one of each", B=1, H=1, M=1, N=1, bias="bhqk"),
    problem("whole blocks", M=128, N=192),
    problem("rows that are copied", M=100, N=333, bias_layout="sliced"),
    problem("expanded", B=3, M=70, N=130, bias="bhqk", bias_layout="expanded"),
    problem("beside a bias", bias="1hqk", bias_dtype=F32, mask="b1qk"),
]


@somewhere
@pytest.mark.parametrize("config", [CONFIG, SHORT_STEPS, replace(SHORT_STEPS, whole=False)], ids=str)
@pytest.mark.parametrize("case", TABLES, ids=str)
def test_the_tables(case: Case, config: MaskBoundsConfig, device: torch.device) -> None:
    for shown in SHOWN[TABLES.index(case) % 3 :: 3]:
        inputs = build(replace(case, shown=shown), device)
        spec = spec_of_case(case, inputs)
        x = ready_operands(Real(inputs.q), spec, inputs.operands())
        names = ("queries", "keys") if case.grads else ("queries",)
        for gives in {names, names[-1:]}:
            (step,) = mask_bounds.steps(spec, {"mask_bounds": config}, gives)
            bounds = new_bounds(Real(x.q), Plan("hopper", (step,)), spec)
            for table in bounds.values():
                table.numbers.fill_(-7)
            with nullcontext() if GPU else every_address():
                start(device, [bounds_call(step, spec, x, bounds)])
            given = inputs.operands()
            mask = given.mask if given.mask is not None else given.bias
            assert mask is not None
            for name, table in bounds.items():
                five, four = mask.detach().cpu(), table.numbers.cpu()
                shown_to_any = shown_to_all = five
                if name == "keys":
                    of_group = five.unflatten(2, (-1, case.H // case.key_heads)) if five.shape[2] > 1 else five[:, :, :, None]
                    shown_to_any, shown_to_all = of_group.any(3).transpose(3, 4), of_group.all(3).transpose(3, 4)
                first, last = four.view(-1, four.shape[3], 4).split(2, -1)
                assert torch.equal(first, between(shown_to_any.flatten(0, 2))), (shown, name)
                varies = mask_bounds.mask_of(spec).varies  # type: ignore[union-attr]
                assert table.whole == (config.whole and mask is given.bias and varies[4] and (name == "queries" or varies[3]))
                assert torch.equal(last, all_shown(shown_to_all.flatten(0, 2)) if table.whole else torch.full_like(last, -7)), (shown, name)


# ---- results


FEATURES = [
    problem("full"),
    problem("causal", M=300, bias="11qk", causal=True, dtype=BF16),
    problem("window, grouped, sink", B=1, H=4, Hk=2, bias="bhqk", lo=-60, hi=90, sink=True, grads="qkvs"),
    problem("lengths", B=3, lengths=(0, 130, 999), bias="b1qk", sink=True, dlse=True),
    problem("keys alone", bias="b11k"),
    problem("keys alone, of heads, causal", B=1, H=4, Hk=2, bias="1h1k", causal=True, N=200),
    problem("beside a bias of tiles", bias="1hqk", bias_dtype=F32, mask="b1qk", grads="qkv"),
    problem("beside a bias of keys", bias="1h1k", bias_dtype=F32, mask="b1qk", grads="qkvb"),
    problem("keys beside a bias of full shape", bias="bhqk", bias_dtype=None, mask="b11k", grads="qkvb"),
    problem("soft cap, ALiBi", softcap=2.0, alibi="h", hi=60),
    problem("dropout", dropout=0.2, dlse=True),
    problem("two levels", B=4, batch_inner=2, M=130, bias="1i1qk"),
]
# Each feature beside every second pattern, others for each.
SHOWN_FEATURES = [(case, shown) for n, case in enumerate(FEATURES) for m, shown in enumerate(SHOWN) if (n + m) % 2 == 0]


def named(pairs: list[tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(*x, id="-".join(map(str, x)).replace(" ", "-")) for x in pairs]


@somewhere
@pytest.mark.parametrize(("case", "shown"), named(SHOWN_FEATURES))
def test_results(case: Case, shown: str, device: torch.device) -> None:
    """By the plan's own tiles, dq by itself; in turns with dq added up in each of the ways, and with wide heads."""
    case, number = replace(case, shown=shown), FEATURES.index(case) + SHOWN.index(shown) // 2
    assert check(case, device, number)[0] == "mask_bounds"
    if number % 2:
        ways = [DkdvConfig(2, 2, dq_warpgroup=True), DkdvConfig(2, 2, red_dq=True), DkdvConfig(2, 1), DkdvConfig(2, 2, unroll=2)]
        check(case, device, number, dqdkdv=ways[number // 2 % 4])
    else:
        check(replace(case, D=136), device, number)


FORWARD_CONFIGS = [
    ForwardConfig(1, 64, 2),
    ForwardConfig(3, 32, 2, ping_pong=True),
    ForwardConfig(2, 128, 2, separate_o=False),
    ForwardConfig(3, 16, 2, q_stages=2),
    ForwardConfig(1, 256, 1),
]


@somewhere
@pytest.mark.parametrize(
    ("config", "shown"), named([(c, s) for n, c in enumerate(FORWARD_CONFIGS) for m, s in enumerate(SHOWN) if (n + m) % 2])
)
def test_forward(config: ForwardConfig, shown: str, device: torch.device) -> None:
    n = FORWARD_CONFIGS.index(config)
    check(
        problem("forward", grads="", shown=shown, H=3, hi=(None, 0, 130)[n % 3], lo=(None, -90)[n % 2], lengths=(290, 65)),
        device,
        n,
        forward=config,
    )
    check(problem("of queries", bias="b1q1", grads="", shown=shown, sink=True), device, n, forward=config)


@somewhere
@pytest.mark.parametrize("shown", SHOWN[:6])
def test_dq_by_itself(shown: str, device: torch.device) -> None:
    for n, config in enumerate(
        (DqConfig(2, 64, 2, 2, 2, deferred=False), DqConfig(1, 32, 2, 2, separate_dq=False), DqConfig(2, 128, 3, 2))
    ):
        check(problem("dq", grads="q", shown=shown, hi=(None, 0)[n % 2], lengths=(300, 70)), device, n, dq=config)


@stand_in_only
def test_what_is_not_visited_added_nothing() -> None:
    """Where all is seen no bit is another. Else sums are of the same numbers, in another order of dk and dv's, and with another reference of the
    softmax where a first block was hidden.
    """
    for n, shown in enumerate(SHOWN):
        case = problem("bits", M=192, grads="qkv", shown=shown, seed=n, dtype=(torch.float16, BF16)[n % 2])
        (plain,), (bounded,) = (
            results_of(case, build(case, CPU), "stand-in", {"dq": DqConfig(2, 64, 2, 2), **more}, sms=2)[0]
            for more in ({}, {"mask_bounds": SHORT_STEPS})
        )  # type: ignore[dict-item]
        for name, x in plain.items():
            if shown == "everything":
                assert torch.equal(x, bounded[name]), name
            else:
                torch.testing.assert_close(bounded[name], x, rtol=2**-8, atol=2**-10)


# ---- what is visited


def visited(monkeypatch: pytest.MonkeyPatch, case: Case, **configs: Config) -> Counter[str]:
    """How many tiles of the mask each kernel loads, one for each 64 rows and block that it visits."""
    count: Counter[str] = Counter()
    running, real_run, real_load = [""], gluon_twin.run, gluon_twin.tma_load

    def run(call: Any, seed: int = 0) -> None:
        running[0] = call.kernel.fn.__name__
        real_run(call, seed)

    def load(descriptor: Any, at: Any, barrier: Any, target: Any) -> None:
        count[running[0]] += descriptor.dtype == torch.uint8
        real_load(descriptor, at, barrier, target)

    with monkeypatch.context() as patched:
        patched.setattr(gluon_twin, "run", run)
        patched.setattr(gluon_twin, "tma_load", load)
        run_case(case, "stand-in", CPU, dict(configs), carefully=False, sms=2)
    return count


@stand_in_only
def test_hidden_blocks_are_not_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 512 queries and keys in tiles of 128 rows, on blocks of 64: four documents of 128 show each tile 2 blocks of 8."""
    heads, entries, tiles = 2, 2, 4
    forward, keys, rows = ForwardConfig(2, 64, 2), DkdvConfig(2, 2), DqConfig(2, 64, 2, 2)
    case = problem("documents", M=512, N=512, H=heads)
    mask = (torch.arange(512)[:, None] // 128 == torch.arange(512)[None, :] // 128).expand(entries, 1, 512, 512)
    monkeypatch.setattr("cases.shown_by", lambda shape, how, _: mask.clone())
    case = replace(case, shown="documents")
    all_of_them = entries * heads * tiles * 2 * 8  # two consumers' tiles of each block
    before = visited(monkeypatch, case, forward=forward, dqdkdv=keys)
    assert before == {"forward": all_of_them, "dkdv": all_of_them}
    after = visited(monkeypatch, case, forward=forward, dqdkdv=keys, mask_bounds=BOTH_ENDS)
    assert after == {"forward": all_of_them // 4, "dkdv": all_of_them // 4}
    alone = visited(monkeypatch, replace(case, grads="q"), forward=forward, dq=rows, mask_bounds=BOTH_ENDS)
    assert alone == {"forward": all_of_them // 4, "dq": all_of_them // 4}
    wide = visited(monkeypatch, replace(case, D=136), forward=forward, mask_bounds=BOTH_ENDS)
    assert wide["dkdv_d256"] == entries * heads * 8 * 2  # tiles of 64 keys
    mask = torch.zeros_like(mask)  # a block for each tile of queries, for form's sake
    nothing = visited(monkeypatch, case, forward=forward, dqdkdv=keys, mask_bounds=BOTH_ENDS)
    assert nothing == {"forward": all_of_them // 8, "dkdv": 0}


@stand_in_only
@pytest.mark.parametrize("shown", ["left", "right", "documents", "holes", "rows"])
def test_no_more_than_between_the_outermost(shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem("some", shown=shown, H=1, M=260, N=300, seed=3)
    mask = build(case, CPU).operands().bias
    assert mask is not None
    sums = []
    for own, side in ((mask, 32), (mask.transpose(3, 4), 64)):
        table = between(own.reshape(-1, *own.shape[3:])).long()
        first, end = (table[..., n].view(2, -1) for n in (0, 1))
        at = [range(n, min(n + 2, first.shape[1])) for n in range(0, first.shape[1], 2)]  # two of these are a tile of 128
        blocks = [
            -(-max(int(end[b, n]) for n in tile) // side) - min(2**20, *(int(first[b, n]) for n in tile)) // side
            for b in range(2) for tile in at
        ]  # fmt: skip
        sums.append(sum(2 * max(n, side == 32) for n in blocks))
    found = visited(monkeypatch, case, forward=ForwardConfig(2, 32, 2), dqdkdv=DkdvConfig(2, 2), mask_bounds=BOTH_ENDS)
    assert [found["forward"], found["dkdv"]] == sums


def loads_of_queries(case: Case, mask: Tensor, keys: int) -> int:
    """Tiles of a mask that kernels load for 128 queries and blocks of so many keys, one for each 64 queries."""
    (first, end), (whole, stop) = (table.long().unbind(-1) for table in (between(mask), all_shown(mask)))
    loads, hi = 0, case.band[1]
    for b, m0 in itertools.product(range(case.B), range(0, case.M, 128)):
        tiles = [*range(m0 // 64, min(m0 // 64 + 2, first.shape[1]))]
        last = case.N if hi is None else min(m0 + 128, case.M) + hi
        begin, over = int(first[b, tiles].min()) // keys, min(-(-last // keys), -(-int(end[b, tiles].max()) // keys))
        uncut = over - 1 if hi is None else min(over - 1, (m0 + hi + 1) // keys)  # a tile's last block is visited with the mask
        bare = min(uncut, int(stop[b, tiles].min()) // keys) - max(begin, -(-int(whole[b, tiles].max()) // keys))
        loads += 2 * (max(over - begin, 1) - max(bare, 0))
    return loads


def loads_of_keys(case: Case, mask: Tensor) -> int:
    """Likewise for 128 keys and blocks of 64 queries, without a band."""
    (first, end), (whole, stop) = (table.long().unbind(-1) for table in (between(mask), all_shown(mask)))
    loads = 0
    for b, n0 in itertools.product(range(case.B), range(0, case.N, 128)):
        tiles = [*range(n0 // 64, min(n0 // 64 + 2, first.shape[1]))]
        begin, over = int(first[b, tiles].min()) // 64, -(-int(end[b, tiles].max()) // 64)
        bare = min(over, int(stop[b, tiles].min()) // 64) - max(begin, int(whole[b, tiles].max()) // 64) if n0 + 128 <= case.N else 0
        loads += 2 * (max(over - begin, 0) - max(bare, 0))
    return loads


@stand_in_only
@pytest.mark.parametrize("shown", SHOWN)
def test_no_tiles_are_loaded_of_a_mask_that_hides_nothing_there(shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, rows = ForwardConfig(2, 32, 2), DqConfig(2, 64, 2, 2)
    banded = problem("banded", shown=shown, M=260, N=700, seed=4, grads="", hi=200)
    plain = problem("plain", shown=shown, M=400, N=260, seed=5)
    for case, wanted in (
        (banded, lambda mask: {"forward": loads_of_queries(banded, mask, 32)}),
        (plain, lambda mask: {"forward": loads_of_queries(plain, mask, 32), "dkdv": loads_of_keys(plain, mask.transpose(1, 2))}),
        (
            replace(plain, grads="q"),
            lambda mask: {name: loads_of_queries(plain, mask, keys) for name, keys in (("forward", 32), ("dq", 64))},
        ),
    ):
        mask = build(case, CPU).operands().bias
        assert mask is not None
        given = {"dq": rows} if case.grads == "q" else {"dqdkdv": DkdvConfig(2, 2)}
        found = visited(monkeypatch, case, forward=forward, mask_bounds=CONFIG, **given)
        assert {**found} == wanted(mask.reshape(-1, *mask.shape[3:]))


# ---- that tests would see it


@stand_in_only
@pytest.mark.parametrize("kernel, old, new", [
    ("extent", "min(first, _)", "first"),
    ("extent", "max(end, _)", "end"),
    ("extent", "head * p.bounds[3]", "0"),
    ("extent", "x.b % p.batch_inner * p.bounds[2]", "0"),
    ("extent", "x.b // p.batch_inner * p.bounds[1]", "0"),
    ("scores_qk", "max(begin, first_seen // p.C.block_n)", "begin + 1"),
    ("scores_qk", "(end_seen + p.C.block_n - 1) // p.C.block_n", "end_seen // p.C.block_n"),
    ("scores_kq", "min(max(begin, first_seen // BM), end)", "min(begin + 1, end)"),
    ("scores_kq", "(end_seen + BM - 1) // BM", "end_seen // BM"),
    ("scores_kq", "a = max(a, begin)", "pass"),
    ("extent", "max(first, _)", "first"),
    ("extent", "min(end, _)", "end"),
    ("scores_qk", "(first_whole + p.C.block_n - 1) // p.C.block_n", "first_whole // p.C.block_n"),
    ("scores_qk", "min(end_whole // p.C.block_n, last)", "min((end_whole + p.C.block_n - 1) // p.C.block_n, last)"),
    ("scores_qk", "last = min(full_end, end - 1)", "last = end - 1"),
    ("scores_qk", "first = min(full_begin, last)", "first = 0"),
    ("scores_qk", "moved >= bare.end", "moved > bare.end"),
    ("scores_qk", "block -= gl.where(block < w.bare.end, _, 0)", "pass"),
    ("scores_qk", "at = w.masks + step", "pass"),
    ("scores_qk", "at -= _", "pass"),
    ("forward", "masks += _", "masks += steps"),
    ("forward_loads", "masks += _", "masks += end - begin"),
    ("forward_loads", "in_order(p, bare, _1)", "_1"),
    ("dq", "masks += steps - _", "masks += steps"),
    ("dq", "in_order(p, bare, _1)", "_1"),
    ("scores_kq", "(first_whole + p.C.block_m - 1) // p.C.block_m", "first_whole // p.C.block_m - 1"),
    ("scores_kq", "min(end_whole // p.C.block_m, part)", "min(end_whole // p.C.block_m + 1, part)"),
    ("scores_kq", "place + (bare.begin - first)", "place"),
    ("scores_kq", "place + gl.where(place >= begin, count, 0)", "place"),
    ("scores_kq", "at -= _", "pass"),
    ("scores_kq", "masks + step - step // steps * count", "masks + step"),
    ("dkdv", "masks += _", "masks += steps * members"),
    ("dkdv", "masks - done - member * count", "masks - done"),
    ("dkdv", "before - count", "before"),
    ("scores_kq", "block = moved_over(block, _, _)", "pass"),
    ("dkdv_d256", "masks += _", "masks += steps * p.group"),
    ("dkdv_d256", "masks - done - member * count", "masks - done"),
    ("dkdv_d256", "before - count", "before"),
])  # fmt: skip
def test_each_of_these_is_needed(kernel: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, kernel, old, new)
    assert noticed(run_breakable, 24)


def run_breakable(seed: int) -> None:
    bias = ("b1qk", "bhqk", "b11k")[seed % 3]
    shown = ("documents", "right", "left", "but a key", "left", "but one")[(seed // 3 + seed) % 6]
    case = problem("broken", B=4, batch_inner=2, H=2, M=330, N=300, bias="bi" + bias[1:], shown=shown, alibi=(None, "h")[seed % 2])
    forward = ForwardConfig(2, (64, 128)[seed // 4 % 2], 2)
    case = replace(case, hi=(None, 150, 250)[seed % 5 % 3], lo=(None, -120)[seed // 5 % 2], Hk=(None, 1)[seed // 3 % 2])
    if seed % 4 == 3:
        check(replace(case, grads="q"), CPU, seed, forward=forward, dq=DqConfig(2, 64, 2, 2))
    elif seed % 4 == 2:
        check(replace(case, grads="kv", D=136), CPU, seed)
    else:
        check(case, CPU, seed, forward=forward, dqdkdv=DkdvConfig(2, 2))


@stand_in_only
def test_unbroken_ones_are_right() -> None:
    for seed in range(3):
        run_breakable(seed)


# ---- when it runs


def plans(case: Case, letters: str = "qkv", size: int = 1, fixed: bool = True, **configs: Config) -> tuple[list[str], ...]:
    """The kernel in both passes, of a problem of ``size`` times as many heads, with sums in a fixed order."""
    spec = spec_of_case(case, build(case, CPU))
    spec = replace(spec, heads=size * spec.heads, deterministic=fixed)
    needs = Needs(*(letter in letters for letter in "qkvbst"))
    with override_configs(**configs):
        both = plan_forward(spec, SM90, "hopper"), plan_backward(spec, needs, SM90, "hopper")
    return tuple([f"{step.kernel} {'+'.join(step.gives)}" for step in plan.steps if step.kernel == "mask_bounds"] for plan in both)


@triton_only
def test_when_it_runs() -> None:
    queries, keys, both = ["mask_bounds queries"], ["mask_bounds keys"], ["mask_bounds queries+keys"]
    case = problem("large", M=256, N=256, H=2)
    wide = replace(case, D=128)
    assert plans(wide) == ([], []) and plans(wide, size=256) == (queries, both)  # of 2^18 and 2^26 scores
    assert plans(case, size=256) == (queries, keys)  # dq is summed in shared memory by the kernel that owns keys
    assert plans(case, size=255) == ([], [])
    assert plans(case, mask_bounds=CONFIG) == (queries, both)
    assert plans(case, size=256, fixed=False) == (queries, keys)  # or added up in memory by it
    assert plans(case, "kv", 256) == (queries, keys) and plans(case, "q", 256) == (queries, queries)
    assert plans(replace(case, N=255), size=1024) == ([], [])
    assert plans(replace(case, bias_dtype=None), size=1024) == ([], [])
    beside = replace(wide, bias="bhqk", bias_dtype=None, mask="b11k")
    assert plans(beside, size=256) == (queries, both)
    assert plans(beside, "qkvb", 256) == (queries, keys)  # dq writes a gradient to every element of the bias
    assert plans(beside, "b", 256) == (queries, [])
    assert plans(replace(beside, bias="1hqk"), "b", 256) == (queries, [])  # the kernel for that visits all blocks


@triton_only
def test_explain_says_it() -> None:
    q, mask = torch.empty(4, 4096, 16, 64, dtype=BF16, device="meta"), torch.empty(4, 1, 1, 4096, dtype=BOOL, device="meta")
    explained = triflash.explain(q, q, q, mask=mask, grads=("q", "k", "v"), device="h200")
    for of, programs in (
        (explained.forward, 4),
        (explained.backward, 4 + 2 * 4 * 64),
    ):  # of queries, and from both ends for 64 tiles of keys
        assert of is not None and of.steps[0].step.kernel == "mask_bounds"
        assert of.steps[0].step.programs == programs
    text = str(explained)
    assert "mask_bounds 64x512 w8 s1 whole: 4 programs, gives queries" in text and "what a mask shows to queries" in text
    assert "mask_bounds" not in str(triflash.explain(q, q, q, device="h200"))


@pytest.mark.parametrize("sizes", [{"block_m": 128}, {"block_n": 48}, {"num_warps": 3}])
def test_wrong_configurations(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(sizes))):
        replace(CONFIG, **sizes)
    with pytest.raises(TypeError, match="mask_bounds"), override_configs(mask_bounds=ForwardConfig(2, 64, 2)):
        pass
