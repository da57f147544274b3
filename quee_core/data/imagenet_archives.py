"""ImageNet's official archives, unpacked by torchvision beside themselves: each part as a whole, or not at all."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from torchvision.datasets.imagenet import META_FILE, parse_devkit_archive, parse_train_archive, parse_val_archive

from quee_core.errors import DataError
from quee_core.locks import alone

ARCHIVES = {
    META_FILE: "ILSVRC2012_devkit_t12.tar.gz",
    "train": "ILSVRC2012_img_train.tar",
    "val": "ILSVRC2012_img_val.tar",
}
LOCK = ".unpacking"
_UNFINISHED = frozenset({".JPEG", ".tar"})  # of files beside the folders of their classes


def missing_pieces(root: Path) -> list[str]:
    """What lies under `root` neither unpacked nor as an archive, of `ARCHIVES`."""
    return [kept for kept, archive in ARCHIVES.items() if not _lies(root, (kept, archive))]


def packed_pieces(root: Path) -> list[str]:
    """What lies under `root` as an archive alone, of `ARCHIVES`."""
    return [kept for kept, archive in ARCHIVES.items() if not _lies(root, (kept,)) and _lies(root, (archive,))]


def unpack(root: Path) -> None:
    """Unpack what lies under `root` as an archive alone; other processes wait. A part appears once it is whole.

    Raises RuntimeError if an archive is not the official one, OSError for a disk.
    """
    if not packed_pieces(root):
        return
    with alone(root / LOCK):
        for piece in packed_pieces(root):
            if piece == META_FILE:
                parse_devkit_archive(root)
                continue
            beginning = root / f"{piece}{LOCK}"
            if beginning.exists():  # of a process that was killed
                shutil.rmtree(beginning)
            (parse_train_archive if piece == "train" else parse_val_archive)(root, folder=beginning.name)
            beginning.rename(root / piece)


def check_unpacked(root: Path, parts: Iterable[str]) -> None:
    """Raises DataError that names an image or archive beside the folders of the classes of one of `parts`.

    So does an unpacking end that was interrupted; whoever reads folders alone would not miss a thing.
    """
    for part in parts:
        loose = (entry for entry in (root / part).iterdir() if entry.suffix in _UNFINISHED and entry.is_file())
        if (first := next(loose, None)) is not None:
            raise DataError(
                f"{first}: lies outside of the folders of the classes, where an unpacking ended too early; delete "
                f"{root / part}, and it is unpacked anew from {ARCHIVES[part]}"
            )


def _lies(root: Path, names: Iterable[str]) -> bool:
    return any((root / name).exists() for name in names)
