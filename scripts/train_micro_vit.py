"""Train the micro ViT that quee ships, on the 50,000 Fashion-MNIST training images that are not held out.

    apt-get install dataset-fashion-mnist
    python scripts/train_micro_vit.py

Two phases, about an hour and a half on two cores: a long one with patch dropout, which makes epochs cheap, and
one that starts from its averaged weights without. Weights (an exponential moving average) go to
quee_core/assets/micro_vit as safetensors after each phase, the log beside them. The test accuracy is measured at
the end of a phase and chooses nothing.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fashion_mnist_idx import DEBIAN_FOLDER, heldout_indices, read_split
from safetensors.torch import load_file, save_file
from timm.layers import PatchDropout
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from quee_core.backbones.micro_vit import micro_vit

MEAN, STD = 0.2860, 0.3530
ASSETS = Path(__file__).resolve().parents[1] / "quee_core" / "assets" / "micro_vit"


@dataclass(frozen=True)
class Phase:
    """epochs: passes. rate: peak learning rate. drops: patch dropout from each share of the phase on. pad: crop's.
    muon: orthogonalised updates (Muon) for the blocks' matrices instead of AdamW's."""

    epochs: int
    rate: float
    drops: tuple[tuple[float, float], ...]
    pad: int
    muon: bool = False

    def drop_at(self, progress: float) -> float:
        return [drop for start, drop in self.drops if progress >= start][-1]


PHASES = (
    Phase(epochs=20, rate=1.2e-3, drops=((0.0, 0.5), (0.5, 0.25), (0.8, 0.0)), pad=2),
    Phase(epochs=12, rate=5e-4, drops=((0.0, 0.0),), pad=1, muon=True),
)


def normalise(images: Tensor) -> Tensor:
    """uint8 [n, 28, 28] to float32 [n, 1, 28, 28] with the data set's mean and standard deviation."""
    return ((images.float() / 255 - MEAN) / STD).unsqueeze(1)


def augment(images: Tensor, rng: torch.Generator, pad: int) -> Tensor:
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


def optimisers_of(model: nn.Module, phase: Phase) -> list[torch.optim.Optimizer]:
    """AdamW, without weight decay on vectors; under `phase.muon` the blocks' matrices go to Muon at AdamW's scale."""
    matrices = [p for n, p in model.named_parameters() if phase.muon and n.startswith("blocks.") and p.ndim == 2]
    taken = {id(p) for p in matrices}
    decayed = [p for p in model.parameters() if p.ndim > 1 and id(p) not in taken]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=phase.rate
        )
    ]
    if matrices:
        optimisers.append(torch.optim.Muon(matrices, lr=phase.rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
    return optimisers


def descend(
    model: nn.Module, averaged: nn.Module, optimisers: Sequence[torch.optim.Optimizer], loss: Tensor, decay: float
) -> None:
    """One step down `loss`; `averaged` follows the new weights, of which it keeps `decay` of its own."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        optimiser.step()
    with torch.no_grad():
        for mean, new in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(new, 1 - decay)
            else:
                mean.copy_(new)


def train(
    model: nn.Module,
    phase: Phase,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    rng: torch.Generator,
    say: Callable[[str], None],
    forward: Callable[[Tensor], Tensor],
    after_epoch: Callable[[nn.Module], None],
) -> nn.Module:
    """Run one phase on `model` through `forward`, which shares its weights; returns the averaged model."""
    dropout = PatchDropout(0.5, num_prefix_tokens=1)
    model.patch_drop = dropout
    averaged = copy.deepcopy(model)
    optimisers = optimisers_of(model, phase)
    steps_per_epoch = len(images) // batch_size
    total_steps = phase.epochs * steps_per_epoch
    step, started = 0, time.monotonic()
    for epoch in range(phase.epochs):
        dropout.prob = phase.drop_at(epoch / phase.epochs)
        model.train()
        losses = []
        order = torch.randperm(len(images), generator=rng)
        for start in range(0, steps_per_epoch * batch_size, batch_size):
            batch = order[start : start + batch_size]
            warmup = min(1.0, (step + 1) / steps_per_epoch)
            for group in (group for optimiser in optimisers for group in optimiser.param_groups):
                group["lr"] = phase.rate * warmup * 0.5 * (1 + math.cos(math.pi * step / total_steps))
            logits = forward(normalise(augment(images[batch], rng, phase.pad)))
            loss = functional.cross_entropy(logits, labels[batch], label_smoothing=0.05)
            descend(model, averaged, optimisers, loss, min(0.998, (step + 1) / (step + 10)))
            losses.append(loss.item())
            step += 1
        say(f"epoch {epoch + 1}: training loss {np.mean(losses):.4f}, {time.monotonic() - started:.0f} s")
        after_epoch(averaged)
    return averaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of the idx files (%(default)s)")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder for weights and log (%(default)s)")
    parser.add_argument("--first-phase", type=int, default=1, help="2: go on from the weights in --out (%(default)s)")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile, where there is a C++ compiler")
    args = parser.parse_args()

    all_images, all_labels = (torch.from_numpy(a.copy()) for a in read_split(args.data, "train"))
    held = heldout_indices(all_labels.numpy())
    kept = np.setdiff1d(np.arange(len(all_labels)), held)
    images, labels = all_images[kept], all_labels[kept].long()
    held_images, held_labels = all_images[held], all_labels[held].long()
    test_images, test_labels = (torch.from_numpy(a.copy()) for a in read_split(args.data, "t10k"))
    weights = args.out / "micro_vit_fashion_mnist.safetensors"
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = micro_vit()
    if args.first_phase > 1:
        model.load_state_dict(load_file(weights))
    with (args.out / "training.log").open("w" if args.first_phase == 1 else "a") as log:

        def say(line: str) -> None:
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()

        for number, phase in list(enumerate(PHASES, 1))[args.first_phase - 1 :]:
            rng = torch.Generator().manual_seed(args.seed + number - 1)
            torch.manual_seed(args.seed + number - 1)
            say(f"phase {number}: {phase}, seed {args.seed + number - 1}, {len(images)} images, batch {args.batch}")
            say(f"torch {torch.__version__}, {sum(p.numel() for p in model.parameters())} parameters")
            forward = torch.compile(model) if args.compile else model

            def after_epoch(averaged: nn.Module) -> None:
                share = accuracy(averaged, held_images, held_labels)
                say(f"    of the averaged weights, on images that are not trained on: {share:.4f} (n = {len(held)})")

            averaged = train(model, phase, images, labels, args.batch, rng, say, forward, after_epoch)
            say(f"test accuracy {accuracy(averaged, test_images, test_labels.long()):.4f} (n = {len(test_labels)})")
            save_file(averaged.state_dict(), weights)
            model = averaged


if __name__ == "__main__":
    main()
