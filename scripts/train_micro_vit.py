"""Train the micro ViT that quee ships, on the 50,000 Fashion-MNIST training images that quee does not ship.

    apt-get install dataset-fashion-mnist
    python scripts/train_micro_vit.py

About an hour on two cores. Weights (an exponential moving average) go to quee_core/assets/micro_vit
as safetensors, the log beside them. The test accuracy is measured once, after the last epoch.
"""

import argparse
import copy
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from fashion_mnist_idx import DEBIAN_FOLDER, heldout_indices, read_split
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from quee_core.backbones.micro_vit import micro_vit

MEAN, STD = 0.2860, 0.3530
ASSETS = Path(__file__).resolve().parents[1] / "quee_core" / "assets" / "micro_vit"


def normalise(images: Tensor) -> Tensor:
    """uint8 [n, 28, 28] to float32 [n, 1, 28, 28] with the data set's mean and standard deviation."""
    return ((images.float() / 255 - MEAN) / STD).unsqueeze(1)


def augment(images: Tensor, rng: torch.Generator, pad: int = 2) -> Tensor:
    """Random crop out of a zero-padded image and a random horizontal flip, drawn per image."""
    n, height, width = images.shape
    padded = functional.pad(images, (pad, pad, pad, pad))
    top, left = (torch.randint(0, 2 * pad + 1, (n, 1, 1), generator=rng) for _ in range(2))
    rows = torch.arange(height).view(1, -1, 1) + top
    columns = torch.arange(width).view(1, 1, -1) + left
    flipped = torch.rand(n, 1, 1, generator=rng) < 0.5
    columns = torch.where(flipped, columns.flip(2), columns)
    return padded[torch.arange(n).view(-1, 1, 1), rows, columns]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in [0, 1] of `model` in evaluation mode."""
    model.eval()
    right = sum(
        int((model(normalise(images[i : i + 500])).argmax(1) == labels[i : i + 500]).sum())
        for i in range(0, len(images), 500)
    )
    return right / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of the idx files (%(default)s)")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder for weights and log (%(default)s)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    all_images, all_labels = (torch.from_numpy(a.copy()) for a in read_split(args.data, "train"))
    kept = np.setdiff1d(np.arange(len(all_labels)), heldout_indices(all_labels.numpy()))
    images, labels = all_images[kept], all_labels[kept].long()

    model = micro_vit(patch_drop_rate=0.5)
    averaged = copy.deepcopy(model)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=args.lr
    )
    steps_per_epoch = len(images) // args.batch
    total_steps = args.epochs * steps_per_epoch
    args.out.mkdir(parents=True, exist_ok=True)
    step, started = 0, time.monotonic()
    with (args.out / "training.log").open("w") as log:

        def say(line: str) -> None:
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()

        say(f"seed {args.seed}, {len(images)} images, {args.epochs} epochs, batch {args.batch}, lr {args.lr}")
        say(f"torch {torch.__version__}, {sum(p.numel() for p in model.parameters())} parameters")
        for epoch in range(args.epochs):
            progress = epoch / args.epochs
            model.patch_drop.prob = 0.5 if progress < 0.5 else 0.25 if progress < 0.8 else 0.0
            model.train()
            losses = []
            order = torch.randperm(len(images), generator=rng)
            for start in range(0, steps_per_epoch * args.batch, args.batch):
                batch = order[start : start + args.batch]
                warmup = min(1.0, (step + 1) / steps_per_epoch)
                for group in optimiser.param_groups:
                    group["lr"] = args.lr * warmup * 0.5 * (1 + math.cos(math.pi * step / total_steps))
                logits = model(normalise(augment(images[batch], rng)))
                loss = functional.cross_entropy(logits, labels[batch], label_smoothing=0.05)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                losses.append(loss.item())
                decay = min(0.998, (step + 1) / (step + 10))
                with torch.no_grad():
                    for mean, new in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
                        if mean.is_floating_point():
                            mean.lerp_(new, 1 - decay)
                        else:
                            mean.copy_(new)
                step += 1
            say(f"epoch {epoch + 1}: training loss {np.mean(losses):.4f}, {time.monotonic() - started:.0f} s")
        test_images, test_labels = (torch.from_numpy(a.copy()) for a in read_split(args.data, "t10k"))
        say(f"test accuracy {accuracy(averaged, test_images, test_labels.long()):.4f} (n = {len(test_labels)})")
    save_file(averaged.state_dict(), args.out / "micro_vit_fashion_mnist.safetensors")


if __name__ == "__main__":
    main()
