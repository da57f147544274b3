"""One process at a time, among those that share a folder; the kernel takes the lock from one that is killed."""

import errno
import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quee_core.whole_files import disk_faults

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def alone(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold `path`, a file that stays, while the block lasts, once no other process or thread does.

    The log tells of waiting. Where the file system has no locks, nobody waits, and the block is given False, not True.
    Raises StoreError where the file can't
    be made or locked, BlockingIOError where another one holds it and this one is not to `wait`.
    """
    with disk_faults(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    with file:
        try:
            held = _lock(file.fileno(), path, wait=False)
        except BlockingIOError:
            if not wait:
                raise
            logger.info("waiting for another process that holds %s", path)
            held = _lock(file.fileno(), path, wait=True)
        yield held


def _lock(file: int, path: Path, *, wait: bool) -> bool:
    """Whether it is held: not where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            with disk_faults(path, "locked"):
                raise
        return False
    return True
