"""The four disjoint splits, by a stable hash of sample ids (design, section 6), and the images without labels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quee_core.data.datasets import UNLABELLED, DatasetDescription, ImageDataset, TrainedOn
from quee_core.errors import ConfigError, DataError

TRAINED_SALT = 1 << 21  # keeps the draw of trained images apart from those of splits and of augmentation

LabelledSplit = Literal["fit", "target", "select", "test"]
SplitName = LabelledSplit | Literal["unlabelled"]  # UNLABELLED
SPLITS: tuple[LabelledSplit, ...] = ("fit", "target", "select", "test")


@dataclass(frozen=True, eq=False)
class Selection:
    """Some images of one part of a data set: positions intp [n], in the order in which they are read."""

    part: str
    positions: NDArray[np.intp]


def hash_uniform(sample_ids: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each id, float64 [n], that depends on the id and the seed alone (splitmix64)."""
    with np.errstate(over="ignore"):
        state = sample_ids.astype(np.uint64) + np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
        for _ in range(2):
            state = state + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) / 2.0**53


def assign_splits(
    sample_ids: NDArray[np.int64], fractions: Mapping[LabelledSplit, float], seed: int
) -> NDArray[np.int8]:
    """Position in `SPLITS` of each id, int8 [n]: independent of the other ids and of their order.

    fractions: expected share of each split; they are scaled to add up to 1. Raises ConfigError if one is negative or
    not finite, or all are zero.
    """
    if not all(0 <= share < np.inf for share in fractions.values()) or not any(fractions.values()):
        raise ConfigError(f"shares {dict(fractions)}: want numbers from 0, one of them above 0")
    edges = np.cumsum([fractions.get(name, 0.0) for name in SPLITS])
    drawn = hash_uniform(sample_ids, seed) * edges[-1]
    member: NDArray[np.int8] = np.searchsorted(edges[:-1], drawn, side="right").astype(np.int8)
    return member


@dataclass(frozen=True)
class TrainedShare:
    """A backbone that was trained on a share of the images that are not test: those whose hash under `seed` is low."""

    share: float
    seed: int

    def saw(self, sample_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether it was trained on each image, bool [n]."""
        return hash_uniform(sample_ids, TRAINED_SALT + self.seed) < self.share


def choose_splits(
    dataset: ImageDataset,
    fractions: Mapping[LabelledSplit, float],
    *,
    seed: int,
    trained_on: TrainedOn | TrainedShare | None = None,
    limit: int | None = None,
    unlabelled: int = 0,
) -> tuple[dict[SplitName, tuple[Selection, ...]], tuple[str, ...]]:
    """Divide a data set's images; returns the splits, and what a reader of the results must be told.

    The official test part is `test`. A backbone's confidence on its own training images says nothing about new ones:
    where it was trained on the training part (`trained_on` "train"; the part of that name, else all that are not
    test), that part serves `fit` alone, and the other splits share what is left; so it is with the images of a
    `TrainedShare`. Without a test part, `test` comes from the hash too. `limit` keeps the images of each split whose
    hash is lowest. A part of unlabelled images is a split of its own, of at most `unlabelled` of them; there is none
    for a set without, or with `unlabelled` 0.

    Raises DataError for a class without images in `fit`, a split or an unlabelled part that is empty, or a set without
    an image that the backbone has not seen.
    """
    about = replace(dataset.description, parts=tuple(p for p in dataset.description.parts if p != UNLABELLED))
    trained = trained_on or about.trained_on
    seen_parts = trained_parts(about)[0] if trained == "train" else ()
    plan, cautions = _shares(about, fractions, seen_by_backbone=seen_parts)
    if trained == "unknown":
        cautions.append(
            "it is not known which images the backbone was trained on; if target, select or unlabelled hold some of "
            "them, its confidence there is too high"
        )
    splits: dict[SplitName, list[Selection]] = {name: [] for name in SPLITS}
    for part, shares in plan.items():
        sample_ids = dataset.sample_ids(part)
        if isinstance(trained, TrainedShare) and part != about.test_part:
            seen = trained.saw(sample_ids)
            member = assign_splits(sample_ids, {**shares, "fit": 0.0}, seed)
            member[seen] = SPLITS.index("fit")
        else:
            member = assign_splits(sample_ids, shares, seed)
        for k, name in enumerate(SPLITS):
            if len(positions := np.flatnonzero(member == k)):
                splits[name].append(Selection(part, positions))
    chosen = {
        name: tuple(parts) if limit is None else subsample(dataset, parts, limit, seed + 1)
        for name, parts in splits.items()
    }
    _check(dataset, chosen)
    if UNLABELLED in dataset.description.parts and unlabelled:
        whole = Selection(UNLABELLED, np.arange(len(dataset.sample_ids(UNLABELLED))))
        if not len(whole.positions):
            raise DataError(
                f"data set {about.name}: its part {UNLABELLED!r} holds no image; fill it, remove it, or set "
                "dataset.unlabelled to 0"
            )
        count = unlabelled if limit is None else min(unlabelled, limit)
        chosen[UNLABELLED] = subsample(dataset, [whole], count, seed + 1)
        cautions.append(
            f"QuEE's rules were chosen on {image_count(chosen[UNLABELLED]):,} unlabelled images too; baselines were "
            "tuned on labelled ones alone"
        )
    return chosen, tuple(cautions)


def image_count(selections: Iterable[Selection]) -> int:
    """How many images `selections` hold."""
    return sum(len(selection.positions) for selection in selections)


def subsample(dataset: ImageDataset, parts: Sequence[Selection], count: int, seed: int) -> tuple[Selection, ...]:
    """The `count` images of `parts` whose hash under `seed` is lowest, in the order of `parts`; all if there are fewer.

    By hash and not from the front, for data sets are often ordered by class. A smaller count keeps part of a larger
    one's images. Use another seed than the splits', or the images would come from one edge of a split.
    """
    drawn = [hash_uniform(dataset.sample_ids(s.part)[s.positions], seed) for s in parts]
    if image_count(parts) <= count:
        return tuple(parts)
    bar = np.sort(np.concatenate(drawn))[count - 1]
    kept = (Selection(s.part, s.positions[d <= bar]) for s, d in zip(parts, drawn, strict=True))
    return tuple(selection for selection in kept if len(selection.positions))


def trained_parts(about: DatasetDescription) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Parts that a backbone of the set is trained on, `train` or all that are not test, and labelled ones besides."""
    rest = tuple(part for part in about.parts if part not in (about.test_part, UNLABELLED))
    seen = ("train",) if "train" in rest else rest
    return seen, tuple(part for part in rest if part not in seen)


def _shares(
    about: DatasetDescription, fractions: Mapping[LabelledSplit, float], *, seen_by_backbone: tuple[str, ...]
) -> tuple[dict[str, dict[LabelledSplit, float]], list[str]]:
    """Share of each split in each part, and what must be told of it."""
    unseen = [part for part in about.parts if part not in seen_by_backbone]
    own: dict[LabelledSplit, float] = {name: fractions.get(name, 0.0) for name in SPLITS}
    if about.test_part is None and own["test"] <= 0:
        raise DataError(
            f"data set {about.name}: it has no official test part, and dataset.test is 0; "
            "give dataset.test a share, such as 0.3"
        )
    if not seen_by_backbone:
        inner = own if about.test_part is None else own | {"test": 0.0}
        return {part: {"test": 1.0} if part == about.test_part else inner for part in about.parts}, []
    if not unseen:
        raise DataError(
            f"data set {about.name}: the backbone was trained on all its parts ({', '.join(about.parts)}), and target, "
            "select and test want new images; add a part, such as test, or change dataset.trained_on"
        )
    plan: dict[str, dict[LabelledSplit, float]] = {part: {"fit": 1.0} for part in seen_by_backbone}
    if unseen == [about.test_part]:
        shared: dict[LabelledSplit, float] = {"target": own["target"], "select": own["select"]}
        plan[unseen[0]] = shared | {"test": own["test"] or own["fit"]}
        return plan, [
            "the backbone was trained on the training part, so target, select and test share the official test part"
        ]
    inner = own | {"fit": 0.0, "test": own["test"] if about.test_part is None else 0.0}
    return plan | {part: {"test": 1.0} if part == about.test_part else inner for part in unseen}, []


def _check(dataset: ImageDataset, splits: Mapping[SplitName, tuple[Selection, ...]]) -> None:
    about = dataset.description
    for name, parts in splits.items():
        if not parts:
            raise DataError(f"data set {about.name}: split {name!r} is empty; it needs more images, or a larger share")
    seen = np.unique(np.concatenate([dataset.labels(s.part)[s.positions] for s in splits["fit"]]))
    absent = [about.classes[k] for k in range(len(about.classes)) if k not in set(seen.tolist())]
    if absent:
        raise DataError(
            f"data set {about.name}: class {absent[0]!r} has no image in the fit split"
            + (f" (nor have {len(absent) - 1} others)" if len(absent) > 1 else "")
            + "; add images of it, raise dataset.limit or dataset.fit, or remove the class"
        )
