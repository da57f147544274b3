"""A head set right on new images: a scale of what it says and a linear map of the embedding, by least cross-entropy.

A correction multiplies integers of `EMBEDDING_BITS` bits: it costs little, and the router, which corrects few images at
a time, gets the same bits as the tables.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional

from quee_core.fixed_point import to_grid
from quee_core.paths import EMBEDDING_BITS, FULL_PRECISION
from quee_core.tables import Outcomes

FIELDS = ("scale", "step", "weight", "unit", "bias")  # of a `Correction`
LEAST_PROBABILITY = 2.0**-24  # the smallest that float16 tables hold
GRID = 12  # bits behind the point of scales and log-probabilities
LARGEST = 2.0 ** (EMBEDDING_BITS - 1) - 1  # integer
SMALLEST = 1e-6  # range that integers stand for
EPOCHS, BATCH, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 8, 512, 0.05, 0.9, 1e-3  # of SGD, whose rate falls to 0


@dataclass(frozen=True, eq=False)
class Correction:
    """logits = scale · log p + unit (Q(embedding) weight) + bias, where Q takes component j to integers of `step` j.

    step: float64 [d]. weight: int8 [d, classes]. unit, bias: float64 [classes].
    """

    scale: float
    step: NDArray[np.float64]
    weight: NDArray[np.int8]
    unit: NDArray[np.float64]
    bias: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        scale: float,
        weight: NDArray[np.float64],
        bias: NDArray[np.float64],
        embedding: NDArray[np.float32],
    ) -> "Correction":
        """scale · log p + embedding · weight [d, classes] + bias [classes] on integers that suit these embeddings."""
        step = np.maximum(np.abs(embedding).max(axis=0).astype(np.float64), SMALLEST) / LARGEST
        scaled = weight * step[:, None]
        unit = np.maximum(np.abs(scaled).max(axis=0), SMALLEST) / LARGEST
        return cls(float(to_grid(np.array([scale]), GRID)[0]), step, np.rint(scaled / unit).astype(np.int8), unit, bias)

    def __call__(self, log_p: NDArray[np.float32], embedding: NDArray[np.float16]) -> NDArray[np.float32]:
        """Logits float32 [n, classes] of log-probabilities [n, classes] and embeddings [n, d]."""
        integers = np.clip(np.rint(embedding.astype(np.float64) / self.step), -LARGEST, LARGEST)
        shift = (integers @ self.weight.astype(np.float64)) * self.unit + self.bias
        logits: NDArray[np.float32] = (self.scale * on_grid(log_p) + shift).astype(np.float32)
        return logits

    def bitops(self, projection_macs: int) -> float:
        """What it costs beside the head, the embedding of so many multiply-accumulates included."""
        dimensions, classes = self.weight.shape
        return float((projection_macs + dimensions * classes) * EMBEDDING_BITS**2 + classes * FULL_PRECISION**2)


def on_grid(log_p: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities rounded, so that nothing hangs on the last bit of a logarithm."""
    return to_grid(log_p.astype(np.float64), GRID)


def log_probabilities(
    outcomes: Outcomes, position: int, classes: int, rows: NDArray[np.intp] | slice = slice(None)
) -> NDArray[np.float32]:
    """Logits, up to a constant an image, of the path at `position`: float32 [n, classes], of all images or of `rows`.

    Of more than 16 classes, those that the table does not name share what the named ones leave. Probabilities are as
    exact as float16, and none is below `LEAST_PROBABILITY`.
    """
    said = outcomes.top_p[rows, position].astype(np.float32)
    unsaid = np.maximum(1 - said.sum(axis=1), 0) / max(1, classes - said.shape[1])
    p = np.repeat(unsaid[:, None], classes, axis=1)
    np.put_along_axis(p, outcomes.top_class[rows, position].astype(np.intp), said, axis=1)
    log_p: NDArray[np.float32] = np.log(np.maximum(p, np.float32(LEAST_PROBABILITY)))
    return log_p


def fitted_correction(
    log_p: NDArray[np.float32], embedding: NDArray[np.float16], labels: NDArray[np.int16], seed: int
) -> Correction:
    """Of log-probabilities [n, classes], embeddings [n, d] and labels [n]; the same bits whatever number of threads is
    at work.
    """
    rows = embedding.astype(np.float32)
    spread = max(float(rows.std()), SMALLEST)
    scale, weight, bias = _trained(
        torch.from_numpy(log_p), torch.from_numpy(rows / np.float32(spread)), torch.from_numpy(labels.astype(np.int64)),
        seed,
    )  # fmt: skip
    return Correction.of(float(scale), weight.double().numpy() / spread, bias.double().numpy(), rows)


def _trained(log_p: Tensor, embedding: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale [], weight [d, classes] and bias [classes], from no correction on."""
    n, classes = log_p.shape
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad(), threadpool_limits(limits=1):
        scale = torch.ones((), requires_grad=True)
        weight = torch.zeros(embedding.shape[1], classes, requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        step = torch.optim.SGD([scale, weight, bias], lr=LEARNING_RATE, momentum=MOMENTUM)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(step, EPOCHS * max(1, -(-n // BATCH)))
        for _ in range(EPOCHS):
            for rows in torch.split(torch.randperm(n, generator=generator), BATCH):
                logits = scale * log_p[rows] + embedding[rows] @ weight + bias
                pull = WEIGHT_DECAY / 2 * ((scale - 1).square() + weight.square().sum())
                step.zero_grad()
                torch.autograd.backward(functional.cross_entropy(logits, labels[rows]) + pull)
                step.step()
                schedule.step()
    return scale.detach(), weight.detach(), bias.detach()
