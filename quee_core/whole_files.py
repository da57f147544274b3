"""Local files that are whole or absent, and faults of the disk in words that say what to do."""

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from quee_core.errors import StoreError

_TEMPORARY = re.compile(r"\..+\.[0-9]+-[0-9a-f]{8}\.partial")

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space and run again, what is finished is kept",
    errno.EDQUOT: "the disk quota is used up; free some space and run again, what is finished is kept",
    errno.EFBIG: "the limit on file sizes is reached; raise it (ulimit -f) and run again, what is finished is kept",
    errno.EROFS: "the file system is read-only; name a place that can be written",
    errno.EACCES: "permission is missing; change the permissions or name another place",
    errno.EPERM: "it is not permitted; change the permissions or name another place",
    errno.ENOTDIR: "a file stands where a folder is needed; move it or name another place",
    errno.EEXIST: "a file stands where a folder is needed; move it or name another place",
    errno.ENOENT: "there is no such place, and it cannot be made; name another place",
    errno.EISDIR: "a folder stands where a file is needed; move it or name another place",
    errno.ENAMETOOLONG: "a name is too long for the file system; shorten it or the path to it",
}

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

_NUMBERS: dict[type[OSError], int] = {
    PermissionError: errno.EACCES,
    NotADirectoryError: errno.ENOTDIR,
    FileExistsError: errno.EEXIST,
    IsADirectoryError: errno.EISDIR,
}


@contextmanager
def whole_file(path: Path, *, replace: bool = True) -> Iterator[BinaryIO]:
    """A file to write, which appears at `path` once the block has ended well, flushed to disk; else nothing does.

    Makes the folder. Replaces a file that is there in one step, so that a reader sees the old one or the new one.
    An exception in the block, KeyboardInterrupt included, leaves no temporary file; a killed process may leave one,
    which `is_temporary` knows by its name. Raises OSError.

    replace: False to leave a file that is there and raise FileExistsError, where the file system has hard links; where
    it has none, the file is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside its target, since another folder may be another disk
    temporary = path.with_name(temporary_name(path.name))
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace or not _linked(temporary, path):
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def check_room(folder: Path, size: int) -> None:
    """Make `folder`, and see that a file of `size` bytes fits there; none is left behind.

    What is going to write for hours asks before it starts. Raises StoreError that names the folder if it can't be
    made or written to, or has no room.
    """
    temporary = folder / temporary_name("room")
    with disk_faults(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        finally:
            temporary.unlink(missing_ok=True)


def temporary_name(name: str) -> str:
    """A name that no other writer gives, for what is to become `name`, or to be gone soon."""
    return f".{name}.{os.getpid()}-{secrets.token_hex(4)}.partial"


def is_temporary(name: str) -> bool:
    """Whether a file's name is one that `temporary_name` gives."""
    return _TEMPORARY.fullmatch(name) is not None


@contextmanager
def disk_faults(place: object, doing: str) -> Iterator[None]:
    """Turn an OSError of the block into a StoreError: "`place`: cannot be `doing`: why and what to do"."""
    try:
        yield
    except OSError as error:
        # those of fsspec's own file systems carry no number
        number = error.errno or next((n for kind, n in _NUMBERS.items() if isinstance(error, kind)), 0)
        why = _ADVICE.get(number, f"{error.strerror or error or type(error).__name__}; check the place and run again")
        raise StoreError(f"{place}: cannot be {doing}: {why}") from error


def _linked(temporary: Path, path: Path) -> bool:
    """Give a file its name, which no file may have yet; False where there are no hard links. Raises OSError."""
    try:
        path.hardlink_to(temporary)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    temporary.unlink()
    return True


def _flush_folder(folder: Path) -> None:
    """Put a rename on disk: fsync of the file alone does not, and a power cut would undo it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
