"""One process at a time, among those that share a folder; the kernel takes the lock from one that is killed."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quee_core.whole_files import disk_faults

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process or thread holds `path`, a file that stays, and hold it while the block lasts.

    Where the file system has no locks, nobody waits. Raises StoreError where the file can't be made.
    """
    with disk_faults(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
