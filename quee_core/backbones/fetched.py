"""Weights that lie in a bucket: copied beside the runs once, since checkpoints are read from files."""

import hashlib
import shutil
from pathlib import Path

from quee_core.errors import CheckpointError, MissingWeightsError
from quee_core.places import open_place
from quee_core.whole_files import disk_faults, whole_file


def fetch_checkpoint(url: str, folder: Path, *, offline: bool = False) -> Path:
    """A copy of the weights at `url`, below `folder`; one of the same bytes that is there is taken.

    offline: fetch nothing. Raises CheckpointError if there are none, MissingWeightsError if they would have to be
    fetched, StoreError if they cannot be read or the copy not be written.
    """
    above, _, name = url.rpartition("/")
    place = open_place(above, what="checkpoint")
    version = place.attempt(name, "read", lambda: place.version(name))
    if version is None:
        raise CheckpointError(f"{url}: no such checkpoint")
    copy = folder / f"{hashlib.sha256(f'{url} {version}'.encode()).hexdigest()[:16]}-{name}"
    if not copy.exists():
        if offline:
            raise MissingWeightsError(f"{url}: not fetched yet; a sweep copies it to {folder}")
        with disk_faults(copy, "copied"), whole_file(copy) as file:

            def fetch() -> None:
                file.seek(0)
                file.truncate()
                with place.stream(name) as source:
                    shutil.copyfileobj(source, file)

            place.attempt(name, "read", fetch)
    return copy
