"""Generate with a Llama on triflash from prompts of several lengths, padded on the left, and compare with eager attention token for token.

    python examples/llama_generate.py                                # a tiny model with random weights, seconds on a CPU
    python examples/llama_generate.py --model meta-llama/Llama-3.2-1B --prompt "The sea is" --prompt "Once"

Needs: pip install 'triflash[hf]'
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import triflash
from triflash.integrations.transformers import register


def main() -> None:
    """Generate twice, greedily."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name for from_pretrained (default: a tiny one with random weights)")
    parser.add_argument("--prompt", action="append", help="a text; may be given several times; with --model alone")
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()

    register()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = None
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        batch = dict(tokenizer(options.prompt or ["The sea is", "Once upon a time there was"], padding=True, return_tensors="pt"))
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    else:
        sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100, pad_token_id=0, eos_token_id=None, bos_token_id=None))
        batch = {"input_ids": torch.randint(3, 100, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
        batch["input_ids"][0, :4], batch["attention_mask"][0, :4] = 0, 0
    model = model.to(device).eval()
    batch = {name: x.to(device) for name, x in batch.items()}

    written = {}
    for implementation in ("eager", "triattention"):
        model.set_attn_implementation(implementation)
        begin = time.perf_counter()
        with triflash.record_launches() as ran:
            written[implementation] = model.generate(**batch, max_new_tokens=options.tokens, do_sample=False)
        print(f"{implementation:12} {time.perf_counter() - begin:6.2f} s, triflash was called {len(ran)} times")
    print("token for token the same:", torch.equal(*written.values()))
    for row in written["triattention"]:
        print(tokenizer.decode(row, skip_special_tokens=True) if tokenizer else row.tolist())


if __name__ == "__main__":
    main()
