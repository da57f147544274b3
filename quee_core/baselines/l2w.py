"""L2W-style: heads trained on images weighted by which exit they are likely to leave at.

Published: Han, Pu, Lai, Wang, Song, Cao, Huang, Deng, Huang, "Learning to weight samples for dynamic early-exiting
networks", ECCV 2022 (arXiv 2209.08310). The same here: a small network turns an image's losses at all exits into its
weight at each, 1 + 0.8 tanh; on one half of a batch, weighted by it, the heads take a pretended step; on the other half
each exit's share of the images, the most confident of those that are left, counts for that exit alone, and what they
lose after the pretended step teaches the weight network; then the heads take the step on the whole batch. Shares fall
by a factor of 0.75 an exit. What differs: the backbone is frozen, and tables hold neither its tokens nor heads' inputs.
What is trained is a correction of each head: a linear map of the stored embedding (PCA of the pooled tokens) and a
temperature, added to the stored log-probabilities. Heads learn from `target` and `select`, which the backbone and the
heads of the tables have not seen; so that thresholds are tuned on answers to new images, those of either half come from
heads trained on the other, and those of `test` from heads trained on both. Corrections are free here, which errs in
their favour.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from quee_core.baselines.answers import answered, confidences
from quee_core.baselines.data import BaselineData, PolicyPair
from quee_core.baselines.ladders import LadderAnswers, LadderPolicy, ladder_pair, replaced_errors, threshold_policies
from quee_core.corrections import BATCH, EPOCHS, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, log_probabilities
from quee_core.tables import Outcomes
from quee_core.thresholds import CONFIDENCES

META_LEARNING_RATE = 1e-3  # Adam's, of the weight network
HIDDEN = 64
RANGE = 0.8  # weights lie in 1 +- this
FALLING = 0.75  # share of an exit over that of the exit before
TOGETHER = 1024  # images that are answered at a time


@dataclass(frozen=True, eq=False)
class Seen:
    """n images at L exits: log_p float32 [n, L, classes], embedding float32 [n, L, d], labels int64 [n]."""

    log_p: Tensor
    embedding: Tensor
    labels: Tensor

    def take(self, rows: Tensor) -> "Seen":
        """The images at `rows`, int64."""
        return Seen(self.log_p[rows], self.embedding[rows], self.labels[rows])


Take = Callable[[Tensor], Seen]  # images by their rows: all of them together would not fit, of many classes


@dataclass(frozen=True, eq=False)
class StoredExits:
    """What tables hold along the paths at `ladder`. embedding: float32 [n, L, d], scaled."""

    outcomes: Outcomes
    ladder: list[int]
    embedding: NDArray[np.float32]
    classes: int

    def take(self, rows: Tensor) -> Seen:
        """The images at `rows`, int64."""
        at = rows.numpy()
        log_p = [log_probabilities(self.outcomes, position, self.classes, at) for position in self.ladder]
        labels = self.outcomes.labels[at].astype(np.int64)
        return Seen(*map(torch.from_numpy, (np.stack(log_p, axis=1), self.embedding[at], labels)))


@dataclass(frozen=True, eq=False)
class Corrections:
    """What is added to each head: scale [L], weight [L, d, classes], bias [L, classes]. Nothing, as `none` gives it."""

    scale: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def none(cls, exits: int, dimensions: int, classes: int) -> "Corrections":
        """Of heads that stay as they are."""
        return cls(torch.ones(exits), torch.zeros(exits, dimensions, classes), torch.zeros(exits, classes))

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Every parameter."""
        return self.scale, self.weight, self.bias

    def __call__(self, seen: Seen) -> Tensor:
        """Logits float32 [n, L, classes]."""
        moved = torch.einsum("nld,ldc->nlc", seen.embedding, self.weight)
        return seen.log_p * self.scale[:, None] + moved + self.bias


def weighted_heads(data: BaselineData, prices: NDArray[np.float64]) -> PolicyPair:
    """Thresholds on the answers of corrected heads, tuned as `threshold` tunes them. Raises as that does."""
    policies: list[LadderPolicy] = []
    own: dict[int, tuple[NDArray[np.bool_], NDArray[np.bool_]]] = {}
    half = torch.from_numpy(np.random.default_rng([data.seed, data.select.images]).permutation(data.select.images)) % 2
    for bits in data.tree.bits:
        ladder = data.ladder(bits)
        on_select, on_test = _stored(data, ladder)
        crossed = [train_corrections(on_select.take, torch.nonzero(half != k)[:, 0], data.seed) for k in range(2)]
        final = train_corrections(on_select.take, torch.arange(len(half)), data.seed)
        select = _answers(on_select, crossed, half)
        test = _answers(on_test, [final], torch.zeros(data.test.images, dtype=torch.int64))
        own |= {p: (select.errors[:, k], test.errors[:, k]) for k, p in enumerate(ladder)}
        policies += threshold_policies(f"{bits} bits", data.every, ladder, select, test, prices)
    return ladder_pair(
        "l2w-style", data, policies, errors=replaced_errors(data, own), trainings=3 * len(data.tree.bits),
        trained="a correction of every head, and the weight network, for each bit-width, on both halves and on all",
    )  # fmt: skip


def train_corrections(take: Take, rows: Tensor, seed: int) -> Corrections:
    """Corrections of all heads, trained together with the network that weighs their images, on those at `rows`.

    The same bits whatever number of threads is at work.
    """
    n, first = len(rows), take(rows[:1])
    _, exits, classes = first.log_p.shape
    heads = Corrections.none(exits, first.embedding.shape[2], classes)
    if n < 4:
        return heads
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad(), threadpool_limits(limits=1):
        weigher = _weigher(exits, generator)
        for parameter in heads.all:
            parameter.requires_grad_(True)
        teach = torch.optim.Adam(weigher.parameters(), lr=META_LEARNING_RATE)
        step = torch.optim.SGD(heads.all, lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(step, EPOCHS * -(-n // BATCH))
        for _ in range(EPOCHS):
            for drawn in torch.split(torch.randperm(n, generator=generator), BATCH):
                if len(drawn) >= 4:
                    batch = take(rows[drawn])
                    _teach(weigher, teach, heads, batch, float(schedule.get_last_lr()[0]))
                    step.zero_grad()
                    torch.autograd.backward(_weighted_loss(weigher, heads, batch, teaching=False) + _decay(heads))
                    step.step()
                schedule.step()
    return Corrections(*(parameter.detach() for parameter in heads.all))


def image_shares(logits: Tensor) -> Tensor:
    """Which exit each image counts for, one-hot bool [n, L]: its share of the most confident of those that are left."""
    n, exits, _ = logits.shape
    share = FALLING ** torch.arange(exits, dtype=torch.float64)
    counts = torch.floor(n * share / share.sum()).long().tolist()
    confidence = logits.softmax(dim=2).amax(dim=2)
    counted = torch.zeros(n, exits, dtype=torch.bool)
    left = torch.arange(n)
    for k in range(exits - 1):
        order = torch.argsort(confidence[left, k], descending=True, stable=True)
        counted[left[order[: counts[k]]], k] = True
        left = left[order[counts[k] :]]
    counted[left, exits - 1] = True
    return counted


def _teach(
    weigher: nn.Module, teach: torch.optim.Optimizer, heads: Corrections, batch: Seen, learning_rate: float
) -> None:
    """One step of the weight network: by what the heads would lose on other images after a step under its weights."""
    middle = len(batch.labels) // 2
    first, second = batch.take(torch.arange(middle)), batch.take(torch.arange(middle, len(batch.labels)))
    loss = _weighted_loss(weigher, heads, first, teaching=True)
    slopes = torch.autograd.grad(loss, heads.all, create_graph=True)
    pretended = Corrections(*(p - learning_rate * g for p, g in zip(heads.all, slopes, strict=True)))
    logits = pretended(second)
    counted = image_shares(logits.detach())
    teach.zero_grad()
    torch.autograd.backward(
        (_losses(logits, second.labels) * counted).sum() / len(counted), inputs=list(weigher.parameters())
    )
    teach.step()


def _weighted_loss(weigher: nn.Module, heads: Corrections, batch: Seen, *, teaching: bool) -> Tensor:
    losses = _losses(heads(batch), batch.labels)
    weights = 1 + RANGE * torch.tanh(weigher(losses.detach()))
    return ((weights if teaching else weights.detach()) * losses).sum(dim=1).mean()


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image at each exit, float32 [n, L]."""
    return functional.cross_entropy(logits.transpose(1, 2), labels[:, None].expand(logits.shape[:2]), reduction="none")


def _decay(heads: Corrections) -> Tensor:
    """Pulls corrections towards none."""
    return WEIGHT_DECAY / 2 * ((heads.scale - 1).square().sum() + heads.weight.square().sum())


def _weigher(exits: int, generator: torch.Generator) -> nn.Module:
    """Losses at all exits to weights at all exits; the last layer starts at 0, so that all weights start at 1."""
    # torch's own initialisation would draw from the generator that all share
    first, last = skip_init(nn.Linear, exits, HIDDEN), skip_init(nn.Linear, HIDDEN, exits)
    with torch.no_grad():
        first.weight.copy_(torch.randn(HIDDEN, exits, generator=generator) * (2 / exits) ** 0.5)
        for zeros in (first.bias, last.weight, last.bias):
            zeros.zero_()
    return nn.Sequential(first, nn.ReLU(), last)


def _stored(data: BaselineData, ladder: list[int]) -> tuple[StoredExits, StoredExits]:
    """Of `select` and `test`; embeddings are scaled as they spread on `select`."""
    pairs = [data.embeddings(position) for position in ladder]
    scales = [np.maximum(select.std(), 1e-6) for select, _ in pairs]
    on_select, on_test = (
        StoredExits(
            outcomes, ladder, np.stack([pair[k] / scale for pair, scale in zip(pairs, scales, strict=True)], axis=1),
            data.classes,
        )
        for k, outcomes in enumerate((data.select, data.test))
    )  # fmt: skip
    return on_select, on_test


def _answers(stored: StoredExits, heads: list[Corrections], which: Tensor) -> LadderAnswers:
    """Each image's answers by one of `heads`: `which`, int64 [n]."""
    outcomes, exits = stored.outcomes, len(stored.ladder)
    errors = np.empty((outcomes.images, exits), bool)
    sure = {measure: np.empty((outcomes.images, exits - 1)) for measure in CONFIDENCES}
    for number, corrected in enumerate(heads):
        for rows in torch.split(torch.nonzero(which == number)[:, 0], TOGETHER):
            logits, at = corrected(stored.take(rows)).numpy(), rows.numpy()
            for k, position in enumerate(stored.ladder):
                said = answered(logits[:, k], outcomes.predicted[at, position])
                errors[at, k] = said != outcomes.labels[at]
                if k < exits - 1:
                    for measure, values in confidences(logits[:, k]).items():
                        sure[measure][at, k] = values
    return LadderAnswers(errors, sure)
