"""Tiny data sets in the very formats in which the real ones are published."""

import hashlib
import io
import shutil
import struct
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGENET_WORDS = {
    "n01440764": ("tench", "Tinca tinca"),
    "n02012849": ("crane",),
    "n03126707": ("crane",),
}


def encoded(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def noise(seed: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def python2_pickle(value: Any) -> bytes:
    """`value` as Python 2.7's cPickle wrote it with protocol 2, byte strings and numpy's old module names included.

    Python 3 writes other opcodes and module names, which would leave the reader's real work untried.
    """
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value: Any) -> bytes:
    match value:
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
        case None:
            return b"N"
        case str() | bytes():
            raw = value.encode() if isinstance(value, str) else value
            return b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)) + raw
        case tuple():
            return b"(" + b"".join(map(_opcodes, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_opcodes, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_opcodes(k) + _opcodes(v) for k, v in value.items()) + b"u"
        case np.ndarray():
            empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + _opcodes((0,)) + _opcodes("b") + b"tR"
            kind = b"cnumpy\ndtype\n" + _opcodes(("u1", 0, 1)) + b"R"
            kind += _opcodes((3, "|", None, None, None, -1, -1, 0)) + b"b"
            state = (
                b"(" + _opcodes(1) + _opcodes(value.shape) + kind + _opcodes(False) + _opcodes(value.tobytes()) + b"t"
            )
            return empty + state + b"b"
    raise TypeError(f"no opcode for {type(value)}")


def cifar_batch(pixels: NDArray[np.uint8], labels: Sequence[int], label_field: str) -> bytes:
    """pixels: uint8 [n, 32, 32, 3]; they are stored a colour plane after the other."""
    planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(len(pixels), -1)
    names = [f"image_{k}.png" for k in range(len(labels))]
    fields = {"batch_label": "a batch", label_field: list(labels), "data": planes, "filenames": names}
    return python2_pickle(fields)


def write_cifar10(root: Path, per_batch: int = 10) -> dict[str, tuple[NDArray[np.uint8], list[int]]]:
    """Five training batches and a test batch; returns pixels and labels of both parts."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "batches.meta").write_bytes(
        python2_pickle({"num_cases_per_batch": per_batch, "label_names": list(CIFAR10_CLASSES), "num_vis": 3072})
    )
    labels = [k % 10 for k in range(per_batch)]
    written: dict[str, tuple[NDArray[np.uint8], list[int]]] = {}
    for seed, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"]):
        pixels = noise(seed, per_batch, 32, 32, 3)
        (folder / name).write_bytes(cifar_batch(pixels, labels, "labels"))
        before = written.get("train", (pixels[:0], []))
        written["train"] = np.concatenate([before[0], pixels]), before[1] + labels
    pixels = noise(9, per_batch, 32, 32, 3)
    (folder / "test_batch").write_bytes(cifar_batch(pixels, labels, "labels"))
    return written | {"test": (pixels, labels)}


def write_cifar100(root: Path) -> dict[str, tuple[NDArray[np.uint8], list[int]]]:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    names = [f"fine {k}" for k in range(100)]
    (folder / "meta").write_bytes(python2_pickle({"fine_label_names": names, "coarse_label_names": ["coarse"] * 20}))
    written = {}
    for seed, part in enumerate(["train", "test"]):
        pixels, labels = noise(seed, 100, 32, 32, 3), list(range(100))
        (folder / part).write_bytes(cifar_batch(pixels, labels, "fine_labels"))
        written[part] = pixels, labels
    return written


def write_svhn(root: Path, digits: Mapping[str, Sequence[int]]) -> dict[str, NDArray[np.uint8]]:
    """digits: of each part; the digit 0 is stored as 10. Returns pixels uint8 [n, 32, 32, 3] of each part."""
    written = {}
    for seed, (part, of) in enumerate(digits.items()):
        pixels = noise(seed, len(of), 32, 32, 3)
        labels = np.array([[d or 10] for d in of], np.uint8)
        savemat(root / f"{part}_32x32.mat", {"X": pixels.transpose(1, 2, 3, 0), "y": labels}, do_compression=True)
        written[part] = pixels
    return written


def write_imagenet(root: Path, per_class: int = 2) -> None:
    """Three classes, two of them called crane; meta.bin as torchvision writes it, and JPEG files."""
    root.mkdir(parents=True, exist_ok=True)
    torch.save((dict(IMAGENET_WORDS), ["n01440764"] * per_class), root / "meta.bin")
    for part in ("train", "val"):
        for k, wnid in enumerate(IMAGENET_WORDS):
            (root / part / wnid).mkdir(parents=True)
            for i in range(per_class):
                pixels = np.full((20, 30, 3), 40 * k, np.uint8)
                name = f"{wnid}_{i}.JPEG" if part == "train" else f"ILSVRC2012_val_{per_class * k + i:08d}.JPEG"
                (root / part / wnid / name).write_bytes(encoded(pixels, "JPEG"))


def write_imagenet_archives(root: Path, per_class: int = 2) -> dict[str, str]:
    """The same images as the three official archives hold them; returns the md5 of each, by its key in torchvision."""
    write_imagenet(root, per_class)
    kit = root / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    synsets = np.array(
        [(k + 1, wnid, ", ".join(words), "gloss", 0) for k, (wnid, words) in enumerate(IMAGENET_WORDS.items())],
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")],
    )
    savemat(kit / "meta.mat", {"synsets": synsets})
    truth = [k + 1 for k in range(len(IMAGENET_WORDS)) for _ in range(per_class)]
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number}\n" for number in truth))
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        tar.add(kit.parent, kit.parent.name)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as tar:
        for folder in sorted((root / "train").iterdir()):
            of_class = root / f"{folder.name}.tar"
            with tarfile.open(of_class, "w") as inner:
                for image in sorted(folder.iterdir()):
                    inner.add(image, image.name)
            tar.add(of_class, of_class.name)
            of_class.unlink()
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for image in sorted((root / "val").rglob("*.JPEG"), key=lambda path: path.name):
            tar.add(image, image.name)
    for folder in (kit.parent, root / "train", root / "val"):
        shutil.rmtree(folder)
    (root / "meta.bin").unlink()
    files = {
        "devkit": "ILSVRC2012_devkit_t12.tar.gz",
        "train": "ILSVRC2012_img_train.tar",
        "val": "ILSVRC2012_img_val.tar",
    }
    return {key: hashlib.md5((root / name).read_bytes()).hexdigest() for key, name in files.items()}


def write_folder(
    root: Path, counts: Mapping[str, int], image: Callable[[int], NDArray[np.uint8]] | None = None
) -> None:
    """counts: images in each folder below `root`, such as {"train/cat": 3}."""
    draw = image or (lambda seed: noise(seed, 8, 8, 3))
    seed = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            (root / name / f"{k:04d}.png").write_bytes(encoded(draw(seed)))
            seed += 1


def write_parquet(
    path: Path, columns: Mapping[str, Any], *, classes: str | None = '["cat", "dog"]', rows_per_group: int = 4
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(dict(columns)).replace_schema_metadata(None if classes is None else {"classes": classes})
    pq.write_table(table, path, row_group_size=rows_per_group)
