"""A disk that can be filled: a file system in memory, where this process may mount one."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE = 200_000_000  # bytes; a sweep sees to it that it has some 50 MB


def mount(folder: Path) -> bool:
    """Mount a small disk at an empty folder; False where that is not permitted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "quee-chaos", folder]
    return os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0


def unmount(folder: Path) -> None:
    """Take the disk away with all that is on it, at once, or when its last file is closed."""
    subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """No room on a small disk while the block lasts."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        while (room := os.statvfs(folder)).f_bavail:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), room.f_bavail * room.f_frsize)
            except OSError as error:
                if error.errno != errno.ENOSPC:  # else the sweep has written something in between
                    raise
            file.seek(0, os.SEEK_END)
    try:
        yield
    finally:
        filler.unlink()
