"""Train the micro ViT for the glyphs, on 100,000 of them that are in no part of the data set but `train`.

    python scripts/train_glyph_vit.py

About forty minutes on one core. It starts from the blocks of the Fashion-MNIST micro ViT; patch dropout makes
all epochs but the last ones cheap. Weights (an exponential moving average) go to quee_core/assets/micro_vit as
safetensors, the log beside them. The test accuracy is measured once, at the end.
"""

import argparse
import copy
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from timm.layers import PatchDropout
from torch import Tensor, nn
from torch.nn import functional
from train_micro_vit import ASSETS, Phase, descend, optimisers_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from quee_core.backbones.micro_vit import micro_vit
from quee_core.data.glyph_set import CLASSES, PARTS, TRAINING, draw_glyphs, glyph_labels

MEAN, STD = 0.5, 0.25
STEPS_PER_EPOCH = 196  # 50,000 images
PHASE = Phase(epochs=9, rate=1.5e-3, drops=((0.0, 0.5), (0.75, 0.25), (0.88, 0.0)), pad=1, muon=True)


def normalise(images: Tensor) -> Tensor:
    """uint8 [n, 28, 28] to float32 [n, 1, 28, 28]."""
    return ((images.float() / 255 - MEAN) / STD).unsqueeze(1)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in [0, 1] of `model` in evaluation mode."""
    model.eval()
    found = torch.cat([model(normalise(part)).argmax(1) for part in images.split(500)])
    return float((found == labels).float().mean())


def drawn(ids: range) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 28, 28] and labels int64 [n]."""
    return torch.from_numpy(draw_glyphs(ids)), torch.from_numpy(glyph_labels(np.array(ids, np.int64))).long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder for weights and log (%(default)s)")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = micro_vit(num_classes=len(CLASSES))
    start = load_file(ASSETS / "micro_vit_fashion_mnist.safetensors")
    model.load_state_dict({k: v for k, v in start.items() if not k.startswith("head.")}, strict=False)
    dropout = PatchDropout(0.5, num_prefix_tokens=1)
    model.patch_drop = dropout
    averaged = copy.deepcopy(model)
    rng = torch.Generator().manual_seed(args.seed)
    with (args.out / "training_glyphs.log").open("w") as log:

        def say(line: str) -> None:
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()

        images, labels = drawn(TRAINING)
        seen, known = drawn(range(TRAINING.stop, TRAINING.stop + 4_000))  # to watch, and to choose nothing
        say(f"{PHASE}, seed {args.seed}, {len(images)} images, batch {args.batch}, torch {torch.__version__}")
        optimisers = optimisers_of(model, PHASE)
        total, step, started = PHASE.epochs * STEPS_PER_EPOCH, 0, time.monotonic()
        for epoch in range(PHASE.epochs):
            dropout.prob = PHASE.drop_at(epoch / PHASE.epochs)
            model.train()
            losses = []
            for _ in range(STEPS_PER_EPOCH):
                picked = torch.randint(len(images), (args.batch,), generator=rng)
                rate = min(1.0, (step + 1) / STEPS_PER_EPOCH) * 0.5 * (1 + math.cos(math.pi * step / total))
                for group in (group for optimiser in optimisers for group in optimiser.param_groups):
                    group["lr"] = PHASE.rate * rate
                logits = model(normalise(images[picked]))
                loss = functional.cross_entropy(logits, labels[picked], label_smoothing=0.05)
                descend(model, averaged, optimisers, loss, min(0.995, (step + 1) / (step + 10)))
                losses.append(loss.item())
                step += 1
            say(
                f"epoch {epoch + 1}: training loss {np.mean(losses):.4f}, {time.monotonic() - started:.0f} s; "
                f"averaged weights on 4,000 other images: {accuracy(averaged, seen, known):.4f}"
            )
            save_file(averaged.state_dict(), args.out / "micro_vit_glyphs.safetensors")
        test, wanted = drawn(PARTS["test"])
        say(f"test accuracy {accuracy(averaged, test, wanted):.4f} (n = {len(test)})")


if __name__ == "__main__":
    main()
