"""The content-addressed store: entries that are whole or absent, over any fsspec file system (design, section 5).

An entry is a data file whose name ends in the checksum of its contents, and a manifest, written last and in one step,
that makes it visible. Two writers of one entry can therefore not mix: each has a data file of its own unless both
wrote the same bytes, and the manifest names one of them. What does not match its manifest is set aside under
`quarantine/`, named in the log, and computed again. A writer that is killed leaves at most a file that nobody reads,
which `sweep_orphans` removes.
"""

import hashlib
import logging
import os
import re
import secrets
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path as FilePath
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quee_core.errors import DamagedTableError, StoreError, first_misfit
from quee_core.fingerprints import canonical_json
from quee_core.tables import SCHEMA_VERSION, Cell, check_table, from_parquet_bytes, to_parquet_bytes
from quee_core.whole_files import check_room, disk_faults, is_temporary, temporary_name, whole_file

logger = logging.getLogger(__name__)

QUARANTINE = "quarantine"
ARTEFACTS = "artefacts"
ORPHAN_AGE = 24 * 3600.0  # seconds; a file this old that no manifest names has no writer any more

_EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DATA = re.compile(r"(?P<stem>.+)\.(?P<sum>[0-9a-f]{16})\.(?P<kind>parquet|bin)")
_TABLE_DATA = re.compile(r"part-[0-9]{5,}-of-[0-9]{5,}-[0-9a-f]{20}\.[0-9a-f]{16}\.parquet")
_TABLE_MANIFEST = re.compile(r"_part-[0-9]{5,}-of-[0-9]{5,}-[0-9a-f]{20}\.json")
_READ_AT_ONCE = 16  # files, which a remote file system reads side by side


class Manifest(BaseModel):
    """What makes an entry visible: whose it is, and what its data file must be."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    entry: dict[str, str | int]
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)
    rows: int | None = Field(ge=0)  # None for an artefact


@dataclass(frozen=True)
class SetAside:
    """A damaged or foreign file that was moved out of the way: where it was, why, and the folder where it is."""

    location: str
    reason: str
    quarantined: str


@dataclass(frozen=True)
class _Entry:
    """Where an entry lies, and what its manifest must say it is."""

    folder: str
    stem: str
    suffix: str
    identity: dict[str, str | int]

    @property
    def manifest(self) -> str:
        # readers of Parquet folders pass over names with an underscore
        return f"{self.folder}/_{self.stem}.json"

    def data(self, sha256: str) -> str:
        return f"{self.folder}/{self.stem}.{sha256[:16]}{self.suffix}"

    @property
    def location(self) -> str:
        return f"{self.folder}/{self.stem}{self.suffix}"


class Store:
    """Tables by cell and artefacts by key, below one root. Threads, processes and hosts may share it.

    `set_aside` tells what this object has moved to the quarantine, in order.
    """

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")
        self._local = isinstance(fs, LocalFileSystem)
        self.set_aside: list[SetAside] = []

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> "Store":
        """The store at a folder or URL (file://, memory://, s3://); nothing is made before something is put.

        Raises StoreError for a kind of URL that is unknown or lacks its package, or a file where the folder should be.
        """
        text = os.fspath(url)
        protocol = text.partition("://")[0]
        try:
            # another writer's files must show, so listings are never kept
            fs, root = fsspec.core.url_to_fs(text, use_listings_cache=False)
        except ImportError as error:
            package = _EXTRAS.get(protocol)
            hint = f"pip install {package}" if package else "install it"
            raise StoreError(
                f"store {text}: {protocol}:// needs a package that is not installed ({error}); {hint}"
            ) from error
        except ValueError as error:
            raise StoreError(f"store {text}: {error}; want a folder, file://, memory:// or s3://") from error
        if isinstance(fs, LocalFileSystem) and fs.isfile(root):
            raise StoreError(f"store {text}: {root} is a file; name a folder")
        return cls(fs, root)

    @property
    def url(self) -> str:
        """Where the store is, in full: what opens it from any working folder."""
        return str(self._fs.unstrip_protocol(self._root))

    def check_room(self, size: int) -> None:
        """See that the store takes a file, on a local disk one of `size` bytes; none is left behind.

        Raises StoreError that names the store's root.
        """
        if self._local:
            check_room(FilePath(self._root), size)
            return
        place = self._full(temporary_name("room"))
        with disk_faults(self._root, "written"):
            self._fs.pipe_file(place, b"")
            self._fs.rm_file(place)

    def put_table(self, cell: Cell, table: pa.Table, metadata: Mapping[str, str] | None = None) -> None:
        """Publish a cell's table, whole or not at all. One that is there and whole is kept: the first writer wins.

        The file's metadata states cell, schema version and rows, and `metadata` under names that begin with "quee.".
        Raises StoreError for a full or read-only disk, DamagedTableError if `table` is no feature table.
        """
        check_table(table)
        facts = {name: str(value) for name, value in cell.describe().items()} | {
            "schema_version": str(SCHEMA_VERSION),
            "rows": str(table.num_rows),
        }
        facts |= {f"quee.{name}": value for name, value in (metadata or {}).items()}
        self._publish(_table_entry(cell), to_parquet_bytes(table, facts), rows=table.num_rows)

    def get_table(self, cell: Cell) -> pa.Table:
        """A cell's table: checksum and rows compared with the manifest, columns with the schema, its cell with `cell`.

        Raises DamagedTableError that names a damaged one and the reason, having set it aside; StoreError if there is
        none, or it can't be read.
        """
        entry = _table_entry(cell)
        place = self._full(entry.location)
        try:
            found = self._read(entry)
            table = None if found is None else _table_of(cell, found)
        except DamagedTableError as error:
            target = self._quarantine_entry(entry, str(error))
            raise DamagedTableError(
                f"{place}: {error}; set aside as {target}, run again to compute the table anew"
            ) from error
        if table is None:
            raise StoreError(f"{place}: no such table in the store; run the sweep again to compute it")
        return table

    def missing(self, cells: Sequence[Cell], *, contents: bool = True) -> list[Cell]:
        """The cells without a whole table, in order; each folder is listed once.

        contents: read the tables and compare their checksums; else only manifests are read, and sizes compared.
        What is damaged, and foreign files among the tables, are set aside on the way. Raises StoreError if the store
        can't be read, or a damaged file not be set aside.
        """
        absent: set[Cell] = set()
        folders: dict[str, list[Cell]] = defaultdict(list)
        for cell in dict.fromkeys(cells):
            folders[cell.folder].append(cell)
        for folder, members in folders.items():
            names = self._names(folder)
            self._set_strangers_aside(folder, names)
            listed = []
            for cell in members:
                if _basename(_table_entry(cell).manifest) in names:
                    listed.append(cell)
                else:
                    absent.add(cell)
            absent.update(self._not_whole(listed, contents))
        return [cell for cell in cells if cell in absent]

    def put_artefact(self, kind: str, key: str, data: bytes) -> None:
        """Publish bytes under a kind and a key, whole or not at all; what is there and whole is kept.

        kind, key: letters, digits, '.', '_' and '-', at most 128; ValueError otherwise. Raises StoreError.
        """
        self._publish(_artefact_entry(kind, key), data, rows=None)

    def get_artefact(self, kind: str, key: str) -> bytes | None:
        """What `put_artefact` published, or None if there is nothing whole; a damaged one is set aside.

        Raises StoreError if the store can't be read.
        """
        entry = _artefact_entry(kind, key)
        try:
            return self._read(entry)
        except DamagedTableError as error:
            self._quarantine_entry(entry, str(error))
            return None

    def sweep_orphans(self, *, older_than: float = ORPHAN_AGE) -> list[str]:
        """Remove what killed writers left, older than `older_than` seconds; returns where it was.

        That is temporary files, and data files that no manifest names. Only files with names that the store gives,
        in its own folders, are touched. A writer still at work is younger. Raises StoreError.
        """
        removed = []
        oldest = datetime.now(UTC) - timedelta(seconds=older_than)
        with disk_faults(self._root, "swept"):
            for folder, names in self._own_folders():
                for name in self._unnamed(folder, names):
                    path = self._full(f"{folder}/{name}")
                    try:
                        if self._fs.modified(path) <= oldest:
                            self._fs.rm_file(path)
                            removed.append(f"{folder}/{name}")
                    except FileNotFoundError:
                        logger.debug("%s: gone already", path)
        return removed

    def _publish(self, entry: _Entry, data: bytes, *, rows: int | None) -> None:
        sha256 = hashlib.sha256(data).hexdigest()
        manifest = Manifest(entry=entry.identity, sha256=sha256, bytes=len(data), rows=rows)
        try:
            if self._read(entry) is not None:
                logger.debug("%s: there already", entry.location)
                return
        except DamagedTableError as error:
            self._quarantine_entry(entry, str(error))
        with disk_faults(self._full(entry.location), "written"):
            self._put(entry.data(sha256), data)
            self._put(entry.manifest, canonical_json(manifest.model_dump()).encode())

    def _put(self, location: str, data: bytes) -> None:
        if self._local:
            with whole_file(FilePath(self._full(location))) as file:
                file.write(data)
        else:
            self._fs.pipe_file(self._full(location), data)  # one put of the finished object

    def _read(self, entry: _Entry) -> bytes | None:
        """A whole entry's data; None if there is none. Raises DamagedTableError with the reason, StoreError."""
        text = self._bytes(entry.manifest)
        if text is None:
            return None
        manifest = _parse(entry, text)
        return _whole(manifest, self._bytes(entry.data(manifest.sha256)))

    def _not_whole(self, cells: Sequence[Cell], contents: bool) -> Iterator[Cell]:
        """Those of `cells` whose entry is gone or damaged; the damaged ones are set aside."""
        entries = {cell: _table_entry(cell) for cell in cells}
        manifests: dict[Cell, Manifest] = {}
        for cell, text in self._many(cells, [entry.manifest for entry in entries.values()]):
            if text is None:
                yield cell
                continue
            try:
                manifests[cell] = _parse(entries[cell], text)
            except DamagedTableError as error:
                self._quarantine_entry(entries[cell], str(error))
                yield cell
        places = [entries[cell].data(manifest.sha256) for cell, manifest in manifests.items()]
        found = self._many(list(manifests), places) if contents else self._sizes(list(manifests), places)
        for cell, data in found:
            try:
                if isinstance(data, bytes):
                    _whole(manifests[cell], data)
                else:
                    _check_size(manifests[cell], data)
            except DamagedTableError as error:
                self._quarantine_entry(entries[cell], str(error))
                yield cell

    def _many(self, cells: Sequence[Cell], locations: Sequence[str]) -> Iterator[tuple[Cell, bytes | None]]:
        for start in range(0, len(cells), _READ_AT_ONCE):
            paths = [self._full(location) for location in locations[start : start + _READ_AT_ONCE]]
            # `cat` would take brackets in the root's name for a pattern
            blocks = self._fs.cat_ranges(paths, [None] * len(paths), [None] * len(paths), on_error="return")
            for cell, path, block in zip(cells[start : start + _READ_AT_ONCE], paths, blocks, strict=True):
                if isinstance(block, FileNotFoundError):
                    yield cell, None
                elif isinstance(block, BaseException):
                    with disk_faults(path, "read"):
                        raise block
                else:
                    yield cell, block

    def _sizes(self, cells: Sequence[Cell], locations: Sequence[str]) -> Iterator[tuple[Cell, int | None]]:
        # not from the listing: a table published while the folder was listed may show there without its data
        for cell, location in zip(cells, locations, strict=True):
            size = None
            with disk_faults(self._full(location), "read"), suppress(FileNotFoundError):
                size = int(self._fs.info(self._full(location))["size"])
            yield cell, size

    def _bytes(self, location: str) -> bytes | None:
        data: bytes | None = None
        with disk_faults(self._full(location), "read"), suppress(FileNotFoundError):
            data = self._fs.cat_file(self._full(location))
        return data

    def _names(self, folder: str) -> set[str]:
        """Names of the files in `folder`; none if there is no such folder."""
        listing: list[dict[str, Any]] = []
        with disk_faults(self._full(folder), "listed"), suppress(FileNotFoundError):
            listing = self._fs.ls(self._full(folder), detail=True)
        return {_basename(info["name"]) for info in listing if info["type"] != "directory"}

    def _own_folders(self) -> Iterator[tuple[str, set[str]]]:
        """Folders of tables and artefacts with the names of the files in them; nothing else below the root."""
        top: list[dict[str, Any]] = []
        with suppress(FileNotFoundError):
            top = self._fs.ls(self._full(""), detail=True)
        for name in sorted(_basename(info["name"].rstrip("/")) for info in top if info["type"] == "directory"):
            if name == ARTEFACTS or name.startswith("backbone="):
                for folder, _, files in self._fs.walk(self._full(name)):
                    yield f"{name}{folder[len(self._full(name)) :]}".rstrip("/"), set(files)

    def _unnamed(self, folder: str, names: set[str]) -> Iterator[str]:
        """Temporary files of `folder`, and data files that no manifest names."""
        for name in sorted(names):
            if is_temporary(name):
                yield name
            elif match := _DATA.fullmatch(name):
                text = self._bytes(f"{folder}/_{match['stem']}.json")
                try:
                    if text is None or not Manifest.model_validate_json(text).sha256.startswith(match["sum"]):
                        yield name
                except ValidationError:
                    logger.debug("%s/%s: kept, its manifest is unreadable", folder, name)

    def _set_strangers_aside(self, folder: str, names: set[str]) -> None:
        for name in sorted(names):
            # a data file without its manifest may be in the making; hidden files are other programs' business
            if not (_TABLE_DATA.fullmatch(name) or _TABLE_MANIFEST.fullmatch(name) or name.startswith(".")):
                self._quarantine([f"{folder}/{name}"], "a file that quee did not write")

    def _quarantine_entry(self, entry: _Entry, reason: str) -> str:
        """Set aside an entry: its manifest first, so that it is invisible at once, then the data that it names."""
        files = [entry.manifest]
        # where the manifest is unreadable, its data is an orphan now
        with suppress(ValidationError):
            files.append(entry.data(Manifest.model_validate_json(self._bytes(entry.manifest) or b"").sha256))
        return self._quarantine(files, reason)

    def _quarantine(self, locations: Sequence[str], reason: str) -> str:
        """Move files to a folder of their own in the quarantine, with the reason; returns that folder."""
        target = f"{QUARANTINE}/{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
        moved = []
        with disk_faults(self._full(locations[0]), f"set aside, though it should be ({reason})"):
            for location in locations:
                try:
                    self._move(location, f"{target}/{_basename(location)}")
                    moved.append(location)
                except FileNotFoundError:
                    logger.debug("%s: another process set it aside", location)
            if moved:
                self._put(f"{target}/reason.json", canonical_json({"from": moved, "reason": reason}).encode())
        if moved:
            self.set_aside.append(SetAside(moved[0], reason, target))
            logger.warning("%s: %s; set aside as %s", self._full(moved[0]), reason, self._full(target))
        return target

    def _move(self, source: str, target: str) -> None:
        if self._local:
            place = FilePath(self._full(target))
            place.parent.mkdir(parents=True, exist_ok=True)
            FilePath(self._full(source)).replace(place)
        else:
            self._fs.cp_file(self._full(source), self._full(target))
            self._fs.rm_file(self._full(source))

    def _full(self, location: str) -> str:
        return f"{self._root}/{location}"


def _table_entry(cell: Cell) -> _Entry:
    return _Entry(cell.folder, _basename(cell.location).removesuffix(".parquet"), ".parquet", cell.describe())


def _artefact_entry(kind: str, key: str) -> _Entry:
    for what, name in (("kind", kind), ("key", key)):
        if not _NAME.fullmatch(name):
            raise ValueError(f"artefact {what} {name!r}: want 1 to 128 letters, digits, '.', '_' and '-'")
    return _Entry(f"{ARTEFACTS}/{kind}", key, ".bin", {"kind": kind, "key": key})


def _parse(entry: _Entry, text: bytes) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise DamagedTableError(f"its manifest is unreadable at {first_misfit(error)}") from error
    for field, value in entry.identity.items():
        if (stated := manifest.entry.get(field)) != value:
            raise DamagedTableError(f"its manifest belongs elsewhere: {field} is {stated!r}, not {value!r}")
    return manifest


def _check_size(manifest: Manifest, size: int | None) -> None:
    """Raises DamagedTableError unless there is a data file, of the size that its manifest states."""
    if size is None:
        raise DamagedTableError("its data file is gone")
    if size != manifest.bytes:
        raise DamagedTableError(f"{size} bytes, its manifest says {manifest.bytes}")


def _whole(manifest: Manifest, data: bytes | None) -> bytes:
    """`data`, if it is all that its manifest states. Raises DamagedTableError with the reason."""
    _check_size(manifest, None if data is None else len(data))
    data = data or b""
    if hashlib.sha256(data).hexdigest() != manifest.sha256:
        raise DamagedTableError("its checksum is not that of its manifest")
    if manifest.rows is not None:
        try:
            rows = pq.read_metadata(pa.BufferReader(data)).num_rows
        except (pa.ArrowException, OSError) as error:
            raise DamagedTableError(f"not a Parquet file: {str(error).splitlines()[0]}") from error
        if rows != manifest.rows:
            raise DamagedTableError(f"{rows} rows, its manifest says {manifest.rows}")
    return data


def _table_of(cell: Cell, data: bytes) -> pa.Table:
    """The table in a Parquet file of `cell`. Raises DamagedTableError with the reason if it is another one."""
    table = from_parquet_bytes(data)
    stated = table.schema.metadata or {}
    for field, value in cell.describe().items():
        if (found := stated.get(field.encode())) != str(value).encode():
            name = "missing" if found is None else repr(found.decode(errors="replace"))
            raise DamagedTableError(f"its file belongs elsewhere: {field} is {name}, not {str(value)!r}")
    return table


def _basename(path: str) -> str:
    return path.rpartition("/")[2]
