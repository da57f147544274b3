"""Weights that lie in a bucket: copied beside the runs once, since checkpoints are read from files."""

import hashlib
import shutil
from pathlib import Path

import fsspec

from quee_core.errors import CheckpointError
from quee_core.whole_files import disk_faults, whole_file


def is_remote(checkpoint: str) -> bool:
    """Whether `checkpoint` is an address such as s3://bucket/weights.safetensors, and not a path."""
    return "://" in checkpoint


def fetch_checkpoint(url: str, folder: Path) -> Path:
    """A copy of the weights at `url`, below `folder`; one of the same bytes that is there is taken.

    Raises CheckpointError if there are none, StoreError if they cannot be read or the copy not be written.
    """
    with disk_faults(url, "read"):
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        try:
            version = fs.ukey(path)
        except FileNotFoundError:
            raise CheckpointError(f"{url}: no such checkpoint") from None
    name = hashlib.sha256(f"{url} {version}".encode()).hexdigest()[:16]
    copy = folder / f"{name}-{path.rpartition('/')[2]}"
    if not copy.exists():
        with disk_faults(copy, "copied"), fs.open(path, "rb") as source, whole_file(copy) as file:
            shutil.copyfileobj(source, file)
    return copy
