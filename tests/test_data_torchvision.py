"""CIFAR, SVHN and ImageNet, from tiny sets in the formats in which the real ones are published."""

import errno
import pickle
import pickletools
import re
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision import datasets
from torchvision.datasets.imagenet import ARCHIVE_META

from quee_core.config import parse_config
from quee_core.data.datasets import load_dataset
from quee_core.data.imagenet_archives import ARCHIVES, LOCK
from quee_core.data.splits import choose_splits
from quee_core.errors import BackboneError, DataError, MissingDataError, StoreError
from quee_core.plan import outline, resolve
from quee_core.whole_files import temporary_name
from tests.published_files import (
    CIFAR10_CLASSES,
    cifar_batch,
    noise,
    python2_pickle,
    write_cifar10,
    write_cifar100,
    write_imagenet,
    write_imagenet_archives,
    write_svhn,
)

CIFAR10_FILES = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch", "batches.meta"]


# CIFAR


def test_cifar10_is_read_as_published(tmp_path: Path) -> None:
    written = write_cifar10(tmp_path)
    dataset = load_dataset("cifar10", tmp_path)
    about = dataset.description
    assert (about.classes, about.parts, about.test_part) == (CIFAR10_CLASSES, ("train", "test"), "test")
    assert about.trained_on == "train"
    for part, first_id in (("train", 0), ("test", 50)):
        pixels, labels = written[part]
        assert dataset.labels(part).tolist() == labels
        assert dataset.sample_ids(part).tolist() == list(range(first_id, first_id + len(labels)))
        for position in range(len(labels)):
            image = dataset.image(part, position)
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), pixels[position])
            assert dataset.content(part, position) == pixels[position].tobytes()


def test_cifar100_is_read_by_its_fine_labels(tmp_path: Path) -> None:
    written = write_cifar100(tmp_path)
    dataset = load_dataset("cifar100", tmp_path)
    assert dataset.description.classes == tuple(f"fine {k}" for k in range(100))
    for part, first_id in (("train", 0), ("test", 100)):
        pixels, labels = written[part]
        assert dataset.labels(part).tolist() == labels
        assert dataset.sample_ids(part)[0] == first_id
        np.testing.assert_array_equal(np.asarray(dataset.image(part, 41)), pixels[41])


def test_the_tiny_batches_are_laid_out_like_the_official_ones() -> None:
    """Python 2's opcodes and numpy's old module names, which Python 3 would not write."""
    batch = cifar_batch(noise(0, 3, 32, 32, 3), [0, 1, 2], "labels")
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops(batch)}
    assert {"PROTO", "SHORT_BINSTRING", "BINSTRING", "GLOBAL", "REDUCE", "BUILD"} <= opcodes
    named = {argument for opcode, argument, _ in pickletools.genops(batch) if opcode.name == "GLOBAL"}
    assert named == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}


def test_images_and_labels_are_those_of_torchvision(tmp_path: Path) -> None:
    write_cifar10(tmp_path)

    class AnyChecksum(datasets.CIFAR10):  # the tiny files cannot have the official ones
        train_list = [[name, None] for name in CIFAR10_FILES[:5]]  # noqa: RUF012
        test_list = [["test_batch", None]]  # noqa: RUF012
        meta = datasets.CIFAR10.meta | {"md5": None}

    ours = load_dataset("cifar10", tmp_path)
    for part in ("train", "test"):
        theirs = AnyChecksum(str(tmp_path), train=part == "train")
        assert list(ours.description.classes) == theirs.classes
        assert len(theirs) == len(ours.labels(part))
        for position, (image, label) in enumerate(theirs):
            assert ours.labels(part)[position] == label
            assert ours.image(part, position).tobytes() == image.tobytes()


@pytest.mark.parametrize("absent", ["data_batch_4", "test_batch", "batches.meta"])
def test_an_absent_cifar_file_is_named_with_all_that_is_expected(absent: str, tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / absent).unlink()
    with pytest.raises(DataError, match=rf"data set cifar10: \S*/{absent} is missing; expected under") as caught:
        load_dataset("cifar10", tmp_path)
    assert all(f"cifar-10-batches-py/{name}" in str(caught.value) for name in CIFAR10_FILES)


def test_an_empty_folder_is_told_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_batch_1 is missing \(and 6 more\)"):
        load_dataset("cifar10", tmp_path)
    with pytest.raises(DataError, match=r"cifar-100-python/train, cifar-100-python/test, cifar-100-python/meta"):
        load_dataset("cifar100", tmp_path)
    with pytest.raises(DataError, match=r"train_32x32\.mat, test_32x32\.mat"):
        load_dataset("svhn", tmp_path)
    with pytest.raises(DataError, match=r"lacks meta\.bin \(or ILSVRC2012_devkit_t12\.tar\.gz\) and train \(or "):
        load_dataset("imagenet", tmp_path)


class Harm:
    """Creates a file when it is unpickled by a reader that does not look."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._path,)


def test_a_batch_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    trace = tmp_path / "was_here"
    harmful = pickle.dumps({"data": Harm(trace), "labels": []}, protocol=2)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(harmful)
    with pytest.raises(
        DataError, match=r"data_batch_3: not a file of the official archive: refused, since it wants to"
    ):
        load_dataset("cifar10", tmp_path)
    assert not trace.exists()
    pickle.loads(harmful)  # a reader that does not look would have run it
    assert trace.exists()


@pytest.mark.parametrize(
    "name", ["os system", "builtins eval", "builtins getattr", "numpy load", "numpy.core.multiarray scalar"]
)
def test_nothing_but_arrays_can_be_named_in_a_batch(name: str, tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    module, attribute = name.split()
    call = f"c{module}\n{attribute}\n".encode() + python2_pickle(("true",))[2:-1] + b"R."
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"\x80\x02" + call)
    with pytest.raises(
        DataError, match=rf"test_batch: .*refused, since it wants to run {re.escape(module)}\.{attribute}"
    ):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 2, 50, 400, 4000, 30_000])
def test_a_truncated_batch_is_named(kept: int, tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"data_batch_2: not a file of the official archive"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"labels": [0]}, "field 'data' is missing"),
        ({"data": noise(0, 1, 3072)}, "field 'labels' is missing"),
        ({"data": noise(0, 1, 3071), "labels": [0]}, "'data' is no uint8 array of 3,072 values an image"),
        ({"data": "pixels", "labels": [0]}, "'data' is no uint8 array"),
        ({"data": noise(0, 2, 3072), "labels": [0]}, "'labels' is no list of 2 labels"),
        ({"data": noise(0, 1, 3072), "labels": ["cat"]}, "'labels' is no list of 1 labels"),
        ([1, 2], "field 'data' is missing"),
    ],
)
def test_a_batch_with_other_contents_is_named(entry: object, message: str, tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(python2_pickle(entry))
    with pytest.raises(DataError, match=rf"test_batch: {message}"):
        load_dataset("cifar10", tmp_path)


def test_a_cifar_label_out_of_range_is_named_with_its_row(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    batch = cifar_batch(noise(0, 3, 32, 32, 3), [1, 10, 2], "labels")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(batch)
    with pytest.raises(DataError, match=r"cifar10, part test: row 1: label 10 is out of range; there are 10 classes"):
        load_dataset("cifar10", tmp_path)


def test_by_default_a_backbone_is_taken_to_have_seen_the_training_images(tmp_path: Path) -> None:
    write_cifar10(tmp_path, per_batch=200)
    dataset = load_dataset("cifar10", tmp_path)
    splits, cautions = choose_splits(dataset, {"fit": 0.4, "target": 0.45, "select": 0.15}, seed=0)
    assert {s.part for s in splits["fit"]} == {"train"}
    assert {s.part for name in ("target", "select", "test") for s in splits[name]} == {"test"}
    assert len(cautions) == 1


# SVHN


def test_svhn_is_read_as_published_with_its_ten_as_zero(tmp_path: Path) -> None:
    digits = {"train": [1, 0, 9, 5], "test": [0, 7, 0]}
    written = write_svhn(tmp_path, digits)
    dataset = load_dataset("svhn", tmp_path)
    assert dataset.description.classes == tuple("0123456789")
    for part, first_id in (("train", 0), ("test", 4)):
        assert dataset.labels(part).tolist() == digits[part]
        assert dataset.sample_ids(part)[0] == first_id
        for position, pixels in enumerate(written[part]):
            np.testing.assert_array_equal(np.asarray(dataset.image(part, position)), pixels)


def test_a_svhn_label_out_of_range_is_named(tmp_path: Path) -> None:
    write_svhn(tmp_path, {"train": [1, 2], "test": [3, 11]})
    with pytest.raises(DataError, match="svhn, part test: row 1: label 11 is out of range; there are 10 classes"):
        load_dataset("svhn", tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, 200, 3000])
def test_a_truncated_svhn_file_is_named(kept: int, tmp_path: Path) -> None:
    write_svhn(tmp_path, {"train": [1, 2], "test": [3, 4]})
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"train_32x32\.mat: "):
        load_dataset("svhn", tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"y": np.ones((2, 1), np.uint8)}, "field 'X' is missing"),
        ({"X": noise(0, 32, 32, 3, 2)}, "field 'y' is missing"),
        ({"X": noise(0, 32, 32, 3, 2), "y": np.ones((3, 1), np.uint8)}, "'y' holds 3 labels of uint8, 'X' 2 images"),
        ({"X": noise(0, 32, 32, 3), "y": np.ones((2, 1), np.uint8)}, r"'X' is uint8 \(32, 32, 3\)"),
        ({"X": np.zeros((32, 32, 3, 2)), "y": np.ones((2, 1), np.uint8)}, "'X' is float64"),
    ],
)
def test_a_svhn_file_with_other_contents_is_named(fields: dict[str, object], message: str, tmp_path: Path) -> None:
    write_svhn(tmp_path, {"train": [1, 2], "test": [3, 4]})
    savemat(tmp_path / "test_32x32.mat", fields)
    with pytest.raises(DataError, match=rf"test_32x32\.mat: {message}"):
        load_dataset("svhn", tmp_path)


def test_a_matlab_file_of_another_version_is_named(tmp_path: Path) -> None:
    write_svhn(tmp_path, {"train": [1, 2], "test": [3, 4]})
    header = b"MATLAB 7.3 MAT-file".ljust(124) + struct.pack("<H", 0x0200) + b"IM"
    (tmp_path / "test_32x32.mat").write_bytes(header + bytes(512))
    with pytest.raises(DataError, match=r"test_32x32\.mat: not a file of the official set"):
        load_dataset("svhn", tmp_path)


# ImageNet


def test_imagenet_is_read_as_torchvision_lays_it_out(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    dataset = load_dataset("imagenet", tmp_path)
    about = dataset.description
    assert about.classes == ("tench", "crane (n02012849)", "crane (n03126707)")  # both are called crane
    assert (about.parts, about.test_part, about.trained_on) == (("train", "val"), "val", "train")
    for part in about.parts:
        assert dataset.labels(part).tolist() == [0, 0, 1, 1, 2, 2]
        assert dataset.image(part, 5).size == (30, 20)
        assert abs(np.asarray(dataset.image(part, 5)).astype(int) - 80).max() <= 2
    ids = np.concatenate([dataset.sample_ids(part) for part in about.parts])
    assert len(set(ids.tolist())) == 12


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of nothing but the three archives, small ones, which torchvision knows by their checksums."""
    root = tmp_path / "packed"
    for key, md5 in write_imagenet_archives(root).items():
        monkeypatch.setitem(ARCHIVE_META, key, (ARCHIVE_META[key][0], md5))
    return root


def test_imagenet_is_read_from_its_archives_as_from_its_folders(archives: Path, tmp_path: Path) -> None:
    write_imagenet(tmp_path / "folders")
    packed, folders = load_dataset("imagenet", archives), load_dataset("imagenet", tmp_path / "folders")
    assert packed.description.classes == folders.description.classes
    for part in ("train", "val"):
        everything = np.arange(len(folders.sample_ids(part)))
        assert packed.fingerprint(part, everything) == folders.fingerprint(part, everything)
    left = {path.name for path in archives.iterdir() if not path.name.startswith((".", "ILSVRC"))}
    assert left == {"meta.bin", "train", "val"}


def test_a_plan_unpacks_nothing_and_says_what_is_packed(archives: Path) -> None:
    before = sorted(archives.rglob("*"))
    with pytest.raises(MissingDataError, match=r"imagenet: meta\.bin and train and val under .* are archives still"):
        load_dataset("imagenet", archives, unpack=False)
    backbone = {"name": "t2t_vit_7", "random_weights": True, "image_size": 32}
    raw = {"dataset": {"name": "imagenet", "root": str(archives)}, "backbone": backbone}
    planned, missing = outline(parse_config(raw, source="here"))
    assert len(missing) == 1
    assert sum(planned.images.values()) == 1_281_167 + 50_000
    assert sorted(archives.rglob("*")) == before


def test_what_is_wrong_with_the_weights_is_told_before_anything_is_unpacked(archives: Path) -> None:
    before = sorted(archives.rglob("*"))
    for backbone in ({"name": "t2t_vit_99"}, {"name": "t2t_vit_7", "checkpoint": "absent.pth"}):
        raw = {"dataset": {"name": "imagenet", "root": str(archives)}, "backbone": backbone}
        with pytest.raises(BackboneError, match=r"t2t_vit_99|absent\.pth"):
            resolve(parse_config(raw, source="here"))
    assert sorted(archives.rglob("*")) == before


def unpacked_without_classes(root: Path, part: str) -> None:
    """As torchvision leaves a part when it is killed before it has made the folders of classes, or filled them."""
    for folder in (root / part).iterdir():
        for image in folder.iterdir():
            image.rename(root / part / image.name)
        if part == "train":
            folder.rmdir()


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_part_without_any_image_in_its_place_is_told_as_such(part: str, tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    unpacked_without_classes(tmp_path, part)
    with pytest.raises(DataError, match=rf"{part}/.*\.JPEG: lies beside the folders of the classes"):
        load_dataset("imagenet", tmp_path)
    shutil.rmtree(tmp_path / part)
    (tmp_path / part).write_text("no folder")
    with pytest.raises(DataError, match=rf"{part}: no folder; move it away"):
        load_dataset("imagenet", tmp_path)


def test_what_a_killed_process_had_begun_to_unpack_is_removed(archives: Path) -> None:
    beginning = archives / temporary_name("train") / "train"
    beginning.mkdir(parents=True)
    (beginning / "n01440764.tar").write_bytes(b"half")
    assert len(load_dataset("imagenet", archives).sample_ids("train")) == 6
    assert not beginning.parent.exists()


def test_processes_that_unpack_at_once_agree(archives: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: load_dataset("imagenet", archives), range(4)))
    found = [dataset.sample_ids("val").tolist() for dataset in opened]
    assert len(found[0]) == 6
    assert found == found[:1] * 4


@pytest.mark.parametrize(("part", "left"), [("val", "ILSVRC2012_val_00000003.JPEG"), ("train", "n02012849.tar")])
def test_a_part_that_another_left_half_unpacked_is_refused(part: str, left: str, tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    (tmp_path / part / left).write_bytes(b"not moved yet")
    beside = rf"{part}/{re.escape(left)}: lies beside the folders of the classes.*"
    with pytest.raises(DataError, match=rf"{beside}see that all images are in those folders, and move {left} away"):
        load_dataset("imagenet", tmp_path)  # no word of deleting what there is no archive of
    (tmp_path / f"ILSVRC2012_img_{part}.tar").write_bytes(b"the archive")
    with pytest.raises(DataError, match=rf"{beside}delete .*/{part}, and it is unpacked anew from ILSVRC2012_img_"):
        load_dataset("imagenet", tmp_path)


@pytest.mark.parametrize("archive", ["ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"])
def test_an_archive_that_is_not_the_official_one_leaves_nothing_behind(archive: str, archives: Path) -> None:
    (archives / archive).write_bytes(b"cut short")
    with pytest.raises(DataError, match=rf"{archive}: cannot be unpacked: .*corrupted"):
        load_dataset("imagenet", archives)
    left = {path.name for path in archives.iterdir()} - {"meta.bin", "train", LOCK, *ARCHIVES.values()}
    assert not left


def test_a_full_disk_loses_no_archive_and_leaves_nothing_behind(
    archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torchvision.datasets.imagenet.extract_archive", full)
    with pytest.raises(StoreError, match=r"devkit_t12\.tar\.gz: cannot be unpacked: the disk is full"):
        load_dataset("imagenet", archives)
    assert {path.name for path in archives.iterdir()} == {LOCK, *ARCHIVES.values()}


def test_a_link_to_a_disk_that_is_not_there_is_named(archives: Path) -> None:
    (archives / "train").symlink_to(archives / "unmounted")
    with pytest.raises(DataError, match=r"train: a link to .*unmounted, which is not there"):
        load_dataset("imagenet", archives)


@pytest.mark.parametrize("data", [bytes(100), b"garbage", b""])
@pytest.mark.parametrize("kit", [True, False])
def test_a_damaged_meta_file_is_named(kit: bool, data: bytes, archives: Path) -> None:
    (archives / "meta.bin").write_bytes(data)
    if not kit:
        (archives / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    what = "made anew from ILSVRC2012_devkit" if kit else "get it again"
    with pytest.raises(DataError, match=rf"meta\.bin: damaged, or not torchvision's .*delete it, and .*{what}"):
        load_dataset("imagenet", archives)


def test_a_plan_names_what_is_missing_before_what_is_packed(archives: Path) -> None:
    (archives / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(MissingDataError, match=r"lacks val \(or ILSVRC2012_img_val\.tar\)"):
        load_dataset("imagenet", archives, unpack=False)


def test_an_imagenet_id_outlives_other_images(tmp_path: Path) -> None:
    write_imagenet(tmp_path / "few", per_class=2)
    write_imagenet(tmp_path / "more", per_class=3)
    few, more = (set(load_dataset("imagenet", tmp_path / n).sample_ids("train").tolist()) for n in ("few", "more"))
    assert few < more


def test_an_imagenet_class_of_one_part_alone_is_named(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    (tmp_path / "val" / "n02012849").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"imagenet: folder n02012849 is not in both .*train and .*val"):
        load_dataset("imagenet", tmp_path)


def test_an_imagenet_folder_that_is_no_wordnet_id_is_named(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    (tmp_path / "train" / "n01440764").rename(tmp_path / "train" / "fish")
    with pytest.raises(DataError, match=r"train: folder 'fish' is none of the WordNet ids in meta\.bin"):
        load_dataset("imagenet", tmp_path)


def test_an_empty_imagenet_class_is_named(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    for image in (tmp_path / "val" / "n03126707").iterdir():
        image.unlink()
    with pytest.raises(DataError, match=r"imagenet, part val, .*n03126707"):
        load_dataset("imagenet", tmp_path)


def test_a_development_kit_that_is_not_the_official_one_is_refused(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    (tmp_path / "meta.bin").unlink()
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"not the archive")
    with pytest.raises(DataError, match=r"ILSVRC2012_devkit_t12\.tar\.gz: cannot be unpacked: .* corrupted"):
        load_dataset("imagenet", tmp_path)


def test_a_meta_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    trace = tmp_path / "was_here"
    torch.save(Harm(trace), tmp_path / "meta.bin")
    with pytest.raises(DataError, match=r"meta\.bin: damaged"):
        load_dataset("imagenet", tmp_path)
    assert not trace.exists()


def test_an_unreadable_imagenet_image_is_named(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    broken = tmp_path / "val" / "n01440764" / "ILSVRC2012_val_00000001.JPEG"
    broken.write_bytes(broken.read_bytes()[:100])
    dataset = load_dataset("imagenet", tmp_path)
    with pytest.raises(DataError, match=rf"{re.escape(str(broken))}: image cannot be decoded"):
        dataset.image("val", 1)
    broken.unlink()
    with pytest.raises(DataError, match=rf"{re.escape(str(broken))}: cannot be read"):
        dataset.fingerprint("val", np.arange(6))
