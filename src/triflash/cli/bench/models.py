"""Attention layers of models that people run, with their true sizes: what ``--sweep models`` looks for cliffs in.

Sizes are from each model's published configuration, which :data:`MODELS` names; batch and length are what it is trained or served with. The
list covers head dims from 8 to 256, every kind of band and bias, cross attention, and lengths that no tile divides.
"""

from __future__ import annotations

import fnmatch
import random
from dataclasses import dataclass

from .workloads import DECODE, NAMED, Workload

__all__ = ["LAYERS", "MODELS", "Model", "named", "sample"]


@dataclass(frozen=True)
class Model:
    """name: as its makers write it. config: where its sizes are from. layers: its attention layers, each as a workload."""

    name: str
    config: str
    layers: tuple[Workload, ...]


def _layer(name: str, about: str, batch: int, heads: int, length: int | tuple[int, int], head_dim: int, **more: object) -> Workload:
    """length: of queries and keys, or one of each."""
    queries, keys = (length, length) if isinstance(length, int) else length
    return Workload(name, batch, heads, queries, keys, head_dim, about=about, **more)  # type: ignore[arg-type]


def _padded(name: str, about: str, batch: int, heads: int, length: int | tuple[int, int], head_dim: int, **more: object) -> Workload:
    """Of a batch whose keys are padded: as many of each entry as :attr:`Workload.lengths` tells."""
    return _layer(name, about, batch, heads, length, head_dim, bias="b11k", bias_values="padding", **more)


MODELS = (
    # Language models: causal, grouped key heads, windows, soft caps, sinks, ALiBi.
    Model("Llama 3 8B", "meta-llama/Meta-Llama-3-8B, config.json", (
        NAMED["llama3-8b"],
        _layer("llama3-8b-chunk", "chunked prefill: 2k new tokens behind 14k", 1, 32, (2048, 16384), 128, kv_heads=8, hi=14336),
        DECODE["decode-llama3-8b-b8-8k"],
    )),
    Model("Qwen2.5 7B", "Qwen/Qwen2.5-7B, config.json", (
        _layer("qwen2.5-7b", "28 heads on 4, which no power of two divides", 4, 28, 4096, 128, kv_heads=4, hi=0),
        _layer("qwen2.5-7b-decode", "a token of each of 32 requests, 4k keys in the cache", 32, 28, (1, 4096), 128, kv_heads=4, cache=True),
    )),
    Model("Mistral 7B v0.1", "mistralai/Mistral-7B-v0.1, config.json", (NAMED["mistral-7b"],)),
    Model("Phi-3 mini 4k", "microsoft/Phi-3-mini-4k-instruct, config.json", (
        _layer("phi3-mini", "head dim 96, window 2047", 4, 32, 4096, 96, lo=-2046, hi=0),
    )),
    Model("Phi-2", "microsoft/phi-2, config.json", (_layer("phi2", "head dim 80", 8, 32, 2048, 80, hi=0),)),
    Model("GPT-2 XL", "openai-community/gpt2-xl, config.json", (_layer("gpt2-xl", "25 heads", 16, 25, 1024, 64, hi=0),)),
    Model("Falcon 7B", "tiiuae/falcon-7b, config.json", (_layer("falcon-7b", "71 heads on one", 4, 71, 2048, 64, kv_heads=1, hi=0),)),
    Model("Stable LM 2 12B", "stabilityai/stablelm-2-12b, config.json", (
        _layer("stablelm2-12b", "head dim 160", 2, 32, 4096, 160, kv_heads=8, hi=0),
    )),
    Model("BLOOM 7B1", "bigscience/bloom-7b1, config.json", (NAMED["bloom-7b"],)),
    Model("Gemma 2 9B", "google/gemma-2-9b, config.json", (NAMED["gemma2-9b-local"], NAMED["gemma2-9b-global"])),
    Model("Gemma 3 4B", "google/gemma-3-4b-pt, config.json", (
        _layer("gemma3-4b-local", "head dim 256, window 1024, five layers of six", 2, 8, 8192, 256, kv_heads=4, lo=-1023, hi=0),
    )),
    Model("gpt-oss 20B", "openai/gpt-oss-20b, config.json", (NAMED["gpt-oss-20b-local"], NAMED["gpt-oss-20b-global"])),
    Model("DeepSeek-V3", "deepseek-ai/DeepSeek-V3, config.json", (
        _layer("deepseek-v3", "multi-head latent attention, expanded: keys 192, values 128", 1, 128, 4096, 192, value_dim=128, hi=0),
    )),
    Model("MiniCPM3 4B", "openbmb/MiniCPM3-4B, config.json", (
        _layer("minicpm3-4b", "multi-head latent attention, expanded: keys 96, values 64", 2, 40, 4096, 96, value_dim=64, hi=0),
    )),
    # Encoders and encoder-decoders of text: padded batches, learned position biases, cross attention.
    Model("BERT large", "google-bert/bert-large-uncased, config.json", (NAMED["bert-large"],)),
    Model("ModernBERT large", "answerdotai/ModernBERT-large, config.json", (
        _layer("modernbert-large-local", "64 tokens to each side, two layers of three", 4, 16, 8192, 64, lo=-64, hi=64),
    )),
    Model("DeBERTa v3 large", "microsoft/deberta-v3-large, config.json; He et al. 2021, eq. 4", (
        _layer("deberta-v3-large", "position terms of disentangled attention as a bias", 16, 16, 512, 64, bias="bhqk", dbias=True),
    )),
    Model("T5 1.1 XL", "google/t5-v1_1-xl, config.json; Raffel et al. 2020: 114 targets of 512 tokens", (
        NAMED["t5-xl-encoder"],
        _layer("t5-xl-decoder", "causal, learned position bias, not scaled", 16, 32, 512, 64, hi=0, bias="1hqk", dbias=True, scale=1.0),
        _padded("t5-xl-cross", "cross attention to a padded batch, not scaled", 16, 32, (114, 512), 64, scale=1.0),
        DECODE["decode-t5-xl-512"],
    )),
    Model("Perceiver IO, language", "deepmind/language-perceiver, config.json", (
        _padded("perceiver-cross", "256 latents read 2,048 bytes: keys 32, values 160", 16, 8, (256, 2048), 32, value_dim=160),
    )),
    # Speech.
    Model("Whisper large v3", "openai/whisper-large-v3, config.json", (
        _layer("whisper-large-encoder", "30 s of sound: 1,500 frames", 16, 20, 1500, 64),
        _layer("whisper-large-decoder", "448 tokens", 16, 20, 448, 64, hi=0),
        _layer("whisper-large-cross", "448 tokens read 1,500 frames", 16, 20, (448, 1500), 64),
        _layer("whisper-large-decode", "a token of each of 16 recordings reads 1,500 frames", 16, 20, (1, 1500), 64, cache=True),
    )),
    Model("wav2vec 2.0 large", "facebook/wav2vec2-large-960h, config.json; crops of 250k samples", (
        _padded("wav2vec2-large", "up to 15.6 s of sound: 781 frames, padded", 16, 16, 781, 64),
    )),
    # Vision: lengths of squares plus one, windows.
    Model("CLIP ViT-L/14", "openai/clip-vit-large-patch14, config.json", (_layer("clip-l-text", "77 tokens", 256, 12, 77, 64, hi=0),)),
    Model("OpenCLIP ViT-bigG/14", "mlfoundations/open_clip, ViT-bigG-14.json", (_layer("clip-bigg", "head dim 104", 64, 16, 257, 104),)),
    Model("EVA02-CLIP-E/14", "mlfoundations/open_clip, EVA02-E-14.json", (_layer("eva02-clip-e", "head dim 112", 64, 16, 257, 112),)),
    Model("ViT-L/16", "google/vit-large-patch16-224 and -384, config.json", (
        NAMED["vit-l"],
        _layer("vit-l-384", "at 384: 577 tokens", 32, 16, 577, 64),
    )),
    Model("BEiT large at 512", "microsoft/beit-large-patch16-512, config.json", (
        _layer("beit-l-512", "1,025 tokens, learned relative position bias", 8, 16, 1025, 64, bias="1hqk", dbias=True),
    )),
    Model("SigLIP So400m/14 at 384", "google/siglip-so400m-patch14-384, config.json", (
        _layer("siglip-so400m", "head dim 72, 729 tokens", 32, 16, 729, 72),
    )),
    Model("Swin B", "microsoft/swin-base-patch4-window7-224, config.json", (NAMED["swin-b"], NAMED["swin-b-shifted"])),
    Model("Segment Anything ViT-H", "facebookresearch/segment-anything, build_sam.py", (
        _layer("sam-h-global", "4,096 tokens, decomposed position bias of each query", 1, 16, 4096, 80, bias="bhqk", dbias=True),
        _layer("sam-h-window", "25 windows of 14 x 14, likewise", 25, 16, 196, 80, bias="bhqk", dbias=True),
    )),
    Model("DETR R50", "facebook/detr-resnet-50, config.json", (
        _padded("detr-r50-cross", "100 object queries read 25 x 34 padded cells", 16, 8, (100, 850), 32),
    )),
    # Diffusion: images and films.
    Model("Stable Diffusion 1.5", "stable-diffusion-v1-5, unet/config.json: 8 heads of 320, 640 and 1,280 channels", (
        _layer("sd1.5-64", "64 x 64 latents, head dim 40", 8, 8, 4096, 40),
        _layer("sd1.5-32", "32 x 32 latents, head dim 80", 8, 8, 1024, 80),
        _layer("sd1.5-16", "16 x 16 latents, head dim 160", 8, 8, 256, 160),
        _layer("sd1.5-64-cross", "64 x 64 latents read 77 tokens, head dim 40", 8, 8, (4096, 77), 40),
    )),
    Model("Stable Diffusion XL", "stabilityai/stable-diffusion-xl-base-1.0, unet/config.json", (
        _layer("sdxl-64-cross", "64 x 64 latents read 77 tokens", 4, 10, (4096, 77), 64),
    )),
    Model("DiT-XL/2", "facebookresearch/DiT, models.py", (_layer("dit-xl", "256 tokens, head dim 72", 64, 16, 256, 72),)),
    Model("FLUX.1", "black-forest-labs/FLUX.1-dev, transformer/config.json", (
        _layer("flux.1", "512 tokens of text and 64 x 64 of an image", 2, 24, 4608, 128),
    )),
    Model("Wan 2.1 1.3B", "Wan-AI/Wan2.1-T2V-1.3B, config.json", (
        _layer("wan2.1-1.3b", "81 frames of 480 x 832: 21 x 30 x 52 tokens", 1, 12, 32760, 128),
        _layer("wan2.1-1.3b-cross", "these read 512 tokens of text", 1, 12, (32760, 512), 128),
    )),
    Model("AnimateDiff", "guoyww/animatediff-motion-adapter-v1-5-2, config.json", (
        _layer("animatediff-temporal", "16 frames at each of 64 x 64 places, guided, head dim 40", 8192, 8, 16, 40),
    )),
    # Structures of molecules, graphs, time series.
    Model("ESM-2 3B", "facebook/esm2_t36_3B_UR50D, config.json", (
        _padded("esm2-3b", "proteins of up to 1,024 residues", 8, 40, 1024, 64),
    )),
    Model("AlphaFold 3", "Abramson et al. 2024, supplement: algorithms 14 and 24", (NAMED["af3-triangle"], NAMED["af3-pair-bias"])),
    Model("OpenFold", "aqlaboratory/openfold, config.py", (NAMED["openfold-extra-msa"],)),
    Model("Graphormer base", "clefourrier/graphormer-base-pcqm4mv2, config.json", (
        _layer("graphormer-base", "molecules of 51 atoms and a node for all: head dim 24", 256, 32, 52, 24, bias="bhqk", dbias=True),
    )),
    Model("PatchTST/64", "yuqinie98/PatchTST, scripts of weather: 21 channels, batch 128", (
        _layer("patchtst", "64 patches of a time series, head dim 8", 2688, 16, 64, 8),
    )),
)  # fmt: skip
LAYERS = {layer.name: layer for model in MODELS for layer in model.layers}


def sample(count: int | None, seed: int) -> list[Workload]:
    """All layers, or ``count`` of them drawn by ``random.Random(seed)``, in the list's order. Raises ValueError if there are fewer."""
    if count is None:
        return list(LAYERS.values())
    if count > len(LAYERS):
        raise ValueError(f"--count {count}: wanted at most {len(LAYERS)}, as many as there are layers")
    drawn = set(random.Random(seed).sample(sorted(LAYERS), count))
    return [layer for name, layer in LAYERS.items() if name in drawn]


def named(name: str) -> list[Workload]:
    """The workloads of that name, or whose names start with it (``gemma2``, ``decode``) or match it (``decode-*``), or ``all`` of
    :data:`.workloads.NAMED`. Raises ValueError listing the names.
    """
    known = {**NAMED, **{n: w for n, w in LAYERS.items() if n not in DECODE}}
    if "*" in name:
        found = [w for n, w in (known | DECODE).items() if fnmatch.fnmatchcase(n, name)]
        if not found:
            raise ValueError(f"--workload {name}: no name matches; triflash bench --list shows them")
        return found
    if name.startswith("decode"):
        steps = [w for n, w in DECODE.items() if n == name or n.startswith(name + "-")]
        if not steps:
            raise ValueError(f"--workload {name}: wanted decode or one of {', '.join(DECODE)}")
        return steps
    found = list(NAMED.values()) if name == "all" else [known[name]] if name in known else []
    found = found or [w for n, w in known.items() if n.startswith(name + "-")]
    if not found:
        raise ValueError(f"--workload {name}: wanted all or one of {', '.join(known)}")
    return found
