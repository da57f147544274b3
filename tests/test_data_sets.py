"""Data sets by name: the bundled one, Parquet files and image folders, and what is said of bad ones."""

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from quee_core.backbones.registry import BACKBONES
from quee_core.data import glyph_set
from quee_core.data.datasets import DATASETS, ImageDataset, load_dataset
from quee_core.data.decoding import decode
from quee_core.data.glyph_set import PARTS, TRAINING, draw_glyphs, glyph_labels
from quee_core.errors import ConfigError, DataError
from tests.published_files import encoded, noise, write_folder, write_parquet

PICTURES = [encoded(noise(seed, 6, 5, 3)) for seed in range(10)]


def columns(n: int = 10, **changed: Any) -> dict[str, Any]:
    """Columns of a sound part with ids from 100; None removes one."""
    sound: dict[str, Any] = {
        "sample_id": pa.array(range(100, 100 + n), pa.int64()),
        "label": pa.array([k % 2 for k in range(n)], pa.int8()),
        "image": pa.array(PICTURES[:n], pa.binary()),
    }
    return {name: column for name, column in (sound | changed).items() if column is not None}


# Names


def test_every_data_set_says_what_it_is_and_whether_it_needs_a_folder() -> None:
    assert {"fashion_mnist", "folder", "parquet", "cifar10", "cifar100", "svhn", "imagenet"} <= set(DATASETS)
    for name, entry in DATASETS.items():
        assert entry.description
        if entry.needs_root:
            with pytest.raises(DataError, match=f"data set {name}: needs a folder"):
                load_dataset(name)


def test_the_registry_is_read_only() -> None:
    with pytest.raises(TypeError):
        DATASETS["mine"] = DATASETS["folder"]  # type: ignore[index]


def test_an_unknown_name_gets_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"data set 'fashon_mnist': unknown; did you mean 'fashion_mnist'"):
        load_dataset("fashon_mnist")


@pytest.mark.parametrize("name", sorted(name for name, entry in DATASETS.items() if entry.needs_root))
def test_a_missing_folder_is_named_with_what_is_expected_there(name: str, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(
        DataError, match=rf"data set {name}: folder {re.escape(str(absent))} is missing; expected there"
    ):
        load_dataset(name, absent)
    absent.touch()
    with pytest.raises(ConfigError, match=rf"data set {name}: {re.escape(str(absent))} is a file; name the folder"):
        load_dataset(name, absent)


# The bundled set


@pytest.fixture(scope="module")
def bundled() -> ImageDataset:
    return load_dataset("fashion_mnist")


@pytest.mark.parametrize(
    ("part", "pixels", "labels"),
    [
        ("heldout", "6a0aa0efe4f774404e84cc44ab53d3e89fe9aaff87a5ed342df929cf3eec83ab",
         "a5c219804a19a4d41379bea6631854ea5c83747b9c8092903dbf387a3b3fed85"),
        ("train", "b61f32337fcedfba95f18719b7f9a6534f5fd52bc51c202bea7ea6a8981d414a",
         "99df999b6496e278d97756fb07cf4bf0d4b4579c1d9d90e11f1cb3a9b77b0dce"),
        ("test", "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
         "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9"),
    ],
)  # fmt: skip
def test_the_bundled_pixels_are_the_published_ones(bundled: ImageDataset, part: str, pixels: str, labels: str) -> None:
    """The hashes are those of the pixels and labels in the published idx files."""
    digest = hashlib.sha256()
    for position in range(len(bundled.labels(part))):
        digest.update(bundled.image(part, position).tobytes())
    assert digest.hexdigest() == pixels
    assert hashlib.sha256(bundled.labels(part).astype(np.uint8).tobytes()).hexdigest() == labels


def test_the_bundled_set_has_as_many_images_of_each_class(bundled: ImageDataset) -> None:
    about = bundled.description
    assert about.parts == ("train", "heldout", "test")
    assert (about.test_part, about.trained_on) == ("test", "train")
    for part in about.parts:
        assert np.bincount(bundled.labels(part)).tolist() == [600 if part == "train" else 1000] * 10
    heldout, test = bundled.sample_ids("heldout"), bundled.sample_ids("test")
    assert (np.diff(heldout) > 0).all()
    assert max(heldout.max(), bundled.sample_ids("train").max()) < 60_000
    np.testing.assert_array_equal(test, np.arange(60_000, 70_000))
    assert (bundled.image("test", 0).mode, bundled.image("test", 0).size) == ("L", (28, 28))


def test_the_bundled_set_takes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fashion_mnist: it is bundled and takes no folder"):
        load_dataset("fashion_mnist", tmp_path)


# The set that is drawn


def test_glyphs_are_drawn_by_their_ids_alone() -> None:
    together = draw_glyphs(range(100, 130))
    np.testing.assert_array_equal(together[7:9], draw_glyphs(range(107, 109)))
    assert together.dtype == np.uint8
    assert len(np.unique(together.reshape(30, -1), axis=0)) == 30


def test_glyphs_that_are_not_for_training_have_nothing_in_common_with_those_that_are() -> None:
    ids = [set(PARTS[part]) for part in ("heldout", "test")] + [set(TRAINING)]
    assert sum(map(len, ids)) == len(set.union(*ids))
    assert set(PARTS["train"]) < set(TRAINING)


def test_glyphs_have_all_classes_evenly_and_are_not_blank() -> None:
    glyphs = load_dataset("glyphs")
    assert (glyphs.description.test_part, glyphs.description.trained_on) == ("test", "train")
    for part in glyphs.description.parts:
        counts = np.bincount(glyphs.labels(part), minlength=35)
        assert counts.min() > len(glyphs.labels(part)) / 35 * 0.75
        assert len(counts) == len(glyphs.description.classes) == 35
    drawn = draw_glyphs(range(300))
    assert (drawn.reshape(300, -1).std(axis=1) > 3).all()
    assert glyphs.description.classes == BACKBONES["micro_vit_glyphs"].class_names


def test_a_glyph_set_shows_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyph_set, "PARTS", {"heldout": range(20), "test": range(20, 30)})
    glyphs = glyph_set.GlyphSet()
    np.testing.assert_array_equal(np.asarray(glyphs.image("test", 3)), draw_glyphs(range(23, 24))[0])
    assert glyphs.content("test", 3) == draw_glyphs(range(23, 24)).tobytes()
    np.testing.assert_array_equal(glyphs.labels("test"), glyph_labels(np.arange(20, 30)))


def test_the_glyph_set_takes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="glyphs: it is drawn and takes no folder"):
        load_dataset("glyphs", tmp_path)


def test_licence_and_attribution_lie_beside_the_bundled_images() -> None:
    import quee_core

    folder = Path(quee_core.__file__).parent / "assets" / "fashion_mnist"
    assert "Zalando SE" in (folder / "LICENSE").read_text()
    assert "permission notice shall be included" in (folder / "LICENSE").read_text()
    assert "Xiao" in (folder / "README.md").read_text()
    assert sum(file.stat().st_size for file in folder.glob("*.parquet")) < 14e6


def test_the_script_that_bundles_writes_what_the_reader_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    import bundle_fashion_mnist

    images, labels, ids = noise(0, 7, 28, 28), np.arange(7, dtype=np.uint8), np.arange(60_000, 60_007)
    bundle_fashion_mnist.write(tmp_path / "test.parquet", images, labels, ids)
    dataset = load_dataset("parquet", tmp_path)
    assert dataset.description.classes == bundle_fashion_mnist.CLASSES
    np.testing.assert_array_equal(dataset.sample_ids("test"), ids)
    np.testing.assert_array_equal(dataset.labels("test"), labels)
    for position in range(7):
        np.testing.assert_array_equal(np.asarray(dataset.image("test", position)), images[position])


# Parquet


@given(
    counts=st.lists(st.integers(0, 10), min_size=1, max_size=3),
    group=st.integers(1, 11),
    order=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=40),
)
@settings(deadline=None, max_examples=30)
def test_each_row_of_a_parquet_set_is_read_back_in_any_order(tmp_path_factory, counts, group, order) -> None:
    folder = tmp_path_factory.mktemp("parquet")
    for k, n in enumerate(counts):
        ids = pa.array(range(100 * k, 100 * k + n), pa.int64())
        write_parquet(folder / f"part{k}.parquet", columns(n, sample_id=ids), rows_per_group=group)
    dataset = load_dataset("parquet", folder)
    for k, position in order:
        if k < len(counts) and position < counts[k]:
            assert dataset.content(f"part{k}", position) == PICTURES[position]
            expected = Image.open(io.BytesIO(PICTURES[position]))
            assert dataset.image(f"part{k}", position).tobytes() == expected.tobytes()
    for k, n in enumerate(counts):
        assert dataset.sample_ids(f"part{k}").tolist() == list(range(100 * k, 100 * k + n))
        assert dataset.labels(f"part{k}").tolist() == [i % 2 for i in range(n)]


def test_a_parquet_set_holds_a_few_row_groups_however_large_it_is(tmp_path: Path) -> None:
    """64 MB of images in 64 row groups, read from end to end, while Arrow never holds more than a few megabytes."""
    megabyte = b"\x89PNG" + bytes(10**6)
    table = pa.table({"sample_id": range(64), "label": [0, 1] * 32, "image": [megabyte] * 64})
    path = tmp_path / "train.parquet"
    metadata = {"classes": '["cat", "dog"]'}
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=1, use_dictionary=False)
    del table
    before = pa.total_allocated_bytes()
    dataset = load_dataset("parquet", tmp_path)
    most = 0
    for position in range(64):
        assert len(dataset.content("train", position)) == len(megabyte)
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 10e6


def test_sets_that_number_each_part_from_zero_get_distinct_ids(tmp_path: Path) -> None:
    for part in ("heldout", "test"):
        index = pa.array(range(10), pa.int32())
        write_parquet(tmp_path / "cifar10" / f"{part}.parquet", columns(sample_id=None, index=index))
    dataset = load_dataset("cifar10_micro", tmp_path)
    assert dataset.description.test_part == "test"
    assert dataset.description.trained_on == "none"
    ids = np.concatenate([dataset.sample_ids(part) for part in dataset.description.parts])
    assert len(set(ids.tolist())) == 20


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": None}, r"test\.parquet: want one column 'label'; the file has the columns \['sample_id', 'image'\]"),
        ({"image": None}, r"test\.parquet: want one column 'image'"),
        ({"sample_id": None}, r"test\.parquet: want one column 'sample_id'"),
        ({"label": pa.array([0.5] * 10)}, r"test\.parquet: column 'label' is of type double; want integers"),
        ({"sample_id": pa.array(["a"] * 10)}, r"test\.parquet: column 'sample_id' is of type string"),
        ({"image": pa.array(["a.png"] * 10)}, r"test\.parquet: column 'image' is of type string; want binary"),
        ({"label": pa.array([0] * 7 + [2, 0, 0])}, r"test\.parquet: row 7: label 2 is out of range; there are 2 cla"),
        ({"label": pa.array([0] * 4 + [-1] * 6)}, r"test\.parquet: row 4: label -1 is out of range"),
        ({"label": pa.array([0] * 5 + [None] * 5)}, r"test\.parquet: row 5: label is empty"),
        ({"sample_id": pa.array([None] + [1] * 9)}, r"test\.parquet: row 0: sample_id is empty"),
        ({"sample_id": pa.array([4] * 10)}, r"data set parquet: sample_id 4 stands twice"),
    ],
)
def test_a_bad_column_is_named_with_file_and_row(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", columns(**changed))
    with pytest.raises(DataError, match=message):
        load_dataset("parquet", tmp_path)


def test_an_id_that_stands_in_two_parts_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", columns())
    write_parquet(tmp_path / "test.parquet", columns())
    with pytest.raises(DataError, match="sample_id 100 stands twice"):
        load_dataset("parquet", tmp_path)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (None, "lacks 'classes', a JSON list of class names"),
        ("cat, dog", "is not JSON"),
        ('"cat"', "want a JSON list of two or more distinct names"),
        ('["cat", "cat"]', "want a JSON list of two or more distinct names"),
    ],
)
def test_bad_class_names_are_named_with_the_file(classes: str | None, message: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", columns(), classes=classes)
    with pytest.raises(DataError, match=rf"test\.parquet: .*{message}"):
        load_dataset("parquet", tmp_path)


def test_parts_that_disagree_on_the_classes_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", columns())
    write_parquet(tmp_path / "test.parquet", columns(), classes='["dog", "cat"]')
    with pytest.raises(DataError, match=r"train\.parquet: its class names differ from those of .*test\.parquet"):
        load_dataset("parquet", tmp_path)


def test_unlabelled_images_need_neither_labels_nor_class_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", columns())
    unknown = columns(sample_id=pa.array(range(200, 210), pa.int64()), label=None)
    write_parquet(tmp_path / "unlabelled.parquet", unknown, classes=None)
    dataset = load_dataset("parquet", tmp_path)
    assert dataset.description.parts == ("train", "unlabelled")
    assert dataset.description.test_part is None
    assert dataset.labels("unlabelled").tolist() == [-1] * 10
    assert dataset.content("unlabelled", 3) == PICTURES[3]
    nonsense = columns(sample_id=pa.array(range(200, 210), pa.int64()), label=pa.array([77] * 10))
    write_parquet(tmp_path / "unlabelled.parquet", nonsense)
    assert load_dataset("parquet", tmp_path).labels("unlabelled").tolist() == [-1] * 10
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(DataError, match=r"holds no \.parquet file of labelled images"):
        load_dataset("parquet", tmp_path)


@pytest.mark.parametrize("in_parts", [True, False])
def test_a_folder_of_unlabelled_images_lies_beside_the_classes(tmp_path: Path, in_parts: bool) -> None:
    parts = ("train", "test") if in_parts else (".",)
    write_folder(tmp_path, {f"{part}/{name}": 3 for part in parts for name in ("cat", "dog")})
    before = load_dataset("folder", tmp_path).description
    write_folder(tmp_path, {"unlabelled/camera 1": 4, "unlabelled/camera 2": 2})
    dataset = load_dataset("folder", tmp_path)
    assert dataset.description.classes == ("cat", "dog")
    assert dataset.description.parts == (*before.parts, "unlabelled")
    assert dataset.description.test_part == before.test_part
    assert dataset.labels("unlabelled").tolist() == [-1] * 6
    assert dataset.image("unlabelled", 5).size == (8, 8)
    assert len({int(i) for part in dataset.description.parts for i in dataset.sample_ids(part)}) == sum(
        len(dataset.labels(part)) for part in dataset.description.parts
    )


def test_unlabelled_images_change_no_other_images_id(tmp_path: Path) -> None:
    index = columns(sample_id=None, index=pa.array(range(10), pa.int32()))
    for part in ("train", "val"):
        write_parquet(tmp_path / f"{part}.parquet", index)
    before = load_dataset("parquet", tmp_path)
    write_parquet(tmp_path / "unlabelled.parquet", {k: v for k, v in index.items() if k != "label"}, classes=None)
    after = load_dataset("parquet", tmp_path)
    for part in ("train", "val"):
        np.testing.assert_array_equal(before.sample_ids(part), after.sample_ids(part))
    assert len({int(i) for part in after.description.parts for i in after.sample_ids(part)}) == 30


def test_a_misspelt_part_of_unlabelled_images_is_not_passed_over(tmp_path: Path) -> None:
    write_parquet(tmp_path / "tables" / "train.parquet", columns())
    write_parquet(tmp_path / "tables" / "unlabeled.parquet", columns())
    with pytest.raises(DataError, match=r"did you mean unlabelled\.parquet"):
        load_dataset("parquet", tmp_path / "tables")
    for k, odd in enumerate(("unlabeled", "train/unlabelled", "test/unlabeled")):
        root = tmp_path / str(k)
        write_folder(root, {"train/cat": 1, "train/dog": 1, "test/cat": 1, "test/dog": 1, odd: 1})
        with pytest.raises(DataError, match=rf"{odd}: images without labels are looked for in .*unlabelled"):
            load_dataset("folder", root)


def test_an_unlabelled_folder_is_never_passed_over_and_a_bad_image_in_it_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 2, "dog": 2, "unlabelled/.thumbs": 1})
    (tmp_path / "unlabelled" / "note.txt").write_text("soon")
    dataset = load_dataset("folder", tmp_path)
    assert dataset.description.parts == ("all", "unlabelled")
    assert len(dataset.labels("unlabelled")) == 0  # which `choose_splits` refuses
    (tmp_path / "unlabelled" / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"unlabelled/broken\.png: image cannot be decoded"):
        load_dataset("folder", tmp_path).image("unlabelled", 0)


def test_files_that_are_no_parquet_or_absent_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.parquet file of labelled images; expected PART\.pa"):
        load_dataset("parquet", tmp_path)
    (tmp_path / "test.parquet").write_bytes(b"these are no images")
    with pytest.raises(DataError, match=r"test\.parquet: not a readable Parquet file"):
        load_dataset("parquet", tmp_path)
    write_parquet(tmp_path / "test.parquet", columns())
    whole = (tmp_path / "test.parquet").read_bytes()
    (tmp_path / "test.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"test\.parquet: not a readable Parquet file"):
        load_dataset("parquet", tmp_path)


def test_a_parquet_file_that_is_damaged_or_vanishes_after_opening_is_named(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    write_parquet(path, columns())
    dataset = load_dataset("parquet", tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"test\.parquet: missing"):
        dataset.content("test", 9)


def test_an_unreadable_or_absent_image_is_named_with_row_and_id(tmp_path: Path) -> None:
    images = [PICTURES[0], b"no image", PICTURES[2][:60], None, b"", *PICTURES[5:]]
    write_parquet(tmp_path / "test.parquet", columns(image=pa.array(images, pa.binary())))
    dataset = load_dataset("parquet", tmp_path)
    for row, message in [
        (1, "image cannot be decoded: no image format that Pillow knows"),
        (2, "image cannot be decoded"),
        (3, "image is empty"),
        (4, "image cannot be decoded: no bytes"),
    ]:
        with pytest.raises(DataError, match=rf"test\.parquet: row {row} \(sample_id {100 + row}\): {message}"):
            dataset.image("test", row)
    assert dataset.image("test", 5).size == (5, 6)


# Fingerprints


def test_a_fingerprint_tells_ids_labels_contents_and_order_apart(tmp_path: Path) -> None:
    variants: dict[str, dict[str, Any]] = {
        "sound": {},
        "id": {"sample_id": pa.array([*range(100, 109), 999], pa.int64())},
        "label": {"label": pa.array([k % 2 for k in range(9)] + [0], pa.int8())},
        "image": {"image": pa.array([*PICTURES[:9], PICTURES[0]], pa.binary())},
    }
    found = {}
    for name, changed in variants.items():
        write_parquet(tmp_path / name / "test.parquet", columns(**changed))
        found[name] = load_dataset("parquet", tmp_path / name).fingerprint("test", np.arange(10))
    assert len(set(found.values())) == len(variants)
    sound = load_dataset("parquet", tmp_path / "sound")
    assert sound.fingerprint("test", np.arange(10)[::-1]) != found["sound"]
    write_parquet(tmp_path / "again" / "test.parquet", columns(), rows_per_group=3)
    assert load_dataset("parquet", tmp_path / "again").fingerprint("test", np.arange(10)) == found["sound"]


# Folders


def test_a_folder_of_classes_is_one_part(tmp_path: Path) -> None:
    write_folder(tmp_path, {"dog": 3, "cat/young": 1, "cat/old": 1})
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".thumbnails").mkdir()
    dataset = load_dataset("folder", tmp_path)
    about = dataset.description
    assert (about.classes, about.parts, about.test_part, about.trained_on) == (
        ("cat", "dog"), ("all",), None, "unknown",
    )  # fmt: skip
    assert dataset.labels("all").tolist() == [0, 0, 1, 1, 1]
    np.testing.assert_array_equal(np.asarray(dataset.image("all", 0)), noise(4, 8, 8, 3))  # cat/old, written last


@pytest.mark.parametrize(
    ("parts", "test"), [(("train", "val", "test"), "test"), (("train", "val"), "val"), (("train", "test"), "test")]
)
def test_parts_are_found_by_their_folders(parts: tuple[str, ...], test: str, tmp_path: Path) -> None:
    write_folder(tmp_path, {f"{part}/{name}": 2 for part in parts for name in ("cat", "dog")})
    dataset = load_dataset("folder", tmp_path)
    assert dataset.description.parts == parts
    assert dataset.description.test_part == test
    ids = np.concatenate([dataset.sample_ids(part) for part in parts])
    assert len(set(ids.tolist())) == 4 * len(parts)
    assert (ids >= 0).all()


def test_an_id_in_a_folder_outlives_other_images_and_a_move_of_the_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "here", {"cat": 3, "dog": 2})
    before = load_dataset("folder", tmp_path / "here").sample_ids("all")
    (tmp_path / "here").rename(tmp_path / "there")
    write_folder(tmp_path / "there", {"ant": 4})
    after = load_dataset("folder", tmp_path / "there").sample_ids("all")
    np.testing.assert_array_equal(after[4:], before)


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 2, "dog": 0})
    with pytest.raises(DataError, match=r"data set folder: class 'dog' is empty: no image in .*dog"):
        load_dataset("folder", tmp_path)


def test_a_class_that_a_part_lacks_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/cat": 1, "train/dog": 1, "train/emu": 1, "test/cat": 1, "test/dog": 1})
    with pytest.raises(DataError, match=r"class 'emu' is in .*train but not in .*test; every part needs every class"):
        load_dataset("folder", tmp_path)


def test_a_folder_without_class_folders_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lone.png").write_bytes(PICTURES[0])
    with pytest.raises(DataError, match="holds 0 class folders; want at least 2"):
        load_dataset("folder", tmp_path)


def test_an_unreadable_image_file_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 2, "dog": 2})
    broken, gone = tmp_path / "cat" / "0001.png", tmp_path / "dog" / "0000.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    dataset = load_dataset("folder", tmp_path)
    gone.unlink()
    with pytest.raises(
        DataError, match=rf"{re.escape(str(broken))}: image cannot be decoded: .*; replace or remove it"
    ):
        dataset.image("all", 1)
    with pytest.raises(DataError, match=rf"{re.escape(str(gone))}: cannot be read \(No such file"):
        dataset.image("all", 2)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_reading_many_images_leaves_no_file_open(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 20, "dog": 20})
    frames = [Image.new("L", (4, 4), k) for k in range(3)]
    for k in range(20):
        frames[0].save(tmp_path / "dog" / f"{k}.gif", save_all=True, append_images=frames[1:])
    dataset = load_dataset("folder", tmp_path)
    before = open_files()
    images = [dataset.image("all", k) for k in range(60)]
    assert len(images) == 60
    assert open_files() <= before


# Decoding


@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
    kept=st.floats(0, 1),
)
@settings(deadline=None, max_examples=300)
@pytest.mark.filterwarnings("ignore")  # Pillow warns of oddities that it reads all the same
def test_damaged_bytes_are_decoded_or_refused_by_name(kind: str, edits: list[tuple[int, int]], kept: float) -> None:
    damaged = bytearray(encoded(noise(1, 9, 11, 3), kind))
    for place, value in edits:
        damaged[place % len(damaged)] = value
    refusal = None
    try:
        assert decode(bytes(damaged[: round(kept * len(damaged))]), "shelf 3, image 7").tobytes()
    except DataError as error:
        refusal = str(error)
    assert refusal is None or re.fullmatch("shelf 3, image 7: image cannot be decoded: .*", refusal)
