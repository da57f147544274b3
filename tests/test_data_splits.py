"""Splits: disjoint, stable, independent of order; what the backbone has seen is never used to judge it."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from PIL import Image

from quee_core.data.datasets import DatasetDescription, ImageDataset, TrainedOn, load_dataset
from quee_core.data.splits import SPLITS, LabelledSplit, Selection, assign_splits, choose_splits, hash_uniform
from quee_core.errors import ConfigError, DataError
from tests.published_files import write_folder

SHARES: dict[LabelledSplit, float] = {"fit": 0.4, "target": 0.45, "select": 0.15, "test": 0.0}
FOUR_SHARES: dict[LabelledSplit, float] = {"fit": 0.4, "target": 0.2, "select": 0.1, "test": 0.3}
ids_of_images = npst.arrays(np.int64, st.integers(1, 200), unique=True, elements=st.integers(0, 2**63 - 1))
shares_of_splits = st.fixed_dictionaries({name: st.floats(0.01, 1) for name in SPLITS})


class GreySet(ImageDataset):
    """Grey images of two classes in turn, a thousand ids a part."""

    def __init__(self, counts: Mapping[str, int], test_part: str | None, trained_on: TrainedOn) -> None:
        self.description = DatasetDescription(
            "grey", ("even", "odd"), tuple(counts), test_part, trained_on, "made here", "made here"
        )
        self._ids = {part: 1000 * k + np.arange(n, dtype=np.int64) for k, (part, n) in enumerate(counts.items())}

    def sample_ids(self, part: str) -> NDArray[np.int64]:
        return self._ids[part]

    def labels(self, part: str) -> NDArray[np.int16]:
        return (self._ids[part] % 2).astype(np.int16)

    def image(self, part: str, position: int) -> Image.Image:
        return Image.new("L", (4, 4), int(self._ids[part][position] % 256))

    def content(self, part: str, position: int) -> bytes:
        return self.image(part, position).tobytes()


def ids_of(dataset: ImageDataset, selections: tuple[Selection, ...]) -> list[int]:
    return [int(i) for s in selections for i in dataset.sample_ids(s.part)[s.positions]]


def parts_of(selections: tuple[Selection, ...]) -> set[str]:
    return {selection.part for selection in selections}


@settings(deadline=None)
@given(ids_of_images, shares_of_splits, st.integers(0, 1000), st.randoms())
def test_a_split_depends_on_the_id_and_the_seed_alone(ids, shares, seed, random) -> None:
    whole = assign_splits(ids, shares, seed)
    order = np.array(random.sample(range(len(ids)), len(ids)))
    np.testing.assert_array_equal(assign_splits(ids[order], shares, seed), whole[order])
    for k in range(min(len(ids), 5)):
        assert assign_splits(ids[k : k + 1], shares, seed)[0] == whole[k]


@settings(deadline=None)
@given(ids_of_images, st.integers(0, 1000))
def test_hashes_lie_in_the_unit_interval(ids: NDArray[np.int64], seed: int) -> None:
    drawn = hash_uniform(ids, seed)
    assert drawn.dtype == np.float64
    assert ((drawn >= 0) & (drawn < 1)).all()


def test_the_hash_is_splitmix64_and_stays_so() -> None:
    """Slow reference in Python's integers: a change of the hash would move images between the splits of old stores."""

    def reference(sample_id: int, seed: int) -> float:
        state = (sample_id + seed * 0xD1342543DE82EF95) % 2**64
        for _ in range(2):
            state = (state + 0x9E3779B97F4A7C15) % 2**64
            state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
            state ^= state >> 31
        return (state >> 11) / 2**53

    ids = np.array([0, 1, 59_999, 60_000, 2**40, 2**63 - 1])
    for seed in (0, 1, 12345):
        assert hash_uniform(ids, seed).tolist() == [reference(int(i), seed) for i in ids]


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_shares_come_out_as_asked_for(seed: int) -> None:
    members = assign_splits(np.arange(100_000), FOUR_SHARES, seed)
    observed = np.bincount(members, minlength=4) / len(members)
    np.testing.assert_allclose(observed, [FOUR_SHARES[name] for name in SPLITS], atol=0.006)  # four standard errors


def test_seeds_divide_independently() -> None:
    ids = np.arange(100_000)
    first, second = (assign_splits(ids, {"fit": 0.5, "test": 0.5}, seed) == 0 for seed in (0, 1))
    assert (first & second).mean() == pytest.approx(0.25, abs=0.006)


@pytest.mark.parametrize("shares", [{"fit": 0.0}, {"fit": -0.1, "test": 1.0}, {"fit": float("nan"), "test": 0.5}])
def test_impossible_shares_are_refused(shares: dict[LabelledSplit, float]) -> None:
    with pytest.raises(ConfigError, match="shares"):
        assign_splits(np.arange(4), shares, 0)


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(100, 300), min_size=2, max_size=3),
    trained_on=st.sampled_from(["none", "train", "unknown"]),
    official_test=st.booleans(),
    seed=st.integers(0, 100),
    limit=st.none() | st.integers(20, 60),
)
def test_splits_are_disjoint_and_what_the_backbone_saw_is_only_for_fit(
    counts, trained_on, official_test, seed, limit
) -> None:
    names = ("train", "test") if len(counts) == 2 else ("train", "val", "test")
    dataset = GreySet(dict(zip(names, counts, strict=True)), "test" if official_test else None, trained_on)
    splits, cautions = choose_splits(dataset, FOUR_SHARES, seed=seed, limit=limit)
    assert tuple(splits) == SPLITS
    everything = [i for parts in splits.values() for i in ids_of(dataset, parts)]
    assert len(everything) == len(set(everything))
    if limit is None:
        assert len(everything) == sum(counts)
    else:
        assert all(len(ids_of(dataset, parts)) <= limit for parts in splits.values())
    if trained_on == "train":
        for name in ("target", "select", "test"):
            assert "train" not in parts_of(splits[name])
        assert parts_of(splits["fit"]) == {"train"}
    if official_test:
        assert parts_of(splits["test"]) == {"test"}
        if trained_on != "train" or len(counts) == 3:
            assert all("test" not in parts_of(splits[name]) for name in ("fit", "target", "select"))
    assert any("not known" in caution for caution in cautions) == (trained_on == "unknown")
    assert any("share the official test part" in c for c in cautions) == (
        trained_on == "train" and official_test and len(counts) == 2
    )


def test_a_limit_keeps_a_subset_that_grows_with_it() -> None:
    dataset = GreySet({"train": 900, "test": 900}, "test", "none")
    kept = [choose_splits(dataset, SHARES, seed=3, limit=limit)[0] for limit in (50, 100, 200, None)]
    for fewer, more in itertools.pairwise(kept):
        for name in SPLITS:
            assert set(ids_of(dataset, fewer[name])) <= set(ids_of(dataset, more[name]))
    assert [len(ids_of(dataset, parts)) for parts in kept[0].values()] == [50] * 4


def test_positions_ascend_so_that_files_are_read_in_order() -> None:
    dataset = GreySet({"train": 300, "test": 300}, "test", "train")
    splits, _ = choose_splits(dataset, SHARES, seed=0, limit=50)
    for parts in splits.values():
        for selection in parts:
            assert (np.diff(selection.positions) > 0).all()


def test_the_configuration_overrides_what_the_description_says() -> None:
    dataset = GreySet({"train": 300, "test": 300}, "test", "unknown")
    splits, cautions = choose_splits(dataset, SHARES, seed=0, trained_on="none")
    assert cautions == ()
    assert parts_of(splits["target"]) == {"train"}


def test_without_a_test_part_a_share_for_test_must_be_given() -> None:
    dataset = GreySet({"all": 300}, None, "none")
    with pytest.raises(DataError, match=r"grey: it has no official test part, and dataset\.test is 0"):
        choose_splits(dataset, SHARES, seed=0)
    splits, _ = choose_splits(dataset, FOUR_SHARES, seed=0)
    assert parts_of(splits["test"]) == {"all"}


def test_a_set_whose_every_image_trained_the_backbone_is_refused() -> None:
    dataset = GreySet({"all": 300}, None, "unknown")
    with pytest.raises(DataError, match=r"grey: the backbone was trained on all its parts \(all\)"):
        choose_splits(dataset, FOUR_SHARES, seed=0, trained_on="train")


def test_an_empty_split_is_named() -> None:
    dataset = GreySet({"train": 300, "test": 0}, "test", "none")
    with pytest.raises(DataError, match="grey: split 'test' is empty"):
        choose_splits(dataset, SHARES, seed=0)


def test_a_class_without_images_in_fit_is_named(tmp_path: Path) -> None:
    write_folder(
        tmp_path, {"train/cat": 60, "train/dog": 1, "train/emu": 1, "test/cat": 5, "test/dog": 5, "test/emu": 5}
    )
    dataset = load_dataset("folder", tmp_path)
    lonely = {"fit": 1e-9, "target": 0.5, "select": 0.5}
    with pytest.raises(DataError, match="split 'fit' is empty"):
        choose_splits(dataset, lonely, seed=0)
    seed = next(  # one under which neither lone image falls into fit
        s for s in range(100) if (assign_splits(dataset.sample_ids("train")[-2:], SHARES, s) > 0).all()
    )
    with pytest.raises(DataError, match=r"class 'dog' has no image in the fit split \(nor have 1 others\)"):
        choose_splits(dataset, SHARES, seed=seed)


def test_the_bundled_splits_are_disjoint_and_of_every_class() -> None:
    dataset = load_dataset("fashion_mnist")
    splits, cautions = choose_splits(dataset, SHARES, seed=0)
    assert cautions == ()
    ids = {name: set(ids_of(dataset, parts)) for name, parts in splits.items()}
    assert sum(map(len, ids.values())) == len(set.union(*ids.values())) == 26_000
    assert ids["test"] == set(range(60_000, 70_000))
    assert ids["fit"] == set(dataset.sample_ids("train").tolist())  # which the backbone was trained on
    for parts in splits.values():
        labels = np.concatenate([dataset.labels(s.part)[s.positions] for s in parts])
        assert set(labels.tolist()) == set(range(10))


@pytest.mark.parametrize("trained_on", ["none", "train", "unknown"])
def test_unlabelled_images_are_a_split_of_their_own(trained_on: TrainedOn) -> None:
    known = {"train": 300, "val": 200, "test": 100}
    plain, _ = choose_splits(GreySet(known, "test", trained_on), SHARES, seed=3)
    dataset = GreySet(known | {"unlabelled": 400}, "test", trained_on)
    for asked, count in ((150, 150), (1000, 400)):
        splits, _ = choose_splits(dataset, SHARES, seed=3, unlabelled=asked)
        assert parts_of(splits["unlabelled"]) == {"unlabelled"}
        assert len(set(ids_of(dataset, splits["unlabelled"]))) == count
        for name in SPLITS:
            assert ids_of(dataset, splits[name]) == ids_of(dataset, plain[name])
    limited, _ = choose_splits(dataset, SHARES, seed=3, limit=60, unlabelled=150)
    assert len(ids_of(dataset, limited["unlabelled"])) == 60


def test_without_unlabelled_images_there_is_no_split_of_them() -> None:
    known = {"train": 300, "test": 100}
    for dataset, asked in (
        (GreySet(known, "test", "none"), 50),
        (GreySet(known | {"unlabelled": 0}, "test", "none"), 0),
        (GreySet(known | {"unlabelled": 40}, "test", "none"), 0),
    ):
        splits, _ = choose_splits(dataset, SHARES, seed=0, unlabelled=asked)
        assert tuple(splits) == SPLITS
    with pytest.raises(DataError, match="part 'unlabelled' holds no image"):
        choose_splits(GreySet(known | {"unlabelled": 0}, "test", "none"), SHARES, seed=0, unlabelled=50)


def test_the_reader_is_told_that_rules_saw_more_than_baselines() -> None:
    dataset = GreySet({"train": 300, "test": 100, "unlabelled": 40}, "test", "none")
    _, cautions = choose_splits(dataset, SHARES, seed=0, unlabelled=30)
    assert [c for c in cautions if "on 30 unlabelled images too" in c]
