"""ImageNet's official archives, unpacked by torchvision beside themselves: each piece as a whole, or not at all."""

import logging
import pickle
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchvision.datasets.imagenet import (
    META_FILE,
    load_meta_file,
    parse_devkit_archive,
    parse_train_archive,
    parse_val_archive,
)

from quee_core.errors import DataError, MissingDataError, PackedDataError
from quee_core.locks import alone
from quee_core.whole_files import disk_faults, is_temporary, temporary_name

ARCHIVES = {
    META_FILE: "ILSVRC2012_devkit_t12.tar.gz",
    "train": "ILSVRC2012_img_train.tar",
    "val": "ILSVRC2012_img_val.tar",
}
LOCK = ".unpacking"
_UNFINISHED = frozenset({".JPEG", ".tar"})  # of files beside the folders of their classes

logger = logging.getLogger(__name__)


def check_present(root: Path, *, unpacked: bool = False) -> None:
    """Raises MissingDataError that names what is under `root` in neither form, PackedDataError what is not `unpacked`.

    Raises DataError for a link to what is not there.
    """
    for piece in ARCHIVES:
        if (root / piece).is_symlink() and not (root / piece).exists():
            raise DataError(
                f"{root / piece}: a link to {(root / piece).readlink()}, which is not there; mount or mend it"
            )
    absent = [piece for piece, archive in ARCHIVES.items() if not _lies(root, piece) and not _lies(root, archive)]
    if absent:
        raise MissingDataError(
            f"data set imagenet: {root} lacks "
            + " and ".join(f"{piece} (or {ARCHIVES[piece]})" for piece in absent)
            + "; expected there: meta.bin as torchvision writes it, and the folders train and val with a folder for "
            "each WordNet id, or the official archives that they come from"
        )
    if unpacked and (packed := _packed(root)):
        raise PackedDataError(
            f"data set imagenet: {' and '.join(packed)} under {root} are archives still, which a sweep unpacks there"
        )


def unpack(root: Path) -> None:
    """Unpack what lies under `root` as an archive alone, while other processes wait; the log tells.

    Raises DataError for an archive that is not the official one, StoreError for a disk.
    """
    if not _packed(root):
        return
    with alone(root / LOCK) as held:
        if held:  # whatever lies there is of a process that was killed
            with disk_faults(root, "written"):
                for left in (path for path in root.iterdir() if path.is_dir() and is_temporary(path.name)):
                    shutil.rmtree(left)
        for piece in _packed(root):
            logger.warning("unpacking %s under %s, once; of all of ImageNet that takes hours", ARCHIVES[piece], root)
            _unpack(root, piece)


def meta(root: Path) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Words of each WordNet id, and the id of each image of `val`. Raises DataError for a damaged `META_FILE`."""
    try:
        held: Any = load_meta_file(root)
        words, validation = held
        return {str(wnid): tuple(of) for wnid, of in words.items()}, list(validation)
    except (RuntimeError, OSError, ValueError, TypeError, AttributeError, EOFError, LookupError,
            pickle.UnpicklingError) as error:  # fmt: skip
        again = f"it is made anew from {ARCHIVES[META_FILE]}" if _lies(root, ARCHIVES[META_FILE]) else "get it again"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{root / META_FILE}: damaged, or not torchvision's ({reason}); delete it, and {again}"
        ) from None


def check_parts(root: Path, parts: Iterable[str]) -> None:
    """Raises DataError that names an image or archive beside the folders of the classes of one of `parts`.

    So does an unpacking end that was interrupted; whoever reads folders alone would not miss a thing.
    """
    for part in parts:
        if not (root / part).is_dir():
            raise DataError(f"{root / part}: no folder; move it away, and put there a folder for each WordNet id")
        loose = (entry for entry in (root / part).iterdir() if entry.suffix in _UNFINISHED and entry.is_file())
        if (first := next(loose, None)) is not None:
            again = (
                f"delete {root / part}, and it is unpacked anew from {ARCHIVES[part]}"
                if _lies(root, ARCHIVES[part])
                else f"see that all images are in those folders, and move {first.name} away"
            )
            raise DataError(
                f"{first}: lies beside the folders of the classes, where an unpacking ended too early; {again}"
            )


def _unpack(root: Path, piece: str) -> None:
    beginning, archive = root / temporary_name(piece), str((root / ARCHIVES[piece]).absolute())
    try:
        with disk_faults(root / ARCHIVES[piece], "unpacked"):
            beginning.mkdir()
            if piece == META_FILE:
                parse_devkit_archive(beginning, archive)
            elif piece == "train":
                parse_train_archive(beginning, archive)
            else:
                parse_val_archive(beginning, archive, meta(root)[1])
            try:
                (beginning / piece).rename(root / piece)
            except OSError:
                if not _lies(root, piece):  # where there are no locks, another process may have been first
                    raise
    except (RuntimeError, ValueError, TypeError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{root / ARCHIVES[piece]}: cannot be unpacked: {' '.join(str(error).split())[:300]}") from None
    finally:
        shutil.rmtree(beginning, ignore_errors=True)


def _packed(root: Path) -> list[str]:
    return [piece for piece, archive in ARCHIVES.items() if not _lies(root, piece) and _lies(root, archive)]


def _lies(root: Path, name: str) -> bool:
    return (root / name).exists()
