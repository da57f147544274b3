"""Exit heads: LayerNorm and a linear layer on pooled tokens, one head serving all paths (design, section 4)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from quee_core.errors import NumericError, ShapeMismatchError


class ExitHead(nn.Module):
    """Maps pooled tokens float [n, 2 d] to logits float [n, classes]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits of the exit."""
        logits: Tensor = self.linear(self.norm(pooled))
        return logits


def train_head(
    features: Sequence[Tensor],
    labels: Tensor,
    classes: int,
    *,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    batch: int,
    seed: int,
) -> ExitHead:
    """Fit one exit's head on the same images seen at several precisions.

    features: per precision (full precision and every uniform bit-width), float [n, 2 d]; the rows of all
    are mixed, so that the head serves every path. labels: int [n]. AdamW with a cosine schedule, seeded
    by `seed` alone. Returns the head in evaluation mode on the features' device. Raises
    ShapeMismatchError if rows disagree, NumericError for features that are not finite.
    """
    if not features or any(len(f) != len(labels) for f in features):
        raise ShapeMismatchError(f"features of {[len(f) for f in features]} images, labels of {len(labels)}")
    rows = torch.cat(list(features)).float()
    if not bool(torch.isfinite(rows).all()):
        raise NumericError("pooled features that an exit head is trained on hold NaN or infinite values")
    wanted = labels.long().to(rows.device).repeat(len(features))
    rng = torch.Generator().manual_seed(seed)
    head = ExitHead(rows.shape[1], classes)
    with torch.no_grad():
        bound = 1 / math.sqrt(rows.shape[1])
        head.linear.weight.uniform_(-bound, bound, generator=rng)
        head.linear.bias.zero_()
    head.to(rows.device)
    optimiser = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps = epochs * math.ceil(len(rows) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for picked in torch.randperm(len(rows), generator=rng).split(batch):
            loss = functional.cross_entropy(head(rows[picked]), wanted[picked], label_smoothing=0.05)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    return head.eval().requires_grad_(False)
