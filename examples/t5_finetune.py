"""Fine-tune T5 with Hugging Face's Trainer on triflash; its learned position bias gets its gradient from fused kernels.

    python examples/t5_finetune.py                                   # a tiny model, seconds on a CPU
    python examples/t5_finetune.py --model google-t5/t5-small        # pretrained weights, downloaded
    python examples/t5_finetune.py --attention eager                 # the same without triflash

The task is synthetic: read digits, write them backwards. Needs: pip install 'triflash[hf]' accelerate
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

from triflash.integrations.transformers import register


class Backwards(Dataset):
    """Token ids 3 to 12 in, the same backwards out; 1 ends a sequence and 0 is padding."""

    def __init__(self, rows: int, longest: int):
        generator = torch.Generator().manual_seed(0)
        self.digits = torch.randint(3, 13, (rows, longest), generator=generator)
        self.lengths = torch.randint(2, longest + 1, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        n, room = int(self.lengths[row]), self.digits.shape[1] + 1
        ids, labels = torch.zeros(room, dtype=torch.long), torch.full((room,), -100)
        ids[:n], ids[n] = self.digits[row, :n], 1
        labels[:n], labels[n] = self.digits[row, :n].flip(0), 1
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def main() -> None:
    """Train, and show one sequence that the model writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name for from_pretrained (default: a tiny one with random weights)")
    parser.add_argument("--attention", default="triattention")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--longest", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=2)
    options = parser.parse_args()

    register()
    torch.manual_seed(0)
    if options.model:
        model = T5ForConditionalGeneration.from_pretrained(options.model, attn_implementation=options.attention)
    else:
        config = T5Config(vocab_size=16, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)
        config._attn_implementation = options.attention
        model = T5ForConditionalGeneration(config)

    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    before = table.detach().clone()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=options.epochs, per_device_train_batch_size=32, learning_rate=3e-3, logging_steps=16,
            bf16=torch.cuda.is_available(), save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=Backwards(options.rows, options.longest)).train()
    print(f"the position bias moved by {(table.detach().cpu() - before).abs().max():.3f}")
    row = Backwards(1, options.longest)[0]
    written = model.eval().generate(row["input_ids"][None].to(model.device), max_new_tokens=options.longest + 1)
    print("read ", row["input_ids"].tolist(), "\nwrote", written[0, 1:].tolist())


if __name__ == "__main__":
    main()
