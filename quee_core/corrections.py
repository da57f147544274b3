"""Heads set right on new images: what an exit says, corrected by labels that its head has not learnt from.

Heads learn on `fit`, often on images that the backbone was trained on. The labels of `target` and `select`, on which
rules are chosen, can teach as well: for each uniform path a scale of the stored log-probabilities and a linear map of
the stored embedding, by least cross-entropy. Rules are tuned on answers to new images, so each fold of the images is
answered by corrections that were fitted on the others, and all further images by those that were fitted on all.

A correction multiplies integers of `EMBEDDING_BITS` bits: it costs little, and the router, which corrects few images at
a time, gets the same bits as the tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional

from quee_core.archive import pack, unpack
from quee_core.costs import CostTable
from quee_core.errors import DamagedTableError, InvalidPathError
from quee_core.fixed_point import to_grid
from quee_core.paths import EMBEDDING_BITS, FULL_PRECISION, Path
from quee_core.tables import Outcomes, feature_table

KIND = "corrections"
FIELDS = ("scale", "step", "weight", "unit", "bias")  # of a `Correction`
LEAST_PROBABILITY = 2.0**-24  # the smallest that float16 tables hold
GRID = 12  # bits behind the point of scales and log-probabilities
LARGEST = 2.0 ** (EMBEDDING_BITS - 1) - 1  # integer
SMALLEST = 1e-6  # range that integers stand for
FOLDS = 4
EPOCHS, BATCH, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 8, 512, 0.05, 0.9, 1e-3
TOGETHER = 2048  # images that are corrected at a time


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
        summed = self.scale * to_grid(log_p.astype(np.float64), GRID) + shift
        logits: NDArray[np.float32] = summed.astype(np.float32)
        return logits


@dataclass(frozen=True, eq=False)
class Corrections:
    """Those of some paths, the number of classes, and what one costs beside the head."""

    of: Mapping[Path, Correction]
    classes: int
    bitops: float

    def logits(self, path: Path, outcomes: Outcomes) -> NDArray[np.float32]:
        """Corrected logits float32 [n, classes] of the answers of `path`. Raises InvalidPathError for one without."""
        if path not in self.of:
            raise InvalidPathError(f"path {path}: its answers have no correction")
        position, logits = outcomes.position(path), np.empty((outcomes.images, self.classes), np.float32)
        for start in range(0, outcomes.images, TOGETHER):
            rows = slice(start, start + TOGETHER)
            log_p = log_probabilities(outcomes, position, self.classes, rows)
            logits[rows] = self.of[path](log_p, outcomes.embedding[rows, position])
        return logits

    def corrected(self, outcomes: Outcomes) -> Outcomes:
        """The answers of the corrected paths alone, without embeddings."""
        tables = []
        for path in self.of:
            none = np.zeros((outcomes.images, 1), np.float32)
            tables.append(
                (path, feature_table(outcomes.sample_ids, outcomes.labels, self.logits(path, outcomes), none))
            )
        return Outcomes.from_tables(tables)

    def dearer(self, table: CostTable) -> CostTable:
        """`table`, in BitOps, with heads whose answers are corrected."""
        return replace(table, heads=tuple(head + self.bitops for head in table.heads))

    def to_bytes(self) -> bytes:
        """As an archive, without pickle; equal ones give equal bytes."""
        arrays: dict[str, NDArray[Any]] = {}
        for path, one in self.of.items():
            arrays |= {f"{path}/{name}": np.asarray(getattr(one, name)) for name in FIELDS}
        told = {"paths": [str(path) for path in self.of], "classes": self.classes, "bitops": self.bitops}
        return pack(arrays, told, kind=KIND)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Corrections":
        """Read back what `to_bytes` wrote. Raises DamagedTableError for anything else."""
        arrays, told = unpack(data, kind=KIND)
        try:
            of = {
                Path.parse(p): Correction(float(arrays[f"{p}/scale"]), *(arrays[f"{p}/{name}"] for name in FIELDS[1:]))
                for p in told["paths"]
            }
            return cls(of, int(told["classes"]), float(told["bitops"]))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DamagedTableError(f"corrections: not those that quee wrote ({error!r})") from None


def fit_corrections(
    parts: Sequence[Outcomes], paths: Sequence[Path], classes: int, seed: int, *, projection_macs: int
) -> tuple[Corrections, tuple[Outcomes, ...]]:
    """Corrections of `paths`, fitted on all images of `parts`, and the answers to these images, part by part, by
    corrections that were fitted on the folds that each is not in.

    classes: how many there are. projection_macs: of the embedding that a correction needs. The same bits whatever
    number of threads is at work.
    """
    images = sum(part.images for part in parts)
    fold = np.random.default_rng([seed, images]).permutation(images) % FOLDS
    ends = np.cumsum([0, *(part.images for part in parts)])
    of: dict[Path, Correction] = {}
    by_fold: list[dict[Path, Correction]] = [{} for _ in range(FOLDS)]
    labels = np.concatenate([part.labels for part in parts])
    for path in paths:
        positions = [part.position(path) for part in parts]
        log_p = np.concatenate([log_probabilities(o, p, classes) for o, p in zip(parts, positions, strict=True)])
        embedding = np.concatenate([o.embedding[:, p] for o, p in zip(parts, positions, strict=True)])
        of[path] = _fitted(log_p, embedding, labels, seed)
        for k, kept in enumerate(by_fold):
            kept[path] = _fitted(log_p[fold != k], embedding[fold != k], labels[fold != k], seed)
    dimensions = parts[0].embedding.shape[2]
    bitops = float((projection_macs + dimensions * classes) * EMBEDDING_BITS**2 + classes * FULL_PRECISION**2)
    crossed = [Corrections(kept, classes, bitops) for kept in by_fold]
    answers = tuple(
        _merged([c.corrected(part) for c in crossed], fold[start:end])
        for part, start, end in zip(parts, ends[:-1], ends[1:], strict=True)
    )
    return Corrections(of, classes, bitops), answers


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


def _merged(answers: Sequence[Outcomes], which: NDArray[np.int64]) -> Outcomes:
    """Each image's answers out of those of `answers` that `which` names."""
    image = np.arange(len(which))
    fields = ("predicted", "errors", "uncertainty", "top_p", "top_class")
    return replace(answers[0], **{name: np.stack([getattr(a, name) for a in answers])[which, image] for name in fields})


def _fitted(
    log_p: NDArray[np.float32], embedding: NDArray[np.float16], labels: NDArray[np.int16], seed: int
) -> Correction:
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
