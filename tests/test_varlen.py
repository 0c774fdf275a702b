"""``attention_varlen`` against a loop over the dense reference in float64: each sequence's used rows on their own, by the text of
docs/semantics.md and not by the package's own way to split sequences.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import triflash
from triflash import attention, attention_varlen, oracle
from triflash.compat import flash_attn

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INTERPRETED = not GPU and __import__("os").environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    "tiled",
    "oracle",
    pytest.param("triton", marks=pytest.mark.skipif(not (GPU or INTERPRETED), reason="Triton runs nothing here")),
]
SIZES = (0, 1, 3, 15, 16, 17, 33, 40)


@dataclass
class Batch:
    """Packed sequences: what a caller hands over, and the rows that each sequence has and uses."""

    leaves: dict[str, Tensor]
    starts: tuple[list[int], list[int]]
    lengths: tuple[list[int], list[int]]
    used: tuple[list[int] | None, list[int] | None]
    options: dict[str, Any] = field(default_factory=dict)
    offsets: torch.dtype = torch.int32
    step: int = 1  # of offsets and used lengths in memory

    def call(self, leaves: dict[str, Tensor | None], backend: str, device: str = DEVICE) -> tuple[Tensor, Tensor]:
        def numbers(x: list[int] | None) -> Tensor | None:
            return None if x is None else torch.tensor(x, dtype=self.offsets, device=device).repeat_interleave(self.step)[:: self.step]

        options = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in self.options.items()}
        cu = [numbers([*starts, starts[-1] + lengths[-1]]) for starts, lengths in zip(self.starts, self.lengths, strict=True)]
        result = attention_varlen(
            leaves["q"], leaves["k"], leaves["v"], *cu, seqused_q=numbers(self.used[0]), seqused_k=numbers(self.used[1]),
            bias=(leaves.get("bias"), leaves.get("second")), sink=leaves.get("sink"), return_lse=True, backend=backend, **options,
        )  # fmt: skip
        assert isinstance(result, tuple)
        return result

    def reference(self, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """In float64, each sequence by itself; rows of none are 0 and -inf."""
        q, k, v = leaves["q"], leaves["k"], leaves["v"]
        outs, lses = [], []
        options = dict(self.options)
        layouts = options.pop("bias_layout", "padded"), options.pop("mask_layout", None)
        mask, slopes, causal, window = (options.pop(name, None) for name in ("mask", "alibi_slopes", "causal", "window"))
        dropout_p, seed = options.pop("dropout_p", 0.0), options.pop("dropout_seed", 0)
        for b, (first_q, first_k) in enumerate(zip(*self.starts, strict=True)):
            m, n = (own[b] if used is None else used[b] for own, used in zip(self.lengths, self.used, strict=True))
            rows, cols = slice(first_q, first_q + m), slice(first_k, first_k + n)
            diagonal = 0 if causal == "top_left" else n - m
            left, right = window or (None, None)
            right = 0 if causal else right
            out, lse = oracle.attention(
                q[None, rows], k[None, cols], v[None, cols],
                part(leaves.get("bias"), layouts[0], b, rows, cols, -math.inf),
                mask=part(mask, layouts[1] or layouts[0], b, rows, cols, False),
                second_bias=part(leaves.get("second"), layouts[0], b, rows, cols, -math.inf),
                alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[b], sink=leaves.get("sink"),
                lo=None if left is None else diagonal - left, hi=None if right is None else diagonal + right, shift=diagonal,
                dropout_p=dropout_p, dropout_seed=torch.tensor([seed, 0]) if dropout_p else None, first_entry=b, **options,
            )  # fmt: skip
            outs.append((rows, out[0]))
            lses.append((rows, lse[0]))
        whole_out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
        whole_lse = q.new_full((q.shape[1], q.shape[0]), -math.inf)
        for rows, out in outs:
            whole_out = whole_out.index_copy(0, torch.arange(rows.start, rows.stop), out)
        for rows, lse in lses:
            whole_lse = whole_lse.index_copy(1, torch.arange(rows.start, rows.stop), lse)
        return whole_out, whole_lse


def part(x: Tensor | None, layout: str, b: int, rows: slice, cols: slice, hidden: float | bool) -> Tensor | None:
    """A sequence's part of a bias or mask, ``(1, H|1, m|1, n|1)``; past a dim that is not 1 everything is hidden."""
    if x is None:
        return None
    if layout == "keys":
        return x[None, :, None, cols]
    if layout == "rows":
        x = x[None, :, rows]
    elif x.shape[0] > 1:
        x = x[b : b + 1]
    for dim, length in ((2, rows.stop - rows.start), (3, cols.stop - cols.start)):
        if x.shape[dim] != 1 and (layout == "padded" or dim == 3):
            x = x.narrow(dim, 0, min(length, x.shape[dim]))
            if x.shape[dim] < length:
                more = [length - size if at == dim else size for at, size in enumerate(x.shape)]
                x = torch.cat([x, x.new_full(more, hidden)], dim)
    return x


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> Batch:
    """A random problem: any lengths, features and layouts together."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    B, Hk, D = rng.choice([1, 2, 3, 5]), rng.choice([1, 2]), rng.choice([8, 16, 20])
    H, Dv = Hk * rng.choice([1, 1, 2]), rng.choice([D, D, 24])
    own = [rng.choice(SIZES) for _ in range(B)]
    lengths = own, own if rng.random() < 0.4 else [rng.choice(SIZES) for _ in range(B)]
    first = rng.choice([0, 0, 2])  # rows before the first sequence, and behind the last, belong to nobody
    starts = tuple([first + sum(x[:b]) for b in range(B)] for x in lengths)
    Tq, Tk = (s[-1] + x[-1] + rng.choice([0, 3]) for s, x in zip(starts, lengths, strict=True))
    used = tuple([rng.randint(0, n) for n in x] if rng.random() < 0.3 else None for x in lengths)
    longest = [max([*(x if u is None else u), 1]) for x, u in zip(lengths, used, strict=True)]

    def shape(layout: str) -> tuple[int, ...]:
        h = rng.choice([1, H])
        m, n = (rng.choice([1, size, size + 3, max(size - 2, 1)]) for size in longest)
        return {"padded": (rng.choice([1, B]), h, m, n), "rows": (h, Tq, n), "keys": (h, Tk)}[layout]

    options: dict[str, Any] = {}
    leaves = {"q": rand(Tq, H, D), "k": rand(Tk, Hk, D), "v": rand(Tk, Hk, Dv)}
    if rng.random() < 0.7:
        options["bias_layout"] = rng.choice(["padded", "padded", "rows", "keys"])
        leaves["bias"] = rand(*shape(options["bias_layout"]))
        if rng.random() < 0.3:
            leaves["second"] = rand(*shape(options["bias_layout"]))
    if rng.random() < 0.4:
        options["mask_layout"] = rng.choice(["padded", "rows", "keys"])
        options["mask"] = torch.rand(shape(options["mask_layout"]), generator=generator) < 0.8
    some = (
        (0.4, "causal", rng.choice([True, "top_left"])),
        (0.3, "window", (rng.choice([None, 0, 3, 10]), rng.choice([None, 0, 5]))),
        (0.2, "softcap", 3.0),
        (0.2, "alibi_slopes", torch.rand(rng.choice([(H,), (B, H)]), generator=generator)),
    )
    options |= {name: value for chance, name, value in some if rng.random() < chance}
    if rng.random() < 0.3:
        leaves["sink"] = rand(H)
    if rng.random() < 0.25:
        options |= {"dropout_p": 0.3, "dropout_seed": 77}
    return Batch(leaves, starts, lengths, used, options, rng.choice([torch.int32, torch.int64]))


def loss_of(out: Tensor, lse: Tensor, seed: int, with_lse: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    dlse = torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(lse)
    loss = (out * dout).sum()
    return loss + (lse.masked_fill(lse == -math.inf, 0.0) * dlse).sum() if with_lse else loss


def check(batch: Batch, backend: str, seed: int, tolerance: float) -> None:
    """Results, and some or all gradients."""
    rng = random.Random(seed)
    wanted = [name for name in batch.leaves if rng.random() < 0.75] or list(batch.leaves)
    exact = {name: x.double().requires_grad_(name in wanted) for name, x in batch.leaves.items()}
    leaves: dict[str, Tensor | None] = {name: x.to(DEVICE).requires_grad_(name in wanted) for name, x in batch.leaves.items()}
    right, got = batch.reference(exact), batch.call(leaves, backend)
    for name, x, y in zip(("out", "lse"), got, right, strict=True):
        near(name, x, y, tolerance)
    with_lse = rng.random() < 0.5
    loss = loss_of(*right, seed, with_lse)
    if not loss.requires_grad:  # nobody sees anybody
        return
    right_grads = torch.autograd.grad(loss, [exact[name] for name in wanted], allow_unused=True)
    grads = torch.autograd.grad(loss_of(*got, seed, with_lse), [leaves[name] for name in wanted], allow_unused=True)
    # Rounded to 16 bits, a sum that cancels to nothing is held against what it was made of.
    rounded = next(iter(batch.leaves.values())).dtype.itemsize == 2
    largest = max(float(y.norm()) for y in right_grads if y is not None) if rounded else 0.0
    for name, x, y in zip(wanted, grads, right_grads, strict=True):
        if x is not None:
            near("d" + name, x, torch.zeros_like(exact[name]) if y is None else y, tolerance, largest)
        else:
            assert y is None or not y.any(), name


def near(name: str, got: Tensor, right: Tensor, tolerance: float, size: float = 0.0) -> None:
    got, right = got.detach().double().cpu(), right.detach()
    finite = right.isfinite()
    assert got.shape == right.shape and torch.equal(got.isfinite(), finite), name
    error = (got[finite] - right[finite]).norm()
    assert error <= tolerance * (1 + max(size, float(right[finite].norm()))), f"{name}: off by {error:.2e}"


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("backend", ["tiled", "oracle"])
def test_random_problems_in_pytorch(backend: str, seed: int) -> None:
    check(drawn(seed), backend, seed, 2e-5)


@pytest.mark.skipif(not (GPU or INTERPRETED), reason="Triton runs nothing here")
@pytest.mark.parametrize("seed", range(400 if GPU else 24))
def test_random_problems_by_kernels(seed: int) -> None:
    check(drawn(1000 + seed), "triton", seed, 2e-5)


@pytest.mark.skipif(not GPU, reason="16-bit products are a GPU's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(100 if GPU else 1))
def test_random_problems_in_16_bits(dtype: torch.dtype, seed: int) -> None:
    check(drawn(2000 + seed, dtype), "triton", seed, 3e-2 if dtype == torch.bfloat16 else 5e-3)


def simple(lengths: list[int], H: int = 2, D: int = 16, **options: Any) -> Batch:
    starts = [sum(lengths[:b]) for b in range(len(lengths))]
    leaves = {name: torch.randn(sum(lengths), H, D) for name in "qkv"}
    return Batch(leaves, (starts, starts), (lengths, lengths), (None, None), options)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_of_any_strides(backend: str, used: bool) -> None:
    """Every other number of something larger, or one number for all: kernels read them one behind the other."""
    batch = simple([5, 17, 1, 12], causal=True)
    batch.step = 2
    if used:
        batch.used = ([4, 9, 0, 12], [5, 3, 1, 7])
    given = {name: x.to(DEVICE) for name, x in batch.leaves.items()}
    for name, x, y in zip(("out", "lse"), batch.call(given, backend), batch.reference(doubled(batch)), strict=True):
        near(name, x, y, 2e-5)
    q, k, v = given.values()
    offsets = torch.tensor([0, 5, 22, 23, 35], dtype=torch.int32, device=DEVICE)
    for most in (0, 2):
        used_k = torch.tensor([most], device=DEVICE).expand(4)
        results = [attention_varlen(q, k, v, offsets, seqused_k=each, backend=backend) for each in (used_k, used_k.contiguous())]
        assert torch.equal(*results)


def doubled(batch: Batch) -> dict[str, Tensor]:
    return {name: x.double() for name, x in batch.leaves.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_padded_batch(backend: str) -> None:
    """Dropout's marks and all: a padded batch with key lengths, of as many queries as keys."""
    lengths, H, D = [5, 17, 1, 12], 2, 16
    batch = simple(lengths, H, D)
    M = max(lengths)
    leaves = {name: x.to(DEVICE) for name, x in batch.leaves.items()}
    padded = {name: torch.randn(len(lengths), M, H, D, device=DEVICE) for name in "qkv"}
    for name, x in padded.items():
        for b, (start, n) in enumerate(zip(batch.starts[0], lengths, strict=True)):
            x[b, :n] = leaves[name][start : start + n]
    bias = torch.randn(len(lengths), H, M, M, device=DEVICE)
    options: dict[str, Any] = {"bias": bias, "dropout_p": 0.4, "dropout_seed": 5, "causal": "top_left", "backend": backend}
    cu = torch.tensor([0, 5, 22, 23, 35], device=DEVICE)
    got = attention_varlen(leaves["q"], leaves["k"], leaves["v"], cu, **options)
    right = attention(padded["q"], padded["k"], padded["v"], key_lengths=torch.tensor(lengths, device=DEVICE), **options)
    for b, (start, n) in enumerate(zip(batch.starts[0], lengths, strict=True)):
        torch.testing.assert_close(got[start : start + n], right[b, :n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_no_sequence_owns_may_be_anything(backend: str) -> None:
    """NaN in rows of nobody, in rows that are not used, and in a neighbour, stays there; such rows get zeros."""
    used, T = [6, 3, 7], 24  # of 6, 4 and 9
    q, k, v = (torch.randn(T, 2, 16, device=DEVICE) for _ in range(3))
    starts = [2, 8, 12]
    dead = torch.ones(T, dtype=torch.bool)
    for start, n in zip(starts, used, strict=True):
        dead[start : start + n] = False
    dirty = [x.masked_fill(dead.to(DEVICE)[:, None, None], math.nan).requires_grad_() for x in (q, k, v)]
    bias = torch.randn(2, T, 9, device=DEVICE, requires_grad=True)
    sink = torch.randn(2, device=DEVICE, requires_grad=True)
    cu, some = torch.tensor([*starts, 21], device=DEVICE), torch.tensor(used, device=DEVICE)
    options: dict[str, Any] = {"seqused_q": some, "seqused_k": some, "causal": True, "backend": backend}
    out, lse = attention_varlen(*dirty, cu, bias=bias, bias_layout="rows", sink=sink, return_lse=True, **options)
    assert not out[dead].any() and (lse[:, dead] == -math.inf).all()
    assert out[~dead].isfinite().all() and lse[:, ~dead].isfinite().all()
    dout = torch.randn_like(out).masked_fill(dead.to(DEVICE)[:, None, None], math.nan)
    dlse = torch.randn_like(lse).masked_fill(dead.to(DEVICE), math.nan)
    grads = torch.autograd.grad((out, lse), [*dirty, bias, sink], (dout, dlse))
    for grad in grads[:3]:
        assert grad.isfinite().all() and not grad[dead].any()
    assert grads[3].isfinite().all() and not grads[3][:, dead].any()
    whole = [torch.where(dead.to(DEVICE)[:, None, None], 0.0, x).requires_grad_() for x in (q, k, v)]
    same, lse = attention_varlen(*whole, cu, bias=bias, bias_layout="rows", sink=sink, return_lse=True, **options)
    assert torch.equal(out, same)
    right = torch.autograd.grad((same, lse), [*whole, bias, sink], (dout.nan_to_num(), dlse.nan_to_num()))
    assert all(map(torch.equal, grads, right))
    # A neighbour's NaN: only the second sequence is one.
    second = [x.detach().clone() for x in whole]
    for x in second:
        x[8:11] = math.nan
    other = attention_varlen(*second, cu, **options)
    assert other[8:11].isnan().all() and other[:8].isfinite().all() and other[11:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "offsets",
    [[0, 30, 10, 20], [-5, 4, -1, 99], [40, 30, 20, 10], [0, 10**9, 5, 2**31 - 1], [0, 0, 0, 0], [20, 20, 20, 20], [0, 20, 0, 20]],
)
def test_wrong_offsets_touch_nothing_else(backend: str, offsets: list[int]) -> None:
    """Whatever offsets say: results are undefined, but nothing beside them is read (it is NaN) or, of gradients, written (it is guarded)."""
    T, wall, guard = 20, 64, 7.0

    def walled(fill: float) -> tuple[Tensor, Tensor]:
        whole = torch.full((T + 2 * wall, 2, 16), fill, device=DEVICE)
        return whole, whole[wall : wall + T]

    def check_walls(cu: Tensor, out: Tensor, lse: Tensor) -> None:
        pairs = [walled(guard) for _ in range(3)]
        q, k, v = (x.detach() for x in given)
        with triflash.backend(backend):
            flash_attn._flash_attn_varlen_backward(
                torch.ones_like(out), q, k, v, out.detach(), lse.detach(), *(inside for _, inside in pairs), cu, cu, T, T, 0.0, None, True,
                -1, -1, 0.0, None, False,
            )  # fmt: skip
        for whole, _ in pairs:
            assert (whole[:wall] == guard).all() and (whole[wall + T :] == guard).all()

    given = []
    for _ in range(3):
        _, inside = walled(math.nan)
        inside.copy_(torch.randn_like(inside))
        given.append(inside.requires_grad_())
    bias = torch.randn(2, 2, 6, 6, device=DEVICE, requires_grad=True)
    for dtype in (torch.int64, torch.int32):
        cu = torch.tensor(offsets, dtype=torch.int64).clamp(-(2**31), 2**31 - 1).to(dtype).to(DEVICE)
        for options in ({}, {"bias": bias[:1]}):
            out, lse = attention_varlen(*given, cu, causal=True, return_lse=True, backend=backend, **options)
            assert out.isfinite().all() and not lse.isnan().any()
            if not options:
                check_walls(cu.to(torch.int32), out, lse)
            leaves = [*given, *([bias] if options else [])]
            for grad in torch.autograd.grad(out.sum(), leaves):
                assert not grad.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_sequences_as_you_like(backend: str) -> None:
    """None, many of one row, and more than the tables take at once, most of them empty."""
    rows = 40 if INTERPRETED and backend == "triton" else 1100
    q, k, v = (torch.randn(rows, 1, 8, device=DEVICE, requires_grad=True) for _ in range(3))
    out = attention_varlen(q, k, v, torch.arange(rows + 1, device=DEVICE), backend=backend)
    torch.testing.assert_close(out, v)
    for grad, right in zip(torch.autograd.grad(out.sum(), (q, k, v)), (0.0, 0.0, 1.0), strict=True):
        torch.testing.assert_close(grad, torch.full_like(grad, right))
    many = torch.zeros(2500, dtype=torch.int32, device=DEVICE)
    many[1700:] = rows // 2
    many[2300:] = rows
    halves = [attention(*(x[None, part] for x in (q, k, v)), causal=True, backend="oracle")[0] for part in
              (slice(0, rows // 2), slice(rows // 2, rows))]  # fmt: skip
    torch.testing.assert_close(attention_varlen(q, k, v, many, causal=True, backend=backend), torch.cat(halves))
    for slopes in (None, torch.rand(0, 1, device=DEVICE)):  # of each sequence: no memory
        nowhere = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        none, lse = attention_varlen(q, k, v, nowhere, alibi_slopes=slopes, return_lse=True, backend=backend)
        assert not none.any() and (lse == -math.inf).all()
        assert not any(grad.any() for grad in torch.autograd.grad(none.sum(), (q, k, v)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries, keys", [(0, 0), (0, 7), (7, 0)])
def test_empty_tensors(backend: str, queries: int, keys: int) -> None:
    q = torch.randn(queries, 2, 8, device=DEVICE, requires_grad=True)
    k, v = (torch.randn(keys, 2, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    cu_q, cu_k = torch.tensor([0, queries], device=DEVICE), torch.tensor([0, keys], device=DEVICE)
    out, lse = attention_varlen(q, k, v, cu_q, cu_k, return_lse=True, backend=backend)
    assert out.shape == q.shape and not out.any() and (lse == -math.inf).all()
    for grad, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert grad.shape == x.shape and not grad.any()
    none = torch.tensor([0], device=DEVICE)  # no sequence, slopes of each
    assert attention_varlen(q[:0], k[:0], v[:0], none, alibi_slopes=torch.ones(0, 2, device=DEVICE), backend=backend).shape == (0, 2, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slopes_from_the_first_key_beside_a_shared_bias(backend: str) -> None:
    batch = simple([17, 3, 20], causal="top_left", alibi_slopes=torch.tensor([0.3, 0.6]))
    batch.lengths = batch.lengths[0], [9, 12, 19]
    batch.starts = batch.starts[0], [0, 9, 21]
    batch.leaves["bias"] = torch.randn(1, 1, 20, 20)
    check(batch, backend, 1, 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_shared_bias_have_the_same_bits(backend: str) -> None:
    batch = simple([17, 3, 0, 20, 9])
    leaves: dict[str, Tensor | None] = {name: x.to(DEVICE) for name, x in batch.leaves.items()}
    leaves["bias"] = torch.randn(1, 1, 20, 20, device=DEVICE, requires_grad=True)
    grads = []
    for _ in range(3):
        out, _ = batch.call(leaves, backend)
        grads.append(torch.autograd.grad(out.sin().sum(), leaves["bias"])[0])
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_a_hint_changes_no_result() -> None:
    batch = simple([17, 3, 20])
    leaves: dict[str, Tensor | None] = {name: x.to(DEVICE) for name, x in batch.leaves.items()}
    out = batch.call(leaves, "auto")[0]
    for longest in (0, 1, 20, 10**6):
        batch.options = {"max_seqlen_q": longest, "max_seqlen_k": longest}
        torch.testing.assert_close(batch.call(leaves, "auto")[0], out)


def test_offsets_on_the_cpu() -> None:
    q = torch.randn(9, 2, 8, device=DEVICE)
    cu = torch.tensor([0, 4, 9])
    assert torch.equal(attention_varlen(q, q, q, cu), attention_varlen(q, q, q, cu.to(DEVICE)))
