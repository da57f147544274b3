"""Answers revised by labels: corrected, summed along a ladder of exits, or both (design, section 9).

Heads learn on `fit`, often on images that the backbone was trained on. The labels of `target` and `select`, on which
rules are chosen, can teach as well: for each uniform path a correction (corrections.py), and how much of what the exits
before have said counts beside what an exit says [Yu et al., Boosted Dynamic Neural Networks, AAAI 2023, have the half].
Rules are tuned on answers to new images, so each fold of the images is answered by what was fitted on the others, and
all further images by what was fitted on all.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quee_core.archive import pack, unpack
from quee_core.cascades import REVISED, SUMMED, SUMS, AnswerKind
from quee_core.corrections import FIELDS, Correction, fitted_correction, log_probabilities, on_grid
from quee_core.costs import CostTable
from quee_core.errors import DamagedTableError, InvalidPathError
from quee_core.paths import FULL_PRECISION, Path
from quee_core.tables import Outcomes, feature_table
from quee_core.teacher import fitted_weights

KIND = "revisions"
FOLDS = 4
TOGETHER = 2048  # images that are revised at a time
SUMMED_VALUES = 4_000_000  # logits of an exit that weights of a sum are fitted to, at most
_OF_PATHS = ("predicted", "errors", "uncertainty", "top_p", "top_class", "embedding")
Weights = tuple[float, float]  # of what an exit says, and of what those before have said


@dataclass(frozen=True, eq=False)
class Revisions:
    """Of some paths and the answers of so many classes.

    corrections: of each. sums: for the kinds that are summed, weights of each path that has an exit before. bitops: of
    a correction, its embedding included.
    """

    corrections: Mapping[Path, Correction]
    sums: Mapping[AnswerKind, Mapping[Path, Weights]]
    classes: int
    bitops: float

    def logits(
        self, kind: AnswerKind, path: Path, outcomes: Outcomes, before: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Revised logits float32 [n, classes] of what `path` answers.

        before: those of the exit before, which a sum needs. Raises InvalidPathError for a path that is not revised so.
        """
        weights = self.sums[kind].get(path) if kind in self.sums else None
        unsummed = kind in self.sums and path.exit > 1 and (weights is None or before is None)
        if path not in self.corrections or unsummed:
            raise InvalidPathError(f"path {path}: its answers cannot be {kind}")
        position = outcomes.position(path)
        log_p = log_probabilities(outcomes, position, self.classes)
        said = _said(kind, self.corrections[path], log_p, outcomes.embedding[:, position])
        return said if weights is None or before is None else _sum(weights, said, before)

    def answers(self, kind: AnswerKind, outcomes: Outcomes) -> Outcomes:
        """What the revised paths answer, without embeddings."""
        none, tables, logits = np.zeros((outcomes.images, 1), np.float32), {}, None
        for path in _climbing(self.corrections):
            logits = self.logits(kind, path, outcomes, logits)
            tables[path] = feature_table(outcomes.sample_ids, outcomes.labels, logits, none)
        return Outcomes.from_tables([(path, tables[path]) for path in self.corrections])

    def dearer(self, kind: AnswerKind, table: CostTable) -> CostTable:
        """`table`, in BitOps, with heads whose answers are revised."""
        extra = 0.0 if kind == SUMMED else self.bitops
        extra += 2.0 * self.classes * FULL_PRECISION**2 if kind in SUMS else 0.0
        return replace(table, heads=tuple(head + extra for head in table.heads))

    def to_bytes(self) -> bytes:
        """As an archive, without pickle; equal ones give equal bytes."""
        arrays: dict[str, NDArray[Any]] = {}
        for path, one in self.corrections.items():
            arrays |= {f"{path}/{name}": np.asarray(getattr(one, name)) for name in FIELDS}
            arrays |= {f"{path}/{kind}": np.array(of[path]) for kind, of in self.sums.items() if path in of}
        told = {"paths": [str(path) for path in self.corrections], "classes": self.classes, "bitops": self.bitops}
        return pack(arrays, told, kind=KIND)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Revisions":
        """Read back what `to_bytes` wrote. Raises DamagedTableError for anything else."""
        arrays, told = unpack(data, kind=KIND)
        try:
            paths = [Path.parse(path) for path in told["paths"]]
            corrections = {
                path: Correction(
                    float(arrays[f"{path}/scale"]), *(arrays[f"{path}/{name}"] for name in FIELDS[1:])
                )
                for path in paths
            }  # fmt: skip
            sums = {kind: {p: _weights(arrays[f"{p}/{kind}"]) for p in paths if p.exit > 1} for kind in SUMS}
            return cls(corrections, sums, int(told["classes"]), float(told["bitops"]))
        except (KeyError, IndexError, TypeError, ValueError, InvalidPathError) as error:
            raise DamagedTableError(f"revisions: not those that quee wrote ({error!r})") from None


@dataclass(frozen=True, eq=False)
class RevisedAnswers:
    """Revisions, and what they answer on the images that rules are chosen on.

    answers: by kind, of unlabelled images first, then target, then select; to these two by what was not fitted on them.
    """

    revisions: Revisions
    answers: Mapping[AnswerKind, Outcomes]

    @classmethod
    def of(
        cls,
        table: CostTable,
        target: Outcomes,
        select: Outcomes,
        unlabelled: Outcomes | None,
        classes: int,
        seed: int,
        *,
        projection_macs: int,
    ) -> "RevisedAnswers | None":
        """Revised by the labels of `target` and `select`; None where cost is time, for that of revisions is not
        measured. See `fit_revisions`.
        """
        if table.unit != "bitops":
            return None
        uniform = [path for path in target.paths if path.is_uniform]
        revisions, answers = fit_revisions((target, select), uniform, classes, seed, projection_macs=projection_macs)
        if unlabelled is not None:
            answers = {
                kind: Outcomes.joined_answers([revisions.answers(kind, unlabelled), known])
                for kind, known in answers.items()
            }
        return cls(revisions, answers)


def fit_revisions(
    parts: Sequence[Outcomes], paths: Sequence[Path], classes: int, seed: int, *, projection_macs: int
) -> tuple[Revisions, Mapping[AnswerKind, Outcomes]]:
    """Revisions of uniform `paths`, fitted on all images of `parts`, and what those that were fitted on the folds that
    an image is not in answer to it, by kind, part after part.

    classes: how many there are. projection_macs: of the embedding that a correction needs. The same bits whatever
    number of threads is at work.
    """
    images = _Images(parts, classes)
    fold = np.random.default_rng([seed, images.count]).permutation(images.count) % FOLDS
    revisions = images.fitted(paths, np.arange(images.count), seed, projection_macs)
    crossed = [images.fitted(paths, np.flatnonzero(fold != k), seed, projection_macs) for k in range(FOLDS)]
    crossed_answers: dict[AnswerKind, list[Outcomes]] = {kind: [] for kind in REVISED}
    for k, fitted in enumerate(crossed):
        held = images.take(paths, np.flatnonzero(fold == k))
        for kind, answers in crossed_answers.items():
            answers.append(fitted.answers(kind, held))
    order = np.argsort(np.argsort(fold, kind="stable"))
    return revisions, {kind: Outcomes.joined_answers(of).take(order) for kind, of in crossed_answers.items()}


class _Images:
    """The images of all parts, one path at a time: all together they would take much memory."""

    def __init__(self, parts: Sequence[Outcomes], classes: int) -> None:
        self.parts, self.classes = parts, classes
        self.labels = np.concatenate([part.labels for part in parts])
        self.count = len(self.labels)

    def take(self, paths: Sequence[Path], rows: NDArray[np.intp]) -> Outcomes:
        """The images at `rows`, ascending, along `paths` alone."""
        picked = []
        for part, own in self._by_part(rows):
            cells = np.ix_(own, np.array([part.position(path) for path in paths]))
            fields = {name: getattr(part, name)[cells] for name in _OF_PATHS}
            picked.append(
                Outcomes(paths=tuple(paths), sample_ids=part.sample_ids[own], labels=part.labels[own], **fields)
            )
        joined = Outcomes.joined_answers(picked)
        return replace(joined, embedding=np.concatenate([part.embedding for part in picked]))

    def fitted(self, paths: Sequence[Path], rows: NDArray[np.intp], seed: int, projection_macs: int) -> Revisions:
        """On the images at `rows`."""
        labels = self.labels[rows]
        some = slice(None, None, max(1, -(-len(rows) * self.classes // SUMMED_VALUES)))
        corrections: dict[Path, Correction] = {}
        sums: dict[AnswerKind, dict[Path, Weights]] = {kind: {} for kind in SUMS}
        before: dict[AnswerKind, NDArray[np.float32]] = {}  # along the ladder that is being climbed
        for path in _climbing(paths):
            log_p, embedding = self._seen(path, rows)
            corrections[path] = fitted_correction(log_p, embedding, labels, seed)
            for kind, weights in sums.items():
                said = _said(kind, corrections[path], log_p, embedding)
                if path.exit > 1:
                    both = np.stack([said[some], before[kind][some]], axis=1).astype(np.float64)
                    own, earlier = fitted_weights(both, labels[some].astype(np.intp)).tolist()
                    weights[path] = own, earlier
                    said = _sum(weights[path], said, before[kind])
                before[kind] = said
        bitops = max(one.bitops(projection_macs) for one in corrections.values())
        return Revisions({path: corrections[path] for path in paths}, sums, self.classes, bitops)

    def _seen(self, path: Path, rows: NDArray[np.intp]) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
        log_p, embedding = [], []
        for part, own in self._by_part(rows):
            position = part.position(path)
            log_p.append(log_probabilities(part, position, self.classes, own))
            embedding.append(part.embedding[own, position])
        return np.concatenate(log_p), np.concatenate(embedding)

    def _by_part(self, rows: NDArray[np.intp]) -> Iterator[tuple[Outcomes, NDArray[np.intp]]]:
        """Each part with those of `rows`, ascending, that are its own, as it counts them."""
        start = 0
        for part in self.parts:
            yield part, rows[(rows >= start) & (rows < start + part.images)] - start
            start += part.images


def _climbing(paths: Mapping[Path, Any] | Sequence[Path]) -> Iterator[Path]:
    """Uniform paths, each after those that it goes on from."""
    return iter(sorted(paths, key=lambda path: (path.bits[0], path.exit)))


def _said(
    kind: AnswerKind, correction: Correction, log_p: NDArray[np.float32], embedding: NDArray[np.float16]
) -> NDArray[np.float32]:
    """What an exit says by itself, float32 [n, classes]."""
    said = np.empty_like(log_p)
    for start in range(0, len(log_p), TOGETHER):
        rows = slice(start, start + TOGETHER)
        said[rows] = on_grid(log_p[rows]) if kind == SUMMED else correction(log_p[rows], embedding[rows])
    return said


def _sum(weights: Weights, said: NDArray[np.float32], before: NDArray[np.float32]) -> NDArray[np.float32]:
    summed = np.empty_like(said)
    for start in range(0, len(said), TOGETHER):
        rows = slice(start, start + TOGETHER)
        summed[rows] = weights[0] * said[rows].astype(np.float64) + weights[1] * before[rows].astype(np.float64)
    return summed


def _weights(stored: NDArray[Any]) -> Weights:
    own, earlier = stored.tolist()
    return float(own), float(earlier)
