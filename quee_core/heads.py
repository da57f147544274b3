"""Exit heads on pooled tokens, one head serving all paths (design, section 4)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from quee_core.config import HeadsConfig
from quee_core.errors import NumericError, ShapeMismatchError
from quee_core.features import HeadViews
from quee_core.quantize.layers import steady

LABEL_SMOOTHING = 0.05


class ExitHead(nn.Module):
    """Maps pooled features float [..., f] to logits float [..., classes]; it looks at the first `width` of them.

    LayerNorm and a linear layer; where `hidden` is above 0, a hidden layer of that width beside it.
    """

    def __init__(self, width: int, classes: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(width)
        self.linear: nn.Module = nn.Linear(width, classes)
        self.inner: nn.Module | None = nn.Linear(width, hidden) if hidden else None
        self.outer: nn.Module | None = nn.Linear(hidden, classes) if hidden else None
        self.dropout = nn.Dropout(dropout)
        self.steady = steady(nn.GELU())

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits of the exit."""
        normed = self.normed(pooled)
        logits: Tensor = self.linear(normed)
        if self.outer is not None:
            logits = logits + self.outer(self.dropout(self.hidden(normed)))
        return logits

    def normed(self, pooled: Tensor) -> Tensor:
        """The features that the head looks at, normalised; float [..., width]."""
        features: Tensor = self.norm(pooled[..., : self.width])
        return features

    def hidden(self, normed: Tensor) -> Tensor:
        """Hidden features float [n, hidden] of normalised ones."""
        assert self.inner is not None  # asked only where there is a hidden layer
        wide: Tensor = self.inner(normed)
        assert self.steady is not None  # of GELU there is a steady one
        # on a CPU torch's own rounds by an element's position, which only training may do
        return functional.gelu(wide) if self.training else self.steady(wide)


def train_head(views: HeadViews, exit_index: int, classes: int, settings: HeadsConfig, width: int) -> ExitHead:
    """Fit the head of exit `exit_index` (from 0) to the first `width` features that the images' views show there.

    A pass sees each image once, in a view drawn at random, so that one head serves every path. What it learns is a
    mixture of the label and of the backbone's own answer to that view at full precision, by `settings.distillation`;
    the label alone where the backbone has no head, or one that knows less than how frequent each class is.
    AdamW with a cosine schedule, seeded by `settings.seed` alone. Returns the head in evaluation mode. Raises
    ShapeMismatchError if rows disagree, NumericError for features that are not finite.
    """
    pooled, labels = views.pooled[exit_index], torch.from_numpy(views.labels)
    if pooled.shape[1] != len(labels) or not len(labels):
        raise ShapeMismatchError(f"pooled features of {pooled.shape[1]} images, labels of {len(labels)}")
    rng = torch.Generator().manual_seed(settings.seed)
    goals = functional.one_hot(labels, classes).float() * (1 - LABEL_SMOOTHING) + LABEL_SMOOTHING / classes
    shown = torch.from_numpy(views.shown)
    taught = views.answers is not None and _knows(views.answers[0], labels)
    steps = settings.epochs * math.ceil(len(labels) / settings.batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # dropout takes no generator
        head = _initial_head(width, classes, settings, rng)
        optimiser = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, settings.learning_rate, total_steps=max(steps, 2), pct_start=0.1
        )
        for view, picked in _draws(len(views.shown), len(labels), settings, rng):
            rows = pooled[view, picked]
            if not bool(torch.isfinite(rows).all()):
                raise NumericError("pooled features that an exit head is trained on hold NaN or infinite values")
            wanted = goals[picked]
            if taught and views.answers is not None:
                answers = torch.softmax(views.answers[shown[view], picked], dim=1)
                wanted = torch.lerp(wanted, answers, settings.distillation)
            loss = functional.cross_entropy(head(rows), wanted)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    return head.eval().requires_grad_(False)


def _knows(answers: Tensor, labels: Tensor) -> bool:
    """Whether `answers` float [n, classes] are nearer to the labels than the frequencies of the classes are."""
    frequency = torch.bincount(labels, minlength=answers.shape[1]).float() / len(labels)
    blind = torch.special.entr(frequency).sum()
    return bool(functional.cross_entropy(answers, labels) < blind)


def _initial_head(width: int, classes: int, settings: HeadsConfig, rng: torch.Generator) -> ExitHead:
    """Uniform weights as torch's own, but drawn from `rng`; the hidden layer says nothing at first."""
    head = ExitHead(width, classes, settings.hidden, settings.dropout)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name in ("linear.weight", "inner.weight"):
                bound = 1 / math.sqrt(width)
                parameter.uniform_(-bound, bound, generator=rng)
            elif not name.startswith("norm."):
                parameter.zero_()
    return head.train()


def _draws(views: int, images: int, settings: HeadsConfig, rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Views and images of every batch, int64 [batch] each."""
    for _ in range(settings.epochs):
        for picked in torch.randperm(images, generator=rng).split(settings.batch):
            yield torch.randint(views, (len(picked),), generator=rng), picked
