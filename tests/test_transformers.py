"""Hugging Face models under ``attn_implementation="triattention"`` against the same models under "eager": logits, loss, every gradient.

``FAMILIES`` is also what docs/integrations.md shows: ``python tests/test_transformers.py`` prints the table.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
import re
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)
import transformers

import triflash
from triflash.integrations import patches, visible
from triflash.integrations import transformers as adapter
from triflash.integrations.visible import Visible, lean_mask, own_attention, refuse_unrouted

ROOT = Path(__file__).parent.parent
VOCABULARY, B, L = 40, 3, 12
HEADS = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
DECODER = dict(vocab_size=VOCABULARY, max_position_embeddings=64, **HEADS)
T5 = dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
          relative_attention_max_distance=16, dropout_rate=0.0, decoder_start_token_id=0)  # fmt: skip
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
VISION = dict(image_size=8, patch_size=2, **HEADS)


@dataclass(frozen=True)
class Family:
    """A model class and a tiny configuration. use: as is, by patch, or refused. lean: no (M, N) mask. why: what a mask is made for, or not."""

    name: str
    model: str
    config: str
    sizes: dict[str, Any]
    kind: str = "causal"
    use: str = "as is"
    lean: bool = True
    why: str = ""
    reference: str = "eager"
    since: tuple[int, int] = (5, 20)  # of transformers


FAMILIES = [
    Family("T5", "T5ForConditionalGeneration", "T5Config", T5, "seq2seq", why="the position bias has its gradient"),
    Family("mT5", "MT5ForConditionalGeneration", "MT5Config", T5, "seq2seq", why="likewise"),
    Family("UMT5", "UMT5ForConditionalGeneration", "UMT5Config", T5, "seq2seq", why="likewise, a bias in every layer"),
    Family("LongT5", "LongT5ForConditionalGeneration", "LongT5Config", {**T5, "encoder_attention_type": "local", "local_radius": 3}, "seq2seq",
           why="its decoder; the encoder's local attention is the model's own"),
    Family("Llama", "LlamaForCausalLM", "LlamaConfig", {**DECODER, "num_key_value_heads": 2}),
    Family("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "num_key_value_heads": 2, "head_dim": 8}),
    Family("Mistral", "MistralForCausalLM", "MistralConfig", {**DECODER, "num_key_value_heads": 2, "sliding_window": 5}, why="windows"),
    Family("Gemma-2", "Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5,
           "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}, why="soft cap, windows"),
    Family("Gemma-3", "Gemma3ForCausalLM", "Gemma3TextConfig", {**DECODER, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5,
           "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}, why="windows"),
    Family("gpt-oss", "GptOssForCausalLM", "GptOssConfig", {**DECODER, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5,
           "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
           why="sinks with their gradient, windows"),
    Family("Llama-4", "Llama4ForCausalLM", "Llama4TextConfig", {**DECODER, "num_key_value_heads": 2, "head_dim": 8, "attention_chunk_size": 5,
           "num_local_experts": 2, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48, "no_rope_layers": [1, 0]},
           lean=False, why="chunked layers, once a sequence is longer than a chunk"),
    Family("GPT-2", "GPT2LMHeadModel", "GPT2Config", dict(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4,
           resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    Family("DeepSeek-V3", "DeepseekV3ForCausalLM", "DeepseekV3Config", {**DECODER, "num_key_value_heads": 4, "q_lora_rank": 16,
           "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 2},
           why="head dims of keys and values that differ"),
    Family("BERT", "BertForMaskedLM", "BertConfig", {**DECODER, **NO_DROPOUT}, "encoder"),
    Family("ModernBERT", "ModernBertForMaskedLM", "ModernBertConfig", {**DECODER, "local_attention": 6, "global_attn_every_n_layers": 2,
           "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}, "encoder", why="two-sided windows"),
    Family("ESM", "EsmForMaskedLM", "EsmConfig", {**DECODER, **NO_DROPOUT, "pad_token_id": 0, "mask_token_id": 1,
           "position_embedding_type": "rotary"}, "encoder"),
    Family("ViT", "ViTForImageClassification", "ViTConfig", {**VISION, **NO_DROPOUT}, "image"),
    Family("CLIP text", "CLIPTextModelWithProjection", "CLIPTextConfig", {**DECODER, "projection_dim": 16, "eos_token_id": 2}, "text"),
    Family("Whisper", "WhisperForConditionalGeneration", "WhisperConfig", dict(vocab_size=VOCABULARY, num_mel_bins=6, encoder_layers=2,
           decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, d_model=32,
           max_source_positions=8, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
           "speech to text"),
    Family("BEiT", "BeitForImageClassification", "BeitConfig", {**VISION, **NO_DROPOUT, "use_relative_position_bias": True}, "image",
           why="the relative position bias has its gradient"),
    Family("wav2vec2-conformer", "Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig", {**HEADS, **NO_DROPOUT, "vocab_size": VOCABULARY,
           "conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (4, 4), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
           "num_conv_pos_embedding_groups": 2, "position_embeddings_type": "relative", "conv_depthwise_kernel_size": 3,
           "feat_proj_dropout": 0.0, "hidden_dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0, "conformer_conv_dropout": 0.0,
           "layerdrop": 0.0, "final_dropout": 0.0, "mask_time_prob": 0.0, "apply_spec_augment": False}, "speech", why="its bias is (B, H, M, N), of queries"),
    Family("LayoutLMv3", "LayoutLMv3ForTokenClassification", "LayoutLMv3Config", {**DECODER, **NO_DROPOUT, "max_2d_position_embeddings": 32,
           "coordinate_size": 6, "shape_size": 4, "visual_embed": False, "pad_token_id": 0, "has_relative_attention_bias": True,
           "has_spatial_attention_bias": True, "rel_pos_bins": 8, "max_rel_pos": 16, "rel_2d_pos_bins": 8, "max_rel_2d_pos": 16}, "layout", why="its bias is (B, H, M, N), of positions on a page; from transformers 5.24", since=(5, 24)),
    Family("Swin", "SwinForImageClassification", "SwinConfig", {**NO_DROPOUT, "image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2],
           "num_heads": [2], "window_size": 4, "drop_path_rate": 0.0}, "image", lean=False,
           why="bias plus the mask of shifted windows, (windows · B, H, S, S); patch(model) keeps them apart"),
    Family("Swin, patched", "SwinForImageClassification", "SwinConfig", {**NO_DROPOUT, "image_size": 16, "patch_size": 2, "embed_dim": 16,
           "depths": [2], "num_heads": [2], "window_size": 4, "drop_path_rate": 0.0}, "image", "patch", lean=False,
           why="the bias has its gradient beside a bool mask for the windows of one image"),
    Family("Swin V2, patched", "Swinv2ForImageClassification", "Swinv2Config", {**NO_DROPOUT, "image_size": 16, "patch_size": 2,
           "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4, "drop_path_rate": 0.0}, "image", "patch", lean=False,
           why="likewise"),
    Family("DeBERTa-v2", "DebertaV2ForMaskedLM", "DebertaV2Config", {**DECODER, **NO_DROPOUT, "relative_attention": True, "pos_att_type": "p2c|c2p",
           "position_buckets": 4, "pad_token_id": 0, "type_vocab_size": 0}, "encoder", "patch", lean=False,
           why="its bias is (B, H, M, N), of contents with positions, with its gradient; the mask is the model's"),
    Family("BLOOM", "BloomForCausalLM", "BloomConfig", dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0,
           attention_dropout=0.0), use="patch", why="ALiBi as a row of keys for each head"),
    Family("MPT", "MptForCausalLM", "MptConfig", dict(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=32),
           use="patch", why="likewise"),
    Family("Falcon", "FalconForCausalLM", "FalconConfig", dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2,
           num_attention_heads=4, hidden_dropout=0.0, attention_dropout=0.0, multi_query=True, new_decoder_architecture=False, alibi=False),
           use="patch", lean=False, why="the model asks for a whole mask"),
    Family("Falcon, ALiBi", "FalconForCausalLM", "FalconConfig", dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2,
           num_attention_heads=4, hidden_dropout=0.0, attention_dropout=0.0, multi_query=False, new_decoder_architecture=False, alibi=True),
           use="patch", lean=False, why="its mask holds the ALiBi, (B, H, M, N)", reference="sdpa"),  # "eager" adds the ALiBi twice
]  # fmt: skip
NAMES = [family.name for family in FAMILIES]
BY_NAME = dict(zip(NAMES, FAMILIES, strict=True))


@pytest.fixture(autouse=True)
def registered() -> None:
    adapter.register()


@dataclass
class Seen:
    """One call of ``attention``, or of ``attention_with_kvcache``: q, k and v, and its keywords."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    cached: bool = False

    @property
    def lean(self) -> bool:
        """Whether no mask varies over queries and keys, nor a bias that is one in disguise: that hides."""
        mask, bias = self.options.get("mask"), self.options.get("bias")
        return (mask is None or mask.shape[-2] == 1) and (bias is None or bias.shape[-2] == 1 or bool(bias.min() > -50))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Seen]]:
    """Every call of ``attention`` that the adapter makes."""
    found: list[Seen] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        found.append(Seen(q, k, v, options))
        return triflash.attention(q, k, v, **options)

    def spy_of_caches(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        found.append(Seen(q, k, v, options, cached=True))
        return triflash.attention_with_kvcache(q, k, v, **options)

    monkeypatch.setattr(adapter, "attention", spy)
    monkeypatch.setattr(adapter, "attention_with_kvcache", spy_of_caches)
    monkeypatch.setattr(patches, "attention", spy)
    return found


def made(family: Family, implementation: str = "eager", **changes: Any) -> Any:
    config = getattr(transformers, family.config)(**{**family.sizes, **changes})
    torch.manual_seed(1)
    config._attn_implementation = implementation
    model = getattr(transformers, family.model)(config)
    for p in model.parameters():  # tables of zeros, and sinks, are to count
        p.data.add_(0.1 * torch.randn_like(p))
    return model


def padding(side: str, length: int = L) -> Tensor:
    mask = torch.ones(B, length, dtype=torch.long)
    for b, hidden in enumerate((3, 0, 5)):
        if side == "right" and hidden:
            mask[b, -hidden:] = 0
        elif side == "left":
            mask[b, :hidden] = 0
        elif side == "holes":
            mask[b, 2 : 2 + hidden] = 0
    return mask


def inputs(kind: str, side: str = "right") -> dict[str, Tensor]:
    """A batch; what is padding has no label, and neither has what padding alone predicts."""
    torch.manual_seed(2)
    ids, mask = torch.randint(3, VOCABULARY, (B, L)), padding(side)
    labels = ids.masked_fill(mask == 0, -100)
    if kind == "causal":
        before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]  # label i is predicted at i − 1
        return dict(input_ids=ids, attention_mask=mask, labels=labels.masked_fill(before == 0, -100))
    if kind == "seq2seq":
        return dict(input_ids=ids, attention_mask=mask, labels=torch.randint(3, VOCABULARY, (B, 7)))
    if kind in ("encoder", "text"):
        ids[torch.arange(B), mask.sum(-1) - 1] = 2
        return dict(input_ids=ids, attention_mask=mask) | (dict(labels=labels) if kind == "encoder" else {})
    if kind == "image":
        return dict(pixel_values=torch.randn(B, 3, 8, 8) if side != "large" else torch.randn(B, 3, 16, 16), labels=torch.tensor([0, 1, 0]))
    if kind == "layout":
        return dict(input_ids=ids, attention_mask=mask, bbox=torch.randint(0, 5, (B, L, 4)).sort(-1).values, labels=labels.clamp(max=1))
    if kind == "speech":
        samples = torch.ones(B, 16 * L, dtype=torch.long)
        samples[0, -50:] = 0
        return dict(input_values=torch.randn(B, 16 * L), attention_mask=samples, labels=torch.randint(3, VOCABULARY, (B, 3)))
    assert kind == "speech to text"
    return dict(input_features=torch.randn(B, 6, 16), labels=torch.randint(3, VOCABULARY, (B, 7)))


def results(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits where there is something to predict, the loss, and the gradient of every parameter."""
    model.zero_grad()
    out = model(**batch)
    logits = out.logits if hasattr(out, "logits") else out.text_embeds
    mask = batch.get("attention_mask")
    if mask is not None and logits.shape[:2] == mask.shape:
        logits = logits[mask.bool()]
    loss = out.loss if getattr(out, "loss", None) is not None else (logits * torch.linspace(-1, 1, logits.shape[-1])).sum()
    loss.backward()
    found = {f"∂{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "loss": loss.detach(), **found}


def same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        scale = max(float(x.abs().max()), 1e-2)
        assert float((got[name] - x).abs().max()) <= tolerance * scale, f"{name}: {float((got[name] - x).abs().max())} of {scale}"


def ours(family: Family, model: Any) -> Any:
    """The same model with triflash in it, as the family's row says."""
    model = copy.deepcopy(model)
    if family.use == "patch":
        return adapter.patch(model)
    model.set_attn_implementation(adapter.NAME)
    return model


def sides(family: Family) -> list[str]:
    if family.kind == "image":
        return ["large" if "Swin" in family.name else "right"]
    if family.kind in ("seq2seq", "causal", "encoder", "layout"):
        return ["none", "right", "left"]
    return ["right"]


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
    names = ("causal", "window", "mask", "key_lengths")
    return {n: tuple(x.shape) if isinstance(x, Tensor) else x for n in names if (x := call.options.get(n)) is not None and x is not False}


@pytest.mark.parametrize(
    ("name", "side", "want"),
    [
        ("Llama", "none", {"causal": True}),
        ("Llama", "right", {"causal": True, "key_lengths": (B,)}),
        ("Llama", "left", {"causal": True, "mask": (B, 1, 1, L)}),
        ("Llama", "holes", {"causal": True, "mask": (B, 1, 1, L)}),
        ("Mistral", "none", {"causal": True, "window": (4, 0)}),
        ("Mistral", "right", {"causal": True, "window": (4, 0), "key_lengths": (B,)}),
        ("Mistral", "left", {"causal": True, "window": (4, 0), "mask": (B, 1, 1, L)}),
        ("BERT", "none", {}),
        ("BERT", "right", {"key_lengths": (B,)}),
        ("ModernBERT", "right", {"window": (3, 3), "key_lengths": (B,)}),
        ("Llama-4", "none", {"mask": (B, 1, L, L)}),
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
    distance = torch.arange(N)[None] - torch.arange(M)[:, None] - (0 if seen.top_left else N - M)
    shown = torch.ones(B, 1, M, N, dtype=torch.bool)
    if seen.left is not None:
        shown &= distance >= -seen.left
    if seen.right is not None:
        shown &= distance <= seen.right
    if seen.keys is not None:
        shown &= seen.keys
    if seen.used is not None:
        mask = seen.options()["mask"]
        return mask.expand(B, 1, M, N)
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
        assert torch.equal(dense(seen), theirs.sdpa_mask(**given, allow_is_causal_skip=False)), (M, N, q_offset, kv_offset, seen)
        lean += isinstance(seen, Visible)
    assert lean >= (1 if kind == "chunk" else 5)


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
        assert isinstance(seen, Visible) and seen.used is not None
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
        options = {name: x for name, x in call.options.items() if name not in ("bias", "mask", "key_lengths")}
        bias, mask, lengths = (call.options.get(name) for name in ("bias", "mask", "key_lengths"))
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


def test_a_prefix_without_a_cache_aligns_to_the_top_left() -> None:
    """A mask longer than the queries without a cache, as prefix tuning has it, aligns to the top left, as eager attention does."""
    family = BY_NAME["Llama"]
    config = transformers.LlamaConfig(**family.sizes)
    config._attn_implementation = adapter.NAME
    hidden, mask = torch.zeros(B, 5, 32), torch.ones(B, 8, dtype=torch.long)
    made_by = transformers.masking_utils.create_causal_mask
    seen = made_by(config, hidden, mask, *([None] if "cache_position" not in made_by.__code__.co_varnames else [torch.arange(5), None]))
    assert (seen.left, seen.right, seen.top_left, seen.shape) == (None, 0, True, (B, 1, 5, 8))


# Caches and generation, token for token.


def generated(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    return model.eval().generate(**batch, max_new_tokens=8, min_new_tokens=8, pad_token_id=0, do_sample=False, **options)


def both(name: str, side: str = "left") -> tuple[Any, Any, dict[str, Tensor]]:
    """The model under its reference, ours, and what to generate from."""
    family = BY_NAME[name]
    model, batch = made(family, family.reference), inputs(family.kind, side)
    batch.pop("labels")
    return model, ours(family, model), batch


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma-3", "gpt-oss", "Llama-4", "GPT-2", "T5", "Whisper", "BLOOM", "MPT", "Falcon"])
def test_generate(name: str, cache: str, calls: list[Seen]) -> None:
    theirs, mine, batch = both(name)
    options: dict[str, Any] = {"use_cache": cache != "none"} | ({"cache_implementation": cache} if cache == "static" else {})
    if cache == "static" and name in ("MPT", "BLOOM", "Falcon") and not getattr(theirs, "_can_compile_fullgraph", False):
        pytest.skip("the model has no static caches")
    want = generated(theirs, batch, **options)
    calls.clear()
    assert torch.equal(generated(mine, batch, **options), want)
    decoding = [call for call in calls if call.q.shape[1] == 1]
    assert calls and (decoding or cache == "none")
    if name not in ("BLOOM", "MPT", "Falcon"):  # their own attention calls triflash's
        assert all(call.cached for call in decoding if call.k.shape[1] > 1)
    if cache == "dynamic" and name in ("Llama", "Mistral", "Gemma-3", "gpt-oss", "GPT-2", "T5", "BLOOM", "MPT"):
        assert all(call.lean for call in calls)


@pytest.mark.parametrize("name, full_layers", [("Llama", 2), ("Gemma-2", 1), ("T5", 2)])
def test_static_caches_take_no_mask(name: str, full_layers: int, calls: list[Seen]) -> None:
    """Where the device alone knows how full a cache is, layers that see all of it are told by its length: no mask of queries."""
    theirs, mine, batch = both(name)
    options: dict[str, Any] = {"cache_implementation": "static"}
    want = generated(theirs, batch, **options)
    calls.clear()
    assert torch.equal(generated(mine, batch, **options), want)
    told = [call for call in calls if call.cached and (own := call.options["cache_lengths"]) is not None and own.stride() == (0,)]
    assert len(told) == 7 * full_layers and all(call.lean and call.options["causal"] for call in told)
    assert all((call.options["mask"] is None) == (name == "T5") for call in told)  # a row of keys where the prompt is padded
    assert all((call.options["bias"] is not None) == (name == "T5") for call in told)


def test_compiled_steps_on_a_static_cache(calls: list[Seen]) -> None:
    """As ``generate`` compiles them on GPUs: without a break, token for token."""
    theirs, mine, batch = both("Llama")
    want = generated(theirs, batch, cache_implementation="static")
    config = transformers.CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    torch.compiler.reset()
    assert torch.equal(generated(mine, batch, cache_implementation="static", compile_config=config), want)


def test_gradients_through_a_static_cache(calls: list[Seen]) -> None:
    """Then a mask is made, and ``attention`` has the gradient."""
    theirs, mine, batch = both("Llama", "none")
    found = []
    for model in (theirs, mine):
        cache = transformers.StaticCache(config=model.config, max_cache_len=20)
        with torch.no_grad():
            model(batch["input_ids"], past_key_values=cache)
        x = torch.randn(B, 2, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
        model.requires_grad_(False)
        y = model(inputs_embeds=x, past_key_values=cache).logits
        found.append(torch.autograd.grad(y.sum(), x)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
    assert any(call.q.shape[1] == 2 and not call.cached for call in calls)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "T5"])
def test_beam_search(name: str) -> None:
    theirs, mine, batch = both(name)
    assert torch.equal(generated(mine, batch, num_beams=3), generated(theirs, batch, num_beams=3))


def test_assisted_generation(calls: list[Seen]) -> None:
    """Several new tokens beside a cache at a time: M < N, and M > 1."""
    theirs, mine, batch = both("Llama")
    one = {name: x[1:2] for name, x in batch.items()}
    helper = made(BY_NAME["Llama"], num_hidden_layers=1).eval()
    want = generated(theirs, one, assistant_model=helper)
    calls.clear()
    assert torch.equal(generated(mine, one, assistant_model=helper), want)
    assert any(1 < call.q.shape[1] < call.k.shape[1] for call in calls) and all(call.lean for call in calls)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_chunked_prefill(name: str, calls: list[Seen]) -> None:
    theirs, mine, batch = both(name)
    want = generated(theirs, batch)
    calls.clear()
    assert torch.equal(generated(mine, batch, prefill_chunk_size=5), want)
    assert any(1 < call.q.shape[1] < call.k.shape[1] for call in calls) and all(call.lean for call in calls)


# Masks that a model or its user brings.


def test_packed_rows(calls: list[Seen]) -> None:
    """Several sequences in a row, told by position_ids alone: a 4-dim mask."""
    family = BY_NAME["Llama"]
    model, batch = made(family), inputs("causal", "none")
    del batch["attention_mask"]
    batch["position_ids"] = torch.cat([torch.arange(n) for n in (4, 5, 3)]).expand(B, L)
    batch["use_cache"] = False  # with a cache transformers takes them for one sequence
    want = results(model, batch)
    calls.clear()
    same(results(ours(family, model), batch), want)
    assert [said(call) for call in calls] == [{"mask": (B, 1, L, L)}] * 2


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


# Training as people do it.


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Llama", "T5", "Mistral", "BEiT"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    family = BY_NAME[name]
    model, batch = made(family), inputs(family.kind, "left")
    want = results(model, batch)
    mine = ours(family, model)
    enable = getattr(mine, "activation_checkpointing_enable", mine.gradient_checkpointing_enable)
    enable(dict(use_reentrant=reentrant))
    if reentrant:  # whose inputs must want a gradient
        mine.enable_input_require_grads()
    same(results(mine.train(), batch), want)


@pytest.mark.parametrize("name", ["Llama", "T5", "gpt-oss"])
def test_bfloat16(name: str) -> None:
    family = BY_NAME[name]
    model, batch = made(family, **SMOOTH.get(family.name, {})), inputs(family.kind)
    exact = results(model, batch)
    eager = results(copy.deepcopy(model).bfloat16(), batch)
    got = results(ours(family, copy.deepcopy(model).bfloat16()), batch)
    near(got, eager, exact)


def test_autocast() -> None:
    family = BY_NAME["T5"]
    model, batch = made(family, **SMOOTH.get(family.name, {})), inputs(family.kind)
    exact = results(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        eager = results(model, batch)
        got = results(ours(family, model), batch)
    near(got, eager, exact)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["Llama", "T5", "Gemma-3", "BEiT", "ModernBERT"])
def test_compile(name: str) -> None:
    """One graph, and padding of any kind without looking at it."""
    family = BY_NAME[name]
    model = ours(family, made(family))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for side in ("right", "left"):
        batch = inputs(family.kind, side)
        want = results(model, batch)
        same({name.replace("_orig_mod.", ""): x for name, x in results(compiled, batch).items()}, want)


@pytest.mark.unpoisoned
def test_export() -> None:
    family = BY_NAME["Llama"]
    model, batch = ours(family, made(family)).eval(), inputs("causal", "left")
    del batch["labels"]
    shown = batch["attention_mask"].bool()
    exported = torch.export.export(model, (), {**batch, "use_cache": False})
    assert any("triflash" in str(node.target) for node in exported.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(**batch, use_cache=False).logits[shown], model(**batch).logits[shown])


def test_trainer(tmp_path: Path) -> None:
    """An epoch of Trainer with both: the same losses, the same weights."""
    pytest.importorskip("accelerate")
    torch.manual_seed(3)
    rows = [dict(input_ids=torch.randint(3, VOCABULARY, (L,)), labels=torch.randint(3, VOCABULARY, (6,))) for _ in range(8)]
    family, losses, weights = BY_NAME["T5"], [], []
    for implementation in ("eager", adapter.NAME):
        model = made(family, implementation)
        options = transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=1, per_device_train_batch_size=2, logging_steps=1, report_to=[], use_cpu=True, seed=0,
            save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=options, train_dataset=rows)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights.append(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.detach().cpu())
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)


def test_dropout_drops_and_scales(calls: list[Seen]) -> None:
    """The probability reaches the kernels in training alone; the mean over many draws is the result without."""
    family = BY_NAME["T5"]
    model = ours(family, made(family, dropout_rate=0.25))
    model.train()(**inputs("seq2seq"))
    assert {call.options["dropout_p"] for call in calls} == {0.25}
    calls.clear()
    model.eval()(**inputs("seq2seq"))
    assert {call.options["dropout_p"] for call in calls} == {0.0}


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
        (dict(cu_seq_lens_q=torch.tensor([0, 4])), TypeError, "cu_seq_lens_q: .*position_ids"),
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


# On a GPU, and the examples.


SMOOTH = {"T5": {"feed_forward_proj": "gated-gelu"}}  # beside 16 bits a ReLU's gradient is there or not, by a rounding


def near(got: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """In 16 bits: as near to float32 as eager attention is, within a factor of two, for gradients of four. (A position bias's sums what
    should cancel over each row, and there the rounding of the output tells: docs/semantics.md, "Confident attention in 16 bits".)
    """
    assert got.keys() == eager.keys() == exact.keys()
    for key, x in exact.items():
        error, plain = (float((y[key].float() - x).norm()) for y in (got, eager))
        assert error <= (4 if key[0] == "∂" else 2) * plain + 2e-2 * float(x.norm()) + 1e-4, (
            f"{key}: {error}, {plain}, of {float(x.norm())}"
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["T5", "Llama", "gpt-oss", "Mistral", "Swin, patched"])
def test_on_a_gpu(name: str) -> None:
    """In bfloat16, by fused kernels alone."""
    family = BY_NAME[name]
    side = "large" if family.kind == "image" else "left"
    model = made(family, **SMOOTH.get(family.name, {})).cuda()
    batch = {key: x.cuda() for key, x in inputs(family.kind, side).items()}
    exact = results(model, batch)
    half = {key: x.bfloat16() if x.is_floating_point() else x for key, x in batch.items()}
    eager = results(copy.deepcopy(model).bfloat16(), half)
    with triflash.record_launches() as ran:
        got = results(ours(family, copy.deepcopy(model).bfloat16()), half)
    assert ran and not any(launch.startswith(("tiled", "oracle")) for launch in ran), ran
    near(got, eager, exact)


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["T5", "Llama"])
def test_inductor_on_a_gpu(name: str) -> None:
    """One graph through Inductor under autocast, forward and backward."""
    family = BY_NAME[name]
    plain_model = made(family, **SMOOTH.get(family.name, {})).cuda()
    model = ours(family, plain_model)
    batch = {key: x.cuda() for key, x in inputs(family.kind, "left").items()}
    torch._dynamo.reset()
    with torch.autocast("cuda", torch.bfloat16):
        got = results(torch.compile(model, fullgraph=True), batch)
        eager = results(plain_model, batch)
    near({key.replace("_orig_mod.", ""): x for key, x in got.items()}, eager, results(plain_model, batch))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["T5", "Llama", "Gemma-3"])
def test_generation_on_a_gpu(name: str) -> None:
    """Static caches, which transformers compiles there, and dynamic ones: the tokens of eager attention, in float32."""
    theirs, mine, batch = both(name)
    batch = {key: x.cuda() for key, x in batch.items()}
    want = generated(theirs.cuda(), batch)
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(generated(mine.cuda(), batch, **options), want)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("t5_finetune.py", ["--rows", "64", "--epochs", "1", "--longest", "4"], "the position bias moved by 0.0"),
        ("llama_generate.py", ["--tokens", "4"], "token for token the same: True"),
    ],
)
def test_examples(name: str, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "t5_finetune.py":
        pytest.importorskip("accelerate")
    path = ROOT / "examples" / name
    assert path.read_text().count("\n") <= 80
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    with triflash.record_launches() as ran:
        runpy.run_path(str(path), run_name="__main__")
    assert says in capsys.readouterr().out
    assert ran or name == "llama_generate.py"  # which records its own


# What the page says, and what a new transformers may bring.


def table() -> str:
    """The families of docs/integrations.md, from FAMILIES and from what refuses."""
    rows = ["| family | use | masks | |", "| --- | --- | --- | --- |"]
    how = {"as is": "`attn_implementation`", "patch": "`patch(model)`"}
    rows += [f"| {f.name} | {how[f.use]} | {'lean' if f.lean else 'whole'} | {f.why} |" for f in FAMILIES]
    return "\n".join(rows)


def test_the_page_has_the_table() -> None:
    """After a change: python3 tests/test_transformers.py, which prints it."""
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
            unknown = set(re.findall(r"^ +(\w+)=", call, re.MULTILINE)) - names - adapter.HARMLESS - set(adapter.PACKED) - refused
            assert not unknown, f"{path.name}: {unknown}"
    assert calls > 100


if __name__ == "__main__":
    print(table())
