"""Models of transformers under test: ``FAMILIES``, tiny ones with their batches, and what is asked of them.

``FAMILIES`` is also what docs/integrations.md shows: ``python tests/families.py`` prints the table. Used by test_transformers*.py.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)
import transformers

import triflash
from triflash.integrations import patches
from triflash.integrations import transformers as adapter

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
           why="chunks are packed sequences"),
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


@dataclass
class Seen:
    """One call of ``attention``, of ``attention_with_kvcache`` (cached) or of ``attention_varlen`` (packed): q, k and v, and its keywords."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    cached: bool = False
    packed: bool = False

    @property
    def lean(self) -> bool:
        """Whether no mask varies over queries and keys, nor a bias that is one in disguise: that hides."""
        mask, bias = self.options.get("mask"), self.options.get("bias")
        return (mask is None or mask.shape[-2] == 1) and (bias is None or bias.shape[-2] == 1 or bool(bias.min() > -50))


def spied(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """Every call of ``attention`` that the adapter makes."""
    found: list[Seen] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        found.append(Seen(q, k, v, options))
        return triflash.attention(q, k, v, **options)

    def spy_of_caches(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        found.append(Seen(q, k, v, options, cached=True))
        return triflash.attention_with_kvcache(q, k, v, **options)

    def spy_of_blocks(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, **options: Any) -> Any:
        found.append(Seen(q, k, v, {**options, "cu_seqlens": offsets}, packed=True))
        return triflash.attention_varlen(q, k, v, offsets, **options)

    monkeypatch.setattr(adapter, "attention", spy)
    monkeypatch.setattr(adapter, "attention_varlen", spy_of_blocks)
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


def table() -> str:
    """The families of docs/integrations.md, from FAMILIES and from what refuses."""
    rows = ["| family | use | masks | |", "| --- | --- | --- | --- |"]
    how = {"as is": "`attn_implementation`", "patch": "`patch(model)`"}
    rows += [f"| {f.name} | {how[f.use]} | {'lean' if f.lean else 'whole'} | {f.why} |" for f in FAMILIES]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
