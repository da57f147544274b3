"""Where a store's files lie: folders on a disk, or below a URL. Each file is written whole or not at all.

A place gives the steps that a store is made of, and says in words what went wrong with them; `s3_place` has the steps
of S3. Locations are relative to the place's root, with '/' between folders.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path as FilePath
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from quee_core.entries import basename
from quee_core.errors import StoreError
from quee_core.whole_files import check_room, disk_faults, temporary_name, whole_file

T = TypeVar("T")

PATIENCE = 30.0  # seconds for which a step that a server refused for the moment is tried again
READ_AT_ONCE = 16  # files, which a remote file system reads side by side

_EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_ON_THIS_MACHINE = ("", "file", "local", "memory")


def open_place(url: str, *, what: str = "store", patience: float = PATIENCE) -> "Place":
    """The place at a folder or URL; nothing is made there.

    what: the place is for, in messages. Raises StoreError that says what is wrong with `url`.
    """
    protocol = url.partition("://")[0] if "://" in url else ""
    _refuse_credentials(protocol, url, what)
    try:
        if protocol in ("s3", "s3a"):
            from quee_core.s3_place import S3Place  # imports botocore, which takes its time

            return S3Place.at(url, patience, what)
        # another writer's files must show, so listings are never kept
        fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        package = _EXTRAS.get(protocol)
        hint = f"pip install {package}" if package else "install it"
        raise StoreError(
            f"{what} {url}: {protocol}:// needs a package that is not installed ({error}); {hint}"
        ) from error
    except (ValueError, OSError) as error:  # some of fsspec's file systems ask their server at once
        raise StoreError(f"{what} {url}: {error}; want a folder, file://, memory:// or s3://") from error
    if not isinstance(fs, LocalFileSystem):
        return Place(fs, root)
    if fs.isfile(root):
        raise StoreError(f"{what} {url}: {root} is a file; name a folder")
    return LocalPlace(fs, root)


def _refuse_credentials(protocol: str, url: str, what: str) -> None:
    """Raises StoreError, which shows no part of them, for a URL with credentials: URLs are logged and recorded."""
    if protocol in _ON_THIS_MACHINE:
        return
    # up to the first slash, which a secret may hold
    host = url.partition("://")[2].partition("/")[0]
    if protocol in ("s3", "s3a"):
        held = (":" in host or "@" in host) and not host.startswith("arn:")
    else:
        held = "@" in host or (":" in host and "@" in url and not host.rpartition(":")[2].isdigit())
    if held:
        raise StoreError(
            f"{what} {protocol}://…: credentials do not belong in a URL, which is logged and recorded; give them by "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or by a profile, and name the bucket alone"
        )


class Place:
    """Files below a root of an fsspec file system. Its steps raise OSError; `attempt` puts that into words."""

    remote = True  # a file costs a request, so looking at each has to be spared

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")

    @property
    def url(self) -> str:
        """The root, in full: what opens the place from any working folder."""
        return str(self._fs.unstrip_protocol(self._root))

    def shown(self, location: str) -> str:
        """What messages call a file."""
        return self._full(location)

    def attempt(self, location: str, doing: str, work: Callable[[], T]) -> T:
        """What `work` returns. For its OSError, raises StoreError: "PLACE: cannot be DOING: why and what to do"."""
        with disk_faults(self.shown(location), doing):
            return work()

    def check_room(self, size: int) -> None:  # noqa: ARG002 (of disks)
        """See that a file can be written, on a disk one of `size` bytes; none is left. Raises StoreError."""
        probe = temporary_name("room")

        def write_and_remove() -> None:
            self.put(probe, b"")
            self.remove(probe)

        self.attempt("", "written", write_and_remove)

    def put(self, location: str, data: bytes) -> None:
        """Write a file: a reader sees all of it or nothing."""
        self._fs.pipe_file(self._full(location), data)

    def create(self, location: str, data: bytes) -> bool:
        """Write a file unless there is one, where the place can tell in one step; whether it was written."""
        self.put(location, data)
        return True

    def read(self, location: str) -> bytes | None:
        """A file's contents; None if there is no such file."""
        return self._unless_absent(lambda: bytes(self._fs.cat_file(self._full(location))))

    def read_many(self, locations: Sequence[str]) -> Iterator[bytes | None]:
        """The contents of each file, several being read side by side; raises StoreError for one that can't be."""
        for start in range(0, len(locations), READ_AT_ONCE):
            some = locations[start : start + READ_AT_ONCE]
            # `cat` would take brackets in the root's name for a pattern
            blocks = self._fs.cat_ranges(
                [self._full(location) for location in some], [None] * len(some), [None] * len(some), on_error="return"
            )
            for location, block in zip(some, blocks, strict=True):
                if isinstance(block, BaseException):  # asked for again, alone
                    yield self.attempt(location, "read", partial(self.read, location))
                else:
                    yield block

    def size(self, location: str) -> int | None:
        """A file's size in bytes; None if there is no such file."""
        return self._unless_absent(lambda: int(self._fs.info(self._full(location))["size"]))

    def version(self, location: str) -> str | None:
        """What tells a file's contents from those that it had before, without reading them; None if there is none."""
        return self._unless_absent(lambda: _version(self._fs.info(self._full(location))))

    def versions(self) -> dict[str, str] | None:
        """Name and version of each file right below the root; None if there is no such folder."""
        listing = self._unless_absent(lambda: self._fs.ls(self._root, detail=True))
        if listing is None:
            return None
        return {basename(info["name"]): _version(info) for info in listing if info["type"] != "directory"}

    def stream(self, location: str, *, ahead: bool = True) -> Any:
        """A file opened to be read in pieces, as a context; what follows a piece is fetched ahead, or left.

        Raises FileNotFoundError if there is none.
        """
        return self._fs.open(self._full(location), "rb", cache_type="readahead" if ahead else "none")

    def modified(self, location: str) -> datetime | None:
        """When a file was written; None if there is no such file."""
        return self._unless_absent(lambda: self._fs.modified(self._full(location)))

    def sizes(self, folder: str) -> dict[str, int]:
        """Name and size in bytes of each file in `folder`; none if there is no such folder."""
        listing = self._unless_absent(lambda: self._fs.ls(self._full(folder), detail=True)) or []
        return {basename(info["name"]): int(info["size"] or 0) for info in listing if info["type"] != "directory"}

    def folders(self) -> list[str]:
        """Names of the folders at the root."""
        listing = self._unless_absent(lambda: self._fs.ls(self._full(""), detail=True)) or []
        return sorted(basename(info["name"].rstrip("/")) for info in listing if info["type"] == "directory")

    def tree(self, top: str) -> Iterator[tuple[str, set[str]]]:
        """Each folder of files from `top` down, and the names of the files in it."""
        for folder, _, files in self._fs.walk(self._full(top)):
            yield f"{top}{folder[len(self._full(top)) :]}".rstrip("/"), set(files)

    def remove(self, location: str) -> bool:
        """Remove a file; False if another process did."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._full(location))
            return True
        return False

    def move(self, source: str, target: str) -> bool:
        """Move a file; False if there is none any more."""
        with suppress(FileNotFoundError):
            self._fs.cp_file(self._full(source), self._full(target))
            self._fs.rm_file(self._full(source))
            return True
        return False

    def _unless_absent(self, look: Callable[[], T]) -> T | None:
        with suppress(FileNotFoundError):
            return look()
        return None

    def _full(self, location: str) -> str:
        return f"{self._root}/{location}" if location else self._root


def _version(info: Mapping[str, Any]) -> str:
    told = [str(info[key]) for key in ("size", "ETag", "mtime", "LastModified", "created") if info.get(key) is not None]
    return " ".join(told)


class LocalPlace(Place):
    """Folders on a disk: a file is written beside its target and renamed, both flushed."""

    remote = False

    def check_room(self, size: int) -> None:
        """See that the disk takes a file of `size` bytes; none is left behind. Raises StoreError."""
        check_room(FilePath(self._root), size)

    def put(self, location: str, data: bytes) -> None:
        """Write a file: a reader sees the old one, if there is one, or all of the new one."""
        with whole_file(FilePath(self._full(location))) as file:
            file.write(data)

    def create(self, location: str, data: bytes) -> bool:
        """Write a file unless there is one, which stays as it is; whether it was written."""
        path = FilePath(self._full(location))
        try:
            with whole_file(path, replace=False) as file:
                file.write(data)
        except FileExistsError:  # or a file stands in the place of the folder
            if not path.parent.is_dir():
                raise
            return False
        return True

    def move(self, source: str, target: str) -> bool:
        """Rename a file; False if there is none any more."""
        place = FilePath(self._full(target))
        place.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            FilePath(self._full(source)).replace(place)
            return True
        return False
