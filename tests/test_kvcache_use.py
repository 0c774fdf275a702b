"""``attention_with_kvcache`` in use: its signature, records, autocast, operators, fake tensors, compilation, explanations, the example."""

from __future__ import annotations

import inspect
import runpy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import triflash
from kvcases import BACKENDS, DEVICE, FP8, simple, with_new
from triflash import UnsupportedError, attention, attention_with_kvcache

PARAMETERS = (
    "q k_cache v_cache cache_lengths key_starts page_table cache_index cu_seqlens_q max_seqlen_q k_new v_new cu_seqlens_new bias mask "
    "causal window scale softcap alibi_slopes sink k_scale v_scale num_splits split_size out return_lse precision backend"
)


def test_signature() -> None:
    parameters = inspect.signature(attention_with_kvcache).parameters
    assert " ".join(parameters) == PARAMETERS
    assert all(p.kind == p.KEYWORD_ONLY for name, p in parameters.items() if name not in ("q", "k_cache", "v_cache"))
    defaults = {name: p.default for name, p in parameters.items() if p.default not in (None, p.empty)}
    assert defaults == {"causal": False, "return_lse": False}


def test_record_and_named_backends() -> None:
    given = with_new()
    with triflash.record_launches() as ran:
        attention_with_kvcache(**given, backend="tiled")
        attention_with_kvcache(**simple(), backend="oracle")
    assert ran == ["tiled: append", "tiled: forward", "oracle: forward"]
    with triflash.backend("oracle"), triflash.record_launches() as ran:
        attention_with_kvcache(**simple())
    assert ran == ["oracle: forward"]


def test_autocast_takes_the_caches_dtype() -> None:
    given = with_new()
    expected = attention_with_kvcache(**given)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        narrow = {**given, **{name: given[name].bfloat16() for name in ("q", "k_new", "v_new")}}
        out = attention_with_kvcache(**narrow)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0.1, atol=0.05)
    caches = {name: given[name].to(FP8) for name in ("k_cache", "v_cache")}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert attention_with_kvcache(**{**given, **caches}).dtype == torch.bfloat16


def test_writes_are_seen_by_autograd() -> None:
    """A cache that a graph saved is no longer what it was, whatever is around the call."""
    for around in (nullcontext, lambda: FlopCounterMode(display=False)):
        given = with_new()
        weight = torch.ones_like(given["k_cache"]).requires_grad_()
        y = (weight * given["k_cache"]).sum()
        with torch.no_grad(), around():
            attention_with_kvcache(**given)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()
    with torch.inference_mode():
        attention_with_kvcache(**with_new())


def test_meta_and_fake_tensors() -> None:
    given = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in with_new(bias=torch.zeros(4, 2, 12)).items()}
    out, lse = attention_with_kvcache(**given, return_lse=True)
    assert out.shape == (2, 2, 4, 8) and lse.shape == (2, 4, 2) and out.device.type == "meta"
    with FakeTensorMode(allow_non_fake_inputs=True):
        out, lse = attention_with_kvcache(**with_new(), return_lse=True)
        assert out.shape == (2, 2, 4, 8) and lse.dtype == torch.float32


@pytest.mark.parametrize("name", ["plain", "new", "packed"])
def test_operators_check(name: str) -> None:
    given = with_new() if name != "plain" else simple()
    q, k, v = given["q"], given["k_cache"], given["v_cache"]
    cu = torch.tensor([0, 2, 4], device=DEVICE) if name == "packed" else None
    if name == "new":
        args = (k, v, given["k_new"], given["v_new"], given["cache_lengths"], None, None, None, None, None, "auto")
        torch.library.opcheck(torch.ops.triflash.cache_append.default, args)
        return
    q = q if cu is None else q.flatten(0, 1)
    args = (q, k, v, given["cache_lengths"], *(None,) * 3, cu, *(None,) * 7, None, None, 0.3, "", 0.0, None, None, None, None, "auto")
    torch.library.opcheck(torch.ops.triflash.cache_forward.default, args)
    torch.library.opcheck(torch.ops.triflash.cache_forward_out.default, (*args, torch.empty_like(q)))


def test_flops() -> None:
    given = with_new()
    with FlopCounterMode(display=False) as counted:
        attention_with_kvcache(**given)
    pairs = 6 + 7 + 10 + 11  # causal, two queries behind 5 and 9 keys
    assert counted.get_total_flops() == 4 * pairs * 2 * (8 + 8)
    meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in simple().items()}
    with FlopCounterMode(display=False) as counted:
        attention_with_kvcache(**meta)
    assert counted.get_total_flops() == 4 * (2 * 2 * 12) * 2 * (8 + 8)


def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor, v: Tensor, bias: Tensor, **more: Any) -> Any:
    return attention_with_kvcache(
        q, k_cache, v_cache, cache_lengths=lengths, k_new=k, v_new=v, bias=bias, causal=True, return_lse=True, **more
    )  # fmt: skip


def step_inputs(N: int = 12, B: int = 2) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(N)
    made = [torch.randn(B, n, h, 8, generator=g) for n, h in ((1, 4), (N, 2), (N, 2), (1, 2), (1, 2))]
    q, k, v, k_new, v_new = (x.to(DEVICE) for x in made)
    lengths = torch.arange(3, 3 + B, device=DEVICE)
    return q, k, v, lengths, k_new, v_new, torch.randn(1, 4, 1, N, generator=g).to(DEVICE)


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_compiled(dynamic: bool | None) -> None:
    """Graphs without a break write caches in place, and take other sizes."""
    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for N, B in ((12, 2), (20, 3)) if dynamic is not False else ((12, 2),):
        mine, right = step_inputs(N, B), step_inputs(N, B)
        for got, wanted in zip(compiled(*mine), step(*right), strict=True):
            torch.testing.assert_close(got, wanted)
        assert torch.equal(mine[1], right[1]) and torch.equal(mine[2], right[2])
        assert not torch.equal(mine[1], step_inputs(N, B)[1])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("of", ["requests", "heads"])
def test_one_graph_for_any_size(of: str, packed: bool) -> None:
    """From the second size on a graph has none: of one for each, PyTorch would soon have too many."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention_with_kvcache, backend=counter, fullgraph=True)
    for size in (2, 3, 5, 6):
        B, H = (size, 2) if of == "requests" else (2, size)
        q, k, v = (torch.randn(B, n, H, 8, device=DEVICE) for n in (1, 9, 9))
        lengths, bias = torch.full((B,), 7, device=DEVICE), torch.randn(B, H, 1, 9, device=DEVICE)
        more = {"cu_seqlens_q": torch.arange(B + 1, device=DEVICE)} if packed else {}
        q = q.flatten(0, 1) if packed else q
        given: dict[str, Any] = dict(cache_lengths=lengths, bias=bias, mask=bias < 1.0, out=torch.empty_like(q), **more)
        torch.testing.assert_close(compiled(q, k, v, **given).clone(), attention_with_kvcache(q, k, v, **given))
    assert counter.frame_count <= 2


def test_compiled_code_copies_no_cache() -> None:
    """Inductor's code hands the caches and a given out to the operators as they are."""
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    mine, right = step_inputs(), step_inputs()
    out = torch.empty_like(mine[0])
    (got, _), code = run_and_get_code(torch.compile(step, fullgraph=True), *mine, out=out)
    torch.testing.assert_close(got, step(*right)[0])
    assert torch.equal(mine[1], right[1]) and torch.equal(out, got)
    text = code[0][code[0].index("def call(") :].partition("def get_args")[0]
    assert "cache_append" in text and "cache_forward_out" in text
    assert "clone" not in text and "copy_" not in text and "empty_strided" not in text


def test_compiled_refuses_gradients() -> None:
    torch.compiler.reset()
    inputs = step_inputs()
    inputs[0].requires_grad_()
    with pytest.raises(Exception, match=r"gradients by q"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(*inputs)


def test_exported() -> None:
    class Module(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return step(*given)[0]

    program = torch.export.export(Module(), step_inputs())
    mine, right = step_inputs(), step_inputs()
    torch.testing.assert_close(program.module()(*mine), step(*right)[0])
    assert torch.equal(mine[1], right[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_explained(backend: str) -> None:
    """What it says is what runs; the problem is in words."""
    given = with_new(bias=torch.randn(4, 1, 12, device=DEVICE), num_splits=4)
    told = triflash.explain(
        **{("k" if n == "k_cache" else "v" if n == "v_cache" else n): x for n, x in given.items()},
        of=attention_with_kvcache,
        backend=backend,
    )
    with triflash.record_launches() as ran:
        attention_with_kvcache(**given, backend=backend)
    assert told.launches == ran and told.backend == backend and told.backward is None
    text = str(told)
    assert ("num_splits=4 changes nothing" in text) == (backend != "triton")
    for words in (
        "2 requests, 2 queries each, on a KV cache of up to 12 keys, 4 heads", "bias 1h1k fp32", "new keys", "causal (queries stand at the end",
        "keys of a request are split into 1 parts of equal length, of 4 asked for" if backend == "triton" else f"keys are not split: backend {backend}", "not taken  ",
    ):  # fmt: skip
        assert words in text, text
    del given["causal"]
    with pytest.raises(TypeError, match="cache_seqlens: .*cache_lengths="):
        triflash.explain(given["q"], given["k_cache"], given["v_cache"], cache_seqlens=None, of=attention_with_kvcache)
    with pytest.raises(UnsupportedError, match="gradients"):
        triflash.explain(given["q"], given["k_cache"], given["v_cache"], grads="q", of=attention_with_kvcache)


def test_explained_paged() -> None:
    """Meta tensors will do; no table is read."""
    q = torch.empty(7, 8, 64, dtype=torch.float16, device="meta")
    cache = torch.empty(40, 16, 2, 64, dtype=torch.float16, device="meta").to(FP8)
    told = triflash.explain(
        q, cache, cache, of=attention_with_kvcache, page_table=torch.empty(3, 5, dtype=torch.int32, device="meta"), window=(20, 0),
        cu_seqlens_q=torch.tensor([0, 1, 3, 7]), max_seqlen_q=4, k_scale=0.5, mask=torch.empty(3, 1, 1, 80, dtype=torch.bool, device="meta"),
        return_lse=True, device="cpu",
    )  # fmt: skip
    text = str(told)
    for words in (
        "3 requests, up to 4 packed queries each", "up to 80 keys in pages of 16", "fp16, fp8 cache", "mask b11k bool", "keys from -20 to +0",
        "8 query heads on 2 key heads", "results  out 7.0 KiB, lse 224 B", "triton: cannot do",
    ):  # fmt: skip
        assert words in text, text


def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    """Three requests join and leave a pool of pages, and get what attention over their own keys gives."""
    path = Path(__file__).parents[1] / "examples" / "paged_cache.py"
    assert path.read_text().count("\n") <= 80
    runpy.run_path(str(path), run_name="__main__")
    told = capsys.readouterr().out
    assert told.count("leaves") == 3 and "10 of 10 pages are free" in told and "every request got" in told


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_explain_names_the_products(precision: str) -> None:
    q, k = torch.empty(1, 1, 8, 64, device="meta"), torch.empty(1, 8192, 8, 64, device="meta")
    for of in (attention, attention_with_kvcache):
        step = triflash.explain(q, k, k, of=of, precision=precision, device="h200").forward.steps[0].step
        assert (step.kernel, step.precision) == ("few_forward", precision)
