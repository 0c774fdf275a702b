"""Training steps of Hugging Face models on this GPU: tokens a second by triflash, SDPA and eager attention, in turns, in one process.

    python3 scripts/hf_speed.py [--only t5-large] [--steps 10] [--implementations triattention,sdpa,eager]

Random weights in bf16, forward and backward, no optimiser. What runs out of memory says so. Times are medians of steps, by CUDA events.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
import transformers

import triflash
from triflash.integrations.transformers import register

T5_LARGE = dict(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16, dropout_rate=0.0, decoder_start_token_id=0)
LLAMA_1B = dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, vocab_size=32128
)  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any], int, int]] = {  # model, config, sizes, batch, length
    "t5-large s512": ("T5ForConditionalGeneration", "T5Config", T5_LARGE, 16, 512),
    "t5-large s2048": ("T5ForConditionalGeneration", "T5Config", T5_LARGE, 4, 2048),
    "llama-1b s4096": ("LlamaForCausalLM", "LlamaConfig", LLAMA_1B, 4, 4096),
    "llama-1b s8192 window 1024": ("MistralForCausalLM", "MistralConfig", {**LLAMA_1B, "sliding_window": 1024}, 2, 8192),
}


def prepared(case: str, padded: bool) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model, and a batch whose entries end at 1, 7/8, 3/4, … of the length if it is padded."""
    model_class, config_class, sizes, batch, length = CASES[case]
    config = getattr(transformers, config_class)(**sizes)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = getattr(transformers, model_class)(config).bfloat16()
        ids = torch.randint(3, 32000, (batch, length))
        ends = length - length // 8 * (torch.arange(batch) % 4) if padded else torch.full((batch,), length)
        mask = (torch.arange(length) < ends[:, None]).long()
        labels = ids.masked_fill(mask == 0, -100)
    return model, {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Milliseconds of one forward and backward pass."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    model.zero_grad()
    begin.record()
    model(**batch, **({} if model.config.is_encoder_decoder else {"use_cache": False})).loss.backward()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--implementations", default="triattention,sdpa,eager")
    options = parser.parse_args()
    register()
    names = options.implementations.split(",")
    versions = ", ".join(f"{package.__name__} {package.__version__}" for package in (torch, transformers, triflash))
    print(f"{torch.cuda.get_device_name()}, {versions}")
    for case in [case for case in CASES if options.only in case]:
        for padded in (False, True):
            model, batch = prepared(case, padded)
            tokens = batch["attention_mask"].numel() * (2 if model.config.is_encoder_decoder else 1)
            times: dict[str, list[float]] = {name: [] for name in names}
            memory = {}
            for turn in range(options.steps + 3):
                for name in [name for name in names if name in times]:
                    try:
                        model.set_attn_implementation(name)
                        torch.cuda.reset_peak_memory_stats()
                        taken = step(model, batch)
                        memory[name] = torch.cuda.max_memory_allocated() / 2**30
                    except torch.OutOfMemoryError:
                        del times[name]
                        model.zero_grad()
                        torch.cuda.empty_cache()
                        continue
                    if turn >= 3:
                        times[name].append(taken)
            for name in names:
                what = f"{case:28} {'padded' if padded else 'full':7} {name:13}"
                if name not in times:
                    print(what, "out of memory")
                    continue
                ms = statistics.median(times[name])
                print(f"{what} {ms:8.1f} ms {tokens / ms:8.1f} k tokens/s {memory[name]:6.1f} GiB")
            del model, batch
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
