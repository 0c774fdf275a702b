"""Hugging Face models under ``attn_implementation="triattention"`` against the same models under "eager": logits, loss, every gradient.

And what the adapter says, by which words it hides what, and what it refuses. How models are used is in test_transformers_use.py.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import BY_NAME, FAMILIES, B, L, Seen, inputs, made, ours, padding, results, same, sides, spied, table

pytest.importorskip("transformers")
import transformers

import triflash
from triflash.integrations import transformers as adapter
from triflash.integrations import visible
from triflash.integrations.visible import Visible, lean_mask, own_attention, refuse_unrouted
from triflash.plan.device import KNOWN_DEVICES

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def registered() -> None:
    adapter.register()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    return spied(monkeypatch)


@pytest.mark.parametrize(("name", "side"), [(family.name, side) for family in FAMILIES for side in sides(family)])
def test_family(name: str, side: str, calls: list[Seen]) -> None:
    family = BY_NAME[name]
    if tuple(map(int, transformers.__version__.split(".")[:2])) < family.since:
        pytest.skip(f"from transformers {family.since} on")
    model, batch = made(family, family.reference), inputs(family.kind, side)
    want = results(model, batch)
    calls.clear()
    got = results(ours(family, model), batch)
    assert calls, "triflash was not called"
    assert all(call.lean for call in calls) is family.lean, [call.options for call in calls if not call.lean]
    same(got, want)


def test_swin_keeps_bias_and_mask_apart(calls: list[Seen]) -> None:
    """Patched, nothing has windows × heads × S × S entries: the bias has heads × S × S, the mask windows of one image × S × S."""
    family = BY_NAME["Swin, patched"]
    results(ours(family, made(family)), inputs("image", "large"))
    windows, heads, S = 4, 2, 16
    assert {call.q.shape[:2] for call in calls} == {(B * windows, 1), (B, windows)}  # the second layer's windows are shifted
    for call in calls:
        mask = call.options["mask"]
        assert call.options["bias"].shape == (1, heads, S, S) and call.options["bias"].requires_grad
        assert mask is None or mask.shape == (windows, 1, S, S)


# What the adapter asks of ``attention``, for each way to hide something.


def first_call(name: str, calls: list[Seen], batch: dict[str, Tensor] | None = None, **changes: Any) -> list[Seen]:
    family = BY_NAME[name]
    calls.clear()
    made(family, adapter.NAME, **changes)(**(inputs(family.kind) if batch is None else batch))
    return calls


def said(call: Seen) -> dict[str, Any]:
    """What hides something in a call: shapes of tensors, values of the rest."""
    names = ("causal", "window", "mask", "key_lengths", "key_starts", "diagonal", "cu_seqlens", "seqused_k")
    return {n: tuple(x.shape) if isinstance(x, Tensor) else x for n in names if (x := call.options.get(n)) is not None and x is not False}


@pytest.mark.parametrize(
    ("name", "side", "want"),
    [
        ("Llama", "none", {"causal": True}),
        ("Llama", "right", {"causal": True, "key_lengths": (B,)}),
        ("Llama", "left", {"causal": True, "key_starts": (B,)}),
        ("Llama", "holes", {"causal": True, "mask": (B, 1, 1, L)}),
        ("Mistral", "none", {"causal": True, "window": (4, 0)}),
        ("Mistral", "right", {"causal": True, "window": (4, 0), "key_lengths": (B,)}),
        ("Mistral", "left", {"causal": True, "window": (4, 0), "key_starts": (B,)}),
        ("BERT", "none", {}),
        ("BERT", "right", {"key_lengths": (B,)}),
        ("ModernBERT", "right", {"window": (3, 3), "key_lengths": (B,)}),
        ("Llama-4", "none", {"causal": "top_left", "cu_seqlens": (3 * B + 1,)}),
        ("Llama-4", "right", {"causal": "top_left", "cu_seqlens": (3 * B + 1,), "seqused_k": (3 * B,)}),
        ("Llama-4", "holes", {"mask": (B, 1, L, L)}),
    ],
)
def test_what_hides(name: str, side: str, want: dict[str, Any], calls: list[Seen]) -> None:
    layers = first_call(name, calls, inputs(BY_NAME[name].kind, side))
    assert want in [said(call) for call in layers]


def test_a_chunk_that_holds_everything_is_causal(calls: list[Seen]) -> None:
    assert [said(call) for call in first_call("Llama-4", calls, attention_chunk_size=L)] == [{"causal": True, "key_lengths": (B,)}] * 2
    assert all(call.lean for call in calls)


def dense(seen: Visible | Tensor) -> Tensor:
    """What a mask of either kind shows, (B, 1, M, N)."""
    if isinstance(seen, Tensor):
        return seen
    B, _, M, N = seen.shape
    if seen.offsets is not None:
        return seen.whole()
    diagonal = (0 if seen.top_left else N - M) if seen.diagonal is None else seen.diagonal
    if isinstance(diagonal, Tensor):
        diagonal = diagonal[:, None, None, None]
    distance = torch.arange(N)[None] - torch.arange(M)[:, None] - diagonal
    shown = torch.ones(B, 1, M, N, dtype=torch.bool)
    if seen.left is not None:
        shown = shown & (distance >= -seen.left)
    if seen.right is not None:
        shown = shown & (distance <= seen.right)
    if seen.keys is not None:
        shown = shown & seen.keys
    if seen.starts is not None:
        shown = shown & (torch.arange(N) >= seen.starts[:, None, None, None])
    return shown if seen.lengths is None else shown & (torch.arange(N) < seen.lengths[:, None, None, None])


@pytest.mark.parametrize("kind", ["causal", "window", "chunk", "both sides", "both sides, window"])
@pytest.mark.parametrize("side", ["no mask", "none", "right", "left", "holes"])
def test_masks_say_what_transformers_says(kind: str, side: str) -> None:
    """Every place of queries and keys that a cache may have, against transformers' own mask of (M, N)."""
    from transformers import masking_utils as theirs

    size = 4
    functions = {
        "causal": theirs.causal_mask_function,
        "window": theirs.sliding_window_causal_mask_function(size),
        "chunk": theirs.chunked_causal_mask_function(size, torch.zeros(B, dtype=torch.long)),
        "both sides": theirs.bidirectional_mask_function,
        "both sides, window": theirs.sliding_window_bidirectional_mask_function(size),
    }
    causal = not kind.startswith("both")
    config = transformers.PreTrainedConfig()
    config.sliding_window, config.attention_chunk_size = size if "window" in kind else None, size if kind == "chunk" else None
    lean = 0
    for M, N, q_offset, kv_offset in (
        (6, 6, 0, 0),
        (1, 6, 5, 0),
        (3, 6, 3, 0),
        (6, 9, 0, 0),
        (2, 9, 3, 0),
        (1, 9, 4, 0),
        (3, 5, 6, 4),
        (4, 4, 0, 0),
    ):
        given = dict(
            batch_size=B, q_length=M, kv_length=N, q_offset=q_offset, kv_offset=kv_offset, mask_function=functions[kind],
            attention_mask=None if side == "no mask" else padding(side, max(q_offset + M, 8)).bool(),
        )  # fmt: skip
        options = dict(allow_is_causal_skip=causal, allow_is_bidirectional_skip=not causal, config=config)
        seen = lean_mask(**given, **options, local_size=size if "window" in kind or kind == "chunk" else None, use_vmap=False)
        want = theirs.sdpa_mask(**given, allow_is_causal_skip=False)
        assert torch.equal(dense(seen), want), (M, N, q_offset, kv_offset, seen)
        lean += isinstance(seen, Visible)
        counter = torch.tensor(q_offset)  # of a static cache, on the device
        given["q_offset"] = counter
        seen = lean_mask(**given, **options, local_size=size if "window" in kind or kind == "chunk" else None, use_vmap=False)
        counter += 1
        assert isinstance(seen, Visible) or (kind == "chunk" and M > 1)
        assert torch.equal(dense(seen), want), (M, N, q_offset, kv_offset, seen)
        given["kv_offset"] = torch.tensor(kv_offset)
        seen = lean_mask(
            **given | {"q_offset": torch.tensor(q_offset)},
            **options,
            local_size=size if "window" in kind or kind == "chunk" else None,
            use_vmap=False,
        )
        assert isinstance(seen, Visible) or (kind == "chunk" and M > 1)
        assert torch.equal(dense(seen), want), (M, N, q_offset, kv_offset, seen)
    assert lean >= (3 if kind == "chunk" else 8)


@pytest.mark.parametrize("side", ["no mask", "none", "right", "left", "holes"])
def test_masks_of_static_caches_say_what_transformers_says(side: str) -> None:
    from transformers import masking_utils as theirs

    for M, q_offset, allowed in ((1, 4, False), (1, 8, True), (3, 5, True), (3, 0, True)):
        given = dict(
            batch_size=B, q_length=M, kv_length=12, q_offset=torch.tensor(q_offset), kv_offset=0, mask_function=theirs.causal_mask_function,
            attention_mask=None if side == "no mask" else padding(side, 8)[:, : q_offset + M].bool(),
        )  # fmt: skip
        if q_offset + M > 8 and side != "no mask":
            given["attention_mask"] = torch.nn.functional.pad(given["attention_mask"], (0, q_offset + M - 8), value=True)
        seen = lean_mask(**given, allow_is_causal_skip=allowed, config=transformers.LlamaConfig(), use_vmap=False)
        assert isinstance(seen, Visible) and seen.diagonal is not None
        assert torch.equal(dense(seen), theirs.sdpa_mask(**given, allow_is_causal_skip=False))
    whole = lean_mask(**{**given, "q_length": 3}, allow_is_causal_skip=False, config=transformers.LlamaConfig(), use_vmap=False)
    assert isinstance(whole, Tensor)


def test_heads_are_not_repeated(calls: list[Seen]) -> None:
    for call in first_call("Llama", calls):
        assert (call.q.shape[2], call.k.shape[2]) == (4, 2)
        assert call.q.data_ptr() != 0 and call.k._base is not None  # views of the projections


@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_t5_stays_on_the_fast_kernels(side: str, calls: list[Seen]) -> None:
    """On an H100 every pass of encoder, decoder and cross-attention, with the bias's gradient, is backend hopper's. Of long sequences."""
    first_call("T5", calls, inputs("seq2seq", side), d_kv=64)
    assert len(calls) == 6
    n = 512
    for call in calls:
        options = {name: x for name, x in call.options.items() if name not in ("bias", "mask", "key_lengths", "key_starts")}
        bias, mask, lengths, starts = (call.options.get(name) for name in ("bias", "mask", "key_lengths", "key_starts"))
        if starts is not None:  # a row of keys there: see the test below
            mask = torch.ones(B, 1, 1, n, dtype=torch.bool)
        if bias is not None:
            assert bias.requires_grad and bias.shape[0] == 1
            bias = torch.empty(1, 4, n, n, dtype=torch.bfloat16, device="meta", requires_grad=True)
        if mask is not None:
            assert mask.shape[1:3] == (1, 1)
            mask = torch.empty(B, 1, 1, n, dtype=torch.bool, device="meta")
        if lengths is not None:
            lengths = torch.empty(B, dtype=torch.int64, device="meta")
        q, k, v = (torch.empty(B, n, 4, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3))
        explained = triflash.explain(q, k, v, bias, mask=mask, key_lengths=lengths, device="h100", **options)
        assert explained.backward is not None and (explained.forward.backend, explained.backward.backend) == ("hopper", "hopper")
    assert sum(call.options.get("bias") is not None for call in calls) == 4  # cross-attention has none to read


def test_padding_on_the_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts of keys, and lengths where there is padding on the right, too; on sm90, whose own kernels take no starts, a row of keys."""
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    given: dict[str, Any] = dict(batch_size=3, q_length=4, kv_length=4, attention_mask=mask)
    seen = lean_mask(**given)
    assert isinstance(seen, Visible) and seen.starts is not None and seen.starts.tolist() == [2, 4, 0] and seen.lengths is seen.keys is None
    assert seen.to(device="meta").starts.is_meta and "starts" in repr(seen)  # type: ignore[union-attr]
    mask[2, 3] = False
    seen = lean_mask(**given)
    assert isinstance(seen, Visible) and seen.starts is not None and seen.lengths is not None and seen.keys is None
    assert (seen.starts.tolist(), seen.lengths.tolist()) == ([2, 4, 0], [4, 4, 3])
    mask[0] = torch.tensor([True, False, True, True])  # a hole
    assert lean_mask(**given).keys is not None  # type: ignore[union-attr]
    mask[0, 0] = False
    monkeypatch.setattr("triflash.integrations.visible.facts_of", lambda device: KNOWN_DEVICES["sm90"])
    seen = lean_mask(**given)
    assert isinstance(seen, Visible) and seen.starts is seen.lengths is None and torch.equal(seen.keys[:, 0, 0], mask)  # type: ignore[index]


def test_a_prefix_without_a_cache_aligns_to_the_top_left() -> None:
    """A mask longer than the queries without a cache, as prefix tuning has it, aligns to the top left, as eager attention does."""
    family = BY_NAME["Llama"]
    config = transformers.LlamaConfig(**family.sizes)
    config._attn_implementation = adapter.NAME
    hidden, mask = torch.zeros(B, 5, 32), torch.ones(B, 8, dtype=torch.long)
    made_by = transformers.masking_utils.create_causal_mask
    seen = made_by(config, hidden, mask, *([None] if "cache_position" not in made_by.__code__.co_varnames else [torch.arange(5), None]))
    assert (seen.left, seen.right, seen.top_left, seen.shape) == (None, 0, True, (B, 1, 5, 8))


# Masks that a model or its user brings.


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma-2", "Llama-4"])
def test_packed_rows(name: str, calls: list[Seen]) -> None:
    """Several sequences in a row, told by position_ids alone, are packed sequences, windows and chunks counted in each."""
    family = BY_NAME[name]
    model, batch = made(family), inputs("causal", "none")
    del batch["attention_mask"]
    batch["position_ids"] = torch.cat([torch.arange(n) for n in (4, 5, 3)]).expand(B, L)
    batch["use_cache"] = False  # with a cache transformers takes them for one sequence
    want = results(model, batch)
    calls.clear()
    same(results(ours(family, model), batch), want)
    windows = {"Mistral": [(4, 0), (4, 0)], "Gemma-2": [(4, 0), None]}.get(name, [None, None])
    want_said: list[dict[str, Any]] = [
        {"causal": "top_left", "cu_seqlens": (3 * B + 1,)} | ({} if each is None else {"window": each}) for each in windows
    ]
    assert all(call.lean and call.packed for call in calls) and [said(call) for call in calls] == want_said


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma-2", "gpt-oss", "Llama-4"])
def test_offsets_of_packed_rows(name: str, calls: list[Seen]) -> None:
    """With DataCollatorWithFlattening's keywords a model computes what it does of each sequence alone, also where transformers, for a cache
    or for this model, makes a mask of one sequence.
    """
    family, lengths = BY_NAME[name], (4, 5, 3)
    model, ids = made(family, family.reference), inputs("causal", "none")["input_ids"]
    ends = torch.arange(0, B * L, L)[:, None] + torch.tensor(lengths).cumsum(0)
    cu = torch.nn.functional.pad(ends.flatten(), (1, 0)).int()
    packed: dict[str, Any] = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 5, "max_length_k": 5}
    packed |= {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths]).expand(B, L)}
    if name == "Llama-4":
        packed["use_cache"] = False  # with one its chunks begin with the row

    def found(logits: Tensor, model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        (logits * torch.linspace(-1, 1, logits.shape[-1])).square().sum().backward()
        return {"logits": logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}

    want = found(torch.cat([model(each).logits for each in ids.split(list(lengths), 1)], 1), model)
    calls.clear()
    mine = ours(family, model)
    same(found(mine(**packed).logits, mine), want)
    assert calls and all(call.lean and call.packed for call in calls)
    if name == "Llama":
        compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**packed, use_cache=False).logits, want["logits"], rtol=1e-4, atol=1e-5)
    adapter.register(lean=False)
    same(found(mine(**packed).logits, mine), want)


def test_offsets_beside_other_masks(calls: list[Seen]) -> None:
    """Chunks, padding, a bias and a mask of one's own hide what they do, and sequences the rest."""
    torch.manual_seed(0)
    q, k, v, bias = (torch.randn(shape) for shape in ((2, 2, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8), (1, 2, 6, 6)))
    cu = torch.tensor([0, 2, 6, 9, 12], dtype=torch.int32)
    block = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)), torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))
    same_one = torch.stack(block).bool()[:, None]
    own = torch.rand(2, 1, 6, 6) < 0.7
    chunks = Visible((2, 1, 6, 6), None, 0, offsets=torch.tensor([0, 4, 6, 10, 12]))
    padded = Visible((2, 1, 6, 6), 2, 0, lengths=torch.tensor([6, 5]))
    holes = Visible((2, 1, 6, 6), None, 0, offsets=torch.tensor([0, 4, 6, 12]), used=torch.tensor([3, 2, 5]))
    whole = Visible((2, 1, 6, 6), None, 0)
    for mask, shown, added, packed in (
        (chunks, dense(chunks), None, True), (padded, dense(padded), None, False), (holes, dense(holes), None, False),
        (own, own, None, False), (torch.zeros(()).masked_fill(~own, -torch.inf), own, None, False), (whole, dense(whole), bias, False),
    ):  # fmt: skip
        out, _ = adapter.attention_forward(nn.Module(), q, k, v, mask, position_bias=added, cu_seq_lens_q=cu, cu_seq_lens_k=cu)
        right = (torch.zeros(1, 1, 6, 6) if added is None else added).expand(2, -1, -1, -1).masked_fill(~(shown & same_one), -torch.inf)
        want = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=right).nan_to_num()
        torch.testing.assert_close(out.transpose(1, 2), want)
        assert calls.pop().packed is packed


def test_blocks_beside_a_bias(calls: list[Seen]) -> None:
    """What is added to scores by the place in the row has a whole mask beside it."""
    torch.manual_seed(0)
    q, k, v, bias = (torch.randn(shape) for shape in ((2, 2, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8), (1, 2, 6, 6)))
    seen = Visible((2, 1, 6, 6), 1, 0, offsets=torch.tensor([0, 4, 6, 9, 12]), used=torch.tensor([3, 2, 3, 0]))
    out, _ = adapter.attention_forward(nn.Module(), q, k, v, seen, position_bias=bias)
    shown = dense(seen)
    assert said(calls[0]) == {"mask": (2, 1, 6, 6)} and shown[0, 0].sum(-1).tolist() == [1, 2, 2, 1, 1, 2] and not shown[1, 0, 3:].any()
    added = bias.expand(2, -1, -1, -1).masked_fill(~shown, -torch.inf)
    want = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=added).nan_to_num()
    torch.testing.assert_close(out.transpose(1, 2), want)
    assert seen.to(device="meta").offsets.is_meta and "blocks" in repr(seen)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_custom_masks(dtype: torch.dtype, calls: list[Seen]) -> None:
    """A mask (B, 1, M, N) of one's own goes through as it is; a float one is added, and may have a gradient."""
    family = BY_NAME["Llama"]
    model, batch = made(family), inputs("causal", "none")
    shown = (torch.rand(B, 1, L, L) < 0.5) | torch.eye(L, dtype=torch.bool)
    added = torch.zeros(B, 1, L, L).masked_fill(~shown, torch.finfo(torch.float32).min)
    want = results(model, {**batch, "attention_mask": added})
    calls.clear()
    same(results(ours(family, model), {**batch, "attention_mask": shown if dtype == torch.bool else added}), want)
    assert len(calls) == 2 and all(call.options["mask" if dtype == torch.bool else "bias"].shape == (B, 1, L, L) for call in calls)


def test_a_float_mask_has_its_gradient() -> None:
    family, bias = BY_NAME["Llama"], torch.randn(1, 4, L, L)
    model, ids = made(family), inputs("causal")["input_ids"]
    grads = []
    for each in (model, ours(family, model)):
        leaf = bias.clone().requires_grad_()
        each(input_ids=ids, attention_mask=leaf, labels=ids).loss.backward()
        grads.append(leaf.grad)
    assert grads[0].abs().max() > 1e-5
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-8)


def test_lean_can_be_turned_off(calls: list[Seen]) -> None:
    adapter.register(lean=False)
    family = BY_NAME["Mistral"]
    model, batch = made(family), inputs("causal")
    want = results(model, batch)
    calls.clear()
    same(results(ours(family, model), batch), want)
    assert [said(call) for call in calls] == [{"mask": (B, 1, L, L)}] * 2


# What is refused.


def plain(module: Any = None, M: int = 4, N: int = 4, mask: Any = None, **options: Any) -> Any:
    q, k, v = (torch.randn(2, 2, n, 8) for n in (M, N, N))
    return adapter.attention_forward(module or nn.Module(), q, k, v, mask, **options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(output_attentions=True), ValueError, "output_attentions: .*eager"),
        (dict(indices=torch.zeros(1)), TypeError, "indices: .*no such keyword"),
        (dict(head_mask=torch.ones(2)), TypeError, "head_mask: "),
        (dict(cu_seq_lens_q=torch.tensor([0, 4])), TypeError, "cu_seq_lens_k: wanted offsets"),
        (dict(cu_seq_lens_q=[0, 8], cu_seq_lens_k=[0, 8]), TypeError, "cu_seq_lens_q: wanted offsets"),
        (dict(N=6, cu_seq_lens_q=torch.tensor([0, 4]), cu_seq_lens_k=torch.tensor([0, 6])), ValueError, "got 4 queries and 6 keys"),
        (dict(mask=torch.ones(2, 4)), ValueError, "attention_mask: wanted 4 dims"),
        (dict(mask=torch.ones(2, 1, 4, 4, dtype=torch.long)), TypeError, "attention_mask: wanted a bool tensor"),
        (dict(mask=torch.ones(2, 1, 4, 3, dtype=torch.bool)), ValueError, "mask: "),
        (dict(mask=Visible((2, 1, 4, 6), None, 0)), ValueError, "attention_mask: wanted one of 4 queries and 4 keys"),
        (dict(sliding_window=2, is_causal=False), ValueError, "sliding_window: "),
        (dict(s_aux=torch.zeros(3)), ValueError, "sink: "),
    ],
)  # fmt: skip
def test_refusals(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        plain(**options)


def test_what_changes_nothing_is_ignored() -> None:
    torch.manual_seed(0)
    want, none = plain(is_causal=True)
    torch.manual_seed(0)
    extra = dict(
        use_cache=True, position_ids=torch.arange(4), num_items_in_batch=torch.tensor(3), output_hidden_states=True, head_mask=None
    )
    assert none is None and want.shape == (2, 4, 2, 8) and want.is_contiguous()
    assert torch.equal(plain(is_causal=True, **extra)[0], want)


def test_a_window_without_a_mask() -> None:
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    out, _ = adapter.attention_forward(nn.Module(), q, k, v, None, is_causal=True, sliding_window=2)
    i = torch.arange(6)
    shown = (i[None] <= i[:, None]) & (i[None] > i[:, None] - 2)
    torch.testing.assert_close(out.transpose(1, 2), nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=shown))


@pytest.mark.parametrize("name", ["BLOOM", "MPT"])
def test_models_that_would_misread_a_mask_are_refused(name: str) -> None:
    """Their attention adds or fills what it takes for a float or inverted mask."""
    with pytest.raises(ValueError, match=r"attn_implementation: wanted 'eager'.*patch\(model\)"):
        made(BY_NAME[name], adapter.NAME)(**inputs("causal"))


def test_models_that_use_the_interface_in_part() -> None:
    """Of every file where some attention is its own, somebody has looked whether it is handed a mask of the interface's."""
    refused = {"bigbird_pegasus": "BigBirdPegasusConfig", "git": "GitConfig", "gemma4": "Gemma4AudioConfig", "informer": "InformerConfig"}
    own_masks = {
        "clap",
        "conditional_detr",
        "detr",
        "esmfold2",
        "evolla",
        "gemma3n",
        "longt5",
        "maskformer",
        "pegasus_x",
        "pp_doclayout_v2",
    }
    found = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        text = path.read_text(encoding="utf-8")
        if "ALL_ATTENTION_FUNCTIONS" in text and re.search(r"create_\w*mask", text) and own_attention(text):
            found.add(path.parent.name)
    assert found <= refused.keys() | own_masks and len(found) > 8
    for name in refused.keys() & found:
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        with pytest.raises(ValueError, match=f"modeling_{name}"):
            refuse_unrouted(getattr(transformers, refused[name]))


def test_no_family_is_refused_for_what_else_was_imported() -> None:
    """Files of other models lie beside one's own, and a program may import them all: ESMFold beside ESM."""
    for family in FAMILIES:
        config = getattr(transformers, family.config, None)
        if config is None or family.use != "as is":
            continue
        folder = Path(inspect.getfile(config)).parent
        for path in folder.glob("modeling_*.py"):
            importlib.import_module(f"transformers.models.{folder.name}.{path.stem}")
        visible._unrouted.cache_clear()
        refuse_unrouted(config)


def test_output_attentions_of_a_model() -> None:
    with pytest.raises(ValueError, match="output_attentions|eager"):
        made(BY_NAME["Llama"], adapter.NAME)(**inputs("causal"), output_attentions=True)


@pytest.mark.parametrize("name", ["Llama", "BERT"])
def test_a_mask_of_three_dims_is_refused_by_name(name: str) -> None:
    """With what goes instead."""
    model, ids = made(BY_NAME[name], adapter.NAME), inputs(BY_NAME[name].kind)["input_ids"]
    mask = torch.ones(*ids.shape, ids.shape[1], dtype=torch.long).tril()
    with pytest.raises(ValueError, match=r"^attention_mask: wanted \(B, keys\), or 4 dims .*; mask.bool\(\)\[:, None\]"):
        model(input_ids=ids, attention_mask=mask)
    model(input_ids=ids, attention_mask=mask.bool()[:, None])


@pytest.mark.parametrize("name", ["Llama", "BERT"])
def test_output_attentions_of_a_config(name: str) -> None:
    """Where nobody says so in the call; transformers would give an empty tuple."""
    model = made(BY_NAME[name], adapter.NAME, output_attentions=True)
    with pytest.raises(ValueError, match="^output_attentions: wanted False, got True; .*eager"):
        model(**inputs(BY_NAME[name].kind))
    model(**inputs(BY_NAME[name].kind), output_attentions=False)


def test_patches_come_off_again(calls: list[Seen]) -> None:
    family = BY_NAME["BLOOM"]
    model, batch = made(family), inputs("causal")
    want, keys = results(model, batch), list(model.state_dict())
    assert adapter.patch(model) is model and list(model.state_dict()) == keys
    same(results(model, batch), want)
    with pytest.raises(ValueError, match="patched"):
        adapter.patch(model)
    assert adapter.unpatch(model) is model and model.config._attn_implementation == "eager"
    calls.clear()
    got = results(model, batch)
    assert not calls and all(torch.equal(got[name], x) for name, x in want.items())
    with pytest.raises(ValueError, match="model: wanted one that patch"):
        adapter.unpatch(model)
    with pytest.raises(ValueError, match="BloomAttention"):
        adapter.patch(made(BY_NAME["Llama"]))


def test_saved_and_loaded(tmp_path: Path, calls: list[Seen]) -> None:
    """Names of implementations, and patches, stay out of what is saved."""
    model = adapter.patch(made(BY_NAME["BLOOM"]))
    model.save_pretrained(tmp_path / "bloom")
    assert "triattention" not in "".join(path.read_text() for path in (tmp_path / "bloom").glob("*.json"))
    made(BY_NAME["Llama"], adapter.NAME).save_pretrained(tmp_path / "llama")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", attn_implementation=adapter.NAME)
    calls.clear()
    same(results(again, inputs("causal")), results(made(BY_NAME["Llama"]), inputs("causal")))
    assert len(calls) == 2


def test_visible_says_what_it_cannot_do() -> None:
    seen = Visible((2, 1, 4, 4), None, 0, keys=torch.ones(2, 1, 1, 4, dtype=torch.bool))
    for use in (lambda: seen[:, :, :, :2], lambda: seen * 2, lambda: torch.where(seen, 0.0, 1.0), lambda: torch.zeros(4) * seen):
        with pytest.raises(TypeError, match=r"register\(lean=False\)"):
            use()
    assert seen.to("cpu", torch.bool).keys is seen.keys and seen.to(device="meta").keys.is_meta
    assert "bottom_right" in repr(seen)


# What the page says, and what a new transformers may bring.


def test_the_page_has_the_table() -> None:
    """After a change: python3 tests/families.py, which prints it."""
    assert table() in (ROOT / "docs" / "integrations.md").read_text()


def test_the_page_runs() -> None:
    """Every snippet alone, as somebody would copy it."""
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "integrations.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, {})


def test_every_keyword_of_every_model_is_known() -> None:
    """What transformers' models hand to their attention function is computed, does not matter, or is refused."""
    refused = {"indices", "block_indices", "sinks"}
    names, calls = set(adapter.attention_forward.__code__.co_varnames), 0
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for call in re.findall(r"= attention_interface\(\n(.*?)\n +\)\n", path.read_text(encoding="utf-8"), re.DOTALL):
            calls += 1
            unknown = set(re.findall(r"^ +(\w+)=", call, re.MULTILINE)) - names - adapter.HARMLESS - refused
            assert not unknown, f"{path.name}: {unknown}"
    assert calls > 100
