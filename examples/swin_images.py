"""Train a Swin transformer on synthetic images; its tables of relative positions get their gradient from fused kernels.

    python examples/swin_images.py                                                    # a tiny model, half a minute on a CPU
    python examples/swin_images.py --model microsoft/swin-tiny-patch4-window7-224     # pretrained weights, downloaded
    python examples/swin_images.py --plain                                            # the same without triflash

The task: name the colour of a square in noise. patch(model) keeps the bias (1, heads, S, S) and the mask of shifted windows apart; nothing
of the size windows x heads x S x S is made. Needs: pip install 'triflash[hf]'
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import SwinConfig, SwinForImageClassification

import triflash
from triflash.integrations.transformers import patch


def images(count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise (count, 3, side, side) with a square of a quarter of the side somewhere, and the channel in which it is bright."""
    pixels, size = torch.randn(count, 3, side, side, generator=generator), side // 4
    colours = torch.randint(3, (count,), generator=generator)
    for image, colour in zip(pixels, colours.tolist(), strict=True):
        y, x = torch.randint(side - size + 1, (2,), generator=generator).tolist()
        image[colour, y : y + size, x : x + size] += 3
    return pixels, colours


def main() -> None:
    """Train, then count what the model gets right on images that it has not seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name for from_pretrained (default: a tiny one with random weights)")
    parser.add_argument("--plain", action="store_true", help="transformers' own attention")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.model:
        model = SwinForImageClassification.from_pretrained(options.model, num_labels=3, ignore_mismatched_sizes=True)
    else:
        sizes = dict(image_size=16, patch_size=2, window_size=4, embed_dim=32, depths=[2], num_heads=[4])
        model = SwinForImageClassification(SwinConfig(**sizes, num_labels=3, drop_path_rate=0.0))
    model = model.to(device)
    if not options.plain:
        patch(model)
    tables = {name: weight for name, weight in model.named_parameters() if name.endswith("relative_position_bias_table")}
    before = {name: weight.detach().clone() for name, weight in tables.items()}

    generator, side = torch.Generator().manual_seed(0), model.config.image_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5 if options.model else 2e-3)
    with triflash.record_launches() as ran:
        for step in range(options.steps):
            pixels, colours = (x.to(device) for x in images(options.batch, side, generator))
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = model(pixels, labels=colours).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 0 or step == options.steps - 1:
                print(f"step {step:3d}  loss {loss.item():.3f}")
    moved = max(float((weight.detach() - before[name]).abs().max()) for name, weight in tables.items())
    print(f"triflash was called {len(ran)} times, the tables of positions moved by {moved:.3f}")

    pixels, colours = (x.to(device) for x in images(64, side, generator))
    with torch.no_grad():
        right = model.eval()(pixels).logits.argmax(-1) == colours
    print(f"right on new images: {right.float().mean():.0%}")


if __name__ == "__main__":
    main()
